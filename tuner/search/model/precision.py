"""In how many bits a model's parts are kept and in which format its matrix products run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits per weight (scales included) of the linear layers, of the routed experts and of embeddings and head;
    ``compute`` is the format of the linear layers' products (``bf16``, ``fp8``, ``int8``, ``fp4``), ``expert_compute``
    that of the experts'. ``act_quant`` says that activations are quantized at run time, which costs a kernel per
    product. ``kv_bits`` is the KV cache's."""

    linear_bits: float = 16.0
    expert_bits: float = 16.0
    embedding_bits: float = 16.0
    compute: str = "bf16"
    expert_compute: str = "bf16"
    act_quant: bool = False
    kv_bits: float = 16.0

    @property
    def quantized(self) -> bool:
        return self.linear_bits < 16 or self.expert_bits < 16


# Method -> (bits per weight with its scales, format of the products, activations quantized at run time).
# Group-wise 4 bit: one 16-bit scale (AWQ, GPTQ: and a 4-bit zero point) per 128 weights; MX and NV formats: one 8-bit
# scale per 32 (OCP Microscaling 1.0) or per 16 weights; bitsandbytes NF4: one 32-bit scale per 64.
_METHODS: Mapping[str, tuple[float, str, bool]] = {
    "fp8": (8.0, "fp8", True),
    "int8": (8.0, "int8", True),
    "w8a16": (8.125, "bf16", False),
    "w4a16": (4.16, "bf16", False),
    "w4a8": (4.16, "fp8", True),
    "mxfp4": (4.25, "fp4", False),
    "nvfp4": (4.5, "fp4", True),
    "mxfp8": (8.25, "fp8", True),
    "bnb4": (4.5, "bf16", False),
}
_NAMES: tuple[tuple[str, str], ...] = (  # the first that is found in the method's, the flag's or the variant's name
    (r"nvfp4|modelopt_fp4|fp4a", "nvfp4"),
    (r"mxfp4|mx_fp4", "mxfp4"),
    (r"mxfp8", "mxfp8"),
    (r"w4a8", "w4a8"),
    (r"bitsandbytes|bnb|nf4", "bnb4"),
    (r"w8a16|gptq[-_]?8|int8[-_]wo|weight[-_]only[-_]int8", "w8a16"),
    (r"w8a8[-_]?fp8|fp8|fbgemm", "fp8"),
    (r"w8a8|int8|smoothquant", "int8"),
    (r"awq|gptq|w4a16|int4|4[-_]?bit|marlin|auto[-_]?round|hqq", "w4a16"),
)


def method_of(name: str) -> str:
    """The scheme that ``name`` (a ``--quantization`` value, a ``quant_method``, a variant's folder) stands for; empty
    where it names none."""
    return next((method for pattern, method in _NAMES if re.search(pattern, name.lower())), "")


def apply(base: Precision, method: str, *, experts_only: bool = False) -> Precision:
    """``base`` with the weights in ``method`` (a key of the table above); the head and the embeddings stay as they
    are, as in every quantizer that vLLM loads by default."""
    bits, compute, act_quant = _METHODS[method]
    precision = replace(base, expert_bits=bits, expert_compute=compute)
    if experts_only:
        return precision
    return replace(precision, linear_bits=bits, compute=compute, act_quant=act_quant)


def from_config(config: Mapping[str, Any]) -> Precision:
    """The precision a checkpoint is served in: what its ``quantization_config`` says, else 16 bits, also where it comes
    in 32 (``--dtype auto`` of vLLM and SGLang: "FP16 precision for FP32 and FP16 models")."""
    base, quant = Precision(), _said(config)
    if not quant:
        return base
    if "fp8" in str(quant.get("kv_cache_quant_algo") or "").lower() or quant.get("kv_cache_scheme"):
        base = replace(base, kv_bits=8.0)  # vLLM follows the checkpoint where --kv-cache-dtype is auto
    method, algo = str(quant.get("quant_method", "")), str(quant.get("quant_algo", ""))
    if "mixed" in algo.lower():  # modelopt: each layer with its own
        if not (layers := quant.get("quantized_layers")):
            raise ValueError(f"{algo} without quantized_layers")
        return _mixed(base, layers)
    if method == "mxfp4":  # gpt-oss: the experts alone
        return apply(base, "mxfp4", experts_only=True)
    scheme = _compressed(quant) if method == "compressed-tensors" else ""
    scheme = scheme or method_of(algo) or _by_bits(quant, method) or method_of(method)
    if not scheme:
        return base
    return apply(base, scheme)


def _mixed(base: Precision, layers: Mapping[str, Any]) -> Precision:
    """Routed experts and the other linear layers each in the mean of the bits of those listed, and in the arithmetic of
    most of them; what lists none is left in 16 bits."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, layer in layers.items():
        parts[".experts" in name].append(method_of(str(layer.get("quant_algo"))))

    def of(methods: list[str]) -> tuple[float, str, bool]:
        known = [_METHODS.get(method, (16.0, "bf16", False)) for method in methods]
        most = Counter(known).most_common(1)[0][0]
        return (fmean(bits for bits, *_ in known), *most[1:])

    if parts[True]:
        bits, compute, _ = of(parts[True])
        base = replace(base, expert_bits=bits, expert_compute=compute)
    if parts[False]:
        bits, compute, act_quant = of(parts[False])
        base = replace(base, linear_bits=bits, compute=compute, act_quant=act_quant)
    return base


def named(config: Mapping[str, Any]) -> str:
    """What a checkpoint calls its quantization; empty where it has none."""
    return str(_said(config).get("quant_method") or "")


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config") or config
    quant = config.get("quantization_config") or text.get("quantization_config")
    return quant if isinstance(quant, Mapping) else {}


def _by_bits(quant: Mapping[str, Any], method: str) -> str:
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round"):
        return "w8a16" if int(quant.get("bits", quant.get("w_bit", 4))) == 8 else "w4a16"
    return ""


def _compressed(quant: Mapping[str, Any]) -> str:
    groups = quant.get("config_groups") or {}
    group = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind = int(weights.get("num_bits", 16)), str(weights.get("type", "int"))
    if bits == 8:
        return "w8a16" if not inputs else "fp8" if kind == "float" else "int8"
    if bits == 4:
        if kind == "float":
            return "nvfp4" if int(weights.get("group_size") or 16) == 16 else "mxfp4"
        return "w4a8" if inputs else "w4a16"
    return ""


def kv_bits(flag: str, base: float = 16.0) -> float:
    """Bits of one KV element under ``--kv-cache-dtype``."""
    if flag in ("", "auto"):
        return base
    if "fp8" in flag or "int8" in flag:
        return 8.0
    if "fp4" in flag or "int4" in flag:
        return 4.5
    return 32.0 if "float32" in flag else 16.0
