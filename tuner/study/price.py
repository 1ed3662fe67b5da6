"""Cost: USD per million tokens served within SLO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tuner.errors import UsageError
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Step

COST, TOTAL = "cost_usd_per_mtok_output", "cost_usd_per_mtok_total"  # the second: prompts counted
OUTPUT, GOODPUT = "output_tokens_per_s", "goodput_output_tokens_per_s"


def told(metrics: Mapping[str, float], who: str) -> dict[str, float]:
    """Metrics that somebody else measured, made complete: an absent error rate is 0; where only the output is given,
    all of it counts as goodput, less the error rate. Raises UsageError (``who`` gave them) where no cost can follow."""
    if not {OUTPUT, GOODPUT, COST} & metrics.keys():
        raise UsageError(f"{who} returned none of {OUTPUT}, {GOODPUT} and {COST}: there is no cost without")
    known = {"error_rate": 0.0, **metrics}
    if OUTPUT in known:
        known.setdefault(GOODPUT, known[OUTPUT] * (1 - known["error_rate"]))
    return known


def per_hour(config: ServingConfig, objective: Objective, price: float | None = None) -> float:
    """USD per hour of one replica: the price of its GPUs, or of the one server on CPUs. ``price`` is that of the GPUs
    it ran on (None: the objective's)."""
    return (price or objective.price_usd_per_gpu_hour) * max(config.gpus, 1)


def priced(step: Step, config: ServingConfig, objective: Objective) -> Step:
    """``step`` with its cost: USD per hour / (tokens per second of requests within SLO x 3600) x 1e6.

    Left out where no token was served within SLO: an infinite cost is not a number to rank by. A cost that the
    engine gave itself stays.
    """
    metrics, intervals = dict(step.metrics), dict(step.intervals)
    usd_per_s = per_hour(config, objective) / 3600
    for name, goodput in (
        (COST, "goodput_output_tokens_per_s"),
        (TOTAL, "goodput_total_tokens_per_s"),
    ):
        rate = metrics.get(goodput, 0.0)
        if name in metrics or not rate > 0:
            continue
        metrics[name] = usd_per_s / rate * 1e6
        if goodput in intervals and intervals[goodput][0] > 0:
            low, high = intervals[goodput]
            intervals[name] = (usd_per_s / high * 1e6, usd_per_s / low * 1e6)
    return replace(step, metrics=metrics, intervals=intervals)
