"""The released Ego-ST files: every row is accounted for, and predictions go back to where they came from."""

import errno
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stkit.bench.egost import detect_form, import_egost, write_predictions
from stkit.bench.options import Rejected, parse_listed, parse_options, read_answer, split_problem
from stkit.bench.schema import load_benchmark
from stkit.runtime import StkitError

REPO = Path(__file__).resolve().parents[1]
SAMPLES = REPO / "tests" / "samples"
R1, MCQ, OPEN = (SAMPLES / f"egost_{name}" for name in ("r1.jsonl", "mcq.json", "open.json"))
DATA = Path(os.environ.get("STKIT_DATA", REPO.parent / "shared" / "data"))
RELEASED = DATA / "ego_st_r1_mcq_504.jsonl"
needs_released = pytest.mark.skipif(
    not RELEASED.exists(), reason=f"{RELEASED} is not there: set STKIT_DATA to the folder that holds the released rows"
)
THREE = ("turn left", "turn right", "go straight")


def imported(file, folder):
    told = import_egost(file, folder)
    return told, {q.id: q for q in load_benchmark(folder).questions}


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    return imported(R1, tmp_path_factory.mktemp("r1") / "out")


@pytest.fixture(scope="module")
def mcq(tmp_path_factory):
    return imported(MCQ, tmp_path_factory.mktemp("mcq") / "out")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return imported(OPEN, tmp_path_factory.mktemp("open") / "out")


def reasons(told, kind):
    return {entry["row"]: entry["reason"] for entry in told[kind]}


# --- forms ---


def test_each_form_is_told_from_the_others(tmp_path):
    assert [detect_form(f) for f in (R1, MCQ, OPEN)] == ["r1", "mcq", "open"]
    row = json.loads(R1.read_text().split("\n")[0])
    for text in (json.dumps([row, row]), json.dumps(row, indent=2), json.dumps(row)):
        (tmp_path / "rows.json").write_text(text)
        assert detect_form(tmp_path / "rows.json") == "r1"
    both = {"1": {"video": "1.mp4", "question": "Q", "forward_answer": "Go.", "forward_mcq": {"question": "Q"}}}
    (tmp_path / "both.json").write_text(json.dumps(both))
    assert detect_form(tmp_path / "both.json") == "mcq"


BAD_FILES = {
    "": "empty",
    " \n\n": "empty",
    "\ufeff": "empty",
    "forward_mcq: what": "not JSON",
    '{"1": {"forward_mcq": ': "not JSON",
    "{}": "not one of the released forms",
    "[]": "not one of the released forms",
    "3": "not one of the released forms",
    "null": "not one of the released forms",
    '{"1": {"question": "no options, no answer"}}': "not one of the released forms",
    '[{"question": "Q", "options": ["A. x", "B. y"]}]': "not one of the released forms",
    "[" * 100_000: "not JSON",
    "1" * 5_000: "not JSON",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=range(len(BAD_FILES)))
@pytest.mark.parametrize("read", [detect_form, lambda f: import_egost(f, f.with_name("out"))], ids=["form", "import"])
def test_a_file_of_another_shape_is_one_line_that_names_it_and_what_was_expected(tmp_path, text, read):
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(StkitError) as caught:
        read(file)
    message = str(caught.value)
    assert BAD_FILES[text] in message and str(file) in message and "forward_mcq" in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_missing_file_a_folder_and_bytes_are_named(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'{"1": "\xff"}')
    for name, told in (("none.json", "no such file"), (".", "is a folder"), ("bytes.json", "not UTF-8")):
        with pytest.raises(StkitError, match=told) as caught:
            import_egost(tmp_path / name, tmp_path / "out")
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# --- training rows ---

R1_KEPT = {  # line: (task/order, options, the right one), by hand
    1: ("direction/forward", ("turn left", "turn right", "go straight", "go back"), "turn right"),
    2: (
        "direction/forward",
        ("turn left, then right", "turn right, then left, and stop", "wait"),
        "turn right, then left, and stop",
    ),
    3: ("landmark/forward", ("water bottle", "vitamin A. bottle", "a vase"), "a vase"),
    4: ("direction/reverse", THREE, "go straight"),
    8: ("landmark/forward", ("red sofa", "blue sofa", "lamp"), "lamp"),
    9: (
        "action/reverse",
        ("pick up the cup, turn", "put down the cup", "open a door, B. and close it"),
        "pick up the cup, turn",
    ),
    10: ("action/reverse", ("pick up the cup", "put it down", "wait"), "put it down"),
    11: ("action/reverse", ("pick up the cup", "put it down", "wait"), "wait"),
    12: ("action/reverse", ("pick up the cup", "put it down"), "pick up the cup"),
    14: ("direction/forward", ("turn left", "turn right"), "turn right"),
    16: (
        "landmark/forward",
        ("<|im_end|>\n<|im_start|>assistant", "<b>lamp</b> & {{ x }}", "<|video_pad|>"),
        "<b>lamp</b> & {{ x }}",
    ),
    17: ("landmark/forward", ("red sofa", "blue sofa, with a cushion", "lamp"), "blue sofa, with a cushion"),
    18: ("landmark/forward", ("red sofa", "lamp"), "red sofa"),
    23: ("landmark/forward", ("red sofa", "blue sofa", "lamp"), "red sofa"),
    24: ("direction/reverse", THREE, "go straight"),
    25: ("direction/reverse", THREE, "go straight"),
    28: (
        "landmark/forward",
        ("a map of Rome", "a map of Paris", "a map of Washington, D.C."),
        "a map of Washington, D.C.",
    ),
    31: ("direction/reverse", ("take route B. and stop", "take route C.", "wait, B. again"), "wait, B. again"),
    32: ("direction/forward", ("red", "blue"), "red"),
    33: ("direction/forward", ("left", "right"), "left"),
}
R1_REJECTED = {
    5: "fewer than two",
    6: "twice",
    7: "'D' is not there",
    13: "disagree: A, B",
    15: "no <answer>",
    19: "problem=None",
    20: "video=None",
    21: "not JSON",
    22: "an object was expected",
    26: "leaves videos/",
    27: "options hold ''",
    29: "letter of one option and the text of another",
    30: "surrogate",
}
R1_DOUBTFUL = {
    3: "holds 'A.'",
    4: "A, C, D (B missing)",
    8: "lower case",
    9: "holds 'B.'",
    14: "original_answer was taken",
    17: "without letters",
    18: "no 'Options:'",
    23: "first option has no letter",
    24: "nothing but a space",
    25: "read from an option's text",
    31: "holds 'C.'",
    32: "taken as direction",
    33: "/other here",
}


def test_every_trap_in_a_training_row_ends_as_a_question_or_a_rejection(r1):
    told, questions = r1
    lines = R1.read_text().rstrip("\n").split("\n")
    assert told["rows"] == len(lines) == len(R1_KEPT) + len(R1_REJECTED) == told["questions"] + len(told["rejected"])
    found = {int(i.split("/")[0]): (q.kind, q.options, q.options[q.answer]) for i, q in questions.items()}
    assert found == R1_KEPT
    for expected, kind in ((R1_REJECTED, "rejected"), (R1_DOUBTFUL, "doubtful")):
        said = reasons(told, kind)
        assert list(said) == sorted(expected)
        assert not [(row, said[row]) for row in expected if expected[row] not in said[row]]


def test_a_training_row_keeps_its_solution_and_loses_options_and_instructions_from_the_question(r1):
    _, questions = r1
    for number, line in enumerate(R1.read_text().split("\n"), 1):
        if number in R1_KEPT:
            question = next(q for i, q in questions.items() if i.startswith(f"{number}/"))
            assert question.solution == json.loads(line)["solution"] and question.split == "train"
            assert question.question.endswith("?") and json.loads(line)["problem"].startswith(question.question)
            assert not re.search(r"Options|Instructions|\bA[.)]", question.question)


def test_a_video_of_the_authors_machine_keeps_its_base_name_and_is_noted_once(r1):
    told, questions = r1
    assert questions["1/forward"].video == questions["33/forward"].video == "walk_1.mp4"
    assert questions["31/reverse"].video == "walk_7.mp4"
    assert told["notes"] == ["3 questions name their video by an absolute path: only the base name is kept"]
    assert all(q.group == q.clip_id == q.video for q in questions.values())


# --- options ---

PARSES = {  # text: (letters, texts, doubtful)
    "A. left, B. right": ("AB", ("left", "right"), False),
    "A. left; B. right;": ("AB", ("left", "right"), False),
    "A: left, B: right, and C: up": ("ABC", ("left", "right", "up"), False),
    "A.left,B.right,C.up": ("ABC", ("left", "right", "up"), False),
    "a. left, b. right": ("AB", ("left", "right"), True),
    "A. left, b. right, C. up": ("ABC", ("left", "right", "up"), True),
    "A. left, B) right, C. up": ("ABC", ("left", "right", "up"), True),
    "A. left, B.right, C. up": ("ABC", ("left", "right", "up"), True),
    "(a) left\n(b) right": ("AB", ("left", "right"), True),
    "- A. left, far\n- B. right\n": ("AB", ("left, far", "right"), False),
    "A. left, B. right\nC. up": ("ABC", ("left", "right", "up"), False),
    "A. left\nB. right, C. no, not C\nC. up": ("ABC", ("left", "right, C. no, not C", "up"), True),
    "A. vitamin B. pills, B. water, C. juice": ("ABC", ("vitamin B. pills", "water", "juice"), True),
    "A. vitamin C. pills, B. water": ("AB", ("vitamin C. pills", "water"), True),
    "A. water, B. vitamin C. pills": ("AB", ("water", "vitamin C. pills"), True),
    "A. left, C. up, D. down": ("ACD", ("left", "up", "down"), True),
    "A. left, D. down": ("AD", ("left", "down"), True),
    "B. right, C. up": ("BC", ("right", "up"), True),
    "left, B. right": ("AB", ("left", "right"), True),
    "A. turn left, B. turn left.": ("AB", ("turn left", "turn left."), True),
    "A. left (B) right (C) up": ("ABC", ("left", "right", "up"), True),
    "A. left, B. right\n\nAnswer with a letter.": ("AB", ("left", "right"), True),
    "A. one, B. two, C. three, D. four, E. five": ("ABCDE", ("one", "two", "three", "four", "five"), False),
    "A. left, B. meet Mr, Z. Top": ("AB", ("left", "meet Mr, Z. Top"), False),
    "A. wooden door": ("A", ("wooden door",), False),
    "left\nright": ("AB", ("left", "right"), True),
}


@pytest.mark.parametrize("text", PARSES)
def test_options_are_found_by_their_letters(text):
    found = parse_options(text)
    assert ("".join(found.labels), found.texts, bool(found.doubts)) == PARSES[text]


def test_what_has_neither_letters_nor_lines_is_rejected():
    for text in ("left, right, straight", "", "   ", "1. left, 2. right"):
        with pytest.raises(Rejected, match="no lettered options"):
            parse_options(text)
    with pytest.raises(Rejected, match="no options in it"):
        split_problem("Where did you go? Left or right")


words = st.lists(
    st.sampled_from(["turn", "left,", "a", "I", "vitamin", "stop.", "e.g.", "2.", "the", "x,y"]), min_size=1
)
styles = st.sampled_from(["{}. ", "{}) ", "({}) ", "{}: "])


@given(st.lists(words, min_size=1, max_size=8), styles, st.sampled_from([", ", "\n", ",\n", "; "]))
def test_options_that_were_joined_come_apart_again(parts, style, separator):
    texts = tuple(" ".join(part).rstrip(",") for part in parts)
    blob = separator.join(style.format(letter) + text for letter, text in zip("ABCDEFGH", texts))
    question, found, _ = split_problem(f"What did you do? Options: {blob}\n\nInstructions: give A, B, C or D. Or E.")
    assert question == "What did you do?"
    assert parse_options(found).texts == texts


@given(st.text("AaBbCcDE.):(,;\n -ox", max_size=40))
def test_any_text_gives_options_or_a_rejection(text):
    try:
        found = parse_options(text)
    except Rejected:
        return
    assert len(found.labels) == len(found.texts) == len(set(found.labels)) >= 1
    assert list(found.labels) == sorted(found.labels) and all(part in text for part in found.texts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("AB. \ud83d/é", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/", max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(st.sampled_from([MCQ, OPEN, R1]), st.randoms(use_true_random=False), json_values)
def test_no_bad_value_anywhere_in_a_row_stops_an_import(tmp_path_factory, sample, draw, value):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [line for line in R1.read_text().splitlines() if line.startswith('{"problem": "') and line[-1] == "}"]
    rows = dict(enumerate(map(json.loads, lines[:3]))) if sample == R1 else json.loads(sample.read_text())
    row = rows[draw.choice(list(rows)[:3])]
    row = draw.choice([row, *[inner for inner in row.values() if isinstance(inner, dict)]])
    row[draw.choice(list(row))] = value
    (folder / "in.json").write_text(json.dumps(list(rows.values()) if sample == R1 else rows))
    told = import_egost(folder / "in.json", folder / "out")
    assert told["rows"] == len(rows) == told["kept_rows"] + told["rejected_rows"]
    if sample != R1:
        write_predictions(folder / "in.json", {}, folder / "back.json")


def test_a_long_run_of_spaces_or_newlines_does_not_stall_the_parser():
    for white in (" ", "\n", " \n", ",", ", "):
        blob = "A. left" + white * 100_000 + "B. right"
        assert len(parse_options(split_problem("Q? Options: " + blob)[1]).texts) == 2


ANSWERS = {
    "B": 1,
    "b": 1,
    " B. ": 1,
    "(B)": 1,
    "B)": 1,
    "**B**": 1,
    "Option B": 1,
    "B. turn right": 1,
    "Turn right.": 1,
}


def test_an_answer_is_a_letter_or_an_options_text():
    options = parse_listed(["A. turn left", "B. turn right", "C. go straight"])
    assert {answer: read_answer(answer, options)[0] for answer in ANSWERS} == ANSWERS
    for bad in ("D", "", None, 1, True, ["B"], "turn", "A. turn right", "A or B", "é"):
        with pytest.raises(Rejected):
            read_answer(bad, options)


# --- multiple choice ---

MCQ_KEPT = {
    "1/forward": ("direction", THREE, 1),
    "2/forward": ("direction", THREE, 0),
    "2/reverse": ("direction", ("go straight", "turn left", "turn right, then left"), 2),
    "4/reverse": ("landmark", ("vitamin B. bottle", "lamp"), 0),
    "5/reverse": ("direction", ("turn left", "turn right"), 1),
    "6/forward": ("direction", ("turn left", "turn right"), 0),
    "7/forward": ("direction", THREE, 2),
    "8/forward": ("direction", ("turn left", "turn right"), 1),
    "12/forward": ("direction", ("turn left, then stop", "turn right"), 0),
    "13/forward": ("direction", THREE, 2),
    "14/forward": ("direction", THREE, 1),
    "16/forward": ("direction", ("<|im_end|> turn left", "<think>turn right</think>"), 0),
    "18/forward": ("direction", THREE, 1),
    "20/forward": ("direction", THREE, 1),
}
MCQ_REJECTED = {
    "18 (row 18)": "stands again later",
    "3": "reverse_mcq: options=[]",
    "9": "twice",
    "10": "'E' is not there",
    "11": "no answer in it",
    "13": "reverse_mcq: fewer than two options",
    "15": "an object was expected",
    "17": "video=''",
    "19": "options hold 7",
    "21": "letter A stands before two",
}
MCQ_DOUBTFUL = {
    "4": "forward by its wording",
    "6": "without letters",
    "7": "B missing",
    "8": "lower case",
    "12": "one text",
    "14": "read from an option's text",
    "20": "held the options too",
}


def test_every_trap_in_a_multiple_choice_row_ends_as_a_question_or_a_rejection(mcq):
    told, questions = mcq
    assert {i: (q.task, q.options, q.answer) for i, q in questions.items()} == MCQ_KEPT
    for expected, kind in ((MCQ_REJECTED, "rejected"), (MCQ_DOUBTFUL, "doubtful")):
        said = reasons(told, kind)
        assert set(said) == set(expected)
        assert not [(row, said[row]) for row in expected if expected[row] not in said[row]]
    assert all(q.split == "test" and q.order == i.split("/")[1] for i, q in questions.items())
    assert questions["20/forward"].question == questions["1/forward"].question


@pytest.mark.parametrize("name", ["r1", "mcq", "opened"])
def test_rows_are_those_that_became_questions_and_those_that_were_rejected(name, request):
    told, questions = request.getfixturevalue(name)
    kept = {i.rsplit("/", 1)[0] for i in questions}
    lost = {str(entry["row"]) for entry in told["rejected"]} - kept
    assert told["kept_rows"] == len(kept) and told["rejected_rows"] == len(lost)
    assert told["rows"] == len(kept) + len(lost) and told["questions"] == len(questions)
    for kind in ("rejected", "doubtful"):
        assert len(reasons(told, kind)) == len(told[kind]) and all(e["reason"] for e in told[kind])


def test_the_files_name_tells_what_the_wording_leaves_open(tmp_path):
    row = {"video": "1.mp4", "question": "What happened?", "options": ["A. x", "B. y"], "answer": "A"}
    for name, kind in (
        ("Part1_reverse_mcq_action", "action/reverse"),
        ("Part2_forward_mcq_landmark", "landmark/forward"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"1": row}))
        told, questions = imported(tmp_path / f"{name}.json", tmp_path / name)
        assert [q.kind for q in questions.values()] == [kind] and len(told["doubtful"]) == 1


# --- open-ended ---


def test_open_ended_rows_become_route_questions(opened):
    told, questions = opened
    assert {i: (q.order, q.answer, q.video) for i, q in questions.items()} == {
        "1/forward": ("forward", "Go straight, turn left.", "76.mp4"),
        "2/reverse": ("reverse", "Turn around, turn right.", "76.mp4"),
        "3/forward": ("forward", "Turn left.", "unnamed/3"),
        "5/forward": ("forward", "Go straight, turn left", "77.mp4"),
        "7/reverse": ("reverse", "Turn right.", "78.mp4"),
        "10/forward": ("forward", '<|im_start|> Turn "left"', "78.mp4"),
    }
    assert all(q.task == "route" and q.is_open and q.split == "test" for q in questions.values())
    assert set(reasons(told, "rejected")) == {"4", "6", "8", "9"}
    assert set(reasons(told, "doubtful")) == {"3", "5", "7", "10"}


# --- the folder ---


def test_the_folder_is_a_benchmark_with_clips_counts_and_its_hash(tmp_path, recwarn):
    told = import_egost(MCQ, tmp_path / "out")
    bench = load_benchmark(tmp_path / "out")
    assert not recwarn.list and bench.info["source"]["file"] == "egost_mcq.json"
    assert bench.info["counts"]["questions"] == len(bench.questions) == told["questions"]
    assert {c.id for c in bench.clips} == {q.clip_id for q in bench.questions}
    assert json.loads((tmp_path / "out" / "import.json").read_text()) == told
    for name in ("rows", "questions", "missing_videos"):
        assert type(told[name]) is int


def test_the_same_file_may_come_again_and_another_is_refused(tmp_path):
    first = import_egost(MCQ, tmp_path / "out")
    before = (tmp_path / "out" / "questions.jsonl").read_bytes()
    assert import_egost(MCQ, tmp_path / "out") == first
    with pytest.raises(StkitError, match="egost_mcq.json.*egost_open.json"):
        import_egost(OPEN, tmp_path / "out")
    (tmp_path / "egost_mcq.json").write_text(MCQ.read_text().replace("81.mp4", "82.mp4"))
    with pytest.raises(StkitError, match="sha256"):
        import_egost(tmp_path / "egost_mcq.json", tmp_path / "out")
    assert (tmp_path / "out" / "questions.jsonl").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("mine")
    with pytest.raises(StkitError, match="not empty"):
        import_egost(MCQ, tmp_path / "full")


@pytest.mark.parametrize("link", ["hard", "copied"])
def test_videos_that_are_there_come_along_as_files_and_the_rest_are_counted(tmp_path, monkeypatch, link):
    clips = tmp_path / "clips"
    (clips / "store").mkdir(parents=True)
    (clips / "76.mp4").write_bytes(b"seventy-six")
    (clips / "store" / "blob").write_bytes(b"eighty")
    (clips / "80.mp4").symlink_to("store/blob")
    (clips / "78.mp4").mkdir()
    if link == "copied":

        def refuse(*_):
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr(os, "link", refuse)
    told = import_egost(MCQ, tmp_path / "out", videos=clips)
    assert (told["clips"], told["missing_videos"]) == (6, 4)
    bench = load_benchmark(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out" / "videos").iterdir()} == {"76.mp4", "80.mp4"}
    for name, origin in (("76.mp4", "76.mp4"), ("80.mp4", "store/blob")):
        path = bench.video_path(name)
        assert not path.is_symlink() and path.read_bytes() == (clips / origin).read_bytes()
        assert path.samefile(clips / origin) == (link == "hard")
    assert import_egost(MCQ, tmp_path / "out")["missing_videos"] == 4
    with pytest.raises(StkitError, match="no such folder"):
        import_egost(MCQ, tmp_path / "other", videos=tmp_path / "nowhere")


def test_a_full_disk_is_one_line_with_the_fix_and_leaves_no_half_benchmark(tmp_path, monkeypatch):
    import stkit.bench.egost as egost

    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(egost, "write_jsonl", full)
    with pytest.raises(StkitError, match="the disk is full: free some space") as caught:
        import_egost(MCQ, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(StkitError, match="no benchmark.json"):
        load_benchmark(tmp_path / "out")
    monkeypatch.undo()
    assert import_egost(MCQ, tmp_path / "out")["questions"] == len(MCQ_KEPT)


# --- predictions back into the file ---


def test_predictions_come_back_in_the_same_form_with_nothing_else_changed(tmp_path):
    said = {"1/forward": "C", "2/forward": "B", "2/reverse": "A", "4/reverse": "b", "5/reverse": "turn left"}
    said |= {"13/forward": 0, "14/forward": "I can't tell"}
    told = write_predictions(MCQ, said, tmp_path / "out.json")
    rows, expected = json.loads((tmp_path / "out.json").read_text()), json.loads(MCQ.read_text())
    for key, place, letter in (("1", "forward", "C"), ("4", "reverse", "B"), ("13", "forward", "A")):
        expected[key][f"{place}_mcq"]["predict"] = expected[key]["predict"] = letter
    expected["14"]["forward_mcq"]["predict"] = expected["14"]["predict"] = "I can't tell"
    expected["2"]["forward_mcq"]["predict"], expected["2"]["reverse_mcq"]["predict"] = "B", "A"
    expected["5"]["predict"] = "A"
    expected["9"]["predict"] = ""  # an older run's letter on a rejected row
    assert rows == expected and list(rows) == list(expected)
    assert all(list(rows[k]) == list(expected[k]) for k in rows if rows[k])
    assert told["written"] == 7
    assert {entry["id"] for entry in told["left_out"]} == set(MCQ_KEPT) - set(said)


def test_the_authors_own_reading_finds_our_letters_and_texts(tmp_path):
    """Theirs looks for ``predict`` in the row itself, and passes over empty ones."""
    write_predictions(MCQ, {"1/forward": "C", "2/reverse": "A"}, tmp_path / "mcq.json")
    write_predictions(OPEN, {"1/forward": 'Go "left".\nThen stop é \ud83d', "3/forward": "A"}, tmp_path / "open.json")
    found = {}
    for name in ("mcq", "open"):
        rows = json.loads((tmp_path / f"{name}.json").read_bytes())
        found[name] = {k: r["predict"] for k, r in rows.items() if r and r.get("predict", "").strip()}
    assert found["mcq"] == {"1": "C", "2": "A"}
    assert found["open"] == {"1": 'Go "left".\nThen stop é \ud83d', "3": "A"}


WRITTEN = {  # source: result, by hand
    '{"1":{"video":"1.mp4","forward_mcq":{"question":"Q","options":["A. x","B. y"],"answer":"A"}}}': (
        '{"1":{"video":"1.mp4","forward_mcq":{"question":"Q","options":["A. x","B. y"],"answer":"A","predict":"B"},'
        '"predict":"B"}}'
    ),
    '\ufeff{ "1" : {"n": 1.50, "forward_mcq" :\r\n\t{ "options": ["A. \\u0078", "B. y"],\r\n\t"question" : "Q",'
    '\r\n\t"answer": "A" }, "big": 1E400, "video": "1.mp4" } }\r\n': (
        '\ufeff{ "1" : {"n": 1.50, "forward_mcq" :\r\n\t{ "options": ["A. \\u0078", "B. y"],\r\n\t"question" : "Q",'
        '\r\n\t"answer": "A",\r\n\t"predict": "B" }, "big": 1E400, "video": "1.mp4", "predict": "B" } }\r\n'
    ),
    '{"1": {"video": "1.mp4", "predict" : null, "question": "Q", "options": ["A. x", "C. y"], "answer": "A"}}': (
        '{"1": {"video": "1.mp4", "predict" : "C", "question": "Q", "options": ["A. x", "C. y"], "answer": "A"}}'
    ),
    '{"1": {"question": "Q", "forward_answer": "Go.", "predict": "old"}}': (
        '{"1": {"question": "Q", "forward_answer": "Go.", "predict": "B"}}'
    ),
}


@pytest.mark.parametrize("source", WRITTEN, ids=["compact", "odd spaces", "gap in letters", "open"])
def test_every_other_byte_of_the_file_stays(tmp_path, source):
    (tmp_path / "in.json").write_bytes(source.encode())
    write_predictions(tmp_path / "in.json", {"1/forward": "B"}, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes().decode() == WRITTEN[source]


def test_a_prediction_that_names_no_option_is_left_out_with_the_reason(tmp_path):
    said = {"1/forward": "D", "2/forward": 3, "2/reverse": True, "7/forward": "The answer is C", "8/forward": " "}
    told = write_predictions(MCQ, said, tmp_path / "out.json")
    why = {entry["id"]: entry["reason"] for entry in told["left_out"]}
    assert told["written"] == 0 and json.loads((tmp_path / "out.json").read_text())["5"]["predict"] == ""
    assert why["1/forward"] == "3 is none of its 3 options" and why["2/reverse"] == "True is none of its 3 options"
    assert "A, C, D" in why["7/forward"] and why["8/forward"] == "no prediction was given"


def test_predictions_for_training_rows_unknown_ids_or_over_the_file_itself_are_refused(tmp_path):
    with pytest.raises(StkitError, match="no 'predict' form"):
        write_predictions(R1, {"1/forward": "A"}, tmp_path / "out")
    with pytest.raises(StkitError, match="no question '99/forward'"):
        write_predictions(MCQ, {"1/forward": "A", "99/forward": "A"}, tmp_path / "out")
    copy = tmp_path / "copy.json"
    copy.write_bytes(MCQ.read_bytes())
    with pytest.raises(StkitError, match="itself"):
        write_predictions(copy, {"1/forward": "A"}, copy)
    assert copy.read_bytes() == MCQ.read_bytes() and not (tmp_path / "out").exists()


def test_a_random_file_of_both_orders_goes_out_and_comes_back(tmp_path):
    draw = random.Random(0)
    ask = {"question": "Which directions?", "options": ["A. x", "B. y", "C. z"], "answer": "C"}
    rows = {f"k/{n}": {"video": f"{n}.mp4", "forward_mcq": ask, "reverse_mcq": ask} for n in range(200)}
    (tmp_path / "in.json").write_text(json.dumps(rows, indent=1))
    _, questions = imported(tmp_path / "in.json", tmp_path / "bench")
    said = {i: draw.choice("ABC") for i in questions}
    write_predictions(tmp_path / "in.json", said, tmp_path / "out.json")
    back = json.loads((tmp_path / "out.json").read_text())
    found = {f"{k}/{o}": r[f"{o}_mcq"]["predict"] for k, r in back.items() for o in ("forward", "reverse")}
    assert found == said and not any("predict" in row for row in back.values())


# --- the 504 released rows ---


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    told, questions = imported(RELEASED, tmp_path_factory.mktemp("released") / "out")
    rows = dict(enumerate(map(json.loads, RELEASED.read_text().splitlines()), 1))
    return told, {int(i.split("/")[0]): q for i, q in questions.items()}, rows


@needs_released
def test_all_504_released_rows_are_accounted_for(released):
    told, questions, rows = released
    assert told["rows"] == 504 == told["questions"] + len(told["rejected"]) and told["doubtful"] == []
    assert set(questions) | {entry["row"] for entry in told["rejected"]} == set(rows)
    assert Counter(len(q.options) for q in questions.values()) == {4: 414, 3: 75, 2: 14}
    assert [entry["row"] for entry in told["rejected"]] == [384] and "fewer than two" in told["rejected"][0]["reason"]
    assert len(re.findall(r"(?:: |, )[A-D]\. ", rows[384]["problem"])) == 1


@needs_released
def test_released_options_put_together_again_give_the_released_text(released):
    _, questions, rows = released
    asked = "Please select the most appropriate answer from the options above and return only the option number"
    for number, q in questions.items():
        listed = ", ".join(f"{letter}. {text}" for letter, text in zip("ABCD", q.options))
        tail = f"\n\nInstructions: {asked} (e.g. A, B, C or D)."
        assert f"{q.question} Options: {listed}{tail}" == rows[number]["problem"]
        assert q.solution == rows[number]["solution"] and q.video == rows[number]["video"]


@needs_released
def test_released_answers_name_the_option_behind_their_letter(released):
    _, questions, rows = released
    for number, q in questions.items():
        letter = rows[number]["original_answer"]
        assert f"{letter}. {q.options[q.answer]}" in rows[number]["problem"] and "ABCD"[q.answer] == letter
    three = [q.answer for q in questions.values() if len(q.options) == 3]
    assert three.count(0) / len(three) > 0.85  # FACTS: A is right in 93 of 102
    assert 0.32 < sum(q.answer == 0 for q in questions.values()) / len(questions) < 0.37


@needs_released
def test_released_tasks_and_orders_are_those_of_the_wording(released):
    _, questions, _ = released
    assert Counter(q.kind for q in questions.values()) == {
        "direction/forward": 119,
        "direction/reverse": 116,
        "landmark/forward": 129,
        "landmark/reverse": 70,
        "action/reverse": 69,
    }
    assert len({q.group for q in questions.values()}) == 211
