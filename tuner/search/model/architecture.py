"""From a Hugging Face config.json to a :class:`ModelShape`: one reader for the keys that the families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.errors import UsageError
from tuner.search.model import precision
from tuner.search.model.shape import Attention, FeedForward, ModelShape

# Kernels per layer after fusion, counted from the layer's forward pass in vLLM: what costs launches, whatever its size.
# Attention: norm, qkv, rope, cache write, attention, its split-KV reduction, output projection, all-reduce.
_KERNELS_ATTENTION = 8
# MLA: fused down-projection, two norms, q up-projection, rope, cache write, two absorbed products, attention and its
# reduction, output projection, block norm, all-reduce.
_KERNELS_MLA = 13
# Indexer of sparse attention: q and k projections, norm, rope, two quantizations, cache write, logits, top-k, gather.
_KERNELS_INDEXER = 10
# Linear attention: norm, two input projections, convolution, gates, recurrence, gated norm, output, all-reduce.
_KERNELS_LINEAR = 9
# Dense feed-forward: norm, gate and up, activation, down, all-reduce.
_KERNELS_DENSE = 5
# Experts: norm, router, top-k, sorting by expert (2), grouped product, activation, grouped product, sum, all-reduce.
_KERNELS_EXPERTS = 10
_KERNELS_SHARED = 4  # gate and up, activation, down, add

_REFUSED = ("encoder_decoder", "t5", "bert", "whisper", "bart", "clip", "mamba", "rwkv", "xlstm")


# What a family's config class in transformers (configuration_<family>.py) assumes where config.json says nothing: a
# tied head, one full layer in every so many, sizes. The shared expert of Llama 4 has no key (modeling_llama4.py).
_TIED = {"tie_word_embeddings": True}
_ABSENT: Mapping[str, Mapping[str, Any]] = {
    **{family: _TIED for family in ("gemma", "cohere", "falcon", "gpt2", "gpt_bigcode", "opt", "starcoder2")},
    "gemma2": {**_TIED, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {
        **_TIED,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
    },
    "cohere2": {**_TIED, "sliding_window": 4096, "sliding_window_pattern": 4},
    "llama4_text": {"n_shared_experts": 1, "attention_chunk_size": 8192, "sliding_window_pattern": 4},
}


def shape_of(config: Mapping[str, Any], name: str = "", where: str = "") -> ModelShape:
    """Reads a config.json's content. Raises :class:`UsageError` for an architecture it does not know, with what is
    missing."""
    try:
        return _shape(config, name, where)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _unknown(f"config.json has a value of another kind than expected ({error})", where) from error


def _shape(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    text: Mapping[str, Any] = config.get("text_config") or config.get("llm_config") or config
    kind = str(text.get("model_type") or config.get("model_type") or "")
    tied = config.get("tie_word_embeddings", _ABSENT.get(kind, {}).get("tie_word_embeddings", False))
    text = {**_ABSENT.get(kind, {}), "tie_word_embeddings": tied, **text}
    if text.get("is_encoder_decoder") or any(kind.startswith(word) for word in _REFUSED):
        raise _unknown(f"{kind or 'this model'} is not a decoder with attention and feed-forward layers", where)
    hidden = _int(text, where, "hidden_size", "n_embd", "d_model")
    layers = _int(text, where, "num_hidden_layers", "n_layer", "num_layers")
    heads = _int(text, where, "num_attention_heads", "n_head", "num_heads")
    vocab = _int(text, where, "vocab_size")
    kv_heads = _most(text, "num_key_value_heads", "multi_query_group_num") or (1 if text.get("multi_query") else heads)
    own = precision.from_config(config)
    return ModelShape(
        name=name or str(config.get("_name_or_path", "")) or kind,
        hidden=hidden,
        vocab=vocab,
        tied=bool(text["tie_word_embeddings"]),
        attention=_attention(text, hidden, layers, heads, kv_heads, where),
        ffn=_feed_forward(text, hidden, layers, where),
        precision=own,
        heads=heads,
        kv_heads=kv_heads,
        max_model_len=int(text.get("max_position_embeddings") or text.get("n_positions") or 4096),
    )


def _attention(
    text: Mapping[str, Any], hidden: int, layers: int, heads: int, kv_heads: int, where: str
) -> tuple[Attention, ...]:
    if text.get("kv_lora_rank"):
        return (_mla(text, hidden, layers, heads),)
    head = _most(text, "head_dim") or hidden // heads
    if min(head, kv_heads) < 1:
        raise _unknown(f"{kv_heads} KV heads of {head} elements", where)
    gate = heads * head if text.get("attn_output_gate") else 0  # Qwen3-Next and later: a gate as wide as the queries
    weights = hidden * head * (2 * heads + 2 * kv_heads) + hidden * gate
    qk_norm = str(text.get("model_type", "")).startswith(("qwen3", "minimax", "gemma3", "olmo"))

    def soft(kind: str, count: int, window: int = 0) -> Attention:
        pair = 2.0 * head
        kernels = _KERNELS_ATTENTION + qk_norm + bool(gate)
        return Attention(kind, count, weights, 2.0 * kv_heads * head, heads, kv_heads, pair, pair, kernels, window)

    kinds = _layer_kinds(text, layers)
    window = int(text.get("sliding_window") or text.get("attention_chunk_size") or 0)
    groups = []
    if kinds.count("full"):
        groups.append(soft("full", kinds.count("full")))
    if kinds.count("window"):
        groups.append(soft("window", kinds.count("window"), window))
    if kinds.count("linear"):
        groups.append(_linear(text, hidden, kinds.count("linear"), heads, head))
    return tuple(groups)


def _layer_kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """``full``, ``window`` or ``linear`` per layer, from whichever key this family writes."""
    window = int(text.get("sliding_window") or text.get("attention_chunk_size") or 0)
    listed = text.get("layer_types") or text.get("layers_block_type") or text.get("attn_type_list")
    if isinstance(listed, list) and len(listed) == layers:
        return [_kind(str(entry), window) for entry in listed]
    every = int(text.get("full_attention_interval") or 0)
    if every:
        return ["full" if (i + 1) % every == 0 else "linear" for i in range(layers)]
    pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 0)
    if window and pattern > 1:
        return ["full" if (i + 1) % pattern == 0 else "window" for i in range(layers)]
    if window and text.get("use_sliding_window", str(text.get("model_type", "")) in ("mistral", "mixtral", "phi3")):
        first = int(text.get("max_window_layers") or 0)
        return ["full" if i < first else "window" for i in range(layers)]
    return ["full"] * layers


def _kind(entry: str, window: int) -> str:
    if "linear" in entry or "mamba" in entry or entry == "0":  # MiniMax-Text-01 writes 0 for lightning attention
        return "linear"
    if ("sliding" in entry or "chunked" in entry) and window:
        return "window"
    return "full"


def _linear(text: Mapping[str, Any], hidden: int, layers: int, heads: int, head: int) -> Attention:
    keys = int(text.get("linear_num_key_heads") or heads) * int(text.get("linear_key_head_dim") or head)
    values = int(text.get("linear_num_value_heads") or heads) * int(text.get("linear_value_head_dim") or head)
    weights = hidden * (2 * keys + 2 * values) + values * hidden  # queries, keys, values, gate; output
    state = 2.0 * values * int(text.get("linear_key_head_dim") or head)  # kept in 32 bits: two 16-bit elements
    return Attention("linear", layers, weights, 0.0, heads, heads, 0.0, 0.0, _KERNELS_LINEAR, 0, state)


def _mla(text: Mapping[str, Any], hidden: int, layers: int, heads: int) -> Attention:
    """DeepSeek-V2, section 2.1: the cache holds one latent and one rotary key per token, copied on every TP rank."""
    latent, rope = int(text["kv_lora_rank"]), int(text.get("qk_rope_head_dim", 64))
    nope, value = int(text.get("qk_nope_head_dim", 128)), int(text.get("v_head_dim", 128))
    q_latent = int(text.get("q_lora_rank") or 0)
    queries = q_latent * (hidden + heads * (nope + rope)) if q_latent else hidden * heads * (nope + rope)
    weights = queries + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    top = int(text.get("index_topk") or 0)
    index_heads, index_dim = int(text.get("index_n_heads") or 0), int(text.get("index_head_dim") or 0)
    if top:
        weights += (q_latent or hidden) * index_heads * index_dim + hidden * (index_dim + index_heads)
    return Attention(
        kind="dsa" if top else "mla",
        layers=layers,
        weights=float(weights),
        cache=float(latent + rope) + (index_dim / 2 if top else 0.0),  # the indexer's keys are fp8
        heads=heads,
        kv_heads=1,
        pair=float(2 * latent + rope if top else nope + rope + value),  # sparse attention prefills in latent space too
        decode_pair=float(2 * latent + rope),
        kernels=_KERNELS_MLA + (_KERNELS_INDEXER if top else 0),
        window=top,
        scan=index_dim / 2 if top else 0.0,
        scan_pair=float(index_heads * index_dim) if top else 0.0,
    )


def _feed_forward(text: Mapping[str, Any], hidden: int, layers: int, where: str) -> tuple[FeedForward, ...]:
    experts = _most(text, "n_routed_experts", "num_local_experts", "num_experts")
    two = ("gpt2", "gpt_neox", "opt", "falcon", "phi", "gpt_bigcode", "starcoder2")
    matrices = 2 if str(text.get("model_type", "")) in two else 3
    if experts < 2:
        inner = _int(text, where, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
        return (FeedForward(layers, float(matrices * hidden * inner), kernels=_KERNELS_DENSE),)
    inner = _most(text, "moe_intermediate_size", "intermediate_size")
    top_k = _most(text, "num_experts_per_tok", "moe_topk", "num_experts_per_token")
    if inner < 1 or top_k < 1:
        raise _unknown("a mixture of experts without moe_intermediate_size or num_experts_per_tok", where)
    shared = _most(text, "shared_expert_intermediate_size") or inner * _most(
        text, "n_shared_experts", "num_shared_expert"
    )
    step = max(int(text.get("decoder_sparse_step") or text.get("interleave_moe_layer_step") or 1), 1)
    listed = text.get("mlp_only_layers") or ()
    first = int(text.get("first_k_dense_replace") or 0)
    sparse = [i for i in range(first, layers) if (i + 1) % step == 0 and i not in listed]
    groups = []
    if len(sparse) < layers:
        dense = int(text.get("intermediate_size_mlp") or text.get("intermediate_size") or inner)
        groups.append(FeedForward(layers - len(sparse), float(3 * hidden * dense), kernels=_KERNELS_DENSE))
    kernels = _KERNELS_EXPERTS + (_KERNELS_SHARED if shared else 0)
    routing = float(hidden * experts + 3 * hidden * shared)
    groups.append(FeedForward(len(sparse), routing, experts, top_k, float(3 * hidden * inner), kernels))
    return tuple(groups)


def _int(text: Mapping[str, Any], where: str, *keys: str) -> int:
    for key in keys:
        if isinstance(text.get(key), int) and text[key] > 0:
            return int(text[key])
    raise _unknown(f"config.json has no {' or '.join(keys)}", where)


def _most(text: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that says something, the most of any layer where it lists them; else 0."""
    value = next((text[key] for key in keys if text.get(key)), 0)
    return int(max(value) if isinstance(value, list) else value)


def _unknown(what: str, where: str) -> UsageError:
    return UsageError(
        f"the analytic model does not know this architecture: {what}",
        where=where,
        fix="The study runs without the model",
    )
