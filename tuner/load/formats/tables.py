"""CSV traces with a header: our own columns, Azure 2023 and 2024, BurstGPT, Vidur."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import UsageError
from tuner.load.formats import values
from tuner.load.formats.blocks import Block, blocks
from tuner.load.formats.parts import Parts
from tuner.load.formats.report import BadLine, Tally

_SMALL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Table:
    """The columns to read, by header name. ``time`` None: the file has no arrivals. ``timestamps``: times are dates,
    not seconds."""

    time: str | None
    input: str
    output: str
    timestamps: bool = False


OWN = Table("arrival_s", "input_tokens", "output_tokens")
AZURE = Table("TIMESTAMP", "ContextTokens", "GeneratedTokens", timestamps=True)
BURSTGPT = Table("Timestamp", "Request tokens", "Response tokens")
VIDUR = Table("arrived_at", "num_prefill_tokens", "num_decode_tokens")
VIDUR_LENGTHS = Table(None, "num_prefill_tokens", "num_decode_tokens")


def header_of(line: str) -> list[str]:
    """The column names of a header line; empty where it is no CSV."""
    try:
        return [name.strip() for name in next(csv.reader([line]), [])]
    except csv.Error:
        return []


def matches(table: Table, header: Sequence[str]) -> bool:
    return all(name in header for name in (table.time, table.input, table.output) if name)


def read_table(path: Path, table: Table, tally: Tally) -> Parts:
    """The requests of a CSV file in file order.

    A block of lines goes through pyarrow's parser; where that finds anything wrong the block is halved until the bad
    lines are alone, and those are read one by one to name the mistake. A week of Azure traffic thus takes seconds.
    """
    header, header_line = _header(path, table)
    columns = _Columns(header, table, tally)
    pieces: tuple[list[np.ndarray], ...] = ([], [], [])
    for block in blocks(path, skip_lines=header_line):
        for kept, piece in zip(pieces, columns.read(block), strict=True):
            kept.append(piece)
    arrival_s = None
    if table.time is not None:
        times = _joined(pieces[0])
        # subtract as integers: a Unix time in ns does not fit a float64's 53 bits
        times -= times.min() if len(times) else 0
        arrival_s = times / 1e9 if table.timestamps else times.astype(np.float64)
    counts = [_joined(piece).astype(np.int64) for piece in pieces[1:]]
    return Parts(arrival_s=arrival_s, input_tokens=counts[0], output_tokens=counts[1])


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """One array of all; the pieces are let go, which matters with tens of millions of rows."""
    whole = np.concatenate(pieces) if pieces else np.empty(0)
    pieces.clear()
    return whole


def read_vidur(path: Path, tally: Tally) -> Parts:
    """Vidur's files come with arrivals, or as lengths only."""
    header, _ = _header(path, VIDUR_LENGTHS)
    return read_table(path, VIDUR if matches(VIDUR, header) else VIDUR_LENGTHS, tally)


def _header(path: Path, table: Table) -> tuple[list[str], int]:
    """The header and its line number."""
    for block in blocks(path):
        for number, line in block.lines():
            header = header_of(line.decode("utf-8", errors="replace"))
            wanted = [name for name in (table.time, table.input, table.output) if name]
            if not matches(table, header):
                said = f"the header does not name the columns {', '.join(wanted)}"
                raise UsageError(said, where=f"{path}:{number}")
            if twice := next((name for name in wanted if header.count(name) > 1), ""):
                said = f"the header names the column {twice} {header.count(twice)} times"
                raise UsageError(said, where=f"{path}:{number}", fix="Name the one that counts so, and no other")
            return header, number
    raise UsageError("the file is empty", where=str(path))


class _Columns:
    """Reads blocks of lines into (times, input tokens, output tokens)."""

    def __init__(self, header: list[str], table: Table, tally: Tally) -> None:
        self._table = table
        self._tally = tally
        self._width = len(header)
        self._wanted = [header.index(n) for n in (table.time, table.input, table.output) if n]

    def read(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pieces = list(self._pieces(block))
        return tuple(np.concatenate([piece[k] for piece in pieces]) for k in range(3))  # type: ignore[return-value]

    def _pieces(self, block: Block) -> Iterator[tuple[np.ndarray, ...]]:
        if (columns := self._parse(block)) is not None:
            lines = len(columns[1])
            served = columns[2] > 0
            kept = int(np.count_nonzero(served))
            self._tally.lines += lines
            if kept < lines:
                self._tally.leave_out(values.NO_OUTPUT, lines - kept)
                columns = tuple(column[served] for column in columns)
            yield columns
        elif len(block.data) > _SMALL_BYTES and (halves := block.halves()):
            yield from self._pieces(halves[0])
            yield from self._pieces(halves[1])
        else:
            yield self._line_by_line(block)

    def _parse(self, block: Block) -> tuple[np.ndarray, ...] | None:
        """The block's columns, or None unless every line is beyond doubt."""
        import pyarrow as pa
        from pyarrow import csv as arrow

        # pyarrow reads 0x5 as a number
        if block.data.isspace() or b"0x" in block.data or b"0X" in block.data:
            return None
        names = [str(k) for k in range(self._width)]
        types: dict[str, Any] = {names[k]: pa.int64() for k in self._wanted}
        if self._table.time is not None:
            types[names[self._wanted[0]]] = self._time_type(block, pa)
        try:
            table = arrow.read_csv(
                pa.py_buffer(block.data),
                read_options=arrow.ReadOptions(column_names=names, block_size=max(len(block.data) + 1, 1024)),
                parse_options=arrow.ParseOptions(newlines_in_values=False),
                convert_options=arrow.ConvertOptions(
                    column_types=types, include_columns=[names[k] for k in self._wanted], null_values=[]
                ),
            )
        except (pa.ArrowException, ValueError, OSError):
            return None
        lines = block.data.count(b"\n") + (not block.data.endswith(b"\n"))
        if table.num_rows != lines or any(column.null_count for column in table.columns):
            return None
        columns = [column.to_numpy() for column in table.columns]
        if self._table.time is None:
            columns.insert(0, np.zeros(lines))
        time, tokens_in, tokens_out = columns
        if self._table.timestamps:
            time = time.astype("datetime64[ns]").astype(np.int64)
            in_range = bool((time >= 0).all() and (time < 9 * 10**18).all())
        else:
            in_range = bool(((time >= 0) & (time <= values.MAX_SECONDS)).all())
        low, high = values.MAX_TOKENS, -1
        for column in (tokens_in, tokens_out):
            low, high = min(low, int(column.min())), max(high, int(column.max()))
        # a request without output failed, whatever its input; one without input but with output cannot be meant
        sound = in_range and low >= 0 and high <= values.MAX_TOKENS and not ((tokens_in == 0) & (tokens_out > 0)).any()
        return (time, tokens_in.astype(np.int32), tokens_out.astype(np.int32)) if sound else None

    def _time_type(self, block: Block, pa: Any) -> Any:
        if not self._table.timestamps:
            return pa.float64()
        line = block.data[: block.data.find(b"\n") + 1 or None].rstrip()
        zoned = any(mark in line.split(b":")[-1] for mark in (b"+", b"-", b"Z")) or line.count(b":") > 2
        return pa.timestamp("ns", tz="UTC") if zoned else pa.timestamp("ns")

    def _line_by_line(self, block: Block) -> tuple[np.ndarray, ...]:
        rows = []
        for number, line in block.lines():
            self._tally.lines += 1
            try:
                row = self._row(line)
            except BadLine as mistake:
                self._tally.reject(number, str(mistake))
                continue
            if row[2] == 0:
                self._tally.leave_out(values.NO_OUTPUT)
            else:
                rows.append(row)
        times = np.array([row[0] for row in rows], dtype=np.int64 if self._table.timestamps else np.float64)
        return times, *(np.array([row[k] for row in rows], dtype=np.int32) for k in (1, 2))

    def _row(self, line: bytes) -> tuple[float, int, int]:
        try:
            fields = next(csv.reader([line.decode("utf-8")]), [])
        except UnicodeDecodeError:
            raise BadLine("not UTF-8") from None
        except csv.Error:
            raise BadLine("not CSV") from None
        if len(fields) != self._width:
            raise BadLine("wrong number of columns")
        wanted = [fields[k] for k in self._wanted]
        time: float = 0.0
        if self._table.time is not None:
            text = wanted.pop(0)
            time = values.nanoseconds(text) if self._table.timestamps else values.seconds(text)
        output = values.tokens(wanted[1])
        return time, values.tokens(wanted[0], at_least=1 if output else 0), output
