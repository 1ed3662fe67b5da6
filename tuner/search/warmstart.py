"""Earlier studies as prior means: of other models, GPUs or versions, weighted by what they turn out to be worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.search.candidates import Candidates, correlations
from tuner.search.ledger import Seen
from tuner.search.reading import Reading, read
from tuner.search.surrogate import Array, Codes, Prior, Rows, Surrogate, fit
from tuner.space.config import Value
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.study.outcome import Outcome

SHAPE = Prior(single=0.05, pair=0.015, own=0.004)
FEWEST = 3  # launches below which an earlier study says nothing


@dataclass(frozen=True, slots=True)
class Earlier:
    """One earlier study, fitted: how its cost, latency and capacity depended on the parameters it shares with the
    present space. Levels are of no use (another model, another GPU) and are taken off."""

    name: str
    launches: int
    fitted: Mapping[str, Surrogate]

    def values(self, quantity: str, codes: Codes, loads: int) -> Array:
        """Its shape at these candidates: (candidates, loads) in logarithms, (candidates, 1) for the capacity. Loads are
        matched by their place in either ladder."""
        surrogate = self.fitted.get(quantity)
        width = loads if quantity != "capacity" else 1
        if surrogate is None or not len(codes):
            return np.zeros((len(codes), width))
        places = np.tile(np.linspace(0, 1, width), (len(codes), 1))
        mean, _ = surrogate.predict(codes, places, np.zeros((len(codes), width, 0)), spread=False)
        return mean - surrogate.mean


def earlier(
    name: str,
    trials: Iterable[tuple[Mapping[str, Any], Outcome]],
    space: SearchSpace,
    objective: Objective,
    loads: Sequence[float],
) -> Earlier | None:
    """An earlier study's trials as a prior mean for ``space``; None where it shares too little with it.

    Parameters that the present space does not have are dropped, absent ones taken at their default; a trial with a
    value that has no counterpart is passed over. The earlier ladder's places are matched to the present ladder's.
    """
    rows = Candidates(space)
    readings: list[tuple[tuple[int, ...], Reading]] = []
    trials = list(trials)
    ladder = sorted({s.load for _, outcome in trials for s in outcome.steps}) or list(loads)
    for number, (params, outcome) in enumerate(trials):
        own = _translate(params, space)
        if own is not None:
            readings.append((rows.key(own), read(Seen(number, own, outcome), objective, ladder)))
    measured = [(key, r) for key, r in readings if r.steps]
    if len({key for key, _ in measured}) < FEWEST:
        return None
    tables = correlations(space)
    logs = [math.log(load) for load in ladder]
    fitted = {}
    for quantity in ("cost", "latency", "capacity"):
        points: list[tuple[tuple[int, ...], float, float, float]] = []  # code, place, value, noise
        for key, r in readings:
            if quantity == "capacity" and r.capacity is not None:
                points.append((key, 0.0, r.capacity, r.capacity_sd**2))
            elif quantity != "capacity":
                for place, cost, latency in r.steps:
                    value = cost + logs[place] if quantity == "cost" else latency
                    points.append((key, place / max(len(logs) - 1, 1), value, 0.0))
        if len(points) >= FEWEST:
            codes = np.array([p[0] for p in points], dtype=np.int64)
            place, y, extra = np.array([p[1:] for p in points]).T
            fitted[quantity] = fit(tables, Rows(codes, place, y, np.zeros((len(y), 0)), extra), SHAPE)
    return Earlier(name, len(readings), fitted)


def _translate(params: Mapping[str, Any], space: SearchSpace) -> dict[str, Value] | None:
    try:
        return space.snap({p.name: params[p.name] for p in space.parameters if p.name in params})
    except ValueError:
        return None
