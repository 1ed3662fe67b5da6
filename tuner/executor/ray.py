"""The executor ``ray``: trials on the nodes of a Ray cluster.

Ray schedules: a seat is a placement group with one bundle, so that its GPUs are on one node, and an actor in it.
Seats are kept for the next trial that asks for the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.engines.protocol import Cancelled, LaunchFailed, Teardown
from tuner.errors import EnvironmentFault
from tuner.executor import cluster, parcel
from tuner.executor.cluster import Node
from tuner.executor.line import Line
from tuner.executor.local import tell_launch
from tuner.executor.protocol import Ended, Job, NodeLost, Place, Rig
from tuner.executor.seat import Kit, Report, Seat
from tuner.load.trace import Trace
from tuner.study.evaluate import Bench, unbeaten
from tuner.study.guard import FILE as QUALITY
from tuner.study.guard import QualityGuard
from tuner.study.outcome import Aborted, Boot, Infeasible, Step

#: The node, not the configuration, is at fault: another node is tried.
NODE_CAUSES = frozenset({"no-gpu", "too-few-gpus", "gpu-broken"})
_LOOK_S = 1.0  # how old what we know of the nodes may be
_NO_NODE_S = 300.0  # an autoscaler may bring the node that a trial waits for
_LEAVE_S = 20.0  # a server takes that long to stop at most


@dataclass(slots=True)
class _Seat:
    """``shape`` is what it holds; ``arrived`` resolves when it has it, to the node's id and the place."""

    shape: dict[str, float]
    group: Any
    actor: Any
    arrived: Any
    node_id: str = ""
    place: Place | None = None
    job: Job | None = None


@dataclass(slots=True)
class _Run:
    """A job on its way. ``lost`` says what befell it before; ``result`` resolves to its report."""

    job: Job
    seat: _Seat
    result: Any = None
    since_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    lost: str = ""


class RayExecutor:
    """Implements :class:`tuner.executor.protocol.Executor`. Everything happens in the caller's thread, while it waits.

    ``study.parallel`` bounds the trials at once (0: as many as the cluster carries).
    """

    def __init__(self, bench: Bench) -> None:
        """Raises ``EnvironmentFault`` where there is no cluster."""
        self._bench, self._study = bench, bench.study
        self._spec = bench.study.executor
        self._ray = cluster.connect(self._spec.address)
        guard = bench.quality if isinstance(bench.quality, QualityGuard) else None
        kit = Kit(self._study, guard.prompts if guard else None, bench.beaten is not unbeaten, self._spec.store)
        self._kit = self._ray.put(kit)
        self._line = self._on_this_node(Line).remote()
        self._news = self._line.take.remote()
        self._seats: list[_Seat] = []
        self._runs: dict[int, _Run] = {}
        self._avoid: set[str] = set()
        self._nodes: list[Node] = []
        self._looked_s = 0.0
        self._cancelled = self._closed = False
        self._shown: Any = None
        self._look()

    def room(self) -> bool:
        """See the protocol."""
        if any(run.seat.place is None for run in self._runs.values()):
            return False
        if self._study.parallel and len(self._runs) >= self._study.parallel:
            return False
        return any(self._free(node) > 0 for node in self._look() if node.alive and node.id not in self._avoid)

    def submit(self, job: Job) -> None:
        """See the protocol."""
        self._start(_Run(job, self._seat(job)))

    def wait(self, timeout_s: float) -> list[Ended]:
        """See the protocol."""
        ended = []
        self._listen([ref for run in self._runs.values() for ref in self._refs(run)], timeout_s)
        for run in list(self._runs.values()):
            if end := self._end_of(run):
                del self._runs[run.job.number]
                ended.append(end)
        self._look()
        return ended

    @contextmanager
    def rig(self, job: Job) -> Iterator[Rig]:
        """See the protocol."""
        run = _Run(job, self._seat(job))
        try:
            place = self._arrive(run)
            boot = self._told(self._call(run, run.seat.actor.open.remote(job, place)))
            yield RayRig(boot, place, self, run)
        finally:
            if run.seat in self._seats:
                with contextlib.suppress(NodeLost):
                    self._bring_home(run, self._call(run, run.seat.actor.shut.remote()))
            run.seat.job = None

    def close(self) -> None:
        """See the protocol."""
        if self._closed:
            return
        self._closed = True
        if self._runs:
            self._interrupt()
            with contextlib.suppress(Exception):
                self._ray.wait(
                    [run.result for run in self._runs.values()], num_returns=len(self._runs), timeout=_LEAVE_S
                )
        for seat in list(self._seats):
            self._release(seat)
        self._ray.kill(self._line)

    # starting

    def _start(self, run: _Run) -> None:
        self._runs[run.job.number] = run
        run.since_s = time.monotonic()
        if run.seat.place is not None:
            self._begin(run)

    def _begin(self, run: _Run) -> None:
        """The seat has its GPUs: the trial starts."""
        seat, job = run.seat, run.job
        assert seat.place is not None
        run.started_s = time.time()
        tell_launch(self._bench.of_trial(job.number), job, node=seat.place.node)
        study_folder = job.folder.parents[1]
        beside = {QUALITY: (study_folder / QUALITY).read_bytes()} if (study_folder / QUALITY).exists() else {}
        run.result = seat.actor.trial.remote(job, seat.place, beside)

    def _seat(self, job: Job) -> _Seat:
        """An idle seat of the job's shape, or a new one; idle seats of other shapes make way."""
        shape = self._shape(job)
        alive = {node.id for node in self._look() if node.alive and node.id not in self._avoid}
        for seat in [seat for seat in self._seats if seat.job is None]:
            if seat.shape == shape and seat.node_id in alive:
                seat.job = job
                return seat
            self._release(seat)
        seat = self._new_seat(shape, job)
        self._seats.append(seat)
        return seat

    def _new_seat(self, shape: dict[str, float], job: Job) -> _Seat:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(self._avoid))})"}] if self._avoid else None
        group = placement_group([shape], strategy="STRICT_PACK", bundle_label_selector=elsewhere)
        held = {"num_cpus": shape.get("CPU", 0), "num_gpus": shape.get("GPU", 0)}
        there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = self._ray.remote(Seat).options(scheduling_strategy=there, **held).remote(self._kit, self._line)
        return _Seat(shape, group, actor, actor.where.remote(), job=job)

    def _shape(self, job: Job) -> dict[str, float]:
        """What a job takes of one node: its GPUs (of one type, where that matters), or the whole host."""
        from ray._raylet import IMPLICIT_RESOURCE_PREFIX

        shape: dict[str, float] = {"CPU": self._spec.cpus} if self._spec.cpus else {}
        if not job.config.gpus:
            return shape | {f"{IMPLICIT_RESOURCE_PREFIX}tuner-host": 1.0}  # every node has one of it
        shape["GPU"] = job.config.gpus
        if kind := self._type(job.config.gpu):
            shape[f"accelerator_type:{kind}"] = 0.001
        return shape

    def _type(self, wanted: str) -> str:
        """Ray's word for the type of GPU that a job must get; empty where any will do."""
        types = {node.device: node.type for node in self._look() if node.alive and node.gpus and node.type}
        device = cluster.device_of(wanted) or self._study.hardware.name
        if device in types:
            return types[device]
        if wanted or (len(types) > 1 and not self._bench.engine.emulated):
            has = ", ".join(sorted(types)) or "no GPU of a known type"
            raise EnvironmentFault(
                f"no node has {wanted or device}; the cluster has {has}",
                fix="name one of them under hardware.gpu",
            )
        return ""

    def _arrive(self, run: _Run) -> Place:
        """Waits until the run's seat has its GPUs, and says where."""
        if run.seat.place is None:
            self._seated(run.seat, self._call(run, run.seat.arrived))
        assert run.seat.place is not None
        tell_launch(self._bench.of_trial(run.job.number), run.job, node=run.seat.place.node)
        return run.seat.place

    def _seated(self, seat: _Seat, arrived: tuple[str, Place]) -> None:
        seat.node_id, seat.place = arrived

    # ending

    def _refs(self, run: _Run) -> list[Any]:
        return [run.seat.arrived if run.seat.place is None else run.result]

    def _end_of(self, run: _Run) -> Ended | None:
        """How the run ended; None while it goes on (a lost one starts again here)."""
        if run.seat.place is None and self._bench.cancel.is_set():
            self._release(run.seat)
            return Ended(run.job, None, Teardown(), Place(), time.time())
        (ref,) = self._refs(run)
        if not self._ray.wait([ref], timeout=0)[0]:
            self._patience(run)
            return None
        try:
            if run.seat.place is None:
                self._seated(run.seat, self._get(ref))
                self._begin(run)
                return None
            report: Report = self._get(ref)
        except NodeLost as lost:
            return self._again(run, self._why(run.seat, str(lost)))
        place = run.seat.place
        outcome = report.outcome
        if isinstance(outcome, Infeasible) and outcome.cause in NODE_CAUSES and not run.lost and self._others(run):
            self._avoid.add(run.seat.node_id)
            return self._again(run, f"{place.node} is left alone from now on: {outcome.message}")
        self._bring_home(run, report)
        run.seat.job = None
        return Ended(run.job, outcome, report.teardown, place, run.started_s)

    def _again(self, run: _Run, why: str) -> Ended | None:
        """Once more on another node, and said; the second time it ends as Aborted."""
        place = run.seat.place or Place()
        self._release(run.seat)
        if run.lost:
            reason = f"its node was lost twice: {run.lost}; {why}"
            return Ended(run.job, Aborted(reason), Teardown(), place, run.started_s or time.time())
        if self._bench.cancel.is_set():
            return Ended(run.job, Aborted("interrupted"), Teardown(), place, run.started_s or time.time())
        run.lost, run.result, run.started_s = why, None, 0.0
        self._bench.of_trial(run.job.number).on_event("lost", {"node": place.node, "why": why})
        run.seat = self._seat(run.job)
        self._start(run)
        return None

    def _bring_home(self, run: _Run, report: Report) -> None:
        parcel.unpack(report.files, run.job.folder)
        study_folder = run.job.folder.parents[1]
        for name, content in report.beside.items():
            path: Path = study_folder / name
            if name.endswith(".jsonl"):
                with path.open("ab") as file:
                    file.write(content)
            elif not path.exists():
                path.write_bytes(content)

    def _release(self, seat: _Seat) -> None:
        """Gives the seat's GPUs back; whatever still runs there ends with it."""
        from ray.util.placement_group import remove_placement_group

        if seat in self._seats:
            self._seats.remove(seat)
        if seat.place is not None and seat.job is None:
            with contextlib.suppress(Exception):
                self._ray.get(seat.actor.leave.remote(), timeout=_LEAVE_S)
        with contextlib.suppress(Exception):
            self._ray.kill(seat.actor)
        with contextlib.suppress(Exception):
            remove_placement_group(seat.group)

    # Ray

    def _listen(self, refs: Sequence[Any], timeout_s: float) -> None:
        """Passes on what the nodes say until one of ``refs`` is there or the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._bench.cancel.is_set():
                self._interrupt()
            left_s = deadline - time.monotonic()
            wanted = [self._news, *refs]
            self._ray.wait(wanted, timeout=max(0.0, min(left_s, 0.5)))
            there, _ = self._ray.wait(wanted, num_returns=len(wanted), timeout=0)
            if self._news in there:
                self._hear(self._ray.get(self._news))
                self._news = self._line.take.remote()
            if set(there) & set(refs) or left_s <= 0 or (self._bench.cancel.is_set() and not refs):
                return

    def _hear(self, said: Sequence[tuple[int, str, Any, int]]) -> None:
        for trial, name, data, question in said:
            if question:
                self._line.answer.remote(question, self._bench.beaten(data) if name == "beaten" else None)
            else:
                self._bench.of_trial(trial).on_event(name, data)

    def _interrupt(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._line.cancel.remote()

    def _call(self, run: _Run, ref: Any) -> Any:
        """What ``ref`` resolves to, listening meanwhile. Raises NodeLost, and Cancelled while nothing is launched."""
        while not self._ray.wait([ref], timeout=0)[0]:
            if ref is run.seat.arrived and self._bench.cancel.is_set():
                self._release(run.seat)
                raise Cancelled
            self._patience(run)
            self._listen([ref], 0.5)
        try:
            return self._get(ref)
        except NodeLost as lost:
            why = self._why(run.seat, str(lost))
            self._release(run.seat)
            raise NodeLost(why) from None

    def _told(self, answer: Any) -> Any:
        """An answer of a seat: raises what it stands for."""
        if isinstance(answer, Infeasible):
            if answer.cause in NODE_CAUSES:
                raise NodeLost(answer.message)
            raise LaunchFailed(answer)
        if answer is None:
            raise Cancelled
        return answer

    def _get(self, ref: Any) -> Any:
        """Ray's answer; NodeLost where worker or node are gone, else what was raised there."""
        from ray import exceptions

        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None
        except (exceptions.RayActorError, exceptions.RayError) as error:
            raise NodeLost(_short(error)) from None

    def _why(self, seat: _Seat, said: str) -> str:
        """Why a seat is gone, in words: its node's end if that is known, else what Ray says."""
        self._looked_s = 0.0
        node = next((node for node in self._look() if node.id == seat.node_id), None)
        name = seat.place.node if seat.place else "a node"
        if node is not None and not node.alive:
            return f"{name} is gone{': ' + node.why_gone if node.why_gone else ''}"
        return f"the worker on {name} ended: {said}"

    # nodes

    def _look(self) -> list[Node]:
        """The nodes, at most a second old; tells the view of changes."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._looked_s, self._nodes = time.monotonic(), cluster.nodes()
        rows = [
            {"name": n.name, "device": n.device, "gpus": n.gpus, "alive": n.alive, "trials": self._on(n)}
            for n in self._nodes
        ]
        if rows != self._shown:
            self._shown = rows
            self._bench.on_event("nodes", {"nodes": rows})
        return self._nodes

    def _on(self, node: Node) -> list[int]:
        return [s.job.number for s in self._seats if s.job and s.node_id == node.id]

    def _free(self, node: Node) -> float:
        """How much of ``node`` none of our trials has: GPUs, or the host for servers without."""
        here = [seat for seat in self._seats if seat.node_id == node.id and seat.job]
        if not self._study.hardware.gpus:
            return (1.0 if node.cpus or not self._spec.cpus else 0.0) - len(here)
        return node.gpus - sum(seat.shape.get("GPU", 0) for seat in here)

    def _others(self, run: _Run) -> bool:
        """Whether another node could take the run."""
        need = run.job.config.gpus
        rest = [n for n in self._look() if n.alive and n.id not in self._avoid | {run.seat.node_id}]
        return any(node.gpus >= need for node in rest)

    def _patience(self, run: _Run) -> None:
        """Raises ``EnvironmentFault`` where no node can ever take the run, and none has come for minutes."""
        need = run.job.config.gpus
        if run.seat.place is not None or any(n.alive and n.gpus >= need for n in self._look()):
            return
        most = max((node.gpus for node in self._nodes if node.alive), default=0)
        text = f"trial {run.job.number} wants {need} GPUs on one node; the largest has {most}"
        if time.monotonic() - run.since_s > _NO_NODE_S:
            raise EnvironmentFault(text, fix="add such a node, or set hardware.gpus to what a node has")
        self._bench.of_trial(run.job.number).on_event("waiting", {"for": text})

    def _on_this_node(self, kind: type) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        return self._ray.remote(kind).options(num_cpus=0, scheduling_strategy=here)


@dataclass(slots=True)
class RayRig:
    """Implements :class:`tuner.executor.protocol.Rig` over a seat."""

    boot: Boot
    place: Place
    executor: RayExecutor
    run: _Run

    def measure(self, load: float, trace: Trace, prefix: str) -> Step:
        """See the protocol."""
        executor, run = self.executor, self.run
        return executor._told(executor._call(run, run.seat.actor.measure.remote(load, trace, prefix)))


def _short(error: Exception) -> str:
    """The telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "because" in line or "reason" in line.lower() or "preempt" in line]
    return (telling or lines or [type(error).__name__])[0][:300]
