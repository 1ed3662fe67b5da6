"""Synthetic response surface of SGLang on one node of 8 GPUs (numpy only): an examination for optimizers.

Three scenarios (a dense 70B on H200, a MoE of 106B on H100, a dense 14B on L40S), 12 server arguments, open-loop load.
The truth is a roofline of prefill and decode per replica, solved for the concurrency at which the engine keeps up with
the load, with queueing, prefix caching, preemption, memory rules, and the oddities of the engine and its kernels.
`predictor` is somebody's textbook model of the same thing.
"""

import functools
import math

import numpy as np

import tuner

LOADS = [0.5, 0.7, 1.0, 1.35, 1.8, 2.4, 3.2]
SPACE = {
    "tp_size": [1, 2, 4, 8],
    "dp_size": [1, 2],
    "mem_fraction_static": [0.8, 0.88, 0.93],
    "chunked_prefill_size": [2048, 8192, 16384],
    "max_running_requests": [32, 128, 512],
    "schedule_policy": ["fcfs", "lpm"],
    "quantization": ["none", "fp8", "awq"],
    "kv_cache_dtype": ["auto", "fp8_e5m2", "fp8_e4m3"],
    "attention_backend": ["flashinfer", "fa3", "triton"],
    "page_size": [1, 64],
    "speculative_num_steps": [0, 2, 4],
    "cuda_graph_max_bs": [32, 160],
}
NAMES, SHAPE = list(SPACE), tuple(len(v) for v in SPACE.values())
N = math.prod(SHAPE)
GIB = 2.0**30
SCENARIOS = [
    {  # Llama-3.3-70B chat behind a shared system prompt, H200
        "gpu": "h200",
        "mem": 139.8,
        "bw": 4.8e12,
        "flops": 989e12,
        "usd": 3.6,
        "nvlink": True,
        "slow_cpu": 1.0,
        "power": 1.0,
        "layers": 80,
        "hid": 8192,
        "heads": 64,
        "ffn": 28672,
        "vocab": 128256,
        "kv_tok": 327680,
        "p_all": 70.6e9,
        "p_act": 69.5e9,
        "p_exp": 0.0,
        "draft": 1.6e9,
        "rate": 6.0,
        "tin": 1700,
        "tout": 450,
        "cv2": 0.9,
        "share": 0.5,
        "workset": 40e3,
        "dp_share": 0.97,
        "accept": 0.74,
        "ttft": 1.2,
        "tpot": 0.040,
    },
    {  # GLM-4.5-Air (106B, 12B active) for agents: long prompts, many turns, H100
        "gpu": "h100",
        "mem": 79.2,
        "bw": 3.35e12,
        "flops": 989e12,
        "usd": 2.5,
        "nvlink": True,
        "slow_cpu": 1.05,
        "power": 0.97,
        "layers": 46,
        "hid": 4096,
        "heads": 96,
        "ffn": 1408 * 9,
        "vocab": 151552,
        "kv_tok": 188416,
        "p_all": 106.8e9,
        "p_act": 12.0e9,
        "p_exp": 99.7e9,
        "draft": 2.4e9,
        "rate": 3.6,
        "tin": 5600,
        "tout": 420,
        "cv2": 0.7,
        "share": 0.72,
        "workset": 330e3,
        "dp_share": 0.72,
        "accept": 0.70,
        "ttft": 1.5,
        "tpot": 0.048,
    },
    {  # Qwen3-14B for retrieval and summaries, L40S over PCIe
        "gpu": "l40s",
        "mem": 44.5,
        "bw": 0.864e12,
        "flops": 362e12,
        "usd": 0.95,
        "nvlink": False,
        "slow_cpu": 1.3,
        "power": 0.72,
        "layers": 40,
        "hid": 5120,
        "heads": 40,
        "ffn": 17408,
        "vocab": 151936,
        "kv_tok": 163840,
        "p_all": 14.8e9,
        "p_act": 14.0e9,
        "p_exp": 0.0,
        "draft": 0.5e9,
        "rate": 2.3,
        "tin": 1300,
        "tout": 300,
        "cv2": 0.6,
        "share": 0.25,
        "workset": 25e3,
        "dp_share": 0.95,
        "accept": 0.64,
        "ttft": 1.2,
        "tpot": 0.080,
    },
]
WBYTES = np.array([2.0, 1.03, 0.56])  # bytes of a weight: none, fp8, awq
# flashinfer, fa3, triton: share of the bandwidth in decode, of the FLOPs in prefill, factor of verifying a tree
ATT_BW = {"h200": [0.71, 0.80, 0.52], "h100": [0.72, 0.80, 0.53], "l40s": [0.80, 0.68, 0.60]}
ATT_FL = {"h200": [0.42, 0.58, 0.27], "h100": [0.43, 0.58, 0.28], "l40s": [0.46, 0.38, 0.33]}
ATT_VERIFY = np.array([1.25, 1.15, 1.6])


def space():
    return {k: list(v) for k, v in SPACE.items()}


def default(scenario):
    """What the engine starts with when only the model (and a tp_size that holds it) is given."""
    tp, chunk, att, graphs = [(4, 8192, "fa3", 160), (4, 8192, "fa3", 160), (1, 2048, "flashinfer", 32)][scenario]
    return dict(zip(NAMES, [tp, 1, 0.88, chunk, 512, "fcfs", "none", "auto", att, 1, 0, graphs], strict=True))


def slos(scenario):
    return {"ttft_p99_s": SCENARIOS[scenario]["ttft"], "tpot_p99_s": SCENARIOS[scenario]["tpot"]}


def _index(params):
    return [SPACE[k].index(params[k]) for k in NAMES]


def grid_index(params):
    return int(np.ravel_multi_index(_index(params), SHAPE))


def _columns(s, rows):
    """The rows of the grid -> name -> (n, 1) array of values (of indices for the categories)."""
    out = {}
    for name, idx in zip(NAMES, np.unravel_index(rows, SHAPE), strict=True):
        idx = idx[:, None]
        out[name] = idx if isinstance(SPACE[name][0], str) else np.asarray(SPACE[name], float)[idx]
    att = out["attention_backend"]  # a name is an index here
    out["att"] = np.where(
        (att == 1) & (out["kv_cache_dtype"] == 1), 2, att
    )  # fa3 has no e5m2: the engine silently takes triton
    out["memory"] = _memory(s, out)
    return out


def _memory(s, c):
    """GiB per GPU: weights, what lies outside of the static part; and the tokens that a replica's KV pool holds."""
    tp, spec, q = c["tp_size"], c["speculative_num_steps"], c["quantization"]
    embed = 2 * s["vocab"] * s["hid"]  # stays in 16 bits
    weights = ((s["p_all"] - embed) * WBYTES[q] + 2.0 * embed) / tp / GIB * np.where(q == 2, 1.02, 1.0) + 0.15
    weights = weights + np.where(spec > 0, 2.0 * s["draft"] / tp / GIB + 0.25, 0.0)
    tokens = c["chunked_prefill_size"]
    act = tokens * (2.5 * s["hid"] + 2.0 * s["ffn"] / tp + (8.0 * s["hid"] if s["p_exp"] else 0.0)) * 2.0 / GIB
    graphs = (0.35 + 0.0052 * c["cuda_graph_max_bs"] * (0.6 + s["layers"] / 100)) * np.where(
        spec > 0, 1.45 + 0.08 * spec, 1.0
    )
    logits = np.minimum(c["max_running_requests"], 256) * (1 + 2 * spec) * s["vocab"] * 4.0 / tp / GIB * 1.3
    work = np.array([0.5, 0.1, 0.25])[c["att"]] * np.where(s["heads"] > 64, 1.5, 1.0)
    outside = 0.55 + np.where(tp > 1, 0.35 + 0.06 * tp, 0.0) + act + graphs + logits + work
    per_tok = (
        s["kv_tok"] * np.where(c["kv_cache_dtype"] > 0, 0.5, 1.0) * np.where(spec > 0, 1 + 1.0 / s["layers"], 1.0) / tp
    )
    pool = (c["mem_fraction_static"] * s["mem"] - weights) * GIB / per_tok
    return weights, outside, pool


RULES = [
    "",
    "ValueError: tp_size * dp_size = {gpus} exceeds the 8 visible devices",
    "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. (weights {w:.1f} GB per GPU)",
    (
        "Exception: Capture cuda graph failed: CUDA out of memory. Possible solutions: 1. set "
        "--mem-fraction-static to a smaller value 2. set --cuda-graph-max-bs to a smaller value"
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {act:.2f} GiB. "
        "(scheduler hit an exception in forward_extend)"
    ),
    (
        "ValueError: speculative_eagle_topk > 1 with page_size > 1 is unstable and produces incorrect "
        "results for this attention backend"
    ),
    "RuntimeError: FlashAttention forward failed: FP8 is only supported on SM90 (this device: SM89)",
    "torch.AcceleratorError: CUDA error: too many resources requested for launch (flash_fwd, tree mask, SM89)",
    "RuntimeError: BatchDecodeWithPagedKVCache: failed to dispatch group_size 12 with dtype_kv fp8_e5m2",
    ("triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 245760, Hardware limit: 232448"),
    "RuntimeError: CUDA error: an illegal memory access was encountered (eagle_worker.forward_draft_extend)",
    "RuntimeError: max_total_num_tokens = {pool:.0f} is smaller than the context that this model is served with",
]


def _verdict(s, c):
    """(n, 1) number of the rule that stops the configuration; 0 where it runs."""
    _, outside, pool = c["memory"]
    tp, kv, page, spec = (c[k] for k in ("tp_size", "kv_cache_dtype", "page_size", "speculative_num_steps"))
    free, raw = (1 - c["mem_fraction_static"]) * s["mem"], c["attention_backend"]
    frag = 1.0 + 0.07 * (c["chunked_prefill_size"] > 8192)
    code = np.zeros(tp.shape, np.int8)

    def rule(k, mask):
        code[(code == 0) & mask] = k

    rule(1, tp * c["dp_size"] > 8)
    rule(5, (spec > 0) & (page > 1) & (c["att"] == 2))
    if s["gpu"] == "l40s":
        rule(6, (raw == 1) & (kv == 2))
        rule(7, (c["att"] == 1) & (spec > 2))
    if s["gpu"] == "h200":
        rule(9, (c["att"] == 2) & (kv == 2) & (spec > 2))
        rule(10, (raw == 0) & (kv > 0) & (spec > 0) & (page > 1) & (c["dp_size"] > 1))
    if s["p_exp"]:
        rule(8, (raw == 0) & (kv == 1) & (tp == 8) & (spec == 0))
    rule(2, pool < 512)
    rule(11, pool < 2.5 * s["tin"] + 2048)
    rule(4, outside * frag - 0.5 * (c["cuda_graph_max_bs"] < 100) > free * 1.02)
    rule(3, outside > free)
    return code


def _allreduce(s, size, tp):
    """Seconds of an all-reduce of `size` bytes: one-shot, two-shot over NVLink, NCCL beyond; PCIe without."""
    if tp.max() == 1:
        return np.zeros(1)
    ring = 2.0 * size * (tp - 1) / tp
    if s["nvlink"]:
        one = 4.5e-6 + 0.8e-6 * tp + size * (tp - 1) / 330e9
        two = 9.5e-6 + 0.9e-6 * tp + ring / 310e9
        nccl = 19e-6 + 1.6e-6 * tp + ring / 370e9
        t = np.where(size <= np.where(tp > 4, 262144, 524288), one, np.where(size <= 8388608, two, nccl))
    else:
        t = np.where(tp > 4, 52e-6 + ring / 10e9, np.where(tp > 2, 30e-6 + ring / 15e9, 15e-6 + ring / 19e9))
    return np.where(tp > 1, t, 0.0)


def _evaluate(s, c, loads):
    """The truth without noise: (n, len(loads)) ttft_p99, tpot_p99, output tokens/s, usd per million output tokens."""
    tp, dp, q, kv, att, spec = (
        c[k] for k in ("tp_size", "dp_size", "quantization", "kv_cache_dtype", "att", "speculative_num_steps")
    )
    page, cg, lpm = c["page_size"], c["cuda_graph_max_bs"], c["schedule_policy"] == 1
    hop, moe, drafts = s["nvlink"], s["p_exp"] > 0, spec > 0
    pool = c["memory"][2]
    uneven = np.where(dp > 1, 1.05, 1.0)  # round robin over replicas is not quite fair
    lam = np.asarray(loads, float)[None, :] * s["rate"] / dp * uneven
    # --- kernels: what each choice reaches
    peak = s["flops"] * s["power"] * (1.0 - 0.03 * np.log2(tp))
    peak = peak * np.array([1.0, 1.72 if hop else 1.5, 0.8 if hop else 0.9])[q]
    gemm_bw = s["bw"] * np.array([0.86, 0.80, 0.72 if hop else 0.80])[q] * (1.0 - 0.035 * np.log2(tp))
    if moe:  # tuned fused-MoE configurations exist for some shapes only
        tuned = np.where((q == 1) & (tp == 4), 0.76, np.where((q == 0) & (tp == 8), 0.82, np.where(q == 2, 0.88, 1.0)))
        thin = np.where(tp == 8, 0.8, np.where(tp == 4, 0.95, 1.0))  # 176 or 352 columns of an expert
        gemm_bw, peak = gemm_bw * tuned * 0.9 * thin, peak * tuned * 0.75 * thin
    att_bw = s["bw"] * np.asarray(ATT_BW[s["gpu"]])[att] * np.where(kv > 0, np.array([0.80, 0.88, 0.66])[att], 1.0)
    att_bw = att_bw * np.where(page > 1, np.array([1.05, 1.13, 1.0])[att], 1.0)
    att_bw = (
        att_bw * np.where((kv == 2) & (att == 2), 0.85, 1.0) * np.where((s["heads"] / 8 > 8) & (att == 0), 0.86, 1.0)
    )
    att_fl = s["flops"] * s["power"] * np.asarray(ATT_FL[s["gpu"]])[att] * np.where((page == 1) & (att == 1), 0.9, 1.0)
    att_fl = att_fl * np.where(kv > 0, np.array([0.85, 1.08, 0.8])[att], 1.0)
    kv_tok = s["kv_tok"] * np.where(kv > 0, 0.5, 1.0) / tp
    # --- speculation: a tree of 2 * steps draft tokens; acceptance falls along the chain and with a quantized target
    a = s["accept"] * np.array([1.0, 0.985, 0.945])[q] * np.where(kv == 1, 0.985, 1.0)
    tau = 1.0 + np.where(spec >= 1, a, 0) + np.where(spec >= 2, a**2 * 0.95, 0)
    tau = tau + np.where(spec >= 4, a**3 * 0.88 + a**4 * 0.78, 0)
    verify = np.where(drafts, 2 * spec, 1.0)
    draft_w = s["draft"] * 2.0 / tp / (s["bw"] * 0.75)
    kernels = (17 if moe else 11) + np.array([0, 3, 0])[q] + np.where(att == 2, 1, 0)
    eager = s["layers"] * kernels * 15e-6 * s["slow_cpu"] + np.where(att == 0, 0.9e-3, 0.3e-3)
    floor = s["layers"] * kernels * (1.15e-6 if hop else 1.0e-6)
    dense, experts = (s["p_all"] - s["p_exp"]), s["p_exp"]
    ctx = s["tin"] * (1 + 0.25 * s["cv2"]) + 0.5 * s["tout"]

    def decode(b):
        """Seconds of one step with b requests decoding."""
        b = np.maximum(b, 1.0)
        captured = np.where(b <= 8, b, np.where(b <= cg, np.ceil(b / 8) * 8, b))
        m = captured * verify
        touched = 1.0 - (1.0 - 8 / 128) ** np.minimum(m, 400) if moe else 0.0
        t_w = (dense + experts * touched) * WBYTES[q] / tp / gemm_bw
        tile = np.where(m > 64, np.ceil(m / 128) * 128, m)
        eff = np.array([0.62, 0.58, 0.40])[q] * np.where(m > 256, 1.12, 1.0) * (0.6 if moe else 1.0)
        t_c = 2.0 * s["p_act"] * tile / tp / (peak * eff)
        gemm = np.sqrt(np.sqrt(t_w**4 + t_c**4))
        t_kv = b * ctx * kv_tok / att_bw * np.where(drafts, ATT_VERIFY[att], 1.0)
        t_kv = t_kv + s["layers"] * np.where(att == 2, 5.5e-6, 3.5e-6) * (1 + (b * 8 / tp < 132))  # few blocks: split
        gpu = gemm + t_kv + floor + 2 * s["layers"] * _allreduce(s, m * s["hid"] * 2.0, tp)
        gpu = gpu + 24.0 * m * s["vocab"] / tp / s["bw"]  # logits and sampling
        x = np.clip((b - cg) / (1.0 + np.sqrt(b)), -30, 30)
        out_graph = 1.0 / (1.0 + np.exp(-x))
        gpu = gpu + out_graph * (np.maximum(eager - gpu, 0.0) + 0.22 * eager)
        if not drafts.any():
            draft = 0.0
        else:
            draft = spec * (
                draft_w + 0.11e-3 + 4 * _allreduce(s, b * 4 * s["hid"] * 2.0, tp) + out_graph * 0.8e-3 * s["slow_cpu"]
            )
            draft = draft + spec * b * 4 * s["draft"] * 2.0 / tp / (peak * 0.35)
        cpu = s["slow_cpu"] * (
            0.9e-3 + 8e-6 * b + np.where(att == 0, 0.25e-3, 0.0) + np.where(lpm, 0.12e-3 + 1.5e-6 * b, 0.0)
        )
        plain = np.maximum(gpu + 0.12e-3 + 0.15 * cpu, cpu + 0.2e-3)  # overlap scheduler; it is off with speculation
        return np.where(drafts, gpu + draft + 1.7 * cpu + 0.5e-3, plain)

    # --- prefill: what is not cached, in chunks that the engine does not mix with decoding
    def cached(b):
        room = np.maximum(pool - b * (s["tin"] * (1 - 0.6 * s["share"]) + 0.5 * s["tout"]), 0.0)
        need = s["workset"] * np.where(lpm, 0.7, 1.0)
        most = s["share"] * np.where(dp > 1, s["dp_share"], 1.0) * np.where(lpm, 1.03, 0.99)
        return most * (1.0 - np.exp(-1.6 * room / need))

    chunk = c["chunked_prefill_size"]
    batch = np.minimum(chunk, s["tin"] * (1 - 0.5 * s["share"]) * 2.2)
    half = (1100 if moe else 320) * np.where(q == 1, 1.5, 1.0) * (1.0 if hop else 0.5)  # tokens that reach half of it
    eff_p = np.array([0.70, 0.64, 0.52 if hop else 0.60])[q] * batch / (batch + half)
    link = 2 * s["layers"] * _allreduce(s, batch * s["hid"] * 2.0, tp) / batch * np.where(drafts, 1.03, 1.0)
    per_token = 2.0 * s["p_act"] / tp / (peak * eff_p) * np.where(drafts, 1.05, 1.0) + link

    def prefill(b):
        n = s["tin"] * (1.0 - cached(b)) + np.where(page > 1, 32.0, 0.0)
        chunks = n / chunk + 0.5
        att_t = 4.0 * s["layers"] * s["heads"] * 128 * n * (s["tin"] - n / 2) * (1 + s["cv2"]) / tp / att_fl
        reread = np.maximum(chunks - 1, 0) * s["tin"] * kv_tok / (s["bw"] * 0.4)
        host = chunks * (0.2 * eager + 1.2e-3 * s["slow_cpu"]) + 0.3e-3 * s["slow_cpu"]
        return n * per_token + att_t + reread + host

    # --- the concurrency that carries the load: throughput of a replica with b in flight
    held = s["tin"] * (1 - 0.6 * s["share"]) + 0.62 * s["tout"] + np.where(page > 1, 32, 0)
    b_kv = pool / held
    b_max = np.minimum(c["max_running_requests"], b_kv * 0.97)
    over = np.clip(c["max_running_requests"] / b_kv - 0.9, 0.0, 1.0)  # admits more than the pool holds: it retracts

    def carries(b):
        steps = s["tout"] * (decode(b) / tau)
        lost = 1.0 + 0.10 * over * np.clip(b / b_max - 0.75, 0, 1) * 4
        return 1.0 / (prefill(b) * lost + steps / b)

    grid = 0.02 * np.exp(np.linspace(0, 1, 40) * np.log(b_max / 0.02))
    able = carries(grid)
    reach = np.maximum.accumulate(able, axis=1)
    i = np.clip((reach[:, None, :] < lam[:, :, None]).sum(-1), 1, 39)
    r = np.arange(len(grid))[:, None] if len(grid) > 1 else 0
    x0, x1, y0, y1 = grid[r, i - 1], grid[r, i], able[r, i - 1], able[r, i]
    best, last = reach[:, -1:], able[:, -1:]
    rho = lam / best
    part = np.clip((lam - y0) / np.maximum(y1 - y0, 1e-12), 0.0, 1.0)
    b = np.where(rho < 1, x0 + (x1 - x0) * part, b_max)
    done = np.where(rho < 1, lam, last)
    both = decode(np.concatenate([b, np.minimum(b + 2.0 * np.sqrt(b), b_max)], axis=1))
    t_p, t_d, t_crowd = prefill(b), both[:, : b.shape[1]], both[:, b.shape[1] :]
    busy = np.minimum(done * t_p, 0.98)
    tpot = np.where(rho < 1, t_d / tau / (1 - busy), b / (done * s["tout"]))
    # --- tails
    short = 0.4 * s["tout"] * tpot  # short answers see the worst of it
    lump = 0.6 * t_p * (1 + s["cv2"]) + np.minimum(chunk * per_token, t_p * (1 + s["cv2"]) * 5) * (0.15 + 0.6 * busy)
    stall = 2.1 * np.sqrt(done * t_p * lump / short) / (1 + 0.3 * busy)
    crowd = np.maximum(t_crowd / t_d, 1.0) - 1.0
    luck = np.where(drafts, 0.10 + 0.045 * spec, 0.01)
    pressure = over * np.clip(b / b_max - 0.8, 0, 1) * 3.0
    tpot99 = tpot * (1.0 + np.sqrt(crowd**2 + luck**2 + np.minimum(stall, 1.5) ** 2) + pressure)
    spread = 1 + s["cv2"]
    wait_p = busy * t_p * spread / (2 * (1 - busy)) * 4.6 * np.where(lpm, 1.06 + 0.25 * busy**2, 1.0)
    full = np.minimum(b / b_max, 0.97)
    slots = full ** np.sqrt(2 * (b_max + 1)) * s["tout"] * tpot / b_max / (1 - full) * 3.0
    own = t_p * (1 + 1.9 * math.sqrt(s["cv2"])) * (1 + 0.25 * np.minimum(s["tin"] / chunk, 2) * busy)
    own = own + 0.2 * busy * np.minimum(chunk * per_token, 8 * t_p)  # answers when the whole batch of prefills is done
    ttft99 = 0.012 * s["slow_cpu"] + s["tin"] * 1.1e-6 + own + wait_p + slots + 1.6 * t_d
    ttft99 = ttft99 + np.where(drafts, 0.004, 0.0) + np.maximum(1 - 1 / np.maximum(rho, 1e-9), 0) * 90.0
    ttft99 = ttft99 + np.clip(rho - 0.93, 0, 0.07) * 20 * s["tout"] * tpot / b_max
    drain = 0.8 * (t_p + s["tout"] * tpot)  # the benchmark ends with its last answer
    tokens = done * s["tout"] * dp / np.where((dp > 1) & (rho < 1), 1.05, 1.0) * 90.0 / (90.0 + drain)
    text = np.minimum(tokens * s["slow_cpu"] * 45e-6, 0.95)  # one process turns the tokens of all replicas into text
    tpot99 = tpot99 * (1.0 + 0.5 * text**2 / (1 - text))
    usd = (tp * dp * s["usd"] + 0.25 * s["usd"]) / 3600 / tokens * 1e6  # and a share of the host
    return ttft99, tpot99, tokens, usd


_KNOWN = {}  # scenario -> the four metrics over the grid, once truth_grid has computed them


@functools.lru_cache(maxsize=3)
def truth_grid(scenario):
    s = SCENARIOS[scenario]
    known = np.full((4, N, len(LOADS)), np.inf)
    runs = _verdict(s, _columns(s, np.arange(N)))[:, 0] == 0
    for rows in np.array_split(np.flatnonzero(runs), 24):
        known[:, rows] = _evaluate(s, _columns(s, rows), LOADS)
    ttft, tpot, _, usd = _KNOWN[scenario] = known
    return runs, usd, tpot, (ttft <= s["ttft"]) & (tpot <= s["tpot"])


def measure(params, load, scenario, rng):
    s, row = SCENARIOS[scenario], grid_index(params)
    if scenario in _KNOWN and load in LOADS and np.isfinite(_KNOWN[scenario][0, row, 0]):  # the same, sooner
        ttft, tpot, tokens, usd = _KNOWN[scenario][:, row, LOADS.index(load)].tolist()
    else:
        c = _columns(s, np.array([row]))
        if code := int(_verdict(s, c)[0, 0]):
            w, out, pool = (float(v[0, 0]) for v in c["memory"])
            gpus = params["tp_size"] * params["dp_size"]
            raise tuner.Infeasible(RULES[code].format(gpus=gpus, w=w, act=0.3 * out, pool=pool))
        ttft, tpot, tokens, usd = (float(v[0, 0]) for v in _evaluate(s, c, [load]))
    launch, own = rng.normal(0, 0.03), rng.normal(0, 0.04, 3)
    rate = math.exp(-launch - own[2])
    return {
        "ttft_p99_s": ttft * math.exp(launch + own[0]),
        "tpot_p99_s": tpot * math.exp(launch + own[1]),
        "output_tokens_per_s": tokens * rate,
        "cost_usd_per_mtok_output": usd / rate,
    }


def launch_s(params, scenario):
    """Start-up: processes and NCCL, loading (and quantizing) the weights, capturing graphs, warming up."""
    s, spec = SCENARIOS[scenario], params["speculative_num_steps"] > 0
    q = params["quantization"]
    read = s["p_all"] * (0.56 if q == "awq" else 2.0) * (1 if params["dp_size"] == 1 else 1.25) / 3.2e9
    graphs = (4 + 0.12 * params["cuda_graph_max_bs"] * s["layers"] / 50) * (2.2 if spec else 1.0)
    jit = {"flashinfer": 9.0, "fa3": 3.0, "triton": 6.0}[params["attention_backend"]] + (8.0 if q == "fp8" else 0.0)
    return float(18 + 2.5 * params["tp_size"] + read + graphs + jit + (12 if spec else 0))


# -------------------------------------------------------------------------------- somebody's analytic model
CONSTANTS = [  # per scenario, near to what fits the truth best
    {
        "mfu": 0.29,
        "mbu": 0.84,
        "step_s": 5.2e-3,
        "hop_s": 15e-6,
        "link_gbs": 500.0,
        "accept": 0.75,
        "tail": 1.02,
        "fp8_gain": 1.6,
        "awq_gain": 0.66,
        "reserve_gib": 2.5,
    },
    {
        "mfu": 0.18,
        "mbu": 0.67,
        "step_s": 2.0e-3,
        "hop_s": 42e-6,
        "link_gbs": 130.0,
        "accept": 0.43,
        "tail": 1.10,
        "fp8_gain": 1.37,
        "awq_gain": 0.49,
        "reserve_gib": 2.2,
    },
    {
        "mfu": 0.25,
        "mbu": 0.92,
        "step_s": 6.4e-3,
        "hop_s": 8e-6,
        "link_gbs": 9.2,
        "accept": 0.48,
        "tail": 1.02,
        "fp8_gain": 1.55,
        "awq_gain": 0.88,
        "reserve_gib": 1.6,
    },
]


def predictor(scenario, kind, seed):
    """A textbook model: roofline, a fixed point of the batch, M/M/1. Knows nothing of schedule_policy and
    cuda_graph_max_bs, and of page_size and attention_backend but one rule of the docs. Kinds: right, 30%, badly."""
    s, rng, k = SCENARIOS[scenario], np.random.default_rng([seed, scenario, 77]), dict(CONSTANTS[scenario])
    up = {"right": 1.0, "30%": 1.3, "badly": 1.6}[kind]
    down = {"right": 1.0, "30%": 0.7, "badly": 1 / 1.6}[kind]
    for name in k:
        k[name] *= up if rng.random() < 0.5 else down
    warp = None
    if kind == "badly":
        k["accept"] = CONSTANTS[scenario]["accept"] * 0.5
        warp = {n: {v: tuple(np.exp(rng.normal(0, 0.35, 2))) for v in vs} for n, vs in SPACE.items()}

    def predict(
        config,
        load,
        *,
        mfu=k["mfu"],
        mbu=k["mbu"],
        step_s=k["step_s"],
        hop_s=k["hop_s"],
        link_gbs=k["link_gbs"],
        accept=k["accept"],
        tail=k["tail"],
        fp8_gain=k["fp8_gain"],
        awq_gain=k["awq_gain"],
        reserve_gib=k["reserve_gib"],
    ):
        tp, dp, q = config["tp_size"], config["dp_size"], config["quantization"]
        steps = config["speculative_num_steps"]
        if tp * dp > 8:
            raise tuner.Infeasible("needs more than 8 GPUs")
        if steps and config["page_size"] > 1 and config["attention_backend"] == "triton":
            raise tuner.Infeasible("docs: no speculation with topk > 1 and page_size > 1 on this backend")
        size = {"none": 2.0, "fp8": 1.0, "awq": 0.5}[q]
        weights = (s["p_all"] * size + (2 * s["draft"] if steps else 0)) / tp
        if reserve_gib > (1 - config["mem_fraction_static"]) * s["mem"]:
            raise tuner.Infeasible("no memory left for activations and graphs")
        kv_tok = s["kv_tok"] * (1.0 if config["kv_cache_dtype"] == "auto" else 0.5) / tp
        pool = (config["mem_fraction_static"] * s["mem"] * GIB - weights) / kv_tok
        ctx = s["tin"] + s["tout"] / 2
        if pool < ctx + s["tout"]:
            raise tuner.Infeasible("weights and one request do not fit in the memory")
        b_max = min(config["max_running_requests"], pool / (s["tin"] + s["tout"]))
        lam = load * s["rate"] / dp
        flops = s["flops"] * mfu * {"none": 1.0, "fp8": fp8_gain, "awq": awq_gain}[q] * tp
        ring = 2 * (tp - 1) / tp / (link_gbs * 1e9)
        hops = 2 * s["layers"] * hop_s * (1 if tp > 1 else 0)

        def prefill(b):
            spare = max(pool - b * (s["tin"] + s["tout"] / 2), 0.0)
            n = s["tin"] * (1 - s["share"] * min(spare / s["workset"], 1.0))
            attention = 2.0 * s["layers"] * s["heads"] * 128 * n * (s["tin"] + n) / flops
            chunks = math.ceil(n / config["chunked_prefill_size"])
            return (
                n * (2 * s["p_act"] / flops + 2 * s["layers"] * s["hid"] * 2.0 * ring)
                + attention
                + chunks * (step_s + hops)
            )

        a = min(accept, 0.99)
        tau = (1 - a ** (steps + 1)) / (1 - a) if steps else 1.0
        m1 = 2 * steps if steps else 1

        def step(b):
            m = b * m1
            read = (s["p_all"] - s["p_exp"] + s["p_exp"] * (1 - 0.9375 ** min(m, 400))) * size / tp + b * ctx * kv_tok
            t = (
                max(read / (s["bw"] * mbu), m * 2 * s["p_act"] / flops)
                + step_s
                + hops
                + m * 2 * s["layers"] * s["hid"] * 2.0 * ring
            )
            return t + steps * (2 * s["draft"] / tp / (s["bw"] * mbu) + 0.1 * step_s)

        most = 1.0 / (prefill(b_max) + s["tout"] * step(b_max) / tau / b_max)
        b = 1.0
        for _ in range(12):
            b = min(max(0.5 * b + 0.5 * lam * s["tout"] * step(b) / tau / max(1 - lam * prefill(b), 0.05), 1.0), b_max)
        t_p, done, rho = prefill(b), min(lam, most), min(lam / most, 1.0)
        tpot = step(b) / tau / max(1 - done * t_p, 0.05) * tail
        ttft = t_p * (1 + 3 * tail * rho / max(1 - rho, 0.02)) + step(b)
        tokens = done * s["tout"] * dp
        usd = tp * dp * s["usd"] / 3600 / tokens * 1e6
        if warp:
            for n, table in warp.items():
                fl, fc = table[config[n]]
                tpot, ttft, usd, tokens = tpot * fl, ttft * fl, usd * fc, tokens / fc
        return {
            "ttft_p99_s": ttft,
            "tpot_p99_s": tpot,
            "output_tokens_per_s": tokens,
            "cost_usd_per_mtok_output": usd,
        }

    return predict
