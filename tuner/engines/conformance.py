"""What every engine must do, as tests that an engine's author runs.

    class TestMyEngine(EngineConformance):
        def engine(self): return MyEngine(...)
        def config(self): return ServingConfig("path/to/model", {}, {"max-model-len": 2048})

under pytest, or without it: ``python -m tuner.engines.conformance package.module:TestMyEngine``. The contract in words
is :mod:`tuner.engines.protocol`.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from tuner.engines.protocol import Cancelled, Endpoint, Engine, LaunchFailed, Server, Site, StepPlan
from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo
from tuner.study.outcome import Infeasible, Step

STAGES = ("before launch", "start-up", "under load", "quality")


class EngineConformance:
    """Subclass it under a name that begins with ``Test`` and say what is to be tested.

    ``over_http``: the engine's servers have an endpoint and write records. ``ours``: it starts them, so that stopping
    ends them. ``one_launch``: launching is dear, only what one launch can show is tested.
    """

    over_http = True
    ours = True
    one_launch = False
    gpus: tuple[int, ...] = ()

    def engine(self) -> Engine:
        """A fresh engine."""
        raise NotImplementedError

    def config(self) -> ServingConfig:
        """A configuration that works."""
        raise NotImplementedError

    def bad_config(self) -> ServingConfig | None:
        """A configuration that cannot work; None: there is none."""
        return None

    def trace(self) -> Trace:
        """A small trace that the configuration serves in seconds: 12 requests, 4 per second, 24 + 8 tokens each."""
        n = 12
        arrival = np.arange(n) * 0.25
        none = np.zeros(0, dtype=np.int64)
        offsets = np.zeros(n + 1, dtype=np.int64)
        return Trace("conformance", arrival, np.full(n, 24), np.full(n, 8), 0, none, offsets)

    # -- the tests ---------------------------------------------------------------------------------------------------

    def test_it_says_what_it_is(self) -> None:
        engine = self.engine()
        _require(engine.kind and isinstance(engine.kind, str), "kind is the word in the study file")
        _require(isinstance(engine.emulated, bool), "emulated is True or False")
        version = engine.version()
        _require(isinstance(version, str) and version, "version() is a text")
        _require(engine.version() == version, "version() stays the same")
        flags = engine.flags()
        named = flags is None or all(isinstance(flag, str) and not flag.startswith("-") for flag in flags)
        _require(named, "flags() are names without dashes, or None")

    def test_one_launch_from_start_to_stop(self) -> None:
        with self._folder() as folder, self._nothing_left():
            server = self.engine().launch(self.config(), self.site(folder))
            try:
                self._check_boot(server)
                self._check_steps(server, folder)
                if self.over_http:
                    self._check_cancelled_step(server, folder)
                    after = server.measure(self.plan(folder, 1.0, "after-cancel"))
                    _require(after.metrics["error_rate"] == 0.0, "a cancelled step leaves the server as it was")
            finally:
                teardown = server.stop()
            _require(teardown.left_over == (), f"stop() left behind: {teardown.left_over}")
            again = server.stop()
            _require(again.left_over == (), "stop() may be called twice")
            if self.over_http and self.ours:
                _require(not _listens(server), "nobody listens on the port after stop()")

    def test_a_launch_that_was_cancelled_leaves_nothing(self) -> None:
        with self._folder() as folder, self._nothing_left():
            cancel = threading.Event()
            cancel.set()
            try:
                server = self.engine().launch(self.config(), self.site(folder, cancel))
            except Cancelled:
                return
            server.stop()
            raise AssertionError("launch() did not raise Cancelled though cancel was set")

    def test_a_configuration_that_cannot_work_is_an_outcome(self) -> None:
        bad = self.bad_config()
        if bad is None or self.one_launch:
            raise unittest.SkipTest("no bad configuration given")
        with self._folder() as folder, self._nothing_left():
            outcome = self._failure(bad, folder)
            _require(outcome.cause and " " not in outcome.cause, f"the cause is a slug, not {outcome.cause!r}")
            _require(outcome.message, "the outcome says in words what happened")
            _require(outcome.stage in STAGES, f"stage is one of {STAGES}")

    def test_two_servers_at_once_do_not_meet(self) -> None:
        if self.one_launch or not self.ours or not self.over_http:
            raise unittest.SkipTest("one server at a time")
        with self._folder() as one, self._folder() as two, self._nothing_left():
            engine = self.engine()
            first = engine.launch(self.config(), self.site(one))
            try:
                second = engine.launch(self.config(), self.site(two))
                try:
                    different = _endpoint(first).url != _endpoint(second).url
                    _require(different, "each server has a port of its own")
                    step = second.measure(self.plan(two, 1.0))
                    _require(step.metrics["error_rate"] == 0.0, "the second serves while the first runs")
                finally:
                    second.stop()
                _require(_listens(first), "stopping one server leaves the other alone")
            finally:
                first.stop()

    def test_a_server_that_dies_under_load_is_an_outcome(self) -> None:
        if self.one_launch or not self.ours or not self.over_http:
            raise unittest.SkipTest("the server is not ours to kill")
        with self._folder() as folder, self._nothing_left():
            server = self.engine().launch(self.config(), self.site(folder))
            try:
                port = urlsplit(_endpoint(server).url).port or 0
                killer = threading.Timer(1.0, _kill_listener, (port,))
                killer.start()
                try:
                    server.measure(self.plan(folder, 1.0))
                except LaunchFailed as failure:
                    _require(failure.outcome.stage == "under load", "the stage is 'under load'")
                    _require(failure.outcome.cause, "the outcome has a cause")
                else:
                    raise AssertionError("measure() returned though the server was killed")
                finally:
                    killer.join()
            finally:
                _require(server.stop().left_over == (), "a dead server is cleaned up after as well")

    # -- parts of them -----------------------------------------------------------------------------------------------

    def _failure(self, bad: ServingConfig, folder: Path) -> Infeasible:
        """How ``bad`` fails: when it is launched, or (an engine that starts nothing) when it is measured."""
        try:
            server = self.engine().launch(bad, self.site(folder))
            try:
                server.measure(self.plan(folder, 1.0))
            finally:
                server.stop()
        except LaunchFailed as failure:
            return failure.outcome
        raise AssertionError("a configuration that cannot work was launched and measured")

    def site(self, folder: Path, cancel: threading.Event | None = None) -> Site:
        """A site in ``folder`` whose events go nowhere."""
        return Site(folder, self.gpus, cancel or threading.Event(), lambda _name, _data: None)

    def plan(self, folder: Path, load: float, name: str = "", cancel: threading.Event | None = None) -> StepPlan:
        """One step of the trace at ``load``."""
        slos = (Slo("ttft_p99", 60.0), Slo("error_rate", 0.0))
        records = folder / f"records-{name or format(load, 'g')}.parquet"
        return StepPlan(load, self.trace(), "w0", slos, records, seed=1, cancel=cancel or threading.Event())

    def _check_boot(self, server: Server) -> None:
        boot = server.boot
        _require(boot.total_s >= 0 and math.isfinite(boot.total_s), "boot.total_s is a time")
        within = sum(boot.phases_s.values()) <= boot.total_s * 1.01 + 0.1
        _require(within, f"the phases of the start-up add up to no more than it: {dict(boot.phases_s)}")
        _require((server.endpoint is not None) == self.over_http, "endpoint is None exactly where there is no HTTP")

    def _check_steps(self, server: Server, folder: Path) -> None:
        for load in (1.0, 2.0):
            plan = self.plan(folder, load)
            step = server.measure(plan)
            _require(step.load == load and step.window == "w0", "a step says which load and window it measured")
            wrong = [name for name, value in step.metrics.items() if not isinstance(value, float) or math.isnan(value)]
            _require(not wrong, f"metrics are floats, not {wrong}")
            _require(step.metrics.get("error_rate") == 0.0, f"no request failed, error_rate: {step.metrics}")
            _require(step.slo_misses == (), f"SLOs of a minute hold: {step.slo_misses}")
            if self.over_http:
                self._check_records(step, plan)

    def _check_records(self, step: Step, plan: StepPlan) -> None:
        from tuner.load.records import read
        from tuner.measure.metrics import metrics_from_records

        _require(plan.records.is_file() and step.records == plan.records.name, "the records are where the plan says")
        records = read(plan.records)
        wanted, came = plan.trace.output_tokens.tolist(), records.columns["output_tokens"]
        _require(len(records) == len(plan.trace), "there is one record per request")
        in_order = came[np.argsort(records.columns["request"])].tolist()
        _require(in_order == wanted, f"forced outputs have the trace's lengths: {in_order} for {wanted}")
        again, _ = metrics_from_records(plan.records, plan.slos, plan.quantiles)
        differ = [name for name, value in again.items() if step.metrics.get(name) != value]
        _require(not differ, f"metrics can be computed from the records alone, but not {differ}")

    def _check_cancelled_step(self, server: Server, folder: Path) -> None:
        cancel = threading.Event()
        plan = self.plan(folder, 0.02, "cancelled", cancel)
        timer = threading.Timer(1.0, cancel.set)
        timer.start()
        began = time.monotonic()
        try:
            server.measure(plan)
        except Cancelled:
            _require(time.monotonic() - began < 20, "a cancelled step ends at once")
            _require(plan.records.is_file(), "the records until then are written")
        else:
            raise AssertionError("measure() did not raise Cancelled though cancel was set")
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """No process of ours and no lease more afterwards than before."""
        import psutil

        from tuner.server.runtime import runtime_root

        def held() -> set[str]:
            root = runtime_root()
            return {str(path) for path in root.rglob("*") if path.is_file()} if root.exists() else set()

        me = psutil.Process()
        before, files = {child.pid for child in me.children(recursive=True)}, held()
        yield
        deadline = time.monotonic() + 5
        while (more := {c.pid for c in me.children(recursive=True)} - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        _require(not more, f"processes were left behind: {more}")
        mine = {path for path in held() - files if str(me.pid) in _text(path)}
        _require(not mine, f"leases were left behind: {mine}")


def run(conformance: type[EngineConformance]) -> int:
    """Runs every test of ``conformance`` and prints what came of it; returns how many failed."""
    failed = 0
    for name in [name for name in dir(conformance) if name.startswith("test_")]:
        words = name.removeprefix("test_").replace("_", " ")
        try:
            getattr(conformance(), name)()
        except unittest.SkipTest as reason:
            print(f"skipped  {words} ({reason})")
        except Exception as error:
            failed += 1
            print(f"FAILED   {words}: {type(error).__name__}: {error}")
        else:
            print(f"ok       {words}")
    return failed


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _endpoint(server: Server) -> Endpoint:
    if server.endpoint is None:
        raise AssertionError("the server has no endpoint")
    return server.endpoint


def _listens(server: Server) -> bool:
    address = urlsplit(_endpoint(server).url)
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address.hostname, address.port)) == 0


def _kill_listener(port: int) -> None:
    """SIGKILL to whichever of our descendants listens on ``port``."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in child.net_connections("tcp")):
                child.kill()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    from tuner.engines.function import load_target

    try:
        if len(sys.argv) != 2:
            raise UsageError("write python -m tuner.engines.conformance my_tests:TestMyEngine (docs/engines.md)")
        sys.exit(1 if run(load_target(sys.argv[1], Path.cwd())) else 0)  # type: ignore[arg-type]
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
