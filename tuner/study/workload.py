"""The study's traffic: the trace, cut to what the model takes, and its search and held-out windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tuner.engines.build import place
from tuner.errors import UsageError
from tuner.load import formats, windows
from tuner.load.sharing import FILLS_S, NEAR, SHARED, shared_tokens, sharing, to_fill_s
from tuner.load.summary import rate_per_s
from tuner.load.trace import Trace, texts_lost, with_lengths
from tuner.spec.slo import bound_responses
from tuner.spec.study import HELD_OUT, WIDELY, Study
from tuner.study.store import Store
from tuner.verify.capacity import BEYOND, FOLLOWED, highest_load
from tuner.words import figure

FULL = 0.9  # share of a step that the last arrivals of a trace must span
UNEVEN = 2.0  # by how many times a window's rate may be off the trace's unsaid
STEADIER = "Take a longer trace.window or a steadier part of the trace"
FLAT = 0.25  # a load that is higher by 2 has at least 2 ** FLAT times the requests per second


@dataclass(frozen=True, slots=True)
class Workload:
    """``search`` and ``heldout`` windows never overlap; ``climbed`` are the search's with what a ladder that grows may
    replay above its highest load; ``whole`` is the trace after cutting lengths. ``notes`` say
    what of the file is not in it as it stood, which loads it is too short for, where its windows have another rate
    than it has or share fewer prefixes, and what they cannot say; ``fills`` is the highest load at which every window
    lasts as long as a step is to; before each step the prompts of ``fill_s`` seconds before its
    window are sent."""

    whole: Trace
    search: tuple[Trace, ...]
    heldout: tuple[Trace, ...]
    climbed: tuple[Trace, ...]
    notes: tuple[str, ...] = ()
    fills: float = math.inf
    fill_s: float = 0.0

    @property
    def rps(self) -> float:
        """Requests per second of the trace at load 1; 0 where it has no length."""
        return rate_per_s(self.whole) or 0.0


def read(study: Study) -> Workload:
    """Reads the study's trace. Raises UsageError where it is too short for the windows asked for, and where a study
    that has not begun would measure a window of which no request is left after the warm-up.

    A search window holds what the highest load replays in ``window_s`` seconds (or what the trace has), a held-out
    window what verification may replay above that; :func:`at_load` cuts what a lower load needs from its beginning.
    """
    try:
        return _read(study)
    except UsageError as error:  # one of the trace file's own has its line there
        error.where = error.where or place(study, "trace", "file")
        raise


def _read(study: Study) -> Workload:
    spec = study.trace
    if not spec.file:  # a function engine needs no traffic
        one = np.ones(1, dtype=np.int64)
        none = Trace("none", np.zeros(1), one, one, 0, one[:0], np.zeros(2, dtype=np.int64))
        return Workload(none, (none,), (none,), (none,))
    given, report = formats.read_with_report(
        Path(spec.file), spec.format, tokenizer=study.engine.tokenizer(study.model)
    )
    longest = study.space.facts.get("max_model_len")
    trace, cut = shorten(given, spec.max_input_tokens, spec.max_output_tokens, longest)
    notes = report.messages()
    if cut:
        notes.append(f"{cut} requests cut to what the study or the model takes")
    notes += texts_lost(given, trace)
    fill_s = spec.fill_cache_s
    if fill_s is None:
        fill_s = to_fill_s(trace, study.load.warmup_s) if study.fills_cache and study.engine.kind != "function" else 0.0
    if fill_s and not len(trace.block_ids):
        raise UsageError(
            "trace.fill_cache changes nothing: the trace does not say which prompts begin alike",
            where=place(study, "trace", "fill_cache"),
            fix="Leave it out, or take a trace with prefixes (docs/traces.md)",
        )
    top = max(study.load.ladder)
    parts = _parts(trace, study, fill_s)
    search = tuple(at_load(window, top, spec.window_s) for window in parts.search)
    if study.engine.kind == "function":  # it never sees the trace: nothing is replayed
        return Workload(trace, search, parts.held_out, search, tuple(notes), fill_s=fill_s)
    fills = _fills(trace, parts, spec.window_s)
    if fills < top:
        notes.append(
            f"too short: its windows have no more requests after {figure(fills * spec.window_s / top)} s of the "
            f"{spec.window_s:g} s of a step at load {top:g}, and fill a step up to load {fills:.2g} only. "
            "Take a longer trace, a shorter trace.window, fewer windows or lower loads"
        )
    if not bound_responses(study.objective.slos, spec.window_s - study.load.warmup_s):
        notes.append(
            "no SLO bounds how long each response takes, so cost counts what arrives in the "
            f"{spec.window_s:g} s of a step, and two servers that both keep up differ by what is still on its way "
            "at its end. Take a trace.window of many responses' length, or add an SLO on tpot_p99"
        )
    climbed = parts.search if study.grows else search
    found = Workload(trace, search, parts.held_out, climbed, fills=fills, fill_s=fill_s)
    _refuse_empty(study, found)
    return replace(found, notes=(*notes, *_few(study, found), *_uneven(study, found), *_colder(study, found)))


def _parts(trace: Trace, study: Study, fill_s: float) -> windows.Split:
    """The trace's windows. Where the study leaves open how many are held out, as many of :data:`HELD_OUT` as leave each
    of them a whole step at the ladder's top: by windows a difference to the default is proven with fewer GPU-hours than
    by launches (docs/statistics.md)."""
    spec, top = study.trace, max(study.load.ladder)
    followed = FOLLOWED if WIDELY in study.rules else BEYOND

    def parts(held_out: int) -> windows.Split:
        return windows.split(
            trace,
            search=spec.search_windows,
            held_out=held_out,
            max_seconds=spec.window_s * top * followed,
            earlier_s=fill_s,
        )

    if study.heldout_windows is not None:
        return parts(max(1, study.heldout_windows))
    least, most = HELD_OUT
    if study.engine.kind == "function":  # it sees no traffic: one window is like another
        return parts(least)
    for held_out in range(most, least, -1):
        with suppress(UsageError):  # not a request for each
            if _fills(trace, found := parts(held_out), spec.window_s) >= top:
                return found
    return parts(least)


def _fills(trace: Trace, parts: windows.Split, window_s: float) -> float:
    """The load up to which every window lasts as long as a step of ``window_s``."""
    return min(_lasts_s(trace, window) for window in parts.windows) / window_s


def measured(study: Study, window: Trace, load: float) -> int:
    """How many requests of ``window`` a step at ``load`` measures: those that it replays after its warm-up."""
    begin, end = np.searchsorted(window.arrival_s, [study.load.warmup_s * load, study.trace.window_s * load])
    return int(end - begin)


def _refuse_empty(study: Study, traffic: Workload) -> None:
    """UsageError where a step would have nothing to measure, at the lowest load or one that the trace fills. Of a
    ladder that is not settled only the beginning is known: load 1, or what the trace fills, on the first window."""
    several, ladder = (*traffic.search, *traffic.heldout), study.load.ladder
    loads = [load for load in ladder if load <= max(traffic.fills, min(ladder))]
    if study.load.auto:
        several, loads = several[:1], [min(1.0, float(several[0].arrival_s[-1]) / study.trace.window_s) or 1.0]
    empty = [(window, load) for window in several for load in loads if not measured(study, window, load)]
    if empty and not Store(Path(study.folder)).begun():
        window, load = empty[0]
        raise UsageError(
            f"nothing to measure: window {_short(window)} of the trace has no request after the first "
            f"{study.load.warmup_s:g} s (load.warmup) of the {study.trace.window_s:g} s of a step at load {load:.3g}",
            fix="Take a longer trace.window, a shorter load.warmup or another part of the trace (tuner trace cut)",
        )


def _few(study: Study, traffic: Workload) -> list[str]:
    """Where a step at the middle of the ladder measures fewer requests than let the strictest percentile be less than
    the slowest of them."""
    ladder, strict = study.load.ladder, max((slo.quantile or 0.0 for slo in study.objective.slos), default=0.0)
    load, needed = ladder[(len(ladder) - 1) // 2], math.ceil(1 / (1 - strict) - 1e-9)
    several = (*traffic.search, *traffic.heldout)
    fewest = min(measured(study, window, load) for window in several)
    if study.load.auto or load > traffic.fills or not 0 < fewest < needed:
        return []
    warmup_s = study.load.warmup_s
    enough_s = warmup_s + (study.trace.window_s - warmup_s) * needed / fewest
    slowest = f"what holds for {strict * 100:g} % of them is up to the slowest: a single long prompt decides"
    window = f"A trace.window of {math.ceil(enough_s)} s measures {needed}"
    return [f"few requests: at load {load:g} a step measures {fewest}, and {slowest}. {window}"]


def _uneven(study: Study, traffic: Workload) -> list[str]:
    """Where a window's rate is not the trace's (at the lowest such load), and where a higher load brings no more
    requests; of the loads that the trace fills."""
    loads = [load for load in study.load.ladder if load <= traffic.fills]
    lasts_s = study.trace.window_s - study.load.warmup_s
    if not traffic.rps or lasts_s <= 0:
        return []
    rates = {
        _short(window): [measured(study, window, load) / lasts_s for load in loads]
        for window in (*traffic.search, *traffic.heldout)
    }
    notes = []
    for at, load in enumerate(loads):
        usual = traffic.rps * load
        off = {
            name: own[at]
            for name, own in rates.items()
            if not usual / UNEVEN <= own[at] <= usual * UNEVEN and _beyond_chance(own[at], usual, lasts_s)
        }
        if off:
            said = ", ".join(f"{name} {figure(rate)}/s" for name, rate in off.items())
            notes.append(f"uneven: at load {load:g} the trace has {figure(usual)} requests/s, but {said}. {STEADIER}")
            break
    for name, own in rates.items():
        steps = pairwise(zip(loads, own, strict=True))
        flat = [
            (low, high)
            for (low, few), (high, more) in steps
            if more < few * (high / low) ** FLAT and _beyond_chance(more, few * high / low, lasts_s)
        ]
        if flat:
            low, high = flat[0]
            notes.append(f"uneven: in {name} load {high:g} has hardly more requests/s than load {low:g}. {STEADIER}")
            break
    return notes


def _colder(study: Study, traffic: Workload) -> list[str]:
    """Where less of the prompts is shared with those before them in a step than in the trace: what was not sent before
    is not in the cache."""
    usual, filled_s = sharing(traffic.whole).token_share, traffic.fill_s
    if usual < SHARED:
        return []
    loads = [1.0] if study.load.auto else [load for load in study.load.ladder if load <= traffic.fills]
    loads = loads or [min(study.load.ladder)]

    def shares(fill_s: float) -> list[float]:
        parts = windows.split(
            traffic.whole, search=len(traffic.search), held_out=len(traffic.heldout), earlier_s=fill_s
        )
        return [_share(study, (*parts.search, *parts.held_out), load) for load in loads]

    measured, enough = shares(filled_s), NEAR * usual
    if min(measured) >= enough:
        return []
    fix, best = "A longer trace would tell more", max(min(measured), NEAR * enough)
    at_s = traffic.whole.arrival_s
    for fill_s in (f for f in FILLS_S if filled_s < f < min(at_s[-1] / 2, at_s[len(at_s) // 2])):
        if (within := min(shares(fill_s))) > best:
            fix, best = f"With trace.fill_cache: {fill_s}s it is {within * 100:.0f} %", within
        if within >= enough:
            break
    shown, at = sorted({min(measured), max(measured)}), sorted({loads[0], loads[-1]})
    since = f"holds the {filled_s:g} s before the step" if filled_s else "is filled anew by each step"
    return [
        f"colder: of the trace's prompt tokens {usual * 100:.0f} % begin an earlier prompt too, of those that a step "
        f"measures {' to '.join(f'{share * 100:.0f}' for share in shown)} % at load "
        f"{' to '.join(f'{load:g}' for load in at)}, because the prefix cache {since}. {fix}"
    ]


def _share(study: Study, parts: Sequence[Trace], load: float) -> float:
    """Of the prompt tokens that steps at ``load`` measure on ``parts``, those that an earlier prompt begins with."""
    shared = tokens = 0
    for step in (at_load(part, load, study.trace.window_s) for part in parts):
        counted = step.arrival_s >= study.load.warmup_s * load
        shared += int(shared_tokens(step)[counted].sum())
        tokens += int(step.input_tokens[counted].sum())
    return shared / max(tokens, 1)


def _beyond_chance(rate: float, usual: float, lasts_s: float) -> bool:
    """Whether counts of so many requests differ by more than two standard deviations of a steady (Poisson) trace."""
    return abs(rate - usual) * lasts_s > 2 * (usual * lasts_s) ** 0.5


def _short(window: Trace) -> str:
    return window.name.rpartition("/")[2]


def _lasts_s(trace: Trace, window: windows.Window) -> float:
    """Until the next request; the trace's last window until a little after its last one."""
    end_s = trace.arrival_s[window.stop] if window.stop < len(trace) else trace.arrival_s[-1] / FULL
    return float(end_s - window.start_s)


def at_load(window: Trace, load: float, window_s: float) -> Trace:
    """The requests of ``window`` that are replayed at ``load``: as many as arrive in ``window_s`` seconds of replay.

    Every step then takes the same time, whatever its load, and higher loads see more requests, not shorter ones.
    """
    return windows.cut_time(window, 0.0, window_s * load, name=window.name)


def climb(study: Study, window: Trace) -> Iterator[float]:
    """The loads that a launch of the search is measured at on ``window``, low to high, until it misses at one: the
    ladder's, and where that grows those above it, two to the doubling, for as far as the window fills a step."""
    yield from study.load.ladder
    top, highest = max(study.load.ladder), highest_load(study, (window,)) if study.grows else 0.0
    above = (float(f"{top * 2 ** (number / 2):.2g}") for number in itertools.count(1))
    yield from itertools.takewhile(lambda load: load <= highest, above)


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
