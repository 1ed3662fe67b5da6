"""The plan is the cheapest that there is: held against every plan there could be."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet import made
from tuner.errors import UsageError
from tuner.fleet import programme
from tuner.fleet.plan import Pool, Terms, needs, pools_of
from tuner.fleet.programme import solve

MOST = 4  # replicas of a kind that the search by hand tries


def pool(index, usd, *, ahead_h=0.0, late_h=0, gpus=1, spot=False, available=1.0):
    return Pool(index, f"p{index}", spot, usd, available, ahead_h + late_h, ahead_h, late_h, f"g{index}", gpus)


def by_hand(pools, need, allowed, terms):
    """The lowest cost over all plans, from what ``docs/fleet.md`` says a plan must obey; None without one."""
    hours, many = len(need), len(pools)
    size = [[allowed[p][h] * pools[p].available for h in range(hours)] for p in range(many)]

    def serves(ready, h):
        for used in itertools.product(*(range(n + 1) for n in ready)):
            whole = sum(n * size[p][h] for p, n in enumerate(used))
            lost = terms.spare * max((size[p][h] for p, n in enumerate(used) if n), default=0.0)
            if whole - lost >= need[h] - 1e-9:
                return True
        return False

    def shared(paid, ready, h):
        """Whether the spot machines, needed or not, are no more of the capacity than they may be."""
        spot = sum(n * size[p][h] for p, n in enumerate(paid) if pools[p].spot)
        rest = sum(n * size[p][h] for p, n in enumerate(ready) if not pools[p].spot)
        return spot <= terms.spot_share * (spot + rest) + 1e-9

    columns = [
        [n for n in itertools.product(range(MOST + 1), repeat=many) if need[h] == 0 or serves(n, h)]
        for h in range(hours)
    ]
    best = math.inf
    for plan in itertools.product(*columns):  # plan[h][p]
        starts = [[max(plan[h][p] - plan[h - 1][p], 0) if hours > 1 else 0 for h in range(hours)] for p in range(many)]
        cost = sum(
            pools[p].usd_per_hour * (plan[h][p] + pools[p].ahead_h * starts[p][h])
            for p in range(many)
            for h in range(hours)
        )
        if cost >= best:
            continue
        uptime = min(terms.min_uptime_h, hours)
        kept = all(
            plan[h][p] >= sum(starts[p][h - j] for j in range(uptime)) for p in range(many) for h in range(hours)
        )
        ready = [
            tuple(min(plan[h - j][p] for j in range(min(pools[p].late_h, hours - 1) + 1)) for p in range(many))
            for h in range(hours)
        ]
        room = all(
            sum((plan[h - 1][p] + starts[p][h]) * pools[p].gpus for p in range(many) if name in ("", pools[p].gpu))
            <= most
            for name, most in terms.max_gpus.items()
            for h in range(hours)
        )
        share = all(shared(plan[h], ready[h], h) for h in range(hours))
        if kept and room and share and all(need[h] == 0 or serves(ready[h], h) for h in range(hours)):
            best = cost
    return best if best < math.inf else None


@st.composite
def problems(draw):
    hours = draw(st.integers(1, 3))
    many = draw(st.integers(1, 2))
    spot = many == 2 and draw(st.booleans())
    numbers = st.sampled_from([0.0, 0.5, 1.0, 1.7, 2.5, 3.0])
    pools = []
    for p in range(many):
        usd = draw(st.sampled_from([1.0, 1.3, 1.9, 2.6, 4.1]))
        late = draw(st.integers(0, 1))
        pools.append(
            pool(
                p,
                usd,
                ahead_h=draw(st.sampled_from([0.0, 0.1, 0.7])),
                late_h=late,
                gpus=draw(st.integers(1, 2)),
                spot=spot and p == 1,
                available=0.9 if spot and p == 1 else 1.0,
            )
        )
    need = [draw(numbers) for _ in range(hours)]
    allowed = [[draw(st.sampled_from([1.0, 1.5, 2.0, 3.0]))] * hours for _ in range(many)]
    bounds = draw(st.sampled_from([{}, {}, {"": 5}, {"g0": 2}]))
    terms = Terms(
        spare=draw(st.integers(0, 1)),
        spot_share=draw(st.sampled_from([0.3, 0.6])) if spot else 0.0,
        min_uptime_h=draw(st.integers(1, 3)),
        max_gpus=bounds,
    )
    return pools, need, allowed, terms


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_plan_is_cheaper_than_the_plan(problem):
    pools, need, allowed, terms = problem
    best = by_hand(pools, need, allowed, terms)
    found = solve(pools, np.array(need), np.array(allowed), terms)
    if best is None:
        # more than MOST of a kind may still do where nothing bounds it
        assert found is None or found.replicas.max() > MOST
        return
    assert found is not None
    if found.replicas.max() <= MOST:
        assert found.usd == pytest.approx(best, abs=1e-6)
    else:
        assert found.usd <= best + 1e-6


def test_a_mix_of_kinds_beats_either_alone():
    large, small = pool(0, 2.0), pool(1, 1.1)
    plan = solve([large, small], np.array([13.0]), np.array([[10.0], [4.0]]), Terms(spare=0))
    assert plan.replicas.tolist() == [[1], [1]]


def test_the_spare_is_of_the_largest_kind_in_use():
    large, small = pool(0, 2.0), pool(1, 1.1)
    plan = solve([large, small], np.array([9.0]), np.array([[10.0], [4.0]]), Terms(spare=1))
    served = plan.ready[:, 0] * np.array([10, 4])
    assert served.sum() - max(size for size, n in zip((10, 4), plan.ready[:, 0], strict=True) if n) >= 9


def test_a_replica_that_starts_too_late_is_paid_in_the_hour_before():
    offer = made.offer(rps=10, start_s=1800.0)
    need = np.array([5.0, 5.0, 15.0, 5.0])
    allowed = np.full((1, 4), 10.0)
    known = solve(pools_of([offer], Terms(spare=0)), need, allowed, Terms(spare=0))
    late = Terms(spare=0, lead_s=0.0)
    surprised = solve(pools_of([offer], late), need, allowed, late)
    assert known.replicas[0].tolist() == [1, 1, 2, 1]
    assert surprised.replicas[0].tolist() == [1, 2, 2, 1]
    assert surprised.ready[0].tolist() == [1, 1, 2, 1]
    assert known.usd == 2 * 5 + 2 * 0.5  # the start-up is paid before its hour
    assert surprised.usd == 2 * 6  # the start-up is in the hour that is paid


def test_of_a_start_up_only_what_is_known_ahead_is_paid_beside_the_hours():
    terms = Terms(spare=0, lead_s=900.0)
    plan = solve(
        pools_of([made.offer(rps=10, start_s=1800.0)], terms), np.array([5.0, 15.0, 5.0]), np.full((1, 3), 10.0), terms
    )
    assert plan.replicas[0].tolist() == [2, 2, 1]
    assert plan.usd == pytest.approx(2 * 5 + 2 * 0.25)


def test_spot_machines_are_used_up_to_their_share_and_counted_for_the_time_that_they_serve():
    terms = Terms(spare=0, spot_share=0.5, spot_price=0.4, interruptions_per_hour=1.0)
    pools = pools_of([made.offer(rps=10, start_s=360.0)], terms)
    assert [p.available for p in pools] == [1.0, pytest.approx(1 / 1.1)]
    plan = solve(pools, np.array([100.0]), np.full((2, 1), 10.0), terms)
    spot = plan.ready[1, 0] * 10 / 1.1
    assert spot <= 0.5 * plan.capacity_rps[0] + 1e-9
    assert plan.ready[1, 0] == 5
    assert plan.capacity_rps[0] >= 100


def test_a_plan_for_a_million_requests_per_second_is_within_a_hundredth_of_a_per_cent_of_the_cheapest():
    offers = [made.offer("a", rps=11.3, usd=2.1), made.offer("b", rps=29.7, usd=5.2)]
    need = made.day(1e6).rate_rps[::3]
    allowed = np.repeat([[11.3], [29.7]], 8, axis=1)
    plan = solve(pools_of(offers, Terms()), need, allowed, Terms(), seconds=500)
    assert plan.gap <= 1e-4
    assert (plan.capacity_rps >= need).all()


@pytest.mark.parametrize(
    ("need", "small", "large"),
    [
        ([5] * 6 + [1000] * 6, (10, 1.2), (100, 9.5)),
        ([20, 20, 20, 300, 600, 1000, 1000, 600, 300, 20], (10, 1.1), (40, 4.0)),
    ],
)
def test_a_large_fleet_keeps_no_large_spare_for_hours_in_which_small_kinds_serve(monkeypatch, need, small, large):
    pools, terms = [pool(0, small[1]), pool(1, large[1])], Terms(spare=1)
    allowed = np.array([[small[0]] * len(need), [large[0]] * len(need)], float)
    found = solve(pools, np.array(need, float), allowed, terms)
    monkeypatch.setattr(programme, "WHOLE", 0)  # as where the whole programme takes too long
    quick = solve(pools, np.array(need, float), allowed, terms)
    monkeypatch.setattr(programme, "EXACT", 10**6)
    exact = solve(pools, np.array(need, float), allowed, terms)
    assert exact.usd - 1e-6 <= found.usd <= exact.usd * (1 + 1e-4)
    assert quick.usd >= exact.usd - 1e-6 and quick.usd * (1 - quick.gap) <= exact.usd + 1e-6


def test_what_was_needed_is_kept_around_the_circle():
    assert needs(np.array([1.0, 5.0, 2.0, 1.0]), 1).tolist() == [1, 5, 5, 2]
    assert needs(np.array([1.0, 2.0, 5.0]), 1).tolist() == [5, 2, 5]


def test_spot_machines_that_must_run_on_are_not_more_than_their_share():
    terms = Terms(spot_share=0.5, spot_price=0.3, interruptions_per_hour=0.05, min_uptime_h=4)
    pools = pools_of([made.offer(rps=10)], terms)
    plan = solve(pools, np.array([30.0, 30, 0, 10, 60, 30, 30, 10]), np.full((2, 8), 10.0), terms)
    spot = plan.ready[1] * 10 * pools[1].available
    assert (spot <= 0.5 * plan.capacity_rps + 1e-9).all()


NIGHT = [20, 20, 20, 300, 600, 1000, 1000, 600, 300, 20]  # requests per second, by hour


def large_fleet(need=NIGHT):
    """Small ones serve the night; a large one in use at every hour keeps its spare there, too."""
    pools = [pool(0, 1.1), pool(1, 4.0)]
    return pools, np.array(need, float), np.repeat([[10.0], [40.0]], len(need), axis=1), Terms(spare=1)


def out_of_time(monkeypatch, least):
    """The whole programme finds, of ``least`` small ones at every hour, the best, and does not know it."""
    run = programme._Programme._run

    def cut(self, low, high, seconds, gap=0.0, *, integers=True):
        if not integers or low.any():
            return run(self, low, high, seconds, gap, integers=integers)
        if least is None:
            raise UsageError("no plan was found in time")
        low[0, 0] = least
        found = run(self, low, high, seconds, gap)
        found.status, found.mip_dual_bound = 1, 0.0 if least else found.mip_dual_bound
        return found

    monkeypatch.setattr(programme._Programme, "_run", cut)


def test_what_was_found_in_half_of_the_time_is_planned_where_it_is_cheaper_with_the_gap_to_the_best_bound(monkeypatch):
    best = solve(*large_fleet())
    out_of_time(monkeypatch, least=0)
    plan = solve(*large_fleet())
    assert plan.usd == pytest.approx(best.usd) and 0 <= plan.gap <= programme.GAP


@pytest.mark.parametrize("least", [None, 80])
def test_where_half_of_the_time_finds_nothing_or_what_is_dear_a_kind_is_taken_for_the_largest(monkeypatch, least):
    monkeypatch.setattr(programme, "WHOLE", 0)
    quick = solve(*large_fleet())
    monkeypatch.undo()
    out_of_time(monkeypatch, least)
    plan = solve(*large_fleet())
    assert (plan.usd, plan.gap) == pytest.approx((quick.usd, quick.gap))


def test_what_is_taken_without_the_whole_programme_says_its_gap(monkeypatch):
    best = solve(*large_fleet())
    monkeypatch.setattr(programme, "WHOLE", 0)
    quick = solve(*large_fleet())
    assert quick.gap >= 1 - best.usd / quick.usd > 0.01
