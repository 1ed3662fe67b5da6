"""A load step as the study sees it."""

import errno
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.load.replays import endpoint, plan, poisson, seconds, trace, undisturbed
from tests.load.stub import stub
from tests.measure.made import records, request
from tuner.cli.app import app
from tuner.engines.protocol import Cancelled
from tuner.errors import Unreachable, UsageError
from tuner.load.client import SENT
from tuner.load.flight import Tower
from tuner.load.probe import Found, unreachable
from tuner.load.records import read
from tuner.load.step import _Replay, judge, measure, prompt_seed
from tuner.load.trace import Trace
from tuner.load.tracefile import write
from tuner.load.windows import cut
from tuner.load.wire import Dialect, target
from tuner.measure.metrics import metrics_from_records
from tuner.spec.slo import parse


def test_the_records_alone_give_exactly_what_the_step_reported(tmp_path):
    with stub(first_s=0.02, gap_s=0.005, fail_every=9) as (_, url):
        asked = plan(tmp_path, poisson(80, 60), "ttft_p99=1s", "itl_p99.9=20ms", warmup_s=0.3)
        step = measure(endpoint(url), asked)
    metrics, intervals = metrics_from_records(asked.records, asked.slos, asked.quantiles)
    assert (metrics, intervals) == (step.metrics, step.intervals)
    assert {"ttft_p99_s", "itl_p99.9_s", "ttft_p50_s", "goodput_output_tokens_per_s"} <= set(metrics)
    assert step.records == asked.records.name


def test_load_divides_the_gaps_and_nothing_else(tmp_path):
    replayed = poisson(40, 10)
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, replayed, load=4.0)
        step = measure(endpoint(url), asked)
    assert seconds(asked.records, "intended_ns") == pytest.approx(replayed.arrival_s / 4, abs=1e-6)
    assert step.load == 4.0


def test_warm_up_is_sent_but_not_counted(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace(np.arange(40) / 40), warmup_s=0.5)
        step = measure(endpoint(url), asked)
    made = read(asked.records)
    assert abs(made.meta["epoch_unix_s"] + 1 - time.time()) < 20
    assert len(made) == 40 and made.columns["warmup"].sum() == 20
    assert step.metrics["measured_requests"] <= 20


def test_a_step_that_is_all_warm_up_says_nothing_of_the_server(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, trace(np.arange(10) / 40), "ttft_p99=1s", warmup_s=0.5))
    assert step.untrusted == ("no request lies after the warm-up: measure for longer, or warm up for less",)
    assert not step.slo_misses and not step.ok


def test_a_lost_slo_ends_the_step_and_the_verdict_agrees(tmp_path):
    replayed = trace(np.arange(600) / 20)
    with stub(first_s=0.3, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, replayed, "ttft_p90=100ms", early_stop=True)
        step = undisturbed(lambda: measure(endpoint(url), asked), lambda step: not step.untrusted)
    assert "ttft_p90 cannot hold 100 ms" in step.stopped_early
    assert step.slo_misses and not step.untrusted
    assert len(read(asked.records)) < 400  # at most allowed misses and a second beyond the first quarter


def test_the_prefix_share_is_that_of_what_was_sent(tmp_path):
    """The first 60 of 200 prompts are one and the same; a step that ends after 90 has shared more than the trace."""
    n = 200
    ids = np.where(np.arange(n) < 60, 0, np.arange(n))
    replayed = replace(trace(np.arange(n)), block_tokens=16, block_ids=ids, block_offsets=np.arange(n + 1))
    tower = Tower(0, "usage", replayed.input_tokens, replayed.output_tokens, 0, lambda record: None)
    tower.take([(SENT, i, 0, 0) for i in range(90)])
    found = Found(Dialect("stub"), 100, (), False)
    ended = _Replay(endpoint("http://x"), plan(tmp_path, replayed), found, lambda: True, 0, None)
    assert ended._meta(0.0, tower, 1, {})["client"]["trace_prefix_share"] == pytest.approx(59 / 90)
    ended.plan = replace(ended.plan, trace=replace(trace(np.arange(n)), texts=("the same",) * n))
    assert "trace_prefix_share" not in ended._meta(0.0, tower, 1, {})["client"], "nobody knows what texts share"


def test_prompts_are_exact_that_are_ids_or_words_of_one_token_and_not_the_traces_own_texts(tmp_path):
    mine = trace(np.arange(2))
    given = replace(mine, texts=("the same",) * 2)

    def meta(prompt, words=(), replayed=mine):
        found = Found(Dialect("stub", prompt=prompt), 100, (), False, words)
        replay = _Replay(endpoint("http://x"), plan(tmp_path, replayed), found, lambda: True, 0, None)
        said = replay._meta(0.0, Tower(0, "usage", mine.input_tokens, mine.output_tokens, 0, lambda _: None), 1, {})
        return said["exact_prompts"], said["notes"]

    assert meta("ids") == (True, ())
    assert meta("text", ("one",)) == (True, ("the server takes no token ids: prompts are text",))
    exact, (note,) = meta("text")
    assert not exact and "prompts are made-up words" in note
    assert meta("text", replayed=given) == (False, ()), "nobody had asked for ids"


@pytest.mark.parametrize(
    ("slos", "missed"),
    [
        (("ttft_p99=1s",), ("saturated: the queue grows",)),  # it held until then, and would not have for ever
        (("ttft_p99=10ms",), ("ttft_p99 50 ms > 10 ms",)),  # what was seen says more
        (("error_rate=1%",), ()),  # a queue is no error
        ((), ()),
    ],
)
def test_a_step_that_was_ended_as_saturated_holds_no_latency(tmp_path, slos, missed):
    rows = [request(t / 10, [t / 10 + 0.05, t / 10 + 0.06]) for t in range(40)]
    made = records(tmp_path, rows, stopped="saturated: the queue grows")
    assert judge(made, tuple(parse(slo) for slo in slos), (0.5,)).slo_misses == missed


def test_a_missed_slo_says_why_requests_failed(tmp_path):
    rows = [request(t / 10, [t / 10 + 0.05, t / 10 + 0.06]) for t in range(30)]
    rows += [request(3 + t / 10, [], error=f"HTTP 400: {2001 + t} tokens are too many") for t in range(10)]
    made = records(tmp_path, rows)
    step = judge(made, (parse("error_rate=1%"),), (0.5,))
    assert step.slo_misses[1:] == ("10 of 40 requests failed, most with: HTTP 400: 2001 tokens are too many",)
    assert judge(made, (parse("ttft_p50=1s"),), (0.5,)).slo_misses == (), "it held: no reason to say anything"


LOST = {"stopped": "ttft_p90 cannot hold 100 ms: 5 misses, 4 are allowed among 40", "slos": {"ttft_p90": 0.1}}


@pytest.mark.parametrize(
    ("told", "asked", "missed", "undecided"),
    [
        (LOST, ("ttft_p90=100ms",), 1, 0),  # the same rule
        (LOST, ("ttft_p90=80ms",), 1, 0),  # what cannot hold 100 ms does not hold 80
        (LOST, ("ttft_p99=100ms", "tpot_p99=1s"), 1, 0),  # nor does a higher percentile: the step is lost
        (LOST, ("ttft_max=100ms",), 1, 0),
        (LOST, ("ttft_p90=2s",), 0, 1),  # who knows
        (LOST, ("ttft_p50=100ms",), 0, 1),
        (LOST, ("ttft_mean=100ms",), 0, 1),
        (LOST, ("ttft_p90=2s", "itl_p99=1ms"), 0, 2),  # though the half that was seen misses one of them
        (LOST, ("error_rate=1%",), 0, 1),
        (LOST, (), 0, 0),
        (LOST | {"slos": None}, ("ttft_p90=100ms",), 0, 1),  # a file of before, which does not tell its rule
        ({"stopped": "saturated: the queue grows"}, ("ttft_p90=2s",), 1, 0),  # whatever the SLO
        ({"stopped": ""}, ("ttft_p90=2s",), 0, 0),
        ({"stopped": "the client could not keep up with what it received"}, ("ttft_p90=2s",), 0, 0),
    ],
)
def test_records_that_end_early_under_one_rule_decide_nothing_under_another(tmp_path, told, asked, missed, undecided):
    made = records(tmp_path, [request(t / 10, [t / 10 + 0.15, t / 10 + 0.16]) for t in range(40)], **told)
    step = judge(made, tuple(parse(slo) for slo in asked), (0.5,))
    assert (len(step.slo_misses), sum(r.startswith("undecided: ") for r in step.untrusted)) == (missed, undecided)


@pytest.mark.parametrize(
    "why", ["tpot_p90 cannot hold 500 ms: 5 misses, 4 are allowed among 49", "saturated: it grows"]
)
def test_a_step_whose_requests_were_all_cut_off_says_why_it_was_ended(tmp_path, why):
    # no answer was whole, so there is no TPOT: not what the user has to know
    made = records(
        tmp_path,
        [request(t / 10, [t / 10 + 1, t / 10 + 2], wanted=40, error="stopped") for t in range(49)],
        stopped=why,
        slos={"tpot_p90": 0.5},
    )
    step = judge(made, (parse("ttft_p90=5s"), parse("tpot_p90=500ms")), (0.5,))
    assert "tpot_p90_s" not in step.metrics
    assert step.slo_misses == (why,)


def test_recomputing_under_other_slos_says_what_it_cannot_decide(tmp_path):
    records(tmp_path, [request(t / 10, [t / 10 + 0.15, t / 10 + 0.16]) for t in range(40)], **LOST)
    again = ["replay", "--recompute", "--records", str(tmp_path / "records.parquet")]
    result = CliRunner().invoke(app, [*again, "--slo", "ttft_p90=2s"])
    assert result.exit_code == 4
    assert "SLO ttft_p90=2000ms: undecided" in result.stdout and "ended early under other SLOs" in result.stdout


def test_a_step_that_holds_is_not_ended_early(tmp_path):
    with stub(first_s=0.01, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace(np.arange(60) / 30), "ttft_p90=2s", early_stop=True)
        step = undisturbed(lambda: measure(endpoint(url), asked), lambda step: not step.untrusted)
    assert step.stopped_early == "" and step.ok and len(read(asked.records)) == 60


def test_a_lost_slo_does_not_end_a_step_that_is_to_be_measured_whole(tmp_path):
    with stub(first_s=0.2, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace(np.arange(60) / 20), "ttft_p90=100ms")
        step = measure(endpoint(url), asked)
    assert step.stopped_early == "" and step.slo_misses and len(read(asked.records)) == 60


def test_progress_is_told(tmp_path):
    told: list[dict] = []

    def listen(name: str, data: dict) -> None:
        if name == "progress":
            told.append(dict(data))

    with stub(first_s=0.01, gap_s=0.0) as (_, url):
        measure(endpoint(url), plan(tmp_path, trace(np.arange(60) / 30), on_event=listen))
    assert len(told) >= 3 and told[-1]["total"] == 60
    assert [t["done"] for t in told] == sorted(t["done"] for t in told)
    assert all(set(t) == {"done", "total", "elapsed_s", "remaining_s"} for t in told)
    assert all(t["elapsed_s"] + t["remaining_s"] == pytest.approx(59 / 30) for t in told if 0 < t["elapsed_s"] < 1.9)


def test_another_load_window_or_seed_means_other_prompts(tmp_path):
    base = plan(tmp_path, trace([0.0]))
    seeds = {prompt_seed(base)}
    seeds |= {
        prompt_seed(plan(tmp_path, trace([0.0]), **change)) for change in ({"load": 2.0}, {"seed": 1}, {"window": "v"})
    }
    assert len(seeds) == 4
    assert prompt_seed(base) == prompt_seed(plan(tmp_path, trace([0.0])))


def test_forced_lengths_are_asked_for_and_free_ones_are_not(tmp_path):
    log = tmp_path / "log"
    with stub(first_s=0.0, gap_s=0.0, max_output=3, log=str(log)) as (_, url):
        measure(endpoint(url), plan(tmp_path, trace([0.0, 0.1]), output="forced", sampling={"top_p": 0.5}))
        step = measure(endpoint(url), plan(tmp_path, trace([0.0, 0.1]), output="free"))
    bodies = [json.loads(line)["body"] for line in log.read_text().splitlines()]
    forced, free = bodies[1], bodies[-1]
    assert (forced["ignore_eos"], forced["min_tokens"], forced["max_tokens"], forced["top_p"]) == (True, 10, 10, 0.5)
    assert "ignore_eos" not in free and "min_tokens" not in free and free["max_tokens"] == 10
    assert step.metrics["output_share"] == pytest.approx(0.3)  # what was really produced is told


@pytest.fixture
def small_trace(tmp_path) -> Path:
    write(poisson(30, 60), tmp_path / "trace.jsonl")
    return tmp_path / "trace.jsonl"


def test_the_command_measures_and_says_whether_the_slo_held(tmp_path, small_trace):
    records = tmp_path / "r.parquet"
    with stub(first_s=0.05, gap_s=0.001) as (_, url):
        run = ["replay", "--url", url, "--trace", str(small_trace), "--records", str(records), "--json"]

        def invoke(*words: str):
            """Again while the machine was too busy to trust what was measured."""
            return undisturbed(lambda: CliRunner().invoke(app, list(words)), lambda result: result.exit_code != 4)

        held = invoke(*run, "--slo", "ttft_p90=1s")
        missed = invoke(*run, "--slo", "ttft_p90=10ms", "--seed", "1")
        closed = invoke(*run[:-1], "--closed-loop", "2")
    assert held.exit_code == 0, held.output
    assert json.loads(held.stdout)["metrics"]["ttft_p50_s"] == pytest.approx(0.05, abs=0.02)
    assert missed.exit_code == 3 and json.loads(missed.stdout)["slo_misses"]
    assert closed.exit_code == 0 and "CLOSED LOOP with 2 in flight" in closed.stdout


def test_the_command_recomputes_from_records(tmp_path, small_trace):
    records = tmp_path / "r.parquet"
    with stub(first_s=0.02, gap_s=0.001) as (_, url):
        arguments = ["replay", "--url", url, "--trace", str(small_trace), "--records", str(records)]
        first = CliRunner().invoke(app, arguments)
    again = CliRunner().invoke(app, ["replay", "--recompute", "--records", str(records)])
    assert first.stdout == again.stdout and "TTFT" in again.stdout


def test_json_has_no_number_that_json_does_not_know(tmp_path, small_trace):
    with stub(first_s=0.0, gap_s=0.0, fail_every=2) as (_, url):
        result = CliRunner().invoke(app, ["replay", "--url", url, "--trace", str(small_trace), "--json"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads(result.stdout, parse_constant=refuse)
    assert told["metrics"]["ttft_p99_s"] is None and told["metrics"]["error_rate"] > 0.3


def test_a_bad_slo_is_refused_before_anything_is_sent(small_trace):
    result = CliRunner().invoke(
        app, ["replay", "--url", "http://127.0.0.1:1", "--trace", str(small_trace), "--slo", "x"]
    )
    assert result.exit_code != 0 and "bad SLO" in str(result.exception)


def test_a_server_that_nothing_answers_for_is_told_from_a_machine_without_connections():
    where = target("http://127.0.0.1:9")
    assert isinstance(unreachable(where, ConnectionRefusedError(111, "Connection refused")), Unreachable)
    assert isinstance(unreachable(where, TimeoutError()), Unreachable)
    assert not isinstance(unreachable(where, OSError(errno.EMFILE, "Too many open files")), Unreachable)


def test_the_servers_own_metrics_are_those_after_the_warm_up(tmp_path, monkeypatch):
    spans = []
    monkeypatch.setattr("tuner.load.step.fold", lambda samples, start_ns, end_ns: spans.append(end_ns - start_ns) or {})
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        measure(endpoint(url), plan(tmp_path, trace([0.0, 0.5, 1.0], output_tokens=2), warmup_s=0.25))
    assert spans == [750_000_000]


def test_records_that_do_not_say_of_which_step_they_are_are_one_line(tmp_path):
    records_ = records(tmp_path, [request(0.0, [0.1, 0.2])])
    facts = {name: value for name, value in records_.meta.items() if name != "stopped"}
    with pytest.raises(UsageError, match="does not say which load step"):
        judge(replace(records_, meta=facts), (), (0.5,))


def conversation(turns: int) -> Trace:
    """One, of which each prompt is the one before and a block more; thirty turns a second."""
    ids = [block for turn in range(turns) for block in range(turn + 1)]
    made = trace(np.arange(turns) / 30)
    offsets = np.cumsum([0, *range(1, turns + 1)])
    return replace(
        made, input_tokens=16 * np.arange(1, turns + 1), block_tokens=16, block_ids=np.array(ids), block_offsets=offsets
    )


def after(earlier: int, turns: int = 60) -> Trace:
    whole = conversation(turns)
    return replace(cut(whole, earlier, turns), earlier=cut(whole, 0, earlier))


def test_what_came_before_is_sent_first_a_token_each_and_not_measured(tmp_path):
    log = tmp_path / "log"
    with stub(first_s=0.02, gap_s=0.0, log=str(log)) as (_, url):
        asked = plan(tmp_path, after(40))
        step = measure(endpoint(url), asked)
    _, *sent = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["body"]["max_tokens"] for line in sent] == [1] * 40 + [10] * 20
    assert sorted(len(line["prompt"]) for line in sent[:40]) == [16 * (turn + 1) for turn in range(40)]
    longest = max((line["prompt"] for line in sent[:40]), key=len)
    assert sent[40]["prompt"][:640] == longest and len(sent[40]["prompt"]) == 656
    assert len(read(asked.records)) == 20 == step.metrics["measured_requests"] + step.metrics["cut_requests"]
    assert seconds(asked.records, "sent_ns")[0] < 0.2
    assert (step.metrics["fill_requests"], step.metrics["fill_failures"]) == (40, 0)
    assert step.metrics["fill_s"] > 0.02
    shares = [1 - 1 / (turn + 1) for turn in range(40, 60)]
    tokens = np.arange(41, 61)
    assert step.metrics["trace_prefix_share"] == pytest.approx((shares * tokens).sum() / tokens.sum())


def test_what_came_before_is_sent_32_at_a_time(tmp_path):
    with stub(first_s=0.2, gap_s=0.0) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, after(40)))
    assert 0.39 < step.metrics["fill_s"] < 4  # two rounds of 0.2 s; one by one they took 8 s


def test_a_cache_that_could_not_be_filled_is_no_measurement(tmp_path):
    with stub(first_s=0.0, gap_s=0.0, fail_every=8) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, after(40)))
    (said,) = [reason for reason in step.untrusted if "to fill the prefix cache" in reason]
    failed, _, words = said.partition(" ")
    assert words == "of the 40 prompts failed that were to fill the prefix cache"
    assert int(failed) >= 5  # with those that were not waited for once too many had failed


def test_filling_a_cache_ends_when_it_is_cancelled_and_when_the_server_dies(tmp_path):
    told = threading.Event()
    asked = plan(tmp_path, after(40), on_event=lambda name, data: told.set() if name == "phase" else None)
    with stub(first_s=30.0) as (_, url):
        threading.Thread(target=lambda: (told.wait(60), asked.cancel.set())).start()
        with pytest.raises(Cancelled):
            measure(endpoint(url), asked)
        assert not asked.records.exists()
        step = measure(endpoint(url), plan(tmp_path, after(40)), alive=lambda: False)
    assert step.stopped_early == "the server died"
    assert step.metrics["fill_failures"] == 40


def test_a_server_that_fails_while_its_cache_is_filled_is_not_asked_on_and_misses_its_slo(tmp_path):
    with stub(first_s=0.0, gap_s=0.0, fail_every=2) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, after(40), "error_rate=1%"))
    assert step.metrics["fill_failures"] > 5
    assert step.slo_misses and not step.untrusted


def test_a_server_that_hangs_while_its_cache_is_filled_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.load.step._HANGING_S", 0.5)
    told = []
    with stub(first_s=0.0, gap_s=0.0, hang_every=1) as (_, url):
        asked = plan(tmp_path, after(40), "ttft_p99=100ms", request_timeout_s=300.0, early_stop=True)
        step = measure(endpoint(url), replace(asked, on_event=lambda name, data: told.append((name, dict(data)))))
    [filled] = [data for name, data in told if name == "filled"]
    assert (filled["fill_requests"], filled["fill_failures"]) == (40, 40) and 0.5 < filled["fill_s"] < 200
    assert step.slo_misses and not step.untrusted
