"""Several client processes, one schedule."""

import signal
import subprocess
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.replays import endpoint, plan, poisson, seconds, trace
from tests.load.stub import stub
from tuner.engines.protocol import Cancelled
from tuner.errors import EnvironmentFault
from tuner.load.flight import Tower
from tuner.load.records import read
from tuner.load.shards import Fleet, Job, most_within, shard_count
from tuner.load.step import CLIENT_BEHIND, measure
from tuner.load.wire import target


def test_shards_keep_one_schedule_and_lose_nothing(tmp_path):
    replayed = poisson(150, 75, output_tokens=12)
    with stub(first_s=0.02, gap_s=0.01) as (_, url):
        asked = plan(tmp_path, replayed)
        step = measure(endpoint(url), asked, shards=3)
    assert step.metrics["shards"] == 3
    records = read(asked.records)
    assert sorted(records.columns["request"]) == list(range(150))
    intended = seconds(asked.records, "intended_ns")
    assert intended == pytest.approx(replayed.arrival_s, abs=1e-6)  # one start for all
    late = seconds(asked.records, "sent_ns") - intended
    assert np.median(late) < 0.005 and (late >= 0).all()
    assert step.metrics["client_output_tokens"] == 150 * 12


def test_a_closed_loop_is_shared_among_shards(tmp_path):
    with stub(first_s=0.2, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, poisson(30, 1000, output_tokens=3))
        measure(endpoint(url), asked, shards=2, concurrency=3)
    records = read(asked.records)
    assert len(records) == 30
    sent, ended = records.columns["sent_ns"], records.columns["end_ns"]
    flying = [int(((sent <= t) & (ended > t)).sum()) for t in sent]
    assert max(flying) == 3


def test_a_closed_loop_with_fewer_in_flight_than_shards_loses_nothing(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, poisson(10, 1000, output_tokens=3))
        step = measure(endpoint(url), asked, shards=4, concurrency=1)
    assert len(read(asked.records)) == 10
    assert step.metrics["shards"] == 1


def test_there_are_no_more_processes_than_requests(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, poisson(2, 1000, output_tokens=3))
        step = measure(endpoint(url), asked, shards=1000)
    assert step.metrics["shards"] == 2


@pytest.mark.parametrize(
    ("chunks_per_s", "cores", "shards"),
    [
        (1_000, 16, 1),  # one process carries it
        (50_000, 16, 3),  # one per 20,000
        (1_000_000, 16, 8),  # never more than half the cores: the server needs the others
        (1_000_000, 2, 1),
        (1_000_000, 1, 1),
    ],
)
def test_the_number_of_shards_follows_the_load_and_the_cores(chunks_per_s, cores, shards):
    offsets_s = np.arange(0, 60, 0.01)
    assert shard_count(offsets_s, np.full(6_000, chunks_per_s / 100), cores) == shards


def test_prompts_are_the_traces_whatever_the_shards(tmp_path):
    """Each request's bytes reach the server that the trace means, in full: the prompts' lengths and no two alike."""
    import json

    log = tmp_path / "log"
    with stub(first_s=0.0, gap_s=0.0, log=str(log)) as (_, url):
        measure(endpoint(url), plan(tmp_path, poisson(40, 100, input_tokens=5_000, output_tokens=2)), shards=2)
    prompts = [json.loads(line)["prompt"] for line in log.read_text().splitlines()][1:]  # the first is the probe's
    assert [len(prompt) for prompt in prompts] == [5_000] * 40
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 40


@pytest.mark.parametrize("shards", [1, 2])
def test_a_client_process_that_dies_makes_the_step_untrusted_and_misses_no_slo(tmp_path, shards):
    killed = []

    def kill(name: str, data: dict) -> None:
        if name == "progress" and data["done"] >= 10 and not killed:
            killed.extend(p for p in psutil.Process().children() if "tuner.load.worker" in p.cmdline())
            killed[0].kill()

    with stub(first_s=0.05, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace(np.arange(400) / 40), "ttft_p99=60s", on_event=kill)
        step = measure(endpoint(url), asked, shards=shards)
    assert len(killed) == shards
    assert any("a client process died" in reason for reason in step.untrusted) and not step.slo_misses
    assert step.metrics["client_processes_lost"] == 1


class Suspended(subprocess.Popen):
    """A client process that stands still from its start, as a machine without memory, or a hand, may have it."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.send_signal(signal.SIGSTOP)


def test_an_interrupt_does_not_wait_for_a_client_process_that_does_not_start(tmp_path, monkeypatch):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        monkeypatch.setattr("tuner.load.shards.subprocess.Popen", Suspended)
        asked = plan(tmp_path, trace(np.zeros(2)))
        threading.Timer(0.5, asked.cancel.set).start()
        with pytest.raises(Cancelled):
            measure(endpoint(url), asked)


def test_a_client_process_that_does_not_start_is_the_machines_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.load.shards._READY_S", 0.5)
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        monkeypatch.setattr("tuner.load.shards.subprocess.Popen", Suspended)
        with pytest.raises(EnvironmentFault, match="not ready within"):
            measure(endpoint(url), plan(tmp_path, trace(np.zeros(2))))


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_client_process_that_stands_still_does_not_keep_its_replay_for_ever(tmp_path, monkeypatch, interrupted):
    """Its parent is all that could end it. Two of them, of which one goes on."""
    monkeypatch.setattr("tuner.load.step._LEAVE_S", 1.0)
    monkeypatch.setattr("tuner.load.step._STILL_S", 1.0)
    suspended = []

    def suspend(name: str, data: dict) -> None:
        if name == "progress" and data["done"] >= 10 and not suspended:
            suspended.extend(p for p in psutil.Process().children() if "tuner.load.worker" in p.cmdline())
            suspended[0].suspend()
            if interrupted:
                asked.cancel.set()

    with stub(first_s=0.05, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace(np.arange(80) / 40), "ttft_p99=60s", on_event=suspend, request_timeout_s=1.0)
        if interrupted:
            with pytest.raises(Cancelled):
                measure(endpoint(url), asked, shards=2)
        else:
            step = measure(endpoint(url), asked, shards=2)
            assert any("a client process died" in reason for reason in step.untrusted) and not step.slo_misses
            assert step.metrics["client_processes_lost"] == 1
    assert len(read(asked.records)) >= 10
    assert not any(process.is_running() for process in suspended)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_process_that_is_killed_before_the_replay_is_told_with_its_signal(monkeypatch, at_once):
    class Killed(subprocess.Popen):
        def __init__(self, *args, **more) -> None:
            super().__init__(*args, **more)
            self.kill()
            self.wait()

    def request(_number: int) -> bytes:
        for child in psutil.Process().children():
            child.kill()
        return b"x"

    if at_once:
        monkeypatch.setattr("tuner.load.shards.subprocess.Popen", Killed)
    with pytest.raises(EnvironmentFault, match=r"signal 9, SIGKILL.* before the replay began.*memory"):
        with Fleet(Job(target("http://127.0.0.1:9"), [0], request, 5.0)):
            pass


def test_a_client_that_cannot_parse_what_it_receives_gives_up_and_says_so(tmp_path, monkeypatch):
    """Its processes keep so many bytes and no more, and send in time all the while; what they sent is all accounted
    for."""
    take = Tower.take
    monkeypatch.setattr("tuner.load.shards._PIPE_BYTES", 65_536)
    monkeypatch.setattr("tuner.load.step.Job", lambda *a: Job(*a, backlog_bytes=100_000))

    def slow(tower: Tower, events: list) -> None:
        take(tower, events)
        time.sleep(0.5)

    monkeypatch.setattr(Tower, "take", slow)
    with stub(first_s=0.0, gap_s=0.005) as (_, url):
        asked = plan(tmp_path, trace(np.arange(400) / 40, output_tokens=100), "ttft_p99=60s")
        told = measure(endpoint(url), asked, shards=2)
    assert any("could not keep up" in reason for reason in told.untrusted)
    assert told.stopped_early == CLIENT_BEHIND and not told.slo_misses
    made = read(asked.records)
    assert 0 < len(made) < 400 and set(made.columns["error"]) == {"", "stopped"}
    numbers = sorted(made.columns["request"].tolist())
    for shard in range(2):  # each sent its own in their order, until it was stopped
        own = [number for number in numbers if number % 2 == shard]
        assert own == list(range(shard, shard + 2 * len(own), 2))
    assert told.metrics["client_processes_lost"] == 0
    whole = made.columns["error"] == ""
    assert (made.columns["output_tokens"][whole] == 100).all()


def test_a_shard_that_has_its_fill_of_requests_keeps_no_other_from_starting():
    """Every second request has a prompt of 3 MB. The first shard reads no further once it has 32 MB and waits for the
    start, and the other must get its many small ones all the same."""
    big = b"x" * 3_000_000
    job = Job(target("http://127.0.0.1:9"), [10**6] * 60, lambda i: b"x" if i % 2 else big, 5.0, shards=2)
    started = threading.Event()

    def run() -> None:
        with Fleet(job):
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun = started.wait(30)
    if not begun:
        for child in psutil.Process().children():
            child.kill()
    thread.join(30)
    assert begun


def test_a_request_that_cannot_be_made_ends_the_replay_with_its_own_error():
    def request(number: int) -> bytes:
        raise ValueError(f"no text for {number}")

    job = Job(target("http://127.0.0.1:9"), [0, 10], request, 5.0)
    with pytest.raises(ValueError, match="no text for 0"), Fleet(job) as fleet:
        while fleet.events(0.1) is not None:
            pass


@given(st.lists(st.integers(0, 1_000), max_size=30).map(sorted), st.integers(1, 300))
def test_the_busiest_span_is_found(times, span):
    every = [sum(begin <= t < begin + span for t in times) for begin in times]
    assert most_within(np.array(times, dtype=np.int64), span) == max(every, default=0)
