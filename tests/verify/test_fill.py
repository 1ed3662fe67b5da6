import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests import studies
from tuner.export.deployment import deployment
from tuner.pareto.choice import of_trial
from tuner.pareto.recommend import recommended
from tuner.spec.study import Study
from tuner.study.outcome import Step
from tuner.study.store import Store, write_json
from tuner.verify.fill import WHY, unfilled


def answered(load: float, mean_s: float, **more) -> Step:
    return Step(load, "w", {"e2e_mean_s": mean_s}, **more)


def windowed(study: Study, window_s: float = 30.0) -> Study:
    return replace(study, trace=replace(study.trace, window_s=window_s), load=replace(study.load, warmup_s=3.0))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return windowed(studies.study(tmp_path))


def test_a_window_of_few_responses_is_said_with_its_figures_and_what_would_do(study):
    assert unfilled(study, [answered(1.8, 9.0)], 1.77) == (
        f"A window measured 27 s, 3 mean responses: {WHY}. "
        "Under traffic that stays, take a lower load, or tune with trace.window of 93 s or more."
    )
    assert "6 mean" in unfilled(windowed(study, 57.0), [answered(1.8, 9.0)], 1.77)


def test_ten_mean_responses_are_enough(study):
    assert not unfilled(study, [answered(1.8, 2.7)], 1.77)
    assert unfilled(study, [answered(1.8, 2.71)], 1.77)


def test_what_counts_are_the_believed_steps_near_the_load_else_the_nearest(study):
    steps = [answered(0.5, 1.0), answered(1.6, 2.0), answered(1.9, 3.0), answered(4.0, 60.0)]
    steps += [answered(1.77, 60.0, untrusted=("lag",)), answered(1.77, math.inf)]
    assert not unfilled(study, steps, 1.77)
    assert "9 mean" in unfilled(study, steps[2:3], 1.0)
    beyond = answered(1.87, 60.0, slo_misses=("tpot_p99 70 ms > 60 ms",))  # as long as the queue grows
    assert not unfilled(study, [*steps, beyond], 1.77) and unfilled(study, [beyond], 1.77)
    assert not unfilled(study, [answered(0.5, 1.0), answered(4.0, 60.0)], 0.3)


def test_nothing_is_said_where_no_traffic_is_replayed_or_no_response_timed(study):
    slow = [answered(1.0, 9.0)]
    assert unfilled(study, slow, 1.0)
    assert not unfilled(replace(study, engine=replace(study.engine, kind="function")), slow, 1.0)
    assert not unfilled(replace(study, trace=replace(study.trace, file="")), slow, 1.0)
    assert not unfilled(study, [Step(1.0, "w", {"ttft_p99_s": 0.1})], 1.0)
    assert not unfilled(study, [], 1.0)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Study, Store]:
    """A study whose steps tell responses of 9 s, of windows of 27 s."""
    study, store = studies.write(tmp_path / "s", trials=10)
    for trial in store.trials():
        steps = tuple(replace(s, metrics={**s.metrics, "e2e_mean_s": 9.0}) for s in trial.outcome.steps)
        store.end_trial(trial.number, replace(trial.outcome, steps=steps), 60.0)
    return windowed(study), store


def test_a_choice_of_the_search_and_what_is_exported_of_it_say_so(made):
    study, store = made
    choice = recommended(store, study)
    assert choice.text.count(WHY) == 1
    assert sum(WHY in line for line in deployment(store, study).about) == 1
    assert choice.point
    by_hand = of_trial(store.trials(), study.objective, choice.point.trial)
    assert any(WHY in line for line in deployment(store, study, by_hand).about)
    assert not any(WHY in line for line in deployment(store, windowed(study, 100.0)).about)


def test_what_was_verified_says_so_once_beside_its_verdict(made):
    study, store = made
    write_json(store.folder / "verify.json", studies.verification(study, store).to_dict())
    choice = recommended(store, study)
    assert choice.point and choice.point.role == "verify" and choice.text.count(WHY) == 1
    assert WHY not in recommended(store, windowed(study, 100.0)).text
