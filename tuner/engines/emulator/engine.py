"""The engine ``emulator``: an emulated vLLM, as a process under the launcher or on a virtual clock without one."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tuner.engines.emulator.console import VERSION
from tuner.engines.emulator.faults import parse_faults
from tuner.engines.emulator.flags import BadFlag, known_flags, parse
from tuner.engines.emulator.hardware import find_gpu, from_datasheet
from tuner.engines.emulator.rescale import hastened, rescale, step_from_records
from tuner.engines.emulator.shape import read_shape
from tuner.engines.installation import refuse_launchers
from tuner.engines.protocol import LaunchFailed, Server, Site, StepPlan, Teardown
from tuner.engines.vllm import RESERVED
from tuner.errors import UsageError
from tuner.space.config import ServingConfig
from tuner.spec.study import Rows, Study
from tuner.study.outcome import Boot, Infeasible, Step

_ROOT = Path(__file__).parents[3]
# How late the emulator may be at its 99th percentile: a floor, or a share of every latency that it distorts whole (of
# TPOT, a mean over a response's tokens, little is left).
_LATE_S, _LATE_SHARE = 0.005, 0.05
_DISTORTED = ("ttft", "itl", "e2e")


class EmulatorEngine:
    """Implements :class:`tuner.engines.protocol.Engine`; everything it measures is emulated.

    ``gpu`` is a row of the emulator's table or of the hardware table. ``clock``: ``wall`` launches a process and
    replays the trace over HTTP; ``virtual`` computes the step without either. ``time_scale`` makes a wall clock's
    emulation go that many times faster (boot, steps and replay alike; the records are on the emulated clock).
    ``boot_scale`` stretches the start-up, 0 skips its waiting. ``noise`` are the fields of
    :class:`tuner.engines.emulator.noise.Noise`; ``acceptance`` overrides that of speculation, ``kl`` the stated damage
    of quantizations in nats per token. ``fault`` is shown by every server; of ``faults`` one by each server of a share
    ``fault_share`` of the configs, which the config's hash picks. Nothing is random beyond ``seed``: the same config in
    a trial folder of the same name behaves the same, wherever study and model lie; in another folder it is another
    launch.
    """

    kind = "emulator"
    emulated = True

    def __init__(
        self,
        *,
        gpu: str = "H100-SXM",
        gpus: int = 8,
        clock: Literal["wall", "virtual"] = "wall",
        time_scale: float = 1.0,
        boot_scale: float = 1.0,
        seed: int = 0,
        noise: Mapping[str, float] | None = None,
        acceptance: float | None = None,
        kl: Mapping[str, float] | None = None,
        fault: str = "",
        faults: Sequence[str] = (),
        fault_share: float = 0.5,
        models: Path | None = None,
        start_limit_s: float = 3600.0,
        phase_limit_s: float | Mapping[str, float] | None = None,
        stop_wait_s: float = 5.0,
        rows: Rows = (),
    ) -> None:
        """Raises ``UsageError`` for an unknown GPU, fault or clock. ``rows``: the study's own of the hardware table."""
        if clock not in ("wall", "virtual"):
            raise UsageError(f"engine.options.clock is wall or virtual, not {clock!r}")
        if time_scale <= 0 or boot_scale < 0:
            raise UsageError("engine.options.time_scale must be above zero, boot_scale at least zero")
        try:
            for one in (fault, *faults):
                parse_faults(one)
        except ValueError as error:
            raise UsageError(f"engine.options: {error}") from None
        options = {"gpus": gpus, "boot_scale": boot_scale, "noise": noise, "acceptance": acceptance, "kl": kl}
        self.options = {name: value for name, value in options.items() if value is not None} | _datasheet(gpu, rows)
        self.gpu, self.clock, self.time_scale, self.seed = gpu, clock, time_scale, seed
        self.fault, self.faults, self.fault_share = fault, tuple(faults), fault_share
        self.models = models
        self.axis = ""
        self.start_limit_s, self.phase_limit_s, self.stop_wait_s = start_limit_s, phase_limit_s, stop_wait_s

    @classmethod
    def from_study(cls, study: Study) -> EmulatorEngine:
        """The engine of a study; ``engine.options`` are the keywords of the constructor. Raises ``UsageError`` for a
        model on this machine whose sizes are not known."""
        with suppress(FileNotFoundError):
            read_shape(study.model)
        on = study.hardware
        given = {"gpu": on.name, "gpus": max(on.gpus, 1), "seed": study.seed, "rows": on.rows}
        engine = cls(**{**given, "models": Path(study.folder) / "models", **study.engine.options})
        engine.axis = study.objective.latency
        return engine

    def version(self) -> str:
        """See the protocol: the vLLM version whose behaviour is emulated."""
        return f"{VERSION}+emulated"

    def flags(self) -> frozenset[str] | None:
        """See the protocol: vLLM's flags."""
        return frozenset(known_flags())

    def check_flag(self, flag: str) -> None:
        """Raises ``UsageError`` for a flag that vLLM's launcher decides."""
        refuse_launchers(flag, RESERVED)

    def launch(self, config: ServingConfig, site: Site) -> Server:
        """See the protocol."""
        seed = self._digits(f"{_anywhere(config)}/{site.folder.name}")
        model = self._model(config, site)
        fault = self._fault(config)
        if self.clock == "virtual":
            return self._virtual(config, site, model, fault, seed)
        from tuner.engines.http import HttpServer, launch
        from tuner.engines.modelfolder import local_model
        from tuner.engines.vllmlog import DIALECT
        from tuner.server.limits import Limits, fixed
        from tuner.server.start import Binding, Recipe

        def argv(binding: Binding) -> list[str]:
            words = [sys.executable, "-m", "tuner.engines.emulator", "--model", model, "--host", "127.0.0.1"]
            words += ["--port", str(binding.port), "--served-model-name", binding.model, *config.args()]
            words += ["--gpu", self.gpu, "--time-scale", f"{self.time_scale:g}", "--emulator-seed", str(seed)]
            return [*words, "--emulator", json.dumps(self.options), *(("--fault", fault) if fault else ())]

        recipe = Recipe(
            argv=argv,
            env=lambda binding: {"VLLM_API_KEY": binding.api_key, "PYTHONPATH": str(_ROOT), **config.env},
            tokenizer=str(local_model(model) or model),
            dialect=DIALECT,
            limits=Limits(
                total_s=self.start_limit_s,
                silent_s=fixed(self.phase_limit_s).get("*", 60.0),
                fixed_s=fixed(self.phase_limit_s),
            ),
            shares_port=True,
            stop_wait_s=self.stop_wait_s,
        )
        begun_s = time.monotonic()

        def ended() -> None:
            if self.time_scale != 1.0:
                site.on_event("took", {"seconds": (time.monotonic() - begun_s) * self.time_scale})

        try:
            # No real GPU is leased for an emulated one.
            server: HttpServer = launch(recipe, replace(site, gpus=()))
        except LaunchFailed:
            ended()
            raise
        return EmulatorServer(server, self.time_scale, self.axis, ended)

    def _virtual(self, config: ServingConfig, site: Site, model: str, fault: str, seed: int) -> Server:
        from tuner.engines.emulator.virtual import launch_virtual

        words = ["--model", model, *config.args(), "--emulator-seed", str(seed)]
        try:
            flags = parse(words)
            if "unknown-flag" in parse_faults(fault):
                raise BadFlag("unrecognized arguments: --no-such-flag 1")
        except BadFlag as error:
            raise LaunchFailed(
                Infeasible("unknown-flag", str(error), f"api_server.py: error: {error}", "take it out of the space")
            ) from None
        gpu = from_datasheet(self.gpu, self.options["datasheet"]) if "datasheet" in self.options else find_gpu(self.gpu)
        return launch_virtual(flags, self.options, fault, gpu, config.env, site)

    def _digits(self, what: str) -> int:
        """Below 16 ** 8, by the study's seed."""
        return int(hashlib.sha256(f"{self.seed}/{what}".encode()).hexdigest()[:8], 16)

    def _fault(self, config: ServingConfig) -> str:
        digits, chosen = self._digits(f"fault/{_anywhere(config)}"), self.fault
        if self.faults and digits / 16**8 < self.fault_share:
            chosen = ",".join(filter(None, (chosen, self.faults[digits % len(self.faults)])))
        return chosen

    def _model(self, config: ServingConfig, site: Site) -> str:
        """What is served: the model, or the folder of a variant of it with a quantized config."""
        from tuner.engines.modelfolder import variant

        try:
            read_shape(config.model)
        except FileNotFoundError:
            raise LaunchFailed(_absent(config.model)) from None
        except UsageError as error:
            said = f"{error.where}: {error.message}" if error.where else error.message
            outcome = Infeasible("model-unsupported", said, fix=error.fix, stage="before launch")
            raise LaunchFailed(outcome) from None
        if not config.model_variant:
            return config.model
        try:
            return str(variant(config.model, config.model_variant, self.models or site.folder / "models"))
        except UsageError as error:
            raise LaunchFailed(
                Infeasible("model-not-found", error.message, fix=error.fix, stage="before launch")
            ) from None


class EmulatorServer:
    """A launched emulator: measures on the wall clock and reports on the emulated one. ``axis`` is the objective's
    latency; ``ended`` is called when it has stopped."""

    def __init__(self, server: Any, scale: float, axis: str = "", ended: Callable[[], None] = lambda: None) -> None:
        self._server, self._scale, self._axis, self._ended = server, scale, axis, ended
        self.endpoint = server.endpoint
        phases = {name: round(seconds * scale, 3) for name, seconds in server.boot.phases_s.items()}
        self.boot: Boot = replace(server.boot, total_s=round(server.boot.total_s * scale, 3), phases_s=phases)

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol. A step in which the emulator itself was late is untrusted."""
        self._state(reset=True)
        plan = plan.when_filled(partial(self._state, reset=True))
        if self._scale == 1.0:
            step: Step = self._server.measure(plan)
        else:
            wall = plan.records.with_name(plan.records.stem + "-wall.parquet")
            try:
                fast = self._server.measure(hastened(plan, self._scale, wall))
            finally:
                if wall.exists():
                    rescale(wall, plan.records, plan, self._scale)
                    wall.unlink()
            step = step_from_records(plan)
            system = {name: value for name, value in fast.metrics.items() if name.startswith("system_")}
            step = replace(step, metrics={**system, **step.metrics})
        return self._with_lateness(step, plan)

    def stop(self) -> Teardown:
        """See the protocol."""
        teardown: Teardown = self._server.stop()
        self._ended()
        return teardown

    def _with_lateness(self, step: Step, plan: StepPlan) -> Step:
        late_s = self._state().get("lateness_p99_s", 0.0) * self._scale
        # an SLO bears what would not change its verdict much; the axis has no limit to hide behind
        limits = [(slo.latency, slo.limit) for slo in plan.slos] + [(self._axis.rpartition("_")[0], 0.0)]
        judged = [
            (max(limit, step.metrics.get(f"{latency}_p99_s", 0.0)), latency)
            for latency, limit in limits
            if latency in _DISTORTED
        ]
        least_s, latency = min(judged, default=(step.metrics.get("ttft_p99_s", 0.0), "ttft"))
        allowed_s = max(_LATE_S, _LATE_SHARE * least_s)
        step = replace(step, metrics={**step.metrics, "emulator_lateness_p99_s": late_s})
        if late_s <= allowed_s:
            return step
        why = f"the emulator was late: p99 {late_s * 1e3:.3g} ms, {latency} bears at most {allowed_s * 1e3:.3g} ms"
        return replace(step, untrusted=(*step.untrusted, why))

    def _state(self, reset: bool = False) -> dict[str, Any]:
        from tuner.server import probe

        port = int(str(self.endpoint.url).rsplit(":", 1)[1])
        answer = probe.get(port, "/emulator/reset" if reset else "/emulator")
        try:
            return json.loads(answer.body)
        except ValueError:
            return {}


def _absent(model: str) -> Infeasible:
    return Infeasible(
        "model-not-found",
        f"{model} is neither a folder with a config.json nor in the Hugging Face cache",
        fix=f"the emulator reads nothing of a model but its config.json: hf download {model} config.json",
        stage="before launch",
    )


def _anywhere(config: ServingConfig) -> str:
    """The hash of ``config`` with the name of its model, wherever that lies."""
    return replace(config, model=Path(config.model).name).hash


def _datasheet(gpu: str, own: Rows) -> dict[str, Any]:
    """Nothing for a GPU of the emulator's own table; for another row of the hardware table its data sheet."""
    try:
        find_gpu(gpu)
        return {}
    except ValueError as unknown:
        from tuner.search import hardware

        row = hardware.lookup(gpu, hardware.table(own))
        if row is None:
            raise UsageError(str(unknown)) from None
        flops = {16: row.flops["bf16"], 8: row.flops.get("fp8") or row.flops.get("int8") or row.flops["bf16"]}
        if "fp4" in row.flops:
            flops[4] = row.flops["fp4"]
        return {
            "datasheet": {
                "memory_bytes": row.memory_bytes,
                "memory_bytes_per_s": row.bandwidth_bytes_per_s,
                "link_bytes_per_s": row.link_bytes_per_s,
                "flops": flops,
                "fp8": "fp8" in row.flops,
            }
        }
