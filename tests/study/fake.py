"""An engine without processes: latency and throughput follow from the flags, and faults on request."""

import json
import threading
from dataclasses import dataclass, field

from tuner.engines.protocol import Cancelled, LaunchFailed, Teardown
from tuner.study.outcome import Boot, Infeasible, Step


@dataclass
class FakeServer:
    engine: "FakeEngine"
    config: object
    endpoint: object = None
    boot: Boot = field(default_factory=lambda: Boot(1.0, {"weights": 1.0}, {"kv_cache_tokens": 1000.0}))
    stopped: int = 0

    def measure(self, plan):
        if plan.cancel.is_set():
            raise Cancelled
        self.engine.measured.append((self.config.hash, plan.load))
        if self.engine.during:
            self.engine.during(self.config, plan)
        seqs = float(self.config.flags.get("max-num-seqs", 1024))
        capacity = 1.0 + 3.0 * (seqs / 1024) ** 0.3
        over = plan.load / capacity
        metrics = {s.key: s.limit * min(over, 3.0) * 0.99 for s in plan.slos if s.latency}
        metrics |= {"error_rate": 0.0, "output_tokens_per_s": 100 * plan.load}
        metrics["goodput_output_tokens_per_s"] = 100 * plan.load if over <= 1 else 1.0
        metrics |= self.engine.metrics
        misses = tuple(m for s in plan.slos if (m := s.miss(metrics)))
        plan.records.write_text(json.dumps(metrics))
        return Step(plan.load, plan.window, metrics, slo_misses=misses, records=plan.records.name)

    def stop(self):
        self.stopped += 1
        self.engine.alive.discard(id(self))
        return Teardown(0.1, left_over=self.engine.left_over)


@dataclass
class FakeEngine:
    kind: str = "vllm"
    emulated: bool = False
    known: frozenset | None = None
    launched: list = field(default_factory=list)
    measured: list = field(default_factory=list)
    alive: set = field(default_factory=set)
    most_alive: int = 0
    fail: object = None  # config -> Infeasible or None
    during: object = None
    left_over: tuple = ()
    metrics: dict = field(default_factory=dict)  # that its steps tell, too
    lock: threading.Lock = field(default_factory=threading.Lock)

    def version(self):
        return "0.0-fake"

    def flags(self):
        return self.known

    def launch(self, config, site):
        assert site.folder.is_absolute() and site.folder.is_dir()
        if site.cancel.is_set():
            raise Cancelled
        with self.lock:
            self.launched.append(config.hash)
        failure = self.fail(config) if self.fail else None
        if failure:
            raise LaunchFailed(failure)
        server = FakeServer(self, config)
        with self.lock:
            self.alive.add(id(server))
            self.most_alive = max(self.most_alive, len(self.alive))
        return server


def oom(_config):
    return Infeasible("oom-weights", "does not fit", "torch.OutOfMemoryError", short_bytes=2**30)
