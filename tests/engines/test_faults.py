"""Every fault that the emulator can show is recognised for what it is, and nothing is left of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engines.conftest import plan, trace
from tuner.engines.emulator import EmulatorEngine
from tuner.engines.emulator.faults import CATALOGUE, PHASES
from tuner.engines.protocol import LaunchFailed, Server, Site
from tuner.space.config import ServingConfig
from tuner.study.outcome import Infeasible, Step

GIB = 2**30


def engine(fault: str, **more: object) -> EmulatorEngine:
    hangs = {"slow-boot": "weights"}.get(fault.partition(":")[0], fault.removeprefix("hang:"))
    more = {"phase_limit_s": {hangs: 1.5}, "boot_scale": 0, "stop_wait_s": 1.0, **more}
    return EmulatorEngine(fault=fault, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def nothing_is_left(runtime: Path, site: Site) -> Iterator[None]:
    """After each fault: no process, no port or GPU lease, no temporary file of the launch."""
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    marked = _marked(site)
    yield
    deadline = time.monotonic() + 5
    while (more := {c.pid for c in me.children(recursive=True)} - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not more, "processes were left behind"
    assert _marked(site) == marked, "processes that left the tree were left behind"
    assert not [path for path in runtime.rglob("*") if path.is_file() or path.name.startswith("t-")], "leases or files"


def _marked(site: Site) -> set[int]:
    """Whoever was started in the trial's folder, wherever in the process tree it went."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(site.folder):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def boot_failure(fault: str, config: ServingConfig, site: Site, **more: object) -> Infeasible:
    try:
        server = engine(fault, **more).launch(config, site)
    except LaunchFailed as failure:
        return failure.outcome
    server.stop()
    raise AssertionError(f"{fault}: the server came up")


def load_failure(fault: str, config: ServingConfig, site: Site) -> Infeasible:
    server = engine(fault).launch(config, site)
    try:
        server.measure(plan(site, of=trace(24, 12.0, 40, 20)))
    except LaunchFailed as failure:
        return failure.outcome
    finally:
        assert server.stop().left_over == ()
    raise AssertionError(f"{fault}: the step was measured")


def measured(fault: str, config: ServingConfig, site: Site, **more: object) -> tuple[Step, Server]:
    server = engine(fault).launch(config, site)
    try:
        return server.measure(plan(site, of=trace(24, 12.0, 40, 20), **more)), server
    finally:
        assert server.stop().left_over == ()


# fault -> the cause that the launcher must name while the server starts
BOOT = {
    "oom-weights": "oom-weights",  # torch: the weights do not fit
    "oom-kv": "oom-kv",  # vLLM: 16.00 GiB needed, 9.31 GiB there
    "oom-no-kv": "oom-kv",  # vLLM: nothing at all is left for the cache
    "oom-warmup": "oom-warmup",  # the sampler's warm-up with max-num-seqs requests
    "oom-activations": "oom-activations",  # torch, while the largest batch is profiled
    "oom-graphs": "oom-graphs",  # torch, while CUDA graphs are captured
    "gpu-busy": "memory-taken",  # somebody else's process holds the memory
    "invalid-combination": "invalid-combination",  # pydantic's ValidationError
    "block-size": "invalid-combination",  # a block size that the attention backend lacks
    "unknown-flag": "unknown-flag",  # argparse
    "model-not-found": "model-not-found",
    "gated-model": "model-not-allowed",
    "custom-code": "needs-trust",
    "no-gpu": "no-gpu",
    "old-driver": "driver-too-old",
    "nccl": "nccl",
    "port-taken": "port-in-use",  # between our lease and its bind
    "disk-full": "disk-full",
    "killed": "killed",  # signal 9, as the kernel does when memory runs out
    "silent-death": "crash",  # exit code 0, no word
    "wrong-model": "port-in-use",  # a stranger's server answers on the port
    "wrong-key": "port-in-use",  # a server that does not know our key
    "slow-boot:30": "hang",  # silent for longer than the phase may be
    **{f"hang:{phase}": "hang" for phase in PHASES},
}
LOAD = {
    "oom-load": "oom-load",
    "crash": "crash-under-load",
    "cuda-error": "gpu-fault",
    "segfault": "crash",  # signal 11
    "killed-load": "killed",
    "silent-death-load": "crash-under-load",
    "refuse": "unhealthy",  # stops listening
    "unhealthy": "unhealthy",  # /health answers 503
    "garbage": "no-completions",  # events that are no JSON
}


@pytest.mark.parametrize(("fault", "cause"), BOOT.items())
def test_a_server_that_cannot_start_is_diagnosed(fault: str, cause: str, config: ServingConfig, site: Site) -> None:
    outcome = boot_failure(fault, config, site)

    assert (outcome.cause, outcome.stage) == (cause, "start-up")
    assert outcome.message
    assert outcome.evidence or fault == "hang:imports", "its last line, where it wrote one"
    if fault.startswith("hang:"):
        assert fault.removeprefix("hang:") in outcome.message, "it says which phase hangs"


@pytest.mark.parametrize(("fault", "cause"), LOAD.items())
def test_a_server_that_fails_under_load_is_diagnosed(fault: str, cause: str, config: ServingConfig, site: Site) -> None:
    outcome = load_failure(fault, config, site)

    assert (outcome.cause, outcome.stage) == (cause, "under load")


def test_every_fault_of_the_catalogue_is_tested_here() -> None:
    elsewhere = {"slow-health", "log-flood", "hang-load", "stall", "reset", "http-500", "wrong-usage", "short-output"}
    elsewhere |= {"ignore-sigterm", "leave-children"}
    tested = {fault.partition(":")[0] for fault in (*BOOT, *LOAD)} | elsewhere

    assert tested == set(CATALOGUE)
    assert len(BOOT) + len(LOAD) + len(elsewhere) >= 25


def test_what_a_missing_cache_lacks_is_said_in_bytes(config: ServingConfig, site: Site) -> None:
    outcome = boot_failure("oom-kv", config, site)

    assert outcome.short_bytes == pytest.approx((16.00 - 9.31) * GIB, rel=0.01)


def test_a_slow_but_honest_start_is_waited_for(config: ServingConfig, site: Site) -> None:
    server = engine("slow-boot:2", phase_limit_s=300.0).launch(config, site)
    server.stop()

    assert server.boot.total_s >= 2
    assert server.boot.phases_s["weights"] >= 1  # a phase begins when its line is read, on a busy machine later


def test_a_server_too_slow_to_start_is_given_up(config: ServingConfig, site: Site) -> None:
    outcome = boot_failure("slow-boot:30", config, site, phase_limit_s=60.0, start_limit_s=1.5)

    assert outcome.cause == "too-slow-to-start"


def test_a_server_is_used_only_when_it_is_healthy(config: ServingConfig, site: Site) -> None:
    began = time.monotonic()
    engine("slow-health:1.5", phase_limit_s=300.0).launch(config, site).stop()

    assert time.monotonic() - began >= 1.5


def test_a_flood_of_log_does_not_block_the_server(config: ServingConfig, site: Site) -> None:
    server = engine("log-flood:4", phase_limit_s=300.0).launch(config, site)
    server.stop()

    assert (site.folder / "server.log").stat().st_size > 4 * 2**20


def test_a_server_that_ignores_sigterm_is_killed(config: ServingConfig, site: Site) -> None:
    teardown = engine("ignore-sigterm").launch(config, site).stop()

    assert teardown.killed
    assert teardown.left_over == ()


def test_children_that_left_the_session_are_found(config: ServingConfig, site: Site) -> None:
    server = engine("leave-children:3").launch(config, site)
    assert len(_marked(site)) >= 4, "the fault did start children"
    teardown = server.stop()

    assert teardown.killed
    assert teardown.left_over == ()


def test_a_hang_under_load_is_failed_requests_not_a_hang_of_the_tuner(config: ServingConfig, site: Site) -> None:
    began = time.monotonic()
    step, _ = measured("hang-load", config, site, request_timeout_s=3.0)

    assert time.monotonic() - began < 120
    assert step.metrics["error_rate"] > 0.2
    assert any("error_rate" in miss for miss in step.slo_misses)


def test_a_stall_shows_in_the_longest_gap(config: ServingConfig, site: Site) -> None:
    server = engine("stall:1:200").launch(config, site)
    step = server.measure(plan(site, of=trace(12, 12.0, 40, 60)))
    server.stop()

    assert step.metrics["itl_max_s"] >= 0.9
    assert step.metrics["error_rate"] == 0


def test_connections_that_are_cut_are_failed_requests(config: ServingConfig, site: Site) -> None:
    step, _ = measured("reset:4", config, site)

    assert step.metrics["error_rate"] == pytest.approx(0.25, abs=0.05)
    assert not step.ok


def test_a_share_of_errors_is_an_error_rate(config: ServingConfig, site: Site) -> None:
    step, _ = measured("http-500:0.5", config, site)

    assert 0.1 <= step.metrics["error_rate"] <= 0.9
    assert not step.ok


def test_wrong_token_counts_are_not_believed(config: ServingConfig, site: Site) -> None:
    """The server reports three tokens more than it sends; the trace wants 20 per request, so 23 cannot be right."""
    step, _ = measured("wrong-usage:3", config, site)

    assert step.metrics["output_share"] == pytest.approx(23 / 20)
    assert any("115.0% of the output tokens came" in reason for reason in step.untrusted)


def test_answers_that_are_too_short_show_as_output_that_did_not_come(config: ServingConfig, site: Site) -> None:
    step, _ = measured("short-output", config, site)

    assert step.metrics["output_share"] == pytest.approx(0.5)
