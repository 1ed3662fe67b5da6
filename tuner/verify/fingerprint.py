"""The fingerprint: on what a promise was measured, so that a change of version, GPU or traffic is seen."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tuner.load.trace import Trace, with_earlier

Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything is text; empty where it is not known. ``date`` is ISO 8601 (``2026-11-23``); ``model_hash`` of a hub's
    model is its commit."""

    engine: str = ""
    engine_version: str = ""
    driver: str = ""
    gpu: str = ""
    model: str = ""
    model_hash: str = ""
    trace: str = ""
    trace_hash: str = ""
    date: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> Fingerprint:
        """Unknown keys (of a later version of the tuner) are passed over."""
        return cls(**{f.name: str(data.get(f.name, "")) for f in fields(cls)})

    def changes(self, now: Fingerprint) -> list[str]:
        """What differs, in words; the date does not count, nor what one side does not know."""
        found = []
        for name in (f.name for f in fields(self) if f.name not in ("date", "model", "trace")):
            before, after = getattr(self, name), getattr(now, name)
            if before and after and before != after:
                found.append(f"{name.replace('_', ' ')} {before} -> {after}")
        return found


def trace_hash(windows: Sequence[Trace]) -> str:
    """Twelve hex digits over arrivals, lengths and prefixes of ``windows`` (and of what fills the cache before them),
    in order."""
    digest = hashlib.sha256()
    for window in map(with_earlier, windows):
        for column in (window.arrival_s, window.input_tokens, window.output_tokens, window.block_ids):
            digest.update(column.tobytes())
    return digest.hexdigest()[:12]


def model_hash(folder: Path) -> str:
    """Twelve hex digits over the model folder's JSON files and the names, sizes and first 64 KiB (for safetensors: the
    list of tensors) of its weight files. It sees another model or another quantization; it does not read the weights
    to the last byte. Empty where ``folder`` is no folder."""
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".gguf", ".pt"):
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(65536))
    return digest.hexdigest()[:12]


def driver(run: Run | None = None) -> str:
    """The NVIDIA driver's version; empty without one."""
    if run is None and shutil.which("nvidia-smi") is None:
        return ""
    try:
        text = (run or _run)(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\d+(\.\d+)+", text)
    return match.group() if match else ""


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
