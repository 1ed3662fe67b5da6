"""Model folders: where a model lies on this disk, and quantized variants of one for dummy weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import UsageError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def _compressed(kind: str, form: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


#: ``quantization_config`` per variant, as the tools that make such checkpoints write it.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "w8a8-int8": _compressed("int", "int-quantized"),
    "w8a8-fp8": _compressed("float", "float-quantized"),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "gptq-int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq-int4": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}


def local_model(model: str, env: Mapping[str, str] | None = None) -> Path | None:
    """The folder that holds a model: ``model`` itself, or the newest snapshot in the Hugging Face cache; else None."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    snapshots = hub_cache(os.environ if env is None else env) / f"models--{model.replace('/', '--')}" / "snapshots"
    found = [path.parent for path in snapshots.glob("*/config.json")] if model.count("/") <= 1 else []
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def hub_cache(env: Mapping[str, str]) -> Path:
    """Where the Hugging Face client keeps what it downloads."""
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(env.get("HF_HUB_CACHE") or home / "hub")


def variant(model: str, name: str, models: Path) -> Path:
    """Writes (once) the variant ``name`` of a local model below ``models`` and returns its folder.

    The folder links to everything but the weights, and its ``config.json`` carries the variant's quantization: made
    for ``--load-format dummy``. Raises ``UsageError`` for an unknown variant, a model that is not on this disk, or one
    that is quantized already.
    """
    quantization = VARIANTS.get(name)
    if quantization is None:
        raise UsageError(f"unknown model variant {name!r}", fix=f"known ones: {', '.join(VARIANTS)}")
    source = local_model(model)
    if source is None:
        raise UsageError(f"model {model} is not on this disk, so no {name} variant of it can be written")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise UsageError(f"{model} is quantized already", fix=f"take {name} out of the search space")
    target = models / f"{source.name}-{name}"
    if (target / "config.json").is_file():
        return target
    half = models / f".{target.name}.{os.getpid()}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "config.json" and not file.name.endswith(_WEIGHTS):
            (half / file.name).symlink_to(file.resolve())
    text = json.dumps({**config, "quantization_config": dict(quantization)}, indent=1)
    (half / "config.json").write_text(text, encoding="utf-8")
    try:
        half.rename(target)
    except OSError:  # another thread was faster
        shutil.rmtree(half, ignore_errors=True)
    return target
