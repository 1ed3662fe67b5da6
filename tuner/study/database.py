"""A database that several tuners share: how it is opened, what its errors mean, and the locks that tuners take in turn.

The locks are the database's own (advisory locks of PostgreSQL, named locks of MySQL, a locked file beside SQLite):
they end with the connection of whoever holds them, so that a dead tuner holds none.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import EnvironmentFault, UsageError
from tuner.spec.storage import StorageSpec, masked

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import Connection, Engine

CONNECT_S = 10
_EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}


class Away(Exception):
    """The database did not answer: what it should have been told is on disk, and is told later."""


@contextmanager
def answering() -> Iterator[None]:
    """Whatever the database or the way to it comes up with is raised as :class:`Away`."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        raise Away(str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]) from error


class Database:
    """Optuna's storage of a study on a shared database, and its locks."""

    def __init__(self, spec: StorageSpec, study: str, env: Mapping[str, str] = os.environ) -> None:
        """Opens it, making its tables where they are missing. Raises EnvironmentFault where it cannot be reached, or
        its driver is not installed, and UsageError for a URL that names no database."""
        import sqlalchemy.exc

        self.spec, self.study = spec, study
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
            raise EnvironmentFault(
                f"no driver for {self.shown} is installed ({error})", fix=f'pip install "tuner[{extra}]"'
            ) from None
        self._folder = Path(url.database or ".").resolve().parent
        try:
            with answering(), self.turn("open"):  # tables that two tuners make at once are an error
                self.storage = self._open(url.render_as_string(hide_password=False))
        except Away as error:
            raise EnvironmentFault(
                f"the study's database {self.shown} was not reached: {error}",
                fix="Start it or correct storage, then run the same command again; the study folder is untouched.",
            ) from None

    @contextmanager
    def turn(self, what: str, cancel: threading.Event | None = None) -> Iterator[Hold]:
        """Waits until no other tuner of this study holds the lock ``what``. Raises :class:`Away`, also where ``cancel``
        is set first."""
        hold = self.wait(what, cancel)
        try:
            yield hold
        finally:
            hold.release()

    def wait(self, what: str, cancel: threading.Event | None = None) -> Hold:
        """As :meth:`turn`, without a ``with``."""
        pause_s = 0.02
        while (hold := self.try_turn(what)) is None:
            if cancel is not None and cancel.is_set():
                raise Away("interrupted while another tuner had its turn")
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
            return optuna.storages.RDBStorage(
                url,
                {"pool_pre_ping": True, "connect_args": self._arguments()},
                heartbeat_interval=self.spec.heartbeat_s,
                grace_period=self.spec.grace_s,
            )

    def _arguments(self) -> dict[str, Any]:
        return {"timeout": 60} if self.kind == "sqlite" else {"connect_timeout": CONNECT_S}


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
        file = path.open("w")
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
    """One attempt. A holder whose machine is gone without a word is forgotten after about a minute."""
    import sqlalchemy

    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        if kind == "postgresql":
            for name, value in (("idle", 30), ("interval", 10), ("count", 3)):
                connection.execute(sqlalchemy.text(f"SET tcp_keepalives_{name} = {value}"))
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
