"""The KV cache as a pool of blocks: shared prefixes are counted, freed ones stay until somebody needs the room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """``total`` blocks. A full prompt block has a key (equal keys: equal tokens from the start on); a block with a key
    is shared by those who hold it and, once nobody does, stays for a later hit until it is the oldest and room is
    needed. Blocks without a key are only counted."""

    def __init__(self, total: int, caching: bool = True) -> None:
        self.total, self.caching = total, caching
        self.used = 0  # blocks somebody holds
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return self.total - self.used

    @property
    def usage(self) -> float:
        return self.used / self.total if self.total else 0.0

    def hits(self, keys: Sequence[int]) -> int:
        """How many leading ``keys`` are in the cache."""
        if not self.caching:
            return 0
        count = 0
        for key in keys:
            if key not in self._holders and key not in self._idle:
                break
            count += 1
        return count

    def hold(self, keys: Sequence[int]) -> int:
        """Takes hold of cached ``keys`` (all of them hits); returns how many blocks became used by that."""
        woken = 0
        for key in keys:
            if key in self._idle:
                del self._idle[key]
                self._holders[key] = 0
                woken += 1
            self._holders[key] += 1
        self.used += woken
        return woken

    def idle_among(self, keys: Sequence[int]) -> int:
        """How many of ``keys`` nobody holds: holding them takes that many free blocks."""
        return sum(key in self._idle for key in keys)

    def take(self, count: int) -> bool:
        """Takes ``count`` fresh blocks, evicting the oldest idle ones; False where there is no room (nothing taken)."""
        if count > self.total - self.used:
            return False
        self.used += count
        while self._idle and self.used + len(self._idle) > self.total:
            self._idle.popitem(last=False)
        return True

    def publish(self, key: int) -> bool:
        """A private block is full and gets its key. False where somebody else's block has it already: the block stays
        private."""
        if not self.caching or key in self._holders or key in self._idle:
            return False
        self._holders[key] = 1
        return True

    def release(self, private: int, keys: Sequence[int]) -> None:
        """Gives back ``private`` blocks and the hold on ``keys``; the tail becomes idle first, so it goes first."""
        self.used -= private
        for key in reversed(keys):
            left = self._holders[key] - 1
            if left:
                self._holders[key] = left
            else:
                del self._holders[key]
                self._idle[key] = None
                self.used -= 1
