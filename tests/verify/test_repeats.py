import math

import numpy as np
import pytest
from scipy import stats

from tuner.verify.power import power
from tuner.verify.repeats import BLOCKS, Repeats, Spread

WINDOWS = ("w0", "w1", "w2")


def table(rng, arms, rounds, *, launch=0.02, drift=0.0, window=0.0, rest=0.0):
    """Measurements from the model: true means ``arms``, round drift, window and launch effects."""
    hard = rng.normal(0, window, len(WINDOWS))
    found = {}
    for number in range(rounds):
        warm = rng.normal(0, drift)
        for arm, true in arms.items():
            own = rng.normal(0, launch)
            for w, name in enumerate(WINDOWS):
                found[arm, number, name] = true + warm + hard[w] + own + rng.normal(0, rest)
    return found


def test_two_arms_in_every_round_give_the_paired_t_test():
    rng = np.random.default_rng(0)
    values = table(rng, {"a": 0.0, "b": 0.1}, 5, drift=0.3, window=0.5)
    repeats = Repeats(values)
    first, second = (np.array([np.mean([values[arm, r, w] for w in WINDOWS]) for r in range(5)]) for arm in "ab")
    expected = stats.ttest_rel(second, first)
    gap = repeats.difference("b", "a")
    assert gap.mean == pytest.approx(np.mean(second - first))
    assert gap.parts[0][1] == 4  # and nothing from windows: hard windows are hard for both
    assert gap.parts[1][0] == pytest.approx(0.0, abs=1e-12)
    assert gap.mean / gap.error == pytest.approx(expected.statistic, rel=1e-6)


def test_two_arms_in_few_rounds_give_the_t_test_of_two_samples():
    """Pairing would leave one degree of freedom of two."""
    values = table(np.random.default_rng(0), {"a": 0.0, "b": 0.1}, 2, window=0.5)
    first, second = (np.array([np.mean([values[arm, r, w] for w in WINDOWS]) for r in range(2)]) for arm in "ab")
    gap = Repeats(values).difference("b", "a")
    assert gap.parts[0][1] == 2
    statistic, _ = stats.ttest_ind(second, first)
    assert gap.mean / gap.error == pytest.approx(statistic, rel=1e-6)


def test_an_arm_that_was_launched_once_does_not_borrow_the_others_spread():
    values = table(np.random.default_rng(0), {"a": 0.0, "b": -0.1}, 3, launch=0.005)
    values = {key: value for key, value in values.items() if key[0] == "a" or key[1] == 0}
    assert Repeats(values).difference("b", "a").doubt() == 1.0
    assert Repeats(values).spread().freedom == 2 and 0 < Repeats(values).spread().variance < 0.01
    two = {key: value for key, value in values.items() if key[1] < 2}
    assert Repeats(two).difference("b", "a").doubt() == 1.0


def test_a_third_arm_says_nothing_of_what_launches_of_two_differ_by():
    rng = np.random.default_rng(1)
    loud = table(rng, {"a": 0.0, "b": 0.0}, 3, launch=0.1)
    quiet = {("c", number, w): 0.0 for number in range(1) for w in WINDOWS}
    assert Repeats(loud | quiet).difference("b", "a").error == pytest.approx(Repeats(loud).difference("b", "a").error)


def test_drift_and_hard_windows_cancel_in_a_difference_but_not_in_a_mean():
    rng = np.random.default_rng(1)
    repeats = Repeats(table(rng, {"a": 0.0, "b": -0.1}, 4, drift=0.2, window=0.3, launch=0.01))
    assert repeats.difference("b", "a").error < 0.02
    assert repeats.estimate("a").error > 0.1


def test_a_difference_that_changes_from_window_to_window_is_less_sure():
    rng = np.random.default_rng(2)
    values = table(rng, {"a": 0.0, "b": 0.0}, 4, launch=0.01)
    sure = Repeats(values).difference("b", "a").error
    for number in range(4):
        for shift, name in zip((-0.1, 0.0, 0.1), WINDOWS, strict=True):
            values["b", number, name] += shift
    assert Repeats(values).difference("b", "a").error > 3 * sure


def test_a_difference_is_as_sure_as_the_windows_say_where_launches_are_all_alike():
    shifts = dict(zip(WINDOWS, (-0.1, 0.0, 0.1), strict=True))
    values = {(arm, n, w): shifts[w] * (arm == "b") for arm in "ab" for n in range(4) for w in WINDOWS}
    assert Repeats(values).difference("b", "a").error == pytest.approx(stats.sem([*shifts.values()]))


def test_what_neither_launch_nor_window_explains_counts_once():
    """It is in what launches differ by, and in what windows do."""
    rounds, width = 4, len(WINDOWS)
    values = table(np.random.default_rng(11), {"a": 0.0, "b": 0.0}, rounds, rest=0.01, window=0.05)
    for i, name in enumerate(WINDOWS):  # the difference itself changes from window to window
        values |= {("b", n, name): values["b", n, name] + 0.05 * i for n in range(rounds)}
    cells = {arm: np.array([[values[arm, n, w] for w in WINDOWS] for n in range(rounds)]) for arm in "ab"}
    left = [c - c.mean(axis=1, keepdims=True) - c.mean(axis=0) + c.mean() for c in cells.values()]
    rest = sum(float(np.sum(x**2)) for x in left) / (2 * (rounds - 1) * (width - 1))
    own = cells["a"].mean(axis=0).var(ddof=1) / width - rest / (rounds * width)
    assert Repeats(values).estimate("a").parts[1] == (pytest.approx(own), width - 1)
    gaps = (cells["b"] - cells["a"]).mean(axis=0).var(ddof=1) / width - 2 * rest / (rounds * width)
    assert Repeats(values).difference("b", "a").parts[1] == (pytest.approx(gaps), width - 1)
    three = table(np.random.default_rng(11), {"a": 0.0, "b": 0.0, "c": 0.0}, rounds, rest=0.01, window=0.05)
    assert Repeats(three).difference("b", "a").parts[1][1] == 2 * (width - 1)


def test_arms_that_left_the_race_early_still_count_with_what_they_have():
    rng = np.random.default_rng(3)
    values = table(rng, {"a": 0.0, "b": -0.1, "c": 0.2}, 4, launch=0.005)
    values = {key: value for key, value in values.items() if not (key[0] == "c" and key[1] > 1)}
    repeats = Repeats(values)
    assert repeats.count("c") == 2 and repeats.count("a") == 4
    assert repeats.difference("c", "a").mean == pytest.approx(0.2, abs=0.02)
    assert repeats.difference("c", "a").error > repeats.difference("b", "a").error
    _, sure, less_sure = np.std(repeats.draws(4000, 0), axis=0)
    assert less_sure == pytest.approx(math.sqrt(4 / 2) * sure, rel=0.1)


def test_a_launch_that_missed_a_window_is_left_out():
    values = table(np.random.default_rng(4), {"a": 0.0}, 3)
    del values["a", 1, "w2"]
    assert Repeats(values).count("a") == 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_arms_that_no_round_links_are_not_compared_in_any_currency(scale: float):
    """a was measured in round 3 only, the others in rounds 0 to 2: least squares would still give a number."""
    values = table(np.random.default_rng(4), {"a": 0.0, "b": 0.0, "c": 0.0}, 4, launch=0.001)
    values = {key: value + math.log(scale) for key, value in values.items() if (key[0] == "a") == (key[1] == 3)}
    repeats = Repeats(values)
    assert repeats.linked("a") == {"a"} and repeats.linked("b") == {"b", "c"} and not repeats.linked("d")
    unknown = repeats.difference("b", "a")
    assert math.isnan(unknown.mean) and unknown.doubt() == 1.0 and not unknown.known
    assert repeats.difference("c", "b").known
    best = np.bincount(np.argmin(repeats.draws(4000, 0), axis=1)) / 4000
    assert best == pytest.approx(1 / 3, abs=0.05)
    assert power(repeats, "b", "a", 0.01, 0.025).provable == 0.0


def test_arms_are_compared_by_way_of_others():
    values = table(np.random.default_rng(4), {"a": 0.0, "b": 0.1, "c": 0.2}, 4, launch=0.001)
    values = {key: v for key, v in values.items() if (key[0], key[1] > 1) not in {("a", True), ("c", False)}}
    repeats = Repeats(values)
    assert repeats.linked("a") == {"a", "b", "c"}
    assert repeats.difference("c", "a").mean == pytest.approx(0.2, abs=0.01)


def test_one_launch_each_proves_nothing():
    repeats = Repeats(table(np.random.default_rng(5), {"a": 0.0, "b": -0.5}, 1))
    assert repeats.difference("b", "a").doubt() == 1.0
    assert repeats.estimate("a").interval() == (-math.inf, math.inf)


def test_a_spread_learnt_in_the_search_makes_few_launches_speak():
    """Two launches 4 % apart: one degree of freedom makes t 12.7, sixteen make it 2.1."""
    values = {("a", number, w): 0.04 * number for number in (0, 1) for w in WINDOWS}
    alone, helped = Repeats(values), Repeats(values, Spread(0.0008, 15))
    width = [high - low for low, high in (r.estimate("a").interval() for r in (alone, helped))]
    assert width[0] == pytest.approx(2 * 12.706 * 0.02, rel=0.01)
    assert width[1] == pytest.approx(2 * 2.12 * 0.02, rel=0.01)


def test_windows_that_look_alike_by_chance_count_as_different_as_their_own_traffic_makes_them():
    values = table(np.random.default_rng(10), {"a": 0.0}, 4, launch=0.001)
    sure = Repeats(values).estimate("a").error
    stated = Repeats(values, None, dict.fromkeys(values, 0.05**2)).estimate("a")
    assert sure < 0.002
    assert stated.error == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert stated.parts[1][1] == len(WINDOWS) - 1 + BLOCKS * len(WINDOWS)  # surer than three windows alone make it
    wide = table(np.random.default_rng(10), {"a": 0.0}, 4, window=0.3)
    assert Repeats(wide, None, dict.fromkeys(wide, 0.05**2)).estimate("a") == Repeats(wide).estimate("a")


def test_drift_of_the_session_does_not_average_out():
    """The search saw launches differ by 5 % over hours, these rounds by 1 %: the mean may be 5 % off."""
    values = table(np.random.default_rng(7), {"a": 0.0, "b": 0.0}, 6, launch=0.01)
    assert Repeats(values, Spread(0.05**2, 30)).estimate("a").error > 0.03
    calm = Repeats(values, Spread(0.001**2, 30))  # or less than these rounds: together they tell, and all averages out
    assert calm.estimate("a").parts[0] == pytest.approx((calm.total().variance / 6, calm.total().freedom))


@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize("drift, window", [(0.0, 0.0), (0.05, 0.03)])
def test_differences_cover_the_truth_as_often_as_they_say(drift: float, window: float, rounds: int):
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(400):
        repeats = Repeats(table(rng, {"a": 0.0, "b": -0.1, "c": 0.0}, rounds, drift=drift, window=window, rest=0.01))
        low, high = repeats.difference("b", "a").interval()
        hits += low <= -0.1 <= high
    assert 0.92 <= hits / 400 <= 0.985


def test_the_probability_of_being_best_follows_the_evidence():
    clear = Repeats(table(np.random.default_rng(9), {"a": 0.0, "b": -0.2}, 4))
    equal = Repeats(table(np.random.default_rng(9), {"a": 0.0, "b": 0.0}, 4))
    below = [float(np.mean(r.draws(4000, 0)[:, 1] < r.draws(4000, 0)[:, 0])) for r in (clear, equal)]
    assert below[0] > 0.99
    assert 0.05 < below[1] < 0.95
