"""What a study has spent, and what is left: launches, hours of wall time, USD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.spec.study import Study
from tuner.study.price import per_hour
from tuner.study.store import TrialRecord


@dataclass(frozen=True, slots=True)
class Spent:
    launches: int
    hours: float
    usd: float


def spent(study: Study, trials: Sequence[TrialRecord], running: int = 0) -> Spent:
    """What the trials took. Hours are wall time in which at least one trial ran (parallel trials count once); USD is
    GPU-time (parallel trials count each). ``running`` launches count as launched."""
    spans = sorted((t.started_s, t.ended_s) for t in trials)
    wall_s, reached = 0.0, float("-inf")
    for start, end in spans:
        wall_s += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    usd = sum((t.ended_s - t.started_s) / 3600 * per_hour(t.config, study.objective) for t in trials)
    return Spent(len(trials) + running, wall_s / 3600, usd)


def exhausted(study: Study, used: Spent, share: float = 1.0) -> str:
    """Which limit is spent (``share`` of the budget is meant), in words; empty while there is some left."""
    budget = study.budget
    if budget.launches is not None and used.launches >= round(budget.launches * share):
        return f"the budget of {round(budget.launches * share)} launches is spent"
    if budget.hours is not None and used.hours >= budget.hours * share:
        return f"the budget of {budget.hours * share:.2g} hours is spent ({used.hours:.2f} h used)"
    if budget.usd is not None and used.usd >= budget.usd * share:
        return f"the budget of {budget.usd * share:.2f} USD is spent ({used.usd:.2f} USD used)"
    return ""


def left(study: Study, used: Spent) -> str:
    """What is left of the budget, for the live view."""
    budget, parts = study.budget, []
    if budget.launches is not None:
        parts.append(f"{max(0, budget.launches - used.launches)} launches")
    if budget.hours is not None:
        parts.append(f"{max(0.0, budget.hours - used.hours):.2f} h")
    if budget.usd is not None:
        parts.append(f"{max(0.0, budget.usd - used.usd):.2f} USD")
    return ", ".join(parts) or "no limit"
