"""A stochastic serving engine with known truth: what the verification's benchmarks and tests measure.

Not a constant with normal noise. Requests of a window queue for ``slots`` slots (so latencies of neighbours are
correlated), lengths and service times have heavy tails, single requests stall, every launch has its own speed, and the
machine drifts over time (an AR(1) walk that all launches share). What differs between configurations is ``speed``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tuner.load.trace import Trace
from tuner.pareto.front import COST
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


def window(seed: int, *, requests: int = 300, rate: float = 4.0, name: str = "") -> Trace:
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
    """One machine on which launches follow each other. ``speed`` says how fast a configuration is (1.1: 10 % faster);
    every launch advances the drift. ``labels`` are the launches so far."""

    speed: Callable[[ServingConfig], float]
    objective: Objective
    seed: int
    noise: Noise = Noise()
    slots: int = 16
    labels: list[str] = field(default_factory=list)
    rng: np.random.Generator = field(init=False)
    drift: float = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.drift = self.rng.normal(0, self.noise.drift)

    @contextmanager
    def launch(self, config: ServingConfig, label: str) -> Iterator[Running]:
        """What :func:`tuner.verify.verification.verify` calls."""
        self.labels.append(label)
        n = self.noise
        self.drift = n.memory * self.drift + self.rng.normal(0, n.drift * math.sqrt(1 - n.memory**2))
        yield Running(self, self.speed(config) * math.exp(self.drift + self.rng.normal(0, n.launch)))


@dataclass(frozen=True, slots=True)
class Running:
    """One launched server."""

    machine: Machine
    speed: float

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        return replay(trace, load, self.speed, self.machine, window)


def replay(trace: Trace, load: float, speed: float, machine: Machine, window: str) -> Step:
    """First come, first served on ``slots`` slots: prefill 8,000 tokens/s, 20 ms a token, both over ``speed``."""
    rng, noise, n = machine.rng, machine.noise, len(trace)
    arrival = trace.arrival_s / load
    prefill = trace.input_tokens / 8000 * rng.lognormal(-0.045, 0.3, n) / speed
    per_token = 0.02 * rng.lognormal(-0.02, 0.2, n) / speed
    stall = np.where(rng.random(n) < noise.stalls, rng.pareto(2.5, n) * noise.stall_s, 0.0)
    service = prefill + per_token * trace.output_tokens + stall
    free, begun = [0.0] * machine.slots, []
    for came, takes in zip(arrival.tolist(), service.tolist(), strict=True):  # floats: numpy's scalars are slow
        begun.append(max(came, free[0]))
        heapq.heapreplace(free, begun[-1] + takes)
    start = np.array(begun)
    ttft, end = start + prefill - arrival, start + service
    limit = next((slo.limit for slo in machine.objective.slos if slo.latency == "ttft"), math.inf)
    tokens = np.where(ttft <= limit, trace.output_tokens, 0)
    raw, seconds = _per_block(arrival + ttft, end, trace.output_tokens)
    late = bool((ttft > limit).any())
    earned = _per_block(arrival + ttft, end, tokens)[0] if late else raw
    metrics = {
        "ttft_p99_s": float(np.quantile(ttft, 0.99)),
        "tpot_p99_s": float(np.quantile(per_token, 0.99)),
        "error_rate": 0.0,
        "output_tokens_per_s": float(raw.sum()) / seconds,
        COST: _cost(seconds, float(earned.sum())),
    }
    misses = tuple(text for slo in machine.objective.slos if (text := slo.miss(metrics)))
    return Step(load, window, metrics, {COST: _within_launch(earned, seconds, rng)}, misses)


def _per_block(first: np.ndarray, end: np.ndarray, tokens: np.ndarray, blocks: int = 12) -> tuple[np.ndarray, float]:
    """Tokens that left the server in each of ``blocks`` equal stretches of time, (blocks,), and how long they are
    together: until 85 % of the requests have ended, so that the emptying of the server is not counted."""
    seconds = float(np.quantile(end, 0.85))
    edges = np.linspace(0.0, seconds, blocks + 1)
    inside = np.clip(edges[None, :] - first[:, None], 0.0, (end - first)[:, None])
    return (np.diff(inside, axis=1) * (tokens / np.maximum(end - first, 1e-9))[:, None]).sum(axis=0), seconds


def _cost(seconds: float, tokens: float) -> float:
    return PRICE_USD_PER_HOUR / 3600 * seconds / tokens * 1e6 if tokens > 0 else math.inf


def _within_launch(earned: np.ndarray, seconds: float, rng: np.random.Generator) -> tuple[float, float]:
    """The usual interval of a single measurement: the percentile bootstrap over its blocks of time."""
    picks = rng.integers(0, len(earned), (400, len(earned)))
    low, high = np.quantile(earned[picks].sum(axis=1), (0.025, 0.975))
    return _cost(seconds, float(high)), _cost(seconds, float(low))
