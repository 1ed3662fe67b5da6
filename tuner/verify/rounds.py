"""Rounds: arms launched one after the other in counterbalanced order, each bracketed on every window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol, TypeVar

import numpy as np

from tuner.engines.protocol import LaunchFailed, OnEvent
from tuner.errors import EnvironmentFault
from tuner.executor.protocol import NodeLost
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import GPU_BUSY, IN_A_ROW, UNTRIED, Infeasible, Measured, Outcome, Step
from tuner.verify.arm import Finalist, Launched
from tuner.verify.capacity import NEAR, REACH, held, highest_load, loads, still_pays
from tuner.verify.judge import Table

T = TypeVar("T")


class Rig(Protocol):
    """A running server that can be measured at a load on a window (the caller knows SLOs, warm-up and files)."""

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        """Replays ``trace`` at ``load``. Raises :class:`LaunchFailed` where the server died under load and
        :class:`Cancelled` where the user interrupted."""
        ...


Launcher = Callable[[ServingConfig, str], AbstractContextManager[Rig]]
"""Starts the config (raises LaunchFailed), stops it at the end of the ``with``. The second argument is the label of the
launch (``verify 2 trial 17``), under which the caller keeps the steps measured inside."""


@dataclass(frozen=True, slots=True)
class Done:
    """A launch that was made before: its label, its config's hash, and how it ended."""

    label: str
    config: str
    outcome: Outcome


def insist(attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, which launches something. It is made once more where it raises a passing failure or its
    node was lost, and again where the failure is the machine's: :data:`IN_A_ROW` of those raise EnvironmentFault, as
    does one of :data:`UNTRIED` (a GPU that somebody else holds at start-up) twice: what is launched here ought to
    serve."""
    machines = others = 0
    while True:
        try:
            return attempt()
        except NodeLost:
            others += 1
            if others > 1:
                raise
        except LaunchFailed as failed:
            found = failed.outcome
            machines, others = machines + found.machines, others + (not found.machines)
            if machines >= IN_A_ROW or (others > 1 and found.cause in UNTRIED):
                raise EnvironmentFault(found.message, fix=found.fix) from failed
            if others > 1 or not found.transient:
                raise


@dataclass(slots=True)
class Rounds:
    """Plays rounds and keeps what they showed in ``launches``.

    The order is counterbalanced (ABBA): odd rounds take the arms in a seeded random order, even rounds in the reverse
    of the round before, so that a machine that slowly warms up or fills up favours nobody. ``done`` maps labels and
    config hashes of launches made before to their outcomes: those are not repeated (under one label another winner's
    launches may be there, with another config). ``of`` launches are allowed in all, ``fresh`` of them now (None: all).
    ``word`` begins every label. ``below`` are loads, by an arm's label, that its later launches measure as well where
    their brackets lie above: what is promised at a load is then measured there.
    """

    study: Study
    launch: Launcher
    windows: tuple[Trace, ...]
    on_event: OnEvent
    done: Mapping[tuple[str, str], Outcome]
    of: int
    word: str = "verify"
    fresh: int | None = None
    launches: list[Launched] = field(default_factory=list)
    number: int = 0
    made: int = 0  # of the launches, those that were not made before
    below: Mapping[str, float] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)

    def play(self, arms: Sequence[Finalist]) -> None:
        """One launch of each of ``arms``."""
        self.number += 1
        if self.number % 2:
            rng = np.random.default_rng([self.study.seed, self.number])
            self._order = [arms[i].label for i in rng.permutation(len(arms))]
        else:
            labels = [arm.label for arm in arms]
            known = [label for label in reversed(self._order) if label in labels]
            self._order = known + [label for label in labels if label not in known]
        for label in self._order:
            self.launches.append(self._once(next(a for a in arms if a.label == label)))

    def left(self, arms: Sequence[Finalist]) -> int:
        """How many of ``arms`` the next round may have: those launched for it before cost nothing."""
        left = self.of - len(self.launches)
        if self.fresh is None:
            return left
        return min(left, self.fresh - self.made + len(arms) - self.missing(arms))

    def missing(self, arms: Sequence[Finalist]) -> int:
        """How many of ``arms`` were not launched before for the next round."""
        return sum(self._before(arm, self.number + 1) is None for arm in arms)

    def _before(self, arm: Finalist, number: int) -> Outcome | None:
        return self.done.get((self._label(arm, number), arm.config.hash))

    def _label(self, arm: Finalist, number: int) -> str:
        return f"{self.word} {number} {arm.label}"

    def _once(self, arm: Finalist) -> Launched:
        """One launch, bracketed on every window; every second round takes the windows in reverse."""
        number = self.number
        label, known = self._label(arm, number), self._before(arm, number)
        if isinstance(known, Infeasible):
            return Launched(arm.label, number, known.steps, known)
        if isinstance(known, Measured):
            return Launched(arm.label, number, known.steps)
        self.made += 1
        self.on_event("verify-launch", {"label": label, "launched": len(self.launches), "of": self.of})
        return insist(lambda: self._measure(arm, label))

    def _measure(self, arm: Finalist, label: str) -> Launched:
        steps: list[Step] = []
        try:
            with self.launch(arm.config, label) as rig:
                for window in self.windows if self.number % 2 else self.windows[::-1]:
                    steps += self._bracket(rig, arm, window, steps)
        except LaunchFailed as failure:
            if failure.outcome.machines or failure.outcome.cause == GPU_BUSY:
                raise
            return Launched(arm.label, self.number, tuple(steps), failure.outcome)
        return Launched(arm.label, self.number, tuple(steps))

    def _bracket(self, rig: Rig, arm: Finalist, window: Trace, before: Sequence[Step]) -> list[Step]:
        """The loads around the arm's capacity on this window; ``before`` are this launch's steps on other windows."""
        ladder = self.study.load.ladder
        lowest, highest = min(ladder), highest_load(self.study, self.windows)
        start = self._start(arm, window, before)
        steps: list[Step] = []
        while (load := loads(start, lowest, highest, [not s.slo_misses for s in steps])) is not None:
            if load > max(ladder) and not still_pays(steps):
                break
            steps.append(rig.measure(load, window, window.name))
        promised = self.below.get(arm.label, math.inf)
        as_low = any(s.load * NEAR <= promised for x in self.launches if x.arm == arm.label for s in x.steps)
        if promised * (REACH if as_low else 1 / NEAR) < min(s.load for s in steps):
            steps.append(rig.measure(promised, window, window.name))
        return steps

    def _start(self, arm: Finalist, window: Trace, before: Sequence[Step]) -> float:
        """Where to begin on ``window``: at the load that held there in the last round, so that what rounds differ by is
        not what their loads differ by; else where the capacity was on the other windows, times what the other arms saw
        between those and this one; else where the search expects it."""
        for launch in reversed(self.launches):
            there = [s for s in launch.steps if s.window == window.name]
            if launch.arm == arm.label and not math.isnan(load := held(there)):
                return load
        table = Table([*self.launches, Launched(arm.label, self.number, tuple(before))], self.study.objective.slos)
        seen: dict[str, dict[str, list[float]]] = {}
        for (label, _, name), found in table.capacities().items():
            seen.setdefault(label, {}).setdefault(name, []).append(found)
        means = {label: {name: fmean(x) for name, x in windows.items()} for label, windows in seen.items()}
        mine = means.pop(arm.label, {})
        if not mine:
            return arm.load
        harder = [
            other[window.name] - fmean(other[name] for name in mine)
            for other in means.values()
            if {window.name, *mine} <= set(other)
        ]
        return math.exp(fmean(mine.values()) + (fmean(harder) if harder else 0.0))
