"""How far the analytic model's constants may still be wrong, whatever launches have made of them.

The likeliest constants are one guess of many. Launches that all have two drafted tokens say little of how many are
accepted, and a search that takes the guess for the truth never tries four. So what a model expects where its constants
are moved becomes directions of the surrogate, with prior means of weight 0 (a linearised calibration: Kennedy and
O'Hagan 2001, J. R. Statist. Soc. B 63(3), section 4.3; Rasmussen and Williams 2006, section 2.7). Launches narrow them
as they do everything else; what they leave open, an expected improvement sees. Of as many directions as constants, the
few that change the predictions most are kept (the singular vectors of the changes by one standard deviation of each).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.search.calibration import BOUND, Calibratable
from tuner.search.candidates import Candidates
from tuner.search.foresight import Foresight
from tuner.search.surrogate import Array, Codes

QUANTITIES = ("capacity", "latency", "cost")
DIRECTIONS = 3
ASKED_OF = 24  # candidates of which every constant's effect is asked
NUDGE = -0.15  # log units; down, since shares and rates end at one
STEP = 3.0  # change of a prediction, times that of a constant: beyond lies a step
AT_MOST = 1.0  # log units that a prediction changes: beyond, the model has left what it knows
SHARE = 0.01  # of all changes (squared) that a direction explains, at least
CENTRE_ON = 400  # candidates over which the changes are centred


@dataclass(frozen=True, slots=True)
class Doubts:
    """What the model expects around ``base`` (its constants times ``factors``): with the constants ``moved`` by one
    standard deviation in each direction. Where it cannot be asked with such constants, nothing changes. ``slopes``
    (constants, predictions) are the derivatives that the directions came from, ``open`` the variance of predictions
    that they stood for."""

    base: Foresight
    factors: Mapping[str, float]
    moved: Sequence[Foresight]
    slopes: Array
    open: float

    @classmethod
    def of(
        cls, base: Foresight, model: Calibratable, factors: Mapping[str, float], covariance: Array, seed: int
    ) -> Doubts:
        """``base`` is what ``model`` expects with its constants times ``factors``, whose logarithms are known up to
        ``covariance`` (:func:`tuner.search.calibration.uncertainty`). The model is asked of :data:`ASKED_OF` candidates
        for each constant, and of all for each direction."""
        doubts = {name: sd for name, sd in model.doubts().items() if sd > 0}

        def moved(by: Mapping[str, float], candidates: Candidates) -> Foresight:
            logs = {n: math.log(factors.get(n, 1.0)) + by.get(n, 0.0) for n in {**factors, **by}}
            ends = {n: BOUND * doubts.get(n, math.inf) for n in logs}
            scaled = model.scaled({n: math.exp(min(max(log, -ends[n]), ends[n])) for n, log in logs.items()})
            return Foresight(candidates, base.objective, base.loads, scaled, base.model, forgiving=True)

        base.look()
        fits = np.nonzero(base.short_bytes <= 0)[0]
        some = np.random.default_rng([seed, 3]).permutation(fits)[:ASKED_OF]
        few = Candidates(base.candidates.space)
        few.add(base.candidates.params[i] for i in some)
        if not doubts or not few.params:
            return cls(base, dict(factors), (), np.zeros((len(doubts), 0)), 0.0)
        here, every, slopes = moved({}, few), np.arange(len(few.params)), []
        for name in doubts:
            there = moved({name: NUDGE}, few)
            slope = np.hstack([_change(here, there, quantity, every) for quantity in QUANTITIES]) / NUDGE
            slope = np.clip(np.nan_to_num(slope), -STEP, STEP)
            slopes.append((slope - slope.mean(0)).ravel())
        root = np.linalg.cholesky(covariance)
        vectors, values, _ = np.linalg.svd(root.T @ np.array(slopes), full_matrices=False)
        along = root @ vectors
        along = along * -np.sign(
            along[np.argmax(np.abs(along), axis=0), np.arange(along.shape[1])]
        )  # the most goes down
        kept = np.nonzero(values**2 > SHARE * (values**2).sum())[0][:DIRECTIONS]
        steps = [dict(zip(doubts, along[:, k].tolist(), strict=True)) for k in kept]
        found = [moved(by, base.candidates) for by in steps]
        return cls(base, dict(factors), found, np.array(slopes), float((values**2).sum()))

    def stale(self, model: Calibratable, factors: Mapping[str, float], covariance: Array) -> bool:
        """Whether a constant has moved by more than half of what it was doubted, launches have settled half of what was
        open, or nothing was found to fit."""
        left = float(np.sum(self.slopes * (covariance @ self.slopes)))
        return (
            not self.moved
            or left < 0.5 * self.open
            or any(
                abs(math.log(factors.get(name, 1.0) / self.factors.get(name, 1.0))) > 0.5 * sd
                for name, sd in model.doubts().items()
            )
        )

    def changes(self, quantity: str, at: Codes) -> list[Array]:
        """Per direction the change of a quantity's logarithm at these candidates (candidates, loads), less its mean; 0
        where one of the two does not fit."""
        first, found = np.arange(min(CENTRE_ON, len(self.base.candidates.params))), []
        for there in self.moved:
            over = _change(self.base, there, quantity, first)
            centre = np.nanmean(over) if np.isfinite(over).any() else 0.0
            found.append(np.nan_to_num(_change(self.base, there, quantity, at) - centre))
        return found


def _change(here: Foresight, there: Foresight, quantity: str, at: Codes) -> Array:
    """(candidates, loads), NaN where one of the two does not fit."""
    for foresight in (here, there):
        foresight.look()
    change = np.clip(getattr(there, quantity)[at] - getattr(here, quantity)[at], -AT_MOST, AT_MOST)
    return change if change.ndim == 2 else change[:, None]
