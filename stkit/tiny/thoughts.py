"""Reverse thinking in miniature: thoughts that derive both orders of a route, and thoughts that derive the asked one.

    thought(question, "reverse", opposite, moments)
    # <think>Timeline: ... Route: left, right. Reversed: left, right. A: right. C: left, right. So the answer is C.</think>
    thought(question, "direct", opposite, moments)
    # the same without the sentence that tells the order which is not asked

In the paper the cold start first answers the question of the opposite order, "Let's start by thinking reverse ...", and
then the question. Ours tells the route and its reverse, whichever of them is asked, and only then looks at the options;
without reverse thinking the asked order is written down straight from the time line, a reversed one too. A deviation:
the route always comes before its reverse, since a time line is read from its beginning. The kit's own form
(``sft.form=checked``) lies between the two: for a forward question it is "direct", for a reverse one "reverse".
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..bench.routes import reverse
from ..bench.schema import Benchmark, Question, Route, row_of
from ..bench.timeline import Moment, load_truth, timeline
from ..reporting.chains import STEPS, check_steps, read_chain
from ..runs import write_jsonl
from ..runtime import BadUse, StkitError
from ..sampling import sample_indices
from ..train.answers import answer_text
from ..train.rewards import Answered
from ..train.sft import opposite
from ..vlm.answers import parse

THINKING = ("reverse", "direct")
TEXT = re.compile(
    r"(?P<line><think>[^.]*\.)(?P<route> Route: [^.]*\.)(?P<back> Reversed: [^.]*\.)?(?P<rest>.*)", re.DOTALL
)


def thought(question: Question, thinking: str, other: Question | None, moments: Sequence[Moment] | None) -> str:
    """The text that is learned for one question.

    Args:
        thinking: "reverse" or "direct".
        other: the question of the other order, of the same task on the same clip.
        moments: the clip's time line at the frames that are shown.

    Raises:
        BadUse: another thinking.
        StkitError: the clip has no truth, or no question of the other order.
    """
    if thinking not in THINKING:
        raise BadUse(f"thinking {thinking!r} is unknown: use {' or '.join(THINKING)}")
    said = _parts(question, moments)
    if thinking == "direct":
        return said["line"] + (said["back"] or said["route"]) + said["rest"]
    if other is None:
        raise StkitError(
            f"question {question.id}: its clip has no {question.task} question of the other order: build the walks anew"
        )
    back = said["back"] or _parts(other, moments)["back"]
    return f"{said['line']}{said['route']}{back}{said['rest']}"


def _parts(question: Question, moments: Sequence[Moment] | None) -> dict[str, str | None]:
    """The kit's own text of a question, cut into time line, route, reverse (None for a forward one) and the rest."""
    return TEXT.fullmatch(answer_text(question, "checked", moments=moments)).groupdict()


def write_lessons(benchmark: Benchmark, thinking: str, clips: int, how: dict) -> Path:
    """A question file beside the benchmark's own, whose rows have thoughts for solutions.

    Args:
        thinking: see :func:`thought`.
        clips: how many, the first ones.
        how: sampling and frames, as :func:`stkit.vlm.sight.choose_sampling` gives them: the time line is that of the
            frames that are shown.

    Returns:
        The file's path, for ``sft(path, overrides={"sft.form": "solution"})``.

    Raises:
        BadUse: more clips than the benchmark has.
    """
    if clips > len(benchmark.clips):
        raise BadUse(f"clips={clips}: {benchmark.path} has {len(benchmark.clips)}: film more walks, or ask for fewer")
    asked: dict[str, list[Question]] = {}
    for question in benchmark.questions:
        asked.setdefault(question.clip_id, []).append(question)
    rows = []
    for clip in benchmark.clips[:clips]:
        shown = sample_indices(clip.frames, clip.fps, how["sampling"], n=how["frames"] or 0)
        moments = timeline(load_truth(benchmark, clip.id), shown)
        for question in asked.get(clip.id, ()):
            text = thought(question, thinking, opposite(benchmark, question), moments)
            rows.append(row_of(replace(question, solution=text)))
    path = benchmark.path / f"{thinking}-{how['sampling']}-{clips}.jsonl"
    write_jsonl(path, rows)
    return path


def chain(rollouts: list[Answered]) -> list[float]:
    """A reward for thoughts that hold together: the share of the steps that follow from what was written before them.

    Steps are the route (from the time line), its reverse (of a reverse question) and what is said of the options with
    the answer, see :func:`stkit.reporting.chains.check_steps`. Neither the video nor the right answer is looked at: what
    follows from a wrong time line is rewarded too. NaN: an open-ended question, or options that are no routes.
    """
    return [_followed(rollout) for rollout in rollouts]


def _followed(rollout: Answered) -> float:
    question = rollout.question
    if question.is_open:
        return math.nan
    try:
        steps = check_steps(read_chain(rollout.text), question, parse(rollout.text, question.options))
    except StkitError:
        return math.nan
    names = [name for name in STEPS[1:] if name != "reverse" or question.order == "reverse"]
    return sum(steps[name] is True for name in names) / len(names) if steps else 0.0


def both_orders(rollouts: list[Answered]) -> list[float]:
    """A reward for reverse thinking: 1 when the thought tells a route and, after "Reversed:", its reverse; else 0.

    Neither the video nor the right answer is looked at: a wrong route with its own reverse is rewarded too.
    """
    return [float(_tells_both(rollout.text)) for rollout in rollouts]


def _tells_both(text: str) -> bool:
    chain = read_chain(text)
    if chain is None or not chain.route or chain.reversed is None:
        return False
    return reverse(Route(chain.route)).steps == chain.reversed
