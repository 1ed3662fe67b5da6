"""Does a server from a standby serve as fast as one that was started afresh? The same load on both, in turns.

    python -m benchmarks.startup.speed --model FOLDER --python VLLM_PYTHON --repeat 3

Prints, per launch, output tokens per second at a held concurrency and the server's CPU seconds per 1,000 tokens (which
other users of the machine disturb least), and appends both to ``benchmarks/startup/speed.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
from pathlib import Path

import numpy as np

from benchmarks.startup.__main__ import CASES, cpu_s, prepare
from tuner.engines.protocol import Site, StepPlan
from tuner.engines.vllm import VllmEngine
from tuner.load.step import measure
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.facts import of_machine

HERE = Path(__file__).parent
REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 48, 128, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--python", default="")
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    # absolute: a server starts in its trial's folder
    model, python = (os.path.abspath(path) if path else "" for path in (args.model, args.python))
    engines = {case: VllmEngine(python=python, fast_start=CASES[case].fast) for case in ("plain", "fast")}
    for _ in range(args.repeat):
        for case, engine in engines.items():
            line = {"case": case, **once(engine, model)}
            with (HERE / "speed.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    for engine in engines.values():
        engine.close()
    lines = [json.loads(line) for line in (HERE / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    for case in engines:
        of = [line for line in lines if line["case"] == case]
        for name in ("output_tokens_per_s", "cpu_s_per_1000_tokens"):
            values = sorted(line[name] for line in of)
            print(f"{case:6} {name:22} n={len(values)} median {statistics.median(values):7.2f}  {values}")


def once(engine: VllmEngine, model: str) -> dict[str, float]:
    """One launch, one closed-loop step."""
    flags = {
        "load-format": "dummy",
        "dtype": of_machine()["native_dtype"],
        "max-model-len": 4096,
        "enforce-eager": None,
    }
    config = ServingConfig(model, {}, flags, {"VLLM_CPU_KVCACHE_SPACE": "1"}, "", 0)
    none = np.zeros(0, dtype=np.int64)
    sizes = np.full(REQUESTS, INPUT_TOKENS), np.full(REQUESTS, OUTPUT_TOKENS)
    trace = Trace("held", np.zeros(REQUESTS), *sizes, 0, none, np.zeros(REQUESTS + 1, dtype=np.int64))
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), (), threading.Event(), lambda _name, _data: None)
        if engine.fast:
            prepare(engine, config, site)
        server = engine.launch(config, site)
        try:
            process = server._running.process
            if process is None or server.endpoint is None:
                raise RuntimeError("the server is not there")
            before = sum(cpu_s(pid.pid) for pid in process.members())
            plan = StepPlan(1.0, trace, "held", (), Path(folder) / "r.parquet", early_stop=False)
            step = measure(server.endpoint, plan, concurrency=CONCURRENCY)
            spent = sum(cpu_s(pid.pid) for pid in process.members()) - before
        finally:
            server.stop()
    tokens = REQUESTS * OUTPUT_TOKENS
    rate = step.metrics["output_tokens_per_s"]
    return {"output_tokens_per_s": round(rate, 1), "cpu_s_per_1000_tokens": round(1000 * spent / tokens, 2)}


if __name__ == "__main__":
    main()
