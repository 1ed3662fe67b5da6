"""Synthetic traces have the rate, burstiness, lengths and sharing asked for, or those of the trace they follow."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import UsageError
from tuner.load import formats, prompts, synth, windows
from tuner.load.arrivals import Arrivals
from tuner.load.lengths import EmpiricalLengths, LognormalLengths
from tuner.load.rates import read_rates
from tuner.load.sharing import sharing
from tuner.load.summary import nearest_rank
from tuner.load.trace import Trace

SHARED = Path(__file__).parents[2] / "../shared/traces"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no shared trace {name}")
    return path


def quantiles(tokens: np.ndarray) -> list[int]:
    ordered = np.sort(tokens)
    return [nearest_rank(ordered, percent) for percent in (50, 90, 99, 100)]


def gaps_cv(arrival_s: np.ndarray) -> float:
    gaps = np.diff(arrival_s)
    return float(gaps.std() / gaps.mean())


# process, its rate, its CV; 40,000 requests put both within a few per cent
@pytest.mark.parametrize(
    ("spec", "rate", "cv"), [("poisson:4", 4, 1.0), ("gamma:0.5:3", 0.5, 3.0), ("gamma:100:0.3", 100, 0.3)]
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(spec, rate, cv):
    times = Arrivals.parse(spec).times(40_000, np.random.default_rng(1))
    assert len(times) == 40_000 and times[0] == 0 and (np.diff(times) >= 0).all()
    assert 39_999 / times[-1] == pytest.approx(rate, rel=0.05)
    assert gaps_cv(times) == pytest.approx(cv, rel=0.06)


def test_a_cv_of_zero_is_evenly_spaced():
    assert Arrivals(4.0, cv=0.0).times(5, np.random.default_rng(0)).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_diurnal_rate_swings_by_the_cosine_around_its_mean():
    """By numerical integration of the rate, not by the code's own formula."""
    times = Arrivals(50.0, swing=0.8, period_s=100.0).times(200_000, np.random.default_rng(2))
    counts, edges = np.histogram(times % 100.0, bins=20)
    middle = (edges[1:] + edges[:-1]) / 2
    expected = 1 - 0.8 * np.cos(math.tau * middle / 100.0)
    assert counts / counts.mean() == pytest.approx(expected, abs=0.04)
    assert 200_000 / times[-1] == pytest.approx(50.0, rel=0.02)


@settings(deadline=None)
@given(
    rate=st.floats(1e-3, 1e4),
    cv=st.floats(0, 20),
    swing=st.floats(0, 1),
    period_s=st.floats(1, 1e6),
    n=st.integers(0, 200),
)
def test_arrivals_never_go_back_and_start_at_zero(rate, cv, swing, period_s, n):
    times = Arrivals(rate, cv, swing, period_s).times(n, np.random.default_rng(0))
    assert len(times) == n and np.isfinite(times).all() and (np.diff(times) >= 0).all()
    assert n == 0 or times[0] == 0


@pytest.mark.parametrize(
    "spec",
    [
        *("", "poisson", "poisson:0", "poisson:-1", "poisson:x", "poisson:nan", "poisson:1:2", "gamma:4", "gamma:4:-1"),
        *("diurnal:4", "diurnal:4:2", "diurnal:4:0.5:0", "diurnal:4:0.5:10:1:1", "weibull:4"),
    ],
)
def test_arrivals_that_are_not_understood_show_how_they_are_written(spec):
    with pytest.raises(UsageError, match="poisson:RATE"):
        Arrivals.parse(spec)


# published: rate, CV, input p50/p90/p99/max, output p50/p90/p99/max
@pytest.mark.parametrize(
    ("name", "file", "rate", "cv", "tokens_in", "tokens_out"),
    [
        ("azure-conversation", "conv", 5.53, 1.09, (1020, 2735, 4142, 14050), (129, 424, 601, 1000)),
        ("azure-code", "code", 2.57, 13.15, (1469, 5194, 7436, 7437), (13, 55, 252, 1899)),
    ],
)
def test_a_built_in_profile_reproduces_the_published_statistics(name, file, rate, cv, tokens_in, tokens_out):
    trace = synth.synthesise(synth.profile(name), requests=100_000, seed=3)
    assert 99_999 / trace.arrival_s[-1] == pytest.approx(rate, rel=0.02 * cv)
    assert gaps_cv(trace.arrival_s) == pytest.approx(cv, rel=0.05)
    assert quantiles(trace.input_tokens) == pytest.approx(tokens_in, rel=0.05)
    assert quantiles(trace.output_tokens) == pytest.approx(tokens_out, rel=0.1)
    real = formats.read(shared(f"azure_llm_2023_{file}.csv"))  # the mean was not published with the quantiles
    assert trace.input_tokens.mean() == pytest.approx(real.input_tokens.mean(), rel=0.03)
    assert trace.output_tokens.mean() == pytest.approx(real.output_tokens.mean(), rel=0.05)


def test_the_same_seed_gives_the_same_trace_and_another_seed_another():
    profile = synth.profile("azure-conversation")
    one, again, other = (synth.synthesise(profile, requests=50, seed=seed) for seed in (1, 1, 2))
    for column in ("arrival_s", "input_tokens", "output_tokens"):
        assert getattr(one, column).tolist() == getattr(again, column).tolist()
        assert getattr(one, column).tolist() != getattr(other, column).tolist()


def test_a_duration_gives_every_request_that_arrives_in_it():
    profile = synth.Profile("p", Arrivals(20.0, cv=0.0), EmpiricalLengths(np.array([5]), np.array([6])))
    trace = synth.synthesise(profile, duration_s=2.0)
    assert trace.arrival_s == pytest.approx(np.arange(40) / 20.0)
    swinging = synth.Profile("p", Arrivals(20.0, swing=1.0, period_s=100.0), profile.lengths)
    valley = synth.synthesise(swinging, duration_s=10.0)
    assert 0 < len(valley) < 60  # the day starts in its valley: far below 200
    assert valley.arrival_s[-1] < 10.0


def test_a_size_is_needed_and_only_one():
    profile = synth.profile("azure-code")
    for size in ({}, {"requests": 3, "duration_s": 4.0}, {"duration_s": -1.0}, {"requests": 0}, {"duration_s": 1e12}):
        with pytest.raises(UsageError):
            synth.synthesise(profile, **size)
    with pytest.raises(UsageError, match="azure-conversation, azure-code"):
        synth.profile("nonsense")


def test_fitting_an_empirical_profile_keeps_rate_burstiness_and_joint_lengths():
    real = formats.read(shared("azure_llm_2023_conv.csv"))
    made = synth.synthesise(synth.fit(real), requests=40_000, seed=1)
    assert 39_999 / made.arrival_s[-1] == pytest.approx(19_365 / real.arrival_s[-1], rel=0.03)
    assert gaps_cv(made.arrival_s) == pytest.approx(gaps_cv(real.arrival_s), rel=0.03)
    assert quantiles(made.input_tokens)[:3] == pytest.approx(quantiles(real.input_tokens)[:3], rel=0.02)
    pairs = set(zip(real.input_tokens.tolist(), real.output_tokens.tolist(), strict=True))
    assert set(zip(made.input_tokens.tolist(), made.output_tokens.tolist(), strict=True)) <= pairs


def test_fitting_lognormals_recovers_the_parameters_the_lengths_were_drawn_with():
    true = LognormalLengths((6.0, 4.0), (0.8, 0.5), -0.6, (10**6, 10**6))
    tokens_in, tokens_out = true.draw(50_000, np.random.default_rng(4))
    n = len(tokens_in)
    trace = Trace("t", np.arange(float(n)), tokens_in, tokens_out, 0, np.empty(0, int), np.zeros(n + 1, int))
    found = LognormalLengths.fit(trace)
    assert found.log_mean == pytest.approx(true.log_mean, abs=0.02)
    assert found.log_sd == pytest.approx(true.log_sd, rel=0.02)
    assert found.correlation == pytest.approx(true.correlation, abs=0.02)
    assert found.most == (tokens_in.max(), tokens_out.max())


@pytest.mark.parametrize("cv", [1.0, 2.5])
def test_fitting_a_diurnal_trace_recovers_the_burstiness_that_its_swing_is_not(cv):
    profile = replace(synth.profile("azure-conversation"), arrivals=Arrivals(4, cv=cv, swing=0.8, period_s=500))
    trace = synth.synthesise(profile, duration_s=5000.0, seed=1)
    trace = windows.cut_time(trace, 130.0, 4630.0)  # nine periods, and not from the valley
    assert synth.fit(trace, kind="diurnal", period_s=500.0).arrivals.cv == pytest.approx(cv, rel=0.05)


def test_fitting_a_diurnal_trace_recovers_its_swing():
    profile = synth.Profile(
        "p", Arrivals(10.0, swing=0.6, period_s=500.0), EmpiricalLengths(np.array([5]), np.array([6]))
    )
    found = synth.fit(synth.synthesise(profile, duration_s=5000.0, seed=1), kind="diurnal", period_s=500.0).arrivals
    assert found.swing == pytest.approx(0.6, abs=0.05)
    assert found.rate_per_s == pytest.approx(10.0, rel=0.03)


@pytest.mark.parametrize("swing", [0.0, 0.5])
@pytest.mark.parametrize("periods", [0.92, 1.25, 1.5, 1.95, 2.5])
def test_a_part_of_a_period_is_no_swing(swing, periods):
    arrivals = Arrivals(20.0, swing=swing, period_s=1000.0)
    made = synth.Profile("p", arrivals, EmpiricalLengths(np.array([5]), np.array([6])))
    trace = synth.synthesise(made, duration_s=periods * 1000, seed=3)
    found = synth.fit(trace, kind="diurnal", period_s=1000.0).arrivals
    assert found.swing == pytest.approx(swing, abs=0.04)
    assert found.rate_per_s == pytest.approx(20.0, rel=0.03)


def test_a_trace_shorter_than_a_period_cannot_show_one_and_three_requests_are_the_least():
    trace = synth.synthesise(synth.profile("azure-conversation"), requests=100)
    with pytest.raises(UsageError, match="does not show a period"):
        synth.fit(trace, kind="diurnal")
    for how, kind in (("nonsense", "gamma"), ("empirical", "nonsense")):
        with pytest.raises(UsageError, match="cannot be fitted"):
            synth.fit(trace, how=how, kind=kind)
    with pytest.raises(UsageError, match="too short"):
        synth.fit(synth.synthesise(synth.profile("azure-conversation"), requests=2))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_synthetic_prefixes_repeat_the_share_of_prompt_tokens_asked_for(share):
    profile = synth.profile("azure-conversation")
    profile = synth.Profile("p", profile.arrivals, profile.lengths, synth.Prefixes(share, groups=5))
    trace = synth.synthesise(profile, requests=4000, seed=2)
    assert sharing(trace).token_share == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("requests", "groups"), [(200, 20), (2000, 20), (2000, 200)])
def test_a_groups_first_request_repeats_nothing_and_the_others_make_up_for_it(requests, groups):
    profile = replace(synth.profile("azure-conversation"), prefixes=synth.Prefixes(0.5, groups=groups))
    trace = synth.synthesise(profile, requests=requests, seed=3)
    assert sharing(trace).token_share == pytest.approx(0.5, abs=0.01)
    again = synth.synthesise(synth.fit(trace), requests=requests, seed=4)
    assert sharing(again).token_share == pytest.approx(0.5, abs=0.01)


def test_fitting_a_trace_with_prefixes_keeps_its_share_and_its_block_size():
    real = formats.read(shared("mooncake_fast25_conversation.first4000.jsonl"))
    made = synth.synthesise(synth.fit(real), requests=4000, seed=1)
    assert made.block_tokens == 512
    assert sharing(made).token_share == pytest.approx(sharing(real).token_share, abs=0.03)


def test_scaling_down_keeps_who_shares_what():
    real = formats.read(shared("mooncake_fast25_conversation.first4000.jsonl"))
    small = synth.scale(real, length=1 / 32, rate=0.5)
    assert small.block_tokens == 16
    assert sharing(small).seen_blocks == sharing(real).seen_blocks
    assert sharing(small).token_share == pytest.approx(sharing(real).token_share, abs=0.005)
    assert small.arrival_s[-1] == pytest.approx(2 * real.arrival_s[-1])
    assert (np.diff(small.block_offsets) == -(-small.input_tokens // 16)).all()


def test_scaling_cuts_prompts_blocks_and_outputs_to_the_longest_allowed():
    offsets = np.array([0, 3, 4])
    trace = Trace("t", np.array([0.0, 1.0]), np.array([48, 5]), np.array([100, 3]), 16, np.array([1, 2, 3, 4]), offsets)
    small = synth.scale(trace, max_input_tokens=20, max_output_tokens=10)
    assert small.input_tokens.tolist() == [20, 5] and small.output_tokens.tolist() == [10, 3]
    assert small.block_ids.tolist() == [1, 2, 4] and small.block_offsets.tolist() == [0, 2, 3]
    assert len(prompts.token_ids(small, 1000, [], 0)[0]) == 20
    tiny = synth.scale(trace, length=1e-6)
    assert tiny.input_tokens.min() == 1 and tiny.output_tokens.tolist() == [1, 1]
    for wrong in ({"length": 0.0}, {"rate": -1.0}, {"length": float("nan")}, {"max_input_tokens": 0}):
        with pytest.raises(UsageError):
            synth.scale(trace, **wrong)


def test_a_servegen_profile_gives_arrivals_with_its_rate_and_burstiness_window_by_window():
    profile = read_rates(shared("servegen_m-large_chunk-0-trace.csv"))
    assert len(profile.start_s) == 2016 and profile.window_s == 600
    times = profile.times(np.random.default_rng(5))
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < 14 * 86400
    counts, _ = np.histogram(times, bins=np.arange(2017) * 600.0)
    assert np.abs(counts - profile.rate_per_s * 600).max() <= 1
    # the CVs in the file are of the same windows; a window of few bursts varies much, their median less
    busy = np.flatnonzero(counts > 300)
    assert len(busy) > 300
    made = [gaps_cv(times[(times >= k * 600) & (times < (k + 1) * 600)]) for k in busy]
    rows = np.genfromtxt(shared("servegen_m-large_chunk-0-trace.csv"), delimiter=",", usecols=(2,))
    assert np.median(made) == pytest.approx(np.median(rows[busy]), rel=0.25)


def test_a_part_of_a_servegen_profile_starts_at_its_own_zero(tmp_path):
    path = tmp_path / "rates.csv"
    path.write_text("0,0,0,,0,0\n600,1,1,Gamma,1,1\n1200,0.5,2,Weibull,0.6,1\n")
    part = read_rates(path).between(600, 1200)
    times = part.times(np.random.default_rng(0))
    assert len(times) == 600 and times[0] > 0 and times[-1] < 600
    with pytest.raises(UsageError, match="runs from 0 s to 1800 s"):
        read_rates(path).between(5000, 6000)
    path.write_text("0,1,0,,0,0\n600,1,3,Gamma,1,1\n")
    even, bursty = np.split(read_rates(path).times(np.random.default_rng(0)), 2)
    assert gaps_cv(even) < 0.05 and 2 < gaps_cv(bursty) < 4
    for wrong, words in (("0,1,1,Gamma,1,1\n", "was there before"), ("0,1,1,Cauchy,1,1\n", "unknown distribution")):
        path.write_text("0,1,1,Gamma,1,1\n" * (words != "unknown distribution") + wrong * 20)
        with pytest.raises(UsageError, match=words):
            read_rates(path)
    assert Arrivals.parse("diurnal:4:0.8:3600:1.2") == Arrivals(4, 1.2, 0.8, 3600)
    assert Arrivals.parse("diurnal:4:0.8") == Arrivals(4, 1.0, 0.8, 24 * 3600)
    path.write_text("0,1,1,Gamma,1,1\n")
    with pytest.raises(UsageError, match="two windows"):
        read_rates(path)
    path.write_text("0,1,1,Gamma,1\n" * 20)
    with pytest.raises(UsageError, match=r":4: wrong number of columns|:1: wrong number of columns"):
        read_rates(path)
