"""The front as a still picture: plain SVG, written by hand, for a README, for paper and for readers without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tuner.pareto.front import Point
from tuner.report.style import log_ticks, number
from tuner.report.summary import Summary, label

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 64, 56
INK, MUTED, RULE, ACCENT, CHOSEN, FAINT = "#1c1917", "#6b655f", "#e4e0da", "#0b6e99", "#c2410c", "#b3aca4"
Scale = Callable[[float], float]


def front_svg(s: Summary) -> str:
    """Every load point with the front, the default and the recommendation; the same colours as the page's light ones,
    on white. A study without a point gives a picture that says so."""
    if not s.points:
        return _frame([_text(WIDTH / 2, HEIGHT / 2, "no load point was measured", anchor="middle")])
    shown = [*s.points, *([s.choice.point] if s.choice.point else [])]
    x = _scale([p.cost for p in shown], LEFT, WIDTH - RIGHT)
    y = _scale([p.latency * 1e3 for p in shown], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y, shown, label(s.study.objective.latency)), *_line(s.front, x, y)]
    on_front = {p.key for p in s.front}
    for p in s.points:
        if p.key not in on_front and not (p.baseline and p.ok):
            fill = f'fill="{ACCENT}" fill-opacity="0.35"' if p.ok else f'fill="none" stroke="{FAINT}"'
            parts.append(f'<circle cx="{x(p.cost):.1f}" cy="{y(p.latency * 1e3):.1f}" r="3.5" {fill}/>')
    for p in s.front:
        parts += _bars(p, x, y, ACCENT)
        parts.append(f'<circle cx="{x(p.cost):.1f}" cy="{y(p.latency * 1e3):.1f}" r="4.5" fill="{ACCENT}"/>')
    for p in s.points:
        if p.baseline and p.ok:
            parts.append(_diamond(x(p.cost), y(p.latency * 1e3)))
    if s.choice.point:
        p = s.choice.point
        parts += [*_bars(p, x, y, CHOSEN), _star(x(p.cost), y(p.latency * 1e3), 10)]
    return _frame([*parts, *_legend(s), *_title(s)])


def _grid(x: Scale, y: Scale, shown: Sequence[Point], latency: str) -> list[str]:
    parts = []
    for tick in log_ticks(p.cost for p in shown):
        at = x(tick)
        parts.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{RULE}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 18, number(tick), anchor="middle", color=MUTED, size=12))
    for tick in log_ticks(p.latency * 1e3 for p in shown):
        at = y(tick)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 8, at + 4, number(tick), anchor="end", color=MUTED, size=12))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 14, "USD per million output tokens within SLO", anchor="middle"))
    turned = f'transform="rotate(-90 18 {HEIGHT / 2})"'
    parts.append(_text(18, HEIGHT / 2, f"{latency} (ms)", anchor="middle", more=turned))
    return parts


def _line(front: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """A staircase: between two points of the front one has the cheaper one's latency at most."""
    if not front:
        return []
    path = f"M{x(front[0].cost):.1f} {y(front[0].latency * 1e3):.1f}"
    path += "".join(f"H{x(p.cost):.1f}V{y(p.latency * 1e3):.1f}" for p in front[1:])
    return [f'<path d="{path}" fill="none" stroke="{ACCENT}" stroke-width="1.5"/>']


def _bars(p: Point, x: Scale, y: Scale, color: str) -> list[str]:
    """Both intervals, as far as the picture goes; towards an end that has no bound they are dotted."""
    at_x, at_y = x(p.cost), y(p.latency * 1e3)
    ends = []
    if p.cost_interval and p.cost_interval[0] > 0:
        for value in p.cost_interval:
            bounded = math.isfinite(value)
            ends.append((min(max(x(value), LEFT), WIDTH - RIGHT) if bounded else WIDTH - RIGHT, at_y, bounded))
    if p.latency_interval and p.latency_interval[0] > 0:
        for value in p.latency_interval:
            bounded = math.isfinite(value)
            ends.append((at_x, min(max(y(value * 1e3), TOP), HEIGHT - BOTTOM) if bounded else TOP, bounded))
    dotted = ' stroke-dasharray="1 5"'
    return [
        f'<path d="M{at_x:.1f} {at_y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{color}"{"" if bounded else dotted}/>'
        for to_x, to_y, bounded in ends
    ]


def _legend(s: Summary) -> list[str]:
    items = [(f'<circle cx="0" cy="-4" r="4.5" fill="{ACCENT}"/>', "front")]
    items.append((f'<circle cx="0" cy="-4" r="3.5" fill="{ACCENT}" fill-opacity="0.35"/>', "within the SLOs"))
    items.append((f'<circle cx="0" cy="-4" r="3.5" fill="none" stroke="{FAINT}"/>', "missed an SLO"))
    items.append((_diamond(0, -4), "engine's default"))
    if s.choice.point:
        items.append((_star(0, -4, 8), "recommended" + (" (verified)" if s.choice.point.role == "verify" else "")))
    parts, at = [], float(LEFT)
    for mark, words in items:
        parts.append(f'<g transform="translate({at:.0f} 50)">{mark}{_text(10, 0, words, size=12)}</g>')
        at += 34 + 6.8 * len(words)
    return parts


def _title(s: Summary) -> list[str]:
    words = f"{Path(s.study.model).name} on {s.hardware}"
    parts = [_text(LEFT, 26, words if len(words) < 80 else "…" + words[-79:], size=15, more='font-weight="600"')]
    if s.emulated:
        parts.append(
            _text(WIDTH - RIGHT, 26, "EMULATED", anchor="end", color=CHOSEN, size=15, more='font-weight="700"')
        )
    return parts


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale with a margin of 6 % at both ends."""
    low, high = math.log(min(values)), math.log(max(values))
    room = max((high - low) * 0.06, 0.05)
    low, high = low - room, high + room
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _diamond(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 6.5:.1f}l6 6.5l-6 6.5l-6 -6.5z" fill="{INK}"/>'


def _star(x: float, y: float, size: float) -> str:
    corners = []
    for i in range(10):
        radius, angle = (size if i % 2 == 0 else size * 0.42), math.pi * i / 5
        corners.append(f"{x + radius * math.sin(angle):.1f},{y - radius * math.cos(angle):.1f}")
    return f'<polygon points="{" ".join(corners)}" fill="{CHOSEN}" stroke="#fff" stroke-width="1"/>'


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", color: str = INK, size: float = 13, more: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size:g}"'
    return f"<text {place} {more}>{html.escape(words)}</text>"


def _frame(parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head += ' role="img" aria-label="Cost against latency: every measured load point and the Pareto front"'
    head += ' font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    return head + f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
