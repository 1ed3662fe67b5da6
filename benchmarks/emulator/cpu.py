"""The emulator's CPU row against the real vLLM CPU build, on the same small trace and configurations.

    python -m benchmarks.emulator.cpu measure MODEL_FOLDER CONFIG   # launches the real one; once per configuration
    python -m benchmarks.emulator.cpu compare MODEL_FOLDER          # emulates the same and prints the table

``measure`` needs TUNER_VLLM_PYTHON and two quiet minutes (others' work on the same cores multiplies the latencies, so
that it keeps nothing when the machine was busy); it adds to ``cpu-measured.json`` beside this file. The
model is a tiny one with random weights (``--load-format dummy``); each load is 16 requests of 256 + 64 tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from benchmarks.emulator.silicon import spearman
from tuner.engines.emulator import EmulatorEngine
from tuner.engines.protocol import Engine, Site, StepPlan
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.slo import parse

TABLE = Path(__file__).with_name("cpu-measured.json")
FIXED = {"load-format": "dummy", "dtype": "bfloat16", "max-model-len": 1024, "enforce-eager": None}
CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "default": ({}, ""),
    "batched-256": ({"max-num-batched-tokens": 256, "max-num-seqs": 64}, ""),
    "seqs-2": ({"max-num-seqs": 2}, ""),
    "kv-fp8": ({"kv-cache-dtype": "fp8"}, ""),
    "int8": ({}, "w8a8-int8"),
    "gptq-int4": ({}, "gptq-int4"),
}
RATES = (1.5, 6.0, 12.0)
QUIET = 4.0  # load average of the last minute; the server and the client alone make about 2
METRICS = ("ttft_p50_s", "tpot_p50_s", "output_tokens_per_s")


def trace(n: int = 16) -> Trace:
    """``n`` requests, one per second, 256 + 64 tokens."""
    none, offsets = np.zeros(0, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    return Trace("steady", np.arange(float(n)), np.full(n, 256), np.full(n, 64), 0, none, offsets)


def measure(engine: Engine, model: str, name: str) -> dict[str, dict[str, float]]:
    """Rate -> metrics of one configuration."""
    flags, variant = CONFIGS[name]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    config = ServingConfig(model, {}, {**FIXED, **flags}, env, variant, gpus=0)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), (), threading.Event(), lambda _name, _data: None)
        server = engine.launch(config, site)
        try:
            found = {}
            for index, rate in enumerate((RATES[-1], *RATES)):  # the first warms the server up and does not count
                records = Path(folder) / f"{index}.parquet"
                plan = StepPlan(rate, trace(), f"w{index}", (parse("ttft_p99=60s"),), records, seed=index)
                step = server.measure(plan)
                found[f"{rate:g}"] = {metric: step.metrics[metric] for metric in METRICS}
            return found
        finally:
            server.stop()


def compare(model: str) -> None:
    measured = json.loads(TABLE.read_text())
    engine = EmulatorEngine(gpu="cpu", clock="virtual", boot_scale=0)
    emulated = {name: measure(engine, model, name) for name in measured}
    pairs: dict[str, list[tuple[float, float]]] = {metric: [] for metric in METRICS}
    print(
        "| configuration | rate /s | TTFT p50 real, emulated (ms) | TPOT p50 real, emulated (ms) |\n|---|---|---|---|"
    )
    for name, rates in measured.items():
        for rate, real in rates.items():
            other = emulated[name][rate]
            for metric in METRICS:
                pairs[metric].append((real[metric], other[metric]))
            cells = [f"{real[m] * 1e3:.0f}, {other[m] * 1e3:.0f}" for m in METRICS[:2]]
            print(f"| {name} | {rate} | {' | '.join(cells)} |")
    for metric, both in pairs.items():
        factors = [max(a / b, b / a) for a, b in both]
        rank = spearman([a for a, _ in both], [b for _, b in both])
        print(
            f"{metric}: factor {statistics.median(factors):.2f} (median), {max(factors):.2f} (worst); rank {rank:.3f}"
        )


def main() -> None:
    match sys.argv[1:]:
        case ["measure", model, name]:
            from tuner.engines.vllm import VllmEngine

            real = VllmEngine(python=os.environ["TUNER_VLLM_PYTHON"])
            found = measure(real, str(Path(model).resolve()), name)
            if (busy := os.getloadavg()[0]) > QUIET:
                raise SystemExit(f"the machine was busy (load average {busy:.1f}): {found} is not kept")
            table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
            TABLE.write_text(json.dumps({**table, name: found}, indent=1) + "\n")
        case ["compare", model]:
            compare(str(Path(model).resolve()))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
