"""The finalists: who may still be the best after the search, at the stated confidence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.pareto.front import ASKED, ASSUMED, COST, Point, points, searched
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.study.outcome import Measured
from tuner.study.store import TrialRecord
from tuner.verify.arm import Finalist
from tuner.verify.capacity import expected
from tuner.verify.racing import LAUNCH_SPREAD, log_error
from tuner.verify.repeats import Spread
from tuner.verify.statistics import pool, share_best

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
    """The configurations of which one is the cheapest at ``confidence`` by what the search measured, at most ``most``;
    those whose cost cannot be told apart in order of latency.

    ``default`` is the engine's own configuration; where the search measured it within SLO at no load, the lowest load
    of ``ladder`` is verified.
    """
    found = [p for p in points(searched(trials), objective) if p.ok]
    spread = launch_spread(trials)
    sd, learnt = launch_sd(spread)
    best: dict[str, Point] = {}
    for point in sorted(found, key=lambda p: (p.cost, p.latency, p.trial)):
        best.setdefault(point.config.hash, point)
    base = best.pop(default.hash, None)
    measured = {t.number: t.outcome.steps for t in trials if isinstance(t.outcome, Measured)}

    def finalist(point: Point, label: str, baseline: bool = False, promise: float = 1.0) -> Finalist:
        load = expected(measured.get(point.trial, ()), objective.slos)
        load = point.load if math.isnan(load) else load
        return Finalist(label, point.config, load, point.cost, point.cost_interval, point.trial, baseline, promise)

    baseline = finalist(base, DEFAULT, True) if base else Finalist(DEFAULT, default, min(ladder), baseline=True)
    others = list(best.values())
    shares = may_be_best(others, sd, confidence)
    # a cost that differs by less than launches do is no order: then the lower latency is the better promise
    cheapest = min((p.cost for p, _ in shares), default=1.0)
    doubtful = sorted(
        shares, key=lambda row: (round(math.log(row[0].cost / cheapest) / max(sd, 1e-9)), row[0].latency, row[0].trial)
    )
    chosen = tuple(finalist(p, f"trial {p.trial}", promise=share) for p, share in doubtful[:most])
    text = f"{len(doubtful)} of {len(others)} configurations may be the cheapest at {confidence * 100:g} %"
    text += f"; at most the first {most} are verified" if len(doubtful) > most else ""
    text += "" if learnt else f" (assuming that launches differ by {LAUNCH_SPREAD * 100:g} %)"
    text = text if others else "no other configuration met the SLOs in the search, so the default alone is measured"
    return Shortlist(chosen, baseline, len(doubtful), len(others), text + ".")


def may_be_best(
    found: Sequence[Point], spread: float, confidence: float = 0.95, seed: int = 0
) -> list[tuple[Point, float]]:
    """The smallest set of ``found`` that holds the cheapest with probability ``confidence``, each with its probability
    of being it, the most probable first. Log costs are drawn from normal distributions around what was measured (flat
    prior), with the variance within the launch and that of launches added."""
    if not found:
        return []
    error = np.array([log_error(p, "cost", spread) for p in found])
    draws = np.random.default_rng(seed).normal(np.log([p.cost for p in found]), error, (4000, len(found)))
    shares = share_best(draws)
    kept: list[tuple[Point, float]] = []
    for i in sorted(range(len(found)), key=lambda i: (-shares[i], found[i].cost, found[i].trial)):
        if sum(share for _, share in kept) >= confidence:
            break
        kept.append((found[i], float(shares[i])))
    return kept


def launch_sd(spread: Spread) -> tuple[float, bool]:
    """The standard deviation by which launches differ, and whether it was learnt: from too few repeats it is
    :data:`LAUNCH_SPREAD`."""
    learnt = spread.freedom >= ASSUMED
    return (math.sqrt(spread.variance) if learnt else LAUNCH_SPREAD), learnt


def launch_spread(trials: Sequence[TrialRecord], metric: str = COST) -> Spread:
    """What repeats in the search say of the launch-to-launch spread of log cost (or of another ``metric``):
    configurations measured in three or more trials at the same load and on the same window. The first of them does not
    count: it is why the others were made (a lucky best is measured again), and would make launches look more different
    than they are. Where goodput counts what was asked for, a cost does not count either: every launch that holds a load
    costs the same there, and which load it holds is what launches differ by."""
    groups: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for trial in trials:
        if trial.role == "search" and isinstance(trial.outcome, Measured):
            for step in trial.outcome.steps:
                value = step.metrics.get(metric, math.nan)
                if step.ok and 0 < value < math.inf and not (metric == COST and ASKED in step.metrics):
                    groups[trial.config.hash, step.load, step.window].append(math.log(value))
    # the loads of one pair of launches share those launches: one load per configuration counts
    highest: dict[tuple[str, str], tuple[float, list[float]]] = {}
    for (config, load, window), values in groups.items():
        if len(values) > 2 and load > highest.get((config, window), (-1.0, []))[0]:
            highest[config, window] = (load, values)
    return Spread(*pool([(float(np.var(v[1:], ddof=1)), float(len(v) - 2)) for _, v in highest.values()]))
