"""The finalists: who may still be the best after the search, at the stated confidence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tuner.pareto.front import COST, Point, points
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Measured
from tuner.study.store import TrialRecord
from tuner.verify.arm import Finalist
from tuner.verify.racing import LAUNCH_SPREAD
from tuner.verify.repeats import Spread
from tuner.verify.statistics import pool

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Shortlist:
    """``finalists`` (most promising first) and the ``baseline``; ``in_doubt`` is how many configurations may be the
    best, of ``measured`` that met the SLOs; ``text`` says it in words."""

    finalists: tuple[Finalist, ...]
    baseline: Finalist
    in_doubt: int
    measured: int
    text: str


def shortlist(
    trials: Sequence[TrialRecord],
    objective: Objective,
    default: ServingConfig,
    ladder: Sequence[float],
    *,
    most: int = 3,
    confidence: float = 0.95,
) -> Shortlist:
    """Every configuration whose cheapest point within SLO is not proven more expensive than the cheapest of all:
    Gupta's subset selection (1965), which holds the true best with ``confidence``, on log cost with the search's intervals
    and the launch spread. In order of cost, those of equal cost by latency; at most ``most`` of them.

    ``default`` is the engine's own configuration; where the search measured it within SLO at no load, the lowest load
    of ``ladder`` is verified.
    """
    found = [p for p in points([t for t in trials if t.role == "search"], objective) if p.ok]
    spread = launch_spread(trials)
    sd = math.sqrt(spread.variance) if spread.freedom >= 3 else LAUNCH_SPREAD
    best: dict[str, Point] = {}
    for point in sorted(found, key=lambda p: (p.cost, p.latency, p.trial)):
        best.setdefault(point.config.hash, point)
    base = best.pop(default.hash, None)
    baseline = _finalist(base, DEFAULT, True) if base else Finalist(DEFAULT, default, min(ladder), baseline=True)
    others = list(best.values())
    doubtful = may_be_best(others, sd, confidence)
    # a cost that differs by less than launches do is no order: then the lower latency is the better promise
    cheapest = doubtful[0].cost if doubtful else 1.0
    ordered = sorted(doubtful, key=lambda p: (round(math.log(p.cost / cheapest) / max(sd, 1e-9)), p.latency, p.trial))
    chosen = tuple(_finalist(p, f"trial {p.trial}", False) for p in ordered[:most])
    text = f"{len(doubtful)} of {len(others)} configurations may be the cheapest at {confidence * 100:g} %"
    text += f"; the first {most} are verified" if len(doubtful) > most else ""
    text += "" if spread.freedom >= 3 else f" (assuming that launches differ by {LAUNCH_SPREAD * 100:g} %)"
    return Shortlist(chosen, baseline, len(doubtful), len(others), text + ".")


def may_be_best(found: Sequence[Point], spread: float, confidence: float = 0.95) -> list[Point]:
    """Those of ``found`` that are not proven more expensive than the cheapest, cheapest first.

    A point stays while ``log(cost / cheapest) <= d * sqrt(its variance + the cheapest's)``, where ``d`` makes
    ``k - 1`` such comparisons hold at once (Sidak)."""
    ordered = sorted(found, key=lambda p: (p.cost, p.latency, p.trial))
    if len(ordered) < 2:
        return ordered
    reach = float(stats.norm.ppf(confidence ** (1 / (len(ordered) - 1))))
    first = ordered[0]

    def variance(point: Point) -> float:
        inside = 0.0
        if point.cost_interval and 0 < point.cost_interval[0] <= point.cost_interval[1] < math.inf:
            inside = math.log(point.cost_interval[1] / point.cost_interval[0]) / (2 * 1.96)
        return inside**2 + spread**2 / max(len(point.trials), 1)

    return [p for p in ordered if math.log(p.cost / first.cost) <= reach * math.sqrt(variance(p) + variance(first))]


def launch_spread(trials: Sequence[TrialRecord]) -> Spread:
    """What repeats in the search say of the launch-to-launch spread of log cost: configurations measured in several
    trials at the same load and on the same window."""
    groups: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for trial in trials:
        if trial.role == "search" and isinstance(trial.outcome, Measured):
            for step in trial.outcome.steps:
                cost = step.metrics.get(COST, math.nan)
                if step.ok and 0 < cost < math.inf:
                    groups[trial.config.hash, step.load, step.window].append(math.log(cost))
    # the loads of one pair of launches share those launches: one load per configuration counts
    highest: dict[tuple[str, str], tuple[float, list[float]]] = {}
    for (config, load, window), values in groups.items():
        if len(values) > 1 and load > highest.get((config, window), (-1.0, []))[0]:
            highest[config, window] = (load, values)
    return Spread(*pool([(float(np.var(v, ddof=1)), float(len(v) - 1)) for _, v in highest.values()]))


def _finalist(point: Point, label: str, baseline: bool) -> Finalist:
    return Finalist(label, point.config, point.load, point.cost, point.cost_interval, point.trial, baseline)
