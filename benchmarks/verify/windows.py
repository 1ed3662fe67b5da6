"""Windows or launches: what verification says of known pairs by how many held-out windows and rounds it has.

    nice python -m benchmarks.verify.windows --out FILE     # twenty minutes on one core; goes on where it ended

Each pair, the engine's default and one change of it, is launched six times on twelve held-out windows: emulator with
its usual noise, virtual clock, traffic with the lengths of Azure's conversations, a TTFT p99 of 500 ms and a TPOT p99
of 50 ms. Of these, so many windows and rounds are drawn 200 times and judged as verification judges them. ``minutes``
is what the launches of both take, start-up and a minute per load step; ``proven`` the share that is called cheaper,
``recommended`` the share in which the change is recommended, proven or by what can be promised of it; ``promised`` the
load that can be promised of it over what it holds by all launches (median).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.ladder.run import Case, study
from tuner.executor.build import executor
from tuner.space.config import ServingConfig
from tuner.study import session, verifying
from tuner.study.evaluate import Bench
from tuner.verify.arm import Finalist, Launched
from tuner.verify.judge import Judgement, judge
from tuner.verify.rounds import Rounds

TRACE_S = 10_800.0
WINDOWS, ROUNDS, DRAWS = 12, 6, 200
LADDER = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
TRIED = ((3, 2), (3, 4), (4, 3), (5, 2), (5, 3), (5, 4), (6, 2), (6, 3))  # windows, rounds
GEMMA = Case("gemma-3-27b", "H100-SXM", 1, "vllm/quick")
LLAMA = Case("llama-3.1-8b", "H100-SXM", 1, "vllm/quick")
SMALL = Case("llama-3.1-8b", "L40S", 1, "vllm/quick")
PAIRS = {
    "llama-3.1-8b, H100, fp8": (LLAMA, {"quantization": "fp8"}),
    "llama-3.1-8b, L40S, fp8": (SMALL, {"quantization": "fp8"}),
    "gemma-3-27b, H100, fp8": (GEMMA, {"quantization": "fp8"}),
    "llama-3.1-8b, L40S, fp8 KV cache": (SMALL, {"kv_cache_dtype": "fp8"}),
    "llama-3.1-8b, H100, 2,048 batched tokens": (LLAMA, {"max_num_batched_tokens": 2048}),
    "gemma-3-27b, H100, 512 sequences": (GEMMA, {"max_num_seqs": 512}),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """All launches of a pair, its SLOs and the key of its latency, and what a launch takes to start."""

    launches: Sequence[Launched]
    slos: Any
    key: str
    start_s: float


def measured(case: Case, change: dict[str, Any], seed: int) -> Measured:
    """Launches both ``ROUNDS`` times on ``WINDOWS`` windows."""
    with tempfile.TemporaryDirectory() as folder:
        asked = study(case, seed, Path(folder), seconds=TRACE_S)
        trace = replace(asked.trace, heldout_windows=WINDOWS)
        asked = replace(asked, trace=trace, load=replace(asked.load, ladder=LADDER, auto=False))
        usual = asked.space.default()
        arms = _arms(*(asked.space.config(asked.space.snap({**usual, **more}), asked.model) for more in ({}, change)))
        with session.opened(asked) as store:
            ready = session.prepare(asked)
            with executor(Bench(asked, ready.engine, threading.Event(), _deaf)) as where:
                launch = verifying.launcher(ready, store, verifying.Nobody(), where, _deaf, "verify")
                rounds = Rounds(asked, launch, ready.traffic.heldout, _deaf, {}, 2 * ROUNDS)
                for _ in range(ROUNDS):
                    rounds.play(arms)
            starts = [trial.outcome.boot.total_s for trial in store.trials()]
        return Measured(rounds.launches, asked.objective.slos, asked.objective.latency_key, fmean(starts))


def judged(of: Measured, launches: Sequence[Launched]) -> Judgement:
    """Some of the launches, as verification judges them."""
    return judge(_arms(*[ServingConfig("m", {}, {})] * 2), launches, of.slos, of.key, explain=False)


def _arms(default: ServingConfig, other: ServingConfig) -> list[Finalist]:
    return [Finalist("default", default, 1.0, baseline=True), Finalist("other", other, 1.0, trial=1)]


def drawn(of: Measured, windows: int, rounds: int) -> dict[str, float]:
    """What :data:`DRAWS` verifications with so many windows and rounds say."""
    rng = np.random.default_rng([windows, rounds])
    names = sorted({step.window for launch in of.launches for step in launch.steps})
    minutes, reasons, loads = [], [], []
    holds = judged(of, of.launches).arms["other"].capacity[0]
    for _ in range(DRAWS):
        some = set(rng.choice(names, windows, replace=False))
        order = {int(number): i + 1 for i, number in enumerate(rng.choice(ROUNDS, rounds, replace=False) + 1)}
        launches = [
            replace(x, round=order[x.round], steps=tuple(s for s in x.steps if s.window in some))
            for x in of.launches
            if x.round in order
        ]
        found = judged(of, sorted(launches, key=lambda x: x.round))
        minutes.append(sum(of.start_s + 60 * len(x.steps) for x in launches) / 60)
        reasons.append(found.reason if found.choice == "other" else "")
        loads.append(found.arms["other"].load / holds)
    proven = fmean(reason == "cheaper" for reason in reasons)
    said = {"minutes": fmean(minutes), "proven": proven, "recommended": fmean(map(bool, reasons))}
    return said | {"promised": float(np.nanmedian(loads))}


def _deaf(_name: str, _data: Any) -> None:
    """Nobody looks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    known = {(row["pair"], row["seed"]) for row in map(json.loads, lines)}
    for seed in args.seeds:
        for name, (case, change) in PAIRS.items():
            if (name, seed) in known:
                continue
            of = measured(case, change, seed)
            told = {f"{w} x {r}": drawn(of, w, r) for w, r in TRIED}
            gain = judged(of, of.launches).arms["other"].difference
            row = {"pair": name, "seed": seed, "cost": gain, **told}
            print(json.dumps(row), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
