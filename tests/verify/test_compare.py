import io
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.studies import objective, space, step
from tests.verify.test_finalists import trial
from tuner.errors import UsageError
from tuner.report.terminal import comparison_table
from tuner.study.outcome import Measured
from tuner.study.store import TrialRecord
from tuner.verify.compare import Side, compare

WANT = objective()


def side(name: str, *trials, **facts) -> Side:
    return Side(name, trials, WANT, facts)


def test_a_front_that_is_cheaper_at_every_latency_wins_with_significance():
    first = side("old", trial(0, 2048, 1000, tpot_s=0.02), trial(1, 4096, 1500, tpot_s=0.03))
    second = side("new", trial(0, 2048, 2000, tpot_s=0.02), trial(1, 4096, 3000, tpot_s=0.03))
    found = compare(first, second)
    assert {level.winner for level in found.levels} == {2}
    assert found.levels[0].ratio[1] < 0.5 < found.levels[0].ratio[2] < 1
    assert "**new** is cheaper at 2 of 2 latencies" in found.text
    assert found.rows[0]["proven"] == "new"


def test_the_same_study_twice_is_not_told_apart():
    trials = (trial(0, 2048, 1000, tpot_s=0.02), trial(1, 4096, 1500, tpot_s=0.03))
    found = compare(side("a", *trials), side("b", *trials))
    assert {level.winner for level in found.levels} == {0}
    assert "At none of 2 latencies is either proven cheaper" in found.text
    assert "Nothing else differs" in found.text


def test_what_verification_measured_again_is_no_point_of_the_front():
    """One easy window of it would be the cheapest of all, and prove one of two equal searches cheaper."""
    trials = (trial(0, 2048, 1000, tpot_s=0.02), trial(1, 4096, 1500, tpot_s=0.03))
    easy = trial(2, 4096, 4000, tpot_s=0.02, role="verify")
    found = compare(side("a", *trials, easy), side("b", *trials))
    assert {level.winner for level in found.levels} == {0}


def test_the_larger_of_two_studies_of_equal_truth_is_not_called_cheaper():
    proven = 0
    for seed in range(10):
        rng = random.Random(seed)
        small, large = (
            [
                replace(one, config=replace(one.config, flags={"x": i}))
                for i in range(n)
                for one in [trial(i, 0, 1000 * rng.lognormvariate(0, 0.05), spread=0.1)]
            ]
            for n in (5, 200)
        )
        found = compare(side("small", *small), side("large", *large))
        proven += any(level.winner for level in found.levels)
        assert all(level.ratio[1] <= level.ratio[0] <= level.ratio[2] for level in found.levels)
    assert proven <= 1


def test_a_side_that_offers_nothing_at_a_latency_loses_it():
    first = side("slow", trial(0, 2048, 1000, tpot_s=0.04))
    second = side("fast", trial(0, 2048, 1000, tpot_s=0.01))
    found = compare(first, second)
    assert math.isinf(found.levels[0].first) and found.levels[0].winner == 2
    assert found.rows[0]["cost slow"] is None
    assert (found.rows[0]["proven"], found.rows[0]["alone"]) == ("", "fast")
    assert "**fast** alone is within its SLOs at 1 of 2 latencies" in found.text and "cheaper at 1" not in found.text


def test_nothing_is_cheaper_than_a_study_without_a_point():
    found = compare(side("empty"), side("new", trial(0, 2048, 1000, tpot_s=0.01)))
    assert "proven" not in found.text.replace("is either proven cheaper", "")
    assert "**new** alone is within its SLOs at 1 of 1 latencies" in found.text


def test_latencies_that_are_not_the_same_thing_are_not_compared():
    other = Side("b", (), replace(WANT, latency="e2e_p99"), {})
    with pytest.raises(UsageError, match="a has tpot_p99, b has e2e_p99"):
        compare(side("a"), other)


def test_fronts_that_cross_are_each_named_where_they_win():
    first = side("a", trial(0, 2048, 2000, tpot_s=0.01), trial(1, 4096, 2100, tpot_s=0.03))
    second = side("b", trial(0, 2048, 1000, tpot_s=0.01), trial(1, 4096, 4000, tpot_s=0.03))
    assert "Each is cheaper somewhere" in compare(first, second).text


def test_what_else_differs_is_named():
    found = compare(side("a", engine="0.32.0", gpu="H100"), side("b", engine="0.33.0", gpu="H100"))
    assert found.differences == ("engine: 0.32.0 / 0.33.0",)
    assert "Neither study has a point" in found.text
    strict = Side("c", (), objective("ttft_p99=100ms", price=5.0), {})
    assert any(text.startswith("SLOs:") for text in compare(side("a"), strict).differences)


def ladder(name: str, loads: tuple[float, ...], *, holds: float = math.inf, usd: float = 1.0) -> Side:
    """A server that makes 500 tokens/s at load 1, and in proportion above; it misses its SLOs beyond ``holds``."""
    steps = [
        step(at, WANT, tokens_per_s=500 * at / usd, tpot_s=0.02 * (1 + at) ** 0.4, ttft_s=0.2 if at <= holds else 9.0)
        for at in loads
    ]
    missed = next((i for i, at in enumerate(loads, 1) if at > holds), len(loads))
    config = space().config(space().default(), "m")
    return side(name, TrialRecord(0, Path("."), config, Measured(tuple(steps[:missed])), config.params, 0, 0))


@pytest.mark.parametrize("holds", [math.inf, 4.5, 5.0, 8.0])
def test_one_truth_at_other_loads_is_not_called_cheaper(holds):
    """Rungs as the automatic ladder lays them around capacities of 2.8 and 4."""
    first = ladder("a", (1.4, 2.0, 2.8, 3.9, 5.6, 7.8), holds=holds)
    second = ladder("b", (2.0, 2.8, 4.0, 5.6, 8.0, 11.0), holds=holds)
    for one, other in ((first, second), (second, first)):
        found = compare(one, other)
        assert {level.winner for level in found.levels} == {0}
        assert all(level.ratio[1] <= 1 <= level.ratio[2] for level in found.levels)


def test_an_advantage_at_loads_that_the_other_did_not_try_is_called_so():
    found = compare(ladder("low", (0.1, 1.0)), ladder("high", (1.0, 4.0)))
    assert [(level.winner, level.untried) for level in found.levels] == [(0, 1), (0, 0), (0, 2)]
    assert [row["untried"] for row in found.rows] == ["low", "", "high"]
    assert "At none of 3 latencies is either proven cheaper" in found.text
    assert "At 1 of 3 latencies **high** is cheaper only at loads that low did not try, which proves noth" in found.text
    drawn = Console(width=100, file=io.StringIO(), force_terminal=False)
    drawn.print(comparison_table(found, "tpot_p99"))
    assert "not tried by" in drawn.file.getvalue()


def test_what_a_missed_load_answers_is_proven():
    """The other missed load 2: that it was not tried at 3 and 4 leaves nothing open."""
    found = compare(ladder("old", (0.5, 1.0, 2.0), holds=1.0), ladder("new", (0.5, 1.0, 3.0, 4.0)))
    assert found.levels[-1].winner == 2 and not any(level.untried for level in found.levels)
    cheaper = compare(ladder("dear", (0.5, 1.0), usd=3.0), ladder("cheap", (0.5, 0.7, 1.0)))
    assert cheaper.levels[-1].winner == 2


def test_of_values_by_name_only_those_that_differ_are_named():
    load = {"ladder": "0.5, 1", "warmup_s": 5.0}
    found = compare(side("a", load=load, x={"b": "v" * 99}), side("b", load={**load, "warmup_s": 2.5}, x={"b": "w"}))
    assert found.differences == ("load: warmup_s 5 / 2.5", "x: b")
    prices = [replace(WANT, prices={"L4": 1.0, "H100-SXM": usd}) for usd in (10.0, 3.0)]
    found = compare(*(Side(name, (), want, {}) for name, want in zip("ab", prices, strict=True)))
    assert found.differences == ("price: H100-SXM $10 / $3",)


def test_figures_that_were_emulated_on_both_sides_are_called_so():
    emulated = compare(side("a", figures="emulated"), side("b", figures="emulated"))
    assert "Both are emulated" in emulated.text and emulated.differences == ()
    mixed = compare(side("a", figures="emulated"), side("b", figures="measured"))
    assert (
        "Both are emulated" not in mixed.text
        and "**a is emulated**" in mixed.text
        and mixed.differences == ("figures: emulated / measured",)
    )


def test_the_table_shows_at_each_latency_what_either_offers():
    first = side("old", trial(0, 2048, 1000, tpot_s=0.02))
    second = side("new", trial(0, 2048, 2000, tpot_s=0.02), trial(1, 4096, 3000, tpot_s=0.04))
    drawn = Console(width=100, file=io.StringIO(), force_terminal=False)
    found = compare(first, second)
    drawn.print(comparison_table(found, "tpot_p99"))
    assert (found.rows[0]["ratio"], found.rows[0]["proven"]) == (pytest.approx(0.5), "new")
    assert found.rows[0]["ratio_low"] < 0.5 < found.rows[0]["ratio_high"] < 1
    assert found.rows[0]["cost old"] == pytest.approx(2 * found.rows[0]["cost new"])
    text = drawn.file.getvalue()
    assert "at most ms" in text and "0.50 (" in text and text.count("new") >= 2


def test_points_beyond_the_slos_do_not_count():
    config = space().config({}, "m")
    late = TrialRecord(
        1, Path("."), config, Measured((step(2.0, WANT, tokens_per_s=9000, ttft_s=9.0),)), config.params, 0, 0
    )
    found = compare(side("a", trial(0, 2048, 1000)), side("b", late))
    assert all(level.winner == 1 for level in found.levels)


def test_below_all_loads_of_a_side_that_held_none_nothing_is_proven_of_it():
    found = compare(ladder("low", (0.1,)), ladder("high", (1.0,), holds=0.5))
    assert [(level.winner, level.untried) for level in found.levels] == [(0, 1)]


def test_latencies_kept_only_at_loads_that_the_other_did_not_try_are_no_draws():
    found = compare(ladder("dear", (1.0,), usd=3.0), ladder("cheap", (0.1, 1.0)))
    assert [(level.winner, level.untried) for level in found.levels] == [(0, 2), (2, 0)]
    assert "**cheap** is cheaper at 1 of 2 latencies, proven at 95 %. At 1 of 2 latencies" in found.text
