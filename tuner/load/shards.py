"""The client processes of one replay, seen from their parent: started, fed, listened to, stopped.

Each shard has every k-th request and the same start, so that no queue is shared and no shard waits for another.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tuner.engines.protocol import Cancelled
from tuner.errors import EnvironmentFault, UsageError
from tuner.load.client import Event
from tuner.load.wire import Target
from tuner.load.worker import FRAME, LENGTH

CHUNKS_PER_SHARD_PER_S = 20_000.0
_START_DELAY_NS = 30_000_000
_HANDSHAKE_NS = 250_000_000  # as long as one may take, TLS and a distant server included
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031  # Linux
_FEED_REQUESTS = 64
_FEED_BYTES = 1 << 18
_READY_S = 300.0  # to start Python and take the first requests, on a machine that is busy with loading a model


def shard_count(offsets_s: np.ndarray, output_tokens: np.ndarray, cores: int | None = None) -> int:
    """How many processes carry the trace: one per 20,000 expected chunks per second (a chunk per token, averaged over
    ten seconds at the busiest), and at most half the cores, for the server needs the others."""
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if not len(offsets_s):
        return 1
    per_bin = np.bincount((np.asarray(offsets_s) / 10.0).astype(int), weights=np.asarray(output_tokens))
    wanted = int(np.ceil(float(per_bin.max()) / 10.0 / CHUNKS_PER_SHARD_PER_S))
    return max(1, min(wanted, cores // 2))


def most_within(offsets_ns: np.ndarray, span_ns: int) -> int:
    """How many of the times, which never decrease, lie within a span at the most."""
    ends = np.searchsorted(offsets_ns, offsets_ns + span_ns)
    return int((ends - np.arange(len(offsets_ns))).max(initial=0))


@dataclass(frozen=True, slots=True)
class Job:
    """What the fleet is to send. ``request(i)`` gives request i's bytes; it is called in order of sending, on a
    thread per shard. ``offsets_ns`` (n,) are the intended times after the start."""

    target: Target
    offsets_ns: Sequence[int]
    request: Callable[[int], bytes]
    timeout_s: float
    shards: int = 1
    concurrency: int = 0  # closed loop; 0 is the open loop
    cancel: threading.Event = field(default_factory=threading.Event)  # looked at until the start
    backlog_bytes: int = 256 << 20  # of events that a shard keeps where they are not taken; past it it gives up


class Fleet:
    """Runs a job. Use as a context manager: entering it raises Cancelled after ``job.cancel``, leaving it stops what
    still runs."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[int] = []
        self._rests: dict[int, bytes] = {}  # by descriptor: the beginning of a batch of which the end has not come
        self._selector = selectors.DefaultSelector()
        self._feeders = [
            threading.Thread(target=self._feed, args=(shard,), name=f"replay-feeder-{shard}", daemon=True)
            for shard in range(job.shards)
        ]
        self._feed_error: BaseException | None = None
        self.epoch_ns = 0

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        job, n = self._job, len(self._job.offsets_ns)
        addresses = resolve(job.target)
        environment = dict(os.environ)
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH", "")]))
        headers = []
        for shard in range(job.shards):
            read, write = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-m", "tuner.load.worker", str(read)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(read,),
                env=environment,
                bufsize=0,
            )
            os.close(read)
            self._processes.append(process)
            self._controls.append(write)
            _widen(process.stdin)
            _widen(process.stdout)
            numbers = range(shard, n, job.shards)
            offsets_ns = np.asarray(job.offsets_ns[shard :: job.shards], dtype=np.int64)
            soon = int(np.searchsorted(offsets_ns, 2_000_000_000))
            burst = most_within(offsets_ns, _HANDSHAKE_NS)
            concurrency = len(range(shard, job.concurrency, job.shards)) if job.concurrency else 0
            headers.append(
                marshal.dumps(
                    {
                        "numbers": array("q", numbers).tobytes(),
                        "offsets_ns": offsets_ns.tobytes(),
                        "target": {name: getattr(job.target, name) for name in ("host", "port", "path", "tls")},
                        "addresses": addresses,
                        "timeout_ns": int(job.timeout_s * 1e9),
                        "spare": concurrency or max(8, soon),
                        "later_spare": concurrency or max(8, burst),
                        "first": min(len(numbers), max(16, soon)),
                        "concurrency": concurrency,
                        "backlog_bytes": job.backlog_bytes,
                    }
                )
            )
        for process, header in zip(self._processes, headers, strict=True):
            stdout = process.stdout
            if process.stdin is None or stdout is None:
                raise EnvironmentFault("the client process has no pipes")
            try:
                process.stdin.write(LENGTH.pack(len(header)) + header)
            except BrokenPipeError:
                raise _ended(process) from None
            self._selector.register(stdout.fileno(), selectors.EVENT_READ)
            self._rests[stdout.fileno()] = b""
        for feeder in self._feeders:
            feeder.start()
        self._await_ready()
        self.epoch_ns = time.monotonic_ns() + _START_DELAY_NS
        for control in self._controls:
            with contextlib.suppress(BrokenPipeError):  # one that is gone is missed by whoever waits for its events
                os.write(control, struct.pack("<q", self.epoch_ns))

    def _await_ready(self) -> None:
        waiting, deadline_s = set(self._rests), time.monotonic() + _READY_S
        while waiting:
            for key, _ in self._selector.select(0.1):
                if self._read(key.fd):
                    waiting.discard(key.fd)
                elif key.fd not in self._rests:
                    raise _ended(next(p for p in self._processes if p.stdout and p.stdout.fileno() == key.fd))
            if self._feed_error:
                raise self._feed_error
            if self._job.cancel.is_set():
                raise Cancelled("the replay was cancelled")
            if time.monotonic() > deadline_s:
                fix = "Is it suspended, or the machine overloaded? Run the same command again: what is measured is kept"
                raise EnvironmentFault(f"a client process was not ready within {_READY_S:.0f} s", fix=fix)

    def _feed(self, shard: int) -> None:
        """A shard's requests, several per write: each write wakes it, and may hand the parsing thread the interpreter.

        Each shard has a thread of its own: one that has enough for now, and does not read on, must not keep another
        from its requests, for which that one may be waiting to start."""
        job, pipe = self._job, self._processes[shard].stdin
        frames: list[bytes] = []
        size, numbers = 0, range(shard, len(job.offsets_ns), job.shards)
        try:
            for i in numbers:
                try:
                    data = job.request(i)
                except BaseException as error:
                    self._feed_error = error
                    return
                frames += (FRAME.pack(i, len(data)), data)
                size += len(data)
                if len(frames) < 2 * _FEED_REQUESTS and size < _FEED_BYTES and i != numbers[-1]:
                    continue
                if pipe is None:
                    return
                rest = memoryview(b"".join(frames))
                while len(rest):
                    rest = rest[pipe.write(rest) :]
                frames.clear()
                size = 0
            if pipe:
                pipe.close()
        except (BrokenPipeError, ValueError, OSError):
            pass  # stopped: the shard that read this is gone

    @property
    def running(self) -> int:
        """Shards that have not ended."""
        return len(self._rests)

    def events(self, timeout_s: float) -> list[Event] | None:
        """What happened since the last call, waiting up to ``timeout_s``; None once every shard has ended.

        Raises whatever making a request's bytes raised.
        """
        if self._feed_error:
            raise self._feed_error
        if not self._rests:
            return None
        events: list[Event] = []
        for key, _ in self._selector.select(timeout_s):
            for batch in self._read(key.fd):
                events.extend(batch)
        return events

    def _read(self, fd: int) -> list[list[Event]]:
        """The batches that have come since the last time; none at the process's end, too."""
        data = os.read(fd, _PIPE_BYTES)
        if not data:
            self._selector.unregister(fd)
            del self._rests[fd]
            return []
        data = self._rests[fd] + data
        at, view, batches = 0, memoryview(data), []
        while len(data) - at >= LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(data, at)[0]
            if end > len(data):
                break
            batches.append(marshal.loads(view[at + LENGTH.size : end]))
            at = end
        self._rests[fd] = data[at:]
        return batches

    def stop(self, code: bytes) -> None:
        """Ends the run: ``c`` cancelled, ``s`` stopped early, ``d`` the server died. Its last events still come."""
        for control in self._controls:
            with contextlib.suppress(OSError):
                os.write(control, code)

    def close(self) -> None:
        """Whatever is still running ends now."""
        for control in self._controls:
            os.close(control)  # a shard that still runs takes this as its end
        self._controls.clear()
        for process in self._processes:
            try:
                process.wait(2.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        for feeder in self._feeders:
            if feeder.ident:
                feeder.join(5.0)
        for process in self._processes:
            if process.stdin:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        self._processes.clear()
        self._selector.close()
        self._rests.clear()


def _ended(process: subprocess.Popen[bytes]) -> EnvironmentFault:
    """How a client process ended that should have begun its part of the replay."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its output: it ends at once
        process.wait(2.0)
    code, fix = process.returncode or 0, "It says why above"
    how = f"exit code {code}"
    if code < 0:
        how = f"signal {-code}, {signal.Signals(-code).name}"
        fix = "Run the same command again; what a study has measured is kept"
    if code == -signal.SIGKILL:
        fix = f"Often the machine's memory ran out: free some. {fix}"
    return EnvironmentFault(f"a client process ended ({how}) before the replay began", fix=fix)


def resolve(target: Target) -> list[tuple[int, tuple]]:
    """The server's addresses as (family, address). Raises UsageError where the name is unknown."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"cannot resolve host {target.host}: {error}", fix="Check the URL") from error
    addresses = [(int(family), address) for family, _, _, _, address in found]
    # localhost often means ::1 first while the server listens on 127.0.0.1: take the first that answers
    for family, address in addresses if len(addresses) > 1 else []:
        # (a machine without IPv6 can have a name for an address of it)
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            if probe.connect_ex(address) == 0:
                return [(family, address)]
    return addresses[:1]


def _widen(pipe: object) -> None:
    try:
        import fcntl

        fcntl.fcntl(pipe.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[attr-defined]
    except (ImportError, OSError, AttributeError):
        pass
