# ruff: noqa: E501, B905, E741, RUF059, UP031
"""Six worlds of LLM serving on vLLM, SGLang, TensorRT-LLM, LMDeploy, llama.cpp and a launcher on Ray Serve of somebody's own,
under the names that their documentation has."""

import functools

import numpy as np

from tuner import Infeasible

GIB = 1024.0**3
NAMES = [
    "vllm-qwen3-32b-chat-h100",
    "sglang-deepseek-v3-agents-h200",
    "trtllm-qwen3-30b-a3b-code-h100",
    "lmdeploy-qwen2.5-32b-rag-a100",
    "llamacpp-qwen3-14b-chat-4090",
    "rayserve-llama3.3-70b-agents-h100",
]


def e(a):
    return np.asarray(a, float)[:, None]


def T(col, table):
    """table look-up of a column (values -> numbers)."""
    out = np.zeros(len(col))
    for k, v in table.items():
        out = np.where(col == k, v, out)
    return out


def W(cond, a, b):
    return np.where(cond, a, b)


def roof(mem, comp):
    return np.maximum(mem, comp) + 0.22 * np.minimum(mem, comp)


def accepted(alpha, k):
    alpha = np.clip(alpha, 0.0, 0.98)
    return (1 - alpha ** (k + 1)) / (1 - alpha)


class World:
    LOADS = ()
    I = O = 0
    P99 = 2.2  # p99 over mean of the new prompt tokens
    PRICE = 1.0
    TTFT = TPOT = 1.0
    SPACE = {}
    DEFAULT = {}
    KEYS = (
        "mem_bw_tb_s",
        "tflops",
        "step_overhead_ms",
        "comm_ms",
        "kv_kib_per_token",
        "weights_gb",
        "acceptance",
        "hit_rate",
        "usd_per_gpu_h",
    )
    RIGHT = None
    INDEX = 0

    def __init__(self, i):
        self.index = i
        self._names = list(self.SPACE)
        self._vals = [np.array(v) for v in self.SPACE.values()]
        self._shape = tuple(len(v) for v in self.SPACE.values())
        self._n = int(np.prod(self._shape))
        self._pos = [{v: k for k, v in enumerate(vs)} for vs in self.SPACE.values()]
        self._grid = None

    # ---- the interface
    def space(self):
        return {k: list(v) for k, v in self.SPACE.items()}

    def default(self, i=None):
        return dict(self.DEFAULT)

    def slos(self, i=None):
        return {"ttft_p99_s": self.TTFT, "tpot_p99_s": self.TPOT}

    def grid_index(self, config):
        return int(np.ravel_multi_index([self._pos[k][config[n]] for k, n in enumerate(self._names)], self._shape))

    def _cols(self, rows):
        codes = np.unravel_index(rows, self._shape)
        return {n: self._vals[k][codes[k]] for k, n in enumerate(self._names)}

    def config_at(self, row):
        codes = np.unravel_index(int(row), self._shape)
        return {n: list(self.SPACE.values())[k][int(codes[k])] for k, n in enumerate(self._names)}

    def _eval(self, rows, loads):
        C = self._cols(np.asarray(rows))
        with np.errstate(all="ignore"):
            Q, crashes = self.physics(C)
            bad = np.zeros(len(rows), bool)
            for m, _, _ in crashes:
                bad |= m
            r = self._solve(Q, np.asarray(loads, float))
        return bad, crashes, C, r

    def truth_grid(self, i=None):
        if self._grid is None:
            n, L = self._n, len(self.LOADS)
            runs = np.zeros(n, bool)
            cost = np.full((n, L), np.nan)
            lat = np.full((n, L), np.nan)
            ok = np.zeros((n, L), bool)
            for a in range(0, n, 16384):
                rows = np.arange(a, min(n, a + 16384))
                bad, _, _, r = self._eval(rows, self.LOADS)
                g = ~bad
                runs[rows] = g
                cost[rows] = W(g[:, None], r["cost"], np.nan)
                lat[rows] = W(g[:, None], r["tpot"], np.nan)
                ok[rows] = g[:, None] & (r["tpot"] <= self.TPOT) & (r["ttft"] <= self.TTFT)
            self._grid = runs, cost, lat, ok
        return self._grid

    def _luck(self, row):
        z = np.random.default_rng([9713, self.index, row]).standard_normal()
        return float(np.exp(0.04 * np.clip(z, -2.5, 2.5)))

    def measure(self, config, load, i=None, rng=None):
        row = self.grid_index(config)
        bad, crashes, C, r = self._eval(np.array([row]), [load])
        if bad[0]:
            for m, text, extra in crashes:
                if m[0]:
                    raise Infeasible(
                        text.format(c=config, **{k: float(np.asarray(v, float).ravel()[0]) for k, v in extra.items()})
                    )
        luck = self._luck(row)
        z = rng.standard_normal(3)
        out = r["out"][0, 0] * np.exp(0.01 * z[2])
        if r["rho"][0, 0] > 1:
            out /= luck
        return {
            "ttft_p99_s": float(r["ttft"][0, 0] * luck * np.exp(0.06 * z[0])),
            "tpot_p99_s": float(r["tpot"][0, 0] * luck * np.exp(0.045 * z[1])),
            "cost_usd_per_mtok_output": float(r["usd_s"][0, 0] * 1e6 / out),
            "output_tok_s": float(out),
        }

    def launch_s(self, config, i=None):
        return float(self._launch(config))

    # ---- steady state of a server: decode batch by Little's law, queue, prefill, tails
    def _solve(self, Q, loads):
        O, n = float(self.O), len(Q["gpus"])
        one = np.ones(n)
        rep, imb = e(Q.get("rep", one)), e(Q.get("imb", one))
        lam = loads[None, :] * imb / rep
        P, tp, pf = e(Q["P"]), e(Q["tp"]), e(Q.get("pf", 0.002 * one))
        acc, bcap, bkv = e(Q["acc"]), e(Q["bcap"]), np.maximum(e(Q["bkv"]), 0.6)
        pk = e(Q.get("preempt", 0.5 * one))
        bmax = np.minimum(bcap, bkv)
        thrash = np.where(bcap > bkv, pk, 0.0)
        stepf, mult = Q["step"], e(Q.get("mult", one))

        def tok(B):
            u = np.clip((B / bkv - 0.8) / 0.2, 0, 1)
            return stepf(B) * mult * (1 + thrash * u * u) / acc

        cpf = P * tp + pf
        X = bmax / (O * tok(bmax) + bmax * cpf)
        rho = lam / X
        le = np.minimum(lam, X)
        rp = np.minimum(le * cpf, 0.97)
        lo, hi = np.zeros_like(rho), bmax + np.zeros_like(rho)
        for _ in range(20):
            mid = 0.5 * (lo + hi)
            up = le * O * tok(mid) > mid * (1 - rp)
            lo, hi = np.where(up, mid, lo), np.where(up, hi, mid)
        B = np.where(rho >= 1, bmax, 0.5 * (lo + hi))
        t = tok(B)
        tpot = t / (1 - rp)
        ch = np.minimum(e(Q["chunk"]), P)
        tail = 2.33 * np.sqrt(le * O * tpot * P * ch) * tp / O
        tpot99 = tpot * (1.08 + 0.25 * (acc - 1) / acc) + tail * e(Q.get("stall", one))
        S = bmax / X
        pw = np.minimum(rho, 1.0) ** np.sqrt(2 * (bmax + 1))
        wait = S * 1.2 / (bmax * np.maximum(1 - rho, 0.02)) * np.maximum(np.log(pw / 0.01), 0)
        wait = np.minimum(wait, 45.0) + 150.0 * np.maximum(1 - 1 / np.maximum(rho, 1.0), 0)
        p99 = self.P99 * P
        nch = np.ceil(p99 / e(Q["chunk"]))
        ttft = (wait + 2.3 * cpf * rp / (1 - rp) + p99 * tp + pf + nch * t * acc + e(Q.get("ttft0", 0.02 * one))) * e(
            Q.get("ttftm", one)
        )
        out = np.minimum(loads[None, :], X * rep / imb) * O
        usd = e(Q["gpus"]) * self.PRICE / 3600.0 + np.zeros_like(out)
        return {
            "tpot": tpot99,
            "ttft": ttft,
            "out": out,
            "usd_s": usd,
            "cost": usd * 1e6 / out,
            "rho": rho,
            "B": B,
            "X": X * rep / imb,
        }

    # ---- somebody's textbook model
    def _core(self, config, load, k, lf=None, cf=None):
        bw, tf, ov, comm, kv, wt, alpha, hit, price = k
        g = self.book(
            config
        )  # gpus, rep, tp, wfac, kvfac, seqs, chunk, spec k, draft ms, mem share, use hit, moe share
        gpus, rep, tp, wfac, kvfac, cfac, seqs, chunk, sk, afac, dms, mem, hon, moe, active = g
        wb = wt * 1e9 * wfac / tp
        kvb = kv * 1024.0 * kvfac / tp
        ctx = self.I + self.O / 2
        room = mem * self.MEM * GIB - wb - 2e9
        if room < kvb * ctx:
            raise Infeasible("textbook model: %.1f GB of weights leave no room for the KV cache" % (wb / 1e9))
        bkv = room / (kvb * ctx)
        cap = seqs if seqs < bkv else bkv
        if sk:
            al = alpha * afac
            if al > 0.95:
                al = 0.95
            acc = (1 - al ** (sk + 1)) / (1 - al)
        else:
            acc = 1.0
        fl = tf * 1e12 * tp * cfac
        flops = 2 * self.PARAMS * active
        B = 1.0
        lam = load / rep
        P = self.I * (1 - hit * hon)
        cp = P * flops / fl
        lo = lam * self.O / acc
        c0 = ov * 1e-3 + (comm * 1e-3 * (tp - 1) ** 0.5 if tp > 1 else 0.0) + dms * 1e-3 * sk
        bwb = bw * 1e12
        kvs = kvb * ctx / bwb
        rp = lam * cp
        if rp > 0.9:
            rp = 0.9
        for _ in range(6):
            nt = B * (1 + sk)
            frac = 1.0 if moe == 0 else (1 - moe) + moe * (1 - (1 - active) ** nt)
            a = wb * frac / bwb
            b = nt * flops / fl
            t = c0 + (a if a > b else b) + kvs * B
            nb = lo * t / (1 - rp)
            if nb > cap:
                nb = cap
            B = nb if nb > 0.2 else 0.2
        tpot = t / acc / (1 - rp) * 1.12 + cp * min(1.0, chunk / P) * (lam * self.O * t) ** 0.5 / self.O
        X = cap / (self.O * t / acc + cap * cp)
        rho = lam / X
        ttft = (
            cp * self.P99
            + t
            + cp * rp / (1 - rp)
            + (0 if rho < 0.8 else (rho - 0.8) * 2 if rho < 1 else 100 * (1 - 1 / rho) + 0.4)
        )
        out = (load if rho < 1 else X * rep) * self.O
        cost = price * gpus / 3600.0 * 1e6 / out
        if lf is not None:
            fa = fb = 1.0
            for n in self._names:
                v = (n, config[n])
                fa *= lf[v]
                fb *= cf[v]
            tpot *= fa
            ttft *= fa
            cost *= fb
        return {"ttft_p99_s": ttft, "tpot_p99_s": tpot, "cost_usd_per_mtok_output": cost}

    def predictor(self, i=None, kind="30%", seed=0):
        if kind not in ("30%", "badly", "right"):
            raise ValueError(kind)
        rng = np.random.default_rng([4711, self.index, int(seed), {"30%": 0, "badly": 1, "right": 2}[kind]])
        k = dict(zip(self.KEYS, self.RIGHT))
        for name in k:
            up = rng.random() < 0.5
            if kind == "30%":
                k[name] *= 1.3 if up else 0.7
            elif kind == "badly":
                if name == "acceptance":
                    k[name] *= 0.5
                else:
                    k[name] *= 1.6 if up else 1 / 1.6
        k["hit_rate"] = min(k["hit_rate"], 0.97)
        k["acceptance"] = min(k["acceptance"], 0.97)
        lf = cf = None
        if kind == "badly":
            lf, cf = {}, {}
            for n, vs in self.SPACE.items():
                for v in vs:
                    lf[n, v] = float(np.exp(0.35 * rng.standard_normal()))
                    cf[n, v] = float(np.exp(0.35 * rng.standard_normal()))
        ns = {"core": functools.partial(self._core, lf=lf, cf=cf)}
        sig = ", ".join("%s=%r" % (a, float(b)) for a, b in k.items())
        exec("def predict(config, load, *, %s):\n    return core(config, load, (%s,))\n" % (sig, ", ".join(k)), ns)
        return ns["predict"]


# ------------------------------------------------------------------ 0: vLLM V1
class Vllm(World):
    PARAMS, MEM = 32.8e9, 79.1
    LOADS = (0.4, 0.9, 2.0, 4.0, 8.0, 15.0, 26.0, 42.0)
    I, O, PRICE, TTFT, TPOT = 1800, 320, 2.9, 2.0, 0.055
    SPACE = {
        "--tensor-parallel-size": [1, 2, 4, 8],
        "--quantization": ["none", "fp8", "awq_marlin"],
        "--kv-cache-dtype": ["auto", "fp8_e4m3"],
        "--block-size": [16, 64, 128],
        "--max-num-seqs": [64, 256, 1024],
        "--max-num-batched-tokens": [2048, 8192, 16384],
        "--gpu-memory-utilization": [0.85, 0.92, 0.97],
        "--attention-backend": ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"],
        "--enable-prefix-caching": [False, True],
        "--async-scheduling": [False, True],
        "--speculative-config.method": ["none", "ngram", "eagle3"],
        "--speculative-config.num_speculative_tokens": [2, 4],
    }
    DEFAULT = {
        "--tensor-parallel-size": 1,
        "--quantization": "none",
        "--kv-cache-dtype": "auto",
        "--block-size": 16,
        "--max-num-seqs": 1024,
        "--max-num-batched-tokens": 8192,
        "--gpu-memory-utilization": 0.92,
        "--attention-backend": "FLASH_ATTN",
        "--enable-prefix-caching": True,
        "--async-scheduling": True,
        "--speculative-config.method": "none",
        "--speculative-config.num_speculative_tokens": 2,
    }

    def physics(self, C):
        tp, q, be = C["--tensor-parallel-size"], C["--quantization"], C["--attention-backend"]
        f8 = C["--kv-cache-dtype"] == "fp8_e4m3"
        bs, mns, mnbt = C["--block-size"], C["--max-num-seqs"], C["--max-num-batched-tokens"]
        util, pc, asy = C["--gpu-memory-utilization"], C["--enable-prefix-caching"], C["--async-scheduling"]
        m, k = C["--speculative-config.method"], C["--speculative-config.num_speculative_tokens"]
        ea, ng, sp = m == "eagle3", m == "ngram", m != "none"
        k = W(sp, k, 0)
        bw = 3.35e12 * 0.78
        w = 32.8e9 * T(q, {"none": 2.0, "fp8": 1.03, "awq_marlin": 0.57}) / tp
        kvb = 262144.0 / tp * W(f8, 0.5, 1.0)
        ctx = self.I + self.O / 2
        # attention kernels: page layout and cache type quirks
        am = W(
            be == "FLASH_ATTN",
            W(f8, 1.2, 1.0) * T(bs, {16: 1.22, 64: 1.0, 128: 0.97}) * W(f8 & (bs == 128), 1.75, 1.0),
            W(
                be == "FLASHINFER",
                W(f8, 0.98, 1.12) * T(bs, {16: 1.05, 64: 1.0, 128: 1.0}),
                W(f8, 2.1, 1.3) * T(bs, {16: 1.15, 64: 1.0, 128: 0.9}),
            ),
        )
        am = am * W(tp == 8, 1.3, 1.0)  # one KV head per GPU: poor split
        flf = 989e12 * 0.55 * T(q, {"none": 1.0, "fp8": 1.65, "awq_marlin": 0.75})
        shard = W((q == "fp8") & (tp == 8), 1.35, 1.0) * W((q == "awq_marlin") & (tp >= 4), 1.22, 1.0)
        alpha = W(ea, 0.70, 0.36) * W(ea & (q == "awq_marlin"), 0.82, 1.0) * W(ea & f8, 0.93, 1.0)
        acc = W(sp, accepted(alpha, k), 1.0)
        host0 = W(asy, 0.0016, 0.0040) + W(be == "FLASHINFER", W(asy, 0.0005, 0.0022), 0.0) + W(ng, 0.0012, 0.0)
        host1 = W(asy, 3e-6, 16e-6) + W(ng, 22e-6, 0.0)
        draft = W(ea, k * (0.00045 + 1.6e9 / tp / bw + W(f8 & (be == "FLASH_ATTN"), 0.0006, 0.0)), 0.0)
        eager = W(ea & (be == "TRITON_ATTN"), 0.0065, 0.0)  # no full graph with drafts on this back end
        comm0 = T(tp, {1: 0.0, 2: 0.0011, 4: 0.0015, 8: 0.0021})
        comm1 = W(tp > 1, 128 * 10240 * 1.5 / 260e9, 0.0)
        E = {
            n: e(v)
            for n, v in dict(
                w=w,
                k1=1.0 + k,
                tp=tp,
                flf=flf,
                sh=shard,
                at=kvb * ctx * am / bw,
                h0=host0 + draft + eager + comm0,
                h1=host1,
                c1=comm1,
                vk=W(ea & (be == "FLASHINFER"), 0.10, 0.03) * k,
            ).items()
        }

        def step(B):
            nt = B * E["k1"]
            g = roof(E["w"] / bw, nt * 65.6e9 / (E["tp"] * E["flf"])) * E["sh"]
            big = np.where(nt > 512, 0.004, 0.0)  # beyond the captured graph sizes
            return g + E["at"] * B * (1 + E["vk"]) + E["h0"] + E["h1"] * B + E["c1"] * nt + big

        eff = T(tp, {1: 1.0, 2: 0.94, 4: 0.86, 8: 0.74})
        tpre = 65.6e9 / (tp * eff * 989e12 * 0.6 * T(q, {"none": 1.0, "fp8": 1.6, "awq_marlin": 0.68}))
        tpre = (
            tpre
            * T(be, {"FLASH_ATTN": 1.0, "FLASHINFER": 1.04, "TRITON_ATTN": 1.3})
            * T(mnbt, {2048: 1.1, 8192: 1.0, 16384: 1.0})
        )
        tpre = tpre * W(pc & (be == "TRITON_ATTN"), 1.25, 1.0) * W(f8 & (be == "FLASH_ATTN"), 1.12, 1.0)
        act = (1.0 + mnbt / 16384 * 2.2 / np.sqrt(tp) + W(ea, 2.4 / tp + 0.6, 0.0)) * GIB
        pool = util * 79.1 * GIB - w - act
        toks = pool / kvb
        hit = W(pc, 0.64 * toks / (toks + 45e3) * T(bs, {16: 1.0, 64: 0.97, 128: 0.88}) * W(ea, 0.96, 1.0), 0.0)
        outside = util * 79.1 + 0.9 + mns * 151936 * 12 / GIB + W(ea, 0.7, 0.0) + W(tp > 1, 0.35, 0.0)
        need = 16384 * kvb / GIB
        crashes = [
            (
                ng & asy,
                "ValueError: Currently, async scheduling is only supported with EAGLE/MTP kind of speculative decoding (method='ngram').",
                {},
            ),
            (
                (be == "FLASHINFER") & (bs == 128),
                "ValueError: Selected backend AttentionBackendEnum.FLASHINFER is not valid for this configuration. Reason: ['block_size not supported']",
                {},
            ),
            (
                (q == "awq_marlin") & ea & (tp == 8),
                "RuntimeError: Worker failed with error 'size_k = 640 is not divisible by tile size' (marlin repack of the draft model, tensor_parallel_size=8)",
                {},
            ),
            (
                pool <= 0,
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {a:.2f} GiB. GPU 0 has a total capacity of 79.10 GiB; {w:.2f} GiB is allocated by the model weights.",
                dict(a=-pool / GIB + 0.4, w=w / GIB),
            ),
            (
                pool < 16384 * kvb,
                "ValueError: To serve at least one request with the models's max seq len (16384), ({n:.2f} GiB KV cache is needed, which is larger than the available KV cache memory ({a:.2f} GiB). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`.",
                dict(n=need, a=pool / GIB),
            ),
            (
                outside > 79.1,
                "RuntimeError: CUDA out of memory occurred when warming up sampler with {c[--max-num-seqs]} dummy requests ({a:.2f} GiB over). Please try lowering `max_num_seqs` or `gpu_memory_utilization`.",
                dict(a=outside - 79.1),
            ),
        ]
        Q = dict(
            gpus=tp,
            P=self.I * (1 - hit),
            tp=tpre,
            acc=acc,
            bcap=mns,
            bkv=toks / ctx,
            chunk=mnbt,
            step=step,
            mult=W(
                (be == "FLASH_ATTN") & f8 & (bs == 128), 1.35, 1.0
            ),  # falls out of the FA3 fp8 tile: dequantised copy
            preempt=W(mns == 1024, 0.9, 0.5) * W(sp, 1.3, 1.0),
        )
        return Q, crashes

    def book(self, c):
        q, m = c["--quantization"], c["--speculative-config.method"]
        tp = c["--tensor-parallel-size"]
        k = 0 if m == "none" else c["--speculative-config.num_speculative_tokens"]
        return (
            tp,
            1,
            tp,
            {"none": 1.0, "fp8": 0.5, "awq_marlin": 0.28}[q],
            0.5 if c["--kv-cache-dtype"] != "auto" else 1.0,
            {"none": 1.0, "fp8": 1.7, "awq_marlin": 0.9}[q],
            c["--max-num-seqs"],
            c["--max-num-batched-tokens"],
            k,
            0.5 if m == "ngram" else 1.0,
            0.7 if m == "eagle3" else 0.05,
            c["--gpu-memory-utilization"],
            c["--enable-prefix-caching"],
            0,
            1.0,
        )

    RIGHT = (1.76, 202.0, 1.26, 0.564, 1000.0, 65.6, 0.701, 0.592, 2.9)

    def _launch(self, c):
        w = {"none": 66, "fp8": 66, "awq_marlin": 19}[c["--quantization"]]
        return (
            38
            + w * 0.9 / min(c["--tensor-parallel-size"], 4) ** 0.5
            + 22
            + (25 if c["--speculative-config.method"] == "eagle3" else 0)
            + 6 * c["--tensor-parallel-size"]
            + (14 if c["--attention-backend"] == "FLASHINFER" else 0)
        )


# ------------------------------------------------------------------ 1: SGLang, MLA + MoE
class Sglang(World):
    PARAMS, MEM = 671e9, 140.0
    LOADS = (0.25, 0.6, 1.2, 2.2, 4.0, 6.5, 10.0, 14.0)
    I, O, PRICE, TTFT, TPOT, P99 = 9000, 420, 3.8, 5.0, 0.075, 2.6
    SPACE = {
        "--tp-size": [8, 16],
        "--dp-size": [1, 2, 4, 8],  # with --enable-dp-attention whenever > 1
        "--ep-size": [1, 8, 16],
        "--moe-a2a-backend": ["none", "deepep"],
        "--attention-backend": ["fa3", "flashinfer", "flashmla", "triton"],
        "--page-size": [1, 64],
        "--chunked-prefill-size": [4096, 8192, 16384],
        "--mem-fraction-static": [0.8, 0.85, 0.9],
        "--schedule-policy": ["fcfs", "lpm"],
        "--kv-cache-dtype": ["auto", "fp8_e4m3"],
        "--speculative-algorithm": ["none", "EAGLE"],
        "--speculative-num-steps": [1, 3],
    }
    DEFAULT = {
        "--tp-size": 8,
        "--dp-size": 1,
        "--ep-size": 1,
        "--moe-a2a-backend": "none",
        "--attention-backend": "fa3",
        "--page-size": 1,
        "--chunked-prefill-size": 8192,
        "--mem-fraction-static": 0.85,
        "--schedule-policy": "fcfs",
        "--kv-cache-dtype": "auto",
        "--speculative-algorithm": "none",
        "--speculative-num-steps": 3,
    }

    def physics(self, C):
        tp, dp, ep = C["--tp-size"], C["--dp-size"], C["--ep-size"]
        de, be, pg = C["--moe-a2a-backend"] == "deepep", C["--attention-backend"], C["--page-size"]
        chunk, mem, lpm = C["--chunked-prefill-size"], C["--mem-fraction-static"], C["--schedule-policy"] == "lpm"
        f8, sp, s = (
            C["--kv-cache-dtype"] == "fp8_e4m3",
            C["--speculative-algorithm"] == "EAGLE",
            C["--speculative-num-steps"],
        )
        s = W(sp, s, 0)
        ep = W(de, tp, ep)
        pg = W(be == "flashmla", 64, pg)  # forced by the back end
        bw = 4.8e12 * 0.75
        ctx = self.I + self.O / 2
        kvt = 70272.0 * W(f8, 0.5, 1.0)  # MLA latent: replicated on every rank of an attention group
        fa, fi, fm, tr = be == "fa3", be == "flashinfer", be == "flashmla", be == "triton"
        am = W(fa, 1.0 * W(f8, 1.75, 1.0), W(fi, 1.2, W(fm, 0.92 * W(f8, 1.1, 1.0), 1.7 * W(f8, 1.4, 1.0))))
        am = am * W(tr & (pg == 64), 1.2, 1.0) * W(fa & (pg == 64), 0.96, 1.0)
        am = am * (1 + W(fm, 0.42, W(tr, 0.3, 0.08)) * W(sp, s, 0) * W(fm & (s == 1), 0.3, 1.0))
        lat = W(tp == 8, 13e-6, 42e-6)
        link = W(tp == 8, 280e9, 42e9)
        alpha = 0.80 * W(f8, 0.96, 1.0)
        acc = W(sp, accepted(alpha, s), 1.0)
        base = (
            0.0085
            + W(dp > 1, 0.0014, 0.0)
            + W(lpm & (pg == 1), 0.0018, 0.0)
            + W(sp, s * 0.0024 + 0.002, 0.0)
            + W(sp & (pg == 1) & fa, 0.0055, 0.0)
        )
        base = base + W(sp & (dp > 1) & de, 0.0035, 0.0)
        moeeff = W(ep > 1, 1.18 - W(de & (dp >= 4), 0.10, 0.0), W(tp == 16, 1.32, 1.0))
        E = {
            n: e(v)
            for n, v in dict(
                tp=tp,
                dp=dp,
                k1=1.0 + s,
                me=moeeff,
                b=base,
                aw=16e9 * dp / tp / bw,
                at=kvt * ctx * am / bw / dp,
                c0=W(de, 58 * 2 * W(tp == 8, 38e-6, 48e-6), 61 * 2 * lat),
                c1=W(de, 58 * 8 * 7168 * 1.5 / tp / link, 61 * 14336 * 1.7 / link),
                fl=tp * 989e12 * 0.5 * 1.5,
                waste=W(de & (dp == 1), 1.38, 1.0),
            ).items()
        }

        def step(B):
            nt = B * E["k1"]
            f = 1 - (1 - 8 / 256.0) ** np.maximum(nt, 1.0)
            g = roof(655e9 * f / E["tp"] / bw + E["aw"], nt * 74e9 / E["fl"]) * E["me"]
            return (g + E["at"] * np.maximum(B, E["dp"] * 0.7) + E["b"] + E["c0"] + E["c1"] * nt + 7e-6 * B) * E[
                "waste"
            ]

        pool = mem * 140.0 * GIB - 655e9 / tp - 16e9 * dp / tp - W(sp, 14e9 / tp, 0.0)
        toks = pool / kvt * dp
        ech = chunk / dp  # the chunk is divided among the dp ranks
        tpre = 74e9 / (tp * 989e12 * 0.30) * W(fa, 1.0, W(fi, 0.94, W(fm, 1.12, 1.55))) * (1 + 0.07 * np.log2(dp))
        tpre = (
            tpre
            * W(de, W(tp == 16, 0.9, 1.05), W(tp == 16, 1.45, 1.0))
            * W(ech < 2048, 1.25, 1.0)
            * W(f8 & fa, 1.15, 1.0)
        )
        ws = 350e3
        hit = 0.90 * W(lpm, 1.0, 0.92) * (1 - W(lpm, 0.05, 0.035) * np.log2(dp)) * toks / (toks + ws * 0.12) - W(
            pg == 64, 0.008, 0.0
        )
        act = 3.2 + chunk * 0.00058 + 3.0 + W(de, 4.6, 0.0) + W(sp, 1.8, 0.0) + W(dp > 1, 0.9 * np.log2(dp), 0.0)
        free = (1 - mem) * 140.0
        crashes = [
            (
                ~de & (ep > tp),
                "AssertionError: ep_size ({c[--ep-size]}) must not be larger than tp_size ({c[--tp-size]}): tp_size must be divisible by ep_size",
                {},
            ),
            (
                fi & f8,
                "NotImplementedError: FlashInferMLAAttnBackend does not support kv_cache_dtype fp8_e4m3 for DeepSeek models on sm90",
                {},
            ),
            (
                fi & sp & (C["--page-size"] == 64),
                "ValueError: Speculative decoding with the flashinfer MLA backend only supports page_size=1, got 64",
                {},
            ),
            (
                de & (ech > 8192),
                "RuntimeError: DeepEP dispatch: num_max_dispatch_tokens_per_rank exceeded; CUDA error: an illegal memory access was encountered (deep_ep.cpp:1105)",
                {},
            ),
            (
                act > free,
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {t:.2f} GiB. GPU 3 has a total capacity of 139.81 GiB of which {f:.2f} GiB is free. (Try reducing --mem-fraction-static or --chunked-prefill-size)",
                dict(t=chunk * 0.00029, f=np.maximum(free - act + chunk * 0.00029, 0.05)),
            ),
            (
                toks / dp < 60e3,
                "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. (KV cache pool {a:.2f} GiB)",
                dict(a=pool / GIB),
            ),
        ]
        Q = dict(
            gpus=tp,
            P=self.I * (1 - hit),
            tp=tpre,
            acc=acc,
            bcap=W(sp, 48 * dp, 512.0),
            bkv=toks / (ctx * 0.55),
            chunk=ech,
            step=step,
            mult=W(fm & (s == 3), 1.32, 1.0)
            * W(fa & f8, 1.14, 1.0),  # multi-token verification on flashmla; fa3 dequantises
            preempt=0.4 + 0 * tp,
            ttft0=0.05 + 0 * tp,
            stall=1 + 0.12 * np.log2(dp),
        )
        return Q, crashes

    def book(self, c):
        tp = c["--tp-size"]
        k = c["--speculative-num-steps"] if c["--speculative-algorithm"] == "EAGLE" else 0
        at = {"fa3": 1.0, "flashinfer": 1.2, "flashmla": 1.0, "triton": 1.7}[c["--attention-backend"]]
        return (
            tp,
            1,
            tp,
            1.0,
            (0.5 if c["--kv-cache-dtype"] != "auto" else 1.0) * at * tp / c["--dp-size"],
            1.0,
            512,
            c["--chunked-prefill-size"] / c["--dp-size"],
            k,
            1.0,
            1.3,
            c["--mem-fraction-static"],
            1.0 if c["--schedule-policy"] == "lpm" else 0.92,
            0.97,
            0.04,
        )

    RIGHT = (2.76, 90.0, 1.13, 2.43, 96.2, 671.0, 0.784, 0.5, 3.8)

    def _launch(self, c):
        return (
            260
            + (90 if c["--tp-size"] == 16 else 0)
            + (45 if c["--moe-a2a-backend"] == "deepep" else 0)
            + (60 if c["--speculative-algorithm"] == "EAGLE" else 0)
        )


# ------------------------------------------------------------------ 2: TensorRT-LLM, small MoE, code completion
class Trtllm(World):
    PARAMS, MEM = 30.5e9, 79.1
    LOADS = (1.5, 3.5, 7.0, 13.0, 22.0, 36.0, 60.0, 95.0)
    I, O, PRICE, TTFT, TPOT, P99 = 2400, 90, 3.1, 0.7, 0.022, 2.0
    SPACE = {
        "model": ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-FP8"],
        "--tp_size": [1, 2, 4],
        "--pp_size": [1, 2],
        "--ep_size": [1, 2],
        "--max_batch_size": [64, 256, 2048],
        "--max_num_tokens": [2048, 8192, 16384],
        "--kv_cache_free_gpu_memory_fraction": [0.8, 0.9, 0.95],
        "enable_chunked_prefill": [False, True],
        "kv_cache_config.enable_block_reuse": [False, True],
        "kv_cache_config.dtype": ["auto", "fp8"],
        "kv_cache_config.tokens_per_block": [32, 64],
        "moe_config.backend": ["AUTO", "CUTLASS", "DEEPGEMM", "TRITON"],
        "scheduler_config.capacity_scheduler_policy": ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"],
    }
    DEFAULT = {
        "model": "Qwen/Qwen3-30B-A3B",
        "--tp_size": 1,
        "--pp_size": 1,
        "--ep_size": 1,
        "--max_batch_size": 2048,
        "--max_num_tokens": 8192,
        "--kv_cache_free_gpu_memory_fraction": 0.9,
        "enable_chunked_prefill": False,
        "kv_cache_config.enable_block_reuse": True,
        "kv_cache_config.dtype": "auto",
        "kv_cache_config.tokens_per_block": 32,
        "moe_config.backend": "AUTO",
        "scheduler_config.capacity_scheduler_policy": "GUARANTEED_NO_EVICT",
    }

    def physics(self, C):
        f8w = C["model"] == "Qwen/Qwen3-30B-A3B-FP8"
        tp, pp, ep = C["--tp_size"], C["--pp_size"], C["--ep_size"]
        mbs, mnt, fr = C["--max_batch_size"], C["--max_num_tokens"], C["--kv_cache_free_gpu_memory_fraction"]
        ckp, reuse, f8 = (
            C["enable_chunked_prefill"],
            C["kv_cache_config.enable_block_reuse"],
            C["kv_cache_config.dtype"] == "fp8",
        )
        tb, moe = C["kv_cache_config.tokens_per_block"], C["moe_config.backend"]
        mu = C["scheduler_config.capacity_scheduler_policy"] == "MAX_UTILIZATION"
        dg, tri = moe == "DEEPGEMM", moe == "TRITON"
        bw = 3.35e12 * 0.74
        ctx = self.I + self.O / 2
        kvb = 98304.0 / tp / pp * W(f8, 0.5, 1.0)
        wb = W(f8w, 1.05, 2.0)
        # XQA decode kernels: fp8 cache with 64-token blocks misses the fast path; 16-bit cache likes 64
        am = W(f8, W(tb == 64, 1.95, 1.0), W(tb == 64, 0.86, 1.0)) * W(tp == 4, 1.25, 1.0)
        moesh = W(ep > 1, 1.2, T(tp, {1: 1.0, 2: 1.08, 4: 1.32}))
        comm0 = T(tp, {1: 0.0, 2: 0.00075, 4: 0.001}) + W(pp > 1, 0.0006, 0.0) + W(ep > 1, 0.0004, 0.0)
        over = 0.0028 + W(mu & (pp > 1), 0.0035, 0.0) + W(reuse & (tb == 32), 0.0003, 0.0)
        E = {
            n: e(v)
            for n, v in dict(
                tp=tp,
                pp=pp,
                at=kvb * pp * ctx * am / bw,
                c0=comm0 + over,
                wb=wb,
                ms=moesh,
                fl=tp * 989e12 * 0.4 * W(f8w, 1.45, 1.0),
                lo=W(tri, W(f8w, 1.3, 0.78), W(dg, 1.3, 1.0)),
                hi=W(tri, 1.3, W(dg, 0.7, 1.0)),
                eag=W(mbs == 2048, 0.0035, 0.0006),
                hb=W(mbs == 2048, 10e-6, 5e-6),
            ).items()
        }

        def step(B):
            b = B / E["pp"]
            f = 1 - (1 - 8 / 128.0) ** np.maximum(b, 1.0)
            x = np.clip(np.log2(np.maximum(b, 1.0)) / 6.0, 0, 1)  # small batch 0, 64 and more 1
            mb = E["lo"] + (E["hi"] - E["lo"]) * x
            g = (
                roof(28.6e9 * E["wb"] * f * E["ms"] * mb / E["tp"] / bw, b * 5.4e9 * mb / E["fl"])
                + 1.9e9 * E["wb"] / E["tp"] / bw
            )
            eager = np.where(b > 128, 0.0045 + E["eag"], 0.0)  # graphs are captured up to 128
            return g + E["at"] * b + E["c0"] + E["hb"] * B + eager

        tpre = (
            6.6e9
            / (tp * T(tp, {1: 1.0, 2: 0.9, 4: 0.76}) * 989e12 * 0.26 * W(f8w, 1.4, 1.0))
            * W(dg, 0.8, W(tri, 1.3, 1.0))
            * moesh**0.5
        )
        tpre = tpre * W(ckp & f8, 1.5, 1.0) * W(pp > 1, 0.62, 1.0) * W(ckp & (mnt == 2048), 1.15, 1.0)
        w = 30.5e9 * wb / (tp * pp)
        act = (1.3 + mnt * 0.00022 * (1.0 + 0.5 * W(tri, 1.0, 0.0)) + mbs * 0.0011) * GIB
        free = 79.1 * GIB - w - act
        pool = free * fr
        toks = pool / kvb
        hit = W(reuse, 0.66 * toks / (toks + 60e3) * W(tb == 64, 0.93, 1.0) * W(ckp, 1.0, 0.97), 0.0)
        bkv = toks / ctx * W(mu, 1.0, 0.72)
        slack = free * (1 - fr) / GIB
        needs = 0.45 + W(ckp, 0.15, mnt * 0.00006) + W(f8w, 0.0, 0.25) + W(dg, 0.55, 0.0)
        crashes = [
            (
                f8w & (tp == 4) & (ep == 1),
                "ValueError: moe_intermediate_size 768 / moe_tp_size 4 = 192 is not divisible by the FP8 block size 128",
                {},
            ),
            (
                (ep > tp),
                "ValueError: moe_tp_size * moe_ep_size must equal tp_size ({c[--tp_size]}), got moe_expert_parallel_size={c[--ep_size]}",
                {},
            ),
            (
                dg & ~f8w,
                "NotImplementedError: DEEPGEMM MoE backend requires FP8 block-scaled weights, quant_algo=None",
                {},
            ),
            (
                ~ckp & (mnt == 2048),
                "RequestError: The sum of prompt length (2400.0), query length (0) should not exceed max_num_tokens (2048)",
                {},
            ),
            (
                free <= 1.5 * GIB,
                "RuntimeError: [TensorRT-LLM][ERROR] CUDA runtime error in ::cudaMallocAsync: out of memory ({a:.2f} GiB short)",
                dict(a=2 - free / GIB),
            ),
            (
                slack < needs,
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {t:.2f} GiB after the KV cache took {p:.2f} GiB (free_gpu_memory_fraction={c[--kv_cache_free_gpu_memory_fraction]})",
                dict(t=needs, p=pool / GIB),
            ),
        ]
        Q = dict(
            gpus=tp * pp,
            P=self.I * (1 - hit),
            tp=tpre,
            pf=0.0011 + W(reuse & (tb == 32), 0.0006, 0.0),
            acc=1.0 + 0 * tp,
            bcap=mbs * 1.0,
            bkv=bkv,
            chunk=W(ckp, mnt, 1e6),
            step=step,
            mult=W(f8 & (tb == 64), 1.32, 1.0),
            preempt=W(mu, 1.1, 0.05) * W(pp > 1, 1.6, 1.0),
            ttft0=0.012 + 0 * tp,
            stall=W(ckp, 1.0, 1.5),
        )
        return Q, crashes

    def book(self, c):
        f = c["model"].endswith("FP8")
        tp, pp = c["--tp_size"], c["--pp_size"]
        mb = {"AUTO": 1.0, "CUTLASS": 1.0, "DEEPGEMM": 0.92, "TRITON": 1.12}[c["moe_config.backend"]]
        return (
            tp * pp,
            1,
            tp,
            (0.52 if f else 1.0) * mb,
            (0.5 if c["kv_cache_config.dtype"] == "fp8" else 1.0),
            1.4 if f else 1.0,
            c["--max_batch_size"],
            c["--max_num_tokens"] if c["enable_chunked_prefill"] else 1e6,
            0,
            1.0,
            0.0,
            c["--kv_cache_free_gpu_memory_fraction"] * pp,
            c["kv_cache_config.enable_block_reuse"],
            0.93,
            0.0625,
        )

    RIGHT = (2.38, 56.2, 2.0, 1.08, 36.3, 61.0, 0.475, 0.393, 3.1)

    def _launch(self, c):
        return (
            55
            + (30 if c["model"].endswith("A3B") else 17)
            + 9 * c["--tp_size"] * c["--pp_size"]
            + (40 if c["moe_config.backend"] == "DEEPGEMM" else 0)
        )


# ------------------------------------------------------------------ 3: LMDeploy TurboMind, RAG
class Lmdeploy(World):
    PARAMS, MEM = 32.5e9, 79.3
    LOADS = (0.06, 0.15, 0.35, 0.8, 1.6, 2.8, 4.2, 6.0)
    I, O, PRICE, TTFT, TPOT, P99 = 5600, 210, 1.9, 8.0, 0.12, 1.6
    SPACE = {
        "--tp": [1, 2, 4, 8],
        "--model-format": ["hf", "awq", "gptq"],
        "--quant-policy": [0, 4, 8],
        "--cache-max-entry-count": [0.5, 0.8, 0.95],
        "--cache-block-seq-len": [64, 128, 256],
        "--max-batch-size": [16, 64, 256],
        "--max-prefill-token-num": [4096, 8192, 16384],
        "--num-tokens-per-iter": [0, 2048],
        "--max-prefill-iters": [1, 4],
        "--enable-prefix-caching": [False, True],
        "--communicator": ["nccl", "cuda-ipc"],
        "--session-len": [16384, 32768, 65536],
    }
    DEFAULT = {
        "--tp": 1,
        "--model-format": "hf",
        "--quant-policy": 0,
        "--cache-max-entry-count": 0.8,
        "--cache-block-seq-len": 64,
        "--max-batch-size": 256,
        "--max-prefill-token-num": 8192,
        "--num-tokens-per-iter": 0,
        "--max-prefill-iters": 1,
        "--enable-prefix-caching": False,
        "--communicator": "nccl",
        "--session-len": 32768,
    }

    def physics(self, C):
        tp, fm, qp = C["--tp"], C["--model-format"], C["--quant-policy"]
        cm, bl, mbs, mpt = (
            C["--cache-max-entry-count"],
            C["--cache-block-seq-len"],
            C["--max-batch-size"],
            C["--max-prefill-token-num"],
        )
        npi, mpi, pc = C["--num-tokens-per-iter"], C["--max-prefill-iters"], C["--enable-prefix-caching"]
        ipc, sl = C["--communicator"] == "cuda-ipc", C["--session-len"]
        q4 = fm != "hf"
        bw = 2.0e12 * 0.8
        ctx = self.I + self.O / 2
        w = 32.5e9 * W(q4, 0.58, 2.0) / tp
        kvb = 262144.0 / tp * T(qp, {0: 1.0, 4: 0.29, 8: 0.53})
        # decode attention: int4 cache pays unpacking with one KV head a GPU or 256-token blocks; long sessions plan too many splits
        am = (
            T(qp, {0: 1.0, 4: 1.75, 8: 1.1})
            * W((qp == 4) & (tp == 8), 1.5, 1.0)
            * W((qp == 8) & (bl == 256), 1.7, 1.0)
            * W((qp == 0) & (bl == 64), 1.08, 1.0)
        )
        am = am * T(sl, {16384: 1.0, 32768: 1.1, 65536: 1.5}) * W(tp == 8, 1.2, 1.0)
        gm = (
            T(fm, {"hf": 1.0, "awq": 1.0, "gptq": 1.08})
            * W((fm == "gptq") & (tp >= 4), 1.5, 1.0)
            * W((fm == "awq") & (tp == 8), 1.45, 1.0)
        )
        lat = W(ipc, T(tp, {1: 0, 2: 6e-6, 4: 8e-6, 8: 12e-6}), T(tp, {1: 0, 2: 22e-6, 4: 30e-6, 8: 44e-6}))
        splitfuse = (npi > 0) & (mpi > 1)
        over = (
            0.0013 + W(splitfuse, 0.0009, 0.0) + W(pc & (bl == 64), 0.0020, 0.0) + mbs * (sl / bl) * 2.6e-8
        )  # block tables go over every step
        E = {
            n: e(v)
            for n, v in dict(
                w=w,
                tp=tp,
                at=kvb * ctx * am / bw,
                fl=312e12 * 0.6 * W(q4, 0.8, 1.0),
                gm=gm,
                c0=128 * lat + over,
                c1=W(tp > 1, 128 * 10240 * 1.5 / W(ipc, 230e9, 170e9), 0.0),
            ).items()
        }

        def step(B):
            mid = np.where((B > 16) & (B <= 64), 1.12, 1.0)  # tile switch of the GEMM
            g = roof(E["w"] / bw, B * 65e9 / (E["tp"] * E["fl"])) * E["gm"] * mid
            return g + E["at"] * B + E["c0"] + E["c1"] * B + 8e-6 * B

        tpre = (
            65e9
            / (tp * T(tp, {1: 1.0, 2: 0.93, 4: 0.85, 8: 0.72}) * 312e12 * 0.62)
            * T(fm, {"hf": 1.0, "awq": 1.14, "gptq": 1.2})
        )
        tpre = (
            tpre
            * T(qp, {0: 1.0, 4: 1.12, 8: 1.05})
            * W(ipc & (tp > 1), 0.93, 1.0)
            * W(splitfuse, W(q4, 1.22, 1.08), 1.0)
        )
        chunk = W(splitfuse, 2048, mpt)
        act = (1.6 + mpt * 0.00030 / np.sqrt(tp) + sl * 0.000018 + W(ipc & (tp > 1), 0.5 + mpt * 0.00012, 0.0)) * GIB
        free = 79.3 * GIB - w - act
        toks = free * cm / kvb
        hit = W(pc, 0.58 * toks / (toks + 90e3) * T(bl, {64: 1.0, 128: 0.93, 256: 0.72}), 0.0)
        # cached blocks take room from running requests when the pool is small
        bkv = toks / (ctx + bl / 2) * W(pc, 0.9 * toks / (toks + 8e3), 1.0)
        left = free * (1 - cm) / GIB
        need = 0.40 + mpt * 0.000045 * W(qp > 0, 1.8, 1.0) + W(splitfuse, 0.15, 0.0)
        crashes = [
            (
                ipc & (tp == 8) & (mpt == 16384),
                "RuntimeError: [TM][ERROR] cuda-ipc communicator: symmetric buffer of {a:.2f} GiB exceeds the mapped region on 8 ranks",
                dict(a=mpt * 0.00031),
            ),
            (
                (qp == 4) & (bl == 256),
                "[TM][FATAL] Assertion fail: attention kernel not found for (quant_policy=4, cache_block_seq_len=256, head_dim=128)",
                {},
            ),
            (
                (npi > 0) & (mpi == 1) & (mpt < self.I * 1.5),
                "RuntimeError: [TM][ERROR] input of 5600+ tokens does not fit num_tokens_per_iter * max_prefill_iters and max_prefill_token_num={c[--max-prefill-token-num]}",
                {},
            ),
            (
                free < 0.3 * GIB,
                "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory: weights take {w:.2f} GiB, {a:.2f} GiB missing",
                dict(w=w / GIB, a=0.5 - free / GIB),
            ),
            (
                toks < sl * 0.5,
                "[TM][ERROR] session_len ({c[--session-len]}) truncated: cache blocks hold only {t:.0f} tokens ({g:.2f} GiB); No enough blocks.",
                dict(t=toks, g=free * cm / GIB),
            ),
            (
                left < need,
                "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory at allocator.h:231 (needed {a:.2f} GiB, free {b:.2f} GiB)",
                dict(a=need, b=left),
            ),
        ]
        Q = dict(
            gpus=tp,
            P=self.I * (1 - hit),
            tp=tpre,
            acc=1.0 + 0 * tp,
            bcap=mbs * 1.0,
            bkv=bkv,
            chunk=chunk,
            step=step,
            mult=W((qp == 8) & (bl == 256), 1.35, 1.0),
            preempt=W(pc, 0.35, 0.7),
            stall=W(splitfuse, 0.8, W(mpi > 1, 3.2, 1.2)),
        )  # 4 prefill passes in a row starve decoding
        return Q, crashes

    def book(self, c):
        tp = c["--tp"]
        q = c["--model-format"] != "hf"
        ch = c["--num-tokens-per-iter"] or c["--max-prefill-token-num"]
        return (
            tp,
            1,
            tp,
            0.28 if q else 1.0,
            {0: 1.0, 4: 0.25, 8: 0.5}[c["--quant-policy"]],
            0.85 if q else 1.0,
            c["--max-batch-size"],
            ch,
            0,
            1.0,
            0.0,
            c["--cache-max-entry-count"] * 0.1 + 0.85,
            c["--enable-prefix-caching"],
            0,
            1.0,
        )

    RIGHT = (1.79, 71.9, 4.5, 0.539, 360.0, 65.0, 0.899, 0.523, 1.9)

    def _launch(self, c):
        return (
            30
            + (65 if c["--model-format"] == "hf" else 22) * 0.8 / c["--tp"] ** 0.5
            + 4 * c["--tp"]
            + (8 if c["--communicator"] == "cuda-ipc" else 0)
        )


# ------------------------------------------------------------------ 4: llama.cpp server
class Llamacpp(World):
    PARAMS, MEM = 14.8e9, 23.6
    LOADS = (0.1, 0.25, 0.5, 0.9, 1.5, 2.4, 3.6)
    I, O, PRICE, TTFT, TPOT, P99 = 900, 240, 0.45, 4.0, 0.060, 2.3
    R = "Qwen/Qwen3-14B-GGUF:"
    SPACE = {
        "--hf-repo": [R + "Q4_K_M", R + "Q6_K", R + "Q8_0"],
        "--device": ["CUDA0", "CUDA0,CUDA1", "CUDA0,CUDA1,CUDA2,CUDA3"],
        "--split-mode": ["layer", "row", "tensor"],
        "--parallel": [4, 8, 12, 24],
        "--ctx-size": [24576, 40960, 65536],
        "--kv-unified": [False, True],
        "--batch-size": [512, 2048],
        "--ubatch-size": [128, 512, 2048],
        "--flash-attn": ["off", "auto"],
        "--cache-type-k": ["f16", "q8_0"],
        "--cache-type-v": ["f16", "q8_0"],
        "--spec-type": ["none", "draft-simple", "ngram-mod"],
        "--spec-draft-n-max": [3, 8],
    }
    DEFAULT = {
        "--hf-repo": R + "Q4_K_M",
        "--device": "CUDA0",
        "--split-mode": "layer",
        "--parallel": 4,
        "--ctx-size": 40960,
        "--kv-unified": True,
        "--batch-size": 2048,
        "--ubatch-size": 512,
        "--flash-attn": "auto",
        "--cache-type-k": "f16",
        "--cache-type-v": "f16",
        "--spec-type": "none",
        "--spec-draft-n-max": 3,
    }

    def physics(self, C):
        qn = C["--hf-repo"]
        q4, q6, q8 = (qn == self.R + x for x in ("Q4_K_M", "Q6_K", "Q8_0"))
        nd = T(C["--device"], {"CUDA0": 1, "CUDA0,CUDA1": 2, "CUDA0,CUDA1,CUDA2,CUDA3": 4})
        sm = C["--split-mode"]
        row, ten = (sm == "row") & (nd > 1), (sm == "tensor") & (nd > 1)
        lay = ~row & ~ten
        par, ctxs, kvu = C["--parallel"], C["--ctx-size"], C["--kv-unified"]
        b, ub, fa = C["--batch-size"], C["--ubatch-size"], C["--flash-attn"] == "auto"
        ub = np.minimum(b, ub)
        k8, v8 = C["--cache-type-k"] == "q8_0", C["--cache-type-v"] == "q8_0"
        st, n = C["--spec-type"], C["--spec-draft-n-max"]
        dr, ng = st == "draft-simple", st == "ngram-mod"
        n = W(dr | ng, n, 0)
        bw = 1.008e12 * 0.84
        w = 14.8e9 * W(q4, 4.85, W(q6, 6.56, 8.5)) / 8
        kvb = 163840.0 * (W(k8, 0.53, 1.0) + W(v8, 0.53, 1.0)) / 2
        ctx = self.I + self.O / 2
        share = W(ten, nd * 0.9, W(row, nd * 0.8, 1.0))  # layer split: the layers run one after the other
        am = W(fa, 1.0, 1.6) * W(fa & k8 & v8, 1.15, 1.0) * W(fa & (k8 != v8), 3.2, 1.0) * W(~fa & k8, 1.2, 1.0)
        kvshare = W(ten, nd, 1.0)
        per = am * kvb * ctx / bw / kvshare
        comm = W(ten, 80 * (26e-6 + 10e-6 * nd), W(row, 40 * 4 * (28e-6 + 13e-6 * nd), 0.00018 * (nd - 1)))
        comm1 = W(ten, 80 * 10240 * 2.0 / 20e9, W(row, 160 * 10240 * 3.0 / 20e9, 0.0))
        alpha = W(dr, 0.68 * W(q4, 0.96, 1.0), 0.35)
        acc = W(n > 0, accepted(alpha, n), 1.0)
        E = {
            m: e(v)
            for m, v in dict(
                w=w / bw / share,
                per=per,
                uni=W(kvu, W(fa, 0.055, 0.11), 0.0),
                pad=W(kvu, 1.0, 1.18),
                k1=1.0 + n,
                sh=share,
                eff=95e12 * W(q6, 0.62, W(q8, 1.08, 1.0)),
                mv=W(q6, 1.10, 1.0),
                c0=0.0011 + comm,
                c1=comm1,
                d0=W(dr, n * 0.0014 * W(ten, 1.35, 1.0), 0.0),
                d1=W(dr, n * 0.00055, W(ng, 9e-5, 0.0)),
            ).items()
        }

        def step(B):
            nt = B * E["k1"]
            mmq = np.where(nt > 8, 1.17, 1.0)  # MMVQ up to 8 rows, MMQ after
            g = np.maximum(E["w"] * mmq, nt * 29.6e9 / (E["eff"] * E["sh"])) * E["mv"] + 0.25 * np.minimum(
                E["w"], nt * 29.6e9 / (E["eff"] * E["sh"])
            )
            at = E["per"] * B * E["pad"] * (1 + E["uni"] * np.maximum(B - 1, 0))
            return g + at + E["c0"] + E["c1"] * nt + E["d0"] + E["d1"] * B + 5e-5 * B * (1 + 0.15 * E["k1"])

        pe = T(ub, {128: 0.52, 512: 1.0, 2048: 1.14})
        pipe = W(
            lay & (nd > 1), np.minimum(nd, np.maximum(b / ub, 1.0)) ** 0.85, 1.0
        )  # batches are pipelined only if b/ub >= devices
        tpre = (
            29.6e9
            / (105e12 * pe * pipe * W(ten, nd**0.55, W(row, 0.6, 1.0)) * W(q6, 0.8, 1.0))
            * W(fa, 1.0, 1.3)
            * W(fa & (k8 != v8), 2.2, 1.0)
        )
        hit = 0.55 * np.minimum(1.0, (par / 16.0) ** 0.3) * W(kvu, np.minimum(1.0, ctxs / (par * 2600.0)), 1.0)
        cbuf = (
            0.45
            + ub * 151936 * 4 / GIB * 1.05
            + W(fa, 0.0, ub * ctxs * 40 * 4 / GIB * W(kvu, 1.0, 1.0 / np.minimum(par, 8)) * 0.12)
        )
        kvtot = ctxs * kvb / GIB
        drm = W(dr, 0.75 + ctxs * 28672 * 2 / GIB * 0.9, 0.0)
        main = W(row, kvtot, kvtot / nd) + w / GIB / nd * W(nd > 1, 1.06, 1.0) + cbuf + drm + 0.45
        slot = W(kvu, ctxs, ctxs // par)
        crashes = [
            (
                v8 & ~fa,
                "llama_init_from_model: V cache quantization requires flash_attn\ncommon_init_from_params: failed to create context with model",
                {},
            ),
            (
                ten & (k8 | v8),
                "llama_init_from_model: simultaneous use of SPLIT_MODE_TENSOR and KV cache quantization not implemented",
                {},
            ),
            (ten & ~fa, "llama_init_from_model: SPLIT_MODE_TENSOR requires flash_attn to be enabled", {}),
            (
                main > 23.55,
                "ggml_backend_cuda_buffer_type_alloc_buffer: allocating {a:.2f} GiB on device 0: cudaMalloc failed: out of memory\nalloc_tensor_range: failed to allocate CUDA0 buffer ({t:.2f} GiB of 23.55 GiB)",
                dict(a=kvtot, t=main),
            ),
            (
                slot < 2000,
                "srv send_error: the request exceeds the available context size (n_ctx_slot = {s:.0f} tokens), try increasing it",
                dict(s=slot),
            ),
        ]
        bkv = W(kvu, ctxs / ctx * 0.93, par * 1.0001)
        Q = dict(
            gpus=nd,
            P=self.I * (1 - hit),
            tp=tpre,
            pf=0.004 + 0 * nd,
            acc=acc,
            bcap=par * 1.0,
            bkv=bkv,
            chunk=b * 1.0,
            step=step,
            preempt=W(kvu, 1.5, 0.0),
            stall=1.4 + 0 * nd,
        )
        return Q, crashes

    def book(self, c):
        nd = c["--device"].count("CUDA")
        sm = c["--split-mode"]
        st = c["--spec-type"]
        q = c["--hf-repo"][len(self.R) :]
        k = 0 if st == "none" else c["--spec-draft-n-max"]
        tp = nd if sm != "layer" else 1
        kf = ((0.53 if c["--cache-type-k"] == "q8_0" else 1.0) + (0.53 if c["--cache-type-v"] == "q8_0" else 1.0)) / 2
        return (
            nd,
            1,
            tp,
            {"Q4_K_M": 0.303, "Q6_K": 0.41, "Q8_0": 0.53}[q],
            kf,
            1.0,
            c["--parallel"],
            c["--batch-size"],
            k,
            0.65 if st == "ngram-mod" else 1.0,
            1.4 if st == "draft-simple" else 0.1,
            0.97 * (nd if tp == 1 else 1.0),
            1,
            0,
            1.0,
        )

    RIGHT = (0.688, 33.3, 0.213, 13.2, 22.6, 29.6, 0.588, 0.447, 0.45)

    def _launch(self, c):
        return (
            6
            + {"Q4_K_M": 9, "Q6_K": 12.1, "Q8_0": 15.7}[c["--hf-repo"][len(self.R) :]] / 1.6
            + 3 * c["--device"].count("CUDA")
            + (2 if c["--spec-type"] == "draft-simple" else 0)
            + c["--ctx-size"] / 40000
        )


# ------------------------------------------------------------------ 5: an in-house Ray Serve wrapper, own YAML names
class RayServe(World):
    PARAMS, MEM = 70.6e9, 79.1
    LOADS = (0.25, 0.6, 1.2, 2.4, 4.5, 8.0, 13.0, 20.0)
    I, O, PRICE, TTFT, TPOT, P99 = 3600, 280, 2.7, 4.0, 0.06, 2.4
    SPACE = {
        "deploy.num_replicas": [1, 2, 4],
        "deploy.gpus_per_replica": [2, 4, 8],
        "deploy.placement_strategy": ["PACK", "SPREAD"],
        "router.policy": ["pow2", "round_robin", "prefix_aware"],
        "router.max_ongoing_requests": [16, 64, 256],
        "engine.precision": ["bf16", "fp8", "w4a16"],
        "engine.kv_precision": ["model", "fp8"],
        "engine.prefill_chunk": [2048, 4096, 16384],
        "engine.mem_share": [0.88, 0.94],
        "cache.host_offload_gib": [0, 64, 256],
        "speculation.kind": ["off", "prompt_lookup", "draft_1b"],
        "speculation.length": [2, 5],
    }
    DEFAULT = {
        "deploy.num_replicas": 1,
        "deploy.gpus_per_replica": 4,
        "deploy.placement_strategy": "PACK",
        "router.policy": "pow2",
        "router.max_ongoing_requests": 64,
        "engine.precision": "bf16",
        "engine.kv_precision": "model",
        "engine.prefill_chunk": 4096,
        "engine.mem_share": 0.88,
        "cache.host_offload_gib": 0,
        "speculation.kind": "off",
        "speculation.length": 2,
    }

    def physics(self, C):
        nr, g, spread = (
            C["deploy.num_replicas"],
            C["deploy.gpus_per_replica"],
            C["deploy.placement_strategy"] == "SPREAD",
        )
        po, mo, pr = C["router.policy"], C["router.max_ongoing_requests"], C["engine.precision"]
        f8, ch, ms, off = (
            C["engine.kv_precision"] == "fp8",
            C["engine.prefill_chunk"],
            C["engine.mem_share"],
            C["cache.host_offload_gib"],
        )
        sk, k = C["speculation.kind"], C["speculation.length"]
        pl, dr = sk == "prompt_lookup", sk == "draft_1b"
        k = W(pl | dr, k, 0)
        pa, rr = po == "prefix_aware", po == "round_robin"
        bw = 3.35e12 * 0.77
        ctx = self.I + self.O / 2
        w = 70.6e9 * T(pr, {"bf16": 2.0, "fp8": 1.02, "w4a16": 0.56}) / g
        kvb = 327680.0 / g * W(f8, 0.5, 1.0)
        # SPREAD breaks a replica over nodes: all-reduce over Ethernet/IB; but a replica alone on its host offloads faster
        lat = T(g, {2: 9e-6, 4: 11e-6, 8: 15e-6}) * W(spread, T(g, {2: 2.2, 4: 3.2, 8: 4.5}), 1.0)
        link = W(spread, 42e9, 260e9)
        alpha = W(dr, 0.66 * W(pr == "w4a16", 0.9, 1.0), 0.52) * W(pl & pa, 1.0, 1.0)
        acc = W(k > 0, accepted(alpha, k), 1.0)
        draft = W(
            dr, k * (0.0016 + W(g == 8, 0.0012, 0.0)), W(pl, 0.0007, 0.0)
        )  # the draft runs on one GPU, the others wait
        am = W(f8, 1.12, 1.0) * W(f8 & (ch == 16384), 1.35, 1.0) * W(g == 8, 1.2, 1.0)
        gm = T(pr, {"bf16": 1.0, "fp8": 1.0, "w4a16": 1.08}) * W((pr == "w4a16") & (g == 8), 1.3, 1.0)
        pcie = W(
            off > 0,
            W(spread, 0.0006, 0.0013)
            * W(f8, 0.6, 1.0)
            * W(nr * W(spread, 0.5, 1.0) >= 4, 2.6, 1.0)
            * W(off == 256, 1.25, 1.0),
            0.0,
        )
        E = {
            m: e(v)
            for m, v in dict(
                w=w,
                g=g,
                k1=1.0 + k,
                gm=gm,
                fl=989e12 * 0.55 * T(pr, {"bf16": 1.0, "fp8": 1.6, "w4a16": 0.7}),
                at=kvb * ctx * am / bw,
                c0=0.0021 + draft + 160 * lat + pcie,
                c1=160 * 16384 * 1.5 / link,
                h=W(mo == 256, 2.6e-5, 1.2e-5) + W(pl, 3e-5, 0) + W(off > 0, 2.5e-5, 0.0),
                dk=W(dr, k * 3.5e-5, 0.0),
            ).items()
        }

        def step(B):
            nt = B * E["k1"]
            x = roof(E["w"] / bw, nt * 141e9 / (E["g"] * E["fl"])) * E["gm"]
            return x + E["at"] * B * (1 + 0.04 * (E["k1"] - 1)) + E["c0"] + E["c1"] * nt + (E["h"] + E["dk"]) * B

        eff = T(g, {2: 0.94, 4: 0.87, 8: 0.76}) * W(spread, T(g, {2: 0.85, 4: 0.72, 8: 0.55}), 1.0)
        tpre = (
            141e9
            / (g * eff * 989e12 * 0.6 * T(pr, {"bf16": 1.0, "fp8": 1.6, "w4a16": 0.66}))
            * T(ch, {2048: 1.1, 4096: 1.0, 16384: 0.97})
        )
        tpre = tpre * W((pr == "w4a16") & (ch == 16384), 1.3, 1.0)
        pool = ms * 79.1 * GIB - w - (1.4 + ch * 0.00021 + W(dr, 3.2, 0.0)) * GIB
        toks = pool / kvb
        eq = toks + off * GIB / nr * 0.0 + off * GIB / (kvb * g)  # host tier, in tokens
        ret = eq / (eq + 350e3)
        local = W(pa, 1.0 - 0.03 * (nr - 1), W(rr, 1.0 / nr**0.75, 1.0 / nr**0.45))
        local = W(
            pa & (mo == 256) & (nr > 1), local * 0.86, local
        )  # a deep engine queue hides the locality from the router
        hit = 0.80 * local * (0.25 + 0.75 * ret)
        imb = W(nr > 1, W(pa, W(mo == 16, 1.06, W(mo == 64, 1.16, 1.32)), W(rr, 1.10, 1.03)), 1.0)
        host = off * nr * W(spread, 1.0, T(nr * 1.0, {1.0: 1, 2.0: 1, 4.0: 1}))
        crashes = [
            (
                nr * g > 16,
                "ray.exceptions.RayServeException: deployment unhealthy: placement group {{'GPU': {g:.0f}}} x {r:.0f} cannot be scheduled: 16 GPUs in the cluster",
                dict(g=g, r=nr),
            ),
            (
                ~spread & (host > 512),
                "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory: {h:.2f} GiB pinned of 503.40 GiB (threshold 0.95)",
                dict(h=host),
            ),
            (
                pool <= 0,
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {a:.2f} GiB. GPU 1 has a total capacity of 79.10 GiB, model weights {w:.2f} GiB",
                dict(a=0.2 - pool / GIB, w=w / GIB),
            ),
            (
                toks < 12288,
                "ValueError: engine start failed: KV cache of {p:.2f} GiB holds {t:.0f} tokens, max_model_len is 12288",
                dict(p=pool / GIB, t=toks),
            ),
            (
                dr & (g == 8) & (pr == "w4a16"),
                "RuntimeError: engine start failed: w4a16 kernel: group_size 128 does not divide in_features 2048 / 8 ranks x 3 of the draft model",
                {},
            ),
            (
                (ms > 0.9) & (ch == 16384) & (dr | (off == 256)),
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {a:.2f} GiB while profiling a prefill of 16384 tokens ({f:.2f} GiB free)",
                dict(a=1.9 + 0 * g, f=0.61 + 0 * g),
            ),
            (
                f8 & pl & (pr == "bf16"),
                "NotImplementedError: fp8 KV cache with multi-query verification needs an fp8 checkpoint (no scales in a bf16 one)",
                {},
            ),
        ]
        Q = dict(
            gpus=nr * g,
            rep=nr,
            imb=imb,
            P=self.I * (1 - hit),
            tp=tpre,
            acc=acc,
            bcap=mo * 1.0,
            bkv=toks / (ctx * 0.75),
            chunk=ch,
            step=step,
            mult=W(f8 & (ch == 16384), 1.3, 1.0),
            preempt=W(off > 0, 0.35, 0.8),
            ttft0=0.06 + W(off > 0, W(spread, 0.08, 0.18), 0.0),
            pf=0.004 + 0 * g,
        )
        return Q, crashes

    def book(self, c):
        nr, g = c["deploy.num_replicas"], c["deploy.gpus_per_replica"]
        s, p = c["speculation.kind"], c["engine.precision"]
        k = 0 if s == "off" else c["speculation.length"]
        return (
            nr * g,
            nr,
            g,
            {"bf16": 1.0, "fp8": 0.5, "w4a16": 0.28}[p],
            0.5 if c["engine.kv_precision"] == "fp8" else 1.0,
            {"bf16": 1.0, "fp8": 1.6, "w4a16": 0.8}[p],
            c["router.max_ongoing_requests"],
            c["engine.prefill_chunk"],
            k,
            0.8 if s == "prompt_lookup" else 1.0,
            1.6 if s == "draft_1b" else 0.1,
            c["engine.mem_share"],
            1,
            0,
            1.0,
        )

    RIGHT = (2.24, 429.0, 2.95, 1.51, 218.0, 141.0, 0.578, 0.433, 2.7)

    def _launch(self, c):
        return (
            60
            + {"bf16": 141, "fp8": 71, "w4a16": 40}[c["engine.precision"]] * 0.7 / c["deploy.gpus_per_replica"] ** 0.5
            + 12 * c["deploy.num_replicas"]
            + (30 if c["deploy.placement_strategy"] == "SPREAD" else 0)
            + (25 if c["speculation.kind"] == "draft_1b" else 0)
            + c["cache.host_offload_gib"] * 0.1
        )


WORLDS = (Vllm, Sglang, Trtllm, Lmdeploy, Llamacpp, RayServe)


@functools.lru_cache(None)
def scenario(i):
    return WORLDS[i](i)
