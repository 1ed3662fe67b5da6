"""The quality floor on a real vLLM: the same weights as they are, rounded to 8 bits, and rounded to 2 bits."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from tests import real
from tuner.engines.protocol import Site
from tuner.space.config import ServingConfig
from tuner.spec.facts import of_machine
from tuner.spec.objective import QualityFloor
from tuner.verify.quality import check, profile

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LAYERS = 2


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a Qwen3 with logits as unequal as a trained model's (standard deviation about 3)."""
    rng = np.random.default_rng(seed)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)

    found = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 3.0),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}self_attn.q_proj.weight": matrix(queries, hidden),
            f"{layer}self_attn.k_proj.weight": matrix(keys, hidden),
            f"{layer}self_attn.v_proj.weight": matrix(keys, hidden),
            f"{layer}self_attn.o_proj.weight": matrix(hidden, queries),
            f"{layer}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}mlp.down_proj.weight": matrix(hidden, inner),
        }
        found |= {f"{layer}self_attn.{name}_norm.weight": np.ones(head, np.float32) for name in "qk"}
        found |= {
            f"{layer}{name}_layernorm.weight": np.ones(hidden, np.float32) for name in ("input", "post_attention")
        }
    return found


def rounded(matrix: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric rounding to the nearest of ``2^bits - 1`` levels per row: what weight-only quantization does."""
    if matrix.ndim == 1:
        return matrix
    levels = 2 ** (bits - 1) - 1
    scale = np.abs(matrix).max(axis=1, keepdims=True) / levels
    return np.round(matrix / scale) * scale


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """model.safetensors in bfloat16 (a JSON header, then the bytes)."""
    header, parts, offset = {}, [], 0
    for name, tensor in tensors.items():
        raw = ((tensor.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        parts.append(raw)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Launches the model with its weights rounded to so many bits (0: as they are); returns (endpoint, stop)."""
    from tuner.engines.vllm import VllmEngine

    model = Path(real.model())
    engine = VllmEngine(python=real.vllm_of("cpu"), cache=tmp_path_factory.mktemp("cache"))
    base = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": LAYERS}
    tensors = weights(base)

    def launch(bits: int):
        folder = tmp_path_factory.mktemp(f"bits{bits}")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / name, folder / name)
        (folder / "config.json").write_text(json.dumps(base))
        save(folder, {name: rounded(t, bits) if bits else t for name, t in tensors.items()})
        flags = {"dtype": of_machine()["native_dtype"], "max-model-len": 1024, "enforce-eager": None}
        config = ServingConfig(str(folder), {}, flags, {"VLLM_CPU_KVCACHE_SPACE": "1"}, gpus=0)
        site = Site(tmp_path_factory.mktemp("site"), (), threading.Event(), lambda _name, _data: None)
        return engine.launch(config, site)

    return launch


def test_eight_bits_are_accepted_and_two_bits_are_refused_with_the_figure(server):
    floor = QualityFloor(kl_max=0.1, top1_min=0.8)
    running = server(0)
    try:
        base = profile(running.endpoint, seed=1, count=6, drawn=32, greedy=16)
    finally:
        running.stop()
    assert base.noise["kl"] < 0.01 and base.noise["top1"] > 0.97  # the server agrees with itself
    results = {}
    for bits in (8, 2):
        running = server(bits)
        try:
            results[bits] = check(running.endpoint, base, floor)
        finally:
            running.stop()
    print({bits: (r.kl, r.covered, r.kl_drawn, r.kl_drawn_error, r.top1, r.greedy) for bits, r in results.items()})
    assert (results[8].verdict, results[2].verdict) == ("passed", "failed")
    assert "nats per token" in results[2].reason or "most probable token" in results[2].reason
    assert results[2].kl > 10 * results[8].kl
