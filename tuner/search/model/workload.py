"""A trace, digested once: lengths, arrival times and how far back each shared prefix was last seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.load.trace import Trace, with_earlier

_REQUESTS = 512  # enough for a p99 of the waiting times; more would cost time in every prediction
_DISTANCES = np.geomspace(1e3, 1e9, 61)  # tokens; bucket edges of the reuse distances


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """At most a few hundred requests in order of arrival, columns of equal length n: ``arrival_s`` from 0, ``inputs``
    and ``outputs`` in tokens (float64). ``reused`` (n, buckets) is how many leading prompt tokens a prefix cache of
    the bucket's size would have held. ``span_s`` is the time the n requests take to arrive at load 1."""

    arrival_s: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    reused: np.ndarray | None
    span_s: float

    @classmethod
    def of(cls, trace: Trace, requests: int = _REQUESTS) -> Workload:
        """Digests ``trace``. A longer trace is cut to its contiguous middle, stretched to the whole trace's rate: a
        thinned trace would lose its bursts. Raises ``ValueError`` for an empty trace."""
        n = len(trace)
        if n == 0:
            raise ValueError("a model needs a trace with at least one request")
        rate = (n - 1) / max(float(trace.arrival_s[-1] - trace.arrival_s[0]), 1e-9) if n > 1 else 1.0
        first = max((n - requests) // 2, 0)
        part = slice(first, first + requests)
        arrival = np.asarray(trace.arrival_s[part], float)
        arrival = arrival - arrival[0]
        if n > requests and arrival[-1] > 0:
            arrival = arrival * ((len(arrival) - 1) / rate / arrival[-1])
        count = len(arrival)
        span = float(arrival[-1]) * count / max(count - 1, 1) if count > 1 else 1.0
        reused = _reuse(with_earlier(trace))
        reused = reused[-n:] if reused is not None else None
        return cls(
            arrival,
            np.asarray(trace.input_tokens[part], float),
            np.asarray(trace.output_tokens[part], float),
            reused[part] if reused is not None else None,
            max(span, 1e-9),
        )

    def cached(self, capacity_tokens: float, block_tokens: int) -> np.ndarray:
        """Leading prompt tokens that a prefix cache of ``capacity_tokens`` holds, per request; whole blocks of
        ``block_tokens``, and never the last token (the engine has to compute one)."""
        if self.reused is None:
            return np.zeros_like(self.inputs)
        bucket = int(np.searchsorted(_DISTANCES, capacity_tokens)) - 1
        if bucket < 0:
            return np.zeros_like(self.inputs)
        hit = np.minimum(self.reused[:, bucket], self.inputs - 1)
        return np.floor(hit / block_tokens) * block_tokens


def _reuse(trace: Trace) -> np.ndarray | None:
    """(n, buckets): leading tokens whose blocks were all used before, with at most ``_DISTANCES[b]`` tokens of blocks
    used since, themselves included: the LRU stack distance of Mattson et al. 1970, counted by the request."""
    if not trace.block_tokens or len(trace.block_ids) == 0:
        return None
    last: dict[int, int] = {}  # which request used a block last
    held, result = np.zeros(len(trace)), np.zeros((len(trace), len(_DISTANCES)))  # tokens that each used last
    for i in range(len(trace)):
        blocks = trace.block_ids[trace.block_offsets[i] : trace.block_offsets[i + 1]].tolist()
        oldest, fits = i, 0
        for position, block in enumerate(blocks):
            seen = last.get(block)
            if seen is None:
                break
            if seen < oldest:
                oldest, fits = seen, int(np.searchsorted(_DISTANCES, held[seen:i].sum()))
            result[i, fits:] = (position + 1) * trace.block_tokens
        for block in blocks:
            if (seen := last.get(block)) is not None:
                held[seen] -= trace.block_tokens
            last[block] = i
            held[i] += trace.block_tokens
        result[i] = np.minimum(result[i], float(trace.input_tokens[i]))
        held[i] += float(trace.output_tokens[i])
    return result
