"""A replica as the ladder measured it: how many requests it completes with how many inside it, and what share of them
misses an SLO then.

A replica is a flow-equivalent server (Chandy, Herzog and Woo, *IBM Journal of Research and Development* 19, 1975): with
n requests inside it completes X(n) per second. Both come from measured loads, by Little's law: n = rate x mean
end-to-end time. Beyond the highest measured point it completes no more, and what is too many waits before it is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import isotonic_regression

from tuner.measure.quantile import beyond
from tuner.spec.slo import Slo

WAITING = ("ttft", "e2e")  # latencies that a wait before being served adds to, as it is
# of a standard normal variable; close together, as what is averaged rises like a wall where a few nodes would miss it
NODES = np.linspace(-6, 6, 241)
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()
_GRID = 200
_STEPS = 6  # parts of a window in which the number of requests inside is followed


@dataclass(frozen=True, slots=True)
class Point:
    """One measured load: ``rate_rps`` requests per second that the replica keeps up with, ``inside`` the mean number of
    requests in it, ``values`` its metrics (seconds), ``watts`` the power it drew (None: not known)."""

    rate_rps: float
    inside: float
    values: Mapping[str, float]
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """What an SLO allows in the mean over requests: at most the share ``allowed`` of them beyond ``slo.limit``
    (percentiles), or a mean of at most ``allowed`` times the limit (means), or the share that fails (error rate)."""

    slo: Slo
    allowed: float

    @property
    def lost(self) -> float:
        """What a request counts that nobody serves: it is beyond every limit, and no mean of latencies is known."""
        return 1.0 if self.slo.quantile is not None or not self.slo.latency else math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """``rate_rps`` (k,) rising, ``inside`` (k,) rising: X(n) and its inverse. ``states`` (m,) requests inside, beyond
    the last point too, and ``scores`` (limits, m): what :class:`Limit` counts there. ``watts`` (k,) or None."""

    rate_rps: np.ndarray
    inside: np.ndarray
    limits: tuple[Limit, ...]
    states: np.ndarray
    scores: np.ndarray
    watts: np.ndarray | None = field(default=None)

    @property
    def top_rps(self) -> float:
        """The most requests per second it was seen to keep up with."""
        return float(self.rate_rps[-1])

    def completes(self, inside: np.ndarray) -> np.ndarray:
        """X(n): requests completed per second with ``inside`` requests in it."""
        return np.interp(inside, self._inside0, self._rate0)

    def holds_inside(self, rate_rps: np.ndarray) -> np.ndarray:
        """How many requests are inside at a steady rate (at most the last point's: beyond it there is no steady
        state)."""
        return np.interp(rate_rps, self._rate0, self._inside0)

    def score(self, inside: np.ndarray) -> np.ndarray:
        """(limits, ...): the share beyond each limit (or the mean over it) with ``inside`` requests in the replica."""
        found = [np.interp(inside, self.states, row) for row in self.scores]
        return np.array(found).reshape(len(self.limits), *np.shape(inside))

    def follow(
        self, inside: np.ndarray, rate_rps: np.ndarray, seconds: float | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follows the requests inside for ``seconds`` at ``rate_rps``: their number at the end, and its mean.

        Below the top rate the number relaxes to the rate's own, as fast as requests pass through; above the highest
        measured number it grows or shrinks by what arrives less what is completed.
        """
        step_s, full = seconds / _STEPS, float(self.inside[-1])
        target = self.holds_inside(rate_rps)
        pass_s = target / np.maximum(np.minimum(rate_rps, self.top_rps), 1e-12)
        pass_s = np.where(rate_rps > 0, pass_s, full / self.top_rps)
        decay = np.exp(-step_s / np.maximum(pass_s, 1e-9))
        drift = (rate_rps - self.top_rps) * step_s
        total = np.zeros_like(inside)
        for _ in range(_STEPS):
            before = inside
            below = target + (np.minimum(inside, full) - target) * decay
            piled = np.maximum(inside - full, 0.0) + drift
            inside = np.where((drift > 0) | (inside > full), np.where(piled > 0, full + piled, below), below)
            total += (before + inside) / 2
        return inside, total / _STEPS

    def power_w(self, rate_rps: np.ndarray) -> np.ndarray | None:
        """Watts at a rate; below the lowest measured load what was measured there. None where no power was."""
        return None if self.watts is None else np.interp(rate_rps, self.rate_rps, self.watts)

    @property
    def _rate0(self) -> np.ndarray:
        return np.concatenate([[0.0], self.rate_rps])

    @property
    def _inside0(self) -> np.ndarray:
        return np.concatenate([[0.0], self.inside])


def limits_of(slos: Sequence[Slo]) -> tuple[tuple[Limit, ...], tuple[Slo, ...]]:
    """The SLOs as limits on means over requests, and those that no mean tells (maxima)."""
    known, left = [], []
    for slo in slos:
        if not slo.latency:
            known.append(Limit(slo, slo.limit))
        elif slo.quantile is not None:
            known.append(Limit(slo, 1 - slo.quantile))
        elif slo.metric.endswith("_mean"):
            known.append(Limit(slo, 1.0))
        else:
            left.append(slo)
    return tuple(known), tuple(left)


def curve(points: Sequence[Point], limits: Sequence[Limit], *, stretch: float = 1.0, extra: float = 0.0) -> Curve:
    """The curve through ``points``. Several launches and windows scatter: each quantity is made to rise with the rate
    by isotonic regression (of logarithms), the least change that does.

    ``stretch`` multiplies every rate: 0.95 is a replica that does at 95 % of the rate what was measured. ``extra`` is
    by how much the arrivals will be burstier than those measured (variance of their number over its mean, less the
    measured one); the number of requests inside then varies by ``sqrt(extra * n)`` more.
    """
    points = sorted(points, key=lambda p: p.rate_rps)
    rate = _rising(np.array([p.rate_rps for p in points]) * stretch)
    inside = _rising(_isotonic([p.inside * stretch for p in points]))
    # straight lines between few points; a fine grid, so that scores are interpolated in logarithms
    x = np.log(rate)
    fine = np.linspace(x[0], x[-1], _GRID) if len(x) > 1 else x
    states = np.exp(np.interp(fine, x, np.log(inside)))
    wait_s = _waits(limits)
    top, limit = float(rate[-1]), float(states[-1])
    states = np.concatenate([states, limit + wait_s[1:] * top])
    waits = np.concatenate([np.zeros(len(fine)), wait_s[1:]])
    scores = np.array([_scores(points, limit, x, fine, waits) for limit in limits]).reshape(len(limits), len(states))
    if extra > 0:
        scores = np.array([_smeared(states, row, extra) for row in scores]).reshape(scores.shape)
    watts = [p.watts for p in points]
    drawn = _isotonic([w for w in watts if w is not None]) if watts and all(w is not None for w in watts) else None
    return Curve(rate, inside, tuple(limits), states, scores, drawn)


def _waits(limits: Sequence[Limit]) -> np.ndarray:
    """Waits before being served that are told apart: up to twice the longest limit that a wait counts against."""
    longest = max((x.slo.limit for x in limits if x.slo.latency in WAITING), default=1.0)
    return np.concatenate([[0.0], np.geomspace(longest / 1000, 2 * longest, 60)])


def _scores(points: Sequence[Point], limit: Limit, x: np.ndarray, fine: np.ndarray, waits: np.ndarray) -> np.ndarray:
    """What ``limit`` counts, (m,): at each fine rate without a wait, then at the last rate with every wait."""
    slo, ends = limit.slo, len(waits) - len(fine)
    shift = waits if slo.latency in WAITING else np.zeros_like(waits)

    def along(values: Sequence[float]) -> np.ndarray:
        logs = np.log(np.maximum(_isotonic(values), 1e-9))
        known = np.exp(np.interp(fine, x, logs))
        return np.concatenate([known, np.full(ends, known[-1])])

    if not slo.latency:
        shares = _isotonic([max(p.values.get(slo.key, 0.0), 0.0) for p in points], log=False)
        known = np.interp(fine, x, shares)
        return np.concatenate([known, np.full(ends, known[-1])])
    if slo.quantile is None:
        return (along([p.values[slo.key] for p in points]) + shift) / slo.limit
    names = quantiles(points, slo.latency)
    values = np.stack([along([p.values[f"{slo.latency}_{name}_s"] for p in points]) for name, _ in names])
    values = np.maximum.accumulate(values, axis=0)
    levels = [1 - q for _, q in names]
    columns = zip(shift.tolist(), values.T.tolist(), strict=True)
    return np.array([beyond(slo.limit - wait, column, levels) for wait, column in columns])


def quantiles(points: Sequence[Point], latency: str) -> list[tuple[str, float]]:
    """The percentiles of ``latency`` that every point has, rising: (``p99``, 0.99)."""
    shared = set.intersection(*({name for name, value in p.values.items() if math.isfinite(value)} for p in points))
    names = [n.split("_")[-2] for n in shared if n.startswith(f"{latency}_p") and n.endswith("_s")]
    return sorted(((n, float(n[1:]) / 100) for n in names), key=lambda pair: pair[1])


def _smeared(states: np.ndarray, row: np.ndarray, extra: float) -> np.ndarray:
    """The mean of ``row`` where the number inside varies by ``sqrt(extra * n)`` around each state."""
    seen = np.maximum(states[:, None] + np.sqrt(extra * states)[:, None] * NODES, 0.0)
    return np.interp(seen, states, row) @ WEIGHTS


def _isotonic(values: Sequence[float], log: bool = True) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return found
    if not log:
        return np.asarray(isotonic_regression(found).x)
    return np.exp(np.asarray(isotonic_regression(np.log(np.maximum(found, 1e-9))).x))


def _rising(values: np.ndarray) -> np.ndarray:
    """``values`` never falling made strictly rising, so that they can be inverted."""
    return values * (1 + 1e-9 * np.arange(len(values)))
