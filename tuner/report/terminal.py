"""The front and a single trial on the terminal, and the same as JSON-ready data."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tuner.errors import UsageError
from tuner.measure.server import in_words
from tuner.pareto.changes import changes
from tuner.pareto.front import COST, Point
from tuner.record.secrets import hide
from tuner.report.summary import Summary, clean, kind, label, ms, spread, summarize, why
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible, Step, to_dict
from tuner.study.price import GOODPUT, OUTPUT, TOTAL
from tuner.study.store import Store, TrialRecord
from tuner.words import figure

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tuner.verify.compare import Comparison


def front_data(store: Store, study: Study) -> dict[str, Any]:
    """The front, the recommendation and what failed; latencies in seconds, money in USD."""
    s = summarize(store, study)
    choice = s.choice
    return clean(
        {
            "study": study.name,
            "folder": str(store.folder),
            "emulated": s.emulated,
            "latency": study.objective.latency,
            "slo": [str(slo) for slo in study.objective.slos],
            "trials": dict(s.kinds()),
            "front": [_point_data(s, p) for p in s.front],
            "recommended": _point_data(s, choice.point) if choice.point else None,
            "default": _point_data(s, choice.baseline) if choice.baseline else None,
            "cost_change": _change(choice.cost_change),
            "latency_change": _change(choice.latency_change),
            "traffic": _traffic_data(s),
            "text": choice.text,
            "failures": dict(_causes(s)),
        }
    )


def front_table(store: Store, study: Study) -> RenderableType:
    """The front as a table, cheapest first, with the recommendation in words below it."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    s = summarize(store, study)
    parts: list[RenderableType] = []
    if s.emulated:
        parts.append(Text("EMULATED: a model of the hardware answered, nothing was measured.", style="bold yellow"))
    if s.front:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column("", width=1)
        latency = f"{label(study.objective.latency)}\nms"
        for name in ("$ per M\nout tokens", latency, "load", "good out\ntokens/s", "trial", "not told\napart from"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = [*s.front, *([s.off_front] if s.off_front else [])]
        names = {p.trial: s.name(p.config) for p in reversed(shown)}  # an ablated one has its trial's number
        defaults = [p for p in s.points if p.baseline and p.ok]
        if defaults and not any(p.baseline for p in shown):
            shown.append(min(defaults, key=lambda p: p.cost))
            names[shown[-1].trial] = "engine default, for comparison: off the front"
        for p in shown:
            style = "bold" if s.chosen(p) else "dim" if p not in s.front else None
            table.add_row(*_row(s, p), style=style)
        parts.append(table)
        if s.off_front:
            parts += [Text(f"→ {s.apart}", style="dim"), Text("")]
        legend = Table.grid(padding=(0, 2))
        legend.add_column(justify="right")
        legend.add_column(overflow="fold")
        for number, name in sorted(names.items()):
            legend.add_row(str(number), name)
        parts += [Text("Flags off the engine's default, by trial", style="bold"), legend, Text("")]
    parts.append(Text(s.choice.text))
    if s.traffic:
        parts.append(Text(str(s.traffic)))
    causes = _causes(s)
    if causes:
        parts.append(Text("Failed: " + ", ".join(f"{n} x {cause}" for cause, n in causes.most_common())))
    return Group(*parts)


def trial_data(store: Store, study: Study, number: int) -> dict[str, Any]:
    """One trial, whole. Raises UsageError where there is no such trial."""
    s = summarize(store, study)
    trial = _trial(s, store, number)
    return clean(
        {
            "trial": trial.number,
            "role": trial.role,
            "baseline": trial.baseline,
            "emulated": trial.emulated,
            "config": trial.config.to_dict() | {"hash": trial.config.hash},
            "changes": changes(trial.config, s.default.config if s.default else None),
            "params": dict(trial.params),
            "started_s": trial.started_s,
            "ended_s": trial.ended_s,
            "outcome": to_dict(trial.outcome),
            "folder": str(trial.folder),
            "extra": dict(trial.extra or {}),
        }
    )


def trial_view(store: Store, study: Study, number: int) -> RenderableType:
    """One trial: its command line, its start-up, every load step, and what went wrong. Raises UsageError where there is
    no such trial."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    s = summarize(store, study)
    trial = _trial(s, store, number)
    outcome = trial.outcome
    head = f"Trial {trial.number}: {kind(outcome)}" + (", the engine's default" if trial.baseline else "")
    head += (f", {trial.role}" if trial.role != "search" else "") + (", EMULATED" if trial.emulated else "")
    parts: list[RenderableType] = [Text(head, style="bold"), Text(s.name(trial.config))]
    parts.append(Text(hide(" ".join(trial.config.args()), s.secrets) or "(no flags)", style="dim"))
    boot = outcome.boot
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in boot.phases_s.items())
    parts.append(Text(f"Start-up {boot.total_s:.1f} s" + (f" ({phases})" if phases else "")))
    if outcome.steps:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        latencies = list(
            dict.fromkeys([study.objective.latency, *(x.metric for x in study.objective.slos if x.latency)])
        )
        windows = len({step.window for step in outcome.steps}) > 1
        if windows:
            table.add_column("window", overflow="fold")
        for name in ("load", "$ per M\nout tokens", *(f"{label(m)}\nms" for m in latencies), "good out\ntokens/s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("SLO", overflow="fold")
        for step in outcome.steps:
            table.add_row(*([step.window.rpartition("/")[2]] if windows else []), *_step_row(step, latencies))
        parts.append(table)
        for step in outcome.steps:
            if said := in_words(step.metrics):
                window = f", {step.window.rpartition('/')[2]}" if windows else ""
                parts.append(Text(f"Server at load {figure(step.load, 4)}{window}: {said}"))
    parts += [Text(trial.quality)] if trial.quality and not isinstance(outcome, Infeasible) else []
    if why(outcome):
        parts.append(Text(hide(why(outcome), s.secrets), style="bold"))
    if isinstance(outcome, Infeasible):
        parts += [Text(f"Evidence: {hide(outcome.evidence, s.secrets)}")] if outcome.evidence else []
        parts += [Text(f"Fix: {hide(outcome.fix, s.secrets)}")] if outcome.fix else []
    parts.append(Text(str(trial.folder), style="dim"))
    return Group(*parts)


def _row(s: Summary, p: Point) -> tuple[str, ...]:
    ties = list(dict.fromkeys(trial for trial, _ in p.ties))
    return (
        "→" if s.chosen(p) else "",
        f"{figure(p.cost)} {spread(p.cost, p.cost_interval)}".strip(),
        f"{ms(p.latency)} {spread(p.latency, p.latency_interval, 1e3)}".strip(),
        figure(p.load),
        f"{p.metrics[GOODPUT]:,.0f}" if GOODPUT in p.metrics else "-",
        str(p.trial),
        ", ".join(map(str, ties[:3])) + (" ..." if len(ties) > 3 else ""),
    )


def _step_row(step: Step, latencies: list[str]) -> tuple[str, ...]:
    cost = step.metrics.get(COST)
    verdict = "; ".join((*step.untrusted, *step.slo_misses)) or "met"
    return (
        figure(step.load, 4),
        figure(cost) if cost is not None else "-",
        *(ms(step.metrics.get(f"{metric}_s", float("nan"))) for metric in latencies),
        f"{step.metrics[GOODPUT]:,.0f}" if GOODPUT in step.metrics else "-",
        verdict,
    )


def _point_data(s: Summary, p: Point) -> dict[str, Any]:
    return {
        "trial": p.trial,
        "load": p.load,
        COST: p.cost,
        f"{COST}_95": p.cost_interval,
        TOTAL: p.metrics.get(TOTAL),
        s.study.objective.latency_key: p.latency,
        f"{s.study.objective.latency_key}_95": p.latency_interval,
        OUTPUT: p.metrics.get(OUTPUT),
        GOODPUT: p.metrics.get(GOODPUT),
        "baseline": p.baseline,
        "role": p.role,
        "trials": list(p.trials),
        "not_told_apart_from": [{"trial": trial, "load": load} for trial, load in p.ties],
        "changes": changes(p.config, s.default.config if s.default else None),
        "flags": dict(p.config.flags),
    }


def _traffic_data(s: Summary) -> dict[str, Any] | None:
    return {**asdict(s.traffic), "requests_per_s": s.traffic.rps} if s.traffic else None


def _change(change: Any) -> dict[str, Any] | None:
    return {"relative": change.value, "interval_95": change.interval, "proven": change.proven} if change else None


def _causes(s: Summary) -> Counter[str]:
    return Counter(t.outcome.cause for t in s.trials if isinstance(t.outcome, Infeasible))


def _trial(s: Summary, store: Store, number: int) -> TrialRecord:
    found = next((t for t in s.trials if t.number == number), None)
    if found is None:
        raise UsageError(f"no finished trial {number} in {store.folder}", fix="See tuner front for the trials.")
    return found


def comparison_table(found: Comparison, latency: str) -> RenderableType:
    """Two studies side by side: at each latency the cheapest that either offers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    names = (f"{label(latency)}\nat most ms", f"$ per M out\n{found.first}", f"$ per M out\n{found.second}")
    for name in (*names, "second over first\n(95 %)"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("proven\ncheaper", overflow="fold")
    for level in found.levels:
        costs = [figure(cost, 4) if math.isfinite(cost) else "none" for cost in (level.first, level.second)]
        middle, low, high = level.ratio
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if low > 0 and high < math.inf else "-"
        winner = ("only " if level.alone else "") + ("", found.first, found.second)[level.winner]
        winner = ("", f"not tried by {found.second}", f"not tried by {found.first}")[level.untried] or winner
        table.add_row(figure(level.latency_s * 1e3, 4), *costs, ratio, winner)
    return table
