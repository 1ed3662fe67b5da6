"""What a serving config means to the model: its flags under vLLM's names, with the engine's defaults where absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuner.search.hardware import Hardware
from tuner.search.model import precision as precisions
from tuner.search.model.precision import Precision
from tuner.search.model.shape import ModelShape
from tuner.space.config import ServingConfig, Value, number
from tuner.space.space import ATTENTION, DATA, PIPELINE, SHARED, TENSOR

_GIB = 2**30
EXPERT = ("ep-size", "expert-parallel-size", "ep")  # as SGLang names it
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # GiB of KV cache of a server on a CPU
# Chance that one draft token is accepted, before anything was measured. n-gram prompts hit rarely outside of
# summaries and code edits; draft models and EAGLE heads: the ranges of Leviathan et al. 2023 (table 3) and Li et al.
# 2024 (EAGLE, table 1); MTP: the 85 to 90 % of the second token in the DeepSeek-V3 report, section 5.4.3.
_ACCEPTANCE: Mapping[str, float] = {"ngram": 0.25, "suffix": 0.3, "draft_model": 0.65, "eagle": 0.7, "mtp": 0.8}


@dataclass(frozen=True, slots=True)
class Speculation:
    """``tokens`` drafted per step by ``method``, each accepted with chance ``acceptance``; ``length`` is the mean
    number of tokens a step yields where the config states it (synthetic acceptance), else 0."""

    method: str
    tokens: int
    acceptance: float
    model: str = ""
    length: float = 0.0

    @property
    def per_step(self) -> float:
        """Tokens one step yields: (1 - a^(k+1)) / (1 - a), Leviathan et al. 2023, equation 1."""
        if self.length:
            return self.length
        a = self.acceptance
        return self.tokens + 1.0 if a >= 1 else (1 - a ** (self.tokens + 1)) / (1 - a)


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's settings, every default resolved. ``tp`` GPUs share the attention of one of ``dp`` ranks; ``joint``:
    the ranks share the feed-forward blocks and the head (SGLang's DP attention), else each has its own (experts are
    spread over all ranks either way). ``prefill_first``: the scheduler stops decoding while there are
    prompts (SGLang's default), instead of mixing both in one step. ``refused`` is what the server does not take of its
    environment, in words."""

    tp: int
    pp: int
    dp: int
    expert_parallel: bool
    max_batched_tokens: int
    max_seqs: int
    block_size: int
    memory_share: float
    kv_bytes: float | None
    chunked_prefill: bool
    prefix_caching: bool
    eager: bool
    max_model_len: int
    precision: Precision
    speculation: Speculation | None = None
    prefill_first: bool = False
    engine: str = "vllm"
    refused: str = ""
    joint: bool = False

    @property
    def sharing(self) -> int:
        """Over how many ranks the feed-forward blocks and the head are spread."""
        return self.dp if self.joint else 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp


def ranks(flags: Mapping[str, Value | None]) -> int:
    """Data-parallel ranks; each has a KV cache of its own."""
    return max(_int(flags, 1, *ATTENTION), _int(flags, 1, *DATA))


def caches_prefixes(flags: Mapping[str, Value | None]) -> bool:
    """Whether the KV of prompts is kept for later ones that begin alike."""
    return _switch(flags, "prefix-caching") and "disable-radix-cache" not in flags


def of(config: ServingConfig, shape: ModelShape, hardware: Hardware, engine: str = "vllm") -> Settings:
    """The settings of ``config``. A flag whose value cannot be read counts as absent: the server, not the model,
    judges it."""
    flags = config.flags
    tp = _int(flags, 1, *TENSOR)
    pp = _int(flags, 1, *PIPELINE)
    dp = ranks(flags)
    joint = dp > 1 and (SHARED in flags or _int(flags, 1, *ATTENTION) > 1)
    if tp * pp * dp == 1 and shape.heads % max(config.gpus, 1) == 0:
        tp = max(config.gpus, 1)  # no flag that is known here says how they are used
    speculation = _speculation(flags)
    tokens, seqs = batch_defaults(hardware, tp * pp, engine)
    if engine == "sglang" and speculation:
        seqs = 48  # what SGLang lowers its default to (server_args.py)
    on_cpu = hardware.kind == "cpu"
    gib, refused = space_gib(config.env) if on_cpu and engine == "vllm" else (None, "")
    kv_bytes = _float(flags, 0, "kv-cache-memory-bytes") or (None if gib is None else float(gib) * _GIB)
    if joint and tp % dp:
        refused = f"{tp} GPUs cannot be split over {dp} ranks of DP attention (tp-size)"
    model_len = _int(flags, shape.max_model_len, "max-model-len", "context-length")
    batched = _int(flags, max(tokens, 0), "max-num-batched-tokens", "chunked-prefill-size")
    most = _int(flags, seqs, "max-num-seqs", "max-running-requests")
    named = most if "max-running-requests" in flags else None
    usual = memory_default(hardware, batched, engine, tp * pp, dp if joint else 1, named, shape.latent)
    share = _float(flags, usual, "gpu-memory-utilization", "mem-fraction-static")
    if joint:  # SGLang divides what it is told by the ranks, and takes its own default of sequences for each
        tp, batched = max(tp // dp, 1), max(batched // dp, 1)
        most = seqs if "max-running-requests" not in flags else max(most // dp, 1)
    chunked = _switch(flags, "chunked-prefill")
    return Settings(
        tp=tp,
        pp=pp,
        dp=dp,
        expert_parallel="enable-expert-parallel" in flags or _int(flags, 1, *EXPERT) > 1,
        max_batched_tokens=batched if chunked else max(batched, model_len),
        max_seqs=most,
        block_size=_int(flags, 128 if on_cpu else 16, "block-size", "page-size"),
        memory_share=share,
        kv_bytes=kv_bytes,
        chunked_prefill=chunked,
        prefix_caching=caches_prefixes(flags),
        eager="enforce-eager" in flags or "disable-cuda-graph" in flags,
        max_model_len=model_len,
        precision=precision_of(config, shape),
        speculation=speculation,
        prefill_first=engine == "sglang" and "enable-mixed-chunk" not in flags,
        engine=engine,
        refused=refused,
        joint=joint,
    )


def space_gib(env: Mapping[str, str]) -> tuple[int | None, str]:
    """vLLM's room for the KV cache on CPUs, as vLLM reads it; or in words why it cannot."""
    try:
        return (int(env[KV_SPACE]) if KV_SPACE in env else None), ""
    except ValueError:
        return None, f"{KV_SPACE} is {env[KV_SPACE]!r}: vLLM takes a whole number of GiB"


def batch_defaults(hardware: Hardware, world_size: int, engine: str = "vllm") -> tuple[int, int]:
    """Default token and sequence budget of a step: vLLM's ``get_batch_defaults`` for its API server; SGLang's chunk and
    the least of requests that it allows by itself (2048 to 4096, by the size of the cache)."""
    gib = hardware.memory_bytes / _GIB
    if hardware.kind == "cpu":
        return 2048 * world_size, 128 * world_size
    if engine == "sglang":
        return (16384 if gib >= 160 else 8192 if gib >= 60 else 4096 if gib >= 20 else 2048), 2048
    if gib >= 160:
        return 16384, 1024
    if gib >= 70 and "A100" not in hardware.name:
        return 8192, 1024
    return 2048, 256


def memory_default(
    hardware: Hardware,
    batched_tokens: int,
    engine: str = "vllm",
    gpus: int = 1,
    ranks: int = 1,
    most: int | None = None,
    latent: bool = False,
) -> float:
    """Default share of memory for weights and cache: vLLM 0.92 (0.32; 0.9 in older ones), all of its own use
    included. SGLang (0.5.23, ``memory_hook.py``) leaves outside what it expects activations and graphs to take, and
    much more where ``ranks`` of DP attention share the ``gpus`` of a replica. ``most``: requests at once, where the
    flags say so; ``latent``: MLA."""
    if engine != "sglang":
        return 0.92
    mib = hardware.memory_bytes / 2**20
    sizes = ((20, 8, 8), (35, 48, 160), (60, 32, 160), (160, 256, 512), (math.inf, 512, 512))  # GiB, on < 4 GPUs, on 4
    few, many = next((few, many) for gib, few, many in sizes if mib < gib * 1024)
    batch = min(few if gpus < 4 else many, most or many)  # of the largest decode graph
    kept = 512 + 1.5 * max(batched_tokens, 2048) + 128 * gpus + 2 * batch + (1536 if latent else 480)
    if ranks > 1:
        kept += batch * ranks * (4.5 if batch > 300 else 3)
    kept = max(kept, 10 * 1024) if mib > 60 * 1024 else kept
    return round(max(1 - kept / mib, 0.0), 3)


def precision_of(config: ServingConfig, shape: ModelShape) -> Precision:
    """The precision the server runs: the checkpoint's own, its variant's, or ``--quantization`` applied to it."""
    result = shape.precision
    variant = precisions.method_of(config.model_variant)
    flag = precisions.method_of(str(config.flags.get("quantization") or ""))
    if variant:
        result = precisions.apply(result, variant)
    elif flag and not result.quantized:
        result = precisions.apply(result, flag)
    dtype = str(config.flags.get("dtype") or "auto")
    wide = 32.0 if dtype in ("float32", "float") else 16.0 if dtype != "auto" else None
    if wide:
        scale = {16.0: "bf16", 32.0: "fp32"}
        dense = result.linear_bits >= 16
        result = replace(
            result,
            linear_bits=wide if dense else result.linear_bits,
            expert_bits=wide if result.expert_bits >= 16 else result.expert_bits,
            embedding_bits=wide,
            compute=scale[wide] if dense else result.compute,
            expert_compute=scale[wide] if result.expert_bits >= 16 else result.expert_compute,
        )
    asked = shape.precision.kv_bits  # a checkpoint may ask for an fp8 cache
    own = asked if asked < 16 else wide or min(asked, result.embedding_bits)
    return replace(result, kv_bits=precisions.kv_bits(str(config.flags.get("kv-cache-dtype") or "auto"), own))


def _speculation(flags: Mapping[str, Value | None]) -> Speculation | None:
    if algorithm := str(flags.get("speculative-algorithm") or "").lower():
        return _of_sglang(algorithm, flags)
    raw = flags.get("speculative-config")
    try:
        body: Any = json.loads(str(raw)) if raw else None
    except ValueError:
        return None
    if not isinstance(body, Mapping):
        return None
    tokens = int(number(body.get("num_speculative_tokens")) or 1)
    name = str(body.get("method") or ("draft_model" if body.get("model") else "ngram"))
    method = "mtp" if "mtp" in name else "eagle" if "eagle" in name else "ngram" if "ngram" in name else name
    rates = body.get("synthetic_acceptance_rates")
    length = float(body.get("synthetic_acceptance_length") or (1 + sum(rates) if isinstance(rates, list) else 0))
    return Speculation(method, tokens, _ACCEPTANCE.get(method, 0.5), str(body.get("model") or ""), length)


def _of_sglang(algorithm: str, flags: Mapping[str, Value | None]) -> Speculation:
    """SGLang's flags (docs, "Speculative Decoding"): its draft tokens count the verified one that they begin with, so
    that a chain of s steps has s + 1."""
    methods = {"nextn": "mtp", "standalone": "draft_model"}
    method = next((name for name in ("eagle", "ngram") if name in algorithm), methods.get(algorithm, algorithm))
    steps = _int(flags, 3, "speculative-num-steps")
    tokens = max(_int(flags, steps + 1, "speculative-num-draft-tokens") - 1, 1)
    model = flags.get("speculative-draft-model-path") or flags.get("speculative-draft-model") or ""
    return Speculation(method, tokens, _ACCEPTANCE.get(method, 0.5), str(model))


def _int(flags: Mapping[str, Value | None], default: int, *names: str) -> int:
    return int(_float(flags, default, *names))


def _float(flags: Mapping[str, Value | None], default: float, *names: str) -> float:
    for name in names:
        found = number(flags.get(name))
        if found is not None and found > 0:
            return found
    return default


def _switch(flags: Mapping[str, Value | None], name: str) -> bool:
    return f"no-enable-{name}" not in flags and str(flags.get(f"enable-{name}")).lower() != "false"
