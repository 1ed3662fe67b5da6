"""Ports and GPUs have one owner at a time, and a dead owner is none."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tuner.errors import EnvironmentFault
from tuner.server.leases import Lease, Leases, sweep

ROOT = str(Path(__file__).parents[2])
HOLDER = """
import sys, time
sys.path[:0] = [{root!r}]
from pathlib import Path
from tuner.server.leases import Leases
leases = Leases(Path({folder!r}))
held = leases.gpus((0, 1), "study of somebody")
print("held", flush=True)
time.sleep(600)
"""


def hold_gpus_elsewhere(folder: Path) -> subprocess.Popen:
    text = HOLDER.format(root=ROOT, folder=str(folder))
    other = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_a_gpu_leased_by_another_process_is_refused_and_its_owner_is_named(tmp_path):
    other = hold_gpus_elsewhere(tmp_path)
    try:
        with pytest.raises(EnvironmentFault, match=rf"GPU 1 is leased by pid {other.pid} \(study of somebody\)"):
            Leases(tmp_path).gpus((1, 2))
        with Leases(tmp_path).gpus((2, 3)) as mine:
            assert mine.indices == (2, 3)
    finally:
        other.kill()
        other.wait()


def test_a_file_system_without_locks_is_named_and_not_waited_for(tmp_path, monkeypatch):
    def none(_fd, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=r"No locks available: .*/leases/host"):
        Leases(tmp_path).host(wait_s=60.0)


def test_all_gpus_or_none(tmp_path):
    leases = Leases(tmp_path)
    with leases.gpus((1,)):
        with pytest.raises(EnvironmentFault):
            leases.gpus((0, 1))
        leases.gpus((0,)).release()  # the half that was taken was given back


def test_the_lease_of_a_killed_owner_is_free_at_once(tmp_path):
    other = hold_gpus_elsewhere(tmp_path)
    other.kill()
    other.wait()
    assert (tmp_path / "leases" / "gpu-0").exists()  # a stale file, and no obstacle
    with Leases(tmp_path).gpus((0, 1)) as mine:
        assert mine.indices == (0, 1)


def test_the_files_of_killed_owners_are_swept_away_and_those_of_the_living_stay(tmp_path):
    other = hold_gpus_elsewhere(tmp_path)
    mine = Leases(tmp_path).gpus((3,))

    def files() -> set[str]:
        sweep(tmp_path)
        return {path.name for path in (tmp_path / "leases").iterdir()}

    assert files() == {"gpu-0", "gpu-1", "gpu-3"}
    (half := tmp_path / "leases" / ".wait-1 0").touch()  # it is being made, and is nobody's yet
    assert half.name in files()
    half.unlink()
    other.kill()
    other.wait()
    assert files() == {"gpu-3"}
    mine.release()
    assert files() == set()


def test_a_lease_can_be_waited_for(tmp_path):
    leases = Leases(tmp_path)
    first = leases.gpus((0,))
    timer = threading.Timer(0.2, first.release)
    timer.start()
    with leases.gpus((0,), wait_s=30) as second:
        assert second.indices == (0,)


def test_who_waits_has_it_before_who_comes_later_or_again(tmp_path):
    leases = Leases(tmp_path)
    first, got = leases.gpus((0,), "first"), []
    waiting = threading.Thread(target=lambda: got.append(leases.gpus((0, 1), "second", wait_s=60)))
    waiting.start()
    while not list((tmp_path / "leases").glob("wait-*")):
        assert waiting.is_alive()
    leases.gpus((2,)).release()  # nobody waits for that one
    first.release()
    for index in (0, 1):
        with pytest.raises(EnvironmentFault, match=r"\(second\)"):  # it has waited longer, or has it already
            leases.gpus((index,), "first once more")
    waiting.join()
    assert [lease.indices for lease in got] == [(0, 1)]
    got[0].release()
    with leases.gpus((0, 1)):
        assert {path.name for path in (tmp_path / "leases").iterdir()} == {"gpu-0", "gpu-1"}, "the queue is empty"


def test_nobody_sees_a_place_in_the_queue_before_it_is_locked_and_named(tmp_path, monkeypatch):
    leases, early, waited = Leases(tmp_path), [], []

    def places() -> list[Path]:
        return list(leases.folder.glob("wait-*"))

    def looked(do):
        return lambda *given: (early.extend(() if waited else places()), do(*given))[1]

    class Asked(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.extend(places())
            return True

    with leases.gpus((0,)), pytest.raises(EnvironmentFault):
        monkeypatch.setattr(fcntl, "flock", looked(fcntl.flock))
        monkeypatch.setattr(os, "pwrite", looked(os.pwrite))
        leases.gpus((0,), wait_s=60, cancel=Asked())
    assert (len(waited), early) == (1, [])


def test_who_came_later_is_not_waited_for(tmp_path):
    leases = Leases(tmp_path)
    later = Lease.take(leases.folder / f"wait-{time.time_ns() + 10**15:020} 0")
    assert later is not None
    leases.gpus((0,), wait_s=5.0).release()
    later.release()


QUEUER = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from tuner.server.leases import Leases
Leases(Path({folder!r})).gpus((0,), "who waits", wait_s=600)
"""


def test_a_killed_tuner_does_not_stand_in_the_queue(tmp_path):
    first = Leases(tmp_path).gpus((0,))
    text = QUEUER.format(root=ROOT, folder=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", text])
    while not list((tmp_path / "leases").glob("wait-*")):
        assert other.poll() is None
    other.kill()
    other.wait()
    first.release()
    Leases(tmp_path).gpus((0,)).release()
    assert list((tmp_path / "leases").iterdir()) == []


def test_the_machine_of_a_cpu_server_is_one_lease(tmp_path):
    leases = Leases(tmp_path)
    first = leases.host()
    assert first is not None and leases.host() is None
    threading.Timer(0.2, first.release).start()
    second = leases.host(wait_s=30)
    assert second is not None
    second.release()


def test_waiting_ends_when_it_is_cancelled(tmp_path):
    leases = Leases(tmp_path)
    cancel = threading.Event()
    with leases.gpus((0,)):
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(EnvironmentFault):
            leases.gpus((0,), wait_s=600, cancel=cancel)


def test_a_lease_outlives_its_owner_as_long_as_a_guard_holds_it_too(tmp_path):
    lease = Lease.take(tmp_path / "gpu-0")
    assert lease is not None
    guard = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lease.fd])
    os.close(lease.fd)  # as if the owner had died
    assert Lease.take(tmp_path / "gpu-0") is None
    guard.communicate(b"\n")
    again = Lease.take(tmp_path / "gpu-0")
    assert again is not None
    again.release()


def test_a_lease_that_is_given_back_leaves_no_file_and_is_free_wherever_else_it_is_held(tmp_path):
    lease = Lease.take(tmp_path / "gpu-0")
    assert lease is not None
    guard = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lease.fd])
    lease.release()
    lease.release()
    assert not (tmp_path / "gpu-0").exists()
    again = Lease.take(tmp_path / "gpu-0")
    assert again is not None
    again.release()
    guard.communicate(b"\n")


def test_two_owners_never_get_the_same_port(tmp_path):
    ports = [Leases(tmp_path, seed=7).port() for _ in range(5)]  # the same seed: the same wishes
    assert len({port.number for port in ports}) == 5
    for port in ports:
        port.release()


def test_a_port_that_is_listened_on_is_passed_over(tmp_path):
    wish = Leases(tmp_path, seed=1).port()
    wish.release()
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the one option that would let us in beside it
        stranger.bind(("127.0.0.1", wish.number))
        stranger.listen()
        other = Leases(tmp_path, seed=1).port()
        assert other.number != wish.number
        other.release()
        with pytest.raises(EnvironmentFault, match=f"port {wish.number} is in use"):
            Leases(tmp_path).port(number=wish.number)


def test_a_held_port_admits_a_server_and_no_plain_bind(tmp_path):
    port = Leases(tmp_path).port()
    with socket.socket() as stranger:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port.number))
    with socket.create_server(("127.0.0.1", port.number)):  # SO_REUSEADDR, as uvicorn sets it
        socket.create_connection(("127.0.0.1", port.number)).close()
        port.hand_over()
        assert not port.free
    assert port.free
    port.release()


def test_ports_lie_outside_the_range_from_which_outgoing_connections_take_theirs(tmp_path):
    words = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    low, high = int(words[0]), int(words[1])
    if low <= 21000 and high >= 65000:
        pytest.skip("this machine's ephemeral range is everything")
    port = Leases(tmp_path).port()
    assert not low <= port.number <= high
    port.release()
