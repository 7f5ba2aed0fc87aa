"""Walks: what is drawn fits, timing tells nothing, the camera shows what the plan says."""

import math
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest

from stkit.bench import plans as plans_module
from stkit.bench.plans import (
    CELL,
    HEADINGS,
    PRESETS,
    Landmark,
    Plan,
    PlannedAction,
    asked,
    covered,
    fits,
    make_plan,
    preset,
    schedule,
)
from stkit.bench.presets import DRESSINGS
from stkit.bench.routes import ACTIONS, LANDMARKS, reverse
from stkit.bench.schema import Step
from stkit.runtime import BadUse, StkitError
from stkit.sampling import sample_indices

TINY = PRESETS["tiny"]
OTHER = {"left": "right", "right": "left"}
HAND_MADE = Plan(
    0, 0, ("left", "right"), (2, 3, 2), (Landmark(3, "brick", "left"), Landmark(6, "tree", "right")),
    (PlannedAction(1, "look up"), PlannedAction(4, "pick up")), 200, "stone",
)  # fmt: skip


@pytest.fixture(scope="module")
def walks():
    return [make_plan(7, index, TINY) for index in range(150)]


def mirrored(plan: Plan) -> Plan:
    return replace(
        plan,
        turns=tuple(OTHER[t] for t in plan.turns),
        landmarks=tuple(replace(m, side=OTHER[m.side]) for m in plan.landmarks),
    )


def test_a_walk_is_a_pure_function_of_its_arguments(walks):
    assert walks == [make_plan(7, index, TINY) for index in range(150)]
    assert len({plan.map_hash() for plan in walks}) == 150
    assert make_plan(8, 0, TINY) != walks[0]


def test_cells_and_route_of_a_walk_are_right_by_hand():
    assert HAND_MADE.cells() == [(0, 0), (0, 1), (0, 2), (-1, 2), (-2, 2), (-3, 2), (-3, 3), (-3, 4)]
    assert [s.value for s in HAND_MADE.route().steps] == [
        "straight", "look up", "left", "straight", "brick", "pick up", "right", "straight", "tree",
    ]  # fmt: skip
    assert HAND_MADE.corners() == (2, 5)


def test_no_walk_touches_itself(walks):
    for plan in walks:
        cells = plan.cells()
        assert len(set(cells)) == len(cells) == 1 + sum(plan.lengths)
        for i, (x, y) in enumerate(cells):
            near = [j for j, (u, v) in enumerate(cells) if abs(x - u) + abs(y - v) == 1]
            assert near == [j for j in (i - 1, i + 1) if 0 <= j < len(cells)]


def test_a_walk_that_closes_a_loop_does_not_fit():
    assert fits(("left", "left"), (2, 2, 2))
    assert not fits(("left", "left"), (2, 1, 2))  # side by side
    assert not fits(("left",) * 3, (2, 2, 2, 2))
    assert fits(("left",) * 3, (2, 2, 4, 2)) and fits(("left",) * 3, (2, 4, 2, 2))


@pytest.mark.parametrize(("name", "ood"), [("tiny", False), ("tiny", True), ("default", False), ("default", True)])
def test_every_walk_of_a_preset_keeps_its_ranges_and_shows_every_event(name, ood):
    made = preset(name, ood)
    for index in range(60):
        plan = make_plan(1, index, made)
        for count, (low, high) in (
            (len(plan.turns), made.turns), (len(plan.landmarks), made.landmarks), (len(plan.actions), made.actions),
            (plan.light, made.light),
        ):  # fmt: skip
            assert low <= count <= high
        assert plan.dressing in made.textures
        assert asked(plan) <= covered(plan, made)


def test_landmarks_and_actions_have_cells_of_their_own_where_every_kind_fits(walks):
    for plan in walks:
        places = [m.cell for m in plan.landmarks] + [a.cell for a in plan.actions]
        assert len(set(places)) == len(places)
        assert not {0, *plan.corners()} & set(places)
        assert all(a.cell < sum(plan.lengths) for a in plan.actions)  # a door leads somewhere
        assert len({m.kind for m in plan.landmarks}) == len(plan.landmarks)
        assert len({a.kind for a in plan.actions}) == len(plan.actions)


def test_kinds_sides_and_turns_are_drawn_evenly():
    many = [make_plan(3, index, TINY) for index in range(600)]
    for kinds, drawn in (
        (LANDMARKS, [m.kind for p in many for m in p.landmarks]),
        (ACTIONS, [a.kind for p in many for a in p.actions]),
        (("left", "right"), [m.side for p in many for m in p.landmarks]),
        (("left", "right"), [t for p in many for t in p.turns]),
        (DRESSINGS, [p.dressing for p in many]),
    ):
        counts, expected = Counter(drawn), len(drawn) / len(kinds)
        assert set(counts) == set(kinds)
        assert all(abs(count - expected) < 4.5 * math.sqrt(expected) for count in counts.values())


def test_the_way_back_is_what_one_meets_walking_the_cells_backwards(walks):
    for plan in walks:
        cells, steps = plan.cells(), []
        marks, acts = {m.cell: m for m in plan.landmarks}, {a.cell: a for a in plan.actions}
        undone = {"pick up": "put down", "open a door": "close a door"}
        new_straight = True
        for k in range(len(cells) - 1, -1, -1):
            if new_straight:
                steps.append(Step("move", "straight"))
            if k in marks:
                (x, y), (u, v) = cells[k - 1], cells[k]
                right = (v - y, -(u - x))  # the right hand of the way there; what stood on it is on the left going back
                toward = right if marks[k].side == "right" else (-right[0], -right[1])
                back = (x - u, y - v)
                steps.append(Step("landmark", marks[k].kind, "right" if toward == (back[1], -back[0]) else "left"))
            if k in acts:
                steps.append(Step("action", undone.get(acts[k].kind, acts[k].kind)))
            new_straight = False
            if 0 < k < len(cells) - 1:
                came = (cells[k][0] - cells[k + 1][0], cells[k][1] - cells[k + 1][1])
                goes = (cells[k - 1][0] - cells[k][0], cells[k - 1][1] - cells[k][1])
                cross = came[0] * goes[1] - came[1] * goes[0]
                if cross:
                    steps.append(Step("move", "left" if cross > 0 else "right"))
                    new_straight = True
        assert reverse(plan.route()).steps == tuple(steps)


def test_the_split_is_a_hash_of_the_map(walks):
    names = ["train"] * 8 + ["dev", "test"]
    assert all(plan.split() == names[int(plan.map_hash(), 16) % 10] for plan in walks)
    assert {plan.split() for plan in walks} == {"train", "dev", "test"}
    for split in ("train", "dev", "test"):
        drawn = [make_plan(seed, index, TINY, split) for seed in (0, 1) for index in range(8)]
        assert {plan.split() for plan in drawn} == {split}
    with pytest.raises(BadUse, match="'valid'"):
        make_plan(0, 0, TINY, "valid")


def test_the_mirror_image_and_another_light_are_the_same_map(walks):
    for plan in walks[:40]:
        assert mirrored(plan) != plan
        assert mirrored(plan).map_hash() == plan.map_hash() == replace(plan, light=1, dressing="rust").map_hash()
        assert replace(plan, index=99, seed=99).group == plan.group
        others = [
            replace(plan, turns=plan.turns[:-1] + (OTHER[plan.turns[-1]],)),
            replace(plan, lengths=plan.lengths[:-1] + (plan.lengths[-1] + 1,)),
            replace(plan, landmarks=plan.landmarks[:-1]),
            replace(
                plan, landmarks=(replace(plan.landmarks[0], side=OTHER[plan.landmarks[0].side]), *plan.landmarks[1:])
            ),
            replace(plan, actions=plan.actions[1:]),
        ]
        assert plan.map_hash() not in {other.map_hash() for other in others}


def timing(plan: Plan) -> list[tuple]:
    """What may be known of the schedule without knowing left from right or one kind from another."""
    seen = []
    for tick in schedule(plan, TINY):
        event = "action" if tick.event in ACTIONS else "turn" if tick.event in OTHER else tick.event
        seen.append((event, tick.step, tick.cell, bool(tick.landmark)))
    return seen


def test_timing_tells_nothing_of_left_and_right_or_kinds(walks):
    for plan in walks[:25]:
        turned = mirrored(plan)
        other_kinds = replace(
            plan,
            landmarks=tuple(replace(m, kind=LANDMARKS[-1 - k]) for k, m in enumerate(plan.landmarks)),
            actions=tuple(replace(a, kind=ACTIONS[-1 - k]) for k, a in enumerate(plan.actions)),
        )
        first = plan.turns[:1]
        half = replace(plan, turns=(OTHER[first[0]], *plan.turns[1:]))
        assert timing(plan) == timing(turned) == timing(other_kinds) == timing(half)
        assert covered(plan, TINY) == covered(turned, TINY) == covered(other_kinds, TINY) == covered(half, TINY)


def test_every_turn_and_action_takes_the_same_ticks_and_every_cell_too(walks):
    for plan in walks[:40]:
        ticks = schedule(plan, TINY)
        counts = Counter((tick.event, tick.step) for tick in ticks)
        steps = plan.route().steps
        moving = sum(plan.lengths) * TINY.cell_ticks + (len(plan.turns) + len(plan.actions)) * TINY.event_ticks
        assert moving + TINY.start_ticks + TINY.end_ticks <= TINY.least_ticks
        for (event, step), count in counts.items():
            if event == "stand":
                assert step == -1 and count == TINY.least_ticks - moving
            elif event != "straight":
                assert steps[step].value == event and count == TINY.event_ticks
        straights = [
            count for (event, _), count in sorted(counts.items(), key=lambda c: c[0][1]) if event == "straight"
        ]
        assert straights == [length * TINY.cell_ticks for length in plan.lengths]


def test_every_tiny_walk_lasts_equally_long(walks):
    """How long a walk lasts would tell how many turns it has."""
    assert {len(schedule(plan, TINY)) for plan in walks} == {TINY.least_ticks} == {840}


def test_landmarks_are_in_view_for_long_and_in_one_piece(walks):
    for plan in walks[:60]:
        views = [(kind, len([*run])) for kind, run in groupby(schedule(plan, TINY), lambda t: t.landmark) if kind]
        by_kind = Counter()
        for kind, ticks in views:
            by_kind[kind] += ticks
        assert set(by_kind) == {m.kind for m in plan.landmarks}
        assert min(by_kind.values()) >= 45


def test_a_landmark_said_to_be_in_view_is_in_the_picture(walks):
    for plan in walks[:25]:
        cells, marks, entered = plan.cells(), {m.kind: m for m in plan.landmarks}, plan.headings()
        for tick in schedule(plan, TINY):
            if not tick.landmark:
                continue
            mark = marks[tick.landmark]
            (cx, cy), (dx, dy) = cells[mark.cell], HEADINGS[entered[mark.cell]]
            hand = 1 if mark.side == "right" else -1
            bearings = []
            for along in (-0.5, -0.25, 0.0, 0.25, 0.5):  # points of the wall beside that cell
                wall_x = (cx + 0.5 + dx * along + dy * 0.5 * hand) * CELL
                wall_y = (cy + 0.5 + dy * along - dx * 0.5 * hand) * CELL
                bearing = math.degrees(math.atan2(wall_y - tick.y, wall_x - tick.x)) - tick.angle_deg
                bearings.append(abs((bearing + 180) % 360 - 180))
            assert min(bearings) <= 46  # the camera sees 45 degrees to either side


def test_the_camera_moves_smoothly_inside_the_walk_and_comes_to_rest_at_its_end(walks):
    for plan in [HAND_MADE, *walks[:40]]:
        ticks, cells = schedule(plan, TINY), plan.cells()
        first, last = ticks[0], ticks[-1]
        assert (first.x, first.y, first.angle_deg, first.pitch_deg) == (CELL / 2, CELL / 2, 90, 0)
        assert (last.x, last.y) == tuple((c + 0.5) * CELL for c in cells[-1])
        assert last.angle_deg == (90 - 90 * plan.headings()[-1]) % 360
        for a, b in zip(ticks, ticks[1:], strict=False):
            assert math.hypot(b.x - a.x, b.y - a.y) < 20
            assert abs((b.angle_deg - a.angle_deg + 180) % 360 - 180) < 7 and abs(b.pitch_deg - a.pitch_deg) < 6
        for tick in ticks:
            assert (math.floor(tick.x / CELL), math.floor(tick.y / CELL)) in cells[
                max(tick.cell - 1, 0) : tick.cell + 2
            ]


@pytest.mark.parametrize(
    ("kind", "ahead", "up"),
    [
        ("look up", 0, 30),
        ("look down", 0, -30),
        ("step back", -96, 0),
        ("pause", 0, 0),
        ("pick up", 48, -35),
        ("open a door", 80, 0),
    ],
)
def test_an_action_moves_the_camera_and_brings_it_back(kind, ahead, up):
    plan = replace(HAND_MADE, actions=(PlannedAction(1, kind),))
    ticks = [tick for tick in schedule(plan, TINY) if tick.event == kind]
    assert len(ticks) == TINY.event_ticks
    offsets = [tick.y - 1.5 * CELL for tick in ticks]
    assert math.isclose(max(offsets, key=abs), ahead, abs_tol=1) and math.isclose(
        max((t.pitch_deg for t in ticks), key=abs), up, abs_tol=1
    )
    assert {(t.x, t.angle_deg) for t in ticks} == {(CELL / 2, 90)}
    for tick in (ticks[0], ticks[-1]):
        assert (tick.x, tick.y, tick.pitch_deg) == (CELL / 2, 1.5 * CELL, 0)


def test_a_turn_turns_to_its_own_side():
    ticks = schedule(HAND_MADE, TINY)
    left, right = ([t.angle_deg for t in ticks if t.event == side] for side in ("left", "right"))
    assert left[0] == 90 and left[-1] == 180 and left == sorted(left)
    assert right[0] == 180 and right[-1] == 90 and right == sorted(right, reverse=True)


def test_covered_counts_sampled_frames_of_the_schedule(walks):
    sparse = replace(TINY, n_frames=12)
    for plan in walks[:30]:
        ticks, steps = schedule(plan, sparse), plan.route().steps
        frames = ticks[:: sparse.ticks_per_frame]
        shown = Counter()
        for index in {*sample_indices(len(frames), sparse.fps, "uniform", n=12).tolist()}:
            tick = frames[index]
            named = [
                k for k, s in enumerate(steps) if k == tick.step or (s.kind == "landmark" and s.value == tick.landmark)
            ]
            shown.update(named)
        assert covered(plan, sparse) == {step for step, count in shown.items() if count >= 2}
    assert any(asked(plan) - covered(plan, sparse) for plan in walks[:30])


def test_a_walk_without_room_says_so(monkeypatch):
    monkeypatch.setattr(plans_module, "TRIES", 50)
    with pytest.raises(StkitError, match="6 landmarks and 6 actions"):
        make_plan(0, 0, replace(TINY, turns=(2, 2), length=(2, 2), landmarks=(6, 6), actions=(6, 6)))


def test_a_walk_too_long_for_its_frames_is_made_all_the_same():
    made = preset("tiny", turns=(9, 9))
    plan = make_plan(0, 0, made)
    assert len(plan.turns) == 9 and asked(plan) - covered(plan, made)
