"""`tuner check`: what a study would run, without launching anything."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tuner.cli.tune import Flags, read
from tuner.errors import UsageError, alike
from tuner.report.console import printer
from tuner.words import figure


def run(path: Path, json: bool) -> None:
    """Validates everything, with the flags where the engine is installed, and prints what would run."""
    from tuner.study import session

    study = read(path, Flags())
    ready = session.prepare(study, launching=False)
    tell_how_long(ready, study.space.size() if study.space.size() <= session.TRIED else 0)
    data = describe(ready)
    if json:
        print(json_.dumps(data, indent=1))
    else:
        _show(study, ready, data)
    if data["allowed"] == 0:
        fix = data["cramped"] or "Widen the space, or mend its rules"
        raise UsageError("no combination may be launched", where=study.source, fix=fix)


def _show(study: Any, ready: Any, data: dict[str, Any]) -> None:
    from tuner.study.budget import shared_out
    from tuner.study.ladder import asks

    console = printer()
    valid = f" is valid. {data['engine']} would serve {study.model} on {data['hardware']}."
    console.print(Text.assemble((study.name, "bold"), valid))
    if data["unchecked"]:
        console.print(f"Not checked: {data['unchecked']}.")
    if study.trace.file:
        console.print(f"Trace: {data['trace']}")
    for note in data["trace_notes"]:
        console.print(f"  {note}")
    console.print(f"Goal: {data['goal']}")
    loads = ", ".join(f"{x:g}" for x in study.load.ladder)
    ladder = "laid around what the default's first launch holds" if asks(study) else f"loads {loads}"
    function = study.engine.kind == "function"
    console.print(f"Ladder: {ladder}; a step {'is one call' if function else 'takes ' + data['step_seconds']}")
    console.print(
        f"Budget: {shared_out(study.budget)}; sampler {study.sampler}; "
        f"model: {study.predictor or ready.no_model or 'analytic, of this hardware'}"
    )
    for said in filter(None, (data["cramped"], data["idle"], data["untried"], data["unread"])):
        console.print(said)
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("parameter", "values", "default", "trades"):
        table.add_column(title, no_wrap=title == "parameter", overflow="fold")
    for row in data["parameters"]:
        table.add_row(row["name"], ", ".join(map(str, row["values"])), str(row["default"]), row["trades"])
    console.print(table)
    if data["allowed"] is None:
        more = "too many to try each: `tuner plan` looks at some thousands"
        console.print(f"Up to {data['combinations']} combinations, {more}.")
    else:
        console.print(f"{data['allowed']} of {data['combinations']} combinations may be launched.")
    for reason, count in alike(data["refused"]).items():
        console.print(f"  {count} refused: {reason}")
    console.print(f"First launch, the engine's default: {data['default_command']}", soft_wrap=True)


def _filled(ready: Any) -> str:
    fills, top = ready.traffic.fills, max(ready.study.load.ladder)
    return f" up to {fills:.2g}, less above" if fills < top else ""


def _rate(ready: Any) -> str:
    rps = ready.traffic.rps
    return f", {figure(rps)}/s at load 1" if rps else ""


def _starts(study: Any) -> list[str]:
    """The words that start a server, before its flags."""
    kind = study.engine.kind
    starts = {
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", study.model],
        "command": list(study.engine.command),
        "function": [f"the function {study.engine.options.get('target', '')}, called with"],
        "own": [f"the engine {study.engine.options.get('target', '')}:"],
        "attach": [f"the server at {study.engine.options.get('url', '')}, taken as it is"],
    }
    return starts.get(kind, [kind, "serve", study.model])


def tell_how_long(ready: Any, calls: int) -> None:
    """Says on stderr how long a user's own model is asked, where that is not at once."""
    takes = getattr(ready.predictor, "takes", None)
    if takes and (said := takes(calls)):
        print(said, file=sys.stderr, flush=True)


def combinations(space: Any) -> list[Any]:
    """Every combination of the space, none twice; empty where they are too many to try each."""
    from tuner.study.session import TRIED

    return list(space.grid()) if space.size() <= TRIED else []


def describe(ready: Any) -> dict[str, Any]:
    """The study in words and figures, as ``--json`` prints it."""
    from tuner.executor.cluster import device, price_of
    from tuner.pareto.traffic import price_words
    from tuner.record.secrets import hide, secrets
    from tuner.study.queue import refusals
    from tuner.study.session import step_seconds

    study, space = ready.study, ready.study.space
    gpus, on = study.hardware.gpus, device(study, space.gpu)
    grid = combinations(space)

    def why_not(params: Any) -> str:
        return space.denied(params) or ready.why_not(space.config(params, study.model))

    refused = refusals(grid, why_not)
    window = ready.traffic.search[0]
    budget = study.budget
    limits = {"launches": budget.launches, "hours": budget.hours, "usd": budget.usd}
    default = space.config(space.default(), study.model)
    function = study.engine.kind == "function"
    given = [f"{name}={value}" for name, value in default.params.items()] if function else default.args()
    command = hide(" ".join([*_starts(study), *given]), secrets(study, ()))
    replayed = (
        f"{len(ready.traffic.search)} search and {len(ready.traffic.heldout)} held-out windows, "
        f"{study.trace.window_s:g} s each at every load{_filled(ready)} (up to {len(window)} requests)"
    )
    return {
        "name": study.name,
        "folder": study.folder,
        "model": study.model,
        "engine": study.engine.kind if ready.unchecked else f"{study.engine.kind} {ready.engine.version()}",
        "unchecked": ready.unchecked,
        "hardware": f"{gpus} x {on}" if gpus else on,
        "trace": f"{len(ready.traffic.whole)} requests{_rate(ready)}; "
        + ("nothing is replayed to a function" if function else replayed),
        "trace_notes": list(ready.traffic.notes),
        "goal": (
            f"lowest USD per million output tokens ({price_words(study.objective, gpus, price_of(study, default))}) "
            f"against {study.objective.latency}, with {', '.join(map(str, study.objective.slos))}"
        ),
        "step_seconds": f"{step_seconds(ready):.0f} s and its tail"
        + (f", after the prompts of the {ready.traffic.fill_s:g} s before it" if ready.traffic.fill_s else ""),
        "budget": ", ".join(f"{value:g} {key}" for key, value in limits.items() if value) or "none",
        "parameters": [
            {"name": p.name, "values": list(p.values), "default": p.default, "trades": p.trades}
            for p in space.parameters
        ],
        "cramped": ready.cramped(),
        "idle": ready.idle(),
        "untried": ready.untried(),
        "unread": ready.unread(),
        "combinations": len(grid) or space.size(),
        "allowed": len(grid) - sum(refused.values()) if grid else None,
        "refused": dict(refused),
        "default_command": command,
    }
