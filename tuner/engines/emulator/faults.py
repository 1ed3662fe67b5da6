"""Faults that the emulator shows on request: ``--fault NAME[:ARG[:ARG]]`` or ``TUNER_EMULATOR_FAULTS``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tuner.study.outcome import PHASES

# Name -> (when, what it does). ``boot``: while starting; ``serve``: on a server that is up; ``stop``: at its end.
CATALOGUE: Mapping[str, tuple[str, str]] = {
    "slow-boot": ("boot", "loading the weights takes ARG seconds more (default 5)"),
    "hang": ("boot", f"stops for ever in phase ARG: {', '.join(PHASES)}"),
    "oom-weights": ("boot", "the weights do not fit: torch's CUDA out of memory"),
    "oom-kv": ("boot", "no room for the KV cache of one longest request: vLLM's ValueError"),
    "oom-no-kv": ("boot", "no room for any KV cache block: vLLM's ValueError"),
    "oom-warmup": ("boot", "out of memory in the sampler's warm-up"),
    "oom-activations": ("boot", "the activations of a full batch do not fit: torch's out of memory while profiling"),
    "oom-graphs": ("boot", "torch's out of memory while CUDA graphs are captured"),
    "gpu-busy": ("boot", "somebody else's process holds the GPU's memory"),
    "invalid-combination": ("boot", "two flags that exclude each other: pydantic's ValidationError"),
    "block-size": ("boot", "a block size that the attention backend does not have"),
    "unknown-flag": ("boot", "argparse refuses a flag"),
    "model-not-found": ("boot", "no such model folder or repository"),
    "gated-model": ("boot", "a model that needs a token"),
    "custom-code": ("boot", "a model with code of its own, which was not allowed"),
    "no-gpu": ("boot", "no GPU is visible"),
    "old-driver": ("boot", "the NVIDIA driver is too old"),
    "nccl": ("boot", "the GPUs cannot talk to each other"),
    "port-taken": ("boot", "the port belongs to somebody else"),
    "disk-full": ("boot", "no space left for the compile cache"),
    "killed": ("boot", "killed by signal 9 while loading, as the kernel does when memory runs out"),
    "silent-death": ("boot", "ends with exit code 0 and no word"),
    "log-flood": ("boot", "writes ARG MiB of log (default 64)"),
    "slow-health": ("boot", "answers 503 on /health for ARG seconds after start-up (default 2)"),
    "wrong-model": ("serve", "answers under another model name: a stranger's server"),
    "wrong-key": ("serve", "does not know the API key"),
    "oom-load": ("serve", "CUDA out of memory after ARG generated tokens (default 50)"),
    "crash": ("serve", "the engine dies after ARG generated tokens (default 50)"),
    "cuda-error": ("serve", "illegal memory access after ARG generated tokens (default 50)"),
    "segfault": ("serve", "dies of signal 11 after ARG generated tokens (default 50)"),
    "killed-load": ("serve", "killed by signal 9 after ARG generated tokens (default 50)"),
    "silent-death-load": ("serve", "ends with exit code 0 and no word after ARG generated tokens (default 50)"),
    "hang-load": ("serve", "sends nothing more after ARG generated tokens (default 50); /health still answers"),
    "stall": ("serve", "sends nothing for ARG seconds (default 1), once, after ARG2 tokens (default 50)"),
    "refuse": ("serve", "stops listening after ARG requests (default 3)"),
    "reset": ("serve", "resets the connection of every ARGth request in mid-stream (default 4)"),
    "unhealthy": ("serve", "answers 503 on /health after ARG requests (default 3), and 500 on the rest"),
    "http-500": ("serve", "answers 500 to a share ARG of requests (default 0.2)"),
    "wrong-usage": ("serve", "reports ARG tokens more than it sent (default 3)"),
    "short-output": ("serve", "ends after half of the tokens, min_tokens or not"),
    "garbage": ("serve", "sends events that are no JSON"),
    "ignore-sigterm": ("stop", "does not react to SIGTERM"),
    "leave-children": ("boot", "starts ARG children (default 2) in sessions of their own that ignore SIGTERM"),
}


@dataclass(frozen=True, slots=True)
class Faults:
    """The faults of one server by name, with their arguments as they were written."""

    args: Mapping[str, tuple[str, ...]]

    def __contains__(self, name: str) -> bool:
        return name in self.args

    def number(self, name: str, default: float, index: int = 0) -> float | None:
        """Argument ``index`` of fault ``name``, ``default`` where it has none; None where it was not asked for."""
        if name not in self.args:
            return None
        args = self.args[name]
        return float(args[index]) if len(args) > index and args[index] else default

    def word(self, name: str) -> str:
        """The first argument of fault ``name``; empty where it is not asked for."""
        return self.args.get(name, ("",))[0] if self.args.get(name) else ""


def parse_faults(text: str) -> Faults:
    """``crash:20,ignore-sigterm`` -> :class:`Faults`. Raises ``ValueError`` on an unknown name or phase."""
    found: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, *args = part.split(":")
        if name not in CATALOGUE:
            raise ValueError(f"unknown fault {name!r}; known: {', '.join(CATALOGUE)}")
        if name == "hang" and (args or [""])[0] not in PHASES:
            raise ValueError(f"fault hang needs a phase: {', '.join(PHASES)}")
        found[name] = tuple(args)
    return Faults(found)
