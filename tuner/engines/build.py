"""From the study's word to the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from tuner.engines.protocol import Engine
from tuner.errors import UsageError
from tuner.spec import text
from tuner.spec.study import Study

_CLASSES = {
    "vllm": ("tuner.engines.vllm", "VllmEngine"),
    "sglang": ("tuner.engines.sglang", "SglangEngine"),
    "emulator": ("tuner.engines.emulator", "EmulatorEngine"),
    "command": ("tuner.engines.command", "CommandEngine"),
    "attach": ("tuner.engines.attach", "AttachEngine"),
    "function": ("tuner.engines.function", "FunctionEngine"),
}


#: Arguments that no study says under options: it says them elsewhere, or they follow from it.
ELSEWHERE = frozenset(
    {"python", "command", "env", "trust_remote_code", "models", "rows", "folder", "required", "default"}
)


def known_options(kind: str) -> dict[str, Any] | None:
    """The options that engines of this kind take, with their types; None where there is no such kind."""
    if kind not in _CLASSES:
        return None
    hints = get_type_hints(_class(kind).__init__)
    return {option: hint for option, hint in hints.items() if option != "return"}


def _class(kind: str) -> Any:
    module, name = _CLASSES[kind]
    return getattr(import_module(module), name)


def engine(study: Study) -> Engine:
    """The study's engine, not yet asked anything. Raises UsageError for options that it does not know, and for values
    that they cannot have."""
    if study.engine.kind == "own":
        return _own(study)
    options = study.engine.options
    hints = known_options(study.engine.kind) or {}
    for option, value in options.items():
        if option in hints and (wrong := _wrong(option, value, hints[option])):
            raise UsageError(
                f"engine.options.{option}: {wrong}, not {value!r}", where=place(study, "engine", "options", option)
            )
        if option not in hints:
            fix = text.suggest(option, hints.keys() - options.keys() - ELSEWHERE)
            at = (option,) if option in _engine_as_written(study) else ("options", option)  # engine.target, say
            raise UsageError(
                f"{study.engine.kind} has no {'.'.join(('engine', *at))}", where=place(study, "engine", *at), fix=fix
            )
    try:
        return _class(study.engine.kind).from_study(study)
    except TypeError as error:  # what the study says of the engine elsewhere is no option as well
        said = next((option for option in options if repr(option) in str(error)), "")
        raise UsageError(
            f"engine.options.{said} is said elsewhere" if said else f"engine.options: {error}",
            where=place(study, "engine", "options", said),
            fix=f"take {'it' if said else 'what is wrong'} out of engine.options",
        ) from None
    except UsageError as error:
        said = next((option for option in options if option in error.message), "")
        error.where = error.where or place(study, "engine", "options", said)
        raise


def _own(study: Study) -> Engine:
    from tuner.engines.own import OwnEngine

    try:
        return OwnEngine.from_study(study)
    except UsageError as error:
        error.where = error.where or place(study, "engine", *(["target"] if "target" in study.engine.options else []))
        raise


def _wrong(option: str, value: Any, hint: Any) -> str:
    """Why an option of the type ``hint`` cannot have this value; empty where it can."""
    from pydantic import TypeAdapter, ValidationError

    if option == "version" and isinstance(value, int | float):
        return ""  # YAML reads `version: 1.0` as a number
    try:
        TypeAdapter(hint).validate_python(value, strict="Path" not in str(hint))  # YAML has no paths
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        return said[:1].lower() + said[1:]
    numbers = [n for n in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(n, int | float)]
    floats = [n for n in numbers if isinstance(n, float)]
    if any(math.isnan(n) or (math.isinf(n) and not option.endswith("_limit_s")) for n in floats):
        return "input should be a finite number"
    return "a time cannot be negative" if option.endswith("_s") and any(n < 0 for n in numbers) else ""


def _engine_as_written(study: Study) -> Mapping[str, Any]:
    path = Path(study.source)
    written = text.read(path, "study").data.get("engine") if path.is_file() else None
    return written if isinstance(written, Mapping) else {}


def place(study: Study, *loc: str) -> str:
    """``file:line`` of an entry of the study file, the file alone where it cannot be read."""
    path = Path(study.source)
    return text.read(path, "study").where(loc) if path.is_file() else study.source
