"""How wrong the model was: what it predicted for every measured step beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from tuner.pareto.front import COST, trusted_steps
from tuner.report.summary import Summary, label
from tuner.search.model.constants import WORDS

MOVED = math.log(1.03)  # a smaller factor on a constant is not shown


@dataclass(frozen=True, slots=True)
class Error:
    """Of one metric: ``typical`` is the median relative error (0.2: off by 20 %), ``bias`` the median of measured over
    predicted (1.1: 10 % higher than predicted), ``pairs`` are (predicted, measured, trial, load)."""

    metric: str
    name: str
    typical: float
    bias: float
    pairs: tuple[tuple[float, float, int, float], ...]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What the launches before trial ``by`` say of the model: ``factors`` are (constant in words, factor) as far as one
    moved by 3 % or more, the largest first; ``believed`` is the probability that they are what was wrong; ``weight`` is
    what the search still takes of the model's differences between configurations, by quantity; ``earlier`` the same of
    those of each earlier study (``warm_start``), by its name."""

    by: int
    factors: tuple[tuple[str, float], ...]
    believed: float
    weight: tuple[tuple[str, float], ...]
    earlier: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()


def learnt(s: Summary) -> Learnt | None:
    """By the newest trial that says so; None where none does (no model, another sampler, nothing measured)."""
    for trial in sorted(s.search, key=lambda t: -t.number):
        said = (trial.extra or {}).get("learnt")
        if isinstance(said, Mapping):
            words = {} if s.study.predictor else WORDS
            factors = {words.get(n, n): f for n, f in _numbers(said.get("factors")).items() if f > 0}
            moved = sorted(factors.items(), key=lambda item: -abs(math.log(item[1])))
            earlier = known if isinstance(known := said.get("earlier"), Mapping) else {}
            return Learnt(
                trial.number,
                tuple((name, factor) for name, factor in moved if abs(math.log(factor)) > MOVED),
                _numbers(said).get("believed", 0.0),
                _by_quantity(said.get("weight")),
                tuple((str(name), _by_quantity(of)) for name, of in earlier.items()),
            )
    return None


def errors(s: Summary) -> tuple[Error, ...]:
    """For cost and the latencies that matter to the study; empty where nothing was predicted."""
    names = {COST: "cost"}
    names |= {f"{m}_s": label(m) for m in (s.study.objective.latency, *(x.metric for x in s.study.objective.slos))}
    found = []
    for metric, name in names.items():
        pairs = []
        for trial, step in trusted_steps(s.search):
            predicted = _predicted(trial.extra or {}, step.load).get(metric)
            measured = step.metrics.get(metric)
            if step.ok and _positive(predicted) and _positive(measured):
                pairs.append((float(predicted), float(measured), trial.number, step.load))  # type: ignore[arg-type]
        if pairs:
            off = [math.log(measured / predicted) for predicted, measured, _, _ in pairs]
            typical = median(abs(math.expm1(x)) for x in off)
            found.append(Error(metric, name, typical, math.exp(median(off)), tuple(pairs)))
    return tuple(found)


def _predicted(extra: Mapping[str, object], load: float) -> Mapping[str, float]:
    """``extra["predicted"]`` maps a load (as text) to predicted metrics."""
    by_load = extra.get("predicted")
    if isinstance(by_load, Mapping):
        for key, metrics in by_load.items():
            try:
                same = math.isclose(float(key), load)
            except ValueError:
                continue
            if same and isinstance(metrics, Mapping):
                return metrics
    return {}


def _by_quantity(said: object) -> tuple[tuple[str, float], ...]:
    weight = _numbers(said)
    return tuple((name, weight[name]) for name in ("latency", "capacity", "cost") if name in weight)


def _numbers(said: object) -> dict[str, float]:
    """The finite numbers of a mapping out of a record."""
    known = said if isinstance(said, Mapping) else {}
    return {str(k): float(v) for k, v in known.items() if isinstance(v, int | float) and math.isfinite(v)}


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
