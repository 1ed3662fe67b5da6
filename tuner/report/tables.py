"""The rows of the report's tables, as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.pareto.front import COST, Point
from tuner.report.summary import Summary, kind, label, ms, spread, why
from tuner.search.causes import suspected
from tuner.search.reading import cause as cause_of
from tuner.study.outcome import Aborted, Infeasible, Measured, Outcome, held, held_everywhere
from tuner.study.price import GOODPUT
from tuner.study.store import TrialRecord
from tuner.words import figure

Table = tuple[list[str], list[list[str]]]
STANDS_OUT = 0.25  # probability from which a condition is said


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial. ``phases`` are (name, seconds, share of the longest start-up of the study, number of its colour)."""

    number: int
    kind: str
    role: str
    flags: list[str]
    baseline: bool
    chosen: bool
    capacity: str
    cost: str
    latency: str
    boot: str
    phases: tuple[tuple[str, float, float, int], ...]
    minutes: str
    why: str


@dataclass(frozen=True, slots=True)
class Failure:
    """All trials that failed for one cause. ``where`` is the condition that most of them are put down to, with
    its probability over all of them, where one stands out (:mod:`tuner.search.causes`)."""

    cause: str
    message: str
    stage: str
    fix: str
    where: str
    trials: tuple[tuple[int, str, str], ...]  # number, configuration, evidence


def point_row(s: Summary, p: Point) -> dict[str, Any]:
    return {
        "cost": figure(p.cost),
        "cost_spread": spread(p.cost, p.cost_interval),
        "latency": ms(p.latency),
        "latency_spread": spread(p.latency, p.latency_interval, 1e3),
        "load": figure(p.load),
        "tokens": f"{p.metrics[GOODPUT]:,.0f}" if GOODPUT in p.metrics else "-",
        "trial": p.trial,
        "ties": ", ".join(str(trial) for trial in dict.fromkeys(trial for trial, _ in p.ties)),
        "flags": s.flags(p.config),
        "chosen": s.chosen(p),
        "baseline": p.baseline,
        "off_front": p is s.off_front,
    }


def trial_row(s: Summary, trial: Any) -> TrialRow:
    good = [p for p in s.points if trial.number in p.trials and p.ok]
    cheapest = min(good, key=lambda p: (p.cost, p.latency), default=None)
    longest_s = max((sum(t.outcome.boot.phases_s.values()) for t in s.trials), default=0.0) or 1.0
    colors = phase_names(s)
    phases = trial.outcome.boot.phases_s.items()
    chosen = s.choice.point
    return TrialRow(
        number=trial.number,
        kind=kind(trial.outcome),
        role=trial.role,
        flags=s.flags(trial.config),
        baseline=trial.baseline,
        chosen=bool(chosen and chosen.config.hash == trial.config.hash),
        capacity=_capacity(trial.outcome),
        cost=figure(cheapest.cost) if cheapest else "-",
        latency=ms(cheapest.latency) if cheapest else "-",
        boot=f"{trial.outcome.boot.total_s:.0f}",
        phases=tuple((name, seconds, seconds / longest_s, colors.index(name)) for name, seconds in phases),
        minutes=f"{(trial.ended_s - trial.started_s) / 60:.1f}",
        why=why(trial.outcome),
    )


def _capacity(outcome: Outcome) -> str:
    """The load that every window held."""
    load = held_everywhere(outcome.steps) if isinstance(outcome, Measured | Aborted) else 0.0
    return f"{'≥ ' if isinstance(outcome, Aborted) else ''}{figure(load)}" if load else "-"


def phase_names(s: Summary) -> list[str]:
    """The phases of start-up that any trial had, in order of appearance."""
    return list(dict.fromkeys(name for trial in s.trials for name in trial.outcome.boot.phases_s))


def failures(s: Summary) -> list[Failure]:
    """Infeasible trials by cause and what they said (figures aside), the most frequent first."""
    causes: dict[str, list[Any]] = {}
    told = [(t.config.params, t.outcome) for t in s.trials]
    served = any(isinstance(outcome, Measured | Aborted) for _, outcome in told)
    where = suspected(s.study.space, told) if served else {}  # else every condition holds wherever it crashed
    for trial in s.trials:
        if isinstance(trial.outcome, Infeasible):
            causes.setdefault(cause_of(trial.outcome), []).append(trial)
    found = []
    for same, trials in sorted(causes.items(), key=lambda item: -len(item[1])):
        first = trials[0].outcome
        rows = tuple((t.number, s.name(t.config), t.outcome.evidence) for t in trials)
        words, weight = where.get(same, ("", 0.0))
        words = f"{words} ({weight:.0%})" if weight >= STANDS_OUT else ""
        found.append(Failure(first.cause, first.message, first.stage, first.fix, words, rows))
    return found


def unserved(s: Summary) -> list[tuple[str, str, str]]:
    """Per parameter that has them: its values that no trial was launched with, and those that no launch served with
    (with the number of launches), where the parameter applied. What is not known of them is not known of the front."""
    rows = []
    space, ended = s.study.space, [t for t in s.trials if not isinstance(t.outcome, Aborted)]
    active = [(space.active(space.snap(t.params)), isinstance(t.outcome, Infeasible)) for t in ended]
    for p in space.parameters if ended else ():
        launched = Counter(applied[p.name] for applied, _ in active if p.name in applied)
        served = {applied[p.name] for applied, crashed in active if p.name in applied and not crashed}
        never = ", ".join(str(v) for v in p.values if v not in launched)
        failed = ", ".join(f"{v} ({launched[v]})" for v in p.values if v in launched and v not in served)
        if never or failed:
            rows.append((p.name, never, failed))
    return rows


def windows(s: Summary, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Per trial and window the highest load within SLO, with its cost and latency (95 % within that step), and the
    lowest load above it that missed. Steps that are not trusted do not count."""
    latency = (f"{label(s.study.objective.latency)} ms", s.study.objective.latency_key, 1e3)
    found: list[dict[str, Any]] = []
    for trial in trials:
        missed = sorted((x for x in trial.outcome.steps if x.slo_misses and not x.untrusted), key=lambda x: x.load)
        for window, step in sorted(held(trial.outcome.steps).items()):
            beyond = step.load if step else 0.0
            above = next((x for x in missed if x.window == window and x.load > beyond), None)
            row: dict[str, Any] = {"configuration": s.name(trial.config), "trial": trial.number}
            row["window"] = window.rpartition("/")[2]
            row["load within SLO"] = step.load if step else "none"
            for name, metric, scale in (("USD per M output tokens", COST, 1.0), latency):
                row[name] = step.metrics[metric] * scale if step else None
                if step and metric in step.intervals:
                    row |= zip(
                        (f"{name}_low", f"{name}_high"), (x * scale for x in step.intervals[metric]), strict=True
                    )
            row["missed at"] = f"{figure(above.load)}: {'; '.join(above.slo_misses)}" if above else ""
            found.append(row)
    return found


WORDS = {
    "config": "configuration",
    "load": "load to deploy at",
    "capacity": "SLOs start to fail at load",
    "cost_usd_per_mtok_output": "USD per M output tokens there",
    "_vs_default": "over the default's",
    "p_not_better": "p: at most 1 % cheaper than the default",
    "p_best": "probability of being the cheapest",
    "slos_hold": "SLOs held",
    "safe_load": "SLOs hold up to load (95 %)",
}


def verdict_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``verify.json`` with their columns in words."""

    def word(name: str) -> str:
        end = next((end for end in ("_low", "_high") if name.endswith(end)), "")
        bare = name.removesuffix(end)
        if bare.endswith("_vs_default"):
            return f"{_metric(bare.removesuffix('_vs_default'))} {WORDS['_vs_default']}{end}"
        if bare.endswith("_ms"):
            return f"{_metric(bare.removesuffix('_ms'))} ms at the load to deploy at{end}"
        return WORDS.get(bare, bare) + end

    return [{word(name): value for name, value in row.items()} for row in rows]


def _metric(name: str) -> str:
    return name if name == "cost" else label(name)


def folded(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Any rows as headings and cells: ``x``, ``x_low`` and ``x_high`` share a cell, columns without a value are left
    out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high") if f"{name}{end}" in names}
    kept = [n for n in names if n not in ends and any(row.get(n) not in (None, "") for row in rows)]
    return [name.replace("_", " ") for name in kept], [[_cell(row, name) for name in kept] for row in rows]


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, low, high = row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")
    text = _number(value)
    if high == math.inf:
        return f"{text} (≥ {_number(low)})"
    if isinstance(low, float) and isinstance(high, float) and high > 10 * max(low, 0.0):
        return f"{text} (could not be bounded)"
    return f"{text} ({_number(low)} to {_number(high)})" if low is not None or high is not None else text


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "–"
    return figure(value) if isinstance(value, float) else str(value)
