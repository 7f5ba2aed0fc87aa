"""What a walk will be, before anything is rendered: its turns, its landmarks and its actions.

Everything that is asked is decided here, by a generator that treats left and right, and every kind, alike; so that a
text-only reader has nothing to go by. The rules that this rests on:

- turns are left or right with equal chance and the lengths of the straights don't look at them; a walk that touches
  itself is drawn anew as a whole, lengths and all, so that two turn sequences which both fit the same lengths are
  equally probable;
- places of landmarks and actions don't look at kinds or sides, and every kind fits every place;
- timing depends on lengths and places only, never on left, right or a kind.

    >>> plan = make_plan(0, 3, PRESETS["tiny"])
    >>> plan == make_plan(0, 3, PRESETS["tiny"]), len(plan.lengths) == len(plan.turns) + 1
    (True, True)
"""

import hashlib
import random
from dataclasses import asdict, dataclass

from ..runtime import BadUse, StkitError, generator
from .camera import Tick, covered, schedule
from .presets import CELL, HEADINGS, MIRROR, PRESETS, TICKS_PER_SECOND, Preset, preset
from .schema import Route, Step

__all__ = [
    "CELL", "HEADINGS", "MIRROR", "PRESETS", "TICKS_PER_SECOND", "Landmark", "Plan", "PlannedAction", "Preset", "Tick",
    "asked", "covered", "fits", "make_plan", "plan_row", "preset", "schedule",
]  # fmt: skip

TRIES_COVERED, TRIES, DRAWS = 400, 2000, 48


@dataclass(frozen=True)
class Landmark:
    """What stands on one side of the cell with this index along the walk."""

    cell: int
    kind: str
    side: str


@dataclass(frozen=True)
class PlannedAction:
    """What the walker does at the centre of the cell with this index along the walk."""

    cell: int
    kind: str


@dataclass(frozen=True)
class Plan:
    """One walk. ``lengths`` (in cells) has one straight before each turn and one after the last."""

    index: int
    seed: int
    turns: tuple[str, ...]
    lengths: tuple[int, ...]
    landmarks: tuple[Landmark, ...]
    actions: tuple[PlannedAction, ...]
    light: int
    dressing: str

    def cells(self) -> list[tuple[int, int]]:
        """The cells walked through, from (0, 0), heading north (+y) first. Consecutive ones are neighbours, no others
        are."""
        return [cell for cell, _ in _trace(self.turns, self.lengths)]

    def headings(self) -> list[int]:
        """For each cell the direction (index into HEADINGS) in which it is entered; for the first, north."""
        return [heading for _, heading in _trace(self.turns, self.lengths)]

    def corners(self) -> tuple[int, ...]:
        """Indices along the walk of the cells in which the turns are made."""
        return _corners(self.lengths)

    def route(self) -> Route:
        """The walk in words' order: for each straight "straight", then what is passed and done on it, then the turn."""
        seen = [(m.cell, Step("landmark", m.kind, m.side)) for m in self.landmarks]
        seen += [(a.cell, Step("action", a.kind)) for a in self.actions]
        steps, begin = [], 0
        for k, length in enumerate(self.lengths):
            steps.append(Step("move", "straight"))
            steps += [step for cell, step in sorted(seen, key=lambda s: s[0]) if begin < cell <= begin + length]
            steps += [Step("move", turn) for turn in self.turns[k : k + 1]]
            begin += length
        return Route(tuple(steps))

    def map_hash(self) -> str:
        """SHA-256 of the map's structure, without light and dressing; the same for a walk and its mirror image."""
        own = [[*self.turns], [(m.cell, m.kind, m.side) for m in self.landmarks]]
        mirrored = [[MIRROR[t] for t in self.turns], [(m.cell, m.kind, MIRROR[m.side]) for m in self.landmarks]]
        rest = [self.lengths, [(a.cell, a.kind) for a in self.actions]]
        return hashlib.sha256(repr([min(own, mirrored), rest]).encode()).hexdigest()

    def split(self) -> str:
        """The split that this map belongs to whatever the seed: hash mod 10, 0 to 7 "train", 8 "dev", 9 "test"."""
        return {8: "dev", 9: "test"}.get(int(self.map_hash(), 16) % 10, "train")

    @property
    def group(self) -> str:
        """The cluster of the statistics: all questions on one map."""
        return f"map-{self.map_hash()[:16]}"


def _corners(lengths) -> tuple[int, ...]:
    return tuple(sum(lengths[: k + 1]) for k in range(len(lengths) - 1))


def _trace(turns, lengths) -> list[tuple[tuple[int, int], int]]:
    """Each cell along the walk with the heading (index into HEADINGS) in which it is entered."""
    x = y = heading = 0
    walked = [((0, 0), 0)]
    for k, length in enumerate(lengths):
        if k:
            heading = (heading + (1 if turns[k - 1] == "right" else -1)) % 4
        for _ in range(length):
            x, y = x + HEADINGS[heading][0], y + HEADINGS[heading][1]
            walked.append(((x, y), heading))
    return walked


def fits(turns, lengths) -> bool:
    """Whether the walk neither crosses nor touches itself: no two cells are neighbours unless one follows the other."""
    seen = set()
    for (x, y), _ in _trace(turns, lengths):
        if (x, y) in seen or sum((x + dx, y + dy) in seen for dx, dy in HEADINGS) > 1:
            return False
        seen.add((x, y))
    return True


def make_plan(seed: int, index: int, preset: Preset, split: str | None = None) -> Plan:
    """The walk number ``index`` of a seed: a pure function of its arguments.

    Args:
        split: "train", "dev" or "test": walks are drawn until one belongs to it; None takes the first.

    Raises:
        BadUse: an unknown split.
        StkitError: no walk has room for so many turns, landmarks and actions.
    """
    if split not in (None, "train", "dev", "test"):
        raise BadUse(f"split {split!r} is unknown: use train, dev or test")
    attempt = 0
    while True:
        plan = _draw(generator(seed, "plan", index, attempt), seed, index, preset)
        if split in (None, plan.split()):
            return plan
        attempt += 1


def _draw(rng: random.Random, seed: int, index: int, preset: Preset) -> Plan:
    """Counts first; then turns, lengths and places all anew until they fit; then kinds and sides, which fit
    everywhere."""
    n_turns, n_marks, n_acts = (rng.randint(*pair) for pair in (preset.turns, preset.landmarks, preset.actions))
    least = max(preset.length[0] * (n_turns + 1), n_turns + n_marks + n_acts)
    roomy = preset.length[0] * (n_turns + 1) + 2 * max(0, n_turns - 2)
    spare, most = max(least + 4, roomy + 2), _cells_in_time(preset, n_turns + n_acts)
    for attempt in range(TRIES):
        cover = attempt < TRIES_COVERED and least <= most  # else take a longer walk: what its frames miss isn't asked
        high = min(most, spare) if cover else spare
        lengths = _draw_lengths(rng, n_turns, preset.length, rng.randint(max(least, min(roomy, high)), high))
        turns = tuple(rng.choice(("left", "right")) for _ in range(n_turns))
        places = _places(rng, lengths, n_marks, n_acts)
        if places is None or not fits(turns, lengths):
            continue
        kinds, acts = rng.sample(preset.landmark_kinds, n_marks), rng.sample(preset.action_kinds, n_acts)
        landmarks = tuple(Landmark(c, k, rng.choice(("left", "right"))) for c, k in zip(places[0], kinds, strict=True))
        actions = tuple(PlannedAction(c, k) for c, k in zip(places[1], acts, strict=True))
        light, dressing = rng.randint(*preset.light), rng.choice(preset.textures)
        plan = Plan(index, seed, turns, lengths, landmarks, actions, light, dressing)
        if not cover or asked(plan) <= covered(plan, preset):
            return plan
    raise StkitError(
        f"no walk of {n_turns} turns has room for {n_marks} landmarks and {n_acts} actions: ask for fewer of them"
    )


def _cells_in_time(preset: Preset, stops: int) -> int:
    """The most cells that a walk may have for each of its events to last as long as two steps of uniform sampling."""
    ticks = (preset.n_frames - 1) * preset.event_ticks / 2
    ticks = min(ticks, preset.least_ticks or ticks) - preset.start_ticks - preset.end_ticks
    return int((ticks - stops * preset.event_ticks) / preset.cell_ticks)


def _draw_lengths(rng: random.Random, n_turns: int, length: tuple[int, int], cells: int) -> tuple[int, ...]:
    """Lengths that add up to ``cells``: the roomiest of several draws. Turns are not looked at.

    Three turns to one side close a loop unless the walk spirals outwards (a straight longer by two than the one before
    last) or inwards (the one after is shorter by two than its opposite): room for all turn sequences is counted by
    those two.
    """

    def room(drawn: list[int]) -> int:
        spirals = sum(drawn[k + 2] >= drawn[k] + 2 or drawn[k + 3] <= drawn[k + 1] - 2 for k in range(n_turns - 2))
        return spirals if max(drawn) <= length[1] else -1

    middle = [4 if 2 <= k < max(3, n_turns - 1) else 1 for k in range(n_turns + 1)]
    draws = []
    for _ in range(DRAWS if n_turns > 2 else 1):
        drawn = [length[0]] * (n_turns + 1)
        for k in rng.choices(range(n_turns + 1), middle, k=max(0, cells - sum(drawn))):
            drawn[k] += 1
        draws.append(drawn)
    return tuple(max(draws, key=room))


def _places(rng: random.Random, lengths, n_marks: int, n_acts: int) -> tuple[list[int], list[int]] | None:
    """Cells for landmarks and for actions, rising; None when this draw has no room. Kinds and turns are not looked at.

    Never the start or a corner. Landmarks of one straight are three cells apart and none follows an action at once, so
    that each is the next in view for at least 2.5 cells' time. No action in the last cell: a door has to lead
    somewhere.
    """
    corners, last = set(_corners(lengths)), sum(lengths)
    free = [cell for cell in range(1, last + 1) if cell not in corners]
    rng.shuffle(free)
    marks: list[int] = []
    for cell in free:
        if len(marks) < n_marks and not any(_close(cell, mark, corners) for mark in marks):
            marks.append(cell)
    acts = [cell for cell in free if cell not in marks and cell + 1 not in marks and cell != last][:n_acts]
    return (sorted(marks), sorted(acts)) if len(marks) == n_marks and len(acts) == n_acts else None


def _close(a: int, b: int, corners: set[int]) -> bool:
    return abs(a - b) < 3 and not any(min(a, b) < corner < max(a, b) for corner in corners)


def asked(plan: Plan) -> set[int]:
    """Indices into ``plan.route().steps`` of the events: all but the straights, which lie between any two turns."""
    return {k for k, step in enumerate(plan.route().steps) if step.value != "straight"}


def plan_row(plan: Plan) -> dict:
    """The plan as JSON-ready values, for side files."""
    return asdict(plan)
