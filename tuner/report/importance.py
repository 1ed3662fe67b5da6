"""Which parameters mattered: how much of what the measured configurations differ by each one accounts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.pareto.front import Point
from tuner.report.summary import Summary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENOUGH = 8  # configurations: below that any order looks like a pattern
PERMUTATIONS = 999
CHANCE = 0.05


@dataclass(frozen=True, slots=True)
class Share:
    """Of one target: ``share`` of the variance of its logarithms that the parameter's values account for beyond those
    of the stronger ones (0 to 1, corrected for the number of values), ``p`` the probability that chance alone makes any
    parameter look as strong."""

    share: float
    p: float


@dataclass(frozen=True, slots=True)
class Row:
    """A parameter's shares in cost and in latency."""

    parameter: str
    cost: Share
    latency: Share


@dataclass(frozen=True, slots=True)
class Importance:
    """``rows``, the most important parameter first; empty, with ``note`` saying why, where nothing can be said.
    ``configs`` is over how many configurations."""

    rows: tuple[Row, ...]
    configs: int
    note: str


def importance(s: Summary, seed: int = 0) -> Importance:
    """Over the measured configurations that met the SLOs at some load: their lowest cost and their lowest latency.
    What two parameters only do together is not seen."""
    cost: dict[str, Point] = {}
    latency: dict[str, Point] = {}
    for p in s.points:
        if p.ok:
            cost[p.config.hash] = min(cost.get(p.config.hash, p), p, key=lambda q: q.cost)
            latency[p.config.hash] = min(latency.get(p.config.hash, p), p, key=lambda q: q.latency)
    configs = list(cost)
    if len(configs) < ENOUGH:
        return Importance(
            (), len(configs), f"Too few configurations met the SLOs to say: {len(configs)}; it takes {ENOUGH}."
        )
    varied: dict[str, Sequence[object]] = {}
    for parameter in s.study.space.parameters:
        values = [cost[key].config.params.get(parameter.name) for key in configs]
        if 1 < len(set(values) - {None}) < len(configs) - 1:
            varied[parameter.name] = values
    columns = list(varied.values())
    on_cost = shares(columns, [cost[key].cost for key in configs], seed)
    on_latency = shares(columns, [latency[key].latency for key in configs], seed)
    rows = [Row(*row) for row in zip(varied, on_cost, on_latency, strict=True)]
    rows.sort(key=lambda row: -max(row.cost.share, row.latency.share))
    note = "" if rows else "No parameter was varied among the configurations that met the SLOs."
    return Importance(tuple(rows), len(configs), note)


def shares(columns: Sequence[Sequence[object]], target: Sequence[float], seed: int = 0) -> list[Share]:
    """Of every parameter (a column of values, None where it does not apply), by forward selection.

    A sampler that learns varies parameters together: by itself each one looks as strong as what it was varied with. So
    the strongest is taken first, the others explain what it leaves, and so on while chance does not do as well;
    chance are permutations of what is left (Freedman and Lane, 1983), of which the strongest parameter counts.
    """
    import numpy as np
    from scipy.stats import f

    y = np.log(np.asarray(target, dtype=float))
    n, rest = len(y), y - y.mean()
    total = float(rest @ rest)
    known = np.full((n, 1), n**-0.5)  # orthonormal, what is explained already
    left = {index: _contrasts(column) for index, column in enumerate(columns)}
    found = [Share(0.0, 1.0)] * len(columns)
    rng = np.random.default_rng(seed)
    while left and float(rest @ rest) > max(1e-9 * total, 1e-20 * n):
        shuffled = rng.permuted(np.tile(rest, (PERMUTATIONS, 1)), axis=1).T
        data = np.column_stack([rest, shuffled - known @ (known.T @ shuffled)])
        axes, evidence, gained = {}, {}, {}
        for index, contrasts in left.items():
            u, sizes, _ = np.linalg.svd(contrasts - known @ (known.T @ contrasts), full_matrices=False)
            own = u[:, sizes > 1e-6]
            k, free = own.shape[1], n - known.shape[1] - own.shape[1]
            if k and free > 0:
                between = ((own.T @ data) ** 2).sum(axis=0)
                within = ((data**2).sum(axis=0) - between).clip(1e-12 * total) / free
                axes[index], evidence[index] = own, f.logsf(between / k / within, k, free)
                gained[index] = max(0.0, float(between[0] - k * within[0])) / total
        if not axes:
            break
        best = min(evidence, key=lambda index: evidence[index][0])
        luckiest = np.min([e[1:] for e in evidence.values()], axis=0)
        for index, e in evidence.items():
            p = (int((luckiest <= e[0] + 1e-9).sum()) + 1) / (PERMUTATIONS + 1)
            found[index] = Share(gained[index], p)
        if found[best].p >= CHANCE:
            break
        del left[best]
        known = np.hstack([known, axes[best]])
        rest = rest - axes[best] @ (axes[best].T @ rest)
        for index in left:
            found[index] = Share(0.0, 1.0)
    return found


def _contrasts(column: Sequence[object]) -> NDArray[np.float64]:
    """One column per value; compared only among the configurations where the parameter applies."""
    import numpy as np

    values = [value for value in dict.fromkeys(column) if value is not None]
    groups = np.array([[value == own for value in values] for own in column], dtype=float)
    applies = np.array([own is not None for own in column])
    groups[applies] -= groups[applies].mean(axis=0)
    return groups
