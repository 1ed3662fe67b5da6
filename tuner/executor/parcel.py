"""A trial's files on their way home: in Ray's object store, or over any path that fsspec knows when they are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from tuner.errors import EnvironmentFault

LARGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Parcel:
    """``files`` by path relative to the trial's folder; those that are too large lie at ``url``."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    url: str = ""


def pack(folder: Path, store: str = "", large_bytes: int = LARGE_BYTES) -> Parcel:
    """Everything below ``folder``. With ``store`` (``s3://bucket/x``, ``/shared/x``), what is larger than
    ``large_bytes`` in all goes there, else with the parcel."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not store or sum(path.stat().st_size for path in paths) <= large_bytes:
        return Parcel({str(path.relative_to(folder)): path.read_bytes() for path in paths})
    url = f"{store.rstrip('/')}/{uuid4().hex}"
    system, root = _system(url)
    for path in paths:
        there = f"{root}/{path.relative_to(folder)}"
        system.makedirs(there.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), there)
    return Parcel(url=url)


def unpack(parcel: Parcel, folder: Path) -> None:
    """Writes the parcel's files below ``folder``; what lay at its URL is removed there afterwards.

    Raises ``EnvironmentFault`` where the URL cannot be read from here.
    """
    for name, content in parcel.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if not parcel.url:
        return
    system, root = _system(parcel.url)
    found = system.find(root)
    if not found:
        raise EnvironmentFault(
            f"nothing is found at {parcel.url}", fix="executor.store must be readable from all nodes"
        )
    for there in found:
        path = folder / there.removeprefix(str(root)).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(there, str(path))
    system.rm(root, recursive=True)


def _system(url: str):  # fsspec has no types
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise EnvironmentFault(f"executor.store {url}: {error}", fix="install the fsspec package for it") from None
