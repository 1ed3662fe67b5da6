"""Studies by the file that they were begun with, and flags over a file."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.cli.test_cli import tuner
from tests.spec.conftest import workplace as workplace
from tests.spec.test_pinned import OWN
from tests.spec.test_studyfile import GOOD, write
from tests.study.test_loop import shared
from tuner.cli import check, plan
from tuner.cli.live import View
from tuner.cli.tune import Flags, read
from tuner.errors import EnvironmentFault, UsageError, alike
from tuner.search import hardware
from tuner.server.diagnosis import Evidence, diagnose
from tuner.spec import studyfile
from tuner.spec.study import Budget
from tuner.study import ladder, session
from tuner.study.budget import Spent, search_is_over
from tuner.study.outcome import Aborted, Infeasible, Measured, Step
from tuner.study.store import Store

MINE = """\
name: mine
engine: {kind: function, target: "mine.py:evaluate"}
search_space:
  name: mine
  engine: function
  parameters:
    batch: {flag: batch, values: [8, 16], default: 8}
objective: {latency: tpot_p99, slo: {tpot_p99: 50ms}}
price_usd_per_gpu_hour: 1
load: {ladder: [1]}
budget: {launches: 2, verify_share: 0}
"""


def test_a_study_is_found_again_by_the_file_it_was_begun_with_whatever_that_is_called(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99_s': 0.01, 'output_tokens_per_s': 900.0}\n"
    )
    (tmp_path / "study.yaml").write_text(MINE)  # the name that init and the README give it
    tuner("tune", "study.yaml", cwd=tmp_path, check=0)
    for path in ("study.yaml", "reports/mine", "reports/mine/study.yaml"):
        assert "engine default" in tuner("show", path, "0", cwd=tmp_path, check=0).stdout
        assert "No trial" not in tuner("front", path, cwd=tmp_path, check=0).stdout
    assert "engine default" in tuner("front", "mine", cwd=tmp_path, check=0).stdout  # as --name takes it
    assert "There are reports/mine\n" in tuner("front", "reports", cwd=tmp_path, check=2).stderr
    for path in ("nonexistent", "no.yaml"):
        done = tuner("front", path, cwd=tmp_path, check=2)
        assert done.stderr == f"tuner: no such study: {path}. Give a study file, or the folder of a study\n"


def test_a_locale_without_an_arrow_costs_the_arrow_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99_s': 0.01, 'output_tokens_per_s': 900.0}\n"
    )
    (tmp_path / "study.yaml").write_text(MINE)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert "\n|? " in tuner("tune", "study.yaml", cwd=tmp_path, check=0).stdout


def test_a_storage_in_the_environment_is_for_new_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99_s': 0.01, 'output_tokens_per_s': 900.0}\n"
    )
    (tmp_path / "study.yaml").write_text(MINE)
    tuner("tune", "study.yaml", cwd=tmp_path, check=0)
    monkeypatch.setenv("TUNER_STORAGE", url := f"sqlite:///{tmp_path}/shared.db")
    for study in ("study.yaml", "reports/mine"):
        assert "reports/mine goes on with its own ledger" in tuner("tune", study, cwd=tmp_path, check=0).stderr
    assert not (tmp_path / "shared.db").exists()
    done = tuner("tune", "study.yaml", "--storage", url, cwd=tmp_path, check=2)
    assert "go on with it by tuner tune reports/mine without --storage" in done.stderr
    tuner("tune", "study.yaml", "--name", "new", cwd=tmp_path, check=0)
    assert (tmp_path / "shared.db").exists()


def test_an_slo_from_the_command_line_replaces_that_slo_of_the_file_and_nothing_else(workplace: Path) -> None:
    text = GOOD.replace("objective: chat", "objective: {latency: ttft_p99, slo: {ttft_p99: 1s, e2e_p99: 9s}}")
    text = text.replace("slo: {ttft_p99: 300ms}", "slo: {tpot_p99: 80ms}")
    study = read(write(workplace, text), Flags(slo=("tpot_p99=70ms", "ttft_p99=2s")))
    assert {slo.metric: slo.limit for slo in study.objective.slos} == {"ttft_p99": 2, "e2e_p99": 9, "tpot_p99": 0.07}
    assert study.objective.latency == "ttft_p99"


def test_an_engine_of_one_word_is_said_to_be_no_mapping(workplace: Path) -> None:
    path = write(workplace, GOOD.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", "engine: emulator"))
    with pytest.raises(UsageError, match=r"study.yaml:2: engine"):
        read(path, Flags())
    assert read(path, Flags(engine="emulator")).engine.kind == "emulator"


def test_a_rehearsal_keeps_what_the_emulator_knows_of_the_engine_and_says_what_it_leaves_out(workplace: Path) -> None:
    engine = "{kind: vllm, python: elsewhere, url: x, options: {fast_start: 'off', start_limit_s: 1800.0}}"
    path = write(workplace, GOOD.replace("{kind: emulator, options: {gpu: H100-SXM}}", engine))
    said: list[str] = []
    study = read(path, Flags(engine="emulator"), said.append)
    assert study.engine.kind == "emulator" and study.engine.options == {"start_limit_s": 1800.0}
    assert said == ["Left out of engine.options, which emulator does not have: url, fast_start."]
    session.prepare(study)
    assert read(path, Flags(engine="vllm"), said.append).engine.python == "elsewhere" and len(said) == 1
    assert read(write(workplace, GOOD), Flags(engine="emulator")).engine.options == {"gpu": "H100-SXM"}
    with pytest.raises(UsageError, match="--engine: "):
        read(path, Flags(engine="vlm"))


@pytest.mark.parametrize(
    ("said", "flags", "budget"),
    [
        ("{launches: 5}", {"verify_share": 0.5}, Budget(launches=5, verify_share=0.5)),
        ("8", {"verify_share": 0.5}, Budget(launches=8, verify_share=0.5)),
        ("{launches: 5, verify_share: 0}", {"budget": "2h"}, Budget(hours=2, verify_share=0)),
        ("{hours: 5}", {"budget": "20 launches", "verify_share": 0.3}, Budget(launches=20, verify_share=0.3)),
        ("{launches: 5, min_gain: 0}", {"budget": "2h"}, Budget(hours=2, min_gain=0)),
        ("{min_gain: 1%}", {"verify_share": 0}, Budget(launches=20, verify_share=0, min_gain=0.01)),
    ],
)
def test_the_budget_from_the_command_line_keeps_what_it_does_not_name(workplace: Path, said, flags, budget) -> None:
    text = GOOD.replace("budget: {launches: 5}", f"budget: {said}")
    assert read(write(workplace, text), Flags(**flags)).budget == budget


@pytest.mark.parametrize(
    ("flags", "says"), [({"budget": "-4h"}, "--budget: bad"), ({"verify_share": 1.0}, "--verify-")]
)
def test_a_bad_budget_on_the_command_line_is_put_down_to_its_flag(workplace: Path, flags, says) -> None:
    with pytest.raises(UsageError, match=f"^{says}"):
        read(write(workplace, GOOD), Flags(**flags))


@pytest.mark.parametrize("count", [0, -2])
def test_no_trials_at_once_are_refused(workplace: Path, count) -> None:
    with pytest.raises(UsageError, match=f"parallel is 1 or more, not {count}") as refused:
        read(write(workplace, GOOD), Flags(parallel=count))
    assert refused.value.where == "--parallel"
    with pytest.raises(UsageError, match=r"study\.yaml:\d+: parallel is 1 or more"):
        read(write(workplace, f"{GOOD}parallel: {count}\n"), Flags())
    assert read(write(workplace, GOOD), Flags(parallel=2)).parallel == 2


def test_as_many_trials_at_once_as_fit_may_be_asked_for_on_the_command_line(workplace: Path) -> None:
    path = write(workplace, GOOD)
    taken = tuner("tune", str(path), "--parallel", "auto", "--name", "a/b", check=2)
    assert "--name" in taken.stderr  # the next flag is what is refused
    assert (
        read(path, Flags(parallel="auto")).parallel
        == read(write(workplace, f"{GOOD}parallel: auto\n"), Flags()).parallel
    )
    assert read(path, Flags(parallel="2")).parallel == 2
    with pytest.raises(UsageError, match=r"^--parallel: parallel: .* integer"):
        read(path, Flags(parallel="some"))


def test_the_interpreter_named_on_the_command_line_is_that_of_the_engine_and_stays_a_link(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    study = read(write(workplace, GOOD), Flags(python="env/bin/python"))
    assert study.engine.python == str(workplace / "env/bin/python") and study.engine.kind == "emulator"
    alone = read(None, Flags("./model", Path("trace.csv"), engine="emulator", python="python3"))
    assert (alone.engine.python, alone.engine.kind) == ("python3", "emulator")


def test_flags_that_contradict_each_other_are_refused(workplace: Path) -> None:
    path = write(workplace, GOOD)
    with pytest.raises(UsageError, match="--slo tpot_p99 is given twice"):
        read(path, Flags(slo=("tpot_p99=70ms", " tpot_p99 =2s")))
    with pytest.raises(UsageError, match="--address names a Ray cluster"):
        read(path, Flags(executor="local", address="auto"))


def test_a_price_of_nothing_is_refused(workplace: Path) -> None:
    with pytest.raises(UsageError, match="price per GPU-hour must be above zero"):
        read(write(workplace, GOOD), Flags(gpu_price=0.0))


def test_what_of_the_trace_was_skipped_is_said_by_check_plan_and_tune(workplace: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workplace)
    with (workplace / "trace.csv").open("a") as file:
        file.write("nonsense\n")
    path = write(workplace, GOOD)
    check.run(path, json=False)
    plan.run(path, json=False)
    study = read(path, Flags())
    with View(study, True) as view:
        view.begin(session.prepare(study))
    told = capsys.readouterr()
    assert "EMULATED: " in told.err and "as a real study takes" in told.err and "load 1 is " in told.err
    for text, times in ((told.out, 2), (told.err, 1)):
        assert " ".join(text.split()).count("1 bad lines skipped (1 wrong number of columns)") == times


def test_a_study_is_looked_at_where_its_engine_is_not_installed_and_not_begun(workplace: Path, capsys) -> None:
    """A laptop has no vLLM, and the plan is wanted before any GPU is paid."""
    python = workplace / "bin" / "python"
    text = GOOD.replace(
        "engine: {kind: emulator, options: {gpu: H100-SXM}}", f"engine: {{kind: vllm, python: {python}}}"
    )
    path = write(workplace, text + "hardware: {gpu: H100-SXM, gpus: 1}\n")
    check.run(path, json=False)
    told = "".join(capsys.readouterr().out.split())  # the console may break a long path anywhere
    assert "isvalid.vllmwouldserve" in told
    assert f"Notchecked:{python}doesnotexist:theflagsarecheckedwherethestudyruns." in told
    plan.run(path, json=False)
    told = "".join(capsys.readouterr().out.split())
    assert "Notchecked:" in told and "Predictedfront" in told
    with pytest.raises(EnvironmentFault, match="does not exist"):
        session.prepare(read(path, Flags()))


@pytest.mark.parametrize(
    ("space", "gpu", "says"),
    [
        ("vllm/standard", "cpu", "with the build of vLLM that serves here: its defaults are others, and"),
        ("vllm-cpu/quick", "H100-SXM", "Take a space of vllm/."),
        ("vllm-cpu/quick", "cpu", ""),
        ("vllm/standard", "H100-SXM", ""),
    ],
)
def test_a_space_of_another_build_than_the_one_that_serves_is_said_to_be_one(
    workplace, capsys, space, gpu, says
) -> None:
    engine = f"engine: {{kind: vllm, python: {workplace}/none}}\nhardware: {{gpu: {gpu}}}"
    text = GOOD.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", engine)
    check.run(write(workplace, text.replace("vllm/quick", space)), json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert says in told and (f"{space} was not checked" in told) == bool(says)


@pytest.mark.parametrize(("kind", "on", "price"), [("h100", "H100-SXM", 2.5), ("l4", "L4", 0.4)])
def test_the_type_of_gpu_that_a_parameter_pins_is_the_studys(workplace: Path, capsys, kind, on, price) -> None:
    text = f"{OWN}parameters: {{kind: {kind}}}\nprice_usd_per_gpu_hour: {{H100-SXM: 2.5, L4: 0.4}}\n"
    study = read(write(workplace, text), Flags())
    ready = session.prepare(study, launching=False)
    found = check.describe(ready)
    assert found["hardware"] == f"4 x {on}" and f"({price} USD per GPU-hour)" in found["goal"]
    with View(study, True) as view:
        view.begin(ready)
    assert f" on {on}, " in capsys.readouterr().err


def test_a_space_too_large_to_be_tried_is_not_said_to_allow_nothing(workplace: Path, capsys) -> None:
    path = write(workplace, GOOD.replace("vllm/quick", "vllm/full"))
    check.run(path, json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "combinations, too many to try each: `tuner plan` looks at some thousands." in told and "None" not in told


def test_check_and_plan_count_the_same_combinations_and_no_name_is_cut(workplace: Path, capsys, monkeypatch) -> None:
    """A parameter that does not apply is at its default, so that not every product of values is a server of its own."""
    monkeypatch.setenv("COLUMNS", "72")
    pins = (
        "{gpu_memory_utilization: [0.9, 0.92], max_num_batched_tokens: [2048, 8192], max_num_seqs: 256, block_size: 16}"
    )
    path = write(workplace, GOOD.replace("vllm/quick", "vllm/standard") + f"parameters: {pins}\n")
    check.run(path, json=False)
    told = capsys.readouterr().out
    study = read(path, Flags())
    assert all(parameter.name in told for parameter in study.space.parameters)
    plan.run(path, json=False)
    planned = " ".join(capsys.readouterr().out.split())
    assert "Emulated: no GPU is used or paid;" in planned
    ready = session.prepare(study)
    found = check.describe(ready)["combinations"]
    assert found == plan.plan(ready)["combinations"] < study.space.size()
    assert f"combinations looked at may be launched ({found} in the space)" in planned


def planned(workplace: Path, budget: str, more: str = "") -> dict:
    text = GOOD.replace("{kind: emulator, options: {gpu: H100-SXM}}", "{kind: emulator, options: {gpu: L40S}}")
    path = write(workplace, text.replace("{launches: 5}", budget) + more)
    return plan.plan(session.prepare(read(path, Flags()), launching=False))


def test_a_budget_in_usd_pays_the_gpus_that_launches_use(workplace: Path) -> None:
    one, eight = (planned(workplace, "{usd: 10}", f"hardware: {{gpu: L40S, gpus: {gpus}}}\n") for gpus in (1, 8))
    assert eight.pop("idle") and not one.pop("idle")
    assert eight == one and one["usd"] == pytest.approx(10)
    many = planned(workplace, "{usd: 4, verify_share: 0}", "hardware: {gpu: L40S, gpus: 8}\nparallel: 4\n")
    assert many["hours"] == pytest.approx(many["launches"] * many["launch_seconds"] / 3600 / 4, rel=0.01)
    assert many["usd"] == pytest.approx(4)


def test_one_launch_verifies_nothing_and_is_not_planned(workplace: Path) -> None:
    one, two = (planned(workplace, f"{{launches: {n}, verify_share: 0.5}}") for n in (2, 4))
    assert (one["launches"], two["launches"]) == (1, 4)
    assert one["hours"] == pytest.approx(one["launch_seconds"] / 3600)


def test_a_search_is_planned_for_what_the_space_has(workplace: Path) -> None:
    pins = "{max_num_seqs: [64, 256], max_num_batched_tokens: [2048, 8192], kv_cache_dtype: auto, quantization: none}"
    four = f"parameters: {pins}\n"
    data = planned(workplace, "{launches: 20, verify_share: 0}", four)
    assert data["combinations"] == data["allowed"] == data["launches"] == 4
    assert data["hours"] == pytest.approx(4 * data["launch_seconds"] / 3600)
    verified = planned(workplace, "{launches: 20, verify_share: 0.5}", four)
    seconds = 4 * verified["launch_seconds"] + 16 * verified["verify_launch_seconds"]
    assert verified["hours"] == pytest.approx(seconds / 3600) and verified["launches"] == 20


def test_of_what_is_predicted_alike_the_plan_shows_what_changes_least(workplace: Path) -> None:
    """The others' flags say nothing to the model, so they are no part of what it expects."""
    silent = "{name: s, parameters: {level: {flag: uvicorn-log-level, values: [debug, info, error], default: info}}}"
    path = write(workplace, GOOD.replace("search_space: vllm/quick", f"search_space: {silent}"))
    front = plan.plan(session.prepare(read(path, Flags()), launching=False))["front"]
    assert {row["flags"] for row in front} == {"engine default"}


def test_a_launch_is_planned_up_to_the_first_load_that_is_predicted_to_miss(workplace: Path) -> None:
    took_s = []
    for more in ("", ", 400000", ", 400000, 800000"):
        ladder = f"[1, 2000, 200000{more}]"
        text = GOOD.replace("[1, 2, 4]", ladder).replace("300ms", "28ms").replace("H100-SXM", "L40S")
        text += "parameters: {max_num_batched_tokens: 2048, kv_cache_dtype: auto, quantization: none}\n"
        ready = session.prepare(read(write(workplace, text), Flags()), launching=False)
        took_s.append(plan.plan(ready)["launch_seconds"])
    assert took_s == pytest.approx([took_s[0]] * 3)


def test_a_plan_of_a_short_time_verifies_on_fewer_windows(workplace: Path) -> None:
    """And keeps two launches on so few for it, which on five would be more than half of the time."""
    rows = "".join(f"{second},100,10\n" for second in range(300))
    (workplace / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    long, short = (planned(workplace, f"{{hours: {hours}, min_gain: 0}}") for hours in (10, 0.25))
    window_s = (long["verify_launch_seconds"] - short["verify_launch_seconds"]) / 2
    assert 3 * 10 < window_s < 3 * 12, "five windows and three, of three loads each"
    assert 2 * short["verify_launch_seconds"] < 450 < 2 * long["verify_launch_seconds"]
    assert short["hours"] == pytest.approx(0.25)


def test_a_plan_has_the_windows_of_verification_and_says_what_bounds_it(workplace: Path, capsys) -> None:
    data = planned(workplace, "{launches: 20, verify_share: 0.4}")
    assert data["verify_launch_seconds"] > data["launch_seconds"]
    seconds = 12 * data["launch_seconds"] + 8 * data["verify_launch_seconds"]
    assert data["hours"] == pytest.approx(seconds / 3600) and data["launches"] == 20
    for budget, says in (
        ("{launches: 20}", r"at most 20 launches, about [\d.]+ h, about [\d.]+ USD\."),
        ("{usd: 10}", r"about \d+ launches, about [\d.]+ h, at most 10\.00 USD\."),
        ("{hours: 2}", r"about \d+ launches, at most 2\.0 h, about [\d.]+ USD\."),
    ):
        planned(workplace, budget)
        plan.run(workplace / "study.yaml", json=False)
        assert re.search(says, " ".join(capsys.readouterr().out.split()))


def test_a_plan_has_the_ladder_that_the_default_is_foretold_to_settle(workplace: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workplace)
    path = write(workplace, GOOD.replace("[1, 2, 4]", "auto").replace("300ms", "28ms").replace("H100-SXM", "L40S"))
    study = read(path, Flags())
    ready = session.prepare(study, launching=False)
    assert ready.predictor and plan.plan(ready)["ladder"] == list(studyfile.USUAL_LADDER)
    plan.run(path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ladder_foretold"] and found["ladder"] != list(studyfile.USUAL_LADDER)
    plan.run(path, json=False)
    said = ", ".join(f"{load:g}" for load in found["ladder"])
    assert f"Ladder: {said}, if the default does as predicted;" in " ".join(capsys.readouterr().out.split())
    settled = ladder.foretold(ready, lambda s: replace(ready, study=s))
    assert settled and list(settled.study.load.ladder) == found["ladder"]
    default = study.space.config(study.space.default(), study.model)
    top = max(load for load in found["ladder"] if not misses(ready, default, load))
    assert all(misses(ready, default, load) for load in found["ladder"] if load > top)
    with session.opened(study) as store:
        store.trial_folder(0)  # begun
        ladder._freeze(replace(study, load=replace(study.load, ladder=(3.0, 4.0))), store)
    plan.run(path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ladder"] == [3, 4] and not found["ladder_foretold"], "what a session has settled is known"
    fixed = write(workplace, GOOD)
    plan.run(fixed, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ladder"] == [1, 2, 4] and not found["ladder_foretold"]


def misses(ready, config, load: float) -> bool:
    metrics = ready.predictor.predict(config, load).metrics
    return any(slo.miss(metrics) for slo in ready.study.objective.slos if slo.latency)


def test_a_plan_has_the_filling_of_the_prefix_cache_where_the_model_can_tell_it(workplace: Path, capsys) -> None:
    shared(workplace)
    pins = "{max_num_seqs: 256, max_num_batched_tokens: [2048, 8192], kv_cache_dtype: auto, quantization: none}"
    text = GOOD.replace("{file: trace.csv", "{file: shared.jsonl, FILL") + f"parameters: {pins}\n"
    found = {}
    for fill in ("0s", "30s"):
        path = write(workplace, text.replace("FILL", f"fill_cache: {fill}"))
        ready = session.prepare(read(path, Flags()), launching=False)
        found[fill] = plan.plan(ready)
    none, some = found["0s"], found["30s"]
    assert none["fill_seconds"] is None and not none["fills_cache"]
    steps = len(ready.study.load.ladder)  # none of them is predicted to miss
    assert some["launch_seconds"] - none["launch_seconds"] == pytest.approx(steps * some["fill_seconds"], rel=0.05)
    assert some["verify_launch_seconds"] - none["verify_launch_seconds"] > steps * some["fill_seconds"]
    assert some["fill_usd"] / some["fill_seconds"] == pytest.approx(some["usd"] / some["hours"] / 3600)
    plan.run(path, json=False)
    assert re.search(
        r" USD\. Filling the prefix cache before each step is in it: about [\d.]+ s and [\d.]+ USD each time\.",
        " ".join(capsys.readouterr().out.split()),
    )
    unknown = plan.plan(replace(ready, predictor=None, no_model="none"))
    assert unknown["fills_cache"] and unknown["fill_seconds"] is None
    (workplace / "model" / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 64}')
    path.write_text(
        path.read_text().replace("{kind: emulator, options: {gpu: H100-SXM}}", "{kind: vllm}")
        + "hardware: {gpu: H100-SXM, gpus: 1}\n"
    )
    plan.run(path, json=False)
    assert "USD. Filling the prefix cache before each step comes on top." in " ".join(capsys.readouterr().out.split())


def test_what_a_function_launches_takes_no_time_that_anybody_knows(workplace: Path, capsys) -> None:
    (workplace / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99': .01, 'output_tokens_per_s': 1.0}\n"
    )
    path = write(workplace, MINE, "mine.yaml")
    plan.run(path, json=False)
    told = capsys.readouterr().out
    assert "2 launches at most; how long a launch takes is the function's affair." in told and "USD" not in told
    for budget, says in (
        ("{launches: 1}", "\n1 launch at most; how long"),
        ("1h", "\nHow long"),
        ("9usd", "\nHow long"),
    ):
        path = write(workplace, MINE.replace("{launches: 2, verify_share: 0}", budget), "mine.yaml")
        plan.run(path, json=False)
        assert f"{says} a launch takes is the function's affair." in capsys.readouterr().out
    check.run(path, json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "the engine's default: the function mine.py:evaluate, called with batch=8" in told
    assert "a step is one call" in told and "Trace:" not in told
    check.run(write(workplace, MINE.replace("load: {ladder: [1]}\n", ""), "mine.yaml"), json=False)
    assert "Ladder: loads 0.5, 1, 1.5, 2, 3, 4, 6, 8;" in capsys.readouterr().out, "it is not launched to be asked"


def test_check_and_tune_say_which_names_the_search_knows_nothing_of(workplace: Path, capsys) -> None:
    (workplace / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99_s': 0.01, 'output_tokens_per_s': 900.0}\n"
    )
    said = "The search knows nothing of batch. Where one is like"
    for text, told in (
        (MINE, True),
        (MINE.replace("default: 8", "default: 8, like: max-num-seqs"), False),
        (MINE.replace("flag: batch", "flag: max_num_seqs"), False),
        (MINE.replace("name: mine\n", "name: mine\nsampler: tpe\n", 1), False),
        (MINE.replace("name: mine\n", "name: mine\npredictor: mine.py:evaluate\n", 1), False),
    ):
        path = write(workplace, text, "mine.yaml")
        study = read(path, Flags())
        with View(study, True) as view:
            view.begin(session.prepare(study, launching=False))
        check.run(path, json=False)
        shown = capsys.readouterr()
        assert (said in shown.err) == (said in " ".join(shown.out.split())) == told


def test_reasons_that_differ_in_their_figures_are_told_once() -> None:
    assert alike({"3.5 GiB short": 1, "an odd size": 2, "65 GiB short": 4}) == {"3.5 GiB short": 5, "an odd size": 2}


@pytest.mark.parametrize(("kind", "gpus", "told"), [("vllm", 0, 1), ("vllm", 2, 0), ("emulator", 0, 0)])
def test_a_gpu_that_cannot_be_tuned_is_named_where_a_cpu_server_is(workplace, monkeypatch, capsys, kind, gpus, told):
    monkeypatch.setattr(hardware, "strangers", lambda: "an AMD GPU")
    study = read(write(workplace, GOOD), Flags())
    study = replace(study, engine=replace(study.engine, kind=kind), hardware=replace(study.hardware, gpus=gpus))
    with View(study, plain=True):
        pass
    assert capsys.readouterr().err.count("This machine has an AMD GPU, which tuner cannot tune: all is ") == told


def test_variables_that_servers_do_not_get_are_named_once(workplace: Path, capsys) -> None:
    view = View(read(write(workplace, GOOD), Flags()), plain=True)
    for _ in range(2):
        view.on_event("not_passed", {"variables": ("OMP_NUM_THREADS", "VLLM_FOO"), "trial": 1})
    told = capsys.readouterr().err
    assert told.count("Not handed on to servers from your shell: OMP_NUM_THREADS, VLLM_FOO.") == 1


@pytest.mark.parametrize(
    ("kind", "waits"),
    [("emulator", ": the running server is shut down first"), ("function", " when the function has answered")],
)
def test_an_interrupt_is_said_to_wait_for_what_runs(workplace: Path, capsys, kind, waits) -> None:
    (workplace / "mine.py").write_text("def evaluate(config, load): ...\n")
    view = View(read(write(workplace, GOOD if kind == "emulator" else MINE, f"{kind}.yaml"), Flags()), plain=True)
    view.stopping()
    view.on_event("launch", {"trial": 0, "config": view.default, "why": "the engine's default"})
    view.stopping()
    told = capsys.readouterr().err.splitlines()
    assert (told[0], told[-1]) == ("Stopping. Again to leave at once.", f"Stopping{waits}. Again to leave at once.")


def test_the_live_view_shows_what_is_launched_in_the_narrowest_terminal(workplace: Path) -> None:
    view = View(read(write(workplace, GOOD), Flags()), plain=True)
    config = replace(view.default, flags={**view.default.flags, "max-num-seqs": 7})
    view.on_event("launch", {"trial": 1, "config": config, "why": "114.8% more hypervolume expected, for 2 minutes"})
    with (narrow := Console(width=40)).capture() as shown:
        narrow.print(view)
    assert "    max-num-seqs=7 (114.8% more" in shown.get()
    view.on_event("trial", {"trial": 1, "outcome": Infeasible("crash", "it ended", "no such file: a.py"), "role": ""})
    with narrow.capture() as shown:
        narrow.print(view)
    assert "1 trial done" in shown.get() and "working out what comes next" in shown.get()


def test_a_crash_of_no_known_kind_is_shown_with_the_line_that_it_ended_with(workplace: Path, capsys) -> None:
    view = View(read(write(workplace, GOOD), Flags()), plain=True)
    ended = diagnose(Evidence("python: can't open file '/here/serve.py': [Errno 2]", exit_code=2))
    view.on_event("trial", {"trial": 0, "outcome": ended, "baseline": True, "role": "search"})
    told = capsys.readouterr().err
    assert "(exit code 2) (python: can't open file '/here/serve.py'" in told and "without a word" not in told


def test_a_launch_on_several_windows_or_stopped_is_not_said_to_have_a_capacity(workplace: Path, capsys) -> None:
    view = View(read(write(workplace, GOOD), Flags()), plain=True)
    metrics = {"cost_usd_per_mtok_output": 0.2, view.study.objective.latency_key: 0.02}
    steps = [
        Step(load, window, metrics, slo_misses=misses)
        for window, load, misses in (("a", 3.5, ()), ("b", 2.0, ()), ("b", 2.3, ("tpot_p99 80 ms > 50 ms",)))
    ]
    for trial, outcome, role in (
        (0, Measured(tuple(steps[:1])), "search"),
        (1, Aborted("cannot beat trial 0", tuple(steps[:1])), "search"),
        (2, Measured(tuple(steps)), "verify"),
        (3, Measured((*steps, replace(steps[2], window="c"))), "verify"),
    ):
        view.on_event("trial", {"trial": trial, "outcome": outcome, "baseline": False, "role": role})
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "[0] capacity 3.5, 0.2 USD/M output tokens, tpot_p99 20.0 ms",
        "[1] stopped (cannot beat trial 0); held up to load 3.5, 0.2 USD/M output tokens, tpot_p99 20.0 ms",
        "[2] held up to load 2 to 3.5 on 2 windows",
        "[3] held up to load 2 to 3.5 on 3 windows, at none on 1",
    ]
    assert {trial for trial, *_ in view.points} == {0, 1}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("{launches: 30}", "30 launches (up to 21 for the search, the rest for verification)"),
        ("{launches: 30, verify_share: 0}", "30 launches (all for the search)"),
        ("{launches: 1}", "1 launch (all for the search)"),
        ("{hours: 4}", "4 h (up to 2.8 for the search, the rest for verification)"),
        (
            "{launches: 20, usd: 15}",
            "20 launches, 15.00 USD (up to 14 launches, 10.50 USD for the search, the rest for verification)",
        ),
    ],
)
def test_what_of_the_budget_is_the_searchs_is_said_beforehand(workplace: Path, capsys, budget, says) -> None:
    path = write(workplace, GOOD.replace("{launches: 5}", budget))
    for command in (check.run, plan.run):
        command(path, json=False)
        assert f"Budget: {says}" in " ".join(capsys.readouterr().out.split())
    study = read(path, Flags())
    View(study, plain=True).begin(session.prepare(study))
    assert f"Budget: {says}.\n" in capsys.readouterr().err


def test_the_usual_budget_verifies_in_three_rounds(workplace: Path) -> None:
    found = read(write(workplace, GOOD.replace("budget: {launches: 5}", "")), Flags()).budget
    assert found == Budget(launches=20, verify_share=0.3)
    assert "6 are kept for verification" in search_is_over(SimpleNamespace(budget=found), Spent(14, 0.0, 0.0, 0.0, 0.0))
    before = Spent(20, 0.0, 0.0, 0.0, 0.0)  # of a study that kept nothing for verification
    assert search_is_over(SimpleNamespace(budget=found), before) == "the search's 20 launches are spent"


ODD = """\
import threading
met = threading.Barrier(2, timeout=60)
def evaluate(config, load):
    print("a function talks")
    if load == 1 and config["batch"] > 8:
        met.wait()  # two at once, or neither
    cheap = config["batch"] == 16
    cost = {1: 11, 2: 8, 4: 0.01}[load] if cheap else 5 / load
    return {"tpot_p99_s": 0.03 if cheap else 0.02, "cost_usd_per_mtok_output": cost}
"""


def test_functions_run_side_by_side_and_to_the_end_whatever_their_costs(tmp_path: Path) -> None:
    """A cost that falls faster than the load rises, which no server's does, is found; and all that is said is so."""
    (tmp_path / "mine.py").write_text(ODD)
    text = MINE.replace("[8, 16]", "[8, 16, 32]").replace("ladder: [1]", "ladder: [1, 2, 4]")
    text = text.replace("launches: 2", "launches: 3") + "parallel: 2\nsampler: grid\nwarm_start: [reports/before]\n"
    (tmp_path / "before.yaml").write_text(MINE.replace("name: mine\nengine", "name: before\nengine"))
    (tmp_path / "study.yaml").write_text(text)
    checked = tuner("check", "before.yaml", "--json", cwd=tmp_path, check=0)
    assert json.loads(checked.stdout)["combinations"] == 2 and "talks" not in checked.stdout
    tuner("tune", "before.yaml", cwd=tmp_path)
    done = tuner("tune", "study.yaml", cwd=tmp_path, check=0)
    assert "warm_start is not used: the sampler grid learns from no earlier study" in done.stderr
    assert "talks" in done.stderr and "talks" not in done.stdout
    front = json.loads(tuner("front", "reports/mine", "--json", cwd=tmp_path, check=0).stdout)
    assert min(point["cost_usd_per_mtok_output"] for point in front["front"]) == 0.01


def test_where_nothing_meets_the_slos_commands_end_with_3_and_say_what_came_nearest(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(
        "def evaluate(config, load):\n    return {'tpot_p99_s': 0.5 / config['batch'], 'output_tokens_per_s': 900.0}\n"
    )
    (tmp_path / "study.yaml").write_text(MINE.replace("50ms", "25ms"))
    for words in (("tune", "study.yaml"), ("front", "study.yaml"), ("export", "study.yaml")):
        done = tuner(*words, cwd=tmp_path, check=3)
        assert "Nearest: trial 1 (batch=16) at load 1, 25 % over" in " ".join((done.stdout + done.stderr).split()), (
            words
        )
    assert not (tmp_path / "reports/mine/best-config.yaml").exists()


WAITS = """\
import time
from pathlib import Path
def evaluate(config, load):
    Path(f"asked-{config['batch']}").touch()
    while config["batch"] == 16 and not Path("go").exists():
        time.sleep(0.02)
    return {"tpot_p99_s": 0.01, "output_tokens_per_s": 900.0}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_ends_with_130_and_the_command_that_goes_on_with_it(tmp_path: Path, number) -> None:
    (tmp_path / "mine.py").write_text(WAITS)
    (tmp_path / "study.yaml").write_text(MINE)
    words = [sys.executable, "-m", "tuner", "tune", "study.yaml"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        while not (tmp_path / "asked-16").exists():
            assert command.poll() is None
            time.sleep(0.02)
        command.send_signal(number)
        (tmp_path / "go").touch()
        said = command.communicate(timeout=60)[1]
    assert command.returncode == 130, said
    assert "Interrupted; everything measured is kept. Resume: tuner tune study.yaml" in said
    assert (tmp_path / "reports/mine/trials/0000/outcome.json").exists()
    (tmp_path / "asked-8").unlink()
    assert "the search's 2 launches are spent" in tuner("tune", "study.yaml", cwd=tmp_path, check=0).stderr
    assert not (tmp_path / "asked-8").exists()  # the default is not measured again


def test_a_space_of_which_nothing_may_be_launched_is_not_called_valid(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ODD)
    rule = "  rules: [{deny: {batch: {ge: 1}}, because: never}]\nobjective"
    (tmp_path / "study.yaml").write_text(MINE.replace("objective", rule, 1))
    for words in ((), ("--json",)):
        done = tuner("check", "study.yaml", *words, cwd=tmp_path, check=2)
        assert "no combination may be launched" in done.stderr
    assert json.loads(done.stdout)["allowed"] == 0


def test_small_amounts_of_money_are_not_rounded_to_nothing() -> None:
    assert "0.012 of 0.02 USD are left, and a launch costs 0.015" in search_is_over(
        SimpleNamespace(budget=Budget(usd=0.02, verify_share=0.0)), Spent(1, 0.1, 0.008, 60.0, 0.015)
    )


@pytest.mark.parametrize("ladder", ["auto", "[1, 2]"])
def test_a_study_that_an_earlier_version_began_is_gone_on_with_by_its_file(workplace: Path, ladder: str) -> None:
    """Of a fixed size it counted no GPUs: what is launched now is compared with what was."""
    text = GOOD.replace("[1, 2, 4]", ladder).replace("options:", "args: {tensor-parallel-size: 2}, options:")
    text = text.replace("gpu: H100-SXM", "gpu: H100-SXM, clock: virtual").replace("launches: 5", "launches: LEFT")
    text += f"hardware: {{gpu: H100-SXM, gpus: 2}}\nname: s\nreports: {workplace}/reports\n"
    write(workplace, text.replace("LEFT", "2, verify_share: 0"))
    tuner("tune", "study.yaml", cwd=workplace, check=None)
    kept, store = workplace / "reports/s/study.yaml", Store(workplace / "reports/s")
    before = len(store.trials())
    assert all(t.ended_s - t.started_s > t.outcome.boot.total_s > 20 for t in store.trials())  # emulated seconds
    assert "  counts_fixed: true\n" in kept.read_text()
    kept.write_text(kept.read_text().replace("  counts_fixed: true\n", ""))
    write(workplace, text.replace("LEFT", "4, verify_share: 0"))
    tuner("tune", "study.yaml", cwd=workplace, check=None)
    gpus = [trial.config.gpus for trial in store.trials()]
    assert set(gpus[:before]) == {2} and set(gpus[before:]) == {1}
