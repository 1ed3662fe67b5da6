"""A Gaussian process made for serving parameters: a few dozen launches, categories, conditions and a load.

The covariance is a sum of parts, each with its own variance: a constant; the load; every parameter alone (how much of
its effect changes with the load is fixed); pairs of the parameters that matter; the configuration itself; noise
(additive Gaussian processes: Duvenaud et al. 2011, arXiv:1112.4394). Serving latencies multiply, so in logarithms the
single effects carry most and ten launches teach them. The variances are found by maximum a posteriori (L-BFGS with
exact gradients). Prior means enter as *sources* with a weight each: ``y = sum_s w_s f_s + GP``, with a Gaussian prior
on every weight: a source that proves wrong loses its weight (Rasmussen and Williams 2006, section 2.7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.search.candidates import pairs

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
FIT_ROWS = 160  # rows used to find the variances; every row is used to predict
LOAD_SHARE = 0.4  # of a parameter's effect that changes with the load
LOOKUP = 400  # steps of the table over the load in which means are looked up: exact to a few millionths
LOAD_LENGTH = 0.6  # of the utilization (load / capacity) over which effects stay alike


@dataclass(frozen=True, slots=True)
class Prior:
    """Log-normal priors on the variances, in squared log units (centre, and the spread in e-folds). The effects of
    parameters (single, pair, own) have a factor in common, of spread ``common``: where one prediction is far off, the
    others are not to be believed either."""

    constant: float = 0.3
    load: float = 0.3
    single: float = 0.03
    pair: float = 0.01
    own: float = 0.003
    noise: float = 0.0016
    spread: float = 1.0
    common: float = 1.5
    noise_spread: float = 0.8


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known, row by row: codes (n, parameters), place of the load (n,) (its share of the capacity), target
    (n,), the sources' values (n, sources) and extra noise variance (n,)."""

    codes: Codes
    load: Array
    y: Array
    sources: Array
    extra: Array

    def take(self, which: Any) -> Rows:
        return Rows(self.codes[which], self.load[which], self.y[which], self.sources[which], self.extra[which])

    def plus(self, other: Rows) -> Rows:
        return Rows(
            np.concatenate([self.codes, other.codes]),
            np.concatenate([self.load, other.load]),
            np.concatenate([self.y, other.y]),
            np.concatenate([self.sources, other.sources]),
            np.concatenate([self.extra, other.extra]),
        )


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A fitted process; make one with :func:`fit`. ``weights`` are the sources' posterior weights."""

    tables: Sequence[Array]
    rows: Rows
    variances: Array
    importance: Array
    mean: float
    prior_weights: Array
    weight_sd: Array
    alpha: Array = field(default_factory=lambda: np.zeros(0))
    inverse: Array = field(default_factory=lambda: np.zeros((0, 0)))
    weights: Array = field(default_factory=lambda: np.zeros(0))

    def evidence(self) -> float:
        """Log likelihood of the rows, the weights and the effects integrated out, up to a constant per row."""
        if not len(self.rows.y):
            return 0.0
        off = self.rows.y - self.mean - self.rows.sources @ self.prior_weights
        return float(0.5 * np.linalg.slogdet(self.inverse)[1] - 0.5 * off @ self.alpha)

    def predict(self, codes: Codes, places: Array, sources: Array, *, spread: bool = True) -> tuple[Array, Array]:
        """Mean and standard deviation (candidates, loads) without the noise of a measurement.

        ``codes`` (candidates, parameters), ``places`` (candidates, loads), ``sources`` (candidates, loads, sources).
        Without ``spread`` the standard deviation is left at 0, which is much cheaper.
        """
        n_loads = places.shape[1]
        v, d = self.variances, len(self.tables)
        launched, row_of = np.unique(self.rows.codes, axis=0, return_inverse=True)
        row_of = row_of.reshape(-1)
        singles, both = _alike(codes, launched, self.tables, v[2 : 2 + d], self.importance)
        by_config = singles + v[2 + d] * both
        own = np.where((codes[:, None, :] == launched[None, :, :]).all(2), v[3 + d], 0.0)
        steady, changing = v[0] + (1 - LOAD_SHARE) * by_config, v[1] + own + LOAD_SHARE * by_config
        learnt = self.prior_weights + self.weight_sd**2 * (self.rows.sources.T @ self.alpha)
        # a launch's rows differ in their loads alone: their sum is a function of the load, looked up in a fine table
        far = max(float(places.max(initial=0.0)), 1e-3)
        table = np.zeros((LOOKUP + 1, len(launched)))
        near = _load_kernel(np.linspace(0.0, far, LOOKUP + 1), self.rows.load) * self.alpha
        for c in range(len(launched)):
            table[:, c] = near[:, row_of == c].sum(1)
        level = self.mean + steady @ np.bincount(row_of, self.alpha, len(launched))
        mean, sd = np.empty((len(codes), n_loads)), np.zeros((len(codes), n_loads))
        total = v[:-1].sum() - (v[2 + d] if d < 2 else 0.0)  # of one parameter there are no pairs
        for i in range(n_loads):
            f = sources[:, i, :]
            at = np.clip(places[:, i] / far, 0.0, 1.0) * LOOKUP
            low = np.minimum(at.astype(np.int64), LOOKUP - 1)
            share = (at - low)[:, None]
            looked_up = table[low] * (1 - share) + table[low + 1] * share
            mean[:, i] = level + f @ learnt + np.einsum("pc,pc->p", changing, looked_up)
            if not spread:
                continue
            near = _load_kernel(places[:, i], self.rows.load)
            k = steady[:, row_of] + changing[:, row_of] * near + (f * self.weight_sd**2) @ self.rows.sources.T
            var = total + (f**2) @ self.weight_sd**2 - np.einsum("ij,ij->i", k @ self.inverse, k)
            sd[:, i] = np.sqrt(np.maximum(var, 1e-8))
        return mean, sd

    def with_rows(self, rows: Rows) -> Surrogate:
        """The same process with more rows (a pending launch's believed values), the variances as they are."""
        return _solve(replace(self, rows=rows))


def fit(
    tables: Sequence[Array],
    rows: Rows,
    prior: Prior,
    *,
    mean: float | None = None,
    prior_weights: Sequence[float] = (),
    weight_sd: Sequence[float] = (),
    more: Array | None = None,
    start: Array | None = None,
    seed: int = 0,
) -> Surrogate:
    """A process fitted to ``rows``. ``more`` is added to the prior's ``single``, parameter by parameter: the variance
    expected between a parameter's values, however alike neighbours are. ``mean`` fixes the prior mean (otherwise that
    of the targets, the sources taken off); ``start`` are variances to start from (an earlier fit's)."""
    d = len(tables)
    weights, sds = np.array(prior_weights, float), np.array(weight_sd, float)
    apart = np.array([max(1 - float(t[:-1, :-1].mean()), 0.05) for t in tables])
    singles = (prior.single + (np.zeros(d) if more is None else more)) / apart
    centre = np.concatenate([[prior.constant, prior.load], singles, [prior.pair, prior.own, prior.noise]])
    spread = np.concatenate([np.full(d + 4, prior.spread), [prior.noise_spread]])
    if mean is None:
        mean = float(np.mean(rows.y - rows.sources @ weights)) if len(rows.y) else 0.0
    sample = rows
    if len(rows.y) > FIT_ROWS:
        sample = rows.take(np.sort(np.random.default_rng(seed).permutation(len(rows.y))[:FIT_ROWS]))
    variances = centre if start is None or len(start) != len(centre) else start
    importance = np.full(d, 1 / max(d, 1))
    if len(sample.y) >= 3:
        for _ in range(2 if start is None else 1):
            importance = _importance(variances, d)
            variances = _maximise(
                tables, sample, variances, (centre, spread, prior.common), importance, mean, weights, sds
            )
    importance = _importance(variances, d)
    return _solve(Surrogate(tables, rows, variances, importance, mean, weights, sds))


def _importance(variances: Array, d: int) -> Array:
    """Each parameter's share of the single effects' variance."""
    share = variances[2 : 2 + d]
    return share / max(share.sum(), 1e-12)


def _solve(s: Surrogate) -> Surrogate:
    if not len(s.rows.y):
        return replace(s, weights=s.prior_weights)
    kernel = _kernel(s.tables, s.rows, s.variances, s.importance) + (s.rows.sources * s.weight_sd**2) @ s.rows.sources.T
    inverse = np.linalg.inv(kernel + np.diag(s.variances[-1] + s.rows.extra + 1e-8))
    alpha = inverse @ (s.rows.y - s.mean - s.rows.sources @ s.prior_weights)
    weights = s.prior_weights + s.weight_sd**2 * (s.rows.sources.T @ alpha)
    return replace(s, alpha=alpha, inverse=inverse, weights=weights)


def _load_kernel(one: Array, other: Array) -> Array:
    apart = math.sqrt(5) * np.abs(one[:, None] - other[None, :]) / LOAD_LENGTH
    return (1 + apart + apart**2 / 3) * np.exp(-apart)


def _alike(
    one: Codes, other: Codes, tables: Sequence[Array], variances: Array, importance: Array
) -> tuple[Array, Array]:
    """The single effects' covariance, and the likeness (0 to 1) through pairs of the parameters that matter."""
    singles, shares, squares = (np.zeros((len(one), len(other))) for _ in range(3))
    for j, table in enumerate(tables):
        k = table[one[:, j][:, None], other[:, j][None, :]]
        singles += variances[j] * k
        shares += importance[j] * k
        squares += (importance[j] * k) ** 2
    most = sum(importance[i] * importance[j] for i, j in pairs(len(tables)))
    return singles, (shares**2 - squares) / 2 / max(most, 1e-12)


def _components(tables: Sequence[Array], rows: Rows, importance: Array) -> list[Array]:
    """The covariance's parts at variance one, in the order of the variances (without the noise)."""
    near = _load_kernel(rows.load, rows.load)
    mixed = (1 - LOAD_SHARE) + LOAD_SHARE * near
    n = len(rows.y)
    parts = [np.ones((n, n)), near]
    parts += [t[rows.codes[:, j][:, None], rows.codes[:, j][None, :]] * mixed for j, t in enumerate(tables)]
    both = _alike(rows.codes, rows.codes, tables, np.zeros(len(tables)), importance)[1]
    same = (rows.codes[:, None, :] == rows.codes[None, :, :]).all(2)
    return [*parts, both * mixed, same * near]


def _kernel(tables: Sequence[Array], rows: Rows, variances: Array, importance: Array) -> Array:
    return np.tensordot(variances[:-1], np.stack(_components(tables, rows, importance)), axes=1)


def _maximise(
    tables: Sequence[Array],
    rows: Rows,
    start: Array,
    prior: tuple[Array, Array, float],
    importance: Array,
    mean: float,
    weights: Array,
    sds: Array,
) -> Array:
    """Variances of highest posterior density, searched in logarithms: one number per variance, and one in common."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize

    stack = np.stack(_components(tables, rows, importance))
    flat = stack.reshape(len(stack), -1)
    fixed = (rows.sources * sds**2) @ rows.sources.T + np.diag(rows.extra + 1e-8)
    target = rows.y - mean - rows.sources @ weights
    eye = np.eye(len(target))

    centre, spread, common = prior
    shared = slice(2, -1)

    def variances_of(logs: Array) -> Array:
        found = logs[:-1].copy()
        found[shared] += logs[-1]
        return np.exp(found)

    def loss(logs: Array) -> tuple[float, Array]:
        v = variances_of(logs)
        kernel = (v[:-1] @ flat).reshape(eye.shape) + fixed + v[-1] * eye
        try:
            factor = cho_factor(kernel, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(logs)
        inverse = cho_solve(factor, eye)
        alpha = inverse @ target
        away = np.append((logs[:-1] - np.log(centre)) / spread, logs[-1] / common)
        value = 0.5 * target @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * (away**2).sum()
        slope = inverse - np.outer(alpha, alpha)
        gradient = 0.5 * v * np.append(flat @ slope.ravel(), np.trace(slope))
        return float(value), np.append(gradient, gradient[shared].sum()) + away / np.append(spread, common)

    first = np.log(np.append(start, 1.0))
    first[-1] = np.mean(first[:-1][shared] - np.log(centre[shared])) * 0.8
    first[:-1][shared] -= first[-1]
    limits = [*((math.log(c) - 6, math.log(c) + 6) for c in centre), (-5.0, 5.0)]
    found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 30})
    return variances_of(found.x)
