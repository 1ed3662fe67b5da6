"""How much of a trace's prompts an unbounded prefix cache would already hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tuner.load.prompts import mix64
from tuner.load.trace import Trace, with_earlier
from tuner.load.windows import cut

SHARED = 0.05  # share of a trace's prompt tokens that earlier prompts begin with too: below, caches change little
NEAR = 0.8  # of that share
FILLS_S = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # of the trace before a window
PART = 4  # at most such a part of the trace, of its time and of its requests, comes before the first window


@dataclass(frozen=True, slots=True)
class Sharing:
    """``blocks`` with a prefix id and how many of them were ``seen_blocks`` before (same block after the same prefix
    in an earlier request); ``shared_tokens`` of ``input_tokens`` prompt tokens lie in those."""

    blocks: int
    seen_blocks: int
    input_tokens: int
    shared_tokens: int

    @property
    def block_share(self) -> float:
        return self.seen_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_share(self) -> float:
        return self.shared_tokens / self.input_tokens if self.input_tokens else 0.0


def sharing(trace: Trace) -> Sharing:
    """The sharing of a whole trace, every request meeting a cache that holds all earlier ones."""
    tokens, seen = _shared(trace)
    return Sharing(len(trace.block_ids), int(seen.sum()), int(trace.input_tokens.sum()), int(tokens.sum()))


def shared_tokens(trace: Trace, *, engine_block_tokens: int = 1) -> np.ndarray:
    """(n,) int64: of each prompt, the leading tokens that an earlier request's prompt also begins with (one of
    ``trace.earlier``, too).

    With ``engine_block_tokens`` (vLLM: 16) what an engine that caches whole blocks can find: whole blocks only, and
    never the whole prompt, since the last token must be computed to get an answer.
    """
    tokens = _shared(with_earlier(trace))[0][-len(trace) :]
    if engine_block_tokens > 1:
        most = np.minimum(tokens, np.maximum(trace.input_tokens - 1, 0))
        tokens = most // engine_block_tokens * engine_block_tokens
    return tokens


def to_fill_s(trace: Trace, warmup_s: float) -> float:
    """How many seconds of ``trace`` before a window hold what its prompts begin with: the shortest of :data:`FILLS_S`
    in which :data:`NEAR` of the shared tokens were sent before, else the longest that leaves enough of the trace; 0
    where little is shared, or ``warmup_s`` is long enough."""
    _, tokens, age_s = _blocks(trace)
    usual = tokens.sum()

    def enough(seconds: float) -> bool:
        return tokens[age_s <= seconds].sum() >= NEAR * usual

    if usual < SHARED * trace.input_tokens.sum() or enough(warmup_s):
        return 0.0
    most_s = min(trace.arrival_s[-1] / PART, trace.arrival_s[len(trace) // PART])
    fills = [float(seconds) for seconds in FILLS_S if seconds <= most_s]
    return next(filter(enough, fills), fills[-1] if fills else 0.0)


def recent(trace: Trace, tokens: float) -> Trace | None:
    """The last requests of ``trace`` whose prompts and responses fit into a cache of so many tokens (None: not one),
    what prompts share counted once: what lies further back, a cache that forgets what was used longest ago has lost."""
    counts = np.diff(trace.block_offsets)[::-1]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = trace.block_ids[np.repeat(trace.block_offsets[:-1][::-1] - offsets[:-1], counts) + np.arange(offsets[-1])]
    backwards = replace(trace, input_tokens=trace.input_tokens[::-1], block_ids=ids, block_offsets=offsets)
    new = backwards.input_tokens - _shared(backwards)[0] + trace.output_tokens[::-1]
    kept = int(np.count_nonzero(np.cumsum(new) <= tokens))
    return cut(trace, len(trace) - kept, len(trace)) if kept else None


def _shared(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """((n,) shared leading tokens per request, (blocks,) bool: seen before)."""
    row, tokens, age_s = _blocks(trace)
    return np.bincount(row, weights=tokens, minlength=len(trace)).astype(np.int64), np.isfinite(age_s)


def _blocks(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each block, three times (blocks,): its request, its tokens that an earlier request had after the same prefix,
    and how many seconds before that was the last time (infinity: never)."""
    n, total, width = len(trace), len(trace.block_ids), trace.block_tokens
    if total == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)
    counts = np.diff(trace.block_offsets)
    row = np.repeat(np.arange(n), counts)
    position = np.arange(total) - np.repeat(trace.block_offsets[:-1], counts)
    filled = np.clip(trace.input_tokens[row] - position * width, 0, width)
    chain = _chain(trace, counts)
    # sort the blocks by chain, then by row; within a chain the most tokens an earlier row had is a running maximum
    order = np.argsort(chain, kind="stable")
    group = np.concatenate([[0], np.cumsum(np.diff(chain[order].view(np.int64)) != 0)])
    running = np.maximum.accumulate(group * (width + 1) + filled[order])
    before = np.concatenate([[0], running[:-1]]) - group * (width + 1)
    earlier = np.empty(total, dtype=np.int64)
    earlier[order] = np.maximum(before, 0)
    # the first block of a chain group has the previous group's maximum before it, which came out below zero
    starts = np.concatenate([[True], np.diff(group) > 0])
    at_s = trace.arrival_s[row[order]]
    age_s = np.empty(total)
    age_s[order] = np.where(starts, np.inf, np.diff(at_s, prepend=0.0))
    return row, np.where(np.isfinite(age_s), np.minimum(earlier, filled), 0), age_s


def _chain(trace: Trace, counts: np.ndarray) -> np.ndarray:
    """(blocks,) uint64: a hash of each block's id and all ids before it in its request."""
    ids = trace.block_ids.astype(np.uint64)
    chain = np.empty(len(ids), dtype=np.uint64)
    rows = np.flatnonzero(counts)
    state = np.zeros(len(rows), dtype=np.uint64)
    depth = 0
    while len(rows):
        at = trace.block_offsets[rows] + depth
        state = mix64((state ^ mix64(ids[at])) + np.uint64(depth + 1))
        chain[at] = state
        depth += 1
        deeper = counts[rows] > depth
        rows, state = rows[deeper], state[deeper]
    return chain
