"""A server reached over HTTP: measures through the replay client, notices when it dies, stops as a tree."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from tuner.engines.protocol import Endpoint, LaunchFailed, Site, StepPlan, Teardown
from tuner.errors import EnvironmentFault
from tuner.server import probe
from tuner.server.diagnosis import Evidence, diagnose
from tuner.server.running import Running
from tuner.server.start import Recipe, start
from tuner.server.telemetry import Sample, summary, throttling
from tuner.study.outcome import Boot, Infeasible, Step

_DYING_S = 5.0  # a server whose engine died takes moments to end itself; its exit code says more than its silence
_HEALTH_TRIES = 3


class HttpServer:
    """Implements :class:`tuner.engines.protocol.Server` over a :class:`Running`."""

    def __init__(self, running: Running, health: str = "/health") -> None:
        self._running = running
        self._health = health
        self._step = 0
        self.endpoint: Endpoint | None = running.endpoint
        self.boot: Boot = running.boot_log.boot(time.monotonic())

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol. Adds the machine's ``system_...`` metrics; a throttled GPU makes the step untrusted."""
        from tuner.load.step import measure

        if self.endpoint is None:
            raise LaunchFailed(Infeasible("crash", "the server was never started", stage="under load"))
        begin_s = time.time()
        try:
            step = measure(self.endpoint, plan, alive=self.alive)
        except (EnvironmentFault, OSError) as error:  # nothing answers
            raise LaunchFailed(self._fault(errors=True) or _unreachable(error)) from None
        if fault := self._fault(errors=step.metrics.get("error_rate", 0.0) > 0):
            raise LaunchFailed(fault)
        return self._with_system(step, begin_s, time.time())

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

    def _with_system(self, step: Step, begin_s: float, end_s: float) -> Step:
        telemetry = self._running.telemetry
        samples: list[Sample] = telemetry.between(begin_s, end_s) if telemetry else []
        system = summary(samples)
        tokens = step.metrics.get("client_output_tokens", 0.0)
        if tokens > 0 and system.get("system_gpu_energy_j", 0.0) > 0:
            system["system_gpu_energy_j_per_output_token"] = system["system_gpu_energy_j"] / tokens
        metrics: Mapping[str, float] = {**step.metrics, **system}
        slow = throttling(samples)
        return replace(step, metrics=metrics, untrusted=(*step.untrusted, slow) if slow else step.untrusted)


def launch(recipe: Recipe, site: Site) -> HttpServer:
    """Starts what ``recipe`` says and returns it as a server; raises as :meth:`Engine.launch` does."""
    return HttpServer(start(recipe, site), recipe.health)


def _unreachable(error: Exception) -> Infeasible:
    fix = "see the server's log"
    return Infeasible(
        "unhealthy", f"the server does not answer: {error}", str(error), fix, "under load", transient=True
    )
