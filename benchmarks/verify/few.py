"""How often two configurations of equal cost are told apart after few launches each (one-sided, 2.5 % are allowed).

    python -m benchmarks.verify.few

Two arms in two and three rounds on three windows; ``ratio`` is by how much more the launches of one differ than those
of the other, ``drift`` what rounds differ by, in units of the quieter arm's launches. Beside the rule that is used
(:meth:`tuner.verify.repeats.Repeats.difference`) the paired t test on the same launches. The reach is the median
distance of the interval's ends from its middle, in the same units.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tuner.verify import repeats
from tuner.verify.repeats import Repeats

REPEATS, WINDOWS, SD = 4_000, ("w0", "w1", "w2"), 0.02
TAIL = 0.025


def launches(rng: np.random.Generator, rounds: int, ratio: float, drift: float) -> Mapping[tuple[str, int, str], float]:
    """Log costs of one verification: nothing but launches and rounds differs."""
    found = {}
    for number in range(rounds):
        warm = rng.normal(0, drift * SD)
        for arm, sd in (("a", SD), ("b", ratio * SD)):
            own = warm + rng.normal(0, sd)
            found |= {(arm, number, w): own + rng.normal(0, SD / 10) for w in WINDOWS}
    return found


def told_apart(rounds: int, ratio: float, drift: float, seed: int = 0) -> tuple[float, float]:
    """(Share of verifications in which b is called cheaper, median reach in units of the launches)."""
    rng, cheaper, reach = np.random.default_rng(seed), 0, []
    for _ in range(REPEATS):
        gap = Repeats(launches(rng, rounds, ratio, drift)).difference("b", "a")
        reach.append(gap.reach(TAIL))
        cheaper += gap.mean + reach[-1] < 0
    return cheaper / REPEATS, float(np.median(reach)) / SD


def main() -> None:
    print("| rounds | ratio | drift | called cheaper | reach | paired: called cheaper | reach |")
    print("|" + "---|" * 7)
    few = repeats.FEW
    for rounds in (2, 3):
        for ratio, drift in ((1, 0), (1, 1), (1, 3), (2, 0), (3, 0), (5, 0)):
            row = [*told_apart(rounds, ratio, drift)]
            repeats.FEW = 0
            row += told_apart(rounds, ratio, drift)
            repeats.FEW = few
            rule, reach, paired, its = row
            print(f"| {rounds} | {ratio} | {drift} | {rule:.1%} | {reach:.1f} | {paired:.1%} | {its:.1f} |", flush=True)


if __name__ == "__main__":
    main()
