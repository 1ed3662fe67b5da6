"""Believable study folders for tests, written through :class:`Store` as the loop writes them.

The numbers come from a small queueing model with seeded noise: nobody measured them, and they are for tests only.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from tuner.pareto.front import points
from tuner.server import telemetry as server_telemetry
from tuner.server.gpu import GpuSample
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter, Rule, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse
from tuner.spec.study import Budget, EngineSpec, HardwareSpec, LoadSpec, Study, TraceSpec
from tuner.study.outcome import Aborted, Boot, Infeasible, Measured, Outcome, Step, Untrusted
from tuner.study.store import Store, write_json
from tuner.verify.ablation import Ablation, Effect
from tuner.verify.arm import Finalist
from tuner.verify.judge import Arm, Judgement
from tuner.verify.verdict import Verification, verdict

START_S = 1_790_000_000.0
LADDER = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def flagged(name: str, *values: Any, default: Any, **more: Any) -> Parameter:
    """A parameter whose flag is its name with dashes."""
    flag = name.replace("_", "-")
    return Parameter(name, values, tuple(Emission({flag: value}) for value in values), default, **more)


def space() -> SearchSpace:
    """Seven parameters: numbers, categories, a switch, a variant of the model, a nested JSON flag, a condition."""
    return SearchSpace(
        name="vllm/test",
        engine="vllm",
        parameters=(
            flagged(
                "max_num_batched_tokens",
                *(512, 1024, 2048, 4096, 8192),
                default=2048,
                numeric=True,
                log=True,
                trades="prefill throughput against the smoothness of decoding",
            ),
            flagged("max_num_seqs", 64, 128, 256, 512, default=256, numeric=True, log=True, trades="batch against ITL"),
            flagged("tensor_parallel_size", 1, 2, default=1, numeric=True, counts_gpus=True, trades="latency for GPUs"),
            flagged(
                "kv_cache_dtype", "auto", "fp8", default="auto", alters_answers=True, trades="KV room for accuracy"
            ),
            Parameter(
                "prefix_caching",
                (True, False),
                (Emission({"enable-prefix-caching": None}), Emission({"no-enable-prefix-caching": None})),
                True,
                trades="nothing where prefixes are shared",
            ),
            Parameter(
                "speculation",
                ("none", "ngram"),
                (Emission(), Emission({"speculative-config.method": "ngram"})),
                "none",
                trades="decode latency against throughput at high load",
            ),
            Parameter(
                "draft_tokens",
                (2, 4, 8),
                tuple(Emission({"speculative-config.num_speculative_tokens": n}) for n in (2, 4, 8)),
                0,
                numeric=True,
                when={"speculation": "ngram"},
            ),
        ),
        rules=(Rule({"max_num_batched_tokens": {"lt": "$max_num_seqs"}}, "fewer batched tokens than sequences"),),
        checked_with=("0.32.0",),
        fixed={"max-model-len": 4096},
        env={"HF_HUB_OFFLINE": "1"},
        facts={"platform": "cuda"},
    )


def objective(*slos: str, latency: str = "tpot_p99", price: float = 2.5) -> Objective:
    texts = slos or ("ttft_p99=500ms", "tpot_p99=50ms", "error_rate=1%")
    return Objective("chat", latency, tuple(parse(text) for text in texts), price)


def study(folder: Path, *, want: Objective | None = None, name: str = "", **more: Any) -> Study:
    """The :class:`Study` that belongs to a folder made by :func:`write`."""
    values: dict[str, Any] = {
        "name": name or folder.name,
        "folder": str(folder),
        "source": "examples/test.yaml",
        "model": "Qwen/Qwen3-8B",
        "engine": EngineSpec("vllm"),
        "hardware": HardwareSpec("h100-sxm-80gb", 8, 80 * 2**30),
        "space": space(),
        "objective": want or objective(),
        "trace": TraceSpec("traces/conversation.csv"),
        "load": LoadSpec(LADDER),
        "budget": Budget(launches=40),
        "seed": 7,
        "frozen": {"name": name or folder.name, "engine_version": "0.32.0", "trace": {"file": "conversation.csv"}},
    }
    return Study(**{**values, **more})


def params_of(index: int, rng: random.Random) -> dict[str, Any]:
    """The default first, then seeded combinations that break no rule."""
    known = space()
    if index == 0:
        return known.default()
    while True:
        picked = known.snap({p.name: rng.choice(p.values) for p in known.parameters if p.name != "draft_tokens"})
        if picked["speculation"] == "ngram":
            picked["draft_tokens"] = rng.choice((2, 4, 8))
        if not known.denied(picked):
            return picked


def step(
    load: float,
    want: Objective,
    *,
    tpot_s: float = 0.02,
    ttft_s: float = 0.2,
    tokens_per_s: float = 1000.0,
    error_rate: float = 0.0,
    gpus: int = 1,
    spread: float = 0.03,
    **more: Any,
) -> Step:
    """One load step whose misses follow from the objective; ``spread`` is the half width of every interval, relative.
    Tokens of failed requests earn nothing: cost is per token of goodput."""
    goodput = tokens_per_s * (1 - error_rate)
    usd_per_s = want.price_usd_per_gpu_hour * max(gpus, 1) / 3600
    cost = usd_per_s / goodput * 1e6 if goodput > 0 else math.inf
    metrics = {
        "ttft_p50_s": ttft_s * 0.4,
        "ttft_p99_s": ttft_s,
        "tpot_p50_s": tpot_s * 0.7,
        "tpot_p99_s": tpot_s,
        "e2e_p50_s": ttft_s * 0.4 + tpot_s * 0.7 * 200,
        "e2e_p99_s": ttft_s + tpot_s * 400,
        "offered_requests_per_s": 5.0 * load,
        "completed_requests_per_s": 5.0 * load * (1 - error_rate),
        "output_tokens_per_s": tokens_per_s,
        "goodput_output_tokens_per_s": goodput,
        "error_rate": error_rate,
        "cost_usd_per_mtok_output": cost,
        "cost_usd_per_mtok_total": cost / 6,
    }
    between = {
        name: (metrics[name] * (1 - spread), metrics[name] * (1 + spread))
        for name in ("ttft_p99_s", "tpot_p99_s", "e2e_p99_s", "cost_usd_per_mtok_output", "cost_usd_per_mtok_total")
        if math.isfinite(metrics[name])
    }
    misses = tuple(text for slo in want.slos if (text := slo.miss(metrics)))
    given: dict[str, Any] = {"intervals": between, "slo_misses": misses, "window": "search-0", **more}
    return Step(load=load, metrics=metrics, **given)


def ladder(config: ServingConfig, want: Objective, rng: random.Random, slow: float = 1.0) -> tuple[Step, ...]:
    """Steps up to the first miss, from a queue whose service rate depends on the flags."""
    flags = config.flags
    batch = float(flags.get("max-num-batched-tokens", 2048) or 0)
    seqs = float(flags.get("max-num-seqs", 256) or 0)
    gpus = max(config.gpus, 1)
    drafts = 4 if "speculative-config" in flags else 0
    rate = 2.2 * (batch / 2048) ** 0.25 * (seqs / 256) ** 0.2 * gpus**0.8 * (0.85 if drafts else 1) / slow
    rate *= 1.15 if flags.get("kv-cache-dtype") == "fp8" else 1
    rate *= 0.8 if "no-enable-prefix-caching" in flags else 1
    base_s = 0.012 * (1 + batch / 16384) / gpus**0.6 * (0.75 if drafts else 1) * slow
    found = []
    for load in LADDER:
        busy = load / rate
        if busy >= 1:
            tpot_s, ttft_s, share = base_s * 12, 6.0, 0.2
        else:
            tpot_s, ttft_s, share = base_s * (1 + busy / (1 - busy) / 2), 0.08 / (1 - busy) * slow, 0.0
        noise = [rng.gauss(1, 0.02) for _ in range(3)]
        tokens = 800 * load * noise[2]
        found.append(
            step(
                load,
                want,
                tpot_s=tpot_s * noise[0],
                ttft_s=ttft_s * noise[1],
                tokens_per_s=tokens,
                error_rate=share,
                gpus=gpus,
                records=f"records-{load:g}.parquet",
            )
        )
        if not found[-1].ok:
            break
    return tuple(found)


def outcome_of(index: int, config: ServingConfig, want: Objective, rng: random.Random, slow: float) -> Outcome:
    """Mostly Measured; every seventh out of memory, every eleventh another kind, one each of the rest."""
    phases = {"imports": 20.1, "weights": 8.4, "compile": 31.0, "graphs": 12.2, "ready": 0.8}
    boot = Boot(sum(phases.values()), phases, {"kv_cache_tokens": 131072.0, "max_concurrency": 32.0})
    if index and index % 7 == 0:
        return Infeasible(
            "oom-kv",
            "the KV cache does not fit",
            "ValueError: To serve at least one request with max seq len 4096, 3.1 GiB KV cache is needed",
            "lower max-model-len or raise gpu-memory-utilization",
            short_bytes=2 * 2**30,
            boot=Boot(24.0, {"imports": 20.0}, {}),
        )
    if index and index % 11 == 0:
        return Infeasible(
            "invalid-combination",
            "the attention backend refuses this block size",
            "ValueError: No common block size for 16",
            "use a multiple of 32",
            boot=Boot(31.0, {"imports": 20.0}, {}),
        )
    steps = ladder(config, want, rng, slow)
    if index == 4:
        return Untrusted(("client lag p99 14 ms > 5 ms",), steps[:1], boot)
    if index == 5:
        return Aborted("cannot beat the front at 95 %", steps[:1], boot)
    return Measured(steps, boot)


def telemetry(folder: Path, seconds: int = 30) -> None:
    """``telemetry.parquet``, as the sampler of GPU and host writes it."""
    samples = [
        server_telemetry.Sample(
            START_S + s,
            server_telemetry.HostSample(0.35, 40 * 2**30, 1.5, 6 * 2**30),
            (GpuSample(0, 61_500_000_000, 80 * 2**30, 320.0 + 40 * math.sin(s / 5), 320.0 * s, 0.9, 60.0, 1800.0),),
        )
        for s in range(seconds)
    ]
    server_telemetry.write(samples, folder / "telemetry.parquet")


def write(
    folder: Path,
    *,
    trials: int = 16,
    seed: int = 1,
    slow: float = 1.0,
    emulated: bool = False,
    want: Objective | None = None,
    verified: bool = False,
    **more: Any,
) -> tuple[Study, Store]:
    """A finished study of ``trials`` trials, trial 0 the baseline.

    ``slow`` multiplies every latency (10: nothing meets the SLO). ``verified`` adds a ``verify.json``. Other
    arguments replace fields of the Study.
    """
    want = want or objective()
    rng = random.Random(seed)
    known = study(folder, want=want, **more)
    store = Store(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(f"name: {known.name}\nmodel: {known.model}\n", encoding="utf-8")
    now_s = START_S
    for number in range(trials):
        params = params_of(number, rng)
        config = known.space.config(params, known.model)
        outcome = outcome_of(number, config, want, rng, slow)
        ended_s = now_s + outcome.boot.total_s + 60 * len(outcome.steps) + 3
        notes = {"started_s": now_s, "baseline": number == 0, "emulated": emulated, "role": "search"}
        place = store.start_trial(number, config, params, **notes)
        (place / "server.log").write_text(f"INFO vLLM API server version 0.32.0\nINFO trial {number}\n", "utf-8")
        for done in outcome.steps:
            if done.records:
                pd.DataFrame({"intended_s": [0.0, 0.5], "ttft_s": [0.1, 0.2]}).to_parquet(place / done.records)
        if outcome.steps:
            telemetry(place)
        predicted = {f"{s.load:g}": {k: v * rng.uniform(0.8, 1.3) for k, v in s.metrics.items()} for s in outcome.steps}
        facts = {"engine_version": "0.32.0", "device": "NVIDIA H100 80GB HBM3", "reason": "seeded"}
        store.end_trial(number, outcome, ended_s=ended_s, predicted=predicted, **facts)
        store.log("trial", number=number)
        now_s = ended_s + 1
    for _ in range(3 if trials > 1 else 0):
        store.refuse({"max_num_batched_tokens": 512, "max_num_seqs": 1024}, "fewer batched tokens than sequences")
    if verified:
        write_json(folder / "verify.json", verification(known, store).to_dict())
    return known, store


def verification(known: Study, store: Store, winner: int | None = None) -> Verification:
    """A verdict on the default and the cheapest trial (or ``winner``; -1: nothing holds), made up but complete."""
    objective = known.objective
    found = points([t for t in store.trials() if t.role == "search"], objective)
    good = sorted((p for p in found if p.ok), key=lambda p: p.cost)
    best = next((p for p in good if winner is None or p.trial == winner), None)
    config = known.space.config(known.space.default(), known.model)
    base = Finalist("default", config, 1.0, 0.6, None, 0, True)
    arms = [base] + ([Finalist(f"trial {best.trial}", best.config, 1.9, 0.45, None, best.trial)] if best else [])
    state = {
        "default": Arm("default", 4, winner != -1, (1.4, 1.3, 1.5), (0.61, 0.58, 0.64), 1.3, 1.3)
        if winner != -1
        else Arm("default", 4, False, failure="oom-kv"),
    }
    state["default"] = replace(state["default"], load_cost=(0.66, 0.62, 0.7), latency=(0.024, 0.023, 0.026), best=0.02)
    for arm in arms[1:]:
        state[arm.label] = Arm(
            arm.label,
            launches=4,
            holds=True,
            capacity=(1.9, 1.8, 2.0),
            cost=(0.45, 0.43, 0.47),
            safe_load=1.8,
            load=1.8,
            load_cost=(0.47, 0.45, 0.49),
            latency=(0.031, 0.029, 0.034),
            difference=(0.74, 0.70, 0.79),
            latency_difference=(1.10, 1.02, 1.19),
            common_load=1.4,
            doubt=0.001,
            best=0.98,
        )
    choice = "" if winner == -1 else arms[-1].label
    reason = "cheaper" if choice else "nothing-holds"
    verdict_of = Judgement(choice, reason, state)
    return verdict(verdict_of, arms, [], known, windows=3, stopped="the interval is narrow enough", confidence=0.95)


def ablation(known: Study, winner: ServingConfig, kept: str) -> Ablation:
    """What ablation leaves where only the parameter ``kept`` of ``winner`` earned its place."""
    off = {name: v for name, v in winner.params.items() if v != known.space[name].default}
    effects = tuple(
        Effect(name, value, known.space[name].default, name == kept, (1.3, 1.25, 1.36), 0.001, "its effect is proven")
        if name == kept
        else Effect(name, value, known.space[name].default, False, (1.0, 0.98, 1.02), 0.6, "no effect is proven")
        for name, value in off.items()
    )
    small = known.space.config({kept: off[kept]}, known.model)
    return Ablation(
        small, {kept: off[kept]}, effects, (0.99, 0.97, 1.01), 12, "Two flags were superfluous.", winner.hash
    )


def measured(number: int, steps: tuple[Step, ...], store: Store, **notes: Any) -> None:
    """Adds one hand-made Measured trial to ``store``: the space's default unless ``params`` are given."""
    add(number, Measured(steps), store, **notes)


def add(number: int, outcome: Outcome, store: Store, params: Mapping[str, Any] | None = None, **notes: Any) -> None:
    """Adds one hand-made trial to ``store``."""
    known = space()
    full = known.snap(params or {})
    store.start_trial(number, known.config(full, "Qwen/Qwen3-8B"), full, **{"started_s": START_S + number, **notes})
    store.end_trial(number, outcome, ended_s=START_S + number + 60)


if __name__ == "__main__":
    import sys

    made, _ = write(Path(sys.argv[1]), trials=int(sys.argv[2]) if len(sys.argv) > 2 else 16, verified=True)
    print(json.dumps({"folder": made.folder, "trials": len(Store(Path(made.folder)).trials())}))
