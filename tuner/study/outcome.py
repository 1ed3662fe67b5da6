"""What a trial ended as: Measured, Infeasible, Untrusted or Aborted. Failure is a value with evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: Of a start-up, in order, as logs show them.
PHASES = ("imports", "config", "engine", "weights", "compile", "kv", "warmup", "graphs", "api")


@dataclass(frozen=True, slots=True)
class Boot:
    """A server's start-up: seconds per phase, and what its log said about itself.

    ``phases_s`` maps phase name (imports, weights, compile, graphs, kv, ready, ...) to seconds, in order.
    ``facts`` maps names with units to numbers, e.g. ``kv_cache_tokens``, ``max_concurrency``,
    ``weights_bytes``, ``free_bytes``.
    """

    total_s: float = 0.0
    phases_s: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One load of the ladder, measured on a running server.

    ``metrics`` are floats whose names carry their unit (``ttft_p99_s``, ``output_tokens_per_s``,
    ``goodput_output_tokens_per_s``, ``cost_usd_per_mtok_output``); latencies are in seconds.
    ``intervals`` holds 95 % confidence intervals for the metrics that have one.
    """

    load: float
    window: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    slo_misses: tuple[str, ...] = ()  # e.g. "ttft_p99 812 ms > 500 ms"
    untrusted: tuple[str, ...] = ()  # why the measurement, not the server, was at fault
    stopped_early: str = ""  # why the step was ended before its last request
    records: str = ""  # Parquet file, relative to the trial's folder

    @property
    def ok(self) -> bool:
        """Whether every SLO held and the measurement can be believed."""
        return not self.slo_misses and not self.untrusted

    @property
    def filled(self) -> bool:
        """Whether what came before its window was sent first, to be found in the prefix cache."""
        return self.metrics.get("fill_requests", 0.0) > 0

    @property
    def saturated(self) -> bool:
        """Whether it was ended because its queue grew without bound: its latencies are those of the beginning."""
        return self.stopped_early.startswith("saturated")


def held(steps: Iterable[Step]) -> dict[str, Step | None]:
    """Of every window the highest load within SLO (None: at none). Steps that are not believed do not count."""
    found: dict[str, Step | None] = {}
    for step in sorted(steps, key=lambda step: step.load):
        if not step.untrusted:
            found[step.window] = step if step.ok else found.get(step.window)
    return found


def held_everywhere(steps: Iterable[Step]) -> float:
    """The load that every window held; 0 where one held none, or nothing is believed."""
    return min((step.load if step else 0.0 for step in held(steps).values()), default=0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """The ladder ran; some of its steps may have missed an SLO."""

    steps: tuple[Step, ...]
    boot: Boot = Boot()


@dataclass(frozen=True, slots=True)
class Infeasible:
    """The configuration cannot serve.

    ``cause`` is a slug of the diagnosis (``oom-kv``, ``invalid-combination``, ``unknown-flag``, ...), ``evidence``
    the log line (or figure) that proves it, ``fix`` what to do. ``stage`` is one of ``before launch``,
    ``start-up``, ``under load``, ``quality``. ``short_bytes`` says by how much memory was missed, where known.
    A ``transient`` failure says nothing of the configuration as long as it happened once: it is launched again.
    """

    cause: str
    message: str
    evidence: str = ""
    fix: str = ""
    stage: str = "start-up"
    short_bytes: int | None = None
    transient: bool = False
    steps: tuple[Step, ...] = ()
    boot: Boot = Boot()

    @property
    def machines(self) -> bool:
        """Whether a transient failure is the machine's, however often it happens: nothing of the configuration was
        tried."""
        return self.transient and (self.stage == "before launch" or self.cause in ENVIRONMENT_CAUSES)


@dataclass(frozen=True, slots=True)
class Untrusted:
    """The measurement was at fault (client lag, throttled GPU, ...), so there is no number."""

    reasons: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    boot: Boot = Boot()


@dataclass(frozen=True, slots=True)
class Aborted:
    """Stopped early (interrupt, budget, racing) with what was known until then."""

    reason: str
    steps: tuple[Step, ...] = ()
    boot: Boot = Boot()


Outcome = Measured | Infeasible | Untrusted | Aborted


def grown(ladder: Sequence[float], outcomes: Iterable[Outcome | None]) -> tuple[float, ...]:
    """``ladder`` and the loads above it that launches went on to which held its highest (None: one that runs)."""
    top = max(ladder) * (1 + 1e-9)
    above = {step.load for outcome in outcomes if outcome for step in outcome.steps if step.load > top}
    return (*sorted(ladder), *sorted(above))


#: What no other configuration can cure: where what ought to serve (the engine's own default) meets it, the study ends
#: with exit code 4, and the next session makes that launch again.
ENVIRONMENT_CAUSES = frozenset(
    {"no-gpu", "driver-too-old", "model-not-found", "model-not-allowed", "missing-dependency", "disk-full"}
)
GPU_BUSY = "gpu-busy"  # somebody else is on a GPU: seen before the launch, or met at start-up (exclusive mode)
NO_COMPLETIONS = "no-completions"  # a server that answers, and otherwise
UNTRIED = frozenset({GPU_BUSY, NO_COMPLETIONS})  # met twice by what ought to serve, the session ends likewise
IN_A_ROW = 3  # launches that fail by the machine's fault, before the session ends with exit code 4
_KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in (Measured, Infeasible, Untrusted, Aborted)}


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON-ready data, with its kind under ``kind``."""
    return {"kind": type(outcome).__name__.lower(), **asdict(outcome)}


def from_dict(data: Mapping[str, Any]) -> Outcome:
    """The inverse of :func:`to_dict`. Raises ``ValueError`` on an unknown kind, and where a figure is no number."""
    fields = dict(data)
    kind = _KINDS.get(fields.pop("kind", ""))
    if kind is None:
        raise ValueError(f"unknown outcome kind {data.get('kind')!r}")
    fields["steps"] = tuple(_step(step) for step in fields.get("steps", ()))
    fields["boot"] = boot = Boot(**fields.get("boot", {}))
    _numbers({"total_s": boot.total_s, **boot.phases_s, **boot.facts})
    if "reasons" in fields:
        fields["reasons"] = tuple(fields["reasons"])
    return kind(**fields)


def _numbers(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, no number")


def _step(data: Mapping[str, Any]) -> Step:
    step = Step(
        **{
            **data,
            "intervals": {name: (low, high) for name, (low, high) in data.get("intervals", {}).items()},
            "slo_misses": tuple(data.get("slo_misses", ())),
            "untrusted": tuple(data.get("untrusted", ())),
        }
    )
    _numbers({"load": step.load, **step.metrics})
    for name, (low, high) in step.intervals.items():
        _numbers({f"{name} at least": low, f"{name} at most": high})
    return step
