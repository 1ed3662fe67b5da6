"""Parquet columns from and to plain values, by their buffers.

``pa.array``, ``fill_null`` and ``cast`` import pandas and Arrow's compute library, which takes longer than the rest of
a short replay, and here nothing of them is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import UsageError


@contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """The Parquet file at ``path``, its pages compared with their checksums where it has some. Raises UsageError where
    it is none or damaged, for what is done in the ``with`` too: the library finds damage wherever it meets it, and has
    many kinds of error for it."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    damage = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError)
    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except damage as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"cannot be read as Parquet ({said[0]})", where=str(path)) from error


def column(kind: str, values: Sequence[Any]) -> Any:
    """An Arrow array. ``kind``: ``int64`` or ``float64`` (None is null), ``bool``, ``string``, ``list`` (each value an
    ``array('q')``)."""
    import pyarrow as pa

    n = len(values)
    match kind:
        case "int64" | "float64":
            present = np.array([value is not None for value in values], dtype=bool)
            whole = np.array([value or 0 for value in values], dtype=kind)
            validity = None if present.all() else _bits(present)
            return pa.Array.from_buffers(_type(kind), n, [validity, pa.py_buffer(whole)])
        case "bool":
            return pa.Array.from_buffers(_type(kind), n, [None, _bits(np.array(values, dtype=bool))])
        case "string":
            texts = [value.encode("utf-8", "replace") for value in values]
            return pa.Array.from_buffers(
                _type(kind), n, [None, _offsets(map(len, texts)), pa.py_buffer(b"".join(texts))]
            )
    numbers = pa.py_buffer(b"".join(value.tobytes() for value in values))
    inner = pa.Array.from_buffers(pa.int64(), numbers.size // 8, [None, numbers])
    return pa.Array.from_buffers(_type(kind), n, [None, _offsets(map(len, values))], children=[inner])


def schema(columns: Iterable[tuple[str, str, bool]]) -> Any:
    """Of (name, kind, whether it can be null)."""
    import pyarrow as pa

    return pa.schema([pa.field(name, _type(kind), nullable) for name, kind, nullable in columns])


def plain(column: Any, kind: str, absent: int = 0) -> np.ndarray:
    """A chunked column read from a file, of kind ``int64`` (``absent`` where it is null), ``bool`` or ``string``."""
    if kind == "string":
        return np.array(column.to_pylist(), dtype=object)
    if kind == "bool":
        return np.concatenate([np.zeros(0, dtype=bool), *(_flags(c.buffers()[1], c) for c in column.chunks)])
    parts = [np.zeros(0, dtype=np.int64)]
    for chunk in column.chunks:
        validity, _ = chunk.buffers()
        values = _fixed(chunk, np.int64)
        parts.append(values if validity is None else np.where(_flags(validity, chunk), values, absent))
    return np.concatenate(parts)


def lists(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a list column's array end to end, and (rows + 1,) offsets into them."""
    return _fixed(array.values, np.int64), _fixed(array.offsets, np.int32)


def _fixed(array: Any, dtype: type) -> np.ndarray:
    data = array.buffers()[1]
    return np.frombuffer(data or b"", dtype=dtype)[array.offset : array.offset + len(array)]


def _flags(bits: Any, array: Any) -> np.ndarray:
    """A bitmap's part that belongs to ``array``, as booleans."""
    flags = np.unpackbits(np.frombuffer(bits or b"", dtype=np.uint8), bitorder="little")
    return flags[array.offset : array.offset + len(array)].astype(bool)


def _type(kind: str) -> Any:
    import pyarrow as pa

    return {
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "list": pa.list_(pa.int64()),
    }[kind]


def _offsets(lengths: Iterable[int]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.cumsum([0, *lengths], dtype=np.int32))


def _bits(flags: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.packbits(flags, bitorder="little"))
