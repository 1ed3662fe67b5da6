"""Ablation: every flag of the winner is set back and measured against the winner; what proves nothing goes.

Backward elimination in two steps, because flags can stand in for each other: first each flag alone is set back; then
all that proved nothing are set back together. Where that loses part of the gain, the one that looked most useful
returns, until nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from tuner.engines.protocol import OnEvent
from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig, Value
from tuner.spec.study import Study
from tuner.verify.arm import Finalist, Range
from tuner.verify.judge import UNKNOWN, Arm, Table, judge, unreliable
from tuner.verify.repeats import Repeats
from tuner.verify.rounds import Done, Launcher, Rounds
from tuner.verify.statistics import Estimate, holm, ratio
from tuner.verify.verdict import figures
from tuner.words import figure

NOT_MEASURED = "not measured"  # how the reason begins why a parameter is kept of which nothing is known


@dataclass(frozen=True, slots=True)
class AblationBudget:
    """At most ``launches`` in all: up to ``alone`` rounds of the winner and every flag set back alone, ``together``
    rounds of the winner and the smallest config. ``worth`` is the smallest effect on cost that earns a flag its place,
    ``slower`` the smallest on latency; flags return when it is ``sure`` that the config without them costs more."""

    launches: int
    alone: int = 4
    together: int = 3
    confidence: float = 0.95
    worth: float = 0.01
    slower: float = 0.05
    sure: float = 0.9

    @property
    def tests(self) -> int:
        """How many parameters it can set back alone: two rounds of each and of the winner, and two looks at the
        smallest config, are kept for it."""
        return max((self.launches - 2 * self.together) // 2 - 1, 0)

    @property
    def least(self) -> int:
        """The launches with which one parameter can be tested."""
        return 2 * self.together + 4


@dataclass(frozen=True, slots=True)
class Effect:
    """One parameter of the winner. ``cost_without`` is the cost without it over the cost with it (middle, low, high;
    1.08: 8 % more without); ``doubt`` the p-value, corrected for all of them, of "it is worth nothing".
    ``latency_without`` is the same of the latency, both at the lower of the two capacities. ``why`` says in words why
    it was kept or not."""

    parameter: str
    value: Value
    default: Value
    kept: bool
    cost_without: Range
    doubt: float
    why: str
    latency_without: Range = UNKNOWN


@dataclass(frozen=True, slots=True)
class Ablation:
    """``config`` is the smallest that keeps the gain, ``params`` its parameters off the default; ``cost_change`` its
    cost over the winner's (UNKNOWN where they are the same). ``winner`` is the hash of the configuration that was taken
    apart, ``budget`` the launches that were allowed for it (``launches``: made). ``arm`` is what these say of
    ``config`` beside the winner: what it promises at which load (None where the two are the same)."""

    config: ServingConfig
    params: Mapping[str, Value]
    effects: tuple[Effect, ...]
    cost_change: Range
    launches: int
    text: str
    winner: str = ""
    budget: int = 0
    arm: Arm | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ablate(
    study: Study,
    launch: Launcher,
    winner: Finalist,
    windows: Sequence[Trace],
    budget: AblationBudget,
    on_event: OnEvent = lambda _name, _data: None,
    *,
    done: Sequence[Done] = (),
) -> Ablation:
    """Measures which of ``winner``'s parameters earn their place; labels of launches begin with ``ablate``."""
    if not windows:
        raise UsageError("there is no held-out window to measure on", fix="Set trace.heldout_windows to 3 or more.")
    space = study.space
    applied = space.active(space.snap(winner.config.params))
    params = {name: value for name, value in applied.items() if value != space[name].default}
    before = {(d.label, d.config): d.outcome for d in done}
    rounds = Rounds(study, launch, tuple(windows), on_event, before, budget.launches, "ablate")
    bench = _Bench(study, winner, budget, rounds)
    tested = list(params)[: budget.tests]
    effects, lost = bench.each(params, tested) if tested else ({}, {})
    delays = bench.delays(effects)
    allowed = (1 - budget.confidence) / 2
    doubts = _corrected(effects, budget.worth)
    slower = {name for name, doubt in _corrected(delays, budget.slower).items() if doubt < allowed}
    proven = {name for name, doubt in doubts.items() if doubt < allowed} | lost.keys() | slower
    kept = proven | (params.keys() - set(tested))
    change, returned, arm = UNKNOWN, set[str](), None
    while dropped := [name for name in params if name not in kept]:
        gap = bench.together(params, kept)
        if gap is not None and gap.doubt(budget.worth) <= budget.sure:
            change, arm = ratio(gap, budget.confidence), bench.beside_the_winner(bench.small(params, kept))
            break
        # together they lose what none of them loses alone: the likeliest one returns, or, with the launches for one
        # more look, as many as explain the loss (all of them where it was not measured: nothing is dropped unmeasured)
        last = budget.launches - len(rounds.launches) < 4 * budget.together
        back, explained = list[str](), 0.0
        for name in sorted(dropped, key=lambda name: -effects[name].mean):
            enough = not last or (gap is not None and explained >= gap.mean - budget.worth)
            if gap is not None and back and (enough or effects[name].mean <= budget.worth):
                break
            back.append(name)
            explained += effects[name].mean
        returned |= set(back)
        kept |= set(back)

    def why(name: str) -> str:
        if name in lost:
            return lost[name]
        if name not in tested:
            return f"{NOT_MEASURED}: too few launches were set aside"
        if name in proven:
            return "its effect is proven" if doubts[name] < allowed else "its effect on latency is proven"
        return "needed together with others" if name in returned else "no effect is proven"

    rows = tuple(
        Effect(
            name,
            value,
            space[name].default,
            name in kept,
            ratio(effects[name], budget.confidence) if name in effects else UNKNOWN,
            doubts.get(name, 1.0),
            why(name),
            ratio(delays[name], budget.confidence) if name in delays else UNKNOWN,
        )
        for name, value in params.items()
    )
    smallest = {name: params[name] for name in params if name in kept}
    text = _text(rows, change, arm, len(rounds.launches), study.objective.latency, budget)
    small = space.config(smallest, study.model)
    made = len(rounds.launches)
    return Ablation(small, smallest, rows, change, made, text, winner.config.hash, budget.launches, arm)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Everything is measured in one sequence of rounds, so that every launch tells of the noise."""

    study: Study
    winner: Finalist
    budget: AblationBudget
    rounds: Rounds

    def each(self, params: Mapping[str, Value], tested: Sequence[str]) -> tuple[dict[str, Estimate], dict[str, str]]:
        """Effects (log cost without the parameter less with it), and why where the server cannot do without it."""
        arms = {name: self._arm(_without(name), {k: v for k, v in params.items() if k != name}) for name in tested}
        active, lost = dict(arms), dict[str, str]()
        kept_back = 2 * self.budget.together
        strict = (1 - self.budget.confidence) / 2 / len(tested)  # the strictest of Holm's limits
        while self.rounds.number < self.budget.alone and active:
            if len(self.rounds.launches) + len(active) + 1 > self.budget.launches - kept_back:
                break
            self.rounds.play([self.winner, *active.values()])
            lost = _lost(self.rounds, arms)
            proven = {
                name
                for name, effect in self._effects(arms).items()
                if self.rounds.number > 1 and _doubt(effect, self.budget.worth) < strict
            }
            active = {name: arm for name, arm in active.items() if name not in lost and name not in proven}
        standing, unserved = self._standing(), self._table().unserved()
        served = self.winner.label not in unserved
        effects = {
            name: effect
            for name, effect in self._effects(arms).items()
            if served and name not in lost and arms[name].label in standing
        }
        for name in tested:
            if name in effects or name in lost:
                continue
            words = unserved.get(arms[name].label)
            lost[name] = f"without it: {words[-1]}" if words else "the SLOs hold at no load without it"
            if arms[name].label in standing:
                lost[name] = f"{NOT_MEASURED}: no launch without it can be compared with one of the winner"
            if not served:
                lost[name] = f"{NOT_MEASURED}: the winner itself {unserved[self.winner.label][-1]}"
        return effects, lost

    def delays(self, names: Iterable[str]) -> dict[str, Estimate]:
        """The log latency without each of these parameters less with it, both at the load that either holds."""
        table, base, key = self._table(), self.winner.label, self.study.objective.latency_key
        held = Repeats(table.capacities())
        found = {}
        for name, label in ((name, _without(name)) for name in names):
            common = math.exp(min(held.estimate(arm).mean for arm in (base, label)))
            values = Repeats(table.values_at({base: common, label: common}, key), None, table.within(key))
            if label in values.linked(base):
                found[name] = values.difference(label, base)
        return found

    def together(self, params: Mapping[str, Value], kept: Set[str]) -> Estimate | None:
        """Log cost of the config with only ``kept`` less the winner's; None where there are no launches left for it."""
        small, played = self.small(params, kept), 0
        while played < self.budget.together and len(self.rounds.launches) + 2 <= self.budget.launches:
            self.rounds.play([self.winner, small])
            arm = self.beside_the_winner(small)
            self.rounds.below = {small.label: arm.load} if arm.at_most else {}
            played += 1
        if played < 2:
            return None
        standing = {small.label, self.winner.label} <= self._standing()
        if not standing or not self.beside_the_winner(small).holds:
            return Estimate(math.inf, ((0.0, 1.0),))
        costs = self._costs()
        linked = small.label in costs.linked(self.winner.label)
        return costs.difference(small.label, self.winner.label) if linked else None

    def small(self, params: Mapping[str, Value], kept: Set[str]) -> Finalist:
        """The config with only ``kept``."""
        names = [name for name in params if name in kept]
        return self._arm(f"keeping {' '.join(names) or 'nothing'}", {name: params[name] for name in names})

    def beside_the_winner(self, small: Finalist) -> Arm:
        """What every launch says of ``small``, its differences being to the winner."""
        arms = [replace(self.winner, baseline=True), small]
        objective = self.study.objective
        confidence = self.budget.confidence
        found = judge(
            arms,
            self.rounds.launches,
            objective.slos,
            objective.latency_key,
            confidence=confidence,
            explain=False,
        )
        return found.arms[small.label]

    def _effects(self, arms: Mapping[str, Finalist]) -> dict[str, Estimate]:
        costs, base = self._costs(), self.winner.label
        linked = costs.linked(base)
        return {name: costs.difference(arm.label, base) for name, arm in arms.items() if arm.label in linked}

    def _costs(self) -> Repeats:
        return Repeats(self._table().costs())

    def _standing(self) -> set[str]:
        """The arms that were measured, and meet the SLOs at some load in every launch."""
        table = self._table()
        arms = {arm for arm, _, _ in table.cells}
        return {arm for arm in arms if table.promised(arm, 0.0)} - table.unserved().keys()

    def _table(self) -> Table:
        return Table(self.rounds.launches, self.study.objective.slos)

    def _arm(self, label: str, params: Mapping[str, Value]) -> Finalist:
        return Finalist(label, self.study.space.config(params, self.study.model), self.winner.load)


def _without(name: str) -> str:
    return f"without {name}"


def _corrected(effects: Mapping[str, Estimate], worth: float) -> dict[str, float]:
    p_values = [_doubt(effect, worth) for effect in effects.values()]
    return dict(zip(effects, holm(p_values), strict=True))


def _doubt(effect: Estimate, worth: float) -> float:
    """p-value of "without it the cost is higher by at most ``worth``"."""
    return effect.opposite().doubt(-worth)


def _lost(rounds: Rounds, arms: Mapping[str, Finalist]) -> dict[str, str]:
    failures = unreliable(rounds.launches)
    return {name: f"without it: {failures[arm.label]}" for name, arm in arms.items() if arm.label in failures}


def _percent(factor: Range, digits: int = 1, sure: str = "") -> str:
    middle, low, high = (f"{(x - 1) * 100:+.{digits}f}" for x in factor)
    return f"{middle} % ({low} to {high} %{sure})"


def _text(
    effects: Sequence[Effect], change: Range, arm: Arm | None, launches: int, latency: str, budget: AblationBudget
) -> str:
    if not effects:
        return "The winner is the default: there is nothing to set back."
    unknown = sum(e.why.startswith(NOT_MEASURED) for e in effects)
    earned = sum(e.kept for e in effects) - unknown
    lines = [
        f"{earned} of {len(effects)} parameters earn{'s its' if earned == 1 else ' their'} place ({launches} launches)."
    ]
    if unknown:
        lines[0] += f" {unknown} could not be measured and {'stays' if unknown == 1 else 'stay'}."
    if budget.tests < len(effects):
        lines[0] += f" To test all of them takes --launches {budget.least + 2 * (len(effects) - 1)}."
    for e in effects:
        cost = ""
        if not math.isnan(e.cost_without[0]):
            cost = f"cost without it {_percent(e.cost_without)}; "
        if not math.isnan(e.latency_without[0]) and abs(e.latency_without[0] - 1) >= budget.slower:
            cost += f"{latency} {_percent(e.latency_without, 0)}; "
        lines.append(f"- `{e.parameter}` = {e.value}: {'kept' if e.kept else 'set back'}; {cost}{e.why}")
    if not math.isnan(change[0]):
        sure = f"{budget.confidence * 100:g} %"
        lines.append(f"The smallest config costs {_percent(change, sure=f', {sure}')} against the winner.")
    if arm:
        lines[-1] += f" At load {figure(arm.load)} it costs {figures(arm, latency)}."
        if not math.isnan(arm.latency_difference[0]):
            lines[-1] += f" Its {latency} is {_percent(arm.latency_difference, 0)} against the winner's."
    return "\n".join(lines)
