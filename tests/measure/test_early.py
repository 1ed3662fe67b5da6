"""A step ends early when its outcome is certain, and never because its prompts are long."""

import heapq
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
    assert watch(100, "e2e_max=1s", forced=False).verdict(ns(51.1), [Running(50, ns(50))])  # without one it still waits


@pytest.mark.parametrize(
    ("slo", "fits_s", "late_s"), [("tpot_max=100ms", 1.0, 1.1), ("norm_latency_max=1s", 9.0, 11.0)]
)
def test_a_stream_that_ended_counts_with_its_latency_by_token(slo, fits_s, late_s):
    """Eleven tokens, the first of them after a second; a single token has no time between tokens."""
    lost = watch(100, slo, slo.replace("max", "mean"), wanted=11)
    lost.done(request(50, [50.5]))
    for number, lasts_s in ((51, fits_s), (52, late_s)):
        assert lost.verdict(ns(60), []) == ""
        lost.done(request(number, number + 1 + lasts_s / 10 * np.arange(11)))
    assert f"{slo.partition('=')[0]} cannot hold" in lost.verdict(ns(60), [])


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


def looked(at_s, prompt, output, first_s, end_s, warmup_s: float = 0.0) -> tuple[str, float]:
    """What the watch says, looking every second, and when. Each request's first token comes at ``first_s``, and the
    others evenly until ``end_s``."""
    queue = QueueWatch((at_s * 1e9).astype(np.int64), prompt + output, ns(warmup_s))
    for now in np.arange(0.0, at_s[-1] + 1, 1.0):
        waits, runs = (at_s <= now) & (now < first_s), (first_s <= now) & (now < end_s)
        waiting, ran_s = int((prompt + output)[waits].sum()), now - first_s[runs]
        made = 1 + ((output[runs] - 1) * ran_s / (end_s - first_s)[runs]).astype(int)
        owed = int((output[runs] - made).sum())
        if verdict := queue.verdict(float(now), waiting, waiting + owed, ran_s.sum() / max(1, len(ran_s))):
            return verdict, float(now)
    return "", 0.0


def simulate(arrival_s: np.ndarray, work: np.ndarray, rate: float, warmup_s: float = 0.0) -> tuple[str, float]:
    """A server that does ``rate`` tokens of work per second in order of arrival, each request's at once."""
    end_s, free_s = [], 0.0
    for at, tokens in zip(arrival_s, work, strict=True):
        free_s = max(at, free_s) + tokens / rate
        end_s.append(free_s)
    return looked(arrival_s, work - 1, np.ones_like(work), np.array(end_s), np.array(end_s), warmup_s)


def slots(at_s: np.ndarray, prompt: int, output: np.ndarray, gap_s: float, n: int) -> tuple[str, float]:
    """A server that serves ``n`` requests at once, each at its own pace; the others wait until one of these ends."""
    free_s, first_s = [0.0] * n, []
    for at, tokens in zip(at_s, output, strict=True):
        first_s.append(max(at, heapq.heappop(free_s)) + 0.2)
        heapq.heappush(free_s, first_s[-1] + (tokens - 1) * gap_s)
    end_s = np.array(first_s) + (output - 1) * gap_s
    return looked(at_s, np.full(len(at_s), prompt), output, np.array(first_s), end_s, 5.0)


def at_loads(seed: int, per_s: float, *phases: tuple[float, float]) -> np.ndarray:
    """Arrivals of phases, each so many seconds long, at such a share of ``per_s``."""
    rng, begin_s, at_s = np.random.default_rng(seed), 0.0, []
    for lasts_s, load in phases:
        at_s.append(begin_s + np.sort(rng.random(rng.poisson(lasts_s * load * per_s))) * lasts_s)
        begin_s += lasts_s
    return np.concatenate(at_s)


def poisson(seconds: float, rate: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, int(seconds * rate)))


@pytest.mark.parametrize("seed", range(5))
def test_an_overload_is_recognised_within_the_first_minute(seed):
    arrival_s = poisson(200, 4, seed)
    verdict, at_s = simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=2_000)  # twice what it can do
    assert verdict.startswith("saturated: the queue has grown for 30 s") and at_s < 60
    assert 70 <= simulate(arrival_s, np.full(len(arrival_s), 1_000), rate=2_000, warmup_s=40)[1] < 100


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("per_s", "output", "gap_s", "lasts_s"),
    [(3, 500, 0.1, 60), (4, 1_000, 0.05, 60), (10, 1_000, 0.05, 60), (5, 1_000, 0.03, 60), (10, 2_000, 0.04, 300)],
)
def test_a_server_that_lets_nobody_wait_is_not_taken_for_an_overload(per_s, output, gap_s, lasts_s, seed):
    """However long it takes to fill: each response lasts for half a minute and more, at its own pace."""
    at_s = at_loads(seed, per_s, (lasts_s, 1.0))
    assert slots(at_s, 500, np.full(len(at_s), output), gap_s, n=len(at_s))[0] == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "phases", [((60, 0.5), (40, 1.35), (200, 0.8)), ((120, 0.6), (40, 1.3), (140, 0.8)), ((20, 3.0), (280, 0.8))]
)
def test_a_burst_after_an_idle_time_is_waited_for(phases, seed):
    """The rest of the trace brings less than the server does, though more than it has done until then."""
    at_s = at_loads(seed, 10, *phases)
    assert simulate(at_s, np.full(len(at_s), 1_000), rate=10_000, warmup_s=5.0)[0] == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("phases", [((300, 0.9),), ((20, 3.0), (280, 0.8)), ((10, 4.0), (250, 0.7))])
def test_a_server_that_a_burst_has_filled_takes_on_nobody_until_the_first_leave(phases, seed):
    """Each of 64 responses lasts for a minute, so that they come and leave together for long afterwards."""
    at_s = at_loads(seed, 64 / 60, *phases)
    assert slots(at_s, 10_000, np.full(len(at_s), 2_000), 0.03, n=64)[0] == ""


def test_the_last_seconds_of_a_trace_do_not_tell_that_more_comes_than_is_served():
    """A queue as it comes and goes at a load of 90 %: three seconds of the trace are left, and bring a few requests."""
    at_s = at_loads(4, 32 / 20, (300, 0.9))
    assert slots(at_s, 4_000, np.full(len(at_s), 500), 0.04, n=32)[0] == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("load", "within_s"), [(1.5, 120), (2.0, 90), (3.0, 90)])
def test_an_overload_of_a_server_of_many_slots_is_recognised(load, within_s, seed):
    """Its 64 slots are filled first, and what it then owes grows no more; only those who wait do."""
    at_s = at_loads(seed, 64 / 30, (200, load))
    output = np.random.default_rng(seed).lognormal(np.log(800), 0.7, len(at_s)).astype(int) + 1
    verdict, when_s = slots(at_s, 500, output, 0.03, n=64)
    assert verdict.startswith("saturated") and when_s < within_s


@pytest.mark.parametrize(
    ("begun", "done"), [pytest.param(1_000, 300, id="it fills"), pytest.param(300, 1_000, id="it is full")]
)
@pytest.mark.parametrize(("rest", "lost"), [(900, False), (1_100, True)])
def test_what_a_server_begins_or_does_per_second_whichever_is_more_is_what_the_rest_may_bring(begun, done, rest, lost):
    """A minute of twice as much, and then what it can just do, or a tenth more."""
    arrived = np.concatenate([np.arange(0, 60, 1 / 20), np.arange(60, 400, 100 / rest)])
    queue, said = QueueWatch((arrived * 1e9).astype(np.int64), np.full(len(arrived), 100), 0), ""
    for now in range(60):
        said = said or queue.verdict(now, (2_000 - begun) * now, 70_000 + (2_000 - done) * now, 10.0)
    assert ("for a server that does 1,000 per second" in said) == bool(said) == lost


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
