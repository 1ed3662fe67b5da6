"""What Optuna is told: finite values, one constraint on every trial, crashes as information."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from tests.search.problem import LOADS, launch, objective, space, study
from tuner.search import choose, ledger, reading
from tuner.search.ledger import CRASH_VIOLATION, answered, values
from tuner.study.outcome import Aborted, Infeasible, Measured, Step, Untrusted


def good() -> Measured:
    outcome = launch({"gpus": 2, "batch": 32, "half": True, "guess": "none", "length": 0})
    assert isinstance(outcome, Measured)
    return outcome


def test_a_measured_outcome_is_its_lowest_cost_and_lowest_latency_within_slo():
    steps = [s for s in good().steps if s.ok]
    cost, latency, violation = values(good(), objective())
    assert cost == min(s.metrics["cost_usd_per_mtok_output"] for s in steps)
    assert latency == min(s.metrics["tpot_p99_s"] for s in steps)
    assert violation == 0


@pytest.mark.parametrize(
    "outcome",
    [
        Infeasible("oom-kv", "out of memory"),
        Infeasible("died", "died under load", stage="under load", steps=good().steps),
        Untrusted(("client lag",), steps=good().steps),
        Aborted("interrupted"),
        Aborted("interrupted", steps=good().steps),  # launched again, and told then
        Aborted("cannot beat the front"),
        Measured((Step(1.0, "w", {"ttft_p99_s": 9.0, "tpot_p99_s": math.inf}, slo_misses=("ttft",)),)),
        Measured((Step(1.0, "w", {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01, "cost_usd_per_mtok_output": math.inf}),)),
        Measured((replace(good().steps[0], untrusted=("client lag",)),)),
    ],
)
def test_whatever_has_no_point_is_told_as_violated_with_finite_penalties(outcome):
    cost, latency, violation = values(outcome, objective(), worst=(7.0, 0.5))
    assert (cost, latency) == (7.0, 0.5)
    assert violation > 0 and math.isfinite(violation)


def test_what_racing_stopped_is_told_with_the_points_that_it_served():
    """Its steps are on the front: told as violated, the samplers would avoid what is best there."""
    stopped = Aborted("cannot beat the front", steps=good().steps[:1])
    first = stopped.steps[0]
    told = (first.metrics["cost_usd_per_mtok_output"], first.metrics["tpot_p99_s"], 0)
    assert first.ok and values(stopped, objective(), worst=(7.0, 0.5)) == told
    assert reading.read(ledger.Seen(0, {}, stopped), objective(), LOADS).good == (0,)


def test_a_near_miss_is_violated_less_than_a_far_one_and_a_crash_most():
    def miss(ttft_s: float) -> Measured:
        return Measured((Step(1.0, "w", {"ttft_p99_s": ttft_s, "tpot_p99_s": 0.01}, slo_misses=("ttft",)),))

    near, far = values(miss(0.55), objective())[2], values(miss(5.0), objective())[2]
    crash = values(Infeasible("died", "died"), objective())[2]
    assert 0 < near < far < crash == CRASH_VIOLATION


def test_a_crash_is_never_better_than_the_worst_server_that_worked():
    book = study(choose.sampler("random", space(), objective(), LOADS))
    told = []
    for outcome in (good(), Infeasible("died", "died"), good()):
        trial, _ = ledger.ask(book, space())
        told.append(ledger.tell(book, trial, space(), objective(), outcome))
    assert told[1][0] >= told[0][0] and told[1][1] >= told[0][1]
    assert [t.constraints["slo"] > 0 for t in book.trials] == [False, True, False]
    assert len(book.best_trials) >= 1 and all(t.number != 1 for t in book.best_trials)


def test_what_was_told_is_read_back():
    book = study(choose.sampler("random", space(), objective(), LOADS))
    trial, params = ledger.ask(book, space())
    ledger.tell(book, trial, space(), objective(), good(), started_s=5.0, ended_s=65.0)
    running, other = ledger.ask(book, space())
    first, second = ledger.read(book, space())
    assert (first.params, first.outcome, first.seconds, first.free) == (params, good(), 60.0, False)
    assert (second.number, second.params, second.outcome) == (running.number, other, None)
    ledger.tell(book, running, space(), objective(), Infeasible("rule", "no"), free=True)
    assert ledger.read(book, space())[1].free
    book.ask()  # of which no parameter was drawn so far
    book.tell(book.ask(), state=TrialState.FAIL)  # and which has no outcome
    assert len(ledger.read(book, space())) == 2
    drawn = book.ask(space().distributions())  # as another process has it between the draw and its note
    assert ledger.read(book, space())[2:] == [ledger.Seen(drawn.number, space().snap(drawn.params))]


def test_what_answers_for_a_configuration():
    assert answered(good()) and answered(Infeasible("died", "died")) and answered(Aborted("beaten", good().steps))
    assert not answered(Infeasible("port", "port taken", transient=True))
    assert not answered(Untrusted(("lag",))) and not answered(Aborted("interrupted")) and not answered(None)


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "grid", "auto"])
def test_every_sampler_works_with_crashes_refusals_and_repeats(name):
    book = study(choose.sampler(name, space(), objective(), LOADS, seed=1))
    for n in range(14):
        trial, params = ledger.ask(book, space())
        denied = space().denied(params)
        outcome = Infeasible("rule", denied) if denied else launch(params, crash=lambda p: p["gpus"] == 2)
        ledger.tell(book, trial, space(), objective(), outcome, free=bool(denied), started_s=n + 1.0, ended_s=n + 2.0)
    assert len({tuple(t.constraints) for t in book.trials}) == 1  # GPSampler refuses trials whose keys differ
    assert all(math.isfinite(v) for t in book.trials for v in t.values)
