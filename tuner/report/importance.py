"""Which parameters mattered: how much of the order of the measured trials each parameter accounts for by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.pareto.front import Point
from tuner.report.summary import Summary

if TYPE_CHECKING:
    import numpy as np

ENOUGH = 8  # configurations: below that any order looks like a pattern
PERMUTATIONS = 999
NOT_APPLICABLE = "(does not apply)"


@dataclass(frozen=True, slots=True)
class Share:
    """Of one target: ``share`` of the variance of the ranks that the parameter's values account for (0 to 1, corrected
    for the number of values), ``p`` the probability of at least that much by chance."""

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

    The share is eta squared of the ranks (Kruskal and Wallis), corrected as adjusted R squared is; ``p`` from random
    permutations. One parameter at a time: what two only do together is not seen.
    """
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
    rows = []
    for parameter in s.study.space.parameters:
        values = [cost[key].config.params.get(parameter.name, NOT_APPLICABLE) for key in configs]
        if len(set(values)) > 1 and len(set(values)) < len(configs) - 1:
            on_cost = _share(values, [cost[key].cost for key in configs], seed)
            on_latency = _share(values, [latency[key].latency for key in configs], seed)
            rows.append(Row(parameter.name, on_cost, on_latency))
    rows.sort(key=lambda row: -max(row.cost.share, row.latency.share))
    note = "" if rows else "No parameter was varied among the configurations that met the SLOs."
    return Importance(tuple(rows), len(configs), note)


def _share(values: Sequence[object], target: Sequence[float], seed: int) -> Share:
    import numpy as np
    from scipy.stats import rankdata

    names = list(dict.fromkeys(values))
    groups = np.array([[value == name for name in names] for value in values], dtype=float)  # (n, k)
    ranks = rankdata(target)
    n, k = groups.shape
    found = float(_eta_squared(ranks[None, :], groups)[0])
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    as_much = int((_eta_squared(shuffled, groups) >= found - 1e-12).sum())
    return Share(max(0.0, 1 - (1 - found) * (n - 1) / (n - k)), (as_much + 1) / (PERMUTATIONS + 1))


def _eta_squared(ranks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Between over total sum of squares, for every row of ``ranks`` (m, n) and the columns of ``groups`` (n, k)."""
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    between = ((centred @ groups) ** 2 / groups.sum(axis=0)).sum(axis=1)
    total = (centred**2).sum(axis=1)
    return between / total.clip(1e-12)
