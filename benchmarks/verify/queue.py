"""A stochastic serving engine with known truth: what the verification's benchmarks and tests measure.

Not a constant with normal noise. Requests of a window queue for ``slots`` slots (so latencies of neighbours are
correlated), lengths and service times have heavy tails, single requests stall, every launch has its own speed, and the
machine drifts over time (an AR(1) walk that all launches share). What differs between configurations is ``speed``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Step

PRICE_USD_PER_HOUR = 2.5


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of log speed: between launches, of the drift (with its correlation from one launch to the
    next); the share of requests that stall and how long."""

    launch: float = 0.02
    drift: float = 0.02
    memory: float = 0.8
    stalls: float = 0.01
    stall_s: float = 2.0


def window(seed: int, *, requests: int = 240, rate: float = 4.0, name: str = "") -> Trace:
    """A window of bursty arrivals (Gamma gaps, shape 0.5) and heavy-tailed lengths; windows differ by more than
    chance would make them: each has its own rate (10 %) and its own mean output length (10 %)."""
    rng = np.random.default_rng(seed)
    own_rate = rate * math.exp(rng.normal(0, 0.1))
    gaps = rng.gamma(0.5, 1 / (0.5 * own_rate), requests)
    inputs = np.maximum(rng.lognormal(6.0, 1.0, requests), 1).astype(np.int64)
    outputs = np.maximum(rng.lognormal(5.0 + rng.normal(0, 0.1), 0.7, requests), 1).astype(np.int64)
    nothing = np.zeros(requests + 1, dtype=np.int64)
    return Trace(name or f"window-{seed}", np.cumsum(gaps), inputs, outputs, 0, np.zeros(0, np.int64), nothing)


@dataclass(slots=True)
class Machine:
    """One machine on which launches follow each other. ``speeds`` maps the value of the parameter ``variant`` to a
    speed (1.1: 10 % faster); every launch advances the drift."""

    speeds: Mapping[str, float]
    objective: Objective
    seed: int
    noise: Noise = Noise()
    slots: int = 16
    launches: int = 0
    labels: list[str] = field(default_factory=list)
    _drift: float = 0.0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._drift = self._rng.normal(0, self.noise.drift)

    @contextmanager
    def launch(self, config: ServingConfig, label: str) -> Iterator[Running]:
        """What :func:`tuner.verify.verification.verify` calls."""
        self.launches += 1
        self.labels.append(label)
        n = self.noise
        self._drift = n.memory * self._drift + self._rng.normal(0, n.drift * math.sqrt(1 - n.memory**2))
        speed = self.speed(config) * math.exp(self._drift + self._rng.normal(0, n.launch))
        yield Running(self, config, speed)

    def speed(self, config: ServingConfig) -> float:
        return self.speeds[str(config.params["variant"])]

    __slots__ = ("speeds", "objective", "seed", "noise", "slots", "launches", "labels", "_drift", "_rng")


@dataclass(slots=True)
class Running:
    """One launched server."""

    machine: Machine
    config: ServingConfig
    speed: float

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        return replay(trace, load, self.speed, self.machine, window)


def replay(trace: Trace, load: float, speed: float, machine: Machine, window: str) -> Step:
    """First come, first served on ``slots`` slots: prefill 8,000 tokens/s, 20 ms a token, both over ``speed``."""
    rng, noise, n = machine._rng, machine.noise, len(trace)
    arrival = trace.arrival_s / load
    prefill = trace.input_tokens / 8000 * rng.lognormal(-0.045, 0.3, n) / speed
    per_token = 0.02 * rng.lognormal(-0.02, 0.2, n) / speed
    stall = np.where(rng.random(n) < noise.stalls, rng.pareto(2.5, n) * noise.stall_s, 0.0)
    service = prefill + per_token * trace.output_tokens + stall
    free = [0.0] * machine.slots
    start = np.empty(n)
    for i in range(n):
        begin = max(arrival[i], free[0])
        start[i] = begin
        heapq.heapreplace(free, begin + service[i])
    ttft = start + prefill - arrival
    end = start + service
    seconds = float(end.max())
    tokens = float(trace.output_tokens.sum())
    metrics = {
        "ttft_p99_s": float(np.quantile(ttft, 0.99)),
        "tpot_p99_s": float(np.quantile((end - start - prefill) / trace.output_tokens, 0.99)),
        "output_tokens_per_s": tokens / seconds,
        "error_rate": 0.0,
    }
    good = _within(machine.objective, ttft)
    goodput = float(trace.output_tokens[good].sum()) / seconds
    metrics["cost_usd_per_mtok_output"] = PRICE_USD_PER_HOUR / 3600 / goodput * 1e6 if goodput > 0 else math.inf
    misses = tuple(text for slo in machine.objective.slos if (text := slo.miss(metrics)))
    return Step(load, window, metrics, intervals={}, slo_misses=misses)


def _within(objective: Objective, ttft: np.ndarray) -> np.ndarray:
    limit = next((slo.limit for slo in objective.slos if slo.latency == "ttft"), math.inf)
    return ttft <= limit
