"""What asks a command to end: Ctrl-C, SIGTERM (a container's end, a scheduler), SIGHUP (a closed terminal)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

AGAIN_S = 1.0  # one Ctrl-C may come twice: from the terminal, and from what runs the command


def _ending() -> list[signal.Signals]:
    """None of them outside the main thread, which alone hears signals; a SIGHUP under nohup is meant to be ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if nohup else [signal.SIGHUP])]


def _hear(asked: Callable[[], object]) -> dict[signal.Signals, Any]:
    """Calls ``asked`` at each of them; returns what was done at it before. What is said to a terminal that is gone is
    said to nobody: to write to it is an error."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, _: object) -> None:
        if number == signal.SIGHUP:
            with open(os.devnull, "w") as nobody:
                for descriptor in terminals:
                    os.dup2(nobody.fileno(), descriptor)
        asked()

    return {number: signal.signal(number, handle) for number in _ending()}


def say_stopping() -> None:
    """What an interrupt is answered with before there is more to say."""
    print("Stopping. Again to leave at once.", file=sys.stderr)


def _interrupt() -> None:
    raise KeyboardInterrupt


def as_interrupts() -> None:
    """From now on each of them raises KeyboardInterrupt, as Ctrl-C does."""
    _hear(_interrupt)


@contextmanager
def stopping(
    cancel: threading.Event, first: Callable[[], object] = lambda: None
) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Within it the first of them sets ``cancel`` and calls ``first`` (or what was given to the function that this
    yields), in a thread of their own: the main thread may be in the middle of what holds the event's lock, or a
    stream's, and would never give it back to its own handler. Another, a second later at the earliest, raises
    KeyboardInterrupt.

    A command that has threads enters it before it imports anything large: an interrupt that is raised in the middle of
    an import may be taken for a missing module, or leave the import lock locked, at which other threads wait for ever.
    """
    asked_s, firsts = list[float](), [first]
    heard: SimpleQueue[bool] = SimpleQueue()  # its put, unlike an event's set, may come in the middle of itself

    def asked() -> None:
        now = time.monotonic()
        if asked_s and now - asked_s[0] >= AGAIN_S:
            raise KeyboardInterrupt
        if not asked_s:
            asked_s.append(now)
            heard.put(True)

    def listen() -> None:
        if heard.get():
            cancel.set()
            with suppress(OSError):  # nobody reads what is said
                firsts[-1]()

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    before = _hear(asked)
    try:
        yield firsts.append
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
        heard.put(False)
        listener.join()
