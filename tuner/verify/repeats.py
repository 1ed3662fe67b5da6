"""Repeats: the same configurations launched again and again on the same windows, and what can be concluded from that.

The model, on the logarithm of a metric:

    y[arm, round, window] = arm + round + window + arm x window + launch + rest

A round launches every arm once, so slow drift of the machine falls on all arms alike; a window is measured by every
launch, so that hard traffic falls on all arms alike. What separates two arms is then judged against how much launches
differ (``launch``) and how much the difference itself changes from window to window (``arm x window``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.verify.statistics import Estimate, pool

NOTHING = (0.0, 0.0)
BLOCKS = 10  # degrees of freedom taken for a variance between blocks of requests inside one window
FEW = 3  # degrees of freedom: with fewer, pairing launches by round costs more than it gains


@dataclass(frozen=True, slots=True)
class Spread:
    """How much launches of one configuration differ: variance of the log metric and its degrees of freedom."""

    variance: float = 0.0
    freedom: float = 0.0


NO_SPREAD = Spread()


class Repeats:
    """``values`` maps (arm, round, window) to the log of a metric. An arm may miss rounds (it dropped out); a launch
    that did not measure every window of the table is left out. ``known`` is a launch spread learnt elsewhere (repeats
    in the search) that is pooled with the one seen here. ``inside`` maps cells to the variance that the measurement
    itself stated (its interval over blocks of requests)."""

    def __init__(
        self,
        values: Mapping[tuple[str, int, str], float],
        known: Spread | None = None,
        inside: Mapping[tuple[str, int, str], float] | None = None,
    ) -> None:
        self.windows: tuple[str, ...] = tuple(dict.fromkeys(w for _, _, w in values))
        launches = sorted({(arm, number) for arm, number, _ in values}, key=lambda key: (key[1], key[0]))
        rows: list[tuple[str, int, np.ndarray]] = []
        for arm, number in launches:
            row = np.array([values.get((arm, number, w), math.nan) for w in self.windows])
            if np.all(np.isfinite(row)):
                rows.append((arm, number, row))
        self.launches = [(arm, number) for arm, number, _ in rows]
        self.arms: tuple[str, ...] = tuple(dict.fromkeys(arm for arm, _ in self.launches))
        self.rounds: tuple[int, ...] = tuple(sorted({number for _, number in self.launches}))
        self._cells = np.array([row for _, _, row in rows]).reshape(len(rows), len(self.windows))
        self._known = known or NO_SPREAD
        self._within = dict(inside or {})

    def count(self, arm: str) -> int:
        """How many launches of ``arm`` measured every window."""
        return sum(1 for name, _ in self.launches if name == arm)

    def linked(self, arm: str) -> frozenset[str]:
        """The arms that ``arm`` can be compared with: those launched in a round with it, in a round with one of those,
        and so on, itself included. Between others the difference of rounds cannot be told from that of arms."""
        found, grown = frozenset[str](), frozenset({arm} & set(self.arms))
        while grown != found:
            found, rounds = grown, {number for name, number in self.launches if name in grown}
            grown = frozenset(name for name, number in self.launches if number in rounds)
        return found

    def ahead(self, arm: str, other: str, by: float = 0.0) -> bool:
        """Whether ``arm`` measured lower than ``other``, by more than ``by``, on every window, in the mean over its
        launches."""
        return bool(np.all(self._of(arm).mean(axis=0) + by < self._of(other).mean(axis=0)))

    def estimate(self, arm: str) -> Estimate:
        """The arm's own mean, over launches and windows.

        Its error holds three things. What launches differ by in this session averages out over the arm's R launches.
        What they differ by beyond that, seen in longer times (``known``), is drift that this session cannot average
        out: it counts in full. Windows are crossed with launches and come on top:
        ``s2_here / R + (s2_over_time - s2_here)`` and, as a part of its own, ``s2_window / W - s2_rest / (R W)``.
        Three windows may look alike by chance: their variance counts as at least what the traffic inside a window
        makes it (``inside``).
        """
        mine = self._of(arm)
        if len(mine) == 0:
            raise ValueError(f"{arm} was not measured")
        count, width = mine.shape
        here, over_time = self.spread(), self.total()
        averaged = min(here.variance, over_time.variance)
        launches = (averaged / count + over_time.variance - averaged, over_time.freedom)
        windows, rest = NOTHING, 0.0
        if width > 1:
            spread, window_freedom = self._window_variance(arm, mine)
            windows = (spread / width, window_freedom)
            rest = self._rest()[0] / (count * width)
        return _estimate(float(mine.mean()), launches, windows, rest)

    def difference(self, arm: str, other: str, more: int = 0, wider: int = 0) -> Estimate:
        """``arm`` minus ``other``: paired by round and window, by least squares of the launch means on arm and round
        (for two arms in every round: the paired t test). The error holds the launch spread and the change of the
        difference from window to window, each pooled over the arms. Where pairing leaves
        fewer than :data:`FEW` degrees of freedom (two arms in three rounds: two) the launch spread is what launches of
        these two differ by, whatever the round: that holds what rounds differ by as well and so is rather too large,
        but is surer (four). It is the same for both arms only if their launches differ alike.

        ``more`` rounds of the two and ``wider`` windows are imagined that differ as the measured ones do: how sure the
        difference would then be. Where no rounds link the two (:meth:`linked`), nothing is known: NaN.
        """
        if other not in self.linked(arm):
            return Estimate(math.nan, (NOTHING,))
        arms, means = self.arms, self._cells.mean(axis=1)
        design, contrast = self._design(arm, other)
        solution = np.linalg.lstsq(design, means, rcond=None)[0]
        paired = self._inside()
        own = self._own(arm, other)
        seen = own if _surer(own.freedom, paired.freedom) else paired
        then = own.freedom + 2 * more, paired.freedom + more
        freedom = then[0] if _surer(*then) else then[1]
        leverage = float(contrast @ np.linalg.pinv(design.T @ design) @ contrast)
        launches = (seen.variance / (1 / leverage + more / 2), freedom)
        windows, rest, width = NOTHING, 0.0, len(self.windows)
        if width > 1:
            profile = np.array([self._of(name).mean(axis=0) for name in arms])
            profile = profile - profile.mean(axis=1, keepdims=True) - profile.mean(axis=0) + profile.mean()
            squares = float(np.sum(profile**2)) / ((len(arms) - 1) * (width - 1))
            windows = (2 * squares / (width + wider), (len(arms) - 1) * (width + wider - 1))
            rest = self._rest()[0] * leverage / (width + wider)
        return _estimate(float(contrast @ solution), launches, windows, rest)

    def draws(self, count: int, seed: int) -> np.ndarray:
        """``count`` draws of all arms' means (columns in the order of ``arms``) from what the measurements leave open:
        Student's t around the paired estimates (the reference posterior of the normal model; Gelman et al., Bayesian
        Data Analysis, 3rd edition, section 3.2)."""
        rng = np.random.default_rng(seed)
        arms = self.arms
        if len(arms) == 1:
            return np.zeros((count, 1))
        gaps = [self.difference(arm, arms[0]) for arm in arms[1:]]
        freedom = min(g.freedom for g in gaps)
        if freedom <= 0:  # of some arm nothing is known: any order is as likely as another
            return rng.normal(size=(count, len(arms)))
        # every arm carries its own half of the pairwise error, so differences between any two come out right
        share = float(np.mean([g.error for g in gaps])) / math.sqrt(2)
        weight = np.array([math.sqrt(len(self.rounds) / self.count(arm)) for arm in arms])
        middle = np.array([0.0, *(g.mean for g in gaps)])
        scale = np.sqrt(freedom / rng.chisquare(freedom, size=(count, 1)))
        return middle + rng.normal(size=(count, len(arms))) * share * weight * scale

    def spread(self) -> Spread:
        """The launch spread seen here, pooled over the arms."""
        return Spread(*pool([_variance(self._of(name).mean(axis=1)) for name in self.arms]))

    def total(self) -> Spread:
        """What launches of one arm differ by over time: the spread seen here and the ``known`` one, pooled."""
        own = self.spread()
        return Spread(*pool([(own.variance, own.freedom), (self._known.variance, self._known.freedom)]))

    def _window_variance(self, arm: str, mine: np.ndarray) -> tuple[float, float]:
        """The variance of one window's mean, and its degrees of freedom."""
        seen, freedom = _variance(mine.mean(axis=0))
        within = [self._within[cell] for cell in self._within if cell[0] == arm and cell[2] in self.windows]
        floor = float(np.mean(within)) if within else 0.0
        return (seen, freedom) if seen >= floor else (floor, freedom + BLOCKS * mine.shape[1])

    def _of(self, arm: str) -> np.ndarray:
        return self._cells[[i for i, (name, _) in enumerate(self.launches) if name == arm]]

    def _inside(self) -> Spread:
        """What launches of an arm differ by within a round: the residual variance of launch means on arm and round."""
        design, means = self._design(self.arms[0], self.arms[0])[0], self._cells.mean(axis=1)
        solution, _, rank, _ = np.linalg.lstsq(design, means, rcond=None)
        residual, freedom = means - design @ solution, len(means) - int(rank)
        return Spread(float(residual @ residual) / freedom, freedom) if freedom > 0 else NO_SPREAD

    def _own(self, arm: str, other: str) -> Spread:
        """The launch spread of these two; unknown where one of them was launched once (it would borrow the other's)."""
        both = [_variance(self._of(name).mean(axis=1)) for name in (arm, other)]
        return Spread(*pool(both)) if all(freedom > 0 for _, freedom in both) else NO_SPREAD

    def _design(self, arm: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        columns = [*self.arms, *self.rounds[1:]]
        design = np.zeros((len(self.launches), len(columns)))
        for i, (name, number) in enumerate(self.launches):
            design[i, self.arms.index(name)] = 1.0
            if number in self.rounds[1:]:
                design[i, len(self.arms) + self.rounds[1:].index(number)] = 1.0
        contrast = np.zeros(len(columns))
        contrast[self.arms.index(arm)] += 1.0
        contrast[self.arms.index(other)] -= 1.0
        return design, contrast

    def _rest(self) -> tuple[float, float]:
        """What neither arm, launch nor window explains: variance and freedom of one cell."""
        squares, freedom = 0.0, 0
        for arm in self.arms:
            cells = self._of(arm)
            rows, columns = cells.shape
            left = cells - cells.mean(axis=1, keepdims=True) - cells.mean(axis=0) + cells.mean()
            squares += float(np.sum(left**2))
            freedom += (rows - 1) * (columns - 1)
        return (squares / freedom if freedom > 0 else 0.0), freedom


def _surer(own: float, paired: float) -> bool:
    """Whether so many degrees of freedom of two arms' own launches are worth more than those of their pairs."""
    return paired < FEW and own > paired


def _variance(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    if len(values) < 2:
        return NOTHING
    return float(np.var(values, ddof=1)), len(values) - 1.0


def _estimate(middle: float, launches: tuple[float, float], windows: tuple[float, float], rest: float) -> Estimate:
    """What no factor explains (``rest``) is in both variances: it is taken out of the windows' once."""
    if windows[1] <= 0:
        return Estimate(middle, (launches,))
    return Estimate(middle, (launches, (max(windows[0] - rest, 0.0), windows[1])))
