"""What is deployed: the chosen serving config with its promise and its comments, in no format yet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner.errors import NothingFeasible
from tuner.pareto.changes import baseline_of
from tuner.pareto.choice import Choice
from tuner.pareto.front import Interval, Point
from tuner.pareto.recommend import recommended
from tuner.record.secrets import is_secret
from tuner.space.config import ServingConfig, Value
from tuner.spec.study import Study
from tuner.study.store import Store, TrialRecord

#: The launcher's own (an address, a random name, a key of one launch) and secrets: no part of a configuration.
LAUNCHERS_FLAGS = frozenset({"host", "port", "api-key", "hf-token", "served-model-name"})
PROMISE = "# promise: "


@dataclass(frozen=True, slots=True)
class Deployment:
    """``flags`` and ``env`` in order, without the launcher's own and without secrets (whose names are in
    ``secrets``); ``comments`` says per flag what it trades or what it was proven to do; ``about`` are lines on what was
    measured and on what; ``promise`` is the same as data, for re-certification. ``boot_s`` is the measured start-up."""

    name: str
    engine: str
    version: str
    model: str
    flags: Mapping[str, Value | None]
    env: Mapping[str, str]
    gpus: int
    emulated: bool
    boot_s: float
    about: tuple[str, ...]
    promise: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @property
    def local_model(self) -> bool:
        """Whether the model is a folder (and not an id of a hub)."""
        return self.model.startswith(("/", "./", "../", "~")) or Path(self.model).is_dir()

    def header(self) -> str:
        """The comment that heads every exported file; the first line of an emulated one says so."""
        lines = ["EMULATED: these figures come from a model of the hardware; nothing was measured."] * self.emulated
        return "".join(f"# {line}".rstrip() + "\n" for line in (*lines, *self.about)) + PROMISE + self._promise() + "\n"

    def _promise(self) -> str:
        return json.dumps(self.promise, sort_keys=True)


def deployment(
    store: Store, study: Study, choice: Choice | None = None, effects: Mapping[str, str] | None = None
) -> Deployment:
    """The deployment of ``choice`` (by default what :func:`recommended` says).

    ``effects`` maps a flag to what was proven of it (from ablation); it goes before the flag's own comment. Raises
    NothingFeasible, with the nearest configuration in words, where nothing met the SLOs.
    """
    trials = store.trials()
    choice = choice or recommended(store, study)
    point = choice.point
    if point is None:
        raise NothingFeasible(choice.text)
    config = point.config
    trial = next(t for t in reversed(trials) if t.config.hash == config.hash and t.outcome.steps)
    noted = trial.extra or {}
    flags = {flag: value for flag, value in config.flags.items() if flag not in LAUNCHERS_FLAGS}
    if study.engine.trust_remote_code:
        flags["trust-remote-code"] = None
    env = {name: value for name, value in config.env.items() if not is_secret(name)}
    version = str(study.space.facts.get("engine_version") or noted.get("engine_version") or "")
    promise = _promise(study, trial, point, version)
    return Deployment(
        name=re.sub(r"[^a-z0-9]+", "-", study.name.lower()).strip("-")[:40] or "study",
        engine=study.engine.kind,
        version=version,
        model=_model(store, study, config, str(noted.get("model_folder") or config.model)),
        flags=flags,
        env=env,
        gpus=config.gpus,
        emulated=trial.emulated,
        boot_s=trial.outcome.boot.total_s,
        about=_about(study, trials, point, choice, promise),
        promise=promise,
        comments=_comments(study, flags, effects or {}),
        secrets=tuple(name for name in config.env if name not in env),
    )


def _model(store: Store, study: Study, config: ServingConfig, served: str) -> str:
    """The model as it was served: for a variant the folder (or id) that the study names, or the one that the engine
    wrote into the study folder, wherever that lies now."""
    name = config.model_variant
    if not name:
        return config.model
    named = study.engine.options.get("variants", {})
    made = sorted((store.folder / "models").glob(f"*-{name}"))
    return str(named.get(name) or (made[0].resolve() if made else served))


def read_promise(path: Path) -> dict[str, Any] | None:
    """What an exported file promises: ``cost_usd_per_mtok_output``, ``latency``, ``load``, the SLOs and on what it was
    measured; None where the file carries no promise."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(PROMISE):
            return json.loads(line.removeprefix(PROMISE))
    return None


def _promise(study: Study, trial: TrialRecord, point: Point, version: str) -> dict[str, Any]:
    facts = study.space.facts
    noted = trial.extra or {}
    return {
        "study": study.name,
        "trial": point.trial,
        "role": point.role,
        "config": point.config.hash,
        "load": point.load,
        "cost_usd_per_mtok_output": round(point.cost, 6),
        study.objective.latency_key: round(point.latency, 6),
        "slo": [str(slo) for slo in study.objective.slos],
        "engine": f"{study.engine.kind} {version}".strip(),
        "gpu": str(noted.get("device") or facts.get("gpu_name") or study.hardware.name),
        "gpus": point.config.gpus,
        "driver": str(noted.get("driver", "")),
        "trace": Path(study.trace.file).name,
        "date": datetime.fromtimestamp(trial.ended_s, UTC).strftime("%Y-%m-%d"),
    }


def _about(
    study: Study,
    trials: list[TrialRecord],
    point: Point,
    choice: Choice,
    promise: Mapping[str, Any],
) -> tuple[str, ...]:
    objective = study.objective
    machine = f"{max(point.config.gpus, 1)} x {promise['gpu']}" if point.config.gpus else f"CPU ({promise['gpu']})"
    repeats = f", {len(point.trials)} measurements" if len(point.trials) > 1 else ""
    lines = [
        f"Best configuration of study {study.name!r}: trial {point.trial}, {promise['date']}, by tuner.",
        f"Measured on {promise['engine']}, {machine}, with {Path(study.trace.file).name} at load {point.load:g}"
        + repeats
        + (" (held-out windows)." if point.role == "verify" else " (search windows: not verified yet)."),
        f"Cost {point.cost:.4g} USD per million output tokens within SLO{_between(point.cost_interval)}, at "
        f"{objective.price_usd_per_gpu_hour:g} USD per {'GPU' if point.config.gpus else 'server'}-hour.",
        f"{objective.latency} {point.latency * 1e3:.4g} ms{_between(point.latency_interval, 1e3)}. "
        f"SLOs: {', '.join(map(str, objective.slos)) or 'none'}.",
    ]
    if point.baseline:
        lines.append("This is the engine's default: nothing measured is proven to be better.")
    elif choice.cost_change and choice.latency_change:
        lines.append(
            f"Against the engine's default at its own capacity: cost {choice.cost_change}, "
            f"{objective.latency} {choice.latency_change}."
        )
    elif baseline_of(trials):
        lines.append("The engine's default met the SLOs at no measured load.")
    if point.config.model_variant:
        lines.append(f"The model was served as its variant {point.config.model_variant!r}.")
    return tuple(lines)


def _between(interval: Interval | None, scale: float = 1.0) -> str:
    return f" (95 %: {interval[0] * scale:.4g} to {interval[1] * scale:.4g})" if interval else ""


def _comments(study: Study, flags: Mapping[str, Value | None], effects: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for flag in flags:
        words = [effects[flag]] if flag in effects else []
        parameters = [
            p
            for p in study.space.parameters
            if any(name.partition(".")[0] == flag for emission in p.emissions for name in emission.flags)
        ]
        for p in parameters:
            default = "on" if p.default is True else "off" if p.default is False else p.default
            words.append(f"{p.name} (default {default})" + (f": {p.trades}" if p.trades else ""))
        if not parameters:
            words.append("given by the study to every server")
        found[flag] = "; ".join(words)
    return found
