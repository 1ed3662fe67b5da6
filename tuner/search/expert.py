"""What an experienced engineer would try first where no analytic model is at hand: a few whole configurations, by the
names that serving engines give their parameters. A name or a value that the space does not have is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.space.config import Value
from tuner.space.space import Parameter, SearchSpace

# Per goal: parts of a parameter's name -> what to choose: "high"/"low" end of a numeric grid, "middle", or values in
# the order in which they are wanted. Sources: vLLM's "Optimization and Tuning" and "Quantization" guides.
HALF = ("fp8", "w8a8", "w8a8-int8", "int8", "fp8_e4m3", "fp8_e5m2")
GUESS = ("eagle", "eagle3", "mtp", "draft", "draft_model", "ngram")
SMALL = {"quantization": HALF, "weight": HALF, "kv_cache": HALF}
GPUS = "gpus"  # whatever parameter counts them
GOALS: Sequence[tuple[str, Mapping[str, Any]]] = (
    (
        "half-size weights and KV cache and large batches, for the cheapest tokens",
        {**SMALL, "batched_tokens": "upper", "num_seqs": "upper"},
    ),
    (
        "half-size weights, speculation and all GPUs in one replica, for the lowest latency",
        {**SMALL, GPUS: "high", "speculation": GUESS, "mtp": "middle"},
    ),
    (
        "half-size weights and speculation, for low latency on few GPUs",
        {"quantization": HALF, "weight": HALF, "speculation": GUESS, "mtp": "middle"},
    ),
    ("half-size weights and KV cache on a few GPUs", {**SMALL, GPUS: "second", "num_seqs": "upper"}),
)


def first_choices(space: SearchSpace) -> list[tuple[dict[str, Value], str]]:
    """Configurations worth trying first, with the reason; none where the space's names say nothing. What a rule denies
    is left out."""
    found = []
    for why, wishes in GOALS:
        params = space.default()
        for p in space.parameters:
            for part, wish in wishes.items():
                if part in p.name.lower().replace("-", "_") or (part == GPUS and p.counts_gpus):
                    params[p.name] = _choose(p, wish)
                    break
        snapped = space.snap(params)
        if snapped != space.snap(space.default()) and not space.denied(snapped):
            found.append((snapped, why))
    return found


def _choose(parameter: Parameter, wish: str | Sequence[str]) -> Value:
    if isinstance(wish, str):
        if not parameter.numeric:
            return parameter.default
        last = len(parameter.values) - 1
        place = {"low": 0, "second": min(1, last), "middle": last // 2, "upper": round(0.75 * last), "high": last}
        return parameter.values[place[wish]]
    return next((v for w in wish for v in parameter.values if v == w), parameter.default)
