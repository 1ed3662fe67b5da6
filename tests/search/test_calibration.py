"""The analytic model's constants from launches: a machine that gives less than the data sheet is recognised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.search.problem import LOADS, Model, knob, objective, run, space, study
from tests.search.test_model_predictor import config, model
from tests.search.test_sampler import regret, sampler
from tuner.search import ledger
from tuner.search.acquisition import LaunchCost
from tuner.search.calibration import LAUNCHES, Calibratable, Launched, _groups, _loss, calibrate, improbability
from tuner.search.candidates import Candidates
from tuner.search.foresight import Foresight
from tuner.search.model.predictor import AnalyticModel
from tuner.search.prediction import Prediction
from tuner.search.sampler import TunerSampler
from tuner.space.config import ServingConfig
from tuner.space.memory import MemoryCorrection
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse
from tuner.study.outcome import Boot, Measured, Step

SLOS = (parse("ttft_p99=3s"), parse("tpot_p99=100ms"))
OBJECTIVE = Objective("chat", "tpot_p99", SLOS, 2.0)
TRUE = {"bandwidth_share": 0.6, "flops_share": 1.3, "step_s": 2.5}
FEW = config(2, max_num_batched_tokens=2048)
LOW, HIGH = 0.25, 1.0


@pytest.fixture(scope="module")
def machine() -> AnalyticModel:
    """The machine that is measured: slower memory, faster arithmetic and a slower host than the constants say."""
    return model(slos=SLOS).scaled(TRUE)


def launched(
    machine: AnalyticModel, of: ServingConfig, loads: Sequence[float] = (LOW, 0.5, HIGH), **off: float
) -> Launched:
    steps = []
    for load in loads:
        found = dict(machine.predict(of, load).metrics)
        found |= {key: value * off.get(key.split("_")[0], 1.0) for key, value in found.items() if key.endswith("_s")}
        steps.append(Step(load, "w", found, slo_misses=tuple(m for s in SLOS if (m := s.miss(found)))))
    return Launched(of, steps)


def off(guess: Any, machine: AnalyticModel, of: ServingConfig, load: float) -> float:
    key = OBJECTIVE.latency_key
    return abs(math.log(guess.predict(of, load).metrics[key] / machine.predict(of, load).metrics[key]))


def test_two_launches_teach_the_latency_of_what_was_not_launched(machine: AnalyticModel) -> None:
    before = model(slos=SLOS)
    assert isinstance(before, Calibratable)
    factors = calibrate(before, [launched(machine, FEW), launched(machine, config(4))], OBJECTIVE)
    assert factors["bandwidth_share"] == pytest.approx(0.6, rel=0.2)
    for other in (config(8), config(2, quantization="fp8"), config(4, kv_cache_dtype="fp8", max_num_seqs=64)):
        assert off(before, machine, other, HIGH) > 0.25
        assert off(before.scaled(factors), machine, other, HIGH) < 0.1


def test_what_no_launch_says_keeps_its_value(machine: AnalyticModel) -> None:
    assert calibrate(model(slos=SLOS), [], OBJECTIVE) == {}
    factors = calibrate(model(slos=SLOS), [launched(machine, FEW)], OBJECTIVE)
    assert "expert_flops_share" not in factors, "a dense model has no experts"
    assert factors["eager_kernel_s"] == pytest.approx(1.0, abs=0.05)


def test_a_launch_that_no_constants_explain_does_not_spoil_them(machine: AnalyticModel) -> None:
    good = [launched(machine, c) for c in (FEW, config(4), config(8))]
    strange = launched(machine, config(2, max_num_seqs=64), ttft=0.1, tpot=0.1)
    factors = calibrate(model(slos=SLOS), [*good, strange], OBJECTIVE)
    assert off(model(slos=SLOS).scaled(factors), machine, config(4, quantization="fp8"), HIGH) < 0.12


def test_how_hopelessly_an_slo_was_missed_says_nothing(machine: AnalyticModel) -> None:
    """A step whose requests were never answered, or one that was ended as saturated, is a miss and no figure."""
    ordinary = launched(machine, FEW)
    endless = Step(4.0, "w", {"ttft_p99_s": math.inf, "tpot_p99_s": math.inf}, slo_misses=("ttft_p99 ...",))
    quick = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01}
    ended = Step(5.0, "w", quick, slo_misses=("saturated: ...",), stopped_early="saturated: ...")
    wild = {"ttft_p99_s": 1e-3, "tpot_p99_s": 1e-4}
    broken = Step(0.3, "w", wild, slo_misses=("ttft_p99 ...",), untrusted=("the client lagged",))
    want = calibrate(model(slos=SLOS), [ordinary], OBJECTIVE)
    more = Launched(FEW, [*ordinary.steps, endless, ended, broken])
    found = calibrate(model(slos=SLOS), [more], OBJECTIVE)
    assert found == pytest.approx(want, rel=0.15)


def test_a_launch_teaches_what_its_steps_measured_and_of_a_limit_that_was_missed_little_more_than_that() -> None:
    one = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01, "error_rate": 0.0, ledger.COST_KEY: 2.0}
    steps = (
        Step(1.0, "w", one),
        Step(2.0, "w", one | {"ttft_p99_s": 90.0, ledger.COST_KEY: 1.0}, slo_misses=("ttft",)),
        Step(3.0, "w", one, slo_misses=("saturated",), stopped_early="saturated: the queue grows"),
        Step(4.0, "w", one, untrusted=("lag",)),
    )
    wanted = (*SLOS, parse("error_rate=1%"))
    tpot, ttft, cost = _groups([Launched(FEW, steps)], Objective("chat", "tpot_p99", wanted, 2.0))
    assert np.exp(tpot.measured) == pytest.approx([0.01, 0.01, 0.1 * math.exp(0.3)]) and tpot.scale == 1
    assert np.exp(ttft.measured) == pytest.approx([0.1, *[3 * math.exp(0.3)] * 2]) and ttft.scale == 2.5
    assert np.exp(cost.measured) == pytest.approx([2.0]) and cost.loads == (1.0,)  # what missed an SLO has none


def test_what_no_constants_explain_counts_less_than_by_its_square() -> None:
    sd = math.hypot(0.12, 0.06)
    none = np.zeros(1)
    assert _loss([np.array([1.2 * sd])], none, none + 1) == pytest.approx(0.5 * 1.2**2)
    assert _loss([np.array([4 * sd])], none, none + 1) == pytest.approx(1.5 * 4 - 0.5 * 1.5**2)
    assert _loss([], np.array([0.3]), np.array([0.1])) == pytest.approx(0.5 * 9)


def test_the_first_launches_are_enough(machine: AnalyticModel) -> None:
    """So that a proposal at the hundredth trial takes no longer."""
    asked = []

    class Counted:
        def doubts(self) -> Mapping[str, float]:
            return {"a": 0.5}

        def scaled(self, factors: Mapping[str, float]) -> Any:
            return self

        def predict(self, of: ServingConfig, load: float) -> Any:
            asked.append(of)
            return machine.predict(FEW, load)

    one = launched(machine, FEW, loads=(LOW,))
    calibrate(Counted(), [Launched(config(2, max_num_seqs=8 + n), one.steps) for n in range(40)], OBJECTIVE)
    assert len({id(of) for of in asked}) == LAUNCHES


class Slow(Model):
    """A model whose one constant is off: everything takes ``factor`` as long as it thinks."""

    def __init__(self, factor: float) -> None:
        super().__init__(wrong=lambda _p: factor)
        self.factor = factor

    def doubts(self) -> Mapping[str, float]:
        return {"pace": 0.5}

    def scaled(self, factors: Mapping[str, float]) -> Slow:
        return Slow(self.factor * factors.get("pace", 1.0))


def test_the_search_goes_on_with_the_constants_that_its_launches_gave() -> None:
    one = sampler(Slow(2.5))
    book = study(one)
    tried = run(book, 2)
    assert one.factors["pace"] == pytest.approx(1 / 2.5, rel=0.1)
    assert 0.05 < one.believed < 0.5, "one launch may have been slow for another reason"
    tried += run(book, 4)
    assert one.believed > 0.99 and one.predictor.factor == 2.5
    assert one.beliefs.sources.share[1] == pytest.approx(0.2), "the truth may still lie between"
    learnt = one.beliefs.sources.learnt
    row = one.beliefs.index(space().snap(tried[1]))
    right = Model().predict(space().config(tried[1], "m"), LOADS[0]).metrics["tpot_p99_s"]
    assert learnt.latency[row, 0] == pytest.approx(math.log(right), abs=0.1)
    assert one.foresight.latency[row, 0] > math.log(2 * right), "what was foreseen before the launches stays"
    weights = one.beliefs.weights()
    assert all(weights[name]["its constants, learnt"] == pytest.approx(1.0, abs=0.05) for name in weights)
    trial, _ = ledger.ask(book, space())
    said = trial.user_attrs["learnt"]
    assert said["factors"]["pace"] == pytest.approx(0.4, rel=0.1) and said["believed"] > 0.99
    assert said["weight"]["latency"] == pytest.approx(1.0, abs=0.05)
    assert weights["latency"]["model"] == pytest.approx(1.0, abs=0.05)
    assert regret(tried[:4]) < regret(run(study(sampler(Model(wrong=lambda _p: 2.5))), 4)) + 1e-9
    assert objective().latency_key == "tpot_p99_s"


def test_what_was_learnt_of_the_constants_outlasts_a_ladder_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = sampler(Slow(2.5))
    book = study(one)
    run(book, 4)
    monkeypatch.setattr("tuner.search.sampler.LAUNCHES", 4)  # no launch to come says any more
    monkeypatch.setattr("tuner.search.sampler.LONG", 4)
    before = dict(one.factors)
    tried = run(book, 2, loads=(*LOADS, 8.0))[-1]
    assert one.loads == (*LOADS, 8.0) and one.factors == before and one.believed > 0.99
    learnt, row = one.beliefs.sources.learnt, one.beliefs.index(space().snap(tried))
    right = Model().predict(space().config(tried, "m"), 8.0).metrics["tpot_p99_s"]
    assert learnt is not None and learnt.latency[row, -1] == pytest.approx(math.log(right), abs=0.4)


def test_what_a_model_gets_wrong_in_another_way_is_not_put_on_its_constants() -> None:
    """Every value of every parameter is off by its own factor: the constants go where the first launches happened to
    be, and nowhere else does that help."""

    class Confused(Slow):
        def __init__(self, factor: float = 1.0) -> None:
            rng = np.random.default_rng(4)
            off = {(p.name, v): math.exp(rng.normal(0, 0.4)) for p in space().parameters for v in p.values}
            Model.__init__(self, wrong=lambda params: factor * math.prod(off.get(item, 1.0) for item in params.items()))
            self.factor = factor

        def scaled(self, factors: Mapping[str, float]) -> Slow:
            return Confused(self.factor * factors.get("pace", 1.0))

    one = sampler(Confused())
    run(study(one), 10)
    assert abs(math.log(one.factors["pace"])) > 0.15
    assert one.believed < 0.05
    weights = one.beliefs.weights()
    assert all(abs(weights[name]["its constants, learnt"]) < 0.5 for name in weights)


def test_what_learnt_constants_change_is_centred_and_goes_with_the_model() -> None:
    """A level is a matter of the process, not of a weight; a model that lost a quantity to rules of thumb takes its
    constants along."""
    one = sampler(Slow(2.5))
    sources, every = one.beliefs.sources, list(range(len(one.candidates.params)))
    one.foresight.look()
    for factor in (0.4, 0.8):
        sources.teach(Foresight(one.candidates, one.objective, LOADS, Slow(2.5 * factor), "m"))
        last = sources.of("latency", every)[-1]
        assert last.name == "its constants, learnt" and np.ptp(last.values) > 0.02
        assert np.mean(last.values) == pytest.approx(0.0, abs=1e-6)
    sources.lost = frozenset({"latency"})
    assert "its constants, learnt" not in [s.name for s in sources.of("latency", every)]
    assert "its constants, learnt" in [s.name for s in sources.of("capacity", every)]


def test_factors_are_as_improbable_as_their_doubts_say() -> None:
    assert improbability(Slow(1.0), {"pace": math.exp(-1.0), "other": 9.0}) == pytest.approx(0.5 * (1 / 0.5) ** 2)
    assert improbability(Slow(1.0), {}) == 0.0


def test_a_resumed_search_learns_the_constants_anew() -> None:
    book = study(sampler(Slow(0.5)))
    run(book, 3)
    again = sampler(Slow(0.5))
    book.sampler = again
    run(book, 1)
    assert again.factors["pace"] == pytest.approx(2.0, rel=0.1) and again.believed > 0.1


def test_a_process_that_takes_up_a_long_study_does_not_ask_the_model_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.search.sampler.LONG", 2)
    book = study(sampler(Slow(0.5)))
    run(book, 3)
    again = sampler(Slow(0.5))
    book.sampler = again
    run(book, 1)
    assert again.factors == {} and again.beliefs.sources.learnt is None


def test_what_the_logs_say_of_memory_decides_anew_what_fits() -> None:
    told = model(shape="qwen3-8b", slos=SLOS)
    small = SearchSpace("test", "vllm", (knob("max-num-seqs", 128, 256, default=256),), fixed={"max-model-len": 8192})
    foresight = Foresight(Candidates.of(small, 0), OBJECTIVE, (LOW, HIGH), told, "m")
    foresight.look()
    before = foresight.latency.copy()
    assert (foresight.short_bytes == 0).all()
    foresight.reconsider(told.corrected(MemoryCorrection(overhead_bytes=float(70 * 2**30))))
    assert (foresight.short_bytes > 2**30).all() and np.isnan(foresight.kv_tokens).all()
    foresight.latency[:] = math.nan  # as where it never fitted
    foresight.reconsider(told)
    assert (foresight.short_bytes == 0).all() and (foresight.latency == before).all()


def test_what_the_logs_say_of_memory_stays_when_the_constants_change() -> None:
    """The servers have half of the room that the arithmetic sees, and slower memory than the data sheet."""
    told = model(shape="qwen3-8b", slos=SLOS)
    really = told.scaled(TRUE)
    knobs = (
        knob("max-num-seqs", 64, 128, 256, default=256, numeric=True, log=True),
        knob("max-num-batched-tokens", 2048, 4096, 8192, default=8192, numeric=True, log=True),
    )
    small = SearchSpace("test", "vllm", knobs, fixed={"max-model-len": 8192})
    one = TunerSampler(small, OBJECTIVE, (LOW, HIGH), told, "m", cost=LaunchCost(60, 30))
    book = study(one)
    for n in range(4):
        trial, params = ledger.ask(book, small)
        of = small.config(params, "m")
        room = Boot(30.0, {}, {"kv_cache_tokens": 0.5 * told.fit(of).kv_tokens})
        outcome = Measured(tuple(launched(really, of, (LOW, HIGH)).steps), room)
        ledger.tell(book, trial, small, OBJECTIVE, outcome, started_s=1000.0 * n + 1, ended_s=1000.0 * n + 200)
    assert one.factors["bandwidth_share"] < 0.85
    row, learnt = one.beliefs.index(params), one.beliefs.sources.learnt
    for foresight in (one.foresight, learnt):
        assert foresight.kv_tokens[row] == pytest.approx(math.log(0.5 * told.fit(of).kv_tokens), abs=0.1)
    key, here = OBJECTIVE.latency_key, learnt.latency[row, 0]
    before, after = (math.log(m.predict(of, LOW).metrics[key]) for m in (told, really))
    assert abs(here - after) < 0.25 * abs(before - after), "and so do the constants when memory is corrected"


def test_no_constants_are_learnt_with_which_the_model_has_no_answer_for_what_ran(machine: AnalyticModel) -> None:
    """A model that ends beyond a constant of .9 fits its launches best beyond it, where nothing is left to be wrong."""

    class Ending:
        def doubts(self) -> Mapping[str, float]:
            return {"bandwidth_share": 0.5}

        def scaled(self, factors: Mapping[str, float]) -> Any:
            if factors["bandwidth_share"] < 0.9:
                return self
            return model(slos=SLOS).scaled(factors)

        def predict(self, config: ServingConfig, load: float) -> Prediction:
            return Prediction(False, reason="no answer")

    found = calibrate(Ending(), [launched(machine, FEW)], OBJECTIVE)
    assert 0.9 <= found["bandwidth_share"] < 1.0
