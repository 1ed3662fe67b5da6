"""A synthetic response surface of vLLM (as of 2025/2026) serving on one node of 8 GPUs: numpy only, no engine in it.

Truth: roofline of a step (GEMM, attention, allreduce, sampler, drafter, launches, CPU) as a function of the running
batch B. In steady state a step with B decodes carries B*a*Pu/O prefill tokens, so that the throughput is a function of
B alone; the open load picks B. Tails come from mixed steps, fluctuation of the batch, queues for slots and for the
token budget, preemption. Scenarios: 8B chat on L40S (PCIe), 70B on H200 with long prompts (n-gram speculation), a
30B-A3B MoE on H100 with agents' traffic (EAGLE speculation). Cost is for the GPUs in use (tensor_parallel_size *
data_parallel_size). All numbers are the author's estimates; none is measured.
"""

import functools
import math

import numpy as np

import tuner

LOADS = [0.5, 0.75, 1.1, 1.6, 2.3, 3.3, 4.8]
_SPACE = {
    "tensor_parallel_size": [1, 2, 4, 8],
    "data_parallel_size": [1, 2],
    "quantization": ["none", "fp8", "awq_marlin"],
    "kv_cache_dtype": ["auto", "fp8"],
    "max_num_seqs": [32, 128, 256, 512],
    "max_num_batched_tokens": [2048, 4096, 8192, 16384],
    "attention_backend": ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"],
    "block_size": [16, 64],
    "num_speculative_tokens": [0, 2, 4],
    "gpu_memory_utilization": [0.90, 0.95],
    "cudagraph_mode": ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE"],
    "async_scheduling": [False, True],
}
_NAMES = list(_SPACE)
_SHAPE = tuple(len(v) for v in _SPACE.values())
_NUMERIC = {n: np.array(v if not isinstance(v[0], str) else range(len(v)), float) for n, v in _SPACE.items()}

_SCENARIOS = [
    {
        "name": "8B chat, L40S",
        "hopper": False,
        "nvlink": False,
        "mem": 48.3e9,
        "bw": 864e9,
        "flops": 181e12,
        "sm": 142,
        "price": 1.05,
        "cpu": 1.3,
        "dense": 6.98e9,
        "embed": 1.05e9,
        "experts": 0.0,
        "layers": 32,
        "d": 4096,
        "inter": 14336,
        "qdim": 4096,
        "nkv": 8,
        "vocab": 128256,
        "max_len": 8192,
        "P": 1100.0,
        "O": 260.0,
        "sys": 0.27,
        "sess": 0.36,
        "pool": 60e3,
        "pmult": 2.6,
        "burst": 1.0,
        "base": 6.5,
        "eagle": True,
        "draft": 0.8e9,
        "alpha": (0.70, 0.62, 0.54, 0.47),
        "slos": (0.4, 0.055),
        "disk": 1.6e9,
    },
    {
        "name": "70B long prompts, H200",
        "hopper": True,
        "nvlink": True,
        "mem": 150e9,
        "bw": 4.8e12,
        "flops": 989e12,
        "sm": 132,
        "price": 3.5,
        "cpu": 1.0,
        "dense": 68.5e9,
        "embed": 2.1e9,
        "experts": 0.0,
        "layers": 80,
        "d": 8192,
        "inter": 28672,
        "qdim": 8192,
        "nkv": 8,
        "vocab": 128256,
        "max_len": 32768,
        "P": 7000.0,
        "O": 320.0,
        "sys": 0.08,
        "sess": 0.50,
        "pool": 420e3,
        "pmult": 2.3,
        "burst": 1.15,
        "base": 1.0,
        "eagle": False,
        "draft": 0.0,
        "alpha": (0.38, 0.55, 0.58, 0.56),
        "slos": (3.0, 0.065),
        "disk": 2.6e9,
    },
    {
        "name": "30B-A3B agents, H100",
        "hopper": True,
        "nvlink": True,
        "mem": 85.2e9,
        "bw": 3.35e12,
        "flops": 989e12,
        "sm": 132,
        "price": 2.5,
        "cpu": 1.1,
        "dense": 0.92e9,
        "embed": 0.62e9,
        "experts": 29.0e9,
        "layers": 48,
        "d": 2048,
        "inter": 6144,
        "qdim": 4096,
        "nkv": 4,
        "vocab": 151936,
        "max_len": 32768,
        "P": 3600.0,
        "O": 420.0,
        "sys": 0.30,
        "sess": 0.45,
        "pool": 300e3,
        "pmult": 2.8,
        "burst": 1.35,
        "base": 16.0,
        "eagle": True,
        "draft": 0.5e9,
        "alpha": (0.58, 0.52, 0.45, 0.40),
        "slos": (0.7, 0.030),
        "disk": 2.2e9,
    },
]
_WHY = [
    None,
    "ValueError: World size ({world}) is larger than the number of available GPUs (8) in this node.",
    "ValueError: max_num_batched_tokens is too small for max_num_seqs * (1 + num_speculative_tokens).",
    "NotImplementedError: FlashAttention does not support fp8 kv-cache on this device (compute capability 8.9).",
    "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376.",
    "ValueError: Currently, async scheduling is only supported with EAGLE/MTP kind of speculative decoding.",
    "ValueError: The output_size of gate's and up's weight is not divisible by weight quantization block_n = 128.",
    "ValueError: moe_wna16: intermediate_size_per_partition = 96 is not divisible by group_size = 128.",
    "RuntimeError: CUDA error: an illegal memory access was encountered (BatchPrefillWithPagedKVCache, fp8_e4m3).",
    "RuntimeError: CUDA error: an illegal memory access was encountered (capturing kernel_unified_attention_2d).",
    "torch.OutOfMemoryError: CUDA out of memory while loading model weights.",
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
    "ValueError: To serve at least one request with max_model_len, more KV cache is needed than is available.",
    "torch.OutOfMemoryError: CUDA out of memory during CUDA graph capture or sampler warm-up with dummy requests.",
]


def space():
    """Names of the parameters and their values."""
    return {n: list(v) for n, v in _SPACE.items()}


def default(scenario):
    """What the engine takes when told nothing (but a tensor_parallel_size that leaves room for a batch)."""
    big = _SCENARIOS[scenario]["hopper"]
    return {
        "tensor_parallel_size": 1 if scenario == 0 else 2,
        "data_parallel_size": 1,
        "quantization": "none",
        "kv_cache_dtype": "auto",
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192 if big else 2048,
        "attention_backend": "FLASH_ATTN",
        "block_size": 16,
        "num_speculative_tokens": 0,
        "gpu_memory_utilization": 0.90,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "async_scheduling": False,
    }


def slos(scenario):
    """The objectives, in seconds."""
    return dict(zip(("ttft_p99_s", "tpot_p99_s"), _SCENARIOS[scenario]["slos"], strict=True))


def grid_index(params):
    """Row of a configuration in the order of itertools.product(*space().values())."""
    row = 0
    for n, v in _SPACE.items():
        row = row * len(v) + v.index(params[n])
    return row


def _columns(rows):
    """Numeric columns (N, 1) of rows of the grid (strings by their index)."""
    idx = np.unravel_index(np.asarray(rows), _SHAPE)
    return {n: _NUMERIC[n][i][:, None] for n, i in zip(_NAMES, idx, strict=True)}


def _static(s, c):
    """What depends on the configuration alone, and the rule that stops it (0: runs)."""
    tp, dp, q, k = (c[n] for n in [*_NAMES[:3], "num_speculative_tokens"])
    kv8, seqs, budget = c["kv_cache_dtype"] == 1, c["max_num_seqs"], c["max_num_batched_tokens"]
    att, block, gmu, cg = c["attention_backend"], c["block_size"], c["gpu_memory_utilization"], c["cudagraph_mode"]
    per = np.choose(q.astype(int), [2.0, 1.01, 0.535])  # bytes per weight
    z = {
        "tp": tp,
        "k": k,
        "q": q.astype(int),
        "att": att.astype(int),
        "cg": cg,
        "seqs": seqs,
        "budget": budget,
        "kv8": kv8,
        "block": block,
        "dp": dp,
        "spec": k > 0,
        "on": c["async_scheduling"] > 0,
    }
    z["w"], z["we"] = (s["dense"] * per + s["vocab"] * s["d"] * 2) / tp, s["experts"] * per / tp  # read in a step
    weights = ((s["dense"] + s["experts"]) * per + 2 * s["embed"]) / tp * 1.015 + s["draft"] * z["spec"] / tp**0.5
    z["tpkv"] = np.minimum(tp, s["nkv"])  # KV heads are replicated beyond
    z["kvb"] = 2 * s["nkv"] * 128 * s["layers"] * np.where(kv8, 1.0, 2.0) / z["tpkv"]
    if s["eagle"]:
        z["kvb"] = z["kvb"] * (1 + z["spec"] / s["layers"])  # the drafter's layer has a cache too
    act = budget * 2 * (6 * s["d"] + 3 * s["inter"] / tp) + seqs * s["vocab"] * 4.0
    act = act + 0.9e9 + 0.45e9 * (att == 1) + (0.35e9 if s["nvlink"] else 0.55e9) * (tp > 1)
    act = act + (budget * s["d"] * 2 * 5.0 if s["experts"] else 0.0)  # permuted copies for the experts
    free = gmu * s["mem"] - weights - act
    z["cap"] = np.floor(np.maximum(free, 0) / z["kvb"] / block) * block  # tokens that the cache holds
    graphs = np.where(cg == 0, 0.0, np.where(cg == 1, 0.30e9, 0.75e9)) * (1 + s["layers"] / 160)
    graphs = graphs * np.where(seqs > 200, 1.0, 0.7) * (1 + 0.12 * k * (cg == 2))
    head = (1 - gmu) * s["mem"] - 0.55e9 - graphs - 0.1e9 * tp - seqs * (1 + k) * s["vocab"] * 7.0  # not profiled
    rules = [
        (tp * dp > 8),
        (seqs * (1 + k) > budget),
        (att == 0) & kv8 & (not s["hopper"]),
        (att == 2) & (block == 64) & ~kv8 & (not s["hopper"]),
        z["on"] & z["spec"] & (not s["eagle"]),
        (q == 1) & (tp > 2) & (s["experts"] > 0),
        (q == 2) & (tp > 4) & (s["experts"] > 0),
        (att == 1) & kv8 & z["spec"] & (block == 64) & (s["experts"] > 0),
        (att == 2) & (cg == 2) & (block == 64) & z["spec"] & (not s["eagle"]),
        (weights > gmu * s["mem"]),
        (free <= 0),
        (z["cap"] < s["max_len"]),
        (head < 0),
    ]
    why = np.zeros(tp.shape, int)
    for i, rule in reversed(list(enumerate(rules, 1))):
        why = np.where(rule, i, why)
    # tokens per step: acceptance falls from position to position, and a little for a target the drafter does not know
    alpha = np.array(s["alpha"])
    drop = np.where(q == 2, 0.95 if s["eagle"] else 1.0, 1.0) * np.where(kv8 & s["eagle"], 0.985, 1.0)
    p1, p2, p3, p4 = (drop * a for a in alpha)
    z["a"] = 1 + np.where(k >= 2, p1 * (1 + p2), 0) + np.where(k >= 4, p1 * p2 * p3 * (1 + p4), 0)
    hop = s["hopper"]
    eff = np.choose(z["att"], [0.80, 0.85, 0.62] if hop else [0.72, 0.80, 0.66])
    eff = eff * np.where(kv8, np.choose(z["att"], [0.72, 0.93, 0.70]), 1.0)
    eff = eff * np.where(block == 64, np.choose(z["att"], [1.02, 1.06, 1.10]), 1.0)
    z["eff"] = eff * np.where(z["spec"], np.choose(z["att"], [0.95, 0.74, 0.80]), 1.0)  # several queries a sequence
    pre = np.choose(z["att"], [0.62, 0.50, 0.28] if hop else [0.50, 0.48, 0.31])
    z["pre"] = pre * np.where(kv8, np.choose(z["att"], [1.12, 0.9, 0.8]), 1.0)
    z["full"] = (cg == 2) & ~((att == 1) & z["spec"])  # FlashInfer: whole graphs only for one token a sequence
    z["fixed"] = (16.0 + np.choose(z["q"], [0, 7.0, 2.0]) + (22.0 if s["experts"] else 0.0)) * 1e-6 * s["layers"]
    z["eager"] = (150.0 + np.choose(z["q"], [0, 26.0, 8.0]) + (55.0 if s["experts"] else 0.0) + 14.0 * (tp > 1)) * 1e-6
    z["graph_top"] = np.minimum(512.0, 2 * seqs * (1 + k))
    z["need"] = s["P"] * (1 - s["sys"]) + 0.75 * s["O"] + block / 2  # tokens of cache of a running request
    z["kvmax"] = 0.97 * z["cap"] / z["need"]
    z["bmax"] = np.maximum(np.minimum(seqs, z["kvmax"]), 1.0)
    return z, why


def _allreduce(s, z, n):
    """Seconds of the allreduces of one step: custom kernels for small messages, NCCL beyond."""
    tp = z["tp"]
    size, ring = n * s["d"] * 2.0, 2 * (tp - 1) / tp
    if s["nvlink"]:
        limit = np.where(tp == 2, 16e6, np.where(tp == 4, 6e6, 1.2e6))
        t = np.where(
            size <= limit,
            5e-6 + 1.1e-6 * tp + size * np.where(tp > 2, ring, 1.0) / 330e9,
            16e-6 + 2.2e-6 * tp + size * ring / 270e9,
        )
    else:  # no custom allreduce for more than two PCIe-only GPUs
        t = np.where(tp == 2, 11e-6 + size / 17e9, 24e-6 + 7e-6 * tp + size * ring / np.where(tp == 4, 11e9, 7.5e9))
    return np.where(tp > 1, 2 * s["layers"] * t, 0.0)


def _time(s, z, b, chunk, depth):
    """Seconds of one step with b decoding sequences and chunk prefill tokens (each seeing depth tokens)."""
    tp, k, q, att = z["tp"], z["k"], z["q"], z["att"]
    n = b * (1 + k) + chunk
    mixed = chunk > 0
    graphed = (z["cg"] > 0) & (n <= z["graph_top"])
    whole = graphed & z["full"] & ~mixed
    pad = np.where(n > 256, np.ceil(n / 16) * 16, np.where(n > 8, np.ceil(n / 8) * 8, np.exp2(np.ceil(np.log2(n)))))
    pad = np.where(graphed, pad, n)
    tiled = np.where(pad > 64, np.ceil(pad / 64) * 64, pad)
    # GEMMs: weights against FLOPs; steps where the kernel's configuration changes with the number of rows
    wide = n > 256
    reach = np.where(q == 1, np.where((n > 64) & (n <= 128), 0.72, 0.86), 0.88)
    reach = np.where(q == 2, np.where(n > 32, 0.68, 0.82), reach)
    rate = np.where(q == 0, 0.68, np.where(q == 1, 1.16 if s["hopper"] else 0.98, np.where(wide, 0.50, 0.58)))
    rate = rate * (1 - 0.05 * np.log2(tp))
    tw, tf = z["w"] / (s["bw"] * reach), 2 * s["dense"] * tiled / tp / (s["flops"] * rate)
    t = np.maximum(tw, tf) + 0.2 * np.minimum(tw, tf) + z["fixed"]
    t = t + np.where(whole, 0.0, np.where(graphed, 4e-6, 6e-6)) * s["layers"]  # bubbles between the pieces
    if s["experts"]:
        touched = 1 - np.exp(n * math.log(1 - 8 / 128))
        slow = np.where(q == 0, np.where(tp == 8, 1.35, 1.0), np.where(q == 1, np.where(n > 1024, 1.18, 1.0), 1.0))
        slow = np.where((q == 2) & (tp == 4), 1.9, slow)  # 192 is not a multiple of the group: another kernel
        tw = z["we"] * touched / (s["bw"] * np.where(q == 2, 0.66, 0.74))
        tf = 2 * s["experts"] / 16 * (tiled + 128.0) / tp / (s["flops"] * rate * 0.62)
        t = t + (np.maximum(tw, tf) + 0.25 * np.minimum(tw, tf)) * slow
    # attention
    lanes = b * s["nkv"] / z["tpkv"]
    eff = z["eff"] * np.where(att == 2, np.clip(lanes / (0.5 * s["sm"]), 0.3, 1.0), 1.0)  # no split over a long cache
    eff = eff * np.where(mixed & (att != 1), 0.84, 1.0)
    ctx = s["P"] + 0.6 * s["O"]
    t = t + b * ctx * z["kvb"] / (s["bw"] * eff)
    t = t + 4 * chunk * depth * s["qdim"] * s["layers"] / tp / (s["flops"] * z["pre"])
    t = t + _allreduce(s, z, pad)
    # logits and sampler; drafter
    logits = b * (1 + k) * s["vocab"]
    t = t + logits * 24.0 / s["bw"] + 0.12e-3 + np.where(tp > 1, logits * 2 / 40e9 / tp, 0.0)
    cpu = s["cpu"] * (0.85e-3 + 8e-6 * b + 2e-6 * b * k + np.where(tp > 1, 0.22e-3 + 0.05e-3 * tp, 0.0))
    cpu = cpu * np.where(z["dp"] > 1, 1.10, 1.0)
    if s["eagle"]:
        one = s["draft"] / tp / (0.8 * s["bw"]) + np.where(z["cg"] > 0, 0.20e-3, 0.55e-3) * s["cpu"] + 1.2e-6 * b
        t = t + k * (one + np.where(tp > 1, 0.04e-3 if s["nvlink"] else 0.11e-3, 0.0)) + z["spec"] * 0.25e-3
    else:
        cpu = cpu + z["spec"] * (0.25e-3 + 20e-6 * b)  # the look-up for matching n-grams runs on the host
    launch = np.where(graphed, np.where(whole, 2e-6, 40e-6), z["eager"]) * s["layers"] * s["cpu"] + 0.3e-3
    plan = np.where(att == 1, s["cpu"] * (0.30e-3 + 1.5e-6 * b), 0.0)
    gpu = np.maximum(t, launch) + plan
    hidden = np.where(z["spec"], 0.5, 1.0)  # how much of the CPU's work overlaps
    return np.where(z["on"], np.maximum(gpu, hidden * cpu) + (1 - hidden) * cpu + 0.12e-3, gpu + cpu)


def _mix(s, z, b, tail=1.0):
    """Steps at a running batch b: seconds of a pure decode and of a mixed one, share of mixed ones, use of the token
    budget, uncached tokens of a prompt, tokens/s, mean seconds."""
    spare = np.maximum(z["cap"] - b * z["need"], 0.0)
    hit = s["sys"] + s["sess"] * np.minimum(spare / s["pool"], 1.0) ** 0.8 * np.where(z["dp"] > 1, 0.68, 1.0)
    pu = np.maximum(s["P"] * (1 - hit), 48.0) + z["block"] * (0.5 + (z["spec"] & s["eagle"]))
    x = b * z["a"] * pu / s["O"]
    avail = np.maximum(z["budget"] - b * (1 + z["k"]), 64.0)
    chunk = pu * 1.4 * tail * (1 + (tail > 1) * np.sqrt(x / pu))  # long prompts count more, and come in bursts
    chunk = np.minimum(np.maximum(x, chunk), avail)
    f, over = np.minimum(x / chunk, 1.0), np.maximum(x / avail, 1.0)
    depth = s["P"] - 0.5 * np.concatenate([pu, pu], 1)
    both = _time(s, z, np.concatenate([b, b], 1), np.concatenate([0 * b, chunk], 1), depth)
    td, tm = both[:, : b.shape[1]], both[:, b.shape[1] :]
    mean = ((1 - f) * td + f * tm) * over
    return td, tm, f, x / avail, pu, b * z["a"] / mean, mean


def _core(s, c, z, loads):
    """Metrics (N, L) of configurations that run: ttft p99, tpot p99, output tokens/s, usd per million of them."""
    frac = np.linspace(0.0, 1.0, 18)
    b = z["bmax"] ** frac  # 1 ... bmax
    thr = np.maximum.accumulate(_mix(s, z, b)[5], axis=1)
    last = thr[:, -1:]
    rate = np.asarray(loads, float)[None, :] * s["base"]
    want = rate * s["O"] / z["dp"]
    i = np.clip((thr[:, None, :] < want[:, :, None]).sum(2), 1, 17)
    rows = np.arange(len(thr))[:, None]
    lo, hi = thr[rows, i - 1], thr[rows, i]
    part = np.clip((want - lo) / np.maximum(hi - lo, 1e-9), 0.0, 1.0)
    bm = np.exp(np.log(b[rows, i - 1]) * (1 - part) + np.log(b[rows, i]) * part)
    high = np.minimum(bm + 1.5 * s["burst"] * np.sqrt(bm), z["bmax"])  # the batch fluctuates
    pairs = _mix(s, z, np.concatenate([bm, high], 1), np.repeat([1.0, 1.5], bm.shape[1]))
    pairs = [np.split(m, 2, axis=1) for m in pairs]
    (_, td9), (tm, tm9), (f, f9), (load, load9), (pu, _), _, (mean, mean9) = pairs
    front = rate * s["O"] / z["a"] * s["cpu"] / 22e3  # one API server process streams for all replicas
    rho, front = np.maximum(want / last, front), np.minimum(front, 0.96)
    chunks = np.ceil(s["pmult"] * pu / np.maximum(z["budget"] - bm * (1 + z["k"]), 64.0))
    # tpot: short answers that met more prefills than others, bad guesses of the drafter, preempted requests
    steps = np.maximum(0.35 * s["O"] / z["a"], 4.0)
    tpot9 = mean9 + 2.33 * np.sqrt(f9 * (1 - f9) / steps) * (tm9 - td9)
    tpot9 = tpot9 / (1 + (z["a"] - 1) * (0.74 if s["eagle"] else 0.55))
    lost = np.clip((bm + 2.33 * s["burst"] * np.sqrt(bm) - z["kvmax"]) / (0.25 * z["kvmax"]), 0.0, 1.0)
    redo = tm * np.maximum(s["P"] * (1 - s["sys"]) / z["budget"], 1.0) + 4 * mean
    tpot9 = tpot9 + lost * redo * 2.0 / (0.5 * s["O"]) + 0.08 * lost * mean
    tpot9 = tpot9 + 0.4e-3 * front / (1 - front)
    # ttft: the step under way, own chunks, the queue for the token budget, the queue for a slot or cache, overload
    load = np.minimum(np.maximum(load, 0.3 * load9), 0.97)
    serve = tm * np.maximum(pu / z["budget"], 1.0)
    stay = mean * s["O"] / z["a"]
    under = np.minimum(rho, 0.995)
    wait = under ** np.sqrt(2 * (z["bmax"] + 1))
    slot = stay / z["bmax"] / (1 - under) * np.log(np.maximum(100 * wait, 1.0)) * s["burst"]
    queue = 0.5 * s["burst"] * serve * load / (1 - load) * 4.6
    behind = 180.0 * np.maximum(1 - 1 / np.maximum(rho, 1.0), 0.0)
    ttft9 = 0.012 * s["cpu"] + 4e-6 * s["P"] * s["pmult"] + mean + chunks * tm * (1 + 0.25 * f) + queue
    ttft9 = ttft9 + np.minimum(slot, 40.0) + behind + lost * redo + 2e-3 * front / (1 - front)
    # a benchmark of 180 s of arrivals that also waits for its last answers
    drain = 0.6 * ttft9 * (behind == 0) + 1.6 * stay
    tput = rate * s["O"] * 180.0 / (180.0 * np.maximum(rho, 1.0) + drain)
    cost = z["tp"] * z["dp"] * s["price"] / 3600 / tput * 1e6
    return ttft9, tpot9, tput, cost


@functools.lru_cache(4096)
def _prepared(row, scenario):
    c = _columns([row])
    return c, *_static(_SCENARIOS[scenario], c)


def measure(params, load, scenario, rng):
    """One noisy measurement of a configuration under a load."""
    s = _SCENARIOS[scenario]
    c, z, why = _prepared(grid_index(params), scenario)
    if why[0, 0]:
        world = params["tensor_parallel_size"] * params["data_parallel_size"]
        raise tuner.Infeasible(_WHY[int(why[0, 0])].format(world=world))
    ttft, tpot, tput, cost = (float(m[0, 0]) for m in _core(s, c, z, [load]))
    shared, one, two, three = rng.normal(0.0, 1.0, 4) * 0.05 * math.sqrt(0.5)
    slow = math.exp(shared + three)
    return {
        "ttft_p99_s": ttft * math.exp(shared + one),
        "tpot_p99_s": tpot * math.exp(shared + two),
        "output_tokens_per_s": tput / slow,
        "cost_usd_per_mtok_output": cost * slow,
    }


def launch_s(params, scenario):
    """Seconds from the command to the first request: weights, compilation, graphs, profiles."""
    s, q = _SCENARIOS[scenario], params["quantization"]
    size = (s["dense"] + s["experts"]) * {"none": 2.0, "fp8": 1.01, "awq_marlin": 0.535}[q] + 2 * s["embed"]
    t = 22.0 + size / s["disk"] * params["data_parallel_size"] ** 0.4
    t += 5.0 * math.log2(params["tensor_parallel_size"] + 1)
    t += 0.45 * s["layers"] + {"none": 0.0, "fp8": 4.0, "awq_marlin": 9.0 + size / 6e9}[q]
    sizes = 4 + min(512, 2 * params["max_num_seqs"]) / 12
    each = {"NONE": 0.0, "PIECEWISE": 0.22, "FULL_AND_PIECEWISE": 0.48}[params["cudagraph_mode"]]
    t += sizes * each * s["layers"] / 40
    t += 24.0 * (params["attention_backend"] == "FLASHINFER") + params["max_num_batched_tokens"] / 4096
    return t + (14.0 if s["eagle"] else 2.0) * (params["num_speculative_tokens"] > 0)


@functools.lru_cache(3)
def _grid(scenario):
    s, total = _SCENARIOS[scenario], math.prod(_SHAPE)
    runs = np.zeros(total, bool)
    out = np.full((3, total, len(LOADS)), np.nan)
    for start in range(0, total, 8192):
        rows = np.arange(start, min(start + 8192, total))
        good = _static(s, _columns(rows))[1][:, 0] == 0
        runs[rows] = good
        if good.any():
            c = _columns(rows[good])
            ttft, tpot, _, cost = _core(s, c, _static(s, c)[0], LOADS)
            out[:, rows[good]] = ttft, tpot, cost
    return runs, out


@functools.lru_cache(3)
def truth_grid(scenario):
    """(runs, cost, tpot p99, ok) over the whole grid, without noise; NaN where it does not run."""
    runs, (ttft, tpot, cost) = _grid(scenario)
    first, then = _SCENARIOS[scenario]["slos"]
    with np.errstate(invalid="ignore"):
        ok = runs[:, None] & (ttft <= first) & (tpot <= then)
    return runs, cost, tpot, ok


# What fits the truth best (a search over 240 configurations that run, at three loads), one column a scenario.
_FIT = {
    "mem_efficiency": (1.18, 0.678, 1.0),
    "flops_efficiency": (0.416, 0.432, 0.152),
    "link_gb_s": (11.2, 847.0, 132.0),
    "allreduce_us": (15.8, 2.0, 4.8),
    "step_ms": (9.68, 8.55, 6.0),
    "acceptance": (0.421, 0.134, 0.364),
    "tail": (1.2, 1.36, 1.16),
    "prefix_hit": (0.55, 0.43, 0.679),
    "reserved_gb": (2.0, 3.0, 2.5),
    "queue": (0.327, 0.741, 1.57),
}


def predictor(scenario, kind, seed):
    """A textbook model that somebody brings along; kind is "right", "30%" or "badly". It does not know
    attention_backend, block_size, cudagraph_mode and async_scheduling."""
    s, rng = _SCENARIOS[scenario], np.random.default_rng([seed, scenario, 77])
    up = rng.random(len(_FIT)) < 0.5
    off = {"right": (1.0, 1.0), "30%": (1.3, 0.7), "badly": (1.6, 1 / 1.6)}[kind]
    fit = {n: v[scenario] * (off[0] if u else off[1]) for (n, v), u in zip(_FIT.items(), up, strict=True)}
    if kind == "badly":
        fit["acceptance"] = _FIT["acceptance"][scenario] / 2
    sway = {
        (n, v): tuple(np.exp(rng.normal(0.0, 0.35, 2))) if kind == "badly" else (1.0, 1.0)
        for n, values in _SPACE.items()
        for v in values
    }

    def predict(
        config,
        load,
        *,
        mem_efficiency=fit["mem_efficiency"],
        flops_efficiency=fit["flops_efficiency"],
        link_gb_s=fit["link_gb_s"],
        allreduce_us=fit["allreduce_us"],
        step_ms=fit["step_ms"],
        acceptance=fit["acceptance"],
        tail=fit["tail"],
        prefix_hit=fit["prefix_hit"],
        reserved_gb=fit["reserved_gb"],
        queue=fit["queue"],
    ):
        tp, dp, k = config["tensor_parallel_size"], config["data_parallel_size"], config["num_speculative_tokens"]
        seqs, q = config["max_num_seqs"], config["quantization"]
        if tp * dp > 8:
            raise tuner.Infeasible("more GPUs than the node has")
        if seqs * (1 + k) > config["max_num_batched_tokens"]:
            raise tuner.Infeasible("token budget below max_num_seqs * (1 + num_speculative_tokens)")
        per = {"none": 2.0, "fp8": 1.0, "awq_marlin": 0.5}[q]
        fixed, experts = s["dense"] * per + 2 * s["embed"], s["experts"] * per
        kv = 2 * s["nkv"] * 128 * s["layers"] * (1.0 if config["kv_cache_dtype"] == "fp8" else 2.0) / tp
        free = config["gpu_memory_utilization"] * s["mem"] - (fixed + experts) / tp - reserved_gb * 1e9
        if free < kv * s["max_len"]:
            raise tuner.Infeasible("no memory for the KV cache")
        ctx, rate = s["P"] + s["O"] / 2, load * s["base"] / dp
        bmax = max(1.0, min(seqs, free / kv / ctx))
        alpha = min(acceptance, 0.97)
        a = (1 - alpha ** (k + 1)) / (1 - alpha)
        bw, flops = s["bw"] * mem_efficiency, s["flops"] * flops_efficiency * (2.0 if q == "fp8" else 1.0) * tp
        active = 2 * (s["dense"] + s["experts"] / 16)

        def comm(tokens):
            ring = 2 * (tp - 1) / tp * tokens * s["d"] * 2 / (link_gb_s * 1e9)
            return 2 * s["layers"] * (allreduce_us * 1e-6 + ring) if tp > 1 else 0.0

        def step(b):
            n = b * (1 + k)
            read = (fixed + experts * min(1.0, n / 16)) / tp + b * ctx * kv
            return max(read / bw, active * n / flops) * (1 + 0.03 * k) + step_ms * 1e-3 + comm(n)

        fresh = s["P"] * (1 - min(prefix_hit, 0.95))
        whole = fresh * (active + 2 * s["P"] * s["qdim"] * s["layers"]) / flops
        pieces = max(1.0, fresh / config["max_num_batched_tokens"])
        first = whole + pieces * step_ms * 1e-3 + comm(fresh)
        prefills = whole + comm(fresh)
        top = 1 / (prefills + s["O"] * step(bmax) / a / bmax)  # requests/s that a replica can serve
        lo, hi = 1.0, bmax
        if rate < top:
            for _ in range(18):
                mid = 0.5 * (lo + hi)
                lo, hi = (mid, hi) if 1 / (prefills + s["O"] * step(mid) / a / mid) < rate else (lo, mid)
        served, rho = min(rate, top), min(rate / top, 0.98)
        tpot = step(hi) / a / max(1 - served * prefills, 0.05) * tail
        ttft = first * (1 + queue * 4.6 * rho / (1 - rho) / 2) + step(hi)
        ttft += 100.0 * max(0.0, 1 - top / rate)
        slow = dear = 1.0
        for n in _NAMES:
            one, two = sway[n, config[n]]
            slow, dear = slow * one, dear * two
        cost = tp * s["price"] / 3600 / (served * s["O"]) * 1e6 * dear
        return {
            "ttft_p99_s": ttft * slow,
            "tpot_p99_s": tpot * slow,
            "output_tokens_per_s": served * dp * s["O"] / dear,
            "cost_usd_per_mtok_output": cost,
        }

    return predict
