"""Bar 4: of six flags two matter; does the ablation return those two?

    python -m benchmarks.verify.ablation [--studies 100]

The winner has all six on. ``two of six``: one makes the server 10 % faster, one 8 %. ``stand-ins``: two flags do the
same 10 %, and either is enough. ``none``: nothing matters. 48 launches at most, three held-out windows, the noise of
the other benchmarks.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Callable

from benchmarks.verify.machine import Machine, window
from benchmarks.verify.small_study import THROUGHPUT, study
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter, SearchSpace
from tuner.verify.ablation import Ablation, AblationBudget, ablate
from tuner.verify.arm import Finalist

FLAGS = tuple("abcdef")


def space() -> SearchSpace:
    """Six switches, off by default."""
    parameters = tuple(
        Parameter(name, (False, True), (Emission(), Emission({f"flag-{name}": None})), False) for name in FLAGS
    )
    return SearchSpace("flags", "function", parameters, facts={"platform": "cpu"})


def on(config: ServingConfig, name: str) -> bool:
    return f"flag-{name}" in config.flags


def two_of_six(config: ServingConfig) -> float:
    return (1.10 if on(config, "b") else 1.0) * (1.08 if on(config, "e") else 1.0)


def stand_ins(config: ServingConfig) -> float:
    return 1.10 if on(config, "b") or on(config, "e") else 1.0


def none(_config: ServingConfig) -> float:
    return 1.0


CASES: dict[str, tuple[Callable[[ServingConfig], float], set[frozenset[str]]]] = {
    "two of six": (two_of_six, {frozenset("be")}),
    "stand-ins": (stand_ins, {frozenset("b"), frozenset("e")}),
    "none": (none, {frozenset()}),
}


def run(speed: Callable[[ServingConfig], float], seed: int, launches: int = 48) -> Ablation:
    spec = dataclasses.replace(study(THROUGHPUT, ("v0",), seed, 100), space=space())
    machine = Machine(speed, spec.objective, seed)
    windows = [window(20_000 + 10 * seed + i, name=f"heldout-{i}") for i in range(3)]
    winner = Finalist("winner", spec.space.config(dict.fromkeys(FLAGS, True), spec.model), 3.0)
    return ablate(spec, machine.launch, winner, windows, AblationBudget(launches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3000)
    arguments = parser.parse_args()
    for name, (speed, right) in CASES.items():
        begun, kept, launches = time.monotonic(), collections.Counter(), 0
        for i in range(arguments.studies):
            found = run(speed, arguments.seed + i)
            kept["".join(sorted(found.params))] += 1
            launches += found.launches
        hits = sum(count for flags, count in kept.items() if frozenset(flags) in right)
        row = {"case": name, "studies": arguments.studies, "right": hits / arguments.studies, "kept": dict(kept)}
        row |= {"mean_launches": launches / arguments.studies, "seconds": round(time.monotonic() - begun)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
