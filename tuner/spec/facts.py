"""Facts of machine, model and trace that a search space's conditions, rules and defaults may name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.engines.modelfolder import local_model
from tuner.errors import UsageError
from tuner.server.gpu import Gpus
from tuner.space.condition import meant
from tuner.space.config import number

if TYPE_CHECKING:
    from tuner.search.hardware import Hardware
    from tuner.spec.study import EngineSpec

FACTS: Mapping[str, str] = {
    "platform": "cuda or cpu",
    "gpus": "how many GPUs the study may use (0 on a CPU server)",
    "gpu_name": "the GPU's row in the hardware table",
    "gpu_memory_gib": "memory of one GPU",
    "fewest_gpus": "of several GPUs, the fewest (1, 2, 4, ...) with room for the engine's defaults, else all",
    "compute_capability": "9.0 for Hopper; absent on CPUs",
    "cpu_cores": "cores this process may use",
    "memory_gib": "the host's memory",
    "native_dtype": "bfloat16; float32 on a CPU without AVX-512, where bfloat16 is emulated, some 20 times slower",
    "max_model_len": "longest request the servers take, in tokens",
    "architecture": "the class that the model's config names first (LlamaForCausalLM)",
    "num_heads": "attention heads",
    "num_kv_heads": "KV heads",
    "hidden_size": "width of the model",
    "num_layers": "layers",
    "vocab_size": "size of the vocabulary",
    "moe": "true for a mixture of experts",
    "mla": "true where attention keeps one latent vector per token (DeepSeek's)",
    "num_experts": "experts per layer",
    "quantized": "true where the model as given is quantized already",
    "draft_model": "the study's draft model, where it names one",
    "eagle_model": "the study's EAGLE head, where it names one",
    "dummy_weights": "true with --load-format dummy",
    "max_input_tokens": "longest prompt of the trace",
    "max_output_tokens": "longest answer of the trace",
    "max_total_tokens": "longest request of the trace, prompt and answer",
}

# the facts that are one of a few words
WORDS: Mapping[str, tuple[str, ...]] = {"platform": ("cuda", "cpu"), "native_dtype": ("bfloat16", "float32")}
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")  # as families name their number


def of_model(model: str) -> dict[str, Any]:
    """Facts from the model folder's ``config.json``; fewer where the model is an id that is not on this machine."""
    facts: dict[str, Any] = {}
    config = model_config(model)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and nested else config
    names = {
        "num_heads": ("num_attention_heads", "n_head"),
        "num_kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
        "hidden_size": ("hidden_size", "n_embd"),
        "num_layers": ("num_hidden_layers", "n_layer"),
        "vocab_size": ("vocab_size",),
        "max_model_len": ("max_position_embeddings", "n_positions"),
        "num_experts": EXPERTS,
    }
    for fact, keys in names.items():
        said = (text.get(key) for key in keys)
        numbers = (n for value in said for n in (value if isinstance(value, list) else (value,)))  # a list: of layers
        value = next((n for n in numbers if isinstance(n, int)), None)
        if value is not None:
            facts[fact] = value
    if isinstance(named := config.get("architectures"), list) and named and isinstance(named[0], str):
        facts["architecture"] = named[0]
    if config:
        facts["moe"] = facts.get("num_experts", 0) > 1
        facts["mla"] = mla(text)
        facts["quantized"] = bool(config.get("quantization_config") or text.get("quantization_config"))
    return facts


def mla(text: Mapping[str, Any]) -> bool:
    """Whether attention keeps one latent vector per token, by the model's (text) config."""
    return bool(text.get("kv_lora_rank") and text.get("use_mla", True))


def of_flags(flags: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that the flags of every server settle; ``known`` are the facts that a flag may name (``$...``)."""
    said = {name: meant(value, known) for name, value in flags.items()}
    facts: dict[str, Any] = {"dummy_weights": said.get("load-format") == "dummy"}
    for name in ("max-model-len", "context-length"):  # vLLM's name and SGLang's
        length = number(said.get(name))
        if length is not None and length > 0:  # -1 and auto: the engine's affair
            facts["max_model_len"] = int(length)
    return facts


def fewest_gpus(
    model: str, row: Hardware | None, gpus: int, engine: EngineSpec, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Of ``gpus`` of the type ``row``, the fewest on which tensor parallelism leaves the memory arithmetic room for the
    model, with the defaults of the ``engine`` and its flags of every server, or as many as it can be split over;
    ``known`` are the facts that flags may name. Nothing where there is one GPU, the flags say a size, or too little is
    known."""
    from tuner.search.model.shape import ModelShape
    from tuner.space.config import ServingConfig
    from tuner.space.memory import fits
    from tuner.space.space import SIZES

    if gpus < 2 or row is None or {*SIZES} & {*engine.args}:
        return {}
    try:
        shape = ModelShape.from_folder(model)
    except UsageError:
        return {}
    said = {name: meant(value, known) for name, value in engine.args.items()}
    sizes = [2**k for k in range(gpus.bit_length()) if shape.heads % 2**k == 0]
    configs = {n: ServingConfig(model, {}, {**said, "tensor-parallel-size": n}, gpus=n) for n in sizes}
    return {"fewest_gpus": next((n for n in sizes if fits(shape, row, configs[n], engine.read_as).fits), sizes[-1])}


def model_config(model: str) -> dict[str, Any]:
    """The model's ``config.json``: from its folder, or from the local Hugging Face cache; empty where there is none.
    Raises UsageError where it cannot be read."""
    folder = local_model(model)
    if folder is None:
        return {}
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot read the model's config: {error}", where=str(path), fix="Fetch the model's files again"
        ) from error
    return data if isinstance(data, dict) else {}


def of_machine() -> dict[str, Any]:
    """Cores and memory of this host."""
    import psutil

    return {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "native_dtype": "bfloat16" if of_gpus() or cpu_flags() & {"avx512f", "amx_bf16", "bf16"} else "float32",
    }


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this machine's processor, as Linux names them; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def of_trace(input_tokens: Any, output_tokens: Any) -> dict[str, Any]:
    """Facts of a trace's lengths (arrays of tokens)."""
    return {
        "max_input_tokens": int(input_tokens.max()),
        "max_output_tokens": int(output_tokens.max()),
        "max_total_tokens": int((input_tokens + output_tokens).max()),
    }


def of_gpus() -> dict[str, Any]:
    """How many NVIDIA GPUs this process may use, and the first one's compute capability; empty without any."""
    gpus = Gpus()
    mine = gpus.visible()
    if not mine:
        return {}
    capability = gpus.compute_capability(mine[0])
    return {"gpus": len(mine)} | ({"compute_capability": capability} if capability else {})
