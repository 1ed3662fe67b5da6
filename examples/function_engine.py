"""Bring your own evaluator: what `examples/function-engine.yaml` tunes instead of a server.

The callable gets the serving parameters and the load, and returns metrics, or raises `tuner.Infeasible`. Here it is a
small model of a batching server; it could as well run a benchmark of your own, ask a simulator, or look into a table.

`foresee` is a model of your own: what the study expects before it asks, right or wrong.
"""

from collections.abc import Mapping
from typing import Any

import tuner

REQUESTS_PER_S = 2.0  # at load 1
INPUT_TOKENS, OUTPUT_TOKENS = 600, 150
MEMORY_GIB, WEIGHTS_GIB, KV_GIB_PER_REQUEST = 24.0, 16.0, 0.09


def evaluate(config: Mapping[str, Any], load: float) -> dict[str, float]:
    """Metrics at `load` times the trace's rate; latencies in seconds."""
    batch, width = config["max_num_seqs"], _fitting_width(config)
    rate = REQUESTS_PER_S * load
    running = 1.0
    for _ in range(50):  # Little's law: how many run depends on how long a step takes, and the other way round
        step_s = 0.018 * width + 0.00035 * running + rate * INPUT_TOKENS * 12e-6 * 0.02
        running = min(rate * OUTPUT_TOKENS * step_s, batch)
    busy = rate * OUTPUT_TOKENS * step_s / batch
    queue_s = 0.05 * busy / (1 - busy) if busy < 0.98 else 60.0
    return {
        "ttft_p99_s": 0.08 + 4.6 * queue_s,
        "tpot_p99_s": 1.3 * step_s,
        "output_tokens_per_s": min(rate, batch / (OUTPUT_TOKENS * step_s)) * OUTPUT_TOKENS,
    }


def foresee(
    config: Mapping[str, Any], load: float, *, step_s: float = 0.012, request_s: float = 0.0005
) -> dict[str, float]:
    """What somebody expects on the back of an envelope: no queue, and two constants of which the launches will tell."""
    batch, width = config["max_num_seqs"], _fitting_width(config)
    tokens_per_s = REQUESTS_PER_S * load * OUTPUT_TOKENS
    running = min(tokens_per_s * step_s * width / max(1 - tokens_per_s * request_s, 0.1), batch)
    step = step_s * width + request_s * running
    return {"ttft_p99_s": 0.1, "tpot_p99_s": step, "output_tokens_per_s": min(tokens_per_s, batch / step)}


def _fitting_width(config: Mapping[str, Any]) -> float:
    width = 1.0 if config["weights"] == "bf16" else 0.5
    need_gib = WEIGHTS_GIB * width + KV_GIB_PER_REQUEST * config["max_num_seqs"]
    if need_gib > MEMORY_GIB:
        raise tuner.Infeasible(f"needs {need_gib:.1f} GiB of {MEMORY_GIB:.0f} GiB")
    return width
