"""What all figures share: frame, log ticks, rules, notes, error bars. Colours are names of the page's palette."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Interval = tuple[float, float]
NARROW = 1.3  # highest over lowest value of an axis below which it is widened by as much on both sides
OPEN_PX = 32  # the dots of a bar without an upper end
_MANTISSAS: tuple[tuple[float, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))


def log_ticks(values: Iterable[float]) -> list[float]:
    """Round values for a logarithmic axis over ``values``: 1-2-5 and finer, evenly spaced ones below a factor of 3."""
    known = [value for value in values if 0 < value < math.inf]
    if not known:
        return []
    low, high = min(known) / 1.05, max(known) * 1.05
    if high / low < 3:
        step = 10.0 ** math.floor(math.log10(high - low))
        step *= next(m for m in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * m) < 8)
        return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    found: list[float] = []
    for mantissas in _MANTISSAS:
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(found) >= 4:
            break
    return found[:: math.ceil(len(found) / 10)]


def number(value: float) -> str:
    """A tick's label: ``0.05``, ``3,000``; never ``3e+03`` nor ``1e-06``."""
    return f"{value:,.10g}" if abs(value) >= 1e-4 or not value else f"{value:.12f}".rstrip("0")


def frame(x: str, y: str, *, log_x: Sequence[float] = (), log_y: Sequence[float] = ()) -> Figure:
    """The layout of a figure; ``log_x`` and ``log_y`` are the values on an axis that is logarithmic (empty: linear)."""
    return {
        "xaxis": _axis(x, log_x),
        "yaxis": _axis(y, log_y),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "$ink", "size": 13},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"bgcolor": "$paper", "bordercolor": "$rule", "font": {"color": "$ink"}, "align": "left"},
        "hovermode": "closest",
        "margin": {"l": 64, "r": 16, "t": 12, "b": 52},
    }


def vertical(x: float) -> Figure:
    """An axis of parallel coordinates."""
    line = {"color": "$rule", "width": 1}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line, "layer": "below"}


def rule(axis: str, value: float) -> Figure:
    """A dotted limit across the whole figure at ``value`` of ``axis``."""
    other = "y" if axis == "x" else "x"
    line = {"type": "line", f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    return line | {f"{other}ref": "paper", "line": {"color": "$chosen", "width": 1.2, "dash": "dot"}}


def note(x: float, y: float, text: str, color: str, *, anchor: str = "center", shift: int = 0) -> Figure:
    font = {"size": 11, "color": color}
    place = {"x": x, "y": y, "xanchor": anchor, "xshift": shift}
    return place | {"text": text, "showarrow": False, "font": font, "bgcolor": "$paper", "borderpad": 1, "opacity": 0.9}


def bars(values: Sequence[float], intervals: Sequence[Interval | None], scale: float = 1.0) -> Figure:
    """Error bars; none where an interval is not known, nor towards an end that it lacks (:func:`open_ends`)."""
    ends = []
    for value, pair in zip(values, intervals, strict=True):
        low, high = (x * scale if math.isfinite(x) else value for x in pair or (math.inf, math.inf))
        ends.append((low, high))
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
        "thickness": 1,
        "width": 0,
    }


def open_ends(x: Sequence[float], y: Sequence[float], intervals: Sequence[Interval | None], color: str) -> list[Figure]:
    """Dots upwards from where ``y`` has an interval without an upper end."""
    line = {"color": color, "width": 1, "dash": "dot"}
    return [
        {
            "type": "line",
            "x0": at,
            "x1": at,
            "yanchor": value,
            "ysizemode": "pixel",
            "y0": 0,
            "y1": OPEN_PX,
            "line": line,
        }
        for at, value, pair in zip(x, y, intervals, strict=True)
        if pair and not math.isfinite(pair[1])
    ]


def literal(text: str) -> str:
    """``text`` as a figure takes it: no markup, no name of a colour (``$accent``)."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def wrap(text: str) -> str:
    """``text`` as lines of hover text."""
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, 56, break_long_words=True))


def _axis(title: str, log: Sequence[float]) -> Mapping[str, Any]:
    found: dict[str, Any] = {"title": {"text": title, "standoff": 8}, "gridcolor": "$rule", "zeroline": False}
    found["automargin"] = True  # a title stands beside its labels, however long they are
    found |= {"linecolor": "$rule", "ticks": "outside", "ticklen": 4, "tickcolor": "$rule"}
    known = [value for value in log if 0 < value < math.inf]
    if known and max(known) < NARROW * min(known):  # left alone, the axis would be a decade and its ticks a heap
        known = [min(known) / NARROW, max(known) * NARROW]
        found["range"] = [math.log10(value) for value in known]
    if log:
        ticks = log_ticks(known)
        found |= {"type": "log", "tickvals": ticks, "ticktext": [number(tick) for tick in ticks]}
    return found
