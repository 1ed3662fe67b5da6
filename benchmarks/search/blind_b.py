"""A synthetic response surface of an invented in-house engine, "Halyard": a pool of ingest workers reads prompts, hands
their cache over a network to a pool of stream workers, which generate in fixed-width waves. 24 GPUs.

No roofline at equilibrium: a fluid simulation in time of three queues (ingest, hand-over, seats) under a bursty day
of arrivals, 36 ticks of 5 s, with feedback between the pools. Things its users tend to learn late:
- scouts (draft models) live on the ingest workers: guesses come late when ingest is busy, and slow ingest down;
- small cache pages cost descriptors in the hand-over, once per page and per ganged GPU; large pages waste cache;
- a wave is padded to its width: wide waves burn arithmetic, many waves re-read the weights but hide the gang's
  communication;
- paced admission keeps token gaps at the engine's own target by making requests wait.
"""

import functools
import hashlib

import numpy as np

LOADS = [0.3, 0.6, 1.0, 1.7, 2.8, 4.5]
NOISE, LUCK = 0.05, 0.04
TICKS, TICK_S = 36, 5.0
GPUS = 24

PARAMETERS = {
    "ingest_workers": [1, 2, 4],
    "stream_workers": [1, 2, 3, 4, 6],
    "gang": [1, 2, 4],
    "wave_width": [16, 32, 64, 128],
    "waves_in_flight": [1, 2, 4],
    "slab_tokens": [512, 2048, 8192],
    "page_grain": [16, 64, 256],
    "weight_codec": ["plain16", "packed8", "packed4"],
    "cache_codec": ["full16", "mixed8"],
    "scout_depth": [0, 2, 4],
    "admission": ["eager", "paced"],
}
NAMES = list(PARAMETERS)
SHAPE = tuple(len(v) for v in PARAMETERS.values())


class World:
    """One scenario: a model, a GPU, its traffic."""

    def __init__(
        self,
        *,
        title,
        gpu_gb,
        bw,
        flops,
        native8,
        net,
        link,
        price,
        w_gb,
        active,
        layers,
        width,
        kv_b,
        prompt,
        answer,
        rate,
        burst,
        hit,
        scout_gb,
        touch,
        pace_s,
        reserve,
        ttft,
        tpot,
        seed,
    ):
        self.title, self.gpu_gb, self.bw, self.flops, self.native8, self.net, self.link = (
            title,
            gpu_gb,
            bw,
            flops,
            native8,
            net,
            link,
        )
        self.price, self.w_gb, self.active, self.layers, self.width, self.kv_b = (
            price,
            w_gb,
            active,
            layers,
            width,
            kv_b,
        )
        self.prompt, self.answer, self.rate, self.hit, self.scout_gb, self.touch = (
            prompt,
            answer,
            rate,
            hit,
            scout_gb,
            touch,
        )
        self.pace_s, self.reserve, self.slo = pace_s, reserve, {"ttft_p99_s": ttft, "tpot_p99_s": tpot}
        r = np.random.default_rng(seed)
        x, noise = 0.0, []
        for _ in range(TICKS):
            x = 0.55 * x + r.standard_normal()
            noise.append(x)
        shape = np.exp(burst * np.array(noise)) * (1 + 0.25 * np.sin(np.linspace(0, 2 * np.pi, TICKS)))
        self.profile = shape / shape.mean()


# bw in bytes/s, net in bytes/s per GPU (hand-over), link in bytes/s (within a gang), w_gb of 16-bit weights, active
# in 1e9 parameters,
# touch: the share of weights read by a lone token (1 for dense), hit: chance that one guess of the scout is right
WORLDS = [
    World(
        title="14B dense, 48 GB cards on Ethernet, chat",
        gpu_gb=48,
        bw=0.86e12,
        flops=3.4e14,
        native8=True,
        net=2.6e9,
        link=20e9,
        price=0.95,
        w_gb=29.0,
        active=14.2,
        layers=48,
        width=5120,
        kv_b=196608,
        prompt=780,
        answer=290,
        rate=6.0,
        burst=0.16,
        hit=0.68,
        scout_gb=1.3,
        touch=1.0,
        pace_s=0.045,
        reserve=384,
        ttft=1.2,
        tpot=0.080,
        seed=11,
    ),
    World(
        title="34B dense, 80 GB cards without 8-bit arithmetic, digests of documents",
        gpu_gb=80,
        bw=2.0e12,
        flops=3.1e14,
        native8=False,
        net=11e9,
        link=240e9,
        price=1.9,
        w_gb=66.0,
        active=34.0,
        layers=60,
        width=7168,
        kv_b=245760,
        prompt=5200,
        answer=330,
        rate=0.45,
        burst=0.22,
        hit=0.60,
        scout_gb=2.6,
        touch=1.0,
        pace_s=0.070,
        reserve=768,
        ttft=17.0,
        tpot=0.100,
        seed=23,
    ),
    World(
        title="100B mixture, 12B active, 141 GB cards, agents",
        gpu_gb=141,
        bw=4.7e12,
        flops=9.4e14,
        native8=True,
        net=22e9,
        link=400e9,
        price=3.4,
        w_gb=204.0,
        active=12.5,
        layers=56,
        width=6144,
        kv_b=229376,
        prompt=3000,
        answer=480,
        rate=3.6,
        burst=0.30,
        hit=0.75,
        scout_gb=3.0,
        touch=0.17,
        pace_s=0.030,
        reserve=640,
        ttft=2.5,
        tpot=0.040,
        seed=37,
    ),
]


def space():
    return {k: list(v) for k, v in PARAMETERS.items()}


def default(scenario):
    return {
        "ingest_workers": 1,
        "stream_workers": 2,
        "gang": 2,
        "wave_width": 32,
        "waves_in_flight": 2,
        "slab_tokens": 2048,
        "page_grain": 16,
        "weight_codec": "plain16",
        "cache_codec": "full16",
        "scout_depth": 0,
        "admission": "eager",
    }


def slos(scenario):
    return dict(WORLDS[scenario].slo)


class Deck:
    """A batch of configurations as columns (n, 1), and what follows from them before any request arrives."""

    def __init__(self, index, w):
        def pick(name, values):
            return np.asarray(values, dtype=float)[index[:, NAMES.index(name)]][:, None]

        for name, values in PARAMETERS.items():
            if not isinstance(values[0], str):
                setattr(self, name, pick(name, values))
        self.codec = index[:, NAMES.index("weight_codec")][:, None]
        self.mixed = index[:, NAMES.index("cache_codec")][:, None] == 1
        self.paced = index[:, NAMES.index("admission")][:, None] == 1
        self.w = w
        self.squeeze = np.array([1.0, 0.53, 0.30])[self.codec]
        self.kv = w.kv_b * np.where(self.mixed, 0.54, 1.0)
        g, gb = self.gang, w.gpu_gb
        self.seats = self.wave_width * self.waves_in_flight
        weights = w.w_gb * self.squeeze / g
        scratch = np.where(self.codec == 2, 1.5 + self.slab_tokens * 0.32e-3 * w.width / 5120, 0.4)
        self.ingest_gb = (
            weights + (self.scout_depth > 0) * w.scout_gb + scratch + self.slab_tokens * w.width * 46e-9 / g**0.5 + 1.2
        )
        logits = self.seats * (1 + self.scout_depth) * 0.9e-3
        floor = weights + 1.6 + 0.25 * self.waves_in_flight + logits / g + (g > 1) * 0.9
        self.cache_gb = 0.94 * gb - floor
        self.cache_tokens = np.maximum(self.cache_gb, 0) * 1e9 * g / self.kv
        self.reserved = self.seats * (w.reserve + self.page_grain)

    def rules(self):
        w, g = self.w, self.gang
        out = [
            (
                (self.ingest_workers + self.stream_workers) * g > GPUS,
                "berths exhausted: more GPUs asked for than the 24 of the pod",
            ),
            (self.ingest_gb > w.gpu_gb * 0.96, "ingest arena: out of device memory while sizing the slab"),
            (self.cache_gb <= 0, "stream arena: weights leave no room for pages"),
            (self.reserved > self.cache_tokens, "stream arena: seats x reserve exceed the page pool"),
            (
                self.mixed & (self.page_grain == 16) & (self.scout_depth == 4),
                "mixed8 tiles of 32 cannot verify five guesses in a page of 16",
            ),
        ]
        if not w.native8:
            out.append(
                ((self.codec == 1) & (self.wave_width == 128), "packed8: emulated kernel has no variant of width 128")
            )
        if w.touch < 1:
            out.append(((self.codec == 2) & (g == 4), "packed4: expert shard of 352 columns is not a multiple of 128"))
        if w.link < 1e11:
            out.append(
                (
                    (self.waves_in_flight == 4) & (g == 4),
                    "rendezvous timed out: four waves over four cards without peer access",
                )
            )
        return out


def simulate(d, loads):
    """Metrics of shape (n, len(loads)) by a fluid simulation of ingest, hand-over and seats."""
    w = d.w
    g, s_w, i_w, depth = d.gang, d.stream_workers, d.ingest_workers, d.scout_depth
    lam = loads[None, :] * w.rate
    prompt, answer = w.prompt, w.answer

    # ingest: seconds per prompt token on one worker, and per slab
    arith = np.array([1.0, 1.62 if w.native8 else 0.88, 0.74])[d.codec]
    sizzle = d.slab_tokens / (d.slab_tokens + 420.0)
    tok_s = (
        2e9
        * w.active
        * (1.35 if w.touch < 1 else 1.0)
        / (w.flops * 0.55 * arith * sizzle * g * (1 - 0.06 * np.log2(g)))
    )
    tok_s = tok_s * (1 + prompt / 45000.0) * np.where(d.mixed, 1.06, 1.0)
    tok_s = tok_s + np.where(g > 1, 2 * w.layers * w.width * 2.0 * 1.6 * (g - 1) / g / w.link, 0.0) * 0.8
    slab_fixed = 2.5e-3 + w.w_gb * 1e9 * d.squeeze / g / w.bw * 0.25
    slabs = np.maximum(prompt / d.slab_tokens, 1.0)
    job = prompt * tok_s + slabs * slab_fixed

    # hand-over: bytes and descriptors, on the NICs of the receiving stream workers or of the ingest workers,
    # whichever are fewer
    lanes = np.minimum(s_w, i_w * 1.5) * g
    pages = prompt / d.page_grain * w.layers / 4.0
    hand = prompt * d.kv / w.net + pages * g * 3.2e-6 * np.where(d.mixed, 1.5, 1.0)
    hand_one = hand / g
    ctx = prompt + 0.55 * answer + d.page_grain * 1.5
    fit = np.maximum(d.cache_tokens / (ctx * 1.05), 1.0)
    seats = np.minimum(d.seats, np.where(d.paced, 0.9 * fit, 1.15 * fit))
    hit = w.hit - 0.02 * d.mixed - np.array([0.0, 0.015, 0.06])[d.codec]
    guess_max = (1 - hit ** (depth + 1)) / (1 - hit)

    bw = w.bw * np.array([0.80, 0.76, 0.66])[d.codec]
    wbytes = w.w_gb * 1e9 * d.squeeze / g
    page_eff = 0.72 * (1 - 0.10 * (d.page_grain == 16) + 0.03 * (d.page_grain == 256)) * np.where(d.mixed, 0.88, 1.0)
    kv_s = ctx * d.kv / g / (w.bw * page_eff) * (1 + 0.05 * depth)
    dec_flops = w.flops * 0.42 * g * np.array([1.0, 1.5 if w.native8 else 0.85, 0.55])[d.codec]
    flop_tok = 2e9 * w.active / dec_flops * (1 + 0.5 * (d.codec == 2) * (d.wave_width > 64))
    hop = np.where(g > 1, (9e-6 + 4e-6 * np.log2(g)) * (1.0 if w.link > 1e11 else 2.2), 0.0)
    gap = 1.1e-3 + 0.25e-3 * d.waves_in_flight

    def round_s(a):
        """One token for each of ``a`` active requests of a stream worker."""
        waves = np.minimum(np.maximum(a / d.wave_width, 1.0), d.waves_in_flight)
        rows = np.minimum(np.maximum(d.wave_width, 8.0), 128.0) * (1 + depth)  # padded
        if w.touch < 1:
            real = np.maximum(np.minimum(a / waves, d.wave_width), 1.0) * (1 + depth)
            read = wbytes * (1 - (1 - w.touch) * np.exp(-(real - 1) / 38.0))
        else:
            read = wbytes
        t_w, t_f = read / bw, rows * flop_tok
        one = np.maximum(t_w, t_f) + 0.2 * np.minimum(t_w, t_f)
        comm = 2 * w.layers * (hop + rows * w.width * 2.0 * 1.5 * (g - 1) / g / w.link)
        body, talk = waves * one + a * kv_s, waves * comm
        overlap = np.clip(waves - 1.0, 0.0, 1.0)  # the second wave hides the first one's communication
        flat = body + talk
        hidden = np.maximum(body, talk) + 0.12 * np.minimum(body, talk)
        return (1 - overlap) * flat + overlap * hidden + gap + a * 12e-6

    # paced admission: the largest crew whose round keeps the engine's own target
    lo, hi = np.ones_like(seats), seats.copy()
    for _ in range(9):
        mid = 0.5 * (lo + hi)
        slow = round_s(mid) > w.pace_s
        lo, hi = np.where(slow, lo, mid), np.where(slow, mid, hi)
    cap = np.where(d.paced, np.maximum(lo, 1.0), seats)
    cap = np.maximum(cap, 1.0)
    thrash_at = fit * 0.9

    scout_tok = w.scout_gb * 1e9 / g**0.5 / w.bw * 1.5 + 0.2e-3  # one guess for a crew, on an ingest worker
    slab_t = np.minimum(d.slab_tokens, 2.5 * prompt) * tok_s
    rtt = 0.35e-3 if w.link > 1e11 else 0.9e-3
    n, m = seats.shape[0], lam.shape[1]
    shape = (n, m)
    busy = np.minimum(lam * job / i_w, 1.0)

    def tpot_of(a, busy):
        guesses = np.where(
            depth > 0, 1 + (guess_max - 1) * (1 - busy * slab_t / (slab_t + 0.05)), 1.0
        )  # guesses wait for the slab; late ones are dropped
        lag = np.where(depth > 0, rtt + depth * scout_tok * (1 + 1.2 * busy / np.maximum(1.12 - busy, 0.12)), 0.0)
        over = np.clip(a / thrash_at - 1.0, 0.0, 0.3)
        return (round_s(a) + lag) / guesses * (1 + 2.5 * np.where(d.paced, 0.0, over))

    crew = np.minimum(np.full(shape, 2.0), cap)
    for _ in range(6):
        crew = np.minimum(0.3 * crew + 0.7 * lam * answer * tpot_of(crew, busy) / s_w, cap)
    q1, q2, q3 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    sum_ttft, sum_tpot, good, done = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    slo_ttft, slo_tpot = w.slo["ttft_p99_s"], w.slo["tpot_p99_s"]
    for tick in range(TICKS):
        share = w.profile[tick]
        arrive = lam * share
        tpot = tpot_of(crew, busy)
        # scouts take their time from ingest
        scouts = np.where(depth > 0, np.minimum(s_w * depth * scout_tok * 0.6 / (tpot * guess_max) / i_w, 0.6), 0.0)
        rate1 = i_w * (1 - scouts) / job
        flow1 = np.minimum(arrive + q1 / TICK_S, rate1)
        q1 = np.maximum(q1 + (arrive - flow1) * TICK_S, 0.0)
        load1 = np.minimum(arrive / rate1, 0.97)
        busy = np.minimum(flow1 / rate1 + scouts * 0.5, 1.0)
        wait1 = q1 / rate1 + job * load1 ** np.sqrt(2 * (i_w + 1)) / (1 - load1) / i_w * 0.8
        wait1 = (
            wait1 + load1 * 0.4 * np.clip(d.slab_tokens / prompt - 1, 0.0, 6.0) * job
        )  # prompts of one slab end together
        rate2 = lanes / hand
        flow2 = np.minimum(flow1 + q2 / TICK_S, rate2)
        q2 = np.maximum(q2 + (flow1 - flow2) * TICK_S, 0.0)
        load2 = np.minimum(flow2 / rate2, 0.97)
        wait2 = q2 / rate2 + hand_one * (1 + 0.7 * load2 / (1 - load2))
        hold = answer * tpot
        room = np.maximum(cap * (1 + TICK_S / hold) - crew, 0.0) * s_w / TICK_S
        flow3 = np.minimum(flow2 + q3 / TICK_S, room)
        q3 = np.maximum(q3 + (flow2 - flow3) * TICK_S, 0.0)
        crew = (crew + flow3 * TICK_S / s_w) / (1 + TICK_S / hold)
        done += crew * s_w / hold * TICK_S
        full = np.minimum(crew / cap, 0.985)
        wait3 = q3 * hold / (cap * s_w) + hold / (cap * s_w) * full ** np.sqrt(2 * (cap * s_w + 1)) / (1 - full)
        ttft = (
            1.7 * job / (1 - 0.4 * scouts)
            + 2.6 * wait1
            + 1.5 * wait2
            + 1.6 * wait3
            + np.where(d.paced, 4.5, 1.5) * tpot
            + 0.015
        )
        gaps = (
            tpot * (np.where(d.paced, 1.06, 1.07 + 0.09 * full) + 0.03 * depth + 0.10 * busy * (depth > 0))
            + 0.12 * hand_one * load2 / answer
        )
        weight = share / TICKS
        sum_ttft += weight * np.minimum(ttft, 1e4) ** 8
        sum_tpot += weight * gaps**8
        x, y = np.minimum(ttft / slo_ttft, 6.0), np.minimum(gaps / slo_tpot, 6.0)
        miss = 1 - 1 / (1 + 0.012 * x**4) / (1 + 0.012 * y**4)
        good += weight * (1 - np.maximum(miss - 0.006, 0.0))
    ttft99, tpot99 = 1.22 * sum_ttft**0.125, 1.10 * sum_tpot**0.125
    tokens = np.minimum((done + crew * s_w) / (TICKS * TICK_S), lam) * answer
    goodput = np.minimum(tokens, lam * answer * good)
    cost = (i_w + s_w) * g * w.price / 3600 / goodput * 1e6
    return {
        "cost_usd_per_mtok_output": cost,
        "tpot_p99_s": tpot99,
        "ttft_p99_s": ttft99,
        "output_tokens_per_s": tokens,
        "goodput_output_tokens_per_s": goodput,
    }


def _index(config):
    return np.array([[values.index(config[name]) for name, values in PARAMETERS.items()]])


def reason(config, scenario):
    return next((text for mask, text in Deck(_index(config), WORLDS[scenario]).rules() if mask[0, 0]), None)


@functools.cache
def _compute(scenario):
    w, total = WORLDS[scenario], int(np.prod(SHAPE))
    every = np.stack(np.unravel_index(np.arange(total), SHAPE), axis=1)
    crash = np.zeros((total, 1), dtype=bool)
    for mask, _ in Deck(every, w).rules():
        crash |= mask
    runs = np.flatnonzero(~crash[:, 0])
    metrics, loads = {}, np.array(LOADS)
    for at in range(0, len(runs), 4096):
        rows = runs[at : at + 4096]
        with np.errstate(all="ignore"):
            part = simulate(Deck(every[rows], w), loads)
        for k, v in part.items():
            metrics.setdefault(k, np.full((total, len(loads)), np.nan))[rows] = v
    with np.errstate(invalid="ignore"):
        ok = np.all([metrics[k] <= limit for k, limit in w.slo.items()], axis=0)
    return crash[:, 0], metrics, ok


def truth_grid(scenario):
    """Which configurations run (N,), and at every load of the ladder cost, TPOT p99 and whether the SLOs hold (N, L),
    in the order of itertools.product over space()."""
    crash, metrics, ok = _compute(scenario)
    return ~crash, metrics["cost_usd_per_mtok_output"], metrics["tpot_p99_s"], ok


def grid_index(config):
    return int(np.ravel_multi_index(tuple(_index(config)[0]), SHAPE))


def truth(config, load, scenario):
    """A look-up (the first call of a scenario simulates its whole grid)."""
    crash, metrics, _ = _compute(scenario)
    row, col = grid_index(config), LOADS.index(load)
    return None if crash[row] else {k: float(v[row, col]) for k, v in metrics.items()}


def _luck(config, scenario):
    text = f"halyard {scenario} " + repr([config[name] for name in NAMES])
    return LUCK * np.random.default_rng(int(hashlib.sha1(text.encode()).hexdigest()[:12], 16)).standard_normal(3)


def measure(config, load, scenario, rng):
    exact = truth(config, load, scenario)
    if exact is None:
        import tuner

        raise tuner.Infeasible(reason(config, scenario))
    speed, gaps, first = np.exp(_luck(config, scenario) + NOISE * rng.standard_normal(3))
    factor = {
        "cost_usd_per_mtok_output": 1 / speed,
        "tpot_p99_s": gaps,
        "ttft_p99_s": first,
        "output_tokens_per_s": speed,
        "goodput_output_tokens_per_s": speed,
    }
    return {k: float(v * factor[k]) for k, v in exact.items()}


def launch_s(config, scenario):
    w = WORLDS[scenario]
    squeeze = {"plain16": 1.0, "packed8": 0.53, "packed4": 0.30}[config["weight_codec"]]
    fetch = w.w_gb * squeeze / 2.2 / config["gang"] ** 0.7
    pool = 1.5 * (config["ingest_workers"] + config["stream_workers"]) * config["gang"] ** 0.3
    warm = (
        9
        + 6 * config["waves_in_flight"]
        + (14 if config["scout_depth"] else 0)
        + (11 if config["weight_codec"] == "packed4" else 0)
    )
    return float(min(max(24 + fetch + pool + warm, 40.0), 200.0))
