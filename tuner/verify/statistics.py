"""The statistics behind a recommendation, as pure functions. docs/statistics.md explains each in words.

Costs and latencies are compared on a logarithmic scale: their noise is proportional to their size, and a difference of
logarithms is a ratio ("8 % cheaper"). Arguments named ``values`` are already on the scale on which they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the variances of it: ``parts`` are (variance, degrees of freedom), each estimated on its own
    (launches, windows). A part without freedom makes every interval infinite."""

    mean: float
    parts: tuple[tuple[float, float], ...]

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the parts together: ``(sum v)^2 / sum(v^2 / f)`` (Satterthwaite 1946)."""
        if not self.known:
            return 0.0
        below = sum(variance**2 / freedom for variance, freedom in self.parts)
        return self.error**4 / below if below > 0 else max(freedom for _, freedom in self.parts)

    @property
    def known(self) -> bool:
        """Whether every part could be estimated."""
        return bool(self.parts) and all(freedom > 0 for _, freedom in self.parts)

    def reach(self, tail: float) -> float:
        """How far the interval goes to a side on which ``tail`` of the doubt is left:
        ``sqrt(sum(t(tail, freedom)^2 * variance))``. With one part that is Student's t; with several it covers at
        least as often as it says (Banerjee 1960), where the usual t with Satterthwaite's freedom is too short for
        three windows."""
        if not self.known:
            return math.inf
        return math.sqrt(sum(float(special.stdtrit(f, tail)) ** 2 * v for v, f in self.parts if v > 0))

    def interval(self, confidence: float = 0.95) -> Interval:
        """Equal tails."""
        tail = (1 - confidence) / 2
        return self.between(tail, tail)

    def between(self, tail_below: float, tail_above: float) -> Interval:
        """The interval that leaves ``tail_below`` of the doubt under it and ``tail_above`` over it."""
        return (self.mean - self.reach(tail_below), self.mean + self.reach(tail_above))

    def doubt(self, limit: float = 0.0) -> float:
        """One-sided p-value of "the true mean is ``limit`` or more": small where the mean is proven to lie below. It is
        the tail at which the interval just touches ``limit``."""
        gap = abs(self.mean - limit)
        if not self.known:
            return 1.0
        if self.error <= 0:
            return 0.0 if self.mean < limit else 1.0
        low, high = 1e-12, 0.5
        while high > low * 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.reach(middle) > gap else (low, middle)
        tail = high
        return tail if self.mean < limit else 1 - tail

    def opposite(self) -> Estimate:
        """The same with the sign turned."""
        return Estimate(-self.mean, self.parts)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values: error ``s / sqrt(n)``, ``n - 1`` degrees of freedom (Student 1908)."""
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    spread = float(np.var(values, ddof=1)) if n > 1 else math.inf
    return Estimate(float(np.mean(values)), ((spread / n, n - 1),))


def pool(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """One variance from several estimates of the same variance, weighted by their degrees of freedom."""
    freedom = sum(f for _, f in parts)
    return (sum(v * f for v, f in parts) / freedom if freedom > 0 else 0.0), freedom


def holm(doubts: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjusts p-values for being several: each times the weights still to be decided over its own, in the order of
    ``p / weight``, never decreasing (Holm 1979, with his weights: what is believed beforehand gets more of the allowed
    doubt). Holds for any dependence between the tests, if the weights were not taken from the same measurements."""
    shares = list(weights) if weights is not None else [1.0] * len(doubts)
    adjusted, highest = [1.0] * len(doubts), 0.0
    order = sorted(range(len(doubts)), key=lambda i: doubts[i] / shares[i])
    for rank, i in enumerate(order):
        left = sum(shares[j] for j in order[rank:])
        highest = max(highest, min(1.0, doubts[i] * left / shares[i]))
        adjusted[i] = highest
    return adjusted


def chosen_tails(candidates: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tails (below, above) of the interval of the *lowest* of ``candidates`` means, which flatters itself.

    Being chosen for being low, it is more often too low than too high: the tail above gets ``1 - c^(1/k)`` (Sidak 1967)
    and the tail below the rest of ``1 - c``. The interval then covers with at least ``c`` both where the candidates are
    equal (the minimum of k is too low with ``1 - (1 - tail)^k``) and where one is far ahead (both tails count once).
    """
    doubt = 1 - confidence
    above = 1 - confidence ** (1 / max(candidates, 2))
    return doubt - above, above


def share_best(draws: np.ndarray) -> np.ndarray:
    """How often each column of ``draws`` (n, k) is the lowest of its row: the probability of being the best, (k,)."""
    return np.bincount(np.argmin(draws, axis=1), minlength=draws.shape[1]) / len(draws)


def ratio(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float, float]:
    """An estimate on the log scale as a factor: (middle, low, high)."""
    low, high = estimate.interval(confidence)
    return exp(estimate.mean), exp(low), exp(high)


def exp(value: float) -> float:
    """``e^value`` that ends at infinity instead of raising."""
    return math.exp(value) if value < 700 else math.inf
