"""What a server says of itself."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tuner.load.wire import target
from tuner.measure import server as measure_server
from tuner.measure.server import SERIES, Sample, Sampler, beside, fold, in_words, parse, write

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 12.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 50.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 7.0
process_cpu_seconds_total 99
"""


def test_engines_of_one_server_add_up_and_the_fullest_cache_counts():
    assert parse(PAGE) == {
        "running_requests": 7.0,
        "waiting_requests": 2.0,
        "kv_usage": 0.5,
        "output_tokens": 1500.0,
        "ttft_sum_s": 12.5,
        "ttft_count": 50.0,
    }


def test_the_page_of_a_real_vllm_that_drafts_has_every_column():
    page = (Path(__file__).parent / "pages/vllm-0.32-cpu-draft.txt").read_text()
    row = parse(page)
    assert row.keys() == SERIES.keys()
    assert (row["draft_tokens"], row["accepted_tokens"], row["prefix_query_tokens"]) == (1431, 117, 3584)
    assert (row["prompt_tokens"], row["output_tokens"], row["ttft_count"]) == (3584, 615, 31)


def test_a_page_without_such_metrics_is_empty():
    assert parse("<html>404</html>") == {} == parse("go_goroutines 5\n")


def sample(second: int, **row: float) -> Sample:
    return Sample(second * 10**9, row)


def test_counters_are_differences_and_gauges_are_taken_while_the_load_is_on():
    samples = [
        sample(0, waiting_requests=0, prefix_hit_tokens=100, prefix_query_tokens=1000, preemptions=5, kv_usage=0.0),
        sample(1, waiting_requests=4, prefix_hit_tokens=150, prefix_query_tokens=1100, preemptions=5, kv_usage=0.7),
        sample(2, waiting_requests=8, prefix_hit_tokens=200, prefix_query_tokens=1300, preemptions=6, kv_usage=0.9),
        sample(9, waiting_requests=0, prefix_hit_tokens=250, prefix_query_tokens=1500, preemptions=7, kv_usage=0.0),
    ]
    metrics = fold(samples, 10**9, 2 * 10**9)
    assert metrics["server_prefix_hit_rate"] == pytest.approx(150 / 500)
    assert metrics["server_preemptions"] == 2
    assert (metrics["server_queue_mean"], metrics["server_queue_max"]) == (6, 8)
    assert metrics["server_kv_usage_max"] == 0.9
    assert "server_draft_acceptance" not in metrics  # no speculation, no figure


def test_of_two_samples_outside_the_load_the_last_tells_and_a_share_of_nothing_is_none():
    still = {"prefix_query_tokens": 10, "prefix_hit_tokens": 5, "draft_tokens": 7, "accepted_tokens": 7}
    first = sample(0, waiting_requests=3, **still)
    last = sample(9, waiting_requests=2, **(still | {"prefix_query_tokens": 30}), preemptions=4)
    assert fold([first, last], 10**9, 2 * 10**9) == {
        "server_queue_mean": 2,
        "server_queue_max": 2,
        "server_prefix_hit_rate": 0,  # of what was asked for since
    }


def test_what_a_server_said_is_told_in_one_line():
    """As far as it said anything: the emulator's virtual clock has no server."""
    gauges = {"server_running_mean": 3.25, "server_running_max": 8.0, "server_queue_mean": 0.5, "server_queue_max": 4.0}
    shares = {"server_kv_usage_max": 0.834, "server_prefix_hit_rate": 0.3125, "server_draft_acceptance": 0.7}
    others = {"server_preemptions": 1200.0, "system_gpu_energy_j_per_output_token": 0.25, "ttft_p99_s": 0.1}
    assert in_words(gauges | shares | others) == (
        "3.25 running (at most 8), 0.5 queued (at most 4), KV cache at most 83.4% full, 1,200 preemptions, "
        "31.2% of prompt tokens found cached, 70% of drafted tokens accepted, 0.25 J per output token"
    )
    assert in_words({"ttft_p99_s": 0.1}) == ""


def test_a_restarted_server_gives_no_differences():
    metrics = fold([sample(0, output_tokens=500), sample(1, output_tokens=20)], 0, 10**9)
    assert "server_output_tokens" not in metrics


def test_the_samples_lie_beside_the_records(tmp_path):
    assert beside(tmp_path / "records-1.5.parquet").name == "server-1.5.parquet"
    assert beside(Path("x.parquet")).name == "server-x.parquet"
    write(tmp_path / "s.parquet", [sample(1, kv_usage=0.5), sample(2, running_requests=1)], 10**9)
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table["time_ns"] == [0, 10**9] and table["kv_usage"] == [0.5, None]


class Page(BaseHTTPRequestHandler):
    seen = 0

    def do_GET(self) -> None:
        type(self).seen += 1
        body = PAGE.replace("1.5e+03", str(1000 * type(self).seen)).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_sampler_looks_until_the_server_has_counted_everything():
    class Counting(Page):
        pass

    with HTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begun_s = time.monotonic()
        with Sampler(target(f"http://127.0.0.1:{server.server_port}"), every_s=0.05) as sampler:
            while len(sampler.samples) < 3:
                threading.Event().wait(0.01)
        assert time.monotonic() - begun_s >= 0.1  # it is measured, and is not to be busy with that
        first = sampler.samples[0].row["output_tokens"]
        wanted = len(sampler.samples) * 1000 + 1000
        sampler.settle(wanted)
        assert sampler.samples[-1].row["output_tokens"] - first == wanted
        sampler.settle(10**9, wait_s=0.01)  # which it never counts
        server.shutdown()


def test_a_page_that_never_ends_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(measure_server, "_TIMEOUT_S", 0.5)
    ended = threading.Event()

    class Dripping(Page):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    self.wfile.write(b"#")

    with HTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begun_s = time.monotonic()
        with Sampler(target(f"http://127.0.0.1:{server.server_port}")) as sampler:
            pass
        took_s = time.monotonic() - begun_s
        ended.set()
        server.shutdown()
    assert took_s < 10 and sampler.samples == []


def test_a_server_without_metrics_is_asked_once():
    with Sampler(target("http://127.0.0.1:1")) as sampler:
        pass
    sampler.settle(10)
    assert sampler.samples == []
