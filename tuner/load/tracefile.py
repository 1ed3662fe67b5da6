"""Our own trace files: JSONL and Parquet, columns named with their units. docs/traces.md describes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tuner.errors import UsageError, replacing
from tuner.load.formats import values
from tuner.load.formats.parts import Parts
from tuner.load.formats.report import BadLine, Tally
from tuner.load.trace import Trace

_VERSION, _LASTS = b"1", b"tuner.lasts_s"
_ROWS = 65536


def write(trace: Trace, path: str | Path) -> None:
    """Writes ``.jsonl`` or ``.parquet``, as the name says; UsageError for another ending, a place that cannot be
    written, or what would be refused when read. What is read back equals the trace column by column, to the last bit;
    when it ends (``lasts_s``) a .parquet keeps only. The file has its name when it is whole."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UsageError("a trace is written as .jsonl or .parquet", where=str(path), fix="Name it so")
    _check(Parts(trace.arrival_s, trace.input_tokens, trace.output_tokens), trace.arrival_s, path)
    try:
        with replacing(path) as half:
            (_write_jsonl if path.suffix == ".jsonl" else _write_parquet)(trace, half)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror or error})", where=str(path)) from error


def _write_jsonl(trace: Trace, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i in range(len(trace)):
            row: dict[str, object] = {
                "arrival_s": float(trace.arrival_s[i]),
                "input_tokens": int(trace.input_tokens[i]),
                "output_tokens": int(trace.output_tokens[i]),
            }
            if trace.block_tokens:
                row["block_tokens"] = trace.block_tokens
                row["block_ids"] = trace.block_ids[trace.block_offsets[i] : trace.block_offsets[i + 1]].tolist()
            if trace.texts is not None:
                row["text"] = trace.texts[i]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(trace: Trace, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, pa.Array] = {
        "arrival_s": pa.array(trace.arrival_s, pa.float64()),
        "input_tokens": pa.array(trace.input_tokens, pa.int64()),
        "output_tokens": pa.array(trace.output_tokens, pa.int64()),
    }
    if trace.block_tokens:
        columns["block_ids"] = pa.LargeListArray.from_arrays(
            pa.array(trace.block_offsets, pa.int64()), pa.array(trace.block_ids, pa.int64())
        )
    if trace.texts is not None:
        columns["text"] = pa.array(trace.texts, pa.large_string())
    about = {b"tuner.trace": _VERSION, b"tuner.block_tokens": str(trace.block_tokens).encode()}
    if trace.lasts_s > 0:
        about[_LASTS] = repr(min(float(trace.lasts_s), values.MAX_SECONDS)).encode()
    table = pa.table(columns).replace_schema_metadata(about)
    # checksums, so that a damaged file is refused and not replayed
    parquet.write_table(table, path, compression="zstd", row_group_size=_ROWS, write_page_checksum=True)


def read_parquet(path: Path, tally: Tally) -> Parts:
    """Our own Parquet file. The whole file is good or it is refused: its writer checked every value."""
    import pyarrow as pa
    from pyarrow import parquet

    wanted = ("arrival_s", "input_tokens", "output_tokens")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            missing = [name for name in wanted if name not in names]
            if missing:
                raise UsageError(f"no column {', '.join(missing)}", where=str(path), fix="docs/traces.md lists them")
            table = file.read([name for name in (*wanted, "block_ids", "text") if name in names])
        table.validate(full=True)
        arrival_s, tokens_in, tokens_out = (
            np.asarray(table[name].combine_chunks().cast(kind).to_numpy(zero_copy_only=False))
            for name, kind in zip(wanted, (pa.float64(), pa.int64(), pa.int64()), strict=True)
        )
        if any(table[name].null_count for name in wanted):
            raise UsageError("a row lacks a value", where=str(path))
        about = table.schema.metadata or {}
        parts = Parts(arrival_s, tokens_in, tokens_out)
        if _LASTS in about:
            parts.lasts_s = float(about[_LASTS])
            if not arrival_s.max(initial=0.0) <= parts.lasts_s <= values.MAX_SECONDS:
                raise UsageError(f"{_LASTS.decode()} {parts.lasts_s:g} is before the last request", where=str(path))
        if "block_ids" in table.column_names:
            width = about.get(b"tuner.block_tokens", b"")
            parts.block_tokens = values.tokens(width.decode("ascii", errors="replace"))
            lists = table["block_ids"].combine_chunks()
            ids = lists.flatten()
            if ids.null_count:
                raise UsageError("block_ids lacks a value", where=str(path))
            parts.block_ids = np.asarray(ids.cast(pa.int64()).to_numpy(zero_copy_only=False))
            parts.block_counts = np.asarray(lists.value_lengths().fill_null(0).cast(pa.int64()).to_numpy())
        if "text" in table.column_names:
            texts = table["text"].to_pylist()
            if any(not isinstance(text, str) for text in texts):
                raise UsageError("a row lacks its text", where=str(path))
            parts.texts = texts
    except (pa.ArrowException, BadLine, ValueError, TypeError, OverflowError, KeyError, MemoryError) as error:
        raise UsageError(f"cannot be read as a Parquet trace ({error})", where=str(path)) from error
    tally.lines = len(tokens_in)
    _check(parts, arrival_s, path)
    return parts


def _check(parts: Parts, time: np.ndarray, path: Path) -> None:
    """UsageError with the row's number (from 1) for a value that cannot be meant."""
    tokens_in, tokens_out = parts.input_tokens, parts.output_tokens
    checks = [("arrival_s is negative, infinite or too large", ~((time >= 0) & (time <= values.MAX_SECONDS)))]
    for name, column in (("input_tokens", tokens_in), ("output_tokens", tokens_out)):
        checks.append((f"{name} is not between 1 and {values.MAX_TOKENS}", (column < 1) | (column > values.MAX_TOKENS)))
    if parts.block_counts is not None:
        if parts.block_tokens < 1 and len(parts.block_ids):
            raise UsageError("block_ids without tuner.block_tokens in the metadata", where=str(path))
        most = -(-tokens_in // max(parts.block_tokens, 1))
        checks.append(("more block_ids than the prompt has blocks", parts.block_counts > most))
        if len(parts.block_ids) and int(parts.block_ids.min()) < 0:
            raise UsageError("a negative block id", where=str(path))
    for message, wrong in checks:
        if wrong.any():
            raise UsageError(message, where=f"{path}:{int(np.argmax(wrong)) + 1}")
