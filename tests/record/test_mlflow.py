"""Against MLflow itself: a SQLite store, and once a real server that is not there at first."""

import fcntl
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import studies
from tuner.cli import certify
from tuner.errors import EnvironmentFault, UsageError
from tuner.pareto.recommend import recommended
from tuner.record import mlflow as recording
from tuner.record import writer
from tuner.record.ledger import Ledger, note_file
from tuner.record.mlflow import Recorder, sync, unsent
from tuner.record.place import Place, place, ui_command, ui_page
from tuner.spec.storage import sqlite_file
from tuner.study.outcome import Infeasible
from tuner.study.store import Store, write_json

NOWHERE: dict[str, str] = {}  # an environment without MLFLOW_TRACKING_URI


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it nothing."""
    writer._quiet()
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def made(tmp_path: Path, database: Path):
    """A finished study of 8 trials with an empty store beside it."""
    (tmp_path / "mlflow.db").write_bytes(database.read_bytes())
    return studies.write(tmp_path / "s", trials=8)


def runs_of(study):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(place(study, NOWHERE).uri)
    experiment = client.get_experiment_by_name("tuner")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    parents = [r for r in runs if r.data.tags.get("tuner.kind") == "study"]
    children = {int(r.data.tags["tuner.trial"]): r for r in runs if "tuner.trial" in r.data.tags}
    assert len(runs) == len(parents) + len(children), "a trial was logged twice"
    return client, parents, children


def runs_of_store(study):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(place(study, NOWHERE).uri)
    return client.search_runs([client.get_experiment_by_name("tuner").experiment_id])


def record(study, store, finish: bool = True) -> str:
    recorder = Recorder(study, store, env=NOWHERE)
    recorder.start()
    for trial in store.trials():
        recorder.trial_finished(trial.number)
    if finish:
        recorder.study_finished()
    return recorder.close(60)


def test_a_study_is_a_parent_run_with_a_child_per_trial(made):
    study, store = made
    assert record(study, store) == ""
    client, (parent,), children = runs_of(study)
    assert parent.info.status == "FINISHED" and sorted(children) == list(range(8))
    ended_s = max(trial.ended_s for trial in store.trials())
    assert parent.info.end_time == int(ended_s * 1000)  # not when it was sent
    assert {c.data.tags["mlflow.parentRunId"] for c in children.values()} == {parent.info.run_id}
    states = {number: child.info.status for number, child in children.items()}
    assert states == {0: "FINISHED", 1: "FINISHED", 2: "FINISHED", 3: "FINISHED", 4: "FAILED", 5: "KILLED"} | {
        6: "FINISHED",
        7: "FAILED",
    }
    baseline = children[0]
    assert baseline.data.params["max-num-batched-tokens"] == "2048"
    loads = client.get_metric_history(baseline.info.run_id, "load")
    assert [(m.step, m.value) for m in loads] == [(0, 0.5), (1, 1.0), (2, 1.5), (3, 2.0)]
    power = client.get_metric_history(baseline.info.run_id, "system/gpu0_power_w")
    assert len(power) == 30 and power[0].timestamp == int(studies.START_S * 1000)
    assert baseline.inputs.dataset_inputs[0].dataset.name == "conversation"
    artifacts = {a.path for a in client.list_artifacts(baseline.info.run_id)}
    assert {"config.json", "outcome.json", "server.log", "records-1.parquet", "telemetry.parquet"} <= artifacts
    note = parent.data.tags["mlflow.note.content"]
    assert "vllm serve --config best-config.yaml" in note and "| $ per M output tokens |" in note
    assert {"study.yaml"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}


def test_the_lowest_cost_so_far_is_that_of_the_search(made):
    study, store = made
    cheap = studies.step(1.0, study.objective, tokens_per_s=1e6)
    studies.measured(8, (cheap,), store, role="verify")
    studies.measured(9, (studies.step(1.0, study.objective, tokens_per_s=5000),), store, params={"max_num_seqs": 512})
    assert record(study, store) == ""
    client, (parent,), _ = runs_of(study)
    told = client.get_metric_history(parent.info.run_id, "search_best_cost_usd_per_mtok_output")
    costs = [m.value for m in sorted(told, key=lambda m: m.step)]
    assert costs == sorted(costs, reverse=True) and costs[-1] > cheap.metrics["cost_usd_per_mtok_output"]
    assert costs[0] > costs[-1]  # of the first trials alone


@pytest.mark.parametrize("verified", [True, False])
def test_the_recommendation_is_the_reports_and_not_the_cheapest_of_the_search(tmp_path, database, verified):
    (tmp_path / "mlflow.db").write_bytes(database.read_bytes())
    study, store = studies.write(tmp_path / "s", trials=12, verified=verified)
    assert record(study, store) == ""
    _, (parent,), _ = runs_of(study)
    point = recommended(store, study).point
    data = parent.data
    assert data.metrics["recommended_cost_usd_per_mtok_output"] == pytest.approx(point.cost)
    assert data.metrics["recommended_load"] == point.load
    assert data.metrics["recommended_tpot_p99_s"] == pytest.approx(point.latency)
    assert (data.tags["recommended_trial"], data.tags["verified"]) == (str(point.trial), str(verified).lower())
    rows = [line for line in data.tags["mlflow.note.content"].splitlines() if line.endswith("**recommended** |")]
    assert len(rows) == 1 and f"| {point.trial} |" in rows[0]


def test_a_trial_of_another_tuner_is_left_to_that_one_until_the_study_ends(made):
    study, store = made
    studies.measured(8, (studies.step(1.0, study.objective),), store, elsewhere="another-host")
    for finish in (False, True):
        assert record(study, store, finish) == "" and (8 in runs_of(study)[2]) == finish


def test_a_finished_study_of_which_a_file_changed_is_closed_with_it_once_more(made):
    study, store = made
    record(study, store)
    (store.folder / "report.html").write_text("another")
    sync(study, store, env=NOWHERE)
    client, (parent,), _ = runs_of(study)
    assert Path(client.download_artifacts(parent.info.run_id, "report.html")).read_text() == "another"


def test_a_resumed_study_goes_on_in_the_same_parent_and_logs_no_trial_twice(made):
    study, store = made
    assert record(study, store, finish=False) == ""
    _, (parent,), children = runs_of(study)
    assert parent.info.status == "KILLED"  # interrupted: it has not finished
    studies.measured(8, (studies.step(1.0, study.objective),), store)
    assert record(study, store) == ""
    _, (again,), more = runs_of(study)
    assert again.info.run_id == parent.info.run_id and again.info.status == "FINISHED"
    assert sorted(more) == list(range(9))
    assert all(more[number].info.run_id == child.info.run_id for number, child in children.items())


def test_a_finished_study_that_is_opened_again_and_left_stays_finished(made):
    study, store = made
    record(study, store)
    for interrupted in range(2):
        recorder = Recorder(study, store, env=NOWHERE)
        recorder.start()
        if interrupted:  # after something new had ended
            studies.measured(8, (studies.step(1.0, study.objective),), store)
            recorder.trial_finished(8)
        assert recorder.close(60) == ""
        _, (parent,), _ = runs_of(study)
        assert parent.info.status == ("KILLED" if interrupted else "FINISHED")
        assert note_file(store.folder).exists() != bool(interrupted)


def test_an_ablation_ends_the_study_anew_with_what_it_found(tmp_path, database, monkeypatch):
    (tmp_path / "mlflow.db").write_bytes(database.read_bytes())
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record(study, store)

    def minimal(_ready, _store, recorder, _bench, _launches):
        winner = recommended(store, study).point.config
        studies.measured(24, (studies.step(1.0, study.objective),), store, role="ablate")
        recorder.trial_finished(24)
        found = studies.ablation(study, winner, "max_num_batched_tokens")
        write_json(store.folder / "ablation.json", found.to_dict())
        return found

    monkeypatch.setattr(certify, "_session", lambda _folder, work: work(SimpleNamespace(study=study), store, None))
    monkeypatch.setattr("tuner.study.verifying.minimal", minimal)
    assert certify.ablate(store.folder, 12, json=False) == 0
    client, (parent,), children = runs_of(study)
    assert parent.info.status == "FINISHED" and sorted(children) == list(range(25))
    assert "Two flags were superfluous." in parent.data.tags["mlflow.note.content"]
    assert note_file(store.folder).exists()
    assert {"ablation.json", "best-config.yaml"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}


def test_a_damaged_study_folder_is_not_taken_for_an_unreachable_store(made):
    study, store = made
    (store.folder / "trials" / "0003" / "outcome.json").write_text("")
    with pytest.raises(EnvironmentFault, match=r"^\S*trials/0003/outcome\.json: cannot be read"):
        sync(study, store, env=NOWHERE)


def test_a_trial_cut_short_half_way_is_logged_again_whole(made, monkeypatch):
    study, store = made
    with monkeypatch.context() as patch:
        patch.setattr(writer._Connection, "_input", _once_then_fail())
        with pytest.raises(EnvironmentFault, match="killed here"):
            sync(study, store, env=NOWHERE)
    sync(study, store, env=NOWHERE)
    client, (_,), children = runs_of(study)
    assert sorted(children) == list(range(8)) and all(c.info.status != "RUNNING" for c in children.values())
    assert len(client.get_metric_history(children[0].info.run_id, "load")) == 4


def test_a_trial_logged_whole_but_missing_in_the_ledger_is_not_logged_again(made):
    study, store = made
    sync(study, store, env=NOWHERE)
    ledger = Ledger.load(store.folder)
    del ledger.sent(place(study, NOWHERE).uri).trials["3"]
    ledger.save()
    assert unsent(study, store, NOWHERE) == 1
    sync(study, store, env=NOWHERE)
    assert unsent(study, store, NOWHERE) == 0
    assert sorted(runs_of(study)[2]) == list(range(8))


def test_of_a_very_long_log_both_ends_are_logged(made):
    study, store = made
    with (store.folder / "trials" / "0000" / "server.log").open("wb") as log:
        log.write(b"first\n")
        log.truncate(writer.LONG_BYTES)
        log.seek(0, 2)
        log.write(b"\nlast\n")
    sync(study, store, env=NOWHERE)
    client, _, children = runs_of(study)
    logged = Path(client.download_artifacts(children[0].info.run_id, "server.log")).read_bytes()
    assert logged.startswith(b"first\n") and logged.endswith(b"\nlast\n") and len(logged) < writer.LONG_BYTES / 8
    assert (store.folder / "trials" / "0000" / "server.log").stat().st_size > writer.LONG_BYTES


def test_secrets_stay_in_the_study_folder(made):
    study, store = made
    engine = replace(study.engine, command=("serve", "--admin-api-key=adminkey"), args={"api-key": "ARGKEY66"})
    uri = "http://bob:p%40ssword@there"
    study = replace(study, engine=engine, frozen={**study.frozen, "tracking_uri": uri})
    config = study.space.config({}, "m")
    env = {"HF_TOKEN": "hf_abcdef", "MAX_TOKENS": "7", "A_TOKEN": "0"}
    config = replace(config, env=env, flags={"hf-token": "hf_flag", "api-key": "ARGKEY66"})
    place_of = store.start_trial(8, config, {}, started_s=1.0)
    (place_of / "server.log").write_text("INFO token hf_abcdef\nINFO up\n")
    store.end_trial(8, Infeasible("crash", "hf_abcdef hf_flag", "adminkey", "p@ssword"), ended_s=2.0)
    (store.folder / "study.yaml").write_text(f"tracking_uri: {uri}\n")
    note_file(store.folder).write_text("Deploy with ARGKEY66.")
    sync(replace(study, tracking_uri=""), store, env=NOWHERE)
    client, (parent,), children = runs_of(study)
    run = children[8]
    assert run.data.params["env.HF_TOKEN"] == "(secret)" and run.data.params["env.MAX_TOKENS"] == "7"
    assert run.data.tags["cause"] == "crash" and run.data.tags["tuner.trial"] == "8"
    texts = [str(run.data.tags), str(run.data.params), str(parent.data.tags)]
    for which in (run, parent):
        logged = Path(client.download_artifacts(which.info.run_id, ""))
        texts += [path.read_text() for path in logged.iterdir()]
    assert any("INFO up" in text for text in texts) and any("http://bob:(secret)@there" in text for text in texts)
    for secret in ("hf_abcdef", "hf_flag", "ARGKEY66", "adminkey", "ssword"):
        assert not any(secret in text for text in texts), secret


def test_a_password_of_the_tracking_uri_is_shown_nowhere(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=1, tracking_uri=f"http://bob:hunter2@127.0.0.1:{_free_port()}")
    said = record(study, store)
    with pytest.raises(EnvironmentFault, match="was not reached") as error:
        sync(study, store, env=NOWHERE)
    with pytest.raises(UsageError, match="Open that address") as other:
        ui_command(study)
    texts = [said, str(error.value), str(other.value), (store.folder / "events.jsonl").read_text()]
    assert all("bob:***@" in text and "hunter2" not in text for text in (*texts[:3], texts[3]))


@pytest.mark.parametrize("children_too", [True, False])
def test_a_parent_deleted_in_the_ui_is_made_anew(made, children_too):
    study, store = made
    sync(study, store, env=NOWHERE)
    client, (parent,), children = runs_of(study)
    for run in (parent, *(children.values() if children_too else ())):
        client.delete_run(run.info.run_id)
    sync(study, store, env=NOWHERE)
    assert sorted(runs_of(study)[2]) == list(range(8))


def test_a_lost_ledger_finds_the_studys_run_again(made):
    study, store = made
    sync(study, store, env=NOWHERE)
    uid = Ledger.load(store.folder).uid
    (store.folder / "mlflow.json").unlink()
    sync(study, store, env=NOWHERE)
    assert Ledger.load(store.folder).uid == uid
    _, (_,), children = runs_of(study)
    assert sorted(children) == list(range(8))


def test_another_study_in_the_same_folder_is_not_taken_for_the_lost_one(made):
    study, store = made
    sync(study, store, env=NOWHERE)
    shutil.rmtree(store.folder)
    studies.measured(0, (studies.step(1.0, study.objective),), store, params={"max_num_seqs": 64})
    sync(study, store, env=NOWHERE)
    runs = runs_of_store(study)
    assert len([run for run in runs if "tuner.kind" in run.data.tags]) == 2 and len(runs) == 2 + 8 + 1


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"uid":', '{"uid": "x", "stores": {"a": {"foo": 1}}}'])
def test_a_damaged_ledger_is_named(tmp_path: Path, text):
    study, store = studies.write(tmp_path / "s", trials=0)
    (store.folder / "mlflow.json").write_text(text)
    for read in (lambda: ui_page(study, NOWHERE), lambda: sync(study, store, env=NOWHERE)):
        with pytest.raises(EnvironmentFault, match=r"mlflow\.json: cannot be read"):
            read()


def test_a_copied_study_folder_is_a_study_of_its_own(made):
    study, store = made
    sync(study, store, env=NOWHERE)
    shutil.copytree(store.folder, store.folder.with_name("copy"))
    copy = Store(store.folder.with_name("copy"))
    for each, load in ((copy, 1.0), (store, 2.0)):
        studies.measured(8, (studies.step(load, study.objective),), each)
    own = replace(study, folder=str(copy.folder))
    assert sync(own, copy, env=NOWHERE).startswith("9 trial(s)")  # all of them, to a run of its own
    assert sync(study, store, env=NOWHERE).startswith("1 trial(s)")
    runs = runs_of_store(study)
    parents = {run.info.run_id: run.data.tags["tuner.folder"] for run in runs if "tuner.kind" in run.data.tags}
    assert sorted(parents.values()) == [str(copy.folder), str(store.folder)]
    latest = {
        parents[run.data.tags["mlflow.parentRunId"]]: run.data.metrics["load"]
        for run in runs
        if run.data.tags.get("tuner.trial") == "8"
    }
    assert latest == {str(copy.folder): 1.0, str(store.folder): 2.0}


def test_a_moved_study_folder_goes_on_in_its_run(made):
    study, store = made
    sync(study, store, env=NOWHERE)
    moved = Store(store.folder.rename(store.folder.with_name("moved")))
    studies.measured(8, (studies.step(1.0, study.objective),), moved)
    sync(replace(study, folder=str(moved.folder)), moved, env=NOWHERE)
    _, (parent,), children = runs_of(study)
    assert sorted(children) == list(range(9)) and parent.data.tags["tuner.folder"] == str(moved.folder)


@pytest.mark.parametrize(("locked", "status"), [(True, "RUNNING"), (False, "KILLED")])
def test_an_interrupted_study_that_is_sent_later_has_ended(made, locked, status):
    study, store = made
    with (store.folder / ".lock").open("w") as lock:
        if locked:
            fcntl.flock(lock, fcntl.LOCK_EX)
        sync(study, store, env=NOWHERE)
    assert runs_of(study)[1][0].info.status == status


def test_an_unreachable_server_delays_logging_and_raises_nothing(tmp_path: Path):
    uri = f"http://127.0.0.1:{_free_port()}"
    study, store = studies.write(tmp_path / "s", trials=3, tracking_uri=uri)
    left = record(study, store)
    assert "3 trial(s) are not in MLflow" in left and "tuner sync" in left
    assert any(
        event["event"] == "mlflow" and uri.removeprefix("http://") in event["problem"] for event in store.events()
    )
    with pytest.raises(EnvironmentFault, match="was not reached"):
        sync(study, store, env=NOWHERE)


def test_that_mlflow_is_not_reached_is_said_when_it_is_first_met_and_once(tmp_path: Path, monkeypatch):
    study, store = studies.write(tmp_path / "s", trials=1, tracking_uri=f"http://127.0.0.1:{_free_port()}")
    said, tried, met, again = [], [], threading.Event(), threading.Event()

    def flush(*args, **more):
        tried.append(1)
        if len(tried) > 2:
            again.set()
        return writer.flush(*args, **more)

    monkeypatch.setattr(recording, "flush", flush)
    recorder = Recorder(study, store, env=NOWHERE, retry_s=0.01, say=lambda text: (said.append(text), met.set()))
    recorder.start()
    assert met.wait(30)  # before any trial ends
    assert again.wait(30)
    recorder.trial_finished(0)
    assert "1 trial(s) are not in MLflow" in recorder.close(60)
    assert len(said) == 1 and "no MLflow server at 127.0.0.1" in said[0]


def test_a_store_has_one_writer_at_a_time(made, monkeypatch):
    """Of runs that twenty threads made at once in SQLite eleven were lost."""
    study, store = made
    make, writing = writer._make, threading.Event()
    monkeypatch.setattr(writer, "_make", lambda place: (writing.set(), make(place)))
    with place(study, NOWHERE).lock.open("w") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        mine = pool.submit(sync, study, store, env=NOWHERE)
        assert not writing.wait(0.5)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert mine.result().startswith("8 trial(s) logged")


def test_a_writer_that_stands_still_is_not_waited_for_without_end_or_word(made, monkeypatch):
    study, store = made
    monkeypatch.setattr(writer, "BUSY_S", 0.3)
    with place(study, NOWHERE).lock.open("w") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        mine = pool.submit(sync, study, store, env=NOWHERE)
        try:
            with pytest.raises(EnvironmentFault, match="another tuner has written to it"):
                mine.result(20)
        finally:
            fcntl.flock(other, fcntl.LOCK_UN)


def test_nothing_that_mlflow_does_reaches_the_study(made, monkeypatch):
    study, store = made

    def explode(*_args, **_kwargs):
        raise MemoryError("the disk is full of mice")

    monkeypatch.setattr("tuner.record.mlflow.flush", explode)
    assert "full of mice" in record(study, store)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_study_folder_that_is_gone_raises_nothing_either(made):
    study, store = made
    recorder = Recorder(study, store, env=NOWHERE)
    recorder.start()
    store.folder.rename(store.folder.with_name("gone"))
    recorder.trial_finished(8)
    recorder.study_finished()
    recorder.close(60)


def test_an_error_of_the_database_is_a_problem_that_is_noted_not_a_traceback(made, capsys):
    study, store = made
    sync(study, store, env=NOWHERE)
    with sqlite3.connect(store.folder.parent / "mlflow.db") as database:
        database.execute("DROP TABLE runs")
    studies.measured(8, (studies.step(1.0, study.objective),), store)
    assert "1 trial(s) are not in MLflow" in record(study, store)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_that_a_kill_left_half_made_is_made_anew(tmp_path: Path, database: Path, monkeypatch):
    from mlflow.store.tracking import sqlalchemy_store

    study, store = studies.write(tmp_path / "s", trials=1)

    class Killed(sqlalchemy_store.SqlAlchemyStore):
        def __init__(self, uri: str, root: str) -> None:
            sqlite_file(uri).write_bytes(database.read_bytes()[:5000])
            raise KeyboardInterrupt

    class Quick(sqlalchemy_store.SqlAlchemyStore):
        def __init__(self, uri: str, root: str) -> None:
            if not sqlite_file(uri).exists():
                shutil.copy(database, sqlite_file(uri))
            super().__init__(uri, root)

    with monkeypatch.context() as killed:
        killed.setattr(sqlalchemy_store, "SqlAlchemyStore", Killed)
        with pytest.raises(KeyboardInterrupt):
            sync(study, store, env=NOWHERE)
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Quick)
    sync(study, store, env=NOWHERE)
    assert len(runs_of(study)[2]) == 1
    assert not list(tmp_path.glob(".mlflow.db.half*"))


def test_of_a_store_without_a_run_it_is_said_that_it_may_be_moved_away(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=1)
    with sqlite3.connect(tmp_path / "mlflow.db") as half:  # of MLflow's hundreds of commits the first few
        half.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    with pytest.raises(EnvironmentFault) as error:
        sync(study, store, env=NOWHERE)
    assert "move it away (no run is in it)" in str(error.value)


def test_what_an_absent_server_missed_is_sent_when_it_is_back(tmp_path: Path, database: Path, capfd):
    port = _free_port()
    study, store = studies.write(tmp_path / "s", trials=3, tracking_uri=f"http://127.0.0.1:{port}")
    assert record(study, store) != ""
    (tmp_path / "server.db").write_bytes(database.read_bytes())
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    words += ["--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*words, "--workers", "1"], stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        _until_open(port, server)
        capfd.readouterr()
        assert sync(study, store, env=NOWHERE).startswith("3 trial(s) logged")
        assert capfd.readouterr().out == ""  # nothing of MLflow's own
        assert "every trial already" in sync(study, store, env=NOWHERE)
        _, (parent,), children = runs_of(study)
        assert parent.info.status == "FINISHED" and sorted(children) == [0, 1, 2]
    finally:
        os.killpg(server.pid, 9)
        server.wait(30)


@pytest.mark.parametrize("name", ["odd name", "odd? {1} #2", "50%20"])
def test_an_odd_folder_has_no_other_beside_it_whose_name_is_how_a_url_spells_it(tmp_path: Path, database: Path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mlflow.db").write_bytes(database.read_bytes())
    study, store = studies.write(tmp_path / name / "s", trials=1)
    sync(study, store, env=NOWHERE)
    where = place(study, NOWHERE)
    assert where.given in ui_command(study, 5099, NOWHERE)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(where.given)
    experiment = client.get_experiment_by_name("tuner")
    assert experiment and len(client.search_runs([experiment.experiment_id])) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_ui_is_served_on_the_local_address_only(made):
    study, store = made
    for where in (study, store.folder, store.folder.parent):
        command = ui_command(where, 5099, NOWHERE)
        assert f"sqlite:///{store.folder.parent / 'mlflow.db'}" in command
        assert command[command.index("--host") + 1] == "127.0.0.1" and "5099" in command


def test_the_ui_opens_on_the_studys_own_run(made):
    study, store = made
    assert ui_page(study, NOWHERE) == "/"
    sync(study, store, env=NOWHERE)
    _, (parent,), _ = runs_of(study)
    assert ui_page(study, NOWHERE) == f"/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"


def test_a_ui_without_a_store_or_with_a_server_says_what_to_do(tmp_path: Path):
    with pytest.raises(UsageError, match=rf"there is no {tmp_path}/reports/mlflow\.db"):  # where a study would make it
        ui_command(tmp_path / "reports")
    with pytest.raises(UsageError, match="Open that address"):
        ui_command(studies.study(tmp_path / "s", tracking_uri="http://127.0.0.1:5000"))
    with pytest.raises(UsageError, match="studies are logged to http:"):
        ui_command(tmp_path / "reports", env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:5001"})


def test_the_studys_own_store_comes_before_the_environments(tmp_path: Path):
    env = {"MLFLOW_TRACKING_URI": "http://there:5000"}
    assert place(studies.study(tmp_path / "s"), env).uri == "http://there:5000"
    assert place(studies.study(tmp_path / "s", tracking_uri="http://here:5000"), env).uri == "http://here:5000"
    assert place(studies.study(tmp_path / "s"), {}).uri == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_importing_the_recorder_does_not_import_mlflow():
    code = "import sys, tuner.record.mlflow; print('mlflow' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def _once_then_fail():
    """Lets the parent and the first child have their dataset, and dies in the second child."""
    calls = []

    def stand_in(_self, _run_id):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("killed here")

    return stand_in


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _until_open(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError("the MLflow server ended")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the MLflow server did not open its port")


def test_a_port_that_is_none_is_said_by_the_uri_it_stands_in():
    where = Place("http://localhost:abc", "", "tuner", Path("lock"))
    with pytest.raises(UsageError, match="http://localhost:abc: Port could not be cast"):
        _ = where.server
