"""What the executor costs: wall time against the ideal while a node dies, and overhead per trial, Ray beside local.

    python -m benchmarks.executor wall --seconds 20        # three Ray nodes of this machine, one killed in the middle
    python -m benchmarks.executor emulator                 # the same with the emulator's servers and a replayed trace
    python -m benchmarks.executor overhead                 # one GPU, trials that do nothing
    python -m benchmarks.executor.real                     # a real CPU vLLM through Ray, its exported YAML served

The nodes are processes of this machine, their GPUs only declared. With ``wall`` a trial is a function that sleeps, so
that what is measured is the executor's own time; with ``emulator`` all trials' servers and clients share this machine's
cores. The ideal is a schedule on the declared GPUs without any overhead, of trials as long as one alone (the sleep, or
the median of three launches one after the other without Ray), in which the dead node ended as many trials as it really
did (``ideal_s``), or dies at the same second (``by_clock_s``, :func:`by_clock`). The two differ by a whole round where
the node dies just before its trials end. Appends one line per run to
``benchmarks/executor/measured.jsonl``.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tuner.executor import cluster as executor
from tuner.spec import studyfile
from tuner.study import session
from tuner.study.outcome import Measured
from tuner.study.store import Store, TrialRecord

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STUDY = """\
name: executor
model: my-org/my-model
engine: {{kind: function, target: "work:evaluate"}}
hardware: {{gpu: L4, gpus: {gpus}}}
search_space:
  name: executor
  engine: function
  parameters:
    a: {{flag: a, values: [1, 2, 3, 4, 5, 6, 7, 8], default: 1, trades: nothing}}
    b: {{flag: b, values: [1, 2, 3, 4, 5], default: 1, trades: nothing}}
objective: {{name: x, latency: tpot_p99, slo: {{ttft_p99: 500ms, tpot_p99: 50ms}}}}
price_usd_per_gpu_hour: 0.70
load: {{ladder: [0.5, 1]}}
budget: {{launches: {launches}, verify_share: 0}}
sampler: grid
parallel: {parallel}
executor: {executor}
reports: {reports}
"""
WORK = """\
import time
def evaluate(config, load):
    time.sleep({seconds} / 2)
    return {{"ttft_p99_s": 0.1, "tpot_p99_s": 0.01 * load, "output_tokens_per_s": 100.0 * load + config["a"]}}
"""
EMULATED = f"""\
name: executor
model: {ROOT}/models/tiny-qwen3
engine: {{{{kind: emulator, options: {{{{time_scale: 1, boot_scale: 0.2}}}}, args: {{{{max-model-len: 1024}}}}}}}}
hardware: {{{{gpu: H100-SXM, gpus: {{gpus}}}}}}
search_space:
  name: executor
  engine: vllm
  parameters:
    seqs: {{{{flag: max-num-seqs, values: [128, 136, 144, 152, 160, 168, 176, 184], default: 128, trades: nothing}}}}
    tokens: {{{{flag: max-num-batched-tokens, values: [2048, 2304, 2560, 2816, 3072], default: 2048, trades: nothing}}}}
objective: {{{{name: x, latency: tpot_p90, slo: {{{{ttft_p90: 60s, tpot_p90: 10s}}}}, quality: {{{{kl_max: null}}}}}}}}
trace:
  file: {ROOT}/examples/traces/conversation-small.jsonl
  window: 30s
  heldout_windows: 1
  max_output_tokens: 16
load: {{{{ladder: [0.25], warmup: 0}}}}
budget: {{{{launches: {{launches}}, verify_share: 0}}}}
sampler: grid
parallel: {{parallel}}
executor: {{executor}}
reports: {{reports}}
"""
Event = tuple[float, str, Any]


class Search:
    """One session of a study of ``launches`` trials in a thread of its own; ``events`` with the time since its start.
    ``seconds`` is how long a trial sleeps; None: the emulator's servers."""

    def __init__(self, executor: str, seconds: float | None, gpus: int, parallel: str, launches: int = 40) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuner-executor-"))
        if seconds is not None:
            (self.folder / "work.py").write_text(WORK.format(seconds=seconds))
        given = {"executor": executor, "gpus": gpus, "parallel": parallel, "launches": launches}
        path = self.folder / "study.yaml"
        text = EMULATED if seconds is None else STUDY
        path.write_text(text.format(reports=self.folder / "reports", **given))
        self.study = studyfile.load(path)
        self.events: list[Event] = []
        self.wall_s = 0.0
        self.began_s = time.monotonic()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with session.opened(self.study) as store:
            ready = session.prepare(self.study)
            self.began_s = time.monotonic()
            session.search(ready, store, self, threading.Event(), self._hear)
            self.wall_s = time.monotonic() - self.began_s

    def _hear(self, name: str, data: Any) -> None:
        self.events.append((time.monotonic() - self.began_s, name, data))

    def trial_finished(self, number: int) -> None:
        """Nobody keeps the trials."""

    def seen(self, name: str) -> list[Event]:
        return [event for event in self.events if event[1] == name]

    def trials(self) -> Sequence[TrialRecord]:
        self.thread.join()
        return Store(Path(self.study.folder)).trials()


def ideal(trials: int, slots: int, seconds: float, dead_slots: int, ended_there: int) -> float:
    """The wall time without any overhead where the slots that died had ended so many trials."""
    return seconds * max(math.ceil((trials - ended_there) / (slots - dead_slots)), math.ceil(trials / slots))


def by_clock(trials: int, slots: int, seconds: float, killed_s: float = float("inf"), dead_slots: int = 0) -> float:
    """The wall time of a schedule without any overhead: ``dead_slots`` end at ``killed_s``, and what they ran begins
    again elsewhere."""
    free = [(0.0, slot) for slot in range(slots)]
    done_s, left = 0.0, trials
    while left:
        at_s, slot = heapq.heappop(free)
        if slot < dead_slots and at_s + seconds > killed_s:
            continue  # what it would run is still to be run
        heapq.heappush(free, (at_s + seconds, slot))
        done_s, left = max(done_s, at_s + seconds), left - 1
    return done_s


@contextmanager
def cluster_of(nodes: int, cpus: int, gpus: int) -> Iterator[Any]:
    """A Ray cluster on this machine, connected to; its workers are not nice, as on a machine of their own."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "num_gpus": gpus})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=cpus, num_gpus=gpus)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def alone_s() -> float:
    """How long a trial of the emulator takes without Ray and with nothing beside it: from one launch to the next."""
    trials = Search("local", None, 1, "1", launches=4).trials()
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(launched(trials)))


def launched(trials: Sequence[TrialRecord]) -> list[float]:
    """When each had its GPU, in order, Unix seconds."""
    return sorted(float((trial.extra or {})["launched_s"]) for trial in trials)


def processes(search: Search) -> int:
    """Servers and guards of this study that still run."""
    lines = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return sum("tuner-seat-" in line or str(search.folder) in line for line in lines)


def wall(given: float | None, nodes: int = 3, gpus: int = 2) -> dict[str, Any]:
    """40 trials of ``given`` seconds (None: the emulator's) on Ray nodes; one is killed when half of them are done."""
    seconds = alone_s() if given is None else given
    with cluster_of(nodes, gpus, gpus) as made:
        search = Search("ray", given, gpus, "auto")
        while len(search.seen("trial")) < 20 and search.thread.is_alive():
            time.sleep(0.1)
        time.sleep(seconds / 2)  # in the middle of a round: what the node has just ended or just begun decides little
        doomed = made.worker_nodes.copy().pop()
        name = next(node.name for node in executor.nodes() if node.id == doomed.node_id)
        made.remove_node(doomed, allow_graceful=False)
        killed_s = time.monotonic() - search.began_s
        trials = search.trials()
    left = processes(search)
    there = sum((trial.extra or {}).get("node") == name for trial in trials)
    least_s = ideal(len(trials), nodes * gpus, seconds, gpus, there)
    shutil.rmtree(search.folder)
    return {
        "seconds": round(seconds, 2),
        "processes_left": left,
        "trials": len(trials),
        "measured": sum(isinstance(trial.outcome, Measured) for trial in trials),
        "most_often": max(Counter(trial.config.hash for trial in trials).values()),
        "killed_s": round(killed_s, 1),
        "lost": len(search.seen("lost")),
        "on_the_dead_node": there,
        "first_launch_s": round(search.seen("launch")[0][0], 1),
        "wall_s": round(search.wall_s, 1),
        "ideal_s": round(least_s, 1),
        "over_ideal": round(search.wall_s / least_s - 1, 3),
        "by_clock_s": round(by_clock(len(trials), nodes * gpus, seconds, killed_s, gpus), 1),
    }


def overhead() -> dict[str, Any]:
    """Seconds from one trial's launch to the next one's on one GPU, where a trial does nothing."""
    found: dict[str, Any] = {}
    with cluster_of(1, 1, 1):
        for kind in ("local", "ray"):
            trials = Search(kind, 0.0, 1, "1").trials()
            steps = [later - earlier for earlier, later in itertools.pairwise(launched(trials))]
            found[kind] = {
                "trials": len(trials),
                "median_s": round(statistics.median(steps), 3),
                "p95_s": round(sorted(steps)[int(0.95 * len(steps))], 3),
                "max_s": round(max(steps), 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executor", description=__doc__)
    parser.add_argument("what", choices=("wall", "emulator", "overhead"))
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a trial of wall sleeps")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    kinds = {"wall": lambda: wall(given.seconds), "emulator": lambda: wall(None), "overhead": overhead}
    line = {"what": given.what, "load_before": round(load, 1), "cpus": os.cpu_count()} | kinds[given.what]()
    with (HERE / "measured.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
