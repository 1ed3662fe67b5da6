"""Seeded disturbance: no two launches are equally fast, no two steps take equally long, and sometimes one stalls."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of logarithms: ``launch`` (one factor per launch: clocks, placement), ``step`` (every step);
    ``stalls_per_s`` is how often a step is held up (allocator, garbage collection) for ``stall_s`` on average."""

    launch: float = 0.015
    step: float = 0.02
    stalls_per_s: float = 0.02
    stall_s: float = 0.05


QUIET = Noise(0.0, 0.0, 0.0, 0.0)


class Disturbance:
    """A launch's own sequence of factors. The same ``seed`` gives the same sequence."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise = noise
        self._rng = random.Random(f"disturbance-{seed}")
        self.launch_factor = math.exp(self._rng.gauss(0, noise.launch))

    def step(self, seconds: float) -> float:
        """How long a step of ``seconds`` takes this time."""
        rng, noise = self._rng, self.noise
        took = seconds * self.launch_factor
        if noise.step:
            took *= math.exp(rng.gauss(0, noise.step))
        if noise.stalls_per_s and rng.random() < noise.stalls_per_s * seconds:
            took += rng.expovariate(1 / noise.stall_s)
        return took
