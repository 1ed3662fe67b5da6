"""Demand: requests per second, hour by hour; from a file of hours, or from a trace by counting its arrivals."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import UsageError

HOUR_S = 3600.0
MOST_RPS = 1e7
MOST_HOURS = 8784  # a leap year
RATES = ("requests_per_s", "requests/s", "rps", "qps", "rate", "rate_per_s", "demand")
HOURS = ("hour", "time", "timestamp", "start", "at")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?")


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """``rate_rps`` (h,) mean requests per second of each hour, ``labels`` their names.

    ``swing`` is the relative standard deviation of the rate within an hour, between stretches as long as a measured
    window, beyond what independent requests show (Poisson). ``output_tokens`` is the mean per request where a trace
    tells (NaN: a file of hours does not). ``source`` says in words where it comes from.
    """

    labels: tuple[str, ...]
    rate_rps: np.ndarray
    swing: float
    output_tokens: float
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def read(
    path: Path,
    *,
    scale: float = 1.0,
    peak_rps: float | None = None,
    swing: float | None = None,
    format: str = "auto",
    window_s: float = 60.0,
) -> Demand:
    """The demand in ``path``: hours (CSV or JSON), or a trace in any format that ``tuner`` reads.

    Rates are multiplied by ``scale``, or so that the busiest hour has ``peak_rps``. ``swing`` replaces the trace's own
    (0 for hours), which is counted in stretches of ``window_s``. Raises UsageError, with file:line where there is one.
    """
    if peak_rps is not None and scale != 1.0:
        raise UsageError("--scale and --peak-rps both say how large the demand is", fix="Give one of them")
    for name, value in (("--scale", scale), ("--peak-rps", peak_rps)):
        if value is not None and not (0 < value < math.inf):
            raise UsageError(f"{name} {value:g} is no factor", fix="Give a number above 0")
    if swing is not None and not 0 <= swing <= 3:
        raise UsageError(f"--swing {swing:g} is not between 0 and 3", fix="0.1 means that the rate varies by 10 %")
    if not path.is_file():
        raise UsageError("no such demand file" if not path.exists() else "is not a file", where=str(path))
    hours = _hours(path) if format == "auto" else None
    found = _of_trace(path, format, window_s) if hours is None else hours
    if not found.rate_rps.max() > 0:
        raise UsageError("no hour has any demand", where=str(path))
    factor = scale if peak_rps is None else peak_rps / float(found.rate_rps.max())
    rates = found.rate_rps * factor
    if rates.max() > MOST_RPS:
        raise UsageError(f"{rates.max():.3g} requests/s is more than {MOST_RPS:g}", where=str(path))
    source = found.source + (f", times {factor:.6g}" if factor != 1 else "")
    return replace(found, rate_rps=rates, source=source, swing=found.swing if swing is None else swing)


def _hours(path: Path) -> Demand | None:
    """The hours in a file; None where it does not look like one (then it may be a trace)."""
    if path.suffix == ".parquet":
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"cannot be read ({failure})", where=str(path)) from failure
    if not text.strip():
        raise UsageError("the file is empty", where=str(path), fix=_FORM)
    if path.suffix == ".json" or text.lstrip()[0] in "[{":
        rows = _json(path, text)
    else:
        rows = _csv(path, text)
    if rows is None:
        return None
    if not rows:
        raise UsageError("holds no hour", where=str(path), fix=_FORM)
    if len(rows) > MOST_HOURS:
        raise UsageError(f"{len(rows)} hours are more than a year", where=str(path), fix="Give one row per hour")
    labels = tuple(label for label, _ in rows)
    source = f"{path.name}: {len(rows)} hours, taken as constant within each"
    return Demand(labels, np.array([rate for _, rate in rows]), 0.0, math.nan, source)


def _csv(path: Path, text: str) -> list[tuple[str, float]] | None:
    """Rows of ``hour,requests_per_s`` (the header may be missing, the hour too); None for another table."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not lines:
        raise UsageError("holds no hour", where=str(path), fix=_FORM)
    delimiter = next((d for d in ",;\t" if d in lines[0][1]), ",")
    header = [name.strip().strip('"').lower() for name in lines[0][1].split(delimiter)]
    at = next((i for i, name in enumerate(header) if name in RATES), None)
    labelled = next((i for i, name in enumerate(header) if name in HOURS), None)
    if at is None:
        if labelled is not None and len(header) == 2:
            raise UsageError(f"no column of rates among {', '.join(header)}", where=f"{path}:{lines[0][0]}", fix=_FORM)
        if len(header) > 2 or _number(header[-1]) is None:
            return None
        at, labelled = len(header) - 1, 0 if len(header) == 2 else None
    else:
        lines = lines[1:]
    rows, first = [], {}
    width = max(at, labelled or 0) + 1
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            fields = next(csv.reader(io.StringIO(line), delimiter=delimiter))
        except csv.Error as failure:
            raise UsageError(f"is no CSV: {failure}", where=where, fix=_FORM) from failure
        if len(fields) < width:
            raise UsageError(f"{len(fields)} columns, not {len(header)}", where=where, fix=_FORM)
        label = fields[labelled].strip() if labelled is not None else str(len(rows))
        if label in first:
            raise UsageError(f"hour {label!r} was there before (line {first[label]})", where=where)
        first[label] = number
        rows.append((label, _rate(fields[at].strip(), where)))
    _in_order([label for label, _ in rows], path, [number for number, _ in lines])
    return rows


def _json(path: Path, text: str) -> list[tuple[str, float]] | None:
    """A list of rates, of ``{"hour": ..., "requests_per_s": ...}``, or an object with such a list; None otherwise."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as failure:
        if path.suffix != ".json":
            return None  # a line of JSON per request: a trace
        raise UsageError(f"is no JSON: {failure.msg}", where=f"{path}:{failure.lineno}", fix=_FORM) from failure
    except (ValueError, RecursionError) as failure:  # a number of thousands of digits; lists in lists in lists
        raise UsageError(f"is no JSON of hours: {failure}", where=str(path), fix=_FORM) from failure
    if isinstance(data, dict):
        data = next((data[name] for name in (*RATES, "hours") if isinstance(data.get(name), list)), None)
    if not isinstance(data, list):
        if path.suffix == ".json":
            raise UsageError("holds no list of hours", where=str(path), fix=_FORM)
        return None
    starts = _item_lines(text, len(data))
    rows: list[tuple[str, float]] = []
    first: dict[str, int] = {}
    for index, item in enumerate(data):
        where = f"{path}:{starts[index]}"
        label: Any = index
        value: Any = item
        if isinstance(item, dict):
            names = {str(name).lower(): name for name in item}
            key = next((names[name] for name in RATES if name in names), None)
            if key is None:
                if index == 0 and ("conversations" in item or "messages" in item or "prompt" in item):
                    return None
                raise UsageError(f"hour {index} has no requests_per_s", where=where, fix=_FORM)
            value = item[key]
            label = next((item[names[name]] for name in HOURS if name in names), index)
        if str(label) in first:
            raise UsageError(f"hour {str(label)!r} was there before (line {first[str(label)]})", where=where)
        first[str(label)] = starts[index]
        rows.append((str(label), _rate(value, where)))
    _in_order([label for label, _ in rows], path, starts)
    return rows


def _item_lines(text: str, count: int) -> list[int]:
    """The line on which each item of the first list with ``count`` items begins (1 where it cannot be told)."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\[", text):
        at, found = match.end(), []
        try:
            while len(found) < count:
                at = re.compile(r"[\s,]*").match(text, at).end()  # type: ignore[union-attr]
                found.append(text.count("\n", 0, at) + 1)
                _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            continue
        return found
    return [1] * count


def _in_order(labels: Sequence[str], path: Path, lines: Sequence[int]) -> None:
    """Hours that can be read must follow each other: a hole would be planned as if it were not there."""
    hours = [hour for hour in map(_hour, labels) if hour is not None]
    if len(hours) < len(labels):
        return
    for i, (before, after) in enumerate(pairwise(hours), 1):
        step = after - before
        if _CLOCK.fullmatch(labels[i]):  # without a date midnight follows 23:00
            step %= 24
        if not math.isclose(step, 1, abs_tol=1e-6):
            raise UsageError(
                f"hour {labels[i]} follows hour {labels[i - 1]}",
                where=f"{path}:{lines[i]}",
                fix="Give every hour once, in order",
            )


def _hour(label: str) -> float | None:
    """A number, a time (05:00) or an ISO date and time as a number of hours; None for other names."""
    if (number := _number(label)) is not None:
        return number
    if clock := _CLOCK.fullmatch(label):
        hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return hours + minutes / 60 + seconds / HOUR_S
    try:
        time = datetime.fromisoformat(label)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() / HOUR_S


def _rate(value: Any, where: str) -> float:
    number = _number(value) if isinstance(value, str) else value
    # infinity and NaN are no numbers; math.isfinite raises for one of 400 digits
    if isinstance(number, bool) or not isinstance(number, int | float) or number - number != 0:
        raise UsageError(f"{value!r} is not a number of requests per second", where=where, fix=_FORM)
    if number < 0:
        raise UsageError(f"{value!r} requests per second is negative", where=where)
    if number > MOST_RPS:
        raise UsageError(f"{value!r} requests per second is more than {MOST_RPS:g}", where=where)
    return float(number)


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _of_trace(path: Path, format: str, window_s: float) -> Demand:
    """Arrivals counted per hour from the first one on. A last part of an hour that is shorter than a quarter belongs to
    no hour; a trace shorter than an hour is one hour at its mean rate."""
    from tuner.load.formats import read_with_report

    try:
        trace, report = read_with_report(path, format)
    except UsageError as failure:
        if format == "auto" and "not recognised" in failure.message:
            raise UsageError("is neither a file of hours nor a trace", where=str(path), fix=_FORM) from failure
        raise
    arrival_s = trace.arrival_s - trace.arrival_s[0]
    span_s = float(arrival_s[-1])
    if not span_s > 0:
        raise UsageError("its requests all arrive at once: no rate", where=str(path), fix="Take a longer trace")
    hours = max(int(span_s // HOUR_S) + (span_s % HOUR_S >= HOUR_S / 4), 1)
    if hours > MOST_HOURS:
        raise UsageError(f"the trace runs for {hours} hours, more than a year", where=str(path))
    counts = np.bincount(np.minimum((arrival_s // HOUR_S).astype(int), hours), minlength=hours)[:hours]
    lengths = np.minimum(np.full(hours, HOUR_S), np.maximum(span_s - HOUR_S * np.arange(hours), 1e-9))
    source = f"trace {path.name}: {len(trace)} requests over {span_s / HOUR_S:.3g} h, counted by the hour"
    source = "; ".join((source, *report.messages()))
    labels = tuple(str(h) for h in range(hours))
    outputs = float(trace.output_tokens.mean())
    return Demand(labels, counts / lengths, _swing(arrival_s, hours, window_s), outputs, source)


def _swing(arrival_s: np.ndarray, hours: int, window_s: float) -> float:
    """By how much (relative) the rate varies within its hour between windows, beyond Poisson: the variance of counts
    above their mean, over the mean squared, pooled over the hours."""
    end_s = min(hours * HOUR_S, float(arrival_s[-1]))
    windows = int(end_s // window_s)
    if windows < 4:
        return 0.0
    counts = np.histogram(arrival_s, np.arange(windows + 1) * window_s)[0].astype(float)
    hour = (np.arange(windows) * window_s // HOUR_S).astype(int)
    extra = square = 0.0
    for number in range(int(hour[-1]) + 1):
        own = counts[hour == number]
        if len(own) > 3 and own.mean() > 0:
            extra += len(own) * (own.var(ddof=1) - own.mean())
            square += len(own) * own.mean() ** 2
    return math.sqrt(max(extra, 0.0) / square) if square else 0.0


_FORM = 'Write one row per hour, "hour,requests_per_s" first, or a JSON list of numbers; docs/fleet.md shows both'
