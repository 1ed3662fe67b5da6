"""What one replica takes and costs at a point's load: requests per second, tokens, money a month; from the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tuner.pareto.choice import Change
from tuner.pareto.front import Point, trusted_steps
from tuner.spec.objective import Objective
from tuner.study.outcome import Step
from tuner.study.price import COST, TOTAL, per_hour
from tuner.study.store import TrialRecord
from tuner.words import figure

HOURS = 730  # of a month


@dataclass(frozen=True, slots=True)
class Traffic:
    """One replica at ``load``. ``trace_rps`` are the requests per second of load 1 on the ``windows`` windows that it
    was measured on, with ``requests`` measured requests; tokens are means per request (NaN where not measured).
    ``month_usd`` is what the replica costs a month, ``default_usd`` what the engine's default would for the same
    traffic, ``total_usd`` what a million tokens within SLO cost there, prompts counted (NaN where not known); ``price``
    says at what price; ``filled`` as in :class:`tuner.study.outcome.Step`."""

    load: float
    trace_rps: float
    windows: int
    requests: int
    loads: tuple[float, float]
    input_tokens: float
    output_tokens: float
    month_usd: float
    default_usd: float
    total_usd: float
    price: str
    filled: bool = False
    served_rps: float = math.inf  # the most that were served, where no SLO bounds a wait: what comes may be more

    @property
    def rps(self) -> float:
        """Requests per second that are served at the point's load."""
        return min(self.trace_rps * self.load, self.served_rps)

    @property
    def lengths(self) -> str:
        """The requests' lengths, in words; empty where not measured."""
        if not math.isfinite(self.input_tokens + self.output_tokens):
            return ""
        return f"prompts of {self.input_tokens:,.0f} and answers of {self.output_tokens:,.0f} tokens on average"

    @property
    def measured(self) -> str:
        """What it was measured on, in words."""
        many = f"{self.windows} windows" if self.windows > 1 else "one window"
        low, high = map(figure, self.loads)
        at = f"load {low}" if low == high else f"loads of {low} to {high}"
        before = "what came before in the prefix cache" if self.filled else ""
        return ", ".join(filter(None, (f"{self.requests:,} requests at {at} on {many}", before, self.lengths)))

    def __str__(self) -> str:
        come = self.trace_rps * self.load
        product = f"{figure(self.load)} x {figure(self.trace_rps)}; " if self.rps == come else ""
        text = (
            f"At load {figure(self.load)} one replica takes {figure(self.rps)} requests/s "
            f"({product}measured with {self.measured}) and costs "
            f"${self.month_usd:,.0f} a month ({HOURS} h at {self.price})"
            f"{f', ${figure(self.total_usd)} per million total tokens' if math.isfinite(self.total_usd) else ''}."
        )
        if self.rps < come:
            text += f" {figure(come)} came: no SLO bounds how long the rest waits. Add one on ttft or e2e."
        if math.isfinite(self.default_usd):
            text += f" With the engine's default the same traffic would cost about ${self.default_usd:,.0f}."
        return text


def traffic(
    trials: Sequence[TrialRecord], objective: Objective, point: Point | None, change: Change | None
) -> Traffic | None:
    """Of ``point``, whose cost differs from the default's by ``change``. None where no arrival rate was measured."""
    if point is None:
        return None
    same = [t for t in trials if t.config.hash == point.config.hash]
    own = [t for t in same if t.number in point.trials] or same
    steps = [s for _, s in trusted_steps(own) if s.metrics.get("offered_requests_per_s", 0) > 0]
    if not steps:
        return None
    rates: dict[str, list[float]] = {}
    for step in steps:
        rates.setdefault(step.window, []).append(step.metrics["offered_requests_per_s"] / step.load)
    price = next((t.price for t in own if t.price), None)
    month_usd = per_hour(point.config, objective, price) * HOURS
    return Traffic(
        load=point.load,
        trace_rps=fmean(fmean(found) for found in rates.values()),
        windows=len(rates),
        requests=round(sum(s.metrics.get("measured_requests", 0) for s in steps)),
        loads=(min(s.load for s in steps), max(s.load for s in steps)),
        input_tokens=per_request(steps, "prompt"),
        output_tokens=per_request(steps, "output"),
        month_usd=month_usd,
        default_usd=month_usd / (1 + change.value) if change and change.value > -1 else math.nan,
        total_usd=point.cost * total_per_output(steps, point.load),
        price=price_words(objective, point.config.gpus, price),
        filled=all(step.filled for step in steps),
        served_rps=_served(steps, objective),
    )


def bounds_waiting(objective: Objective) -> bool:
    """Whether an SLO bounds how long a request waits."""
    return any(slo.latency in ("ttft", "e2e", "norm_latency") for slo in objective.slos)


def _served(steps: Sequence[Step], objective: Objective) -> float:
    """The most requests per second that a step served; endless where an SLO bounds how long requests wait, for what
    holds is served."""
    if bounds_waiting(objective):
        return math.inf
    return max((s.metrics["requests_per_s"] for s in steps if "requests_per_s" in s.metrics), default=math.inf)


def total_per_output(steps: Sequence[Step], load: float) -> float:
    """What a token of prompt or output costs where an output token costs one: at ``load``, or where the SLOs held if
    they did not there; NaN where not measured."""
    told = [s for s in steps if s.ok and {COST, TOTAL} <= s.metrics.keys()]
    told = [s for s in told if s.load == load] or told
    return fmean(s.metrics[TOTAL] / s.metrics[COST] for s in told) if told else math.nan


def price_words(objective: Objective, gpus: int, price: float | None = None) -> str:
    """The price (``price``, where a trial ran on GPUs of another one), and whether anybody named it."""
    own, named = objective.price_usd_per_gpu_hour, objective.prices.values()
    usd = price or own
    assumed = usd not in named if named and usd != own else objective.price_assumed
    text = f"{usd:g} USD per {'GPU' if gpus else 'server'}-hour"
    return text + (", assumed: --gpu-price sets yours" if assumed else "")


def per_request(steps: Sequence[Step], name: str) -> float:
    """Mean tokens (``prompt`` or ``output``) of the requests of the steps within SLO; NaN where not measured.

    Steps that tell no means (a function engine's) tell rates: then it is those of the requests within SLO, which are
    the shorter ones.
    """
    held = [s.metrics for s in steps if s.ok]
    key = f"mean_{name}_tokens"
    means = [(m[key], n) for m in held if key in m and (n := m.get("measured_requests", 1.0)) > 0]
    if means:
        return sum(mean * requests for mean, requests in means) / sum(requests for _, requests in means)
    if name == "prompt":
        return _by_rates(held, "total") - _by_rates(held, "output")
    return _by_rates(held, name)


def _by_rates(held: Sequence[Mapping[str, float]], name: str) -> float:
    rates = (f"goodput_{name}_tokens_per_s", "goodput_requests_per_s")
    pairs = [tuple(m.get(rate, 0.0) for rate in rates) for m in held]
    pairs = [(tokens, requests) for tokens, requests in pairs if tokens > 0 and requests > 0]
    return sum(tokens for tokens, _ in pairs) / sum(requests for _, requests in pairs) if pairs else math.nan
