"""Arrival processes: Poisson, Gamma bursts, diurnal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuner.errors import UsageError

DAY_S = 86400.0
_FORMS = "poisson:RATE, gamma:RATE:CV or diurnal:RATE:SWING[:PERIOD_S[:CV]] (RATE in requests/s)"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A renewal process with Gamma gaps, its rate swinging over ``period_s`` where ``swing`` is not 0.

    ``rate_per_s`` is the mean rate. ``cv`` is the coefficient of variation of the gaps at constant rate: 1 is Poisson,
    above 1 is bursty (Gamma shape 1 / cv**2), 0 is evenly spaced. The rate at t is
    ``rate_per_s * (1 - swing * cos(2 pi t / period_s))``, 0 <= swing <= 1: it starts in the valley.
    """

    rate_per_s: float
    cv: float = 1.0
    swing: float = 0.0
    period_s: float = DAY_S

    def __post_init__(self) -> None:
        checks = (
            (1e-9 <= self.rate_per_s <= 1e9, f"rate {self.rate_per_s:g}/s is not between 1e-9 and 1e9"),
            (0 <= self.cv <= 1000, f"CV {self.cv:g} is not between 0 and 1000"),
            (0 <= self.swing <= 1, f"swing {self.swing:g} is not between 0 and 1"),
            (1e-3 <= self.period_s <= 1e11, f"period {self.period_s:g} s is not between 0.001 and 1e11"),
        )
        for holds, message in checks:
            if not holds:
                raise UsageError(message, fix=f"Arrivals are written {_FORMS}")

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """``poisson:4``, ``gamma:4:2.5``, ``diurnal:4:0.8``, ``diurnal:4:0.8:3600:1.2``; UsageError otherwise."""
        kind, *numbers = text.split(":")
        try:
            given = [float(number) for number in numbers]
        except ValueError:
            given = []
        if kind == "poisson" and len(given) == 1:
            return cls(given[0])
        if kind == "gamma" and len(given) == 2:
            return cls(given[0], cv=given[1])
        if kind == "diurnal" and 2 <= len(given) <= 4:
            rate, swing, period_s, cv = (*given, *(DAY_S, 1.0)[len(given) - 2 :])
            return cls(rate, cv=cv, swing=swing, period_s=period_s)
        raise UsageError(f"arrivals {text!r} are not understood", fix=f"Write {_FORMS}")

    def times(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) float64 arrival times in seconds, never decreasing, the first at 0."""
        if n == 0:
            return np.empty(0)
        mean = np.ones(n - 1)
        gaps = rng.gamma(self.cv**-2, self.cv**2, n - 1) if self.cv > 1e-3 else mean
        # the process at rate 1, then the time at which the integrated rate has reached as much
        work = np.concatenate([[0.0], np.cumsum(gaps)]) / self.rate_per_s
        return self._until(work) if self.swing else work

    def _until(self, work: np.ndarray) -> np.ndarray:
        """Solves t - swing * P / 2 pi * sin(2 pi t / P) = work for t, by bisection (the left side never decreases)."""
        half_width = self.swing * self.period_s / math.tau
        low, high = work - half_width, work + half_width
        for _ in range(60):
            middle = (low + high) / 2
            early = middle - half_width * np.sin(math.tau * middle / self.period_s) < work
            low, high = np.where(early, middle, low), np.where(early, high, middle)
        times = np.maximum.accumulate((low + high) / 2)  # rounding may swap neighbours that are equal
        return times - times[0]
