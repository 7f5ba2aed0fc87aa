"""An evaluation taken apart: what is counted by hand, or by another route, is what the analysis finds."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from walkmaker import make_plans, make_walks, sampled

from stkit import stats
from stkit.bench.schema import LETTERS, Prediction, Question, row_of
from stkit.bench.timeline import Moment, load_truth, parse, render, timeline
from stkit.reporting import category_plots as draw
from stkit.reporting.categories import (
    analyse,
    calibration,
    category_tables,
    forward_against_reverse,
    quantile_bins,
    thought_length,
)
from stkit.reporting.chains import (
    OUTCOMES,
    STEPS,
    asked_items,
    check_steps,
    confusion,
    items_told,
    option_items,
    outcome,
    read_chain,
    still_alive,
    trace,
)  # fmt: skip
from stkit.reporting.judge import load_run
from stkit.reporting.scores import Row
from stkit.runs import write_json, write_jsonl
from stkit.runtime import BadUse, StkitError
from stkit.train.answers import answer_text, narrowed

CLIPS, SEED = 12, 4
BACK = Question(
    "q", "a", "a.mp4", "a", "direction", "reverse", "Which moves lead back?",
    ("turn left, turn left", "turn right, turn left", "turn left, turn right", "turn right, turn right"), 0, "test",
)  # fmt: skip
THERE = replace(BACK, order="forward", answer=3)
SEEN = "Timeline: stand, straight tree left, right, straight, right, stand."
DERIVED = "left: A, C; left: A. So the answer is A."


def told(thought: str, letter: str = "A") -> str:
    return f"<think>{thought}</think> <answer>{letter}</answer>"


def verdict(question: Question, text: str, letter: str | None) -> tuple[str, list]:
    """The outcome of a text, and its steps in their order."""
    chosen = None if letter is None else LETTERS.index(letter)
    steps = check_steps(read_chain(text), question, chosen)
    return outcome(steps, chosen == question.answer), steps and [steps[name] for name in STEPS]


@pytest.mark.parametrize("thought, letter, expected, steps", [
    (f"{SEEN} Route: right, right. Reversed: left, left. {DERIVED}", "A", "right", [True] * 4),
    (f"{SEEN} Route: straight, right, straight, right. Reversed: left, left. {DERIVED}", "A", "right", [True] * 4),
    (f"{SEEN.upper()} ROUTE:  Right,right . Reversed: left , left. left: C, A; left: A. So the answer is A.", "A",
     "right", [True] * 4),
    ("Timeline: straight, right, straight, left, stand. Route: right, left. Reversed: right, left. right: B, D; left: B. "
     "So the answer is B.", "B", "saw wrong", [False, True, True, True]),
    (f"{SEEN} Route: right, left. Reversed: right, left. right: B, D; left: B. So the answer is B.", "B", "read wrong",
     [True, False, True, True]),
    (f"{SEEN} Route: right, right. Reversed: right, right. right: B, D; right: D. So the answer is D.", "D",
     "reversed wrong", [True, True, False, True]),
    (f"{SEEN} Route: right, right. left: A, C; left: A. So the answer is A.", "C", "reversed wrong",
     [True, True, False, None]),
    (f"{SEEN} Route: right, right. Reversed: left, left. left: A, C; left: C. So the answer is C.", "C", "matched wrong",
     [True, True, True, False]),
    (f"{SEEN} Route: right, right. Reversed: left, left. {DERIVED}", "C", "matched wrong", [True, True, True, False]),
    (f"{SEEN} Route: right, right. Reversed: left, left. {DERIVED}", None, "matched wrong", [True, True, True, False]),
    (f"{SEEN} Route: right, right. Reversed: left, left. left: A; left: A. So the answer is A.", "A", "right by luck",
     [True, True, True, False]),
    (f"{SEEN} Route: right, right. Reversed: left, left. left: A, C; left: A. So the answer is B.", "A", "right by luck",
     [True, True, True, False]),
    ("Timeline: straight, left, stand. Route: right, right. Reversed: left, left. " + DERIVED, "A", "right by luck",
     [False, False, True, True]),
    ("Timeline: right, straight, right, straight, right. Route: right, right, right. Reversed: left, left, left. "
     "left: A, C; left: A; left: . So the answer is A.", "C", "saw wrong", [False, True, True, None]),
    (f"{SEEN} Route: right, rig", None, "read wrong", [True, False, None, None]),
    ("Timeline: stand, straight, right, straight, right", None, "no chain", None),
    ("Timeline: stand, running, right. Route: right, right.", "A", "no chain", None),
    (f"{SEEN} {SEEN} Route: right, right.", "A", "no chain", None),
    ("It turns right twice, so left, left.", "A", "no chain", None),
])  # fmt: skip
def test_the_first_wrong_step_names_the_error_of_a_reverse_question(thought, letter, expected, steps):
    assert verdict(BACK, told(thought, letter or ""), letter) == (expected, steps)


@pytest.mark.parametrize("thought, letter, expected, steps", [
    (f"{SEEN} Route: right, right. right: B, D; right: D. So the answer is D.", "D", "right", [True, True, None, True]),
    (f"{SEEN} Route: right, right. Reversed: left, left. {DERIVED}", "A", "matched wrong", [True, True, True, False]),
    (f"{SEEN} Route: right, right. Reversed: left, left. right: B, D; right: D. So the answer is D.", "D", "right",
     [True] * 4),
    (f"{SEEN} Route: right, right. Reversed: right, right. right: B, D; right: D. So the answer is D.", "D",
     "right by luck", [True, True, False, True]),
    (f"{SEEN} Route: right. right: B, D. So the answer is B.", "B", "read wrong", [True, False, None, None]),
])  # fmt: skip
def test_a_forward_question_may_be_reversed_too_but_is_matched_forwards(thought, letter, expected, steps):
    assert verdict(THERE, told(thought, letter), letter) == (expected, steps)


@pytest.mark.parametrize("task, line, said", [
    ("direction", "stand, left, left, straight, left, pick, right, right.", ["left", "left", "right"]),
    ("landmark", "stand tree left, stand, straight tree left, left ash right, up.", ["tree left", "ash right"]),
    ("landmark", "stand tree left, straight tree right, straight tree left.", ["tree left", "tree right", "tree left"]),
    ("action", "stand, pick, straight, pick tree left, left, open, back.", ["pick up", "open a door", "step back"]),
    ("action", "stand, straight.", []),
])  # fmt: skip
def test_a_time_line_tells_runs_of_turns_and_each_landmark_and_action_once(task, line, said):
    items = items_told(parse(f"Timeline: {line}"), task)
    assert [f"{item.value} {item.side}".strip() for item in items] == said


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_walks(tmp_path_factory.mktemp("place") / "walks", CLIPS, SEED)


def texts_of(bench, form):
    """Each question with the text that the kit would teach, and the time line of its clip."""
    truths = {clip.id: load_truth(bench, clip.id) for clip in bench.clips}
    lines = {name: timeline(truth, sampled(truth)) for name, truth in truths.items()}
    return [(q, answer_text(q, form, moments=lines[q.clip_id]), lines[q.clip_id]) for q in bench.questions]


@pytest.fixture(scope="module")
def taught(bench):
    return texts_of(bench, "timeline")


@pytest.mark.parametrize("form", ["timeline", "checked"])
def test_what_the_kit_teaches_is_right_at_every_step(bench, form):
    asked = [(q, text) for q, text, _ in texts_of(bench, form) if not q.is_open]
    assert len(asked) > 60 and {q.kind for q, _ in asked} > {"landmark/reverse", "action/reverse", "direction/forward"}
    for question, text in asked:
        found, steps = verdict(question, text, LETTERS[question.answer])
        assert found == "right" and steps == [True, True, True if question.order == "reverse" else None, True], text


def test_the_letters_alive_are_those_that_are_taught(taught):
    for question, _, _ in taught:
        if not question.is_open:
            options = option_items(question)
            found = still_alive(options[question.answer], options)
            assert [(step, sorted(left)) for step, left in found] == narrowed(question)


def test_options_that_are_read_one_by_one_are_held_against_the_route():
    head = "<think>Timeline: left, straight, right. Route: left, right. "
    asked = replace(BACK, order="forward", options=("turn right, turn left", "turn left, turn left", "turn left, turn right"),
                    answer=2)  # fmt: skip
    right = "A: right. B: left, left. C: left, right. So the answer is C.</think> <answer>C</answer>"
    for text, wanted in (
        (right, True),
        (right.replace("B: left, left. ", ""), False),  # an option passed over
        (right.replace("B: left, left", "B: left"), False),  # not read to where it differs
        (right.replace("A: right", "A: right, left"), False),  # read further
        (right.replace("is C", "is B").replace(">C", ">B"), False),  # another answer than follows
    ):
        chosen = "ABC".index(text[-len("X</answer>")])
        assert check_steps(read_chain(head + text), asked, chosen)["match"] is wanted, text


def test_options_that_cannot_be_told_apart_are_refused():
    with pytest.raises(StkitError, match="question q: two options tell the right answer's route"):
        check_steps(None, replace(BACK, options=("turn left", "make a left", "turn right")), 0)
    with pytest.raises(StkitError, match="birdhouse"):
        check_steps(None, replace(BACK, options=("a birdhouse", "turn left", "turn right")), 0)


def spoilt(text: str, moments) -> str:
    """The same with every turn, landmark and action of the time line gone, and all that follows left as it was."""
    return text.replace(render(moments), render([Moment("stand")] * len(moments)))


def predictions(bench, taught, mode="generate"):
    """Made-up answers by the place of the question on its walk: right, seen wrong (and lucky), babble, another letter."""
    clips, found, blind = {clip.id: clip for clip in bench.clips}, [], []
    for k, (q, text, moments) in enumerate(taught):
        at = sampled(load_truth(bench, q.clip_id)) / clips[q.clip_id].fps
        facts = {"timestamps_s": tuple(round(float(t), 4) for t in at), "extra": {"tokens": 60 + k % 8}}
        if not q.is_open:
            blind.append(Prediction(q.id, "letter", "blind", "A", 0, q.answer == 0))
        if q.is_open:
            found.append(Prediction(q.id, mode, "none", text, q.answer, k % 4 != 0, **facts))
        elif k % 5 == 1:
            found.append(Prediction(q.id, mode, "none", spoilt(text, moments), q.answer, True, **facts))
        elif k % 5 == 2:
            found.append(Prediction(q.id, mode, "none", "I see nothing.", None, False, **facts))
        elif k % 5 == 3:
            other = (q.answer + 1) % 4
            swapped = text.replace(f"<answer>{LETTERS[q.answer]}", f"<answer>{LETTERS[other]}")
            found.append(Prediction(q.id, mode, "none", swapped, other, False, **facts))
        else:
            found.append(Prediction(q.id, mode, "none", text, q.answer, True, **facts))
    return found, blind


def write_run(folder, name: str, said, blind=(), bench=None, **settings):
    where = {"bench": str(bench or folder / "walks"), "mode": "generate", "control": "none"} | settings
    write_json(folder / name / "config.json", {"settings": where, "model": {}})
    write_jsonl(folder / name / "predictions.jsonl", map(row_of, said))
    write_jsonl(folder / name / "blind.jsonl", map(row_of, blind))
    return load_run(folder / name)


@pytest.fixture(scope="module")
def run(bench, taught):
    return write_run(bench.path.parent, "first", *predictions(bench, taught))


@pytest.fixture(scope="module")
def found(run):
    return analyse(run)


def accuracy(rows) -> tuple[float, int]:
    return pytest.approx(sum(row.said.correct for row in rows) / len(rows)), len(rows)


def test_every_category_is_the_share_of_right_answers_among_its_questions(run, found):
    plans = make_plans(CLIPS, SEED)
    size = {name: len(plan.route().steps) for name, plan in plans.items()}
    choice = [row for row in run.rows if not row.question.is_open]
    for turns, scopes in found["by"]["turns"].items():
        own = [row for row in choice if len(plans[row.question.clip_id].turns) == int(turns)]
        assert (scopes["choice"]["accuracy"], scopes["choice"]["n"]) == accuracy(own)
    assert sum(scopes["choice"]["n"] for scopes in found["by"]["turns"].values()) == len(choice)
    for span, scopes in found["by"]["steps"].items():
        low, high = (int(span.split(" to ")[k]) for k in (0, -1))
        own = [row for row in run.rows if row.question.task == "route" and low <= size[row.question.clip_id] <= high]
        assert (scopes["route"]["accuracy"], scopes["route"]["n"]) == accuracy(own)
    for kind, scopes in found["by"]["landmark"].items():
        own = [r for r in choice if r.question.task == "landmark" and kind in {m.kind for m in plans[r.question.clip_id].landmarks}]
        assert list(scopes) == ["landmark"] and (scopes["landmark"]["accuracy"], scopes["landmark"]["n"]) == accuracy(own)
    for kind, scopes in found["by"]["action"].items():
        own = [r for r in choice if r.question.task == "action" and kind in {a.kind for a in plans[r.question.clip_id].actions}]
        assert (scopes["action"]["accuracy"], scopes["action"]["n"]) == accuracy(own)
    assert len(found["by"]["landmark"]) > 6 and "put down" not in found["by"]["action"]


def test_task_and_position_have_intervals_blind_score_and_the_letters_chosen(run, found):
    for kind, scopes in found["by"]["task"].items():
        part, score = scopes[kind.split("/")[0]], run.scores["by_task"][kind]
        assert all(part[name] == score[name] for name in ("accuracy", "low", "high", "chance", "blind", "n", "clusters"))
    choice = [row for row in run.rows if not row.question.is_open]
    for letter, scopes in found["by"]["position"].items():
        own = [row for row in choice if row.question.answer == LETTERS.index(letter)]
        assert (scopes["choice"]["accuracy"], scopes["choice"]["n"]) == accuracy(own)
        assert scopes["choice"]["blind"] == float(letter == "A")  # the blind control always says A
        chosen = [row.said.parsed for row in choice].count(LETTERS.index(letter))
        assert scopes["choice"]["chosen"] == chosen == sum(p["chosen"] for s, p in scopes.items() if s != "choice")


def test_outcomes_are_counted_where_they_were_planted(run, found):
    planted = {1: "right by luck", 2: "no chain", 3: "matched wrong", 4: "right", 0: "right"}
    asked = [(k % 5, q) for k, q in enumerate(run.questions) if not q.is_open]
    for kind in ("direction/forward", "landmark/reverse", "overall"):
        own = [planted[k] for k, q in asked if kind in (q.kind, "overall")]
        part = found["chain"][kind]
        assert {name: o["count"] for name, o in part["outcomes"].items()} == {name: own.count(name) for name in OUTCOMES}
        assert part["n"] == len(own) and sum(o["share"] for o in part["outcomes"].values()) == pytest.approx(1)
    right = [float(planted[k] == "right") for k, _ in asked]
    interval = stats.clustered_interval(right, [q.group for _, q in asked])
    part = found["chain"]["overall"]["outcomes"]["right"]
    assert (part["low"], part["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert part["in_clusters"] == len({q.group for k, q in asked if planted[k] == "right"})
    steps = found["chain"]["overall"]["steps"]
    babble = sum(k == 2 for k, _ in asked)
    assert steps["see"]["n"] == len(asked) - babble == steps["read"]["n"]
    assert steps["see"]["mean"] == steps["read"]["mean"] == pytest.approx(1 - sum(k == 1 for k, _ in asked) / (len(asked) - babble))
    assert steps["reverse"]["mean"] == 1 and steps["match"]["mean"] == pytest.approx(1 - sum(k == 3 for k, _ in asked) / steps["match"]["n"])


def test_words_of_the_time_line_are_confused_as_they_were_spoilt(run, found):
    """Open questions are all told truly, of the others each fifth has nothing but "stand"."""
    lines, spoilt_ones, texts = Counter(), Counter(), 0
    for k, row in enumerate(run.rows):
        truth = load_truth(run.benchmark, row.question.clip_id)
        words = [m.motion for m in timeline(truth, sampled(truth))]
        if row.question.is_open or k % 5 != 2:
            lines.update(words)
            texts += 1
            spoilt_ones.update(words if not row.question.is_open and k % 5 == 1 else [])
    part = found["confusion"]["motion"]
    assert found["confusion"]["texts"] == texts
    for motion, word in (("left", "left"), ("straight", "straight"), ("look up", "up"), ("pick up", "pick")):
        row = dict(zip(part["words"], part["counts"][part["words"].index(word)]))
        assert {w: n for w, n in row.items() if n} == {word: lines[motion] - spoilt_ones[motion], "stand": spoilt_ones[motion]}
        assert part["recall"][word]["mean"] == pytest.approx(1 - spoilt_ones[motion] / lines[motion])
    assert sum(map(sum, part["counts"])) == 16 * texts == part["overall"]["n"]
    marks = found["confusion"]["landmark"]
    assert marks["recall"]["none"]["mean"] == 1 and marks["overall"]["mean"] < 1


def row_of_text(text: str, question=BACK, **more) -> Row:
    facts = {"parsed": 0, "correct": True} | more
    return Row(question, Prediction(question.id, "generate", "none", text, **facts), None)


def test_a_place_that_only_one_time_line_has_is_nothing_in_the_other():
    shown = parse("Timeline: stand tree left, left, straight.")
    rows = [row_of_text(told(t)) for t in ("Timeline: stand tree right, right.", "Timeline: stand tree left, left, straight, up.")]
    found = confusion([*rows, row_of_text("no line")], lambda row: shown)
    assert found["texts"] == 2 and found["motion"]["words"] == ["stand", "straight", "left", "right", "up", "nothing"]
    assert found["motion"]["counts"] == [
        [2, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0], [0] * 6, [0] * 6, [0, 0, 0, 0, 1, 0],
    ]  # fmt: skip
    assert found["landmark"]["words"] == ["none", "tree left", "tree right", "nothing"]
    assert found["landmark"]["counts"] == [[3, 0, 0, 1], [0, 1, 1, 0], [0] * 4, [1, 0, 0, 0]]
    assert found["motion"]["recall"]["straight"]["mean"] == 0.5 and "nothing" not in found["motion"]["recall"]
    assert confusion(rows, lambda row: None) is None


def by_letter(k: int, share: float, right: bool) -> Row:
    question = replace(BACK, id=f"q{k}", group=f"g{k % 3}", answer=0 if right else 1)
    logs = tuple(math.log(p / 3) for p in (share, *[(1 - share) / 3] * 3))  # letters hold a third of all probability
    return Row(question, Prediction(question.id, "letter", "none", "A", 0, right, log_probs=logs), None)


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    rows = [by_letter(k, 0.75, k > 0) for k in range(4)] + [by_letter(k, 0.45, False) for k in (4, 5)]
    found = calibration(rows)
    assert [(b["from"], b["to"], b["n"], b["accuracy"]) for b in found["bins"]] == [(0.4, 0.5, 2, 0.0), (0.7, 0.8, 4, 0.75)]
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.45, 0.75])
    assert found["error"] == pytest.approx((2 * 0.45 + 4 * 0.0) / 6) and found["accuracy"] == 0.5
    assert found["confidence"] == pytest.approx((4 * 0.75 + 2 * 0.45) / 6) and found["exploratory"]
    assert calibration([by_letter(0, 0.9999999999, True)])["bins"][0]["to"] == 1.0


def test_without_probabilities_there_is_a_reason_instead_of_a_number(found):
    assert found["calibration"] is None and "mode='letter'" in found["left_out"]["calibration"]
    circular = [r._replace(said=replace(r.said, control="circular")) for r in [by_letter(0, 0.75, True)]]
    assert "circular" in calibration(circular)


def test_forward_and_reverse_are_paired_by_walk_and_task():
    rows = []
    for clip, (there, back) in {"a": (1, 0), "b": (1, 1), "c": (0, 1), "d": (1, 0), "e": (1, None)}.items():
        for question, right in ((THERE, there), (BACK, back)):
            if right is not None:
                rows.append(row_of_text("", replace(question, clip_id=clip, group=clip), correct=bool(right)))
    found = forward_against_reverse(rows)
    assert set(found) == {"overall", "direction"} and found["direction"] == found["overall"]
    part, interval = found["direction"], stats.paired_difference([1, 1, 0, 1], [0, 1, 1, 0], "abcd")
    assert (part["forward"], part["reverse"], part["difference"], part["n"]) == (0.75, 0.5, 0.25, 4)
    assert (part["low"], part["high"]) == (interval.low, interval.high) and part["forward_blind"] is None
    assert "both orders" in forward_against_reverse(rows[-1:])


@pytest.mark.parametrize("values, count, names", [
    (range(1, 9), 4, ["1 to 2", "3 to 4", "5 to 6", "7 to 8"]), ([5, 5, 5], 4, ["5"]), ([], 4, []),
    ([1, 1, 1, 1, 1, 2, 9], 2, ["1", "2 to 9"]), ([3, 1], 4, ["1", "3"]),
])  # fmt: skip
def test_bins_hold_equal_parts_and_never_part_equal_numbers(values, count, names):
    found = quantile_bins(list(values), count)
    assert list(dict.fromkeys(found.values())) == names and list(found) == sorted(set(values))


def test_length_of_thought_is_in_tokens_where_they_were_counted_else_in_words():
    rows = [row_of_text("a " * n, correct=n < 3, extra={"tokens": 10 * n}) for n in (1, 2, 3, 4)]
    found = thought_length(rows)
    assert found["unit"] == "tokens" and [b["mean"] for b in found["bins"]] == [10, 20, 30, 40]
    assert [b["accuracy"] for b in found["bins"]] == [1, 1, 0, 0]
    found = thought_length([*rows, row_of_text("a " * 5)])
    assert found["unit"] == "words" and found["bins"][-1]["to"] == 5
    assert "mode='generate'" in thought_length([by_letter(0, 0.5, True)])


def test_an_analysis_is_json_and_says_where_clusters_are_few(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    few = [n for n in found["notices"] if n.startswith("exploratory")]
    assert len(few) == 1 and "turns (" in few[0] and "landmark (" in few[0]
    assert found["by"]["turns"]["2"]["choice"]["exploratory"] is (found["by"]["turns"]["2"]["choice"]["clusters"] < 10)
    assert set(found["left_out"]) == {"calibration"}


def test_a_run_without_truth_gets_what_can_be_had_and_says_what_is_left_out(run, taught, bench):
    bare = bench.path.parent / "bare.jsonl"
    write_jsonl(bare, map(row_of, run.questions))
    found = analyse(write_run(bench.path.parent, "imported", *predictions(bench, taught), bench=bare))
    assert found["by"]["turns"] is found["by"]["steps"] is found["confusion"] is None
    assert all("imported" in found["left_out"][name] for name in ("turns", "steps", "confusion"))
    assert found["chain"] == analyse(run, truth=False)["chain"] and found["by"]["landmark"]
    assert "truth=False" in analyse(run, truth=False)["left_out"]["turns"]


def test_questions_whose_options_are_no_routes_are_counted_and_left_out(tmp_path, run):
    questions = [replace(BACK, id=f"q{k}", options=("a birdhouse", "a bench")) for k in range(2)] + [BACK]
    write_jsonl(tmp_path / "rows.jsonl", map(row_of, questions))
    said = [row_of_text(told(SEEN), q).said for q in questions]
    found = analyse(write_run(tmp_path, "odd", said, bench=tmp_path / "rows.jsonl"))
    assert found["chain"]["overall"]["n"] == 1 and any(n.startswith("2 questions are left out") for n in found["notices"])
    found = analyse(write_run(tmp_path, "odder", said[:2], bench=tmp_path / "rows.jsonl"))
    assert found["chain"] is None and "routes" in found["left_out"]["chain"]
    assert trace([Row(q, s, None) for q, s in zip(questions, said)])[1] == 2


def test_under_a_control_the_chain_is_not_held_against_the_walk(run, taught, bench):
    found = analyse(write_run(bench.path.parent, "shuffled", *predictions(bench, taught), control="shuffled"))
    assert found["chain"] is found["confusion"] is None and "shuffled" in found["left_out"]["chain"]
    assert found["by"]["turns"]


def test_a_run_without_an_answer_gives_nulls(tmp_path, run):
    found = analyse(write_run(tmp_path, "empty", [], bench=run.benchmark.path))
    assert found["by"]["task"] == {} and found["by"]["position"] is None
    assert found["orders"] is found["chain"] is found["thought"] is None and json.dumps(found, allow_nan=False)


def test_an_answer_that_was_cut_off_is_told(tmp_path, run):
    said = [replace(p, extra={"tokens": 5, "cut_off": True}) for p in run.predictions[:3]]
    found = analyse(write_run(tmp_path, "cut", said, bench=run.benchmark.path))
    assert "3 answers were cut off at max_new_tokens" in found["notices"]


def test_tables_hold_what_the_analysis_found(run, found):
    tables = category_tables(found)
    assert set(tables) == {
        "task", "turns", "steps", "landmark", "action", "position", "orders", "chain", "chain_steps", "motion",
        "landmark_words", "recall", "thought",
    }  # fmt: skip
    task = tables["task"].set_index("task")
    assert task.loc["action/reverse", "accuracy"] == found["by"]["task"]["action/reverse"]["action"]["accuracy"]
    chain = tables["chain"]
    assert (chain.groupby("kind")["count"].sum() == chain.groupby("kind")["n"].first()).all()
    assert tables["motion"].loc["left", "stand"] == found["confusion"]["motion"]["counts"][
        found["confusion"]["motion"]["words"].index("left")][found["confusion"]["motion"]["words"].index("stand")]  # fmt: skip
    assert category_tables(run)["turns"].equals(tables["turns"])


def texts(ax) -> list[str]:
    return [t.get_text() for t in (*ax.texts, *ax.get_yticklabels())]


def test_every_picture_tells_n_and_clusters(found, bench):
    letters = analyse(write_run(bench.path.parent, "letters", [p.said for p in (by_letter(0, 0.75, True),)], bench=one(bench)))
    ax = draw.part_plot(found, "turns", "direction", Figure().add_subplot())
    part = found["by"]["turns"]["5"]["direction"]
    assert f"{part['n']} / {part['clusters']}" in texts(ax) and "5" in texts(ax)
    assert "direction, reverse" in texts(draw.part_plot(found, "task", ax=Figure().add_subplot()))
    assert "12 / 12" in texts(draw.order_plot(found, Figure().add_subplot()))
    ax = draw.chain_plot(found, Figure().add_subplot())
    assert f"{found['chain']['overall']['n']} / {CLIPS}" in texts(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(OUTCOMES)
    widths = [sum(bar.get_width() for bars in ax.containers for bar in bars if round(bar.get_y() + 0.36) == y) for y in range(3)]
    assert widths == pytest.approx([1, 1, 1])
    ax = draw.confusion_plot(found, ax=Figure().add_subplot())
    assert f"{CLIPS} clusters" in ax.get_title() and str(found["confusion"]["motion"]["counts"][0][0]) in texts(ax)
    assert "places right" in draw.confusion_plot(found, "landmark", Figure().add_subplot()).get_title()
    assert sum("/" in t for t in texts(draw.thought_plot(found, Figure().add_subplot()))) == len(found["thought"]["bins"])
    assert "1 / 1" in texts(draw.calibration_plot(letters, Figure().add_subplot()))


def one(bench):
    """A question file with the one question that by_letter asks."""
    write_jsonl(bench.path.parent / "one.jsonl", [row_of(by_letter(0, 0.75, True).question)])
    return bench.path.parent / "one.jsonl"


def test_a_picture_of_what_is_left_out_says_why(found):
    with pytest.raises(StkitError, match="calibration cannot be drawn of the run first: .*mode='letter'"):
        draw.calibration_plot(found)
    with pytest.raises(BadUse, match="'weather' is no part of an analysis: use task, turns"):
        draw.part_plot(found, "weather")
    with pytest.raises(BadUse, match="scope 'route' is not among the questions by landmark: use landmark"):
        draw.part_plot(found, "landmark", "route")
    with pytest.raises(BadUse, match="words='verbs': use motion or landmark"):
        draw.confusion_plot(found, "verbs")


def test_asked_items_are_told_in_the_order_of_the_walk(taught):
    by_task = {}
    for question, _, _ in taught:
        if not question.is_open:
            by_task.setdefault((question.clip_id, question.task), set()).add(asked_items(question))
    assert len(by_task) > 30 and all(len(items) == 1 for items in by_task.values())
