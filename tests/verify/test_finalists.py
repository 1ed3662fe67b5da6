from pathlib import Path

import pytest

from tests.studies import objective, space, step
from tuner.pareto.front import points
from tuner.study.outcome import Measured
from tuner.study.store import TrialRecord
from tuner.verify.finalists import launch_sd, launch_spread, may_be_best, shortlist
from tuner.verify.racing import LAUNCH_SPREAD
from tuner.verify.repeats import Spread

LADDER = (1.0, 2.0, 3.0)
WANT = objective()


def trial(
    number: int, batch: int, tokens_per_s: float, *, load: float = 2.0, role: str = "search", **more
) -> TrialRecord:
    """A measured trial whose cost is the price over ``tokens_per_s``."""
    config = space().config({"max_num_batched_tokens": batch}, "m")
    steps = (step(load, WANT, tokens_per_s=tokens_per_s, **more),)
    return TrialRecord(number, Path("."), config, Measured(steps), config.params, 0, 0, batch == 2048, role=role)


def default():
    return space().config(space().default(), "m")


def test_one_far_ahead_is_the_only_finalist():
    found = shortlist([trial(0, 2048, 1000), trial(1, 4096, 2000), trial(2, 1024, 1100)], WANT, default(), LADDER)
    assert [f.label for f in found.finalists] == ["trial 1"]
    assert found.finalists[0].promise > 0.99
    assert found.baseline.baseline and found.baseline.load == 2.0 and found.baseline.value


def test_those_that_cannot_be_told_apart_are_all_in_the_lowest_latency_first():
    trials = [trial(0, 2048, 1000), trial(1, 4096, 2000, ttft_s=0.4, tpot_s=0.04), trial(2, 1024, 1995, tpot_s=0.02)]
    found = shortlist(trials, WANT, default(), LADDER)
    assert [f.trial for f in found.finalists] == [2, 1]


def test_more_in_doubt_than_can_be_verified_are_cut_and_counted():
    batches = (512, 1024, 4096, 8192)
    trials = [trial(0, 2048, 1000), *(trial(i + 1, b, 2000 + i) for i, b in enumerate(batches))]
    found = shortlist(trials, WANT, default(), LADDER, most=2)
    assert len(found.finalists) == 2 and found.in_doubt == 4
    assert "the first 2 are verified" in found.text


def test_a_default_that_met_no_slo_is_verified_at_the_lowest_load():
    found = shortlist([trial(0, 2048, 1000, ttft_s=9.0), trial(1, 4096, 2000)], WANT, default(), LADDER)
    assert found.baseline.load == 1.0 and found.baseline.value is None
    assert found.baseline.baseline and not found.finalists[0].baseline


def test_a_default_that_is_alone_is_not_called_none_of_none():
    found = shortlist([trial(0, 2048, 1000)], WANT, default(), LADDER)
    assert found.text == "no other configuration met the SLOs in the search, so the default alone is measured."


def test_verification_begins_where_the_searchs_steps_point_to():
    config = space().config(space().default(), "m")
    steps = (step(1.0, WANT, ttft_s=0.125, tpot_s=0.01), step(2.0, WANT, ttft_s=0.25, tpot_s=0.01))
    one = TrialRecord(0, Path("."), config, Measured(steps), config.params, 0, 0, True)
    assert shortlist([one], WANT, default(), LADDER).baseline.load == pytest.approx(4.0)  # TTFT 500 ms, and no errors


def test_what_missed_the_slos_or_was_measured_in_verification_is_no_finalist():
    trials = [trial(0, 2048, 1000), trial(1, 4096, 5000, ttft_s=9.0), trial(2, 1024, 9000, role="verify")]
    assert shortlist(trials, WANT, default(), LADDER).finalists == ()


def test_repeats_in_the_search_tell_how_much_launches_differ():
    assert launch_spread([trial(0, 2048, 1000)]).freedom == 0
    # the first is why it was measured again, so it does not count: variance of log(1, 1.1, 0.9)
    seen = launch_spread([trial(i, 2048, 1000 * factor) for i, factor in enumerate((2.0, 1.0, 1.1, 0.9))])
    assert seen.freedom == 2
    assert seen.variance == pytest.approx(0.0101, abs=0.0005)
    more = [trial(i, 2048, 1000 * factor, role="verify") for i, factor in enumerate((1.0, 2.0, 3.0))]
    assert launch_spread([*(trial(i, 2048, 1000) for i in range(2)), *more]).freedom == 0  # on other windows, later


def test_launches_that_differ_by_nothing_leave_the_cheapest():
    same = [trial(i, 2048 if i < 5 else 4096, 1000 if i < 5 else 1001, spread=0.0) for i in range(10)]
    found = shortlist(same, WANT, default(), LADDER)
    assert [f.trial for f in found.finalists] == [5] and "assuming" not in found.text


def test_costs_of_what_was_asked_for_teach_nothing_of_launches_latencies_do():
    repeats = [trial(i, 2048, 1000, tpot_s=0.02 * factor) for i, factor in enumerate((1.0, 1.0, 1.1, 0.9, 1.0))]
    for one in repeats:
        one.outcome.steps[0].metrics["goodput_window_s"] = 27.0
    assert launch_spread(repeats).freedom == 0
    assert (
        "assuming that launches differ by 3 %"
        in shortlist([*repeats, trial(5, 4096, 2000)], WANT, default(), LADDER).text
    )
    assert launch_spread(repeats, WANT.latency_key).freedom == 3


def test_a_point_measured_often_is_surer_of_its_place():
    """10 % apart with 5 % launch spread: open after one launch each, decided after nine."""
    once = [trial(0, 2048, 1000), trial(1, 4096, 1100)]
    often = [trial(i, 2048 if i % 2 else 4096, 1000 if i % 2 else 1100, spread=0.001) for i in range(18)]
    assert len(may_be_best(points(once, WANT), 0.05)) == 2
    assert len(may_be_best(points(often, WANT), 0.05)) == 1


def test_what_launches_differ_by_is_assumed_until_repeats_tell():
    assert launch_sd(Spread(0.01, 3.0)) == (pytest.approx(0.1), True)
    assert launch_sd(Spread(0.01, 2.0)) == (LAUNCH_SPREAD, False)
