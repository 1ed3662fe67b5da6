"""Ablation: every flag of the winner is set back and measured against the winner; what proves nothing goes.

Backward elimination in two steps, because flags can stand in for each other: first each flag alone is set back; then
all that proved nothing are set back together. Where that loses part of the gain, the one that looked most useful
returns, until nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from tuner.engines.protocol import OnEvent
from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig, Value
from tuner.spec.study import Study
from tuner.study.outcome import Outcome
from tuner.verify.arm import Finalist, Range
from tuner.verify.judge import UNKNOWN, Table
from tuner.verify.repeats import Repeats
from tuner.verify.rounds import Done, Launcher, Rounds
from tuner.verify.statistics import Estimate, holm, ratio

RESERVE = 4  # launches kept for measuring the smallest config against the winner


@dataclass(frozen=True, slots=True)
class AblationBudget:
    """At most ``launches`` in all; ``rounds`` of each comparison, ended earlier for flags that are decided. ``worth``
    is the smallest effect that earns a flag its place; ``loss`` what the smallest config may cost more than it."""

    launches: int
    rounds: int = 4
    confidence: float = 0.95
    worth: float = 0.01
    loss: float = 0.02


@dataclass(frozen=True, slots=True)
class Effect:
    """One parameter of the winner. ``cost_without`` is the cost without it over the cost with it (middle, low, high;
    1.08: 8 % more without); ``doubt`` the p-value, corrected for all of them, of "it is worth nothing". ``why`` says
    in words why it was kept or not."""

    parameter: str
    value: Value
    default: Value
    kept: bool
    cost_without: Range
    doubt: float
    why: str


@dataclass(frozen=True, slots=True)
class Ablation:
    """``config`` is the smallest that keeps the gain, ``params`` its parameters off the default; ``cost_change`` its
    cost over the winner's (UNKNOWN where they are the same)."""

    config: ServingConfig
    params: Mapping[str, Value]
    effects: tuple[Effect, ...]
    cost_change: Range
    launches: int
    text: str

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
    before = {d.label: d.outcome for d in done}
    bench = _Bench(study, launch, winner, tuple(windows), budget, on_event, before)
    tested = list(params)[: max((budget.launches - RESERVE) // 2 - 1, 0)]
    effects, lost = bench.each(params, tested) if tested else ({}, {})
    allowed = (1 - budget.confidence) / 2
    p_values = {name: Estimate(-e.mean, e.error, e.freedom).doubt(-budget.worth) for name, e in effects.items()}
    doubts = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    proven = {name for name, doubt in doubts.items() if doubt < allowed} | lost.keys()
    kept = proven | (params.keys() - set(tested))
    change, returned = UNKNOWN, set[str]()
    while dropped := [name for name in params if name not in kept]:
        gap = bench.together(params, kept)
        if gap is not None and gap.mean <= budget.loss and gap.doubt(budget.worth) <= 1 - allowed:
            change = ratio(gap, budget.confidence)
            break
        # together they lose what none of them loses alone (or it could not be measured): the likeliest one returns
        back = [max(dropped, key=lambda name: effects[name].mean)] if gap is not None else dropped
        returned |= set(back)
        kept |= set(back)

    def why(name: str) -> str:
        if name in lost:
            return lost[name]
        if name not in tested:
            return "not measured: too few launches were set aside"
        if name in proven:
            return "its effect is proven"
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
        )
        for name, value in params.items()
    )
    smallest = {name: params[name] for name in params if name in kept}
    text = _text(rows, change, bench.spent, budget.confidence)
    return Ablation(space.config(smallest, study.model), smallest, rows, change, bench.spent, text)


@dataclass(slots=True)
class _Bench:
    study: Study
    launch: Launcher
    winner: Finalist
    windows: tuple[Trace, ...]
    budget: AblationBudget
    on_event: OnEvent
    done: Mapping[str, Outcome]
    spent: int = 0

    def each(self, params: Mapping[str, Value], tested: Sequence[str]) -> tuple[dict[str, Estimate], dict[str, str]]:
        """Effects (log cost without the parameter less with it), and why where the server cannot do without it."""
        arms = {name: self._arm(f"without {name}", {k: v for k, v in params.items() if k != name}) for name in tested}
        rounds, lost, effects = self._rounds("ablate"), dict[str, str](), dict[str, Estimate]()
        active = dict(arms)
        while rounds.number < self.budget.rounds and active:
            if self.spent + len(active) + 1 > self.budget.launches - RESERVE:
                break
            self._play(rounds, [self.winner, *active.values()])
            lost |= _lost(rounds, active)
            costs = self._costs(rounds)
            effects = {
                name: costs.difference(arm.label, self.winner.label)
                for name, arm in arms.items()
                if name not in lost and {arm.label, self.winner.label} <= set(costs.arms)
            }
            active = {k: a for k, a in active.items() if k not in lost}
            if rounds.number > 1:
                # decided, with the strictest of Holm's limits: proven, or not worth it at best
                strict = (1 - self.budget.confidence) / 2 / len(tested)
                active = {k: a for k, a in active.items() if k not in effects or self._open(effects[k], strict)}
        for name in tested:
            if name not in effects and name not in lost:
                lost[name] = "the SLOs hold at no load without it"
        return effects, lost

    def together(self, params: Mapping[str, Value], kept: Set[str]) -> Estimate | None:
        """Log cost of the config with only ``kept`` less the winner's; None where there are no launches left for it."""
        small = self._arm("smallest", {k: v for k, v in params.items() if k in kept})
        rounds = self._rounds(f"ablate to {len(kept)}")
        while rounds.number < self.budget.rounds and self.spent + 2 <= self.budget.launches:
            self._play(rounds, [self.winner, small])
        costs = self._costs(rounds)
        if rounds.number < 2:
            return None
        if not {small.label, self.winner.label} <= set(costs.arms):
            return Estimate(math.inf, 0.0, 1.0)
        return costs.difference(small.label, self.winner.label)

    def _open(self, effect: Estimate, strict: float) -> bool:
        proven = Estimate(-effect.mean, effect.error, effect.freedom).doubt(-self.budget.worth) < strict
        return not proven and effect.doubt(self.budget.worth) > strict

    def _rounds(self, word: str) -> Rounds:
        return Rounds(self.study, self.launch, self.windows, self.on_event, self.done, self.budget.launches, word)

    def _play(self, rounds: Rounds, arms: Sequence[Finalist]) -> None:
        before = len(rounds.launches)
        rounds.play(arms)
        self.spent += len(rounds.launches) - before

    def _costs(self, rounds: Rounds) -> Repeats:
        return Repeats(Table(rounds.launches, self.study.objective.slos, max(self.study.load.ladder)).costs())

    def _arm(self, label: str, params: Mapping[str, Value]) -> Finalist:
        return Finalist(label, self.study.space.config(params, self.study.model), self.winner.load)


def _lost(rounds: Rounds, arms: Mapping[str, Finalist]) -> dict[str, str]:
    failures = {launch.arm: launch.failure for launch in rounds.launches if launch.failure}
    return {
        name: f"without it: {failure.message} ({failure.stage})"
        for name, arm in arms.items()
        if (failure := failures.get(arm.label)) is not None
    }


def _text(effects: Sequence[Effect], change: Range, launches: int, confidence: float) -> str:
    if not effects:
        return "The winner is the default: there is nothing to set back."
    lines = [f"{sum(e.kept for e in effects)} of {len(effects)} parameters earn their place ({launches} launches)."]
    for e in effects:
        figure = ""
        if not math.isnan(e.cost_without[0]):
            middle, low, high = ((x - 1) * 100 for x in e.cost_without)
            figure = f"cost without it {middle:+.1f} % ({low:+.1f} to {high:+.1f} %); "
        lines.append(f"- `{e.parameter}` = {e.value}: {'kept' if e.kept else 'set back'}; {figure}{e.why}")
    if not math.isnan(change[0]):
        middle, low, high = ((x - 1) * 100 for x in change)
        sure = f"{confidence * 100:g} %"
        lines.append(
            f"The smallest config costs {middle:+.1f} % ({low:+.1f} to {high:+.1f} %, {sure}) against the winner."
        )
    return "\n".join(lines)
