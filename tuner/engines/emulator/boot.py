"""Start-up: vLLM's phases, each as long as it would take, with the lines by which a launcher recognises them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from tuner.engines.emulator.console import VERSION, Console
from tuner.engines.emulator.faults import Faults
from tuner.engines.emulator.hardware import GIB, Gpu
from tuner.engines.emulator.lastwords import LAST_WORDS
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
            who, text = LAST_WORDS[name]
            self.refuse(who, text)

    def refuse(self, who: str, text: str) -> NoReturn:
        """The last words of the engine core or the API server; raises :class:`BootFailed`."""
        if who == "engine":
            self.console.engine_failed(text, ("v1/engine/core.py", "v1/worker/gpu_worker.py"))
        else:
            self.console.server_failed(text, ("entrypoints/openai/api_server.py", "engine/arg_utils.py"))
        raise BootFailed

    def imports(self) -> None:
        """Before the first line of log."""
        self._pause("imports", 7.0)

    def config(self) -> None:
        """The configuration is read, with the failures that show there."""
        for name in ("model-not-found", "gated-model", "custom-code", "invalid-combination"):
            self.fail(name)
        self._pause("config", 1.0)

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
        self._pause("engine", 2.5 if s.tp > 1 else 0.5)
        say(
            f"world_size={s.tp * s.pp} rank=0 local_rank=0 distributed_init_method=tcp://127.0.0.1:0 "
            f"backend={'gloo' if gpu.is_cpu else 'nccl'}",
            "parallel_state.py:1906",
            "Worker",
        )
        self._weights(shape, s, load_format, memory, model)
        compiled = self._profile(shape, s, gpu, memory)
        captured = self._graphs(s, gpu, memory)
        total = compiled + captured + 1.2
        say(
            f"init engine (profile, create kv cache, warmup model) took {total:.2f} s"
            + (f" (compilation: {compiled:.2f} s)" if compiled else ""),
            "core.py:402",
            "EngineCore",
        )
        self._pause("api", 0.5)

    def _weights(self, shape: Shape, s: Settings, load_format: str, memory: Planned, model: str) -> None:
        say = self.console.line
        say(f"Starting to load model {model}...", "gpu_model_runner.py:5039", "Worker")
        took = 0.3 + shape.weight_bytes(shape.weight_bits) / LOAD_BYTES_PER_S.get(load_format, 2.2e9)
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
                say("x" * 1000, "flood.py:1", "Worker", "WARNING")
        self.fail("oom-weights")
        if isinstance(memory, WeightsDoNotFit):
            self.refuse("engine", f"torch.OutOfMemoryError: {memory}")
        say(f"Loading weights took {took:.2f} seconds", "default_loader.py:501", "Worker")
        loaded = shape.weight_bytes(min(s.weight_bits, shape.weight_bits)) / (s.tp * s.pp) / GIB
        text = f"Model loading took {loaded:.2f} GiB memory and {took + 0.4:.6f} seconds"
        say(text, "gpu_model_runner.py:5149", "Worker")

    def _profile(self, shape: Shape, s: Settings, gpu: Gpu, memory: Planned) -> float:
        """Compilation, the largest batch, and what is left for the KV cache; returns the seconds of compilation."""
        say = self.console.line
        compiled = 0.0 if s.eager or gpu.is_cpu else 4.0 + 0.35 * shape.layers
        self.fail("disk-full")
        self._pause("compile", compiled)
        self.fail("oom-activations")
        if compiled:
            say(f"Dynamo bytecode transform time: {compiled * 0.3:.2f} s", "backends.py:1166", "Worker")
            say(f"torch.compile took {compiled:.2f} s in total", "monitor.py:62", "Worker")
        if isinstance(memory, KvDoesNotFit):
            self.refuse("engine", f"ValueError: {memory}")
        kv_bytes = memory.kv_bytes if isinstance(memory, Memory) else 0
        kind = f"Available KV cache memory: {kv_bytes / GIB:.2f} GiB"
        if gpu.is_cpu:
            kind = f"Explicitly set ({kv_bytes / GIB:.1f}/{gpu.memory_bytes / GIB:.2f}) GiB for KV cache on node 0."
        say(kind, "gpu_worker.py:759", "Worker")
        self._pause("kv", 1.0)
        for name in ("oom-no-kv", "oom-kv", "block-size"):
            self.fail(name)
        return compiled

    def _graphs(self, s: Settings, gpu: Gpu, memory: Planned) -> float:
        """KV blocks, first steps and CUDA graphs; returns the seconds of their capture."""
        say = self.console.line
        tokens = memory.tokens if isinstance(memory, Memory) else 0
        say(
            f"{'CPU' if gpu.is_cpu else 'GPU'} KV cache size: {tokens:,} tokens, Maximum concurrency for "
            f"{s.max_model_len:,} tokens per request: {tokens / s.max_model_len:.2f}x",
            "kv_cache_utils.py:2327",
            "EngineCore",
        )
        self._pause("warmup", 0.2)
        self.fail("oom-warmup")
        if s.eager or gpu.is_cpu:
            return 0.0
        captured = 0.06 * (8 + s.graph_tokens / 8)
        self.console.raw(f"(Worker pid={os.getpid()}) Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|")
        self._pause("graphs", captured)
        self.fail("oom-graphs")
        graph_bytes = memory.graph_bytes if isinstance(memory, Memory) else 0
        text = f"Graph capturing finished in {math.ceil(captured)} secs, took {graph_bytes / GIB:.2f} GiB"
        say(text, "gpu_model_runner.py:6581", "Worker")
        return captured

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
