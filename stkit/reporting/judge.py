"""The one place where accuracies are computed: score a run, load it again, compare it with another.

What counts how: an unresolved answer is wrong (the accuracy on resolved ones stands beside it); a failed question stays out
(the accuracy with failures counted as wrong stands beside it); a question that was not asked, such as a route in letter
mode, is counted and nothing else. The overall accuracy is over multiple-choice questions: routes are decoded, have no chance
level and another scale of difficulty, so they stand in rows of their own. Intervals are clustered by ``group``::

    run = load_run("runs/first")
    run.scores["accuracy"], run.scores["by_task"]["direction/forward"]["blind"]
    table(run)                                        # a DataFrame, one row a category
    compare(run, load_run("runs/second"))[0]["by_task"]["direction/forward"]["p_holm"]
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import stats
from ..bench.schema import ORDERS, TASKS, Benchmark, Prediction, Question, load_benchmark
from ..runs import clean, read_json
from ..runtime import StkitError

KINDS = tuple(f"{task}/{order}" for task in TASKS for order in ORDERS)
FAILED_SHARE = 0.01
ANEW = "delete that line and run the same 'stkit eval' again"
CONTROLS = {
    "blind": "blind control: the model saw no frames",
    "shuffled": "shuffled control: the model saw the frames in a random order",
    "reversed": "reversed control: the model saw the frames backwards",
    "single-frame": "single-frame control: the model saw one frame only",
    "circular": "circular control: right means right under every rotation of the options",
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


@dataclass(frozen=True)
class Run:
    """An evaluation read back from its folder. ``scores`` are computed from its predictions, never read from a file."""

    name: str
    path: Path
    config: dict
    predictions: tuple[Prediction, ...]
    blind: tuple[Prediction, ...]
    questions: tuple[Question, ...]
    benchmark: Benchmark
    scores: dict

    @property
    def notices(self) -> list[str]:
        """What a reader must know before the first figure, weightiest first."""
        found = ["untrained weights: expect chance"] if self.config.get("model", {}).get("untrained") else []
        control = CONTROLS.get(self.config["settings"].get("control"))
        return found + ([control] if control else []) + self.scores["notices"]

    @property
    def rows(self) -> list[Row]:
        """Questions joined with their predictions, in the order of the benchmark."""
        return join(self.predictions, self.blind, self.questions)


def join(predictions: Sequence[Prediction], blind: Sequence[Prediction], questions: Sequence[Question]) -> list[Row]:
    """Match predictions to questions by id; a later prediction for the same id (a question asked again) replaces an earlier one."""
    said, unseen = {p.id: p for p in predictions}, {p.id: p for p in blind}
    return [Row(q, said.get(q.id), unseen.get(q.id)) for q in questions]


def _plain(interval: stats.Interval) -> dict:
    """An interval as JSON: undefined is None, counts are ints."""
    values = {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}
    return clean(values) | {"n": int(interval.n), "clusters": int(interval.clusters)}


def _mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _correct(rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(r.said.correct) for r in rows])


def _groups(rows: Sequence[Row]) -> list[str]:
    return [r.question.group for r in rows]


def _blind(rows: Sequence[Row]) -> float | None:
    return _mean(float(r.blind.correct) for r in rows if r.blind is not None and r.blind.correct is not None)


def _minus_blind(rows: Sequence[Row]) -> dict | None:
    both = [r for r in rows if r.scored and r.blind is not None and r.blind.correct is not None]
    if not both:
        return None
    without = np.array([float(r.blind.correct) for r in both])
    return _plain(stats.paired_difference(_correct(both), without, _groups(both)))


def _part(rows: Sequence[Row]) -> dict:
    """The figures of one category, or of any other set of questions."""
    scored = [r for r in rows if r.scored]
    failed = sum(r.failed for r in rows)
    found = {"mean": None, "low": None, "high": None, "n": 0, "clusters": 0}
    if scored:
        found = _plain(stats.clustered_interval(_correct(scored), _groups(scored)))
    right = sum(bool(r.said.correct) for r in scored)
    unresolved = sum(r.said.parsed is None for r in scored)
    return {
        "accuracy": found["mean"],
        "chance": _mean(1 / len(r.question.options) for r in scored if r.question.options),
        "blind": _blind(scored),
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
    return _plain(stats.difference_of_parts(_correct(scored), forward, _groups(scored)))


def _route(rows: Sequence[Row]) -> dict | None:
    """Routes: share reproduced exactly, and steps to change in those that could be read (routes that could not are in ``exact``)."""
    scored = [r for r in rows if r.question.is_open and r.scored]
    if not scored:
        return None
    distances = [float(r.said.edit_distance) for r in scored if r.said.edit_distance is not None]
    return {
        "exact": float(_correct(scored).mean()),
        "edit_distance": _mean(d for d in distances if math.isfinite(d)),
        "n": len(scored),
        "read": len(distances),
    }


def _notices(scores: dict, rows: Sequence[Row]) -> list[str]:
    """What a reader must know before the first figure."""
    asked = sum(r.scored or r.failed for r in rows)
    found = []
    if not asked:
        found.append("no question was scored: nothing here is a result")
    if asked and scores["failed"] > FAILED_SHARE * asked:
        share = 100 * scores["failed"] / asked
        found.append(
            f"{scores['failed']} of {asked} questions failed ({share:.1f} %): the accuracies leave them out, "
            "the accuracy with failures counted as wrong stands beside"
        )
    unanswered = sum(r.said is None and not r.question.is_open for r in rows)
    if unanswered and asked:
        found.append(f"unfinished: {unanswered} questions have no answer yet, run the same 'stkit eval' again")
    few = {kind: part["clusters"] for kind, part in scores["by_task"].items() if 0 < part["clusters"] < stats.EXPLORATORY}
    if few:
        everywhere = len(few) == sum(part["n"] > 0 for part in scores["by_task"].values())
        where = f"at most {max(few.values())}" if everywhere else ", ".join(f"{k} {c}" for k, c in few.items())
        found.append(f"exploratory: fewer than {stats.EXPLORATORY} clusters ({where}), the intervals are wide and rough")
    if asked and not any(r.blind for r in rows):
        found.append("no blind control was run: these accuracies have no blind score beside them")
    return found


def score(predictions: Sequence[Prediction], blind: Sequence[Prediction], questions: Sequence[Question]) -> dict:
    """Score the answers to some questions by category.

    Args:
        predictions: one a question; ``correct`` is None and ``failed`` empty (or the row is absent) where it was not asked.
        blind: the blind control's predictions for the same ids, may be empty.
        questions: all questions of the run.

    Returns:
        Plain JSON values (accuracies in [0, 1], None where undefined, counts int): accuracy, chance, blind, low, high (95 %
        cluster-robust), n, clusters, minus_blind (paired), resolved_accuracy, accuracy_failed_wrong, unparsed,
        unparsed_rate over multiple-choice questions; failed and not_asked over all questions; by_task ("direction/forward": the
        same figures), by_order, forward_minus_reverse (per task: mean, low, high, n, clusters), route (exact, edit_distance,
        n, read) and notices (texts). A route has no chance level: its ``chance`` is None.
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
    scores["route"] = _route(rows)
    return clean(scores | {"notices": _notices(scores, rows)})


def _paired(first: dict[str, Row], second: dict[str, Row], ids: list[str]) -> dict | None:
    """Second minus first on the same questions, with a permutation test over clusters."""
    if not ids:
        return None
    a, b = _correct([first[i] for i in ids]), _correct([second[i] for i in ids])
    groups = _groups([first[i] for i in ids])
    difference = _plain(stats.paired_difference(b, a, groups))
    return {
        "first": float(a.mean()),
        "second": float(b.mean()),
        "first_blind": _blind([first[i] for i in ids]),
        "second_blind": _blind([second[i] for i in ids]),
        "difference": difference.pop("mean"),
        **difference,
        "p": clean(float(stats.permutation_p(b, a, groups, seed=0))),
    }


def _compare_two(first: Run, second: Run) -> dict:
    one, two = ({r.question.id: r for r in run.rows if r.scored} for run in (first, second))
    shared = [i for i in one if i in two and _same(one[i].question, two[i].question)]
    kinds = {kind: [i for i in shared if one[i].question.kind == kind] for kind in KINDS}
    by_task = {kind: _paired(one, two, ids) for kind, ids in kinds.items() if ids}
    choice = [i for i in shared if not one[i].question.is_open]
    notices = []
    if not shared:
        notices.append(f"{first.name} and {second.name} share no scored question: nothing can be compared")
    elif left := len(one) + len(two) - 2 * len(shared):
        notices.append(f"{left} questions were scored in one of the runs only (or differ): the comparison leaves them out")
    return {
        "first": first.name,
        "second": second.name,
        "overall": _paired(one, two, choice),
        "by_task": by_task,
        "differs": _differing(first.config["settings"], second.config["settings"]),
        "notices": notices,
    }


def _differing(first: dict, second: dict) -> list[list]:
    """Settings that differ, as [name, first, second]."""
    return [[key, first.get(key), second.get(key)] for key in {**first, **second} if first.get(key) != second.get(key)]


def _same(a: Question, b: Question) -> bool:
    return (a.question, a.options, a.answer, a.group) == (b.question, b.options, b.answer, b.group)


def compare(first: Run, *others: Run) -> list[dict]:
    """Compare runs with the first one, on the questions that both have scored.

    Returns:
        One dict for each of the others: first, second (names), overall and by_task ({first, second, difference = second minus first,
        low, high, n, clusters, p}), settings that differ, notices. ``p`` is the two-sided permutation test over clusters;
        ``p_holm`` of the categories is corrected over all categories of all comparisons (``overall`` is one planned test of its own).
    """
    found = [_compare_two(first, other) for other in others]
    tests = {f"{i}/{kind}": part["p"] for i, pair in enumerate(found) for kind, part in pair["by_task"].items()}
    adjusted = stats.holm({name: p for name, p in tests.items() if p is not None})
    for i, pair in enumerate(found):
        for kind, part in pair["by_task"].items():
            part["p_holm"] = adjusted.get(f"{i}/{kind}")
    return clean(found)


def _prediction(row, where: str) -> Prediction:
    """A checked line of predictions.jsonl."""
    known = {f.name for f in fields(Prediction)}
    required = ("id", "mode", "control", "text", "parsed", "correct")
    if not isinstance(row, dict) or (missing := [name for name in required if name not in row]):
        raise StkitError(f"{where}: {'not a JSON object' if not isinstance(row, dict) else missing[0] + ' is missing'}: {ANEW}")
    for name, kinds in (("id", str), ("text", str), ("failed", str), ("correct", bool | None), ("parsed", int | str | None)):
        if not isinstance(row.get(name, ""), kinds):
            raise StkitError(f"{where}: {name}={row[name]!r:.60} has the wrong type: {ANEW}")
    kept = {k: v for k, v in row.items() if k in known}
    lists = {k: tuple(kept.get(k) or ()) for k in ("log_probs", "timestamps_s")}
    return Prediction(**kept | lists)


def _predictions(path: Path) -> tuple[Prediction, ...]:
    """Read a file of predictions and leave it as it is: a run may be going on, its half-written last line is not read yet."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StkitError(f"{path}:{number}: not JSON ({error}): {ANEW}") from error
        found.append(_prediction(row, f"{path}:{number}"))
    return tuple(found)


def load_run(folder: str | Path) -> Run:
    """Read a run folder (config.json, predictions.jsonl, blind.jsonl and the benchmark that the run was asked on).

    Args:
        folder: as given to ``stkit eval --out``.

    Raises:
        StkitError: no such folder, not a run folder, a malformed line, or the benchmark is gone or no longer has these questions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, a run folder was expected" if folder.exists() else "no such run folder"
        raise StkitError(f"{folder}: {what}: make one with 'stkit eval BENCH --out {folder}'")
    if missing := [name for name in ("config.json", "predictions.jsonl") if not (folder / name).is_file()]:
        raise StkitError(f"{folder} is not a run folder (no {missing[0]} in it): make one with 'stkit eval BENCH --out DIR'")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise StkitError(f"{folder}/config.json: no settings in it: run 'stkit eval' into a fresh folder")
    predictions = _predictions(folder / "predictions.jsonl")
    blind = _predictions(folder / "blind.jsonl") if (folder / "blind.jsonl").is_file() else ()
    benchmark = load_benchmark(config["settings"]["bench"], skip_bad=True)
    questions = [q for q in benchmark.questions]
    known = {q.id for q in questions}
    if strange := [p.id for p in (*predictions, *blind) if p.id not in known]:
        raise StkitError(f"{folder}: {strange[0]!r:.80} is answered there but not asked in the benchmark: it was changed since the run")
    scores = score(predictions, blind, questions)
    return Run(folder.resolve().name, folder, config, predictions, blind, tuple(questions), benchmark, scores)
