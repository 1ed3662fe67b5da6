"""The loop: what is launched, what is told, and what survives."""

import contextlib
import errno
import json
import math
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tests import studies
from tests.study.fake import FakeEngine, FakeServer, oom
from tuner.api import AskTell
from tuner.engines.emulator.engine import EmulatorEngine
from tuner.engines.protocol import LaunchFailed, Teardown
from tuner.engines.sglang import SglangEngine
from tuner.engines.vllm import VllmEngine
from tuner.errors import EnvironmentFault, UsageError
from tuner.executor.build import executor
from tuner.executor.cluster import price_of
from tuner.export.formats import best_config
from tuner.load import windows
from tuner.load.trace import Trace
from tuner.record.place import place
from tuner.report import page
from tuner.space.config import ServingConfig
from tuner.spec import studyfile
from tuner.spec.storage import sqlite_file
from tuner.spec.study import Budget, ExecutorSpec
from tuner.study import budget, queue, session, verifying, workload
from tuner.study.evaluate import Bench, evaluate, to_fill
from tuner.study.outcome import Aborted, Boot, Infeasible, Measured, Step, Untrusted
from tuner.study.session import Prepared
from tuner.study.store import EXHAUSTED, Store, read_json, write_json
from tuner.verify.promise import Promise

# no quality floor: other trials start beside the default, whose answers nothing is compared with
ANY_ANSWERS = {"objective: chat": "objective: {name: o, latency: tpot_p99, slo: {ttft_p99: 500ms, tpot_p99: 50ms}}"}


def test_the_first_trial_is_the_engines_default_with_none_of_the_spaces_flags(runner):
    runner.run()
    first = runner.store.trial(0)
    assert first.baseline
    assert not first.config.flags
    assert sum(t.baseline for t in runner.store.trials()) == 1


def test_a_study_stops_at_its_budget_and_says_so(runner):
    engine = FakeEngine()
    assert runner.run(engine) == "the search's 6 launches are spent"
    assert len(engine.launched) == 6 == len(runner.store.trials())


def test_no_configuration_is_launched_twice(runner):
    engine = FakeEngine()
    runner.run(engine, replace={"launches: 6": "launches: 40"})
    assert max(Counter(engine.launched).values()) == 1


@pytest.mark.parametrize("sampler", ["auto", "tpe", "nsga2", "grid"])
def test_a_space_that_is_exhausted_ends_the_study_before_its_budget(runner, sampler):
    pins = "parameters: {max_num_batched_tokens: 8192, kv_cache_dtype: auto, max_num_seqs: [64, 1024]}\nreports:"
    engine = FakeEngine()
    ended = runner.run(engine, replace={"reports:": pins, "random": sampler})
    assert ended == "every configuration of the space has been tried"
    assert len(engine.launched) == len(set(engine.launched)) == 4


def test_a_large_space_of_which_hardly_anything_may_run_is_not_called_tried(runner, monkeypatch):
    """Samplers that know of no GPUs propose little else than what is refused; a draw finds what may run."""
    monkeypatch.setattr("tuner.study.queue.WHOLE", 10)
    monkeypatch.setattr("tuner.study.queue.WALKED", 20)

    def why_not(_self, config):  # 10 of the 120 may run, wherever the model lies
        return "" if replace(config, model="m").hash[0] in "01" else "too many GPUs"

    monkeypatch.setattr(Prepared, "why_not", why_not)
    engine = FakeEngine()
    assert runner.run(engine).startswith("the search's 6 launches are spent") and len(engine.launched) == 6
    monkeypatch.setattr("tuner.study.queue.DRAWN", 1)
    monkeypatch.setattr(Prepared, "why_not", lambda *_: "too many GPUs")
    ended = runner.run(engine, replace={"launches: 6": "launches: 9"})
    assert "neither refused nor launched already" in ended and len(engine.launched) == 6


def test_what_a_draw_does_not_find_of_a_grid_that_can_be_walked_is_walked_to(runner, monkeypatch):
    monkeypatch.setattr("tuner.study.queue.WHOLE", 10)
    monkeypatch.setattr("tuner.study.queue.DRAWN", 1)
    space = runner.study().space
    hashes = {space.config(params, "m").hash for params in space.grid() if not space.denied(params)}
    assert len(hashes) > 20
    few = {*sorted(hashes)[:3]}
    monkeypatch.setattr(Prepared, "why_not", lambda _self, c: "" if replace(c, model="m").hash in few else "no room")
    engine = FakeEngine()
    assert runner.run(engine) == EXHAUSTED and len(engine.launched) == len(few)


def test_the_ladder_goes_up_and_ends_at_the_first_miss_on_one_launch(runner):
    engine = FakeEngine()
    runner.run(engine, replace={"launches: 6": "launches: 1"})
    assert [load for _, load in engine.measured] == [1, 2, 3, 4]
    slow = FakeEngine()

    def late(_config, plan):
        slow.metrics = {"ttft_p99_s": 9.0} if plan.load >= 2 else {}

    slow.during = late
    runner.run(slow, replace={"launches: 6": "launches: 5"})
    assert len(slow.launched) == 4 and slow.measured == [(h, load) for h in slow.launched for load in (1, 2)]
    assert [s.ok for t in runner.store.trials()[1:] for s in t.outcome.steps] == 4 * [True, False]


def test_cost_is_the_price_of_the_gpus_over_the_tokens_within_slo(runner):
    all_of_them = {"output_tokens_per_s": 400.0}  # 100 of them within SLO
    runner.run(FakeEngine(metrics=all_of_them), replace={"launches: 6": "launches: 1"})
    study = runner.study()
    step = runner.store.trial(0).outcome.steps[0]
    expected = study.objective.price_usd_per_gpu_hour / 3600 / 100 * 1e6
    assert step.metrics["cost_usd_per_mtok_output"] == pytest.approx(expected)


def test_a_crash_is_an_outcome_with_evidence_and_never_a_measurement(runner):
    engine = FakeEngine(fail=lambda c: oom(c) if c.flags.get("quantization") else None)
    runner.run(engine, replace={"launches: 6": "launches: 12"})
    kinds = {bool(t.config.flags.get("quantization")): type(t.outcome) for t in runner.store.trials()}
    assert kinds == {True: Infeasible, False: Measured}


def test_a_crash_is_told_to_the_sampler_as_a_violated_constraint_not_as_a_failure(runner):
    import optuna

    engine = FakeEngine(fail=lambda c: oom(c) if c.flags.get("quantization") else None)
    runner.run(engine, replace={"launches: 6": "launches: 12"})
    book = optuna.load_study(study_name="s", storage=runner.store.database)
    crashed = [t for t in book.trials if t.user_attrs.get("outcome", {}).get("kind") == "infeasible"]
    assert crashed
    assert all(t.state.name == "COMPLETE" and t.constraints["slo"] > 0 for t in crashed)


def test_a_passing_failure_is_tried_once_more_and_a_lasting_one_never(runner):
    passing = Infeasible("port-in-use", "port taken", transient=True)
    engine = FakeEngine(fail=lambda c: passing if c.flags.get("quantization") else oom(c) if c.flags else None)
    runner.run(engine, replace={"launches: 6": "launches: 14"})
    counts = Counter(
        (bool(t.config.flags.get("quantization")), engine.launched.count(t.config.hash)) for t in runner.store.trials()
    )
    assert {n for (again, n) in counts if again} <= {1, 2}
    assert 2 in {n for (again, n) in counts if again}
    assert {n for (again, n) in counts if not again} == {1}


def test_what_failed_in_passing_twice_is_the_configurations_own_fault(runner):
    def fail(config):
        return Infeasible("crash", "a segmentation fault", transient=True) if config.flags.get("quantization") else None

    runner.run(FakeEngine(fail=fail), replace={"launches: 6": "launches: 14"})
    said = {}
    for trial in runner.store.trials():
        if isinstance(trial.outcome, Infeasible):
            said.setdefault(trial.config.hash, []).append((trial.outcome.transient, trial.again))
    twice = [found for found in said.values() if len(found) > 1]
    assert twice and all(found == [(True, True), (False, False)] for found in twice)


BUSY = Infeasible("gpu-busy", "GPU 0 is in use by pid 4711", stage="before launch", transient=True)
HELD = Infeasible("gpu-busy", "another process holds the GPU exclusively", transient=True)
MUTE = Infeasible("no-completions", "the server does not stream completions", stage="under load", transient=True)


def test_what_somebody_else_had_costs_nothing_and_three_such_launches_end_the_session(runner):
    engine = FakeEngine(fail=lambda _c: BUSY if 2 <= len(engine.launched) <= 4 else None)
    with pytest.raises(EnvironmentFault, match=BUSY.message):
        runner.run(engine)
    assert len(runner.store.launched("search")) == 1
    assert runner.run(engine) == "the search's 6 launches are spent"
    assert len(engine.launched) == 9 and len(set(engine.launched[1:5])) == 1  # made again, before any other
    assert sum(not isinstance(t.outcome, Infeasible) for t in runner.store.trials()) == 6


def test_what_somebody_else_had_now_and_then_ends_nothing(runner):
    engine = FakeEngine(fail=lambda _c: BUSY if len(engine.launched) % 3 else None)
    assert runner.run(engine) == "the search's 6 launches are spent"
    assert len(engine.launched) == 18


@dataclass
class Occupied(FakeEngine):
    """Somebody else is on the GPUs ``taken``; ``launches`` are the GPUs of every launch."""

    taken: tuple[int, ...] = (0,)
    launches: list[tuple[int, ...]] = field(default_factory=list)
    thrice: threading.Event = field(default_factory=threading.Event)  # found in use

    def launch(self, config, site):
        with self.lock:
            self.launches.append(site.gpus)
        if len(self.launches) > 40:
            raise AssertionError("this does not end")
        if not set(site.gpus) & set(self.taken):
            return super().launch(config, site)
        if sum(bool(set(gpus) & set(self.taken)) for gpus in self.launches) >= 3:
            self.thrice.set()
        raise LaunchFailed(BUSY)


PARALLEL = {"sampler: random": "sampler: random\nparallel: 2", **ANY_ANSWERS}


def test_a_gpu_that_somebody_else_is_on_ends_nothing_while_the_others_serve(runner):
    engine = Occupied()
    engine.during = lambda _config, _plan: engine.thrice.wait(30)
    assert runner.run(engine, replace=PARALLEL) == "the search's 6 launches are spent"
    assert len(engine.launched) == 6 == len(runner.store.launched("search"))


def test_after_three_launches_that_the_machine_failed_nothing_is_launched_beside_what_runs(runner):
    engine, tried = Occupied(), []

    def during(_config, _plan):
        assert engine.thrice.wait(30)
        time.sleep(0.0 if tried else 1.0)
        tried.append(sum(gpus == (0,) for gpus in engine.launches))

    engine.during = during
    runner.run(engine, replace=PARALLEL)
    assert tried[0] == 3


def test_where_somebody_else_is_on_every_gpu_the_session_ends_soon(runner):
    engine = Occupied(taken=(0, 1))
    with pytest.raises(EnvironmentFault, match=BUSY.message):
        runner.run(engine, replace=PARALLEL)
    assert 3 <= len(engine.launches) <= 4 and not runner.store.launched("search")


def test_the_next_launch_is_on_another_gpu_than_the_one_that_somebody_else_is_on(runner):
    engine = Occupied()
    runner.run(engine, replace={"sampler: random": "sampler: random\nparallel: 1"})
    assert engine.launches == [(0,), *[(1,)] * 6]


def test_verification_too_is_launched_on_another_gpu_than_the_one_that_somebody_else_is_on(runner):
    study, engine = runner.study(), Occupied()
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    config, bench = study.space.config({}, study.model), Bench(study, engine, threading.Event(), lambda *_: None)
    with session.opened(study) as store, executor(bench) as where:
        launch = verifying.launcher(ready, store, runner.recorder, where, bench.on_event, "verify")
        with pytest.raises(LaunchFailed), launch(config, "one"):
            pass
        with launch(config, "one"):
            pass
    assert engine.launches == [(0,), (1,)]


@pytest.mark.parametrize("failure", [HELD, MUTE])
def test_a_configuration_that_finds_its_gpu_held_at_start_up_twice_is_at_fault_and_the_search_goes_on(runner, failure):
    engine = FakeEngine(fail=lambda c: failure if [c.hash] == engine.launched[1:2] else None)
    assert runner.run(engine) == "the search's 6 launches are spent"
    failed = [(t.outcome.transient, t.again) for t in runner.store.trials() if isinstance(t.outcome, Infeasible)]
    assert failed == [(True, True), (False, False)] and len(engine.launched) == 6


def test_what_somebody_else_had_before_is_not_the_first_of_two_failures_in_passing(runner):
    killed = Infeasible("killed", "somebody killed it", transient=True)
    engine = FakeEngine(fail=lambda _c: {2: BUSY, 3: killed}.get(len(engine.launched)))
    runner.run(engine)
    assert len(set(engine.launched[1:4])) == 1 and all(t.outcome.transient for t in runner.store.trials()[1:3])


@pytest.mark.parametrize("failure", [HELD, MUTE])
def test_the_default_that_finds_its_gpu_held_at_start_up_or_is_no_such_server_is_never_at_fault(runner, failure):
    engine = FakeEngine(fail=lambda _c: failure if len(engine.launched) <= 3 else None)
    for launches in (2, 3):
        with pytest.raises(EnvironmentFault, match=failure.message):
            runner.run(engine)
        assert len(engine.launched) == launches and not runner.store.launched("search")
    assert runner.run(engine) == "the search's 6 launches are spent"
    assert len(engine.launched) == 9 == len(runner.store.launched("search")) + 3
    assert [isinstance(t.outcome, Measured) for t in runner.store.trials() if t.baseline] == [False] * 3 + [True]


@pytest.mark.parametrize("failure", [BUSY, Infeasible("killed", "somebody killed it", transient=True)])
def test_a_remeasurement_that_failed_in_passing_is_one_when_it_is_made_again(runner, failure):
    import optuna

    runner.run(replace={"launches: 6": "launches: 2"})
    book = optuna.load_study(study_name="s", storage=runner.store.database)
    first = runner.store.trial(1)
    book.enqueue_trial(dict(first.params), user_attrs={"remeasure_of": first.extra["optuna"]})
    engine = FakeEngine(fail=lambda _c: failure if len(engine.launched) == 1 else None)
    runner.run(engine, replace={"launches: 6": f"launches: {3 if failure is BUSY else 4}"})
    assert [(t.remeasure_of, type(t.outcome)) for t in runner.store.trials()[2:]] == [(1, Infeasible), (1, Measured)]


def test_a_configuration_that_is_launched_once_more_meets_another_window(runner):
    engine, many = FakeEngine(), {"trace: {": "trace: {search_windows: 2, ", "window: 10s": "window: 1s"}
    engine.fail = lambda _c: Infeasible("port-in-use", "", transient=True) if len(engine.launched) == 1 else None
    runner.run(engine, replace={"launches: 6": "launches: 2", "load: {": "load: {warmup: 0s, ", **many})
    assert {step.window for step in runner.store.trial(1).outcome.steps} == {"trace/search-1"}


def test_a_step_that_cannot_be_believed_is_measured_once_more_with_other_prompts(runner):
    """At load 1 the second measurement is believed, at load 2 none."""
    seeds, late = [], ("records-1", "records-2", "records-2-again")

    class Late(FakeServer):
        def measure(self, plan):
            seeds.append(plan.seed)
            step = super().measure(plan)
            return replace(step, untrusted=("late",)) if plan.records.stem in late else step

    engine = FakeEngine()
    launch = engine.launch
    engine.launch = lambda config, site: Late(engine, launch(config, site).config)
    runner.run(engine, replace={"launches: 6": "launches: 1"})
    steps = runner.store.trial(0).outcome.steps
    assert [(step.load, step.untrusted) for step in steps] == [(1.0, ()), (2.0, ("late",))]
    assert len(set(seeds)) == len(seeds) == 4


def test_a_study_that_earlier_versions_began_counts_its_rates_as_they_did(runner):
    lasts = set()
    engine = FakeEngine(during=lambda config, plan: lasts.add(plan.trace.until_s / plan.load))
    runner.run(engine, replace={"launches: 6": "launches: 1"})
    assert max(lasts) == 10.0 and min(lasts) > 0, "trace.window, or what the trace has"
    document = yaml.safe_load(runner.store.study_file.read_text())
    assert document["frozen"].pop("planned_ends")
    runner.store.study_file.write_text(yaml.safe_dump(document))
    lasts.clear()
    for study in (
        runner.study(),
        studyfile.load(runner.store.folder),
    ):  # as it is resumed by its file, and by its folder
        bench = Bench(session.prepare(study, launching=False).study, engine, threading.Event(), lambda *_: None)
        evaluate(bench, study.space.config({}, study.model), runner.folder, (), workload.read(study).search[0])
    assert lasts == {0.0}, "to the last request"


def begun_before(runner):
    """Makes the study folder one that a version began which counted no GPUs but a tuned parameter's."""
    text = runner.store.study_file.read_text()
    assert "  counts_fixed: true\n" in text
    runner.store.study_file.write_text(text.replace("  counts_fixed: true\n", ""))


FIXED = {
    "kind: vllm": "kind: vllm, args: {tensor-parallel-size: 2, compilation-config.level: 1}",
    "launches: 6": "launches: 2",
}


def test_a_study_that_earlier_versions_began_goes_on_with_the_configurations_it_made(runner):
    runner.run(replace=FIXED)
    begun_before(runner)
    said = []
    for study in (runner.study(replace=FIXED), studyfile.load(runner.store.folder)):
        with session.opened(study, said.append) as store:
            now = session.prepare(study, launching=False).study
        made = now.space.config(now.space.default(), now.model)
        assert (made.gpus, made.flags) == (1, {"tensor-parallel-size": 2, "compilation-config.level": 1})
        assert len(store.trials()) == 2 and "counts_fixed" not in now.frozen["frozen"]
    assert len(said) == 2 and all("goes on as it began: with gpus=1, where" in one for one in said)


def test_the_launches_of_what_an_earlier_version_began_count_though_none_measured_anything(runner):
    runner.run(FakeEngine(fail=oom), replace=FIXED)
    begun_before(runner)
    engine = FakeEngine()
    runner.run(engine, replace=FIXED)
    assert not engine.launched and len(runner.store.trials()) == 2


def test_ask_and_tell_goes_on_with_the_configurations_that_an_earlier_version_made(runner):
    runner.run(replace=FIXED)
    begun_before(runner)
    runner.study(replace=FIXED | {"launches: 6": "launches: 3"})
    with AskTell(runner.folder / "s.yaml") as session_:
        assert session_.ask().config.gpus == 1


def test_a_server_that_is_refused_for_its_answers_keeps_what_its_log_said(runner):
    study = runner.study()
    moved = Infeasible("quality", "its answers moved", stage="quality")
    bench = Bench(study, FakeEngine(), threading.Event(), lambda *_: None, lambda *_: moved)
    window = workload.read(study).search[0]
    outcome, _ = evaluate(bench, study.space.config({}, study.model), runner.folder, (), window)
    assert outcome.boot.facts == {"kv_cache_tokens": 1000.0}


def test_a_passing_failure_of_the_last_trial_that_runs_has_its_second_launch_too(runner):
    """Nothing was left to propose while it ran; its own second launch is."""
    engine = FakeEngine()

    def last(config):
        if config.hash not in engine.launched[1:2] or engine.launched.count(config.hash) > 1:
            return None  # the default comes first, and alone
        while len(engine.launched) < 4 or engine.alive:  # the others have come and gone
            threading.Event().wait(0.05)
        threading.Event().wait(1.0)  # and the loop has asked in vain
        return Infeasible("port-in-use", "port taken", transient=True)

    engine.fail = last
    pins = "parallel: 2\nparameters: {max_num_batched_tokens: 8192, kv_cache_dtype: auto, max_num_seqs: [64, 1024]}"
    changes = {"sampler: random": f"sampler: grid\n{pins}", "launches: 6": "launches: 40"}
    assert runner.run(engine, replace=changes) == "every configuration of the space has been tried"
    assert sorted(Counter(engine.launched).values()) == [1, 1, 1, 2]


def test_a_server_that_dies_under_load_keeps_the_steps_measured_before(runner):
    def die(config, plan):
        if plan.load == 2:
            raise LaunchFailed(Infeasible("oom-under-load", "out of memory", stage="under load"))

    runner.run(FakeEngine(during=die), replace={"launches: 6": "launches: 1"})
    outcome = runner.store.trial(0).outcome
    assert isinstance(outcome, Infeasible)
    assert [s.load for s in outcome.steps] == [1]


def test_a_default_that_fails_for_want_of_a_gpu_ends_the_study_as_the_environments_fault(runner):
    none = Infeasible("no-gpu", "no CUDA device", fix="install the driver")
    with pytest.raises(EnvironmentFault, match="no CUDA device"):
        runner.run(FakeEngine(fail=lambda _c: none))
    assert runner.store.trial(0).outcome.cause == "no-gpu"  # kept all the same
    assert runner.store.trial(0).outcome.transient  # for it says nothing of the configuration


def test_what_the_machine_was_at_fault_for_is_made_again_before_all_others_and_costs_no_launch(runner):
    full, failures = Infeasible("disk-full", "a disk is full", fix="free it"), []

    def fail(config):
        failures.append(config.hash)
        return full if len(failures) <= 2 else None

    engine = FakeEngine(fail=fail)
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match="a disk is full"):
            runner.run(engine)
    assert runner.run(engine) == "the search's 6 launches are spent"
    assert len(set(failures[:3])) == 1 and len(failures) == 8
    assert [(t.baseline, type(t.outcome)) for t in runner.store.trials()][:4] == [
        (True, Infeasible),
        (True, Infeasible),
        (True, Measured),
        (False, Measured),
    ]


def test_a_study_in_which_nothing_was_measured_is_begun_anew_with_another_file(runner):
    said, none = [], Infeasible("model-not-found", "no such folder")
    with pytest.raises(EnvironmentFault):
        runner.run(FakeEngine(fail=lambda _c: none))
    other = runner.study(replace={"chat": "batch"})
    with session.opened(other, said.append) as store:
        assert not store.trials() and not store.begun()
    assert len(said) == 1 and "begun anew" in said[0]
    (aside,) = (store.folder / "interrupted").iterdir()
    assert Store(aside).trials()[0].outcome.cause == "model-not-found"
    runner.run(replace={"chat": "batch"})
    with pytest.raises(UsageError, match="begun with another objective"), session.opened(runner.study()):
        pass


def test_a_kill_while_a_beginning_is_set_aside_mixes_no_two_studies(runner, monkeypatch):
    with pytest.raises(EnvironmentFault):
        runner.run(FakeEngine(fail=lambda _c: Infeasible("model-not-found", "no such folder")))
    folder, rename, moved = runner.store.folder, Path.rename, []
    (folder / "quality.json").write_text("{}")

    def kill(path, target):
        if moved:
            raise Killed
        moved.append(path)
        return rename(path, target)

    while (folder / "quality.json").exists() or runner.store.begun():  # one file at each attempt
        moved.clear()
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "rename", kill)
            with session.opened(runner.study(replace={"chat": "batch"})):
                pass
        assert moved and moved[0].name != "study.yaml"
    with session.opened(runner.study(replace={"chat": "batch"})) as store:
        assert {path.name for path in folder.iterdir()} == {".lock", "interrupted", "study.yaml"}
        assert not store.begun()


@pytest.mark.parametrize("name", ["study.yaml", "report.html", "best-config.env", "mlflow.json"])
def test_a_full_disk_is_told_with_the_files_name_and_leaves_nothing(tmp_path, name):
    study, store = studies.write(tmp_path / "s", trials=3)
    path, there = store.folder / name, sorted(store.folder.iterdir())
    write = {
        "study.yaml": lambda: session.write_study({"name": "s"}, store),
        "report.html": lambda: page.build(store, study, path),
        "best-config.env": lambda: best_config(store, study),
        "mlflow.json": lambda: write_json(path, {}),
    }
    path.with_name(f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as failure:
        write[name]()
    assert (failure.value.errno, failure.value.filename) == (errno.ENOSPC, str(path))
    assert sorted(p for p in store.folder.iterdir() if p.name != "best-config.yaml") == there


def test_what_a_kill_left_half_written_is_removed_when_the_study_is_opened(runner):
    runner.run()
    folder = runner.store.folder
    halves = [folder / ".report.html.12.tmp", folder / "trials/0001/.outcome.json.12.tmp"]
    others = [folder / ".report.html.13.tmp", folder / "trials/0001/.mine.tmp"]  # at work; no such file
    for path in halves + others:
        path.write_text("{")
        os.utime(path, (0, 0) if path != others[0] else None)
    with session.opened(runner.study()):
        assert not any(path.exists() for path in halves) and all(path.exists() for path in others)


FULL = Infeasible("disk-full", "a disk is full")


@contextlib.contextmanager
def launching_on_a_full_disk(runner, role, failure=FULL):
    study = runner.study()
    engine = FakeEngine(fail=lambda _c: failure)
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    with (
        session.opened(study) as store,
        executor(bench := Bench(study, engine, threading.Event(), lambda *_: None)) as where,
    ):
        yield study, store, verifying.launcher(ready, store, runner.recorder, where, bench.on_event, role)


@pytest.mark.parametrize(("failure", "error"), [(FULL, EnvironmentFault), (HELD, LaunchFailed)])
def test_what_the_machine_was_at_fault_for_says_nothing_of_an_arm_of_verification(runner, failure, error):
    with launching_on_a_full_disk(runner, "verify", failure) as (study, store, launch):
        with pytest.raises(error, match=failure.message), launch(study.space.config({}, study.model), "v"):
            pass
        assert not verifying._done(store.trials(), "verify") and not store.launched("verify")


def test_what_a_kill_left_of_a_launch_is_not_taken_for_the_next_ones(runner):
    with launching_on_a_full_disk(runner, "ablate") as (study, store, launch):
        store.trial_folder(0)
        (store.folder / "trials" / "0000" / "quality.json").write_text('{"verdict": "passed"}')
        with pytest.raises(EnvironmentFault), launch(study.space.config({}, study.model), "v"):
            pass
        assert "quality" not in (store.trial(0).extra or {})
        assert [path.name for path in (store.folder / "interrupted").glob("*/*")] == ["quality.json"]


def test_who_interrupts_a_launch_has_not_spent_it(runner):
    store, config = Store(Path(runner.study().folder)), runner.study().space.config({}, "m")
    for number, (outcome, again) in enumerate(((Aborted("interrupted"), True), (Aborted("cannot beat"), False))):
        store.start_trial(number, config, config.params, role="search")
        store.end_trial(number, outcome, 60.0, again=again)
    assert [t.number for t in store.launched("search")] == [1]


LEFT = "trial 0 left something behind: pid 4711 VLLM::Worker"


def test_something_left_behind_stops_the_study_and_says_what(runner):
    engine = FakeEngine(left_over=("pid 4711 VLLM::Worker",))
    with pytest.raises(EnvironmentFault, match=LEFT):
        runner.run(engine)
    assert isinstance(runner.store.trial(0).outcome, Measured)  # kept all the same
    assert len(engine.launched) == 1 == len(runner.store.trials())


def test_what_ablation_put_together_may_be_at_fault_itself_and_the_default_is_not(runner):
    with launching_on_a_full_disk(runner, "ablate") as (study, _, launch):
        for params, error in (({"quantization": "fp8"}, LaunchFailed), ({}, EnvironmentFault)):
            with pytest.raises(error), launch(study.space.config(params, study.model), "ablate 1"):
                pass


def test_something_that_a_failed_launch_left_behind_stops_the_study_too(runner):
    def fail(config):
        failure = LaunchFailed(oom(config))
        failure.teardown = Teardown(left_over=("pid 4711 VLLM::Worker",))
        raise failure

    engine = FakeEngine(fail=fail)
    with pytest.raises(EnvironmentFault, match=LEFT):
        runner.run(engine)
    assert runner.store.trial(0).outcome.cause == "oom-weights"
    assert len(engine.launched) == 1


def test_invalid_combinations_are_refused_before_any_launch_and_written_down(runner):
    runner.run(replace={"[1, 2, 3, 4]": "[1]", "search_space: vllm/quick": "search_space: vllm/standard"})
    reasons = {entry["reason"] for entry in runner.store.refused()}
    assert any("max-num-batched-tokens must" in reason for reason in reasons)
    study = runner.study(replace={"search_space: vllm/quick": "search_space: vllm/standard"})
    assert all(not study.space.denied(t.params) for t in runner.store.trials())


def test_what_wants_more_gpus_than_the_study_has_is_refused_before_any_launch(runner):
    parameters = "{tp: {flag: tensor-parallel-size, values: [1, 2, 4], default: 1, counts_gpus: true, trades: x}}"
    engine = FakeEngine()
    space = f"search_space: {{name: t, engine: vllm, parameters: {parameters}}}"
    assert "every configuration" in runner.run(engine, replace={"search_space: vllm/quick": space})
    assert len(engine.launched) == 2
    assert [(r["params"], r["reason"]) for r in runner.store.refused()] == [
        ({"tp": 4}, "it wants 4 GPUs, the study has 2")
    ]


def test_a_cluster_may_get_a_node_that_is_larger_than_those_it_has(runner):
    study = runner.study()
    config = replace(study.space.config(study.space.default(), study.model), gpus=4)
    for kind, why in (("local", "it wants 4 GPUs, the study has 2"), ("ray", "")):
        ready = Prepared(
            replace(study, executor=ExecutorSpec(kind)), FakeEngine(), workload.read(study), None, "none in this test"
        )
        assert ready.why_not(config) == why


def test_an_unknown_flag_is_refused_before_the_study_starts_with_the_nearest_name(runner):
    engine = FakeEngine(known=frozenset({"max-num-batched-token", "max-num-seqs", "quantization", "kv-cache-dtype"}))
    with pytest.raises(
        UsageError, match=r"knows no flag --max-num-batched-tokens.*Did you mean 'max-num-batched-token'"
    ):
        runner.run(engine)
    assert not engine.launched


def test_an_unknown_flag_of_the_study_file_is_named_with_its_line(runner):
    with pytest.raises(UsageError, match=r"s\.yaml:\d+: .* knows no flag --max-modellen \(engine\.args\)") as error:
        runner.run(
            FakeEngine(known=frozenset({"max-model-len"})),
            replace={"kind: vllm": "kind: vllm, args: {max-modellen: 5}"},
        )
    line = int(str(error.value).split(":")[1])
    assert "max-modellen" in (runner.folder / "s.yaml").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        *((kind, flag) for kind in (VllmEngine, SglangEngine, EmulatorEngine) for flag in ("port: 9000", "model: x")),
        *((kind, "trust-remote-code: true") for kind in (VllmEngine, SglangEngine)),
    ],
)
def test_a_flag_that_the_launcher_decides_is_refused_before_the_study_starts(runner, kind, flag):
    study = runner.study(replace={"kind: vllm": f"kind: vllm, args:\n    {{{flag}}}"})
    engine = kind() if kind is EmulatorEngine else kind(command=["docker"])
    with pytest.raises(UsageError, match=rf"s\.yaml:\d+: --{flag.partition(':')[0]} is ") as error:
        session.check_flags(study, engine)
    line = int(str(error.value).split(":")[1])
    assert flag in (runner.folder / "s.yaml").read_text().splitlines()[line - 1]


def test_a_switch_is_off_by_a_flag_of_its_own_or_not_at_all(runner):
    study = runner.study(replace={"kind: vllm": "kind: vllm, args: {no-x: true}"})
    flags = frozenset(flag.partition(".")[0] for p in study.space.parameters for e in p.emissions for flag in e.flags)
    session.check_flags(study, FakeEngine(known=flags | {"x", "no-x"}))
    with pytest.raises(UsageError, match="knows no flag --no-x"):
        session.check_flags(study, FakeEngine(known=flags | {"x"}))


def test_a_pinned_parameters_part_of_a_json_flag_is_known_by_the_flags_own_name(runner):
    pinned = "search_space: vllm/full\nparameters: {speculation: ngram, draft_length: 4}"
    study = runner.study(replace={"search_space: vllm/quick": pinned})
    assert "speculative-config.num_speculative_tokens" in study.space.fixed
    flags = {flag.partition(".")[0] for p in study.space.parameters for e in p.emissions for flag in e.flags}
    session.check_flags(study, FakeEngine(known=frozenset(flags | {"speculative-config"})))
    with pytest.raises(UsageError, match=r"knows no flag --speculative-config \(fixed in "):
        session.check_flags(study, FakeEngine(known=frozenset(flags - {"speculative-config"})))


def test_a_study_in_which_every_launch_crashes_in_the_same_way_is_given_up(runner):
    engine = FakeEngine(fail=lambda c: Infeasible("crash", "no module named x", "ImportError"))
    why = runner.run(engine, replace={"launches: 6": "launches: 60"})
    assert why == "8 launches failed in the same way and none served: no module named x"
    assert len(engine.launched) == 8


@pytest.mark.parametrize("cause", ["crash-under-load", "killed", "gpu-fault", "nccl", "memory-taken", "terminated"])
def test_launches_that_fail_in_passing_give_a_study_up_as_well(runner, cause):
    engine = FakeEngine(fail=lambda _c: Infeasible(cause, "in these words", transient=cause != "memory-taken"))
    why = runner.run(engine, replace={"launches: 6": "launches: 60"})
    assert why == "8 launches failed in the same way and none served: in these words"
    assert len(engine.launched) == 8


def test_a_study_goes_on_where_one_launch_served_or_where_the_crashes_differ(runner):
    default = []

    def fail(config):
        default.append(config.hash)
        return None if config.hash == default[0] else Infeasible("crash", "no module named x", "ImportError")

    runner.run(FakeEngine(fail=fail), replace={"launches: 6": "launches: 12"})
    assert len(runner.store.trials()) == 12
    runner.run(
        FakeEngine(fail=lambda c: Infeasible("crash", f"at {c.hash}", "x")), replace={"launches: 6": "launches: 24"}
    )
    assert len(runner.store.trials()) == 24


def test_a_resumed_study_that_once_served_is_not_given_up(runner):
    runner.run()
    engine = FakeEngine(fail=lambda c: Infeasible("crash", "no module named x", "ImportError"))
    runner.run(engine, replace={"launches: 6": "launches: 18"})
    assert len(engine.launched) == 12


CRASH = Infeasible("crash", "no module named x", "ImportError")
KILLED = Infeasible("killed", "somebody killed it", transient=True)
SERVED = Measured((Step(1.0, "w", {"cost_usd_per_mtok_output": 1.0, "tpot_p99_s": 0.01}),))
ALIKE = "8 launches failed in the same way and none served: no module named x"


def ending(runner, monkeypatch, *outcomes, launches=0):
    """Why a search ends whose launches, one after the other, end so (those after them serve), and its trials."""
    left = iter(outcomes)
    monkeypatch.setattr("tuner.executor.local.evaluate", lambda *_: (next(left, SERVED), Teardown()))
    one = {
        "sampler: random": "sampler: random\nparallel: 1",
        "launches: 6": f"launches: {launches or len(outcomes) + 1}",
    }
    return runner.run(replace=one), runner.store.trials()


@pytest.mark.parametrize(
    ("outcomes", "given_up"),
    [
        ([CRASH] * 8, True),
        ([BUSY, *[CRASH] * 4, BUSY, *[CRASH] * 4], True),  # nothing of a configuration was tried
        ([Aborted("its node was lost twice"), *[CRASH] * 8], True),
        ([replace(CRASH, message=f"at {n}") for n in range(8)], False),
        ([*[CRASH] * 7, replace(CRASH, message="another")], False),
        ([replace(CRASH, cause="oom-weights")] * 8, False),  # what does not fit is part of the search
        ([Untrusted(("the client was late",)), *[CRASH] * 8], False),  # it served
        ([*[CRASH] * 7, SERVED, CRASH], False),
    ],
)
def test_a_search_is_given_up_where_all_launches_crash_in_the_same_words_only(runner, monkeypatch, outcomes, given_up):
    why, trials = ending(runner, monkeypatch, *outcomes)
    assert (why == ALIKE) is given_up
    assert len(trials) == len(outcomes) if given_up else len(trials) > len(outcomes)


def test_what_no_configuration_can_cure_gives_up_a_search_whose_default_may_not_be_launched(runner, monkeypatch):
    monkeypatch.setattr(Prepared, "why_not", lambda self, config: "" if config.flags else "refused")
    why, trials = ending(runner, monkeypatch, *[replace(CRASH, cause="missing-dependency")] * 8)
    assert why == ALIKE and len(trials) == 8


def test_what_failed_by_itself_or_served_ends_a_row_of_launches_that_the_machine_failed(runner, monkeypatch):
    row = [BUSY, BUSY]
    why, trials = ending(runner, monkeypatch, *row, SERVED, *row, CRASH, *row, KILLED, *row, SERVED, *row)
    assert why.endswith("launches are spent") and sum(t.outcome == BUSY for t in trials) == 10


def test_passing_failures_of_two_configurations_are_the_first_of_each(runner, monkeypatch):
    _, trials = ending(runner, monkeypatch, SERVED, KILLED, SERVED, KILLED, SERVED)
    failed = [t for t in trials if isinstance(t.outcome, Infeasible)]
    assert len({t.config.hash for t in failed}) == 2 and all(t.again and t.outcome.transient for t in failed)


def test_the_default_that_failed_in_passing_twice_is_at_fault_itself_and_the_search_goes_on(runner, monkeypatch):
    _, trials = ending(runner, monkeypatch, KILLED, KILLED, SERVED)
    assert [t.baseline for t in trials] == [True, True, False, False]
    assert [(t.again, t.outcome) for t in trials[:2]] == [(True, KILLED), (False, replace(KILLED, transient=False))]


def test_what_the_machine_fails_after_a_passing_failure_is_no_second_one(runner, monkeypatch):
    _, trials = ending(runner, monkeypatch, SERVED, KILLED, BUSY, BUSY, SERVED)
    assert len({t.config.hash for t in trials[1:5]}) == 1
    assert [(t.again, t.outcome) for t in trials[1:5]] == [(True, KILLED), (True, BUSY), (True, BUSY), (False, SERVED)]


def test_a_passing_failure_of_verification_is_not_the_first_of_two_in_the_search(runner, monkeypatch):
    import optuna

    ending(runner, monkeypatch)
    study, store = runner.study(), runner.store
    params = {**study.space.default(), "max_num_seqs": 64}
    store.start_trial(1, study.space.config(params, study.model), params, role="verify", label="verify 1")
    store.end_trial(1, KILLED, 1.0)
    optuna.load_study(study_name="s", storage=store.database).enqueue_trial(params)
    _, trials = ending(runner, monkeypatch, KILLED, launches=4)
    assert len({t.config.hash for t in trials[1:]}) == 1
    assert [(t.again, t.outcome) for t in trials[2:]] == [(True, KILLED), (False, SERVED)]


def test_what_no_configuration_can_cure_is_the_fault_of_any_but_the_default(runner, monkeypatch):
    full = Infeasible("disk-full", "a disk is full")
    _, trials = ending(runner, monkeypatch, SERVED, full, SERVED)
    assert [(t.again, t.outcome) for t in trials[:3]] == [(False, SERVED), (False, full), (False, SERVED)]


def test_where_nothing_runs_and_there_is_no_room_the_executor_is_asked_to_wait_for_it(runner, monkeypatch):
    from tuner.executor.local import LocalExecutor

    asked = []
    room = LocalExecutor.room

    def later(self):
        asked.append(1)
        return len(asked) > 1 and room(self)

    monkeypatch.setattr(LocalExecutor, "room", later)
    assert runner.run(FakeEngine()) == "the search's 6 launches are spent"


def test_an_interrupt_finishes_the_teardown_and_keeps_what_was_measured(runner):
    cancel = threading.Event()
    engine = FakeEngine(during=lambda c, p: cancel.set() if p.load == 2 and len(engine.launched) == 3 else None)
    assert runner.run(engine, cancel) == "interrupted"
    assert not engine.alive
    outcome = runner.store.trial(2).outcome
    assert isinstance(outcome, Aborted)
    assert [s.load for s in outcome.steps] == [1, 2]


def test_resuming_after_an_interrupt_measures_the_interrupted_configuration_again_and_no_other(runner):
    cancel = threading.Event()
    first = FakeEngine(during=lambda c, p: cancel.set() if p.load == 2 and len(first.launched) == 3 else None)
    runner.run(first, cancel)
    second = FakeEngine()
    runner.run(second, replace={"launches: 6": "launches: 8"})
    assert second.launched[0] == first.launched[2]
    assert not set(first.launched[:2]) & set(second.launched)
    assert len(runner.store.launched("search")) == 8 == len(runner.store.trials()) - 1  # an interrupt spends none


class Killed(BaseException):
    """What nobody catches: the session ends where it is."""


@pytest.mark.parametrize("where", [(queue.Queue, "_start"), (Store, "start_trial")])
def test_a_queued_trial_is_not_lost_where_the_tuner_is_killed_before_its_folder_is_there(runner, monkeypatch, where):
    def kill(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(*where, kill)
        runner.run()
    runner.run(replace={"launches: 6": "launches: 2"})
    assert [t.baseline for t in runner.store.trials()] == [True, False]


def test_a_trial_that_ended_before_the_kill_but_was_not_told_is_told_and_not_launched_again(runner, monkeypatch):
    import optuna

    def killed(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(queue.ledger, "tell", killed)
        runner.run()
    (first,), engine = runner.store.trials(), FakeEngine()
    runner.run(engine, replace={"launches: 6": "launches: 2"})
    assert len(engine.launched) == 1 and first.config.hash not in engine.launched
    told = optuna.load_study(study_name="s", storage=runner.store.database).trials[0]
    assert told.state.name == "COMPLETE" and "free" not in told.user_attrs


def test_a_lost_ledger_is_made_again_from_the_trials(runner):
    import optuna

    def told() -> dict[int, tuple]:
        trials = optuna.load_study(study_name="s", storage=runner.store.database).trials
        known = [t for t in trials if t.state.name == "COMPLETE" and not t.user_attrs.get("free")]
        keys = ("params", "outcome", "started_s")
        found = {t.user_attrs["trial"]: (*(t.user_attrs[k] for k in keys), t.values, t.constraints) for t in known}
        assert len(found) == len(known)  # none of them twice
        return found

    runner.run(replace={"launches: 6": "launches: 4"})
    before = told()
    sqlite_file(runner.store.database).unlink()
    engine = FakeEngine()
    runner.run(engine, replace={"launches: 6": "launches: 4"})
    assert not engine.launched and told() == before
    runner.run(engine)
    assert len(engine.launched) == 2 and len(told()) == 6 == len({t.config.hash for t in runner.store.trials()})


def test_a_trial_that_a_kill_cut_off_after_the_ledger_was_lost_gets_no_other_ones_outcome(runner):
    import optuna

    runner.run(replace={"launches: 6": "launches: 4"})
    sqlite_file(runner.store.database).unlink()
    begun = []

    def kill(config, _plan):
        begun.append(config.hash)
        raise Killed

    with pytest.raises(Killed):
        runner.run(FakeEngine(during=kill))
    asked, first = read_json(runner.store.trial_folder(4) / "config.json"), runner.store.trial_folder(0) / "config.json"
    write_json(first, {**read_json(first), "optuna": asked["optuna"]})  # the number that it had in the lost ledger
    engine = FakeEngine()
    runner.run(engine)
    assert engine.launched[0] == begun[0]
    for told in optuna.load_study(study_name="s", storage=runner.store.database).trials:
        if told.state.name == "COMPLETE" and "trial" in told.user_attrs:
            of = runner.store.trial_folder(told.user_attrs["trial"]) / "outcome.json"
            assert told.user_attrs["outcome"] == read_json(of)["outcome"]
    assert len(runner.store.trials()) == 6 == len({t.config.hash for t in runner.store.trials()})


def test_a_remeasurement_that_a_kill_cut_off_is_one_when_it_is_queued_again(runner):
    import optuna

    runner.run(replace={"launches: 6": "launches: 2"})
    book = optuna.load_study(study_name="s", storage=runner.store.database)
    first = runner.store.trial(1)
    book.enqueue_trial(dict(first.params), user_attrs={"remeasure_of": first.extra["optuna"]})

    def kill(_config, _plan):
        raise Killed

    with pytest.raises(Killed):
        runner.run(FakeEngine(during=kill), replace={"launches: 6": "launches: 3"})
    runner.run(replace={"launches: 6": "launches: 3"})
    assert [t.remeasure_of for t in runner.store.trials()] == [None, None, 1]
    assert len(list((runner.store.folder / "interrupted").iterdir())) == 1


def test_what_the_search_believes_is_in_the_trials_record(runner):
    import optuna

    runner.run(replace={"launches: 6": "launches: 2"})
    book = optuna.load_study(study_name="s", storage=runner.store.database)
    first, said = runner.store.trial(1), {"factors": {"step_s": 2.0}, "believed": 0.9, "weight": {"cost": 1.0}}
    book.enqueue_trial(
        dict(first.params),
        user_attrs={"remeasure_of": first.extra["optuna"], "learnt": said, "serves": 0.7, "promised": 0.2, "kept": 0.4},
    )
    runner.run(replace={"launches: 6": "launches: 3"})
    assert [t.extra.get("learnt") for t in runner.store.trials()] == [None, None, said]
    assert [runner.store.trials()[2].extra[name] for name in ("serves", "promised", "kept")] == [0.7, 0.2, 0.4]


def test_a_line_of_events_that_a_kill_cut_short_spoils_no_other(tmp_path):
    store = Store(tmp_path)
    store.log("first")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"at_s": 1, "eve')
    store.log("third")
    store.log("fourth")
    assert [event["event"] for event in store.events()] == ["first", "third", "fourth"]


def test_a_word_that_reads_like_no_finite_number_stays_a_word(tmp_path):
    data = {"params": {"scale": "inf"}, "metrics": {"ttft_p99_s": math.inf}}
    write_json(tmp_path / "config.json", data)
    assert read_json(tmp_path / "config.json") == data


def test_a_study_that_changed_is_not_continued_silently(runner):
    runner.run()
    with pytest.raises(UsageError, match="begun with another load"):
        runner.run(replace={"[1, 2, 3, 4]": "[1, 2]"})


@pytest.mark.parametrize("role", ["verify", "ablate"])
def test_held_out_windows_may_become_more_until_something_was_measured_on_them(runner, role):
    runner.text = runner.text.replace("window: 10s", "window: 1s").replace("load: {", "load: {warmup: 0s, ")
    runner.run()
    more = {"trace: {": "trace: {heldout_windows: 4, "}
    with session.opened(runner.study(replace=more)) as store:
        assert studyfile.load(store.folder).trace.heldout_windows == 4
        assert studyfile.load(store.folder).frozen["frozen"] == runner.study().frozen["frozen"]
        config = store.trials()[0].config
        store.start_trial(9, config, config.params, role=role, label=f"{role} 1 default")
        store.end_trial(9, store.trials()[0].outcome)
    with pytest.raises(UsageError, match="heldout_windows of this study is 4: something was already measured on them"):
        runner.run()


def test_a_trace_that_was_said_by_its_file_alone_may_get_held_out_windows(runner):
    runner.text = re.sub(r"trace: \{.*\}", "trace: trace.csv", runner.text)
    with session.opened(runner.study()) as store:
        config = runner.study().space.config(runner.study().space.default(), runner.study().model)
        store.start_trial(0, config, config.params)
        store.end_trial(0, Aborted("interrupted"))
    with session.opened(runner.study(replace={"trace: trace.csv": "trace: {file: trace.csv, heldout_windows: 3}"})):
        pass
    assert studyfile.load(store.folder).trace.heldout_windows == 3


def test_held_out_windows_that_would_move_the_searchs_own_are_refused(runner):
    runner.run()
    more = {"trace: {": "trace: {heldout_windows: 50, "}
    with pytest.raises(UsageError, match="the search's windows would be others, too"):
        runner.run(replace=more)


def certified(runner, engine, seconds=60.0):
    """Starts an exported file of ``runner``'s study again."""
    ready = Prepared(runner.study(), engine, workload.read(runner.study()), None, "none in this test")
    bench = Bench(ready.study, engine, threading.Event(), lambda _name, _data: None)
    config, unsure = runner.store.trials()[0].config, (math.nan, math.nan, math.nan)
    slos, mark = ready.study.objective.slos, ready.fingerprint("m")
    promise = Promise("s", 0, config, 1.0, slos, unsure, "tpot_p99", unsure, mark)
    return verifying.certify(ready, runner.store, bench, promise, seconds)


def test_an_emulated_file_is_started_again_while_there_is_time_on_the_emulators_clock(runner):
    class Emulated(FakeEngine):
        def launch(self, config, site):
            site.on_event("took", {"seconds": 100.0})
            return super().launch(config, site)

    runner.run()
    assert [certified(runner, Emulated(emulated=True), seconds).launches for seconds in (190.0, 210.0)] == [1, 2]


def test_what_starting_an_exported_file_again_found_is_kept(runner):
    short = runner.text.replace("window: 10s", "window: 1s, heldout_windows: 2")
    runner.text = short.replace("load: {", "load: {warmup: 0s, ")
    runner.run()
    engine = FakeEngine()
    engine.metrics = {"e2e_mean_s": 0.5}
    for launch_fails in (False, True):
        engine.fail = oom if launch_fails else None
        certified(runner, engine)
    kept = [e for e in Store(runner.store.folder / "certify").events() if e["event"] == "certified"]
    assert [e["holds"] for e in kept] == [True, False]
    assert "The promise holds" in kept[0]["text"] and "does not fit" in kept[1]["text"]
    assert "A window measured 1 s, 2 mean responses" in kept[0]["text"]
    assert kept[0]["fingerprint"]["engine_version"] == "0.0-fake"


def test_a_file_is_started_again_on_the_windows_that_its_promise_was_measured_on(runner):
    short = runner.text.replace("window: 10s", "window: 1s, heldout_windows: 2")
    runner.text = short.replace("load: {", "load: {warmup: 0s, ")
    runner.run()
    (step, *_), config = runner.store.trials()[0].outcome.steps, runner.store.trials()[0].config
    second = workload.read(runner.study()).heldout[1].name
    number = len(runner.store.trials())
    runner.store.start_trial(number, config, config.params, role="verify", label="verify 1 default")
    runner.store.end_trial(number, Measured((replace(step, window=second),)))
    certified(runner, FakeEngine())
    again = Store(runner.store.folder / "certify").trials()
    assert again and {s.window for trial in again for s in trial.outcome.steps} == {second}


@pytest.mark.parametrize(
    ("kind", "here", "wanted", "gpu"),
    [
        ("vllm", ["NVIDIA H200"], "", "H200"),  # whatever the study says that it has
        ("vllm", ["NVIDIA H200"], "L40S", "H200"),
        ("vllm", ["NVIDIA Unheard-of 9000"], "", "NVIDIA Unheard-of 9000"),
        ("vllm", [], "", "cpu"),
        ("emulator", ["NVIDIA H200"], "L40S", "L40S"),
    ],
)
def test_a_fingerprint_names_the_gpu_that_servers_get_here(runner, monkeypatch, kind, here, wanted, gpu):
    class Machine:
        visible = staticmethod(lambda: tuple(range(len(here))))
        name = staticmethod(lambda index: here[index])

    monkeypatch.setattr(session, "Gpus", Machine)
    study = runner.study()
    study = replace(study, engine=replace(study.engine, kind=kind), hardware=replace(study.hardware, name="cpu"))
    assert session.gpu_here(study, wanted) == gpu


def test_a_type_of_gpu_that_is_not_here_is_not_launched_nor_charged_at_its_own_price(runner, monkeypatch):
    here = SimpleNamespace(visible=lambda: (0,), name=lambda index: "NVIDIA H200")
    monkeypatch.setattr(session, "Gpus", lambda: here)
    study = runner.study()
    priced = replace(study.objective, price_usd_per_gpu_hour=3.0, prices={"L40S": 1.0})
    study = replace(study, engine=replace(study.engine, kind="vllm"), objective=priced)
    ready = Prepared(study, FakeEngine(), workload.read(runner.study()), None, "none in this test")
    plain = study.space.config(study.space.default(), "m")
    assert ready.why_not(replace(plain, gpu="L40S")) == "it wants a L40S, servers here get a H200"
    assert not ready.why_not(plain) and not ready.why_not(replace(plain, gpu="H200"))
    assert (price_of(study, plain), price_of(study, replace(plain, gpu="L40S"))) == (3.0, 1.0)


def test_what_ends_the_study_waits_for_what_still_runs_and_keeps_it(runner):
    """Three run: the first raises, the others go on until that is said, and telling MLflow of them raises as well."""
    engine, said = FakeEngine(), threading.Event()

    def during(config, _plan):
        if config.hash == engine.launched[0]:
            raise EnvironmentFault("every port tried is in use")
        said.wait(30)

    def recorded(_number):
        raise EnvironmentFault("and this is none, too")

    engine.during, runner.recorder.trial_finished = during, recorded
    runner.events = SimpleNamespace(append=lambda event: event[0] == "say" and said.set())
    changes = {"sampler: random": "sampler: random\nparallel: 3", "gpus: 2": "gpus: 3", **ANY_ANSWERS}
    with pytest.raises(EnvironmentFault, match="every port tried is in use"):
        runner.run(engine, replace=changes)
    assert len(engine.launched) == 3 and said.is_set()
    trials = runner.store.trials()
    assert len(trials) == 2 and all(isinstance(trial.outcome, Measured) for trial in trials)


@pytest.mark.parametrize("fails", [False, True])
def test_something_left_behind_stops_whatever_is_launched_after_the_search(runner, fails):
    def fail(config):
        failure = LaunchFailed(oom(config))
        failure.teardown = Teardown(left_over=("pid 4711 VLLM::Worker",))
        raise failure

    study = runner.study()
    engine = FakeEngine(fail=fail) if fails else FakeEngine(left_over=("pid 4711 VLLM::Worker",))
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    config, window = study.space.config(study.space.default(), study.model), ready.traffic.search[0]
    bench = Bench(study, engine, threading.Event(), lambda _name, _data: None)
    with session.opened(study) as store, executor(bench) as where:
        launch = verifying.launcher(ready, store, runner.recorder, where, bench.on_event, "verify")
        with pytest.raises(EnvironmentFault, match=LEFT), launch(config, "one") as rig:
            rig.measure(1.0, window, window.name)
    assert isinstance(runner.store.trial(0).outcome, Infeasible if fails else Measured)  # kept all the same
    assert runner.recorder.trials == [0]


def test_a_study_goes_on_where_the_host_has_another_memory(runner):
    """As on two machines of one cloud, whose memory differs by some megabytes."""
    runner.run()
    before = studyfile.load(runner.store.folder)
    facts = {**before.space.facts, "memory_gib": 1.0, "cpu_cores": 99}
    assert not studyfile.differences(before, replace(before, space=replace(before.space, facts=facts)))
    facts["gpus"] = 7
    assert studyfile.differences(before, replace(before, space=replace(before.space, facts=facts))) == ["space"]


def test_a_study_goes_on_that_was_begun_before_a_fact_was_known(runner):
    runner.run()
    study = studyfile.load(runner.store.folder)
    older = {name: fact for name, fact in study.space.facts.items() if name not in ("quantized", "native_dtype")}
    assert not studyfile.differences(replace(study, space=replace(study.space, facts=older)), study)


def test_a_study_that_never_began_may_be_corrected_under_its_name(runner):
    with session.opened(runner.study()) as store:
        assert store.study_file.exists()
    runner.run(replace={"[1, 2, 3, 4]": "[1, 2]"})
    assert studyfile.load(runner.store.folder).load.ladder == (1, 2)


def test_two_tuners_do_not_run_one_study(runner):
    from tuner.study import session

    with session.opened(runner.study()), pytest.raises(UsageError, match="another tuner \\(pid"):
        runner.run()


def test_parallel_trials_share_the_gpus_without_stacking(runner):
    two, never = threading.Event(), threading.Event()

    def during(_config, _plan):
        if engine.most_alive >= 2:
            two.set()
        two.wait(20)  # for another, however busy the machine is; then for a third, which must not come
        never.wait(0.05)

    engine = FakeEngine(during=during)
    runner.run(engine, replace={"sampler: random": "sampler: random\nparallel: 4", **ANY_ANSWERS})
    assert engine.most_alive == 2  # two GPUs, one each
    assert len(runner.store.trials()) == 6


def test_every_finished_trial_is_recorded_once(runner):
    runner.run()
    assert sorted(runner.recorder.trials) == [0, 1, 2, 3, 4, 5]


def test_a_search_that_ends_for_want_of_gain_says_what_it_leaves_and_goes_on_without_that(runner):
    ended = {"sampler: random": "sampler: auto", "launches: 6, verify_share: 0": "launches: 20, min_gain: 90%"}
    said = runner.run(replace=ended)
    assert said.startswith("the best untried configuration promised") and "a launch has to promise 90.00%" in said
    assert said.endswith("Left unspent by the search: 4 of its 14 launches (budget.min_gain: 0 spends them)")
    ended["launches: 6, verify_share: 0"] = "launches: 20, min_gain: 0"
    assert "the search's 14 launches are spent" in runner.run(replace=ended)
    spent = budget.Spent(3, 0.5, 1.0, 60.0, 0.3)
    left = budget.unspent(replace(runner.study(), budget=Budget(None, 4, 10.0)), spent, spent)
    assert "2.30 of its 2.8 h, 6.00 of its 7.00 USD" in left


def test_parallel_trials_count_once_in_hours_and_each_in_usd(runner):
    from dataclasses import replace

    runner.run(replace={"launches: 6": "launches: 2"})
    study = runner.study(replace={"launches: 6": "hours: 1"})
    one, two = runner.store.trials()
    one = replace(one, started_s=0.0, ended_s=1800.0)
    two = replace(two, started_s=0.0, ended_s=3600.0, extra={"alone": False})
    used = budget.spent(study, [one, two])
    assert used.hours == pytest.approx(1.0)
    assert used.usd == pytest.approx(1.5 * study.objective.price_usd_per_gpu_hour)
    assert "0 minutes of 1 h are left" in budget.search_is_over(study, used)
    assert budget.search_is_over(runner.study(replace={"launches: 6": "hours: 3"}), used) == ""
    kept = replace(study, budget=Budget(launches=5, verify_share=0.6))
    assert "search's 2 launches are spent (of the budget's 5, 3 are kept" in budget.search_is_over(kept, used)
    assert budget.left(kept, used) == "3 launches (3 for verification)"


def test_usd_hold_for_trials_side_by_side_and_what_is_left_is_what_is_said(runner, monkeypatch):
    """The first launch is the cheapest, so that it promises too little of the others."""
    seconds = "tuner.executor.stopwatch.Stopwatch.seconds"
    monkeypatch.setattr(seconds, lambda _watch, number: 0.3 if number else 0.15)
    more = "usd: 2, verify_share: 0}\nprice_usd_per_gpu_hour: 3600\nparallel: 8"
    changes = {"launches: 6, verify_share: 0}": more, "gpus: 2": "gpus: 8", "[1, 2, 3, 4]": "[1]"}
    engine = FakeEngine(during=lambda _config, _plan: time.sleep(0.2))
    ended = runner.run(engine, replace=changes)
    used = budget.spent(runner.study(replace=changes), runner.store.trials())
    assert used.usd <= 2
    assert ended == f"{max(2 - used.usd, 0):.2f} of 2.00 USD are left, and a launch costs {used.launch_usd:.2f}"


@pytest.mark.parametrize(("jump_s", "limit"), [(-3600, "hours: 0.00014"), (3600, "usd: 0.5")])  # half a second
def test_a_clock_that_is_set_changes_no_budget(runner, monkeypatch, jump_s, limit):
    now, jumps = time.time, []
    monkeypatch.setattr("tuner.study.store.time.time", lambda: now() + sum(jumps))

    def during(_config, plan):
        time.sleep(0.05)
        if len(engine.launched) == 2 and not jumps:
            jumps.append(jump_s)

    engine = FakeEngine(during=during)
    more = f"{limit}, verify_share: 0}}\nprice_usd_per_gpu_hour: 3600\nparallel: 1"
    runner.run(engine, replace={"launches: 6, verify_share: 0}": more, "[1, 2, 3, 4]": "[1]"})
    assert 2 < len(engine.launched) <= 10
    assert all(0 < trial.ended_s - trial.started_s < 60 for trial in runner.store.trials())


def test_a_clock_that_is_set_back_makes_no_hour_of_what_ran_one_after_the_other(runner):
    runner.run(replace={"launches: 6": "launches: 3"})
    study, times = runner.study(), [(7200.0, 9000.0), (5400.0, 9000.0), (9000.0, 9900.0)]
    trials = [replace(t, started_s=a, ended_s=b) for t, (a, b) in zip(runner.store.trials(), times, strict=True)]
    assert budget.spent(study, trials).hours == pytest.approx(1.75)


def test_what_a_launch_waited_for_is_not_charged(runner):
    engine = FakeEngine()
    launch = engine.launch

    def waits(config, site):
        site.on_event("waiting", {"for": "another tuner"})
        time.sleep(1)
        site.on_event("leased", {})
        return launch(config, site)

    engine.launch = waits
    runner.run(engine, replace={"launches: 6": "launches: 1"})
    study = runner.study()
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    config, window = study.space.config(study.space.default(), study.model), ready.traffic.search[0]
    bench = Bench(study, engine, threading.Event(), lambda _name, _data: None)
    with session.opened(study) as store, executor(bench) as where:
        launch_one = verifying.launcher(ready, store, runner.recorder, where, bench.on_event, "verify")
        with launch_one(config, "one") as rig:
            rig.measure(1.0, window, window.name)
    assert [trial.ended_s - trial.started_s < 1 for trial in runner.store.trials()] == [True, True]


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_trial_that_cannot_beat_the_front_any_more_is_stopped_and_its_points_kept(runner, early_stop):
    def slow_down(config, plan):  # every configuration but the default is ten times slower
        if config.flags:
            plan.records.touch()

    from dataclasses import replace as changed

    from tests.study.fake import FakeServer

    class Slow(FakeServer):
        def measure(self, plan):
            step = super().measure(plan)
            if not self.config.flags:
                return step
            worse = {
                k: v * 0.1 if k.startswith("goodput") else v * 1.5 if k.endswith("_s") else v
                for k, v in step.metrics.items()
            }
            return changed(step, metrics=worse, slo_misses=())

    engine = FakeEngine(during=slow_down)
    launch = engine.launch
    engine.launch = lambda config, site: Slow(engine, launch(config, site).config)
    whole = {} if early_stop else {"load: {": "load: {early_stop: false, "}
    runner.run(engine, replace={"launches: 6": "launches: 3", **whole})
    stopped = [t.outcome for t in runner.store.trials()[1:]]
    if not early_stop:
        assert [len(o.steps) for o in stopped] == [4, 4]
        return
    assert all(isinstance(o, Aborted) and "cannot beat the front" in o.reason and len(o.steps) == 1 for o in stopped)


def test_a_launch_of_the_verification_stops_no_trial_of_the_search_and_takes_none_from_it(runner):
    runner.run(replace={"launches: 6": "launches: 1"})
    store, (first,) = runner.store, runner.store.trials()
    cheap = [replace(s, metrics={k: v / 100 for k, v in s.metrics.items()}, slo_misses=()) for s in first.outcome.steps]
    store.start_trial(9, first.config, first.params, role="verify", label="verify 1 default")
    store.end_trial(9, Measured(tuple(cheap)))
    runner.run(replace={"launches: 6": "launches: 4"})
    assert [type(t.outcome) for t in store.trials() if t.role == "search"] == [Measured] * 3


def test_no_launch_sees_a_prompt_twice_and_all_configurations_see_the_same(runner):
    seeds = {}
    engine = FakeEngine(during=lambda c, p: seeds.setdefault(c.hash, {}).update({p.load: p.seed}))
    runner.run(engine)
    for by_load in seeds.values():
        assert len(set(by_load.values())) == len(by_load)
    longest = max(seeds.values(), key=len)
    assert all(longest[load] == seed for by_load in seeds.values() for load, seed in by_load.items())


@pytest.mark.parametrize("odd", ["what?", "a%20b", "{x}", "50%"])
def test_the_ledger_is_in_the_study_folder_whatever_that_is_called(runner, odd):
    runner.text = runner.text.replace("REPORTS", f'"REPORTS/{odd}"')
    runner.run(replace={"launches: 6": "launches: 1"})
    folder = runner.folder / "reports" / odd / "s"
    assert len(Store(folder).trials()) == 1 and (folder / "study.db").is_file()
    assert [path.name for path in (runner.folder / "reports").iterdir()] == [odd]
    mlflow = place(runner.study(), {})
    assert sqlite_file(mlflow.uri) == folder.parent / "mlflow.db"
    assert place(replace(runner.study(), tracking_uri=mlflow.uri), {}).uri == mlflow.uri


def test_a_cache_is_filled_as_far_as_the_servers_room_goes_and_where_it_keeps_prefixes(tmp_path):
    n = 12
    columns = (np.arange(float(n)), np.full(n, 90), np.full(n, 10), 30, np.arange(3 * n), 3 * np.arange(n + 1))
    before = Trace("t", *columns)
    window = replace(windows.cut(before, 0, 2), earlier=before)
    room = Boot(facts={"kv_cache_tokens": 450.0})

    def filled(flags, boot=room):
        earlier = to_fill(window, ServingConfig("m", {}, flags), boot)
        return earlier and earlier.block_ids[0] // 3  # the first that is kept

    assert filled({}) == n - 4
    assert filled({"data-parallel-size": 2}) == n - 9
    assert filled({}, Boot()) == 0
    many = replace(window, earlier=replace(before, input_tokens=before.input_tokens * 10_000))
    assert len(to_fill(many, ServingConfig("m", {}, {}), Boot())) == 1  # what nobody knows is bounded, too
    assert filled({}, Boot(facts={"kv_cache_tokens": 50.0})) is None
    assert filled({"no-enable-prefix-caching": None}) is filled({"disable-radix-cache": None}) is None
    assert to_fill(windows.cut(before, 0, 2), ServingConfig("m", {}, {}), room) is None


def shared(folder, seconds=160):
    """A trace of ten requests a second, each of which goes on with the prompt of twenty seconds ago."""
    rows = [{"arrival_s": i / 10, "input_tokens": 64, "output_tokens": 5, "block_tokens": 32, "block_ids": [i % 200, i]}
            for i in range(10 * seconds)]  # fmt: skip
    (folder / "shared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"trace.csv, ": "shared.jsonl, "}


@pytest.mark.parametrize(("said", "before"), [({}, 14), ({"window: 10s": "window: 10s, fill_cache: 1s"}, 10)])
def test_each_step_of_a_study_fills_the_cache_with_what_came_before_its_window(runner, said, before):
    """Thirty seconds of it by themselves, of which the server has room for fourteen requests."""
    seen = {}
    engine = FakeEngine(during=lambda config, plan: seen.setdefault(plan.load, plan.trace))
    runner.run(engine, replace=shared(runner.folder) | said)
    assert len(seen) > 1
    assert {len(trace.earlier) for trace in seen.values()} == {before}


def test_a_study_that_earlier_versions_began_fills_no_cache(runner):
    trace = shared(runner.folder)
    runner.run(replace=trace | {"launches: 6": "launches: 1"})

    def filled():
        """By the study's file, and by its folder."""
        studies = runner.study(replace=trace), studyfile.load(runner.store.folder)
        return {session.prepare(study, launching=False).traffic.fill_s for study in studies}

    assert filled() == {30.0}
    document = yaml.safe_load(runner.store.study_file.read_text())
    assert document["frozen"].pop("fills_cache")
    runner.store.study_file.write_text(yaml.safe_dump(document, sort_keys=False))
    assert filled() == {0.0}


def test_the_search_knows_what_a_launch_of_verification_takes(runner, monkeypatch):
    told, over = [], budget.search_is_over
    monkeypatch.setattr(budget, "search_is_over", lambda *given: (told.append(given[3]), over(*given))[1])
    runner.run()
    assert told[0] == 0 < told[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda end: end["outcome"]["steps"][0]["metrics"].update(ttft_p99_s="1"), "ttft_p99_s is '1', no number"),
        (lambda end: end["outcome"]["steps"][0].update(load=None), "load is None, no number"),
        (lambda end: end["outcome"]["steps"][0].update(intervals={"x": [1, "y"]}), "x at most is 'y', no number"),
        (lambda end: end["outcome"]["boot"].update(total_s=True), "total_s is True, no number"),
        (None, "maximum recursion depth exceeded"),
    ],
)
def test_an_outcome_that_somebody_edited_is_named_with_what_to_move_away(runner, change, says):
    runner.run(replace={"launches: 6": "launches: 1"})
    path = runner.store.folder / "trials" / "0000" / "outcome.json"
    end = json.loads(path.read_text())
    if change:
        change(end)
    path.write_text(json.dumps(end) if change else "[" * 100_000)
    with pytest.raises(EnvironmentFault, match=f"{re.escape(says)}.*Move (it|that folder) away"):
        runner.store.trials()


def test_a_folder_that_holds_secrets_is_its_owners_alone(runner):
    runner.run()
    shared = runner.store.folder.stat().st_mode & 0o077
    runner.run(replace={"kind: vllm": "kind: vllm, env: {HF_TOKEN: hf_abc}", "name: s": "name: t"})
    assert shared and (runner.store.folder.parent / "t").stat().st_mode & 0o777 == 0o700
