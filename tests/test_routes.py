"""Routes in words and back, and the way back as an algebra."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stkit.bench.routes import ACTIONS, LANDMARKS, STYLES, edit_distance, parse, render, reverse
from stkit.bench.schema import Route, Step
from stkit.runtime import BadUse, StkitError

MOVES = [Step("move", move) for move in ("straight", "left", "right")]
DONE = [Step("action", action) for action in (*ACTIONS, "put down", "close a door")]
PASSED = [Step("landmark", kind, side) for kind in LANDMARKS for side in ("left", "right", "")]
steps = st.sampled_from(MOVES + DONE + PASSED)
routes = st.lists(steps, min_size=1, max_size=14).map(lambda drawn: Route(tuple(drawn)))

THERE_AND_BACK = [
    ("turn left", "turn right"),
    ("go straight, turn left, go straight", "go straight, turn right, go straight"),
    ("go straight, turn left, turn right, turn right", "turn left, turn left, turn right, go straight"),
    (
        "go straight, turn left, pass the brick wall on your right",
        "pass the brick wall on your left, turn right, go straight",
    ),
    (
        "go straight, pass the tree on your left, pick up an item, turn right, go straight, open a door",
        "go straight, close a door, turn left, go straight, put down an item, pass the tree on your right",
    ),
    ("go straight, look up, step back, pause, look down", "go straight, look down, pause, step back, look up"),
    ("pass the torch, go straight, pass the fire wall", "pass the fire wall, go straight, pass the torch"),
    ("put down an item, close a door", "open a door, pick up an item"),
]  # fmt: skip


@pytest.mark.parametrize(("there", "back"), THERE_AND_BACK)
def test_the_way_back_is_right_by_hand(there, back):
    assert render(reverse(parse(there))) == back
    assert render(reverse(parse(back))) == there


@given(routes)
def test_reversing_twice_gives_the_route_again(route):
    assert reverse(reverse(route)) == route


@given(routes)
def test_the_way_back_holds_the_same_steps_undone(route):
    there, back = route.steps, reverse(route).steps
    turns = [s.value for s in there if s.value in ("left", "right")]
    assert [s.value for s in back if s.value in ("left", "right")] == [
        {"left": "right", "right": "left"}[t] for t in turns[::-1]
    ]
    assert sorted(s.value for s in back if s.kind == "landmark") == sorted(
        s.value for s in there if s.kind == "landmark"
    )
    assert sum(s.value == "straight" for s in back) == sum(s.value == "straight" for s in there)


@given(routes, st.integers(0, STYLES - 1), st.sampled_from(["forward", "reverse"]))
def test_every_wording_is_read_back_as_the_same_route(route, style, order):
    text = render(route, style, order)
    assert parse(text) == route
    assert parse(f"  {text.upper()}\n") == route
    assert text.lower().startswith("turn around") == (order == "reverse")


def test_the_wordings_differ():
    route = parse("go straight, turn left, pass the tree on your right, look up, pause, pick up an item")
    assert STYLES >= 3
    assert len({render(route, style) for style in range(STYLES)}) == STYLES


HUMAN = [
    ("Go straight and then turn left.", "go straight, turn left"),
    ("Walk forward, then make a left, and then  take a right turn.", "go straight, turn left, turn right"),
    ("You turn to the left; keep going straight\nand turn right at the corner", "turn left, go straight, turn right"),
    ("First go ahead, passing the wooden wall on the left-hand side", "go straight, pass the wooden wall on your left"),
    ("Turn around, go forward and finally close the door", "go straight, close a door"),
    ("walk past the column, then wait for a moment.", "pass the column, pause"),
    ("**Turn right**. Then look upwards, and put the object back!", "turn right, look up, put down an item"),
]


@pytest.mark.parametrize(("said", "meant"), HUMAN)
def test_a_route_as_people_say_it_is_understood(said, meant):
    assert render(parse(said)) == meant


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("go straight, then jump over the fence, turn left", "jump over the fence"),
        ("go straight, pass the sofa on your left", "pass the sofa on your left"),
        ("turn left or right", "turn left or right"),
        ("go straight, turn around, turn left", "turn around"),
        ("do not turn left", "do not turn left"),
    ],
)
def test_a_phrase_that_is_none_is_named(text, named):
    with pytest.raises(StkitError, match=repr(named)):
        parse(text)


@pytest.mark.parametrize("text", ["", "  \n", "turn around", "., and then"])
def test_a_text_without_any_step_is_no_route(text):
    with pytest.raises(StkitError, match="tells no route"):
        parse(text)


def test_what_has_no_words_is_refused():
    with pytest.raises(StkitError, match="sofa"):
        render(Route((Step("landmark", "sofa", "left"),)))
    with pytest.raises(StkitError, match="up"):
        render(Route((Step("landmark", "tree", "up"),)))
    with pytest.raises(StkitError, match="jump"):
        render(Route((Step("action", "jump"),)))
    with pytest.raises(BadUse, match=f"style {STYLES}"):
        render(Route(()), STYLES)
    with pytest.raises(BadUse, match="backwards"):
        render(Route(()), 0, "backwards")


def slow_distance(a: Route, b: Route) -> int:
    """The definition, by recursion."""

    @cache
    def left(i: int, j: int) -> int:
        if i == len(a.steps) or j == len(b.steps):
            return len(a.steps) - i + len(b.steps) - j
        if a.steps[i] == b.steps[j]:
            return left(i + 1, j + 1)
        return 1 + min(left(i + 1, j), left(i, j + 1), left(i + 1, j + 1))

    return left(0, 0)


@given(st.integers(0, 10**6))
def test_the_edit_distance_is_the_least_number_of_changes(seed):
    rng = random.Random(seed)
    a, b = (Route(tuple(rng.choices(MOVES + DONE[:2], k=rng.randrange(8)))) for _ in range(2))
    assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)


def test_the_edit_distance_is_right_by_hand():
    route = parse("go straight, turn left, pass the tree on your right")
    assert edit_distance(route, route) == 0
    assert edit_distance(route, parse("go straight, turn right, pass the tree on your left")) == 2
    assert edit_distance(route, parse("turn left, pass the tree on your right")) == 1
    assert edit_distance(route, Route(())) == 3
