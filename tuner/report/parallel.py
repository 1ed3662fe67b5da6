"""Parallel coordinates as plain lines (Plotly's own needs WebGL, which paper and many phones lack)."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

from tuner.report.style import Figure, frame, literal, note, vertical, wrap
from tuner.report.summary import Summary
from tuner.space.space import Parameter
from tuner.study.store import TrialRecord
from tuner.words import figure

IDLE, _NAMES = -0.06, -0.2  # below an axis: where its parameter does not apply, and its name


def parallel_chart(s: Summary) -> Figure | None:
    """The varied parameters, and the lowest cost within SLO; one line per configuration. None below two configurations
    or two axes that they have a place on."""
    trials = sorted({t.config.hash: t for t in reversed(s.search)}.values(), key=lambda t: t.number)
    varied = [p for p in s.study.space.parameters if len({t.config.params.get(p.name) for t in trials}) > 1]
    if len(trials) < 2 or not varied:
        return None
    best: dict[str, float] = {}
    for p in s.points:
        if p.ok:
            best[p.config.hash] = min(best.get(p.config.hash, math.inf), p.cost)
    low, high = (min(best.values()), max(best.values())) if best else (1.0, 1.0)
    notes = []
    for x, parameter in enumerate(varied):
        notes.append(note(x, _NAMES, _name(parameter.name), "$ink"))
        if any(parameter.name not in t.config.params for t in trials):
            notes.append(note(x, IDLE, "does not apply", "$muted", anchor="left", shift=5))
        values = parameter.values
        shown = values if len(values) <= 7 else (values[0], values[len(values) // 2], values[-1])
        notes += [note(x, parameter.position(v), _short(v), "$muted", anchor="left", shift=5) for v in shown]
    last = len(varied)
    if not best and last < 2:
        return None  # a single axis joins nothing
    notes.append(note(last, _NAMES, "lowest cost<br>within SLO", "$ink"))
    ends = ((0.0, low), (1.0, high)) if high > low else ((0.0, low),) if best else ()
    notes += [note(last, height, f"${figure(cost)}", "$muted", anchor="left", shift=5) for height, cost in ends]
    lines = []
    for trial in trials:
        cost = best.get(trial.config.hash)
        y: list[float | None] = [_position(parameter, trial) for parameter in varied]
        y.append(None if cost is None else math.log(cost / low) / math.log(high / low) if high > low else 0.0)
        lines.append(_line(s, trial, y, cost, min(0.45, 18 / len(trials))))
    lines.sort(key=lambda line: line["line"]["width"])
    layout = frame("", "") | {"annotations": notes, "showlegend": False, "margin": {"l": 8, "r": 8, "t": 8, "b": 8}}
    layout["shapes"] = [vertical(x) for x in range(last + 1)]
    layout["xaxis"] = {"visible": False, "range": [-0.25, last + 0.5], "fixedrange": True}
    layout["yaxis"] = {"visible": False, "range": [-0.37, 1.06], "fixedrange": True}
    return {"data": lines, "layout": layout, "width": 110 * (last + 1)}


def _line(s: Summary, trial: TrialRecord, y: list[float | None], cost: float | None, pale: float) -> dict[str, Any]:
    chosen = s.choice.point
    color, width, opacity = "$accent", 1.2, pale
    if cost is None:
        color, width, opacity = "$faint", 0.8, min(0.8, pale * 2)
    if trial.baseline:
        color, width, opacity = "$ink", 2.2, 1.0
    if chosen and chosen.config.hash == trial.config.hash:
        color, width, opacity = "$chosen", 3.0, 1.0
    tail = f"${figure(cost)} at best" if cost is not None else "within the SLOs at no load"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(range(len(y))),
        "y": y,
        "line": {"color": color, "width": width},
        "marker": {"color": color, "size": 4},
        "opacity": opacity,
        "hovertext": f"<b>trial {trial.number}</b>: {tail}<br>{wrap(s.name(trial.config))}",
        "hoverinfo": "text",
    }


def _position(parameter: Parameter, trial: TrialRecord) -> float | None:
    """Where on its axis, or below it; moved by a hair per trial, so that equal lines do not hide each other."""
    value = trial.config.params.get(parameter.name)
    try:
        return (IDLE if value is None else parameter.position(value)) + (trial.number % 9 - 4) * 0.004
    except ValueError:
        return None  # a value from outside the grid


def _short(value: object) -> str:
    """As it fits beside an axis."""
    text = str(value)
    return literal(text if len(text) <= 14 else f"{text[:6]}…{text[-7:]}")  # paths differ in their ends


def _name(name: str) -> str:
    """On up to four lines; the rest of a long name is left to the table of trials."""
    lines = textwrap.wrap(re.sub(r"[_.-]+", " ", name), 13)
    lines = lines if len(lines) <= 4 else [*lines[:3], f"{lines[3]}…"]
    return "<br>".join(map(literal, lines))
