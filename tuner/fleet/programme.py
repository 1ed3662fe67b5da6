"""The cheapest plan, by an integer programme (SciPy's HiGHS). ``docs/fleet.md`` writes it down."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
from scipy import optimize, sparse

from tuner.errors import UsageError
from tuner.fleet.plan import Plan, Pool, Terms

EXACT = 60  # replicas that the smallest kind alone would take, up to which the optimum is proven to the last cent
GAP = 1e-4  # else to a hundredth of a per cent
WHOLE = 3000  # kinds x hours up to which the whole programme is worth trying


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
    """Variables, each (pools, hours): n paid, s serving, u starts, z (0 or 1) whether the pool is in use, r ready."""

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
            return self._plan(np.zeros((5, self.many, self.hours)), 0.0)
        if self.most == 0:
            return None
        self._starts()
        self._serve()
        self._share()
        self._bounds()
        if self.most <= EXACT:
            found = self._run(*self._limits(), seconds)
            return None if found is None else self._plan(found.x, float(found.mip_gap or 0.0))
        return self._large(seconds)

    def _large(self, seconds: float) -> Plan | None:
        """To within :data:`GAP`, in half of the time; where that does not suffice, the cheaper of what was found and of
        :meth:`_by_largest`. The gap is to the best bound that is known."""
        found, bound, ends_s = None, 0.0, time.monotonic() + seconds
        if self.many * self.hours <= WHOLE:
            with suppress(UsageError):  # nothing was found in time
                found = self._run(*self._limits(), seconds / 2, GAP)
                if found is None or found.status == 0:
                    return None if found is None else self._plan(found.x, float(found.mip_gap or 0.0))
                bound = float(found.mip_dual_bound or 0.0)
        with suppress(UsageError) if found is not None else nullcontext():
            by_largest = self._by_largest(max(ends_s - time.monotonic(), seconds / 2))
            if by_largest is not None and (found is None or by_largest.fun < found.fun):
                found = by_largest
        relaxed = self._run(*self._limits(), seconds, integers=False)
        if found is None or relaxed is None:
            return None
        bound = max(bound, relaxed.fun)
        return self._plan(found.x, max(1 - bound / found.fun, 0.0) if found.fun > 0 else 0.0)

    def _by_largest(self, seconds: float) -> Any:
        """Whether a kind is in use (z) makes the programme hard and decides the size of the spare alone. So every kind
        in turn is taken for the largest in use, in every hour: quick, and too dear where small ones would do for a
        night."""
        sizes = self.counted.max(axis=1)
        kinds = np.flatnonzero(sizes > 0)
        best = None
        for largest in kinds:
            low, high = self._limits()
            low[3], high[:, sizes > sizes[largest]] = 1.0, 0.0
            low[3, high[3] == 0] = 0.0
            found = self._run(low, high, seconds / len(kinds), GAP)
            if found is not None and (best is None or found.fun < best.fun):
                best = found
        return best

    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        upper = np.full((5, self.many, self.hours), float(self.most))
        upper[3] = 1.0
        upper[:, self.counted <= 0] = 0.0
        return np.zeros_like(upper), upper

    def _run(
        self, low: np.ndarray, high: np.ndarray, seconds: float, gap: float = 0.0, *, integers: bool = True
    ) -> Any:
        """SciPy's result; None where there is no solution. Raises UsageError where none was found in time."""
        lengths = [len(index) for index, _, _, _ in self.rows]
        at = (
            np.repeat(np.arange(len(self.rows)), lengths),
            np.concatenate([np.asarray(index) for index, _, _, _ in self.rows]),
        )
        values = np.concatenate([np.asarray(value, float) for _, value, _, _ in self.rows])
        matrix = sparse.csr_array((values, at), shape=(len(self.rows), low.size))
        least, most = np.array([r[2] for r in self.rows]), np.array([r[3] for r in self.rows])
        result = optimize.milp(
            self._prices().ravel(),
            constraints=optimize.LinearConstraint(matrix, least, most),  # pyright: ignore[reportArgumentType]
            bounds=optimize.Bounds(low.ravel(), high.ravel()),  # pyright: ignore[reportArgumentType]
            integrality=np.full(low.size, int(integers)),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if result.x is None and result.status == 1:
            raise UsageError(f"no plan was found in {seconds:g} s", fix="Give --seconds more, or fewer hours")
        return None if result.x is None else result

    def _column(self, kind: int, pool: int, hour: int) -> int:
        return (kind * self.many + pool) * self.hours + hour % self.hours

    def _row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self.rows.append(([c for c, _ in terms], [v for _, v in terms], low, high))

    def _enough(self, pool: int, hour: int) -> int:
        """Replicas of a pool that serve an hour alone, however large the spare: more are never needed."""
        size = self.counted[pool, hour]
        lost = self.terms.spare * float(self.counted[:, hour].max())
        return math.ceil((float(self.need[hour]) + lost) / size - 1e-9) if size > 0 else 0

    def _prices(self) -> np.ndarray:
        cost = np.zeros((5, self.many, self.hours))
        for p, pool in enumerate(self.pools):
            cost[0, p] = pool.usd_per_hour
            # a start-up that costs nothing is still not made for nothing
            cost[2, p] = pool.usd_per_hour * max(pool.ahead_h, 1e-9)
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
                self._row([(self._column(1, p, h), 1), (self._column(3, p, h), -self._enough(p, h))], -np.inf, 0)

    def _serve(self) -> None:
        """What is ready serves the demand with the spare lost, whichever kind in use that is."""
        for h in np.flatnonzero(self.need > 0).tolist():
            served = [(self._column(1, p, h), self.counted[p, h]) for p in range(self.many)]
            least = min((x for x in self.counted[:, h] if x > 0), default=0.0)  # some kind is in use: helps the solver
            self._row(served, self.need[h] + self.terms.spare * least, np.inf)
            for q in range(self.many):
                lost = self.terms.spare * self.counted[q, h]
                self._row([*served, (self._column(3, q, h), -lost)], self.need[h], np.inf)

    def _share(self) -> None:
        """Requests come to every replica that runs, needed or not: spot machines count from when they are paid, the
        others where they are ready."""
        share, spot = self.terms.spot_share, [pool.spot for pool in self.pools]
        for h in range(self.hours if any(spot) and share < 1 else 0):
            counted = []
            for p, pool in enumerate(self.pools):
                if pool.spot:
                    counted.append((self._column(0, p, h), self.counted[p, h] * (1 - share)))
                    continue
                counted.append((self._column(4, p, h), -self.counted[p, h] * share))
                for j in range(min(pool.late_h, self.hours - 1) + 1):
                    self._row([(self._column(4, p, h), 1), (self._column(0, p, h - j), -1)], -np.inf, 0)
            self._row(counted, -np.inf, 0)

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
        x = np.rint(x).reshape(5, self.many, self.hours)
        replicas, ready, *_ = (part.astype(np.int64) for part in x)
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
