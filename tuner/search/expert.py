"""Rules of thumb: what an experienced engineer expects of a parameter by its name, where no analytic model is at hand.

Every rule gives three numbers per value. Two are logarithms: the latency of a token, and the capacity (the load that
keeps the SLOs). They are a prior mean of the surrogate (:mod:`tuner.search.sources`), so that launches correct them.
The third is the number of crashes to be expected of the value (:mod:`tuner.search.causes`), until a server with it has
served: what leaves little memory for graphs and activations, and what engines combine with few other features. A space
may say which known name a parameter is like. A name or a value that no rule knows counts nothing. Sources: vLLM's
guides "Optimization and Tuning", "Conserving Memory", "Quantization", "Speculative Decoding", "Expert Parallel
Deployment" and its "Compatibility Matrix", SGLang's "Hyperparameter Tuning"; a decode step reads all weights, so that
halving them halves most of it. How many crashes: docs/search.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from tuner.search.surrogate import Array, Codes
from tuner.space.config import Value
from tuner.space.space import Parameter, SearchSpace

# how the words of a value begin: eight bits; floats of four; four; drafts by a model; by what was said before
HALF = r"_((mx)?fp8|float8|int8|w8|i?q[5-8]|e4m3|e5m2|eetq|[5-8]_?bits?_)"
FLOAT4 = r"_((mx|nv)?fp4|float4)"
QUARTER = r"_(int4|nf4|w4|i?q[2-4]|exl[23]|[2-4]_?bits?_|awq|gptq)"
MODEL = r"_(eagle|mtp|nextn|draft|small_draft|medusa|true_)"
LOOKUP = r"_(n_?gram|(prompt_)?look_?(up|ahead)|suffix)"
LOOKS = (  # what words among the values have -> the name of what has such values
    (rf"{LOOKUP}|_(eagle|mtp|nextn|small_draft|medusa)", "speculative_method"),
    (rf"{QUARTER}|{FLOAT4}", "quantization"),
    (rf"_auto_.*{HALF}|{HALF}.*_auto_", "kv_cache_dtype"),
    (HALF, "quantization"),
)
ON, OFF = r"_true_", r"_false_"
SAME = {
    **{word: "true" for word in ("on", "yes", "enable", "enabled")},
    **{word: "false" for word in ("off", "no", "disable", "disabled")},
}
SWITCH = {"_0_": "_false_", "_1_": "_true_"}
OPPOSITE = {"_true_": "_false_", "_false_": "_true_"}
ACCEPTED, DRAFT_COST = 0.7, 0.06  # tokens that are accepted, and what drafting one costs, in decode steps
NOTHING, NO_GRAPHS, REUSE = (0.0, 0.0, 0.0), (0.3, -0.1, 0.0), (-0.15, 0.5, 0.0)
Effect = tuple[float, float, float]  # on log latency, on log capacity; expected crashes


def effects(space: SearchSpace) -> list[Array]:
    """Per parameter a table (values + 1, 3): the rules' effects on log latency and log capacity, and expected crashes.
    The last row stands for "does not apply"."""
    space = meant(space)
    counted = any(p.counts_gpus for p in space.parameters)  # then what GPUs do is a prior mean of its own
    experts, told, found = _experts(space), sizes_told(space), []
    for p in space.parameters:
        parallel = _parallel(p, experts)
        if (p.counts_gpus and not told) or (parallel and counted and not p.counts_gpus):
            known = [NOTHING] * len(p.values)
        elif parallel:
            least = math.sqrt(min(map(float, p.values)))  # a model that needs more GPUs gains by more of them
            known = [parallel(float(v) / least) for v in p.values]
        else:
            known = _effects(p, experts)
        found.append(np.array([*known, NOTHING]))
    return found


def meant(space: SearchSpace) -> SearchSpace:
    """The space under the names that rules read: what it says that a parameter is ``like``, else the parameter's own,
    or, where no rule knows that, its flag's."""
    return replace(space, parameters=tuple(replace(p, name=_meant(p), like="") for p in space.parameters))


def _meant(p: Parameter) -> str:
    flags = {flag for emission in p.emissions for flag in emission.flags}
    if p.like or len(flags) != 1 or knows(p):
        return p.like or p.name
    flag = flags.pop()
    return flag if knows(replace(p, name=flag)) else p.name


def knows(p: Parameter) -> bool:
    """Whether a rule has something to say of the parameter by its name (of what it is ``like``, where that is said)."""
    p = replace(p, name=p.like or p.name)
    return _parallel(p, False) is not None or any(effect != NOTHING for effect in _effects(p, False))


def sizes_told(space: SearchSpace) -> bool:
    """Whether several parameters count GPUs and the names of all tell of which parallelism they are the size: a GPU
    more does not do the same in each."""
    space = meant(space)
    counting, experts = [p for p in space.parameters if p.counts_gpus], _experts(space)
    return len(counting) > 1 and all(_parallel(p, experts) for p in counting)


def by_looks(space: SearchSpace) -> SearchSpace | None:
    """The space under names that its values suggest, for rules to read; None where rules know a name already, or the
    space says what counts GPUs."""
    if any(p.counts_gpus for p in space.parameters) or any(table.any() for table in effects(space)):
        return None
    return replace(space, parameters=tuple(replace(p, name=_looks(p) or p.name) for p in space.parameters))


def _looks(p: Parameter) -> str:
    """The name of what the values look like; empty where they look like nothing. Of small powers of two most are sizes
    of parallelism, of which kind they do not say."""
    numbers = [n for v in p.values if (n := _number(v)) is not None]
    if len(numbers) < len(p.values):
        texts = " ".join(_plain(v) for v in p.values if not isinstance(v, bool))
        return next((name for has, name in LOOKS if re.search(has, texts)), "")
    low, high = min(numbers), max(numbers)
    if not all(n.is_integer() for n in numbers):
        return "gpu_memory_utilization" if low >= 0.3 and 0.7 <= high < 1 else ""
    if low == 0 and 1 < high <= 10:
        return "num_speculative_tokens"
    if low >= 1 and 1 < high <= 16 and all(math.log2(n).is_integer() for n in numbers):
        return SOME_SIZE
    if low >= 1 and 128 <= high <= 1024:
        return "max_num_seqs"
    return "max_num_batched_tokens" if low >= 256 and high >= 2048 else ""


def gpu_counts(space: SearchSpace, admits: Callable[[Mapping[str, Value]], bool]) -> list[tuple[dict[str, Value], str]]:
    """The engine's default on the most GPUs and on few, with the reason: worth a launch where nothing is known of the
    parameters but which of them count GPUs. What may not be launched is left out."""
    counting = [p for p in space.parameters if p.counts_gpus]
    default, found = space.snap(space.default()), []
    made = [
        dict(zip([p.name for p in counting], sizes, strict=True)) for sizes in product(*(p.values for p in counting))
    ]
    by_size = sorted(made, key=lambda sizes: math.prod(map(float, sizes.values())))
    few = {p.name: p.values[min(1, len(p.values) - 1)] for p in counting[:1]}
    for words, sizes in (("most GPUs", reversed(by_size)), ("few GPUs", [few])):
        allowed = (params for of in sizes if admits(params := space.snap(default | of)))
        params = next(allowed, default)
        if params != default:
            found.append((params, f"the engine's default on the {words}"))
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
        space = meant(space)
        named = {} if any(p.counts_gpus for p in space.parameters) else dict(enumerate(space.parameters))
        experts = _experts(space)
        named = {j: p for j, p in named.items() if _parallel(p, experts)}
        named = {j: p for j, p in named.items() if re.search(GPUS, _plain(p.name))} or named
        sizes = {j: np.log([*map(float, p.values), 1.0]) for j, p in named.items()}
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


def _share_of_free(_: Parameter, n: float) -> Effect:
    return (0.0, 0.4 * n, 0.3 if n > 0.92 else 0.0) if n <= 1 else NOTHING  # of the memory that weights leave


def _pool(p: Parameter, n: float) -> Effect:
    usual = _number(p.default) or n  # tokens, which the memory has to hold
    return 0.0, 0.1 * math.log2(max(n, 1)), 0.15 * max(math.log2(max(n, 1) / max(usual, 1)), 0.0)


def _layers(_: Parameter, n: float) -> Effect:
    n = min(n, 80) if n >= 0 else 80  # of a model, on the GPU; -1: all
    return -0.01 * n, 0.01 * n, 0.0


def _offload(_: Parameter, n: float) -> Effect:
    n = math.log2(1 + min(max(n, 0), 1024))
    return 0.15 * n, -0.1 * n, 0.0  # weights that are read over the bus, or computed by the CPU


def _draft(p: Parameter, n: float) -> Effect:
    switch = any(v == 0 or isinstance(v, str) for v in p.values)  # no drafts: its own
    n = max(n, 0.0)  # -1: as the engine likes
    return (-speculation(n) if switch else speculation(2) - speculation(n)), 0.0, 0.06 * min(n, 8)


def _sequences(_: Parameter, n: float) -> Effect:
    return 0.03 * math.log2(max(n, 1)), -0.5 * (16 / max(n, 1)) ** 0.7, 0.0


def _budget(_: Parameter, n: float) -> Effect:
    return 0.04 * math.log2(max(n, 1)), -0.5 * (512 / max(n, 1)) ** 0.7, 0.2 if n >= 16384 else 0.0


def _part(p: Parameter, n: float) -> Effect:
    return _budget(p, 4 * n)  # of a batch, what a device computes at once


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


def _attention(_: Parameter, n: float) -> Effect:
    return 0.05 * math.log2(max(n, 1)), 0.1 * math.log2(max(n, 1)), 0.0  # no KV cache is held twice; more to wait for


def _replicas(n: float) -> Effect:
    return -0.15 * math.log2(n), 0.55 * math.log2(n), 0.0


DP_INSIDE = r"dp_attention_size|_att(entio)?n_(dp|data_parallel)_size"
# names that have a known one's words, and mean something about it
ABOUT = r"top_?k|lookup_m(ax|in)|_min_|threshold|_hash|evict|cascade|balance|_lora|_kv.*offload"
WEIGHTS_AWAY = r"cpu_offload|offload_(weights|layers|param)|weights?_offload|cpu_moe"
GPUS = r"^_(num_|n_)?gpus_(count_)?$"  # all of a server's
SOME_SIZE = "some_size_of_parallelism"  # no name that anybody uses
# sizes of parallelism, whose product is the number of GPUs: what a name has -> the effect of a size
PARALLEL: Sequence[tuple[str, Callable[[float], Effect]]] = (
    (r"_(tensor_parallel|n?tp_|num_shards?_|gpus_per_)", _tensor),
    (GPUS, lambda n: (-0.4 * (1 - n**-0.9), 0.4 * math.log2(n), 0.0)),
    (r"_(pipeline_parallel|pp_)", _pipeline),
    (SOME_SIZE, lambda n: (-0.25 * math.log2(n), 0.5 * math.log2(n), 0.0)),
    (r"_(data_parallel|dp_|(num_|n_)?(replicas?|instances?)_(num_|count_)?$)", _replicas),
)

# what a name has, of which the first that fits decides -> the effect of a number
NUMBERS: Sequence[tuple[str, Callable[[Parameter, float], Effect]]] = (
    (r"graph", _graphs),
    (r"(block|page)_size|per_(block|page)_|block_seq_len", _block),
    (r"scheduler_steps|decode_steps|multi_?step", _steps),
    (WEIGHTS_AWAY, _offload),
    (r"gpu_layers|_ngl_", _layers),
    (r"cache_(max_entry|percent|fraction)", _share_of_free),
    (r"memory|_mem_|_gpu_util|vram", _memory),
    (r"_mtp|draft|specul|_spec_", _draft),
    (r"total_(tokens|seq)|max_total|_ctx_size|_num_ctx|kv_blocks|kv_tokens", _pool),
    (
        r"batch(ed)?_tokens|num_tokens|tokens?_budget|tokens_per_(step|iter)|prefill_(size|tokens?|chunk)|chunk_size"
        r"|ragged_batch_size|_num_batch_",
        _budget,
    ),
    (r"_u_?batch_", _part),
    (
        r"_seqs_|_sequences?_(?!len)|running_req|ongoing_req|max_req|max_concurren|batch_size|max_batch_$|_n_?seq_"
        r"|^_(n_|num_|ollama_num_)?parallel_$|_slots_",
        _sequences,
    ),
)
SIZES = (_budget, _part, _sequences, _pool)  # of which 0 or -1 means: as the engine likes
# what a name has -> what a value has, and its effect: fewer bytes to read and to hold, and of floats of four bits
# faster tensor cores; more tokens per step; launch overheads without CUDA graphs; decode steps that wait for whole
# prompts; experts' tokens that are sent to everybody, or by kernels made for it, which have to be installed
WORDS: Sequence[tuple[str, Sequence[tuple[str, Effect]]]] = (
    (r"prefix_?cach|radix|(cache|block|kv|prompt)_re_?use|prompt_cach", ((r"_(false|none|0)_", NOTHING), ("", REUSE))),
    (
        r"_kv|cache_d?type|_ct[kv]_|quant_policy",
        ((HALF, (0.0, 0.2, 0.2)), (rf"{FLOAT4}|{QUARTER}", (0.05, 0.3, 0.2))),
    ),
    (r"gguf|_ftype_", ((QUARTER, (-0.5, 0.2, 0.0)), (HALF, (-0.3, 0.1, 0.0)))),
    (
        r"quant|q_?format|model_format|weight|_dtype_|precision|^_(model|model_(path|id)|hf_repo|checkpoint)_$",
        ((FLOAT4, (-0.55, 0.45, 0.2)), (QUARTER, (-0.5, 0.1, 0.2)), (HALF, (-0.4, 0.4, 0.08))),
    ),
    (r"specul|draft|_mtp|_spec_", ((MODEL, (-0.6, 0.1, 0.2)), (LOOKUP, (-0.2, 0.0, 0.06)))),
    (r"eager", ((rf"{ON}|_eager_", NO_GRAPHS),)),
    (r"torch_compile", ((OFF, (0.05, -0.03, 0.0)),)),
    (
        r"graph|compil",
        ((rf"{OFF}|_eager_|_none_|^_0_$", NO_GRAPHS), (r"^(?!.*_full_).*_piecewise_", (0.08, 0.0, 0.0))),
    ),
    (r"chunked", ((OFF, (0.2, -0.1, 0.0)),)),
    (r"dp_attention|attention_dp", ((ON, (0.05, 0.2, 0.05)),)),
    (
        r"attention|attn|_fmha",
        ((r"_triton_", (0.12, -0.1, 0.0)), (r"^_(false|native|torch|sdpa|eager|math)_", (0.12, -0.1, 0.0))),
    ),
    (WEIGHTS_AWAY, ((ON, (0.6, -0.4, 0.0)),)),
    (r"(cont|inflight|continuous)_batch", ((OFF, (0.0, -1.0, 0.0)),)),
    (r"all_?reduce", ((OFF, (0.05, -0.03, 0.0)),)),
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
    (
        r"schedul",
        (
            (rf"{ON}|_async_", (-0.05, 0.05, 0.0)),
            (r"_lpm_|_longest_prefix", (0.0, 0.05, 0.0)),  # requests that share a prefix, one after the other
            (r"_static_batch", (0.0, -1.0, 0.0)),  # TensorRT-LLM's: a batch ends before another begins
        ),
    ),
    (r"_(backend|engine|runtime)_$", ((r"^_(py)?torch_|^_transformers_", (0.12, -0.12, 0.0)),)),
)


def _experts(space: SearchSpace) -> bool:
    """Whether a parameter is about a mixture's experts."""
    return any(re.search(r"_(moe|ep|experts?)_|_a2a_", _plain(p.name)) for p in space.parameters)


def _parallel(p: Parameter, experts: bool) -> Callable[[float], Effect] | None:
    """The effect of a size of parallelism, where the name tells one (not of a draft model, nor of experts).
    What divides the GPUs of another size takes no more of them."""
    name = _plain(p.name)
    if _inside(name, experts):
        return None
    if re.search(r"draft|spec|expert|moe|attention", name) or any((_number(v) or 0) < 1 for v in p.values):
        return None
    return next((effect for has, effect in PARALLEL if re.search(has, name)), None)


def _inside(name: str, experts: bool) -> bool:
    """Whether it is SGLang's data-parallel attention, which divides the GPUs of ``tp-size``: its own names, and where
    there are ``experts`` ``dp-size``."""
    return bool(re.search(DP_INSIDE, name)) or (experts and name == "_dp_size_")


def _effects(p: Parameter, experts: bool) -> list[Effect]:
    """What the rules say of each value. Where they know numbers alone, a word is no drafts, or like the mean of the
    numbers ("auto")."""
    name = _plain(p.name)
    rule = _attention if _inside(name, experts) else next((rule for has, rule in NUMBERS if re.search(has, name)), None)
    no_length = "parallel" in name and rule not in (_sequences, _attention)  # a draft model's own parallel size
    if no_length or re.search(ABOUT, name):
        return [NOTHING] * len(p.values)
    negated = "_false_" in name
    known = next((values for has, values in WORDS if re.search(has, name)), ())
    numbers = [n for v in p.values if (n := _number(v)) is not None]
    if rule is not None and not negated and any(n > 0 for n in numbers):
        of = {n: rule(p, n) for n in numbers if n > 0 or rule not in SIZES}
        latency, capacity, _ = np.mean(list(of.values()), axis=0).tolist()
        word = rule(p, 0) if rule is _draft else (latency, capacity, 0.0)
        return [word if (n := _number(v)) is None else of.get(n, word) for v in p.values]
    found = []
    bits = re.search("bits|quant_policy", name)
    for value in p.values:
        text = _plain(value)
        if _number(value) is not None:  # a switch, where nothing but 0 and 1 is said
            text = _plain(f"{value} bits") if bits else SWITCH.get(text, text) if set(numbers) <= {0, 1} else text
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
