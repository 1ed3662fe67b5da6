"""What rules of thumb say of a parameter that the model leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.search.problem import LOADS, Model, knob, objective, study
from tuner.search import ledger
from tuner.search.candidates import Candidates, distribution_values
from tuner.search.foresight import Foresight
from tuner.search.prediction import Prediction
from tuner.search.reading import read
from tuner.search.sampler import TunerSampler
from tuner.space.config import ServingConfig
from tuner.space.space import Rule, SearchSpace
from tuner.study.outcome import Boot, Infeasible, Measured, Step

RULED = SearchSpace(
    "test",
    "emulator",
    (
        knob("gpus", 1, 2, 4, default=1, numeric=True, log=True, counts_gpus=True),
        knob("max_num_seqs", 8, 16, 32, default=16, numeric=True, log=True),
        knob("method", "none", "ngram", default="none"),
        knob("all2all_backend", "naive", "deepep", default="naive", when={"method": "ngram"}),
        knob("async_scheduling", True, False, default=False),
        knob("shade", "red", "blue", default="red"),
    ),
)


class Terse(Model):
    """Knows GPUs and sequences, and of memory what the scheduling takes where ``frugal``."""

    def __init__(self, frugal: bool = False) -> None:
        super().__init__()
        self.frugal = frugal

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        params = RULED.snap(config.params)
        seconds = 0.02 / params["gpus"] ** 0.5 * (params["max_num_seqs"] / 32) ** 0.2
        metrics = {"ttft_p99_s": 0.05, "tpot_p99_s": seconds, "cost_usd_per_mtok_output": params["gpus"] / load}
        return Prediction(True, metrics, 1e5 + self.frugal * 1e4 * params["async_scheduling"])


def ruled(model: Any) -> TunerSampler:
    return TunerSampler(RULED, objective(), LOADS, model, "m")


def left_out(model: Any) -> list[str]:
    found = ruled(model).beliefs.sources.left_out()
    return [p.name for p, out in zip(RULED.parameters, found, strict=True) if out]


def test_what_the_model_leaves_out_and_rules_know_is_found():
    assert left_out(Terse()) == ["all2all_backend", "async_scheduling"], "no rule knows the shade"
    assert left_out(Terse(frugal=True)) == ["all2all_backend"], "what changes the room for KV is not left out"


def test_a_parameter_that_no_candidate_has_is_not_called_left_out():
    never = SearchSpace(
        "test",
        "emulator",
        (*RULED.parameters[:3], knob("all2all_backend", "naive", "deepep", default="naive", when={"method": "draft"})),
    )
    one = Foresight(Candidates.of(never, 0), objective(), LOADS, Terse(), "m")
    assert not one.silent_on(3) and one.silent_on(2)


def test_what_may_not_be_launched_or_does_not_fit_says_nothing_of_what_is_left_out():
    class Table(Terse):
        def predict(self, config: ServingConfig, load: float) -> Prediction:
            params = RULED.snap(config.params)
            if params["gpus"] == 1 and params["max_num_seqs"] == 32:
                raise KeyError("the table has no such row")
            if params["gpus"] == 4:
                return Prediction(False, reason="full", short_bytes=1 + params["async_scheduling"])
            return super().predict(config, load)

    fenced = replace(RULED, rules=(Rule({"gpus": 1, "max_num_seqs": 32}, "never measured"),))
    one = Foresight(Candidates.of(fenced, 0), objective(), LOADS, Table(), "m")
    assert one.silent_on(4) and not one.silent_on(1)
    alone = replace(RULED, rules=(Rule({"async_scheduling": True}, "not here"),))
    assert not Foresight(Candidates.of(alone, 0), objective(), LOADS, Terse(), "m").silent_on(4), "nothing to compare"


def by_rules(one: TunerSampler, name: str, asked: Sequence[dict[str, Any]]) -> Any:
    indices = [one.beliefs.index(RULED.snap({**RULED.default(), **p})) or 0 for p in asked]
    found = [s for s in one.beliefs.sources.of(name, indices) if s.name == "rules of thumb"]
    return found[0].values[:, 0] if found else None


def test_rules_of_thumb_say_what_a_trusted_model_leaves_out_and_nothing_else():
    one = ruled(Terse())
    asked = [{}, {"async_scheduling": True}, {"max_num_seqs": 32}, {"method": "ngram"}]
    slow, fast, many, drafts = by_rules(one, "latency", asked)
    assert fast == pytest.approx(slow - 0.05) and many == pytest.approx(slow)
    assert drafts == pytest.approx(slow + 0.1), "naive among its own values; that it applies is no news to the model"
    assert by_rules(one, "cost", asked) is None
    assert "number of GPUs" not in [s.name for s in one.beliefs.sources.of("latency", [0])]
    one.beliefs.sources.lost = frozenset({"latency"})
    slow, fast, many, _ = by_rules(one, "latency", asked)
    assert fast < slow < many, "without the model the rules say all that they know"
    slow, fast, many, _ = by_rules(one, "capacity", asked)
    assert fast > slow == pytest.approx(many), "the capacity is the model's still"

    knows = ruled(Wordy())
    assert knows.beliefs.sources.left_out().sum() == 0 and by_rules(knows, "latency", asked) is None


class Wordy(Terse):
    """Knows something of every parameter."""

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        params, found = RULED.snap(config.params), super().predict(config, load)
        known = 1.1 ** (params["async_scheduling"] + (params["all2all_backend"] == "deepep"))
        return Prediction(True, {**found.metrics, "tpot_p99_s": found.metrics["tpot_p99_s"] / known}, found.kv_tokens)


def test_the_second_launch_already_has_what_rules_advise_beside_the_model():
    one = ruled(Terse())
    book = study(one)
    for _ in range(2):
        trial, params = ledger.ask(book, RULED)
        answers = [(load, Terse().predict(RULED.config(params, "m"), load).metrics) for load in LOADS]
        steps = tuple(Step(load, "s", dict(metrics)) for load, metrics in answers)
        ledger.tell(book, trial, RULED, objective(), Measured(steps, Boot(30.0)))
    assert params["async_scheduling"] is True
    assert trial.user_attrs["reason"].startswith("spread over the model's predicted front")


ODD = tuple(knob(f"odd_{i}", *"abcdefgh", default="c") for i in range(10))
WIDE = replace(RULED, parameters=(*RULED.parameters, *ODD))


def tell(book: Any, trial: Any, params: dict[str, Any], serves: bool = True) -> None:
    steps = tuple(Step(x, "s", dict(Terse().predict(RULED.config(params, "m"), x).metrics)) for x in LOADS)
    outcome = Measured(steps, Boot(30.0)) if serves else Infeasible("crash", "it died")
    ledger.tell(book, trial, WIDE, objective(), outcome)


@pytest.mark.parametrize(("model", "launches"), [(Terse(), 3), (None, 2)])
def test_what_nobody_knows_is_as_usual_in_what_is_tried(model: Any, launches: int):
    """A large grid is searched by samples, which have values at random; of ten parameters that neither the model nor a
    rule knows one is as usual in one of eight, and all are in next to none."""
    one = TunerSampler(WIDE, objective(), LOADS, model, "m")
    unknown = [p.name for p, out in zip(WIDE.parameters, one.beliefs.sources.unknown(), strict=True) if out]
    assert unknown == ["method", "shade", *(p.name for p in ODD)], "the rest is known by name, or counts GPUs"
    if model:
        assert sum(all(p[odd.name] == "c" for odd in ODD) for p in one.candidates.params) > 5, "before any launch"
    book = study(one)
    for _ in range(launches):
        trial, params = ledger.ask(book, WIDE)
        assert {params[name] for name in unknown} == {"none", "red", "c"}
        tell(book, trial, params)
    assert params["async_scheduling"] and params != WIDE.default()


def test_usual_is_what_served_first_where_the_default_did_not():
    one = TunerSampler(WIDE, objective(), LOADS, Terse(), "m")
    book = study(one)
    first = {**WIDE.default(), **{p.name: "h" for p in ODD}}
    for params in (WIDE.default(), first):
        book.enqueue_trial(distribution_values(WIDE, params))
        trial, asked = ledger.ask(book, WIDE)
        assert asked == WIDE.snap(params)
        tell(book, trial, asked, serves=params is first)
    _, params = ledger.ask(book, WIDE)
    assert {params[p.name] for p in ODD} == {"h"}
    alike = [p for p in one.candidates.params if all(p[odd.name] == "h" for odd in ODD)]
    assert len(alike) > 10, "not its neighbours alone"


def test_after_ten_launches_more_of_a_model_may_be_wrong_than_before():
    """Launches that the model explains to the digit, none of which has the shade: what it may do is doubted again."""
    doubts = []
    for count in (9, 10):
        one, seen = ruled(Terse()).beliefs, []
        grid = [p for p in RULED.grid() if p["shade"] == "red" and p["method"] == "none"]
        for number, params in enumerate(grid[:count]):
            steps = tuple(Step(x, "w", Terse().predict(RULED.config(params, "m"), x).metrics) for x in LOADS)
            seen.append(ledger.Seen(number, params, Measured(steps, Boot())))
        one.learn([read(each, objective(), LOADS) for each in seen], 0)
        other = one.index({**grid[0], "shade": "blue"})
        assert other is not None and not one.sources.lost
        doubts.append(float(one.posterior([other]).latency_sd.min()))
    assert doubts[1] > 1.5 * doubts[0]
