"""The recorder: one thread that keeps MLflow up to date with the study folder, and never costs the study anything.

The folder is the spool: what a dead server, a kill or a slow disk kept from MLflow is logged by the next flush, at the
latest by ``tuner sync``.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tuner.record.ledger import Ledger, note_file
from tuner.record.note import markdown
from tuner.record.place import place
from tuner.record.writer import elsewhere, flush
from tuner.spec.study import Study
from tuner.study.store import Store

RETRY_S = 60.0


class Recorder:
    """Told of what happened; every method returns at once (but :meth:`close`) and raises nothing.

    ``retry_s``: how long after a failed attempt the next is made, where no trial ends before. ``turn``: a lock that
    is held while MLflow is written, where several tuners share the study's run. ``say`` is told, from another thread,
    when MLflow ceases to be written: who reads it hours later can mend nothing any more.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        *,
        retry_s: float = RETRY_S,
        env: Mapping[str, str] = os.environ,
        turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._turn, self._say = turn, say
        self._study, self._store, self._retry_s = study, store, retry_s
        self._place = place(study, env)
        self._wake: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._problem = ""
        self._earlier = ""  # the note that it was finished with, until something new ends

    def start(self) -> None:
        """Starts the writer; it imports MLflow and opens the parent run while the first server boots."""
        note = note_file(self._store.folder)
        if note.exists():  # a study that goes on has not ended
            self._earlier = note.read_text(encoding="utf-8", errors="replace")
            note.unlink()
        self._thread.start()
        self._wake.put("start")

    def trial_finished(self, number: int) -> None:
        """Trial ``number`` is on disk."""
        self._earlier = ""
        self._wake.put(f"trial {number}")

    def study_finished(self, note: str = "") -> None:
        """The study has ended (not: was interrupted). ``note`` is the parent's page in markdown; made from the study
        folder where it is empty."""
        self._earlier = ""
        try:
            text = note or markdown(self._store, self._study)
            note_file(self._store.folder).write_text(text, encoding="utf-8")
        except Exception as error:
            self._note_problem(error)
        self._wake.put("end")

    def close(self, timeout_s: float = 30.0) -> str:
        """Waits until everything is logged, at most ``timeout_s``; returns in words what was left (empty: nothing)."""
        if not self._thread.is_alive():
            return self._left()
        if self._earlier:
            with suppress(OSError):
                note_file(self._store.folder).write_text(self._earlier, encoding="utf-8")
        self._wake.put("close")
        self._thread.join(timeout_s)
        return self._left()

    def _work(self) -> None:
        closing = False
        while not closing:
            try:
                words = {self._wake.get(timeout=self._retry_s if self._problem else None)}
            except queue.Empty:
                words = {"retry"}
            while not self._wake.empty():
                words.add(self._wake.get_nowait())
            closing = "close" in words
            try:
                with self._turn():
                    flush(self._study, self._store, self._place, running=not closing, end="KILLED" if closing else "")
                self._problem = ""
            except Exception as error:  # whatever MLflow, its database or the network came up with
                if not self._problem and not closing:  # then it is said with what is left
                    self._say(
                        f"MLflow at {self._place.shown}: {self._place.words(error)[:200]}. It gets the trials later"
                    )
                self._note_problem(error)

    def _note_problem(self, error: Exception) -> None:
        problem = f"{type(error).__name__}: {self._place.words(error)}"[:500]
        if problem != self._problem:
            self._problem = problem
            with suppress(OSError):
                self._store.log("mlflow", problem=problem, uri=self._place.shown)

    def _left(self) -> str:
        try:
            waiting = unsent(self._study, self._store)
        except Exception as error:
            return f"MLflow: {self._place.words(error)}"
        if not waiting and not self._problem:
            return ""
        why = f" ({self._problem})" if self._problem else ""
        return (
            f"{waiting} trial(s) are not in MLflow at {self._place.shown} yet{why}. They are safe in the study folder; "
            f"send them with: tuner sync {self._store.folder}"
        )


def unsent(study: Study, store: Store, env: Mapping[str, str] = os.environ) -> int:
    """How many finished trials the study's MLflow store does not have."""
    sent = Ledger.load(store.folder).sent(place(study, env).uri)
    return sum(str(trial.number) not in sent.trials for trial in store.trials() if not elsewhere(trial))


def _at_work(folder: Path) -> bool:
    """Whether a tuner holds the study (:func:`tuner.study.session.opened`)."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def sync(study: Study, store: Store, *, env: Mapping[str, str] = os.environ) -> str:
    """Logs whatever is missing, and says so; ends the parent run where no tuner is at work on the study. Raises
    EnvironmentFault where the store cannot be reached or written."""
    from tuner.errors import EnvironmentFault

    where = place(study, env)
    try:
        logged = flush(study, store, where, end="" if study.storage or _at_work(store.folder) else "KILLED")
    except EnvironmentFault:
        raise  # of the study folder
    except Exception as error:
        mend = "Start it" if where.server else "Mend it, or move it away"
        mend += " (no run is in it)" if where.blank() else ""
        raise EnvironmentFault(
            f"MLflow at {where.shown} was not reached: {where.words(error)}",
            fix=f"{mend}, or name another store with --to, then run the same command again; nothing is lost.",
        ) from error
    return f"{logged} trial(s) logged to {where.shown}" if logged else f"{where.shown} has every trial already"
