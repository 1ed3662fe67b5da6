"""What the search believes of every candidate: cost and latency at every load, the capacity, whether it works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tuner.search.candidates import Candidates, correlations
from tuner.search.causes import Causes
from tuner.search.foresight import Foresight, Source, columns
from tuner.search.reading import Reading
from tuner.search.sources import JUDGED, QUANTITIES, Sources
from tuner.search.surrogate import Array, Prior, Rows, Surrogate, fit
from tuner.space.config import Value

# with a model the residual is small; without one the whole effect of a parameter has to be learnt
WITH_MODEL = Prior(single=0.006, pair=0.01, own=0.001, common=1.0)
WITHOUT = Prior(single=0.04, pair=0.04, own=0.002, common=0.5)
MODEL_WRONG = 0.7  # share of an effect that the model may have wrong: large effects leave large residuals
COST = Prior(constant=0.1, load=0.02, single=0.002, pair=0.002, own=0.001, noise=0.0004, spread=1.6)
# of the margin of memory, in quarters of 4 GiB; ROOM_DOUBT is added to its standard deviation
ROOM = Prior(
    constant=0.15, load=1e-6, single=0.08, pair=0.3, own=0.3, noise=0.03, spread=1.0, common=0.5, noise_spread=0.5
)
ROOM_AT_FIRST, ROOM_DOUBT = 1.0, 0.5
MISS_NOISE = 0.01  # variance added to a step that missed an SLO: its server was overloaded
FOLLOWED = 10  # launches; what a model leaves out is not seen where it is followed, so more may be wrong afterwards
JUDGES = 16  # launches that say whether the model is believed
MOST_ROWS = 1500  # steps that are learnt from, about: time grows with their third power


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
    sources: Sources
    tables: list[Array] = field(default_factory=list)
    fitted: dict[str, Surrogate] = field(default_factory=dict)
    causes: Causes = field(init=False)
    _serving: Array = field(default_factory=lambda: np.zeros(0))  # by the causes, NaN where nobody asked yet

    def __post_init__(self) -> None:
        self.tables = correlations(self.candidates.space)
        self.causes = Causes(self.candidates.space, self.sources.rules, self.sources.world)

    @property
    def foresight(self) -> Foresight:
        return self.sources.foresight

    def learn(self, readings: Sequence[Reading], seed: int) -> None:
        """Fits every quantity to the launches so far; first decides of what the model is believed."""
        known = self._known(readings)
        self.sources.lost = self._lost(known, seed)
        doubted = len(known) >= FOLLOWED and self.sources.ruled
        for name in QUANTITIES:  # the capacity first: the others are seen by how much of it a load takes
            self.fitted[name] = self._fit(name, known, seed, self.fitted.get(name), doubted)
        self.fitted.pop("room", None)
        if any(r.works is not None and r.works < 0 and r.cause is None for r in known):
            self.fitted["room"] = self._fit("room", known, seed, None)
        told = [r for r in known if r.works is not None and (r.works > 0 or r.cause is not None)]
        indices = [index for r in told if (index := self.index(r.seen.params)) is not None]
        self.causes.learn(self.candidates.codes(indices), [r.cause for r in told])
        self._serving = np.zeros(0)

    def evidence(self, readings: Sequence[Reading], seed: int) -> float:
        """Logarithm of the evidence (Rasmussen and Williams 2006, section 5.4.1) that the capacity and the latency of
        the first launches are for the foresight."""
        known, before, found = self._known(readings)[:JUDGES], dict(self.fitted), 0.0
        self.sources.lost = frozenset()
        for name in JUDGED:
            self.fitted[name] = self._fit(name, known, seed, None)
            found += self.fitted[name].evidence()
        self.fitted = before
        return found

    def _known(self, readings: Sequence[Reading]) -> list[Reading]:
        """The readings of launches that have ended, of configurations that no rule denies."""
        known = [r for r in readings if r.seen.outcome is not None and self.index(r.seen.params) is not None]
        self.foresight.look()
        return known

    def _lost(self, known: Sequence[Reading], seed: int) -> frozenset[str]:
        """The quantities of which the model explains the first launches no better than rules of thumb do; all, where it
        explains them no better together. Where no rule knows the space the model stays, with the weight that launches
        leave it."""
        lost: frozenset[str] = frozenset()
        if self.foresight.predictor is None or not self.sources.ruled or not known:
            return lost
        before, together = dict(self.fitted), 0.0
        for name in JUDGED:
            fits: list[Surrogate] = []
            for without in (lost, lost | {name}):
                self.sources.lost = without
                fits.append(self._fit(name, known[:JUDGES], seed, None))
            better = fits[0].evidence() - fits[1].evidence()
            if better <= 0:
                lost |= {name}
            self.fitted[name] = fits[name in lost]
            together += better
        self.fitted = before
        return lost if together > 0 else frozenset(QUANTITIES)

    def _fit(
        self, name: str, known: Sequence[Reading], seed: int, last: Surrogate | None, doubted: bool = False
    ) -> Surrogate:
        """One quantity, from the variances of the ``last`` fit; ``doubted``: variances as without a model."""
        rows, sources = self._rows(name, known)
        informed = (self.sources.modelled(name) or self.sources.earlier) and not doubted
        return fit(
            self.tables,
            rows,
            {"cost": COST, "room": ROOM}.get(name, WITH_MODEL if informed else WITHOUT),
            mean=ROOM_AT_FIRST if name == "room" else self._mean(name, rows),
            prior_weights=[s.weight for s in sources],
            weight_sd=[s.weight_sd for s in sources],
            more=None if name == "room" else MODEL_WRONG**2 * self.sources.effects(name),
            start=None if last is None or last.variances.shape != (len(self.tables) + 5,) else last.variances,
            seed=seed,
        )

    def posterior(self, indices: Sequence[int], *, spread: bool = True) -> Posterior:
        """What is believed of these candidates; without ``spread`` (cheap) only the means are."""
        self.foresight.look()
        codes = self.candidates.codes(indices)
        found: dict[str, tuple[Array, Array]] = {}
        for name in QUANTITIES:
            places = self._places(name, indices, found.get("capacity"))
            sources = columns(self.sources.of(name, indices), places.shape[1], len(indices))
            found[name] = self.fitted[name].predict(codes, places, sources, spread=spread)
        return Posterior(
            *found["cost"],
            *found["latency"],
            found["capacity"][0][:, 0],
            found["capacity"][1][:, 0],
            self._enough(indices, spread) * self._by_causes(indices),
            self.foresight.gpus[np.array(indices, dtype=np.int64)],
        )

    def _enough(self, indices: Sequence[int], spread: bool) -> Array:
        """Probability that memory suffices, by the margins of servers: nothing is said before one was short."""
        if "room" not in self.fitted:
            return np.ones(len(indices))
        sources = columns(self.sources.of("room", indices), 1, len(indices))
        codes = self.candidates.codes(indices)
        room, sd = self.fitted["room"].predict(codes, np.zeros((len(indices), 1)), sources, spread=spread)
        return _normal_cdf(room[:, 0] / np.sqrt(sd[:, 0] ** 2 + ROOM_DOUBT**2))

    def _by_causes(self, indices: Sequence[int]) -> Array:
        """Probability of serving by what earlier crashes had in common; asked once per candidate and fit."""
        missing = len(self.candidates.params) - len(self._serving)
        self._serving = np.append(self._serving, np.full(missing, math.nan))
        at = np.array(indices, dtype=np.int64)
        new = at[np.isnan(self._serving[at])]
        if len(new):
            self._serving[new] = self.causes.works(self.candidates.codes(new.tolist()))
        return self._serving[at]

    def believe(self, indices: Sequence[int]) -> None:
        """Takes pending launches into account: what is believed of them is treated as if it had been measured, so that
        nothing like them is launched beside them."""
        for name in QUANTITIES:
            surrogate = self.fitted[name]
            places = self._places(name, indices)
            n = places.shape[1]
            sources = columns(self.sources.of(name, indices), n, len(indices))
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
            sources = columns(self.sources.of("capacity", indices), 1, len(indices))
            codes = self.candidates.codes(indices)
            capacity = self.fitted["capacity"].predict(codes, np.zeros((len(indices), 1)), sources, spread=False)
        return np.minimum(np.array(self.foresight.loads)[None, :] / np.exp(capacity[0]), 1.2)

    def weights(self) -> dict[str, dict[str, float]]:
        """The weight of every source (the model, earlier studies) for every quantity, after what was measured."""
        found = {}
        for name in QUANTITIES:
            if name in self.fitted:
                names = [s.name for s in self.sources.of(name, [])]
                found[name] = dict(zip(names, self.fitted[name].weights.tolist(), strict=True))
        return found

    def _mean(self, name: str, rows: Rows) -> float | None:
        """With a model, its own level; without, the level of what was measured."""
        if self.sources.modelled(name):
            return self.sources.mean(name)
        return None if len(rows.y) else {"cost": 0.0, "latency": -3.0}.get(name, math.log(self.foresight.loads[-1]))

    def _rows(self, name: str, known: Sequence[Reading]) -> tuple[Rows, list[Source]]:
        """The launches' values of one quantity, with the sources at the same places."""
        points: list[tuple[int, int, float, float, float]] = []  # candidate, place in the ladder, use, value, noise
        numbered = [(index, r) for r in _fewer(known) if (index := self.index(r.seen.params)) is not None]
        use = self._places(name, [index for index, _ in numbered])
        for i, (index, r) in enumerate(numbered):
            if name == "capacity" and r.capacity is not None:
                points.append((index, 0, 0.0, r.capacity, r.capacity_sd**2))
            elif name == "room" and r.works is not None and r.cause is None:
                points.append((index, 0, 0.0, r.works, 0.0))
            elif name in ("cost", "latency"):
                for place, cost, latency in r.steps:
                    value = cost if name == "cost" else latency
                    points.append((index, place, float(use[i, place]), value, 0.0 if place in r.good else MISS_NOISE))
        indices = sorted({p[0] for p in points})
        sources = self.sources.of(name, indices)
        at = {index: row for row, index in enumerate(indices)}
        values = np.array([[s.values[at[p[0]], p[1]] for s in sources] for p in points])
        _, _, use, y, extra = np.array(points, float).reshape(-1, 5).T
        codes = self.candidates.codes([p[0] for p in points])
        return Rows(codes, use, y, values.reshape(len(points), len(sources)), extra), sources

    def index(self, params: Mapping[str, Value]) -> int | None:
        """The candidate's number of a configuration that was launched, here or elsewhere; it becomes one if it was none
        (None: a rule denies it)."""
        return self.candidates.number(params, seen=True)


def _fewer(known: Sequence[Reading]) -> Sequence[Reading]:
    """Where there are more than :data:`MOST_ROWS` steps, every other of a launch's, or fewer (its loads say nearly the
    same); of more launches than that, every other one."""
    if sum(len(r.steps) or 1 for r in known) <= MOST_ROWS:
        return known
    known = known[:: math.ceil(len(known) / MOST_ROWS)]
    each = MOST_ROWS // len(known)
    return [replace(r, steps=r.steps[:: max(math.ceil(len(r.steps) / each), 1)]) for r in known]


def _normal_cdf(x: Array) -> Array:
    from scipy.special import ndtr

    return ndtr(x)
