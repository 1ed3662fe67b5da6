import math

import numpy as np
import pytest
from scipy import stats

from tuner.verify.statistics import (
    Estimate,
    chosen_tails,
    holm,
    mean,
    share_best,
)


def test_the_interval_of_a_mean_is_students_t():
    values = [1.0, 2.0, 4.0, 5.0]
    low, high = mean(values).interval(0.95)
    expected = stats.t.interval(0.95, 3, loc=3.0, scale=np.std(values, ddof=1) / 2)
    assert (low, high) == pytest.approx(expected)


def test_one_value_says_nothing_about_its_own_error():
    single = mean([3.0])
    assert single.interval() == (-math.inf, math.inf)
    assert single.doubt(100.0) == 1.0


def test_doubt_is_the_one_sided_p_value_of_the_t_test():
    values = [-0.2, -0.1, -0.15, -0.05]
    assert mean(values).doubt(0.0) == pytest.approx(stats.ttest_1samp(values, 0, alternative="less").pvalue, rel=0.01)
    assert mean(values).opposite().doubt(0.0) == pytest.approx(1 - mean(values).doubt(0.0), rel=0.01)


def test_the_interval_touches_zero_exactly_where_doubt_equals_its_tail():
    estimate = Estimate(-0.08, ((0.0009, 6.0), (0.0004, 2.0)))
    tail = estimate.doubt(0.0)
    assert estimate.between(tail, tail)[1] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("launches, windows", [(0.023, 0.025), (0.023, 0.05), (0.023, 0.005)])
def test_intervals_of_two_sources_of_noise_cover_at_least_as_often_as_they_say(launches: float, windows: float):
    """Fifteen degrees of freedom for launches, two for windows: where Satterthwaite's t covers 92 to 95 %."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(4000):
        seen = (launches**2 * rng.chisquare(15) / 15, windows**2 * rng.chisquare(2) / 2)
        low, high = Estimate(rng.normal(0, math.hypot(launches, windows)), ((seen[0], 15), (seen[1], 2))).interval()
        hits += low <= 0 <= high
    assert 0.945 <= hits / 4000 <= 0.985


def test_degrees_of_freedom_of_a_sum_are_those_of_its_larger_part():
    assert Estimate(0.0, ((4.0, 3.0), (1e-9, 50.0))).freedom == pytest.approx(3.0)
    assert Estimate(0.0, ((2.0, 3.0), (1.0, 2.0))).freedom == pytest.approx(3**2 / (4 / 3 + 1 / 2))
    assert Estimate(0.0, ((0.0, 3.0), (0.0, 2.0))).freedom == 3.0
    assert Estimate(0.0, ((4.0, 3.0), (1.0, 0.0))).freedom == Estimate(0.0, ()).freedom == 0.0


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # the textbook's example: 3 p1, 2 p2, p2 again
    assert holm([]) == []


def test_a_test_with_more_weight_is_corrected_less():
    favoured, other = holm([0.02, 0.02], [9.0, 1.0])
    assert favoured == pytest.approx(0.02 * 10 / 9)
    assert other == pytest.approx(favoured)  # the last one left keeps its own, but not below the one before


def test_tails_of_a_chosen_minimum_leave_more_room_above():
    below, above = chosen_tails(4)
    assert above < 0.025 < below
    assert below + above == pytest.approx(0.05)
    assert chosen_tails(1) == pytest.approx((0.025, 0.025), abs=0.0005)


@pytest.mark.parametrize("candidates", [2, 4])
def test_the_interval_of_the_lowest_of_equal_means_still_covers(candidates: int):
    rng = np.random.default_rng(1)
    below, above = chosen_tails(candidates)
    lowest = rng.normal(size=(20000, candidates)).min(axis=1)
    covered = (lowest <= stats.norm.isf(below)) & (lowest >= -stats.norm.isf(above))
    assert covered.mean() == pytest.approx(0.95, abs=0.006)
    if candidates == 4:  # what the usual interval would do
        assert (np.abs(lowest) <= 1.96).mean() < 0.92


def test_share_best_counts_how_often_each_is_lowest():
    assert share_best(np.array([[1.0, 2.0], [3.0, 2.0], [0.0, 1.0], [5.0, 6.0]])) == pytest.approx([0.75, 0.25])
