"""How much of its capacity a replica may be given, so that an hour holds the SLOs although its traffic fluctuates.

A measured capacity belongs to a rate that was known. In a fleet a replica's rate is not: independent requests that are
split at random come in Poisson numbers, and users may come together (``swing``). What fluctuates within one measured
window is in the measurement already; what differs between windows is added here. Over an hour the share of requests
beyond a limit is the mean over its windows, and the rate is the highest whose mean stays within what the SLO allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from tuner.fleet.curve import NODES, WEIGHTS, Curve
from tuner.fleet.offer import Offer

Routing = Literal["random", "two-choices", "least-loaded"]
ROUTINGS: Mapping[str, str] = {
    "random": "every request goes to a replica drawn at random, by capacity",
    "two-choices": "every request goes to the less loaded of two replicas drawn at random",
    "least-loaded": "every request goes to the least loaded replica",
}


def allowed_rps(offer: Offer, total_rps: float, swing: float, routing: Routing, window_s: float) -> float:
    """Requests per second that a replica of ``offer`` may be given in a fleet that serves ``total_rps``; 0 where it
    would hold the SLOs at no rate. Never more than the low end of its capacity."""
    low, high = 0.0, offer.capacity[1]
    if _holds(offer.curve, high, total_rps, swing, routing, window_s):
        return high
    for _ in range(30):
        middle = (low + high) / 2
        good = _holds(offer.curve, middle, total_rps, swing, routing, window_s)
        low, high = (middle, high) if good else (low, middle)
    return low if low > offer.capacity[1] * 1e-3 else 0.0


def _holds(curve: Curve, rate: float, total_rps: float, swing: float, routing: Routing, window_s: float) -> bool:
    """Whether the mean over windows of what each limit counts is within what it allows."""
    seen_by = rate if routing == "random" else max(total_rps, rate)
    spread = math.sqrt(swing**2 + 1 / (seen_by * window_s))
    factors = np.exp(spread * NODES - spread**2 / 2)  # log-normal, mean 1: a rate is never negative
    rates = rate * factors
    inside = curve.holds_inside(rates)
    inside = inside + np.maximum(rates - curve.top_rps, 0.0) * window_s / 2  # what piles up, at the window's middle
    counted = curve.score(inside) @ (WEIGHTS * factors)  # a busy window has more requests
    return bool(np.all(counted <= [limit.allowed * (1 + 1e-9) for limit in curve.limits]))


def table(
    offers: tuple[Offer, ...], rate_rps: np.ndarray, swing: float, routing: Routing, window_s: float
) -> np.ndarray:
    """(offers, hours): :func:`allowed_rps` of every offer in every hour; hours of nearly equal demand share one."""
    found: dict[tuple[int, float], float] = {}
    allowed = np.zeros((len(offers), len(rate_rps)))
    for h, total in enumerate(rate_rps):
        # rounded down, so that a shared value is never too high
        coarse = 0.0 if routing == "random" or total <= 0 else 10 ** (math.floor(math.log10(total) * 50) / 50)
        for i, offer in enumerate(offers):
            key = (i, coarse)
            if key not in found:
                found[key] = allowed_rps(offer, coarse, swing, routing, window_s)
            allowed[i, h] = found[key]
    return allowed
