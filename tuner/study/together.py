"""How a search ends for several tuners at once: when the budget is spent and nobody's trial is running any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuner.spec.study import MIN_GAIN
from tuner.study.database import Away
from tuner.study.queue import Queue
from tuner.study.store import NOTHING_NEW

if TYPE_CHECKING:
    from tuner.study.peers import Peers

LOOK_S = 0.5  # how often a tuner with nothing to do looks at the ledger
AWAY = "the database is away"


@dataclass(slots=True)
class Together:
    """Runs one tuner's loop until the search is over for all. ``over`` says why no further launch is to be made while
    so many trials are running; it is asked about the trials of all tuners."""

    peers: Peers
    queue: Queue
    over: Callable[[int], str]
    cancel: threading.Event
    _said: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.queue.over = self._over

    def run(self, loop: Callable[[], str]) -> str:
        """Runs ``loop`` again whenever another tuner leaves something to do; returns why the search ended, in words."""
        while True:
            ended = loop()
            if ended in NOTHING_NEW and self.queue.stood_back:
                ended = self._said = AWAY
            if self.cancel.is_set() or ended not in (AWAY, *NOTHING_NEW, self._said):
                return ended
            agreed = self._wait(ended)
            if agreed:
                return agreed

    def stop_reason(self, running: int) -> str:
        """As ``over``, for the loop: counts the others' running trials too."""
        try:
            self._said = self._over(max(running, len(self.peers.running())))
        except Away as error:
            self.peers.away(error)
            self._said = AWAY
        return self._said

    def _over(self, running: int) -> str:
        return self.peers.ended(self._budget) or self.over(running)

    @property
    def _budget(self) -> str:
        budget = self.queue.study.budget
        return repr(budget) + (f" {budget.min_gain:g}" if budget.min_gain != MIN_GAIN else "")

    def _wait(self, ended: str) -> str:
        """Until there is something to launch (empty), or the search is over for all (why)."""
        while not self.cancel.is_set():
            try:
                with self.peers.turn():
                    running, queued = len(self.queue.catch_up().running), self.peers.waiting()
                    why = self._over(running)
                    exhausted = ended in NOTHING_NEW and not queued
                    if not running and (why or exhausted):
                        self.peers.agree(why or ended, self._budget)
                        return why or ended
                    if not why and not exhausted and not self.queue.waits():
                        return ""
            except Away:
                pass
            self.cancel.wait(LOOK_S)
        return "interrupted"
