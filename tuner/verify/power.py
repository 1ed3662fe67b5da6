"""What a verification that proved nothing could have proven, and what would have been needed to prove what was seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.verify.repeats import Repeats

MOST_ROUNDS = 30  # nobody launches a configuration more often than that
MOST_WINDOWS = 30


@dataclass(frozen=True, slots=True)
class Power:
    """About the arm ``label``: ``provable`` is the cost over the default's from which on these measurements would have
    proven it cheaper (0.9: 10 % cheaper; 0: nothing would have); ``seen`` what they showed. ``rounds`` more rounds (a
    launch of each of the two) and ``windows`` more held-out windows would prove ``seen``, if all differs as before;
    None where it is no gain worth a flag, or where 30 rounds on 30 more windows would not do either.
    """

    label: str
    provable: float
    seen: float
    rounds: int | None = None
    windows: int = 0


def power(costs: Repeats, label: str, base: str, worth: float, tail: float) -> Power:
    """The proof asked for is "cheaper than ``base`` by more than ``worth``" with ``tail`` of doubt left (one-sided)."""
    now = costs.difference(label, base)
    provable = math.exp(-(worth + now.reach(tail))) if now.known else 0.0
    seen = math.exp(now.mean)
    if now.mean >= -worth or not now.known:  # a spread that nothing was seen of is not known to be none
        return Power(label, provable, seen)
    for windows in (0, 1, 2, 4, 8, 16, MOST_WINDOWS):
        for rounds in range(MOST_ROUNDS + 1):
            imagined = costs.difference(label, base, rounds, windows)
            if imagined.mean + imagined.reach(tail) < -worth:
                return Power(label, provable, seen, rounds, windows)
    return Power(label, provable, seen)
