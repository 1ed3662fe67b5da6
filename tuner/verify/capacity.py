"""Capacity: the load at which one launch just met the SLOs on one window, between the loads that were measured.

Comparing configurations at loads of a coarse ladder would compare luck: one at load 4 and one at 3 may differ by one
request. So every launch is bracketed on every window (a load that holds, a higher one that does not), and the load
where the worst SLO's margin crosses zero is read off the straight line between them, in logarithms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from tuner.load.trace import Trace
from tuner.pareto.front import Point
from tuner.spec.slo import Slo
from tuner.spec.study import Study
from tuner.study.outcome import Step
from tuner.verify.arm import COST, FAR, Tail, margin, pooled

UP = (1.06, 1.2, 1.5, 2.0)
DOWN = tuple(1 / up for up in UP)
THROUGHPUT, SHARE = "output_tokens_per_s", "slo_share"
FEW = 0.005  # of the tokens: no step is long enough to tell less of them from none
NEAR = 0.99  # of a load: what lies above that is taken for the load itself
REACH = 1.25  # times a load: from how far above it latencies are followed down to it without a doubt
BEYOND = 2.0  # how far above the last load a capacity is looked for
FOLLOWED = 64.0  # how far above the ladder's top a launch is followed that holds there


def highest_load(study: Study, windows: Sequence[Trace]) -> float:
    """The highest load to follow a launch to: :data:`FOLLOWED` times the ladder's top, which is low where the default
    all but fails, as far as the shortest of ``windows`` has the requests for a whole step."""
    top = max(study.load.ladder)
    lasts_s = min(float(window.arrival_s[-1]) for window in windows)
    return max(top, min(FOLLOWED * top, lasts_s / study.trace.window_s))


def still_pays(steps: Sequence[Step | Point]) -> bool:
    """Whether more load may cost less. Goodput that is counted by what was asked for rises with the load for as long as
    the SLOs hold. Else a saturated server may hold at any load, at the same cost: it must have fallen by at least half
    of what the load rose in the last step."""
    if len(steps) < 2 or any("goodput_window_s" in s.metrics for s in steps):
        return True
    before, last = (s.metrics.get(COST, math.nan) for s in steps[-2:])
    return last / before <= (steps[-2].load / steps[-1].load) ** 0.5


def loads(start: float, lowest: float, highest: float, held: Sequence[bool]) -> float | None:
    """The next load to measure on a window, ``held`` being what the ones before showed; None when bracketed.

    First ``start``; upwards while the SLOs hold, at most to ``highest``; downwards while they do not, at most to half
    of ``lowest``.
    """
    start = min(max(start, lowest / 2), highest)
    if not held:
        return start
    if held[-1] != held[0]:
        return None
    tried = len(held)
    before, load = start * _factor(held[0], tried - 1), start * _factor(held[0], tried)
    if held[0]:
        return None if before >= highest * (1 - 1e-9) else min(load, highest)
    return None if before <= lowest / 2 * (1 + 1e-9) else max(load, lowest / 2)


def _factor(up: bool, tried: int) -> float:
    """Small steps first, then doubling or halving."""
    factors = (1.0, *(UP if up else DOWN))
    beyond = max(tried - len(factors) + 1, 0)
    return factors[min(tried, len(factors) - 1)] * (2.0 if up else 0.5) ** beyond


def capacity(steps: Sequence[Step], slos: Sequence[Slo]) -> float:
    """The load at which the worst SLO of ``steps`` (one launch, one window) crosses its limit; the highest load
    measured where none was missed; the lowest measured where none held (it is at most that: left out, a launch would be
    the better for having failed). NaN without a trusted step."""
    known = [(s.load, margin(s, slos)) for s in _trusted(steps)]
    below = [(load, gap) for load, gap in known if gap <= 0]
    if not below:
        return held(steps)
    low, low_gap = below[-1]
    above = [(load, gap) for load, gap in known if gap > 0 and load > low]
    if not above:
        return low
    high, high_gap = above[0]
    share = -low_gap / (high_gap - low_gap)
    return math.exp(math.log(low) + share * math.log(high / low))


def held(steps: Sequence[Step]) -> float:
    """The highest load at which the SLOs held; the lowest measured where they held at none; NaN without any."""
    known = _trusted(steps)
    return max((s.load for s in known if not s.slo_misses), default=min((s.load for s in known), default=math.nan))


def expected(steps: Sequence[Step], slos: Sequence[Slo]) -> float:
    """:func:`capacity`, and where no SLO was missed the load at which the line through the last two loads reaches the
    limit, at most ``BEYOND`` times the last: where to look first, nothing that was measured."""
    known = [(s.load, margin(s, slos)) for s in _trusted(steps)]
    if len(known) < 2 or any(gap > 0 for _, gap in known):
        return capacity(steps, slos)
    (low, first), (high, second) = known[-2:]
    rise = (second - first) / math.log(high / low)
    return high * math.exp(min(-second / rise, math.log(BEYOND))) if rise > 0 else high


def cost_at(steps: Sequence[Step], load: float) -> float:
    """USD per million output tokens at ``load``: the cost at the nearest measured load that is not above it, less by
    how much more the server puts out at ``load``, more by how much less of that is within the SLOs (:func:`_late`).
    Where goodput was counted by what was asked for, and below every measured load, it puts out as much more as the load
    is."""
    known = [s for s in _trusted(steps) if 0 < s.metrics.get(COST, math.nan) < math.inf]
    if not known:
        return math.nan
    near = next((s for s in reversed(known) if s.load <= load * (1 + 1e-9)), known[0])
    told = known if SHARE in near.metrics else [near]
    cost = near.metrics[COST] * (1 - _late([near], load)) / (1 - _late(told, load))
    kept_up = load < near.load and not near.slo_misses  # with more: it puts out what is asked of it
    if "goodput_window_s" in near.metrics or kept_up:
        return cost * near.load / load
    here, there = near.metrics.get(THROUGHPUT, math.nan), value_at(known, load, THROUGHPUT)
    return cost * (here / there if here > 0 and there > 0 else 1.0)


def _late(steps: Sequence[Step], load: float) -> float:
    """The share of tokens beyond the SLOs at ``load``. It grows by factors, so that between two loads it lies on the
    line in logarithms: half way between one in two hundred and a half it is one in twenty. 0 where not measured."""
    found = [(s.load, math.log(min(max(1 - s.metrics[SHARE], FEW), 1 - FEW))) for s in steps if SHARE in s.metrics]
    return math.exp(_between(found, load)) if found else 0.0


def value_at(steps: Sequence[Step], load: float, key: str, slope: float = 0.0, *, rising: bool = False) -> float:
    """``key`` at ``load``, on the straight line between the neighbouring measured loads in logarithms; below them along
    ``slope`` (0: the lowest load's value), above them the highest load's value, or where ``rising`` on along the last
    line. NaN where it was not measured."""
    known = _known(_trusted(steps), key)
    below = math.log(load / known[0][0]) if known and load < known[0][0] else 0.0
    return math.exp(_between(known, load, rising) + slope * below)


def slope_below(steps: Sequence[Step], load: float, key: str) -> float | None:
    """How ``key`` rises from the measured load next to ``load``, at most that, to the one after it, both in logarithms
    (at least 0); None where no load as low held (from a load that missed, latencies rise as a queue does that never
    ends), or none was measured above."""
    known = _known(_trusted(steps), key)
    pair = next(((a, b) for a, b in reversed([*_pairs(known)]) if a[0] * NEAR <= load), None)
    if pair is None or any(s.slo_misses for s in _trusted(steps) if s.load == pair[0][0]):
        return None
    return max((pair[1][1] - pair[0][1]) / math.log(pair[1][0] / pair[0][0]), 0.0)


def _known(steps: Sequence[Step], key: str) -> list[tuple[float, float]]:
    return [(s.load, math.log(s.metrics[key])) for s in steps if 0 < s.metrics.get(key, math.nan) < math.inf]


def margin_at(steps: Sequence[Step], load: float, slos: Sequence[Slo]) -> float:
    """The worst SLO's :func:`margin` at ``load``, on the straight lines between the loads that were measured, above
    them on along the last: a load beyond one that missed is missed by more."""
    return min(_between([(s.load, margin(s, slos)) for s in _trusted(steps)], load, rising=True), FAR)


def margin_of_all(cells: Sequence[Sequence[Step]], load: float, slos: Sequence[Slo]) -> float:
    """The worst SLO's margin at ``load`` over all requests of several launches and windows (:func:`pooled`)."""
    if not slos:
        return fmean(margin_at(steps, load, slos) for steps in cells)

    def of(slo: Slo) -> float:
        margins = [margin_at(steps, load, [slo]) for steps in cells]
        nearest = [min(_trusted(steps), key=lambda s: abs(math.log(s.load / load)), default=None) for steps in cells]
        return pooled(margins, slo, [Tail.of(step, slo) for step in nearest])

    return max(map(of, slos))


def _between(known: Sequence[tuple[float, float]], load: float, rising: bool = False) -> float:
    if not known:
        return math.nan
    if load <= known[0][0]:
        return known[0][1]
    pairs = [*_pairs(known)]
    for (low, first), (high, second) in pairs:
        if load <= high:
            return first + (second - first) * math.log(load / low) / math.log(high / low)
    if not rising or not pairs:
        return known[-1][1]
    (low, first), (high, second) = pairs[-1]
    return second + max(second - first, 0.0) * math.log(load / high) / math.log(high / low)


def _trusted(steps: Sequence[Step]) -> list[Step]:
    return sorted((s for s in steps if not s.untrusted), key=lambda s: s.load)


def _pairs(known: Sequence[tuple[float, float]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return ((a, b) for a, b in itertools.pairwise(known) if b[0] > a[0])
