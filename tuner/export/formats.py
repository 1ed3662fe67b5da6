"""Exports: the chosen configuration, from the study folder alone, in the format that is asked for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from tuner.engines.command import LAUNCHERS, PLACE, filled
from tuner.errors import UsageError, replacing
from tuner.export import containers, vllm
from tuner.export.deployment import Deployment, deployment
from tuner.export.text import comments
from tuner.pareto.choice import Choice
from tuner.record.secrets import hide, secrets
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.store import Store

FORMATS = ("vllm", "compose", "k8s", "helm")
_CONTAINERS: Mapping[str, tuple[str, Callable[[Deployment], str]]] = {
    "compose": ("compose.yaml", containers.compose),
    "k8s": ("k8s.yaml", containers.kubernetes),
    "helm": ("values.yaml", containers.helm),
}


def export(store: Store, study: Study, format: str = "vllm", *, choice: Choice | None = None) -> dict[str, str]:
    """File name -> text. ``vllm``: best-config.yaml and best-config.env; ``compose``, ``k8s``, ``helm``: one file.

    Raises UsageError for a format that the study's engine does not have, NothingFeasible where nothing met the SLOs.
    """
    what = deployment(store, study, choice)
    if format == "vllm":
        body = vllm.config_text(what) if what.engine in ("vllm", "emulator") else _generic(what, store, study)
        return {vllm.YAML_NAME: body, vllm.ENV_NAME: vllm.env_text(what)}
    if format not in _CONTAINERS:
        raise UsageError(f"there is no export format {format!r}", fix=f"It is one of {', '.join(FORMATS)}.")
    if what.engine not in ("vllm", "emulator"):
        raise UsageError(
            f"--format {format} is made for vLLM, this study's engine is {what.engine}",
            fix="Leave --format out: best-config.yaml has what was measured.",
        )
    name, make = _CONTAINERS[format]
    return {name: make(what)}


def best_config(store: Store, study: Study, *, choice: Choice | None = None) -> tuple[Path, Path]:
    """Writes ``best-config.yaml`` and ``best-config.env`` into the study folder; returns their paths.

    Raises NothingFeasible (and writes nothing) where nothing met the SLOs.
    """
    files = export(store, study, choice=choice)
    paths = [store.folder / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        with replacing(path) as half:
            half.write_text(text, encoding="utf-8")
    return paths[0], paths[1]


def exported(store: Store) -> list[tuple[str, Path]]:
    """The formats for containers whose files are in the study folder, with those."""
    return [(form, path) for form, (name, _) in _CONTAINERS.items() if (path := store.folder / name).exists()]


def _generic(what: Deployment, store: Store, study: Study) -> str:
    """Flags of another engine by name, of the command engine below the command that they make; of a function without
    any the parameters."""
    flags = {flag: True if value is None else value for flag, value in {**what.served, **what.flags}.items()}
    if what.engine == "function" and not flags and (trial := store.trial(what.promise.trial or 0)):
        flags = dict(trial.params)
    body = vllm.commented(what, {"model": what.model, **flags})
    return "".join((what.header(), _started(what, study), *body))


def _started(what: Deployment, study: Study) -> str:
    """A comment: the command that starts this server, with the places of every launch left open."""
    if what.engine != "command" or not study.engine.command:
        return ""
    places = {name: f"{{{name}}}" for name in LAUNCHERS} | {"model": what.model}
    try:
        words = filled(study.engine.command, ServingConfig(what.model, {}, what.flags), places, flags=True)
    except UsageError:  # a place of a flag that is not exported
        return ""
    line = " ".join(word if PLACE.fullmatch(word) else shlex.quote(word) for word in words)
    said = "Started as follows; what stands in braces is chosen at every launch."
    return comments((said, hide(line, (known for known in secrets(study, ()) if not PLACE.fullmatch(known)))))
