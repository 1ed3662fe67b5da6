"""Bars 1 and 2: do the intervals of the verified winner cover the truth, and is the right configuration recommended?

    python -m benchmarks.verify.coverage throughput [--studies 200]
    python -m benchmarks.verify.coverage latency

Each study searches 20 configurations and the default (40 launches, ties repeated) and verifies with 10 launches on
three held-out windows. Once all are equal, once one is 10 % faster.
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


def measure(scenario: Scenario, speed: float, studies: int, seed: int) -> dict[str, object]:
    """One row of the table: ``speed`` is that of one of the twenty (1.0: all are equal)."""
    speeds = {f"v{i}": speed if f"v{i}" == BETTER else 1.0 for i in range(21)}
    verified, searched, gains, widths, launches = [], [], [], [], []
    choices: collections.Counter[str] = collections.Counter()
    for i in range(studies):
        result = run(speeds, seed + i, scenario)
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
        launches.append(found.launches)
    return {
        "scenario": scenario.name,
        "one_is_faster_by": round(speed - 1, 3),
        "studies": studies,
        "verified_interval_covers": _share(verified),
        "verified_gain_covers": _share(gains) if gains else None,
        "search_interval_covers": _share(searched),
        "median_width": round(float(np.median(widths)), 3),
        "mean_verify_launches": round(float(np.mean(launches)), 1),
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
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    scenario = {"throughput": THROUGHPUT, "latency": LATENCY}[arguments.scenario]
    for speed in (1.0, 1.1):
        begun = time.monotonic()
        row = measure(scenario, speed, arguments.studies, arguments.seed)
        print(json.dumps({**row, "seconds": round(time.monotonic() - begun)}), flush=True)


if __name__ == "__main__":
    main()
