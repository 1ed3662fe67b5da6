"""What vLLM's log says while it starts, versions 0.25 to 0.33, CUDA and CPU."""

from __future__ import annotations

import re

from tuner.server.bootlog import GIB, Dialect, Fact

_NUMBER = r"(-?[\d,]+(?:\.\d+)?)"


def _phase(name: str, pattern: str) -> tuple[str, re.Pattern[str]]:
    return name, re.compile(pattern)


def _fact(name: str, pattern: str, scale: float = 1.0) -> Fact:
    return Fact(name, re.compile(pattern.replace("#", _NUMBER)), scale)


#: imports: the API server's. config: resolving it (an architecture's first time, also a look at its class in a process
#: of its own) and starting the engine core, which imports again. engine: the workers, which may import once more.
#: weights ("from scratch" is the second model runner's word). compile: profiling the largest batch, with compilation
#: (on the CPU: the warm-up, which compiles). kv: sizing the cache. warmup: first steps. graphs: CUDA graph capture.
#: api: the HTTP server's own start. Where versions differ, tests/engines/test_vllm_versions.py has each one's lines.
DIALECT = Dialect(
    "vllm",
    (
        _phase("imports", r"(?!)"),
        _phase("config", r"non-default args:|vLLM API server version|\] +.*\bversion +v?0\.\d+"),
        _phase("engine", r"Initializing a V1 LLM engine|OpenMP thread binding info"),
        _phase("weights", r"Starting to load model|Loading model from scratch|Initializing model took|"
               r"Loading (safetensors|weights(?! took)|pt) "),
        _phase("compile", r"Model loading took|Warming up model for the compilation|Starting torch\.compile|"
               r"Dynamo bytecode transform"),
        _phase("kv", r"Available KV cache memory|(Explicitly|Auto) set \([\d./ ]+\) GiB for KV cache|"
               r"GiB memory for KV Cache as specified by kv_cache_memory_bytes"),
        _phase("warmup", r"KV cache size: [\d,]+ tokens"),
        _phase("graphs", r"Capturing CUDA graphs?|Capturing the model for cuda graph|Capturing graph"),
        _phase("api", r"init engine \(profile"),
    ),
    (
        _fact("kv_cache_tokens", r"KV cache size: # tokens"),
        _fact("max_concurrency", r"Maximum concurrency for [\d,]+ tokens per request: #x"),
        _fact("kv_cache_bytes", r"Available KV cache memory: # ?GiB", GIB),
        _fact("kv_cache_bytes", r"(?:Explicitly|Auto) set \(#/[\d.]+\) GiB for KV cache", GIB),
        _fact("kv_cache_bytes", r"reserved # GiB memory for KV Cache as specified", GIB),
        _fact("weights_bytes", r"Model loading took # ?GiB", GIB),
        _fact("model_load_s", r"Model loading took [\d.]+ ?GiB(?: memory)? and # seconds"),
        _fact("weights_load_s", r"Loading weights took # seconds"),
        _fact("init_s", r"init engine \(profile, create kv cache, warmup model\) took # s"),
        _fact("compile_s", r"\(compilation: # s"),
        _fact("compile_s", r"torch\.compile (?:takes|took) # s"),
        _fact("graph_capture_s", r"Graph capturing finished in # secs"),
        _fact("graph_bytes", r"Graph capturing finished in \d+ secs, took # GiB", GIB),
        _fact("max_num_batched_tokens", r"max_num_batched_tokens=#"),
        _fact("max_model_len", r"Using max model len #"),
    ),
    cold=re.compile(r"JIT compilation during inference: (\w+)"),
)  # fmt: skip
