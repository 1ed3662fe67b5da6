# ruff: noqa: E501, B905, RUF059, UP031
"""Six private worlds for a serving-parameter tuner: vLLM, SGLang, TensorRT-LLM, LMDeploy, llama.cpp and an in-house wrapper.

All worlds share one small queueing core (solve); what differs is in each world's physics(): which arrays it feeds to the core, and its quirks.
"""

import math
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from tuner import Infeasible

GIB = 2.0**30
W = np.where


class Gpu(NamedTuple):
    name: str
    bw: float  # bytes/s
    f16: float  # flop/s
    f8: float
    gib: float
    lat: float  # seconds of a small all-reduce
    bus: float  # bytes/s of a large one
    usd: float  # per hour


class Model(NamedTuple):
    P: float  # parameters
    dense: float  # those read in each step
    act: float  # those active per token
    layers: int
    hidden: int
    kv: float  # bytes per token at 16 bit
    kvh: int  # KV heads, the most ways a cache splits
    touch: float  # share of the experts that one token touches
    lp: float  # prompt tokens
    lo: float  # output tokens
    lf: float  # p99 prompt over the mean


H100 = Gpu("NVIDIA H100 80GB HBM3", 3.35e12, 990e12, 1979e12, 79.11, 7e-6, 330e9, 2.9)
H200 = Gpu("NVIDIA H200", 4.8e12, 990e12, 1979e12, 139.8, 7e-6, 330e9, 3.6)
B200 = Gpu("NVIDIA B200", 7.7e12, 2250e12, 4500e12, 178.35, 6e-6, 650e9, 5.6)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 624e12, 79.15, 9e-6, 220e9, 1.7)
R4090 = Gpu("NVIDIA GeForce RTX 4090", 1.008e12, 165e12, 330e12, 23.64, 30e-6, 18e9, 0.45)
L40S = Gpu("NVIDIA L40S", 0.864e12, 362e12, 733e12, 44.4, 22e-6, 22e9, 0.95)


class Cols:
    """The columns of one or of all configurations, and the crashes that physics() finds in them."""

    def __init__(self, space, idx):
        self.space, self.idx, self.crashes = space, idx, []
        self.n = len(next(iter(idx.values())))

    def __call__(self, name):
        return np.array(self.space[name], float)[self.idx[name]]

    def pick(self, name, *per_value):
        return np.array(per_value, float)[self.idx[name]]

    def eq(self, name, *values):
        return np.array([v in values for v in self.space[name]])[self.idx[name]]

    def crash(self, mask, text, **kw):
        self.crashes.append((np.broadcast_to(mask, (self.n,)), text, kw))

    def crashed(self):
        return np.any([m for m, _, _ in self.crashes], axis=0)


def base(m, g, tp, wb, kvb, peak, share, act=2.0, pp=1.0, kvtp=None):
    """What a textbook knows: times in seconds, memory in GiB and KV room in tokens. wb, kvb: bytes a weight, bytes a KV element."""
    kvtp = np.minimum(tp, m.kvh) if kvtp is None else kvtp
    multi = tp > 1
    ctx = m.lp + 0.6 * m.lo
    p = SimpleNamespace(
        m=m, g=g, ctx=ctx, lp=m.lp, lo=m.lo, lf=m.lf, pp=pp, rep=1.0, imb=1.0, gpus=tp * pp, touch=m.touch
    )
    p.w0 = m.dense * wb / (tp * g.bw * 0.78)
    p.w1 = (m.P - m.dense) * wb / (tp * g.bw * 0.70)
    p.fl = 2 * m.act / (tp * peak * 0.50)
    p.kvs = m.kv * kvb / 2 * ctx / (kvtp * g.bw * 0.65)
    p.com0 = multi * 2 * m.layers * g.lat * (1 + 0.12 * np.log2(tp))
    p.com1 = multi * 4 * m.layers * m.hidden * 2 * (tp - 1) / tp / g.bus
    p.pre = 2 * m.act / (tp * peak * 0.60) + 0.8 * p.com1
    p.wgib = m.P * wb / (tp * pp) / GIB
    p.free = share * g.gib - p.wgib - act
    p.kvcap = np.maximum(p.free, 0.02) * GIB * kvtp * pp / (m.kv * kvb / 2)
    p.k = p.acc = p.dr0 = p.dr1 = p.eager = p.big = p.hit = 0.0
    p.mul = p.over = p.wmul = p.chunked = 1.0
    p.bg, p.bhalf, p.pen, p.chunk, p.cho, p.jit, p.net, p.pre0 = 1e9, 64.0, 0.3, 8192.0, 0.004, 1.10, 0.02, 0.002
    p.h0, p.h1, p.ovl, p.bcap, p.launch = 0.003, 1e-5, 0.0, 256.0, 60.0
    return p


def speculate(p, k, acc, dr0, dr1=0.0):
    p.k, p.acc, p.dr0, p.dr1 = k, W(k > 0, acc, 0.0), W(k > 0, dr0, 0.0), W(k > 0, dr1, 0.0)


def prefix(p, best, working_set):
    """Share of the prompt found in the cache: what the KV room that running requests leave can hold of the working set."""
    spare = np.maximum(p.kvcap - 0.5 * np.minimum(p.bcap * p.ctx, p.kvcap), 0.0)
    return best * (1 - np.exp(-spare / working_set))


def step(p, b):
    """Seconds of one decode step with b sequences on one replica."""
    mb = b / p.pp
    tok = mb * (p.k + 1)
    w = p.w0 + p.w1 * (1 - np.exp(-p.touch * tok))
    f = p.fl * tok
    w, f = w * w, f * f
    gpu = np.sqrt(np.sqrt(w * w + f * f)) + p.kvs * mb + p.com0 + p.com1 * tok
    gpu = gpu + p.eager / (1 + np.exp(np.clip((p.bg - b) / (0.06 * p.bg + 1), -40, 40)))
    gpu = gpu * p.mul * (1 + p.big * b / (b + p.bhalf)) + p.dr0 + p.dr1 * mb
    host = p.h0 + p.h1 * b
    full = np.clip((b * p.ctx / p.kvcap - 0.8) / 0.2, 0, 1.25)
    return np.maximum(gpu + (1 - p.ovl) * host, host) * (1 + p.pen * full * full)


def solve(p, load):
    """Closed form at one load: Little's law by bisection, stalls by prefill as a Poisson sum, waiting for a slot as in M/M/c."""
    lam = load / p.rep * p.imb
    per = W(np.asarray(p.acc) > 0, (1 - np.power(p.acc, p.k + 1.0)) / (1 - np.minimum(p.acc, 0.99)), 1.0)
    bmax = np.maximum(np.minimum(p.bcap, p.over * p.kvcap / p.ctx), 1.0)
    new = p.lp * (1 - p.hit)
    pre = p.pre + W(p.chunked > 0, p.cho / p.chunk, 0.0)
    up = (new * pre + p.pre0) / W(p.pp > 1, 0.85 * p.pp, 1.0)
    lmax = 1 / (p.lo * step(p, bmax) / per / bmax + up)
    rho = lam / lmax
    u = np.minimum(lam, lmax) * up
    lo, hi = np.zeros_like(bmax + u), bmax + 0 * u
    for _ in range(26):
        b = 0.5 * (lo + hi)
        enough = b >= lam * p.lo * step(p, b) / per / (1 - u)
        hi, lo = W(enough, b, hi), W(enough, lo, b)
    b = W(rho >= 1, bmax, hi)
    s = step(p, b)
    m = s / per / (1 - u)
    size = W(p.chunked > 0, np.minimum(p.chunk, new * p.lf), new * p.lf) * pre
    tpot = m * p.jit * (1 + 0.2 * (per - 1) / per) + 2.33 * np.sqrt(u * m * size / p.lo)
    room = np.maximum(p.chunk - b * (p.k + 1), 0.12 * p.chunk)
    rest = new * p.lf
    r = np.minimum(rho, 0.985)
    wait = 4.6 * p.lo * m / bmax * r ** np.sqrt(2 * (bmax + 1)) / (1 - r) + 6.0 * up * u / (1 - np.minimum(u, 0.97))
    ttft = (
        p.net
        + rest * pre
        + s * (1 + W(p.chunked > 0, rest / room, 0.0))
        + p.wmul * wait
        + 90 * np.maximum(rho - 0.985, 0)
    )
    served = np.minimum(lam, 0.99 * lmax) * p.rep / p.imb
    out = served * p.lo
    return ttft, tpot, p.g.usd * p.gpus / 3600 / out * 1e6, out, rho


def book(lam, lo, lp, *, gpus, usd, w, f, kv, com, host, pre, slots, size, w1=0.0, touch=0.0, per=1.0, lf=2.5, rep=1.0):
    """Somebody's textbook: reading the weights or computing, whichever is longer, plus the cache, the wires and the host; prompts take their share."""
    lam, pre = lam / rep, max(pre, 1e-6)
    slots = max(slots, 1.0)

    def token(b):
        return (max(w + w1 * min(1.0, touch * b), f * b) + kv * b + com + host) / per

    most = 1 / (lo * token(slots) / slots + lp * pre)
    u = min(lam, most) * lp * pre
    b = 1.0 if lam < most else slots
    for _ in range(10 if lam < most else 1):
        t = token(b) / max(1 - u, 0.02)
        b = min(lam * lo * t, slots)
    out = min(lam, most) * lo * rep
    return {
        "ttft_p99_s": max(1e-3, lp * lf * pre / max(1 - u, 0.02) + 2 * t + 60 * max(0.0, lam / most - 1)),
        "tpot_p99_s": 1.15 * t + 2.3 * math.sqrt(u * t * min(size, lp * lf) * pre / lo),
        "cost_usd_per_mtok_output": usd * gpus / 3600 / out * 1e6,
    }


def expected(k, a):
    return (1 - a ** (k + 1)) / (1 - a) if k and a < 1 else 1.0 + k


class World:
    LUCK, NOISE = 0.04, 0.05
    ACCEPT = ("accept", "p_accept", "mtp_accept", "luck_of_guess")

    def __init__(self, i):
        self.i = i
        self.shape = tuple(len(v) for v in self.SPACE.values())
        self.n = int(np.prod(self.shape))
        self._at = {k: {v: j for j, v in enumerate(vs)} for k, vs in self.SPACE.items()}

    def space(self):
        return {k: list(v) for k, v in self.SPACE.items()}

    def default(self, i=None):
        return dict(self.DEFAULT)

    def slos(self, i=None):
        return {"ttft_p99_s": self.SLO[0], "tpot_p99_s": self.SLO[1]}

    def grid_index(self, config):
        return int(np.ravel_multi_index([self._at[k][config[k]] for k in self.SPACE], self.shape))

    def config_at(self, row):
        return {k: v[j] for (k, v), j in zip(self.SPACE.items(), np.unravel_index(row, self.shape))}

    def _cols(self, rows):
        return Cols(self.SPACE, dict(zip(self.SPACE, np.unravel_index(rows, self.shape))))

    def _one(self, config):
        c = self._cols(np.array([self.grid_index(config)]))
        p = self.physics(c)
        for mask, text, kw in c.crashes:
            if mask[0]:
                raise Infeasible(text.format(**{k: np.broadcast_to(v, (1,))[0] for k, v in kw.items()}))
        return p

    def luck(self, row):
        return float(np.exp(self.LUCK * np.random.default_rng([zlib.crc32(self.NAME.encode()), row]).standard_normal()))

    def measure(self, config, load, i, rng):
        ttft, tpot, cost, out, rho = (float(np.ravel(v)[0]) for v in solve(self._one(config), float(load)))
        luck, z = self.luck(self.grid_index(config)), rng.standard_normal(4)
        full = luck if rho > 0.985 else 1.0
        return {
            "ttft_p99_s": ttft * luck * math.exp(self.NOISE * 1.15 * z[0]),
            "tpot_p99_s": tpot * luck * math.exp(self.NOISE * 0.9 * z[1]),
            "cost_usd_per_mtok_output": cost * full * math.exp(0.01 * z[2]),
            "output_tok_s": out / full * math.exp(0.01 * z[3]),
        }

    def launch_s(self, config, i=None):
        try:
            return float(np.ravel(self._one(config).launch)[0])
        except Infeasible:
            return 35.0

    def truth_grid(self, i=None):
        c = self._cols(np.arange(self.n))
        with np.errstate(all="ignore"):
            p = self.physics(c)
            runs = ~c.crashed()
            cost, lat, ok = (np.full((self.n, len(self.LOADS)), v) for v in (np.nan, np.nan, False))
            for j, load in enumerate(self.LOADS):
                ttft, tpot, usd, _, _ = solve(p, load)
                cost[:, j], lat[:, j] = W(runs, usd, np.nan), W(runs, tpot, np.nan)
                ok[:, j] = runs & (ttft <= self.SLO[0]) & (tpot <= self.SLO[1])
        return runs, cost, lat, ok

    def predictor(self, i, kind, seed):
        rng = np.random.default_rng([seed, self.i, 77])
        k = dict(self.BOOK)
        flip = {name: rng.random() < 0.5 for name in k}
        wrong = {"right": (1.0, 1.0), "30%": (1.3, 0.7), "badly": (1.6, 1 / 1.6)}[kind]
        for name in k:
            k[name] *= wrong[0] if flip[name] else wrong[1]
            if name in self.ACCEPT:
                k[name] = min(k[name], 0.95) if kind != "badly" else self.BOOK[name] / 2
        off = (
            {n: {v: rng.lognormal(0, 0.35, 2) for v in vs} for n, vs in self.SPACE.items()} if kind == "badly" else None
        )

        def core(config, load, k):
            r = self.book(config, load, k)
            if off:
                lat = cost = 1.0
                for n, v in config.items():
                    a, b = off[n][v]
                    lat, cost = lat * a, cost * b
                r = {
                    "ttft_p99_s": r["ttft_p99_s"] * lat,
                    "tpot_p99_s": r["tpot_p99_s"] * lat,
                    "cost_usd_per_mtok_output": r["cost_usd_per_mtok_output"] * cost,
                }
            return {a: float(b) for a, b in r.items()}

        there = {"core": core, "K": SimpleNamespace}
        exec(
            "def predict(config, load, *, %s):\n    return core(config, load, K(%s))"
            % (", ".join(f"{a}={float(b)!r}" for a, b in k.items()), ", ".join(f"{a}={a}" for a in k)),
            there,
        )
        return there["predict"]


TORCH_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {need:.2f} GiB. GPU 0 has a total capacity of {cap:.2f} GiB of "
    "which {free:.2f} GiB is free."
)


# --------------------------------------------------------------------------------------------------------------- 0: vLLM, dense 70B, chat
class VllmChat(World):
    NAME = "vLLM Llama-3.3-70B, 2-16 H100, chat"
    MODEL = Model(70.6e9, 70.6e9, 70.6e9, 80, 8192, 327680, 8, 1.0, 1100, 320, 3.0)
    LOADS = (1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 22.0, 30.0)
    SLO = (2.0, 0.055)
    SPACE = {
        "--tensor-parallel-size": [2, 4, 8],
        "--pipeline-parallel-size": [1, 2],
        "--quantization": ["none", "fp8", "awq_marlin"],
        "--kv-cache-dtype": ["auto", "fp8"],
        "--block-size": [16, 64],
        "--max-num-seqs": [64, 256, 512],
        "--max-num-batched-tokens": [2048, 8192, 16384],
        "--gpu-memory-utilization": [0.85, 0.95],
        "VLLM_ATTENTION_BACKEND": ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"],
        "--speculative-config.method": ["none", "ngram", "eagle3"],
        "--speculative-config.num_speculative_tokens": [2, 4],
        "--async-scheduling": [False, True],
        "--compilation-config.cudagraph_mode": ["PIECEWISE", "FULL_AND_PIECEWISE"],
    }
    DEFAULT = dict(zip(SPACE, [4, 1, "none", "auto", 16, 256, 8192, 0.85, "FLASH_ATTN", "none", 2, False, "PIECEWISE"]))
    BOOK = dict(
        hbm_tb_s=4.38,
        tflops=397.0,
        allreduce_us=17.3,
        host_ms=7.96,
        accept=0.571,
        kv_eff=0.657,
        act_gib=2.0,
        usd_gpu_h=2.9,
    )

    def physics(self, c):
        tp, pp = c("--tensor-parallel-size"), c("--pipeline-parallel-size")
        seqs, budget, util = c("--max-num-seqs"), c("--max-num-batched-tokens"), c("--gpu-memory-utilization")
        fp8, awq, kv8 = (
            c.eq("--quantization", "fp8"),
            c.eq("--quantization", "awq_marlin"),
            c.eq("--kv-cache-dtype", "fp8"),
        )
        fa, fi, tri = (c.eq("VLLM_ATTENTION_BACKEND", b) for b in self.SPACE["VLLM_ATTENTION_BACKEND"])
        ngram, eagle = c.eq("--speculative-config.method", "ngram"), c.eq("--speculative-config.method", "eagle3")
        b64, asy = c("--block-size") == 64, c("--async-scheduling") > 0
        full = c.eq("--compilation-config.cudagraph_mode", "FULL_AND_PIECEWISE")
        k = W(ngram | eagle, c("--speculative-config.num_speculative_tokens"), 0)
        act = 1.6 + budget / 8192 * 1.1 + seqs / 512 * 1.3 + 1.9 * eagle / tp + 0.9 * full
        p = base(
            self.MODEL,
            H100,
            tp,
            W(fp8, 1.03, W(awq, 0.56, 2.0)),
            W(kv8, 1.0, 2.0),
            W(fp8, 1979e12 * 0.8, 990e12),
            util,
            act,
            pp,
        )
        c.crash(
            (pp > 1) & eagle,
            "NotImplementedError: Speculative decoding with a draft head is not supported with pipeline parallelism in V1.",
        )
        c.crash(
            asy & ngram,
            "ValueError: Currently, async scheduling is only supported with EAGLE/MTP kind of speculative decoding",
        )
        c.crash(
            p.wgib > util * H100.gib - 0.5,
            TORCH_OOM,
            need=448 * 1.0 / tp,
            cap=H100.gib,
            free=np.maximum(0.04, H100.gib - p.wgib) % 0.4,
        )
        need = 16384 * p.m.kv * W(kv8, 0.5, 1.0) / np.minimum(tp, 8) / pp / GIB
        c.crash(
            p.free < need,
            "ValueError: To serve at least one request with the models's max seq len (16384), ({need:.2f} GiB KV cache is "
            "needed, which is larger than the available KV cache memory ({free:.2f} GiB). Based on the available memory, the estimated "
            "maximum model length is {n:.0f}.",
            need=need,
            free=np.maximum(p.free, 0.1),
            n=16384 * np.maximum(p.free, 0.1) / need,
        )
        c.crash((util > 0.9) & full & (budget > 8192) & (seqs > 256), TORCH_OOM, need=3.91, cap=H100.gib, free=1.37)
        c.crash(
            tri & eagle & (k > 2) & kv8,
            "AssertionError: Unsupported FP8 KV cache for tree attention (query_len=5) in TRITON_ATTN",
        )
        # quirks: attention
        p.kvs = (
            p.kvs
            * W(tri, W(kv8, 2.3, 1.25), 1.0)
            * W(fi & ~b64, 1.45, 1.0)
            * W(fa & kv8, 1.3, 1.0)
            * W(fa & b64 & ~kv8, 1.2, 1.0)
        )
        p.pre = p.pre * W(tri, 1.3, 1.0) * W(awq, 1.75, 1.0) * W(fi & kv8, 0.92, 1.0)
        # quirks: weights. Marlin dequantises for each tile; fp8 GEMMs of an eighth of the model are too thin
        p.fl = p.fl * W(awq, 2.4, 1.0)
        p.w0 = p.w0 * W(awq, 1.25, 1.0) * W(fp8 & (tp == 8), 1.4, 1.0)
        # host and graphs: eagle's capture list ends at 512 tokens; FlashInfer cannot verify drafts in a full graph
        p.h0 = (
            0.0036
            + 0.0012 * (pp > 1)
            + 0.0035 * W(full, 0, 1) * W(fa, 0.5, 1.0)
            + 0.003 * (fi & (k > 0))
            + 0.0012 * ngram
        )
        p.h1 = 1.1e-5 + 4.5e-5 * ngram + 1e-5 * (k > 0)
        p.ovl = W(asy, W(eagle, 0.45, 0.85), 0.0)
        p.bg, p.eager = 512 / (k + 1), 0.011 + 0.006 * (tp == 8)
        speculate(
            p, k, W(eagle, W(k > 2, 0.66, 0.72), 0.20), W(eagle, 0.0007 * k + 0.0016, 0.0002), W(eagle, 6e-6, 0.0)
        )
        p.mul = (
            W((pp > 1) & asy, 1.35, 1.0)
            * W(fi & full & ~b64, 1.3, 1.0)
            * W(eagle & (budget == 2048) & (seqs > 64), 1.3, 1.0)
        )
        p.chunk, p.bcap, p.cho = budget, seqs, 0.004 + 0.003 * W(full, 0, 1)
        p.chunk = W(eagle & (budget > 8192), 8192, p.chunk)
        p.hit = prefix(p, 0.22, 2.5e5) * W(b64, 0.8, 1.0)
        p.launch = 70 + p.wgib * 1.6 + 35 * full + 20 * eagle + 12 * pp
        return p

    def book(self, c, load, k):
        tp, pp, q = c["--tensor-parallel-size"], c["--pipeline-parallel-size"], c["--quantization"]
        wb = {"none": 2.0, "fp8": 1.0, "awq_marlin": 0.55}[q]
        kvb = 327680 / (2 if c["--kv-cache-dtype"] == "fp8" else 1)
        free = c["--gpu-memory-utilization"] * 80 - 70.6e9 * wb / (tp * pp) / GIB - k.act_gib
        if free < 0.5:
            raise Infeasible(f"textbook: {free:.1f} GiB left for the cache")
        n = c["--speculative-config.num_speculative_tokens"] if c["--speculative-config.method"] == "eagle3" else 0
        bw, fl = k.hbm_tb_s * 1e12 * tp, k.tflops * 1e12 * tp * (1.8 if q == "fp8" else 1)
        return book(
            load,
            320,
            1100,
            gpus=tp * pp,
            usd=k.usd_gpu_h,
            w=70.6e9 * wb / bw,
            f=141e9 * (n + 1) / fl / pp,
            kv=kvb * 1292 / bw / k.kv_eff / pp,
            com=(tp > 1) * 160 * k.allreduce_us * 1e-6,
            host=k.host_ms * 1e-3 + 0.003 * (n > 0),
            pre=141e9 / fl / pp,
            size=c["--max-num-batched-tokens"],
            slots=min(c["--max-num-seqs"], free * GIB * tp * pp / kvb / 1292),
            per=expected(n, k.accept),
        )


# --------------------------------------------------------------------------------------------- 1: SGLang, DeepSeek-V3 (MLA, MoE), agents
class SglangAgents(World):
    NAME = "SGLang DeepSeek-V3.1 671B, 8-16 H200, agents"
    MODEL = Model(671e9, 18e9, 37e9, 61, 7168, 61 * 576 * 2, 1, 8 / 256, 9000, 420, 2.2)
    LOADS = (0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 11.0, 15.0)
    SLO = (4.0, 0.075)
    LUCK = 0.045
    SPACE = {
        "--tp-size": [8, 16],
        "--enable-dp-attention": [False, True],
        "--moe-a2a-backend": ["none", "deepep"],
        "--quantization": ["fp8", "w4afp8"],
        "--kv-cache-dtype": ["auto", "fp8_e4m3"],
        "--attention-backend": ["fa3", "flashmla", "flashinfer"],
        "--page-size": [1, 64],
        "--mem-fraction-static": [0.8, 0.86, 0.92],
        "--chunked-prefill-size": [2048, 8192, 32768],
        "--schedule-policy": ["fcfs", "lpm", "dfs-weight"],
        "--schedule-conservativeness": [0.3, 1.0],
        "--speculative-num-steps": [0, 1, 3],
        "--cuda-graph-max-bs": [32, 160],
    }
    DEFAULT = dict(zip(SPACE, [8, False, "none", "fp8", "auto", "fa3", 1, 0.86, 8192, "fcfs", 1.0, 0, 160]))
    BOOK = dict(
        hbm_gb_s=2190.0,
        tflops_fp8=536.0,
        allreduce_us=27.8,
        step_ms=4.38,
        mtp_accept=0.505,
        hit=0.314,
        static_gib=4.06,
        gpu_hour_usd=3.6,
    )

    def physics(self, c):
        tp, dpa, ep = c("--tp-size"), c("--enable-dp-attention") > 0, c.eq("--moe-a2a-backend", "deepep")
        w4, kv8 = c.eq("--quantization", "w4afp8"), c.eq("--kv-cache-dtype", "fp8_e4m3")
        fa3, mla, fi = (c.eq("--attention-backend", b) for b in self.SPACE["--attention-backend"])
        p64, mem, chunk = (c("--page-size") == 64) | mla, c("--mem-fraction-static"), c("--chunked-prefill-size")
        lpm, dfs, loose = (
            c.eq("--schedule-policy", "lpm"),
            c.eq("--schedule-policy", "dfs-weight"),
            c("--schedule-conservativeness") < 1,
        )
        k, gbs = c("--speculative-num-steps"), c("--cuda-graph-max-bs")
        wb, ways = W(w4, 0.57, 1.03), W(dpa, tp, 1.0)
        act = 3.0 + chunk / 8192 * 1.2 + gbs / 160 * 1.8 + 1.5 * (k > 0) + 3.5 * ep
        p = base(self.MODEL, H200, tp, wb, W(kv8, 1.0, 2.0), 1979e12 * 0.45, mem, 0.0, 1.0, ways)
        p.wgib = p.wgib + dpa * 9.0
        p.free = mem * H200.gib - p.wgib - 1.5 * (k > 0)
        p.kvcap = np.maximum(p.free, 0.02) * GIB * ways / (p.m.kv * W(kv8, 0.5, 1.0))
        c.crash(
            w4 & (tp > 8) & ~ep,
            "ValueError: w4afp8: moe intermediate_size_per_partition 128 must be a multiple of 2 * group_size (256); "
            "use expert parallelism (--ep-size 16)",
        )
        c.crash(
            ep & (gbs * (k + 1) > 512),
            "AssertionError: x.size(0) <= num_max_dispatch_tokens_per_rank, "
            "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=512 but cuda graph needs {n:.0f}",
            n=gbs * (k + 1),
        )
        c.crash(
            fi & (k > 1) & p64,
            "AssertionError: FlashInfer MLA speculative decoding with num_steps > 1 requires page_size == 1",
        )
        c.crash(
            p.free < 3.0,
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. (available {f:.2f} GiB)",
            f=p.free,
        )
        left = (1 - mem) * H200.gib - act
        c.crash(
            left < 5.0,
            "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate {n:.2f} GiB. GPU 3 has a total capacity of "
            "139.80 GiB of which {f:.2f} GiB is free.",
            n=act / 2.2,
            f=np.maximum(left, 0.3) / 5,
        )
        # MLA: attention dp keeps each sequence on one card, else every card reads all of them
        p.w0 = p.w0 * W(dpa, 2.1, 1.0) * 1.1
        p.w1 = p.w1 * W(ep, 1.0, W(tp > 8, 1.5, 1.15))
        p.kvs = p.kvs * W(dpa, 1.2, 0.8)
        p.kvs = (
            p.kvs
            * W(kv8, W(mla, 3.2, W(fi, 1.3, 1.0)), 1.0)
            * W(fa3 & kv8 & ~p64, 1.7, 1.0)
            * W(fi, 1.15, 1.0)
            * W(fa3 & ~kv8, 1.25, 1.0)
        )
        two = tp > 8
        p.com0 = 0.005 + p.com0 * W(ep, W(two, 1.9, 1.5), W(two, 4.2, 1.0)) * W(dpa, 0.7, 1.0) + 0.0035 * (dpa & ~ep)
        p.com1 = p.com1 * W(ep, W(dpa, 0.3, 0.9), W(two, 3.0, 1.0)) * W(dpa & ~ep, 1.4, 1.0)
        p.pre = (
            p.pre
            * W(dpa, 0.82, 1.0)
            * W(mla, 1.18, 1.0)
            * W(w4, 0.95, 1.0)
            * W(ep & ~dpa, 1.25, 1.0)
            * W(two & ~ep, 1.35, 1.0)
            * 1.2
        )
        p.fl = p.fl * W(w4, 1.15, 1.0)
        # deepep in low-latency mode pays per step, and an uneven dp rank holds up the others
        p.mul = W(ep & ~dpa, 1.22, 1.0) * W(dpa & (k == 3), 1.15, 1.0)
        p.h0, p.h1, p.ovl = 0.0055 + 0.002 * (k > 0) + 0.0015 * (two), 2e-5 + 4e-5 * lpm, W(k > 0, 0.25, 0.75)
        speculate(p, k, W(k > 1, 0.70, 0.84) - 0.07 * (kv8 & fa3), 0.0012 + 0.0014 * k, 4e-6)
        p.bg, p.eager = gbs * W(dpa, tp * 0.8, 1.0), 0.026 - 0.008 * ep
        p.chunk, p.bcap, p.cho = chunk, 512.0, 0.012 + 0.01 * dpa
        p.chunk = W(dpa, chunk / 2, chunk)
        p.over, p.pen = W(loose, 1.3, 0.85), W(loose, 1.5, 0.15)
        best = W(lpm, 0.86, W(dfs, 0.82, 0.74)) * W(p64, 0.97, 1.0) * W(dpa, 0.80, 1.0) * W(lpm & dpa, 0.9, 1.0)
        p.hit = prefix(p, best, 5.0e5)
        p.wmul = 1 + 0.8 * lpm + 0.5 * dfs
        p.launch = 210 + p.wgib * 2.2 + 25 * (gbs > 100) + 60 * ep + 40 * (k > 0)
        return p

    def book(self, c, load, k):
        tp, dpa = c["--tp-size"], c["--enable-dp-attention"]
        wb, kvb = (
            (0.55 if c["--quantization"] == "w4afp8" else 1.0),
            61 * 576 * (1 if c["--kv-cache-dtype"] == "fp8_e4m3" else 2),
        )
        free = c["--mem-fraction-static"] * 140 - 671e9 * wb / tp / GIB - k.static_gib * dpa
        if free < 2 or (1 - c["--mem-fraction-static"]) * 140 - k.static_gib - c["--chunked-prefill-size"] / 7000 < 3:
            raise Infeasible(f"textbook: {free:.1f} GiB left for the cache")
        n, bw, fl, ways = c["--speculative-num-steps"], k.hbm_gb_s * 1e9, k.tflops_fp8 * 1e12 * tp, tp if dpa else 1
        ep, hit = c["--moe-a2a-backend"] == "deepep", k.hit + 0.08 * (c["--schedule-policy"] != "fcfs")
        return book(
            load,
            420,
            9000 * (1 - hit),
            gpus=tp,
            usd=k.gpu_hour_usd,
            w=18e9 * (2 if dpa else 1) * wb / bw / tp,
            w1=653e9 * wb / bw / tp,
            touch=0.025 * (n + 1),
            f=74e9 * (n + 1) / fl,
            kv=kvb * 9250 / bw / ways,
            size=c["--chunked-prefill-size"],
            com=122 * k.allreduce_us * 1e-6 * ((1.6 if ep else 3.5) if tp > 8 else 1),
            host=k.step_ms * 1e-3 + 0.002 * n,
            pre=74e9 / fl,
            slots=min(512, free * GIB * ways / kvb / 9250),
            per=expected(n, k.mtp_accept),
        )


# ------------------------------------------------------------------------------------------------ 2: TensorRT-LLM, MoE 235B-A22B, reasoning
class TrtllmReasoning(World):
    NAME = "TensorRT-LLM Qwen3-235B-A22B, 2-8 B200, reasoning"
    MODEL = Model(235e9, 9e9, 22e9, 94, 4096, 94 * 2 * 4 * 128 * 2, 4, 8 / 128, 700, 5000, 2.5)
    LOADS = (0.15, 0.3, 0.6, 1.1, 1.8, 2.7, 3.8, 5.0, 6.5)
    SLO = (2.0, 0.034)
    LUCK = 0.035
    SPACE = {
        "tensor_parallel_size": [2, 4, 8],
        "moe_expert_parallel_size": [1, 2, 4],
        "enable_attention_dp": [False, True],
        "quant_algo": ["FP8_BLOCK_SCALES", "NVFP4"],
        "kv_cache_config.dtype": ["auto", "fp8", "nvfp4"],
        "kv_cache_config.free_gpu_memory_fraction": [0.75, 0.9],
        "moe_config.backend": ["CUTLASS", "TRTLLM", "DEEPGEMM"],
        "max_batch_size": [64, 256, 1024],
        "max_num_tokens": [2048, 8192],
        "cuda_graph_config.enable_padding": [False, True],
        "disable_overlap_scheduler": [False, True],
        "scheduler_config.capacity_scheduler_policy": ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"],
        "speculative_config.max_draft_len": [0, 2, 4],
    }
    DEFAULT = dict(
        zip(
            SPACE,
            [
                8,
                4,
                False,
                "FP8_BLOCK_SCALES",
                "auto",
                0.9,
                "CUTLASS",
                256,
                8192,
                False,
                False,
                "GUARANTEED_NO_EVICT",
                0,
            ],
        )
    )
    BOOK = dict(
        mem_bw=3700000000000.0,
        peak_flops=354000000000000.0,
        t_allreduce=3.28e-05,
        t_launch=0.00614,
        p_accept=0.538,
        moe_touch=0.0161,
        workspace_gib=1.28,
        rate_usd=5.6,
    )

    def physics(self, c):
        tp, ep, adp = c("tensor_parallel_size"), c("moe_expert_parallel_size"), c("enable_attention_dp") > 0
        nv4, frac = c.eq("quant_algo", "NVFP4"), c("kv_cache_config.free_gpu_memory_fraction")
        kv8, kv4 = c.eq("kv_cache_config.dtype", "fp8"), c.eq("kv_cache_config.dtype", "nvfp4")
        cut, trt, dg = (c.eq("moe_config.backend", b) for b in self.SPACE["moe_config.backend"])
        bs, mnt, pad = c("max_batch_size"), c("max_num_tokens"), c("cuda_graph_config.enable_padding") > 0
        noovl, maxu = (
            c("disable_overlap_scheduler") > 0,
            c.eq("scheduler_config.capacity_scheduler_policy", "MAX_UTILIZATION"),
        )
        k = c("speculative_config.max_draft_len")
        ranks = W(adp, tp, 1.0)
        wb = W(nv4, 0.58, 1.03)
        p = base(
            self.MODEL,
            B200,
            tp,
            wb,
            W(kv4, 0.56, W(kv8, 1.0, 2.0)),
            W(nv4, 9000e12 * 0.35, 4500e12 * 0.5),
            1.0,
            0.0,
            1.0,
            W(adp, tp, np.minimum(tp, 4)),
        )
        p.wgib = p.wgib + 8.0 * wb * adp
        act = 4.5 + mnt / 8192 * 2.5 + bs / 1024 * 9.0 + (k > 0) * 2.0
        room = B200.gib - p.wgib - act
        c.crash(
            ep > tp,
            "ValueError: moe_tp_size * moe_ep_size must equal to moe_tp_cluster_size * tp_size: moe_ep_size={e:.0f}, tp_size={t:.0f}",
            e=ep,
            t=tp,
        )
        c.crash(
            ~nv4 & (tp / ep > 4),
            "ValueError: The output_size of gate's and up's weight = {n:.0f} is not divisible by weight quantization "
            "block_n = 128.",
            n=1536 / (tp / ep),
        )
        c.crash(dg & nv4, "NotImplementedError: DeepGemmFusedMoE doesn't support quantization mode QuantMode.NVFP4")
        c.crash(
            bs * (k + 1) > mnt * W(adp, 2.0, 1.0),
            "ValueError: max_num_tokens ({m:.0f}) must be >= max_batch_size * (max_draft_len + 1) = {n:.0f}",
            m=mnt,
            n=bs * (k + 1),
        )
        c.crash(
            kv4 & ~nv4 & adp,
            "RuntimeError: [TensorRT-LLM][ERROR] Assertion failed: NVFP4 KV cache with attention DP requires NVFP4 attention output (fmhaRunner.cpp:141)",
        )
        c.crash(room < 8, TORCH_OOM, need=6.25, cap=B200.gib, free=np.maximum(room, 0.5) / 3)
        c.crash(
            trt & adp & (k > 2),
            "RuntimeError: [TensorRT-LLM][ERROR] CUDA error: an illegal memory access was encountered (trtllmGenFusedMoe, "
            "tile_tokens_dim=8)",
        )
        p.free = frac * np.maximum(room, 0.1)
        p.kvcap = p.free * GIB * W(adp, tp, np.minimum(tp, 4)) / (p.m.kv * W(kv4, 0.28, W(kv8, 0.5, 1.0)))
        # MoE back ends: TRTLLM-gen for small batches, CUTLASS for large; experts need expert parallelism under attention dp
        p.w1 = p.w1 * W(trt, 0.80, W(dg, 1.05, 1.15)) * W(tp / ep >= 4, 1.3, 1.0) * W(ep == 4, 1.08, 1.0)
        p.big, p.bhalf = W(trt, 0.75, W(dg, 0.3, 0.05)), W(trt, 160.0, 120.0)
        p.com0 = 0.0018 + p.com0 * W(adp, 1.3, 1.0) + 0.004 * (adp & (ep < 4))
        p.com1 = p.com1 * W(adp, W(ep == 4, 0.5, 2.2), 1.0)
        p.w0 = p.w0 * W(adp, 0.7 * ranks, 1.0)
        p.pre = p.pre * W(trt, 1.25, 1.0) * W(adp & (ep < 4), 1.4, 1.0)
        # cache: nvfp4 pages are expanded before they are read; fp8 wants the trtllm-gen kernels
        p.kvs = p.kvs * W(kv4, W(nv4, 2.4, 3.6), W(kv8, W(adp, 1.0, 1.15), 1.0)) * W(adp, 1.15, 1.0)
        # graphs: without padding only 1, 2, 4, 8, ... 128 are captured, all other sizes run eagerly
        p.h0 = 0.0022 + 0.0012 * (k > 0) + W(pad, 0.0, 0.0095) + 0.0015 * maxu
        p.h1 = 4e-6 + W(pad, 0.0, 4e-6)
        p.ovl = W(noovl, 0.0, W(k > 0, 0.35, 0.9)) * W(pad, 1.0, 0.6)
        p.mul = W(pad, 1.07, 1.0) * W(~noovl & maxu & (bs == 1024), 1.18, 1.0) * W(nv4 & (tp == 8) & ~adp, 1.15, 1.0)
        speculate(p, k, W(k > 2, 0.64, 0.70) - 0.10 * kv4, 0.0009 + 0.0005 * k, W(noovl, 3e-6, 9e-6))
        p.bcap, p.chunk, p.cho = bs * ranks * W(adp, 0.8, 1.0), mnt, 0.004
        p.over, p.pen = W(maxu, 1.0, 0.62), W(maxu, W(adp, 1.6, 0.45), 0.05)
        p.jit = 1.1 + 0.12 * (adp & ~maxu)
        p.launch = 150 + p.wgib * 1.4 + bs / 1024 * 60 * W(pad, 1.0, 0.4) + 25 * (k > 0)
        return p

    def book(self, c, load, k):
        tp, nv4 = c["tensor_parallel_size"], c["quant_algo"] == "NVFP4"
        wb, kvb = (0.56 if nv4 else 1.0), 192512 * {"auto": 1, "fp8": 0.5, "nvfp4": 0.28}[c["kv_cache_config.dtype"]]
        free = 178 - 235e9 * wb / tp / GIB - k.workspace_gib
        if free < 5 or c["moe_expert_parallel_size"] > tp:
            raise Infeasible("textbook: does not fit")
        n, bw, fl = c["speculative_config.max_draft_len"], k.mem_bw * tp, k.peak_flops * tp * (1.5 if nv4 else 1)
        host = (
            k.t_launch
            * (0.5 if c["cuda_graph_config.enable_padding"] else 2.0)
            * (1.2 if c["disable_overlap_scheduler"] else 0.7)
        )
        slots = min(c["max_batch_size"], free * c["kv_cache_config.free_gpu_memory_fraction"] * GIB * tp / kvb / 3700)
        return book(
            load,
            5000,
            700,
            gpus=tp,
            usd=k.rate_usd,
            w=9e9 * wb / bw,
            w1=226e9 * wb / bw,
            touch=k.moe_touch * (n + 1),
            f=44e9 * (n + 1) / fl,
            kv=kvb * 3700 / bw,
            com=188 * k.t_allreduce,
            host=host,
            pre=44e9 / fl,
            slots=slots,
            size=8192,
            per=expected(n, k.p_accept),
        )


# --------------------------------------------------------------------------------------------------------------- 3: LMDeploy, dense 32B, RAG
class LmdeployRag(World):
    NAME = "LMDeploy Qwen2.5-32B, 1-8 A100, RAG"
    MODEL = Model(32.8e9, 32.8e9, 32.8e9, 64, 5120, 64 * 2 * 8 * 128 * 2, 8, 1.0, 6000, 220, 2.0)
    LOADS = (0.15, 0.35, 0.75, 1.4, 2.25, 3.5, 5.0, 7.0)
    SLO = (10.0, 0.130)
    SPACE = {
        "--tp": [1, 2, 4, 8],
        "--backend": ["turbomind", "pytorch"],
        "--model-format": ["hf", "awq", "w8a8"],
        "--quant-policy": [0, 4, 8],
        "--cache-block-seq-len": [32, 64, 128],
        "--cache-max-entry-count": [0.5, 0.8, 0.92],
        "--max-batch-size": [16, 64, 256],
        "--max-prefill-token-num": [2048, 8192, 16384],
        "--enable-prefix-caching": [False, True],
        "--num-tokens-per-iter": [0, 1024, 4096],
        "--max-prefill-iters": [1, 8],
        "--communicator": ["nccl", "cuda-ipc"],
    }
    DEFAULT = dict(zip(SPACE, [2, "turbomind", "hf", 0, 64, 0.8, 64, 8192, False, 0, 1, "nccl"]))
    BOOK = dict(
        gb_per_s=1510.0,
        tflops=152.0,
        hop_us=14.5,
        cpu_ms=7.28,
        reuse=0.635,
        kv_gb_per_s=497.0,
        spare_gib=2.0,
        usd_hour=1.7,
    )

    def physics(self, c):
        tp, tm = c("--tp"), c.eq("--backend", "turbomind")
        pt = ~tm
        awq, w8, q4, q8 = (
            c.eq("--model-format", "awq"),
            c.eq("--model-format", "w8a8"),
            c("--quant-policy") == 4,
            c("--quant-policy") == 8,
        )
        blk, frac, bs = c("--cache-block-seq-len"), c("--cache-max-entry-count"), c("--max-batch-size")
        mpt, pc, tpi, iters = (
            c("--max-prefill-token-num"),
            c("--enable-prefix-caching") > 0,
            c("--num-tokens-per-iter"),
            c("--max-prefill-iters"),
        )
        ipc = c.eq("--communicator", "cuda-ipc") & tm & (tp > 1)
        wb = W(awq, 0.56, W(w8, 1.05, 2.0))
        act = 1.2 + mpt / 8192 * 1.9 / np.sqrt(tp) + ipc * mpt / 8192 * 1.3 + W(pt, 2.0, 0.5) + bs / 256 * 0.8
        p = base(self.MODEL, A100, tp, wb, W(q4, 0.56, W(q8, 1.03, 2.0)), W(w8, 624e12 * 0.8, 312e12), 1.0)
        c.crash(
            w8 & tm,
            "ValueError: unsupported model_format 'w8a8' for turbomind engine, expected one of ['hf', 'awq', 'gptq', 'compressed-tensors', "
            "'fp8', 'mxfp4']",
        )
        c.crash(
            tm & q4 & (blk < 64),
            "[TM][FATAL] cache_block_seq_len ({b:.0f}) must be a multiple of 64 with quant_policy=4",
            b=blk,
        )
        c.crash(
            pt & pc & q4, "RuntimeError: prefix caching: block trie with quant_policy=4: expected meta of 2 dims, got 1"
        )
        free = 0.97 * A100.gib - p.wgib - 0.6
        c.crash(free < 2, TORCH_OOM, need=0.26, cap=A100.gib, free=0.19)
        left = (1 - frac) * free - act
        c.crash(
            left < 0,
            "[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/core/allocator.cc:49 (cache {k:.2f} GiB, "
            "workspace {a:.2f} GiB, free {f:.2f} GiB)",
            k=frac * free,
            a=act,
            f=np.maximum(free * (1 - frac), 0.02),
        )
        p.free = frac * np.maximum(free, 0.1)
        p.kvcap = p.free * GIB * np.minimum(tp, 8) / (p.m.kv * W(q4, 0.28, W(q8, 0.52, 1.0)))
        # cache kernels: turbomind reads 4 and 8 bit well, triton expands them; small pages hurt turbomind, large ones pytorch
        p.kvs = (
            p.kvs
            * W(q4, W(tm, 1.5, 5.5), W(q8, W(tm, 1.05, 2.6), 1.0))
            * W(tm & (blk == 32), 1.7, 1.0)
            * W(pt & (blk == 128), 1.8, 1.0)
            * W(pt, 1.2, 1.0)
        )
        p.pre = p.pre * W(q4, 1.15, 1.0) * W(awq, W(tm, 1.12, 1.6), 1.0) * W(pt, 1.1, 1.0)
        p.fl, p.w0 = (
            p.fl * W(awq, W(tm, 1.6, 2.6), 1.0),
            p.w0 * W(awq, W(tm, 1.1, W(tp == 8, 2.2, 1.5)), 1.0) * W(w8, 1.15, 1.0),
        )
        p.com0 = p.com0 * W(ipc, 0.35, 1.25)
        p.com1 = p.com1 * W(ipc, W(tp == 8, 1.3, 0.8), 1.0)
        # splitting prompts: turbomind by num_tokens_per_iter, but no prompt into more than max_prefill_iters parts
        part = W(tm, W(tpi > 0, np.maximum(tpi, 6000 / iters), np.minimum(mpt, 1e4)), mpt)
        p.chunk, p.chunked = part, W(tm & (tpi == 0), 0.0, 1.0)
        p.cho = W(tm, 0.006, 0.014) + 0.004 * (pc & (blk == 32))
        p.pre0 = 0.004 + 0.012 * pt
        p.h0, p.h1, p.ovl = W(tm, 0.0025, 0.011), W(tm, 1.2e-5, 6e-5), W(tm, 0.2, 0.4)
        p.eager, p.bg = W(pt, 0.012, 0.0), W(pt, 128.0, 1e9)
        p.bcap, p.pen = bs, W(tm, 0.7, 0.35)
        p.hit = pc * prefix(p, 0.62, 2.2e5) * W(blk == 128, 0.80, 1.0) * W(tm & (tpi > 0) & (iters == 1), 0.7, 1.0)
        p.mul = (
            W(pc & tm & (q8 | q4) & (blk == 128), 1.5, 1.0)
            * W((bs == 256) & ipc, 1.6, 1.0)
            * W(pt & (mpt == 2048) & (iters > 1), 1.3, 1.0)
        )
        p.launch = 25 + p.wgib * 0.9 + 18 * pt + 8 * ipc
        return p

    def book(self, c, load, k):
        tp, f = c["--tp"], c["--model-format"]
        wb, kvb = {"hf": 2.0, "awq": 0.55, "w8a8": 1.0}[f], 262144 * {0: 1.0, 4: 0.3, 8: 0.55}[c["--quant-policy"]]
        free = 79 - 32.8e9 * wb / tp / GIB - k.spare_gib
        if free < 1.5 or (1 - c["--cache-max-entry-count"]) * free < k.spare_gib * c["--max-prefill-token-num"] / 8192:
            raise Infeasible(f"textbook: {free:.1f} GiB free")
        new, fl = (
            6000 * (1 - k.reuse * c["--enable-prefix-caching"]),
            k.tflops * 1e12 * tp * (1.6 if f == "w8a8" else 1),
        )
        slots = min(c["--max-batch-size"], free * c["--cache-max-entry-count"] * GIB * tp / kvb / 6130)
        return book(
            load,
            220,
            new,
            gpus=tp,
            usd=k.usd_hour,
            w=32.8e9 * wb / (k.gb_per_s * 1e9 * tp),
            f=65.6e9 / fl,
            kv=kvb * 6130 / (k.kv_gb_per_s * 1e9 * tp),
            com=(tp > 1) * 128 * k.hop_us * 1e-6,
            host=k.cpu_ms * 1e-3,
            pre=65.6e9 / fl,
            slots=slots,
            lf=2.0,
            size=c["--num-tokens-per-iter"] or c["--max-prefill-token-num"],
        )


# ------------------------------------------------------------------------------------------- 4: llama.cpp, small MoE, code completion on 4090s
class LlamaCppCode(World):
    NAME = "llama-server Qwen3-Coder-30B-A3B, 1-4 RTX 4090, code completion"
    MODEL = Model(30.5e9, 1.5e9, 3.3e9, 48, 2048, 48 * 2 * 4 * 128 * 2, 4, 8 / 128, 2400, 70, 2.0)
    LOADS = (0.15, 0.3, 0.6, 1.2, 2.0, 3.2, 4.8, 6.5)
    SLO = (3.0, 0.070)
    LUCK = 0.05
    SPACE = {
        "CUDA_VISIBLE_DEVICES": ["0", "0,1", "0,1,2,3"],
        "-m": ["Q4_K_M", "Q6_K", "Q8_0"],
        "-sm": ["layer", "row"],
        "-c": [32768, 65536, 131072],
        "-np": [2, 4, 8, 16],
        "-ub": [256, 512, 2048],
        "-ctk": ["f16", "q8_0", "q4_0"],
        "-fa": ["off", "on"],
        "--cache-reuse": [0, 256],
        "--draft-max": [0, 4, 16],
        "--kv-unified": [False, True],
        "--n-cpu-moe": [0, 16],
    }
    DEFAULT = dict(zip(SPACE, ["0,1", "Q4_K_M", "layer", 32768, 4, 512, "f16", "on", 0, 0, False, 0]))
    BOOK = dict(
        gb_s=1050.0, tflops=55.6, us_per_hop=100.0, ms_per_step=9.13, accept=0.581, gib_buffers=2.17, usd_card_hour=0.45
    )

    def physics(self, c):
        n, row, ctx, slots, ub = (
            c.pick("CUDA_VISIBLE_DEVICES", 1, 2, 4),
            c.eq("-sm", "row") & ~c.eq("CUDA_VISIBLE_DEVICES", "0"),
            c("-c"),
            c("-np"),
            c("-ub"),
        )
        q6, q8w = c.eq("-m", "Q6_K"), c.eq("-m", "Q8_0")
        k8, k4 = c.eq("-ctk", "q8_0"), c.eq("-ctk", "q4_0")
        fa, reuse, dmax, uni, cpu = (
            c.eq("-fa", "on"),
            c("--cache-reuse") > 0,
            c("--draft-max"),
            c("--kv-unified") > 0,
            c("--n-cpu-moe") > 0,
        )
        wb, kvb = c.pick("-m", 0.61, 0.82, 1.06), c.pick("-ctk", 2.0, 1.53, 1.28)
        m, g = self.MODEL, R4090
        ways = W(row, n, 1.0)
        p = base(m, g, ways, wb, kvb, 165e12 * 0.42, 1.0)
        p.gpus, p.pp = n, W(row, 1.0, n)
        wg = m.P * W(cpu, 0.70, 1.0) * wb / n / GIB
        kvg = ctx * m.kv * kvb / 2 / n / GIB
        buf = (0.6 + ub / 512 * 0.35 + W(fa, 0.0, ub * W(uni, ctx, ctx / slots) * 32 * 4 / n / GIB)) * W(
            row, 1.3, 1.0
        ) + 1.1 * (dmax > 0) / n
        left = g.gib - 0.6 - wg - kvg - buf
        c.crash(
            wg > g.gib - 0.6,
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating {a:.2f} MiB on device 0: cudaMalloc failed: out of memory "
            "({b:.2f} GiB of 23.64 GiB)\nllama_model_load: error loading model: unable to allocate CUDA0 buffer",
            a=wg * 1024,
            b=wg,
        )
        c.crash(
            left < 0,
            "ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size {b:.0f} (KV {k:.2f} GiB, weights {w:.2f} GiB, compute "
            "{u:.2f} GiB of 23.64 GiB)",
            b=buf * GIB,
            k=kvg,
            w=wg,
            u=buf,
        )
        c.crash(
            ~uni & (ctx / slots < 4096),
            "srv send_error: the request exceeds the available context size, try increasing it (n_prompt_tokens = "
            "4817, n_ctx = {n:.0f})",
            n=ctx / slots,
        )
        p.kvcap = ctx * W(uni, 1.0, 0.97)
        # row split sends activations over PCIe in each layer, layer split is a pipeline that only large batches fill
        p.com0 = W(row, m.layers * 4 * g.lat * n**0.5, (n - 1) * 0.0004)
        p.com1, p.pre = W(row, 2e-5 * n, 0.0), p.pre * W(row, 0.5 + 0.5 * n, 1.0) * 1.1
        p.w1, p.w0 = p.w1 * 1.7 * W(q6, 1.12, 1.0), p.w0 * 1.3 * W(q6, 1.12, 1.0)
        # experts in host memory: decode reads them over DDR5, prompts copy them for each micro batch
        p.w0 = p.w0 + cpu * 0.006 * wb
        p.w1 = p.w1 + cpu * 0.10 * wb
        p.pre = p.pre * W(ub == 256, 1.6, W(ub == 512, 1.22, 1.0)) + cpu * wb * 0.14 / ub
        p.pre = (
            p.pre
            * W(fa, 1.0, 1.35)
            * W(q6, 1.15, W(q8w, 0.92, 1.0))
            * W(uni, 1 + 0.035 * slots, 1.0)
            * W(k4 & (ub == 2048), 1.2, 1.0)
        )
        # attention: quantised caches leave the tensor cores from 8 slots on; a unified cache is masked over all slots
        p.kvs = (
            p.kvs
            * 1.6
            * W(fa, 1.0, 2.2)
            * W(k4, W(slots >= 8, 5.0, 2.2), W(k8, W(slots >= 8, 2.6, 1.3), 1.0))
            * W(uni, 1 + 0.10 * slots, 1.0)
        )
        p.h0, p.h1 = 0.0018 + 0.0008 * (n > 1) + 0.0022 * (row) + W(fa, 0.0, 0.0012), 3.5e-4
        speculate(
            p,
            W(dmax > 4, 7.0, dmax),
            W(dmax > 4, 0.70, 0.78),
            0.0009 * W(dmax > 4, 9.0, dmax),
            0.0007 * W(dmax > 4, 9.0, dmax),
        )
        p.touch = m.touch * W(dmax > 0, 0.7, 1.0)
        p.bcap, p.chunk, p.cho, p.net = slots, np.minimum(2048.0, ub * 1.0), 0.004, 0.03
        p.hit = (
            W(reuse, W(k4, 0.42, 0.66), 0.38)
            * W(uni, W(reuse, 0.8, 1.12), 1.0)
            * (1 - np.exp(-ctx / 26000))
            * W(slots == 2, 0.75, 1.0)
        )
        p.chunked = np.ones(c.n)
        p.mul, p.pen = (
            W(row & (dmax > 4), 1.6, 1.0)
            * W(reuse & uni & (slots > 4), 1.35, 1.0)
            * W(fa & (ub == 256) & ~k8, 1.25, 1.0),
            W(uni, 0.5, 0.1),
        )
        p.launch = 6 + wg * n * 0.45 + 3 * (dmax > 0)
        return p

    def book(self, c, load, k):
        n, q = c["CUDA_VISIBLE_DEVICES"].count(",") + 1, {"Q4_K_M": 0.6, "Q6_K": 0.82, "Q8_0": 1.06}[c["-m"]]
        kvb = 98304 * {"f16": 1.0, "q8_0": 0.77, "q4_0": 0.64}[c["-ctk"]]
        w = 30.5e9 * q * (0.7 if c["--n-cpu-moe"] else 1)
        if w + c["-c"] * kvb + k.gib_buffers * GIB * n > 23.6 * GIB * n:
            raise Infeasible("textbook: not enough VRAM")
        d, bw, fl = min(c["--draft-max"], 7), k.gb_s * 1e9, k.tflops * 1e12
        row = c["-sm"] == "row" and n > 1
        slow = 4 if c["--n-cpu-moe"] else 1
        return book(
            load,
            70,
            1500,
            gpus=n,
            usd=k.usd_card_hour,
            w=1.8e9 * q / bw,
            w1=29e9 * slow * q / bw,
            touch=0.06 * (d + 1) ** 0.7,
            size=c["-ub"],
            f=6.6e9 * (d + 1) / fl,
            kv=kvb * 2440 / bw + 0.0004 * d,
            com=row * 96 * k.us_per_hop * 1e-6,
            host=(k.ms_per_step + 0.9 * min(d, 8)) * 1e-3,
            pre=6.6e9 / fl / (1 if row else n),
            slots=c["-np"],
            per=expected(d, k.accept),
        )


# --------------------------------------------------------------------------------------------- 5: an in-house wrapper, dense 24B, mixed chat and RAG
class HouseMixed(World):
    NAME = "in-house `kestrel up` Mistral-Small-24B, 1-8 L40S, mixed chat and RAG"
    MODEL = Model(23.6e9, 23.6e9, 23.6e9, 40, 5120, 40 * 2 * 8 * 128 * 2, 8, 1.0, 2200, 280, 3.0)
    LOADS = (0.25, 0.5, 1.0, 1.75, 2.75, 4.0, 5.5, 7.5, 10.0)
    SLO = (4.0, 0.105)
    SPACE = {
        "shards": [1, 2, 4],
        "copies": [1, 2, 4],
        "numerics": ["bf16", "w8a8", "w4a16"],
        "cache_bits": [8, 16],
        "page_tokens": [16, 128],
        "lanes": [32, 96, 256],
        "tick_tokens": [512, 2048, 8192],
        "vram_share": [0.82, 0.93],
        "lookahead": [0, 2, 5],
        "guess_from": ["prompt", "tiny"],
        "admit": ["fifo", "short_first", "cache_first"],
        "remember": [False, True],
        "router": ["spread", "sticky"],
    }
    DEFAULT = dict(zip(SPACE, [2, 1, "bf16", 16, 16, 96, 2048, 0.82, 0, "prompt", "fifo", False, "spread"]))
    BOOK = dict(
        mem_gb_s=1090.0,
        math_tflops=97.3,
        pcie_us=15.5,
        loop_ms=14.3,
        luck_of_guess=0.233,
        reuse=0.49,
        cache_eff=0.523,
        fixed_gib=7.03,
        usd=0.95,
    )

    def physics(self, c):
        tp, rep, bits8, p128 = c("shards"), c("copies"), c("cache_bits") == 8, c("page_tokens") > 16
        w8, w4, lanes, tick, share = (
            c.eq("numerics", "w8a8"),
            c.eq("numerics", "w4a16"),
            c("lanes"),
            c("tick_tokens"),
            c("vram_share"),
        )
        k, tiny = c("lookahead"), c.eq("guess_from", "tiny")
        short, cfirst, mem, sticky = (
            c.eq("admit", "short_first"),
            c.eq("admit", "cache_first"),
            c("remember") > 0,
            c.eq("router", "sticky"),
        )
        multi = rep > 1
        wb = W(w8, 1.04, W(w4, 0.57, 2.0))
        act = 1.3 + tick / 8192 * 3.2 / tp + lanes / 256 * 1.2 + 1.6 * (tiny & (k > 0)) + 0.8 * mem
        p = base(self.MODEL, L40S, tp, wb, W(bits8, 1.0, 2.0), W(w8, 733e12 * 0.62, 362e12 * 0.7), share, act)
        p.rep, p.gpus = rep, tp * rep
        c.crash(
            tp * rep > 8,
            "kestrel: placement failed: {s:.0f} shards x {r:.0f} copies need {n:.0f} cards, host has 8",
            s=tp,
            r=rep,
            n=tp * rep,
        )
        c.crash(
            p.wgib > share * L40S.gib - 0.8,
            "kestrel[worker 0]: OutOfMemoryError: loading checkpoint shard: {w:.2f} GiB of weights, budget {b:.2f} GiB "
            "(44.40 GiB x vram_share)",
            w=p.wgib,
            b=share * L40S.gib,
        )
        c.crash(
            p.free < 1.2,
            "kestrel[worker 0]: page pool would be {f:.2f} GiB after weights and tick workspace, need 1.20 GiB",
            f=np.maximum(p.free, 0.0),
        )
        c.crash(
            lanes * (k + 1) > 2 * tick,
            "kestrel: tick_tokens={t:.0f} cannot hold {l:.0f} lanes x {q:.0f} guessed tokens",
            t=tick,
            l=lanes,
            q=k + 1,
        )
        c.crash(
            p128 & bits8 & tiny & (k == 5),
            "kestrel[worker 0]: RuntimeError: verify kernel: 128-token pages with e4m3 cache support at most 4 queries, got 6",
        )
        c.crash(
            (share > 0.9) & (tick == 8192) & ~w8 & (lanes == 256),
            "kestrel[worker 1]: OutOfMemoryError: Tried to allocate 2.50 GiB, 1.91 GiB free of 44.40 GiB",
        )
        # wires: four shards cross the socket
        p.com0, p.com1 = p.com0 * W(tp == 4, 1.9, 1.0), p.com1 * W(tp == 4, 1.35, 0.6)
        p.pre = 2 * p.m.act / (tp * W(w8, 733e12 * 0.62, 362e12 * 0.7) * 0.6) * W(w4, 1.45, 1.0) + 0.5 * p.com1
        p.fl = p.fl * W(w4, 2.2, 1.0)
        p.w0 = p.w0 * W(w8 & (tp == 4), 1.3, 1.0) * W(w4, 1.15, 1.0)
        # pages: large ones read fast at 16 bit, and at 8 bit miss the vector path
        p.kvs = p.kvs * W(p128, W(bits8, 3.4, 0.85), W(bits8, 1.15, 1.2))
        best = W(cfirst, 0.62, 0.50) * W(p128, 0.72, 1.0)
        best = best * W(multi, W(sticky, 0.95, W(rep == 4, 0.45, 0.65)), 1.0)
        p.bcap = lanes
        p.hit = mem * prefix(p, best, 1.3e5)
        # guesses: from the prompt they follow the retrieved text, and its index lives in the remembered pages
        acc = W(tiny, W(k > 2, 0.58, 0.64), W(mem, 0.60, 0.30)) - 0.08 * (bits8 & tiny)
        speculate(p, k, acc, W(tiny, 0.0022 * k + 0.001, 0.0012), W(tiny, 1.2e-5, 6e-5))
        p.h0, p.h1, p.ovl = (
            0.004 + 0.002 * (lanes == 256) + 0.0015 * mem,
            2.5e-5 + 3e-5 * cfirst,
            W((k > 0) & ~tiny, 0.0, 0.5),
        )
        p.chunk, p.cho = tick, 0.010 + 0.004 * w4
        p.mul = (
            W((tick == 512) & (k > 0), 1.5, 1.0)
            * W(short & mem, 1.25, 1.0)
            * W(sticky & cfirst & ~mem, 1.3, 1.0)
            * W(w4 & (lanes == 256), 1.4, 1.0)
            * W(w8 & bits8 & ~p128, 0.9, 1.0)
        )
        p.imb = W(multi, W(sticky, W(mem, 1.12, 1.25), 1.04), 1.0)
        p.wmul = W(short, 2.6, W(cfirst, W(mem, 1.3, 1.8), 1.0))
        p.jit = 1.1 + 0.08 * sticky * multi
        p.pen = W(lanes == 256, 1.2, 0.3)
        p.launch = 40 + p.wgib * 1.3 * rep**0.5 + 15 * (tiny & (k > 0))
        return p

    def book(self, c, load, k):
        tp, rep, q = c["shards"], c["copies"], c["numerics"]
        wb, kvb = {"bf16": 2.0, "w8a8": 1.0, "w4a16": 0.55}[q], 163840 * c["cache_bits"] / 16
        free = c["vram_share"] * 44.4 - 23.6e9 * wb / tp / GIB - k.fixed_gib
        if free < 1 or tp * rep > 8:
            raise Infeasible("textbook: does not fit")
        n, bw, fl = c["lookahead"], k.mem_gb_s * 1e9 * tp, k.math_tflops * 1e12 * tp * (1.6 if q == "w8a8" else 1)
        new = 2200 * (1 - k.reuse * c["remember"])
        return book(
            load,
            280,
            new,
            gpus=tp * rep,
            usd=k.usd,
            rep=rep,
            w=23.6e9 * wb / bw,
            f=47.2e9 * (n + 1) / fl,
            kv=kvb * 2368 / bw / k.cache_eff,
            com=(tp > 1) * 80 * k.pcie_us * 1e-6,
            host=k.loop_ms * 1e-3,
            pre=47.2e9 / fl,
            slots=min(c["lanes"], free * GIB * tp / kvb / 2368),
            per=expected(n, k.luck_of_guess),
            lf=3.0,
            size=c["tick_tokens"],
        )


WORLDS = (VllmChat, SglangAgents, TrtllmReasoning, LmdeployRag, LlamaCppCode, HouseMixed)


def scenario(i):
    return WORLDS[i](i)


# ------------------------------------------------------------------------------------------------------------------------------- self-check
def front(cost, lat):
    o = np.lexsort((lat, cost))
    least = np.minimum.accumulate(lat[o])
    return o[np.r_[True, lat[o][1:] < least[:-1]]]


def hypervolume(cost, lat, ref):
    """In log space, below ref = (log cost, log latency)."""
    if not len(cost):
        return 0.0
    f = front(cost, lat)
    x, y = np.log(cost[f]), np.log(lat[f])
    k = (x < ref[0]) & (y < ref[1])
    x, y = x[k], y[k]
    return float(np.sum((np.r_[x[1:], ref[0]] - x) * (ref[1] - y))) if len(x) else 0.0


def ranks(x):
    return np.argsort(np.argsort(x)).astype(float)
