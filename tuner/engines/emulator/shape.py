"""A model as sizes: what one layer computes, reads and keeps, from ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.engines.modelfolder import local_model


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in elements. ``kv_elements`` is what one token keeps in one attention layer (K and V over all KV heads;
    with MLA one latent vector, which tensor parallelism does not divide). ``full_layers`` attend to everything,
    ``window_layers`` to the last ``window`` tokens, ``linear_layers`` keep a state of constant size. ``attention`` and
    ``dense_mlp`` are weights per layer, ``expert`` the weights of one expert, ``shared`` of the shared expert and
    router; ``dense_layers`` of the layers have no experts. ``embedding`` counts input and output embeddings that are
    stored; ``head`` the output projection. ``weight_bits`` is the stored width of the linear layers.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_position: int
    attention: int
    dense_mlp: int
    embedding: int
    head: int
    kv_elements: int
    full_layers: int
    window_layers: int = 0
    linear_layers: int = 0
    window: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert: int = 0
    shared: int = 0
    dense_layers: int = 0
    mla: bool = False
    weight_bits: int = 16
    quantization: str = ""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def linear_weights(self) -> int:
        """All weights that a quantization touches."""
        mlp = (self.layers - self.moe_layers) * self.dense_mlp
        return self.layers * self.attention + mlp + self.moe_layers * (self.experts * self.expert + self.shared)

    def weight_bytes(self, bits: int) -> float:
        """Bytes of the whole model with linear layers of ``bits`` (scales of narrow formats: 1/16 more at 4 bits)."""
        scale = 1.0625 if bits <= 4 else 1.0
        return self.linear_weights * bits / 8 * scale + self.embedding * 2


def read_shape(model: str | Path) -> Shape:
    """The shape of ``model``, a folder or an id in the Hugging Face cache. Raises ``FileNotFoundError`` or
    ``ValueError``."""
    folder = local_model(str(model)) or Path(model)
    return shape_of(json.loads((folder / "config.json").read_text()), Path(model).name)


def shape_of(config: Mapping[str, Any], name: str = "") -> Shape:
    """The shape that a Hugging Face ``config.json`` describes. Raises ``ValueError`` where sizes are missing."""
    c = {**config, **config.get("text_config", {})}
    try:
        hidden, layers, heads = int(c["hidden_size"]), int(c["num_hidden_layers"]), int(c["num_attention_heads"])
        vocab = int(c["vocab_size"])
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing}") from None
    kv_heads = int(c.get("num_key_value_heads") or heads)
    head_dim = int(c.get("head_dim") or hidden // heads)
    rank = int(c.get("kv_lora_rank") or 0)
    if rank:
        rope, nope = int(c.get("qk_rope_head_dim", 64)), int(c.get("qk_nope_head_dim", 128))
        value, query_rank = int(c.get("v_head_dim", 128)), int(c.get("q_lora_rank") or 0)
        query = (
            hidden * query_rank + query_rank * heads * (nope + rope) if query_rank else hidden * heads * (nope + rope)
        )
        attention = query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
        kv_elements, head_dim = rank + rope, nope + rope
    else:
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        kv_elements = 2 * kv_heads * head_dim
    experts = int(c.get("num_experts") or c.get("n_routed_experts") or c.get("num_local_experts") or 0)
    inner = int(c.get("intermediate_size") or c.get("moe_intermediate_size") or 4 * hidden)
    expert_inner = int(c.get("moe_intermediate_size") or inner)
    shared_inner = int(c.get("shared_expert_intermediate_size") or 0) or expert_inner * int(
        c.get("n_shared_experts") or 0
    )
    full, windowed, linear, window = _layer_kinds(c, layers)
    quantization, bits = _stored(config)
    tied = bool(c.get("tie_word_embeddings", False))
    return Shape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_position=int(c.get("max_position_embeddings") or 4096),
        attention=attention,
        dense_mlp=3 * hidden * inner,
        embedding=vocab * hidden * (1 if tied else 2),
        head=vocab * hidden,
        kv_elements=kv_elements,
        full_layers=full,
        window_layers=windowed,
        linear_layers=linear,
        window=window,
        experts=experts,
        experts_per_token=int(c.get("num_experts_per_tok") or c.get("experts_per_token") or 0),
        expert=3 * hidden * expert_inner,
        shared=3 * hidden * shared_inner + hidden * experts,
        dense_layers=int(c.get("first_k_dense_replace") or 0) if experts else layers,
        mla=bool(rank),
        weight_bits=bits,
        quantization=quantization,
    )


def _layer_kinds(c: Mapping[str, Any], layers: int) -> tuple[int, int, int, int]:
    """How many layers attend fully, in a window, linearly; and the window in tokens."""
    window = int(c.get("sliding_window") or 0) if c.get("use_sliding_window", True) else 0
    kinds = c.get("layer_types")
    if kinds:
        windowed = sum(k == "sliding_attention" for k in kinds) if window else 0
        linear = sum("linear" in k for k in kinds)
        return layers - windowed - linear, windowed, linear, window
    interval = int(c.get("full_attention_interval") or 0)
    if interval:
        return layers // interval, 0, layers - layers // interval, 0
    pattern = int(c.get("sliding_window_pattern") or 0)
    if window and pattern:  # one full layer in every ``pattern``
        return layers // pattern, layers - layers // pattern, 0, window
    return (0, layers, 0, window) if window else (layers, 0, 0, 0)


def _stored(config: Mapping[str, Any]) -> tuple[str, int]:
    """The checkpoint's own quantization and the width of its linear weights."""
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method", ""))
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin"):
        return method, int(quantization.get("bits") or quantization.get("w_bit") or 4)
    if method == "mxfp4":
        return method, 4
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if groups else {}
        bits = int(weights.get("num_bits") or 8)
        if bits == 4:
            return "nvfp4" if weights.get("type") == "float" else "gptq_marlin", 4
        return ("fp8" if weights.get("type") == "float" else "w8a8"), bits
    if method == "modelopt":
        four = "FP4" in str(quantization.get("quant_algo", "")).upper()
        return ("nvfp4", 4) if four else ("fp8", 8)
    return (method, 8) if method == "fp8" else ("", 16)
