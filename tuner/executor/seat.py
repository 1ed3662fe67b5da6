"""A seat: GPUs of one node, held by a Ray actor that runs trials there one after the other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuner.engines.protocol import Cancelled, LaunchFailed, Server, Site, Teardown
from tuner.executor import cluster, parcel
from tuner.executor.line import Home
from tuner.executor.local import at_price, check, engine_of
from tuner.executor.protocol import Job, Place
from tuner.load.trace import Trace
from tuner.server.gpu import Gpus
from tuner.server.tree import Pid
from tuner.spec.study import Study
from tuner.study.evaluate import Bench, evaluate, measure
from tuner.study.guard import FILE as QUALITY
from tuner.study.guard import QualityGuard
from tuner.study.outcome import Boot, Infeasible, Outcome, Step
from tuner.study.store import Store


@dataclass(frozen=True, slots=True)
class Kit:
    """What every seat of a study gets. ``prompts`` are the quality floor's (None: it is not checked); ``races``: the
    tuner is asked after each step whether the rest can still matter; ``store`` takes large records on their way."""

    study: Study
    prompts: Sequence[str] | None = None
    races: bool = False
    store: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What comes home of a trial. ``files`` are its folder's, ``beside`` the study folder's own (by name)."""

    outcome: Outcome | None
    teardown: Teardown
    files: parcel.Parcel
    beside: Mapping[str, bytes] = field(default_factory=dict)

    def bring_home(self, folder: Path) -> None:
        """Writes all of it into the study folder; ``folder`` is the trial's."""
        parcel.unpack(self.files, folder)
        for name, content in self.beside.items():
            path = folder.parents[1] / name
            if name.endswith(".jsonl"):
                with path.open("ab") as file:
                    file.write(content)
            elif not path.exists():
                path.write_bytes(content)


class Seat:
    """The actor. ``node`` is the name of the node's row in :func:`tuner.executor.cluster.nodes`."""

    def __init__(self, kit: Kit, line: Any) -> None:
        self._kit, self._home = kit, Home(line)
        self._engines: dict[str, Any] = {}
        self._open: _Launch | None = None
        sweep()

    def where(self) -> tuple[str, Place]:
        """The node's id, and the place."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        node = next(node for node in cluster.nodes(self._kit.study.hardware.rows) if node.id == node_id)
        return node_id, self._place(node)

    def trial(self, job: Job, place: Place, beside: Mapping[str, bytes]) -> Report:
        """One whole trial: launch, ladder, stop, as on the tuner's own machine."""
        launch = self._begin(job, place, beside)
        try:
            if job.window is None:
                raise ValueError("a job without a window is for a rig")
            outcome, teardown = evaluate(launch.bench, job.config, launch.folder, launch.gpus, job.window)
            return launch.report(outcome, teardown, self._kit.store)
        finally:
            launch.clean()
            self._home.flush()

    def open(self, job: Job, place: Place, beside: Mapping[str, bytes]) -> Boot | Infeasible | None:
        """Launches and leaves the server running: how it booted, why it did not (or fell below the quality floor), None
        where it was interrupted."""
        launch = self._open = self._begin(job, place, beside)
        site = Site(launch.folder, launch.gpus, launch.bench.cancel, launch.bench.on_event)
        try:
            launch.server = launch.bench.engine.launch(job.config, site)
            return check(launch.bench, launch.server, job, launch.folder) or launch.server.boot
        except LaunchFailed as failure:
            launch.teardown = failure.teardown
            return failure.outcome
        except Cancelled as interrupt:
            launch.teardown = interrupt.teardown
            return None

    def measure(self, load: float, trace: Trace, prefix: str) -> Step | Infeasible | None:
        """One step on the open launch; why the server died, None where it was interrupted."""
        launch = self._open
        if launch is None or launch.server is None:
            raise ValueError("nothing is launched")
        try:
            return measure(launch.bench, launch.server, launch.job.config, launch.folder, trace, load, prefix)
        except LaunchFailed as failure:
            return failure.outcome
        except Cancelled:
            return None

    def shut(self) -> Report:
        """Stops the open launch; what it left comes home."""
        launch, self._open = self._open, None
        if launch is None:
            return Report(None, Teardown(), parcel.Parcel())
        try:
            teardown = launch.server.stop() if launch.server else launch.teardown
            return launch.report(None, teardown, self._kit.store)
        finally:
            launch.clean()
            self._home.flush()

    def leave(self) -> None:
        """Before the actor ends: an engine may keep a standby."""
        for engine in self._engines.values():
            if close := getattr(engine, "close", None):
                close()

    def _place(self, node: cluster.Node) -> Place:
        from tuner.verify.fingerprint import driver

        gpus, mine = Gpus(), gpu_indices()
        study = self._kit.study
        device = cluster.device(study, gpus.name(mine[0]) if mine and len(gpus) else node.device)
        return Place(node.name, device, cluster.price(study, device), driver())

    def _begin(self, job: Job, place: Place, beside: Mapping[str, bytes]) -> _Launch:
        root = Path(tempfile.mkdtemp(prefix=_prefix()))
        store = Store(root / "study")
        folder = store.trial_folder(job.number)
        for name, content in beside.items():
            (store.folder / name).write_bytes(content)
        study = at_price(self._kit.study, place.price_usd_per_gpu_hour)
        engine = self._engine(study, job.config.gpu)
        tell = self._home.teller(job.number)
        bench = Bench(replace(study, folder=str(store.folder)), engine, self._home.cancel, tell)
        if self._kit.prompts is not None:
            bench = replace(bench, quality=QualityGuard(study, store, self._kit.prompts, tell))
        if self._kit.races:
            bench = replace(bench, beaten=lambda steps: self._home.ask(job.number, "beaten", list(steps)) or "")
        return _Launch(job, bench, root, folder, gpu_indices()[: job.config.gpus])

    def _engine(self, study: Study, gpu: str) -> Any:
        if gpu not in self._engines:
            self._engines[gpu] = engine_of(study, gpu)
        return self._engines[gpu]


@dataclass(slots=True)
class _Launch:
    """A launch in a scratch folder of this node."""

    job: Job
    bench: Bench
    root: Path
    folder: Path
    gpus: tuple[int, ...]
    server: Server | None = None
    teardown: Teardown = field(default_factory=Teardown)  # of a launch that failed

    def report(self, outcome: Outcome | None, teardown: Teardown, store: str) -> Report:
        study = self.root / "study"
        beside = {name: (study / name).read_bytes() for name in (QUALITY, "events.jsonl") if (study / name).exists()}
        return Report(outcome, teardown, parcel.pack(self.folder, store), beside)

    def clean(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def gpu_indices() -> tuple[int, ...]:
    """NVML's indices of the GPUs that Ray gave this actor; Ray's own numbers where NVML sees none."""
    import ray

    given = [str(word) for word in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
    if seen := Gpus().visible({"CUDA_VISIBLE_DEVICES": ",".join(given)}):
        return seen
    return tuple(int(word) for word in given if word.isdigit())


def sweep() -> None:
    """Removes the scratch folders of seats that are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        words = path.name.removeprefix(_PREFIX).split("-")
        named = len(words) > 2 and all(word.isdigit() for word in words[:2])
        if named and not Pid(int(words[0]), int(words[1])).alive:
            shutil.rmtree(path, ignore_errors=True)


_PREFIX = "tuner-seat-"


def _prefix() -> str:
    me = Pid.of(os.getpid())
    return f"{_PREFIX}{os.getpid()}-{me.start if me else 0}-"
