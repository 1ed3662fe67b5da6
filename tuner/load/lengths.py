"""Input and output lengths: drawn from a trace, from lognormals fitted to one, or from published quantiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tuner.errors import UsageError
from tuner.load.trace import Trace


class Lengths(Protocol):
    """Draws pairs of lengths."""

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 input and output tokens, each at least 1."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class EmpiricalLengths:
    """The (input, output) pairs of a trace, drawn with replacement: quantiles and correlation are the trace's own."""

    input_tokens: np.ndarray
    output_tokens: np.ndarray

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(0, len(self.input_tokens), n)
        return self.input_tokens[rows], self.output_tokens[rows]


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Lognormal input and output with the mean and standard deviation of the logarithms, their ``correlation``, and the
    largest value each may take."""

    log_mean: tuple[float, float]
    log_sd: tuple[float, float]
    correlation: float
    most: tuple[int, int]

    @classmethod
    def fit(cls, trace: Trace) -> LognormalLengths:
        """The maximum-likelihood lognormals of a trace's lengths."""
        logs = np.log(np.stack([trace.input_tokens, trace.output_tokens]).astype(np.float64))
        mean, sd = logs.mean(axis=1), logs.std(axis=1)
        varies = bool((sd > 0).all())
        together = float(((logs[0] - mean[0]) * (logs[1] - mean[1])).mean() / (sd[0] * sd[1])) if varies else 0.0
        most = int(trace.input_tokens.max()), int(trace.output_tokens.max())
        return cls((float(mean[0]), float(mean[1])), (float(sd[0]), float(sd[1])), min(max(together, -1.0), 1.0), most)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        first, other = rng.standard_normal((2, n))
        second = self.correlation * first + np.sqrt(1 - self.correlation**2) * other
        tokens = [
            np.clip(np.rint(np.exp(mean + sd * z)), 1, most).astype(np.int64)
            for mean, sd, most, z in zip(self.log_mean, self.log_sd, self.most, (first, second), strict=True)
        ]
        return tokens[0], tokens[1]


@dataclass(frozen=True, slots=True)
class QuantileLengths:
    """Lengths from published quantiles of ``sample`` requests, input and output independent.

    ``levels`` are rising probabilities below 1, and the quantiles have one value more: the maximum, which stands at the
    expected level of the largest of ``sample``. Between two quantiles the logarithm is linear in the normal score (a
    piece of a lognormal); below the first the first piece goes on, down to 1; nothing exceeds the maximum.
    """

    levels: tuple[float, ...]
    input_quantiles: tuple[int, ...]
    output_quantiles: tuple[int, ...]
    sample: int

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from scipy.special import ndtri

        scores = ndtri([*self.levels, 1 - 1 / (self.sample + 1)])
        tokens = []
        for quantiles in (self.input_quantiles, self.output_quantiles):
            logs, z = np.log(quantiles), rng.standard_normal(n)
            below = logs[0] + (logs[1] - logs[0]) / (scores[1] - scores[0]) * (z - scores[0])
            log = np.where(z < scores[0], below, np.interp(z, scores, logs))
            tokens.append(np.clip(np.rint(np.exp(log)), 1, quantiles[-1]).astype(np.int64))
        return tokens[0], tokens[1]


def fit(trace: Trace, how: str = "empirical") -> Lengths:
    """Lengths fitted to ``trace``: ``empirical`` or ``lognormal``."""
    if how == "lognormal":
        return LognormalLengths.fit(trace)
    if how == "empirical":
        return EmpiricalLengths(trace.input_tokens, trace.output_tokens)
    raise UsageError(f"lengths cannot be fitted as {how!r}", fix="Use empirical or lognormal")
