"""Questions: fair by enumeration, balanced in their letters, the same square both ways."""

import itertools
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from scipy.stats import chisquare

from stkit.bench.plans import PRESETS, fits, make_plan, preset
from stkit.bench.questions import (
    TEMPLATES,
    Square,
    direction_square,
    list_square,
    make_questions,
    plan_questions,
    questions_of,
    square,
    truth_of,
)
from stkit.bench.routes import parse, reverse
from stkit.bench.schema import ORDERS, TASKS, Route, Step, row_problem

TINY = PRESETS["tiny"]
ASKED = ("direction", "landmark", "action")


class Enumerator:
    """Stands in for random.Random and takes every way that it could go, each with its exact probability."""

    def __init__(self):
        self.path: list[list[int]] = []  # [branch taken, branches]
        self.depth = 0

    def _branch(self, ways: int) -> int:
        if self.depth == len(self.path):
            self.path.append([0, ways])
        assert self.path[self.depth][1] == ways
        self.depth += 1
        return self.path[self.depth - 1][0]

    def choice(self, items):
        return items[self._branch(len(items))]

    def randrange(self, stop):
        return self._branch(stop)

    def sample(self, items, k):
        ways = [*itertools.permutations(items, k)]
        return [*ways[self._branch(len(ways))]]

    def runs(self, function):
        """Yield (result, probability) for each way through a function of this generator."""
        while True:
            self.depth = 0
            result = function(self)
            share = Fraction(1)
            for _, ways in self.path:
                share /= ways
            yield result, share
            while self.path and self.path[-1][0] == self.path[-1][1] - 1:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


def posteriors(truths: dict[tuple, Fraction], make) -> tuple[dict[frozenset, Counter], Fraction]:
    """For each set of options that can be offered the probability of each member being the truth; and of no square."""
    found: dict[frozenset, Counter] = defaultdict(Counter)
    none = Fraction(0)
    for truth, prior in truths.items():
        for made, share in Enumerator().runs(lambda rng, truth=truth: make(truth, rng)):
            if isinstance(made, str):
                none += prior * share
                continue
            assert len(set(made.options)) == 4
            found[frozenset(made.options)][made.options[0]] += prior * share
    return found, none


def assert_fair(found: dict[frozenset, Counter]):
    assert found
    for options, truths in found.items():
        assert set(truths) == options  # each of the four can be the truth of some walk
        assert len(set(truths.values())) == 1  # and each as probably as the others, exactly


def landmark_lists(kinds: str, k: int) -> list[tuple[Step, ...]]:
    return [
        tuple(Step("landmark", kind, side) for kind, side in zip(chosen, sides, strict=True))
        for chosen in itertools.permutations(kinds, k)
        for sides in itertools.product(("left", "right"), repeat=k)
    ]


def action_lists(kinds: str, k: int) -> list[tuple[Step, ...]]:
    return [tuple(Step("action", kind) for kind in chosen) for chosen in itertools.permutations(kinds, k)]


def evenly(items) -> dict:
    items = [*items]
    return {item: Fraction(1, len(items)) for item in items}


@pytest.mark.parametrize(("kinds", "k"), [("abc", 1), ("ab", 2), ("abc", 2), ("abcd", 2), ("abcd", 3)])
def test_every_landmark_square_is_exactly_fair(kinds, k):
    found, none = posteriors(evenly(landmark_lists(kinds, k)), lambda truth, rng: list_square(truth, tuple(kinds), rng))
    assert_fair(found)
    assert none == 0


@pytest.mark.parametrize(("kinds", "k"), [("abc", 2), ("abcd", 2), ("abcd", 3), ("abcde", 3), ("abcde", 4)])
def test_every_action_square_is_exactly_fair(kinds, k):
    found, none = posteriors(evenly(action_lists(kinds, k)), lambda truth, rng: list_square(truth, tuple(kinds), rng))
    assert_fair(found)
    assert none == 0


@pytest.mark.parametrize(
    "lengths",
    [(2, 2, 2), (2, 2, 4, 2), (2, 2, 4, 2, 2), (3, 2, 4, 2, 2), (2, 2, 4, 4, 2, 2), (2, 2, 2, 3, 3, 2)],
)
def test_every_direction_square_is_exactly_fair(lengths):
    walks = evenly(w for w in itertools.product(("left", "right"), repeat=len(lengths) - 1) if fits(w, lengths))
    found, none = posteriors(walks, lambda turns, rng: direction_square(turns, lengths, rng))
    assert_fair(found)
    assert none < 1
    assert all(len({len(option.steps) for option in options}) == 1 for options in found)


def test_lengths_without_a_valid_square_have_none_whatever_the_truth():
    walks = evenly(w for w in itertools.product(("left", "right"), repeat=3) if fits(w, (2, 2, 2, 2)))
    found, none = posteriors(walks, lambda turns, rng: direction_square(turns, (2, 2, 2, 2), rng))
    assert not found and none == 1


def test_a_square_that_is_not_valid_would_give_the_truth_away():
    """The check above can fail: without the rule that all four walks fit, the members are not alike."""
    lengths = (2, 2, 2, 2)
    walks = evenly(w for w in itertools.product(("left", "right"), repeat=3) if fits(w, lengths))
    found, _ = posteriors(walks, lambda turns, rng: direction_square(turns, (9, 9, 99, 9), rng))
    with pytest.raises(AssertionError):
        assert_fair(found)


def test_the_square_of_a_walk_holds_its_truth_first_and_three_that_could_be():
    for index in range(60):
        plan = make_plan(2, index, TINY)
        for task in ASKED:
            made = square(plan, TINY, task)
            if isinstance(made, str):
                continue
            assert made.options[0] == truth_of(plan, task) and len(set(made.options)) == 4
            kinds = {"landmark": TINY.landmark_kinds, "action": TINY.action_kinds}.get(task)
            for option in made.options:
                values = [s.value for s in option.steps]
                assert len(values) == len(made.options[0].steps)
                if kinds:
                    assert len({*values}) == len(values) and {*values} <= {*kinds}
                else:
                    assert fits(tuple(v for v in values if v != "straight"), plan.lengths)


def test_the_two_edits_commute_also_where_both_touch_one_landmark():
    truth = tuple(Step("landmark", kind, side) for kind, side in (("brick", "left"), ("tree", "right")))
    for made, _ in Enumerator().runs(lambda rng: list_square(truth, ("brick", "tree", "wood", "torch"), rng)):
        t, a, b, both = ([*option.steps] for option in made.options)
        if made.edits == ("swap", "replace"):
            assert a == t[::-1] and both == b[::-1]
        if made.edits == ("replace", "replace"):
            assert [x == y for x, y in zip(t, a, strict=True)] == [x != y for x, y in zip(t, b, strict=True)]
            assert all(x != y for x, y in zip(t, both, strict=True))


def test_order_matters_in_many_questions():
    plans = [make_plan(0, index, TINY) for index in range(200)]
    for task in ("landmark", "action"):
        swaps = ["swap" in square(plan, TINY, task).edits for plan in plans]
        assert 0.35 < sum(swaps) / len(swaps) < 0.65


@pytest.fixture(scope="module")
def asked():
    return plan_questions(400, seed=5)


def by_id(questions) -> dict:
    return {q.id: q for q in questions}


def test_all_rows_are_good_and_named_by_clip_task_and_order(asked):
    questions, _ = asked
    assert len(by_id(questions)) == len(questions)
    for q in questions:
        assert row_problem(asdict(q)) == ""
        assert q.id == f"{q.clip_id}-{q.task}-{q.order}" and q.video == f"{q.clip_id}.mp4"
    assert {(q.task, q.order) for q in questions} == {(task, order) for task in TASKS for order in ORDERS}


def test_the_answer_is_what_the_walk_did(asked):
    questions, _ = asked
    plans = {f"walk-{index:05d}": make_plan(5, index, TINY) for index in range(400)}
    for q in questions:
        plan = plans[q.clip_id]
        told = q.answer if q.is_open else q.options[q.answer]
        truth = truth_of(plan, q.task)
        assert parse(told) == (reverse(truth) if q.order == "reverse" else truth)
        assert (q.split, q.group) == (plan.split(), plan.group)


def test_no_two_options_are_equal(asked):
    for q in asked[0]:
        assert len({o.casefold() for o in q.options}) == len(q.options) == (0 if q.task == "route" else 4)


def test_both_questions_on_one_thing_share_one_square(asked):
    questions = by_id(asked[0])
    pairs = [
        (q, questions[q.id.replace("-forward", "-reverse")]) for q in asked[0] if q.order == "forward" and q.options
    ]
    assert len(pairs) > 1000
    for there, back in pairs:
        assert {parse(o) for o in there.options} == {reverse(parse(o)) for o in back.options}


def test_letters_are_balanced_within_each_task_and_order(asked):
    counts: dict = defaultdict(Counter)
    for q in asked[0]:
        if q.options:
            counts[q.task, q.order][q.answer] += 1
    assert len(counts) == 6
    for letters in counts.values():
        assert len(letters) == 4 and max(letters.values()) - min(letters.values()) <= 1


@pytest.mark.parametrize("clips", [1, 2, 3, 5, 6, 7])
def test_letters_are_balanced_for_any_number_of_clips(clips):
    questions, _ = plan_questions(clips, seed=9)
    for task, order in itertools.product(ASKED, ORDERS):
        letters = Counter(q.answer for q in questions if (q.task, q.order) == (task, order))
        assert max(letters.values(), default=0) - min((letters[k] for k in range(4)), default=0) <= 1


def test_neither_place_nor_text_order_of_the_options_points_to_the_truth(asked):
    places, ranks = Counter(), Counter()
    for q in asked[0]:
        if q.options:
            truth = q.options[q.answer]
            ranks[sorted(q.options).index(truth)] += 1
            rest = [o for o in sorted(q.options) if o != truth]
            places[tuple(rest.index(o) for o in q.options if o != truth)] += 1
    assert len(places) == 6
    assert chisquare([*places.values()]).pvalue > 0.001
    assert chisquare([ranks[k] for k in range(4)]).pvalue > 0.001


def test_letters_do_not_depend_on_the_walks():
    walks = [(f"c{index}", make_plan(0, index, TINY)) for index in range(40)]
    turned = [
        (
            name,
            replace(p, actions=tuple(replace(a, kind=b.kind) for a, b in zip(p.actions, p.actions[::-1], strict=True))),
        )
        for name, p in walks
    ]
    first, second = (make_questions(made, TINY, 3)[0] for made in (walks, turned))
    assert [q.options for q in first] != [q.options for q in second]
    assert [q.answer for q in first if q.options] == [q.answer for q in second if q.options]


def test_wording_varies_within_each_task_and_order_and_tells_nothing(asked):
    texts, styles = defaultdict(set), defaultdict(set)
    for q in asked[0]:
        texts[q.task, q.order].add(q.question)
        assert q.question in TEMPLATES[q.task, q.order]
        if q.options:
            joints = {("; " in o, ". " in o, ", and then " in o, ", then " in o) for o in q.options}
            assert len(joints) == 1  # all four options of a question are worded alike
            styles[q.task, q.order] |= joints
    assert all(len(found) >= 4 for found in texts.values())
    assert all(len(found) >= 3 for found in styles.values())
    assert len({text for found in TEMPLATES.values() for text in found}) == sum(
        len(found) for found in TEMPLATES.values()
    )


def test_questions_are_a_function_of_seed_and_preset(asked):
    assert plan_questions(400, seed=5) == asked
    assert plan_questions(20, seed=6)[0] != asked[0][:160]
    assert {q.split for q in plan_questions(12, 0, "tiny", split="test")[0]} == {"test"}
    darker = preset("tiny", light=(120, 125))
    assert [q.options for q in plan_questions(12, 0, darker)[0]] == [q.options for q in plan_questions(12, 0)[0]]


def test_most_walks_have_a_direction_square_and_all_others_are_counted(asked):
    questions, dropped = asked
    assert set(dropped) <= {"direction: a mirrored walk touches itself"}
    assert len(questions) + sum(dropped.values()) == 400 * len(TASKS) * len(ORDERS)
    assert sum(q.task == "direction" for q in questions) >= 0.8 * 800


@pytest.mark.parametrize(
    ("name", "ood", "least"),
    [("tiny", False, 0.85), ("tiny", True, 0.55), ("default", False, 0.7), ("default", True, 0.5)],
)
def test_lengths_leave_room_for_mirrored_turns(name, ood, least):
    made = preset(name, ood)
    squares = [square(make_plan(0, index, made), made, "direction") for index in range(150)]
    assert sum(isinstance(found, Square) for found in squares) / len(squares) >= least


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"turns": (1, 1), "landmarks": (1, 3), "actions": (1, 3)}, "direction: fewer than two turns"),
        ({"actions": (1, 1)}, "action: one alone cannot be edited in two ways"),
        ({"actions": (0, 0)}, "action: none on this walk"),
        ({"landmarks": (0, 0)}, "landmark: none on this walk"),
        ({"turns": (2, 2), "landmarks": (0, 0), "actions": (6, 6)}, "action: no other kinds to put in"),
    ],
)
def test_what_cannot_be_asked_is_dropped_with_the_reason(knobs, reason):
    questions, dropped = plan_questions(6, 0, preset("tiny", **knobs))
    assert dropped[reason] == 12
    assert len(questions) + sum(dropped.values()) == 6 * 8
    assert not any(q.task == reason.split(":")[0] for q in questions)


def test_what_the_sampled_frames_miss_is_not_asked():
    sparse = replace(TINY, n_frames=8)
    drafts, dropped = questions_of(make_plan(0, 1, TINY), sparse, 0)
    lost = {reason.split(":")[0] for reason in dropped}
    assert "route" in lost and all("not covered" in reason for reason in dropped)
    assert {draft.task for draft in drafts} == {*TASKS} - lost


def test_one_landmark_is_asked_by_kind_and_side():
    one = preset("tiny", landmarks=(1, 1))
    for index in range(10):
        made = square(make_plan(0, index, one), one, "landmark")
        assert isinstance(made, Square) and made.edits == ("replace", "turn over")
        kinds, sides = zip(*((o.steps[0].value, o.steps[0].side) for o in made.options), strict=True)
        assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
        assert sides[0] == sides[1] != sides[2] == sides[3]


def test_a_walk_of_nothing_has_no_square():
    assert list_square((), ("a", "b"), Enumerator()) == "none on this walk"
    assert truth_of(make_plan(0, 0, preset("tiny", actions=(0, 0))), "action") == Route(())
