"""The quality floor during a study: who is asked, who waits, and what is said of it."""

import dataclasses
import math
import threading
from types import SimpleNamespace

import pytest

from benchmarks.verify.language import language, serve
from tests.study.fake import FakeEngine
from tuner.engines.protocol import LaunchFailed
from tuner.errors import EnvironmentFault
from tuner.executor.build import executor
from tuner.spec.objective import QualityFloor
from tuner.study import session, verifying, workload
from tuner.study.evaluate import Bench
from tuner.study.guard import QualityGuard
from tuner.study.outcome import Infeasible, Measured
from tuner.study.session import Prepared
from tuner.study.store import read_json
from tuner.verify.completions import Unanswered
from tuner.verify.quality import profile


@pytest.fixture
def floor(runner):
    """The study's guard, a configuration that alters answers, and what the user was told."""
    study, said = runner.study(), []
    runner.store.folder.mkdir(parents=True)
    guard = QualityGuard(study, runner.store, (), lambda _name, data: said.append(str(data.get("text", ""))))
    fp8 = study.space.config({**study.space.default(), "quantization": "fp8"}, study.model)
    default = study.space.config(study.space.default(), study.model)

    def ask(damage, config=fp8, **more):
        folder = runner.store.trial_folder(len(runner.store.numbers()))
        with serve(dataclasses.replace(language(damage), **more)) as endpoint:
            refused = guard(SimpleNamespace(endpoint=endpoint), config, folder)
        return refused, read_json(folder / "quality.json") if (folder / "quality.json").exists() else None

    return SimpleNamespace(guard=guard, ask=ask, default=default, said=said, store=runner.store)


def test_a_broken_server_is_refused_and_one_that_cannot_be_asked_is_said(floor):
    assert floor.guard.awaited()
    refused, found = floor.ask(0.0)
    assert refused is None and found == {"verdict": "unknown", "reason": "there are no answers of the default"}
    assert "The quality floor was not checked: there are no answers of the default." in floor.said
    assert floor.ask(0.0, floor.default) == (None, None)
    assert not floor.guard.awaited()
    assert floor.ask(0.0)[1]["verdict"] == "passed"
    refused, found = floor.ask(math.nan)
    assert refused.cause == "quality" and "no finite numbers" in refused.message and found["verdict"] == "failed"
    floor.said.clear()
    refused, found = floor.ask(0.0, prompt_logprobs=False)
    assert refused is None and found["verdict"] == "unknown"
    assert [text.partition(":")[0] for text in floor.said] == ["The quality floor was not checked"]


def test_a_configuration_that_leaves_the_answers_alone_is_not_compared_nor_taken_for_the_default(floor):
    study = floor.guard.study
    config = study.space.config({**study.space.default(), "max_num_seqs": 512}, study.model)
    assert config.hash != floor.default.hash
    assert floor.ask(0.0, config) == (None, None) and floor.guard.awaited()


def test_a_default_that_cannot_be_asked_is_told_and_ends_no_study(floor):
    assert floor.ask(0.0, floor.default, prompt_logprobs=False) == (None, None)
    assert [text.partition(":")[0] for text in floor.said if text] == ["The quality floor cannot be checked"]
    assert floor.guard.awaited()


def test_the_default_is_asked_once_for_its_answers_and_not_at_all_where_there_is_no_floor(floor):
    study = floor.guard.study
    floor.guard.study = dataclasses.replace(
        study, objective=dataclasses.replace(study.objective, quality=QualityFloor())
    )
    assert floor.ask(0.0, floor.default) == (None, None) and not floor.said and not floor.guard.awaited()
    floor.guard.study = study
    floor.ask(0.0, floor.default)
    answers = (floor.store.folder / "quality.json").read_bytes()
    floor.ask(0.5, floor.default)  # launched again, as verification does
    assert (floor.store.folder / "quality.json").read_bytes() == answers


def test_nothing_waits_for_answers_that_nothing_is_compared_with(floor):
    guard, study = floor.guard, floor.guard.study
    space = study.space
    alike = dataclasses.replace(
        space, parameters=tuple(dataclasses.replace(p, alters_answers=False) for p in space.parameters)
    )
    function = dataclasses.replace(study.engine, kind="function")
    assert guard.awaited()
    for other in (dataclasses.replace(study, space=alike), dataclasses.replace(study, engine=function)):
        guard.study = other
        assert not guard.awaited()


def test_where_there_is_no_server_to_ask_the_floor_is_said_to_be_unchecked(floor):
    """A simulated clock has no server, and a function none at all."""
    folder = floor.store.trial_folder(0)
    fp8 = floor.guard.study.space.config(
        {**floor.guard.study.space.default(), "quantization": "fp8"}, floor.guard.study.model
    )
    assert floor.guard(SimpleNamespace(endpoint=None), floor.default, folder) is None and not floor.said
    assert floor.guard(SimpleNamespace(endpoint=None), fp8, folder) is None
    assert read_json(folder / "quality.json")["verdict"] == "unknown"
    assert floor.said == ["The quality floor was not checked: there is no server to ask."]


def test_a_default_without_finite_log_probabilities_is_compared_with_nobody(floor):
    broken = language(0.0).logprobs.copy()
    broken[:, :] = -math.inf
    with serve(dataclasses.replace(language(0.0), logprobs=broken)) as endpoint, pytest.raises(Unanswered):
        profile(endpoint, count=1, drawn=0)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"sequences": 3}', '{"sequences": [{}]}'])
def test_damaged_answers_of_the_default_are_named(floor, text):
    (floor.store.folder / "quality.json").write_text(text)
    with pytest.raises(EnvironmentFault, match=r"quality\.json: cannot be read"):
        floor.ask(0.0)


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_starts_beside_the_default_while_its_answers_are_missing(runner, wanted):
    """The second configuration would find nothing to be compared with."""
    engine, beside = FakeEngine(), []

    def during(config, _plan):
        if config.hash == engine.launched[0]:
            for _ in range(1 if wanted else 600):  # what may start does, however busy the machine
                if len(engine.launched) == 1:
                    threading.Event().wait(0.1)
            beside.append(len(engine.launched))

    engine.during = during
    changes = {"sampler: random": "sampler: random\nparallel: 2"}
    if not wanted:
        changes["objective: chat"] = (
            "objective: {name: x, latency: tpot_p99, slo: {ttft_p99: 1s, tpot_p99: 90ms}, price_usd_per_gpu_hour: 2}"
        )
    runner.run(engine, replace=changes)
    assert (max(beside) == 1) == wanted


def test_a_finalist_that_was_never_checked_is_checked_when_it_is_verified(runner):
    study, asked = runner.study(), []
    ready = Prepared(study, FakeEngine(), workload.read(study), None, "none in this test")
    config = study.space.config({**study.space.default(), "quantization": "fp8"}, study.model)
    window, verdicts = ready.traffic.search[0], iter(["failed", "unknown", "passed"])

    def quality(_server, config, folder):
        asked.append(config)
        verdict = next(verdicts)
        (folder / "quality.json").write_text(f'{{"verdict": "{verdict}", "reason": "KL 1"}}')
        return Infeasible("quality", "KL 1") if verdict == "failed" else None

    def launched(label):
        with launch(config, label) as rig:
            rig.measure(1.0, window, window.name)

    with session.opened(study) as store:
        bench = Bench(study, ready.engine, threading.Event(), lambda _name, _data: None, quality)
        with executor(bench) as where:
            launch = verifying.launcher(ready, store, runner.recorder, where, bench.on_event, "verify")
            with pytest.raises(LaunchFailed):
                launched("verify 1")
            for number in (2, 3, 4):
                launched(f"verify {number}")
        outcomes = [type(t.outcome) for t in store.trials()]
        assert outcomes == [Infeasible, Measured, Measured, Measured] and not ready.engine.alive
        assert len(asked) == 3  # what passed once is not asked again
        said = [t.quality.partition(":")[0] for t in store.trials()]
        assert said == ["Below the quality floor", "The quality floor was not checked", "Quality floor held", ""]
