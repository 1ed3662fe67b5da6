"""llama.cpp's own server through the engine ``command``: the shipped space and example, and what its log says.

Needs ``TUNER_LLAMA_SERVER``, a ``llama-server``, and the GGUF files that ``examples/make_gguf.py`` writes.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tuner.engines.command import CommandEngine
from tuner.engines.conformance import EngineConformance
from tuner.engines.protocol import Engine
from tuner.space.config import ServingConfig, Value
from tuner.spec import studyfile
from tuner.spec.text import read

ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("TUNER_LLAMA_SERVER", "")
MODEL = os.environ.get("TUNER_TEST_MODEL") or str(ROOT / "models/tiny-qwen3")
EXAMPLE = ROOT / "examples/llama-cpp.yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVER, reason="no llama.cpp: set TUNER_LLAMA_SERVER to a llama-server"),
    pytest.mark.skipif(
        not Path(MODEL, "model-f16.gguf").exists(),
        reason="no small GGUF model: set TUNER_TEST_MODEL or run examples/make_model.py and examples/make_gguf.py",
    ),
]


def engine() -> CommandEngine:
    """As the example starts it, with the binary that is tested."""
    said = read(EXAMPLE, "study").data["engine"]
    return CommandEngine(command=[SERVER, *said["command"][1:]], host_alone=False, **said["options"])


def config(**more: Value | None) -> ServingConfig:
    args = read(EXAMPLE, "study").data["engine"]["args"]
    flags: dict[str, Value | None] = {**args, "kv-unified": None, "threads": 1}  # several spin where cores are busy
    return ServingConfig(MODEL, {}, flags | {name.replace("_", "-"): value for name, value in more.items()})


def test_its_help_has_every_flag_of_the_shipped_space_with_the_default_that_it_says() -> None:
    told = subprocess.run([SERVER, "--help"], capture_output=True, text=True, check=True).stdout
    told = re.sub(r"\n {20,}", " ", told)  # what a flag means, on its line
    space = studyfile.load(EXAMPLE).space
    for p in space.parameters:
        for flag in {flag for emission in p.emissions for flag in emission.flags} - {"quant"}:
            line = next((line for line in told.splitlines() if re.search(rf"--{flag}\b", line)), "")
            assert line, flag
            default = "-1, -1 = auto" if flag == "parallel" else str(p.default)  # auto is four: its log says so
            assert re.search(rf"default: '?{re.escape(default)}\b", line), line
    assert all(f"--{flag}" in told for flag in config().flags)


class TestLlamaCpp(EngineConformance):
    def engine(self) -> Engine:
        return engine()

    def config(self) -> ServingConfig:
        return config()

    def bad_config(self) -> ServingConfig:
        return config(flash_attn="off", cache_type_v="q8_0")
