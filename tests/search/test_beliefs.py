"""What is believed of serving: causes of crashes, and margins of memory where a server was short of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.search.problem import LOADS, Model, knob, launch, objective, space
from tuner.search.beliefs import Beliefs
from tuner.search.causes import INNER, UNSEEN, Causes
from tuner.search.ledger import Seen
from tuner.search.reading import read
from tuner.search.sampler import TunerSampler
from tuner.search.scan import Scan
from tuner.space.space import SearchSpace
from tuner.study.outcome import Aborted, Infeasible, Measured, Outcome

SPACE = replace(space(), rules=())
DEFAULT: dict[str, Any] = SPACE.snap(SPACE.default())
GIB = 2**30
SERVED = launch(DEFAULT)
DIED = Infeasible("engine-died", "it died")
SHORT = Infeasible("oom-kv", "out of memory", short_bytes=3 * GIB)


def beliefs(predictor: Any = None) -> Beliefs:
    return TunerSampler(SPACE, objective(), LOADS, predictor, "m").beliefs


def learn(one: Beliefs, *launches: tuple[dict[str, Any], Outcome]) -> None:
    many = [Seen(n, SPACE.snap({**DEFAULT, **params}), outcome) for n, (params, outcome) in enumerate(launches)]
    one.learn([read(seen, objective(), LOADS) for seen in many], 0)


def works(one: Beliefs, *asked: dict[str, Any], spread: bool = True) -> list[float]:
    indices = [one.index(SPACE.snap({**DEFAULT, **params})) for params in asked]
    assert None not in indices
    return one.posterior([i for i in indices if i is not None], spread=spread).works.tolist()


def test_memory_that_was_short_is_a_margin_and_no_cause():
    one, large = beliefs(), {"batch": 128}
    learn(one, ({}, SERVED), (large, SHORT), ({"batch": 64}, SHORT))
    assert one.causes.words() == {}
    here, near, far = works(one, large, {**large, "half": True}, {"batch": 8})
    assert here < 0.25 and near < 0.5 and far > 0.6
    without = beliefs()
    learn(without, ({}, SERVED))
    assert far < works(without, {"batch": 8})[0]
    every = one.candidates.codes()
    assert one.causes.works(every) == pytest.approx(without.causes.works(every)), "it is no server that served, either"


def test_what_is_short_of_a_little_is_less_hopeless_than_what_is_short_of_much():
    found = []
    for gib in (1, 2, 6):
        one = beliefs()
        learn(one, ({}, SERVED), ({"batch": 128}, Infeasible("oom-kv", "", short_bytes=gib * GIB)))
        found.append(works(one, {"batch": 128})[0])
    assert found[0] > found[1] + 0.02 > found[2] + 0.04


def test_what_runs_is_taken_for_measured_as_it_is_believed_and_what_was_measured_stays():
    one, params = beliefs(), ({"batch": 128}, {}, {"batch": 64})
    learn(one, *((p, launch({**DEFAULT, **p})) for p in params[1:]))
    indices = [i for p in params if (i := one.index(SPACE.snap({**DEFAULT, **p}))) is not None]
    before = one.posterior(indices)
    one.believe(indices[:1])
    after = one.posterior(indices)
    for name in ("cost", "latency", "capacity"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=0.02)
        less = getattr(after, f"{name}_sd") / getattr(before, f"{name}_sd")
        assert less[0].max() < 0.8 and less[1:].max() < 1.001, name


def test_the_front_has_the_loads_that_every_repeat_held_and_those_that_what_runs_is_believed_to_hold():
    one = beliefs()
    assert isinstance(SERVED, Measured)
    again = Measured((SERVED.steps[0], replace(SERVED.steps[1], slo_misses=("late",))))
    both = [read(Seen(n, DEFAULT, outcome), objective(), LOADS) for n, outcome in enumerate((SERVED, again))]
    one.learn(both, 0)
    running = one.index(SPACE.snap({**DEFAULT, "gpus": 4}))
    assert running is not None
    sizes = [len(Scan(one, LOADS, r, p).front(None).points) for r, p in ((both[:1], []), (both, []), (both, [running]))]
    assert sizes[:2] == [2, 1] and sizes[2] > 1


def test_a_load_that_one_of_two_launches_reached_is_a_point_of_the_front_and_one_that_either_missed_is_none():
    """As where racing ended the first launch: the front that the study reports counts such a load, too."""
    held, stopped = launch({**DEFAULT, "gpus": 4}), Aborted("cannot beat the front")
    assert isinstance(held, Measured) and len([s for s in held.steps if s.ok]) > 2
    late = replace(held.steps[0], slo_misses=("late",))
    params, counts = SPACE.snap({**DEFAULT, "gpus": 4}), []
    for early in (replace(stopped, steps=held.steps[:1]), replace(stopped, steps=(late,))):
        for outcomes in ((early, held), (held, early)):
            both = [Seen(n, params, outcome) for n, outcome in enumerate(outcomes)]
            one, readings = beliefs(), [read(seen, objective(), LOADS) for seen in both]
            one.learn(readings, 0)
            counts.append(len(Scan(one, LOADS, readings, []).front(None).points))
    whole = len([s for s in held.steps if s.ok])
    assert counts == [whole, whole, whole - 1, whole - 1]


def test_nothing_is_said_of_memory_before_a_server_was_short_of_it():
    one = beliefs()
    learn(one, ({}, SERVED), ({"batch": 128}, DIED), ({"gpus": 2}, Infeasible("port", "", transient=True)))
    assert "room" not in one.fitted
    every = list(range(len(one.candidates.params)))
    assert one.posterior(every).works == pytest.approx(one.causes.works(one.candidates.codes(every)))


def test_what_was_transient_says_nothing():
    one, without = beliefs(), beliefs()
    transient = (Infeasible("port", "", transient=True), Infeasible("oom", "", transient=True, short_bytes=GIB))
    learn(one, ({}, SERVED), *(({"gpus": 2}, outcome) for outcome in transient))
    learn(without, ({}, SERVED))
    every = list(range(len(one.candidates.params)))
    assert one.posterior(every).works == pytest.approx(without.posterior(every).works)


def test_memory_is_forgotten_with_the_launch_that_was_short_of_it():
    one = beliefs()
    learn(one, ({}, SERVED), ({"batch": 128}, SHORT))
    assert works(one, {"batch": 128})[0] < 0.3
    learn(one, ({}, SERVED))
    fresh = beliefs()
    learn(fresh, ({}, SERVED))
    assert works(one, {"batch": 128}) == works(fresh, {"batch": 128})


def test_a_crash_of_another_cause_says_nothing_of_memory():
    with_it, without = beliefs(), beliefs()
    learn(without, ({}, SERVED), ({"batch": 128}, SHORT))
    learn(with_it, ({}, SERVED), ({"batch": 128}, SHORT), ({"gpus": 4}, DIED))
    asked = [with_it.index(DEFAULT), with_it.index(SPACE.snap({**DEFAULT, "gpus": 4}))]
    for spread in (True, False):
        assert with_it._enough(asked, spread) == pytest.approx(without._enough(asked, spread))


def test_a_probability_of_memory_is_no_certainty():
    """By the means alone and by the spread: a margin of one quarter of 4 GiB may be wrong by half of it."""
    one = beliefs()
    learn(one, ({}, SERVED), ({"batch": 128}, SHORT))
    asked = ({"batch": 64}, {"batch": 32}, {"gpus": 4})
    plain, spread = works(one, *asked, spread=False), works(one, *asked)
    assert all(0.5 < s < p < 0.99 for p, s in zip(plain, spread, strict=True))


def test_both_have_to_hold_memory_and_causes():
    one = beliefs()
    learn(one, ({}, SERVED), ({"batch": 128}, SHORT), ({"gpus": 4}, DIED))
    every = list(range(len(one.candidates.params)))
    causes = one.causes.works(one.candidates.codes(every))
    assert one.posterior(every).works == pytest.approx(causes * one._enough(every, True))


def test_the_models_own_memory_tells_whose_margin_is_alike():
    one = beliefs(Model())
    learn(one, ({}, SERVED), ({"batch": 128}, SHORT))
    assert [s.name for s in one.sources.of("room", [0])] == ["model"]
    assert 0 < works(one, {"batch": 128})[0] < 0.3
    assert beliefs().sources.of("room", [0]) == []


def test_a_crash_that_was_learnt_later_is_believed():
    one = beliefs()
    learn(one, ({}, SERVED))
    before = works(one, {"batch": 128})[0]
    learn(one, ({}, SERVED), ({"batch": 128}, DIED))
    assert works(one, {"batch": 128})[0] < before - 0.5


def test_a_condition_is_feared_as_its_values_are_on_average_and_one_between_is_suspected_less():
    memory = knob("gpu_memory_utilization", 0.8, 0.9, 0.95, default=0.8, numeric=True)
    colour = knob("colour", "red", "blue", "green", default="red")
    found = Causes(SearchSpace("feared", "emulator", (memory, colour)))
    prior = {t.words.removeprefix("gpu_memory_utilization "): p for t, p in zip(found.tests, found._prior, strict=True)}
    feared = 0.5 / UNSEEN
    assert prior == pytest.approx(
        {
            ">= 0.95": math.log(1 + feared),
            ">= 0.9": math.log(1 + feared / 2),
            "= 0.9": INNER,
            "<= 0.9": 0,
            "<= 0.8": 0,
            "colour = red": 0,
            "colour = blue": 0,
            "colour = green": 0,
        }
    )


def test_memory_that_was_short_of_nothing_is_a_cause_like_another():
    reading = read(Seen(0, DEFAULT, Infeasible("oom", "no room", short_bytes=0)), objective(), LOADS)
    assert (reading.cause, reading.works) == ("oom: no room", -1.0)


def test_of_many_launches_fewer_loads_are_learnt_from_and_then_fewer_launches(monkeypatch: pytest.MonkeyPatch):
    grid = [(params, launch(params)) for params in SPACE.grid()]
    many = [(params, outcome) for params, outcome in grid if isinstance(outcome, Measured) and len(outcome.steps) > 2]
    full, loads, launches = beliefs(), beliefs(), beliefs()
    learn(full, *many)
    rows = len(full.fitted["latency"].rows.y)
    assert rows == sum(len(outcome.steps) for _, outcome in many)
    for fewer, most in ((loads, rows - 1), (launches, len(many) // 2)):
        monkeypatch.setattr("tuner.search.beliefs.MOST_ROWS", most)
        learn(fewer, *many)
        seen = fewer.fitted["latency"].rows
        assert len(seen.y) <= most
        assert len(np.unique(seen.codes, axis=0)) == (len(many) if fewer is loads else len(many) // 2)
    asked = [full.index(params) for params, _ in many]
    one, other = (b.posterior([i for i in asked if i is not None]).latency[:, 0] for b in (full, loads))
    assert np.abs(one - other).max() < 0.05
