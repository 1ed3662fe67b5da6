"""What is expected of a candidate before it is launched: by the analytic model where there is one, by its number of
GPUs alone where there is none, and by earlier studies. Everything is cached by configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tuner.search.candidates import Candidates
from tuner.search.ledger import COST_KEY
from tuner.search.prediction import Predictor
from tuner.search.reading import capacity, margin
from tuner.search.surrogate import Array
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective

if TYPE_CHECKING:
    from tuner.search.model.predictor import AnalyticModel


ASKED_OF = 5  # candidates whose variants say whether a parameter changes anything


@dataclass(slots=True)
class Foresight:
    """Asks the model once for every candidate and remembers the answers as arrays, in logarithms, by the candidates'
    numbers: ``cost`` and ``latency`` (candidates, loads), ``capacity`` and ``kv_tokens`` (candidates,), NaN where the
    model says that the server does not fit. Call :meth:`look` after the candidates grew. ``memory`` is the correction
    that is in force: overhead in bytes, and a factor on the weights."""

    candidates: Candidates
    objective: Objective
    loads: tuple[float, ...]
    predictor: Predictor | None
    model: str
    gpus: Array = field(default_factory=lambda: np.zeros(0))
    cost: Array = field(default_factory=lambda: np.zeros((0, 0)))
    latency: Array = field(default_factory=lambda: np.zeros((0, 0)))
    capacity: Array = field(default_factory=lambda: np.zeros(0))
    kv_tokens: Array = field(default_factory=lambda: np.zeros(0))
    short_bytes: Array = field(default_factory=lambda: np.zeros(0))
    memory: tuple[float, float] = (0.0, 1.0)

    def look(self) -> None:
        """Asks for every candidate that was added since the last look."""
        new = self.candidates.params[len(self.gpus) :]
        if not new:
            return
        rows = [self._ask(self.candidates.space.config(params, self.model)) for params in new]
        width = len(self.loads)
        self.gpus = np.append(self.gpus, [r[0] for r in rows])
        self.capacity = np.append(self.capacity, [r[1] for r in rows])
        self.kv_tokens = np.append(self.kv_tokens, [r[2] for r in rows])
        self.short_bytes = np.append(self.short_bytes, [r[3] for r in rows])
        self.cost = np.concatenate([self.cost.reshape(-1, width), np.array([r[4] for r in rows])])
        self.latency = np.concatenate([self.latency.reshape(-1, width), np.array([r[5] for r in rows])])

    def reconsider(self, predictor: AnalyticModel) -> None:
        """Takes a model that was corrected: what fits, and how much room is left, is asked again of every candidate;
        latencies only of those that fit now and did not before."""
        self.predictor = predictor
        self.look()
        for i in range(len(self.gpus)):
            config = self.candidates.space.config(self.candidates.params[i], self.model)
            now = predictor.fit(config)
            if now.fits and self.short_bytes[i] > 0:
                row = self._ask(config)
                self.capacity[i], self.cost[i], self.latency[i] = row[1], row[4], row[5]
            self.short_bytes[i] = 0.0 if now.fits else max(now.short_bytes, 1)
            self.kv_tokens[i] = math.log(max(now.kv_tokens, 1.0)) if now.fits else math.nan

    def silent_on(self, parameter: int) -> bool:
        """Whether the model's answers are the same for all values of a parameter that may be launched: so say
        :data:`ASKED_OF` candidates that fit and have it; not where there is nothing to compare. Where there is no
        model, it is silent on all."""
        space, p = self.candidates.space, self.candidates.space.parameters[parameter]
        self.look()
        having = (self.short_bytes <= 0) & (self.candidates.codes()[:, parameter] >= 0)
        having[list(self.candidates.beyond)] = False
        having = np.nonzero(having)[0]
        compared = False
        for i in having[np.linspace(0, len(having) - 1, min(ASKED_OF, len(having))).astype(np.int64)]:
            variants = [space.snap({**self.candidates.params[i], p.name: value}) for value in p.values]
            variants = [v for v in variants if self.candidates.admits(v)]
            said = np.array([np.hstack(self._ask(space.config(v, self.model))[1:]) for v in variants])
            if not np.allclose(said, said[0], equal_nan=True):
                return False
            compared |= len(variants) > 1
        return compared

    def _ask(self, config: ServingConfig) -> tuple[float, float, float, float, list[float], list[float]]:
        """(GPUs, log capacity, log KV tokens, bytes short, log costs, log latencies) of one serving config."""
        gpus, unknown = float(max(config.gpus, 1)), [math.nan] * len(self.loads)
        if self.predictor is None:
            return gpus, math.nan, math.nan, 0.0, unknown, unknown
        first = self.predictor.predict(config, self.loads[0])
        if not first.fits:
            return gpus, math.nan, math.nan, float(max(first.short_bytes, 1)), unknown, unknown
        answers = [first, *(self.predictor.predict(config, load) for load in self.loads[1:])]
        margins = [margin(a.metrics, self.objective.slos) for a in answers]
        bound, _ = capacity(self.loads, margins)
        latency = [_log(a.metrics.get(self.objective.latency_key)) for a in answers]
        good = [value for value, m in zip(latency, margins, strict=True) if m <= 0] or latency[:1]
        ceiling = good[-1] + 0.3  # beyond saturation the model's figures are large and say nothing of the axis
        kv_tokens = math.log(max(first.kv_tokens, 1.0))
        costs = [_log(a.metrics.get(COST_KEY)) for a in answers]
        return gpus, bound, kv_tokens, 0.0, costs, [min(value, ceiling) for value in latency]


@dataclass(frozen=True, slots=True)
class Source:
    """One prior mean for one quantity: its values (candidates, loads), centred, the weight it starts with and how
    far that weight may move."""

    name: str
    values: np.ndarray
    weight: float
    weight_sd: float


def columns(sources: Sequence[Source], loads: int, count: int) -> np.ndarray:
    """Sources as an array (candidates, loads, sources)."""
    if not sources:
        return np.zeros((count, loads, 0))
    return np.stack([s.values for s in sources], axis=2)


def _log(value: float | None) -> float:
    return math.log(value) if value is not None and 0 < value < math.inf else 20.0
