"""What asks a command to end: Ctrl-C, SIGTERM (a container's end, a scheduler), SIGHUP (a closed terminal)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOPPING = "Stopping: the running server is shut down first. Again to leave at once."
AGAIN_S = 1.0  # one Ctrl-C may come twice: from the terminal, and from what runs the command


def _ending() -> list[signal.Signals]:
    """None of them outside the main thread, which alone hears signals; a SIGHUP under nohup is meant to be ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if nohup else [signal.SIGHUP])]


def _hang_up(terminals: list[int]) -> None:
    """What is said to a terminal that is gone is said to nobody; to write to it is an error."""
    with open(os.devnull, "w") as nobody:
        for descriptor in terminals:
            os.dup2(nobody.fileno(), descriptor)


def _terminals() -> list[int]:
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def as_interrupts() -> None:
    """From now on each of them raises KeyboardInterrupt, as Ctrl-C does."""
    terminals = _terminals()

    def handle(number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _hang_up(terminals)
        raise KeyboardInterrupt

    for number in _ending():
        signal.signal(number, handle)


@contextmanager
def stopping(cancel: threading.Event, first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within it the first of them sets ``cancel`` and calls ``first``; another, a second later at the earliest, raises
    KeyboardInterrupt."""
    asked_s: list[float] = []
    terminals = _terminals()

    def handle(number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            _hang_up(terminals)
        if asked_s and now - asked_s[0] >= AGAIN_S:
            raise KeyboardInterrupt
        if not asked_s:
            asked_s.append(now)
            cancel.set()
            with suppress(RuntimeError):  # in the middle of another word: Python's streams take no second one
                first()

    before = {number: signal.signal(number, handle) for number in _ending()}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
