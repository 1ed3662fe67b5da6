"""Cost: USD per million tokens served within SLO."""

from __future__ import annotations

from dataclasses import replace

from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Step

COST = "cost_usd_per_mtok_output"


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
        ("cost_usd_per_mtok_total", "goodput_total_tokens_per_s"),
    ):
        rate = metrics.get(goodput, 0.0)
        if name in metrics or not rate > 0:
            continue
        metrics[name] = usd_per_s / rate * 1e6
        if goodput in intervals and intervals[goodput][0] > 0:
            low, high = intervals[goodput]
            intervals[name] = (usd_per_s / high * 1e6, usd_per_s / low * 1e6)
    return replace(step, metrics=metrics, intervals=intervals)
