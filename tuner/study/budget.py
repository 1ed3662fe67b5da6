"""What a study has spent, and what is left: launches, hours of wall time, USD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tuner.spec.study import HELD_OUT, Budget, Study
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
    """What the trials took, by number. Hours are wall time in which at least one trial ran (parallel trials count once,
    and a clock that is set back makes none of those that ran alone); USD is GPU-time (parallel trials count each).

    ``running`` launches count as launched, and with what the dearest so far cost (``guess_usd`` before the first has
    ended), and more while few have ended: of those that run side by side the cheap ones end first, so that the average
    promises too little.
    """
    wall_s, beside = 0.0, list[TrialRecord]()
    for trial in trials:
        if trial.alone and not study.storage:  # all before it had ended, whatever the clock says
            wall_s += _wall_s(beside)
            beside = []
        beside.append(trial)
    wall_s += _wall_s(beside)
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


def _wall_s(trials: Sequence[TrialRecord]) -> float:
    """For how long at least one of them ran, by the clock."""
    wall_s, reached = 0.0, -math.inf
    for start, end in sorted((t.started_s, t.ended_s) for t in trials):
        wall_s += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return wall_s


def of_search(paid: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Of what the budget has paid for all but the launches of verification."""
    return [t for t in paid if t.role != "verify"]


def for_search(budget: Budget) -> int:
    """How many of the budget's launches are the search's."""
    return max(math.floor((budget.launches or 0) * (1 - budget.verify_share) + 1e-9), 1)


def shared_out(budget: Budget) -> str:
    """The whole budget, and what of it the search may take, in words."""
    whole = _amounts(budget.launches, budget.hours, budget.usd)
    rest = 1 - budget.verify_share
    launches = budget.launches and for_search(budget)
    mine = _amounts(launches, budget.hours and budget.hours * rest, budget.usd and budget.usd * rest)
    if mine == whole:
        return f"{whole} (all for the search)"
    mine = mine if "," in mine else mine.partition(" ")[0]
    return f"{whole} (up to {mine} for the search, the rest for verification)"


def _amounts(launches: int | None, hours: float | None, usd: float | None) -> str:
    parts = [] if launches is None else [f"{launches} launch{'' if launches == 1 else 'es'}"]
    parts += [] if hours is None else [f"{hours:.3g} h"]
    parts += [] if usd is None else [f"{_usd(usd)} USD"]
    return ", ".join(parts) or "no limit"


def without(share: float, amount: float, launch: float) -> float:
    """Of ``amount`` (hours, USD) what the search has: all but verification's ``share``, or but what two launches of it
    take, without which nothing is verified, where that is more and not over half."""
    rest, least = amount * (1 - share), amount - 2 * launch
    return least if share and amount / 2 <= least < rest else rest


def verify_launch_s(searched: Sequence[TrialRecord], windows: int) -> float:
    """What a launch of verification takes on so many ``windows``: it starts as those of the search do, and has more
    steps. 0: none has any."""
    from tuner.verify.verification import LOADS

    starts, steps_s, steps = [], 0.0, 0
    for trial in searched:
        if trial.outcome.steps:
            took_s = max(0.0, trial.ended_s - trial.started_s)
            start_s = trial.outcome.boot.total_s
            starts.append(start_s if start_s < took_s else 0.0)  # emulated, and by an earlier version timed by the wall
            steps_s += took_s - starts[-1]
            steps += int((trial.extra or {}).get("loads", len(trial.outcome.steps)))
    return fmean(starts) + LOADS * windows * steps_s / steps if steps else 0.0


def fewest_windows(study: Study, held_out: int) -> int:
    """On how many of the ``held_out`` windows to verify where time is short: those that a study asks for, or three."""
    return min(held_out, HELD_OUT[0]) if study.heldout_windows is None else held_out


def verify_windows(study: Study, held_out: int, seconds: float, launch_s: Callable[[int], float]) -> int:
    """On how many of the ``held_out`` windows to verify in ``seconds``: as many as leave time for two launches of the
    default and of a finalist, or :func:`fewest_windows`. ``launch_s`` says what a launch takes on so many."""
    fewest = fewest_windows(study, held_out)
    return next((count for count in range(held_out, fewest, -1) if 4 * launch_s(count) <= seconds), fewest)


def search_is_over(study: Study, used: Spent, whole: Spent | None = None, verify_s: float = 0.0) -> str:
    """Why no further launch fits into the search's part of the budget, in words; empty while one does. ``whole`` is
    what search and verification took together (None: nothing was verified): the search has no more than it leaves.
    ``verify_s`` is what a launch of verification takes (0: not known)."""
    budget, whole = study.budget, whole or used
    launches, hours, usd = _of_search(budget, used, whole, verify_s)
    if budget.launches is not None and launches is not None and used.launches >= launches:
        made = max(launches, used.launches)  # it may have had more before its share was lowered
        kept = budget.launches - made
        to = "went to" if kept == whole.launches - used.launches else "are kept for"
        rest = f" (of the budget's {budget.launches}, {kept} {to} verification)" if kept > 0 else ""
        return f"the search's {made} launches are spent{rest}"
    if hours is not None and used.hours + used.launch_s / 3600 > hours:
        rest_min = max(hours - used.hours, 0) * 60
        return f"{rest_min:.0f} minutes of {hours:.4g} h are left, and a launch takes {used.launch_s / 60:.1f}"
    if usd is not None and used.launches and used.usd + used.launch_usd > usd:
        rest = max(usd - used.usd, 0)
        return f"{_usd(rest)} of {_usd(usd)} USD are left, and a launch costs {_usd(used.launch_usd)}"
    return ""


def unspent(study: Study, used: Spent, whole: Spent, verify_s: float = 0.0) -> str:
    """What a search that ends for want of gain leaves of its part of the budget, and what would spend it."""
    launches, hours, usd = _of_search(study.budget, used, whole, verify_s)
    parts = [] if launches is None else [f"{launches - used.launches} of its {launches} launches"]
    if hours is not None:
        parts.append(f"{max(hours - used.hours, 0):.2f} of its {hours:.4g} h")
    if usd is not None:
        parts.append(f"{_usd(max(usd - used.usd, 0))} of its {_usd(usd)} USD")
    return f"Left unspent by the search: {', '.join(parts)} (budget.min_gain: 0 spends them)"


def _of_search(
    budget: Budget, used: Spent, whole: Spent, verify_s: float
) -> tuple[int | None, float | None, float | None]:
    """The launches, hours and USD of the search; None where the budget does not limit them."""
    launches, hours, usd = budget.launches, budget.hours, budget.usd
    if launches is not None:
        launches = max(min(for_search(budget), launches - (whole.launches - used.launches)), 0)
    if hours is not None:
        mine = without(budget.verify_share, hours, verify_s / 3600)
        hours = max(min(mine, hours - (whole.hours - used.hours)), 0)
    if usd is not None:
        verify_usd = used.launch_usd * verify_s / used.launch_s if used.launch_s else 0.0
        mine = without(budget.verify_share, usd, verify_usd)
        usd = max(min(mine, usd - (whole.usd - used.usd)), 0)
    return launches, hours, usd


def left(study: Study, used: Spent) -> str:
    """What is left of the budget, for the live view."""
    budget, parts = study.budget, []
    if budget.launches is not None:
        launches = max(0, budget.launches - used.launches)
        kept = min(budget.launches - for_search(budget), launches)
        parts.append(f"{launches} launches" + (f" ({kept} for verification)" if kept else ""))
    if budget.hours is not None:
        parts.append(f"{max(0.0, budget.hours - used.hours):.2f} h")
    if budget.usd is not None:
        parts.append(f"{_usd(max(0.0, budget.usd - used.usd))} USD")
    return ", ".join(parts) or "no limit"


def _usd(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"
