"""Starting a server and waiting until it answers for itself: leases, process, phases, limits, proof of identity."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuner.engines.protocol import Cancelled, Endpoint, LaunchFailed, Site
from tuner.errors import EnvironmentFault
from tuner.server import probe
from tuner.server.bootlog import SILENT, BootLog, Dialect, LogFile
from tuner.server.diagnosis import Evidence, diagnose
from tuner.server.environment import not_passed, server_environment
from tuner.server.faststart import FastStart
from tuner.server.gpu import Gpus
from tuner.server.leases import GpuLease, Lease, Leases, PortLease, sweep
from tuner.server.limits import History, Limits
from tuner.server.process import GuardLink, Process, Program, StartFailed
from tuner.server.running import Running
from tuner.server.runtime import Ownership, reap, runtime_root
from tuner.server.telemetry import Host, Telemetry
from tuner.study.outcome import Infeasible

LOG = "server.log"
WARM_S = 3.0  # engines that compile at their first requests
_TICK_S = 0.2
_PROGRESS_S = 1.0
_LEASE_WAIT_S = 24 * 3600.0  # another tuner on this machine may measure for long; the user can interrupt
_BUSY_WAIT_S = 120.0  # somebody else's process on the GPU may just be ending


@dataclass(frozen=True, slots=True)
class Binding:
    """What is decided per launch and told to the server: where it listens, its key, its name, a short temporary
    folder that is removed afterwards, and the GPUs it may see."""

    port: int
    api_key: str
    model: str
    temporary: Path
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to start one kind of OpenAI-compatible server.

    ``argv`` and ``env`` are made for a :class:`Binding`; ``env`` goes over the minimal environment, and
    ``CUDA_VISIBLE_DEVICES`` is set to the leased GPUs. ``tokenizer`` is the model folder or id for the replay client.
    ``named``: the server's ``/v1/models`` lists the random name it was given (else ``model``, and only the process's
    life and the port prove that it is ours). ``shares_port``: it sets ``SO_REUSEADDR`` or ``SO_REUSEPORT``, so that we
    can hold the port until it is there.
    ``host_alone``: it computes on the CPU, so that only one such server may run on this machine at a time.
    ``api_key``: what it asks for (new at every launch where empty). ``warm_s``: seconds of the trace that it serves,
    unmeasured, before the first step: the first requests find kernels that are not compiled yet.
    ``clean`` ends what is not of the process tree (a container): it is called when that has ended, before it is checked
    that nothing is left, and must not raise.
    ``fast`` may fork the server from a standby; the first ``own_words`` of ``argv`` (interpreter, ``-m``, module) are
    then not its own.
    """

    argv: Callable[[Binding], Sequence[str]]
    env: Callable[[Binding], Mapping[str, str]] = lambda _binding: {}
    tokenizer: str = ""
    dialect: Dialect = SILENT
    limits: Limits = field(default_factory=Limits)
    history: History | None = None
    model: str = ""
    named: bool = True
    shares_port: bool = True
    host_alone: bool = False
    health: str = "/health"
    stop_wait_s: float = 15.0
    cwd: Path | None = None
    gpus: Gpus | None = None
    telemetry_period_s: float = 1.0
    fast: FastStart | None = None
    own_words: int = 3
    api_key: str = ""
    warm_s: float = 0.0
    clean: Callable[[], None] = lambda: None


def start(recipe: Recipe, site: Site, root: Path | None = None) -> Running:
    """Starts a server and returns it once it has proved who it is.

    Raises :class:`LaunchFailed` or :class:`Cancelled`, whose ``teardown`` says what was left behind (nothing), and
    ``EnvironmentFault`` where no port can be had. What earlier tuners left behind on this machine is reaped first.
    """
    root = root or runtime_root()
    for cleaned in reap(root):
        site.on_event("reaped", {"what": cleaned})
    sweep(root)
    running = _claim(recipe, site, root)
    try:
        _run(recipe, site, running)
        _await(recipe, site, running)
    except (LaunchFailed, Cancelled) as failure:
        failure.teardown = running.stop()
        raise
    except BaseException:
        running.stop()
        raise
    return running


def _claim(recipe: Recipe, site: Site, root: Path) -> Running:
    """Everything a launch needs before a process exists: GPUs (waited for), host, port, ownership."""
    leases = Leases(root)
    gpus = recipe.gpus or Gpus()
    label = str(site.folder)
    gpu_lease = _gpu_lease(leases, site, gpus, label)
    host_lease: Lease | None = None
    port: PortLease | None = None
    try:
        if recipe.host_alone:
            host_lease = _host_lease(leases, site, label)
        port = leases.port(label)
        ownership = Ownership(root, secrets.token_hex(8))
    except BaseException:
        for lease in (gpu_lease, host_lease, port):
            if lease:
                lease.release()
        raise
    now = time.monotonic()
    log = LogFile(site.folder / LOG)
    log.path.unlink(missing_ok=True)
    before = {index: gpus.memory_used(index) for index in site.gpus}
    site.on_event("leased", {})
    return Running(
        ownership, port, log, BootLog(recipe.dialect, now), gpus, recipe.stop_wait_s, gpu_lease, host_lease,
        fast=recipe.fast, clean=recipe.clean, gpu_used_before=before,
    )  # fmt: skip


def _gpu_lease(leases: Leases, site: Site, gpus: Gpus, label: str) -> GpuLease | None:
    """Waits for other tuners as long as it takes, and for whoever else is on the GPUs for a short while."""
    if not site.gpus:
        return None
    try:
        lease = leases.gpus(site.gpus, label)
    except EnvironmentFault as taken:
        site.on_event("waiting", {"for": taken.message})
        try:
            lease = leases.gpus(site.gpus, label, _LEASE_WAIT_S, site.cancel)
        except EnvironmentFault as still:
            raise (Cancelled() if site.cancel.is_set() else _busy(still.message)) from None
    deadline, told = time.monotonic() + _BUSY_WAIT_S, False
    while why := "; ".join(f"GPU {i}: {reason}" for i in site.gpus if len(gpus) and (reason := gpus.why_not(i))):
        if not told:
            site.on_event("waiting", {"for": why})
            told = True
        if site.cancel.wait(1.0):
            lease.release()
            raise Cancelled
        if time.monotonic() > deadline:
            lease.release()
            raise _busy(why)
    return lease


def _busy(why: str) -> LaunchFailed:
    fix = "end what uses the GPUs, or give the study other ones"
    return LaunchFailed(Infeasible("gpu-busy", why, why, fix, "before launch", transient=True))


def _host_lease(leases: Leases, site: Site, label: str) -> Lease:
    if lease := leases.host(label):
        return lease
    site.on_event("waiting", {"for": "another tuner measures on this machine's CPU"})
    while not (lease := leases.host(label, _LEASE_WAIT_S, site.cancel)):
        if site.cancel.is_set():
            raise Cancelled
    return lease


def _run(recipe: Recipe, site: Site, running: Running) -> None:
    if site.cancel.is_set():
        raise Cancelled
    binding = Binding(
        port=running.port.number,
        api_key=recipe.api_key
        or secrets.token_hex(24),  # no dash in front: as a word of a command line it would be a flag
        model=recipe.model or f"tuner-{secrets.token_hex(6)}",
        temporary=running.ownership.temporary,
        gpus=running.gpu_indices,
    )
    argv = list(recipe.argv(binding))
    wanted = dict(recipe.env(binding))
    wanted["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, binding.gpus))
    if left_out := not_passed(wanted):
        site.on_event("not_passed", {"variables": left_out})
    env = server_environment(wanted, temporary=binding.temporary, program=argv[0])
    hold = [lease.fd for lease in (running.host_lease, running.port.lease) if lease]
    hold += running.gpu_lease.fds if running.gpu_lease else ()
    forked = recipe.fast.guards(env, site.cancel, lambda why: _note(site, why)) if recipe.fast else None
    if site.cancel.is_set():
        raise Cancelled
    if not recipe.shares_port:
        running.port.hand_over()
    program = Program(argv, env, recipe.cwd or site.folder, running.log.path, hold)
    running.process = _forked(program, forked, recipe, running, site) or _executed(program, running)
    running.ownership.started(running.process.guard, running.process.server)
    running.endpoint = Endpoint(f"http://127.0.0.1:{binding.port}", binding.model, binding.api_key, recipe.tokenizer)
    host = Host(running.process.members)
    running.telemetry = Telemetry(
        site.folder / "telemetry.parquet", host, running.gpus, binding.gpus, recipe.telemetry_period_s
    )
    running.telemetry.start()


def _forked(
    program: Program, guards: Callable[..., GuardLink] | None, recipe: Recipe, running: Running, site: Site
) -> Process | None:
    """The program as a fork of the standby; None where that cannot be had, and it is executed instead."""
    if guards is None:
        return None
    try:
        words = program.argv[recipe.own_words - 1 :]
        return Process(replace(program, argv=words, guard=guards), running.ownership.id)
    except StartFailed as failure:
        _note(site, f"no fast start this time: {failure}")
        return None


def _executed(program: Program, running: Running) -> Process:
    try:
        return Process(program, running.ownership.id)
    except StartFailed as failure:
        raise LaunchFailed(diagnose(Evidence(str(failure), 127, phase="exec"))) from None


def _note(site: Site, why: str) -> None:
    site.on_event("note", {"why": why})


def _await(recipe: Recipe, site: Site, running: Running) -> None:
    """Follows the log until the server answers ``/v1/models`` with its own name, or something ends the wait."""
    boot_log, limits = running.boot_log, recipe.limits
    expected_s = limits.expected_s()
    site.on_event("phase", {"name": boot_log.phase, "elapsed_s": 0.0, "expected_s": expected_s})
    told_s = time.monotonic()
    while True:
        now = time.monotonic()
        exited = running.exit_code()
        begun = boot_log.feed(running.log.new_lines(), now)
        if begun or now - told_s >= _PROGRESS_S:
            told_s = now
            elapsed = {"elapsed_s": round(now - boot_log.started_s, 1), "expected_s": expected_s}
            site.on_event("phase", {"name": boot_log.phase, **elapsed})
        if exited is not None:
            raise LaunchFailed(_diagnosed(running, exited))
        if _answers(recipe, running):
            break
        if late := _late(boot_log, limits, now):
            raise LaunchFailed(_diagnosed(running, None, late))
        if site.cancel.wait(_TICK_S):
            raise Cancelled
    boot = boot_log.boot(time.monotonic())
    if recipe.history:
        recipe.history.add(boot)
    if running.process:
        running.process.note_shared_memory()
    site.on_event("phase", {"name": "ready", "elapsed_s": round(boot.total_s, 1), "expected_s": expected_s})


def _answers(recipe: Recipe, running: Running) -> bool:
    """Whether our server serves. A stranger on the port is recognised by the name it does not know and raises."""
    endpoint, port = running.endpoint, running.port.number
    if endpoint is None or not probe.listens(port):
        return False
    answer = probe.get(port, "/v1/models", endpoint.api_key)
    names = probe.served_models(answer)
    if names is not None and (endpoint.model in names or not recipe.named):
        if recipe.health and probe.get(port, recipe.health).status != 200:
            return False
        if len(names) == 1:  # of several it may know ours by another name; the only one is asked for from now on
            running.endpoint = replace(endpoint, model=names[0])
        return True
    foreign = names is not None or answer.status in (401, 403)
    if foreign and running.exit_code() is None:
        running.stranger = True
        said = f"it serves {', '.join(names)}" if names else f"it refuses our key (HTTP {answer.status})"
        raise LaunchFailed(
            Infeasible(
                "port-in-use",
                f"another server answers on port {port}, so nothing was measured",
                f"GET /v1/models on 127.0.0.1:{port}: {said}",
                "nothing: the next launch takes another port",
                transient=True,
                boot=running.boot_log.boot(time.monotonic()),
            )
        )
    return False


def _late(boot_log: BootLog, limits: Limits, now: float) -> str:
    phase, elapsed = boot_log.phase, boot_log.phase_elapsed_s(now)
    limit = limits.phase_s(phase)
    if elapsed > limit and now - boot_log.last_line_s > min(limits.silent_s, limit):
        return f"hang: phase {phase} took over {limit:.0f} s and the log has been still"
    if now - boot_log.started_s > limits.total_s:
        return f"slow: not ready after {limits.total_s:.0f} s"
    return ""


def _diagnosed(running: Running, exit_code: int | None, late: str = "") -> Infeasible:
    log = running.log
    boot_log = running.boot_log
    found = diagnose(Evidence(log.text(), exit_code, boot_log.phase, late))
    boot = boot_log.boot(time.monotonic())
    return replace(found, boot=boot)
