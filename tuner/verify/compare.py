"""Two studies side by side (engine versions, GPUs, traces): front against front, with significance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tuner.pareto.front import Point, front, points
from tuner.spec.objective import Objective
from tuner.study.store import TrialRecord
from tuner.verify.finalists import launch_spread
from tuner.verify.racing import LAUNCH_SPREAD, end, log_error

DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Side:
    """One study: its trials, objective, and facts to hold against the other's (engine version, GPU, trace, model)."""

    name: str
    trials: Sequence[TrialRecord]
    objective: Objective
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Level:
    """The cheapest within SLO at a latency of at most ``latency_s``: USD per million output tokens of both (infinite:
    none), ``ratio`` second over first (middle, low, high at 95 %) and the probability that the second is cheaper."""

    latency_s: float
    first: float
    second: float
    ratio: tuple[float, float, float]
    second_cheaper: float

    @property
    def winner(self) -> int:
        """1 or 2 where the interval leaves out "equal", else 0."""
        _, low, high = self.ratio
        return 2 if high < 1 else 1 if low > 1 else 0


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


def compare(first: Side, second: Side, *, most: int = 12, seed: int = 0) -> Comparison:
    """Compares what each study offers at the latencies that the points of both fronts keep (at most ``most`` of them).

    Every measured point within SLO is drawn anew ``DRAWS`` times, in cost and in latency, from what its interval and
    the launch spread leave open; in each draw the cheapest point below the latency counts. So a point that is only
    luckily cheap, or only luckily fast, is not sure to count.
    """
    sides = (first, second)
    clouds = [[p for p in points(side.trials, side.objective) if p.ok] for side in sides]
    differences = _differences(first, second)
    spreads = [_spread(side.trials) for side in sides]
    # the latency that a point keeps for sure: at its middle half of the draws would rule the point out
    latencies = _apart(
        end(p.latency, p.latency_interval, spread, 0.99, low=False)
        for cloud, spread in zip(clouds, spreads, strict=True)
        for p in front(cloud)
    )
    if len(latencies) > most:
        latencies = [latencies[round(i)] for i in np.linspace(0, len(latencies) - 1, most)]
    rng = np.random.default_rng(seed)
    drawn = [_draw(cloud, spread, rng) for cloud, spread in zip(clouds, spreads, strict=True)]
    levels = []
    for limit in latencies:
        seen = [min((p.cost for p in cloud if p.latency <= limit), default=math.inf) for cloud in clouds]
        costs = [np.where(latency <= limit, cost, np.inf).min(axis=1, initial=np.inf) for cost, latency in drawn]
        levels.append(Level(limit, seen[0], seen[1], _ratio(seen, costs), float(np.mean(costs[1] < costs[0]))))
    rows = tuple(_row(level, first, second) for level in levels)
    return Comparison(
        first.name, second.name, tuple(levels), differences, _text(first, second, levels, differences), rows
    )


def _apart(latencies: Iterable[float], least: float = 1.01) -> list[float]:
    """Rising, without those that the one before makes superfluous: the same question would count twice."""
    kept: list[float] = []
    for latency in sorted(latencies):
        if not kept or latency > kept[-1] * least:
            kept.append(latency)
    return kept


def _spread(trials: Sequence[TrialRecord]) -> float:
    seen = launch_spread(trials)
    return math.sqrt(seen.variance) if seen.freedom >= 3 else LAUNCH_SPREAD


def _draw(cloud: Sequence[Point], spread: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Costs and latencies, each (DRAWS, number of points)."""

    def axis(name: str) -> np.ndarray:
        middle = np.log([getattr(p, name) for p in cloud])
        error = np.array([log_error(p, name, spread) for p in cloud])
        return np.exp(rng.normal(middle, error, (DRAWS, len(cloud))))

    return axis("cost"), axis("latency")


def _ratio(seen: Sequence[float], costs: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Quantiles of second over first; a side without any point counts as infinitely expensive, neither as unknown."""
    middle = seen[1] / seen[0] if math.isfinite(seen[0]) else (math.nan if math.isinf(seen[1]) else 0.0)
    ratios = np.sort(np.log(costs[1][known]) - np.log(costs[0][known])) if (known := _known(costs)).any() else None
    if ratios is None:
        return middle, math.nan, math.nan
    low, high = ratios[int(0.025 * (len(ratios) - 1))], ratios[math.ceil(0.975 * (len(ratios) - 1))]
    return middle, float(np.exp(low)), float(np.exp(high))


def _known(costs: Sequence[np.ndarray]) -> np.ndarray:
    return np.isfinite(costs[0]) | np.isfinite(costs[1])


def _differences(first: Side, second: Side) -> tuple[str, ...]:
    found = [
        f"{name}: {first.facts.get(name, 'unknown')} / {second.facts.get(name, 'unknown')}"
        for name in dict.fromkeys([*first.facts, *second.facts])
        if first.facts.get(name) != second.facts.get(name)
    ]
    a, b = first.objective, second.objective
    if a.slos != b.slos:
        found.append(f"SLOs: {', '.join(map(str, a.slos))} / {', '.join(map(str, b.slos))}")
    if a.latency != b.latency:
        found.append(f"latency axis: {a.latency} / {b.latency} (the levels below are not the same thing)")
    if a.price_usd_per_gpu_hour != b.price_usd_per_gpu_hour:
        found.append(f"price: ${a.price_usd_per_gpu_hour:g} / ${b.price_usd_per_gpu_hour:g} per GPU-hour")
    return tuple(found)


def _text(first: Side, second: Side, levels: Sequence[Level], differences: Sequence[str]) -> str:
    names = {1: first.name, 2: second.name}
    won = {side: sum(level.winner == side for level in levels) for side in (0, 1, 2)}
    if not levels:
        verdict = "Neither study has a point within its SLOs."
    elif won[1] and won[2]:
        verdict = f"Each is cheaper somewhere: {first.name} at {won[1]}, {second.name} at {won[2]}"
        verdict += f" of {len(levels)} latencies."
    elif won[1] or won[2]:
        side = 1 if won[1] else 2
        verdict = f"**{names[side]}** is cheaper at {won[side]} of {len(levels)} latencies, proven at 95 %"
        verdict += "; at the others they cannot be told apart." if won[0] else "."
    else:
        verdict = f"At none of {len(levels)} latencies is either proven cheaper at 95 %."
    if first.facts.get("figures") == second.facts.get("figures") == "emulated":
        verdict += " **Both are emulated**: these figures come from a model of the hardware; nothing was measured."
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
        "p_second_cheaper": level.second_cheaper,
        "proven": ("", first.name, second.name)[level.winner],
    }
