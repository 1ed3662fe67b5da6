"""From the study's word to the engine."""

from __future__ import annotations

from typing import Any

from tuner.engines.protocol import Engine
from tuner.errors import UsageError
from tuner.spec.study import Study


def engine(study: Study) -> Engine:
    """The study's engine, not yet asked anything. Raises UsageError for options that it does not know."""
    spec = study.engine
    options: dict[str, Any] = dict(spec.options)
    try:
        if spec.kind == "vllm":
            from tuner.engines.vllm import VllmEngine

            return VllmEngine.from_study(study)
        if spec.kind == "sglang":
            from tuner.engines.sglang import SglangEngine

            return SglangEngine.from_study(study)
        if spec.kind == "emulator":
            from tuner.engines.emulator import EmulatorEngine

            return EmulatorEngine.from_study(study)
        if spec.kind == "command":
            from tuner.engines.command import CommandEngine

            return CommandEngine.from_study(study)
        if spec.kind == "attach":
            from tuner.engines.attach import AttachEngine

            return AttachEngine.from_study(study)
        from tuner.engines.function import FunctionEngine

        return FunctionEngine.from_study(study)
    except TypeError as error:
        raise UsageError(f"engine.options: {error}", where=study.source, fix=f"given: {', '.join(options)}") from None
