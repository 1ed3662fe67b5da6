"""Writes what llama.cpp serves of a model folder: GGUF files with random weights, beside its config.json.

    python examples/make_model.py models/tiny-qwen3
    python examples/make_gguf.py models/tiny-qwen3    # model-f16.gguf, model-q8_0.gguf, model-q4_0.gguf

Needs the package ``gguf``. The folder is one that make_model.py made (Qwen3's architecture, byte-level BPE). Random
weights are honest for speed and say nothing about answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("f16", "q8_0", "q4_0")}


def main(folder: Path) -> None:
    """One file per type, all of the same weights."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for name, kind in TYPES.items():
        file = folder / f"model-{name}.gguf"
        writer = gguf.GGUFWriter(file, "qwen3")
        _describe(writer, config, tokenizer)
        for tensor, values in _weights(config):
            matrix = values.ndim == 2
            data = gguf.quantize(values, kind) if matrix else values
            writer.add_tensor(tensor, data, raw_dtype=kind if matrix else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        print(f"{file}: {file.stat().st_size / 2**20:.0f} MiB", file=sys.stderr)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    writer.add_name("random")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([control if number in special else normal for number in range(len(vocabulary))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _weights(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.02).astype(np.float32)

    yield "token_embd.weight", matrix(config["vocab_size"], hidden)
    yield "output_norm.weight", np.ones(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        yield "output.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            *(("attn_q", queries, hidden), ("attn_k", keys, hidden), ("attn_v", keys, hidden)),
            *(("attn_output", hidden, queries), ("ffn_gate", wide, hidden), ("ffn_up", wide, hidden)),
            ("ffn_down", hidden, wide),
        ):
            yield f"blk.{layer}.{name}.weight", matrix(rows, columns)
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", head), ("attn_k_norm", head)):
            yield f"blk.{layer}.{name}.weight", np.ones(size, np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("models/tiny-qwen3"))
    main(parser.parse_args().folder)
