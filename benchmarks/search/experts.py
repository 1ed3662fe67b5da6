"""Surface "experts": a closed-loop mixture of experts on 4 to 16 GPUs, where the load is the concurrency.

Structurally different from "dense": cost comes from the throughput that a concurrency reaches, not from a rate that is
offered; layouts are categories; speculation (MTP) has its length as its switch. Hidden effects: expert imbalance that
depends on the all-to-all back end, a communication cliff between machines, eager mode's overhead by batch, a scheduler
that loses throughput at small token budgets, a back end that dies with expert parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.search.surface import Columns, Surface, crashes, numeric, parameter
from tuner.search.ledger import COST_KEY
from tuner.space.space import Rule, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse

PROMPT, ANSWER, LONGEST, PRICE = 2000.0, 600.0, 16384.0, 3.2

CONSTANTS = {
    "total": 3.5e11,  # parameters
    "active": 2.4e10,
    "kv": 7e4,
    "memory": 141e9,
    "bandwidth": 3.4e12,
    "flops": 4.5e14,
    "touched": 0.06,  # share of the experts' weights read per sequence of a batch
    "comm": 2.6e-4,  # s per step and doubling of the tensor-parallel group
    "all_to_all": 1.3e-5,  # s per token of a batch
    "step": 6e-3,
    "accept": 0.78,
    "users": 16.0,  # concurrency at load 1
    "reserve": 9e9,
}

# as an engine words them: two name a part of what is to blame, one names nothing that was set
MESSAGES = (
    "pplx kernels cannot be captured",
    "fp8 attention: unsupported query length",
    "CUDA out of memory",
)


def physics(c: Columns, load: Any, k: Mapping[str, float], effects: bool) -> dict[str, np.ndarray]:
    gpus = c["gpus"].astype(float)
    spread = c["layout"] == "data"  # attention replicated, experts spread
    half = c["weights"] == "fp8"
    bits = np.where(half, 1.0, 2.0)
    kv = k["kv"] * np.where(c["kv_cache"] == "fp8", 0.5, 1.0)
    budget = c["token_budget"].astype(float)
    users = k["users"] * load * np.ones(gpus.shape)
    mtp = c["mtp"].astype(float)

    held = k["total"] * bits / gpus * np.where(spread, 1.12, 1.0)
    free = k["memory"] * c["memory_share"] - held - k["reserve"] - 2.5e5 * budget
    per_gpu_token = kv / np.where(spread, gpus, np.minimum(gpus, 4))
    room = np.maximum(free, 0.0) / np.maximum(per_gpu_token, 1e-9)
    short = np.maximum(LONGEST * per_gpu_token - free, 0.0)

    running = np.minimum(np.minimum(users, c["max_num_seqs"].astype(float)), room / (PROMPT + ANSWER))
    running = np.maximum(running, 1.0)
    touched = 1 - (1 - k["touched"]) ** (running * (1 + mtp))
    read = (k["active"] * 0.4 + k["total"] * touched) * bits / gpus / k["bandwidth"]
    context = running * (PROMPT + ANSWER / 2) * kv / gpus / k["bandwidth"]
    math_s = 2 * k["active"] * running * (1 + mtp) / (k["flops"] * np.where(half, 1.6, 1.0) * gpus)
    comm = np.where(spread, k["all_to_all"] * running * (1 + mtp) + 9e-4, k["comm"] * np.log2(gpus) * 8)
    engine = k["step"] * np.where(c["graphs"] == "full", 1.0, np.where(c["graphs"] == "piecewise", 1.2, 2.6))
    if effects:
        backend = c["all2all"]
        comm = comm * np.where(spread, np.select([backend == "deepep", backend == "pplx"], [0.75, 0.9], 1.25), 1.0)
        read = read * np.where(spread, np.select([backend == "deepep", backend == "pplx"], [1.18, 1.1], 1.3), 1.0)
        comm = comm * np.where(gpus > 8, np.where(spread, 1.5, 2.4), 1.0)
        engine = engine + np.where(c["graphs"] == "eager", 4e-5 * running, 0.0)
        math_s = math_s * np.where(c["kv_cache"] == "fp8", 1.12, 1.0)
        engine = engine + np.where(c["scheduling"] == "sync", 1.6e-3 + 1.5e-5 * running, 0.0)
    step = read + context + math_s + comm + engine
    a = min(k["accept"], 0.95)
    gained = np.where(mtp > 0, (1 - a ** (mtp + 1)) / (1 - a), 1.0)
    step = step * (1 + 0.06 * mtp)
    prefill = 2 * k["active"] * PROMPT / (k["flops"] * np.where(half, 1.6, 1.0) * gpus * budget / (budget + 1500.0))
    decode_s = ANSWER * step / gained
    # a running sequence shares its GPUs with the prefills of the others
    cycle = decode_s + prefill * running * np.where(spread, 0.8, 1.0)
    rate = running / cycle
    waiting = np.maximum(users - running, 0.0) / rate
    tpot = (cycle - prefill) / ANSWER
    p99 = tpot * 1.15 + prefill * np.minimum(budget / PROMPT, 1.0) * 0.05
    ttft = prefill * (1 + 0.25 * np.sqrt(running)) + step * np.maximum(PROMPT / budget, 1) + waiting
    out = rate * ANSWER
    if effects:
        out = out * (1 - 0.15 * np.exp(-budget / 3000.0))
    hidden = (
        (spread & (c["all2all"] == "pplx") & (c["graphs"] == "full"), 1.0),
        ((mtp >= 3) & (c["kv_cache"] == "fp8"), 1.0),
        ((c["memory_share"] > 0.93) & (c["graphs"] == "full"), 0.7),
    )
    return {
        "ttft_p95_s": ttft,
        "tpot_p95_s": p99,
        "e2e_p95_s": ttft + ANSWER * p99,
        "output_tokens_per_s": out,
        COST_KEY: PRICE * gpus / 3600 / out * 1e6,
        "short_bytes": short,
        **crashes(len(gpus), *(hidden if effects else ())),
        "kv_tokens": room,
    }


def surface() -> Surface:
    space = SearchSpace(
        "bench/experts",
        "emulator",
        (
            numeric("gpus", 4, 8, 16, default=8, counts_gpus=True),
            parameter("layout", "tensor", "data", default="tensor"),
            parameter("all2all", "naive", "pplx", "deepep", default="naive", when={"layout": "data"}),
            parameter("weights", "bf16", "fp8", default="bf16"),
            parameter("kv_cache", "auto", "fp8", default="auto"),
            numeric("token_budget", 1024, 2048, 4096, 8192, 16384, default=8192),
            numeric("max_num_seqs", 8, 16, 32, 64, 128, 256, default=128),
            numeric("memory_share", 0.85, 0.88, 0.91, 0.94, default=0.91),
            parameter("graphs", "full", "piecewise", "eager", default="full"),
            parameter("mtp", 0, 1, 2, 3, 4, default=0, numeric=True),
            parameter("scheduling", "async", "sync", default="sync"),
        ),
        rules=(Rule({"layout": "data", "gpus": 4}, "experts are spread over eight GPUs or more"),),
    )
    slos = (parse("ttft_p95=3000ms"), parse("tpot_p95=50ms"))
    exact = frozenset({"total", "active", "kv", "memory", "users"})
    loads = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    return Surface(
        "experts",
        space,
        Objective("rag", "tpot_p95", slos, PRICE),
        loads,
        physics,
        CONSTANTS,
        noise=0.06,
        grain=0.05,
        start_s=300.0,
        step_s=60.0,
        exact=exact,
        messages=MESSAGES,
    )
