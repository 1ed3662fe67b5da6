"""What is deployed: the chosen serving config with its promise and its comments, in no format yet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner.errors import NothingFeasible
from tuner.export.text import ambiguous, comments
from tuner.pareto.changes import baseline_of, no_baseline
from tuner.pareto.choice import Choice
from tuner.pareto.front import Interval, Point
from tuner.pareto.recommend import ablation, quality_of, recommended, short_windows
from tuner.pareto.traffic import price_words, traffic
from tuner.record.secrets import is_secret
from tuner.search.hardware import device_of
from tuner.space.config import ServingConfig, Value
from tuner.space.space import Parameter
from tuner.spec.study import Study
from tuner.study.store import AsWritten, Store, TrialRecord, read_json
from tuner.verify.fingerprint import Fingerprint
from tuner.verify.promise import PRICE, Promise, promise_block
from tuner.verify.repeats import NO_SPREAD, Spread
from tuner.words import figure

#: The launcher's own (an address, a random name, a key of one launch) and secrets: no part of a configuration.
LAUNCHERS_FLAGS = frozenset({"host", "port", "api-key", "hf-token", "served-model-name"})


@dataclass(frozen=True, slots=True)
class Deployment:
    """``flags`` and ``env`` in order, without the launcher's own and without secrets (whose names are in
    ``secrets``); ``comments`` says per flag, variable and parameter what it trades or what it was proven to do;
    ``about`` are lines on what was measured and on what; ``promise`` is the same as data, for re-certification
    (``tuner verify``). ``boot_s`` is the measured start-up."""

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
    promise: Promise
    comments: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @property
    def local_model(self) -> bool:
        """Whether the model is a folder (and not an id of a hub)."""
        return _is_folder(self.model)

    @property
    def served(self) -> Mapping[str, Value | None]:
        """The name that clients ask for, where the model is a folder: else they would have to name its path."""
        if not self.local_model or self.engine not in ("vllm", "sglang", "emulator"):
            return {}
        named = self.promise.config.model  # a variant's folder may stand for a hub's id
        return {"served-model-name": Path(named).name if _is_folder(named) else named}

    def header(self) -> str:
        """The comment that heads every exported file; the first line of an emulated one says so."""
        lines = ["EMULATED: these figures come from a model of the hardware; nothing was measured."] * self.emulated
        return comments((*lines, *self.about)) + promise_block(self.promise)


def _is_folder(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()


def deployment(
    store: Store, study: Study, choice: Choice | None = None, trials: Sequence[TrialRecord] | None = None
) -> Deployment:
    """The deployment of ``choice`` (by default what :func:`recommended` says, ``trials`` as there). Raises
    NothingFeasible, with the nearest configuration in words, where nothing met the SLOs."""
    trials = store.trials() if trials is None else trials
    choice = choice or recommended(store, study, trials)
    point = choice.point
    if point is None:
        raise NothingFeasible(choice.text)
    config = point.config
    served = [t for t in trials if t.outcome.steps and t.config.hash == config.hash]
    trial = (served or [t for t in trials if t.number == point.trial])[-1]
    noted = trial.extra or {}
    flags = {flag: value for flag, value in config.flags.items() if flag not in LAUNCHERS_FLAGS}
    left = [f"--{flag}" for flag, value in flags.items() if isinstance(value, str) and is_secret(flag, value)]
    flags = {flag: value for flag, value in flags.items() if f"--{flag}" not in left}
    env = {name: value for name, value in config.env.items() if not is_secret(name, value)}
    version = str(noted.get("engine_version") or "")
    model = _model(store, study, config, str(noted.get("model_folder") or config.model))
    promise = _promise(store, study, trial, point, replace(config, flags=dict(flags), env=env), model, version)
    if study.engine.trust_remote_code:  # not in the promise: there the engine decides
        flags["trust-remote-code"] = None
    return Deployment(
        name=_name(study.name),
        engine=study.engine.kind,
        version=version,
        model=model,
        flags=flags,
        env=env,
        gpus=config.gpus,
        emulated=trial.emulated,
        boot_s=trial.outcome.boot.total_s,
        about=_about(study, trials, point, choice, promise),
        promise=promise,
        comments=_comments(study, config, flags, _effects(store, study, config)),
        secrets=(*(name for name in config.env if name not in env), *left),
    )


def _name(study: str) -> str:
    """The study's name as one of a Kubernetes Service, which is the strictest (RFC 1035): small letters, digits and
    hyphens, a letter first and no hyphen last. Short enough for ``-secrets`` after it, and no word that YAML reads as
    something else (``on``): vLLM's chart writes it without quotes."""
    name = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")
    return (name if name[:1].isalpha() and not ambiguous(name) else f"study-{name}")[:40].strip("-")


def _model(store: Store, study: Study, config: ServingConfig, served: str) -> str:
    """The model as it was served: for a variant the folder (or id) that the study names, or the one that the engine
    wrote into the study folder, wherever that lies now."""
    name = config.model_variant
    if not name:
        return config.model
    named = study.engine.options.get("variants", {})
    made = sorted((store.folder / "models").glob(f"*-{name}"))
    return str(named.get(name) or (made[0].resolve() if made else served))


def _promise(
    store: Store, study: Study, trial: TrialRecord, point: Point, config: ServingConfig, model: str, version: str
) -> Promise:
    """``config`` is the one without secrets. Hashes and driver are in the fingerprint where the trial noted them."""
    noted = trial.extra or {}
    known = {
        "engine": study.engine.kind,
        "engine_version": version,
        "gpu": study.hardware.name,
        "model": Path(model).name,
        "trace": Path(study.trace.file).name,
        "date": datetime.fromtimestamp(trial.ended_s, UTC).strftime("%Y-%m-%d"),
    }
    path = store.folder / "verify.json"
    verdict = read_json(path) if point.role == "verify" else {}
    with AsWritten(path):
        said = verdict.get("spread")
        spread = Spread(float(said["variance"]), float(said["freedom"])) if said else NO_SPREAD
        confidence = float(verdict.get("confidence", 0.95))
    unknown = (math.nan, math.nan)
    return Promise(
        study=study.name,
        trial=point.trial,
        config=config,
        load=point.load,
        slos=study.objective.slos,
        cost=(point.cost, *(point.cost_interval or unknown)),
        latency_metric=study.objective.latency,
        latency=(point.latency, *(point.latency_interval or unknown)),
        fingerprint=Fingerprint.from_dict(known | dict(noted.get("fingerprint") or {}) | _node(study, noted)),
        spread=spread,
        confidence=confidence,
        details={"role": point.role, PRICE: trial.price or study.objective.price_usd_per_gpu_hour},
    )


def _node(study: Study, noted: Mapping[str, Any]) -> dict[str, str]:
    """GPU and driver of a trial that ran on another machine: the fingerprint of its record is of the tuner's own."""
    if not noted.get("node"):
        return {}
    gpu = device_of(str(noted.get("device") or ""), study.hardware.rows)
    return {"gpu": gpu, "driver": str(noted.get("driver") or "")}


def _about(
    study: Study,
    trials: Sequence[TrialRecord],
    point: Point,
    choice: Choice,
    promise: Promise,
) -> tuple[str, ...]:
    objective = study.objective
    on = promise.fingerprint
    machine = f"{point.config.gpus} x {on.gpu}" if point.config.gpus else f"CPU ({on.gpu})"
    title = "Configuration, picked by hand," if choice.by_hand else "Best configuration"
    repeats = f", {len(point.trials)} measurements" if len(point.trials) > 1 else ""
    lines = [
        f"{title} of study {study.name!r}: trial {point.trial}, {on.date}, by tuner.",
        f"Measured on {on.engine} {on.engine_version}, {machine}, {f'with {on.trace} ' if on.trace else ''}at "
        f"load {figure(point.load, 4)}{repeats} ({_windows(trials, point)}).",
        f"Cost {figure(point.cost, 4)} USD per million output tokens within SLO{_between(point.cost_interval)}, at "
        f"{price_words(objective, point.config.gpus, promise.price)}.",
        f"{objective.latency} {figure(point.latency * 1e3, 4)} ms{_between(point.latency_interval, 1e3)}. "
        f"SLOs: {', '.join(map(str, objective.slos)) or 'none'}.",
    ]
    if point.role == "verify" and point.latency_interval is None:
        lines.append("Launched once: how sure it is that the SLOs hold at this load is not known.")
    if short := short_windows(study, trials, point):
        lines.append(short)
    if served := traffic(trials, objective, point, choice.cost_change):
        lines.append(str(served))
    if point.baseline:
        proven = "" if choice.by_hand else ": nothing measured is proven to be better"
        lines.append(f"This is the engine's default{proven}.")
    elif choice.cost_change:
        latency = f", {objective.latency} {choice.latency_change}" if choice.latency_change else ""
        lines.append(f"Against the engine's default at its own capacity: cost {choice.cost_change}{latency}.")
    elif baseline_of(trials):
        lines.append(no_baseline(trials))
    if said := quality_of(trials, point.config):
        lines.append(f"quality: {said}")
    if point.config.model_variant:
        lines.append(f"The model was served as its variant {point.config.model_variant!r}.")
    if point.config.random_weights:
        lines.append("RANDOM WEIGHTS (load-format dummy): the answers mean nothing until that flag is taken out.")
    return tuple(lines)


def _windows(trials: Sequence[TrialRecord], point: Point) -> str:
    if point.role == "verify":
        return "held-out windows"
    held_out = ", ".join(str(t.number) for t in trials if t.role == "verify" and t.config.hash == point.config.hash)
    return f"search windows; on held-out windows: trial {held_out}" if held_out else "search windows: not verified yet"


def _effects(store: Store, study: Study, config: ServingConfig) -> dict[str, str]:
    """Per parameter what ablation measured of it, in words."""
    found = ablation(store, study, config) or {"effects": ()}
    words = {}
    for effect in found["effects"]:
        middle, low, high = (f"{(x - 1) * 100:+.1f}" for x in effect["cost_without"])
        known = math.isfinite(effect["cost_without"][0])
        words[effect["parameter"]] = effect["why"] + (
            f" (cost {middle} %, {low} to {high} %, without it)" if known else ""
        )
    return words


def _between(interval: Interval | None, scale: float = 1.0) -> str:
    if interval is None:
        return ""
    low, high = (figure(x * scale, 4) for x in interval)
    return f" (95 %: {low} to {high})" if math.isfinite(interval[1]) else f" (95 %: at least {low})"


def _comments(
    study: Study, config: ServingConfig, flags: Mapping[str, Value | None], effects: Mapping[str, str]
) -> dict[str, str]:
    """By what stands in the files: a flag, a variable, ``model`` where it is a variant, a parameter of a function."""
    givers: dict[str, list[Parameter]] = {flag: [] for flag in flags}
    for p in study.space.parameters:
        given = {p.name} if study.engine.kind == "function" else set()
        for emission in p.emissions:
            given |= {*(name.partition(".")[0] for name in emission.flags), *emission.env}
            given |= {"model"} if config.model_variant and emission.model_variant == config.model_variant else set()
        for name in given:
            givers.setdefault(name, []).append(p)
    found: dict[str, str] = {}
    for name, parameters in givers.items():
        words = ["; ".join(effects[p.name] for p in parameters if p.name in effects)]
        for p in parameters:
            default = "on" if p.default is True else "off" if p.default is False else p.default
            words.append(f"{p.name} (default {default})" + (f": {p.trades}" if p.trades else ""))
        if not parameters:
            words.append("given to every server, not tuned")
        if name == "load-format" and config.random_weights:
            words.append("RANDOM WEIGHTS: take this out to serve the model")
        found[name] = "; ".join(filter(None, words))
    return found
