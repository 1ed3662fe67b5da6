"""What a step tells of a server whose traffic shares prefixes, if its cache begins empty and if it was filled.

    python -m benchmarks.replay.prefixes

The truth is one long replay of conversations on the emulator (an 8B model on an H100, virtual clock), of which the
last minute counts. A step replays that minute alone, on a cache that is empty, or that the prompts before it were sent
to, as far as the server's log says that there is room (as a study does).
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tuner.engines.emulator.hardware import find_gpu
from tuner.engines.emulator.virtual import launch_virtual
from tuner.engines.protocol import Site, StepPlan
from tuner.load import windows
from tuner.load.sharing import sharing
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.slo import parse
from tuner.study.evaluate import to_fill

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
WIDTH = 256  # tokens of a trace's block
WINDOW_S, TURNS, GAP_S = 60.0, 8, 50.0


def conversations(rps: float, lasts_s: float, seed: int) -> Trace:
    """Of eight turns in the mean 50 s apart, each with the prompt of the one before and one to four blocks more."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[float, list[int]]] = []
    begin_s, block = -4 * TURNS * GAP_S, 0
    while begin_s < lasts_s:
        begin_s += rng.exponential(TURNS / rps)
        at_s, ids = begin_s, []
        for _ in range(TURNS):
            more = int(rng.integers(1, 5))
            ids = [*ids, *range(block, block + more)]
            block += more
            if 0 <= at_s < lasts_s:
                rows.append((at_s, ids))
            at_s += rng.exponential(GAP_S)
    rows.sort()
    counts = np.array([len(ids) for _, ids in rows])
    return Trace(
        "conversations",
        np.array([at for at, _ in rows]) - rows[0][0],
        counts * WIDTH,
        rng.integers(60, 240, len(rows)),
        WIDTH,
        np.array([i for _, ids in rows for i in ids]),
        np.concatenate([[0], np.cumsum(counts)]),
    )


def step(flags: Mapping[str, str], trace: Trace, warmup_s: float, load: float) -> tuple[dict[str, float], np.ndarray]:
    """Mean and p99 of the TTFT in ms of a fresh server, and its tokens found cached and asked for."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        site = Site(Path(folder), (0,), threading.Event(), lambda _name, _data: None)
        server = launch_virtual({"model": str(model), **flags}, {}, "", find_gpu("H100"), {}, site)
        trace = replace(trace, earlier=to_fill(trace, ServingConfig("m", {}, flags), server.boot))
        plan = StepPlan(load, trace, "w", (parse("ttft_p99=600s"),), Path(folder) / "r.parquet", early_stop=False)
        found = server.measure(replace(plan, warmup_s=warmup_s)).metrics
        cache = server._simulator.replicas[0].scheduler
        counted = np.array([cache.cache_hits, cache.cache_queries])
        return {name: found[f"ttft_{name}_s"] * 1e3 for name in ("mean", "p99")}, counted


def main() -> None:
    trace = conversations(3.0, 1260.0, 1)
    print(f"{len(trace)} requests, {sharing(trace).token_share:.0%} of their prompt tokens shared")
    print(
        "memory load   found cached   TTFT mean / p99 in ms: all the traffic; a step on an empty cache; on a filled one"
    )
    for memory, load in itertools.product(("0.9", "0.5"), (0.5, 1.0, 2.0)):
        flags = {"gpu-memory-utilization": memory, "max-model-len": "16384"}
        first, stop = map(int, np.searchsorted(trace.arrival_s, [900.0, 900.0 + WINDOW_S * load]))
        window, earlier = windows.cut(trace, first, stop), windows.cut(trace, 0, first)
        truth, until = step(flags, windows.cut(trace, 0, stop), float(trace.arrival_s[first]) / load, load)
        _, before = step(flags, earlier, 0.0, load)
        said, hits = [truth], [until - before]
        for filled in (None, earlier):
            found, own = step(flags, replace(window, earlier=filled), 0.0, load)
            _, fill = step(flags, replace(windows.cut(trace, 0, 1), earlier=filled), 0.0, load) if filled else ({}, 0)
            said.append(found)
            hits.append(own - fill)
        shares = " ".join(f"{100 * cached / asked:3.0f} %" for cached, asked in hits)
        print(f"{memory:6} {load:4g}   {shares}   " + "   ".join(f"{t['mean']:.0f} / {t['p99']:.0f}" for t in said))


if __name__ == "__main__":
    main()
