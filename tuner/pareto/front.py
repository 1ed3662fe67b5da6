"""The front: the (config, load) points that no other point beats in both cost and latency, with their uncertainty.

A point comes only from a load step that a server really served: an outcome that is neither Measured nor Aborted has
none, so a crash can never look fast or cheap.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Aborted, Measured, Step
from tuner.study.store import TrialRecord

COST = "cost_usd_per_mtok_output"
ASKED = "goodput_window_s"  # there where goodput counts what was asked for (docs/measurement.md)
LAUNCH_SPREAD = 0.03
"""What launches of one configuration differ by (standard deviation of log cost and log latency) before a study has
repeats of its own to learn it from. An assumption, stated wherever it decides."""
ASSUMED = 3  # degrees of freedom that it counts as: a study's own repeats are believed from as many on
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """One serving config at one load.

    ``cost`` is USD per million output tokens within SLO, ``latency`` the objective's latency in seconds; the
    intervals are 95 % (None: not known). ``trials`` are all trials that measured this config at this load, ``trial``
    the first of them. ``ok``: every one of those measurements met every SLO. ``misses`` says in words what was
    missed. ``ties`` names the (trial, load) of other points that cannot be told apart (set by :func:`front`).
    ``metrics`` are the means over the measurements, which were made on ``windows``.
    """

    trial: int
    load: float
    cost: float
    latency: float
    cost_interval: Interval | None
    latency_interval: Interval | None
    baseline: bool
    ok: bool
    config: ServingConfig
    role: str = "search"
    trials: tuple[int, ...] = ()
    misses: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[tuple[int, float], ...] = ()
    windows: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[int, float]:
        return self.trial, self.load


def trusted_steps(trials: Iterable[TrialRecord]) -> list[tuple[TrialRecord, Step]]:
    """Every believable step of the trials that served, also of those stopped early. Emulated trials are left out where
    the study has real ones."""
    measured = [t for t in trials if isinstance(t.outcome, Measured | Aborted)]
    real = [t for t in measured if not t.emulated]
    return [(t, step) for t in (real or measured) for step in t.outcome.steps if not step.untrusted]


def searched(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials of the search: what verification and ablation measured again, on other windows and chosen for what
    the search said, is no point beside them."""
    return [t for t in trials if t.role == "search"]


def points(trials: Iterable[TrialRecord], objective: Objective) -> list[Point]:
    """Every trusted step of the trials that served that has a cost and a latency, by trial and load.

    Measurements of one config at one load (in the same role: search or verify) become one point, so that a lucky run
    does not stand beside its own correction. A cost or a latency that is not finite and above zero is no measurement.
    """
    groups: dict[tuple[str, float, str], list[tuple[TrialRecord, Step]]] = defaultdict(list)
    for trial, step in trusted_steps(trials):
        values = (step.metrics.get(COST, math.nan), step.metrics.get(objective.latency_key, math.nan))
        if all(math.isfinite(value) and value > 0 for value in values):
            groups[trial.config.hash, step.load, trial.role].append((trial, step))
    found = [_point(group, objective) for group in groups.values()]
    return sorted(found, key=lambda p: (p.trial, p.load))


def front(points: Iterable[Point]) -> list[Point]:
    """The points within SLO that no other point within SLO dominates (at most as costly and as slow, and better in
    one), cheapest first. Each names in ``ties`` the points within SLO, on the front or not, that are
    :func:`indistinct` from it."""
    good = sorted((p for p in points if p.ok), key=lambda p: (p.cost, p.latency, p.trial))
    best = math.inf
    kept: list[Point] = []
    for point in good:
        same = bool(kept) and (point.cost, point.latency) == (kept[-1].cost, kept[-1].latency)
        if point.latency < best or same:
            kept.append(point)
            best = point.latency
    return [replace(p, ties=tuple(q.key for q in good if q is not p and indistinct(p, q))) for p in kept]


def indistinct(one: Point, other: Point) -> bool:
    """Whether two points cannot be told apart, in cost (:func:`level`) nor in latency, where their 95 % intervals
    overlap. Two loads of one configuration are different points whatever their intervals say."""
    if one.config.hash == other.config.hash:
        return False
    return level(one, other) and overlap(one.latency, one.latency_interval, other.latency, other.latency_interval)


def level(one: Point, other: Point) -> bool:
    """Whether the costs of two configurations cannot be told apart at 95 %.

    Where goodput counts what was asked for, whoever holds a load on the same windows has the same cost there. The
    interval of such a cost is of the traffic, which both share; what sets them apart is which load they hold, and that
    moves with the launch. Repeats at one load do not show how far, so :data:`LAUNCH_SPREAD` is assumed. Any other cost
    is also of what happened to arrive in the window: those are told apart where their intervals do not overlap.
    """
    reach = launches_apart(one, other)
    if reach is not None:
        return abs(math.log(one.cost / other.cost)) <= reach
    return overlap(one.cost, one.cost_interval, other.cost, other.cost_interval)


def launches_apart(one: Point, other: Point) -> float | None:
    """How far apart (log, 95 %) launches alone may set two costs of what was asked for on the same windows; None for
    any other costs, whose intervals say it."""
    if not (ASKED in one.metrics and ASKED in other.metrics and one.windows == other.windows):
        return None
    return 1.96 * LAUNCH_SPREAD * math.sqrt(sum(1 / max(len(p.trials), 1) for p in (one, other)))


def overlap(a: float, a_interval: Interval | None, b: float, b_interval: Interval | None) -> bool:
    """Whether two intervals share a value; a value without an interval is a point. One without an upper end (a
    percentile of few requests) would share one with all that is slower: it is taken to reach up three times as far as
    down (up to 6 % of equal ones are then apart)."""
    (a_low, a_high), (b_low, b_high) = _ends(a, a_interval), _ends(b, b_interval)
    return a_low <= b_high and b_low <= a_high


def _ends(value: float, interval: Interval | None) -> Interval:
    low, high = interval or (value, value)
    return low, value * (value / low) ** 3 if math.isinf(high) and 0 < low <= value else high


def _point(group: Sequence[tuple[TrialRecord, Step]], objective: Objective) -> Point:
    trial, first = group[0]
    cost, cost_interval = _mean([step for _, step in group], COST)
    latency, latency_interval = _mean([step for _, step in group], objective.latency_key)
    names = set.intersection(*(set(step.metrics) for _, step in group))
    return Point(
        trial=trial.number,
        load=first.load,
        cost=cost,
        latency=latency,
        cost_interval=cost_interval,
        latency_interval=latency_interval,
        baseline=any(t.baseline for t, _ in group),
        ok=all(step.ok for _, step in group),
        config=trial.config,
        role=trial.role,
        trials=tuple(t.number for t, _ in group),
        misses=tuple(dict.fromkeys(miss for _, step in group for miss in step.slo_misses)),
        metrics={n: math.fsum(s.metrics[n] for _, s in group) / len(group) for n in first.metrics if n in names},
        windows=frozenset(step.window for _, step in group),
    )


def _mean(steps: Sequence[Step], name: str) -> tuple[float, Interval | None]:
    """The geometric mean of a metric over repeats and its 95 % interval. Equal repeats are their mean, to the last bit.

    Repeats on one window share its traffic, so that their half widths (in logarithms) are averaged; those of different
    windows are independent. What the repeats differ by is added where they share a window; between windows the traffic
    is in it already, and the larger counts. An end that one of them has not, they do not have together."""
    if len(steps) == 1:
        return steps[0].metrics[name], steps[0].intervals.get(name)
    n = len(steps)
    values = [step.metrics[name] for step in steps]
    logs = [math.log(value) for value in values]
    centre = min(max(math.fsum(logs) / n, min(logs)), max(logs))
    spread = _reach(math.fsum((x - centre) ** 2 for x in logs), n)
    down: dict[str, float] = defaultdict(float)
    up: dict[str, float] = defaultdict(float)
    for step, value in zip(steps, values, strict=True):
        low, high = step.intervals.get(name, (value, value))
        down[step.window] += math.log(value / low) / n if low > 0 else math.inf
        up[step.window] += math.log(high / value) / n
    together = max if len(down) == n else math.hypot
    mean = min(max(math.exp(centre), min(values)), max(values))
    low, high = (together(spread, math.hypot(*halves.values())) for halves in (down, up))
    return mean, (mean * math.exp(-low), mean * math.exp(high))


def _reach(squares: float, n: int) -> float:
    """Half the 95 % interval of a mean of ``n`` logarithms whose squared deviations sum to ``squares``: Student's t,
    or, where that is narrower, the same with :data:`LAUNCH_SPREAD` pooled into it. Two launches alone say next to
    nothing of how much launches differ, and nothing would be told apart from what was measured twice."""
    from scipy.special import stdtrit

    def half(squares: float, freedom: int) -> float:
        return float(stdtrit(freedom, 0.975)) * math.sqrt(squares / freedom / n)

    return min(half(squares, n - 1), half(squares + ASSUMED * LAUNCH_SPREAD**2, n - 1 + ASSUMED))
