"""The judgement: from repeated launches to who is recommended, and with what certainty. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from tuner.spec.slo import Slo
from tuner.study.outcome import Step
from tuner.verify.arm import COST, Finalist, Launched, Range
from tuner.verify.capacity import NEAR, REACH, THROUGHPUT, capacity, cost_at, held, margin_of_all, slope_below, value_at
from tuner.verify.power import Power, power
from tuner.verify.repeats import NO_SPREAD, Repeats, Spread
from tuner.verify.statistics import Estimate, chosen_tails, exp, holm, share_best

Cell = tuple[str, int, str]  # arm, round, window
UNKNOWN: Range = (math.nan, math.nan, math.nan)
COST_SHARE = 0.9  # of the doubt that is allowed, what the test on cost may use; the rest is for latency at equal cost
PROMISED = 1.5  # times what can be promised of another arm: so much cheaper is taken though no gain is proven
CLEAR = 1.2  # times cheaper on every window: more than launches differ by, where one of each says nothing of that
WINDOWS = 3  # at least, for that
UNPROVEN = ("promise", "once")  # reasons for a finalist of which no gain is proven


@dataclass(frozen=True, slots=True)
class Arm:
    """What verification found out about one arm.

    Ranges are (middle, low, high); NaN where not measured, infinite where not known. ``capacity`` is the load at which
    the SLOs just hold (the highest measured, where none was missed), ``cost`` the USD per million output tokens there;
    ``safe_load`` is the lower confidence limit (one-sided) of the capacity: up to there the SLOs hold; 0 where nothing
    is proven.
    ``load`` is what to deploy at (:meth:`Table.promised`; NaN where the SLOs hold at none), ``load_cost`` and
    ``latency`` (seconds) belong to it. ``difference`` is cost over the default's, each at its capacity (0.9: 10 %
    cheaper), ``load_difference`` each at its ``load``, ``latency_difference`` latency over the default's, both at
    ``common_load``.
    ``doubt`` is the p-value, corrected for several finalists, of "not cheaper than the default by what is worth it",
    ``latency_doubt`` of "not as cheap, or not faster". ``best`` is the probability of being the cheapest arm.
    ``at_most``: on some window no load nearly as low as ``load`` was measured, and ``latency`` is partly that of higher
    ones.
    """

    label: str
    launches: int
    holds: bool
    capacity: Range = UNKNOWN
    cost: Range = UNKNOWN
    safe_load: float = 0.0
    load: float = math.nan
    load_cost: Range = UNKNOWN
    latency: Range = UNKNOWN
    difference: Range = UNKNOWN
    load_difference: Range = UNKNOWN
    latency_difference: Range = UNKNOWN
    common_load: float = math.nan
    doubt: float = math.nan
    latency_doubt: float = math.nan
    best: float = 0.0
    failure: str = ""
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """``choice`` is an arm's label (empty: nothing meets the SLOs); ``reason`` is a slug: ``cheaper``, ``faster`` (as
    cheap, but lower latency), ``promise`` (not proven cheaper, but far more can be promised of it), ``once`` (launched
    once, which proves nothing, but far cheaper throughout),
    ``default-fails`` (the default failed, or meets no SLO), ``default-unmeasured`` (no launch of it came to an end),
    ``nothing-proven``, ``nothing-holds``.
    ``power`` is about the choice where it is a promise, and about the cheapest finalist where nothing is proven."""

    choice: str
    reason: str
    arms: Mapping[str, Arm]
    spread: Spread = NO_SPREAD
    power: Power | None = None


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
    explain: bool = True,
) -> Judgement:
    """Weighs ``arms`` (one of them the default) by their ``launches``.

    A finalist is recommended over the default when it is cheaper by more than ``worth`` at ``confidence``, corrected
    for the number of finalists (Holm); or, with the rest of the allowed doubt, when it is at most ``worth`` more
    expensive and its latency is lower by more than ``worth``; or when it measured cheaper on every window and what can
    be promised of it costs less by a factor of more than :data:`PROMISED`, at the same confidence: a default that all
    but fails on one window has a capacity that nobody knows, and the larger the gain there, the less of it is proven.
    Where the one or the other was launched once only, nothing is known of what launches differ by: a finalist is then
    recommended which measured cheaper by more than :data:`CLEAR` on every one of :data:`WINDOWS` windows or more, and
    by more than :data:`PROMISED` in their mean and at the loads that each is to be deployed at.
    ``active`` are the labels still in the race.
    ``explain`` False leaves out :attr:`Judgement.power`, which takes a few hundred fits and decides nothing.
    """
    base = next(a.label for a in arms if a.baseline)
    table = Table(launches, slos)
    # one dead launch of the default is left out, which flatters the default and proves nothing for its rivals
    dead = {arm: words[-1] for arm, words in table.unserved().items() if arm != base or len(words) > 1}
    failures = dead | unreliable(launches)
    capacities = Repeats(table.capacities())
    middle = {label: exp(capacities.estimate(label).mean) for label in capacities.arms}
    safe = {label: exp(capacities.estimate(label).between(1 - confidence, 1 - confidence)[0]) for label in middle}
    promised = {label: load for label in middle if (load := table.promised(label, safe[label]))}
    # each arm at a load that it holds: by what an overloaded one's launches differ says nothing of the others
    costs = Repeats({c: cost for c, cost in table.costs().items() if c[0] in promised}, known, table.within(COST))
    load_costs = Repeats(table.costs(promised), known, table.within(COST))
    load_delays = Repeats(table.values_at(promised, latency_key), None, table.within(latency_key))
    holding = [a.label for a in arms if a.label in costs.arms and a.label not in failures]
    common = min((middle[label] for label in holding), default=math.nan)
    delays = Repeats(table.values_at(dict.fromkeys(holding, common), latency_key))
    able = [label for label in holding if label != base]
    rivals = costs.linked(base) if base in holding else ()
    gains = {label: costs.difference(label, base) for label in able if label in rivals}
    speeds = {label: delays.difference(label, base) for label in gains if label in delays.linked(base)}
    weights = {a.label: max(a.promise, 0.01) for a in arms}
    doubts = _adjusted({k: g.doubt(-worth) for k, g in gains.items()}, weights, COST_SHARE)
    slow = {k: max(gains[k].doubt(worth), s.doubt(-worth)) for k, s in speeds.items()}
    latency_doubts = _adjusted(slow, weights, 1 - COST_SHARE)
    racing = [label for label in able if active is None or label in active]
    held_costs = {label: load_costs.difference(label, base) for label in gains}
    ahead = {k: d.doubt(-math.log(PROMISED)) if costs.ahead(k, base) else 1.0 for k, d in held_costs.items()}
    once = [k for k in gains if min(costs.count(k), costs.count(base)) == 1 and len(costs.windows) >= WINDOWS]
    clear = [k for k in once if costs.ahead(k, base, math.log(CLEAR))]
    clear = [k for k in clear if all(x.mean < -math.log(PROMISED) for x in (gains[k], held_costs[k]))]
    choice, reason = _choose(
        base if base in holding else "",
        racing,
        {
            "cheaper": (gains, doubts),
            "faster": (speeds, latency_doubts),
            "promise": (held_costs, _adjusted(ahead, weights, 1.0)),
            "once": (held_costs, dict.fromkeys(clear, 0.0)),
        },
        costs,
        (1 - confidence) / 2,
    )
    if reason == "default-fails" and base not in failures and base not in capacities.arms:
        reason = "default-unmeasured"
    likely = _best(costs, holding, seed)
    found: dict[str, Arm] = {}
    even = ((1 - confidence) / 2, (1 - confidence) / 2)
    for label in (a.label for a in arms):
        if label not in costs.arms:
            about = _factor(capacities.estimate(label), *even) if label in capacities.arms else UNKNOWN
            found[label] = Arm(label, table.count(label), False, about, failure=failures.get(label, ""))
            continue
        # the chosen one flatters itself: it was chosen for what the same numbers say
        tails = chosen_tails(len(able), confidence) if label == choice and label != base else even
        found[label] = Arm(
            label=label,
            launches=costs.count(label),
            holds=label in holding,
            capacity=_factor(capacities.estimate(label), tails[1], tails[0]),
            cost=_factor(costs.estimate(label), *tails),
            safe_load=safe[label] if label in holding else 0.0,
            load=promised[label],
            load_cost=_of(load_costs, label, tails),
            latency=_of(load_delays, label, tails),
            difference=_factor(gains[label], *tails) if label in gains else UNKNOWN,
            load_difference=_factor(held_costs[label], *tails) if label in held_costs else UNKNOWN,
            latency_difference=_factor(speeds[label], *tails) if label in speeds else UNKNOWN,
            common_load=common,
            doubt=doubts.get(label, math.nan),
            latency_doubt=latency_doubts.get(label, math.nan),
            best=likely.get(label, 0.0),
            failure=failures.get(label, ""),
            at_most=not table.measured_as_low(label, promised[label]),
        )
    hope = choice if reason in UNPROVEN else min(gains, key=lambda label: gains[label].mean, default=None)
    could = None
    if explain and reason in (*UNPROVEN, "nothing-proven") and hope is not None:
        share = weights[hope] / sum(weights[label] for label in gains)
        could = power(costs, hope, base, worth, (1 - confidence) / 2 * COST_SHARE * share)
    return Judgement(choice, reason, found, costs.total(), could)


class Table:
    """The launches as cells of (arm, round, window), each with the steps of its loads."""

    def __init__(self, launches: Sequence[Launched], slos: Sequence[Slo]) -> None:
        self.slos = slos
        self.cells: dict[Cell, list[Step]] = {}
        for launch in launches:
            for step in launch.steps:
                self.cells.setdefault((launch.arm, launch.round, step.window), []).append(step)

    def count(self, arm: str) -> int:
        return len({number for name, number, _ in self.cells if name == arm})

    def capacity(self, cell: Cell) -> float:
        return capacity(self.cells[cell], self.slos)

    def capacities(self) -> dict[Cell, float]:
        """Log of the capacity of every cell that has one."""
        return _logs({cell: self.capacity(cell) for cell in self.cells})

    def costs(self, loads: Mapping[str, float] | None = None) -> dict[Cell, float]:
        """Log of the cost of every arm of ``loads`` at its load there, or of every cell at its own capacity."""
        at = {cell: self.capacity(cell) if loads is None else loads.get(cell[0], 0.0) for cell in self.cells}
        return _logs({cell: cost_at(self.cells[cell], load) for cell, load in at.items() if load > 0})

    def promised(self, arm: str, safe: float) -> float:
        """The load to promise of ``arm``: ``safe`` (where that is 0, the highest that held on every window in every
        launch), or the next lower one measured at which the SLOs hold over all windows and launches, as
        :func:`tuner.verify.certify.recertify` judges them. 0 where they hold at none. Launches without a cost on some
        window are left out, as they are from the costs."""
        priced = set(Repeats(self.costs()).launches)
        cells = [steps for (name, number, _), steps in self.cells.items() if name == arm and (name, number) in priced]
        if not cells:
            return 0.0
        top = safe or min(held(steps) for steps in cells)
        lower = sorted({s.load for steps in cells for s in steps if s.load < top}, reverse=True)
        return next((x for x in (top, *lower) if margin_of_all(cells, x, self.slos) <= 0), 0.0)

    def unserved(self) -> dict[str, list[str]]:
        """Arms that served nothing within their SLOs on a window, whatever the load: in words, once for every launch
        in which they did. That has no cost which could be averaged: left out, the arm would be the cheaper for it."""
        found: dict[str, dict[int, str]] = {}
        for (arm, number, window), steps in self.cells.items():
            trusted = [s for s in steps if not s.untrusted]
            priced = any(math.isfinite(s.metrics.get(COST, math.inf)) for s in steps)  # untrusted, but it served
            if trusted and not priced and all(map(served_nothing, trusted)):
                words = f"served nothing within its SLOs on window {window} in launch {number}"
                found.setdefault(arm, {})[number] = words
        return {arm: list(words.values()) for arm, words in found.items()}

    def within(self, key: str) -> dict[Cell, float]:
        """The variance of every cell's log metric that its own interval states: of the highest load that held (the
        lowest, where none did)."""
        found: dict[Cell, float] = {}
        for cell, steps in self.cells.items():
            trusted = sorted((s for s in steps if not s.untrusted), key=lambda s: s.load)
            step = next((s for s in reversed(trusted) if not s.slo_misses), trusted[0] if trusted else None)
            low, high = step.intervals.get(key, (0.0, 0.0)) if step else (0.0, 0.0)
            if 0 < low <= high < math.inf:
                found[cell] = (math.log(high / low) / (2 * 1.96)) ** 2
        return found

    def values_at(self, loads: Mapping[str, float], key: str) -> dict[Cell, float]:
        """Log of a metric of every arm of ``loads`` at its load there. What was measured above that load alone is
        followed down as it rises where another of the arm's launches measured both on that window, or else on the usual
        one (the median: near its own capacity a harder window rises like a wall); where none did it stays as it is, and
        is too high (:meth:`measured_as_low`)."""
        slopes = {arm: self._slopes(arm, load, key) for arm, load in loads.items()}
        found = {}
        for cell, steps in self.cells.items():
            if (arm := cell[0]) in loads:
                slope = slopes[arm].get(cell[2], median(slopes[arm].values() or [0.0]))
                found[cell] = value_at(steps, loads[arm], key, slope, rising=True)
        return _logs(found)

    def measured_as_low(self, arm: str, load: float) -> bool:
        """Whether launches of ``arm`` measured a load as low as this, and on every window one at most :data:`REACH`
        above it."""
        lowest: dict[str, float] = {}
        for (name, _, window), steps in self.cells.items():
            if name == arm:
                lowest[window] = min(lowest.get(window, math.inf), *(s.load for s in steps))
        return min(lowest.values(), default=math.inf) * NEAR <= load and max(lowest.values()) <= load * REACH

    def _slopes(self, arm: str, load: float, key: str) -> dict[str, float]:
        """By window, as far as known, how the metric rises from ``load`` on."""
        found: dict[str, list[float]] = {}
        for (name, _, window), steps in self.cells.items():
            if name == arm and (slope := slope_below(steps, load, key)) is not None:
                found.setdefault(window, []).append(slope)
        return {window: fmean(slopes) for window, slopes in found.items()}


def _logs(values: Mapping[Cell, float]) -> dict[Cell, float]:
    return {cell: math.log(value) for cell, value in values.items() if 0 < value < math.inf}


def _of(repeats: Repeats, label: str, tails: tuple[float, float]) -> Range:
    return _factor(repeats.estimate(label), *tails) if label in repeats.arms else UNKNOWN


def served_nothing(step: Step) -> bool:
    """Whether nothing was served within the SLOs. A step that was ended early may have served something after it: it
    counts only where not one token had come."""
    priced = math.isfinite(step.metrics.get(COST, math.inf))
    return not priced and not (step.stopped_early and step.metrics.get(THROUGHPUT, 0.0) > 0)


def unreliable(launches: Sequence[Launched]) -> dict[str, str]:
    """Arms that cannot be relied on, and how they failed: not in passing, or twice."""
    found: dict[str, str] = {}
    for label in {launch.arm for launch in launches}:
        failed = [x.failure for x in launches if x.arm == label and x.failure]
        if len(failed) > 1 or any(not f.transient for f in failed):
            found[label] = f"{failed[-1].message} ({failed[-1].stage})"
    return found


def _adjusted(doubts: Mapping[str, float], weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Holm over the finalists, then divided by the share of the allowed doubt that this family of tests may use."""
    corrected = holm(list(doubts.values()), [weights[label] for label in doubts])
    return {label: min(1.0, p / share) for label, p in zip(doubts, corrected, strict=True)}


def _best(costs: Repeats, labels: Sequence[str], seed: int) -> dict[str, float]:
    if not labels:
        return {}
    columns = [costs.arms.index(label) for label in labels]
    shares = share_best(costs.draws(4000, seed)[:, columns])
    return dict(zip(labels, map(float, shares), strict=True))


def _factor(estimate: Estimate, below: float, above: float) -> Range:
    low, high = estimate.between(below, above)
    return exp(estimate.mean), exp(low), exp(high)


Test = tuple[Mapping[str, Estimate], Mapping[str, float]]  # by label: what an arm gains, and the doubt that it does


def _choose(
    base: str, contenders: Sequence[str], tests: Mapping[str, Test], costs: Repeats, allowed: float
) -> tuple[str, str]:
    """(A label, the reason): ``tests`` are by reason, in the order in which they are looked at."""
    if not base:
        if not contenders:
            return "", "nothing-holds"
        return min(contenders, key=lambda label: costs.estimate(label).mean), "default-fails"
    for reason, (gains, doubts) in tests.items():
        proven = [label for label in contenders if doubts.get(label, 1.0) < allowed]
        if proven:
            return min(proven, key=lambda label: gains[label].mean), reason
    return base, "nothing-proven"
