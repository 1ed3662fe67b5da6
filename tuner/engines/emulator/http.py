"""HTTP/1.1 for the emulator, on the event loop's bare transports: requests in, responses and event streams out."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    """One request: method, path without query, headers in lower case, body."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """One client connection, kept alive; requests on it are answered one after the other.

    ``handle(request, connection)`` answers through :meth:`reply`, or opens a stream that :meth:`end_stream` ends.
    ``on_close`` is set by whoever wants to know that the client went away.
    """

    def __init__(self, handle: Callable[[Request, Connection], None]) -> None:
        self._handle = handle
        self._buffer = bytearray()
        self._busy = False
        self.transport: asyncio.Transport | None = None
        self.on_close: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=2**22)  # type: ignore[attr-defined]
        # Without it a token waits up to 40 ms for the acknowledgement of the one before.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.on_close:
            self.on_close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        while not self._busy:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length") or 0)
            if len(self._buffer) < end + 4 + length:
                if headers.get("expect") == "100-continue" and len(self._buffer) == end + 4:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            method, _, rest = first.partition(" ")
            self._busy = True
            self._handle(Request(method, rest.split(" ")[0].partition("?")[0], headers, body), self)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def reply(self, status: int, body: object = b"", kind: str = "application/json") -> None:
        """Answers the request that is being handled."""
        data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\nserver: uvicorn\r\ncontent-length: {len(data)}\r\n"
        )
        self.write(head.encode() + (f"content-type: {kind}\r\n\r\n".encode() if data else b"\r\n") + data)
        self._done()

    def end_stream(self) -> None:
        """Ends the event stream of the request that is being handled."""
        self.write(STREAM_END)
        self._done()

    def _done(self) -> None:
        self._busy = False
        self.on_close = None
        if self._buffer:
            self._next()

    def reset(self) -> None:
        """Cuts the connection without a word."""
        if self.transport is not None:
            self.transport.abort()


def chunk(data: bytes) -> bytes:
    """``data`` as one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)
