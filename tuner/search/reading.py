"""What one outcome says in the search's own numbers: cost and latency in logarithms, and one capacity."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.search.ledger import COST_KEY, Seen, good_steps
from tuner.spec.objective import Objective
from tuner.spec.slo import Slo
from tuner.study.outcome import Infeasible, Outcome, Step

CEILING = 1.2  # log units: how far beyond its limit a missed SLO still tells more
SLOPE = 3.0  # d log(latency) / d log(load) that is assumed where a ladder did not bracket the capacity
BEYOND = 0.4  # log units of load that a capacity may lie beyond the ladder
FIGURE = re.compile(r"0x[0-9a-f]+|(?<![A-Za-z\d])\d[\d.,]*")  # in a crash's message


@dataclass(frozen=True, slots=True)
class Reading:
    """One launch as numbers. ``steps`` are (place in the ladder, log cost, log latency) of what may be believed of the
    two axes; ``good`` are the places that are points of the front, ``missed`` those that missed an SLO; ``capacity`` is
    the logarithm of the highest load within SLO with the standard deviation ``capacity_sd`` (None: the launch said
    nothing); ``works`` above 0 where the server served, below 0 by how badly it did not (None: not known); ``cause`` is
    what it crashed of, without the numbers (None: it served, or its memory was short by so many bytes, which ``works``
    says)."""

    seen: Seen
    steps: tuple[tuple[int, float, float], ...] = ()
    good: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()
    capacity: float | None = None
    capacity_sd: float = 0.0
    works: float | None = None
    cause: str | None = None


def read(seen: Seen, objective: Objective, loads: Sequence[float]) -> Reading:
    """The reading of one trial; a running trial has none of the numbers."""
    outcome = seen.outcome
    if outcome is None:
        return Reading(seen)
    if isinstance(outcome, Infeasible):
        return Reading(seen, works=_shortfall(outcome), cause=None if outcome.short_bytes else cause(outcome))
    trusted = [s for s in outcome.steps if not s.untrusted]
    if not trusted:
        return Reading(seen)
    good = {nearest(loads, s.load) for s in good_steps(outcome, objective)}
    axes = []
    for step in trusted:
        if step.saturated:
            continue
        cost, latency = step.metrics.get(COST_KEY, math.inf), step.metrics.get(objective.latency_key, math.inf)
        if 0 < cost < math.inf and 0 < latency < math.inf and (step.ok or within(objective, objective.latency, step)):
            axes.append((nearest(loads, step.load), math.log(cost), math.log(latency)))
    bound, sd = capacity([s.load for s in trusted], [_margin(s, objective.slos) for s in trusted])
    missed = {nearest(loads, s.load) for s in trusted if not s.ok}
    return Reading(seen, tuple(axes), tuple(sorted(good)), tuple(sorted(missed)), bound, sd, _room(outcome))


def cause(outcome: Infeasible) -> str:
    """What a server crashed of, in words: two crashes that differ in their figures alone have the same cause (the 8 of
    fp8 is no figure)."""
    return FIGURE.sub("#", f"{outcome.cause}: {outcome.message}")


def nearest(loads: Sequence[float], load: float) -> int:
    """The place in the ladder of a measured load."""
    return min(range(len(loads)), key=lambda i: abs(math.log(loads[i] / load)))


def margin(metrics: Mapping[str, float], slos: Sequence[Slo]) -> float:
    """How far the worst SLO is from its limit: log(value / limit), below 0 where every SLO holds, flattened above 0 to
    :data:`CEILING` (how hopeless a miss is matters little)."""
    worst = max((slo.gap(metrics) for slo in slos), default=-math.inf)
    return worst if worst <= 0 else CEILING * (1 - math.exp(-worst / CEILING))


def capacity(loads: Sequence[float], margins: Sequence[float]) -> tuple[float, float]:
    """Logarithm of the load at which the worst margin crosses 0, and its standard deviation: interpolated between the
    last load within SLO and the first one beyond; extrapolated by at most :data:`BEYOND` outside the ladder."""
    logs = [math.log(load) for load in loads]
    first = next((i for i, m in enumerate(margins) if m > 0), None)
    if first is None:
        slope = SLOPE
        if len(logs) > 1 and logs[-1] > logs[-2] and math.isfinite(margins[-1] - margins[-2]):
            slope = min(max((margins[-1] - margins[-2]) / (logs[-1] - logs[-2]), 1.0), 8.0)
        room = -margins[-1] if math.isfinite(margins[-1]) else BEYOND * slope
        return logs[-1] + min(max(room, 0.0) / slope, BEYOND), 0.15
    if first == 0:
        return logs[0] - 0.02 - margins[0] / SLOPE, 0.15
    gap = logs[first] - logs[first - 1]
    before = -margins[first - 1] if math.isfinite(margins[first - 1]) else CEILING
    share = before / max(before + margins[first], 1e-9)
    return logs[first - 1] + gap * min(max(share, 0.02), 0.98), max(0.25 * gap, 0.02)


def within(objective: Objective, metric: str, step: Step) -> bool:
    """Whether one metric of a step keeps its own limit; true where it has none."""
    limits = [s for s in objective.slos if s.metric == metric]
    return bool(limits) and not any(s.miss(step.metrics) for s in limits)


def _margin(step: Step, slos: Sequence[Slo]) -> float:
    if step.saturated:
        return CEILING
    found = margin(step.metrics, slos)
    return min(found, -1e-3) if step.ok else max(found, 0.05)


def _shortfall(outcome: Infeasible) -> float | None:
    """A memory crash is a margin in quarters of 4 GiB, any other crash simply one; what was transient says nothing."""
    if outcome.transient:
        return None
    if outcome.short_bytes is not None and outcome.short_bytes > 0:
        return -min(max(outcome.short_bytes / (4 * 2**30), 0.25), 1.5)
    return -1.0


def _room(outcome: Outcome) -> float:
    """A server that ran had room; its log's "maximum concurrency" says how much (1.0: one longest request, no more)."""
    concurrency = outcome.boot.facts.get("max_concurrency")
    return min(max(math.log2(max(concurrency, 1e-3)) / 3, 0.25), 1.5) if concurrency else 1.0
