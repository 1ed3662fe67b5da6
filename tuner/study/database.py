"""A database that several tuners share: how it is opened, what its errors mean, and the locks that tuners take in turn.

The locks are the database's own (advisory locks of PostgreSQL, named locks of MySQL, a locked file beside SQLite):
they end with the connection of whoever holds them, so that a dead tuner holds none.
"""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import EnvironmentFault, UsageError
from tuner.spec.storage import StorageSpec, masked

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import Connection, Engine

CONNECT_S = 10
SILENT_S = 60  # after which whoever is at the other end of a connection is taken for gone
# What the server is asked for on every connection: a tuner that is suspended, or whose machine is gone without a word,
# must not keep what it had locked, nor what somebody else locked (a dump, a hand in psql) keep the tuners for ever.
_SESSION = {
    "tcp_keepalives_idle": SILENT_S // 2,
    "tcp_keepalives_interval": SILENT_S // 6,
    "tcp_keepalives_count": 3,
    "idle_in_transaction_session_timeout": SILENT_S * 1000,
    "statement_timeout": SILENT_S * 1000,
}
LATE_S = 10.0  # another tuner's turn takes seconds: after that it is worth a word
LEAVE_S = 2.0  # what an interrupted tuner still waits for its turn, to tell what it has
_EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}


class Away(Exception):
    """The database did not answer: what it should have been told is on disk, and is told later. ``denied``: it did, but
    its user may not."""

    denied = False


class Interrupted(Away):
    """The user interrupted while another tuner had its turn."""


@contextmanager
def answering() -> Iterator[None]:
    """Whatever the database or the way to it comes up with is raised as :class:`Away`."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        said = getattr(cause, "orig", None) or cause
        away = Away(str(said).strip().splitlines()[0])
        away.denied = getattr(said, "sqlstate", "") == "42501"
        raise away from error


class Database:
    """Optuna's storage of a study on a shared database, and its locks."""

    def __init__(
        self,
        spec: StorageSpec,
        study: str,
        env: Mapping[str, str] = os.environ,
        say: Callable[[str], None] = lambda _text: None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Opens it, making its tables where they are missing. Waits for a turn are told to ``say`` where they are long,
        and given up soon after ``cancel``. Raises EnvironmentFault where it cannot be reached, or its driver is not
        installed, and UsageError for a URL that names no database."""
        import sqlalchemy.exc

        self.spec, self.study, self._say, self._cancel = spec, study, say, cancel or threading.Event()
        self._asked_s = math.inf  # when the interrupt was first seen here
        address = spec.address(env)
        self.shown = masked(address)
        try:
            url = sqlalchemy.engine.make_url(address)
            self.kind = url.get_backend_name()
            self._locks = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=self._arguments())
        except sqlalchemy.exc.ArgumentError:
            raise UsageError(f"storage is no database's URL: {self.shown!r}") from None
        except ImportError as error:
            extra = _EXTRAS.get(url.get_backend_name(), "postgres")
            fix = f'pip install -e ".[{extra}]" in tuner\'s checkout'
            raise EnvironmentFault(f"no driver for {self.shown} is installed ({error})", fix=fix) from None
        self._settle(self._locks)
        self._folder = Path(url.database or ".").resolve().parent
        with self.starting(), answering(), self.turn("open"):  # tables that two tuners make at once are an error
            self.storage = self._open(url.render_as_string(hide_password=False))

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What keeps a tuner from starting is raised as EnvironmentFault, an interrupt as KeyboardInterrupt."""
        try:
            yield
        except Interrupted:
            raise KeyboardInterrupt from None
        except Away as error:
            fix = "Start it or correct storage, then run the same command again; everything measured is kept"
            if error.denied:
                fix = "Give its user the right (PostgreSQL, for its tables: GRANT CREATE ON SCHEMA public TO user)"
            verb = "refuses" if error.denied else "was not reached"
            raise EnvironmentFault(f"the study's database {self.shown} {verb}: {error}", fix=fix) from None

    @contextmanager
    def turn(self, what: str, patient: bool = False) -> Iterator[Hold]:
        """Waits until no other tuner of this study holds the lock ``what``; ``patient``, without a word and whatever
        happens. Raises :class:`Away`, and :class:`Interrupted`."""
        hold = self._wait(what, patient)
        try:
            yield hold
        finally:
            hold.release()

    def _wait(self, what: str, patient: bool) -> Hold:
        pause_s, began_s, told = 0.02, time.monotonic(), False
        while (hold := self.try_turn(what)) is None:
            now_s = time.monotonic()
            if self._cancel.is_set():
                self._asked_s = min(self._asked_s, now_s)
            if now_s - self._asked_s > LEAVE_S and not patient:
                raise Interrupted("interrupted while another tuner had its turn")
            if now_s - began_s > LATE_S and not (told or patient):
                self._say(f"Another tuner of this study has had its turn for {LATE_S:.0f} s: is it suspended?")
                told = True
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.5)
        return hold

    def try_turn(self, what: str) -> Hold | None:
        """The lock, or None where another tuner holds it. Raises :class:`Away`."""
        if self.kind == "sqlite":
            return FileHold.take(self._folder / f".{self.study}.{what}.lock")
        key = zlib.crc32(f"tuner/{self.study}/{what}".encode())
        with answering():
            return _take(self._locks, self.kind, key)

    def close(self) -> None:
        self.storage.engine.dispose()
        self._locks.dispose()

    def _open(self, url: str) -> RDBStorage:
        import warnings

        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
            storage = optuna.storages.RDBStorage(
                url,
                {"pool_pre_ping": True, "connect_args": self._arguments()},
                heartbeat_interval=self.spec.heartbeat_s,
                grace_period=self.spec.grace_s,
            )
        self._settle(storage.engine)
        storage.engine.dispose()  # the connections that it was opened with
        return storage

    def _settle(self, engine: Engine) -> None:
        """Has the server forget connections of which nobody is heard any more."""
        from sqlalchemy import event

        def ask(connection: Any, _record: object) -> None:
            with connection.cursor() as cursor:
                for name, value in _SESSION.items():
                    cursor.execute(f"SET {name} = {value}")
            connection.commit()

        if self.kind == "postgresql":
            event.listen(engine, "connect", ask)

    def _arguments(self) -> dict[str, Any]:
        if self.kind == "sqlite":
            return {"timeout": 60}
        arguments = {"connect_timeout": CONNECT_S}
        if self.kind == "postgresql":  # a way that swallows what is sent would be waited on for a quarter of an hour
            arguments |= {"tcp_user_timeout": SILENT_S * 1000, "keepalives_idle": SILENT_S // 2}
            arguments |= {"keepalives_interval": SILENT_S // 6, "keepalives_count": 3}
        return arguments


class Hold:
    """A lock of the database that is held; it ends with its connection."""

    def __init__(self, connection: Connection | None) -> None:
        self._connection = connection

    def alive(self) -> bool:
        """Whether it is still held: a database that was restarted forgot it."""
        import sqlalchemy

        try:
            with answering():
                return self._connection is not None and bool(self._connection.execute(sqlalchemy.text("SELECT 1")))
        except Away:
            return False

    def release(self) -> None:
        """Gives it back; does nothing where it is lost already."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                with answering():
                    connection.close()
            except Away:
                connection.invalidate()


class FileHold(Hold):
    """The same on a file, for SQLite on one machine."""

    def __init__(self, file: Any) -> None:
        self._file = file

    @classmethod
    def take(cls, path: Path) -> FileHold | None:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r")
        except PermissionError:  # another user's: to lock it, reading will do
            file = path.open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(file)

    def alive(self) -> bool:
        return not self._file.closed

    def release(self) -> None:
        self._file.close()


def _take(engine: Engine, kind: str, key: int) -> Hold | None:
    """One attempt. A holder whose machine is gone without a word is forgotten after :data:`SILENT_S`."""
    import sqlalchemy

    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        if kind == "postgresql":
            got = connection.execute(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar()
        else:
            got = connection.execute(sqlalchemy.text("SELECT GET_LOCK(:key, 0)"), {"key": f"tuner-{key}"}).scalar()
    except BaseException:
        connection.close()
        raise
    if got:
        return Hold(connection)
    connection.close()
    return None
