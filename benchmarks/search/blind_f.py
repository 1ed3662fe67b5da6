# ruff: noqa: E501, B905
"""A private acceptance test for auto-tuners of LLM serving: six invented deployments.

Each scenario is a small analytical model of one serving engine on one machine: roofline of prefill and decode,
memory arithmetic for the KV cache, a queue that grows near saturation, communication, quantisation kernels that
are good or bad at some batch sizes, start-up and run-time failures, a few oddities, and a lasting luck of each
configuration (two draws: one on the speed, one on the money).

A run replays a fixed trace, compressed by the load.  Cost is GPUs x price x (time until the last answer is out),
per million output tokens, so an overloaded server pays for its backlog and a sluggish one for its tail.
"""

from __future__ import annotations

import numpy as np

import tuner

GB = 1e9
GIB = 2.0**30
CHUNK = 8192

# --------------------------------------------------------------------------------------------------------------
# small tools


def _mix(x):
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _uniform(ids, salt):
    x = _mix(np.asarray(ids).astype(np.uint64) ^ _mix(np.asarray([salt], dtype=np.uint64)))
    return ((x >> np.uint64(11)).astype(float) + 0.5) / 2.0**53


def _normal(ids, salt):
    return np.sqrt(-2 * np.log(_uniform(ids, 2 * salt + 101))) * np.cos(2 * np.pi * _uniform(ids, 2 * salt + 102))


def _pick(column, table):
    out = np.zeros(len(column))
    for key, value in table.items():
        out[column == key] = value
    return out


def _soft(a, b, p=3.0):
    return (a**p + b**p) ** (1.0 / p)


def _inflight(lam, step, work, out, limit):
    """Mean number of decoding sequences: Little's law around the batch-dependent step time, by bisection."""
    free = np.maximum(1 - lam * work, 1e-3)
    lo, hi = np.zeros_like(limit), limit.astype(float).copy()
    for _ in range(22):
        mid = (lo + hi) / 2
        more = lam * out * step(mid) / free > mid
        lo, hi = np.where(more, mid, lo), np.where(more, hi, mid)
    return np.maximum((lo + hi) / 2, 1e-3)


def _wait99(rho, service, servers, ca2, span):
    """p99 wait of a multi-server queue (Sakasegawa), and the backlog of an overloaded replay."""
    r = np.minimum(rho, 0.985)
    mean = service * (1 + ca2) / 2 * r ** (np.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - r))
    return 4.6 * mean + 0.98 * span * np.maximum(0, 1 - 1 / np.maximum(rho, 1e-9))


def _bill(price, gpus, lam, cap, n, out, ttft, tpot):
    """USD per million output tokens of replaying n requests at lam requests per second."""
    seconds = n / np.minimum(lam, cap) + 0.5 * np.minimum(ttft + out * tpot, 60.0)
    return price * gpus / 3600 * seconds / (n * out) * 1e6


def _gib(x):
    return f"{x / GIB:.2f} GiB"


def _oom(total, want, free):
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {_gib(max(want, 2e6))}. GPU 0 has a total capacity "
        f"of {_gib(total)} of which {_gib(max(free, 0.0))} is free."
    )


NO_BLOCKS = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
    "initializing the engine."
)


# --------------------------------------------------------------------------------------------------------------
# 0: short chats with an 8B model on one A100-40GB, an older vLLM with multi-step scheduling


def _chat8b(c, load, speed):
    rate, n, n_in, n_out, shared = 7.5, 2400, 430, 190, 150
    mns, mnbt, gmu = c["max_num_seqs"], c["max_num_batched_tokens"], c["gpu_memory_utilization"]
    q, kv8, chunked = c["quantization"], c["kv_cache_dtype"] == "fp8", c["enable_chunked_prefill"]
    apc, eager, bs, multi = c["enable_prefix_caching"], c["enforce_eager"], c["block_size"], c["num_scheduler_steps"]
    weights = _pick(q, {"none": 16.06, "awq": 5.7, "awq_marlin": 5.7, "fp8": 9.1}) * GB
    slow = _pick(q, {"none": 1.0, "awq": 2.1, "awq_marlin": 1.17, "fp8": 1.10})  # no FP8 units: weight-only Marlin
    bw, peak = 1.555e12 * 0.84, 312e12 * 0.60
    token = 131072 * np.where(kv8, 0.5, 1.0)
    total = 39.4 * GIB
    act = 0.9e9 + mnbt * 0.34e6 + mns * 1.1e6
    graphs = np.where(eager, 0.0, 0.55e9 + 2.4e6 * np.minimum(mns, 256))
    room = gmu * total - weights - act
    slots_kv = room / token / (n_in + n_out * 0.6 + bs / 2)
    crash = [
        (
            ~chunked & (mnbt < 2048),
            lambda i: (
                f"ValueError: max_num_batched_tokens ({mnbt[i]}) is smaller than max_model_len "
                "(2048). This effectively limits the maximum sequence length to max_num_batched_tokens and makes vLLM reject "
                "longer sequences. Please increase max_num_batched_tokens or decrease max_model_len."
            ),
        ),
        (
            chunked & (multi > 4),
            lambda i: (
                "NotImplementedError: Multi-Step Chunked-Prefill with more than 4 scheduler steps "
                "is not supported by the current attention backend."
            ),
        ),
        (room < 0.5e9, lambda i: NO_BLOCKS),
        (gmu * total + graphs > total - 0.65e9, lambda i: _oom(total, graphs[i] / 8, total - gmu[i] * total - 0.65e9)),
    ]
    slots_kv = np.maximum(slots_kv, 1.0)
    limit = np.maximum(np.minimum(mns, slots_kv * 0.97), 1.0)
    # prefix: only full blocks hit, and hashing blocks costs the CPU
    cached = np.where(apc, np.floor(shared / bs) * bs * 0.93, 0.0)
    chunk = np.minimum(mnbt, np.where(chunked, 3.2 * n_in, 6.0 * n_in))
    mfu = chunk / (chunk + 260)
    work = ((n_in - cached) * 16.1e9 * slow / (peak * mfu) + np.where(apc, 0.0011, 0.0) + 0.0009) * speed
    ctx = n_in + n_out / 2
    tri = np.where(kv8, 1.55, 1.0)  # fp8 cache on sm80: another attention kernel that converts on the fly

    def step(b):
        mat = _soft(weights / bw, b * 16.1e9 * slow / peak)
        att = b * ctx * token * tri / bw * np.where(bs == 32, 0.97, 1.0)
        gpu = mat + att + 0.0006
        nograph = eager | (b > 256)
        launch = np.where(nograph, 0.0112, 0.0)
        cpu = 0.0034 + b * 22e-6 + np.where(apc, 0.0004, 0.0)
        return (
            np.maximum(gpu, launch)
            + cpu / np.where(multi == 1, 1.0, np.where(multi == 4, 2.6, 3.9))
            + np.where(nograph, 0.0018, 0.0)
        ) * speed

    lam = rate * load
    cap = 1 / (work + n_out * step(limit) / limit)
    # multi-step: finished sequences keep their slot until the burst of steps ends
    cap = cap * (1 - 1.5 * (multi - 1) / n_out)
    rho = lam / cap
    b = _inflight(lam, step, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.6 * np.sqrt(b * 1.7))
    t = step(b99)
    piece = np.where(chunked, np.minimum(mnbt, 2.5 * n_in) - b99, np.minimum(mnbt, 6 * n_in))
    piece = np.maximum(piece, 64)
    stall = piece * 16.1e9 * slow / (peak * mfu) * speed
    busy = np.minimum(0.97, lam * work)
    tpot = t / (1 - busy * np.where(chunked, 0.92, 1.0)) + np.where(chunked, 0.12, 0.045 * (1 + 2 * busy)) * stall
    chunks = np.where(chunked, np.ceil(n_in * 1.6 / np.maximum(mnbt - b99, 64)), 1.0)
    ttft = (
        work * 2.2
        + chunks * np.where(chunked, t + 0.5 * stall, 0.35 * t)
        + (multi - 1) * 0.85 * t
        + _wait99(busy, work * np.where(chunked, 2.0, 1.0), 1.0, 1.8, 0.0)
        + _wait99(rho, n_out * t, limit, 2.2, n / lam)
    )
    return _bill(1.29, 1.0, lam, cap, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# 1: document questions with a 70B model on up to eight H100s; whatever GPUs are left over go to another team


def _dense70b(c, load, speed):
    rate, n, n_in, n_out = 1.15, 1500, 1900, 330
    tp, pp, q8 = c["tensor_parallel_size"], c["pipeline_parallel_size"], c["quantization"] == "fp8"
    kv8, mns, mnbt = c["kv_cache_dtype"] == "fp8", c["max_num_seqs"], c["max_num_batched_tokens"]
    gmu, k, nocar = c["gpu_memory_utilization"], c["num_speculative_tokens"], c["disable_custom_all_reduce"]
    gpus = tp * pp
    total = 79.1 * GIB
    spec = k > 0
    weights = np.where(q8, 71.5e9, 141.2e9) / gpus + np.where(spec, 2.1e9 / tp, 0.0)
    act = 1.3e9 + mnbt * 0.30e6 * np.where(tp == 2, 1.5, 1.0) + np.where(q8, 0.4e9, 0.0) + 1.1e9 * (tp >= 4)
    graphs = 1.0e9 + 1.3e6 * mns
    token = 327680 * np.where(kv8, 0.5, 1.0) / gpus
    room = gmu * total - weights - act
    slots_kv = room / token / (n_in + 0.6 * n_out + 24)
    crash = [
        (
            gpus > 8,
            lambda i: (
                f"ValueError: World size ({gpus[i]}) is larger than the number of available GPUs (8) in this "
                "node. If this is intentional and you are using: - ray, set '--distributed-executor-backend ray'."
            ),
        ),
        (weights > total * 0.97, lambda i: _oom(total, 448 * 2.0**20, total * 0.002)),
        (
            room < 16384 * token,
            lambda i: (
                "ValueError: To serve at least one request with the models's max seq len (16384), "
                f"({_gib(16384 * token[i])} KV cache is needed, which is larger than the available KV cache memory "
                f"({_gib(max(room[i], 0.0))}). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
            ),
        ),
        (
            gmu * total + graphs + mnbt * 0.13e6 > total - 0.9e9,
            lambda i: _oom(total, graphs[i] / 6, total - gmu[i] * total - 1.5e9),
        ),
    ]
    limit = np.maximum(np.minimum(mns, 0.97 * np.maximum(slots_kv, 1.0)), 1.0)
    peak = np.where(q8, 1.28, 1.0) * 989e12 * 0.54
    bw = 3.35e12 * 0.80
    ring = np.where(tp == 8, 330e9, 360e9)
    lat_small = np.where(nocar, 31e-6, 10e-6 + 0.9e-6 * tp)
    alpha = 0.70

    def comm(tokens):
        size = tokens * 8192 * 2.0
        lat = np.where(size < 8e6, lat_small, 31e-6)  # the custom kernel is for small messages
        return 160 / pp * (lat + size * 2 * (tp - 1) / tp / ring)

    def matmul(tokens):
        eff = 1.0 - 0.05 * (np.log2(tp) - 1)  # slimmer shards
        return _soft(np.where(q8, 71.5e9, 141.2e9) / gpus / bw, tokens * 2 * 70.6e9 / (gpus * peak * eff))

    gain = np.where(spec, (1 - alpha ** (k + 1)) / (1 - alpha), 1.0)

    def step(b):  # seconds per emitted token of a sequence
        m = b / pp
        rows = m * (k + 1)
        kvread = m * (n_in + n_out / 2) * token * pp / bw / pp * np.where(kv8, 1.12, 1.0) * (1 + 0.10 * k)
        one = matmul(rows) + kvread + comm(rows) + 0.0017 + m * 9e-6
        draft = k * (0.0013 + m * 14e-6) + np.where(spec, 0.0021, 0.0)
        return (one * pp + draft) / gain * speed

    chunk = np.maximum(mnbt - np.minimum(limit, 0.5 * mnbt), 256)
    chunk = np.minimum(chunk, 4.0 * n_in)
    passes = n_in / chunk
    per_tok = 2 * 70.6e9 / (gpus * peak * (1 - 0.05 * (np.log2(tp) - 1))) * (1 + 400 / chunk)
    bubble = np.where(pp > 1, 1.0 + 0.10 + 0.12 * np.minimum(1.0, chunk / 8192), 1.0)
    work = (n_in * per_tok * 1.06 + comm(chunk) * passes + 0.0022 * passes) * bubble * speed
    work = work * np.where(spec, 1.05, 1.0)
    lam = rate * load

    def per_seq(b):
        return step(b) / np.where(pp > 1, 0.93, 1.0)

    cap = 1 / (work + n_out * per_seq(limit) / limit)
    rho = lam / cap
    b = _inflight(lam, per_seq, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.4 * np.sqrt(b * 1.5))
    # cache pressure: if sequences may be admitted beyond what the cache holds, late ones get preempted
    squeeze = np.clip((np.minimum(mns, b99 * 1.25) / np.maximum(slots_kv, 1.0)) - 0.92, 0, 0.6)
    t = per_seq(b99)
    busy = np.minimum(0.97, lam * work)
    stall = chunk * per_tok * pp * speed + comm(chunk) * pp
    tpot = t / (1 - 0.95 * busy) + 0.10 * (0.4 + busy) * stall + 0.4 * squeeze * t
    ttft = (
        work * pp**0.6 * 1.7 / (1 - 0.5 * busy)
        + np.ceil(passes) * t * gain
        + _wait99(busy, work, 1.0, 1.9, 0.0)
        + _wait99(rho, n_out * t, limit, 2.0, n / lam)
        + squeeze * 3.0
    )
    return _bill(2.95, gpus, lam, cap, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# 2: a 235B-A22B mixture of experts (FP8) on up to eight H200s, reasoning-like answers


def _moe235b(c, load, speed):
    rate, n, n_in, n_out = 1.3, 1400, 1100, 850
    tp, dp, mode = c["tensor_parallel_size"], c["data_parallel_size"], c["expert_parallel_mode"]
    a2a, mns, mnbt = c["all2all_backend"], c["max_num_seqs"], c["max_num_batched_tokens"]
    kv8, gmu = c["kv_cache_dtype"] == "fp8", c["gpu_memory_utilization"]
    full, asyn = c["cudagraph_mode"] == "FULL_AND_PIECEWISE", c["async_scheduling"]
    ws = tp * dp
    ep, eplb = mode != "off", mode == "ep+eplb"
    total = 139.8 * GIB
    experts = 227e9 * np.where(eplb, 1.125, 1.0) / ws
    weights = experts + 8.2e9 / tp
    ll, ht = (a2a == "deepep_low_latency") & ep & (dp > 1), (a2a == "deepep_high_throughput") & ep & (dp > 1)
    act = 2.2e9 + mnbt * dp * 0.34e6 + np.where(ll, mns * 22e6, 0.0) + np.where(ht, 2.0e9, 0.0)
    graphs = np.where(full, 2.6e9 + 3.2e6 * mns, 1.5e9)
    token = 192512 * np.where(kv8, 0.5, 1.0) / np.minimum(tp, 4)
    room = gmu * total - weights - act
    slots_kv = room / token / (n_in + 0.62 * n_out + 16)
    crash = [
        (
            ws > 8,
            lambda i: f"ValueError: World size ({ws[i]}) is larger than the number of available GPUs (8) in this node.",
        ),
        (
            ~ep & (ws == 8),
            lambda i: (
                "ValueError: The output_size of gate's and up's weight = 192 is not divisible by weight "
                "quantization block_n = 128."
            ),
        ),
        (
            ll & (mns > 256),
            lambda i: (
                "AssertionError: DeepEP low-latency kernels: max_num_tokens_per_rank "
                f"({mns[i]}) exceeds the dispatch buffer (VLLM_DEEPEP_LL_MAX_TOKENS=256)"
            ),
        ),
        (weights + 1.5e9 > gmu * total, lambda i: NO_BLOCKS),
        (
            room < 32768 * token,
            lambda i: (
                "ValueError: To serve at least one request with the models's max seq len (32768), "
                f"({_gib(32768 * token[i])} KV cache is needed, which is larger than the available KV cache memory "
                f"({_gib(max(room[i], 0.0))}). Based on the available memory, the estimated maximum model length is "
                f"{max(0, int(room[i] / token[i]) // 16 * 16)}."
            ),
        ),
        (gmu * total + graphs + 0.8e9 > total, lambda i: _oom(total, graphs[i] / 5, total * (1 - gmu[i]) - 0.8e9)),
    ]
    limit = np.maximum(np.minimum(mns, 0.97 * np.maximum(slots_kv, 1.0)), 1.0)  # per DP rank
    bw = 4.8e12 * 0.74
    peak = 1979e12 * 0.36
    lean = np.where(ep, 1.0, 1 - 0.13 * (np.log2(ws) - 1))  # experts cut in slices: thin GEMMs

    def skew(tokens):  # the busiest rank's share over the mean
        few = 1.6 / np.sqrt(np.maximum(tokens, 1.0))
        return np.where(ep, 1 + np.where(eplb, 0.07, 0.34) * np.log2(ws) / 3 + 0.5 * few, 1.0)

    def layers(tokens):  # tokens per DP rank in this forward pass
        everyone = tokens * dp
        touched = 1 - (1 - 8 / 128) ** (everyone * 0.8)
        wread = (experts * touched * np.where(ep, 1 + 0.25 * (1 - touched), 1.0) + 8.2e9 / tp) / bw
        flops = (2 * everyone * 14.2e9 / ws / lean * skew(everyone) + 2 * tokens * 8.2e9 / tp) / peak
        one = tokens * 4096 * 2.0
        ar = np.where(tp > 1, 94 * (1 + (dp == 1)) * (7e-6 + 1.1e-6 * tp + one * 2 * (tp - 1) / tp / 400e9), 0.0)
        lat = np.where(ll, 13e-6, np.where(ht, 46e-6, 19e-6))
        vol = np.where(ll, 1.5, np.where(ht, 0.55, 1.0)) * one * 2 * np.where(ht | ll, 1.0, dp)
        disp = np.where(dp > 1, 94 * 2 * (lat + vol / 300e9), 0.0)
        return _soft(wread, flops) + ar + disp

    def step(b):
        kvread = b * (n_in + n_out / 2) * token / bw * np.where(kv8, 1.10, 1.0)
        gpu = layers(b) + kvread
        launch = np.where(full, 0.0006, 0.0048)
        cpu = 0.0026 + b * 13e-6
        sync = np.where(dp > 1, 1.02, 1.0)  # ranks march in step
        base = np.where(asyn, np.maximum(gpu + launch, cpu) + 0.0004, gpu + launch + cpu)
        return base * sync * np.where(eplb, 1.015, 1.0) * speed

    chunk = np.clip(mnbt - np.minimum(limit, mnbt / 2), 256, 5 * n_in)
    passes = n_in / chunk
    work = passes * (layers(chunk) + 0.004) * (1 + 300 / chunk) * np.where(dp > 1, 1.06, 1.0) * speed
    work = work * np.where(asyn, 1.0, 1.03)
    lam = rate * load / dp
    cap = 1 / (work + n_out * step(limit) / limit)
    rho = lam / cap
    b = _inflight(lam, step, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.3 * np.sqrt(b * 1.4) * np.where(dp > 1, 1.2, 1.0))
    t = step(b99)
    busy = np.minimum(0.97, lam * work)
    stall = layers(chunk) * speed
    over = np.clip(np.minimum(mns, b99 * 1.2) / np.maximum(slots_kv, 1.0) - 0.95, 0, 0.5)
    tpot = t / (1 - busy) + 0.06 * (1 + busy) * stall + over * 0.5 * t + np.where(eplb, 0.0012, 0.0)
    ttft = (
        1.6 * work / (1 - 0.5 * busy)
        + np.ceil(passes) * t
        + stall
        + _wait99(busy, work, 1.0, 1.8, 0.0)
        + _wait99(rho, n_out * t, limit, 1.8, n / (rate * load))
        + np.where(asyn, t, 0.0)
        + over * 4.0
        + np.where(eplb, 0.22, 0.0)
    )  # a re-balancing now and then stalls arrivals
    return _bill(3.8, ws, rate * load, cap * dp, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# 3: a 13B multi-head-attention model on two A10Gs: the KV cache is everything, preemption bites


def _old13b(c, load, speed):
    rate, n, n_in, n_out = 0.95, 500, 560, 190
    tp, pp, q = c["tensor_parallel_size"], c["pipeline_parallel_size"], c["quantization"]
    kv8, gmu, mns = c["kv_cache_dtype"] == "fp8_e5m2", c["gpu_memory_utilization"], c["max_num_seqs"]
    swapmode, swap = c["preemption_mode"] == "swap", c["swap_space"]
    gpus = tp * pp
    total = 22.06 * GIB
    weights = _pick(q, {"none": 26.1, "awq": 7.4, "gptq_marlin": 7.6}) * GB / gpus
    slow = _pick(q, {"none": 1.0, "awq": 1.75, "gptq_marlin": 1.13})
    act = 1.25e9 + 0.25e9 * (gpus > 1) + mns * 1.5e6
    token = 819200 * np.where(kv8, 0.5, 1.0) / gpus
    room = gmu * total - weights - act
    per_seq = n_in + 0.55 * n_out + 8
    slots_kv = np.maximum(room / token / per_seq, 0.5)
    ram = 62.0
    crash = [
        (
            gpus > 2,
            lambda i: (
                f"ValueError: The number of required GPUs exceeds the total number of available GPUs in the "
                f"placement group. (required {gpus[i]}, available 2)"
            ),
        ),
        (weights > 0.985 * total, lambda i: _oom(total, 136 * 2.0**20, 30e6)),
        (
            room < 4096 * token,
            lambda i: (
                f"ValueError: The model's max seq len (4096) is larger than the maximum number of "
                f"tokens that can be stored in KV cache ({max(0, int(room[i] / token[i]))}). Try increasing "
                "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
            ),
        ),
        (
            swap * gpus > 0.7 * ram,
            lambda i: (
                f"ValueError: Too large swap space. {swap[i] * gpus[i]:.2f} GiB out of the "
                f"{ram:.2f} GiB total CPU memory is allocated for the swap space."
            ),
        ),
        (
            gmu * total + 0.30e9 + mns * 3.4e6 > total - 0.25e9,
            lambda i: _oom(total, 64 * 2.0**20, total * (1 - gmu[i]) - 0.55e9),
        ),
    ]
    limit = np.maximum(np.minimum(mns, slots_kv), 1.0)
    bw, peak, pcie = 600e9 * 0.82, 70e12 * 0.72, 9.0e9

    def comm(tokens):
        return np.where(tp > 1, 80 * (34e-6 + tokens * 10240.0 / pcie), 0.0) + np.where(
            pp > 1, 90e-6 + tokens * 10240 / pcie, 0.0
        )

    def step(b):
        m = b / pp
        mat = _soft(weights / bw, m * 26e9 * slow / gpus / peak)
        kvread = m * (n_in + n_out / 2) * token / bw * np.where(kv8, 1.30, 1.0)
        stage = mat + kvread + comm(m) / np.where(pp > 1, 2.0, 1.0)
        return (stage * pp + 0.0042 + b * 30e-6 + 0.0015 * (gpus > 1)) * speed

    one = (
        n_in
        * 26e9
        * np.where(q == "awq", 1.22, np.where(q == "none", 1.0, 1.06))
        / (gpus * peak)
        * np.where(pp > 1, 1.24, 1.0)
    )
    work0 = (one + comm(n_in * 1.0) + 0.004) * speed
    lam = rate * load

    # first without preemption, to see how many sequences want to be in the cache at once
    want = _inflight(lam, step, work0, n_out, np.minimum(mns, 6.0 * slots_kv + 4) + 0.0)
    peakw = np.minimum(mns, want + 2.2 * np.sqrt(want * 1.6))
    excess = np.clip(peakw - slots_kv, 0, None)
    share = np.clip(excess / slots_kv, 0, 1.0)  # how often a sequence is thrown out
    moved = per_seq * token  # bytes per GPU
    redo = np.where(swapmode, 2 * moved / (12e9 * 0.35) + 0.006, 0.85 * one * 1.2) * speed
    work = work0 + 0.9 * share * redo
    # the swap space is per GPU; running out of it aborts the engine
    demand = excess * moved * np.where(swapmode, 1.0, 0.0)
    crash.append(
        (
            demand > swap * GIB,
            lambda i: (
                "RuntimeError: Aborted due to the lack of CPU swap space. Please increase "
                "the swap space to avoid this error."
            ),
        )
    )
    cap = 1 / (work + n_out * step(limit) / limit)
    rho = lam / cap
    b = _inflight(lam, step, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.4 * np.sqrt(b * 1.6))
    t = step(b99)
    busy = np.minimum(0.97, lam * work)
    tpot = t / (1 - busy) + 0.05 * work0 + share * (1.4 * redo + 0.35 * t * np.sqrt(limit)) / 8
    ttft = (
        work0 * 1.8 * np.where(pp > 1, 1.5, 1.0) / (1 - 0.4 * busy)
        + t
        + _wait99(busy, work, 1.0, 1.6, 0.0)
        + _wait99(rho, n_out * t / (1 - busy), limit, 1.6, n / lam)
    )
    return _bill(1.01, gpus, lam, cap, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# 4: code completion, long prompts and short answers, a 7B coder on one L4


def _coder7b(c, load, speed):
    rate, n, n_in, n_out = 0.66, 900, 2600, 64
    mns, mnbt, gmu = c["max_num_seqs"], c["max_num_batched_tokens"], c["gpu_memory_utilization"]
    q, kv8, apc = c["quantization"], c["kv_cache_dtype"] == "fp8", c["enable_prefix_caching"]
    method, k, part = c["speculative_method"], c["num_speculative_tokens"], c["long_prefill_token_threshold"]
    backend = c["attention_backend"]
    ngram, draft = method == "ngram", method == "draft_model"
    k = np.where(ngram | draft, k, 0)
    total = 22.05 * GIB
    weights = _pick(q, {"none": 15.3, "fp8": 8.5, "awq_marlin": 5.6}) * GB + np.where(draft, 1.05e9, 0.0)
    act = 0.75e9 + mnbt * 0.27e6 + np.where(backend == "FLASHINFER", 0.42e9, 0.0)
    token = 57344 * np.where(kv8, 0.5, 1.0) * np.where(draft, 1.22, 1.0)
    room = gmu * total - weights - act
    graphs = 0.25e9 + mns * 3.4e6 * (1 + 0.15 * k)
    crash = [
        (
            room < 16384 * token,
            lambda i: (
                NO_BLOCKS
                if room[i] < 0
                else "ValueError: To serve at least one request with the models's max seq len (16384), "
                f"({_gib(16384 * token[i])} KV cache is needed, which is larger than the available KV cache memory "
                f"({_gib(max(room[i], 0.0))}). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
            ),
        ),
        (
            kv8 & (backend == "FLASH_ATTN"),
            lambda i: (
                "ValueError: Selected backend FLASH_ATTN is not valid for this "
                "configuration. Reason: ['kv_cache_dtype not supported']"
            ),
        ),
        (gmu * total + graphs > total - 0.35e9, lambda i: _oom(total, 112 * 2.0**20, total * (1 - gmu[i]) - graphs[i])),
        (
            draft & (k >= 6) & (mns * (k + 1) > mnbt),
            lambda i: (
                "ValueError: max_num_scheduled_tokens is too small: "
                f"max_num_batched_tokens ({mnbt[i]}) leaves no room for max_num_seqs * (num_speculative_tokens + 1) draft slots."
            ),
        ),
    ]
    slots_kv = np.maximum(room / token / (n_in + n_out), 1.0)
    limit = np.minimum(mns, slots_kv)
    # the prefix cache lives in what running sequences leave over; a server that admits many evicts its own prefixes
    held = np.minimum(mns, slots_kv * 0.9) * n_in * 0.68
    spare = np.maximum(room / token - held, 0.0)
    hit = np.where(apc, 0.42 * (1 - np.exp(-spare / 24000.0)), 0.0)
    bw = 300e9 * 0.86
    peak = np.where(q == "fp8", 1.16, np.where(q == "awq_marlin", 0.86, 1.0)) * 121e12 * 0.52
    fresh = n_in * (1 - hit)
    piece = np.minimum(mnbt, np.where(part > 0, np.maximum(part, 1), 99999))
    piece = np.minimum(piece, fresh)
    passes = np.maximum(fresh / piece, 1.0)
    attn = fresh * n_in * 28 * 3584 * 4 * 0.5 / (peak * np.where(backend == "FLASH_ATTN", 0.62, 0.54))
    reread = passes * n_in * 0.5 * token / bw * 0.6
    batchy = np.where(part > 0, np.minimum(mnbt, 3 * piece), piece)  # several partial prefills share a pass
    work = (
        fresh * 15.2e9 / (peak * batchy / (batchy + 170))
        + attn
        + reread
        + 0.0035 * passes
        + np.where(apc, 0.004, 0)
        + np.where(draft, 0.075 * fresh / n_in, 0.0)
    ) * speed
    # acceptance: completions copy a lot from the prompt, but long guesses are mostly wrong
    a = np.where(ngram, 0.60, 0.68)
    gain = np.where(k > 0, (1 - a ** (k + 1)) / (1 - a), 1.0)
    gain = np.where(ngram, 1 + 0.78 * (gain - 1), gain)  # the lookup finds nothing in one step of five

    def step(b):
        rows = b * (k + 1)
        mat = _soft(weights / bw, rows * 15.2e9 / peak)
        kvr = (
            b
            * (n_in + n_out / 2)
            * token
            / bw
            * np.where(backend == "FLASHINFER", 1.0, 1.06)
            * np.where(kv8, 1.08, 1.0)
        )
        # drafts make the graph miss its sizes once the rows pass 256
        miss = np.where(rows > 256, 0.007, 0.0)
        cpu = 0.0030 + b * 25e-6 + np.where(ngram, 0.0007 + b * 110e-6, 0.0)
        dr = np.where(draft, k * (0.0046 + b * 60e-6), 0.0)
        return (mat + kvr * (1 + 0.04 * k) + miss + cpu + dr) / gain * speed

    lam = rate * load
    cap = 1 / (work + n_out * step(limit) / limit)
    rho = lam / cap
    b = _inflight(lam, step, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.3 * np.sqrt(b * 1.8))
    t = step(b99)
    busy = np.minimum(0.96, lam * work)
    stall = np.minimum(batchy, 1.5 * fresh) * 15.2e9 / peak * speed
    tpot = t / (1 - busy) ** 0.9 + np.where(part > 0, 0.05, 0.07) * stall + 0.004
    jam = np.where(part > 0, 0.72, 1.0)  # short prompts overtake the long ones
    ttft = (
        1.55 * work * n_in / np.maximum(fresh, 1) ** 0.5 / n_in**0.5
        + passes * t * gain * 0.7
        + jam * _wait99(busy, work, 1.0, 1.35, 0.0) * 0.62
        + _wait99(rho, n_out * t / (1 - busy), limit, 1.4, n / lam)
    )
    return _bill(0.72, 1.0, lam, cap, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# 5: agents in many turns, a 32B model on up to four L40S without NVLink, an SGLang-like engine


def _agent32b(c, load, speed):
    rate, n, n_in, n_out = 0.50, 1000, 2100, 240
    tp, dp, q = c["tp_size"], c["dp_size"], c["quant"]
    mfs, cps, mrr = c["mem_fraction_static"], c["chunked_prefill_size"], c["max_running_requests"]
    lpm, cons = c["schedule_policy"] == "lpm", c["schedule_conservativeness"]
    tri, ncd, radix = c["attention_backend"] == "triton", c["num_continuous_decode_steps"], ~c["disable_radix_cache"]
    gpus = tp * dp
    total = 44.4 * GIB
    full_w = _pick(q, {"bf16": 65.5, "fp8": 34.0, "w4a16": 19.5}) * GB
    weights = full_w / tp
    token = 262144.0 / tp
    room = mfs * total - weights - 0.7e9
    act = 1.1e9 + cps * 0.36e6 * np.where(tri, 0.8, 1.0) + 0.8e9
    crash = [
        (gpus > 4, lambda i: f"AssertionError: tp_size * dp_size = {gpus[i]} exceeds the number of visible GPUs (4)"),
        (
            room < 12000 * token,
            lambda i: (
                "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. "
                f"Current value: mem_fraction_static={mfs[i]}"
            ),
        ),
        (mfs * total + act > total, lambda i: _oom(total, act[i] / 3, total * (1 - mfs[i]) - 0.9e9)),
        (
            (q == "w4a16") & tri & (tp == 4),
            lambda i: (
                "ValueError: Weight input_size_per_partition = 6912 is not divisible by "
                "min_thread_k = 128 * group. Consider reducing tensor_parallel_size or running with --quantization gptq."
            ),
        ),
    ]
    slots = np.maximum(room / token, 4000.0)  # tokens
    # the scheduler admits by an estimate of how long answers get; a bold one packs more and must retract some
    need = n_in * 0.75 + n_out * (0.45 + 0.55 * cons)
    bold = slots / need
    limit = np.maximum(np.minimum(mrr, bold), 1.0)
    retract = np.clip((1.0 - cons) * 0.30 * np.clip(np.minimum(mrr * 1.0, 1.3 * bold) / bold - 0.55, 0, 0.75), 0, 1)
    # radix cache: earlier turns stay if there is room; two replicas split the sessions between them
    spare = np.maximum(slots - 0.55 * np.minimum(mrr, bold) * need, 0.0)
    hit = np.where(radix, 0.52 * (1 - np.exp(-(spare + 0.12 * slots) / 60000.0)) * np.where(dp > 1, 0.93, 1.0), 0.0)
    hit = hit * np.where(lpm, 1.10, 1.0)
    fresh = n_in * (1 - hit)
    bw = 864e9 * 0.80
    peak = np.where(q == "fp8", 1.25, np.where(q == "w4a16", 0.88, 1.0)) * 181e12 * 0.58 * np.where(tri, 0.92, 1.0)
    link = np.where(tp == 4, 13e9, 15e9)

    def comm(tokens):
        return np.where(tp > 1, 128 * (19e-6 + 8e-6 * tp + tokens * 10240.0 * 2 * (tp - 1) / tp / link / 1.35), 0.0)

    chunk = np.minimum(cps, 3.2 * fresh)
    passes = fresh / chunk
    work = (
        fresh * 65e9 / (tp * peak * chunk / (chunk + 240))
        + comm(chunk) * passes * 0.8
        + 0.006 * passes
        + fresh * n_in * 64 * 5120 * 2 / (tp * peak * 0.6)
        + np.where(radix, 0.003, 0.0)
    ) * speed
    work = work * (1 + 1.1 * retract)

    def step(b):
        mat = _soft(full_w / tp / bw, b * 65e9 / (tp * peak))
        kvr = b * (n_in + n_out / 2) * token / bw * np.where(tri, 1.18, 1.0)
        cpu = 0.0046 + b * 28e-6 + np.where(lpm, b * 12e-6, 0.0)
        return (mat + kvr + comm(b) + cpu / ncd**0.8) * speed

    lam = rate * load / dp
    lag = 1 + 0.5 * (ncd - 1) / n_out * 2
    cap = 1 / (work + n_out * lag * step(limit) / limit)
    rho = lam / cap
    b = _inflight(lam, step, work, n_out, limit)
    b99 = np.minimum(limit, b + 2.3 * np.sqrt(b * 1.6))
    t = step(b99)
    busy = np.minimum(0.97, lam * work)
    stall = (chunk * 65e9 / (tp * peak) + comm(chunk) * 0.8) * speed
    tpot = t / (1 - busy) + 0.045 * (1 + busy) * stall + 2.2 * retract * t
    ttft = (
        1.6 * work / (1 - 0.3 * busy)
        + passes * 0.5 * t
        + 1.2 * (ncd - 1) * t
        + 0.5 * stall
        + _wait99(busy, work, 1.0, 1.5, 0.0) * np.where(lpm, 0.9 + 0.75 * busy**3, 1.0)  # the unlucky prefix starves
        + _wait99(rho, n_out * t / (1 - busy), limit, 1.7, n / (rate * load))
    )
    return _bill(1.15, gpus, rate * load, cap * dp, n, n_out, ttft, tpot), ttft, tpot, crash


# --------------------------------------------------------------------------------------------------------------
# the deployments

SCENARIOS = [
    {
        "name": "chat-8b-a100-40g",
        "about": "Llama-3.1-8B, short chats, one A100-40GB, vLLM with multi-step scheduling",
        "model": _chat8b,
        "luck": (0.03, 0.04),
        "outliers": 0.0,
        "space": {
            "max_num_seqs": [64, 128, 192, 256, 384],
            "max_num_batched_tokens": [1024, 2048, 4096, 8192],
            "gpu_memory_utilization": [0.80, 0.90, 0.96],
            "quantization": ["none", "awq", "awq_marlin", "fp8"],
            "kv_cache_dtype": ["auto", "fp8"],
            "enable_chunked_prefill": [False, True],
            "enable_prefix_caching": [False, True],
            "enforce_eager": [False, True],
            "block_size": [16, 32],
            "num_scheduler_steps": [1, 4, 10],
        },
        "default": {
            "max_num_seqs": 256,
            "max_num_batched_tokens": 2048,
            "gpu_memory_utilization": 0.90,
            "quantization": "none",
            "kv_cache_dtype": "auto",
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "enforce_eager": False,
            "block_size": 16,
            "num_scheduler_steps": 1,
        },
        "loads": [1.0, 1.2, 1.4, 1.55, 1.7, 1.85, 2.0],
        "slo": {"ttft_p99_s": 0.7, "tpot_p99_s": 0.060},
    },
    {
        "name": "docs-70b-8xh100",
        "about": "Llama-3.3-70B, questions about documents, one to eight H100s of a node, vLLM with an eagle3 drafter",
        "model": _dense70b,
        "luck": (0.03, 0.04),
        "outliers": 0.01,
        "space": {
            "tensor_parallel_size": [2, 4, 8],
            "pipeline_parallel_size": [1, 2],
            "quantization": ["none", "fp8"],
            "kv_cache_dtype": ["auto", "fp8"],
            "max_num_seqs": [32, 64, 128, 256, 512],
            "max_num_batched_tokens": [1024, 2048, 4096, 8192, 16384],
            "gpu_memory_utilization": [0.85, 0.90, 0.95],
            "num_speculative_tokens": [0, 2, 4],
            "disable_custom_all_reduce": [False, True],
        },
        "default": {
            "tensor_parallel_size": 4,
            "pipeline_parallel_size": 1,
            "quantization": "none",
            "kv_cache_dtype": "auto",
            "max_num_seqs": 256,
            "max_num_batched_tokens": 2048,
            "gpu_memory_utilization": 0.90,
            "num_speculative_tokens": 0,
            "disable_custom_all_reduce": False,
        },
        "loads": [1.0, 1.5, 2.0, 2.7, 3.5, 5.0, 7.0],
        "slo": {"ttft_p99_s": 2.0, "tpot_p99_s": 0.060},
    },
    {
        "name": "moe-235b-8xh200",
        "about": "Qwen3-235B-A22B-FP8, reasoning answers, up to eight H200s",
        "model": _moe235b,
        "luck": (0.03, 0.04),
        "outliers": 0.0,
        "space": {
            "tensor_parallel_size": [2, 4, 8],
            "data_parallel_size": [1, 2],
            "expert_parallel_mode": ["off", "ep", "ep+eplb"],
            "all2all_backend": ["allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency"],
            "max_num_seqs": [64, 128, 256, 384, 512],
            "max_num_batched_tokens": [2048, 4096, 8192, 16384],
            "kv_cache_dtype": ["auto", "fp8"],
            "gpu_memory_utilization": [0.88, 0.92, 0.95],
            "cudagraph_mode": ["PIECEWISE", "FULL_AND_PIECEWISE"],
            "async_scheduling": [False, True],
        },
        "default": {
            "tensor_parallel_size": 4,
            "data_parallel_size": 1,
            "expert_parallel_mode": "off",
            "all2all_backend": "allgather_reducescatter",
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "kv_cache_dtype": "auto",
            "gpu_memory_utilization": 0.92,
            "cudagraph_mode": "PIECEWISE",
            "async_scheduling": False,
        },
        "loads": [1.0, 2.5, 4.0, 5.0, 6.2, 7.8, 11.0],
        "slo": {"ttft_p99_s": 2.5, "tpot_p99_s": 0.050},
    },
    {
        "name": "summary-13b-2xa10g",
        "about": "Llama-2-13B (no grouped attention), one or two A10Gs over PCIe, an old vLLM with swapping",
        "model": _old13b,
        "luck": (0.03, 0.04),
        "outliers": 0.015,
        "space": {
            "tensor_parallel_size": [1, 2],
            "pipeline_parallel_size": [1, 2],
            "quantization": ["none", "awq", "gptq_marlin"],
            "kv_cache_dtype": ["auto", "fp8_e5m2"],
            "gpu_memory_utilization": [0.88, 0.94],
            "max_num_seqs": [16, 32, 64, 128, 256],
            "preemption_mode": ["recompute", "swap"],
            "swap_space": [1, 4, 16],
        },
        "default": {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 1,
            "quantization": "awq",
            "kv_cache_dtype": "auto",
            "gpu_memory_utilization": 0.88,
            "max_num_seqs": 256,
            "preemption_mode": "recompute",
            "swap_space": 4,
        },
        "loads": [1.0, 1.15, 1.3, 1.45, 1.6, 2.0, 2.4],
        "slo": {"ttft_p99_s": 2.5, "tpot_p99_s": 0.100},
    },
    {
        "name": "completion-7b-l4",
        "about": "Qwen2.5-Coder-7B, code completion, one L4, vLLM with speculation",
        "model": _coder7b,
        "luck": (0.03, 0.04),
        "outliers": 0.0,
        "space": {
            "max_num_batched_tokens": [1024, 2048, 4096, 8192],
            "max_num_seqs": [8, 16, 24, 48, 96],
            "gpu_memory_utilization": [0.85, 0.90, 0.95],
            "quantization": ["none", "fp8", "awq_marlin"],
            "kv_cache_dtype": ["auto", "fp8"],
            "enable_prefix_caching": [True, False],
            "speculative_method": ["none", "ngram", "draft_model"],
            "num_speculative_tokens": [2, 3, 5, 8],
            "long_prefill_token_threshold": [0, 512, 1536, 3072],
            "attention_backend": ["FLASH_ATTN", "FLASHINFER"],
        },
        "default": {
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 96,
            "gpu_memory_utilization": 0.90,
            "quantization": "none",
            "kv_cache_dtype": "auto",
            "enable_prefix_caching": True,
            "speculative_method": "none",
            "num_speculative_tokens": 3,
            "long_prefill_token_threshold": 0,
            "attention_backend": "FLASH_ATTN",
        },
        "loads": [1.0, 1.25, 1.6, 1.9, 2.25, 2.6, 3.0],
        "slo": {"ttft_p99_s": 4.0, "tpot_p99_s": 0.200},
    },
    {
        "name": "agents-32b-4xl40s",
        "about": "Qwen2.5-32B, agents in many turns, up to four L40S over PCIe, an SGLang-like engine",
        "model": _agent32b,
        "luck": (0.03, 0.04),
        "outliers": 0.01,
        "space": {
            "tp_size": [1, 2, 4],
            "dp_size": [1, 2],
            "quant": ["bf16", "fp8", "w4a16"],
            "mem_fraction_static": [0.74, 0.80, 0.86, 0.91],
            "chunked_prefill_size": [1024, 2048, 4096, 8192],
            "max_running_requests": [12, 24, 48, 96],
            "schedule_policy": ["fcfs", "lpm"],
            "schedule_conservativeness": [0.4, 0.7, 1.0],
            "attention_backend": ["flashinfer", "triton"],
            "num_continuous_decode_steps": [1, 2, 4],
            "disable_radix_cache": [False, True],
        },
        "default": {
            "tp_size": 4,
            "dp_size": 1,
            "quant": "bf16",
            "mem_fraction_static": 0.86,
            "chunked_prefill_size": 4096,
            "max_running_requests": 48,
            "schedule_policy": "fcfs",
            "schedule_conservativeness": 1.0,
            "attention_backend": "flashinfer",
            "num_continuous_decode_steps": 1,
            "disable_radix_cache": False,
        },
        "loads": [1.0, 1.5, 2.0, 2.4, 2.8, 3.3, 4.0],
        "slo": {"ttft_p99_s": 4.0, "tpot_p99_s": 0.120},
    },
]


def space(index):
    return {name: list(values) for name, values in SCENARIOS[index]["space"].items()}


def default(index):
    return dict(SCENARIOS[index]["default"])


def loads(index):
    return list(SCENARIOS[index]["loads"])


def slo(index):
    return dict(SCENARIOS[index]["slo"])


def size(index):
    return int(np.prod([len(v) for v in SCENARIOS[index]["space"].values()]))


def _key(value):
    return (isinstance(value, (bool, np.bool_)), value)


_LOOKUP = [
    [(name, {_key(v): j for j, v in enumerate(values)}) for name, values in s["space"].items()] for s in SCENARIOS
]


def _flat(index, config):
    """The number of a configuration in the grid (last parameter fastest)."""
    table = _LOOKUP[index]
    if len(config) != len(table) or any(name not in config for name, _ in table):
        raise KeyError(f"parameters do not match: {sorted(set(config) ^ {name for name, _ in table})}")
    out = 0
    for name, where in table:
        j = where.get(_key(config[name]))
        if j is None:
            raise ValueError(f"{name}={config[name]!r} is not in the space")
        out = out * len(where) + j
    return out


def config_of(index, number):
    sp = SCENARIOS[index]["space"]
    out = {}
    for name in reversed(sp):
        number, j = divmod(int(number), len(sp[name]))
        out[name] = sp[name][j]
    return {name: out[name] for name in sp}


def _columns(index, ids):
    sp = SCENARIOS[index]["space"]
    rest, out = np.asarray(ids), {}
    for name in reversed(sp):
        values = np.array(sp[name])
        out[name] = values[rest % len(values)]
        rest = rest // len(values)
    return out


def _compute(index, ids, load, lucky):
    s = SCENARIOS[index]
    a, b = s["luck"] if lucky else (0.0, 0.0)
    speed = np.exp(a * _normal(ids, 1000 * (index + 1) + 7))
    with np.errstate(all="ignore"):
        cost, ttft, tpot, crash = s["model"](_columns(index, ids), float(load), speed)
    cost = cost * np.exp(b * _normal(ids, 1000 * (index + 1) + 8))
    return cost, ttft, tpot, crash


_TABLES: dict = {}
_WHY: dict = {}


def grid(index, load, lucky=True):
    """cost, ttft, tpot and crashed of every configuration of the scenario, in grid order (for oracles)."""
    key = (index, float(load), lucky)
    if key not in _TABLES:
        if len(_TABLES) >= 50:
            _TABLES.clear()
            _WHY.clear()
        parts, why, texts = [], {}, {}
        for start in range(0, size(index), CHUNK):
            ids = np.arange(start, min(start + CHUNK, size(index)))
            cost, ttft, tpot, crash = _compute(index, ids, load, lucky)
            bad = np.zeros(len(ids), bool)
            for mask, text in crash:
                for i in np.nonzero(mask & ~bad)[0]:
                    message = text(i)
                    why[start + int(i)] = texts.setdefault(message, message)
                bad |= mask
            parts.append((cost, ttft, tpot, bad))
        _TABLES[key] = tuple(np.concatenate(p) for p in zip(*parts))
        _WHY[key] = why
    return _TABLES[key]


def truth(index, config, load):
    number = _flat(index, config)
    cost, ttft, tpot, bad = grid(index, load)
    if bad[number]:
        raise tuner.Infeasible(_WHY[index, float(load), True][number])
    return {
        "cost_usd_per_mtok_output": float(cost[number]),
        "ttft_p99_s": float(ttft[number]),
        "tpot_p99_s": float(tpot[number]),
    }


def evaluator(index, seed):
    """A noisy measurement.  The n-th measurement of a configuration at a load depends on the seed and n alone."""
    seen: dict = {}
    share = SCENARIOS[index]["outliers"]

    def measure(config, load):
        number = _flat(index, config)
        out = truth(index, config, load)
        key = (number, round(float(load) * 1000))
        seen[key] = seen.get(key, 0) + 1
        rng = np.random.default_rng([int(seed) % 2**63, index, key[0], key[1], seen[key]])
        noise = np.exp(0.05 * rng.standard_normal(3))
        hiccup = rng.random() < share  # a noisy neighbour: now and then a run is slow
        for (name, value), factor in zip(list(out.items()), noise):
            out[name] = value * float(factor)
            if hiccup:
                out[name] *= 1.15 if name.startswith("cost") else 1.6
        return out

    return measure


class scenario:
    """One scenario in the words of the other surfaces (added when the module came into the project)."""

    def __init__(self, index):
        self.index, self.LOADS = index, loads(index)

    def space(self):
        return space(self.index)

    def default(self, _):
        return default(self.index)

    def slos(self, _):
        return slo(self.index)

    def grid_index(self, params):
        return _flat(self.index, params)

    def truth_grid(self, _, lucky=False):
        """What runs (n,), cost, TPOT p99 and whether the SLOs hold (n, loads)."""
        limits, crashed, columns = slo(self.index), [], []
        for load in self.LOADS:
            cost, ttft, tpot, bad = grid(self.index, load, lucky)
            held = ~bad & (ttft <= limits["ttft_p99_s"]) & (tpot <= limits["tpot_p99_s"])
            columns.append((np.where(bad, np.inf, cost), np.where(bad, np.inf, tpot), held))
            crashed.append(bad)
        return ~np.all(crashed, axis=0), *(np.column_stack(parts) for parts in zip(*columns))

    def measure(self, params, load, _, rng):
        out = truth(self.index, params, load)
        noise = np.exp(0.05 * rng.standard_normal(3))
        hiccup = rng.random() < SCENARIOS[self.index]["outliers"]
        for (name, value), factor in zip(list(out.items()), noise):
            slower = (1.15 if name.startswith("cost") else 1.6) if hiccup else 1.0
            out[name] = value * float(factor) * slower
        return out

    def launch_s(self, params, _):
        return 90.0
