"""Surface "dense": an open-loop roofline of a 70B-class model on up to eight GPUs, with queueing and speculation.

What the search's model does not know (``effects``): block size, CPU overhead that grows with sequences, a
dequantization tax of the fp8 KV cache on one GPU, int4 kernels that lose at large batches, link contention at eight
GPUs, speculation that suffers from chunked prefill, three crashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.search.surface import Columns, Surface, crashes, numeric, parameter
from tuner.search.ledger import COST_KEY
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse

PROMPT, ANSWER, LONGEST, PRICE = 1500.0, 250.0, 8192.0, 2.5

CONSTANTS = {
    "weights": 140e9,  # bytes at bf16
    "kv": 328e3,  # bytes per token at bf16
    "memory": 80e9,
    "bandwidth": 2.4e12,  # bytes/s that decoding really gets
    "flops": 5.2e14,  # FLOP/s that prefill really gets
    "active": 1.4e11,  # FLOP per token
    "link": 1.6e-6,  # s per token of a batch for one doubling of GPUs
    "hop": 1.9e-3,  # s per step for one doubling of GPUs
    "step": 2.2e-3,  # s per step of the engine itself
    "accept": 0.72,
    "rate": 1.1,  # requests/s at load 1
    "reserve": 3.5e9,  # bytes that are not for weights or KV
    "tail": 0.55,
}

# as an engine words them: two name a part of what is to blame, one names nothing that was set
MESSAGES = (
    "KV cache data type is not supported by the int4 kernel",
    "eagle: draft and prefill cannot share a batch",
    "CUDA out of memory",
)


def physics(c: Columns, load: Any, k: Mapping[str, float], effects: bool) -> dict[str, np.ndarray]:
    tp = c["tensor_parallel_size"].astype(float)
    batched, seqs = c["max_num_batched_tokens"].astype(float), c["max_num_seqs"].astype(float)
    share = np.select([c["quantization"] == "fp8", c["quantization"] == "int4"], [0.5, 0.28], 1.0)
    small = np.where(c["kv_cache_dtype"] == "fp8", 0.5, 1.0)
    method, length = c["speculation"], c["draft_length"].astype(float)
    length = np.where(method == "none", 0.0, length)
    chunked = c["chunked_prefill"].astype(bool)
    doublings = np.log2(tp)

    reserve = k["reserve"] + 1.6e5 * batched + np.where(method == "eagle", 2.5e9, 0.0)
    free = k["memory"] * c["gpu_memory_utilization"] - k["weights"] * share / tp - reserve
    token = k["kv"] * small / tp
    room = np.maximum(free, 0.0) / token
    short = np.maximum(LONGEST * token - free, 0.0)

    compute = np.where(c["quantization"] == "fp8", 1.7, np.where(c["quantization"] == "int4", 0.85, 1.0))
    efficiency = batched / (batched + 900.0)
    per_prompt_token = k["active"] / (k["flops"] * compute * tp * efficiency) + k["link"] * doublings
    rate = k["rate"] * load
    prefill_busy = rate * PROMPT * per_prompt_token

    a = np.where(method == "eagle", k["accept"], np.where(method == "ngram", 0.5 * k["accept"], 0.0))
    a = np.clip(a, 0, 0.95)
    if effects:
        a = a * np.where(chunked & (method != "none"), 0.9, 1.0)
    tokens = np.where(length > 0, (1 - a ** (length + 1)) / (1 - a), 1.0)
    draft = np.where(method == "eagle", 0.055, 0.004) * length

    limit = np.minimum(seqs, room / (PROMPT + ANSWER))
    base = k["weights"] * share / tp / k["bandwidth"] + k["step"] + k["hop"] * doublings
    context = (PROMPT + ANSWER / 2) * token / k["bandwidth"]
    verify = k["active"] * (1 + length) / (k["flops"] * compute * tp) * 0.9
    if effects:
        base = base + 9e-6 * seqs
        context = context * np.select([c["block_size"] == 16, c["block_size"] == 64], [1.06, 1.02], 1.0)
        context = context * np.where((small < 1) & (tp == 1), 1.35, 1.0)
        base = base + np.where(tp == 8, 2.2e-3, 0.0)
        verify = verify * np.where(c["quantization"] == "int4", 1.7, 1.0)
    batch = np.full(tp.shape, 4.0)
    for _ in range(25):
        step = (base + batch * (context + np.maximum(verify, 2e-6)) + batch * k["link"] * doublings) * (1 + draft)
        free_share = np.maximum(1 - prefill_busy, 0.02)
        wanted = rate * ANSWER * step / tokens / free_share
        batch = 0.5 * batch + 0.5 * np.minimum(wanted, limit * 3)
    busy = np.maximum(batch / np.maximum(limit, 0.1), prefill_busy)
    running = np.minimum(batch, limit)
    step = (base + running * (context + verify) + running * k["link"] * doublings) * (1 + draft)
    tpot = step / tokens / np.maximum(1 - prefill_busy, 0.02)
    stall = np.where(chunked, batched * per_prompt_token * 0.35, PROMPT * per_prompt_token * 2.2)
    p99 = tpot * (1 + k["tail"] * prefill_busy) + stall * np.minimum(prefill_busy * 4, 1) / 6
    pieces = np.where(chunked, np.maximum(PROMPT / batched, 1.0), 1.0)
    alone = PROMPT * per_prompt_token + pieces * step
    queue = alone * 2.2 * prefill_busy / np.maximum(1 - np.minimum(prefill_busy, 0.995), 0.005)
    over = np.where(busy > 0.9, (busy - 0.9) * 25, 0.0)
    ttft = alone * 1.4 + queue + over
    served = np.minimum(1.0, 1 / np.maximum(busy, 1e-9))
    hidden = (
        ((c["quantization"] == "int4") & (small < 1), 1.0),
        ((method == "eagle") & ~chunked, 1.0),
        ((c["gpu_memory_utilization"] >= 0.95) & (batched >= 8192), 0.8),
    )
    tokens_per_s = rate * ANSWER * served
    return {
        "ttft_p99_s": ttft,
        "tpot_p99_s": p99,
        "output_tokens_per_s": tokens_per_s,
        COST_KEY: PRICE * tp / 3600 / tokens_per_s * 1e6,
        "short_bytes": short,
        **crashes(len(tp), *(hidden if effects else ())),
        "kv_tokens": room,
    }


def surface() -> Surface:
    space = SearchSpace(
        "bench/dense",
        "emulator",
        (
            numeric("tensor_parallel_size", 1, 2, 4, 8, default=4, counts_gpus=True),
            numeric("max_num_batched_tokens", 512, 1024, 2048, 4096, 8192, 16384, default=2048),
            numeric("max_num_seqs", 16, 32, 64, 128, 256, 512, default=256),
            parameter("quantization", "none", "fp8", "int4", default="none"),
            parameter("kv_cache_dtype", "auto", "fp8", default="auto"),
            numeric("gpu_memory_utilization", 0.8, 0.85, 0.9, 0.95, default=0.9),
            parameter("block_size", 16, 32, 64, default=16),
            parameter("speculation", "none", "ngram", "eagle", default="none"),
            numeric("draft_length", 1, 2, 4, 8, default=2, when={"speculation": {"ne": "none"}}),
            parameter("chunked_prefill", True, False, default=True),
        ),
    )
    slos = (parse("ttft_p99=1500ms"), parse("tpot_p99=60ms"))
    exact = frozenset({"weights", "kv", "memory", "active"})
    loads = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
    objective = Objective("chat", "tpot_p99", slos, PRICE)
    return Surface("dense", space, objective, loads, physics, CONSTANTS, exact=exact, messages=MESSAGES)
