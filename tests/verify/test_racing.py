import dataclasses

import numpy as np
import pytest

from tests.studies import objective, space, step
from tuner.measure.quantile import summary
from tuner.pareto.front import Point
from tuner.verify.racing import UNKNOWN, end, log_error, should_stop

WANT = objective()
LADDER = (1.0, 2.0, 3.0, 4.0)


def point(cost: float, latency: float, *, trial: int = 0, launches: int = 1, spread: float = 0.01) -> Point:
    intervals = [(v * (1 - spread), v * (1 + spread)) for v in (cost, latency)]
    config = space().config({}, "m")
    trials = tuple(range(trial, trial + launches))
    return Point(trial, 3.0, cost, latency, *intervals, False, True, config, trials=trials)


def steps(cost: float, tpot_s: float, load: float = 1.0):
    """One measured step at ``load``; the cost of ``studies.step`` is 2.5 USD/h over its tokens."""
    return [step(load, WANT, tokens_per_s=2.5 / 3600 * 1e6 / cost, tpot_s=tpot_s, spread=0.01)]


def test_a_trial_far_behind_the_front_at_every_load_left_stops_with_the_reason():
    """At load 4 it would cost 1.0 / 4 at best, and 0.04 s: the front has 0.1 at 0.02 s."""
    why = should_stop(steps(1.0, 0.04), [point(0.1, 0.02, trial=7)], LADDER, WANT)
    assert "cannot beat the front at 95 %" in why and "trial 7" in why


def test_a_trial_that_may_still_become_cheaper_goes_on():
    """At load 4 it may cost 0.25: less than the front's 0.3."""
    assert should_stop(steps(1.0, 0.04), [point(0.3, 0.02)], LADDER, WANT) == ""


def test_a_trial_that_is_faster_than_the_front_goes_on_however_dear():
    assert should_stop(steps(1.0, 0.01), [point(0.1, 0.02)], LADDER, WANT) == ""


def test_what_is_within_the_noise_of_launches_does_not_stop_a_trial():
    """Best case 0.25 against 0.245: 2 % apart, launches differ by 3 %."""
    assert should_stop(steps(1.0, 0.0201), [point(0.245, 0.02)], LADDER, WANT) == ""
    assert should_stop(steps(1.0, 0.04), [point(0.245, 0.02)], LADDER, WANT, spread=0.001) != ""


@pytest.mark.parametrize("unsure", ["", "own cost", "own latency", "its cost", "its latency"])
def test_every_figure_counts_at_the_end_that_spares_the_trial(unsure):
    """Beaten by 4 % in both axes: enough where all four figures are exact, not where one is off by up to 10 %."""

    def around(value, name):
        off = 0.1 if name == unsure else 1e-6
        return (value * (1 - off), value * (1 + off))

    between = {"cost_usd_per_mtok_output": around(1.0, "own cost"), "tpot_p99_s": around(0.02, "own latency")}
    its = {"cost_interval": around(0.24, "its cost"), "latency_interval": around(0.0192, "its latency")}
    mine, rival = dataclasses.replace(steps(1.0, 0.02)[0], intervals=between), point(0.24, 0.0192)
    why = should_stop([mine], [dataclasses.replace(rival, **its)], (1.0, 4.0), WANT, spread=1e-6)
    assert bool(why) == (not unsure)


def test_one_load_that_can_still_win_is_enough_to_go_on():
    """Load 2 is beaten by the cheap point, load 4 would be cheaper than all."""
    front = [point(0.4, 0.02), point(0.3, 0.03)]
    assert should_stop(steps(1.0, 0.04), front, (1.0, 2.0), WANT) != ""
    assert should_stop(steps(1.0, 0.04), front, LADDER, WANT) == ""


def test_nothing_is_stopped_before_a_step_without_a_front_or_at_the_ladders_end():
    assert should_stop([], [point(0.1, 0.01)], LADDER, WANT) == ""
    assert should_stop(steps(1.0, 0.04), [], LADDER, WANT) == ""
    assert should_stop(steps(1.0, 0.04, load=4.0), [point(0.01, 0.01)], LADDER, WANT) == ""
    untrusted = [dataclasses.replace(steps(1.0, 0.04)[0], untrusted=("client lag",))]
    assert should_stop(untrusted, [point(0.01, 0.01)], LADDER, WANT) == ""


@pytest.mark.parametrize("requests", [60, 100, 360])
def test_equal_latencies_of_few_requests_are_rarely_called_beaten(requests):
    """A tenfold cheaper front of equal latency: whether the trial stops rests on two p99 that have no upper end."""
    rng, stopped, key = np.random.default_rng(1), 0, WANT.latency_key
    for _ in range(300):
        p99s = [summary(0.02 * np.exp(rng.normal(0, 0.03) + rng.normal(0, 0.8, requests)), 0.99) for _ in range(2)]
        (mine, between), (its, around) = p99s
        own = steps(1.0, mine)[0]
        own = dataclasses.replace(own, metrics=own.metrics | {key: mine}, intervals={**own.intervals, key: between})
        rival = dataclasses.replace(point(0.1, its), latency_interval=around)
        stopped += bool(should_stop([own], [rival], (1.0, 2.0), WANT))
    assert stopped <= 15


def test_limits_widen_with_the_interval_and_the_launch_spread():
    narrow = end(1.0, (0.99, 1.01), 0.0, 0.95, low=True)
    assert end(1.0, (0.9, 1.1), 0.0, 0.95, low=True) < narrow < 1.0
    assert end(1.0, (0.99, 1.01), 0.05, 0.95, low=True) < narrow
    assert end(1.0, None, 0.03, 0.95, low=False) == pytest.approx(1.0506, abs=0.0005)  # e^(1.645 x 0.03)


def test_a_point_is_as_sure_as_its_interval_and_its_launches_make_it():
    """Of a percentile without an upper end the lower half says it, where there is one."""
    twice = dataclasses.replace(point(1.0, 0.02, launches=4), latency_interval=(0.016, np.inf))
    inside = np.log(1.01 / 0.99) / (2 * 1.96)
    assert log_error(twice, "cost", 0.06) == pytest.approx(np.hypot(inside, 0.06 / 2))
    assert log_error(twice, "latency", 0.06) == pytest.approx(np.hypot(np.log(0.02 / 0.016), 0.06 / 2))
    nothing = dataclasses.replace(twice, latency_interval=(0.02, np.inf))
    assert log_error(nothing, "latency", 0.0) == UNKNOWN
