"""A step ends early when its outcome is certain, and never because its prompts are long."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.measure.made import ns, records, request
from tuner.measure.early import QueueWatch, SloWatch
from tuner.measure.metrics import compute
from tuner.spec.slo import parse


@dataclass
class Running:
    number: int
    intended_ns: int
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    produced: int = 0


def watch(n: int, *slos: str, wanted: int = 5, warmup_s: float = 0.0, forced: bool = True) -> SloWatch:
    """One request a second."""
    return SloWatch([parse(s) for s in slos], np.arange(n) * ns(1), np.full(n, wanted), ns(warmup_s), forced)


def test_a_quantile_is_lost_with_one_miss_more_than_it_allows():
    slo = watch(200, "ttft_p90=1s")  # 20 of 200 may miss
    for k in range(20):
        slo.done(request(60 + k, [60 + k + 1.5]))
    assert slo.verdict(ns(100), []) == ""
    slo.done(request(90, [91.5]))
    assert "ttft_p90 cannot hold 1,000 ms: 21 misses, 20 are allowed among 200" in slo.verdict(ns(100), [])


def test_a_request_that_waits_longer_than_the_limit_has_missed_already():
    slo = watch(200, "ttft_p90=1s")
    waiting = [Running(60 + k, ns(60 + k)) for k in range(21)]
    assert slo.verdict(ns(80), waiting) == ""  # some of them have waited a second at most
    assert slo.verdict(ns(90), waiting)
    answered = [Running(60 + k, ns(60 + k), ns(60 + k + 0.5), ns(60 + k + 0.5), 1) for k in range(21)]
    assert slo.verdict(ns(90), answered) == ""


def test_what_the_ramp_rule_may_cut_does_not_count():
    slo = watch(200, "ttft_p90=1s")
    for k in range(25):
        slo.done(request(k, [k + 30.0]))
    assert slo.verdict(ns(100), [Running(k, ns(k)) for k in range(25, 49)]) == ""


def test_errors_are_misses_and_count_against_an_error_rate():
    slo, rate = watch(200, "ttft_p99=1s"), watch(200, "error_rate=2%")
    for k in range(60, 63):
        slo.done(request(k, (), error="boom"))
        rate.done(request(k, (), error="boom"))
    assert "ttft_p99" in slo.verdict(ns(100), []) and rate.verdict(ns(100), []) == ""
    for k in range(63, 65):
        rate.done(request(k, (), error="boom"))
    assert "error_rate cannot hold 2 %: 5 of 200 failed" in rate.verdict(ns(100), [])


def test_a_mean_is_lost_once_the_sum_exceeds_what_the_whole_step_may_have():
    slo = watch(100, "e2e_mean=1s")
    slo.done(request(50, [60.0, 149.0]))
    assert slo.verdict(ns(60), []) == ""  # 99 s of at most 100
    slo.done(request(51, [51.5, 53.0]))
    assert "e2e_mean" in slo.verdict(ns(60), [])


def test_a_slow_stream_loses_its_tpot_while_it_runs():
    slo = watch(100, "tpot_max=100ms", wanted=11)
    stream = [Running(50, ns(50), ns(51), ns(51), 1)]
    assert slo.verdict(ns(51.9), stream) == ""  # ten gaps may still take 0.1 s each
    assert slo.verdict(ns(52.1), stream)
    # where the model may end its output with any token, nothing is certain
    assert watch(100, "tpot_max=100ms", wanted=11, forced=False).verdict(ns(60), stream) == ""


def test_an_output_that_may_end_with_any_token_has_lasted_until_its_last_one():
    stream = [Running(50, ns(50), ns(50.5), ns(50.9), 3)]
    assert watch(100, "e2e_max=1s").verdict(ns(51.1), stream)
    assert watch(100, "e2e_max=1s", forced=False).verdict(ns(51.1), stream) == ""


def test_gaps_over_the_limit_lose_an_itl_slo():
    slo = watch(100, "itl_p99=50ms", wanted=11)  # 1,000 gaps, 10 may miss
    slo.done(request(50, [51 + 0.1 * k for k in range(11)]))
    assert slo.verdict(ns(60), []) == ""
    slo.done(request(51, [52, 52.2]))
    assert "itl_p99" in slo.verdict(ns(60), [])


def test_a_request_that_failed_brings_a_gap_more_that_may_miss(tmp_path):
    """Of 200 requests of one gap each three failed after it: 203 gaps, of which 101 may miss."""
    slo = watch(200, "itl_p50=50ms", wanted=2)
    failed = [request(60 + k, [61 + k, 61.01 + k], error="boom") for k in range(3)]
    slow = [request(70 + k, [71 + k, 71.1 + k]) for k in range(98)]
    fast = [request(k, [1 + k, 1.01 + k]) for k in (*range(60), *range(63, 70), *range(168, 200))]
    for row in (*failed, *slow):
        slo.done(row)
    values, _ = compute(records(tmp_path, [*failed, *slow, *fast]), (parse("itl_p50=50ms"),), ())
    assert values["itl_p50_s"] < 0.05 and slo.verdict(ns(190), []) == ""


@settings(max_examples=30, deadline=None)
@given(
    latencies=st.lists(st.sampled_from([0.1, 0.4, 0.6, 3.0]), min_size=8, max_size=80),
    q=st.sampled_from(["p50", "p90", "p99", "mean", "max"]),
    stop=st.floats(0.3, 1.0),
)
def test_a_step_that_was_ended_would_have_missed_to_its_end(tmp_path_factory, latencies, q, stop):
    """Whatever the rest of the step would have brought: the full records miss the SLO that the watch gave up."""
    slo = parse(f"ttft_{q}=500ms")
    n = len(latencies)
    decided = SloWatch([slo], np.arange(n) * ns(1), np.full(n, 1), 0, True)
    rows = [request(t, [t + latency]) for t, latency in enumerate(latencies)]
    now_s = stop * n
    for row, latency in zip(rows, latencies, strict=True):
        if row.intended_ns + ns(latency) <= ns(now_s):
            decided.done(row)
    running = [Running(t, ns(t)) for t, latency in enumerate(latencies) if t <= now_s < t + latency]
    if decided.verdict(ns(now_s), running):
        values, _ = compute(records(tmp_path_factory.mktemp("r"), rows), (slo,), ())
        assert slo.miss(values)


# the queue


def simulate(arrival_s: np.ndarray, work: np.ndarray, rate: float, warmup_s: float = 0.0) -> tuple[str, float]:
    """A server that does ``rate`` tokens of work per second in order of arrival, looked at every second; returns the
    watch's verdict and when it fell."""
    queue = QueueWatch((arrival_s * 1e9).astype(np.int64), work, ns(warmup_s))
    free_s, done = 0.0, []
    for at, tokens in zip(arrival_s, work, strict=True):
        free_s = max(at, free_s) + tokens / rate
        done.append((at, free_s, tokens))
    for now in np.arange(0.0, arrival_s[-1] + 1, 1.0):
        backlog = 0
        for at, end, tokens in done:
            if at <= now < end:  # a prompt counts in full until its first token
                backlog += tokens
        if verdict := queue.verdict(float(now), backlog):
            return verdict, float(now)
    return "", 0.0


def poisson(seconds: float, rate: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, int(seconds * rate)))


@pytest.mark.parametrize("seed", range(5))
def test_an_overload_is_recognised_within_the_first_minute(seed):
    arrival_s = poisson(200, 4, seed)
    verdict, at_s = simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=2_000)  # twice what it can do
    assert verdict.startswith("saturated: the queue has grown for 30 s") and at_s < 60


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_server_is_not_taken_for_an_overload(seed):
    arrival_s = poisson(300, 4, seed)
    assert simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=4_000 / 0.8)[0] == ""


@pytest.mark.parametrize("seed", range(20))
def test_long_contexts_are_not_taken_for_an_overload(seed):
    """One prompt in fifty is 100 times as long and blocks everybody for 20 s, at a load of 70 %: the queue grows and
    grows, and goes again."""
    rng = np.random.default_rng(seed)
    arrival_s = poisson(600, 1, seed)
    work = np.where(rng.random(len(arrival_s)) < 0.02, 100_000, 1_000)
    assert simulate(arrival_s, work, rate=float(work.sum() / arrival_s[-1] / 0.7))[0] == ""


@pytest.mark.parametrize("seed", range(5))
def test_an_overload_of_long_contexts_is_recognised_all_the_same(seed):
    rng = np.random.default_rng(seed)
    arrival_s = poisson(900, 1, seed)
    work = np.where(rng.random(len(arrival_s)) < 0.1, 20_000, 1_000)
    assert simulate(arrival_s, work, rate=float(work.sum() / arrival_s[-1] / 2.5))[0].startswith("saturated")


def test_a_burst_that_the_rest_of_the_trace_forgives_is_waited_for():
    """Five times the usual rate for a minute, then next to nothing: the queue will drain."""
    arrival_s = np.concatenate([np.arange(0, 60, 0.1), np.arange(60, 400, 2.0)])
    assert simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=3_000)[0] == ""


def test_a_long_queue_that_does_not_grow_is_no_overload():
    """A burst at the start, then exactly what the server can do: the queue stays as long as it is."""
    arrival_s = np.concatenate([np.zeros(100), np.arange(0, 300, 0.5)])
    assert simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=2_000)[0] == ""


def test_a_prompt_that_blocks_everybody_for_a_minute_is_waited_for():
    """While it is computed nothing else is answered and the queue only grows; the server has twice the capacity that
    the trace needs."""
    arrival_s = np.arange(0, 300, 0.5)
    work = np.full(len(arrival_s), 1_000)
    work[120] = 240_000
    assert simulate(arrival_s, work, rate=4_000)[0] == ""


def test_the_real_traces_long_prompts_are_not_taken_for_an_overload():
    from pathlib import Path

    from tuner.load import formats, windows

    path = Path(__file__).parents[2] / "../shared/traces/mooncake_fast25_conversation.first4000.jsonl"
    if not path.exists():
        pytest.skip("the shared traces are not beside the repository")
    trace = windows.cut(formats.read(path), 0, 1_000)
    work = trace.input_tokens + trace.output_tokens
    usual = float(work.sum() / trace.arrival_s[-1])
    assert simulate(trace.arrival_s, work, rate=usual / 0.75)[0] == ""
    assert simulate(trace.arrival_s, work, rate=usual / 2.0)[0].startswith("saturated")
