"""From the latencies of a trace's requests to the metrics of a step, under the names that a measured step has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tuner.spec.slo import Slo


def statistics(columns: Mapping[str, np.ndarray], quantiles: Sequence[float]) -> dict[str, float]:
    """``ttft_p50_s``, ``ttft_mean_s``, ``ttft_max_s`` ... of columns of equal length n, in seconds."""
    table = np.sort(np.stack(list(columns.values())), axis=1)
    n = table.shape[1]
    at = np.array(quantiles) * (n - 1)
    low = at.astype(int)
    values = table[:, low] + (table[:, np.minimum(low + 1, n - 1)] - table[:, low]) * (at - low)
    means = table.mean(axis=1)
    metrics: dict[str, float] = {}
    for row, name in enumerate(columns):
        for q, value in zip(quantiles, values[row], strict=True):
            metrics[f"{name}_p{q * 100:.6g}_s"] = float(value)
        metrics[f"{name}_mean_s"] = float(means[row])
        metrics[f"{name}_max_s"] = float(table[row, -1])
    return metrics


def gaps(step_s: np.ndarray, piece_s: np.ndarray, mixed: float, quantiles: Sequence[float]) -> dict[str, float]:
    """Inter-token gaps: most are a decode step of ``step_s`` (n,); a share ``mixed`` of them holds a piece of a prompt
    as well, ``piece_s`` (n,)."""
    steps, pieces = np.sort(step_s), np.sort(piece_s)
    metrics: dict[str, float] = {}
    for q in quantiles:
        if q <= 1 - mixed:
            value = steps[int(q / (1 - mixed) * (len(steps) - 1))]
        else:
            value = steps.mean() + pieces[int((q - 1 + mixed) / mixed * (len(pieces) - 1))]
        metrics[f"itl_p{q * 100:.6g}_s"] = float(value)
    metrics["itl_max_s"] = float(steps[-1] + pieces[-1])
    return metrics


def money(
    inputs: np.ndarray,
    outputs: np.ndarray,
    latencies: Mapping[str, np.ndarray],
    slos: Sequence[Slo],
    served: float,
    price_usd_per_hour: float,
) -> dict[str, float]:
    """Throughput and cost where ``served`` output tokens per second come out of servers that cost
    ``price_usd_per_hour`` together; only requests within every SLO's limit on each count as good. Where none does, the
    cost is a millionth's: large, but finite."""
    good = np.ones_like(outputs, dtype=bool)
    for slo in slos:
        if slo.each and slo.latency in latencies:
            good &= latencies[slo.latency] <= slo.limit
    asked = float(outputs.sum())
    share, inputs_per_output = float(outputs[good].sum()) / asked, float(inputs.sum()) / asked
    cost = price_usd_per_hour / 3600 * 1e6 / max(served * share, served * 1e-6)
    return {
        "requests_per_s": served / float(outputs.mean()),
        "output_tokens_per_s": served,
        "total_tokens_per_s": served * (1 + inputs_per_output),
        "goodput_output_tokens_per_s": served * share,
        "slo_share": share,
        "error_rate": 0.0,
        "cost_usd_per_mtok_output": cost,
        "cost_usd_per_mtok_total": cost / (1 + inputs_per_output),
    }
