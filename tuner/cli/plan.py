"""`tuner plan`: what is feasible, the predicted front, how long and how expensive the study will be."""

from __future__ import annotations

import json as json_
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tuner.cli.check import combinations, tell_how_long
from tuner.cli.tune import Flags, read
from tuner.errors import alike
from tuner.report.console import printer
from tuner.words import figure

MOST = 5_000  # configurations that are predicted; a larger space is sampled


def run(path: Path, json: bool) -> None:
    """Prints the plan. Nothing is launched; every figure is the model's and says so."""
    from tuner.study import session
    from tuner.study.budget import shared_out
    from tuner.study.ladder import foretold, kept
    from tuner.study.store import Store

    study = read(path, Flags())
    study = kept(study, Store(Path(study.folder)))
    ready = session.prepare(study, launching=False)
    laid = foretold(ready, partial(session.prepare, launching=False))
    tell_how_long(ready, min(study.space.size(), MOST) * (1 + len(study.load.ladder)))
    data: dict[str, Any] = plan(laid or ready) | {"ladder_foretold": laid is not None}
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
    for said in filter(None, (data["cramped"], data["idle"])):
        console.print(said)
    if laid:
        loads = ", ".join(f"{load:g}" for load in data["ladder"])
        how = "its launch settles it (load.ladder: auto), and what holds its highest load is asked for more"
        console.print(f"Ladder: {loads}, if the default does as predicted; {how}.")
    console.print(f"Budget: {shared_out(study.budget)}.")
    console.print(_effort(study, data))
    if study.engine.kind == "emulator":
        console.print(
            "Emulated: no GPU is used or paid; hours and USD are those of the real study. "
            "With clock: virtual in engine.options it takes minutes."
        )
    if data["no_model"]:
        console.print(f"No prediction: {data['no_model']}.")
        return
    console.print(f"{data['capable']} of them are predicted to meet the SLOs at some load of the ladder.")
    if near := data["nearest"]:
        console.print(
            f"Nearest, at load {near['load']:g}: {near['flags']} ({'; '.join(near['misses'])}). "
            "Loosen the SLO, add lower loads, or give the study other GPUs, or more."
        )
    if not data["front"]:
        return
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
    study, space = ready.study, ready.study.space
    grid = combinations(space)
    candidates = _candidates(study, grid)
    # asked once: a user's own model may be slow
    reasons = [space.denied(params) or ready.why_not(space.config(params, study.model)) for params in candidates]
    allowed = [
        space.config(params, study.model) for params, reason in zip(candidates, reasons, strict=True) if not reason
    ]
    front, near, capable, steps = _front(ready, allowed) if ready.predictor else ([], None, 0, len(study.load.ladder))
    whole = len(grid) == len(candidates) > 0
    return {
        "name": study.name,
        "combinations": len(grid) or space.size(),
        "looked_at": len(candidates),
        "allowed": len(allowed),
        "refused": dict(Counter(filter(None, reasons))),
        "ladder": list(study.load.ladder),
        "trace_notes": list(ready.traffic.notes),
        "fills_cache": ready.traffic.fill_s > 0,
        **_cost(ready, allowed, steps, len(allowed) if whole else math.inf),
        "no_model": ready.no_model,
        "cramped": ready.cramped(),
        "idle": ready.idle(),
        "unchecked": ready.unchecked,
        "capable": capable,
        "front": front,
        "nearest": near,
    }


def _candidates(study: Any, grid: list[Any]) -> list[Any]:
    space, rng = study.space, random.Random(study.seed)
    if grid:
        return grid if len(grid) <= MOST else rng.sample(grid, MOST)
    drawn = ({p.name: rng.choice(p.values) for p in space.parameters} for _ in range(MOST))
    return [space.default(), *({str(sorted(s.items())): s for s in map(space.snap, drawn)}.values())]


def _cost(ready: Any, allowed: list[Any], steps: float, different: float) -> dict[str, Any]:
    """What a launch takes, and how many of them, hours and USD the study does; None where nobody can know. A launch of
    the search measures ``steps`` loads, and it launches no more than the ``different`` configurations and a few of them
    twice."""
    from statistics import fmean

    from tuner.executor.cluster import price_of
    from tuner.search.sampler import Options
    from tuner.study import session
    from tuner.study.budget import fewest_windows, for_search, verify_windows, without
    from tuner.study.price import per_hour
    from tuner.verify.verification import LOADS

    study, budget = ready.study, ready.study.budget
    names = ("launch_seconds", "verify_launch_seconds", "launches", "hours", "usd", "fill_seconds", "fill_usd")
    verifies = budget.verify_share > 0 and bool(ready.traffic.heldout)
    most = budget.launches or math.inf
    if study.sampler == "auto" and 0 < different < math.inf:
        different += (different - 1) // (Options().remeasure_every - 1)
    search = min(for_search(budget) if budget.launches else math.inf, different)
    if study.engine.kind == "function":
        count = most if verifies else min(most, search)
        return dict.fromkeys(names) | {"launches": None if math.isinf(count) else int(count)}
    default = study.space.config(study.space.default(), study.model)
    configs, ladder = allowed or [default], study.load.ladder
    fill_s = _fill_s(ready, default)
    step_s = session.step_seconds(ready) + (more_s := _response_s(ready, default) + (fill_s or 0.0))
    launch_s = session.launch_seconds(ready) + more_s * len(ladder) - (len(ladder) - steps) * step_s
    held_out = len(ready.traffic.heldout)

    def on(windows: int) -> float:
        """What a launch of verification takes on so many windows."""
        return launch_s + (LOADS * windows - steps) * step_s

    least_s = on(fewest_windows(study, held_out)) if verifies else 0.0
    side = _side_by_side(study, fmean(max(config.gpus, 1) for config in configs))
    rate = fmean(per_hour(config, study.objective, price_of(study, config)) for config in configs) / 3600
    wall_s, gpu_s = (budget.hours or math.inf) * 3600, (budget.usd or math.inf) / rate
    mine_s, mine_gpu_s = (without(budget.verify_share, s, least_s) for s in (wall_s, gpu_s))
    searched = min(mine_s * side, mine_gpu_s) / launch_s
    searched = max(1, min(searched, search))
    left_s = min(wall_s - searched * launch_s / side, gpu_s - searched * launch_s)
    verify_s = on(verify_windows(study, held_out, left_s, on))
    verified = min(most - searched, left_s / verify_s) if verifies else 0.0
    verified = verified if verified >= 2 else 0.0  # the default's and a finalist's
    hours = (searched * launch_s / side + verified * verify_s) / 3600
    usd = (searched * launch_s + verified * verify_s) * rate
    fill_usd = None if fill_s is None else fill_s * rate
    return dict(zip(names, (launch_s, verify_s, round(searched + verified), hours, usd, fill_s, fill_usd), strict=True))


def _response_s(ready: Any, config: Any) -> float:
    """A mean response by the model, at the lowest load: a step waits for its last ones. 0: not foretold."""
    load = ready.study.load
    found = ready.predictor.predict(config, load.ladder[0]).metrics if ready.predictor else {}
    return min(found.get("e2e_mean_s", 0.0), load.request_timeout_s)


def _fill_s(ready: Any, config: Any) -> float | None:
    """By the model, how long filling the prefix cache takes before a step, on average over the windows; None where it
    cannot tell, or ``config`` is sent nothing."""
    from statistics import fmean

    from tuner.load.step import FILLING
    from tuner.study.evaluate import to_fill
    from tuner.study.outcome import Boot

    told = getattr(ready.predictor, "fill_s", None)
    if not told or not ready.traffic.fill_s:
        return None
    boot = Boot(facts={"kv_cache_tokens": ready.predictor.fit(config).kv_tokens})
    sent = [to_fill(window, config, boot) for window in (*ready.traffic.search, *ready.traffic.heldout)]
    each = [told(config, prompts, FILLING) if prompts else 0.0 for prompts in sent]
    return fmean(each) if any(each) and None not in each else None


def _side_by_side(study: Any, gpus: float) -> float:
    """How many launches of the search run at once, of ``gpus`` each."""
    fit = max(1.0, study.hardware.gpus / gpus)
    if study.parallel and (study.executor.kind == "ray" or not study.hardware.gpus):
        return study.parallel
    return min(study.parallel or fit, fit)


def _effort(study: Any, data: dict[str, Any]) -> str:
    """How long the study takes and what it costs, in words: at most what its budget bounds, the rest about."""
    budget = study.budget

    def about(value: float, bound: float | None) -> str:
        return "at most" if bound and math.isclose(value, bound, rel_tol=0.01) else "about"

    count, launches = data["launches"], f"launch{'' if data['launches'] == 1 else 'es'}"
    if study.engine.kind == "function":
        return f"{f'{count} {launches} at most; h' if count else 'H'}ow long a launch takes is the function's affair."
    later = f", {data['verify_launch_seconds'] / 60:.1f} in verification" if budget.verify_share else ""
    return (
        f"About {data['launch_seconds'] / 60:.1f} minutes a launch{later}; "
        f"{about(count, budget.launches)} {count} {launches}, {about(data['hours'], budget.hours)} "
        f"{data['hours']:.1f} h, {about(data['usd'], budget.usd)} {data['usd']:.2f} USD." + _filling(data)
    )


def _filling(data: dict[str, Any]) -> str:
    if not data["fills_cache"]:
        return ""
    if data["fill_seconds"] is None:
        return " Filling the prefix cache before each step comes on top."
    each = f"{figure(data['fill_seconds'], 2)} s and {figure(data['fill_usd'], 2)} USD"
    return f" Filling the prefix cache before each step is in it: about {each} each time."


def _front(ready: Any, allowed: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None, int, float]:
    """Non-dominated (configuration, load) points by prediction; where there is none, what misses the SLOs by the least
    at the lowest load; how many configurations meet the SLOs at all, and how many loads a launch of one of those
    measures: up to the first that misses."""
    from tuner.pareto.changes import changes, describe
    from tuner.study.price import COST
    from tuner.study.workload import climb

    study = ready.study
    loads = [*climb(study, ready.traffic.climbed[0])]
    slos = [slo for slo in study.objective.slos if slo.latency]
    found, steps, missed = [], [], []
    for config in allowed:
        good = []
        for load in loads:
            metrics = ready.predictor.predict(config, load).metrics
            misses = [said for slo in slos if (said := slo.miss(metrics))]
            if misses and load == loads[0]:
                missed.append((max(slo.gap(metrics) for slo in slos), load, config, misses))
            if COST not in metrics or misses:
                break
            good.append((metrics[COST], metrics[study.objective.latency_key], load, config))
        if good:
            steps.append(min(len(good) + 1, len(loads)))
        found += good
    default = study.space.config(study.space.default(), study.model)
    front, best = [], float("inf")
    # of those that are predicted alike, the one that changes least: the others' flags say nothing to the model
    for cost, latency, load, config in sorted(found, key=lambda p: (*p[:2], len(changes(p[3], default)))):
        if latency < best:
            best = latency
            flags = describe(config, default)
            row = {"load": load, COST: cost, "latency_s": latency, "flags": flags}
            front.append(row)
    near = None
    if missed and not front:
        _, load, config, misses = min(missed, key=lambda one: (one[0], len(changes(one[2], default))))
        near = {"load": load, "flags": describe(config, default), "misses": misses}
    return front, near, len(steps), sum(steps) / len(steps) if steps else 1.0
