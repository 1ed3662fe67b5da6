"""In what a serving config differs from the engine's default: what a reader wants to see of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tuner.space.config import ServingConfig, Value
from tuner.study.outcome import Infeasible
from tuner.study.store import TrialRecord

ABSENT = "(not set)"


def baseline_of(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The first launch of the engine's default, whatever became of it; None where it was never tried."""
    return next((t for t in trials if t.baseline), None)


def no_baseline(trials: Iterable[TrialRecord]) -> str:
    """Why there is no point of the engine's default, in words."""
    own = [t for t in trials if t.baseline]
    if not own:
        return "The engine's default was not tried."
    if any(t.outcome.steps for t in own):
        return "The engine's default meets the SLOs at no measured load."
    last = own[-1].outcome
    if isinstance(last, Infeasible) and not last.transient:
        return f"The engine's default cannot serve: {last.message.rstrip('.')}."
    return f"The engine's default was not measured: see trial {own[-1].number}."


def changes(config: ServingConfig, default: ServingConfig | None) -> dict[str, Value | None]:
    """Flags (and environment, the model's variant, the type of GPU) that ``default`` does not have or has with another
    value.

    A flag of the default that ``config`` lacks maps to ``(not set)``. Without a default every flag counts.
    """
    base_flags: Mapping[str, Value | None] = default.flags if default else {}
    base_env = default.env if default else {}
    found: dict[str, Value | None] = {}
    if config.model_variant != (default.model_variant if default else ""):
        found["model-variant"] = config.model_variant or ABSENT
    if config.gpu != (default.gpu if default else ""):
        found["gpu"] = config.gpu or ABSENT
    for name, value in config.flags.items():
        if name not in base_flags or base_flags[name] != value:
            found[name] = value
    found |= {name: ABSENT for name in base_flags if name not in config.flags}
    found |= {name: value for name, value in config.env.items() if base_env.get(name) != value}
    return found


def describe(config: ServingConfig, default: ServingConfig | None) -> str:
    """The differences on one line, ``max-num-batched-tokens=8192 no-enable-prefix-caching``; ``engine default``
    where there are none. For reading: JSON stands without its quotes."""
    return " ".join(words(name, value) for name, value in changes(config, default).items()) or "engine default"


def words(name: str, value: Value | None) -> str:
    """One difference, as :func:`describe` writes it."""
    if isinstance(value, str) and value.startswith("{"):
        value = value.replace('"', "").replace(": ", ":")
    return name if value is None else f"{name}={value}"
