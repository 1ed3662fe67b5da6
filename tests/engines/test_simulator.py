"""The emulated engine itself, on a virtual clock: what it must do whatever its constants are."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import LLAMA_8B
from tests.search.test_model_shape import READ, SHAPES
from tuner.engines.emulator.hardware import GIB, find_gpu
from tuner.engines.emulator.memory import KvDoesNotFit, WeightsDoNotFit, kv_bytes_per_token, plan
from tuner.engines.emulator.noise import QUIET
from tuner.engines.emulator.settings import Refused, resolve
from tuner.engines.emulator.shape import Shape, shape_of
from tuner.engines.emulator.simulator import OutOfMemoryUnderLoad, Served, Simulator, Work, prefix_keys
from tuner.engines.emulator.stepcost import StepCost
from tuner.engines.modelfolder import VARIANTS
from tuner.search.model import architecture
from tuner.search.model.shape import ModelShape

H100 = find_gpu("H100-SXM")


def sizes(config: Mapping[str, Any], name: str = "") -> Shape:
    return shape_of(architecture.shape_of(config, name))


LLAMA = sizes(LLAMA_8B, "llama-8b")
LLAMA_70B = sizes(
    {**LLAMA_8B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
)
QWEN_MOE = shape_of(ModelShape.from_folder(SHAPES / "qwen3-30b-a3b.json"))


def simulator(shape: Shape = LLAMA, seed: int = 0, noise=QUIET, **flags: object) -> Simulator:
    given = {name.replace("_", "-"): value for name, value in {"max_model_len": 4096, **flags}.items()}
    return Simulator(shape, resolve(given, shape, H100), H100, seed, noise)


def poisson(n: int, rate: float, inputs: int = 500, outputs: int = 100, seed: int = 1) -> list[Work]:
    rng, at, works = random.Random(seed), 0.0, []
    for _ in range(n):
        at += rng.expovariate(rate)
        works.append(Work(at, rng.randint(inputs // 2, inputs * 3 // 2), rng.randint(outputs // 2, outputs * 3 // 2)))
    return works


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_every_request_gets_exactly_its_tokens_in_order_of_time() -> None:
    served = simulator().run(poisson(200, 20))

    for one in served:
        assert sum(one.counts) == one.work.output_tokens
        assert one.tokens_s == sorted(one.tokens_s)
        assert one.tokens_s[0] > one.work.arrival_s


def test_the_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    times = [[one.tokens_s for one in simulator(seed=s, noise=None).run(poisson(50, 10))] for s in (3, 3, 4)]

    assert times[0] == times[1]
    assert times[0] != times[2]


def test_time_per_token_at_batch_one_is_near_the_time_to_read_the_weights() -> None:
    """16.06 GB at 3.35 TB/s are 4.8 ms; kernels reach four fifths of it and the engine adds its own."""
    one = simulator().run([Work(0.0, 100, 200)])[0]

    assert 4.8e-3 < one.tpot_s < 9e-3


def test_a_higher_load_never_shortens_the_queue() -> None:
    tails = [p99([one.ttft_s for one in simulator().run(poisson(300, rate))]) for rate in (2, 20, 60)]

    assert tails == sorted(tails)
    assert tails[-1] > 2 * tails[0]


@pytest.mark.parametrize(
    ("flags", "metric", "factor"),
    [
        ({"quantization": "fp8"}, "tpot", 0.75),  # half the bytes per step
        ({"tensor_parallel_size": 2}, "tpot", 0.75),  # half the bytes per GPU, less the all-reduces
        ({"speculative_config": '{"method": "eagle3", "num_speculative_tokens": 3}'}, "tpot", 0.75),
    ],
)
def test_what_should_speed_up_decoding_does(flags: dict, metric: str, factor: float) -> None:
    base, fast = (simulator(**f).run(poisson(60, 2)) for f in ({}, flags))

    assert statistics.median(one.tpot_s for one in fast) < factor * statistics.median(one.tpot_s for one in base)


def test_eager_mode_is_slower_where_kernels_are_short() -> None:
    base, eager = (simulator(**f).run(poisson(40, 1)) for f in ({}, {"enforce_eager": None}))

    assert eager[0].tpot_s > 1.2 * base[0].tpot_s


def test_small_chunks_protect_decodes_from_long_prompts() -> None:
    """A 20,000-token prompt beside running decodes: with 8,192 tokens a step they wait for it, with 512 hardly."""
    works = [Work(0.0, 100, 400) for _ in range(8)] + [Work(0.5, 20000, 4)]

    def longest_gap(budget: int) -> float:
        served = simulator(max_model_len=32768, max_num_batched_tokens=budget, max_num_seqs=64).run(works)
        return max(b - a for one in served[:8] for a, b in zip(one.tokens_s, one.tokens_s[1:], strict=False))

    assert longest_gap(8192) > 3 * longest_gap(512)


def test_a_shared_prefix_is_computed_once() -> None:
    ids = list(range(8))
    works = [Work(i * 1.0, 4000, 4, prefix_keys(ids, 512, 4000, 16)) for i in range(3)]
    first, *others = simulator().run(works)

    assert first.cached_tokens == 0
    assert all(one.cached_tokens == 3984 for one in others)  # all but the last, which has to be computed for its logits
    assert others[0].ttft_s < 0.5 * first.ttft_s


def test_without_prefix_caching_nothing_is_found() -> None:
    works = [Work(i * 1.0, 4000, 4, prefix_keys(range(8), 512, 4000, 16)) for i in range(2)]

    assert simulator(no_enable_prefix_caching=None).run(works)[1].cached_tokens == 0


def test_prompts_with_different_beginnings_share_no_block() -> None:
    first, second = prefix_keys([1, 2, 3], 512, 1500, 16), prefix_keys([9, 2, 3], 512, 1500, 16)

    assert not set(first) & set(second)
    assert len(prefix_keys([1, 2, 3], 512, 1500, 16)) == 1500 // 16


def test_a_full_cache_preempts_and_still_finishes_everybody() -> None:
    sim = simulator(num_gpu_blocks_override=300, max_model_len=4096)
    served = sim.run([Work(0.01 * i, 500, 900) for i in range(12)])

    assert sim.replicas[0].scheduler.preemptions > 0
    assert all(sum(one.counts) == 900 for one in served)
    assert sim.replicas[0].scheduler.pool.used == 0, "every block is given back"


def test_no_more_blocks_are_used_than_there_are() -> None:
    sim = simulator(num_gpu_blocks_override=300)
    for work in [Work(0.0, 700, 400) for _ in range(20)]:
        sim.submit(work)
    while sim.next_event_s < float("inf"):
        sim.advance()
        pool = sim.replicas[0].scheduler.pool
        assert 0 <= pool.used <= pool.total


def test_no_step_computes_more_tokens_than_its_budget() -> None:
    sim = simulator(max_num_batched_tokens=256, max_num_seqs=64)
    for work in [Work(0.01 * i, 1000, 30) for i in range(60)]:
        sim.submit(work)
    most = 0
    while sim.next_event_s < float("inf"):
        sim.advance()
        if batch := sim.replicas[0].batch:
            most = max(most, batch.tokens)

    assert most == 256


def test_max_num_seqs_bounds_what_runs_at_once() -> None:
    sim = simulator(max_num_seqs=4)
    for _ in range(20):
        sim.submit(Work(0.0, 100, 50))
    most = 0
    while sim.next_event_s < float("inf"):
        sim.advance()
        most = max(most, len(sim.replicas[0].scheduler.running))

    assert most == 4


def test_an_aborted_request_gives_its_blocks_back() -> None:
    sim = simulator()
    job = sim.submit(Work(0.0, 1000, 1000))
    for _ in range(30):
        sim.advance()
    assert sim.replicas[0].scheduler.pool.used > 0
    sim.abort(job)
    while sim.next_event_s < float("inf"):
        sim.advance()

    assert sim.replicas[0].scheduler.pool.used == 0


def test_the_accepted_share_of_drafts_is_the_stated_one() -> None:
    spec = '{"method": "draft_model", "num_speculative_tokens": 1, "synthetic_acceptance_rates": [0.6]}'
    sim = simulator(speculative_config=spec)
    sim.run([Work(0.05 * i, 50, 400) for i in range(40)])
    scheduler = sim.replicas[0].scheduler

    assert scheduler.accepted_tokens / scheduler.draft_tokens == pytest.approx(0.6, abs=0.05)


def test_data_parallel_replicas_share_the_load() -> None:
    one, two = (simulator(data_parallel_size=n).run(poisson(400, 60)) for n in (1, 2))

    def median(served: list[Served]) -> float:
        return statistics.median(x.tpot_s for x in served)

    assert median(two) < 0.8 * median(one)


def test_ranks_of_a_mixture_of_experts_share_the_experts_and_nothing_else() -> None:
    one, four = (plan(QWEN_MOE, resolve({"data-parallel-size": n}, QWEN_MOE, H100), H100) for n in (1, 4))
    experts = 48 * 128 * 3 * 2048 * 768 * 2  # layers, experts, three matrices each, bytes of a weight

    assert one.weights_bytes - four.weights_bytes == pytest.approx(experts * 3 / 4, rel=1e-6)
    assert four.tokens > 3 * one.tokens  # of each rank
    replica = plan(LLAMA, resolve({"data-parallel-size": 4}, LLAMA, H100), H100)
    assert replica.weights_bytes == plan(LLAMA, resolve({}, LLAMA, H100), H100).weights_bytes


def test_ranks_that_share_experts_take_every_step_together() -> None:
    """One request decodes on the first rank while the second computes a long prompt."""
    works = [Work(0.0, 100, 200), Work(0.5, 8000, 2)]

    def gap(shape: Shape, beside: list[Work]) -> float:
        served = simulator(shape, data_parallel_size=2, max_model_len=9000).run(works[:1] + beside)[0]
        return max(b - a for a, b in itertools.pairwise(served.tokens_s))

    assert gap(LLAMA, works[1:]) < 1.5 * gap(LLAMA, [])  # replicas of a dense model know nothing of each other
    assert gap(QWEN_MOE, works[1:]) > 10 * gap(QWEN_MOE, [])


def test_experts_cost_what_the_tokens_of_all_ranks_touch() -> None:
    cost = simulator(QWEN_MOE, data_parallel_size=2).cost

    assert cost.seconds([], 8, 800, 0, 8) == cost.seconds([], 8, 800, 0, 8, everywhere=16)
    assert cost.seconds([], 8, 800, 0, 8, everywhere=8) < cost.seconds([], 8, 800, 0, 8, everywhere=64)
    slow = replace(H100, link_bytes_per_s=H100.link_bytes_per_s / 10)  # over which the tokens travel
    behind = StepCost(QWEN_MOE, resolve({"data-parallel-size": 2}, QWEN_MOE, slow), slow)
    assert behind.seconds([], 8, 800, 0, 8) > cost.seconds([], 8, 800, 0, 8)
    alone = simulator(QWEN_MOE, data_parallel_size=1).cost
    assert alone.seconds([], 8, 800, 0, 8) > cost.seconds([], 8, 800, 0, 8, everywhere=8)  # half of the experts each


def test_there_is_an_api_server_for_each_rank_as_vllm_serve_starts_them() -> None:
    four = {"data-parallel-size": 4}
    for flags, servers in (({}, 1), (four, 4), ({**four, "api-server-count": 1}, 1)):
        assert resolve(flags, LLAMA, H100).frontends == servers


def test_weights_that_do_not_fit_say_so_in_torchs_words() -> None:
    with pytest.raises(WeightsDoNotFit, match=r"CUDA out of memory\. Tried to allocate"):
        plan(LLAMA_70B, resolve({}, LLAMA_70B, H100), H100)


def test_a_cache_that_does_not_hold_one_request_says_so_in_vllms_words() -> None:
    settings = resolve({"max-model-len": 131072, "gpu-memory-utilization": 0.3}, LLAMA, H100)

    with pytest.raises(KvDoesNotFit, match=r"16\.00 GiB KV cache is needed, which is larger than"):
        plan(LLAMA, settings, H100)


def test_kv_memory_is_what_the_model_keeps_per_token() -> None:
    """Llama 3.1 8B keeps 32 layers x 8 heads x 128 x 2 in 16 bits: 131,072 bytes per token; in FP8 half."""
    wide, narrow = (plan(LLAMA, resolve(f, LLAMA, H100), H100) for f in ({}, {"kv-cache-dtype": "fp8"}))

    assert wide.kv_bytes / wide.tokens == pytest.approx(131072, rel=1e-3)
    assert narrow.tokens == pytest.approx(2 * wide.tokens, rel=1e-3)
    assert 40 * GIB < wide.kv_bytes < 58 * GIB


def test_memory_that_was_left_too_tight_runs_out_under_load() -> None:
    sim = simulator(gpu_memory_utilization=0.995, max_num_batched_tokens=16384)

    with pytest.raises(OutOfMemoryUnderLoad, match="CUDA out of memory"):
        sim.run(poisson(400, 60, inputs=2000))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max-num-batched-tokens": 64, "max-num-seqs": 256}, "must be greater than or equal to max_num_seqs"),
        ({"no-enable-chunked-prefill": None, "max-num-batched-tokens": 2048}, "is smaller than max_model_len"),
        ({"tensor-parallel-size": 3}, "must be divisible by tensor parallel size"),
        ({"tensor-parallel-size": 16}, "is larger than the number of available GPUs"),
        ({"block-size": 8}, "No common block size for 8"),
        ({"max-model-len": 200000}, "is greater than the derived max_model_len"),
    ],
)
def test_a_combination_that_vllm_refuses_is_refused_in_its_words(flags: dict, words: str) -> None:
    with pytest.raises(Refused, match=words):
        resolve(flags, LLAMA, H100)


def test_defaults_are_those_of_vllm_on_that_gpu() -> None:
    large, small = resolve({}, LLAMA, H100), resolve({}, LLAMA, find_gpu("L40S"))

    assert (large.max_num_batched_tokens, large.max_num_seqs, large.block_size) == (8192, 1024, 16)
    assert (small.max_num_batched_tokens, small.max_num_seqs) == (2048, 256)


@pytest.mark.parametrize("name", ["h100_sxm", "H100", "NVIDIA H100 80GB HBM3", "H100-SXM"])
def test_a_gpu_is_found_however_it_is_spelt(name: str) -> None:
    assert find_gpu(name).name == "H100-SXM"


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="it knows H100-SXM"):
        find_gpu("Voodoo 2")


@pytest.mark.parametrize(("config", "billions", "kv_bytes"), READ.values(), ids=READ)
def test_what_is_emulated_has_the_sizes_that_the_searchs_model_reads(
    config: dict[str, Any], billions: float, kv_bytes: int
) -> None:
    """ERNIE's experts, MLPs without a gate, heads that a family ties: published parameters, KV bytes per token."""
    shape = sizes(config)
    assert shape.weight_bytes(16) / 2e9 == pytest.approx(billions, rel=0.01)
    assert kv_bytes_per_token(shape, resolve({}, shape, H100)) == kv_bytes


@pytest.mark.parametrize("file", sorted(SHAPES.glob("*.json")), ids=lambda file: file.stem)
def test_no_layer_and_no_weight_is_lost_on_the_way_from_one_models_sizes_to_the_others(file: Path) -> None:
    model = ModelShape.from_folder(file)
    shape = shape_of(model)
    of_kind = {group.kind: group.layers for group in model.attention}
    assert shape.weight_bytes(16) / 2 == pytest.approx(model.parameters, rel=1e-6)
    assert shape.full_layers + shape.window_layers + shape.linear_layers == model.layers
    assert (shape.window_layers, shape.linear_layers) == (of_kind.get("window", 0), of_kind.get("linear", 0))
    assert shape.mla == (not of_kind.keys() & {"full", "window"})
    assert shape.head_dim == {"deepseek-r1": 192, "kimi-k2": 192, "glm-5": 256}.get(
        file.stem, shape.kv_elements / 2 / shape.kv_heads
    )


def packed(bits: int, kind: str = "int", inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "type": kind}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("quantization", "scheme", "bits"),
    [
        *((dict(VARIANTS[name]), *said) for name, said in {"w8a8-int8": ("w8a8", 8), "w8a8-fp8": ("fp8", 8)}.items()),
        *((dict(VARIANTS[name]), *said) for name, said in {"gptq-int4": ("gptq", 4), "awq-int4": ("awq", 4)}.items()),
        ({"quant_method": "gptq", "bits": 8}, "w8a16", 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4),
        ({"quant_method": "mxfp4"}, "mxfp4", 4),
        (packed(4), "gptq_marlin", 4),
        (packed(8), "w8a16", 8),
        (packed(4, inputs={"num_bits": 8}), "w4a8", 4),
        (None, "", 16),
    ],
)
def test_a_checkpoints_own_quantization_is_emulated(
    quantization: dict[str, Any] | None, scheme: str, bits: int
) -> None:
    shape = sizes({**LLAMA_8B, "quantization_config": quantization})
    settings = resolve({}, shape, H100)
    assert (shape.quantization, shape.weight_bits, settings.weight_bits) == (scheme, bits, bits)
    said = resolve({"quantization": quantization["quant_method"]} if quantization else {}, shape, H100)
    assert said == settings, "a flag that says what the checkpoint says changes nothing"


def test_a_checkpoint_that_asks_for_an_fp8_cache_gets_it_unless_a_flag_says_otherwise() -> None:
    shape = shape_of(ModelShape.from_folder(SHAPES / "llama-3.1-8b-instruct-fp8.json"))
    assert resolve({}, shape, H100).kv_bits == 8
    assert resolve({"kv-cache-dtype": "bfloat16"}, shape, H100).kv_bits == 16


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp", "suffix"])
def test_what_knows_itself_how_many_tokens_it_drafts_need_not_be_told(method):
    draft = resolve({"speculative-config": f'{{"method": "{method}"}}'}, LLAMA, H100).draft
    assert draft and (draft.method, draft.tokens) == (method, 3)


def test_other_speculation_is_told_how_many_tokens_it_drafts():
    with pytest.raises(Refused, match="num_speculative_tokens must be provided"):
        resolve({"speculative-config": '{"method": "ngram"}'}, LLAMA, H100)
