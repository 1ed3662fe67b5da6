"""JSONL traces with lengths: Mooncake and Bailian (prefix block hashes), and our own."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tuner.load.formats import values
from tuner.load.formats.blocks import blocks
from tuner.load.formats.parts import BlockIds, Parts
from tuner.load.formats.report import BadLine, Tally

MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16
_MAX_BLOCK_TOKENS = 1 << 20


def read_rows(path: Path, tally: Tally, row: Callable[[dict[str, Any]], None]) -> None:
    """Hands every line's object to ``row``, which raises BadLine for what cannot be meant."""
    for number, line in ((n, line) for block in blocks(path) for n, line in block.lines()):
        tally.lines += 1
        try:
            row(json_object(line))
        except BadLine as mistake:
            tally.reject(number, str(mistake))


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; BadLine where there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadLine("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadLine("not JSON") from None
    if not isinstance(value, dict):
        raise BadLine("not a JSON object")
    return value


def field_of(row: dict[str, Any], name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise BadLine(f"no {name}") from None


class Lengths:
    """Collects requests row by row; a row that raises BadLine leaves no trace of itself."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.arrival_s, self.input, self.output = array("d"), array("q"), array("q")
        self.blocks = BlockIds()
        self.block_tokens = 0
        self.texts: list[str] = []

    def append(self, arrival_s: float, tokens_in: int, tokens_out: int, ids: list[int] | list[str]) -> bool:
        """False where the request failed and is left out."""
        if tokens_out == 0:
            self.tally.leave_out(values.NO_OUTPUT)
            return False
        self.blocks.append(ids)
        self.arrival_s.append(arrival_s)
        self.input.append(tokens_in)
        self.output.append(tokens_out)
        return True

    def block_list(self, ids: Any, tokens_in: int, block_tokens: int) -> list[int] | list[str]:
        """The checked ids of a prompt of ``tokens_in`` tokens: all whole numbers below 2**63, or all strings."""
        if not isinstance(ids, list):
            raise BadLine("block ids are not a list")
        kinds = set(map(type, ids))
        if kinds not in ({int}, {str}, set()) or (kinds == {int} and not (min(ids) >= 0 and max(ids) < 2**63)):
            raise BadLine("block ids are not whole numbers")
        most = -(-tokens_in // block_tokens)
        if len(ids) > most:
            self.tally.note("more prefix blocks than the prompt has; the rest ignored")
        return ids[:most]

    def parts(self, *, arrivals: bool = True) -> Parts:
        ids, counts = self.blocks.arrays()
        return Parts(
            arrival_s=np.array(self.arrival_s, dtype=np.float64) if arrivals else None,
            input_tokens=np.array(self.input, dtype=np.int64),
            output_tokens=np.array(self.output, dtype=np.int64),
            block_tokens=self.block_tokens,
            block_ids=ids,
            block_counts=counts,
            texts=self.texts or None,
        )


def read_hashed(path: Path, tally: Tally, *, block_tokens: int, time_unit_s: float) -> Parts:
    """Mooncake (512 tokens per block, milliseconds) or Bailian (16 tokens, seconds)."""
    requests = Lengths(tally)
    requests.block_tokens = block_tokens

    def row(line: dict[str, Any]) -> None:
        time = values.seconds(field_of(line, "timestamp"), unit_s=time_unit_s)
        tokens_out = values.tokens(field_of(line, "output_length"))
        tokens_in = values.tokens(field_of(line, "input_length"), at_least=1 if tokens_out else 0)
        requests.append(
            time, tokens_in, tokens_out, requests.block_list(line.get("hash_ids", []), tokens_in, block_tokens)
        )

    read_rows(path, tally, row)
    return requests.parts()


def read_own(path: Path, tally: Tally) -> Parts:
    """Our JSONL: ``arrival_s``, ``input_tokens``, ``output_tokens``; ``block_ids`` with ``block_tokens``, ``text``."""
    requests = Lengths(tally)

    def row(line: dict[str, Any]) -> None:
        time = values.seconds(field_of(line, "arrival_s"))
        tokens_in = values.tokens(field_of(line, "input_tokens"), at_least=1)
        tokens_out = values.tokens(field_of(line, "output_tokens"))
        ids: list[int] | list[str] = []
        width = 0
        if line.get("block_ids"):
            width = values.tokens(field_of(line, "block_tokens"), at_least=1)
            if width != (requests.block_tokens or width) or width > _MAX_BLOCK_TOKENS:
                raise BadLine("block_tokens is too large, or not as before")
            ids = requests.block_list(line["block_ids"], tokens_in, width)
        text = None if line.get("text") is None else values.text(line["text"])
        if requests.input and (text is None) != (not requests.texts):
            raise BadLine("only some lines have a text")
        if requests.append(time, tokens_in, tokens_out, ids):
            requests.block_tokens = requests.block_tokens or width
            if text is not None:
                requests.texts.append(text)

    read_rows(path, tally, row)
    return requests.parts()


def first_objects(path: Path, count: int = 20) -> Iterator[dict[str, Any]]:
    """The first few lines that hold JSON objects, for recognition."""
    for block in blocks(path):
        for _, line in block.lines():
            count -= 1
            with contextlib.suppress(BadLine):
                yield json_object(line)
            if count == 0:
                return
