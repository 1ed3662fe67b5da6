"""Every engine keeps the contract: the suite that ships with the product, run on all that can run here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import real
from tests.engines.conftest import LLAMA_8B
from tuner.engines.command import CommandEngine
from tuner.engines.conformance import EngineConformance
from tuner.engines.emulator import EmulatorEngine
from tuner.engines.function import FunctionEngine
from tuner.engines.protocol import Engine
from tuner.server.gpu import Gpus
from tuner.space.config import ServingConfig
from tuner.spec.facts import of_machine

ROOT = Path(__file__).parents[2]


class _OnEmulatedModel(EngineConformance):
    @pytest.fixture(autouse=True)
    def _model(self, tmp_path: Path) -> None:
        self.model = tmp_path / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(LLAMA_8B))

    def config(self) -> ServingConfig:
        return ServingConfig(str(self.model), {}, {"max-model-len": 4096})

    def bad_config(self) -> ServingConfig | None:
        return ServingConfig(str(self.model), {}, {"max-num-batched-tokens": 64, "max-num-seqs": 256})


class TestEmulator(_OnEmulatedModel):
    def engine(self) -> Engine:
        return EmulatorEngine(boot_scale=0)


class TestEmulatorFiveTimesFaster(_OnEmulatedModel):
    one_launch = True

    def engine(self) -> Engine:
        return EmulatorEngine(time_scale=5, boot_scale=0)


class TestCommandWithTheEmulatorsProcess(_OnEmulatedModel):
    def engine(self) -> Engine:
        words = [sys.executable, "-m", "tuner.engines.emulator", "--model", "{model}", "--port", "{port}"]
        words += ["--host", "{host}", "--served-model-name", "{served}", "--api-key", "{api_key}", "{flags}"]
        words += ["--emulator", '{"boot_scale": 0}']
        return CommandEngine(command=words, env={"PYTHONPATH": str(ROOT)}, host_alone=False, shares_port=True)


def test_the_suite_says_how_it_is_run():
    done = subprocess.run([sys.executable, "-m", "tuner.engines.conformance"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("write python -m tuner.engines.conformance my_tests:Test")


class TestFunction(EngineConformance):
    over_http = False

    @pytest.fixture(autouse=True)
    def _module(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        (tmp_path / "conformance_target.py").write_text(
            "import tuner\n"
            "def evaluate(config, load):\n"
            "    if config.get('seqs') == 0:\n"
            "        raise tuner.Infeasible('no room for a single request')\n"
            "    return {'ttft_p99_s': 0.1 * load, 'tpot_p99_s': 0.01, 'output_tokens_per_s': 100 * load}\n"
        )

    def engine(self) -> Engine:
        return FunctionEngine(target="conformance_target:evaluate", folder=self.folder, required=("tpot_p99_s",))

    def config(self) -> ServingConfig:
        return ServingConfig("any", {"seqs": 8}, {})

    def bad_config(self) -> ServingConfig | None:
        return ServingConfig("any", {"seqs": 0}, {})


@pytest.mark.vllm
class TestVllm(EngineConformance):
    """One launch of the real CPU build."""

    build = "cpu"
    one_launch = True

    @pytest.fixture(autouse=True)
    def _real(self, tmp_path: Path) -> None:
        from tuner.load.prompts import vocabulary

        self.python, self.cache, self.model = real.vllm_of(self.build), tmp_path, real.model()
        vocabulary(self.model)

    def engine(self) -> Engine:
        from tuner.engines.vllm import VllmEngine

        # plain starts: a standby stays for the next launch on purpose, and the suite counts every process
        return VllmEngine(python=self.python, cache=Path(tempfile.gettempdir()) / "tuner-conformance", fast_start="off")

    def config(self) -> ServingConfig:
        flags = {"load-format": "dummy", "dtype": of_machine()["native_dtype"], "max-model-len": 1024}
        flags |= {"enforce-eager": None}
        env = {} if self.gpus else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        return ServingConfig(self.model, {}, flags, env, gpus=len(self.gpus))


@pytest.mark.gpu
class TestVllmOnAGpu(TestVllm):
    """One launch of the CUDA build, on a GPU that is leased, and whose memory is back afterwards."""

    build = "cuda"

    @pytest.fixture(autouse=True)
    def _gpu(self) -> None:
        if not (mine := Gpus().visible()):
            pytest.skip("no NVIDIA GPU here")
        self.gpus = mine[:1]
