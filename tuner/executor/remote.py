"""The executor ``ray``: trials on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tuner.engines.protocol import Cancelled, LaunchFailed, Teardown
from tuner.errors import EnvironmentFault
from tuner.executor import cluster
from tuner.executor.desk import Desk
from tuner.executor.local import tell_launch
from tuner.executor.protocol import Ended, Job, NodeLost, Place, Rig
from tuner.executor.seat import Kit, Report
from tuner.executor.seats import LEAVE_S, Held, Seats
from tuner.executor.stopwatch import Stopwatch
from tuner.load.trace import Trace
from tuner.study.evaluate import Bench, unbeaten
from tuner.study.guard import FILE as QUALITY
from tuner.study.guard import QualityGuard
from tuner.study.outcome import GPU_BUSY, Aborted, Boot, Infeasible, Outcome, Step

#: The node, not the configuration, is at fault: another node is tried.
NODE_CAUSES = frozenset({"no-gpu", "too-few-gpus", "gpu-broken"})
_NO_NODE_S = 300.0  # an autoscaler may bring the node that a trial waits for


@dataclass(slots=True)
class _Run:
    """A job on its way. ``lost`` says what befell it before; ``result`` resolves to its report; ``since_s`` is when
    there was last a node for it, ``waits`` that its absence was told."""

    job: Job
    seat: Held
    result: Any = None
    since_s: float = field(default_factory=time.monotonic)
    lost: str = ""
    waits: bool = False

    @property
    def next(self) -> Any:
        """What it waits for: its seat, then its report."""
        return self.seat.arrived if self.seat.place is None else self.result


class RayExecutor:
    """Implements :class:`tuner.executor.protocol.Executor`. Everything happens in the caller's thread, while it waits.

    ``study.parallel`` bounds the trials at once (0: as many as the cluster carries).
    """

    def __init__(self, bench: Bench) -> None:
        """Raises ``EnvironmentFault`` where there is no cluster."""
        self._stopwatch = Stopwatch(bench)
        self._bench = bench = self._stopwatch.bench
        self._study = bench.study
        self.left_over: tuple[str, ...] = ()
        self._ray = cluster.connect(self._study.executor.address)
        guard = bench.quality if isinstance(bench.quality, QualityGuard) else None
        races = bench.beaten is not unbeaten
        kit = Kit(self._study, guard.prompts if guard else None, races, self._study.executor.store)
        self._watch = cluster.Watch(self._study.hardware.rows)
        self._desk = Desk(self._ray, bench)
        self._seats = Seats(self._ray, kit, self._desk.line, self._watch, bench.engine.emulated)
        self._runs: dict[int, _Run] = {}
        self._shown: Any = None
        self._closed = False
        self._show()

    def room(self) -> bool:
        """See the protocol."""
        if self._study.parallel and len(self._runs) >= self._study.parallel:
            return False
        return self._seats.room()

    def submit(self, job: Job) -> None:
        """See the protocol."""
        self._start(_Run(job, self._seats.take(job)))

    def wait(self, timeout_s: float) -> list[Ended]:
        """See the protocol."""
        self._desk.listen([run.next for run in self._runs.values()], timeout_s)
        ended = [end for run in list(self._runs.values()) if (end := self._looked_at(run))]
        if ended:
            self._desk.catch_up()
        for end in ended:
            del self._runs[end.job.number]
        self._show()
        return ended

    @contextmanager
    def rig(self, job: Job) -> Iterator[Rig]:
        """See the protocol."""
        run = _Run(job, self._seats.take(job))
        try:
            place, seat = self._seated(run), run.seat
            self._show()
            tell_launch(self._bench.of_trial(job.number), job, node=place.node)
            self._stopwatch.start(job.number)
            yield RayRig(told(self.call(run, seat.actor.open.remote(job, place, _beside(job)))), place, self, run)
        except LaunchFailed as failure:
            run.seat.shunned = _busy(failure.outcome)
            raise
        finally:
            seat = run.seat
            if seat in self._seats and seat.place:
                with contextlib.suppress(NodeLost):
                    report: Report = self.call(run, seat.actor.shut.remote())
                    self.left_over += report.teardown.left_over
                    report.bring_home(job.folder)
            seat.job = None
            self._show()

    def seconds(self, number: int) -> float:
        """See the protocol."""
        return self._stopwatch.seconds(number)

    def close(self, at_once: bool = False) -> None:
        """See the protocol."""
        if self._closed:
            return
        self._closed = True
        if self._watch.lost:
            return
        results = [run.result for run in self._runs.values() if run.result is not None]
        if results and not at_once:
            self._desk.interrupt()
            with contextlib.suppress(Exception):
                self._ray.wait(results, num_returns=len(results), timeout=LEAVE_S)
        self._seats.close()
        self._desk.close()

    def call(self, run: _Run, ref: Any) -> Any:
        """What ``ref`` resolves to, listening meanwhile. Raises NodeLost."""
        while not self._desk.is_there(ref):
            self._desk.listen([ref], 0.5)
        try:
            return self._desk.get(ref)
        except NodeLost as lost:
            why = self._why(run.seat, str(lost))
            self._seats.release(run.seat)
            raise NodeLost(why) from None

    def _seated(self, run: _Run) -> Place:
        """Waits for the run's seat. Raises NodeLost, and Cancelled."""
        while not (run.seat.place or self._desk.is_there(run.seat.arrived)):
            if self._bench.cancel.is_set():
                self._seats.release(run.seat)
                raise Cancelled
            self._patience(run)
            self._desk.listen([run.seat.arrived], 0.5)
            run.seat = self._seats.retake(run.seat)
        return run.seat.place or self._arrived(run.seat, self.call(run, run.seat.arrived))

    def _start(self, run: _Run) -> None:
        self._runs[run.job.number] = run
        if run.seat.place is not None:
            self._begin(run, run.seat.place)

    def _arrived(self, seat: Held, where: tuple[str, Place]) -> Place:
        seat.node_id, seat.place = where
        return seat.place

    def _begin(self, run: _Run, place: Place) -> None:
        """The seat has its GPUs: the trial starts."""
        self._stopwatch.start(run.job.number)
        tell_launch(self._bench.of_trial(run.job.number), run.job, node=place.node)
        run.result = run.seat.actor.trial.remote(run.job, place, _beside(run.job))

    def _looked_at(self, run: _Run) -> Ended | None:
        """How the run ended, with what it raised; None while it goes on."""
        try:
            return self._end_of(run)
        except Exception as error:
            run.seat.job = None
            return Ended(run.job, None, Teardown(), run.seat.place or Place(), self.seconds(run.job.number), error)

    def _end_of(self, run: _Run) -> Ended | None:
        """How the run ended; None while it goes on (a lost one starts again here)."""
        seat = run.seat
        if seat.place is None and self._bench.cancel.is_set():
            self._seats.release(seat)
            return Ended(run.job, None, Teardown(), Place(), 0.0)
        if not self._desk.is_there(run.next):
            self._patience(run)
            run.seat = seat if seat.place else self._seats.retake(seat)
            if run.seat is not seat and run.seat.place:
                self._begin(run, run.seat.place)
            return None
        try:
            if seat.place is None:
                self._begin(run, self._arrived(seat, self._desk.get(seat.arrived)))
                return None
            report: Report = self._desk.get(run.result)
        except NodeLost as lost:
            return self._again(run, self._why(seat, str(lost)))
        outcome, place = report.outcome, seat.place
        if isinstance(outcome, Infeasible) and outcome.cause in NODE_CAUSES and not run.lost and self._others(run):
            self._watch.avoid.add(seat.node_id)
            return self._again(run, f"{place.node} is left alone from now on: {outcome.message}")
        report.bring_home(run.job.folder)
        seat.job, seat.shunned = None, _busy(outcome)
        return Ended(run.job, outcome, report.teardown, place, self.seconds(run.job.number))

    def _again(self, run: _Run, why: str) -> Ended | None:
        """Once more on another node, and said; the second time it ends as Aborted."""
        place = run.seat.place or Place()
        self._seats.release(run.seat)
        if run.lost or self._bench.cancel.is_set():
            reason = f"its node was lost twice: {run.lost}; {why}" if run.lost else "interrupted"
            return Ended(run.job, Aborted(reason), Teardown(), place, self.seconds(run.job.number))
        self._bench.of_trial(run.job.number).on_event("lost", {"node": place.node, "why": why})
        self._start(_Run(run.job, self._seats.take(run.job), lost=why))
        return None

    def _why(self, seat: Held, said: str) -> str:
        """Why a seat is gone, in words: its node's end if that is known, else what Ray says."""
        node = next((node for node in self._watch.nodes(fresh=True) if node.id == seat.node_id), None)
        name = seat.place.node if seat.place else "a node"
        if node is not None and not node.alive:
            return f"{name} is gone{': ' + node.why_gone if node.why_gone else ''}"
        return f"the worker on {name} ended: {said}"

    def _others(self, run: _Run) -> bool:
        """Whether another node could take the run."""
        return any(n.gpus >= run.job.config.gpus for n in self._watch.usable() if n.id != run.seat.node_id)

    def _patience(self, run: _Run) -> None:
        """Raises ``EnvironmentFault`` where no node can ever take the run, and none has come for minutes."""
        need, usable = run.job.config.gpus, self._watch.usable()
        if run.seat.place is not None or any(node.gpus >= need for node in usable):
            run.since_s, run.waits = time.monotonic(), False
            return
        most = max((node.gpus for node in usable), default=0)
        text = f"trial {run.job.number} wants {need} GPUs on one node; the largest has {most}"
        if time.monotonic() - run.since_s > _NO_NODE_S:
            fix = "Add such a node and run the same command again: everything measured is kept"
            raise EnvironmentFault(text, fix=fix)
        if not run.waits:
            run.waits = True
            self._bench.of_trial(run.job.number).on_event("waiting", {"for": text})

    def _show(self) -> None:
        """Tells the view of the nodes, when something changed."""
        rows = [
            {"name": n.name, "device": n.device, "gpus": n.gpus, "alive": n.alive, "trials": self._seats.on(n)}
            for n in self._watch.nodes()
        ]
        if rows != self._shown:
            self._shown = rows
            self._bench.on_event("nodes", {"nodes": rows})


def _busy(outcome: Outcome | None) -> bool:
    """Whether somebody else was on the GPUs."""
    return isinstance(outcome, Infeasible) and outcome.cause == GPU_BUSY


def _beside(job: Job) -> dict[str, bytes]:
    """The default's answers, where the study has them."""
    path = job.folder.parents[1] / QUALITY
    return {QUALITY: path.read_bytes()} if path.exists() else {}


@dataclass(slots=True)
class RayRig:
    """Implements :class:`tuner.executor.protocol.Rig` over a seat."""

    boot: Boot
    place: Place
    executor: RayExecutor
    run: _Run

    def measure(self, load: float, trace: Trace, prefix: str) -> Step:
        """See the protocol."""
        return told(self.executor.call(self.run, self.run.seat.actor.measure.remote(load, trace, prefix)))


def told(answer: Any) -> Any:
    """A seat's answer: raises what it stands for."""
    if isinstance(answer, Infeasible):
        if answer.cause in NODE_CAUSES:
            raise NodeLost(answer.message)
        raise LaunchFailed(answer)
    if answer is None:
        raise Cancelled
    return answer
