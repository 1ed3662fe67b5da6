"""Whatever happens to servers and tuners, a study has every trial once, and the machine is clean.

What becomes of each configuration is stated (:data:`tests.study.soak.FAULTS`). In CI one seed; by hand more of them,
with MLflow, and a study that nobody disturbs: ``TUNER_SOAK_SEEDS="1 2 3" pytest tests/study/test_soak.py``.
"""

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.study import soak
from tuner.errors import NothingFeasible

SEEDS = os.environ.get("TUNER_SOAK_SEEDS", "").split()
NO_MLFLOW = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}  # away: importing it for each of six sessions takes long
EXHAUSTED = "Ended: every configuration of the space has been tried."
KILLS = 5

STUDY = soak.STUDY.replace("ENGINE", soak.EMULATOR).replace("SPACE", soak.space())
FATES = {f"sound{number}": ("served",) for number in range(len(soak.FAULTS))} | soak.FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def finish(tuner: soak.Tuner) -> None:
    """Waits until the study has run to its end. On a machine so busy that no measurement can be believed it has no best
    configuration, which is not what is tested here."""
    assert tuner.ended() in (0, NothingFeasible.exit_code), tuner.log.read_text()
    said = tuner.log.read_text()
    assert EXHAUSTED in said and "Traceback" not in said, said


def check_trials(tuner: soak.Tuner, expected: dict[str, tuple[str, ...]]) -> None:
    """Folder and ledger have the trials that they should, none lost, none twice."""
    import optuna

    assert tuner.fates() == expected
    trials = tuner.store.trials()
    numbers = [t.number for t in trials]
    put_aside = {int(f.name.partition("-")[0]) for f in (tuner.store.folder / "interrupted").glob("*")}
    assert numbers == sorted(set(numbers))
    assert set(range(max(numbers) + 1)) - set(numbers) <= put_aside, "a number is missing only where a kill cut it off"
    assert sum(t.baseline for t in trials) == 1
    book = optuna.load_study(study_name=tuner.name, storage=tuner.store.database).trials
    assert {t.state.name for t in book} <= {"COMPLETE", "FAIL"}, "nothing runs or waits for ever"
    launched = [t for t in book if t.state.name == "COMPLETE" and not t.user_attrs.get("free")]
    assert {t.number: t.user_attrs["trial"] for t in launched} == {(t.extra or {})["optuna"]: t.number for t in trials}


@pytest.mark.parametrize("seed", SEEDS or ["1"])
def test_a_study_with_a_fault_in_every_second_trial_killed_five_times_has_every_trial_once(tmp_path: Path, seed: str):
    tuner = soak.Tuner(soak.workplace(tmp_path / "s"), "soak", STUDY, **({} if SEEDS else NO_MLFLOW))
    chance = random.Random(int(seed))
    for kill in range(KILLS):
        assert tuner.killed_at(chance), f"it ended before kill {kill + 1}:\n{tuner.log.read_text()}"
    tuner.start()
    finish(tuner)

    check_trials(tuner, FATES)
    assert soak.left_in(tuner.folder) == []
    if SEEDS:
        check_mlflow(tuner)


@pytest.mark.skipif(not SEEDS, reason="by hand: set TUNER_SOAK_SEEDS")
def test_a_study_that_nobody_disturbs_has_the_same_trials(tmp_path: Path):
    tuner = soak.Tuner(soak.workplace(tmp_path / "s"), "calm", STUDY)
    tuner.start()
    finish(tuner)
    check_trials(tuner, FATES)


def check_mlflow(tuner: soak.Tuner) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tuner.folder / 'reports' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tuner")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    logged = Counter(run.data.tags["tuner.trial"] for run in runs if "tuner.trial" in run.data.tags)
    assert logged == {str(trial.number): 1 for trial in tuner.store.trials()}


def test_two_tuners_on_one_machine_share_its_gpus_and_nothing_collides(tmp_path: Path):
    """Ten trials each, two at a time, on the same two GPUs: a server on a GPU in use ends with an error."""
    folder = soak.workplace(tmp_path / "s")
    text = soak.STUDY.replace("gpus: 3", "gpus: 2").replace("parallel: 3", "parallel: 2")
    text = text.replace("ENGINE", soak.command(folder)).replace("SPACE", soak.sound_space(10))
    both = [soak.Tuner(folder, name, text, **NO_MLFLOW) for name in ("one", "other")]
    for tuner in both:
        tuner.start()
    for tuner in both:
        finish(tuner)

    for tuner in both:
        check_trials(tuner, {f"sound{number}": ("served",) for number in range(10)})
    spans = [(trials[0].started_s, max(t.ended_s for t in trials)) for trials in (t.store.trials() for t in both)]
    assert max(start for start, _ in spans) < min(end for _, end in spans), "they were at work at the same time"
    assert any("leased by" in tuner.log.read_text() for tuner in both), "and waited for each other"
    assert soak.left_in(folder) == []
