"""Signs of life for the trials that run here, given to the database that the tuners of a study share."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.study.database import Away, answering
from tuner.study.store import read_json, write_json

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

MARK = ".folder.json"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who runs a trial: a process (its start time in Unix seconds tells it from a later one of the same pid) and the
    study folder it keeps. ``mark`` is the folder's own: machines of one name may have folders at one path."""

    host: str
    pid: int
    started_s: float
    folder: str
    mark: str

    @classmethod
    def this(cls, folder: Path) -> Owner:
        import psutil

        mark = folder / MARK
        if not mark.exists():
            write_json(mark, uuid.uuid4().hex)
        me = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), me, str(folder.resolve()), read_json(mark))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def same_folder(self, other: dict[str, Any]) -> bool:
        """Whether ``other`` kept the same folder: whoever holds its lock now comes after it."""
        same = (other.get("host"), other.get("folder")) == (self.host, self.folder)
        return same and other.get("mark", self.mark) == self.mark  # earlier versions had none


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
        if self._thread.is_alive() and self._thread is not threading.current_thread():  # which may collect its garbage
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
