"""The plan: how many replicas of each kind in each hour, the cheapest that there are, by an integer programme (HiGHS).

Hours follow each other in a circle: the day repeats. ``docs/fleet.md`` writes the programme down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, sparse

from tuner.errors import UsageError
from tuner.fleet.demand import HOUR_S
from tuner.fleet.offer import Offer

EXACT = 400  # replicas up to which the optimum is proven to the last cent
GAP = 1e-4  # else to a hundredth of a per cent


@dataclass(frozen=True, slots=True)
class Terms:
    """What the fleet must obey.

    ``spare`` replicas (of the largest kind in use) may be lost at any time. At most ``spot_share`` of the capacity may
    be on spot machines, at ``spot_price`` times the price, each taken away ``interruptions_per_hour`` times an hour.
    ``lead_s`` is how long ahead the scaling knows what it needs (infinite: the curve is known). Replicas run for at
    least ``min_uptime_h`` hours, and the fleet keeps what it needed for ``hold_h`` hours more. ``max_gpus`` bounds the
    GPUs at any time, by GPU name (empty name: all together).
    """

    spare: int = 1
    spot_share: float = 0.0
    spot_price: float = 1.0
    interruptions_per_hour: float = 0.0
    lead_s: float = math.inf
    min_uptime_h: int = 1
    hold_h: int = 0
    max_gpus: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one offer, on demand or on spot machines. ``available`` is the share of the time that a replica of
    it serves, ``usd_per_hour`` its price there, ``late_h`` for how many hours a new one is not ready where scaling
    knows of the need too late."""

    offer: int
    name: str
    spot: bool
    usd_per_hour: float
    available: float
    start_h: float
    late_h: int
    gpu: str
    gpus: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """``replicas`` (pools, hours) that are paid, ``ready`` of them that serve (the others still start), ``starts`` in
    each hour; ``need_rps`` (hours) what they must serve, ``allowed_rps`` (pools, hours) what one of each may be given.
    ``usd`` for all hours, starts included; ``gap`` by how much a cheaper plan might be cheaper (0: none is)."""

    pools: tuple[Pool, ...]
    replicas: np.ndarray
    ready: np.ndarray
    starts: np.ndarray
    need_rps: np.ndarray
    allowed_rps: np.ndarray
    usd: float
    gap: float

    @property
    def capacity_rps(self) -> np.ndarray:
        """(hours,) what the ready replicas may be given together, spot interruptions taken off."""
        return (self.ready * self.allowed_rps * np.array([[p.available] for p in self.pools])).sum(axis=0)

    @property
    def usd_by_hour(self) -> np.ndarray:
        """(hours,) replicas and, with the hour for which they start, the start-ups before it."""
        price = np.array([[p.usd_per_hour] for p in self.pools])
        start = np.array([[p.usd_per_hour * p.start_h] for p in self.pools])
        return (price * self.replicas + start * self.starts).sum(axis=0)


def pools_of(offers: Sequence[Offer], terms: Terms) -> tuple[Pool, ...]:
    """Every offer on demand and, where spot is allowed, on spot machines.

    A spot replica serves 1/i hours (i interruptions an hour) and is then replaced in one start-up: it is there for the
    share 1 / (1 + i x start-up) of the time. It is paid throughout: its replacement is paid while it starts.
    """
    found = []
    for index, offer in enumerate(offers):
        late_s = offer.start_s - terms.lead_s
        late_h = math.ceil(late_s / HOUR_S) if late_s > 0 else 0
        start_h = offer.start_s / HOUR_S
        shared = {"start_h": start_h, "late_h": late_h, "gpu": offer.gpu, "gpus": max(offer.gpus, 1)}
        found.append(Pool(index, offer.name, False, offer.usd_per_hour, 1.0, **shared))
        if terms.spot_share > 0:
            there = 1 / (1 + terms.interruptions_per_hour * start_h)
            price = offer.usd_per_hour * terms.spot_price
            found.append(Pool(index, f"{offer.name} spot", True, price, there, **shared))
    return tuple(found)


def needs(rate_rps: np.ndarray, hold_h: int) -> np.ndarray:
    """(hours,) what the fleet must be able to serve: the demand of the hour and, so that it does not shrink on a dip,
    of the ``hold_h`` hours before (around the circle)."""
    return np.max([np.roll(rate_rps, k) for k in range(min(hold_h, len(rate_rps) - 1) + 1)], axis=0)


def solve(
    pools: Sequence[Pool], need_rps: np.ndarray, allowed_rps: np.ndarray, terms: Terms, *, seconds: float = 60.0
) -> Plan | None:
    """The cheapest plan; None where there is none.

    ``need_rps`` (hours,), ``allowed_rps`` (pools, hours). Small fleets are solved to the optimum, large ones to within
    :data:`GAP`; ``seconds`` bounds the search, and what it had found then is returned with its gap.
    """
    programme = _Programme(pools, np.asarray(need_rps, float), np.asarray(allowed_rps, float), terms)
    return programme.solve(seconds)


class _Programme:
    """Variables, each (pools, hours): n paid, s ready, u starts, z (0 or 1) whether the pool is in use."""

    def __init__(self, pools: Sequence[Pool], need: np.ndarray, allowed: np.ndarray, terms: Terms) -> None:
        self.pools, self.need, self.terms = tuple(pools), need, terms
        self.allowed = allowed
        self.counted = allowed * np.array([[p.available] for p in pools])
        self.many, self.hours = allowed.shape
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        best = float(self.counted.max(initial=0.0))
        least = float(self.counted[self.counted > 0].min(initial=best)) if best > 0 else 1.0
        self.most = math.ceil(float(need.max(initial=0.0)) / least) + terms.spare + 1 if best > 0 else 0

    def solve(self, seconds: float) -> Plan | None:
        if not self.need.any():
            return self._plan(np.zeros((4, self.many, self.hours)), 0.0)
        if self.most == 0:
            return None
        self._starts()
        self._serve()
        self._bounds()
        columns = 4 * self.many * self.hours
        lengths = [len(index) for index, _, _, _ in self.rows]
        at = (
            np.repeat(np.arange(len(self.rows)), lengths),
            np.concatenate([np.asarray(index) for index, _, _, _ in self.rows]),
        )
        values = np.concatenate([np.asarray(value, float) for _, value, _, _ in self.rows])
        matrix = sparse.csr_array((values, at), shape=(len(self.rows), columns))
        low, high = np.array([r[2] for r in self.rows]), np.array([r[3] for r in self.rows])
        upper = np.full((4, self.many, self.hours), float(self.most))
        upper[3] = 1.0
        upper[:, self.counted <= 0] = 0.0
        result = optimize.milp(
            self._prices().ravel(),
            constraints=optimize.LinearConstraint(matrix, low, high),  # pyright: ignore[reportArgumentType]
            bounds=optimize.Bounds(np.zeros(columns), upper.ravel()),  # pyright: ignore[reportArgumentType]
            integrality=np.ones(columns),
            options={"time_limit": seconds, "mip_rel_gap": 0.0 if self.most <= EXACT else GAP},
        )
        if result.x is None:
            if result.status == 1:
                raise UsageError(f"no plan was found in {seconds:g} s", fix="Give --seconds more, or fewer hours")
            return None
        return self._plan(np.rint(result.x).reshape(4, self.many, self.hours), float(result.mip_gap or 0.0))

    def _column(self, kind: int, pool: int, hour: int) -> int:
        return (kind * self.many + pool) * self.hours + hour % self.hours

    def _row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self.rows.append(([c for c, _ in terms], [v for _, v in terms], low, high))

    def _prices(self) -> np.ndarray:
        cost = np.zeros((4, self.many, self.hours))
        for p, pool in enumerate(self.pools):
            cost[0, p] = pool.usd_per_hour
            # a start-up that costs nothing is still not made for nothing
            cost[2, p] = max(pool.usd_per_hour * pool.start_h, pool.usd_per_hour * 1e-9)
        return cost

    def _starts(self) -> None:
        """n[h] - n[h-1] <= u[h]; what started in the last min_uptime hours still runs; what is late is not ready."""
        uptime = min(self.terms.min_uptime_h, self.hours)
        for p, pool in enumerate(self.pools):
            for h in range(self.hours):
                n, before, u = (self._column(0, p, h), self._column(0, p, h - 1), self._column(2, p, h))
                if self.hours > 1:
                    self._row([(n, 1), (before, -1), (u, -1)], -np.inf, 0)
                if uptime > 1:
                    self._row([(n, 1), *((self._column(2, p, h - j), -1) for j in range(uptime))], 0, np.inf)
                for j in range(min(pool.late_h, self.hours - 1) + 1):
                    self._row([(self._column(1, p, h), 1), (self._column(0, p, h - j), -1)], -np.inf, 0)
                self._row([(self._column(1, p, h), 1), (self._column(3, p, h), -self.most)], -np.inf, 0)

    def _serve(self) -> None:
        """What is ready serves the demand with the spare lost, whichever kind in use that is."""
        for h in np.flatnonzero(self.need > 0).tolist():
            served = [(self._column(1, p, h), self.counted[p, h]) for p in range(self.many)]
            for q in range(self.many):
                lost = self.terms.spare * self.counted[q, h]
                self._row([*served, (self._column(3, q, h), -lost)], self.need[h], np.inf)
            if self.terms.spot_share < 1:
                share = self.terms.spot_share
                spot = [
                    (self._column(1, p, h), self.counted[p, h] * ((1 - share) if pool.spot else -share))
                    for p, pool in enumerate(self.pools)
                ]
                self._row(spot, -np.inf, 0)

    def _bounds(self) -> None:
        """A replica that starts for an hour takes its GPUs in the hour before, beside those that still run there."""
        for name, most in self.terms.max_gpus.items():
            own = [p for p, pool in enumerate(self.pools) if not name or pool.gpu == name]
            for h in range(self.hours if own else 0):
                if self.hours == 1:
                    self._row([(self._column(0, p, h), self.pools[p].gpus) for p in own], -np.inf, most)
                    continue
                held = [(self._column(0, p, h - 1), self.pools[p].gpus) for p in own]
                begun = [(self._column(2, p, h), self.pools[p].gpus) for p in own]
                self._row([*held, *begun], -np.inf, most)

    def _plan(self, x: np.ndarray, gap: float) -> Plan:
        replicas, ready, _, _ = (part.astype(np.int64) for part in x)
        starts = np.maximum(replicas - np.roll(replicas, 1, axis=1), 0)
        ready = replicas.copy()  # the programme need not use all that is ready
        for p, pool in enumerate(self.pools):
            for j in range(1, min(pool.late_h, self.hours - 1) + 1):
                ready[p] = np.minimum(ready[p], np.roll(replicas[p], j))
        if self.hours == 1:
            starts[:] = 0
        plan = Plan(self.pools, replicas, ready, starts, self.need, self.allowed, 0.0, gap)
        usd = float(plan.usd_by_hour.sum())
        return Plan(self.pools, replicas, ready, starts, self.need, self.allowed, usd, gap)
