"""Bars 1 and 2: do the intervals of the verified winner cover the truth, and is the right configuration recommended?

    python -m benchmarks.verify.coverage throughput --faster-by 0
    python -m benchmarks.verify.coverage throughput --faster-by 0.1
    python -m benchmarks.verify.coverage latency --faster-by 0
    python -m benchmarks.verify.coverage latency --faster-by 0.1

Each of 200 studies searches 20 configurations and the default (ties repeated) and verifies on three held-out windows,
with 60 launches in all, 12 of them (20 %) for verification. One of the 20 is faster than the others, or none is.
"""

from __future__ import annotations

import argparse
import collections
import json
import time

import numpy as np
from scipy import stats

from benchmarks.verify.small_study import LATENCY, THROUGHPUT, Scenario, run, truth

BETTER = "v7"


def measure(scenario: Scenario, speed: float, studies: int, seed: int, launches: int) -> dict[str, object]:
    """One row of the table: ``speed`` is that of one of the twenty (1.0: all are equal)."""
    speeds = {f"v{i}": speed if f"v{i}" == BETTER else 1.0 for i in range(21)}
    verified, searched, gains, widths, spent = [], [], [], [], []
    choices: collections.Counter[str] = collections.Counter()
    for i in range(studies):
        result = run(speeds, seed + i, scenario, launches=launches)
        found = result.verification
        if found.chosen is None or found.config is None:
            choices["nothing"] += 1
            continue
        variant = str(found.config.params["variant"])
        choices["default" if found.is_default else "better" if variant == BETTER else "another"] += 1
        true = truth(speeds[variant], scenario)
        _, low, high = found.chosen.cost
        verified.append(low <= true <= high)
        widths.append(high / low - 1)
        if not found.is_default:
            _, low, high = found.chosen.difference
            gains.append(low <= true / truth(1.0, scenario) <= high)
        low, high = result.apparent_interval
        if result.apparent:
            searched.append(low <= truth(speeds[result.apparent], scenario, result.apparent_load) <= high)
        spent.append(found.launches)
    return {
        "scenario": scenario.name,
        "one_is_faster_by": round(speed - 1, 3),
        "studies": studies,
        "launches": launches,
        "verified_interval_covers": _share(verified),
        "verified_gain_covers": _share(gains) if gains else None,
        "search_interval_covers": _share(searched),
        "median_width": round(float(np.median(widths)), 3),
        "mean_verify_launches": round(float(np.mean(spent)), 1),
        "choices": dict(choices),
    }


def _share(hits: list[bool]) -> dict[str, object]:
    """A share with its own exact 95 % interval (Clopper and Pearson 1934)."""
    n, k = len(hits), sum(hits)
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"share": round(k / n, 3), "of": n, "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=("throughput", "latency"))
    parser.add_argument("--faster-by", type=float, default=0.0)
    parser.add_argument("--launches", type=int, default=60)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20000)
    arguments = parser.parse_args()
    scenario = {"throughput": THROUGHPUT, "latency": LATENCY}[arguments.scenario]
    begun = time.monotonic()
    row = measure(scenario, 1 + arguments.faster_by, arguments.studies, arguments.seed, arguments.launches)
    print(json.dumps({**row, "seconds": round(time.monotonic() - begun)}), flush=True)


if __name__ == "__main__":
    main()
