"""A server reached over HTTP: measures through the replay client, notices when it dies, stops as a tree."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tuner.engines.protocol import Endpoint, LaunchFailed, Site, StepPlan, Teardown
from tuner.errors import NoCompletions, Unreachable
from tuner.load.windows import cut_time
from tuner.server import probe
from tuner.server.diagnosis import Evidence, diagnose
from tuner.server.running import Running
from tuner.server.start import Recipe, start
from tuner.server.telemetry import Sample, summary, throttling
from tuner.study.outcome import NO_COMPLETIONS, Boot, Infeasible, Step

_DYING_S = 5.0  # a server whose engine died takes moments to end itself; its exit code says more than its silence
_HEALTH_TRIES = 3
_WARM_TOKENS = 16


class HttpServer:
    """Implements :class:`tuner.engines.protocol.Server` over a :class:`Running`."""

    def __init__(self, running: Running, health: str = "/health", warm_s: float = 0.0) -> None:
        self._running = running
        self._health = health
        self._warm_s = warm_s
        self.endpoint: Endpoint | None = running.endpoint
        self.boot: Boot = running.boot_log.boot(time.monotonic())

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol. Adds the machine's ``system_...`` metrics; a throttled GPU makes the step untrusted, and so
        does a server that compiled during it. Before the first step the server is warmed."""
        if self._warm_s:
            self._warm_s, warm_s = 0.0, self._warm_s
            plan.on_event("phase", {"name": "warming"})
            with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
                self._measured(_warming(plan, warm_s, Path(folder)))
        begin_s = 0.0

        def begin() -> None:
            nonlocal begin_s
            self._said()  # until now: that is not the step's
            begin_s = time.time()

        begin()
        step = self._measured(plan.when_filled(begin))
        return self._with_system(step, begin_s, time.time(), plan.records)

    def _measured(self, plan: StepPlan) -> Step:
        """One replay; raises :class:`LaunchFailed` where the server did not live through it."""
        from tuner.load.step import measure

        if self.endpoint is None:
            raise LaunchFailed(Infeasible("crash", "the server was never started", stage="under load"))
        try:
            step = measure(self.endpoint, plan, alive=self.alive)
        except (Unreachable, NoCompletions) as error:
            raise LaunchFailed(self._fault(errors=True) or unserving(error, self.endpoint)) from None
        if fault := self._fault(errors=step.metrics.get("error_rate", 0.0) > 0):
            raise LaunchFailed(fault)
        return step

    def alive(self) -> bool:
        """Whether the server's first process still runs; asked by the replay while it waits."""
        return self._running.exit_code() is None

    def stop(self) -> Teardown:
        """See the protocol."""
        return self._running.stop()

    def _fault(self, errors: bool) -> Infeasible | None:
        """Why the server is no longer one that can be measured; None while it is well."""
        running = self._running
        deadline = time.monotonic() + (_DYING_S if errors and not self._well() else 0.0)
        while (exited := running.exit_code()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if exited is None and (not errors or self._well()):
            return None
        return diagnose(Evidence(running.log.text(), exited, phase="load", stage="under load"))

    def _well(self) -> bool:
        if not self._health:
            return self.alive()
        for attempt in range(_HEALTH_TRIES):
            if probe.get(self._running.port.number, self._health, timeout_s=5.0).status == 200:
                return True
            if attempt + 1 < _HEALTH_TRIES and not self.alive():
                return False
        return False

    def _with_system(self, step: Step, begin_s: float, end_s: float, records: Path) -> Step:
        telemetry = self._running.telemetry
        samples: list[Sample] = telemetry.between(begin_s, end_s) if telemetry else []
        measured = _window(records) if any(sample.gpus for sample in samples) else None
        system = summary(samples, measured)
        tokens = step.metrics.get("client_output_tokens", 0.0)
        if measured:
            tokens = step.metrics.get("output_tokens_per_s", 0.0) * (measured[1] - measured[0])
        if tokens > 0 and system.get("system_gpu_energy_j", 0.0) > 0:
            system["system_gpu_energy_j_per_output_token"] = system["system_gpu_energy_j"] / tokens
        metrics: Mapping[str, float] = {**step.metrics, **system}
        doubts = [doubt for doubt in (throttling(samples), self._cold()) if doubt]
        return replace(step, metrics=metrics, untrusted=(*step.untrusted, *doubts))

    def _said(self) -> list[str]:
        """The server's log lines since the last call."""
        lines: list[str] = []
        while new := self._running.log.new_lines():
            lines += new
        return lines

    def _cold(self) -> str:
        """What the server compiled since it was last asked, in words; empty where nothing."""
        pattern = self._running.boot_log.dialect.cold
        kernels = sorted({found.group(1) for line in self._said() if (found := pattern.search(line))})
        return f"the server was still compiling while it was measured ({', '.join(kernels)})" if kernels else ""


def launch(recipe: Recipe, site: Site) -> HttpServer:
    """Starts what ``recipe`` says and returns it as a server; raises as :meth:`Engine.launch` does."""
    return HttpServer(start(recipe, site), recipe.health, recipe.warm_s)


def _warming(plan: StepPlan, seconds: float, folder: Path) -> StepPlan:
    """The first ``seconds`` of ``plan``, with prompts of their own and short answers; nothing is judged or kept."""
    few = cut_time(plan.trace, 0.0, max(seconds * plan.load, float(plan.trace.arrival_s[0]) + 1e-3))
    few = replace(few, output_tokens=np.minimum(few.output_tokens, _WARM_TOKENS), earlier=None)
    quiet = replace(plan, trace=few, window=f"{plan.window}/warming", slos=(), records=folder / "records.parquet")
    return replace(quiet, warmup_s=0.0, early_stop=False, on_event=lambda _name, _data: None)


def _window(records: Path) -> tuple[float, float] | None:
    """The measured window of a step in Unix time; None where it has no length."""
    from tuner.load.records import read
    from tuner.measure.window import window

    if not records.exists():
        return None
    told = read(records)
    epoch_s, span = float(told.meta.get("epoch_unix_s", 0.0)), window(told)
    return (epoch_s + span.start_ns / 1e9, epoch_s + span.end_ns / 1e9) if epoch_s and span.duration_s > 0 else None


def unserving(error: Unreachable | NoCompletions, endpoint: Endpoint) -> Infeasible:
    """Of a server that lives, and gives no answers that could be measured. The message names no port, which is another
    at every launch: failures are told apart by their words."""
    if isinstance(error, NoCompletions):
        cause, what = NO_COMPLETIONS, f"the server streams no completions: {error.why}"
    else:
        said = error.message.replace(endpoint.url, "it").replace(endpoint.url.partition("//")[2], "it")
        cause, what = "unhealthy", f"the server does not answer: {said}"
    return Infeasible(cause, what, str(error), "see the server's log", "under load", transient=True)
