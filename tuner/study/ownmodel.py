"""A model of your own: a callable that says what to expect of a configuration, in place of the analytic model."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.engines.function import RAISED, beside, checked, load_target, needed, printing_aside, raised_in
from tuner.engines.protocol import Cancelled
from tuner.errors import Infeasible, UsageError
from tuner.search.prediction import Prediction
from tuner.space.config import ServingConfig
from tuner.spec.objective import Objective
from tuner.spec.study import Study
from tuner.study.outcome import Step
from tuner.study.price import priced
from tuner.words import figure

DOUBT = 0.35  # standard deviation of a constant's logarithm: it may be off by a third
FAR = 1e6  # an infinite latency, in seconds
AT_ONCE_S = 0.001  # a first call that took longer may have had something to prepare
SLOW_S = 5.0  # asking that takes longer is said beforehand


@dataclass(frozen=True, slots=True)
class OwnModel:
    """A :class:`tuner.search.prediction.Predictor` over ``target``, ``package.module:callable``.

    The callable has the form of the function engine's (:class:`tuner.engines.function.FunctionEngine`): it gets the
    serving parameters (a dict, a copy) and the load, and returns metrics, or raises ``tuner.Infeasible(reason)`` for
    what cannot run, which then is never launched. Its keyword-only arguments that have a number above zero as their
    default are the model's constants: it is called with other values of them, as launches teach (a
    :class:`tuner.search.calibration.Calibratable`). Any other exception, and an answer that lacks a metric of the
    objective, is a ``UsageError``; with constants that the callable did not choose, it is no answer.

    A call takes about ``call_s`` (0: not known). Once ``cancel`` is set, every further question raises
    :class:`tuner.engines.protocol.Cancelled`.
    """

    target: str
    foresee: Callable[..., Any]
    objective: Objective
    needed: tuple[str, ...]
    lowest_load: float
    constants: Mapping[str, float]
    call_s: float = 0.0
    cancel: threading.Event = field(default_factory=threading.Event, compare=False)

    @classmethod
    def of(cls, study: Study) -> OwnModel:
        """The model that ``study`` names. It is asked of the default: a bad one is refused before anything is launched,
        and a slow one is known for that."""
        foresee = load_target(study.predictor, beside(study))
        model = cls.over(foresee, study.predictor, study.objective, study.load.ladder[0])
        default, took_s = study.space.config(study.space.default(), study.model), math.inf
        for _ in range(2):
            began_s = time.perf_counter()
            model.fit(default)
            took_s = min(took_s, time.perf_counter() - began_s)
            if took_s < AT_ONCE_S:
                break
        return replace(model, call_s=took_s)

    @classmethod
    def over(cls, foresee: Callable[..., Any], name: str, objective: Objective, lowest_load: float) -> OwnModel:
        """The model over a callable; ``name`` stands for it in messages."""
        return cls(name, foresee, objective, needed(objective), lowest_load, _constants(foresee))

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        """What the callable says of ``config`` at ``load`` times the trace's rate, with a cost."""
        if self.cancel.is_set():
            raise Cancelled
        try:
            return self._predict(config, load)
        except UsageError as error:
            if self.constants == _constants(self.foresee):
                raise
            return Prediction(False, reason=str(error))

    def _predict(self, config: ServingConfig, load: float) -> Prediction:
        try:
            with printing_aside():
                answer = self.foresee(dict(config.params), load, **self.constants)
        except Infeasible as error:
            return Prediction(False, reason=error.reason or "infeasible")
        except RAISED as error:
            raise UsageError(
                f"the predictor {self.target} failed on {dict(config.params)}: {raised_in(error)}",
                fix="return metrics, or raise tuner.Infeasible(reason) for what cannot run",
            ) from error
        try:
            told = checked(answer, self.target, self.needed)
        except UsageError as error:
            raise UsageError(f"{error.message}, for {dict(config.params)}", fix=error.fix) from error
        metrics = {name: FAR if value == math.inf else value for name, value in told.items()}
        return Prediction(True, priced(Step(load, "predicted", metrics), config, self.objective).metrics)

    def fit(self, config: ServingConfig) -> Prediction:
        """Whether ``config`` can run at all: what is said of the lowest load."""
        return self.predict(config, self.lowest_load)

    def takes(self, calls: int) -> str:
        """How long so many calls take, in words; empty where it is some seconds."""
        seconds = calls * self.call_s
        if seconds < SLOW_S:
            return ""
        unit, name = (60.0, "minutes") if seconds >= 100 else (1.0, "seconds")
        about = f"about {figure(seconds / unit, 2)} {name}"
        return f"Asking {self.target} takes {about}: {calls:,} calls of {figure(self.call_s * 1e3, 2)} ms."

    def doubts(self) -> dict[str, float]:
        """How little is known of each constant."""
        return dict.fromkeys(self.constants, DOUBT)

    def scaled(self, factors: Mapping[str, float]) -> OwnModel:
        """This model with its constants times ``factors``."""
        return replace(self, constants={n: value * factors.get(n, 1.0) for n, value in self.constants.items()})


def _constants(foresee: Callable[..., Any]) -> dict[str, float]:
    try:
        arguments = inspect.signature(foresee).parameters.values()
    except (TypeError, ValueError):
        return {}
    known = [(a.name, a.default) for a in arguments if a.kind is a.KEYWORD_ONLY]
    return {n: float(v) for n, v in known if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0}
