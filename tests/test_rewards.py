"""Rewards: what each pays for, and that nothing else pays."""

from dataclasses import replace

import pytest
from walkmaker import make_walks, sampled

from stkit.bench import routes
from stkit.bench.schema import LETTERS, Question
from stkit.bench.timeline import Moment, load_truth, render, timeline
from stkit.train.answers import answer_text
from stkit.train.rewards import Answered, combine

OPTIONS = ("turn left, turn left", "turn right, turn left", "turn left, turn right", "turn right, turn right")
AHEAD = Question("f", "a", "a.mp4", "a", "direction", "forward", "Which turns?", OPTIONS, 2, "train")
BACK = replace(AHEAD, id="b", order="reverse")  # the way back of left, left is right, right: option A's is D
ROUTE = replace(AHEAD, id="r", task="route", options=(), answer="go straight, turn left, pass the tree on your right")
SEEN = (Moment("straight", "tree", "left"), Moment("straight"), Moment("left"), Moment("stand"))
THINK = "<think>I saw it turn.</think> "


def rollout(text: str, question: Question = AHEAD, tokens: int = 10, finished: bool = True, moments=None) -> Answered:
    return Answered(question, text, tokens, finished, 64, moments)


def said(letter: str, question: Question = AHEAD) -> Answered:
    return rollout(f"{THINK}<answer>{letter}</answer>", question)


def reward(name: str, *rollouts: Answered) -> list[float | None]:
    return [scored.parts[name] for scored in combine(rollouts, {name: 1.0, "length": 1.0})]


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """(question, opposite, moments) of real walks."""
    bench = make_walks(tmp_path_factory.mktemp("walks"), clips=6, seed=9)
    by_kind = {(q.clip_id, q.task, q.order): q for q in bench.questions}
    other = {"forward": "reverse", "reverse": "forward"}
    truths = {clip.id: load_truth(bench, clip.id) for clip in bench.clips}
    moments = {name: timeline(truth, sampled(truth)) for name, truth in truths.items()}
    return [(q, by_kind[q.clip_id, q.task, other[q.order]], moments[q.clip_id]) for q in bench.questions]


def test_what_is_taught_earns_everything(walks):
    names = ("correct", "format", "reverse_consistency", "timeline")
    for question, opposite, moments in walks:
        pair = [
            rollout(answer_text(q, "timeline", moments=moments), q, moments=moments) for q in (question, opposite)
        ]
        scored = combine(pair, dict.fromkeys(names, 1.0))
        assert [s.reward for s in scored] == [4, 4], question.id
        paper = rollout(answer_text(question, "paper", opposite), question)
        assert combine([paper], {"correct": 1, "format": 1})[0].reward == 2


# --- correct and format ---

GOOD = [
    "<answer>C</answer>", "<answer> C </answer>\n", "<answer>C.</answer>", "<answer>(C)</answer>",
    "<answer>C)</answer>", "<answer>turn left, turn right</answer>", "<answer>C. turn left, turn right</answer>",
    "<answer>(C) Turn left, turn right.</answer>",
]  # fmt: skip


@pytest.mark.parametrize("answer", GOOD)
def test_the_right_letter_or_text_in_the_form_earns_both(answer):
    assert combine([rollout(THINK + answer)], {"correct": 1, "format": 0.5})[0].reward == 1.5


@pytest.mark.parametrize("answer", GOOD)
def test_a_wrong_answer_in_the_form_earns_the_form_alone(answer):
    wrong = replace(AHEAD, answer=0)
    assert combine([rollout(THINK + answer, wrong)], {"correct": 1, "format": 0.5})[0].reward == 0.5


@pytest.mark.parametrize("text", [
    THINK + "<answer>A B C D</answer>", THINK + "<answer>A, B, C, D</answer>", THINK + "<answer>A or C</answer>",
    THINK + "<answer>C or A</answer>", THINK + "<answer>C and D</answer>", THINK + "<answer>C/D</answer>",
    THINK + "<answer>A. turn left, turn right</answer>", THINK + "<answer>C. turn left, turn left</answer>",
    THINK + "<answer>turn left, turn right or turn left, turn left</answer>", THINK + "<answer></answer>",
    THINK + "<answer>C</answer><answer>A</answer>", THINK + "<answer>A</answer> <answer>C</answer>",
    "<think>The answer is C, I think <answer>C</answer></think>", "<think>It is C.</think> <answer></answer>",
    "<think>It was C <answer>C</answer></think> <answer>A</answer>", "<think>I see that it is C", THINK, "", " \n",
    THINK + "<answer>E</answer>", THINK + "<answer>not C</answer>", THINK + "<answer>В</answer>",
    THINK + "<answer>any of them</answer>", THINK + "<answer>A</answer> no, C", THINK + "<answer>turn left</answer>",
    THINK + "<answer>" + "C A " * 500 + "</answer>",
])  # fmt: skip
def test_no_way_around_choosing_earns_a_right_answer_or_the_form(text):
    """A is in the form, and wrong; nothing else in it stands for one option."""
    formed = [1.0] if text.endswith("</think> <answer>A</answer>") and text.count("<answer>") == 1 else [0.0]
    assert reward("correct", rollout(text)) == [0.0] and reward("format", rollout(text)) == formed


@pytest.mark.parametrize("text", [
    "<think></think> <answer>C</answer>", "<think> \n </think> <answer>C</answer>", "<answer>C</answer>", "C",
    "<think>...</think> <answer>C</answer>", "<think>____</think> <answer>C</answer>",
    "<think>C.</think> <answer>C</answer>", THINK + "<Answer>C</Answer>", THINK + "<answer>C</answer> So it is C.",
    "<THINK>I saw it.</THINK> <answer>C</answer>",
    "Well. " + THINK + "<answer>C</answer>", THINK + "It is <answer>C</answer>", THINK + "<answer>C", THINK + "C",
    "<think>I saw it turn. <answer>C</answer>", "I saw it turn.</think> <answer>C</answer>",
    "<think>I saw it <think>turn.</think></think> <answer>C</answer>", THINK * 2 + "<answer>C</answer>",
    THINK + "<answer>C</answer><answer>C</answer>", THINK + "<answer><answer>C</answer></answer>",
    "<think>I saw </answer> it.</think> <answer>C</answer>", "<think>I saw < think > it.</think> <answer>C</answer>",
    "< think >I saw it turn.</think> <answer>C</answer>", THINK + "<answer>C</answer >", THINK + "<answer>c</answer>",
    THINK + "<answer>С</answer>", THINK + "<answer>Ｃ</answer>", THINK + "<answer>C C</answer>",
    "＜think＞I saw it turn.＜/think＞ ＜answer＞C＜/answer＞", THINK + "<answer>It is C</answer>",
    "<answer>C</answer> " + THINK, THINK + "<answer>C</answer>\nuser\nWhich turns?",
    "<thinking>I saw it turn.</thinking> <answer>C</answer>",
])  # fmt: skip
def test_the_form_is_the_whole_text_and_nothing_else(text):
    assert reward("format", rollout(text)) == [0.0]


def test_an_option_that_begins_like_a_letter_is_an_option():
    question = replace(AHEAD, options=("A tree", "a wall", "B"), answer=0)
    for answer, formed in (("A tree", 1), ("A", 1), ("A wall", 1), ("A bush", 0), ("C", 1), ("D", 0)):
        assert reward("format", said(answer, question)) == [formed], answer


def test_a_very_long_text_is_read_in_good_time():
    assert reward("format", rollout("<think>" + "left < " * 20_000 + "</think> <answer>C</answer>")) == [1.0]


@pytest.mark.parametrize("answer, right", [
    ("go straight, turn left, pass the tree on your right", 1), ("a nice walk", 0), ("", 0),
    ("Walk forward; make a left; go by the tree on the right", 1), ("go straight, turn left", 0),
    ("go straight, turn left, pass the tree on your left", 0),
    ("go straight, turn left, pass the tree on your right, look up", 0), ("turn left, go straight, turn left", 0),
])  # fmt: skip
def test_a_route_is_right_when_it_is_exactly_the_route(answer, right):
    assert reward("correct", said(answer, ROUTE)) == [right]
    assert reward("format", said(answer, ROUTE)) == [float(bool(answer))]


def test_a_released_route_in_free_words_is_right_in_the_same_words():
    free = replace(ROUTE, answer="Past the Birdhouse, home.")
    assert reward("correct", said("past the birdhouse: home", free), said("home", free), rollout("", free)) == [1, 0, 0]


# --- reverse consistency ---

def test_forward_and_reverse_agree_under_the_algebra_of_routes():
    """Left, left is right, right on the way back: A of the one goes with D of the other, B with B, C with C."""
    pairs = {"A": "D", "B": "B", "C": "C", "D": "A"}
    for ahead in "ABCD":
        for back in "ABCD":
            agreed = float(pairs[ahead] == back)
            assert reward("reverse_consistency", said(ahead), said(back, BACK)) == [agreed, agreed], ahead + back


def test_a_rollout_gets_the_share_of_the_other_orders_rollouts_that_agree():
    rollouts = [said("A"), said("C"), said("D", BACK), said("D", BACK), said("C", BACK), rollout("no idea", BACK)]
    assert reward("reverse_consistency", *rollouts) == [2 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 2, 0]


def test_it_needs_no_right_answer():
    wrong = [said("A"), said("D", BACK)]
    assert reward("correct", *wrong) == [0, 0] and reward("reverse_consistency", *wrong) == [1, 1]


def test_both_orders_told_alike_do_not_agree():
    told = "go straight, turn left, go straight, turn left"
    back = replace(ROUTE, order="reverse")
    assert reward("reverse_consistency", said(told, ROUTE), said(told, back)) == [0, 0]
    assert reward("reverse_consistency", said("A"), said("A", BACK)) == [0, 0]


def test_unread_answers_agree_with_nothing_not_even_each_other():
    for text in ("", "A or D", "<think>A", f"{THINK}<answer></answer>"):
        assert reward("reverse_consistency", rollout(text), rollout(text, BACK)) == [0, 0]
    home = [rollout("home", ROUTE), rollout("home", replace(ROUTE, order="reverse"))]
    assert reward("reverse_consistency", *home) == [0, 0]


@pytest.mark.parametrize("change", [{"order": "forward"}, {"clip_id": "z"}, {"task": "action"}])
def test_without_the_other_orders_question_on_the_clip_it_does_not_apply(change):
    assert reward("reverse_consistency", said("A"), said("D", replace(BACK, **change))) == [None, None]


def test_options_that_are_no_routes_have_no_way_back():
    free = {"options": ("the birdhouse", "the swing")}
    ahead, back = said("A", replace(AHEAD, **free)), said("A", replace(BACK, **free))
    for pair in ((ahead, back), (ahead, said("D", BACK)), (said("A"), back)):
        assert reward("reverse_consistency", *pair) == [None, None]


def test_on_real_walks_each_option_agrees_with_its_way_back_alone(walks):
    for question, opposite, _ in walks:
        if question.is_open:
            continue
        ways_back = [routes.reverse(routes.parse(option)) for option in question.options]
        for k, letter in enumerate(LETTERS[:4]):
            others = [said(other, opposite) for other in LETTERS[:4]]
            agree = reward("reverse_consistency", said(letter, question), *others)[1:]
            assert agree == [float(routes.parse(option) == ways_back[k]) for option in opposite.options]
            assert sum(agree) == 1, question.id


# --- time line ---

def timed(text: str) -> float | None:
    return reward("timeline", rollout(text, moments=SEEN))[0]


def test_the_time_line_in_the_thinking_earns_its_agreement():
    line = render(SEEN)
    assert timed(f"<think>{line} Route: left.</think> <answer>C</answer>") == 1
    assert timed(f"<think>{line.replace('tree left', 'tree right')}</think>") == 7 / 8
    assert timed("<think>Timeline: straight.</think>") == 1 / 8


@pytest.mark.parametrize("text", [
    "", "<answer>C</answer>", render(SEEN), f"{THINK}{render(SEEN)}", f"{THINK}<answer>{render(SEEN)}</answer>",
    f"<think>{render(SEEN)}", f"<think>{render(SEEN)} {render(SEEN)}</think>", f"<think>{render(SEEN)}</think> " * 2,
    "<think>straight tree left, straight, left, stand</think>", "<think>Timeline: so it goes.</think>",
    f"<think>Timeline: left.</think> <think>{render(SEEN)}</think>",
])  # fmt: skip
def test_no_time_line_two_of_them_or_one_outside_of_the_thinking_earns_nothing(text):
    assert timed(text) == 0


def test_a_longer_time_line_earns_less():
    assert timed(f"<think>{render(SEEN * 2)}</think>") == 1 / 2
    assert timed(f"<think>{render(SEEN * 10)}</think>") == 1 / 10


def test_without_truth_the_time_line_does_not_apply():
    assert reward("timeline", rollout(f"<think>{render(SEEN)}</think>")) == [None]


# --- length ---

def test_length_is_free_up_to_half_and_falls_to_nothing_at_the_limit():
    lengths = [0, 1, 32, 40, 48, 64, 70]
    assert reward("length", *[rollout("C", tokens=n) for n in lengths]) == [1, 1, 1, 0.75, 0.5, 0, 0]


def test_what_did_not_finish_earns_nothing_for_its_length():
    assert reward("length", rollout("C", tokens=1, finished=False)) == [0]
