"""What a study's arms say: accuracies with intervals by clip and by seed, and planned contrasts with Holm's tests.

An arm's answers are kept as marks, a character for each clip and kind of question: "1" right, "0" wrong, "-" not asked.
All that follows is computed from them, so that whoever has ``ablations.json`` can compute it again.

- Interval by clip: a question's value is its mean over the seeds; the cluster-robust interval of
  :func:`stkit.stats.clustered_interval` over maps. It holds for these seeds on other walks.
- Interval by clip and seed: to each side's distance the margin of the mean over the seeds is added in quadrature, a t
  interval of the seeds' accuracies with one degree of freedom less than seeds. It speaks of other seeds too, is never
  narrower than the first, and is wide with three seeds, as it should be. Undefined (None) for one seed.
- A contrast: the paired difference, a permutation test over maps of the means over the seeds, and Holm's correction
  over all contrasts of the study, on both benchmarks. "higher" or "lower" is said only where the corrected p is below 0.05
  and the difference has the same sign with every seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from scipy.stats import t

from .. import stats
from ..bench.schema import Benchmark
from ..reporting.judge import Run
from ..reporting.scores import KINDS
from ..runs import clean
from ..runtime import StkitError
from .study import Study

ON = ("test", "ood")
ALPHA = 0.05
UNKNOWN = "unknown"  # a commit that could not be told
HIGHER, LOWER, DISAGREE, NOTHING = "higher", "lower", "seeds disagree", "none shown"


def walks_of(questions: Sequence) -> list[str]:
    """The clips of a benchmark that anything is asked about, in the order of its questions."""
    return list(dict.fromkeys(question.clip_id for question in questions))


def seeds_of(rows: Mapping[str, Mapping]) -> list:
    """The seeds of the arm that has most; one that trains nothing has run once."""
    return list(max(rows.values(), key=len))


def unsure(commit: str) -> bool:
    """Whether what ran can't be had from a commit: files differed from it, or it is not known."""
    return "-dirty" in commit or UNKNOWN in commit


def clusters(benchmark: Benchmark) -> list[int]:
    """The number of each clip's map: clips on one map are one cluster."""
    group = {question.clip_id: question.group for question in benchmark.questions}
    known: dict[str, int] = {}
    return [known.setdefault(group[clip], len(known)) for clip in walks_of(benchmark.questions)]


def marks(run: Run) -> dict:
    """What one evaluation says: accuracy, chance and blind over multiple choice, unparsed_rate, and by_task for each
    kind accuracy, blind, n and marks."""
    places = {clip: k for k, clip in enumerate(walks_of(run.questions))}
    lines = {kind: ["-"] * len(places) for kind in KINDS}
    for row in run.rows:
        if row.scored:
            lines[row.question.kind][places[row.question.clip_id]] = "01"[bool(row.said.correct)]
    parts = run.scores["by_task"]
    by_task = {
        kind: {key: parts[kind][key] for key in ("accuracy", "blind", "n")} | {"marks": "".join(lines[kind])}
        for kind in KINDS
        if kind in parts
    }
    whole = {key: run.scores[key] for key in ("accuracy", "chance", "blind", "unparsed_rate", "failed")}
    return whole | {"by_task": by_task}


def summarise(facts: Mapping, study: Study, rows: Mapping[str, Mapping[int, dict]]) -> dict:
    """All of a study's results as plain JSON values.

    Args:
        facts: commands, machine, start, unfinished (seeds left out), and walks with the "clusters" of "test" and "ood".
        rows: arm -> seed -> what :func:`stkit.tiny.ablations.run_arm` returns.

    Returns:
        The facts; study (name, seeds, settings); arms: for each its settings, ``seeds`` (each run's figures by task and
        order, blind beside, and marks) and for "test" and "ood" what :func:`summary` gives; contrasts: a list of what
        :func:`contrast` gives, with ``p_holm`` and ``outcome``.
    """
    arms = {}
    for name, arm in study.arms.items():
        seeds = rows[name]
        arms[name] = {"arm": asdict(arm), "seeds": {str(seed): row for seed, row in seeds.items()}}
        for on in ON:
            arms[name][on] = summary([row[on] for row in seeds.values()], facts["walks"][on]["clusters"])
    found = [
        {**asdict(one), "on": on}
        | contrast(_on(rows[one.first], on), _on(rows[one.second], on), facts["walks"][on]["clusters"])
        for one in study.contrasts
        for on in ON
    ]
    shared = {key: value for key, value in asdict(study).items() if key not in ("arms", "contrasts", "walks")}
    return clean({**facts, "study": shared, "arms": arms, "contrasts": judged(found)})


def _on(rows: Mapping[int, dict], on: str) -> dict[int, dict]:
    return {seed: row[on] for seed, row in rows.items()}


def table(said: Mapping, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Marks as numbers: ``(kinds, clips)`` float, NaN where nothing was asked; of multiple choice without ``kinds``."""
    kinds = [kind for kind in KINDS if not kind.startswith("route/")] if kinds is None else kinds
    lines = [said["by_task"][kind]["marks"] for kind in kinds if kind in said["by_task"]]
    return np.array([[{"1": 1.0, "0": 0.0, "-": np.nan}[mark] for mark in line] for line in lines])


def summary(said: Sequence[Mapping], codes: Sequence[int], level: float = 0.95) -> dict:
    """An arm on one benchmark, over its seeds.

    Returns:
        accuracy, low, high (by clip), wide_low, wide_high (by clip and seed), n, clusters, by_seed (accuracies), blind,
        chance, unparsed_rate, and by_task with accuracy, low, high, blind, n, clusters and by_seed.
    """
    found = _figures([table(one) for one in said], codes, level)
    for name in ("blind", "chance", "unparsed_rate"):
        found[name] = _mean(one[name] for one in said)
    found["by_task"] = {}
    for kind in said[0]["by_task"]:
        part = _figures([table(one, [kind]) for one in said], codes, level)
        blind = _mean(one["by_task"][kind]["blind"] for one in said)
        found["by_task"][kind] = part | {"blind": blind}
    return found


def _figures(tables: Sequence[np.ndarray], codes: Sequence[int], level: float) -> dict:
    _alike(tables)
    values, groups = _flat(np.mean(tables, axis=0), codes)
    if not len(values):
        raise StkitError("no question was scored: run the evaluation again")
    interval = stats.clustered_interval(values, groups, level)
    by_seed = [float(np.nanmean(one)) for one in tables]
    return {
        "accuracy": interval.mean, "low": interval.low, "high": interval.high, **widened(interval, by_seed, 0.0, level),
        "n": interval.n, "clusters": interval.clusters, "by_seed": by_seed,
    }  # fmt: skip


def _alike(tables: Sequence[np.ndarray]) -> None:
    """All runs must have been asked the same."""
    if any(one.shape != tables[0].shape or (np.isnan(one) != np.isnan(tables[0])).any() for one in tables):
        raise StkitError(
            "two runs of a study were not scored on the same questions: evaluate the one that lacks some again"
        )


def _flat(values: np.ndarray, codes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The questions that were asked, with the cluster of each."""
    there = ~np.isnan(values)
    return values[there], np.broadcast_to(np.asarray(codes), values.shape)[there]


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def widened(interval: stats.Interval, by_seed: Sequence[float], least: float = 0.0, level: float = 0.95) -> dict:
    """The interval by clip, made wider by how far the seeds are apart.

    Args:
        interval: of the mean over the seeds.
        by_seed: (S,) each seed's mean.
        least: 0 for an accuracy, -1 for a difference; the most is 1.

    Returns:
        wide_low and wide_high, None for one seed.

    Source: margins of independent sources added in quadrature, as in MOVER (Zou and Donner 2008).
    """
    count = len(by_seed)
    if count < 2:
        return {"wide_low": None, "wide_high": None}
    margin = t.ppf((1 + level) / 2, count - 1) * np.std(by_seed, ddof=1) / math.sqrt(count)
    low = interval.mean - math.hypot(interval.mean - interval.low, margin)
    high = interval.mean + math.hypot(interval.high - interval.mean, margin)
    return {"wide_low": float(max(low, least)), "wide_high": float(min(high, 1.0))}


def contrast(first: Mapping[int, Mapping], second: Mapping[int, Mapping], codes: Sequence[int]) -> dict:
    """Second minus first on the same questions.

    Args:
        first, second: seed -> what :func:`marks` gives; an arm with one run only stands for every seed.

    Returns:
        first_accuracy, second_accuracy, difference, low, high (by clip), wide_low, wide_high (by clip and seed), n,
        clusters, by_seed (differences), p (NaN for a single map).

    Raises:
        StkitError: the two have no seed in common.
    """
    seeds = (
        sorted(set(first) & set(second)) if len(first) > 1 and len(second) > 1 else sorted(max(first, second, key=len))
    )
    if not seeds:
        raise StkitError(f"seeds {sorted(first)} and {sorted(second)}: a contrast needs the same seeds of both arms")
    pairs = [(table(_of(first, seed)), table(_of(second, seed))) for seed in seeds]
    _alike([one for pair in pairs for one in pair])
    (a, groups), (b, _) = (_flat(np.mean([pair[k] for pair in pairs], axis=0), codes) for k in (0, 1))
    interval = stats.paired_difference(b, a, groups)
    by_seed = [float(np.nanmean(two - one)) for one, two in pairs]
    return {
        "first_accuracy": float(a.mean()), "second_accuracy": float(b.mean()), "difference": interval.mean,
        "low": interval.low, "high": interval.high, **widened(interval, by_seed, -1.0), "n": interval.n,
        "clusters": interval.clusters, "by_seed": by_seed,
        "p": stats.permutation_p(b, a, groups, seed=0) if interval.clusters > 1 else float("nan"),
    }  # fmt: skip


def _of(runs: Mapping[int, Mapping], seed: int) -> Mapping:
    return runs[seed] if seed in runs else next(iter(runs.values()))


def judged(contrasts: Sequence[dict]) -> list[dict]:
    """The same with ``p_holm``, over all of them, and the ``outcome`` that follows."""
    adjusted = stats.holm({str(k): one["p"] for k, one in enumerate(contrasts)})
    found = []
    for k, one in enumerate(contrasts):
        signs = {np.sign(difference) for difference in one["by_seed"]}
        outcome = NOTHING
        if adjusted[str(k)] < ALPHA:
            outcome = DISAGREE if len(signs) > 1 else HIGHER if one["difference"] > 0 else LOWER
        found.append(one | {"p_holm": adjusted[str(k)], "outcome": outcome})
    return found
