"""The exported files, read by the tools that will read them: Kubernetes' own schemas, and Docker Compose."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests import studies
from tuner.export import containers
from tuner.export.deployment import Deployment, deployment
from tuner.export.vllm import config_text, env_text
from tuner.study.store import Store

SPECULATION = '{"method": "eagle3", "model": "org/draft$x", "num_speculative_tokens": 4}'
SHAPES = {
    "the default": {"flags": {}},
    "tensor parallel": {"flags": {"tensor-parallel-size": 4}, "gpus": 4},
    "data parallel": {"flags": {"data-parallel-size": 2, "max-num-seqs": 64}, "gpus": 2},
    "JSON and switches": {"flags": {"speculative-config": SPECULATION, "kv-cache-dtype": "fp8", "enforce-eager": None}},
    "odd variables": {"env": {"A": 'it\'s $HOME $(HOME) ${X} "1e3"', "B": "on", "C": "", "D": "a\nb"}},
    "a folder": {"model": "/models/My Model$(A):v1"},
    "a CPU server": {"gpus": 0, "version": "0.32.0+cpu", "env": {"VLLM_CPU_OMP_THREADS_BIND": "0-7|8-15"}},
    "a slow start": {"boot_s": 400.0},
}


@pytest.fixture
def plain(tmp_path: Path) -> Deployment:
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, studies.objective()),), store)
    return deployment(store, studies.study(tmp_path / "s"))


@pytest.mark.parametrize("shape", SHAPES)
def test_kubernetes_own_schemas_take_the_objects_and_know_every_key(plain, shape):
    validator = pytest.importorskip("kubernetes_validate", reason="a dev dependency: pip install -e '.[dev]'")
    text = containers.kubernetes(replace(plain, **SHAPES[shape]))
    for item in yaml.safe_load_all(text):
        validator.validate(item, validator.latest_version(), strict=True)


def compose_command() -> list[str]:
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            said = subprocess.run([*words, "version", "--short"], capture_output=True, text=True).stdout
            found = tuple(map(int, re.findall(r"\d+", said)[:3]))
            if found >= (2, 23, 1):  # the first with a file's content in `configs`
                return words
    pytest.skip("no Docker Compose 2.23.1 or newer here (it needs no daemon for this)")


def composed(text: str, folder: Path, *words: str) -> str:
    (folder / "compose.yaml").write_text(text)
    env = {"HOME": "/home/me", "PATH": "/usr/bin:/bin:" + str(Path(shutil.which(compose_command()[0]) or "").parent)}
    done = subprocess.run(
        [*compose_command(), "-p", "p", "-f", "compose.yaml", "config", *words],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("shape", SHAPES)
def test_docker_compose_reads_what_was_written(plain, tmp_path, shape):
    what = replace(plain, **SHAPES[shape])
    read = json.loads(composed(containers.compose(what), tmp_path, "--format", "json"))
    (service,) = read["services"].values()
    # `config` writes a dollar as two, for its output to be read again
    assert read["configs"]["serving"]["content"].replace("$$", "$") == config_text(what)
    given = {name: value.replace("$$", "$") for name, value in service["environment"].items()}
    assert given.items() >= what.env.items() and given["VLLM_API_KEY"] == ""
    assert service["entrypoint"][3] == service["configs"][0]["target"]
    mount = service["volumes"][0]["source"].replace("$$", "$")
    assert mount == (what.model if what.local_model else "/home/me/.cache/huggingface")


def test_another_configuration_replaces_the_container(plain, tmp_path):
    """Compose makes a container anew where its service's hash has changed, in which a config's content is not."""
    first, again = (composed(containers.compose(plain), tmp_path, "--hash", "*") for _ in range(2))
    other = composed(containers.compose(replace(plain, flags={"max-num-seqs": 64})), tmp_path, "--hash", "*")
    assert first == again != other


def test_the_environment_is_read_alike_by_a_shell_and_by_compose(plain, tmp_path):
    env = {"A": 'it\'s $HOME "x" \\n', "B": "0|1", "C": "a 'b'\nc", "D": "$HOME \\", "E": ""}
    (tmp_path / "best-config.env").write_text(env_text(replace(plain, env=env)))
    script = "set -a; . ./best-config.env; set +a; env -0"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert dict(line.split("=", 1) for line in done.stdout.split("\0") if line).items() >= env.items()
    text = "services: {a: {image: x, env_file: best-config.env}}"
    read = json.loads(composed(text, tmp_path, "--format", "json"))["services"]["a"]["environment"]
    assert {name: value.replace("$$", "$") for name, value in read.items()} == env
