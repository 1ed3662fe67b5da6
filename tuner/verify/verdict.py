"""The verdict: what verification recommends, as data for verify.json and in words for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.verify.arm import Finalist, Launched, Range, as_range
from tuner.verify.judge import UNKNOWN, Arm, Judgement
from tuner.verify.power import Power
from tuner.verify.repeats import NO_SPREAD, Spread
from tuner.words import figure

LIKELY = 0.6  # probability of being the cheapest from which it is said: a coin's toss says nothing


@dataclass(frozen=True, slots=True)
class Verification:
    """``choice`` is the recommended arm's label (empty: nothing meets the SLOs), ``trial`` its number in the search,
    ``config`` and ``load`` what to deploy. ``survived`` is the share of the search-time gain over the default that
    was found again (middle, low, high; NaN where there was none to find). ``reason`` is :class:`Judgement`'s;
    ``spread`` what launches differ by (log cost). ``more`` launches would prove what was seen, if all differs as
    before; 0 where that is not known or launches alone would not do."""

    choice: str
    trial: int | None
    config: ServingConfig | None
    load: float
    is_default: bool
    reason: str
    arms: tuple[Arm, ...]
    survived: Range
    launches: int
    windows: int
    stopped: str
    confidence: float
    text: str
    rows: tuple[Mapping[str, Any], ...]
    spread: Spread = NO_SPREAD
    more: int = 0

    @property
    def chosen(self) -> Arm | None:
        """The recommended arm's measurements."""
        return next((arm for arm in self.arms if arm.label == self.choice), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready apart from infinities (the store writes those); :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verification:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what :meth:`to_dict` does not make."""
        fields = dict(data)
        fields["arms"] = tuple(_arm(arm) for arm in fields["arms"])
        fields["config"] = ServingConfig.from_dict(fields["config"]) if fields["config"] else None
        fields["survived"] = as_range(fields["survived"])
        fields["rows"] = tuple(dict(row) for row in fields["rows"])
        fields["spread"] = Spread(**fields["spread"])
        fields["load"], fields["confidence"] = float(fields["load"]), float(fields["confidence"])
        return cls(**fields)


def verdict(
    judgement: Judgement,
    arms: Sequence[Finalist],
    launches: Sequence[Launched],
    study: Study,
    *,
    windows: int,
    stopped: str,
    confidence: float,
) -> Verification:
    """Puts a judgement into words and rows."""
    chosen = next((a for a in arms if a.label == judgement.choice), None)
    state = judgement.arms.get(judgement.choice)
    base = next(a for a in arms if a.baseline)
    survived = _survived(chosen, base, state)
    return Verification(
        choice=judgement.choice,
        trial=chosen.trial if chosen else None,
        config=chosen.config if chosen else None,
        load=state.load if state else math.nan,
        is_default=bool(chosen and chosen.baseline),
        reason=judgement.reason,
        arms=tuple(judgement.arms[a.label] for a in arms),
        survived=survived,
        launches=len(launches),
        windows=windows,
        stopped=stopped,
        confidence=confidence,
        text=_text(judgement, arms, base, state, survived, study, launches, windows, stopped, confidence),
        rows=tuple(_row(judgement.arms[a.label], a, study.objective.latency) for a in arms),
        spread=judgement.spread,
        more=_more(judgement.power, len(arms)),
    )


def _survived(chosen: Finalist | None, base: Finalist, state: Arm | None) -> Range:
    """Verified gain over search-time gain, both as logarithms of cost ratios."""
    if chosen is None or state is None or chosen.baseline or not chosen.value or not base.value:
        return UNKNOWN
    promised = math.log(base.value / chosen.value)
    if promised < 0.02 or math.isnan(state.difference[0]):
        return UNKNOWN
    middle, low, high = state.difference
    return _gain(middle) / promised, _gain(high) / promised, _gain(low) / promised


def _more(power: Power | None, arms: int) -> int:
    if power is None or power.windows:
        return 0
    return 2 * (power.rounds or 0) if power.provable else 3 * arms


def _gain(factor: float) -> float:
    return -math.log(factor) if 0 < factor < math.inf else math.copysign(math.inf, 1 - factor)


def _text(
    judgement: Judgement,
    arms: Sequence[Finalist],
    base: Finalist,
    state: Arm | None,
    survived: Range,
    study: Study,
    launches: Sequence[Launched],
    windows: int,
    stopped: str,
    confidence: float,
) -> str:
    sure = f"{confidence * 100:g} %"
    how = (
        f"Measured again: {len(launches)} launch{'es' if len(launches) != 1 else ''} of {len(arms)} "
        f"configuration{'s' if len(arms) != 1 else ''} on {windows} held-out "
        f"window{'s' if windows != 1 else ''}, in alternating order; ended because {stopped}."
    ) + "".join(f" {arm.label} failed: {arm.failure}." for arm in judgement.arms.values() if arm.failure)
    if state is None:
        return f"**Nothing is recommended**: no configuration met the SLOs on the held-out windows.\n\n{how}"
    latency = study.objective.latency
    words = [
        f"**Recommended: {'the default' if state.label == base.label else state.label}** at load {figure(state.load)}."
    ]
    match judgement.reason:
        case "cheaper":
            words.append(f"It costs {_change(state.difference, 'less', 'more')} than the default, proven at {sure}")
            corrected = f", corrected for {len(arms) - 1} finalists" if len(arms) > 2 else ""
            words.append(f"(p = {state.doubt:.1g}{corrected}).")
        case "faster":
            words.append(f"It costs as much as the default ({_change(state.difference, 'less', 'more')}),")
            words.append(
                f"and its {latency} is {_change(state.latency_difference, 'lower', 'higher')}, proven at {sure}."
            )
        case "promise":
            default = judgement.arms[base.label]
            words.append(f"Of the default no load above {figure(default.load)} can be promised at {sure}:")
            words.append(f"what can be promised of this costs {_change(state.load_difference, 'less', 'more')}.")
            words.append("At the load that each just holds it was cheaper too, on every window; not proven:")
            words += _could(judgement.power)
        case "once":
            mean, promised = (_change(factor, "less", "more") for factor in (state.difference, state.load_difference))
            words.append(f"On every window it costs less than the default: in the mean {mean},")
            words.append(f"at the loads that each held on all of them {promised}.")
            words += _could(judgement.power)
        case "default-fails":
            failed = "failed" if judgement.arms[base.label].failure else "did not meet the SLOs"
            words.append(f"The engine's default {failed} on the held-out windows.")
        case "default-unmeasured":
            words.append(
                f"The engine's default was not measured: {_ends(launches, base)}. This is compared with nothing."
            )
        case _:
            words.append(f"No finalist is proven better than the default at {sure}.")
            words += _could(judgement.power)
    known = math.isfinite(state.load_cost[2]) or math.isfinite(state.latency[2])
    costs = f"At load {figure(state.load)} it costs {figures(state, latency)}"
    words.append(costs + (f" ({sure} intervals)." if known else "."))
    if len(arms) > 1:
        likely = max(judgement.arms.values(), key=lambda arm: arm.best)
        if likely.best >= LIKELY:
            name = "" if likely is state else f": {likely.label}, but not proven"
            share = f"{likely.best * 100:.0f} %" if likely.best < 0.995 else "over 99 %"
            words.append(f"Probably the cheapest of the {len(arms)} ({share}){name}.")
    searched = next((a.value for a in arms if a.label == state.label), None)
    if not math.isnan(survived[0]) and searched and base.value:
        promised = searched / base.value
        words.append(f"In the search it was {(1 - promised) * 100:.1f} % cheaper.")
    mine = [step for launch in launches if launch.arm == state.label for step in launch.steps if not step.untrusted]
    if not any(step.slo_misses for step in mine):
        words.append(f"The SLOs held up to load {figure(state.capacity[0])}, the highest that was tried.")
    elif state.safe_load:
        words.append(
            f"The SLOs start to fail at about load {figure(state.capacity[0])}; "
            f"up to load {figure(state.safe_load)} they hold with {sure} confidence."
        )
        if state.load < state.safe_load:
            words.append(
                "There some windows missed them by more than the others make up for: "
                "promised is the next lower load that was measured."
            )
    else:
        words.append(
            f"The SLOs start to fail at about load {figure(state.capacity[0])}. One launch does not say how sure that "
            "is: promised is a load at which they held when it was measured, no more."
        )
    if windows < 2:
        words.append("One held-out window: the intervals say nothing about other stretches of traffic.")
    return " ".join(words) + f"\n\n{how}"


def _ends(launches: Sequence[Launched], base: Finalist) -> str:
    """How the launches of ``base`` ended that say nothing of it."""
    mine = [launch for launch in launches if launch.arm == base.label]
    if failure := next((launch.failure for launch in reversed(mine) if launch.failure), None):
        return f"{failure.message} ({failure.stage})"
    reasons = sorted({reason for launch in mine for step in launch.steps for reason in step.untrusted})
    return "; ".join(reasons) or "it was not launched"


def _could(power: Power | None) -> list[str]:
    """What these launches could have proven, and what it would have taken to prove what they saw."""
    if power is None:
        return []
    if not power.provable:
        return ["With one launch of each, no difference of any size could have been proven: it takes two, better four."]
    least = (1 - power.provable) * 100
    needed = f"with these launches only a difference of about {least:.0f} % or more could have been proven."
    if power.seen >= 1:
        return [f"{power.label} measured {(power.seen - 1) * 100:.1f} % dearer;", needed]
    words = [f"{power.label} measured {(1 - power.seen) * 100:.1f} % cheaper, but", needed]
    if power.rounds is None:
        return [*words, "No reasonable number of launches would prove so small a gain among such differences."]
    rounds = f"{power.rounds} more launch{'es' if power.rounds != 1 else ''} of each" if power.rounds else ""
    windows = f"{power.windows} more held-out window{'s' if power.windows != 1 else ''}" if power.windows else ""
    needed = " and ".join(filter(None, (rounds, windows)))
    if not needed:  # the arm left the race before the others
        return words
    return [*words, f"About {needed} would prove it, if they differ as these did."]


def _row(arm: Arm, finalist: Finalist, latency: str) -> dict[str, Any]:
    """One line of the table; None where there is no number."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    row: dict[str, Any] = {
        "config": arm.label,
        "trial": finalist.trial,
        "load": number(arm.load),
        "launches": arm.launches,
    }
    for name, (middle, low, high), scale in (
        ("capacity", arm.capacity, 1.0),
        ("cost_usd_per_mtok_output", arm.cost, 1.0),
        (f"{latency}_ms", arm.latency, 1e3),
        ("cost_vs_default", arm.difference, 1.0),
        (f"{latency}_vs_default", arm.latency_difference, 1.0),
    ):
        row |= {name: number(middle * scale), f"{name}_low": number(low * scale), f"{name}_high": number(high * scale)}
    return row | {
        "p_not_better": number(arm.doubt),
        "p_best": arm.best,
        "slos_hold": arm.holds,
        "safe_load": arm.safe_load,
        "failure": arm.failure,
    }


def _arm(data: Mapping[str, Any]) -> Arm:
    readers: dict[str, Callable[[Any], Any]] = {f.name: float for f in fields(Arm) if isinstance(f.default, float)}
    readers |= {f.name: as_range for f in fields(Arm) if f.default is UNKNOWN}
    return Arm(**{name: readers.get(name, lambda value: value)(value) for name, value in data.items()})


def _change(factor: Range, less: str, more: str) -> str:
    """``46.1 % less (40.4 to 51.4 %)``; both ends with their word where the interval reaches from one to the other."""
    _, low, high = factor
    words = [f"{abs(1 - x) * 100:.1f} % {less if x < 1 else more}" for x in factor]
    if not math.isfinite(low + high):
        return words[0]
    if (low < 1) != (high < 1):
        return f"{words[0]} ({words[1]} to {words[2]})"
    nearer, further = sorted(abs(1 - x) * 100 for x in (low, high))
    return f"{words[0]} ({nearer:.1f} to {further:.1f} %)"


def figures(arm: Arm, latency: str) -> str:
    """In words what ``arm`` costs at the load to deploy it at, and its ``latency`` there."""
    return f"{_usd(arm.load_cost)}, {latency} {'at most ' if arm.at_most else ''}{_ms(arm.latency)}"


def _usd(cost: Range) -> str:
    return f"${figure(cost[0])}{_between(*cost[1:])} per million output tokens"


def _ms(latency: Range) -> str:
    middle, low, high = (x * 1e3 for x in latency)
    return f"{figure(middle)} ms{_between(low, high)}"


def _between(low: float, high: float) -> str:
    if not math.isfinite(high):
        return f" ({figure(low)} or more)" if low > 0 else " (interval not known)"
    return f" ({figure(low)} to {figure(high)})"
