import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests import studies
from tuner.errors import NothingFeasible, UsageError
from tuner.export import containers
from tuner.export.deployment import deployment
from tuner.export.formats import FORMATS, best_config, export
from tuner.export.text import dump
from tuner.export.vllm import config_text, env_text
from tuner.pareto.choice import of_trial
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter
from tuner.spec.study import EngineSpec
from tuner.study.outcome import Boot, Measured
from tuner.study.store import Store, read_json, write_json
from tuner.verify.promise import read_promise
from tuner.verify.repeats import Spread

OBJECTIVE = studies.objective()
PARAMS = {"max_num_batched_tokens": 8192, "prefix_caching": False, "speculation": "ngram", "draft_tokens": 4}


@pytest.fixture
def made(tmp_path: Path):
    """A default, and a cheaper configuration with a number, a switch off and a JSON flag."""
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, OBJECTIVE, tokens_per_s=1000),), store, baseline=True)
    studies.measured(1, (studies.step(2.0, OBJECTIVE, tokens_per_s=2000),), store, params=PARAMS)
    return store, studies.study(tmp_path / "s")


def test_the_config_file_holds_the_model_and_the_flags_as_vllm_reads_them(made):
    # PyYAML, because that is what vLLM reads it with
    store, study = made
    path, _ = best_config(store, study)
    assert yaml.safe_load(path.read_text()) == {
        "model": "Qwen/Qwen3-8B",
        "max-model-len": 4096,
        "max-num-batched-tokens": 8192,
        "no-enable-prefix-caching": True,  # `enable-prefix-caching: false` would be dropped by vllm serve
        "speculative-config": {"method": "ngram", "num_speculative_tokens": 4},
    }


def test_the_comments_say_what_was_measured_on_what_and_what_each_flag_trades(made):
    store, study = made
    text = best_config(store, study)[0].read_text()
    assert "trial 1" in text and "1 x h100-sxm-80gb, " in text and "conversation.csv at load 2" in text
    assert "cost -50.0 % (" in text and "tpot_p99 +0.0 %" in text
    assert "not verified yet" in text
    assert "tpot_p99 20 ms (95 %: 19.4 to 20.6)." in text
    lines = text.splitlines()
    above = lines[lines.index("max-num-batched-tokens: 8192") - 1]
    assert above == ("# max_num_batched_tokens (default 2048): prefill throughput against the smoothness of decoding")
    assert "given to every server, not tuned" in lines[lines.index("max-model-len: 4096") - 1]


@pytest.mark.parametrize(("version", "first"), [("0.32.0", "vllm serve"), ("0.32.0+cpu", "python -m vllm")])
def test_the_command_that_starts_it_is_one_that_its_build_has(made, version, first):
    store, study = made
    text = config_text(replace(deployment(store, study), version=version))
    assert f"; {first}" in next(line for line in text.splitlines() if line.startswith("# Start:"))
    assert text.count("python -m vllm") == 1


def test_a_trial_picked_by_hand_says_so_and_compares_itself_with_the_default(made):
    store, study = made
    text = config_text(deployment(store, study, of_trial(store.trials(), OBJECTIVE, 1)))
    assert text.startswith("# Configuration, picked by hand, of study 's': trial 1,") and "cost -50.0 % (" in text
    default = config_text(deployment(store, study, of_trial(store.trials(), OBJECTIVE, 0)))
    assert "This is the engine's default.\n" in default
    studies.measured(2, (studies.step(2.0, OBJECTIVE, tokens_per_s=2000),), store, params=PARAMS, role="verify")
    verified = config_text(deployment(store, study, of_trial(store.trials(), OBJECTIVE, 1)))
    assert "(search windows; on held-out windows: trial 2)." in verified and "not verified yet" in text


def test_the_promise_can_be_read_back(made):
    store, study = made
    promise = read_promise(best_config(store, study)[0])
    assert (promise.study, promise.trial, promise.load) == ("s", 1, 2.0)
    assert promise.slos == study.objective.slos and promise.latency == pytest.approx((0.02, 0.0194, 0.0206))
    assert promise.cost[0] == pytest.approx(2.5 / 3600 / 2000 * 1e6)
    assert promise.config.hash == store.trials()[1].config.hash
    assert promise.fingerprint.gpu == "h100-sxm-80gb" and promise.fingerprint.trace == "conversation.csv"


def test_gpu_driver_and_price_are_those_of_the_node_that_measured_it(tmp_path: Path):
    store = Store(tmp_path / "s")
    noted = {"fingerprint": {"gpu": "h100-sxm-80gb", "driver": "550.1", "engine_version": "0.32.0"}, "node": "n2"}
    noted |= {"device": "L40S", "driver": "570.2", "price_usd_per_gpu_hour": 1.1}
    studies.measured(0, (studies.step(1.0, studies.objective(price=1.1)),), store, **noted)
    path, _ = best_config(store, studies.study(tmp_path / "s"))
    promise, text = read_promise(path), path.read_text()
    assert (promise.fingerprint.gpu, promise.fingerprint.driver, promise.price) == ("L40S", "570.2", 1.1)
    assert "1 x L40S" in text and "2.5 USD" not in text and text.count("1.1 USD per GPU-hour") == 2


def test_what_the_launch_noted_of_weights_and_driver_is_promised_for_who_certifies_it_elsewhere(tmp_path: Path):
    store = Store(tmp_path / "s")
    noted = {"fingerprint": {"driver": "550.1", "model_hash": "0123456789ab"}}
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), store, **noted)
    found = read_promise(best_config(store, studies.study(tmp_path / "s"))[0]).fingerprint
    assert (found.driver, found.model_hash, found.gpu) == ("550.1", "0123456789ab", "h100-sxm-80gb")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_carries_the_promise(made, tmp_path: Path, format):
    (path := tmp_path / "file").write_text(next(iter(export(*made, format).values())))
    assert read_promise(path).trial == 1


def test_the_environment_is_written_for_a_shell_and_secrets_are_left_out(tmp_path: Path):
    store = Store(tmp_path / "s")
    config = studies.space().config({}, "Qwen/Qwen3-8B")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "HF_TOKEN": "hf_abc", "VLLM_API_KEY": "k", "A": "it's"}
    store.start_trial(0, type(config)(**{**config.to_dict(), "env": env}), {}, started_s=1.0, baseline=True)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    files = export(store, studies.study(tmp_path / "s"))
    text = files["best-config.env"]
    assert "VLLM_CPU_OMP_THREADS_BIND='0|1'" in text and 'A="it\'s"' in text.splitlines()  # as Compose reads it, too
    assert "hf_abc" not in "".join(files.values()) and "HF_TOKEN was set during the study" in text
    import subprocess

    script = f"set -a; {text}\nset +a; printf '%s' \"$VLLM_CPU_OMP_THREADS_BIND $A\""
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "0|1 it's"


def test_the_launchers_address_name_and_key_are_no_part_of_a_configuration(tmp_path: Path):
    store = Store(tmp_path / "s")
    config = studies.space().config({}, "/models/a")
    flags = {**config.flags, "port": 8123, "host": "127.0.0.1", "api-key": "sk-1", "served-model-name": "tuner-7f3a"}
    store.start_trial(0, type(config)(**{**config.to_dict(), "flags": flags}), {}, started_s=1.0)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    for format in FORMATS:
        text = "".join(export(store, studies.study(tmp_path / "s"), format).values())
        assert "sk-1" not in text and "tuner-7f3a" not in text and "8123" not in text
        assert "/models/a" in text


@pytest.mark.parametrize("format", FORMATS)
def test_every_file_of_an_emulated_study_says_so_in_its_first_line(tmp_path: Path, format):
    study, store = studies.write(tmp_path / "s", trials=3, emulated=True, engine=EngineSpec("emulator"))
    assert all(text.startswith("# EMULATED") for text in export(store, study, format).values())


@pytest.mark.parametrize("format", FORMATS)
def test_a_measured_study_is_not_called_emulated(made, format):
    assert not any("EMULATED" in text for text in export(*made, format).values())


def test_where_nothing_meets_the_slos_nothing_is_written(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=3, slow=10)
    with pytest.raises(NothingFeasible, match="Nearest: trial"):
        best_config(store, study)
    assert not (store.folder / "best-config.yaml").exists()


def test_compose_runs_the_measured_version_with_the_config_inside_and_its_gpus(made):
    store, study = made
    data = yaml.safe_load(export(store, study, "compose")["compose.yaml"])
    (service,) = data["services"].values()
    assert service["entrypoint"][:3] == ["vllm", "serve", "--config"]
    assert service["entrypoint"][3] == service["configs"][0]["target"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    assert service["environment"]["HF_HUB_OFFLINE"] == "1"
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    inside = yaml.safe_load(data["configs"][service["configs"][0]["source"]]["content"].replace("$$", "$"))
    assert inside == yaml.safe_load(export(store, study)["best-config.yaml"])


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "/models/qwen"])
def test_kubernetes_objects_fit_together(made, model):
    text = containers.kubernetes(replace(deployment(*made), model=model))
    config, deploy, service = yaml.safe_load_all(text)
    assert [o["kind"] for o in (config, deploy, service)] == ["ConfigMap", "Deployment", "Service"]
    pod = deploy["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert deploy["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert set(mounts) == {v["name"] for v in pod["spec"]["volumes"]}
    path = container["command"][container["command"].index("--config") + 1]
    assert path == f"{mounts['config']}/{next(iter(config['data']))}"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 600
    assert yaml.safe_load(config["data"]["best-config.yaml"])["max-num-batched-tokens"] == 8192


@pytest.mark.parametrize(
    ("version", "gpus", "repository", "tag"),
    [
        ("0.32.0", 2, "vllm/vllm-openai", "v0.32.0"),
        ("0.32.0+cpu", 0, containers.CPU_IMAGE, "v0.32.0"),
        ("0.33.0rc1", 1, "vllm/vllm-openai", "latest"),
        ("", 1, "vllm/vllm-openai", "latest"),
    ],
)
def test_a_container_runs_the_build_and_the_version_that_were_measured(made, version, gpus, repository, tag):
    what = replace(deployment(*made), version=version, gpus=gpus)
    (service,) = yaml.safe_load(containers.compose(what))["services"].values()
    deploy = list(yaml.safe_load_all(containers.kubernetes(what)))[1]["spec"]["template"]["spec"]
    (model,) = yaml.safe_load(containers.helm(what))["servingEngineSpec"]["modelSpec"]
    images = {service["image"], deploy["containers"][0]["image"], f"{model['repository']}:{model['tag']}"}
    assert images == {f"{repository}:{tag}"}


def test_a_gated_model_is_downloaded_with_the_users_token_where_there_is_one(made):
    (service,) = yaml.safe_load(containers.compose(deployment(*made)))["services"].values()
    assert service["environment"]["HF_TOKEN"] == "${HF_TOKEN:-}"
    deploy = list(yaml.safe_load_all(containers.kubernetes(deployment(*made))))[1]["spec"]["template"]["spec"]
    given = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in deploy["containers"][0]["env"] if "valueFrom" in e}
    secret = {"name": "s-secrets", "optional": True}
    assert given == {"HF_TOKEN": {**secret, "key": "hf-token"}, "VLLM_API_KEY": {**secret, "key": "api-key"}}


@pytest.mark.parametrize(
    ("study", "name"),
    [
        ("Chat 8B", "chat-8b"),
        ("2026-llama", "study-2026-llama"),
        ("a" * 39 + "-b", "a" * 39),
        ("1" * 33 + "-b", "study-" + "1" * 33),
        ("日本", "study"),
        ("...", "study"),
        ("on", "study-on"),  # the chart writes it without quotes
        ("null", "study-null"),
    ],
)
def test_kubernetes_takes_the_name_of_any_study(made, study, name):
    """As its API server checks the name of a Service: DNS-1035."""
    store, known = made
    objects = list(yaml.safe_load_all(export(store, replace(known, name=study), "k8s")["k8s.yaml"]))
    assert {o["metadata"]["name"] for o in objects} == {name}
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)


def test_a_slow_start_is_given_four_times_its_measured_time(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=1)
    what = deployment(store, study)
    assert what.boot_s == pytest.approx(72.5)
    from dataclasses import replace

    from tuner.export.containers import start_limit_s

    assert start_limit_s(what) == 600 and start_limit_s(replace(what, boot_s=400.0)) == 1600


def test_helm_values_say_outright_whether_prefixes_are_cached(made):
    # the chart passes --no-enable-prefix-caching unless it is told otherwise: leaving it out would change the server
    store, study = made
    (model,) = yaml.safe_load(export(store, study, "helm")["values.yaml"])["servingEngineSpec"]["modelSpec"]
    assert model["vllmConfig"]["enablePrefixCaching"] is False
    args = model["vllmConfig"]["extraArgs"]
    assert args[args.index("--max-num-batched-tokens") + 1] == "8192" and all(isinstance(a, str) for a in args)
    assert json.loads(args[args.index("--speculative-config") + 1]) == {"method": "ngram", "num_speculative_tokens": 4}
    assert not any("prefix-caching" in word for word in args)
    (tmp := Store(store.folder.parent / "t")).folder.mkdir()
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), tmp, params={"tensor_parallel_size": 2})
    (model,) = yaml.safe_load(export(tmp, study, "helm")["values.yaml"])["servingEngineSpec"]["modelSpec"]
    assert model["vllmConfig"]["enablePrefixCaching"] is True and model["vllmConfig"]["tensorParallelSize"] == 2
    assert model["requestGPU"] == 2 and "--tensor-parallel-size" not in model["vllmConfig"]["extraArgs"]


def test_the_chart_gives_every_server_of_several_gpus_its_shared_memory(made):
    """It does so where tensorParallelSize is set; replicas of one server (data parallel) need it as well."""
    what = replace(deployment(*made), flags={"data-parallel-size": 2}, gpus=2)
    (model,) = yaml.safe_load(containers.helm(what))["servingEngineSpec"]["modelSpec"]
    assert model["vllmConfig"]["tensorParallelSize"] == 1
    assert model["vllmConfig"]["extraArgs"] == ["--data-parallel-size", "2"]
    cpu = yaml.safe_load(containers.helm(replace(what, flags={"tensor-parallel-size": 2}, gpus=0)))
    assert cpu["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["tensorParallelSize"] == 2
    one = yaml.safe_load(containers.helm(replace(what, flags={}, gpus=1)))
    assert "tensorParallelSize" not in one["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]


def test_a_cpu_server_asks_the_chart_for_no_gpu_runtime(made):
    cpu = yaml.safe_load(containers.helm(replace(deployment(*made), gpus=0)))["servingEngineSpec"]
    gpu = yaml.safe_load(containers.helm(deployment(*made)))["servingEngineSpec"]
    assert cpu["runtimeClassName"] == "" and "runtimeClassName" not in gpu  # the chart's default is nvidia


@pytest.mark.parametrize("study", ["h100-qwen3-8b-azure-conversation", "x" * 200])
def test_the_host_names_that_the_chart_makes_are_no_longer_than_a_label_may_be(made, study):
    store, known = made
    text = export(store, replace(known, name=study), "helm")["values.yaml"]
    (model,) = yaml.safe_load(text)["servingEngineSpec"]["modelSpec"]
    (release,) = re.findall(r"# helm install (\S+) ", text)
    for theirs in ("engine-service", "vllm-stack"):
        assert max(len(f"{name}-{model['name']}-{theirs}") for name in (release, "x" * 17)) <= 63


@pytest.mark.parametrize("format", ["compose", "k8s"])
def test_a_configuration_that_changed_changes_the_containers_description(made, format):
    """Neither Compose nor Kubernetes starts a container anew because a file that it is given has changed."""

    def described(what) -> object:
        if format == "compose":
            return yaml.safe_load(containers.compose(what))["services"]
        return list(yaml.safe_load_all(containers.kubernetes(what)))[1]["spec"]["template"]

    what = deployment(*made)
    assert described(what) == described(what) != described(replace(what, flags={"max-num-seqs": 8}))


def test_a_rollout_is_not_given_up_before_the_server_may_have_started(made):
    deploy = list(yaml.safe_load_all(containers.kubernetes(replace(deployment(*made), boot_s=400.0))))[1]["spec"]
    (container,) = deploy["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert deploy["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"] == 1600


@pytest.mark.parametrize("format", FORMATS)
def test_a_secret_that_has_no_place_in_a_file_is_named_there(made, format):
    store, study = made
    make = {"compose": containers.compose, "k8s": containers.kubernetes, "helm": containers.helm, "vllm": env_text}
    text = make[format](replace(deployment(store, study), secrets=("S3_SECRET_KEY",)))
    assert "# S3_SECRET_KEY was set during the study and is a secret: set it yourself.\n" in text


def test_a_local_model_is_mounted_where_it_was(tmp_path: Path):
    store = Store(tmp_path / "s")
    config = studies.space().config({}, "/models/qwen")
    store.start_trial(0, config, {}, started_s=1.0)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    study = studies.study(tmp_path / "s")
    (service,) = yaml.safe_load(export(store, study, "compose")["compose.yaml"])["services"].values()
    mount = {"type": "bind", "source": "/models/qwen", "target": "/models/qwen", "read_only": True}
    assert service["volumes"] == [mount] and "HF_TOKEN" not in service["environment"]
    _, deploy, _ = yaml.safe_load_all(export(store, study, "k8s")["k8s.yaml"])
    mounts = deploy["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "model", "mountPath": "/models/qwen"} in mounts
    written = [next(iter(export(store, study, format).values())) for format in ("vllm", "compose", "k8s")]
    assert all("served-model-name: qwen\n" in text for text in written)  # what clients ask for
    assert "--served-model-name\n" in export(store, study, "helm")["values.yaml"]
    for format in ("k8s", "helm"):
        text = "".join(export(store, study, format).values())
        assert "# PersistentVolumeClaim s-model must hold what was in /models/qwen (create it first)." in text
    assert "served-model-name" not in read_promise(best_config(store, study)[0]).config.flags


def test_dollars_and_colons_reach_the_container_as_they_were_measured(made):
    """Compose puts variables in at $NAME, Kubernetes at $(NAME) in variables and words of a command: $$ is a dollar."""
    what = replace(deployment(*made), env={"A": "pa$$word $HOME $(HOME)"}, model="/models/a$b:c", flags={"x": "$(A)"})
    written = "pa$$$$word $$HOME $$(HOME)"
    (service,) = yaml.safe_load(containers.compose(what))["services"].values()
    assert service["environment"] == {"A": written, "VLLM_API_KEY": "${VLLM_API_KEY:-}"}
    assert {service["volumes"][0][side] for side in ("source", "target")} == {"/models/a$$b:c"}
    _, deploy, _ = yaml.safe_load_all(containers.kubernetes(what))
    (container,) = deploy["spec"]["template"]["spec"]["containers"]
    assert container["env"][0] == {"name": "A", "value": written}
    assert container["volumeMounts"][2]["mountPath"] == "/models/a$b:c"  # nothing is put in there
    (model,) = yaml.safe_load(containers.helm(what))["servingEngineSpec"]["modelSpec"]
    assert model["env"] == [{"name": "A", "value": written}] and model["vllmConfig"]["extraArgs"][-2:] == [
        "--x",
        "$$(A)",
    ]
    assert model["modelURL"] == "/models/a$$b:c"  # a word of the command


def test_a_variant_is_exported_as_the_folder_or_id_that_was_served(tmp_path: Path):
    store = Store(tmp_path / "s")
    config = studies.space().config({}, "/models/qwen")
    config = type(config)(**{**config.to_dict(), "model_variant": "w8a8-int8"})
    store.start_trial(0, config, {}, started_s=1.0)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    named = EngineSpec("vllm", options={"variants": {"w8a8-int8": "org/qwen-w8a8"}})
    assert deployment(store, studies.study(tmp_path / "s", engine=named)).model == "org/qwen-w8a8"
    (folder := tmp_path / "s" / "models" / "qwen-w8a8-int8").mkdir(parents=True)
    assert deployment(store, studies.study(tmp_path / "s")).model == str(folder)


def test_remote_code_is_trusted_in_the_export_where_the_study_trusted_it(made):
    store, _ = made
    trusting = studies.study(store.folder, engine=EngineSpec("vllm", trust_remote_code=True))
    assert "trust-remote-code: true" in export(store, trusting)["best-config.yaml"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_serves_random_weights_says_so_and_how_to_serve_the_model(tmp_path: Path, format):
    # a study of speed alone may take them; whoever deploys its file would serve them
    store = Store(tmp_path / "s")
    config = ServingConfig("Qwen/Qwen3-8B", {}, {"load-format": "dummy"})
    store.start_trial(0, config, {}, baseline=True, started_s=studies.START_S)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=studies.START_S + 60)
    texts = export(store, studies.study(tmp_path / "s"), format)
    head = next(text for name, text in texts.items() if not name.endswith(".env"))
    assert "# RANDOM WEIGHTS (load-format dummy)" in head
    if format == "vllm":
        lines = head.splitlines()
        assert lines[lines.index("load-format: dummy") - 1].endswith("take this out to serve the model")


def test_a_file_tells_of_its_configurations_own_launch_and_no_interval_where_none_is_known(tmp_path: Path):
    store = Store(tmp_path / "s")
    for number, (params, tokens_per_s, boot_s) in enumerate(((PARAMS, 2000, 90.0), ({}, 1000, 30.0))):
        step = replace(studies.step(2.0, OBJECTIVE, tokens_per_s=tokens_per_s), intervals={})
        studies.add(number, Measured((step,), Boot(boot_s)), store, params=params, baseline=not params)
    what = deployment(store, studies.study(tmp_path / "s"))
    path, _ = best_config(store, studies.study(tmp_path / "s"))
    promise = read_promise(path)
    assert (promise.trial, what.boot_s) == (0, 90.0)
    assert promise.cost[0] == pytest.approx(0.3472, abs=1e-4) and promise.latency[0] == 0.02
    assert all(map(math.isnan, (*promise.cost[1:], *promise.latency[1:]))) and "95 %" not in "".join(what.about[:4])
    assert "Launched once" not in "".join(what.about)  # which is said of a verification


def test_a_verified_study_exports_what_verification_promised(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=12, verified=True)
    path, _ = best_config(store, study)
    promise = read_promise(path)
    assert (promise.load, promise.cost, promise.latency) == (1.8, (0.47, 0.45, 0.49), (0.031, 0.029, 0.034))
    assert promise.details["role"] == "verify" and "held-out windows" in path.read_text()
    assert "Launched once" not in path.read_text()


def test_a_promise_carries_how_far_launches_differed_and_how_sure_verification_was(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=12, verified=True)
    verdict = read_json(store.folder / "verify.json")
    write_json(store.folder / "verify.json", verdict | {"spread": {"variance": 0.01, "freedom": 7}, "confidence": 0.9})
    promise = read_promise(best_config(store, study)[0])
    assert promise.spread == Spread(0.01, 7.0) and promise.confidence == 0.9


def test_after_ablation_the_smallest_configuration_is_exported_with_what_each_flag_is_worth(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    verified = studies.verification(study, store).config
    assert verified and {"max-num-batched-tokens", "max-num-seqs"} <= verified.flags.keys()
    write_json(
        store.folder / "ablation.json", studies.ablation(study, verified, kept="max_num_batched_tokens").to_dict()
    )
    files = export(store, study)
    flags = yaml.safe_load(files["best-config.yaml"])
    assert flags["max-num-batched-tokens"] == 8192 and "max-num-seqs" not in flags and "kv-cache-dtype" not in flags
    line = "# its effect is proven (cost +30.0 %, +25.0 to +36.0 %, without it); max_num_batched_tokens (default 2048)"
    assert line in files["best-config.yaml"]
    assert "0.4653 USD" in files["best-config.yaml"]  # 0.47 x 0.99, as it was measured
    for engine in ("sglang", "command", "function"):  # whose files nothing starts from, and people read
        other = export(store, replace(study, engine=replace(study.engine, kind=engine)))["best-config.yaml"]
        assert line in other and yaml.safe_load(other)["max-num-batched-tokens"] == 8192


def test_variables_variants_and_a_functions_parameters_have_their_comments(tmp_path: Path):
    threads = tuple(Emission(env={"OMP_NUM_THREADS": str(n)}) for n in (1, 2))
    weights = (Emission(), Emission(model_variant="int4"))
    parameters = (
        Parameter("threads", (1, 2), threads, 1, trades="cores"),
        Parameter("weights", ("bf16", "int4"), weights, "bf16", trades="speed"),
    )
    for kind in ("vllm", "function"):
        store = Store(tmp_path / kind)
        params = {"threads": 2, "weights": "int4"}
        config = ServingConfig("org/m", params, {}, {"OMP_NUM_THREADS": "2", "OWN": "1"}, "int4")
        store.start_trial(0, config, params, started_s=1.0, baseline=True)
        store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
        study = studies.study(tmp_path / kind, engine=EngineSpec(kind))
        files = export(store, replace(study, space=replace(study.space, parameters=parameters)))
        body = files["best-config.yaml"].partition("\n\n")[2].split("\n")
        assert body[:2] == ["# weights (default bf16): speed", "model: org/m"]
        assert files["best-config.env"].splitlines()[1:] == [
            "# threads (default 1): cores",
            "OMP_NUM_THREADS=2",
            "OWN=1",
        ]
        assert ("# threads (default 1): cores\nthreads: 2" in files["best-config.yaml"]) == (kind == "function")


def test_an_unknown_format_and_a_container_of_another_engine_are_refused_in_words(made, tmp_path: Path):
    store, study = made
    with pytest.raises(UsageError, match="vllm, compose, k8s, helm"):
        export(store, study, "nomad")
    other = studies.study(tmp_path / "s", engine=EngineSpec("sglang"))
    with pytest.raises(UsageError, match="engine is sglang"):
        export(store, other, "k8s")


@pytest.mark.parametrize(
    ("kind", "body"),
    [("command", {}), ("attach", {}), ("function", {"max_num_seqs": 256})],
)
def test_a_default_without_flags_is_the_model_alone_and_of_a_function_its_parameters(tmp_path: Path, kind, body):
    store = Store(tmp_path / "s")
    env = {"A": "{folder}/a", "B": "{b", "C": "{gpus=0}"}
    config = ServingConfig("org/model", {"max_num_seqs": 256}, {}, env)
    store.start_trial(0, config, {"max_num_seqs": 256}, started_s=1.0, baseline=True)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    files = export(store, studies.study(tmp_path / "s", engine=EngineSpec(kind)))
    assert yaml.safe_load(files["best-config.yaml"]) == {"model": "org/model", **body}
    given = [line for line in files["best-config.env"].splitlines() if "=" in line and not line.startswith("#")]
    if kind == "command":  # places that every launch fills
        assert given == ["B='{b'"] and "# A was {folder}/a, filled at each launch: set it" in files["best-config.env"]
        assert "C was {gpus=0}, filled" in files["best-config.env"]
    else:
        assert len(given) == 3


def test_of_a_command_the_words_that_start_it_are_said_with_what_every_launch_chooses_left_open(tmp_path: Path):
    store = Store(tmp_path / "s")
    config = ServingConfig("org/model", {}, {"quant": "q4_0", "note": "a b", "fast": None}, {})
    store.start_trial(0, config, {}, started_s=1.0, baseline=True)
    store.end_trial(0, Measured((studies.step(1.0, OBJECTIVE),)), ended_s=2.0)
    words = [
        "serve",
        "{model}/{quant=f16}.gguf",
        "--port",
        "{port}",
        "--api-key",
        "{api_key}",
        "--hf-token",
        "hf_abcdef",
    ]
    for command, said in (
        (
            words,
            "# serve org/model/q4_0.gguf --port {port} --api-key {api_key} --hf-token (secret) --note 'a b' --fast",
        ),
        (["serve", "{port}", "{password}"], ""),
    ):
        text = export(store, studies.study(tmp_path / "s", engine=EngineSpec("command", command=tuple(command))))
        body = text["best-config.yaml"]
        assert said in body.splitlines() and "hf_abcdef" not in body
        assert yaml.safe_load(body) == {"model": "org/model", "quant": "q4_0", "note": "a b", "fast": True}


def test_of_a_function_the_parameters_of_what_was_chosen_are_exported(tmp_path: Path):
    store = Store(tmp_path / "s")
    for number, (seqs, tokens_per_s) in enumerate(((256, 1000), (512, 2000))):
        config = ServingConfig("m", {"max_num_seqs": seqs}, {}, {"N": str(seqs)})
        store.start_trial(number, config, {"max_num_seqs": seqs}, started_s=1.0 + number, baseline=not number)
        step = studies.step(1.0, OBJECTIVE, tokens_per_s=tokens_per_s)
        store.end_trial(number, Measured((step,)), ended_s=2.0 + number)
    files = export(store, studies.study(tmp_path / "s", engine=EngineSpec("function")))
    assert yaml.safe_load(files["best-config.yaml"]) == {"model": "m", "max_num_seqs": 512}


@given(st.dictionaries(st.from_regex(r"[a-z-]{1,8}", fullmatch=True), st.text(max_size=12), max_size=4))
def test_any_text_is_read_back_alike_by_a_yaml_1_1_reader(data):
    clean = {k: "".join(c for c in v if c.isprintable()) for k, v in data.items()}
    assert yaml.safe_load(dump({"x": clean}))["x"] == clean


@given(st.lists(st.sampled_from([*"a #:-|'\"\\", *"\n\r\t\x00\x07\x7f\x85\u2028\ufeff", "\n ", "é"]), max_size=6))
@example(["\n"])
@example([" ", "a", "\n"])
@example(["a", "\r", "\n"])
@example(["a", "\n", "\x85"])
def test_text_of_several_lines_and_with_control_characters_is_read_back_alike(letters):
    from ruamel.yaml import YAML

    data = {"x": {"y": "".join(letters), "z": ["".join(letters)]}}
    assert yaml.safe_load(dump(data)) == data == YAML(typ="safe", pure=True).load(dump(data))


@pytest.mark.parametrize("format", FORMATS)
def test_names_of_several_lines_stay_in_their_comments(made, tmp_path: Path, format):
    store, study = made
    name = "a\nb: c\r\x85d\u2028e\x07\x7f"
    odd = replace(study, name=name, trace=replace(study.trace, file=f"/t/{name}.csv"))
    plain, text = (next(iter(export(store, s, format).values())) for s in (replace(study, name="a-b-c-d-e"), odd))
    read = [list(yaml.safe_load_all(t)) for t in (plain, text)]
    if format in ("vllm", "helm"):
        assert read[0] == read[1]
    assert len(read[0]) == len(read[1]) and "of study 'a\\nb: c" in text
    (path := tmp_path / "file").write_text(text)
    assert read_promise(path).study == name


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "no", "1:30", "1e3", "0o17", "017", "null", "~", "2026-01-01", "", "-_", "._", "0x_"]
)
def test_words_that_yaml_1_1_reads_as_something_else_are_quoted(word):
    assert yaml.safe_load(dump({"a": word})) == {"a": word}


@pytest.mark.parametrize("number", [1e-06, 1e20, -1e-05, 2.5e-07, 1e16, 0.1, 3.0])
def test_numbers_with_an_exponent_are_numbers_to_a_yaml_1_1_reader(number):
    assert yaml.safe_load(dump({"a": {"b": [number]}})) == {"a": {"b": [number]}}
