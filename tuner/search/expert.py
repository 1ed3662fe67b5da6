"""Rules of thumb: what an experienced engineer expects of a parameter by its name, where no analytic model is at hand.

Every rule gives three numbers per value. Two are logarithms: the latency of a token, and the capacity (the load that
keeps the SLOs). They are a prior mean of the surrogate (:mod:`tuner.search.sources`), so that launches correct them.
The third is the number of crashes to be expected of the value (:mod:`tuner.search.causes`), until a server with it has
served: what leaves little memory for graphs and activations, and what engines combine with few other features. A name
or a value that no rule knows counts nothing. Sources: vLLM's guides "Optimization and Tuning", "Conserving Memory",
"Quantization", "Speculative Decoding", "Expert Parallel Deployment" and its "Compatibility Matrix", SGLang's
"Hyperparameter Tuning"; a decode step reads all weights, so that halving them halves most of it. How many
crashes: docs/search.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.search.surrogate import Array, Codes
from tuner.space.config import Value
from tuner.space.space import Parameter, SearchSpace

# how the words of a value begin: eight bits; floats of four; four; drafts by a model; by what was said before
HALF = r"_((mx)?fp8|float8|int8|w8|q8|e4m3|e5m2|8_?bits?_)"
FLOAT4 = r"_((mx|nv)?fp4|float4)"
QUARTER = r"_(int4|nf4|w4|q4|4_?bits?_|awq|gptq)"
MODEL = r"_(eagle|mtp|nextn|draft|medusa|true_)"
LOOKUP = r"_(n_?gram|(prompt_)?lookup|suffix)"
ON, OFF = r"_true_", r"_false_"
SAME = {"on": "true", "yes": "true", "enabled": "true", "off": "false", "no": "false", "disabled": "false"}
OPPOSITE = {"_true_": "_false_", "_false_": "_true_"}
ACCEPTED, DRAFT_COST = 0.7, 0.06  # tokens that are accepted, and what drafting one costs, in decode steps
NOTHING, NO_GRAPHS = (0.0, 0.0, 0.0), (0.3, -0.1, 0.0)
Effect = tuple[float, float, float]  # on log latency, on log capacity; expected crashes


def effects(space: SearchSpace) -> list[Array]:
    """Per parameter a table (values + 1, 3): the rules' effects on log latency and log capacity, and expected crashes.
    The last row stands for "does not apply"."""
    counted = any(p.counts_gpus for p in space.parameters)  # then what GPUs do is a prior mean of its own
    found = []
    for p in space.parameters:
        parallel = _parallel(p)
        if p.counts_gpus or (parallel and counted):
            known = [NOTHING] * len(p.values)
        else:
            known = [parallel(float(v)) for v in p.values] if parallel else _effects(p)
        found.append(np.array([*known, NOTHING]))
    return found


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


@dataclass(frozen=True, slots=True)
class World:
    """How many GPUs a server takes, by parameters whose names tell a size of parallelism (tensor, pipeline, data):
    they multiply. ``sizes``: by the parameter's number, log sizes by code (the last row: does not apply). ``most`` is
    the log of how many GPUs there are taken to be: the largest of these sizes, since nobody writes one that cannot
    run, or what the space knows to be there. No sizes where the space itself says what counts GPUs."""

    sizes: dict[int, Array]
    most: float

    @classmethod
    def of(cls, space: SearchSpace) -> World:
        named = {} if any(p.counts_gpus for p in space.parameters) else dict(enumerate(space.parameters))
        sizes = {j: np.log([*map(float, p.values), 1.0]) for j, p in named.items() if _parallel(p)}
        there = math.log(max(float(space.facts.get("gpus") or 1), 1.0))
        return cls(sizes, max([there, *(of.max() for of in sizes.values())]))

    def log_gpus(self, codes: Codes) -> Array:
        """(configurations,) from codes (configurations, parameters)."""
        found = np.zeros(len(codes))
        for j, sizes in self.sizes.items():
            found += sizes[codes[:, j]]
        return found


def _memory(_: Parameter, n: float) -> Effect:
    return (0.0, 2.0 * n, 0.5 if n > 0.92 else 0.0) if n <= 1 else NOTHING


def _draft(p: Parameter, n: float) -> Effect:
    switch = any(v == 0 or isinstance(v, str) for v in p.values)  # no drafts: its own
    n = max(n, 0.0)  # -1: as the engine likes
    return (-speculation(n) if switch else speculation(2) - speculation(n)), 0.0, 0.06 * n


def _sequences(_: Parameter, n: float) -> Effect:
    return 0.03 * math.log2(max(n, 1)), -0.5 * (16 / max(n, 1)) ** 0.7, 0.0


def _budget(_: Parameter, n: float) -> Effect:
    return 0.04 * math.log2(max(n, 1)), -0.5 * (512 / max(n, 1)) ** 0.7, 0.2 if n >= 16384 else 0.0


def _graphs(_: Parameter, n: float) -> Effect:
    return NO_GRAPHS if n <= 0 else NOTHING  # up to how large a batch


def _block(p: Parameter, n: float) -> Effect:
    return NOTHING if n == p.default else (0.0, 0.0, 0.1)  # kernels are made for some sizes, and few for all


def _steps(_: Parameter, n: float) -> Effect:
    return (-0.1, 0.05, 0.0) if n > 1 else NOTHING  # decode steps between two looks of the scheduler


def _tensor(n: float) -> Effect:
    return -1.6 * (1 - n**-0.9), 1.9 * (1 - n**-0.9), 0.0  # less from every doubling: messages take what work saves


def _pipeline(n: float) -> Effect:
    return -0.25 * math.log2(n), 0.6 * math.log2(n), 0.0


def _replicas(n: float) -> Effect:
    return -0.15 * math.log2(n), 0.55 * math.log2(n), 0.0


# sizes of parallelism, whose product is the number of GPUs: what a name has -> the effect of a size
PARALLEL: Sequence[tuple[str, Callable[[float], Effect]]] = (
    (r"_(tensor_parallel|n?tp_)", _tensor),
    (r"_(pipeline_parallel|pp_)", _pipeline),
    (r"_(data_parallel|dp_)", _replicas),
)

# what a name has, of which the first that fits decides -> the effect of a number
NUMBERS: Sequence[tuple[str, Callable[[Parameter, float], Effect]]] = (
    (r"graph", _graphs),
    (r"(block|page)_size|per_(block|page)_", _block),
    (r"scheduler_steps|decode_steps|multi_?step", _steps),
    (r"memory|_mem_|_gpu_util|vram", _memory),
    (r"_mtp|draft|specul|_spec_", _draft),
    (r"batch(ed)?_tokens|num_tokens|tokens?_budget|tokens_per_step|prefill_(size|tokens|chunk)|chunk_size", _budget),
    (r"_seqs_|sequences|running_req|max_req|max_concurren|batch_size|max_batch_$", _sequences),
)
# what a name has -> what a value has, and its effect: fewer bytes to read and to hold, and of floats of four bits
# faster tensor cores; more tokens per step; launch overheads without CUDA graphs; decode steps that wait for whole
# prompts; experts' tokens that are sent to everybody, or by kernels made for it, which have to be installed
WORDS: Sequence[tuple[str, Sequence[tuple[str, Effect]]]] = (
    (r"_kv|cache_d?type", ((HALF, (0.0, 0.2, 0.2)),)),
    (
        r"quant|weight|_dtype_|precision",
        ((FLOAT4, (-0.55, 0.45, 0.2)), (QUARTER, (-0.5, 0.1, 0.2)), (HALF, (-0.4, 0.4, 0.08))),
    ),
    (r"specul|draft|_mtp|_spec_", ((MODEL, (-0.6, 0.1, 0.2)), (LOOKUP, (-0.2, 0.0, 0.06)))),
    (r"eager", ((rf"{ON}|_eager_", NO_GRAPHS),)),
    (r"graph|compil", ((rf"{OFF}|_eager_|_none_", NO_GRAPHS), (r"^(?!.*_full_).*_piecewise_", (0.08, 0.0, 0.0)))),
    (r"chunked", ((OFF, (0.2, -0.1, 0.0)),)),
    (r"prefix_cach|radix", ((ON, (-0.15, 0.5, 0.0)),)),
    (r"attention|attn", ((r"_triton_", (0.12, -0.1, 0.0)),)),
    (
        r"_all_?(2|to)_?all|_a2a_",
        (
            (r"_naive_", (0.15, -0.15, 0.0)),
            (r"deep_?ep_(high|normal)", (0.0, 0.1, 0.1)),
            (r"deep_?ep_low", (-0.1, 0.0, 0.1)),
            (r"_deep_?ep", (-0.05, 0.05, 0.1)),
            (r"_pplx", (0.0, 0.0, 0.1)),
        ),
    ),
    (r"async", ((rf"{OFF}|_sync_", (0.05, -0.05, 0.0)),)),
    (r"schedul", ((rf"{ON}|_async_", (-0.05, 0.05, 0.0)),)),
)


def _parallel(p: Parameter) -> Callable[[float], Effect] | None:
    """The effect of a size of parallelism, where the name tells one (not of a draft model, nor of experts)."""
    name = _plain(p.name)
    if re.search(r"draft|spec|expert|moe|attention", name) or any((_number(v) or 0) < 1 for v in p.values):
        return None
    return next((effect for has, effect in PARALLEL if re.search(has, name)), None)


def _effects(p: Parameter) -> list[Effect]:
    """What the rules say of each value. Where they know numbers alone, a word is no drafts, or like the mean of the
    numbers ("auto")."""
    name = _plain(p.name)
    if "parallel" in name:  # a draft model's own parallel size is no draft length
        return [NOTHING] * len(p.values)
    negated = re.search(r"_disable_|_false_", name) is not None
    rule = None if negated else next((rule for has, rule in NUMBERS if re.search(has, name)), None)
    known = next((values for has, values in WORDS if re.search(has, name)), ())
    numbers = [n for v in p.values if (n := _number(v)) is not None]
    if rule is not None and numbers:
        of = {n: rule(p, n) for n in numbers}
        latency, capacity, _ = np.mean(list(of.values()), axis=0).tolist()
        word = rule(p, 0) if rule is _draft else (latency, capacity, 0.0)
        return [word if (n := _number(v)) is None else of[n] for v in p.values]
    found = []
    for value in p.values:
        text = _plain(f"{value} bits" if _number(value) is not None and "bits" in name else value)
        text = OPPOSITE.get(text, text) if negated else text
        found.append(next((effect for has, effect in known if re.search(has, text)), NOTHING))
    return found


def _number(value: Value) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain(text: object) -> str:
    """``_max_num_seqs_`` of ``max-num-seqs`` and of ``maxNumSeqs``; ``_true_`` of ``on``."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", str(text)).lower()
    words: list[str] = re.findall("[a-z0-9]+", apart)
    return f"_{'_'.join(SAME.get(word, word) for word in words)}_"
