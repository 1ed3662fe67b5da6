"""Verification: the finalists and the engine's default are launched again and measured on windows the search never saw.

The order of launches is counterbalanced (ABBA): every round launches each arm once, every second round in the reverse
order of the one before, so that a machine that slowly warms up or fills up favours nobody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tuner.engines.protocol import LaunchFailed, OnEvent
from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible, Measured, Outcome, Step
from tuner.verify.arm import Finalist, Launched
from tuner.verify.capacity import loads
from tuner.verify.judge import Arm, Judgement, Table, judge
from tuner.verify.repeats import Spread
from tuner.verify.verdict import Verification, verdict


class Rig(Protocol):
    """A running server that can be measured at a load on a window (the caller knows SLOs, warm-up and files)."""

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        """Replays ``trace`` at ``load``. Raises :class:`LaunchFailed` where the server died under load and
        :class:`Cancelled` where the user interrupted."""
        ...


LITTLE_HOPE = 0.05  # a finalist less probable than this to be the cheapest is not launched again

Launcher = Callable[[ServingConfig, str], AbstractContextManager[Rig]]
"""Starts the config (raises LaunchFailed), stops it at the end of the ``with``. The second argument is the label of the
launch (``verify 2 trial 17``), under which the caller keeps the steps measured inside."""


@dataclass(frozen=True, slots=True)
class VerifyBudget:
    """When to stop repeating: after ``launches`` in all (those done before a resume included), after ``seconds`` of
    this call, or when the intervals of the choice's cost and of its difference to the default are at most ``width``
    wide (a share of the value). At least ``minimum`` rounds are done before the width may stop it.

    ``worth`` is the share of the cost below which a difference is not worth a flag.
    """

    launches: int
    seconds: float | None = None
    width: float = 0.08
    minimum: int = 3
    confidence: float = 0.95
    worth: float = 0.01


@dataclass(frozen=True, slots=True)
class Done:
    """A launch that was made before an interrupt: its label, and how it ended."""

    label: str
    outcome: Outcome


def verify(
    study: Study,
    launch: Launcher,
    finalists: Sequence[Finalist],
    baseline: Finalist,
    windows: Sequence[Trace],
    budget: VerifyBudget,
    on_event: OnEvent = lambda _name, _data: None,
    *,
    done: Sequence[Done] = (),
    known: Spread | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Verification:
    """Launches ``finalists`` (most promising first) and ``baseline`` again, in rounds, on held-out ``windows``.

    Launches found in ``done`` are not repeated: the order depends only on the study's seed and on what was measured.
    ``known`` is the launch-to-launch spread learnt in the search (:func:`tuner.verify.finalists.launch_spread`).
    Raises :class:`Cancelled` where the user interrupts; every launch finished until then has been through ``launch``.
    """
    if not windows:
        raise UsageError("there is no held-out window to verify on", fix="Set trace.heldout_windows to 3 or more.")
    arms = [baseline, *finalists][: max(budget.launches // 3, 2)]
    race = _Race(study, launch, arms, tuple(windows), budget, on_event, {d.label: d.outcome for d in done}, known)
    stopped = race.run(clock)
    judgement = race.judge()
    return verdict(
        judgement, arms, race.launches, study, windows=len(windows), stopped=stopped, confidence=budget.confidence
    )


@dataclass(slots=True)
class _Race:
    study: Study
    launch: Launcher
    arms: Sequence[Finalist]
    windows: tuple[Trace, ...]
    budget: VerifyBudget
    on_event: OnEvent
    done: Mapping[str, Outcome]
    known: Spread | None
    launches: list[Launched] = field(default_factory=list)
    active: list[Finalist] = field(default_factory=list)

    def run(self, clock: Callable[[], float]) -> str:
        """Rounds until something says stop; returns why."""
        self.active = list(self.arms)
        rng = np.random.default_rng(self.study.seed)
        order, number, started_s = list(self.arms), 0, clock()
        while True:
            number += 1
            left = self.budget.launches - len(self.launches)
            stop = self._stop(number - 1, left, clock() - started_s)
            if stop:
                return stop
            order = (
                list(reversed(order)) if number % 2 == 0 else [self.arms[i] for i in rng.permutation(len(self.arms))]
            )
            for arm in [a for a in order if a in self.active]:
                self.launches.append(self._once(number, arm))

    def judge(self) -> Judgement:
        return judge(
            self.arms,
            self.launches,
            self.study.objective.slos,
            self.study.objective.latency_key,
            self.study.load.ladder,
            confidence=self.budget.confidence,
            worth=self.budget.worth,
            known=self.known,
            active=[a.label for a in self.active],
            seed=self.study.seed,
        )

    def _stop(self, rounds: int, left: int, seconds: float) -> str:
        """Takes arms out of the race where that is decided, and says why to end it (empty: go on)."""
        if rounds >= 2:
            found = self.judge()
            best = min(
                (found.arms[a.label] for a in self.active if found.arms[a.label].holds),
                key=lambda arm: arm.cost[0],
                default=None,
            )
            for arm in list(self.active):
                state = found.arms[arm.label]
                hopeless = state.failure or not state.holds or state.best < LITTLE_HOPE or _beaten(state, best)
                if not arm.baseline and hopeless:
                    self.active.remove(arm)
            if len(self.active) < 2:
                return "no finalist is left beside the default"
            if rounds >= self.budget.minimum and _narrow(found, self.budget.width):
                return "the intervals are narrow enough"
            while left < len(self.active) > 2:
                last = max((a for a in self.active if not a.baseline), key=lambda a: found.arms[a.label].cost[0])
                self.active.remove(last)
        if left < len(self.active):
            return "the launches set aside are spent"
        if self.budget.seconds is not None and rounds and seconds >= self.budget.seconds:
            return "the time set aside is spent"
        return ""

    def _once(self, number: int, arm: Finalist) -> Launched:
        """One launch, bracketed on every window; every second round takes the windows in reverse."""
        label = f"verify {number} {arm.label}"
        known = self.done.get(label)
        if isinstance(known, Infeasible):
            return Launched(arm.label, number, known.steps, known)
        if isinstance(known, Measured):
            return Launched(arm.label, number, known.steps)
        self.on_event("verify-launch", {"label": label, "launched": len(self.launches), "of": self.budget.launches})
        steps: list[Step] = []
        try:
            with self.launch(arm.config, label) as rig:
                for window in self.windows if number % 2 else self.windows[::-1]:
                    steps += self._bracket(rig, arm, window)
        except LaunchFailed as failure:
            return Launched(arm.label, number, tuple(steps), failure.outcome)
        return Launched(arm.label, number, tuple(steps))

    def _bracket(self, rig: Rig, arm: Finalist, window: Trace) -> list[Step]:
        """The loads around the arm's capacity on this window, starting where earlier rounds found it."""
        ladder = self.study.load.ladder
        table = Table(self.launches, self.study.objective.slos, max(ladder))
        seen = [table.capacity(cell) for cell in table.cells if (cell[0], cell[2]) == (arm.label, window.name)]
        seen = [found for found in seen if not math.isnan(found)]
        start = float(np.exp(np.mean(np.log(seen)))) if seen else arm.load
        steps: list[Step] = []
        while (load := loads(start, min(ladder), max(ladder), [not s.slo_misses for s in steps])) is not None:
            steps.append(rig.measure(load, window, window.name))
        return steps


def _beaten(state: Arm, best: Arm | None) -> bool:
    """Whether even the low end of the arm's cost lies above the high end of the best one's."""
    return best is not None and state.label != best.label and state.cost[1] > best.cost[2]


def _narrow(found: Judgement, width: float) -> bool:
    """Whether the choice's intervals are narrow enough and, where it is the default, none of the others can be cheaper
    by more than half of ``width`` any more."""
    arm = found.arms.get(found.choice)
    if arm is None:
        return False
    rows = [arm.cost] if math.isnan(arm.difference[0]) else [arm.cost, arm.difference]
    hopes = [a.difference[1] for a in found.arms.values() if a.best >= LITTLE_HOPE and a.label != arm.label]
    settled = found.reason != "nothing-proven" or all(low >= 1 - width / 2 for low in hopes)
    return settled and all(high - low <= width * middle for middle, low, high in rows)
