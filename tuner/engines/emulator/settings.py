"""What one server was told: vLLM's defaults and its flags resolved, or vLLM's refusal of the combination."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.engines.emulator.hardware import GIB, Gpu
from tuner.engines.emulator.shape import Shape, read_shape
from tuner.space.config import readable


class Refused(ValueError):
    """vLLM would refuse this combination while it reads its configuration; the text is vLLM's."""

    def __init__(self, text: str, where: str = "VllmConfig") -> None:
        super().__init__(text)
        self.where = where


@dataclass(frozen=True, slots=True)
class Draft:
    """Speculation: ``tokens`` drafted per step, each accepted with probability ``accept`` given the one before;
    ``proposes`` is the share of steps in which there is a draft at all (n-gram lookup); ``cost`` is a draft token's
    cost as a share of the target's weights."""

    method: str
    tokens: int
    accept: float
    proposes: float = 1.0
    cost: float = 0.0


# What the emulator assumes of a speculation method where the study states no acceptance of its own.
DRAFTS = {
    "ngram": (0.62, 0.35, 0.0),
    "suffix": (0.66, 0.45, 0.0),
    "draft_model": (0.70, 1.0, 0.08),
    "eagle": (0.68, 1.0, 0.035),
    "eagle3": (0.76, 1.0, 0.035),
    "mtp": (0.80, 1.0, 0.03),
    "medusa": (0.58, 1.0, 0.02),
}
# Quantization: bits of a weight, bits of an operand in the GEMM.
SCHEMES = {
    "": (16, 16),
    "fp8": (8, 8),
    "w8a8": (8, 8),
    "compressed-tensors": (8, 8),
    "modelopt": (8, 8),
    "awq": (4, 16),
    "awq_marlin": (4, 16),
    "gptq": (4, 16),
    "gptq_marlin": (4, 16),
    "bitsandbytes": (4, 16),
    "mxfp4": (4, 16),
    "w8a16": (8, 16),
    "w4a8": (4, 8),
    "nvfp4": (4, 4),
    "modelopt_fp4": (4, 4),
}
KV_BITS = {"bfloat16": 16, "float16": 16, "nvfp4": 4, "int4_per_token_head": 4}


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's resolved configuration; lengths in tokens."""

    tp: int
    pp: int
    dp: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    block_size: int
    memory_share: float
    scheme: str
    weight_bits: int
    gemm_bits: int
    kv_dtype: str
    kv_bits: int
    eager: bool
    graph_tokens: int
    prefix_caching: bool
    chunked_prefill: bool
    long_prefill_tokens: int
    async_scheduling: bool
    priority: bool
    frontends: int
    draft: Draft | None = None
    kv_bytes: int = 0
    kv_blocks: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    def sharing(self, shape: Shape) -> int:
        """How many data-parallel ranks share the experts, and step together for it; 1 where each is a replica."""
        return self.dp if shape.experts else 1


def resolve(
    flags: Mapping[str, Any],
    shape: Shape,
    gpu: Gpu,
    gpus: int = 8,
    accept: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Settings for ``flags`` (without dashes) on ``gpus`` GPUs. ``accept`` overrides the speculation's acceptance;
    ``env`` is the server's environment (on a CPU, tensor parallelism needs threads bound by hand).

    Raises :class:`Refused` in vLLM's words, and ``ValueError`` for a value that is no number.
    """
    env = env or {}
    if str(flags.get("quantization") or "").removesuffix("_marlin") == shape.quant_method.removesuffix("_marlin"):
        flags = {name: value for name, value in flags.items() if name != "quantization"}  # it says so itself
    tp, pp, dp = (_int(flags, f"{kind}-parallel-size", 1) for kind in ("tensor", "pipeline", "data"))
    big = gpu.memory_bytes >= 70 * GIB and "A100" not in gpu.name
    batched = 2048 * tp * pp if gpu.is_cpu else 16384 if gpu.memory_bytes >= 160 * GIB else 8192 if big else 2048
    seqs = 128 * tp * pp if gpu.is_cpu else 1024 if big else 256
    if flags.get("performance-mode") == "throughput":
        batched, seqs = 2 * batched, 2 * seqs
    max_len = _length(flags.get("max-model-len"), shape.max_position)
    chunked = "no-enable-chunked-prefill" not in flags
    seqs_asked = "max-num-seqs" in flags
    seqs = _int(flags, "max-num-seqs", seqs)
    if "max-num-batched-tokens" in flags:
        batched = _int(flags, "max-num-batched-tokens", batched)
    elif not chunked:
        batched = max(batched, max_len)
    else:
        batched = max(batched, min(seqs, max_len)) if seqs_asked else batched
    if not seqs_asked:
        seqs = min(seqs, batched)
    kv_dtype = str(flags.get("kv-cache-dtype") or "auto")
    scheme = str(flags.get("quantization") or shape.quantization)
    weight_bits, gemm_bits = SCHEMES.get(scheme, (8, 8))
    if gemm_bits == 8 and not gpu.fp8 and scheme == "fp8":
        gemm_bits = 16  # weight-only through Marlin where there are no FP8 tensor cores
    eager = "enforce-eager" in flags
    draft = _draft(flags.get("speculative-config"), accept, shape)
    settings = Settings(
        tp=tp,
        pp=pp,
        dp=dp,
        max_model_len=max_len,
        max_num_batched_tokens=batched,
        max_num_seqs=seqs,
        block_size=_int(flags, "block-size", 128 if gpu.is_cpu else 64 if shape.mla else 16),
        memory_share=float(flags.get("gpu-memory-utilization") or 0.92),
        scheme=scheme,
        weight_bits=weight_bits,
        gemm_bits=gemm_bits,
        kv_dtype=kv_dtype,
        kv_bits=shape.kv_bits if kv_dtype == "auto" else KV_BITS.get(kv_dtype, 8),
        eager=eager,
        graph_tokens=0 if eager else min(seqs * 2 * (1 + (draft.tokens if draft else 0)), 512),
        prefix_caching="no-enable-prefix-caching" not in flags,
        chunked_prefill=chunked,
        long_prefill_tokens=_int(flags, "long-prefill-token-threshold", 0),
        async_scheduling="no-async-scheduling" not in flags and not gpu.is_cpu,
        priority=flags.get("scheduling-policy") == "priority",
        frontends=max(_int(flags, "api-server-count", dp), 1),
        draft=draft,
        kv_bytes=_length(flags.get("kv-cache-memory-bytes"), 0) or int(env.get("VLLM_CPU_KVCACHE_SPACE", 0)) * GIB,
        kv_blocks=_int(flags, "num-gpu-blocks-override", 0),
    )
    bound = env.get("VLLM_CPU_OMP_THREADS_BIND", "").count("|") + 1
    _check(settings, shape, gpu, bound if gpu.is_cpu else gpus, dict(flags))
    return settings


def _check(s: Settings, shape: Shape, gpu: Gpu, gpus: int, flags: Mapping[str, Any]) -> None:
    if s.max_model_len > shape.max_position and "max-model-len" in flags:
        raise Refused(
            f"User-specified max_model_len ({s.max_model_len}) is greater than the derived max_model_len "
            f"(max_position_embeddings={shape.max_position} or model_max_length=None in model's config.json). To allow "
            "overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.",
            "ModelConfig",
        )
    if flags.get("quantization") and shape.quantization and s.weight_bits != SCHEMES.get(shape.quantization, (8, 8))[0]:
        raise Refused(
            f"Quantization method specified in the model config ({shape.quantization}) does not match the quantization "
            f"method specified in the `quantization` argument ({s.scheme}).",
            "ModelConfig",
        )
    if not s.chunked_prefill and s.max_num_batched_tokens < s.max_model_len:
        raise Refused(
            f"max_num_batched_tokens ({s.max_num_batched_tokens}) is smaller than max_model_len ({s.max_model_len}). "
            "This effectively limits the maximum sequence length to max_num_batched_tokens and makes vLLM reject "
            "longer sequences. Please increase max_num_batched_tokens or decrease max_model_len.",
            "SchedulerConfig",
        )
    if s.max_num_batched_tokens < s.max_num_seqs:
        raise Refused(
            f"max_num_batched_tokens ({s.max_num_batched_tokens}) must be greater than or equal to max_num_seqs "
            f"({s.max_num_seqs}).",
            "SchedulerConfig",
        )
    if s.long_prefill_tokens > s.max_model_len:
        raise Refused(
            f"long_prefill_token_threshold ({s.long_prefill_tokens}) cannot be greater than the max_model_len "
            f"({s.max_model_len}).",
            "SchedulerConfig",
        )
    if shape.heads % s.tp:
        raise Refused(
            f"Total number of attention heads ({shape.heads}) must be divisible by tensor parallel size ({s.tp})."
        )
    if gpu.is_cpu and s.tp > gpus:
        raise Refused(f"Not enough allowed NUMA nodes to bind threads of {s.tp} local CPUWorkers.", "")
    if not gpu.is_cpu and s.gpus > gpus:
        raise Refused(
            f"World size ({s.gpus}) is larger than the number of available GPUs ({gpus}) in this node. If this is "
            "intentional and you are using multi-node, please set --nnodes.",
            "ParallelConfig",
        )
    step = 32 if gpu.is_cpu else 64 if shape.mla else 16
    if s.block_size % step:
        backend = "CPU_ATTN" if gpu.is_cpu else "FLASHMLA" if shape.mla else "FLASH_ATTN"
        raise Refused(f"No common block size for {s.block_size} ({backend}: [MultipleOf({step})]).", "")
    if gpu.is_cpu and flags.get("quantization") == "fp8":
        raise Refused("_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 3 argument(s).", "")
    if s.scheme in ("nvfp4", "modelopt_fp4") and 4 not in gpu.flops and not gpu.is_cpu and flags.get("quantization"):
        raise Refused(
            f"The quantization method {s.scheme} is not supported for the current GPU. Minimum capability: 100. "
            "Current capability: 90.",
        )


def _draft(text: Any, accept: float | None, shape: Shape) -> Draft | None:
    if not text:
        return None
    spec = json.loads(text) if isinstance(text, str) else dict(text)
    if not spec.get("method") and not spec.get("model"):
        raise Refused("num_speculative_tokens was provided but without speculative model.", "SpeculativeConfig")
    if not spec.get("num_speculative_tokens") and not str(spec.get("method")).endswith(("mtp", "suffix")):
        raise Refused(
            "num_speculative_tokens must be provided with speculative model unless the draft model config contains an "
            "n_predict parameter.",
            "SpeculativeConfig",
        )
    method = str(spec.get("method") or ("draft_model" if spec.get("model") else "ngram"))
    tokens = int(spec.get("num_speculative_tokens") or 3)
    family = method if method in DRAFTS else "mtp" if method.endswith("mtp") else "draft_model"
    rate, proposes, cost = DRAFTS[family]
    if family == "draft_model" and (Path(str(spec.get("model"))) / "config.json").is_file():
        cost = read_shape(spec["model"]).weight_bytes(16) / shape.weight_bytes(16)
    if spec.get("synthetic_acceptance_length"):
        rate, proposes = _rate_of_length(float(spec["synthetic_acceptance_length"]), tokens), 1.0
    elif spec.get("synthetic_acceptance_rates"):
        rates = [float(r) for r in spec["synthetic_acceptance_rates"]]
        rate, proposes = sum(rates) / len(rates), 1.0
    return Draft(method, tokens, rate if accept is None else accept, proposes, cost)


def _rate_of_length(length: float, tokens: int) -> float:
    """The acceptance per position at which a step yields ``length`` tokens on average (bisection)."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + sum(middle**i for i in range(1, tokens + 1)) < length else (low, middle)
    return low


def _int(flags: Mapping[str, Any], name: str, default: int) -> int:
    value = flags.get(name)
    return default if value is None else int(value)


def _length(value: Any, default: int) -> int:
    """vLLM's human-readable integers: ``4k``, ``4K`` (binary), ``-1`` or ``auto`` for the model's own."""
    if value in (None, "auto", "-1", -1):
        return default
    return int(readable(value))
