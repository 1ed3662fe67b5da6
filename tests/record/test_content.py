import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests import studies
from tuner.record.content import content, flag_values, legal, status
from tuner.record.note import markdown
from tuner.record.secrets import HIDDEN
from tuner.server import telemetry
from tuner.server.gpu import GpuSample
from tuner.space.config import ServingConfig
from tuner.study.outcome import Aborted, Infeasible, Measured, Untrusted
from tuner.study.store import Store

OBJECTIVE = studies.objective()


@pytest.fixture
def one(tmp_path: Path):
    """A store with one trial of two loads; the study."""
    store = Store(tmp_path / "s")
    steps = (studies.step(0.5, OBJECTIVE), studies.step(1.5, OBJECTIVE, tpot_s=0.08))
    studies.measured(0, steps, store, params={"max_num_batched_tokens": 8192, "prefix_caching": False})
    return store, studies.study(tmp_path / "s")


def test_every_load_step_has_its_metrics_at_its_ladder_position_and_the_load_beside_them(one):
    store, study = one
    made = content(store.trials()[0], study)
    assert [(s.step, s.value) for s in made.samples if s.name == "load"] == [(0, 0.5), (1, 1.5)]
    assert [(s.step, s.value) for s in made.samples if s.name == "tpot_p99_s"] == [(0, 0.02), (1, 0.08)]
    low = [s.value for s in made.samples if s.name == "tpot_p99_s.low95"]
    assert low == pytest.approx([0.0194, 0.0776])


def test_a_functions_own_metric_does_not_overwrite_one_of_ours(tmp_path: Path):
    step = studies.step(1.0, OBJECTIVE)
    more = {"load": 77.0, "best_cost_usd_per_mtok_output": 5.0, "watts": 3.0}
    studies.measured(0, (replace(step, metrics=step.metrics | more),), Store(tmp_path / "s"))
    made = content(Store(tmp_path / "s").trials()[0], studies.study(tmp_path / "s"))
    found = {s.name: s.value for s in made.samples}
    assert (found["load"], found["user.load"], found["watts"]) == (1.0, 77.0, 3.0)
    assert found["best_cost_usd_per_mtok_output"] == step.metrics["cost_usd_per_mtok_output"]


def test_capacity_and_best_values_count_only_the_loads_within_slo(one):
    store, study = one
    found = {s.name: s.value for s in content(store.trials()[0], study).samples}
    assert found["capacity_load"] == 0.5
    assert found["best_tpot_p99_s"] == 0.02


def test_what_every_window_held_is_the_capacity_of_a_launch_on_several_and_a_stopped_one_has_none(tmp_path: Path):
    store, study = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    steps = [
        replace(studies.step(load, OBJECTIVE, tpot_s=tpot_s), window=window)
        for window, load, tpot_s in (("a", 3.5, 0.02), ("b", 2.0, 0.02), ("b", 2.3, 0.08))
    ]
    studies.measured(0, tuple(steps), store, role="verify")
    studies.add(1, Aborted("cannot beat the front", (steps[0],)), store)
    several, stopped = ({s.name: s.value for s in content(t, study).samples} for t in store.trials())
    assert several["capacity_load"] == 2.0 and "best_tpot_p99_s" not in several
    assert "capacity_load" not in stopped and stopped["best_tpot_p99_s"] == 0.02


def test_parameters_stand_under_the_engines_own_flag_names_also_at_their_default(one):
    store, study = one
    params = content(store.trials()[0], study).params
    assert params["max-num-batched-tokens"] == "8192"
    assert params["enable-prefix-caching"] == "false"
    assert params["max-num-seqs"] == "256"  # at its default, so not on the command line
    assert params["env.HF_HUB_OFFLINE"] == "1"


def test_a_secret_flag_is_hidden_by_its_name_however_short_it_is(one):
    store, study = one
    trial = store.trials()[0]
    config = replace(trial.config, flags={**trial.config.flags, "api-key": "1234"})
    assert content(replace(trial, config=config), study).params["api-key"] == HIDDEN


def test_a_json_flag_is_taken_apart_and_a_switch_is_true_or_false():
    flags = {
        "speculative-config": '{"method": "ngram", "num_speculative_tokens": 4}',
        "no-enable-chunked-prefill": None,
        "enforce-eager": None,
        "override": "{broken",
    }
    assert flag_values(ServingConfig("m", {}, flags)) == {
        "speculative-config.method": "ngram",
        "speculative-config.num_speculative_tokens": "4",
        "enable-chunked-prefill": "false",
        "enforce-eager": "true",
        "override": "{broken",
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_becomes_a_tag_and_never_a_metric(tmp_path: Path, value):
    store = Store(tmp_path / "s")
    step = studies.step(1.0, OBJECTIVE)
    studies.measured(0, (replace(step, metrics={**step.metrics, "ttft_p99_s": value}, intervals={}),), store)
    made = content(store.trials()[0], studies.study(tmp_path / "s"))
    assert all(math.isfinite(s.value) for s in made.samples)
    assert "ttft_p99_s" not in {s.name for s in made.samples}
    assert made.tags["not_finite.ttft_p99_s"] == f"step 0: {value}"


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Measured(()), "FINISHED"),
        (Infeasible("oom", "no"), "FAILED"),
        (Untrusted(("lag",)), "FAILED"),
        (Aborted("interrupt"), "KILLED"),
    ],
)
def test_the_run_state_follows_the_outcome(outcome, state):
    assert status(outcome) == state


def test_a_failure_carries_its_evidence_and_its_fix(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.add(0, Infeasible("oom-kv", "no room", "ValueError: 3.1 GiB needed", "lower it"), store, emulated=True)
    made = content(store.trials()[0], studies.study(tmp_path / "s"))
    assert made.tags["cause"] == "oom-kv" and made.tags["reason"] == "oom-kv: no room"
    assert made.tags["evidence"] == "ValueError: 3.1 GiB needed" and made.tags["fix"] == "lower it"
    assert made.tags["emulated"] == "true" and made.name.startswith("[emulated]")


def test_what_the_loop_noted_does_not_overwrite_our_own_tags(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.add(0, Infeasible("oom-kv", "no room"), store, outcome_kind="x", reason="seeded", device="H100")
    tags = content(store.trials()[0], studies.study(tmp_path / "s")).tags
    assert tags["reason"] == "oom-kv: no room" and tags["device"] == "H100"


def test_gpu_series_are_thinned_but_keep_their_own_times(one):
    store, study = one
    folder = store.trials()[0].folder

    def gpu(index: int, power_w: float) -> GpuSample:
        return GpuSample(index, 1, 2, power_w, 0.0, 0.5, 60.0, 1800.0, ("power cap",))

    looks = [
        telemetry.Sample(1000.0 + i, telemetry.HostSample(0.5, 3, 1.0, 2), (gpu(0, power), gpu(1, 7.0)))
        for i, power in enumerate(math.nan if i == 4 else float(i) for i in range(2000))
    ]
    telemetry.write(looks, folder / "telemetry.parquet")
    samples = [s for s in content(store.trials()[0], study).samples if s.name.startswith("system/")]
    series = [s for s in samples if s.name == "system/gpu0_power_w"]
    assert len(series) == 499  # every fourth look, less the gap
    assert (series[1].at_ms, series[1].value) == (1_008_000, 8.0)
    assert {s.value for s in samples if s.name == "system/gpu1_power_w"} == {7.0}
    assert len([s for s in samples if s.name == "system/host_cpu"]) == 500  # once per look, however many GPUs
    assert not any("throttled" in s.name or "index" in s.name for s in samples)


def test_a_machine_without_gpus_has_series_too(one):
    store, study = one
    looks = [telemetry.Sample(1000.0 + i, telemetry.HostSample(0.5, 3, 1.0, 2), ()) for i in range(5)]
    telemetry.write(looks, store.trials()[0].folder / "telemetry.parquet")
    names = {s.name for s in content(store.trials()[0], study).samples if s.name.startswith("system/")}
    assert "system/host_cpu" in names and not any("gpu" in name for name in names)


def test_the_trials_files_are_its_artifacts(one):
    store, study = one
    folder = store.trials()[0].folder
    (folder / "server.log").write_text("up")
    (folder / ".outcome.json.1.tmp").write_text("half")
    names = [p.name for p in content(store.trials()[0], study).artifacts]
    assert names == ["config.json", "outcome.json", "server.log"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("--max-num-seqs", "max-num-seqs"),
        ("a+b", "a_b"),
        ("../../etc", "etc"),
        ("system/gpu 0", "system/gpu 0"),
        ("", "_"),
    ],
)
def test_names_are_made_legal_for_mlflow(name, wanted):
    assert legal(name) == wanted


def test_no_value_of_a_parameter_leaves_its_code_in_the_note(tmp_path):
    study, store = studies.write(tmp_path / "s", trials=1)
    config = replace(store.trials()[0].config, flags={"x": "`<img src=x>` ``|\ny"})
    store.start_trial(1, config, config.params)
    store.end_trial(1, Measured((studies.step(2.0, study.objective, tokens_per_s=90_000),)))
    note = markdown(store, study)
    (row,) = [line for line in note.splitlines() if line.startswith("|") and "<img" in line]
    assert "``` " in row and row.count("```") == 2 and r"``\| y" in row
    assert "<img" not in note.replace(row, "")
