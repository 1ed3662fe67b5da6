"""When requests leave."""

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.load import client
from tuner.load.connection import NO_STAMP
from tuner.load.pacer import Alarm, ClosedLoop, OpenLoop
from tuner.load.poll import Poll
from tuner.load.wire import target

offsets = st.lists(st.integers(0, 10**10), max_size=50).map(sorted)


@given(offsets, st.lists(st.integers(0, 2 * 10**10), max_size=30))
def test_every_request_is_due_once_at_its_own_time_however_late_the_loop_looks(offsets_ns, looks_ns):
    epoch = 10**15
    pacer = OpenLoop(range(len(offsets_ns)), offsets_ns, epoch)
    given_out = []
    for now in [*sorted(looks_ns), 3 * 10**10]:
        due = pacer.due(epoch + now)
        assert all(intended <= epoch + now for _, intended in due)
        given_out += due
        waiting = pacer.next_ns()
        assert waiting is None or waiting > epoch + now  # nothing due was kept back
    assert given_out == [(k, epoch + offset) for k, offset in enumerate(offsets_ns)]


def test_being_late_moves_no_later_deadline():
    pacer = OpenLoop([0, 1, 2], [0, 10, 1_000], 0)
    assert pacer.due(900) == [(0, 0), (1, 10)]
    assert pacer.next_ns() == 1_000


@given(st.integers(1, 8), st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_a_closed_loop_never_has_more_in_flight_than_asked_for(concurrency, service):
    pacer = ClosedLoop(range(len(service)), concurrency, 0)
    running, now, seen = [], 0, []
    while True:
        for number, _ in pacer.due(now):
            seen.append(number)
            running.append(now + service[number])
        assert len(running) <= concurrency
        if not running:
            break
        now = min(running)
        running.remove(now)
        pacer.finished(now)
    assert seen == list(range(len(service)))


def test_a_closed_loop_sends_the_next_request_when_one_ends():
    pacer = ClosedLoop([0, 1, 2], 1, 5)
    assert pacer.due(5) == [(0, 5)]
    assert pacer.next_ns() is None and pacer.due(1_000) == []
    pacer.finished(2_000)
    assert pacer.due(2_500) == [(1, 2_000)]


@pytest.mark.parametrize("timerfd", [True, False])
def test_waiting_ends_at_the_deadline_or_when_bytes_are_there(timerfd, monkeypatch):
    """With Linux's timerfd, and with the selector that stands in for it elsewhere."""
    if not timerfd:

        def none() -> None:
            raise OSError

        monkeypatch.setattr("tuner.load.poll.Alarm", none)
    poll = Poll()
    here, there = socket.socketpair()
    poll.add(here.fileno(), None)
    begin = time.monotonic_ns()
    assert poll.wait(begin + 20_000_000) == []
    assert time.monotonic_ns() >= begin + 20_000_000
    there.send(b"x")
    assert poll.wait(time.monotonic_ns() + 10**12) == [here.fileno()]
    poll.modify(here.fileno(), True)
    assert here.recv(1) and poll.wait(time.monotonic_ns() + 10**12) == [here.fileno()]  # it takes bytes
    poll.remove(here.fileno())
    assert poll.wait(1) == []
    poll.close()


def test_an_alarm_is_absolute_and_can_be_set_again():
    try:
        alarm = Alarm()
    except OSError:
        pytest.skip("no timerfd on this platform")
    import select

    poll = select.poll()
    poll.register(alarm.fd, select.POLLIN)
    alarm.set(time.monotonic_ns() + 10**12)
    assert not poll.poll(0)
    alarm.set(1)  # long past
    assert poll.poll(1_000)
    alarm.clear()
    assert not poll.poll(0)
    begin = time.monotonic_ns()
    alarm.set(begin + 5_000_000)
    assert poll.poll(1_000) and time.monotonic_ns() >= begin + 5_000_000
    alarm.close()


def test_sockets_are_looked_at_once_per_hold_but_no_send_or_handshake_waits_for_it(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where: list[tuple[int, tuple]] = [(socket.AF_INET, server.getsockname())]
        loop = client.Client(target("http://x"), where, None, lambda _: None, lambda _: None, 10**10, hold_ns=10**9)
        monkeypatch.setattr(loop._poll, "wait", lambda deadline_ns: [])
        monkeypatch.setattr(loop._poll, "ready", lambda: found)
        found, now = [7], time.monotonic_ns()
        loop._wait(now + 10**10, None)
        assert slept == []  # nothing was found before
        loop._wait(now + 1, None)  # nor a tick: it can wait
        loop._wait(now + 10**10, now + 5 * 10**8)
        held_s, before_a_send_s = slept
        assert 0.5 < held_s <= 1.0 and before_a_send_s < 0.5
        found = []
        loop._wait(now + 10**10, None)
        loop._wait(now + 10**10, None)  # nothing was found: the first bytes wake the loop
        assert len(slept) == 3
        found = [7]
        loop._wait(now + 10**10, None)
        loop._pool.open()
        loop._wait(now + 10**10, None)
        assert len(slept) == 3
        loop.close()


def test_a_send_does_not_wait_for_many_reads(monkeypatch):
    """A thousand sockets are ready, and each read takes a millisecond: a request that is due meanwhile leaves."""
    served: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        where: list[tuple[int, tuple]] = [(socket.AF_INET, server.getsockname())]
        events: list[tuple] = []
        loop = client.Client(target("http://x"), where, None, lambda _: b"POST", events.extend, 10**10)
        now_ns = time.monotonic_ns()
        monkeypatch.setattr(client.time, "monotonic_ns", lambda: now_ns + len(served) * 10**6)
        monkeypatch.setattr(loop._poll, "ready", lambda: [] if served else list(range(10_000, 11_000)))
        monkeypatch.setattr(loop._poll, "call", served.append)
        loop.run(OpenLoop([0], [100 * 10**6], now_ns), 1, lambda: "stopped")
        loop.close()
    [(_, _, intended_ns, sent_ns)] = [event for event in events if event[0] == client.SENT]
    assert 0 <= sent_ns - intended_ns < 20 * 10**6


@pytest.mark.parametrize(
    ("together", "end", "held_ns"), [(1, b"\n\n", 10**6), (2, b"\n\n", 500_000), (2, b"\r\n\r\n", 500_000)]
)
def test_a_server_whose_events_come_faster_than_that_is_looked_at_oftener(together, end, held_ns):
    with socket.create_server(("127.0.0.1", 0)) as server:
        where: list[tuple[int, tuple]] = [(int(socket.AF_INET), server.getsockname())]
        loop = client.Client(target("http://x"), where, None, lambda _: None, lambda _: None, 10**10, hold_ns=10**6)
        connection = loop._pool.open()
        event = b'data: {"choices":[{"text":"a data: of its own"}]}' + end
        chunk = b"%x\r\n%s\r\n" % (len(event), event)
        for number in range(100):
            connection.assign(number, b"POST")
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            for data in (
                head + chunk * 2,
                *[chunk * together] * 5,
                chunk * 3,
            ):  # the first and last read may bring more
                loop._received(connection, data, NO_STAMP, [0, 0, 0])
            loop._gather(connection, True)
        loop._hold.review()
        assert loop._hold.ns == held_ns
        loop._hold.review()  # nothing has come since
        assert loop._hold.ns == held_ns
        loop.close()


def test_requests_whose_bytes_are_late_do_not_slow_the_loop_down():
    """Looking at each of them at every turn would make a client that is behind fall behind for good."""
    asked, events, turns = 0, [], 0

    def take(number: int) -> bytes | None:
        nonlocal asked
        asked += 1
        return b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n" if turns >= 10 else None

    def turn() -> str:
        nonlocal turns
        turns += 1
        return ""

    loop = client.Client(
        target("http://127.0.0.1:9"), [(int(socket.AF_INET), ("127.0.0.1", 9))], None, take, events.extend, 10**10
    )
    loop.run(OpenLoop(range(1_000), [0] * 1_000, time.monotonic_ns()), 1_000, turn)
    loop.close()
    assert asked < 1_100  # not 1,000 at each of 10 turns
    ended = [event[1] for event in events if event[0] == client.ENDED]
    assert sorted(ended) == list(range(1_000))
