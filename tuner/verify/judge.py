"""The judgement: from repeated launches to who is recommended, and with what certainty. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.spec.slo import Slo
from tuner.verify.arm import COST, Finalist, Launched, Range, logs, margin, same
from tuner.verify.repeats import Repeats, Spread
from tuner.verify.statistics import Estimate, chosen_tails, exp, holm, mean, pool, share_best

UNKNOWN: Range = (math.nan, math.nan, math.nan)
COST_SHARE = 0.8  # of the doubt that is allowed, what the test on cost may use; the rest is for latency at equal cost


@dataclass(frozen=True, slots=True)
class Headroom:
    """One load of one arm: in how many of the measurements an SLO was missed, and the probability that the SLOs hold in
    the mean over windows and launches."""

    load: float
    missed: int
    measured: int
    holds: float


@dataclass(frozen=True, slots=True)
class Arm:
    """What verification found out about one arm.

    ``cost`` (USD per million output tokens), ``latency`` (seconds) and ``difference`` (cost over the default's, 0.9 is
    10 % cheaper) and ``latency_difference`` are (middle, low, high); NaN where not measured, infinite where not known.
    ``doubt`` is the p-value, corrected for several finalists, of "not cheaper than the default by what is worth it",
    ``latency_doubt`` of "not as cheap, or not faster". ``best`` is the probability of being the cheapest arm;
    ``safe_load`` the highest load up to which the SLOs hold with the stated confidence (0: none); ``loads`` is
    the evidence.
    """

    label: str
    load: float
    launches: int
    cost: Range
    latency: Range
    difference: Range
    latency_difference: Range
    doubt: float
    latency_doubt: float
    best: float
    holds: bool
    safe_load: float
    loads: tuple[Headroom, ...]
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """``choice`` is an arm's label (empty: nothing meets the SLOs); ``reason`` is a slug: ``cheaper``, ``faster`` (as
    cheap, but lower latency), ``default-fails`` (the default meets no SLO), ``nothing-proven``, ``nothing-holds``."""

    choice: str
    reason: str
    arms: Mapping[str, Arm]


def judge(
    arms: Sequence[Finalist],
    launches: Sequence[Launched],
    slos: Sequence[Slo],
    latency_key: str,
    *,
    confidence: float = 0.95,
    worth: float = 0.01,
    known: Spread | None = None,
    active: Sequence[str] | None = None,
    seed: int = 0,
) -> Judgement:
    """Weighs ``arms`` (the default first) by their ``launches``.

    A finalist is recommended over the default when it is cheaper by more than ``worth`` at ``confidence``, corrected
    for the number of finalists (Holm); or, with the rest of the allowed doubt, when it is at most ``worth`` more
    expensive and its latency is lower by more than ``worth``. ``active`` are the labels still in the race.
    """
    base = next(a for a in arms if a.baseline)
    failures = _failures(launches)
    load_of = {a.label: standing_load(a, launches, slos) for a in arms}
    holding = {a.label: load_of[a.label] > 0 and a.label not in failures for a in arms}
    shown = {a.label: load_of[a.label] or lowest_load(a, launches) for a in arms}
    costs = Repeats(logs(launches, shown, COST), known)
    delays = Repeats(logs(launches, shown, latency_key))
    able = [a for a in arms if not a.baseline and holding[a.label] and a.label in costs.arms]
    based = holding[base.label] and base.label in costs.arms
    gains = {a.label: costs.difference(a.label, base.label) for a in able} if based else {}
    speeds = (
        {label: delays.difference(label, base.label) for label in gains if label in delays.arms}
        if base.label in delays.arms
        else {}
    )
    doubts = _adjusted({k: g.doubt(-worth) for k, g in gains.items()}, COST_SHARE)
    slow = {k: max(gains[k].doubt(worth), s.doubt(-worth)) for k, s in speeds.items()}
    latency_doubts = _adjusted(slow, 1 - COST_SHARE)
    contenders = [a.label for a in able if active is None or a.label in active]
    choice, reason = _choose(
        base.label if based else "", contenders, gains, costs, speeds, doubts, latency_doubts, (1 - confidence) / 2
    )
    known_margin = margin_spread(shown, launches, slos)
    below, above = chosen_tails(len(arms), confidence)
    ahead = _best(costs, [a.label for a in arms if holding[a.label] and a.label in costs.arms], seed)
    found: dict[str, Arm] = {}
    for a in arms:
        loads = headroom(a.label, launches, slos, known_margin)
        tails = (below, above) if a.label == choice else ((1 - confidence) / 2,) * 2
        found[a.label] = Arm(
            label=a.label,
            load=shown[a.label],
            launches=costs.count(a.label),
            cost=_factor(costs.estimate(a.label), *tails) if a.label in costs.arms else UNKNOWN,
            latency=_factor(delays.estimate(a.label), *tails) if a.label in delays.arms else UNKNOWN,
            difference=_factor(gains[a.label], *tails) if a.label in gains else UNKNOWN,
            latency_difference=_factor(speeds[a.label], *tails) if a.label in speeds else UNKNOWN,
            doubt=doubts.get(a.label, math.nan),
            latency_doubt=latency_doubts.get(a.label, math.nan),
            best=ahead.get(a.label, 0.0),
            holds=holding[a.label],
            safe_load=safe_load(loads, confidence),
            loads=loads,
            failure=failures.get(a.label, ""),
        )
    return Judgement(choice, reason, found)


def standing_load(arm: Finalist, launches: Sequence[Launched], slos: Sequence[Slo]) -> float:
    """The highest load, at most the arm's own, where the SLOs hold in the mean of all measurements; 0 where at none.
    Before the first measurement it is the arm's own."""
    mine = [launch for launch in launches if launch.arm == arm.label and launch.steps]
    if not mine:
        return arm.load
    tried = sorted({s.load for launch in mine for s in launch.steps if s.load <= arm.load * (1 + 1e-9)}, reverse=True)
    for load in tried:
        by_launch = _margins(arm.label, load, launches, slos)
        if by_launch and np.mean([np.mean(margins) for margins in by_launch]) <= 0:
            return load
    return 0.0


def lowest_load(arm: Finalist, launches: Sequence[Launched]) -> float:
    """The lowest load at which the arm was measured (its own where it never was)."""
    return min((s.load for launch in launches if launch.arm == arm.label for s in launch.steps), default=arm.load)


def headroom(
    label: str, launches: Sequence[Launched], slos: Sequence[Slo], known: Spread | None = None
) -> tuple[Headroom, ...]:
    """Every load at which the arm was measured, from low to high. The spread of the arm's own launches is pooled with
    ``known`` (launch spread of SLO margins over all arms)."""
    found = []
    for load in sorted({s.load for launch in launches if launch.arm == label for s in launch.steps}):
        by_launch = _margins(label, load, launches, slos)
        flat = [m for margins in by_launch for m in margins]
        if not flat:
            continue
        single = mean([float(np.mean(margins)) for margins in by_launch])
        own = (single.error**2 * len(by_launch) if single.freedom > 0 else 0.0, single.freedom)
        variance, freedom = pool([own, (known.variance, known.freedom) if known else (0.0, 0.0)])
        missed = Estimate(single.mean, math.sqrt(variance / len(by_launch)), freedom).doubt()
        found.append(Headroom(load, sum(1 for m in flat if m > 0), len(flat), 1 - missed))
    return tuple(found)


def safe_load(loads: Sequence[Headroom], confidence: float) -> float:
    """The highest load up to which the SLOs hold with ``confidence`` at every load measured; 0 where at none."""
    best = 0.0
    for row in loads:
        if row.holds < confidence:
            break
        best = row.load
    return best


def margin_spread(load_of: Mapping[str, float], launches: Sequence[Launched], slos: Sequence[Slo]) -> Spread:
    """How much launches of one arm differ in their SLO margin, pooled over the arms at their loads."""
    parts = []
    for label, load in load_of.items():
        by_launch = [float(np.mean(m)) for m in _margins(label, load, launches, slos)]
        if len(by_launch) > 1:
            parts.append((float(np.var(by_launch, ddof=1)), float(len(by_launch) - 1)))
    return Spread(*pool(parts))


def _margins(label: str, load: float, launches: Sequence[Launched], slos: Sequence[Slo]) -> list[list[float]]:
    """Per launch, the worst SLO's margin in every trusted measurement at ``load``."""
    mine = [
        [margin(s, slos) for s in x.steps if same(s.load, load) and not s.untrusted] for x in launches if x.arm == label
    ]
    return [margins for margins in mine if margins]


def _failures(launches: Sequence[Launched]) -> dict[str, str]:
    """Arms that cannot be relied on: a failure that is not passing, or two passing ones."""
    found: dict[str, str] = {}
    for label in {launch.arm for launch in launches}:
        failed = [x.failure for x in launches if x.arm == label and x.failure]
        if len(failed) > 1 or any(not f.transient for f in failed):
            found[label] = f"{failed[-1].message} ({failed[-1].stage})"
    return found


def _adjusted(doubts: Mapping[str, float], share: float) -> dict[str, float]:
    """Holm over the finalists, then divided by the share of the allowed doubt that this family of tests may use."""
    return {k: min(1.0, p / share) for k, p in zip(doubts, holm(list(doubts.values())), strict=True)}


def _best(costs: Repeats, labels: Sequence[str], seed: int) -> dict[str, float]:
    if not labels:
        return {}
    columns = [costs.arms.index(label) for label in labels]
    shares = share_best(costs.draws(4000, seed)[:, columns])
    return dict(zip(labels, map(float, shares), strict=True))


def _factor(estimate: Estimate, below: float, above: float) -> Range:
    low, high = estimate.between(below, above)
    return exp(estimate.mean), exp(low), exp(high)


def _choose(
    base: str,
    contenders: Sequence[str],
    gains: Mapping[str, Estimate],
    costs: Repeats,
    speeds: Mapping[str, Estimate],
    cheaper: Mapping[str, float],
    faster: Mapping[str, float],
    allowed: float,
) -> tuple[str, str]:
    if not base:
        if not contenders:
            return "", "nothing-holds"
        return min(contenders, key=lambda label: costs.estimate(label).mean), "default-fails"
    proven = [label for label in contenders if cheaper.get(label, 1.0) < allowed]
    if proven:
        return min(proven, key=lambda label: gains[label].mean), "cheaper"
    proven = [label for label in contenders if faster.get(label, 1.0) < allowed]
    if proven:
        return min(proven, key=lambda label: speeds[label].mean), "faster"
    return base, "nothing-proven"
