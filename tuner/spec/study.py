"""A study as the rest of the code sees it: frozen, resolved, every name replaced by what it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.storage import StorageSpec

MIN_GAIN = 0.003  # budget.min_gain where the study says none
COUNTED = "counts_fixed"  # see spacefile.as_before
FITTING = "fitting_default"  # the default of a model that needs several GPUs is that on the fewest
WIDELY = "verifies_widely"  # see Study.heldout_windows
GROWS = "ladder_grows"  # see Study.grows
# newer than some studies, which go on without:
RULES = ("planned_ends", "fills_cache", COUNTED, FITTING, WIDELY, GROWS)


HELD_OUT = (3, 5)  # windows, at least and at most, where a study does not say how many
USERS = ("command", "own")  # engines of which nobody but the user knows whose flags they take
Rows = Sequence[Mapping[str, Any]]  # of a study's own hardware table, as its user wrote them


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine, where it lives and what every server of the study gets.

    ``command`` or ``python`` say which installation; ``options`` are the engine's own (``target`` of a function,
    ``gpu`` of the emulator, ``url`` of attach).
    """

    kind: str
    command: tuple[str, ...] = ()
    python: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def read_as(self) -> str:
        """As whose its flags and defaults are read by memory arithmetic and analytic model: ``vllm`` or ``sglang``."""
        return "sglang" if self.kind == "sglang" else "vllm"

    def tokenizer(self, model: str) -> str:
        """The folder or id whose tokenizer counts a trace's texts: the ``tokenizer`` option, else the model."""
        return str(self.options.get("tokenizer") or model)


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """The trace file and how it is cut into windows.

    ``search_windows`` windows for the search and ``heldout_windows`` that it never sees (None: as many of
    :data:`HELD_OUT` as the trace has room for); one load step replays
    ``window_s`` seconds from one of them, whatever the load. Before each step the prompts of ``fill_cache_s`` seconds
    of the trace before its window are sent (None: of as many as its prefixes ask for), so that the prefix cache holds
    what it would hold then.
    """

    file: str
    format: str = "auto"
    window_s: float = 60.0
    search_windows: int = 1
    heldout_windows: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    output: str = "forced"
    fill_cache_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """The ladder: factors on the trace's arrival rate, from low to high; how a step is replayed. ``auto``: the ladder
    is not settled yet (:mod:`tuner.study.ladder`), and these loads stand in for it."""

    ladder: tuple[float, ...]
    warmup_s: float = 5.0
    request_timeout_s: float = 600.0
    early_stop: bool = True
    auto: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """Whichever is spent first ends the search; None does not limit. ``verify_share`` is kept for verification: of 20
    launches, three each of the default and a finalist. Two say little of what launches differ by. A search whose
    proposals promise less than ``min_gain`` (a share of the front's hypervolume) ends before; 0: none does."""

    launches: int | None = None
    hours: float | None = None
    usd: float | None = None
    verify_share: float = 0.3
    min_gain: float = field(default=MIN_GAIN, repr=False)  # tuners of earlier versions agree on the rest in words


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """``name`` of the GPU (a row of the hardware table, else as its driver calls it) or ``cpu``; how many ``gpus`` the
    study may use. ``rows`` are the study's own of the hardware table (``tuner.search.hardware.table``)."""

    name: str
    gpus: int
    memory_bytes: int = 0
    rows: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """Where trials run: ``local``, or ``ray`` on the cluster at ``address``. ``store`` (any fsspec path) takes large
    records on their way home; a trial asks for ``cpus`` beside its GPUs."""

    kind: str = "local"
    address: str = "auto"
    store: str = ""
    cpus: float = 1.0


@dataclass(frozen=True, slots=True)
class Study:
    """One tuning run of one model on one kind of hardware under one workload.

    ``folder`` is the study folder; ``source`` the file it was read from; ``frozen`` the resolved document that is
    written to ``study.yaml`` (reading it again gives the same study). ``predictor`` (``package.module:callable``) is
    asked in place of the analytic model. ``parallel`` bounds the trials at once; 0: as
    many as fit.
    """

    name: str
    folder: str
    source: str
    model: str
    engine: EngineSpec
    hardware: HardwareSpec
    space: SearchSpace
    objective: Objective
    trace: TraceSpec
    load: LoadSpec
    budget: Budget
    predictor: str = ""
    sampler: str = "auto"
    seed: int = 0
    parallel: int = 1
    executor: ExecutorSpec = ExecutorSpec()
    warm_start: tuple[str, ...] = ()
    tracking_uri: str = ""
    storage: StorageSpec = field(default_factory=StorageSpec)
    frozen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned_ends(self) -> bool:
        """Whether rates are over a step's planned length. A study that earlier versions began goes on with theirs, to
        the last request: its launches are compared with each other."""
        return self._has("planned_ends")

    @property
    def fills_cache(self) -> bool:
        """Whether a trace's prefixes decide what is sent before each step. A study that earlier versions began fills
        nothing unless it says so."""
        return self._has("fills_cache")

    @property
    def heldout_windows(self) -> int | None:
        """How many windows are held out; None: as many as the trace has room for (:data:`HELD_OUT`). A study that
        earlier versions began holds out three unless it says so."""
        asked = self.trace.heldout_windows
        return HELD_OUT[0] if asked is None and not self._has(WIDELY) else asked

    @property
    def grows(self) -> bool:
        """Whether a launch of the search that holds the ladder's highest load is asked for more: where the ladder was
        left to the tuner, and is settled. A study that earlier versions began keeps its own."""
        return self.frozen.get("frozen", {}).get("ladder") == "auto" and self._has(GROWS)

    @property
    def rules(self) -> frozenset[str]:
        """Those of :data:`RULES` by which it is measured."""
        return frozenset(rule for rule in RULES if self._has(rule))

    def _has(self, rule: str) -> bool:
        return self.frozen.get("frozen", {}).get(rule, not self.frozen)
