import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests import studies
from tuner.errors import NothingFeasible, UsageError
from tuner.pareto.changes import describe
from tuner.pareto.choice import Change, choose, compare, nearest, of_trial
from tuner.pareto.front import front, points
from tuner.spec.slo import parse
from tuner.study.outcome import Infeasible, Measured, Outcome, Step
from tuner.study.price import COST
from tuner.study.store import Store

OBJECTIVE = studies.objective()
FASTER = {"max_num_batched_tokens": 8192}


def served(tokens_per_s: float, tpot_s: float = 0.02, load: float = 1.0, **more):
    return (studies.step(load, OBJECTIVE, tokens_per_s=tokens_per_s, tpot_s=tpot_s, **more),)


def test_the_cheapest_configuration_within_slo_is_chosen_and_compared_with_the_default(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000), store, baseline=True)
    studies.measured(1, served(2000, load=2.0), store, params=FASTER)
    studies.measured(2, served(9000, tpot_s=0.09), store, params={"max_num_seqs": 512})  # cheapest, but misses
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 1 and choice.baseline and choice.baseline.trial == 0
    assert choice.cost_change and choice.cost_change.value == pytest.approx(-0.5) and choice.cost_change.proven
    assert "max-num-batched-tokens=8192" in choice.text and "-50.0 %" in choice.text


def test_a_flag_that_measured_slower_than_the_default_at_equal_cost_is_not_chosen(tmp_path: Path):
    """Trial 1 beats the default by a hair, and not trial 2, whose interval is wider."""
    store = Store(tmp_path)
    intervals = (
        {"tpot_p99_s": (0.00694, math.inf)},
        {"tpot_p99_s": (0.0069, math.inf)},
        {"tpot_p99_s": (0.0068, math.inf)},
    )
    measured = [served(1000, tpot_s=at)[0] for at in (0.00695, 0.00691, 0.00699)]
    steps = [replace(one, intervals={**one.intervals, **own}) for one, own in zip(measured, intervals, strict=True)]
    studies.measured(0, steps[:1], store, baseline=True)
    studies.measured(1, steps[1:2], store, params=FASTER | {"max_num_seqs": 512})
    studies.measured(2, steps[2:], store, params={"max_num_seqs": 512})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.baseline and 1 in {p.trial for p in choice.tied}


def test_a_trial_picked_by_hand_stands_with_its_cheapest_step_within_slo(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000), store, baseline=True)
    both = served(1500, tpot_s=0.01, load=1.0) + served(2000, tpot_s=0.02, load=2.0)
    studies.measured(1, both, store, params=FASTER)
    studies.measured(2, served(9000, tpot_s=0.09), store, params={"max_num_seqs": 512})  # misses
    choice = of_trial(store.trials(), OBJECTIVE, 1)
    assert choice.by_hand and choice.point and choice.point.load == 2.0
    assert choice.cost_change and choice.cost_change.value == pytest.approx(-0.5)
    studies.measured(3, served(1900, tpot_s=0.02, load=2.0), store, params=FASTER)  # trial 1's configuration again
    again = of_trial(store.trials(), OBJECTIVE, 3).point
    assert again and again.trial == 3 and again.trials == (1, 3)
    with pytest.raises(NothingFeasible, match="Trial 2 met the SLOs at no load"):
        of_trial(store.trials(), OBJECTIVE, 2)
    with pytest.raises(UsageError, match="there is no trial 7"):
        of_trial(store.trials(), OBJECTIVE, 7)


def test_a_launch_of_the_verification_is_not_picked_for_it_stands_for_one_window(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000), store, baseline=True)
    studies.measured(1, served(2000), store, params=FASTER)
    studies.measured(2, served(9000, load=9.0), store, params=FASTER, role="verify")
    with pytest.raises(UsageError, match="trial 2 is a launch of the verification, not of the search") as refused:
        of_trial(store.trials(), OBJECTIVE, 2)
    assert refused.value.fix == "Trial 1 is the same configuration in the search"
    studies.measured(3, served(900), store, params={"max_num_seqs": 512}, role="ablate")
    with pytest.raises(UsageError, match="trial 3 is a launch of the ablation, not of the search"):
        of_trial(store.trials(), OBJECTIVE, 3)
    picked = of_trial(store.trials(), OBJECTIVE, 1)
    assert picked.cost_change and picked.cost_change.value == pytest.approx(-0.5)


def test_one_point_is_marked_as_chosen_also_where_it_was_measured_again(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000, tpot_s=0.01), store, baseline=True)
    studies.measured(1, served(2000), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    best = front(points(store.trials(), OBJECTIVE))
    assert choice.off(best) is None and [choice.marks(p, best) for p in best] == [True, False]
    again = replace(choice, point=replace(choice.point, role="verify"))
    assert again.off(best) is again.point and not any(again.marks(p, best) for p in best)
    assert again.marks(again.point, best)


def test_of_equally_cheap_configurations_the_faster_is_chosen(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(500), store, baseline=True)
    studies.measured(1, served(1010, tpot_s=0.040), store, params=FASTER)
    studies.measured(2, served(1000, tpot_s=0.020), store, params={"max_num_seqs": 512, **FASTER})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 2
    assert [p.trial for p in choice.tied] == [1] and "cannot be told apart from trial 1" in choice.text


def test_what_cannot_be_told_apart_falls_to_the_default(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000, tpot_s=0.0202), store, baseline=True)
    studies.measured(1, served(1010, tpot_s=0.0200), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.baseline and "nothing measured is proven to be better" in choice.text
    assert choice.cost_change is None and choice.latency_change is None


def test_what_another_beats_at_its_own_price_is_not_chosen(tmp_path: Path):
    """Trial 1 is the fastest of those whose cost cannot be told apart, each at its cheapest load; trial 2 is as cheap
    and faster at the same load, and cheaper at a higher one: that it offers. Their latencies have no upper ends, as
    those of few requests have none."""
    store = Store(tmp_path)

    def step(load: float, usd: float, tpot_s: float):
        ends = {"tpot_p99_s": (tpot_s * 0.96, math.inf), COST: (usd * 0.7, usd * 1.4)}
        metrics = {COST: usd, "tpot_p99_s": tpot_s, "ttft_p99_s": 0.1}
        return Step(load, "w", metrics, ends)

    studies.measured(0, (step(1.0, 0.3, 0.045),), store, baseline=True)
    studies.measured(1, (step(4.2, 0.124, 0.0356),), store, params=FASTER)
    faster = (step(4.2, 0.124, 0.0236), step(5.6, 0.0994, 0.040))
    studies.measured(2, faster, store, params={"max_num_seqs": 512, "kv_cache_dtype": "fp8", **FASTER})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and (choice.point.trial, choice.point.load, choice.tied) == (2, 5.6, ())


def test_what_beats_the_default_is_chosen_and_not_its_configurations_slower_step(tmp_path: Path):
    store = Store(tmp_path)

    def step(load: float, usd: float, tpot_s: float):
        ends = {"tpot_p99_s": (tpot_s * 0.96, tpot_s * 1.04), COST: (usd * 0.97, usd * 1.03)}
        return Step(load, "w", {COST: usd, "tpot_p99_s": tpot_s, "ttft_p99_s": 0.1}, ends)

    studies.measured(0, (step(2.0, 0.350, 0.020),), store, baseline=True)
    studies.measured(1, (step(1.9, 0.349, 0.015), step(2.0, 0.345, 0.045)), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and (choice.point.trial, choice.point.latency) == (1, 0.015)


def asked(load: float, tpot_s: float) -> Step:
    """A step whose goodput counts what was asked for: whoever holds a load costs the same. The intervals are the
    traffic's."""
    usd = 0.25 / load
    ends = {"tpot_p99_s": (tpot_s * 0.9, tpot_s * 1.1), COST: (usd * 0.8, usd * 1.25)}
    metrics = {COST: usd, "tpot_p99_s": tpot_s, "ttft_p99_s": 0.1, "goodput_window_s": 27.0}
    return Step(load, "w", metrics, ends)


def test_of_two_loads_of_one_launch_the_cheaper_is_no_draw_and_no_trial_is_tied_with_itself(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (asked(0.5, 0.040),), store, baseline=True)
    studies.measured(1, (asked(1.25, 0.036),), store, params=FASTER)
    studies.measured(2, (asked(1.25, 0.025), asked(1.5, 0.045)), store, params={"max_num_seqs": 512})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and (choice.point.trial, choice.point.load, choice.tied) == (2, 1.5, ())
    assert "told apart" not in choice.text


def test_of_what_holds_one_load_the_faster_is_chosen_and_of_loads_as_near_as_launches_are(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (asked(0.5, 0.040),), store, baseline=True)
    studies.measured(1, (asked(1.5, 0.045),), store, params=FASTER)
    studies.measured(2, (asked(1.5, 0.030),), store, params={"max_num_seqs": 512})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 2 and [p.trial for p in choice.tied] == [1]
    assert "cannot be told apart from trial 1:" in choice.text
    studies.measured(3, (asked(1.45, 0.020),), store, params={"max_num_seqs": 64})
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and (choice.point.trial, choice.point.load) == (3, 1.45)
    assert "from trial 2, 1 (launches are taken to differ by 3 %):" in choice.text


def test_a_cost_is_called_proven_by_what_decides_ties(tmp_path: Path):
    """The traffic's intervals overlap in both cases, and both configurations saw the same traffic."""
    store = Store(tmp_path)
    studies.measured(0, (asked(1.25, 0.040),), store, baseline=True)
    studies.measured(1, (asked(1.5, 0.040),), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 1 and choice.tied == ()
    assert choice.cost_change and choice.cost_change.proven and "not proven" not in choice.text
    assert "-16.7 % (-23.3 to -9.4 %) (launches are taken to differ by 3 %)" in choice.text
    studies.measured(2, (asked(1.3, 0.020),), store, params={"max_num_seqs": 64})
    by_hand = of_trial(store.trials(), OBJECTIVE, 2)
    assert by_hand.cost_change and not by_hand.cost_change.proven


def test_another_type_of_gpu_is_a_change_and_not_the_engines_default():
    default = studies.space().config({}, "m")
    assert describe(replace(default, gpu="L40S"), replace(default, gpu="H100")) == "gpu=L40S"


def test_without_intervals_a_cent_decides(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000, intervals={}), store, baseline=True)
    studies.measured(1, served(1010, intervals={}), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 1
    assert choice.cost_change and not choice.cost_change.proven and "no interval known" in choice.text


def test_the_search_chooses_from_the_search_alone(tmp_path: Path):
    # verification replays at loads and on windows of its own: its steps would mix with the ladder's
    store = Store(tmp_path)
    studies.measured(0, served(1000), store, baseline=True)
    studies.measured(1, served(3000, load=9.0), store, params=FASTER, role="verify")
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.point.trial == 0 and "not yet verified" in choice.text


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Infeasible("oom-kv", "no room."), "default cannot serve: no room."),
        (Infeasible("killed", "killed", transient=True), "default was not measured: see trial 0."),
        (Measured(served(1000, tpot_s=0.5)), "default meets the SLOs at no measured load."),
    ],
)
def test_a_default_that_has_no_point_is_said_why(tmp_path: Path, outcome: Outcome, said: str):
    store = Store(tmp_path)
    studies.add(0, outcome, store, baseline=True)
    studies.measured(1, served(1000), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.baseline is None and said in choice.text


def test_when_nothing_meets_the_slos_the_nearest_is_named_with_its_distance(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000, tpot_s=0.10), store, baseline=True)
    studies.measured(1, served(1000, tpot_s=0.06), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point is None and choice.nearest and choice.nearest.trial == 1
    assert choice.nearest.excess == pytest.approx(0.2)
    assert "20 % over" in choice.text and "tpot_p99 60 ms > 50 ms" in choice.text


def test_the_nearest_is_judged_by_its_worst_slo(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1000, tpot_s=0.051, ttft_s=5.0), store)  # 2 % and 900 % over
    studies.measured(1, served(1000, tpot_s=0.10), store, params=FASTER)  # 100 % over
    found = nearest(store.trials(), OBJECTIVE)
    assert found and found.trial == 1 and found.excess == pytest.approx(1.0)
    strict = nearest(store.trials(), replace(OBJECTIVE, slos=(*OBJECTIVE.slos, parse("error_rate=0%"))))
    assert strict and strict.excess == pytest.approx(1.0)  # what may be missed by nothing is not missed


def test_a_step_without_a_finite_latency_can_be_the_only_nearest(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=math.inf, error_rate=1.0),), store)
    found = nearest(store.trials(), OBJECTIVE)
    assert found and math.isinf(found.excess) and "no finite latency" in found.text


def test_where_nothing_was_measured_the_reasons_are_counted(tmp_path: Path):
    store = Store(tmp_path)
    assert choose([], OBJECTIVE).text == "No trial has finished yet."
    for number in range(3):
        studies.add(number, Infeasible("oom-kv", f"{number + 1} GiB short", "ValueError: no room"), store)
    studies.add(3, Measured(()), store)
    assert choose(store.trials(), OBJECTIVE).text == (
        "No configuration was measured: 3 x oom-kv, 1 x no trusted step. "
        "For example trial 0: 1 GiB short (ValueError: no room)."
    )


def test_the_interval_of_a_change_covers_the_truth_about_95_times_in_100():
    rng = random.Random(3)
    truth, error, covered = 0.8, 0.04, 0
    for _ in range(1000):
        a, b = 0.8 * math.exp(rng.gauss(0, error)), math.exp(rng.gauss(0, error))
        half = math.exp(1.96 * error)
        change = compare(a, (a / half, a * half), b, (b / half, b * half))
        low, high = change.interval or (0, 0)
        covered += low <= truth - 1 <= high
    assert 930 <= covered <= 970


def test_a_change_is_lowest_where_the_one_is_low_and_the_other_high():
    assert compare(1.0, (0.8, 1.0), 1.0, (1.0, 1.0)).interval == pytest.approx((-0.2, 0.0))
    assert compare(1.0, (1.0, 1.0), 1.0, (0.8, 1.0)).interval == pytest.approx((0.0, 0.25))


def test_where_slos_hold_and_figures_are_none_no_slo_is_blamed(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tpot_s=-0.01),), store)
    text = choose(store.trials(), OBJECTIVE).text
    assert "no configuration meets" not in text.lower() and "but has no tpot_p99_s above zero" in text


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (None, "-3.0 %"),
        ((-0.05, 0.01), "-3.0 % (-5.0 to +1.0 %)"),
        ((-0.05, math.inf), "-3.0 % (-5.0 % or more)"),
        ((-1.0, 0.01), "-3.0 % (+1.0 % or less)"),
        ((-1.0, math.inf), "-3.0 % (no bound known)"),
    ],
)
def test_a_change_says_as_much_of_its_interval_as_is_known(interval, said):
    assert str(Change(-0.03, interval)) == said


def test_a_default_that_is_slower_and_no_dearer_than_launches_differ_is_not_chosen(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, served(1010, tpot_s=0.040), store, baseline=True)
    studies.measured(1, served(1000, tpot_s=0.020), store, params=FASTER)
    choice = choose(store.trials(), OBJECTIVE)
    assert choice.point and choice.baseline and choice.point.trial == 1 and choice.baseline.cost < choice.point.cost
