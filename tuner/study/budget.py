"""What a study has spent, and what is left: launches, hours of wall time, USD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.spec.study import Budget, Study
from tuner.study.price import per_hour
from tuner.study.store import TrialRecord


@dataclass(frozen=True, slots=True)
class Spent:
    """What trials took; ``usd`` has what runs in it, with what it may cost. ``launch_s`` and ``launch_usd`` are what a
    launch took on average (before the first has ended 0, and what was guessed)."""

    launches: int
    hours: float
    usd: float
    launch_s: float
    launch_usd: float


def spent(study: Study, trials: Sequence[TrialRecord], running: int = 0, guess_usd: float = 0.0) -> Spent:
    """What the trials took. Hours are wall time in which at least one trial ran (parallel trials count once); USD is
    GPU-time (parallel trials count each).

    ``running`` launches count as launched, and with what the dearest so far cost (``guess_usd`` before the first has
    ended), and more while few have ended: of those that run side by side the cheap ones end first, so that the average
    promises too little.
    """
    wall_s, reached = 0.0, -math.inf
    for start, end in sorted((t.started_s, t.ended_s) for t in trials):
        wall_s += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    seconds = [max(0.0, t.ended_s - t.started_s) for t in trials]
    usd = [s / 3600 * per_hour(t.config, study.objective, t.price) for s, t in zip(seconds, trials, strict=True)]
    count = max(len(trials), 1)
    each = max(usd, default=guess_usd) * (1 + 1 / count)
    return Spent(
        launches=len(trials) + running,
        hours=wall_s / 3600,
        usd=math.fsum(usd) + running * each,
        launch_s=math.fsum(seconds) / count,
        launch_usd=math.fsum(usd) / count if usd else guess_usd,
    )


def for_search(budget: Budget) -> int:
    """How many of the budget's launches are the search's."""
    return max(math.floor((budget.launches or 0) * (1 - budget.verify_share) + 1e-9), 1)


def search_is_over(study: Study, used: Spent) -> str:
    """Why no further launch fits into the search's part of the budget, in words; empty while one does."""
    budget, share = study.budget, 1 - study.budget.verify_share
    if budget.launches is not None:
        launches = for_search(budget)
        if used.launches >= launches:
            kept = budget.launches - launches
            rest = f" (of the budget's {budget.launches}, {kept} are kept for verification)" if kept else ""
            return f"the search's {launches} launches are spent{rest}"
    if budget.hours is not None and used.hours + used.launch_s / 3600 > budget.hours * share:
        rest_min = max(budget.hours * share - used.hours, 0) * 60
        takes = f"a launch takes {used.launch_s / 60:.1f}"
        return f"{rest_min:.0f} minutes of {budget.hours * share:g} h are left, and {takes}"
    if budget.usd is not None and used.launches and used.usd + used.launch_usd > budget.usd * share:
        rest = max(budget.usd * share - used.usd, 0)
        return f"{_usd(rest)} of {_usd(budget.usd * share)} USD are left, and a launch costs {_usd(used.launch_usd)}"
    return ""


def left(study: Study, used: Spent) -> str:
    """What is left of the budget, for the live view."""
    budget, parts = study.budget, []
    if budget.launches is not None:
        kept = budget.launches - for_search(budget)
        of_them = f" ({kept} for verification)" if kept else ""
        parts.append(f"{max(0, budget.launches - used.launches)} launches{of_them}")
    if budget.hours is not None:
        parts.append(f"{max(0.0, budget.hours - used.hours):.2f} h")
    if budget.usd is not None:
        parts.append(f"{_usd(max(0.0, budget.usd - used.usd))} USD")
    return ", ".join(parts) or "no limit"


def _usd(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"
