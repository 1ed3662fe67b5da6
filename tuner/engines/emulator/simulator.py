"""The emulated server as a pure event simulation: no process, no socket, no clock of its own.

Time is a number that the caller moves: :meth:`Simulator.run` moves it from event to event (searches, tests), the
server process moves it with the wall clock. Events are arrivals, ends of engine steps and deliveries to the client.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tuner.engines.emulator.hardware import GIB, Gpu
from tuner.engines.emulator.memory import Memory, plan
from tuner.engines.emulator.noise import Disturbance, Noise
from tuner.engines.emulator.scheduler import Batch, Job, Scheduler
from tuner.engines.emulator.settings import Settings
from tuner.engines.emulator.shape import Shape
from tuner.engines.emulator.stepcost import StepCost


class OutOfMemoryUnderLoad(Exception):
    """The GPU's memory beyond vLLM's share did not suffice for what grew under load; the text is torch's."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request to serve: seconds and tokens; ``keys`` of its full prompt blocks (equal: equal prefix)."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()
    priority: int = 0


@dataclass(slots=True)
class Served:
    """What became of one request; times in seconds on the simulator's clock. ``tokens_s`` has one entry per delivery,
    ``counts`` how many tokens it carried."""

    work: Work
    tokens_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.work.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.tokens_s[-1] - self.tokens_s[0]) / max(sum(self.counts) - 1, 1)

    @property
    def e2e_s(self) -> float:
        return self.tokens_s[-1] - self.work.arrival_s


@dataclass(frozen=True, slots=True)
class Delivery:
    """At ``at_s`` the client gets ``count`` more tokens of job ``job``; ``last`` ends the request."""

    at_s: float
    job: Job
    count: int
    last: bool


class Replica:
    """One engine core: a scheduler, its clock of steps, and what a step costs."""

    def __init__(self, simulator: Simulator, index: int) -> None:
        self.scheduler = Scheduler(
            simulator.settings,
            simulator.memory.blocks,
            simulator.shape.window,
            random.Random(f"replica-{simulator.seed}-{index}"),
        )
        self.batch: Batch | None = None
        self.steps = 0

    @property
    def load(self) -> int:
        """vLLM's own measure for balancing over data-parallel ranks: waiting counts four times."""
        return 4 * len(self.scheduler.waiting) + len(self.scheduler.running)


class Simulator:
    """A server of ``settings`` on ``gpu``. Raises ``WeightsDoNotFit`` or ``KvDoesNotFit`` when it is made, and
    :class:`OutOfMemoryUnderLoad` while it runs. Nothing is random beyond ``seed``."""

    def __init__(self, shape: Shape, settings: Settings, gpu: Gpu, seed: int = 0, noise: Noise | None = None) -> None:
        self.shape, self.settings, self.gpu, self.seed = shape, settings, gpu, seed
        self.memory: Memory = plan(shape, settings, gpu)
        self.cost = StepCost(shape, settings, gpu)
        self.disturbance = Disturbance(noise or Noise(), seed)
        self.replicas = [Replica(self, index) for index in range(settings.dp)]
        size = settings.sharing(shape)  # ranks that share experts take every step together
        self._together = {r: self.replicas[i // size * size :][:size] for i, r in enumerate(self.replicas)}
        self.prompt_tokens = self.generation_tokens = 0
        self._events: list[tuple[float, int, int, object]] = []  # time, kind, order, payload
        self._order = itertools.count()
        self._ids = itertools.count()
        self._frontend_free_s = 0.0
        self._owner: dict[int, Replica] = {}

    def submit(self, work: Work, at_s: float | None = None) -> Job:
        """Accepts a request at ``at_s`` (default: its arrival); it reaches the scheduler after the API server has
        tokenized it."""
        at = work.arrival_s if at_s is None else at_s
        job = Job(next(self._ids), work.input_tokens, max(work.output_tokens, 1), work.keys, work.priority, at)
        self._push(at + self.gpu.frontend_s + 0.25e-6 * work.input_tokens, _ARRIVE, job)
        return job

    def abort(self, job: Job) -> None:
        """Forgets ``job``: its client went away."""
        replica = self._owner.pop(job.id, None)
        if replica is None:
            job.private = -1  # still on its way to the scheduler
        elif job.generated < job.output:
            replica.scheduler.drop(job)

    @property
    def next_event_s(self) -> float:
        """When something happens next; infinity while everything rests."""
        return self._events[0][0] if self._events else math.inf

    def advance(self) -> list[Delivery]:
        """Handles the next event; returns what the client gets through it."""
        at, kind, _, payload = heapq.heappop(self._events)
        if kind == _DELIVER:
            return payload  # type: ignore[return-value]
        if kind == _ARRIVE:
            job: Job = payload  # type: ignore[assignment]
            if job.private >= 0:
                replica = min(self.replicas, key=lambda r: r.load)
                self._owner[job.id] = replica
                replica.scheduler.add(job)
                self.prompt_tokens += job.prompt
                together = self._together[replica]
                if all(one.batch is None for one in together):
                    self._start(together, at)
            return []
        self._finish(payload, at)  # type: ignore[arg-type]
        return []

    def run(self, works: Iterable[Work], until_s: float = math.inf) -> list[Served]:
        """Serves ``works`` from first arrival to last token (or to ``until_s``) in virtual time."""
        served = [Served(work) for work in works]
        jobs = {self.submit(one.work).id: one for one in served}
        while self.next_event_s < until_s:
            for delivery in self.advance():
                one = jobs[delivery.job.id]
                one.tokens_s.append(delivery.at_s)
                one.counts.append(delivery.count)
                if delivery.last:
                    one.cached_tokens, one.preemptions = delivery.job.cached, delivery.job.preemptions
        return served

    def _push(self, at_s: float, kind: int, payload: object) -> None:
        heapq.heappush(self._events, (at_s, kind, next(self._order), payload))

    def _start(self, together: list[Replica], at_s: float) -> None:
        batches = {replica: replica.scheduler.next_batch(at_s) for replica in together}
        everywhere = sum(batch.tokens for batch in batches.values())
        seconds = 0.0
        for replica, batch in batches.items():
            replica.batch = batch if batch.work else None
            if batch.work:
                replica.steps += 1
                parts = batch.prefill, batch.decodes, batch.context, batch.windowed, batch.queries
                seconds = max(seconds, self.cost.seconds(*parts, everywhere))
                self._check_memory(replica, batch)
        if seconds:
            self._push(at_s + self.disturbance.step(seconds), _STEP, together)

    def _finish(self, together: list[Replica], at_s: float) -> None:
        for replica in together:
            self._deliver(replica.scheduler.finish_batch(replica.batch) if replica.batch else [], at_s)
        self._start(together, at_s)

    def _deliver(self, made: list[tuple[Job, int]], at_s: float) -> None:
        if not made:
            return
        tokens = sum(count for _, count in made)
        self.generation_tokens += tokens
        # The API server's process handles one step's tokens after the other; past its rate it falls behind.
        begins = max(self._frontend_free_s, at_s)
        self._frontend_free_s = begins + tokens * self.gpu.token_s / self.settings.frontends
        sent = self._frontend_free_s
        deliveries = []
        for job, count in made:
            last = job.generated >= job.output
            deliveries.append(Delivery(sent, job, count, last))
            if last:
                self._owner.pop(job.id, None)
        self._push(sent, _DELIVER, deliveries)

    def _check_memory(self, replica: Replica, batch: Batch) -> None:
        """What vLLM's profiling did not see: fragmentation grows with the steps taken, and long prefills next to many
        sequences allocate more than the profile run did. It comes out of the share that vLLM was told to leave."""
        if self.gpu.is_cpu:
            return
        worn = 1 - math.exp(-replica.steps / 300)
        fullness = batch.tokens / self.settings.max_num_batched_tokens
        factor = 1 + 12 * math.log(self.disturbance.launch_factor)
        need = (0.009 * worn + 0.011 * fullness * fullness) * self.gpu.memory_bytes * factor
        if need > self.memory.slack_bytes:
            raise OutOfMemoryUnderLoad(
                f"CUDA out of memory. Tried to allocate {batch.tokens * self.shape.hidden * 14 / 2**20:.2f} MiB. GPU 0 "
                f"has a total capacity of {self.gpu.memory_bytes / GIB:.2f} GiB of which "
                f"{max(self.memory.slack_bytes - need * 0.9, 0) / 2**20:.2f} MiB is free."
            )


_ARRIVE, _STEP, _DELIVER = 0, 1, 2


def prefix_keys(
    ids: Sequence[int], block_tokens: int, input_tokens: int, block_size: int, salt: int = 0
) -> tuple[int, ...]:
    """Keys of the full KV blocks of a prompt whose leading trace blocks (``block_tokens`` tokens each) are ``ids``.

    A KV block is shared only if every trace block up to its last token is the same, so its key hashes that chain.
    """
    if not block_tokens or not len(ids):
        return ()
    chains, chain = [], salt
    for one in ids:
        chain = hash((chain, int(one)))
        chains.append(chain)
    full = min(input_tokens, len(ids) * block_tokens) // block_size
    return tuple(hash((chains[((j + 1) * block_size - 1) // block_tokens], j)) for j in range(full))
