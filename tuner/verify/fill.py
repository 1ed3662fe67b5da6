"""Whether the measured windows were long enough for a server that starts empty to fill."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from tuner.spec.study import Study
from tuner.study.outcome import Step
from tuner.verify.capacity import REACH
from tuner.words import figure

RESPONSES = 10  # mean responses that a window must last
WHY = "a server that starts empty may not have filled by then"


def unfilled(study: Study, steps: Iterable[Step], load: float) -> str:
    """What a promise at ``load`` lacks where a window of the steps near it (within ``REACH``, else the nearest) lasts
    fewer than :data:`RESPONSES` mean responses; empty where it lasts as long, and where no response's length is known.
    """
    if not study.trace.file or study.engine.kind == "function":  # nothing was replayed
        return ""
    usable = [s for s in steps if not s.untrusted and 0 < s.metrics.get("e2e_mean_s", math.nan) < math.inf]
    usable = [s for s in usable if s.ok] or usable  # beyond its capacity responses last as long as the queue grows
    known = [(abs(math.log(step.load / load)), step.metrics["e2e_mean_s"]) for step in usable]
    far = max(math.log(REACH), min((away for away, _ in known), default=0.0))
    mean_s = fmean(near) if (near := [mean_s for away, mean_s in known if away <= far]) else 0.0
    window_s = study.trace.window_s - study.load.warmup_s
    if window_s >= RESPONSES * mean_s:
        return ""
    enough_s = math.ceil(RESPONSES * mean_s + study.load.warmup_s)
    return (
        f"A window measured {figure(window_s)} s, {figure(window_s / mean_s, 2)} mean responses: {WHY}. "
        f"Under traffic that stays, take a lower load, or tune with trace.window of {enough_s:,} s or more."
    )
