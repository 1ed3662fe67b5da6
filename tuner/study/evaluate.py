"""One trial: one launch, one ladder, one outcome."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.engines.protocol import Cancelled, Engine, LaunchFailed, OnEvent, Server, Site, StepPlan, Teardown
from tuner.load.sharing import recent
from tuner.load.trace import Trace
from tuner.search.model.settings import caches_prefixes, ranks
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Aborted, Boot, Infeasible, Measured, Outcome, Step, Untrusted
from tuner.study.price import priced
from tuner.study.workload import at_load, climb
from tuner.verify.capacity import still_pays

ROOM = 2**20  # tokens: more than most servers' caches hold, and no more than a minute or two to compute
Check = Callable[[Server, ServingConfig, Path], Infeasible | None]
Beaten = Callable[[Sequence[Step]], str]


def unchecked(_server: Server, _config: ServingConfig, _folder: Path) -> Infeasible | None:
    """No quality floor."""
    return None


def unbeaten(_steps: Sequence[Step]) -> str:
    """Every ladder is measured to its end."""
    return ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every trial of a study shares. ``quality`` looks at a fresh server's answers; ``beaten`` says after each
    step why the rest of the ladder cannot matter any more (empty: go on)."""

    study: Study
    engine: Engine
    cancel: threading.Event
    on_event: OnEvent
    quality: Check = unchecked
    beaten: Beaten = unbeaten

    def of_trial(self, number: int) -> Bench:
        """The same, with the trial's number in every event."""
        return replace(self, on_event=of_trial(self.on_event, number))


def of_trial(on_event: OnEvent, number: int | str) -> OnEvent:
    """``on_event``, with the trial's number (or what a launch is that is no trial) in every event."""

    def tell(name: str, data: Mapping[str, Any]) -> None:
        on_event(name, {"trial": number, **data})

    return tell


def evaluate(
    bench: Bench, config: ServingConfig, folder: Path, gpus: tuple[int, ...], window: Trace
) -> tuple[Outcome, Teardown]:
    """Launches ``config`` in ``folder``, measures the ladder from low to high (:func:`tuner.study.workload.climb`),
    stops the server.

    The ladder ends at the first SLO miss. Never raises for what a server can do; a bug does raise, after the teardown.
    """
    steps: list[Step] = []
    try:
        server = bench.engine.launch(config, Site(folder.resolve(), gpus, bench.cancel, bench.on_event))
    except LaunchFailed as failure:
        return failure.outcome, failure.teardown
    except Cancelled as interrupt:
        return Aborted("interrupted"), interrupt.teardown
    boot = server.boot
    try:
        refused = bench.quality(server, config, folder)
        outcome = replace(refused, boot=boot) if refused else _ladder(bench, server, config, folder, window, steps)
    except LaunchFailed as failure:
        outcome = replace(failure.outcome, steps=tuple(steps), boot=boot)
    except Cancelled:
        outcome = Aborted("interrupted", tuple(steps), boot)
    finally:
        bench.on_event("phase", {"name": "stopping"})
        teardown = server.stop()
    return outcome, teardown


def _ladder(
    bench: Bench, server: Server, config: ServingConfig, folder: Path, window: Trace, steps: list[Step]
) -> Outcome:
    known = len(bench.study.load.ladder)
    for index, load in enumerate(climb(bench.study, window), 1):
        if index > known and not still_pays(steps):
            break
        bench.on_event("step", {"index": index, "of": max(index, known), "load": load})
        step = measure(bench, server, config, folder, window, load)
        steps.append(step)
        bench.on_event(
            "measured", {"load": load, "ok": step.ok, "misses": step.slo_misses, "untrusted": step.untrusted}
        )
        if not step.ok:
            break
        why = bench.beaten(steps)
        if why:
            return Aborted(why, tuple(steps), server.boot)
    if not any(not step.untrusted for step in steps):
        return Untrusted(steps[-1].untrusted, tuple(steps), server.boot)
    return Measured(tuple(steps), server.boot)


def measure(
    bench: Bench, server: Server, config: ServingConfig, folder: Path, window: Trace, load: float, prefix: str = ""
) -> Step:
    """One step; repeated once, at once, where the measurement (not the server) was at fault.

    Its records go to ``folder``, under a name that begins with ``prefix``.
    """
    study = bench.study
    trace = at_load(window, load, study.trace.window_s)
    trace = replace(trace, earlier=to_fill(trace, config, server.boot))
    if not study.planned_ends:
        trace = replace(trace, lasts_s=0.0)
    for attempt in ("", "-again"):
        plan = StepPlan(
            load=load,
            trace=trace,
            window=window.name,
            slos=study.objective.slos,
            records=folder / f"records-{prefix}{load:g}{attempt}.parquet",
            warmup_s=study.load.warmup_s,
            output=study.trace.output,
            seed=_seed(study.seed, window.name, f"{load:g}", prefix + attempt),
            request_timeout_s=study.load.request_timeout_s,
            early_stop=study.load.early_stop,
            quantiles=_quantiles(study),
            cancel=bench.cancel,
            on_event=bench.on_event,
        )
        step = priced(server.measure(plan), config, study.objective)
        if not step.untrusted:
            break
    return step


def to_fill(trace: Trace, config: ServingConfig, boot: Boot) -> Trace | None:
    """Of what came before ``trace`` the last that the server's caches have room for (:data:`ROOM` where its log did not
    say how much that is); nothing where it caches no prefixes."""
    if trace.earlier is None or not caches_prefixes(config.flags):
        return None
    room = boot.facts.get("kv_cache_tokens", ROOM) * ranks(config.flags)
    return recent(trace.earlier, room)


def _seed(*parts: object) -> int:
    """A seed for every step of a launch (a server must not see a prompt twice: its prefix cache would answer),
    the same for every configuration (they are compared on the same prompts)."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def _quantiles(study: Study) -> tuple[float, ...]:
    """The usual ones and the latency axis's own."""
    stat = study.objective.latency.rsplit("_", 1)[1]
    own = (float(stat[1:]) / 100,) if stat.startswith("p") else ()
    return tuple(sorted({0.5, 0.9, 0.95, 0.99, *own}))
