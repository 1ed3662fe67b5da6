"""Rules of thumb say what a serving parameter does by its name, and are asked where no model can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.search.problem import LOADS, knob, objective, study
from tuner.search import ledger
from tuner.search.beliefs import Beliefs
from tuner.search.candidates import Candidates
from tuner.search.causes import Causes
from tuner.search.expert import SOME_SIZE, World, by_looks, effects, gpu_counts, knows, speculation
from tuner.search.foresight import Foresight
from tuner.search.prediction import Prediction
from tuner.search.reading import read
from tuner.search.sampler import Options, TunerSampler
from tuner.search.sources import Sources
from tuner.space.space import Emission, Parameter, SearchSpace
from tuner.study.outcome import Boot, Infeasible, Measured, Step

NAMED = SearchSpace(
    "named",
    "emulator",
    (
        knob("tensor_parallel_size", 1, 2, 4, default=2, numeric=True, log=True, counts_gpus=True),
        knob("quantization", "none", "fp8", default="none"),
        knob("speculation", "none", "ngram", "eagle", default="none"),
        knob("draft_length", 1, 2, 4, 8, default=2, numeric=True, log=True, when={"speculation": {"ne": "none"}}),
        knob("max_num_seqs", 16, 64, 256, default=256, numeric=True, log=True),
        knob("enforce_eager", True, False, default=False),
        knob("colour", "red", "blue", default="red"),
    ),
)
UNNAMED = SearchSpace(
    "unnamed",
    "emulator",
    (knob("n", 1, 2, 4, default=1, numeric=True, log=True, counts_gpus=True), knob("x", "a", "b", default="a")),
)


def truth(p: Mapping[str, Any], load: float) -> dict[str, float]:
    tpot = 0.03 / p["tensor_parallel_size"] ** 0.4
    tpot *= 0.65 if p["quantization"] == "fp8" else 1
    tpot *= {"none": 1.0, "ngram": 0.85, "eagle": 0.55}[p["speculation"]] * (1.4 if p["enforce_eager"] else 1)
    tokens = 400.0 * load
    busy = min(load / (2.5 * p["tensor_parallel_size"] ** 0.7), 0.99)
    cost = 2.0 * p["tensor_parallel_size"] / 3600 / tokens * 1e6
    return {"ttft_p99_s": 0.05 / (1 - busy), "tpot_p99_s": tpot * (1 + busy), "cost_usd_per_mtok_output": cost}


class Model:
    """The truth; of the metrics ``wrong``, the opposite: what needs more GPUs, what is slow."""

    def __init__(self, *wrong: str) -> None:
        self.wrong = wrong

    def predict(self, config: Any, load: float) -> Prediction:
        params = NAMED.snap(config.params)
        opposite = {**params, "tensor_parallel_size": 4 // params["tensor_parallel_size"]}
        metrics, wrong = truth(params, load), truth(opposite, load)
        wrong["tpot_p99_s"] = 0.02**2 / metrics["tpot_p99_s"]
        return Prediction(True, {k: wrong[k] if k in self.wrong else v for k, v in metrics.items()}, 1e5)

    def capacity(self, config: Any) -> float:
        return LOADS[-1]


def measured(params: Mapping[str, Any], told: Any = truth) -> Measured:
    steps = []
    for load in LOADS:
        metrics = told(params, load)
        misses = tuple(text for slo in objective().slos if (text := slo.miss(metrics)))
        steps.append(Step(load, "s", metrics, slo_misses=misses))
        if misses:
            break
    return Measured(tuple(steps), Boot(30.0))


def search(launches: int, predictor: Any = None, **options: Any) -> tuple[TunerSampler, list[Any]]:
    one = TunerSampler(NAMED, objective(), LOADS, predictor, "m", options=Options(**options))
    book, trials = study(one), []
    for _ in range(launches):
        trial, params = ledger.ask(book, NAMED)
        ledger.tell(book, trial, NAMED, objective(), measured(params))
        trials.append((params, trial.user_attrs["reason"]))
    ledger.ask(book, NAMED)
    return one, trials


def test_half_size_weights_lower_the_latency_and_raise_the_capacity():
    table = effects(NAMED)[1]
    assert table[1, 0] < table[0, 0] == 0 and table[1, 1] > 0


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("enforce_eager", False, True),
        ("cuda-graph-mode", "full", "eager"),
        ("enable_chunked_prefill", True, False),
        ("async_scheduling", True, False),
        ("async_scheduling", "auto", "off"),
        ("scheduling", "async", "sync"),
        ("all2all_backend", "deepep_low_latency", "naive"),
        ("moe-a2a-backend", "deepep", "pplx"),
        ("allToAll", "allgather_reducescatter", "naive"),
        ("all2all_backend", "deepep_low_latency", "deepep_high_throughput"),
        ("speculative_algorithm", "eagle3", "none"),
        ("mtp", 2, 0),
        ("num_speculative_tokens", 3, 1),
        ("enforce_eager", "compiled", "eager"),
        ("disable_cuda_graph", False, True),
        ("cudagraph_mode", "FULL_AND_PIECEWISE", "PIECEWISE"),
        ("cudagraph_mode", "PIECEWISE", "NONE"),
        ("cuda_graph_max_batch_size", 128, 0),
        ("weight_bits", 8, 16),
        ("quant", "Q4_K_M", "F16"),
        ("dtype", "fp8_e4m3", "bfloat16"),
        ("specLen", 3, 0),
        ("draft_tokens", 3, "off"),
        ("speculation", "prompt-lookup", "none"),
        ("chunked_prefill", "on", "off"),
        ("quantization", "nvfp4", "fp8"),
        ("tensor_parallel_size", 4, 2),
        ("tp", 8, 4),
        ("ppSize", 2, 1),
        ("data-parallel-size", 2, 1),
        ("enable_prefix_caching", True, False),
        ("attention_backend", "FLASHINFER", "TRITON_ATTN"),
        ("num_scheduler_steps", 4, 1),
        ("qformat", "fp8", "none"),
        ("--model-format", "awq", "hf"),
        ("gguf", "Q4_K_M", "Q8_0"),
        ("quantization", "q4f16_1", "q0f16"),
        ("--num-shard", 4, 2),
        ("deploy.gpus_per_replica", 4, 2),
        ("--hf-repo", "x/Qwen3-14B-GGUF:Q4_K_M", "x/Qwen3-14B-GGUF:F16"),
        ("model", "Qwen/Qwen3-30B-A3B-FP8", "Qwen/Qwen3-30B-A3B"),
        ("instance_count", 2, 1),
        ("numReplicas", 2, 1),
        ("gpus", 4, 1),
        ("--cuda-graphs", "1,2,4,8", "0"),
        ("--flash-attn", "on", "off"),
        ("use_paged_context_fmha", "enable", "disable"),
        ("--n-cpu-moe", 0, 16),
        ("cpu_offload_gb", 2, 8),
        ("n_gpu_layers", 99, 20),
        ("n_gpu_layers", -1, 20),
        ("--backend", "turbomind", "pytorch"),
        ("disable_custom_all_reduce", False, True),
        ("enable_torch_compile", True, False),
        ("speculative_decoding_mode", "lookahead_decoding", "none"),
        ("speculative_mode", "small_draft", "disable"),
        ("enable_kv_cache_reuse", True, False),
        ("--cache-reuse", 256, 0),
        ("PREFIX_CACHING", 1, 0),
        ("prefix_cache_mode", "radix", "disable"),
    ],
)
def test_names_of_several_engines_are_known(name: str, better: Any, worse: Any):
    made = SearchSpace("one", "emulator", (knob(name, better, worse, default=worse),))
    table = effects(made)[0]
    assert table[0, 0] < table[1, 0]


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("maxBatchedTokens", 8192, 512),
        ("max_batch_prefill_tokens", 8192, 512),
        ("max_seqs", 256, 16),
        ("max_concurrent_requests", 256, 16),
        ("prefix_caching", "on", "off"),
        ("disable-radix-cache", False, True),
        ("disable_overlap_schedule", False, True),
        ("no_enable_prefix_caching", False, True),
        ("kv_dtype", "fp8", "auto"),
        ("kv_cache_bits", 8, 16),
        ("quantization", "mxfp4", "int4"),
        ("tp_size", 2, 1),
        ("pipeline_parallel_size", 2, 1),
        ("dp", 2, 1),
        ("max_batch_total_tokens", 65536, 32768),
        ("--ctx-size", 65536, 32768),
        ("--parallel", 16, 4),
        ("OLLAMA_NUM_PARALLEL", 16, 4),
        ("max_num_sequence", 16, 4),
        ("max_ragged_sequence_count", 64, 8),
        ("max_ragged_batch_size", 4096, 512),
        ("num_tokens_per_iter", 4096, 512),
        ("max_prefill_token_num", 8192, 2048),
        ("cache_max_entry_count", 0.9, 0.5),
        ("--quant-policy", 8, 0),
        ("--cache-type-k", "q8_0", "f16"),
        ("-ctk", "q8_0", "f16"),
        ("enable_attention_dp", True, False),
        ("continuous_batching", "on", "off"),
        ("schedule_policy", "lpm", "fcfs"),
        ("capacity_scheduler_policy", "GUARANTEED_NO_EVICT", "STATIC_BATCH"),
    ],
)
def test_capacity_is_foreseen_under_the_names_of_several_engines(name: str, more: Any, less: Any):
    table = effects(SearchSpace("one", "emulator", (knob(name, more, less, default=less),)))[0]
    assert table[0, 1] > table[1, 1]


def test_where_0_means_that_the_engine_chooses_it_is_like_the_others():
    for name in ("num_tokens_per_iter", "max_num_seqs", "max_total_tokens", "ubatch_size"):
        table = effects(SearchSpace("one", "lmdeploy", (knob(name, 0, 1024, 4096, default=0),)))[0]
        assert table[1, 1] < table[0, 1] < table[2, 1]


def test_a_model_that_needs_more_gpus_gains_more_by_twice_as_many():
    def twice(*sizes: int) -> float:
        table = effects(SearchSpace("one", "vllm", (knob("tensor_parallel_size", *sizes, default=sizes[0]),)))[0]
        return float(table[-3, 0] - table[-2, 0])

    assert twice(4, 8) > twice(1, 2, 4, 8) > 0


def test_sizes_that_lie_within_others_take_no_more_gpus():
    """SGLang's DP attention divides the GPUs of tensor parallelism; without experts its replicas take their own."""
    sizes = (knob("tp_size", 4, 8, default=8), knob("dp_size", 1, 2, 4, default=1))
    replicas, inside = (
        SearchSpace("s", "sglang", sizes),
        SearchSpace("s", "sglang", (*sizes, knob("ep_size", 1, 8, default=1))),
    )
    assert sorted(World.of(replicas).sizes) == [0, 1] and sorted(World.of(inside).sizes) == [0]
    assert effects(inside)[1][1, 1] < effects(replicas)[1][1, 1]
    whole = SearchSpace("s", "mine", (knob("gpus", 1, 2, 4, default=1), *sizes))
    assert sorted(World.of(whole).sizes) == [0]
    for name in ("attn_dp_size", "attention-data-parallel-size", "dp_attention_size"):  # whatever else is tuned
        dense = SearchSpace("s", "sglang", (sizes[0], knob(name, 1, 2, 4, default=1)))
        assert sorted(World.of(dense).sizes) == [0] and (effects(dense)[1] == effects(inside)[1]).all()
    none = SearchSpace("s", "mine", (knob("gpus", 0, 2, 4, default=0), *sizes))
    assert sorted(World.of(none).sizes) == [1, 2], "what may be 0 counts no GPUs"


def test_kernels_that_have_to_be_installed_are_feared():
    backends = ("allgather_reducescatter", "naive", "pplx", "deepep_low_latency", "deepep_high_throughput", "deepep")
    table = effects(SearchSpace("one", "vllm", (knob("all2all_backend", *backends, default="naive"),)))[0]
    assert table[:, 2].tolist() == [0, 0, *4 * [0.1], 0]
    assert table[4, 1] > table[5, 1] > table[3, 1] == table[0, 1] == 0, "the one for throughput, more than either"


def test_a_word_among_numbers_is_like_their_mean_and_not_like_none_of_the_memory():
    table = effects(SearchSpace("one", "emulator", (knob("mem_fraction_static", "auto", 0.8, 0.9, default="auto"),)))[0]
    assert table[1, 1] < table[0, 1] < table[2, 1] and table[0, 2] == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cuda_graph_max_bs", (8, 64)),
        ("cuda_graph_max_batch_size", (8, 64)),
        ("kv_cache_layout", ("NHD", "HND")),
        ("speculative_disable_by_batch_size", (16, 64)),
        ("scheduling_policy", ("fcfs", "priority")),
        ("dtype", ("float16", "bfloat16")),
        ("kv_cache_gib", (8, 16)),
        ("moe_tensor_parallel_size", (1, 2)),
        ("data_parallel_size", (0, 2)),
        ("http_timeout", (1, 2)),
        ("speculative_eagle_topk", (1, 8)),
        ("long_prefill_token_threshold", (512, 4096)),
        ("kv_offloading_size", (0, 8)),
        ("cache.host_offload_gib", (0, 64)),
        ("kv_cpu_offload_gb", (0, 10)),
        ("prefix_caching_hash_algo", ("sha256", "builtin")),
        ("radix_eviction_policy", ("lru", "lfu")),
        ("disable_cascade_attn", (False, True)),
        ("attention_dp_enable_balance", (False, True)),
        ("lora_dtype", ("auto", "fp8")),
        ("max_model_len", (4096, 8192)),
        ("np", (1, 4)),
    ],
)
def test_a_name_or_value_that_only_looks_like_a_known_one_has_no_effect(name: str, values: Any):
    assert not effects(SearchSpace("one", "emulator", (knob(name, *values, default=values[0]),)))[0].any()


@pytest.mark.parametrize("name", ["gpu-memory-utilization", "mem_fraction_static", "memory_share", "gpu_util"])
def test_more_memory_for_the_cache_raises_the_capacity_alone(name: str):
    table = effects(SearchSpace("one", "emulator", (knob(name, 0.8, 0.9, default=0.8, numeric=True),)))[0]
    assert table[1, 1] > table[0, 1] and table[1, 0] == table[0, 0]


@pytest.mark.parametrize(
    ("name", "values", "more"),
    [
        ("gpu_memory_utilization", (0.85, 0.9, 0.95), 2),
        ("kv_cache_dtype", ("auto", "fp8"), 1),
        ("quantization", ("none", "fp8", "awq"), 2),
        ("num_speculative_tokens", (1, 2, 5), 2),
        ("max_num_batched_tokens", (2048, 32768), 1),
        ("tokens_per_block", (32, 128), 1),
    ],
)
def test_crashes_are_expected_of_little_memory_left_and_of_what_few_features_go_with(name: str, values: Any, more: int):
    numeric = not isinstance(values[0], str)
    made = SearchSpace("one", "emulator", (knob(name, *values, default=values[0], numeric=numeric),))
    crashes = effects(made)[0][: len(values), 2]
    assert crashes[more] == max(crashes) > crashes[0]


SIZES = (knob("tp", 1, 2, 4, 8, default=2, numeric=True), knob("dp_size", 1, 2, default=1, numeric=True))


def test_sizes_of_parallelism_multiply_to_gpus_and_there_are_as_many_as_the_largest():
    world = World.of(SearchSpace("two", "function", SIZES))
    assert np.exp(world.log_gpus(np.array([[1, 0], [3, 1], [-1, 1]]))) == pytest.approx([2, 16, 2])
    assert math.exp(world.most) == pytest.approx(8)
    assert math.exp(World.of(SearchSpace("two", "function", SIZES, facts={"gpus": 16})).most) == pytest.approx(16)


def test_where_the_space_says_what_counts_gpus_names_say_nothing_of_them():
    counted = SearchSpace("two", "vllm", (*SIZES[1:], knob("n", 1, 2, default=1, numeric=True, counts_gpus=True)))
    assert not World.of(counted).sizes and not any(table.any() for table in effects(counted))


def test_a_server_on_twice_the_gpus_is_expected_to_cost_twice_as_much():
    candidates = Candidates.of(SearchSpace("two", "function", SIZES), 0)
    sources = Sources(candidates, Foresight(candidates, objective(), LOADS, None, ""))
    sources.foresight.look()
    costs = {s.name: s.values for s in sources.of("cost", range(len(candidates.params)))}["price x GPUs / load"]
    at = {tuple(p.values()): row for p, row in zip(candidates.params, costs, strict=True)}
    assert at[8, 2] - at[4, 1] == pytest.approx(math.log(4))


def test_a_parameter_that_no_rule_knows_and_one_that_counts_gpus_have_no_effect():
    tables = effects(NAMED)
    assert not tables[0].any() and not tables[6].any()
    assert not any(t.any() for t in effects(UNNAMED))
    of_the_draft = knob("speculative-draft-tensor-parallel-size", 1, 2, default=1, numeric=True)
    assert not effects(SearchSpace("one", "emulator", (of_the_draft,)))[0].any()


LOOKS = [
    ((1, 2, 4), SOME_SIZE),
    ((2, 4, 8, 16), SOME_SIZE),
    ((1, 2, 3, 4, 6), ""),
    ((0, 2, 4), "num_speculative_tokens"),
    ((0, 1), ""),
    ((0.8, 0.9, 0.95), "gpu_memory_utilization"),
    ((0.1, 0.2), ""),
    ((16, 64), ""),
    ((32, 256, 512), "max_num_seqs"),
    ((2048, 8192), "max_num_batched_tokens"),
    (("none", "fp8", "awq_marlin"), "quantization"),
    ((None, "fp8"), "quantization"),
    (("auto", "fp8_e4m3"), "kv_cache_dtype"),
    (("fp8", "auto"), "kv_cache_dtype"),
    (("none", "ngram", "eagle3"), "speculative_method"),
    ((True, False), ""),
    (("fcfs", "lpm"), ""),
]


@pytest.mark.parametrize(("values", "name"), LOOKS)
def test_what_has_no_name_is_known_by_its_values(values, name):
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    unnamed = SearchSpace("one", "function", (knob("p0", *values, default=values[0], numeric=numeric),))
    looks = by_looks(unnamed)
    assert looks is not None and looks.parameters[0].name == (name or "p0")
    assert any(table.any() for table in effects(looks)) == bool(name)
    assert bool(World.of(looks).sizes) == (name == SOME_SIZE)


def test_values_are_looked_at_only_where_nothing_says_more():
    p0 = knob("p0", 1, 2, 4, default=1, numeric=True)
    assert by_looks(NAMED) is None and by_looks(UNNAMED) is None
    assert by_looks(SearchSpace("one", "function", (p0, knob("max_num_seqs", 64, 256, default=64)))) is None
    space = SearchSpace("one", "function", (p0,))
    candidates = Candidates.of(space, 0)
    guessed = Sources(candidates, Foresight(candidates, objective(), LOADS, None, "m"))
    table = effects(by_looks(space))[0]
    assert guessed.guessed and guessed.rules[0] == pytest.approx(0.7 * table)
    assert "by what the values look like" in guessed.words
    quant = SearchSpace("one", "function", (knob("p0", "none", "awq", default="none"),))
    beliefs = Beliefs(of := Candidates.of(quant, 0), Sources(of, Foresight(of, objective(), LOADS, None, "m")))
    works = beliefs.causes.works(of.codes())
    assert works[1] < works[0], "what its looks let fear"
    asked = Sources(candidates, Foresight(candidates, objective(), LOADS, SimpleNamespace(), "m"))
    assert not asked.guessed and not asked.rules[0].any() and not asked.world.sizes


def test_what_a_parameter_is_like_is_what_rules_know_of_it():
    likes = {"lanes": "max-num-seqs", "pack": "quantization", "copies": "replicas"}
    values = {"lanes": (16, 256), "pack": ("none", "awq"), "copies": (1, 2)}
    mine = [knob(n, *v, default=v[0], numeric=n != "pack") for n, v in values.items()]
    theirs = tuple(replace(p, name=likes[p.name]) for p in mine)
    told = SearchSpace("one", "function", tuple(replace(p, like=likes[p.name]) for p in mine))
    assert not any(map(knows, mine)) and all(map(knows, told.parameters))
    for one, other in zip(effects(told), effects(SearchSpace("one", "function", theirs)), strict=True):
        assert one.any() and (one == other).all()
    assert by_looks(told) is None
    assert World.of(told).sizes.keys() == {2}
    assert {test.first for test in Causes(told).tests if test.weight(frozenset({"speculative", "oom"}))} == {0}


def test_a_name_that_no_rule_knows_is_known_by_its_one_flag():
    by_flag = Parameter("lanes", (16, 256), tuple(Emission({"max-num-seqs": v}) for v in (16, 256)), 16, numeric=True)
    several = replace(by_flag, emissions=(Emission({"max-num-seqs": 16}), Emission({"max-num-seqs": 256, "x": 1})))
    own = replace(by_flag, name="kv_cache_tokens_total_tokens")
    named = knob("max-num-seqs", 16, 256, default=16, numeric=True)
    read = [effects(SearchSpace("one", "command", (p,)))[0].tolist() for p in (by_flag, named, several, own)]
    assert read[0] == read[1] and not np.any(read[2]) and np.any(read[3]) and read[3] != read[1]


def test_a_few_drafted_tokens_are_worth_more_than_one_and_many_no_more_than_a_few():
    assert 0 == speculation(0) < speculation(1) < speculation(4)
    assert speculation(16) < speculation(8)
    table = effects(SearchSpace("one", "emulator", (knob("draft_tokens", "off", 2, default="off"),)))[0]
    assert table[0, 0] == 0 and table[1, 0] == -speculation(2)
    as_the_engine_likes = knob("num_speculative_tokens", -1, 2, 4, default=2, numeric=True)
    assert effects(SearchSpace("one", "emulator", (as_the_engine_likes,)))[0][0, 2] == 0


def test_without_a_model_known_names_are_searched_by_rules_from_the_second_launch_on():
    _, trials = search(4)
    assert all("rules of thumb" in reason for _, reason in trials[1:])
    tried = [params for params, _ in trials[1:]]
    assert sum(p["quantization"] == "fp8" for p in tried) >= 2
    assert sum(p["speculation"] == "eagle" for p in tried) >= 2
    assert not any(p["enforce_eager"] for p in tried)


def test_a_model_that_has_it_the_wrong_way_round_loses_to_the_rules_and_a_right_one_stays():
    wrong, trials = search(4, Model("tpot_p99_s", "ttft_p99_s"))
    assert wrong.beliefs.sources.lost == {"capacity", "latency", "cost"}
    assert "what rules of thumb predict" in trials[-1][1]
    right, trials = search(4, Model())
    assert not right.beliefs.sources.lost
    assert "the model" in trials[-1][1]


def coloured(p: Mapping[str, Any], load: float) -> dict[str, float]:
    """What is blue takes a third of the load, and what makes fast does less of it together: no rule knows either."""
    blue, both = p["colour"] == "blue", p["quantization"] == "fp8" and p["speculation"] == "eagle"
    found = {**truth(p, load), "ttft_p99_s": truth(p, load * (3 if blue else 1))["ttft_p99_s"]}
    return {**found, "tpot_p99_s": found["tpot_p99_s"] * (1.3 if both else 1.0) * (1.2 if blue else 1.0)}


class Half(Model):
    """Knows what bounds the capacity, and has the time per token the wrong way round."""

    def predict(self, config: Any, load: float) -> Prediction:
        metrics = coloured(NAMED.snap(config.params), load)
        return Prediction(True, {**metrics, "tpot_p99_s": 0.02 * (0.02 / metrics["tpot_p99_s"]) ** 0.2}, 1e5)


def readings(told: Any, *different: dict[str, Any]) -> list[Any]:
    of = [NAMED.snap({**NAMED.default(), **params}) for params in different]
    return [read(ledger.Seen(n, p, measured(p, told)), objective(), LOADS) for n, p in enumerate(of)]


def test_a_model_is_believed_of_the_quantity_that_it_knows():
    one = TunerSampler(NAMED, objective(), LOADS, Half(), "m").beliefs
    fast = ({}, {"quantization": "fp8"}, {"speculation": "eagle"}, {"quantization": "fp8", "speculation": "eagle"})
    one.learn(readings(coloured, *({**p, "colour": c} for p in fast for c in ("red", "blue"))), 0)
    sources, fitted, weights = one.sources, one.fitted, one.weights()
    assert sources.lost == {"latency"} and sources.words == "what the model and rules of thumb predict"
    assert sources.effects("capacity").any() and not sources.effects("latency").any()
    assert fitted["capacity"].mean == sources.mean("capacity") and fitted["latency"].mean != sources.mean("latency")
    assert weights["capacity"]["model"] > 0.8 and "number of GPUs" not in weights["capacity"]
    assert weights["latency"]["rules of thumb"] > 0.8 and "number of GPUs" in weights["latency"]


def test_a_model_that_is_a_little_right_of_one_quantity_and_all_wrong_of_the_other_loses_both():
    one = TunerSampler(NAMED, objective(), LOADS, Model("tpot_p99_s"), "m").beliefs
    one.learn(readings(truth, {}, {"quantization": "fp8", "speculation": "eagle"}, {"tensor_parallel_size": 4}), 0)
    assert one.sources.lost == {"capacity", "latency", "cost"}


def test_the_first_launches_judge_a_model_and_what_was_lost_before_says_nothing(monkeypatch: pytest.MonkeyPatch):
    sizes = [{"tensor_parallel_size": n} for n in (2, 1, 4)]
    one = TunerSampler(NAMED, objective(), LOADS, Model("ttft_p99_s"), "m").beliefs
    evidence = one.evidence(readings(truth, *sizes), 0)
    one.sources.lost = frozenset({"capacity", "latency"})
    assert one.evidence(readings(truth, *sizes), 0) == evidence

    one.learn(readings(truth, *sizes), 0)
    assert "capacity" in one.sources.lost
    monkeypatch.setattr("tuner.search.beliefs.JUDGES", 1)
    one.learn(readings(truth, *sizes), 0)
    assert not one.sources.lost, "of two GPUs this model is right"


def test_where_no_name_is_known_other_numbers_of_gpus_come_first():
    counts = [params["n"] for params, _ in gpu_counts(UNNAMED, lambda params: not UNNAMED.denied(params))]
    assert counts == [4, 2]
    book, tried = study(TunerSampler(UNNAMED, objective(), LOADS, None, "m")), []
    for n in range(3):
        trial, params = ledger.ask(book, UNNAMED)
        tried.append(params["n"])
        ledger.tell(book, trial, UNNAMED, objective(), Infeasible("crash", f"it died, {n}"))
    assert tried == [1, 4, 2]
