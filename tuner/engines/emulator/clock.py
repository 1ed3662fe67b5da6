"""The wall clock behind the simulation: a timer finer than the event loop's, and how late it was."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable

_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1


class _Spec(ctypes.Structure):
    _fields_ = [
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    ]


class Alarm:
    """Calls ``ring`` at a point of the monotonic clock. On Linux through a timerfd, since the event loop's own timers
    are rounded up to milliseconds; elsewhere through the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop, self._ring = loop, ring
        self._fd, self._handle = -1, None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
            if self._fd >= 0:
                loop.add_reader(self._fd, self._readable)

    def set(self, at_s: float) -> None:
        """Rings once at ``at_s`` (``time.monotonic``), in place of what was set before."""
        if self._fd >= 0:
            nanoseconds = max(int(at_s * 1e9), 1)
            spec = _Spec(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
            self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None)
            return
        if self._handle:
            self._handle.cancel()
        self._handle = self._loop.call_at(at_s - time.monotonic() + self._loop.time(), self._ring)

    def _readable(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._ring()


class Lateness:
    """How late deliveries were, in seconds of the wall clock: a histogram with bins a tenth apart in logarithm."""

    LOWEST_S, PER_DECADE = 1e-6, 10

    def __init__(self) -> None:
        self.counts = [0] * (8 * self.PER_DECADE)
        self.total, self.max_s = 0, 0.0

    def add(self, late_s: float) -> None:
        late = max(late_s, self.LOWEST_S)
        index = int(math.log10(late / self.LOWEST_S) * self.PER_DECADE)
        self.counts[min(index, len(self.counts) - 1)] += 1
        self.total += 1
        self.max_s = max(self.max_s, late_s)

    def quantile(self, share: float) -> float:
        """The upper edge of the bin that holds the ``share`` quantile; 0 where nothing was delivered."""
        wanted, seen = share * self.total, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return self.LOWEST_S * 10 ** ((index + 1) / self.PER_DECADE)
        return 0.0
