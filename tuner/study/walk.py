"""Which load of a launch to measure next: no more of a ladder than may matter.

A launch begins at a load that it is believed to hold, and is taken up to the first that misses. Of the loads below only
those are measured that may reach the front: what holds one load mostly holds the lower ones, where it costs more, and
is a point of the front by its latency alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from tuner.pareto.front import COST, LAUNCH_SPREAD, Point
from tuner.spec.objective import Objective
from tuner.study.outcome import Step

MEASURED = 0.75  # of the loads up to its first miss, those that a launch of the search measures (docs/search-log.md)


def walked(
    take: Callable[[float], Step],
    rungs: Sequence[float],
    start: float = 0.0,
    below: Callable[[Sequence[Step]], float | None] = lambda _steps: None,
    enough: Callable[[Sequence[Step]], bool] = lambda _steps: False,
) -> list[Step]:
    """The steps of one launch in the order in which they were measured; ``take`` measures one. Up to the first that
    misses (:func:`ahead`), or until there are ``enough``; then what ``below`` asks for, to the first miss."""
    steps: list[Step] = []
    while not (steps and enough(steps)) and (load := ahead(steps, rungs, start)) is not None:
        steps.append(take(load))
    while min(s.load for s in steps) > rungs[0] and (load := below(steps)) is not None:
        steps.append(take(load))
        if not steps[-1].ok:
            break
    return steps


def ahead(steps: Sequence[Step], rungs: Sequence[float], start: float) -> float | None:
    """The next of ``rungs`` (low to high) on the way to the first that misses: at first the highest up to ``start``
    (the lowest where none is), then one by one upwards; from one that missed with none below it held, half way down.
    None where the highest that holds is known, or none holds."""
    if not steps:
        return max((load for load in rungs if load <= start * (1 + 1e-9)), default=rungs[0])
    missed = min((s.load for s in steps if not s.ok), default=math.inf)
    held = max((s.load for s in steps if s.ok and s.load < missed), default=0.0)
    between = [load for load in rungs if held * (1 + 1e-9) < load < missed * (1 - 1e-9)]
    if not between:
        return None
    return between[0] if held else between[len(between) // 2]


def below(
    steps: Sequence[Step],
    rungs: Sequence[float],
    front: Sequence[Point],
    objective: Objective,
    launches: Sequence[Sequence[Step]] = (),
    spread: float = LAUNCH_SPREAD,
) -> float | None:
    """The highest of ``rungs`` below all ``steps`` at which this launch may reach the front; None where it may at none.

    At a lower load the cost rises in proportion as the load falls (it keeps up). The latency is expected to fall as
    those of earlier ``launches`` did on this window (the median of their ratios: which requests meet at a load is the
    traffic's, and makes some loads slower than higher ones for every server), or where none was measured at both loads
    along the line through the two lowest of this one, in logarithms. Nothing is measured where a point of the front is
    better than that by more than two launches differ by (one standard deviation; ``spread`` is that of one).
    """
    known = sorted((s for s in steps if not s.untrusted), key=lambda s: s.load)
    if not known or not known[0].ok:
        return None
    lowest = known[0]
    cost, latency = _value(lowest, COST), _value(lowest, objective.latency_key)
    if cost is None or latency is None:
        return None
    slope, doubt = _rise(known, objective.latency_key), math.exp(math.sqrt(2) * spread)
    for load in sorted((load for load in rungs if load < min(s.load for s in steps) * (1 - 1e-9)), reverse=True):
        share = load / lowest.load
        falls = _falls(load, lowest, launches, objective.latency_key)
        expected = latency * (median(falls) if falls else share**slope)
        as_cheap = (p.latency for p in front if p.cost <= cost / share)
        if expected < doubt * min(as_cheap, default=math.inf):
            return load
    return None


def place(ladder: Sequence[float], load: float) -> int:
    """How many rungs lie below ``load``, of the ladder and above it (:func:`tuner.study.workload.climb`): the same for
    every launch, whichever loads it measured."""
    top = max(ladder)
    if load > top * (1 + 1e-9):
        return len(ladder) - 1 + max(round(2 * math.log2(load / top)), 1)
    return sum(rung < load * (1 - 1e-9) for rung in ladder)


def _falls(load: float, lowest: Step, launches: Sequence[Sequence[Step]], key: str) -> list[float]:
    """By which factors a metric of earlier launches fell on the window of ``lowest`` from its load to ``load``."""
    found = []
    for steps in launches:
        at = {s.load: _value(s, key) for s in steps if s.ok and s.window == lowest.window}
        here, there = at.get(lowest.load), at.get(load)
        if here and there:
            found.append(there / here)
    return found


def _rise(known: Sequence[Step], key: str) -> float:
    """How a metric rises from the lowest load to the next, both in logarithms; infinite where that is not known."""
    values = [(s.load, value) for s in known[:2] if (value := _value(s, key))]
    if len(values) < 2:
        return math.inf
    (low, before), (high, after) = values
    return max(math.log(after / before) / math.log(high / low), 0.0)


def _value(step: Step, key: str) -> float | None:
    value = step.metrics.get(key, math.nan)
    return value if 0 < value < math.inf else None
