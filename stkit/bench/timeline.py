"""The time line of a clip: for every two sampled frames, which a model sees as one patch of time, what is done and what
is in view.

It is what a model can be taught to write down before it answers: each word is tied to its frames, and the route
follows from it::

    moments = timeline(load_truth(bench, "walk-0-00000"), range(0, 119, 4))
    render(moments)    # "Timeline: stand marble right, straight marble right, straight, open, left, left ash left."
    parse(render(moments)) == moments

An item is a motion, then the landmark in view and its side, if there is one. Where the two frames differ, the first is
told if the second was told just before. So each item follows from its frames and the item before. Events in two frames or
more, with a straight in two frames or more between, are all told, and equal ones apart; so are two with a straight of a
single frame between (not always three: there may be too few items for it).
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..runs import read_json
from ..runtime import BadUse, StkitError
from .plans import MIRROR
from .routes import ACTIONS, LANDMARKS
from .schema import Benchmark, video_problem

HEADING = "Timeline:"
NO_MARK = "none"
SHORT = {"look up": "up", "look down": "down", "step back": "back", "pick up": "pick", "open a door": "open"}
MOTIONS = ("stand", "straight", *MIRROR, *ACTIONS)
WORDS = {motion: SHORT.get(motion, motion) for motion in MOTIONS}  # of one token each in the tiny model
MEANT = {word: motion for motion, word in WORDS.items()}
STATED = re.compile(r"\btime\s?line\s*:([^.<\n]*)", re.IGNORECASE)
ITEM = re.compile(
    rf"({'|'.join([*MEANT, *SHORT])})(?: (?:({'|'.join(LANDMARKS)}) ({'|'.join(MIRROR)})|none(?: none)?))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Moment:
    """What one patch of time shows.

    ``motion`` is an event of the clip's truth: "stand", "straight", "left", "right" or an action's kind. ``landmark``
    is the kind in view ("" for none), ``side`` the hand on which it is.
    """

    motion: str
    landmark: str = ""
    side: str = ""


def shown(truth: dict, frame_indices: Iterable[int]) -> tuple[Moment, ...]:
    """What each of some frames of a clip shows.

    Args:
        truth: as :func:`load_truth` reads it.
        frame_indices: numbers of the sampled frames among the video's, ``(F,)``, in order.

    Returns:
        ``F`` moments.

    Raises:
        BadUse: no frames, or one that the clip has not.
        StkitError: the truth lacks something or says what no walk has.
    """
    frames = [int(index) for index in frame_indices]
    try:
        ticks, columns = truth["frame_ticks"], truth["ticks"]
        if not frames or not all(0 <= index < len(ticks) for index in frames):
            raise BadUse(f"frames {frames!r:.80}: give at least one, numbered from 0 to {len(ticks) - 1}")
        sides = {"": ""} | {mark["kind"]: mark["side"] for mark in truth["plan"]["landmarks"]}
        at = [ticks[index] for index in frames]
        motions = [MEANT[WORDS[columns["event"][tick]]] for tick in at]
        marks = [(kind, sides[kind]) for kind in (columns["landmark"][tick] for tick in at)]
        if unknown := [m for m in marks if m != ("", "") and not (m[0] in LANDMARKS and m[1] in MIRROR)]:
            raise KeyError(*unknown[0])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise StkitError(f"the truth of a clip is malformed ({error!r:.80}): build the benchmark anew") from error
    return tuple(Moment(motion, *mark) for motion, mark in zip(motions, marks))


def timeline(truth: dict, frame_indices: Iterable[int]) -> tuple[Moment, ...]:
    """What each patch of time of a clip shows; arguments and errors as of :func:`shown`.

    Returns:
        ``ceil(F / 2)`` moments; with an odd count the last frame stands twice, as processors pad it.
    """
    return told(shown(truth, frame_indices))


def told(frames: Sequence[Moment]) -> tuple[Moment, ...]:
    """What is told of each two frames."""
    motions = _latest([moment.motion for moment in frames])
    marks = _latest([(moment.landmark, moment.side) for moment in frames])
    return tuple(Moment(motion, *mark) for motion, mark in zip(motions, marks, strict=True))


def _latest(values: Sequence) -> list:
    """Of each two frames' values the second, or the first where the second has been told just before."""
    kept = []
    for first, second in zip_longest(values[::2], values[1::2], fillvalue=values[-1]):
        kept.append(first if kept and second == kept[-1] else second)
    return kept


def render(moments: Iterable[Moment], dense: bool = False) -> str:
    """A time line in words: an item for every moment, equal ones too.

    Args:
        dense: three words an item and nothing between them, "none none" for no landmark: so that all moments have
            equally many tokens, and the text goes on as steadily as the time it tells of.

    Raises:
        StkitError: a motion that there is no word for.
    """
    items = []
    for moment in moments:
        if moment.motion not in WORDS:
            raise StkitError(f"motion {moment.motion!r} has no word: use {', '.join(WORDS)}")
        words = words_of(moment)
        items.append(" ".join(words if dense or moment.landmark else words[:1]))
    return f"{HEADING} {(' ' if dense else ', ').join(items)}."


def words_of(moment: Moment) -> tuple[str, str, str]:
    """Its motion, landmark and side in words, "none" for no landmark and no side."""
    return WORDS[moment.motion], moment.landmark or NO_MARK, moment.side or NO_MARK


def parse(text: str) -> tuple[Moment, ...] | None:
    """The time line that stands in a text, whatever else does.

    It begins at "Timeline:" and ends with the sentence, the line or the text. None: there is none, more than one, or
    one that holds something else than :func:`render` writes (case and spaces don't count, "none" may stand for no
    landmark).
    """
    stated = STATED.findall(text)
    if len(stated) != 1:
        return None
    found = [ITEM.fullmatch(item) for item in _items(stated[0])]
    if not all(found):
        return None
    return tuple(_moment(*(part or "" for part in item.groups())) for item in found)


def _items(text: str) -> list[str]:
    """The items of a time line: with commas between them, or of three words each."""
    words = text.split()
    if "," in text or not words or len(words) % 3:
        return [" ".join(item.split()) for item in text.split(",")]
    return [" ".join(words[k : k + 3]) for k in range(0, len(words), 3)]


def _moment(motion: str, landmark: str, side: str) -> Moment:
    return Moment(MEANT.get(motion.lower(), motion.lower()), landmark.lower(), side.lower())


def overlap(a: Sequence[Moment], b: Sequence[Moment]) -> float:
    """How far two time lines agree, 0 to 1: the share of motions and of landmarks (with their side) that are equal.

    Moments are compared in their places; those that only the longer one has count as wrong, so that saying more does
    not pay. NaN: both are empty.
    """
    if not a and not b:
        return math.nan
    agree = sum((x.motion == y.motion) + ((x.landmark, x.side) == (y.landmark, y.side)) for x, y in zip(a, b))
    return agree / (2 * max(len(a), len(b)))


def load_truth(benchmark: Benchmark, clip_id: str) -> dict | None:
    """The truth of a clip, as its benchmark has it; None where it has none (imported rows).

    Raises:
        StkitError: the file leaves the benchmark's folder, is not there or holds no truth of this clip.
    """
    clip = next((clip for clip in benchmark.clips if clip.id == clip_id), None)
    if clip is None or not clip.truth:
        return None
    root = Path(os.path.realpath(benchmark.path))
    if video_problem(clip.truth) or not Path(os.path.realpath(root / clip.truth)).is_relative_to(root):
        raise StkitError(f"clip {clip_id}: truth={clip.truth!r} leaves {benchmark.path}: put the file into that folder")
    path = benchmark.path / clip.truth
    truth = read_json(path)
    if not isinstance(truth, dict) or truth.get("clip_id") != clip_id:
        raise StkitError(f"{path}: the truth of clip {clip_id!r} was expected: build the benchmark anew")
    if missing := [name for name in ("frame_ticks", "ticks", "plan") if name not in truth]:
        raise StkitError(f"{path}: {missing[0]!r} is missing: build the benchmark anew")
    return truth
