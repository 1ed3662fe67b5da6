"""The executor ``local``: trials in threads of this process, on the GPUs of this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.engines.protocol import Cancelled, Engine, LaunchFailed, Server, Site, Teardown
from tuner.errors import EnvironmentFault
from tuner.executor import cluster
from tuner.executor.protocol import Ended, Job, Place, Rig
from tuner.executor.stopwatch import Stopwatch
from tuner.load.trace import Trace
from tuner.server.gpu import Gpus
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.evaluate import Bench, evaluate, measure
from tuner.study.outcome import GPU_BUSY, Boot, Infeasible, Outcome, Step


class LocalExecutor:
    """Implements :class:`tuner.executor.protocol.Executor`. ``study.parallel`` bounds the trials at once (0: as many
    as the GPUs carry); servers without GPUs run one at a time, because they measure each other (functions do not)."""

    def __init__(self, bench: Bench) -> None:
        study = bench.study
        self.left_over: tuple[str, ...] = ()
        self._watch = Stopwatch(bench)
        self._bench = self._watch.bench
        self._gpus = _gpus(bench)
        self._parallel = study.parallel or max(1, len(self._gpus))
        self._alone = study.engine.kind != "function"
        self._running: dict[Future[tuple[Outcome, Teardown]], tuple[Job, tuple[int, ...]]] = {}
        self._next: Job | None = None
        self._engines: dict[str, Engine] = {"": bench.engine}

    def room(self) -> bool:
        """See the protocol."""
        return self._next is None and len(self._running) < self._parallel

    def submit(self, job: Job) -> None:
        """See the protocol."""
        if job.config.gpus > len(self._gpus):
            raise EnvironmentFault(f"a configuration wants {job.config.gpus} GPUs, the study has {len(self._gpus)}")
        self._next = job
        self._start_next()

    def wait(self, timeout_s: float) -> list[Ended]:
        """See the protocol."""
        ended: list[Ended] = []
        if self._next and self._bench.cancel.is_set():
            ended.append(Ended(self._next, None, Teardown(), self._place(self._next.config), 0.0))
            self._next = None
        done, _ = wait(self._running, timeout=0 if ended else timeout_s, return_when=FIRST_COMPLETED)
        for future in done:
            job, gpus = self._running.pop(future)
            error = future.exception()
            outcome, teardown = (None, Teardown()) if error else future.result()
            self._shun(outcome, gpus)
            ended.append(Ended(job, outcome, teardown, self._place(job.config), self.seconds(job.number), error))
        self._start_next()
        return ended

    @contextmanager
    def rig(self, job: Job) -> Iterator[Rig]:
        """See the protocol."""
        bench = self._bench_of(job)
        tell_launch(bench, job)
        self._watch.start(job.number)
        site = Site(job.folder.resolve(), self._gpus[: job.config.gpus], bench.cancel, bench.on_event)
        try:
            server = bench.engine.launch(job.config, site)
        except (LaunchFailed, Cancelled) as failure:
            self.left_over += failure.teardown.left_over
            self._shun(getattr(failure, "outcome", None), site.gpus)
            raise
        try:
            if refused := check(bench, server, job, job.folder):
                raise LaunchFailed(refused)
            yield LocalRig(bench, server, job, self._place(job.config))
        finally:
            self.left_over += server.stop().left_over

    def seconds(self, number: int) -> float:
        """See the protocol."""
        return self._watch.seconds(number)

    def close(self, at_once: bool = False) -> None:
        """See the protocol."""
        if self._running:
            self._bench.cancel.set()
        if at_once:
            self._running.clear()
        wait(self._running)

    def _shun(self, outcome: Outcome | None, gpus: tuple[int, ...]) -> None:
        """GPUs that somebody else was on are taken last from here on."""
        if isinstance(outcome, Infeasible) and outcome.cause == GPU_BUSY:
            self._gpus = tuple(gpu for gpu in self._gpus if gpu not in gpus) + gpus

    def _place(self, config: ServingConfig) -> Place:
        return cluster.place_of(self._bench.study, config)

    def _bench_of(self, job: Job) -> Bench:
        gpu, study = job.config.gpu, self._bench.study
        if gpu not in self._engines:
            self._engines[gpu] = engine_of(study, gpu) if study.engine.kind == "emulator" else self._bench.engine
        bench = replace(self._bench.of_trial(job.number), engine=self._engines[gpu])
        return replace(bench, study=at_price(study, self._place(job.config).price_usd_per_gpu_hour))

    def _start_next(self) -> None:
        """Starts the job that waits, if its GPUs are free."""
        busy = {gpu for _, gpus in self._running.values() for gpu in gpus}
        free = [gpu for gpu in self._gpus if gpu not in busy]
        job = self._next
        if job is None or job.config.gpus > len(free) or (job.config.gpus == 0 and self._running and self._alone):
            return
        gpus, self._next = tuple(free[: job.config.gpus]), None
        self._watch.start(job.number)
        future: Future[tuple[Outcome, Teardown]] = Future()
        self._running[future] = (job, gpus)
        # a daemon: who leaves at once waits for no thread, and the guards end the servers
        trial = threading.Thread(target=self._run, args=(future, job, gpus), name=f"trial-{job.number}", daemon=True)
        try:
            trial.start()
        except RuntimeError as error:  # the system gives no more: a future that nobody ends is waited for, for ever
            fix = "Allow more processes (ulimit -u), and run the same command again: everything measured is kept"
            future.set_exception(EnvironmentFault(f"trial {job.number} got no thread: {error}", fix=fix))

    def _run(self, future: Future[tuple[Outcome, Teardown]], job: Job, gpus: tuple[int, ...]) -> None:
        try:
            future.set_result(self._evaluate(job, gpus))
        except BaseException as error:
            future.set_exception(error)

    def _evaluate(self, job: Job, gpus: tuple[int, ...]) -> tuple[Outcome, Teardown]:
        bench = self._bench_of(job)
        tell_launch(bench, job)
        if job.window is None:
            raise ValueError("a job without a window is for rig()")
        try:
            return evaluate(bench, job.config, job.folder, gpus, job.window)
        finally:
            self._watch.stop(job.number)  # whoever waits for it may be busy with the next proposal


def engine_of(study: Study, gpu: str) -> Engine:
    """The study's engine for servers on ``gpu`` (empty: the study's own): what is compared is what is emulated."""
    from tuner.engines import build

    if gpu and study.engine.kind == "emulator":
        study = replace(study, engine=replace(study.engine, options={**study.engine.options, "gpu": gpu}))
    return build.engine(study)


def at_price(study: Study, price: float) -> Study:
    """``study`` for GPUs that cost ``price`` USD an hour."""
    return replace(study, objective=replace(study.objective, price_usd_per_gpu_hour=price))


def _gpus(bench: Bench) -> tuple[int, ...]:
    """The indices of the GPUs that the study may use: those that ``CUDA_VISIBLE_DEVICES`` leaves, in its order. Where
    no server of ours runs on them, or nothing is known of them, the study's word counts. Raises ``EnvironmentFault``
    where there are fewer than the study wants."""
    wanted, gpus = bench.study.hardware.gpus, Gpus()
    if bench.engine.emulated or bench.study.engine.kind in ("function", "attach") or not len(gpus):
        return tuple(range(wanted))
    mine = gpus.visible()
    if len(mine) < wanted:
        said = os.environ.get("CUDA_VISIBLE_DEVICES")
        leaves = "" if said is None else f", and CUDA_VISIBLE_DEVICES={said} leaves {len(mine)} of them"
        fix = f"Set hardware.gpus to what may be used{'' if said is None else ', or CUDA_VISIBLE_DEVICES to more'}"
        raise EnvironmentFault(f"the study wants {wanted} GPUs; this machine has {len(gpus)}{leaves}", fix=fix)
    return mine[:wanted]


@dataclass(slots=True)
class LocalRig:
    """Implements :class:`tuner.executor.protocol.Rig` over a server of this machine."""

    bench: Bench
    server: Server
    job: Job
    place: Place

    @property
    def boot(self) -> Boot:
        return self.server.boot

    def measure(self, load: float, trace: Trace, prefix: str) -> Step:
        """See the protocol."""
        return measure(self.bench, self.server, self.job.config, self.job.folder, trace, load, prefix)


def check(bench: Bench, server: Server, job: Job, folder: Path) -> Infeasible | None:
    """Why the server of a :class:`Rig` falls below the quality floor, where it was not found to hold it before."""
    refused = None if job.checked else bench.quality(server, job.config, folder)
    return replace(refused, boot=server.boot) if refused else None


def tell_launch(bench: Bench, job: Job, **more: str) -> None:
    """The event ``launch`` of ``job``."""
    bench.on_event("launch", {"config": job.config, "baseline": job.baseline, "why": job.why, **more})
