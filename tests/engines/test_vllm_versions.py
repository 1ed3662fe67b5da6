"""Start-up lines and refusals of vLLM 0.25.1 to 0.33.0, as each version's sources print them, read alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tuner.engines.vllmlog import DIALECT
from tuner.server.bootlog import GIB, BootLog
from tuner.server.diagnosis import Evidence, diagnose

VERSIONS = ("0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


def number(version: str) -> int:
    """0.25.1 is 25."""
    return int(version.split(".")[1])


@dataclass(frozen=True)
class Line:
    """What ``builds`` of the versions ``since`` to ``until`` (0.25 is 25) print, from that file of their sources.

    Builds: ``cuda`` has the first model runner, ``cuda2`` the second, ``cudakv`` the second with kv-cache-memory-bytes
    given, ``cpu`` a stated cache, ``cpuauto`` a share of the memory. ``begins`` is the phase that starts with it.
    """

    source: str
    text: str
    builds: str = "cuda cuda2 cudakv cpu cpuauto"
    begins: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    since: int = 25
    until: int = 33


CUDA, CPU = "cuda cuda2 cudakv", "cpu cpuauto"
TOOK = "init engine (profile, create kv cache, warmup model) took 26.11 s"
LINES = [
    Line("entrypoints/serve/utils/api_utils.py", "non-default args: {'model': 'm'}", begins="config", until=32),
    Line("entrypoints/common/startup.py", "non-default args: {'model': 'm'}", begins="config", since=33),
    Line("config/model.py", "Resolved architecture: Qwen3ForCausalLM"),
    Line("config/model.py", "Using max model len 8192", facts={"max_model_len": 8192}),
    Line("config/scheduler.py", "Chunked prefill is enabled with max_num_batched_tokens=2048.",
         facts={"max_num_batched_tokens": 2048}),
    Line("v1/engine/core.py", "Initializing a V1 LLM engine (v0.30.0) with config: model='m', max_model_len=8192",
         begins="engine"),
    Line("v1/worker/gpu_model_runner.py", "Starting to load model m...", "cuda", begins="weights"),
    Line("v1/worker/gpu/model_runner.py", "Loading model from scratch...", "cuda2 cudakv", begins="weights"),
    Line("v1/worker/cpu_model_runner.py", "Starting to load model m...", CPU, begins="weights"),
    Line("model_executor/model_loader/base_loader.py", "Initializing model took 0.412345 seconds", since=32),
    Line("model_executor/model_loader/weight_utils.py", "Loading safetensors checkpoint shards:  50% Completed | 1/2"),
    Line("model_executor/model_loader/default_loader.py", "Loading weights took 24.84 seconds",
         facts={"weights_load_s": 24.84}),
    Line("v1/worker/gpu_model_runner.py", "Model loading took 12.66 GiB memory and 31.657031 seconds", "cuda",
         "compile", {"weights_bytes": 12.66 * GIB, "model_load_s": 31.657031}),
    Line("v1/worker/gpu/model_runner.py", "Model loading took 12.66 GiB and 31.657031 seconds", "cuda2 cudakv",
         "compile", {"weights_bytes": 12.66 * GIB, "model_load_s": 31.657031}, until=27),
    Line("v1/worker/gpu/model_runner.py", "Model loading took 12.66 GiB memory and 31.657031 seconds", "cuda2 cudakv",
         "compile", {"weights_bytes": 12.66 * GIB, "model_load_s": 31.657031}, since=28),
    Line("v1/worker/cpu_model_runner.py", "Warming up model for the compilation...", CPU, "compile"),
    Line("compilation/monitor.py", "[backbone] Starting torch.compile", since=32),
    Line("compilation/backends.py", "Dynamo bytecode transform time: 3.54 s", until=31),
    Line("compilation/backends.py", "[backbone] Dynamo bytecode transform time: 3.54 s", since=32),
    Line("compilation/monitor.py", "torch.compile took 14.20 s in total", facts={"compile_s": 14.2}, until=31),
    Line("compilation/monitor.py", "[backbone] torch.compile took 14.20 s in total", facts={"compile_s": 14.2},
         since=32),
    Line("v1/worker/gpu_worker.py", "Available KV cache memory: 53.21 GiB", "cuda cuda2", "kv",
         {"kv_cache_bytes": 53.21 * GIB}),
    Line("v1/worker/gpu_worker.py", "Initial free memory 78.20 GiB, reserved 53.21 GiB memory for KV Cache as "
         "specified by kv_cache_memory_bytes config and skipped memory profiling.", "cudakv", "kv",
         {"kv_cache_bytes": 53.21 * GIB}),
    Line("v1/worker/cpu_worker.py", "Explicitly set (53.21/125.6) GiB for KV cache on node 0.", "cpu", "kv",
         {"kv_cache_bytes": 53.21 * GIB}),
    Line("v1/worker/cpu_worker.py", "Auto set (53.21/125.6) GiB for KV cache on node 0, with 60.0 GiB requested memory "
         "for the worker. 6.79 GiB memory was consumed by non-kv usages.", "cpuauto", "kv",
         {"kv_cache_bytes": 53.21 * GIB}),
    Line("v1/core/kv_cache_utils.py", "GPU KV cache size: 1,245,184 tokens", begins="warmup",
         facts={"kv_cache_tokens": 1245184}, until=27),
    Line("v1/core/kv_cache_utils.py", "Maximum concurrency for 8,192 tokens per request: 152.00x",
         facts={"max_concurrency": 152}, until=27),
    Line("v1/core/kv_cache_utils.py", "GPU KV cache size: 1,245,184 tokens, Maximum concurrency for 8,192 tokens per "
         "request: 152.00x", "cuda cuda2 cudakv cpu cpuauto", "warmup",
         {"kv_cache_tokens": 1245184, "max_concurrency": 152}, since=28, until=29),
    Line("v1/core/kv_cache_utils.py", "GPU KV cache size: 1,245,184 tokens, Maximum concurrency for 8,192 tokens per "
         "request: 152.00x", CUDA, "warmup", {"kv_cache_tokens": 1245184, "max_concurrency": 152}, since=30),
    Line("v1/core/kv_cache_utils.py", "CPU KV cache size: 1,245,184 tokens, Maximum concurrency for 8,192 tokens per "
         "request: 152.00x", CPU, "warmup", {"kv_cache_tokens": 1245184, "max_concurrency": 152}, since=30),
    Line("v1/worker/gpu_model_runner.py", "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|####| 51/51",
         "cuda", "graphs"),
    Line("v1/worker/gpu/cudagraph_utils.py", "Capturing CUDA graphs (FULL):  10%|#   | 5/51", "cuda2 cudakv", "graphs"),
    Line("v1/worker/gpu_model_runner.py", "Graph capturing finished in 6 secs, took 0.52 GiB", CUDA,
         facts={"graph_capture_s": 6, "graph_bytes": 0.52 * GIB}),
    Line("v1/engine/core.py", TOOK, "cpu", "api", {"init_s": 26.11}),
    Line("v1/engine/core.py", TOOK + " (compilation: 14.20 s)", "cuda cuda2 cpuauto", "api",
         {"init_s": 26.11, "compile_s": 14.2}),
    Line("v1/engine/core.py", TOOK + " (compilation: 14.20 s — language_model: 13.20 s, encoder: 1.00 s)", "cudakv",
         "api", {"init_s": 26.11, "compile_s": 14.2}),
]  # fmt: skip
BUILDS = ("cuda", "cuda2", "cudakv", "cpu", "cpuauto")


def printed(version: str, line: Line) -> str:
    """With the prefix that version's logger gives it; progress bars have none."""
    if "%" in line.text:
        return line.text
    where = f"[{line.source.rpartition('/')[2]}:123]"
    return f"(EngineCore pid=9) INFO 11-25 20:59:01 {where} {line.text}"


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_versions_start_up_has_its_phases_and_facts(version: str, build: str):
    told = [line for line in LINES if build in line.builds.split() and line.since <= number(version) <= line.until]
    log = BootLog(DIALECT, 0.0)
    for second, line in enumerate(told, start=1):
        begun = log.feed([printed(version, line)], float(second))
        assert begun == ([line.begins] if line.begins else []), f"{line.source}: {line.text}"
    graphs = () if build.startswith("cpu") else ("graphs",)
    phases = ["imports", "config", "engine", "weights", "compile", "kv", "warmup", *graphs, "api"]
    boot = log.boot(99.0)
    assert list(boot.phases_s) == phases
    expected: dict[str, float] = {}
    for line in told:
        expected = line.facts | expected  # the first to say a fact is believed
    assert boot.facts == pytest.approx(expected)


@dataclass(frozen=True)
class Refusal:
    """What versions ``since`` to ``until`` print when they cannot serve, and what it means."""

    source: str
    text: str
    cause: str
    short: float | None = None
    since: int = 25
    until: int = 33
    phase: str = "kv"


KV = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (9.5 GiB). Try increasing `gpu_memory_utilization`"
)
NODE = (
    "ValueError: Available memory on node 0 (3.5/15.6 GiB) on kv cache allocation is less than requested memory for kv "
)
REFUSALS = [
    Refusal("v1/core/kv_cache_utils.py", KV, "oom-kv", 6.5, until=32),
    Refusal("v1/core/kv_cache_planning.py", KV, "oom-kv", 6.5, since=33),
    Refusal("v1/worker/utils.py", "ValueError: Free memory on device cuda:0 (12.5/79.1 GiB) on startup is less than "
            "desired GPU memory utilization (0.9, 71.19 GiB). Decrease GPU memory utilization", "memory-taken", 58.69),
    Refusal("v1/worker/utils.py", "ValueError: Free memory on device cuda:0 (12.5/79.1 GiB) on startup is less than "
            "the engine's budget after excluding external process's weights (0.9, 71.19 GiB).", "memory-taken", 58.69,
            since=32),
    Refusal("v1/worker/cpu_worker.py", NODE + "(4.0 GiB). Decrease --kv-cache-memory-bytes", "oom-kv", 0.5),
    Refusal("v1/worker/cpu_worker.py", NODE + "(4.0/6.2 GiB). Reduce CPU memory used by other", "oom-kv", 0.5),
    Refusal("v1/worker/cpu_worker.py", NODE + "(-1.2/6.2 GiB). Reduce CPU memory used by other processes.",
            "oom-weights", until=32),
    Refusal("v1/worker/cpu_worker.py", "ValueError: The worker already uses 7.5 GiB (model weights and runtime), more "
            "than the 6.2 GiB of CPU memory reserved for it on node 0, leaving none for the KV cache.", "oom-weights",
            1.3, since=33),
    Refusal("v1/worker/utils.py", "ValueError: No common block size for 16. ", "invalid-combination", until=29),
    Refusal("v1/worker/utils.py", "ValueError: No common block size for 16.", "invalid-combination", since=30,
            until=30),
    Refusal("v1/worker/utils.py", "ValueError: No common block size for 16 (CPU_ATTN: [MultipleOf(32)]).",
            "invalid-combination", since=31),
    Refusal("v1/executor/multiproc_executor.py", "ERROR 11-25 20:59:01 [multiproc_executor.py:123] Worker proc "
            "VllmWorker-0 died unexpectedly, shutting down executor.", "killed", until=25),
    Refusal("v1/executor/multiproc_executor.py", "ERROR 11-25 20:59:01 [multiproc_executor.py:123] Worker proc "
            "VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.", "killed", since=26),
    Refusal("v1/attention/backends/cpu_attn.py", "NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 "
            "or AMX.", "no-kernel"),
    Refusal("v1/attention/backends/triton_attn.py", "ValueError: FP8 KV cache is not supported by the Triton attention "
            "backend on NVIDIA A100 (compute capability 8.0); native FP8 (fp8e4nv) requires SM89+.", "no-kernel"),
    Refusal("v1/engine/core_client.py", "TimeoutError: Timed out waiting for new engine core processes to start. "
            "Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).", "hang", phase="weights"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.cause)
def test_every_versions_refusal_is_recognised(row: Refusal):
    log = f"(EngineCore pid=9) {row.text}\n(APIServer pid=1) RuntimeError: Engine core initialization failed."
    found = diagnose(Evidence(log, 1, row.phase))
    assert found.cause == row.cause
    assert found.short_bytes == (None if row.short is None else round(row.short * GIB))
    assert found.evidence[:40] in log and found.fix and "{" not in found.message


def test_a_block_size_that_nobody_explains_is_said_without_a_reason():
    found = diagnose(Evidence("ValueError: No common block size for 16. ", 1, "engine"))
    assert found.message == "block size 16 is not one that the attention backend has"
