"""A server's process tree: started apart, ended whole, reaped by proof when nobody else can."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tuner.server.leases import Lease
from tuner.server.process import Process, Program, StartFailed
from tuner.server.runtime import Ownership, reap, runtime_root
from tuner.server.tree import MARKER, Pid, members

FAKE = str(Path(__file__).parent / "fakeserver.py")
ROOT = str(Path(__file__).parents[2])


def fake(*words: str) -> list[str]:
    return [sys.executable, "-I", "-S", FAKE, *words]


def start(folder: Path, *words: str, launch_id: str = "") -> Process:
    program = Program(fake(*words), {"PATH": os.environ["PATH"]}, folder, folder / "server.log")
    return Process(program, launch_id)


def eventually(condition, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def test_a_server_runs_in_a_session_of_its_own_and_writes_to_its_log(tmp_path):
    process = start(tmp_path, "--say", "hello", "--hang")
    try:
        assert eventually(lambda: "hello" in (tmp_path / "server.log").read_text())
        assert os.getsid(process.server.pid) == process.server.pid != os.getsid(0)
    finally:
        process.stop(60)


def test_more_output_than_a_pipe_holds_does_not_stall_a_server(tmp_path):
    process = start(tmp_path, "--chatter", str(2**20), "--exit", "3")
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == 3
    assert process.stop(1).left == ()
    assert (tmp_path / "server.log").stat().st_size > 2**20


def test_a_program_that_does_not_exist_is_refused_with_the_systems_words(tmp_path):
    with pytest.raises(StartFailed, match="No such file or directory: /does/not/exist"):
        Process(Program(["/does/not/exist"], {}, tmp_path, tmp_path / "server.log"))


def test_the_signal_that_ended_a_server_is_known(tmp_path):
    process = start(tmp_path, "--die-of", str(int(signal.SIGSEGV)))
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == -signal.SIGSEGV
    process.stop(1)


def test_a_well_behaved_server_is_not_killed(tmp_path):
    process = start(tmp_path, "--hang")
    ended = process.stop(60)
    assert (ended.killed, ended.left) == (False, ())
    assert process.stop(60) is ended  # asking twice is asking once


def test_a_server_that_ignores_sigterm_is_killed_after_the_stated_wait(tmp_path):
    process = start(tmp_path, "--deaf", "--say", "ready", "--hang")
    assert eventually(lambda: "ready" in (tmp_path / "server.log").read_text())
    ended = process.stop(0.5)
    assert ended.killed and ended.left == () and ended.seconds >= 0.5
    assert not process.server.alive


@pytest.mark.parametrize("stray", ["session", "orphan", "anonymous"])
def test_children_that_left_the_session_their_parent_or_their_environment_go_with_the_server(tmp_path, stray):
    process = start(tmp_path, "--stray", stray, "--hang")
    assert eventually(lambda: any(_is_child(p) for p in process.members()))
    children = [p for p in process.members() if _is_child(p)]
    assert os.getsid(children[0].pid) != process.server.pid
    ended = process.stop(0.5)
    assert ended.killed and ended.left == ()
    assert not any(child.alive for child in children)


def test_children_of_a_server_that_crashed_are_found_too(tmp_path):
    process = start(tmp_path, "--stray", "orphan", "--delay", "0.5", "--exit", "1")
    assert eventually(lambda: process.poll() is not None)
    assert eventually(lambda: any(_is_child(p) for p in process.members()))
    assert process.stop(0.2).left == ()
    assert process.members() == set()


TUNER = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from tuner.server.process import Process, Program
from tuner.server.runtime import Ownership
folder = Path({folder!r})
owned = Ownership(folder, "{launch_id}")
process = Process(Program({words!r}, {{"PATH": os.environ["PATH"]}}, folder, folder / "server.log"), "{launch_id}")
owned.started(process.guard, process.server)
while not any(b"--child" in Path(f"/proc/{{p.pid}}/cmdline").read_bytes().split(b"\\0") for p in process.members()):
    time.sleep(0.05)
if {child} and os.fork() == 0:
    while not (folder / "over").exists():
        time.sleep(0.05)
    os._exit(0)
print(json.dumps([process.guard.pid, process.server.pid, *[p.pid for p in process.members()]]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def run_tuner(tmp_path):
    """Starts a tuner with one server in a process of its own: (it, [guard, server, strays])."""
    tuners: list[subprocess.Popen] = []

    def run(launch_id: str, *words: str, child: bool = False) -> tuple[subprocess.Popen, list[Pid]]:
        text = TUNER.format(root=ROOT, folder=str(tmp_path), launch_id=launch_id, words=fake(*words), child=child)
        tuner = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
        tuners.append(tuner)
        assert tuner.stdout is not None
        pids = [Pid.of(number) for number in json.loads(tuner.stdout.readline())]
        return tuner, [pid for pid in pids if pid]

    yield run
    for tuner in tuners:
        tuner.kill()
        tuner.wait()
    reap(tmp_path)


def test_a_tuner_killed_with_9_takes_its_servers_and_their_strays_with_it(tmp_path, run_tuner):
    tuner, pids = run_tuner("a1" * 8, "--stray", "session", "--hang")
    tuner.kill()
    tuner.wait()
    assert eventually(lambda: not any(pid.alive for pid in pids))
    cleaned = reap(tmp_path)  # only files were left
    assert any("a1" * 8 in line for line in cleaned)
    assert list((tmp_path / "launches").iterdir()) == [] and not list(tmp_path.glob("t-*"))


def test_a_tuner_killed_with_9_takes_its_server_with_it_though_a_child_holds_its_pipes(tmp_path, run_tuner):
    tuner, pids = run_tuner("a2" * 8, "--stray", "session", "--hang", child=True)
    tuner.kill()
    tuner.wait()
    try:
        assert eventually(lambda: not any(pid.alive for pid in pids), 30.0)
    finally:
        (tmp_path / "over").touch()


def test_what_a_tuner_and_its_guard_leave_when_both_are_killed_is_reaped_by_its_marker(tmp_path, run_tuner):
    tuner, pids = run_tuner("b2" * 8, "--deaf", "--stray", "session", "--hang")
    os.kill(pids[0].pid, signal.SIGKILL)
    tuner.kill()
    tuner.wait()
    assert eventually(lambda: not pids[0].alive and not pids[1].alive)  # the server died with the guard (PDEATHSIG)
    assert any(pid.alive for pid in pids)  # its stray did not
    cleaned = reap(tmp_path)
    assert not any(pid.alive for pid in pids)
    assert any("--child" in line for line in cleaned)


def test_reaping_touches_nobody_else(tmp_path, run_tuner):
    bystander = subprocess.Popen(fake("--child"), env={"PATH": os.environ["PATH"], MARKER: "somebody-else"})
    try:
        tuner, pids = run_tuner("c3" * 8, "--stray", "session", "--hang")
        assert reap(tmp_path) == []  # that tuner lives, so nothing of it is ours to end
        assert all(pid.alive for pid in pids)
        tuner.kill()
        tuner.wait()
        reap(tmp_path)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_an_ownership_file_of_a_recycled_process_number_is_abandoned(tmp_path):
    owned = Ownership(tmp_path, "d4" * 8)
    data = json.loads(owned.path.read_text())
    data["tuner"][1] += 1  # this number, but another start time
    owned.path.write_text(json.dumps(data))
    assert reap(tmp_path) and not owned.path.exists() and not owned.temporary.exists()


def test_a_broken_ownership_file_is_left_alone(tmp_path):
    (tmp_path / "launches").mkdir()
    broken = tmp_path / "launches" / "x.json"
    broken.write_text('{"id": ')
    assert reap(tmp_path) == [] and broken.exists()


def test_half_an_ownership_file_goes_with_the_process_that_wrote_it(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "launches").mkdir()
    halves = [tmp_path / "launches" / f"{'f6' * 8}.{pid}.tmp" for pid in (gone.pid, os.getpid())]
    for half in halves:
        half.write_text('{"id": ')
    reap(tmp_path)
    assert [half.exists() for half in halves] == [False, True]


def test_members_knows_a_process_by_its_marker_alone(tmp_path):
    child = subprocess.Popen(
        fake("--child"), env={"PATH": os.environ["PATH"], MARKER: "e5" * 8}, start_new_session=True
    )
    try:
        assert eventually(lambda: {p.pid for p in members("e5" * 8)} == {child.pid})
        assert members("e5" * 7) == set()
    finally:
        child.kill()
        child.wait()


def test_a_recycled_process_number_makes_nobody_a_member(tmp_path):
    child = subprocess.Popen(fake("--child"), env={"PATH": os.environ["PATH"]}, start_new_session=True)
    try:
        own, me = Pid.of(child.pid), Pid.of(os.getpid())
        assert own and me and own in members("e7" * 8, leader=own) and own in members("e7" * 8, root=me)
        assert members("e7" * 8, leader=Pid(own.pid, own.start - 1), root=Pid(me.pid, me.start - 1)) == set()
    finally:
        child.kill()
        child.wait()


def test_shared_memory_goes_with_the_server_that_was_killed_in_it(tmp_path):
    path = Path("/dev/shm") / f"tuner-test-{os.getpid()}-{time.monotonic_ns()}"
    code = f"file = open({str(path)!r}, 'w'); import time; time.sleep(600)"
    program = Program([sys.executable, "-c", code], {"PATH": os.environ["PATH"]}, tmp_path, tmp_path / "server.log")
    process = Process(program)
    assert eventually(path.exists)
    os.kill(process.server.pid, signal.SIGSTOP)
    process.stop(0.2)
    assert not path.exists()


def test_a_lock_is_held_by_the_guard_and_not_by_the_server(tmp_path):
    with Lease(tmp_path / "gpu-0", os.open(tmp_path / "gpu-0", os.O_RDWR | os.O_CREAT)) as lease:
        program = Program(fake("--hang"), {"PATH": os.environ["PATH"]}, tmp_path, tmp_path / "server.log", [lease.fd])
        process = Process(program)
        try:
            assert process.guard is not None
            until_s = time.monotonic() + 20
            held: list[bool] = []
            while held != [True, False] and time.monotonic() < until_s:  # a server that is being started has it still
                held = [_has_open(p, lease.path) for p in (process.guard, process.server)]
        finally:
            process.stop(60)
    assert held == [True, False]


def _has_open(process: Pid, path: Path) -> bool:
    for file in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(file) == str(path):
                return True
    return False


def _is_child(process: Pid) -> bool:
    try:
        # as a word of its own: an orphan's parent, about to end, has it in the program that it was given
        return b"--child" in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def test_a_server_is_heard_where_this_process_has_a_thousand_files_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this machine allows no more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    taken = []
    try:
        while not taken or taken[-1] < 1100:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        process = start(tmp_path, "--hang")
        assert process.poll() is None
        assert process.stop(60).left == ()
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_runtime_folder_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runtime_root({"TUNER_RUNTIME_DIR": "run"}) == tmp_path.resolve() / "run"


def test_every_session_of_a_user_has_the_same_runtime_folder(tmp_path, monkeypatch):
    """A login has XDG_RUNTIME_DIR, cron and sudo have not; a batch job has a TMPDIR of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert runtime_root({"XDG_RUNTIME_DIR": str(tmp_path)}) == runtime_root({}) == Path(f"/tmp/tuner-{os.getuid()}")
