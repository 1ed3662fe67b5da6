"""What the search believes of every candidate: cost and latency at every load, the capacity, whether it works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.search.candidates import Candidates, correlations
from tuner.search.foresight import Foresight, Source, columns
from tuner.search.reading import Reading
from tuner.search.surrogate import Array, Codes, Prior, Rows, Surrogate, fit
from tuner.search.warmstart import Earlier
from tuner.space.config import Value

QUANTITIES = ("capacity", "cost", "latency")
# with a model the residual is small; without one the whole effect of a parameter has to be learnt
WITH_MODEL = Prior(single=0.006, pair=0.01, own=0.001, common=0.5)
WITHOUT = Prior(single=0.04, pair=0.04, own=0.002, common=0.5)
MODEL_WRONG = 0.4  # share of an effect that the model may have wrong: large effects leave large residuals
COST = Prior(constant=0.1, load=0.02, single=0.002, pair=0.002, own=0.001, noise=0.0004, spread=1.6)
# a crash may be the configuration's own (``own``): two of them condemn no value that they share. These variances and
# WORKS_DOUBT were chosen by the log-likelihood of launches held out (docs/search.md)
WORKS = Prior(
    constant=0.15, load=1e-6, single=0.08, pair=0.3, own=0.3, noise=0.03, spread=1.0, common=0.5, noise_spread=0.5
)
WORKS_AT_FIRST = 0.8  # prior mean of "works" (1: it served, -1: it did not)
WORKS_DOUBT = 0.5  # standard deviation added to that of "works" where it becomes a probability
MISS_NOISE = 0.01  # variance added to a step that missed an SLO: its server was overloaded
CENTRE_ON = 400  # candidates over which prior means are centred


@dataclass(frozen=True, slots=True)
class Posterior:
    """Beliefs of some candidates: means and standard deviations in logarithms, (candidates, loads) for cost and
    latency, (candidates,) for the capacity; ``works`` is the probability that the server serves."""

    cost: Array
    cost_sd: Array
    latency: Array
    latency_sd: Array
    capacity: Array
    capacity_sd: Array
    works: Array
    gpus: Array


@dataclass(slots=True)
class Beliefs:
    """Learns from readings; ``variances`` of the last fit are where the next one starts."""

    candidates: Candidates
    foresight: Foresight
    earlier: Sequence[Earlier] = ()
    tables: list[Array] = field(default_factory=list)
    centres: dict[str, Array] = field(default_factory=dict)
    fitted: dict[str, Surrogate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = correlations(self.candidates.space)

    @property
    def noise_sd(self) -> float:
        """Noise of one measured latency, in logarithms; believed .04 before anything was measured."""
        return self.fitted["latency"].noise_sd if "latency" in self.fitted else 0.04

    def learn(self, readings: Sequence[Reading], seed: int) -> None:
        """Fits every quantity to the launches so far."""
        known = [r for r in readings if r.seen.outcome is not None and self.index(r.seen.params) is not None]
        self.foresight.look()
        for name in QUANTITIES:  # the capacity first: the others are seen by how much of it a load takes
            rows, sources = self._rows(name, known)
            last = self.fitted.get(name)
            start = None if last is None or last.variances.shape != (len(self.tables) + 5,) else last.variances
            self.fitted[name] = fit(
                self.tables,
                rows,
                COST if name == "cost" else WITH_MODEL if self.foresight.predictor or self.earlier else WITHOUT,
                mean=self._mean(name, rows, sources),
                prior_weights=[s.weight for s in sources],
                weight_sd=[s.weight_sd for s in sources],
                more=MODEL_WRONG**2 * self._effects(name),
                start=start,
                seed=seed,
            )
        rows, sources = self._rows("works", known)
        weights, sds = [s.weight for s in sources], [s.weight_sd for s in sources]
        self.fitted["works"] = fit(
            self.tables, rows, WORKS, mean=WORKS_AT_FIRST, prior_weights=weights, weight_sd=sds, seed=seed
        )

    def posterior(self, indices: Sequence[int], *, spread: bool = True) -> Posterior:
        """What is believed of these candidates; without ``spread`` (cheap) only the means are."""
        self.foresight.look()
        codes = self.candidates.codes(indices)
        found: dict[str, tuple[Array, Array]] = {}
        for name in (*QUANTITIES, "works"):
            places = self._places(name, indices, found.get("capacity"))
            sources = columns(self._sources(name, indices), places.shape[1], len(indices))
            found[name] = self.fitted[name].predict(codes, places, sources, spread=spread)
        works, works_sd = found["works"][0][:, 0], found["works"][1][:, 0]
        odds = works / np.sqrt(works_sd**2 + WORKS_DOUBT**2)
        return Posterior(
            *found["cost"],
            *found["latency"],
            found["capacity"][0][:, 0],
            found["capacity"][1][:, 0],
            _normal_cdf(odds),
            self.foresight.gpus[np.array(indices, dtype=np.int64)],
        )

    def believe(self, indices: Sequence[int]) -> None:
        """Takes pending launches into account: what is believed of them is treated as if it had been measured, so that
        nothing like them is launched beside them."""
        for name in QUANTITIES:
            surrogate = self.fitted[name]
            places = self._places(name, indices)
            n = places.shape[1]
            sources = columns(self._sources(name, indices), n, len(indices))
            codes = self.candidates.codes(indices)
            mean, _ = surrogate.predict(codes, places, sources)
            rows = Rows(
                np.repeat(codes, n, axis=0),
                places.ravel(),
                mean.ravel(),
                sources.reshape(-1, sources.shape[2]),
                np.zeros(mean.size),
            )
            self.fitted[name] = surrogate.with_rows(surrogate.rows.plus(rows))

    def _places(self, name: str, indices: Sequence[int], capacity: tuple[Array, Array] | None = None) -> Array:
        """Where the ladder's loads lie for these candidates (candidates, loads): the share of the believed capacity
        that they take, since what a queue adds depends on that and not on the load itself."""
        if name not in ("cost", "latency"):
            return np.zeros((len(indices), 1))
        if capacity is None:
            sources = columns(self._sources("capacity", indices), 1, len(indices))
            codes = self.candidates.codes(indices)
            capacity = self.fitted["capacity"].predict(codes, np.zeros((len(indices), 1)), sources, spread=False)
        return np.minimum(np.array(self.foresight.loads)[None, :] / np.exp(capacity[0]), 1.2)

    def weights(self) -> dict[str, dict[str, float]]:
        """The weight of every source (the model, earlier studies) for every quantity, after what was measured."""
        found = {}
        for name in QUANTITIES:
            if name in self.fitted:
                names = [s.name for s in self._sources(name, [])]
                found[name] = dict(zip(names, self.fitted[name].weights.tolist(), strict=True))
        return found

    def _mean(self, name: str, rows: Rows, sources: Sequence[Source]) -> float | None:
        """With a model, its own level; without, the level of what was measured."""
        if not self.foresight.predictor:
            if len(rows.y):
                return None
            return {"cost": 0.0, "latency": -3.0, "capacity": math.log(self.foresight.loads[-1])}[name]
        return float(self._centre(name)[0]) if name != "cost" else float(self._centre("model cost")[0])

    def _rows(self, name: str, known: Sequence[Reading]) -> tuple[Rows, list[Source]]:
        """The launches' values of one quantity, with the sources at the same places."""
        points: list[tuple[int, int, float, float, float]] = []  # candidate, place in the ladder, use, value, noise
        numbered = [(index, r) for r in known if (index := self.index(r.seen.params)) is not None]
        use = self._places(name, [index for index, _ in numbered])
        for i, (index, r) in enumerate(numbered):
            if name == "capacity" and r.capacity is not None:
                points.append((index, 0, 0.0, r.capacity, r.capacity_sd**2))
            elif name == "works" and r.works is not None:
                points.append((index, 0, 0.0, r.works, 0.0))
            elif name in ("cost", "latency"):
                for place, cost, latency in r.steps:
                    value = cost if name == "cost" else latency
                    points.append((index, place, float(use[i, place]), value, 0.0 if place in r.good else MISS_NOISE))
        indices = sorted({p[0] for p in points})
        sources = self._sources(name, indices)
        at = {index: row for row, index in enumerate(indices)}
        values = np.array([[s.values[at[p[0]], p[1]] for s in sources] for p in points])
        _, _, use, y, extra = np.array(points, float).reshape(-1, 5).T
        codes = self.candidates.codes([p[0] for p in points])
        return Rows(codes, use, y, values.reshape(len(points), len(sources)), extra), sources

    def index(self, params: Mapping[str, Value]) -> int | None:
        """The candidate's number of a configuration, which becomes one if it was none (None: a rule denies it)."""
        key = self.candidates.key(params)
        if key not in self.candidates.index:
            self.candidates.add([params])
        return self.candidates.index.get(key)

    def _sources(self, name: str, indices: Sequence[int]) -> list[Source]:
        """The prior means of one quantity at these candidates, centred so that a weight changes the shape alone."""
        found: list[Source] = []
        at = np.array(indices, dtype=np.int64)
        modelled = self.foresight.predictor is not None
        if name == "cost":
            found.append(Source("price x GPUs / load", self._structure(at), 1.0, 0.2))
            if modelled:
                found.append(Source("model", self._modelled("model cost", at), 1.0, 0.4))
        elif modelled:
            weight, sd = (0.0, 0.3) if name == "works" else (1.0, 0.4)
            found.append(Source("model", self._modelled(name, at), weight, sd))
        elif name != "works":
            width = len(self.foresight.loads) if name == "latency" else 1
            weight = -0.4 if name == "latency" else 0.7
            found.append(
                Source(
                    "number of GPUs", np.repeat(np.log(self.foresight.gpus[at])[:, None], width, axis=1), weight, 0.3
                )
            )
        for study in self.earlier if name in QUANTITIES else ():
            values = study.values(name, self.candidates.codes(indices), len(self.foresight.loads))
            found.append(Source(study.name, values, 0.0 if modelled else 0.7 / len(self.earlier), 0.4))
        return found

    def _structure(self, at: Codes) -> Array:
        return np.log(self.foresight.gpus[at])[:, None] - np.log(np.array(self.foresight.loads))[None, :]

    def _modelled(self, kind: str, at: Codes) -> Array:
        """The model's values (candidates, loads), the centre taken off; refused ones lie at the centre."""
        raw, centre = self._raw(kind, at), self._centre(kind)
        return np.where(np.isfinite(raw), raw - centre, 0.0)

    def _raw(self, kind: str, at: Codes) -> Array:
        if kind == "latency":
            return self.foresight.latency[at]
        if kind == "model cost":
            return self.foresight.cost[at] - self._structure(at)
        return (self.foresight.capacity if kind == "capacity" else self.foresight.kv_tokens)[at][:, None]

    def _effects(self, name: str) -> Array:
        """Variance between the values of each parameter in the model's predictions, in squared log units."""
        key = f"effects on {name}"
        if key not in self.centres:
            found = np.zeros(len(self.tables))
            if self.foresight.predictor is not None:
                some = np.arange(min(CENTRE_ON, len(self.candidates.params)))
                raw = self._raw("model cost" if name == "cost" else name, some).mean(1)
                some = some[np.isfinite(raw)]
                codes, raw = self.candidates.codes(some.tolist()), raw[np.isfinite(raw)]
                for j in range(len(self.tables)):
                    levels = [raw[codes[:, j] == c].mean() for c in np.unique(codes[:, j]) if c >= 0]
                    found[j] = np.var(levels) if levels else 0.0
            self.centres[key] = found
        return self.centres[key]

    def _centre(self, kind: str) -> Array:
        if kind not in self.centres:
            raw = self._raw(kind, np.arange(min(CENTRE_ON, len(self.candidates.params))))
            self.centres[kind] = np.array([np.nanmean(raw) if np.isfinite(raw).any() else 0.0])
        return self.centres[kind]


def _normal_cdf(x: Array) -> Array:
    from scipy.special import ndtr

    return ndtr(x)
