"""For how long each trial has its GPUs: what budgets, costs and gains per second are reckoned with. An emulated trial's
time is the emulated one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tuner.study.evaluate import Bench


class Stopwatch:
    """By a clock that nobody sets, and without the time for which a launch waited for what others had: that is heard
    on ``bench``, the one that trials must be given."""

    def __init__(self, bench: Bench) -> None:
        self.bench = replace(bench, on_event=self._hear)
        self._tell = bench.on_event
        self._since_s: dict[int, float] = {}
        self._took_s: dict[int, float] = {}

    def start(self, number: int) -> None:
        """The trial has its GPUs, unless it says that it waits for them."""
        self._since_s[number] = time.monotonic()

    def stop(self, number: int) -> None:
        """The trial has given them back."""
        self._took_s[number] = self.seconds(number)

    def seconds(self, number: int) -> float:
        """Until now, or until it stopped; 0 for a trial that never had any."""
        until_now_s = max(0.0, time.monotonic() - self._since_s.get(number, math.inf))
        return self._took_s.get(number, until_now_s)

    def _hear(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "waiting":
            self._since_s[data["trial"]] = math.inf
        elif name == "leased":
            self.start(data["trial"])
        elif name == "took":
            self._took_s[data["trial"]] = data["seconds"]
        self._tell(name, data)
