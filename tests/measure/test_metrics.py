"""Every metric against figures worked out by hand or by plain loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.measure.made import records, request
from tuner.measure import metrics as m
from tuner.measure import quantile
from tuner.measure.metrics import compute
from tuner.measure.window import Window, window
from tuner.spec.slo import parse

Q = (0.5, 0.9, 0.99)


def steady(n: int = 40, rate: float = 10.0, **changes):
    """A request every 1/rate s: first token after 50 ms, then 4 more, 10 ms apart."""
    return [request(t / rate, [t / rate + 0.05 + 0.01 * k for k in range(5)], **changes) for t in range(n)]


def test_latencies_of_a_steady_server(tmp_path):
    values, _ = compute(records(tmp_path, steady()), (), Q)
    expected = {"ttft": 0.05, "e2e": 0.09, "tpot": 0.01, "itl": 0.01, "norm_latency": 0.018}
    for name, seconds in expected.items():
        for stat in ("p50", "p99", "mean", "max"):
            assert values[f"{name}_{stat}_s"] == pytest.approx(seconds), (name, stat)


def test_every_latency_counts_from_the_intended_send(tmp_path):
    """The client was half a second late: its users waited all the same."""
    rows = [request(t, [t + 1.0, t + 1.5], sent_s=t + 0.5) for t in range(20)]
    values, _ = compute(records(tmp_path, rows), (), Q)
    assert values["ttft_p50_s"] == pytest.approx(1.0) and values["e2e_p50_s"] == pytest.approx(1.5)
    assert values["norm_latency_p50_s"] == pytest.approx(0.75)
    assert values["send_lag_p99_s"] == pytest.approx(0.5)


@pytest.mark.parametrize(("first_s", "last_s", "seconds"), [(0.0, 0.0, 4.0), (0.05, 0.0, 3.95), (0.0, 0.4, 4.4)])
def test_requests_are_sent_in_the_time_in_which_they_really_left(tmp_path, first_s, last_s, seconds):
    """41 requests in 4 s, of which the first and the last left so much later."""
    late_s = {0: first_s, 40: last_s}
    rows = [request(t / 10, [t / 10 + 1.0], sent_s=t / 10 + late_s.get(t, 0.0)) for t in range(41)]
    made = records(tmp_path, rows)
    found = m.sent_requests_per_s(made, np.ones(41, dtype=bool), Window(0, 4 * 10**9, 4 * 10**9))
    assert found == pytest.approx(41 / seconds)


def test_throughput_counts_what_arrived_in_the_window(tmp_path):
    made = records(tmp_path, steady())
    values, _ = compute(made, (), Q)
    seconds = window(made).duration_s
    inside = [t / 10 + 0.05 + 0.01 * k for t in range(40) for k in range(5) if t / 10 + 0.05 + 0.01 * k <= 3.9]
    assert values["duration_s"] == pytest.approx(3.9) and seconds == pytest.approx(3.9)
    assert values["output_tokens_per_s"] == pytest.approx(len(inside) / 3.9)
    assert values["total_tokens_per_s"] == pytest.approx((len(inside) + 39 * 100) / 3.9)
    assert values["requests_per_s"] == pytest.approx(39 / 3.9)
    assert values["offered_requests_per_s"] == pytest.approx(40 / 3.9)


def test_throughput_of_an_overload_is_the_servers_not_the_traces(tmp_path):
    """100 requests within 10 s at a server that does one token a second: 10 tokens/s would be the trace's wish."""
    rows = [request(t / 10, [5.0 + t], end_s=5.0 + t) for t in range(100)]
    values, _ = compute(records(tmp_path, rows), (), Q)
    assert values["output_tokens_per_s"] < 1.3
    assert values["goodput_output_tokens_per_s"] <= values["output_tokens_per_s"]


PROMPT = (parse("ttft_p99=2s"), parse("tpot_p99=1s"))


def poisson(service_s, *, rate: float = 8.0, seconds: float = 10.0, seed: int = 5):
    """Poisson arrivals of lognormal lengths; ``service_s(tokens, arrival_s)`` gives the wait and the time per token."""
    rng = np.random.default_rng(seed)
    at, rows = np.sort(rng.uniform(0, seconds, int(rate * seconds))), []
    for t, n in zip(at.tolist(), np.ceil(rng.lognormal(4, 0.8, len(at))).astype(int).tolist(), strict=True):
        wait, pace = service_s(n, t)
        rows.append(request(t, t + wait + pace * np.arange(n)))
    return rows


def test_goodput_of_servers_that_keep_up_is_what_they_were_asked_for_however_fast_they_are(tmp_path):
    """Responses of a third and of six seconds in a window of ten: what arrived in it differs by a fifth and more."""
    good, came, asked = {}, {}, 0.0
    for name, pace in (("fast", 0.005), ("slow", 0.08)):
        (tmp_path / name).mkdir()
        rows = poisson(lambda n, t, pace=pace: (0.1, pace))
        values, _ = compute(records(tmp_path / name, rows), PROMPT, Q)
        good[name], came[name] = values["goodput_output_tokens_per_s"], values["output_tokens_per_s"]
        asked = sum(row.output_tokens for row in rows) / (rows[-1].intended_ns / 1e9)
        assert values["goodput_window_s"] == pytest.approx(rows[-1].intended_ns / 1e9)
    assert good["fast"] == pytest.approx(asked) and good["slow"] == pytest.approx(asked)
    assert came["slow"] < 0.8 * came["fast"]


def test_goodput_does_not_jump_where_a_response_takes_as_long_as_the_window(tmp_path):
    """41 requests of a hundred tokens within four seconds; a response takes 2.85 s, or 3.05 s."""
    good = []
    for pace in (0.0285, 0.0305):
        rows = [request(0.1 * k, 0.1 * k + 0.05 + pace * np.arange(100)) for k in range(41)]
        values, _ = compute(records(tmp_path, rows), PROMPT, Q)
        good.append(values["goodput_output_tokens_per_s"])
        assert values["offered_requests_per_s"] == pytest.approx(31 / 3.0, rel=0.05)
    assert good == pytest.approx([4100 / 4.0] * 2, rel=0.05)


def test_goodput_of_traffic_shorter_than_its_answers_is_not_more_than_a_server_brings(tmp_path):
    """Fifty answers of thirty seconds, asked for within the instant to forty seconds: no step where they pass."""
    good = []
    for seconds in (0.0, 0.5, 1.0, 1.01, 3.0, 10.0, 29.0, 31.0, 40.0):
        rows = [request(k * seconds / 49, k * seconds / 49 + 0.03 * np.arange(1, 1001)) for k in range(50)]
        values, _ = compute(records(tmp_path, rows), (parse("ttft_p99=9s"), parse("tpot_p99=2s")), Q)
        good.append(values["goodput_output_tokens_per_s"])
        assert values["offered_requests_per_s"] > 0
    assert max(good) < 50_000 / 29 and min(good) > 50_000 / 45
    assert all(later / earlier > 0.75 for earlier, later in pairwise(good))


def test_of_an_overload_that_was_stopped_before_any_answer_ended_no_share_is_known(tmp_path):
    rows = [request(k / 10, [], error="stopped", end_s=6.0) for k in range(60)]
    values, _ = compute(records(tmp_path, rows), PROMPT, Q)
    assert "output_share" not in values


@pytest.mark.parametrize("slos", ["ttft_p99=3600s tpot_p99=1s", "tpot_p99=1s"])
def test_goodput_of_an_overload_is_the_servers_where_the_slos_let_requests_wait(tmp_path, slos):
    """The queue grows by a second per second: half of what was asked for is served per second."""
    rows = poisson(lambda n, t: (0.1 + t, 0.01), seconds=60.0)
    values, _ = compute(records(tmp_path, rows), [parse(x) for x in slos.split()], Q)
    asked = sum(row.output_tokens for row in rows) / 60
    assert values["goodput_output_tokens_per_s"] == pytest.approx(asked / 2, rel=0.06)


@pytest.mark.parametrize(("growth", "seconds"), [(0.04, 10.0), (0.1, 10.5)])
def test_goodput_bears_a_wait_that_grows_by_a_twentieth_of_the_window(tmp_path, growth, seconds):
    values, _ = compute(records(tmp_path, poisson(lambda n, t: (0.1 + growth * t, 0.001))), PROMPT, Q)
    assert values["goodput_window_s"] == pytest.approx(seconds, rel=0.02)


def test_goodput_of_late_responses_counts_in_the_window_where_no_slo_bounds_a_token(tmp_path):
    rows = poisson(lambda n, t: (0.1, 0.01 + 0.05 * t), seconds=10.0)
    made = records(tmp_path, rows)
    for slos in ((), (parse("ttft_p99=2s"),), (parse("e2e_p90=60s"),), (parse("e2e_p50=900ms"), parse("tpot_mean=1s"))):
        values, _ = compute(made, slos, Q)
        assert "goodput_window_s" not in values
        assert values["goodput_output_tokens_per_s"] <= values["output_tokens_per_s"]
    assert "goodput_window_s" in compute(made, (parse("e2e_p90=900ms"),), Q)[0]


@pytest.mark.parametrize(("meta", "seconds"), [({}, 25.0), ({"lasts_s": 30.0}, 27.0), ({"lasts_s": 32.0}, 29.0)])
def test_rates_are_over_the_time_until_the_next_request_would_come(tmp_path, meta, seconds):
    """One request every four seconds from 4 to 28 s. Records that do not tell how long they were to last give what they
    gave: as many requests as intervals and one more."""
    rows = [request(4.0 * k, 4.0 * k + 0.02 * np.arange(1, 101), warmup=not k) for k in range(8)]
    values, _ = compute(records(tmp_path, rows, warmup_s=3.0, **meta), PROMPT, Q)
    assert values["goodput_window_s"] == pytest.approx(seconds)
    assert values["goodput_output_tokens_per_s"] == pytest.approx(700 / seconds)
    assert values["offered_requests_per_s"] == values["sent_requests_per_s"] == pytest.approx(7 / seconds)


def test_rates_of_poisson_arrivals_are_those_of_the_process(tmp_path):
    """Seven requests in the mean: from the ramp's end to the last they were a fifth too high."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        at = np.cumsum(rng.exponential(4.0, 60)) - 2.0
        at = np.concatenate([[0.0], at[(at > 0) & (at < 30)]])
        rows = [request(t, t + 0.02 * np.arange(1, 101), warmup=t < 3) for t in at.tolist()]
        values, _ = compute(records(tmp_path, rows, warmup_s=3.0, lasts_s=30.0), PROMPT, Q)
        if at[-1] >= 3:
            found.append([values["goodput_output_tokens_per_s"] / 25, values["offered_requests_per_s"] / 0.25])
    assert np.mean(found, axis=0) == pytest.approx([1.0, 1.0], abs=0.05)


def test_rates_of_a_step_that_was_stopped_are_over_the_time_until_then(tmp_path):
    rows = [request(t, t + 0.02 * np.arange(1, 51)) for t in range(10)]
    rows[9] = request(9.0, [9.02], error="stopped", end_s=9.8, wanted=50)
    values, _ = compute(records(tmp_path, rows, lasts_s=60.0, stopped="lost"), PROMPT, Q)
    assert values["offered_requests_per_s"] == pytest.approx(10 / 9.8)


def test_an_overload_is_served_in_longer_than_its_planned_length(tmp_path):
    """The queue grows by a second per second for a minute, which is served in two."""
    rows = poisson(lambda n, t: (0.1 + t, 0.01), seconds=60.0)
    values, _ = compute(records(tmp_path, rows, lasts_s=60.0), PROMPT[1:], Q)
    asked = sum(row.output_tokens for row in rows) / 60
    assert values["goodput_output_tokens_per_s"] == pytest.approx(asked / 2, rel=0.06)


def test_goodput_of_a_closed_loop_counts_in_the_window(tmp_path):
    """32 in flight, all sent at the start: what is still running at the end was asked for, but not served."""
    made = records(tmp_path, steady(40), client={"closed_loop_concurrency": 32.0})
    values, _ = compute(made, PROMPT, Q)
    assert values["goodput_output_tokens_per_s"] == values["output_tokens_per_s"]


def test_goodput_leaves_out_the_warm_up_and_who_failed_or_was_late(tmp_path):
    rows = [request(t / 10, [t / 10 + 0.05 + 0.01 * k for k in range(5)], warmup=t < 10) for t in range(41)]
    rows[20] = request(2.0, [6.05 + 0.01 * k for k in range(5)])
    rows[30] = request(3.0, [3.05], error="boom", wanted=5)
    values, _ = compute(records(tmp_path, rows, warmup_s=1.0), PROMPT, Q)
    assert values["goodput_requests_per_s"] == pytest.approx((31 - 2) / 3.0)
    assert values["goodput_output_tokens_per_s"] == pytest.approx((31 - 2) * 5 / 3.0)
    assert values["goodput_total_tokens_per_s"] == pytest.approx((31 - 2) * 105 / 3.0)


def test_itl_is_over_all_gaps_not_a_mean_of_means(tmp_path):
    """One stall of a second in 200 gaps: the mean per request would show 14 ms, the p99.9 must show the second."""
    rows = steady(50)
    stalled = [2.0 + 0.05 + 0.01 * k + (1.0 if k > 2 else 0.0) for k in range(5)]
    rows[20] = request(2.0, stalled)
    values, _ = compute(records(tmp_path, rows), (parse("itl_p99.9=1s"),), (0.5,))
    assert values["itl_p50_s"] == pytest.approx(0.01)
    assert values["itl_p99.9_s"] == pytest.approx(1.01)
    assert values["itl_max_s"] == pytest.approx(1.01)


def test_gaps_never_run_from_one_request_to_the_next(tmp_path):
    rows = [request(t, [t + 0.1]) for t in range(5)] + [request(6.0, [6.5, 6.6]), request(7.0, ()), request(8, [9.0])]
    made = records(tmp_path, rows)
    gaps = m.Gaps(made, np.ones(8, dtype=bool))
    assert np.concatenate(list(gaps)).tolist() == [100_000_000]


def test_a_token_dated_before_the_one_that_it_follows_is_a_gap_of_nothing(tmp_path):
    rows = [request(t, [t + 0.1, t + 0.1 - 2e-6, t + 0.2]) for t in range(10)]
    values, _ = compute(records(tmp_path, rows), (), (0.1, 0.9))
    assert values["itl_p10_s"] == 0 and values["itl_p90_s"] == pytest.approx(0.1, abs=1e-5)


def test_tokens_of_one_engine_step_have_no_gap_between_them(tmp_path):
    rows = [request(t, [t + 0.1, t + 0.1, t + 0.1, t + 0.4, t + 0.4, t + 0.4]) for t in range(10)]
    values, _ = compute(records(tmp_path, rows), (), (0.5, 0.8, 0.9))
    assert values["itl_p80_s"] == 0 and values["itl_p90_s"] == pytest.approx(0.3)
    assert values["tpot_p50_s"] == pytest.approx(0.3 / 5)


def test_failures_are_infinite_in_every_latency_and_in_no_goodput(tmp_path):
    rows = steady(40)
    for k in (11, 22):
        rows[k] = request(k / 10, [k / 10 + 0.05, k / 10 + 0.06], error="HTTP 500: boom", wanted=5)
    values, intervals = compute(records(tmp_path, rows), (), (0.5, 0.9, 0.99))
    assert values["error_rate"] == pytest.approx(2 / 40)
    assert intervals["error_rate"][0] < 0.05 < intervals["error_rate"][1]
    for name in ("ttft", "e2e", "tpot", "norm_latency"):
        assert (
            values[f"{name}_p90_s"] < 1 and values[f"{name}_p99_s"] == math.inf and values[f"{name}_mean_s"] == math.inf
        )
    assert values["itl_max_s"] == math.inf
    assert values["goodput_requests_per_s"] == pytest.approx(values["requests_per_s"])
    assert values["goodput_output_tokens_per_s"] < values["output_tokens_per_s"]


def test_an_answer_without_a_token_is_no_fast_answer(tmp_path):
    rows = steady(20)
    rows[5] = request(0.5, (), end_s=0.51)
    values, _ = compute(records(tmp_path, rows), (), Q)
    assert values["ttft_max_s"] == math.inf


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft_p99=1s", 40),
        ("ttft_p99=60ms", 39),  # one had 80 ms
        ("tpot_p95=15ms", 39),  # the slow one
        ("itl_p99=15ms", 39),  # its mean ITL is its TPOT
        ("e2e_max=95ms", 38),  # both
        ("norm_latency_p90=19ms", 38),
        ("error_rate=1%", 40),  # no limit on a single request
        ("tpot_p50=5ms", 40),  # nor is what half of them, or a fifth, may exceed
        ("e2e_p80=5ms", 40),
        ("e2e_mean=5ms", 40),
    ],
)
def test_a_good_request_meets_every_limit_on_its_own(tmp_path, slo, good):
    rows = steady(40)
    rows[10] = request(1.0, [1.08 + 0.01 * k for k in range(5)])
    rows[20] = request(2.0, [2.05 + 0.02 * k for k in range(5)])
    made = records(tmp_path, rows)
    assert m.is_good(made, (parse(slo),)).sum() == good


def test_answers_are_as_long_as_they_came_of_what_was_asked_for_where_none_failed(tmp_path):
    rows = [request(k / 10, k / 10 + 0.01 * np.arange(1, 11), wanted=40, prompt_tokens=80) for k in range(40)]
    rows[35] = request(3.5, [3.6], error="boom", wanted=900, prompt_tokens=1)
    rows[34] = request(3.4, [3.5], wanted=4, input_tokens=1000)  # which tells no count
    values = compute(records(tmp_path, rows), (), Q)[0]
    assert values["output_share"] == pytest.approx(0.25, abs=0.001) and values["input_share"] == 0.8
    assert "input_share" not in compute(records(tmp_path, [request(k, [k + 1]) for k in range(9)]), (), Q)[0]


def test_the_offered_rate_is_of_all_the_planned_traffic_though_a_ramp_ends_with_an_arrival(tmp_path):
    at_s = np.sort(np.random.default_rng(2).random(40)) * 10
    rows = [request(t, t + 0.02 * np.arange(1, 101)) for t in at_s.tolist()]
    values, _ = compute(records(tmp_path, rows, lasts_s=10.0), (), Q)
    assert values["measured_requests"] < 40
    assert values["offered_requests_per_s"] == values["sent_requests_per_s"] == pytest.approx(4.0)


def test_mean_tokens_are_of_the_late_and_long_requests_too_but_of_none_that_failed(tmp_path):
    rows = steady(40, input_tokens=100)
    for k in range(10, 30):
        rows[k] = request(k / 10, k / 10 + 0.01 * np.arange(1, 206), input_tokens=1000)
    rows[35] = request(3.5, [3.6], error="boom", wanted=900)
    made = records(tmp_path, rows)
    values, _ = compute(made, (parse("e2e_p99=100ms"),), Q)
    prompt, output = m.mean_tokens(made, m.is_measured(made, window(made)))
    assert (values["mean_prompt_tokens"], values["mean_output_tokens"]) == (prompt, output)
    assert m.mean_tokens(made, np.ones(40, dtype=bool)) == pytest.approx((21900 / 39, 4195 / 39))


def test_the_share_within_the_slos_is_of_the_tokens_after_the_warm_up_and_not_of_requests_cut_off(tmp_path):
    rows = [request(t / 10, t / 10 + 0.01 * np.arange(1, 6), warmup=t < 10) for t in range(40)]
    rows[0] = request(0.0, 5 + 0.01 * np.arange(1, 1001), warmup=True)
    rows[20] = request(2.0, 4 + 0.01 * np.arange(1, 106))
    rows[39] = request(3.9, [4.0], error="stopped", end_s=4.1, wanted=900)
    values, _ = compute(records(tmp_path, rows, warmup_s=1.0), (parse("ttft_p99=1s"),), Q)
    assert values["slo_share"] == pytest.approx(28 * 5 / (28 * 5 + 105))


def test_timeouts_are_censored_and_counted(tmp_path):
    rows = steady(40)
    rows[30] = request(3.0, [3.5], end_s=13.0, error="timeout", wanted=5)
    values, _ = compute(records(tmp_path, rows), (), Q)
    assert values["censored_requests"] == 1 and values["ttft_p99_s"] == math.inf


def test_a_request_cut_off_by_an_early_stop_counts_as_late_only_if_it_was(tmp_path):
    """Stopped at 5 s: one request had waited 4 s, one 0.1 s; the limit is 1 s."""
    rows = [*steady(40), request(1.0, (), end_s=5.0, error="stopped"), request(3.9, (), end_s=4.0, error="stopped")]
    made = records(tmp_path, rows)
    values, _ = compute(made, (parse("ttft_p99=1s"),), (0.5,))
    assert values["error_rate"] == 0 and values["censored_requests"] == 2
    late = m.ttft_s(made, 1.0)
    assert late[40] == math.inf and late[41] == pytest.approx(0.1)


def test_a_step_that_was_cut_off_does_not_flatter_by_leaving_out_those_who_waited(tmp_path):
    """Stopped at 10 s with half of the requests unanswered: the median is among those who waited, at least so long."""
    waiting = [request(5 + k / 10, (), end_s=10.0, error="stopped") for k in range(41)]
    values, _ = compute(records(tmp_path, [*steady(40), *waiting]), (), (0.5,))
    assert values["ttft_p50_s"] >= 1.0 and math.isfinite(values["ttft_max_s"])


def test_nothing_measured_gives_counts_only(tmp_path):
    values, intervals = compute(records(tmp_path, []), (parse("ttft_p99=1s"),), Q)
    assert values["measured_requests"] == 0 and "ttft_p99_s" not in values and not intervals
    assert parse("ttft_p99=1s").miss(values) == "ttft_p99 was not measured"


def test_a_single_request_is_measured(tmp_path):
    values, _ = compute(records(tmp_path, [request(0.0, [0.1, 0.2])]), (), Q)
    assert values["measured_requests"] == 1 and values["output_tokens_per_s"] == pytest.approx(10.0)


def test_itl_intervals_know_that_the_gaps_of_a_request_resemble_each_other(tmp_path):
    """Each request has a pace of its own: 50 requests of 200 gaps say about as much as 50 observations, not 10,000."""
    rng = np.random.default_rng(3)
    clustered, free = [], []
    for t in range(50):
        pace = rng.exponential(0.02)
        clustered.append(request(t, t + np.cumsum(np.full(201, pace))))
        free.append(request(t, t + np.cumsum(rng.exponential(0.02, 201))))
    width = {}
    for name, rows in (("clustered", clustered), ("free", free)):
        (tmp_path / name).mkdir()
        values, intervals = compute(records(tmp_path / name, rows), (), (0.5,))
        low, high = intervals["itl_p50_s"]
        assert 0 < low < values["itl_p50_s"] < high
        width[name] = high - low
    assert width["clustered"] > 5 * width["free"]
    low, high = quantile.summary(np.concatenate([np.diff(row.token_ns) for row in free]) / 1e9, 0.5)[1]
    assert width["free"] == pytest.approx(high - low, rel=0.3), "as if each gap were of a request of its own"


def test_a_rates_interval_is_students_over_twenty_parts_and_never_negative():
    rates = np.random.default_rng(0).exponential(5.0, 20)
    half = stats.sem(rates) * stats.t.ppf(0.975, 19)
    assert m._batch_means(rates) == pytest.approx((rates.mean() - half, rates.mean() + half))
    assert m._batch_means(np.array([0.0] * 19 + [1.0]))[0] == 0.0


requests = st.builds(
    lambda at, gaps, failed: request(
        at, list(at + 0.001 + np.cumsum(gaps)) if gaps else (), end_s=at + 70.0, error="boom" if failed else ""
    ),
    st.floats(0, 60),
    st.lists(st.floats(0.001, 2.0), max_size=6),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(requests, min_size=1, max_size=30))
def test_metrics_agree_with_plain_loops(tmp_path_factory, rows):
    rows = sorted(rows, key=lambda row: row.intended_ns)
    made = records(tmp_path_factory.mktemp("r"), rows)
    slos = (parse("ttft_p95=500ms"),)
    values, _ = compute(made, slos, (0.5,))
    span = window(made)
    measured = [row for row in rows if span.start_ns <= row.intended_ns <= span.end_ns]
    assert values["measured_requests"] == len(measured)
    if not measured:
        return
    ttft = sorted(
        math.inf if row.error or not row.token_ns else (row.token_ns[0] - row.intended_ns) / 1e9 for row in measured
    )
    assert values["ttft_p50_s"] == ttft[math.ceil(len(ttft) / 2) - 1]
    gaps = [math.inf for row in measured if row.error]
    gaps += [(b - a) / 1e9 for row in measured for a, b in zip(row.token_ns[:-1], row.token_ns[1:], strict=True)]
    if gaps:
        assert values["itl_p50_s"] == pytest.approx(sorted(gaps)[math.ceil(len(gaps) / 2) - 1])
    if span.duration_s > 0:
        came = [t for row in rows for t in row.token_ns if span.start_ns <= t <= span.end_ns]
        assert values["output_tokens_per_s"] * span.duration_s == pytest.approx(len(came))
        good = [
            row for row in rows if not row.error and row.token_ns and row.token_ns[0] - row.intended_ns <= 500_000_000
        ]
        came = [t for row in good for t in row.token_ns if span.start_ns <= t <= span.end_ns]
        assert values["goodput_output_tokens_per_s"] * span.duration_s == pytest.approx(len(came))


@pytest.mark.parametrize("n", [1, 50])
@pytest.mark.parametrize("error", ["status 503", "stopped"])
@pytest.mark.parametrize("ended_s", [0.0, 3.0])
def test_goodput_of_a_burst_of_which_nothing_ends_well_is_none(tmp_path, n, error, ended_s):
    """All arrive at once, and no answer says how long one takes: there is no length to divide by."""
    rows = [request(0.0, [], error=error, end_s=ended_s) for _ in range(n)]
    values, _ = compute(records(tmp_path, rows), PROMPT, Q)
    assert values.get("goodput_output_tokens_per_s", 0.0) == 0
    assert ("goodput_output_tokens_per_s" in values) == (ended_s > 0)
    assert values["ttft_p99_s"] == (math.inf if error == "status 503" or ended_s > 2 else ended_s)
