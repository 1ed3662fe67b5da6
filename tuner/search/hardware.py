"""The hardware a study runs on: a row of the table in gpus.yaml, or of the study's own (``hardware.table``)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from tuner.errors import UsageError
from tuner.server.gpu import Gpus
from tuner.spec.facts import cpu_flags
from tuner.spec.study import Rows
from tuner.spec.text import plain

_TABLE = Path(__file__).with_name("gpus.yaml")
_NEEDED = frozenset({"name", "memory_gib", "bandwidth", "tflops", "source"})
_KEYS = _NEEDED | {"match", "kind", "capability", "bandwidth_limit", "link", "link_latency_us", "op_us", "price"}
_KEYS |= {"unpack_gweights"}
_FORMATS = frozenset({"bf16", "fp8", "int8", "fp4", "fp32"})


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator, or one CPU server.

    ``flops`` maps a number format to dense operations per second; formats that the hardware lacks run as bf16
    (:meth:`rate`). ``link_bytes_per_s`` is one direction to the node's other GPUs. ``op_s`` is the cost of one
    operation where the hardware (a CPU) has its own; None: the model's kernel time. ``unpack_weights_per_s``: how many
    weights of a weight-only quantization it widens per second, where that is not hidden behind the reading; 0: it is.
    ``price_usd_per_hour`` is per GPU, or per server. ``source`` names the data sheet; ``capability`` is CUDA's compute
    capability, 0 where there is none.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    link_bytes_per_s: float
    link_latency_s: float
    price_usd_per_hour: float
    kind: str = "gpu"
    op_s: float | None = None
    unpack_weights_per_s: float = 0.0
    cores: int = 0
    capability: float = 0.0
    match: tuple[str, ...] = ()
    source: str = ""
    bandwidth_limit: float = field(default=math.inf, repr=False)

    def rate(self, fmt: str) -> float:
        """Operations per second in ``fmt``. fp4 without its own units is widened to bf16 while it is read; a missing
        fp8, int8 or fp32 runs on the bf16 units."""
        return self.flops.get(fmt) or self.flops["bf16"]

    def with_cores(self, cores: int, memory_bytes: int | None = None) -> Hardware:
        """This CPU row for ``cores`` cores: arithmetic and price scale, bandwidth up to the socket's limit."""
        return replace(
            self,
            cores=cores,
            memory_bytes=memory_bytes or self.memory_bytes,
            bandwidth_bytes_per_s=min(self.bandwidth_bytes_per_s * cores, self.bandwidth_limit),
            flops={fmt: rate * cores for fmt, rate in self.flops.items()},
            unpack_weights_per_s=self.unpack_weights_per_s * cores,
            price_usd_per_hour=self.price_usd_per_hour * cores,
        )

    def shared_by(self, ranks: int) -> Hardware:
        """What one of ``ranks`` ranks on the same CPU server has of it."""
        return replace(
            self,
            cores=self.cores // ranks,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s / ranks,
            flops={fmt: rate / ranks for fmt, rate in self.flops.items()},
            unpack_weights_per_s=self.unpack_weights_per_s / ranks,
        )


def table(own: Rows = ()) -> dict[str, Hardware]:
    """All rows by name: ours, then a study's ``own`` (:func:`written`), which win."""
    return {**_ours(), **{str(row["name"]): _row(row, "hardware.table") for row in own}}


@cache
def _ours() -> Mapping[str, Hardware]:
    return {row.name: row for _, row in _read(_TABLE)}  # once: every price and every name of a GPU asks for it


def lookup(name: str, rows: Mapping[str, Hardware] | None = None) -> Hardware | None:
    """The row that ``name`` means: the row's own name (``H100-SXM``, in any case, with any of ``-_ ``), or a name as
    the driver writes it (``NVIDIA H100 80GB HBM3``), the later of two rows that match alike; None where none does."""
    rows = table() if rows is None else rows
    wanted = _plain(name)
    for row in rows.values():
        if _plain(row.name) == wanted:
            return row
    words = set(name.replace("-", " ").replace("_", " ").replace("/", " ").lower().split())
    matching = [row for row in reversed([*rows.values()]) if row.match and {m.lower() for m in row.match} <= words]
    return max(matching, key=lambda row: len(row.match), default=None)


def device_of(word: str, own: Rows = ()) -> str:
    """The hardware table's name for what Ray, a driver or a user calls a GPU; the word itself where it has no row."""
    row = lookup(word, table(own)) if word else None
    return row.name if row else word


def detect(own: Rows = (), probe: Callable[[], tuple[str, int] | None] | None = None) -> tuple[Hardware | None, str]:
    """The hardware of this machine and a line that says what was found.

    ``probe`` gives the first GPU's name and memory in bytes, or None without a GPU (NVML by default).
    A GPU without a row: None, and how to give it one; no GPU: the CPU's row.
    """
    found = (probe or gpu)()
    if found is None:
        row = cpu()
        strange = strangers()
        none = f"no NVIDIA GPU ({strange} is here, which tuner cannot tune)" if strange else "no GPU"
        return row, f"{none}; {row.cores} CPU cores as {row.name}"
    rows = table(own)
    name, memory_bytes = found
    row = lookup(name, rows)
    if row is None:
        near = nearest(memory_bytes, rows)
        return None, (
            f"{name} ({memory_bytes / 2**30:.0f} GiB) is not in the hardware table: the search works without a model. "
            f"A row of your own gives it one (hardware: {{table: FILE}}): copy that of {near.name}, the nearest by "
            f"memory, from {_TABLE} and put {name}'s figures in"
        )
    return replace(row, memory_bytes=memory_bytes), f"{name} as {row.name}"


def strangers(root: Path = Path("/")) -> str:
    """This machine's accelerators that are not NVIDIA's, in words; empty where there are none. A CPU's own graphics
    count: Linux tells them from a card by name alone."""
    vendors = {"0x1002": "an AMD GPU", "0x8086": "an Intel GPU"}
    found = set()
    for file in (root / "sys/class/drm").glob("renderD*/device/vendor"):
        with contextlib.suppress(OSError):
            found.add(vendors.get(file.read_text().strip(), ""))
    if [*(root / "dev").glob("accel[0-9]*"), *(root / "dev").glob("accel/accel*")]:
        found.add("an accelerator (a TPU, Gaudi or NPU)")
    return " and ".join(sorted(found - {""}))


def nearest(memory_bytes: int, rows: Mapping[str, Hardware]) -> Hardware:
    """The GPU row whose memory is nearest to ``memory_bytes``."""
    gpus: Iterable[Hardware] = (row for row in rows.values() if row.kind == "gpu")
    return min(gpus, key=lambda row: abs(row.memory_bytes - memory_bytes))


def gpu() -> tuple[str, int] | None:
    """Name and memory in bytes of the first GPU that this process may use; None where there is none."""
    gpus = Gpus()
    mine = gpus.visible()
    return (gpus.name(mine[0]), gpus.memory_total(mine[0])) if mine else None


def cpu() -> Hardware:
    """This machine's CPUs, whatever GPUs it has."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = cpu_flags()
    name = "cpu-amx" if "amx_bf16" in flags else "cpu-avx512" if "avx512f" in flags else "cpu-avx2"
    return table()[name].with_cores(cores, int(psutil.virtual_memory().total))


def written(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of the user's file as they stand there, for :func:`table`. Raises :class:`UsageError` with file and line
    where one is wrong."""
    return tuple(entry for entry, _ in _read(path))


def _read(path: Path) -> list[tuple[dict[str, Any], Hardware]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        entries: Any = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such hardware table", where=str(path)) from None
    except (OSError, ValueError, YAMLError) as error:
        raise UsageError(f"cannot read the hardware table: {error}", where=str(path)) from None
    if not isinstance(entries, list):
        raise UsageError("a hardware table is a list of rows", where=str(path), fix=f"See {_TABLE}")
    lines = cast(Any, entries).lc  # ruamel keeps where each item stood
    return [(plain(entry), _row(entry, f"{path}:{lines.item(i)[0] + 1}")) for i, entry in enumerate(entries)]


def _row(entry: Any, where: str) -> Hardware:
    if not isinstance(entry, Mapping):
        raise UsageError("a row of the hardware table is a mapping", where=where)
    unknown = sorted(str(key) for key in set(entry) - _KEYS)
    missing = sorted(_NEEDED - set(entry))
    if unknown or missing:
        what = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise UsageError(f"a row of the hardware table {what}", where=where, fix=f"Keys: {', '.join(sorted(_KEYS))}")
    tflops = entry["tflops"]
    if not isinstance(tflops, Mapping) or "bf16" not in tflops or set(tflops) - _FORMATS:
        raise UsageError(f"tflops maps {', '.join(sorted(_FORMATS))} to numbers and needs bf16", where=where)
    if entry.get("kind", "gpu") not in ("gpu", "cpu") or not isinstance(entry.get("match", []), list):
        raise UsageError(f"{entry['name']}: kind is gpu or cpu, and match a list of words", where=where)
    try:
        return Hardware(
            name=str(entry["name"]),
            memory_bytes=round(_positive(entry, "memory_gib") * 2**30),
            bandwidth_bytes_per_s=_positive(entry, "bandwidth") * 1e9,
            flops={str(fmt): _positive(tflops, fmt) * 1e12 for fmt in tflops},
            link_bytes_per_s=_positive(entry, "link", 32) * 1e9,
            link_latency_s=_positive(entry, "link_latency_us", 25) * 1e-6,
            price_usd_per_hour=_positive(entry, "price", 0.0),
            kind=entry.get("kind", "gpu"),
            op_s=_positive(entry, "op_us") * 1e-6 if "op_us" in entry else None,
            unpack_weights_per_s=_positive(entry, "unpack_gweights", 0.0) * 1e9,
            capability=_positive(entry, "capability", 0.0),
            match=tuple(map(str, entry.get("match", ()))),
            source=str(entry["source"]),
            bandwidth_limit=_positive(entry, "bandwidth_limit", math.inf) * 1e9,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{entry['name']}: {error}", where=where) from None


def _positive(entry: Mapping[str, Any], key: str, absent: float | None = None) -> float:
    if key not in entry and absent is not None:
        return absent
    value = float(entry[key])
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be a number above zero, not {entry[key]!r}")
    return value


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
