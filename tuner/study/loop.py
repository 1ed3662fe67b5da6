"""The study loop: ask, launch, measure, tell; the product on one screen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from tuner.engines.protocol import OnEvent, Teardown
from tuner.errors import EnvironmentFault
from tuner.study.evaluate import Bench, evaluate
from tuner.study.outcome import Aborted, Infeasible, Outcome
from tuner.study.queue import Proposal, Queue
from tuner.study.store import Store
from tuner.study.workload import Workload


class Recorder(Protocol):
    """Who is told of every finished trial (MLflow); must not block or raise."""

    def trial_finished(self, number: int) -> None: ...


@dataclass(slots=True)
class Loop:
    """One session of a study. ``stop_reason`` is asked before each proposal, with the number of running trials,
    and answers in words when to end."""

    bench: Bench
    store: Store
    queue: Queue
    workload: Workload
    recorder: Recorder
    on_event: OnEvent
    stop_reason: Callable[[int], str]
    gpus: tuple[int, ...] = ()
    _busy: set[int] = field(default_factory=set)

    def run(self) -> str:
        """Runs trials until something says stop; returns why it ended. Trials end one by one, told by this thread."""
        parallel = self.bench.study.parallel
        waiting: Proposal | None = None
        running: dict[Future[tuple[Outcome, Teardown]], Proposal] = {}
        ended = ""
        with ThreadPoolExecutor(parallel, thread_name_prefix="trial") as pool:
            while True:
                while len(running) < parallel and not ended:
                    ended = "interrupted" if self.bench.cancel.is_set() else self.stop_reason(len(running))
                    waiting = None if ended else waiting or self.queue.propose()
                    if waiting is None:
                        ended = ended or "every configuration of the space has been tried"
                        break
                    if not self._fits(waiting, bool(running)):
                        break
                    running[pool.submit(self._evaluate, waiting)] = waiting
                    waiting = None
                if not running:
                    break
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    ended = self._conclude(running.pop(future), future) or ended
        if waiting is not None:
            self.queue.withdraw(waiting)
        return ended

    def _fits(self, proposal: Proposal, others: bool) -> bool:
        """Leases GPUs inside this study; False where it must wait for a running trial to give some back."""
        need = proposal.config.gpus
        free = [gpu for gpu in self.gpus if gpu not in self._busy]
        if need > len(self.gpus):
            raise EnvironmentFault(f"a configuration wants {need} GPUs, the study has {len(self.gpus)}")
        if need > len(free) or (need == 0 and others):
            return False
        proposal.gpus = tuple(free[:need])
        self._busy |= set(proposal.gpus)
        return True

    def _evaluate(self, proposal: Proposal) -> tuple[Outcome, Teardown]:
        windows = self.workload.search
        bench = self.bench.of_trial(proposal.number)
        bench.on_event("launch", {"config": proposal.config, "baseline": proposal.baseline, "why": proposal.why})
        folder = self.store.trial_folder(proposal.number)
        return evaluate(bench, proposal.config, folder, proposal.gpus, windows[proposal.repeat % len(windows)])

    def _conclude(self, proposal: Proposal, future: Future[tuple[Outcome, Teardown]]) -> str:
        """Writes, tells and logs one trial's end; returns why the study must end with it, if it must."""
        outcome, teardown = future.result()
        self._busy -= set(proposal.gpus)
        again = self._again(proposal, outcome)
        self.store.end_trial(proposal.number, outcome, teardown_s=teardown.seconds, killed=teardown.killed, again=again)
        self.queue.tell(proposal, outcome, again)
        self.recorder.trial_finished(proposal.number)
        self.on_event("trial", {"trial": proposal.number, "outcome": outcome, "baseline": proposal.baseline})
        if teardown.left_over:
            return f"trial {proposal.number} left something behind: {'; '.join(teardown.left_over)}"
        if isinstance(outcome, Infeasible) and proposal.baseline and outcome.cause in ENVIRONMENT_CAUSES:
            raise EnvironmentFault(
                outcome.message, where=str(self.store.trial_folder(proposal.number) / "server.log"), fix=outcome.fix
            )
        return ""

    def _again(self, proposal: Proposal, outcome: Outcome) -> bool:
        """Whether the same config is to be launched once more: after an interrupt, and once after a passing failure."""
        if isinstance(outcome, Aborted):
            return outcome.reason == "interrupted"
        return isinstance(outcome, Infeasible) and outcome.transient and proposal.repeat == 0


#: What no other configuration can cure: the study ends with exit code 4 when the engine's own default meets it.
ENVIRONMENT_CAUSES = frozenset(
    {"no-gpu", "driver-too-old", "model-not-found", "model-not-allowed", "missing-dependency", "disk-full"}
)


def cancel_on(event: threading.Event) -> Callable[[int, object], None]:
    """A signal handler that sets ``event``; a second signal is not swallowed (it raises KeyboardInterrupt)."""

    def handle(_signal: int, _frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    return handle
