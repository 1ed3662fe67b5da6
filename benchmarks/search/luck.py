"""What a search could reach if the lasting luck of each configuration were of the truth.

    python -m benchmarks.search.luck blind_{f,g}:{0,1,2,3,4,5}

Regret, against the front of all configurations with their luck, of ten launches by somebody who knows everything but
the luck: the ten that fill most of the front without it, one by one. Regret is counted in the truth without luck for
this reason (:class:`benchmarks.search.surface.Surface`).
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.search.blind import Blind
from tuner.search.scan import nondominated


def left(usual: Blind, lucky: Blind, launches: int = 10) -> float:
    """The regret on ``lucky`` of what somebody launches who knows ``usual``, the same surface without luck."""
    rows, places = np.nonzero(usual._holds)
    points = np.column_stack([usual._cost[rows, places], usual._latency[rows, places]])
    front = set(map(tuple, nondominated(points)))
    best = sorted({row for row, point in zip(rows, points, strict=True) if tuple(point) in front})
    chosen: list[int] = []
    for _ in range(min(launches, len(best))):
        chosen.append(min((r for r in best if r not in chosen), key=lambda r: _regret(usual, [*chosen, r])))
    return _regret(lucky, chosen)


def _regret(surface: Blind, rows: list[int]) -> float:
    return surface.regret([point[1:] for row in rows for point in surface.at(row)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surfaces", nargs="+", metavar="blind_g:0")
    for word in parser.parse_args().surfaces:
        regret = left(Blind(word), Blind(word, lucky=True))
        print(f"{word}: ten launches by who knows all but the luck leave {regret:.3f}", flush=True)
