"""`tuner plan`: what is feasible, the predicted front, how long and how expensive the study will be."""

from __future__ import annotations

import json as json_
import random
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tuner.cli.check import combinations
from tuner.cli.tune import Flags, read
from tuner.errors import alike
from tuner.report.console import printer
from tuner.words import figure

MOST = 5_000  # configurations that are predicted; a larger space is sampled


def run(path: Path, json: bool) -> None:
    """Prints the plan. Nothing is launched; every figure is the model's and says so."""
    from tuner.study import session

    study = read(path, Flags())
    data = plan(session.prepare(study, launching=False))
    if json:
        print(json_.dumps(data, indent=1))
        return
    console = printer()
    of = f"{data['looked_at']} combinations looked at may be launched ({data['combinations']} in the space)."
    console.print(Text.assemble((study.name, "bold"), f": {data['allowed']} of {of}"))
    for note in data["trace_notes"]:
        console.print(f"  Trace: {note}")
    if data["unchecked"]:
        console.print(f"  Not checked: {data['unchecked']}.")
    for reason, count in alike(data["refused"]).items():
        console.print(f"  {count} refused: {reason}")
    if study.engine.kind == "function":
        console.print(f"{data['launches']} launches at most; how long one takes is the function's affair.")
    else:
        console.print(
            f"About {data['launch_seconds'] / 60:.1f} minutes a launch; {data['launches']} launches: "
            f"{data['hours']:.1f} h and {data['usd']:.2f} USD at most."
        )
    if study.engine.kind == "emulator":
        console.print(
            "Emulated: no GPU is used or paid; hours and USD are those of the real study. "
            "With clock: virtual in engine.options it takes minutes."
        )
    if data["no_model"]:
        console.print(f"No prediction: {data['no_model']}.")
        return
    console.print(f"{data['capable']} of them are predicted to meet the SLOs at some load of the ladder.")
    table = Table(title="Predicted front (not measured)", title_justify="left", box=None, header_style="dim")
    for title in ("load", "USD/M output tokens", f"{study.objective.latency} ms", "flags"):
        table.add_column(title, justify="right" if title != "flags" else "left", overflow="fold")
    for row in data["front"]:
        table.add_row(
            f"{row['load']:g}",
            figure(row["cost_usd_per_mtok_output"], 4),
            f"{row['latency_s'] * 1e3:.1f}",
            row["flags"],
        )
    console.print(table)


def plan(ready: Any) -> dict[str, Any]:
    """The plan as ``--json`` prints it."""
    from tuner.study.session import launch_seconds

    study, space = ready.study, ready.study.space
    grid = combinations(space)
    candidates = _candidates(study, grid)
    # asked once: a user's own model may be slow
    reasons = [space.denied(params) or ready.why_not(space.config(params, study.model)) for params in candidates]
    allowed = [params for params, reason in zip(candidates, reasons, strict=True) if not reason]
    launch_s = launch_seconds(ready)
    launches, hours = _cost(study, launch_s)
    front, capable = _front(ready, allowed) if ready.predictor else ([], 0)
    return {
        "name": study.name,
        "combinations": len(grid) or space.size(),
        "looked_at": len(candidates),
        "allowed": len(allowed),
        "refused": dict(Counter(filter(None, reasons))),
        "trace_notes": list(ready.traffic.notes),
        "launch_seconds": launch_s,
        "launches": launches,
        "hours": hours,
        "usd": hours * study.objective.price_usd_per_gpu_hour * max(1, study.hardware.gpus),
        "no_model": ready.no_model,
        "unchecked": ready.unchecked,
        "capable": capable,
        "front": front,
    }


def _candidates(study: Any, grid: list[Any]) -> list[Any]:
    space, rng = study.space, random.Random(study.seed)
    if grid:
        return grid if len(grid) <= MOST else rng.sample(grid, MOST)
    drawn = ({p.name: rng.choice(p.values) for p in space.parameters} for _ in range(MOST))
    return [space.default(), *({str(sorted(s.items())): s for s in map(space.snap, drawn)}.values())]


def _cost(study: Any, launch_s: float) -> tuple[int, float]:
    """Launches and hours that the budget allows at most."""
    budget = study.budget
    price = study.objective.price_usd_per_gpu_hour * max(1, study.hardware.gpus)
    hours = [budget.launches * launch_s / 3600] if budget.launches else []
    hours += [budget.hours] if budget.hours else []
    hours += [budget.usd / price] if budget.usd else []
    return max(1, round(min(hours) * 3600 / launch_s)), min(hours)


def _front(ready: Any, allowed: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """Non-dominated (configuration, load) points by prediction, and how many configurations meet the SLOs at all."""
    from tuner.pareto.changes import describe
    from tuner.study.price import COST

    study = ready.study
    found, capable = [], 0
    for params in allowed:
        config = study.space.config(params, study.model)
        good = []
        for load in study.load.ladder:
            metrics = ready.predictor.predict(config, load).metrics
            if COST not in metrics or any(slo.miss(metrics) for slo in study.objective.slos if slo.latency):
                break
            good.append((metrics[COST], metrics[study.objective.latency_key], load, config))
        capable += bool(good)
        found += good
    default = study.space.config(study.space.default(), study.model)
    front, best = [], float("inf")
    for cost, latency, load, config in sorted(found, key=lambda p: p[:2]):
        if latency < best:
            best = latency
            flags = describe(config, default)
            row = {"load": load, COST: cost, "latency_s": latency, "flags": flags}
            front.append(row)
    return front, capable
