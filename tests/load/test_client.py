"""The replay client against servers of known timing and known faults, each in a process of its own."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.load.replays import endpoint, plan, poisson, quantile, seconds, trace, truth
from tests.load.stub import stub
from tuner.engines.protocol import Cancelled, Endpoint
from tuner.errors import EnvironmentFault, UsageError
from tuner.load.connection import Connection
from tuner.load.probe import probe
from tuner.load.records import read
from tuner.load.shards import resolve
from tuner.load.step import measure
from tuner.load.wire import target


def test_latencies_are_the_servers_own(tmp_path):
    with stub(first_s=0.1, gap_s=0.02, times=str(tmp_path / "times")) as (_, url):
        asked = plan(tmp_path, poisson(60, 40, output_tokens=10))
        m = measure(endpoint(url), asked).metrics
    true = truth(asked.records, tmp_path / "times")
    for name, off_s in (("ttft", 0.01), ("itl", 0.002), ("tpot", 0.002), ("e2e", 0.01)):
        assert m[f"{name}_p50_s"] == pytest.approx(true[f"{name}_p50_s"], abs=off_s + m["stamp_error_p99_s"]), name
    assert m["ttft_p50_s"] >= 0.1 and m["e2e_p50_s"] >= 0.1 + 9 * 0.02
    assert m["error_rate"] == 0 and m["output_share"] == 1
    assert m["client_output_tokens"] == 600
    assert m["kernel_stamped_share"] == 1 or not sys.platform.startswith("linux")


@pytest.mark.slow
def test_a_stalling_servers_true_p99_is_reported_and_a_closed_loop_misses_it(tmp_path):
    """The server stands still for 2 s of every 10 s. What users at the trace's rate live through follows from the
    schedule alone; a client that waits for its answers before it asks again asks hardly anything during a stall."""
    first_s, every_s, stall_s = 0.05, 10.0, 2.0
    replayed = poisson(600, 30, output_tokens=2)
    epoch_s = time.monotonic()
    with stub(first_s=first_s, gap_s=0.0, stall_every_s=every_s, stall_s=stall_s, epoch_s=epoch_s) as (_, url):
        opened = plan(tmp_path, replayed)
        step = measure(endpoint(url), opened)
        closed = measure(endpoint(url), plan(tmp_path, replayed), concurrency=2)

    # independently: from each request's intended time on the server's clock, by the definition of the stall
    meta = read(opened.records).meta
    start_s = meta["epoch_unix_s"] - (time.time() - time.monotonic())

    def release(t: float) -> float:
        phase = (t - epoch_s) % every_s
        return t + every_s - phase if phase >= every_s - stall_s else t

    intended = seconds(opened.records, "intended_ns") + start_s
    truth = np.array([release(release(t) + first_s) - t for t in intended])
    counted = (intended - start_s) * 1e9 >= 0.25 * float(replayed.arrival_s[-1]) * 1e9  # certainly past the ramp
    reported = seconds(opened.records, "first_token_ns") + start_s - intended
    assert quantile(reported[counted], 0.99) == pytest.approx(quantile(truth[counted], 0.99), abs=0.1)
    assert step.metrics["ttft_p99_s"] > 1.8
    assert step.metrics["ttft_p90_s"] == pytest.approx(quantile(truth, 0.9), abs=0.35)
    assert closed.metrics["closed_loop_concurrency"] == 2
    assert closed.metrics["ttft_p99_s"] < 0.5 * step.metrics["ttft_p99_s"]


def test_latency_counts_from_the_intended_time_when_the_server_is_frozen(tmp_path):
    """All requests that were due while the server was stopped waited for it, the last as much as the first."""
    replayed = trace(np.arange(100) / 20.0, output_tokens=2)
    with stub(first_s=0.01, gap_s=0.0) as (server, url):
        begun = threading.Event()

        def freeze() -> None:
            begun.wait(30)
            os.kill(server.pid, signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(server.pid, signal.SIGCONT)

        thread = threading.Thread(target=freeze)
        thread.start()
        asked = plan(tmp_path, replayed, on_event=lambda name, data: data.get("done") and begun.set())
        step = measure(endpoint(url), asked)
        thread.join()
    waited = seconds(asked.records, "first_token_ns") - seconds(asked.records, "intended_ns")
    assert (waited > 0.2).sum() >= 14  # 20 were due in that second
    lag = seconds(asked.records, "sent_ns") - seconds(asked.records, "intended_ns")
    assert lag.max() < 0.5  # and left all the same
    assert not any("sent late" in reason for reason in step.untrusted)


def test_a_frozen_client_is_untrusted(tmp_path):
    """A client that stood still for a second saw latencies of its own making. What is under way when it is stopped
    has some 700 tokens to come."""
    replayed = poisson(80, 20, output_tokens=60)
    with stub(first_s=0.02, gap_s=0.02) as (_, url):

        def until_made(tokens: int) -> int:
            deadline = time.monotonic() + 30
            while (made := int(urllib.request.urlopen(f"{url}/made", timeout=10).read())) < tokens:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return made

        def pause() -> None:
            until_made(800)
            children = [
                int(pid)
                for pid in os.listdir("/proc")
                if pid.isdigit() and _parent(int(pid)) == os.getpid() and "tuner.load.worker" in _command(int(pid))
            ]
            assert children
            for pid in children:
                os.kill(pid, signal.SIGSTOP)
            try:
                made = until_made(0)
                time.sleep(1.0)
                until_made(made + 100)  # a machine that stood still itself made none
            finally:
                for pid in children:
                    os.kill(pid, signal.SIGCONT)

        with ThreadPoolExecutor(1) as other:
            paused = other.submit(pause)
            step = measure(endpoint(url), plan(tmp_path, replayed))
            paused.result()
    assert any("sent late" in reason for reason in step.untrusted)
    assert any("read late" in reason for reason in step.untrusted)


def test_engine_steps_that_make_several_tokens_are_counted_by_tokens(tmp_path):
    with stub(first_s=0.02, gap_s=0.03, tokens_per_chunk=4, times=str(tmp_path / "times")) as (_, url):
        asked = plan(tmp_path, poisson(30, 30, output_tokens=20))
        m = measure(endpoint(url), asked).metrics
    true = truth(asked.records, tmp_path / "times")
    assert m["client_output_tokens"] == 600
    assert m["itl_p50_s"] == 0 and m["itl_p95_s"] == pytest.approx(
        true["itl_p95_s"], abs=0.005 + m["stamp_error_p99_s"]
    )
    assert m["tpot_p50_s"] == pytest.approx(true["tpot_p50_s"], abs=0.001 + m["stamp_error_p99_s"])


@pytest.mark.parametrize("way", [{"split": 7}, {"glue": 5}, {"split": 11, "glue": 3, "tokens_per_chunk": 2}])
def test_split_and_glued_events_are_understood(tmp_path, way):
    with stub(first_s=0.01, gap_s=0.002, **way) as (_, url):
        m = measure(endpoint(url), plan(tmp_path, poisson(20, 40, output_tokens=11))).metrics
    assert (m["client_output_tokens"], m["error_rate"]) == (220, 0)


def test_errors_and_broken_streams_count_against_everything(tmp_path):
    with stub(first_s=0.01, gap_s=0.002, fail_every=5, break_every=7) as (_, url):
        asked = plan(tmp_path, trace(np.arange(100) / 100), "ttft_p99=1s")
        step = measure(endpoint(url), asked)
    errors = read(asked.records).columns["error"]
    assert sum("overloaded" in e for e in errors) == 20
    assert sum("cut off" in e for e in errors) == 12  # every 7th but those that are also a 5th
    assert step.metrics["ttft_p99_s"] == np.inf and step.slo_misses
    assert step.metrics["goodput_requests_per_s"] == pytest.approx(step.metrics["requests_per_s"])
    assert step.metrics["requests_per_s"] < 0.8 * step.metrics["offered_requests_per_s"]


@pytest.mark.parametrize("end", ["0\r\nX-Took: 1\r\nX-More: a b\r\n\r\n", "000\r\n\r\n", "0;signed=no\r\n\r\n"])
def test_a_body_may_end_in_any_way_that_http_allows(tmp_path, end):
    """The last chunk's size has as many zeros as it likes, extensions and trailers: such answers once never ended."""
    with stub(first_s=0.01, gap_s=0.002, end=end) as (_, url):
        m = measure(endpoint(url), plan(tmp_path, trace(np.arange(30) / 60), request_timeout_s=3.0)).metrics
    assert m["error_rate"] == 0 and m["client_output_tokens"] == 300


def test_an_answer_that_breaks_off_in_due_form_is_a_failure(tmp_path):
    with stub(first_s=0.01, gap_s=0.002, cut_every=5) as (_, url):
        asked = plan(tmp_path, trace(np.arange(40) / 80), "error_rate=1%")
        step = measure(endpoint(url), asked)
    assert sum(error == "response cut off" for error in read(asked.records).columns["error"]) == 8
    assert step.slo_misses and step.metrics["goodput_requests_per_s"] < 0.9 * step.metrics["offered_requests_per_s"]


def test_a_server_whose_streams_end_without_a_word_is_refused_for_that(tmp_path):
    with stub(usage="none", done=False) as (_, url), pytest.raises(UsageError, match="do not say that they end"):
        probe(endpoint(url))
    with stub(usage="final", done=False) as (_, url):
        assert measure(endpoint(url), plan(tmp_path, trace([0.0, 0.1]))).metrics["error_rate"] == 0


@pytest.mark.parametrize(("options", "route"), [({"refuse": ["ids"]}, "completions"), ({"chat_only": True}, "chat")])
def test_prompts_of_text_have_the_traces_tokens_with_what_the_server_adds(tmp_path, options, route):
    words = ["One", "two", "three", *(f"a{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="One"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    replayed = replace(trace(np.arange(20) / 200), input_tokens=np.arange(20) + 40)
    with stub(first_s=0.0, gap_s=0.0, template=7, **options) as (_, url):
        asked = plan(tmp_path, replayed)
        step = measure(replace(endpoint(url), tokenizer=str(tmp_path)), asked)
    records = read(asked.records)
    assert records.meta["dialect"]["route"] == route and records.meta["exact_prompts"]
    assert (records.columns["prompt_tokens"] == records.columns["input_tokens"]).all()
    assert step.metrics["input_share"] == 1 and "made-up" not in "".join(records.meta["notes"])


def test_a_server_that_cuts_prompts_off_is_not_believed(tmp_path):
    """All of one length: which of them are counted depends on when they were answered."""
    with stub(first_s=0.0, gap_s=0.0, reads=45) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, trace(np.arange(20) / 200, input_tokens=50)))
    said = [reason for reason in step.untrusted if "prompt" in reason]
    assert said == ["the server counted 90.0% of the prompt tokens that were sent: it cuts prompts off"]


def test_a_server_that_only_pings_is_given_up(tmp_path):
    with stub(pings=True) as (_, url), pytest.raises(EnvironmentFault, match="did not answer in time"):
        probe(endpoint(url), timeout_s=0.5)


def test_a_request_that_is_never_answered_is_censored_not_dropped(tmp_path):
    with stub(first_s=0.01, gap_s=0.002, hang_every=10) as (_, url):
        asked = plan(tmp_path, trace(np.arange(40) / 80), request_timeout_s=1.0)
        step = measure(endpoint(url), asked)
    records = read(asked.records)
    assert len(records) == 40
    assert (records.columns["error"] == "timeout").sum() == 4
    hung = records.columns["error"] == "timeout"
    waited_s = (records.columns["end_ns"] - records.columns["intended_ns"])[hung] / 1e9
    assert (waited_s >= 1.0).all() and (waited_s < 1.5).all()
    assert step.metrics["censored_requests"] > 0 and step.metrics["ttft_p99_s"] == np.inf


def test_a_server_that_closes_idle_connections_causes_no_errors(tmp_path):
    with stub(first_s=0.0, gap_s=0.0, idle_close_s=0.05) as (_, url):
        m = measure(endpoint(url), plan(tmp_path, trace(np.arange(60) / 15))).metrics
    assert m["error_rate"] == 0


def test_a_request_that_met_a_closing_connection_goes_out_once_more(tmp_path):
    with stub(first_s=0.0, gap_s=0.0, close_on_reuse=True) as (_, url):
        asked = plan(tmp_path, trace(np.arange(40) / 20))
        m = measure(endpoint(url), asked).metrics
    columns = read(asked.records).columns
    assert m["error_rate"] == 0 and columns["retried"].any()


def test_a_connection_that_was_idle_for_long_is_not_used_again(tmp_path):
    with stub(first_s=0.0, gap_s=0.0, close_on_reuse=True) as (_, url):
        asked = plan(tmp_path, trace([0.0, 2.5]))
        m = measure(endpoint(url), asked).metrics
    assert m["error_rate"] == 0 and not read(asked.records).columns["retried"].any()


def test_a_dead_server_gives_a_step_full_of_errors(tmp_path):
    with stub(first_s=0.01, gap_s=0.01) as (server, url):
        asked = plan(tmp_path, trace(np.arange(100) / 20), on_event=lambda *_: server.kill())
        step = measure(endpoint(url), asked, alive=lambda: server.poll() is None)
    assert step.stopped_early == "the server died"
    assert step.metrics["error_rate"] == 1


def test_a_server_that_is_gone_but_said_to_be_alive_gives_errors_too(tmp_path):
    with stub(first_s=0.01, gap_s=0.01) as (server, url):
        asked = plan(tmp_path, trace(np.arange(40) / 40), on_event=lambda *_: server.kill())
        step = measure(endpoint(url), asked)
    assert step.metrics["error_rate"] > 0.5 and not step.stopped_early
    assert any("refused" in error for error in read(asked.records).columns["error"])


def test_cancelling_keeps_the_records_until_then(tmp_path):
    cancel = threading.Event()
    five = lambda name, data: cancel.set() if name == "progress" and data["done"] >= 5 else None  # noqa: E731
    with stub(first_s=0.5, gap_s=0.01) as (_, url):
        asked = plan(tmp_path, trace(np.arange(1000) / 20), cancel=cancel, on_event=five)
        with pytest.raises(Cancelled):
            measure(endpoint(url), asked)
    records = read(asked.records)
    assert 5 < len(records) < 1000 and records.meta["stopped"] == "cancelled"
    assert set(records.columns["error"]) == {"", "cancelled"}, "what was under way is no failure of the server"


def test_who_leaves_at_once_keeps_the_records_until_then(tmp_path):
    def leave(name, data):
        if name == "progress" and data["done"] >= 5:
            raise KeyboardInterrupt

    with stub(first_s=0.01, gap_s=0.01) as (_, url):
        asked = plan(tmp_path, trace(np.arange(1000) / 20), on_event=leave)
        with pytest.raises(KeyboardInterrupt):
            measure(endpoint(url), asked)
    records = read(asked.records)
    assert 5 <= len(records) < 1000
    assert records.meta["stopped"] == "cancelled"


def test_a_signal_to_the_whole_group_leaves_the_end_to_the_parent(tmp_path):
    sent = []

    def signals(name, data):
        if name == "progress" and data["done"] and not sent:
            for child in psutil.Process().children():
                if "tuner.load.worker" in _command(child.pid):
                    sent.append(child.pid)
                    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                        child.send_signal(number)

    with stub(first_s=0.01, gap_s=0.01) as (_, url):
        step = measure(endpoint(url), plan(tmp_path, trace(np.arange(60) / 20), on_event=signals))
    assert sent and not step.stopped_early


@pytest.mark.parametrize(
    ("way", "dialect"),
    [
        ({}, ("completions", "ids", "usage", True)),
        # an older vLLM: no running count, but token ids
        ({"usage": "final"}, ("completions", "ids", "ids", True)),
        # neither
        ({"usage": "final", "refuse": ["return_token_ids"]}, ("completions", "ids", "total", True)),
        # a server that knows no ignore_eos
        ({"usage": "final", "refuse": ["return_token_ids", "ignore_eos"]}, ("completions", "ids", "total", False)),
        # text only
        ({"refuse": ["ids", "ignore_eos"]}, ("completions", "text", "total", False)),
        # chat only, strict about fields
        ({"chat_only": True, "refuse": ["continuous_usage_stats"]}, ("chat", "text", "total", True)),
    ],
)
def test_the_client_speaks_what_the_server_takes(tmp_path, way, dialect):
    with stub(first_s=0.01, gap_s=0.005, **way) as (_, url):
        asked = plan(tmp_path, trace(np.arange(10) / 50))
        m = measure(endpoint(url), asked).metrics
    told = read(asked.records).meta["dialect"]
    assert (told["route"], told["prompt"], told["counting"], told["forced"]) == dialect
    assert (m["client_output_tokens"], m["error_rate"]) == (100, 0)


def test_the_model_is_asked_for_where_it_is_not_given(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        asked = plan(tmp_path, trace([0.0, 0.1]))
        measure(Endpoint(url, ""), asked)
    assert read(asked.records).meta["dialect"]["model"] == "stub"


def test_a_trace_of_texts_is_sent_as_texts(tmp_path):
    texts = ("One question.", 'Another, with "quotes" and é.')
    log = tmp_path / "log"
    with stub(first_s=0.0, gap_s=0.0, log=str(log)) as (_, url):
        m = measure(endpoint(url), plan(tmp_path, replace(trace([0.0, 0.1]), texts=texts))).metrics
    assert [json.loads(line)["prompt"] for line in log.read_text().splitlines()][1:] == list(texts)
    assert m["error_rate"] == 0 and m["client_output_tokens"] == 20


def test_a_host_name_leads_to_the_address_that_answers(tmp_path):
    with stub(first_s=0.0, gap_s=0.0) as (_, url):
        where = url.replace("127.0.0.1", "localhost") + "/v1/"
        m = measure(endpoint(where), plan(tmp_path, trace([0.0, 0.1]))).metrics
    assert m["error_rate"] == 0


def test_an_address_that_this_machine_cannot_reach_is_passed_over(monkeypatch):
    """Without IPv6 in the kernel a name can have an address of it all the same, and no socket is made for it."""
    with stub() as (_, url):
        where, make = target(url), socket.socket

        def made(family, *rest):
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            return make(family, *rest)

        found = [(socket.AF_INET6, ("::1", where.port, 0, 0)), (socket.AF_INET, ("127.0.0.1", where.port))]
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *a, **k: [(f, socket.SOCK_STREAM, 6, "", at) for f, at in found]
        )
        monkeypatch.setattr(socket, "socket", made)
        assert resolve(where) == [(socket.AF_INET, ("127.0.0.1", where.port))]


@pytest.fixture
def certified(tmp_path):
    """A certificate of localhost's, and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    try:
        subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return certificate, key


def test_a_body_ends_when_tls_says_farewell_though_the_connection_stays_open(certified):
    serving, asking = (
        ssl.create_default_context(purpose) for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH)
    )
    serving.load_cert_chain(*certified)
    asking.load_verify_locations(certified[0])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = Connection(listening.getsockname(), socket.AF_INET, asking, "localhost")
        connection.assign(0, b"GET / HTTP/1.1\r\n\r\n")
        peer, _ = listening.accept()
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = serving.wrap_bio(came, goes, server_side=True)
        ended, until_s = False, time.monotonic() + 10
        steps = iter((tls.do_handshake, tls.read, lambda: tls.write(b"HTTP/1.1 200 OK\r\n\r\nthe end"), tls.unwrap))
        step = next(steps)
        with peer, contextlib.closing(connection):
            peer.setblocking(False)
            while not ended and time.monotonic() < until_s:
                with contextlib.suppress(BlockingIOError):
                    connection.write()
                    ended = connection.ended(connection.read()[0])
                with contextlib.suppress(BlockingIOError):
                    came.write(peer.recv(65_536))
                with contextlib.suppress(ssl.SSLWantReadError, StopIteration):
                    while True:
                        step()
                        step = next(steps)
                peer.send(goes.read())  # the farewell with the last data
    assert ended


def test_tls_is_spoken_and_timed_alike(tmp_path, certified, monkeypatch):
    certificate, key = certified
    with stub(first_s=0.1, gap_s=0.02, tls=[str(certificate), str(key)], times=str(tmp_path / "times")) as (_, url):
        where = endpoint(url.replace("http://127.0.0.1", "https://localhost"))
        with pytest.raises(EnvironmentFault, match="no TLS"):
            measure(where, plan(tmp_path, trace([0.0])))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        asked = plan(tmp_path, poisson(24, 8, input_tokens=40_000, output_tokens=9))
        m = measure(where, asked).metrics
    first_s = float(np.median(seconds(asked.records, "first_token_ns")))
    true = truth(asked.records, tmp_path / "times")
    assert (m["error_rate"], m["client_output_tokens"]) == (0, 216)
    off_s = m["stamp_error_p99_s"]  # of a client that is kept from reading, as it says itself
    assert first_s == pytest.approx(true["first_token_p50_s"], abs=0.02 + off_s) and m["ttft_p50_s"] >= 0.1
    assert m["itl_p50_s"] == pytest.approx(true["itl_p50_s"], abs=0.003 + off_s)


def test_a_web_server_is_told_apart_in_one_line(tmp_path):
    with stub(html=True) as (_, url):
        with pytest.raises(UsageError, match="no OpenAI-compatible server"):
            measure(Endpoint(url, ""), plan(tmp_path, trace([0.0])))
        with pytest.raises(UsageError, match="does not stream completions"):
            measure(endpoint(url), plan(tmp_path, trace([0.0])))


def test_nothing_listening_is_an_environment_fault(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(EnvironmentFault, match="no server answers"):
        measure(endpoint(f"http://127.0.0.1:{port}"), plan(tmp_path, trace([0.0])))


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
