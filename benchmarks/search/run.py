"""Runs searches on surfaces whose truth is known and writes one JSON line per run.

    python -m benchmarks.search.run --surfaces dense experts --methods ours tpe --models 30% none --seeds 0-19

A line: surface, method, ladder (or one load per launch), model, seed, ``regret`` after each launch (true values of what
was launched, against the true front of the whole grid, hypervolume in logarithms), ``gpu_s`` so far, ``crash``,
``seconds`` that each suggestion took, and what proposals of ours said: ``serves`` (the believed probability of no
crash), ``promised``, ``kept`` and ``expected_gain`` (:class:`tuner.search.ledger.Proposal`), null where nothing was.
Runs that are in the file already are not run again. The servers of ``dense:said`` and ``experts:said`` die with a
message for each cause, those of the others with one for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.surface import Surface
from tuner.search import choose, ledger
from tuner.study.outcome import Infeasible, Measured

SURFACES = ("dense", "experts", "abstract")
PEERS = ("random", "grid", "nsga2", "tpe", "gp")
SAID = ("serves", "promised", "kept", "expected_gain")  # what a proposal of ours says (None where it does not)
FREE_LIMIT = 400  # proposals that cost no launch (denied, repeated) before a run is given up


def search(surface: Surface, method: str, ladder: bool, model: str, seed: int, launches: int) -> dict[str, Any]:
    import optuna
    from optuna.distributions import IntDistribution

    rng = np.random.default_rng([seed, 11])
    space, objective = surface.space, surface.objective
    cost = None
    if method == "ours":
        from tuner.search.acquisition import LaunchCost

        cost = LaunchCost(surface.start_s, surface.step_s)
    sampler = choose.sampler(
        "auto" if method == "ours" else method,
        space,
        objective,
        surface.loads,
        predictor=surface.model(model, seed),
        seed=seed,
        cost=cost,
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions = space.distributions()
    if not ladder:
        distributions["load"] = IntDistribution(0, len(surface.loads) - 1)
    known: dict[tuple, Any] = {}
    curve: dict[str, list] = {"regret": [], "gpu_s": [], "crash": [], "seconds": []}
    curve |= {name: [] for name in SAID}
    reached: list[tuple[float, float]] = []
    gpu_s, free = 0.0, 0
    while len(curve["regret"]) < launches and free < FREE_LIMIT:
        started = time.perf_counter()
        trial = study.ask(distributions)
        asked_s = time.perf_counter() - started
        params = space.snap({k: v for k, v in trial.params.items() if k != "load"})
        trial.set_user_attr("params", params)
        loads = surface.loads if ladder else (surface.loads[trial.params["load"]],)
        key = (tuple(params.values()), loads)
        denied = space.denied(params)
        proposal = getattr(sampler, "proposal", lambda _n: None)(trial.number)
        if proposal is not None:
            ledger.note(trial, proposal)
            if proposal.remeasure_of is not None:  # a launch like any other
                known.pop(key, None)
        fresh = not denied and key not in known
        begun_s = gpu_s
        if denied:
            outcome, seconds = Infeasible("rule", denied, stage="before launch"), 0.0
        elif fresh:
            outcome, seconds = surface.launch(params, loads, rng)
            known[key] = outcome
        else:
            outcome, seconds = known[key], 0.0
        ledger.tell(
            study,
            trial,
            space,
            objective,
            outcome,
            started_s=begun_s + 1,
            ended_s=begun_s + 1 + seconds,
            free=not fresh,
        )
        if not fresh:
            free += 1
            continue
        gpu_s += seconds * surface.gpus(params)
        tried = {s.load for s in outcome.steps} if isinstance(outcome, Measured) else set()
        reached += [(c, lat) for load, c, lat in surface.points(params) if load in tried]
        curve["regret"].append(round(surface.regret(reached), 5))
        curve["gpu_s"].append(round(gpu_s))
        curve["crash"].append(int(isinstance(outcome, Infeasible)))
        for name in SAID:
            curve[name].append(getattr(proposal, name, None))
        curve["seconds"].append(round(asked_s, 3))
    return {
        "surface": surface.name,
        "method": method,
        "ladder": ladder,
        "model": model if method == "ours" else "",
        "seed": seed,
        **curve,
    }


def load_surface(name: str) -> Any:
    if name.startswith("silicon"):
        from benchmarks.search.silicon import surface

        return surface(int(name.partition(":")[2] or 0))
    if name.startswith("blind_"):
        from benchmarks.search.blind import Blind

        return Blind(name)
    if name.startswith("abstract:"):
        from benchmarks.search.abstract import surface as abstract

        return abstract(int(name.partition(":")[2]))
    module, _, said = name.partition(":")
    surface = importlib.import_module(f"benchmarks.search.{module}").surface()
    if said not in ("", "said"):
        raise ValueError(f"{module} has no variant {said!r}: only {module}:said")
    surface.name, surface.says = name, bool(said)
    return surface


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", nargs="+", default=list(SURFACES))
    parser.add_argument("--methods", nargs="+", default=["ours", *PEERS])
    parser.add_argument("--models", nargs="+", default=["30%", "badly", "none"])
    parser.add_argument("--seeds", default="0-19")
    parser.add_argument("--launches", type=int, default=60)
    parser.add_argument("--loads", nargs="+", choices=("ladder", "single"), default=["ladder", "single"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting runs after this long")
    args = parser.parse_args(words)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    low, _, high = args.seeds.partition("-")
    done = set()
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            row = json.loads(line)
            done.add((row["surface"], row["method"], row["ladder"], row["model"], row["seed"]))
    begun = time.monotonic()
    surfaces = {name: load_surface(name) for name in args.surfaces}
    for seed in range(int(low), int(high or low) + 1):
        for surface in surfaces.values():
            for method in args.methods:
                for ladder in [w == "ladder" for w in args.loads]:
                    if method == "ours" and not ladder:
                        continue
                    for model in args.models if method == "ours" else [""]:
                        if (surface.name, method, ladder, model, seed) in done:
                            continue
                        if time.monotonic() - begun > args.seconds:
                            print("time is up: run again to go on")
                            return
                        row = search(surface, method, ladder, model, seed, args.launches)
                        with args.out.open("a") as file:
                            file.write(json.dumps(row, separators=(",", ":")) + "\n")
    print("all runs are there")


if __name__ == "__main__":
    main()
