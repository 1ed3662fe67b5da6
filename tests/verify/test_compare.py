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


def side(name: str, *trials, **facts: str) -> Side:
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
    drawn.print(comparison_table(compare(first, second), "tpot_p99"))
    text = drawn.file.getvalue()
    assert "at most ms" in text and "0.50 (" in text and text.count("new") >= 2


def test_points_beyond_the_slos_do_not_count():
    config = space().config({}, "m")
    late = TrialRecord(
        1, Path("."), config, Measured((step(2.0, WANT, tokens_per_s=9000, ttft_s=9.0),)), config.params, 0, 0
    )
    found = compare(side("a", trial(0, 2048, 1000)), side("b", late))
    assert all(level.winner == 1 for level in found.levels)
