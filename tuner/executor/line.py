"""The line home: events and questions from the nodes to the tuner, the interrupt the other way; one Ray actor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

ANSWER_S = 60.0  # how long a trial waits for an answer before it goes on without


class Line:
    """The actor, on the tuner's own node. What the nodes say is a list of ``(trial, name, data, question)``, in order
    per trial; ``question`` is 0 for an event."""

    def __init__(self) -> None:
        self._said: list[tuple[int, str, Any, int]] = []
        self._news = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0

    async def tell(self, trial: int, name: str, data: Any) -> None:
        self._said.append((trial, name, data, 0))
        self._news.set()

    async def ask(self, trial: int, name: str, data: Any) -> Any:
        """The tuner's answer; None where it gives none in time."""
        self._asked += 1
        number = self._asked
        self._questions[number] = asyncio.get_running_loop().create_future()
        self._said.append((trial, name, data, number))
        self._news.set()
        try:
            return await asyncio.wait_for(self._questions[number], ANSWER_S)
        except TimeoutError:
            return None
        finally:
            del self._questions[number]

    async def take(self) -> list[tuple[int, str, Any, int]]:
        """What was said since the last time; waits until there is something."""
        await self._news.wait()
        self._news.clear()
        said, self._said = self._said, []
        return said

    async def nudge(self) -> None:
        """Whoever waits for something to be said gets what there is, be it nothing."""
        self._news.set()

    async def answer(self, question: int, value: Any) -> None:
        waiting = self._questions.get(question)
        if waiting and not waiting.done():
            waiting.set_result(value)

    async def cancel(self) -> None:
        self._cancelled.set()

    async def cancelled(self) -> bool:
        """Waits for the interrupt."""
        return await self._cancelled.wait()


class Home:
    """A node's end of the line. ``cancel`` is set when the user interrupts, and when the tuner is gone."""

    def __init__(self, line: Any) -> None:
        self._line = line
        self._last: Any = None
        self.cancel = threading.Event()
        threading.Thread(target=self._listen, name="line", daemon=True).start()

    def teller(self, trial: int) -> Callable[[str, Mapping[str, Any]], None]:
        """An ``on_event`` of this trial; does not block."""

        def tell(name: str, data: Mapping[str, Any]) -> None:
            self._last = self._line.tell.remote(trial, name, dict(data))

        return tell

    def ask(self, trial: int, name: str, data: Any) -> Any:
        import ray

        return ray.get(self._line.ask.remote(trial, name, data))

    def flush(self) -> None:
        """Waits until the line has heard everything; not for ever, because events are only shown."""
        import ray

        if self._last is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # pyright: ignore[reportAttributeAccessIssue]
                ray.get(self._last, timeout=ANSWER_S)

    def _listen(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # the line is gone, and with it the tuner
            ray.get(self._line.cancelled.remote())
        self.cancel.set()
