"""The audit finds every planted leak by the attack that should find it, and none where there is none."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from stkit.bench.audit import audit, audit_questions
from stkit.bench.plans import MIRROR, fits
from stkit.bench.questions import plan_questions
from stkit.bench.routes import LANDMARKS, parse, render, reverse
from stkit.bench.schema import Question, Route, Step, row_of
from stkit.runtime import StkitError

SEEDS = (0, 1, 2, 3, 4)
WORDS = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet"]
WORDS += ["jetty", "knoll", "ledge", "mesa", "notch", "oasis", "plaza", "quarry", "ridge"]


def question(n: int | str, options: list[str], answer: int, task="direction", order="forward", group=None) -> Question:
    return Question(
        f"q{n}",
        f"c{n}",
        f"c{n}.mp4",
        group or f"g{n}",
        task,
        order,
        "What did you pass?",
        tuple(options),
        answer,
        "test",
    )


def neutral(rng: random.Random, words: int = 4) -> list[str]:
    """Four options of equal length that have nothing to do with one another."""
    return [" ".join(rng.choice(WORDS) for _ in range(words)) + f" {rng.randrange(10**6)}" for _ in range(4)]


def found(result, scope="all") -> set[str]:
    return {r["baseline"] for r in result.results if r["verdict"] == "leak" and r["scope"] == scope}


@pytest.mark.parametrize("seed", SEEDS)
def test_our_own_benchmark_of_400_clips_gives_nothing_away(seed):
    questions, _ = plan_questions(400, seed)
    result = audit_questions(questions, seed)
    assert result.verdict == "no leak" and not result.leaks
    assert {r["scope"] for r in result.results} == {"all", "direction", "landmark", "action"}
    assert all(r["n"] >= 300 and r["chance"] == 0.25 for r in result.results)
    assert len(result.results) == 32


def released() -> Path | None:
    folders = [os.environ.get("STKIT_DATA"), Path(__file__).parent.parent.parent / "shared" / "data"]
    files = [Path(f) / "ego_st_r1_mcq_504.jsonl" for f in folders if f]
    return next((f for f in files if f.exists()), None)


@pytest.mark.skipif(released() is None, reason="the released rows are not here: set STKIT_DATA to their folder")
def test_the_released_rows_are_answered_without_the_video():
    result = audit(released())
    assert result.leaks and result.best["baseline"] == "words"
    assert result.best["accuracy"] > 0.85 and result.best["low"] > 0.75 and 0.26 < result.best["chance"] < 0.28
    assert result.questions == 503 and result.clusters == 211 and result.skipped == 1
    letters = {letter: sum(c.get(letter, 0) for c in result.letters.values()) for letter in "ABCD"}
    assert letters["A"] == max(letters.values()) and sum(letters.values()) == 503


def test_random_options_give_nothing_away():
    rng = random.Random(0)
    result = audit_questions([question(n, neutral(rng), n % 4) for n in range(400)])
    assert result.verdict == "no leak"


def test_a_favoured_letter_is_found():
    rng = random.Random(1)
    result = audit_questions(
        [question(n, neutral(rng), 0 if rng.random() < 0.4 else rng.randrange(4)) for n in range(400)]
    )
    assert "majority letter" in found(result) and "option length" not in found(result)


def test_a_right_option_that_is_longer_is_found():
    rng, made = random.Random(2), []
    for n in range(400):
        options, answer = neutral(rng), rng.randrange(4)
        options[answer] += " and more" * (rng.random() < 0.5)
        made.append(question(n, options, answer))
    result = audit_questions(made)
    assert "option length" in found(result) and "majority letter" not in found(result)


def test_distractors_edited_from_the_truth_are_found_by_the_medoid():
    rng, made = random.Random(3), []
    for n in range(400):
        truth, answer = rng.sample(WORDS, 5), rng.randrange(4)
        options = []
        for k in range(3):
            edited = list(truth)
            edited[k] = rng.choice([w for w in WORDS if w not in truth])
            options.append(" then ".join(edited))
        options.insert(answer, " then ".join(truth))
        made.append(question(n, options, answer))
    result = audit_questions(made)
    assert {"medoid, bag of words", "medoid, in order"} <= found(result)


def test_order_alone_is_found_by_the_medoid_in_order_only():
    rng, made = random.Random(4), []
    for n in range(400):
        truth, answer = rng.sample(WORDS, 6), rng.randrange(4)
        options = []
        for k in (0, 2, 4):  # three distractors, each with one pair of neighbours swapped
            edited = list(truth)
            edited[k : k + 2] = edited[k + 1], edited[k]
            options.append(" then ".join(edited))
        options.insert(answer, " then ".join(truth))
        made.append(question(n, options, answer))
    assert "medoid, in order" in found(audit_questions(made)) and "medoid, bag of words" not in found(
        audit_questions(made)
    )


def test_a_leaking_word_is_found_and_named():
    rng, made = random.Random(5), []
    for n in range(400):
        options, answer = neutral(rng), rng.randrange(4)
        options[answer] += " lantern" if rng.random() < 0.5 else " anchor"
        options = [o if i == answer else o + " anchor" for i, o in enumerate(options)]
        made.append(question(n, options, answer))
    result = audit_questions(made)
    assert "words" in found(result)
    assert result.words[0]["word"] == "lantern" and result.words[0]["wrong"] == 0


def square_around(truth: Route, rng: random.Random) -> list[Route]:
    """A square of its own around a list of landmarks: two of them replaced by kinds that the walk has not."""
    i, j = rng.sample(range(len(truth.steps)), 2)
    new = dict(
        zip((i, j), rng.sample([k for k in LANDMARKS if k not in {s.value for s in truth.steps}], 2), strict=True)
    )
    made = []
    for edits in ((), (i,), (j,), (i, j)):
        made.append(Route(tuple(replace(s, value=new[k]) if k in edits else s for k, s in enumerate(truth.steps))))
    return made


def independent_squares(clips: int) -> list[Question]:
    """Our own questions, but with the reverse landmark question's options from another square around the same truth."""
    rng, made = random.Random(6), []
    for q in plan_questions(clips, seed=0)[0]:
        if q.kind == "landmark/reverse":
            truth, *others = [render(r) for r in square_around(parse(q.options[q.answer]), rng)]
            others.insert(q.answer, truth)
            q = replace(q, options=tuple(others))
        made.append(q)
    return made


def test_a_square_for_each_question_is_found_by_a_walks_other_questions():
    result = audit_questions(independent_squares(200))
    assert "other questions on the walk" in found(result, "landmark")
    best = max(r["accuracy"] for r in result.results if r["scope"] == "landmark")
    assert best > 0.5  # without a shared square the truth is what the two questions agree on


def ranked(questions: list[Question], order) -> list[Question]:
    """Our own questions with the truth where it is and the other options in an order that depends on the truth."""
    made = []
    for q in questions:
        if q.options:
            truth, others = q.options[q.answer], [o for i, o in enumerate(q.options) if i != q.answer]
            others = order(q, truth, others)
            others.insert(q.answer, truth)
            q = replace(q, options=tuple(others))
        made.append(q)
    return made


def opposite_last(q, truth, others):
    """Edited once, edited once, edited twice: the order in which a square is made."""
    steps = parse(truth).steps
    return sorted(others, key=lambda o: sum(a != b for a, b in zip(parse(o).steps, steps, strict=True)))


def as_told_forwards(q, truth, others):
    back = {o: render(reverse(parse(o))) if q.order == "reverse" else render(parse(o)) for o in others}
    return sorted(others, key=back.get)


@pytest.mark.parametrize("order", [opposite_last, as_told_forwards])
def test_distractors_in_an_order_of_their_own_are_found_by_the_arrangement(order):
    result = audit_questions(ranked(plan_questions(100, seed=0)[0], order))
    assert "arrangement" in found(result) and "words" not in found(result)
    assert result.best["baseline"] in ("arrangement", "all together") and result.best["accuracy"] > 0.5


def test_what_leaks_forwards_and_is_turned_around_in_reverse_is_found():
    rng, letters, lengths = random.Random(10), [], []
    for n in range(200):
        for order, letter in (("forward", 0), ("reverse", 3)):
            favoured = letter if rng.random() < 0.35 else rng.randrange(4)
            letters.append(question(f"{n}/{order}", neutral(rng), favoured, order=order, group=f"g{n}"))
            options, answer = neutral(rng), rng.randrange(4)
            for k in range(4):
                longer = (k == answer) == (order == "forward")
                options[k] += " and more" * (rng.random() < (0.7 if longer else 0.3))
            lengths.append(question(f"{n}/{order}", options, answer, order=order, group=f"g{n}"))
    assert "majority letter" in found(audit_questions(letters))
    assert "option length" in found(audit_questions(lengths))


def test_a_turn_that_would_make_the_walk_cross_itself_is_found_in_our_own_wording():
    rng, made = random.Random(11), []
    while len(made) < 1000:
        turns = [rng.choice(("left", "right")) for _ in range(rng.randint(3, 5))]
        if not fits(tuple(turns), (2,) * (len(turns) + 1)):
            continue
        i, j = rng.sample(range(len(turns)), 2)
        options = []
        for edits in ((), (i,), (j,), (i, j)):  # a square of which nobody asks whether its walks cross themselves
            steps = [Step("move", "straight")]
            for k, turn in enumerate(turns):
                steps += [Step("move", MIRROR[turn] if k in edits else turn), Step("move", "straight")]
            options.append(render(Route(tuple(steps))))
        truth, answer = options[0], rng.randrange(4)
        others = rng.sample(options[1:], 3)
        others.insert(answer, truth)
        made.append(question(len(made), others, answer))
    assert "words" in found(audit_questions(made), "direction")


def test_reading_backwards_is_what_finds_it():
    here, _ = plan_questions(2, seed=0)
    pair = [q for q in here if q.task == "direction"][:2]
    assert [render(reverse(parse(o))) for o in pair[0].options if o == pair[0].options[pair[0].answer]] == [
        render(parse(pair[1].options[pair[1].answer]))
    ]


def test_few_questions_are_too_few_to_tell_and_a_leak_is_told_all_the_same():
    rng = random.Random(7)
    few = audit_questions([question(n, neutral(rng), n % 4) for n in range(60)])
    assert few.verdict == "too few to tell" and not few.leaks
    assert audit_questions([question(n, neutral(rng), 0) for n in range(60)]).verdict == "leak"


def test_a_score_below_chance_is_no_leak():
    rng = random.Random(8)
    result = audit_questions([question(n, neutral(rng), n % 4) for n in range(400)])
    letters = next(r for r in result.results if r["baseline"] == "majority letter" and r["scope"] == "all")
    assert letters["accuracy"] < 0.25 and letters["p"] > 0.5 and letters["verdict"] == "no leak"


def test_the_same_seed_gives_the_same_audit():
    questions, _ = plan_questions(40, seed=0)
    assert audit_questions(questions, 3).to_json() == audit_questions(questions, 3).to_json()


def test_any_file_of_the_schema_is_audited_and_the_json_is_clean(tmp_path):
    questions, _ = plan_questions(30, seed=0)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row_of(q)) + "\n" for q in questions))
    result = audit(path)
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert told["questions"] + told["open_ended"] == len(questions) and told["leaks"] is False
    assert all(isinstance(r["n"], int) and isinstance(r["clusters"], int) for r in told["results"])
    assert all(
        math.isfinite(r[k]) for r in told["results"] for k in ("accuracy", "chance", "low", "high", "p", "p_holm")
    )
    assert list(result.table()["baseline"].unique()) == [r["baseline"] for r in told["results"] if r["scope"] == "all"]
    assert "too few to tell" in result.text() and "30 clips" in result.text()


def test_what_cannot_be_audited_is_one_line(tmp_path):
    rng = random.Random(9)
    with pytest.raises(StkitError, match="no question has options"):
        audit_questions([replace(question(0, [], 0), task="route", answer="go straight")])
    with pytest.raises(StkitError, match="two or more"):
        audit_questions([question(n, neutral(rng), 0, group="g") for n in range(4)])


def test_bad_rows_stop_an_audit_or_are_counted(tmp_path):
    questions, _ = plan_questions(10, seed=0)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row_of(q)) + "\n" for q in questions) + '{"id": "half')
    with pytest.raises(StkitError, match=f"mine.jsonl:{len(questions) + 1}.*--skip-bad"):
        audit(path)
    assert audit(path, skip_bad=True).to_json()["skipped"] == 1
