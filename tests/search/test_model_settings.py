"""Flags under vLLM's names become settings, absent ones become the engine's defaults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.search import hardware as table
from tuner.search.model import settings
from tuner.search.model.precision import Precision
from tuner.search.model.settings import Settings
from tuner.search.model.shape import ModelShape
from tuner.space import memory
from tuner.space.config import ServingConfig, Value

SHAPES = Path(__file__).with_name("shapes")


def read(flags: dict[str, Value | None], gpu: str = "H100-SXM", model: str = "llama-3.1-8b", **more: str) -> Settings:
    row = table.table()[gpu]
    shape = ModelShape.from_folder(SHAPES / f"{model}.json")
    config = ServingConfig("m", {}, flags, {k: v for k, v in more.items() if k.isupper()}, more.get("variant", ""))
    return settings.of(config, shape, row, more.get("engine", "vllm"))


@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"),
    [
        ("H100-SXM", 8192, 1024),  # 70 GiB and more
        ("B200", 16384, 1024),  # 160 GiB and more
        ("A100-80GB", 2048, 256),  # the exception by name
        ("L4", 2048, 256),
        ("cpu-avx512", 2048, 128),
    ],
)
def test_batch_defaults_are_vllm_s(gpu: str, tokens: int, seqs: int) -> None:
    found = read({}, gpu)
    assert (found.max_batched_tokens, found.max_seqs) == (tokens, seqs)


def test_flags_are_read_whatever_their_type() -> None:
    found = read({"tensor-parallel-size": "2", "max-num-seqs": 64, "gpu-memory-utilization": 0.8, "block-size": 32})
    assert (found.tp, found.max_seqs, found.memory_share, found.block_size) == (2, 64, 0.8, 32)
    assert found.gpus == 2


@pytest.mark.parametrize(
    ("engine", "flags", "said"),
    [
        ("vllm", {"enforce-eager": None}, {"eager": True}),
        ("sglang", {"disable-cuda-graph": None}, {"eager": True}),
        ("vllm", {}, {"eager": False, "expert_parallel": False, "prefix_caching": True, "kv_bytes": None}),
        ("vllm", {"enable-expert-parallel": None}, {"expert_parallel": True}),
        ("sglang", {"ep-size": 2}, {"expert_parallel": True}),
        ("sglang", {"ep": 1}, {"expert_parallel": False}),
        ("sglang", {"disable-radix-cache": None}, {"prefix_caching": False}),
        ("sglang", {"enable-mixed-chunk": None}, {"prefill_first": False}),
        ("sglang", {"context-length": 1000, "page-size": 64}, {"max_model_len": 1000, "block_size": 64}),
        ("sglang", {"tp-size": 2, "pp-size": 3, "dp-size": 4}, {"tp": 2, "pp": 3, "dp": 4}),
        ("sglang", {"mem-fraction-static": 0.7, "max-running-requests": 9}, {"memory_share": 0.7, "max_seqs": 9}),
        ("vllm", {"kv-cache-memory-bytes": 5}, {"kv_bytes": 5}),
        ("vllm", {"kv-cache-memory-bytes": "5"}, {"kv_bytes": 5}),
    ],
)
def test_each_engines_flags_mean_what_they_say(engine: str, flags: dict[str, Value | None], said: dict) -> None:
    found = read(flags, engine=engine)
    assert {name: getattr(found, name) for name in said} == said


@pytest.mark.parametrize(
    ("gpu", "tokens"), [("T4", 2048), ("L4", 4096), ("L40S", 4096), ("H100-SXM", 8192), ("B200", 16384)]
)
def test_sglang_s_chunk_goes_by_the_size_of_the_memory(gpu: str, tokens: int) -> None:
    assert read({}, gpu, engine="sglang").max_batched_tokens == tokens


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("llama-3.1-8b", {}, Precision()),
        ("llama-3.1-8b", {"dtype": "float32"}, Precision(32, 32, 32, "fp32", "fp32", kv_bits=32)),
        ("llama-3.1-8b", {"dtype": "bfloat16", "quantization": "awq"}, Precision(4.16, 4.16)),
        (
            "llama-3.1-8b",
            {"dtype": "float32", "kv-cache-dtype": "fp8_e5m2"},
            Precision(32, 32, 32, "fp32", "fp32", kv_bits=8),
        ),
        ("llama-3.1-8b", {"kv-cache-dtype": "nvfp4"}, Precision(kv_bits=4.5)),
        ("llama-3.1-8b", {"kv-cache-dtype": "float32"}, Precision(kv_bits=32)),
        (
            "llama-3.1-8b",
            {"dtype": "float32", "kv-cache-dtype": "bfloat16"},
            Precision(32, 32, 32, "fp32", "fp32", kv_bits=16),
        ),
        ("gpt-oss-120b", {"dtype": "float32"}, Precision(32, 4.25, 32, "fp32", "fp4", kv_bits=32)),
    ],
)
def test_the_precision_is_the_checkpoints_as_the_flags_change_it(
    model: str, flags: dict[str, Value | None], said: Precision
) -> None:
    assert read(flags, model=model).precision == said


def test_a_flag_that_cannot_be_read_counts_as_absent() -> None:
    assert read({"max-num-seqs": "many"}).max_seqs == 1024


@pytest.mark.parametrize(
    ("flags", "on"),
    [
        ({}, True),
        ({"enable-prefix-caching": None}, True),
        ({"no-enable-prefix-caching": None}, False),
        ({"enable-prefix-caching": False}, False),
    ],
)
def test_switches_have_two_spellings(flags: dict[str, Value | None], on: bool) -> None:
    assert read(flags).prefix_caching is on


def test_without_chunks_a_step_takes_the_longest_prompt() -> None:
    found = read({"no-enable-chunked-prefill": None, "max-model-len": 32768})
    assert found.max_batched_tokens == 32768


def test_quantization_of_a_quantized_checkpoint_changes_nothing() -> None:
    assert read({"quantization": "fp8"}, model="deepseek-r1").precision.linear_bits == 8
    assert read({"quantization": "mxfp4"}, model="gpt-oss-120b").precision.linear_bits == 16


def test_a_variant_s_name_decides_its_precision() -> None:
    assert read({}, variant="w8a8-int8").precision.compute == "int8"


def test_cpu_cache_space_is_in_gib() -> None:
    assert read({}, "cpu-avx512", VLLM_CPU_KVCACHE_SPACE="4").kv_bytes == 4 * 2**30
    assert read({}, "cpu-avx512").kv_bytes is None


@pytest.mark.parametrize("space", ["1.5", "4GiB", ""])
def test_a_cache_space_that_vllm_cannot_read_is_refused_before_a_launch(space: str) -> None:
    found = read({}, "cpu-avx512", VLLM_CPU_KVCACHE_SPACE=space)
    fit = memory.fits_settings(ModelShape.from_folder(SHAPES / "llama-3.1-8b.json"), table.table()["cpu-avx512"], found)
    assert (fit.fits, fit.short_bytes) == (False, 0)
    assert fit.reason == f"VLLM_CPU_KVCACHE_SPACE is {space!r}: vLLM takes a whole number of GiB"
    assert read({}, VLLM_CPU_KVCACHE_SPACE=space).refused == "", "on GPUs nobody reads it"


def test_drafts_yield_the_sum_of_their_chances() -> None:
    body = {"method": "draft_model", "model": "d", "num_speculative_tokens": 3}
    found = read({"speculative-config": json.dumps(body)}).speculation
    assert found is not None and found.model == "d"
    a = found.acceptance
    assert found.per_step == pytest.approx(1 + a + a**2 + a**3)


def test_a_stated_acceptance_is_believed() -> None:
    body = {"method": "eagle3", "num_speculative_tokens": 4, "synthetic_acceptance_length": 2.5}
    found = read({"speculative-config": json.dumps(body)}).speculation
    assert found is not None and found.method == "eagle" and found.per_step == 2.5


@pytest.mark.parametrize(
    ("flags", "method", "tokens"),
    [
        ({"speculative-algorithm": "NGRAM", "speculative-num-draft-tokens": 8}, "ngram", 7),
        (
            {"speculative-algorithm": "EAGLE3", "speculative-num-steps": 3, "speculative-num-draft-tokens": 4},
            "eagle",
            3,
        ),
        ({"speculative-algorithm": "EAGLE", "speculative-num-steps": 5}, "eagle", 5),
        ({"speculative-algorithm": "NEXTN"}, "mtp", 3),
        ({"speculative-algorithm": "STANDALONE", "speculative-num-steps": 2}, "draft_model", 2),
    ],
)
def test_sglang_s_speculation_is_seen(flags: dict[str, Value | None], method: str, tokens: int) -> None:
    found = read({**flags, "speculative-draft-model-path": "d"}, engine="sglang")
    assert found.speculation is not None and found.max_seqs == 48
    assert (found.speculation.method, found.speculation.tokens, found.speculation.model) == (method, tokens, "d")


def test_a_broken_speculative_config_is_no_speculation() -> None:
    assert read({"speculative-config": "{"}).speculation is None


def test_sglang_prefills_first_and_leaves_memory_for_its_chunk() -> None:
    found = read({}, engine="sglang")
    assert found.prefill_first and found.memory_share == pytest.approx(0.83, abs=0.01)
    assert not read({}).prefill_first


def test_sglang_s_attention_ranks_lie_within_its_tensor_parallelism() -> None:
    """They share its GPUs, what SGLang is told of a step is theirs together, and each keeps sequences of its own."""
    given = {"tp-size": 8, "chunked-prefill-size": 8192, "max-running-requests": 256}
    sizes = {**given, "dp-size": 4}
    inside, beside = (read({**sizes, **more}, engine="sglang") for more in ({"enable-dp-attention": None}, {}))
    assert inside == read({**given, "attn-dp-size": 4}, engine="sglang")  # as 0.5.23 says it
    assert (inside.gpus, inside.tp, inside.dp, inside.sharing) == (8, 2, 4, 4)
    assert (inside.max_batched_tokens, inside.max_seqs) == (2048, 64)
    assert (beside.gpus, beside.tp, beside.dp, beside.sharing) == (32, 8, 4, 1)
    assert read({"tp-size": 8, "enable-dp-attention": None}, engine="sglang").tp == 8
    default = read({"tp-size": 8, "dp-size": 8, "enable-dp-attention": None}, engine="sglang")
    assert default.max_seqs == read({}, engine="sglang").max_seqs
    odd = read({"tp-size": 8, "dp-size": 3, "enable-dp-attention": None}, engine="sglang")
    assert odd.refused == "8 GPUs cannot be split over 3 ranks of DP attention (tp-size)"


@pytest.mark.parametrize(
    ("gpu", "mib", "model", "flags", "share"),
    [
        ("H200", 143771, "qwen3-30b-a3b", {"tp-size": 1}, 0.903),
        ("H200", 143771, "llama-3.3-70b", {"tp-size": 8}, 0.893),  # larger graphs, and something for each GPU
        ("H200", 143771, "deepseek-r1", {"tp-size": 8}, 0.886),  # MLA
        ("H200", 143771, "deepseek-r1", {"tp-size": 8, "attn-dp-size": 8}, 0.758),
        ("H200", 143771, "deepseek-r1", {"tp-size": 8, "attn-dp-size": 8, "max-running-requests": 16}, 0.89),
        ("H200", 143771, "deepseek-r1", {"tp-size": 8, "attn-dp-size": 8, "chunked-prefill-size": 1024}, 0.822),
        ("H100-SXM", 81559, "qwen3-235b-a22b", {"tp-size": 8, "attn-dp-size": 4}, 0.699),
        ("A100-40GB", 40960, "llama-3.3-70b", {"tp-size": 8}, 0.795),
        ("A100-40GB", 40960, "llama-3.3-70b", {"tp-size": 8, "chunked-prefill-size": 32768}, 0.0),  # -0.255: no start
        ("B200", 183359, "deepseek-r1", {"tp-size": 8, "attn-dp-size": 8}, 0.743),
    ],
)
def test_sglang_leaves_as_much_memory_as_its_own_resolution_says(
    gpu: str, mib: int, model: str, flags: dict[str, Value | None], share: float
) -> None:
    """mem_fraction_static as SGLang 0.5.23 resolves it, told of such a GPU (nvidia-smi's MiB)."""
    row = replace(table.table()[gpu], memory_bytes=mib * 2**20)
    shape = ModelShape.from_folder(SHAPES / f"{model}.json")
    found = settings.of(ServingConfig("m", {}, flags, {}), shape, row, "sglang")
    assert found.memory_share == pytest.approx(share, abs=0.003)


def test_gpus_that_no_known_flag_spreads_a_model_over_split_its_layers() -> None:
    """An attached server, or one behind a command with flags of its own."""
    shape, row = ModelShape.from_folder(SHAPES / "llama-3.1-8b.json"), table.table()["H100-SXM"]
    for gpus, tp in ((1, 1), (4, 4), (3, 1), (0, 1)):  # 32 heads are not split in three
        assert settings.of(ServingConfig("m", {}, {}, gpus=gpus), shape, row).tp == tp
    known = ServingConfig("m", {}, {"data-parallel-size": 4}, gpus=4)
    assert (settings.of(known, shape, row).tp, settings.of(known, shape, row).dp) == (1, 4)
