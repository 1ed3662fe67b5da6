"""What users, servers and functions say is printed as it is: it may look like markup or emoji."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests import studies
from tuner.cli import app, doctor
from tuner.cli.live import View
from tuner.spec.study import EngineSpec

ODD = "list[int] [/bold] :warning:"
STUDY = f"""\
name: s
model: m
engine: {{kind: function, target: "serve:measure"}}
hardware: {{gpu: L4, gpus: 1}}
search_space:
  name: batches
  engine: function
  parameters: {{batch: {{flag: batch, values: [8, 16], default: 8, trades: "{ODD}"}}}}
  rules: [{{deny: {{batch: 16}}, because: "{ODD}"}}]
objective: {{name: o, latency: tpot_p99, slo: {{tpot_p99: 50ms}}}}
load: {{ladder: [1, 2]}}
budget: {{launches: 1, verify_share: 0}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `tuner` on a study full of odd words; says what it printed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(STUDY)
    (tmp_path / "serve.py").write_text(f"import tuner\ndef measure(params, load): raise tuner.Infeasible('{ODD}')\n")

    def tuner(*words):
        monkeypatch.setattr(sys, "argv", ["tuner", *words])
        with pytest.raises(SystemExit):
            app.main()
        sys.modules.pop("serve", None)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.out

    return tuner


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_study_files_words_are_printed_as_they_are(run, command):
    assert f"1 refused: {ODD}" in run(command, "s.yaml")
    if command == "check":
        assert ODD in run(command, "s.yaml").partition("refused")[0]  # the table's


def test_a_finding_of_the_machine_is_printed_as_it_is(run, monkeypatch):
    for name in ("gpu", "memory", "disk", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding("x", "bad", ODD, ODD))
    monkeypatch.setattr(doctor, "engines", lambda: [doctor.Finding("x", "bad", ODD, ODD)])
    assert run("doctor").count(ODD) == 10


def test_what_a_function_says_is_printed_as_it_is(run):
    run("tune", "s.yaml", "--plain")
    assert ODD in run("show", "s.yaml", "0")


def test_the_live_view_prints_what_a_server_says_as_it_is_but_for_secrets(tmp_path, capsys):
    study = replace(studies.study(tmp_path), name=ODD, engine=EngineSpec("vllm", env={"HF_TOKEN": "hf_abc"}))
    for plain in (False, True):
        with View(study, plain=plain) as view:
            view.on_event("say", {"text": f"{ODD} hf_abc"})
        assert f"{ODD} (secret)" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "code"), [("s.yaml", 0), ("none.yaml", 2)])
def test_a_reader_that_has_read_enough_is_no_error(run, tmp_path, file, code):
    command = f"{sys.executable} -m tuner check {file} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # what waits till the exit
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(("words", "code"), [("show s.yaml 0 --json", 0), ("tune s.yaml --plain", 130)])
def test_a_reader_that_goes_in_the_middle_ends_a_view_well_and_a_study_as_an_interrupt_does(run, tmp_path, words, code):
    run("tune", "s.yaml", "--plain")
    command = f"{sys.executable} -u -m tuner {words} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
