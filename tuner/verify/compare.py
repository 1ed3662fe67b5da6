"""Two studies side by side (engine versions, GPUs, traces): front against front, with significance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from tuner.errors import UsageError
from tuner.pareto.front import COST, front, points, searched, trusted_steps
from tuner.spec.objective import Objective
from tuner.study.store import TrialRecord
from tuner.verify.finalists import launch_sd, launch_spread
from tuner.verify.racing import log_error

DOUBT = 0.025  # that a side is called cheaper and is not
LONG = 80  # characters of two values from which on only their name is said
LATENCY_DOUBT = 0.005  # that the latency of any point of a study lies beyond its limit


@dataclass(frozen=True, slots=True)
class Side:
    """One study: its trials, objective, and facts to hold against the other's (engine, GPU, trace): each a text, or
    values by name."""

    name: str
    trials: Sequence[TrialRecord]
    objective: Objective
    facts: Mapping[str, Any]

    @property
    def loads(self) -> list[float]:
        """Those at which anything was measured."""
        return sorted({step.load for _, step in trusted_steps(searched(self.trials))})


@dataclass(frozen=True, slots=True)
class Level:
    """The cheapest within SLO at a latency of at most ``latency_s``: USD per million output tokens of both (infinite:
    none seen), and ``ratio`` second over first (middle, low, high at 95 %; 0 and infinite where nothing bounds it).
    ``untried``: 1 or 2 where that side wins only at loads that the other did not try, so that nothing is proven."""

    latency_s: float
    first: float
    second: float
    ratio: tuple[float, float, float]
    untried: int = 0

    @property
    def winner(self) -> int:
        """1 or 2 where the interval leaves out "equal", else 0."""
        _, low, high = self.ratio
        return 2 if high < 1 else 1 if low > 1 else 0

    @property
    def alone(self) -> bool:
        """Whether the winner is the only side that keeps this latency, so that no cost was compared."""
        return bool(self.winner) and math.isinf(max(self.first, self.second))


@dataclass(frozen=True, slots=True)
class _Cloud:
    """The points within SLO of a side, one row each: ``cost`` is logarithmic, ``error`` its standard error; the latency
    lies between ``fastest`` and ``slowest`` for sure, and was measured as ``latency`` (of what was not tried: NaN)."""

    load: np.ndarray

    cost: np.ndarray
    error: np.ndarray
    latency: np.ndarray
    fastest: np.ndarray
    slowest: np.ndarray
    levels: tuple[float, ...]

    @classmethod
    def of(cls, side: Side) -> _Cloud:
        found = [p for p in points(searched(side.trials), side.objective) if p.ok]
        latency = np.array([p.latency for p in found])
        axes = (COST, side.objective.latency_key)
        by_cost, by_latency = (launch_sd(launch_spread(side.trials, axis))[0] for axis in axes)
        reach = np.array([log_error(p, "latency", by_latency) for p in found]) * _z(LATENCY_DOUBT, len(found))
        slowest = latency * np.exp(reach)
        on_front = {p.key for p in front(found)}
        return cls(
            np.array([p.load for p in found]),
            np.log([p.cost for p in found]),
            np.array([log_error(p, "cost", by_cost) for p in found]),
            latency,
            latency * np.exp(-reach),
            slowest,
            tuple(float(at) for p, at in zip(found, slowest, strict=True) if p.key in on_front),
        )

    def at_most(self, tried: Sequence[float], loads: Sequence[float]) -> _Cloud:
        """With what may hold at ``loads`` that are not among those ``tried``: what held at the load tried below, at the
        least cost that this can have and no faster; below all that was tried anything, at no less than was there."""
        parts = [(self.load, self.cost, self.error, self.fastest)]
        for load in loads:
            if not tried or any(math.isclose(load, own) for own in tried):
                continue
            if lower := [own for own in tried if own < load]:
                at = self.load == lower[-1]
                cost, fastest = self.cost[at] - math.log(load / lower[-1]), self.fastest[at]
                parts.append((np.full(len(cost), load), cost, self.error[at], fastest))
            else:
                least = self.cost[self.load == tried[0]].min(initial=np.inf)
                cost = np.array([least if math.isfinite(least) else -np.inf])
                parts.append((np.array([load]), cost, np.zeros(1), np.zeros(1)))
        load, cost, error, fastest = (np.concatenate(part) for part in zip(*parts, strict=True))
        unknown = np.full(len(load) - len(self.load), np.nan)
        latency, slowest = (np.concatenate([own, unknown]) for own in (self.latency, self.slowest))
        return _Cloud(load, cost, error, latency, fastest, slowest, self.levels)

    def cheapest(self, limit: float) -> float:
        """USD of the cheapest that was measured at that latency at most."""
        return float(np.exp(self.cost[self.latency <= limit].min(initial=np.inf)))

    def in_doubt(self, limits: Sequence[float]) -> int:
        """How many points may be the cheapest that keeps one of ``limits``."""
        found = np.zeros(len(self.cost), dtype=bool)
        for limit in limits:
            sure = self.slowest <= limit
            least = (self.cost + _z(DOUBT) * self.error)[sure].min(initial=np.inf)
            found |= sure & (self.cost - _z(DOUBT) * self.error <= least)
        return int(found.sum())


@dataclass(frozen=True, slots=True)
class Comparison:
    """``levels`` by rising latency; ``differences`` what else differs between the studies, in words."""

    first: str
    second: str
    levels: tuple[Level, ...]
    differences: tuple[str, ...]
    text: str
    rows: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(first: Side, second: Side, *, most: int = 12) -> Comparison:
    """Compares what each study offers at the latencies that the points of both fronts keep (at most ``most`` of them).

    One side is proven cheaper where one of its points, which keeps the latency for sure, is cheaper than every point of
    the other that may keep it, and than what that may hold at loads which only this side tried. The limit is corrected
    for how many points of that side may be its cheapest: the lowest of many looks lower than it is, and a study of more
    trials has more of them.

    Raises UsageError where their latency axes are not the same.
    """
    if first.objective.latency != second.objective.latency:
        axes = f"{first.name} has {first.objective.latency}, {second.name} has {second.objective.latency}"
        raise UsageError(
            f"the studies' latencies are not the same thing: {axes}", fix="Compare studies of one objective"
        )
    sides = (first, second)
    clouds = [_Cloud.of(side) for side in sides]
    beside = [clouds[i].at_most(sides[i].loads, sides[1 - i].loads) for i in (0, 1)]
    differences = _differences(first, second)
    latencies = _apart(at for cloud in clouds for at in cloud.levels)
    if len(latencies) > most:
        latencies = [latencies[round(i)] for i in np.linspace(0, len(latencies) - 1, most)]
    z = [_z(DOUBT, cloud.in_doubt(latencies)) for cloud in clouds]
    levels = []
    for limit in latencies:
        costs = [cloud.cheapest(limit) for cloud in clouds]
        low, high = _at_least(limit, clouds[0], beside[1], z[0]), -_at_least(limit, clouds[1], beside[0], z[1])
        middle = math.nan if math.isinf(costs[0]) and math.isinf(costs[1]) else costs[1] / costs[0]
        level = Level(limit, costs[0], costs[1], (middle, math.exp(low), math.exp(high)))
        if not level.winner:
            ahead = [_at_least(limit, clouds[i], clouds[1 - i], z[i]) > 0 for i in (0, 1)]
            level = replace(level, untried=1 if ahead[0] else 2 if ahead[1] else 0)
        levels.append(level)
    rows = tuple(_row(level, first, second) for level in levels)
    return Comparison(
        first.name, second.name, tuple(levels), differences, _text(first, second, levels, differences), rows
    )


def _apart(latencies: Iterable[float], least: float = 1.01) -> list[float]:
    """Rising, without those that the one after makes superfluous: the same question would count twice."""
    kept: list[float] = []
    for latency in sorted(latencies, reverse=True):
        if not kept or latency * least < kept[-1]:
            kept.append(latency)
    return kept[::-1]


def _z(doubt: float, of: int = 1) -> float:
    """The normal quantile for each of ``of`` limits, for all of them to hold but for ``doubt`` (Bonferroni)."""
    return float(-special.ndtri(doubt / max(of, 1)))


def _at_least(limit: float, one: _Cloud, other: _Cloud, z: float) -> float:
    """The lower limit of log cost of ``other`` over ``one``: the best that a point of ``one`` has over all of
    ``other``. Minus infinity where ``one`` has none for sure, infinity where ``other`` cannot have one."""
    sure, may = one.slowest <= limit, other.fastest <= limit
    error = np.hypot(one.error[sure][:, None], other.error[may][None, :])
    gaps = other.cost[may][None, :] - one.cost[sure][:, None] - z * error
    return float(gaps.min(axis=1, initial=np.inf).max(initial=-np.inf))


def _differences(first: Side, second: Side) -> tuple[str, ...]:
    both = [{**side.facts, **_wanted(side.objective)} for side in (first, second)]
    names = dict.fromkeys([*both[0], *both[1]])
    return tuple(words for name in names if (words := _differs(name, *(facts.get(name) for facts in both))))


def _wanted(objective: Objective) -> dict[str, Any]:
    prices = {"": f"${objective.price_usd_per_gpu_hour:g} per GPU-hour"}
    prices |= {gpu: f"${usd:g}" for gpu, usd in objective.prices.items()}
    return {"SLOs": ", ".join(map(str, objective.slos)), "quality": asdict(objective.quality), "price": prices}


def _differs(name: str, one: Any, other: Any) -> str:
    """``name: one / other``, and of values by name those that differ; empty where nothing does."""
    if one == other:
        return ""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return f"{name}: {_shown(one)} / {_shown(other)}"
    differ = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    said = []
    for key in differ:
        values = f"{_shown(one.get(key))} / {_shown(other.get(key))}"
        said.append(f"{key} {values}".strip() if len(values) <= LONG else key)
    return f"{name}: {', '.join(said)}"


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _text(first: Side, second: Side, levels: Sequence[Level], differences: Sequence[str]) -> str:
    names = {1: first.name, 2: second.name}
    won = {side: sum(level.winner == side and not level.alone for level in levels) for side in (1, 2)}
    draws = sum(not level.winner and not level.untried for level in levels)
    alone = {side: sum(level.winner == side and level.alone for level in levels) for side in (1, 2)}
    if not levels:
        verdict = "Neither study has a point within its SLOs."
    elif won[1] and won[2]:
        verdict = f"Each is cheaper somewhere: {first.name} at {won[1]}, {second.name} at {won[2]}"
        verdict += f" of {len(levels)} latencies."
    elif won[1] or won[2]:
        side = 1 if won[1] else 2
        verdict = f"**{names[side]}** is cheaper at {won[side]} of {len(levels)} latencies, proven at 95 %"
        verdict += "; at the others they cannot be told apart." if draws else "."
    else:
        verdict = f"At none of {len(levels)} latencies is either proven cheaper at 95 %."
    for side in (1, 2):
        if alone[side]:
            verdict += f" **{names[side]}** alone is within its SLOs at {alone[side]} of {len(levels)} latencies."
        if untried := sum(level.untried == side for level in levels):
            verdict += f" At {untried} of {len(levels)} latencies **{names[side]}** is cheaper only at loads that"
            verdict += f" {names[3 - side]} did not try, which proves nothing: give both one load.ladder."
    if emulated := [s.name for s in (first, second) if s.facts.get("figures") == "emulated"]:
        verdict += " **Both are emulated**" if len(emulated) == 2 else f" **{emulated[0]} is emulated**"
        verdict += ": its" if len(emulated) == 1 else ": these"
        verdict += " figures come from a model of the hardware; nothing was measured."
    what = f" They differ in {'; '.join(differences)}." if differences else " Nothing else differs between them."
    return verdict + what


def _row(level: Level, first: Side, second: Side) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        f"{first.objective.latency}_ms": level.latency_s * 1e3,
        f"cost {first.name}": number(level.first),
        f"cost {second.name}": number(level.second),
        "ratio": number(level.ratio[0]),
        "ratio_low": number(level.ratio[1]),
        "ratio_high": number(level.ratio[2]),
        "proven": "" if level.alone else ("", first.name, second.name)[level.winner],
        "alone": ("", first.name, second.name)[level.winner] if level.alone else "",
        "untried": ("", first.name, second.name)[level.untried],
    }
