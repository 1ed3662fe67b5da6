"""What a reader hands over, and how it becomes a Trace."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import numpy as np

from tuner.load.formats.report import Tally
from tuner.load.trace import Trace


@dataclass(slots=True)
class Parts:
    """A file's requests in file order. ``arrival_s`` (n,) seconds on any clock, or None where the file has none;
    ``block_ids`` and ``block_counts`` as lists of all ids and of ids per request; ``lasts_s`` as in a trace."""

    arrival_s: np.ndarray | None
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_tokens: int = 0
    block_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    block_counts: np.ndarray | None = None
    texts: list[str] | None = None
    lasts_s: float = math.nan


class BlockIds:
    """Collects block ids row by row. Ids that are strings (hex digests) are numbered in order of appearance."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._counts = array("q")
        self._numbers: dict[str, int] = {}

    def append(self, ids: list[int] | list[str]) -> None:
        numbers = [self._numbers.setdefault(i, len(self._numbers)) if isinstance(i, str) else i for i in ids]
        self._ids.extend(numbers)
        self._counts.append(len(numbers))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts per request), int64."""
        return np.array(self._ids, dtype=np.int64), np.array(self._counts, dtype=np.int64)


def trace_of(parts: Parts, arrival_s: np.ndarray, name: str, tally: Tally) -> Trace:
    """The trace in order of arrival, the first request at 0; requests at the same time keep the file's order."""
    n = len(arrival_s)
    offsets = np.zeros(n + 1, dtype=np.int64)
    ids, block_tokens = parts.block_ids, parts.block_tokens
    if len(ids) and parts.block_counts is not None:
        np.cumsum(parts.block_counts, out=offsets[1:])
    else:
        ids, block_tokens = np.empty(0, dtype=np.int64), 0
    tokens_in, tokens_out, texts = parts.input_tokens, parts.output_tokens, parts.texts
    late = int(np.count_nonzero(np.diff(arrival_s) < 0))
    if late:
        tally.note("earlier than the line before; sorted by arrival", late)
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, tokens_in, tokens_out = arrival_s[order], tokens_in[order], tokens_out[order]
        texts = [texts[i] for i in order] if texts is not None else None
        if len(ids):
            counts = np.diff(offsets)[order]
            moved = np.zeros(n + 1, dtype=np.int64)
            np.cumsum(counts, out=moved[1:])
            ids = ids[np.repeat(offsets[:-1][order] - moved[:-1], counts) + np.arange(len(ids))]
            offsets = moved
    return Trace(
        name=name,
        arrival_s=arrival_s - arrival_s[0] if n else arrival_s,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        block_tokens=block_tokens,
        block_ids=ids,
        block_offsets=offsets,
        texts=None if texts is None else tuple(texts),
        lasts_s=parts.lasts_s - float(arrival_s[0]) if n else parts.lasts_s,
    )
