"""Fast starts: a standby that has imported the engine, one per environment, and servers forked from it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.server.process import PACKAGE_ROOT, GuardLink, Process, Program, StartFailed
from tuner.server.runtime import Ownership, runtime_root
from tuner.server.tree import MARKER

# The tuner's folder is on the path only while these few modules are imported: it may hold another torch.
_BOOT = (
    "import sys; root = sys.argv.pop(1); sys.path.insert(0, root); from tuner.server import standby; "
    "sys.path.remove(root); standby.main()"
)
_READY = re.compile(r"standby ready: (\d+) threads")
_READY_S = 300.0
_OF_ONE_LAUNCH = frozenset({"TMPDIR", "VLLM_API_KEY", MARKER})


@dataclass(slots=True)
class _Standby:
    process: Process
    ownership: Ownership
    socket: Path
    threads: int

    def stop(self) -> None:
        self.process.stop(1.0)
        self.ownership.release()


class FastStart:
    """Forks servers of one engine. ``module`` is what a server runs (``python -m module``), ``preload`` the modules
    worth importing beforehand. A standby serves one environment only, because modules read it when they are imported;
    a launch with another environment gets another standby, and the older one goes.

    Falls back to nothing (and says why through ``tell``) where a standby cannot be had: a launch then starts as usual.
    """

    def __init__(self, python: str, module: str, preload: Sequence[str] = (), root: Path | None = None) -> None:
        self.python, self.module, self.preload = python, module, tuple(preload)
        self._root = root
        self._lock = threading.Lock()
        self._standbys: dict[str, _Standby] = {}
        self._broken = ""
        self._finalizer = weakref.finalize(self, _stop_all, self._standbys)

    def guards(
        self, env: Mapping[str, str], cancel: threading.Event, tell: Callable[[str], None]
    ) -> Callable[[Sequence[int]], GuardLink] | None:
        """Where guards for servers with this environment come from; None: start as usual.

        The first call imports, which takes as long as a server's own imports would; the launch loses nothing by it.
        """
        shared = {name: value for name, value in env.items() if name not in _OF_ONE_LAUNCH}
        key = json.dumps(shared, sort_keys=True)
        with self._lock:
            standby = self._standbys.get(key)
            if standby is not None and standby.process.poll() is not None:
                self._standbys.pop(key).stop()
                standby = None
            if standby is None and not self._broken:
                try:
                    standby = self._start(shared, cancel)
                except (StartFailed, OSError) as error:
                    self._broken = str(error)
                    tell(f"no fast start: {self._broken}")
                else:
                    for old in list(self._standbys):
                        self._standbys.pop(old).stop()
                    if standby:
                        self._standbys[key] = standby
            return (lambda hold: _fork(standby, hold)) if standby else None

    def close(self) -> None:
        """Ends the standby; its servers must have been stopped. Also done when the tuner ends."""
        with self._lock:
            _stop_all(self._standbys)

    def _start(self, env: Mapping[str, str], cancel: threading.Event) -> _Standby | None:
        ownership = Ownership(self._root or runtime_root(), secrets.token_hex(8))
        path, log = ownership.temporary / "fork", ownership.temporary / "standby.log"
        argv = [self.python, "-c", _BOOT, PACKAGE_ROOT, str(path), self.module, *self.preload]
        # numpy's OpenBLAS starts threads when it is loaded unless it is told not to; nothing else does.
        whole = {"OPENBLAS_NUM_THREADS": "1", **env, "TMPDIR": str(ownership.temporary)}
        try:
            process = Process(Program(argv, whole, ownership.temporary, log), ownership.id)
        except StartFailed:
            ownership.release()
            raise
        ownership.started(process.guard, process.server)
        standby = _Standby(process, ownership, path, 0)
        deadline = time.monotonic() + _READY_S
        while not (ready := _READY.search(_text(log))):
            if cancel.wait(0.1):
                standby.stop()
                return None
            if process.poll() is not None or time.monotonic() > deadline:
                said = _text(log).strip().splitlines()
                standby.stop()
                raise StartFailed(f"the standby did not get ready: {said[-1] if said else 'it said nothing'}")
        standby.threads = int(ready.group(1))
        if standby.threads > 1:
            standby.stop()
            raise StartFailed(f"importing started {standby.threads - 1} threads, which a fork would lose")
        return standby


def _fork(standby: _Standby, hold: Sequence[int]) -> GuardLink:
    theirs_in, ours_in = os.pipe()
    ours_out, theirs_out = os.pipe()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30.0)
            connection.connect(str(standby.socket))
            socket.send_fds(connection, [b"\n"], [theirs_in, theirs_out, *hold])
            answer = b""
            while not answer.endswith(b"\n"):
                chunk = connection.recv(4096)
                if not chunk:
                    raise StartFailed("the standby closed the connection")
                answer += chunk
    except OSError as error:
        os.close(ours_in)
        os.close(ours_out)
        raise StartFailed(f"the standby does not answer: {error}") from None
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    return GuardLink(int(json.loads(answer)["guard"]), ours_in, ours_out)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _stop_all(standbys: dict[str, _Standby]) -> None:
    while standbys:
        standbys.popitem()[1].stop()
