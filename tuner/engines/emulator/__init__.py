"""An emulated vLLM: a real process with vLLM's API, flags, log and failures, timed by a simulation of a named GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.engines.emulator.engine import EmulatorEngine

__all__ = ["EmulatorEngine"]


def __getattr__(name: str) -> Any:
    """The engine, imported when it is asked for: the process of the emulator starts without it."""
    if name == "EmulatorEngine":
        from tuner.engines.emulator.engine import EmulatorEngine

        return EmulatorEngine
    raise AttributeError(name)
