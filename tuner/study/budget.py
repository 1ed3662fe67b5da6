"""What a study has spent, and what is left: launches, hours of wall time, USD."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.search import stopping
from tuner.search.stopping import Spent
from tuner.spec.study import Study
from tuner.study.price import per_hour
from tuner.study.store import TrialRecord


def spent(study: Study, trials: Sequence[TrialRecord], running: int = 0) -> Spent:
    """What the trials took. Hours are wall time in which at least one trial ran (parallel trials count once); USD is
    GPU-time (parallel trials count each). ``running`` launches count as launched."""
    wall_s, reached = 0.0, -math.inf
    for start, end in sorted((t.started_s, t.ended_s) for t in trials):
        wall_s += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    seconds = [t.ended_s - t.started_s for t in trials]
    usd = [s / 3600 * per_hour(t.config, study.objective) for s, t in zip(seconds, trials, strict=True)]
    gains = [(t.extra or {}).get("expected_gain") for t in trials]
    count = max(len(trials), 1)
    return Spent(
        launches=len(trials) + running,
        hours=wall_s / 3600,
        usd=math.fsum(usd),
        gains=tuple(gain for gain in gains if gain is not None),
        launch_s=math.fsum(seconds) / count,
        launch_usd=math.fsum(usd) / count,
    )


def search_is_over(study: Study, used: Spent) -> str:
    """Why the search launches nothing more, in words: its part of the budget is spent, or another launch would not
    pay; empty while it goes on."""
    return stopping.over(used, stopping.for_search(study.budget)) or stopping.exhausted(used)


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
