"""Where the GPU-time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.report.summary import Summary
from tuner.study.outcome import Infeasible, Measured, Untrusted
from tuner.study.price import per_hour
from tuner.study.store import TrialRecord


@dataclass(frozen=True, slots=True)
class Hours:
    """GPU-hours (server-hours on CPUs) by use, in order, and of the start-ups by phase. ``usd`` is all of it at the
    price of where each trial ran. Idle time between trials is not in it."""

    uses: tuple[tuple[str, float], ...]
    phases: tuple[tuple[str, float], ...]
    total: float
    usd: float
    unit: str


def hours(s: Summary, ladder: Sequence[TrialRecord] = ()) -> Hours:
    """Start-up is ``boot.total_s`` of a trial that was measured; a launch that failed is waste from first to last.
    ``ladder``: the launch that settled the ladder, which is no trial but part of the budget."""
    uses: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    usd = 0.0
    for trial in (*s.trials, *ladder):
        gpus = max(trial.config.gpus, 1)
        whole_s = max(trial.ended_s - trial.started_s, 0.0)
        boot_s = min(trial.outcome.boot.total_s, whole_s)
        usd += whole_s / 3600 * per_hour(trial.config, s.study.objective, trial.price)
        for phase, seconds in trial.outcome.boot.phases_s.items():
            phases[phase] += seconds * gpus / 3600
        if isinstance(trial.outcome, Infeasible):
            uses["failed launches"] += whole_s * gpus / 3600
            continue
        uses["starting servers"] += boot_s * gpus / 3600
        uses["settling the ladder" if trial in ladder else _use(trial)] += (whole_s - boot_s) * gpus / 3600
    order = ("starting servers", "settling the ladder", "measuring", "verifying", "stopped early", "not trusted")
    order = (*order, "failed launches")
    total = sum(uses.values())
    return Hours(
        uses=tuple((name, uses[name]) for name in order if uses[name] > 0),
        phases=tuple(sorted(phases.items(), key=lambda item: -item[1])),
        total=total,
        usd=usd,
        unit="GPU-hours" if any(t.config.gpus for t in s.trials) else "server-hours",
    )


def _use(trial: TrialRecord) -> str:
    if isinstance(trial.outcome, Untrusted):
        return "not trusted"
    if not isinstance(trial.outcome, Measured):
        return "stopped early"
    return "measuring" if trial.role == "search" else "verifying"
