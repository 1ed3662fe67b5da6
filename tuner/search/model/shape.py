"""A model's shape: what its config.json says about weights, KV cache and arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.search.model.precision import Precision


@dataclass(frozen=True, slots=True)
class Attention:
    """``layers`` layers with one kind of token mixing; all figures are per layer and for the whole model.

    ``kind``: ``full``, ``window`` (sliding or chunked), ``mla`` (DeepSeek's latent attention), ``dsa`` (MLA with a
    learned sparse selection), ``linear`` (gated delta net, lightning attention: a state, no KV cache).
    ``weights`` counts parameters; ``cache`` elements kept per token; ``state`` elements kept per sequence; ``window``
    the tokens attended to at most (0: all). A pair of query and key costs ``2 x heads x pair`` operations; MLA decodes
    in its latent space, where a pair is dearer (``decode_pair``). ``kv_heads`` bounds how far TP can split the cache
    (1 where every rank keeps a copy). ``kernels`` is how many kernels one layer launches; ``head_dim`` the elements of
    one head's key.
    """

    kind: str
    layers: int
    weights: float
    cache: float
    heads: int
    kv_heads: int
    pair: float
    decode_pair: float
    kernels: int
    window: int = 0
    state: float = 0.0
    scan: float = 0.0  # of ``cache``: elements that a sparse selection reads over the whole context (DSA's indexer)
    scan_pair: float = 0.0  # and its operations per pair, over two, all its heads together
    head_dim: int = 0


@dataclass(frozen=True, slots=True)
class FeedForward:
    """``layers`` layers of one kind of feed-forward block. Dense: ``weights`` parameters. Experts: ``experts`` of
    ``expert_weights`` parameters, ``top_k`` per token, and ``weights`` for router and shared experts."""

    layers: int
    weights: float
    experts: int = 0
    top_k: int = 0
    expert_weights: float = 0.0
    kernels: int = 5


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only language model. ``vocab`` x ``hidden`` is the embedding (shared with the head where ``tied``).
    ``heads`` and ``kv_heads`` of its full-attention layers bound tensor parallelism; ``quant_method`` is what the
    checkpoint calls its quantization."""

    name: str
    hidden: int
    vocab: int
    tied: bool
    attention: tuple[Attention, ...]
    ffn: tuple[FeedForward, ...]
    precision: Precision
    heads: int
    kv_heads: int
    max_model_len: int
    quant_method: str = ""

    @property
    def layers(self) -> int:
        return sum(a.layers for a in self.attention)

    @property
    def linear_weights(self) -> float:
        """Parameters of all linear layers but the routed experts and the head."""
        return self.linear_of_rank(1)

    def linear_of_rank(self, sharing: int) -> float:
        """:attr:`linear_weights`, of the feed-forward blocks' the part that one of ``sharing`` ranks has."""
        return sum(a.layers * a.weights for a in self.attention) + sum(f.layers * f.weights for f in self.ffn) / sharing

    @property
    def expert_weights(self) -> float:
        """Parameters of all routed experts."""
        return sum(f.layers * f.experts * f.expert_weights for f in self.ffn)

    @property
    def embedding_weights(self) -> float:
        return self.embedding_of_rank(1)

    def embedding_of_rank(self, sharing: int) -> float:
        """:attr:`embedding_weights`, of a head of its own the part that one of ``sharing`` ranks has."""
        return self.vocab * self.hidden * (1 if self.tied else 1 + 1 / sharing)

    @property
    def parameters(self) -> float:
        return self.linear_weights + self.expert_weights + self.embedding_weights

    @property
    def active(self) -> float:
        """Parameters a token passes through, the embedding table left out (a token reads one row of it)."""
        routed = sum(f.layers * f.top_k * f.expert_weights for f in self.ffn)
        return self.linear_weights + routed + self.vocab * self.hidden

    @property
    def latent(self) -> bool:
        """Whether attention keeps one latent vector per token (MLA, sparse or not)."""
        return any(a.kind in ("mla", "dsa") for a in self.attention)

    @property
    def has_experts(self) -> bool:
        return any(f.experts for f in self.ffn)

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes of all weights, one copy."""
        return (
            self.linear_weights * precision.linear_bits
            + self.expert_weights * precision.expert_bits
            + self.embedding_weights * precision.embedding_bits
        ) / 8

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelShape:
        """Reads ``path/config.json`` (or the file itself, or the local Hugging Face cache's where ``path`` is a model's
        id). Raises :class:`UsageError` where there is none, or where its architecture is not known (the search then
        works without a model)."""
        from tuner.search.model.architecture import shape_of
        from tuner.spec.facts import model_config

        file = Path(path) if str(path).endswith(".json") else Path(path) / "config.json"
        try:
            data: Any = model_config(str(path)) if not file.is_file() else json.loads(file.read_text(encoding="utf-8"))
            if not data:
                raise FileNotFoundError(file)
        except FileNotFoundError:
            raise UsageError(
                "there is no config.json to read the model's shape from",
                where=str(file),
                fix="Give the model's local folder, or study it without the analytic model",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"cannot read the model's config: {error}", where=str(file)) from None
        if not isinstance(data, dict):
            raise UsageError("the model's config is not a mapping", where=str(file))
        name = file.parent.name if file.name == "config.json" else file.stem
        return shape_of(data, name=name, where=str(file))
