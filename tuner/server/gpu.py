"""What the GPUs are doing, through NVML; everything is empty where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BUSY_SHARE = 0.1  # of a GPU's memory in use by somebody: a launch there would fail or be measured wrongly
# NVML's clock event reasons that mean "slower than this GPU can": power cap, hardware slowdown, heat, power brake.
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One look at one GPU. ``energy_j`` counts since the driver was loaded (0: not told); ``throttled`` in words."""

    index: int
    memory_used_bytes: int
    memory_total_bytes: int
    power_w: float
    energy_j: float
    utilization: float
    temperature_c: float
    sm_clock_mhz: float
    throttled: tuple[str, ...] = ()


class Gpus:
    """The machine's GPUs. ``nvml`` is the module ``pynvml`` or a stand-in with its functions."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._handles: list[Any] = []
        if nvml is None:
            with contextlib.suppress(ImportError):
                import pynvml

                self._nvml = pynvml
        if self._nvml is not None:
            try:
                self._nvml.nvmlInit()
                self._handles = [
                    self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())
                ]
            except Exception:  # no driver, no permission: NVMLError has no common base that is importable without NVML
                self._handles = []

    def __len__(self) -> int:
        return len(self._handles)

    def visible(self, env: Mapping[str, str] | None = None) -> tuple[int, ...]:
        """NVML indices that ``CUDA_VISIBLE_DEVICES`` leaves us, in its order; all where it is not set, or names parts
        of GPUs (MIG), which NVML lists elsewhere."""
        wanted = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
        if wanted is None or wanted.strip().startswith("MIG-"):
            return tuple(range(len(self)))
        uuids = {self._text("nvmlDeviceGetUUID", i): i for i in range(len(self))}
        found: list[int] = []
        for word in (word.strip() for word in wanted.split(",")):
            index = (
                int(word) if word.isdigit() else next((i for u, i in uuids.items() if word and u.startswith(word)), -1)
            )
            if not 0 <= index < len(self) or index in found:
                break  # CUDA stops at the first it does not know
            found.append(index)
        return tuple(found)

    def name(self, index: int) -> str:
        """``NVIDIA H200``."""
        return self._text("nvmlDeviceGetName", index)

    def memory_total(self, index: int) -> int:
        """Bytes of one GPU; 0 where NVML does not tell."""
        return int(getattr(self._ask("nvmlDeviceGetMemoryInfo", index), "total", 0))

    def compute_capability(self, index: int) -> float | None:
        """``9.0``; None where NVML does not tell."""
        found = self._ask("nvmlDeviceGetCudaComputeCapability", index)
        return float(f"{found[0]}.{found[1]}") if found else None

    def memory_used(self, index: int) -> int:
        """Bytes in use on one GPU; 0 where NVML does not tell."""
        return int(getattr(self._ask("nvmlDeviceGetMemoryInfo", index), "used", 0))

    def processes(self, index: int) -> frozenset[int]:
        """Process numbers that compute on one GPU (inside a container NVML may see none)."""
        return frozenset(entry.pid for entry in self._ask("nvmlDeviceGetComputeRunningProcesses", index) or ())

    def why_not(self, index: int) -> str:
        """Why a server should not be launched on this GPU now: somebody else is on it. Empty: it is free."""
        if index >= len(self):
            return "there is no such GPU"
        if pids := self.processes(index):
            return f"in use by pid {', '.join(map(str, sorted(pids)))}"
        memory = self._ask("nvmlDeviceGetMemoryInfo", index)
        if memory and memory.used > _BUSY_SHARE * memory.total:
            return f"{memory.used / 2**30:.1f} GiB of its memory are in use, by nobody that can be seen"
        return ""

    def sample(self, index: int) -> GpuSample:
        """One look; what a GPU does not tell is 0."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", index)
        rates = self._ask("nvmlDeviceGetUtilizationRates", index)
        reasons = int(self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", index) or 0)
        return GpuSample(
            index=index,
            memory_used_bytes=int(getattr(memory, "used", 0)),
            memory_total_bytes=int(getattr(memory, "total", 0)),
            power_w=(self._ask("nvmlDeviceGetPowerUsage", index) or 0) / 1e3,
            energy_j=(self._ask("nvmlDeviceGetTotalEnergyConsumption", index) or 0) / 1e3,
            utilization=getattr(rates, "gpu", 0) / 100,
            temperature_c=float(self._ask("nvmlDeviceGetTemperature", index, 0) or 0),
            sm_clock_mhz=float(self._ask("nvmlDeviceGetClockInfo", index, 1) or 0),
            throttled=tuple(name for bit, name in _THROTTLES.items() if reasons & bit),
        )

    def _text(self, function: str, index: int) -> str:
        value = self._ask(function, index) or ""
        return value.decode() if isinstance(value, bytes) else str(value)

    def _ask(self, function: str, index: int, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handles[index], *args)
        except Exception:  # not supported by this GPU, or lost: a missing figure, never a failed trial
            return None
