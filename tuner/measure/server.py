"""What the server says of itself during a replay: vLLM's ``/metrics``, sampled once a second and kept beside the
records."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.errors import EnvironmentFault, naming
from tuner.load import columns
from tuner.load.probe import asked
from tuner.load.wire import Target
from tuner.words import figure

# column -> vLLM's metric, and how several engines of one server add up
SERIES: Mapping[str, tuple[str, str]] = {
    "running_requests": ("vllm:num_requests_running", "sum"),
    "waiting_requests": ("vllm:num_requests_waiting", "sum"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "max"),
    "preemptions": ("vllm:num_preemptions_total", "sum"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "sum"),
    "output_tokens": ("vllm:generation_tokens_total", "sum"),
    "prefix_query_tokens": ("vllm:prefix_cache_queries_total", "sum"),
    "prefix_hit_tokens": ("vllm:prefix_cache_hits_total", "sum"),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens_total", "sum"),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total", "sum"),
    "ttft_sum_s": ("vllm:time_to_first_token_seconds_sum", "sum"),
    "ttft_count": ("vllm:time_to_first_token_seconds_count", "sum"),
}
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)
_TIMEOUT_S = 5.0


def parse(text: str) -> dict[str, float]:
    """The columns of :data:`SERIES` that a Prometheus page holds; absent ones are left out."""
    columns = {metric: (column, how) for column, (metric, how) in SERIES.items()}
    row: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        if name in columns:
            column, how = columns[name]
            number = float(value)
            before = row.get(column)
            row[column] = number if before is None else max(before, number) if how == "max" else before + number
    return row


@dataclass(frozen=True, slots=True)
class Sample:
    """``time_ns`` on the monotonic clock; ``row`` holds columns of :data:`SERIES`."""

    time_ns: int
    row: Mapping[str, float]


class Sampler:
    """Samples on a thread of its own until stopped; a server without such metrics is asked once and left alone."""

    def __init__(self, target: Target, api_key: str = "", every_s: float = 1.0) -> None:
        self._target, self._api_key, self._every_s = target, api_key, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-metrics", daemon=True)
        self.samples: list[Sample] = []

    def __enter__(self) -> Sampler:
        self._look()
        if self.samples:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the thread; safe to call twice."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join(2 * _TIMEOUT_S)

    def settle(self, output_tokens: int, wait_s: float = 2.0) -> None:
        """Ends the thread with a last sample, taken when the server has counted ``output_tokens`` since the first (its
        counters follow a moment after its last token), or has not after ``wait_s``."""
        self.stop()
        if not self.samples:
            return
        until_s = time.monotonic() + wait_s
        while True:
            self._look()
            first, last = self.samples[0].row, self.samples[-1].row
            counted = last.get("output_tokens", 0.0) - first.get("output_tokens", 0.0)
            if counted >= output_tokens or time.monotonic() > until_s:
                return
            time.sleep(0.1)

    def _run(self) -> None:
        next_s = time.monotonic() + self._every_s
        while not self._stop.wait(max(0.0, next_s - time.monotonic())):
            self._look()
            next_s = max(next_s + self._every_s, time.monotonic())

    def _look(self) -> None:
        with contextlib.suppress(EnvironmentFault, ValueError):
            _, page = asked(self._target, "/metrics", self._api_key, _TIMEOUT_S)
            if row := parse(page.decode("utf-8", "replace")):
                self.samples.append(Sample(time.monotonic_ns(), row))


def fold(samples: Sequence[Sample], start_ns: int, end_ns: int) -> dict[str, float]:
    """``server_...`` metrics of a step. Counters are taken from the first to the last sample, gauges between
    ``start_ns`` and ``end_ns`` (monotonic). A counter that went down (a restart) gives nothing."""
    if len(samples) < 2:
        return {}
    first, last = samples[0].row, samples[-1].row
    grown = {name: last[name] - first[name] for name in SERIES if name in first and name in last}
    within = [sample.row for sample in samples if start_ns <= sample.time_ns <= end_ns] or [last]
    metrics: dict[str, float] = {}
    for gauge, name in (("waiting_requests", "queue"), ("running_requests", "running"), ("kv_usage", "kv_usage")):
        values = [row[gauge] for row in within if gauge in row]
        if values:
            metrics[f"server_{name}_mean"] = float(np.mean(values))
            metrics[f"server_{name}_max"] = float(np.max(values))
    for counter in ("preemptions", "prompt_tokens", "output_tokens"):
        if grown.get(counter, -1.0) >= 0:
            metrics[f"server_{counter}"] = grown[counter]
    for name, part, whole in (
        ("server_prefix_hit_rate", "prefix_hit_tokens", "prefix_query_tokens"),
        ("server_draft_acceptance", "accepted_tokens", "draft_tokens"),
        ("server_ttft_mean_s", "ttft_sum_s", "ttft_count"),
    ):
        if grown.get(whole, 0.0) > 0 and grown.get(part, -1.0) >= 0:
            metrics[name] = grown[part] / grown[whole]
    return metrics


def in_words(metrics: Mapping[str, float]) -> str:
    """What the server said of a step, and its GPUs' energy, in one line; empty where nothing is known of them."""
    m, said = metrics, []
    for name, word in (("running", "running"), ("queue", "queued")):
        if f"server_{name}_mean" in m:
            said.append(f"{figure(m[f'server_{name}_mean'])} {word} (at most {m[f'server_{name}_max']:.0f})")
    for name, form in (
        ("server_kv_usage_max", "KV cache at most {:.1%} full"),
        ("server_preemptions", "{:,.0f} preemptions"),
        ("server_prefix_hit_rate", "{:.1%} of prompt tokens found cached"),
        ("server_draft_acceptance", "{:.0%} of drafted tokens accepted"),
        ("system_gpu_energy_j_per_output_token", "{:.3g} J per output token"),
    ):
        if name in m:
            said.append(form.format(m[name]))
    return ", ".join(said)


def write(path: Path, samples: Sequence[Sample], epoch_ns: int) -> None:
    """The samples as Parquet: ``time_ns`` after the replay's start, then :data:`SERIES` (null: absent)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [columns.column("int64", [sample.time_ns - epoch_ns for sample in samples])]
    arrays += [columns.column("float64", [sample.row.get(name) for sample in samples]) for name in SERIES]
    with naming(path):
        pq.write_table(pa.Table.from_arrays(arrays, ["time_ns", *SERIES]), path, compression="zstd")


def beside(records: Path) -> Path:
    """``records-1.5.parquet`` -> ``server-1.5.parquet``; another name gets ``server-`` before it."""
    stem = records.name.removeprefix("records") if records.name.startswith("records") else f"-{records.name}"
    return records.with_name(f"server{stem}")
