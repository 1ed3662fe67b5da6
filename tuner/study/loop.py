"""The study loop: ask, launch, measure, tell; the product on one screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tuner.engines.protocol import Cancelled, OnEvent
from tuner.errors import EnvironmentFault
from tuner.executor.protocol import Ended, Executor, Job
from tuner.pareto.front import searched
from tuner.study.outcome import ENVIRONMENT_CAUSES, IN_A_ROW, UNTRIED, Aborted, Infeasible, Measured, Outcome
from tuner.study.queue import Proposal, Queue
from tuner.study.store import Store
from tuner.study.workload import Workload


class Recorder(Protocol):
    """Who is told of every finished trial (MLflow); must not block or raise."""

    def trial_finished(self, number: int) -> None: ...


@dataclass(slots=True)
class Loop:
    """One session of a study. ``stop_reason`` is asked before each proposal, with the number of running trials, and
    answers in words when to end; while some run that is not its last word."""

    executor: Executor
    store: Store
    queue: Queue
    workload: Workload
    recorder: Recorder
    on_event: OnEvent
    stop_reason: Callable[[int], str]
    cancel: threading.Event
    failures: list[str] = field(default_factory=list)  # how each launch of this session crashed; empty where not
    fault: Exception | None = None  # what this session ends with
    in_a_row: int = 0  # of the launches that ended last, those that failed by the machine's fault

    def run(self) -> str:
        """Runs trials until something says stop; returns why it ended. Trials end one by one, told by this thread."""
        running: dict[int, Proposal] = {}
        ended, over, dry = "", "", False  # dry: no further launch is worth it (over), or left, until a trial has ended
        while True:
            # where nothing runs, one trial is handed over even without room: the executor waits for it, and says so
            while not (self.fault or ended or dry) and (not running or self._room()):
                if running and self.in_a_row >= IN_A_ROW:
                    break  # whether the machine serves at all is told by what runs
                with self._held(running):
                    over = "interrupted" if self.cancel.is_set() else self.stop_reason(len(running))
                    try:
                        proposal = None if over else self.queue.propose()
                    except Cancelled:  # while a user's model was asked
                        proposal, over = None, "interrupted"
                    if proposal is None:
                        dry = True
                        break
                    proposal.alone = not running
                    self.executor.submit(self._job(proposal))
                    running[proposal.number] = proposal
            if not running and self.fault:
                raise self.fault
            if not running:
                return ended or over or self.queue.nothing_new
            for end in self.executor.wait(0.5):
                dry = False
                with self._held(running):
                    ended = self._conclude(running.pop(end.job.number), end, alone=not running) or ended

    def _room(self) -> bool:
        return self.executor.room() and not self.queue.waits()

    @contextmanager
    def _held(self, running: Mapping[int, Proposal]) -> Iterator[None]:
        """What is raised ends the session, but only when every trial that runs has ended and is kept."""
        try:
            yield
        except Exception as error:
            if running and not self.fault:
                self.on_event("say", {"text": f"The study ends when the running trials have ended: {error!r}"})
            self.fault = self.fault or error

    def _job(self, proposal: Proposal) -> Job:
        windows = self.workload.climbed
        window = windows[proposal.repeat % len(windows)]
        folder = self.store.trial_folder(proposal.number)
        return Job(proposal.number, proposal.config, folder, window, proposal.baseline, proposal.why)

    def _conclude(self, proposal: Proposal, end: Ended, alone: bool) -> str:
        """Writes, tells and logs one trial's end; returns why the study must end with it, if it must. ``alone``: no
        other trial runs."""
        outcome, teardown = end.outcome, end.teardown
        if end.error is not None:
            raise end.error
        if outcome is None:
            self.queue.withdraw(proposal)
            return "interrupted"
        fault, again = None, isinstance(outcome, Aborted) and outcome.reason == "interrupted"
        if isinstance(outcome, Infeasible):
            outcome, fault = self._whose(proposal, outcome, alone)
            again = outcome.transient
        else:
            self.in_a_row = 0
        notes = {"teardown_s": teardown.seconds, "killed": teardown.killed, "alone": proposal.alone}
        self.store.end_trial(proposal.number, outcome, end.seconds, again=again, **notes, **end.place.notes())
        self.queue.tell(proposal, outcome, again)
        self.recorder.trial_finished(proposal.number)
        told = {"trial": proposal.number, "outcome": outcome, "baseline": proposal.baseline, "role": "search"}
        self.on_event("trial", told)
        nothing_left(proposal.number, teardown.left_over)
        if fault:
            raise fault
        return self._hopeless(outcome)

    def _hopeless(self, outcome: Outcome) -> str:
        """Why no further launch is worth its cost, where all of this session failed, and in the very same words, and
        none ever served."""
        if isinstance(outcome, Infeasible):
            if outcome.machines:
                return ""
            self.failures.append(outcome.message if outcome.cause in CRASHES | ENVIRONMENT_CAUSES else "")
        elif not isinstance(outcome, Aborted):
            self.failures.append("")
        if len(self.failures) != ALIKE or not self.failures[0] or len(set(self.failures)) > 1:
            return ""
        if not any(isinstance(t.outcome, Measured) for t in self.store.trials()):
            return f"{ALIKE} launches failed in the same way and none served: {self.failures[0]}"
        return ""

    def _whose(
        self, proposal: Proposal, outcome: Infeasible, alone: bool
    ) -> tuple[Infeasible, EnvironmentFault | None]:
        """Whose fault a failure is: transient, so that its config is launched again, where it is the machine's or has
        passed for all that is known; a config that failed so before is at fault itself. And what the session ends
        with, where no other launch would fare better: not while another trial runs, which may serve."""
        self.in_a_row = self.in_a_row + 1 if outcome.machines else 0
        lasts = outcome.transient and not outcome.machines and self._failed_before(proposal.config.hash)
        unfit = outcome.cause in ENVIRONMENT_CAUSES or (lasts and outcome.cause in UNTRIED)
        if (alone and self.in_a_row >= IN_A_ROW) or (proposal.baseline and unfit):
            fault = unservable(outcome, self.store.trial_folder(proposal.number))
            return replace(outcome, transient=True), fault
        return (replace(outcome, transient=False) if lasts else outcome), None

    def _failed_before(self, key: str) -> bool:
        """Whether the search saw a passing failure of this config that was not the machine's."""
        earlier = [t.outcome for t in searched(self.store.trials()) if t.config.hash == key]
        return any(isinstance(o, Infeasible) and o.transient and not o.machines for o in earlier)


def unservable(outcome: Infeasible, folder: Path) -> EnvironmentFault:
    """What ends the study where the machine, not the configuration, made the launch in ``folder`` fail."""
    log = folder / "server.log"
    return EnvironmentFault(outcome.message, where=str(log if log.exists() else folder), fix=outcome.fix)


def nothing_left(number: int, left: Sequence[str]) -> None:
    """Raises ``EnvironmentFault`` where a trial's server left something behind: whatever is launched beside it would be
    measured wrongly."""
    if left:
        fix = "End that, and run the same command again: everything measured is kept"
        raise EnvironmentFault(f"trial {number} left something behind: {'; '.join(left)}", fix=fix)


ALIKE = 8  # launches that fail in the same words, before the study gives up
#: Failures that any configuration may meet. What does not fit, or a refusal in words, is part of the search.
CRASHES = frozenset(
    {"crash", "crash-under-load", "gpu-fault", "hang", "killed", "memory-taken", "nccl", "terminated"}
    | {"too-many-files", "too-slow-to-start", "unhealthy", "no-completions"}
)
