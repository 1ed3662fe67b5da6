"""The real CPU build, as few launches as will do: contained, diagnosed and started fast."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.real import model, vllm_of
from tests.server.test_process import eventually
from tuner.engines.protocol import LaunchFailed, Site
from tuner.engines.vllm import VllmEngine
from tuner.server import probe
from tuner.server.tree import Pid, members
from tuner.space.config import ServingConfig, Value
from tuner.spec.facts import of_machine

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real():
    """Interpreter and a small model folder."""
    return vllm_of("cpu"), model()


def config(model: str, **more: Value | None) -> ServingConfig:
    flags: dict[str, Value | None] = {"load-format": "dummy", "dtype": of_machine()["native_dtype"]}
    flags |= {"max-model-len": 1024, "enforce-eager": None} | {
        name.replace("_", "-"): value for name, value in more.items()
    }
    return ServingConfig(model, {}, flags, {"VLLM_CPU_KVCACHE_SPACE": "1"}, gpus=0)


def site(folder: Path) -> Site:
    folder.mkdir()
    return Site(folder, (), threading.Event(), lambda _name, _data: None)


def test_a_block_size_that_the_cpu_has_not_is_refused_with_the_line_that_says_so(real, tmp_path):
    python, model = real
    with pytest.raises(LaunchFailed) as failed:
        VllmEngine(python=python, fast_start="off").launch(config(model, block_size=16), site(tmp_path / "t"))
    outcome = failed.value.outcome
    assert (outcome.cause, outcome.transient) == ("invalid-combination", False)
    assert "No common block size for 16" in outcome.evidence
    assert outcome.boot.phases_s["imports"] > 0.5


def test_servers_from_a_standby_skip_two_imports_and_are_ended_whole(real, tmp_path):
    python, model = real
    engine = VllmEngine(python=python)
    first = engine.launch(config(model), site(tmp_path / "a"))
    assert first.stop().left_over == ()
    server = engine.launch(config(model), site(tmp_path / "b"))
    try:
        boot, process = server.boot, server._running.process
        assert process is not None and server.endpoint is not None
        assert boot.phases_s["imports"] + boot.phases_s["config"] < boot.phases_s["engine"]  # the workers still import
        assert boot.facts["kv_cache_tokens"] > 0 and boot.facts["max_model_len"] == 1024
        port = int(server.endpoint.url.rpartition(":")[2])
        assert probe.get(port, "/v1/models").status == 401
        assert len(members(process.id)) >= 3  # API server, engine core, worker, by their marker alone
        core = next(p for p in process.members() if b"Worker" in Path(f"/proc/{p.pid}/cmdline").read_bytes())
        os.kill(core.pid, signal.SIGKILL)
        assert eventually(lambda: not server.alive(), 60)
        fault = server._fault(errors=True)
        assert fault is not None and fault.stage == "under load" and fault.cause == "killed"
    finally:
        teardown = server.stop()
        engine.close()
    assert teardown.left_over == ()
    assert members(process.id) == set()


TUNER = """
import json, sys, threading
from pathlib import Path
from tests.engines.test_vllm_real import config, site
from tuner.engines.vllm import VllmEngine
server = VllmEngine(python={python!r}, fast_start={mode!r}).launch(config({model!r}), site(Path({folder!r})))
print(json.dumps([server._running.process.id, *[p.pid for p in server._running.process.members()]]), flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_tuner_killed_with_9_leaves_no_server(real, tmp_path, mode):
    python, model = real
    text = TUNER.format(python=python, model=model, folder=str(tmp_path / "t"), mode=mode)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    tuner = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env=env, cwd=ROOT)
    try:
        assert tuner.stdout is not None
        launch_id, *numbers = json.loads(tuner.stdout.readline())
        pids = [pid for number in numbers if (pid := Pid.of(number))]
        assert len(pids) >= 3
    finally:
        tuner.kill()
        tuner.wait()
    killed_s = time.monotonic()
    assert eventually(lambda: not any(pid.alive for pid in pids), 30)
    assert members(launch_id) == set() and time.monotonic() - killed_s < 30
