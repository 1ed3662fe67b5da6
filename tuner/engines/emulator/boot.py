"""Start-up: vLLM's phases, each as long as it would take, with the lines by which a launcher recognises them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from tuner.engines.emulator.console import VERSION, Console
from tuner.engines.emulator.faults import Faults
from tuner.engines.emulator.hardware import GIB, Gpu
from tuner.engines.emulator.memory import KvDoesNotFit, Memory, WeightsDoNotFit
from tuner.engines.emulator.settings import Settings
from tuner.engines.emulator.shape import Shape

# Bytes/s from storage to the GPU, and what each load format makes of it.
LOAD_BYTES_PER_S = {
    "auto": 2.2e9,
    "safetensors": 2.2e9,
    "runai_streamer": 4.0e9,
    "fastsafetensors": 6.0e9,
    "dummy": 40e9,
}

# Fault -> (who fails, vLLM's words). What a real server prints; the launcher has to make sense of it.
_FAILURES: Mapping[str, tuple[str, str]] = {
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
    "oom-profile": (
        "engine",
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
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


Planned = Memory | WeightsDoNotFit | KvDoesNotFit


class BootFailed(Exception):
    """The server does not come up; its last words are printed. ``code`` is the exit code."""

    def __init__(self, code: int = 1) -> None:
        super().__init__(f"exit {code}")
        self.code = code


class Boot:
    """Plays the start-up. ``scale`` is how many seconds pass per emulated second (0: none)."""

    def __init__(
        self, console: Console, faults: Faults, scale: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.console, self.faults, self.scale, self.sleep = console, faults, scale, sleep

    def fail(self, name: str) -> None:
        """Prints what fault ``name`` stands for and raises, if it was asked for."""
        if name in self.faults:
            who, text = _FAILURES[name]
            self.refuse(who, text)

    def refuse(self, who: str, text: str) -> NoReturn:
        """The last words of the engine core or the API server; raises :class:`BootFailed`."""
        if who == "engine":
            self.console.engine_failed(text, ("v1/engine/core.py", "v1/worker/gpu_worker.py"))
        else:
            self.console.server_failed(text, ("entrypoints/openai/api_server.py", "engine/arg_utils.py"))
        raise BootFailed

    def before_engine(self) -> None:
        """Imports and the reading of the configuration, with the failures that show there."""
        self._pause("imports", 7.0)
        for name in ("model-not-found", "gated-model", "custom-code", "invalid-combination"):
            self.fail(name)

    def engine(self, shape: Shape, s: Settings, gpu: Gpu, load_format: str, memory: Planned, model: str) -> None:
        """From the engine core's process to a server that is ready; prints and waits. ``memory`` is how it was divided,
        or why it could not be."""
        say = self.console.line
        self._children()
        say(f"Resolved architecture: {shape.name or 'Emulated'}", "model.py:733")
        say(f"Using max model len {s.max_model_len}", "model.py:2152")
        say(f"Chunked prefill is enabled with max_num_batched_tokens={s.max_num_batched_tokens}.", "scheduler.py:307")
        self._wait(6.0)
        say(
            f"Initializing a V1 LLM engine (v{VERSION}) with config: model='{model}', tensor_parallel_size={s.tp}, "
            f"pipeline_parallel_size={s.pp}, data_parallel_size={s.dp}, quantization={s.scheme or None}, "
            f"enforce_eager={s.eager}, kv_cache_dtype={s.kv_dtype}",
            "core.py:133",
            "EngineCore",
        )
        for name in ("no-gpu", "old-driver", "nccl", "gpu-busy"):
            self.fail(name)
        if s.tp > 1:
            self._wait(2.5)
        say(
            f"world_size={s.tp * s.pp} rank=0 local_rank=0 distributed_init_method=tcp://127.0.0.1:0 "
            f"backend={'gloo' if gpu.is_cpu else 'nccl'}",
            "parallel_state.py:1906",
            "Worker",
        )
        self._weights(shape, s, gpu, load_format, memory, model)

    def _weights(self, shape: Shape, s: Settings, gpu: Gpu, load_format: str, memory: Planned, model: str) -> None:
        say = self.console.line
        say(f"Starting to load model {model}...", "gpu_model_runner.py:5039", "Worker")
        per_gpu = shape.weight_bytes(shape.weight_bits) / (s.tp * s.pp)
        took = 0.3 + per_gpu * s.tp * s.pp / LOAD_BYTES_PER_S.get(load_format, 2.2e9)
        if s.weight_bits < shape.weight_bits:
            took *= 1.25  # quantized while it loads
        self._pause("weights", took)
        extra = self.faults.number("slow-boot", 5.0)
        if extra is not None:
            time.sleep(extra)
        if "killed" in self.faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if "silent-death" in self.faults:
            raise BootFailed(0)
        flood = self.faults.number("log-flood", 64)
        if flood is not None:
            for _ in range(int(flood * 1024)):
                say("x" * 950, "flood.py:1", "Worker", "WARNING")
        self.fail("oom-weights")
        if isinstance(memory, WeightsDoNotFit):
            self.refuse("engine", f"torch.OutOfMemoryError: {memory}")
        say(f"Loading weights took {took:.2f} seconds", "default_loader.py:501", "Worker")
        loaded = shape.weight_bytes(min(s.weight_bits, shape.weight_bits)) / (s.tp * s.pp) / GIB
        text = f"Model loading took {loaded:.2f} GiB memory and {took + 0.4:.6f} seconds"
        say(text, "gpu_model_runner.py:5149", "Worker")
        compiled = 0.0
        if not s.eager and not gpu.is_cpu:
            compiled = 4.0 + 0.35 * shape.layers
            self.fail("disk-full")
            self._pause("compile", compiled)
            say(f"Dynamo bytecode transform time: {compiled * 0.3:.2f} s", "backends.py:1166", "Worker")
            say(f"torch.compile took {compiled:.2f} s in total", "monitor.py:62", "Worker")
        self._pause("kv", 1.2)
        if isinstance(memory, KvDoesNotFit):
            self.refuse("engine", f"ValueError: {memory}")
        if not gpu.is_cpu:
            say(f"Available KV cache memory: {memory.kv_bytes / GIB:.2f} GiB", "gpu_worker.py:759", "Worker")
        for name in ("oom-no-kv", "oom-kv", "block-size"):
            self.fail(name)
        tokens = memory.tokens
        say(
            f"{'CPU' if gpu.is_cpu else 'GPU'} KV cache size: {tokens:,} tokens, Maximum concurrency for "
            f"{s.max_model_len:,} tokens per request: {tokens / s.max_model_len:.2f}x",
            "kv_cache_utils.py:2327",
            "EngineCore",
        )
        captured = 0.0
        if not s.eager and not gpu.is_cpu:
            captured = 0.06 * (8 + s.graph_tokens / 8)
            self._pause("graphs", captured)
            say(
                f"Graph capturing finished in {math.ceil(captured)} secs, took {memory.graph_bytes / GIB:.2f} GiB",
                "gpu_model_runner.py:6581",
                "Worker",
            )
        elif self.faults.word("hang") in ("graphs", "compile"):
            self._pause(self.faults.word("hang"), 0.0)
        self.fail("oom-profile")
        total = compiled + captured + 1.2
        say(
            f"init engine (profile, create kv cache, warmup model) took {total:.2f} s"
            + (f" (compilation: {compiled:.2f} s)" if compiled else ""),
            "core.py:402",
            "EngineCore",
        )
        self._pause("ready", 0.5)

    def _pause(self, phase: str, seconds: float) -> None:
        if self.faults.word("hang") == phase:
            time.sleep(10**6)
        self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        if self.scale > 0:
            self.sleep(seconds * self.scale)

    def _children(self) -> None:
        count = self.faults.number("leave-children", 2)
        if count is None:
            return
        code = "import signal,time;signal.signal(signal.SIGTERM,signal.SIG_IGN);time.sleep(600)"
        for _ in range(int(count)):
            subprocess.Popen([sys.executable, "-S", "-E", "-c", code], start_new_session=True)
