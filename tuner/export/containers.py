"""The chosen configuration as a Docker Compose file, as Kubernetes objects, and as values of vLLM's Helm chart."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from tuner.export.deployment import Deployment
from tuner.export.text import comments, dump
from tuner.export.vllm import YAML_NAME, command, config_text
from tuner.space.config import ServingConfig

CONFIG = f"/config/{YAML_NAME}"
CPU_IMAGE = "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo"
CHECKSUM = "tuner/config-sha256"
RELEASE = "vllm"
HEALTH = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"


def image(what: Deployment) -> tuple[str, str]:
    """Repository and tag: the very version that was measured (``latest`` where it is not known)."""
    version = what.version.split("+")[0]
    known = all(part.isdigit() for part in version.split("."))
    return ("vllm/vllm-openai" if what.gpus else CPU_IMAGE), (f"v{version}" if known else "latest")


def compose(what: Deployment) -> str:
    """``docker compose -f compose.yaml up`` (Compose 2.23 or newer: the config file is inside)."""
    repository, tag = image(what)
    env = {name: _literal(value) for name, value in what.env.items()} | {"VLLM_API_KEY": "${VLLM_API_KEY:-}"}
    service: dict[str, Any] = {
        "image": f"{repository}:{tag}",
        "entrypoint": command(CONFIG),
        "configs": [{"source": "serving", "target": CONFIG}],
        "environment": env,
        "labels": _checksum(what),
        "ports": ["127.0.0.1:8000:8000"],
        "volumes": ["${HOME}/.cache/huggingface:/root/.cache/huggingface"],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", HEALTH],
            "interval": "10s",
            "timeout": "10s",
            "start_period": f"{start_limit_s(what)}s",
        },
        "restart": "unless-stopped",
    }
    if what.local_model:
        path = _literal(what.model)  # in full: in the short form a colon would end it
        service["volumes"] = [{"type": "bind", "source": path, "target": path, "read_only": True}]
    else:
        env["HF_TOKEN"] = "${HF_TOKEN:-}"
    if what.gpus:
        device = {"driver": "nvidia", "count": what.gpus, "capabilities": ["gpu"]}
        service |= {"ipc": "host", "deploy": {"resources": {"reservations": {"devices": [device]}}}}
    else:
        service |= {"shm_size": "4gb", "cap_add": ["SYS_NICE"]}
    content = _literal(config_text(what))
    data = {"services": {what.name: service}, "configs": {"serving": {"content": content}}}
    return what.header() + comments(_secrets(what)) + dump(data)


def kubernetes(what: Deployment) -> str:
    """A ConfigMap with the config file, a Deployment of one replica and its Service."""
    repository, tag = image(what)
    labels = {"app.kubernetes.io/name": what.name, "app.kubernetes.io/managed-by": "tuner"}
    select = {"app.kubernetes.io/name": what.name}
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 5}
    mounts = [{"name": "config", "mountPath": "/config"}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": what.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    env: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in what.env.items()]
    env.append(_secret("VLLM_API_KEY", f"{what.name}-secrets", "api-key"))
    notes = [f"Secret {what.name}-secrets may hold api-key (bearer key) and hf-token; both are optional."]
    notes += _secrets(what)
    if what.local_model:
        notes.append(f"PersistentVolumeClaim {what.name}-model must hold what was in {what.model} (create it first).")
        mounts.append({"name": "model", "mountPath": what.model})
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": f"{what.name}-model"}})
    else:
        env.append(_secret("HF_TOKEN", f"{what.name}-secrets", "hf-token"))
        mounts.append({"name": "cache", "mountPath": "/root/.cache/huggingface"})
        volumes.append({"name": "cache", "emptyDir": {}})
        notes.append("The model is downloaded at every start: put a PersistentVolumeClaim in place of 'cache'.")
    container: dict[str, Any] = {
        "name": "vllm",
        "image": f"{repository}:{tag}",
        "command": command(CONFIG),
        "env": env,
        "ports": [{"name": "http", "containerPort": 8000}],
        "startupProbe": probe | {"failureThreshold": math.ceil(start_limit_s(what) / 10)},
        "readinessProbe": probe,
        "livenessProbe": probe | {"failureThreshold": 6},
        "volumeMounts": mounts,
    }
    if what.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": what.gpus}}
    pod = {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 60}
    objects = [
        _object("v1", "ConfigMap", what.name, labels) | {"data": {YAML_NAME: config_text(what)}},
        _object("apps/v1", "Deployment", what.name, labels)
        | {
            "spec": {
                "replicas": 1,
                "progressDeadlineSeconds": start_limit_s(what) + 600,  # an image of some 10 GB is pulled before
                "selector": {"matchLabels": select},
                "template": {"metadata": {"labels": labels, "annotations": _checksum(what)}, "spec": pod},
            }
        },
        _object("v1", "Service", what.name, labels)
        | {"spec": {"selector": select, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}},
    ]
    return what.header() + comments(notes) + "---\n".join(dump(item) for item in objects)


def helm(what: Deployment) -> str:
    """Values for vLLM's production-stack chart, which builds the command line itself: it adds
    ``--no-enable-prefix-caching`` unless told otherwise, so that switch is always written; the rest are extra
    arguments. It makes labels of the release's and the model's name and up to 16 letters of its own, 63 in all."""
    repository, tag = image(what)
    flags = {**what.served, **what.flags}
    caching = "no-enable-prefix-caching" not in flags
    for name in ("enable-prefix-caching", "no-enable-prefix-caching"):
        flags.pop(name, None)
    vllm: dict[str, Any] = {"enablePrefixCaching": caching}
    if "tensor-parallel-size" in flags or what.gpus > 1:  # the chart adds /dev/shm with it: data parallel needs it too
        vllm["tensorParallelSize"] = int(flags.pop("tensor-parallel-size", 1) or 1)
    vllm["extraArgs"] = [_literal(word) for word in ServingConfig(what.model, {}, flags).args()]
    model: dict[str, Any] = {
        "name": what.name[:30].rstrip("-"),
        "repository": repository,
        "tag": tag,
        "modelURL": _literal(what.model),
        "replicaCount": 1,
        "requestCPU": 8,
        "requestMemory": "32Gi",
        "requestGPU": what.gpus,
        "vllmConfig": vllm,
        "env": [{"name": name, "value": _literal(value)} for name, value in what.env.items()],
    }
    if what.local_model:
        model |= {
            "extraVolumes": [{"name": "model", "persistentVolumeClaim": {"claimName": f"{what.name}-model"}}],
            "extraVolumeMounts": [{"name": "model", "mountPath": what.model}],
        }
    probe = {
        "initialDelaySeconds": 15,
        "periodSeconds": 10,
        "failureThreshold": math.ceil(start_limit_s(what) / 10),
        "httpGet": {"path": "/health", "port": 8000},
    }
    notes = [
        "helm repo add vllm https://vllm-project.github.io/production-stack",
        f"helm install {RELEASE} vllm/vllm-stack -f values.yaml",
        "(a release name of your own: at most 17 letters, since the chart makes host names of it and the model's name)",
        "A gated model needs hf_token in modelSpec, a bearer key vllmApiKey in servingEngineSpec: each is",
        f"{{secretName: ..., secretKey: ...}} of a Secret of yours (not {RELEASE}-secrets: the chart makes that).",
        *_secrets(what),
        "requestCPU and requestMemory are guesses for the node, not measured.",
    ]
    if what.local_model:
        notes.append(f"PersistentVolumeClaim {what.name}-model must hold what was in {what.model} (create it first).")
    spec: dict[str, Any] = {"enableEngine": True, "startupProbe": probe, "modelSpec": [model]}
    if not what.gpus:
        spec["runtimeClassName"] = ""  # the chart's own default is nvidia
    data = {"servingEngineSpec": spec}
    return what.header() + comments(notes) + dump(data)


def _literal(text: str) -> str:
    """``text`` for readers that put variables in: Compose at ``$NAME`` and ``${NAME}``, Kubernetes (in the values of
    variables, and in words of a command) at ``$(NAME)``. Both read ``$$`` as a dollar."""
    return text.replace("$", "$$")


def _checksum(what: Deployment) -> dict[str, str]:
    """What changes with the config file: neither Compose nor Kubernetes starts a container anew because a file that it
    is given has changed, and the old flags would go on being served."""
    return {CHECKSUM: hashlib.sha256(config_text(what).encode()).hexdigest()[:16]}


def _secrets(what: Deployment) -> list[str]:
    """A line for every secret of the study that has no place in the file."""
    names = [name for name in what.secrets if name not in ("HF_TOKEN", "VLLM_API_KEY")]
    return [f"{name} was set during the study and is a secret: set it yourself." for name in names]


def start_limit_s(what: Deployment) -> int:
    """How long a start may take before an orchestrator gives up: four times the measured one (a cold disk, a download),
    at least ten minutes. A limit below the real start makes a crash loop."""
    return max(600, math.ceil(what.boot_s * 4 / 10) * 10)


def _secret(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}


def _object(version: str, kind: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}}
