"""When the client, and not the server, made the latency."""

import math

import pytest

from tuner.measure.trust import not_their_length, untrusted
from tuner.spec.slo import parse

CLEAN = {
    "send_lag_p99_s": 0.0002,
    "stamp_error_p99_s": 0.0,
    "offered_requests_per_s": 20.0,
    "sent_requests_per_s": 20.0,
    "duration_s": 60.0,
    "client_cpu_share": 0.1,
    "ttft_p99_s": 0.2,
    "itl_p99_s": 0.03,
    "client_output_tokens": 10_000.0,
    "server_output_tokens": 10_000.0,
    "client_ttft_mean_s": 0.11,
    "server_ttft_mean_s": 0.10,
    "server_prefix_hit_rate": 0.30,
    "trace_prefix_share": 0.31,
}


def test_a_burst_that_left_within_milliseconds_of_its_plan_is_the_load_that_was_wanted():
    late = {**CLEAN, "sent_requests_per_s": 19.5}
    assert untrusted({**late, "measured_requests": 2.0}, ()) == ()  # 3 ms later than they were to
    assert "19.5 requests/s were sent" in untrusted({**late, "measured_requests": 20.0}, ())[0]


def test_answers_shorter_than_their_forced_length_are_no_speed():
    forced = {"output": "forced", "dialect": {"forced": True}}
    assert "only 21.0% of the output tokens" in not_their_length(forced, {"output_share": 0.21})[0]
    for meta in (
        {"output": "free", "dialect": {"forced": True}},
        {"output": "forced", "dialect": {"forced": False}},
        {},
    ):
        assert not not_their_length(meta, {"output_share": 0.21})
    assert not not_their_length(forced, {"output_share": 0.995})
    assert not not_their_length(forced, {"error_rate": 1.0})  # none came
    chunks = {"output": "forced", "dialect": {"forced": True, "counting": "chunks"}}
    assert "its chunks hold several" in not_their_length(chunks, {"output_share": 0.21})[0]


@pytest.mark.parametrize(
    ("exact", "share", "tokens", "cut"),
    [
        (True, 0.98, 1000, True),
        (True, 0.98, 40, False),  # a token of the beginning that the server does not count
        (True, 0.995, 10_000, False),
        (True, 1.3, 100, False),
        (True, 0.0, 0, False),  # it counts none
        (False, 0.5, 100, False),  # made-up words: nobody knows their tokens
    ],
)
def test_prompts_that_the_server_cut_off_are_no_speed(exact, share, tokens, cut):
    meta = {"exact_prompts": exact, "dialect": {"prompt": "text"}}
    said = not_their_length(meta, {"input_share": share, "mean_prompt_tokens": tokens})
    assert bool(said) == cut == ("cuts prompts off, or has another tokenizer" in "".join(said))


@pytest.mark.parametrize(("output", "share", "tokens", "more"), [("free", 2.0, 48, True), ("forced", 1.04, 25, False)])
def test_answers_longer_than_they_may_be_are_no_tokens(output, share, tokens, more):
    said = not_their_length({"output": output}, {"output_share": share, "mean_output_tokens": tokens})
    assert ("200.0% of the output tokens came" in "".join(said)) == bool(said) == more


def test_a_clean_measurement_is_believed():
    assert untrusted(CLEAN, ()) == ()


@pytest.mark.parametrize(
    ("change", "slos", "words"),
    [
        ({"send_lag_p99_s": 0.02}, (), "sent late"),
        # beside a second of TTFT 20 ms are nothing
        ({"send_lag_p99_s": 0.02, "ttft_p99_s": 1.0}, (), ""),
        # nor where the limit is a second
        ({"send_lag_p99_s": 0.02}, ("ttft_p99=1s",), ""),
        ({"send_lag_p99_s": 0.06}, ("ttft_p99=1s",), "sent late"),
        # the tightest limit counts
        ({"send_lag_p99_s": 0.02}, ("ttft_p99=1s", "ttft_p50=100ms"), "sent late"),
        # a p99 of failures is no reason to believe a late client
        ({"send_lag_p99_s": 0.02, "ttft_p99_s": math.inf}, (), "sent late"),
        # under the floor, however short the latency
        ({"send_lag_p99_s": 0.004, "ttft_p99_s": 0.001}, (), ""),
        ({"send_lag_p99_s": 0.006, "ttft_p99_s": 0.001}, (), "sent late"),
        ({"stamp_error_p99_s": 0.003}, (), "read late"),
        ({"stamp_error_p99_s": 0.003}, ("itl_p99=100ms",), ""),
        ({"stamp_error_p99_s": 0.0015, "itl_p99_s": 0.001}, (), ""),
        # reading late while the kernel's stamps hold distorts nothing
        ({"read_lag_p99_s": 0.05}, (), ""),
        ({"sent_requests_per_s": 19.7}, (), "19.7 requests/s were sent"),
        ({"sent_requests_per_s": 19.9}, (), ""),
        ({"sent_requests_per_s": 0.45, "offered_requests_per_s": 0.5}, (), "0.45 requests/s were sent"),
        ({"fill_failures": 1.0, "fill_requests": 40.0}, (), "1 of the 40 prompts failed"),
        ({"fill_failures": 1.0, "fill_requests": 100.0}, (), ""),
        # a server that misses an SLO is not measured again for its cache
        ({"fill_failures": 9.0, "fill_requests": 40.0, "error_rate": 0.2}, ("error_rate=1%", "ttft_p99=1s"), ""),
        ({"client_cpu_share": 0.71}, (), "71% of a core"),
        ({"client_failures": 3}, (), "3 requests could not be sent"),
        ({"client_fell_behind": 1.0}, (), "could not keep up"),
        ({"server_output_tokens": 10_200.0}, (), "somebody else"),
        ({"server_output_tokens": 10_020.0}, (), ""),
        ({"server_output_tokens": 1_032.0, "client_output_tokens": 1_000.0}, (), ""),
        ({"server_output_tokens": 1_033.0, "client_output_tokens": 1_000.0}, (), "somebody else"),
        # tokens of requests that were cut off are counted by the server alone
        ({"server_output_tokens": 10_200.0, "cut_off_requests": 1.0}, (), ""),
        ({"client_ttft_mean_s": 0.05}, (), "the client's way is longer"),
        # the front end's queue is the server's
        ({"client_ttft_mean_s": 0.5}, (), ""),
        ({"server_prefix_hit_rate": 0.6}, (), "seen these prompts"),
        ({"server_prefix_hit_rate": 0.1}, (), ""),
        # a request that was preempted finds its own blocks
        ({"server_prefix_hit_rate": 0.6, "server_preemptions": 2.0}, (), ""),
    ],
)
def test_the_rules(change, slos, words):
    reasons = untrusted(CLEAN | change, tuple(parse(slo) for slo in slos))
    assert len(reasons) == bool(words) and words in " ".join(reasons)


def test_a_server_without_counters_is_no_reason():
    client = {name: value for name, value in CLEAN.items() if not name.startswith("server_")}
    assert untrusted(client, ()) == () == untrusted({}, ())
