"""Leases of ports and GPUs: two tuners on one machine never collide.

A lease is a locked file that names its owner (pid and start time). The lock dies with its holders, so a stale lease
needs no guessing: whoever can lock the file owns it. The guard of a server holds the same lock, so that a GPU stays
leased while the server of a killed tuner is still going down.

Who has to wait stands in a queue: a tuner that goes on to its next trial at once would else keep for its whole study
what another looks for twice a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tuner.errors import EnvironmentFault, naming
from tuner.server.probe import listens
from tuner.server.runtime import runtime_root
from tuner.server.tree import Pid

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_QUEUE = "wait-"  # then the time of arrival and the leases' names
_LOOK_S = 0.5


class Lease:
    """One locked lease file; a context manager. ``fd`` may be handed to a guard, which then holds it too."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def take(cls, path: Path, label: str = "") -> Lease | None:
        """The lease, or None where somebody who still lives has it. Raises OSError where files cannot be locked."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with naming(path):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                if isinstance(error, BlockingIOError):
                    return None
                raise  # this file system knows no locks: nobody has it, and nobody can
            if _still(fd, path):  # else its last owner removed the file between our open and our lock
                break
            os.close(fd)
        me = Pid.of(os.getpid())
        owner = {"pid": os.getpid(), "start": me.start if me else 0, "label": label, "at_s": time.time()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode(), 0)
        return cls(path, fd)

    def release(self) -> None:
        """Removes the file and the lock, wherever else the lock is held; safe to call twice."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


class PortLease:
    """A port of 127.0.0.1 that is leased and, until :meth:`hand_over`, bound by us.

    The holder does not listen and has ``SO_REUSEADDR`` and ``SO_REUSEPORT``: a server that sets either (uvicorn,
    vLLM, Go's and most others do) binds beside it, so that the port is never free between our choice and its start;
    the system gives it to nobody else meanwhile.
    """

    def __init__(self, number: int, lease: Lease, holder: socket.socket) -> None:
        self.number = number
        self.lease = lease
        self._holder = holder

    def hand_over(self) -> None:
        """Lets go of the socket (the lease stays): call it just before the server starts."""
        self._holder.close()

    def release(self) -> None:
        self._holder.close()
        self.lease.release()

    @property
    def free(self) -> bool:
        """Whether nobody has it (connections that linger after their end do not count). Hand it over first."""
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.number))
                probe.listen(1)
            except OSError:
                return False
            return True


class GpuLease:
    """Leased GPUs; ``indices`` are NVML's."""

    def __init__(self, leases: dict[int, Lease]) -> None:
        self._leases = leases
        self.indices = tuple(sorted(leases))

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(lease.fd for lease in self._leases.values())

    def release(self) -> None:
        for lease in self._leases.values():
            lease.release()

    def __enter__(self) -> GpuLease:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


class Leases:
    """Gives out ports and GPUs of this machine to this user's tuners. Threads may share one."""

    def __init__(self, root: Path | None = None, seed: int | None = None) -> None:
        self.folder = (root or runtime_root()) / "leases"
        self._random = random.Random(seed)

    def port(self, label: str = "", number: int = 0) -> PortLease:
        """A free port below the range from which the system picks ports for outgoing connections (``number``: that
        one). Raises ``EnvironmentFault`` where there is none."""
        for candidate in [number] if number else self._candidates():
            lease = Lease.take(self.folder / f"port-{candidate}", label)
            if lease is None:
                continue
            holder = socket.socket()
            try:
                if listens(candidate):  # SO_REUSEPORT would let us bind beside a listener of our own user
                    raise OSError
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                holder.bind(("127.0.0.1", candidate))
            except OSError:
                holder.close()
                lease.release()
                continue
            return PortLease(candidate, lease, holder)
        wanted = f"port {number} is" if number else "every port tried is"
        raise EnvironmentFault(f"{wanted} in use", fix="see who listens with: ss -ltnp")

    def gpus(
        self, indices: Sequence[int], label: str = "", wait_s: float = 0.0, cancel: threading.Event | None = None
    ) -> GpuLease:
        """All of these GPUs or none; waits up to ``wait_s`` (or until ``cancel``) while other tuners have them.

        Raises ``EnvironmentFault`` that names who has which.
        """
        names = [f"gpu-{index}" for index in indices]
        taken = self._wait(names, label, wait_s, cancel or threading.Event())
        if taken is None:
            reasons = [f"GPU {i} is leased by {owner}" for i in indices if (owner := self._owner(f"gpu-{i}"))]
            if not reasons:
                reasons = [f"{self._owner(place)} has waited longer for it" for place in self._ahead(names)]
            message = "; ".join(reasons) or "another tuner has the GPUs"
            raise EnvironmentFault(message, fix="wait for it, or give the study other GPUs")
        return GpuLease(dict(zip(indices, taken, strict=True)))

    def host(self, label: str = "", wait_s: float = 0.0, cancel: threading.Event | None = None) -> Lease | None:
        """This machine's CPU, for a server that computes on it; None where it was not to be had within ``wait_s``, or
        until ``cancel``."""
        taken = self._wait(["host"], label, wait_s, cancel or threading.Event())
        return taken[0] if taken else None

    def _wait(self, names: Sequence[str], label: str, wait_s: float, cancel: threading.Event) -> list[Lease] | None:
        """All of these leases; None where that took too long. Whoever waited for one of them before has it before."""
        deadline, place = time.monotonic() + wait_s, None
        try:
            while True:
                if not self._ahead(names, place) and (taken := self._take(names, label)) is not None:
                    return taken
                if time.monotonic() >= deadline:
                    return None
                place = place or self._place(names, label)
                if cancel.wait(_LOOK_S):
                    return None
        finally:
            if place:
                place.release()

    def _place(self, names: Sequence[str], label: str) -> Lease | None:
        """A new place in the queue, which has its name when it is locked and says whose it is: whoever saw it before
        that took it for a killed tuner's, removed it and went first."""
        name = f"{_QUEUE}{time.time_ns():020} {_short(names)}"
        place = Lease.take(self.folder / f".{name}", label)
        if place:
            place.path = place.path.rename(self.folder / name)
        return place

    def _take(self, names: Sequence[str], label: str) -> list[Lease] | None:
        """All or none, without waiting."""
        taken: list[Lease] = []
        for name in names:
            lease = Lease.take(self.folder / name, label)
            if lease is None:
                for other in taken:
                    other.release()
                return None
            taken.append(lease)
        return taken

    def _ahead(self, names: Sequence[str], place: Lease | None = None) -> list[str]:
        """The places in the queue, before ``place`` (None: all), of tuners that live and want one of these."""
        found = []
        for path in sorted(self.folder.glob(f"{_QUEUE}*")):
            if place and path.name >= place.path.name:
                break
            if set(_short(names).split(",")).isdisjoint(path.name.partition(" ")[2].split(",")):
                continue
            if dead := Lease.take(path):
                dead.release()
            else:
                found.append(path.name)
        return found

    def _owner(self, name: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError):
            data = json.loads((self.folder / name).read_text(encoding="utf-8"))
            return f"pid {data['pid']}{' (' + data['label'] + ')' if data['label'] else ''}"
        return ""

    def _candidates(self) -> list[int]:
        low, high = 32768, 60999
        with contextlib.suppress(OSError, ValueError):
            low, high = (int(word) for word in _EPHEMERAL.read_text().split())
        outside = range(20000, low) if low > 21000 else range(high + 1, 65536) if high < 65000 else range(20000, 65536)
        return self._random.sample(outside, min(200, len(outside)))


def sweep(root: Path) -> None:
    """Removes the lease files that nobody holds, litter of tuners that were killed."""
    for path in (root / "leases").glob("[!.]*"):  # those with a dot are being made
        if lease := Lease.take(path):
            lease.release()


def _short(names: Sequence[str]) -> str:
    """Names of leases as part of a file's name, which may have 255 characters."""
    return ",".join(name.removeprefix("gpu-") for name in names)


def _still(fd: int, path: Path) -> bool:
    try:
        return os.fstat(fd).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False
