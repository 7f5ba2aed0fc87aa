"""Accuracies with intervals that hold, and tests, when questions come in clusters (all questions on one walk).

Questions on one walk are right or wrong together, so n questions tell less than n. Everything here counts clusters: an
interval that holds also near 0 and 1 and for few clusters, paired differences, a permutation test, Holm's correction.

    >>> interval = clustered_interval([1, 1, 0, 1, 0, 0, 1, 1], list("aabbccdd"))
    >>> interval.mean, interval.clusters, interval.exploratory
    (0.625, 4, True)
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .runtime import BadUse, StkitError

EXPLORATORY = 10  # clusters under which a result is said to be exploratory


@dataclass(frozen=True)
class Interval:
    """A mean and its interval. NaN where it is undefined (no question at all); ``method`` says how it was made."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int
    method: str

    @property
    def exploratory(self) -> bool:
        """Fewer than ten clusters: say so wherever the number is shown."""
        return self.clusters < EXPLORATORY


def _values(values: Iterable[float], name: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, dtype=float)
    if array.ndim != 1:
        raise StkitError(f"{name} has shape {array.shape}: give one number a question")
    bad = array[~((array >= low) & (array <= high))]
    if bad.size:
        raise StkitError(f"{name} holds {bad[0]}: give numbers from {low:g} to {high:g}, without what was not scored")
    return array


def _codes(groups: Iterable[Hashable], n: int) -> np.ndarray:
    """(n,) the number of each question's cluster, in order of appearance."""
    seen: dict = {}
    codes = np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=int)
    if len(codes) != n:
        raise StkitError(f"{len(codes)} groups for {n} questions: give one group a question")
    return codes


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise BadUse(f"level={level}: give a number between 0 and 1, such as 0.95")
    return (1 + level) / 2


def _clopper_pearson(right: np.ndarray, n: np.ndarray | float, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact binomial bounds for ``right`` of ``n``, both of which may be fractions of a cluster."""
    wrong, tiny = n - right, 1e-9
    low = np.where(right > tiny, stats.beta.ppf(1 - tail, np.maximum(right, tiny), wrong + 1), 0.0)
    high = np.where(wrong > tiny, stats.beta.ppf(tail, right + 1, np.maximum(wrong, tiny)), 1.0)
    return low, high


def interval_of_counts(right: np.ndarray, size: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of an accuracy from counts by cluster: Wilson's interval on the effective sample size, with a t quantile.

    The variance is the leave-one-cluster-out one (CR3) and gives the effective sample size, mean (1 - mean) / variance.
    The degrees of freedom are the effective number of clusters (sum of sizes squared over sum of squares) less one;
    near 0 and 1 they are at most k (1 + 20 mean (1 - mean)), k the effective number of clusters that hold the rarer
    outcome: two failures in one of 100 clusters tell of one cluster, not of 100. It is never wider than
    Clopper-Pearson's interval on whole clusters, which holds whatever the correlation is and which alone is used where
    the variance is zero.

    Args:
        right: (..., G) right answers in each cluster.
        size: (G,) questions in each cluster, each at least 1.
        level: of confidence.

    Returns:
        Low and high, each of shape (...).

    Source: Korn and Graubard 1998 and Dean and Pagano 2015 (Wilson on the effective size), Carter, Schnepel and
    Steigerwald 2017 (effective clusters). Deviation: the bound near 0 and 1 is ours, chosen by simulation
    (tests/test_stats.py).
    """
    tail, right, size = _level(level), np.asarray(right, float), np.asarray(size, float)
    n, effective = size.sum(), size.sum() ** 2 / (size**2).sum()
    mean = right.sum(-1) / n
    spread = mean * (1 - mean)
    low, high = _clopper_pearson(effective * mean, effective, tail)
    if size.size < 2:
        return low, high
    residual = (right - size * mean[..., None]) / (1 - size / n)
    variance = (size.size - 1) / size.size * (residual**2).sum(-1) / n**2
    known = variance > 1e-15
    rarer = np.where(mean[..., None] <= 0.5, right, size - right)
    k = np.where(known, rarer.sum(-1) ** 2 / np.maximum((rarer**2).sum(-1), 1e-12), 1.0)
    freedom = np.clip(np.minimum(effective - 1, k * (1 + 20 * spread)), 0.5, None)
    t2 = stats.t.ppf(tail, freedom) ** 2
    sample = np.where(known, spread / np.where(known, variance, 1.0), 1.0)
    centre = (mean + t2 / (2 * sample)) / (1 + t2 / sample)
    half = np.sqrt(t2 * (spread / sample + t2 / (4 * sample**2))) / (1 + t2 / sample)
    return (
        np.where(known, np.maximum(low, centre - half), low),
        np.where(known, np.minimum(high, centre + half), high),
    )


def clustered_interval(correct: Sequence[float], groups: Sequence[Hashable], level: float = 0.95) -> Interval:
    """Accuracy with a cluster-robust interval that has a width even when all answers are right, or all wrong.

    Args:
        correct: (n,) 0 or 1 (or a part of 1) for each question.
        groups: (n,) the cluster of each question.
        level: of confidence.

    Returns:
        Mean, low and high in [0, 1]; NaN for no question at all.

    Raises:
        StkitError: a value outside [0, 1] or NaN, or another number of groups.
    """
    correct = _values(correct, "correct")
    codes, n = _codes(groups, len(correct)), len(correct)
    if not n:
        _level(level)
        return Interval(math.nan, math.nan, math.nan, 0, 0, "undefined: no questions")
    size, right = np.bincount(codes).astype(float), np.bincount(codes, correct)
    low, high = interval_of_counts(right, size, level)
    if len(size) == 1:
        method = "Clopper-Pearson on one cluster: next to nothing is known"
    elif np.ptp(right / size) < 1e-12:
        method = "Clopper-Pearson on whole clusters (no variance between them)"
    else:
        method = "cluster-robust Wilson with t"
    return Interval(float(correct.mean()), float(low), float(high), n, len(size), method)


def _difference(first: np.ndarray, second: np.ndarray, sizes: Sequence[np.ndarray], n: int, level: float) -> Interval:
    """Mean of the first part minus mean of the second, from the two parts' own intervals and their correlation.

    Args:
        first: (G,) sum over each cluster's questions of the first part, each in [0, 1].
        second: (G,) of the second part.
        sizes: the two parts' questions by cluster, (G,) each; a cluster may be absent (0) from one part.

    Source: Zou and Donner 2008 (MOVER), Newcombe 1998 (the same for paired proportions).
    """
    means, lows, highs, shares = [], [], [], []
    for right, size in zip((first, second), sizes):
        there = size > 0
        low, high = interval_of_counts(right[there], size[there], level)
        means.append(right.sum() / size.sum())
        lows.append(means[-1] - float(low))
        highs.append(float(high) - means[-1])
        shares.append((right - size * means[-1]) / size.sum())
    product = np.linalg.norm(shares[0]) * np.linalg.norm(shares[1])
    r = float(shares[0] @ shares[1] / product) if product > 1e-15 else 0.0
    below = math.sqrt(max(lows[0] ** 2 + highs[1] ** 2 - 2 * r * lows[0] * highs[1], 0.0))
    above = math.sqrt(max(highs[0] ** 2 + lows[1] ** 2 - 2 * r * highs[0] * lows[1], 0.0))
    mean = float(means[0] - means[1])
    method = "MOVER of cluster-robust Wilson with t"
    return Interval(mean, max(mean - below, -1.0), min(mean + above, 1.0), n, len(first), method)


def paired_difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable], level: float = 0.95
) -> Interval:
    """Mean of a - b over the same questions, with a cluster-robust interval in [-1, 1].

    Args:
        a: (n,) 0 or 1 for each question, of the first run.
        b: (n,) of the second run, same questions in the same order.
        groups: (n,) the cluster of each question.
        level: of confidence.

    Returns:
        The difference; NaN for no question at all.
    """
    a, b = _values(a, "a"), _values(b, "b")
    if len(a) != len(b):
        raise StkitError(f"{len(a)} and {len(b)} answers: a paired difference needs both for each question")
    codes = _codes(groups, len(a))
    if not len(a):
        return Interval(math.nan, math.nan, math.nan, 0, 0, "undefined: no questions")
    gains, losses = np.bincount(codes, np.maximum(a - b, 0)), np.bincount(codes, np.maximum(b - a, 0))
    size = np.bincount(codes)
    return _difference(gains, losses, (size, size), len(a), level)


def difference_of_parts(
    correct: Sequence[float], in_first: Sequence[bool], groups: Sequence[Hashable], level: float = 0.95
) -> Interval:
    """Accuracy on one part of the questions minus accuracy on the rest (forward minus reverse), paired within clusters.

    Args:
        correct: (n,) 0 or 1 for each question.
        in_first: (n,) whether the question is in the first part.
        groups: (n,) the cluster of each question.
        level: of confidence.

    Returns:
        The difference, in [-1, 1]; NaN where a part is empty.
    """
    correct, first = _values(correct, "correct"), _values(in_first, "in_first") > 0.5
    if len(first) != len(correct):
        raise StkitError(f"{len(first)} marks for {len(correct)} questions: give one a question")
    codes = _codes(groups, len(correct))
    if not first.any() or first.all():
        clusters = len(set(codes.tolist()))
        return Interval(math.nan, math.nan, math.nan, len(correct), clusters, "undefined: a part holds no questions")
    rights, sizes = zip(*[(np.bincount(codes, correct * part), np.bincount(codes, part)) for part in (first, ~first)])
    return _difference(rights[0], rights[1], sizes, len(correct), level)


def permutation_p(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable], seed: int = 0) -> float:
    """Two-sided paired permutation test: in each cluster the two runs are exchanged, or not.

    Exact up to 13 clusters (all exchanges are tried), else from 9,999 exchanges drawn with ``seed``.

    Args:
        a: (n,) 0 or 1 for each question, of the first run.
        b: (n,) of the second run, same questions in the same order.
        groups: (n,) the cluster of each question.
        seed: of the exchanges.

    Returns:
        p; NaN for no question at all.
    """
    a, b = _values(a, "a"), _values(b, "b")
    if len(a) != len(b):
        raise StkitError(f"{len(a)} and {len(b)} answers: a paired test needs both for each question")
    codes = _codes(groups, len(a))
    if not len(a):
        return math.nan
    if codes.max() == 0:  # one cluster: the exchange gives the same difference the other way round
        return 1.0
    result = stats.permutation_test(
        (np.bincount(codes, a - b),),
        lambda x, axis: x.sum(axis=axis),
        vectorized=True,
        permutation_type="samples",
        n_resamples=9999,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(min(result.pvalue, 1.0))


def above_chance_p(correct: Sequence[float], chance: float | Sequence[float], groups: Sequence[Hashable]) -> float:
    """One-sided p of "no better than chance": cluster-robust t with G - 1 degrees of freedom.

    The variance is at least the binomial one under chance, so that answers that are all right give no p of zero.

    Args:
        correct: (n,) 0 or 1 for each question.
        chance: the probability to be right by chance, one for all or (n,), strictly between 0 and 1.
        groups: (n,) the cluster of each question.

    Returns:
        p; 1.0 for a single cluster, which proves nothing; NaN for no question at all.
    """
    correct = _values(correct, "correct")
    chance = np.broadcast_to(np.asarray(chance, float), correct.shape)
    codes, n = _codes(groups, len(correct)), len(correct)
    if not n:
        return math.nan
    if not ((chance > 0) & (chance < 1)).all():
        raise StkitError(f"chance={chance.min():g} to {chance.max():g}: give numbers between 0 and 1")
    gain = correct - chance
    clusters = codes.max() + 1
    if clusters == 1:
        return 1.0
    robust = clusters / (clusters - 1) * (np.bincount(codes, gain - gain.mean()) ** 2).sum()
    variance = max(robust, (chance * (1 - chance)).sum()) / n**2
    return float(stats.t.sf(gain.mean() / math.sqrt(variance), clusters - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: reject those under the family level. A NaN is no test, and stays NaN."""
    tests = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, highest = {}, 0.0
    for rank, (p, name) in enumerate(tests):
        highest = max(highest, min(1.0, p * (len(tests) - rank)))
        adjusted[name] = highest
    return {name: adjusted.get(name, math.nan) for name in p_values}


def clips_needed(
    difference: float,
    accuracy: float = 0.5,
    questions_per_clip: int = 8,
    icc: float = 0.1,
    power: float = 0.8,
    level: float = 0.95,
    paired: bool = False,
    correlation: float = 0.5,
) -> int:
    """How many clips show a difference in accuracy.

    The smallest G with ``G >= (t_(1 - alpha/2) + t_power)^2 V D / (m x^2)``: x the difference, m questions a clip,
    design effect ``D = 1 + (m - 1) icc``, ``V = p q + p' q' - 2 r sqrt(p q p' q')`` with p the accuracy, p' = p + x
    (p - x where that is over 1) and r the correlation of the two answers to one question (0 unless paired); t with
    G - 1 degrees of freedom (2 G - 2 unpaired).

    Args:
        difference: x, between 0 and 1; its sign doesn't matter.
        accuracy: of the worse side.
        questions_per_clip: m.
        icc: intra-cluster correlation, 0 to 1.
        power: probability to find the difference.
        level: of confidence, two-sided.
        paired: both sides answer the same clips; otherwise each side has G clips of its own.
        correlation: r, when paired.

    Returns:
        G, for each side.
    """
    x, m, tail = abs(difference), questions_per_clip, _level(level)
    checks = {"difference": 0 < x < 1, "accuracy": 0 <= accuracy <= 1, "questions_per_clip": m >= 1}
    checks |= {"icc": 0 <= icc <= 1, "power": 0 < power < 1, "correlation": -1 <= correlation < 1}
    given = {"difference": difference, "accuracy": accuracy, "questions_per_clip": m, "icc": icc}
    given |= {"power": power, "correlation": correlation}
    for name, good in checks.items():
        if not good:
            raise BadUse(f"{name}={given[name]} is out of range: help(clips_needed) tells the ranges")
    other = accuracy + x if accuracy + x <= 1 else accuracy - x
    if other < 0:
        raise BadUse(f"difference={difference} from accuracy={accuracy} leaves 0 to 1: give a smaller difference")
    one, two = accuracy * (1 - accuracy), other * (1 - other)
    variance = one + two - 2 * (correlation if paired else 0.0) * math.sqrt(one * two)
    scale = variance * (1 + (m - 1) * icc) / (m * x**2)

    def needed(clips: int) -> float:
        freedom = clips - 1 if paired else 2 * clips - 2
        return (stats.t.ppf(tail, freedom) + stats.t.ppf(power, freedom)) ** 2 * scale

    clips = max(2, math.floor((stats.norm.ppf(tail) + stats.norm.ppf(power)) ** 2 * scale))
    while clips < needed(clips):
        clips += 1
    return clips
