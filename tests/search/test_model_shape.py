"""A model's shape is read from its config.json alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.errors import UsageError
from tuner.search.model.architecture import shape_of
from tuner.search.model.precision import from_config, method_of
from tuner.search.model.shape import Attention, FeedForward, ModelShape

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


def sized(family: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: object):
    """The keys that every family writes, and ``more``."""
    return {"model_type": family, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab, **more}  # fmt: skip


NEXT = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
ERNIE = sized("ernie4_5_moe", 2560, 28, 20, 4, 12288, 103424, tie_word_embeddings=True, moe_num_experts=64, moe_k=6,
              moe_num_shared_experts=2, moe_intermediate_size=1536, moe_layer_start_index=1, moe_layer_end_index=27,
              moe_layer_interval=1)  # fmt: skip
MICRO = sized("granitemoehybrid", 2560, 40, 40, 8, 4096, 100352, tie_word_embeddings=True, num_local_experts=0,
              num_experts_per_tok=0, shared_intermediate_size=8192, mamba_n_heads=128,
              layer_types=["attention"] * 40)  # fmt: skip
# Keys of families that are read: published total (1e9), KV bytes per token in 16 bits, windows without end.
READ = {
    "Qwen2.5-7B": (sized("qwen2", 3584, 28, 28, 4, 18944, 152064, use_sliding_window=False, sliding_window=131072,
                         max_window_layers=28), 7.62, 57344),
    "Qwen3-Next-80B-A3B": (
        sized("qwen3_next", 2048, 48, 16, 2, 5120, 151936, head_dim=256, num_experts=512, num_experts_per_tok=10,
              moe_intermediate_size=512, shared_expert_intermediate_size=512, full_attention_interval=4, **NEXT),
        79.67, 12 * 2 * 2 * 256 * 2),
    "Mixtral-8x7B": (sized("mixtral", 4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
                     46.7, 131072),
    "Llama-4-Maverick": (
        sized("llama4_text", 5120, 48, 40, 8, 8192, 202048, head_dim=128, intermediate_size_mlp=16384,
              num_local_experts=128, num_experts_per_tok=1, interleave_moe_layer_step=2), 400.7, 196608),
    "GLM-4.5-Air": (
        sized("glm4_moe", 4096, 46, 96, 8, 10944, 151552, head_dim=128, n_routed_experts=128, num_experts_per_tok=8,
              n_shared_experts=1, moe_intermediate_size=1408, first_k_dense_replace=1), 106.85, 188416),
    "GLM-4.7-Flash": (
        sized("glm4_moe_lite", 2048, 47, 20, 20, 10240, 154880, n_routed_experts=64, num_experts_per_tok=4,
              n_shared_experts=1, moe_intermediate_size=1536, kv_lora_rank=512, q_lora_rank=768, qk_nope_head_dim=192,
              qk_rope_head_dim=64, v_head_dim=256, mlp_layer_types=["dense"] + ["sparse"] * 46), 29.94, 47 * 576 * 2),
    "DeepSeek-V2-Lite": (
        sized("deepseek_v2", 2048, 27, 16, 16, 10944, 102400, n_routed_experts=64, num_experts_per_tok=6,
              n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1, moe_layer_freq=1,
              kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        15.7, 27 * 576 * 2),
    "MiniMax-Text-01": (
        sized("minimax_text_01", 6144, 80, 64, 8, 9216, 200064, head_dim=128, num_local_experts=32,
              num_experts_per_tok=2, shared_intermediate_size=0, attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 10),
        456.0, 10 * 2 * 8 * 128 * 2),
    "Phi-4": (sized("phi3", 5120, 40, 40, 10, 17920, 100352, sliding_window=None), 14.66, 204800),
    "Phi-4-mini": (sized("phi3", 3072, 32, 24, 8, 8192, 200064, sliding_window=262144, full_attn_mod=1,
                         interpolate_factor=1, tie_word_embeddings=True), 3.84, 131072),
    "Nemotron-4-15B": (sized("nemotron", 6144, 32, 48, 8, 24576, 256000, hidden_act="relu2"), 15.6, 131072),
    "AFM-4.5B": (sized("arcee", 2560, 36, 20, 4, 18432, 128004, hidden_act="relu2"), 4.62, 73728),
    "Falcon-40B": (sized("falcon", 8192, 60, 128, 0, 0, 65024, ffn_hidden_size=32768, num_kv_heads=8,
                         new_decoder_architecture=True, multi_query=True), 41.3, 122880),
    "ERNIE-4.5-21B-A3B": (ERNIE, 21.83, 57344),
    "ERNIE-4.5-300B-A47B": (
        sized("ernie4_5_moe", 8192, 54, 64, 8, 28672, 103424, moe_num_experts=64, moe_k=8, moe_intermediate_size=3584,
              moe_layer_start_index=3, moe_layer_end_index=53, moe_layer_interval=1), 299.5, 221184),
    "dots.llm1": (
        sized("dots1", 4096, 62, 32, 32, 10944, 152064, head_dim=128, n_routed_experts=128, num_experts_per_tok=6,
              n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1), 142.8, 1015808),
    "Hunyuan-A13B": (
        sized("hunyuan_v1_moe", 4096, 32, 32, 8, 3072, 128167, head_dim=128, tie_word_embeddings=True, num_experts=64,
              moe_topk=[8] * 32, num_shared_expert=[1] * 32, moe_intermediate_size=[3072] * 32, use_cla=False,
              cla_share_factor=2, use_mla=False, kv_lora_rank=512, v_head_dim=128), 80.4, 131072),
    "Trinity-Mini": (
        sized("afmoe", 2048, 32, 32, 4, 6144, 200192, head_dim=128, num_experts=128, num_experts_per_tok=8,
              num_shared_experts=1, num_dense_layers=2, moe_intermediate_size=1024, sliding_window=2048,
              global_attn_every_n_layers=4, layer_types=([*["sliding_attention"] * 3, "full_attention"]) * 8),
        26.1, 65536),
    "Granite-4.0-Micro": (MICRO, 3.4, 81920),  # every layer is listed: what it says of Mamba is of no layer
}  # fmt: skip


@pytest.mark.parametrize(("config", "total", "bytes_per_token"), READ.values(), ids=READ)
def test_what_a_family_calls_its_sizes_is_known(config: dict, total: float, bytes_per_token: int) -> None:
    shape = shape_of(config)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert sum(a.layers * a.cache for a in shape.attention) * 2 == bytes_per_token
    assert shape.has_experts == any("expert" in key and config[key] for key in config)


KIMI = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 256,
        "num_experts_per_token": 8, "moe_intermediate_size": 1024, "first_k_dense_replace": 1}  # fmt: skip
GEMMA_3N = {
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 15,
    "altup_num_inputs": 4,
}
# Layers of kinds that are not described, by the keys that say so.
MIXED = {
    "Nemotron-H-8B": sized("nemotron_h", 4096, 52, 32, 8, 21504, 131072, hybrid_override_pattern="M-M-*-" * 8,
                           mamba_num_heads=128, ssm_state_size=128, mlp_hidden_act="relu2"),
    "Nemotron-3-Nano": sized("nemotron_h", 2688, 52, 32, 2, 1856, 131072, n_routed_experts=128, num_experts_per_tok=6,
                             layers_block_type=["mamba", "moe", "mamba", "attention"] * 13),
    "Jamba": sized("jamba", 4096, 32, 32, 8, 14336, 65536, num_experts=16, num_experts_per_tok=2, expert_layer_period=2,
                   expert_layer_offset=1, attn_layer_period=8, attn_layer_offset=4),
    "Bamba": sized("bamba", 4096, 32, 32, 8, 14336, 128256, attn_layer_indices=[9, 18, 27], mamba_d_state=128),
    "Falcon-H1": sized("falcon_h1", 3072, 44, 12, 2, 12288, 130048, mamba_d_ssm=3072, mamba_d_state=256),
    "Granite-4.0-H-Small": {**MICRO, "layer_types": ["mamba", "attention"] * 20, "num_local_experts": 72,
                            "num_experts_per_tok": 10},
    "Granite-4.0-H-Small, by its newer name": {**MICRO, "layer_types": ["linear_attention", "attention"] * 20},
    "Zamba2": sized("zamba2", 2560, 54, 32, 32, 10240, 32000, layers_block_type=["mamba", "hybrid"] * 27),
    "LFM2": sized("lfm2", 2048, 16, 32, 8, 12288, 65536, layer_types=["conv", "full_attention"] * 8, conv_L_cache=3),
    "LFM2, by its older keys": sized("lfm2", 2048, 16, 32, 8, 12288, 65536, full_attn_idxs=[2, 5], conv_L_cache=3),
    "RecurrentGemma": sized("recurrent_gemma", 2560, 26, 10, 1, 15360, 256000, lru_width=2560,
                            block_types=["recurrent", "recurrent", "attention"]),
    "Kimi-Linear": sized("kimi_linear", 2304, 27, 32, 32, 9216, 163840, linear_attn_config={"kda_layers": [1]}, **KIMI),
    "Kimi-Linear, by its newer keys": sized("kimi_linear", 2304, 4, 32, 32, 9216, 163840, **KIMI, **NEXT,
                                            layer_types=["linear_attention"] * 3 + ["full_attention"]),
    "Ring-linear": sized("bailing_moe_linear", 4096, 32, 32, 4, 9216, 157184, layer_group_size=5),
    "linear layers without sizes": sized("new", 2048, 4, 16, 2, 5120, 151936, full_attention_interval=4),
    "fewer kinds than layers": sized("new", 2048, 4, 16, 2, 5120, 151936, layer_types=["full_attention"]),
    "Gemma-3n": sized("gemma3n_text", 2048, 35, 8, 2, 16384, 262400, head_dim=256, **GEMMA_3N),
    "MiMo-V2-Flash": sized("mimo_v2_flash", 4096, 48, 64, 4, 16384, 152576, head_dim=192, v_head_dim=128),
    "Nemotron-Super-49B": sized("nemotron-nas", 8192, 80, 64, 8, 28672, 128256, block_configs=[{"ffn": 1}]),
    "Hunyuan-Large": sized("hunyuan", 6400, 64, 80, 8, 18304, 129024, num_experts=16, moe_topk=1, use_cla=True),
    "Grok-2": sized("grok-1", 8192, 64, 64, 8, 32768, 131072, num_local_experts=8, num_experts_per_tok=2,
                    moe_intermediate_size=16384, residual_moe=True),
    "Llama-3.2-Vision": sized("mllama_text_model", 4096, 40, 32, 8, 14336, 128256, cross_attention_layers=[3, 8]),
    "ERNIE-4.5-VL": {**ERNIE, "moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512]},
    "experts under another name": sized("new", 2048, 4, 16, 2, 5120, 151936, num_moe_experts=8, moe_router_topk=2),
    "experts in some layers": {**ERNIE, "moe_layer_freq": [0, 1] * 14},
    "a gate or none": sized("new", 2048, 4, 16, 2, 5120, 151936, hidden_act="relu2"),
    "experts without a gate": sized("nemotron", 2048, 4, 16, 2, 5120, 151936, num_experts=8, num_experts_per_tok=2),
    "Mamba-2": {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128},
    "Phi-4-mini-flash": sized("phi4flash", 2560, 32, 40, 20, 10240, 200064, mb_per_layer=2),
    "full attention in every other layer": sized("phi3", 3072, 32, 24, 8, 8192, 200064, full_attn_mod=2),
    "an encoder": sized("camembert", 768, 12, 12, 12, 3072, 32005, type_vocab_size=1),
}  # fmt: skip


@pytest.mark.parametrize("config", MIXED.values(), ids=MIXED)
def test_layers_that_are_not_described_are_refused_and_never_read_as_others(config: dict) -> None:
    with pytest.raises(UsageError, match=r"does not know this architecture: .* The study runs without the model"):
        shape_of(config)


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
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}},  # its layers elsewhere
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


def test_layers_of_several_precisions_count_as_their_mean() -> None:
    layers = {
        "model.layers.0.self_attn.o_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.shared_experts.up_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    }
    said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    found = from_config({"quantization_config": said})
    assert (found.linear_bits, found.compute, found.act_quant) == (pytest.approx(20.5 / 3), "fp8", True)
    assert (found.expert_bits, found.expert_compute, found.embedding_bits) == (4.5, "fp4", 16)
    found = from_config({"quantization_config": {**said, "quantized_layers": dict([*layers.items()][:2])}})
    assert (found.linear_bits, found.expert_bits) == (8, 16)


@pytest.mark.parametrize("more", [{}, {"n_inner": None}, {"n_inner": 3072}])
def test_gpt2_has_an_mlp_of_four_times_its_size_unless_it_says_another(more: dict[str, object]) -> None:
    small = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    assert shape_of({**small, **more}).parameters == pytest.approx(124e6, rel=0.01)


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


def test_layers_of_every_kind_are_read_with_all_that_a_step_of_them_costs() -> None:
    """Worked by hand from the sizes, one kind after the other."""
    qwen = {
        **{"model_type": "qwen3_next", "hidden_size": 64, "num_hidden_layers": 8, "vocab_size": 100},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "full_attention_interval": 4},
        **{
            "linear_num_key_heads": 3,
            "linear_key_head_dim": 5,
            "linear_num_value_heads": 6,
            "linear_value_head_dim": 7,
        },
        **{"intermediate_size": 96, "max_position_embeddings": 2048},
    }
    found = shape_of(qwen)
    queries, cached = 8 * 16, 2 * 2 * 16
    linear = Attention("linear", 6, 64 * (2 * 15 + 2 * 42) + 42 * 64, 0, 8, 8, 0, 0, 9, 0, state=2 * 42 * 5)
    full = Attention("full", 2, 64 * (3 * queries + cached), cached, 8, 2, 32, 32, 8 + 2, head_dim=16)
    assert found.attention == (full, linear)  # a norm of queries and keys, and a gate: a kernel each
    assert found.ffn == (FeedForward(8, 3 * 64 * 96, kernels=5),)
    assert (found.max_model_len, shape_of({**qwen, "max_position_embeddings": None}).max_model_len) == (2048, 4096)
    assert shape_of({**qwen, "max_position_embeddings": None, "n_positions": 512}).max_model_len == 512

    plain = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100}
    plain |= {"num_attention_heads": 8, "sliding_window": 32, "intermediate_size": 96}
    layers = ["full_attention", "sliding_attention", "sliding_attention", "chunked_attention"]
    both = shape_of({**plain, "layer_types": layers}).attention
    kind = Attention("full", 1, 4 * 64 * 64, 2 * 64, 8, 8, 16, 16, 8, head_dim=8)
    assert both == (kind, replace(kind, kind="window", layers=3, window=32))
    every_third = shape_of({**plain, "num_hidden_layers": 7, "sliding_window_pattern": 3}).attention
    assert [(a.kind, a.layers, a.window) for a in every_third] == [("full", 2, 0), ("window", 5, 32)]

    latent = {"kv_lora_rank": 20, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 12, "q_lora_rank": 30}
    deep = {**plain, "model_type": "deepseek_v32", **latent}
    mla = Attention(
        "mla", 4, 30 * (64 + 8 * 16) + 64 * 26 + 20 * 8 * 22 + 8 * 12 * 64, 26, 8, 1, 16 + 12, 46, 13, head_dim=16
    )
    assert shape_of(deep).attention == (mla,)
    whole = 64 * 8 * 16 - 30 * (64 + 8 * 16)
    assert shape_of({**deep, "q_lora_rank": None}).attention == (replace(mla, weights=mla.weights + whole),)
    sparse = shape_of({**deep, "index_topk": 256, "index_n_heads": 5, "index_head_dim": 14}).attention
    assert sparse == (
        replace(
            mla, kind="dsa", weights=mla.weights + 30 * 5 * 14 + 64 * (14 + 5), cache=26 + 7, pair=46,
            kernels=13 + 10, window=256, scan=7, scan_pair=5 * 14,
        ),
    )  # fmt: skip


def test_which_layers_have_experts_and_what_they_share_is_read() -> None:
    base = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 100}
    base |= {"num_attention_heads": 8, "intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 2}
    base |= {"moe_intermediate_size": 24}

    def of(**more: object) -> tuple[FeedForward, ...]:
        return shape_of({**base, **more}).ffn

    experts, dense = FeedForward(6, 64 * 16, 16, 2, 3 * 64 * 24, 10), FeedForward(6, 3 * 64 * 96, kernels=5)

    def parted(sparse: int) -> tuple[FeedForward, ...]:
        return replace(dense, layers=6 - sparse), replace(experts, layers=sparse)

    assert of() == (experts,)
    assert of(mlp_only_layers=[0, 5]) == parted(4)
    assert of(decoder_sparse_step=3) == parted(2)
    assert of(first_k_dense_replace=1) == parted(5)
    assert of(moe_layer_start_index=1, moe_layer_end_index=3) == parted(3)
    assert of(moe_layer_end_index=99) == (experts,)
    assert of(moe_layers=[1, 2, 7]) == parted(2)
    assert of(mlp_layer_types=["dense", *["sparse"] * 5]) == parted(5)
    shared = replace(experts, weights=64 * 16 + 3 * 64 * 48, kernels=14)
    assert of(n_shared_experts=2) == of(shared_expert_intermediate_size=48) == (shared,)
    assert of(first_k_dense_replace=1, dense_intermediate_size=40)[0] == replace(dense, layers=1, weights=3 * 64 * 40)
