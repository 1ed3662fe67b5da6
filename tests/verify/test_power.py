import math

import numpy as np
import pytest

from tests.verify.test_repeats import table
from tests.verify.test_verification import Bench
from tuner.verify.power import power
from tuner.verify.repeats import Repeats

WORTH, TAIL = 0.01, 0.0225


def two(rounds=3, gain=-0.03, seed=0, **noise):
    return table(np.random.default_rng(seed), {"default": 0.0, "a": gain}, rounds, **{"launch": 0.02, **noise})


def shifted(values, by):
    return {(arm, *rest): value + by * (arm == "a") for (arm, *rest), value in values.items()}


def test_the_provable_difference_is_the_one_at_which_the_test_just_decides():
    values = two()
    found = power(Repeats(values), "a", "default", WORTH, TAIL)
    assert 0 < found.provable < 1
    middle = Repeats(values).difference("a", "default").mean
    doubts = [
        Repeats(shifted(values, math.log(found.provable) - middle + step)).difference("a", "default").doubt(-WORTH)
        for step in (-0.001, 0.001)
    ]
    assert doubts[0] < TAIL < doubts[1]


def test_more_launches_make_smaller_differences_provable():
    def typical(rounds):
        found = [power(Repeats(two(rounds, seed=seed)), "a", "default", WORTH, TAIL) for seed in range(9)]
        return float(np.median([one.provable for one in found]))

    assert typical(2) < typical(4) < typical(8) < 1


def test_so_many_more_rounds_are_named_as_make_the_test_decide_and_not_one_fewer():
    repeats = Repeats(two(2, gain=-0.06, seed=4))
    found = power(repeats, "a", "default", WORTH, TAIL)
    assert found.rounds and not found.windows
    assert repeats.difference("a", "default", found.rounds).doubt(-WORTH) < TAIL
    assert repeats.difference("a", "default", found.rounds - 1).doubt(-WORTH) > TAIL


@pytest.mark.parametrize(("rounds", "more", "freedom"), [(2, 1, 4), (2, 2, 3), (3, 3, 5), (4, 4, 7)])
def test_imagined_rounds_have_the_freedom_of_real_ones(rounds: int, more: int, freedom: int):
    """Up to three rounds of two arms the spread is of launches, beyond that of their differences within rounds."""
    values = two(rounds)
    launches, _ = Repeats(values).difference("a", "default", more).parts
    alone, _ = Repeats(values).difference("a", "default").parts
    assert launches == pytest.approx((alone[0] * rounds / (rounds + more), freedom))
    there, _ = Repeats(two(rounds + more)).difference("a", "default").parts
    assert there[1] == freedom


def test_a_difference_that_changes_from_window_to_window_needs_more_windows():
    values = two(4, gain=-0.06, launch=0.005)
    for (arm, number, window), value in values.items():
        values[arm, number, window] = value + (arm == "a") * {"w0": -0.04, "w1": 0.0, "w2": 0.04}[window]
    found = power(Repeats(values), "a", "default", WORTH, TAIL)
    assert found.windows > 0


def test_nothing_is_promised_to_prove_a_gain_that_is_not_worth_it():
    found = power(Repeats(shifted(two(4), 0.06)), "a", "default", WORTH, TAIL)
    assert found.rounds is None and found.seen > 1


def test_more_rounds_are_imagined_as_those_of_which_something_was_seen():
    """Of one launch of each, or of one that was not launched in the second round, nobody knows how launches differ."""
    once = {(arm, n, window): v for (arm, n, window), v in two(2, gain=-0.06).items() if (arm, n) != ("a", 1)}
    for values in (two(1, gain=-0.06), once):
        found = power(Repeats(values), "a", "default", WORTH, TAIL)
        assert (found.provable, found.rounds, found.windows) == (0, None, 0) and found.seen < 0.97


def test_the_verdict_says_what_could_have_been_proven_and_what_it_would_have_taken():
    found = Bench({"v0": 1.0, "v1": 1.05}, seed=3).verify("v1", launches=4)
    assert found.reason == "nothing-proven"
    assert (
        "v1 measured 4.2 % cheaper, but with these launches only a difference of about 5 % or more could" in found.text
    )
    assert "About 1 more launch of each would prove it" in found.text and found.more == 2


def test_the_verdict_says_that_one_launch_of_each_proves_nothing():
    found = Bench({"v0": 1.0, "v1": 1.3}, seed=3).verify("v1", launches=2)
    assert (
        found.is_default and "With one launch of each, no difference of any size could have been proven" in found.text
    )
