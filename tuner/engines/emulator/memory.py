"""Where a GPU's memory goes at start-up, and the two ways in which it does not suffice."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.engines.emulator.hardware import GIB, Gpu
from tuner.engines.emulator.settings import Settings
from tuner.engines.emulator.shape import Shape


class WeightsDoNotFit(Exception):
    """The weights alone are too large; the text is torch's."""


class KvDoesNotFit(Exception):
    """No room is left for the KV cache of one longest request; the text is vLLM's."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per GPU; ``blocks`` is how many KV blocks one replica has, ``slack_bytes`` what is left outside vLLM's
    share for what grows under load."""

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    kv_bytes: int
    blocks: int
    tokens: int
    slack_bytes: int


def kv_bytes_per_token(shape: Shape, s: Settings) -> float:
    """Bytes that one token keeps on one GPU: all layers that keep KV, divided by TP as far as there are KV heads."""
    split = 1 if shape.mla else min(s.tp, shape.kv_heads)
    layers = (shape.full_layers + shape.window_layers) / s.pp
    return layers * shape.kv_elements / split * s.kv_bits / 8


def longest_request_bytes(shape: Shape, s: Settings, tokens: int) -> float:
    """KV bytes of one request of ``tokens``; a windowed layer keeps its window and one prefill chunk."""
    per_layer = kv_bytes_per_token(shape, s) / max(shape.full_layers + shape.window_layers, 1)
    windowed = min(tokens, shape.window + s.max_num_batched_tokens) if shape.window else tokens
    return per_layer * (shape.full_layers * tokens + shape.window_layers * windowed)


def plan(shape: Shape, s: Settings, gpu: Gpu) -> Memory:
    """Divides the memory of one GPU as vLLM's profiling run does.

    Raises :class:`WeightsDoNotFit` or :class:`KvDoesNotFit`.
    """
    bits = min(s.weight_bits, shape.weight_bits)
    weights = shape.weight_bytes(bits) - shape.expert_bytes(bits) * (1 - 1 / s.sharing(shape))
    weights /= s.tp * s.pp
    if s.draft:
        weights *= 1 + s.draft.cost
    if gpu.is_cpu:
        available = float(s.kv_bytes or 4 * GIB)
        return _blocks(shape, s, weights, 0.0, 0.0, available, GIB)
    # Online quantization loads the wide weights layer by layer; the CUDA context and NCCL take their share first.
    context = (0.45 + (0.55 if s.tp > 1 else 0.0)) * GIB
    if weights + context > gpu.memory_bytes:
        free = max(gpu.memory_bytes - context - weights % (2 * GIB), 0) % GIB
        raise WeightsDoNotFit(
            f"CUDA out of memory. Tried to allocate {_gib(2 * shape.hidden * shape.vocab / s.tp)}. GPU 0 has a total "
            f"capacity of {_gib(gpu.memory_bytes)} of which {free / 2**20:.2f} MiB is free. Including non-PyTorch "
            f"memory, this process has {_gib(gpu.memory_bytes - free)} memory in use. Of the allocated memory "
            f"{_gib(gpu.memory_bytes - free - context)} is allocated by PyTorch, and 12.34 MiB is reserved by PyTorch "
            "but unallocated."
        )
    widest = max(shape.dense_mlp, shape.expert * max(shape.experts_per_token, 1)) / (3 * shape.hidden)
    activation = s.max_num_batched_tokens * (6 * shape.hidden + 3 * widest / s.tp + 2 * shape.hidden) * 2
    activation += s.max_num_seqs * shape.vocab * (4 + 4) * (1 + (s.draft.tokens if s.draft else 0) * 0.5)
    graphs = 0.0 if s.eager else (0.25 + 0.0021 * s.graph_tokens) * GIB * (1.3 if s.tp > 1 else 1.0)
    available = s.memory_share * gpu.memory_bytes - weights - context - activation - graphs
    if s.kv_bytes:
        available = float(s.kv_bytes)
    return _blocks(shape, s, weights, activation, graphs, available, (1 - s.memory_share) * gpu.memory_bytes)


def _blocks(
    shape: Shape, s: Settings, weights: float, activation: float, graphs: float, available: float, slack: float
) -> Memory:
    if available <= 0:
        raise KvDoesNotFit(
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the "
            "engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    needed = longest_request_bytes(shape, s, s.max_model_len)
    per_token = needed / s.max_model_len
    if needed > available:
        fits = int(available / max(kv_bytes_per_token(shape, s), 1e-9)) // s.block_size * s.block_size
        raise KvDoesNotFit(
            f"To serve at least one request with the model's max seq len ({s.max_model_len}), ({needed / GIB:.2f} GiB "
            f"KV cache is needed, which is larger than the available KV cache memory ({available / GIB:.2f} GiB). "
            f"Based on the available memory, the estimated maximum model length is {fits}. Try increasing "
            "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing "
            "`max_model_len` when initializing the engine. See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    blocks = s.kv_blocks or (int(available / (per_token * s.block_size)) if per_token else 2**20)
    if blocks * s.block_size < s.max_model_len:
        raise KvDoesNotFit(
            f"To serve at least one request with the model's max seq len ({s.max_model_len}), ({needed / GIB:.2f} GiB "
            f"KV cache is needed, which is larger than the available KV cache memory "
            f"({blocks * s.block_size * per_token / GIB:.2f} GiB)."
        )
    return Memory(
        int(weights), int(activation), int(graphs), int(available), blocks, blocks * s.block_size, int(max(slack, 0))
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
