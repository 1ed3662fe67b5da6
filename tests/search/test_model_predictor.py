"""The predictor: what it says of a serving config under a trace."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tuner.load.trace import Trace
from tuner.load.windows import cut
from tuner.search import hardware as table
from tuner.search.model import settings as settings_of
from tuner.search.model.metrics import gaps, money, statistics
from tuner.search.model.predictor import AnalyticModel, build
from tuner.search.model.roofline import StepTime
from tuner.search.model.shape import ModelShape
from tuner.search.model.workload import _DISTANCES, Workload
from tuner.search.prediction import Predictor
from tuner.space.config import ServingConfig, Value
from tuner.space.memory import MemoryCorrection
from tuner.spec.slo import parse

SHAPES = Path(__file__).with_name("shapes")
SLOS = (parse("ttft_p99=1s"), parse("tpot_p99=50ms"))


def trace(n: int = 500, rate: float = 4.0, inputs: int = 1000, outputs: int = 200, prefix_tokens: int = 0) -> Trace:
    """Poisson arrivals, lengths uniform from half to one and a half; all prompts share ``prefix_tokens``."""
    rng = np.random.default_rng(3)
    ids, offsets = np.zeros(0, np.int64), np.zeros(n + 1, np.int64)
    lengths = rng.integers(inputs // 2, inputs * 3 // 2, n)
    if prefix_tokens:
        shared = prefix_tokens // 16
        blocks = [
            np.concatenate([np.arange(shared), 10_000 * (i + 1) + np.arange(max(-(-int(k) // 16) - shared, 0))])
            for i, k in enumerate(lengths)
        ]
        ids, offsets = np.concatenate(blocks), np.concatenate([[0], np.cumsum([len(b) for b in blocks])])
    return Trace(
        "test", np.cumsum(rng.exponential(1 / rate, n)), lengths, rng.integers(outputs // 2, outputs * 3 // 2, n),
        16 if prefix_tokens else 0, ids, offsets,
    )  # fmt: skip


def model(
    workload: Trace | None = None, shape: str = "qwen3-32b", gpu: str = "H100-SXM", **more: object
) -> AnalyticModel:
    row = table.table()[gpu]
    slos = more.pop("slos", SLOS)
    return build(
        ModelShape.from_folder(SHAPES / f"{shape}.json"), row, workload or trace(), slos, "tpot_p99", 2.0, **more
    )  # type: ignore[arg-type]


def config(gpus: int = 2, variant: str = "", **flags: Value | None) -> ServingConfig:
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return ServingConfig("m", {}, {"tensor-parallel-size": gpus, "max-model-len": 8192, **named}, {}, variant, gpus)


def test_it_is_a_predictor() -> None:
    found: Predictor = model()
    prediction = found.predict(config(), 1.0)
    wanted = {
        f"{name}_{stat}_s" for name in ("ttft", "tpot", "itl", "e2e", "norm_latency") for stat in ("p50", "p99", "mean")
    }
    wanted |= {"output_tokens_per_s", "goodput_output_tokens_per_s", "cost_usd_per_mtok_output"}
    assert prediction.fits and wanted <= set(prediction.metrics)
    assert all(math.isfinite(value) for value in prediction.metrics.values())


def test_what_does_not_fit_has_a_reason_and_no_figures() -> None:
    prediction = model(shape="llama-3.3-70b").predict(config(gpus=1), 1.0)
    assert not prediction.fits and prediction.short_bytes > 0
    assert "GiB short" in prediction.reason and not prediction.metrics
    assert model(shape="llama-3.3-70b").capacity(config(gpus=1)) == 0


def test_an_idle_server_takes_one_prefill_and_one_step() -> None:
    found = model().predict(config(), 0.001).metrics
    assert 0.03 < found["ttft_p50_s"] < 0.3
    assert found["e2e_mean_s"] == pytest.approx(
        found["ttft_mean_s"] + found["tpot_mean_s"] * (trace().output_tokens.mean() - 1), rel=0.02
    )


@pytest.mark.parametrize(
    ("prompt", "engine", "flags"),
    [
        (1000, "vllm", {}),
        (20_000, "vllm", {"max_num_seqs": 64}),  # two whole chunks and a part
        (1000, "vllm", {"pipeline_parallel_size": 2, "data_parallel_size": 2}),
        (1000, "sglang", {}),  # prompts share no step with decoding
        (1000, "vllm", {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 3}'}),
    ],
)
def test_a_request_alone_takes_its_parts_worked_by_hand(prompt: int, engine: str, flags: dict[str, Value]) -> None:
    none = np.zeros(0, np.int64)
    one = Trace("one", np.zeros(1), np.array([prompt]), np.array([201]), 0, none, np.zeros(2, np.int64))
    m, asked = model(one, engine=engine, slos=()), config(2, "", max_model_len=32768, **flags)
    settings = settings_of.of(asked, m.shape, m.hardware, engine)
    step = StepTime(m.shape, settings, m.hardware, m.constants)
    context, spec = prompt + 201 / 2, settings.speculation
    decode_s = step.step(1 / settings.pp, context)
    if spec is not None:
        decode_s = step.step(1, context, drafts=3) + 0.2e-3
    slots = min(settings.max_seqs, m.fit(asked).kv_tokens / (context + 16 / 2))
    budget = settings.max_batched_tokens - math.sqrt(slots)
    sizes = [budget] * int(prompt // budget) + [prompt % budget]
    prefill_s = float(step.prefill_s(np.array([*sizes, budget]), math.sqrt(slots))[:-1].sum())
    prefill_s += float(step.prefill_attention_s(np.array([float(prompt)]), np.array([prompt / 2]))[0])
    shared = 0 if engine == "sglang" else len(sizes)
    ttft_s = m.constants.host(engine).request_s + prefill_s + (0.5 + shared) * decode_s
    token_s = decode_s / (spec.per_step if spec is not None else 1)
    found = m.predict(asked, 1e-3).metrics
    for stat in ("p50", "p99", "mean", "max"):
        assert found[f"ttft_{stat}_s"] == pytest.approx(ttft_s, rel=1e-3)
        assert found[f"tpot_{stat}_s"] == pytest.approx(token_s, rel=1e-3)
        assert found[f"e2e_{stat}_s"] == pytest.approx(ttft_s + 200 * token_s, rel=1e-3)
        assert found[f"norm_latency_{stat}_s"] == pytest.approx((ttft_s + 200 * token_s) / 201, rel=1e-3)
    assert found["itl_p50_s"] == pytest.approx(decode_s, rel=1e-3)
    assert found["itl_max_s"] == pytest.approx(decode_s + prefill_s / len(sizes), rel=1e-3)
    assert found["output_tokens_per_s"] == pytest.approx(201 * 1e-3)  # one request a second at load 1
    assert found["cost_usd_per_mtok_output"] == pytest.approx(settings.gpus * 2.0 / 3600 * 1e6 / 0.201)


def test_quantiles_of_a_step_are_those_of_numpy_and_its_gaps_those_of_steps_with_and_without_a_prompt() -> None:
    rng = np.random.default_rng(0)
    columns = {"ttft": rng.random(37), "tpot": rng.random(37)}
    found = statistics(columns, (0.5, 0.9, 0.999))
    for name, values in columns.items():
        for q, key in ((0.5, "p50"), (0.9, "p90"), (0.999, "p99.9")):
            assert found[f"{name}_{key}_s"] == pytest.approx(np.quantile(values, q))
        assert found[f"{name}_mean_s"] == pytest.approx(values.mean())
        assert found[f"{name}_max_s"] == values.max()
    steps, pieces = np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, 20.0])
    # one gap in five holds a piece of a prompt: the fifth slowest of all
    found = gaps(steps, pieces, 0.2, (0.4, 0.8, 0.9, 1.0))
    assert list(found.values()) == [2.0, 3.0, 2.0 + 20.0, 2.0 + 30.0, 3.0 + 30.0]
    assert [*found] == ["itl_p40_s", "itl_p80_s", "itl_p90_s", "itl_p100_s", "itl_max_s"]


def test_money_counts_the_tokens_of_requests_that_were_in_time_by_every_limit_on_one() -> None:
    inputs, outputs = np.array([100.0, 100.0]), np.array([10.0, 30.0])
    latencies = {"ttft": np.array([0.1, 0.9]), "tpot": np.array([0.05, 0.01])}

    def of(*slos: str) -> dict[str, float]:
        return money(inputs, outputs, latencies, [parse(slo) for slo in slos], 8.0, 3.6)

    found = of("ttft_p99=500ms", "tpot_p50=20ms", "itl_p99=1ms", "error_rate=1%")  # of each the first alone counts
    assert found == pytest.approx(
        {
            "requests_per_s": 8 / 20,
            "output_tokens_per_s": 8,
            "total_tokens_per_s": 8 * 6,
            "goodput_output_tokens_per_s": 2,
            "slo_share": 0.25,
            "error_rate": 0,
            "cost_usd_per_mtok_output": 1e3 / 2,
            "cost_usd_per_mtok_total": 1e3 / 2 / 6,
        }
    )
    assert of()["slo_share"] == 1 and of("ttft_p99=900ms")["slo_share"] == 1
    assert of("ttft_p99=500ms", "tpot_p99=20ms")["cost_usd_per_mtok_output"] == pytest.approx(1e3 / 8e-6)  # none


def test_latency_grows_with_load_and_stays_finite_past_saturation() -> None:
    m = model()
    loads = [0.01, 0.1, 0.5, 1, 2, 4, 16, 256]
    found = [m.predict(config(), load).metrics for load in loads]
    for key in ("ttft_p99_s", "ttft_p50_s", "tpot_mean_s"):
        values = [f[key] for f in found]
        assert all(b >= a * 0.97 for a, b in itertools.pairwise(values)), (key, values)
        assert all(map(math.isfinite, values))
    assert found[-1]["ttft_p50_s"] > 10 * found[0]["ttft_p50_s"]


def test_throughput_follows_the_load_until_it_saturates() -> None:
    m = model()
    offered = trace().output_tokens.sum() / m.workload.span_s
    rates = [m.predict(config(), load).metrics["output_tokens_per_s"] for load in (0.1, 0.5, 100, 200)]
    assert rates[:2] == pytest.approx([0.1 * offered, 0.5 * offered])
    assert rates[2] == rates[3] < 100 * offered


def test_capacity_is_where_the_slos_end() -> None:
    m = model()
    capacity = m.capacity(config())
    assert capacity > 0
    for slo in SLOS:
        assert not slo.miss(m.predict(config(), capacity).metrics)
    assert any(slo.miss(m.predict(config(), capacity * 1.05).metrics) for slo in SLOS)


def test_an_slo_that_nothing_meets_has_no_capacity() -> None:
    assert model(slos=(parse("tpot_p99=1ms"),)).capacity(config()) == 0


def test_without_slos_capacity_is_saturation() -> None:
    m = model(slos=())
    capacity = m.capacity(config())
    below, above = (m.predict(config(), capacity * f).metrics["output_tokens_per_s"] for f in (0.9, 2.0))
    assert below < above < below * 1.15


def test_more_gpus_serve_more_and_cost_more_when_idle() -> None:
    m = model()
    assert m.capacity(config(4)) > m.capacity(config(2)) > 0
    two, four = (m.predict(config(n), 0.05).metrics for n in (2, 4))
    assert four["tpot_p50_s"] < two["tpot_p50_s"]
    assert four["cost_usd_per_mtok_output"] == pytest.approx(2 * two["cost_usd_per_mtok_output"])


def test_cost_is_price_over_tokens_within_slo() -> None:
    found = model().predict(config(), 0.2).metrics
    assert found["slo_share"] == 1
    assert found["cost_usd_per_mtok_output"] == pytest.approx(2 * 2.0 / 3600 * 1e6 / found["output_tokens_per_s"])
    late = model().predict(config(), 100).metrics
    assert late["goodput_output_tokens_per_s"] < 0.1 * late["output_tokens_per_s"]


def test_a_bursty_trace_waits_longer_than_an_even_one_of_the_same_rate() -> None:
    even = trace(rate=2.0)
    bursts = Trace("b", np.repeat(even.arrival_s[::30], 30)[: len(even)], even.input_tokens, even.output_tokens,
                   0, even.block_ids, even.block_offsets)  # fmt: skip
    assert (
        model(bursts).predict(config(), 0.5).metrics["ttft_p99_s"]
        > 2 * model(even).predict(config(), 0.5).metrics["ttft_p99_s"]
    )


def test_a_cached_prefix_shortens_the_first_token() -> None:
    shared = model(trace(inputs=4000, prefix_tokens=1600))
    on, off = (shared.predict(c, 0.1).metrics["ttft_p50_s"] for c in (config(), config(no_enable_prefix_caching=None)))
    assert on < 0.75 * off


def test_a_small_cache_forgets_prefixes() -> None:
    work = Workload.of(trace(prefix_tokens=320))
    assert work.cached(1e9, 16)[1:].mean() == pytest.approx(320, rel=0.01)
    assert work.cached(1e9, 16)[0] == 0  # nobody came before
    assert not work.cached(100, 16).any()
    assert (work.cached(1e9, 128) % 128 == 0).all()


@pytest.mark.parametrize("often", [False, True], ids=["alike", "some more often"])
def test_prefixes_are_cached_as_long_as_a_simulated_cache_holds_them(often: bool) -> None:
    """Forty prefixes that many requests share fill a cache by being used again, not only by being new."""
    rng, n = np.random.default_rng(0), 600
    prefixes = np.minimum(rng.zipf(1.3, n), 40) - 1 if often else rng.integers(40, size=n)
    prompts = [
        [int(p) * 100 + k for k in range(30)] + [10**6 + 7 * i + k for k in range(7)] for i, p in enumerate(prefixes)
    ]
    answers, offsets = rng.integers(1, 100, n), 37 * np.arange(n + 1)
    work = Workload.of(Trace("p", np.arange(n) / 1.0, np.full(n, 37 * 16), answers, 16, np.ravel(prompts), offsets), n)
    for capacity in _DISTANCES[3:25:3]:
        held: dict[object, int] = {}  # tokens, the least recently used first
        hits = []
        for i, blocks in enumerate(prompts):
            known = next((k for k, block in enumerate(blocks) if block not in held), len(blocks))
            hits.append(known * 16)
            for item, tokens in [*((block, 16) for block in blocks), (f"answer {i}", int(answers[i]))]:
                held.pop(item, None)
                held[item] = tokens
            over = sum(held.values()) - capacity
            while over > 0:
                over -= held.pop(next(iter(held)))
        assert work.cached(capacity * 1.001, 16).tolist() == hits


def test_what_came_before_a_window_fills_the_cache_and_is_none_of_its_requests() -> None:
    whole = trace(n=5, prefix_tokens=320)
    window = replace(cut(whole, 2, 5), earlier=cut(whole, 0, 2))
    assert Workload.of(window).cached(1e9, 16).tolist() == Workload.of(whole).cached(1e9, 16)[2:].tolist()


def test_fewer_sequences_wait_for_slots_but_decode_faster() -> None:
    m = model()
    few, many = (m.predict(config(max_num_seqs=n), 1.5).metrics for n in (8, 256))
    assert few["ttft_p99_s"] > 5 * many["ttft_p99_s"]
    assert few["tpot_p50_s"] < many["tpot_p50_s"]


def test_a_small_token_budget_bounds_the_gaps_between_tokens() -> None:
    m = model(trace(inputs=6000))
    tiny, small, large = (m.predict(config(max_num_batched_tokens=n), 0.2).metrics for n in (128, 512, 8192))
    assert small["itl_p99_s"] < 0.5 * large["itl_p99_s"]
    assert tiny["ttft_p50_s"] > 1.2 * large["ttft_p50_s"]  # so small that the weights are read for nothing


def test_quantization_speeds_decoding_and_frees_cache() -> None:
    m = model()
    plain, fp8 = m.predict(config(), 0.5), m.predict(config(quantization="fp8"), 0.5)
    assert fp8.metrics["tpot_p50_s"] < 0.75 * plain.metrics["tpot_p50_s"]
    assert fp8.kv_tokens > 1.2 * plain.kv_tokens


def test_speculation_helps_an_idle_server_more_than_a_full_one() -> None:
    m = model(trace(inputs=200, outputs=400), slos=())
    plain, drafting = config(), config(speculative_config='{"method": "eagle", "num_speculative_tokens": 4}')
    idle = m.predict(plain, 0.01).metrics["tpot_mean_s"] / m.predict(drafting, 0.01).metrics["tpot_mean_s"]
    full = m.capacity(drafting) / m.capacity(plain)
    assert idle > 1.3
    assert full < 0.8 * idle


def test_a_draft_model_that_nobody_accepts_costs_time() -> None:
    m = model(drafts={"d": ModelShape.from_folder(SHAPES / "llama-3.1-8b.json")})
    body = '{"method": "draft_model", "model": "d", "num_speculative_tokens": 4, "synthetic_acceptance_length": 1.0}'
    assert (
        m.predict(config(speculative_config=body), 0.1).metrics["tpot_p50_s"]
        > 1.5 * m.predict(config(), 0.1).metrics["tpot_p50_s"]
    )


def test_data_parallel_ranks_share_the_load() -> None:
    m = model()
    one, two = m.capacity(config(2)), m.capacity(config(2, data_parallel_size=2))
    assert 1.7 * one < two < 2.6 * one


def test_a_memory_correction_changes_what_fits() -> None:
    m = model()
    corrected = m.corrected(MemoryCorrection(overhead_bytes=float(30 * 2**30)))
    assert corrected.predict(config(), 1.0).kv_tokens < m.predict(config(), 1.0).kv_tokens
    assert not corrected.predict(config(1), 1.0).fits


def test_cpu_servers_are_priced_by_the_server() -> None:
    row = table.table()["cpu-avx512"].with_cores(16)
    m = build(ModelShape.from_folder(SHAPES / "qwen2.5-0.5b-awq.json"), row, trace(), (), "tpot_p99", 0.8)
    found = m.predict(ServingConfig("m", {}, {"max-model-len": 4096}, {"VLLM_CPU_KVCACHE_SPACE": "4"}, "", 0), 0.01)
    assert found.fits
    assert found.metrics["cost_usd_per_mtok_output"] == pytest.approx(
        0.8 / 3600 * 1e6 / found.metrics["output_tokens_per_s"]
    )


def test_a_request_alone_in_its_trace_can_be_predicted() -> None:
    single = Trace("one", np.zeros(1), np.array([5]), np.array([1]), 0, np.zeros(0, int), np.zeros(2, int))
    metrics = model(single).predict(config(), 1.0).metrics
    assert all(math.isfinite(value) and value >= 0 for value in metrics.values())


def test_an_empty_trace_is_refused() -> None:
    empty = Trace("none", np.zeros(0), np.zeros(0, int), np.zeros(0, int), 0, np.zeros(0, int), np.zeros(1, int))
    with pytest.raises(ValueError, match="at least one request"):
        Workload.of(empty)


def test_a_long_trace_keeps_its_rate() -> None:
    whole = trace(n=5000)
    work = Workload.of(whole)
    assert len(work.inputs) == 512
    assert len(work.inputs) / work.span_s == pytest.approx(5000 / whole.arrival_s[-1], rel=0.02)


def test_a_quantile_that_an_slo_names_is_predicted() -> None:
    assert "ttft_p99.9_s" in model(slos=(parse("ttft_p99.9=2s"),)).predict(config(), 0.5).metrics


def test_predictions_do_not_depend_on_what_was_asked_before() -> None:
    m, fresh = model(), model()
    for load in (5.0, 0.1):
        m.predict(config(max_num_seqs=16), load)
    assert m.predict(config(), 0.7) == fresh.predict(config(), 0.7)


@pytest.mark.skipif(time.get_clock_info("process_time").resolution > 1e-4, reason="the clock is too coarse")
def test_thousands_can_be_asked_for() -> None:
    """Not a stopwatch: processor time, with an order of magnitude of room over the millisecond that is promised."""
    m = model()
    configs = [config(max_num_seqs=n) for n in range(8, 108)]
    began = time.process_time()
    for c in configs:
        m.predict(c, 1.0)
    assert (time.process_time() - began) / len(configs) < 10e-3


def test_filling_a_prefix_cache_takes_as_long_as_what_is_not_in_it_yet() -> None:
    m, prompts = model(), trace(n=200, prefix_tokens=16)

    def fill_s(prompts: Trace = prompts, **flags: Value) -> float:
        return m.fill_s(config(2, "", **flags), prompts, 32) or math.nan

    once, tokens = fill_s(), float(prompts.input_tokens.sum())
    assert fill_s(trace(n=200, prefix_tokens=16 * 300)) < once / 2  # most prompts are within what all share
    assert fill_s(data_parallel_size=2) < once
    assert once > tokens * 2 * 31e9 / (2 * 989e12)  # the arithmetic of 32 B weights on two GPUs at their peak
    assert fill_s(max_num_batched_tokens=64) > 2 * once  # a step reads all weights
    assert math.isnan(fill_s(gpu_memory_utilization=0.3))  # it does not fit


def test_of_ranks_that_share_their_gpus_attention_alone_is_there_once_for_each() -> None:
    """SGLang's DP attention: more KV cache than tensor parallelism has, for the weights of attention."""
    m = model(trace(rate=20), "deepseek-r1", "H200", engine="sglang", slos=())
    configs = config(8), config(8, dp_size=8, enable_dp_attention=True)
    (whole, inside), (together, apart) = map(m.fit, configs), (m.predict(c, 0.5) for c in configs)
    shape = m.shape
    attention = sum(a.layers * a.weights for a in shape.attention) * shape.precision.linear_bits / 8
    table = shape.vocab * shape.hidden * shape.precision.embedding_bits / 8  # of the embedding; the head is spread
    assert inside.parts["weights"] - whole.parts["weights"] == pytest.approx((attention + table) * 7 / 8)
    assert inside.kv_tokens * 8 > 2.5 * whole.kv_tokens  # every rank of MLA keeps a copy, where they are one
    rate = "goodput_output_tokens_per_s"
    usd = [found.metrics["cost_usd_per_mtok_output"] * found.metrics[rate] for found in (together, apart)]
    assert usd[0] == pytest.approx(usd[1])  # as many GPUs
    assert apart.metrics["tpot_mean_s"] < together.metrics["tpot_mean_s"]
