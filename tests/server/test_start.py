"""Starting a server: ready only when it proves who it is, and nothing left behind when it does not."""

import json
import os
import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.test_process import eventually, fake
from tuner.engines.protocol import Cancelled, LaunchFailed, Site
from tuner.errors import EnvironmentFault
from tuner.server import probe
from tuner.server.bootlog import BootLog, Dialect, Fact
from tuner.server.gpu import Gpus
from tuner.server.leases import Leases
from tuner.server.limits import History, Limits
from tuner.server.start import Binding, Recipe, _late, start
from tuner.server.tree import PROC, Pid

DIALECT = Dialect(
    "fake",
    (("imports", re.compile(r"(?!)")), ("weights", re.compile("loading")), ("kv", re.compile("cache"))),
    (Fact("kv_cache_tokens", re.compile(r"cache of ([\d,]+) tokens")),),
)


class Stage:
    """A runtime folder, a trial's folder and everything that was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "runtime"
        self.root.mkdir()
        trial = folder / "trial"
        trial.mkdir()
        self.events: list[tuple[str, dict]] = []
        self.site = Site(trial, (), threading.Event(), lambda name, data: self.events.append((name, dict(data))))
        self.binding: Binding | None = None

    def recipe(self, *words: str, named: bool = True, **changes) -> Recipe:
        def argv(binding: Binding) -> list[str]:
            self.binding = binding
            name = ["--name", binding.model] if named else []
            return fake("--port", str(binding.port), *name, *words)

        defaults = {
            "argv": argv,
            "env": lambda binding: {"VLLM_API_KEY": binding.api_key},
            "dialect": DIALECT,
            "limits": Limits(total_s=300),
            "stop_wait_s": 0.5,
        }
        return Recipe(**{**defaults, **changes})

    def clean(self) -> bool:
        """Nothing of any launch is left: no lease, no ownership, no temporary file, no process, no bound port."""
        files = [path for path in self.root.rglob("*") if path.is_file() or path.name.startswith("t-")]
        assert files == []
        if self.binding:
            assert not self.binding.temporary.exists()
            assert not probe.listens(self.binding.port)
        assert not [p.parent.name for p in PROC.glob("[0-9]*/cwd") if _leads_to(p, self.folder)]
        return True


def _leads_to(cwd: Path, folder: Path) -> bool:
    """Whether a process works in ``folder``, as servers and whatever they start do here."""
    try:
        return cwd.readlink().is_relative_to(folder)
    except OSError:
        return False


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def failure(stage: Stage, recipe: Recipe):
    with pytest.raises(LaunchFailed) as failed:
        start(recipe, stage.site, stage.root)
    assert stage.clean()
    return failed.value.outcome


def test_a_server_is_returned_once_it_answers_with_its_random_name_and_key(stage):
    running = start(stage.recipe("--delay", "0.3", stop_wait_s=60), stage.site, stage.root)
    try:
        assert stage.binding is not None and running.endpoint is not None
        assert running.endpoint.model == stage.binding.model
        assert probe.get(stage.binding.port, "/v1/models").status == 401
        assert probe.get(stage.binding.port, "/v1/models", running.endpoint.api_key).status == 200
    finally:
        teardown = running.stop()
    assert teardown.left_over == () and not teardown.killed
    assert stage.clean()


def test_two_launches_share_neither_port_nor_name_nor_key(stage, tmp_path):
    other = Stage(tmp_path / "trial")
    first = start(stage.recipe(), stage.site, stage.root)
    second = start(other.recipe(), other.site, stage.root)
    assert stage.binding is not None and other.binding is not None
    assert stage.binding.port != other.binding.port
    assert stage.binding.model != other.binding.model and stage.binding.api_key != other.binding.api_key
    first.stop()
    second.stop()
    assert stage.clean()


def test_phases_and_facts_come_from_the_log_and_are_told_as_they_begin(stage):
    recipe = stage.recipe("--say", "loading", "--say", "cache of 131,072 tokens", "--delay", "0.3")
    running = start(recipe, stage.site, stage.root)
    boot = running.boot_log.boot(time.monotonic())
    running.stop()
    assert list(boot.phases_s) == ["imports", "weights", "kv"]
    assert boot.facts == {"kv_cache_tokens": 131072.0}
    names = [data["name"] for name, data in stage.events if name == "phase"]
    assert (names[0], names[-1]) == ("imports", "ready")


def test_a_server_that_ends_at_start_up_is_diagnosed_from_its_log(stage):
    outcome = failure(
        stage, stage.recipe("--say", "loading", "--say", "error: unrecognized arguments: --max-foo", "--exit", "2")
    )
    assert (outcome.cause, outcome.stage, outcome.transient) == ("unknown-flag", "start-up", False)
    assert "--max-foo" in outcome.message
    assert list(outcome.boot.phases_s) == ["imports", "weights"]


def test_a_server_killed_at_start_up_is_known_to_have_been_killed(stage):
    assert failure(stage, stage.recipe("--die-of", "9")).cause == "killed"


@pytest.mark.parametrize("phase, words", [("imports", ()), ("weights", ("--say", "loading"))])
def test_a_hang_is_recognised_in_its_phase(stage, phase, words):
    limits = Limits(total_s=300, silent_s=0.2, fixed_s={phase: 0.8})
    outcome = failure(stage, stage.recipe(*words, "--hang", "--deaf", "--stray", "orphan", limits=limits))
    assert outcome.cause == "hang" and outcome.transient
    assert f"phase {phase}" in outcome.message


def test_a_phase_that_still_writes_to_its_log_does_not_hang():
    log, limits = BootLog(DIALECT, 0.0), Limits(silent_s=60.0, fixed_s={"imports": 100.0})
    log.feed(["still importing"], 170.0)
    assert _late(log, limits, 220.0) == "" and "hang: phase imports" in _late(log, limits, 240.0)


def test_a_server_that_is_not_healthy_is_not_ready(stage):
    recipe = stage.recipe(health="/locked", limits=Limits(total_s=1.5))  # which the stand-in answers with 401
    assert failure(stage, recipe).cause == "too-slow-to-start"


def test_a_server_that_never_gets_ready_is_too_slow(stage):
    assert failure(stage, stage.recipe("--hang", limits=Limits(total_s=0.8))).cause == "too-slow-to-start"


def test_a_program_that_cannot_be_started_is_said_to_be_missing(stage):
    outcome = failure(stage, stage.recipe(argv=lambda _binding: ["/does/not/exist"]))
    assert outcome.cause == "missing-dependency"
    assert "/does/not/exist" in outcome.evidence


def test_a_stranger_on_the_port_is_recognised_and_never_measured(stage):
    """Our server hangs before it binds; somebody else's answers in its place, without a key and with another name."""

    def argv(binding: Binding) -> list[str]:
        stage.binding = binding
        import subprocess

        stranger.append(subprocess.Popen(fake("--port", str(binding.port), "--name", "llama-70b")))
        return fake("--hang")

    stranger: list = []
    with pytest.raises(LaunchFailed) as failed:
        start(stage.recipe(argv=argv), stage.site, stage.root)
    outcome = failed.value.outcome
    assert stranger[0].poll() is None  # it was not ours to end
    stranger[0].kill()
    stranger[0].wait()
    assert outcome.cause == "port-in-use" and outcome.transient
    assert "llama-70b" in outcome.evidence
    assert stage.clean()


def test_a_cancelled_launch_leaves_nothing(stage):
    threading.Timer(0.5, stage.site.cancel.set).start()
    with pytest.raises(Cancelled):
        start(stage.recipe("--hang", "--stray", "session"), stage.site, stage.root)
    assert stage.clean()


def test_a_launch_that_is_cancelled_before_it_began_starts_nothing(stage):
    stage.site.cancel.set()
    with pytest.raises(Cancelled):
        start(stage.recipe(), stage.site, stage.root)
    assert stage.clean() and not (stage.site.folder / "server.log").exists()


def test_a_server_without_a_name_of_its_own_is_taken_by_its_port_and_its_life(stage):
    running = start(stage.recipe("--name", "gguf", named=False, model="gguf"), stage.site, stage.root)
    assert running.endpoint is not None and running.endpoint.model == "gguf"
    running.stop()
    assert stage.clean()


def test_the_environment_is_what_was_asked_for_and_little_more(stage, monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHINFER")
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    running = start(stage.recipe(), stage.site, stage.root)
    assert running.process is not None
    text = (PROC / str(running.process.server.pid) / "environ").read_bytes().decode()
    running.stop()
    env = dict(entry.split("=", 1) for entry in text.split("\0") if entry)
    assert "VLLM_ATTENTION_BACKEND" not in env and "SECRET_OF_MINE" not in env
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["PATH"]
    assert stage.binding is not None and env["TMPDIR"] == str(stage.binding.temporary)
    told = [name for event, data in stage.events if event == "not_passed" for name in data["variables"]]
    assert "VLLM_ATTENTION_BACKEND" in told and "SECRET_OF_MINE" not in told


def test_cpu_servers_run_one_at_a_time_on_a_machine(stage, tmp_path):
    other = Stage(tmp_path / "trial")
    first = start(stage.recipe(host_alone=True), stage.site, stage.root)
    result: list = []
    waiting = threading.Thread(
        target=lambda: result.append(start(other.recipe(host_alone=True), other.site, stage.root))
    )
    waiting.start()
    assert eventually(lambda: any(name == "waiting" for name, _ in other.events))
    assert result == []
    first.stop()
    waiting.join(300)
    assert len(result) == 1
    names = [name for name, _ in other.events]
    assert names.index("waiting") < names.index("leased") < names.index("phase")
    result[0].stop()
    assert stage.clean()


def test_gpus_are_leased_for_the_life_of_the_server(stage):
    site = Site(stage.site.folder, (0, 1), stage.site.cancel, stage.site.on_event)
    running = start(stage.recipe(), site, stage.root)
    assert running.process is not None
    env = (PROC / str(running.process.server.pid) / "environ").read_bytes()
    assert b"CUDA_VISIBLE_DEVICES=0,1" in env
    with pytest.raises(Exception, match="GPU 1 is leased"):
        Leases(stage.root).gpus((1,))
    running.stop()
    Leases(stage.root).gpus((0, 1)).release()
    assert stage.clean()


class Held(Gpus):
    """GPUs that somebody is on: ``used`` bytes of each."""

    def __init__(self, used: int, why: str = "") -> None:
        super().__init__(object())
        self.used, self.why = used, why

    def __len__(self) -> int:
        return 1

    def memory_used(self, index: int) -> int:
        return self.used

    def why_not(self, index: int) -> str:
        return self.why


@pytest.mark.parametrize(("more", "left"), [(0, ()), (10 * 2**30, ("GPU 0: 10.0 GiB are still held",))])
def test_memory_that_was_in_use_before_is_nothing_that_the_server_left(stage, monkeypatch, more, left):
    monkeypatch.setattr("tuner.server.running._GPU_BACK_S", 0.5)
    gpus = Held(20 * 2**30)
    running = start(stage.recipe(gpus=gpus), replace(stage.site, gpus=(0,)), stage.root)
    gpus.used += more
    assert running.stop().left_over == left


def test_gpus_are_given_back_where_the_wait_for_who_is_on_them_is_cancelled(stage):
    threading.Timer(0.3, stage.site.cancel.set).start()
    with pytest.raises(Cancelled):
        start(stage.recipe(gpus=Held(0, "in use by pid 7")), replace(stage.site, gpus=(0,)), stage.root)
    assert stage.clean()


def test_nothing_is_started_on_a_gpu_that_somebody_else_stays_on(stage, monkeypatch):
    monkeypatch.setattr("tuner.server.start._BUSY_WAIT_S", 0.0)
    with pytest.raises(LaunchFailed) as failed:
        start(stage.recipe(gpus=Held(0, "in use by pid 7")), replace(stage.site, gpus=(0,)), stage.root)
    outcome = failed.value.outcome
    assert (outcome.cause, outcome.stage, outcome.machines) == ("gpu-busy", "before launch", True)
    assert "in use by pid 7" in outcome.message + outcome.evidence
    assert stage.clean() and not (stage.site.folder / "server.log").exists()


def test_gpus_are_given_back_where_there_is_no_port(stage, monkeypatch):
    def none(*_: object) -> None:
        raise EnvironmentFault("every port tried is in use")

    monkeypatch.setattr(Leases, "port", none)
    with pytest.raises(EnvironmentFault):
        start(stage.recipe(), replace(stage.site, gpus=(0,)), stage.root)
    assert stage.clean()


def test_what_could_not_be_ended_is_left_to_be_reaped(stage, monkeypatch):
    running = start(stage.recipe(), stage.site, stage.root)
    assert running.process is not None
    stop = running.process.stop
    monkeypatch.setattr(running.process, "stop", lambda wait_s: replace(stop(wait_s), left=("pid 7 (stuck)",)))
    assert running.stop().left_over == ("pid 7 (stuck)",) and running.ownership.path.exists()


def test_this_machines_history_is_written_after_a_start_and_foretells_the_next(stage, tmp_path):
    history = History(tmp_path / "cache" / "startup.json", "fake 1")
    start(stage.recipe("--delay", "0.4", history=history), stage.site, stage.root).stop()
    seen = history.seen_s()
    assert seen["imports"][0] >= 0.4
    start(stage.recipe(history=history, limits=Limits(seen_s=seen)), stage.site, stage.root).stop()
    expected = [data["expected_s"] for name, data in stage.events if name == "phase"]
    assert expected[0] is None and expected[-1] == pytest.approx(seen["imports"][0])


def test_telemetry_of_the_host_is_written_beside_the_log(stage):
    import pyarrow.parquet as pq

    running = start(stage.recipe(), stage.site, stage.root)
    running.stop()
    table = pq.read_table(stage.site.folder / "telemetry.parquet")
    assert table.num_rows >= 1 and table["server_memory_bytes"][0].as_py() > 0


def test_what_an_earlier_tuner_left_is_reaped_before_the_next_launch(stage):
    launches = stage.root / "launches"
    launches.mkdir()
    gone = {"id": "f" * 16, "tuner": [os.getpid(), 1], "temporary": str(stage.root / "t-ffffffff")}
    (launches / "f.json").write_text(json.dumps(gone))
    start(stage.recipe(), stage.site, stage.root).stop()
    assert any(name == "reaped" and "f" * 16 in data["what"] for name, data in stage.events)
    assert stage.clean()


def test_the_port_that_was_leased_is_the_one_that_is_served(stage):
    running = start(stage.recipe(), stage.site, stage.root)
    assert running.process is not None and stage.binding is not None
    with socket.create_connection(("127.0.0.1", stage.binding.port)):
        assert Pid.of(running.process.server.pid) == running.process.server
    running.stop()
