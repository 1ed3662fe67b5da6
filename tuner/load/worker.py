"""One client process: takes requests from its parent, runs the event loop, hands back what happened.

Standard input brings a header and then the requests in order of sending, standard output takes batches of events, and
a control pipe brings the common start and, later, a byte that stops the run. It imports nothing heavy: it must be
sending within a fraction of a second, and it must not share an interpreter with anything that could delay it.
"""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import signal
import struct
import sys
import time
from array import array
from collections import deque

from tuner.load.client import BEHIND, Client, Event
from tuner.load.hold import FIRST_NS
from tuner.load.pacer import ClosedLoop, OpenLoop
from tuner.load.wire import Target, tls_context

FRAME = struct.Struct("<qI")  # request number, bytes
LENGTH = struct.Struct("<I")
REASONS = {b"c": "cancelled", b"s": "stopped", b"d": "the server died"}
_AHEAD_BYTES = 32 << 20
_AHEAD_REQUESTS = 65_536
_READ_BYTES = 1 << 20


class Inbox:
    """The requests that have come through the pipe and wait for their time; bounded, by not reading on."""

    def __init__(self, fd: int, total: int) -> None:
        self.fd, self._total = fd, total
        self._buffer = bytearray()
        self._ready: dict[int, bytes] = {}
        self._bytes = 0
        self._seen = 0
        self.ended = False
        self.watched = False

    @property
    def full(self) -> bool:
        return self._bytes >= _AHEAD_BYTES or len(self._ready) >= _AHEAD_REQUESTS

    @property
    def all_seen(self) -> bool:
        return self.ended or self._seen >= self._total

    def fill(self) -> None:
        """Reads once."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return
        self.ended = not data
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= FRAME.size:
            number, size = FRAME.unpack_from(buffer, at)
            end = at + FRAME.size + size
            if end > len(buffer):
                break
            self._ready[number] = bytes(buffer[at + FRAME.size : end])
            self._bytes += size
            self._seen += 1
            at = end
        del buffer[:at]

    def take(self, number: int) -> bytes | None:
        request = self._ready.pop(number, None)
        if request is not None:
            self._bytes -= len(request)
        return request


class Outbox:
    """Batches of events on their way to the parent; what the pipe does not take waits here, up to ``most`` bytes: when
    it is ``full``, it takes only what ends the run."""

    def __init__(self, fd: int, most: int) -> None:
        self._fd, self._most = fd, most
        self._pending: deque[memoryview] = deque()
        self._bytes = 0
        os.set_blocking(fd, False)

    @property
    def full(self) -> bool:
        return self._bytes > self._most

    def emit(self, events: list[Event]) -> None:
        data = marshal.dumps(events)
        self._pending.append(memoryview(LENGTH.pack(len(data)) + data))
        self._bytes += len(self._pending[-1])
        self.pump()

    def pump(self) -> None:
        while self._pending:
            try:
                written = os.write(self._fd, self._pending[0])
            except BlockingIOError:
                return
            self._bytes -= written
            if written == len(self._pending[0]):
                self._pending.popleft()
            else:
                self._pending[0] = self._pending[0][written:]

    def close(self) -> None:
        os.set_blocking(self._fd, True)
        self.pump()
        os.close(self._fd)


def main() -> None:
    """Entry: the number of the control pipe's descriptor is the only argument."""
    control = int(sys.argv[1])
    header = marshal.loads(_read_exactly(0, LENGTH.unpack(_read_exactly(0, LENGTH.size))[0]))
    numbers, offsets_ns = array("q", header["numbers"]), array("q", header["offsets_ns"])
    target = Target(**header["target"])
    addresses = [(family, tuple(address)) for family, address in header["addresses"]]
    inbox, outbox = Inbox(0, len(numbers)), Outbox(1, header["backlog_bytes"])
    _raise_limits()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the parent decides

    tls = tls_context() if target.tls else None
    hold_ns = 0 if header["concurrency"] else FIRST_NS  # a closed loop waits for responses to send
    client = Client(target, addresses, tls, inbox.take, outbox.emit, header["timeout_ns"], hold_ns)
    while not inbox.full and not inbox.all_seen and len(inbox._ready) < header["first"]:
        inbox.fill()
    os.set_blocking(0, False)
    client.open_ahead(header["spare"])
    client.wait_open(time.monotonic_ns() + 1_000_000_000)
    client.open_fewer(header["later_spare"])
    outbox.emit([])  # ready
    epoch_ns = struct.unpack("<q", _read_exactly(control, 8))[0]
    os.set_blocking(control, False)

    reason = ""

    def stop() -> None:
        nonlocal reason
        reason = reason or REASONS.get(os.read(control, 1), "cancelled")
        client.unwatch(control)

    def fill() -> None:
        inbox.fill()
        if inbox.full or inbox.all_seen:
            client.unwatch(0)
            inbox.watched = False

    def turn() -> str:
        """Every tick: goes on with the pipes."""
        nonlocal reason
        outbox.pump()
        if outbox.full and not reason:  # neither wait for the parent nor forget anything: the step is lost
            outbox.emit([(BEHIND, os.getpid())])
            reason = "stopped"
        if not inbox.watched and not inbox.full and not inbox.all_seen:
            client.watch(0, fill)
            inbox.watched = True
        return reason

    client.watch(control, stop)
    concurrency = header["concurrency"]
    pacer = ClosedLoop(numbers, concurrency, epoch_ns) if concurrency else OpenLoop(numbers, offsets_ns, epoch_ns)
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles, and a collection would stop the clock
    turn()
    client.run(pacer, len(numbers), turn)
    client.close()
    outbox.close()


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            raise SystemExit(0)  # the parent is gone
        data += piece
    return data


def _raise_limits() -> None:
    """As many descriptors as the user may have, and, where that is allowed, a real-time priority: a stopwatch must not
    wait for its turn on a core that the server keeps busy. It uses little of the core, and a client that uses much of
    one is Untrusted."""
    try:
        import resource
    except ImportError:
        return  # no such limits on this platform
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        # a client that computes for half a second without ever waiting gives the priority back
        signal.signal(signal.SIGXCPU, _ordinary)
        resource.setrlimit(resource.RLIMIT_RTTIME, (500_000, resource.RLIM_INFINITY))
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _ordinary(*_: object) -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        main()
