"""Re-certification: does a file still keep its promise, on this engine, this driver, this GPU? A matter of minutes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from scipy import special

from tuner.engines.protocol import LaunchFailed, OnEvent
from tuner.errors import UsageError, alike
from tuner.load.trace import Trace
from tuner.study.outcome import Step
from tuner.verify.arm import COST, Range
from tuner.verify.capacity import margin_of_all
from tuner.verify.fingerprint import Fingerprint
from tuner.verify.judge import served_nothing
from tuner.verify.promise import Promise
from tuner.verify.racing import inside
from tuner.verify.repeats import BLOCKS, Spread
from tuner.verify.rounds import Launcher, insist
from tuner.verify.statistics import Estimate, pool
from tuner.words import figure

SAME = 1e-6  # log units: as good as promised, whatever is said of spreads
ASSUMED_SPREAD = Spread(0.03**2, 10.0)  # of launches (log cost), where the promise does not say


@dataclass(frozen=True, slots=True)
class Check:
    """One promised figure. ``measured`` is (middle, low, high); ``holds`` is False where it is proven broken."""

    name: str
    promised: str
    measured: Range
    holds: bool
    text: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """``holds``: nothing promised is proven broken. ``changes`` are differences of the fingerprint, in words."""

    holds: bool
    checks: tuple[Check, ...]
    changes: tuple[str, ...]
    launches: int
    fingerprint: Fingerprint
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recertify(
    promise: Promise,
    launch: Launcher,
    windows: Sequence[Trace],
    now: Fingerprint,
    on_event: OnEvent = lambda _name, _data: None,
    *,
    launches: int = 2,
    seconds: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
    short: Callable[[Sequence[Step]], str] = lambda _steps: "",
) -> Certificate:
    """Launches the promise's config up to ``launches`` times (a new one only while less than half of ``seconds`` has
    passed), replays ``windows`` at the promised load and compares.

    An SLO is broken when it is missed over all windows and launches (:func:`tuner.verify.arm.pooled`); cost and latency
    when they are proven worse than promised: the promise's own interval, the spread of launches and that of windows are
    all allowed for. ``short`` says of all steps what their windows were too short for
    (:func:`tuner.verify.fill.unfilled`).
    """
    if not windows:
        raise UsageError("there is no window of the trace to replay")

    def replay(label: str, order: Sequence[Trace]) -> list[Step]:
        with launch(promise.config, label) as rig:
            return [rig.measure(promise.load, window, window.name) for window in order]

    started_s, steps, rounds = clock(), [], 0
    failure = ""
    while rounds < launches and (rounds == 0 or clock() - started_s < seconds / 2):
        rounds += 1
        label = f"certify {rounds}"
        on_event("verify-launch", {"label": label, "launched": rounds - 1, "of": launches})
        try:
            steps.append(insist(partial(replay, label, windows if rounds % 2 else windows[::-1])))
        except LaunchFailed as failed:
            failure = f"{failed.outcome.message} ({failed.outcome.stage})"
            break
    changes = tuple(promise.fingerprint.changes(now))
    if failure:
        checks = (Check("launch", "the server starts and serves", _NOTHING, False, failure),)
    else:
        trusted = [[s for s in group if not s.untrusted] for group in steps]
        trusted = [group for group in trusted if group]
        if not trusted:
            why = "; ".join(sorted({reason for group in steps for s in group for reason in s.untrusted}))
            raise UsageError(f"the measurement cannot be believed: {why}", fix="Free the machine and repeat.")
        checks = _checks(promise, trusted)
    holds = all(check.holds for check in checks)
    text = _text(promise, checks, changes, holds, rounds, len(windows))
    text = "\n".join(filter(None, (text, short([step for group in steps for step in group]))))
    return Certificate(holds, checks, changes, rounds, now, text)


def _checks(promise: Promise, steps: Sequence[Sequence[Step]]) -> tuple[Check, ...]:
    every = [step for group in steps for step in group]
    gap = margin_of_all([[step] for step in every], promise.load, promise.slos)
    told = alike(Counter(miss for step in every for miss in step.slo_misses))
    missed = sorted(told, key=lambda miss: miss[0].isdigit())  # last, why requests failed
    limits = ", ".join(map(str, promise.slos)) or "none"
    words = "the SLOs hold" if gap <= 0 else f"SLOs missed at load {figure(promise.load)}: {'; '.join(missed[:3])}"
    if gap <= 0 and missed:
        where = ", ".join(sorted({step.window for step in every if step.slo_misses}))
        words += f" over all windows together, not on {where}: {'; '.join(missed[:3])}"
    unserved = [step for step in every if served_nothing(step)]
    if unserved:  # no mean over windows can hold that: it has no cost and no latency
        where = ", ".join(sorted({step.window for step in unserved}))
        words = f"nothing was served within the SLOs at load {figure(promise.load)} on window {where}"
    checks = [Check("slos", limits, (gap, gap, gap), gap <= 0 and not unserved, words)]
    figures = (("cost", COST, promise.cost, "USD per million output tokens", 1.0),)
    figures += ((promise.latency_metric, f"{promise.latency_metric}_s", promise.latency, "ms", 1e3),)
    for name, key, promised, unit, scale in figures:
        if not 0 < promised[0] < math.inf:
            checks.append(Check(name, "nothing", _NOTHING, True, f"of {name} the file promises nothing"))
            continue
        logs = [found for group in steps if (found := _logs(group, key))]
        lacking = sorted({step.window for step in unserved if not _logs([step], key)})
        if lacking or not logs:
            text = f"{name} was not measured" + (f" on window {', '.join(lacking)}" if lacking else "")
            checks.append(Check(name, f"{figure(promised[0] * scale, 4)} {unit}", _NOTHING, False, text))
            continue
        within = [inside(s.metrics[key], s.intervals.get(key)) ** 2 for s in every if key != COST and key in s.metrics]
        alone = fmean(within) if within else 0.0
        now = _now(logs, promise, alone)
        # the promise is itself an estimate: both errors count
        both = (*now.parts, *_promised(promised, logs, promise, alone))
        worse = Estimate(math.log(promised[0]) - now.mean, both)
        same = abs(worse.mean) < SAME
        holds = same or worse.doubt() > 1 - promise.confidence
        low, high = now.interval(promise.confidence)
        measured = (math.exp(now.mean), math.exp(low), math.exp(high))
        change = math.expm1(now.mean - math.log(promised[0])) * 100
        now_words, then_words = (figure(x[0] * scale, 4) for x in (measured, promised))
        text = f"{name} {now_words} {unit}, promised {then_words} ({change:+.1f} %)"
        if holds and change > 0 and not same:
            shown = math.expm1(worse.reach(1 - promise.confidence)) * 100
            text += f"; broken would be {shown:+.0f} % or more, by what this and the promise leave open"
        checks.append(Check(name, f"{figure(promised[0] * scale, 4)} {unit}", measured, holds, text))
    return tuple(checks)


def _logs(steps: Sequence[Step], key: str) -> list[float]:
    return [math.log(s.metrics[key]) for s in steps if 0 < s.metrics.get(key, math.nan) < math.inf]


def _now(logs: Sequence[Sequence[float]], promise: Promise, alone: float = 0.0) -> Estimate:
    """The mean over launches and windows, with the larger of what is assumed and what is seen of either's spread. One
    window does not show what windows differ by: there it is ``alone``, the variance within it."""
    means = [float(np.mean(values)) for values in logs]
    known = promise.spread if promise.spread.freedom > 0 else ASSUMED_SPREAD
    promised = (known.variance, known.freedom)
    seen = (float(np.var(means, ddof=1)), len(means) - 1.0) if len(means) > 1 else (0.0, 0.0)
    launches, freedom = pool([promised, seen])
    parts = [(launches / len(means), freedom)]
    width = min(len(values) for values in logs)
    if width > 1:
        windows, _ = pool([(float(np.var(values, ddof=1)), len(values) - 1.0) for values in logs])
        parts.append((windows / width, width - 1.0))
    elif alone:
        parts.append((alone, float(BLOCKS)))
    return Estimate(float(np.mean(means)), tuple(parts))


def _promised(
    promised: Range, logs: Sequence[Sequence[float]], promise: Promise, alone: float
) -> tuple[tuple[float, float], ...]:
    """The variance that the promised interval stands for (log scale, normal). A promise that does not say how sure it
    is counts as one launch on these windows, not as the truth."""
    _, low, high = promised
    if not (0 < low <= high < math.inf):
        return _now(logs[:1], promise, alone).parts
    error = math.log(high / low) / (2 * float(-special.ndtri((1 - promise.confidence) / 2)))
    return ((error**2, math.inf),)


_NOTHING: Range = (math.nan, math.nan, math.nan)


def _text(
    promise: Promise, checks: Sequence[Check], changes: Sequence[str], holds: bool, launches: int, windows: int
) -> str:
    lines = [f"**The promise {'holds' if holds else 'does not hold'}** at load {figure(promise.load)}."]
    lines += [f"- {'ok' if check.holds else 'BROKEN'}: {check.text}" for check in checks]
    before = promise.fingerprint.date or "an unknown date"
    counted = f"{launches} launch{'es' if launches != 1 else ''} on {windows} window{'s' if windows != 1 else ''}"
    lines.append(f"Measured in {counted}; promised on {before}.")
    lines.append(f"Changed since then: {'; '.join(changes)}." if changes else "Nothing of the fingerprint has changed.")
    return "\n".join(lines)
