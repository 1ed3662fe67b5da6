"""Quantiles are order statistics, and their intervals cover as often as they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from tuner.measure import quantile

samples = st.lists(st.floats(0, 1e6) | st.just(math.inf), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("n", "q", "expected"),
    [
        (100, 0.99, 99),  # not the maximum
        (100, 0.5, 50),
        (1, 0.99, 1),
        (3, 0.5, 2),
        (1000, 0.999, 999),  # 0.999 * 1000 is a little over 999 in floating point
        (10, 0.07, 1),
    ],
)
def test_rank_is_the_nearest_rank(n, q, expected):
    assert quantile.rank(n, q) == expected


@given(samples, st.sampled_from([0.01, 0.5, 0.9, 0.99]))
def test_a_quantile_is_a_value_of_the_sample_with_enough_below_it(values, q):
    value, (low, high) = quantile.summary(np.array(values), q)
    assert value in values and low <= value <= high
    assert sum(v <= value for v in values) >= q * len(values) - 1e-9
    assert sum(v < value for v in values) < q * len(values)


@given(st.integers(1, 3000), st.floats(0.01, 0.99))
def test_intervals_have_at_least_95_per_cent_by_the_binomial_itself(n, q):
    low, high = quantile.interval_ranks(n, q)
    covered = binom.cdf(high - 1, n, q) - (binom.cdf(low - 1, n, q) if low > 0 else 0.0)
    assert covered >= 0.95 - 1e-9
    # and are no wider than they must be, tail by tail
    assert low == 0 or binom.cdf(low - 1, n, q) < 0.025
    assert high > n or binom.sf(high - 2, n, q) > 0.025


def test_intervals_cover_the_true_quantile_of_any_distribution():
    rng = np.random.default_rng(1)
    for draw, truth in (
        (lambda n: rng.exponential(1, n), -math.log(0.1)),
        (lambda n: rng.pareto(1.2, n), 0.1 ** (-1 / 1.2) - 1),
    ):
        hits = 0
        for _ in range(400):
            _, (low, high) = quantile.summary(draw(200), 0.9)
            hits += low <= truth <= high
        assert hits / 400 > 0.925


def test_too_few_requests_bound_a_high_percentile_from_one_side_only():
    _, (low, high) = quantile.summary(np.arange(100.0), 0.99)
    assert 0 < low < 99 and high == math.inf
    _, (_, high) = quantile.summary(np.arange(1000.0), 0.99)
    assert high < math.inf
    assert quantile.summary(np.arange(1.0, 7.0), 0.5) == (3.0, (1.0, 6.0))  # the whole sample just bounds its median


def test_failures_are_the_largest_values():
    values = np.array([1.0] * 98 + [math.inf] * 2)
    assert quantile.summary(values, 0.98)[0] == 1.0
    assert quantile.summary(values, 0.99)[0] == math.inf


@given(st.lists(st.lists(st.integers(0, 10**9) | st.just(0), max_size=30), min_size=1, max_size=8), st.data())
def test_selecting_from_parts_is_sorting_the_whole(parts, data):
    arrays = [np.array(part, dtype=np.int64) for part in parts]
    whole = np.sort(np.concatenate(arrays))
    if not len(whole):
        return
    ranks = data.draw(st.lists(st.integers(1, len(whole)), min_size=1, max_size=6, unique=True))
    assert quantile.select(arrays, ranks) == {k: whole[k - 1] for k in ranks}


@given(st.integers(0, 50), st.integers(1, 50))
def test_shares_have_clopper_and_pearsons_interval(k, extra):
    n = k + extra
    low, high = quantile.proportion(k, n)
    assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0.0)
    assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k))


def test_the_share_beyond_a_limit_lies_on_the_percentiles_and_on_lines_between_and_beyond_them():
    values, levels = [1.0, 2.0, 4.0], [0.5, 0.1, 0.01]
    assert [quantile.beyond(x, values, levels) for x in values] == levels
    assert quantile.beyond(math.sqrt(2), values, levels) == pytest.approx(math.sqrt(0.05))
    assert quantile.beyond(8.0, values, levels) == pytest.approx(0.001)
    assert quantile.beyond(0.5, [2.0, 4.0], [0.5, 0.1]) == 0.875
    assert quantile.beyond(0.5, values, levels) == 0.75 and quantile.beyond(-1.0, values, levels) == 1.0
    assert quantile.beyond(2.0, [1.0], [0.01]) == pytest.approx(1e-4)  # one alone: exponentially
    assert quantile.beyond(9.0, [1.0, 2.0, 2.0], levels) == quantile.RARE
    assert quantile.beyond(2.0, [1.0, 2.0, 2.0], levels) == 0.01
