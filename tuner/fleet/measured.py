"""What a study's folder says about one configuration: load steps as points of a curve, tokens, start-up, arrivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tuner.fleet.curve import Limit, Point
from tuner.load.columns import parquet
from tuner.pareto.front import trusted_steps
from tuner.space.config import ServingConfig
from tuner.study.outcome import Measured, Step
from tuner.study.store import TrialRecord

OFFERED, ACHIEVED = "offered_requests_per_s", "requests_per_s"
POWER, ENERGY = "system_gpu_power_mean_w", "system_gpu_energy_j_per_output_token"


def steps(trials: Iterable[TrialRecord]) -> list[Step]:
    """Believable steps with a rate, by load."""
    steps = [s for _, s in trusted_steps(trials) if s.metrics.get(OFFERED, 0) > 0]
    return sorted(steps, key=lambda s: s.load)


def kept_up(step: Step) -> float:
    """Requests per second that the server kept up with: those offered, or those it answered where even the upper limit
    of that rate is lower (it was falling behind)."""
    offered = step.metrics[OFFERED]
    high = step.intervals.get(ACHIEVED, (0.0, math.inf))[1]
    return offered if high >= offered else step.metrics.get(ACHIEVED, offered)


def point(step: Step, limits: Sequence[Limit]) -> Point | None:
    """What a step says about the replica; None where it was cut short, or where so many requests never ended that a
    latency of ``limits`` is not known."""
    mean = step.metrics.get("e2e_mean_s", step.metrics.get("e2e_p50_s", math.nan))
    latencies = [step.metrics.get(x.slo.key, math.nan) for x in limits if x.slo.latency]
    if step.stopped_early or not (0 < mean < math.inf) or not all(map(math.isfinite, latencies)):
        return None
    rate = kept_up(step)
    return Point(rate, rate * mean, step.metrics, _watts(step.metrics))


def _watts(metrics: Mapping[str, float]) -> float | None:
    """The mean power of all GPUs of the replica; where only energy is told, by that."""
    energy, tokens = metrics.get(ENERGY, math.nan), metrics.get("output_tokens_per_s", math.nan)
    watts = metrics.get(POWER, energy * tokens)
    return watts if watts > 0 else None


def start_s(trials: Sequence[TrialRecord], config: ServingConfig) -> float:
    """The longest start-up of this configuration; of any configuration that served, where it has none of its own."""
    boots = [t.outcome.boot.total_s for t in trials if t.config.hash == config.hash and t.outcome.boot.total_s > 0]
    other = [t.outcome.boot.total_s for t in trials if isinstance(t.outcome, Measured)]
    return max(boots or other, default=0.0)


def cv(records: Path | None) -> float:
    """Standard deviation over mean of the gaps between intended arrivals; NaN where there are no such records."""
    if records is None or not records.exists():
        return math.nan
    with parquet(records) as file:
        if "intended_ns" not in file.schema_arrow.names:
            return math.nan
        gaps = np.diff(np.sort(file.read(columns=["intended_ns"])["intended_ns"].to_numpy()))
    return float(gaps.std() / gaps.mean()) if len(gaps) > 10 and gaps.mean() > 0 else math.nan
