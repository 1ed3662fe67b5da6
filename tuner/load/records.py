"""Records: what happened to every request, as a Parquet file that is written while the replay runs.

Times are nanoseconds after the replay's start (``epoch_unix_s`` in the file's metadata). The file alone is enough to
compute every metric again.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import UsageError, alike, naming
from tuner.load import columns as arrow

if TYPE_CHECKING:
    import numpy as np

_GROUP_REQUESTS = 8_192
_GROUP_TOKENS = 4_000_000
_META = b"tuner.replay"
_CHECKSUM = b"tuner.replay.crc32"  # of the facts: Parquet has checksums for pages only
VERSION = 1

# column, whether it can be absent (null), what it is
COLUMNS = (
    ("request", "int64", False, "number of the request in the window's trace"),
    ("intended_ns", "int64", False, "when it was to leave"),
    ("sent_ns", "int64", False, "when its first byte left"),
    ("first_byte_ns", "int64", True, "when the kernel received the response's first byte"),
    ("first_byte_read_ns", "int64", True, "when the client read it"),
    ("first_token_ns", "int64", True, "when the kernel received the first token's event"),
    ("last_token_ns", "int64", True, "the same of the last token"),
    ("end_ns", "int64", True, "when the response was over, or given up"),
    ("token_ns", "list", False, "arrival of every token; tokens of one event have the same time"),
    ("input_tokens", "int64", False, "asked for by the trace"),
    ("prompt_tokens", "int64", True, "as the server counted them"),
    ("wanted_tokens", "int64", False, "output asked for by the trace"),
    ("output_tokens", "int64", False, "output that came, by usage or token ids"),
    ("error", "string", False, "why it failed; empty: it did not; `timeout`: censored; `stopped`: cut off by us"),
    ("warmup", "bool", False, "intended within the plan's warm-up"),
    ("retried", "bool", False, "sent again, on a new connection, after the server had closed an idle one"),
    ("read_lag_ns", "int64", False, "longest time that bytes of this response lay unread"),
)


@dataclass(slots=True)
class Record:
    """One request; the columns of the file, in their order. ``token_ns`` is an ``array('q')``."""

    request: int
    intended_ns: int
    sent_ns: int
    first_byte_ns: int | None
    first_byte_read_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    end_ns: int | None
    token_ns: array
    input_tokens: int
    prompt_tokens: int | None
    wanted_tokens: int
    output_tokens: int
    error: str
    warmup: bool
    retried: bool
    read_lag_ns: int


class RecordWriter:
    """Writes row groups as they fill: memory is bounded by one group, whatever the replay's length.

    The file appears under its name when :meth:`close` is called; until then it is ``NAME.partial``. What the disk comes
    up with is an OSError that names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = _partial(path)
        self._rows: list[Record] = []
        self._tokens = 0
        self._writer: Any = None

    def add(self, record: Record) -> None:
        self._rows.append(record)
        self._tokens += len(record.token_ns)
        if len(self._rows) >= _GROUP_REQUESTS or self._tokens >= _GROUP_TOKENS:
            with naming(self._path):
                self._flush()

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        self._path.parent.mkdir(parents=True, exist_ok=True)
        deltas = ["token_ns.list.element", *(name for name, kind, *_ in COLUMNS if kind == "int64")]
        self._writer = pq.ParquetWriter(
            self._partial,
            _schema(),
            compression="zstd",
            use_dictionary=["error"],  # pyright: ignore[reportArgumentType]
            column_encoding=dict.fromkeys(deltas, "DELTA_BINARY_PACKED"),
            write_page_checksum=True,
        )
        return self._writer

    def _flush(self) -> None:
        import pyarrow as pa

        writer = self._writer or self._open()
        rows, self._rows, self._tokens = self._rows, [], 0
        columns = [arrow.column(kind, [getattr(row, name) for row in rows]) for name, kind, *_ in COLUMNS]
        writer.write_table(pa.Table.from_arrays(columns, schema=_schema()))

    def close(self, meta: Mapping[str, Any]) -> None:
        """Writes what is left and the replay's facts, and gives the file its name."""
        with naming(self._path):
            if self._rows or self._writer is None:
                self._flush()
            writer = self._writer or self._open()
            facts = json.dumps({"version": VERSION, **meta})
            writer.add_key_value_metadata({_META.decode(): facts, _CHECKSUM.decode(): _checksum(facts.encode())})
            writer.close()
            os.replace(self._partial, self._path)

    def discard(self) -> None:
        """Leaves no file behind."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # it has rows still to write: where the disk is full it raises again
                self._writer.close()
        self._partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_writable(path: Path) -> None:
    """Raises UsageError where no records file can be written to ``path``: better known before the replay than after."""
    try:
        if path.is_dir():
            raise UsageError("is a folder, not a file for records", where=str(path), fix="Name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).open("wb").close()
        _partial(path).unlink()
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", where=str(path), fix="Give another path") from error


@dataclass(frozen=True, slots=True)
class Records:
    """A records file. ``columns`` holds every column but the tokens, (n,) arrays, absent numbers as -1 (a time never
    is: nothing precedes the start by more than the kernel's clock is off)."""

    path: Path
    meta: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["request"])

    def failed(self) -> np.ndarray:
        """(n,) bool: ended with an error, a refusal or the timeout. Being cut off by an early stop is no failure."""
        error = self.columns["error"]
        return (error != "") & (error != "stopped")

    def failures(self) -> dict[str, int]:
        """How requests failed, those of warm-up and tail included: an error's words and how many had it, the commonest
        first. Those that differ in their figures alone count as one."""
        return alike(Counter(map(str, self.columns["error"][self.failed()])))

    def tokens(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Row group by row group: the rows, ``token_ns`` of all of them end to end, and (rows + 1,) offsets into it."""
        first = 0
        with arrow.parquet(self.path) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["token_ns"]).column(0).combine_chunks()
                column.validate(full=True)
                if len(column):
                    yield slice(first, first + len(column)), *arrow.lists(column)
                    first += len(column)
        if first != len(self):
            raise UsageError("is damaged: not every request has its tokens", where=str(self.path))


ABSENT = -(2**62)


def read(path: Path) -> Records:
    """The records in ``path``. Raises UsageError where it is none, or damaged."""
    with arrow.parquet(path) as file:
        meta = _facts(path, file.metadata.metadata or {})
        _check_schema(path, file.schema_arrow)
        table = file.read(columns=[name for name, kind, *_ in COLUMNS if kind != "list"])
        table.validate(full=True)
    columns: dict[str, np.ndarray] = {}
    for name, kind, *_ in COLUMNS:
        if kind == "list":
            continue
        columns[name] = arrow.plain(table.column(name), kind, ABSENT)
    return Records(path, meta, columns)


def _facts(path: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    stored = metadata.get(_META, b"null")
    if _CHECKSUM in metadata and metadata[_CHECKSUM].decode() != _checksum(stored):
        raise UsageError("is damaged: its facts do not have their checksum", where=str(path))
    meta = json.loads(stored)
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise UsageError("not a records file of this version", where=str(path))
    return meta


def _check_schema(path: Path, found: Any) -> None:
    """Numbers are taken from the columns' buffers: they must be what they are taken for."""
    for field in _schema():
        index = found.get_field_index(field.name)
        if index < 0 or found.field(index).type != field.type or found.field(index).nullable != field.nullable:
            raise UsageError(f"has no column {field.name} as records have it", where=str(path))


def _checksum(facts: bytes) -> str:
    return f"{zlib.crc32(facts):08x}"


def write(path: Path, records: Sequence[Record], meta: Mapping[str, Any]) -> None:
    """A whole file at once."""
    writer = RecordWriter(path)
    for record in records:
        writer.add(record)
    writer.close(meta)


def _schema() -> Any:
    return arrow.schema((name, kind, nullable) for name, kind, nullable, _ in COLUMNS)
