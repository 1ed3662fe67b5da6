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
from collections.abc import Callable

from tuner.load.connection import Connection
from tuner.load.pacer import Pacer
from tuner.load.poll import Poll
from tuner.load.wire import Target

TICK_NS = 10_000_000
_FLUSH_TICKS = 5
_REVIEW_TICKS = 100
_TOGETHER_NS = 20_000
_IDLE_LIMIT_NS = 2_000_000_000  # servers close idle connections, uvicorn after 5 s: use none that old
HOLD_NS = 1_000_000
_HOLD_LEAST_NS = 60_000
_CHUNK_HEAD_BYTES = 12  # before an event at the very beginning of a read: its chunk's length
_JOINED_SHARE, _JOINED_FEW = 0.01, 10
_SPARE_MAX = 256
_OPEN_PER_TICK = 16

_OUR_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
OWN_FAULT = "the client: "  # how an error begins that no server caused

SENT, READ, ENDED, TICK, LEFT = 0, 1, 2, 3, 4
Event = tuple  # (SENT, number, intended_ns, sent_ns) | (READ, number, kernel_ns, read_ns, late_ns, bytes)
#              | (ENDED, number, end_ns, error, retried) | (TICK, known_ns, late_ns, cpu_ns, process) | (LEFT, process)


class Client:
    """Runs one shard's requests against one server.

    ``take(number)`` gives a request's bytes, or None while they are not there yet (they come in the order of sending).
    ``emit(events)`` is given what
    happened, every 50 ms. Times are monotonic nanoseconds; ``kernel_ns`` is 0 where the kernel gave no stamp.
    ``late_ns`` says how long this loop may have left the bytes lying: the delay of the wake-up that found them.

    ``hold_ns``: sockets are looked at no oftener than that, for being woken for each token costs more than reading it.
    The kernel's stamps lose nothing by it but events of one response that lie closer together, and where over 1 % of a
    second's reads bring such events it is halved. Sends, handshakes and connections without stamps are not held.
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
        self._target, self._addresses, self._tls = target, addresses, tls
        self._take, self._emit, self._timeout_ns = take, emit, timeout_ns
        self._poll = Poll()
        self._connections: dict[int, Connection] = {}
        self._spares: dict[Connection, None] = {}  # open and never used; both are sets with an order
        self._reusable: dict[Connection, None] = {}
        self._opening = 0
        self._spare = 0
        self._busy: dict[int, Connection] = {}
        self._requests: dict[int, bytes] = {}  # for the one retry on a connection that the server had closed
        self._retried: set[int] = set()
        self._deadlines: deque[tuple[int, int]] = deque()
        self._late_bodies: deque[tuple[int, int]] = deque()
        self._events: list[Event] = []
        self._offset_ns = 0
        self._hold_ns = hold_ns
        self._held_ns = 0  # until when
        self._reads, self._joined = 0, 0  # since the last review; those that brought several events
        self._writing = 0  # connections that wait for their socket to take bytes
        self._left = 0
        self._pid = os.getpid()

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Calls ``call`` whenever ``fd`` is readable."""
        self._poll.add(fd, call)

    def unwatch(self, fd: int) -> None:
        self._poll.remove(fd)

    def open_ahead(self, count: int) -> None:
        """Keeps up to ``count`` connections open in advance, so that no request waits for a handshake."""
        self._spare = min(count, _SPARE_MAX)

    def wait_open(self, until_ns: int) -> None:
        """Runs the loop until the spare connections are up, at most until ``until_ns``."""
        while (now := time.monotonic_ns()) < until_ns and len(self._spares) < self._spare:
            self._refill(now, self._spare)
            if not self._opening:
                return  # refused: the requests will say so
            ready, now = self._wait(min(until_ns, now + TICK_NS))
            self._serve_all(ready, 0)

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
            deadline_ns = tick_ns if due_ns is None or due_ns > tick_ns else due_ns
            ready, now = self._wait(deadline_ns)
            woke_ns, late_ns = now, max(0, now - deadline_ns)
            if self._late_bodies or (due_ns is not None and due_ns <= now):
                self._send_due(now)  # before reading: what was received has the kernel's time already
                late_ns += time.monotonic_ns() - now
            now = self._serve_all(ready, late_ns)
            if self._late_bodies:
                self._send_due(now)  # whose bytes may have come just now
            if now >= tick_ns:
                late_ns = now - tick_ns
                # what came after the wake-up has not been read yet
                self._events.append((TICK, woke_ns, late_ns, time.process_time_ns(), self._pid))
                self._expire(now)
                self._refill(now, _OPEN_PER_TICK)
                ticks += 1
                tick_ns += TICK_NS * (1 + late_ns // TICK_NS)
                if ticks % _FLUSH_TICKS == 0:
                    self.flush()
                if ticks % _REVIEW_TICKS == 0:
                    self._review()
                if reason := stopped():
                    self._abandon(reason)
                    break
        self._events.append((LEFT, self._pid))
        self.flush()

    def flush(self) -> None:
        events, self._events = self._events, []
        if events:
            self._emit(events)

    def close(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._poll.close()

    # one turn of the loop

    def _wait(self, deadline_ns: int) -> tuple[list[int], int]:
        """Waits for bytes or ``deadline_ns``; returns what is ready, and the time."""
        if self._hold_ns and not self._writing:
            rest_ns = min(self._held_ns, deadline_ns) - time.monotonic_ns()
            if rest_ns > _HOLD_LEAST_NS:
                time.sleep(rest_ns / 1e9)
        ready = self._poll.wait(deadline_ns)
        now = time.monotonic_ns()
        self._held_ns = now + self._hold_ns
        # the kernel stamps with the wall clock: its distance from ours is taken anew, for it can be stepped, unless
        # this process was interrupted between the two
        wall = time.time_ns()
        if time.monotonic_ns() - now < _TOGETHER_NS or not self._offset_ns:
            self._offset_ns = wall - now
        return ready, now

    def _serve_all(self, ready: list[int], late_ns: int) -> int:
        """Handles what is ready; returns the time."""
        for fd in ready:
            connection = self._connections.get(fd)
            if connection is None:
                self._poll.call(fd)
            elif connection.plain and not connection.polled_write:
                try:
                    data, stamp = connection.receive()
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._broken(connection, _words(error))
                    continue
                self._received(connection, data, stamp, late_ns)
            else:
                self._serve(connection, late_ns)
        return time.monotonic_ns()

    def _serve(self, connection: Connection, late_ns: int) -> None:
        """A connection with more to do than reading: handshakes, a request not yet written, TLS."""
        data, stamp = None, 0
        try:
            if connection.wants_write:
                connection.write()
            data, stamp = connection.read()
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken(connection, _words(error))
            return
        if not connection.announced and connection.ready:
            connection.announced = True
            self._opened(connection)
        self._watch_write(connection)
        if data is not None:
            self._received(connection, data, stamp, late_ns)

    def _received(self, connection: Connection, data: bytes, stamp: int, late_ns: int) -> None:
        now = time.monotonic_ns()
        number = connection.number
        if number >= 0 and not data and connection.received:
            self._finish(number, now, "")  # how a body without framing ends: the parser tells it from a truncation
            self._drop(connection)
            return
        if number < 0 or not data:
            self._broken(connection, "connection closed by the server")
            return
        if not connection.received:
            self._requests.pop(number, None)
        connection.received += len(data)
        self._reads += 1
        self._events.append((READ, number, stamp - self._offset_ns if stamp else 0, now, late_ns, data))
        if connection.ended(data):
            self._finish(number, now, "")
            if connection.keep:
                connection.number, connection.reused, connection.idle_ns = -1, True, now
                self._reusable[connection] = None
            else:
                self._drop(connection)
        elif connection.received > len(data) and data.find(b"\ndata:", _CHUNK_HEAD_BYTES) > 0:
            self._joined += 1

    def _review(self) -> None:
        """Every second: looks oftener where the server's events come faster than we look."""
        if self._joined > max(_JOINED_FEW, _JOINED_SHARE * self._reads):
            self._hold_ns = self._hold_ns // 2 if self._hold_ns > 4 * _HOLD_LEAST_NS else 0
        self._reads, self._joined = 0, 0

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
        connection = self._unused() if again else self._idle(now)
        try:
            if connection is None:
                connection = self._open()
            self._busy[number] = connection
            self._requests[number] = request
            connection.assign(number, request)
            if connection.ready:
                connection.write()
                self._watch_write(connection)
        except OSError as error:
            if connection is None:
                ours = OWN_FAULT if error.errno in _OUR_ERRORS else ""
                self._finish(number, now, ours + _words(error))
            else:
                self._broken(connection, _words(error))

    def _idle(self, now: int) -> Connection | None:
        """An idle connection that the server will not have given up."""
        while self._reusable:
            connection, _ = self._reusable.popitem()  # the latest first: it is the least likely to be closed
            if now - connection.idle_ns < _IDLE_LIMIT_NS:
                return connection
            self._drop(connection)
        return self._unused()

    def _unused(self) -> Connection | None:
        return self._spares.popitem()[0] if self._spares else None

    def _finish(self, number: int, now: int, error: str) -> None:
        self._busy.pop(number, None)
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
                self._drop(connection)

    def _abandon(self, reason: str) -> None:
        now = time.monotonic_ns()
        for number, connection in list(self._busy.items()):
            self._finish(number, now, reason)
            self._drop(connection)

    # connections

    def _watch_write(self, connection: Connection) -> None:
        if connection.wants_write != connection.polled_write:
            connection.polled_write = not connection.polled_write
            self._writing += 1 if connection.polled_write else -1
            self._poll.modify(connection.fd, connection.polled_write)

    def _open(self) -> Connection:
        family, address = self._addresses[0]
        connection = Connection(address, family, self._tls, self._target.host)
        self._connections[connection.fd] = connection
        self._poll.add(connection.fd, None, write=True)
        self._opening += 1
        self._writing += 1
        if not connection.stamped:
            self._hold_ns = 0
        return connection

    def _opened(self, connection: Connection) -> None:
        self._opening -= 1
        if connection.number < 0:
            self._spares[connection] = None

    def _refill(self, now: int, limit: int) -> None:
        missing = min(self._spare - len(self._spares) - self._opening, limit)
        try:
            for _ in range(missing):
                self._open()
        except OSError:
            pass  # a request that finds no connection reports the reason

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            if not connection.announced:
                self._opening -= 1
            self._writing -= connection.polled_write
            self._spares.pop(connection, None)
            self._reusable.pop(connection, None)
            self._poll.remove(connection.fd)
            connection.close()

    def _broken(self, connection: Connection, why: str) -> None:
        """The connection is gone. A request that it had not begun to answer, on a connection used before, met a
        server that was closing it as idle: it goes out once more. Any other request failed."""
        number, now = connection.number, time.monotonic_ns()
        if number < 0:
            if not connection.ready:
                self._spare = max(0, self._spare - 1)  # refused: do not knock again and again
            self._drop(connection)
            return
        request = self._requests.get(number)
        self._drop(connection)
        if not connection.received and connection.reused and request is not None and number not in self._retried:
            self._retried.add(number)
            self._start(number, request, now, again=True)
        else:
            self._finish(number, now, why)


def _words(error: OSError) -> str:
    return f"[{error.errno}] {error.strerror or error}" if error.errno else str(error) or type(error).__name__
