"""What the machine does to a study (full, busy and damaged files): one clear line, and the study goes on."""

import errno
import shutil
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from tuner.cli import app
from tuner.study import session
from tuner.study.store import Store

TRACE = Path(__file__).parents[2] / "examples" / "traces" / "conversation-small.jsonl"
STUDY = f"""\
name: s
model: m
engine: {{kind: function, target: "serve:measure"}}
hardware: {{gpu: L4, gpus: 1}}
search_space:
  name: batches
  engine: function
  parameters: {{batch: {{flag: batch, values: [8, 16, 32, 64], default: 8}}}}
objective: {{name: o, latency: tpot_p99, slo: {{tpot_p99: 50ms}}}}
trace: {{file: {TRACE}, window: 20s}}
load: {{ladder: [1, 2]}}
budget: {{launches: 3, verify_share: 0}}
sampler: random
"""
SERVE = """\
def measure(params, load):
    return {"tpot_p99_s": 0.001 * params["batch"] ** 0.5 * load, "output_tokens_per_s": params["batch"] * load}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "s.yaml").write_text(STUDY)
    (folder / "serve.py").write_text(SERVE)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch, capsys):
    """Runs `tuner` in a folder with a study of three trials; says the exit code, and the last line on stderr."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def tuner(*words):
        monkeypatch.setattr(sys, "argv", ["tuner", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return stop.value.code, said.strip().splitlines()[-1:]

    if not (finished / "reports").exists():
        monkeypatch.chdir(finished)
        assert tuner("tune", "s.yaml", "--plain")[0] == 0
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tuner


def more_launches():
    text = Path("s.yaml").read_text()
    Path("s.yaml").write_text(text.replace("launches: 3", "launches: 4"))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["tune", "s.yaml", "--reports", "s.yaml"], "s.yaml/s"),
        (["tune", "s.yaml", "--name", "n" * 300], "n" * 300),
        (["report", "reports/s", "--out", "reports"], "reports"),
        (["report", "reports/s", "--out", "."], "."),
        (["export", "reports/s", "--out", "s.yaml"], "s.yaml"),
        (["init", "s.yaml/z.yaml"], "s.yaml"),
    ],
)
def test_a_path_that_cannot_be_is_bad_usage(run, words, names):
    code, (line,) = run(*words)
    assert code == 2
    assert line.startswith("tuner: ") and f"{names}: " in line and line.endswith("Give another path")


def test_a_machine_that_cannot_write_is_an_environment_fault_that_names_the_file(run, monkeypatch):
    def fail(number, strerror):
        def end(_store, number_of_trial, *_told, **_notes):
            raise OSError(number, strerror, f"trials/{number_of_trial}")

        return end

    more_launches()
    for number, says in ((errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "end_trial", fail(number, says))
            code, (line,) = run("tune", "s.yaml", "--plain")
        assert code == 4
        again = "Mend that and run the same command again: every outcome that was written is kept"
        assert line == f"tuner: trials/3: {says}. {again}"
    assert run("tune", "s.yaml", "--plain")[0] == 0
    assert len(Store(Path("reports/s")).trials()) == 4


def test_a_full_disk_is_told_with_the_file_that_it_met(run, monkeypatch):
    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    more_launches()
    monkeypatch.setattr("tuner.study.store.os.fsync", full)
    code, (line,) = run("tune", "s.yaml", "--plain")
    assert code == 4
    assert "reports/s/trials/0003/config.json: No space left on device. " in line


def test_a_study_folder_deleted_in_mid_run_is_one_line_and_leaves_no_half_trial(run):
    more_launches()
    with Path("serve.py").open("a") as file:
        file.write("\nimport shutil\n_measure = measure\n")
        file.write("def measure(*given):\n    shutil.rmtree('reports/s', True)\n    return _measure(*given)\n")
    sys.modules.pop("serve", None)
    code, (line,) = run("tune", "s.yaml", "--plain")
    sys.modules.pop("serve", None)
    assert code == 4
    assert "reports/s/trials/0003/outcome.json: No such file or directory. " in line
    assert not Path("reports/s/trials").exists()


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def broken(**_):
        raise KeyError("ours")

    monkeypatch.setattr(app, "app", broken)
    with pytest.raises(KeyError, match="ours"):
        app.main()


def test_a_shared_database_that_fails_is_one_line_wherever_it_is_met(monkeypatch, capsys):
    import sqlalchemy.exc

    def broken(**_):
        raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection\nunexpectedly"))

    monkeypatch.setattr(app, "app", broken)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 4
    said = capsys.readouterr().err
    assert said == "tuner: server closed the connection. Mend that and run the same command again\n"


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_a_damaged_ledger_is_moved_away_and_the_study_goes_on_with_its_trials(run, damage):
    more_launches()
    ledger = Path("reports/s/study.db")
    whole = ledger.read_bytes()
    ledger.write_bytes(b"no database at all\n" * 200 if damage == "garbage" else whole[: len(whole) // 2])
    code, (line,) = run("tune", "s.yaml", "--plain")
    assert code == 4
    assert line.startswith("tuner: reports/s/study.db: ")
    assert line.endswith(". Move that file away and run the same command again: the trials are kept")
    ledger.rename("study.db.damaged")
    assert run("tune", "s.yaml", "--plain")[0] == 0
    assert [trial.number for trial in Store(Path("reports/s")).trials()] == [0, 1, 2, 3]


def test_a_ledger_that_stays_busy_is_one_line_and_a_ledger_busy_for_a_while_is_waited_for(run, monkeypatch):
    assert session.BUSY_S >= 60
    more_launches()
    other = sqlite3.connect("reports/s/study.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    with monkeypatch.context() as patch:
        patch.setattr(session, "BUSY_S", 0.2)
        code, (line,) = run("tune", "s.yaml", "--plain")
    assert code == 4
    assert line.startswith("tuner: reports/s/study.db: database is locked. ") and "everything measured is kept" in line
    let_go = threading.Timer(6, other.rollback)  # longer than SQLite waits by itself
    let_go.start()
    assert run("tune", "s.yaml", "--plain")[0] == 0
    let_go.join()
    assert len(Store(Path("reports/s")).trials()) == 4


def test_copies_and_other_things_beside_the_trials_are_passed_over(run):
    more_launches()
    trials = Path("reports/s/trials")
    for name in ("0002.bak", "0002 (copy)", "00002", "2"):
        shutil.copytree(trials / "0002", trials / name)
    (trials / "0007").write_text("a file")
    for words in (["front"], ["report"], ["show"]):
        assert run(*words, "reports/s", *(["2"] if words == ["show"] else []))[0] == 0
    assert run("tune", "s.yaml", "--plain")[0] == 0
    assert [trial.number for trial in Store(Path("reports/s")).trials()] == [0, 1, 2, 3]
    assert (trials / "0007").read_text() == "a file"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trials/0002/outcome.json", ""),
        ("trials/0002/outcome.json", '{"outcome": {"kind": "measured", "ste'),
        ("trials/0002/outcome.json", "{}"),
        ("trials/0002/outcome.json", "[]"),
        ("trials/0002/config.json", ""),
        ("trials/0002/config.json", None),
        ("verify.json", ""),
        ("verify.json", b"\xff\xfe{}"),
        ("verify.json", '{"arms": 5, "choice": "default"}'),
    ],
)
def test_a_damaged_file_is_named_and_the_study_goes_on_without_it(run, name, text):
    damaged = Path("reports/s") / name
    damaged.unlink(missing_ok=True)
    if text is not None:
        damaged.write_bytes(text if isinstance(text, bytes) else text.encode())
    trial = damaged.parent if "trials" in name else damaged
    for words in (["front", "reports/s"], ["report", "reports/s"], ["tune", "s.yaml", "--plain"]):
        code, (line,) = run(*words)
        assert code == 4
        assert line.startswith(f"tuner: {trial}") and ": cannot be read (" in line
        assert line.endswith(" away and run the command again")
    trial.rename("moved")
    assert run("tune", "s.yaml", "--plain")[0] == 0
    assert len(Store(Path("reports/s")).trials()) == 3


def test_a_damaged_ablation_is_named(run):
    from tuner.cli.read import opened
    from tuner.errors import EnvironmentFault
    from tuner.pareto.recommend import ablation

    store = Store(Path("reports/s"))
    (store.folder / "ablation.json").write_text("")
    with pytest.raises(EnvironmentFault, match=r"ablation\.json: cannot be read \(.*\)\. Move it away"):
        ablation(store, opened(Path("reports/s"))[0], store.trials()[0].config)


def test_lines_that_cannot_be_read_are_passed_over(run):
    store = Store(Path("reports/s"))
    store.refuse({"batch": 8}, "too small")
    before = store.refused()
    with (store.folder / "refused.jsonl").open("ab") as file:
        file.write(b'{"params": {"ba\n\xff\xfe\x00\n7\n[]\n{"reason": "of nothing"}\n')
    store.refuse({"batch": 16}, "too small, too")
    assert [row["reason"] for row in store.refused()] == [row["reason"] for row in before] + ["too small, too"]
    more_launches()
    assert run("tune", "s.yaml", "--plain")[0] == 0
    assert run("report", "reports/s")[0] == 0


def test_the_outcome_of_a_trial_is_never_written_without_its_beginning(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(FileNotFoundError):
        store.end_trial(0, outcome())
    assert not (tmp_path / "trials").exists()


def outcome():
    from tuner.study.outcome import Aborted

    return Aborted("interrupted")


def test_a_timeout_of_ours_is_no_fault_of_the_machine():
    assert app._fault(TimeoutError()) is None
    assert app._fault(OSError(errno.ENOSPC, "No space left on device", "x")).exit_code == 4
