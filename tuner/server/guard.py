"""The guard: a small process between the tuner and a server, so that the server dies with a tuner killed by -9.

It adopts every orphan below it (child subreaper), so that engine cores that leave the session or lose their parent
are still found; it ends the whole tree when it is told to, when the tuner dies, or when its control pipe closes.

Runs in a bare interpreter (``python -I -S``), or forked from a standby: the standard library and
:mod:`tuner.server.tree` only. Its job is one JSON line on stdin; ``stop <seconds>`` follows. It answers with JSON lines
on stdout: ``{"pid", "start"}`` once the server runs (or ``{"error"}``), ``{"exit"}`` when the server's first process
ended, ``{"stopped"}`` when all is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tuner.server.tree import Pid, kill, members

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ORPHANED_WAIT_S = 2.0  # how long a server may take to end by itself once its tuner is gone
KILL_ROUNDS_S = 10.0
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def execute(job: dict[str, Any]) -> NoReturn:
    """Becomes the job's program. Raises ``OSError`` where it cannot be executed."""
    os.execvpe(job["argv"][0], job["argv"], job["env"])


class Guard:
    """One server's guard. ``job`` has ``argv``, ``env``, ``cwd``, ``log``, ``id``, ``owner`` (pid and start), ``fds``
    (locks that the guard holds as long as it lives, and the server does not inherit). ``become`` turns the forked
    child into the server and does not return."""

    def __init__(self, job: dict[str, Any], become: Callable[[dict[str, Any]], NoReturn] = execute) -> None:
        self.job = job
        self.become = become
        self.me = Pid.of(os.getpid())
        self.owner = Pid(*job["owner"])
        self.server = Pid(0, 0)
        self.exit: int | None = None

    def start(self) -> None:
        """Forks the server: its own session, the log as stdout and stderr, nothing on stdin, death with the guard."""
        for held in self.job["fds"]:
            os.set_inheritable(held, False)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        log = os.open(self.job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        failed_read, failed_write = os.pipe()  # closes itself when the child executes
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                signal.pthread_sigmask(signal.SIG_SETMASK, set())
                for number in IGNORED:
                    signal.signal(number, signal.SIG_DFL)
                os.dup2(nothing, 0)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(self.job["cwd"])
                self.become(self.job)
            except OSError as error:
                program = self.job["argv"][0]
                on_path = os.sep not in program and isinstance(error.filename, bytes)  # the last place that was tried
                what = f"{program} (on the PATH)" if on_path else error.filename or program
                os.write(failed_write, f"{error.strerror}: {what}".encode())
            finally:
                os._exit(127)
        os.close(failed_write)
        os.close(log)
        os.close(nothing)
        failure = os.read(failed_read, 4096)
        os.close(failed_read)
        if failure:
            say({"error": failure.decode(errors="replace")})
            raise SystemExit(1)
        self.server = Pid.of(pid) or Pid(pid, 0)
        say({"pid": pid, "start": self.server.start})

    def watch(self) -> float:
        """Waits until it is told to stop or the tuner is gone; returns how long the server may take to end."""
        buffer = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0.2)
            self.reap()
            if ready:
                chunk = os.read(0, 4096)
                if not chunk:
                    return ORPHANED_WAIT_S
                buffer += chunk
                if b"\n" in buffer:
                    return float(buffer.split()[1])
            elif not self.owner.alive:
                return ORPHANED_WAIT_S

    def reap(self) -> None:
        """Takes in every ended child, adopted ones included; tells when the server's first process ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.server.pid:
                    self.exit = os.waitstatus_to_exitcode(ended[1])
                    say({"exit": self.exit})

    def tree(self) -> set[Pid]:
        return members(self.job["id"], root=self.me, leader=self.server) - {self.me}

    def end(self, wait_s: float) -> None:
        """SIGTERM to the server, the stated wait, SIGKILL to whatever is left, until nothing is."""
        started = time.monotonic()
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGTERM)
        while time.monotonic() - started < wait_s:
            self.reap()
            if self.exit is not None and not self.tree():
                break
            time.sleep(0.05)
        killed = False
        deadline = time.monotonic() + KILL_ROUNDS_S
        while (left := self.tree()) and time.monotonic() < deadline:
            killed = True
            kill(left)
            time.sleep(0.05)
            self.reap()
        self.reap()
        say({"stopped": True, "killed": killed, "left": sorted(process.pid for process in left)})


def say(message: dict[str, Any]) -> None:
    """One line to the tuner; a tuner that is gone does not matter."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def main(become: Callable[[dict[str, Any]], NoReturn] = execute, held: list[int] | None = None) -> None:
    """Reads the job, starts the server, waits for its end to be wanted, ends it. ``held`` replaces the job's ``fds``
    where the numbers changed on the way."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # one at a time: what follows the job is a command
        if not byte:
            return
        line += byte
    job = json.loads(line)
    guard = Guard(job if held is None else {**job, "fds": held}, become)
    guard.start()
    guard.end(guard.watch())


if __name__ == "__main__":
    main()
