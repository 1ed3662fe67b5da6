"""Racing: when the rest of a trial cannot matter any more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from tuner.pareto.front import COST, LAUNCH_SPREAD, Interval, Point
from tuner.spec.objective import Objective
from tuner.study.outcome import Step
from tuner.words import figure

UNKNOWN = math.log(2)  # standard error of a log value of which nothing is known


def should_stop(
    steps: Sequence[Step],
    front: Sequence[Point],
    ladder: Sequence[float],
    objective: Objective,
    *,
    spread: float = LAUNCH_SPREAD,
    confidence: float = 0.95,
) -> str:
    """Why no further load of this trial can reach the front any more; empty where one still can.

    For every load that is left the trial is given its best case: the cost falls in proportion to the load (no request
    late), the latency stays what it was at the highest load measured (it cannot fall as load rises), and both get the
    favourable end of their interval, widened by the launch spread. The trial stops when a point of the front, each at
    the unfavourable end of its own, is at least as good as that best case in both axes at every load left.
    """
    trusted = [s for s in steps if not s.untrusted]
    if not trusted or not front:
        return ""
    last = max(trusted, key=lambda s: s.load)
    left = [load for load in ladder if load > last.load * (1 + 1e-9)]
    cost, latency = last.metrics.get(COST, math.nan), last.metrics.get(objective.latency_key, math.nan)
    if not left or not all(math.isfinite(v) and v > 0 for v in (cost, latency)):
        return ""
    best_cost = end(cost, last.intervals.get(COST), spread, confidence, low=True)
    best_latency = end(latency, last.intervals.get(objective.latency_key), spread, confidence, low=True)
    beaten_by: list[Point] = []
    for load in left:
        reachable = best_cost * last.load / load
        by = next((p for p in front if _dominates(p, reachable, best_latency, spread, confidence)), None)
        if by is None:
            return ""
        beaten_by.append(by)
    by = beaten_by[-1]
    return (
        f"cannot beat the front at {confidence * 100:g} %: at load {left[-1]:g} it would cost at best "
        f"${figure(best_cost * last.load / left[-1])} at {objective.latency} {figure(best_latency * 1e3)} ms, "
        f"trial {by.trial} has ${figure(by.cost)} at {figure(by.latency * 1e3)} ms"
    )


def end(value: float, interval: Interval | None, spread: float, confidence: float, *, low: bool) -> float:
    """The low (or high) one-sided limit of ``value``: what the interval (95 %, within one launch) and the launch
    spread say together, added in quadrature on the log scale."""
    reach = float(special.ndtri(confidence)) * math.hypot(inside(value, interval), spread)
    return value * math.exp(-reach if low else reach)


def _dominates(point: Point, cost: float, latency: float, spread: float, confidence: float) -> bool:
    repeats = math.sqrt(max(len(point.trials), 1))
    return (
        end(point.cost, point.cost_interval, spread / repeats, confidence, low=False) <= cost
        and end(point.latency, point.latency_interval, spread / repeats, confidence, low=False) <= latency
    )


def log_error(point: Point, axis: str, spread: float) -> float:
    """Standard error of a point's log ``cost`` or ``latency``: the interval within a launch and the launch spread."""
    within = inside(getattr(point, axis), getattr(point, f"{axis}_interval"))
    return math.hypot(within, spread / math.sqrt(max(len(point.trials), 1)))


def inside(value: float, interval: Interval | None) -> float:
    """Standard error of a log value by its 95 % interval. Where that has no upper end (a percentile of few requests),
    the whole lower half counts as one: it is itself of a handful of requests, and often short by chance. Where it says
    nothing of the lower half either, :data:`UNKNOWN`."""
    if interval is None:
        return 0.0
    low, high = interval
    if low > 0 and math.isfinite(high):
        return math.log(high / low) / (2 * 1.96)
    return math.log(value / low) if 0 < low < value else UNKNOWN
