"""An engine of the user's own: a study names the class."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tuner.cli import tune
from tuner.engines import build
from tuner.engines.own import OwnEngine
from tuner.errors import UsageError
from tuner.spec import studyfile
from tuner.study import session
from tuner.study.outcome import Boot, Infeasible, Measured, Step
from tuner.study.store import Store

ENGINE = """
from tuner.engines.protocol import Teardown
from tuner.study.outcome import Boot, Step


class MyEngine:
    kind, emulated = "mine", False

    def __init__(self, speed=1.0):
        self.speed = speed

    def version(self):
        return "1.0"

    def flags(self):
        return frozenset({"lanes"})

    def launch(self, config, site):
        return MyServer(int(config.flags.get("lanes", 2)) * self.speed)


class MyServer:
    endpoint, boot = None, Boot(total_s=3.0)

    def __init__(self, rate):
        self.rate = rate

    def measure(self, plan):
        metrics = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.01 * (1 + plan.load / self.rate), "error_rate": 0.0}
        metrics["goodput_output_tokens_per_s"] = 100 * plan.load
        return Step(plan.load, plan.window, metrics)

    def stop(self):
        return Teardown()


class FromStudy(MyEngine):
    @classmethod
    def from_study(cls, study):
        return cls(speed=study.engine.options["times"] * 2)


class NoEngine:
    kind = "none"


class Wrong(MyEngine):
    def __init__(self, at):
        self.at = at

    def version(self):
        return self.fails("version") or "1.0"

    def flags(self):
        return self.fails("flags") or ["lanes"]

    def launch(self, config, site):
        if config.flags.get("lanes") == 8:
            self.fails("launch")
        server = MyServer(4)
        if config.flags.get("lanes") == 8:
            server.measure = self.measure
            server.stop = self.stop
        return server

    def measure(self, plan):
        self.fails("measure")
        print("on somebody's output")
        if self.at == "exit":
            raise SystemExit(3)
        if self.at == "refusal":
            import tuner

            raise tuner.Infeasible("eight lanes are too many")
        step = MyServer(4).measure(plan)
        if self.at == "metrics":
            del step.metrics["tpot_p99_s"]
        return {} if self.at == "step" else step

    def stop(self):
        self.fails("stop")
        return Teardown()

    def fails(self, here):
        if self.at == here:
            raise RuntimeError("nobody knows")
"""
STUDY = """
model: any/model
engine: {kind: own, target: "my_engine.py:MyEngine", options: {speed: 2}}
hardware: {gpu: cpu}
price_usd_per_gpu_hour: 1
search_space: {name: lanes, parameters: {lanes: {flag: lanes, values: [2, 8], default: 2}}}
trace: {file: trace.csv, window: 10s}
load: {ladder: [1], warmup: 0s}
sampler: grid
budget: {launches: 2, verify_share: 0}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_engine.py").write_text(ENGINE)
    lines = [f"{second},50,20" for second in range(60)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return tmp_path


def written(workplace: Path, old: str = "", new: str = "") -> Path:
    path = workplace / "study.yaml"
    path.write_text(STUDY.replace(old, new))
    return path


def test_a_study_launches_and_measures_the_engine_that_it_names(workplace: Path) -> None:
    assert tune.run(written(workplace), tune.Flags(), plain=True) == 0

    trials = Store(workplace / "reports" / "study").trials()
    steps = {t.config.params["lanes"]: t.outcome.steps[0] for t in trials if isinstance(t.outcome, Measured)}
    assert {lanes: step.metrics["tpot_p99_s"] for lanes, step in steps.items()} == {
        2: pytest.approx(0.01 * (1 + 1 / 4)),  # the option doubles its lanes
        8: pytest.approx(0.01 * (1 + 1 / 16)),
    }
    assert steps[2].metrics["cost_usd_per_mtok_output"] == pytest.approx(1 / (100 * 3600) * 1e6)


def test_a_class_that_reads_the_study_is_made_by_that(workplace: Path) -> None:
    path = written(workplace, 'MyEngine", options: {speed: 2}', 'FromStudy", options: {times: 3}')
    assert build.engine(studyfile.load(path)).speed == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(("checked", "said"), [("1.0.3", ""), ("0.9", "lanes was checked with own 0.9, not with 1.0")])
def test_a_space_that_was_checked_with_another_version_says_so(workplace: Path, checked: str, said: str) -> None:
    path = written(workplace, "{name: lanes,", f"{{name: lanes, checked_with: ['{checked}'],")
    untried = session.prepare(studyfile.load(path)).untried()
    assert untried.startswith(said) and bool(untried) == bool(said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("speed: 2", "sped: 2", "unexpected keyword argument 'sped'"),
        (":MyEngine", ":YourEngine", "no callable 'YourEngine'"),
        ("my_engine.py:", "other.py:", "does not exist"),
        (':MyEngine", options: {speed: 2}', ':NoEngine"', "no engine: it has no emulated, version, flags, launch"),
        ('target: "my_engine.py:MyEngine", ', "", "needs a target"),
        ("flag: lanes", "flag: lames", "Did you mean 'lanes'"),  # as of any engine that says what it knows
    ],
)
def test_what_is_no_engine_is_refused_in_one_line(workplace: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        session.prepare(studyfile.load(written(workplace, old, new)))


@pytest.mark.parametrize("at", ["version", "flags"])
def test_an_engine_that_cannot_say_what_it_is_is_refused_in_one_line(workplace: Path, at: str) -> None:
    path = written(workplace, 'MyEngine", options: {speed: 2}', f'Wrong", options: {{at: {at}}}')
    with pytest.raises(UsageError, match=rf"Wrong\.{at}: .*my_engine.py:\d+: RuntimeError: nobody knows"):
        tune.run(path, tune.Flags(), plain=True)


@pytest.mark.parametrize(
    ("at", "cause", "said"),
    [
        ("launch", "crash", "RuntimeError: nobody knows"),
        ("measure", "crash", "RuntimeError: nobody knows"),
        ("exit", "crash", "SystemExit: 3"),
        ("metrics", "crash", "did not return tpot_p99_s, which the objective needs"),
        ("refusal", "infeasible", "eight lanes are too many"),
    ],
)
def test_what_an_engine_raises_is_that_configurations_outcome(
    workplace: Path, at: str, cause: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(workplace, 'MyEngine", options: {speed: 2}', f'Wrong", options: {{at: {at}}}')
    assert tune.run(path, tune.Flags(), plain=True) == 0

    outcomes = {t.config.params["lanes"]: t.outcome for t in Store(workplace / "reports" / "study").trials()}
    assert isinstance(outcomes[2], Measured)
    failed = outcomes[8]
    assert isinstance(failed, Infeasible) and failed.cause == cause and said in failed.message
    assert "somebody's output" not in capsys.readouterr().out  # which is for data


def test_what_measures_no_step_ends_the_study_and_a_stop_that_fails_is_told(workplace: Path) -> None:
    path = written(workplace, 'MyEngine", options: {speed: 2}', 'Wrong", options: {at: step}')
    with pytest.raises(UsageError, match=r"Wrong\.measure returned dict, not a Step"):
        tune.run(path, tune.Flags(), plain=True)
    late = Step(1, "w", {}, slo_misses=("late",))  # of which more need not be known
    server = SimpleNamespace(endpoint=None, boot=Boot(), measure=lambda _: late)  # without a stop
    engine = OwnEngine(SimpleNamespace(kind="x", emulated=False, launch=lambda *_: server), "x.py:X", ())
    launched = engine.launch(None, None)  # type: ignore[arg-type]
    assert launched.measure(None) is late  # type: ignore[arg-type]
    (left,) = launched.stop().left_over
    assert "x.py:X" in left and "AttributeError" in left
