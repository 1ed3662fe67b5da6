"""From a command line to a simulator, through the start-up that vLLM would go through; for both of its clocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tuner.engines.emulator.boot import Boot, Planned
from tuner.engines.emulator.flags import OWN
from tuner.engines.emulator.hardware import Gpu, find_gpu, from_datasheet
from tuner.engines.emulator.memory import KvDoesNotFit, WeightsDoNotFit, plan
from tuner.engines.emulator.noise import Noise
from tuner.engines.emulator.quality import Answers, stated_kl
from tuner.engines.emulator.settings import Refused, Settings, resolve
from tuner.engines.emulator.shape import Shape, read_shape
from tuner.engines.emulator.simulator import Simulator
from tuner.errors import UsageError


def gpu_of(flags: Mapping[str, str | None], options: Mapping[str, Any]) -> Gpu:
    """The GPU that ``--gpu`` names, or the one whose data sheet is given. Raises ``ValueError``."""
    name = flags.get("gpu") or "H100-SXM"
    return from_datasheet(name, options["datasheet"]) if "datasheet" in options else find_gpu(name)


def assemble(
    boot: Boot,
    flags: Mapping[str, str | None],
    options: Mapping[str, Any],
    gpu: Gpu,
    environ: Mapping[str, str],
    bind: Callable[[], None] = lambda: None,
) -> tuple[Simulator, Answers]:
    """Plays the start-up of ``flags`` on ``gpu``; ``bind`` is called where vLLM binds its port.

    ``options`` are the emulator's own: ``gpus``, ``acceptance``, ``noise``, ``kl``, ``model_seed``. Raises
    ``BootFailed`` with the last words printed, ``UsageError`` for a model whose sizes are not known.
    """
    model = str(flags.get("model") or "")
    given = {name.replace("-", "_"): value for name, value in flags.items() if name not in OWN and name != "api-key"}
    boot.imports()
    boot.console.banner(model, given)
    bind()
    boot.config()
    shape = _shape(model, boot)
    settings = _settings(flags, options, shape, gpu, boot, environ)
    memory: Planned
    try:
        memory = plan(shape, settings, gpu)
    except (WeightsDoNotFit, KvDoesNotFit) as error:
        memory = error
    boot.engine(shape, settings, gpu, str(flags.get("load-format") or "auto"), memory, model)
    noise = Noise(**options["noise"]) if "noise" in options else None
    simulator = Simulator(shape, settings, gpu, int(flags.get("emulator-seed") or 0), noise)
    kl = stated_kl(settings.scheme, settings.kv_dtype, options.get("kl"))
    salt = f"{settings.scheme}/{settings.kv_dtype}"
    return simulator, Answers(shape.vocab, int(options.get("model_seed", 0)), kl, salt)


def _shape(model: str, boot: Boot) -> Shape:
    try:
        return read_shape(model)
    except FileNotFoundError:
        boot.refuse(
            "server",
            f"OSError: {model} is not a local folder and is not a valid model identifier listed on "
            "'https://huggingface.co/models'",
        )


def _settings(
    flags: Mapping[str, str | None],
    options: Mapping[str, Any],
    shape: Shape,
    gpu: Gpu,
    boot: Boot,
    environ: Mapping[str, str],
) -> Settings:
    try:
        return resolve(flags, shape, gpu, int(options.get("gpus", 8)), options.get("acceptance"), environ)
    except Refused as error:
        if error.where:
            boot.refuse(
                "server",
                f"pydantic_core._pydantic_core.ValidationError: 1 validation error for {error.where}\n"
                f"  Value error, {error} [type=value_error, input_value=ArgsKwargs((), {{}}), input_type=ArgsKwargs]\n"
                "    For further information visit https://errors.pydantic.dev/2.13/v/value_error",
            )
        boot.refuse("engine", f"ValueError: {error}")
    except (ValueError, UsageError) as error:
        boot.refuse("server", f"ValueError: {error}")
