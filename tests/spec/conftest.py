import json

import pytest


@pytest.fixture
def workplace(tmp_path):
    """A folder with a model folder and a trace, as a user has them."""
    (tmp_path / "model").mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rows = [f"2023-11-16 18:15:{i % 60:02}.0000000,{100 + i},{10 + i % 7}" for i in range(60)]
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return tmp_path
