"""One non-blocking HTTP connection: writes, reads with the kernel's receive time, knows where its response ends."""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import sys

_READ_BYTES = 65_536
_SO_TIMESTAMPNS = 35  # SO_TIMESTAMPNS and SCM_TIMESTAMPNS on Linux, which Python's socket module does not name
_ANCILLARY_BYTES = socket.CMSG_SPACE(16)
_TIMESPEC = struct.Struct("qq")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")


class Connection:
    """``number`` is the request under way, -1 for none; ``ready`` is true once the handshakes are done.

    Methods raise OSError where the connection is broken.
    """

    __slots__ = (
        "_connected",
        "_framing",
        "_head",
        "_need",
        "_recvmsg",
        "_tail",
        "_tls",
        "_unsent",
        "_waiting",
        "_wire_in",
        "_wire_out",
        "announced",
        "fd",
        "idle_ns",
        "keep",
        "number",
        "plain",
        "polled_write",
        "ready",
        "received",
        "reused",
        "sock",
        "stamped",
    )

    def __init__(self, address: tuple, family: int, tls: ssl.SSLContext | None, host: str) -> None:
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stamped = False
        if sys.platform.startswith("linux"):
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                self.stamped = True
            except OSError:
                pass  # the read time then stands in for it, and the records say so
        self.fd = self.sock.fileno()
        self.number = -1
        self.ready = False
        self.announced = False  # for the event loop: whether it knows that this is ready
        self.polled_write = True  # for the event loop: whether it waits for the socket to take bytes
        self.reused = False
        self.keep = True
        self.idle_ns = 0
        self.plain = self.stamped and tls is None
        self._recvmsg = self.sock.recvmsg
        self._connected = False
        self._unsent = memoryview(b"")
        self._waiting = b""  # a request that waits for the TLS handshake
        self._tls = None
        if tls:
            self._wire_in, self._wire_out = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = tls.wrap_bio(self._wire_in, self._wire_out, server_hostname=host)
        self._reset()
        code = self.sock.connect_ex(address)
        if code not in (0, 115, 36, 10035):  # EINPROGRESS on Linux, macOS, Windows
            self.sock.close()
            raise OSError(code, os.strerror(code))

    def _reset(self) -> None:
        self._framing = ""
        self._head = b""
        self._need = 0
        self._tail = b""
        self.received = 0

    def assign(self, number: int, request: bytes) -> None:
        """The request to send; :meth:`write` sends it as far as the socket takes it."""
        self._reset()
        self.number = number
        if self._tls is None:
            self._unsent = memoryview(request)
        elif self.ready:
            self._tls.write(request)
            self._collect()
        else:
            self._waiting = request

    @property
    def wants_write(self) -> bool:
        """Whether there is something that waits for the socket to take bytes."""
        return not self._connected or len(self._unsent) > 0

    def write(self) -> None:
        """Goes on with what is to be written: the connection's set-up, then the request."""
        if not self._connected:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            try:
                self.sock.getpeername()
            except OSError:
                return  # not yet
            self._connected = True
            if self._tls:
                self._shake()
            else:
                self.ready = True
        while len(self._unsent):
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                return
            self._unsent = self._unsent[sent:]

    def _shake(self) -> None:
        """One step of the TLS handshake; after the last, the request that waited for it."""
        if self._tls is None:
            return
        try:
            self._tls.do_handshake()
            self.ready = True
        except ssl.SSLWantReadError:
            pass
        if self.ready and self._waiting:
            self._tls.write(self._waiting)
            self._waiting = b""
        self._collect()

    def _collect(self) -> None:
        """What TLS has to say goes behind what is still unsent."""
        if self._wire_out.pending:
            self._unsent = memoryview(bytes(self._unsent) + self._wire_out.read())

    def read(self) -> tuple[bytes, int]:
        """Next bytes and the kernel's receive time of the last of them (CLOCK_REALTIME, ns; 0 where there is none).

        ``b""`` is the end of the stream. Raises BlockingIOError where nothing is to be read.
        """
        if not self._connected:
            raise BlockingIOError
        data, stamp = self.receive() if self.stamped else (self.sock.recv(_READ_BYTES), 0)
        if self._tls and data:
            data = self._decrypt(data)
        return data, stamp

    def receive(self) -> tuple[bytes, int]:
        """As :meth:`read`, of a connected socket with stamps, TLS or not still in it: all that a ``plain`` connection
        needs."""
        data, ancillary, _, _ = self._recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
        for _, kind, value in ancillary:
            if kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(value)
                return data, seconds * 1_000_000_000 + nanoseconds
        return data, 0

    def _decrypt(self, data: bytes) -> bytes:
        tls = self._tls
        if tls is None:
            return data
        self._wire_in.write(data)
        if not self.ready:
            self._shake()
            self.write()
        pieces = []
        if self.ready:
            try:
                while piece := tls.read(_READ_BYTES):
                    pieces.append(piece)
            except ssl.SSLWantReadError:
                if not pieces:
                    raise BlockingIOError from None
            except ssl.SSLZeroReturnError:
                pass  # the end of the stream, politely
        elif not pieces:
            raise BlockingIOError
        return b"".join(pieces)

    def ended(self, data: bytes) -> bool:
        """Whether ``data`` brings the response to its end.

        For chunked bodies this looks for the last chunk at the end of what was read, which an event stream cannot
        hold otherwise (JSON escapes line ends); the parser that reads the bytes afterwards decides whether the
        response was whole.
        """
        if self._framing == "chunked":
            tail = data[-7:] if len(data) >= 7 else (self._tail + data)[-7:]
            self._tail = tail
            return tail == b"\r\n0\r\n\r\n"
        if self._framing == "length":
            self._need -= len(data)
            return self._need <= 0
        if self._framing == "close":
            return False
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return False
        if self._head[9:10] == b"1":  # an interim response
            data, self._head = self._head[end + 4 :], b""
            return self.ended(data) if data else False
        headers, body, self._head = self._head[:end].lower(), self._head[end + 4 :], b""
        self.keep = b"connection: close" not in headers and headers.startswith(b"http/1.1")
        length = _LENGTH.search(headers)
        if b"chunked" in headers:
            self._framing, body = "chunked", b"\r\n" + body
        elif length:
            self._framing, self._need = "length", int(length.group(1))
        else:
            self._framing, self.keep = "close", False
        return self.ended(body)

    def close(self) -> None:
        self.sock.close()
