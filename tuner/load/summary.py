"""A trace in numbers: rate, burstiness, lengths, prefix sharing, and histograms to draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.load.sharing import Sharing, sharing
from tuner.load.trace import Trace


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Nearest-rank quantiles (the smallest value that p % do not exceed), maximum, mean and total, in tokens."""

    p50: int
    p90: int
    p99: int
    max: int
    mean: float
    total: int


@dataclass(frozen=True, slots=True)
class Summary:
    """``duration_s`` from the first to the last arrival, ``lasts_s`` to the trace's end where that is known;
    ``rate_per_s`` is :func:`rate_per_s` and ``cv`` the population standard deviation of the gaps over their mean: both
    None where no time passes."""

    requests: int
    duration_s: float
    lasts_s: float | None
    rate_per_s: float | None
    cv: float | None
    longest_gap_s: float
    input: LengthSummary
    output: LengthSummary
    block_tokens: int
    sharing: Sharing
    texts: bool


def summarise(trace: Trace) -> Summary:
    """The summary of a trace of at least one request."""
    gaps = np.diff(trace.arrival_s)
    duration_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    moving = duration_s > 0
    return Summary(
        requests=len(trace),
        duration_s=duration_s,
        lasts_s=trace.lasts_s if trace.lasts_s > 0 else None,
        rate_per_s=rate_per_s(trace),
        cv=float(gaps.std() / gaps.mean()) if moving else None,
        longest_gap_s=float(gaps.max()) if len(gaps) else 0.0,
        input=_lengths(trace.input_tokens),
        output=_lengths(trace.output_tokens),
        block_tokens=trace.block_tokens,
        sharing=sharing(trace),
        texts=trace.texts is not None,
    )


def rate_per_s(trace: Trace) -> float | None:
    """Requests over the time that the trace lasts; where its end is not known, gaps over the time that they take."""
    if trace.lasts_s > 0:
        return len(trace) / trace.lasts_s
    duration_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    return (len(trace) - 1) / duration_s if duration_s > 0 else None


def nearest_rank(ordered: np.ndarray, percent: int) -> int:
    """The nearest-rank quantile of a sorted, non-empty array; whole numbers only, so no rounding decides it."""
    return int(ordered[max(0, -(-percent * len(ordered) // 100) - 1)])


def rate_bins(trace: Trace, bins: int) -> tuple[np.ndarray, float]:
    """((bins,) requests per second over equal parts of the trace's duration, seconds per part). One part of 1 s where
    no time passes."""
    duration_s = float(trace.arrival_s[-1])
    if not duration_s > 0:
        return np.array([float(len(trace))]), 1.0
    width_s = duration_s / bins
    at = np.minimum((trace.arrival_s / width_s).astype(np.int64), bins - 1)
    return np.bincount(at, minlength=bins) / width_s, width_s


def doubling_bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, requests) for each power of two between the shortest and the longest length."""
    exponent = np.frexp(lengths.astype(np.float64))[1] - 1
    counts = np.bincount(exponent)
    return [(2**k, 2 ** (k + 1) - 1, int(counts[k])) for k in range(int(exponent.min()), len(counts))]


def _lengths(tokens: np.ndarray) -> LengthSummary:
    ordered = np.sort(tokens)
    p50, p90, p99 = (nearest_rank(ordered, p) for p in (50, 90, 99))
    return LengthSummary(p50, p90, p99, int(ordered[-1]), float(tokens.mean()), int(tokens.sum()))
