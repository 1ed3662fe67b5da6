"""What the machine did meanwhile: GPUs (power, energy, memory, throttling) and host (CPU, RAM), sampled to Parquet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.server.gpu import Gpus, GpuSample
from tuner.server.tree import Pid

_MEMBERS_EVERY = 15  # looking through every process of a large host takes tens of milliseconds


@dataclass(frozen=True, slots=True)
class HostSample:
    """``cpu`` is the share of all cores in use (0 to 1); the server's own share counts in cores."""

    cpu: float
    memory_used_bytes: int
    server_cpu_cores: float
    server_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at everything; ``at_s`` is Unix time."""

    at_s: float
    host: HostSample
    gpus: tuple[GpuSample, ...]


class Host:
    """CPU and RAM of the machine and of one server's processes, through psutil."""

    def __init__(self, server: Callable[[], set[Pid]]) -> None:
        self._server = server
        self._cpu_before: dict[int, float] = {}
        self._at: float | None = None
        self._looks = 0
        self._members: set[Pid] = set()

    def sample(self) -> HostSample:
        import psutil

        now = time.monotonic()
        cpu_s: dict[int, float] = {}
        memory = 0
        if self._looks % _MEMBERS_EVERY == 0:
            self._members = self._server()
        self._looks += 1
        for process in self._members:
            try:
                entry = psutil.Process(process.pid)
                times = entry.cpu_times()
                cpu_s[process.pid] = times.user + times.system
                memory += entry.memory_info().rss
            except psutil.Error:
                continue
        span = now - self._at if self._at is not None else 0.0
        spent = sum(value - self._cpu_before.get(pid, value) for pid, value in cpu_s.items())
        self._cpu_before, self._at = cpu_s, now
        return HostSample(
            cpu=psutil.cpu_percent(None) / 100,
            memory_used_bytes=int(psutil.virtual_memory().used),
            server_cpu_cores=spent / span if span > 0 else 0.0,
            server_memory_bytes=memory,
        )


class Telemetry:
    """Samples in a thread of its own every ``period_s``, from :meth:`start` to :meth:`stop`."""

    def __init__(self, path: Path, host: Host, gpus: Gpus, indices: Sequence[int], period_s: float = 1.0) -> None:
        self.path = path
        self._host, self._gpus, self._indices, self._period_s = host, gpus, tuple(indices), period_s
        self._samples: list[Sample] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        self.sample()
        self._thread.start()

    def sample(self) -> None:
        """One look, now."""
        look = Sample(time.time(), self._host.sample(), tuple(self._gpus.sample(i) for i in self._indices))
        self._samples.append(look)

    def stop(self) -> None:
        """Ends the thread and writes the file; safe to call twice."""
        if not self._end.is_set():
            self._end.set()
            if self._thread.ident:
                self._thread.join(10)
            write(self._samples, self.path)

    def between(self, begin_s: float, end_s: float) -> list[Sample]:
        """The samples between two Unix times (a last one is taken, so that there is one)."""
        self.sample()
        return [sample for sample in self._samples if begin_s <= sample.at_s <= end_s + self._period_s]

    def _run(self) -> None:
        while not self._end.wait(self._period_s):
            self.sample()


def summary(samples: Sequence[Sample], window: tuple[float, float] | None = None) -> dict[str, float]:
    """The samples of one step as metrics ``system_...``: means over the looks, and maxima. Power and energy are of all
    GPUs together, within ``window`` (Unix times): before and after it a server does not draw what its load takes."""
    if not samples:
        return {}
    count = len(samples)
    found = {
        "system_host_cpu_share": sum(s.host.cpu for s in samples) / count,
        "system_host_memory_used_max_bytes": float(max(s.host.memory_used_bytes for s in samples)),
        "system_server_cpu_cores": sum(s.host.server_cpu_cores for s in samples) / count,
        "system_server_memory_max_bytes": float(max(s.host.server_memory_bytes for s in samples)),
    }
    looks = [gpu for sample in samples for gpu in sample.gpus]
    if looks:
        begin_s, end_s = window or (samples[0].at_s, samples[-1].at_s)
        power_w = _power_w(samples, begin_s, end_s)
        found |= {
            "system_gpu_power_mean_w": power_w,
            "system_gpu_energy_j": power_w * (end_s - begin_s),
            "system_gpu_memory_used_max_bytes": float(max(gpu.memory_used_bytes for gpu in looks)),
            "system_gpu_utilization_mean": sum(gpu.utilization for gpu in looks) / len(looks),
            "system_gpu_temperature_max_c": max(gpu.temperature_c for gpu in looks),
            "system_gpu_sm_clock_min_mhz": min(gpu.sm_clock_mhz for gpu in looks),
            "system_gpu_throttled_share": sum(bool(gpu.throttled) for gpu in looks) / len(looks),
        }
    return found


def throttling(samples: Sequence[Sample], share: float = 0.1) -> str:
    """Why these looks make a measurement untrusted: one of the GPUs slowed itself down in at least ``share`` of its
    looks (the others wait for it).

    A power cap alone does not count: under full load a GPU runs at its cap, and will when it serves, too.
    """
    looks: dict[int, list[GpuSample]] = {}
    for gpu in (gpu for sample in samples for gpu in sample.gpus):
        looks.setdefault(gpu.index, []).append(gpu)
    slow = {index: [gpu for gpu in own if set(gpu.throttled) - {"power cap"}] for index, own in looks.items()}
    worst = max(looks, key=lambda index: len(slow[index]) / len(looks[index]), default=None)
    if worst is None or len(slow[worst]) < max(1.0, share * len(looks[worst])):
        return ""
    why = ", ".join(sorted({reason for gpu in slow[worst] for reason in gpu.throttled if reason != "power cap"}))
    hottest = max(gpu.temperature_c for gpu in slow[worst])
    part = len(slow[worst]) / len(looks[worst])
    return f"GPU {worst} throttled in {part:.0%} of the samples ({why}, up to {hottest:.0f} °C)"


def write(samples: Sequence[Sample], path: Path) -> None:
    """One row per sample and GPU (one without a GPU); nothing is written without samples."""
    if not samples:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, object]] = []
    for sample in samples:
        base: dict[str, object] = {"at_s": sample.at_s, "host_cpu": sample.host.cpu}
        base |= {"host_memory_used_bytes": sample.host.memory_used_bytes}
        base |= {"server_cpu_cores": sample.host.server_cpu_cores}
        base |= {"server_memory_bytes": sample.host.server_memory_bytes}
        for gpu in sample.gpus or (None,):
            row = {name: getattr(gpu, name) if gpu else None for name in GpuSample.__slots__}
            row["throttled"] = ", ".join(gpu.throttled) if gpu else None
            rows.append(base | {f"gpu_{name}": value for name, value in row.items()})
    pq.write_table(pa.Table.from_pylist(rows), path)


def _power_w(samples: Sequence[Sample], begin_s: float, end_s: float) -> float:
    """Mean power of all GPUs between two times, as far as the looks reach: by each GPU's own energy counter where it
    tells at every look, else by power times time."""
    samples = sorted(samples, key=lambda sample: sample.at_s)
    at_s = np.array([sample.at_s for sample in samples])
    counters = np.array([[gpu.energy_j for gpu in sample.gpus] for sample in samples])
    looked = np.array([[gpu.power_w for gpu in sample.gpus] for sample in samples])
    begin_s, end_s = max(begin_s, at_s[0]), min(end_s, at_s[-1])
    if end_s <= begin_s:
        return float(looked.mean(axis=0).sum())
    summed = np.cumsum(looked * np.diff(at_s, prepend=at_s[0])[:, None], axis=0)
    told = (counters > 0).all(axis=0) & (np.diff(counters, axis=0) >= 0).all(axis=0) & (counters[-1] > counters[0])
    drawn_j = np.where(told, counters - counters[0], summed).sum(axis=1)
    begun_j, ended_j = np.interp([begin_s, end_s], at_s, drawn_j)
    return float((ended_j - begun_j) / (end_s - begin_s))
