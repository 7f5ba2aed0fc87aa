"""Intervals cover, tests keep their level, counts of clips give their power: by simulation and by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats as reference

from stkit import stats
from stkit.runs import to_json
from stkit.runtime import BadUse, StkitError

UNEQUAL = (1, 1, 2, 3)


def draw(accuracy, icc, sizes, rng, times, shape="beta"):
    """(times, G) right answers by cluster, of the given accuracy and intra-cluster correlation."""
    if icc == 0:
        chances = np.full((times, len(sizes)), accuracy)
    elif shape == "beta":
        chances = rng.beta(accuracy * (1 / icc - 1), (1 - accuracy) * (1 / icc - 1), (times, len(sizes)))
    else:  # a share icc of the clusters answers all its questions alike
        alike = rng.random((times, len(sizes))) < icc
        chances = np.where(alike, rng.random((times, len(sizes))) < accuracy, accuracy)
    return rng.binomial(np.asarray(sizes), chances)


def coverage(accuracy, icc, sizes, times=1500, seed=0, shape="beta"):
    right = draw(accuracy, icc, sizes, np.random.default_rng(seed), times, shape)
    low, high = stats.interval_of_counts(right, sizes)
    return float(((low <= accuracy + 1e-12) & (accuracy - 1e-12 <= high)).mean())


def sizes_of(clusters, questions, unequal=False):
    return np.resize([questions * f for f in (UNEQUAL if unequal else (1,))], clusters)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("clusters", [8, 12, 30, 200])
def test_the_interval_covers_93_to_97_percent_in_the_middle(clusters, unequal):
    found = {
        (questions, accuracy, icc): coverage(
            accuracy, icc, sizes_of(clusters, questions, unequal), times=240_000 // max(clusters, 40)
        )
        for questions, accuracy, icc in itertools.product((4, 8, 20), (0.3, 0.5, 0.7), (0, 0.1, 0.3))
    }
    assert min(found.values()) >= 0.93, min(found.items(), key=lambda item: item[1])
    assert max(found.values()) <= 0.97, max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize("accuracy", [0.02, 0.05, 0.1, 0.2, 0.9, 0.98])
def test_near_0_and_1_and_for_few_or_small_clusters_the_interval_still_holds(accuracy):
    equal, unequal = {}, {}
    for clusters, questions, icc in itertools.product((2, 3, 5, 8, 30, 100), (1, 2, 4, 20), (0, 0.1, 0.3, 0.6)):
        if questions > 1 or icc == 0:
            equal[clusters, questions, icc] = coverage(accuracy, icc, sizes_of(clusters, questions))
            unequal[clusters, questions, icc] = coverage(accuracy, icc, sizes_of(clusters, questions, True))
    assert min(equal.values()) >= 0.925, min(equal.items(), key=lambda item: item[1])
    assert min(unequal.values()) >= 0.91, min(unequal.items(), key=lambda item: item[1])


def test_the_plain_cluster_robust_interval_would_not_hold_near_1():
    sizes = sizes_of(20, 4)
    right = draw(0.98, 0.1, sizes, np.random.default_rng(0), 2000)
    mean = right.sum(1) / sizes.sum()
    residual = right - sizes * mean[:, None]
    half = reference.t.ppf(0.975, 19) * np.sqrt(20 / 19 * (residual**2).sum(1)) / sizes.sum()
    assert (np.abs(mean - 0.98) <= half).mean() < 0.84
    assert coverage(0.98, 0.1, sizes) >= 0.93


def test_clusters_that_answer_alike_are_covered_too():
    found = [
        coverage(a, 0.3, sizes_of(g, m), shape="alike") for g in (10, 40) for m in (4, 10) for a in (0.3, 0.5, 0.7)
    ]
    assert 0.93 <= min(found) and max(found) <= 0.98


def test_the_interval_of_questions_is_the_interval_of_their_counts():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 7, 15)
    groups = np.repeat([f"walk {i}" for i in range(15)], sizes)
    correct = rng.integers(0, 2, len(groups))
    right = [int(correct[groups == f"walk {i}"].sum()) for i in range(15)]
    low, high = stats.interval_of_counts(np.array(right), sizes)
    order = rng.permutation(len(groups))
    found = stats.clustered_interval(correct[order].tolist(), groups[order].tolist())
    assert (found.low, found.high) == pytest.approx((float(low), float(high)))
    assert (found.mean, found.n, found.clusters) == (pytest.approx(correct.mean()), len(groups), 15)


def test_with_many_equal_clusters_of_one_it_is_wilsons_interval():
    correct = [1] * 600 + [0] * 1400
    found = stats.clustered_interval(correct, range(2000))
    wilson = reference.binomtest(600, 2000).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=2e-4)


@pytest.mark.parametrize("correct", [[1] * 40, [0] * 40, [1, 0] * 20, [1, 1, 1, 0] * 10])
@pytest.mark.parametrize("per_cluster", [1, 4, 20, 40])
def test_no_interval_is_without_width_or_outside_0_to_1(correct, per_cluster):
    found = stats.clustered_interval(correct, [i // per_cluster for i in range(40)])
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low > 0.05
    assert isinstance(found.low, float) and found.method


def test_all_right_is_as_sure_as_the_number_of_clusters_allows():
    found = stats.clustered_interval([1] * 80, [i // 4 for i in range(80)])
    exact = reference.binomtest(20, 20).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, 1.0))


def test_one_cluster_tells_next_to_nothing_and_says_so():
    found = stats.clustered_interval([1, 1, 0, 1], ["a"] * 4)
    assert found.high - found.low > 0.9 and "one cluster" in found.method and found.exploratory


def test_under_ten_clusters_is_exploratory():
    assert stats.clustered_interval([1, 0] * 9, [i // 2 for i in range(18)]).exploratory
    assert not stats.clustered_interval([1, 0] * 10, [i // 2 for i in range(20)]).exploratory


def test_no_questions_give_nan_and_null_in_json_never_zero():
    for found in (
        stats.clustered_interval([], []),
        stats.paired_difference([], [], []),
        stats.difference_of_parts([1, 0], [True, True], ["a", "b"]),
    ):
        assert all(math.isnan(v) for v in (found.mean, found.low, found.high))
        assert '"mean": null' in to_json(dataclasses.asdict(found))
    assert math.isnan(stats.permutation_p([], [], [])) and math.isnan(stats.above_chance_p([], 0.25, []))


@pytest.mark.parametrize("bad", [[1, math.nan], [1, 2], [1, -1]])
def test_answers_that_are_no_answers_are_refused_by_value(bad):
    with pytest.raises(StkitError, match="correct holds"):
        stats.clustered_interval(bad, ["a", "b"])


def test_lengths_that_differ_and_levels_that_make_no_sense_are_refused():
    with pytest.raises(StkitError, match="3 groups for 2"):
        stats.clustered_interval([1, 0], "abc")
    with pytest.raises(StkitError, match="needs both"):
        stats.paired_difference([1, 0], [1], "ab")
    with pytest.raises(BadUse, match="level=95"):
        stats.clustered_interval([1, 0], "ab", level=95)
    with pytest.raises(StkitError, match="chance=0"):
        stats.above_chance_p([1, 0], 0.0, "ab")


def differences(up, down, icc, clusters, questions, times, seed=0):
    """Yield (a, b, groups): a alone is right with probability up, b alone with probability down."""
    rng, groups = np.random.default_rng(seed), np.repeat(np.arange(clusters), questions)
    weights = np.array([up, down, 1 - up - down])
    for _ in range(times):
        chances = rng.dirichlet(weights * (1 / icc - 1), clusters) if icc else np.tile(weights, (clusters, 1))
        kind = (rng.random(len(groups))[:, None] > chances.cumsum(1)[groups]).sum(1)
        yield (kind == 0).astype(float), (kind == 1).astype(float), groups


@pytest.mark.parametrize("up, down", [(0.3, 0.3), (0.2, 0.05), (0.05, 0.001)])
@pytest.mark.parametrize("icc", [0, 0.3])
def test_the_interval_of_a_paired_difference_covers(up, down, icc):
    for clusters, questions in ((8, 8), (60, 4)):
        found = [stats.paired_difference(*case) for case in differences(up, down, icc, clusters, questions, 300)]
        assert np.mean([f.low <= up - down <= f.high for f in found]) >= 0.92


def test_a_paired_difference_is_the_mean_of_the_differences_and_has_a_width():
    groups = [i // 4 for i in range(80)]
    same, apart = (
        stats.paired_difference([1] * 80, [1] * 80, groups),
        stats.paired_difference([1] * 80, [0] * 80, groups),
    )
    assert same.mean == 0 and same.low < -0.05 and same.high > 0.05
    assert apart.mean == 1 and 0.6 < apart.low < 0.95 and apart.high == 1
    mixed = stats.paired_difference([1, 1, 0, 0] * 20, [1, 0, 1, 0] * 20, groups)
    assert mixed.mean == 0 and mixed.low < 0 < mixed.high and (mixed.n, mixed.clusters) == (80, 20)


def test_pairing_makes_the_interval_of_a_difference_narrower():
    rng = np.random.default_rng(0)
    groups, easy = np.repeat(np.arange(40), 6), np.repeat(rng.random(40) < 0.5, 6)
    a = np.where(rng.random(240) < 0.05, ~easy, easy).astype(float)
    b = np.where(rng.random(240) < 0.05, ~easy, easy).astype(float)
    paired, alone = stats.paired_difference(a, b, groups), stats.clustered_interval(a, groups)
    assert paired.high - paired.low < (alone.high - alone.low) / 2


@pytest.mark.parametrize("icc", [0, 0.3])
def test_the_interval_of_forward_minus_reverse_covers(icc):
    rng, hits = np.random.default_rng(1), 0
    groups, first = np.repeat(np.arange(30), 8), np.tile([True] * 4 + [False] * 4, 30)
    for _ in range(400):
        ease = rng.beta(0.6 * (1 / icc - 1), 0.4 * (1 / icc - 1), 30) if icc else np.full(30, 0.6)
        chance = np.where(first, ease[groups], 0.75 * ease[groups])
        found = stats.difference_of_parts(rng.random(240) < chance, first, groups)
        hits += found.low <= 0.15 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_forward_minus_reverse_is_the_difference_of_the_two_accuracies():
    found = stats.difference_of_parts([1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], list("aabbcc"))
    assert found.mean == pytest.approx(2 / 3 - 1 / 3) and -1 <= found.low < found.mean < found.high <= 1


def test_the_permutation_test_is_exact_for_few_clusters():
    a, b, groups = [1, 1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 1, 0], list("aabbccdd")
    gains = [2, 0, 1, 0]  # by hand: a - b summed over each of the clusters
    signed = [sum(s * g for s, g in zip(signs, gains)) for signs in itertools.product((1, -1), repeat=4)]
    assert stats.permutation_p(a, b, groups) == pytest.approx(np.mean(np.abs(signed) >= sum(gains)))
    assert stats.permutation_p(a, a, groups) == 1.0


def test_the_permutation_test_is_the_same_for_the_same_seed():
    a, b, groups = next(differences(0.3, 0.2, 0.1, 60, 4, 1))
    assert stats.permutation_p(a, b, groups, seed=1) == stats.permutation_p(a, b, groups, seed=1)
    assert stats.permutation_p(a, b, groups, seed=1) == pytest.approx(
        stats.permutation_p(a, b, groups, seed=2), abs=0.03
    )


def test_the_permutation_test_keeps_its_level_under_clustering():
    found = [stats.permutation_p(*case) for case in differences(0.2, 0.2, 0.4, 12, 6, 150)]
    assert np.mean(np.array(found) <= 0.05) <= 0.08


def test_the_test_against_chance_keeps_its_level_and_sees_what_is_there():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(40), 6)

    def p_values(accuracy):
        rights = [rng.random(240) < rng.beta(accuracy * 9, (1 - accuracy) * 9, 40)[groups] for _ in range(600)]
        return np.array([stats.above_chance_p(right, 0.25, groups) for right in rights])

    assert np.mean(p_values(0.25) <= 0.05) <= 0.07
    assert np.mean(p_values(0.40) <= 0.05) >= 0.95
    assert stats.above_chance_p(np.zeros(240), 0.25, groups) > 0.99


def test_all_right_is_significant_but_never_of_p_zero_and_one_cluster_proves_nothing():
    assert 0 < stats.above_chance_p([1] * 40, 0.25, [i // 4 for i in range(40)]) < 1e-4
    assert stats.above_chance_p([1] * 40, 0.25, ["a"] * 40) == 1.0
    chances = [0.25, 0.5] * 20
    assert 0 < stats.above_chance_p([1] * 40, chances, [i // 4 for i in range(40)]) < 1e-2


def test_holm_is_the_stepwise_one_worked_by_hand():
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "none": math.nan})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "none": math.nan}, nan_ok=True)
    assert stats.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and stats.holm({}) == {}


def test_the_number_of_clips_gives_the_power_it_promises():
    clips = stats.clips_needed(0.12, accuracy=0.5, questions_per_clip=8, icc=0.2)
    rng, found = np.random.default_rng(2), 0
    for _ in range(1000):
        a, b = (rng.binomial(8, rng.beta(4 * p, 4 * (1 - p), clips)) / 8 for p in (0.5, 0.62))
        found += reference.ttest_ind(a, b).pvalue < 0.05
    assert 0.76 <= found / 1000 <= 0.86


def test_the_number_of_clips_gives_its_power_to_a_paired_comparison_too():
    # a - b is 1 in 0.26 and -1 in 0.14 of the questions: its variance is 0.3856, and for this r so is
    # 0.25 + 0.2356 - 2 r sqrt(0.25 x 0.2356)
    r = 0.1 / (2 * math.sqrt(0.25 * 0.2356))
    clips = stats.clips_needed(0.12, accuracy=0.5, questions_per_clip=8, icc=0.2, paired=True, correlation=r)
    cases = differences(0.26, 0.14, 0.2, clips, 8, 1000)
    found = [reference.ttest_1samp((a - b).reshape(clips, 8).mean(1), 0).pvalue < 0.05 for a, b, _ in cases]
    assert 0.76 <= np.mean(found) <= 0.86


def test_more_clips_are_needed_for_smaller_differences_and_fewer_when_paired():
    assert stats.clips_needed(0.05) > stats.clips_needed(0.1) > stats.clips_needed(0.2) >= 2
    assert stats.clips_needed(0.1, paired=True) < stats.clips_needed(0.1)
    assert stats.clips_needed(0.1, icc=0.5) > stats.clips_needed(0.1, icc=0.1)
    # By hand, normal quantiles: (1.95996 + 0.84162)^2 x (0.25 + 0.24) x 1.7 / (8 x 0.01) = 81.7, and one for the t.
    assert stats.clips_needed(0.1) in (82, 83)


@pytest.mark.parametrize(
    "wrong", [{"difference": 0}, {"difference": 1.5}, {"power": 1}, {"icc": -1}, {"questions_per_clip": 0}]
)
def test_a_count_of_clips_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(BadUse, match=next(iter(wrong))):
        stats.clips_needed(**{"difference": 0.1} | wrong)


def test_one_cluster_cannot_tell_two_runs_apart():
    assert stats.permutation_p([1.0, 1.0], [0.0, 0.0], ["g", "g"]) == 1.0
