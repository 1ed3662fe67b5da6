"""What the parent keeps of the requests under way."""

import errno
import math
import socket
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.replays import plan, trace
from tuner.load import client
from tuner.load.flight import Lags, Tower
from tuner.load.pacer import OpenLoop
from tuner.load.step import Watch
from tuner.load.wire import target


@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]), st.data())
def test_a_quantile_of_delays_is_off_by_its_buckets_width_at_most(delays_ns, q, data):
    """However they were counted: one by one, or several alike at once."""
    lags = Lags()
    counts = [data.draw(st.sampled_from([1, 1, 3])) for _ in delays_ns]
    for delay_ns, count in zip(delays_ns, counts, strict=True):
        lags.add(delay_ns, count)
    every = sorted(d for d, count in zip(delays_ns, counts, strict=True) for _ in range(count))
    true_s = every[max(1, math.ceil(q * len(every))) - 1] / 1e9
    assert true_s * (1 - 1 / 32) - 1e-6 <= lags.quantile_s(q) <= true_s + 1e-12


def test_a_quantile_of_nothing_is_nothing():
    assert Lags().quantile_s(0.99) == 0.0


def test_many_delays_are_counted_in_little_memory():
    lags = Lags()
    for delay_ns in range(0, 100_000_000, 1_000):
        lags.add(delay_ns)
    assert 0.097 < lags.quantile_s(0.99) <= 0.099
    assert len(lags._counts) < 1_000


@pytest.mark.parametrize(("code", "faults"), [(errno.EMFILE, 3), (errno.EADDRNOTAVAIL, 3), (errno.ENETUNREACH, 0)])
def test_a_request_for_which_the_client_had_no_socket_is_not_the_servers_failure(monkeypatch, code, faults):
    def none(*_: object) -> client.Connection:
        raise OSError(code, "none left")

    records = []
    tower = Tower(0, "usage", np.full(3, 8), np.full(3, 4), 0, records.append)
    monkeypatch.setattr(client, "Connection", none)
    address: list[tuple[int, tuple]] = [(int(socket.AF_INET), ("127.0.0.1", 9))]
    loop = client.Client(target("http://127.0.0.1:9"), address, None, lambda _: b"POST", tower.take, 10**10)
    loop.run(OpenLoop(range(3), [0] * 3, time.monotonic_ns()), 3, lambda: "")
    loop.close()
    assert ["none left" in record.error for record in records] == [True] * 3
    assert tower.facts()["client_failures"] == faults


def test_what_a_shard_has_not_told_yet_is_no_delay_of_the_server():
    """The early stop looks at a time until which every shard was heard, not at the clock on the wall."""
    tower = Tower(1_000, "usage", np.full(2, 8), np.full(2, 4), 0, lambda record: None, shards=2)
    assert tower.known_until_ns is None
    tower.take([(client.SENT, 0, 1_000, 1_000), (client.TICK, 9_000, 0, 0, 71)])
    assert tower.known_until_ns is None  # nothing is known of the other
    tower.take([(client.TICK, 5_000, 0, 0, 72)])
    assert tower.known_until_ns == 4_000
    tower.take([(client.LEFT, 72)])  # it has nothing to tell any more
    assert tower.known_until_ns == 8_000
    tower.take([(client.LEFT, 71)])
    assert tower.known_until_ns is None


@pytest.mark.parametrize(("heard_s", "lost"), [(0.5, False), (2.5, True)])
def test_a_step_is_not_ended_for_tokens_that_wait_to_be_parsed(tmp_path, heard_s, lost):
    """All of 100 requests wait; the limit is 1 s; it is late on the wall, and the shard was heard until ``heard_s``."""
    replayed = trace(np.zeros(100))
    asked = plan(tmp_path, replayed, "ttft_p99=1s")
    tower = Tower(0, "usage", replayed.input_tokens, replayed.output_tokens, 0, lambda record: None)
    tower.take([(client.SENT, i, 0, 0) for i in range(100)] + [(client.TICK, int(heard_s * 1e9), 0, 0, 71)])
    watch = Watch(asked, np.zeros(100, dtype=np.int64), True)
    assert watch.verdict(tower).startswith("ttft_p99 cannot hold") == lost
