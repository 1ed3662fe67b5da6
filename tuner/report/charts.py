"""The interactive figures as Plotly specifications (plain dictionaries). Colours are names of the page's palette,
``$accent``: the page puts in the light or the dark one."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from tuner.pareto.front import Point, trusted_steps
from tuner.report.importance import CHANCE, Importance
from tuner.report.modelerror import Error
from tuner.report.style import Figure, bars, frame, literal, note, open_ends, rule, wrap
from tuner.report.summary import Summary, label, spread
from tuner.study.outcome import Step
from tuner.study.price import GOODPUT
from tuner.study.store import TrialRecord
from tuner.words import figure

WORST = 100.0  # times that a prediction may be shown wrong: one that is further off would squeeze the rest
CROWD = 30  # above so many lines each is drawn paler
NAMED = 5  # how many configurations the curves name besides default and recommendation


def front_chart(s: Summary) -> Figure | None:
    """Every load point, cost against latency; the front as a line with its uncertainty. None without a point."""
    if not s.points:
        return None
    chosen = s.choice.point
    on_front = {p.key for p in s.front}
    missed = [p for p in s.points if not p.ok]
    within = [p for p in s.points if p.ok and p.key not in on_front and not p.baseline]
    default = [p for p in s.points if p.ok and p.baseline]
    line = {"mode": "lines+markers", "line": {"shape": "hv", "color": "$accent", "width": 1.5}}
    data = [
        _scatter(s, missed, "missed an SLO", {"symbol": "circle-open", "size": 7, "color": "$faint"}),
        _scatter(s, within, "within the SLOs", {"size": 7, "color": "$accent", "opacity": 0.4}),
        _scatter(s, s.front, "front", {"size": 9, "color": "$accent"}, ranges=True) | line,
        _scatter(s, default, "engine's default", {"symbol": "diamond", "size": 11, "color": "$ink"}, ranges=True),
    ]
    if chosen:
        name = "recommended" + (" (verified)" if chosen.role == "verify" else "")
        data.append(_scatter(s, [chosen], name, {"symbol": "star", "size": 17, "color": "$chosen"}, ranges=True))
    axes = "USD per million output tokens within SLO", f"{label(s.study.objective.latency)} (ms)"
    shown = [*s.points, *([chosen] if chosen else [])]
    layout = frame(*axes, log_x=[p.cost for p in shown], log_y=[p.latency * 1e3 for p in shown])
    layout["showlegend"] = True  # of a single kind of point Plotly shows none: rings would not say that they missed
    ranged = [(s.front, "$accent"), (default, "$ink"), ([chosen] if chosen else [], "$chosen")]
    layout["shapes"] = [
        shape
        for found, color in ranged
        for shape in open_ends(*_places(found), [p.latency_interval for p in found], color)
    ]
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def curve_charts(s: Summary) -> list[Figure]:
    """For the latency axis and every latency SLO: each configuration's latency against load, with the limit."""
    metrics = dict.fromkeys([s.study.objective.latency, *(x.metric for x in s.study.objective.slos if x.latency)])
    return [figure for metric in metrics if (figure := _curves(s, metric))["data"]]


def importance_chart(found: Importance) -> Figure | None:
    """Bars per parameter, pale where it may be chance. None where nothing can be said."""
    if not found.rows:
        return None
    rows = found.rows[::-1]
    data = []
    by_target = (("latency", "$series3", [r.latency for r in rows]), ("cost", "$accent", [r.cost for r in rows]))
    for title, color, shares in by_target:
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": title,
                "y": [literal(row.parameter) for row in rows],
                "x": [share.share for share in shares],
                "marker": {"color": color, "opacity": [1.0 if share.p < CHANCE else 0.3 for share in shares]},
                "text": [f" {share.share * 100:.0f} %" for share in shares],
                "textposition": "outside",
                "cliponaxis": False,
                "hovertext": [f"{title}: {share.share * 100:.0f} %, p = {share.p:.3f}" for share in shares],
                "hoverinfo": "text",
            }
        )
    layout = frame("share of what the configurations differ by", "") | {"barmode": "group", "bargap": 0.35}
    layout["xaxis"] |= {"tickformat": ".0%", "range": [0, 1.1], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    layout["yaxis"] |= {"automargin": True}
    layout["legend"] |= {"traceorder": "reversed"}
    layout["margin"] |= {"r": 48}  # the words beside a whole bar
    return {"data": data, "layout": layout, "height": 120 + 46 * len(rows)}


def error_chart(found: Sequence[Error]) -> Figure | None:
    """Measured over predicted, one row per metric."""
    if not found:
        return None
    data: list[dict[str, Any]] = []
    ratios: list[float] = [1.0]
    for error in reversed(found):
        shown = [min(max(measured / predicted, 1 / WORST), WORST) for predicted, measured, _, _ in error.pairs]
        ratios += shown
        data.append(
            {
                "type": "box",
                "name": error.name,
                "x": shown,
                "boxpoints": "all",
                "jitter": 0.5,
                "pointpos": 0,
                "hovertext": [
                    f"trial {trial}, load {load:g}: predicted {figure(predicted, 4)}, measured {figure(measured, 4)}"
                    for predicted, measured, trial, load in error.pairs
                ],
                "hoverinfo": "text",
                "marker": {"color": "$accent", "size": 5, "opacity": 0.5},
                "line": {"color": "$accent", "width": 1},
                "fillcolor": "rgba(0,0,0,0)",
            }
        )
    layout = frame("measured / predicted", "", log_x=ratios) | {"showlegend": False, "shapes": [rule("x", 1.0)]}
    layout["yaxis"] |= {"automargin": True}
    return {"data": data, "layout": layout, "height": 110 + 62 * len(found)}


def _curves(s: Summary, metric: str) -> Figure:
    chosen = s.choice.point.config.hash if s.choice.point else ""
    default = s.default.config.hash if s.default else ""
    named = list(dict.fromkeys(p.config.hash for p in s.front if p.config.hash not in (chosen, default)))[:NAMED]
    rows: dict[str, list[tuple[TrialRecord, Step]]] = {}
    for trial, step in trusted_steps(s.search):
        if 0 < step.metrics.get(f"{metric}_s", math.inf) < math.inf:
            rows.setdefault(trial.config.hash, []).append((trial, step))
    data, shown, shapes = [], [], []
    for key, steps in sorted(rows.items(), key=lambda item: item[0] in (default, chosen, *named)):
        steps = sorted(steps, key=lambda pair: pair[1].load)
        name = f"trial {steps[0][0].number}"
        style: dict[str, Any] = {"color": "$faint", "width": 1}
        if key in named:
            style = {"color": f"$series{named.index(key)}", "width": 2}
        if key == default:
            style, name = {"color": "$ink", "width": 2.5, "dash": "dash"}, "engine's default"
        if key == chosen:
            style = {"color": "$chosen", "width": 3}
            name = f"recommended ({'engine default' if key == default else name})"
        trace = _curve(s, metric, steps) | {"name": name, "line": style}
        if key in (default, chosen, *named):
            between = [step.intervals.get(f"{metric}_s") for _, step in steps]
            trace |= {"error_y": bars(trace["y"], between, 1e3), "marker": {"size": 6, "color": style["color"]}}
            shapes += open_ends(trace["x"], trace["y"], between, style["color"])
        else:
            trace |= {"showlegend": False, "marker": {"size": 4, "color": style["color"]}}
            trace["opacity"] = min(1.0, CROWD / len(rows))
        shown += trace["y"]
        data.append(trace)
    limit = next((x.limit * 1e3 for x in s.study.objective.slos if x.metric == metric), None)
    layout = frame("load (factor on the trace's arrival rate)", f"{label(metric)} (ms)", log_y=[*shown, limit or 0])
    layout["xaxis"] |= {"tickvals": sorted({step.load for steps in rows.values() for _, step in steps})}
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["shapes"] = shapes
    if limit is not None and data:
        shapes.append(rule("y", limit))
        words = note(0, math.log10(limit), f"SLO {figure(limit, 4)} ms", "$chosen", anchor="left", shift=4)
        layout["annotations"] = [words | {"xref": "paper", "yanchor": "bottom"}]
    return {"data": data, "layout": layout, "title": f"{label(metric)} against load"}


def _curve(s: Summary, metric: str, steps: Sequence[tuple[TrialRecord, Step]]) -> Figure:
    values = [step.metrics[f"{metric}_s"] * 1e3 for _, step in steps]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [step.load for _, step in steps],
        "y": values,
        "hovertext": [
            f"<b>trial {t.number}</b>, load {step.load:g}<br>"
            f"{label(metric)} {figure(y, 4)} ms<br>{wrap(s.name(t.config))}"
            for (t, step), y in zip(steps, values, strict=True)
        ],
        "hoverinfo": "text",
    }


def _scatter(s: Summary, found: Sequence[Point], name: str, marker: Figure, *, ranges: bool = False) -> Figure:
    x, y = _places(found)
    trace: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "marker": marker,
        "hovertext": [_hover(s, p) for p in found],
        "hoverinfo": "text",
    }
    if ranges:
        trace["error_x"] = bars(trace["x"], [p.cost_interval for p in found])
        trace["error_y"] = bars(trace["y"], [p.latency_interval for p in found], 1e3)
    return trace


def _places(found: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p.cost for p in found], [p.latency * 1e3 for p in found]


def _hover(s: Summary, p: Point) -> str:
    lines = [f"<b>trial {p.trial}</b>" + (", verified" if p.role == "verify" else "") + f", load {figure(p.load)}"]
    lines.append(f"${figure(p.cost)} per M output tokens {spread(p.cost, p.cost_interval)}")
    latency = f"{figure(p.latency * 1e3, 4)} ms {spread(p.latency, p.latency_interval, 1e3)}"
    lines.append(f"{label(s.study.objective.latency)} {latency}")
    if GOODPUT in p.metrics:
        lines.append(f"{p.metrics[GOODPUT]:,.0f} output tokens/s within SLO")
    lines += [f"<i>{html.escape(miss)}</i>" for miss in p.misses]
    if p.ties:
        lines.append("not told apart from trial " + ", ".join(str(trial) for trial, _ in p.ties[:4]))
    return "<br>".join([*lines, wrap(s.name(p.config))])
