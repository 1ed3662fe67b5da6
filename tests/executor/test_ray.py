"""Trials on a Ray cluster: three nodes of this machine, each with two GPUs that are only declared."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.spec.conftest import workplace as workplace  # a folder with a model and a trace
from tuner.executor.cluster import nodes
from tuner.spec import studyfile
from tuner.study import session
from tuner.study.outcome import Aborted, Infeasible, Measured
from tuner.study.store import Store

ray = pytest.importorskip("ray", reason='no Ray here: pip install "tuner[ray]"')
pytestmark = pytest.mark.slow

FUNCTION = """\
name: s
model: my-org/my-model
engine: {kind: function, target: "evaluator:evaluate"}
hardware: {gpu: L4, gpus: 2}
search_space:
  name: s
  engine: function
  parameters:
    max_num_seqs: {flag: max-num-seqs, values: [8, 16, 32], default: 32, trades: a against b}
    gpus: {flag: tensor-parallel-size, values: [1, 2], default: 1, counts_gpus: true, trades: a against b}
objective: {name: x, latency: tpot_p99, slo: {ttft_p99: 500ms, tpot_p99: 50ms}}
price_usd_per_gpu_hour: 0.70
load: {ladder: [0.5, 1]}
budget: {launches: 20, verify_share: 0}
sampler: grid
executor: ray
"""
EVALUATOR = """\
import os, time
def evaluate(config, load):
    time.sleep(0.2)
    if config["max_num_seqs"] == 8:
        import tuner
        raise tuner.Infeasible("too few")
    return {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01 * load, "output_tokens_per_s": config["max_num_seqs"] * load}
"""
EMULATOR = """\
name: s
model: ./model
engine: {kind: emulator, options: {time_scale: 4, boot_scale: 0.2}, args: {max-model-len: 2048}}
hardware: {gpu: H100-SXM, gpus: 2}
search_space: vllm/quick
parameters: {kv_cache_dtype: auto, quantization: none}
objective: {name: x, latency: tpot_p90, slo: {ttft_p90: 60s, tpot_p90: 10s}, quality: {kl_max: null}}
trace: {file: trace.csv, window: 8s, max_output_tokens: 8}
load: {ladder: [0.5], warmup: 0}
budget: {launches: 8, verify_share: 0}
sampler: grid
executor: ray
"""


@dataclass
class Session:
    """One session of a study, as ``tuner tune`` runs it, in a thread of its own; interrupted after so many trials."""

    study: object
    interrupt_after: int = 0
    cancel: threading.Event = field(default_factory=threading.Event)
    events: list = field(default_factory=list)
    ended: str = ""
    finished: int = 0

    def __post_init__(self):
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        with session.opened(self.study) as store:
            ready = session.prepare(self.study)
            self.ended = session.search(ready, store, self, self.cancel, lambda n, d: self.events.append((n, d)))

    def trial_finished(self, number):
        self.finished += 1
        if self.finished == self.interrupt_after:
            self.cancel.set()

    def seen(self, name):
        return [data for event, data in self.events if event == name]

    def done(self, timeout_s=300):
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "the study did not end"
        return Store(Path(self.study.folder)).trials()


def begin(folder, text, **more):
    (folder / "evaluator.py").write_text(EVALUATOR)
    path = folder / "s.yaml"
    path.write_text(f"{text}reports: {folder / 'reports'}\n")
    return Session(studyfile.load(path), **more)


def servers(folder):
    """Emulated servers of this study that run, their guards left out."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "tuner.engines.emulator" in line and str(folder) in line and "guard" not in line:
            found.append(process)
    return found


def until(happens, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not (found := happens()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def test_every_configuration_is_tried_once_and_its_record_says_where(cluster, workplace):
    run = begin(workplace, FUNCTION)
    trials = run.done()
    assert run.ended == "every configuration of the space has been tried"
    assert sorted(Counter(t.config.hash for t in trials).values()) == [1] * 6
    assert {type(t.outcome) for t in trials} == {Measured, Infeasible}
    assert all((t.extra or {})["device"] == "L4" and (t.extra or {})["node"] for t in trials)
    assert len({t.extra["node"] for t in trials}) > 1
    assert all((t.folder / "outcome.json").exists() for t in trials)
    nodes = run.seen("nodes")[-1]["nodes"]
    assert [node["gpus"] for node in nodes if node["alive"]] == [2, 2, 2]
    assert {d["node"] for d in run.seen("launch")} == {t.extra["node"] for t in trials}


def test_an_interrupt_ends_the_trials_on_all_nodes_and_keeps_what_is_done(cluster, workplace):
    more = FUNCTION.replace("[8, 16, 32]", "[8, 16, 32, 64, 128]")
    run = begin(workplace, more, interrupt_after=2)
    trials = run.done()
    assert run.ended == "interrupted"
    kept = [t for t in trials if not isinstance(t.outcome, Aborted)]
    assert 2 <= len(kept) <= 8  # six GPUs
    again = begin(workplace, more)
    finished = [t for t in again.done() if not isinstance(t.outcome, Aborted)]
    assert sorted(Counter(t.config.hash for t in finished).values()) == [1] * 10


def test_a_worker_killed_hard_leaves_no_server_and_an_interrupt_stops_those_on_all_nodes(cluster, workplace):
    run = begin(workplace, EMULATOR.replace("[0.5]", "[0.005]"))  # seven minutes each
    server = until(lambda: len(servers(workplace)) > 2 and servers(workplace))[0]
    (worker,) = [parent for parent in server.parents() if "Seat" in parent.name() or "Seat" in parent.cmdline()[0]]
    worker.kill()
    until(lambda: not server.is_running())
    until(lambda: run.seen("lost"))
    assert "ended" in run.seen("lost")[0]["why"]
    until(lambda: servers(workplace))
    run.cancel.set()
    run.done(150)
    assert run.ended == "interrupted"
    until(lambda: not servers(workplace))


def test_a_node_that_dies_loses_no_trial_and_leaves_no_server(cluster, workplace):
    run = begin(workplace, EMULATOR)
    doomed = cluster.worker_nodes.copy().pop()
    name = next(node.name for node in nodes() if node.id == doomed.node_id)

    def measured_there():
        return {d["trial"] for d in run.seen("launch") if d["node"] == name} & {d["trial"] for d in run.seen("step")}

    until(measured_there)
    cluster.remove_node(doomed, allow_graceful=False)
    trials = run.done()
    lost = run.seen("lost")
    assert lost and all("is gone" in d["why"] or "ended" in d["why"] for d in lost)
    assert len(trials) == 8 and {type(t.outcome) for t in trials} == {Measured}
    assert max(Counter(t.config.hash for t in trials).values()) == 1
    assert all((t.folder / t.outcome.steps[0].records).exists() for t in trials)
    assert all(t.emulated for t in trials)
    until(lambda: not servers(workplace))
