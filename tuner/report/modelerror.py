"""How wrong the analytic model was: what it predicted for every measured step beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from tuner.pareto.front import COST, trusted_steps
from tuner.report.summary import Summary, label


@dataclass(frozen=True, slots=True)
class Error:
    """Of one metric: ``typical`` is the median relative error (0.2: off by 20 %), ``bias`` the median of measured over
    predicted (1.1: 10 % higher than predicted), ``pairs`` are (predicted, measured, trial, load)."""

    metric: str
    name: str
    typical: float
    bias: float
    pairs: tuple[tuple[float, float, int, float], ...]


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


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
