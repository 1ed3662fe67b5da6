"""`tuner doctor`: what this machine has and lacks, each with its fix."""

from __future__ import annotations

import importlib.util
import json as json_
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rich.text import Text

from tuner.errors import EnvironmentFault
from tuner.report.console import printer

if TYPE_CHECKING:
    from tuner.engines.sglang import SglangEngine
    from tuner.engines.vllm import VllmEngine


@dataclass(frozen=True, slots=True)
class Finding:
    """``state`` is ok, warn or bad; ``fix`` says what to do about the latter two."""

    what: str
    state: str
    found: str
    fix: str = ""


def run(json: bool) -> int:
    """Prints the findings; returns 4 where something is missing without which nothing can be tuned."""
    findings = [python(), *packages(), gpu(), *engines(), memory(), disk(), clock()]
    if json:
        print(json_.dumps([asdict(f) for f in findings], indent=1))
    else:
        console = printer()
        styles = {"ok": "green", "warn": "yellow", "bad": "red"}
        for f in findings:
            mark = (f"{f.state:<4}", styles[f.state])
            console.print(Text.assemble(mark, "  ", (f.what, "bold"), f": {f.found}"), soft_wrap=True)
            if f.fix:
                console.print(f"      fix: {f.fix}", soft_wrap=True)
    return 4 if any(f.state == "bad" for f in findings) else 0


def python() -> Finding:
    return Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def packages() -> list[Finding]:
    names = ("optuna", "mlflow", "plotly", "pandas", "pyarrow", "torch")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        return [Finding("packages", "bad", f"missing: {', '.join(missing)}", "pip install -e . in tuner's checkout")]
    return [Finding("packages", "ok", ", ".join(names))]


def gpu() -> Finding:
    from tuner.search import hardware
    from tuner.spec.facts import of_gpus

    row, words = hardware.detect()
    found = of_gpus()
    if found:
        state = "ok" if row else "warn"
        return Finding("GPU", state, f"{found['gpus']} x {words}")
    if shutil.which("nvidia-smi"):
        return Finding("GPU", "warn", "nvidia-smi is here, but NVML finds no GPU", "check the driver: nvidia-smi")
    return Finding(
        "GPU", "warn", words, "without an NVIDIA GPU: vLLM's CPU build (search space vllm-cpu/quick), or llama.cpp"
    )


def engines() -> list[Finding]:
    """The engines that are found where a study looks for them; vLLM is what a study has that names none."""
    from tuner.engines.sglang import SglangEngine
    from tuner.engines.vllm import VllmEngine

    vllm, sglang = _installed("vLLM", VllmEngine()), _installed("SGLang", SglangEngine())
    others = [sglang] if sglang.state == "ok" else []
    if program := shutil.which("llama-server"):
        others.append(Finding("llama.cpp", "ok", program))
    if others and vllm.state == "bad":
        vllm = replace(vllm, state="warn", found=f"{vllm.found}: a study names its engine (docs/engines.md)")
    return [vllm, *others]


def _installed(name: str, engine: VllmEngine | SglangEngine) -> Finding:
    try:
        return Finding(name, "ok", f"{engine.version()} in {engine.python}")
    except EnvironmentFault as absent:
        return Finding(name, "bad", absent.message, f"make setup, or {absent.fix}")


def memory() -> Finding:
    import psutil

    free_gib = psutil.virtual_memory().available / 2**30
    fix = "" if free_gib > 8 else "a vLLM server takes several GiB of host memory; close other programs"
    return Finding("memory", "ok" if free_gib > 8 else "warn", f"{free_gib:.1f} GiB free", fix)


def disk() -> Finding:
    free_gib = shutil.disk_usage(".").free / 2**30
    fix = "" if free_gib > 10 else "records and logs need room; free some or set reports: in the study"
    return Finding("disk", "ok" if free_gib > 10 else "warn", f"{free_gib:.0f} GiB free here", fix)


def clock() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    busy = load > 0.5 * cores
    fix = "other work on these cores disturbs what is measured; stop it before tuning" if busy else ""
    return Finding("load", "warn" if busy else "ok", f"{load:.1f} on {cores} cores", fix)
