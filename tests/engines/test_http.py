"""A server that is measured: its death, its sickness and the machine's figures become part of what is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.measure.made import records, request
from tests.server.test_gpu import Nvml
from tests.server.test_start import Stage
from tuner.engines.http import HttpServer
from tuner.engines.protocol import LaunchFailed, StepPlan
from tuner.engines.vllmlog import DIALECT
from tuner.errors import EnvironmentFault, NoCompletions, Unreachable
from tuner.load.step import prompt_seed
from tuner.load.trace import Trace
from tuner.server import probe
from tuner.server.gpu import Gpus
from tuner.server.start import start
from tuner.study.outcome import Step


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "stage").mkdir()
    return Stage(tmp_path / "stage")


def launched(stage: Stage, *words: str, **changes) -> HttpServer:
    return HttpServer(start(stage.recipe(*words, **changes), stage.site, stage.root))


def replay(monkeypatch, act) -> None:
    """Puts ``act(endpoint, plan)`` in the place of the replay."""
    from tuner.load import step as module

    monkeypatch.setattr(module, "measure", lambda endpoint, plan, *, alive: act(endpoint, plan, alive))


def step(errors: float = 0.0) -> Step:
    return Step(1.0, "w0", {"ttft_p99_s": 0.1, "error_rate": errors})


def plan(stage: Stage) -> StepPlan:
    return StepPlan(1.0, None, "w0", (), stage.site.folder / "r.parquet")  # type: ignore[arg-type]


def asked(server: HttpServer, path: str) -> None:
    assert server.endpoint is not None
    probe.get(int(server.endpoint.url.rpartition(":")[2]), path, server.endpoint.api_key)


def test_a_measured_step_gets_the_machines_figures(stage, monkeypatch):
    server = launched(stage)
    replay(monkeypatch, lambda endpoint, plan, alive: step())
    measured = server.measure(plan(stage))
    assert measured.metrics["ttft_p99_s"] == 0.1
    assert measured.metrics["system_server_memory_max_bytes"] > 0
    assert measured.untrusted == ()
    assert server.stop().left_over == () and stage.clean()


def test_a_gpu_that_throttled_makes_the_step_untrusted(stage, monkeypatch):
    hot = Gpus(Nvml({"reasons": 0x40, "celsius": 95}))
    site = replace(stage.site, gpus=(0,))
    server = HttpServer(start(stage.recipe(gpus=hot), site, stage.root))
    replay(monkeypatch, lambda endpoint, plan, alive: step())
    measured = server.measure(plan(stage))
    server.stop()
    assert len(measured.untrusted) == 1 and "thermal" in measured.untrusted[0]
    assert measured.metrics["system_gpu_throttled_share"] == 1.0


def say(stage: Stage, line: str) -> None:
    """What the server writes into its log now."""
    with (stage.site.folder / "server.log").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def test_a_server_that_compiles_while_it_is_measured_makes_the_step_untrusted(stage, monkeypatch):
    server = launched(stage, dialect=DIALECT)
    say(stage, "WARNING [jit_monitor.py:129] Triton kernel JIT compilation during inference: earlier. This causes")

    def compiling(endpoint, plan, alive):
        for kernel in ("two", "one", "two"):
            say(stage, f"WARNING [jit_monitor.py:129] Triton kernel JIT compilation during inference: {kernel}. This")
        return step()

    replay(monkeypatch, compiling)
    first = server.measure(plan(stage))
    replay(monkeypatch, lambda endpoint, plan, alive: step())
    second = server.measure(plan(stage))
    server.stop()
    assert first.untrusted == ("the server was still compiling while it was measured (one, two)",)
    assert second.untrusted == ()


def test_what_a_server_compiles_while_its_cache_is_filled_is_not_held_against_the_step(stage, monkeypatch):
    server = launched(stage, dialect=DIALECT)

    def filling(endpoint, plan, alive):
        say(stage, "WARNING [jit_monitor.py:129] Triton kernel JIT compilation during inference: one. This causes")
        plan.on_event("filled", {})
        return step()

    replay(monkeypatch, filling)
    assert server.measure(plan(stage)).untrusted == ()
    server.stop()


def test_a_server_is_warmed_once_before_its_first_step(stage, monkeypatch):
    server = HttpServer(start(stage.recipe(), stage.site, stage.root), warm_s=3.0)
    seen: list[StepPlan] = []

    def act(endpoint, plan, alive):
        seen.append(plan)
        return step()

    replay(monkeypatch, act)
    n, none = 100, np.zeros(0, dtype=np.int64)
    trace = Trace("t", np.arange(n) / 2, np.full(n, 50), np.full(n, 40), 0, none, np.zeros(n + 1, dtype=np.int64))
    wanted = replace(plan(stage), trace=trace, load=4.0, warmup_s=5.0)
    for _ in range(2):
        server.measure(wanted)
    server.stop()
    warming, *measured = seen
    assert [replace(plan, on_event=wanted.on_event) for plan in measured] == [wanted, wanted]
    assert len(warming.trace) == 24  # 3 s of replay are 12 s of the trace at load 4
    assert warming.trace.output_tokens.max() == 16 and warming.trace.input_tokens.min() == 50
    assert warming.slos == () and not warming.early_stop
    assert prompt_seed(warming) != prompt_seed(wanted)  # its prompts must not be in the prefix cache
    assert not warming.records.parent.exists()


def test_warming_sends_nothing_of_what_came_before_the_window(stage, monkeypatch):
    server = HttpServer(start(stage.recipe(), stage.site, stage.root), warm_s=3.0)
    seen: list[StepPlan] = []
    replay(monkeypatch, lambda endpoint, plan, alive: seen.append(plan) or step())
    n, none = 8, np.zeros(0, dtype=np.int64)
    trace = Trace("t", np.arange(n) / 2, np.full(n, 50), np.full(n, 40), 0, none, np.zeros(n + 1, dtype=np.int64))
    server.measure(replace(plan(stage), trace=replace(trace, earlier=trace)))
    server.stop()
    warming, measured = seen
    assert warming.trace.earlier is None and measured.trace.earlier is trace


def test_energy_is_told_per_token_that_was_served(stage, monkeypatch):
    card = {"millijoules": 1_000}
    site = replace(stage.site, gpus=(0,))
    server = HttpServer(start(stage.recipe(gpus=Gpus(Nvml(card)), telemetry_period_s=60), site, stage.root))

    def act(endpoint, plan, alive):
        telemetry = server._running.telemetry
        assert telemetry is not None
        telemetry.sample()
        card["millijoules"] += 50_000
        return replace(step(), metrics={"client_output_tokens": 100.0})

    replay(monkeypatch, act)
    measured = server.measure(plan(stage))
    server.stop()
    assert measured.metrics["system_gpu_energy_j_per_output_token"] == pytest.approx(0.5)


def test_energy_is_of_the_window_and_its_tokens_and_not_of_what_lies_around_it(stage, monkeypatch):
    site = replace(stage.site, gpus=(0,))
    server = HttpServer(start(stage.recipe(gpus=Gpus(Nvml({})), telemetry_period_s=60), site, stage.root))

    def act(endpoint, plan, alive):
        telemetry = server._running.telemetry
        assert telemetry is not None
        telemetry.sample()
        begun = telemetry._samples[-1]
        for after_s in range(1, 16):  # 500 W for the first ten seconds, 100 W in the tail
            drawn = replace(begun.gpus[0], energy_j=1e6 + 500 * min(after_s, 10) + 100 * max(after_s - 10, 0))
            telemetry._samples.append(replace(begun, at_s=begun.at_s + after_s, gpus=(drawn,)))
        telemetry._samples[-16] = replace(begun, gpus=(replace(begun.gpus[0], energy_j=1e6),))
        monkeypatch.setattr(telemetry, "between", lambda begin_s, end_s: telemetry._samples[-16:])
        rows = [request(i / 10, [i / 10 + 0.1, i / 10 + 0.2]) for i in range(101)]
        told = {"epoch_unix_s": begun.at_s}
        made = records(plan.records.parent, rows, **told)
        made.path.rename(plan.records)
        return replace(step(), metrics={"client_output_tokens": 5000.0, "output_tokens_per_s": 20.0})

    replay(monkeypatch, act)
    measured = server.measure(plan(stage))
    server.stop()
    assert measured.metrics["system_gpu_power_mean_w"] == pytest.approx(500)
    assert measured.metrics["system_gpu_energy_j_per_output_token"] == pytest.approx(500 / 20)


def test_a_disk_that_is_full_does_not_keep_a_server_alive(stage, monkeypatch):
    from tuner.server import telemetry

    server = launched(stage)

    def full(samples, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telemetry, "write", full)
    assert server.stop().left_over == () and stage.clean()


def test_a_server_that_dies_under_load_is_diagnosed_from_its_log(stage, monkeypatch):
    server = launched(stage, "--say-after", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")

    def act(endpoint, plan, alive):
        assert alive()
        asked(server, "/crash")
        return step(errors=0.5)

    replay(monkeypatch, act)
    with pytest.raises(LaunchFailed) as failed:
        server.measure(plan(stage))
    assert (failed.value.outcome.cause, failed.value.outcome.stage) == ("oom-load", "under load")
    assert not server.alive()
    assert server.stop().left_over == () and stage.clean()


def test_a_server_that_dies_in_the_last_moment_is_not_taken_for_a_good_one(stage, monkeypatch):
    server = launched(stage)

    def act(endpoint, plan, alive):
        asked(server, "/crash")
        while alive():
            pass
        return step(errors=0.0)

    replay(monkeypatch, act)
    with pytest.raises(LaunchFailed) as failed:
        server.measure(plan(stage))
    assert failed.value.outcome.cause == "killed"
    server.stop()


def test_a_server_that_lives_and_is_sick_is_unhealthy(stage, monkeypatch):
    from tuner.engines import http

    monkeypatch.setattr(http, "_DYING_S", 0.2)
    server = launched(stage)

    def act(endpoint, plan, alive):
        asked(server, "/sicken")
        return step(errors=0.9)

    replay(monkeypatch, act)
    with pytest.raises(LaunchFailed) as failed:
        server.measure(plan(stage))
    assert failed.value.outcome.cause == "unhealthy" and failed.value.outcome.stage == "under load"
    assert server.stop().left_over == ()


def test_errors_of_a_server_that_is_well_are_part_of_the_measurement(stage, monkeypatch):
    server = launched(stage)
    replay(monkeypatch, lambda endpoint, plan, alive: step(errors=0.3))
    assert server.measure(plan(stage)).metrics["error_rate"] == 0.3
    server.stop()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("{url} is not serving: HTTP 503", "unhealthy"),
        ("{url} does not stream completions", "no-completions"),
    ],
)
def test_a_server_that_nobody_can_measure_is_at_fault_even_if_its_health_check_answers(stage, monkeypatch, said, cause):
    server = launched(stage)

    def act(endpoint, plan, alive):
        text = said.format(url=endpoint.url)
        raise Unreachable(text) if cause == "unhealthy" else NoCompletions(text, why="HTTP 503", fix="")

    replay(monkeypatch, act)
    with pytest.raises(LaunchFailed) as failed:
        server.measure(plan(stage))
    found = failed.value.outcome
    assert found.cause == cause and found.transient and "HTTP 503" in found.message
    assert "127.0.0.1" in found.evidence and "127.0.0.1" not in found.message  # the same words at every launch
    server.stop()


@pytest.mark.parametrize(
    "fault",
    [OSError(28, "No space left on device"), EnvironmentFault("a client process ended before the replay began")],
)
def test_what_this_machine_cannot_do_is_no_fault_of_the_server(stage, monkeypatch, fault):
    server = launched(stage)

    def act(endpoint, plan, alive):
        raise fault

    replay(monkeypatch, act)
    with pytest.raises(type(fault)) as raised:
        server.measure(plan(stage))
    server.stop()
    assert raised.value is fault
