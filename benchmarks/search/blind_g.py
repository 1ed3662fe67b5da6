# ruff: noqa: E501, B905, E741, RUF059
"""Private acceptance test: six serving engines, their spaces, a physics-like truth and somebody's roofline.

Each scenario: a grid of launch parameters, a vectorised truth (step-time physics, KV capacity, queueing,
crashes, quirks, lasting luck), noisy measurements and a simpler analytic predictor.
"""

import math

import numpy as np

from tuner import Infeasible

GB = 1e9
TRACE_S = 600.0


# ----------------------------------------------------------------------------------------------- engine physics
class _F:
    """Per-configuration coefficients of one engine replica; every field is an array over configurations."""

    DEFAULTS = dict(
        rep=1.0,  # replicas behind the router
        P=1000.0,  # mean prompt tokens that must be computed (after cache hits)
        P99=4000.0,  # same, 99th percentile prompt
        cv2=1.0,  # squared coefficient of variation of the prefill work
        O=200.0,  # mean output tokens
        Os=60.0,  # a short output, whose TPOT is the p99 one
        acc=1.0,  # tokens per sequence and step
        vt=1.0,  # tokens computed per sequence and step (1 + draft)
        budget=8192.0,  # tokens per step
        seqs=256.0,  # admitted sequences
        K=1e6,  # KV tokens per replica
        ctx=1500.0,  # mean live KV tokens per sequence (as the admission sees it)
        adm=0.97,  # share of K that the scheduler really fills
        preempt=1.0,  # how much preemption hurts (0: reserve in advance)
        mixed=1.0,  # chunked prefill shares steps with decode
        tw=0.01,
        twx=0.0,
        lnk=-1.0,  # dense weight read, expert weight read, log(1-topk/E)
        tkv=1e-5,
        tf=1e-5,
        tcm=0.0,
        lat=0.001,
        cpu0=0.002,
        cps=1e-5,
        over=0.0,
        gmax=1e9,
        epen=0.0,
        draft=0.0,
        burst=1.0,
        luck=1.0,
        luckc=1.0,
        gpus=1.0,
        price=2.0,
        ttft0=0.02,
        imb=1.0,
        boom=1e12,
    )

    def __init__(self, n, **kw):
        for k, v in self.DEFAULTS.items():
            setattr(self, k, np.broadcast_to(np.asarray(kw.pop(k, v), float), (n,)))
        if kw:
            raise TypeError(str(kw))

    def take(self, rows):
        out = object.__new__(_F)
        for k in self.DEFAULTS:
            setattr(out, k, getattr(self, k)[rows])
        return out


def _cube(a, b):
    """Smooth maximum of two overlapping resources."""
    return np.cbrt(a * a * a + b * b * b)


def _step(f, B, c):
    tok = B * f.vt + c
    dec = B * f.vt
    m = f.mixed > 0
    seen = np.where(m, tok, dec)
    mem = f.tw + f.twx * (1 - np.exp(seen * f.lnk)) + B * f.tkv
    comp = f.tf * seen
    gpu = _cube(mem, comp)
    # separate prefill passes: they read all weights again and pay the launch overhead again
    size = np.maximum(np.minimum(f.budget, np.maximum(f.P, c)), 1.0)
    passes = c / size
    pre = passes * (_cube(f.tw + f.twx, f.tf * size) + f.lat + f.cpu0 + 0.5 * f.epen)
    gpu = gpu + np.where(m, 0.0, pre) + f.tcm * tok + f.lat + f.draft
    gpu = gpu + f.epen / (1 + np.exp(-(dec - f.gmax) / (0.03 * f.gmax + 1)))
    cpu = f.cpu0 + f.cps * B
    s = np.where(f.over > 0, np.maximum(gpu, cpu) + 0.15 * np.minimum(gpu, cpu), gpu + cpu)
    return s * f.luck


def _serve(f, lam):
    lam_r = lam / f.rep
    bal = f.acc * f.P / f.O
    Bkv = f.K / f.ctx
    Bmax = np.maximum(np.minimum(f.seqs, Bkv * f.adm), 1.0)
    Bcap = np.where(f.mixed > 0, np.minimum(Bmax, f.budget / (f.vt + bal)), Bmax)
    thrash = f.preempt * np.clip((f.seqs / Bkv - 1) / 2, 0, 1)
    scap = _step(f, Bcap, Bcap * bal) * (1 + 0.15 * thrash)
    lamcap = Bcap * f.acc / (f.O * scap)
    rho = lam_r * f.imb / lamcap
    target = np.minimum(lam_r * f.imb, 0.999 * lamcap)
    lo = np.zeros_like(Bcap)
    hi = Bcap.copy()
    for _ in range(26):
        mid = 0.5 * (lo + hi)
        up = mid * f.acc / (f.O * _step(f, mid, mid * bal)) < target
        lo = np.where(up, mid, lo)
        hi = np.where(up, hi, mid)
    B = 0.5 * (lo + hi)
    c = B * bal
    s = _step(f, B, c)
    room = np.where(f.mixed > 0, np.maximum(f.budget - B * f.vt, 0.05 * f.budget), f.budget)
    # tail of TPOT
    B99 = np.where(rho < 1, np.minimum(Bmax, B + 2.0 * f.burst * np.sqrt(B)), np.maximum(Bcap, 0.95 * Bmax))
    N = np.maximum(target * f.Os * s / f.acc, 1e-6)
    cf = (N + 2.33 * np.sqrt(N) * f.burst + 1) / N
    c99 = c * cf
    c99 = np.where(f.mixed > 0, np.minimum(c99, room), c99)
    pre = f.preempt * 0.6 * np.clip((B99 / (Bkv * f.adm) - 0.88) / 0.12, 0, 1) * (f.seqs > 0.9 * Bkv)
    acc99 = 1 + (f.acc - 1) * 0.68
    tpot = _step(f, B99, c99) / acc99 * (1 + pre)
    tpot_mean = s / f.acc * (1 + 0.3 * pre)
    # tail of TTFT
    x = np.minimum(f.P99, room)
    one = np.where(f.mixed > 0, _step(f, B, x), _step(f, np.zeros_like(B), x))
    tpre99 = f.P99 / np.maximum(x, 1) * one
    xm = np.maximum(np.minimum(f.P, room), 1e-9)
    onem = np.where(f.mixed > 0, _step(f, B, xm), _step(f, np.zeros_like(B), xm))
    tprem = f.P / xm * onem
    full = np.where(f.mixed > 0, _step(f, B, room), _step(f, np.zeros_like(B), room))
    u = np.clip(target * f.P * full / np.maximum(room, 1), 0, 0.995)
    wq = np.minimum(u / (1 - u) * tprem * (1 + f.cv2) / 2 * 3.5 * f.burst**2, 0.25 * TRACE_S)
    r = np.clip(rho, 0, 0.995)
    Pw = r ** np.sqrt(2 * (Bcap + 1))
    wslot = Pw / (1 - r) * (f.O * tpot_mean) / Bcap * f.burst**2 * 4.6
    wslot = np.minimum(wslot, 0.2 * TRACE_S)
    over = np.where(rho > 1, TRACE_S * 0.95 * (1 - 1 / np.maximum(rho, 1)), 0.0)
    ttft = f.ttft0 + 0.5 * s + tpre99 + wq + wslot + over
    e2e = f.ttft0 + tprem + 0.3 * (wq + wslot) + f.O * tpot_mean
    make = TRACE_S * np.maximum(1, rho) + 2.0 * e2e
    cost = f.gpus * f.price / 3600 * make / (lam * TRACE_S * f.O) * 1e6 * f.luckc
    return dict(cost=cost, tpot=tpot, ttft=ttft, B=B99, rho=rho)


# ----------------------------------------------------------------------------------------------- textbook model
def _roof(lam, P, O, acc, vt, Bmax, tw, tkv, tf, step, gpus, price, rep=1.0, tail=1.15):
    """Roofline without overlap: step = step_s + weights + KV + flops; M/M/1 in front of it."""
    Bmax = max(Bmax, 1.0)
    acc = max(acc, 1.0)
    a = step + tw
    b = tkv + tf * (vt + acc * P / O)
    lr = lam / rep
    cap = Bmax * acc / (O * (a + b * Bmax))
    rho = lr / cap
    l = min(lr, 0.98 * cap)
    B = min(a / max(acc / (l * O) - b, 1e-9), Bmax)
    s = a + b * B
    tpot = s / acc * tail
    ttft = P * tf * 2.5 + s + min(rho, 0.98) ** 2 / (1 - min(rho, 0.98)) * P * tf
    if rho > 1:
        ttft += TRACE_S * (1 - 1 / rho)
    cost = gpus * price / 3600 / (min(lam, cap * rep) * O) * 1e6
    return dict(cost_usd_per_mtok_output=cost, ttft_p99_s=ttft, tpot_p99_s=tpot)


def _chain(a, k):
    """Expected tokens per verification step with acceptance a and k drafts."""
    a = min(max(a, 0.0), 0.95) if np.isscalar(a) else np.clip(a, 0, 0.95)
    return (1 - a ** (k + 1)) / (1 - a)


class _Base:
    SPACE = {}
    DEFAULT = {}
    SLO = (1.0, 0.05)
    RATE = 1.0
    LOADS = [1, 2, 4]
    CONST = {}
    ACCEPT = ()  # names of constants that are speculative acceptance
    SEED = 1

    def __init__(self, lucky=True):
        self.lucky = lucky  # False: without the lasting luck of each configuration
        self.names = list(self.SPACE)
        self.sizes = [len(v) for v in self.SPACE.values()]
        self.n = int(np.prod(self.sizes))
        self._built = None
        self._grid = None

    # columns
    def _cols(self):
        idx = np.unravel_index(np.arange(self.n), self.sizes)
        self.ix = dict(zip(self.names, idx))

    def v(self, name):
        return np.array([float(x) for x in self.SPACE[name]])[self.ix[name]]

    def is_(self, name, value):
        k = [i for i, x in enumerate(self.SPACE[name]) if x == value and type(x) is type(value)]
        return self.ix[name] == k[0]

    def pick(self, name, table):
        """Map the values of a parameter through a list in the order of the space."""
        assert len(table) == len(self.SPACE[name])
        return np.array(table, float)[self.ix[name]]

    def build(self):
        if self._built is None:
            self._cols()
            rng = np.random.default_rng([77, self.SEED])
            z1, z2 = rng.normal(size=(2, self.n)) * self.lucky
            self.luck = np.exp(0.04 * z1)
            self.luckc = np.exp(0.028 * z1 + 0.028 * z2)
            f, crashes = self.physics()
            code = np.zeros(self.n, int)
            for k, (mask, _) in enumerate(crashes, 1):
                code[(code == 0) & mask] = k
            self._built = (f, code, [m for _, m in crashes])
        return self._built

    def rows_at(self, rows, load):
        """(serves, dict) for the given launchable rows at a load."""
        f = self.build()[0]
        g = f.take(rows)
        out = self.run(g, self.RATE * load, rows)
        return out["B"] <= g.boom, out

    def run(self, g, lam, rows):
        return _serve(g, lam)

    def grid(self):
        if self._grid is None:
            f, code, _ = self.build()
            L = len(self.LOADS)
            cost = np.full((self.n, L), np.inf)
            tpot = np.full((self.n, L), np.inf)
            ttft = np.full((self.n, L), np.inf)
            live = np.flatnonzero(code == 0)
            for j, load in enumerate(self.LOADS):
                good, o = self.rows_at(live, load)
                r = live[good]
                cost[r, j], tpot[r, j], ttft[r, j] = o["cost"][good], o["tpot"][good], o["ttft"][good]
            ok = np.isfinite(cost) & (ttft <= self.SLO[0]) & (tpot <= self.SLO[1])
            self._grid = (np.isfinite(cost).any(1), cost, tpot, ok, ttft)
        return self._grid


# ================================================================================ 0: vLLM, Llama-3.3-70B, 8 x H200
class _VllmChat70B(_Base):
    """Multi-turn chat: replicas against tensor parallel, FP8, EAGLE-3 drafts, prefix cache that DP dilutes."""

    SEED = 11
    SPACE = dict(
        tensor_parallel_size=[1, 2, 4, 8],
        data_parallel_size=[1, 2, 4],
        quantization=[None, "fp8", "awq_marlin"],
        kv_cache_dtype=["auto", "fp8"],
        gpu_memory_utilization=[0.8, 0.88, 0.92, 0.96],
        max_num_seqs=[64, 128, 256, 512],
        max_num_batched_tokens=[2048, 4096, 8192, 16384],
        enable_prefix_caching=[True, False],
        async_scheduling=[False, True],
        num_speculative_tokens=[0, 2, 4],
    )
    DEFAULT = dict(
        tensor_parallel_size=8,
        data_parallel_size=1,
        quantization=None,
        kv_cache_dtype="auto",
        gpu_memory_utilization=0.92,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enable_prefix_caching=True,
        async_scheduling=False,
        num_speculative_tokens=0,
    )
    SLO = (2.5, 0.045)
    RATE = 2.0
    LOADS = [0.6, 1, 1.6, 2.5, 3.5, 5, 7]
    CONST = dict(mfu=0.45, mbu=0.72, step_s=0.006, accept=0.65, hit=0.35, reserve_gb=4.0)
    ACCEPT = ("accept",)

    def physics(self):
        tp, dp, k = self.v("tensor_parallel_size"), self.v("data_parallel_size"), self.v("num_speculative_tokens")
        gmu, seqs, mnbt = self.v("gpu_memory_utilization"), self.v("max_num_seqs"), self.v("max_num_batched_tokens")
        fp8, awq = self.is_("quantization", "fp8"), self.is_("quantization", "awq_marlin")
        kv8 = self.is_("kv_cache_dtype", "fp8")
        pc, asy = self.is_("enable_prefix_caching", True), self.is_("async_scheduling", True)
        lg = np.log2(tp)
        W = self.pick("quantization", [141.2, 72.0, 39.6]) * GB
        draft_w = np.where(k > 0, 1.9 * GB, 0)
        kvb = 327680 * np.where(kv8, 0.5, 1.0) * np.where(k > 0, 81 / 80, 1)
        act = mnbt * (8192 * 2 * 9 + 28672 * 4 / tp) + seqs * (1 + k) * 128256 * 6 / np.maximum(tp, 1) * 1.2
        avail = 141 * GB * gmu - W / tp - draft_w - act - 1.6 * GB
        K = np.maximum(avail, 1) / (kvb / tp)
        outside = (
            1.1 * GB
            + (tp > 1) * (0.9 + 0.25 * lg) * GB
            + seqs / 512 * 1.1 * GB
            + (k > 0) * 0.9 * GB
            + mnbt / 16384 * 1.3 * GB
        )
        # prefix cache: system prompt always hits, the turns only if the router finds the same replica and space
        turns = 0.27 * (0.35 + 0.65 / dp) * K / (K + 4.0e5)
        hit = np.where(pc, 0.22 + turns, 0.0)
        # kernels
        peak = np.where(fp8, 1979e12 * 0.50, np.where(awq, 990e12 * 0.50, 990e12 * 0.66)) * (1 - 0.05 * lg)
        bw = 4.8e12 * (0.80 - 0.035 * lg) * np.where(awq, 0.80, np.where(fp8, 0.94, 1.0))
        fl = 2 * 70.6e9
        ar = np.where(tp > 1, 160 * (7e-6 + 2.2e-6 * lg), 0)
        tcm = np.where(tp > 1, 160 * 8192 * 2 * 2 * (tp - 1) / tp / (450e9 * 0.70), 0)
        a = 0.70
        acc = np.where(k > 0, _chain(a, k) * np.where(awq, 0.965, 1.0), 1.0)
        draft = np.where(k > 0, k * (1.9e9 / tp / 3.4e12 + 0.00055) + 0.0009, 0)
        attn8 = np.where(kv8, 1.12, 1.0)  # dequantisation inside the attention kernel
        over = asy & (k == 0)  # async scheduling is silently switched off with drafts
        P = 2600 * (1 - hit)
        f = _F(
            self.n,
            rep=dp,
            imb=1 + 0.07 * (dp > 1) + 0.03 * (dp > 2),
            P=P,
            P99=11000 * (1 - 0.55 * hit),
            cv2=1.6,
            O=320,
            Os=100,
            acc=acc,
            vt=1 + k,
            budget=mnbt,
            seqs=seqs,
            K=K,
            ctx=2600 * (1 - 0.35 * hit) + 190,
            tw=W / tp / bw,
            tkv=(2600 + 160) * kvb / tp / (4.8e12 * 0.72) * attn8,
            tf=fl / tp / peak + 2600 * 80 * 64 * 128 * 2 / tp / 420e12 * attn8,
            tcm=tcm,
            lat=ar + 0.0011,
            draft=draft,
            cpu0=0.0028 + 0.0004 * (dp > 2),
            cps=np.where(k > 0, 2.2e-5, 1.4e-5),
            over=over,
            gmax=512,
            epen=0.0065,
            burst=1.15,
            luck=self.luck,
            luckc=self.luckc,
            gpus=tp * dp,
            price=3.8,
            ttft0=0.03,
        )
        need = np.maximum(11000 + 1024, 16384) * kvb / tp
        crashes = [
            (
                tp * dp > 8,
                lambda r: (
                    f"ValueError: World size ({int(tp[r] * dp[r])}) is larger than the number of "
                    f"available GPUs (8) in this node"
                ),
            ),
            (
                W / tp + draft_w > 139.5 * GB,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
                    "448.00 MiB. GPU 0 has a total capacity of 139.81 GiB of which 287.00 MiB is free."
                ),
            ),
            (
                avail <= 0,
                lambda r: (
                    "ValueError: No available memory for the cache blocks. Try increasing "
                    "`gpu_memory_utilization` when initializing the engine."
                ),
            ),
            (
                avail < need,
                lambda r: (
                    f"ValueError: To serve at least one request with the models's max seq len "
                    f"(16384), ({need[r] / 2**30:.2f} GiB KV cache is needed, which is larger than the available KV cache "
                    f"memory ({avail[r] / 2**30:.2f} GiB)."
                ),
            ),
            (
                141 * GB * (1 - gmu) < outside,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory during CUDA graph "
                    "capture. Tried to allocate 602.00 MiB."
                ),
            ),
            (
                awq & (k > 0) & kv8,
                lambda r: (
                    "RuntimeError: Worker failed with error 'fp8 kv cache with draft head "
                    "dtype torch.float16 is not supported by FLASH_ATTN'"
                ),
            ),
        ]
        return f, crashes

    def launch(self, p):
        t = 55 + {None: 95, "fp8": 55, "awq_marlin": 60}[p["quantization"]] + 6 * p["data_parallel_size"]
        return t + p["max_num_seqs"] / 512 * 25 + (30 if p["num_speculative_tokens"] else 0)

    def model(self, p, lam, k):
        tp, dp = p["tensor_parallel_size"], p["data_parallel_size"]
        if tp * dp > 8:
            raise Infeasible("needs more than 8 GPUs")
        W = {None: 141e9, "fp8": 71e9, "awq_marlin": 38e9}[p["quantization"]]
        peak = {None: 990e12, "fp8": 1979e12, "awq_marlin": 990e12}[p["quantization"]]
        kvb = 327680 * (0.5 if p["kv_cache_dtype"] == "fp8" else 1)
        free = 141e9 * p["gpu_memory_utilization"] - W / tp - k["reserve_gb"] * 1e9
        if free < 16384 * kvb / tp:
            raise Infeasible("no room for the KV cache")
        ns = p["num_speculative_tokens"]
        hit = min(k["hit"], 0.9) if p["enable_prefix_caching"] else 0
        return _roof(
            lam,
            2600 * (1 - hit),
            320,
            _chain(k["accept"], ns),
            1 + ns,
            min(p["max_num_seqs"], free * tp / kvb / 2760),
            W / tp / (4.8e12 * k["mbu"]),
            2760 * kvb / tp / (4.8e12 * k["mbu"]),
            141.2e9 / tp / (peak * k["mfu"]),
            k["step_s"],
            tp * dp,
            3.8,
            dp,
        )


# ====================================================================== 1: vLLM, Qwen2.5-Coder-14B, 4 x L4 over PCIe
class _VllmCodeL4(_Base):
    """Code completion on a PCIe box: AWQ on one card against TP/PP, prompt-lookup drafts, short outputs."""

    SEED = 12
    SPACE = dict(
        tensor_parallel_size=[1, 2, 4],
        pipeline_parallel_size=[1, 2],
        quantization=[None, "fp8", "awq", "awq_marlin"],
        max_num_seqs=[16, 32, 64, 128, 256],
        max_num_batched_tokens=[1024, 2048, 4096, 8192],
        gpu_memory_utilization=[0.8, 0.85, 0.9, 0.95],
        max_model_len=[8192, 16384, 32768],
        kv_cache_dtype=["auto", "fp8_e4m3"],
        enable_prefix_caching=[True, False],
        disable_custom_all_reduce=[False, True],
        ngram_speculative_tokens=[0, 4],
    )
    DEFAULT = dict(
        tensor_parallel_size=4,
        pipeline_parallel_size=1,
        quantization=None,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.9,
        max_model_len=32768,
        kv_cache_dtype="auto",
        enable_prefix_caching=True,
        disable_custom_all_reduce=False,
        ngram_speculative_tokens=0,
    )
    SLO = (4.0, 0.19)
    RATE = 0.4
    LOADS = [0.25, 0.5, 1, 1.75, 2.75, 4, 6]
    CONST = dict(mfu=0.5, mbu=0.8, step_s=0.004, hit=0.5, pcie_gbps=9.0, reserve_gb=1.5)

    def physics(self):
        tp, pp, k = self.v("tensor_parallel_size"), self.v("pipeline_parallel_size"), self.v("ngram_speculative_tokens")
        seqs, mnbt, gmu = self.v("max_num_seqs"), self.v("max_num_batched_tokens"), self.v("gpu_memory_utilization")
        mml = self.v("max_model_len")
        q = self.ix["quantization"]
        kv8 = self.is_("kv_cache_dtype", "fp8_e4m3")
        pc = self.is_("enable_prefix_caching", True)
        nocar = self.is_("disable_custom_all_reduce", True)
        W = self.pick("quantization", [29.6, 16.3, 10.1, 10.1]) * GB
        kvb = 196608 * np.where(kv8, 0.5, 1)
        lg = np.log2(tp)
        act = mnbt * (5120 * 2 * 8 + 13824 * 4 / tp) + seqs * (1 + k) * 152064 * 4 * 1.5 / tp
        avail = 23.6 * GB * gmu - W / tp / pp - act - 0.75 * GB
        K = np.maximum(avail, 1) / (kvb / tp / pp)
        outside = 0.35 * GB + (tp * pp > 1) * 0.35 * GB + seqs / 256 * 0.30 * GB + mnbt / 8192 * 0.15 * GB
        need = mml * kvb / tp / pp
        hit = np.where(pc, 0.30 + 0.34 * K / (K + 6e4), 0)
        # plain AWQ kernels dequantise the whole matrix when the batch is large; marlin keeps about fp16 speed
        peak = np.select([q == 0, q == 1, q == 2, q == 3], [121e12 * 0.60, 242e12 * 0.46, 121e12 * 0.30, 121e12 * 0.52])
        # L4 throttles at 72 W under sustained prefill
        peak = peak * 0.86 * (1 - 0.04 * lg)
        bw = 300e9 * np.select([q == 0, q == 1, q == 2, q == 3], [0.86, 0.83, 0.60, 0.79]) * (1 - 0.02 * lg)
        # all-reduce over PCIe through the host; the custom kernel only helps for 2 cards under one switch
        link = np.where(tp == 2, np.where(nocar, 10e9, 11.5e9), 7.0e9)
        tcm = np.where(tp > 1, 96 * 5120 * 2 * 2 * (tp - 1) / tp / link, 0) / pp
        lat = (
            0.0015
            + np.where(tp > 1, 96 * np.where((tp == 2) & ~nocar, 24e-6, 38e-6 + 9e-6 * lg), 0)
            + (pp > 1) * 0.0022
        )
        # prompt lookup: code repeats itself; the lookup itself is CPU work per sequence
        acc = np.where(k > 0, _chain(0.47, k), 1.0)
        attn8 = np.where(kv8, 1.30, 1.0)  # no FA3 on Ada: falls back to a slower backend
        P = 3500 * (1 - hit)
        f = _F(
            self.n,
            P=P,
            P99=7600 * (1 - 0.6 * hit),
            cv2=0.7,
            O=64,
            Os=28,
            acc=acc,
            vt=1 + k,
            budget=mnbt * pp,
            seqs=seqs,
            K=K,
            ctx=3500 * (1 - 0.45 * hit) + 40,
            tw=W / tp / bw * (1 + 0.06 * (pp > 1)),
            tkv=3530 * kvb / tp / pp / (300e9 * 0.78) * attn8,
            tf=(2 * 14.0e9 / tp / peak + 3500 * 48 * 5120 * 2 / tp / 48e12 * attn8) / pp * (1 + 0.13 * (pp > 1)),
            tcm=tcm,
            lat=lat,
            cpu0=0.0045 + 0.0012 * (pp > 1) + 0.0006 * lg,
            cps=np.where(k > 0, 1.1e-4, 2.5e-5),
            gmax=np.minimum(512, 2 * seqs + 1),
            epen=0.008,
            over=0,
            burst=1.3,
            luck=self.luck,
            luckc=self.luckc,
            gpus=tp * pp,
            price=0.95,
            ttft0=0.04,
        )
        crashes = [
            (
                tp * pp > 4,
                lambda r: (
                    f"ValueError: World size ({int(tp[r] * pp[r])}) is larger than the number of "
                    f"available GPUs (4) in this node"
                ),
            ),
            (
                (k > 0) & (pp > 1),
                lambda r: "NotImplementedError: Speculative decoding is not yet supported with pipeline parallelism.",
            ),
            (
                W / tp / pp > 22.3 * GB,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 136.00 "
                    "MiB. GPU 0 has a total capacity of 22.03 GiB of which 81.44 MiB is free."
                ),
            ),
            (
                avail <= 0,
                lambda r: (
                    "ValueError: No available memory for the cache blocks. Try increasing "
                    "`gpu_memory_utilization` when initializing the engine."
                ),
            ),
            (
                avail < need,
                lambda r: (
                    f"ValueError: To serve at least one request with the models's max seq len "
                    f"({int(mml[r])}), ({need[r] / 2**30:.2f} GiB KV cache is needed, which is larger than the available KV "
                    f"cache memory ({avail[r] / 2**30:.2f} GiB)."
                ),
            ),
            (
                23.6 * GB * (1 - gmu) < outside,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 296.00 MiB (capturing CUDA graphs)."
                ),
            ),
        ]
        return f, crashes

    def launch(self, p):
        return (
            48
            + {None: 60, "fp8": 42, "awq": 25, "awq_marlin": 32}[p["quantization"]]
            + 9 * p["tensor_parallel_size"] * p["pipeline_parallel_size"]
            + p["max_num_seqs"] / 256 * 30
        )

    def model(self, p, lam, k):
        tp, pp = p["tensor_parallel_size"], p["pipeline_parallel_size"]
        if tp * pp > 4:
            raise Infeasible("only 4 GPUs")
        W = {None: 29.5e9, "fp8": 15e9, "awq": 9.5e9, "awq_marlin": 9.5e9}[p["quantization"]]
        peak = 242e12 if p["quantization"] == "fp8" else 121e12
        kvb = 196608 * (0.5 if p["kv_cache_dtype"] != "auto" else 1)
        free = 24e9 * p["gpu_memory_utilization"] - W / tp / pp - k["reserve_gb"] * 1e9
        if free < 4000 * kvb / tp / pp:
            raise Infeasible("weights and one request do not fit")
        hit = min(k["hit"], 0.9) if p["enable_prefix_caching"] else 0
        comm = 96 * 5120 * 2 * 2 * (tp - 1) / tp / (k["pcie_gbps"] * 1e9)
        return _roof(
            lam,
            3500 * (1 - hit),
            64,
            1,
            1,
            min(p["max_num_seqs"], free * tp * pp / kvb / 3560),
            W / tp / (300e9 * k["mbu"]),
            3530 * kvb / tp / pp / (300e9 * k["mbu"]),
            (28e9 / tp / (peak * k["mfu"]) + comm) / pp,
            k["step_s"],
            tp * pp,
            0.95,
            tail=1.6,
        )


# ============================================= 2: vLLM, Mistral-Small-24B on a workstation, 2 x RTX 4090, CPU offload
class _VllmOffload(_Base):
    """A workstation where the weights barely fit: every offloaded GB is read over PCIe at each step."""

    SEED = 13
    SPACE = dict(
        tensor_parallel_size=[1, 2],
        quantization=[None, "fp8", "awq_marlin", "gptq"],
        cpu_offload_gb=[0, 2, 4, 8, 16],
        gpu_memory_utilization=[0.85, 0.9, 0.95],
        max_model_len=[4096, 8192, 16384],
        max_num_seqs=[8, 16, 32, 64],
        max_num_batched_tokens=[1024, 2048, 4096],
        enforce_eager=[False, True],
        kv_cache_dtype=["auto", "fp8"],
        enable_prefix_caching=[True, False],
    )
    DEFAULT = dict(
        tensor_parallel_size=2,
        quantization=None,
        cpu_offload_gb=2,
        gpu_memory_utilization=0.95,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enforce_eager=False,
        kv_cache_dtype="auto",
        enable_prefix_caching=True,
    )
    SLO = (6.0, 0.30)
    RATE = 0.12
    LOADS = [0.5, 1, 2, 4, 8, 14, 20]
    CONST = dict(mfu=0.5, mbu=0.8, step_s=0.004, h2d_gbps=22.0, reserve_gb=1.4)

    def physics(self):
        tp, off, gmu = self.v("tensor_parallel_size"), self.v("cpu_offload_gb"), self.v("gpu_memory_utilization")
        mml, seqs, mnbt = self.v("max_model_len"), self.v("max_num_seqs"), self.v("max_num_batched_tokens")
        q = self.ix["quantization"]
        eager, kv8 = self.is_("enforce_eager", True), self.is_("kv_cache_dtype", "fp8")
        pc = self.is_("enable_prefix_caching", True)
        W = self.pick("quantization", [47.2, 24.8, 14.3, 14.9]) * GB / tp
        offb = np.minimum(off * GB, 0.93 * W)  # per GPU; embeddings and head stay
        # whole layers are offloaded until the budget is passed
        layer = W * 0.94 / 40
        offb = np.where(offb > 0, np.ceil(offb / layer) * layer, 0)
        res = W - offb
        kvb = 163840 * np.where(kv8, 0.5, 1)
        act = mnbt * (5120 * 2 * 8 + 32768 * 4 / tp) + seqs * 131072 * 6 / tp + np.where(q == 3, 0.3, 0) * GB
        avail = 25.2 * GB * gmu - res - act - 0.7 * GB
        K = np.maximum(avail, 1) / (kvb / tp)
        need = mml * kvb / tp
        graph = np.where(eager, 0, 0.12 + seqs / 64 * 0.25) * GB
        outside = 0.36 * GB + graph + (tp > 1) * 0.38 * GB + mnbt / 4096 * 0.2 * GB
        hit = np.where(pc, 0.18 + 0.12 * K / (K + 5e4), 0)
        peak = np.select([q == 0, q == 1, q == 2, q == 3], [165e12 * 0.68, 330e12 * 0.42, 165e12 * 0.56, 165e12 * 0.26])
        bw = 1008e9 * np.select([q == 0, q == 1, q == 2, q == 3], [0.86, 0.84, 0.78, 0.60])
        # UVA reads: both cards share the root complex; 2 cards get less than twice
        h2d = np.where(tp > 1, 17.5e9, 23.5e9)
        link = 9.5e9
        tcm = np.where(tp > 1, 80 * 5120 * 2 / link, 0)
        lat = 0.0010 + np.where(tp > 1, 80 * 33e-6, 0)
        epen = np.where(q == 3, 0.014, 0.011)
        attn8 = np.where(kv8, 1.25, 1.0)
        f = _F(
            self.n,
            P=900 * (1 - hit),
            P99=3600 * (1 - 0.5 * hit),
            cv2=1.5,
            O=260,
            Os=80,
            budget=mnbt,
            seqs=seqs,
            K=K,
            ctx=900 * (1 - 0.4 * hit) + 140,
            tw=res / bw + offb / h2d * (1 + 0.07 * eager),
            tkv=1030 * kvb / tp / (1008e9 * 0.8) * attn8,
            tf=2 * 23.6e9 / tp / peak + 900 * 40 * 4096 * 2 / tp / 60e12,
            tcm=tcm,
            lat=lat + np.where(eager, epen, 0),
            cpu0=0.0032 + 0.0008 * (tp > 1),
            cps=3e-5,
            gmax=np.where(eager, 1e9, seqs * 2),
            epen=np.where(eager, 0.0, epen),
            burst=1.25,
            luck=self.luck,
            luckc=self.luckc,
            gpus=tp,
            price=0.48,
            ttft0=0.03,
        )
        crashes = [
            (
                res > 24.2 * GB,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 320.00 MiB. "
                    "GPU 0 has a total capacity of 23.52 GiB"
                ),
            ),
            (
                off * tp * GB + 8 * GB > 56 * GB,
                lambda r: (
                    "RuntimeError: CUDA error: out of memory (cudaHostAlloc: pinned memory limit of the container)"
                ),
            ),
            (
                avail <= 0,
                lambda r: (
                    "ValueError: No available memory for the cache blocks. Try increasing "
                    "`gpu_memory_utilization` when initializing the engine."
                ),
            ),
            (
                avail < need,
                lambda r: (
                    f"ValueError: To serve at least one request with the models's max seq len "
                    f"({int(mml[r])}), ({need[r] / 2**30:.2f} GiB KV cache is needed, which is larger than the available KV "
                    f"cache memory ({avail[r] / 2**30:.2f} GiB). Try decreasing `max_model_len`."
                ),
            ),
            (
                25.2 * GB * (1 - gmu) < outside,
                lambda r: (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to "
                    "allocate 160.00 MiB. (graph capture; the display server holds 0.4 GiB)"
                ),
            ),
        ]
        return f, crashes

    def launch(self, p):
        t = 40 + {None: 70, "fp8": 60, "awq_marlin": 30, "gptq": 34}[p["quantization"]]
        return t + 1.5 * p["cpu_offload_gb"] + (0 if p["enforce_eager"] else 22 + p["max_num_seqs"] / 4)

    def model(self, p, lam, k):
        tp = p["tensor_parallel_size"]
        W = {None: 47e9, "fp8": 23.6e9, "awq_marlin": 12.5e9, "gptq": 12.5e9}[p["quantization"]] / tp
        off = min(p["cpu_offload_gb"] * 1e9, W)
        free = 25e9 * p["gpu_memory_utilization"] - (W - off) - k["reserve_gb"] * 1e9
        kvb = 163840
        if free < p["max_model_len"] * kvb / tp:
            raise Infeasible("one request of the maximum length does not fit")
        peak = 330e12 if p["quantization"] == "fp8" else 165e12
        return _roof(
            lam,
            900,
            260,
            1,
            1,
            min(p["max_num_seqs"], free * tp / kvb / 1160),
            (W - off) / (1008e9 * k["mbu"]) + off / (k["h2d_gbps"] * 1e9),
            1030 * kvb / tp / (1008e9 * k["mbu"]),
            47.2e9 / tp / (peak * k["mfu"]),
            k["step_s"],
            tp,
            0.48,
            tail=1.25,
        )


# ========================================================= 3: SGLang, Qwen3-235B-A22B-FP8, 8 x H100, agents
class _SglangMoE(_Base):
    """Big MoE: expert parallelism, DP attention, DeepEP, graph limits, memory fraction and run-time OOM."""

    SEED = 14
    SPACE = dict(
        tp_size=[4, 8],
        ep_size=[1, 2, 4, 8],
        dp_size=[1, 2, 4, 8],
        moe_a2a_backend=["none", "deepep"],
        mem_fraction_static=[0.78, 0.82, 0.86, 0.9, 0.93],
        chunked_prefill_size=[2048, 4096, 8192, 16384],
        max_running_requests=[64, 128, 256, 512],
        schedule_conservativeness=[0.3, 1.0, 1.5],
        attention_backend=["fa3", "flashinfer", "triton"],
        cuda_graph_max_bs=[32, 128, 256],
    )
    DEFAULT = dict(
        tp_size=8,
        ep_size=8,
        dp_size=1,
        moe_a2a_backend="none",
        mem_fraction_static=0.86,
        chunked_prefill_size=8192,
        max_running_requests=256,
        schedule_conservativeness=1.0,
        attention_backend="fa3",
        cuda_graph_max_bs=256,
    )
    SLO = (5.0, 0.080)
    RATE = 2.0
    LOADS = [0.75, 1, 1.4, 1.9, 2.3, 2.7]
    CONST = dict(mfu=0.18, mbu=0.55, step_s=0.012, hit=0.36, reserve_gb=3.0)

    def physics(self):
        tp, ep0, dp = self.v("tp_size"), self.v("ep_size"), self.v("dp_size")
        dee = self.is_("moe_a2a_backend", "deepep")
        mfs, chunk, mrr = self.v("mem_fraction_static"), self.v("chunked_prefill_size"), self.v("max_running_requests")
        cons, gbs = self.v("schedule_conservativeness"), self.v("cuda_graph_max_bs")
        ab = self.ix["attention_backend"]
        ep = np.where(dee, tp, ep0)  # DeepEP sets ep to tp
        atp = tp / np.minimum(dp, tp)  # attention tensor parallel
        Watt = 6.9 * GB / atp + 1.3 * GB  # dp attention replicates attention weights
        Wexp = 228.5 * GB / tp
        W = Watt + Wexp
        kvb = 192512 / np.minimum(atp, 4)  # 4 KV heads: tp 8 replicates them
        pool = 84.9 * GB * mfs - W - 0.6 * GB
        Kr = np.maximum(pool, 1) / kvb  # tokens per attention rank
        K = Kr * dp  # all ranks together
        cpr = chunk / dp  # SGLang divides the chunk by dp
        rest = 84.9 * GB * (1 - mfs) - 1.6 * GB - 0.25 * GB * (tp == 8)
        graph = 0.4 * GB + gbs / 256 * 1.5 * GB
        buf = np.where(dee, 1.9 * GB, 0) + np.select([ab == 0, ab == 1, ab == 2], [0.1, 0.75, 0.2]) * GB
        actv = (
            cpr * (4096 * 2 * 10 + 8192 * 2 * 3 / atp)
            + np.where(dee, cpr, chunk) * 8 * 4096 * 2 * 1.1 / np.where(ep > 1, 1.5, 1)
            + 0.2 * GB
        )
        # run-time OOM: the activation peak meets logits and expert imbalance when the batch is large
        left = rest - graph - buf - 0.45 * actv
        boom = np.where(left < 1.2 * GB, 12 + np.maximum(left, 0) / (1.2 * GB) * 420, 1e12)
        hit = 0.55 * (0.45 + 0.55 / np.sqrt(dp)) * (0.55 + 0.45 * K / (K + 8e5))
        # expert compute: imbalance of EP, small shards of MoE TP
        mtp = tp / ep
        inter = 1536 / mtp
        imb = 1 + 0.10 * np.log2(ep) * np.where(dee, 0.8, 1.0)
        moe_eff = np.select([mtp >= 8, mtp >= 4, mtp >= 2], [0.55, 0.80, 0.92], 1.0)
        bw = 3.35e12 * 0.70
        akv = np.select([ab == 0, ab == 1, ab == 2], [1.0, 1.05, 1.25])
        apre = np.select([ab == 0, ab == 1, ab == 2], [1.0, 1.10, 1.45])
        # flops per token over the whole group: experts 15.1e9*2 spread on tp, attention on atp for its own tokens
        tf_exp = 2 * 14.2e9 / tp / (1979e12 * 0.30) * imb / moe_eff
        tf_att = (2 * 6.9e9 / (1979e12 * 0.42) + 6000 * 94 * 8192 * 2 / 380e12 * apre) / tp
        # communication
        hid = 4096 * 2.0
        ar_tok = np.where(dp > 1, 94 * 2 * hid * (tp - 1) / tp * 1.15 / 300e9, 188 * hid * 2 * (tp - 1) / tp / 300e9)
        a2a_tok = 94 * hid * 8 * 0.75 * (ep - 1) / ep / tp / 190e9 + 94 * hid / tp / 300e9
        tcm = np.where(dee, a2a_tok + 94 * np.where(atp > 1, hid * 2 / dp / 300e9, 0), ar_tok)
        lat = 94 * (np.where(dee, 46e-6, 2 * (9e-6 + 1.6e-6 * np.log2(tp))) + 15e-6) + np.where(dp > 1, 94 * 5e-6, 0)
        skew = np.where(dp > 1, 1 + 0.035 * np.log2(dp), 1.0)  # ranks wait for the slowest one
        adm = np.select([cons < 0.5, cons < 1.2], [0.99, 0.90], 0.78)
        pre = np.select([cons < 0.5, cons < 1.2], [1.5, 0.5], 0.1)
        # graphs are per rank
        gmax = gbs * dp
        P = 6000 * (1 - hit)
        f = _F(
            self.n,
            P=P,
            P99=24000 * (1 - 0.7 * hit),
            cv2=2.0,
            O=500,
            Os=140,
            budget=chunk,
            seqs=mrr,
            K=K,
            ctx=6000 * (1 - 0.5 * hit) + 300,
            adm=adm,
            preempt=pre,
            mixed=0,
            tw=Watt / bw,
            twx=Wexp / bw / np.sqrt(moe_eff),
            lnk=math.log(1 - 8 / 128),
            tkv=6250 * kvb / dp / (3.35e12 * 0.72) * akv * skew,
            tf=(tf_exp + tf_att) * skew,
            tcm=tcm,
            lat=lat * skew,
            cpu0=0.0026 + 0.0006 * (dp > 1),
            cps=1.3e-5,
            over=1,
            gmax=gmax,
            epen=0.026,
            burst=1.25,
            luck=self.luck,
            luckc=self.luckc,
            gpus=tp,
            price=2.6,
            ttft0=0.05,
            boom=boom,
        )
        crashes = [
            (
                (ep > tp) | (dp > tp),
                lambda r: (
                    f"AssertionError: tp_size ({int(tp[r])}) must be divisible by "
                    f"{'ep_size' if ep[r] > tp[r] else 'dp_size'}"
                ),
            ),
            (
                (inter % 128 != 0),
                lambda r: (
                    f"ValueError: The output_size of gate's and up's weight = {int(inter[r])} "
                    f"is not divisible by weight quantization block_n = 128."
                ),
            ),
            (
                dee & (gbs > 128),
                lambda r: (
                    "AssertionError: x.size(0) <= num_max_dispatch_tokens_per_rank "
                    "(deep_ep.cpp, low-latency dispatch, 256 > 128)"
                ),
            ),
            (
                pool < 20000 * kvb,
                lambda r: "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            ),
            (
                rest - graph - buf < 0,
                lambda r: (
                    "Exception: Capture cuda graph failed: CUDA out of memory. Possible "
                    "solutions: 1. set --mem-fraction-static to a smaller value (e.g., 0.8 or 0.7) 2. set "
                    "--cuda-graph-max-bs to a smaller value (e.g., 16)"
                ),
            ),
        ]
        self.boom_msg = (
            "torch.OutOfMemoryError: CUDA out of memory in forward_extend (scheduler hit an exception; "
            "prefill out of memory, try a smaller --chunked-prefill-size)"
        )
        return f, crashes

    def launch(self, p):
        t = 150 + (75 if p["tp_size"] == 4 else 0) + p["cuda_graph_max_bs"] / 256 * 60
        return t + (70 if p["moe_a2a_backend"] == "deepep" else 0) + (25 if p["attention_backend"] == "triton" else 0)

    def model(self, p, lam, k):
        tp, dp = p["tp_size"], p["dp_size"]
        if dp > tp or p["ep_size"] > tp:
            raise Infeasible("groups larger than tp")
        atp = tp / dp
        W = 229e9 / tp + 7e9 / atp
        kvb = 192512 / min(atp, 4)
        pool = 82e9 * p["mem_fraction_static"] - W - k["reserve_gb"] * 1e9
        if pool < 30000 * kvb:
            raise Infeasible("KV pool too small")
        hit = min(k["hit"], 0.9)
        bw = 3.35e12 * k["mbu"]
        return _roof(
            lam,
            6000 * (1 - hit),
            500,
            1,
            1,
            min(p["max_running_requests"], pool / kvb * dp / 6500),
            W / bw,
            6250 * kvb / dp / bw,
            44e9 / tp / (1979e12 * k["mfu"]),
            k["step_s"],
            tp,
            2.6,
            tail=1.4,
        )


# ======================================================================= 4: TensorRT-LLM, CodeLlama-34B, 4 x A100-40GB
class _TrtllmA100(_Base):
    """Engine builds on Ampere: int8 against int4, static activation buffers, in-flight batching policies."""

    SEED = 15
    SPACE = dict(
        qformat=["float16", "int8_wo", "int8_sq", "int4_awq"],
        tp_size=[1, 2, 4],
        pp_size=[1, 2],
        max_batch_size=[16, 32, 64, 128, 256],
        max_num_tokens=[2048, 4096, 8192, 16384],
        kv_cache_free_gpu_mem_fraction=[0.7, 0.85, 0.9, 0.95],
        kv_cache_dtype=["float16", "int8"],
        batch_scheduler_policy=["guaranteed_no_evict", "max_utilization"],
        enable_chunked_context=[False, True],
        multiple_profiles=[False, True],
    )
    DEFAULT = dict(
        qformat="float16",
        tp_size=4,
        pp_size=1,
        max_batch_size=256,
        max_num_tokens=8192,
        kv_cache_free_gpu_mem_fraction=0.9,
        kv_cache_dtype="float16",
        batch_scheduler_policy="guaranteed_no_evict",
        enable_chunked_context=False,
        multiple_profiles=False,
    )
    SLO = (4.0, 0.072)
    RATE = 0.8
    LOADS = [0.5, 1, 2, 3, 4, 5, 6.5]
    CONST = dict(mfu=0.5, mbu=0.75, step_s=0.003, nvlink_gbps=150.0, workspace_gb=2.5)

    def physics(self):
        q = self.ix["qformat"]
        tp, pp, mbs = self.v("tp_size"), self.v("pp_size"), self.v("max_batch_size")
        mnt, frac = self.v("max_num_tokens"), self.v("kv_cache_free_gpu_mem_fraction")
        kv8 = self.is_("kv_cache_dtype", "int8")
        maxu = self.is_("batch_scheduler_policy", "max_utilization")
        # paged context FMHA does not know int8 KV: the builder warns and switches chunked context off
        chunk, prof = self.is_("enable_chunked_context", True) & ~kv8, self.is_("multiple_profiles", True)
        lg = np.log2(tp)
        W = self.pick("qformat", [67.6, 34.6, 34.9, 19.2]) * GB / tp / pp
        kvb = 196608 * np.where(kv8, 0.5, 1)
        # activations are allocated at engine load for the largest profile
        act = mnt * (8192 * 2 * 6 + 22016 * 4 / tp) * (1 + 0.30 * prof) + mbs * 32000 * 4 * 4 + 0.35 * GB
        free = 42.2 * GB - W - act - 0.9 * GB - (tp * pp > 1) * 0.6 * GB
        pool = np.maximum(free, 0) * frac
        K = np.maximum(pool, 1) / (kvb / tp / pp)
        slack = np.maximum(free, 0) * (1 - frac)
        # sampling and gather buffers that come after the KV pool
        late = 0.12 * GB + mbs / 256 * 0.55 * GB + mnt / 16384 * 0.45 * GB
        # int8 SQ gets the tensor cores at int8; weight-only dequantises in the GEMM and is bad in prefill
        peak = np.select([q == 0, q == 1, q == 2, q == 3], [312e12 * 0.66, 312e12 * 0.44, 624e12 * 0.50, 312e12 * 0.50])
        peak = peak * (1 - 0.045 * lg)
        bw = 1.555e12 * np.select([q == 0, q == 1, q == 2, q == 3], [0.84, 0.78, 0.82, 0.70]) * (1 - 0.03 * lg)
        tcm = np.where(tp > 1, 96 * 8192 * 2 * 2 * (tp - 1) / tp / 185e9, 0) / pp
        lat = 0.0011 + np.where(tp > 1, 96 * (9e-6 + 2e-6 * lg), 0) + (pp > 1) * 0.0011
        # one optimisation profile: kernels tuned for max_num_tokens; small batches suffer
        tune = np.where(prof, 1.0, 1 + 0.035 * np.log2(mnt / 2048) + 0.02 * np.log2(mbs / 16))
        wo_big = np.where((q == 1) | (q == 3), 1.12, 1.0)
        # the no-evict scheduler reserves prompt and the maximum output
        ctx = np.where(maxu, 1800 + 230, 1800 + 900)
        preempt = np.where(maxu, 1.6, 0.0)
        attn8 = np.where(kv8, 1.08, 1.0)
        P99 = 5200.0
        f = _F(
            self.n,
            P=1800,
            P99=P99,
            cv2=1.0,
            O=420,
            Os=130,
            budget=mnt * pp,
            seqs=mbs * np.where(pp > 1, 1.0, 1),
            K=K,
            ctx=ctx,
            adm=0.99,
            preempt=preempt,
            mixed=chunk,
            tw=W * pp / bw * tune,
            tkv=2010 * kvb / tp / pp / (1.555e12 * 0.75) * attn8,
            tf=(2 * 33.7e9 / tp / peak + 1800 * 48 * 8192 * 2 / tp / 130e12)
            / pp
            * (1 + 0.15 * (pp > 1))
            * (1 + 0.04 * chunk)
            * wo_big,
            tcm=tcm,
            lat=lat,
            cpu0=0.0014,
            cps=1.1e-5,
            over=0,
            gmax=1e9,
            burst=1.1,
            luck=self.luck,
            luckc=self.luckc,
            gpus=tp * pp,
            price=1.55,
            ttft0=0.015,
        )
        crashes = [
            (
                tp * pp > 4,
                lambda r: (
                    f"RuntimeError: [TensorRT-LLM][ERROR] Assertion failed: mpiSize == tp * pp "
                    f"(world size {int(tp[r] * pp[r])}, devices 4)"
                ),
            ),
            (
                free < 0,
                lambda r: (
                    f"[TensorRT-LLM][ERROR] IExecutionContext::createExecutionContext: Error Code 2: "
                    f"OutOfMemory (requested {(W[r] + act[r]) / GB:.1f} GB, no memory for weights and activations)"
                ),
            ),
            (
                ~chunk & (mnt < 4096) & ~prof & (mbs > 128),
                lambda r: (
                    "ValueError: max_num_tokens (2048) shouldn't be "
                    "less than max_input_len when chunked context is off and max_batch_size is 256: no valid optimisation "
                    "profile"
                ),
            ),
            (
                K < 6400,
                lambda r: (
                    f"[TensorRT-LLM][ERROR] maxTokensInPagedKvCache ({int(K[r])}) must be large enough to "
                    f"process at least 1 sequence to completion (8192)"
                ),
            ),
            (
                slack < late,
                lambda r: (
                    "[TensorRT-LLM][ERROR] CUDA runtime error in cudaMallocAsync: out of memory (decoder buffers)"
                ),
            ),
            (
                (q == 2) & (pp > 1) & prof,
                lambda r: (
                    "[TensorRT] Error Code 10: Could not find any implementation for "
                    "node smooth_quant_gemm (multiple profiles)"
                ),
            ),
        ]
        # without chunked context a prompt longer than max_num_tokens is cut by the front end to two requests
        self.long = (~chunk) & (mnt < P99)
        return f, crashes

    def run(self, g, lam, rows):
        o = _serve(g, lam)
        o["ttft"] = o["ttft"] * np.where(self.long[rows], 1.25, 1.0)
        return o

    def launch(self, p):
        build = {"float16": 210, "int8_wo": 300, "int8_sq": 520, "int4_awq": 430}[p["qformat"]]
        build *= (2.1 if p["multiple_profiles"] else 1.0) / p["tp_size"] ** 0.3
        return 60 + build + p["max_num_tokens"] / 16384 * 60

    def model(self, p, lam, k):
        tp, pp = p["tp_size"], p["pp_size"]
        if tp * pp > 4:
            raise Infeasible("only 4 GPUs")
        W = {"float16": 67.4e9, "int8_wo": 33.7e9, "int8_sq": 33.7e9, "int4_awq": 17.5e9}[p["qformat"]] / tp / pp
        peak = 624e12 if p["qformat"] == "int8_sq" else 312e12
        kvb = 196608 * (0.5 if p["kv_cache_dtype"] == "int8" else 1)
        pool = (40e9 - W - k["workspace_gb"] * 1e9) * p["kv_cache_free_gpu_mem_fraction"]
        if pool < 8192 * kvb / tp / pp:
            raise Infeasible("not one sequence fits")
        bw = 1.555e12 * k["mbu"]
        comm = 96 * 8192 * 2 * 2 * (tp - 1) / tp / (k["nvlink_gbps"] * 1e9)
        return _roof(
            lam,
            1800,
            420,
            1,
            1,
            min(p["max_batch_size"], pool * tp * pp / kvb / 2220),
            W * pp / bw,
            2010 * kvb / tp / pp / bw,
            (67.4e9 / tp / (peak * k["mfu"]) + comm) / pp,
            k["step_s"],
            tp * pp,
            1.55,
            tail=1.35,
        )


# ================================================ 5: home-grown launcher, prefill/decode split, Qwen2.5-32B, 16 x H20
class _HomeSplit(_Base):
    """Prefill and decode pools on H20 (much bandwidth, few flops): the balance of np:nd, transfers, drafts."""

    SEED = 16
    SPACE = dict(
        np=[1, 2, 3, 4],
        nd=[1, 2, 3, 4],
        ptp=[1, 2, 4],
        dtp=[1, 2, 4],
        wq=["b16", "f8", "w4"],
        kq=[16, 8],
        dbs=[32, 64, 128, 256],
        pck=[4096, 8192, 16384],
        sd=[0, 1, 3],
        xf=["tcp", "rdma"],
    )
    DEFAULT = dict(np=2, nd=2, ptp=4, dtp=4, wq="b16", kq=16, dbs=128, pck=8192, sd=0, xf="rdma")
    SLO = (6.0, 0.045)
    RATE = 1.5
    LOADS = [0.5, 1, 1.5, 2.2, 3, 4, 5.5]
    CONST = dict(mfu=0.55, mbu=0.75, step_s=0.004, accept=0.6, reserve_gb=6.0)
    ACCEPT = ("accept",)

    def physics(self):
        np_, nd, ptp, dtp = self.v("np"), self.v("nd"), self.v("ptp"), self.v("dtp")
        kq, dbs, pck, sd = self.v("kq"), self.v("dbs"), self.v("pck"), self.v("sd")
        q = self.ix["wq"]
        rdma = self.is_("xf", "rdma")
        W = self.pick("wq", [65.6, 34.2, 20.1]) * GB
        kvb = 262144 * kq / 16
        peak = np.select([q == 0, q == 1, q == 2], [148e12 * 0.78, 296e12 * 0.64, 148e12 * 0.58])
        bw = 4.0e12 * np.select([q == 0, q == 1, q == 2], [0.80, 0.76, 0.60])
        poolp = 0.9 * 102.4 * GB - W / ptp - pck * (5120 * 2 * 9 + 27648 * 4 / ptp) - 3 * GB * rdma - 2 * GB
        poold = (
            0.9 * 102.4 * GB
            - W / dtp
            - dbs * (1 + sd) * 152064 * 6 / dtp
            - (2.2 * GB + dbs / 256 * 1.5 * GB)
            - 3 * GB * rdma
            - (sd > 0) * 1.2 * GB
        )
        K = np.maximum(poold, 1) / (kvb / dtp)
        ld = np.log2(dtp)
        # prefill pool
        lp = np.log2(ptp)
        self.pt = (
            2 * 32.8e9 / ptp / (peak * (1 - 0.03 * lp))
            + np.where(ptp > 1, 128 * 5120 * 2 * 2 * (ptp - 1) / ptp / 230e9, 0)
        ) * self.luck
        self.pat = 64 * 5120 * 2 / ptp / (148e12 * 0.55) * self.luck  # attention: times the context per token
        self.pfix = (0.006 + W / ptp / bw * 0.15) * self.luck  # per chunk
        self.kvtok = kvb
        # transfer: per prefill worker; tcp is limited per host, and 8 bit halves it; different tp must reshard
        rate = np.where(rdma, 11e9 * np.minimum(ptp, dtp) ** 0.8, 1.6e9 + 0.3e9 * (ptp > 1))
        self.xrate = rate * np.where(ptp != dtp, 0.7, 1.0)
        self.pnp, self.ppck = np_, pck
        acc = np.where(sd > 0, _chain(np.select([sd == 1, sd == 3], [0.72, 0.62], 0), sd), 1.0)
        attn8 = np.where(kq == 8, 1.10, 1.0)
        f = _F(
            self.n,
            rep=nd,
            imb=1 + 0.04 * (nd > 1),
            P=1e-6,
            P99=1.0,
            O=380,
            Os=120,
            acc=acc,
            vt=1 + sd,
            budget=1e5,
            seqs=dbs,
            K=K,
            ctx=3000 + 230,
            adm=0.95,
            preempt=0.7,
            mixed=1,
            tw=W / dtp / bw,
            tkv=3190 * kvb / dtp / (4.0e12 * 0.74) * attn8 * (1 + 0.04 * sd),
            tf=2 * 32.8e9 / dtp / peak,
            tcm=np.where(dtp > 1, 128 * 5120 * 2 * 2 * (dtp - 1) / dtp / 230e9, 0),
            lat=0.0012 + np.where(dtp > 1, 128 * (8e-6 + 2e-6 * ld), 0),
            draft=np.where(sd > 0, 0.0008 + 0.0011 * sd, 0),
            cpu0=0.0022,
            cps=np.where(rdma, 1.6e-5, 3.2e-5),
            over=0,
            gmax=256,
            epen=0.007,
            burst=1.2,
            luck=self.luck,
            luckc=self.luckc,
            gpus=np_ * ptp + nd * dtp,
            price=1.35,
            ttft0=0.06,
        )
        used = np_ * ptp + nd * dtp
        crashes = [
            (used > 16, lambda r: f"launcher: pool exhausted: want {int(used[r])} gpus, have 16"),
            (
                (ptp > dtp) & (kq == 8),
                lambda r: (
                    f"kvx: reshard {int(ptp[r])}->{int(dtp[r])} not implemented for 8-bit pages (scales are per shard)"
                ),
            ),
            (
                (poold < 9500 * kvb / dtp) | (poolp < 2 * 9500 * kvb / ptp),
                lambda r: f"worker exited with 137: kv pool {poold[r] / GB:.1f} GB below the minimum of one request",
            ),
            (
                rdma & (K * kvb / dtp > 79.5 * GB),
                lambda r: (
                    "ibv_reg_mr failed: Cannot allocate memory (registering "
                    f"{K[r] * kvb[r] / dtp[r] / 2**30:.0f} GiB; raise the memlock limit)"
                ),
            ),
        ]
        return f, crashes

    def run(self, g, lam, rows):
        pt, pat, pfix = self.pt[rows], self.pat[rows], self.pfix[rows]
        m, pck = self.pnp[rows], self.ppck[rows]

        def work(P):
            return P * pt + pat * P * P / 2 + np.ceil(P / pck) * pfix

        x = 3000 * self.kvtok[rows] / self.xrate[rows]
        s1 = work(3000.0) * 1.05
        # small chunks let short prompts overtake; huge ones block the head of the line
        block = 1 + 0.18 * np.log2(pck / 4096)
        rp = lam * s1 / m
        rx = lam / m * x
        r = np.clip(rp, 0, 0.995)
        wq = r ** np.sqrt(2 * (m + 1)) / (1 - r) * s1 / m * 1.3 * 3.8 * block
        rxx = np.clip(rx, 0, 0.99)
        wx = rxx / (1 - rxx) * x * 2.5
        # the decode pool sees no more than the prefill pool and the wire let through
        thr = np.minimum(1.0, 1 / np.maximum(np.maximum(rp, rx), 1e-9))
        o = _serve(g, lam * 1.0)
        rho = np.maximum(o["rho"], np.maximum(rp, rx))
        o2 = _serve(g, lam * thr.clip(0.05, 1)) if (thr < 1).any() else o
        over = np.where(np.maximum(rp, rx) > 1, TRACE_S * 0.95 * (1 - 1 / np.maximum(np.maximum(rp, rx), 1)), 0)
        tpot = o2["tpot"]
        # tcp receive copies steal SM time from decode
        tpot = tpot * (1 + np.where(self.is_("xf", "tcp")[rows], 0.04 + 0.10 * rxx, 0.0))
        ttft = o2["ttft"] + work(9000.0) + wq + 3 * x + wx + over
        e2e = s1 + x + 0.3 * (wq + wx) + 380 * tpot * 0.9
        make = TRACE_S * np.maximum(1, rho) + 2 * e2e
        cost = g.gpus * g.price / 3600 * make / (lam * TRACE_S * 380) * 1e6 * g.luckc
        return dict(cost=cost, tpot=tpot, ttft=ttft, B=o2["B"], rho=rho)

    def launch(self, p):
        return (
            70 + {"b16": 60, "f8": 38, "w4": 45}[p["wq"]] + 4 * (p["np"] + p["nd"]) + (35 if p["xf"] == "rdma" else 0)
        )

    def model(self, p, lam, k):
        gpus = p["np"] * p["ptp"] + p["nd"] * p["dtp"]
        if gpus > 16:
            raise Infeasible("more than 16 GPUs")
        W = {"b16": 65.6e9, "f8": 32.8e9, "w4": 17e9}[p["wq"]]
        peak = 296e12 if p["wq"] == "f8" else 148e12
        kvb = 262144
        free = 96e9 - W / p["dtp"] - k["reserve_gb"] * 1e9
        if free < 9000 * kvb / p["dtp"]:
            raise Infeasible("decode worker has no KV memory")
        acc, bw, dtp = _chain(k["accept"], p["sd"]), 4e12 * k["mbu"], p["dtp"]
        s1 = 3000 * 65.6e9 / p["ptp"] / (peak * k["mfu"])
        cap = p["np"] / s1
        o = _roof(
            min(lam, cap),
            0.0,
            380,
            acc,
            1 + p["sd"],
            min(p["dbs"], free * dtp / kvb / 3200),
            W / dtp / bw,
            3190 * kvb / dtp / bw,
            65.6e9 / dtp / (peak * k["mfu"]),
            k["step_s"],
            gpus,
            1.35,
            p["nd"],
        )
        rho = min(lam / cap, 0.98)
        o["ttft_p99_s"] += s1 * 2.5 + rho**2 / (1 - rho) * s1 + (TRACE_S * (1 - cap / lam) if lam > cap else 0)
        return o


_WORLDS = [_VllmChat70B, _VllmCodeL4, _VllmOffload, _SglangMoE, _TrtllmA100, _HomeSplit]
_CACHE = {}


def _world(i, lucky=True):
    if (i, lucky) not in _CACHE:
        _CACHE[i, lucky] = _WORLDS[i](lucky)
    return _CACHE[i, lucky]


# ----------------------------------------------------------------------------------------------- public interface
class scenario:
    def __init__(self, index):
        self.index = index
        self._w = _world(index)
        self.LOADS = list(self._w.LOADS)

    def space(self):
        return {k: list(v) for k, v in self._w.SPACE.items()}

    def default(self, _=None):
        return dict(self._w.DEFAULT)

    def slos(self, _=None):
        return dict(ttft_p99_s=self._w.SLO[0], tpot_p99_s=self._w.SLO[1])

    def grid_index(self, params):
        row = 0
        for name, values in self._w.SPACE.items():
            x = params[name]
            at = next((i for i, v in enumerate(values) if type(v) is type(x) and v == x), None)
            if at is None:
                at = values.index(x)
            row = row * len(values) + at
        return row

    def truth_grid(self, _=None, lucky=False):
        return _world(self.index, lucky).grid()[:4]

    def measure(self, params, load, _=None, rng=None):
        w = self._w
        row = self.grid_index(params)
        _f, code, msgs = w.build()
        if code[row]:
            raise Infeasible(msgs[code[row] - 1](row))
        good, o = w.rows_at(np.array([row]), load)
        if not good[0]:
            raise Infeasible(w.boom_msg)
        e = np.exp(0.05 * rng.normal(size=3)) if rng is not None else np.ones(3)
        return dict(
            cost_usd_per_mtok_output=float(o["cost"][0] * e[0]),
            ttft_p99_s=float(o["ttft"][0] * e[1]),
            tpot_p99_s=float(o["tpot"][0] * e[2]),
        )

    def launch_s(self, params, _=None):
        return float(self._w.launch(params))

    def predictor(self, _=None, kind="right", seed=0):
        w = self._w
        if kind not in ("right", "30%", "badly"):
            raise ValueError(kind)
        rng = np.random.default_rng([901, self.index, seed, ("right", "30%", "badly").index(kind)])
        sd = {"right": 0.0, "30%": 0.3, "badly": 0.6}[kind]
        const = {k: float(v * np.exp(sd * rng.normal())) for k, v in w.CONST.items()}
        lat, mon = {}, {}
        if kind == "badly":
            for k in w.ACCEPT:
                const[k] *= 0.5
            for name, values in w.SPACE.items():
                lat[name] = [(v, float(np.exp(0.35 * rng.normal()))) for v in values]
                mon[name] = [(v, float(np.exp(0.35 * rng.normal()))) for v in values]
        rate = w.RATE

        def factor(table, config):
            out = 1.0
            for name, pairs in table.items():
                x = config[name]
                out *= next((g for v, g in pairs if v == x and type(v) is type(x)), None) or next(
                    g for v, g in pairs if v == x
                )
            return out

        def core(config, load, constants):
            o = w.model(config, rate * load, constants)
            if lat:
                fl, fm = factor(lat, config), factor(mon, config)
                o = dict(
                    cost_usd_per_mtok_output=o["cost_usd_per_mtok_output"] * fm,
                    ttft_p99_s=o["ttft_p99_s"] * fl,
                    tpot_p99_s=o["tpot_p99_s"] * fl,
                )
            return {k: float(v) for k, v in o.items()}

        sig = ", ".join(f"{k}={v!r}" for k, v in const.items())
        body = ", ".join(f"{k}={k}" for k in const)
        scope = dict(_core=core)
        exec(f"def predict(config, load, *, {sig}):\n    return _core(config, load, dict({body}))\n", scope)
        return scope["predict"]


SCENARIOS = [scenario(i) for i in range(len(_WORLDS))]
