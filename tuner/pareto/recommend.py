"""The recommendation of a study folder: what verification said where there was one, else the choice from the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.pareto.choice import Change, Choice, choose
from tuner.pareto.front import Interval, Point
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.store import Store, TrialRecord, read_json


def recommended(store: Store, study: Study) -> Choice:
    """``verify.json`` decides where it holds a verdict: its configuration, load, cost and latency come from windows
    that the search never saw. Otherwise :func:`choose` over the trials of the search."""
    trials = store.trials()
    path = store.folder / "verify.json"
    verdict = read_json(path) if path.exists() else {}
    if not isinstance(verdict, Mapping) or "arms" not in verdict or "choice" not in verdict:
        return choose(trials, study.objective)
    text = str(verdict["text"]).replace("**", "")
    arms = {arm["label"]: arm for arm in verdict["arms"]}
    chosen = arms.get(verdict["choice"])
    if chosen is None or not verdict["config"]:
        return Choice(None, None, None, None, (), None, text)
    config = ServingConfig.from_dict(verdict["config"])
    point = _point(chosen, config, verdict["trial"], trials, bool(verdict["is_default"]))
    if verdict["is_default"]:
        return Choice(point, point, None, None, (), None, text)
    default = study.space.config(study.space.default(), study.model)
    base = verdict["arms"][0]  # verification launches the default before all others
    return Choice(
        point,
        _point(base, default, None, trials, True) if base["holds"] else None,
        _change(chosen["difference"]),
        _change(chosen["latency_difference"]),
        (),
        None,
        text,
    )


def _point(
    arm: Mapping[str, Any], config: ServingConfig, trial: int | None, trials: Sequence[TrialRecord], baseline: bool
) -> Point:
    again = tuple(t.number for t in trials if t.role == "verify" and t.config.hash == config.hash)
    if trial is None:
        trial = next((t.number for t in trials if t.config.hash == config.hash), -1)
    cost, latency = arm["load_cost"], arm["latency"]
    return Point(
        trial=trial,
        load=arm["load"],
        cost=cost[0],
        latency=latency[0],
        cost_interval=_interval(cost),
        latency_interval=_interval(latency),
        baseline=baseline,
        ok=True,
        config=config,
        role="verify",
        trials=again,
    )


def _interval(values: Sequence[float]) -> Interval | None:
    return (values[1], values[2]) if all(map(math.isfinite, values[1:])) else None


def _change(factor: Sequence[float]) -> Change | None:
    if not math.isfinite(factor[0]):
        return None
    between = _interval(factor)
    return Change(factor[0] - 1, (between[0] - 1, between[1] - 1) if between else None)
