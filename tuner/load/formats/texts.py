"""Traces with texts: ShareGPT-like, OpenAI chat logs, vLLM's custom dataset.

A request's input length is the log's own ``usage`` where it has one; otherwise the texts are counted with a tokenizer.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import UsageError
from tuner.load.formats import values
from tuner.load.formats.jsonl import field_of, read_rows
from tuner.load.formats.parts import Parts
from tuner.load.formats.report import BadLine, Tally

_MAX_ARRAY_BYTES = 2 << 30
_BATCH = 1000
_UNKNOWN = -1


class _Talk:
    """Collects prompts and replies; a length not in the log is counted from its text at the end. Where the times will
    be others (``untimed``) what the file says of them does not matter."""

    def __init__(self, tally: Tally, untimed: bool) -> None:
        self.tally, self.untimed = tally, untimed
        self.prompts: list[str] = []
        self.replies: list[str] = []
        self.arrival_s, self.input, self.output = array("d"), array("q"), array("q")

    def append(self, prompt: str, reply: str, tokens_in: int, tokens_out: int, time: float) -> None:
        if tokens_out == 0:
            self.tally.leave_out(values.NO_OUTPUT)
            return
        if not prompt:
            raise BadLine("the prompt is empty")
        if tokens_out == _UNKNOWN and not reply:
            raise BadLine("neither a reply nor its length")
        self.prompts.append(prompt)
        self.replies.append(reply if tokens_out == _UNKNOWN else "")
        self.arrival_s.append(time)
        self.input.append(tokens_in)
        self.output.append(tokens_out)

    def time(self, *sources: dict[str, Any]) -> float:
        return math.nan if self.untimed else _time(*sources)

    def parts(self, tokenizer: str | None) -> Parts:
        """``tokenizer`` is loaded only where there is something to count: the model of a study may have none."""
        lengths, tally = [], self.tally
        unknown = _UNKNOWN in self.input or _UNKNOWN in self.output
        if unknown and not tokenizer:
            timed = "" if self.untimed or not all(map(math.isnan, self.arrival_s)) else " --arrivals poisson:4"
            raise UsageError(
                f"{tally.format} holds texts without their number of tokens",
                where=tally.path,
                fix=f"Have them counted: tuner trace convert {tally.path} counted.parquet --tokenizer MODEL_FOLDER"
                f"{timed} (replay and the other trace commands take that themselves)",
            )
        count = _counter(tokenizer) if unknown and tokenizer else _nothing
        for texts, known in ((self.prompts, self.input), (self.replies, self.output)):
            column = np.array(known, dtype=np.int64)
            uncounted = np.flatnonzero(column == _UNKNOWN)
            for start in range(0, len(uncounted), _BATCH):
                some = uncounted[start : start + _BATCH]
                column[some] = count([texts[i] for i in some])
            lengths.append(column)
        usable = (lengths[0] > 0) & (lengths[1] > 0)
        if not usable.all():
            tally.leave_out("no token in the prompt or the reply", int(np.count_nonzero(~usable)))
        times = np.array(self.arrival_s, dtype=np.float64)
        without = usable & np.isnan(times)
        timed = bool(np.count_nonzero(without) < np.count_nonzero(usable) / 2)
        if timed and without.any():  # most lines have a time: the others cannot be placed
            tally.leave_out("no time", int(np.count_nonzero(without)))
            usable &= ~without
        arrival_s = times[usable]
        return Parts(
            arrival_s=arrival_s if timed else None,
            input_tokens=lengths[0][usable],
            output_tokens=lengths[1][usable],
            texts=[self.prompts[i] for i in np.flatnonzero(usable)],
        )


def _nothing(texts: list[str]) -> list[int]:
    return [0] * len(texts)


def read_texts(
    path: Path,
    tally: Tally,
    row: Callable[[_Talk, dict[str, Any]], None],
    tokenizer: str | None,
    *,
    untimed: bool = False,
) -> Parts:
    """JSON lines, or one JSON array of objects (ShareGPT's own form; an entry's number then stands for its line)."""
    talk = _Talk(tally, untimed)
    if _is_array(path):
        for number, entry in enumerate(_array(path), 1):
            tally.lines += 1
            try:
                if not isinstance(entry, dict):
                    raise BadLine("not a JSON object")
                row(talk, entry)
            except BadLine as mistake:
                tally.reject(number, str(mistake))
    else:
        read_rows(path, tally, lambda entry: row(talk, entry))
    return talk.parts(tokenizer)


def sharegpt(talk: _Talk, entry: dict[str, Any]) -> None:
    """The first human turn and the reply to it."""
    turns = field_of(entry, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadLine("conversations is not a list of turns")
    speakers = [turn.get("from", turn.get("role")) for turn in turns]
    asks = next((i for i, who in enumerate(speakers) if who in ("human", "user")), None)
    if asks is None or asks + 1 >= len(turns):
        raise BadLine("no prompt with a reply")
    prompt, reply = (turn.get("value", turn.get("content")) for turn in turns[asks : asks + 2])
    talk.append(_text(prompt), _text(reply), _UNKNOWN, _UNKNOWN, talk.time(entry))


def openai_chat(talk: _Talk, entry: dict[str, Any]) -> None:
    """A logged chat completion: ``messages`` at the top, in ``request`` or in a batch file's ``body``; the reply in
    ``response`` (or its ``body``) or as the last message."""
    request = next((part for part in (entry, entry.get("request"), entry.get("body")) if _has_messages(part)), None)
    if request is None:
        raise BadLine("no messages")
    messages = list(request["messages"])
    response = entry.get("response")
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = response["body"]
    response = response if isinstance(response, dict) else {}
    choices = response.get("choices")
    reply = ""
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        reply = _text(message.get("content")) if isinstance(message, dict) else ""
    elif messages[-1].get("role") == "assistant":
        reply = _text(messages.pop().get("content"))
    usage = response.get("usage") or entry.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tokens_out, tokens_in = (
        values.tokens(usage[key]) if usage.get(key) is not None else _UNKNOWN
        for key in ("completion_tokens", "prompt_tokens")
    )
    if tokens_in == 0 != tokens_out:
        raise BadLine("token count is too small")
    prompt = "\n".join(_text(message.get("content")) for message in messages)
    talk.append(prompt, reply, tokens_in, tokens_out, talk.time(entry, request, response))


def vllm_custom(talk: _Talk, entry: dict[str, Any]) -> None:
    """``prompt`` and ``output_tokens``."""
    prompt = values.text(field_of(entry, "prompt"))
    talk.append(prompt, "", _UNKNOWN, values.tokens(field_of(entry, "output_tokens")), talk.time(entry))


def _has_messages(part: Any) -> bool:
    messages = part.get("messages") if isinstance(part, dict) else None
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) for m in messages)


def _text(content: Any) -> str:
    """A message's text; of content in parts, the text parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return values.text(content)


def _time(*sources: dict[str, Any]) -> float:
    """When the request came, from the first key that tells; NaN where none does."""
    for source in sources:
        for key in ("arrival_s", "timestamp", "created_at", "created", "time"):
            value = source.get(key)
            if isinstance(value, str):
                try:
                    return values.nanoseconds(value) / 1e9
                except BadLine:
                    return values.seconds(value)
            if value is not None:
                return values.seconds(value)
    return float("nan")


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array(path: Path) -> list[Any]:
    if path.stat().st_size > _MAX_ARRAY_BYTES:
        raise UsageError("one JSON array of over 2 GiB", where=str(path), fix="Convert it to JSON lines: jq -c '.[]'")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError("not JSON", where=f"{path}{line}") from error


def _counter(model: str) -> Callable[[list[str]], list[int]]:
    from tuner.load.prompts import load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda texts: [len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
