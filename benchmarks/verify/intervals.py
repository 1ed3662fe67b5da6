"""Which interval holds with few windows: the percentile and BCa bootstrap of parts, or Student's t on logarithms?

    python -m benchmarks.verify.intervals

Parts are drawn from a log-normal distribution (standard deviation of the logarithm 0.5), 1,000 times for each number of
parts; the share of 95 % intervals that cover the true mean (for t: the true mean of the logarithm).
"""

from __future__ import annotations

import json
import math

import numpy as np
from scipy import stats

from tuner.verify.statistics import mean

REPEATS, SPREAD = 1000, 0.5


def main() -> None:
    rng = np.random.default_rng(0)
    for parts in (3, 5, 10, 20, 40):
        hits = {"percentile": 0, "BCa": 0, "t": 0}
        for seed in range(REPEATS):
            values = rng.lognormal(0, SPREAD, parts)
            for method in ("percentile", "BCa"):
                found = stats.bootstrap((values,), np.mean, n_resamples=400, method=method, random_state=seed)
                low, high = found.confidence_interval
                hits[method] += low <= math.exp(SPREAD**2 / 2) <= high
            low, high = mean(list(np.log(values))).interval()
            hits["t"] += low <= 0 <= high
        print(json.dumps({"parts": parts, **{name: count / REPEATS for name, count in hits.items()}}), flush=True)


if __name__ == "__main__":
    main()
