"""Hypervolume: how much of the cost x latency plane a set of points dominates, up to a reference point."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tuner.pareto.front import Point


def hypervolume(
    points: Iterable[Point | tuple[float, float]], reference: tuple[float, float], *, log: bool = False
) -> float:
    """The exact area dominated by ``points`` (cost, latency; both minimised) and bounded by ``reference``.

    A Point that missed its SLOs counts for nothing, nor does anything at or beyond the reference, or that is no finite
    number. ``log`` measures in natural logarithms of both axes (then every value must be above zero, else
    ``ValueError``): a halved cost counts the same wherever it happens.
    """
    pairs = [p if isinstance(p, tuple) else (p.cost, p.latency) for p in points if isinstance(p, tuple) or p.ok]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]  # a NaN would leave the rest unsorted
    if log:
        if min((value for pair in (*pairs, reference) for value in pair), default=1.0) <= 0:
            raise ValueError("a hypervolume in logarithms needs costs and latencies above zero")
        pairs = [(math.log(cost), math.log(latency)) for cost, latency in pairs]
        reference = (math.log(reference[0]), math.log(reference[1]))
    right, ceiling = reference
    area = 0.0
    for cost, latency in sorted(pairs):
        if cost < right and latency < ceiling:
            area += (right - cost) * (ceiling - latency)
            ceiling = latency
    return area
