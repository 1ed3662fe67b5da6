"""A model as sizes: what one layer computes, reads and keeps, from the ``ModelShape`` that its ``config.json`` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tuner.engines.modelfolder import local_model
from tuner.errors import UsageError
from tuner.search.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in elements. ``kv_elements`` is what one token keeps in one attention layer (K and V over all KV heads;
    with MLA one latent vector, which tensor parallelism does not divide). ``full_layers`` attend to everything,
    ``window_layers`` to the last ``window`` tokens, ``linear_layers`` keep a state of constant size. ``attention`` and
    ``dense_mlp`` are weights per layer (of several kinds of attention the mean), ``expert`` the weights of one expert,
    ``shared`` of the shared expert and router; ``dense_layers`` of the layers have no experts. ``embedding`` counts
    input and output embeddings that are stored; ``head`` the output projection. ``weight_bits`` is the stored width of
    the linear layers (of the experts where only they are quantized), ``kv_bits`` that of a KV cache whose type no flag
    says; ``quantization`` is a scheme of the emulator's table, ``quant_method`` what the checkpoint calls its own.
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
    quant_method: str = ""
    kv_bits: int = 16

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
        return self.linear_weights * _bytes(bits) + self.embedding * 2

    def expert_bytes(self, bits: int) -> float:
        """Those of them that are routed experts'."""
        return self.moe_layers * self.experts * self.expert * _bytes(bits)


def _bytes(bits: int) -> float:
    return bits / 8 * (1.0625 if bits <= 4 else 1.0)


def read_shape(model: str | Path) -> Shape:
    """The shape of ``model``, a folder or an id in the Hugging Face cache. Raises ``FileNotFoundError`` where there is
    none, ``UsageError`` where its sizes are not known."""
    folder = local_model(str(model))
    if folder is None:
        raise FileNotFoundError(model)
    try:
        return replace(shape_of(ModelShape.from_folder(folder)), name=Path(model).name)
    except UsageError as error:
        error.fix = error.fix and "It cannot be emulated (docs/model.md: which models can)"
        raise


def shape_of(model: ModelShape) -> Shape:
    """The emulator's sizes of ``model``."""
    layers = {"full": 0, "window": 0, "linear": 0, "mla": 0, "dsa": 0}
    for group in model.attention:
        layers[group.kind] += group.layers
    keeping = next((group for group in model.attention if group.kind != "linear"), model.attention[0])
    dense = next((block for block in model.ffn if not block.experts), None)
    moe = next((block for block in model.ffn if block.experts), None)
    scheme, bits = _stored(model)
    return Shape(
        name=model.name,
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=keeping.head_dim,
        vocab=model.vocab,
        max_position=model.max_model_len,
        attention=round(sum(group.layers * group.weights for group in model.attention) / model.layers),
        dense_mlp=int(dense.weights) if dense else 0,
        embedding=int(model.embedding_weights),
        head=model.vocab * model.hidden,
        kv_elements=round(keeping.cache),
        full_layers=layers["full"] + layers["mla"] + layers["dsa"],
        window_layers=layers["window"],
        linear_layers=layers["linear"],
        window=next((group.window for group in model.attention if group.kind == "window"), 0),
        experts=moe.experts if moe else 0,
        experts_per_token=moe.top_k if moe else 0,
        expert=int(moe.expert_weights) if moe else 0,
        shared=int(moe.weights) if moe else 0,
        dense_layers=dense.layers if dense else 0,
        mla=model.latent,
        weight_bits=bits,
        quantization=scheme,
        quant_method=model.quant_method,
        kv_bits=int(model.precision.kv_bits),
    )


def _stored(model: ModelShape) -> tuple[str, int]:
    """The checkpoint's own quantization, as vLLM's flag or the emulator calls it, and the bits of a weight (narrow
    formats' scales are counted elsewhere)."""
    precision, own = model.precision, model.quant_method
    if not precision.quantized:
        return "", 16
    bits, compute = int(precision.expert_bits), precision.expert_compute
    if bits == 8:
        return {"fp8": "fp8", "int8": "w8a8", "bf16": "w8a16"}[compute], bits
    if compute == "fp4":
        return ("nvfp4" if precision.act_quant else "mxfp4"), bits
    weights_alone = own if own in ("awq", "awq_marlin", "gptq", "bitsandbytes") else "gptq_marlin"
    return ("w4a8" if compute == "fp8" else weights_alone), bits
