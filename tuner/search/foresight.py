"""What is expected of a candidate before it is launched: by the analytic model where there is one, by its number of
GPUs alone where there is none, and by earlier studies. Everything is cached by configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.search.candidates import Candidates
from tuner.search.ledger import COST_KEY
from tuner.search.prediction import Predictor
from tuner.search.reading import capacity, margin
from tuner.space.config import ServingConfig, Value
from tuner.spec.objective import Objective


@dataclass(frozen=True, slots=True)
class Expected:
    """One configuration as the analytic model sees it, in logarithms, per load of the ladder; ``refused`` says why it
    cannot fit (``short_bytes`` by how much). Without a model only ``gpus`` is known."""

    gpus: int
    cost: tuple[float, ...] = ()
    latency: tuple[float, ...] = ()
    capacity: float = 0.0
    kv_tokens: float = 0.0
    refused: str = ""
    short_bytes: int = 0


@dataclass(slots=True)
class Foresight:
    """Asks the model once for every configuration and remembers the answer."""

    candidates: Candidates
    objective: Objective
    loads: tuple[float, ...]
    predictor: Predictor | None
    model: str
    known: dict[tuple[int, ...], Expected] = field(default_factory=dict)

    def of(self, params: Mapping[str, Value]) -> Expected:
        """The expectation of a snapped configuration."""
        key = self.candidates.key(params)
        if key not in self.known:
            self.known[key] = self._ask(self.candidates.space.config(params, self.model))
        return self.known[key]

    def _ask(self, config: ServingConfig) -> Expected:
        gpus = max(config.gpus, 1)
        if self.predictor is None:
            return Expected(gpus)
        answers = [self.predictor.predict(config, load) for load in self.loads]
        if not answers[0].fits:
            first = answers[0]
            return Expected(gpus, refused=first.reason or "it does not fit in memory", short_bytes=first.short_bytes)
        margins = [margin(a.metrics, self.objective.slos) for a in answers]
        bound, _ = capacity(self.loads, margins)
        cost = [_log(a.metrics.get(COST_KEY)) for a in answers]
        latency = [_log(a.metrics.get(self.objective.latency_key)) for a in answers]
        good = [value for value, m in zip(latency, margins, strict=True) if m <= 0] or latency[:1]
        ceiling = good[-1] + 0.3  # beyond saturation the model's figures are large and say nothing of the axis
        return Expected(
            gpus, tuple(cost), tuple(min(v, ceiling) for v in latency), bound, max(a.kv_tokens for a in answers)
        )


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
