"""How well the search foresees crashes: log-loss of its probability on configurations that were not launched.

    python -m benchmarks.search.crashes

After 8, 16 and 30 launches (drawn at random, or half of them near a configuration that works, as a search draws them)
every other configuration is asked about: on seven problems whose crashes all say the same (the surfaces of this
folder, and random ones where one value and two pairs of values never work) and on the six scenarios of the blind
surfaces, whose crashes have messages. ``false alarms`` is the share that really works of what is believed to work with
less than 20 %: a search misses those. Beside the beliefs as shipped: what they are without the messages.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.search.run import load_surface
from tuner.search.candidates import Candidates
from tuner.search.causes import Causes
from tuner.search.reading import cause
from tuner.search.surrogate import Array, Codes
from tuner.space.space import SearchSpace
from tuner.study.outcome import Infeasible

POOL, REPEATS, LAUNCHES = 1000, 6, (8, 16, 30)
SILENT = "it died"


def problems() -> Iterator[tuple[str, SearchSpace, Codes, list[str | None]]]:
    """(kind, space, codes of the pool, what each crashes with: None where it works)."""
    for name in ("dense", "experts", "abstract"):
        s = load_surface(name)
        pool = Candidates.of(s.space, 0, asked=True)
        m = s.metrics(pool.params[:POOL], s.loads[0])
        works = (m["short_bytes"] <= 0) & (m["crash_p"] < 0.5)
        yield "all alike", s.space, pool.codes(list(range(POOL))), [None if ok else SILENT for ok in works]
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
        yield "all alike", space, codes, [None if ok else SILENT for ok in works]
    for name, k in itertools.product(("blind_a", "blind_b"), range(3)):
        s = load_surface(f"{name}:{k}")
        pool = Candidates.of(s.space, k)
        said = [s.source.reason(params, k) for params in pool.params[:POOL]]
        yield "with messages", s.space, pool.codes(list(range(POOL))), said


def by_causes(space: SearchSpace, codes: Codes, said: Sequence[str | None], asked: Codes) -> Array:
    """What the conditions that crashes share say."""
    causes = Causes(space)
    causes.learn(codes, [None if text is None else cause(Infeasible("died", text)) for text in said])
    return causes.works(asked)


def beliefs(space: SearchSpace, codes: Codes, said: Sequence[str | None], asked: Codes) -> dict[str, Array]:
    """Probabilities of serving, as :class:`tuner.search.beliefs.Posterior` has them, and the messages unread."""
    return {
        "as shipped": by_causes(space, codes, said, asked),
        "the messages unread": by_causes(space, codes, [text and SILENT for text in said], asked),
    }


def draw(codes: np.ndarray, works: np.ndarray, near: bool, count: int, rng: Any) -> np.ndarray:
    if not near:
        return rng.choice(POOL, count, replace=False)
    star = rng.choice(np.nonzero(works)[0])
    close = np.argsort((codes != codes[star]).sum(1) + rng.random(POOL))[:60]
    halves = (rng.choice(close, count // 2, replace=False), rng.choice(POOL, count - count // 2, replace=False))
    return np.unique(np.concatenate(halves))


def main() -> None:
    loss: dict[tuple[str, str], list[float]] = defaultdict(list)
    alarms: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for kind, space, codes, said in problems():
        works = np.array([text is None for text in said])
        for repeat, near, count in itertools.product(range(REPEATS), (False, True), LAUNCHES):
            seen = draw(codes, works, near, count, np.random.default_rng([repeat, near, count, 3]))
            rest = np.setdiff1d(np.arange(POOL), seen)
            for name, works_p in beliefs(space, codes[seen], [said[i] for i in seen], codes[rest]).items():
                p = np.clip(works_p, 1e-3, 1 - 1e-3)
                loss[name, kind].append(float(-np.log(np.where(works[rest], p, 1 - p)).mean()))
                alarms[name, kind] += works[rest][p < 0.2].tolist()
    names, kinds = (list(dict.fromkeys(key[i] for key in loss)) for i in (0, 1))
    print("| beliefs | " + " | ".join(f"{k}: log-loss | false alarms" for k in kinds) + " |")
    print("|---|" + "---|---|" * len(kinds))
    for name in names:
        cells = (f"{np.mean(loss[name, k]):.3f} | {np.mean(alarms[name, k]):.0%}" for k in kinds)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
