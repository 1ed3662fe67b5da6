"""What a launch is expected to bring: growth of the front's hypervolume, per GPU-second.

One launch measures a ladder of loads from low to high and stops at the first SLO miss, so it brings several points of
the front at once. The expectation is taken over draws from the beliefs (a fixed, stratified set), in the logarithms of
cost and latency, and multiplied by the probability that the server works at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.search.beliefs import Posterior
from tuner.search.surrogate import Array

DRAWS = 32
CELLS = 96  # along the cost axis


@dataclass(frozen=True, slots=True)
class Front:
    """Points (n, 2) in log cost and log latency that a launch would have to beat, inside ``reference`` (2,)."""

    points: Array
    reference: Array

    def volume(self) -> float:
        """Hypervolume of the points, in squared log units."""
        area, ceiling = 0.0, self.reference[1]
        for cost, latency in sorted(map(tuple, self.points)):
            if cost < self.reference[0] and latency < ceiling:
                area += (self.reference[0] - cost) * (ceiling - latency)
                ceiling = latency
        return float(area)

    def heights(self, cost: Array) -> Array:
        """The latency that has to be beaten at each log cost: the lowest of all points that are at most as costly."""
        best = np.full(cost.shape, self.reference[1])
        for own, latency in self.points:
            best = np.where(cost >= own, np.minimum(best, latency), best)
        return best

    def with_points(self, points: Array) -> Front:
        return Front(np.concatenate([self.points, points]), self.reference)


@dataclass(frozen=True, slots=True)
class LaunchCost:
    """Seconds of a launch: the start-up, one load step, and the teardown that goes with it."""

    start_s: float = 120.0
    step_s: float = 60.0

    def __post_init__(self) -> None:
        if self.start_s < 0 or self.step_s <= 0:
            raise ValueError("a launch takes time: start_s must be at least 0 and step_s above 0")


@dataclass(frozen=True, slots=True)
class Worth:
    """Per candidate: expected ``gain`` of hypervolume (crashes counted), expected ``gpu_seconds`` of its launch."""

    gain: Array
    gpu_seconds: Array


def draws(seed: int) -> Array:
    """Standard normal draws (DRAWS, 3) for capacity, latency and cost, stratified in each column."""
    from scipy.special import ndtri

    rng = np.random.default_rng([seed, 7])
    columns = [(rng.permutation(DRAWS) + rng.random(DRAWS)) / DRAWS for _ in range(3)]
    return ndtri(np.clip(np.stack(columns, axis=1), 1e-6, 1 - 1e-6))


def worth(beliefs: Posterior, front: Front, loads: Sequence[float], cost: LaunchCost, normal: Array) -> Worth:
    """Expected gain and GPU-seconds of every candidate."""
    gain = gains(beliefs, front, loads, normal).mean(1) * beliefs.works
    steps = np.minimum(_within(beliefs, loads, normal).sum(2) + 1, len(loads)).mean(1)
    seconds = cost.start_s + cost.step_s * steps * beliefs.works
    return Worth(gain, seconds * beliefs.gpus)


def gains(beliefs: Posterior, front: Front, loads: Sequence[float], normal: Array) -> Array:
    """Growth of the front (candidates, draws) by servers that work.

    Within one draw a candidate is wrong by the same number of standard deviations at every load: an error of the
    surrogate is the configuration's, not the load's.
    """
    latency = beliefs.latency[:, None, :] + beliefs.latency_sd[:, None, :] * normal[None, :, None, 1]
    price = beliefs.cost[:, None, :] + beliefs.cost_sd[:, None, :] * normal[None, :, None, 2]
    return improvement(price, np.where(_within(beliefs, loads, normal), latency, np.inf), front)


def _within(beliefs: Posterior, loads: Sequence[float], normal: Array) -> NDArray[np.bool_]:
    """Whether each load lies within the capacity: (candidates, draws, loads)."""
    capacity = beliefs.capacity[:, None] + beliefs.capacity_sd[:, None] * normal[None, :, 0]
    return np.log(np.array(loads))[None, None, :] <= capacity[:, :, None]


def improvement(price: Array, latency: Array, front: Front) -> Array:
    """Growth of the hypervolume (candidates, draws) by sets of points (candidates, draws, loads), on a grid of
    :data:`CELLS` cells along the cost axis."""
    inside = np.isfinite(latency) & (price < front.reference[0])
    if not inside.any():
        return np.zeros(price.shape[:2])
    low = max(float(price[inside].min()), float(np.quantile(price[inside], 0.05)) - 1.5)  # one wild draw sets no scale
    if len(front.points):
        low = min(low, float(front.points[:, 0].min()))
    edges = np.linspace(min(low, front.reference[0] - 1e-6), front.reference[0], CELLS + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    bar = front.heights(middle)
    found = np.full((*price.shape[:2], CELLS), np.inf)
    for i in range(price.shape[2]):
        reached = np.where(middle >= price[:, :, i, None], latency[:, :, i, None], np.inf)
        np.minimum(found, reached, out=found)
    return np.maximum(bar - found, 0.0).sum(2) * width
