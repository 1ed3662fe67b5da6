"""What a search could reach if the lasting luck of each configuration were of the truth.

    python -m benchmarks.search.luck blind_{f,g}:{0,1,2,3,4,5}

Regret, against the front of all configurations with their luck, of ten launches by somebody who knows everything but
the luck: the ten that fill most of the front without it, one by one. Regret is counted in the truth without luck for
this reason (:class:`benchmarks.search.surface.Surface`).
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.search.blind import Blind
from tuner.pareto.volume import hypervolume
from tuner.search.scan import nondominated


def left(surface: Blind, launches: int = 10) -> float:
    """The regret; the surface's ``truth_grid`` takes ``lucky``."""
    runs, cost, latency, ok = surface.source.truth_grid(surface.scenario, lucky=True)
    holds = np.logical_and.accumulate(ok, axis=1) & runs[:, None]
    points = np.column_stack([cost[holds], latency[holds]])
    worst = (float(points[:, 0].max()), float(points[:, 1].max()))

    def volume(costs: np.ndarray, latencies: np.ndarray, reference: tuple[float, float]) -> float:
        front = nondominated(np.column_stack([costs, latencies]))
        return hypervolume([(float(c), float(s)) for c, s in front], reference, log=True)

    rows, places = np.nonzero(surface._holds)
    front = {
        tuple(p) for p in nondominated(np.column_stack([surface._cost[rows, places], surface._latency[rows, places]]))
    }
    best = sorted(
        {r for r, k in zip(rows, places, strict=True) if (surface._cost[r, k], surface._latency[r, k]) in front}
    )

    def usual(chosen: list[int]) -> float:
        where = surface._holds[chosen]
        return volume(surface._cost[chosen][where], surface._latency[chosen][where], surface._worst)

    chosen: list[int] = []
    for _ in range(min(launches, len(best))):
        chosen.append(max((r for r in best if r not in chosen), key=lambda r: usual([*chosen, r])))
    theirs = holds[chosen]
    return 1 - volume(cost[chosen][theirs], latency[chosen][theirs], worst) / volume(*points.T, worst)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(f"{word}: ten launches by who knows all but the luck leave {left(Blind(word)):.3f}", flush=True)
