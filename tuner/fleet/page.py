"""The fleet's page: one HTML file that needs no network, with the plot of the day."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.fleet import words
from tuner.fleet.account import Account, account
from tuner.fleet.fleet import Fleet
from tuner.report import html
from tuner.report.style import Figure, frame, rule
from tuner.words import figure

TICKS = 12  # labels under a plot
COLORS = ("$accent", "$series2", "$series3", "$series1", "$series0", "$series4")


def build(fleet: Fleet, out: Path) -> Path:
    """Writes the page to ``out`` and returns it. Raises UsageError where it cannot be written."""
    found = account(fleet)
    figures = {"capacity": capacity_chart(fleet), "used": used_chart(found), "cost": cost_chart(fleet)}
    try:
        return html.write(
            out,
            "fleet.html.j2",
            figures,
            title=" + ".join(dict.fromkeys(o.study for o in fleet.offers)),
            emulated=any(o.emulated for o in fleet.offers),
            shown={name for name, figure in figures.items() if figure["data"]},
            head=_head(fleet),
            numbers=_numbers(found),
            verdict=words.verdict(fleet),
            warnings=words.warnings(fleet),
            assumptions=words.assumptions(fleet),
            pools=list(found.hours[0].replicas),
            hours=found.hours,
            starting=any(hour.starting for hour in found.hours),
            most=max(hour.capacity_rps for hour in found.hours),
            rate=words.rate,
            offers=fleet.offers,
        )
    except OSError as failure:
        raise UsageError(f"cannot be written ({failure.strerror})", where=str(out), fix="Give --out FILE") from failure


def _head(fleet: Fleet) -> list[tuple[str, str]]:
    return [
        ("Demand", fleet.demand.source),
        ("Peak", f"{fleet.demand.rate_rps.max():,.6g} requests/s"),
        ("SLOs", ", ".join(map(str, fleet.shop.slos)) or "none"),
        ("Spare", f"{fleet.terms.spare} replica{'s' * (fleet.terms.spare != 1)}"),
    ]


def _numbers(found: Account) -> list[tuple[str, str, str]]:
    rows = [(f"${found.usd_per_day:,.0f}", "a day", f"${found.level_usd_per_day:,.0f} with the dearest hour all day")]
    if found.usd_per_mtok_output > 0:
        total = f"${figure(found.usd_per_mtok_total)} per million total tokens" if found.usd_per_mtok_total > 0 else ""
        rows.append((f"${figure(found.usd_per_mtok_output)}", "per million output tokens", total))
    if found.kwh_per_day is not None and found.j_per_output_token is not None:
        per_token = f"{figure(found.j_per_output_token)} J/token"
        rows.append((f"{figure(found.kwh_per_day, 4)} kWh", "of GPU energy a day", per_token))
    return rows


def capacity_chart(fleet: Fleet) -> Figure:
    """What the ready replicas may be given, stacked by pool, and the demand as a line."""
    plan, labels = fleet.plan, list(fleet.demand.labels)
    data = _stacked(
        fleet,
        (plan.ready * plan.allowed_rps * [[p.available] for p in plan.pools]).tolist(),
        [[f"{n:,} ready, {figure(rps, 4)} requests/s" for n, rps in zip(*pair, strict=True)] for pair in _ready(fleet)],
    )
    line = {"shape": "hvh", "color": "$chosen", "width": 2}
    demand = {"type": "scatter", "mode": "lines", "name": "demand", "x": labels, "line": line}
    data.append(demand | {"y": fleet.demand.rate_rps.tolist(), "hovertemplate": "%{y:,.5g} requests/s"})
    return {"data": data, "layout": _layout("requests/s", labels)}


def used_chart(found: Account) -> Figure:
    """Per SLO the part of what it allows that the simulation counted, by the hour."""
    labels = [hour.label for hour in found.hours]
    data = []
    for i, name in enumerate(found.hours[0].used):
        shares = [hour.used[name] for hour in found.hours]
        mark = {"mode": "lines+markers", "line": {"color": COLORS[i % len(COLORS)], "width": 1.5}}
        data.append({"type": "scatter", "name": name, "x": labels, "y": shares} | mark)
        data[-1] |= {"hovertemplate": "%{y:.1%} of what it allows"}
    layout = _layout("share of what is allowed", labels)
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    layout["shapes"] = [rule("y", 1.0)]
    return {"data": data, "layout": layout}


def cost_chart(fleet: Fleet) -> Figure:
    """USD per hour by pool, start-ups in the hour for which they are made."""
    plan = fleet.plan
    usd = plan.usd_by_hour.tolist()
    texts = [[f"{n:,} paid, ${x:,.2f}" for n, x in zip(plan.replicas[i], usd[i], strict=True)] for i in range(len(usd))]
    return {"data": _stacked(fleet, usd, texts), "layout": _layout("USD per hour", fleet.demand.labels), "height": 320}


def _ready(fleet: Fleet) -> list[tuple[Sequence[int], Sequence[float]]]:
    plan = fleet.plan
    return [(plan.ready[p], plan.ready[p] * plan.allowed_rps[p] * pool.available) for p, pool in enumerate(plan.pools)]


def _stacked(fleet: Fleet, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One bar trace per pool that is used at all."""
    found = []
    for p, pool in enumerate(fleet.plan.pools):
        if fleet.plan.replicas[p].any():
            color = {"color": COLORS[p % len(COLORS)], "opacity": 0.55 if pool.spot else 0.8}
            bars = {"type": "bar", "name": pool.name, "x": list(fleet.demand.labels), "y": list(values[p])}
            found.append(bars | {"marker": color, "hovertext": list(texts[p]), "hoverinfo": "text+name"})
    return found


def _layout(title: str, labels: Sequence[str]) -> dict[str, Any]:
    layout = frame("hour", title) | {"barmode": "stack", "bargap": 0.08, "hovermode": "x unified"}
    some = labels[:: -(-len(labels) // TICKS)]
    layout["xaxis"] |= {"type": "category", "tickmode": "array", "tickvals": list(some), "tickangle": 0}
    return layout
