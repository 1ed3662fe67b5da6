"""Ends a load step once its outcome is decided: an SLO can no longer hold, or the queue grows without bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from tuner.load.records import Record
from tuner.measure.quantile import rank
from tuner.measure.window import RAMP_CAP
from tuner.spec.slo import Slo

_WINDOWS = 6
_WINDOW_S = 5.0
_BIGGEST = 3.0
_GENERATION = 3.0


class Open(Protocol):
    """A request under way: ``produced`` tokens until now; ``first_token_ns`` and ``last_token_ns`` on the same clock
    as ``intended_ns``, None before the first token."""

    @property
    def number(self) -> int: ...
    @property
    def intended_ns(self) -> int: ...
    @property
    def first_token_ns(self) -> int | None: ...
    @property
    def last_token_ns(self) -> int | None: ...
    @property
    def produced(self) -> int: ...


class SloWatch:
    """Knows when an SLO can no longer hold, whatever the rest of the step brings.

    A quantile SLO allows only so many misses among the step's requests (n - ceil(q n)). Once more have certainly
    missed, it is lost. A miss is certain when it was seen, or when a request still waits and has waited longer than
    the limit. Only requests count that the ramp rule cannot cut (past the first quarter), against the largest number
    that can be measured: so the full step would have missed too. That is certainty given the metric's definition, not
    a guess from a trend, and long prompts cannot fool it: they are late only when they are late.
    """

    def __init__(
        self, slos: Sequence[Slo], offsets_ns: np.ndarray, wanted_tokens: np.ndarray, warmup_ns: int, forced: bool
    ) -> None:
        self._slos = slos
        self._wanted = wanted_tokens
        self._forced = forced
        last_ns = int(offsets_ns[-1]) if len(offsets_ns) else 0
        warmup_ns = min(warmup_ns, last_ns)
        self._from_ns = warmup_ns + int(RAMP_CAP * (last_ns - warmup_ns))
        counted = offsets_ns >= warmup_ns
        self._most = int(counted.sum())
        self._most_gaps = int((wanted_tokens[counted] - 1).sum())
        self._misses = [0] * len(slos)
        self._sums_s = [0.0] * len(slos)
        self._failed = 0

    def done(self, record: Record) -> None:
        """A request ended."""
        if record.intended_ns < self._from_ns:
            return
        failed = record.error != ""
        self._failed += failed
        for k, slo in enumerate(self._slos):
            if slo.latency == "itl":
                gaps_s = np.diff(np.frombuffer(record.token_ns, dtype=np.int64)) / 1e9
                self._misses[k] += int((gaps_s > slo.limit).sum()) + failed
                self._sums_s[k] += float(gaps_s.sum())
            elif slo.latency:
                value_s = math.inf if failed else _value_s(record, slo.latency)
                self._misses[k] += value_s > slo.limit
                self._sums_s[k] += 0.0 if math.isnan(value_s) else value_s

    def verdict(self, now_ns: int, open_requests: Iterable[Open]) -> str:
        """In words which SLO is lost, empty while all can still hold. ``now_ns`` counts from the start."""
        misses, sums_s = list(self._misses), list(self._sums_s)
        for request in open_requests:
            if request.intended_ns < self._from_ns:
                continue
            for k, slo in enumerate(self._slos):
                if slo.latency and slo.latency != "itl":
                    value_s = self._at_least_s(request, now_ns, slo.latency)
                    misses[k] += value_s > slo.limit
                    sums_s[k] += value_s
        for k, slo in enumerate(self._slos):
            if slo.metric == "error_rate":
                if self._failed > slo.limit * self._most:
                    return f"error_rate cannot hold {slo.show(slo.limit)}: {self._failed} of {self._most} failed"
                continue
            most = self._most_gaps + self._failed if slo.latency == "itl" else self._most
            if slo.quantile is not None:
                allowed = most - rank(most, slo.quantile) if most else 0
                if misses[k] > allowed:
                    return (
                        f"{slo.metric} cannot hold {slo.show(slo.limit)}: {misses[k]} misses, {allowed} are allowed "
                        f"among {most}"
                    )
            elif slo.metric.endswith("_max"):
                if misses[k]:
                    return f"{slo.metric} cannot hold {slo.show(slo.limit)}"
            elif sums_s[k] > slo.limit * most:
                return f"{slo.metric} cannot hold {slo.show(slo.limit)}, even if the rest took no time"
        return ""

    def _at_least_s(self, request: Open, now_ns: int, latency: str) -> float:
        """A lower bound of a running request's latency."""
        age_s = (now_ns - request.intended_ns) / 1e9
        wanted = int(self._wanted[request.number])
        first_ns = request.first_token_ns
        if latency == "ttft":
            return age_s if first_ns is None else (first_ns - request.intended_ns) / 1e9
        if latency == "e2e":
            last_ns = request.last_token_ns
            return age_s if self._forced or last_ns is None else (last_ns - request.intended_ns) / 1e9
        if not self._forced:
            return 0.0  # it may end with any token
        if latency == "norm_latency":
            return age_s / wanted
        return (now_ns - first_ns) / 1e9 / (wanted - 1) if first_ns is not None and wanted > 1 else 0.0


def _value_s(record: Record, latency: str) -> float:
    if record.first_token_ns is None or record.last_token_ns is None:
        return math.inf
    if latency == "ttft":
        return (record.first_token_ns - record.intended_ns) / 1e9
    e2e_s = (record.last_token_ns - record.intended_ns) / 1e9
    if latency == "e2e":
        return e2e_s
    if latency == "norm_latency":
        return e2e_s / record.output_tokens
    gaps = record.output_tokens - 1
    return (record.last_token_ns - record.first_token_ns) / 1e9 / gaps if gaps else math.nan


class QueueWatch:
    """Knows when the server cannot keep up: the work that waits to be begun only ever grows.

    A request waits until its first token, and is then being served: what it still is owed says how full the server is,
    not how far behind, and rises for as long as the longest response takes on a server that never lets anybody wait.
    Work is counted in tokens (the prompt's and the output's), so that one long prompt is as much as it is, and is not
    taken for a long queue.

    The time since the warm-up is cut into windows; the queue grows without bound when in each of the last six windows
    its *lowest* point was above the lowest point of the window before. While a queue is stable, the order of its minima
    is as good as random, and six rising in a row have a probability of 1 in 720. Each window is at least 5 s, and three
    times as long as the largest request takes at the rate at which the server works, so that the arrival and the
    departure of one long context fall into one window; and a third of the time for which the responses under way have
    run on the mean, so that a server that a burst has filled is not judged before the first of them leave.

    Two more conditions keep a burst from counting: what waits must be more than two windows of the server's work, and
    the rest of the trace must bring work at least as fast as the server does it (a rest shorter than a window does not
    tell). How fast that is is told by the last five windows, in which always something waited: before, the server may
    have been idle.
    """

    def __init__(self, offsets_ns: np.ndarray, tokens: np.ndarray, warmup_ns: int) -> None:
        self._offsets_s = offsets_ns / 1e9
        self._work = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._biggest = int(tokens.max()) if len(tokens) else 0
        self._from_s = warmup_ns / 1e9
        self._times_s: list[float] = []
        self._waiting: list[int] = []
        self._owed: list[int] = []

    def verdict(self, now_s: float, waiting: int, owed: int, running_s: float) -> str:
        """Takes one look at the queue, made about every second, ``now_s`` after the start; says in words that it grows
        without bound, or is empty. ``waiting`` are the tokens of requests without a first token, ``owed`` those and
        what the responses under way are owed, ``running_s`` for how long these have run on the mean."""
        if now_s < self._from_s:
            return ""  # the load is not on yet
        self._times_s.append(now_s)
        self._waiting.append(waiting)
        self._owed.append(owed)
        times_s, queue = np.asarray(self._times_s), np.asarray(self._waiting)
        elapsed_s = now_s - times_s[0]
        if elapsed_s < _WINDOWS * _WINDOW_S or not (served_per_s := self._served_per_s(0)):
            return ""  # where nothing is served at all, the SLOs or the timeout will say so
        window_s = max(_WINDOW_S, _BIGGEST * self._biggest / served_per_s, running_s / _GENERATION)
        left_s = float(self._offsets_s[-1]) - now_s
        if elapsed_s < _WINDOWS * window_s or left_s < window_s:
            return ""
        which = ((now_s - times_s) / window_s).astype(int)
        lowest = [int(queue[which == k].min(initial=np.iinfo(np.int64).max)) for k in range(_WINDOWS)]  # newest first
        if any(newer <= older for newer, older in pairwise(lowest)):
            return ""
        served_per_s = self._served_per_s(int(np.searchsorted(times_s, now_s - (_WINDOWS - 1) * window_s)))
        coming = int(self._work[-1]) - self._arrived(now_s)
        if waiting < 2 * window_s * served_per_s or coming < left_s * served_per_s:
            return ""
        return (
            f"saturated: the queue has grown for {_WINDOWS * window_s:.0f} s, {waiting:,} tokens of work wait "
            f"for a server that does {served_per_s:,.0f} per second"
        )

    def _served_per_s(self, since: int) -> float:
        """Tokens of work that the server has done per second since a look, or has begun, whichever is more: while it
        fills it does less than it takes on, and while it is full it may take on nothing for long."""
        arrived = self._arrived(self._times_s[-1]) - self._arrived(self._times_s[since])
        grown = min(self._waiting[-1] - self._waiting[since], self._owed[-1] - self._owed[since])
        return max(0.0, (arrived - grown) / (self._times_s[-1] - self._times_s[since]))

    def _arrived(self, at_s: float) -> int:
        """Tokens of work that the trace has brought by then."""
        return int(self._work[int(np.searchsorted(self._offsets_s, at_s, side="right"))])
