"""The simulated day against small calculations that owe it nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.fleet import made
from tuner.fleet import day, requests
from tuner.fleet.curve import Point, curve, limits_of
from tuner.fleet.day import Traffic
from tuner.fleet.headroom import allowed_rps, table
from tuner.fleet.plan import Plan, Pool
from tuner.spec.slo import parse

BOTH = pytest.mark.parametrize("simulate", [day.simulate, requests.simulate], ids=["windows", "requests"])
LIMITS, _ = limits_of(made.SLOS)


def fixed(replicas, hours, *, spot=False, start_h=0.0, allowed=10.0):
    """So many replicas in every hour."""
    pool = Pool(0, "a", spot, 1.0, 1.0, start_h, start_h, 0, "GPU", 1)
    counts = np.full((1, hours), replicas)
    return Plan((pool,), counts, counts, counts * 0, np.zeros(hours), np.full((1, hours), allowed), 0.0, 0.0)


def serves(points, slos=made.SLOS):
    """An offer with (rate, inside) as its curve and latencies that never miss."""
    fine = {"ttft_p50_s": 0.1, "ttft_p99_s": 0.5, "tpot_p50_s": 0.01, "tpot_p99_s": 0.02, "e2e_mean_s": 0.5}
    known = [Point(rate, inside, fine | {"error_rate": 0.0}) for rate, inside in points]
    return replace(made.offer(), curve=curve(known, limits_of(slos)[0]))


def traffic(*rates, routing="random"):
    return Traffic(np.array(rates, float), 0.0, routing, 60.0)


def test_a_replica_of_five_servers_holds_as_many_requests_as_erlang_says():
    servers, each_rps, rate = 5, 0.1, 0.3  # M/M/c
    offered = rate / each_rps
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    waits = last / (sum(terms) + last)  # Erlang C
    inside = offered + waits * (offered / servers) / (1 - offered / servers)

    offer = serves([(each_rps * n, n) for n in range(1, servers + 1)])
    found = requests.simulate(fixed(1, 24), [offer], traffic(*[rate] * 24))
    assert found.inside.mean() == pytest.approx(inside, rel=0.04)


@BOTH
def test_what_arrives_above_the_top_rate_piles_up_and_the_hours_in_which_it_waits_are_missed(simulate):
    # one replica, 10 requests/s at the most with 5 inside: at 12 an hour leaves 7,200 behind, at 4 they take 1,200 s
    offer = serves([(1, 0.5), (10, 5)])
    found = simulate(fixed(1, 4), [offer], traffic(4, 12, 4, 4, routing="least-loaded"))
    assert found.holds.tolist() == [True, False, False, True]
    assert found.inside[1] == pytest.approx(7200 / 2, rel=0.06)
    assert found.inside[2] == pytest.approx(7200 / 2 * 1200 / 3600 + 2, rel=0.12)
    assert found.counted[0, 1] > 0.95  # TTFT
    assert found.counted[0, 2] == pytest.approx(1 / 3, abs=0.05)  # those that came while 12 or more waited per second
    assert found.counted[1].max() < 0.011  # a wait is no time between tokens


def test_an_hour_without_requests_has_a_plan_and_what_hours_share_is_never_too_high():
    offer = made.offer(rps=2)
    found = table((offer,), np.array([0.0, 5.0, 5.1, 50.0]), 0.0, "two-choices", 60.0)[0]
    exact = [allowed_rps(offer, total, 0.0, "two-choices", 60.0) for total in (5.0, 5.1, 50.0)]
    assert found[0] > 0 and (found[1:] <= np.array(exact) + 1e-9).all() and found[1:] == pytest.approx(exact, rel=0.02)


def test_below_the_top_rate_a_replica_fills_and_empties_as_fast_as_requests_pass_through():
    found = serves([(1, 0.5), (10, 5)]).curve
    for rate, before, rest, pass_s in ((4.0, 0.0, 2.0, 0.5), (4.0, 5.0, 2.0, 0.5), (0.0, 5.0, 0.0, 0.5)):
        after, _ = found.follow(np.array([before]), np.array([rate]), pass_s)
        assert after == pytest.approx(rest + (before - rest) * math.exp(-1))


def test_both_simulations_count_the_same():
    offer = made.offer(rps=2)
    plan, given = fixed(6, 3, allowed=2.0), traffic(4, 8, 10.5)
    by_windows, by_requests = (s(plan, [offer], given) for s in (day.simulate, requests.simulate))
    assert by_windows.counted[0] == pytest.approx(by_requests.counted[0], abs=0.02)  # 0, 0 and 8 %
    assert by_windows.counted[1] == pytest.approx(by_requests.counted[1], rel=0.06)
    assert by_windows.holds.tolist() == by_requests.holds.tolist() == [True, True, False]


@BOTH
def test_spot_machines_are_gone_for_the_share_of_time_that_their_rate_and_start_up_say(simulate):
    offer = serves([(0.1, 0.1), (100, 100)])  # one second inside, at every rate
    plan = fixed(10, 12, spot=True, start_h=0.1)
    found = simulate(plan, [offer], traffic(*[2.0] * 12), interruptions_per_hour=4.0, seed=3)
    there = 2.0 / found.inside.mean()  # Little: requests/s times a second, over the replicas that were there
    assert there == pytest.approx(10 / (1 + 4 * 0.1), rel=0.05)


@BOTH
def test_a_spare_is_lost_all_day(simulate):
    offer = serves([(0.1, 0.1), (100, 100)])
    found = simulate(fixed(4, 2), [offer], traffic(3.0, 3.0), spare=1)
    assert found.inside.mean() == pytest.approx(1.0, rel=0.05)


@BOTH
def test_a_request_that_nobody_serves_is_beyond_every_limit(simulate):
    slos = [*made.SLOS, parse("e2e_mean=1s")]
    found = simulate(fixed(0, 2), [serves([(1, 1), (10, 10)], slos)], traffic(0.0, 1.0))
    assert found.counted[:, 1].tolist() == [1, 1, 1, math.inf]
    assert found.holds.tolist() == [True, False]  # in the first hour nobody asked


def test_a_day_is_simulated_the_same_again_with_the_same_seed():
    offer, plan, given = made.offer(rps=10), fixed(5, 3), traffic(30, 40, 45)
    one, again, other = (day.simulate(plan, [offer], given, seed=seed) for seed in (1, 1, 2))
    assert (one.counted == again.counted).all()
    assert (one.counted != other.counted).any()


def share_beyond(offer, rate, window_s, swing, noise):
    """The share of requests beyond the TTFT limit over many windows at random rates, drawn one by one."""
    means = rate * np.exp(swing * noise.standard_normal(200_000) - swing**2 / 2) if swing else rate
    counts = noise.poisson(means * window_s, 200_000)
    rates = counts / window_s
    inside = offer.curve.holds_inside(rates) + np.maximum(rates - offer.curve.top_rps, 0) * window_s / 2
    return float((offer.curve.score(inside)[0] * counts).sum() / counts.sum())


@pytest.mark.parametrize("swing", [0.0, 0.1, 0.3, 0.5])
def test_headroom_is_the_highest_rate_whose_mean_over_windows_is_allowed(swing):
    offer, noise = made.offer(rps=10), np.random.default_rng(0)
    rate = allowed_rps(offer, 100, swing, "random", 60.0)
    assert rate < 10
    less, more = (share_beyond(offer, rate * factor, 60, swing, noise) for factor in (0.98, 1.02))
    assert less < 0.01 < more


def test_headroom_shrinks_with_swing_and_grows_with_balanced_routing():
    offer = made.offer(rps=10)
    plain = allowed_rps(offer, 1000, 0.0, "random", 60.0)
    assert allowed_rps(offer, 1000, 0.2, "random", 60.0) < plain
    assert plain < allowed_rps(offer, 1000, 0.0, "least-loaded", 60.0) <= offer.capacity[1]


def test_a_curve_goes_through_the_measured_points_and_never_falls():
    scattered = [made.point(s, 10) for s in (0.2, 0.5, 0.9, 1.0)]
    scattered[1] = replace(scattered[1], inside=scattered[1].inside * 3)  # a slow launch: more inside than at 0.9
    found = curve(scattered, LIMITS)
    assert np.all(np.diff(found.inside) > 0)
    assert np.all(np.diff(found.score(np.linspace(0.1, 60, 200)), axis=1) >= -1e-12)
    exact = curve([made.point(s, 10) for s in (0.2, 0.5, 1.0)], LIMITS)
    assert exact.score(exact.inside)[0, -1] == pytest.approx(0.01)  # at the top rate ttft_p99 is at its limit
    assert exact.holds_inside(np.array([5.0])) == pytest.approx(5 * 2)
    slower = curve([made.point(s, 10) for s in (0.2, 0.5, 1.0)], LIMITS, stretch=0.9)
    assert slower.top_rps == pytest.approx(9)
    assert slower.score(slower.inside)[0, -1] == pytest.approx(0.01)  # the same, at nine tenths of the rate
