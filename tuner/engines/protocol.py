"""What an engine is: it turns one serving config into one running server that can be measured and stopped.

An engine's author implements :class:`Engine` and :class:`Server`; the study loop knows nothing else of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo
from tuner.study.outcome import Boot, Infeasible, Step

OnEvent = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a launch happens: ``folder`` (absolute, exists) takes the server's log and temporary files; ``gpus`` the
    indices of the leased GPUs (empty on a CPU server), ``cancel`` is set when the user interrupts; ``on_event`` is
    told of progress (``("phase", {"name": "weights", "elapsed_s": 3.1})``) from any thread, and must not block. An
    engine that waits for what others have tells ``waiting`` (``for`` what), and ``leased`` when its launch begins. One
    whose time is not the wall's tells ``took`` (its own ``seconds``) when a launch has ended."""

    folder: Path
    gpus: tuple[int, ...]
    cancel: threading.Event
    on_event: OnEvent


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One load step to measure.

    ``trace`` is the window's own requests, unwarped; the replay divides its gaps by ``load``. Requests whose intended
    send time lies in the first ``warmup_s`` seconds of the replay are sent but not counted. ``records`` is the
    Parquet file to write. ``output`` is ``forced`` (``ignore_eos``, ``min_tokens``) or ``free``.
    ``request_timeout_s`` bounds one request. ``early_stop`` lets the step end once its outcome is decided.
    """

    load: float
    trace: Trace
    window: str
    slos: tuple[Slo, ...]
    records: Path
    warmup_s: float = 0.0
    output: str = "forced"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    request_timeout_s: float = 600.0
    early_stop: bool = True
    quantiles: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99)
    cancel: threading.Event = field(default_factory=threading.Event)
    on_event: OnEvent = lambda _name, _data: None

    def when_filled(self, do: Callable[[], object]) -> StepPlan:
        """This plan, where ``do`` is called once what came before the window was sent: what it did to the server, or to
        a clock, is no part of the step."""
        tell = self.on_event

        def hear(name: str, data: Mapping[str, Any]) -> None:
            if name == "filled":
                do()
            tell(name, data)

        return replace(self, on_event=hear)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server: base URL without ``/v1`` (``http://127.0.0.1:8000``), bearer key, served model
    name, and the model folder (or id) that holds its tokenizer, where known."""

    url: str
    model: str
    api_key: str = ""
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class Teardown:
    """How a server went: seconds taken, whether SIGKILL was needed, and whatever is still there (empty: clean)."""

    seconds: float = 0.0
    killed: bool = False
    left_over: tuple[str, ...] = ()


class LaunchFailed(Exception):
    """The server did not come up; ``outcome`` says why. The engine has already cleaned up, and ``teardown`` says how
    that went."""

    def __init__(self, outcome: Infeasible) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome
        self.teardown = Teardown()


class Cancelled(Exception):
    """``cancel`` was set; whatever was started has been stopped, and ``teardown`` says how that went."""

    teardown: Teardown = Teardown()


class Server(Protocol):
    """A running server. ``endpoint`` is None where it is not reached over HTTP (function engine)."""

    endpoint: Endpoint | None
    boot: Boot

    def measure(self, plan: StepPlan) -> Step:
        """Measures one load step and writes its records.

        A request's error is part of the records. If the server died or became unhealthy, raises :class:`LaunchFailed`
        whose outcome has ``stage="under load"`` and the diagnosis. Raises :class:`Cancelled` when ``plan.cancel`` is
        set (the records until then are written).
        """
        ...

    def stop(self) -> Teardown:
        """Stops the whole process tree; safe to call twice; never raises. Afterwards the port is free."""
        ...


class Engine(Protocol):
    """Launches servers of one kind.

    ``kind`` is the word in the study file (of an engine of the user's own any name); ``emulated`` marks everything it
    measures as emulated.
    """

    kind: str
    emulated: bool

    def version(self) -> str:
        """The engine's version (``0.32.0+cpu``), asked once and cached. Raises ``EnvironmentFault`` where there is no
        such engine on this machine."""
        ...

    def flags(self) -> frozenset[str] | None:
        """The flags that the installed version knows, without dashes, asked once and cached; None: any."""
        ...

    def launch(self, config: ServingConfig, site: Site) -> Server:
        """Starts a server and waits until it answers for itself. Blocks; raises :class:`LaunchFailed` or
        :class:`Cancelled`, in both cases with nothing left behind but what their ``teardown`` names."""
        ...
