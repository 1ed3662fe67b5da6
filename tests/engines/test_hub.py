"""A model that only a hub has: what a study reads of it is fetched with it, its weights before the first launch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.engines.fakehub import Hub, serving
from tuner.engines.hub import _weights

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
STUDY = """
model: org/tiny
engine: {kind: vllm}
hardware: {gpu: H100-SXM, gpus: 1}
trace: trace.csv
"""
WHY = """
from pathlib import Path
from tuner.engines import hub
from tuner.spec import studyfile
from tuner.study import session
ready = session.prepare(studyfile.load(Path("study.yaml")), launching=False)
print(ready.no_model or (ready.study.space.facts["max_model_len"], hub.commit(ready.study.model)))
"""
BRING = """
import threading
from pathlib import Path
from tuner.engines import hub
from tuner.spec import studyfile
hub.bring(studyfile.load(Path("study.yaml")), print, threading.Event(), shown=False)
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    repo = tmp_path / "repo"
    (repo / "original").mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps(CONFIG))
    (repo / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    for name in ("README.md", "pytorch_model.bin", "original/consolidated.pth", "original/params.json", *SHARDS):
        (repo / name).write_text(name)
    index = {"weight_map": dict(zip("abc", [*SHARDS, SHARDS[0]], strict=True))}
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "study.yaml").write_text(STUDY)
    lines = [f"{second},50,20" for second in range(600)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return tmp_path


@pytest.fixture
def hub(workplace: Path) -> Iterator[Hub]:
    with serving({"org/tiny": workplace / "repo"}, gated=frozenset({"org/gated"})) as found:
        yield found


def environment(workplace: Path, hub: Hub | None, **more: str) -> dict[str, str]:
    port = hub.server_port if hub else 9
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**ours, "HF_HOME": str(workplace / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{port}", **more}


def run(workplace: Path, hub: Hub | None, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment(workplace, hub, **more)
    return subprocess.run([sys.executable, *words], cwd=workplace, env=env, capture_output=True, text=True, timeout=300)


def room_for(size: int) -> str:
    return f"import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 9, {size})"


def unpredicted(workplace: Path, hub: Hub | None, **more: str) -> str:
    """Why there is no analytic model of the study; where there is one, the longest request and the model's commit."""
    done = run(workplace, hub, "-c", WHY, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_study_reads_configuration_and_tokenizer_and_no_weights(workplace: Path, hub: Hub) -> None:
    known = "(2048, '0123456789ab')"
    assert unpredicted(workplace, hub) == known
    assert sorted(hub.asked) == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert unpredicted(workplace, None) == known  # it is here now


@pytest.mark.parametrize(
    ("model", "env", "said"),
    [
        ("org/gated", {}, "and the hub gives it to those alone who accepted its licence there and set HF_TOKEN"),
        ("org/tinny", {}, "and the hub has no such model, or not for everybody (HF_TOKEN says who asks)"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "org/tiny has no config.json on this machine"),
    ],
)
def test_why_nothing_is_predicted_of_a_model_is_said(
    workplace: Path, hub: Hub, model: str, env: dict[str, str], said: str
) -> None:
    (workplace / "study.yaml").write_text(STUDY.replace("org/tiny", model))
    assert unpredicted(workplace, hub, **env).endswith(said)
    assert not hub.asked


def test_a_hub_that_does_not_answer_is_no_error(workplace: Path) -> None:
    why = unpredicted(workplace, None)
    assert why.startswith("org/tiny has no config.json on this machine, and the hub cannot be asked (")


def test_weights_are_downloaded_before_a_launch_those_alone_that_the_engine_loads(workplace: Path, hub: Hub) -> None:
    done = run(workplace, hub, "-c", BRING)
    assert done.returncode == 0 and done.stdout == (
        "org/tiny is not on this disk: its weights are downloaded first, 0.0 GB.\n"
    )
    assert sorted(name for name in hub.asked if not name.endswith(".json")) == SHARDS
    calls = hub.calls
    done = run(workplace, hub, "-c", BRING)
    assert (done.returncode, done.stdout, hub.calls) == (0, "", calls)


def test_a_study_that_was_begun_elsewhere_brings_what_it_reads_too(workplace: Path, hub: Hub) -> None:
    elsewhere = "import shutil; study = studyfile.load(Path('study.yaml')); shutil.rmtree('hf'); hub.read.cache_clear()"
    code = BRING.replace('hub.bring(studyfile.load(Path("study.yaml"))', f"{elsewhere}\nhub.bring(study")
    assert run(workplace, hub, "-c", code).returncode == 0
    assert hub.asked.count("config.json") == hub.asked.count("tokenizer.json") == 2


def test_what_is_left_of_a_download_is_brought(workplace: Path, hub: Hub) -> None:
    run(workplace, hub, "-c", BRING)
    (second,) = (workplace / "hf").rglob(SHARDS[1])
    second.unlink()
    hub.asked.clear()
    done = run(workplace, hub, "-c", room_for(len(SHARDS[1])) + BRING)
    assert "downloaded first" in done.stdout, done.stderr
    assert second.read_text() == SHARDS[1] and SHARDS[0] not in hub.asked


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{kind: vllm}", "{kind: vllm, args: {load-format: dummy}}"),
        ("{kind: vllm}", "{kind: vllm, args: {download-dir: /data}}"),
        ("{kind: vllm}", "{kind: vllm, env: {HF_HOME: /data}}"),
        ("{kind: vllm}", "{kind: vllm, command: docker run vllm}"),
        ("{kind: vllm}", "{kind: emulator}"),
        ("trace.csv", "trace.csv\nexecutor: ray"),
    ],
)
def test_weights_that_servers_take_from_elsewhere_are_left_to_them(
    workplace: Path, hub: Hub, old: str, new: str
) -> None:
    (workplace / "study.yaml").write_text(STUDY.replace(old, new))
    done = run(workplace, hub, "-c", BRING)
    assert (done.returncode, done.stdout) == (0, "") and not {*SHARDS} & {*hub.asked}


@pytest.mark.parametrize(
    ("kind", "names", "loaded"),
    [
        ("vllm", ["a.safetensors", "original/b.safetensors", "c.bin"], ["a.safetensors"]),
        ("vllm", ["a.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]),
        ("sglang", ["a.safetensors", "onnx/b.bin"], ["a.safetensors"]),
        ("sglang", ["pytorch_model.bin", "training_args.json"], ["pytorch_model.bin"]),
        ("vllm", ["model.gguf"], []),
    ],
)
def test_the_files_that_an_engine_loads(kind: str, names: list[str], loaded: list[str]) -> None:
    study = SimpleNamespace(model="org/tiny", engine=SimpleNamespace(kind=kind))
    assert _weights(study, names) == loaded  # type: ignore[arg-type]


def test_a_disk_without_room_is_told_before_the_download(workplace: Path, hub: Hub) -> None:
    done = run(workplace, hub, "-c", room_for(len("".join(SHARDS)) - 1) + BRING)
    assert "the weights of org/tiny take 0.0 GB, and " in done.stderr and not {*SHARDS} & {*hub.asked}


def test_weights_that_cannot_be_had_are_left_to_the_server(workplace: Path, hub: Hub) -> None:
    hub.refuses = frozenset(SHARDS)
    done = run(workplace, hub, "-c", BRING)
    assert done.returncode == 0
    assert re.search(r"^It could not be downloaded \(.+\): the first server tries by itself\.$", done.stdout, re.M)


def test_an_interrupt_ends_a_download(workplace: Path, hub: Hub) -> None:
    hub.holds = frozenset(SHARDS)
    words = [sys.executable, "-m", "tuner", "tune", "study.yaml"]
    env = environment(workplace, hub)
    with subprocess.Popen(words, cwd=workplace, env=env, stderr=subprocess.PIPE, text=True) as command:
        try:
            while not {*SHARDS} & {*hub.asked}:
                assert command.poll() is None
                time.sleep(0.1)
            downloading = psutil.Process(command.pid).children()
            command.send_signal(signal.SIGINT)
            _, said = command.communicate(timeout=30)
        finally:
            command.kill()
    assert command.returncode == 130 and "The download is ended; files that are whole are kept.\n" in said
    assert downloading and not psutil.wait_procs(downloading, timeout=30)[1]
