"""The choice: which point to deploy, against what it was weighed, and, where nothing will do, what came nearest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuner.errors import NothingFeasible, UsageError
from tuner.pareto.changes import baseline_of, changes, describe, no_baseline
from tuner.pareto.front import (
    LAUNCH_SPREAD,
    Interval,
    Point,
    launches_apart,
    level,
    overlap,
    points,
    searched,
    trusted_steps,
)
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Aborted, Infeasible, Step, Untrusted
from tuner.study.price import COST
from tuner.study.store import TrialRecord
from tuner.verify.capacity import still_pays
from tuner.words import figure

_ASSUMED = f"launches are taken to differ by {LAUNCH_SPREAD * 100:g} %"


@dataclass(frozen=True, slots=True)
class Change:
    """A relative difference: -0.23 is 23 % less. ``interval`` is 95 %, None where a measurement had none."""

    value: float
    interval: Interval | None = None

    @property
    def proven(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def range(self) -> str:
        """The interval in words, ``-4.0 to +2.1 %``, as far as it has ends; empty where none is known."""
        if self.interval is None:
            return ""
        low, high = (f"{x * 100:+.1f}" for x in self.interval)
        if not math.isfinite(self.interval[1]):
            return f"{low} % or more" if self.interval[0] > -1 else "no bound known"
        return f"{low} to {high} %" if self.interval[0] > -1 else f"{high} % or less"

    def __str__(self) -> str:
        return f"{self.value * 100:+.1f} %" + (f" ({self.range})" if self.range else "")


@dataclass(frozen=True, slots=True)
class Near:
    """The step that came nearest to meeting every SLO. ``excess`` is the worst relative overrun (0.12: 12 % over)."""

    trial: int
    load: float
    step: Step
    config: ServingConfig
    excess: float
    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """``point`` is what to deploy (None: nothing meets the SLOs, then ``nearest`` says what came closest).

    ``baseline`` is the engine's default at its own capacity (None: it met the SLOs at no load, or was not measured);
    ``cost_change`` and ``latency_change`` compare with it (None where it is the choice itself). ``tied`` are the
    other configurations whose cost cannot be told apart from the chosen one's: latency or flags decided against them.
    ``text`` explains all of it. ``by_hand``: the user picked it, it is no recommendation.
    """

    point: Point | None
    baseline: Point | None
    cost_change: Change | None
    latency_change: Change | None
    tied: tuple[Point, ...]
    nearest: Near | None
    text: str
    by_hand: bool = False

    def off(self, front: Sequence[Point]) -> Point | None:
        """What is chosen where it is no point of ``front``: measured again elsewhere, or not told apart from one."""
        known = self.point and self.point.role == "search" and self.point.key in {p.key for p in front}
        return None if known else self.point

    def marks(self, point: Point, front: Sequence[Point]) -> bool:
        """Whether ``point``, of ``front`` or :meth:`off` it, is what is chosen."""
        return self.point is not None and (point is self.point if self.off(front) else point.key == self.point.key)


def choose(trials: Sequence[TrialRecord], objective: Objective) -> Choice:
    """The cheapest step of the search that meets every SLO.

    Each configuration stands with its cheapest step within SLO. Of those whose cost cannot be told apart from the
    cheapest one's (:func:`tuner.pareto.front.level`) the lowest latency wins. One that a step as cheap clearly beats is
    out. Two loads of one configuration were measured in one launch on one trace and are no draw: that step stands in
    only where its server is saturated, so that more load saves nothing. Of those whose latency cannot be told apart
    from the lowest, the one with the fewest flags off the default wins (so the default itself wins a draw,
    and against whatever measured neither cheaper nor faster).
    Verification has a verdict of its own: see
    :func:`tuner.pareto.recommend.recommended`.
    """
    trials = searched(trials)
    good = [p for p in points(trials, objective) if p.ok]
    contenders = _cheapest_each(good)
    if not contenders:
        near = nearest(trials, objective)
        return Choice(None, None, None, None, (), near, near.text if near else _nothing_measured(trials))
    default = baseline_of(trials)
    default_config = default.config if default else None
    cheapest = contenders[0]
    as_cheap = [p for p in contenders if level(p, cheapest)]
    better = [o for o in good if o not in as_cheap and any(_beats(o, p) for p in as_cheap)]
    own = {p.config.hash: p for p in contenders}
    saturated = [o for o in better if level(o, cheapest) and not _saves(own[o.config.hash], o)]
    unbeaten = [p for p in (*as_cheap, *saturated) if not any(_beats(o, p) for o in (*as_cheap, *better))]
    fastest = min(unbeaten, key=lambda p: (p.latency, p.cost))
    last = [p for p in unbeaten if overlap(p.latency, p.latency_interval, fastest.latency, fastest.latency_interval)]
    point = min(last, key=lambda p: (len(changes(p.config, default_config)), p.latency, p.cost, p.trial))
    base = next((p for p in contenders if p.baseline), None)
    if base and base.cost <= point.cost and base.latency <= point.latency:
        point = base  # a wide interval survives what beats a narrow one, but no flag is worth a loss
    cost, latency = _against(point, base)
    others = [p for p in as_cheap if p.config.hash != point.config.hash]
    tied = tuple(p for p in others if p in unbeaten or p.latency >= point.latency)
    text = _explain(point, base, cost, latency, tied, objective, trials)
    return Choice(point, base, cost, latency, tied, None, text)


def of_trial(trials: Sequence[TrialRecord], objective: Objective, number: int) -> Choice:
    """Not the recommendation but what the user picks: the cheapest step within SLO of trial ``number``.

    Raises UsageError where there is no such trial, or it is none of the search (its loads were each measured on windows
    of their own, so that none stands for all), NothingFeasible where it met the SLOs at no load.
    """
    fix = "tuner front lists the trials of the front"
    picked = next((t for t in trials if t.number == number), None)
    if picked is None:
        raise UsageError(f"there is no trial {number}", fix=fix)
    if picked.role != "search":
        same = [t.number for t in searched(trials) if t.config.hash == picked.config.hash]
        fix = f"Trial {same[0]} is the same configuration in the search" if same else fix
        of = {"verify": "verification", "ablate": "ablation"}.get(picked.role, picked.role)
        raise UsageError(f"trial {number} is a launch of the {of}, not of the search", fix=fix)
    good = [p for p in points(searched(trials), objective) if p.ok]
    own = [p for p in good if number in p.trials]  # repeats of one configuration at one load are one point
    if not own:
        raise NothingFeasible(f"Trial {number} met the SLOs at no load (tuner show says which it missed).")
    point = replace(min(own, key=lambda p: (p.cost, p.latency)), trial=number)
    base = next((p for p in _cheapest_each(good) if p.baseline), None)
    text = f"Trial {number} was picked by hand; it need not be the recommendation."
    return Choice(point, base, *_against(point, base), (), None, text, by_hand=True)


def _against(point: Point, base: Point | None) -> tuple[Change | None, Change | None]:
    """Difference in cost and in latency to the default; None where ``point`` is the default, or where it met no SLO."""
    if base is None or base.config.hash == point.config.hash:
        return None, None
    latency = compare(point.latency, point.latency_interval, base.latency, base.latency_interval)
    return compare_costs(point, base), latency


def nearest(trials: Sequence[TrialRecord], objective: Objective) -> Near | None:
    """The trusted step whose worst SLO overrun is smallest; None where no step was measured."""
    best: Near | None = None
    for trial, step in trusted_steps(trials):
        over = max((_overrun(step, slo.key, slo.limit) for slo in objective.slos), default=0.0)
        if best is None or over < best.excess:
            best = Near(trial.number, step.load, step, trial.config, over, "")
    if best is None:
        return None
    default = baseline_of(trials)
    misses = [miss for slo in objective.slos if (miss := slo.miss(best.step.metrics))]
    words = "; ".join(best.step.slo_misses or misses)
    name = describe(best.config, default.config if default else None)
    if words:
        amount = f"{best.excess * 100:.0f} % over" if math.isfinite(best.excess) else "no finite latency"
        lowest = min(step.load for _, step in trusted_steps(trials))
        text = (
            f"No configuration meets every SLO. Nearest: trial {best.trial} ({name}) at load {best.load:g}, "
            f"{amount} at worst: {words}. "
            f"Loosen the SLO, give the study more GPUs, or add a load below {lowest:g} to the ladder."
        )
    else:
        known = {key: best.step.metrics.get(key, math.nan) for key in (objective.latency_key, COST)}
        without = " and ".join(key for key, value in known.items() if not 0 < value < math.inf)
        text = (
            f"No configuration can be compared: trial {best.trial} ({name}) meets every SLO at load {best.load:g}, "
            f"but has no {without} above zero."
        )
    return Near(best.trial, best.load, best.step, best.config, best.excess, text)


def compare(a: float, a_interval: Interval | None, b: float, b_interval: Interval | None) -> Change:
    """a / b - 1 with its 95 % interval, from the two intervals taken as independent: their half widths in logarithms
    are added in quadrature (MOVER; Zou and Donner, 2008)."""
    ratio = math.log(a / b)
    if a_interval is None or b_interval is None or min(*a_interval, *b_interval) <= 0:
        return Change(a / b - 1)
    down = math.hypot(math.log(a / a_interval[0]), math.log(b_interval[1] / b))
    up = math.hypot(math.log(a_interval[1] / a), math.log(b / b_interval[0]))
    return Change(math.expm1(ratio), (math.expm1(ratio - down), math.expm1(ratio + up)))


def compare_costs(one: Point, other: Point) -> Change:
    """The difference in cost, proven where :func:`tuner.pareto.front.level` tells the two apart by launches."""
    reach = launches_apart(one, other)
    if reach is None:
        return compare(one.cost, one.cost_interval, other.cost, other.cost_interval)
    ratio = one.cost / other.cost
    return Change(ratio - 1, (ratio * math.exp(-reach) - 1, ratio * math.exp(reach) - 1))


def _beats(one: Point, other: Point) -> bool:
    """Whether ``one`` is as cheap as ``other`` at least, and faster than ``other`` may be (the interval of a percentile
    of few requests has no upper end, so that no two of them would ever be apart)."""
    low_s = other.latency_interval[0] if other.latency_interval else other.latency
    return one.cost <= other.cost and one.latency < low_s


def _saves(cheaper: Point, other: Point) -> bool:
    """Whether the cheaper of two loads of one configuration is so by its load, not by chance."""
    return cheaper is not other and still_pays(sorted((cheaper, other), key=lambda p: p.load))


def _cheapest_each(good: Sequence[Point]) -> list[Point]:
    best: dict[str, Point] = {}
    for point in sorted(good, key=lambda p: (p.cost, p.latency, p.trial)):
        best.setdefault(point.config.hash, point)
    return list(best.values())


def _overrun(step: Step, key: str, limit: float) -> float:
    value = step.metrics.get(key, math.inf)
    if math.isnan(value):
        return math.inf
    if limit <= 0:
        return 0.0 if value <= limit else math.inf
    return max(value / limit - 1, 0.0)


def _explain(
    point: Point,
    base: Point | None,
    cost: Change | None,
    latency: Change | None,
    tied: Sequence[Point],
    objective: Objective,
    trials: Sequence[TrialRecord],
) -> str:
    default = baseline_of(trials)
    name = objective.latency.replace("_", " ").upper().replace(" P", " p")
    words = [
        f"Trial {point.trial} ({describe(point.config, default.config if default else None)}) at load {point.load:g}: "
        f"${figure(point.cost)} per million output tokens within SLO, {name} {figure(point.latency * 1e3, 4)} ms."
    ]
    if point.baseline:
        words.append("That is the engine's default: nothing measured is proven to be better.")
    elif base and cost and latency:
        sure = "" if cost.proven else "not proven at 95 %" if cost.interval else "no interval known"
        notes = "; ".join(filter(None, (sure, "" if launches_apart(point, base) is None else _ASSUMED)))
        sure = f" ({notes})" if notes else ""
        words.append(f"Against the engine's default at its capacity (load {base.load:g}): cost {cost}{sure},")
        words.append(f"{name} {latency}.")
    else:
        words.append(no_baseline(trials))
    if tied:
        listed = ", ".join(str(p.trial) for p in tied[:5]) + (" ..." if len(tied) > 5 else "")
        taken = any(p.load != point.load and launches_apart(p, point) is not None for p in tied)
        listed += f" ({_ASSUMED})" if taken else ""
        words.append(f"Its cost cannot be told apart from trial {listed}: lower latency, then fewer flags, decided.")
    words.append("From search measurements, not yet verified.")
    return " ".join(words)


def _nothing_measured(trials: Sequence[TrialRecord]) -> str:
    if not trials:
        return "No trial has finished yet."
    reasons: Counter[str] = Counter()
    said: dict[str, str] = {}
    for trial in trials:
        match trial.outcome:
            case Infeasible(cause=cause, message=message, evidence=evidence):
                reasons[cause] += 1
                proof = f" ({evidence})" if evidence and evidence not in message else ""
                said.setdefault(cause, f"trial {trial.number}: {message}{proof}")
            case Untrusted():
                reasons["untrusted measurement"] += 1
            case Aborted(reason=reason):
                reasons[reason] += 1
            case _:
                reasons["no trusted step"] += 1
    counts = ", ".join(f"{n} x {why}" for why, n in reasons.most_common())
    first = next((said[why] for why, _ in reasons.most_common() if why in said), "")
    return f"No configuration was measured: {counts}." + (f" For example {first.rstrip('.')}." if first else "")
