"""Signs of life for the trials that run here, given to the database that the tuners of a study share."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.study.database import Away, answering

if TYPE_CHECKING:
    from optuna.storages import RDBStorage


@dataclass(frozen=True, slots=True)
class Owner:
    """Who runs a trial: a process (its start time in Unix seconds tells it from a later one of the same pid) and the
    study folder it keeps."""

    host: str
    pid: int
    started_s: float
    folder: str

    @classmethod
    def this(cls, folder: Path) -> Owner:
        import psutil

        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), str(folder.resolve()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def same_folder(self, other: dict[str, Any]) -> bool:
        """Whether ``other`` kept the same folder: whoever holds its lock now comes after it."""
        return (other.get("host"), other.get("folder")) == (self.host, self.folder)


class Pulse:
    """A thread that records a heartbeat for each of its trials every ``interval_s`` seconds.

    ``doubtful`` after the database was away: for a grace period other tuners' silence proves nothing, because they
    could not be heard.
    """

    def __init__(self, storage: RDBStorage, interval_s: float, grace_s: float) -> None:
        self._storage, self._interval_s, self._grace_s = storage, interval_s, grace_s
        self._trials: set[int] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._doubt_until_s = 0.0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, trial_id: int) -> None:
        """Records the first heartbeat at once. Raises :class:`Away`."""
        with answering():
            self._storage.record_heartbeat(trial_id)
        with self._lock:
            self._trials.add(trial_id)

    def drop(self, trial_id: int) -> None:
        with self._lock:
            self._trials.discard(trial_id)

    @property
    def doubtful(self) -> bool:
        return time.monotonic() < self._doubt_until_s

    def missed(self) -> None:
        """The database was away just now."""
        self._doubt_until_s = time.monotonic() + self._grace_s

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self._lock:
                trials = sorted(self._trials)
            try:
                with answering():
                    for trial_id in trials:
                        self._storage.record_heartbeat(trial_id)
                    if not trials:
                        self._storage.get_current_version()
            except Away:
                self.missed()
        self._storage.remove_session()
