r"""What rollouts are rewarded for: right answers, their form, and whether forward and reverse agree.

A reward looks at all rollouts on one clip together, several questions with a group each, and gives a number for each
of them; NaN (or None) where it does not apply. Those that apply are weighed and added up::

    scored = combine(rollouts, {"correct": 1.0, "format": 0.2, "reverse_consistency": 0.5})
    scored[0].reward, scored[0].parts    # (1.2, {"correct": 1.0, "format": 1.0, "reverse_consistency": 0.0})

One of your own takes two lines, and is given as a function or named as ``file.py:function``::

    def brief(rollouts):
        return [len(rollout.text) < 200 for rollout in rollouts]

    combine(rollouts, {"correct": 1.0, "brief": 0.1}, {"brief": brief})
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..bench import routes
from ..bench.options import plain
from ..bench.schema import LETTERS, Question, Route
from ..bench.timeline import Moment, overlap
from ..bench.timeline import parse as parse_timeline
from ..runtime import StkitError
from ..vlm.answers import answer_parts, parse, parse_route
from .plugins import find_rewards

LEAST_THOUGHT = 5  # letters and digits: less is no thinking
SOFT = 0.5  # the share of max_new_tokens up to which a rollout is short enough
WHOLE = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"<\s*(?:/\s*)?(?:think(?:ing)?|answer)\b", re.IGNORECASE)
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Answered:
    """One rollout with what is known of it.

    ``text`` is decoded without special tokens, ``tokens`` counts what was sampled, ``finished`` says that it ended by
    itself. ``moments`` is the clip's true time line at the sampled frames, None where it is unknown.
    """

    question: Question
    text: str
    tokens: int
    finished: bool
    max_new_tokens: int
    moments: tuple[Moment, ...] | None = None


@dataclass(frozen=True)
class Scored:
    """A rollout's reward, and the parts it is made of by name, unweighted; None: that one does not apply."""

    reward: float
    parts: dict[str, float | None]


Reward = Callable[[list[Answered]], Iterable[float | None]]


def correct(rollouts: list[Answered]) -> list[float]:
    """1 for the right option or for exactly the right route, as the evaluation reads answers; else 0."""
    return [float(_is_right(rollout)) for rollout in rollouts]


def _is_right(rollout: Answered) -> bool:
    question = rollout.question
    if not question.is_open:
        return parse(rollout.text, question.options) == question.answer
    truth = parse_route(question.answer)
    if truth is not None:
        return parse_route(rollout.text) == truth
    said = [_words(part) for part in answer_parts(rollout.text)]  # an answer in free words
    return len(said) == 1 and said[0] == _words(question.answer)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def well_formed(rollouts: list[Answered]) -> list[float]:
    """1 when the whole text is ``<think>...</think> <answer>...</answer>``, each tag once, with some thinking and with
    one option's letter or text (of an open-ended question: with some text); else 0."""
    return [float(_is_well_formed(rollout)) for rollout in rollouts]


def _is_well_formed(rollout: Answered) -> bool:
    whole = WHOLE.fullmatch(rollout.text) if len(TAG.findall(rollout.text)) == 4 else None
    if not whole or len(re.findall(r"[^\W_]", whole["think"])) < LEAST_THOUGHT:
        return False
    if rollout.question.is_open:
        return bool(_words(whole["answer"]))
    return any(_is_option(whole["answer"], *pair) for pair in zip(LETTERS, rollout.question.options))


def _is_option(answer: str, letter: str, option: str) -> bool:
    """Whether an answer is this letter, this option's text, or the one before the other."""
    label = re.fullmatch(rf"\s*\(?{letter}\)?[.:]?(?:\s+(?P<text>.*))?", answer, re.DOTALL)
    return plain(answer) == plain(option) or bool(label) and plain(label["text"] or "") in ("", plain(option))


def reverse_consistency(rollouts: list[Answered]) -> list[float]:
    """The share of the other order's rollouts that tell the same walk, read backwards; no right answer is looked at.

    NaN: no rollouts on the question of the other order (same clip, same task), or options that are no routes. A rollout
    that tells no route agrees with none.
    """
    told, usable = [_told(rollout) for rollout in rollouts], [_is_algebraic(r.question) for r in rollouts]
    found = []
    for rollout, route, own in zip(rollouts, told, usable):
        others = [k for k, other in enumerate(rollouts) if usable[k] and _is_opposite(rollout.question, other.question)]
        back = None if route is None else routes.reverse(route)
        share = sum(back is not None and told[k] == back for k in others) / len(others) if others else math.nan
        found.append(share if own else math.nan)
    return found


def _is_opposite(a: Question, b: Question) -> bool:
    return (a.clip_id, a.task) == (b.clip_id, b.task) and a.order != b.order


def _told(rollout: Answered) -> Route | None:
    """The route that a rollout's answer tells: its own words, or the option that it chooses."""
    if rollout.question.is_open:
        return parse_route(rollout.text)
    chosen = parse(rollout.text, rollout.question.options)
    return None if chosen is None else _route(rollout.question.options[chosen])


def _is_algebraic(question: Question) -> bool:
    return all(_route(option) is not None for option in question.options)


def _route(text: str) -> Route | None:
    try:
        return routes.parse(text)
    except StkitError:
        return None


def true_timeline(rollouts: list[Answered]) -> list[float]:
    """How far the time line that stands in the think tag agrees with the true one, 0 to 1; 0 when none stands there.

    NaN: the true one is unknown.
    """
    found = []
    for rollout in rollouts:
        stated = parse_timeline("\n".join(THOUGHT.findall(rollout.text)))
        found.append(math.nan if not rollout.moments else overlap(stated or (), rollout.moments))
    return found


def brevity(rollouts: list[Answered]) -> list[float]:
    """1 up to half of max_new_tokens, from there falling linearly to 0 at all of them; 0 for what did not finish."""
    room = [rollout.max_new_tokens * (1 - SOFT) for rollout in rollouts]
    return [
        min(1.0, max(0.0, (rollout.max_new_tokens - rollout.tokens) / free)) if rollout.finished else 0.0
        for rollout, free in zip(rollouts, room)
    ]


REWARDS: dict[str, Reward] = {
    "correct": correct, "format": well_formed, "reverse_consistency": reverse_consistency, "timeline": true_timeline,
    "length": brevity,
}  # fmt: skip


def combine(
    rollouts: Sequence[Answered], weights: Mapping[str, float], functions: Mapping[str, Reward] | None = None
) -> list[Scored]:
    """The weighed sum of all rewards that apply to each rollout.

    Args:
        rollouts: all those on one clip.
        weights: by name: a key of ``REWARDS`` or of ``functions``, "my_rewards.py:function" or
            "package.module:function". A weight of 0 leaves one out.
        functions: your own by name; without a weight they weigh 1.

    Returns:
        One each, in the order of the rollouts.

    Raises:
        BadUse: an unknown name, or nothing that has a weight.
        StkitError: a function that fails or gives something else than a number each; a rollout to which no reward
            applies.
    """
    found, rollouts = find_rewards(weights, REWARDS, functions), list(rollouts)
    parts = {name: _values(name, function, rollouts) for name, (function, _) in found.items()}
    scored = []
    for k, rollout in enumerate(rollouts):
        own = {name: values[k] for name, values in parts.items()}
        told = [found[name][1] * value for name, value in own.items() if value is not None]
        if not told:
            raise StkitError(
                f"question {rollout.question.id}: none of the rewards {', '.join(own)} applies to it: give another one "
                "a weight too (rewards.correct=1), or leave such questions out (data.tasks, data.orders)"
            )
        scored.append(Scored(float(sum(told)), own))
    return scored


def _values(name: str, function: Reward, rollouts: list[Answered]) -> list[float | None]:
    """What a function gives, as plain numbers; None for NaN."""
    try:
        given = list(function(list(rollouts)))
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise StkitError(f"reward {name!r} failed: {why}") from error
    if len(given) != len(rollouts):
        raise StkitError(f"reward {name!r} gave {len(given)} numbers for {len(rollouts)} rollouts: give one for each")
    return [_number(name, value) for value in given]


def _number(name: str, value) -> float | None:
    try:
        number = math.nan if value is None else math.inf if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise StkitError(f"reward {name!r} gave {value!r:.60}: give a finite number, or NaN where it does not apply")
    return None if math.isnan(number) else number
