"""Verification: the finalists and the engine's default are launched again and measured on windows the search never saw.

The order of launches is counterbalanced (ABBA): every round launches each arm once, every second round in the reverse
order of the one before, so that a machine that slowly warms up or fills up favours nobody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tuner.engines.protocol import OnEvent
from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.spec.study import Study
from tuner.verify.arm import Finalist
from tuner.verify.judge import Judgement, judge
from tuner.verify.repeats import Spread
from tuner.verify.rounds import Done, Launcher, Rounds
from tuner.verify.verdict import Verification, verdict

LOADS = 3  # on each window a launch is measured at about as many: it brackets its capacity
LITTLE_HOPE = 0.1  # a finalist less probable than this to be the cheapest is not launched again


@dataclass(frozen=True, slots=True)
class VerifyBudget:
    """When to stop repeating: after ``launches`` in all (those done before a resume included), of which at most
    ``fresh`` are made now (None: all may be), before a round that would last beyond ``seconds`` of this call, or when
    the intervals of the choice's cost and of its difference to the default are at most ``width`` wide (a share of the
    value). At least ``minimum`` rounds are done before the width may stop it.

    ``arms`` is for how many configurations the time suffices, the default among them (None: it does not bound them);
    ``launch_s`` what a launch is expected to take before one has shown it.

    ``worth`` is the share of the cost below which a difference is not worth a flag.
    """

    launches: int
    seconds: float | None = None
    fresh: int | None = None
    arms: int | None = None
    launch_s: float = 0.0
    width: float = 0.08
    minimum: int = 3
    confidence: float = 0.95
    worth: float = 0.01


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
    by_count, by_time = max(budget.launches // 3, 2), budget.arms or len(finalists) + 1
    arms = [baseline, *finalists][: min(by_count, by_time)]
    if len(arms) <= len(finalists):
        of = f"{len(arms) - 1} of the {len(finalists)} finalists beside the default; {3 * len(finalists) + 3}"
        counted = f"{budget.launches} launches verify {of}"
        text = counted if by_count <= by_time else f"What is left is enough for {of} launches"
        on_event("say", {"text": f"{text} would verify all (--verify-share, --budget)."})
    before = {(d.label, d.config): d.outcome for d in done}
    rounds = Rounds(study, launch, tuple(windows), on_event, before, budget.launches, fresh=budget.fresh)
    while rounds.left(arms) < len(arms) > 2:
        arms.pop()  # the least promising
    race = _Race(study, arms, rounds, budget, known)
    stopped = race.run(clock)
    return verdict(
        race.judge(), arms, rounds.launches, study, windows=len(windows), stopped=stopped, confidence=budget.confidence
    )


@dataclass(slots=True)
class _Race:
    study: Study
    arms: Sequence[Finalist]
    rounds: Rounds
    budget: VerifyBudget
    known: Spread | None
    active: list[Finalist] = field(default_factory=list)

    def run(self, clock: Callable[[], float]) -> str:
        """Rounds until something says stop; returns why."""
        self.active = list(self.arms)
        started_s = clock()
        while not (stop := self._stop(self.rounds.number, clock() - started_s)):
            self.rounds.play(self.active)
        return stop

    def judge(self, explain: bool = True) -> Judgement:
        return judge(
            self.arms,
            self.rounds.launches,
            self.study.objective.slos,
            self.study.objective.latency_key,
            confidence=self.budget.confidence,
            worth=self.budget.worth,
            known=self.known,
            active=[a.label for a in self.active],
            seed=self.study.seed,
            explain=explain,
        )

    def _stop(self, rounds: int, seconds: float) -> str:
        """Takes arms out of the race where that is decided, and says why to end it (empty: go on)."""
        left = self.rounds.left(self.active)
        if rounds:
            found = self.judge(explain=False)
            hopes = {found.choice, max(found.arms, key=lambda label: found.arms[label].best)}
            self.rounds.below = {a.label: a.load for a in found.arms.values() if a.label in hopes and a.at_most}
            self.active = [a for a in self.active if not found.arms[a.label].failure]
            if rounds > 1:
                self._drop(found, left)
                left = self.rounds.left(self.active)
            if all(a.baseline for a in self.active) and rounds >= self.budget.minimum:
                return "no finalist is left beside the default"
            if rounds >= self.budget.minimum and _narrow(found, self.budget.width):
                return "the intervals are narrow enough"
        if left < len(self.active):
            return "the launches set aside are spent"
        costs = self.rounds.missing(self.active)  # what was launched before is free
        if rounds >= self.budget.minimum and costs and self._settled(left // len(self.active)):
            return "another round would not change the choice"
        if self.budget.seconds is not None and seconds + self._next_s(seconds) > self.budget.seconds:
            return "no further round fits into the time set aside"
        return ""

    def _settled(self, rounds: int) -> bool:
        """Whether so many more rounds would leave the choice what it is: it is proven, or nothing is and they would not
        prove what the cheapest finalist showed, if all differs as before. What launches differ by is known by then, and
        what windows differ by, which most intervals are made of, is no less after another round."""
        found = self.judge()
        if found.reason != "nothing-proven":
            return found.reason not in ("default-unmeasured", "once")
        hope = found.power
        return hope is None or hope.rounds is None or bool(hope.windows) or hope.rounds > rounds

    def _next_s(self, seconds: float) -> float:
        """How long the next round takes, if its launches take what those of the last ``seconds`` did."""
        each = seconds / self.rounds.made if self.rounds.made else self.budget.launch_s
        return each * self.rounds.missing(self.active)

    def _drop(self, found: Judgement, left: int) -> None:
        """Finalists without hope leave the race, and the least promising ones where not all can be launched again."""
        self.active = [a for a in self.active if a.baseline or found.arms[a.label].best >= LITTLE_HOPE]
        while left < len(self.active) > 2:
            self.active.remove(
                max((a for a in self.active if not a.baseline), key=lambda a: found.arms[a.label].cost[0])
            )


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
