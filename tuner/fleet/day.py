"""The day, simulated: does the planned fleet hold the SLOs in every hour?

In steps of one measured window. Within a window a replica is what the ladder measured (:mod:`tuner.fleet.curve`); from
window to window the rate swings, requests split among replicas by chance, spot machines come and go, and what a replica
could not complete stays in it. Replicas of one kind differ only by chance, so a sample of each stands for all: a
million requests per second take no longer than a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.fleet.curve import Limit
from tuner.fleet.demand import HOUR_S
from tuner.fleet.headroom import Routing
from tuner.fleet.offer import Offer
from tuner.fleet.plan import Plan

SAMPLE, LEAST = 1024, 64  # replicas of a kind that are followed, shared among the days; each day has the least
DAY_H = 24


@dataclass(frozen=True, slots=True, eq=False)
class Day:
    """``counted`` (limits, hours): what each limit counts, in the mean over the hour's requests; ``holds`` (hours,)
    whether all are within what the SLOs allow; ``attained`` (hours,) the share of requests within every percentile's
    limit, by the worst of them; ``inside`` (hours,) the mean number of requests per serving replica; ``how`` says which
    simulation it was."""

    limits: tuple[Limit, ...]
    counted: np.ndarray
    inside: np.ndarray
    how: str

    @property
    def holds(self) -> np.ndarray:
        allowed = np.array([limit.allowed for limit in self.limits])
        return np.all(self.counted <= allowed[:, None] * (1 + 1e-9), axis=0)

    @property
    def attained(self) -> np.ndarray:
        shares = [i for i, limit in enumerate(self.limits) if limit.slo.latency and limit.slo.quantile is not None]
        return 1 - self.counted[shares].max(axis=0) if shares else np.ones(self.counted.shape[1])


@dataclass(frozen=True, slots=True)
class Traffic:
    """``rate_rps`` (hours,), ``swing`` between windows of ``window_s``, how requests are routed."""

    rate_rps: np.ndarray
    swing: float
    routing: Routing
    window_s: float


def serving(plan: Plan, spare: int) -> np.ndarray:
    """(pools, hours) the ready replicas with the spare lost: of the largest kind in use, for the whole hour."""
    left = plan.ready.copy()
    sizes = plan.allowed_rps
    for h in range(left.shape[1]):
        for _ in range(spare):
            used = np.flatnonzero(left[:, h] > 0)
            if len(used):
                left[used[np.argmax(sizes[used, h])], h] -= 1
    return left


def simulate(
    plan: Plan,
    offers: Sequence[Offer],
    traffic: Traffic,
    *,
    spare: int = 0,
    interruptions_per_hour: float = 0.0,
    seed: int = 0,
) -> Day:
    """The whole curve, day by day (each day on its own, from the steady state of its first hour)."""
    hours = len(traffic.rate_rps)
    days = math.ceil(hours / DAY_H)
    length = min(hours, DAY_H)
    index = np.minimum(np.arange(days)[:, None] * DAY_H + np.arange(length), hours - 1)  # (days, hours of a day)
    run = _Run(plan, offers, traffic, serving(plan, spare), index, interruptions_per_hour, seed)
    counted, inside = run.all()
    limits = offers[0].curve.limits
    flat_counted, flat_inside = np.zeros((len(limits), hours)), np.zeros(hours)
    flat_counted[:, index], flat_inside[index] = counted, inside
    return Day(limits, flat_counted, flat_inside, f"by windows of {traffic.window_s:g} s")


class _Run:
    """State: requests inside, one array (days, sampled replicas) per pool, of replicas that stand for the pool's."""

    def __init__(
        self,
        plan: Plan,
        offers: Sequence[Offer],
        traffic: Traffic,
        serving: np.ndarray,
        index: np.ndarray,
        interruptions: float,
        seed: int,
    ) -> None:
        self.plan, self.traffic, self.index = plan, traffic, index
        self.serving = serving
        self.curves = [offers[p.offer].curve for p in plan.pools]
        self.interruptions = interruptions
        self.rng = np.random.default_rng(seed)
        self.used = [p for p in range(len(plan.pools)) if serving[p].max() > 0]
        sample = max(SAMPLE // len(index), LEAST)
        self.sample = {p: int(min(serving[p].max(), sample)) for p in self.used}
        self.windows = max(round(HOUR_S / traffic.window_s), 1)
        self.inside = {p: np.zeros((len(index), self.sample[p])) for p in self.used}
        self.away = {p: np.zeros((len(index), self._away_windows(p)), dtype=np.int64) for p in self.used}

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """(limits, days, hours), (days, hours)."""
        days, length = self.index.shape
        limits = len(self.curves[0].limits)
        counted, inside = np.zeros((limits, days, length)), np.zeros((days, length))
        self._settle()
        for hour in range(length):
            at = self.index[:, hour]
            have = self.serving[:, at].astype(float)  # (pools, days)
            if hour:
                self._scale(self.serving[:, self.index[:, hour - 1]], have)
            total, weights, weight_sum = np.zeros((limits, days)), np.zeros(days), np.zeros(days)
            for _ in range(self.windows):
                score, requests, held, count = self._window(at, have)
                total += score
                weights += requests
                inside[:, hour] += held
                weight_sum += count
            with np.errstate(invalid="ignore", divide="ignore"):
                counted[:, :, hour] = np.where(weights > 0, total / weights, 0.0)
                inside[:, hour] = np.where(weight_sum > 0, inside[:, hour] / weight_sum, 0.0)
        return counted, inside

    def _settle(self) -> None:
        at = self.index[:, 0]
        share = self._shares(self.serving[:, at].astype(float), at)
        for p in self.used:
            rate = self.traffic.rate_rps[at] * share[p]
            self.inside[p][:] = self.curves[p].holds_inside(rate)[:, None]

    def _shares(self, there: np.ndarray, at: np.ndarray) -> np.ndarray:
        """(pools, days): which share of all requests one replica of each pool gets, by its capacity."""
        sizes = self.plan.allowed_rps[:, at]
        whole = (there * sizes).sum(axis=0)
        return np.where(whole > 0, sizes / np.where(whole > 0, whole, 1), 0.0)

    def _scale(self, before: np.ndarray, now: np.ndarray) -> None:
        """New replicas are empty: so many of the sampled ones are, too. Those taken away finish what they have."""
        for p in self.used:
            new = 1 - np.divide(before[p], now[p], out=np.ones(len(now[p])), where=now[p] > before[p])
            fresh = self.rng.random(self.inside[p].shape) < new[:, None]
            self.inside[p][fresh] = 0.0

    def _window(self, at: np.ndarray, have: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One window: (limits, days) scores times requests, (days,) requests, (days,) requests inside and replicas."""
        traffic, window_s = self.traffic, self.traffic.window_s
        there, lost = self._there(have)
        swing = traffic.swing
        factor = np.exp(swing * self.rng.standard_normal(len(at)) - swing**2 / 2) if swing else 1.0
        mean = traffic.rate_rps[at] * factor * window_s
        share = self._shares(there, at)
        if traffic.routing != "random":
            mean = self.rng.poisson(np.minimum(mean, 1e15)).astype(float)
        scores = np.zeros((len(self.curves[0].limits), len(at)))
        requests, held, count = np.zeros(len(at)), np.zeros(len(at)), np.zeros(len(at))
        for p in self.used:
            curve, inside = self.curves[p], self.inside[p]
            expected = ((mean + lost) * share[p])[:, None]  # requests of machines that were taken away start again
            arrived = expected + np.zeros_like(inside)
            if traffic.routing == "random":
                arrived = self.rng.poisson(np.minimum(expected, 1e15), inside.shape).astype(float)
            self.inside[p], average = curve.follow(inside, arrived / window_s, window_s)
            weight = arrived * (there[p] / self.sample[p])[:, None]
            scores += (curve.score(average) * weight).sum(axis=-1)
            requests += weight.sum(axis=-1)
            held += (average * (there[p] / self.sample[p])[:, None]).sum(axis=-1)
            count += there[p]
        nobody = np.flatnonzero((there.sum(axis=0) == 0) & (mean > 0))  # every request is lost
        for i, limit in enumerate(self.curves[0].limits):
            scores[i, nobody] += limit.lost * mean[nobody]
        requests[nobody] += mean[nobody]
        return scores, requests, held, count

    # spot machines

    def _away_windows(self, p: int) -> int:
        """For how many windows an interrupted replica is away: its start-up, rounded up."""
        return max(math.ceil(self.plan.pools[p].start_h * HOUR_S / self.traffic.window_s), 1)

    def _there(self, have: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pools, days) replicas that serve in this window, and (days,) the requests that must start again."""
        there = have.copy()
        lost = np.zeros(have.shape[1])
        if self.interruptions > 0:
            hit = 1 - math.exp(-self.interruptions * self.traffic.window_s / HOUR_S)
            for p in self.used:
                if not self.plan.pools[p].spot:
                    continue
                away = self.away[p]
                up = np.maximum(have[p] - away.sum(axis=1) + away[:, 0], 0).astype(np.int64)
                gone = self.rng.binomial(up, hit)
                away[:, :-1] = away[:, 1:]
                away[:, -1] = gone
                there[p] = np.maximum(have[p] - away.sum(axis=1), 0)
                lost += gone * self.inside[p].mean(axis=1)
        return there, lost
