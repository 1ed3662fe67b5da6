"""What every executor must do, here and on a Ray cluster: tuner/executor/protocol.py in sentences."""

import math
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.server.test_gpu import Nvml
from tests.spec.conftest import workplace as workplace  # a folder with a model and a trace
from tests.study.fake import FakeEngine
from tuner.engines import build as engines
from tuner.engines.protocol import LaunchFailed
from tuner.errors import EnvironmentFault, UsageError
from tuner.executor.build import executor
from tuner.executor.cluster import TYPE
from tuner.executor.local import engine_of
from tuner.executor.protocol import Job
from tuner.load.trace import Trace
from tuner.server.gpu import Gpus
from tuner.spec import studyfile
from tuner.study import finish, session, verifying
from tuner.study.evaluate import Bench
from tuner.study.outcome import Aborted, Infeasible, Measured
from tuner.study.store import Store
from tuner.verify.fingerprint import Fingerprint
from tuner.verify.promise import PRICE, Promise, read_promise

STUDY = """\
name: s
model: my-org/my-model
engine: {kind: function, target: "evaluator:evaluate"}
hardware: {gpu: L4, gpus: 2}
search_space:
  name: s
  engine: function
  parameters:
    seqs: {flag: seqs, values: [1, 2, 3, 4], default: 1, trades: a against b}
objective: {name: x, latency: tpot_p99, slo: {ttft_p99: 500ms, tpot_p99: 50ms}}
price_usd_per_gpu_hour: 0.70
"""
GOOD = """\
import time
def evaluate(config, load):
    time.sleep(0.3)
    return {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01 * load, "output_tokens_per_s": config["seqs"] * load}
"""
REFUSING = """\
import tuner
def evaluate(config, load):
    raise tuner.Infeasible("too few")
"""
WRONG = "def evaluate(config, load):\n    return 7\n"
WINDOW = Trace("w", np.zeros(1), np.ones(1, int), np.ones(1, int), 0, np.empty(0, int), np.zeros(2, int))


class Rigged:
    """An executor with its bench, and jobs for it."""

    def __init__(self, folder, kind, evaluator, parallel, ladder):
        (folder / "evaluator.py").write_text(evaluator)
        path = folder / "s.yaml"
        more = f"load: {{ladder: {ladder}}}\nexecutor: {kind}\nparallel: {parallel}\nreports: {folder / 'reports'}\n"
        path.write_text(STUDY + more)
        self.study = studyfile.load(path)
        self.cancel, self.events = threading.Event(), []
        engine = engines.engine(self.study)
        self.bench = Bench(self.study, engine, self.cancel, lambda n, d: self.events.append((n, d)))
        self.store = Store(folder / "reports" / "s")

    def job(self, number, window=True):
        config = self.study.space.config({"seqs": 1 + number % 4}, self.study.model)
        trace = WINDOW if window else None
        return Job(number, config, self.store.trial_folder(number), trace, why="test")

    def seen(self, name):
        return [data for event, data in self.events if event == name]

    def all(self, where, count, timeout_s=300):
        ended, deadline = [], time.monotonic() + timeout_s
        while len(ended) < count and time.monotonic() < deadline:
            ended += where.wait(0.5)
        return ended


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def rigged(request, workplace):
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return lambda evaluator=GOOD, ladder=(0.5, 1): Rigged(workplace, request.param, evaluator, 2, list(ladder))


def test_every_job_ends_once_with_its_outcome_and_its_place(rigged):
    made = rigged()
    with executor(made.bench) as where:
        where.submit(made.job(0))
        where.submit(made.job(1))
        assert not where.room()  # parallel: 2
        ended = made.all(where, 2)
        assert where.room()
        assert where.wait(0.1) == []
    assert sorted(end.job.number for end in ended) == [0, 1]
    assert all(isinstance(end.outcome, Measured) and len(end.outcome.steps) == 2 for end in ended)
    assert {end.place.device for end in ended} == {"L4"}
    assert {end.place.price_usd_per_gpu_hour for end in ended} == {0.70}
    launches = made.seen("launch")
    assert sorted(data["trial"] for data in launches) == [0, 1] and {data["why"] for data in launches} == {"test"}
    assert [data["load"] for data in made.seen("measured") if data["trial"] == 1] == [0.5, 1.0]


def test_what_cannot_serve_is_an_outcome(rigged):
    made = rigged(REFUSING)
    with executor(made.bench) as where:
        where.submit(made.job(0))
        (end,) = made.all(where, 1)
    assert isinstance(end.outcome, Infeasible) and end.outcome.message == "too few"


def test_what_is_a_bug_ends_with_its_error(rigged):
    made = rigged(WRONG)
    with executor(made.bench) as where:
        where.submit(made.job(0))  # the default: of another configuration it would be a crash
        (end,) = made.all(where, 1)
    assert end.outcome is None
    assert isinstance(end.error, UsageError) and "returned int" in str(end.error)


def test_a_trial_for_which_the_system_has_no_thread_ends_with_that(workplace, monkeypatch):
    """A limit on processes, as containers have one: nobody would ever have ended what close() then waits for."""
    made = Rigged(workplace, "local", GOOD, 2, [1])

    def none(_self):
        raise RuntimeError("can't start new thread")

    with executor(made.bench) as where:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            where.submit(made.job(0))
        (end,) = made.all(where, 1, timeout_s=5)
    assert isinstance(end.error, EnvironmentFault) and "can't start new thread" in str(end.error)


def test_an_interrupt_ends_what_runs(rigged):
    made = rigged(ladder=[1 + step / 1000 for step in range(1000)])  # five minutes
    with executor(made.bench) as where:
        where.submit(made.job(0))
        while not made.seen("step"):
            assert where.wait(0.05) == []
        made.cancel.set()
        (end,) = made.all(where, 1)
    assert isinstance(end.outcome, Aborted) and end.outcome.reason == "interrupted"
    assert len(made.seen("step")) < 200


def test_a_job_that_waits_for_gpus_when_the_user_interrupts_was_never_launched(rigged):
    made = rigged(ladder=[1 + step / 1000 for step in range(1000)])
    nodes = 1 if made.study.executor.kind == "local" else 3  # of two GPUs each
    with executor(made.bench) as where:
        for number in range(nodes + 1):
            job = made.job(number)
            where.submit(replace(job, config=replace(job.config, gpus=2)))
        while len({data["trial"] for data in made.seen("step")}) < nodes:
            assert where.wait(0.05) == []
        assert not where.room()
        made.cancel.set()
        ended = {end.job.number: (end.outcome and end.outcome.reason, end.error) for end in made.all(where, nodes + 1)}
    (never,) = (number for number, end in ended.items() if end == (None, None))  # the last one here; Ray keeps no order
    assert never == nodes or nodes == 3
    launched = {*range(nodes + 1)} - {never}
    assert all(ended[number] == ("interrupted", None) for number in launched)
    assert {data["trial"] for data in made.seen("launch")} == launched


def test_while_a_job_waits_for_gpus_none_is_taken_that_would_replace_it(workplace):
    made = Rigged(workplace, "local", GOOD, 2, [1])
    wide = made.job(1)
    with executor(made.bench) as where:
        where.submit(made.job(0))
        where.submit(replace(wide, config=replace(wide.config, gpus=2)))  # one of two is free
        assert not where.room()
        assert [(end.job.number, type(end.outcome)) for end in made.all(where, 2)] == [(0, Measured), (1, Measured)]


def test_what_wants_more_gpus_than_the_study_has_is_not_waited_for(workplace):
    made = Rigged(workplace, "local", GOOD, 2, [1])
    job = made.job(0)
    with executor(made.bench) as where:
        with pytest.raises(EnvironmentFault, match="a configuration wants 3 GPUs, the study has 2"):
            where.submit(replace(job, config=replace(job.config, gpus=3)))
        assert where.room()


def test_a_trial_is_charged_until_it_ends_and_not_until_somebody_looks(workplace, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("tuner.executor.stopwatch.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    made = Rigged(workplace, "local", GOOD, 2, [1])
    with executor(made.bench) as where:
        where.submit(made.job(0))
        for thread in threading.enumerate():
            if thread.name == "trial-0":
                thread.join()
        now_s[0] += 3600
        (end,) = made.all(where, 1)
    assert isinstance(end.outcome, Measured) and end.seconds == 0


def test_a_rig_is_measured_step_by_step_and_says_where_it_is(rigged):
    made = rigged()
    with executor(made.bench) as where:
        with where.rig(made.job(0, window=False)) as rig:
            steps = [rig.measure(load, WINDOW, "v") for load in (0.5, 2.0)]
            assert rig.place.device == "L4"
        with where.rig(made.job(1, window=False)) as rig:  # the GPU is free again
            assert rig.measure(1.0, WINDOW, "v").metrics["output_tokens_per_s"] == 2.0
    assert [step.load for step in steps] == [0.5, 2.0]


def test_a_rig_raises_what_the_server_died_of(rigged):
    made = rigged(REFUSING)
    with (
        executor(made.bench) as where,
        where.rig(made.job(0, window=False)) as rig,
        pytest.raises(LaunchFailed) as failed,
    ):
        rig.measure(1.0, WINDOW, "v")
    assert failed.value.outcome.cause == "infeasible"


OCCUPIED = """\
import os, pathlib, ray, tuner, tuner.engines.function as engine
from tuner.study.outcome import Infeasible
def evaluate(config, load):
    here = ray.get_runtime_context().get_node_id() + os.environ["CUDA_VISIBLE_DEVICES"]
    first = pathlib.Path(__file__).with_name("first")
    if not first.exists():
        first.write_text(here)
    if first.read_text() != here:
        return {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01 * load, "output_tokens_per_s": config["seqs"] * load}
    engine.Infeasible = lambda *_, **__: Infeasible("gpu-busy", here, transient=True)
    raise tuner.Infeasible("the engine's own word for that is another")
"""


@pytest.mark.slow
def test_on_a_cluster_too_the_gpu_that_somebody_else_is_on_is_taken_last(cluster, workplace):
    """Somebody is on the first of six that a trial gets; later, others have all but that one."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    made = Rigged(workplace, "ray", OCCUPIED, 2, [0.5])
    with executor(made.bench) as where:

        def outcome(number):
            where.submit(made.job(number))
            (end,) = made.all(where, 1)
            return end.outcome

        def rig(number):
            with where.rig(made.job(number, window=False)) as server:
                return server.measure(0.5, WINDOW, "")

        assert outcome(0).cause == "gpu-busy"
        assert isinstance(outcome(1), Measured) and rig(2).ok and isinstance(outcome(3), Measured)
        for seat in [seat for seat in where._seats._held if not seat.shunned]:
            where._seats.release(seat)
        others = placement_group([{"GPU": 1}] * 5)
        assert others.wait(300)
        assert outcome(4).cause == "gpu-busy"
        with pytest.raises(LaunchFailed, match=outcome(0).message):
            rig(5)
        remove_placement_group(others)
        while ray.available_resources().get("GPU", 0) < 5:
            time.sleep(0.1)
        assert rig(6).ok and isinstance(outcome(7), Measured)


def test_closing_ends_what_runs_and_may_be_done_twice(rigged):
    made = rigged()
    with executor(made.bench) as where:
        where.submit(made.job(0))
        where.wait(0.1)
        began = time.monotonic()
        where.close()
    assert time.monotonic() - began < 30


def test_who_leaves_at_once_waits_for_nothing(rigged, tmp_path):
    """It runs on in a thread of this process, and until it ends what is printed goes to stderr: the test ends it."""
    body = f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n        time.sleep(0.05)"
    made = rigged(f"import pathlib, time\ndef evaluate(config, load):\n    {body}\n")
    with pytest.raises(KeyboardInterrupt), executor(made.bench) as where:
        where.submit(made.job(0))
        while not made.seen("step"):
            where.wait(0.1)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20
    (tmp_path / "go").touch()
    for thread in threading.enumerate():
        if thread.name == "trial-0":
            thread.join(20)


def test_the_type_of_gpu_that_a_configuration_names_is_the_one_that_is_emulated(workplace):
    (path := workplace / "s.yaml").write_text("model: ./model\nengine: {kind: emulator}\ntrace: trace.csv\n")
    study = studyfile.load(path)
    assert [engine_of(study, gpu).gpu for gpu in ("", "L40S")] == ["H100-SXM", "L40S"]


@pytest.mark.parametrize("price", [0.35, None])
def test_a_promise_is_judged_at_the_price_that_it_names_else_at_the_studys(workplace, price):
    made = Rigged(workplace, "local", GOOD, 1, [1])
    ready, unknown = session.prepare(made.study), (math.nan, math.nan, math.nan)
    usd = (price or 0.70) / 3600 / 2 * 1e6  # two sequences at load 1
    config, slos = made.study.space.config({"seqs": 2}, made.study.model), made.study.objective.slos
    details = {PRICE: price} if price else {}
    cost = (usd, usd * 0.99, usd * 1.01)
    promise = Promise("s", 0, config, 1.0, slos, cost, "tpot_p99", unknown, Fingerprint(), details=details)
    found = verifying.certify(ready, made.store, made.bench, promise, 60)
    assert found.holds and found.checks[1].measured[0] == pytest.approx(usd)
    assert {t.price for t in Store(made.store.folder / "certify").trials()} == {price or 0.70}


def test_what_an_export_keeps_secret_is_the_studys_when_it_is_verified(workplace):
    made = Rigged(workplace, "local", GOOD, 1, [1])
    ready, unknown = session.prepare(made.study), (math.nan, math.nan, math.nan)
    space = replace(made.study.space, env={"A_TOKEN": "t", "B": "c"}, fixed={"api-key": "k", "x": 1})
    config = replace(made.study.space.config({"seqs": 2}, made.study.model), env={"B": "b"})
    promise = Promise("s", 0, config, 1.0, made.study.objective.slos, unknown, "tpot_p99", unknown, Fingerprint())
    ready = replace(ready, study=replace(made.study, space=space))
    verifying.certify(ready, made.store, made.bench, promise, 60)
    launched = [t.config for t in Store(made.store.folder / "certify").trials()]
    assert launched and all(config.env == {"A_TOKEN": "t", "B": "b"} for config in launched)
    assert all(config.flags["api-key"] == "k" and "x" not in config.flags for config in launched)


class Noted(FakeEngine):
    """Notes which GPUs each launch had."""

    def launch(self, config, site):
        self.measured.append(site.gpus)
        return super().launch(config, site)


@pytest.fixture
def four_gpus(workplace, monkeypatch):
    """A study that wants two GPUs of a machine with four, for servers of its own."""
    monkeypatch.setattr("tuner.executor.local.Gpus", lambda: Gpus(Nvml({}, {}, {}, {})))
    made = Rigged(workplace, "local", GOOD, 2, [1])
    study = replace(made.study, engine=replace(made.study.engine, kind="command"))
    made.engine = Noted()
    made.bench = replace(made.bench, study=study, engine=made.engine)
    return made


def test_only_gpus_that_are_visible_are_used(four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1,3")
    with executor(four_gpus.bench) as where:
        where.submit(four_gpus.job(0))
        where.submit(four_gpus.job(1))
        four_gpus.all(where, 2)
        with where.rig(four_gpus.job(2, window=False)):
            pass
    gpus = [measured for measured in four_gpus.engine.measured if len(measured) == 1]
    assert sorted(gpus[:2]) == [(1,), (2,)] and gpus[2] == (2,)


def test_fewer_visible_gpus_than_the_study_wants_are_the_environments_fault(four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    says = "the study wants 2 GPUs; this machine has 4, and CUDA_VISIBLE_DEVICES=3 leaves 1 of them"
    with pytest.raises(EnvironmentFault, match=says), executor(four_gpus.bench):
        pass


MIXED = """\
name: s
model: my-org/my-model
engine: {kind: function, target: "evaluator:evaluate"}
hardware: {gpu: H100-SXM, gpus: 1}
search_space:
  name: s
  engine: function
  parameters:
    kind: {values: {h100: {gpu: H100-SXM}, l40s: {gpu: L40S}}, default: h100, trades: speed against price}
objective: {name: x, latency: tpot_p99, slo: {ttft_p99: 500ms, tpot_p99: 50ms}}
price_usd_per_gpu_hour: {L40S: 0.4}
load: {ladder: [0.5, 1, 2]}
budget: {launches: 8, verify_share: 0.7}
sampler: grid
"""
UNLIKE = """\
def evaluate(config, load):
    most = 2.2 if config["kind"] == "h100" else 1.1
    times = {"ttft_p99_s": 0.3 * (load / most) ** 2, "tpot_p99_s": 0.05 * load / most}
    return {**times, "output_tokens_per_s": 1000 * load}
"""


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def two_types(request):
    """An executor's name; of the cluster one node has an H100, another an L40S."""
    added = []
    if request.param == "ray":
        made = request.getfixturevalue("cluster")
        for name in ("H100", "L40S"):
            added.append(made.add_node(wait=False, num_cpus=1, num_gpus=1, resources={f"{TYPE}{name}": 1}))
        made.wait_for_nodes(timeout=300)
    yield request.param
    for node in added:
        made.remove_node(node)


def test_what_a_type_of_gpu_costs_is_promised_and_judged_at_its_own_price(two_types, workplace):
    (workplace / "evaluator.py").write_text(UNLIKE)
    (path := workplace / "s.yaml").write_text(f"{MIXED}executor: {two_types}\nreports: {workplace / 'reports'}\n")
    study, cancel = studyfile.load(path), threading.Event()
    recorder = SimpleNamespace(trial_finished=lambda _number: None, study_finished=lambda: None)
    with session.opened(study) as store:
        ready = session.prepare(study)
        session.search(ready, store, recorder, cancel, lambda _name, _data: None)
        result = finish.conclude(ready, store, recorder, "", cancel, lambda _name, _data: None)
        text = result.files[0].read_text()
        promise = read_promise(result.files[0])
        found = verifying.certify(ready, store, Bench(study, ready.engine, cancel, lambda _n, _d: None), promise, 60)
    trials = store.trials()
    assert {t.role for t in trials} == {"search", "verify"}
    assert {(t.config.gpu, t.extra["device"], t.price) for t in trials} == {
        ("", "H100-SXM", study.objective.price_usd_per_gpu_hour),
        ("L40S", "L40S", 0.4),
    }
    assert promise.config.gpu == promise.fingerprint.gpu == "L40S" and promise.price == 0.4
    assert "1 x L40S, " in text
    assert re.findall(r"at ([\d.]+ USD per GPU-hour[^.)]*)", text) == ["0.4 USD per GPU-hour"]
    assert found.holds and not found.changes, found.text
    (certified,) = {(t.extra["device"], t.price) for t in Store(store.folder / "certify").trials()}
    assert certified == ("L40S", 0.4)
