"""Makes a small model folder that a real vLLM serves with random weights: Qwen3's architecture, a tokenizer trained
here.

    python examples/make_model.py models/tiny-qwen3
    python examples/make_model.py --like qwen3-8b models/qwen3-8b

Nothing is downloaded. The weights do not exist: servers are started with --load-format dummy, which is honest for speed
and says nothing about answers (nor about how many drafted tokens are accepted).
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

VOCABULARY = 8192
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LIKE = {
    "tiny-qwen3": {},
    "qwen3-8b": {  # the published config.json of Qwen/Qwen3-8B
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
    },
    "qwen3-0.6b": {  # the published config.json of Qwen/Qwen3-0.6B: a draft model for the one above
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def main(folder: Path, like: str) -> None:
    """Trains the tokenizer on Python's own standard library and writes the three files vLLM wants.

    The tokenizer of a larger model is filled up to its vocabulary with words that no text is ever split into: prompts
    are token ids, and each token of an answer has a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    config = {**CONFIG, **LIKE[like]}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in texts], trainer)
    tokenizer = Tokenizer.from_str(_filled(json.loads(tokenizer.to_str()), config["vocab_size"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens, {config['num_hidden_layers']} layers", file=sys.stderr)


def _filled(document: dict[str, Any], size: int) -> str:
    """A byte-level BPE tokenizer's file with ``size`` words, those that it lacks made up."""
    words = document["model"]["vocab"]
    words.update({f"\u0120~{number:x}": number for number in range(len(words), size)})  # U+0120: a space
    return json.dumps(document)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("models/tiny-qwen3"))
    parser.add_argument("--like", choices=sorted(LIKE), default="tiny-qwen3")
    given = parser.parse_args()
    main(given.folder, given.like)
