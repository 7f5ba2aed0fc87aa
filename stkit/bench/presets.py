"""What a build draws walks from: sizes, ranges, kinds, ticks; and the knobs that turn them.

>>> preset("tiny", turns=(2, 3)).turns
(2, 3)
"""

from dataclasses import dataclass, replace

from ..runtime import BadUse
from .routes import ACTIONS, LANDMARKS

TICKS_PER_SECOND = 35
CELL = 256  # units: the side and pitch of the square cells; cell (x, y) has its centre at (x + 1/2, y + 1/2) * CELL
HEADINGS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # north, east, south, west
MIRROR = {"left": "right", "right": "left"}
DRESSINGS = ("stone", "plaster", "panel", "concrete")
OOD_DRESSINGS = ("tile", "rust", "rock")
LEAST_LIGHT = 115  # at 100 two landmarks differ by 2 grey levels of 255 and at 60 by none; at 115 by 3.6, at 160 by 6.7


@dataclass(frozen=True)
class Preset:
    """What a build draws from. Pairs are inclusive ranges; ``length`` is in cells a straight, light is Doom's.

    With the presets' ticks an event lasts at least ``event_ticks``: turns and actions by definition, landmarks because
    of where they may stand (see ``plans._places``). A walk that is over before ``least_ticks`` stands still until then, so
    that walks last equally long: how long they last tells nothing, and a temporal patch is as many seconds in all.
    """

    name: str
    width: int = 160
    height: int = 120
    turns: tuple[int, int] = (2, 5)
    length: tuple[int, int] = (2, 6)
    landmarks: tuple[int, int] = (3, 5)
    actions: tuple[int, int] = (2, 3)
    light: tuple[int, int] = (160, 240)
    textures: tuple[str, ...] = DRESSINGS
    landmark_kinds: tuple[str, ...] = LANDMARKS
    action_kinds: tuple[str, ...] = ACTIONS
    sampling: str = "uniform"
    n_frames: int = 32
    ticks_per_frame: int = 5
    cell_ticks: int = 20
    event_ticks: int = 55
    start_ticks: int = 30
    end_ticks: int = 10
    least_ticks: int = 0
    ood: bool = False

    @property
    def fps(self) -> float:
        """Frames a second of the encoded video."""
        return TICKS_PER_SECOND / self.ticks_per_frame


PRESETS = {
    "tiny": Preset("tiny", least_ticks=840),
    "default": Preset("default", 320, 240, turns=(3, 7), landmarks=(3, 6), actions=(2, 4), n_frames=48),
}


def preset(name: str = "tiny", ood: bool = False, **knobs) -> Preset:
    """A preset by name with some knobs turned.

    Args:
        name: "tiny" (160x120, 32 frames) or "default" (320x240, longer walks, 48 frames).
        ood: out of distribution: textures that no other build uses, longer routes, darker.
        knobs: ``turns``, ``landmarks``, ``actions``, ``light`` (pairs, inclusive), ``resolution`` (width, height),
            ``textures`` (names of dressings; the unseen ones with ``ood`` only). They win over ``ood``.

    Raises:
        BadUse: an unknown name or knob, or a value out of range.
    """
    if name not in PRESETS:
        raise BadUse(f"preset {name!r} is unknown: use {', '.join(PRESETS)}")
    made = PRESETS[name]
    if ood:
        longer = {"tiny": {"turns": (5, 6), "actions": (2, 2)}, "default": {"turns": (6, 8), "actions": (2, 3)}}[name]
        made = replace(made, ood=True, textures=OOD_DRESSINGS, light=(120, 155), **longer)
    bounds = {
        "turns": (0, 12),
        "landmarks": (0, len(made.landmark_kinds)),
        "actions": (0, len(made.action_kinds)),
        "light": (LEAST_LIGHT, 255),
    }
    for knob, value in knobs.items():
        if knob in bounds:
            made = replace(made, **{knob: _pair(knob, value, *bounds[knob])})
        elif knob == "resolution":
            made = replace(made, **dict(zip(("width", "height"), _resolution(value), strict=True)))
        elif knob == "textures":
            made = replace(made, textures=_textures(value, ood))
        else:
            raise BadUse(f"knob {knob!r} is unknown: use {', '.join(bounds)}, resolution, textures")
    room = 2 * (made.turns[0] + 1)
    for knob in ("landmarks", "actions"):
        if getattr(made, knob)[1] > room:
            least = made.turns[0]
            raise BadUse(
                f"{knob}={getattr(made, knob)}: {least} turns leave room for {room}, ask for fewer or more turns"
            )
    return made


def _pair(knob: str, value, least: int, most: int) -> tuple[int, int]:
    try:
        low, high = value
    except (TypeError, ValueError):
        raise BadUse(f"{knob}={value!r}: give two whole numbers, e.g. {knob}=({least}, {least + 1})") from None
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in (low, high)) or not least <= low <= high <= most:
        why = " (in less light nothing can be seen)" * (knob == "light")
        raise BadUse(f"{knob}=({low!r}, {high!r}): give two whole numbers, rising, from {least} to {most}{why}")
    return low, high


def _resolution(value) -> tuple[int, int]:
    try:
        width, height = value
        good = all(isinstance(v, int) and v % 2 == 0 and 32 <= v <= 4096 for v in (width, height))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise BadUse(f"resolution={value!r}: give (width, height) in pixels, even, from 32 to 4096")
    return width, height


def _textures(value, ood: bool) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    known = DRESSINGS + OOD_DRESSINGS * ood
    if unseen := [n for n in names if n in OOD_DRESSINGS and not ood]:
        raise BadUse(f"textures={value!r}: {unseen[0]!r} is for out-of-distribution builds: add --ood (ood=True)")
    if bad := [n for n in names if n not in known] or not names:
        raise BadUse(f"textures={value!r}: {bad[0] if names else 'none'!r} is unknown, use some of {', '.join(known)}")
    return names
