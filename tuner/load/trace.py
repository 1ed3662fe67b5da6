"""A trace: requests with arrival time, input length, output length and, where known, the prefix they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Columns of equal length n, in order of arrival.

    ``arrival_s`` (n,) float64, seconds from the trace's own zero, never decreasing; ``input_tokens`` and
    ``output_tokens`` (n,) int64, at least 1. Prefixes: request i's blocks are
    ``block_ids[block_offsets[i]:block_offsets[i + 1]]``, one id per ``block_tokens`` tokens of prompt; equal leading
    ids mean a shared prefix; the ids may end before the prompt does (never after), and the rest of the prompt is then
    the request's own. Ids are not negative. No prefixes are known where ``block_tokens`` is 0 (then ``block_ids`` is
    empty and ``block_offsets`` all zero, shape (n + 1,)). ``texts`` holds the prompts where the file had them, else
    None.
    """

    name: str
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_tokens: int
    block_ids: np.ndarray
    block_offsets: np.ndarray
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)
