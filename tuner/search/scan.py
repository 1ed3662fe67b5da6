"""A look over all candidates with cheap means: the believed front, the reference point, who deserves a closer look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from tuner.search.acquisition import Front, LaunchCost, gains, improvement, worth
from tuner.search.beliefs import Beliefs, Posterior
from tuner.search.ledger import answered
from tuner.search.reading import Reading
from tuner.search.surrogate import Array, Codes

MARGIN = 0.1  # log units by which the reference lies beyond the worst point of the front
SETTLED = 0.3  # share of a standard deviation that one more measurement takes away (1 - sqrt(1/2))
LOOK_AGAIN = 64  # candidates whose gain is computed anew at a time
HOPE = 1.5  # standard deviations of optimism in the cheap look
KEPT = 2.0  # promises that are taken as kept before the first launch
AT_MOST = 5.0  # times its promise that one launch counts


@dataclass(frozen=True, slots=True)
class Doubt:
    """A measured candidate whose part of the front is uncertain by ``stake`` (hypervolume, one standard deviation), the
    ``number`` of the trial that measured it, and the ``score`` of a repetition, in the units of a launch's."""

    index: int
    number: int
    stake: float
    score: float


@dataclass(frozen=True)
class Scan:
    """The beliefs after ``readings``, with ``pending`` candidates running."""

    beliefs: Beliefs
    loads: Sequence[float]
    readings: Sequence[Reading]
    pending: Sequence[int]

    def front(self, ahead: Posterior | None) -> Front:
        """What a launch has to beat: the points measured within SLO, at the values that the surrogate believes (a lucky
        measurement is drawn back), and what pending launches are believed to reach. ``ahead`` are the beliefs of what
        may be launched: they decide how far the reference point lies."""
        points = [self._measured[1]]
        if self.pending:
            points.append(_flat(self._points(self.pending)))
        held = np.concatenate(points)
        hoped = _flat(_points(ahead, self.loads, 0.0, 0.0)) if ahead is not None else held[:0]
        return Front(held, self._reference(np.concatenate([held, hoped])))

    def leaders(self, indices: Sequence[int], count: int) -> list[int]:
        """Candidates that together make the believed front, greedily by what each adds."""
        if not indices:
            return []
        points = self._points(indices)
        front = Front(np.zeros((0, 2)), self._reference(_flat(points)))
        chosen: list[int] = []
        gain = _gain(points, front)
        for _ in range(count):
            fresh = np.zeros(len(points), dtype=bool)  # a gain only falls as the front grows, so few need a new look
            while not fresh[best := int(np.argmax(gain))]:
                look = np.argpartition(-np.where(fresh, -np.inf, gain), min(LOOK_AGAIN, len(gain) - 1))[:LOOK_AGAIN]
                gain[look], fresh[look] = _gain(points[look], front), True
            if gain[best] <= 0:
                break
            chosen.append(indices[best])
            front = front.with_points(_flat(points[best : best + 1]))
        return chosen

    def shortlist(self, free: Sequence[int], mean: Posterior, front: Front, count: int, rng: Any) -> list[int]:
        """The candidates with the highest gain at their mean (``mean``: of all ``free``) and at an optimistic value,
        and a few at random."""
        if len(free) <= count:
            return list(free)
        sd = [float(np.sqrt(max(self.beliefs.fitted[n].variances[2:-1].sum(), 1e-6))) for n in ("latency", "capacity")]
        found: list[int] = []
        for hope in (0.0, HOPE):
            points = _points(mean, self.loads, hope * sd[0], hope * sd[1])
            gain = _gain(points, front) * mean.works / mean.gpus**0.5
            found += np.argsort(-gain, kind="stable")[: int(count * 0.45)].tolist()
        found += rng.choice(len(free), size=count // 10, replace=False).tolist()
        return [free[i] for i in dict.fromkeys(found)]

    def unseen(self, free: Sequence[int]) -> dict[int, str]:
        """Those of ``free`` that have a value which no server has served with (none is pending), of a parameter whose
        values have no order (of numbers, neighbours say something), and that value in words."""
        candidates = self.beliefs.candidates
        served = [r.seen.params for r in self.readings if r.works is not None and r.works > 0]
        indices = [i for params in served if (i := self.beliefs.index(params)) is not None]
        known = candidates.codes([*indices, *self.pending])
        found: dict[int, str] = {}
        codes = candidates.codes(free)
        for j, p in enumerate(candidates.space.parameters):
            if p.numeric:
                continue
            new = (codes[:, j] >= 0) & ~np.isin(codes[:, j], known[:, j])
            for row in np.nonzero(new)[0].tolist():
                found.setdefault(free[row], f"{p.name} {p.values[codes[row, j]]}")
        return found

    def doubtful(self, front: Front, cost: LaunchCost, normal: Array, every: int, power: float = 1.0) -> Doubt | None:
        """The measured configuration whose repetition would say most: whose part of the front (points that a lucky run
        may have put there, loads that a narrow miss may have taken away) is the least certain, per GPU-second to the
        ``power``. None where repetitions, running ones too, have had their share of the launches (one in ``every``)."""
        launched = [r for r in self.readings if r.seen.outcome is not None]
        repeats = [r.seen.params for r in self.readings if r.seen.remeasure_of is not None]
        if not every or len(launched) < every * (len(repeats) + 1):
            return None
        first: dict[int, Reading] = {}
        for r in launched:
            index = self.beliefs.index(r.seen.params)
            if r.steps and self._within(index) and r.seen.params not in repeats:
                first.setdefault(index, r)
        if not first:
            return None
        indices = list(first)
        believed = self.beliefs.posterior(indices)
        stakes = np.zeros(len(indices))
        rows, points = self._measured
        for row, index in enumerate(indices):
            others = points[rows != index]
            alone = Posterior(*(getattr(believed, name)[row : row + 1] for name in Posterior.__slots__))
            stakes[row] = gains(alone, Front(others, front.reference), self.loads, normal)[0].std()
        seconds = worth(believed, front, self.loads, cost, normal).gpu_seconds
        scores = stakes * SETTLED / seconds**power
        best = int(np.argmax(scores))
        return Doubt(indices[best], first[indices[best]].seen.number, float(stakes[best]), float(scores[best]))

    def kept(self, front: Front) -> float:
        """Share of the hypervolume promised by earlier proposals that their launches brought, by what is believed now
        (mean over the launches, :data:`KEPT` kept promises added). The configuration that promises most of a thousand
        mostly promises too much, and by how much differs from study to study (Smith and Winkler 2006, "The Optimizer's
        Curse")."""
        rows, points = self._measured
        growing, ratios = Front(points[:0], front.reference), []
        for r in sorted(self.readings, key=lambda r: r.seen.number):
            if not answered(r.seen.outcome):
                continue
            before = growing.volume()
            growing = growing.with_points(points[rows == self.beliefs.index(r.seen.params)])
            if before > 0 and r.seen.promised:
                ratios.append(min((growing.volume() / before - 1) / r.seen.promised, AT_MOST))
        return (KEPT + sum(ratios)) / (KEPT + len(ratios))

    def again(self, rng: Any) -> int:
        """A candidate to measure again when nothing else is left: one of the front, else any."""
        good = [i for r in self.readings if r.good and self._within(i := self.beliefs.index(r.seen.params))]
        return int(rng.choice(good)) if good else 0

    def _within(self, index: int | None) -> TypeGuard[int]:
        """Whether a candidate is within this machine's reach."""
        return index is not None and index not in self.beliefs.candidates.beyond

    @cached_property
    def _measured(self) -> tuple[Codes, Array]:
        """Measured points within SLO, believed values, one per configuration and load: the candidates' numbers, and the
        points. As on the front itself, a load that one launch alone reached counts by that, one that any missed not."""
        places: dict[int, set[int]] = defaultdict(set)
        missed: dict[int, set[int]] = defaultdict(set)
        for r in self.readings:
            index = self.beliefs.index(r.seen.params) if r.good or r.missed else None
            if index is not None:
                places[index] |= {*r.good}
                missed[index] |= {*r.missed}
        places = {index: left for index, held in places.items() if (left := held - missed[index])}
        if not places:
            return np.zeros(0, dtype=np.int64), np.zeros((0, 2))
        believed = self.beliefs.posterior(list(places), spread=False)
        rows = [(row, index, place) for row, index in enumerate(places) for place in sorted(places[index])]
        points = [(believed.cost[row, place], believed.latency[row, place]) for row, _, place in rows]
        return np.array([index for _, index, _ in rows], dtype=np.int64), np.array(points, float).reshape(-1, 2)

    def _points(self, indices: Sequence[int]) -> Array:
        return _points(self.beliefs.posterior(indices, spread=False), self.loads, 0.0, 0.0)

    def _reference(self, points: Array) -> Array:
        """Beyond the worst point of the front in both axes; the latency's own SLO is the limit where there is one."""
        objective = self.beliefs.foresight.objective
        best = nondominated(points)
        reference = best.max(0) + MARGIN if len(best) else np.array([10.0, 10.0])
        limits = [np.log(s.limit) for s in objective.slos if s.metric == objective.latency]
        if limits:
            reference[1] = min(limits)
        return reference


def nondominated(points: Array) -> Array:
    """The points that no other point beats in both columns, by rising cost."""
    if not len(points):
        return points
    ordered = points[np.lexsort((points[:, 1], points[:, 0]))]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered[:, 1])[:-1]])
    return ordered[ordered[:, 1] < before]


def launch_cost(guess: LaunchCost, readings: Sequence[Reading]) -> LaunchCost:
    """Seconds of a launch as they really were: medians over the launches; the first estimate where there is none."""
    starts, steps = [guess.start_s], [guess.step_s]
    for r in readings:
        outcome = r.seen.outcome
        if outcome is None or not outcome.steps or r.seen.seconds <= 0:
            continue
        start = outcome.boot.total_s
        starts.append(start or guess.start_s)
        steps.append(max(r.seen.seconds - start, 1.0) / len(outcome.steps))
    if len(steps) > 1:  # what was measured outweighs what was guessed
        starts, steps = starts[1:], steps[1:]
    return LaunchCost(float(np.median(starts)), float(np.median(steps)))


def _points(believed: Posterior, loads: Sequence[float], latency_off: float, capacity_up: float) -> Array:
    """Believed points (candidates, loads, 2); the latency is infinite beyond the capacity."""
    within = np.log(np.array(loads))[None, :] <= believed.capacity[:, None] + capacity_up
    return np.stack([believed.cost, np.where(within, believed.latency - latency_off, np.inf)], axis=2)


def _gain(points: Array, front: Front) -> Array:
    """Growth of the front's hypervolume by each candidate's points (candidates, loads, 2)."""
    return improvement(points[:, None, :, 0], points[:, None, :, 1], front)[:, 0]


def _flat(points: Array) -> Array:
    flat = points.reshape(-1, 2)
    return flat[np.isfinite(flat[:, 1])]
