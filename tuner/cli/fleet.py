"""`tuner fleet`: the cheapest fleet that holds the SLOs through a day, and what it costs."""

from __future__ import annotations

import json as json_
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import UsageError
from tuner.words import figure

if TYPE_CHECKING:
    from tuner.fleet.account import Account
    from tuner.fleet.fleet import Fleet
    from tuner.fleet.plan import Terms

FOREVER = "known"


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line, as typed; ``lead`` is a duration or :data:`FOREVER`."""

    demand: Path
    format: str = "auto"
    scale: float = 1.0
    peak_rps: float | None = None
    swing: float | None = None
    spare: int = 1
    lead: str = FOREVER
    min_uptime: int = 1
    hold: int = 0
    spot: float = 0.0
    spot_price: float = 0.4
    interruptions: float = 0.05
    max_gpus: tuple[str, ...] = ()
    routing: str = "random"
    confidence: float = 0.95
    simulation: str = "auto"
    seconds: float = 60.0
    seed: int = 0


def run(studies: Sequence[Path], flags: Flags, out: Path | None, json: bool) -> int:
    """Prints the plan and writes the page; 3 where no fleet holds."""
    from tuner.cli.read import opened
    from tuner.fleet import account, demand, fleet, page
    from tuner.fleet.offer import shop

    _checked(flags)
    sides = [opened(path) for path in studies]
    folders = [study.folder for study, _ in sides]
    if len(set(folders)) < len(folders):
        raise UsageError("the same study is named twice", fix="Name every study once")
    known = shop(sides, flags.confidence)
    wanted = demand.read(
        flags.demand,
        scale=flags.scale,
        peak_rps=flags.peak_rps,
        swing=flags.swing,
        format=flags.format,
        window_s=min(offer.window_s for offer in known.offers),
    )
    found = fleet.build(
        known,
        wanted,
        _terms(flags, {offer.gpu for offer in known.offers}),
        routing=flags.routing,  # pyright: ignore[reportArgumentType]
        confidence=flags.confidence,
        simulation=flags.simulation,  # pyright: ignore[reportArgumentType]
        seconds=flags.seconds,
        seed=flags.seed,
    )
    if json:
        print(json_.dumps(account.to_dict(found), indent=1))
    else:
        _print(found, account.account(found))
    print(f"  {page.build(found, out or Path(folders[0]) / 'fleet.html')}", file=sys.stderr)
    return 0 if found.holds else 3


def _checked(flags: Flags) -> None:
    """Raises UsageError for a value that means nothing."""
    from tuner.fleet.headroom import ROUTINGS

    bounds: Sequence[tuple[str, float, float, float]] = (
        ("--spare", flags.spare, 0, 1000),
        ("--min-uptime", flags.min_uptime, 1, 8784),
        ("--hold", flags.hold, 0, 8784),
        ("--spot", flags.spot, 0, 1),
        ("--spot-price", flags.spot_price, 0, 1),
        ("--interruptions", flags.interruptions, 0, 60),
        ("--confidence", flags.confidence, 0.5, 0.999),
        ("--seconds", flags.seconds, 0.1, 86400),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise UsageError(f"{name} {value:g} is not between {low:g} and {high:g}")
    for name, value, words in (
        ("--routing", flags.routing, tuple(ROUTINGS)),
        ("--simulation", flags.simulation, ("auto", "windows", "requests")),
    ):
        if value not in words:
            raise UsageError(f"{name} {value!r} is unknown", fix=f"It is one of {', '.join(words)}")


def _terms(flags: Flags, gpus: set[str]) -> Terms:
    from tuner.fleet.plan import Terms
    from tuner.spec.studyfile import seconds

    lead_s = math.inf
    if flags.lead != FOREVER:
        try:
            lead_s = 0.0 if flags.lead in ("0", "0s") else seconds(flags.lead)
        except ValueError as failure:
            raise UsageError(f"--lead {flags.lead!r}: {failure}", fix="Write 0s, 90s, 5min or known") from failure
    most: dict[str, int] = {}
    for text in flags.max_gpus:
        name, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise UsageError(f"--max-gpus {text!r} is no number", fix="Write 64, or NAME=64")
        if name and name not in gpus:
            raise UsageError(f"--max-gpus: no study has {name!r}", fix=f"There is {', '.join(sorted(gpus))}")
        if name in most:
            raise UsageError(f"--max-gpus {text} says again how many there are", fix="Keep one")
        most[name] = int(number)
    return Terms(
        spare=flags.spare,
        spot_share=flags.spot,
        spot_price=flags.spot_price,
        interruptions_per_hour=flags.interruptions if flags.spot else 0.0,
        lead_s=lead_s,
        min_uptime_h=flags.min_uptime,
        hold_h=flags.hold,
        max_gpus=most,
    )


def _print(fleet: Fleet, found: Account) -> None:
    from tuner.fleet import words
    from tuner.report.console import printer

    console = printer()
    for text in words.warnings(fleet):
        console.print(text, style="yellow")
    console.print(_offers(fleet))
    console.print()
    console.print(_hours(found))
    console.print()
    for text in words.totals(found):
        console.print(text)
    console.print()
    console.print(words.verdict(fleet), style="bold")
    console.print("\nAssumed", style="dim")
    for text in words.assumptions(fleet):
        console.print(f"- {text}")


def _table(title: str, *columns: str, left: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _offers(fleet: Fleet) -> Any:
    table = _table(
        "One replica", "kind", "GPUs", "USD/h", "requests/s within SLO", "start s", "flags", left=("kind", "flags")
    )
    for o in fleet.offers:
        gpus = f"{o.gpus} x {o.gpu}" if o.gpus else o.gpu
        middle, low, high = o.capacity
        capacity = f"{figure(middle)} ({figure(low)} to {figure(high)})"
        table.add_row(o.name, gpus, figure(o.usd_per_hour, 4), capacity, f"{o.start_s:.0f}", o.flags)
    return table


def _hours(found: Account) -> Any:
    from rich.text import Text

    from tuner.fleet import words

    pools = list(found.hours[0].replicas)
    starting = any(hour.starting for hour in found.hours)
    most = max(hour.capacity_rps for hour in found.hours)
    columns = ["hour", "requests/s", *pools, *["starting"] * starting, "may serve", "USD", "within SLO", ""]
    table = _table("The plan, hour by hour", *columns, left=("hour", ""))
    for hour in found.hours:
        replicas = [f"{n:,}" if n else "-" for n in hour.replicas.values()]
        late = [f"{hour.starting:,}" if hour.starting else "-"] if starting else []
        table.add_row(
            hour.label,
            words.rate(hour.rate_rps, most),
            *replicas,
            *late,
            words.rate(hour.capacity_rps, most),
            f"{hour.usd:,.2f}",
            f"{math.floor(hour.within * 1e4) / 100:.2f} %",
            "" if hour.holds else Text("missed", style="red"),
        )
    return table
