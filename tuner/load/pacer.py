"""When requests leave: absolute deadlines, and the clock that wakes at them.

The pacers take the time as an argument and read no clock, so they are tested without sleeping.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Protocol


class Pacer(Protocol):
    """Says which requests are due. Times are nanoseconds on the monotonic clock."""

    def next_ns(self) -> int | None:
        """The next deadline, or None where none is known (nothing left, or waiting for a response)."""
        ...

    def due(self, now_ns: int) -> list[tuple[int, int]]:
        """(request number, its intended time) of every request due by ``now_ns`` and not yet handed out."""
        ...

    def finished(self, now_ns: int) -> None:
        """A request ended at ``now_ns``."""
        ...


class OpenLoop:
    """Request ``numbers[k]`` is due at ``epoch_ns + offsets_ns[k]``, whatever the server does.

    The deadlines are fixed once: being late moves none of them. ``offsets_ns`` never decrease.
    """

    def __init__(self, numbers: Sequence[int], offsets_ns: Sequence[int], epoch_ns: int) -> None:
        self._numbers = numbers
        self._due_ns = array("q", [epoch_ns + offset for offset in offsets_ns])
        self._k = 0

    def next_ns(self) -> int | None:
        return self._due_ns[self._k] if self._k < len(self._due_ns) else None

    def due(self, now_ns: int) -> list[tuple[int, int]]:
        first = self._k
        while self._k < len(self._due_ns) and self._due_ns[self._k] <= now_ns:
            self._k += 1
        return [(self._numbers[k], self._due_ns[k]) for k in range(first, self._k)]

    def finished(self, now_ns: int) -> None:
        pass


class ClosedLoop:
    """``concurrency`` requests at a time: the next is due when one ends.

    Its intended times follow the server's pace, so its latencies leave out the time that requests would have waited
    at a given rate (coordinated omission). It answers "how fast with N in flight", never "what do users see".
    """

    def __init__(self, numbers: Sequence[int], concurrency: int, epoch_ns: int) -> None:
        self._numbers = numbers
        self._k = 0
        self._free: deque[int] = deque([epoch_ns] * concurrency)

    def next_ns(self) -> int | None:
        return self._free[0] if self._free and self._k < len(self._numbers) else None

    def due(self, now_ns: int) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = []
        while self._free and self._k < len(self._numbers) and self._free[0] <= now_ns:
            ready.append((self._numbers[self._k], self._free.popleft()))
            self._k += 1
        return ready

    def finished(self, now_ns: int) -> None:
        self._free.append(now_ns)


class Alarm:
    """A file descriptor that becomes readable at an absolute monotonic time: Linux's timerfd.

    Raises OSError where the platform has none; the event loop then falls back to its poll timeout.
    """

    def __init__(self) -> None:
        self._set = _timerfd()
        self.fd = self._set(None, 0)

    def set(self, at_ns: int) -> None:
        """Arms the alarm; a time in the past fires at once, and arming again replaces the earlier time."""
        self._set(self.fd, at_ns)

    def clear(self) -> None:
        """Takes the wake-up off the descriptor, so that it is no longer readable."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)


def _timerfd():  # Python has os.timerfd_create from 3.13 only
    import ctypes
    import sys

    if not sys.platform.startswith("linux"):
        raise OSError("no timerfd on this platform")

    class Timespec(ctypes.Structure):
        _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))

    class Itimerspec(ctypes.Structure):
        _fields_ = (("interval", Timespec), ("value", Timespec))

    libc = ctypes.CDLL(None, use_errno=True)
    spec = Itimerspec()
    reference = ctypes.byref(spec)

    def call(fd: int | None, at_ns: int) -> int:
        if fd is None:  # CLOCK_MONOTONIC is 1
            result = libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)
        else:  # TFD_TIMER_ABSTIME is 1; a value of zero would disarm
            spec.value.sec, spec.value.nsec = divmod(max(at_ns, 1), 1_000_000_000)
            result = libc.timerfd_settime(fd, 1, reference, None)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    return call
