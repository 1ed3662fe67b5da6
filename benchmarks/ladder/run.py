"""What a ladder that grows is worth: whole studies on the emulator's virtual clock.

    nice python -m benchmarks.ladder.run --seeds 0 1          # one to three minutes per study; goes on where it ended
    python -m benchmarks.ladder.run --seeds                   # the table of all lines of 24 launches

A study is made once as it ships, and once with a ladder that ends at 2.8 times what the default holds. Each appends
a line to ``benchmarks/ladder/grown.jsonl``: the ladder, the highest load that the search measured (``reached``), what
is recommended, and what search and verification took (launches, load steps, GPU-hours of the emulated start-ups and
windows). ``truth`` is the cost of what is recommended at the highest load that it holds (to 3 %), ``holds``, by an
emulator without noise on traffic that no study saw: geometric means over its windows, since on each of them one long
prompt may decide. The same line comes out again, but for those of 30 November: an emulated launch's noise depended on
where its model lay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tuner.executor.build import executor
from tuner.executor.protocol import Job
from tuner.load import synth, tracefile
from tuner.load.arrivals import Arrivals
from tuner.load.trace import Trace
from tuner.pareto.recommend import recommended
from tuner.spec import studyfile
from tuner.spec.study import GROWS, Study
from tuner.spec.text import Document
from tuner.study import ladder, session, verifying
from tuner.study.evaluate import Bench
from tuner.study.price import COST
from tuner.study.store import Store

HERE = Path(__file__).parent
SHAPES = HERE.parents[1] / "tests/search/shapes"
MEASURED = HERE / "grown.jsonl"
TRACE_S, RPS, LAUNCHES = 1800.0, 5.0, 24  # traffic with the lengths of Azure's conversations
QUIET = {"launch": 0.0, "step": 0.0, "stalls_per_s": 0.0, "stall_s": 0.0}
TOOK = ("launches", "steps", "gpu_hours")
STEP, NEAR = 1.3, 1.03  # how the truth looks for a capacity: by steps of, to within


@dataclass(frozen=True, slots=True)
class Case:
    """A model on hardware, under a space."""

    model: str
    gpu: str
    gpus: int
    space: str


CASES = {
    "27b-1": Case("gemma-3-27b", "H100-SXM", 1, "vllm/quick"),
    "27b-4": Case("gemma-3-27b", "H100-SXM", 4, "vllm/multi-gpu"),
    "8b-1": Case("llama-3.1-8b", "L40S", 1, "vllm/quick"),
    "8b-2": Case("qwen3-8b", "A100-SXM-80GB", 2, "vllm/multi-gpu"),
    "70b-8": Case("llama-3.3-70b", "H100-SXM", 8, "vllm/multi-gpu"),
}


def study(
    case: Case,
    seed: int,
    folder: Path,
    name: str = "tuned",
    noise: Mapping[str, float] | None = None,
    launches: int = LAUNCHES,
    seconds: float = TRACE_S,
) -> Study:
    """The study of ``case`` in ``folder``, where its model and its trace of ``seconds`` are made; each ``seed`` has its
    own traffic."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    shutil.copy(SHAPES / f"{case.model}.json", folder / "model/config.json")
    like = replace(synth.profile("azure-conversation"), arrivals=Arrivals(RPS))
    tracefile.write(synth.synthesise(like, duration_s=seconds, seed=seed), folder / f"{seed}.parquet")
    options: dict[str, Any] = {"clock": "virtual"} | ({"noise": dict(noise)} if noise else {})
    said = {
        "name": name,
        "reports": str(folder),
        "model": str(folder / "model"),
        "engine": {"kind": "emulator", "options": options},
        "hardware": {"gpu": case.gpu, "gpus": case.gpus},
        "search_space": case.space,
        "trace": {"file": str(folder / f"{seed}.parquet")},
        "objective": "chat",
        "budget": launches,
        "parallel": 1,
        "seed": seed,
    }
    return studyfile.resolve(Document("benchmark", said), folder)


def tuned(asked: Study) -> dict[str, Any]:
    """What ``tuner tune`` does with it, MLflow and the report left out; what it took, and what it recommends."""
    cancel, nobody = threading.Event(), verifying.Nobody()
    with session.opened(asked) as store:
        settled = ladder.settled(asked, store, cancel, _deaf)
        ready = session.prepare(settled)
        ladder.as_trial(ready, store, nobody, _deaf)
        ended = session.search(ready, store, nobody, cancel, _deaf)
        bench = Bench(settled, ready.engine, cancel, _deaf, session.guard(ready, store, _deaf))
        verifying.run(ready, store, nobody, bench)
        choice, paid = recommended(store, settled), store.launched("search", "verify")
    steps = [len(trial.outcome.steps) for trial in paid]
    hours = [
        trial.config.gpus * (trial.outcome.boot.total_s + count * settled.trace.window_s) / 3600
        for trial, count in zip(paid, steps, strict=True)
    ]
    reached = max(step.load for trial in paid if trial.role == "search" for step in trial.outcome.steps)
    said = {"ladder": settled.load.ladder, "reached": reached, "ended": ended}
    said |= {"launches": len(paid), "steps": sum(steps)}
    point = choice.point
    found = {"params": dict(point.config.params), "load": point.load, "cost": point.cost} if point else {}
    return said | {"gpu_hours": round(sum(hours), 3)} | found


def truth(asked: Study, params: Mapping[str, Any]) -> tuple[float, float]:
    """(The highest load at which ``params`` hold on a held-out window of ``asked``, their cost there): geometric means
    over the windows; (0, nan) where they hold none on one of them."""
    asked = replace(asked, load=replace(asked.load, ladder=(ladder.LOWEST, ladder.HIGHEST)))
    ready = session.prepare(asked)
    config = asked.space.config(asked.space.snap(dict(params)), asked.model)
    folder = Store(Path(asked.folder)).start_trial(0, config, config.params)
    with executor(Bench(asked, ready.engine, threading.Event(), _deaf)) as where:
        with where.rig(Job(0, config, folder, None)) as rig:

            def cost(load: float, window: Trace) -> float:
                """nan where an SLO is missed."""
                step = rig.measure(load, window, window.name)
                return step.metrics[COST] if step.ok else math.nan

            found = [highest(partial(cost, window=window)) for window in ready.traffic.heldout]
    loads, costs = zip(*found, strict=True)
    return (geometric_mean(loads), geometric_mean(costs)) if all(loads) else (0.0, math.nan)


def highest(cost: Callable[[float], float], load: float = 1.0) -> tuple[float, float]:
    """(The highest load at which there is a ``cost``, to :data:`NEAR`, and this); (0, nan) where there is none."""
    low, high, least = 0.0, math.inf, math.nan
    while ladder.LOWEST < load < ladder.HIGHEST and not (low and high / low < NEAR):
        if math.isnan(found := cost(load)):
            high = load
        else:
            low, least = load, found
        load = low * STEP if high == math.inf else high / STEP if not low else math.sqrt(low * high)
    return low, least


def _deaf(_name: str, _data: Mapping[str, Any]) -> None:
    """Nobody looks."""


def line(name: str, seed: int, grows: bool, launches: int, folder: Path) -> dict[str, Any]:
    """One study and its truth."""
    asked = study(CASES[name], seed, folder, launches=launches)
    made = tuned(asked if grows else studyfile.by(asked.rules - {GROWS}, asked))
    said = {"case": name, "seed": seed, "grows": grows, "budget": launches} | made
    if "params" not in made:
        return said
    asked = study(CASES[name], 1000 + seed, folder, "truth", QUIET)
    holds, cost = truth(asked, made["params"])
    default_holds, default_cost = truth(replace(asked, folder=f"{asked.folder}-default"), asked.space.default())
    return said | {"holds": holds, "truth": cost, "default_holds": default_holds, "default_truth": default_cost}


def table(lines: list[dict[str, Any]]) -> None:
    """Of every case and seed the two studies beside each other: ends / grows."""
    print("| case | seed | highest load | truth, USD/M | launches | load steps | GPU-hours | the default's truth |")
    print("|" + "---|" * 8)
    arms = {(row["case"], row["seed"], row["grows"]): row for row in lines}
    ratios = []
    for name, seed, grows in sorted(arms):
        if not grows or (name, seed, False) not in arms:
            continue
        pair = arms[name, seed, False], arms[name, seed, True]
        cells = [
            _beside(row["reached"] for row in pair),
            _beside(row.get("truth", math.nan) for row in pair),
            *(_beside(row[key] for row in pair) for key in TOOK),
            f"{pair[1].get('default_truth', math.nan):.3g}",
        ]
        print(f"| {name} | {seed} | {' | '.join(cells)} |")
        ratios.append([pair[1].get(key, math.nan) / pair[0].get(key, math.nan) for key in ("truth", *TOOK)])
    means = map(geometric_mean, zip(*ratios, strict=True))
    print("Grows over ends (geometric means):", ", ".join(f"{mean:.3f}" for mean in means))


def _beside(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--arms", nargs="+", choices=["grows", "ends"], default=["grows", "ends"])
    parser.add_argument("--out", type=Path, default=MEASURED)
    args = parser.parse_args()
    lines = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["case"], row["seed"], row["grows"], row["budget"]) for row in lines}
    for seed, name, arm in itertools.product(args.seeds, args.cases, args.arms):
        grows = arm == "grows"
        if (name, seed, grows, args.launches) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(name, seed, grows, args.launches, Path(folder)))
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + os.linesep)
    table([row for row in lines if row["budget"] == args.launches])


if __name__ == "__main__":
    main()
