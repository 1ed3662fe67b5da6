"""What comes home from the nodes of a cluster, without one: answers, files, and what a seat that died leaves behind."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.engines.protocol import Cancelled, LaunchFailed, Teardown
from tuner.executor import line, parcel, seat
from tuner.executor.desk import _short
from tuner.executor.protocol import NodeLost
from tuner.executor.remote import told
from tuner.executor.seat import Report
from tuner.server.tree import Pid
from tuner.study.outcome import Boot, Infeasible


def test_a_seat_whose_node_is_at_fault_is_lost_and_one_that_was_interrupted_measured_nothing():
    with pytest.raises(NodeLost, match="Xid 79"):
        told(Infeasible("gpu-broken", "Xid 79: the GPU fell off the bus"))
    with pytest.raises(LaunchFailed, match="no room"):
        told(Infeasible("oom-kv", "no room"))
    with pytest.raises(Cancelled):
        told(None)
    assert told(Boot(1.0)) == Boot(1.0)


def test_a_trial_brings_its_events_to_the_studys_and_the_defaults_answers_once(tmp_path: Path):
    folder = tmp_path / "trials" / "0003"
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "before"}\n')
    for answers in (b"first", b"second"):
        beside = {"quality.json": answers, "events.jsonl": b'{"event": "quality"}\n'}
        Report(None, Teardown(), parcel.Parcel({"server.log": b"ready\n"}), beside).bring_home(folder)
    assert (folder / "server.log").read_bytes() == b"ready\n"
    assert (tmp_path / "quality.json").read_bytes() == b"first"
    assert (tmp_path / "events.jsonl").read_bytes() == b'{"event": "before"}\n' + 2 * b'{"event": "quality"}\n'


def test_what_nodes_say_is_taken_in_order_and_their_questions_are_answered_or_given_up(monkeypatch):
    async def talk() -> None:
        home = line.Line()
        await home.tell(1, "step", {"load": 1})
        asked = asyncio.ensure_future(home.ask(1, "beaten", []))
        await asyncio.sleep(0)
        assert await home.take() == [(1, "step", {"load": 1}, 0), (1, "beaten", [], 1)]
        await home.answer(1, "it cannot win")
        assert await asked == "it cannot win"
        await home.answer(1, "said twice")
        monkeypatch.setattr(line, "ANSWER_S", 0.0)
        assert await home.ask(2, "beaten", []) is None
        assert await home.take() == [(2, "beaten", [], 2)]
        await home.nudge()
        assert await home.take() == []

    asyncio.run(talk())


def test_of_rays_long_messages_the_line_that_says_why_is_told():
    said = "The actor died unexpectedly.\n  class_name: Seat\n\n  The actor is dead because its node has died.\n"
    assert _short(RuntimeError(said)) == "The actor is dead because its node has died."
    assert _short(RuntimeError("  gone \n x")) == "gone" and _short(RuntimeError("")) == "RuntimeError"


def test_a_seat_removes_what_seats_that_died_left_and_nothing_else(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(seat.tempfile, "gettempdir", lambda: str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        other = Pid.of(process.pid)
    assert other is not None
    dead = tmp_path / f"tuner-seat-{process.pid}-{other.start}-x"
    others = (f"{seat._prefix()}x", "tuner-seat-5", "tuner-seat-a-b-c", "tuner-other-1-1-x")
    kept = [tmp_path / name for name in others]
    for folder in (dead, *kept):
        (folder / "study").mkdir(parents=True)
    seat.sweep()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
