"""Rules of thumb: what an experienced engineer expects of a parameter by its name, where no analytic model is at hand.

Every rule gives three numbers per value. Two are logarithms: the latency of a token, and the capacity (the load that
keeps the SLOs). They are a prior mean of the surrogate (:mod:`tuner.search.sources`), so that launches correct them.
The third is the number of crashes to be expected of the value (:mod:`tuner.search.causes`), until a server with it has
served: what leaves little memory for graphs and activations, and what engines combine with few other features. A name
or a value that no rule knows counts nothing. Sources: vLLM's guides "Optimization and Tuning", "Conserving Memory",
"Quantization", "Speculative Decoding" and its "Compatibility Matrix", SGLang's "Hyperparameter Tuning"; a decode step
reads all weights, so that halving them halves most of it. How many crashes: docs/search.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tuner.search.surrogate import Array
from tuner.space.config import Value
from tuner.space.space import Parameter, SearchSpace

HALF = ("fp8", "w8a8", "w8a8-int8", "int8", "fp8_e4m3", "fp8_e5m2")
QUARTER = ("int4", "awq", "awq_marlin", "gptq", "gptq_marlin", "w4a16", "nvfp4", "mxfp4")
GUESS = ("eagle", "eagle3", "mtp", "draft", "draft_model", "medusa", "true")
ACCEPTED, DRAFT_COST = 0.7, 0.06  # tokens that are accepted, and what drafting one costs, in decode steps
NOTHING = (0.0, 0.0, 0.0)
Effect = tuple[float, float, float]  # on log latency, on log capacity; expected crashes


def effects(space: SearchSpace) -> list[Array]:
    """Per parameter a table (values + 1, 3): the rules' effects on log latency and log capacity, and expected crashes.
    The last row stands for "does not apply"."""
    return [np.array([*(_effect(p, v) for v in p.values), NOTHING]) for p in space.parameters]


def gpu_counts(space: SearchSpace) -> list[tuple[dict[str, Value], str]]:
    """The engine's default on the most GPUs and on few, with the reason: worth a launch where nothing is known of the
    parameters but which of them counts GPUs. What a rule of the space denies is left out."""
    found = []
    for place, words in ((-1, "most GPUs"), (1, "few GPUs")):
        params = space.default()
        for p in space.parameters:
            if p.counts_gpus:
                params[p.name] = p.values[min(place, len(p.values) - 1)]
        snapped = space.snap(params)
        if snapped != space.snap(space.default()) and not space.denied(snapped):
            found.append((snapped, f"the engine's default on the {words}"))
    return found


def speculation(length: float) -> float:
    """Log speed-up of decoding by ``length`` drafted tokens (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8)."""
    tokens = (1 - ACCEPTED ** (length + 1)) / (1 - ACCEPTED)
    return math.log(tokens / (1 + DRAFT_COST * length))


def _memory(_: Parameter, n: float) -> Effect:
    return (0.0, 2.0 * n, 0.5 if n > 0.92 else 0.0) if n <= 1 else NOTHING


def _draft(p: Parameter, n: float) -> Effect:
    switch = 0 in p.values  # 0: its own
    return (-speculation(n) if switch else speculation(2) - speculation(n)), 0.0, 0.06 * n


def _sequences(_: Parameter, n: float) -> Effect:
    return 0.03 * math.log2(max(n, 1)), -0.5 * (16 / max(n, 1)) ** 0.7, 0.0


def _budget(_: Parameter, n: float) -> Effect:
    return 0.04 * math.log2(max(n, 1)), -0.5 * (512 / max(n, 1)) ** 0.7, 0.2 if n >= 16384 else 0.0


# parts of a name, of which the first that fits decides -> the effect of a number
NUMBERS: Sequence[tuple[tuple[str, ...], Callable[[Parameter, float], Effect]]] = (
    (("memory", "mem_fraction", "mem_util"), _memory),
    (("num_seqs", "running_requests", "max_batch_size"), _sequences),
    (("batched_tokens", "num_tokens", "token_budget", "prefill_size"), _budget),
    (("mtp", "draft", "speculative"), _draft),
)
# parts of a name -> values and their effects: fewer bytes to read and to hold; more tokens per step; launch overheads
# without CUDA graphs; decode steps that wait for whole prompts
WORDS: Sequence[tuple[tuple[str, ...], Sequence[tuple[Sequence[str], Effect]]]] = (
    (("kv_cache", "kv_quant"), ((HALF, (0.0, 0.2, 0.2)),)),
    (("quant", "weight"), ((HALF, (-0.4, 0.4, 0.08)), (QUARTER, (-0.5, 0.1, 0.2)))),
    (("specul", "draft", "mtp"), ((GUESS, (-0.6, 0.1, 0.2)), (("ngram",), (-0.2, 0.0, 0.06)))),
    (("eager",), ((("true",), (0.3, -0.1, 0.0)),)),
    (("graph",), ((("eager", "none", "false"), (0.3, -0.1, 0.0)), (("piecewise",), (0.08, 0.0, 0.0)))),
    (("chunked",), ((("false",), (0.2, -0.1, 0.0)),)),
    (("prefix_cach", "radix"), ((("true",), (0.0, 0.15, 0.0)),)),
    (("schedul",), ((("async", "true"), (-0.05, 0.05, 0.0)),)),
)


def _effect(p: Parameter, value: Any) -> Effect:
    name, text = p.name.lower().replace("-", "_"), str(value).lower()
    if p.counts_gpus or "parallel" in name:  # a draft model's own parallel size is no draft length
        return NOTHING  # what GPUs do is a prior mean of its own
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return next((rule(p, float(value)) for parts, rule in NUMBERS if _fits(parts, name)), NOTHING)
    known = next((values for parts, values in WORDS if _fits(parts, name)), ())
    return next((effect for values, effect in known if text in values), NOTHING)


def _fits(parts: Sequence[str], name: str) -> bool:
    return any(part in name for part in parts)
