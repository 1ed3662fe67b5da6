"""Waiting for sockets and for a time, whichever comes first."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from tuner.load.pacer import Alarm

AT_ONCE = 512  # more descriptors are not told of at once


class Poll:
    """Waits for descriptors until an absolute time: epoll with a timerfd on Linux, else the platform's selector."""

    def __init__(self) -> None:
        self._calls: dict[int, Callable[[], None] | None] = {}
        self._armed_ns = 0
        try:
            self._alarm: Alarm | None = Alarm()
            self._epoll = select.epoll()
            self._epoll.register(self._alarm.fd, select.EPOLLIN)
        except (OSError, AttributeError):
            import selectors

            self._alarm = None
            self._selector = selectors.DefaultSelector()

    def add(self, fd: int, call: Callable[[], None] | None, *, write: bool = False) -> None:
        self._calls[fd] = call
        if self._alarm:
            self._epoll.register(fd, select.EPOLLIN | (select.EPOLLOUT if write else 0))
        else:
            self._selector.register(fd, 1 | (2 if write else 0))

    def modify(self, fd: int, write: bool) -> None:
        """Whether to wake also when ``fd`` takes bytes."""
        if self._alarm:
            self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if write else 0))
        else:
            self._selector.modify(fd, 1 | (2 if write else 0))

    def remove(self, fd: int) -> None:
        if self._calls.pop(fd, self) is not self:
            if self._alarm:
                self._epoll.unregister(fd)
            else:
                self._selector.unregister(fd)

    def call(self, fd: int) -> None:
        call = self._calls.get(fd)
        if call:
            call()

    def ready(self) -> list[int]:
        """The descriptors that are ready now."""
        if self._alarm:
            return self._told(self._alarm, 0)
        return [key.fd for key, _ in self._selector.select(0)]

    def wait(self, deadline_ns: int) -> list[int]:
        """The descriptors that are ready, empty at the deadline."""
        if self._alarm:
            if deadline_ns != self._armed_ns:
                self._alarm.set(deadline_ns)
                self._armed_ns = deadline_ns
            return self._told(self._alarm, -1)
        timeout_s = max(0, deadline_ns - time.monotonic_ns()) / 1e9
        return [key.fd for key, _ in self._selector.select(timeout_s)]

    def _told(self, alarm: Alarm, timeout_s: int) -> list[int]:
        ready = [fd for fd, _ in self._epoll.poll(timeout_s, AT_ONCE)]
        if alarm.fd in ready:
            ready.remove(alarm.fd)
            alarm.clear()
            self._armed_ns = 0
        return ready

    def close(self) -> None:
        if self._alarm:
            self._epoll.close()
            self._alarm.close()
        else:
            self._selector.close()
