"""Plans become first-person video frames: the map of a plan, an engine, a walker that follows the camera's plan.

The walker is steered in a closed loop on the measured pose, and the largest distance from the plan is kept: a walk that
something stopped shows, and is not used::

    with engine(wad([textmap(scene(plan))]), preset, folder, seed=0) as game:
        walked = walk(game, 0, plan, preset)
    walked.frames[0].shape, walked.blocked
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vizdoom
from PIL import Image

from ..runs import write_text
from ..runtime import BadUse
from .camera import Tick, schedule
from .film import check_size
from .plans import Plan
from .presets import HEADINGS, Preset
from .wad import DOOR_AT, Scene, Thing, map_name, point

WALLS = {  # the texture of each kind of landmark that is a wall
    "brick": "STWALL", "wood": "ZZWOLF5", "marble": "MARBLE1", "metal": "SHAWN2",
    "computer": "PLANET1", "fire": "FIREWALA", "ash": "ASHWALL2", "skin": "SKIN2",
}  # fmt: skip
OBJECTS = {"torch": (46, 1.7), "column": (30, 2.0), "tree": (47, 2.6), "barrel": (2035, 3.0)}  # (thing, scale)
OBJECT_ASIDE = 84  # units from the cell's centre: near the wall, out of the walker's way
ITEM = (2019, 1.6)
ITEM_AHEAD = 78  # units ahead of the cell's centre: the walker touches it (36 units between centres) when it leans over
DRESSINGS = {  # (wall, floor, ceiling)
    "stone": ("STONE2", "FLOOR0_1", "CEIL1_1"),
    "plaster": ("TANROCK2", "FLOOR4_8", "CEIL3_5"),
    "panel": ("PANEL2", "FLOOR5_2", "CEIL5_1"),
    "concrete": ("GRAY1", "FLAT5_4", "FLOOR7_1"),
    "tile": ("CEMENT7", "FLAT19", "CEIL3_3"),
    "rust": ("AQRUST05", "FLAT1", "CEIL5_2"),
    "rock": ("SP_ROCK1", "RROCK04", "RROCK11"),
}
THRUST = 0.125  # units a tick for one unit of the move buttons (Doom's 1/32, times the walker's 4)
MOST_THRUST = 50
ARM = 40  # units: nearer to a door than this the walker opens it (the engine's own limit is 64)
WARM_UP = 16  # ticks before the first: the engine holds a fresh player still for 8
# A free walker stays within 0.2 units and 0.01 degrees; one that something solid stops is off by a cell's length soon.
ASTRAY_UNITS, ASTRAY_DEGREES = 8.0, 2.0


@dataclass(frozen=True)
class Walk:
    """What the engine showed and measured: one pose (x, y, angle_deg, pitch_deg up) a tick, a frame every few ticks."""

    frames: list[np.ndarray]
    poses: list[tuple[float, float, float, float]]
    off_units: float
    off_degrees: float

    @property
    def blocked(self) -> bool:
        """Whether the walker strayed from the camera's plan further than a free one ever does."""
        return self.off_units > ASTRAY_UNITS or self.off_degrees > ASTRAY_DEGREES


def headings(plan: Plan) -> list[int]:
    """For each cell along the walk the direction (index into HEADINGS) in which it is left; for the last, entered."""
    cells = plan.cells()
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(cells)]
    ways = [HEADINGS.index(step) for step in steps]
    return [*ways, ways[-1]]


def scene(plan: Plan) -> Scene:
    """The map of a plan: landmarks on their side, an item to pick up, a door to open."""
    cells, ways = plan.cells(), headings(plan)
    wall, floor, ceiling = DRESSINGS[plan.dressing]
    walls, things, doors = {}, [], {}
    for mark in plan.landmarks:
        hand = 1 if mark.side == "right" else -1
        if mark.kind in WALLS:
            walls[mark.cell, (ways[mark.cell] + hand) % 4] = WALLS[mark.kind]
        else:
            number, scale = OBJECTS[mark.kind]
            things.append(Thing(number, *point(cells[mark.cell], ways[mark.cell], 0, hand * OBJECT_ASIDE), scale=scale))
    for action in plan.actions:
        if action.kind == "open a door":
            doors[action.cell] = ways[action.cell]
        elif action.kind == "pick up":
            things.append(Thing(ITEM[0], *point(cells[action.cell], ways[action.cell], ITEM_AHEAD, 0), scale=ITEM[1]))
    return Scene(tuple(cells), wall, floor, ceiling, plan.light, walls, doors, tuple(things))


def screen_resolution(width: int, height: int) -> vizdoom.ScreenResolution:
    """The engine's smallest picture that covers this size; the frames are brought to the size by area.

    Raises:
        BadUse: an odd size, or one that the engine has no picture for.
    """
    check_size(width, height)
    sizes = {}
    for name, value in vizdoom.ScreenResolution.__members__.items():
        w, h = map(int, name.removeprefix("RES_").split("X"))
        if w >= width and h >= height:
            sizes[abs(math.log(w * height / h / width)) > 0.05, w * h] = value
    if not sizes:
        raise BadUse(f"resolution {width}x{height}: the engine's largest picture is 1920x1080, choose a smaller one")
    return sizes[min(sizes)]


@contextlib.contextmanager
def engine(data: bytes, preset: Preset, folder: Path, seed: int) -> Iterator[vizdoom.DoomGame]:
    """A fresh engine, silent and without a window, on a WAD. The WAD and the engine's own files go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "walks.wad", data)
    game, button, variable = vizdoom.DoomGame(), vizdoom.Button, vizdoom.GameVariable
    game.set_doom_scenario_path(str(folder / "walks.wad"))
    game.set_doom_config_path(str(folder / "engine.ini"))
    game.set_doom_map(map_name(0))
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(screen_resolution(preset.width, preset.height))
    for extra in ("hud", "weapon", "crosshair", "messages", "screen_flashes", "decals", "particles"):
        getattr(game, f"set_render_{extra}")(False)
    game.set_available_buttons([
        button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA, button.TURN_LEFT_RIGHT_DELTA,
        button.LOOK_UP_DOWN_DELTA, button.USE,
    ])  # fmt: skip
    game.set_available_game_variables([
        variable.POSITION_X, variable.POSITION_Y, variable.ANGLE, variable.PITCH,
        variable.VELOCITY_X, variable.VELOCITY_Y,
    ])  # fmt: skip
    game.set_episode_timeout(0)
    game.add_game_args("+freelook 1")
    game.set_seed(seed % 2**31)
    game.init()
    try:
        yield game
    finally:
        game.close()


def _difference(a: float, b: float) -> float:
    """Degrees from b to a, in [-180, 180)."""
    return (a - b + 180) % 360 - 180


def steer(state, goal: Tick, use: bool) -> list[float]:
    """The buttons that bring the walker from its measured state to where the plan has it one tick later.

    Args:
        state: x, y, angle, pitch (down), velocity x and y, as the engine gives them.

    Returns:
        forward, right, turn right (degrees), look up (degrees), use. The engine adds thrust to the velocity, moves by
        the sum and then lets friction take its tenth: so the thrust is what the way still lacks beyond the velocity.
    """
    x, y, angle, pitch, speed_x, speed_y = map(float, state)
    lack_x, lack_y = goal.x - x - speed_x, goal.y - y - speed_y
    cos, sin = math.cos(math.radians(goal.angle_deg)), math.sin(math.radians(goal.angle_deg))
    forward, right = (lack_x * cos + lack_y * sin) / THRUST, (lack_x * sin - lack_y * cos) / THRUST
    return [
        max(-MOST_THRUST, min(MOST_THRUST, forward)),
        max(-MOST_THRUST, min(MOST_THRUST, right)),
        -_difference(goal.angle_deg, angle),
        goal.pitch_deg + pitch,
        float(use),
    ]


def walk(game: vizdoom.DoomGame, number: int, plan: Plan, preset: Preset) -> Walk:
    """Walk map ``number`` of the engine's WAD after the plan, measuring the pose at every tick."""
    ticks, size = schedule(plan, preset), (preset.width, preset.height)
    game.set_doom_map(map_name(number))
    game.new_episode()
    game.make_action([0.0] * 5, WARM_UP)
    frames, poses, off_units, off_degrees = [], [], 0.0, 0.0
    for t, here in enumerate(ticks):
        state = game.get_state()
        x, y, angle, pitch = (float(v) for v in state.game_variables[:4])
        poses.append((x, y, angle % 360, -pitch))
        off_units = max(off_units, math.hypot(x - here.x, y - here.y))
        off_degrees = max(off_degrees, abs(_difference(angle, here.angle_deg)), abs(pitch + here.pitch_deg))
        if t % preset.ticks_per_frame == 0:
            frames.append(_fit(state.screen_buffer, size))
        goal = ticks[min(t + 1, len(ticks) - 1)]
        game.make_action(steer(state.game_variables, goal, _reaches_door(plan, here)))
    return Walk(frames, poses, off_units, off_degrees)


def _reaches_door(plan: Plan, here: Tick) -> bool:
    """Whether the walker stands at a door that it opens."""
    if here.event != "open a door":
        return False
    x, y = point(plan.cells()[here.cell], headings(plan)[here.cell], DOOR_AT, 0)
    return math.hypot(x - here.x, y - here.y) < ARM


def _fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The engine's picture (H, W, 3) at the preset's size."""
    if picture.shape[1::-1] == size:
        return picture.copy()
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
