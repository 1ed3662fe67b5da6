import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests import studies
from tuner.errors import UsageError
from tuner.report.console import printer
from tuner.report.page import build
from tuner.report.summary import spread, summarize
from tuner.report.tables import trial_row
from tuner.report.terminal import front_data, front_table, trial_data, trial_view
from tuner.study.outcome import Aborted, Infeasible
from tuner.study.store import Store

OBJECTIVE = studies.objective()


def shown(view, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_an_interval_of_a_rounding_bit_is_none():
    assert spread(1.36, (1.36 * (1 - 1e-15), 1.36)) == "±0 %"
    assert spread(1.36, (1.35, 1.37)) == "±0.74 %"


@pytest.fixture
def made(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), store, baseline=True)
    steps = (studies.step(2.0, OBJECTIVE, tokens_per_s=2000), studies.step(3.0, OBJECTIVE, tpot_s=math.inf))
    studies.measured(1, steps, store, params={"max_num_batched_tokens": 8192})
    studies.add(2, Infeasible("oom-kv", "no room for the KV cache", "ValueError: 3.1 GiB", "lower it"), store)
    return store, studies.study(tmp_path / "s")


def test_the_table_shows_cost_latency_load_throughput_and_only_the_flags_that_differ(made):
    text = shown(front_table(*made))
    row = next(line for line in text.splitlines() if line.strip().startswith("→"))
    assert row.split()[:8] == ["→", "0.347", "±3", "%", "20", "±3", "%", "2"]
    assert "2,000" in row and "max-num-batched-tokens=8192" in text and "max-model-len" not in text
    assert "1 x oom-kv" in text and "-50.0 %" in text


def test_the_default_stands_below_a_front_that_it_is_not_on(made):
    lines = shown(front_table(*made)).splitlines()
    costs = [line.split()[0] for line in lines if "±3 %" in line and not line.strip().startswith("→")]
    assert costs == ["0.694"] and "0  engine default, for comparison" in "\n".join(lines)


def test_a_verified_recommendation_stands_below_the_front_that_it_is_not_on(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=12, verified=True)
    text = shown(front_table(store, study), 120)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("→ ")]
    assert [(row[1], row[-1]) for row in rows if row[1].startswith("0")] == [
        ("0.47", str(summarize(store, study).choice.point.trial))
    ]
    assert "it need not lie on the front" in " ".join(text.split())
    (chosen,) = [row for row in rows if row[1].startswith("0")]
    found = summarize(store, study)
    own = next(p for p in found.points if p.config.hash == found.choice.point.config.hash)
    tokens_per_usd = own.cost * own.metrics["goodput_output_tokens_per_s"]
    assert float(chosen[-2].replace(",", "")) == pytest.approx(tokens_per_usd / found.choice.point.cost, rel=1e-3)


def test_a_recommendation_that_is_not_on_the_front_has_a_row_of_its_own(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tokens_per_s=1000, tpot_s=0.0202),), store, baseline=True)
    other = (studies.step(1.0, OBJECTIVE, tokens_per_s=1010, tpot_s=0.02),)
    studies.measured(1, other, store, params={"max_num_batched_tokens": 8192})
    study = studies.study(tmp_path / "s")
    found = summarize(store, study)
    assert [p.trial for p in found.front] == [1] and found.off_front is found.choice.point
    text = shown(front_table(store, study), 120)
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("→"))
    assert row[-2:] == ["1,000", "0"] and "cannot be told apart from a point of the front" in " ".join(text.split())
    page = build(store, study, tmp_path / "report.html").read_text()
    assert page.count("recommended; off the front") == 1


def test_a_trials_row_has_the_latency_of_its_cheapest_load_and_the_load_that_every_window_held(tmp_path: Path):
    store = Store(tmp_path / "s")
    steps = [studies.step(1.0, OBJECTIVE, tpot_s=0.01), studies.step(2.0, OBJECTIVE, tokens_per_s=2000, tpot_s=0.03)]
    studies.measured(0, tuple(steps), store, baseline=True)
    studies.add(1, Aborted("cannot beat trial 0", tuple(steps)), store, params={"max_num_batched_tokens": 8192})
    studies.measured(2, (*steps, replace(steps[0], window="other", load=0.9438)), store, role="verify")
    found = summarize(store, studies.study(tmp_path / "s"))
    rows = [trial_row(found, trial) for trial in store.trials()]
    assert [(row.capacity, row.latency) for row in rows] == [("2", "30"), ("≥ 2", "30"), ("0.944", "-")]


def test_the_data_is_strict_json_and_carries_intervals(made):
    data = json.loads(json.dumps(front_data(*made), allow_nan=False))
    assert [p["trial"] for p in data["front"]] == [1]
    assert data["front"][0]["cost_usd_per_mtok_output_95"][0] < data["front"][0]["cost_usd_per_mtok_output"]
    assert data["front"][0]["output_tokens_per_s"] == data["front"][0]["goodput_output_tokens_per_s"] == 2000
    assert data["recommended"]["changes"] == {"max-num-batched-tokens": 8192}
    assert data["cost_change"]["relative"] == pytest.approx(-0.5) and data["cost_change"]["proven"] is True
    assert data["failures"] == {"oom-kv": 1}


def test_a_study_without_a_feasible_step_says_what_came_nearest(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=5, slow=10)
    assert "Nearest: trial" in shown(front_table(store, study))
    data = front_data(store, study)
    assert data["front"] == [] and data["recommended"] is None and "Nearest" in data["text"]


def test_an_empty_study_is_no_error(tmp_path: Path):
    store, study = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    assert "No trial has finished yet" in shown(front_table(store, study))


def test_emulated_figures_are_called_so(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=2, emulated=True)
    assert "EMULATED" in shown(front_table(store, study)) and "EMULATED" in shown(trial_view(store, study, 0))


def test_a_trial_shows_what_its_server_said_at_each_load(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=2)
    path = store.trial_folder(1) / "outcome.json"
    outcome = json.loads(path.read_text())
    outcome["outcome"]["steps"][0]["metrics"]["server_prefix_hit_rate"] = 0.5
    path.write_text(json.dumps(outcome))
    said = shown(trial_view(store, study, 1))
    assert said.count("Server at load") == 1
    assert "Server at load 0.5: 50.0% of prompt tokens found cached" in said


def test_a_failed_trial_shows_its_evidence_and_its_fix(made):
    text = shown(trial_view(*made, 2))
    assert "Trial 2: infeasible" in text and "Evidence: ValueError: 3.1 GiB" in text and "Fix: lower it" in text


def test_a_trial_shows_every_step_and_its_data_is_strict_json(made):
    text = shown(trial_view(*made, 1), 120)
    assert (
        "--max-num-batched-tokens 8192" in text and "met" in text and "tpot_p99 without end" in " ".join(text.split())
    )
    data = json.loads(json.dumps(trial_data(*made, 1), allow_nan=False))
    assert [s["load"] for s in data["outcome"]["steps"]] == [2.0, 3.0]
    assert data["outcome"]["steps"][1]["metrics"]["tpot_p99_s"] is None


def test_a_trial_that_is_not_there_is_refused_in_words(made):
    with pytest.raises(UsageError, match="no finished trial 9"):
        trial_view(*made, 9)


def test_what_a_server_says_does_not_steer_the_terminal(tmp_path: Path, capsys):
    store = Store(tmp_path / "s")
    studies.add(0, Infeasible("crash", "\x1b[31mred\x07", "line\n\x9b2J next"), store)
    printer().print(trial_view(store, studies.study(tmp_path / "s"), 0))
    said = capsys.readouterr().out
    assert "[31mred" in said and "2J next" in said and not {"\x1b", "\x07", "\x9b"} & set(said)


def test_words_that_look_like_figures_are_read_back_as_words(tmp_path: Path):
    studies.add(0, Infeasible("crash", "nan", "inf"), Store(tmp_path), params=None)
    config = replace(Store(tmp_path).trials()[0].config, params={"weights": "nan"}, flags={"weights": "inf"})
    Store(tmp_path).start_trial(1, config, {"weights": "nan"})
    Store(tmp_path).end_trial(1, Infeasible("crash", "nan"), predicted={"1": {"x": math.inf}})
    trial = Store(tmp_path).trials()[1]
    assert (trial.params, trial.config.flags) == ({"weights": "nan"}, {"weights": "inf"})
    assert trial.outcome.message == "nan" and trial.extra["predicted"] == {"1": {"x": math.inf}}


def test_points_that_cannot_be_told_apart_name_each_other(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), store, baseline=True)
    near = replace(studies.step(1.0, OBJECTIVE, tokens_per_s=1005))
    studies.measured(7, (near,), store, params={"max_num_seqs": 64})
    data = front_data(store, studies.study(tmp_path / "s"))
    assert data["front"][0]["not_told_apart_from"] == [{"trial": 0, "load": 1.0}]
