"""A standby: one process that has imported the engine once and forks servers that start without importing again.

Runs in the engine's own interpreter, with the standard library and :mod:`tuner.server.guard`. Each launch connects to
its Unix socket and hands over file descriptors: the guard's stdin and stdout, then the locks that it holds. The standby
forks a guard, the guard forks the server, so a server from a standby is contained exactly as any other; the job comes
on the guard's stdin as ever (``argv`` without the interpreter's own words).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from typing import Any, NoReturn

from tuner.server.guard import main as run
from tuner.server.tree import MARKER

READY = "standby ready"
_ENV_START = 49  # field 50 of /proc/self/stat: where this process's first environment lies in memory


def main() -> None:
    """``argv``: socket path, module to run as a server, modules to import beforehand (those that exist)."""
    path, module, *preload = sys.argv[1:]
    for name in preload:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is never collected, so that children keep sharing its pages
    libraries = handles()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guards are reaped by the system
    print(f"{READY}: {threads()} threads", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            _, given, _, _ = socket.recv_fds(connection, 1, 16)
            pid = os.fork()
            if pid == 0:
                guard(given, module, libraries)
            connection.sendall(json.dumps({"guard": pid}).encode() + b"\n")
            for handle in given:
                os.close(handle)


def guard(given: list[int], module: str, libraries: set[int]) -> NoReturn:
    """In the forked child: one launch's guard, from its job to its end."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(given[0], 0)
        os.dup2(given[1], 1)
        for handle in handles() - libraries - set(given[2:]) - {0, 1, 2}:
            os.close(handle)
        run(lambda job: become(job, module, libraries), given[2:])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def become(job: dict[str, Any], module: str, libraries: set[int]) -> NoReturn:
    """In the forked child: the job's environment, a clean slate for what Python keeps per process, then the module."""
    remark(job["env"][MARKER])
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None
    sys.argv = list(job["argv"])
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python itself does; the guard gave a program's defaults back
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handle in handles() - libraries - {0, 1, 2}:  # a started program would not have inherited them
        os.close(handle)
    code: int | str | None = 0
    try:
        share_imports()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def share_imports() -> None:
    """Lets vLLM fork its engine core instead of spawning it (its own default on CUDA). The CPU workers stay spawned:
    OpenMP reads their thread binding when it is loaded."""
    import multiprocessing

    utils = sys.modules.get("vllm.v1.engine.utils")
    if utils is not None and hasattr(utils, "get_mp_context"):
        utils.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]


def remark(launch_id: str) -> None:
    """Writes the launch's marker over the standby's own, where ``/proc/<pid>/environ`` shows it (same length)."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[_ENV_START - 2]), int(fields[_ENV_START - 1])
    area = ctypes.string_at(start, end - start)
    at = area.find(f"{MARKER}=".encode())
    if at >= 0 and area.find(b"\0", at) - at == len(MARKER) + 1 + len(launch_id):
        ctypes.memmove(start + at + len(MARKER) + 1, launch_id.encode(), len(launch_id))


def handles() -> set[int]:
    """The open file descriptors (the one that reads the folder is closed again and left out)."""
    return {int(name) for name in os.listdir("/proc/self/fd") if _open(name)}


def _open(name: str) -> bool:
    try:
        os.fstat(int(name))
    except OSError:
        return False
    return True


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main()
