"""What the parent keeps of the requests under way."""

import errno
import json
import math
import socket
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.replays import plan, trace
from tuner.load import client
from tuner.load.connection import NO_STAMP
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
    monkeypatch.setattr("tuner.load.pool.Connection", none)
    address: list[tuple[int, tuple]] = [(int(socket.AF_INET), ("127.0.0.1", 9))]
    loop = client.Client(target("http://127.0.0.1:9"), address, None, lambda _: b"POST", tower.take, 10**10)
    loop.run(OpenLoop(range(3), [0] * 3, time.monotonic_ns()), 3, lambda: "")
    loop.close()
    assert ["none left" in record.error for record in records] == [True] * 3
    assert tower.facts()["client_failures"] == faults


def test_a_request_that_found_nobody_does_not_go_out_again():
    told = []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()
        where = [(int(socket.AF_INET), address)]
        loop = client.Client(
            target(f"http://127.0.0.1:{address[1]}"), where, None, lambda _: b"POST", told.extend, 10**10
        )
        loop.run(OpenLoop(range(3), [0] * 3, time.monotonic_ns()), 3, lambda: "")
        loop.close()
    ended = [event for event in told if event[0] == client.ENDED]
    assert [("refused" in error, again) for _, _, _, error, again in ended] == [(True, False)] * 3


def test_what_a_shard_has_not_told_yet_is_no_delay_of_the_server():
    """The early stop looks at a time until which every shard was heard, not at the clock on the wall."""
    tower = Tower(1_000, "usage", np.full(2, 8), np.full(2, 4), 0, lambda record: None, shards=2)
    assert tower.known_until_ns is None
    tower.take([(client.SENT, 0, 1_000, 1_000), (client.TICK, 9_500, 9_000, 0, 0, 71)])
    assert tower.known_until_ns is None  # nothing is known of the other
    tower.take([(client.TICK, 4_500, 0, 0, 0, 72)])
    assert tower.known_until_ns is None  # nor by its first word: it is there, and tells later what happened
    tower.take([(client.TICK, 5_500, 5_000, 0, 0, 72)])
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
    tower.take([(client.SENT, i, 0, 0) for i in range(100)] + [(client.TICK, 3 * 10**9, int(heard_s * 1e9), 0, 0, 71)])
    watch = Watch(asked, np.zeros(100, dtype=np.int64), True)
    assert watch.verdict(tower).startswith("ttft_p99 cannot hold") == lost


WALL_NS = 1_700_000_000_000_000_000  # the wall clock's time at the monotonic clock's 0
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def tokens(first: int, count: int) -> bytes:
    """``count`` events of one token each, a chunk each, the running count being ``first`` in the first."""
    text = b""
    for total in range(first, first + count):
        told = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 8, "completion_tokens": total}}
        event = b"data: " + json.dumps(told).encode() + b"\n\n"
        text += b"%x\r\n%s\r\n" % (len(event), event)
    return text


def told(*reads: tuple[int | None, int, int, bytes]) -> tuple:
    """A client's event: of each read the kernel's time, since when bytes may have lain, when they were read, ms."""
    stamps = [NO_STAMP if at is None else struct.pack("qq", *divmod(WALL_NS + at * 10**6, 10**9)) for at, *_ in reads]
    wakes = [[since * 10**6, WALL_NS, read * 10**6] for _, since, read, _ in reads]
    return client.READ, 0, b"".join(stamps), wakes, [len(data) for *_, data in reads], b"".join(r[-1] for r in reads)


def heard(*reads: tuple[int | None, int, int, bytes]) -> tuple[list[int], dict]:
    """The tokens' times in the record, ms, and the client's facts."""
    records = []
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 100), 0, records.append)
    tower.take([(client.SENT, 0, 0, 0), told(*reads), (client.ENDED, 0, 10**9, "stopped", False)])
    return [at // 10**6 for at in records[0].token_ns], dict(tower.facts())


@pytest.mark.parametrize(
    ("last", "error_s"),
    [
        (tokens(3, 1), 0.0),
        # the socket was last looked at at 41 ms: the earlier of two tokens that were found at 49 may have come right
        # after it, and not, as the time that the last one lay unread could suggest, at 47
        (tokens(3, 2), 0.007),
    ],
)
def test_a_token_read_with_a_later_one_may_be_misdated_by_the_time_since_the_last_look(last, error_s):
    times, facts = heard((10, 5, 11, HEAD + tokens(1, 1)), (30, 25, 31, tokens(2, 1)), (48, 41, 49, last))
    assert times == [10, 30, *[48] * (len(times) - 2)] and len(times) == 2 + last.count(b"data:")
    assert facts["stamp_error_p99_s"] == pytest.approx(error_s, rel=1 / 32)
    assert facts["read_lag_p99_s"] == pytest.approx(error_s + 0.001, rel=1 / 32)
    assert facts["kernel_stamped_share"] == 1.0


def test_the_share_of_misdated_tokens_is_one_of_all_tokens():
    """One of 123 is less than one in a hundred, whether the others came in reads beside it or in other batches."""
    reads = [(10 * k, 10 * k - 5, 10 * k + 1, tokens(k, 1)) for k in range(1, 122)]
    records = []
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 200), 0, records.append)
    tower.take([(client.SENT, 0, 0, 0), told((10, 5, 11, HEAD + tokens(1, 1)), *reads[1:60])])
    tower.take([told(*reads[60:120], (1210, 1205, 1211, tokens(121, 2)))])
    assert tower.facts()["stamp_error_p99_s"] == 0
    tower.take([told((1220, 1215, 1221, tokens(123, 2)))])
    assert tower.facts()["stamp_error_p99_s"] == pytest.approx(0.005, rel=1 / 32)


def test_a_client_process_used_of_a_core_what_it_used_since_it_was_first_heard_and_the_busiest_counts():
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 4), 0, lambda record: None, shards=2)
    assert tower.facts()["client_cpu_share"] == 0
    for now_ns, cpu_ns in ((1_000, 200), (1_500, 500), (2_000, 800)):
        tower.take([(client.TICK, now_ns, now_ns, 0, cpu_ns, 71), (client.TICK, now_ns, now_ns, 0, 300, 72)])
    assert tower.facts()["client_cpu_share"] == pytest.approx(0.6)


def test_a_token_without_a_stamp_is_misdated_by_no_more_than_since_the_last_look():
    times, facts = heard((10, 5, 11, HEAD + tokens(1, 1)), (None, 25, 31, tokens(2, 1)))
    assert times == [10, 31] and facts["stamp_error_p99_s"] == pytest.approx(0.006, rel=1 / 32)
    assert facts["kernel_stamped_share"] == 0.5


def test_the_wall_clock_that_is_set_moves_no_token_before_another_nor_beyond_its_read():
    """The kernel's stamps are on the wall clock, whose distance from ours is measured once per look: set by a second
    (or slewed by a microsecond) between a stamp and the look, it would date a token so much wrong."""
    reads = [(10, 5, 11, HEAD + tokens(1, 1)), (1030, 25, 31, tokens(2, 1)), (40, 35, 41, tokens(3, 1))]
    assert heard(*reads)[0] == [10, 31, 40]  # set back: the second token would be a second in the future
    assert heard(*reads[:2])[0] == [10, 31]  # though none follows
    reads[1] = (-970, 25, 31, tokens(2, 1))
    assert heard(*reads)[0] == [10, 10, 40]  # set forward
    times, facts = heard((-970, 5, 11, HEAD + tokens(1, 1)), (40, 35, 41, tokens(2, 1)))
    assert times == [0, 40] and facts["client_ttft_mean_s"] == 0  # no answer before the question
    assert facts["read_lag_p99_s"] == pytest.approx(0.011, rel=1 / 32)


def test_the_order_holds_from_one_batch_of_reads_to_the_next():
    records = []
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 100), 0, records.append)
    tower.take([(client.SENT, 0, 0, 0), told((10, 5, 11, HEAD + tokens(1, 1))), told((9, 8, 12, tokens(2, 1)))])
    tower.take([(client.ENDED, 0, 10**9, "stopped", False)])
    assert list(records[0].token_ns) == [10**7, 10**7]


def test_reads_of_one_response_are_told_together_and_keep_their_own_times():
    first = [(20 * k, 20 * k - 3, 20 * k + 2, tokens(k, 1)) for k in range(2, 40)]
    times, facts = heard((20, 15, 21, HEAD + tokens(1, 1)), *first)
    assert times == [20 * k for k in range(1, 40)]
    assert facts["read_lag_p99_s"] == pytest.approx(0.002, rel=1 / 32) and facts["stamp_error_p99_s"] == 0


def test_what_the_servers_counters_are_compared_with_counts_from_the_send_and_leaves_out_refusals():
    records = []
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 100), 0, records.append)
    for first in (HEAD + tokens(1, 1), b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno"):
        read = told((10, 9, 11, first), (30, 21, 31, tokens(2, 2)))
        tower.take([(client.SENT, 0, 0, 4 * 10**6), read, (client.ENDED, 0, 10**9, "stopped", False)])
    facts = tower.facts()
    assert facts["client_ttft_mean_s"] == pytest.approx(0.006) and facts["cut_off_requests"] == 1
    assert records[0].read_lag_ns == 10 * 10**6  # of the earlier of two tokens, since the last look


@pytest.mark.parametrize(
    ("error", "kept"), [("timeout", True), ("stopped", True), ("cancelled", True), ("reset", False)]
)
def test_what_the_client_did_to_a_request_is_not_hidden_by_an_error_that_the_server_had_told(error, kept):
    records = []
    tower = Tower(0, "usage", np.full(1, 8), np.full(1, 100), 0, records.append)
    event = b'data: {"error": {"message": "engine died"}}\n\n'
    body = HEAD + tokens(1, 1) + b"%x\r\n%s\r\n" % (len(event), event)
    tower.take([(client.SENT, 0, 0, 0), told((10, 9, 11, body)), (client.ENDED, 0, 10**9, error, False)])
    assert (records[0].error == error) == kept and (kept or "engine died" in records[0].error)


def test_the_timeout_counts_from_when_a_request_was_to_be_sent():
    """A client whose requests leave late does not give the server's answers more time."""
    events, held_ns, timeout_ns = [], 10**9, 12 * 10**8
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun_ns = time.monotonic_ns()
        loop = client.Client(
            target(f"http://127.0.0.1:{silent.getsockname()[1]}"),
            [(int(socket.AF_INET), silent.getsockname())],
            None,
            lambda _: b"POST" if time.monotonic_ns() > begun_ns + held_ns else None,
            events.extend,
            timeout_ns,
        )
        loop.run(OpenLoop(range(1), [0], begun_ns), 1, lambda: "")
        loop.close()
    (sent_ns,) = [event[3] for event in events if event[0] == client.SENT]
    ((_, _, ended_ns, error, _),) = [event for event in events if event[0] == client.ENDED]
    assert error == "timeout" and sent_ns - begun_ns >= held_ns
    assert ended_ns - sent_ns < timeout_ns


def test_a_request_waits_until_its_first_token_and_is_owed_the_rest_of_its_answer(tmp_path, monkeypatch):
    replayed, looks = trace(np.zeros(2), input_tokens=16, output_tokens=10), []
    tower = Tower(0, "usage", replayed.input_tokens, replayed.output_tokens, 0, lambda record: None)
    watch = Watch(plan(tmp_path, replayed), np.zeros(2, dtype=np.int64), True)
    monkeypatch.setattr(watch._queue, "verdict", lambda now_s, *look: looks.append(look) or "")
    other = (client.READ, 1, *told((30, 25, 31, HEAD + tokens(1, 1)))[2:])
    for event in ((client.SENT, 0, 0, 0), told((10, 5, 11, HEAD + tokens(1, 3))), (client.SENT, 1, 0, 0), other):
        tower.take([event, (client.TICK, 2 * 10**9, 10**9, 0, 0, 71)])
        watch.verdict(tower)
    # waiting, owed, for how long the running have run on average
    assert looks == [(26, 26, 0), (0, 7, 0.99), (26, 33, 0.99), (0, 16, pytest.approx(0.98))]


@pytest.mark.parametrize(("at", "lost"), [(10, False), (30, True), (None, True)])
def test_an_answer_that_may_end_with_any_token_has_lasted_until_its_last(tmp_path, monkeypatch, at, lost):
    """And is owed no more, so that its queue is not watched."""
    monkeypatch.setattr("tuner.load.step.QueueWatch.verdict", lambda *_: "saturated")
    replayed = trace(np.zeros(1), input_tokens=16, output_tokens=10)
    tower = Tower(0, "usage", replayed.input_tokens, replayed.output_tokens, 0, lambda record: None)
    read = [told((at, at - 1, at + 1, HEAD + tokens(1, 1)))] if at else []
    tower.take([(client.SENT, 0, 0, 0), *read, (client.TICK, 2 * 10**9, 10**9, 0, 0, 71)])
    watch = Watch(plan(tmp_path, replayed, "e2e_max=20ms"), np.zeros(1, dtype=np.int64), False)
    assert bool(watch.verdict(tower)) == lost


def test_what_was_sent_after_the_time_until_which_all_is_known_is_no_backlog(tmp_path, monkeypatch):
    replayed = trace(np.zeros(2), input_tokens=16, output_tokens=10)
    tower = Tower(0, "usage", replayed.input_tokens, replayed.output_tokens, 0, lambda record: None)
    at_ns = 10**9
    tower.take([(client.SENT, i, i * at_ns, (1 + 2 * i) * at_ns) for i in range(2)])
    tower.take([(client.TICK, 4 * at_ns, 2 * at_ns, 0, 0, 71)])
    watch, told = Watch(plan(tmp_path, replayed), np.zeros(2, dtype=np.int64), True), []
    monkeypatch.setattr(watch._queue, "verdict", lambda *look: told.append(look) or "")
    assert watch.verdict(tower) == "" and told == [(2.0, 26, 26, 0)]
