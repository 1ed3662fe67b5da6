"""How well the search foresees crashes: log-loss of its probability on configurations that were not launched.

    python -m benchmarks.search.crashes

After 8, 16 and 30 launches (drawn at random, or half of them near a configuration that works, as a search draws them)
every other configuration is asked about: on the surfaces of this folder, and on four random ones where one value and
two pairs of values never work. ``false alarms`` is the share that really works of what is believed to work with less
than 20 %: a search misses those. Beside the beliefs as shipped: others for the variances of
:data:`tuner.search.beliefs.WORKS` and for :data:`tuner.search.beliefs.WORKS_DOUBT`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import ndtr

from benchmarks.search.run import load_surface
from tuner.search.beliefs import WORKS, WORKS_AT_FIRST, WORKS_DOUBT
from tuner.search.candidates import Candidates, correlations
from tuner.search.surrogate import Rows, fit

POOL, REPEATS, LAUNCHES = 1000, 6, (8, 16, 30)
VARIANTS = {
    "as shipped": (WORKS, WORKS_DOUBT),
    "less doubt (.3)": (WORKS, 0.3),
    "crashes come from values and pairs alone (own .02)": (replace(WORKS, own=0.02), WORKS_DOUBT),
    "both": (replace(WORKS, own=0.02), 0.3),
}


def problems() -> Iterator[tuple[str, Any, np.ndarray, np.ndarray]]:
    """(name, space, codes of the pool, which of it works)."""
    for name in ("dense", "experts", "abstract"):
        s = load_surface(name)
        pool = Candidates.of(s.space, 0, asked=True)
        m = s.metrics(pool.params[:POOL], s.loads[0])
        works = (m["short_bytes"] <= 0) & (m["crash_p"] < 0.5)
        yield name, s.space, pool.codes(list(range(POOL))), works
    for k in range(4):
        space = load_surface(("dense", "experts")[k % 2]).space
        codes = Candidates.of(space, k, asked=True).codes(list(range(POOL)))
        rng, works = np.random.default_rng(k), np.ones(POOL, bool)
        j = rng.integers(codes.shape[1])
        works &= codes[:, j] != rng.choice(np.unique(codes[:, j]))
        for _ in range(2):
            i, j = rng.choice(codes.shape[1], 2, replace=False)
            one, other = rng.choice(np.unique(codes[:, i])), rng.choice(np.unique(codes[:, j]))
            works &= ~((codes[:, i] == one) & (codes[:, j] == other))
        yield f"random {k}", space, codes, works


def draw(codes: np.ndarray, works: np.ndarray, near: bool, count: int, rng: Any) -> np.ndarray:
    if not near:
        return rng.choice(POOL, count, replace=False)
    star = rng.choice(np.nonzero(works)[0])
    close = np.argsort((codes != codes[star]).sum(1) + rng.random(POOL))[:60]
    halves = (rng.choice(close, count // 2, replace=False), rng.choice(POOL, count - count // 2, replace=False))
    return np.unique(np.concatenate(halves))


def main() -> None:
    loss: dict[str, list[float]] = defaultdict(list)
    alarms: dict[str, list[float]] = defaultdict(list)
    for _, space, codes, works in problems():
        tables = correlations(space)
        for repeat in range(REPEATS):
            rng = np.random.default_rng([repeat, 3])
            for near in (False, True):
                for count in LAUNCHES:
                    seen = draw(codes, works, near, count, rng)
                    rest = np.setdiff1d(np.arange(POOL), seen)
                    none, n = np.zeros(len(seen)), len(seen)
                    rows = Rows(codes[seen], none, np.where(works[seen], 1.0, -1.0), np.zeros((n, 0)), none)
                    for name, (prior, doubt) in VARIANTS.items():
                        believed = fit(tables, rows, prior, mean=WORKS_AT_FIRST)
                        at = np.zeros((len(rest), 1))
                        mean, sd = believed.predict(codes[rest], at, at[:, :, None][:, :, :0])
                        p = np.clip(ndtr(mean / np.sqrt(sd**2 + doubt**2))[:, 0], 1e-3, 1 - 1e-3)
                        loss[name].append(float(-np.log(np.where(works[rest], p, 1 - p)).mean()))
                        alarms[name] += works[rest][p < 0.2].tolist()
    print("| beliefs | log-loss | false alarms |\n|---|---|---|")
    for name in VARIANTS:
        print(f"| {name} | {np.mean(loss[name]):.3f} | {np.mean(alarms[name]):.0%} |")


if __name__ == "__main__":
    main()
