"""Surfaces of another make: written from the first paragraphs of a brief by somebody who had not seen the search, its
rules of thumb or the other surfaces (``blind_a``: vLLM on a node, by vLLM's own names; ``blind_b``: an engine with
invented names, a simulation of queues), and searched as a user's function is: no model, no GPU count, no rules.

    python -m benchmarks.search.run --surfaces blind_a:{0,1,2} blind_b:{0,1,2} --models none --methods ours tpe random

``blind_c`` (vLLM), ``blind_d`` (TensorRT-LLM), ``blind_e`` (SGLang), ``blind_g`` (all of these), ``blind_h`` to
``blind_j`` (LMDeploy, TGI, llama.cpp and launchers of somebody's own, too) bring a model along, which its author made
wrong (``--models 30% badly``), as a user's own model is brought. ``blind_f`` to ``blind_j`` have six scenarios, each
with a space of its own. What a surface is like:

    python -m benchmarks.search.blind blind_c:0 blind_d:2

``blind_a:0:short`` is the first scenario of ``blind_a`` under names that users make up (``max_seqs``, ``kv_dtype``),
``blind_a:0:anon`` under names that say nothing (``p0``, ``p1``; crashes say what they say).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import tuner
from benchmarks.search.surface import parameter
from tuner.pareto.volume import hypervolume
from tuner.search.ledger import COST_KEY
from tuner.search.scan import nondominated
from tuner.space.space import Parameter, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse
from tuner.study.outcome import Boot, Infeasible, Measured, Outcome, Step
from tuner.study.ownmodel import OwnModel

SHORT = {
    "tensor_parallel_size": "tp",
    "data_parallel_size": "dp",
    "max_num_seqs": "max_seqs",
    "max_num_batched_tokens": "max_batch_tokens",
    "gpu_memory_utilization": "gpu_mem_util",
    "quantization": "quant",
    "kv_cache_dtype": "kv_dtype",
    "num_speculative_tokens": "spec_len",
    "enable_prefix_caching": "prefix_cache",
    "block_size": "block",
    "enforce_eager": "eager",
}


class Blind:
    """What :func:`benchmarks.search.run.search` needs of a surface; ``name``: module and scenario, as ``blind_a:0``.
    ``lucky``: each configuration's lasting luck is of the truth (:mod:`benchmarks.search.luck`)."""

    start_s, step_s = 90.0, 60.0

    def __init__(self, name: str, *, lucky: bool = False) -> None:
        module, scenario, *short = name.split(":")
        self.name, self.scenario = name, int(scenario)
        source: Any = importlib.import_module(f"benchmarks.search.{module}")
        self.source: Any = source.scenario(self.scenario) if hasattr(source, "scenario") else source
        default = self.source.default(self.scenario)
        if short not in ([], ["short"], ["anon"]):
            raise ValueError(f"{name} is no surface: {module}:{scenario} is, and with :short or :anon after it")
        values: dict[str, Sequence[Any]] = self.source.space()
        called = {"short": lambda k, n: SHORT.get(n, n), "anon": lambda k, n: f"p{k}"}.get("".join(short))
        self._names = {called(k, n) if called else n: n for k, n in enumerate(values)}  # shown -> the source's
        made = tuple(_parameter(shown, values[n], default[n]) for shown, n in self._names.items())
        self.space = SearchSpace(self.name, "function", made)
        slos = tuple(parse(f"{key[:-2]}={limit * 1e3:g}ms") for key, limit in self.source.slos(self.scenario).items())
        self.objective = Objective("blind", "tpot_p99", slos, 2.0)
        self.loads = tuple(self.source.LOADS)
        runs, self._cost, self._latency, ok = self.source.truth_grid(
            self.scenario, **({"lucky": True} if lucky else {})
        )
        self._holds = np.logical_and.accumulate(ok, axis=1) & runs[:, None]
        points = np.column_stack([self._cost[self._holds], self._latency[self._holds]])
        self._worst = (float(points[:, 0].max()), float(points[:, 1].max()))
        front = [(float(cost), float(latency)) for cost, latency in nondominated(points)]
        self._whole = hypervolume(front, self._worst, log=True)

    def model(self, kind: str, seed: int) -> OwnModel | None:
        """The model that came with the surface, wrong by ``kind``; None for ``none``."""
        if kind in ("none", ""):
            return None
        if not hasattr(self.source, "predictor"):
            raise SystemExit(f"{self.name} brought no model along: --models none")
        foresee: Any = self.source.predictor(self.scenario, kind, seed)

        @functools.wraps(foresee)
        def theirs(params: Mapping[str, Any], load: float, **constants: float) -> Mapping[str, float]:
            return foresee(self._theirs(params), load, **constants)

        return OwnModel.over(theirs, f"{self.name}:{kind}", self.objective, self.loads[0])

    def points(self, params: Mapping[str, Any]) -> list[tuple[float, float, float]]:
        return self.at(self.source.grid_index(self._theirs(params)))

    def at(self, i: int) -> list[tuple[float, float, float]]:
        """The points of the configuration at this place of the grid."""
        return [
            (load, float(self._cost[i, k]), float(self._latency[i, k]))
            for k, load in enumerate(self.loads)
            if self._holds[i, k]
        ]

    def regret(self, points: Sequence[tuple[float, float]]) -> float:
        return 1 - hypervolume(points, self._worst, log=True) / self._whole

    def gpus(self, params: Mapping[str, Any]) -> int:
        return 1

    def launch(
        self, params: Mapping[str, Any], loads: Sequence[float], rng: np.random.Generator
    ) -> tuple[Outcome, float]:
        theirs = self._theirs(params)
        start_s = float(self.source.launch_s(theirs, self.scenario))
        steps = []
        for load in loads:
            try:
                metrics = dict(self.source.measure(dict(theirs), load, self.scenario, rng))
            except tuner.Infeasible as error:
                return Infeasible("engine-died", str(error)), 0.6 * start_s
            misses = tuple(text for slo in self.objective.slos if (text := slo.miss(metrics)))
            steps.append(Step(load, "w", metrics, slo_misses=misses))
            if misses:
                break
        return Measured(tuple(steps), Boot(start_s)), start_s + self.step_s * len(steps)

    def _theirs(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {self._names[shown]: value for shown, value in params.items()}


def sheet(surface: Blind, seed: int = 0, count: int = 300) -> list[str]:
    """What a surface is like, in lines: what runs and keeps the SLOs, its front, how its models rank configurations
    that run, and how far measurements lie from its truth."""
    from scipy.stats import spearmanr

    source, scenario, rng = surface.source, surface.scenario, np.random.default_rng(seed)
    runs, cost, latency, _ = source.truth_grid(scenario)
    front = nondominated(np.column_stack([cost[surface._holds], latency[surface._holds]]))
    span = front.max(0) / front.min(0)
    within = surface._holds[runs].mean(0)
    lines = [
        f"{surface.name}: {len(runs)} configurations, {1 - runs.mean():.1%} do not run; of the others keep the SLOs, "
        f"load by load: {', '.join(f'{share:.1%}' for share in within)}",
        f"  front: {len(front)} points, cost x {span[0]:.1f}, latency x {span[1]:.1f}",
    ]
    values, middle = list(source.space().values()), len(surface.loads) // 2
    rows = rng.choice(np.flatnonzero(runs & np.isfinite(latency[:, middle])), count, replace=False)
    places = np.column_stack(np.unravel_index(rows, [len(v) for v in values]))
    many = [dict(zip(source.space(), (v[k] for v, k in zip(values, of, strict=True)), strict=True)) for of in places]
    for kind in ("right", "30%", "badly") if hasattr(source, "predictor") else ():
        predict, told = source.predictor(scenario, kind, seed), {}
        for row, params in zip(rows, many, strict=True):
            with contextlib.suppress(tuner.Infeasible):
                told[row] = predict(params, surface.loads[middle])
        ranks = [
            spearmanr([m[key] for m in told.values()], truth[list(told), middle])[0]
            for key, truth in ((surface.objective.latency_key, latency), (COST_KEY, cost))
        ]
        refused = f"refuses {1 - len(told) / count:.1%}"
        lines.append(f"  model, {kind}: rank correlation of latency {ranks[0]:.2f}, of cost {ranks[1]:.2f}; {refused}")
    measured = [source.measure(params, surface.loads[middle], scenario, rng) for params in many]
    off = np.log([m[surface.objective.latency_key] for m in measured] / latency[rows, middle])
    lines.append(f"  measured latency off by {off.mean():+.3f} +- {off.std():.3f} log units")
    return lines


def _parameter(name: str, values: Sequence[Any], default: Any) -> Parameter:
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return parameter(name, *values, default=default, numeric=numeric, log=numeric and min(values) > 0)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print("\n".join(sheet(Blind(word))))
