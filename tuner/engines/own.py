"""The engine ``own``: a class of the user's, of which a study gets nothing that the contract does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, get_type_hints

from tuner.engines.function import (
    RAISED,
    beside,
    checked,
    load_target,
    needed,
    printing_aside,
    raised_in,
    refused,
    wrong,
)
from tuner.engines.protocol import Cancelled, Endpoint, Engine, LaunchFailed, Server, Site, StepPlan, Teardown
from tuner.errors import Infeasible as SaysInfeasible
from tuner.errors import TunerError, UsageError, encodable
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Boot, Infeasible, Step

T = TypeVar("T")
_CONFORMANCE = "python -m tuner.engines.conformance my_tests:TestMyEngine says what else is missing (docs/engines.md)"


class OwnEngine:
    """Implements :class:`tuner.engines.protocol.Engine` by ``made``, which ``target`` names. What that raises beside
    what the contract knows is a wrong ``target`` before a launch, and one configuration's crash afterwards."""

    def __init__(self, made: Any, target: str, required: tuple[str, ...]) -> None:
        self._made, self._target, self._required = made, target, required
        self.kind, self.emulated = str(made.kind), bool(made.emulated)

    @classmethod
    def from_study(cls, study: Study) -> OwnEngine:
        """Of a study's class: by its ``from_study(study)`` where it has one, else called with the other options.
        Raises ``UsageError`` where there is no such class, and where it is no engine."""
        options = dict(study.engine.options)
        target = options.pop("target", "")
        if not isinstance(target, str) or not target:
            fix = 'write engine: {kind: own, target: "my_engine.py:MyEngine"}'
            raise UsageError("an engine of your own needs a target", fix=fix)
        found: Any = load_target(target, beside(study))
        made = _told(target, lambda: found.from_study(study) if hasattr(found, "from_study") else found(**options))
        names = (*get_type_hints(Engine), "version", "flags", "launch")
        if lacks := [name for name in names if not hasattr(made, name)]:
            raise UsageError(f"{target} is no engine: it has no {', '.join(lacks)}", fix=_CONFORMANCE)
        return cls(made, target, needed(study.objective))

    def __getattr__(self, name: str) -> Any:
        """What an engine may have beside the contract."""
        return getattr(self._made, name)

    def version(self) -> str:
        """See the protocol."""
        return str(_told(f"{self._target}.version", self._made.version))

    def flags(self) -> frozenset[str] | None:
        """See the protocol."""
        name = f"{self._target}.flags"
        return _told(name, lambda: None if (known := self._made.flags()) is None else frozenset(known))

    def launch(self, config: ServingConfig, site: Site) -> OwnServer:
        """See the protocol."""
        return _crashing("start-up", lambda: OwnServer(self._made.launch(config, site), self._target, self._required))


class OwnServer:
    """Implements :class:`tuner.engines.protocol.Server` by what the user's engine launched."""

    def __init__(self, server: Server, target: str, required: tuple[str, ...]) -> None:
        self.endpoint: Endpoint | None = server.endpoint
        self.boot: Boot = server.boot
        self._server, self._target, self._required = server, target, required

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol. Raises ``UsageError`` for what is no step; one without records that says too little is a
        crash."""
        step, name = _crashing("under load", lambda: self._server.measure(plan)), f"{self._target}.measure"
        if not isinstance(step, Step):
            raise UsageError(f"{name} returned {type(step).__name__}, not a Step", fix=_CONFORMANCE)
        if step.records or step.slo_misses or step.untrusted:
            return step
        try:
            return replace(step, metrics=checked(step.metrics, name, self._required))
        except UsageError as error:
            raise LaunchFailed(wrong(error)) from error

    def stop(self) -> Teardown:
        """See the protocol."""
        try:
            with printing_aside():
                return self._server.stop()
        except RAISED as error:
            return Teardown(left_over=(f"{self._target}.stop: {raised_in(error)}",))


def _told(name: str, ask: Callable[[], T]) -> T:
    """What ``ask`` returns. Raises ``UsageError`` for what it raises of its own."""
    try:
        with printing_aside():
            return ask()
    except TunerError:
        raise
    except RAISED as error:
        raise UsageError(f"{name}: {raised_in(error)}") from error


def _crashing(stage: str, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns. What it raises of its own is a crash of the configuration."""
    try:
        with printing_aside():
            return attempt()
    except (TunerError, LaunchFailed, Cancelled):
        raise
    except SaysInfeasible as error:
        raise LaunchFailed(refused(error, stage)) from None
    except RAISED as error:
        message = encodable(f"the engine raised {type(error).__name__}: {error}")
        fix = "correct it, or raise tuner.engines.protocol.LaunchFailed with the outcome"
        raise LaunchFailed(Infeasible("crash", message, raised_in(error), fix, stage)) from error
