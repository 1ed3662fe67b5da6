"""The study's traffic: the trace, cut to what the model takes, and its search and held-out windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.load import formats, windows
from tuner.load.trace import Trace, texts_lost, with_lengths
from tuner.spec.slo import bound_responses
from tuner.spec.study import Study
from tuner.verify.capacity import BEYOND
from tuner.words import figure

FULL = 0.9  # share of a step that the last arrivals of a trace must span


@dataclass(frozen=True, slots=True)
class Workload:
    """``search`` and ``heldout`` windows never overlap; ``whole`` is the trace after cutting lengths. ``notes`` say
    what of the file is not in it as it stood, which loads it is too short for, and what its windows cannot say;
    ``fills`` is the highest load at which every window lasts as long as a step is to."""

    whole: Trace
    search: tuple[Trace, ...]
    heldout: tuple[Trace, ...]
    notes: tuple[str, ...] = ()
    fills: float = math.inf

    @property
    def rps(self) -> float:
        """Requests per second of the trace at load 1; 0 where it has no length."""
        lasts_s = float(self.whole.arrival_s[-1] - self.whole.arrival_s[0])
        return (len(self.whole) - 1) / lasts_s if lasts_s > 0 else 0.0


def read(study: Study) -> Workload:
    """Reads the study's trace. Raises UsageError where it is too short for the windows asked for.

    A search window holds what the highest load replays in ``window_s`` seconds (or what the trace has), a held-out
    window what verification may replay above that; :func:`at_load` cuts what a lower load needs from its beginning.
    """
    spec = study.trace
    if not spec.file:  # a function engine needs no traffic
        one = np.ones(1, dtype=np.int64)
        none = Trace("none", np.zeros(1), one, one, 0, one[:0], np.zeros(2, dtype=np.int64))
        return Workload(none, (none,), (none,))
    given, report = formats.read_with_report(Path(spec.file), spec.format)
    longest = study.space.facts.get("max_model_len")
    trace, cut = shorten(given, spec.max_input_tokens, spec.max_output_tokens, longest)
    notes = report.messages()
    if cut:
        notes.append(f"{cut} requests cut to what the study or the model takes")
    notes += texts_lost(given, trace)
    top = max(study.load.ladder)
    parts = windows.split(
        trace,
        search=spec.search_windows,
        held_out=max(1, spec.heldout_windows),
        max_seconds=spec.window_s * top * BEYOND,
    )
    search = tuple(at_load(window, top, spec.window_s) for window in parts.search)
    shortest_s = min(_lasts_s(trace, window) for window in parts.windows)
    fills = shortest_s / spec.window_s
    if fills < top:
        notes.append(
            f"too short: its windows have no more requests after {figure(shortest_s / top)} s of the "
            f"{spec.window_s:g} s of a step at load {top:g}, and fill a step up to load {fills:.2g} only. "
            "Take a longer trace, a shorter trace.window, fewer windows or lower loads"
        )
    if not bound_responses(study.objective.slos, spec.window_s):
        notes.append(
            "no SLO bounds how long a response takes, so cost counts what arrives in the "
            f"{spec.window_s:g} s of a step, and two servers that both keep up differ by what is still on its way "
            "at its end. Take a trace.window of many responses' length, or add an SLO on tpot"
        )
    return Workload(trace, search, parts.held_out, tuple(notes), fills)


def _lasts_s(trace: Trace, window: windows.Window) -> float:
    """Until the next request; the trace's last window until a little after its last one."""
    end_s = trace.arrival_s[window.stop] if window.stop < len(trace) else trace.arrival_s[-1] / FULL
    return float(end_s - window.start_s)


def at_load(window: Trace, load: float, window_s: float) -> Trace:
    """The requests of ``window`` that are replayed at ``load``: as many as arrive in ``window_s`` seconds of replay.

    Every step then takes the same time, whatever its load, and higher loads see more requests, not shorter ones.
    """
    return windows.cut_time(window, 0.0, window_s * load, name=window.name)


def shorten(trace: Trace, inputs: int | None, outputs: int | None, longest: int | None) -> tuple[Trace, int]:
    """``trace`` with prompts and answers cut to the limits given (tokens), and how many requests that changed.

    ``longest`` bounds prompt and answer together: the prompt is cut first.
    """
    given = np.iinfo(np.int64).max
    new_out = np.minimum(trace.output_tokens, outputs or given)
    new_in = np.minimum(trace.input_tokens, inputs or given)
    if longest:
        new_out = np.minimum(new_out, max(1, longest // 2))
        new_in = np.minimum(new_in, longest - new_out)
    changed = int(np.count_nonzero((new_in != trace.input_tokens) | (new_out != trace.output_tokens)))
    if not changed:
        return trace, 0
    return with_lengths(trace, new_in, new_out), changed
