"""The analytic model's constants, learnt from the launches: how much of the data sheet this machine really gives.

A model whose formulas are right and whose constants are not errs everywhere in the same few directions, which a few
launches show. The constants are those of highest
posterior density: log-normal priors around their values, launches that err by what all of a launch's steps share and by
noise (a calibration with a model discrepancy, Kennedy and O'Hagan 2001, J. R. Statist. Soc. B 63(3)), found by
Gauss-Newton; a launch that no constants explain counts less (Huber's loss, by reweighting: Huber 1964, Ann. Math.
Statist. 35(1)). What is left, the surrogate learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tuner.search.ledger import COST_KEY
from tuner.search.prediction import Predictor
from tuner.search.surrogate import Array
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Step

# standard deviations of what a launch's steps share (effects that the model does not know) and of one step, log units
SHARED_SD, NOISE_SD = 0.12, 0.06
WAITING = 2.5  # times that for a TTFT: queues are foreseen less well than steps
HUBER = 1.5  # standard deviations beyond which an error counts linearly
BEYOND = 0.3  # log units beyond its limit up to which a missed SLO says how far it was missed
NUDGE = 0.05  # of a constant, for its derivative
ROUNDS = 6
STILL = 0.02  # log units: a smaller move of the constants is the end
LAUNCHES = 12  # that the constants are learnt from


@runtime_checkable
class Calibratable(Protocol):
    """A predictor whose constants may be wrong."""

    def doubts(self) -> Mapping[str, float]:
        """Standard deviation of each constant's logarithm, by its name."""
        ...

    def scaled(self, factors: Mapping[str, float]) -> Predictor:
        """The same model with its constants times ``factors``."""
        ...


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch: its serving config and its steps."""

    config: ServingConfig
    steps: Sequence[Step]


def calibrate(
    model: Calibratable, launches: Sequence[Launched], objective: Objective, start: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Factors on the model's constants, 1 where launches say nothing; the search begins at ``start``.

    The model is asked (constants + 1) times per round for every step of the launches (the first :data:`LAUNCHES`).
    """
    prior = {name: sd for name, sd in model.doubts().items() if sd > 0}
    names, sds = list(prior), np.array(list(prior.values()))
    groups = _groups(launches[:LAUNCHES], objective)
    if not names or not groups:
        return {}
    theta = np.array([math.log((start or {}).get(name, 1.0)) for name in names])
    errors, felt, damping = _errors(model, names, theta, groups), list(range(len(names))), 1e-2
    for _ in range(ROUNDS):
        off = _known(errors)
        slopes = _slopes(model, names, theta, groups, errors, felt)
        felt = [j for j in felt if any(np.abs(s[:, j]).max() > 1e-6 for s in slopes)]
        precision, gradient = np.diag(1 / sds**2), -theta / sds**2
        for r, slope in zip(off, slopes, strict=True):
            whitened = _weight(r) * _solve(np.column_stack([r, slope]))
            gradient = gradient + slope.T @ whitened[:, 0]
            precision = precision + slope.T @ whitened[:, 1:]
        loss = _loss(off, theta, sds)
        for _ in range(4):  # a step that makes it worse is shortened
            step = np.linalg.solve(precision + damping * np.diag(np.diag(precision)), gradient)
            tried = np.clip(theta + np.clip(step, -0.7, 0.7), -3 * sds, 3 * sds)
            found = _errors(model, names, tried, groups)
            silent = any((np.isnan(now) > np.isnan(before)).any() for now, before in zip(found, errors, strict=True))
            if not silent and _loss(_known(found), tried, sds) < loss:  # what ran is no place where a model ends
                damping = max(damping / 4, 1e-4)
                break
            damping = min(damping * 8, 1e3)
        else:
            break
        moved, theta, errors = float(np.abs(tried - theta).max()), tried, found
        if moved < STILL:
            break
    return {name: math.exp(value) for name, value in zip(names, theta.tolist(), strict=True)}


def improbability(model: Calibratable, factors: Mapping[str, float]) -> float:
    """How much less the model expects these ``factors`` on its constants than none: the log of the ratio of the prior
    densities, 0 or more."""
    doubts = model.doubts()
    return sum(0.5 * (math.log(f) / doubts[name]) ** 2 for name, f in factors.items() if doubts.get(name, 0.0) > 0)


@dataclass(frozen=True, slots=True)
class _Group:
    """One metric over the steps of one launch, in logarithms; beyond ``ceiling`` values are all the same."""

    config: ServingConfig
    metric: str
    loads: tuple[float, ...]
    measured: Array
    ceiling: float

    @property
    def scale(self) -> float:
        return WAITING if self.metric.startswith("ttft") else 1.0


def _groups(launches: Sequence[Launched], objective: Objective) -> list[_Group]:
    limits = {s.key: math.log(s.limit) for s in objective.slos if s.latency}
    found = []
    for launch in launches:
        steps = [s for s in launch.steps if not s.untrusted]
        for metric in dict.fromkeys((objective.latency_key, *limits, COST_KEY)):
            ceiling = limits.get(metric, math.inf) + BEYOND
            kept = [s for s in steps if metric in s.metrics and (metric in limits or s.ok)]
            values = [math.inf if s.saturated else s.metrics[metric] for s in kept]
            logs = np.minimum([math.log(v) if 0 < v < math.inf else math.inf for v in values], ceiling)
            known = np.isfinite(logs)
            if known.any():
                loads = tuple(s.load for s, k in zip(kept, known, strict=True) if k)
                found.append(_Group(launch.config, metric, loads, logs[known], ceiling))
    return found


def _errors(model: Calibratable, names: Sequence[str], theta: np.ndarray, groups: Sequence[_Group]) -> list[Array]:
    """Measured minus predicted per group, in units of its scale; NaN where the model has no answer."""
    scaled = model.scaled({n: math.exp(t) for n, t in zip(names, theta.tolist(), strict=True)})
    asked: dict[tuple[int, float], Mapping[str, float]] = {}
    found = []
    for g in groups:
        values = np.full(len(g.loads), math.nan)
        for i, load in enumerate(g.loads):
            key = (id(g.config), load)
            if key not in asked:
                answer = scaled.predict(g.config, load)
                asked[key] = answer.metrics if answer.fits else {}
            value = asked[key].get(g.metric, math.nan)
            values[i] = math.log(value) if 0 < value < math.inf else math.nan
        found.append((g.measured - np.minimum(values, g.ceiling)) / g.scale)
    return found


def _known(errors: Sequence[Array]) -> list[Array]:
    """``errors``, 0 where there is none: nothing is learnt from that."""
    return [np.nan_to_num(r) for r in errors]


def _slopes(
    model: Calibratable,
    names: Sequence[str],
    theta: np.ndarray,
    groups: Sequence[_Group],
    errors: Sequence[Array],
    felt: Sequence[int],
) -> list[Array]:
    """Derivatives of the predictions by the logarithms of the constants ``felt``, (steps, constants) per group; 0 for
    the others, and where the model has no answer on one side."""
    found = [np.zeros((len(r), len(names))) for r in errors]
    for j in felt:
        nudged = theta.copy()
        nudged[j] += NUDGE
        for slope, r, there in zip(found, errors, _errors(model, names, nudged, groups), strict=True):
            slope[:, j] = np.nan_to_num((r - there) / NUDGE)
    return found


def _solve(values: Array) -> Array:
    """The inverse covariance of a group's errors (one that all steps share, one each) times ``values`` (steps, n)."""
    n = len(values)
    shared = SHARED_SD**2 / (NOISE_SD**2 + n * SHARED_SD**2)
    return (values - shared * values.sum(0)) / NOISE_SD**2


def _distance(off: Array) -> float:
    return float(off @ _solve(off[:, None])[:, 0])


def _weight(off: Array) -> float:
    return min(1.0, HUBER / math.sqrt(_distance(off) / len(off) + 1e-12))


def _loss(off: Sequence[Array], theta: np.ndarray, sds: np.ndarray) -> float:
    found = 0.5 * float(((theta / sds) ** 2).sum())
    for r in off:
        far = math.sqrt(_distance(r) / len(r))
        found += len(r) * (0.5 * far**2 if far <= HUBER else HUBER * far - 0.5 * HUBER**2)
    return found
