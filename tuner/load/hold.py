"""How long the client leaves its sockets alone between two looks, found from how fast events come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

FIRST_NS = 1_000_000
LONGEST_NS = 8_000_000
LEAST_NS = 60_000  # a sleep shorter than that costs more than it saves
_GAP_SHARE = 2
_GAPS = 200
_READS, _READS_MOST = 500, 1_000
_JOINED_SHARE, _JOINED_FEW = 0.01, 5


class Hold:
    """``ns``: sockets are looked at no oftener than that, for being woken for each token costs more than reading it.

    The kernel's stamps lose nothing by it but events of one response that lie closer together: they are read at once,
    and all have the last one's stamp. So it is half of the gap that 99 % of the gaps between a response's reads exceed,
    at most 8 ms. Where over 1 % of the events are read together with a later one all the same, it is halved and
    never lengthened again: 1 %, for a p99 must not rest on misdated events; and at least five, for fewer do not move
    the p99 of the 500 reads that are looked at together.
    """

    __slots__ = ("_gaps_ns", "_joined", "_known", "_most_ns", "_reads", "ns")

    def __init__(self, ns: int) -> None:
        self.ns = ns
        self._most_ns = LONGEST_NS if ns else 0
        self._reads, self._joined = 0, 0
        self._gaps_ns: list[int] = []
        self._known = False

    def off(self) -> None:
        """No holding from now on."""
        self.ns = self._most_ns = 0

    @property
    def settled(self) -> bool:
        """Whether it rests on gaps that were seen, or is off."""
        return self._known or not self._most_ns

    @property
    def curious(self) -> bool:
        """Whether more reads would tell more until the next review."""
        return self._most_ns > 0 and self._reads < _READS_MOST

    def saw(self, reads: int, joined: int, stamps_ns: Sequence[int]) -> None:
        """Successive reads of one response: how many, how many events came in a read with a later one, the kernel's
        times."""
        self._reads += reads
        self._joined += joined
        self._gaps_ns += [b - a for a, b in pairwise(stamps_ns)]

    def review(self) -> None:
        """Once a second, oftener until it is settled."""
        if self._joined >= _JOINED_FEW and self._joined > _JOINED_SHARE * self._reads:
            self._most_ns = self.ns // 2 if self.ns > 4 * LEAST_NS else 0
            self.ns = self._most_ns
            self._reads, self._joined = 0, 0
        elif self._reads >= _READS:
            self._reads, self._joined = 0, 0
        if len(self._gaps_ns) >= _GAPS:
            usual_ns = sorted(self._gaps_ns)[len(self._gaps_ns) // 100]
            self.ns = min(self._most_ns, usual_ns // _GAP_SHARE)
            self._gaps_ns.clear()
            self._known = True
