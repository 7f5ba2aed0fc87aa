"""The one place where accuracies are computed.

What counts how: an unresolved answer is wrong (the accuracy on resolved ones stands beside it); a failed question stays
out (the accuracy with failures counted as wrong stands beside it); a question that was not asked, such as a route in
letter mode, is counted and nothing else. The overall accuracy is over multiple-choice questions: routes are decoded,
have no chance level and another scale of difficulty, so they stand in rows of their own. Intervals are clustered::

    scores = score(predictions, blind, questions)
    scores["accuracy"], scores["by_task"]["direction/forward"]["blind"]
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .. import stats
from ..bench.schema import ORDERS, TASKS, Prediction, Question
from ..runs import clean

KINDS = tuple(f"{task}/{order}" for task in TASKS for order in ORDERS)
FAILED_SHARE = 0.01
CONTROLS = {
    "blind": "blind control: the model saw no frames",
    "shuffled": "shuffled control: the model saw the frames in a random order",
    "reversed": "reversed control: the model saw the frames backwards",
    "single-frame": "single-frame control: the model saw one frame only",
    "circular": "circular control: right means right under every rotation; chance: keep to one option",
}


class Row(NamedTuple):
    """A question with what the model said to it, with the video and without (None where it was not asked)."""

    question: Question
    said: Prediction | None
    blind: Prediction | None

    @property
    def scored(self) -> bool:
        """It was asked and answered: ``correct`` is True or False."""
        return self.said is not None and not self.said.failed and self.said.correct is not None

    @property
    def failed(self) -> bool:
        """It could not be asked, or answering it broke."""
        return self.said is not None and bool(self.said.failed)


def join(predictions: Sequence[Prediction], blind: Sequence[Prediction], questions: Sequence[Question]) -> list[Row]:
    """Match predictions to questions by id; of two for the same id (a question asked again) the later one counts."""
    said, unseen = {p.id: p for p in predictions}, {p.id: p for p in blind}
    return [Row(q, said.get(q.id), unseen.get(q.id)) for q in questions]


def plain(interval: stats.Interval) -> dict:
    """An interval as JSON: undefined is None, counts are ints."""
    values = {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}
    return clean(values) | {"n": int(interval.n), "clusters": int(interval.clusters)}


def _mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def correct(rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(r.said.correct) for r in rows])


def groups(rows: Sequence[Row]) -> list[str]:
    return [r.question.group for r in rows]


def blind_accuracy(rows: Sequence[Row]) -> float | None:
    return _mean(float(r.blind.correct) for r in rows if r.blind is not None and r.blind.correct is not None)


def _minus_blind(rows: Sequence[Row]) -> dict | None:
    both = [r for r in rows if r.scored and r.blind is not None and r.blind.correct is not None]
    if not both:
        return None
    without = np.array([float(r.blind.correct) for r in both])
    return plain(stats.paired_difference(correct(both), without, groups(both)))


def _part(rows: Sequence[Row]) -> dict:
    """The figures of one category, or of any other set of questions."""
    scored = [r for r in rows if r.scored]
    failed = sum(r.failed for r in rows)
    found = {"mean": None, "low": None, "high": None, "n": 0, "clusters": 0}
    if scored:
        found = plain(stats.clustered_interval(correct(scored), groups(scored)))
    right = sum(bool(r.said.correct) for r in scored)
    unresolved = sum(r.said.parsed is None for r in scored)
    return {
        "accuracy": found["mean"],
        "chance": _mean(1 / len(r.question.options) for r in scored if r.question.options),
        "blind": blind_accuracy(scored),
        "low": found["low"],
        "high": found["high"],
        "n": found["n"],
        "clusters": found["clusters"],
        "minus_blind": _minus_blind(rows),
        "resolved_accuracy": _mean(float(r.said.correct) for r in scored if r.said.parsed is not None),
        "accuracy_failed_wrong": right / (len(scored) + failed) if scored or failed else None,
        "unparsed": unresolved,
        "unparsed_rate": unresolved / len(scored) if scored else None,
        "failed": failed,
        "not_asked": len(rows) - len(scored) - failed,
    }


def _forward_minus_reverse(rows: Sequence[Row]) -> dict | None:
    scored = [r for r in rows if r.scored]
    forward = np.array([r.question.order == "forward" for r in scored], dtype=bool)
    if not forward.any() or forward.all():
        return None
    return plain(stats.difference_of_parts(correct(scored), forward, groups(scored)))


def _route(rows: Sequence[Row]) -> dict | None:
    """Routes: the share given exactly, and the mean edit distance of those that could be read."""
    scored = [r for r in rows if r.question.is_open and r.scored]
    if not scored:
        return None
    distances = [float(r.said.edit_distance) for r in scored if r.said.edit_distance is not None]
    return {
        "exact": float(correct(scored).mean()),
        "edit_distance": _mean(d for d in distances if math.isfinite(d)),
        "n": len(scored),
        "read": len(distances),
    }


def _turn_order(rows: Sequence[Row]) -> dict | None:
    """Reversed control: routes whose turns are those that the frames show when they run backwards."""
    told = [r for r in rows if r.scored and "turn_order_match" in r.said.extra]
    if not told:
        return None
    return plain(stats.clustered_interval([float(r.said.extra["turn_order_match"]) for r in told], groups(told)))


def failure_notice(scores: dict) -> str:
    """That more than 1 % of a run's questions failed, "" when they did not."""
    asked = sum(part["n"] + part["failed"] for part in scores["by_task"].values())
    if scores["failed"] <= FAILED_SHARE * asked:
        return ""
    return (
        f"{scores['failed']} of {asked} questions failed ({100 * scores['failed'] / asked:.1f} %): the accuracies "
        "leave them out, the accuracy with failures counted as wrong stands beside"
    )


def _notices(scores: dict, rows: Sequence[Row]) -> list[str]:
    """What a reader must know before the first figure."""
    asked = sum(r.scored or r.failed for r in rows)
    found = []
    if not asked:
        found.append("no question was scored: nothing here is a result")
    found += filter(None, [failure_notice(scores)])
    decoded = any(r.said is not None and r.said.mode == "generate" for r in rows)  # else routes are not asked at all
    unanswered = sum(r.said is None and (decoded or not r.question.is_open) for r in rows)
    if unanswered and asked:
        found.append(f"unfinished: {unanswered} questions have no answer yet, run the same 'stkit eval' again")
    few = {
        kind: part["clusters"] for kind, part in scores["by_task"].items() if 0 < part["clusters"] < stats.EXPLORATORY
    }
    if few:
        everywhere = len(few) == sum(part["n"] > 0 for part in scores["by_task"].values())
        where = f"at most {max(few.values())}" if everywhere else ", ".join(f"{k} {c}" for k, c in few.items())
        found.append(
            f"exploratory: fewer than {stats.EXPLORATORY} clusters ({where}), the intervals are wide and rough"
        )
    if asked and not any(r.blind for r in rows):
        found.append("no blind control was run: these accuracies have no blind score beside them")
    return found


def score(predictions: Sequence[Prediction], blind: Sequence[Prediction], questions: Sequence[Question]) -> dict:
    """Score the answers to some questions by category.

    Args:
        predictions: one a question; ``correct`` None and ``failed`` empty, or no row, where it was not asked.
        blind: the blind control's predictions for the same ids, may be empty.
        questions: all questions of the run.

    Returns:
        Plain JSON values, accuracies in [0, 1], None where undefined, counts int. Over multiple-choice questions:
        accuracy, chance, blind, low, high (95 %, cluster-robust), n, clusters, minus_blind (paired: mean, low, high, n,
        clusters), resolved_accuracy, accuracy_failed_wrong, unparsed, unparsed_rate. Over all: failed, not_asked.
        by_task ("direction/forward": the same figures; a route's chance is None) and by_order; forward_minus_reverse
        (of each task and "overall", paired), route (exact, edit_distance, n, read), turn_order (reversed control) and
        notices (texts).
    """
    rows = join(predictions, blind, questions)
    choice = [r for r in rows if not r.question.is_open]
    scores = _part(choice)
    scores["failed"] = sum(r.failed for r in rows)
    scores["not_asked"] = sum(not r.scored and not r.failed for r in rows)
    parts = {kind: [r for r in rows if r.question.kind == kind] for kind in KINDS}
    scores["by_task"] = {kind: _part(part) for kind, part in parts.items() if part}
    scores["by_order"] = {o: _part([r for r in choice if r.question.order == o]) for o in ORDERS}
    gaps = {task: _forward_minus_reverse([r for r in rows if r.question.task == task]) for task in TASKS}
    scores["forward_minus_reverse"] = {"overall": _forward_minus_reverse(choice)} | gaps
    scores["route"], scores["turn_order"] = _route(rows), _turn_order(rows)
    return clean(scores | {"notices": _notices(scores, rows)})
