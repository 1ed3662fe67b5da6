"""Every failure is told from what it leaves: its cause, the line that proves it, and what to do."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tuner.engines.vllmlog import DIALECT
from tuner.server.bootlog import LINE, BootLog
from tuner.server.diagnosis import Evidence, diagnose
from tuner.server.faults import RULES
from tuner.study.loop import ENVIRONMENT_CAUSES
from tuner.study.outcome import Infeasible

LOGS = Path(__file__).parent / "logs"
GIB = 2**30

# Logs of real refusals by the CPU build, cut of banners and routes: file, cause, a part of the evidence.
REAL = [
    ("block16", "invalid-combination", "No common block size for 16"),
    ("fp8", "no-kernel", "static_scaled_fp8_quant"),
    ("kvfp8", "no-kernel", "FP8 KV cache on CPU requires x86 with AVX-512 or AMX"),
    ("tp2", "invalid-combination", "Not enough allowed NUMA nodes"),
    ("tp3", "invalid-combination", "attention heads (8) must be divisible by tensor parallel size (3)"),
    ("unknownflag", "unknown-flag", "--max-num-sequences"),
    ("badchoice", "invalid-value", "--dtype: invalid choice: 'float12'"),
    ("nofolder", "model-not-found", "/models/nothing"),
    ("noid", "model-not-found", "Cannot find an appropriate cached snapshot folder"),
    ("noweights", "model-not-found", "Cannot find any model weights"),
    ("remote", "needs-trust", "contains custom code"),
    ("unknownarch", "model-unsupported", "Qwen33ForCausalLM"),
    ("brokenjson", "model-broken", "JSONDecodeError"),
    ("kvnegative", "oom-kv", "No available memory for the cache blocks"),
    ("kvhuge", "oom-kv", "requested memory for kv (500.0 GiB)"),
    ("lenhigh", "invalid-combination", "User-specified max_model_len (8192)"),
    ("spec", "invalid-combination", "num_speculative_tokens"),
    ("torchao", "invalid-combination", "TorchAOConfig.__init__() missing"),
]


def real(name: str) -> tuple[str, str]:
    """A log and the phase that it ended in."""
    text = (LOGS / f"vllm-0.32-cpu-{name}.log").read_text(encoding="utf-8")
    boot = BootLog(DIALECT, 0.0)
    boot.feed(text.splitlines(), 1.0)
    return text, boot.phase


@pytest.mark.parametrize("name, cause, proof", REAL, ids=[row[0] for row in REAL])
def test_a_real_refusal_is_recognised(name, cause, proof):
    log, phase = real(name)
    found = diagnose(Evidence(log, 1, phase))
    assert found.cause == cause
    assert proof in found.evidence and found.evidence[:60] in log
    assert found.fix and not found.transient
    assert "Traceback" not in found.message and "[type=" not in found.message


# The same of llama.cpp's server, with what the message has to say.
LLAMA_CPP = [
    ("flag", "unknown-flag", "--no-such-flag", "does not know --no-such-flag"),
    ("value", "invalid-value", "--cache-type-k", "--cache-type-k: Unsupported cache type: q3_x"),
    ("notint", "invalid-value", "--parallel", "--parallel takes a number"),
    ("nomodel", "model-not-found", "model-q2_k.gguf", "no file /models/tiny-qwen3/model-q2_k.gguf"),
    ("gguf", "model-broken", "invalid magic characters", "damaged"),
    ("memory", "oom-kv", "failed to allocate buffer for kv cache", "KV cache does not fit"),
    ("vcache", "invalid-combination", "quantized V cache", "quantized V cache requires flash_attn to be enabled"),
    ("port", "port-in-use", "couldn't bind", "port was taken"),
]


@pytest.mark.parametrize("name, cause, proof, says", LLAMA_CPP, ids=[row[0] for row in LLAMA_CPP])
def test_a_real_refusal_of_llama_cpp_is_recognised(name, cause, proof, says):
    found = diagnose(Evidence((LOGS / f"llama.cpp-b11434-{name}.log").read_text(encoding="utf-8"), 1, "start"))
    assert (found.cause, found.transient) == (cause, cause == "port-in-use")
    assert proof in found.evidence and says in found.message and "0.00." not in found.message + found.evidence
    assert found.fix


def test_a_worker_that_was_killed_under_load_is_told_from_the_log_of_the_server_that_then_ended_well():
    log, _ = real("workerkilled")
    found = diagnose(Evidence(log, 0, "load", stage="under load"))
    assert (found.cause, found.transient) == ("killed", True)
    assert found.evidence.startswith("Worker proc VllmWorker-0 died unexpectedly")
    own = log.replace("Worker proc", "RuntimeError: my own fault\nWorker proc", 1)
    assert diagnose(Evidence(own, 0, "load", stage="under load")).cause == "crash-under-load"


def test_how_much_memory_was_missed_is_computed_from_the_log():
    log, phase = real("kvhuge")
    found = diagnose(Evidence(log, 1, phase))
    assert found.short_bytes == round((500.0 - 12.22) * GIB)
    assert "487.78 GiB short" in found.message


@dataclass(frozen=True)
class Case:
    """Lines as the sources of vLLM, PyTorch, CUDA, NCCL, Hugging Face and Linux have them, and what they mean."""

    cause: str
    log: str
    exit: int | None = 1
    phase: str = "weights"
    stage: str = "start-up"
    late: str = ""
    short: int | None = None
    transient: bool = False


OOM = (
    "(EngineCore_DP0 pid=9) ERROR 05-06 20:59:12 [core.py:99] torch.OutOfMemoryError: CUDA out of memory. Tried to "
    "allocate 3.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free. Process 7 has 77 GiB memory"
)
DEAD = (
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)
TAKEN = (
    "ValueError: Free memory on device cuda:0 (12.50/79.10 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 71.19 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
KV = (
    "ValueError: To serve at least one request with the models's max seq len (131072), (16.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (9.5 GiB). Based on the available memory, the estimated"
)
CASES = [
    Case("oom-weights", OOM + "\n" + DEAD, short=round(2.25 * GIB)),
    Case("oom-activations", OOM, phase="compile", short=round(2.25 * GIB)),
    Case("oom-graphs", OOM, phase="graphs", short=round(2.25 * GIB)),
    Case("oom-load", OOM, phase="load", stage="under load", short=round(2.25 * GIB)),
    Case("oom-weights", "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: "
         "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)", short=8 * GIB),
    Case("oom-warmup", "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. "
         "Please try lowering `max_num_seqs` or `gpu_memory_utilization`", phase="warmup"),
    Case("oom-kv", KV + "\n" + DEAD, phase="kv", short=round(6.5 * GIB)),
    Case("oom-kv", "INFO 05-06 [gpu_worker.py:298] Available KV cache memory: -2.50 GiB\nValueError: No available "
         "memory for the cache blocks. Try increasing `gpu_memory_utilization`", phase="kv", short=round(2.5 * GIB)),
    Case("oom-kv", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
    Case("memory-taken", TAKEN, short=round((71.19 - 12.5) * GIB)),
    Case("no-gpu", "RuntimeError: No CUDA GPUs are available"),
    Case("no-gpu", "RuntimeError: Failed to infer device type, please set the environment variable VLLM_LOGGING_LEVEL"),
    Case("driver-too-old", "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)."),
    Case("unsupported-gpu", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    Case("gpu-busy", "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", transient=True),
    Case("gpu-broken", "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"),
    Case("gpu-fault", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
         stage="under load", transient=True),
    Case("nccl", "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error",
         transient=True),
    Case("too-few-gpus", "ValueError: World size (8) is larger than the number of available GPUs (4) in this node."),
    Case("port-in-use", "OSError: [Errno 98] Address already in use", transient=True),
    Case("disk-full", "OSError: [Errno 28] No space left on device"),
    Case("too-many-files", "OSError: [Errno 24] Too many open files", transient=True),
    Case("model-not-allowed", "OSError: You are trying to access a gated repo.\nMake sure to have access to it at"),
    Case("model-not-found", "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.\nRepository Not Found"),
    Case("model-broken", "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncomplete"),
    Case("missing-dependency", "ModuleNotFoundError: No module named 'flashinfer'"),
    Case("missing-dependency", "RuntimeError: operator torchvision::nms does not exist", phase="imports"),
    Case("missing-dependency", "FileNotFoundError: [Errno 2] No such file or directory: 'ninja'"),
    Case("missing-dependency", "No such file or directory: /does/not/exist", exit=127, phase="exec"),
    Case("invalid-combination", "  Value error, Speculative tokens must be positive [type=value_error, input_value=0]"),
    Case("invalid-combination", "ValueError: The quantization method fp8 is not supported for the current GPU."),
    Case("invalid-combination", "AssertionError: something that this table does not know"),
    Case("crash", "KeyError: 'lm_head'"),
    Case("crash", "", exit=-11, transient=True),
    Case("killed", "INFO 05-06 20:59:12 [gpu_model_runner.py:3007] Starting to load model", exit=-9, transient=True),
    Case("killed", "ERROR 05-06 20:59:12 [multiproc_executor.py:316] Worker proc VllmWorker-0 died unexpectedly (exit "
         "code: -9), shutting down executor.\n" + DEAD, transient=True),
    Case("terminated", "", exit=-15, transient=True),
    Case("unsupported-cpu", "", exit=-4),
    Case("hang", "last words", exit=None, late="hang: phase weights took over 900 s", transient=True),
    Case("hang", "TimeoutError: RPC call to execute_model timed out.", stage="under load", transient=True),
    Case("too-slow-to-start", "last words", exit=None, late="slow: not ready after 3600 s"),
    Case("crash-under-load", "ERROR 05-06 [core.py:99] RuntimeError: it\nEngineDeadError: EngineCore encountered "
         "an issue. See stack trace (above) for the root cause.", stage="under load", transient=True),
    Case("crash-under-load", "nothing to see", exit=3, stage="under load", transient=True),
    Case("unhealthy", "nothing to see", exit=None, stage="under load", transient=True),
    Case("killed", "serving", exit=-9, stage="under load", transient=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.cause}" for i, case in enumerate(CASES)])
def test_a_failure_as_others_print_it_is_recognised(case):
    found = diagnose(Evidence(case.log, case.exit, case.phase, case.late, case.stage))
    assert (found.cause, found.transient, found.stage) == (case.cause, case.transient, case.stage)
    assert found.short_bytes == case.short
    assert found.message and found.fix


def test_chatter_is_no_evidence():
    log = "\n".join(
        f"(EngineCore pid=3) {level} 05-06 20:59:12 [x.py:1] No CUDA GPUs are available"
        for level in ("INFO", "WARNING", "DEBUG")
    )
    assert diagnose(Evidence(log, 1)).cause == "crash"
    assert diagnose(Evidence(log.replace("INFO", "ERROR"), 1)).cause == "no-gpu"


def test_source_code_in_a_traceback_is_no_evidence():
    log = (
        'Traceback (most recent call last):\n  File "a.py", line 3, in f\n    raise OSError("Address already in use")\n'
    )
    assert diagnose(Evidence(log + "KeyError: 'x'", 1)).evidence == "KeyError: 'x'"


def test_the_first_exception_is_the_root_and_those_that_pass_it_on_are_not():
    log = "\n".join(
        [
            "(Worker pid=3) ERROR 05-06 20:59:12 [multiproc_executor.py:900] RuntimeError: the root",
            "(EngineCore pid=2) Exception: WorkerProc initialization failed due to an exception.",
            DEAD,
        ]
    )
    assert diagnose(Evidence(log, 1)).evidence == "RuntimeError: the root"
    assert diagnose(Evidence("\n".join(reversed(log.splitlines())), 1)).evidence == "RuntimeError: the root"


def test_only_some_failures_are_worth_a_second_launch():
    for rule in RULES:
        if rule.cause in ENVIRONMENT_CAUSES or rule.cause.startswith(("invalid", "unknown", "oom", "model")):
            assert not rule.transient, f"{rule.cause} would fail again"


def test_every_rule_says_what_to_do():
    for rule in RULES:
        assert rule.fix and rule.message and rule.cause == rule.cause.lower()


def test_something_is_always_answered():
    found = diagnose(Evidence("", None))
    assert isinstance(found, Infeasible) and found.cause == "crash" and found.fix


def test_of_a_long_line_only_the_start_is_looked_at():
    """A log is not ours: patterns would take half a minute over a line of megabytes."""
    late = "." * LINE + " torch.OutOfMemoryError: CUDA out of memory."
    assert diagnose(Evidence(late, 1)).cause == "crash"
    for word in ("(a pid=1", "(a pid=12 x" * 10, "Failed core proc(s): {", "Tried to allocate 1 GiB"):
        found = diagnose(Evidence(word * 100_000 + "\ntorch.OutOfMemoryError: CUDA out of memory.", 1))
        assert found.cause.startswith("oom")
