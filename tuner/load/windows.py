"""Windows of a trace: cut by time or by count, split into search and held-out windows, warp by a load factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tuner.errors import UsageError
from tuner.load.trace import Trace

Kind = Literal["search", "held-out"]
MAX_SPAN_S = 1e9  # 30 years: times of a replay are nanoseconds in 64 bits


@dataclass(frozen=True, slots=True)
class Window:
    """Requests ``first`` up to but not including ``stop`` of a trace; ``start_s`` and ``end_s`` are the arrivals of its
    first and last request on the whole trace's clock."""

    kind: Kind
    first: int
    stop: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Search and held-out windows as traces of their own; ``windows`` says where each was cut, in order of time."""

    search: tuple[Trace, ...]
    held_out: tuple[Trace, ...]
    windows: tuple[Window, ...]


def warp(arrival_s: np.ndarray, load: float) -> np.ndarray:
    """The arrivals at ``load`` times the rate: every gap is divided by ``load``, so order and burst shape stay.

    ``arrival_s`` (n,) seconds; returns a new (n,) float64 array. Raises UsageError unless 0 < load < infinity,
    and where they last for longer than :data:`MAX_SPAN_S`.
    """
    if not (math.isfinite(load) and load > 0):
        raise UsageError(f"load {load} is not a positive number", fix="Give a factor such as 1.5")
    with np.errstate(over="ignore"):
        warped = np.asarray(arrival_s, dtype=np.float64) / load
    if len(warped) and warped[-1] > MAX_SPAN_S:
        raise UsageError(f"at load {load:g} the trace lasts for over 30 years", fix="Give a factor such as 1.5")
    return warped


def cut(trace: Trace, first: int, stop: int, *, name: str | None = None) -> Trace:
    """Requests ``first <= i < stop`` as a trace of its own, whose first request arrives at 0.

    Raises UsageError where that leaves no request.
    """
    first, stop = max(first, 0), min(stop, len(trace))
    if first >= stop:
        raise UsageError(
            f"requests {first} to {stop} of trace {trace.name} are none (it has {len(trace)})",
            fix="Choose a window inside the trace; `tuner trace info` shows its size",
        )
    arrival_s = trace.arrival_s[first:stop]
    next_s = float(trace.arrival_s[stop]) if stop < len(trace) else trace.lasts_s
    blocks = trace.block_offsets[first : stop + 1]
    return replace(
        trace,
        name=name or f"{trace.name}[{first}:{stop}]",
        arrival_s=arrival_s - arrival_s[0],
        input_tokens=trace.input_tokens[first:stop],
        output_tokens=trace.output_tokens[first:stop],
        block_ids=trace.block_ids[blocks[0] : blocks[-1]],
        block_offsets=blocks - blocks[0],
        texts=None if trace.texts is None else trace.texts[first:stop],
        lasts_s=next_s - float(arrival_s[0]),
        earlier=None if first else trace.earlier,
    )


def cut_time(trace: Trace, start_s: float, end_s: float, *, name: str | None = None) -> Trace:
    """The requests with ``start_s <= arrival_s < end_s``, the first of them arriving at 0; UsageError where none."""
    if not (math.isfinite(start_s) and end_s > start_s):
        raise UsageError(f"{start_s} s to {end_s} s is not a window", fix="Give a start before the end, in seconds")
    first, stop = np.searchsorted(trace.arrival_s, [start_s, end_s], side="left")
    if first >= stop:
        last_s = float(trace.arrival_s[-1]) if len(trace) else 0.0
        raise UsageError(
            f"trace {trace.name} has no request from {start_s:g} s to {end_s:g} s",
            fix=f"Its arrivals run from 0 to {last_s:g} s",
        )
    return _ending(cut(trace, int(first), int(stop), name=name), end_s - float(trace.arrival_s[first]))


def _ending(trace: Trace, end_s: float) -> Trace:
    """``trace``, which lasts until ``end_s`` at the most."""
    if math.isnan(trace.lasts_s) and end_s >= trace.until_s:
        return trace
    return replace(trace, lasts_s=min(trace.until_s, end_s))


def split(
    trace: Trace,
    *,
    search: int = 1,
    held_out: int = 1,
    by: Literal["count", "time"] = "count",
    max_requests: int | None = None,
    max_seconds: float | None = None,
    earlier_s: float = 0.0,
) -> Split:
    """Splits ``trace`` into ``search`` + ``held_out`` contiguous windows of which no two share a request.

    The trace is divided into equal parts (of requests, or of time with ``by="time"``); each part gives one window,
    which starts with the part and is limited to ``max_requests`` requests and to ``max_seconds`` from its first
    arrival (exclusive). Kinds are spread evenly over the trace, so that a drift over the day meets both, and a search
    window comes first. Where ``earlier_s`` is above 0, the first so many seconds are in no part, and each window has
    what came in so many seconds before it as ``earlier``, other windows' requests too.
    Raises UsageError unless there is at least one window of each kind and a request for every window, and where a
    window is to last no time.
    """
    if search < 1 or held_out < 1:
        raise UsageError(
            f"a split needs search and held-out windows, not {search} and {held_out}", fix="Ask for at least 1 of each"
        )
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError(f"{max_seconds:g} s is no window's length", fix="Give seconds above 0")
    parts = search + held_out
    begin = int(np.searchsorted(trace.arrival_s, earlier_s, side="left")) if earlier_s > 0 else 0
    if begin and begin > len(trace) - parts:
        raise UsageError(
            f"trace {trace.name} has no {parts} windows after its first {earlier_s:g} s",
            fix="Take a longer trace, or less before each window",
        )
    edges = _edges(trace, parts, by, begin)
    kinds = _spread(search, held_out)
    windows: list[Window] = []
    for kind, first, edge in zip(kinds, edges[:-1], edges[1:], strict=True):
        stop = min(edge, first + max_requests) if max_requests is not None else edge
        if max_seconds is not None and first < stop:
            until_s = trace.arrival_s[first] + max_seconds
            stop = min(stop, int(np.searchsorted(trace.arrival_s, until_s, side="left")))
        if first >= stop:
            raise UsageError(
                f"trace {trace.name} ({len(trace)} requests) has no request for one of its {parts} windows",
                fix="Ask for fewer or longer windows" + ("" if by == "count" else ", or split by count"),
            )
        windows.append(Window(kind, first, stop, float(trace.arrival_s[first]), float(trace.arrival_s[stop - 1])))
    traces: dict[str, list[Trace]] = {"search": [], "held-out": []}
    for window in windows:
        of_kind = traces[window.kind]
        part = cut(trace, window.first, window.stop, name=f"{trace.name}/{window.kind}-{len(of_kind)}")
        if earlier_s > 0:
            before = int(np.searchsorted(trace.arrival_s, window.start_s - earlier_s, side="left"))
            part = replace(part, earlier=cut(trace, before, window.first) if before < window.first else None)
        of_kind.append(part if max_seconds is None else _ending(part, max_seconds))
    return Split(tuple(traces["search"]), tuple(traces["held-out"]), tuple(windows))


def _edges(trace: Trace, parts: int, by: str, begin: int) -> list[int]:
    """parts + 1 request numbers, never decreasing, from ``begin`` to n."""
    n = len(trace)
    if by == "count":
        return [begin + (n - begin) * k // parts for k in range(parts + 1)]
    if by != "time":
        raise UsageError(f"cannot split by {by!r}", fix="Use count or time")
    first_s, last_s = (float(trace.arrival_s[begin]) if begin else 0.0, float(trace.arrival_s[-1])) if n else (0.0, 0.0)
    times = [first_s + (last_s - first_s) * (k / parts) for k in range(1, parts)]
    return [begin, *(int(edge) for edge in np.searchsorted(trace.arrival_s, times, side="left")), n]


def _spread(search: int, held_out: int) -> list[Kind]:
    """The kinds in order of time: held-out windows as evenly between the search windows as whole numbers allow."""
    parts = search + held_out
    return ["held-out" if (k + 1) * held_out // parts > k * held_out // parts else "search" for k in range(parts)]
