"""Many reads of one response at once, where each is what nearly every read is: one chunk that holds one event that
brings tokens and tells how many there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat

USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,7})(?!\d)')  # what has more digits is no count
NO_CHOICES = (b'"choices":[]', b'"choices": []')
_END = b"\n\n\r\n"


def counts(sizes: Sequence[int], data: bytes, seen: int) -> list[int] | None:
    """How many tokens each read brings, ``seen`` having come before; None where it takes a closer look to tell.

    The reads have ``sizes`` and lie end to end in ``data``.
    """
    n = len(sizes)
    reads = data.split(_END)
    if (
        reads.pop()
        or [len(read) + len(_END) for read in reads] != sizes
        or not all(map(bytes.startswith, reads, map(_head, sizes)))
        # the head has one of each, and the end is what the reads were cut by
        or data.count(b"\n") != 4 * n
        or data.count(b"\r") != 2 * n
        or any(none in data for none in NO_CHOICES)
    ):
        return None
    found: list[int] = []
    for read in reads:
        key = read.rfind(b'"completion_tokens"')
        usage = USAGE.match(read, key) if key >= 0 else None
        if not usage or (total := int(usage[1])) <= seen:
            return None
        found.append(total - seen)
        seen = total
        if len(found) == 1:  # the others mostly end like this one, each with one token more
            before, after = read[key : usage.start(1)], read[usage.end() :]
            ends = map(_tail, repeat(before), range(seen + 1, seen + n), repeat(after))
            if all(map(bytes.endswith, reads[1:], ends)):
                return found + [1] * (n - 1)
    return found


@lru_cache(4_096)
def _head(size: int) -> bytes:
    """How a chunk begins that has ``size`` bytes in all and holds an event."""
    for digits in range(1, 9):
        length = size - digits - 4
        if length > 0 and len(f"{length:x}") == digits:
            return b"%x\r\ndata:" % length
    return b"no chunk"


@lru_cache(4_096)
def _tail(before: bytes, total: int, after: bytes) -> bytes:
    return b"%b%d%b" % (before, total, after)
