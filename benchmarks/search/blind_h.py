# ruff: noqa: E501, B905, E721, E731, UP031
"""Six worlds of LLM serving on vLLM, SGLang, TensorRT-LLM, LMDeploy, TGI and llama.cpp, under the names of their own options.

``scenario(i).measure(config, load, i, rng)``: ``load`` is a number of requests per second (``LOADS`` are such numbers).
"""

import math

import numpy as np

from tuner import Infeasible

GIB = 2.0**30
HORIZON = 300.0  # seconds of one benchmark, which bounds how far an overloaded queue grows
MASK = (1 << 64) - 1


def _mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _unit(*key):
    x = 0
    for k in key:
        x = _mix(x ^ (int(k) & MASK))
    return ((x >> 11) + 0.5) / 2.0**53


def _normal(*key):
    return math.sqrt(-2 * math.log(_unit(*key, 1))) * math.cos(2 * math.pi * _unit(*key, 2))


class G:
    """Columns of one or of all configurations."""

    def __init__(self, space, codes):
        self.space, self.codes = space, codes

    def n(self, name, table=None):
        v = self.space[name]
        t = np.array([float(x if table is None else table[x]) for x in v])
        return t[self.codes[name]]

    def eq(self, name, *values):
        t = np.array([any(x is w or (type(x) == type(w) and x == w) for w in values) for x in self.space[name]])
        return t[self.codes[name]]


class W:
    """What a world says of its configurations; the rest are these."""

    R = 1.0
    imb = 0.0
    tb = 0.0
    twe = None
    esp = 0.0
    tc0 = 0.0
    tc1 = 0.0
    gmax = 1e9
    te = 0.0
    pen = 0.4
    q = 1.0
    a = 1.0
    mix = False
    po = 0.003
    cvp = 1.2
    tailp = 2.5
    tl = 1.08
    dl = 1.0
    wq = 1.0
    ttft0 = 0.03
    hold = 0.0

    def __init__(self):
        self.fails = []

    def fail(self, mask, text, **kw):
        self.fails.append((mask, text, kw))


def geo(alpha, k):
    return (1 - alpha ** (k + 1)) / (1 - alpha)


def core(w, lam):
    """ttft_p99, tpot_p99, delivered tokens per second at `lam` requests per second."""
    lr = lam / w.R * (1 + w.imb)
    L, P = w.L, w.P
    bm = np.maximum(np.minimum(w.maxb, w.bkv), 1.0)

    def step(b):
        x = b * w.q
        m = w.tw + b * w.tkv
        if w.twe is not None:
            m = m + w.twe * (1 - np.exp(x * np.log1p(-w.esp)))
        t = np.hypot(m, x * w.tf) + w.t0 + w.tb * b + w.tc0 + x * w.tc1 + np.where(x > w.gmax, w.te, 0.0)
        z = np.clip((b / w.bkv - 0.75) / 0.25, 0, 1)
        return t * (1 + w.pen * z * z)

    sp = P / w.prate + w.po * np.ceil(P / w.chunk)
    tm = step(bm)
    mu = bm / (L * tm / w.a + bm * sp)
    share = np.minimum(lr * sp, 0.93)
    k = lr * L / w.a / (1 - share)
    lo, hi = np.zeros_like(tm), bm * np.ones_like(tm)
    for _ in range(20):
        b = 0.5 * (lo + hi)
        up = k * step(b) > b
        lo, hi = np.where(up, b, lo), np.where(up, hi, b)
    b = 0.5 * (lo + hi)
    t = step(b)
    t99 = step(np.minimum(bm, b + 1.6 * np.sqrt(b)))
    tpot = t / w.a / (1 - share)
    n = lr * L * tpot
    p99 = t99 / w.a / (1 - share) + 2.33 * np.sqrt(n) * sp * w.cvp / L
    cap = (t99 + w.chunk / w.prate + w.po) / w.a
    p99 = np.where(w.mix, np.minimum(p99, np.maximum(cap, t99 / w.a)), p99) * w.tl
    ce = np.maximum(w.chunk - b * w.q, 64.0)
    spre = np.where(w.mix, P * (t + ce / w.prate + w.po) / ce, sp)
    mu = np.minimum(mu, 1 / spre)
    r = np.minimum(lr * spre, 0.96)
    wait = spre * (1 + w.cvp**2) / 2 * r / (1 - r) * np.maximum(0, np.log(100 * r))
    rho = lr / mu
    rs = np.minimum(rho, 0.97)
    pw = rs ** np.sqrt(2 * (bm + 1))
    slot = np.maximum(0, np.log(100 * pw)) * L * tpot / (bm * (1 - rs))
    over = HORIZON * np.maximum(0, 1 - 1 / np.maximum(rho, 1e-9))
    ttft = w.ttft0 + w.tailp * spre + t * (1 + w.hold) + (wait + slot + over) * w.wq
    return ttft, p99, np.minimum(lam, w.R * mu / (1 + w.imb)) * L * w.dl


def _tb(lr, L, P, base, slope, a, prate, bm, tail, burst, first):
    """Somebody's textbook: a batch in balance, a share of time for prompts, no quirks."""
    sp = P / prate
    share = lr * sp
    if share > 0.93:
        share = 0.93
    k = lr * L / (a * (1 - share))
    d = 1 - k * slope
    b = k * base / d if d > 0 else bm
    if b > bm:
        b = bm
    mu = bm / (L * (base + slope * bm) / a + bm * sp)
    tpot = (base + slope * b) / (a * (1 - share)) * tail
    tpot += burst * math.sqrt(lr * L * tpot) * sp / L
    ttft = first + 2.5 * sp / (1 - share)
    if lr > 0.95 * mu:
        ttft += 300 * (1 - 0.95 * mu / lr)
    return ttft, tpot, min(lr, mu)


class Scenario:
    sd_luck = 0.04
    sd_noise = 0.05
    consts = {}
    acceptance = ()

    def __init__(self):
        self._space = self.make_space()
        self._names = list(self._space)
        self._shape = tuple(len(v) for v in self._space.values())
        self._pos = {n: {(type(x), x): k for k, x in enumerate(v)} for n, v in self._space.items()}
        self._truth = None

    def space(self, i=None):
        return {n: list(v) for n, v in self._space.items()}

    def default(self, i=None):
        return dict(self.DEFAULT)

    def slos(self, i=None):
        return {"ttft_p99_s": self.SLO[0], "tpot_p99_s": self.SLO[1]}

    def _code(self, name, x):
        p = self._pos[name].get((type(x), x))
        if p is None:
            if isinstance(x, np.generic):
                x = x.item()
            p = next((k for k, y in enumerate(self._space[name]) if y == x), None)
            if p is None:
                raise ValueError("%r is no value of %s" % (x, name))
        return p

    def codes_of(self, config):
        return [self._code(n, config[n]) for n in self._names]

    def grid_index(self, config, i=None):
        return int(np.ravel_multi_index(self.codes_of(config), self._shape))

    def config_at(self, row):
        c = np.unravel_index(row, self._shape)
        return {n: self._space[n][int(k)] for n, k in zip(self._names, c)}

    def _one(self, config):
        return self.world(G(self._space, {n: np.array([k]) for n, k in zip(self._names, self.codes_of(config))}))

    def _price(self, w):
        return self.PRICE * w.gpus

    def luck(self, row):
        return math.exp(self.sd_luck * max(-2.5, min(2.5, _normal(self.number, row, 77))))

    def measure(self, config, load, i=None, rng=None):
        rng = np.random.default_rng() if rng is None else rng
        with np.errstate(all="ignore"):
            w = self._one(config)
            for mask, text, kw in w.fails:
                if bool(np.ravel(mask)[0]):
                    raise Infeasible(text.format(**{k: float(np.ravel(v)[0]) for k, v in kw.items()}))
            ttft, tpot, tok = (float(np.ravel(v)[0]) for v in core(w, float(load)))
        luck = self.luck(self.grid_index(config))
        e = rng.standard_normal(3)
        asked = float(load) * float(np.ravel(w.L * w.dl)[0])
        tok = min(asked, tok / luck) if tok < 0.999 * asked else tok  # only a full server delivers by its luck
        price = float(np.ravel(self._price(w))[0])
        cost = price / (tok * 3600) * 1e6 * math.exp(0.01 * e[2])
        return {
            "ttft_p99_s": ttft * luck * math.exp(self.sd_noise * e[0]),
            "tpot_p99_s": tpot * luck * math.exp(self.sd_noise * e[1]),
            "cost_usd_per_mtok_output": cost,
            "output_tok_s": price / 3600 * 1e6 / cost,
        }

    def launch_s(self, config, i=None):
        with np.errstate(all="ignore"):
            w = self._one(config)
        t = float(np.ravel(w.launch)[0])
        return t * (0.9 + 0.2 * _unit(self.number, self.grid_index(config), 5))

    def _grid(self):
        c = np.indices(self._shape, dtype=np.int16).reshape(len(self._shape), -1)
        return G(self._space, dict(zip(self._names, c)))

    def full_truth(self):
        if self._truth is None:
            with np.errstate(all="ignore"):
                w = self.world(self._grid())
                n = int(np.prod(self._shape))
                bad = np.zeros(n, bool)
                for mask, _, _ in w.fails:
                    bad |= mask
                ttft, tpot, cost = (np.full((n, len(self.LOADS)), np.nan) for _ in range(3))
                price = self._price(w)
                for j, lam in enumerate(self.LOADS):
                    a, b, tok = core(w, lam)
                    ttft[:, j], tpot[:, j], cost[:, j] = a, b, price / (tok * 3600) * 1e6
            ttft[bad] = tpot[bad] = cost[bad] = np.nan
            with np.errstate(all="ignore"):
                ok = ~bad[:, None] & (ttft <= self.SLO[0]) & (tpot <= self.SLO[1])
            self._truth = (~bad, cost, tpot, ok, ttft)
        return self._truth

    def truth_grid(self, i=None):
        return tuple(x.copy() for x in self.full_truth()[:4])

    # ---- somebody's model
    def predictor(self, i=None, kind="30%", seed=0):
        rng = np.random.default_rng([self.number, {"30%": 1, "badly": 2, "right": 3}[kind], int(seed)])
        c = {}
        for name, v in self.consts.items():
            up = bool(rng.integers(2))
            if kind == "30%":
                v = v * (1.3 if up else 0.7)
            elif kind == "badly":
                v = v * 0.5 if name in self.acceptance else v * (1.6 if up else 1 / 1.6)
            c[name] = v
        off = None
        if kind == "badly":
            off = {
                n: {x: (math.exp(0.35 * rng.standard_normal()), math.exp(0.35 * rng.standard_normal())) for x in v}
                for n, v in self._space.items()
            }

        def done(config, ttft, tpot, usd_h, tok):
            cost = usd_h / (tok * 3600) * 1e6
            if off is not None:
                f = g = 1.0
                for n, x in config.items():
                    u, v = off[n][x]
                    f *= u
                    g *= v
                ttft *= f
                tpot *= f
                cost *= g
            return {"ttft_p99_s": ttft, "tpot_p99_s": tpot, "cost_usd_per_mtok_output": cost}

        return self.textbook(c, done)


def _acc(x):
    return 0.02 if x < 0.02 else 0.95 if x > 0.95 else x


# --------------------------------------------------------------------------------------------------------------
class VllmChat(Scenario):
    """vLLM, Llama-3.3-70B, 2 to 16 H100 80GB, multi-turn chat."""

    number, title = 0, "vLLM, Llama-3.3-70B dense, 2-16 H100, chat"
    LOADS = (0.5, 1.0, 2.0, 3.5, 6.0, 9.0, 13.0, 18.0)
    SLO = (2.0, 0.050)
    PRICE = 2.6
    sd_luck, sd_noise = 0.04, 0.05
    DEFAULT = {
        "--tensor-parallel-size": 4,
        "--data-parallel-size": 1,
        "--quantization": "none",
        "--kv-cache-dtype": "auto",
        "--block-size": 16,
        "--gpu-memory-utilization": 0.9,
        "--max-num-seqs": 256,
        "--max-num-batched-tokens": 8192,
        "VLLM_ATTENTION_BACKEND": "FLASH_ATTN",
        "speculative_config.method": "none",
        "speculative_config.num_speculative_tokens": 2,
        "cudagraph_mode": "PIECEWISE",
        "--async-scheduling": False,
    }

    def make_space(self):
        return {
            "--tensor-parallel-size": [2, 4, 8],
            "--data-parallel-size": [1, 2],
            "--quantization": ["none", "fp8", "awq_marlin"],
            "--kv-cache-dtype": ["auto", "fp8_e4m3"],
            "--block-size": [16, 64],
            "--gpu-memory-utilization": [0.9, 0.95],
            "--max-num-seqs": [32, 256, 512],
            "--max-num-batched-tokens": [2048, 8192, 16384],
            "VLLM_ATTENTION_BACKEND": ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"],
            "speculative_config.method": ["none", "ngram", "eagle3"],
            "speculative_config.num_speculative_tokens": [2, 5],
            "cudagraph_mode": ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE"],
            "--async-scheduling": [False, True],
        }

    def world(self, g):
        w = W()
        tp, dp = g.n("--tensor-parallel-size"), g.n("--data-parallel-size")
        qz = lambda d: g.n("--quantization", d)
        fp8q, awq = g.eq("--quantization", "fp8"), g.eq("--quantization", "awq_marlin")
        kv8 = g.eq("--kv-cache-dtype", "fp8_e4m3")
        blk = g.n("--block-size")
        gmu, seqs, mbt = g.n("--gpu-memory-utilization"), g.n("--max-num-seqs"), g.n("--max-num-batched-tokens")
        A = "VLLM_ATTENTION_BACKEND"
        fa, fi, tr = g.eq(A, "FLASH_ATTN"), g.eq(A, "FLASHINFER"), g.eq(A, "TRITON_ATTN")
        ng, eg = g.eq("speculative_config.method", "ngram"), g.eq("speculative_config.method", "eagle3")
        k = np.where(ng | eg, g.n("speculative_config.num_speculative_tokens"), 0.0)
        none, full = g.eq("cudagraph_mode", "NONE"), g.eq("cudagraph_mode", "FULL_AND_PIECEWISE")
        asy = g.eq("--async-scheduling", True)
        w.gpus, w.R = tp * dp, dp
        w.imb = np.where(dp > 1, 0.07, 0.0)
        n, bw, fl = 70.6e9, 3.35e12 * 0.8, 989e12
        wb = n * qz({"none": 2.0, "fp8": 1.03, "awq_marlin": 0.57})
        # memory, GiB a GPU
        wg = wb / tp / GIB
        act = 1.4 + mbt * 2.6e-4
        draft = np.where(eg, 2.9 / tp + 0.6, 0.0)
        graph = np.where(none, 0.0, np.where(full, 1.6 + seqs / 512 * 1.8 + 0.25 * k, 0.9))
        kvg = gmu * 79.1 - wg - act - draft
        per_tok = 327680 * np.where(kv8, 0.5, 1.0) / tp
        cap = np.maximum(kvg, 0.01) * GIB / per_tok
        w.fail(
            asy & ng,
            "ValueError: Currently, async scheduling is only supported with EAGLE/MTP kind of speculative decoding",
        )
        w.fail(
            kv8 & tr & (blk == 16),
            "triton.compiler.errors.CompilationError: fp8e4nv KV cache requires a tile of at "
            "least 32 tokens (got block_size=16)",
        )
        w.fail(
            wg > gmu * 79.1 - 0.5,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 448.00 MiB. GPU 0 has "
            "a total capacity of 79.10 GiB of which 212.00 MiB is free. Weights need {x:.2f} GiB",
            x=wg,
        )
        w.fail(
            kvg <= 0.2,
            "ValueError: No available memory for the cache blocks ({x:.2f} GiB). Try increasing "
            "`gpu_memory_utilization` when initializing the engine",
            x=kvg,
        )
        w.fail(
            cap < 16384,
            "ValueError: To serve at least one request with the model's max seq len (16384), {x:.2f} GiB KV "
            "cache is needed, which is larger than the available KV cache memory ({y:.2f} GiB)",
            x=16384 * per_tok / GIB,
            y=kvg,
        )
        w.fail(
            gmu * 79.1 + graph + 1.3 > 79.1,
            "torch.OutOfMemoryError: CUDA out of memory during CUDA graph capture. "
            "{x:.2f} GiB needed, {y:.2f} GiB is free",
            x=graph + 1.3,
            y=79.1 * (1 - gmu),
        )
        w.fail(
            seqs * (k + 1) > mbt,
            "ValueError: max_num_batched_tokens ({x:.0f}) is smaller than max_num_seqs * "
            "(num_speculative_tokens + 1) ({y:.0f})",
            x=mbt,
            y=seqs * (k + 1),
        )
        # attention: bytes read, and how well each kernel reads them
        af = np.where(
            fa,
            np.where(kv8, 1.25, 1.0),
            np.where(
                fi,
                np.where(kv8, np.where(blk == 64, 0.85, 1.6), np.where(blk == 64, 0.92, 1.1)),
                np.where(blk == 64, 1.15, 1.6),
            ),
        )
        af = af * np.where(fi & (k > 0) & (blk == 64), 1.5, 1.0)  # verification leaves the decode kernel
        ctx = 2525.0
        w.L = 250.0
        w.tkv = ctx * 327680 * np.where(kv8, 0.5, 1.0) / tp / bw * af * 1.3
        w.tw = wb / tp / bw * np.where(awq, 1.15, 1.0) * np.where(fp8q & none, 1.22, 1.0)
        w.tf = 2 * n / (tp * fl * 0.55) * qz({"none": 1.0, "fp8": 0.6, "awq_marlin": 2.1})
        lat = g.n("--tensor-parallel-size", {2: 8e-6, 4: 11e-6, 8: 17e-6})
        w.tc0 = 160 * lat * np.where(full, 0.6, np.where(none, 1.7, 1.0))
        w.tc1 = 160 * 8192 * 2 * 2 * (tp - 1) / tp / 300e9
        cpu = np.where(asy, np.where(none, 2.0e-3, 0.7e-3), 4.0e-3)
        cpu = cpu + np.where(fi & ~full, 2.2e-3, 0.0)  # the plan() of each step
        eager = np.where(none, 9e-3, 0.0)
        # full graphs: FA3 has none for fp8 caches; more than 512 tokens are not captured
        lost = full & ((fa & kv8) | (tr & (k > 0)))
        eager = eager + np.where(lost, 5e-3, 0.0)
        cpu = cpu - np.where(full & ~lost, 1.6e-3, 0.0)
        cpu = np.maximum(cpu, 0.5e-3)
        dr = np.where(
            eg,
            k * (np.where(full, 0.5e-3, np.where(none, 2.2e-3, 1.5e-3)) + 1.2e-3 / tp + (tp == 8) * 5e-4),
            np.where(ng, 0.6e-3, 0.0),
        )
        w.t0 = cpu + eager + dr
        w.tb = np.where(asy, 8e-6, 2.4e-5) + np.where(ng, 5e-5, 0.0)
        w.gmax = np.where(none, 1e9, 512.0)
        w.te = 9e-3
        al = np.where(eg, np.where(awq, 0.56, 0.72) - np.where(kv8 & fa, 0.06, 0.0), np.where(ng, 0.22, 1e-6))
        w.q, w.a = k + 1, np.where(k > 0, geo(al, k), 1.0)
        w.tl = 1.08 + np.where(eg, 0.06, 0.0) + np.where(ng, 0.15, 0.0)
        hit = 0.64 * cap / (cap + 160e3) * np.where(blk == 64, 0.97, 1.0) * np.where(dp > 1, 0.72, 1.0)
        w.P = 2400 * (1 - hit)
        eff = g.n("--tensor-parallel-size", {2: 0.94, 4: 0.86, 8: 0.72})
        w.prate = (
            tp
            * fl
            * 0.5
            * eff
            / (2 * n)
            * qz({"none": 1.0, "fp8": 1.55, "awq_marlin": 0.6})
            * np.where(fa, 1.0, np.where(fi, 0.95, 0.78))
            * np.where(full & (dp > 1), 0.92, 1.0)
            * np.where((mbt == 2048) & (tp == 8), 0.8, 1.0)
        )
        w.chunk, w.mix, w.po = mbt, True, 0.003 + 0.6 * cpu + 0.5 * eager
        w.maxb, w.bkv = seqs, cap / ctx
        w.pen = np.where(eg, 0.5, 0.35)
        w.ttft0 = 0.05
        w.launch = (
            45
            + wb / GIB * 0.25
            + np.where(full, 75, np.where(none, 0, 40)) * (1 + seqs / 512)
            + 20 * eg
            + 12 * np.log2(tp)
            + np.where(fp8q, 15, 0)
        )
        return w

    consts = {
        "mem_efficiency": 0.95,
        "mfu": 0.487,
        "step_overhead_ms": 5.31,
        "allreduce_us": 1.19,
        "accept_eagle": 0.628,
        "accept_ngram": 0.0181,
        "reuse": 0.221,
        "burst": 7.67,
        "eager_ms": 15.5,
        "draft_ms": 0.643,
    }
    acceptance = ("accept_eagle", "accept_ngram")

    def textbook(self, K, done):
        wbytes = {"none": 2.0, "fp8": 1.0, "awq_marlin": 0.55}
        speed = {"none": 1.0, "fp8": 1.7, "awq_marlin": 0.8}
        price = self.PRICE

        # ignores block size, attention back end, batched tokens, async scheduling
        def predict(
            config,
            load,
            *,
            mem_efficiency=K["mem_efficiency"],
            mfu=K["mfu"],
            step_overhead_ms=K["step_overhead_ms"],
            allreduce_us=K["allreduce_us"],
            accept_eagle=K["accept_eagle"],
            accept_ngram=K["accept_ngram"],
            reuse=K["reuse"],
            burst=K["burst"],
            eager_ms=K["eager_ms"],
            draft_ms=K["draft_ms"],
        ):
            tp, dp, q = config["--tensor-parallel-size"], config["--data-parallel-size"], config["--quantization"]
            wb = 70.6e9 * wbytes[q]
            free = config["--gpu-memory-utilization"] * 84.9e9 - wb / tp - 3e9
            if free < 1e9:
                raise Infeasible("textbook: the weights do not fit")
            kvb = 327680 * (1.0 if config["--kv-cache-dtype"] == "auto" else 0.5) / tp
            m = config["speculative_config.method"]
            k = 0 if m == "none" else config["speculative_config.num_speculative_tokens"]
            al = _acc(accept_eagle if m == "eagle3" else accept_ngram)
            a = geo(al, k) if k else 1.0
            bw = 3.35e12 * mem_efficiency
            fl = 989e12 * mfu * tp * speed[q]
            base = (
                step_overhead_ms * 1e-3
                + wb / tp / bw
                + (draft_ms * 1e-3 * k if m == "eagle3" else 0.0)
                + (eager_ms * 1e-3 if config["cudagraph_mode"] == "NONE" else 0.0)
                + 160e-6 * allreduce_us * math.log2(tp)
            )
            slope = 2525 * kvb / bw + (k + 1) * 141.2e9 / fl
            bm = min(config["--max-num-seqs"], free / kvb / 2525)
            ttft, tpot, mu = _tb(
                load / dp, 250.0, 2400 * max(0.05, 1 - reuse), base, slope, a, fl / 141.2e9, bm, 1.1, burst, 0.06
            )
            return done(config, ttft, tpot, price * tp * dp, mu * dp * 250.0)

        return predict


# --------------------------------------------------------------------------------------------------------------
class SglangAgents(Scenario):
    """SGLang, DeepSeek-V3 (MLA, MoE 671B/37B), 4 to 16 H200, agents with long shared prefixes."""

    number, title = 1, "SGLang, DeepSeek-V3 MoE+MLA, 4-16 H200, agents"
    LOADS = (0.25, 0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 11.0)
    SLO = (4.0, 0.056)
    PRICE = 3.6
    sd_luck, sd_noise = 0.045, 0.055
    DEFAULT = {
        "--tp-size": 8,
        "--dp-size": 1,
        "--quantization": "fp8",
        "--moe-a2a-backend": "none",
        "--attention-backend": "flashinfer",
        "--page-size": 1,
        "--kv-cache-dtype": "auto",
        "--speculative-num-steps": 0,
        "--chunked-prefill-size": 8192,
        "--mem-fraction-static": 0.88,
        "--max-running-requests": 256,
        "--schedule-policy": "fcfs",
        "--disable-radix-cache": False,
    }

    def make_space(self):
        return {
            "--tp-size": [4, 8, 16],
            "--dp-size": [1, 4, 8],
            "--quantization": ["fp8", "w4afp8"],
            "--moe-a2a-backend": ["none", "deepep"],
            "--attention-backend": ["fa3", "flashinfer", "flashmla"],
            "--page-size": [1, 64],
            "--kv-cache-dtype": ["auto", "fp8_e4m3"],
            "--speculative-num-steps": [0, 1, 3],
            "--chunked-prefill-size": [2048, 8192, 16384],
            "--mem-fraction-static": [0.82, 0.88, 0.93],
            "--max-running-requests": [32, 256, 1024],
            "--schedule-policy": ["fcfs", "lpm"],
            "--disable-radix-cache": [False, True],
        }

    def world(self, g):
        w = W()
        tp, dp = g.n("--tp-size"), g.n("--dp-size")
        w4, dep = g.eq("--quantization", "w4afp8"), g.eq("--moe-a2a-backend", "deepep")
        A = "--attention-backend"
        fa, fi, fm = g.eq(A, "fa3"), g.eq(A, "flashinfer"), g.eq(A, "flashmla")
        page, kv8 = g.n("--page-size"), g.eq("--kv-cache-dtype", "fp8_e4m3")
        k, chunk = g.n("--speculative-num-steps"), g.n("--chunked-prefill-size")
        mf, seqs = g.n("--mem-fraction-static"), g.n("--max-running-requests")
        lpm, norad = g.eq("--schedule-policy", "lpm"), g.eq("--disable-radix-cache", True)
        w.gpus = tp
        bw, fl = 4.8e12 * 0.72, 989e12 * 1.9
        dense, exp = 17e9, 654e9  # bytes at fp8
        dpa = dp > 1
        wg = (
            exp * np.where(w4, 0.53, 1.0) / tp
            + dense / np.where(dpa, np.maximum(tp / dp, 1), tp) * np.where(dpa, 0.9, 1)
        ) / GIB
        wg = wg + np.where(k > 0, 12.5 * np.where(w4, 0.6, 1) * 8 / tp * 0.12 + 0.6, 0.0)
        kvg = mf * 139.8 - wg - np.where(dep, 4.5, 0.0)
        act = (
            3.2
            + chunk * 4.2e-4 * np.where(dpa, 1.25, 1.0)
            + np.where(k > 0, 1.2, 0.0)
            + np.minimum(seqs / dp, 160) * 0.012
        )
        tokb = 61 * 576 * np.where(kv8, 1.0, 2.0) * np.where(k > 0, 1 + 1 / 61, 1.0)
        cap1 = np.maximum(kvg, 0.01) * GIB / tokb  # tokens of one attention rank: replicated over tp
        cap = cap1 * dp * np.where(page == 64, 0.995, 1.0)
        page = np.where(fm, 64.0, page)  # a warning: FlashMLA changes the page size to 64
        w.fail(dp > tp, "AssertionError: tp_size ({x:.0f}) must be divisible by dp_size ({y:.0f})", x=tp, y=dp)
        w.fail(
            fm & kv8 & (k > 0), "NotImplementedError: FlashMLA target_verify does not support kv_cache_dtype fp8_e4m3"
        )
        w.fail(
            kvg < 0.8,
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Weights take {x:.2f}"
            " GiB, mem_fraction_static={y:.2f}",
            x=wg,
            y=mf,
        )
        w.fail(
            (1 - mf) * 139.8 < act + 1.0,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {x:.2f} GiB. "
            "GPU 0 has a total capacity of 139.80 GiB of which {y:.2f} GiB is free.",
            x=act,
            y=(1 - mf) * 139.8,
        )
        w.fail(
            cap < 40000,
            "ValueError: The memory capacity is unbalanced or too small: max_total_num_tokens={x:.0f}",
            x=cap,
        )
        w.L = 300.0
        ctx = 12150.0
        af = np.where(
            fa,
            np.where(kv8, 2.1, 1.0) * np.where(page == 64, 1.0, 1.12),
            np.where(
                fi,
                np.where(page == 64, 1.35, 1.05) * np.where(k >= 3, 1.7, 1.0) * np.where(kv8, 1.1, 1.0),
                0.8 * np.where(k > 0, 1.3, 1.0),
            ),
        )
        # the latent cache is on each tensor rank; with dp attention each rank has its share of the requests
        w.tkv = ctx * tokb / bw * af / np.where(dpa, dp, 1.0) * 2.2
        w.twe = (
            exp
            * np.where(w4, 0.53, 1.0)
            / tp
            / bw
            * np.where(dep, np.where(w4, 1.45, 0.92), 1.0)
            * np.where(w4, 1.12, 1.0)
        )
        w.esp = 8 / 256.0
        w.tw = dense / np.where(dpa, np.maximum(tp / dp, 1), tp) / bw
        w.tf = (
            2
            * 37e9
            / (tp * fl * 0.35)
            * np.where(w4, 1.6, 1.0)
            * np.where(dep & ~dpa, 1.6, 1.0)
            * np.where(dep & w4, 1.5, 1.0)
        )
        inter = tp == 16
        # all-reduce across two nodes hurts; deepep hides it with dp attention
        w.tc0 = np.where(
            dep,
            np.where(dpa, 2.6e-3, 4.2e-3) + inter * 0.8e-3,
            122 * np.where(inter, 55e-6, np.where(tp == 8, 17e-6, 12e-6)) + dpa * 2.2e-3 + dpa * inter * 3e-3,
        )
        w.tc1 = np.where(dep, 9e-6, np.where(inter, 28e-6, 11e-6)) * np.where(dep & dpa, 0.6, 1.0)
        w.tc1 = w.tc1 + np.where(dpa & ~dep, 6e-6, 0.0)  # gathers all the ranks' tokens
        sched = np.where(norad, 0.4e-3, 1.0e-3) + np.where(lpm & ~norad, np.where(seqs == 1024, 3.5e-3, 0.5e-3), 0.0)
        sched = sched + np.where((page == 1) & ~norad, 0.9e-3, 0.0)
        w.t0 = (
            3.2e-3
            + sched
            + k * np.where(dpa, 2.2e-3, 1.0e-3)
            + np.where(k > 0, 1.2e-3, 0.0)
            + np.where(fi & (k == 0), 0.8e-3, 0)
        )
        w.gmax, w.te = 160.0 * dp * (1 + k), 16e-3  # graphs up to 160 requests a rank
        al = 0.84 - np.where(w4, 0.09, 0.0) - np.where(kv8, 0.03, 0.0)
        kk = np.maximum(k, 1)
        dec = np.where(k >= 3, 0.94, 1.0)
        w.a = np.where(k > 0, geo(al * dec, kk), 1.0)
        w.q = k + 1
        w.tl = np.where(k > 0, 1.16, 1.07) + np.where(dpa, 0.04, 0.0)
        base = 0.80 * cap / (cap + 260e3)
        # one prefix tree a rank: requests of one agent go to any of them
        hit = base * np.where(dpa, np.where(dp == 8, 0.80, 0.88), 1.0)
        hit = hit + np.where(lpm, 0.30 * (1 - base) * np.where(seqs == 32, 1.15, np.where(seqs == 1024, 0.5, 1.0)), 0.0)
        hit = np.where(norad, 0.0, np.minimum(hit, 0.93) * np.where(page == 64, 0.985, 1.0))
        w.P = 12000 * (1 - hit)
        w.prate = (
            tp
            * fl
            * 0.26
            / (2 * 37e9)
            * np.where(tp == 16, np.where(dep, 0.85, 0.5), np.where(tp == 8, 0.85, 1.0))
            * np.where(dpa, 1.25, 1.0)
            * np.where(dep & dpa, 1.15, np.where(dep, 0.7, 1.0))
            * np.where(w4, np.where(dep, 0.5, 0.72), 1.0)
            * np.where(fm, 0.8, 1.0)
            * np.where(fi, 0.93, 1.0)
            * np.where(kv8 & fa, 0.8, 1.0)
            * np.where(chunk == 2048, 0.72, np.where(chunk == 16384, 1.06, 1.0))
        )
        w.chunk, w.mix = chunk / 1.0, False
        w.po = 0.022 + np.where(k > 0, 0.006, 0.0) + np.where(dpa, 0.012, 0.0)
        w.imb = np.where(dpa, 0.06 * np.log2(dp) / 2, 0.0)
        w.cvp = np.where(lpm & ~norad, 1.5, 1.25)
        w.wq = np.where(lpm & ~norad, 1.25, 1.0)  # those without a prefix starve
        w.maxb, w.bkv = seqs, cap / (0.25 * ctx + 0.75 * ctx * np.where(norad, 1.0, 0.45))
        w.pen = 0.45
        w.ttft0 = 0.12
        w.launch = 240 + wg * tp * 0.35 + 60 * dep + 45 * (k > 0) + np.where(inter, 90, 0) + 30 * dpa
        return w

    consts = {
        "hbm_share": 0.95,
        "mfu": 0.135,
        "fixed_ms": 9.36,
        "us_per_token": 10.3,
        "accept_mtp": 0.648,
        "prefix_share": 0.479,
        "stall": 6.64,
        "latent_factor": 2.17,
        "a2a_ms": 2.77,
        "draft_ms": 0.515,
    }
    acceptance = ("accept_mtp",)

    def textbook(self, K, done):
        price = self.PRICE

        # ignores attention back end, page size, policy, chunk size
        def predict(
            config,
            load,
            *,
            hbm_share=K["hbm_share"],
            mfu=K["mfu"],
            fixed_ms=K["fixed_ms"],
            us_per_token=K["us_per_token"],
            accept_mtp=K["accept_mtp"],
            prefix_share=K["prefix_share"],
            stall=K["stall"],
            latent_factor=K["latent_factor"],
            a2a_ms=K["a2a_ms"],
            draft_ms=K["draft_ms"],
        ):
            tp, dp = config["--tp-size"], config["--dp-size"]
            if dp > tp:
                raise Infeasible("textbook: more attention ranks than GPUs")
            wb = 671e9 * (0.55 if config["--quantization"] == "w4afp8" else 1.0)
            free = config["--mem-fraction-static"] * 150e9 - wb / tp
            if free < 2e9:
                raise Infeasible("textbook: the weights do not fit")
            kvb = 35136 * (2.0 if config["--kv-cache-dtype"] == "auto" else 1.0)
            k = config["--speculative-num-steps"]
            a = geo(_acc(accept_mtp), k) if k else 1.0
            bw = 4.8e12 * hbm_share
            rate = tp * 1.9e15 * mfu / 74e9
            base = (fixed_ms + k * draft_ms) * 1e-3
            if config["--moe-a2a-backend"] == "none":
                base += a2a_ms * 1e-3 * (tp / 8) ** 2
            # experts touched, at a guess of the batch
            t = (base + 0.3 * wb / tp / bw) / a
            t = (base + wb / tp / bw * (1.03 - 0.96875 ** (load * 300 * t * (k + 1) + k + 1))) / a
            base += wb / tp / bw * (1.03 - 0.96875 ** (load * 300 * t * (k + 1) + k + 1))
            slope = 12150 * kvb / bw / dp * latent_factor + us_per_token * 1e-6 * (k + 1) + (k + 1) / rate
            bm = min(config["--max-running-requests"], free * dp / kvb / 6000)
            p = 12000 * (1.0 if config["--disable-radix-cache"] else max(0.05, 1 - prefix_share))
            ttft, tpot, mu = _tb(load, 300.0, p, base, slope, a, rate, bm, 1.1, stall, 0.15)
            return done(config, ttft, tpot, price * tp, mu * 300.0)

        return predict


# --------------------------------------------------------------------------------------------------------------
class TrtllmCode(Scenario):
    """TensorRT-LLM (Triton), Llama-3.1-8B, 1 to 8 L40S 48GB on PCIe, code completion."""

    number, title = 2, "TensorRT-LLM, Llama-3.1-8B dense, 1-8 L40S, code completion"
    LOADS = (0.5, 1.0, 2.0, 4.0, 8.0, 14.0, 22.0, 32.0)
    SLO = (1.0, 0.050)
    PRICE = 1.1
    sd_luck, sd_noise = 0.035, 0.05
    DEFAULT = {
        "tp_size": 1,
        "instance_count": 1,
        "qformat": "none",
        "kv_cache_dtype": "auto",
        "max_batch_size": 256,
        "max_num_tokens": 8192,
        "kv_cache_free_gpu_mem_fraction": 0.9,
        "batch_scheduler_policy": "guaranteed_no_evict",
        "enable_chunked_context": False,
        "use_paged_context_fmha": "disable",
        "tokens_per_block": 64,
        "speculative_decoding_mode": "none",
        "enable_kv_cache_reuse": False,
    }

    def make_space(self):
        return {
            "tp_size": [1, 2, 4],
            "instance_count": [1, 2],
            "qformat": ["none", "fp8", "int8_sq", "int4_awq"],
            "kv_cache_dtype": ["auto", "fp8", "int8"],
            "max_batch_size": [16, 64, 256],
            "max_num_tokens": [2048, 8192, 16384],
            "kv_cache_free_gpu_mem_fraction": [0.5, 0.9],
            "batch_scheduler_policy": ["guaranteed_no_evict", "max_utilization"],
            "enable_chunked_context": [False, True],
            "use_paged_context_fmha": ["disable", "enable"],
            "tokens_per_block": [32, 64],
            "speculative_decoding_mode": ["none", "lookahead_decoding", "medusa"],
            "enable_kv_cache_reuse": [False, True],
        }

    def world(self, g):
        w = W()
        tp, R = g.n("tp_size"), g.n("instance_count")
        qz = lambda d: g.n("qformat", d)
        fp8, sq, awq = g.eq("qformat", "fp8"), g.eq("qformat", "int8_sq"), g.eq("qformat", "int4_awq")
        k8, i8 = g.eq("kv_cache_dtype", "fp8"), g.eq("kv_cache_dtype", "int8")
        mb, mnt, fr = g.n("max_batch_size"), g.n("max_num_tokens"), g.n("kv_cache_free_gpu_mem_fraction")
        mu_ = g.eq("batch_scheduler_policy", "max_utilization")
        ck, pf = g.eq("enable_chunked_context", True), g.eq("use_paged_context_fmha", "enable")
        tpb = g.n("tokens_per_block")
        S = "speculative_decoding_mode"
        la, me = g.eq(S, "lookahead_decoding"), g.eq(S, "medusa")
        re_ = g.eq("enable_kv_cache_reuse", True)
        w.gpus, w.R = tp * R, R
        w.imb = np.where(R > 1, 0.05, 0.0)
        n, bw, fl = 8.03e9, 0.864e12 * 0.82, 362e12
        wb = n * qz({"none": 2.0, "fp8": 1.1, "int8_sq": 1.1, "int4_awq": 0.68})
        wg = (wb / tp + np.where(me, 1.3e9 / tp, 0.0)) / GIB
        act = (
            0.9
            + mnt * 5.2e-4 * np.where(pf, 1.0, 1.25)
            + np.where(la, mb * 0.018, 0.0)
            + np.where(me, mb * 0.010, 0.0)
            + mb * 0.006
        )
        free = 44.4 - 0.6 - wg - act
        kvg = free * fr
        tokb = 131072 * np.where(k8 | i8, 0.5, 1.0) / tp
        cap = np.maximum(kvg, 0.01) * GIB / tokb
        ck = ck & pf  # a warning: no chunks without paged context FMHA
        w.fail(
            pf & i8,
            "[TensorRT-LLM][ERROR] Assertion failed: Paged Context FMHA doesn't work with int8 kv cache currently",
        )
        mu_ = mu_ & ~la  # a warning: lookahead has its own scheduling
        w.fail(me & sq, "AttributeError: 'SmoothQuantLinear' object has no attribute 'medusa_heads'")
        w.fail(
            free < 1.0,
            "[TensorRT-LLM][ERROR] CUDA runtime error in cudaMalloc: out of memory (engine activation {x:.2f} "
            "GiB, weights {y:.2f} GiB, 44.40 GiB device)",
            x=act,
            y=wg,
        )
        work = 0.5 + np.where(la, mb * 0.012, 0.0) + np.where(me, mb * 0.007, 0.0)
        w.fail(
            free * (1 - fr) < work,
            "[TensorRT-LLM][ERROR] CUDA runtime error in cudaMallocAsync: out of memory ({x:.2f} GiB of "
            "decoder workspace, {y:.2f} GiB free after the KV cache)",
            x=work,
            y=free * (1 - fr),
        )
        w.fail(
            la & (mb == 256) & (mnt == 2048),
            "[TensorRT-LLM][ERROR] max_num_tokens (2048) is smaller than max_batch_size x max_draft_len ({x:.0f})",
            x=256 * 12.0,
        )
        w.L = 64.0
        ctx = 1832.0
        af = np.where(i8, 1.9, np.where(k8, 1.0, 1.0))  # int8: no XQA kernel, masked MHA
        af = af * np.where(k8 & (tpb == 32), 1.45, 1.0)  # fp8 XQA wants 64
        af = af * np.where(~k8 & ~i8 & (tpb == 32), 0.92, 1.0)
        w.tkv = ctx * tokb / bw * af * 1.3
        w.tw = wb / tp / bw * np.where(sq, 1.12, 1.0)
        w.tf = 2 * n / (tp * fl * 0.5) * qz({"none": 1.0, "fp8": 0.6, "int8_sq": 0.75, "int4_awq": 1.9})
        # PCIe, no peer to peer above two
        w.tc0 = 64 * g.n("tp_size", {1: 0.0, 2: 14e-6, 4: 38e-6})
        w.tc1 = 64 * 4096 * 2 * 2 * (tp - 1) / tp / np.where(tp == 4, 14e9, 22e9) * 1.0
        k = np.where(la, 11.0, np.where(me, 5.0, 0.0))
        w.t0 = 1.3e-3 + np.where(la, 1.1e-3, 0.0) + np.where(me, 0.9e-3, 0.0) + np.where(mu_, 0.3e-3, 0.0) + R * 0.15e-3
        w.tb = 8e-6 + np.where(la, 2.4e-5, 0.0)
        w.q = k + 1
        gain = np.where(la, 2.15, np.where(me, np.where(awq, 1.75, 2.05) - np.where(k8 & ~fp8, 0.15, 0.0), 1.0))
        w.a = gain
        w.tl = 1.07 + np.where(la, 0.18, 0.0) + np.where(me, 0.08, 0.0)
        live = re_ & pf  # reuse without paged context: accepted, no effect
        hit = np.where(live, 0.66 * cap / (cap + 60e3) * np.where(tpb == 64, 0.93, 1.0) * np.where(mu_, 0.85, 1.0), 0.0)
        w.P = 1800 * (1 - hit)
        w.prate = (
            tp
            * fl
            * 0.42
            / (2 * n)
            * qz({"none": 1.0, "fp8": 1.65, "int8_sq": 1.3, "int4_awq": 0.55})
            * g.n("tp_size", {1: 1.0, 2: 0.66, 4: 0.40})
            * np.where(pf, np.where(k8 & ~fp8, 0.55, 0.94), 1.0)  # fp8 cache, bf16 context kernel: a slow path
            * np.where(mnt == 2048, 0.9, 1.0)
        )
        w.mix, w.chunk = ck, np.where(ck, np.minimum(mnt, 2048.0 + 0.25 * mnt), mnt)
        w.po = 0.002
        w.cvp = np.where(
            mnt == 16384, 1.6, np.where(mnt == 8192, 1.3, 1.0)
        )  # how many prompts stop the decoding at once
        w.maxb = mb
        # no_evict reserves up to max_new_tokens (1024)
        w.bkv = np.where(mu_, cap / ctx, cap / (1800 * np.where(live, 0.6, 1.0) + 1024))
        w.pen = np.where(mu_, 0.9, 0.1)
        w.hold = np.where(mu_, 0.0, 1.0)
        w.ttft0 = 0.025
        w.launch = 35 + 110 * (1 + 0.4 * awq + 0.3 * sq) + mnt / 16384 * 40 + mb * 0.15 + 30 * la + 40 * me + 8 * tp
        return w

    consts = {
        "bandwidth_gb_s": 964.0,
        "tflops": 104.0,
        "overhead_ms": 2.14,
        "pcie_gb_s": 23.3,
        "gain_lookahead": 0.523,
        "gain_medusa": 0.519,
        "burst": 6.51,
    }
    acceptance = ("gain_lookahead", "gain_medusa")

    def textbook(self, K, done):
        wbytes = {"none": 2.0, "fp8": 1.0, "int8_sq": 1.0, "int4_awq": 0.6}
        speed = {"none": 1.0, "fp8": 1.6, "int8_sq": 1.4, "int4_awq": 0.8}
        price = self.PRICE

        # ignores paged context FMHA, tokens per block, chunked context, cache reuse
        def predict(
            config,
            load,
            *,
            bandwidth_gb_s=K["bandwidth_gb_s"],
            tflops=K["tflops"],
            overhead_ms=K["overhead_ms"],
            pcie_gb_s=K["pcie_gb_s"],
            gain_lookahead=K["gain_lookahead"],
            gain_medusa=K["gain_medusa"],
            burst=K["burst"],
        ):
            tp, R, q = config["tp_size"], config["instance_count"], config["qformat"]
            wb = 8.03e9 * wbytes[q] / tp
            free = (46e9 - wb - config["max_num_tokens"] * 6e5) * config["kv_cache_free_gpu_mem_fraction"]
            if free < 1e9:
                raise Infeasible("textbook: no memory for the cache")
            kvb = 131072 * (1.0 if config["kv_cache_dtype"] == "auto" else 0.5) / tp
            m = config["speculative_decoding_mode"]
            k, a = 0, 1.0
            if m == "medusa":
                k, a = 5, geo(_acc(gain_medusa), 5)
            elif m == "lookahead_decoding":
                k, a = 11, geo(_acc(gain_lookahead), 11)
            bw = bandwidth_gb_s * 1e9
            x = 1e6 * (tp - 1) / tp / (pcie_gb_s * 1e9)
            tok = 16.06e9 / (tp * tflops * 1e12 * speed[q]) + x
            base = overhead_ms * 1e-3 + wb / bw + 1e-3 * (tp - 1) / 2
            slope = 1832 * kvb / bw + (k + 1) * tok
            out = 64 if config["batch_scheduler_policy"] == "max_utilization" else 1024
            bm = min(config["max_batch_size"], free / kvb / (1800 + out))
            ttft, tpot, mu = _tb(load / R, 64.0, 1400.0, base, slope, a, 1 / tok, bm, 1.1, burst, 0.03)
            return done(config, ttft, tpot, price * tp * R, mu * R * 64.0)

        return predict


# --------------------------------------------------------------------------------------------------------------
class LmdeployRag(Scenario):
    """LMDeploy, Qwen2.5-32B, 1 to 8 A100 80GB, RAG with long prompts and hot documents."""

    number, title = 3, "LMDeploy, Qwen2.5-32B dense, 1-8 A100, RAG"
    LOADS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6, 2.3)
    SLO = (15.0, 0.130)
    PRICE = 1.7
    sd_luck, sd_noise = 0.05, 0.06
    DEFAULT = {
        "--backend": "turbomind",
        "--tp": 2,
        "proxy-nodes": 1,
        "--model-format": "hf",
        "--quant-policy": 0,
        "--cache-max-entry-count": 0.8,
        "--max-batch-size": 128,
        "--cache-block-seq-len": 64,
        "--enable-prefix-caching": False,
        "--max-prefill-token-num": 8192,
        "--num-tokens-per-iter": 0,
        "--communicator": "nccl",
        "--eager-mode": False,
    }

    def make_space(self):
        return {
            "--backend": ["turbomind", "pytorch"],
            "--tp": [1, 2, 4],
            "proxy-nodes": [1, 2],
            "--model-format": ["hf", "awq"],
            "--quant-policy": [0, 4, 8],
            "--cache-max-entry-count": [0.5, 0.8, 0.9],
            "--max-batch-size": [16, 128, 256],
            "--cache-block-seq-len": [32, 64, 128],
            "--enable-prefix-caching": [False, True],
            "--max-prefill-token-num": [2048, 8192, 16384],
            "--num-tokens-per-iter": [0, 1024, 4096],
            "--communicator": ["nccl", "cuda-ipc"],
            "--eager-mode": [False, True],
        }

    def world(self, g):
        w = W()
        tm = g.eq("--backend", "turbomind")
        pt = ~tm
        tp, R = g.n("--tp"), g.n("proxy-nodes")
        awq = g.eq("--model-format", "awq")
        qp = g.n("--quant-policy")
        ce, mb, blk = g.n("--cache-max-entry-count"), g.n("--max-batch-size"), g.n("--cache-block-seq-len")
        pc = g.eq("--enable-prefix-caching", True)
        mpt, nti = g.n("--max-prefill-token-num"), g.n("--num-tokens-per-iter")
        ipc, eag = g.eq("--communicator", "cuda-ipc"), g.eq("--eager-mode", True)
        w.gpus, w.R = tp * R, R
        w.imb = np.where(R > 1, 0.08, 0.0)
        n, bw, fl = 32.8e9, 2.04e12 * 0.8, 312e12
        wb = n * np.where(awq, 0.60, 2.0)
        wg = wb / tp / GIB
        act = 1.2 + mpt * np.where(pt, 4.2e-4, 3.0e-4) + np.where(ipc & (tp > 1), mpt * 3.6e-4, 0.0)
        free = 79.1 - 0.8 - wg
        kvg = free * ce
        left = free * (1 - ce) - act - np.where(pt & ~eag, 1.1 + mb / 256 * 1.4, 0.0)
        tokb = 64 * 8 * 128 * 2 * np.where(qp == 0, 2.0, np.where(qp == 8, 1.03, 0.56)) / tp
        cap = np.maximum(kvg, 0.01) * GIB / tokb
        ipc = ipc & tm  # the pytorch engine does not look at it
        w.fail(
            pt & pc & (qp > 0) & (blk == 32),
            "AssertionError: block_size 32 with quant_policy is not supported by prefix caching of the pytorch engine",
        )
        w.fail(
            pt & awq & (tp == 4),
            "ValueError: AWQ w4 group_size 128: in_features 27648 // 4 can not be packed evenly for the triton kernel",
        )
        w.fail(
            free < 6,
            "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory, weights {x:.2f} GiB of 79.10 GiB",
            x=wg,
        )
        w.fail(
            left < 0.0,
            "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory. {x:.2f} GiB needed by prefill, {y:.2f} "
            "GiB left by cache_max_entry_count",
            x=act,
            y=np.maximum(free * (1 - ce), 0),
        )
        w.fail(
            cap < 32768,
            "[TM][WARNING] No enough blocks for session_len (32768): {x:.0f} tokens; ValueError: session_len "
            "exceeds the cache",
            x=cap,
        )
        w.L = 220.0
        ctx = 9110.0
        # attention: int4 cache needs compute on A100; triton kernels of the pytorch engine want large blocks
        af = np.where(
            tm,
            np.where(qp == 4, 1.35, np.where(qp == 8, 1.08, 1.0))
            * np.where(qp > 0, np.where(blk == 32, 1.3, np.where(blk == 128, 0.8, 1.0)), 1.0),
            np.where(qp == 4, 3.4, np.where(qp == 8, 1.9, 1.05))
            * np.where(blk == 128, 1.5, np.where(blk == 32, 1.15, 1.0)),
        )
        w.tkv = ctx * tokb / bw * af
        w.tw = wb / tp / bw * np.where(awq, np.where(tm, 1.08, 1.7), 1.0)
        w.tf = 2 * n / (tp * fl * 0.5) * np.where(awq, np.where(tm, 1.25, 3.2), 1.0)
        w.tc0 = (
            128
            * np.where(tp > 1, np.where(ipc, 8e-6, np.where(tp == 4, 26e-6, 20e-6)), 0.0)
            * np.where(eag & pt, 1.5, 1.0)
        )
        w.tc1 = 128 * 5120 * 2 * 2 * (tp - 1) / tp / 200e9
        w.t0 = np.where(tm, 2.2e-3 + mb * 1.0e-5, np.where(eag, 26e-3, 5.5e-3))
        w.tb = np.where(tm, 1.5e-5, 6e-5)
        w.gmax, w.te = np.where(pt, np.where(eag, 1e9, 128.0), 1e9), 18e-3
        hit = np.where(
            pc,
            0.52
            * cap
            / (cap + 220e3)
            * np.where(blk == 128, 0.985, 1.0)
            * np.where(R > 1, 0.8, 1.0)
            * np.where(pt, 1.25, 1.0)
            * np.where(tm & (qp == 4), 0.8, 1.0),
            0.0,
        )
        w.P = 9000 * (1 - hit)
        # iterations of a prompt: turbomind cuts it by num_tokens_per_iter, the pytorch engine by max_prefill_token_num
        it = np.where(tm, np.where(nti == 0, 1e9, nti), mpt)
        small = np.where(it <= 1024, 0.72, np.where(it <= 2048, 0.84, np.where(it <= 4096, 0.97, 1.0)))
        small = small * np.where(tm & (nti > 0) & (mpt < nti), 0.7, 1.0)  # contradictory: many small passes
        w.prate = (
            tp
            * fl
            * 0.52
            / (2 * n)
            * np.where(awq, np.where(tm, 0.72, 0.52), 1.0)
            * np.where(pt, 0.95, 1.0)
            * np.where(tp == 4, np.where(ipc, 0.86, 0.66), np.where(tp == 2, np.where(ipc, 0.94, 0.84), 1.0))
            * small
            * np.where(pt & (qp == 4), 0.7, 1.0)
            * np.where((mpt == 2048) & tm & (nti == 0), 0.8, 1.0)
            * np.where(tm & (mpt == 16384), 1.07, 1.0)
        )
        mix = tm & (nti > 0)
        w.mix = mix
        w.chunk = np.where(mix, nti, np.where(tm, np.maximum(mpt, 4096), mpt))
        w.po = np.where(tm, 0.003, np.where(eag, 0.03, 0.012)) + np.where(mix & pc, 0.004, 0.0)
        w.cvp = np.where(
            mix,
            np.where(nti == 1024, 0.45, 0.6) + 0.3 * (mpt == 2048),
            np.where(pt, 1.0 + 0.25 * (mpt == 16384), np.where(mpt == 16384, 1.35, np.where(mpt == 2048, 0.9, 1.1))),
        )
        w.maxb, w.bkv = mb, cap / (ctx * np.where(pc, 0.8, 1.0))
        w.pen = np.where(tm, 0.6, 0.3)
        w.tailp = 2.2
        w.ttft0 = 0.08 + np.where(R > 1, 0.02, 0.0)
        w.hold = np.where(pt, 2.0, 0.5)
        w.launch = np.where(tm, 40, 75) + wb / GIB * 0.5 + np.where(pt & ~eag, 45, 0) + 10 * tp
        return w

    consts = {
        "bandwidth_share": 0.95,
        "mfu": 0.373,
        "overhead_ms": 2.47,
        "comm_us": 17.5,
        "hot_documents": 0.366,
        "stall": 3.29,
        "pytorch_ms": 14.6,
    }

    def textbook(self, K, done):
        price = self.PRICE

        # ignores block length, num-tokens-per-iter, prefill token number, communicator
        def predict(
            config,
            load,
            *,
            bandwidth_share=K["bandwidth_share"],
            mfu=K["mfu"],
            overhead_ms=K["overhead_ms"],
            comm_us=K["comm_us"],
            hot_documents=K["hot_documents"],
            stall=K["stall"],
            pytorch_ms=K["pytorch_ms"],
        ):
            tp, R = config["--tp"], config["proxy-nodes"]
            awq = config["--model-format"] == "awq"
            wb = 32.8e9 * (0.56 if awq else 2.0) / tp
            free = (84e9 - wb) * config["--cache-max-entry-count"]
            if free < 4e9:
                raise Infeasible("textbook: the cache is too small")
            p = config["--quant-policy"]
            kvb = 131072 * (2.0 if p == 0 else p / 8) / tp
            bw = 2.04e12 * bandwidth_share
            fl = tp * 312e12 * mfu * (0.85 if awq else 1.0)
            base = overhead_ms * 1e-3 + wb / bw + 128e-6 * comm_us * (tp > 1)
            if config["--backend"] == "pytorch":
                base += pytorch_ms * 1e-3 * (2.5 if config["--eager-mode"] else 1.0)
            slope = 9110 * kvb / bw + 65.6e9 / fl
            bm = min(config["--max-batch-size"], free / kvb / 9110)
            if bm < 1:
                raise Infeasible("textbook: not one request fits")
            pr = 9000 * (max(0.05, 1 - hot_documents) if config["--enable-prefix-caching"] else 1.0)
            ttft, tpot, mu = _tb(load / R, 220.0, pr, base, slope, 1.0, fl / 65.6e9, bm, 1.1, stall, 0.1)
            return done(config, ttft, tpot, price * tp * R, mu * R * 220.0)

        return predict


# --------------------------------------------------------------------------------------------------------------
class TgiTools(Scenario):
    """Hugging Face TGI, Mixtral-8x7B, 1 to 8 L40S 48GB, tool-calling assistants."""

    number, title = 4, "TGI, Mixtral-8x7B MoE, 1-8 L40S, tool-calling assistants"
    LOADS = (0.2, 0.4, 0.8, 1.4, 2.2, 3.2, 4.5, 6.0)
    SLO = (4.5, 0.070)
    PRICE = 1.1
    sd_luck, sd_noise = 0.04, 0.05
    DEFAULT = {
        "--num-shard": 4,
        "--quantize": "none",
        "--kv-cache-dtype": "auto",
        "--max-batch-prefill-tokens": 4096,
        "--max-batch-total-tokens": 65536,
        "--max-concurrent-requests": 128,
        "--waiting-served-ratio": 0.3,
        "--max-waiting-tokens": 20,
        "--speculate": 0,
        "ATTENTION": "flashinfer",
        "PREFIX_CACHING": 0,
        "--cuda-graphs": "1,2,4,8,16,32",
    }

    def make_space(self):
        return {
            "--num-shard": [1, 2, 4, 8],
            "--quantize": ["none", "gptq", "awq", "fp8"],
            "--kv-cache-dtype": ["auto", "fp8_e4m3fn"],
            "--max-batch-prefill-tokens": [4096, 8192, 16384],
            "--max-batch-total-tokens": [32768, 65536, 262144],
            "--max-concurrent-requests": [16, 128, 512],
            "--waiting-served-ratio": [0.3, 1.2],
            "--max-waiting-tokens": [2, 20],
            "--speculate": [0, 2, 5],
            "ATTENTION": ["flashinfer", "flashdecoding", "paged"],
            "PREFIX_CACHING": [0, 1],
            "--cuda-graphs": ["0", "1,2,4,8,16,32", "1,2,4,8,16,32,64,128"],
        }

    def world(self, g):
        w = W()
        tp = g.n("--num-shard")
        qz = lambda d: g.n("--quantize", d)
        gp, aw, f8 = g.eq("--quantize", "gptq"), g.eq("--quantize", "awq"), g.eq("--quantize", "fp8")
        kv8 = g.eq("--kv-cache-dtype", "fp8_e4m3fn")
        mpt, mtt, mc = (
            g.n("--max-batch-prefill-tokens"),
            g.n("--max-batch-total-tokens"),
            g.n("--max-concurrent-requests"),
        )
        wsr, mwt, k = g.n("--waiting-served-ratio"), g.n("--max-waiting-tokens"), g.n("--speculate")
        fi, fd, pg = (g.eq("ATTENTION", x) for x in ("flashinfer", "flashdecoding", "paged"))
        pc = g.eq("PREFIX_CACHING", 1)
        gm = g.n("--cuda-graphs", {"0": 0, "1,2,4,8,16,32": 32, "1,2,4,8,16,32,64,128": 128})
        w.gpus = tp
        bw, fl = 0.864e12 * 0.8, 362e12
        byt = qz({"none": 2.0, "gptq": 0.57, "awq": 0.57, "fp8": 1.05})
        dense, exp = 1.6e9, 45.1e9
        wb = (dense + exp) * byt
        wg = wb / tp / GIB
        act = 1.4 + mpt * 4.5e-4 * np.where(tp == 1, 1.0, 0.8) + gm / 128 * 2.4 + np.where(fi, 0.75, 0.0)
        free = 44.4 * 0.96 - wg - act
        tokb = 131072 * np.where(kv8, 0.5, 1.0) / tp
        mem = np.maximum(free, 0.01) * GIB / tokb
        pc = pc & ~pg  # switched off in silence
        w.fail(kv8 & pg, "RuntimeError: FP8 KV cache is not supported with ATTENTION=paged on CUDA")
        w.fail(
            wg > 42.0,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of "
            "44.40 GiB; shard weights {x:.2f} GiB",
            x=wg,
        )
        w.fail(
            free < 0.6,
            "RuntimeError: Not enough memory to handle {x:.0f} prefill tokens. You need to decrease "
            "`--max-batch-prefill-tokens` ({y:.2f} GiB free)",
            x=mpt,
            y=free,
        )
        w.fail(
            mtt > mem,
            "RuntimeError: Not enough memory to handle {x:.0f} total tokens with {y:.0f} prefill tokens: the cache "
            "holds {z:.0f} tokens",
            x=mtt,
            y=mpt,
            z=mem,
        )
        w.L = 180.0
        ctx = 3590.0
        af = np.where(
            fi, np.where(kv8, 0.95, 1.0) * np.where(k > 0, 1.12, 1.0), np.where(fd, np.where(kv8, 2.4, 0.95), 1.55)
        )
        w.tkv = ctx * tokb / bw * af * 1.3
        ekern = np.where(gp, 1.1, np.where(aw, 1.35, np.where(f8, np.where(tp == 8, 1.6, 1.03), 1.0)))
        w.twe = exp * byt / tp / bw * ekern
        w.esp = 0.25
        w.tw = dense * byt / tp / bw
        w.tf = 2 * 12.9e9 / (tp * fl * 0.4) * qz({"none": 1.0, "gptq": 1.3, "awq": 3.0, "fp8": 0.65})
        w.tc0 = 64 * g.n("--num-shard", {1: 0.0, 2: 16e-6, 4: 42e-6, 8: 70e-6}) * np.where(gm == 0, 1.5, 1.0)
        w.tc1 = 64 * 4096 * 2 * 2 * (tp - 1) / tp / np.where(tp == 8, 11e9, np.where(tp == 4, 15e9, 22e9))
        w.t0 = 3.5e-3 + np.where(fi, 1.0e-3, 0.3e-3) + np.where(k > 0, 1.5e-3, 0.0) + np.where(pc, 0.4e-3, 0.0)
        w.t0 = w.t0 + np.where(gm == 0, 9e-3, 0.0)
        w.tb = 4e-5 + np.where(k > 0, 5e-5, 0.0)
        w.gmax, w.te = np.where(gm == 0, 1e9, gm), 8e-3  # a batch of B sequences verifies B*(k+1) tokens
        al = np.where(pc & fd & (k > 0), 0.40, 0.56)  # the n-gram cache loses reused prompts of 256-token blocks
        w.a, w.q = np.where(k > 0, geo(al, np.maximum(k, 1)), 1.0), k + 1
        w.tl = 1.08 + np.where(k > 0, 0.04 * k, 0.0)
        cap = mtt
        hit = np.where(pc, 0.75 * mem / (mem + 90e3) * np.where(fd, 0.72, 1.0), 0.0)
        w.P = 3500 * (1 - hit)
        w.prate = (
            tp
            * fl
            * 0.36
            / (2 * 12.9e9)
            * qz({"none": 1.0, "gptq": 0.7, "awq": 0.48, "fp8": 1.5})
            * np.where(f8 & (tp == 8), 0.6, 1.0)  # 1792 columns: no cutlass tile
            * g.n("--num-shard", {1: 1.0, 2: 0.72, 4: 0.44, 8: 0.27})
            * np.where(pg, 0.9, 1.0)
            * np.where(mpt == 16384, 1.05, 1.0)
        )
        # the router: waits for max_waiting_tokens or for a ratio of waiting to running before it stops the decoding
        lazy = (wsr > 1) & (mwt == 20)
        w.hold = np.where(mwt == 20, np.where(wsr > 1, 18.0, 6.0), 1.0)
        w.cvp = np.where(lazy, 0.95, np.where(mwt == 2, 1.55, 1.3)) * np.where(
            mpt == 4096, 0.85, np.where(mpt == 16384, 1.3, 1.0)
        )
        w.po = 0.004 + np.where(mwt == 2, 0.012, np.where(wsr > 1, 0.002, 0.006)) + np.where(k > 0, 0.004, 0.0)
        w.chunk, w.mix = mpt, pc & fi  # chunking comes with prefix caching
        w.po = w.po + np.where(pc & fi & (mpt == 4096), 0.004, 0.0)
        w.chunk = np.where(pc & fi, np.minimum(mpt, 8192) * 0.5, w.chunk)
        # no paged growth: a request is admitted with its whole max_new_tokens (1024)
        w.maxb, w.bkv = mc, cap / (3500 * np.where(pc, 1 - 0.6 * hit, 1.0) + 1024.0)
        w.pen = 0.05
        # over the concurrency limit: 429, which never become tokens
        w.dl = np.where(mc == 16, 0.94, 1.0)
        w.ttft0 = 0.05
        w.launch = 50 + wb / GIB * 0.45 + gm * 0.5 + np.where(aw | gp, 25, 0) + 6 * tp
        return w

    consts = {
        "bandwidth_share": 0.95,
        "mfu": 0.199,
        "overhead_ms": 7.6,
        "comm_ms": 1.89,
        "pcie_gb_s": 13.6,
        "accept_ngram": 0.343,
        "prefix_share": 0.504,
        "stall": 2.53,
        "eager_ms": 11.8,
    }
    acceptance = ("accept_ngram",)

    def textbook(self, K, done):
        wbytes = {"none": 2.0, "gptq": 0.55, "awq": 0.55, "fp8": 1.0}
        speed = {"none": 1.0, "gptq": 0.8, "awq": 0.8, "fp8": 1.6}
        price = self.PRICE

        # ignores the attention back end, waiting-served ratio, max waiting tokens, prefill tokens
        def predict(
            config,
            load,
            *,
            bandwidth_share=K["bandwidth_share"],
            mfu=K["mfu"],
            overhead_ms=K["overhead_ms"],
            comm_ms=K["comm_ms"],
            pcie_gb_s=K["pcie_gb_s"],
            accept_ngram=K["accept_ngram"],
            prefix_share=K["prefix_share"],
            stall=K["stall"],
            eager_ms=K["eager_ms"],
        ):
            tp, q = config["--num-shard"], config["--quantize"]
            wb = 46.7e9 * wbytes[q] / tp
            free = 46e9 - wb - 3e9
            kvb = 131072 * (1.0 if config["--kv-cache-dtype"] == "auto" else 0.5) / tp
            if free < config["--max-batch-total-tokens"] * kvb * 0.8:
                raise Infeasible("textbook: max-batch-total-tokens do not fit")
            k = config["--speculate"]
            a = geo(_acc(accept_ngram), k) if k else 1.0
            bw = 0.864e12 * bandwidth_share
            x = 1.0e6 * (tp - 1) / tp / (pcie_gb_s * 1e9)
            tok = 25.8e9 / (tp * 362e12 * mfu * speed[q]) + x
            base = overhead_ms * 1e-3 + comm_ms * 1e-3 * math.log2(tp)
            if config["--cuda-graphs"] == "0":
                base += eager_ms * 1e-3
            t = (base + 0.5 * wb / bw) / a
            base += wb / bw * (1 - 0.75 ** ((1 + load * 180 * t) * (k + 1)))
            slope = 3590 * kvb / bw + (k + 1) * tok
            bm = min(config["--max-concurrent-requests"], config["--max-batch-total-tokens"] / 4524)
            p = 3500 * (max(0.05, 1 - prefix_share) if config["PREFIX_CACHING"] else 1.0)
            ttft, tpot, mu = _tb(load, 180.0, p, base, slope, a, 1 / tok, bm, 1.1, stall, 0.06)
            return done(config, ttft, tpot, price * tp, mu * 180.0)

        return predict


# --------------------------------------------------------------------------------------------------------------
class LlamaCppTeam(Scenario):
    """llama.cpp's server, Qwen3-30B-A3B, 1 to 4 RTX 4090, the coding chat of a team."""

    number, title = 5, "llama-server, Qwen3-30B-A3B MoE, 1-4 RTX 4090, coding chat"
    LOADS = (0.05, 0.1, 0.18, 0.3, 0.45, 0.65, 0.9, 1.2)
    SLO = (12.0, 0.060)
    PRICE = 0.45
    sd_luck, sd_noise = 0.045, 0.06
    DEFAULT = {
        "gpus": 1,
        "gguf": "Q4_K_M",
        "--split-mode": "layer",
        "--parallel": 4,
        "--ctx-size": 32768,
        "--flash-attn": "off",
        "--cache-type-k": "f16",
        "--cache-type-v": "f16",
        "--ubatch-size": 512,
        "--n-cpu-moe": 0,
        "--threads": 8,
        "--draft-max": 0,
        "--cache-reuse": 0,
    }

    def make_space(self):
        return {
            "gpus": [1, 2, 4],
            "gguf": ["Q4_K_M", "Q6_K"],
            "--split-mode": ["layer", "row"],
            "--parallel": [4, 8, 16],
            "--ctx-size": [32768, 65536, 131072],
            "--flash-attn": ["off", "on", "auto"],
            "--cache-type-k": ["f16", "q8_0", "q4_0"],
            "--cache-type-v": ["f16", "q8_0"],
            "--ubatch-size": [256, 512, 2048],
            "--n-cpu-moe": [0, 16],
            "--threads": [8, 32],
            "--draft-max": [0, 4, 12],
            "--cache-reuse": [0, 256],
        }

    def world(self, g):
        w = W()
        n = g.n("gpus")
        row = g.eq("--split-mode", "row") & (n > 1)
        par, ctxs = g.n("--parallel"), g.n("--ctx-size")
        k8, k4 = g.eq("--cache-type-k", "q8_0"), g.eq("--cache-type-k", "q4_0")
        v8 = g.eq("--cache-type-v", "q8_0")
        fa = g.eq("--flash-attn", "on") | (g.eq("--flash-attn", "auto") & ~row)
        ub, cm, th = g.n("--ubatch-size"), g.n("--n-cpu-moe"), g.n("--threads")
        k, reuse = g.n("--draft-max"), g.eq("--cache-reuse", 256)
        qz = lambda d: g.n("gguf", d)
        w.gpus = n
        bw, fl = 1.008e12 * 0.62, 165e12
        dense, exp = 1.6e9, 28.9e9
        byt = qz({"Q4_K_M": 0.60, "Q6_K": 0.82, "Q8_0": 1.07})
        kvb_k = np.where(k4, 0.56, np.where(k8, 1.06, 2.0))
        kvb_v = np.where(v8, 1.06, 2.0)
        tokb = 48 * 4 * 128 * (kvb_k + kvb_v)
        kvg = ctxs * tokb / GIB
        off = cm / 48.0
        wg = (dense + exp * (1 - off)) * byt / GIB
        draft = np.where(k > 0, 0.9 + ctxs / 131072 * 3.4, 0.0)
        buf = 0.4 + ub * 4.2e-4 + np.where(fa, 0.0, ub * ctxs / 32768 * 32 * 4 * 32768 / GIB * 0.35)
        # layers over the GPUs: the main one has the draft and the buffers, row: all of them
        need = (wg + kvg) / n * np.where(n > 1, 1.04, 1.0) + buf + np.where(row, 0.6 + kvg * (1 - 1 / n), 0.0) + draft
        slot = ctxs / par
        w.fail(
            v8 & ~fa,
            "llama_init_from_model: V cache quantization requires flash_attn\n"
            "main: error: failed to create context with model",
        )
        w.fail(
            need > 23.3,
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating {x:.2f} MiB on device 0: cudaMalloc failed: out "
            "of memory ({y:.2f} GiB needed of 23.60 GiB)",
            x=np.maximum(kvg / n, buf) * 1024,
            y=need,
        )
        w.L = 320.0
        ctx = 3700.0
        # requests longer than a slot are refused
        # lengths are log-normal, median 3000, sigma .75; a slot of x tokens serves those below
        z = (np.log(slot) - math.log(3400.0)) / 0.75
        w.dl = np.clip(1 / (1 + np.exp(-1.702 * z)), 0.02, 1.0)
        plong = np.minimum(1.0, 0.72 + 0.28 * w.dl)
        # mixed cache types have no compiled CUDA kernel: attention goes to the CPU
        mixed = fa & ((k8 & ~v8) | (k4 & v8) | (k4 & ~v8) | (~k8 & ~k4 & v8))
        af = np.where(fa, np.where(mixed, 3.0, np.where(k8 & v8, 1.15, 0.9)), np.where(k4, 1.9, np.where(k8, 1.6, 1.8)))
        w.tkv = ctx * tokb / bw * af * 2.0
        # experts on the CPU: DDR5 bandwidth; more threads than cores of one socket
        cpubw = np.where(th == 32, np.where(par > 4, 5.6e10, 4.2e10), 6.4e10)
        w.twe = exp * byt * ((1 - off) / bw * qz({"Q4_K_M": 1.2, "Q6_K": 1.35, "Q8_0": 1.0}) + off / cpubw * 0.55)
        w.esp = 8 / 128.0
        w.tw = dense * byt / bw
        # layer split: one GPU at a time; row split: together, but each product is gathered over PCIe
        speed = np.where(row, np.where(n == 4, 2.3, 1.6), 1.0)
        w.twe, w.tw, w.tkv = w.twe / speed, w.tw / speed, w.tkv / np.where(row, 1.0, 1.0)
        w.tc0 = np.where(row, 48 * n * 9e-6, (n - 1) * 1.2e-4)
        w.tc1 = np.where(row, 48 * 2048 * 4 * 2 / 9e9, 0.0)
        w.tf = 2 * 3.3e9 / (fl * 0.12) * np.where(off > 0, 4.0, 1.0)
        graphs = fa & ((par <= 4) | (v8 & (par <= 8)))  # CUDA graphs only with steady small batches
        w.t0 = (
            np.where(graphs, 1.2e-3, 3.6e-3)
            + np.where(off > 0, 2.4e-3 + np.where(th == 32, 1.6e-3, 0), 0.0)
            + np.where(th == 32, 0.25e-3, 0)
        )
        # drafts are made slot after slot; p-min stops long ones
        keff = np.where(k == 12, 8.0, 4.0) * (k > 0)
        w.tb = (
            2.2e-4
            + np.where(th == 8, 1.5e-4, 0.0)
            + keff * np.where(k == 12, 3.6e-4, 3.2e-4) * np.where(n > 1, 1.15, 1.0)
        )
        al = np.where(k4, 0.58, 0.76)
        w.a, w.q = np.where(k > 0, geo(al, np.maximum(keff, 1)), 1.0), keff + 1
        w.tl = np.where(k > 0, 1.2, 1.07)
        shift = reuse & ~(k4 | k8)  # no K-shift of a quantised cache
        # prompts come back to the slot that has them, if there is one; reuse moves chunks, too
        hit = (
            np.where(par >= 8, 0.46, np.where(par == 4, 0.36, 0.22))
            + np.where(shift, 0.22, 0.0)
            - np.where(k > 0, 0.04, 0.0)
        )
        w.P = 3000 * plong * (1 - hit)
        pr = 165e12 * 0.20 / (2 * 3.3e9) * np.where(ub == 256, 0.72, np.where(ub == 2048, 1.35, 1.0))
        pr = (
            pr
            * np.where(fa, 1.0, 0.5)
            * np.where(mixed, 0.5, 1.0)
            * np.where(row, np.where(n == 2, 0.9, 0.75), np.where(n > 1, 1 + 0.55 * (n - 1) * (ub <= 512), 1.0))
        )
        pr = pr * np.where(off > 0, np.where(ub == 2048, 0.62, 0.22), 1.0) * np.where((th == 32) & (off > 0), 1.15, 1.0)
        w.prate = pr * qz({"Q4_K_M": 1.0, "Q6_K": 0.86, "Q8_0": 1.08})
        w.chunk, w.mix, w.po = np.maximum(ub, 512.0), True, 0.004
        w.maxb = par
        w.bkv = par * 1.6
        w.pen = 0.0
        w.ttft0 = 0.06
        w.tailp = 3.0
        w.launch = 9 + wg * 0.9 + exp * off * byt / GIB * 0.5 + 3 * n + 4 * (k > 0)
        return w

    consts = {
        "vram_share": 0.473,
        "tflops": 8.2,
        "overhead_ms": 2.97,
        "cpu_gb_s": 106.0,
        "accept_draft": 0.874,
        "draft_ms": 0.69,
        "per_seq_ms": 1.26,
        "reuse": 0.801,
        "stall": 2.21,
        "row_gain": 0.0299,
    }
    acceptance = ("accept_draft",)

    def textbook(self, K, done):
        wbytes = {"Q4_K_M": 0.58, "Q6_K": 0.82, "Q8_0": 1.06}
        kb = {"f16": 2.0, "q8_0": 1.06, "q4_0": 0.56}
        price = self.PRICE

        # ignores flash-attn, threads, cache-reuse
        def predict(
            config,
            load,
            *,
            vram_share=K["vram_share"],
            tflops=K["tflops"],
            overhead_ms=K["overhead_ms"],
            cpu_gb_s=K["cpu_gb_s"],
            accept_draft=K["accept_draft"],
            draft_ms=K["draft_ms"],
            per_seq_ms=K["per_seq_ms"],
            reuse=K["reuse"],
            stall=K["stall"],
            row_gain=K["row_gain"],
        ):
            n, par = config["gpus"], config["--parallel"]
            byt = wbytes[config["gguf"]]
            off = config["--n-cpu-moe"] / 48
            tokb = 24576 * (kb[config["--cache-type-k"]] + kb[config["--cache-type-v"]])
            need = (30.5e9 * byt * (1 - off) + config["--ctx-size"] * tokb) / n + 1e9
            if need > 25e9:
                raise Infeasible("textbook: does not fit the GPUs")
            k = config["--draft-max"]
            a = geo(_acc(accept_draft), min(k, 8)) if k else 1.0
            bw = 1.008e12 * vram_share
            if config["--split-mode"] == "row":
                bw *= n**row_gain
            b0 = load * 320 * 0.02
            if b0 > par:
                b0 = par
            touched = 1 - 0.9375 ** ((b0 + 1) * (min(k, 8) + 1))
            base = (
                overhead_ms * 1e-3
                + 1.6e9 * byt / bw
                + 28.9e9 * byt * touched * ((1 - off) / bw + off / (cpu_gb_s * 1e9))
            )
            slope = 3700 * tokb / bw + k * draft_ms * 1e-3 + per_seq_ms * 1e-3
            rate = tflops * 1e12 / 6.6e9 * (1 - 0.6 * (off > 0)) * (config["--ubatch-size"] / 512) ** 0.25
            ttft, tpot, mu = _tb(load, 320.0, 3000 * max(0.05, 1 - reuse), base, slope, a, rate, par, 1.1, stall, 0.1)
            return done(config, ttft, tpot, price * n, mu * 320.0)

        return predict


_CLASSES = (VllmChat, SglangAgents, TrtllmCode, LmdeployRag, TgiTools, LlamaCppTeam)
_MADE = {}


def scenario(i):
    if i not in _MADE:
        _MADE[i] = _CLASSES[i]()
    return _MADE[i]
