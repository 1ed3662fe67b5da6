"""The clients that are compared: each one's command line, its figures, its version."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOKENS, PROMPT = 64, 32
NAMES = ("ttft", "itl")
VLLM = (
    "import sys; from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P;"
    "p = P(); add_cli_args(p); main(p.parse_args(sys.argv[1:]))"
)


@dataclass(frozen=True)
class Setting:
    """One run: ``rate`` requests/s, ``count`` of them."""

    url: str
    model: Path
    rate: float
    count: int
    folder: Path
    processes: int = 0  # of our client; 0: as it thinks right
    served: str = "stub"  # the model's name


@dataclass(frozen=True)
class Tool:
    """``command`` makes the command line, ``read`` its figures in ms (and ``kept``: the share of the asked rate at
    which requests really left) from what it wrote."""

    name: str
    command: Callable[[Setting], list[str]]
    read: Callable[[Setting], dict[str, float]]
    version: str = ""


def replaying(s: Setting, *more: str) -> list[str]:
    """Our command for ``trace.jsonl`` in the setting's folder; it writes ``records.parquet`` there."""
    return [
        sys.executable, "-c", "from tuner.cli.app import main; main()", "replay", "--url", s.url, "--trace",
        str(s.folder / "trace.jsonl"), "--model", s.served, "--tokenizer", str(s.model),
        "--records", str(s.folder / "records.parquet"), "--json", *more,
    ]  # fmt: skip


def our_figures(metrics: Mapping[str, float], names: Sequence[str] = NAMES) -> dict[str, float]:
    return {f"{name}_{q}_ms": 1e3 * metrics[f"{name}_{q}_s"] for name in names for q in ("p50", "p99")}


def benching(python: str, s: Setting, *dataset: str) -> list[str]:
    """The command of ``vllm bench serve``; it writes ``result.json`` in the setting's folder."""
    return [
        *shlex.split(python), "-c", VLLM, "--backend", "openai", "--base-url", s.url, "--endpoint", "/v1/completions",
        "--model", s.served, "--tokenizer", str(s.model), *dataset, "--request-rate", str(s.rate),
        "--num-prompts", str(s.count), "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl",
        "--metric-percentiles", "50,99", "--save-result", "--save-detailed", "--result-dir", str(s.folder),
        "--result-filename", "result.json", "--disable-tqdm",
    ]  # fmt: skip


def their_figures(result: Mapping[str, float], names: Sequence[str] = NAMES) -> dict[str, float]:
    return {f"{name}_{q}_ms": result[f"{q}_{name}_ms"] for name in names for q in ("p50", "p99")}


def ours(s: Setting) -> list[str]:
    import numpy as np

    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(1 / s.rate, s.count))
    with (s.folder / "trace.jsonl").open("w") as file:
        for at in arrival_s - arrival_s[0]:
            file.write(json.dumps({"arrival_s": float(at), "input_tokens": PROMPT, "output_tokens": TOKENS}) + "\n")
    return replaying(s, *(["--processes", str(s.processes)] if s.processes else []))


def read_ours(s: Setting) -> dict[str, float]:
    told = json.loads((s.folder / "stdout").read_text())
    m = told["metrics"]
    return our_figures(m) | {
        "kept": m["sent_requests_per_s"] / m["offered_requests_per_s"],
        "untrusted": told["untrusted"],
    }


def vllm_bench(python: str) -> Callable[[Setting], list[str]]:
    lengths = ("--random-input-len", str(PROMPT), "--random-output-len", str(TOKENS))
    return lambda s: benching(python, s, "--dataset-name", "random", *lengths)


def read_vllm(s: Setting) -> dict[str, float]:
    d = json.loads((s.folder / "result.json").read_text())
    starts = sorted(d.get("start_times") or [])
    span = starts[-1] - starts[0] if len(starts) > 1 else math.nan
    kept = (len(starts) - 1) / span / s.rate if starts else d["request_throughput"] / s.rate
    return their_figures(d) | {"kept": kept}


def guidellm(command: str) -> Callable[[Setting], list[str]]:
    return lambda s: [
        *shlex.split(command), "run", "--backend",
        f"kind=openai_http,target={s.url},model=stub,request_format=/v1/completions",
        "--profile", f"kind=poisson,rate={s.rate}", "--constraint", f"kind=max_requests,count={s.count}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}",
        "--tokenizer", f"kind=huggingface_auto,model={s.model}",
        "--output", f"kind=json,path={s.folder / 'result.json'}", "--disable-console",
    ]  # fmt: skip


def read_guidellm(s: Setting) -> dict[str, float]:
    benchmark = json.loads((s.folder / "result.json").read_text())["benchmarks"][0]
    keys = {"ttft": "time_to_first_token_ms", "itl": "inter_token_latency_ms"}
    figures = {
        f"{name}_{q}_ms": benchmark["metrics"][key]["successful"]["percentiles"][q]
        for name, key in keys.items()
        for q in ("p50", "p99")
    }
    starts = sorted(r["info"]["timings"]["request_start"] for r in benchmark["requests"]["successful"])
    return figures | {"kept": (len(starts) - 1) / (starts[-1] - starts[0]) / s.rate}


def aiperf(command: str) -> Callable[[Setting], list[str]]:
    return lambda s: [
        *shlex.split(command), "profile", "--model", "stub", "--url", s.url, "--endpoint-type", "completions",
        "--streaming", "--tokenizer", str(s.model), "--request-rate", str(s.rate), "--arrival-pattern", "poisson",
        "--request-count", str(s.count), "--isl", str(PROMPT), "--osl", str(TOKENS), "--extra-inputs",
        "ignore_eos:true", "--ui", "none", "--artifact-dir", str(s.folder / "ai"),
    ]  # fmt: skip


def read_aiperf(s: Setting) -> dict[str, float]:
    [path] = (s.folder / "ai").rglob("profile_export_aiperf.json")
    d = json.loads(path.read_text())
    keys = {"ttft": "time_to_first_token", "itl": "inter_token_latency"}
    figures = {f"{name}_{q}_ms": d[key][q] for name, key in keys.items() for q in ("p50", "p99")}
    starts = []
    for line in next((s.folder / "ai").rglob("profile_export.jsonl")).read_text().splitlines():
        starts.append(json.loads(line)["metadata"]["request_start_ns"] / 1e9)
    return figures | {"kept": (len(starts) - 1) / (max(starts) - min(starts)) / s.rate}


def clients(vllm: str, guidellm_command: str, aiperf_command: str) -> list[Tool]:
    """Ours, and those whose command is not empty."""
    vllm, guidellm_command, aiperf_command = map(_absolute, (vllm, guidellm_command, aiperf_command))
    tools = [Tool("tuner", ours, read_ours)]
    if vllm:
        tools.append(Tool("vllm bench serve", vllm_bench(vllm), read_vllm, _version(vllm, "vllm")))
    if guidellm_command:
        python = _interpreter(guidellm_command)
        tools.append(Tool("GuideLLM", guidellm(guidellm_command), read_guidellm, _version(python, "guidellm")))
    if aiperf_command:
        python = _interpreter(aiperf_command)
        tools.append(Tool("AIPerf", aiperf(aiperf_command), read_aiperf, _version(python, "aiperf")))
    return tools


def _absolute(command: str) -> str:
    """Each run has a folder of its own: a path to a program must not depend on where it is started."""
    program, *rest = shlex.split(command) or [""]
    return shlex.join([str(Path(program).absolute()) if "/" in program else program, *rest]) if program else ""


def _interpreter(script: str) -> str:
    """The Python that a console script names in its first line."""
    first = Path(shlex.split(script)[0]).read_text(errors="replace").splitlines()[0]
    return first.removeprefix("#!").strip()


def _version(python: str, package: str) -> str:
    # vLLM's build for CPUs has another name
    code = (
        "import importlib.metadata as m;"
        f"print(next(d.version for d in m.distributions() if d.name in ({package!r}, {package + '-cpu'!r})))"
    )
    return subprocess.run([*shlex.split(python), "-c", code], capture_output=True, text=True).stdout.strip()
