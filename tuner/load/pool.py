"""The connections to one server: in use, used before and idle, and open in advance."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from tuner.load.connection import Connection
from tuner.load.poll import Poll
from tuner.load.wire import Target

_IDLE_LIMIT_NS = 2_000_000_000  # servers close idle connections, uvicorn after 5 s: use none that old
_SPARE_MAX = 256


class Pool:
    """``all`` connections by descriptor; ``writing`` of them wait for their socket to take bytes, handshakes included.

    ``unstamped`` is called when a connection turns out to have no kernel stamps. Opening raises OSError.
    """

    def __init__(
        self,
        target: Target,
        addresses: list[tuple[int, tuple]],
        tls: ssl.SSLContext | None,
        poll: Poll,
        unstamped: Callable[[], None],
    ) -> None:
        self._target, self._addresses, self._tls = target, addresses, tls
        self._poll, self._unstamped = poll, unstamped
        self.all: dict[int, Connection] = {}
        self.writing = 0
        self.opening = 0
        self._spares: dict[Connection, None] = {}  # open and never used; both are sets with an order
        self._reusable: dict[Connection, None] = {}
        self._spare = 0

    def open_ahead(self, count: int) -> None:
        """Keeps up to ``count`` connections open in advance, so that no request waits for a handshake."""
        self._spare = min(count, _SPARE_MAX)

    def open_fewer(self, count: int) -> None:
        """From now on keeps at most ``count`` open in advance."""
        self._spare = min(self._spare, count)

    @property
    def full(self) -> bool:
        """Whether as many are open in advance as are to be."""
        return len(self._spares) >= self._spare

    def refill(self, limit: int = _SPARE_MAX) -> None:
        """Begins to open what is missing, at most ``limit``."""
        missing = min(self._spare - len(self._spares) - self.opening, limit)
        try:
            for _ in range(missing):
                self.open()
        except OSError:
            pass  # a request that finds no connection reports the reason

    def open(self) -> Connection:
        family, address = self._addresses[0]
        connection = Connection(address, family, self._tls, self._target.host)
        self.all[connection.fd] = connection
        self._poll.add(connection.fd, None, write=True)
        self.opening += 1
        self.writing += 1
        if not connection.stamped:
            self._unstamped()
        return connection

    def look(self, connection: Connection) -> None:
        """After something was done with a connection: whether it is open now, and whether it has more to write."""
        if connection.ready and not connection.announced:
            connection.announced = True
            self.opening -= 1
            if connection.number < 0:
                self._spares[connection] = None
        if connection.wants_write != connection.polled_write:
            connection.polled_write = not connection.polled_write
            self.writing += 1 if connection.polled_write else -1
            self._poll.modify(connection.fd, connection.polled_write)

    def idle(self, now: int) -> Connection | None:
        """An idle connection that the server will not have given up."""
        while self._reusable:
            connection, _ = self._reusable.popitem()  # the latest first: it is the least likely to be closed
            if now - connection.idle_ns < _IDLE_LIMIT_NS:
                return connection
            self.drop(connection)
        return self.unused()

    def unused(self) -> Connection | None:
        """An open connection that was never used."""
        return self._spares.popitem()[0] if self._spares else None

    def back(self, connection: Connection, now: int) -> None:
        """A connection of which the response has ended: for another request, where the server keeps it."""
        if connection.keep:
            connection.number, connection.reused, connection.idle_ns = -1, True, now
            self._reusable[connection] = None
        else:
            self.drop(connection)

    def refused(self) -> None:
        """One could not be opened in advance: does not knock again and again."""
        self._spare = max(0, self._spare - 1)

    def drop(self, connection: Connection) -> None:
        if self.all.pop(connection.fd, None) is not None:
            if not connection.announced:
                self.opening -= 1
            self.writing -= connection.polled_write
            self._spares.pop(connection, None)
            self._reusable.pop(connection, None)
            self._poll.remove(connection.fd)
            connection.close()
