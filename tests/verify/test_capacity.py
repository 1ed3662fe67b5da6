import math

import numpy as np
import pytest

from tuner.spec.slo import parse
from tuner.study.outcome import Step
from tuner.verify.arm import Tail, margin, pooled
from tuner.verify.capacity import (
    capacity,
    cost_at,
    expected,
    held,
    loads,
    margin_at,
    margin_of_all,
    still_pays,
    value_at,
)

SLO = parse("ttft_p99=1s")
COST = "cost_usd_per_mtok_output"


def step(
    load: float, ttft_s: float, cost: float = 1.0, tokens: float = 100.0, untrusted: tuple[str, ...] = (), **more: float
) -> Step:
    """``more`` are metrics."""
    metrics = {"ttft_p99_s": ttft_s, COST: cost, "output_tokens_per_s": tokens, **more}
    return Step(load, "w", metrics, slo_misses=("ttft_p99",) if ttft_s > 1 else (), untrusted=untrusted)


def bracket(start: float, true: float, lowest: float = 0.5, highest: float = 8.0) -> list[float]:
    """The loads measured on a server that holds up to ``true``."""
    tried: list[float] = []
    while (load := loads(start, lowest, highest, [x <= true for x in tried])) is not None:
        tried.append(load)
    return tried


def test_a_bracket_ends_with_the_first_load_on_the_other_side():
    assert bracket(2.0, 2.05) == pytest.approx([2.0, 2.12])
    assert bracket(2.0, 1.7) == pytest.approx([2.0, 2 / 1.06, 2 / 1.2])


def test_a_bracket_goes_on_until_the_ends_of_the_ladder():
    assert bracket(1.1, 100.0) == pytest.approx([1.1 * up for up in (1, 1.06, 1.2, 1.5, 2, 4)] + [8.0])
    assert bracket(1.9, 0.0)[-1] == 0.25  # half of the lowest
    assert bracket(0.1, 100.0)[0] == 0.25
    assert bracket(8.0, 100.0) == [8.0]


def test_capacity_lies_between_the_load_that_holds_and_the_one_that_does_not():
    found = capacity([step(2.0, 0.5), step(4.0, 2.0)], [SLO])
    assert found == pytest.approx(2 * math.sqrt(2))  # half way in logarithms, as 0.5 and 2 are equally far from 1


def test_capacity_is_the_top_of_the_ladder_where_nothing_was_missed():
    assert capacity([step(2.0, 0.2), step(8.0, 0.3)], [SLO]) == 8.0


def test_where_no_load_held_the_capacity_is_at_most_the_lowest_measured():
    assert capacity([step(2.0, 3.0), step(1.0, 2.0)], [SLO]) == 1.0
    assert math.isnan(capacity([step(1.0, 0.1, untrusted=("client lag",))], [SLO]))


def test_a_miss_below_a_load_that_held_does_not_bound_the_capacity():
    missed_first = [step(2.0, 1.2), step(3.0, 0.5), step(4.0, 2.0)]
    assert capacity(missed_first, [SLO]) == pytest.approx(math.sqrt(3 * 4))


def test_untrusted_steps_do_not_count():
    assert capacity([step(2.0, 0.5), step(4.0, 0.5, untrusted=("client lag",)), step(3.0, 2.0)], [SLO]) < 3.0


def test_cost_at_capacity_falls_with_what_the_server_puts_out_there():
    """At 4 half of the tokens came too late: their cost counts against 4, not against the capacity below it."""
    steps = [step(2.0, 0.5, cost=1.0, tokens=100), step(4.0, 2.0, cost=1.6, tokens=200)]
    assert cost_at(steps, 2.0) == pytest.approx(1.0)
    assert cost_at(steps, 2.0 * math.sqrt(2)) == pytest.approx(1 / math.sqrt(2))


def test_cost_at_capacity_falls_with_the_load_where_goodput_is_what_was_asked_for():
    """What arrived in the step above is no measure: it ended early."""
    steps = [step(2.0, 0.5, cost=1.0, tokens=100), step(4.0, 2.0, cost=1.6, tokens=90)]
    steps[0].metrics["goodput_window_s"] = 60.0
    assert cost_at(steps, 3.0) == pytest.approx(1.0 * 2 / 3)


def test_cost_at_capacity_knows_how_many_tokens_are_late_there():
    """An e2e_p90 limit lets a tenth of the requests, the long ones, be late: 14 % of the tokens at the load that held,
    31 % at the one that did not. Measured at the capacity it was 0.258; without the late ones it would be 0.228."""
    window = {"goodput_window_s": 117.0}
    held = step(1.233, 0.9, cost=0.244, slo_share=0.859, **window)
    steps = [held, step(1.396, 1.1, cost=0.2741, slo_share=0.691, **window)]
    assert cost_at(steps, 1.332) == pytest.approx(0.258, rel=0.03)
    before = step(1.233, 0.9, cost=0.244, **window)  # measured by an earlier version, which told no share
    assert cost_at([before, steps[1]], 1.332) == cost_at([before], 1.332)
    assert cost_at(steps, 1.233) == pytest.approx(0.244) and cost_at([held], 1.332) == pytest.approx(
        0.244 * 1.233 / 1.332
    )


def test_cost_at_capacity_is_that_of_a_server_which_is_hardly_late_where_the_next_load_overwhelms_it():
    """Of a p99 limit one in a hundred may be late at the capacity, though at the load above it half are."""
    steps = [step(2.0, 0.9, slo_share=1.0, goodput_window_s=8.0), step(2.5, 9.0, slo_share=0.5, goodput_window_s=8.0)]
    assert cost_at(steps, 2.05) == pytest.approx(2 / 2.05, rel=0.01)
    nothing = [steps[0], step(4.0, 9.0, cost=1e4, slo_share=0.0)]
    assert 1 / 2 < cost_at(nothing, 4.0 * (1 - 1e-6)) < math.inf


def test_a_metric_between_two_loads_is_read_off_the_line_in_logarithms():
    assert value_at([step(1.0, 0.1), step(4.0, 0.4)], 2.0, "ttft_p99_s") == pytest.approx(0.2)
    assert value_at([step(1.0, 0.1), step(4.0, 0.4)], 9.0, "ttft_p99_s") == pytest.approx(0.4)


def test_a_load_beyond_one_that_missed_is_missed_by_more():
    steps = [step(2.0, 0.5), step(4.0, 2.0)]
    assert margin_at(steps, 4.0, [SLO]) == pytest.approx(math.log(2.0))
    assert margin_at(steps, 8.0, [SLO]) == margin_at([*steps, steps[-1]], 8.0, [SLO]) == pytest.approx(math.log(8.0))
    assert margin_at([step(2.0, 0.5), step(4.0, 0.4)], 8.0, [SLO]) == pytest.approx(math.log(0.4))


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((0.5, 0.5, 0.5), True),
        ((1.2, 0.4, 0.4), True),  # 2 % of one stretch, and next to none of two
        ((1.4, 0.4, 0.4), False),
        ((9.0, 0.01, 0.01), False),  # however well the others go
        ((1.01, 1.01, 1.01), False),
    ],
)
def test_over_all_requests_a_percentile_is_missed_by_the_share_beyond_its_limit(values, holds):
    """Against requests whose times are exponential, of which the percentile is that of all together."""
    slo = parse("ttft_p99=1s")
    margins = [math.log(value) for value in values]
    shares = np.linspace(0, 1, 200_001)[1:-1]
    together = np.concatenate([-np.log(shares) * value / math.log(100) for value in values])
    assert (np.quantile(together, 0.99) <= 1) == holds == (pooled(margins, slo) <= 0)
    assert math.exp(pooled(margins[:1], slo)) == pytest.approx(values[0])


def test_the_share_beyond_a_limit_is_read_off_all_percentiles_that_were_measured():
    """A tenth of one stretch is too late, though its p99 misses by little: of a tail that falls off steeply."""
    steep = {"ttft_p50_s": 0.95, "ttft_p90_s": 1.0, "ttft_p95_s": 1.1, "ttft_p99_s": 1.2}
    cells = [[step(4.0, 1.2, **steep)], *([[step(4.0, 0.4)]] * 2)]
    assert margin_of_all([[step(4.0, 1.2)], *cells[1:]], 4.0, [SLO]) < 0 < margin_of_all(cells, 4.0, [SLO])
    assert Tail.of(cells[0][0], SLO).beyond(math.log(1.2)) == pytest.approx(0.1)
    assert Tail.of(cells[0][0], SLO).beyond(0.0) == 1 - 0.99


def test_the_percentiles_that_count_are_those_of_the_load_nearest_to_the_promised():
    steep = {"ttft_p50_s": 0.95, "ttft_p90_s": 1.0, "ttft_p95_s": 1.1, "ttft_p99_s": 1.2}
    around = [step(1.0, 0.3), step(4.0, 1.2, **steep), step(9.0, 2.0)]
    others = [[step(4.0, 0.4)]] * 2
    alone = margin_of_all([around[1:2], *others], 4.0, [SLO])
    assert margin_of_all([around, *others], 4.0, [SLO]) == pytest.approx(alone) and alone > 0


def test_what_an_slo_misses_is_not_put_on_the_others():
    slos = [parse("tpot_p99=50ms"), parse("e2e_max=2s")]
    missed = Step(4.0, "a", {"tpot_p99_s": 0.0505, "e2e_max_s": 0.8}, slo_misses=("tpot_p99 50.5 ms > 50 ms",))
    held = Step(4.0, "b", {"tpot_p99_s": 0.04, "e2e_max_s": 0.8})
    assert margin(missed, slos[1:]) == pytest.approx(math.log(0.4)) and margin(missed, slos) == 0.05
    assert margin_of_all([[missed], [held]], 4.0, slos) < 0 < margin_of_all([[missed]], 4.0, slos)


def test_over_all_requests_rates_and_means_are_averaged_and_of_maxima_the_largest_counts():
    margins = [math.log(x) for x in (2.4, 0.3, 0.2)]
    assert math.exp(pooled(margins, parse("error_rate=1%"))) == pytest.approx(2.9 / 3)
    assert math.exp(pooled(margins, parse("tpot_mean=1s"))) == pytest.approx(2.9 / 3)
    assert math.exp(pooled(margins, parse("e2e_max=1s"))) == pytest.approx(2.4)
    assert margin_of_all([[step(1.0, 0.5)]] * 2, 1.0, []) < 0 < pooled([math.inf], SLO)


def test_the_capacity_lies_next_to_the_load_that_held_where_the_next_one_saturated_before_its_latency_rose():
    held = Step(4.0, "w", {"tpot_p99_s": 0.03})
    full = Step(8.0, "w", {"tpot_p99_s": 0.04}, slo_misses=("saturated: ...",), stopped_early="saturated: ...")
    assert capacity([held, full], [parse("tpot_p99=50ms")]) < 4.8


def test_no_errors_are_far_from_an_error_limit_and_leave_the_capacity_to_the_latencies():
    slos = [SLO, parse("error_rate=1%")]
    low, high = step(2.0, 0.5, error_rate=0.0), step(4.0, 2.0, error_rate=0.0)
    assert margin(low, slos) == pytest.approx(math.log(0.5))
    assert capacity([low, high], slos) == pytest.approx(2 * math.sqrt(2))
    assert margin(step(2.0, 0.5, error_rate=0.008), slos) == pytest.approx(math.log(0.8))
    assert margin(step(2.0, 0.5), slos) > 0  # not measured is a miss
    none = [parse("error_rate=0%")]
    assert margin(step(2.0, 0.5, error_rate=0.0), none) < -1 and margin(step(2.0, 0.5, error_rate=0.001), none) > 1


def test_where_to_look_first_is_the_crossing_or_as_far_as_the_last_two_loads_point():
    assert expected([step(2.0, 0.5), step(4.0, 2.0)], [SLO]) == pytest.approx(2 * math.sqrt(2))
    assert expected([step(1.0, 0.25), step(2.0, 0.5)], [SLO]) == pytest.approx(4.0)  # twice the load, twice the TTFT
    assert expected([step(1.0, 0.1), step(2.0, 0.11)], [SLO]) == pytest.approx(4.0)  # at most twice the last
    assert expected([step(1.0, 0.2), step(2.0, 0.1)], [SLO]) == 2.0
    assert expected([step(1.0, 0.1), step(2.0, 0.1)], [SLO]) == expected([step(2.0, 0.5)], [SLO]) == 2.0


def test_the_highest_load_that_held_is_where_the_next_round_begins():
    assert held([step(2.0, 0.5), step(3.0, 0.6), step(4.0, 2.0)]) == 3.0
    assert held([step(2.0, 3.0), step(1.0, 2.0)]) == 1.0
    assert math.isnan(held([step(2.0, 0.5, untrusted=("client lag",))]))


def test_above_the_ladder_a_server_is_followed_for_as_long_as_that_can_save_money():
    assert still_pays([step(2.0, 0.5)])
    assert still_pays([step(2.0, 0.5, cost=2.0), step(2.5, 0.5, cost=1.6)])
    assert not still_pays([step(2.0, 0.5, cost=0.5), step(2.5, 0.5, cost=0.495)])  # saturated, and no SLO minds
    asked = step(2.0, 0.5, cost=1.0, goodput_window_s=8.0)
    # the traffic of the two steps differs a little: as measured on an H100, 2.1 % for 6 % more load
    assert still_pays([asked, step(2.12, 0.5, cost=0.979, goodput_window_s=8.0)])
