"""What the emulator knows of an accelerator: data-sheet figures, and how far kernels get towards them.

The table is the emulator's own on purpose: the search's analytic model has another, so that a search benchmark on the
emulator does not test a formula against itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator (or a CPU host, ``cpu``): memory in bytes, bandwidths in bytes/s, peaks in dense FLOP/s.

    ``link_bytes_per_s`` is one direction between two GPUs of one host. ``gemm_share`` and ``memory_share`` are what
    good kernels reach of the peaks; ``kernel_s`` is the gap per kernel inside a CUDA graph, ``launch_s`` without one;
    ``step_s`` and ``sequence_s`` are the engine's own Python per step and per running sequence.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops: dict[int, float]  # by bits of an operand: 16, 8 (fp8), 4
    link_bytes_per_s: float
    units: int  # streaming multiprocessors
    fp8: bool = True
    gemm_share: float = 0.62
    memory_share: float = 0.80
    kernel_s: float = 2.8e-6
    launch_s: float = 28e-6
    step_s: float = 0.9e-3
    sequence_s: float = 7e-6
    frontend_s: float = 4.5e-3
    token_s: float = 14e-6

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def peak(self, bits: int) -> float:
        """Dense FLOP/s for operands of ``bits``; hardware without a narrow format computes in the next wider one."""
        return next(self.flops[b] for b in sorted(self.flops) if b >= bits)


# Data sheets (dense, without sparsity): NVIDIA H100, H200, B200, A100, L40S, L4 and GeForce RTX 4090, as of 2025.
GPUS = (
    Gpu("H100-SXM", int(79.2 * GIB), 3.35e12, {16: 989e12, 8: 1979e12}, 450e9, 132),
    Gpu("H100-PCIE", int(79.2 * GIB), 2.0e12, {16: 756e12, 8: 1513e12}, 55e9, 114),
    Gpu("H200-SXM", int(139.8 * GIB), 4.8e12, {16: 989e12, 8: 1979e12}, 450e9, 132),
    Gpu("B200-SXM", int(178.3 * GIB), 8.0e12, {16: 2250e12, 8: 4500e12, 4: 9000e12}, 900e9, 148),
    Gpu("A100-SXM-80GB", int(79.2 * GIB), 2.04e12, {16: 312e12, 8: 624e12}, 300e9, 108, fp8=False),
    Gpu("L40S", int(44.4 * GIB), 0.864e12, {16: 362e12, 8: 733e12}, 26e9, 142),
    Gpu("L4", int(22.0 * GIB), 0.300e12, {16: 121e12, 8: 242e12}, 13e9, 58),
    Gpu("RTX-4090", int(23.5 * GIB), 1.008e12, {16: 165e12, 8: 330e12}, 13e9, 128),
    # A two-core x86 host: what one core with AVX reaches in PyTorch, and a Python engine dearer than the GEMMs.
    Gpu(
        "cpu",
        8 * GIB,
        30e9,
        {16: 600e9, 8: 750e9},
        4e9,
        2,
        fp8=False,
        gemm_share=0.6,
        memory_share=0.7,
        kernel_s=6e-6,
        launch_s=30e-6,
        step_s=1.0e-3,
        sequence_s=1.2e-3,
        frontend_s=8e-3,
        token_s=250e-6,
    ),
)


_ALIASES = {
    "h100": "h100sxm",
    "h10080gbhbm3": "h100sxm",
    "h100sxm5": "h100sxm",
    "h200": "h200sxm",
    "b200": "b200sxm",
    "a100": "a100sxm80gb",
    "a10080gb": "a100sxm80gb",
    "a100sxm480gb": "a100sxm80gb",
    "4090": "rtx4090",
}


def find_gpu(name: str) -> Gpu:
    """The row that ``name`` means, however it is spelt (``h100_sxm``, ``NVIDIA H100 80GB HBM3``, ``H100``).

    Raises ``ValueError`` with the known names.
    """
    wanted = _plain(name)
    wanted = "cpu" if wanted.startswith("cpu") else _ALIASES.get(wanted, wanted)
    for gpu in GPUS:
        if _plain(gpu.name) == wanted:
            return gpu
    raise ValueError(f"the emulator does not know the GPU {name!r}; it knows {', '.join(g.name for g in GPUS)}")


def from_datasheet(name: str, figures: Mapping[str, Any]) -> Gpu:
    """A row for hardware that is not in the table: ``memory_bytes``, ``memory_bytes_per_s``, ``link_bytes_per_s`` and
    ``flops`` by bits, as its data sheet says; what kernels reach of them is assumed to be as elsewhere."""
    flops = {int(bits): float(value) for bits, value in figures["flops"].items()}
    return Gpu(
        name,
        int(figures["memory_bytes"]),
        float(figures["memory_bytes_per_s"]),
        flops,
        float(figures["link_bytes_per_s"]),
        int(figures.get("units", 108)),
        fp8=bool(figures.get("fp8", True)),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", ""))
