"""A plan: how many replicas of each kind in each hour, and what it must obey. Hours follow each other in a circle: the
day repeats. :mod:`tuner.fleet.programme` finds the cheapest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.fleet.demand import HOUR_S
from tuner.fleet.offer import Offer


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
    it serves, ``usd_per_hour`` its price there. A start-up takes ``start_h`` hours, of which ``ahead_h`` are paid
    before the hour for which it is made; where scaling knows of the need too late for that, it is made ``late_h`` hours
    earlier and is not ready in these (paid) hours."""

    offer: int
    name: str
    spot: bool
    usd_per_hour: float
    available: float
    start_h: float
    ahead_h: float
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
        """(pools, hours) replicas and, with the hour for which they start, what is paid before it."""
        price = np.array([[p.usd_per_hour] for p in self.pools])
        start = np.array([[p.usd_per_hour * p.ahead_h] for p in self.pools])
        return price * self.replicas + start * self.starts


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
        ahead_h = min(offer.start_s, terms.lead_s) / HOUR_S
        times = {"start_h": start_h, "ahead_h": ahead_h, "late_h": late_h}
        shared = times | {"gpu": offer.gpu, "gpus": max(offer.gpus, 1)}
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
