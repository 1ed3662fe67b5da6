"""How wrong the model was is counted over what was measured, in words and figures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tuner.search.ledger import Seen
from tuner.search.modelerror import ModelError, model_error
from tuner.search.reading import Reading
from tuner.study.outcome import Infeasible

# four configurations at two loads; the third does not fit, as the model has it
FORESEEN: Any = SimpleNamespace(
    predictor=object(),
    look=lambda: None,
    short_bytes=np.array([0.0, 0.0, 5.0, 0.0]),
    capacity=np.log([2.0, 4.0, math.nan, 8.0]),
    cost=np.log([[4.0, 2.0], [8.0, 5.0], [1.0, 1.0], [9.0, 6.0]]),
    latency=np.log([[0.1, 0.2], [0.1, 0.3], [1.0, 1.0], [0.2, 0.2]]),
)


def served(number: int, costs: list[float], latencies: list[float], good: tuple[int, ...], capacity: float) -> Reading:
    steps = [(place, math.log(c), math.log(s)) for place, (c, s) in enumerate(zip(costs, latencies, strict=True))]
    return Reading(Seen(number, {}), tuple(steps), good, (), math.log(capacity), 0.1, works=1.0)


def short(number: int, outcome: Infeasible) -> Reading:
    return Reading(Seen(number, {}, outcome), works=-1.0)


READINGS = [
    (0, served(0, [2.0, 2.0], [0.1, 0.1], (0, 1), 1.0)),
    (1, served(1, [4.0, 9.0], [0.2, 9.0], (0,), 4.0)),  # its second load missed
    (1, served(2, [4.0, 9.0], [0.2, 9.0], (), 9.0)),  # and this one held none: its capacity is a guess
    (2, served(3, [1.0, 1.0], [1.0, 1.0], (0, 1), 1.0)),  # served although refused
    (2, short(4, Infeasible("oom", "", short_bytes=1))),
    (3, short(5, Infeasible("oom", "", short_bytes=1))),
    (3, short(6, Infeasible("died", "died"))),
]


def test_errors_are_those_of_points_within_slo_that_the_model_had_an_answer_for():
    found = model_error(READINGS, FORESEEN, {"cost": {"model": 0.4}, "latency": {"rules": 1.0}, "room": {"model": 1}})
    assert (found.points, found.memory_crashes) == (3, 1)
    # predicted over measured: cost 2, 1, 2; latency 1, 2, 1/2; capacity 2, 1
    assert found.error == pytest.approx({"cost": 1.0, "latency": 0.5, "capacity": 0.5})
    assert found.bias == pytest.approx({"cost": 0.5, "latency": 1.0, "capacity": 1 / math.sqrt(2)})
    assert found.rank == pytest.approx({"cost": math.sqrt(3) / 2, "latency": -0.5})  # of two capacities none
    assert found.weight == {"cost": 0.4}


def test_it_is_said_in_words():
    error = ModelError(
        3, {"cost": 0.25, "capacity": 0.5}, {"cost": 1.25, "capacity": 0.5}, {"cost": 0.9}, {"cost": 0.4}, 2
    )
    assert error.words() == (
        "The model against 3 measured points: cost: off by 25% (median), measured 25% higher than predicted, rank"
        " correlation 0.90; its weight is now 0.40 of 1. capacity: off by 50% (median), measured 50% lower than"
        " predicted. 2 launches ran out of memory where it saw room."
    )
    assert "no launch met the SLOs" in ModelError().words()
    assert "no analytic model" in ModelError(has_model=False).words()
    assert not model_error(READINGS, SimpleNamespace(predictor=None), {}).has_model  # type: ignore[arg-type]
