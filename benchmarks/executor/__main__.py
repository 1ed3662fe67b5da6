"""What the executor costs: wall time against the ideal while a node dies, and overhead per trial, Ray beside local.

    python -m benchmarks.executor wall --seconds 20        # three Ray nodes of this machine, one killed in the middle
    python -m benchmarks.executor overhead                 # one GPU, trials that do nothing

The nodes are processes of this machine, their GPUs only declared; a trial is a function that sleeps, so that what is
measured is the executor's own time. Appends one line per run to ``benchmarks/executor/measured.jsonl``.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.executor import cluster as executor
from tuner.spec import studyfile
from tuner.study import session
from tuner.study.outcome import Measured
from tuner.study.store import Store, TrialRecord

HERE = Path(__file__).parent
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
budget: {{launches: 40, verify_share: 0}}
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
Event = tuple[float, str, Any]


class Search:
    """One session of a study of 40 trials in a thread of its own; ``events`` with the time since its start."""

    def __init__(self, executor: str, seconds: float, gpus: int, parallel: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuner-executor-"))
        (self.folder / "work.py").write_text(WORK.format(seconds=seconds))
        path = self.folder / "study.yaml"
        path.write_text(STUDY.format(executor=executor, gpus=gpus, parallel=parallel, reports=self.folder / "reports"))
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


def ideal_s(trials: int, slots: int, seconds: float, killed_s: float = float("inf"), dead_slots: int = 0) -> float:
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
def cluster_of(nodes: int, gpus: int) -> Iterator[Any]:
    """A Ray cluster on this machine, connected to."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": gpus, "num_gpus": gpus})
    try:
        for _ in range(nodes - 1):
            made.add_node(num_cpus=gpus, num_gpus=gpus)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def wall(seconds: float, nodes: int = 3, gpus: int = 2) -> dict[str, Any]:
    """40 trials on ``nodes`` Ray nodes; one is killed when half of them are done."""
    with cluster_of(nodes, gpus) as made:
        search = Search("ray", seconds, gpus, "auto")
        while len(search.seen("trial")) < 20 and search.thread.is_alive():
            time.sleep(0.1)
        doomed = made.worker_nodes.copy().pop()
        name = next(node.name for node in executor.nodes() if node.id == doomed.node_id)
        made.remove_node(doomed, allow_graceful=False)
        killed_s = time.monotonic() - search.began_s
        trials = search.trials()
    ideal = ideal_s(len(trials), nodes * gpus, seconds, killed_s, gpus)
    return {
        "trials": len(trials),
        "measured": sum(isinstance(trial.outcome, Measured) for trial in trials),
        "most_often": max(Counter(trial.config.hash for trial in trials).values()),
        "killed_s": round(killed_s, 1),
        "lost": len(search.seen("lost")),
        "on_the_dead_node": sum((trial.extra or {}).get("node") == name for trial in trials),
        "first_launch_s": round(search.seen("launch")[0][0], 1),
        "wall_s": round(search.wall_s, 1),
        "ideal_s": round(ideal, 1),
        "over_ideal": round(search.wall_s / ideal - 1, 3),
    }


def overhead() -> dict[str, Any]:
    """Seconds from one trial's launch to the next one's on one GPU, where a trial does nothing."""
    found: dict[str, Any] = {}
    with cluster_of(1, 1):
        for kind in ("local", "ray"):
            trials = Search(kind, 0.0, 1, "1").trials()
            begins = sorted(float((trial.extra or {})["launched_s"]) for trial in trials)
            steps = [later - earlier for earlier, later in itertools.pairwise(begins)]
            found[kind] = {
                "trials": len(trials),
                "median_s": round(statistics.median(steps), 3),
                "p95_s": round(sorted(steps)[int(0.95 * len(steps))], 3),
                "max_s": round(max(steps), 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executor", description=__doc__)
    parser.add_argument("what", choices=("wall", "overhead"))
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a trial takes")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    result = wall(given.seconds) if given.what == "wall" else overhead()
    line = {
        "what": given.what,
        "seconds": given.seconds,
        "load_before": round(load, 1),
        "cpus": os.cpu_count(),
    } | result
    with (HERE / "measured.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
