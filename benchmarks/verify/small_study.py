"""A small study on the stochastic machine: a search over a few configurations, then verification, and the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import special

from benchmarks.verify.machine import Machine, Noise, window
from tuner.pareto.front import COST, Point, points
from tuner.space.space import Emission, Parameter, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse
from tuner.spec.study import Budget, EngineSpec, HardwareSpec, LoadSpec, Study, TraceSpec
from tuner.study.outcome import Measured, Step
from tuner.study.store import TrialRecord
from tuner.verify.capacity import capacity, cost_at
from tuner.verify.finalists import launch_spread, shortlist
from tuner.verify.racing import LAUNCH_SPREAD, log_error
from tuner.verify.verdict import Verification
from tuner.verify.verification import VerifyBudget, verify


@dataclass(frozen=True, slots=True)
class Scenario:
    """``throughput``: the SLO is loose, the server is saturated, cost follows speed. ``latency``: TTFT p99 limits the
    load, and cost follows the traffic of the window."""

    name: str
    slo: str
    ladder: tuple[float, ...]


THROUGHPUT = Scenario("throughput", "ttft_p99=3600s", (1.0, 3.0))
LATENCY = Scenario("latency", "ttft_p99=10s", (0.6, 0.75, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8))


@dataclass(frozen=True, slots=True)
class Result:
    """What one study said: the verification, and the search's apparent winner with its search-time interval."""

    verification: Verification
    apparent: str
    apparent_load: float
    apparent_interval: tuple[float, float]
    launches: int


def study(scenario: Scenario, variants: tuple[str, ...], seed: int, launches: int) -> Study:
    """Variant ``v0`` is the default."""
    emissions = tuple(Emission({"variant": v}) for v in variants)
    return Study(
        name=scenario.name,
        folder=".",
        source="",
        model="m",
        engine=EngineSpec("function"),
        hardware=HardwareSpec("cpu", 0),
        space=SearchSpace("s", "function", (Parameter("variant", variants, emissions, "v0"),)),
        objective=Objective("o", "ttft_p99", (parse(scenario.slo),), 2.5),
        trace=TraceSpec("t"),
        load=LoadSpec(scenario.ladder),
        budget=Budget(launches=launches),
        seed=seed,
    )


def run(
    speeds: Mapping[str, float],
    seed: int,
    scenario: Scenario = THROUGHPUT,
    *,
    launches: int = 60,
    share: float = 0.2,
    heldout: int = 3,
    noise: Noise = Noise(),  # noqa: B008 (frozen)
) -> Result:
    """Searches every variant once, repeats ties until the search's launches are spent, verifies."""
    spec = study(scenario, tuple(speeds), seed, launches)
    machine = Machine(lambda config: speeds[str(config.params["variant"])], spec.objective, seed, noise)
    searched = window(10_000 + 50 * seed, name="search-0")
    kept = [window(10_001 + 50 * seed + i, name=f"heldout-{i}") for i in range(heldout)]
    configs = {v: spec.space.config({"variant": v}, spec.model) for v in speeds}
    trials: list[TrialRecord] = []
    bests: dict[str, Point] = {}
    order = [*np.random.default_rng(seed).permutation(list(speeds))]
    while len(trials) < launches - round(launches * share):
        if order:
            variant = str(order.pop())
        else:
            again = _again(sorted(bests.values(), key=lambda p: p.cost))
            if again is None:
                break
            variant = str(again.config.params["variant"])
        trials.append(_trial(len(trials), variant, machine, spec, configs[variant], searched))
        mine = [p for p in points([t for t in trials if t.params["variant"] == variant], spec.objective) if p.ok]
        if mine:
            bests[variant] = min(mine, key=lambda p: p.cost)
        else:
            bests.pop(variant, None)
    listed = shortlist(trials, spec.objective, configs["v0"], scenario.ladder)
    budget = VerifyBudget(round(launches * share))
    found = verify(spec, machine.launch, listed.finalists, listed.baseline, kept, budget, known=launch_spread(trials))
    apparent = _apparent(trials)
    if apparent is None:
        return Result(found, "", 0.0, (0.0, 0.0), len(machine.labels))
    variant, step = apparent
    return Result(found, variant, step.load, step.intervals[COST], len(machine.labels))


def _trial(number, variant, machine, spec, config, searched) -> TrialRecord:
    steps: list[Step] = []
    with machine.launch(config, f"search {variant}") as rig:
        for load in spec.load.ladder:
            steps.append(rig.measure(load, searched, searched.name))
            if steps[-1].slo_misses:
                break
    outcome = Measured(tuple(steps))
    return TrialRecord(number, Path("."), config, outcome, config.params, 0.0, 0.0, baseline=variant == "v0")


def _again(
    points: Sequence[Point], *, spread: float = LAUNCH_SPREAD, confidence: float = 0.95, most: int = 4
) -> Point | None:
    """Which of ``points`` (each configuration's own best one) another launch teaches most: of the cheapest and those
    tied with it in cost the one with the fewest launches (at most ``most``), then the cheapest (a lucky best is what
    a repeat corrects). None where the best stands alone, or every tie has been measured often enough."""
    if len(points) < 2:
        return None
    cheapest = min(points, key=lambda p: (p.cost, p.latency))
    tied = [p for p in points if p is not cheapest and _equal(cheapest, p, "cost", spread) > 1 - confidence]
    open_points = [p for p in (cheapest, *tied) if len(p.trials) < most] if tied else []
    return min(open_points, key=lambda p: (len(p.trials), p.cost, p.trial), default=None)


def _equal(first: Point, second: Point, axis: str, spread: float) -> float:
    """Two-sided p-value of "equal", from the intervals and the launch spread (z test on the log ratio)."""
    error = math.hypot(*(log_error(point, axis, spread) for point in (first, second)))
    gap = abs(math.log(getattr(first, axis) / getattr(second, axis)))
    return float(2 * special.ndtr(-gap / error)) if error > 0 else float(gap == 0)


def _apparent(trials: list[TrialRecord]) -> tuple[str, Step] | None:
    """The single lowest cost of the search, as a study without verification would export it."""
    found = [(s.metrics[COST], t, s) for t in trials for s in t.outcome.steps if s.ok]  # type: ignore[union-attr]
    if not found:
        return None
    _, trial, step = min(found, key=lambda row: row[0])
    return str(trial.config.params["variant"]), step


@cache
def truth(speed: float, scenario: Scenario, load: float | None = None, repeats: int = 2000) -> float:
    """The true typical cost at ``load``, or (None) of every window at its own capacity: the geometric mean over
    launches, drift and windows by brute force, the capacity found by bisection instead of our brackets."""
    spec = study(scenario, ("v0",), 0, 1)
    slos, ladder = spec.objective.slos, scenario.ladder
    total = 0.0
    for i in range(repeats):
        machine = Machine(lambda _config: speed, spec.objective, 10_000_000 + i)
        trace = window(5_000_000 + i)
        with machine.launch(spec.space.config({}, "m"), "truth") as rig:
            if load is None:
                steps = [rig.measure(max(ladder), trace, "truth")]
                low, high = min(ladder) / 2, max(ladder)
                while steps[0].slo_misses and high / low > 1.01:
                    middle = math.sqrt(low * high)
                    steps.append(rig.measure(middle, trace, "truth"))
                    low, high = (low, middle) if steps[-1].slo_misses else (middle, high)
                cost = cost_at(steps, capacity(steps, slos))
            else:
                cost = rig.measure(load, trace, "truth").metrics[COST]
        total += math.log(cost)
    return math.exp(total / repeats)
