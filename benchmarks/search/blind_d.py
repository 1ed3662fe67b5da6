"""A synthetic response surface of LLM serving: TensorRT-LLM (trtllm-serve, PyTorch backend) on one node of 8 GPUs.

Three scenarios: Qwen3-32B (dense) on H100 with retrieval traffic, Qwen3-235B-A22B (MoE) on B200 with long answers,
and Llama-4-Scout (MoE) on RTX PRO 6000 (PCIe) with bursty multi-turn agents. One instance of `tp_size` GPUs takes the
whole load; cost counts its GPUs. `truth_grid` is the noise-free surface, `measure` one noisy launch at one load,
`predictor` a textbook model of it that may be wrong. Chunked context, block reuse and the overlap scheduler are on.
"""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

import tuner

LOADS: list[float] = [0.75, 1.0, 1.5, 2.5, 3.5, 4.5, 6.0]
_SPACE: dict[str, list] = {
    "tp_size": [1, 2, 4, 8],
    "moe_expert_parallel_size": [1, 2],
    "enable_attention_dp": [False, True],
    "quantization": ["none", "fp8", "nvfp4"],
    "kv_cache_dtype": ["auto", "fp8"],
    "tokens_per_block": [32, 128],
    "max_batch_size": [32, 128, 512, 2048],
    "max_num_tokens": [2048, 8192, 16384],
    "kv_cache_free_gpu_mem_fraction": [0.75, 0.9, 0.95],
    "cuda_graph_max_batch_size": [0, 128, 1024],
    "max_draft_len": [0, 1, 3],
    "capacity_scheduler_policy": ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"],
}
_NAMES = list(_SPACE)
_SHORT = {
    "tp_size": "g",
    "moe_expert_parallel_size": "ep",
    "enable_attention_dp": "adp",
    "quantization": "q",
    "kv_cache_dtype": "kv8",
    "tokens_per_block": "tpb",
    "max_batch_size": "mb",
    "max_num_tokens": "mnt",
    "kv_cache_free_gpu_mem_fraction": "frac",
    "cuda_graph_max_batch_size": "cg",
    "max_draft_len": "d",
    "capacity_scheduler_policy": "mu",
}
_CODED = ("quantization", "kv_cache_dtype", "capacity_scheduler_policy")
_STRIDE = np.cumprod([1] + [len(v) for v in reversed(_SPACE.values())])[:-1][::-1]
_N = math.prod(len(v) for v in _SPACE.values())
_K = 44  # points of the curve of concurrency
_WINDOW = 240.0  # seconds of a measurement

# Weights: parameters of attention, feed-forward (all experts), one of embedding and head, the draft head.
_MODELS = {
    "Qwen3-32B": dict(
        layers=64,
        hidden=5120,
        heads=64,
        kvh=8,
        hd=128,
        inter=25600,
        experts=1,
        topk=1,
        p_attn=6.04e9,
        p_ffn=25.2e9,
        p_emb=0.78e9,
        p_draft=0.8e9,
        vocab=151936,
        kernels=11,
    ),
    "Qwen3-235B-A22B": dict(
        layers=94,
        hidden=4096,
        heads=64,
        kvh=4,
        hd=128,
        inter=1536,
        experts=128,
        topk=8,
        p_attn=6.7e9,
        p_ffn=227e9,
        p_emb=0.62e9,
        p_draft=0.6e9,
        vocab=151936,
        kernels=15,
    ),
    "Llama-4-Scout": dict(  # the shared expert counts as p_attn: both are replicated under attention DP
        layers=48,
        hidden=5120,
        heads=40,
        kvh=8,
        hd=128,
        inter=8192,
        experts=16,
        topk=1,
        p_attn=9.1e9,
        p_ffn=96.6e9,
        p_emb=1.03e9,
        p_draft=0.7e9,
        vocab=202048,
        kernels=16,
    ),
}
# flops: dense peak of bf16, fp8, fp4; e_gemm: what prefill kernels reach of it, per quantization; e_moe: what grouped
# GEMMs reach of the bandwidth; kv8: efficiency of decoding with FP8 KV; fmha8: speedup of context attention with it.
_GPUS = {
    "H100": dict(
        sm=90,
        hbm=80e9,
        bw=3.35e12,
        flops=(0.989e15, 1.979e15, 1.979e15),
        nvlink=True,
        link=450e9,
        price=2.9,
        e_gemm=(0.66, 0.56, 0.1),
        e_moe=(0.7, 0.66, 0.1),
        kv8=0.80,
        fmha8=1.35,
        launch=4.6e-6,
    ),
    "B200": dict(
        sm=100,
        hbm=180e9,
        bw=7.7e12,
        flops=(2.25e15, 4.5e15, 9.0e15),
        nvlink=True,
        link=900e9,
        price=5.2,
        e_gemm=(0.62, 0.46, 0.30),
        e_moe=(0.66, 0.58, 0.45),
        kv8=0.90,
        fmha8=1.3,
        launch=3.9e-6,
    ),
    "RTX PRO 6000": dict(
        sm=120,
        hbm=96e9,
        bw=1.79e12,
        flops=(0.5e15, 1.0e15, 2.0e15),
        nvlink=False,
        link=50e9,
        price=1.7,
        e_gemm=(0.68, 0.52, 0.20),
        e_moe=(0.72, 0.62, 0.48),
        kv8=0.60,
        fmha8=1.0,
        launch=3.9e-6,
    ),
}
# isl, osl: means; max_tokens: what clients ask for; share: recurring part of a prompt; ws: tokens of the recurring
# set; ca2: squared variation of the arrivals; acc: acceptance of the first draft; rate: requests/s at load 1;
# slo: TTFT, TPOT.
_SCENARIOS = [
    dict(
        model="Qwen3-32B",
        gpu="H100",
        isl=2000,
        isl_cv=0.5,
        max_seq=10000,
        osl=320,
        max_tokens=1024,
        share=0.35,
        ws=60e3,
        ca2=1.0,
        acc=0.56,
        rate=3.2,
        slo=(0.8, 0.038),
        default={"tp_size": 2},
    ),
    dict(
        model="Qwen3-235B-A22B",
        gpu="B200",
        isl=3500,
        isl_cv=0.8,
        max_seq=24000,
        osl=1600,
        max_tokens=8192,
        share=0.2,
        ws=40e3,
        ca2=1.2,
        acc=0.68,
        rate=2.0,
        slo=(1.5, 0.032),
        default={"tp_size": 4, "quantization": "fp8"},
    ),
    dict(
        model="Llama-4-Scout",
        gpu="RTX PRO 6000",
        isl=5000,
        isl_cv=0.6,
        max_seq=20000,
        osl=180,
        max_tokens=1024,
        share=0.7,
        ws=250e3,
        ca2=2.2,
        acc=0.62,
        rate=0.8,
        slo=(2.2, 0.055),
        default={"tp_size": 4},
    ),
]
_DEFAULT = {
    "moe_expert_parallel_size": 1,
    "enable_attention_dp": False,
    "quantization": "none",
    "max_draft_len": 0,
    "kv_cache_dtype": "auto",
    "tokens_per_block": 32,
    "max_batch_size": 2048,
    "max_num_tokens": 8192,
    "kv_cache_free_gpu_mem_fraction": 0.9,
    "cuda_graph_max_batch_size": 128,
    "capacity_scheduler_policy": "GUARANTEED_NO_EVICT",
}
_MESSAGES = [
    "",
    "ValueError: moe_tp_size * moe_ep_size must equal tp_size: moe_expert_parallel_size does not divide it",
    "RuntimeError: NVFP4 GEMM is not supported on SM90 (needs Blackwell, SM100 or newer)",
    "ValueError: moe_intermediate_size per rank is not a multiple of the block of the scales",
    "torch.OutOfMemoryError: CUDA out of memory while loading weights",
    "RuntimeError: max_seq_len exceeds the KV cache: not enough free memory left for kv_cache_free_gpu_mem_fraction",
    "torch.OutOfMemoryError: CUDA out of memory during CUDA graph capture / warm-up (KV cache pool already allocated)",
    "RuntimeError: Missing TRTLLM-GEN kernel (decode): E4m3 KV, numTokensPerPage 128, numTokensPerCta > 2",
    "RuntimeError: CUDA error: an illegal memory access was encountered (XQA sm_120, E4m3 KV, 128 per page)",
    "RuntimeError: NCCL error: unhandled system error (allgather of attention DP, PCIe P2P across sockets)",
]


def space() -> dict[str, list]:
    """Names of the parameters and their values."""
    return {k: list(v) for k, v in _SPACE.items()}


def default(scenario: int) -> dict:
    """The engine's default configuration, with the published checkpoint on as many GPUs as it asks for."""
    both = {**_DEFAULT, **_SCENARIOS[scenario]["default"]}
    return {k: both[k] for k in _NAMES}


def slos(scenario: int) -> dict:
    """Limits of the two latencies, in seconds."""
    return dict(zip(("ttft_p99_s", "tpot_p99_s"), _SCENARIOS[scenario]["slo"], strict=True))


def grid_index(params: Mapping) -> int:
    """The row of a configuration in the order of itertools.product."""
    return int(sum(_SPACE[k].index(params[k]) * s for k, s in zip(_NAMES, _STRIDE, strict=True)))


def _columns(index: np.ndarray) -> dict[str, np.ndarray]:
    out = {}
    for name, stride in zip(_NAMES, _STRIDE, strict=True):
        values = _SPACE[name]
        numbers = range(len(values)) if name in _CODED else values
        out[_SHORT[name]] = np.array(numbers, float)[index // stride % len(values)]
    return out


def _traits(scenario: int) -> tuple[dict, dict, dict]:
    s = _SCENARIOS[scenario]
    return s, _MODELS[s["model"]], _GPUS[s["gpu"]]


def _static(c: dict, scenario: int) -> dict:
    """What does not depend on the load: sharding, memory, why a configuration does not run."""
    s, m, u = _traits(scenario)
    moe, g, d, q = m["experts"] > 1, c["g"], c["d"], c["q"].astype(int)
    dp = np.where(c["adp"] > 0, g, 1.0)
    gt = g / dp
    wb = np.array([2.0, 1.02, 0.57])[q]
    spec = d > 0
    replicated = 2 * m["p_emb"] * 2 / gt + spec * m["p_draft"] * 2 / gt
    w = wb * (m["p_attn"] / gt + m["p_ffn"] / g) + replicated
    kvb = (m["layers"] + spec) * 2 * np.ceil(m["kvh"] / gt) * m["hd"] * np.where(c["kv8"] > 0, 1.0, 2.0)
    # graphs are filtered by the token budget
    cg = np.minimum(np.minimum(c["cg"], c["mb"]), np.floor(c["mnt"] / (1 + d)))
    many = g > 1
    context = 1.3e9 + many * (0.45e9 + 0.13e9 * g * (1 if u["nvlink"] else 0.4)) + spec * 0.3e9
    gather = (dp > 1) * c["mnt"] * g * m["hidden"] * 2 * (2.5 if moe else 1.5)
    act = c["mnt"] * m["hidden"] * (46 + 70 * moe) * (0.55 + 0.45 / gt)
    logits = np.minimum(c["mb"], c["mnt"] / (1 + d)) * (1 + d) * m["vocab"] * 4
    graphs = (cg > 0) * (0.2e9 + 1.1e9 * cg * (1 + d) / 1024 * m["hidden"] / 4096)
    late = 0.35e9 + 0.35 * logits + 0.25 * gather + graphs  # allocated after the KV cache took its share
    free = u["hbm"] * 0.982 - w - context - gather - act - 0.65 * logits
    pool = np.floor(np.maximum(free, 0) * c["frac"] / kvb / c["tpb"]) * c["tpb"]  # tokens, per attention rank
    shard = m["inter"] / (g / c["ep"])
    rules = [
        c["ep"] > g,
        (q == 2) & (u["sm"] < 100),
        moe & (((q == 1) & (shard % 128 != 0)) | ((q == 2) & (shard % 64 != 0))),
        w + context > u["hbm"] * 0.982,
        pool < s["max_seq"],
        late > (1 - c["frac"]) * free + 0.012 * u["hbm"],
        (u["sm"] == 100) & (c["kv8"] > 0) & (c["tpb"] == 128) & (d == 3) & (gt <= 4),
        (u["sm"] == 120) & (c["kv8"] > 0) & (c["tpb"] == 128) & (d > 0),
        (u["sm"] == 120) & (dp == 8) & (c["mnt"] > 8192),
    ]
    code = np.select(rules, range(1, len(rules) + 1), 0)
    return dict(code=code, q=q, dp=dp, gt=gt, wb=wb, w=w, kvb=kvb, cg=cg, pool=pool, shard=shard, spec=spec)


def _allreduce(size: np.ndarray, g: np.ndarray, u: dict) -> np.ndarray:
    """Seconds of one allreduce of `size` bytes: the engine's AUTO strategy, with its steps."""
    ring = 2 * size * (g - 1) / g
    if not u["nvlink"]:  # NCCL over PCIe, a custom kernel for two GPUs only; the traffic of 8 GPUs crosses the sockets
        nccl = 20e-6 + 5.5e-6 * g + ring / (u["link"] * np.where(g == 8, 0.40, np.where(g == 4, 0.58, 0.72)))
        return np.where(g == 1, 0.0, np.where((g == 2) & (size < 256e3), 13e-6 + size / 22e9, nccl))
    one = 4.5e-6 + 0.5e-6 * g + size * (g - 1) / (u["link"] * 0.45)
    two = 8.5e-6 + 0.8e-6 * g + ring / (u["link"] * 0.6)
    nccl = 17e-6 + 2.4e-6 * g + ring / (u["link"] * np.where(size > 32e6, 0.8, 0.6))
    return np.where(g == 1, 0.0, np.where(size < 1e6 / g, one, np.where(size < 64e6 / g, two, nccl)))


def _padded(b: np.ndarray) -> np.ndarray:
    """The next captured graph: 1, 2, 4, steps of 8 up to 128, then powers of two."""
    return np.where(
        b <= 4,
        np.exp2(np.ceil(np.log2(np.maximum(b, 1)))),
        np.where(b <= 128, np.ceil(b / 8) * 8, np.exp2(np.ceil(np.log2(np.maximum(b, 1))))),
    )


def _knee(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b) + 0.22 * np.minimum(a, b)


def _ffn(tokens: np.ndarray, c: dict, st: dict, m: dict, u: dict) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and FLOPs (both in seconds at peak) of the feed-forward part per GPU for a step of `tokens`."""
    g, peak = c["g"], np.array(u["flops"])[st["q"]]
    if m["experts"] == 1:
        return st["wb"] * m["p_ffn"] / g / u["bw"], 2 * m["p_ffn"] * tokens / g / peak
    e, k = m["experts"], m["topk"]
    touched = e * (1 - np.exp(-k / e * 0.8 * tokens))  # popular experts: fewer than independent draws would touch
    touched = np.maximum(touched, np.minimum(k, e))
    skew = 1 + (c["ep"] > 1) * (0.10 + 0.6 * np.sqrt(c["ep"] / (tokens * k + 4)))
    narrow = 1 + 96 / st["shard"]
    rows = tokens * k + touched * np.where(st["q"] == 2, 12, 8)  # half-empty tiles of the grouped GEMM
    mem = st["wb"] * m["p_ffn"] * touched / e / g / u["bw"] * skew * (0.5 + 0.5 * narrow)
    return mem, 2 * m["p_ffn"] / e * rows / g / peak * skew * narrow


def _curve(c: dict, st: dict, scenario: int, n: np.ndarray) -> dict:
    """Decode step, prefill work per request and throughput when `n` (N, K) requests decode at once."""
    s, m, u = _traits(scenario)
    moe, g, d, dp, gt, q = m["experts"] > 1, c["g"], c["d"], st["dp"], st["gt"], st["q"]
    layers, hidden, peak = m["layers"], m["hidden"], np.array(u["flops"])[st["q"]]
    b = np.maximum(n / dp, np.minimum(n, 1.0))
    b = b + (dp > 1) * 0.55 * np.sqrt(b) * (1 - 1 / dp)  # the fullest attention-DP rank sets the pace
    sd = np.sqrt(b)
    graphs = np.clip((st["cg"] - b + sd) / (2 * sd), 0, 1)  # share of the steps that find a captured graph
    low, high = np.minimum(_padded(b - 0.7 * sd), st["cg"]), np.minimum(_padded(b + 0.7 * sd), st["cg"])
    rows = np.maximum(graphs * np.maximum(0.5 * (low + high), b) + (1 - graphs) * b, 1.0)
    t = rows * (1 + d)
    # weights and FLOPs; small batches take the GEMV-like kernels on Blackwell with block scales
    eb = np.array([0.80, 0.75, 0.70])[q] * np.where((u["sm"] >= 100) & (t <= 16) & (q > 0), 1.08, 1.0)
    eb = eb * np.where((u["sm"] == 90) & (q == 1) & (t > 64) & (t <= 128), 0.9, 1.0)  # a poor tile of the FP8 GEMM
    ec = np.array(u["e_gemm"])[q] * t / (t + 90)
    attn = _knee(st["wb"] * m["p_attn"] / gt / u["bw"] / eb, 2 * m["p_attn"] * t / gt / peak / ec)
    head = m["p_emb"] * 2 / gt / u["bw"] / 0.8 + t * m["vocab"] * 10 / u["bw"]
    mem, flop = _ffn(t * dp, c, st, m, u)
    tt = t * dp
    if moe:
        ffn = _knee(mem / np.array(u["e_moe"])[q], flop / (np.array(u["e_gemm"])[q] * 0.75))
    else:
        ffn = _knee(mem / eb, flop / (np.array(u["e_gemm"])[q] * tt / (tt + 90)))
    # attention: reading the KV cache
    ctx = s["isl"] + 0.5 * s["osl"]
    ea = 0.80 * np.where(c["tpb"] == 32, 0.92, 1.0) * np.where(c["kv8"] > 0, u["kv8"], 1.0)
    wide = np.where(m["heads"] / m["kvh"] * (1 + d) > 32, 1.4, 1.0)  # leaves the XQA kernel
    kv = b * ctx * st["kvb"] / u["bw"] / ea * wide * (1 + 0.05 * d) + layers * 1.6e-6
    # communication: two per layer (with attention DP an allgather and a reduce-scatter)
    a2a = np.where(c["ep"] > 1, 0.8 if moe and u["nvlink"] else 1.2, 1.15)  # with experts: all-to-all of routed tokens
    reduce = _allreduce(np.where(dp > 1, tt, t) * hidden * 2, g, u)
    comm = 2 * layers * np.where(dp > 1, a2a * reduce + 3e-6, reduce)
    kernels = layers * (m["kernels"] + 3 * (dp > 1) + 2 * (c["ep"] > 1))
    gpu = attn + head + ffn + kv + comm + kernels * 0.75e-6
    eager = kernels * u["launch"] * 1.25 + 0.6e-3
    draft = (m["p_draft"] * 2 + 32e3 * hidden * 2) / gt / u["bw"] / 0.7 + 75e-6 + (1 - graphs) * 0.35e-3
    draft = d * (draft + 2 * _allreduce(rows * hidden * 2, g, u) * (dp == 1))
    host = 0.9e-3 + 8e-6 * b * (1 + 0.3 * d) + 0.12e-3 * np.log2(g)
    # not hidden by the overlap scheduler; the sampler's buffers have a slot for every possible request
    tail = 0.10e-3 + 1.7e-6 * b + 0.35e-3 * (dp > 1) + 0.45e-3 * st["spec"] + 0.1e-3 * np.log2(g)
    tail = tail + 0.15e-3 * c["mb"] / 2048 * (1 + 0.5 * d)
    loose = np.maximum(1.02 * gpu + kernels * 0.5e-6 + 0.3e-3 + draft, eager + 0.4 * host)
    td = graphs * np.maximum(gpu + draft, host) + (1 - graphs) * loose + tail
    # speculation: later positions are accepted less, more so with coarse weights
    a = s["acc"] - np.array([0, 0.01, 0.045])[q] - 0.015 * c["kv8"]
    acc = 1 + np.where(d >= 1, a, 0) + np.where(d >= 3, a * (a - 0.06) + a * (a - 0.06) * (a - 0.13), 0)
    # block reuse: what the pool has left keeps recurring prefixes; each attention-DP rank keeps its own
    used = np.minimum(b * (ctx * (1 - 0.4 * s["share"])), st["pool"])
    kept = np.clip((st["pool"] - used) / s["ws"], 0, 1) ** 0.7 * np.where(dp > 1, 1 - 0.06 * np.log2(dp), 1.0)
    hit = np.maximum(s["share"] * 0.94 * kept - 0.5 * c["tpb"] / s["isl"], 0)
    fresh = s["isl"] * (1 - hit)
    budget = np.maximum(c["mnt"] - b * (1 + d), 128.0)
    step = np.minimum(np.minimum(budget, fresh * np.clip(1 + 0.02 * n, 1, 4)), 16384)
    par = 1 + np.clip(0.2 + n / dp / 40, 0.2, 0.8) * (dp - 1)  # ranks of the attention DP that prefill at once
    mfu = np.array(u["e_gemm"])[q] * step / (step + 260 * np.sqrt(g))
    mem, flop = _ffn(step * par, c, st, m, u)
    lin = _knee(2 * m["p_attn"] * step / gt / peak / mfu, st["wb"] * m["p_attn"] / gt / u["bw"])
    ffn = _knee(flop / mfu * (1.15 if moe else 1.0), mem)
    fmha = np.where((c["kv8"] > 0), u["fmha8"], 1.0) * 0.5 * u["flops"][0]
    quad = 2 * layers * m["heads"] * m["hd"] * (s["isl"] ** 2 * (1 + s["isl_cv"] ** 2)) * (1 - hit**2) / gt / fmha
    chunk = lin + ffn + quad * step / fresh + 2.2 * layers * _allreduce(step * par * hidden * 2, g, u)
    chunk = np.maximum(chunk + layers * 8e-6, eager) + 0.5e-3  # steps with context tokens are never captured
    work = chunk * fresh / step / par
    serve = work + td * fresh / budget / dp  # a chunk needs a step, and a step decodes as well
    ceiling = 15000 * acc  # one process streams the answers
    busy = np.minimum(n / td * acc / (1 + n / td * work * acc / s["osl"]) / ceiling, 0.97)
    tau = td / acc / (1 - 0.5 * busy**3)
    # memory is short: eviction and recomputation (MAX_UTILIZATION only; the other policy queues)
    need = n / dp * (s["isl"] * (1 - 0.5 * s["share"]) + 0.5 * s["osl"]) / st["pool"]
    evict = c["mu"] * np.clip((need - 0.80) / 0.6, 0, 0.6)
    work = work * (1 + evict * (1 + 0.5 * s["osl"] / fresh))
    x = n / (s["osl"] * tau + n * work)
    return dict(td=tau * acc, tau=tau, acc=acc, work=work, serve=serve, chunk=chunk, x=x, evict=evict, fresh=fresh)


def _evaluate(c: dict, st: dict, scenario: int, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ttft_p99, tpot_p99, output tokens/s), each (N, len(loads)), of configurations that run."""
    s = _SCENARIOS[scenario]
    c = {k: v[:, None] for k, v in c.items()}
    st = {k: v[:, None] for k, v in st.items()}
    blocks = s["isl"] * (1 - 0.5 * s["share"]) + np.where(c["mu"] > 0, 0.55 * s["osl"], s["max_tokens"])
    blocks = blocks / c["tpb"] + 0.5
    fit = st["pool"] * st["dp"] / (blocks * c["tpb"])
    most = np.maximum(np.minimum(np.minimum(c["mb"], np.floor(c["mnt"] / (1 + c["d"]))) * st["dp"], fit), 1.0)
    first = 0.03
    dlog = np.log(most / first) / (_K - 1)
    n = first * np.exp(dlog * np.arange(_K))
    v = _curve(c, st, scenario, n)
    x = np.maximum.accumulate(np.minimum(v["x"], 1 / v["serve"]), axis=1)
    rate = s["rate"] * loads[None, :]
    over = (x[:, None, :] < rate[:, :, None]).sum(-1)
    full = over >= _K
    hi = np.clip(over, 1, _K - 1)
    x0, x1 = np.take_along_axis(x, hi - 1, 1), np.take_along_axis(x, hi, 1)
    pos = hi - 1 + np.clip((np.minimum(rate, x1) - x0) / np.maximum(x1 - x0, 1e-9), 0, 1)

    def at(name: str, p: np.ndarray) -> np.ndarray:
        y = np.broadcast_to(v[name], n.shape)
        i = np.clip(p.astype(int), 0, _K - 2)
        y0 = np.take_along_axis(y, i, 1)
        return y0 + (np.take_along_axis(y, i + 1, 1) - y0) * (p - i)

    # overload lasts one measurement only: the backlog, not the limit, may bound how many decode at once
    knee = first * np.exp(dlog * (x < 0.98 * x[:, -1:]).sum(-1, keepdims=True))
    backlog = np.minimum(most, knee + 0.6 * _WINDOW * np.maximum(rate - x[:, -1:], 0))
    pos = np.where(full, np.minimum(np.log(backlog / first) / dlog, _K - 1), pos)
    now = first * np.exp(dlog * pos)
    peak_pos = np.minimum(pos + np.log1p(1.7 * np.sqrt((s["ca2"] + 1) / 2 / (now + 0.5))) / dlog, _K - 1)
    v["top"] = x
    served = np.where(full, at("top", pos), np.minimum(rate, x[:, -1:]))
    work, serve, chunk, td = at("work", pos), at("serve", pos), at("chunk", pos), at("td", peak_pos)
    acc, evict, fresh = np.broadcast_to(v["acc"], now.shape), at("evict", peak_pos), at("fresh", pos)
    # time per output token: a busy moment, prompts that interrupt, an unlucky draft, an eviction
    rho = np.minimum(served * work, 0.93)
    rho = np.minimum(rho * (1 + 1.9 * np.sqrt((s["ca2"] + 0.3) / (now * 0.6 + 0.8))), 0.45 + 0.55 * rho)
    together = np.minimum(c["mnt"] / fresh, 0.6 + s["ca2"] * (0.5 + 2.5 * np.minimum(served * work, 1)))
    stall = work * together  # prompts that share a step
    tpot = td / (1 + (acc - 1) * 0.72) / (1 - rho) + np.minimum(stall, 3.0) / (0.45 * s["osl"])
    tpot = tpot * (1 + 1.6 * np.minimum(evict / 0.02, 1) * (0.25 + evict))
    # time to first token: the tokenizer, a running step, the queue of prompts, admission to the KV cache
    w = np.minimum(served * serve, 0.985)
    long = 1 + 2.4 * s["isl_cv"]
    spread = (s["ca2"] + 0.3 + s["isl_cv"] ** 2) / 2
    queue = np.maximum(np.log(100 * w + 1e-9), 0) * serve * spread / (1 - w)
    stay = s["osl"] * at("tau", pos) / (1 - np.minimum(served * work, 0.93))
    room = np.minimum(now / most, 0.995)
    wait = np.maximum(np.log(100 * room ** (np.sqrt(2 * (most + 1)) - 1) + 1e-12), 0)
    wait = wait * stay / (most * (1 - room)) * (s["ca2"] + 1) / 2
    steps = np.ceil(fresh * long / np.maximum(c["mnt"] - now / st["dp"] * (1 + c["d"]), 128))
    single = np.maximum(work * st["dp"] ** 0.45 * long, chunk) + steps * td
    ttft = 0.010 + 2.4e-6 * s["isl"] + 0.6 * td + single + np.minimum(queue + wait + 0.4 * evict * stay, 0.2 * _WINDOW)
    ttft = ttft + np.where(full, _WINDOW * np.maximum(1 - served / rate, 0), 0)
    total = ttft + s["osl"] * tpot
    tokens = served * s["osl"] / (1 + 0.35 * np.minimum(total, 60) / _WINDOW)  # the drain of the last requests counts
    return ttft, tpot, tokens


def _dollars(g: np.ndarray, tokens: np.ndarray, scenario: int) -> np.ndarray:
    return g * _traits(scenario)[2]["price"] / 3600 / tokens * 1e6


@functools.lru_cache(maxsize=3)
def truth_grid(scenario: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(runs, cost, latency, ok) of the whole grid, without noise; cost and latency are infinite where it fails."""
    loads, limit = np.array(LOADS), _SCENARIOS[scenario]["slo"]
    cost, latency = np.full((_N, len(loads)), np.inf), np.full((_N, len(loads)), np.inf)
    ok = np.zeros((_N, len(loads)), bool)
    c = _columns(np.arange(_N))
    st = _static(c, scenario)
    runs = st["code"] == 0
    for rows in np.array_split(np.flatnonzero(runs), max(1, int(runs.sum()) // 6000)):
        part, pst = {k: v[rows] for k, v in c.items()}, {k: v[rows] for k, v in st.items()}
        ttft, tpot, tokens = _evaluate(part, pst, scenario, loads)
        cost[rows], latency[rows] = _dollars(part["g"][:, None], tokens, scenario), tpot
        ok[rows] = (ttft <= limit[0]) & (tpot <= limit[1])
    return runs, cost, latency, ok


def measure(params: dict, load: float, scenario: int, rng: np.random.Generator) -> dict:
    """One launch at one load, with 5 % noise; raises tuner.Infeasible with what the engine would log."""
    c = _columns(np.array([grid_index(params)]))
    st = _static(c, scenario)
    if st["code"][0]:
        raise tuner.Infeasible(_MESSAGES[st["code"][0]])
    ttft, tpot, tokens = (float(x[0, 0]) for x in _evaluate(c, st, scenario, np.array([load])))
    shared, own = rng.normal(0, 0.035), np.exp(rng.normal(0, 0.0357, 3))
    slow = math.exp(shared)
    tokens *= float(own[2]) / slow
    return {
        "ttft_p99_s": ttft * slow * float(own[0]),
        "tpot_p99_s": tpot * slow * float(own[1]),
        "output_tokens_per_s": tokens,
        "cost_usd_per_mtok_output": float(_dollars(c["g"][0], tokens, scenario)),
    }


def launch_s(params: dict, scenario: int) -> float:
    """Seconds of the start: imports, weights, autotuner, warm-up, graphs; a refused combination fails early."""
    m, u = _traits(scenario)[1:]
    c = _columns(np.array([grid_index(params)]))
    st = {k: float(v[0]) for k, v in _static(c, scenario).items()}
    g, code = params["tp_size"], int(st["code"])
    if code in (1, 2, 3):
        return 14.0 + 1.5 * g
    weights = 25 + 2.2 * g + st["wb"] * (m["p_attn"] + m["p_ffn"]) / 3.5e9
    if code in (4, 5):
        return weights + 6
    tune = (35 if m["experts"] > 1 else 12) * (1.6 if u["sm"] >= 100 else 1) + 3e-3 * params["max_num_tokens"]
    captured = 0 if st["cg"] == 0 else 4 + min(st["cg"], 128) / 8 + max(0, math.log2(max(st["cg"], 128) / 128))
    return weights + tune + captured * (0.35 + 0.012 * m["layers"]) * (1 + 0.5 * bool(params["max_draft_len"]))


_RIGHT = [  # constants of the textbook model that fit the truth best, per scenario
    dict(
        bandwidth_efficiency=0.47,
        flops_efficiency=0.65,
        step_overhead_s=3.5e-3,
        link_efficiency=0.42,
        hop_latency_s=14e-6,
        acceptance=0.37,
        tail_factor=1.1,
        overhead_gb=3.0,
        reuse=0.95,
    ),
    dict(
        bandwidth_efficiency=0.55,
        flops_efficiency=0.59,
        step_overhead_s=6.5e-3,
        link_efficiency=0.42,
        hop_latency_s=14e-6,
        acceptance=0.52,
        tail_factor=1.0,
        overhead_gb=4.0,
        reuse=0.95,
    ),
    dict(
        bandwidth_efficiency=0.36,
        flops_efficiency=0.45,
        step_overhead_s=8e-3,
        link_efficiency=0.8,
        hop_latency_s=31e-6,
        acceptance=0.34,
        tail_factor=1.8,
        overhead_gb=3.0,
        reuse=0.95,
    ),
]


def predictor(scenario: int, kind: str, seed: int) -> Callable[..., dict]:
    """A textbook model: roofline, M/M/1, a fixed tail; ignores blocks, captured graphs and the scheduler's policy."""
    s, m, u = _traits(scenario)
    rng = np.random.default_rng([seed, scenario, len(kind)])
    const = _RIGHT[scenario]
    if kind not in ("right", "30%", "badly"):
        raise ValueError(kind)
    factors = {"right": (1.0, 1.0), "30%": (1.3, 0.7), "badly": (1.6, 1 / 1.6)}[kind]
    const = {k: v * factors[int(rng.integers(2))] for k, v in const.items()}
    if kind == "badly":
        const["acceptance"] = _RIGHT[scenario]["acceptance"] / 2
    const["acceptance"] = min(const["acceptance"], 0.95)
    twist = {name: {v: np.exp(rng.normal(0, 0.35, 2)) for v in values} for name, values in _SPACE.items()}
    e, k = m["experts"], m["topk"]
    active = m["p_attn"] + m["p_ffn"] * k / e

    def predict(
        config: Mapping,
        load: float,
        *,
        bandwidth_efficiency: float = const["bandwidth_efficiency"],
        flops_efficiency: float = const["flops_efficiency"],
        step_overhead_s: float = const["step_overhead_s"],
        link_efficiency: float = const["link_efficiency"],
        hop_latency_s: float = const["hop_latency_s"],
        acceptance: float = const["acceptance"],
        tail_factor: float = const["tail_factor"],
        overhead_gb: float = const["overhead_gb"],
        reuse: float = const["reuse"],
    ) -> dict:
        g, d, q = config["tp_size"], config["max_draft_len"], _SPACE["quantization"].index(config["quantization"])
        if g % config["moe_expert_parallel_size"]:
            raise tuner.Infeasible("moe_expert_parallel_size must divide tp_size")
        if q == 2 and u["sm"] < 100:
            raise tuner.Infeasible("nvfp4 needs Blackwell")
        dp = g if config["enable_attention_dp"] else 1
        wb, gt = (2.0, 1.0, 0.56)[q], g / dp
        kvb = m["layers"] * 2 * m["kvh"] * m["hd"] * (1 if config["kv_cache_dtype"] == "fp8" else 2) / gt
        weights = wb * (m["p_attn"] / gt + m["p_ffn"] / g) + 2 * m["p_emb"] * 2 / gt
        free = u["hbm"] - weights - overhead_gb * 1e9
        pool = free * config["kv_cache_free_gpu_mem_fraction"] / kvb
        if pool < s["max_seq"]:
            raise tuner.Infeasible(f"out of memory: {weights / 1e9:.0f} GB of weights leave {max(pool, 0):.0f} tokens")
        rate, peak, bw = s["rate"] * load, u["flops"][q] * flops_efficiency, u["bw"] * bandwidth_efficiency
        fresh, ctx = s["isl"] * (1 - min(s["share"] * reuse, 0.97)), s["isl"] + s["osl"] / 2
        most = max(1.0, min(config["max_batch_size"] * dp, pool * dp / ctx))
        accepted = sum(acceptance**i for i in range(d + 1))
        chunk = min(config["max_num_tokens"], fresh)

        def comm(tokens: float) -> float:
            moved = 2 * tokens * m["hidden"] * 2 / (u["link"] * link_efficiency)
            return 2 * m["layers"] * (hop_latency_s + moved) if g > 1 else 0.0

        def step(n: float) -> float:
            t = n * (1 + d)
            touched = 1 - (1 - k / e) ** t if e > 1 else 1.0
            attention = m["p_attn"] / (gt if e > 1 else g)  # attention DP is for MoE; a dense model is sharded as ever
            mem = (wb * (attention + m["p_ffn"] * touched / g) + n / dp * ctx * kvb) / bw
            return max(mem, 2 * active * t / g / peak) * (1 + 0.06 * d) + comm(t) + step_overhead_s

        prefill = 2 * active * fresh / g / peak + comm(chunk) * fresh / chunk
        quadratic = 4 * m["layers"] * m["heads"] * m["hd"] * s["isl"] ** 2 / 2
        prefill = prefill + quadratic / g / (u["flops"][0] * flops_efficiency)
        capacity = most / (s["osl"] * step(most) / accepted + most * prefill)
        n = 1.0
        for _ in range(4):
            n = min(most, max(1.0, rate * s["osl"] * step(n) / accepted))
        if rate >= capacity:
            n = most
        served, rho = min(rate, capacity), min(rate * prefill, 0.9)
        tpot = tail_factor * step(n) / accepted / (1 - rho)
        ttft = tail_factor * (prefill + step(n) + prefill * rho / (1 - rho)) + 120 * max(0.0, 1 - capacity / rate)
        lat, price = 1.0, 1.0
        if kind == "badly":
            lat, price = (math.prod(float(twist[p][config[p]][j]) for p in _NAMES) for j in (0, 1))
        tokens = served * s["osl"] / price
        return {
            "ttft_p99_s": ttft * lat,
            "tpot_p99_s": tpot * lat,
            "output_tokens_per_s": tokens,
            "cost_usd_per_mtok_output": g * u["price"] / 3600 / tokens * 1e6,
        }

    return predict
