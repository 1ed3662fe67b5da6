"""A search problem whose truth is known: a space, an objective, a ladder, physics, and the cost of a launch.

``Physics`` is a function of arrays: given one array of values per parameter and one load it answers with arrays of
metrics, so that the true front of a whole grid is computed at once. Regret is measured against it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuner.pareto.volume import hypervolume
from tuner.search.ledger import COST_KEY
from tuner.search.prediction import Prediction
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter, SearchSpace
from tuner.spec.objective import Objective
from tuner.study.outcome import Boot, Infeasible, Measured, Outcome, Step

Columns = Mapping[str, np.ndarray]
# (columns, load, constants, effects) -> metrics; "short_bytes" > 0: does not fit; "crash_p": crashes otherwise, and
# "cause": of which of the surface's ``messages``
NO_METRIC = ("short_bytes", "crash_p", "cause", "kv_tokens")
Physics = Callable[[Columns, Any, Mapping[str, float], bool], dict[str, np.ndarray]]


def parameter(name: str, *values: Any, default: Any, **more: Any) -> Parameter:
    flags = tuple(Emission({name.replace("_", "-"): v}) for v in values)
    return Parameter(name, values, flags, default, **more)


def numeric(name: str, *values: Any, default: Any, **more: Any) -> Parameter:
    return parameter(name, *values, default=default, numeric=True, log=True, **more)


@dataclass
class Surface:
    """``constants`` are the truth's; a wrong model gets others. ``noise`` is the relative noise of one measurement,
    ``grain`` the part of the error that a configuration keeps however often it is measured. Neither is of the truth
    that regret is counted in: a grid of 100 000 draws of luck has winners that nobody finds but by trying them all, and
    the best ten configurations of the physics alone would have a regret of .05 against them."""

    name: str
    space: SearchSpace
    objective: Objective
    loads: tuple[float, ...]
    physics: Physics
    constants: Mapping[str, float]
    noise: float = 0.05
    grain: float = 0.04
    start_s: float = 120.0
    step_s: float = 40.0
    exact: frozenset[str] = frozenset()  # constants that a data sheet states, known to every model
    messages: tuple[str, ...] = ()
    says: bool = False  # whether a server that dies says of what, as engines do; else all say the same
    _truth: dict[tuple, list[tuple[float, float, float]]] = field(default_factory=dict)
    _front: list[tuple[float, float]] = field(default_factory=list)
    _worst: tuple[float, float] = (0.0, 0.0)

    def metrics(self, rows: Sequence[Mapping[str, Any]], load: float) -> dict[str, np.ndarray]:
        """Noise-free truth of some configurations at one load."""
        return self.physics(columns_of(self.space, rows), load, self.constants, True)

    def lasting(self, rows: Sequence[Mapping[str, Any]], load: float) -> dict[str, np.ndarray]:
        """What infinitely many measurements of one configuration would average to: the truth and its grain."""
        found = self.metrics(rows, load)
        luck = np.array([_grain(row, self.space, self.grain) for row in rows])
        for key in [k for k in found if k.endswith("_s") and not k.startswith("output")]:
            found[key] = found[key] * luck
        found[COST_KEY] = found[COST_KEY] * luck**0.3
        return found

    def points(self, params: Mapping[str, Any]) -> list[tuple[float, float, float]]:
        """True (load, cost, latency) of a configuration at the loads where every SLO truly holds, from low to high up
        to the first miss; empty where it does not serve."""
        return self._points([params])[0]

    def _points(self, rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[float, float, float]]]:
        out: list[list[tuple[float, float, float]]] = [[] for _ in rows]
        alive = np.ones(len(rows), bool)
        for load in self.loads:
            m = self.metrics(rows, load)
            alive &= (m["short_bytes"] <= 0) & (m["crash_p"] < 0.5)
            for slo in self.objective.slos:
                alive &= m[slo.key] <= slo.limit
            cost, latency = m[COST_KEY], m[self.objective.latency_key]
            for i in np.nonzero(alive)[0]:
                out[i].append((load, float(cost[i]), float(latency[i])))
        return out

    def true_front(self) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        """The whole grid's non-dominated points, and the reference point: the worst cost and the worst latency that a
        configuration within SLO has anywhere on the grid."""
        if not self._front:
            everything, worst = [], (0.0, 0.0)
            for chunk in _chunks(self._grid(), 20_000):
                pts = [p[1:] for of in self._points(chunk) for p in of]
                everything = _nondominated(everything + pts)
                worst = (max([worst[0], *(p[0] for p in pts)]), max([worst[1], *(p[1] for p in pts)]))
            self._front, self._worst = everything, worst
        return self._front, self._worst

    def _grid(self):
        """Every configuration; conditional parameters at their default where they do not apply (fast path)."""
        for values in itertools.product(*(p.values for p in self.space.parameters)):
            row = dict(zip((p.name for p in self.space.parameters), values, strict=True))
            off = [p for p in self.space.parameters if p.when and not _holds(p.when, row)]
            if any(row[p.name] != p.values[0] for p in off):
                continue
            row |= {p.name: p.default for p in off}
            if not self.space.rules or not self.space.denied(row):
                yield row

    def regret(self, points: Sequence[tuple[float, float]]) -> float:
        front, reference = self.true_front()
        return 1 - hypervolume(points, reference, log=True) / hypervolume(front, reference, log=True)

    def launch(
        self, params: Mapping[str, Any], loads: Sequence[float], rng: np.random.Generator
    ) -> tuple[Outcome, float]:
        """One launch over ``loads`` up to the first miss: the outcome, and the seconds it held its GPUs."""
        first = self.metrics([params], loads[0])
        if first["short_bytes"][0] > 0:
            short = int(first["short_bytes"][0])
            return Infeasible("oom-kv", "out of memory", short_bytes=short), 0.6 * self.start_s
        if rng.random() < first["crash_p"][0]:
            message = self.messages[int(first["cause"][0])] if self.says else "the engine died"
            return Infeasible("engine-died", message), 0.5 * self.start_s
        steps = []
        for load in loads:
            m = self.lasting([params], load)
            shared = math.exp(rng.normal(0, self.noise * 0.7))
            values = {}
            for key in m:
                if key in NO_METRIC:
                    continue
                own = math.exp(rng.normal(0, self.noise * 0.7)) * shared
                values[key] = float(m[key][0]) * (own**0.2 if key == COST_KEY else own)
            misses = tuple(text for slo in self.objective.slos if (text := slo.miss(values)))
            steps.append(Step(load, "search-0", values, slo_misses=misses))
            if misses:
                break
        facts = {"kv_cache_tokens": float(first["kv_tokens"][0])} if "kv_tokens" in first else {}
        return Measured(tuple(steps), Boot(self.start_s, {}, facts)), self.start_s + self.step_s * len(steps)

    def model(self, kind: str, seed: int) -> WrongModel | None:
        """``30%``: every constant off by 30 %, up or down. ``badly``: off by 60 %, speculation halved, and a random
        log-sd of .35 for every parameter level, on latency and on capacity. ``none``: no model. ``right``: the
        constants right."""
        if kind in ("none", ""):
            return None
        rng = np.random.default_rng([seed, 99])
        off = {"30%": 0.3, "badly": 0.6, "right": 0.0}[kind]
        low = 1 - off if off < 0.5 else 1 / (1 + off)
        constants = {
            k: v if k in self.exact else v * (1 + off if rng.random() < 0.5 else low) for k, v in self.constants.items()
        }
        noise = {}
        if kind == "badly":
            if "accept" in constants:
                constants["accept"] *= 0.5
            for p in self.space.parameters:
                for v in p.values:
                    noise[p.name, v] = (rng.normal(0, 0.35), rng.normal(0, 0.35))
        return WrongModel(self, constants, noise)

    def gpus(self, params: Mapping[str, Any]) -> int:
        return max(self.space.config(params, "m").gpus, 1)


@dataclass
class WrongModel:
    """The surface's own physics with wrong constants and none of its hidden effects, as an analytic model."""

    surface: Surface
    constants: Mapping[str, float]
    level_noise: Mapping[tuple[str, Any], tuple[float, float]] = field(default_factory=dict)
    cache: dict[tuple, list[Prediction]] = field(default_factory=dict)

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        key = tuple(config.params.items())
        if key not in self.cache:
            self.cache = {key: self._ladder(config)}  # asked load by load: one look at the physics for all of them
        return self.cache[key][self.surface.loads.index(load)]

    def _ladder(self, config: ServingConfig) -> list[Prediction]:
        loads = np.array(self.surface.loads)
        columns = columns_of(self.surface.space, [self.surface.space.snap(config.params)] * len(loads))
        off = [sum(self.level_noise.get(i, (0.0, 0.0))[axis] for i in config.params.items()) for axis in (0, 1)]
        m = self.surface.physics(columns, loads * math.exp(off[1]), self.constants, False)
        found = []
        for i in range(len(loads)):
            if m["short_bytes"][i] > 0:
                found.append(Prediction(False, {}, 0.0, "out of memory", int(m["short_bytes"][i])))
                continue
            metrics = {k: float(v[i]) for k, v in m.items() if k not in NO_METRIC}
            for k in metrics:
                if k.endswith("_s") and not k.startswith("output"):
                    metrics[k] *= math.exp(off[0])
            metrics[COST_KEY] *= math.exp(off[1])
            found.append(Prediction(True, metrics, float(m["kv_tokens"][i]) if "kv_tokens" in m else 0.0))
        return found

    def doubts(self) -> dict[str, float]:
        """Every constant that no data sheet states may be off by a third."""
        return {name: 0.35 for name in self.constants if name not in self.surface.exact}

    def scaled(self, factors: Mapping[str, float]) -> WrongModel:
        constants = {name: value * factors.get(name, 1.0) for name, value in self.constants.items()}
        return WrongModel(self.surface, constants, self.level_noise)

    def capacity(self, config: ServingConfig) -> float:
        best = 0.0
        for load in self.surface.loads:
            found = self.predict(config, load)
            if not found.fits or any(s.miss(found.metrics) for s in self.surface.objective.slos):
                break
            best = load
        return best


def crashes(size: int, *conditions: tuple[np.ndarray, float]) -> dict[str, np.ndarray]:
    """``crash_p`` and ``cause`` of so many configurations: of the last of these (where, probability) that holds."""
    p, cause = np.zeros(size), np.zeros(size, int)
    for number, (where, probability) in enumerate(conditions):
        p, cause = np.where(where, probability, p), np.where(where, number, cause)
    return {"crash_p": p, "cause": cause}


def columns_of(space: SearchSpace, rows: Sequence[Mapping[str, Any]]) -> Columns:
    return {p.name: np.array([row[p.name] for row in rows]) for p in space.parameters}


def _grain(row: Mapping[str, Any], space: SearchSpace, sd: float) -> float:
    """A lasting, unexplainable factor of one configuration: log-normal, from a hash of its values."""
    if not sd:
        return 1.0
    digest = hashlib.blake2b(repr([row[p.name] for p in space.parameters]).encode(), digest_size=8).digest()
    u = int.from_bytes(digest[:4], "little") / 2**32
    v = int.from_bytes(digest[4:], "little") / 2**32
    normal = math.sqrt(-2 * math.log(max(u, 1e-12))) * math.cos(2 * math.pi * v)
    return math.exp(sd * min(max(normal, -2), 2))


def _holds(when: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    for name, wanted in when.items():
        if isinstance(wanted, Mapping):
            if "ne" in wanted and row[name] == wanted["ne"]:
                return False
        elif row[name] != wanted:
            return False
    return True


def _nondominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    best, kept = math.inf, []
    for p in sorted(points):
        if p[1] < best:
            kept.append(p)
            best = p[1]
    return kept


def _chunks(items, size: int):
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
