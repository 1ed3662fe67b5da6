"""A server that is ours: its process, port, leases, log and telemetry, and how all of it goes away again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tuner.engines.protocol import Endpoint, Teardown
from tuner.server.bootlog import BootLog, LogFile
from tuner.server.faststart import FastStart
from tuner.server.gpu import Gpus
from tuner.server.leases import GpuLease, Lease, PortLease
from tuner.server.process import Ended, Process
from tuner.server.runtime import Ownership
from tuner.server.telemetry import Telemetry

_GPU_BACK_S = 20.0
_GPU_SLACK_BYTES = 512 * 2**20  # what a driver keeps after the last context is gone


@dataclass(slots=True)
class Running:
    """Everything that one launch holds. ``stop`` gives all of it back, in an order in which nothing can be lost."""

    ownership: Ownership
    port: PortLease
    log: LogFile
    boot_log: BootLog
    gpus: Gpus
    stop_wait_s: float
    gpu_lease: GpuLease | None = None
    host_lease: Lease | None = None
    process: Process | None = None
    endpoint: Endpoint | None = None
    telemetry: Telemetry | None = None
    fast: FastStart | None = None  # a standby must not go before the servers that it forked
    clean: Callable[[], None] = lambda: None  # what the tree's end leaves to do
    stranger: bool = False  # somebody else has the port, and keeps it
    gpu_used_before: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _teardown: Teardown | None = None

    @property
    def gpu_indices(self) -> tuple[int, ...]:
        return self.gpu_lease.indices if self.gpu_lease else ()

    def exit_code(self) -> int | None:
        """The server's exit code; None while it runs or before it was started."""
        return self.process.poll() if self.process else None

    def stop(self) -> Teardown:
        """Ends the tree, checks that processes, port and GPU memory are back; safe to call twice; never raises."""
        with self._lock:
            if self._teardown is None:
                self._teardown = self._stop()
            return self._teardown

    def _stop(self) -> Teardown:
        started = time.monotonic()
        left: list[str] = []
        ended = Ended(0.0, False)
        if self.process:
            try:
                try:
                    ended = self.process.stop(self.stop_wait_s)
                finally:
                    self.clean()
                left += [*ended.left, *self._port_left(), *self._gpu_left()]
            except Exception as error:  # a teardown that raises would hide the outcome it ends
                ended = Ended(0.0, False, (f"the teardown itself failed: {error!r}",))
                left += ended.left
        if self.telemetry:
            with contextlib.suppress(Exception):  # a full disk must not keep a server alive
                self.telemetry.stop()
        self.port.release()
        for lease in (self.gpu_lease, self.host_lease):
            if lease:
                lease.release()
        if not ended.left:  # else the next start may still reap them
            self.ownership.release()
        return Teardown(round(time.monotonic() - started, 3), ended.killed, tuple(left))

    def _port_left(self) -> list[str]:
        self.port.hand_over()
        return [] if self.port.free or self.stranger else [f"port {self.port.number} is still in use"]

    def _gpu_left(self) -> list[str]:
        deadline = time.monotonic() + _GPU_BACK_S
        while True:
            held = {
                index: used
                for index in self.gpu_indices
                if (used := self.gpus.memory_used(index) - self.gpu_used_before.get(index, 0)) > _GPU_SLACK_BYTES
            }
            if not held or time.monotonic() > deadline:
                return [f"GPU {index}: {used / 2**30:.1f} GiB are still held" for index, used in held.items()]
            time.sleep(0.2)
