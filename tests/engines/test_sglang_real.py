"""SGLang itself, as far as it runs without a GPU: its parser, its flags, and a server on the CPU.

Needs ``TUNER_SGLANG_PYTHON``, an interpreter that has SGLang. Where it lacks SGLang's CPU kernels, which must be built
from its sources, ``standin/sgl_kernel`` has the one that a plain decode needs.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tuner.engines.conformance import EngineConformance
from tuner.engines.protocol import Engine
from tuner.engines.sglang import SglangEngine
from tuner.server.start import Binding
from tuner.space.config import ServingConfig
from tuner.spec import shipped
from tuner.spec.text import read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("TUNER_SGLANG_PYTHON"), reason="no SGLang: set TUNER_SGLANG_PYTHON to a Python that has it"
    ),
]
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TUNER_SGLANG_PYTHON", "")
SPACES = [name for name in shipped.names("search_spaces") if name.startswith("sglang/")]
PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
said = []
for words in json.load(sys.stdin):
    merged = ConfigArgumentMerger(parser=parser).merge_config_with_args(words)
    said.append(vars(parser.parse_args(merged)))
print("ARGS " + json.dumps(said, default=str))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def emitted() -> list[dict[str, object]]:
    """The flags of every value of every parameter of the shipped spaces."""
    found: list[dict[str, object]] = []
    for name in SPACES:
        for spec in read(shipped.root("search_spaces") / f"{name}.yaml", "search space").data["parameters"].values():
            values = spec.get("values")
            if isinstance(values, dict):
                found += [dict(value["flags"]) for value in values.values() if value and "flags" in value]
            else:
                found += [{spec["flag"]: value} for value in values or spec["range"]]
    return [{flag: "/models/head" if value == "$eagle_model" else value for flag, value in f.items()} for f in found]


def test_every_flag_of_the_shipped_spaces_is_one_that_this_version_names(cache):
    known = SglangEngine(python=PYTHON, cache=cache).flags()
    assert known is not None and len(known) > 300
    assert {flag for flags in emitted() for flag in flags} <= known
    assert {"config", "model-path", "host", "port", "served-model-name", "api-key", "enable-metrics"} <= known


def test_its_own_parser_takes_our_command_line_with_every_value_of_the_shipped_spaces(cache, model, site, tmp_path):
    engine = SglangEngine(python=PYTHON, cache=cache)
    binding = Binding(port=23456, api_key="0e1" * 16, model="tuner-abc", temporary=tmp_path, gpus=())
    lines = []
    for flags in emitted():
        recipe = engine.recipe(ServingConfig(model, {}, dict(flags)), site)  # type: ignore[arg-type]
        lines.append(list(recipe.argv(binding))[3:])
    done = subprocess.run(
        [PYTHON, "-c", PARSE], input=json.dumps(lines), capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ARGS "))[5:])
    for flags, args in zip(emitted(), parsed, strict=True):
        assert (args["host"], args["port"], args["api_key"]) == ("127.0.0.1", 23456, "0e1" * 16)
        assert (args["served_model_name"], args["model_path"], args["enable_metrics"]) == ("tuner-abc", model, True)
        for flag, value in flags.items():
            assert args[flag.replace("-", "_")] == (True if value is None else value)


def test_its_code_of_the_mixtures_that_the_space_keeps_from_attention_groups_knows_none():
    find = "import importlib.util; print(importlib.util.find_spec('sglang').submodule_search_locations[0])"
    found = subprocess.run([PYTHON, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    code = [file.read_text() for file in (Path(found) / "srt" / "models").glob("*.py")]
    space = read(shipped.root("search_spaces") / "sglang/multi-gpu.yaml", "search space").data
    for name in space["parameters"]["dp_attention_size"]["when"]["architecture"]["not_in"]:
        (written,) = (text for text in code if f"\nclass {name}(" in text)
        assert "attn_tp" not in written, f"{name} may know them by now"


class TestSglangOnTheCpu(EngineConformance):
    """One launch of a real server: PyTorch's own attention and sampling, dummy weights."""

    one_launch = True

    @pytest.fixture(autouse=True)
    def _real(self, cache: Path) -> None:
        self.cache = cache
        self.model = os.environ.get("TUNER_TEST_MODEL") or str(ROOT / "models/tiny-qwen3")
        if not Path(self.model, "tokenizer.json").exists():
            pytest.skip("no small model: set TUNER_TEST_MODEL or run examples/make_model.py")

    def engine(self) -> Engine:
        return SglangEngine(python=PYTHON, cache=self.cache)

    def config(self) -> ServingConfig:
        flags = {"device": "cpu", "load-format": "dummy", "dtype": "bfloat16", "attention-backend": "torch_native"}
        flags |= {"sampling-backend": "pytorch", "disable-overlap-schedule": None, "context-length": 1024}
        flags |= {"max-total-tokens": 8192, "mem-fraction-static": 0.1}
        env = {"SGLANG_USE_CPU_ENGINE": "1"}
        if subprocess.run([PYTHON, "-c", "import sgl_kernel"], capture_output=True, check=False).returncode:
            env["PYTHONPATH"] = str(Path(__file__).parent / "standin")
        return ServingConfig(self.model, {}, flags, env, gpus=0)
