"""The fleet: offers and demand in, a plan and its simulated day out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tuner.errors import NothingFeasible
from tuner.fleet import day, requests
from tuner.fleet.day import Day, Traffic
from tuner.fleet.demand import Demand
from tuner.fleet.headroom import Routing, table
from tuner.fleet.offer import Offer, Shop
from tuner.fleet.plan import Plan, Terms, needs, pools_of
from tuner.fleet.programme import solve

Simulation = Literal["auto", "windows", "requests"]
FEW = 50_000  # requests up to which every one of them is simulated
TRIES = 6
MORE = 0.01  # what an hour that missed must serve beyond what it had before, doubled with each try
LONG = 7 * 24  # hours beyond which no request is simulated alone: that costs time by the hour, too
ENOUGH = 0.99  # share of the hours that must hold


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """What is planned and what it was planned from. ``raised`` are the hours that had to be given more than the
    headroom asked for, because the simulated day missed in them."""

    shop: Shop
    demand: Demand
    terms: Terms
    traffic: Traffic
    confidence: float
    plan: Plan
    day: Day
    raised: tuple[int, ...]

    @property
    def offers(self) -> tuple[Offer, ...]:
        return self.shop.offers

    @property
    def missed(self) -> tuple[int, ...]:
        """The hours in which the simulated day does not hold the SLOs."""
        return tuple(int(h) for h in np.flatnonzero(~self.day.holds))

    @property
    def holds(self) -> bool:
        """Whether 99 % of the hours hold."""
        return float(self.day.holds.mean()) >= ENOUGH


def build(
    shop: Shop,
    demand: Demand,
    terms: Terms,
    *,
    routing: Routing = "random",
    confidence: float = 0.95,
    simulation: Simulation = "auto",
    seconds: float = 60.0,
    seed: int = 0,
) -> Fleet:
    """Plans, simulates, and plans again with more in the hours that missed, at most :data:`TRIES` times.

    Raises NothingFeasible where no fleet serves the demand under ``terms``.
    """
    window_s = min(offer.window_s for offer in shop.offers)
    traffic = Traffic(demand.rate_rps, demand.swing, routing, window_s)
    allowed = table(shop.offers, demand.rate_rps, demand.swing, routing, window_s)
    worth = _worth(shop.offers, allowed)
    offers, allowed = tuple(shop.offers[i] for i in worth), allowed[worth]
    shop = replace(shop, offers=offers)
    pools = pools_of(offers, terms)
    allowed_rps = allowed[[pool.offer for pool in pools]]
    need, raised = needs(demand.rate_rps, terms.hold_h), np.zeros(len(demand), dtype=bool)
    for attempt in range(TRIES):
        plan = solve(pools, need, allowed_rps, terms, seconds=seconds)
        if plan is None:
            raise NothingFeasible(*_why_not(demand, allowed, terms))
        found = _simulated(plan, offers, traffic, terms, simulation, seed)
        missed = ~found.holds
        if not missed.any() or attempt == TRIES - 1:
            break
        raised |= missed
        # what it had, spare and rounding included, was not enough
        more = np.maximum(need, plan.capacity_rps - _largest(plan, terms)) * (1 + MORE * 2**attempt)
        need = np.where(missed, more, need)
    return Fleet(shop, demand, terms, traffic, confidence, plan, found, tuple(np.flatnonzero(raised).tolist()))


def _simulated(
    plan: Plan, offers: Sequence[Offer], traffic: Traffic, terms: Terms, simulation: Simulation, seed: int
) -> Day:
    few = float(traffic.rate_rps.sum()) * 3600 <= FEW and len(traffic.rate_rps) <= LONG
    chosen = requests.simulate if simulation == "requests" or (simulation == "auto" and few) else day.simulate
    interruptions = terms.interruptions_per_hour
    return chosen(plan, offers, traffic, spare=terms.spare, interruptions_per_hour=interruptions, seed=seed)


def _largest(plan: Plan, terms: Terms) -> np.ndarray:
    """(hours,) what the spare replicas of the largest kind in use could serve."""
    counted = plan.allowed_rps * np.array([[pool.available] for pool in plan.pools])
    return terms.spare * np.where(plan.ready > 0, counted, 0.0).max(axis=0)


def _worth(offers: Sequence[Offer], allowed: np.ndarray) -> list[int]:
    """The offers (their indices) that no other one beats in everything: as cheap or cheaper, as much or more allowed in
    every hour, ready as soon, with as few GPUs of the same kind. The first of equals stays."""

    def at_least(j: int, i: int) -> bool:
        mine, other = offers[i], offers[j]
        return (
            other.gpu == mine.gpu
            and other.gpus <= mine.gpus
            and other.usd_per_hour <= mine.usd_per_hour
            and other.start_s <= mine.start_s
            and bool((allowed[j] >= allowed[i]).all())
        )

    def beaten(i: int) -> bool:
        return any(j != i and at_least(j, i) and (j < i or not at_least(i, j)) for j in range(len(offers)))

    return [i for i in range(len(offers)) if not beaten(i)]


def _why_not(demand: Demand, allowed: np.ndarray, terms: Terms) -> tuple[str]:
    if not (allowed > 0).any():
        return (
            "No replica holds the SLOs under traffic that fluctuates so: even at a thousandth of its capacity windows "
            f"in which the rate swings by {demand.swing * 100:.0f} % miss them. Loosen the SLOs or see --swing.",
        )
    bounds = ", ".join(f"{n} GPUs{f' {name}' if name else ''}" for name, n in terms.max_gpus.items())
    peak = float(demand.rate_rps.max())
    return (
        f"No fleet serves {peak:.6g} requests/s"
        + (f" within {bounds}" if bounds else "")
        + (f" with {terms.spare} spare" if terms.spare else "")
        + ". Allow more GPUs, fewer spares, or a lower demand.",
    )
