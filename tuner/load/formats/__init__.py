"""Reading traces: every public format, and our own, recognised by content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tuner.errors import UsageError
from tuner.load.arrivals import Arrivals
from tuner.load.formats.parts import Parts, trace_of
from tuner.load.formats.recognise import recognise
from tuner.load.formats.report import ReadingReport, Tally
from tuner.load.trace import Trace
from tuner.words import figure

Format = Literal[
    "azure",
    "burstgpt",
    "vidur",
    "mooncake",
    "bailian",
    "sharegpt",
    "openai-chat",
    "vllm-custom",
    "csv",
    "jsonl",
    "parquet",
]
FORMATS: tuple[str, ...] = get_args(Format)
FEW, SPARSE_S = 10, 5.0  # requests; between two of them: nobody tunes a server for fewer

__all__ = ["FORMATS", "ReadingReport", "read", "read_with_report"]


def read(
    path: str | Path,
    format: str = "auto",
    *,
    max_bad: int | None = None,
    arrivals: str | Arrivals | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
) -> Trace:
    """The trace in a file; see :func:`read_with_report`."""
    return read_with_report(path, format, max_bad=max_bad, arrivals=arrivals, tokenizer=tokenizer, seed=seed)[0]


def read_with_report(
    path: str | Path,
    format: str = "auto",
    *,
    max_bad: int | None = None,
    arrivals: str | Arrivals | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
) -> tuple[Trace, ReadingReport]:
    """The trace in a file, and what was skipped or repaired on the way.

    ``format`` is one of FORMATS or ``auto``. Up to ``max_bad`` bad lines are skipped (None: 100, and at most a tenth
    of the file). ``arrivals`` (``poisson:4``) gives arrival times to a file that has none, or replaces the file's, with
    ``seed``. ``tokenizer`` (a model folder or id) counts the tokens of texts.
    Raises UsageError (with file:line where there is one) for anything that cannot be read.
    """
    path = Path(path)
    process = Arrivals.parse(arrivals) if isinstance(arrivals, str) else arrivals
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"there is no trace format {format!r}", fix=f"Formats: auto, {', '.join(FORMATS)}")
    try:
        known = recognise(path) if format == "auto" else format
        if not path.is_file():
            raise UsageError("is not a file", where=str(path))
        tally = Tally(str(path), known, max_bad)
        parts = _parts(path, known, tally, tokenizer, untimed=process is not None)
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    if process is not None:
        arrival_s = process.times(len(parts.input_tokens), np.random.default_rng(seed))
        parts.lasts_s = math.nan
    elif parts.arrival_s is not None:
        arrival_s = parts.arrival_s
        if known in ("csv", "jsonl") and (said := _sparse(arrival_s)):
            tally.note(said, len(arrival_s))
    else:
        if not len(parts.input_tokens):
            tally.finish(0)  # what is wrong with the lines is more than that
        counted = f" --tokenizer {tokenizer}" if parts.texts is not None and tokenizer else ""
        raise UsageError(
            f"a {known} file without arrival times",
            where=str(path),
            fix=f"Say how requests arrive: tuner trace convert {path} timed.parquet --arrivals poisson:4{counted} "
            "(replay and the other trace commands take that themselves)",
        )
    report = tally.finish(len(arrival_s))
    return trace_of(parts, arrival_s, path.stem, tally), report


def _sparse(arrival_s: np.ndarray) -> str:
    """What is said of times of our own formats that may have been meant in milliseconds; empty of others."""
    gap_s = float(np.ptp(arrival_s)) / (len(arrival_s) - 1) if len(arrival_s) >= FEW else 0.0
    if gap_s < SPARSE_S:
        return ""
    meant = f"in milliseconds it would be {figure(1000 / gap_s)} a second"
    return f"one every {figure(gap_s)} s, arrival_s being in seconds ({meant})"


def _parts(path: Path, format: str, tally: Tally, tokenizer: str | None, *, untimed: bool) -> Parts:
    from tuner.load.formats import jsonl, tables, texts

    match format:
        case "csv":
            return tables.read_table(path, tables.OWN, tally)
        case "azure":
            return tables.read_table(path, tables.AZURE, tally)
        case "burstgpt":
            return tables.read_table(path, tables.BURSTGPT, tally)
        case "vidur":
            return tables.read_vidur(path, tally)
        case "mooncake":
            return jsonl.read_hashed(path, tally, block_tokens=jsonl.MOONCAKE_BLOCK_TOKENS, time_unit_s=1e-3)
        case "bailian":
            return jsonl.read_hashed(path, tally, block_tokens=jsonl.BAILIAN_BLOCK_TOKENS, time_unit_s=1.0)
        case "sharegpt":
            return texts.read_texts(path, tally, texts.sharegpt, tokenizer, untimed=untimed)
        case "openai-chat":
            return texts.read_texts(path, tally, texts.openai_chat, tokenizer, untimed=untimed)
        case "vllm-custom":
            return texts.read_texts(path, tally, texts.vllm_custom, tokenizer, untimed=untimed)
        case "jsonl":
            return jsonl.read_own(path, tally)
        case _:
            from tuner.load.tracefile import read_parquet

            return read_parquet(path, tally)
