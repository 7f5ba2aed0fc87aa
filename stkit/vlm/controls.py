"""Controls: what a model is shown instead, so that one sees what its accuracy rests on.

shown = control_frames(frames, "shuffled", seed=0, clip_id="walk-000003")
turned, back = rotated(question, 1)          # "circular": every option has stood under every letter
"""

from dataclasses import replace

import numpy as np

from ..bench import routes
from ..bench.schema import Question, Route
from ..runtime import child_seed
from .video import Frames

CONTROLS = ("none", "blind", "shuffled", "reversed", "single-frame", "circular")


def control_frames(frames: Frames, control: str, seed: int, clip_id: str) -> Frames:
    """The frames that a control shows. Timestamps stay in their order: only the pictures change places.

    Args:
        frames: T frames as sampled.
        control: one of ``CONTROLS``; those that leave the frames alone return them as they are.
        seed, clip_id: "shuffled" draws one permutation for each clip of a seeded run.

    Returns:
        Frames; for "single-frame" the middle one alone, twice (two frames make one temporal patch), at its own time.
    """
    count = len(frames.pixels)
    if control == "shuffled":
        order = np.random.default_rng(child_seed(seed, "shuffled", clip_id)).permutation(count)
        return replace(frames, pixels=frames.pixels[order])
    if control == "reversed":
        return replace(frames, pixels=frames.pixels[::-1].copy())
    if control == "single-frame":
        middle = np.array([count // 2] * 2)
        times, indices = frames.timestamps_s[middle], frames.indices[middle]
        return replace(frames, pixels=frames.pixels[middle], timestamps_s=times, indices=indices)
    return frames


def rotated(question: Question, shift: int) -> tuple[Question, list[int]]:
    """The question with its options moved up by ``shift``, and for each new place the option's old index."""
    count = len(question.options)
    back = [(place + shift) % count for place in range(count)]
    options = tuple(question.options[k] for k in back)
    return replace(question, options=options, answer=back.index(question.answer)), back


def turns(route: Route) -> list[str]:
    """The turns of a route alone, in order: "left" and "right"."""
    return [step.value for step in route.steps if step.kind == "move" and step.value in ("left", "right")]


def turns_seen_backwards(answer: Route) -> list[str]:
    """The turns that reversed frames show: those of the walk in reverse order, each the other way round.

    A turn to the left, played backwards, is one to the right. So the way there now looks like the way back, and a
    question for the way back has the way there for its answer.
    """
    return turns(routes.reverse(answer))
