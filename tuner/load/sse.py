"""The parser of one streamed response: HTTP/1.1 head, transfer coding, server-sent events, tokens.

It is fed pieces of the byte stream as they were read, each with its time, and gives the same tokens however the
stream was split. It runs outside the process that reads the sockets.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence

from tuner.load import alike
from tuner.load.alike import NO_CHOICES, USAGE

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[^\r\n]*")
_PROMPT_USAGE = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,9})(?!\d)')
_MOST_TOKENS = 9_999_999  # beyond which a count is none
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\r\n\n|\n\r\n")
_LINE_END = re.compile(rb"\r\n|\n|\r")
CUT_OFF = "response cut off"
BROKEN_OFF = ("abort", "error")  # reasons to finish that are none: vLLM's and SGLang's
_MANY = 5  # reads, for which it pays to look at them together first
_MAX_HEAD_BYTES = 65_536
_MAX_ERROR_BYTES = 4_096
_MAX_EVENT_BYTES = 1 << 20  # what waits for its end is looked through again with every read
_MAX_CHUNK_BYTES = 1 << 24


class Response:
    """One response as it comes in.

    ``counting`` is the dialect's. ``counts[k]`` tokens came at ``times[k]`` (the time given with the piece of bytes
    that completed their event); ``tokens`` has both, as ``[time, count]``. ``status`` is 0 before the head; ``error``
    is empty, or what went wrong in words; ``complete`` is true once the body has ended by its own framing; ``done``
    once the server said that nothing more comes.
    ``seen`` is their number until now; ``by_chunk`` is true where ids were asked for and a chunk that had none counted
    as one token. ``prompt_tokens`` and ``output_tokens`` are the server's own counts, None where
    it gave none.
    """

    __slots__ = (
        "_buffer",
        "_events",
        "_framing",
        "_need",
        "_plain",
        "_stage",
        "_time",
        "by_chunk",
        "complete",
        "counting",
        "counts",
        "done",
        "error",
        "output_tokens",
        "prompt_tokens",
        "seen",
        "status",
        "times",
    )

    def __init__(self, counting: str) -> None:
        self.counting = counting
        self.times: list[int] = []
        self.counts: list[int] = []
        self.status = 0
        self.error = ""
        self.complete = False
        self.done = False
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self._stage = "head"
        self._framing = ""
        self._plain = False  # within a chunked body whose events tell the running count
        self._need = 0
        self._buffer = b""  # bytes of the transfer coding not yet understood
        self._events = b""  # the beginning of an event whose end has not come
        self.seen = 0
        self.by_chunk = False
        self._time = 0

    @property
    def tokens(self) -> list[list[int]]:
        return [[time, count] for time, count in zip(self.times, self.counts, strict=True)]

    def feed(self, time: int, data: bytes) -> int:
        """Takes the next bytes, read at ``time``; returns how many events with tokens they completed."""
        if self._plain and not self._buffer and not self._events and self._one(time, data):
            return 1
        before = len(self.times)
        self._time = time
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self._stage == "head":
            data = self._head(data)
        if self._stage == "body":
            if self._framing == "chunked":
                self._chunks(time, data)
            elif self._framing == "length":
                self._take(time, data[: self._need])
                self._need -= len(data)
                if self._need <= 0 and self._stage == "body":
                    self._end()
            else:
                self._take(time, data)
        return len(self.times) - before

    def feed_all(self, times: Sequence[int], sizes: Sequence[int], data: bytes) -> list[int]:
        """:meth:`feed` of successive reads, which lie end to end in ``data``; what each call would return."""
        events: list[int] = []
        at, n = 0, len(sizes)
        while len(events) < n:
            k = len(events)
            if k < 2 and n - k >= _MANY and self._plain and not self._buffer and not self._events:
                for last in (n, n - 1):  # what ends a response is of another kind
                    size = sum(sizes[k:last])
                    if size and (found := alike.counts(sizes[k:last], data[at : at + size], self.seen)):
                        self.times += times[k:last]
                        self.counts += found
                        self.seen += sum(found)
                        events += [1] * (last - k)
                        at += size
                        break
                if (k := len(events)) == n:
                    break
            events.append(self.feed(times[k], data[at : at + sizes[k]]))
            at += sizes[k]
        return events

    def _one(self, time: int, data: bytes) -> bool:
        """Takes ``data`` where it is what nearly every read is: one chunk that holds one event that brings tokens and
        tells how many there are. Anything else is left alone."""
        at = data.find(b"\r\ndata:", 0, 10)
        if at < 1 or not data.endswith(b"\n\n\r\n") or data.count(b"\n") != 4 or data.count(b"\r") != 2:
            return False
        match = USAGE.match(data, data.rfind(b'"completion_tokens"'))
        try:
            if not match or int(data[:at], 16) != len(data) - at - 4:
                return False
        except ValueError:
            return False
        total = int(match[1])
        if total <= self.seen or data.startswith(NO_CHOICES, data.find(b'"choices"', at)):
            return False
        self._came(time, total - self.seen)
        return True

    def _came(self, time: int, count: int) -> None:
        self.times.append(time)
        self.counts.append(count)
        self.seen += count

    def close(self) -> None:
        """The connection ended: the end of a body without framing, and a truncation of any other."""
        if self._stage == "body" and self._framing == "close":
            self._end()
        if not self.complete and not self.error:
            self.error = "connection closed before the response" if not self.status else CUT_OFF

    def _head(self, data: bytes) -> bytes:
        status = 0
        while status < 200:  # interim responses precede the real one
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                if len(data) > _MAX_HEAD_BYTES or (len(data) >= 7 and not data.startswith(b"HTTP/1.")):
                    self._fail("the answer is not HTTP/1.1")
                return b""
            match = _STATUS.match(data)
            if not match:
                self._fail("the answer is not HTTP/1.1")
                return b""
            status = int(match.group(1))
            head, data = data[match.end() : end], data[end + 4 :]
        self.status = status
        headers = head.lower()
        length = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,18})", headers)
        if re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", headers):
            self._framing = "chunked"
        elif length:
            self._framing, self._need = "length", int(length.group(1))
        else:
            self._framing = "close"
        self._stage = "body"
        self._plain = status == 200 and self._framing == "chunked" and self.counting == "usage"
        return data

    def _chunks(self, time: int, data: bytes) -> None:
        at, size = 0, len(data)
        while at < size:
            line = data.find(b"\r\n", at)
            if line < 0:
                break
            try:
                length = int(data[at:line].partition(b";")[0], 16)
            except ValueError:
                length = -1
            if length < 0:
                self._fail("bad chunk in the response")
                return
            if length == 0:  # trailers, if any, up to an empty line
                if data[line : line + 4] == b"\r\n\r\n" or data.find(b"\r\n\r\n", line) >= 0:
                    self._end()
                    return
                break
            end = line + 2 + length
            if end + 2 > size:
                break
            self._take(time, data[line + 2 : end])
            at = end + 2
            if self._stage != "body":
                return
        self._buffer = data[at:]
        if len(self._buffer) > _MAX_CHUNK_BYTES:
            self._fail("a chunk of over 16 MB in the response")

    def _take(self, time: int, data: bytes) -> None:
        """Payload: server-sent events, or an error's body."""
        if self.status != 200:
            self._events = (self._events + data)[:_MAX_ERROR_BYTES]
            return
        if self._events:
            data = self._events + data
            self._events = b""
        # nearly every payload is exactly one event
        if data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            self._event(time, data[:-2])
            return
        at = 0
        for match in _EVENT_END.finditer(data):
            # a piece that ends in "\r" may yet turn out to be the first half of "\r\n"
            self._event(time, data[at : match.start()])
            at = match.end()
        self._events = data[at:]
        if len(self._events) > _MAX_EVENT_BYTES:
            self._fail("over 1 MB without the end of an event")

    def _event(self, time: int, event: bytes) -> None:
        if b"\n" in event or b"\r" in event or not event.startswith(b"data:"):
            lines = _LINE_END.split(event.removeprefix(codecs.BOM_UTF8))  # which a stream may begin with
            lines = [line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:")]
            if not lines:
                return  # a comment, or another field
            data = b"\n".join(lines)
        else:
            data = event[5:].lstrip(b" ")
        if data == b"[DONE]":
            self.done = True
            return
        if self.counting == "usage":
            match = USAGE.match(data, max(0, data.rfind(b'"completion_tokens"')))
            if match:
                total = int(match.group(1))
                if data.startswith(NO_CHOICES, max(0, data.find(b'"choices"'))):
                    self._totals(data, total)
                    return
                if total > self.seen:
                    self._came(time, total - self.seen)
                    return
        self._slow(time, data)

    def _slow(self, time: int, data: bytes) -> None:
        """An event that a byte search cannot settle."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            self.error = self.error or "an event is not JSON"
            return
        if not isinstance(event, dict):
            return
        if event.get("error") or "error" in (event.get("object"), event.get("type")):
            self.error = self.error or _message(event.get("error") or event)
            return
        count, choices = 0, event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                ids = choice.get("token_ids") if self.counting == "ids" else None
                told = isinstance(ids, list)
                came = len(ids) if told else _has_text(choice)
                self.by_chunk |= self.counting == "ids" and not told and came > 0
                count += came
                if (reason := choice.get("finish_reason")) in BROKEN_OFF:
                    self.error = self.error or f"the server broke the answer off: finish_reason {reason}"
                self.done = self.done or bool(reason)
        if count and self.counting != "usage":
            self._came(time, count)
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _number(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _number(usage.get("completion_tokens"), self.output_tokens)
            self.done = self.done or not choices  # the totals, and nothing else
            if self.counting == "total" and self.done and self.output_tokens and not self.times:
                self._came(time, self.output_tokens)  # none has a text of its own: markers, parts of a character

    def _totals(self, data: bytes, total: int) -> None:
        self.output_tokens, self.done = total, True
        match = _PROMPT_USAGE.search(data)
        if match:
            self.prompt_tokens = int(match.group(1))

    def _end(self) -> None:
        self.complete = True
        self._stage, self._plain = "end", False
        if self.status != 200:
            self.error = f"HTTP {self.status}: {_message(self._events)}"
        elif self._events.startswith(b"data:"):  # a last event without its empty line
            self._event(self._time, self._events.rstrip())
        if self.status == 200 and not self.error:
            if not self.times:
                self.error = "no token came" if self.done else "the response is no event stream"
            elif not self.done:
                self.error = CUT_OFF  # by what stands before the server, which ended it properly
        if self.counting in ("usage", "ids") and self.output_tokens and self.times:
            self.counts[-1] += max(0, self.output_tokens - self.seen)  # tokens that no chunk told of
        if self.counting == "total" and self.output_tokens and self.times:
            self.times, self.counts = map(list, zip(*spread(self.times, self.output_tokens), strict=True))

    def _fail(self, error: str) -> None:
        self.error, self._stage, self._plain = error, "end", False


def spread(times: list[int], count: int) -> list[list[int]]:
    """``count`` tokens over the chunks that came at ``times``: token k came with chunk floor(k * chunks / count), the
    last token with the last chunk. What is known when a server tells only the total."""
    chunks = len(times)
    counts = [0] * chunks
    for k in range(count - 1):
        counts[k * chunks // count] += 1
    counts[-1] += 1
    return [[time, n] for time, n in zip(times, counts, strict=True) if n]


def _number(told: object, known: int | None) -> int | None:
    """A count as the server told it; what was ``known`` where that is none."""
    if not isinstance(told, int | float) or not 0 <= told <= _MOST_TOKENS:
        return known
    return int(told) if told == int(told) else known


def _has_text(choice: dict) -> int:
    """1 where a choice carries something that was generated; the first chat chunk's role is not."""
    delta = choice.get("delta")
    source = delta if isinstance(delta, dict) else choice
    keys = ("text", "content", "reasoning_content", "reasoning", "tool_calls")
    return int(any(source.get(key) for key in keys))


def _message(error: object) -> str:
    """A short reason from an error's body."""
    if isinstance(error, bytes):
        try:
            error = json.loads(error)
        except (ValueError, RecursionError):
            return error.decode("utf-8", "replace").strip()[:300]  # type: ignore[union-attr]
    if isinstance(error, dict):
        inner = error.get("error", error.get("detail", error.get("message", error)))
        return _message(inner) if inner is not error else json.dumps(error)[:300]
    return error[:300] if isinstance(error, str) else json.dumps(error)[:300]
