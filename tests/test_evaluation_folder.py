"""A run's folder: every answer on disk as it comes, nothing lost, nothing mixed that does not belong together."""

import errno
import functools
from dataclasses import replace

import numpy as np
import pytest
from benchmaker import lines, make_questions, write_bench, write_video

from stkit import evaluation
from stkit.bench.schema import row_of
from stkit.evaluation import evaluate
from stkit.runs import write_jsonl
from stkit.runtime import StkitError
from stkit.vlm import cache as cache_module
from stkit.vlm import inquiry, sight
from stkit.vlm.interview import Interview
from stkit.vlm.load import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-untrained", device="cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench") / "walks")


@pytest.fixture
def own_bench(tmp_path):
    return write_bench(tmp_path / "walks")


@pytest.fixture(scope="module")
def first(bench, tiny, tmp_path_factory):
    """One plain run in letter mode, for the tests that only look at it."""
    return evaluate(bench, tiny, tmp_path_factory.mktemp("runs") / "first", progress=False)


def test_a_killed_run_goes_on_where_it_was(bench, tiny, first, tmp_path, monkeypatch):
    """Stopped by Ctrl-C within the second clip, with half a line on disk: nothing is asked twice or lost."""
    ask, calls = Interview.ask, []

    def stopped(self, questions, shown):
        calls.append(len(questions))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ask(self, questions, shown)

    monkeypatch.setattr(Interview, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bench, tiny, tmp_path / "r", batch_size=3, progress=False)
    done = lines(tmp_path / "r" / "predictions.jsonl")
    assert 0 < len(done) < 12 and not (tmp_path / "r" / "scores.json").exists()
    with open(tmp_path / "r" / "predictions.jsonl", "a") as file:
        file.write('{"id": "half a li')
    asked = []
    monkeypatch.setattr(
        Interview,
        "ask",
        lambda self, questions, shown: (
            asked.extend(q.id for q in questions if shown.inputs) or ask(self, questions, shown)
        ),
    )
    result = evaluate(bench, tiny, tmp_path / "r", batch_size=3, progress=False)
    assert asked and not set(asked) & {row["id"] for row in done}
    assert lines(tmp_path / "r" / "predictions.jsonl")[: len(done)] == done
    assert result.scores == first.scores
    for name in ("predictions", "blind"):
        old, new = ({r["id"]: r for r in lines(folder / f"{name}.jsonl")} for folder in (first.out, tmp_path / "r"))
        assert list(old) == list(new) and all(
            np.allclose(old[i]["log_probs"], new[i]["log_probs"], atol=1e-5) for i in old
        )
    again = evaluate(bench, tiny, tmp_path / "r", batch_size=1, progress=False)
    assert again.scores == result.scores and len(lines(tmp_path / "r" / "predictions.jsonl")) == 12


def test_other_settings_are_refused_and_named(bench, tiny, first):
    with pytest.raises(StkitError, match="made with other settings .*settings.control: 'none' -> 'reversed'"):
        evaluate(bench, tiny, first.out, control="reversed", progress=False)
    with pytest.raises(StkitError, match="settings.frames: 4 -> 6"):
        evaluate(bench, tiny, first.out, frames=6, progress=False)
    with pytest.raises(StkitError, match="model.dtype: 'float32' -> 'float16'"):
        evaluate(bench, tiny._replace(record=tiny.record | {"dtype": "float16"}), first.out, progress=False)


def test_files_that_changed_since_the_run_started_are_refused_by_name(own_bench, tiny, tmp_path):
    evaluate(own_bench, tiny, tmp_path / "r", limit=13, progress=False)
    write_video(own_bench / "videos" / "b.mp4", seed=9)
    with pytest.raises(StkitError, match=r"changed since the run .* was started \(b.mp4\)"):
        evaluate(own_bench, tiny, tmp_path / "r", limit=13, progress=False)
    write_video(own_bench / "videos" / "b.mp4", seed=1)
    questions = make_questions()
    write_jsonl(own_bench / "questions.jsonl", map(row_of, [replace(questions[0], answer=1), *questions[1:]]))
    with pytest.raises(StkitError, match=r"changed since .*\(a-direction-forward\)"):
        evaluate(own_bench, tiny, tmp_path / "r", limit=13, progress=False)
    write_jsonl(own_bench / "questions.jsonl", map(row_of, questions))
    evaluate(own_bench, tiny, tmp_path / "r", limit=13, progress=False)


def test_a_file_that_changes_while_the_run_is_on_stops_it(own_bench, tiny, tmp_path, monkeypatch):
    watch = Interview.watch
    monkeypatch.setattr(
        Interview,
        "watch",
        lambda self, path, clip: (write_video(own_bench / "videos" / "b.mp4", 7), watch(self, path, clip))[1],
    )
    with pytest.raises(StkitError, match="b.mp4 changed since the run was started"):
        evaluate(own_bench, tiny, tmp_path / "r", progress=False)
    assert {row["id"][0] for row in lines(tmp_path / "r" / "predictions.jsonl")} == {"a"}


@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_a_question_whose_video_fails_is_recorded_counted_and_never_scored(own_bench, tiny, tmp_path, harm):
    video = own_bench / "videos" / "b.mp4"
    whole = video.read_bytes()
    video.unlink() if harm == "missing" else video.write_bytes(whole[: len(whole) // 2] if harm == "truncated" else b"")
    result = evaluate(own_bench, tiny, tmp_path / "r", progress=False)
    rows = lines(tmp_path / "r" / "predictions.jsonl")
    failed = [row for row in rows if row["failed"]]
    assert [row["id"][0] for row in failed] == ["b"] * 4 and all(
        "b.mp4" in row["failed"] and "\n" not in row["failed"] for row in failed
    )
    assert all(row["correct"] is None and row["parsed"] is None and row["text"] == "" for row in failed)
    right = sum(row["correct"] for row in rows if not row["failed"])
    assert result.scores["failed"] == 4 and result.scores["n"] == 8
    assert result.scores["accuracy"] == right / 8 and result.scores["accuracy_failed_wrong"] == right / 12
    assert "4 of 12 questions failed (33.3 %)" in result.text().splitlines()[0]
    assert evaluate(own_bench, tiny, tmp_path / "r", progress=False).scores == result.scores


def test_a_video_outside_of_the_benchmark_is_a_failure_not_a_leak(own_bench, tiny, tmp_path):
    write_video(tmp_path / "secret.mp4", 5)
    (own_bench / "videos" / "b.mp4").unlink()
    (own_bench / "videos" / "b.mp4").symlink_to(tmp_path / "secret.mp4")
    result = evaluate(own_bench, tiny, tmp_path / "r", progress=False)
    assert result.scores["failed"] == 4 and "leaves" in lines(tmp_path / "r" / "predictions.jsonl")[4]["failed"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(bench, tiny, tmp_path, monkeypatch):
    write, calls = inquiry.append_jsonl, []

    def full(path, row):
        calls.append(path)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, row)

    monkeypatch.setattr(inquiry, "append_jsonl", full)
    with pytest.raises(StkitError, match="the disk is full: free some space and run the same command again"):
        evaluate(bench, tiny, tmp_path / "r", progress=False)
    assert evaluate(bench, tiny, tmp_path / "r", progress=False).scores["n"] == 12


def test_a_read_only_folder_is_one_line(bench, tiny, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "r"))

    monkeypatch.setattr(sight, "claim", refuse)
    with pytest.raises(StkitError, match="read-only: choose another --out"):
        evaluate(bench, tiny, tmp_path / "r", progress=False)


def test_malformed_rows_stop_it_unless_they_are_to_be_skipped_and_counted(own_bench, tiny, tmp_path):
    with open(own_bench / "questions.jsonl", "a") as file:
        file.write('{"id": "cut of')
    with pytest.raises(StkitError, match="questions.jsonl:19: not a whole JSON object"):
        evaluate(own_bench, tiny, tmp_path / "r", progress=False)
    assert not (tmp_path / "r").exists()
    result = evaluate(own_bench, tiny, tmp_path / "r", limit=4, skip_bad=True, progress=False)
    assert result.scores["skipped"] == 1 and any("1 malformed row" in notice for notice in result.scores["notices"])


def test_cached_frames_change_no_answer_and_are_not_decoded_again(bench, tiny, first, tmp_path, monkeypatch):
    monkeypatch.setenv("STKIT_CACHE", str(tmp_path / "frames"))
    plain = evaluate(bench, tiny, tmp_path / "plain", cache=False, progress=False)
    assert not (tmp_path / "frames").exists()
    evaluate(bench, tiny, tmp_path / "fills", progress=False)
    assert len([*(tmp_path / "frames").glob("*.npz")]) == 3

    @functools.wraps(cache_module.read_video)
    def decoded(*_, **__):
        raise AssertionError("a cached video was read again")

    monkeypatch.setattr(cache_module, "read_video", decoded)
    cached = evaluate(bench, tiny, tmp_path / "cached", progress=False)
    assert cached.scores == plain.scores == first.scores
    for before, after in zip(lines(plain.out / "predictions.jsonl"), lines(cached.out / "predictions.jsonl"), strict=True):
        assert before | {"seconds": 0} == after | {"seconds": 0}


def test_other_settings_are_refused_before_a_model_is_loaded(bench, first, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setattr(evaluation, "load_model", loaded)
    with pytest.raises(StkitError, match="settings.seed: 0 -> 1"):
        evaluate(bench, "tiny-untrained", first.out, seed=1, progress=False)
