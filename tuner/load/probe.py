"""Asks a server, once, what it takes: token ids, forced lengths, running token counts; and says who does not answer."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tuner.engines.protocol import Endpoint
from tuner.errors import EnvironmentFault, NoCompletions, Unreachable, UsageError
from tuner.load.client import OUR_ERRORS
from tuner.load.prompts import load_tokenizer, model_folder, vocabulary, whole_words
from tuner.load.sse import CUT_OFF, Response
from tuner.load.wire import Dialect, Target, Writer, deadline, target

_TOKENS = 8
_TEXT = "One two three"
# Tried in turn where the tokenizer is unknown: ids up to here, without the first few hundred, which are often special.
_GUESSED_VOCABULARIES = (30_000, 8_000, 2_000)
_GUESSED_SPECIAL = 256
_LADDER = (
    # (route, prompt, counting, forced), from exact to makeshift
    ("completions", "ids", "usage", True),
    ("completions", "ids", "ids", True),
    ("completions", "ids", "total", True),
    ("completions", "ids", "total", False),
    ("completions", "text", "total", True),
    ("completions", "text", "total", False),
    ("chat", "text", "usage", True),
    ("chat", "text", "total", True),
    ("chat", "text", "total", False),
)


_NAME_IT = "name it with --tokenizer, in a study engine.options.tokenizer"


@dataclass(frozen=True, slots=True)
class Found:
    """The dialect, the token ids that prompts may use (below ``vocab_size``, not in ``special_ids``), and whether the
    vocabulary is known or guessed. For prompts of text: the words that are one token each, where the tokenizer is
    known, and the tokens that the server adds to them (its chat template, a mark of the beginning)."""

    dialect: Dialect
    vocab_size: int
    special_ids: Collection[int]
    guessed: bool
    words: Sequence[str] = ()
    overhead_tokens: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """In words what is less exact than it could be; of prompts as if they were not the trace's own texts."""
        text, notes = self.dialect.prompt == "text", self.dialect.notes
        if text:
            kind = "text" if self.words else "made-up words of one or more tokens each"
            notes = (f"the server takes no token ids: prompts are {kind}", *notes)
        if not self.guessed:
            return notes
        ids = "" if text else f": prompts use token ids from {_GUESSED_SPECIAL} to {self.vocab_size - 1}"
        return (*notes, f"the tokenizer is not known{ids} ({_NAME_IT})")


def probe(endpoint: Endpoint, *, text_only: bool = False, timeout_s: float = 120.0) -> Found:
    """What the server at ``endpoint`` takes, found by asking for a few tokens in ever simpler ways.

    ``text_only`` is for traces that hold texts. Raises Unreachable where nothing answers, NoCompletions where it
    streams none of the model, UsageError where it is no OpenAI-compatible server.
    """
    where = target(endpoint.url)
    model = endpoint.model or _first_model(where, endpoint)
    known = vocabulary(endpoint.tokenizer) if endpoint.tokenizer else None
    sizes = (known[0],) if known else _GUESSED_VOCABULARIES
    special = known[1] if known else frozenset(range(_GUESSED_SPECIAL))
    refusal = ""
    for route, prompt, counting, forced in _LADDER:
        if text_only and prompt == "ids":
            prompt = "text"
        words = _words(endpoint.tokenizer) if prompt == "text" and not text_only else ()
        for size in sizes if prompt == "ids" else sizes[:1]:
            question = " ".join(words[:_TOKENS]) or _TEXT if prompt == "text" else _highest(size)
            names = ("max_tokens", "max_completion_tokens") if route == "chat" else ("max_tokens",)
            for name in names:
                dialect = Dialect(model, route, prompt, counting, forced, name)
                status, answer = _ask(where, Writer(where, dialect, endpoint.api_key), question, timeout_s)
                _check(endpoint, status, answer.error)
                if status == 200 and not answer.error and _counts(answer, counting):
                    if counting == "total" and answer.output_tokens is None:
                        dialect = replace(dialect, counting="chunks")
                    more = max(0, (answer.prompt_tokens or 0) - _TOKENS) if words else 0
                    return Found(dialect, size, special, known is None, words, more)
                refusal = refusal or answer.error
                if answer.error == CUT_OFF:
                    refusal = "its streams do not say that they end (no [DONE], no usage, no finish_reason)"
    refusal = refusal or "no tokens came"
    raise NoCompletions(
        f"{endpoint.url} does not stream completions of model {model!r}: {refusal}",
        why=refusal,
        fix="Give the URL of an OpenAI-compatible server and the model's served name",
    )


@lru_cache(2)
def _words(tokenizer: str) -> tuple[str, ...]:
    """The whole words of a model's tokenizer; none where it has no tokenizer.json."""
    if not tokenizer or not (model_folder(tokenizer) / "tokenizer.json").is_file():
        return ()
    return tuple(whole_words(load_tokenizer(tokenizer)))


def _counts(answer: Response, counting: str) -> bool:
    """Whether the tokens could be counted in this way, chunk by chunk (``seen``: before totals made up for any)."""
    if counting == "usage":
        return answer.seen == answer.output_tokens and len(answer.times) > 1
    if counting == "ids":
        return answer.seen > 0 and not answer.by_chunk and answer.output_tokens in (None, answer.seen)
    return bool(answer.times)


def _highest(vocab_size: int) -> list[int]:
    """A prompt that holds the highest id, so that a smaller vocabulary refuses it."""
    return [vocab_size - 1 - i for i in range(_TOKENS)]


def _ask(where: Target, writer: Writer, prompt: str | list[int], timeout_s: float) -> tuple[int, Response]:
    """Asks for a few tokens."""
    request = writer.request(prompt, _TOKENS)
    head, _, body = request.partition(b"\r\n\r\n")
    path = head.split(b" ", 2)[1].decode()
    headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    status, data = _exchanged(where, "POST", path, body, headers, timeout_s)
    return status, _parsed(status, data, writer.dialect.counting)


def _parsed(status: int, data: bytes, counting: str) -> Response:
    """An answer through the very parser that the replay uses."""
    response = Response(counting)
    response.feed(0, b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
    response.close()
    return response


def _first_model(where: Target, endpoint: Endpoint) -> str:
    """The first model that the server lists."""
    status, data = asked(where, "/v1/models", endpoint.api_key, 10.0)
    if status != 200:
        _check(endpoint, status, _parsed(status, data, "total").error)
    try:
        models = json.loads(data)["data"]
        if not models:
            raise UsageError(f"{endpoint.url} lists no model", fix="Load one, or name it with --model")
        if isinstance(model := models[0]["id"], str):
            return model
        raise TypeError("a model's id is no text")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{endpoint.url} is no OpenAI-compatible server: GET /v1/models answered {status}",
            fix="Give the server's base URL, or name the model",
        ) from error


def _check(endpoint: Endpoint, status: int, error: str) -> None:
    """Raises for a status that says nothing about what the server takes."""
    if status in (401, 403):
        message = f"{endpoint.url} refuses the key: {error}"
        fix = "Give the right one: --api-key, or OPENAI_API_KEY (of an attached server engine.options.api_key_env)"
        raise NoCompletions(message, why=f"it refuses the key: {error}", fix=fix)
    if status in (429, 500, 502, 503, 504):
        raise Unreachable(f"{endpoint.url} is not serving: {error}")


def asked(where: Target, path: str, api_key: str, timeout_s: float, most: int | None = None) -> tuple[int, bytes]:
    """Status and body (its first ``most`` bytes) of one GET, all of it within ``timeout_s``. Raises
    :func:`unreachable`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return _exchanged(where, "GET", where.path + path, None, headers, timeout_s, most)


def _exchanged(
    where: Target,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    timeout_s: float,
    most: int | None = None,
) -> tuple[int, bytes]:
    connection = where.connection(timeout_s)
    try:
        with deadline(connection, timeout_s):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(most)
    except (OSError, http.client.HTTPException) as error:
        raise unreachable(where, error) from error
    finally:
        connection.close()


def unreachable(where: Target, error: Exception) -> EnvironmentFault:
    """In one line why a server could not be talked to: Unreachable, unless it is this machine that cannot."""
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return Unreachable(f"{where.authority} broke off its answer", fix="Look into its log")
    if isinstance(error, http.client.HTTPException):
        return Unreachable(f"{where.authority} does not speak HTTP: {error!r}", fix="Check the URL's port")
    if isinstance(error, ssl.SSLError):
        return Unreachable(f"no TLS with {where.authority}: {error.reason or error}", fix="Try http://")
    if isinstance(error, TimeoutError):
        return Unreachable(f"{where.authority} did not answer in time", fix="Is the server overloaded?")
    if isinstance(error, OSError) and error.errno in OUR_ERRORS:
        return EnvironmentFault(f"no connection to {where.authority}: {error.strerror}")
    return Unreachable(f"no server answers at {where.authority}: {error}", fix="Start it, or check the URL")
