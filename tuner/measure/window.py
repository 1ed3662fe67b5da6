"""Which requests count: warm-up and the ramp at the start are cut, and so is the tail after the last arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tuner.load.records import ABSENT

if TYPE_CHECKING:
    from tuner.load.records import Records

RAMP_CAP = 0.25


@dataclass(frozen=True, slots=True)
class Window:
    """The measured window in nanoseconds after the replay's start, both ends included; ``asked_ns`` is when the
    traffic ends (:func:`asked_until_ns`), one mean response after the start at the earliest."""

    start_ns: int
    end_ns: int
    asked_ns: int

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def asked_s(self) -> float:
        """For how long something was asked for: not by how fast a server is, unless its answers outlast the traffic."""
        return (self.asked_ns - self.start_ns) / 1e9


def window(records: Records) -> Window:
    """The measured window, by this rule.

    Start: when the number of requests in flight first reaches its own median over the replay (a replay begins with an
    empty server; until then it is filling up), no later than a quarter into the replay, and never within the warm-up.
    End: the last intended send; what is still running then is followed to its end for its latency, but the server
    is no longer under the trace's load, so that throughput is not counted. Where all arrivals lie closer together
    than one mean response (a burst), the load is the burst itself and the end is its last response.
    """
    c = records.columns
    if not len(records):
        return Window(0, 0, 0)
    end_ns = last_ns = int(c["intended_ns"].max())
    warm_ns = min(warm_end_ns(records), last_ns)
    start_ns = _ramp_end(c["intended_ns"], c["end_ns"], warm_ns, last_ns)
    ended = c["end_ns"] != ABSENT
    whole = ended & (c["error"] == "")
    mean_ns = float((c["end_ns"] - c["intended_ns"])[whole].mean()) if whole.any() else 0.0
    if last_ns - start_ns <= mean_ns and ended.any():
        end_ns = max(last_ns, int(c["end_ns"][ended].max()))
    return Window(start_ns, end_ns, max(asked_until_ns(records), start_ns + int(mean_ns)))


def asked_until_ns(records: Records) -> int:
    """When the traffic ends: with the step's planned length, which is until its next request would leave at the most.
    A step that was stopped ends when the last of it was cut off. Where the records do not tell it is the last request,
    which is one too many for the time until it."""
    c = records.columns
    until_ns = int(lasts_s(records) * 1e9)
    if records.meta.get("stopped"):
        until_ns = min(until_ns, int(c["end_ns"].max()))
    return max(until_ns, int(c["intended_ns"].max()))


def lasts_s(records: Records) -> float:
    """How long the step's traffic was planned to last; 0 where the records do not tell."""
    return float(records.meta.get("lasts_s", 0.0))


def warm_end_ns(records: Records) -> int:
    """When the warm-up ends, in nanoseconds after the replay's start."""
    return int(float(records.meta.get("warmup_s", 0.0)) * 1e9)


def _ramp_end(begin_ns: np.ndarray, end_ns: np.ndarray, warm_ns: int, last_ns: int) -> int:
    cap_ns = warm_ns + int(RAMP_CAP * (last_ns - warm_ns))
    ends = end_ns[end_ns != ABSENT]
    times = np.concatenate([begin_ns, ends])
    change = np.concatenate([np.ones(len(begin_ns), dtype=np.int64), -np.ones(len(ends), dtype=np.int64)])
    order = np.argsort(times, kind="stable")
    times, level = times[order], np.cumsum(change[order])
    held_ns = np.diff(np.clip(np.append(times, last_ns), warm_ns, last_ns))  # how long each level held
    if not held_ns.sum():
        return warm_ns
    by_level = np.argsort(level, kind="stable")
    median = level[by_level][np.searchsorted(np.cumsum(held_ns[by_level]), held_ns.sum() / 2)]
    reached = np.flatnonzero((level >= median) & (np.append(times[1:], last_ns) >= warm_ns))
    return min(cap_ns, max(warm_ns, int(times[reached[0]]))) if len(reached) else cap_ns
