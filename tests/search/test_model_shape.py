"""A model's shape is read from its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.errors import UsageError
from tuner.search.model.architecture import shape_of
from tuner.search.model.precision import from_config, method_of
from tuner.search.model.shape import ModelShape

SHAPES = Path(__file__).with_name("shapes")

# Published totals and active parameters, 1e9 (model cards). Embeddings count in "total"; "active" leaves the table out.
PUBLISHED = [
    ("llama-3.1-8b", 8.03, None),  # GQA, untied
    ("llama-3.3-70b", 70.6, None),
    ("qwen3-32b", 32.8, None),  # head_dim x heads is not the hidden width
    ("qwen3-30b-a3b", 30.5, 3.3),
    ("qwen3-235b-a22b", 235, 22),
    ("gpt-oss-20b", 20.9, 3.6),
    ("gpt-oss-120b", 116.8, 5.1),  # alternating windows, MXFP4 experts
    ("deepseek-r1", 671, 37),  # MLA, dense first layers, shared expert
    ("kimi-k2", 1026, 32),
    ("minimax-m2.5", 229, 10),
    ("glm-5", 744, 40),  # MLA with sparse selection
    ("qwen3.5-397b-a17b", 397, 17),  # three linear-attention layers to one full
    ("gemma-3-27b", 27.0, None),  # text_config, tied
]


@pytest.mark.parametrize(("name", "total", "active"), PUBLISHED)
def test_parameters_add_up_to_the_published_number(name: str, total: float, active: float | None) -> None:
    shape = ModelShape.from_folder(SHAPES / f"{name}.json")
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    if active:
        assert shape.active / 1e9 == pytest.approx(active, rel=0.1)


def test_weights_take_the_bits_of_their_part() -> None:
    oss = ModelShape.from_folder(SHAPES / "gpt-oss-120b.json")
    assert oss.precision.linear_bits == 16 and oss.precision.expert_bits == 4.25
    assert oss.weight_bytes(oss.precision) / 1e9 == pytest.approx(65.2, rel=0.01)  # the published checkpoint


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-3.1-8b", 32 * 2 * 8 * 128 * 2),
        ("qwen3-32b", 64 * 2 * 8 * 128 * 2),
        ("deepseek-r1", 61 * (512 + 64) * 2),  # one latent and one rotary key, whatever the heads
        ("qwen3.5-397b-a17b", 15 * 2 * 2 * 256 * 2),  # linear layers keep none
    ],
)
def test_a_token_of_kv_cache_has_its_bytes(name: str, bytes_per_token: int) -> None:
    shape = ModelShape.from_folder(SHAPES / f"{name}.json")
    assert sum(a.layers * a.cache for a in shape.attention) * 2 == bytes_per_token


def test_windows_and_linear_layers_are_counted_apart() -> None:
    kinds = lambda name: {a.kind: a.layers for a in ModelShape.from_folder(SHAPES / f"{name}.json").attention}  # noqa: E731
    assert kinds("gpt-oss-120b") == {"full": 18, "window": 18}
    assert kinds("gemma-3-27b") == {"full": 10, "window": 52}
    assert kinds("qwen3.5-397b-a17b") == {"full": 15, "linear": 45}
    assert kinds("qwen2.5-0.5b-awq") == {"full": 24}  # a window that use_sliding_window switches off


def test_layer_types_in_the_file_win_over_a_pattern() -> None:
    config = json.loads((SHAPES / "gpt-oss-120b.json").read_text())
    config["layer_types"] = ["sliding_attention"] * 30 + ["full_attention"] * 6
    assert {a.kind: a.layers for a in shape_of(config).attention} == {"full": 6, "window": 30}


LLAMA = json.loads((SHAPES / "llama-3.1-8b.json").read_text())
GEMMA_3 = {"model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
           "num_hidden_layers": 62, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024}  # fmt: skip
# What config.json leaves to the family: total parameters by hand (1e9), layers by kind.
LEFT_OUT = [
    ({"model_type": "gemma3", "text_config": GEMMA_3}, 27.01, {"full": 10, "window": 52}),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
      "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}}, 3.88, {"full": 5, "window": 29}),
    ({"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "head_dim": 256,
      "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000}, 9.24, {"full": 21, "window": 21}),
    ({"model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
      "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 256000}, 34.98, {"full": 40}),
    ({"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 5120, "head_dim": 128,
      "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
      "num_key_value_heads": 8, "vocab_size": 202048, "num_local_experts": 16, "num_experts_per_tok": 1}},
     107.77, {"full": 12, "window": 36}),
    ({"model_type": "hunyuan_v1_moe", "hidden_size": 4096, "intermediate_size": 3072, "num_hidden_layers": 32,
      "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128167, "tie_word_embeddings": True,
      "num_experts": 64, "moe_topk": [8] * 32, "moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32},
     80.40, {"full": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "total", "kinds"), LEFT_OUT, ids=[c["model_type"] for c, _, _ in LEFT_OUT])
def test_what_a_config_leaves_to_its_family_is_known(config: dict, total: float, kinds: dict[str, int]) -> None:
    shape = shape_of(config)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.001)
    assert {a.kind: a.layers for a in shape.attention} == kinds


@pytest.mark.parametrize(
    "odd",
    [
        {"sliding_window": "abc"},
        {"head_dim": "x"},
        {"num_key_value_heads": -8},
        {"hidden_size": 16},  # heads of half an element
        {"num_experts": [8], "mlp_only_layers": 3},
        {"text_config": "foo"},
        {"text_config": [1]},
        {"quantization_config": {"quant_method": "gptq", "bits": None}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": [1]}}},
    ],
)
def test_values_of_another_kind_are_an_architecture_that_is_not_known(odd: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"does not know this architecture: .* The study runs without the model"):
        shape_of({**LLAMA, **odd})


def test_a_checkpoint_in_32_bits_is_served_in_16() -> None:
    assert from_config({"torch_dtype": "float32"}) == from_config({"torch_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("quantization", "linear", "compute"),
    [
        ({"quant_method": "fp8"}, 8.0, "fp8"),
        ({"quant_method": "awq", "bits": 4}, 4.16, "bf16"),
        ({"quant_method": "gptq", "bits": 8}, 8.125, "bf16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5, "fp4"),
        (  # weights and activations in 8 bits: int8 arithmetic
            {"quant_method": "compressed-tensors", "config_groups": {"g": {
                "weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}}}, 8.0, "int8",
        ),
        (  # weights alone: widened to bf16
            {"quant_method": "compressed-tensors", "config_groups": {"g": {
                "weights": {"num_bits": 4, "type": "int"}, "input_activations": None}}}, 4.16, "bf16",
        ),
        ({"quant_method": "of tomorrow"}, 16.0, "bf16"),  # unknown: as if not quantized
    ],
)  # fmt: skip
def test_a_checkpoint_says_its_own_precision(quantization: dict[str, object], linear: float, compute: str) -> None:
    precision = from_config({"torch_dtype": "bfloat16", "quantization_config": quantization})
    assert (precision.linear_bits, precision.compute) == (linear, compute)
    assert precision.embedding_bits == 16


def test_a_checkpoint_may_ask_for_an_fp8_cache() -> None:
    shape = ModelShape.from_folder(SHAPES / "llama-3.1-8b-instruct-fp8.json")
    assert shape.precision.kv_bits == 8


@pytest.mark.parametrize(
    ("name", "method"),
    [("w8a8-int8", "int8"), ("gptq-4bit", "w4a16"), ("awq", "w4a16"), ("fp8", "fp8"), ("mxfp4", "mxfp4"), ("", "")],
)
def test_a_variant_folder_says_its_method_by_name(name: str, method: str) -> None:
    assert method_of(name) == method


def test_an_architecture_without_attention_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2", "hidden_size": 64}))
    with pytest.raises(UsageError, match="does not know this architecture") as caught:
        ModelShape.from_folder(tmp_path)
    assert caught.value.where.endswith("config.json")


def test_a_missing_width_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    with pytest.raises(UsageError, match="hidden_size"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_broken_config_is_a_usage_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError):
        ModelShape.from_folder(tmp_path)


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config"):
        ModelShape.from_folder(tmp_path)
