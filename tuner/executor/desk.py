"""The tuner's end of the line: it passes on what the nodes say, answers what they ask, and gets Ray's answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from tuner.executor.line import Line
from tuner.executor.protocol import NodeLost
from tuner.study.evaluate import Bench

_TURN_S = 0.5  # how soon an interrupt is seen


class Desk:
    """Not for several threads: the bench's ``on_event`` and ``beaten`` are called while somebody listens."""

    def __init__(self, ray: Any, bench: Bench) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._ray, self._bench = ray, bench
        self.line = ray.remote(Line).options(num_cpus=0, scheduling_strategy=here).remote()
        self._news = self.line.take.remote()
        self._interrupted = False

    def listen(self, refs: Sequence[Any], timeout_s: float) -> None:
        """Passes on what the nodes say until one of ``refs`` is there, the time is over, or the user interrupts."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._bench.cancel.is_set():
                self.interrupt()
            left_s = deadline - time.monotonic()
            wanted = [self._news, *refs]
            self._ray.wait(wanted, timeout=max(0.0, min(left_s, _TURN_S)))
            there, _ = self._ray.wait(wanted, num_returns=len(wanted), timeout=0)
            if self._news in there:
                self._hear(self._ray.get(self._news))
                self._news = self.line.take.remote()
            if set(there) & set(refs) or left_s <= 0 or (self._bench.cancel.is_set() and not refs):
                return

    def catch_up(self) -> None:
        """Passes on everything that was said before this call: a trial's last events come before its end."""
        for _ in range(2):  # the first answer may be on its way already, and not have the last of it
            self.line.nudge.remote()
            self._hear(self._ray.get(self._news))
            self._news = self.line.take.remote()

    def is_there(self, ref: Any) -> bool:
        """Whether ``ref`` has resolved."""
        return bool(self._ray.wait([ref], timeout=0)[0])

    def get(self, ref: Any) -> Any:
        """What ``ref`` resolves to. Raises NodeLost where worker or node are gone, else what was raised there."""
        from ray import exceptions

        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None
        except exceptions.RayError as error:
            raise NodeLost(_short(error)) from None

    def interrupt(self) -> None:
        """Cancels the trials on all nodes."""
        if not self._interrupted:
            self._interrupted = True
            self.line.cancel.remote()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(self.line)

    def _hear(self, said: Sequence[tuple[int, str, Any, int]]) -> None:
        for trial, name, data, question in said:
            if question:
                self.line.answer.remote(question, self._bench.beaten(data) if name == "beaten" else None)
            else:
                self._bench.of_trial(trial).on_event(name, data)


def _short(error: Exception) -> str:
    """The telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "because" in line or "reason" in line.lower() or "preempt" in line]
    return (telling or lines or [type(error).__name__])[0][:300]
