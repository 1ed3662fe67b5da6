"""A trace: requests with arrival time, input length, output length and, where known, the prefix they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    None. ``lasts_s`` is when the next request of what it was cut from comes, or where it was cut before that (NaN: none
    is known to follow; 0: it ends with its last request). ``earlier`` is what came before it there, as far as a replay
    is to fill the server's prefix cache with it (None: not at all).
    """

    name: str
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_tokens: int
    block_ids: np.ndarray
    block_offsets: np.ndarray
    texts: tuple[str, ...] | None = None
    lasts_s: float = math.nan
    earlier: Trace | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def until_s(self) -> float:
        """When its traffic ends: ``lasts_s``; where none is known to follow, a mean gap after the last arrival."""
        if not math.isnan(self.lasts_s):
            return self.lasts_s
        last_s = float(self.arrival_s[-1])
        return last_s + (last_s - float(self.arrival_s[0])) / max(len(self) - 1, 1)


def with_earlier(trace: Trace) -> Trace:
    """``trace.earlier`` and ``trace`` as one; ``trace`` itself where there is none."""
    before = trace.earlier
    if before is None:
        return trace
    columns = ("input_tokens", "output_tokens", "block_ids")
    offsets = (before.block_offsets, before.block_offsets[-1] + trace.block_offsets[1:])
    return replace(
        trace,
        arrival_s=np.concatenate([before.arrival_s, before.until_s + trace.arrival_s]),
        **{name: np.concatenate([getattr(before, name), getattr(trace, name)]) for name in columns},
        block_offsets=np.concatenate(offsets),
        texts=None if before.texts is None or trace.texts is None else before.texts + trace.texts,
        lasts_s=before.until_s + trace.lasts_s,
        earlier=None,
    )


def with_lengths(trace: Trace, input_tokens: np.ndarray, output_tokens: np.ndarray, block_tokens: int = 0) -> Trace:
    """``trace`` with other lengths (and, where given, other blocks). A shorter prompt keeps its leading blocks only.

    The texts stay where every prompt keeps its length, else none does: no text can be made to have a number of tokens.
    """
    width, offsets, ids = block_tokens or trace.block_tokens, trace.block_offsets, trace.block_ids
    if width:
        counts = np.minimum(np.diff(offsets), -(-input_tokens // width))
        kept = np.concatenate([[0], np.cumsum(counts)])
        ids = ids[np.repeat(offsets[:-1] - kept[:-1], counts) + np.arange(kept[-1])]
        offsets = kept
    return replace(
        trace,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        block_tokens=width,
        block_ids=ids,
        block_offsets=offsets,
        texts=trace.texts if np.array_equal(input_tokens, trace.input_tokens) else None,
    )


def texts_lost(before: Trace, after: Trace) -> list[str]:
    """In words that the texts are gone, where :func:`with_lengths` had to drop them."""
    if before.texts is None or after.texts is not None:
        return []
    changed = int(np.count_nonzero(before.input_tokens != after.input_tokens))
    return [
        f"{changed} of {len(before)} prompts got another length, which no text can be given: no text is kept, prompts "
        "are of random tokens"
    ]
