"""Records made by hand, in seconds, for the metric tests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.load.records import Record, Records, read, write


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def request(
    intended_s: float,
    tokens_s: Sequence[float] = (),
    *,
    sent_s: float | None = None,
    end_s: float | None = None,
    error: str = "",
    warmup: bool = False,
    input_tokens: int = 100,
    prompt_tokens: int | None = None,
    wanted: int | None = None,
) -> Record:
    """A request whose tokens came at ``tokens_s`` (absolute, seconds after the start)."""
    times = array("q", [ns(t) for t in tokens_s])
    first, last = (times[0], times[-1]) if times else (None, None)
    ended = end_s if end_s is not None else (tokens_s[-1] if len(tokens_s) else intended_s + 1)
    return Record(
        0, ns(intended_s), ns(intended_s if sent_s is None else sent_s), first, first, first, last, ns(ended), times,
        input_tokens, prompt_tokens, len(times) if wanted is None else wanted, len(times), error, warmup, False, 0,
    )  # fmt: skip


def records(folder: Path, rows: Sequence[Record], **meta: Any) -> Records:
    """The file with ``rows``, numbered in order."""
    for number, row in enumerate(rows):
        row.request = number
    path = folder / "records.parquet"
    write(path, rows, {"load": 1.0, "window": "w", "stopped": "", "warmup_s": 0.0, "client": {}} | meta)
    return read(path)
