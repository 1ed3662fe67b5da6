"""One non-blocking HTTP connection: writes, reads with the kernel's receive time, knows where its response ends."""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
from array import array
from collections.abc import Callable

READ_BYTES = 65_536
_SO_TIMESTAMPNS = 35  # SO_TIMESTAMPNS and SCM_TIMESTAMPNS on Linux, which Python's socket module does not name
ANCILLARY_BYTES = socket.CMSG_SPACE(16)
_STAMP_BYTES = 16  # of a struct timespec
NO_STAMP = bytes(_STAMP_BYTES)
EVENT_END = b"\n\n\r\n"  # of an event that ends with its chunk
_BODY_END = re.compile(rb"\r\n0+[ \t]*(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n\Z")  # extensions, trailers
_TAIL_BYTES = 512
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})")


Stream = tuple[Callable, Callable]
Wake = list[int]  # since when bytes may have lain unread, the wall clock - the monotonic one, when they were read; ns


class Connection:
    """``number`` is the request under way, -1 for none; ``ready`` is true once the handshakes are done.

    What was read waits in ``kept``, three things for each: the bytes, the kernel's stamp of the last of them (as the
    kernel gave it; NO_STAMP), and the :data:`Wake` of the event loop that found them. ``streaming`` is true in the
    middle of a chunked body on a plain connection: a read that ends with EVENT_END needs nothing but to be kept, and
    ``stream`` has what that takes.

    Methods raise OSError where the connection is broken.
    """

    __slots__ = (
        "_connected",
        "_farewell",
        "_framing",
        "_head",
        "_need",
        "_tail",
        "_tls",
        "_unsent",
        "_waiting",
        "_wire_in",
        "_wire_out",
        "announced",
        "fd",
        "gathered",
        "idle_ns",
        "keep",
        "kept",
        "number",
        "plain",
        "polled_write",
        "ready",
        "received",
        "reused",
        "sock",
        "stamped",
        "stream",
        "streaming",
    )

    def __init__(self, address: tuple, family: int, tls: ssl.SSLContext | None, host: str) -> None:
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stamped = False
        if sys.platform.startswith("linux") and sys.maxsize > 2**32:  # a timespec of two 64-bit numbers
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
        self.kept: list = []
        self.stream: Stream = (self.sock.recvmsg, self.kept.extend)
        self._connected = False
        self._farewell = False  # whether TLS said that nothing more comes; the TCP connection may stay open for long
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
        self.streaming = False
        self.received = False
        self.gathered = False  # whether some of the response was handed on already
        self.kept.clear()

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

    def read(self) -> tuple[bytes, bytes]:
        """Next bytes and the kernel's stamp of the last of them.

        ``b""`` is the end of the stream. Raises BlockingIOError where nothing is to be read.
        """
        if not self._connected:
            raise BlockingIOError
        if not self.stamped:
            data, ancillary = self.sock.recv(READ_BYTES), []
        else:
            data, ancillary, _, _ = self.sock.recvmsg(READ_BYTES, ANCILLARY_BYTES)
        return self._decrypt(data) if self._tls and data else data, stamp_in(ancillary)

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
                while piece := tls.read(READ_BYTES):
                    pieces.append(piece)
                self._farewell = True
            except ssl.SSLWantReadError:
                if not pieces:
                    raise BlockingIOError from None
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
            before = EVENT_END if self.kept and self.kept[-3].endswith(EVENT_END) else self._tail
            self._tail = (before + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            return self._tail.endswith(b"\r\n\r\n") and _BODY_END.search(self._tail) is not None
        if self._framing == "length":
            self._need -= len(data)
            return self._need <= 0
        if self._framing == "close":
            return self._farewell
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return False
        status = self._head[9:12]
        if status[:1] == b"1":  # an interim response
            data, self._head = self._head[end + 4 :], b""
            return self.ended(data) if data else False
        headers, body, self._head = self._head[:end].lower(), self._head[end + 4 :], b""
        self.keep = b"connection: close" not in headers and headers.startswith(b"http/1.1")
        length = _LENGTH.search(headers)
        if b"chunked" in headers:
            self._framing, body = "chunked", b"\r\n" + body
            self.streaming = self.plain and not self.wants_write  # the request may still be on its way
        elif length or status in (b"204", b"304"):  # of which these have no body
            self._framing, self._need = "length", int(length.group(1)) if length else 0
        else:
            self._framing, self.keep = "close", False
        return self.ended(body)

    def middle(self, ended: bool) -> tuple[int, int, list[int]]:
        """For :meth:`Hold.saw`, of what is kept: without the first read of a response, which brings the head, and often
        a role but no token, and without the last, which brings what follows the last token."""
        first, last = 3 * (not self.gathered), len(self.kept) - 3 * ended
        reads = self.kept[first:last:3]
        joined = b"".join(reads).count(b"\ndata:") - len(reads)
        stamps_ns = stamps(b"".join(self.kept[2 * first + 1 : last - 9 * ended : 3]))  # those may follow at once
        return len(reads), max(0, joined), stamps_ns

    def gather(self) -> tuple[bytes, list[Wake], list[int], bytes]:
        """What is kept, and is no longer: the stamps end to end, the wakes, the reads' sizes, the bytes end to end."""
        kept = self.kept
        parts = kept[0::3]
        taken = b"".join(kept[1::3]), kept[2::3], list(map(len, parts)), b"".join(parts)
        if parts[-1].endswith(EVENT_END):
            self._tail = EVENT_END
        kept.clear()
        self.gathered = True
        return taken

    def close(self) -> None:
        self.sock.close()


def stamp_in(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The kernel's stamp in what ``recvmsg`` gives beside the bytes; NO_STAMP where there is none."""
    for _, kind, value in ancillary:
        if kind == _SO_TIMESTAMPNS and len(value) == _STAMP_BYTES:
            return value
    return NO_STAMP


def stamps(packed: bytes) -> list[int]:
    """The times (CLOCK_REALTIME, ns) of kernel stamps that lie end to end; 0 for NO_STAMP."""
    numbers = array("q")
    numbers.frombytes(packed)
    return [seconds * 1_000_000_000 + ns for seconds, ns in zip(numbers[0::2], numbers[1::2], strict=True)]
