"""The exported file, read by the installed vLLM's own parser: no server is started."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import real, studies
from tests.spec.conftest import workplace as workplace
from tests.spec.test_studyfile import GOOD, write
from tuner.export.formats import best_config, export
from tuner.space.config import ServingConfig
from tuner.spec import shipped, studyfile
from tuner.study.outcome import Measured
from tuner.study.store import Store

PARSE = """
import json, sys
import vllm.entrypoints.cli.serve as serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
outer = FlexibleArgumentParser()  # as `vllm serve` builds it: a parser whose only child knows the flags
commands = outer.add_subparsers(dest="subparser")
for command in serve.cmd_init():
    command.subparser_init(commands)
found = [vars(outer.parse_args(["serve", *words])) for words in json.loads(sys.argv[1])]
print("ARGS " + json.dumps(found, default=str))
"""


def parsed(*lines: list[str]) -> list[dict]:
    """What vLLM understands of each command line after ``vllm serve``."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [real.vllm(), "-c", PARSE, json.dumps(lines)]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ARGS "))[5:])


def charts_command(values: str) -> list[str]:
    """The words after ``vllm serve`` that vLLM's production-stack chart (0.1.16) writes into the container's command
    for the values that we set, as Kubernetes hands them on."""
    (model,) = yaml.safe_load(values)["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    words = [model["modelURL"], "--host", "0.0.0.0", "--port", "8000"]
    words.append("--enable-prefix-caching" if config.get("enablePrefixCaching") else "--no-enable-prefix-caching")
    if "tensorParallelSize" in config:
        words += ["--tensor-parallel-size", str(config["tensorParallelSize"])]
    assert config.keys() <= {"enablePrefixCaching", "tensorParallelSize", "extraArgs"}
    return [word.replace("$$", "$") for word in (*words, *config["extraArgs"])]


@pytest.mark.vllm
def test_vllm_serves_a_folder_under_its_name(tmp_path: Path):
    store = Store(tmp_path / "s")
    store.start_trial(0, studies.space().config({}, "/models/qwen"), {}, started_s=1.0)
    store.end_trial(0, Measured((studies.step(1.0, studies.objective()),)), ended_s=2.0)
    (args,) = parsed(["--config", str(best_config(store, studies.study(tmp_path / "s"))[0])])
    assert (args["model"], args["served_model_name"]) == ("/models/qwen", ["qwen"])


@pytest.mark.vllm
def test_vllm_serve_takes_the_exported_file_unchanged(tmp_path: Path):
    store = Store(tmp_path / "s")
    want = studies.objective()
    params = {
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 128,
        "kv_cache_dtype": "fp8",
        "prefix_caching": False,
        "speculation": "ngram",
        "draft_tokens": 4,
    }
    studies.measured(0, (studies.step(1.0, want),), store, params=params)
    path, _ = best_config(store, studies.study(tmp_path / "s"))
    values = export(store, studies.study(tmp_path / "s"), "helm")["values.yaml"]
    args, chart = parsed(["--config", str(path)], charts_command(values))
    others = ("config", "model", "model_tag", "host", "port")  # the file's name, and the model beside its key
    assert {k: v for k, v in chart.items() if k not in others} == {k: v for k, v in args.items() if k not in others}
    assert chart["model_tag"] == args["model"]
    assert args["model"] == "Qwen/Qwen3-8B"
    assert (args["max_num_batched_tokens"], args["max_num_seqs"], args["max_model_len"]) == (8192, 128, 4096)
    assert args["enable_prefix_caching"] is False and args["kv_cache_dtype"] == "fp8"
    assert args["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4}


@pytest.mark.vllm
def test_vllm_takes_every_value_of_the_shipped_spaces(workplace: Path):
    """Off their defaults one by one, with what the value applies under."""
    every: list[ServingConfig] = []
    for name in (name for name in shipped.names("search_spaces") if name.startswith("vllm")):
        gpus = "cpu" if name.startswith("vllm-cpu/") else "H100-SXM, gpus: 8"
        text = GOOD.replace("kind: emulator, options: {gpu: H100-SXM}", "kind: vllm").replace("vllm/quick", name)
        text += f"hardware: {{gpu: {gpus}}}\ndraft_model: ./model\neagle_model: ./model\n"
        space = studyfile.load(write(workplace, text)).space
        for p in space.parameters:
            under = {"speculation": "ngram"} if p.when else {}
            every += [space.config({**space.default(), **under, p.name: value}, "m") for value in p.values]
    assert len(every) > 150
    for config, args in zip(every, parsed(*(["m", *config.args()] for config in every)), strict=True):
        for flag, value in config.flags.items():
            taken = args[flag.removeprefix("no-").replace("-", "_")]
            meant = json.loads(value) if str(value).startswith("{") else not flag.startswith("no-")
            assert taken == (meant if value is None or isinstance(meant, dict) else value), config.args()
