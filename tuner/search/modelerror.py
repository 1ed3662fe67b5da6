"""How wrong the analytic model was, in words and figures, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.search.foresight import Foresight
from tuner.search.reading import Reading


@dataclass(frozen=True, slots=True)
class ModelError:
    """Per quantity (cost, latency, capacity): ``error`` is the median relative error, ``bias`` the median of measured
    over predicted, ``rank`` Spearman's rank correlation between the two, ``weight`` what is left of the model's weight
    of 1. ``points`` is over how many measured points, ``memory_crashes`` how many launches ran out of memory that it
    took to fit."""

    points: int = 0
    error: Mapping[str, float] = field(default_factory=dict)
    bias: Mapping[str, float] = field(default_factory=dict)
    rank: Mapping[str, float] = field(default_factory=dict)
    weight: Mapping[str, float] = field(default_factory=dict)
    memory_crashes: int = 0
    has_model: bool = True

    def words(self) -> str:
        """One paragraph for the report."""
        if not self.has_model:
            return "There was no analytic model of this hardware: the search worked from its launches alone."
        if not self.points:
            return "The model was not compared with anything: no launch met the SLOs."
        parts = []
        for name in self.error:
            side = "higher" if self.bias[name] >= 1 else "lower"
            rank = f", rank correlation {self.rank[name]:.2f}" if name in self.rank else ""
            weight = f"; its weight is now {self.weight[name]:.2f} of 1" if name in self.weight else ""
            parts.append(
                f"{name}: off by {self.error[name]:.0%} (median), measured {abs(self.bias[name] - 1):.0%} {side}"
                f" than predicted{rank}{weight}"
            )
        memory = f" {self.memory_crashes} launches ran out of memory where it saw room." if self.memory_crashes else ""
        return f"The model against {self.points} measured points: " + ". ".join(parts) + "." + memory


def model_error(
    readings: Sequence[tuple[int, Reading]], foresight: Foresight, weights: Mapping[str, Mapping[str, float]]
) -> ModelError:
    """The model's predictions beside what the launches said: ``readings`` with their candidates' numbers."""
    if foresight.predictor is None:
        return ModelError(has_model=False)
    pairs: dict[str, list[tuple[float, float]]] = {"cost": [], "latency": [], "capacity": []}
    crashes = 0
    foresight.look()
    for i, r in readings:
        if foresight.short_bytes[i] > 0:
            continue
        if r.works is not None and r.works < 0:
            crashes += getattr(r.seen.outcome, "short_bytes", None) is not None
        if r.capacity is not None and r.good:
            pairs["capacity"].append((r.capacity, float(foresight.capacity[i])))
        for place, cost, latency in r.steps:
            if place in r.good:
                pairs["cost"].append((cost, float(foresight.cost[i, place])))
                pairs["latency"].append((latency, float(foresight.latency[i, place])))
    error, bias, rank = {}, {}, {}
    for name, both in pairs.items():
        if not both:
            continue
        measured, predicted = np.array(both).T
        off = measured - predicted
        error[name] = float(np.median(np.abs(np.expm1(-off))))
        bias[name] = math.exp(float(np.median(off)))
        if len(both) >= 3 and np.ptp(measured) > 0 and np.ptp(predicted) > 0:
            rank[name] = float(np.corrcoef(_ranks(measured), _ranks(predicted))[0, 1])
    left = {name: of["model"] for name, of in weights.items() if "model" in of and name in error}
    return ModelError(len(pairs["latency"]), error, bias, rank, left, crashes)


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)
