"""How many requests per second a configuration serves within every SLO, with its lower limit: from verification."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from scipy import stats

from tuner.errors import UsageError
from tuner.fleet import measured
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible, Measured, Step
from tuner.study.store import TrialRecord
from tuner.verify.arm import Launched, Range
from tuner.verify.capacity import value_at
from tuner.verify.finalists import launch_spread
from tuner.verify.judge import Arm, Table
from tuner.verify.racing import LAUNCH_SPREAD
from tuner.verify.repeats import Repeats
from tuner.words import figure

RATES = "A fleet is planned from requests per second: tune an engine that replays a trace"


def proven(study: Study, trials: Sequence[TrialRecord], arm: Arm, confidence: float) -> tuple[Range, str]:
    """The capacity in requests per second: one per launch and window, at the load where the worst SLO just holds; its
    mean over both and the one-sided limits at ``confidence``. NaN where the launches are not in the folder."""
    table = Table(_launches(trials), study.objective.slos)
    rates: dict[tuple[str, int, str], float] = {}
    for cell, steps in table.cells.items():
        load = table.capacity(cell)
        rate = value_at(steps, load, measured.OFFERED) if load > 0 else math.nan
        if rate > 0:
            rates[cell] = math.log(rate)
    repeats = Repeats(rates, launch_spread(trials))
    if arm.label not in repeats.arms:
        return (math.nan, math.nan, math.nan), ""
    estimate = repeats.estimate(arm.label)
    middle = math.exp(estimate.mean)
    low, high = (math.exp(min(x, 700.0)) for x in estimate.between(1 - confidence, 1 - confidence))
    basis = f"verified: {repeats.count(arm.label)} launches on {len(repeats.windows)} held-out windows"
    if not low > 0:
        error = stats.norm.ppf(confidence) * LAUNCH_SPREAD
        low, high = middle * math.exp(-error), middle * math.exp(error)
        basis += f", too few for a limit: launches are assumed to differ by {LAUNCH_SPREAD * 100:g} %"
    return (middle, low, high), basis


def kept(
    study: Study, arm: Arm, steps: Sequence[Step], trials: Sequence[TrialRecord], confidence: float
) -> tuple[Range, str]:
    """The capacity that the verdict kept, as a load, times the trace's rate as any step of the study saw it."""
    seen = [
        s.metrics[measured.OFFERED] / s.load
        for s in steps or measured.steps(trials)
        if s.metrics.get(measured.OFFERED, 0) > 0
    ]
    if not seen:
        raise UsageError("no arrival rate was measured", where=study.folder, fix=RATES)
    per_load = statistics.fmean(seen)
    middle, _, high = (x * per_load for x in arm.capacity)
    safe = arm.safe_load * per_load or middle * math.exp(-stats.norm.ppf(confidence) * LAUNCH_SPREAD)
    return (middle, safe, high), f"verified: the safe load that the verdict kept (95 %), {figure(arm.safe_load)}"


def _launches(trials: Iterable[TrialRecord]) -> list[Launched]:
    """The launches of verification, from the labels (``verify 2 trial 17``) under which they were kept."""
    found = []
    for trial in trials:
        label = str((trial.extra or {}).get("label", ""))
        word, _, rest = label.partition(" ")
        number, _, arm = rest.partition(" ")
        if trial.role != "verify" or word != "verify" or not number.isdecimal() or not arm:
            continue
        if isinstance(trial.outcome, Measured | Infeasible):
            found.append(Launched(arm, int(number), trial.outcome.steps))
    return found
