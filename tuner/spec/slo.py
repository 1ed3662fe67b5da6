"""An SLO: a latency percentile (or an error rate) and its limit, as ``ttft_p99=500ms``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tuner.words import figure

EXACT = 1 + 1e-9  # a limit that is met to the last bit but one is met
MOST = 0.9  # a percentile from here on limits a request: it allows few to be slower
LATENCIES = ("ttft", "tpot", "itl", "e2e", "norm_latency")
_NAME = re.compile(rf"^({'|'.join(LATENCIES)})_(p\d{{1,2}}(?:\.\d+)?|mean|max)$")
_LIMIT = re.compile(r"^\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)\s*(us|ms|s|min|%)?\s*$")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """``metric`` (``ttft_p99``, ``error_rate``) must be at most ``limit`` (seconds; a share for ``error_rate``)."""

    metric: str
    limit: float

    @property
    def key(self) -> str:
        """The metric's name in a step's metrics, with its unit: ``ttft_p99_s``."""
        return self.metric if self.metric == "error_rate" else f"{self.metric}_s"

    @property
    def latency(self) -> str:
        """``ttft``, ``tpot``, ``itl``, ``e2e``, ``norm_latency``; empty for ``error_rate``."""
        return "" if self.metric == "error_rate" else self.metric.rsplit("_", 1)[0]

    @property
    def quantile(self) -> float | None:
        """The percentile as a fraction (0.99), or None for a mean, a maximum or the error rate."""
        stat = self.metric.rsplit("_", 1)[1]
        return float(stat[1:]) / 100 if stat[0] == "p" else None

    @property
    def each(self) -> bool:
        """Whether the limit is one on a single request: a mean, or a percentile below :data:`MOST`, lets many be
        slower, and they are served all the same."""
        return bool(self.latency) and (self.metric.endswith("_max") or (self.quantile or 0.0) >= MOST)

    def miss(self, metrics: Mapping[str, float]) -> str:
        """In words how ``metrics`` misses this SLO; empty where it holds. An absent metric is a miss."""
        value = metrics.get(self.key)
        if value is None:
            return f"{self.metric} was not measured"
        return "" if value <= self.limit * EXACT else f"{self.metric} {self.show(value)} > {self.show(self.limit)}"

    def gap(self, metrics: Mapping[str, float]) -> float:
        """``log(value / limit)``, negative where the SLO holds; infinite where the value is not finite or was not
        measured. No errors at all are far from any limit, and a limit of no errors is far off with the first one."""
        value = metrics.get(self.key, math.inf)
        found = math.log(max(value, 1e-12) / max(self.limit, 1e-9)) if math.isfinite(value) else math.inf
        return max(found, 1e-9) if value > self.limit * EXACT else min(found, 0.0)

    def show(self, value: float) -> str:
        """``value`` as the user reads it: milliseconds, or per cent."""
        if self.metric == "error_rate":
            return f"{value * 100:.3g} %"
        if math.isinf(value):
            return "without end (requests failed, went unanswered, or were cut off when over the limit)"
        return f"{figure(value * 1e3, 4)} ms"

    def __str__(self) -> str:
        return f"{self.metric}={self.show(self.limit).replace(' ', '').replace(',', '')}"


def bound_responses(slos: Iterable[Slo], window_s: float) -> bool:
    """Whether ``slos`` bound how long each response takes: by the token, or by an end-to-end limit that is short beside
    the window. Where none does, goodput counts what arrives in the window (docs/measurement.md)."""
    return any(
        slo.each
        and (slo.latency in ("tpot", "itl", "norm_latency") or (slo.latency == "e2e" and slo.limit <= window_s / 10))
        for slo in slos
    )


def is_metric(name: str) -> bool:
    """Whether ``name`` is a latency statistic (``tpot_p95``) or ``error_rate``."""
    return name == "error_rate" or bool(_NAME.match(name))


def check_metric(name: str) -> str:
    """``name`` if it :func:`is_metric`; else raises ``ValueError``."""
    if not is_metric(name):
        raise ValueError(
            f"unknown metric {name!r}: write {', '.join(LATENCIES)} with _p50, _p99, _mean ..., or error_rate"
        )
    return name


def parse_limit(metric: str, text: str | int | float) -> float:
    """``500ms`` -> 0.5, ``1%`` -> 0.01. A latency without a unit is refused: raises ``ValueError``."""
    match = _LIMIT.match(str(text))
    unit = match.group(2) if match else None
    wants_share = metric == "error_rate"
    if not match or (not wants_share and unit not in _SECONDS) or (wants_share and unit not in (None, "%")):
        example = "1% or 0.01" if wants_share else "500ms or 2s"
        raise ValueError(f"bad limit {text!r} for {metric}: write for example {example}")
    number = float(match.group(1))
    value = number / 100 if unit == "%" else number if wants_share else number * _SECONDS[str(unit)]
    if value <= 0 and not wants_share:
        raise ValueError(f"the limit of {metric} must be above zero, not {text!r}")
    return value


def slip(slo: Slo, text: str | int | float) -> str:
    """What is wrong with ``slo``, whose limit was written as ``text``, where it limits nothing: a low percentile
    (``ttft_p9``), all requests as errors (``1`` for ``1%``). Else empty."""
    if slo.metric == "error_rate":
        if slo.limit > 1 or (slo.limit > 0.5 and "%" not in str(text)):
            return f"error_rate={text} is {slo.limit * 100:g} % of the requests: write for example 1% or 0.01"
    elif slo.quantile is not None and slo.quantile < 0.5:
        says = f"{slo.metric} lets {(1 - slo.quantile) * 100:.3g} % of the requests take longer"
        return f"{says}: write {slo.latency}_p99, {slo.latency}_p90, or at least {slo.latency}_p50"
    return ""


def parse(text: str) -> Slo:
    """``ttft_p99=500ms`` as an :class:`Slo`. Raises ``ValueError`` with what to write instead."""
    name, sep, limit = text.partition("=")
    if not sep:
        raise ValueError(f"bad SLO {text!r}: write for example ttft_p99=500ms")
    metric = check_metric(name.strip())
    slo = Slo(metric, parse_limit(metric, limit))
    if wrong := slip(slo, limit):
        raise ValueError(wrong)
    return slo
