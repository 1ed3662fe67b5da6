"""The per-user runtime folder: which launches are running, who owns them, and reaping those whose tuner is gone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tuner.errors import EnvironmentFault, replacing
from tuner.server.tree import Pid, describe, kill, members, shared_memory

_GUARD_WAIT_S = 8.0
_LONGEST = 70  # characters of a launch's temporary folder: a Unix socket's path has 107, of which vLLM's names take 37


def runtime_root(env: Mapping[str, str] | None = None) -> Path:
    """The folder for leases and ownership files, mode 0700: ``TUNER_RUNTIME_DIR``, else ``/tmp/tuner-<uid>``, which a
    login, a job and a container's shell have in common (``XDG_RUNTIME_DIR`` and ``TMPDIR`` they have not). Raises
    ``EnvironmentFault`` if it is another user's."""
    env = os.environ if env is None else env
    if env.get("TUNER_RUNTIME_DIR"):
        root = Path(env["TUNER_RUNTIME_DIR"])
    else:
        common = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
        root = Path(common) / f"tuner-{os.getuid()}"
    root = root.resolve()  # servers are started in other folders
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise EnvironmentFault(
            f"{root} is not a folder that only you can write", fix="set TUNER_RUNTIME_DIR to a folder of your own"
        )
    return root


class Ownership:
    """The file that says which tuner owns a launch. Written before the server starts, so that no moment exists in
    which a server runs that nobody can be proved to own."""

    def __init__(self, root: Path, launch_id: str) -> None:
        """Writes the file and makes the launch's temporary folder: in ``root``, or in the system's where ``root`` is
        too deep for the Unix sockets that servers put there."""
        self.id = launch_id
        self.path = root / "launches" / f"{launch_id}.json"
        self.temporary = root / f"t-{launch_id[:8]}"
        if len(str(self.temporary)) > _LONGEST:
            self.temporary = _short(launch_id)
        self.path.parent.mkdir(exist_ok=True)
        me = Pid.of(os.getpid())
        self._data: dict[str, object] = {
            "id": launch_id,
            "tuner": [os.getpid(), me.start if me else 0],
            "temporary": str(self.temporary),
        }
        self._write()
        self.temporary.mkdir(mode=0o700, exist_ok=True)

    def started(self, guard: Pid | None, server: Pid) -> None:
        """Adds who the guard and the server are."""
        self._data["guard"] = [guard.pid, guard.start] if guard else None
        self._data["server"] = [server.pid, server.start]
        self._write()

    def release(self) -> None:
        """Removes the temporary folder and the file; safe to call twice."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        with replacing(self.path) as half:
            half.write_text(json.dumps(self._data), encoding="utf-8")


def _short(launch_id: str) -> Path:
    """A launch's temporary folder where the runtime folder's path is too long."""
    return Path(min(tempfile.gettempdir(), "/tmp", key=len)) / f"tuner-{os.getuid()}-{launch_id[:8]}"


def reap(root: Path | None = None, sleep: Callable[[float], None] = time.sleep) -> list[str]:
    """Ends what tuners that are gone left behind, and only that; says in words what was cleaned.

    A launch is abandoned when the very process (number and start time) that wrote its ownership file is gone. Its
    processes are those whose environment carries its random marker, that sit in its server's session, or that
    descend from its guard.
    """
    root = root or runtime_root()
    cleaned: list[str] = []
    for path in sorted((root / "launches").glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            tuner, launch_id = Pid(*data["tuner"]), str(data["id"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if tuner.alive:
            continue
        cleaned += _reap_one(data, launch_id, sleep)
        temporary = Path(str(data.get("temporary") or ""))
        if (temporary.parent == root and temporary.name.startswith("t-")) or temporary.name == _short(launch_id).name:
            shutil.rmtree(temporary, ignore_errors=True)
        path.unlink(missing_ok=True)
        cleaned.append(f"launch {launch_id} of a tuner that is gone (pid {tuner.pid})")
    for half in (root / "launches").glob("*.tmp"):  # killed in the middle of writing an ownership file
        if not _writes(half):
            half.unlink(missing_ok=True)
    return cleaned


def _reap_one(data: Mapping[str, object], launch_id: str, sleep: Callable[[float], None]) -> list[str]:
    guard, server = _pid(data.get("guard")), _pid(data.get("server"))
    waited = 0.0
    while guard and guard.alive and waited < _GUARD_WAIT_S:  # it is at work: its tuner died moments ago
        sleep(0.1)
        waited += 0.1
    left = members(launch_id, root=guard, leader=server)
    said = [f"ended {describe(process)}" for process in left]
    shared = shared_memory(left)
    for _ in range(100):
        kill(left)
        if guard:
            kill([guard])
        left = members(launch_id, root=guard, leader=server)
        if not left:
            break
        sleep(0.1)
    for file in shared:
        with contextlib.suppress(OSError):
            file.unlink()
    return said


def _writes(half: Path) -> bool:
    """Whether the process that this half-written file is named after still runs."""
    number = half.suffixes[-2].lstrip(".") if len(half.suffixes) > 1 else ""
    process = Pid.of(int(number)) if number.isdigit() else None
    return process is not None and process.alive


def _pid(value: object) -> Pid | None:
    return Pid(int(value[0]), int(value[1])) if isinstance(value, list) and len(value) == 2 else None
