"""A synthetic response surface: vLLM on one node of up to 8 GPUs (roofline, continuous batching, queues at open-loop
load).

Every number is computed on columns (numpy arrays over configurations x loads), for the whole grid of a scenario at
once; ``truth`` of one configuration is a look-up.
"""

import functools
import hashlib
import math

import numpy as np

LOADS = [0.25, 0.5, 1.0, 1.6, 2.5, 4.0, 6.0]
NOISE, LUCK = 0.05, 0.04
WINDOW_S = 120.0

_SPACE = {
    "tensor_parallel_size": [1, 2, 4, 8],
    "data_parallel_size": [1, 2, 4],
    "max_num_seqs": [32, 64, 128, 256, 512],
    "max_num_batched_tokens": [1024, 2048, 4096, 8192, 16384],
    "gpu_memory_utilization": [0.85, 0.9, 0.95],
    "quantization": ["none", "fp8", "awq_marlin"],
    "kv_cache_dtype": ["auto", "fp8"],
    "num_speculative_tokens": [0, 2, 4],
    "enable_prefix_caching": [False, True],
    "block_size": [16, 64],
    "enforce_eager": [False, True],
}

# n_gb: bf16 weights; p_act: billions of parameters active per token; kv_b: bytes of KV per token, bf16; heads: of KV;
# bus: GB/s of an all-reduce; alpha: seconds per all-reduce by log2(tp); rate: requests/s at load 1; pool: tokens of hot
# prefixes
_S = [
    dict(
        name="8B dense, 8 x L40S, chat",
        gb=48.0,
        bw=864e9,
        tf=362e12,
        bus=22e9,
        alpha=(0, 14e-6, 26e-6, 60e-6),
        price=1.05,
        n_gb=16.1,
        draft_gb=1.0,
        p_act=8.0,
        layers=32,
        hidden=4096,
        kv_b=131072.0,
        heads=8,
        moe=None,
        vocab_mb=0.513,
        inp=1150.0,
        out=260.0,
        share=0.45,
        pool=160e3,
        accept=0.66,
        rate=5.0,
        model_len=8192,
        qflops=dict(none=1.0, fp8=1.75, awq_marlin=0.82),
        slo=dict(ttft_p99_s=0.5, tpot_p99_s=0.050),
    ),
    dict(
        name="32B dense, 8 x H100, retrieval",
        gb=80.0,
        bw=3350e9,
        tf=990e12,
        bus=360e9,
        alpha=(0, 7e-6, 9e-6, 12e-6),
        price=2.9,
        n_gb=65.5,
        draft_gb=1.7,
        p_act=32.8,
        layers=64,
        hidden=5120,
        kv_b=262144.0,
        heads=8,
        moe=None,
        vocab_mb=0.608,
        inp=3600.0,
        out=230.0,
        share=0.55,
        pool=260e3,
        accept=0.61,
        rate=1.8,
        model_len=16384,
        qflops=dict(none=1.0, fp8=1.65, awq_marlin=0.78),
        slo=dict(ttft_p99_s=1.2, tpot_p99_s=0.040),
    ),
    dict(
        name="30B-A3B mixture, 8 x A100-40GB, code",
        gb=40.0,
        bw=1555e9,
        tf=312e12,
        bus=230e9,
        alpha=(0, 8e-6, 11e-6, 15e-6),
        price=1.45,
        n_gb=61.0,
        draft_gb=0.7,
        p_act=3.4,
        layers=48,
        hidden=2048,
        kv_b=98304.0,
        heads=4,
        moe=(3.2, 1 / 16),
        vocab_mb=0.608,
        inp=1900.0,
        out=340.0,
        share=0.65,
        pool=420e3,
        accept=0.76,
        rate=3.2,
        model_len=8192,
        qflops=dict(none=1.0, fp8=0.93, awq_marlin=0.80),
        slo=dict(ttft_p99_s=0.5, tpot_p99_s=0.032),
    ),
]
_BYTES = {"none": 1.0, "fp8": 0.52, "awq_marlin": 0.29}


def space():
    return {k: list(v) for k, v in _SPACE.items()}


def default(scenario):
    return dict(
        tensor_parallel_size=(1, 2, 2)[scenario],
        data_parallel_size=1,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.9,
        quantization="none",
        kv_cache_dtype="auto",
        num_speculative_tokens=0,
        enable_prefix_caching=True,
        block_size=16,
        enforce_eager=False,
    )


def slos(scenario):
    return dict(_S[scenario]["slo"])


def _columns(configs_or_grid):
    """Index columns -> numeric columns of shape (n, 1)."""
    col = {}
    for name, values in _SPACE.items():
        idx = configs_or_grid[name]
        v = np.array([float(x) if not isinstance(x, str) else 0.0 for x in values])
        col[name] = v[idx][:, None]
        col["i_" + name] = idx[:, None]
    return col


def _memory(c, s):
    """GB of KV per replica's GPU, tokens of KV per replica, GB outside the budget."""
    tp, k, seqs, mbt = (
        c["tensor_parallel_size"],
        c["num_speculative_tokens"],
        c["max_num_seqs"],
        c["max_num_batched_tokens"],
    )
    wscale = np.array([_BYTES[q] for q in _SPACE["quantization"]])[c["i_quantization"]]
    dense = 0.06 * s["n_gb"]  # embeddings and head stay bf16
    weights = dense + (s["n_gb"] - dense) * wscale
    draft = np.where(k > 0, s["draft_gb"], 0.0)
    act = 1.1 + mbt * s["hidden"] * 34e-9 / np.minimum(tp, 4) + seqs * (1 + k) * s["vocab_mb"] / 1000 * 1.5 / tp
    spare = c["gpu_memory_utilization"] * s["gb"] - (weights + draft) / tp - act
    kv_b = s["kv_b"] * np.where(c["i_kv_cache_dtype"] == 1, 0.5, 1.0)
    split = np.minimum(tp, s["heads"])
    tokens = np.maximum(spare, 0) * 1e9 * split / kv_b * (1 - c["block_size"] / 2 / (s["inp"] + s["out"]))
    graphs = np.where(c["enforce_eager"] > 0, 0.1, 0.5 + 0.0021 * seqs * (1 + 0.18 * k) * (s["hidden"] / 4096) ** 0.5)
    outside = 0.55 + graphs + np.where(tp > 1, 0.25 + 0.09 * tp, 0.0)
    return spare, tokens, outside, weights, kv_b, split


def _rules(c, s, mem):
    spare, tokens, outside, *_ = mem
    tp, k = c["tensor_parallel_size"], c["num_speculative_tokens"]
    fp8kv, awq, fp8 = c["i_kv_cache_dtype"] == 1, c["i_quantization"] == 2, c["i_quantization"] == 1
    rules = [
        (tp * c["data_parallel_size"] > 8, "World size is larger than the number of available GPUs (8)"),
        (spare <= 0, "No available memory for the cache blocks"),
        (
            tokens < s["model_len"],
            "max seq len is larger than the maximum number of tokens that can be stored in KV cache",
        ),
        (
            c["gpu_memory_utilization"] * s["gb"] + outside > s["gb"] - 0.1,
            "CUDA out of memory during graph capture or NCCL init",
        ),
    ]
    if s["moe"]:
        rules += [
            (awq & (tp == 8), "AWQ: the expert's intermediate size per rank is not divisible by group size 128"),
            (
                fp8kv & (c["block_size"] == 16) & (k > 2) & (c["enforce_eager"] == 0),
                "no capturable attention backend for this fp8 KV page size and query length on sm_80",
            ),
        ]
    elif s["gb"] == 48.0:
        rules += [
            (
                fp8kv & (k > 2) & (c["block_size"] == 64),
                "FlashInfer: no kernel for this query length, page size and fp8 KV on sm_89",
            ),
            (awq & (k > 0) & (tp == 8), "draft model's quantized head cannot be sharded over 8 ranks"),
        ]
    else:
        rules += [
            (
                fp8 & fp8kv & (k > 2) & (c["enforce_eager"] == 0),
                "illegal memory access in captured fp8 verification kernel",
            )
        ]
    return rules


def _evaluate(c, load, s):
    """All metrics, shape (n, len(load)); crash (n,)."""
    mem = _memory(c, s)
    spare, kv_tokens, _, weights, kv_b, split = mem
    crash = np.zeros_like(spare, dtype=bool)
    for mask, _ in _rules(c, s, mem):
        crash |= mask
    tp, dp, k = c["tensor_parallel_size"], c["data_parallel_size"], c["num_speculative_tokens"]
    seqs, mbt, eager = c["max_num_seqs"], c["max_num_batched_tokens"], c["enforce_eager"] > 0
    pc, block = c["enable_prefix_caching"] > 0, c["block_size"]
    iq = c["i_quantization"]
    fp8kv = c["i_kv_cache_dtype"] == 1
    ltp = np.log2(tp).astype(int)
    inp, out, layers, hidden = s["inp"], s["out"], s["layers"], s["hidden"]
    ctx = inp + 0.55 * out

    lam = load[None, :] * s["rate"] / dp * (1 + 0.05 * np.log2(dp))  # uneven routing
    gain = np.array([s["qflops"][q] for q in _SPACE["quantization"]])[iq]
    mfu = 0.56 / (1 + 0.05 * ltp)
    alpha = np.array(s["alpha"])[ltp]
    bytes_tok = hidden * 2.0 * 2 * (tp - 1) / tp / s["bus"]  # seconds per token and all-reduce
    quad = 1 + inp / 60000.0 * (12.0 / (s["p_act"] ** 0.5 + 6))
    t_ptok = 2e9 * s["p_act"] / (tp * s["tf"] * mfu * gain) * quad + 2 * layers * bytes_tok * 0.75
    t_ptok = t_ptok * (1 + 350.0 / np.minimum(mbt, 1.3 * inp))  # short chunks fill the tensor cores badly
    if s["moe"]:
        t_ptok = t_ptok * 1.7
    p_acc = s["accept"] - 0.04 * (iq == 2) - 0.015 * (iq == 1) - 0.012 * fp8kv
    acc = (1 - p_acc ** (k + 1)) / (1 - p_acc)
    w_gpu = weights * 1e9 / tp
    bw = s["bw"] * np.where(iq == 2, 0.70, 0.80)
    kv_read = (
        ctx
        * kv_b
        / split
        / (s["bw"] * np.where(block == 16, 0.60, 0.66) * np.where(fp8kv, 0.62 if s["gb"] == 40.0 else 0.9, 1.0))
    )
    kv_read = kv_read * (1 + 0.06 * k)
    tf_dec = tp * s["tf"] * 0.45 * np.where(iq == 2, 0.7, gain)
    cpu0 = (1.7e-3 + 0.35e-3 * ltp) * (1 + 0.06 * (dp - 1)) * (1 + 0.02 * pc)
    launch = layers * np.where(eager, 105e-6, 9e-6) * (1 + 0.08 * ltp)
    t_draft = np.where(k > 0, 0.5e-3, 0) + k * (0.8 * s["draft_gb"] * 1e9 / s["bw"] / tp + 0.25e-3 + 2 * alpha)

    def t_dec(b):
        q = b * (1 + k)
        if s["moe"]:
            dense, per = s["moe"]
            seen = 1 - np.exp(np.log1p(-per) * np.minimum(np.maximum(q, 1.0), 400.0))
            frac = (dense + (s["n_gb"] - dense) * seen) / s["n_gb"]
            t_mem = w_gpu * frac / bw
        else:
            t_mem = w_gpu / bw
        t_comp = q * 2e9 * s["p_act"] / tf_dec
        gpu = np.maximum(t_mem, t_comp) + 0.3 * np.minimum(t_mem, t_comp) + b * kv_read
        comm = np.where(tp > 1, 2 * layers * (alpha + q * bytes_tok), 0.0)
        cpu = cpu0 + b * 9e-6 * (1 + 0.5 * (k > 0))
        step = np.maximum(gpu + comm, launch) + 0.25 * np.minimum(gpu + comm, launch) + cpu + t_draft
        return step * (1 + 0.09 * np.log2(dp)) if s["moe"] else step

    b_kv = kv_tokens / (ctx * 1.08)
    b_max = np.maximum(np.minimum(np.minimum(seqs, 0.92 * mbt / (1 + k)), b_kv), 1.0)

    def prompt(b):
        room = np.clip((kv_tokens - b * ctx) / s["pool"], 0.0, 1.0)
        hit = np.where(pc, s["share"] * room**0.6 * (1 - 0.07 * np.log2(dp)) * (1 - block / 2.5 / inp), 0.0)
        return inp * (1 - hit)

    b = np.ones_like(lam * tp)
    for _ in range(22):
        n_tok = prompt(b)
        rho = np.minimum(lam * n_tok * t_ptok, 0.96)
        b = np.minimum(0.15 * b + 0.85 * lam * out * t_dec(b) / (acc * (1 - rho)), b_max)
    b = np.maximum(b, 0.02)
    n_tok = prompt(b)
    rho = np.minimum(lam * n_tok * t_ptok, 0.96)
    step = t_dec(b)
    tpot = step / (acc * (1 - rho))
    rho_full = np.minimum(lam * prompt(b_max) * t_ptok, 0.96)
    u_slot = lam * out * t_dec(b_max) / (acc * (1 - rho_full)) / b_max
    chunk = np.maximum(mbt - b * (1 + k), 48.0)
    service = n_tok * (t_ptok + step / chunk)
    u_pre = lam * service
    first = n_tok * t_ptok + np.maximum(n_tok / chunk, 1.0) * step
    # preemption: the cache, not the slots, is the limit
    pressure = np.clip(b * ctx * 1.3 / np.maximum(kv_tokens, 1.0) - 0.8, 0.0, 0.6)
    tpot = tpot * (1 + 0.5 * pressure)
    u = np.maximum(np.maximum(u_slot * (1 + 0.4 * pressure), u_pre), lam * n_tok * t_ptok / 0.97)

    up = np.minimum(u_pre, 0.985)
    w_pre = up * service * 1.1 / (1 - up)
    us = np.minimum(u_slot, 0.985)
    hold = out * tpot
    w_slot = hold / b_max * us ** (np.sqrt(2 * (b_max + 1)) - 1) / (1 - us) * 1.2
    backlog = WINDOW_S * np.maximum(0.0, 1 - 0.985 / u)
    ttft99 = 1.9 * first + 4.2 * w_pre + 4.0 * w_slot + backlog + 0.012
    big = n_tok * t_ptok
    sd = (
        big
        * np.sqrt(lam * hold * 2.2)
        / out
        * (0.55 + 0.45 * np.minimum(1.0, chunk / (2.5 * n_tok)))
        * (1 + (0.12 + 0.9 * up) * np.minimum(1.0, chunk / 16384))
    )
    tpot99 = tpot * (1.06 + 0.035 * k) * (1 + 1.2 * pressure) + 2.33 * sd

    slo = s["slo"]
    miss = 1 - 1 / (1 + 0.0101 * np.minimum(ttft99 / slo["ttft_p99_s"], 8) ** 3.5) / (
        1 + 0.0101 * np.minimum(tpot99 / slo["tpot_p99_s"], 8) ** 3.5
    )
    good = 1 - np.maximum(0.0, miss - 0.005)  # a window has a few hundred requests: rarer misses are not seen
    tokens = load[None, :] * s["rate"] * out * np.minimum(1.0, 0.985 / u)
    goodput = tokens * good
    cost = s["price"] * tp * dp / 3600 / goodput * 1e6
    ok = (ttft99 <= slo["ttft_p99_s"]) & (tpot99 <= slo["tpot_p99_s"]) & ~crash
    return (
        crash[:, 0],
        dict(
            cost_usd_per_mtok_output=cost,
            tpot_p99_s=tpot99,
            ttft_p99_s=ttft99,
            output_tokens_per_s=tokens,
            goodput_output_tokens_per_s=goodput,
        ),
        ok,
    )


@functools.cache
def _compute(scenario):
    sizes = [len(v) for v in _SPACE.values()]
    n = math.prod(sizes)
    load = np.array(LOADS)
    parts = []
    for lo in range(0, n, 8192):
        idx = np.unravel_index(np.arange(lo, min(lo + 8192, n)), sizes)
        with np.errstate(all="ignore"):
            parts.append(_evaluate(_columns(dict(zip(_SPACE, idx, strict=True))), load, _S[scenario]))
    crash = np.concatenate([p[0] for p in parts])
    metrics = {m: np.concatenate([p[1][m] for p in parts]) for m in parts[0][1]}
    ok = np.concatenate([p[2] for p in parts])
    for m in metrics.values():
        m[crash] = np.nan
    return crash, metrics, ok


def truth_grid(scenario):
    """Which configurations run (N,), and at every load of the ladder cost, TPOT p99 and whether the SLOs hold (N, L),
    in the order of itertools.product over space()."""
    crash, metrics, ok = _compute(scenario)
    return ~crash, metrics["cost_usd_per_mtok_output"], metrics["tpot_p99_s"], ok


def grid_index(config):
    at = 0
    for name, values in _SPACE.items():
        at = at * len(values) + values.index(config[name])
    return at


def _single(config):
    return _columns({n: np.array([v.index(config[n])]) for n, v in _SPACE.items()})


def truth(config, load, scenario):
    crash, metrics, _ = _compute(scenario)
    i, j = grid_index(config), LOADS.index(load)
    return None if crash[i] else {m: float(v[i, j]) for m, v in metrics.items()}


def reason(config, scenario):
    """Why the launch fails, or None."""
    c, s = _single(config), _S[scenario]
    return next((text for mask, text in _rules(c, s, _memory(c, s)) if mask[0, 0]), None)


def _luck(config, scenario):
    key = f"a|{scenario}|" + "|".join(str(config[n]) for n in _SPACE)
    return (
        np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")).standard_normal(3)
        * LUCK
    )


def measure(config, load, scenario, rng):
    true = truth(config, load, scenario)
    if true is None:
        import tuner

        raise tuner.Infeasible(reason(config, scenario))
    luck = _luck(config, scenario)
    f_tok, f_tpot, f_ttft = np.exp(luck + NOISE * rng.standard_normal(3))
    return dict(
        cost_usd_per_mtok_output=true["cost_usd_per_mtok_output"] / f_tok,
        tpot_p99_s=true["tpot_p99_s"] * f_tpot,
        ttft_p99_s=true["ttft_p99_s"] * f_ttft,
        output_tokens_per_s=true["output_tokens_per_s"] * f_tok,
        goodput_output_tokens_per_s=true["goodput_output_tokens_per_s"] * f_tok,
    )


def launch_s(config, scenario):
    s = _S[scenario]
    load = s["n_gb"] * _BYTES[config["quantization"]] / 1.6 / config["tensor_parallel_size"] ** 0.5
    if config["quantization"] == "fp8":
        load = s["n_gb"] / 1.5 / config["tensor_parallel_size"] ** 0.5  # quantized at load
    graphs = 0 if config["enforce_eager"] else 22 + config["max_num_seqs"] * 0.03
    spec = 12 if config["num_speculative_tokens"] else 0
    world = 4 * config["tensor_parallel_size"] * config["data_parallel_size"] ** 0.5
    return float(min(200.0, max(40.0, 28 + load + graphs + spec + world)))
