"""The promise: what an exported file says of itself in machine-readable comment lines, and how it is read back.

Each line is ``# tuner: {...}``, one JSON object; together they are the promise. YAML, env files and Compose files take
them as comments; the rest of the file is the engine's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tuner.errors import UsageError
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo, check_metric, parse_limit
from tuner.verify.arm import Range, as_range
from tuner.verify.fingerprint import Fingerprint
from tuner.verify.repeats import NO_SPREAD, Spread

PREFIX = "# tuner: "
VERSION = 1
PRICE = "price_usd_per_gpu_hour"


@dataclass(frozen=True, slots=True)
class Promise:
    """At ``load`` the config meets ``slos``, at ``cost`` (USD per million output tokens) and ``latency`` (seconds of
    ``latency_metric``), each (middle, low, high) at ``confidence``. ``spread`` is what launches differ by (log cost),
    as verification saw it. ``study`` and ``trial`` say where it comes from."""

    study: str
    trial: int | None
    config: ServingConfig
    load: float
    slos: tuple[Slo, ...]
    cost: Range
    latency_metric: str
    latency: Range
    fingerprint: Fingerprint
    spread: Spread = NO_SPREAD
    confidence: float = 0.95
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def price(self) -> float | None:
        """USD per GPU-hour at which the cost was reckoned; None where the file does not say."""
        return self.details.get(PRICE)


def promise_block(promise: Promise) -> str:
    """The comment lines, newline at the end."""
    lines: list[dict[str, Any]] = [
        {"promise": VERSION, "study": promise.study, "trial": promise.trial, "confidence": promise.confidence},
        {"load": promise.load, "slos": [f"{slo.metric}={slo.limit!r}" for slo in promise.slos]},
        {"cost_usd_per_mtok_output": _plain(promise.cost)},
        {"latency_metric": promise.latency_metric, "latency_s": _plain(promise.latency)},
        {"launch_variance": promise.spread.variance, "launch_freedom": promise.spread.freedom},
        {"fingerprint": promise.fingerprint.to_dict()},
        {"config": promise.config.to_dict()},
    ]
    if promise.details:
        lines.append({"details": dict(promise.details)})
    text = "".join(f"{PREFIX}{json.dumps(line, allow_nan=False)}\n" for line in lines)
    return text.replace("\x7f", "\\u007f")  # JSON takes it as it is, YAML does not


def read_promise(path: Path) -> Promise:
    """The promise in ``path``. Raises :class:`UsageError` with the line that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"cannot be read: {failure}", where=str(path)) from failure
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    last = 1
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(PREFIX):
            last = number
            try:
                row = _mapping(json.loads(line[len(PREFIX) :]))
            except (ValueError, RecursionError) as failure:
                raise UsageError(f"bad promise line: {failure}", where=f"{path}:{number}", fix=_EXPORT) from failure
            found |= row
            lines |= dict.fromkeys(row, number)
    if not found:
        raise UsageError("holds no promise (no line '# tuner: {...}')", where=str(path), fix=_EXPORT)
    if found.get("promise") != VERSION:
        raise UsageError(f"promise version {found.get('promise')!r} is not known", where=f"{path}:{last}", fix=_EXPORT)

    def read(name: str, as_: Callable[[Any], T]) -> T:
        try:
            return as_(found[name])
        except KeyError as failure:
            raise UsageError(f"the promise lacks {failure}", where=f"{path}:{last}", fix=_EXPORT) from failure
        except (TypeError, ValueError, AttributeError, OverflowError) as failure:
            words = f"the promise cannot be read: {name}: {failure}"
            raise UsageError(words, where=f"{path}:{lines[name]}", fix=_EXPORT) from failure

    return Promise(
        study=read("study", str),
        trial=read("trial", lambda number: None if number is None else int(number)),
        config=read("config", ServingConfig.from_dict),
        load=read("load", _number(above=0.0)),
        slos=read("slos", lambda texts: tuple(_slo(text) for text in texts)),
        cost=read("cost_usd_per_mtok_output", _range),
        latency_metric=read("latency_metric", check_metric),
        latency=read("latency_s", _range),
        fingerprint=read("fingerprint", lambda said: Fingerprint.from_dict(_mapping(said))),
        spread=Spread(read("launch_variance", _number()), read("launch_freedom", _number())),
        confidence=read("confidence", _number(above=0.0, below=1.0)),
        details=read("details", _details) if "details" in found else {},
    )


T = TypeVar("T")
_EXPORT = "Export it again with `tuner export STUDY`."


def _number(above: float | None = None, below: float = math.inf) -> Callable[[Any], float]:
    """A reader of numbers between the two; without ``above`` from 0 on."""

    def read(value: Any) -> float:
        number = float(value)
        if not (number >= 0 if above is None else number > above) or not number < below:
            raise ValueError(f"{value!r} is out of range")
        return number

    return read


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is no mapping")
    return value


def _details(value: Any) -> Mapping[str, Any]:
    found = _mapping(value)
    price = found.get(PRICE)
    return found if price is None else {**found, PRICE: _number(above=0.0)(price)}


def _slo(text: str) -> Slo:
    """``ttft_p99=0.5`` (seconds, or a share)."""
    metric, _, limit = text.partition("=")
    parse_limit(check_metric(metric), limit if metric == "error_rate" else f"{limit}s")
    return Slo(metric, float(limit))


def _plain(values: Range) -> list[float | str]:
    """JSON has no infinity: as the strings ``inf``, ``-inf``, ``nan``."""
    return [v if math.isfinite(v) else str(v) for v in values]


def _range(values: list[float | str]) -> Range:
    middle, low, high = as_range(values)
    if middle < 0 or low > high:  # what is not known is NaN, which is neither
        raise ValueError(f"{values!r} is out of range")
    return middle, low, high
