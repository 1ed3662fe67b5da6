"""What goes over the wire: where the server is, which request it understands, and the request's bytes."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tuner.errors import UsageError


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address, taken apart: ``path`` is what precedes ``/v1`` (usually empty)."""

    host: str
    port: int
    path: str
    tls: bool

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """Not connected yet; every read may take ``timeout_s`` (:func:`deadline` is for all of them)."""
        if self.tls:
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=tls_context())
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)


def target(url: str) -> Target:
    """``http://127.0.0.1:8000`` (with or without ``/v1``) as a Target. Raises UsageError on anything else."""
    fix = "Write for example http://127.0.0.1:8000"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port, host = parts.port, (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError as error:  # a UnicodeError is one: a label that is empty, too long, or none in any language
        raise UsageError(f"bad URL {url!r}: {error}", fix=fix) from error
    if "@" in parts.netloc:  # not shown: it may be a password
        fix = "Leave that out; a key is given with --api-key (of an attached server: engine.options.api_key_env)"
        raise UsageError("bad URL: it names a user", fix=fix)
    sound = port != 0 and re.fullmatch(r"[\w.-]+|[0-9a-f:.]+(%[\w.-]+)?", host, re.ASCII)
    sound = sound and re.fullmatch(r"[!-~]*", parts.path)
    if not sound or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(f"bad URL {url!r}", fix=fix)
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    tls = parts.scheme == "https"
    return Target(host, port or (443 if tls else 80), path, tls)


def tls_context() -> ssl.SSLContext:
    """Certificates are checked as everywhere; ``SSL_CERT_FILE`` names a private authority."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@contextmanager
def deadline(connection: http.client.HTTPConnection, timeout_s: float) -> Iterator[None]:
    """Connects, and raises ``TimeoutError`` where what follows has not ended in time: a connection's own limit is for
    each read, and whoever sends a little for ever answers every read in time."""
    until_s = time.monotonic() + timeout_s
    connection.connect()
    link = connection.sock  # which the connection forgets when an answer says that it will be closed
    timer = threading.Timer(max(0.0, until_s - time.monotonic()), _shut, [link])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if time.monotonic() >= until_s:  # what was read until then may look like a whole answer
            raise TimeoutError


def _shut(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one server takes, as the probe found it.

    ``route``: ``completions`` or ``chat``. ``prompt``: ``ids`` (exact prompts) or ``text``. ``counting`` says how
    tokens are told apart from chunks: ``usage`` (every chunk carries the running count), ``ids`` (every chunk carries
    its token ids), ``total`` (only the last chunk tells how many there were), ``chunks`` (nothing does). ``forced`` is
    false where the server refuses ``ignore_eos`` and ``min_tokens``, so that output lengths are the model's own.
    """

    model: str
    route: str = "completions"
    prompt: str = "ids"
    counting: str = "usage"
    forced: bool = True
    max_tokens_name: str = "max_tokens"

    @property
    def notes(self) -> tuple[str, ...]:
        """In words what is less exact than it could be; empty for a server that takes everything."""
        notes = []
        if self.counting == "total":
            notes.append("the server tells only the total of tokens: they are spread evenly over the chunks")
        if self.counting == "chunks":
            notes.append("the server tells no number of tokens: each chunk is counted as one, however many it holds")
        if not self.forced:
            notes.append("the server takes no ignore_eos: output lengths are the model's own")
        return tuple(notes)


@dataclass(frozen=True, slots=True)
class Writer:
    """Turns prompts into complete HTTP requests for one server and dialect."""

    target: Target
    dialect: Dialect
    api_key: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = True
    _known: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def request(self, prompt: Sequence[int] | str, output_tokens: int) -> bytes:
        """Head and body for ``prompt`` (token ids, or text), asking for ``output_tokens`` tokens."""
        if isinstance(prompt, str):
            text = json.dumps(prompt)
        else:
            text = "[" + ",".join(map(str, prompt)) + "]"
        return self._head_and_body(text, output_tokens)

    def _head_and_body(self, prompt: str, output_tokens: int) -> bytes:
        chat = self.dialect.route == "chat"
        # the prompt is written by hand: it is nearly all of the body, and already text
        key = '"messages":[{"role":"user","content":' + prompt + "}]" if chat else '"prompt":' + prompt
        body = (self._fields(output_tokens) + key + "}").encode()
        path = f"{self.target.path}/v1/{'chat/completions' if chat else 'completions'}"
        return post(self.target, path, body, self.api_key)

    def _fields(self, output_tokens: int) -> str:
        """The body's beginning: everything but the prompt, which differs by nothing but the output's length."""
        if (known := self._known.get(output_tokens)) is not None:
            return known
        dialect = self.dialect
        fields: dict[str, Any] = {"model": dialect.model, "stream": True}
        fields.update(self.sampling)
        fields[dialect.max_tokens_name] = output_tokens
        fields["stream_options"] = {"include_usage": True}
        if dialect.counting == "usage":
            fields["stream_options"]["continuous_usage_stats"] = True
        elif dialect.counting == "ids":
            fields["return_token_ids"] = True
        if self.forced and dialect.forced:
            fields["ignore_eos"] = True
            fields["min_tokens"] = output_tokens
        text = self._known[output_tokens] = json.dumps(fields, separators=(",", ":"))[:-1] + ","
        return text


def post(target: Target, path: str, body: bytes, api_key: str = "") -> bytes:
    """A complete POST of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {target.authority}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nUser-Agent: tuner\r\n{_auth(api_key)}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body


def get(target: Target, path: str, api_key: str = "") -> bytes:
    """A complete GET."""
    return (
        f"GET {target.path}{path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: tuner\r\n{_auth(api_key)}\r\n"
    ).encode("latin-1")


def checked_key(api_key: str, where: str) -> str:
    """``api_key`` without the line end that a file leaves behind it. Raises UsageError where it cannot be one."""
    key = api_key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise UsageError(
            "the API key has blanks or characters outside ASCII", where=where, fix="Is it the key, and nothing else?"
        )
    return key


def _auth(api_key: str) -> str:
    return f"Authorization: Bearer {api_key}\r\n" if api_key else ""
