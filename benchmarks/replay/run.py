"""Replay clients side by side against a server of known timing.

    python benchmarks/replay/run.py --model MODEL_FOLDER [--vllm PYTHON] [--guidellm COMMAND] [--aiperf COMMAND]

Compiles ``server.c`` (needs gcc), pins the server to one core and each client, with all its processes, to another, and
offers Poisson arrivals of 64-token requests at the asked chunk rates. What a tool reports (TTFT and ITL percentiles)
is compared with what the server logged of itself. A tool whose command is not given, or does not run, is left out with
a line. The model folder needs a tokenizer only: the peers make their prompts with it. Ours runs once more at
``--spread-rate``, over all its processes and all of ``--spread-cores``.

With ``--out`` every run is appended as a JSON line, and a run that is in the file is not repeated: an interrupted
benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOKENS, PROMPT = 64, 32
FIRST_MS, GAP_MS = 100, 20
COLUMNS = (
    "client",
    "chunks/s",
    "CPU s",
    "CPU s / 100k chunks",
    "TTFT error p50 / p99 ms",
    "ITL error p50 / p99 ms",
    "rate kept",
    "first request s",
    "server late p99 ms",
)
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


@dataclass(frozen=True)
class Tool:
    """``command`` makes the command line, ``read`` its figures in ms (and ``requests_per_s``) from what it wrote."""

    name: str
    command: Callable[[Setting], list[str]]
    read: Callable[[Setting], dict[str, float]]


def ours(s: Setting) -> list[str]:
    import numpy as np

    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(1 / s.rate, s.count))
    with (s.folder / "trace.jsonl").open("w") as file:
        for at in arrival_s - arrival_s[0]:
            file.write(json.dumps({"arrival_s": float(at), "input_tokens": PROMPT, "output_tokens": TOKENS}) + "\n")
    program = ["-c", "from tuner.cli.app import main; main()"]
    return [
        sys.executable, *program, "replay", "--url", s.url, "--trace", str(s.folder / "trace.jsonl"), "--model", "stub",
        "--tokenizer", str(s.model), "--records", str(s.folder / "records.parquet"), "--json",
        *(["--processes", str(s.processes)] if s.processes else []),
    ]  # fmt: skip


def read_ours(s: Setting) -> dict[str, float]:
    told = json.loads((s.folder / "stdout").read_text())
    m = told["metrics"]
    figures = {f"{name}_{q}_ms": 1e3 * m[f"{name}_{q}_s"] for name in ("ttft", "itl") for q in ("p50", "p99")}
    return figures | {"kept": m["sent_requests_per_s"] / m["offered_requests_per_s"], "untrusted": told["untrusted"]}


def vllm_bench(python: str) -> Callable[[Setting], list[str]]:
    return lambda s: [
        *shlex.split(python), "-c", VLLM, "--backend", "openai", "--base-url", s.url, "--endpoint", "/v1/completions",
        "--model", "stub", "--tokenizer", str(s.model), "--dataset-name", "random", "--random-input-len", str(PROMPT),
        "--random-output-len", str(TOKENS), "--request-rate", str(s.rate), "--num-prompts", str(s.count),
        "--ignore-eos", "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--save-result",
        "--save-detailed", "--result-dir", str(s.folder), "--result-filename", "result.json", "--disable-tqdm",
    ]  # fmt: skip


def read_vllm(s: Setting) -> dict[str, float]:
    d = json.loads((s.folder / "result.json").read_text())
    figures = {f"{name}_{q}_ms": d[f"{q}_{name}_ms"] for name in ("ttft", "itl") for q in ("p50", "p99")}
    starts = sorted(d.get("start_times") or [])
    span = starts[-1] - starts[0] if len(starts) > 1 else math.nan
    return figures | {"kept": (len(starts) - 1) / span / s.rate if starts else d["request_throughput"] / s.rate}


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


def get(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def run(tool: Tool, setting: Setting, cores: str, limit_s: float) -> dict[str, Any] | str:
    """Figures of one run, or in words why there are none."""
    setting.folder.mkdir(parents=True)
    command = tool.command(setting)
    get(setting.url + "/reset")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin_s = time.monotonic()
    with (setting.folder / "stdout").open("w") as out, (setting.folder / "stderr").open("w") as errors:
        process = subprocess.Popen(["taskset", "-c", cores, *command], stdout=out, stderr=errors, cwd=setting.folder)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return f"not finished after {limit_s:.0f} s"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    truth = get(setting.url + "/stats")
    try:
        told = tool.read(setting)
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        tail = (setting.folder / "stderr").read_text()[-300:]
        return f"no result (exit {process.returncode}, {type(error).__name__}: {error}): {tail}"
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures: dict[str, Any] = {
        "cpu_s": cpu_s,
        "chunks": truth["chunks"],
        "cpu_s_per_100k": cpu_s / truth["chunks"] * 1e5,
        "first_request_s": truth["first_arrival_s"] - begin_s,
        "kept": told["kept"],
        "server_late_p99_ms": truth["late_p99_ms"],
    }
    for name in ("ttft", "itl"):
        for q in ("p50", "p99"):
            figures[f"{name}_{q}_error_ms"] = told[f"{name}_{q}_ms"] - truth[f"{name}_{q}_ms"]
    if told.get("untrusted"):
        figures["untrusted"] = told["untrusted"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--vllm", default="", help="Python of an environment that has vLLM")
    parser.add_argument("--guidellm", default="", help="guidellm's command")
    parser.add_argument("--aiperf", default="", help="aiperf's command")
    parser.add_argument("--rates", default="1000,5000,10000,20000,40000", help="chunks/s")
    parser.add_argument("--tools", default="", help="only these, by name")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-cores", default="1", help="a list as taskset takes it")
    parser.add_argument("--spread-rate", type=float, default=100_000, help="chunks/s, ours alone; 0: not")
    parser.add_argument("--spread-cores", default="", help="default: the client's")
    parser.add_argument("--processes", type=int, default=2, help="of our client at --spread-rate")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that one run may take")
    parser.add_argument("--lock", default="", help="a file to flock during each run, where the machine is shared")
    parser.add_argument("--out", type=Path, default=None, help="append each run as a JSON line")
    args = parser.parse_args()

    tools = [Tool("tuner", ours, read_ours)]
    if args.vllm:
        tools.append(Tool("vllm bench serve", vllm_bench(args.vllm), read_vllm))
    if args.guidellm:
        tools.append(Tool("GuideLLM", guidellm(args.guidellm), read_guidellm))
    if args.aiperf:
        tools.append(Tool("AIPerf", aiperf(args.aiperf), read_aiperf))
    for name in {"vllm bench serve", "GuideLLM", "AIPerf"} - {tool.name for tool in tools}:
        print(f"{name}: no command given, left out", file=sys.stderr)
    if args.tools:
        tools = [tool for tool in tools if tool.name in args.tools.split(",")]

    bouts = [Bout(tool, rate, args.client_cores) for rate in map(float, args.rates.split(",")) for tool in tools]
    if args.spread_rate and tools[0].read is read_ours:
        bouts.append(Bout(tools[0], args.spread_rate, args.spread_cores or args.client_cores, args.processes))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    known = before(args.out)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "server"
        subprocess.run(["gcc", "-O2", "-o", str(binary), str(HERE / "server.c")], check=True)
        for k, bout in enumerate(bouts):
            figures = known.get(bout.key)
            if figures is None:
                with locked(args.lock):
                    load = os.getloadavg()[0]
                    figures = play(bout, binary, 18_556 + k, Path(folder) / str(k), args)
                if args.out:
                    told = {"tool": bout.tool.name, "rate": bout.rate, "processes": bout.processes}
                    with args.out.open("a") as out:
                        out.write(json.dumps(told | {"load_before": load, "run": figures}) + "\n")
            print(line(bout, figures), flush=True)


@dataclass(frozen=True)
class Bout:
    """One line of the table: ``rate`` chunks/s by a tool on ``cores``."""

    tool: Tool
    rate: float
    cores: str
    processes: int = 0

    @property
    def key(self) -> tuple[str, float, int]:
        return self.tool.name, self.rate, self.processes


def before(out: Path | None) -> dict[tuple[str, float, int], Any]:
    """What the file holds of earlier runs; a run without a result is tried again."""
    if out is None or not out.exists():
        return {}
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    return {(r["tool"], r["rate"], r["processes"]): r["run"] for r in rows if isinstance(r["run"], dict)}


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Holds the file's lock; no path: nothing."""
    if not path:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def play(bout: Bout, binary: Path, port: int, folder: Path, args: argparse.Namespace) -> dict[str, Any] | str:
    """One bout against a fresh server."""
    server = subprocess.Popen(["taskset", "-c", args.server_core, str(binary), str(port), str(FIRST_MS), str(GAP_MS)])
    try:
        time.sleep(0.3)
        per_s = bout.rate / TOKENS
        url, model, count = f"http://127.0.0.1:{port}", args.model.resolve(), int(per_s * args.seconds)
        return run(bout.tool, Setting(url, model, per_s, count, folder, bout.processes), bout.cores, args.limit)
    finally:
        server.kill()
        server.wait()


def line(bout: Bout, f: dict[str, Any] | str) -> str:
    name = bout.tool.name + (f", {bout.processes} processes" if bout.processes else "")
    if isinstance(f, str):
        return f"| {name} | {bout.rate:,.0f} | {f} |"
    return (
        f"| {name} | {bout.rate:,.0f} | {f['cpu_s']:.1f} | {f['cpu_s_per_100k']:.1f} | "
        f"{f['ttft_p50_error_ms']:.1f} / {f['ttft_p99_error_ms']:.1f} | "
        f"{f['itl_p50_error_ms']:.2f} / {f['itl_p99_error_ms']:.2f} | {f['kept']:.1%} | "
        f"{f['first_request_s']:.1f} | {f['server_late_p99_ms']:.2f} |"
    ) + (f" {f['untrusted']}" if "untrusted" in f else "")


if __name__ == "__main__":
    main()
