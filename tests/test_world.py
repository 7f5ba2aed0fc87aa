"""The engine's side: maps it can read, landmarks and actions that show, a walker that is where the plan says."""

import io
import itertools
import math
import os
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import vizdoom

from stkit.bench.camera import ACTING, schedule
from stkit.bench.film import decoded_hash, encode
from stkit.bench.plans import Landmark, Plan, PlannedAction
from stkit.bench.presets import DRESSINGS, OOD_DRESSINGS, preset
from stkit.bench.routes import ACTIONS, LANDMARKS
from stkit.bench.wad import Scene, Thing, map_name, textmap, wad
from stkit.bench.world import DRESSINGS as TEXTURES
from stkit.bench.world import OBJECTS, WALLS, engine, headings, scene, screen_resolution, steer, walk
from stkit.runtime import BadUse, StkitError

SMALL = replace(preset("tiny"), width=84, height=56)
PILLAR = 30  # a solid thing of the engine's


def plan_of(turns=(), lengths=(4,), landmarks=(), actions=(), light=200, dressing="stone") -> Plan:
    return Plan(0, 0, turns, lengths, landmarks, actions, light, dressing)


def with_landmark(kind, side, dressing="stone") -> Plan:
    return plan_of(landmarks=(Landmark(3, kind, side),), dressing=dressing)


def with_action(kind) -> Plan:
    return plan_of(("left",), (3, 2), (), (PlannedAction(2, kind),), dressing="plaster")


PLANS = {"plain": plan_of(), "dark": plan_of(light=100), "turns": plan_of(("left", "right"), (2, 2, 2))}
PLANS |= {(kind, side): with_landmark(kind, side) for kind in LANDMARKS for side in ("left", "right")}
PLANS |= {kind: with_action(kind) for kind in ACTIONS}
PLANS |= {dressing: plan_of(dressing=dressing) for dressing in DRESSINGS + OOD_DRESSINGS}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A working directory of the engine's own: it leaves files there."""
    folder, before = tmp_path_factory.mktemp("engine"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def walks(elsewhere):
    """All of PLANS walked in one engine, at 84x56."""
    with engine(wad([textmap(scene(plan)) for plan in PLANS.values()]), SMALL, elsewhere, seed=0) as game:
        return {name: walk(game, number, plan, SMALL) for number, (name, plan) in enumerate(PLANS.items())}


def frame_ticks(name) -> list:
    return list(schedule(PLANS[name], SMALL)[:: SMALL.ticks_per_frame])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def last_in_view(walks, name) -> np.ndarray:
    """The last but one frame in which the landmark counts as in view."""
    seen = [k for k, tick in enumerate(frame_ticks(name)) if tick.landmark]
    return walks[name].frames[seen[-2]]


def test_no_walk_of_the_gallery_is_blocked_or_off_its_plan(walks):
    assert len(walks) == len(PLANS)
    for name, walked in walks.items():
        assert not walked.blocked, name
        assert walked.off_units < 1 and walked.off_degrees < 0.1, name
        assert len(walked.poses) == len(schedule(PLANS[name], SMALL)) and len(walked.frames) == len(frame_ticks(name))


def test_all_landmarks_look_different_at_84x56(walks):
    views = {kind: last_in_view(walks, (kind, "left"))[:, :42] for kind in LANDMARKS}
    for a, b in itertools.combinations(LANDMARKS, 2):
        assert difference(views[a], views[b]) > 4, (a, b)


def test_a_landmark_shows_on_its_own_side_only(walks):
    for kind, (side, near, far) in itertools.product(
        LANDMARKS, (("left", slice(0, 40), slice(44, 84)), ("right", slice(44, 84), slice(0, 40)))
    ):
        seen = [k for k, tick in enumerate(frame_ticks((kind, side))) if tick.landmark]
        plain, shown = walks["plain"].frames[seen[-2]], last_in_view(walks, (kind, side))
        assert difference(shown[:, near], plain[:, near]) > 4, (kind, side)
        assert difference(shown[:, far], plain[:, far]) < 0.01, (kind, side)


def test_a_landmark_can_be_seen_from_where_it_counts_as_in_view(walks):
    for kind in LANDMARKS:
        seen = [k for k, tick in enumerate(frame_ticks((kind, "left"))) if tick.landmark]
        first = np.abs(walks[kind, "left"].frames[seen[0]].astype(int) - walks["plain"].frames[seen[0]]).max(axis=2)
        assert (first > 24).sum() >= 3, kind  # pixels of a picture of 84x56, 2.5 cells away


def test_every_turn_and_action_measures_what_its_name_says(walks):
    poses, ticks = np.array(walks["turns"].poses), schedule(PLANS["turns"], SMALL)
    for turn, degrees in (("left", 90), ("right", -90)):
        at = [k for k, tick in enumerate(ticks) if tick.event == turn]
        change = np.diff(np.unwrap(np.radians(poses[at[0] : at[-1] + 2, 2])))
        assert math.degrees(change.sum()) == pytest.approx(degrees, abs=0.1)
        assert np.ptp(poses[at, :2], axis=0).max() < 1
    extremes = {"look up": (30, 0), "look down": (-30, 0), "step back": (0, -96), "pause": (0, 0)}
    for kind, (pitch, ahead) in (extremes | {"pick up": (-35, 48), "open a door": (0, 80)}).items():
        poses = np.array(walks[kind].poses)
        at = [k for k, tick in enumerate(schedule(PLANS[kind], SMALL)) if tick.event == kind]
        begin = poses[at[0]]
        most = poses[at][np.abs(poses[at] - begin).sum(axis=1).argmax()]
        assert most[3] == pytest.approx(pitch, abs=0.1) and most[1] - begin[1] == pytest.approx(ahead, abs=1), kind
        assert poses[at[-1]] == pytest.approx(begin, abs=1), kind


def test_actions_look_different_from_one_another(walks):
    ticks = frame_ticks("pause")
    during = [k for k, tick in enumerate(ticks) if tick.event == "pause"]
    assert all([t.event == kind for t in frame_ticks(kind)] == [t.event == "pause" for t in ticks] for kind in ACTIONS)
    for a, b in itertools.combinations(ACTIONS, 2):
        apart = [difference(walks[a].frames[k], walks[b].frames[k]) for k in during]
        assert sorted(apart)[-2] > 4, (a, b)  # in two frames at least
    assert difference(walks["pause"].frames[during[0]], walks["pause"].frames[during[-1]]) < 1


@pytest.mark.parametrize("kind", ["open a door", "pick up"])
def test_what_an_action_changes_is_there_before_and_gone_after(walks, kind):
    ticks, pause = frame_ticks(kind), walks["pause"]
    at = [k for k, tick in enumerate(ticks) if tick.event == kind]
    assert difference(walks[kind].frames[at[0]], pause.frames[at[0]]) > 4
    after = [k for k in range(at[0] + round(len(at) * ACTING) + 1, len(ticks)) if ticks[k].event in (kind, "left")]
    assert after and all(difference(walks[kind].frames[k], pause.frames[k]) < 2.5 for k in after)


def test_a_door_is_shut_until_it_is_opened(elsewhere):
    made = scene(with_action("open a door"))
    assert made.doors == {2: 0}
    with engine(wad([textmap(made)]), SMALL, elsewhere, seed=0) as game:
        through = walk(game, 0, plan_of(("left",), (3, 2)), SMALL)  # a walker that does not know of the door
    assert through.blocked
    assert max(pose[1] for pose in through.poses) < 3 * 256  # it got no further than the door's cell


def test_dressings_differ_and_light_shows(walks):
    views = {name: walks[name].frames[8] for name in DRESSINGS + OOD_DRESSINGS}
    for a, b in itertools.combinations(views, 2):
        assert difference(views[a], views[b]) > 8, (a, b)
    assert walks["dark"].frames[0].mean() < 0.7 * walks["plain"].frames[0].mean()


def test_a_blocked_walk_is_noticed(elsewhere):
    free, plan = scene(PLANS["plain"]), PLANS["plain"]
    shut = replace(free, things=(Thing(PILLAR, 128, 3 * 256),))
    aside = replace(free, things=(Thing(PILLAR, 128 + 84, 3 * 256),))
    with engine(wad([textmap(shut), textmap(aside)]), SMALL, elsewhere, seed=0) as game:
        assert walk(game, 0, plan, SMALL).blocked
        assert not walk(game, 1, plan, SMALL).blocked


def test_a_fresh_engine_shows_the_same_frames_again(walks, elsewhere):
    first = list(PLANS)[:3]
    with engine(wad([textmap(scene(PLANS[name])) for name in first]), SMALL, elsewhere, seed=0) as game:
        again = [walk(game, number, PLANS[name], SMALL) for number, name in enumerate(first)]
    for name, walked in zip(first, again, strict=True):
        assert walked.poses == walks[name].poses
        assert all(np.array_equal(a, b) for a, b in zip(walked.frames, walks[name].frames, strict=True))


def texture_names() -> set[str]:
    """All wall textures and flats of the assets that the engine ships."""
    data = (Path(vizdoom.__file__).parent / "freedoom2.wad").read_bytes()
    count, begin = struct.unpack("<ii", data[4:12])
    names = set()
    for k in range(count):
        at, _, name = struct.unpack("<ii8s", data[begin + 16 * k : begin + 16 * k + 16])
        names.add(name.rstrip(b"\0").decode())
        if name.startswith(b"TEXTURE"):
            offsets = struct.unpack_from(f"<{struct.unpack_from('<i', data, at)[0]}i", data, at + 4)
            names |= {data[at + o : at + o + 8].rstrip(b"\0").decode() for o in offsets}
    return names


def test_every_texture_exists_and_no_landmark_is_worn_by_a_dressing():
    known, dressed = texture_names(), {texture for triple in TEXTURES.values() for texture in triple}
    assert {*WALLS.values(), *dressed, "BIGDOOR1", "DOORTRAK"} <= known
    assert not dressed & set(WALLS.values())
    assert set(WALLS) | set(OBJECTS) == set(LANDMARKS) and set(TEXTURES) == set(DRESSINGS + OOD_DRESSINGS)
    assert not {TEXTURES[name][0] for name in DRESSINGS} & {TEXTURES[name][0] for name in OOD_DRESSINGS}


def test_a_map_of_two_cells_has_the_walls_that_one_counts_by_hand():
    plain = Scene(((0, 0), (0, 1)), "STONE2", "FLOOR0_1", "CEIL1_1", 200)
    text = textmap(plain).decode()
    assert text.count("vertex{") == 6 and text.count("linedef{") == text.count("sidedef{") == 6
    assert text.count("sector{") == text.count("thing{") == 1 and "x=128.0;y=128.0;angle=90" in text
    shut = textmap(replace(plain, walls={(1, 3): "WOOD1"}, doors={0: 0})).decode()
    # the door cuts two walls in two and has two faces with two sides each
    assert shut.count("linedef{") == 6 + 2 + 2 and shut.count("sidedef{") == 6 + 2 + 4 and shut.count("sector{") == 2
    assert shut.count("WOOD1") == 1 and shut.count("twosided=true") == 2 and shut.count("special=11") == 1


def test_the_wall_of_a_landmark_is_on_its_hand_in_every_heading():
    for turn, side in itertools.product(("left", "right"), ("left", "right")):
        plan = plan_of((turn,), (2, 3), (Landmark(4, "wood", side),))
        assert (
            plan.cells()[4] == ({"left": -2, "right": 2}[turn], 2)
            and headings(plan)[4] == {"left": 3, "right": 1}[turn]
        )
        # walking west (3) north is on the right hand, walking east (1) it is on the left
        north = (turn, side) in (("left", "right"), ("right", "left"))
        assert scene(plan).walls == {(4, 0 if north else 2): WALLS["wood"]}


def test_a_wad_lists_its_lumps():
    data = wad([b"one", b"two"])
    count, begin = struct.unpack("<ii", data[4:12])
    lumps = [struct.unpack("<ii8s", data[begin + 16 * k : begin + 16 * k + 16]) for k in range(count)]
    names = [name.rstrip(b"\0").decode() for _, _, name in lumps]
    assert data[:4] == b"PWAD"
    assert names == ["DECORATE", "KEYCONF", "MAP01", "TEXTMAP", "ENDMAP", "MAP02", "TEXTMAP", "ENDMAP"]
    assert [data[at : at + size] for at, size, name in lumps if name.startswith(b"TEXTMAP")] == [b"one", b"two"]
    assert map_name(99) == "MAP100"


def test_the_walker_is_pushed_by_what_is_still_lacking():
    goal = schedule(PLANS["plain"], SMALL)[0]._replace(x=100.0, y=202.0, angle_deg=90.0, pitch_deg=10.0)
    # facing north: 2 units ahead of which 1 is under way already; 1 unit to the right; 5 degrees to turn left
    assert steer((99.0, 200.0, 85.0, -4.0, 0.0, 1.0), goal, use=True) == pytest.approx([8.0, 8.0, -5.0, 6.0, 1.0])
    assert steer((100.0, 0.0, 90.0, 0.0, 0.0, 0.0), goal, use=False)[0] == 50  # Doom's limit


def test_the_engine_draws_the_smallest_picture_that_covers_the_size():
    named = {
        (160, 120): "160X120",
        (320, 240): "320X240",
        (84, 56): "160X120",
        (256, 144): "256X144",
        (640, 400): "640X400",
    }
    for size, name in named.items():
        assert screen_resolution(*size).name == f"RES_{name}"
    for size in ((161, 120), (160, 121), (30, 30), (1922, 1080), (1920, 1920)):
        with pytest.raises(BadUse, match=f"resolution {size[0]}x{size[1]}: .*"):
            screen_resolution(*size)


def test_a_film_is_h264_at_its_rate_without_sound_and_the_same_each_time():
    frames = [np.full((56, 84, 3), (k * 20, 100, 200 - k * 20), np.uint8) for k in range(9)]
    data = encode(frames, Fraction(35, 5))
    assert encode(iter(frames), Fraction(35, 5)) == data
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 7)
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 7)
    assert [d.shape for d in decoded] == [(56, 84, 3)] * 9
    assert max(difference(a, b) for a, b in zip(frames, decoded, strict=True)) < 4
    assert decoded_hash(data) == (decoded_hash(encode(frames, Fraction(35, 5)))[0], 9)
    assert decoded_hash(data)[0] != decoded_hash(encode(frames[::-1], Fraction(35, 5)))[0]


def test_a_film_is_the_same_bytes_whatever_lies_in_memory():
    """x264's macroblock trees read memory that nobody wrote: two builds of one benchmark had other frames."""
    draw = np.random.default_rng(0)
    rough = draw.integers(0, 255, (14, 21, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    frames, seen = [np.roll(rough, k, 1) for k in range(60)], set()
    for _ in range(12):
        left = [draw.integers(0, 255, draw.integers(1_000, 200_000)).astype(np.uint8) for _ in range(20)]
        del left  # whatever is allocated next finds these numbers
        seen.add(encode(frames, Fraction(7)))
    assert len(seen) == 1


def test_what_cannot_be_a_film_is_refused():
    with pytest.raises(BadUse, match="resolution 85x56: width 85 must be even"):
        encode([np.zeros((56, 85, 3), np.uint8)], Fraction(7))
    with pytest.raises(StkitError, match="at least one frame"):
        encode([], Fraction(7))
