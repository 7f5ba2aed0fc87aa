"""Where the camera is at every tick of a walk, and what it shows: pure functions of the plan.

Timing depends on lengths and places only, never on left, right or a kind: what is covered by the sampled frames, and so
what is asked, tells nothing about the answer::

    ticks = schedule(plan, preset)
    ticks[0].event, ticks[0].angle_deg    # ("stand", 90.0)
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from ..sampling import sample_indices
from .presets import CELL, HEADINGS, MIRROR, Preset

if TYPE_CHECKING:
    from .plans import Plan

ROTATING = 0.5  # the share of a turn's ticks in which the camera rotates; then it stands, looking down the new corridor
ACTING = 0.8  # the share of an action's ticks in which something happens; then it stands level
SIGHT = 2.5  # cells: from here on a landmark ahead counts as in view
BUMPS = {  # kind of action -> (units forward of the cell's centre, degrees up) at its height
    "look up": (0, 30), "look down": (0, -30), "step back": (-96, 0),
    "pause": (0, 0), "pick up": (48, -35), "open a door": (80, 0),
}  # fmt: skip


class Tick(NamedTuple):
    """Where the camera is at one tick of the engine (35 a second) and what happens there.

    ``event`` is "stand", a move ("straight", "left", "right") or the kind of an action; ``step`` the index of that
    event in ``plan.route().steps`` (-1 for "stand"); ``cell`` the index along the walk of the cell that the walker is
    in; ``landmark`` the kind in view ("" if none): the next one ahead in this corridor, at most 2.5 cells off, until
    the walker is beside it, with no turn and no (perhaps closed) door between. ``x``, ``y`` in units; ``angle_deg`` as
    in Doom (0 east, 90 north), in [0, 360); ``pitch_deg`` is positive upwards.

    What the world does besides moving the camera, for each kind: look up, look down, step back, pause: nothing. pick
    up: an item lies on the floor 78 units ahead of the cell's centre, and vanishes as the walker leans over it. open a
    door: a door closes the cell towards the next one; it opens while the walker stands 80 units ahead of the centre, is
    wholly open after ``ACTING`` of the ticks, and stays so.
    """

    event: str
    step: int
    cell: int
    landmark: str
    x: float
    y: float
    angle_deg: float
    pitch_deg: float


class _Span(NamedTuple):
    """A stretch of time in which one thing happens: from tick ``begin`` on, from one cell ``to`` another."""

    begin: int
    ticks: int
    event: str
    step: int
    cell: int
    to: int
    heading: int
    sight: int  # the last cell that can be seen from here: the next stop


def _spans(plan: "Plan", preset: Preset) -> list[_Span]:
    """The walk as stretches: stand, then runs from stop to stop, turns and actions, then stand."""
    steps, headings = plan.route().steps, plan.headings()
    corners, acts = plan.corners(), {a.cell for a in plan.actions}
    last = len(headings) - 1
    stops = sorted({*corners, *acts, last})
    events = iter([(k, s.value) for k, s in enumerate(steps) if s.kind == "action" or s.value in MIRROR])
    straights = iter([k for k, s in enumerate(steps) if s.value == "straight"])
    spans = [_Span(0, preset.start_ticks, "stand", -1, 0, 0, 0, stops[0])]

    def add(ticks: int, event: str, step: int, cell: int, to: int, sight: int):
        spans.append(_Span(spans[-1].begin + spans[-1].ticks, ticks, event, step, cell, to, headings[to], sight))

    cell, straight = 0, next(straights)
    for n, stop in enumerate(stops):
        add((stop - cell) * preset.cell_ticks, "straight", straight, cell, stop, stop)
        cell = stop
        if stop in acts or stop in corners:
            step, event = next(events)
            add(preset.event_ticks, event, step, cell, cell, stops[n + 1])
            straight = straight if stop in acts else next(straights)
    over = spans[-1].begin + spans[-1].ticks
    add(max(preset.end_ticks, preset.least_ticks - over), "stand", -1, last, last, last)
    return spans


def _run(share: float, ticks: int) -> float:
    """The share of the way after this share of the time: even speed with six ticks of speeding up and slowing down."""
    ramp = min(6 / ticks, 0.5)
    if share > 0.5:
        return 1 - _run(1 - share, ticks)
    return (share * share / (2 * ramp) if share < ramp else share - ramp / 2) / (1 - ramp)


def _bump(share: float) -> float:
    """From 0 up to 1, there for a while, and back to 0 by ``ACTING``; the same for every kind of action."""
    share /= ACTING
    edge = min(share, 1 - share) / 0.3
    return 0.0 if edge <= 0 else 0.5 - 0.5 * math.cos(math.pi * min(edge, 1.0))


def _tick(plan: "Plan", cells, span: _Span, tick: int) -> Tick:
    """The camera at one tick of a span."""
    share = (tick - span.begin) / span.ticks
    where, angle, pitch, forward, sees = float(span.cell), 90.0 - 90 * span.heading, 0.0, 0.0, True
    if span.event == "straight":
        where += (span.to - span.cell) * _run(share, span.ticks)
    elif span.event in MIRROR:
        way, done = (1 if span.event == "left" else -1), min(share / ROTATING, 1.0)
        angle += way * 90 * _run(done, int(span.ticks * ROTATING))
        sees = done >= 0.75  # from here on the next cell's walls are in the picture on both hands
    elif span.event != "stand":
        up, turn_up = BUMPS[span.event]
        forward, pitch, sees = up * _bump(share), turn_up * _bump(share), share >= ACTING
    ahead = [m for m in plan.landmarks if sees and where < m.cell <= min(where + SIGHT, span.sight)]
    landmark = min(ahead, key=lambda m: m.cell).kind if ahead else ""
    (x, y), (dx, dy) = cells[span.cell], HEADINGS[span.heading]
    on = where - span.cell + forward / CELL
    x, y = (x + 0.5 + dx * on) * CELL, (y + 0.5 + dy * on) * CELL
    return Tick(span.event, span.step, math.floor(where + 0.5), landmark, x, y, angle % 360, pitch)


def schedule(plan: "Plan", preset: Preset) -> tuple[Tick, ...]:
    """The camera's plan, tick by tick: tick t is where it is when frame t is drawn, so tick t+1 is where it goes next.

    Every turn and every action takes ``event_ticks``, every cell ``cell_ticks``, whatever the kind, left or right.
    Encoded is every ``ticks_per_frame``-th tick, from tick 0.
    """
    cells = plan.cells()
    return tuple(
        _tick(plan, cells, span, tick)
        for span in _spans(plan, preset)
        for tick in range(span.begin, span.begin + span.ticks)
    )


def covered(plan: "Plan", preset: Preset) -> set[int]:
    """Indices into ``plan.route().steps`` of what at least two of the sampled frames show."""
    spans, cells = _spans(plan, preset), plan.cells()
    total = spans[-1].begin + spans[-1].ticks
    frames = sample_indices(math.ceil(total / preset.ticks_per_frame), preset.fps, preset.sampling, n=preset.n_frames)
    marks = {s.value: k for k, s in enumerate(plan.route().steps) if s.kind == "landmark"}
    shown: dict[int, int] = {}
    for frame in sorted(set(frames.tolist())):
        tick = frame * preset.ticks_per_frame
        span = next(s for s in spans if s.begin <= tick < s.begin + s.ticks)
        seen = _tick(plan, cells, span, tick)
        for step in {seen.step, marks.get(seen.landmark, -1)} - {-1}:
            shown[step] = shown.get(step, 0) + 1
    return {step for step, count in shown.items() if count >= 2}
