"""One server process under its guard: started without a shell, ended as a tree, and checked to be gone."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.server.tree import MARKER, Pid, describe, kill, members, shared_memory

PACKAGE_ROOT = str(Path(__file__).parents[2])
_GUARD = "import sys; sys.path.insert(0, sys.argv[1]); from tuner.server.guard import main; main()"
_GUARD_ANSWER_S = 120.0  # a machine under load takes its time to start Python; a wrong verdict costs a trial
_KILL_S = 15.0


class StartFailed(Exception):
    """The program could not be executed at all; the message is the operating system's."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a tree ended: seconds taken, whether SIGKILL was needed, what is still there in words."""

    seconds: float
    killed: bool
    left: tuple[str, ...] = ()


class GuardLink:
    """Our end of a guard: its stdin and stdout, and who it is."""

    def __init__(self, pid: int, stdin: int, stdout: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = Pid.of(pid)
        self.stdin, self.stdout = stdin, stdout
        self._child = child

    def close(self, wait_s: float = 5.0) -> None:
        """Closes its stdin (it ends by that), waits, kills it if it must; safe to call twice."""
        self._shut("stdin")
        deadline = time.monotonic() + wait_s
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.pid:
            kill([self.pid])
        if self._child:
            self._child.wait()
        self._shut("stdout")

    @property
    def alive(self) -> bool:
        return self._child.poll() is None if self._child else self.pid is not None and self.pid.alive

    def _shut(self, name: str) -> None:
        if (handle := getattr(self, name)) >= 0:
            setattr(self, name, -1)
            with contextlib.suppress(OSError):
                os.close(handle)


def new_guard(hold: Sequence[int]) -> GuardLink:
    """A guard in a bare interpreter of its own; it inherits the locks ``hold`` and nothing else."""
    theirs_in, ours_in = os.pipe()
    ours_out, theirs_out = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _GUARD, PACKAGE_ROOT],
        stdin=theirs_in,
        stdout=theirs_out,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=tuple(hold),
        env={"PATH": os.environ.get("PATH", "")},
    )
    os.close(theirs_in)
    os.close(theirs_out)
    return GuardLink(child.pid, ours_in, ours_out, child)


@dataclass(frozen=True, slots=True)
class Program:
    """What to execute: words (no shell reads them), the whole environment, the folder to start in, the log file, the
    locks that its guard holds too, and where guards come from."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    hold: Sequence[int] = ()
    guard: Callable[[Sequence[int]], GuardLink] = new_guard


class Process:
    """A started program and everything it started. All methods may be called from any thread."""

    def __init__(self, program: Program, launch_id: str = "") -> None:
        """Starts it. Raises :class:`StartFailed` where the program cannot be executed."""
        self.id = launch_id or secrets.token_hex(8)
        self._lock = threading.Lock()
        self._exit: int | None = None
        self._ended: Ended | None = None
        self._guard_said: dict[str, object] = {}
        self._shared: set[Path] = set()
        me = Pid.of(os.getpid())
        job = {
            "argv": list(program.argv),
            "env": {**program.env, MARKER: self.id},
            "cwd": str(program.cwd),
            "log": str(program.log),
            "id": self.id,
            "owner": [me.pid, me.start] if me else [os.getpid(), 0],
            "fds": list(program.hold),
        }
        self._guard = program.guard(program.hold)
        self.guard = self._guard.pid
        self._tell(json.dumps(job))
        self._hear(_GUARD_ANSWER_S, "pid", "error")
        if "pid" not in self._guard_said:
            self._guard.close()
            raise StartFailed(str(self._guard_said.get("error") or "the guard process gave no answer"))
        self.server = Pid(int(str(self._guard_said["pid"])), int(str(self._guard_said["start"])))

    def poll(self) -> int | None:
        """The exit code of the first process (negative: the signal that ended it); None while it runs."""
        with self._lock:
            if self._exit is None and self._ended is None:
                self._hear(0.0, "exit")
                if "exit" in self._guard_said:
                    self._exit = int(str(self._guard_said["exit"]))
                elif not self.server.alive and not (self.guard and self.guard.alive):
                    self._exit = -9  # the guard is gone too, so nobody knows more
            return self._exit

    def members(self) -> set[Pid]:
        """Every living process of the tree, workers and orphans included."""
        return members(self.id, root=self.guard, leader=self.server)

    def note_shared_memory(self) -> None:
        """Remembers the shared memory in use now, so that it is freed even if the server dies before ``stop``."""
        self._shared |= shared_memory(self.members())

    def stop(self, wait_s: float) -> Ended:
        """SIGTERM, ``wait_s``, SIGKILL to the whole tree, then a check that nothing is left. Safe to call twice."""
        with self._lock:
            if self._ended is None:
                self._ended = self._stop(wait_s)
            return self._ended

    def _stop(self, wait_s: float) -> Ended:
        started = time.monotonic()
        self.note_shared_memory()
        self._tell(f"stop {wait_s}")
        self._hear(wait_s + _KILL_S, "stopped")
        if "exit" in self._guard_said and self._exit is None:
            self._exit = int(str(self._guard_said["exit"]))
        if self._exit is None:
            self._exit = -9
        killed = bool(self._guard_said.get("killed"))
        deadline = time.monotonic() + _KILL_S
        while (left := self.members()) and time.monotonic() < deadline:  # the guard itself was killed, or gave up
            killed = True
            kill(left)
            time.sleep(0.05)
        self._guard.close()
        for path in self._shared:
            with contextlib.suppress(OSError):
                path.unlink()
        return Ended(time.monotonic() - started, killed, tuple(describe(process) for process in sorted_pids(left)))

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a guard that is gone
            os.write(self._guard.stdin, line.encode() + b"\n")

    def _hear(self, wait_s: float, *wanted: str) -> None:
        """Reads the guard's lines until one has a wanted key, it closed the pipe, or ``wait_s`` is over."""
        deadline = time.monotonic() + wait_s
        handle = self._guard.stdout
        look = select.poll()  # select() knows no descriptor above 1023
        look.register(handle, select.POLLIN)
        while not any(key in self._guard_said for key in wanted):
            if not look.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                return
            text = os.read(handle, 65536)  # the guard writes whole lines, each far shorter than a pipe's atomic write
            if not text:
                return
            for line in text.splitlines():
                self._guard_said.update(json.loads(line))


def sorted_pids(processes: set[Pid]) -> list[Pid]:
    return sorted(processes, key=lambda process: process.pid)
