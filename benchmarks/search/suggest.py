"""Seconds of one suggestion after so many trials: ours, on surface "dense" with a model that is wrong by 30 %.

    python -m benchmarks.search.suggest --trials 100 --asks 5

The trials are random launches, told to the study beforehand; the suggestions that follow are told too, so that each
one learns something new. Wall seconds depend on what else the machine does; processor seconds do not.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.search.run import load_surface
from tuner.search import choose, ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", default="dense")
    parser.add_argument("--model", default="30%")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--asks", type=int, default=5)
    args = parser.parse_args()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    surface, rng = load_surface(args.surface), np.random.default_rng(0)
    space, objective = surface.space, surface.objective
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    ours = choose.sampler("auto", space, objective, surface.loads, predictor=surface.model(args.model, 0))
    spent = []
    while len(study.trials) < args.trials + args.asks:
        if len(study.trials) == args.trials:
            study.sampler = ours
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        trial, params = ledger.ask(study, space)
        if study.sampler is ours:
            spent.append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
        outcome, seconds = surface.launch(params, surface.loads, rng)
        ledger.tell(study, trial, space, objective, outcome, started_s=1.0, ended_s=1.0 + seconds)
    wall, cpu = np.array(spent).T
    print(f"after {args.trials} trials, {args.asks} suggestions: wall {wall.max():.2f} s at most,")
    print(f"processor {cpu.max():.2f} s at most, {np.median(cpu):.2f} s in the median")


if __name__ == "__main__":
    main()
