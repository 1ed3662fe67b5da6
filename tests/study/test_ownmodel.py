"""A model of one's own, named by the study: the search goes by it, learns its constants, and a bad one is refused."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tuner.api import AskTell
from tuner.cli import check
from tuner.cli import plan as plan_
from tuner.cli.plan import plan
from tuner.errors import UsageError
from tuner.report.page import build
from tuner.spec import studyfile
from tuner.spec.text import Document
from tuner.study import ownmodel
from tuner.study.session import opened, prepare, search
from tuner.study.store import Store

COLOURS = ["red", "green", "blue", "gold", "grey"]
TRUE_STEP_S = 0.03
MODEL = """
import math
import tuner

def foresee(config, load, digits=9, *, step_s=0.012, offset_s=0, unit="s"):
    if config["batch"] > 128:
        raise tuner.Infeasible("a batch of so many does not fit")
    step = step_s * (0.4 if config["colour"] == "gold" else 1.0)
    tokens = min(1000.0 * load, config["batch"] / step)
    late = math.inf if 1000.0 * load > tokens else 0.1
    return {"ttft_p99_s": late, "tpot_p99_s": step * (1 + config["batch"] / 1000), "output_tokens_per_s": tokens}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)

    def made(model: str = MODEL, **more: Any) -> dict[str, Any]:
        (tmp_path / "mine.py").write_text(model)
        return {
            "name": "mine",
            "engine": {"kind": "function", "target": "nowhere:nothing"},
            "predictor": "mine.py:foresee",
            "search_space": {
                "name": "mine",
                "engine": "function",
                "parameters": {
                    "batch": {"flag": "batch", "range": [8, 512], "scale": "log2", "default": 32},
                    "colour": {"flag": "colour", "values": COLOURS, "default": "red"},
                },
            },
            "objective": {"latency": "tpot_p99", "slo": {"ttft_p99": "500ms"}, "price_usd_per_gpu_hour": 3.6},
            "load": {"ladder": [0.5, 1, 2, 4]},
            "budget": {"launches": 6, "verify_share": 0},
            **more,
        }

    return made


def truth(params: Mapping[str, Any], load: float) -> dict[str, float]:
    """What the model says, but for its constant."""
    step = TRUE_STEP_S * (0.4 if params["colour"] == "gold" else 1.0)
    tokens = min(1000.0 * load, params["batch"] / step)
    late = 60.0 if 1000.0 * load > tokens else 0.1
    return {"ttft_p99_s": late, "tpot_p99_s": step * (1 + params["batch"] / 1000), "output_tokens_per_s": tokens}


def told(search: AskTell) -> list[Any]:
    """Every proposal of a whole search, answered with the truth."""
    proposals = []
    while (proposal := search.ask()) is not None:
        search.tell(proposal, {load: truth(proposal.params, load) for load in search.study.load.ladder})
        proposals.append(proposal)
    return proposals


def test_the_search_goes_where_the_model_sends_it_and_never_where_it_says_that_nothing_runs(study: Any) -> None:
    with AskTell(study()) as search:
        proposals = told(search)
    assert proposals[0].params == {"batch": 32, "colour": "red"}
    assert "the model's predicted front" in proposals[1].why
    assert all(p.params["colour"] == "gold" for p in proposals[1:4])
    assert all(p.params["batch"] <= 128 for p in proposals)


def test_the_models_constants_are_learnt_from_the_launches_and_words_are_none(study: Any) -> None:
    with AskTell(study()) as search:
        told(search)
        learnt = search.store.trial(5).extra["learnt"]
    assert learnt["factors"].keys() == {"step_s"}
    assert learnt["factors"]["step_s"] == pytest.approx(TRUE_STEP_S / 0.012, rel=0.15)
    assert learnt["believed"] > 0.5


def test_other_samplers_are_refused_what_the_model_says_cannot_run(study: Any) -> None:
    ready = prepare_(study(sampler="random"))
    space = ready.study.space
    assert "does not fit" in ready.why_not(space.config({"batch": 256, "colour": "red"}, "m"))
    assert ready.why_not(space.config({"batch": 128, "colour": "red"}, "m")) == ""


def test_the_plan_has_its_front_and_an_infinite_latency_is_none_of_it(study: Any) -> None:
    found = plan(prepare_(study()))
    assert found["no_model"] == ""
    assert found["allowed"] == 5 * 5 and found["looked_at"] == 7 * 5
    assert found["refused"] == {"a batch of so many does not fit": 2 * 5}
    assert found["front"] and all("gold" in row["flags"] for row in found["front"])
    assert max(row["latency_s"] for row in found["front"]) < 1


def test_what_is_recorded_of_a_prediction_is_finite(study: Any) -> None:
    ready = prepare_(study())
    config = ready.study.space.config({"batch": 8, "colour": "red"}, "m")
    predicted = ready.notes(config)["predicted"]
    assert predicted["4"]["ttft_p99_s"] > 1e5
    assert all(math.isfinite(value) for metrics in predicted.values() for value in metrics.values())


def test_a_server_of_which_nothing_is_expected_is_not_in_the_plan(study: Any) -> None:
    nothing = "def foresee(config, load):\n    return {'tpot_p99_s': 1, 'ttft_p99_s': .1, 'output_tokens_per_s': 0}"
    found = plan(prepare_(study(nothing)))
    assert found["front"] == [] and found["capable"] == 0 and found["nearest"] is None


def test_where_nothing_is_foretold_to_meet_the_slos_the_plan_says_what_comes_nearest(study: Any) -> None:
    slow = (
        "def foresee(config, load):\n"
        "    slow = 9 + abs(config['batch'] - 64) + load\n"
        "    return {'tpot_p99_s': .1, 'ttft_p99_s': slow, 'output_tokens_per_s': 9}"
    )
    ready = prepare_(study(slow))
    near = plan(ready)["nearest"]
    assert near["load"] == ready.study.load.ladder[0] and near["flags"] == "batch=64"
    assert near["misses"] == ["ttft_p99 9,500 ms > 500 ms"]


def test_the_report_names_the_model_and_its_constants_as_they_are(study: Any, tmp_path: Path) -> None:
    with AskTell(study()) as search:
        told(search)
        page = build(search.store, search.study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Before each launch mine.py:foresee predicted the measurement" in page
    assert re.search(
        r"Constants of the model that would explain the launches before trial 5: step_s &times; 2\.\d", page
    )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("def other(config, load): ...", "has no callable 'foresee'"),
        ("import not_there", "cannot be imported: .*mine.py:1: ModuleNotFoundError"),
        ("def foresee(config, load):\n    return 1 / 0", r"the predictor mine.py:foresee failed on .*mine.py:2: Zero"),
        ("def foresee(config, load):\n    return {'tpot_p99_s': 1.0}", "did not return ttft_p99_s"),
        ("def foresee(config, load):\n    return 3", "returned int, not a mapping"),
        ("def foresee(config, load):\n    return {'tpot_p99_s': 1, 'ttft_p99_s': 1}", "there is no cost without"),
    ],
)
def test_a_bad_model_is_a_usage_error_before_anything_is_launched(study: Any, model: str, says: str) -> None:
    with pytest.raises(UsageError, match=says), AskTell(study(model)):
        pass
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("target", "place", "says"),
    [
        ("other.py:evaluate", "predictor: mine.py:foresee", "mine.py:foresee did not return"),
        ("nowhere:nothing", "target: nowhere:nothing", "nowhere:nothing: there is no module nowhere"),
    ],
)
def test_a_bad_target_is_said_where_the_study_names_it(
    study: Any, tmp_path: Path, target: str, place: str, says: str
) -> None:
    (tmp_path / "other.py").write_text("def evaluate(config, load): ...")
    file = tmp_path / "study.yaml"
    model = "def foresee(config, load):\n    return {'tpot_p99_s': 1.0}"
    YAML().dump(study(model, engine={"kind": "function", "target": target}), file)
    with pytest.raises(UsageError) as raised:
        prepare(studyfile.load(file))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if place in text)
    assert str(raised.value).startswith(f"{file}:{line}: {says}")


def prepare_(document: dict[str, Any]) -> Any:
    """As the CLI does it, which imports the evaluator, too: the model serves as one."""
    document["engine"]["target"] = document["predictor"]
    return prepare(studyfile.resolve(Document("study", document), Path()))


def test_a_model_that_ends_where_its_constants_are_too_large_is_followed_as_far_as_it_goes(study: Any) -> None:
    """A queue: sound for every configuration with its own constant, and nothing at all above 1.4 times that."""
    queue = """
import math

def foresee(config, load, *, share=0.18):
    waits = math.sqrt(1 / (1 - share * load) - 1)
    return {"ttft_p99_s": 0.1, "tpot_p99_s": 0.02 * (1 + waits), "output_tokens_per_s": 1000.0 * load}
"""

    def slow(params: Mapping[str, Any], load: float) -> dict[str, float]:
        return {"ttft_p99_s": 0.1, "tpot_p99_s": 0.2 * (1 + load), "output_tokens_per_s": 1000.0 * load}

    with AskTell(study(queue)) as search:
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {load: slow(proposal.params, load) for load in (0.5, 1.0, 2.0, 4.0)})
        assert len(search.store.trials()) == 6


class Nobody:
    def trial_finished(self, number: int) -> None: ...


def searched_(ready: Any, cancel: threading.Event) -> tuple[str, list[str]]:
    """Why the search ended, and what was said meanwhile."""
    said: list[str] = []

    def on_event(name: str, data: Any) -> None:
        said.extend([data["text"]] if name == "say" else [])

    with opened(ready.study) as store:
        return search(ready, store, Nobody(), cancel, on_event), said


@pytest.mark.parametrize("after", [0, 50, 250])  # while the grid is walked, while the sampler asks for the candidates
def test_an_interrupt_ends_the_asking_and_the_study_goes_on_from_there(study: Any, after: int) -> None:
    ready, cancel, calls = prepare_(study()), threading.Event(), count()
    foresee = ready.predictor.foresee

    def interrupted(*args: Any, **constants: Any) -> Any:
        if next(calls) == after:
            cancel.set()
        return foresee(*args, **constants)

    slow = replace(ready, predictor=replace(ready.predictor, foresee=interrupted))
    assert searched_(slow, cancel)[0] == "interrupted"
    assert next(calls) <= after + 1 + len(ready.study.load.ladder)
    assert "launches are spent" in searched_(ready, threading.Event())[0]
    assert len(Store(Path(ready.study.folder)).trials()) == 6


def test_how_long_a_slow_model_is_asked_is_said_beforehand(
    study: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare_(study(sampler="random", budget={"launches": 1, "verify_share": 0}))
    assert 0 < ready.predictor.call_s < 0.1
    slow = replace(ready, predictor=replace(ready.predictor, call_s=0.5))
    assert searched_(slow, threading.Event())[1] == [
        "Asking mine.py:foresee takes about 18 seconds: 35 calls of 500 ms."
    ]
    slow = replace(slow, study=replace(slow.study, sampler="auto", folder=str(tmp_path / "auto")))
    said = searched_(slow, threading.Event())[1]
    assert "175 calls of" in said[0] and said[0].endswith("candidates whenever its constants have moved.")
    assert slow.predictor.takes(5) == "" and "about 2 minutes" in slow.predictor.takes(240)
    YAML().dump(study() | {"engine": {"kind": "function", "target": "mine.py:foresee"}}, tmp_path / "s.yaml")
    for command, limit_s, calls in ((check.run, 5, 0), (check.run, 0, 35), (plan_.run, 0, 35 * 5)):
        monkeypatch.setattr(ownmodel, "SLOW_S", limit_s)
        command(tmp_path / "s.yaml", True)
        told = capsys.readouterr().err
        assert f"{calls} calls of" in told if calls else told == ""
