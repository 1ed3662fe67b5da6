"""How well the search foresees what it has not launched: log densities of true latencies, capacities and costs.

    python -m benchmarks.search.foreseen --surfaces dense experts abstract --models 30% badly none --seeds 0-3

Searches differ by luck; this says in minutes whether a change of the beliefs is one for the better. The launches are
the same whatever the search would have launched: the default, then by turns a configuration drawn at random and the one
of :data:`CHOICE` whose capacity per GPU the model puts highest, as searches choose what they hope for. After 3, 6, 12
and 20 of them the sampler is asked about configurations that were not launched and serve: drawn at random, and the
best ones by the hypervolume that each has alone. A column is the mean log density (natural logarithms; of a capacity
the log probability of the step between two loads of the ladder; every value at least :data:`FLOOR`) over both and over
the four moments; ``off`` is the mean factor by which the believed latency was off.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from benchmarks.search.run import SURFACES, load_surface
from benchmarks.search.surface import Surface
from tuner.search import ledger
from tuner.search.acquisition import LaunchCost
from tuner.search.reading import read
from tuner.search.sampler import TunerSampler
from tuner.search.sources import QUANTITIES
from tuner.study.outcome import Outcome

MOMENTS = (3, 6, 12, 20)
CHOICE, ASKED, BEST, POOL = 60, 120, 40, 1500
BLUR = 0.03  # standard deviation added to every belief: a finer one wins nothing
FLOOR = -12.0

Launch = tuple[dict[str, Any], Outcome, float]


def launches(surface: Surface, sampler: TunerSampler, seed: int) -> list[Launch]:
    """(params, outcome, seconds) of the launches that everything is foreseen from."""
    rng, pool, made = np.random.default_rng([seed, 17]), sampler.candidates.params, []
    for n in range(MOMENTS[-1]):
        params = surface.space.snap(surface.space.default())
        if n:
            drawn = [pool[i] for i in rng.choice(len(pool), CHOICE if n % 2 else 1, replace=False)]
            params = max(drawn, key=lambda p: _hope(surface, sampler, p))
        made.append((dict(params), *surface.launch(params, surface.loads, rng)))
    return made


def _hope(surface: Surface, sampler: TunerSampler, params: Mapping[str, Any]) -> float:
    model: Any = sampler.predictor
    return model.capacity(surface.space.config(params, "")) / surface.gpus(params) if model else 0.0


def asked(surface: Surface, sampler: TunerSampler, made: Sequence[Launch]) -> list[tuple[int, list]]:
    """(candidate, its true points) of what serves and was not launched: some at random, and the best."""
    rng, pool = np.random.default_rng(5), sampler.candidates.params
    launched = [params for params, *_ in made]
    drawn = [int(i) for i in rng.permutation(len(pool))[:POOL] if pool[i] not in launched]
    serving = [(i, points) for i in drawn if (points := surface.points(pool[i]))]
    ranked = sorted(serving[ASKED:], key=lambda one: surface.regret([p[1:] for p in one[1]]))
    return serving[:ASKED] + ranked[:BEST]


def densities(surface: Surface, sampler: TunerSampler, of: Sequence[tuple[int, list]]) -> Iterator[tuple[str, float]]:
    """(quantity, log density) of every true value; "off": how far a latency was from what was believed."""
    post = sampler.beliefs.posterior([i for i, _ in of])
    ladder = [math.log(load) for load in surface.loads] + [math.inf]
    for row, (_, points) in enumerate(of):
        for load, cost, latency in {points[0], points[len(points) // 2], points[-1]}:
            at = surface.loads.index(load)
            yield "latency", _log_density(post.latency[row, at], post.latency_sd[row, at], math.log(latency))
            yield "cost", _log_density(post.cost[row, at], post.cost_sd[row, at], math.log(cost))
            yield "off", abs(float(post.latency[row, at]) - math.log(latency))
        last, sd = surface.loads.index(points[-1][0]), math.hypot(post.capacity_sd[row], BLUR)
        low, high = (ndtr((ladder[k] - post.capacity[row]) / sd) for k in (last, last + 1))
        yield "capacity", max(math.log(max(float(high - low), 1e-9)), FLOOR)


def _log_density(mean: float, sd: float, value: float) -> float:
    sd = math.hypot(sd, BLUR)
    return max(-0.5 * ((value - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi)), FLOOR)


def foreseen(surface: Surface, model: str, seed: int) -> list[tuple[str, float]]:
    """What one series of launches makes of the sampler's beliefs, at all moments."""
    import optuna

    def fresh() -> TunerSampler:
        predictor, cost = surface.model(model, seed), LaunchCost(surface.start_s, surface.step_s)
        return TunerSampler(surface.space, surface.objective, surface.loads, predictor, seed=seed, cost=cost)

    found: list[tuple[str, float]] = []
    made = launches(surface, fresh(), seed)
    for moment in MOMENTS:
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
        clock = 1.0
        for params, outcome, seconds in made[:moment]:
            study.enqueue_trial(params)
            trial, _ = ledger.ask(study, surface.space)
            ledger.tell(
                study, trial, surface.space, surface.objective, outcome, started_s=clock, ended_s=clock + seconds
            )
            clock += seconds
        study.sampler = sampler = fresh()
        ledger.ask(study, surface.space)
        if not sampler.beliefs.fitted:  # the first launches were not proposed from beliefs
            readings = [read(seen, surface.objective, surface.loads) for seen in ledger.read(study, surface.space)]
            if all(reading.capacity is None for reading in readings):
                continue
            sampler.beliefs.learn(readings, seed)
        found += densities(surface, sampler, asked(surface, sampler, made))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", nargs="+", default=list(SURFACES))
    parser.add_argument("--models", nargs="+", default=["30%", "badly", "none"])
    parser.add_argument("--seeds", default="0-3")
    args = parser.parse_args()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    low, _, high = args.seeds.partition("-")
    print(f"| surface | model | {' | '.join(QUANTITIES)} | sum | off |\n|---|---|---|---|---|---|---|")
    for name in args.surfaces:
        surface = load_surface(name)
        for model in args.models:
            values = [v for seed in range(int(low), int(high or low) + 1) for v in foreseen(surface, model, seed)]
            means = {q: float(np.mean([v for of, v in values if of == q])) for q in (*QUANTITIES, "off")}
            cells = [*(means[q] for q in QUANTITIES), sum(means[q] for q in QUANTITIES)]
            row = " | ".join(f"{cell:+.2f}" for cell in cells)
            print(f"| {name} | {model} | {row} | x{math.exp(means['off']):.2f} |", flush=True)


if __name__ == "__main__":
    main()
