"""Quantiles as order statistics, with exact confidence intervals, over samples too large to hold as well."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

CONFIDENCE = 0.95
RARE = 1e-6  # no share of observations below this is told from quantiles


def rank(n: int, q: float) -> int:
    """The nearest-rank quantile's position, from 1: the smallest k with k / n >= q."""
    return min(n, max(1, math.ceil(q * n - 1e-9 * n * q)))


def interval_ranks(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """Positions (from 1) of the order statistics that enclose the true q-quantile with at least ``confidence``.

    The number of observations below the true quantile is binomial(n, q), whatever the distribution, so
    P(x_(lo) <= quantile < x_(hi)) = P(lo <= B <= hi - 1). Both tails get half of the error. ``lo`` 0 means that the
    sample bounds nothing from below, ``hi`` n + 1 that it bounds nothing from above: it is too small for that
    quantile. (David & Nagaraja, Order Statistics, 3rd ed., section 7.1.)
    """
    tail = (1.0 - confidence) / 2
    return _binomial_ppf(tail, n, q), _binomial_ppf(1.0 - tail, n, q) + 1


def _binomial_ppf(p: float, n: int, q: float) -> int:
    """The smallest k with P(B <= k) >= p for B binomial(n, q)."""
    first, below = _binomial_cdf(n, q)
    return first + int(np.searchsorted(below, p))


def _binomial_cdf(n: int, q: float) -> tuple[int, np.ndarray]:
    """``(first, P(B <= first), P(B <= first + 1), ...)`` of B binomial(n, q), as far as it is neither 0 nor 1 by more
    than the rounding of a float: from the ratios of successive probabilities, which sum to 1. (SciPy has it too, and
    takes longer to import than everything else that a replay does after its last response.)"""
    spread = 9 * math.sqrt(n * q * (1 - q)) + 40
    first, last = max(0, math.floor(n * q - spread)), min(n, math.ceil(n * q + spread))
    k = np.arange(first + 1, last + 1)
    with np.errstate(divide="ignore"):
        log = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k) + (np.log(q) - np.log1p(-q)))])
    mass = np.exp(log - log.max())
    below = np.cumsum(mass)
    return first, below / below[-1]


def summary(values: np.ndarray, q: float) -> tuple[float, tuple[float, float]]:
    """The q-quantile of ``values`` (n,) and its interval; failures are +inf in ``values``. (nan, (0, inf)) where n
    is 0. The interval's lower bound is 0 and its upper bound +inf where n is too small for one."""
    n = len(values)
    if not n:
        return math.nan, (0.0, math.inf)
    low, high = interval_ranks(n, q)
    wanted = sorted({k for k in (low, rank(n, q), high) if 1 <= k <= n})
    parted = np.partition(values, [k - 1 for k in wanted])
    return float(parted[rank(n, q) - 1]), (
        float(parted[low - 1]) if low >= 1 else 0.0,
        float(parted[high - 1]) if high <= n else math.inf,
    )


def proportion(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's exact interval for a share of which k of n were seen."""
    tail = (1.0 - confidence) / 2
    # the shares at which seeing k or more, and k or fewer, has the probability of one tail
    low = _bisect(lambda share: 1.0 - _at_most(k - 1, n, share) < tail) if k > 0 else 0.0
    high = _bisect(lambda share: _at_most(k, n, share) > tail) if k < n else 1.0
    return low, high


def _at_most(k: int, n: int, share: float) -> float:
    """P(B <= k) for B binomial(n, share), 0 < share < 1."""
    first, below = _binomial_cdf(n, share)
    return 0.0 if k < first else float(below[min(k - first, len(below) - 1)])


def _bisect(too_low: Callable[[float], bool]) -> float:
    """The number between 0 and 1 at which ``too_low`` becomes false."""
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-12 * high:
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return high


def select(parts: Iterable[np.ndarray], ranks: Sequence[int]) -> dict[int, float]:
    """Exact order statistics of a sample given in parts, which are gone through twice: ``ranks`` count from 1.

    ``parts`` must be iterable again and hold numbers >= 0. First the sample is counted into buckets 0.4 % wide (the
    leading bits of a float order as the number does), then only the buckets that hold a wanted rank are sorted.
    """
    counts = np.zeros(0, dtype=np.int64)
    for part in parts:
        found = np.bincount(_bucket(part), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    ends = np.cumsum(counts)
    wanted = {k: int(np.searchsorted(ends, k)) for k in ranks}
    held: dict[int, list[np.ndarray]] = {bucket: [] for bucket in wanted.values()}
    for part in parts:
        keys = _bucket(part)
        for bucket, pieces in held.items():
            pieces.append(part[keys == bucket])
    found_values = {}
    sorted_buckets = {bucket: np.sort(np.concatenate(pieces)) for bucket, pieces in held.items()}
    for k, bucket in wanted.items():
        before = int(ends[bucket] - counts[bucket])
        found_values[k] = float(sorted_buckets[bucket][k - before - 1])
    return found_values


def _bucket(values: np.ndarray) -> np.ndarray:
    """The exponent and eight bits of the mantissa."""
    return np.ascontiguousarray(values, dtype=np.float64).view(np.int64) >> 44


def beyond(limit: float, values: Sequence[float], levels: Sequence[float]) -> float:
    """The share of observations beyond ``limit``, of which ``levels`` (falling) lie beyond ``values`` (never falling).
    Between them, and beyond the last along the last two, on straight lines of logarithms (a Pareto tail); below the
    first on one to no latency at all. Of one alone observations are taken to fall off exponentially."""
    if limit <= 0:
        return 1.0
    if len(values) == 1:
        return max(levels[0] ** (limit / values[0]), RARE)
    at = bisect.bisect_right(values, limit)  # of the first that is larger
    if at and values[at - 1] == limit:
        return max(levels[at - 1], RARE)
    if not at:
        return 1 - (1 - levels[0]) * limit / values[0]
    at = min(at, len(values) - 1)
    if values[at] == values[at - 1]:
        return RARE
    slope = math.log(levels[at] / levels[at - 1]) / math.log(values[at] / values[at - 1])
    return max(levels[at - 1] * (limit / values[at - 1]) ** slope, RARE)
