"""Rewards together: weights, what does not apply, and functions of a user's own."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stkit.bench.schema import Question
from stkit.runtime import BadUse, StkitError
from stkit.train.plugins import find_rewards
from stkit.train.rewards import REWARDS, Answered, combine

OPTIONS = ("turn left, turn left", "turn right, turn left", "turn left, turn right", "turn right, turn right")
AHEAD, BACK = (
    Question(order, "a", "a.mp4", "a", "direction", order, "Which turns?", OPTIONS, 2, "train")
    for order in ("forward", "reverse")
)


def rollout(text: str, question: Question = AHEAD) -> Answered:
    return Answered(question, text, tokens=10, finished=True, max_new_tokens=64)


def said(letter: str) -> Answered:
    return rollout(f"<think>I saw it turn.</think> <answer>{letter}</answer>")


def test_the_reward_is_the_weighed_sum_of_what_applies():
    one, two = combine([said("C"), said("A")], {"correct": 2, "format": 0.25, "reverse_consistency": 5, "timeline": 7})
    assert (one.reward, two.reward) == (2.25, 0.25)
    assert one.parts == {"correct": 1.0, "format": 1.0, "reverse_consistency": None, "timeline": None}
    json.dumps(one.parts, allow_nan=False)


def test_a_weight_of_nothing_leaves_a_reward_out():
    assert list(combine([said("C")], {"correct": 1, "format": 0})[0].parts) == ["correct"]


def test_a_rollout_that_no_reward_applies_to_is_refused_with_the_fix():
    with pytest.raises(StkitError, match="question forward: none of the rewards timeline applies.*rewards.correct=1"):
        combine([said("C")], {"timeline": 1})


def test_no_rollouts_give_no_rewards():
    assert combine([], {"correct": 1}) == []


@given(st.text(alphabet="ABCD<>/thinkanswer \n.", max_size=80))
def test_every_text_gets_a_plain_number(text):
    scored = combine([rollout(text), rollout(text, BACK)], dict.fromkeys(REWARDS, 1.0))
    assert all(isinstance(s.reward, float) and 0 <= s.reward <= 4 for s in scored)


def brief(rollouts):
    return [len(r.text) < 50 for r in rollouts]


def test_a_function_of_ones_own_takes_two_lines():
    scored = combine([said("C"), rollout("C" * 60)], {"correct": 1, "brief": 0.5}, {"brief": brief})
    assert [s.parts["brief"] for s in scored] == [1, 0] and scored[0].reward == 1.5
    assert combine([said("C")], {"correct": 1}, {"brief": brief})[0].reward == 2


def test_it_may_stand_in_a_file_or_a_package(tmp_path, monkeypatch):
    source = "def brief(rollouts):\n    return [len(r.text) < 50 for r in rollouts]\n"
    (tmp_path / "my_rewards.py").write_text(source)
    (tmp_path / "mine_too").mkdir()
    (tmp_path / "mine_too" / "parts.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("my_rewards.py:brief", f"{tmp_path}/my_rewards.py:brief", "mine_too.parts:brief"):
        assert combine([said("C")], {name: 0.5})[0].parts == {name: 1.0}


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_any_number_will_do(value):
    assert type(combine([said("C")], {"mine": 1}, {"mine": lambda rollouts: [value]})[0].parts["mine"]) is float


def test_arrays_and_generators_will_do_and_none_is_what_does_not_apply():
    for given_back in (np.array([0.5, math.nan]), torch.tensor([0.5, math.nan]), iter([0.5, None])):
        scored = combine([said("C")] * 2, {"mine": 1, "correct": 1}, {"mine": lambda rollouts, g=given_back: g})
        assert [s.parts["mine"] for s in scored] == [0.5, None]


@pytest.mark.parametrize("value, why", [
    ([1.0], "gave 1 numbers for 2"), ([1, 2, 3], "gave 3 numbers"), (None, "TypeError"), (3, "TypeError"),
    (["a", 1], "gave 'a'"), (["1", 1], "gave '1'"), ([math.inf, 1], "gave inf"), ([[1, 2], 1], "gave .1, 2"),
    ([1j, 1], "gave 1j"), ([torch.zeros(2), 1], "gave tensor"), ([10**400, 1], "give a finite number"),
])  # fmt: skip
def test_bad_numbers_are_told_with_the_functions_name(value, why):
    with pytest.raises(StkitError, match=f"reward 'mine' .*{why}"):
        combine([said("C")] * 2, {"mine": 1}, {"mine": lambda rollouts: value})


def test_a_function_that_fails_is_named_with_its_error():
    with pytest.raises(StkitError, match="reward 'mine' failed: ZeroDivisionError: division by zero"):
        combine([said("C")], {"mine": 1}, {"mine": lambda rollouts: [1 / 0]})


@pytest.mark.parametrize("name, near", [
    ("corect", "correct"), ("formats", "format"), ("consistency", "reverse_consistency"), ("brie", "brief"),
    (":brief", "brief"), ("format:", "format"),
])  # fmt: skip
def test_an_unknown_reward_is_told_with_the_nearest_one(name, near):
    with pytest.raises(BadUse, match=f"reward {name!r} is unknown: did you mean {near!r}"):
        find_rewards({name: 1.0}, REWARDS, {"brief": brief})


@pytest.mark.parametrize("weights, functions, why", [
    ({"correct": 0}, {}, "every weight is 0"), ({"mine": 1}, {"mine": 3}, "'mine' is 3"),
    ({"correct": 1}, {"correct": brief}, "'correct' is one of the kit's own"),
    ({"math:cosinus": 1}, {}, "math has no 'cosinus'"), ({"math:pi": 1}, {}, "'math:pi' is 3.14"),
    ({"no.such.module:f": 1}, {}, "no.such.module: it cannot be imported"),
    ({"none.py:f": 1}, {}, "none.py: no such file"),
])  # fmt: skip
def test_a_reward_that_cannot_be_had_is_told_before_anything_runs(weights, functions, why):
    with pytest.raises(StkitError, match=why):
        find_rewards(weights, REWARDS, functions)


def test_a_file_that_breaks_is_named_and_read_again_when_it_has_changed(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import nothing_of_the_kind\n")
    with pytest.raises(StkitError, match="mine.py: it cannot be loaded: ModuleNotFoundError"):
        combine([said("C")], {f"{path}:f": 1})
    path.write_text("def f(rollouts):\n    return [0.25] * len(rollouts)\n")
    assert combine([said("C")], {f"{path}:f": 1})[0].reward == 0.25
    path.write_text("def f(rollouts):\n    return [0.5] * len(rollouts)\n")
    os.utime(path, ns=(0, 0))
    assert combine([said("C")], {f"{path}:f": 1})[0].reward == 0.5
