"""The replay client's event loop: sends requests at their deadlines and keeps every byte that comes, with its time.

It parses nothing but a response's end; what it read goes out in batches (see :mod:`tuner.load.worker`) and is
understood elsewhere. One thread, no locks, no allocation that outlives a batch.
"""

from __future__ import annotations

import errno
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator

from tuner.load.connection import ANCILLARY_BYTES, EVENT_END, READ_BYTES, Connection, Stream, Wake, stamp_in
from tuner.load.hold import LEAST_NS, Hold
from tuner.load.pacer import Pacer
from tuner.load.poll import AT_ONCE, Poll
from tuner.load.pool import Pool
from tuner.load.wire import Target

TICK_NS = 10_000_000
_FLUSH_TICKS, _FLUSH_BYTES = 10, 200_000
_READS_BETWEEN_SENDS = 16
_REVIEW_TICKS, _FIRST_REVIEW_TICKS = 100, 20
_TOGETHER_NS = 20_000
_OPEN_PER_TICK = 8

OUR_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
OWN_FAULT = "the client: "  # how an error begins that no server caused

SENT, READ, ENDED, TICK, LEFT, BEHIND = range(6)
Event = tuple  # (SENT, number, intended_ns, sent_ns) | (READ, number, stamps, wakes, sizes, bytes): see Connection
#              | (ENDED, number, end_ns, error, retried) | (TICK, now_ns, known_ns, late_ns, cpu_ns, process)
#              | (LEFT, process) | (BEHIND, process): it gave up, for its events were not taken in time


class Client:
    """Runs one shard's requests against one server.

    ``take(number)`` gives a request's bytes, or None while they are not there yet (they come in the order of sending).
    ``emit(events)`` is given what happened, every 100 ms; what a response in flight brought is in it when the response
    has ended, and every second: a ``known_ns`` says until when all is told. Times are monotonic nanoseconds.
    ``hold_ns``: see :class:`Hold`; sends, handshakes and connections without stamps are not held.
    """

    def __init__(
        self,
        target: Target,
        addresses: list[tuple[int, tuple]],
        tls: ssl.SSLContext | None,
        take: Callable[[int], bytes | None],
        emit: Callable[[list[Event]], None],
        timeout_ns: int,
        hold_ns: int = 0,
    ) -> None:
        self._take, self._emit, self._timeout_ns = take, emit, timeout_ns
        self._poll = Poll()
        self._hold = Hold(hold_ns)
        self._pool = Pool(target, addresses, tls, self._poll, self._hold.off)
        self.open_ahead, self.open_fewer = self._pool.open_ahead, self._pool.open_fewer
        self._streams: dict[int, Stream] = {}  # those in the middle of a response, as little of them as a read needs
        self._busy: dict[int, Connection] = {}
        self._requests: dict[int, bytes] = {}  # for the one retry on a connection that the server had closed
        self._retried: set[int] = set()
        self._deadlines: deque[tuple[int, int]] = deque()
        self._late_bodies: deque[tuple[int, int]] = deque()
        self._events: list[Event] = []
        self._bytes = 0  # that they brought
        self._offset_ns = 0
        self._looked_ns = 0  # until when all that had come has been read
        self._found = False  # whether anything had when we last looked
        self._planned_ns = 0  # when the last wait was to end
        self._known_ns = 0  # until when all is told
        self._round: Iterator[None] = iter(())
        self._left = 0
        self._pid = os.getpid()

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Calls ``call`` whenever ``fd`` is readable."""
        self._poll.add(fd, call)

    def unwatch(self, fd: int) -> None:
        self._poll.remove(fd)

    def wait_open(self, until_ns: int) -> None:
        """Runs the loop until the spare connections are up, at most until ``until_ns``."""
        while (now := time.monotonic_ns()) < until_ns and not self._pool.full:
            self._pool.refill()
            if not self._pool.opening:
                return  # refused: the requests will say so
            self._serve_all(*self._wait(min(until_ns, now + TICK_NS), None))

    def run(self, pacer: Pacer, expected: int, stopped: Callable[[], str]) -> None:
        """Until ``expected`` requests have ended, or ``stopped()`` gives a reason; the rest then ends with it."""
        self._pacer = pacer
        self._left = expected
        tick_ns = time.monotonic_ns() + TICK_NS
        ticks = 0
        while self._left > 0:
            due_ns = pacer.next_ns()
            if self._late_bodies:
                due_ns = tick_ns
            ready, wake = self._wait(tick_ns, due_ns)
            now = time.monotonic_ns()
            for first in range(0, max(1, len(ready)), _READS_BETWEEN_SENDS):
                if self._late_bodies or (due_ns is not None and due_ns <= now):
                    self._send_due(now)  # before reading: what was received has the kernel's time already
                    due_ns = pacer.next_ns()
                now = self._serve_all(ready[first : first + _READS_BETWEEN_SENDS], wake)
            if self._late_bodies:
                self._send_due(now)  # whose bytes may have come just now
            if now >= tick_ns:
                late_ns = max(0, now - max(tick_ns, self._planned_ns))
                next(self._round, None)
                self._events.append((TICK, now, self._known_ns, late_ns, time.process_time_ns(), self._pid))
                self._expire(now)
                self._pool.refill(_OPEN_PER_TICK)
                ticks += 1
                tick_ns += TICK_NS * (1 + (now - tick_ns) // TICK_NS)
                if ticks % _FLUSH_TICKS == 0 or self._bytes > _FLUSH_BYTES:  # much at once would hold up a request
                    self.flush()
                every = _REVIEW_TICKS if self._hold.settled else _FIRST_REVIEW_TICKS
                if ticks % every == every // 2:
                    self._round = self._gather_round(every // 2)
                if ticks % every == 0:
                    self._hold.review()
                if reason := stopped():
                    self._abandon(reason)
                    break
        self._events.append((LEFT, self._pid))
        self.flush()

    def flush(self) -> None:
        events, self._events, self._bytes = self._events, [], 0
        if events:
            self._emit(events)

    def close(self) -> None:
        for connection in list(self._pool.all.values()):
            self._pool.drop(connection)
        self._poll.close()

    # one turn of the loop

    def _wait(self, tick_ns: int, due_ns: int | None) -> tuple[list[int], Wake]:
        """Waits for bytes, or for the next send at ``due_ns``, or ``tick_ns``, which a hold may delay; returns what is
        ready."""
        now = time.monotonic_ns()
        if self._found and self._hold.ns and not self._pool.writing:
            self._planned_ns = self._looked_ns + self._hold.ns
            if due_ns is not None and due_ns < self._planned_ns:
                self._planned_ns = due_ns
            if self._planned_ns > now + LEAST_NS:
                time.sleep((self._planned_ns - now) / 1e9)
                now = time.monotonic_ns()
        ready, since_ns = self._poll.ready(), self._looked_ns
        deadline_ns = tick_ns if due_ns is None or due_ns > tick_ns else due_ns
        if not ready and now < deadline_ns:
            self._planned_ns = deadline_ns
            ready = self._poll.wait(deadline_ns)  # woken by the first of them
            now = time.monotonic_ns()
            since_ns = min(now, deadline_ns)
        self._found = bool(ready)
        if len(ready) < AT_ONCE:
            self._looked_ns = now
        # the kernel stamps with the wall clock: its distance from ours is taken anew, for it can be stepped, unless
        # this process was interrupted between the two
        now, wall = time.monotonic_ns(), time.time_ns()
        if time.monotonic_ns() - now < _TOGETHER_NS or not self._offset_ns:
            self._offset_ns = wall - now
        return ready, [since_ns, self._offset_ns, now]

    def _serve_all(self, ready: list[int], wake: Wake) -> int:
        """Handles what is ready; returns the time. Nearly all of it is the middle of a response: that case is here in
        full, and as short as can be."""
        streams, end = self._streams, EVENT_END
        for fd in ready:
            stream = streams.get(fd)
            if stream is None:
                connection = self._pool.all.get(fd)
                if connection is None:
                    self._poll.call(fd)
                else:
                    self._serve(connection, wake)
                continue
            receive, keep = stream
            try:
                data, ancillary, _, _ = receive(READ_BYTES, ANCILLARY_BYTES)
                if data[-4:] == end and ancillary:
                    keep((data, ancillary[0][2], wake))
                else:
                    self._received(self._pool.all[fd], data, stamp_in(ancillary), wake)
            except BlockingIOError:
                continue
            except OSError as error:
                self._broken(self._pool.all[fd], _words(error))
        wake[2] = now = time.monotonic_ns()
        return now

    def _serve(self, connection: Connection, wake: Wake) -> None:
        """A connection with more to do than reading: handshakes, a request not yet written, a response's head, TLS."""
        data, stamp = None, b""
        try:
            if connection.wants_write:
                connection.write()
            data, stamp = connection.read()
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken(connection, _words(error))
            return
        self._pool.look(connection)
        if data is not None:
            self._received(connection, data, stamp, wake)

    def _received(self, connection: Connection, data: bytes, stamp: bytes, wake: Wake) -> None:
        now = time.monotonic_ns()
        number = connection.number
        if number >= 0 and not data and connection.received:
            self._finish(number, now, "")  # how a body without framing ends: the parser tells it from a truncation
            self._pool.drop(connection)
            return
        if number < 0 or not data:
            self._broken(connection, "connection closed by the server")
            return
        if not connection.received:
            self._requests.pop(number, None)
            connection.received = True
        ended = connection.ended(data)
        connection.kept += (data, stamp, [wake[0], wake[1], now])
        if ended:
            self._finish(number, now, "")
            self._pool.back(connection, now)
        elif connection.streaming:
            self._streams[connection.fd] = connection.stream

    def _gather(self, connection: Connection, ended: bool) -> None:
        """What a connection has read becomes an event."""
        if connection.kept:
            if self._hold.curious:
                self._hold.saw(*connection.middle(ended))
            self._events.append((READ, connection.number, *connection.gather()))
            self._bytes += len(self._events[-1][-1])

    def _gather_round(self, ticks: int) -> Iterator[None]:
        """All connections within so many ticks, a part of them each: together they would hold up a request."""
        begun_ns = self._looked_ns
        busy = list(self._busy.values())
        share = len(busy) // (ticks - 1) + 1
        for k, connection in enumerate(busy, start=1):
            self._gather(connection, False)
            if k % share == 0:
                yield
        self._known_ns = begun_ns

    # requests

    def _send_due(self, now: int) -> None:
        waiting = self._late_bodies
        waiting.extend(self._pacer.due(now))
        while waiting:
            number, intended_ns = waiting[0]
            request = self._take(number)
            if request is None:
                return  # bytes come in the order of sending: the others' are not there either
            waiting.popleft()
            sent_ns = time.monotonic_ns()
            self._events.append((SENT, number, intended_ns, sent_ns))
            self._deadlines.append((intended_ns + self._timeout_ns, number))
            self._start(number, request, sent_ns)

    def _start(self, number: int, request: bytes, now: int, again: bool = False) -> None:
        connection = self._pool.unused() if again else self._pool.idle(now)
        try:
            if connection is None:
                connection = self._pool.open()
            self._busy[number] = connection
            self._requests[number] = request
            connection.assign(number, request)
            if connection.ready:
                connection.write()
                self._pool.look(connection)
        except OSError as error:
            if connection is None:
                ours = OWN_FAULT if error.errno in OUR_ERRORS else ""
                self._finish(number, now, ours + _words(error))
            else:
                self._broken(connection, _words(error))

    def _finish(self, number: int, now: int, error: str) -> None:
        if connection := self._busy.pop(number, None):
            self._streams.pop(connection.fd, None)
            self._gather(connection, True)
        self._requests.pop(number, None)
        self._events.append((ENDED, number, now, error, number in self._retried))
        self._left -= 1
        self._pacer.finished(now)

    def _expire(self, now: int) -> None:
        """Gives up what has outlived the timeout; forgets the deadlines of what has ended."""
        while self._deadlines:
            deadline_ns, number = self._deadlines[0]
            connection = self._busy.get(number)
            if connection is not None and deadline_ns > now:
                return
            self._deadlines.popleft()
            if connection is not None:
                self._finish(number, now, "timeout")
                self._pool.drop(connection)

    def _abandon(self, reason: str) -> None:
        now = time.monotonic_ns()
        for number, connection in list(self._busy.items()):
            self._finish(number, now, reason)
            self._pool.drop(connection)

    def _broken(self, connection: Connection, why: str) -> None:
        """The connection is gone. A request that it had not begun to answer, on a connection used before, met a
        server that was closing it as idle: it goes out once more. Any other request failed."""
        number, now = connection.number, time.monotonic_ns()
        if number < 0:
            if not connection.ready:
                self._pool.refused()
            self._pool.drop(connection)
            return
        request = self._requests.get(number)
        self._pool.drop(connection)
        if not connection.received and connection.reused and request is not None and number not in self._retried:
            self._retried.add(number)
            self._start(number, request, now, again=True)
        else:
            self._finish(number, now, why)


def _words(error: OSError) -> str:
    return f"[{error.errno}] {error.strerror or error}" if error.errno else str(error) or type(error).__name__
