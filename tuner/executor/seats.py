"""The seats that the tuner holds. Ray schedules: a seat is a placement group with one bundle, so that its GPUs are on
one node, and an actor in it; it is kept for the next trial that asks for the same."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from tuner.errors import EnvironmentFault
from tuner.executor import cluster
from tuner.executor.cluster import Node, Watch
from tuner.executor.protocol import Job, Place
from tuner.executor.seat import Kit, Seat

LEAVE_S = 20.0  # a server takes that long to stop at most
_GRANT_S = 0.5  # Ray grants free resources within that


@dataclass(slots=True)
class Held:
    """``shape`` is what the seat takes of its node; ``arrived`` resolves to the node's id and the place when the actor
    is there; ``job`` is what it runs; ``shunned``: somebody outside the cluster was on its GPUs."""

    shape: dict[str, float]
    group: Any
    actor: Any
    arrived: Any
    job: Job | None = None
    node_id: str = ""
    place: Place | None = None
    asked_s: float = field(default_factory=time.monotonic)
    shunned: bool = False

    @property
    def size(self) -> float:
        """GPUs; a server without any takes a host, which counts as one."""
        return self.shape.get("GPU", 1.0)


class Seats:
    """``line`` is the actor that they report to; ``emulated``: the type of a GPU does not matter."""

    def __init__(self, ray: Any, kit: Kit, line: Any, watch: Watch, emulated: bool) -> None:
        self._ray, self._line, self._watch, self._emulated = ray, line, watch, emulated
        self._study = kit.study
        self._kit = ray.put(kit)
        self._held: list[Held] = []

    def __contains__(self, held: Held) -> bool:
        return held in self._held

    def room(self) -> bool:
        """Whether a GPU (or a host) is free that no trial of ours has or is about to get. None is while one waits for
        what others have."""
        coming = [held for held in self._held if held.job and held.place is None]
        if not all(self._granted(held) for held in coming):
            return False
        return sum(self._free(node) for node in self._watch.usable()) > sum(
            held.size for held in coming if not held.node_id
        )

    def take(self, job: Job, *, any_idle: bool = False) -> Held:
        """An idle seat of the job's shape, or a new one; idle seats of other shapes make way. Those that are shunned
        are left alone, so that Ray gives no trial their GPUs, and come last where ``any_idle`` will do. Raises
        ``EnvironmentFault`` where the job's type of GPU does not exist."""
        shape = self._shape(job)
        usable = {node.id for node in self._watch.usable()}
        idle = [held for held in self._held if held.job is None and (any_idle or not held.shunned)]
        for held in sorted(idle, key=lambda held: held.shunned):
            if held.shape == shape and held.node_id in usable:
                held.job = job
                return held
            self.release(held)
        self._held.append(self._new(shape, job))
        return self._held[-1]

    def retake(self, held: Held) -> Held:
        """For a trial whose seat still waits for its GPUs: a seat that is idle by now, if its shape is right; idle ones
        of other shapes make way. They may hold what it waits for, as after the end of a node; so may a shunned one."""
        idle = any(other.job is None for other in self._held)
        gone = held.node_id and held.node_id not in {node.id for node in self._watch.usable()}
        if held.job is None or not (idle or gone) or self._granted(held):
            return held
        job, held.job = held.job, None
        self._held.remove(held)
        self.release(held)
        return self.take(job, any_idle=True)

    def release(self, held: Held) -> None:
        """Gives the seat's GPUs back; whatever still runs there ends with it."""
        from ray.util.placement_group import remove_placement_group

        if held in self._held:
            self._held.remove(held)
        if held.place is not None and held.job is None:
            with contextlib.suppress(Exception):
                self._ray.get(held.actor.leave.remote(), timeout=LEAVE_S)
        with contextlib.suppress(Exception):
            self._ray.kill(held.actor)
        with contextlib.suppress(Exception):
            remove_placement_group(held.group)

    def close(self) -> None:
        for held in list(self._held):
            self.release(held)

    def on(self, node: Node) -> list[int]:
        """The numbers of the trials on ``node``."""
        return [held.job.number for held in self._held if held.job and held.node_id == node.id]

    def _granted(self, held: Held) -> bool:
        """Whether Ray has given the seat its GPUs."""
        from ray.util import placement_group_table

        while placement_group_table(held.group)["state"] != "CREATED":
            if time.monotonic() - held.asked_s > _GRANT_S:
                return False
            time.sleep(0.02)
        return True

    def _free(self, node: Node) -> float:
        here = sum(held.size for held in self._held if held.node_id == node.id and (held.job or held.shunned))
        if self._study.hardware.gpus:
            return node.gpus - here
        return (1.0 if node.cpus or not self._study.executor.cpus else 0.0) - here

    def _new(self, shape: dict[str, float], job: Job) -> Held:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        host = "" if job.config.gpus else self._host()
        avoid = f"!in({','.join(sorted(self._watch.avoid))})" if self._watch.avoid else ""
        where = [{"ray.io/node-id": host or avoid}] if host or avoid else None
        group = placement_group([shape], strategy="STRICT_PACK", bundle_label_selector=where)  # pyright: ignore[reportArgumentType]
        taken = {"num_cpus": shape.get("CPU", 0), "num_gpus": shape.get("GPU", 0)}
        there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = self._ray.remote(Seat).options(scheduling_strategy=there, **taken).remote(self._kit, self._line)
        return Held(shape, group, actor, actor.where.remote(), job, host)

    def _host(self) -> str:
        """The id of a node without a trial: servers on one CPU measure each other. Empty where there is none (then
        the host's lease makes the trial wait)."""
        taken = {held.node_id for held in self._held}
        return next((node.id for node in self._watch.usable() if node.id not in taken), "")

    def _shape(self, job: Job) -> dict[str, float]:
        cpus = self._study.executor.cpus
        shape: dict[str, float] = {"CPU": cpus} if cpus else {"memory": 1.0}  # a bundle cannot be empty
        if not job.config.gpus:
            return shape
        shape["GPU"] = job.config.gpus
        if kind := self._type(job.config.gpu):
            shape[f"{cluster.TYPE}{kind}"] = 0.001
        return shape

    def _type(self, wanted: str) -> str:
        """Ray's word for the type of GPU that a job must get; empty where any will do."""
        types = {node.device: node.type for node in self._watch.nodes() if node.alive and node.gpus and node.type}
        device = cluster.device(self._study, wanted)
        if device in types:
            return types[device]
        if wanted or (len(types) > 1 and not self._emulated):
            has = ", ".join(sorted(types)) or "no GPU of a known type"
            fix = "name one of them under hardware.gpu"
            if wanted:  # by a value of the search space
                fix = "Add such a node and run the same command again, or tune a space without it under another name"
            raise EnvironmentFault(f"no node has {wanted or device}; the cluster has {has}", fix=fix)
        return ""
