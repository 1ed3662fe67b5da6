"""What vLLM 0.32 and what lies below it print when a server cannot start: the texts of the injected faults."""

from __future__ import annotations

from collections.abc import Mapping

# Fault -> (who fails, vLLM's words). What a real server prints; the launcher has to make sense of it.
LAST_WORDS: Mapping[str, tuple[str, str]] = {
    "oom-weights": (
        "engine",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of 79.18 "
        "GiB of which 116.56 MiB is free. Including non-PyTorch memory, this process has 79.05 GiB memory in use. Of "
        "the allocated memory 78.43 GiB is allocated by PyTorch, and 12.34 MiB is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
        "fragmentation.",
    ),
    "oom-kv": (
        "engine",
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (9.31 GiB). Based on the available memory, the "
        "estimated maximum model length is 76256. Try increasing `gpu_memory_utilization` (which also controls CPU "
        "memory on the CPU backend) or decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
    ),
    "oom-no-kv": (
        "engine",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its "
        "name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
    ),
    "oom-warmup": (
        "engine",
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
    ),
    "oom-activations": (
        "engine",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 79.18 "
        "GiB of which 1.75 GiB is free. Including non-PyTorch memory, this process has 77.42 GiB memory in use.",
    ),
    "oom-graphs": (
        "engine",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 79.18 "
        "GiB of which 96.50 MiB is free. Including non-PyTorch memory, this process has 79.07 GiB memory in use.",
    ),
    "gpu-busy": (
        "engine",
        "ValueError: Free memory on device cuda:0 (10.21/79.18 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.85 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    ),
    "block-size": ("engine", "ValueError: No common block size for 8 (FLASH_ATTN: [MultipleOf(16)])."),
    "invalid-combination": (
        "server",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
        "  Value error, max_num_batched_tokens (64) must be greater than or equal to max_num_seqs (256). "
        "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n"
        "    For further information visit https://errors.pydantic.dev/2.13/v/value_error",
    ),
    "model-not-found": (
        "server",
        "OSError: no/such-model is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'\nIf this is a private repository, make sure to pass a token having permission "
        "to this repo either by logging in with `hf auth login` or by passing `token=<your_token>`",
    ),
    "gated-model": (
        "server",
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct.\n401 Client Error.",
    ),
    "custom-code": (
        "server",
        "ValueError: The repository some/model contains custom code which must be executed to correctly load the "
        "model. You can inspect the repository content at https://hf.co/some/model.\nPlease pass the argument "
        "`trust_remote_code=True` to allow custom code to be run.",
    ),
    "no-gpu": ("engine", "RuntimeError: No CUDA GPUs are available"),
    "old-driver": (
        "engine",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
        "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
    ),
    "nccl": (
        "engine",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error (run "
        "with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error.",
    ),
    "disk-full": ("engine", "OSError: [Errno 28] No space left on device"),
    "port-taken": ("server", "OSError: [Errno 98] Address already in use"),
}
