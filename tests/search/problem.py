"""A small problem with a known truth for the tests of the search: 5 parameters, a condition, a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.search import ledger
from tuner.search.prediction import Prediction
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter, Rule, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse
from tuner.study.outcome import Boot, Infeasible, Measured, Outcome, Step

LOADS = (0.5, 1.0, 2.0, 4.0)


def knob(name: str, *values: Any, default: Any, **more: Any) -> Parameter:
    return Parameter(name, values, tuple(Emission({name: v}) for v in values), default, **more)


def space() -> SearchSpace:
    return SearchSpace(
        "test",
        "emulator",
        (
            knob("gpus", 1, 2, 4, default=1, numeric=True, log=True, counts_gpus=True),
            knob("batch", 8, 16, 32, 64, 128, default=16, numeric=True, log=True),
            knob("half", True, False, default=False),
            knob("guess", "none", "ngram", default="none"),
            knob("length", 2, 4, 8, default=0, numeric=True, when={"guess": "ngram"}),
        ),
        rules=(Rule({"batch": 8, "gpus": 4}, "a batch of 8 cannot be cut in four"),),
    )


def objective() -> Objective:
    return Objective("chat", "tpot_p99", (parse("ttft_p99=500ms"), parse("tpot_p99=60ms")), 2.0)


def truth(params: Mapping[str, Any], load: float) -> dict[str, float]:
    """Latencies and cost without noise."""
    gpus, batch = params["gpus"], params["batch"]
    top = 2.0 * gpus**0.8 * (batch / 32) ** 0.3 * (1.5 if params["half"] else 1.0)
    busy = min(load / top, 0.999)
    tpot = 0.02 / gpus**0.5 * (batch / 32) ** 0.2 * (0.7 if params["half"] else 1.0)
    if params["guess"] == "ngram":
        tpot *= {2: 0.85, 4: 0.75, 8: 0.9}[params["length"]]
    tokens = 400.0 * min(load, top)
    return {
        "ttft_p99_s": 0.05 / (1 - busy) if load < top else 9.0,
        "tpot_p99_s": tpot * (1 + busy),
        "output_tokens_per_s": tokens,
        "cost_usd_per_mtok_output": 2.0 * gpus / 3600 / tokens * 1e6,
    }


def launch(params: Mapping[str, Any], *, crash: Any = None, noise: float = 0.0, loads: tuple = LOADS) -> Outcome:
    """One launch up to the first miss; ``crash(params)`` says whether it runs out of memory."""
    if crash is not None and crash(params):
        return Infeasible("oom-kv", "out of memory", short_bytes=3 * 2**30)
    steps = []
    for load in loads:
        metrics = {k: v * math.exp(noise) for k, v in truth(params, load).items()}
        misses = tuple(text for slo in objective().slos if (text := slo.miss(metrics)))
        steps.append(Step(load, "search-0", metrics, slo_misses=misses))
        if misses:
            break
    return Measured(tuple(steps), Boot(30.0))


class Model:
    """An analytic model: the truth, multiplied by ``wrong(params)``; what ``refuse(params)`` says does not fit."""

    def __init__(self, wrong: Any = None, refuse: Any = None) -> None:
        self.wrong, self.refuse = wrong, refuse

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        params = space().snap(config.params)
        if self.refuse and self.refuse(params):
            return Prediction(False, reason="weights alone need 90 GiB", short_bytes=10 * 2**30)
        factor = self.wrong(params) if self.wrong else 1.0
        metrics = truth(params, load * factor)
        metrics["tpot_p99_s"] *= factor
        return Prediction(True, metrics, 1e5)

    def capacity(self, config: ServingConfig) -> float:
        fine = [x for x in LOADS if not any(s.miss(self.predict(config, x).metrics) for s in objective().slos)]
        return max(fine, default=0.0)


def study(sampler: Any) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def run(book: Any, launches: int, **how: Any) -> list[dict[str, Any]]:
    """Asks, launches and tells; returns the parameters in the order of the launches."""
    tried = []
    for n in range(launches):
        trial, params = ledger.ask(book, space())
        tried.append(params)
        times = {"started_s": 1000.0 * n + 1, "ended_s": 1000.0 * n + 200}
        ledger.tell(book, trial, space(), objective(), launch(params, **how), **times)
    return tried
