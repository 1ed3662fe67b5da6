"""Where the shipped search spaces and objectives are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

from tuner.errors import UsageError
from tuner.spec.text import suggest


def root(folder: str) -> Path:
    """The folder of shipped YAML files (``search_spaces`` or ``objectives``)."""
    package = Path(__file__).parents[1]
    inside = package / "_shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


def names(folder: str) -> list[str]:
    """What is shipped, as the names a study writes: ``vllm/quick``."""
    base = root(folder)
    return sorted(str(path.relative_to(base).with_suffix("")) for path in base.rglob("*.yaml"))


def find(folder: str, name: str, beside: Path, where: str) -> Path:
    """The file that ``name`` means: a path (relative to ``beside``) or a shipped name; else raises UsageError."""
    for path in (beside / name, Path(name)):
        if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
            return path
    shipped = root(folder) / f"{name}.yaml"
    if os.path.isfile(shipped):
        return shipped
    what = folder.replace("_", " ").rstrip("s")
    raise UsageError(f"no {what} named {name!r}", where=where, fix=suggest(name, names(folder)))
