"""Servers forked from a standby start without importing again, and are contained like any other."""

import os
import re
import signal
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.test_process import eventually
from tests.server.test_start import Stage
from tuner.server.faststart import FastStart
from tuner.server.start import Recipe, start
from tuner.server.tree import MARKER, PROC, Pid, members

HERE = Path(__file__).parent


class Fast(Stage):
    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(folder)
        self.root = root  # short, so that a standby's folder lies below it and its command line names it
        self.fast = FastStart(sys.executable, "fakeengine", ["fakeheavy", "not_there"], self.root)
        self.env = {"PYTHONPATH": str(HERE)}

    def fast_recipe(self, *words: str, **env: str) -> Recipe:
        recipe = self.recipe(*words)

        def argv(binding):
            return [sys.executable, "-m", "fakeengine", *list(recipe.argv(binding))[4:]]

        own = recipe.env
        return replace(recipe, argv=argv, env=lambda b: {**own(b), **self.env, **env}, fast=self.fast)

    def log(self) -> str:
        return (self.site.folder / "server.log").read_text()


@pytest.fixture
def stage(tmp_path):
    with tempfile.TemporaryDirectory(prefix="t") as root:
        stage = Fast(tmp_path, Path(root))
        yield stage
        stage.fast.close()
        assert stage.clean()
        assert members_of_any_standby(stage) == []


def members_of_any_standby(stage: Fast) -> list[str]:
    needle = str(stage.root).encode()
    return [path.parent.name for path in PROC.glob("[0-9]*/cmdline") if needle in _bytes(path)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_second_server_does_not_import_again(stage):
    start(stage.fast_recipe(), stage.site, stage.root).stop()
    assert "imported" not in stage.log()  # the standby's log has it
    first = re.findall(r"serving from (\d+)", stage.log())
    (standby,) = stage.fast._standbys.values()
    running = start(stage.fast_recipe(), stage.site, stage.root)
    assert running.process is not None
    assert "imported" not in stage.log() and f"serving from {running.process.server.pid}" in stage.log()
    assert first != [str(running.process.server.pid)]
    assert list(stage.fast._standbys.values()) == [standby] and standby.process.poll() is None
    assert running.stop().left_over == ()
    assert not [event for event in stage.events if event[0] == "note"]


def test_its_environment_is_that_of_its_launch(stage):
    start(stage.fast_recipe(HEAVY="h1"), stage.site, stage.root).stop()
    assert "with h1" in stage.log()
    (before,) = stage.fast._standbys.values()
    running = start(stage.fast_recipe(HEAVY="h2"), stage.site, stage.root)  # read at import: another standby
    assert "with h2" in stage.log()
    assert before not in stage.fast._standbys.values() and before.process.poll() is not None
    running.stop()


def test_its_signals_are_those_of_a_started_program(stage):
    """Python ignores SIGPIPE when it starts: a forked server that does not dies of a client that hangs up."""
    found = []
    for recipe in (stage.fast_recipe(), replace(stage.fast_recipe(), fast=None)):
        running = start(recipe, stage.site, stage.root)
        assert running.process is not None
        status = (PROC / str(running.process.server.pid) / "status").read_text()
        found.append(re.findall(r"Sig(?:Ign|Cgt|Blk):\s*(\w+)", status))
        running.stop()
        assert "serving from" in stage.log()
    assert found[0] == found[1]
    assert int(found[0][1], 16) >> (signal.SIGPIPE - 1) & 1


def test_its_marker_stands_where_everybody_can_read_it(stage):
    running = start(stage.fast_recipe("--stray", "orphan"), stage.site, stage.root)
    process = running.process
    assert process is not None
    environ = (PROC / str(process.server.pid) / "environ").read_bytes()
    assert f"{MARKER}={process.id}".encode() in environ.split(b"\0")
    assert eventually(lambda: len(members(process.id)) == 2)  # the server and its stray, by marker alone
    assert running.stop().left_over == ()
    assert members(process.id) == set()


def test_a_standby_stays_as_long_as_a_server_that_it_forked_even_if_nobody_else_wants_it(stage):
    import gc

    running = start(stage.fast_recipe(), stage.site, stage.root)
    (standby,) = stage.fast._standbys.values()
    stage.fast = FastStart(sys.executable, "fakeengine", (), stage.root)  # the engine that started it is forgotten
    gc.collect()
    assert running.exit_code() is None and standby.process.poll() is None
    assert running.stop().left_over == ()
    del running
    gc.collect()
    assert standby.process.poll() is not None


def test_it_dies_with_its_guard(stage):
    running = start(stage.fast_recipe(), stage.site, stage.root)
    process = running.process
    assert process is not None and process.guard is not None
    os.kill(process.guard.pid, signal.SIGKILL)
    assert eventually(lambda: not process.server.alive)
    assert running.stop().left_over == ()


def test_a_runtime_folder_too_deep_for_unix_sockets_still_has_fast_starts(stage):
    stage.root = stage.root / "a-path-as-long-as-those-of-clusters-and-build-machines" / ("x" * 60)
    stage.root.mkdir(parents=True)
    stage.fast = FastStart(sys.executable, "fakeengine", ["fakeheavy"], stage.root)
    running = start(stage.fast_recipe(), stage.site, stage.root)
    assert stage.binding is not None and len(str(stage.binding.temporary / "uuid-of-a-zmq-socket")) < 107
    assert "serving from" in stage.log() and "imported" not in stage.log()
    assert running.stop().left_over == ()


def test_a_traceback_and_an_exit_message_reach_the_log(stage):
    outcome = failure_of(stage, stage.fast_recipe("--fail"))
    assert outcome.cause == "invalid-combination" and "too small" in outcome.evidence
    assert failure_of(stage, stage.fast_recipe("--leave")).cause == "unknown-flag"


def failure_of(stage: Fast, recipe: Recipe):
    from tuner.engines.protocol import LaunchFailed

    with pytest.raises(LaunchFailed) as failed:
        start(recipe, stage.site, stage.root)
    return failed.value.outcome


def test_a_standby_that_was_killed_is_replaced(stage):
    start(stage.fast_recipe(), stage.site, stage.root).stop()
    standby = next(iter(stage.fast._standbys.values()))
    os.kill(standby.process.server.pid, signal.SIGKILL)
    assert eventually(lambda: standby.process.poll() is not None)
    running = start(stage.fast_recipe(), stage.site, stage.root)
    assert "serving from" in stage.log()
    running.stop()


def test_a_standby_that_does_not_answer_costs_nothing_but_the_haste(stage):
    start(stage.fast_recipe(), stage.site, stage.root).stop()
    next(iter(stage.fast._standbys.values())).socket.unlink()
    running = start(stage.fast_recipe(), stage.site, stage.root)
    assert "imported" in stage.log()  # started as usual
    assert any("does not answer" in str(data) for name, data in stage.events if name == "note")
    running.stop()


def test_a_standby_that_cannot_be_had_is_said_once_and_servers_start_as_usual(stage):
    broken = FastStart(str(HERE / "no-such-python"), "fakeengine", (), stage.root)
    for _ in range(2):
        start(replace(stage.fast_recipe(), fast=broken), stage.site, stage.root).stop()
        assert "imported" in stage.log()
    notes = [data["why"] for name, data in stage.events if name == "note"]
    assert len(notes) == 1 and "no-such-python" in notes[0]


def test_a_module_that_starts_threads_is_not_forked(stage, tmp_path):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[9]).start()"
    )
    stage.env["PYTHONPATH"] = f"{HERE}:{tmp_path}"
    threaded = FastStart(sys.executable, "fakeengine", ["threaded"], stage.root)
    start(replace(stage.fast_recipe(), fast=threaded), stage.site, stage.root).stop()
    assert "imported" in stage.log()
    assert any("threads" in str(data) for name, data in stage.events if name == "note")


def test_cancelling_while_the_standby_imports_leaves_nothing(stage):
    from tuner.engines.protocol import Cancelled

    threading.Timer(0.2, stage.site.cancel.set).start()
    with pytest.raises(Cancelled):
        start(stage.fast_recipe(), stage.site, stage.root)
    stage.site.cancel.clear()


def test_a_standby_goes_with_its_tuner(stage):
    guards = stage.fast.guards({"PYTHONPATH": str(HERE), "PATH": os.environ["PATH"]}, threading.Event(), print)
    assert guards is not None
    standby = next(iter(stage.fast._standbys.values())).process
    server = Pid.of(standby.server.pid)
    assert server is not None
    standby._guard._shut("stdin")  # what the system does to the pipes of a killed tuner
    assert eventually(lambda: not server.alive)
