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
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tuner.search.calibration import Calibratable
from tuner.search.candidates import Candidates
from tuner.search.foresight import Foresight
from tuner.search.surrogate import Array, Codes

DIRECTIONS = 3
ASKED_OF = 24  # candidates of which every constant's effect is asked
NUDGE = 0.15  # log units
AT_MOST = 3.0  # change of a prediction, times that of a constant: beyond lies a step
SHARE = 0.01  # of all changes (squared) that a direction explains, at least
CENTRE_ON = 400  # candidates over which the changes are centred


@dataclass(slots=True)
class Doubts:
    """What the model expects around ``base`` (its constants times ``factors``): with the constants moved by one
    standard deviation in each direction."""

    base: Foresight
    factors: Mapping[str, float]
    moved: list[Foresight]
    _centres: dict[tuple[str, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Foresight, model: Calibratable, factors: Mapping[str, float], seed: int) -> Doubts:
        doubts = {name: sd for name, sd in model.doubts().items() if sd > 0}

        def moved(by: Mapping[str, float], candidates: Candidates) -> Foresight:
            scaled = model.scaled({n: factors.get(n, 1.0) * math.exp(by.get(n, 0.0)) for n in {**factors, **by}})
            return Foresight(candidates, base.objective, base.loads, scaled, base.model)

        base.look()
        fits = np.nonzero(base.short_bytes <= 0)[0]
        some = np.random.default_rng([seed, 3]).permutation(fits)[:ASKED_OF]
        few = Candidates(base.candidates.space)
        few.add(base.candidates.params[i] for i in some)
        if not doubts or not few.params:
            return cls(base, dict(factors), [])
        here, changes = moved({}, few), []
        for name, sd in doubts.items():
            there = moved({name: NUDGE}, few)
            apart = [_change(here, there, quantity, np.arange(len(few.params))) for quantity in QUANTITIES]
            slope = np.clip(np.hstack(apart) / NUDGE, -AT_MOST, AT_MOST) * sd
            changes.append((slope - slope.mean(0)).ravel())
        vectors, values, _ = np.linalg.svd(np.array(changes), full_matrices=False)
        kept = np.nonzero(values**2 > SHARE * (values**2).sum())[0][:DIRECTIONS]
        along = [{name: sd * vectors[i, k] for i, (name, sd) in enumerate(doubts.items())} for k in kept]
        return cls(base, dict(factors), [moved(by, base.candidates) for by in along])

    def stale(self, model: Calibratable, factors: Mapping[str, float]) -> bool:
        """Whether a constant has moved by more than half of what it is doubted."""
        return any(
            abs(math.log(factors.get(name, 1.0) / self.factors.get(name, 1.0))) > 0.5 * sd
            for name, sd in model.doubts().items()
        )

    def changes(self, quantity: str, at: Codes) -> list[Array]:
        """Per direction the change of a quantity's logarithm at these candidates (candidates, loads), centred; 0 where
        one of the two does not fit."""
        found = []
        for k, there in enumerate(self.moved):
            if (quantity, k) not in self._centres:
                first = np.arange(min(CENTRE_ON, len(self.base.candidates.params)))
                self._centres[quantity, k] = float(_change(self.base, there, quantity, first).mean())
            found.append(_change(self.base, there, quantity, at) - self._centres[quantity, k])
        return found


QUANTITIES = ("capacity", "latency", "cost")


def _change(here: Foresight, there: Foresight, quantity: str, at: Codes) -> Array:
    for foresight in (here, there):
        foresight.look()
    one, other = getattr(here, quantity)[at], getattr(there, quantity)[at]
    change = np.where(np.isfinite(one) & np.isfinite(other), other - one, 0.0)
    return change if change.ndim == 2 else change[:, None]
