"""What a fleet costs and does, hour by hour and per day: the rows of the table, the page and ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.fleet.fleet import Fleet
from tuner.fleet.words import assumptions, warnings
from tuner.study.store import finite


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour. ``replicas`` are paid, by pool (only those in use at some hour), of which ``starting`` do not serve
    yet; ``capacity_rps`` is what the others may be given, ``usd`` what the hour costs with its start-ups.
    ``used`` is by SLO which part of what it allows the simulation counted (above 1: missed); ``within`` the share of
    requests within the limit of the worst percentile; ``watts`` of all GPUs in the mean (None: not measured)."""

    label: str
    rate_rps: float
    replicas: Mapping[str, int]
    starting: int
    capacity_rps: float
    usd: float
    used: Mapping[str, float]
    within: float
    holds: bool
    watts: float | None


@dataclass(frozen=True, slots=True)
class Account:
    """``usd_per_day`` over 24 hours of the mean hour. Tokens are those of requests as they were measured; NaN where
    they were not. ``level_usd_per_day`` is the dearest hour's fleet kept all day: what scaling saves."""

    hours: tuple[Hour, ...]
    usd_per_day: float
    level_usd_per_day: float
    usd_per_mtok_output: float
    usd_per_mtok_total: float
    kwh_per_day: float | None
    j_per_output_token: float | None


def account(fleet: Fleet) -> Account:
    plan, day = fleet.plan, fleet.day
    used = [p for p in range(len(plan.pools)) if plan.replicas[p].any()]
    served = plan.ready * plan.allowed_rps * np.array([[p.available] for p in plan.pools])
    share = served / np.where(served.sum(axis=0) > 0, served.sum(axis=0), 1)  # (pools, hours) of the requests
    requests = share * fleet.demand.rate_rps * 3600
    watts = _watts(fleet, requests / 3600)
    outputs, totals = (
        float((requests.sum(axis=1) * [getattr(fleet.offers[p.offer], name) for p in plan.pools])[used].sum())
        for name in ("output_tokens", "total_tokens")
    )
    allowed = np.array([limit.allowed for limit in day.limits])
    usd = plan.usd_by_hour.sum(axis=0)
    hours = tuple(
        Hour(
            label=label,
            rate_rps=float(fleet.demand.rate_rps[h]),
            replicas={plan.pools[p].name: int(plan.replicas[p, h]) for p in used},
            starting=int((plan.replicas - plan.ready)[:, h].sum()),
            capacity_rps=float(plan.capacity_rps[h]),
            usd=float(usd[h]),
            used={str(x.slo): float(day.counted[i, h] / allowed[i]) for i, x in enumerate(day.limits)},
            within=float(day.attained[h]),
            holds=bool(day.holds[h]),
            watts=None if watts is None else float(watts[h]),
        )
        for h, label in enumerate(fleet.demand.labels)
    )
    per_day = 24 / len(hours)
    price = np.array([[p.usd_per_hour] for p in plan.pools])
    joules = None if watts is None else float(watts.sum()) * 3600
    return Account(
        hours=hours,
        usd_per_day=plan.usd * per_day,
        level_usd_per_day=float((price * plan.replicas).sum(axis=0).max()) * 24,
        usd_per_mtok_output=plan.usd / outputs * 1e6 if outputs else float("nan"),
        usd_per_mtok_total=plan.usd / totals * 1e6 if totals else float("nan"),
        kwh_per_day=None if joules is None else joules / 3.6e6 * per_day,
        j_per_output_token=None if joules is None or not outputs else joules / outputs,
    )


def _watts(fleet: Fleet, rate_rps: np.ndarray) -> np.ndarray | None:
    """(hours,) the fleet's power, start-ups before an hour in that hour; a replica below its lowest measured load, or
    starting, draws what it drew there. None where a kind in use has no measured power."""
    total = np.zeros(rate_rps.shape[1])
    for p, pool in enumerate(fleet.plan.pools):
        replicas, ready = fleet.plan.replicas[p], fleet.plan.ready[p]
        if not replicas.any():
            continue
        curve = fleet.offers[pool.offer].curve
        each, idle = curve.power_w(rate_rps[p] / np.maximum(ready, 1)), curve.power_w(np.zeros(1))
        if each is None or idle is None:
            return None
        total += each * ready + idle * (replicas - ready + pool.ahead_h * fleet.plan.starts[p])
    return total


def to_dict(fleet: Fleet) -> dict[str, Any]:
    """What ``--json`` prints. Rates are requests per second, ``spot`` pools are on spot machines."""
    found, terms = account(fleet), fleet.terms
    return finite(
        {
            "holds": fleet.holds,
            "missed": [fleet.demand.labels[h] for h in fleet.missed],
            "raised": [fleet.demand.labels[h] for h in fleet.raised],
            "usd_per_day": found.usd_per_day,
            "level_usd_per_day": found.level_usd_per_day,
            "usd_per_mtok_output": found.usd_per_mtok_output,
            "usd_per_mtok_total": found.usd_per_mtok_total,
            "kwh_per_day": found.kwh_per_day,
            "j_per_output_token": found.j_per_output_token,
            "gap": fleet.plan.gap,
            "slos": [str(slo) for slo in fleet.shop.slos],
            "unchecked": [str(slo) for slo in fleet.shop.unchecked],
            "demand": {"source": fleet.demand.source, "swing": fleet.demand.swing},
            "simulated": fleet.day.how,
            "routing": fleet.traffic.routing,
            "terms": {name: getattr(terms, name) for name in terms.__slots__},
            "offers": [
                {
                    "name": o.name,
                    "flags": dict(o.config.flags),
                    "gpu": o.gpu,
                    "gpus": o.gpus,
                    "usd_per_hour": o.usd_per_hour,
                    "capacity_rps": o.capacity,
                    "start_s": o.start_s,
                    "basis": o.basis,
                    "verified": o.verified,
                    "emulated": o.emulated,
                }
                for o in fleet.offers
            ],
            "hours": [
                {name: getattr(hour, name) for name in hour.__slots__} | {"replicas": dict(hour.replicas)}
                for hour in found.hours
            ],
            "assumptions": list(assumptions(fleet)),
            "notes": list(warnings(fleet)),
        }
    )
