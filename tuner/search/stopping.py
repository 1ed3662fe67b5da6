"""When a search ends, in words: the budget is spent, or what is still to be gained no longer pays for a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuner.search.ledger import Seen
from tuner.spec.study import Budget

MIN_GAIN = 0.003  # share of the front's hypervolume that a launch has to promise
PATIENCE = 3  # proposals in a row that promise less, before the search ends
FEWEST = 8  # launches before the promise is believed at all


@dataclass(frozen=True, slots=True)
class Spent:
    """What a search has used so far. ``gains`` are the expected gains of its proposals in order (shares of the front's
    hypervolume), ``launch_s`` and ``launch_usd`` what a launch takes (0: not known yet)."""

    launches: int = 0
    hours: float = 0.0
    usd: float = 0.0
    gains: tuple[float, ...] = ()
    launch_s: float = 0.0
    launch_usd: float = 0.0


def spent(seen: Sequence[Seen], usd_per_hour: Sequence[float]) -> Spent:
    """What the trials in ``seen`` used; ``usd_per_hour`` is each trial's price (GPUs x price). Trials told for free
    count for nothing; hours are those in which at least one trial ran (parallel ones count once, pauses not at all)."""
    launched = [(s, usd) for s, usd in zip(seen, usd_per_hour, strict=True) if not s.free]
    timed = [(s, usd) for s, usd in launched if s.seconds > 0]
    paid = [s.seconds / 3600 * usd for s, usd in timed]
    return Spent(
        launches=len(launched),
        hours=_covered_s([(s.started_s, s.ended_s) for s, _ in timed]) / 3600,
        usd=math.fsum(paid),
        gains=tuple(s.expected_gain for s, _ in launched if s.expected_gain is not None),
        launch_s=math.fsum(s.seconds for s, _ in timed) / len(timed) if timed else 0.0,
        launch_usd=math.fsum(paid) / len(timed) if timed else 0.0,
    )


def for_search(budget: Budget) -> Budget:
    """The part of a budget that the search may spend; the rest is kept for verification (one launch at least each)."""
    share = 1 - budget.verify_share
    launches = budget.launches
    return replace(
        budget,
        launches=None if launches is None else max(math.floor(launches * share + 1e-9), 1),
        hours=None if budget.hours is None else budget.hours * share,
        usd=None if budget.usd is None else budget.usd * share,
    )


def over(used: Spent, budget: Budget) -> str:
    """Why no further launch fits into ``budget``; empty where one does."""
    if budget.launches is not None and used.launches >= budget.launches:
        return f"the budget of {budget.launches} launches is spent"
    if budget.hours is not None and used.hours + used.launch_s / 3600 > budget.hours:
        left_min = max(budget.hours - used.hours, 0) * 60
        return f"{left_min:.0f} minutes of {budget.hours:g} h are left, and a launch takes {used.launch_s / 60:.0f}"
    if budget.usd is not None and used.usd + used.launch_usd > budget.usd:
        left = max(budget.usd - used.usd, 0)
        return f"${left:.2f} of ${budget.usd:.2f} are left, and a launch costs ${used.launch_usd:.2f}"
    return ""


def exhausted(used: Spent, *, min_gain: float = MIN_GAIN, patience: int = PATIENCE) -> str:
    """Why another launch no longer pays: the last ``patience`` proposals each promised less than ``min_gain``; empty
    where it does, or where nothing is known of it (another sampler)."""
    last = used.gains[-patience:]
    if used.launches < FEWEST or len(last) < patience or max(last) >= min_gain:
        return ""
    each = ", ".join(f"{gain:.2%}" for gain in last)
    price = f", for ${used.launch_usd:.2f} each" if used.launch_usd else ""
    return (
        f"the best untried configuration is expected to grow the front's hypervolume by {last[-1]:.2%}"
        f" (the last {patience} proposals: {each}{price}), and a launch has to promise {min_gain:.2%}"
    )


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds covered by at least one of the spans."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total
