"""What a trial is in MLflow: pure data, made from the trial's record; nothing here knows the MLflow library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.pareto.front import COST
from tuner.record.secrets import HIDDEN, hide, is_secret
from tuner.space.config import ServingConfig
from tuner.space.space import Parameter
from tuner.spec.study import Study
from tuner.study.outcome import Aborted, Infeasible, Measured, Outcome, Untrusted, held, held_everywhere
from tuner.study.store import TrialRecord

if TYPE_CHECKING:
    import pandas as pd

PARAM_CHARACTERS, TAG_CHARACTERS, NAME_CHARACTERS = 6000, 5000, 250
SYSTEM_POINTS = 500  # per telemetry series: enough for a chart, and a trial of hours stays a small request
_ILLEGAL = re.compile(r"[^A-Za-z0-9_\-.:/ ]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric; ``step`` is the ladder position (or the telemetry row), ``at_ms`` Unix milliseconds."""

    name: str
    value: float
    step: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Content:
    """A child run: everything MLflow is told of one trial. ``status`` is one of MLflow's run states."""

    name: str
    params: Mapping[str, str]
    samples: tuple[Sample, ...]
    tags: Mapping[str, str]
    artifacts: tuple[Path, ...]
    status: str
    start_ms: int
    end_ms: int


def content(trial: TrialRecord, study: Study, secrets: Sequence[str] = ()) -> Content:
    """The child run of ``trial``, without ``secrets``. A metric that is not finite becomes a tag: MLflow would store it
    as 1.8e308."""
    samples, odd = [], {}
    for sample in _samples(trial, study):
        if math.isfinite(sample.value):
            samples.append(sample)
        else:
            odd.setdefault(f"not_finite.{sample.name}", []).append(f"step {sample.step}: {sample.value}")
    tags = _tags(trial) | {name: ", ".join(values) for name, values in odd.items()}
    name = f"{trial.number:04d} " + ("default" if trial.baseline else trial.config.hash)
    return Content(
        name=("[emulated] " if trial.emulated else "") + name,
        params={legal(key): hide(value, secrets)[:PARAM_CHARACTERS] for key, value in _params(trial, study).items()},
        samples=tuple(samples),
        tags={legal(key): hide(value, secrets)[:TAG_CHARACTERS] for key, value in tags.items() if value},
        artifacts=tuple(
            path for path in sorted(trial.folder.glob("*")) if path.suffix in (".json", ".log", ".parquet")
        ),
        status=status(trial.outcome),
        start_ms=int(trial.started_s * 1000),
        end_ms=int(trial.ended_s * 1000),
    )


def status(outcome: Outcome) -> str:
    """MLflow's run state: FINISHED, FAILED (there is no number: infeasible or untrusted), KILLED (stopped early)."""
    return "FINISHED" if isinstance(outcome, Measured) else "KILLED" if isinstance(outcome, Aborted) else "FAILED"


def reason(outcome: Outcome) -> str:
    """Why there is no full measurement, in a few words; empty where there is one."""
    match outcome:
        case Infeasible(cause=cause, message=message):
            return f"{cause}: {message}"
        case Untrusted(reasons=reasons):
            return "; ".join(reasons)
        case Aborted(reason=why):
            return why
    return ""


def legal(name: str) -> str:
    """``name`` as MLflow takes it: letters, digits, ``_-.:/`` and space, no path tricks, at most 250 characters."""
    parts = [part for part in _ILLEGAL.sub("_", name.lstrip("-")).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:NAME_CHARACTERS] or "_"


def flag_values(config: ServingConfig) -> dict[str, str]:
    """The flags as name -> value: a switch is ``true`` (``no-X`` is ``X`` = ``false``), a JSON value is taken apart as
    vLLM's own dotted flags (``speculative-config.method``)."""
    found: dict[str, str] = {}
    for flag, value in config.flags.items():
        body = _mapping(value)
        if body:
            found |= {f"{flag}.{key}": text(inner) for key, inner in body.items()}
        elif value is None:
            found[flag.removeprefix("no-")] = "false" if flag.startswith("no-") else "true"
        else:
            found[flag] = text(value)
    return found


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _params(trial: TrialRecord, study: Study) -> dict[str, str]:
    """Flags under the engine's own names. A parameter at its default is logged too (under its flag, where it has one
    only), or the baseline would have no place in MLflow's parallel coordinates."""
    found = flag_values(trial.config)
    for parameter in study.space.parameters:
        flag = _only_flag(parameter)
        if flag and flag not in found and parameter.name in trial.config.params:
            found[flag] = text(trial.config.params[parameter.name])
    found |= {f"env.{name}": value for name, value in trial.config.env.items()}
    if trial.config.model_variant:
        found["model-variant"] = trial.config.model_variant
    found |= {"model": trial.config.model, "gpus": str(trial.config.gpus)}
    return {name: HIDDEN if is_secret(name) else value for name, value in found.items()}


def _only_flag(parameter: Parameter) -> str:
    flags = {flag.removeprefix("no-") for emission in parameter.emissions for flag in emission.flags}
    return flags.pop() if len(flags) == 1 else ""


def _mapping(value: Any) -> dict[str, Any] | None:
    if not (isinstance(value, str) and value.startswith("{")):
        return None
    try:
        body = json.loads(value)
    except json.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _tags(trial: TrialRecord) -> dict[str, str]:
    outcome = trial.outcome
    tags = {
        "tuner.trial": str(trial.number),
        "outcome": type(outcome).__name__.lower(),
        "reason": reason(outcome),
        "baseline": text(trial.baseline),
        "emulated": text(trial.emulated),
        "role": trial.role,
        "config": trial.config.hash,
        "flags": " ".join(trial.config.args()),
    }
    if isinstance(outcome, Infeasible):
        tags |= {"cause": outcome.cause, "stage": outcome.stage, "evidence": outcome.evidence, "fix": outcome.fix}
    misses = [f"load {s.load:g}: {', '.join(s.slo_misses)}" for s in outcome.steps if s.slo_misses]
    tags |= {"slo_misses": "; ".join(misses)}
    if trial.remeasure_of is not None:
        tags["remeasure_of"] = str(trial.remeasure_of)
    for name, value in (trial.extra or {}).items():
        if isinstance(value, str | int | float | bool):
            tags.setdefault(name, text(value))
    return tags


def _samples(trial: TrialRecord, study: Study) -> Iterator[Sample]:
    end_ms = int(trial.ended_s * 1000)
    steps = trial.outcome.steps
    for position, step in enumerate(steps):
        yield Sample("load", step.load, position, end_ms)
        for name, value in step.metrics.items():
            yield Sample(_theirs(name), float(value), position, end_ms)
        for name, bounds in step.intervals.items():
            yield from (
                Sample(_theirs(f"{name}.{side}"), bound, position, end_ms)
                for side, bound in zip(("low95", "high95"), bounds, strict=True)
            )
    good = [step for step in steps if step.ok] if isinstance(trial.outcome, Measured | Aborted) else []
    if good and isinstance(trial.outcome, Measured):  # one that was stopped might have held more
        yield Sample("capacity_load", held_everywhere(steps), 0, end_ms)
    if good and len(held(steps)) == 1:  # the best of several would be of different windows
        for key in (COST, study.objective.latency_key):
            values = [step.metrics[key] for step in good if math.isfinite(step.metrics.get(key, math.inf))]
            if values:
                yield Sample(legal(f"best_{key}"), min(values), 0, end_ms)
    boot = trial.outcome.boot
    yield Sample("boot_s", boot.total_s, 0, end_ms)
    for phase, seconds in boot.phases_s.items():
        yield Sample(legal(f"boot_{phase}_s"), seconds, 0, end_ms)
    for name, value in boot.facts.items():
        yield Sample(legal(name), float(value), 0, end_ms)
    yield Sample("trial_s", trial.ended_s - trial.started_s, 0, end_ms)
    yield from _system(trial.folder / "telemetry.parquet")


def _theirs(name: str) -> str:
    """A step's metric, which a function may have named as one of ours."""
    ours = name in ("load", "capacity_load", "trial_s") or name.startswith(("best_", "boot_", "system/"))
    return legal(f"user.{name}" if ours else name)


def _system(path: Path) -> Iterator[Sample]:
    """Host and GPU series (what :func:`tuner.server.telemetry.write` wrote: a row per look and GPU): every figure,
    thinned evenly, at its own time; ``system/gpu0_power_w`` is the first GPU's."""
    if not path.exists():
        return
    import pandas as pd

    table = pd.read_parquet(path).select_dtypes("number")
    if "at_s" not in table:
        return
    of_gpus = [column for column in table if column.startswith("gpu_")]
    yield from _series(table.drop(columns=of_gpus).drop_duplicates("at_s"), "system/")
    for gpu, rows in table.groupby("gpu_index") if "gpu_index" in table else ():
        own = rows[["at_s", *of_gpus]].drop(columns="gpu_index")
        yield from _series(own.rename(columns=lambda name: name.removeprefix("gpu_")), f"system/gpu{gpu:g}_")  # pyright: ignore[reportCallIssue]


def _series(table: pd.DataFrame, prefix: str) -> Iterator[Sample]:
    table = table.iloc[:: max(1, math.ceil(len(table) / SYSTEM_POINTS))]
    at_ms = [int(at_s * 1000) for at_s in table["at_s"]]
    for column in table.columns.drop("at_s"):
        for step, (at, value) in enumerate(zip(at_ms, table[column].tolist(), strict=True)):
            if math.isfinite(value):  # a gap in the telemetry is a gap in the chart, not a tag per second
                yield Sample(legal(f"{prefix}{column}"), float(value), step, at)
