"""Which processes belong to a launch, by proof: a marker in their environment, their session, their parents.

Reads ``/proc`` with the standard library alone, because the guard (a bare interpreter) uses it too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARKER = "TUNER_LAUNCH_ID"
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Pid:
    """A process that cannot be mistaken for a later one with the same number: ``start`` is its start time in clock
    ticks since boot (field 22 of ``/proc/<pid>/stat``)."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Pid | None:
        """The process that has this number now; None where there is none."""
        row = _stat(pid)
        return cls(pid, row.start) if row else None

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        row = _stat(self.pid)
        return row is not None and row.start == self.start and row.state not in "ZX"


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    state: str
    parent: int
    session: int
    start: int


def members(launch_id: str, *, root: Pid | None = None, leader: Pid | None = None) -> set[Pid]:
    """Every living process of a launch, zombies and this process left out.

    A process belongs to it if its environment carries the marker, if it is in the session of ``leader`` (the server's
    first process, while that number is still its own), or if it descends from ``root`` (the guard, which adopts
    orphans). Processes of other users cannot be read and never match.
    """
    rows = {pid: row for pid in _pids() if (row := _stat(pid))}
    needle = f"{MARKER}={launch_id}".encode()
    found = {pid for pid in rows if _marked(pid, needle)}
    if leader is not None and _same(leader, rows):
        found |= {pid for pid, row in rows.items() if row.session == leader.pid}
    if root is not None and _same(root, rows):
        found |= {pid for pid in rows if _descends(pid, root.pid, rows)}
        found.discard(root.pid)
    found.discard(os.getpid())
    return {Pid(pid, rows[pid].start) for pid in found if rows[pid].state not in "ZX"}


def kill(processes: Iterable[Pid], number: signal.Signals = signal.SIGKILL) -> None:
    """Sends a signal to each process that is still the one meant."""
    for process in processes:
        if process.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def shared_memory(processes: Iterable[Pid]) -> set[Path]:
    """The files in ``/dev/shm`` that these processes map or hold open (a killed server cannot remove them itself)."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = (PROC / str(process.pid) / "maps").read_text(errors="replace")
            found |= {Path(line.split(None, 5)[5]) for line in maps.splitlines() if " /dev/shm/" in line}
        with contextlib.suppress(OSError):
            for handle in (PROC / str(process.pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(handle)
                    if target.startswith("/dev/shm/"):
                        found.add(Path(target))
    return {path for path in found if not path.name.endswith("(deleted)")}


def describe(process: Pid) -> str:
    """``pid 4242 (VLLM::EngineCore)``, for what is left over; of a long command line the start and the end."""
    try:
        words = (PROC / str(process.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        words = ""
    if len(words) > 100:
        words = f"{words[:48]} ... {words[-48:]}"
    return f"pid {process.pid} ({words or 'gone'})"


def _pids() -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def _same(process: Pid, rows: dict[int, _Stat]) -> bool:
    row = rows.get(process.pid)
    return row is not None and row.start == process.start


def _marked(pid: int, needle: bytes) -> bool:
    try:
        return needle in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _descends(pid: int, ancestor: int, rows: dict[int, _Stat]) -> bool:
    seen: set[int] = set()
    while pid in rows and pid not in seen:
        seen.add(pid)
        pid = rows[pid].parent
        if pid == ancestor:
            return True
    return False
