"""Rows on disk: what is read, what is refused, and how a refusal reads."""

import json
import os

import pytest

from stkit.bench import schema
from stkit.runtime import StkitError, StkitWarning

ROW = dict(
    id="q1", clip_id="c1", video="c1.mp4", group="g1", task="direction", order="forward", question="Which turns?",
    options=["left", "right"], answer=1, split="test", format_version=1,
)  # fmt: skip


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_a_row_comes_back_as_it_was_written(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROW, ROW | {"id": "q2", "task": "route", "options": [], "answer": "go straight"}])
    questions, skipped = schema.load_questions(path)
    assert skipped == [] and [schema.row_of(q)["id"] for q in questions] == ["q1", "q2"]
    assert questions[0].options == ("left", "right") and questions[0].kind == "direction/forward"
    assert questions[1].is_open and questions[1].answer == "go straight"


BAD = {
    "answer out of range": (ROW | {"answer": 2}, "answer=2"),
    "negative answer": (ROW | {"answer": -1}, "answer=-1"),
    "answer as a letter": (ROW | {"answer": "B"}, "answer='B'"),
    "answer true": (ROW | {"answer": True}, "answer=True"),
    "one option": (ROW | {"options": ["left"], "answer": 0}, "1 given"),
    "no options": (ROW | {"options": []}, "at least two"),
    "27 options": (ROW | {"options": [str(i) for i in range(27)]}, "27 given"),
    "equal options": (ROW | {"options": ["Left", " left "]}, "twice"),
    "options as a string": (ROW | {"options": "A. left, B. right"}, "give a list"),
    "null option": (ROW | {"options": ["left", None]}, "None"),
    "empty question": (ROW | {"question": " "}, "question=' '"),
    "null question": (ROW | {"question": None}, "question=None"),
    "missing field": ({k: v for k, v in ROW.items() if k != "group"}, "group is missing"),
    "unknown task": (ROW | {"task": "colour"}, "task='colour'"),
    "unknown split": (ROW | {"split": "val"}, "split='val'"),
    "later version": (ROW | {"format_version": 9}, "format_version=9"),
    "video above videos/": (ROW | {"video": "../secret.mp4"}, "leaves videos/"),
    "video up inside": (ROW | {"video": "a/../../b.mp4"}, "leaves videos/"),
    "absolute video": (ROW | {"video": "/etc/passwd"}, "leaves videos/"),
    "video on a Windows drive": (ROW | {"video": "C:\\x.mp4"}, "leaves videos/"),
    "video as a URL": (ROW | {"video": "http://x/y.mp4"}, "leaves videos/"),
    "not an object": ([1, 2], "JSON object"),
    "open question without an answer": (ROW | {"task": "route", "options": [], "answer": ""}, "answer=''"),
    "not JSON": ('{"id": "q', "not a whole JSON object"),
    "NaN": ('{"id": NaN}', "not a whole JSON object"),
    "answer 1.0": (ROW | {"answer": 1.0}, "answer=1.0"),
    "options equal but for their code points": (ROW | {"options": ["caf\u00e9", "cafe\u0301"]}, "twice"),
    "half a surrogate pair": (ROW | {"question": "\ud800?"}, "surrogate"),
    "a name that no file can have": (ROW | {"video": "a" * 300 + ".mp4"}, "255"),
    "solution as a number": (ROW | {"solution": 5}, "solution=5"),
    "version true": (ROW | {"format_version": True}, "format_version=True"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_names_file_line_value_and_fix(tmp_path, name):
    row, word = BAD[name]
    path = write(tmp_path / "q.jsonl", [ROW | {"id": "good"}, row])
    with pytest.raises(schema.BadRows) as error:
        schema.load_questions(path)
    assert len(error.value.problems) == 1
    assert f"{path}:2: " in str(error.value) and word in str(error.value) and "--skip-bad" in str(error.value)
    questions, skipped = schema.load_questions(path, skip_bad=True)
    assert [q.id for q in questions] == ["good"] and len(skipped) == 1


def test_a_byte_order_mark_line_ends_of_windows_and_extra_keys_do_no_harm(tmp_path):
    text = json.dumps(ROW | {"note": "\u00fc", "\ud800": 1}) + "\r\n" + json.dumps(ROW | {"id": "q2"}) + "\r\n"
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    questions, _ = schema.load_questions(tmp_path / "q.jsonl")
    assert [q.id for q in questions] == ["q1", "q2"]


def test_all_bad_lines_are_listed_at_once_with_truncated_and_duplicate_ones(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROW, ROW, ROW | {"id": "q3", "answer": 7}, "", json.dumps(ROW)[:40]])
    with pytest.raises(schema.BadRows) as error:
        schema.load_questions(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and ":2: id='q1' stands in line 1 too" in lines[0] and ":3: answer=7" in lines[1] and ":5:" in lines[2]


def test_an_empty_or_missing_file_is_one_clear_line(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n \n")
    for path, word in ((tmp_path / "q.jsonl", "empty"), (tmp_path / "none.jsonl", "no such file")):
        with pytest.raises(StkitError, match=word) as error:
            schema.load_questions(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["nonsense", "[\n1,\n2\n]\n", "\x00\n" * 1000])
def test_a_file_of_something_else_is_one_line_that_names_the_first(tmp_path, text):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    for skip_bad in (False, True):
        with pytest.raises(StkitError, match="q.jsonl:1: .*no line of this file is a JSON object") as error:
            schema.load_questions(path, skip_bad)
        assert "\n" not in str(error.value)


def test_nothing_good_is_an_error_even_with_skip_bad(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROW | {"answer": 9}])
    with pytest.raises(StkitError, match="not one good row"):
        schema.load_questions(path, skip_bad=True)


def benchmark(folder):
    (folder / "videos").mkdir(parents=True)
    write(folder / "questions.jsonl", [ROW])
    (folder / "clips.jsonl").write_text("")
    (folder / "benchmark.json").write_text(json.dumps({"format_version": 1, "hash": schema.benchmark_hash(folder)}))
    return folder


def test_an_edited_benchmark_is_warned_about_and_still_read(tmp_path, recwarn):
    folder = benchmark(tmp_path / "b")
    (folder / "clips.jsonl").unlink()
    (folder / "benchmark.json").write_text(json.dumps({"format_version": 1, "hash": schema.benchmark_hash(folder)}))
    schema.load_benchmark(folder)
    assert not recwarn.list
    write(folder / "questions.jsonl", [ROW | {"answer": 0}])
    with pytest.warns(StkitWarning, match="edited"):
        assert schema.load_benchmark(folder).questions[0].answer == 0


CLIP = dict(id="c1", video="c1.mp4", group="g1", split="test", frames=9, fps=5.0, width=8, height=8, duration_s=1.8)


def test_bad_clips_are_listed_with_the_bad_questions_and_skipped_with_them(tmp_path):
    folder = benchmark(tmp_path / "b")
    (folder / "benchmark.json").write_text(json.dumps({"format_version": 1}))
    write(folder / "questions.jsonl", [ROW, ROW | {"id": "q2", "answer": 5}])
    bad = [CLIP, CLIP | {"id": "c2", "video": "../x.mp4"}, {"id": "c3"}, CLIP | {"id": "c4", "fps": "5"}, "[1]"]
    write(folder / "clips.jsonl", bad)
    with pytest.raises(schema.BadRows) as error:
        schema.load_benchmark(folder)
    said = error.value.problems
    words = ("questions.jsonl:2: answer=5", "clips.jsonl:2: video='../x.mp4'", ":3: video is missing", ":4: fps='5'", ":5: ")
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))
    bench = schema.load_benchmark(folder, skip_bad=True)
    assert [c.id for c in bench.clips] == ["c1"] and len(bench.questions) == 1 and len(bench.skipped) == 5


def test_a_symlink_out_of_videos_is_refused(tmp_path):
    folder = benchmark(tmp_path / "b")
    (tmp_path / "secret.mp4").write_bytes(b"x")
    os.symlink(tmp_path / "secret.mp4", folder / "videos" / "c1.mp4")
    (folder / "clips.jsonl").unlink()
    bench = schema.load_benchmark(folder)
    with pytest.raises(StkitError, match="leaves"):
        bench.video_path("c1.mp4")
    with pytest.raises(StkitError, match="leaves"):
        bench.video_path("../secret.mp4")
    assert bench.video_path("c2.mp4") == folder / "videos" / "c2.mp4"
    os.symlink("loop.mp4", folder / "videos" / "loop.mp4")
    assert bench.video_path("loop.mp4").is_symlink()


def test_a_folder_that_is_no_benchmark_says_what_is_missing(tmp_path):
    with pytest.raises(StkitError, match="no benchmark.json"):
        schema.load_benchmark(tmp_path)
    with pytest.raises(StkitError, match="no such file or folder"):
        schema.load_benchmark(tmp_path / "nowhere")


def test_the_questions_come_as_a_data_frame(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROW])
    frame = schema.load_benchmark(path).frame()
    assert frame.loc[0, "answer"] == 1 and set(ROW) <= set(frame.columns)
