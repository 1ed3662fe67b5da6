"""`tuner replay` as a user meets it: what cannot be is one line and exit code 2 before anything is sent."""

import io
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from tests.measure.made import records, request
from tuner.cli import signals
from tuner.cli.app import main
from tuner.load.probe import Found
from tuner.load.wire import Dialect


@pytest.fixture
def replay(tmp_path, monkeypatch, capsys):
    """Runs the command on a trace of two requests against a port where nobody listens; exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    row = '{{"arrival_s": {}, "input_tokens": 4, "output_tokens": 2}}\n'
    (tmp_path / "t.jsonl").write_text(row.format(0) + row.format(1))

    def run(*words):
        usual = ["tuner", "replay", "--url", "http://127.0.0.1:9", "--trace", "t.jsonl", "--model", "m"]
        monkeypatch.setattr(sys, "argv", [*usual, *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("path", [".", "t.jsonl/r.parquet", "folder", "n" * 300])
def test_records_that_cannot_be_written_are_refused_before_the_replay(replay, tmp_path, path):
    (tmp_path / "folder").mkdir()
    code, err = replay("--records", path)
    assert code == 2
    assert err.startswith(f"tuner: {path}: ") and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "t.jsonl"]


def test_records_that_can_be_written_leave_nothing_before_the_replay(replay, tmp_path):
    code, err = replay("--records", "r.parquet")
    assert code == 4 and "no server answers" in err
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_a_command_to_end_and_the_second_ends_it(number, monkeypatch):
    monkeypatch.setattr(signals, "AGAIN_S", 0.0)
    asked, usual = threading.Event(), signal.signal(number, signal.SIG_DFL)  # whatever these tests are run under
    try:
        with signals.stopping(asked):
            os.kill(os.getpid(), number)
            assert asked.wait(10)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                threading.Event().wait(10)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, usual)


# A signal that comes just before a call blocks is heard when that ends: it waits in short sleeps.
CLOSED = """\
import os, signal, sys, threading, time
from tuner.cli import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
ended = threading.Event()
if sys.argv[1] == "asked":
    with signals.stopping(ended, lambda: print("stopping", flush=True)):
        print("ready", flush=True)
        any(ended.wait(0.1) for _ in range(200))
else:
    signals.as_interrupts()
    try:
        print("ready", flush=True)
        for _ in range(200):
            time.sleep(0.1)
    except KeyboardInterrupt:
        ended.set()
print("the end", flush=True)
print("the end", file=sys.stderr, flush=True)
os._exit(7 if ended.is_set() else 1)
"""


@pytest.mark.parametrize("how", ["asked", "interrupted"])
def test_a_closed_terminal_ends_a_command_in_peace(how):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", CLOSED, how]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as command:
        os.close(theirs)
        said = b""
        while not said.endswith(b"\n"):  # a terminal closed in the middle of the line would be an error of that writing
            said += os.read(ours, 100)
        assert said == b"ready\r\n"
        os.close(ours)
        command.send_signal(signal.SIGHUP)
        assert command.wait(20) == 7


def test_a_signal_while_the_main_thread_holds_the_events_lock_is_heard():
    """As it does for a moment in each wait: an event set by the handler itself waited for its own thread for ever."""
    lock, free = threading.Lock(), []

    class Asked(threading.Event):
        def set(self):
            free.append(lock.acquire(timeout=10))
            super().set()

    asked = Asked()
    with signals.stopping(asked):
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(20) and free == [True]


def test_a_signal_in_the_middle_of_a_word_is_heard_and_said_after_it():
    asked, written = threading.Event(), []

    class Slow(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            if not asked.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                asked.wait(10)
            written.append(bytes(data))
            return len(data)

    said = io.BufferedWriter(Slow())
    with signals.stopping(asked, lambda: said.write(b"stopping")):
        said.write(b"a word, ")
        said.flush()
    said.flush()
    assert b"".join(written) == b"a word, stopping"


def test_a_replay_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping(threading.Event()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("failing", "words", "code"), [(10, (), 3), (0, (), 0), (10, ("--slo", "error_rate=60%"), 0)])
def test_a_replay_of_which_half_failed_says_how_and_exits_3(tmp_path, monkeypatch, capsys, failing, words, code):
    errors = [f"HTTP 400: at most 512 tokens, {600 + i} were asked for" for i in range(failing)][1:]
    errors += ["timeout"] * bool(failing)
    every = [*errors, *[""] * 10]
    rows = [request(i, [i + 0.1, i + 0.2] * (not error), error=error) for i, error in enumerate(every)]
    path = records(tmp_path, rows).path
    monkeypatch.setattr(sys, "argv", ["tuner", "replay", "--recompute", "--records", str(path), *words])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert (stop.value.code or 0) == code
    told = "failed: 9 x HTTP 400: at most 512 tokens, 601 were asked for\nfailed: 1 x timeout"
    assert (told in out) == bool(failing)
    assert ("SLO error_rate=1%: missed" in out) == (code == 3)


def test_what_is_within_the_slos_is_a_part_of_what_is_printed_beside_it(tmp_path, monkeypatch, capsys):
    """Responses of three quarters of the traffic: few of them arrive in the time in which they are asked for."""
    rows = [request(i, [i + 1.0 + 0.5 * k for k in range(11)]) for i in range(10)]
    path = records(tmp_path, rows).path
    words = ["--recompute", "--records", str(path), "--slo", "tpot_p99=600ms"]
    monkeypatch.setattr(sys, "argv", ["tuner", "replay", *words])
    with pytest.raises(SystemExit):
        main()
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines() if "within SLO" in line]
    pairs = [(float(line[line.index("/s") - 1]), float(line[-2])) for line in lines]
    assert len(pairs) == 3 and all(within == whole > 0 for whole, within in pairs)


@pytest.mark.parametrize(("counted", "said"), [(18, "prompts: 180% of the trace's tokens"), (10, ""), (None, "")])
def test_prompts_of_another_length_than_the_traces_are_told(tmp_path, monkeypatch, capsys, counted, said):
    rows = [request(i, [i + 0.1, i + 0.2], prompt_tokens=counted, input_tokens=10) for i in range(10)]
    path = records(tmp_path, rows).path
    monkeypatch.setattr(sys, "argv", ["tuner", "replay", "--recompute", "--records", str(path)])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert said in out and ("prompts:" in out) == bool(said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--load", "1e-300"), "the trace lasts for over 30 years"),
        (("--load", "1e-10"), "the trace lasts for over 30 years"),
        (("--timeout", "1e300"), "longer than 30 years"),
        (("--warmup", "1e300"), "longer than 30 years"),
        (("--seed", "-1", "--arrivals", "poisson:1"), "--seed"),
    ],
)
def test_numbers_that_no_replay_can_have_are_refused(replay, words, says, monkeypatch):
    monkeypatch.setattr("tuner.load.step.probe", lambda *_, **__: Found(Dialect("m"), 100, (), False))
    code, err = replay(*words)
    assert code == 2
    assert says in err


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_where_the_kernel_stamps_no_reads_that_is_said(tmp_path, capsys, monkeypatch, share):
    made = records(tmp_path, [request(k, (k + 0.1, k + 0.2)) for k in range(9)], client={"kernel_stamped_share": share})
    monkeypatch.setattr(sys, "argv", ["tuner", "replay", "--recompute", "--records", str(made.path)])
    with pytest.raises(SystemExit):
        main()
    assert ("arrival times: the kernel's for 40.0% of the reads" in capsys.readouterr().out) == (share < 1)
