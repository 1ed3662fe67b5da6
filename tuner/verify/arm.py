"""An arm of a verification: one configuration at one load, and the launches that measured it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from tuner.measure.quantile import beyond
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo, is_metric
from tuner.study.outcome import Infeasible, Step

Range = tuple[float, float, float]  # middle, low, high
COST = "cost_usd_per_mtok_output"
FAR = 3.0  # a margin beyond e^3 = 20 times the limit says nothing more


def as_range(values: Sequence[float | str]) -> Range:
    """A range as JSON keeps it (numbers or their words). Raises ``TypeError`` or ``ValueError`` for anything else."""
    middle, low, high = map(float, values)
    return middle, low, high


@dataclass(frozen=True, slots=True)
class Finalist:
    """A point that may be the best. ``load`` is where the search expects its capacity; ``value`` its search-time
    cost in USD per million output tokens (None: it met the SLOs at no load), ``interval`` that cost's
    search-time interval; ``trial`` the search's number of it; ``promise`` the search-time probability (or any positive
    weight) of being the best, which decides how the allowed doubt is shared between finalists."""

    label: str
    config: ServingConfig
    load: float
    value: float | None = None
    interval: tuple[float, float] | None = None
    trial: int | None = None
    baseline: bool = False
    promise: float = 1.0


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch of an arm in one round: its steps, or why it failed."""

    arm: str
    round: int
    steps: tuple[Step, ...] = ()
    failure: Infeasible | None = None


def margin(step: Step, slos: Sequence[Slo]) -> float:
    """How far the worst of ``slos`` is missed: ``log(value / limit)``, negative where all hold. A step that missed one
    of them (or ended early for it) is never better than +5 %, a saturated one is as far off as can be."""
    if step.saturated:
        return FAR
    worst = min(max((slo.gap(step.metrics) for slo in slos), default=-FAR), FAR)
    said, ours = {miss.partition(" ")[0] for miss in step.slo_misses}, {slo.metric for slo in slos}
    missed = any(word in ours or not is_metric(word) for word in said)  # what names no metric is of all
    return max(worst, 0.05 if missed else -FAR)


@dataclass(frozen=True, slots=True)
class Tail:
    """How a latency's percentiles lie to the SLO's own: ``levels`` (falling) of the requests are beyond so many times
    its value (``ratios``, never falling)."""

    levels: tuple[float, ...]
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, step: Step | None, slo: Slo) -> Tail:
        """As ``step`` measured them; the SLO's alone where it did not."""
        q, head = slo.quantile or 0.0, f"{slo.latency}_p"
        metrics = step.metrics if step else {}
        known = {
            float(name[len(head) : -2]) / 100: value
            for name, value in metrics.items()
            if name.startswith(head) and name.endswith("_s") and 0 < value < math.inf
        }
        if q not in known:
            return cls((1 - q,), (1.0,))
        ratios = accumulate(((min if at < q else max)(known[at] / known[q], 1.0) for at in sorted(known)), max)
        return cls(tuple(1 - at for at in sorted(known)), tuple(ratios))

    def beyond(self, margin: float) -> float:
        """The share of requests beyond the limit where the SLO's own percentile is by ``margin`` from it."""
        return beyond(math.exp(-margin), self.ratios, self.levels)


def pooled(margins: Sequence[float], slo: Slo, tails: Sequence[Tail] = ()) -> float:
    """The margin of one SLO over the requests of several measurements of about as many each, from its margin on each: a
    stretch of traffic that holds easily makes up for one that does not as far as its requests do, and no further.

    Means and rates are averaged, of maxima the largest counts. Of a percentile it is the share of requests beyond the
    limit that is averaged, which the percentiles of each measurement tell (``tails``; without them the SLO's own).
    """
    allowed = 1 - (slo.quantile or 0.0)
    if slo.metric.endswith("_max"):
        found = max(margins)
    elif allowed == 1:
        found = math.log(fmean(math.exp(x) for x in margins))
    else:
        tails = tails or [Tail.of(None, slo)] * len(margins)
        late = fmean(tail.beyond(x) for tail, x in zip(tails, margins, strict=True))
        found = -math.log(math.log(late) / math.log(allowed)) if late < 1 else FAR
    return min(max(found, -FAR), FAR)
