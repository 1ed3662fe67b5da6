import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import studies
from tuner.measure.quantile import summary
from tuner.pareto.choice import choose
from tuner.pareto.front import COST, Point, front, level, overlap, points
from tuner.space.config import ServingConfig
from tuner.study.outcome import Aborted, Infeasible, Measured, Step, Untrusted
from tuner.study.store import Store, TrialRecord
from tuner.verify.racing import end

OBJECTIVE = studies.objective()


def point(trial: int, cost: float, latency: float, ok: bool = True, spread: float = 0.0) -> Point:
    between = (cost * (1 - spread), cost * (1 + spread)), (latency * (1 - spread), latency * (1 + spread))
    config = ServingConfig("m", {}, {"max-num-seqs": trial})
    return Point(trial, 1.0, cost, latency, *between, baseline=False, ok=ok, config=config)


def dominates(a: Point, b: Point) -> bool:
    return a.cost <= b.cost and a.latency <= b.latency and (a.cost, a.latency) != (b.cost, b.latency)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.booleans()), max_size=25))
def test_the_front_is_exactly_the_points_within_slo_that_none_dominates(rows):
    given_points = [point(i, cost, latency, ok) for i, (cost, latency, ok) in enumerate(rows)]
    good = [p for p in given_points if p.ok]
    wanted = {p.trial for p in good if not any(dominates(q, p) for q in good)}
    found = front(given_points)
    assert {p.trial for p in found} == wanted
    assert [p.cost for p in found] == sorted(p.cost for p in found)


def test_points_whose_intervals_overlap_in_both_axes_are_ties_even_off_the_front():
    best, near, clear = point(1, 1.0, 0.020, spread=0.05), point(2, 1.05, 0.021, spread=0.05), point(3, 2.0, 0.05)
    found = front([best, near, clear])
    assert [p.trial for p in found] == [1]
    assert found[0].ties == ((2, 1.0),)


def test_costs_of_what_was_asked_for_differ_by_launches_and_not_by_the_traffic_that_all_share():
    asked = {"metrics": {"goodput_window_s": 27.0}, "windows": frozenset({"w"})}
    one, near, far = (replace(point(n, cost, 1.0, spread=0.3), **asked) for n, cost in enumerate((1.0, 1.08, 1.09)))
    assert level(one, near) and not level(one, far)
    assert not level(replace(one, trials=(0, 3, 4)), near)  # launched three times
    assert level(one, replace(far, windows=frozenset({"v"}))) and level(one, replace(far, metrics={}))


def test_an_end_that_equal_requests_leave_open_reaches_no_further_than_they_do():
    assert not overlap(0.02, (0.02, math.inf), 1.0, (0.9, 1.1))
    assert overlap(0.02, (0.01, math.inf), 0.1, (0.1, 0.2))
    assert end(0.02, (0.02, math.inf), 0.0, 0.95, low=True) < 0.01 < end(0.02, (0.019, 0.021), 0.0, 0.95, low=True)


def test_points_that_overlap_in_one_axis_only_are_told_apart():
    found = front([point(1, 1.0, 0.020, spread=0.05), point(2, 1.05, 0.015, spread=0.05)])
    assert [p.ties for p in found] == [(), ()]


@pytest.mark.parametrize(
    "outcome",
    [
        Infeasible("oom-kv", "out of memory"),
        # a server that died under load keeps the steps it served: they are no recommendation
        Infeasible("crash", "died", stage="under load", steps=(studies.step(1.0, OBJECTIVE, tpot_s=0.001),)),
        Untrusted(("client lag",), (studies.step(1.0, OBJECTIVE, tpot_s=0.001),)),
        Aborted("interrupt"),
        Measured((replace(studies.step(1.0, OBJECTIVE), untrusted=("throttled",)),)),
        Measured(()),
    ],
    ids=["out of memory", "died under load", "untrusted", "aborted", "untrusted step", "no step"],
)
def test_what_was_not_measured_has_no_point(tmp_path: Path, outcome):
    store = Store(tmp_path)
    studies.add(0, outcome, store)
    assert points(store.trials(), OBJECTIVE) == []


@pytest.mark.parametrize("name", ["cost_usd_per_mtok_output", "tpot_p99_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, None])
def test_a_crash_scored_as_zero_or_minus_one_is_not_the_best_configuration(tmp_path: Path, name, value):
    # the peers export the crash: its "latency" of 0.0 (or -1) beats every server that works
    store = Store(tmp_path)
    good = studies.step(1.0, OBJECTIVE)
    metrics = {**good.metrics, name: value}
    if value is None:
        del metrics[name]
    studies.measured(0, (good,), store)
    studies.measured(1, (replace(good, metrics=metrics),), store, params={"max_num_seqs": 64})
    assert [p.trial for p in front(points(store.trials(), OBJECTIVE))] == [0]


def test_failed_requests_make_a_point_dearer_not_faster(tmp_path: Path):
    # half of the requests fail at once, so that the served ones are fast: the peers leave the failed ones out
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.02, tokens_per_s=1000),), store)
    broken = studies.step(1.0, OBJECTIVE, tpot_s=0.01, tokens_per_s=1000, error_rate=0.5)
    studies.measured(1, (broken,), store, params={"max_num_seqs": 64})
    sound, failing = points(store.trials(), OBJECTIVE)
    assert failing.cost == pytest.approx(2 * sound.cost)
    assert not failing.ok and any("error_rate" in miss for miss in failing.misses)
    assert [p.trial for p in front([sound, failing])] == [0]


def test_the_requested_load_ranks_nothing(tmp_path: Path):
    # trial 1 was asked for three times the load and served no more than trial 0: it is not three times as cheap
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.020, tokens_per_s=1000),), store)
    studies.measured(
        1, (studies.step(3.0, OBJECTIVE, tpot_s=0.021, tokens_per_s=1000),), store, params={"max_num_seqs": 64}
    )
    assert [p.trial for p in front(points(store.trials(), OBJECTIVE))] == [0]


def test_every_load_of_a_ladder_is_a_point_and_the_missed_one_is_not_ok(tmp_path: Path):
    store = Store(tmp_path)
    steps = (studies.step(1.0, OBJECTIVE), studies.step(2.0, OBJECTIVE, tpot_s=0.08, tokens_per_s=2000))
    studies.measured(0, steps, store, baseline=True)
    found = points(store.trials(), OBJECTIVE)
    assert [(p.load, p.ok, p.baseline) for p in found] == [(1.0, True, True), (2.0, False, True)]
    assert found[1].misses == ("tpot_p99 80 ms > 50 ms",)


@pytest.mark.parametrize("windows", [1, 4])
def test_repeats_of_a_config_become_one_point_and_windows_make_its_interval_narrower(tmp_path: Path, windows):
    store, values = Store(tmp_path), (0.0200, 0.0202, 0.0199, 0.0201)
    for number, value in enumerate(values):
        step = studies.step(1.0, OBJECTIVE, tpot_s=value, window=f"search-{number % windows}")
        studies.measured(number, (step,), store, remeasure_of=0 if number else None)
    (found,) = points(store.trials(), OBJECTIVE)
    assert found.trials == (0, 1, 2, 3)
    assert found.latency == pytest.approx(math.prod(values) ** 0.25)
    low, high = found.latency_interval or (0, 0)
    assert low < found.latency < high and (high - low < 0.02 * 0.06) == (windows == 4)


@pytest.mark.parametrize("launches", [2, 4])
@pytest.mark.parametrize(("traffic", "spread"), [(0.02, 0.0), (0.02, 0.03), (0.0, 0.03)])
def test_the_interval_of_repeats_holds_the_truth_as_often_as_it_says(launches, traffic, spread):
    """All on one window: its traffic is the same for every launch."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        window, steps = rng.normal(0, traffic), []
        for off in rng.normal(0, spread, launches) + window:
            cost = math.exp(off)
            step = studies.step(1.0, OBJECTIVE)
            between = {COST: (cost * math.exp(-1.96 * traffic), cost * math.exp(1.96 * traffic))}
            steps.append(replace(step, metrics=step.metrics | {COST: cost}, intervals=between))
        low, high = _one_point(steps).cost_interval or (0, 0)
        held += low <= 1 <= high
    assert held >= 0.93 * 400


def test_repeats_of_a_percentile_of_few_requests_have_no_upper_end_either():
    rng, missed = np.random.default_rng(0), 0
    for _ in range(100):
        traffic, steps = np.exp(rng.normal(0, 0.5, 100)) / 100, []
        for off in rng.normal(0, 0.03, 2):
            value, between = summary(traffic * math.exp(off), 0.99)
            step = studies.step(1.0, OBJECTIVE)
            metrics = step.metrics | {"tpot_p99_s": value}
            steps.append(replace(step, metrics=metrics, intervals={"tpot_p99_s": between}))
        low, high = _one_point(steps).latency_interval or (0, 0)
        assert high == math.inf
        missed += low > math.exp(0.5 * 2.326) / 100
    assert missed <= 5


@pytest.mark.parametrize("value", [0.00731, 0.0123, 0.02, 0.0377, 0.041])
@pytest.mark.parametrize("launches", [2, 3, 5, 7])
def test_equal_repeats_without_intervals_are_their_value(value, launches):
    step = replace(studies.step(1.0, OBJECTIVE, tpot_s=value), intervals={})
    assert _one_point([step] * launches).latency_interval == (value, value)


@pytest.mark.parametrize("off", [0.02, 0.2])  # believed alone, and with what is assumed of launches
@pytest.mark.parametrize("windows", [1, 2, 3])
def test_what_repeats_differ_by_comes_on_top_of_their_intervals_where_they_share_a_window(off, windows):
    t = {2: 4.302653, 5: 2.570582}
    squares, half = 2 * off**2, math.log(1.05)
    spread = min(t[2] * math.sqrt(squares / 2 / 3), t[5] * math.sqrt((squares + 3 * 0.03**2) / 5 / 3))
    steps = []
    for n, log in enumerate((-off, 0.0, off)):
        value = 0.02 * math.exp(log)
        step = studies.step(1.0, OBJECTIVE, tpot_s=value, window=f"w{n % windows}")
        steps.append(replace(step, intervals={"tpot_p99_s": (value / 1.05, value * 1.05)}))
    share = {1: half, 2: half * math.hypot(2 / 3, 1 / 3), 3: half / math.sqrt(3)}[windows]
    reach = max(spread, share) if windows == 3 else math.hypot(spread, share)
    low, high = _one_point(steps).latency_interval or (0, 0)
    assert (math.log(0.02 / low), math.log(high / 0.02)) == pytest.approx((reach, reach))


def _one_point(steps: Sequence[Step]) -> Point:
    config = ServingConfig("m", {}, {})
    trials = [TrialRecord(n, Path(), config, Measured((s,)), {}, 0, 0, False) for n, s in enumerate(steps)]
    (found,) = points(trials, OBJECTIVE)
    return found


def test_an_interval_without_an_upper_end_does_not_reach_all_that_is_slower():
    assert overlap(0.02, (0.017, math.inf), 0.03, (0.026, math.inf))
    assert not overlap(0.02, (0.017, math.inf), 0.06, (0.05, math.inf))
    assert overlap(0.02, (0.0, math.inf), 0.06, (0.05, math.inf))  # nothing bounds it below either


def test_rounding_breaks_no_tie_between_repeats_that_are_equal_and_a_single_measurement(tmp_path: Path):
    store, values = Store(tmp_path), (0.36756983826927114, 1.3454545454545, 0.02)
    for number, (value, flag) in enumerate([(v, i) for i, v in enumerate(values) for _ in range(3)]):
        step = studies.step(1.0, OBJECTIVE)
        metrics = step.metrics | {"cost_usd_per_mtok_output": value, "tpot_p99_s": value / 100}
        for copy in range(2 if number % 3 else 1):  # at 0, 3, 6 a single one; its rival was measured twice or more
            config = {"max_num_seqs": 64 * 2**flag, "tensor_parallel_size": 1 + (number % 3 > 0)}
            studies.measured(2 * number + copy, (replace(step, metrics=metrics, intervals={}),), store, params=config)
    found = points(store.trials(), OBJECTIVE)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert (one.cost, one.latency) == (other.cost, other.latency) and len(other.trials) == 4
        assert one.cost_interval is None and other.cost_interval == (other.cost, other.cost)
        best = front([one, other])
        assert [p.ties for p in best] == [(other.key,), (one.key,)]


def test_repeats_that_disagree_widen_the_interval(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.020, spread=0.01),), store)
    studies.measured(1, (studies.step(1.0, OBJECTIVE, tpot_s=0.030, spread=0.01),), store, remeasure_of=0)
    (found,) = points(store.trials(), OBJECTIVE)
    low, high = found.latency_interval or (0, 0)
    assert low < 0.0202 and high > 0.0297


def test_repeats_of_which_the_intervals_reach_down_only_do_so_together(tmp_path: Path):
    store, step = Store(tmp_path), studies.step(1.0, OBJECTIVE, tpot_s=0.02)
    for number in range(2):
        step = replace(step, intervals={"tpot_p99_s": (0.01, 0.02)}, window=f"search-{number}")
        studies.measured(number, (step,), store)
    (found,) = points(store.trials(), OBJECTIVE)
    assert found.latency_interval == pytest.approx((0.02 * 2 ** -(0.5**0.5), 0.02))


def test_a_lucky_run_does_not_outvote_its_own_miss(tmp_path: Path):
    # "feasible if any one repeat passed" is a peer's rule
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.049),), store)
    studies.measured(1, (studies.step(1.0, OBJECTIVE, tpot_s=0.052),), store, remeasure_of=0)
    (found,) = points(store.trials(), OBJECTIVE)
    assert not found.ok and front([found]) == []


def test_a_launch_that_was_stopped_and_its_repeat_are_one_point_a_load_whichever_of_them_reached_it(tmp_path: Path):
    store, low, high = Store(tmp_path), studies.step(1.0, OBJECTIVE), studies.step(2.0, OBJECTIVE, tokens_per_s=1900)
    studies.add(0, Aborted("cannot beat the front at 95 %", (low,)), store)
    studies.measured(1, (low, high), store, remeasure_of=0)
    found = points(store.trials(), OBJECTIVE)
    assert [(p.load, p.trials, p.ok) for p in found] == [(1.0, (0, 1), True), (2.0, (1,), True)]
    chosen = choose(store.trials(), OBJECTIVE)
    assert chosen.point and (chosen.point.load, chosen.tied) == (2.0, ())


def test_verification_is_not_mixed_with_the_search(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.020),), store)
    studies.measured(1, (studies.step(1.0, OBJECTIVE, tpot_s=0.024, window="heldout-0"),), store, role="verify")
    assert [(p.role, p.latency) for p in points(store.trials(), OBJECTIVE)] == [("search", 0.020), ("verify", 0.024)]


def test_emulated_trials_are_left_out_beside_real_ones(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=0.001),), store, emulated=True)
    studies.measured(1, (studies.step(1.0, OBJECTIVE),), store, params={"max_num_seqs": 64})
    assert [p.trial for p in points(store.trials(), OBJECTIVE)] == [1]
