"""The recommendation of a study folder: what verification said where there was one, without the flags that ablation
found superfluous; else the choice from the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tuner.errors import alike
from tuner.pareto.choice import Change, Choice, choose
from tuner.pareto.front import Interval, Point, level, points, searched, trusted_steps
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import grown
from tuner.study.price import COST, GOODPUT
from tuner.study.store import EXHAUSTED, UNFOUND, AsWritten, Store, TrialRecord, read_json
from tuner.verify.arm import as_range
from tuner.verify.fill import WHY, unfilled
from tuner.words import figure

SAME = 4  # so many configurations at one cost are said to be too many


def recommended(store: Store, study: Study, trials: Sequence[TrialRecord] | None = None) -> Choice:
    """``verify.json`` decides where it holds a verdict: its configuration, load, cost and latency come from windows
    that the search never saw. Where ``ablation.json`` took that configuration apart, its smallest one takes its place,
    with the load, cost and latency that were measured of it (an earlier version's file has its cost alone). Otherwise
    :func:`choose` over the trials of the search. The text says where windows were too short for a server to fill and
    the ladder too low for the search, and ends with what the quality floor said of it. ``trials`` are the store's, of a
    caller that has read them."""
    trials = store.trials() if trials is None else trials
    choice = _recommended(store, study, trials)
    if choice.point is None:
        return choice
    # (verdicts of earlier versions say it themselves)
    short = "" if WHY in choice.text else short_windows(study, trials, choice.point)
    said = [choice.text, short, low_ladder(study, trials), quality_of(trials, choice.point.config)]
    return replace(choice, text="\n\n".join(filter(None, said)))


def short_windows(study: Study, trials: Sequence[TrialRecord], point: Point) -> str:
    """What the windows of ``point`` are too short for (:func:`unfilled`); empty where for nothing."""
    own = trusted_steps(t for t in trials if t.config.hash == point.config.hash)
    return unfilled(study, [step for _, step in own], point.load)


def low_ladder(study: Study, trials: Sequence[TrialRecord]) -> str:
    """Where most configurations of the search held the ladder's highest load at one cost, so that it saw no difference
    between them: a default that all but fails lays a low ladder. Empty where it saw one."""
    mine = searched(trials)
    found = points(mine, study.objective)
    top = max(grown(study.load.ladder, (trial.outcome for trial in mine)))
    configs = {point.config.hash for point in found}
    held = {p.config.hash: p for p in found if p.ok and p.load >= top}
    cheapest = min(held.values(), key=lambda p: p.cost, default=None)
    same = sum(level(p, cheapest) for p in held.values()) if cheapest else 0
    if same < SAME or 2 * same <= len(configs):
        return ""
    more = "whose trace fills higher loads" if study.grows else "with higher loads (load.ladder)"
    return (
        f"{same} of the search's {len(configs)} configurations held the ladder's highest load ({figure(top)}), where "
        "their costs cannot be told apart: it could not choose between them. "
        f"In a study {more} it could."
    )


def quality_of(trials: Sequence[TrialRecord], config: ServingConfig) -> str:
    """What the quality floor last said of ``config``, in words; empty where nothing was to be checked."""
    return next((t.quality for t in reversed(trials) if t.config.hash == config.hash and t.quality), "")


def _recommended(store: Store, study: Study, trials: Sequence[TrialRecord]) -> Choice:
    path = store.folder / "verify.json"
    verdict = read_json(path) if path.exists() else {}
    if not isinstance(verdict, Mapping) or "arms" not in verdict or "choice" not in verdict:
        choice = choose(trials, study.objective)
        return choice if trials else replace(choice, text=_all_refused(store) or choice.text)
    with AsWritten(path):
        return _told(verdict, store, study, trials)


def _all_refused(store: Store) -> str:
    """What a search without a launch says, where it has ended; else nothing."""
    ended = [event.get("why") for event in store.events() if event.get("event") == "ended"]
    reasons = {str(row["reason"]): 1 for row in store.refused()}
    which = {EXHAUSTED: "of the space", UNFOUND: "that was looked at"}.get(str(ended[-1]) if ended else "")
    if which is None or not reasons:
        return ""
    return f"Every configuration {which} is refused before a launch: {'; '.join(alike(reasons))}."


def _told(verdict: Mapping[str, Any], store: Store, study: Study, trials: Sequence[TrialRecord]) -> Choice:
    """What ``verify.json`` says, with its ablation."""
    text = plain(str(verdict["text"]))
    arms = {arm["label"]: arm for arm in verdict["arms"]}
    chosen = arms.get(verdict["choice"])
    if chosen is None or not verdict["config"]:
        return Choice(None, None, None, None, (), None, text)
    config = ServingConfig.from_dict(verdict["config"])
    trial = verdict["trial"]
    point = _point(chosen, config, None if trial is None else int(trial), trials, bool(verdict["is_default"]))
    if verdict["is_default"]:
        return Choice(point, point, None, None, (), None, text)
    default = study.space.config(study.space.default(), study.model)
    cost_change, latency_change = _change(chosen["difference"]), _change(chosen["latency_difference"])
    smaller = ablation(store, study, config)
    if smaller and smaller["config"].hash != config.hash:
        small: ServingConfig = smaller["config"]
        again = tuple(t.number for t in trials if t.config.hash == small.hash and t.role == "ablate")
        cost, between = _times(point.cost, point.cost_interval, smaller["cost_change"])
        point = replace(point, config=small, trials=again, cost=cost, cost_interval=between)
        cost_change = _further(cost_change, smaller["cost_change"])
        if own := smaller["arm"]:
            point = replace(_point(own, small, None, trials, small.hash == default.hash), trials=again)
            latency_change = _further(latency_change, own["latency_difference"])
            name = "the default" if point.baseline else f"trial {point.trial}"
            text = f"Recommended: {name} at load {figure(point.load)}: {chosen['label']} without the flags that "
            text += "proved nothing."
            if point.baseline:
                return Choice(point, point, None, None, (), None, f"{text}\n\n{plain(smaller['text'])}")
            if cost_change:
                text += f" It costs {cost_change} against the default."
    if smaller:
        text += f"\n\n{plain(smaller['text'])}"
    base = verdict["arms"][0]  # verification launches the default before all others
    return Choice(
        point,
        _point(base, default, None, trials, True) if base["holds"] else None,
        cost_change,
        latency_change,
        (),
        None,
        text,
    )


def plain(text: str) -> str:
    """Without the marks of Markdown."""
    return text.replace("**", "").replace("`", "")


def ablation(store: Store, study: Study, config: ServingConfig) -> Mapping[str, Any] | None:
    """``ablation.json`` where it is about ``config``: what it took apart, or what it left of it. One of an earlier
    winner says nothing about this one, whatever flags they share. Its ``config`` is read already; ``winner`` is the
    hash of what was taken apart, ``budget`` the launches that were allowed for it."""
    path = store.folder / "ablation.json"
    found = read_json(path) if path.exists() else None
    if not isinstance(found, Mapping) or not {"config", "effects", "cost_change", "text"} <= found.keys():
        return None
    with AsWritten(path):
        known = {
            "config": ServingConfig.from_dict(found["config"]),
            "winner": str(found.get("winner") or _rebuilt(found["effects"], study)),
            "budget": int(found.get("budget") or found.get("launches", 0)),
            "effects": [
                {"parameter": str(e["parameter"]), "why": str(e["why"]), "cost_without": as_range(e["cost_without"])}
                for e in found["effects"]
            ],
            "cost_change": as_range(found["cost_change"]),
            "text": str(found["text"]),
            "arm": None,
        }
        if arm := found.get("arm"):
            ranges = {name: as_range(arm[name]) for name in ("load_cost", "latency", "latency_difference")}
            known["arm"] = {**ranges, "load": float(arm["load"])}
        return known if config.hash in (known["winner"], known["config"].hash) else None


def _rebuilt(effects: Sequence[Mapping[str, Any]], study: Study) -> str:
    """The hash of the configuration that was taken apart, for files that do not name it: every parameter off its
    default has an effect. Empty where the search space is another one."""
    params = {effect["parameter"]: effect["value"] for effect in effects}
    try:
        known = params.keys() <= {parameter.name for parameter in study.space.parameters}
        return study.space.config(params, study.model).hash if known else ""
    except ValueError:  # a value that the space does not have
        return ""


def _times(value: float, interval: Interval | None, factor: Sequence[float]) -> tuple[float, Interval | None]:
    """``value`` times a measured factor (middle, low, high), as :func:`compare` takes ratios: half widths in
    logarithms, in quadrature. A factor that is not known changes nothing."""
    if not all(math.isfinite(x) and x > 0 for x in factor):
        return value, interval
    middle, low, high = factor
    if interval is None or interval[0] <= 0:
        return value * middle, None
    down = math.hypot(math.log(value / interval[0]), math.log(middle / low))
    up = math.hypot(math.log(interval[1] / value), math.log(high / middle))
    return value * middle, (value * middle * math.exp(-down), value * middle * math.exp(up))


def _further(change: Change | None, factor: Sequence[float]) -> Change | None:
    """``change``, times a measured factor (middle, low, high)."""
    if change is None:
        return None
    value, interval = _times(1 + change.value, _shifted(change.interval, 1), factor)
    return Change(value - 1, _shifted(interval, -1))


def _shifted(interval: Interval | None, by: float) -> Interval | None:
    return (interval[0] + by, interval[1] + by) if interval else None


def _point(
    arm: Mapping[str, Any], config: ServingConfig, trial: int | None, trials: Sequence[TrialRecord], baseline: bool
) -> Point:
    again = tuple(t.number for t in trials if t.role == "verify" and t.config.hash == config.hash)
    if trial is None:
        same = [t for t in trials if t.config.hash == config.hash and not t.again]
        trial = same[0].number if same else -1
    cost, latency = as_range(arm["load_cost"]), as_range(arm["latency"])
    return Point(
        trial=trial,
        load=float(arm["load"]),
        cost=cost[0],
        latency=latency[0],
        cost_interval=_interval(cost),
        latency_interval=_interval(latency),
        baseline=baseline,
        ok=True,
        config=config,
        role="verify",
        trials=again,
        metrics=_served(cost[0], [t for t in trials if t.config.hash == config.hash]),
    )


def _served(cost: float, trials: Sequence[TrialRecord]) -> Mapping[str, float]:
    """Tokens per second within SLO at ``cost``: both together are the price of a second, wherever it was measured. None
    where the launches do not agree on that (an engine that tells costs of its own)."""
    steps = [step.metrics for _, step in trusted_steps(trials)]
    prices = [m[COST] * m[GOODPUT] for m in steps if COST in m and GOODPUT in m]
    if not prices or not cost > 0 or max(prices) > min(prices) * 1.001:
        return {}
    return {GOODPUT: prices[0] / cost}


def _interval(values: Sequence[float]) -> Interval | None:
    _, low, high = values
    return (low, high) if 0 < low <= high else None


def _change(factor: Sequence[float]) -> Change | None:
    factor = as_range(factor)
    if not math.isfinite(factor[0]):
        return None
    between = _interval(factor)
    return Change(factor[0] - 1, (between[0] - 1, between[1] - 1) if between else None)
