"""What every view of a study starts from: its trials, points, front and recommendation, read once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.executor.cluster import device
from tuner.pareto.changes import baseline_of, changes, describe, words
from tuner.pareto.choice import Choice
from tuner.pareto.front import Interval, Point, front, points, searched
from tuner.pareto.recommend import recommended
from tuner.pareto.traffic import Traffic, price_words, traffic
from tuner.record.secrets import hide, secrets
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Aborted, Infeasible, Measured, Outcome, Untrusted
from tuner.study.store import Store, TrialRecord
from tuner.words import figure


@dataclass(frozen=True, slots=True)
class Summary:
    """``trials`` are all, ``search`` those of the search; ``points`` and ``front`` come from the search (verification
    has loads and windows of its own); ``default`` is the engine's default, where it was launched;
    ``traffic`` is what the recommendation takes, where that was measured."""

    study: Study
    trials: Sequence[TrialRecord]
    search: Sequence[TrialRecord]
    points: Sequence[Point]
    front: Sequence[Point]
    choice: Choice
    default: TrialRecord | None
    emulated: bool
    secrets: Sequence[str] = ()
    traffic: Traffic | None = None

    @property
    def verified(self) -> Point | None:
        """The recommendation where it was measured again: a point of other windows and loads than the front's."""
        point = self.choice.point
        return point if point and point.role == "verify" else None

    @property
    def off_front(self) -> Point | None:
        """The recommendation where it is no point of the front: measured again, or not told apart from one."""
        return self.choice.off(self.front)

    @property
    def apart(self) -> str:
        """Why the recommendation does not lie on the front."""
        if self.verified:
            return (
                "The front is of the search's window. What is recommended was measured again on held-out windows, at "
                "loads of its own: it need not lie on the front."
            )
        return "What is recommended cannot be told apart from a point of the front and is nearer to the default."

    @property
    def hardware(self) -> str:
        """The study's GPUs; the recommendation's where those are of another type."""
        own, point = self.study.hardware, self.choice.point
        if point and point.config.gpus and (name := device(self.study, point.config.gpu)) != own.name:
            return f"{point.config.gpus} x {name}"
        return f"{own.gpus} x {own.name}" if own.gpus else own.name

    @property
    def price(self) -> str:
        """What a GPU-hour of :attr:`hardware` costs, in words."""
        point = self.choice.point
        own = [t for t in self.trials if point and t.config.hash == point.config.hash]
        price = next((t.price for t in own if t.price), None)
        return price_words(self.study.objective, self.study.hardware.gpus, price)

    def chosen(self, point: Point) -> bool:
        """Whether ``point`` is the recommendation."""
        return self.choice.marks(point, self.front)

    def name(self, config: ServingConfig) -> str:
        """The config as its difference to the engine's default."""
        return hide(describe(config, self.default.config if self.default else None), self.secrets)

    def flags(self, config: ServingConfig) -> list[str]:
        """The same difference, word by word."""
        found = changes(config, self.default.config if self.default else None)
        return [hide(words(name, value), self.secrets) for name, value in found.items()] or ["engine default"]

    def kinds(self) -> Mapping[str, int]:
        """How many trials ended how."""
        return Counter(kind(t.outcome) for t in self.trials)


def summarize(store: Store, study: Study) -> Summary:
    """Reads the study folder once."""
    trials = store.trials()
    search = searched(trials)
    found = points(search, study.objective)
    choice = recommended(store, study, trials)
    return Summary(
        study=study,
        trials=trials,
        search=search,
        points=found,
        front=front(found),
        choice=choice,
        default=baseline_of(search) or baseline_of(trials),
        emulated=any(t.emulated for t in trials) or study.engine.kind == "emulator",
        secrets=secrets(study, trials),
        traffic=traffic(trials, study.objective, choice.point, choice.cost_change),
    )


def kind(outcome: Outcome) -> str:
    """``measured``, ``infeasible``, ``untrusted`` or ``stopped``."""
    return "stopped" if isinstance(outcome, Aborted) else type(outcome).__name__.lower()


def why(outcome: Outcome) -> str:
    """In a few words why there is no full measurement; empty for Measured."""
    match outcome:
        case Infeasible(message=message):
            return message
        case Untrusted(reasons=reasons):
            return "; ".join(reasons)
        case Aborted(reason=reason):
            return reason
        case Measured():
            return ""
    return ""


def label(metric: str) -> str:
    """``tpot_p99`` as a reader knows it: ``TPOT p99``."""
    head, _, stat = metric.rpartition("_")
    words = {"norm_latency": "latency per token", "e2e": "end-to-end", "error_rate": "error rate"}
    return f"{words.get(head, head.upper())} {stat}" if head and metric != "error_rate" else words.get(metric, metric)


def ms(seconds: float) -> str:
    return figure(seconds * 1e3, 4) if math.isfinite(seconds) else "-"


def spread(value: float, interval: Interval | None, scale: float = 1.0) -> str:
    """The larger half width of an interval in per cent, ``±3 %``; of one without an upper end the lower one, times
    ``scale``: ``(≥ 18.9)``. Empty where there is none."""
    if interval is None or not value or not math.isfinite(interval[0]):
        return ""
    if not math.isfinite(interval[1]):
        return f"(≥ {figure(interval[0] * scale)})"
    share = max(value - interval[0], interval[1] - value) / value * 100
    return f"±{share:.0f} %" if share >= 10 or share < 0.01 else f"±{share:.2g} %"


def clean(data: Any) -> Any:
    """``data`` for strict JSON: what is not finite becomes None."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): clean(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [clean(value) for value in data]
    return data
