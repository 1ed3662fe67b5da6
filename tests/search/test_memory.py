"""Memory arithmetic: what fits, what does not and by how much, and what a server's log teaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.search import hardware as table
from tuner.search.model.architecture import shape_of
from tuner.search.model.shape import ModelShape
from tuner.space.config import ServingConfig, Value
from tuner.space.memory import Fit, MemoryCorrection, correct, fits, learn
from tuner.study.outcome import Boot, Infeasible, Measured, Untrusted

SHAPES = Path(__file__).with_name("shapes")
GIB = 2**30


def fit(
    model: str,
    gpu: str,
    flags: dict[str, Value | None] | None = None,
    correction: MemoryCorrection | None = None,
    **env: str,
) -> Fit:
    shape = ModelShape.from_folder(SHAPES / f"{model}.json")
    row = table.table()[gpu]
    row = row.with_cores(8, 32 * GIB) if row.kind == "cpu" else row
    return fits(shape, row, ServingConfig("m", {}, flags or {}, env), correction=correction)


def test_a_model_larger_than_the_gpu_is_refused_with_the_figures() -> None:
    found = fit("llama-3.3-70b", "H100-SXM", {"max-model-len": 8192})
    assert not found.fits and found.kv_tokens == 0
    assert "weights 131.4 GiB" in found.reason and "80 GiB x 0.92" in found.reason
    assert f"{found.short_bytes / GIB:.1f} GiB short" in found.reason
    assert 58 * GIB < found.short_bytes < 68 * GIB


# KV cache sizes that vLLM 0.25.1 gave on an H100, with those flags (reports/h100-qwen3-8b-azure-conversation)
FP8: dict[str, Value | None] = {"quantization": "fp8", "kv-cache-dtype": "fp8"}
DRAFT = '{"method": "draft_model", "model": "d", "num_speculative_tokens": 3}'
MEASURED: list[tuple[dict[str, Value | None], int]] = [
    ({}, 408_256),
    ({**FP8, "max-num-seqs": 512}, 909_808),
    ({**FP8, "speculative-config": DRAFT, "gpu-memory-utilization": 0.85, "max-num-seqs": 128,
      "max-num-batched-tokens": 2048, "block-size": 64}, 453_696),
    ({"quantization": "fp8", "speculative-config": DRAFT, "gpu-memory-utilization": 0.95,
      "max-num-batched-tokens": 16384}, 245_408),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "tokens"), MEASURED)
def test_the_cache_on_a_real_h100_is_foreseen(flags: dict[str, Value | None], tokens: int) -> None:
    target, draft = (ModelShape.from_folder(SHAPES / f"{name}.json") for name in ("qwen3-8b", "qwen3-0.6b"))
    config = ServingConfig("m", {}, {"max-model-len": 16384, **flags})
    found = fits(target, table.table()["H100-SXM"], config, draft=draft)
    assert found.kv_tokens == pytest.approx(tokens, rel=0.04)


def test_two_gpus_or_half_the_bits_make_it_fit() -> None:
    assert not fit("llama-3.3-70b", "H200", {"max-model-len": 8192}).fits  # 131 of 129 GiB
    assert fit("llama-3.3-70b", "H200", {"max-model-len": 8192, "tensor-parallel-size": 2}).fits
    assert fit("llama-3.3-70b", "H200", {"max-model-len": 8192, "quantization": "fp8"}).fits


def test_weights_that_fit_without_room_for_one_request_are_refused() -> None:
    found = fit("qwen3-32b", "H100-SXM", {"max-model-len": 40960})
    assert not found.fits and "one sequence of 40,960 tokens" in found.reason
    assert fit("qwen3-32b", "H100-SXM", {"max-model-len": 8192}).fits


def test_kv_tokens_are_what_remains() -> None:
    found = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    used = sum(found.parts[part] for part in ("weights", "activations", "graphs", "context"))
    assert found.kv_tokens == pytest.approx((found.parts["memory"] - used) / (32 * 2 * 8 * 128 * 2), abs=16)
    assert 400_000 < found.kv_tokens < 480_000


@pytest.mark.parametrize(
    ("flags", "factor"),
    [
        ({"kv-cache-dtype": "fp8"}, 2.0),
        ({"tensor-parallel-size": 2}, 2.27),  # half the weights as well
    ],
)
def test_flags_change_the_room(flags: dict[str, Value | None], factor: float) -> None:
    base = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192}).kv_tokens
    assert fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192, **flags}).kv_tokens == pytest.approx(
        base * factor, rel=0.05
    )


def test_a_smaller_share_of_memory_leaves_less_room() -> None:
    tokens = [fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192, "gpu-memory-utilization": u}) for u in (0.9, 0.5)]
    lost = 0.4 * table.table()["H100-SXM"].memory_bytes / (32 * 2 * 8 * 128 * 2)
    assert tokens[0].kv_tokens - tokens[1].kv_tokens == pytest.approx(lost, abs=32)


def test_more_ranks_than_kv_heads_copy_the_cache() -> None:
    room = {tp: fit("gpt-oss-120b", "H200", {"max-model-len": 8192, "tensor-parallel-size": tp}) for tp in (8, 16)}
    assert room[16].parts["kv_per_token"] == room[8].parts["kv_per_token"]


def test_heads_that_cannot_be_split_are_refused_in_words() -> None:
    found = fit("minimax-m2.5", "H200", {"tensor-parallel-size": 7})
    assert not found.fits and "48 attention heads cannot be split over 7 GPUs" in found.reason


def test_windows_and_states_take_a_fixed_room() -> None:
    window = fit("gemma-3-27b", "H200", {"max-model-len": 32768})
    assert window.parts["kv_per_token"] == 10 * 2 * 16 * 128 * 2  # the ten full layers alone
    assert window.parts["kv_fixed"] == 52 * 2 * 16 * 128 * 2 * (1024 + 16)
    assert fit("qwen3.5-397b-a17b", "H200", {"tensor-parallel-size": 8, "max-model-len": 8192}).parts["kv_fixed"] > 0


def test_where_every_layer_has_a_window_a_sequence_holds_no_more_of_it() -> None:
    config = json.loads((SHAPES / "llama-3.1-8b.json").read_text())
    gpu, flags = table.table()["H100-SXM"], {"max-model-len": 8192}
    shape = shape_of({**config, "model_type": "mistral", "sliding_window": 4096})
    full = fits(shape_of(config), gpu, ServingConfig("m", {}, flags))
    for seqs in (32, 128, 1024):
        found = fits(shape, gpu, ServingConfig("m", {}, {**flags, "max-num-seqs": seqs}))
        assert found.kv_tokens == pytest.approx(full.kv_tokens, rel=0.02)
        assert found.parts["kv_held"] == 4096 + 16 and found.parts["sequence"] == (4096 + 16) * 131072
    assert full.parts["kv_held"] == 8192


def test_experts_are_spread_over_data_parallel_ranks() -> None:
    alone = fit("deepseek-r1", "H200", {"tensor-parallel-size": 1, "max-model-len": 8192})
    spread = fit("deepseek-r1", "H200", {"data-parallel-size": 8, "max-model-len": 8192})
    assert not alone.fits and spread.fits
    assert spread.parts["weights"] == pytest.approx(17e9 + 654e9 / 8, rel=0.05)


def test_dp_attention_copies_attention_and_spreads_the_feed_forward_blocks_and_the_head() -> None:
    flags: dict[str, Value | None] = {"tp-size": 8, "dp-size": 4, "enable-dp-attention": None}  # each copy on two GPUs
    shape = ModelShape.from_folder(SHAPES / "llama-3.1-8b.json")
    found = fits(shape, table.table()["H100-SXM"], ServingConfig("m", {}, flags, {}), "sglang")
    attention, blocks = 32 * 4096 * (2 * 4096 + 2 * 1024), 32 * 3 * 4096 * 14336
    words = (attention + blocks / 4 + 128256 * 4096 * (1 + 1 / 4)) / 2
    assert found.parts["weights"] == pytest.approx(2 * words, rel=0.01)


def test_kv_heads_that_tensor_parallelism_neither_splits_nor_copies_evenly_are_refused() -> None:
    """Phi-3-medium has 10 KV heads beside 40 of attention: two and five GPUs, not four."""
    shape = ModelShape.from_folder(SHAPES / "llama-3.1-8b.json")
    heads = tuple(replace(a, kv_heads=10) for a in shape.attention)
    shape = replace(shape, heads=40, attention=heads)
    for gpus, fine in ((1, True), (2, True), (4, False), (5, True), (8, False), (10, True), (20, True)):
        config = ServingConfig("m", {}, {"tensor-parallel-size": gpus})
        found = fits(shape, table.table()["H100-SXM"], config)
        assert found.fits == fine
        assert fine or found.reason == f"10 KV heads cannot be split over {gpus} GPUs (tensor-parallel-size)"


def test_a_cpu_server_s_cache_is_what_the_variable_says() -> None:
    found = fit("qwen2.5-0.5b-awq", "cpu-avx512", {"max-model-len": 4096}, VLLM_CPU_KVCACHE_SPACE="1")
    assert found.fits
    assert found.kv_tokens == GIB // (24 * 2 * 2 * 64 * 2) // 128 * 128
    too_much = fit("qwen2.5-0.5b-awq", "cpu-avx512", {"max-model-len": 4096}, VLLM_CPU_KVCACHE_SPACE="40")
    assert not too_much.fits and "VLLM_CPU_KVCACHE_SPACE" in too_much.reason


def test_a_cache_of_the_size_that_was_asked_for_teaches_nothing_about_what_is_left() -> None:
    found = fit("qwen2.5-0.5b-awq", "cpu-avx512", {"max-model-len": 4096}, VLLM_CPU_KVCACHE_SPACE="1")
    assert correct(found, {"kv_cache_tokens": found.kv_tokens / 2}) == MemoryCorrection()


def test_a_cache_larger_than_the_gpu_is_refused() -> None:
    flags = {"max-model-len": 8192, "gpu-memory-utilization": 0.5}
    assert fit("llama-3.1-8b", "H100-SXM", {**flags, "kv-cache-memory-bytes": 50 * GIB}).fits  # which sets no share
    found = fit("llama-3.1-8b", "H100-SXM", {**flags, "kv-cache-memory-bytes": 500 * GIB})
    assert not found.fits and "the KV cache that kv-cache-memory-bytes asks for" in found.reason
    assert found.short_bytes / GIB == pytest.approx(500 + 18 - 80, abs=2)


def test_the_cache_of_a_server_told_to_compute_in_float32_is_twice_as_large() -> None:
    wide = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192, "dtype": "float32"})
    narrow = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192, "dtype": "bfloat16"})
    assert wide.parts["kv_per_token"] == 2 * narrow.parts["kv_per_token"]


def test_a_log_s_kv_tokens_correct_the_next_prediction() -> None:
    flags: dict[str, Value | None] = {"max-model-len": 8192}
    first = fit("llama-3.1-8b", "H100-SXM", flags)
    seen = first.kv_tokens - 20_000  # the server had 20,000 tokens less than predicted
    learned = correct(first, {"kv_cache_tokens": seen})
    assert fit("llama-3.1-8b", "H100-SXM", flags, learned).kv_tokens == pytest.approx(seen, abs=32)
    # and it carries over to another config of the same model
    other = fit("llama-3.1-8b", "H100-SXM", {**flags, "kv-cache-dtype": "fp8"}, learned)
    plain = fit("llama-3.1-8b", "H100-SXM", {**flags, "kv-cache-dtype": "fp8"})
    assert plain.kv_tokens - other.kv_tokens == pytest.approx(40_000, abs=32)


def test_maximum_concurrency_says_the_same_as_the_tokens() -> None:
    first = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    by_tokens = correct(first, {"kv_cache_tokens": 40 * 8192})
    by_concurrency = correct(first, {"max_concurrency": 40})
    assert by_concurrency.overhead_bytes == pytest.approx(by_tokens.overhead_bytes)


def test_measured_weights_correct_the_arithmetic() -> None:
    first = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    learned = correct(first, {"weights_bytes": first.parts["weights"] * 1.1})
    again = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192}, learned)
    assert again.parts["weights"] == pytest.approx(first.parts["weights"] * 1.1)


def test_a_log_without_facts_teaches_nothing() -> None:
    first = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    assert correct(first, {"imports_s": 3.0}) == MemoryCorrection()
    assert learn(first, Untrusted(("client lag",))) == MemoryCorrection()


def test_measurements_average_over_launches() -> None:
    first = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    learned = None
    for lost in (10_000, 30_000):
        outcome = Measured((), Boot(facts={"kv_cache_tokens": first.kv_tokens - lost}))
        learned = learn(first, outcome, learned)
    assert learned is not None and learned.seen == 2
    assert fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192}, learned).kv_tokens == pytest.approx(
        first.kv_tokens - 20_000, abs=32
    )


def test_an_oom_where_it_should_have_fitted_is_refused_the_next_time() -> None:
    flags: dict[str, Value | None] = {"max-model-len": 8192}
    first = fit("qwen3-32b", "H100-SXM", flags)
    assert first.fits
    learned = learn(first, Infeasible("oom-kv", "no blocks", short_bytes=2 * GIB))
    again = fit("qwen3-32b", "H100-SXM", flags, learned)
    assert not again.fits and again.short_bytes == pytest.approx(2 * GIB, rel=0.05)
    assert fit("qwen3-32b", "H100-SXM", {**flags, "tensor-parallel-size": 2}, learned).fits


def test_an_oom_under_load_takes_from_every_later_cache_what_was_missing() -> None:
    flags: dict[str, Value | None] = {"max-model-len": 8192}
    first, learned = fit("llama-3.1-8b", "H100-SXM", flags), None
    for _ in range(2):
        learned = learn(first, Infeasible("oom-activations", "", stage="under load", short_bytes=2 * GIB), learned)
    missing = (first.kv_tokens - fit("llama-3.1-8b", "H100-SXM", flags, learned).kv_tokens) * first.parts[
        "kv_per_token"
    ]
    assert missing == pytest.approx(4 * GIB, rel=0.01)


def test_a_crash_that_was_not_memory_teaches_nothing_about_memory() -> None:
    first = fit("llama-3.1-8b", "H100-SXM", {"max-model-len": 8192})
    assert learn(first, Infeasible("unknown-flag", "no such flag")) == MemoryCorrection()
