"""How near the promised latency is to the truth at the promised load.

    python -m benchmarks.verify.promised --studies 60

A finalist that is 30 % faster than the default is verified with six launches on three held-out windows of the
stochastic machine, TTFT p99 being limit and axis at once. What the verdict says of TTFT p99 at the load to deploy at is
held against 40 replays of each window at that load.
"""

from __future__ import annotations

import argparse
import math
from contextlib import contextmanager

import numpy as np

from benchmarks.verify.machine import Machine, Noise, replay, window
from benchmarks.verify.small_study import LATENCY, study
from tuner.verify.arm import Finalist
from tuner.verify.verification import VerifyBudget, verify

SPEEDS = {"v0": 1.0, "v1": 1.3}


def promised(seed: int) -> tuple[float, bool, int]:
    """(log of promised over true latency, whether the interval holds the truth, steps measured) of one study."""
    windows = [window(70 + i, name=f"heldout-{i}") for i in range(3)]
    spec = study(LATENCY, tuple(SPEEDS), seed, 60)
    machine = Machine(lambda config: SPEEDS[str(config.params["variant"])], spec.objective, seed)
    steps = []

    @contextmanager
    def launch(config, label):
        with machine.launch(config, label) as server:
            measure = server.measure

            class Rig:
                def measure(self, load, trace, name):
                    steps.append(measure(load, trace, name))
                    return steps[-1]

            yield Rig()

    arms = [Finalist(v, spec.space.config({"variant": v}, "m"), 3.0 * s, baseline=v == "v0") for v, s in SPEEDS.items()]
    found = verify(spec, launch, arms[1:], arms[0], windows, VerifyBudget(6)).chosen
    assert found is not None and found.load > 0, "the machine holds its SLO at some load"
    noise, others = Noise(), Machine(lambda _config: 1.0, spec.objective, 1000 + seed)
    truth = []
    for trace in windows:
        for _ in range(40):
            luck = math.exp(others.rng.normal(0, math.hypot(noise.launch, noise.drift)))
            step = replay(trace, found.load, SPEEDS[found.label] * luck, others, trace.name)
            truth.append(math.log(step.metrics["ttft_p99_s"]))
    true = float(np.mean(truth))
    middle, low, high = map(math.log, found.latency)
    return middle - true, low <= true <= high, len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=60)
    off, held, steps = np.array([promised(seed) for seed in range(parser.parse_args().studies)], float).T
    print(
        f"{len(off)} studies: promised over true latency {math.exp(off.mean()):.3f} (sd of the log {off.std():.3f}), "
        f"truth within the interval in {held.mean():.0%}, {steps.mean():.1f} steps"
    )


if __name__ == "__main__":
    main()
