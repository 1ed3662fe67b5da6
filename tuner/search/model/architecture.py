"""From a Hugging Face config.json to a :class:`ModelShape`: one reader for the keys that the families share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuner.errors import UsageError
from tuner.search.model import precision
from tuner.search.model.shape import Attention, FeedForward, ModelShape
from tuner.spec.facts import EXPERTS, mla

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

# Families of which this arithmetic is not true and whose keys do not give them away: no decoders, or with more weights
# than their sizes say.
_REFUSED = (
    *("encoder_decoder", "t5", "bert", "whisper", "bart", "clip", "mamba", "rwkv", "xlstm", "git", "moshi"),
    *("doge", "hrm", "jetmoe", "phi4"),  # Phi-4 itself is a phi3
)
# Keys by which a config.json says that its layers differ, or share, in a way that nothing below reads.
_DIFFER = re.compile(
    r"attn_layer_|expert_layer_|hybrid_|block_(types|configs)|per_layer|layer_overrides|moe_layers_enum"
    r"|moe_layer_frequency|residual_moe|use_residual$|auto_adjust_ff|altup|kv_shared|use_cla$|cross_(attention_)?layer"
    r"|(^|_)swa_|sliding_window_layers|global_(head_dim|key_value)|attention_other|compress_rat"
    r"|(?<!^q)(?<!^kv)_lora|type_vocab_size"  # an adapter that is always there; an encoder
)
# The same of layers that keep a state or a window, where no list says of every layer what it is.
_STATES = re.compile(
    r"mamba|(^|_)ssm|^conv_|lru_|recurrent|linear_attn_config|layer_group_size|full_attn_(?!mod$)|global_attn_every"
)
_FULL = ("full_attention", "attention", "indexed_attention", "1")  # MiniMax-Text-01 writes 1, and 0 for linear
# Two matrices, where others have a gate too (modeling_<family>.py of transformers).
_UNGATED = (
    *("gpt2", "gpt_neox", "gpt_neox_japanese", "gpt_bigcode", "opt", "biogpt", "falcon", "phi", "starcoder2"),
    *("nemotron", "arcee", "apertus", "persimmon", "fuyu", "jais2", "nanochat"),
)
_FOUR_TIMES = ("gpt2", "gpt_bigcode", "falcon")  # the hidden size, where config.json gives their MLPs none


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
    **{family: {"attn_output_gate": True} for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "afmoe")},
    "llama4_text": {"n_shared_experts": 1, "attention_chunk_size": 8192, "sliding_window_pattern": 4},
}


def shape_of(config: Mapping[str, Any], name: str = "", where: str = "") -> ModelShape:
    """Reads a config.json's content. Raises :class:`UsageError` for an architecture it does not know, with what is
    missing."""
    try:
        return _shape(config, name, where)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _unknown(f"config.json has what is not described here ({error})", where) from error


def _shape(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    text: Mapping[str, Any] = config.get("text_config") or config.get("llm_config") or config
    kind = str(text.get("model_type") or config.get("model_type") or "")
    tied = config.get("tie_word_embeddings", _ABSENT.get(kind, {}).get("tie_word_embeddings", False))
    text = {**_ABSENT.get(kind, {}), "tie_word_embeddings": tied, **text}
    if text.get("is_encoder_decoder") or any(kind.startswith(word) for word in _REFUSED):
        raise _unknown(f"{kind or 'this model'} is not a decoder of attention and feed-forward layers alone", where)
    searched = (_DIFFER,) if _listed(text) else (_DIFFER, _STATES)
    if strange := [key for key in text if text[key] and any(words.search(key) for words in searched)]:
        raise _unknown(f"config.json has {strange[0]}, so its layers are of kinds that are not described here", where)
    hidden = _int(text, where, "hidden_size", "n_embd", "d_model")
    layers = _int(text, where, "num_hidden_layers", "n_layer", "num_layers")
    heads = _int(text, where, "num_attention_heads", "n_head", "num_heads")
    vocab = _int(text, where, "vocab_size")
    grouped = ("num_kv_heads",) if text.get("new_decoder_architecture") else ()  # Falcon's, which has multi_query too
    kv_heads = _most(text, "num_key_value_heads", "multi_query_group_num", *grouped)
    kv_heads = kv_heads or (1 if text.get("multi_query") else heads)
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
        quant_method=precision.named(config),
    )


def _attention(
    text: Mapping[str, Any], hidden: int, layers: int, heads: int, kv_heads: int, where: str
) -> tuple[Attention, ...]:
    if int(text.get("full_attn_mod") or 1) != 1:  # Phi-4-mini's: of every so many layers one attends to everything
        raise ValueError(f"full_attn_mod: {text['full_attn_mod']}")
    kinds = _layer_kinds(text, layers)
    if mla(text):
        if other := set(kinds) - {"full"}:
            raise _unknown(f"latent attention beside {' and '.join(sorted(other))} layers", where)
        return (_mla(text, hidden, layers, heads),)
    head = _most(text, "head_dim") or hidden // heads
    if min(head, kv_heads) < 1:
        raise _unknown(f"{kv_heads} KV heads of {head} elements", where)
    if (values := _most(text, "v_head_dim") or head) != head:
        raise _unknown(f"keys of {head} elements and values of {values}", where)
    gate = heads * head if text.get("attn_output_gate") else 0  # Qwen3-Next and later: a gate as wide as the queries
    weights = hidden * head * (2 * heads + 2 * kv_heads) + hidden * gate
    qk_norm = str(text.get("model_type", "")).startswith(("qwen3", "minimax", "gemma3", "olmo"))

    def soft(kind: str, count: int, window: int = 0) -> Attention:
        pair = 2.0 * head
        kernels = _KERNELS_ATTENTION + qk_norm + bool(gate)
        cache = 2.0 * kv_heads * head
        return Attention(kind, count, weights, cache, heads, kv_heads, pair, pair, kernels, window, head_dim=head)

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
    if listed := _listed(text):
        return [_kind(str(entry), window) for entry in _of_each(listed, layers)]
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


def _listed(text: Mapping[str, Any]) -> list[Any]:
    return list(text.get("layer_types") or text.get("layers_block_type") or text.get("attn_type_list") or ())


def _of_each(listed: list[Any], layers: int) -> list[Any]:
    if len(listed) < layers:
        raise ValueError(f"{len(listed)} kinds of {layers} layers")
    return listed[:layers]


def _kind(entry: str, window: int) -> str:
    if entry in ("sliding_attention", "chunked_attention"):
        return "window" if window else "full"
    if entry in ("linear_attention", "0"):
        return "linear"
    if entry in _FULL:
        return "full"
    raise ValueError(f"a layer of kind {entry!r}")


def _linear(text: Mapping[str, Any], hidden: int, layers: int, heads: int, head: int) -> Attention:
    """Gated delta nets by their own sizes, MiniMax's lightning attention by those of its full layers."""
    sizes = [f"linear_{of}" for of in ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")]
    if not all(text.get(key) for key in sizes) and not str(text.get("model_type", "")).startswith("minimax"):
        raise ValueError(f"linear layers without {', '.join(key for key in sizes if not text.get(key))}")
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
        head_dim=nope + rope,
    )


def _feed_forward(text: Mapping[str, Any], hidden: int, layers: int, where: str) -> tuple[FeedForward, ...]:
    experts = _most(text, *EXPERTS)
    if experts < 2:
        if unread := [key for key in text if "expert" in key and isinstance(text[key], int) and text[key] > 1]:
            raise _unknown(f"config.json has {unread[0]} and no {' or '.join(EXPERTS)}", where)
        inner = _most(text, "shared_intermediate_size")  # Granite 4: its experts' shared part is all that there is
        keys = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
        if text.get("model_type") in _FOUR_TIMES and not any(text.get(key) for key in keys):
            inner = 4 * hidden
        inner = inner or _int(text, where, *keys)
        return (FeedForward(layers, float(_matrices(text, where) * hidden * inner), kernels=_KERNELS_DENSE),)
    inner = _most(text, "moe_intermediate_size", "intermediate_size")
    top_k = _most(text, "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k")
    if inner < 1 or top_k < 1:
        raise _unknown("a mixture of experts without moe_intermediate_size or num_experts_per_tok", where)
    if _matrices(text, where) != 3:
        raise _unknown("experts without a gate", where)
    shared = _most(text, "shared_expert_intermediate_size", "shared_intermediate_size") or inner * _most(
        text, "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"
    )
    sparse = _sparse(text, layers)
    groups = []
    if len(sparse) < layers:
        dense = _most(text, "intermediate_size_mlp", "dense_intermediate_size", "intermediate_size") or inner
        groups.append(FeedForward(layers - len(sparse), float(3 * hidden * dense), kernels=_KERNELS_DENSE))
    kernels = _KERNELS_EXPERTS + (_KERNELS_SHARED if shared else 0)
    routing = float(hidden * experts + 3 * hidden * shared)
    groups.append(FeedForward(len(sparse), routing, experts, top_k, float(3 * hidden * inner), kernels))
    return tuple(groups)


def _matrices(text: Mapping[str, Any], where: str) -> int:
    """How many matrices an MLP has: whether it has a gate is the family's affair."""
    family, act = str(text.get("model_type", "")), str(text.get("hidden_act", ""))
    if family in _UNGATED:
        return 2
    if act in ("relu2", "xielu") and family != "bitnet":
        raise _unknown(f"whether an MLP with {act} has a gate, of a model of the type {family!r}", where)
    return 3


def _sparse(text: Mapping[str, Any], layers: int) -> list[int]:
    """The layers that have experts, from whichever keys this family writes."""
    if kinds := text.get("mlp_layer_types"):
        return [i for i, kind in enumerate(_of_each(list(kinds), layers)) if kind != "dense"]
    if listed := text.get("moe_layers"):
        return [i for i in listed if i < layers]
    if text.get("moe_layer_freq") not in (None, 1):
        raise ValueError(f"moe_layer_freq: {text['moe_layer_freq']}")
    step = max(_most(text, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"), 1)
    first = _most(text, "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "moe_layer_num_skipped")
    last = int(text.get("moe_layer_end_index") or -1)
    dense = text.get("mlp_only_layers") or ()
    within = range(max(first, 0), layers if last < 0 else min(last + 1, layers))
    return [i for i in within if (i + 1) % step == 0 and i not in dense]


def _int(text: Mapping[str, Any], where: str, *keys: str) -> int:
    for key in keys:
        if isinstance(text.get(key), int) and text[key] > 0:
            return int(text[key])
    raise _unknown(f"config.json has no {' or '.join(keys)}", where)


def _most(text: Mapping[str, Any], *keys: str) -> int:
    """The number of the first of ``keys`` that says something, also where it is listed for every layer; else 0. Raises
    ValueError where such a list has several: the layers differ."""
    value = next((text[key] for key in keys if text.get(key)), 0)
    if isinstance(value, list) and len(set(value)) > 1:
        raise ValueError(f"layers of {' and '.join(str(n) for n in sorted(set(value)))}")
    return int(value[0] if isinstance(value, list) else value)


def _unknown(what: str, where: str) -> UsageError:
    return UsageError(
        f"tuner does not know this architecture: {what}",
        where=where,
        fix="The study runs without the model",
    )
