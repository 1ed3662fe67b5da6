"""Where trials run: an executor takes trials one by one, gives them GPUs on one node, and brings their files home.

The study loop and the verification know this protocol and nothing else of it. Here it is one machine (``local``) or a
Ray cluster (``ray``); the trial itself is :func:`tuner.study.evaluate.evaluate` on either.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuner.engines.protocol import Teardown
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.study.outcome import Boot, Outcome, Step


@dataclass(frozen=True, slots=True)
class Job:
    """One launch to make. ``folder`` is the trial's in the study folder (it exists, and is complete when the job has
    ended), ``window`` what its ladder replays (None: a launch that is measured through :class:`Rig`); ``baseline`` and
    ``why`` are told with the event ``launch``; ``checked``: its answers passed the quality floor before."""

    number: int
    config: ServingConfig
    folder: Path
    window: Trace | None = None
    baseline: bool = False
    why: str = ""
    checked: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launch ran. ``node`` is empty on the tuner's own machine; ``device`` is a row of the hardware table (or
    what the node calls it), ``driver`` its driver's version; the price is USD per GPU-hour (per server-hour without
    GPUs)."""

    node: str = ""
    device: str = ""
    price_usd_per_gpu_hour: float = 0.0
    driver: str = ""

    def notes(self) -> dict[str, Any]:
        """What of it belongs to the trial's record."""
        said = {"node": self.node, "device": self.device, "driver": self.driver}
        return {k: v for k, v in said.items() if v} | {"price_usd_per_gpu_hour": self.price_usd_per_gpu_hour}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. ``outcome`` None: it was never launched (an interrupt came first) and may be taken back, or it
    raised ``error`` (a bug, ``EnvironmentFault``). ``seconds`` is for how long it had its GPUs."""

    job: Job
    outcome: Outcome | None
    teardown: Teardown
    place: Place
    seconds: float
    error: BaseException | None = None


class NodeLost(Exception):
    """The node under a running server is gone, drained or without its GPU; the message says which and why."""


class Rig(Protocol):
    """One running server, measured step by step."""

    @property
    def boot(self) -> Boot: ...

    place: Place

    def measure(self, load: float, trace: Trace, prefix: str) -> Step:
        """One step; its records go to the job's folder, under a name that begins with ``prefix``. Raises as
        :meth:`tuner.engines.protocol.Server.measure` does, and :class:`NodeLost`."""
        ...


class Executor(Protocol):
    """Runs jobs. Not for several threads: one caller submits, waits and closes.

    ``left_over`` is what the servers of :meth:`rig` left behind, in words (empty: nothing).
    """

    left_over: tuple[str, ...]

    def room(self) -> bool:
        """Whether a job submitted now may start now. While a job waits for GPUs there is none."""
        ...

    def submit(self, job: Job) -> None:
        """Takes a job; it starts when its GPUs are free. Raises ``EnvironmentFault`` where it can never start."""
        ...

    def wait(self, timeout_s: float) -> list[Ended]:
        """The jobs that ended since the last call; waits for one up to ``timeout_s``. A job whose node was lost is
        started once more elsewhere, and that is said (event ``lost``); lost again, it ends as Aborted."""
        ...

    def rig(self, job: Job) -> AbstractContextManager[Rig]:
        """Launches ``job`` and leaves measuring to the caller; stops the server at the end of the ``with``. Raises as
        :meth:`tuner.engines.protocol.Engine.launch` does (below the quality floor, too), and :class:`NodeLost`."""
        ...

    def seconds(self, number: int) -> float:
        """For how long the trial of :meth:`rig` has had its GPUs: not the time for which it waited for them."""
        ...

    def close(self, at_once: bool = False) -> None:
        """Ends what still runs and gives everything back; ``at_once`` without waiting for it, because this process ends
        and the guards end the servers. Safe to call twice."""
        ...
