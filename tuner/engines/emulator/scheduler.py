"""Continuous batching as vLLM V1 does it: running requests first, then waiting ones, one token budget for both.

Prefills are cut into chunks by the budget; when the KV cache is full the last request is preempted and recomputed;
speculation adds draft tokens to a decode, of which some are accepted.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from tuner.engines.emulator.blocks import BlockPool
from tuner.engines.emulator.settings import Settings


@dataclass(slots=True, eq=False)
class Job:
    """One request inside the engine. ``prompt`` and ``output`` in tokens; ``keys`` of its full prompt blocks."""

    id: int
    prompt: int
    output: int
    keys: tuple[int, ...] = ()
    priority: int = 0
    arrived_s: float = 0.0
    started_s: float = -1.0
    computed: int = 0
    generated: int = 0
    cached: int = 0
    preemptions: int = 0
    accept: float = 0.0
    private: int = 0
    held: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return self.private + len(self.held)


@dataclass(slots=True)
class Batch:
    """What one step computes: ``work`` has (job, tokens, draft tokens among them); the rest is what it costs."""

    work: list[tuple[Job, int, int]]
    prefill: list[tuple[int, int]]
    decodes: int
    context: int
    windowed: int
    queries: int

    @property
    def tokens(self) -> int:
        return self.queries + sum(chunk for chunk, _ in self.prefill)


class Scheduler:
    """One replica's queues and KV blocks."""

    def __init__(self, settings: Settings, blocks: int, window: int, rng: random.Random) -> None:
        self.s, self.window, self.rng = settings, window, rng
        self.pool = BlockPool(blocks, settings.prefix_caching)
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.preemptions = self.cache_queries = self.cache_hits = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def add(self, job: Job) -> None:
        """Queues ``job``; with the priority policy before those of a larger number."""
        if self.s.draft:
            # Requests differ in how predictable they are: a Beta distribution around the stated acceptance.
            mean = min(max(self.s.draft.accept, 0.001), 0.999)
            job.accept = self.rng.betavariate(12 * mean, 12 * (1 - mean))
        if self.s.priority:
            place = next(
                (i for i, other in enumerate(self.waiting) if other.priority > job.priority), len(self.waiting)
            )
            self.waiting.insert(place, job)
        else:
            self.waiting.append(job)

    def drop(self, job: Job) -> None:
        """Forgets ``job`` (its client went away), wherever it is."""
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        self._free(job)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def next_batch(self, now_s: float) -> Batch:
        """Chooses the next step's tokens and gives them KV blocks. An empty ``work`` means nothing can run."""
        budget, limit = self.s.max_num_batched_tokens, self.s.long_prefill_tokens
        work: list[tuple[Job, int, int]] = []
        prefill: list[tuple[int, int]] = []
        decodes = context = windowed = queries = 0
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            job = self.running[index]
            need = job.prompt + job.generated - job.computed
            drafted = 0
            if need == 1 and self.s.draft:
                drafted = self._drafted(job, budget - 1)
            count = min(need, limit) if limit and need > limit else need
            count = min(count, budget) + drafted
            while not self._grow(job, job.computed + count):
                victim = self._victim()
                preempted = True
                self._preempt(victim)
                if victim is job:
                    break
                taken = next((i for i, (other, _, _) in enumerate(work) if other is victim), None)
                if taken is not None:  # only the priority policy preempts one that is already in this step
                    _, given, _ = work.pop(taken)
                    budget += given
                    index -= 1
            else:
                work.append((job, count, drafted))
                budget -= count
                index += 1
                continue
            break
        if not preempted:
            budget = self._admit(now_s, budget, limit, work)
        for job, count, drafted in work:
            before = job.computed
            if job.prompt + job.generated - before == 1:
                decodes += 1
                context += before
                windowed += min(before, self.window)
                queries += 1 + drafted
            else:
                prefill.append((count, before))
        return Batch(work, prefill, decodes, context, windowed, queries)

    def _admit(self, now_s: float, budget: int, limit: int, work: list[tuple[Job, int, int]]) -> int:
        while self.waiting and budget > 0 and len(self.running) < self.s.max_num_seqs:
            job = self.waiting[0]
            total = job.prompt + job.generated
            size = self.s.block_size
            hits = min(self.pool.hits(job.keys), (total - 1) // size)
            need = total - hits * size
            count = min(need, limit) if limit else need
            if count > budget:
                if not self.s.chunked_prefill:
                    break
                count = budget
            keys = job.keys[:hits]
            fresh = -(-(hits * size + count) // size) - hits
            if fresh + self.pool.idle_among(keys) > self.pool.free:
                break
            self.waiting.popleft()
            self.pool.hold(keys)
            self.pool.take(fresh)
            job.held = list(keys)
            job.private, job.computed = fresh, hits * size
            if job.started_s < 0:
                job.started_s, job.cached = now_s, hits * size
                self.cache_queries += job.prompt
                self.cache_hits += hits * size
            self.running.append(job)
            work.append((job, count, 0))
            budget -= count
        return budget

    def finish_batch(self, batch: Batch) -> list[tuple[Job, int]]:
        """The step is over: KV is computed, tokens are sampled. Returns (job, new tokens) and frees who is done."""
        made: list[tuple[Job, int]] = []
        size = self.s.block_size
        done = False
        for job, count, drafted in batch.work:
            if job.private < 0:  # dropped while the step ran
                continue
            job.computed += count - drafted
            if job.keys and job.computed <= job.prompt + size:
                self._publish(job, size)
            if job.computed < job.prompt + job.generated:
                continue
            new = 1
            if drafted:
                new += self._accepted(job, drafted)
                job.computed += new - 1
            new = min(new, job.output - job.generated)
            job.generated += new
            made.append((job, new))
            done = done or job.generated >= job.output
        if done:
            for job, _ in made:
                if job.generated >= job.output:
                    self.running.remove(job)
                    self._free(job)
        return made

    def _publish(self, job: Job, size: int) -> None:
        full = min(job.computed // size, len(job.keys))
        for index in range(len(job.held), full):
            if not self.pool.publish(job.keys[index]):
                break
            job.held.append(job.keys[index])
            job.private -= 1

    def _grow(self, job: Job, tokens: int) -> bool:
        need = -(-tokens // self.s.block_size) - job.blocks
        if need <= 0:
            return True
        if not self.pool.take(need):
            return False
        job.private += need
        return True

    def _victim(self) -> Job:
        if self.s.priority:
            return max(self.running, key=lambda job: (job.priority, job.arrived_s))
        return self.running[-1]

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self.pool.release(job.private, job.held)
        job.private, job.held, job.computed = 0, [], 0
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def _free(self, job: Job) -> None:
        if job.private >= 0:
            self.pool.release(job.private, job.held)
        job.private, job.held = -1, []

    def _drafted(self, job: Job, room: int) -> int:
        draft = self.s.draft
        if draft is None or (draft.proposes < 1 and self.rng.random() >= draft.proposes):
            return 0
        left = job.output - job.generated - 1
        return max(min(draft.tokens, room, left), 0)

    def _accepted(self, job: Job, drafted: int) -> int:
        count = 0
        while count < drafted and self.rng.random() < job.accept:
            count += 1
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += count
        return count
