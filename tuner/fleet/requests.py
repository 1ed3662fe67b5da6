"""The day request by request: the same replicas as :mod:`tuner.fleet.day`, but every request arrives, is routed and
ends by itself. For small fleets, and to check the other simulation, which follows numbers of requests.

What a replica's requests meet in a window is counted from how many it was given there, as in the other simulation: what
fluctuates within a window is in the measured curve already. How many are inside at a moment decides where the next
request goes. Between two events a replica with n requests inside completes the next after an exponential time of rate
X(n). Only the rates matter for how many are inside, not how long the single requests are (insensitivity of processor
sharing; Kelly, *Reversibility and Stochastic Networks*, 1979, chapter 3).
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from tuner.fleet.day import Day, Traffic, serving
from tuner.fleet.demand import HOUR_S
from tuner.fleet.offer import Offer
from tuner.fleet.plan import Plan

_DEPARTURE, _LOSS, _RETURN = 0, 1, 2


def simulate(
    plan: Plan,
    offers: Sequence[Offer],
    traffic: Traffic,
    *,
    spare: int = 0,
    interruptions_per_hour: float = 0.0,
    seed: int = 0,
) -> Day:
    """As :func:`tuner.fleet.day.simulate`. For up to some hundred thousand requests."""
    limits = offers[0].curve.limits
    fleet = _Fleet(plan, offers, traffic, interruptions_per_hour, seed)
    have = serving(plan, spare)
    hours = len(traffic.rate_rps)
    counted, inside = np.zeros((len(limits), hours)), np.zeros(hours)
    for hour in range(hours):
        fleet.resize(have[:, hour], plan.allowed_rps[:, hour])
        if hour == 0:
            fleet.settle(float(traffic.rate_rps[0]))
        counted[:, hour], inside[hour] = fleet.hour(float(traffic.rate_rps[hour]))
    return Day(limits, counted, inside, "request by request")


class _Fleet:
    """One slot per replica that any hour has; a slot is routed to while it is ``active`` and not ``down``."""

    def __init__(self, plan: Plan, offers: Sequence[Offer], traffic: Traffic, interruptions: float, seed: int) -> None:
        self.pools, self.traffic = plan.pools, traffic
        self.interruptions = interruptions
        self.rng, self.noise = random.Random(seed), np.random.default_rng(seed)
        most = plan.ready.max(axis=1)
        self.pool = [p for p in range(len(plan.pools)) for _ in range(most[p])]
        self.curves = [offers[p.offer].curve for p in plan.pools]
        self.rates = [c.completes(np.arange(math.ceil(c.inside[-1]) + 2)).tolist() for c in self.curves]
        slots = len(self.pool)
        self.n, self.area, self.since = [0] * slots, [0.0] * slots, [0.0] * slots
        self.here_s = [0.0] * slots  # since the window began, serving or finishing what it had
        self.level = np.zeros(slots)  # requests inside, by the curve and the windows' arrivals
        self.version, self.arrived = [0] * slots, [0] * slots
        self.active, self.down = [False] * slots, [False] * slots
        self.size = [0.0] * slots
        self.events: list[tuple[float, int, int, int]] = []
        self.now_s, self.lost = 0.0, 0
        for slot in range(slots):
            if interruptions > 0 and self.pools[self.pool[slot]].spot:
                self._push(self.rng.expovariate(interruptions) * HOUR_S, _LOSS, slot)
        self._route_table()

    def resize(self, have: np.ndarray, allowed: np.ndarray) -> None:
        """So many replicas per pool from now on; new ones are empty, those taken away finish what they have."""
        left = have.tolist()
        for slot, p in enumerate(self.pool):
            self.active[slot] = left[p] > 0 and allowed[p] > 0
            left[p] -= 1
            self.size[slot] = float(allowed[p])
        self._route_table()

    def settle(self, rate_rps: float) -> None:
        """Every replica begins with as many requests as it has in the mean."""
        whole = sum(self.size[s] for s in self.open)
        for slot in self.open:
            curve = self.curves[self.pool[slot]]
            self.level[slot] = float(curve.holds_inside(np.array(rate_rps * self.size[slot] / whole)))
            for _ in range(round(self.level[slot])):
                self._change(slot, 1)

    def hour(self, rate_rps: float) -> tuple[np.ndarray, float]:
        """An hour at ``rate_rps``: what the limits count in the mean over requests, and the mean number inside."""
        window_s, swing = self.traffic.window_s, self.traffic.swing
        windows = max(round(HOUR_S / window_s), 1)
        limits = len(self.curves[0].limits)
        total, requests, held, count = np.zeros(limits), 0.0, 0.0, 0
        for _ in range(windows):
            factor = math.exp(swing * self.noise.standard_normal() - swing**2 / 2) if swing else 1.0
            number = int(self.noise.poisson(rate_rps * factor * window_s))
            begin_s = self.now_s
            for at_s in np.sort(self.noise.random(number)).tolist():
                self._until(begin_s + at_s * window_s)
                self._arrive()
            self._until(begin_s + window_s)
            for slot in range(len(self.pool)):
                self._change(slot, 0)
            total, requests = total + self._scores(), requests + sum(self.arrived)
            held, count = held + sum(self.area), count + sum(self.here_s)
            if self.lost:
                total += [limit.lost * self.lost for limit in self.curves[0].limits]
            requests, self.lost = requests + self.lost, 0
            self.area, self.here_s = [0.0] * len(self.pool), [0.0] * len(self.pool)
            self.arrived = [0] * len(self.pool)
        return (total / requests if requests else total), (held / count if count else 0.0)

    def _scores(self) -> np.ndarray:
        """(limits,) what the limits count in this window, summed over its requests."""
        arrived, here_s, pool = np.array(self.arrived, float), np.array(self.here_s), np.array(self.pool)
        total = np.zeros(len(self.curves[0].limits))
        for p, curve in enumerate(self.curves):
            own = np.flatnonzero((pool == p) & (here_s > 0))
            rate = arrived[own] / here_s[own]
            self.level[own], mean = curve.follow(self.level[own], rate, here_s[own])
            total += (curve.score(mean) * arrived[own]).sum(axis=-1)
        return total

    def _until(self, end_s: float) -> None:
        while self.events and self.events[0][0] <= end_s:
            self.now_s, kind, slot, version = heapq.heappop(self.events)
            if kind == _DEPARTURE:
                if version == self.version[slot]:
                    self._change(slot, -1)
            elif kind == _LOSS:
                self._lose(slot)
            else:
                self._change(slot, 0)
                self.down[slot] = False
                self._route_table()
                self._push(self.now_s + self.rng.expovariate(self.interruptions) * HOUR_S, _LOSS, slot)
        self.now_s = end_s

    def _lose(self, slot: int) -> None:
        """A spot machine is taken away; what it had begins again elsewhere."""
        again = self.n[slot]
        self._change(slot, -again)
        self.down[slot], self.level[slot] = True, 0.0
        self.arrived[slot] = max(self.arrived[slot] - again, 0)
        self._route_table()
        for _ in range(again):
            self._arrive()
        away_s = max(self.pools[self.pool[slot]].start_h * HOUR_S, 1e-3)
        self._push(self.now_s + away_s, _RETURN, slot)

    def _arrive(self) -> None:
        if not self.open:
            self.lost += 1
            return
        match self.traffic.routing:
            case "random":
                slot = self._drawn()
            case "two-choices":
                slot = min((self._drawn(), self._drawn()), key=self._load)
            case _:
                slot = min(self.open, key=self._load)
        self.arrived[slot] += 1
        self._change(slot, 1)

    def _drawn(self) -> int:
        return self.open[min(bisect_right(self.edges, self.rng.random() * self.edges[-1]), len(self.open) - 1)]

    def _load(self, slot: int) -> float:
        return self.n[slot] / self.size[slot]

    def _change(self, slot: int, by: int) -> None:
        """Counts the time until now, then ``by`` requests come or go, and the next departure is drawn anew (it has no
        memory)."""
        elapsed_s = self.now_s - self.since[slot]
        self.area[slot] += self.n[slot] * elapsed_s
        if self.n[slot] or (self.active[slot] and not self.down[slot]):
            self.here_s[slot] += elapsed_s
        self.since[slot] = self.now_s
        if not by:
            return
        self.n[slot] += by
        self.version[slot] += 1
        if self.n[slot] > 0:
            rates = self.rates[self.pool[slot]]
            rate = rates[min(self.n[slot], len(rates) - 1)]
            self._push(self.now_s + self.rng.expovariate(rate), _DEPARTURE, slot)

    def _push(self, at_s: float, kind: int, slot: int) -> None:
        heapq.heappush(self.events, (at_s, kind, slot, self.version[slot]))

    def _route_table(self) -> None:
        self.open = [s for s in range(len(self.pool)) if self.active[s] and not self.down[s]]
        self.edges = list(accumulate(self.size[s] for s in self.open))
