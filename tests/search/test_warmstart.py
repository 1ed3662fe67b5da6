"""An earlier study is a prior mean whose weight is what it turns out to be worth."""

from __future__ import annotations

from typing import Any

from tests.search.problem import LOADS, launch, objective, run, space, study
from tests.search.test_sampler import regret
from tuner.search.sampler import TunerSampler
from tuner.search.warmstart import Earlier, earlier
from tuner.study.outcome import Infeasible, Outcome


def trials(flip: bool = False) -> list[tuple[dict[str, Any], Outcome]]:
    """Every fourth configuration of the grid; ``flip`` gives each the outcome of its opposite."""
    found = []
    for params in list(space().grid())[::4]:
        told = dict(params)
        if flip:
            told |= {"gpus": {1: 4, 2: 2, 4: 1}[params["gpus"]], "half": not params["half"]}
            told["batch"] = {8: 128, 16: 64, 32: 32, 64: 16, 128: 8}[params["batch"]]
        found.append((params, launch(told, noise=0.7)))  # another model: everything twice as slow
    return found


def warm(*studies: Earlier | None) -> TunerSampler:
    return TunerSampler(space(), objective(), LOADS, None, "m", earlier=[s for s in studies if s])


def of(name: str, known: list[tuple[dict[str, Any], Outcome]]) -> Earlier | None:
    return earlier(name, known, space(), objective(), LOADS)


def test_a_study_like_this_one_helps_a_cold_start():
    cold = regret(run(study(warm()), 5))
    helped = regret(run(study(warm(of("sibling", trials()))), 5))
    assert helped < 0.6 * cold


def test_an_earlier_study_knows_of_every_parameter():
    assert warm().beliefs.sources.unknown().any()
    assert not warm(of("sibling", trials())).beliefs.sources.unknown().any()


def test_a_study_that_misleads_loses_its_weight_and_one_that_helps_keeps_it():
    weights = {}
    for name, known in {"sibling": trials(), "opposite": trials(flip=True)}.items():
        sampler = warm(of(name, known))
        run(study(sampler), 12)
        weights[name] = sampler.beliefs.weights()["latency"][name]
    assert weights["sibling"] > 0.6 > 0.3 > weights["opposite"]


def test_parameters_are_matched_by_name_and_what_has_no_counterpart_is_passed_over():
    known = [({**p, "extra": 1}, o) for p, o in trials()] + [({"guess": "telepathy"}, trials()[0][1])] * 3
    found = of("wider", known)
    assert found is not None and found.launches == len(trials())


def test_a_study_with_too_little_to_say_is_left_out():
    assert of("empty", []) is None
    assert of("crashes", [(p, Infeasible("died", "died")) for p, _ in trials()]) is None
    assert of("one", trials()[:1] * 5) is None
