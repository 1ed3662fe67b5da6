"""Will it fit? Weights, overheads and KV cache of one serving config against the memory of its GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tuner.study.outcome import Infeasible, Measured, Outcome

if TYPE_CHECKING:
    from tuner.search.hardware import Hardware
    from tuner.search.model.settings import Settings
    from tuner.search.model.shape import ModelShape
    from tuner.space.config import ServingConfig

_GIB = 2**30
_CONTEXT_BYTES = 0.9 * _GIB  # CUDA context, cuBLAS and NCCL workspaces of one process
_GRAPH_BYTES = 0.6 * _GIB  # captured CUDA graphs, default capture sizes
_GRAPH_BYTES_PER_LAYER = 0.012 * _GIB
_CPU_RUNTIME_BYTES = 2.5 * _GIB  # three Python processes with torch imported


@dataclass(frozen=True, slots=True)
class MemoryCorrection:
    """What the server's own logs taught about memory: ``overhead_bytes`` per GPU on top of the arithmetic (negative:
    it was too pessimistic), ``weights_share``: measured over predicted. ``seen`` counts launches."""

    overhead_bytes: float = 0.0
    weights_share: float = 1.0
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a config fits. ``kv_tokens`` is the room for the KV cache in tokens of one replica's data-parallel rank;
    ``short_bytes`` what is missing per GPU (0 where it fits); ``reason`` says so in words; ``parts`` are bytes per GPU:
    ``memory``, ``weights``, ``activations``, ``graphs``, ``context``, ``kv``, ``kv_asked`` (0: the server takes what is
    left), and ``kv_per_token``; ``kv_held`` is how many tokens a sequence holds at most."""

    fits: bool
    kv_tokens: float
    short_bytes: int = 0
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


def fits(
    shape: ModelShape,
    hardware: Hardware,
    config: ServingConfig,
    engine: str = "vllm",
    correction: MemoryCorrection | None = None,
    draft: ModelShape | None = None,
) -> Fit:
    """Memory arithmetic for ``config`` (its flags under the engine's names). Pure; microseconds. ``draft``: the shape
    of the draft model, where the config has one and it is known."""
    from tuner.search.model import settings

    return fits_settings(shape, hardware, settings.of(config, shape, hardware, engine), correction, draft)


def fits_settings(
    shape: ModelShape,
    hardware: Hardware,
    settings: Settings,
    correction: MemoryCorrection | None = None,
    draft: ModelShape | None = None,
) -> Fit:
    """:func:`fits` for settings that are resolved already."""
    impossible = _impossible(shape, settings)
    if impossible:
        return Fit(False, 0.0, 0, impossible)
    learned = correction or MemoryCorrection()
    parts = _parts(shape, hardware, settings, learned, draft)
    used = parts["weights"] + parts["activations"] + parts["graphs"] + parts["context"]
    per_token, fixed = parts["kv_per_token"], parts["kv_fixed"]
    sequence = parts["sequence"]
    room = parts["memory"] - used if settings.kv_bytes is None else settings.kv_bytes
    if settings.kv_bytes is not None:
        spare = parts["memory"] - used - settings.kv_bytes
        if spare < 0:
            name = "VLLM_CPU_KVCACHE_SPACE" if hardware.kind == "cpu" else "kv-cache-memory-bytes"
            return _short(-spare, parts, hardware, settings, f"the KV cache that {name} asks for")
    parts = {**parts, "kv": max(room, 0.0), "kv_asked": float(settings.kv_bytes or 0)}
    if room < sequence:
        what = "any KV cache" if room <= 0 else f"one sequence of {settings.max_model_len:,} tokens"
        return _short(sequence - room, parts, hardware, settings, what)
    blocks = (room - fixed * _resident(room, per_token, fixed, settings)) / max(per_token, 1e-9)
    tokens = blocks // settings.block_size * settings.block_size
    return Fit(True, max(tokens, 0.0), 0, "", parts)


def correct(fit: Fit, boot_facts: Mapping[str, float], learned: MemoryCorrection | None = None) -> MemoryCorrection:
    """What one launch teaches. ``fit`` is what had been predicted for it (with no correction), ``boot_facts`` what the
    server's log said: ``kv_cache_tokens`` or ``max_concurrency``, ``weights_bytes``. Averages over launches; facts that
    are absent change nothing, and a cache of the size that was asked for says nothing of what was left."""
    learned = learned or MemoryCorrection()
    n, known = learned.seen, dict(boot_facts)
    weights_share = known["weights_bytes"] / fit.parts["weights"] if _has(known, fit, "weights") else None
    per_token = fit.parts.get("kv_per_token", 0.0)
    overhead = None
    kv = known.get("kv_cache_tokens", 0.0) * per_token
    kv = kv or known.get("max_concurrency", 0.0) * fit.parts.get("sequence", 0.0)
    if kv > 0 and "memory" in fit.parts and not fit.parts.get("kv_asked"):
        weights = known.get("weights_bytes") or fit.parts["weights"]
        predicted = sum(fit.parts[part] for part in ("activations", "graphs", "context"))
        overhead = fit.parts["memory"] - weights - kv - predicted
    if overhead is None and weights_share is None:
        return learned
    return MemoryCorrection(
        overhead_bytes=_mean(learned.overhead_bytes, overhead, n),
        weights_share=_mean(learned.weights_share, weights_share, n),
        seen=n + 1,
    )


def learn(fit: Fit, outcome: Outcome, learned: MemoryCorrection | None = None) -> MemoryCorrection:
    """:func:`correct` from an outcome. A server that ran teaches by its log; one that failed for memory where the
    arithmetic said it fits raises the overhead by what was missing (``short_bytes``), or by a GiB where that is not
    known."""
    learned = learned or MemoryCorrection()
    if isinstance(outcome, (Measured, Infeasible)) and outcome.boot.facts:
        learned = correct(fit, outcome.boot.facts, learned)
    if isinstance(outcome, Infeasible) and outcome.cause.startswith("oom") and fit.fits:
        margin = fit.parts.get("kv", 0.0) - fit.parts.get("sequence", 0.0)
        missing = (outcome.short_bytes if outcome.short_bytes is not None else _GIB) + max(margin, 0.0)
        if outcome.cause == "oom-kv" or outcome.stage == "start-up":
            learned = replace(learned, overhead_bytes=max(learned.overhead_bytes, missing), seen=learned.seen + 1)
        else:  # under load: activations were underestimated, the start-up's arithmetic was not
            more = outcome.short_bytes if outcome.short_bytes is not None else _GIB
            learned = replace(learned, overhead_bytes=learned.overhead_bytes + more, seen=learned.seen + 1)
    return learned


def _parts(
    shape: ModelShape, hardware: Hardware, settings: Settings, learned: MemoryCorrection, draft: ModelShape | None
) -> dict[str, float]:
    p, ranks = settings.precision, settings.tp * settings.pp
    weights = (
        shape.linear_of_rank(settings.sharing) * p.linear_bits / 8 / ranks
        + shape.expert_weights
        * p.expert_bits
        / 8
        / (ranks * settings.dp)  # engines spread experts over the data-parallel ranks
        + shape.embedding_of_rank(settings.sharing) * p.embedding_bits / 8 / settings.tp
    ) * learned.weights_share
    kv_per_token, kv_fixed = _cache(shape, settings)
    held = min(_held(shape, settings), settings.max_model_len)
    method = settings.speculation.method if settings.speculation else ""
    if method == "draft_model" and draft is not None:  # has a cache of its own, and is not quantized with the target
        words = draft.linear_weights + draft.expert_weights + draft.embedding_weights
        weights += words * p.embedding_bits / 8 / settings.tp
        own_per_token, own_fixed = _cache(draft, settings)
        kv_per_token, kv_fixed = kv_per_token + own_per_token, kv_fixed + own_fixed
        held = max(held, min(_held(draft, settings), settings.max_model_len))
    elif method == "draft_model":
        weights *= 1.1
    elif method in ("eagle", "mtp"):  # one more layer
        weights += (shape.linear_weights + shape.expert_weights) / shape.layers * p.linear_bits / 8 / settings.tp
        kv_per_token *= 1 + 1 / shape.layers
    # vLLM profiles a step of max_num_batched_tokens: hidden rows in and out, the widest product, logits in 32 bits.
    rows = min(settings.max_batched_tokens, settings.max_model_len * max(settings.max_seqs, 1))
    widest = max([f.weights / shape.hidden / (1 if f.experts else 3) for f in shape.ffn] + [2.0 * shape.hidden])
    routed = max([f.top_k * f.expert_weights / shape.hidden / 3 for f in shape.ffn if f.experts], default=0.0)
    activations = rows * (4 * shape.hidden + 2 * (widest + 2 * routed) / settings.tp) * 2.0
    activations += min(settings.max_seqs, rows) * shape.vocab * 4.0 * 1.5
    on_cpu = hardware.kind == "cpu"
    if settings.engine == "sglang":  # its memory fraction leaves them outside
        activations = 0.0
    graphs = (
        0.0
        if settings.eager or on_cpu or settings.engine == "sglang"
        else _GRAPH_BYTES + shape.layers / settings.pp * _GRAPH_BYTES_PER_LAYER
    )
    share = 1.0 if settings.kv_bytes is not None else settings.memory_share  # a cache of a stated size is not a rest
    return {
        "memory": hardware.memory_bytes / (settings.tp * settings.pp * settings.dp if on_cpu else 1) * share,
        "weights": weights,
        "activations": activations,
        "graphs": graphs,
        "context": (_CPU_RUNTIME_BYTES if on_cpu else _CONTEXT_BYTES) + learned.overhead_bytes,
        "kv": 0.0,
        "kv_per_token": kv_per_token,
        "kv_fixed": kv_fixed,
        "kv_held": held,
        "sequence": kv_per_token * held + kv_fixed,
    }


def _cache(shape: ModelShape, settings: Settings) -> tuple[float, float]:
    """Bytes of KV cache on each GPU: per token, and per sequence whatever its length. Windows beside layers that keep
    every token are the latter; where no layer keeps more, they are counted by the token (:func:`_held`)."""
    per_token = fixed = 0.0
    apart = math.isinf(_held(shape, settings))
    for a in shape.attention:
        split = min(settings.tp, a.kv_heads) * settings.pp
        token = a.layers * a.cache * settings.precision.kv_bits / 8 / split
        if a.kind == "window" and apart:
            fixed += token * min(a.window + settings.block_size, settings.max_model_len)
        else:
            per_token += token
        fixed += a.layers * a.state * 2.0 / settings.tp / settings.pp
    return per_token, fixed


def _held(shape: ModelShape, settings: Settings) -> float:
    """How many tokens of a sequence the cache holds at most: all (inf), or those of the longest window where every
    layer has one."""
    kept = [a for a in shape.attention if a.cache]
    windowed = kept and all(a.kind == "window" for a in kept)
    return max(a.window for a in kept) + settings.block_size if windowed else math.inf


def _impossible(shape: ModelShape, settings: Settings) -> str:
    if shape.heads % settings.tp:
        return f"{shape.heads} attention heads cannot be split over {settings.tp} GPUs (tensor-parallel-size)"
    for a in shape.attention:
        if a.kind in ("full", "window") and a.kv_heads % settings.tp and settings.tp % a.kv_heads:
            return f"{a.kv_heads} KV heads cannot be split over {settings.tp} GPUs (tensor-parallel-size)"
    if settings.pp > shape.layers:
        return f"{shape.layers} layers cannot be split into {settings.pp} pipeline stages"
    return settings.refused


def _resident(room: float, per_token: float, fixed: float, settings: Settings) -> float:
    """How many sequences' fixed states (windows, recurrent states) the cache has to hold beside the tokens."""
    return min(settings.max_seqs, room / max(fixed + per_token * 0.25 * settings.max_model_len, 1.0)) if fixed else 0.0


def _short(short: float, parts: Mapping[str, float], hardware: Hardware, settings: Settings, what: str) -> Fit:
    used = ", ".join(
        f"{name} {parts[name] / _GIB:.1f} GiB"
        for name in ("weights", "activations", "graphs", "context")
        if parts[name]
    )
    share = f" x {settings.memory_share:g}" if settings.kv_bytes is None else ""
    over = f" on each of {settings.gpus} GPUs" if settings.gpus > 1 and hardware.kind != "cpu" else ""
    reason = (
        f"{used} and {what} do not fit {hardware.memory_bytes / _GIB:.0f} GiB{share}{over}: "
        f"{short / _GIB:.1f} GiB short"
    )
    return Fit(False, 0.0, round(short), reason, dict(parts))


def _has(known: Mapping[str, float], fit: Fit, part: str) -> bool:
    return known.get(f"{part}_bytes", 0) > 0 and fit.parts.get(part, 0) > 0


def _mean(before: float, now: float | None, n: int) -> float:
    return before if now is None else (before * n + now) / (n + 1)
