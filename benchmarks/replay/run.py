"""Replay clients side by side against a server of known timing.

    python -m benchmarks.replay.run --model MODEL_FOLDER [--vllm PYTHON] [--guidellm COMMAND] [--aiperf COMMAND]

Compiles ``server.c`` (needs gcc), pins the server to one core and each client, with all its processes, to another, and
offers Poisson arrivals of 64-token requests at the asked chunk rates. What a tool reports (TTFT and ITL percentiles)
is compared with what the server logged of itself. A tool whose command is not given, or does not run, is left out with
a line. The model folder needs a tokenizer only: the peers make their prompts with it.

A tool's start-up is its CPU time for 8 requests; its costs per chunk are told with and without it. A tool is saturated
at a rate where its median TTFT is off by more than 10 ms (half of its requests wait for the client), or where requests
left at less than the asked rate by more than three standard deviations of a Poisson process; it is not asked for higher
rates. Ours runs once more at ``--spread-rate``, over several processes and all of ``--spread-cores``.

With ``--out`` every run is appended as a JSON line, and a run that is in the file is not repeated: an interrupted
benchmark goes on where it was, and a finished one only prints its table (medians where there are ``--repeats``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replay.clients import TOKENS, Setting, Tool, clients

HERE = Path(__file__).resolve().parent
FIRST_MS, GAP_MS = 100, 20
STARTUP = 0.0  # the rate that stands for 8 requests, at 8 per second
STARTUP_REQUESTS = 8
SATURATED_MS = 10.0
COLUMNS = (
    "client",
    "chunks/s",
    "CPU s",
    "CPU s per 100k chunks",
    "without start-up",
    "TTFT error p50 / p99 ms",
    "ITL error p50 / p99 ms",
    "rate kept",
    "first request s",
    "server late p99 ms",
)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bout:
    """One run: ``rate`` chunks/s (:data:`STARTUP`: hardly any) by a tool on ``cores``, for the ``turn``-th time."""

    tool: Tool
    rate: float
    turn: int
    cores: str
    processes: int = 0

    @property
    def line(self) -> tuple[str, float, int]:
        """The line of the table that this run is part of."""
        return self.tool.name, self.rate, self.processes

    @property
    def requests_per_s(self) -> float:
        return self.rate / TOKENS or STARTUP_REQUESTS


def saturated(figures: Figures) -> bool:
    short = 1.0 - figures["kept"]
    return figures["ttft_p50_error_ms"] > SATURATED_MS or short > 3 / figures["requests"] ** 0.5


def get(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def run(tool: Tool, setting: Setting, cores: str, limit_s: float) -> Figures | str:
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
    figures: Figures = {
        "requests": setting.count,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "chunks": truth["chunks"],
        "first_request_s": truth["first_arrival_s"] - begin_s,
        "kept": told["kept"],
        "server_late_p99_ms": truth["late_p99_ms"],
        "server_cpu_s": truth["cpu_s"],
    }
    for name in ("ttft", "itl"):
        for q in ("p50", "p99"):
            figures[f"{name}_{q}_error_ms"] = told[f"{name}_{q}_ms"] - truth[f"{name}_{q}_ms"]
    if told.get("untrusted"):
        figures["untrusted"] = told["untrusted"]
    return figures


def play(bout: Bout, binary: Path, port: int, folder: Path, args: argparse.Namespace) -> Figures | str:
    """One bout against a fresh server."""
    server = subprocess.Popen(["taskset", "-c", args.server_core, str(binary), str(port), str(FIRST_MS), str(GAP_MS)])
    try:
        time.sleep(0.3)
        url, model, per_s = f"http://127.0.0.1:{port}", args.model.resolve(), bout.requests_per_s
        count = int(per_s * args.seconds) if bout.rate else STARTUP_REQUESTS
        return run(bout.tool, Setting(url, model, per_s, count, folder, bout.processes), bout.cores, args.limit)
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Holds the file's lock; no path: nothing."""
    if not path:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bouts(tools: Sequence[Tool], args: argparse.Namespace) -> Iterator[Bout]:
    """In the order of running: lower rates before higher ones, every tool before the next turn."""
    for turn in range(args.repeats):
        for tool in tools:
            for rate in (STARTUP, *map(float, args.rates.split(","))):
                yield Bout(tool, rate, turn, args.client_cores)
            if args.spread_rate and tool.name == "tuner":
                yield Bout(tool, args.spread_rate, turn, args.spread_cores or args.client_cores, args.processes)


def earlier(out: Path | None) -> dict[tuple[tuple[str, float, int], int], Figures]:
    """What the file holds of earlier runs, by line and turn; a run without a result is tried again."""
    if out is None or not out.exists():
        return {}
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    return {((r["tool"], r["rate"], r["processes"]), r["turn"]): r["run"] for r in rows if isinstance(r["run"], dict)}


def table(tools: Sequence[Tool], known: Mapping[tuple[tuple[str, float, int], int], Figures]) -> Iterator[str]:
    """The lines, each the medians of its turns."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    version = {tool.name: tool.version for tool in tools}
    lines: dict[tuple[str, float, int], list[Figures]] = {}
    for (line, _), figures in known.items():
        lines.setdefault(line, []).append(figures)
    middle = {line: medians(turns) for line, turns in lines.items()}
    order = [tool.name for tool in tools]
    for line in sorted((line for line in middle if line[0] in order), key=lambda x: (order.index(x[0]), x[1:])):
        name, rate, processes = line
        f, idle = middle[line], middle.get((name, STARTUP, 0))
        title = f"{name} {version[name]}".strip() + (f", {processes} processes" if processes else "")
        if not rate:
            yield f"| {title} | start-up | {f['cpu_s']:.1f} | | | | | | {f['first_request_s']:.1f} | |"
            continue
        above = (f["cpu_s"] - idle["cpu_s"]) / (f["chunks"] - idle["chunks"]) * 1e5 if idle else float("nan")
        yield (
            f"| {title} | {rate:,.0f} | {f['cpu_s']:.1f} | {f['cpu_s'] / f['chunks'] * 1e5:.1f} | {above:.1f} | "
            f"{f['ttft_p50_error_ms']:.1f} / {f['ttft_p99_error_ms']:.1f} | "
            f"{f['itl_p50_error_ms']:.2f} / {f['itl_p99_error_ms']:.2f} | {f['kept']:.1%} | "
            f"{f['first_request_s']:.1f} | {f['server_late_p99_ms']:.2f} |"
            + (" saturated" if saturated(f) else "")
            + "".join(
                f" untrusted in turn {k + 1}: {t['untrusted']}" for k, t in enumerate(lines[line]) if t.get("untrusted")
            )
        )


def medians(turns: Sequence[Figures]) -> Figures:
    return {key: statistics.median(t[key] for t in turns) for key in turns[0] if key != "untrusted"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--vllm", default="", help="Python of an environment that has vLLM")
    parser.add_argument("--guidellm", default="", help="guidellm's command")
    parser.add_argument("--aiperf", default="", help="aiperf's command")
    parser.add_argument("--rates", default="1000,5000,10000,20000,40000", help="chunks/s, rising")
    parser.add_argument("--repeats", type=int, default=1)
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

    tools = clients(args.vllm, args.guidellm, args.aiperf)
    for name in sorted({"vllm bench serve", "GuideLLM", "AIPerf"} - {tool.name for tool in tools}):
        print(f"{name}: no command given, left out", file=sys.stderr)
    if args.tools:
        tools = [tool for tool in tools if tool.name in args.tools.split(",")]
    known = earlier(args.out)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "server"
        subprocess.run(["gcc", "-O2", "-o", str(binary), str(HERE / "server.c")], check=True)
        full: set[tuple[str, int]] = set()  # tools that are saturated, and the turn
        for k, bout in enumerate(bouts(tools, args)):
            if (bout.tool.name, bout.turn) in full and not bout.processes and (bout.line, bout.turn) not in known:
                continue
            figures: Figures | str | None = known.get((bout.line, bout.turn))
            if figures is None:
                with locked(args.lock):
                    load = os.getloadavg()[0]
                    figures = play(bout, binary, 18_556 + k, Path(folder) / str(k), args)
                name, rate, processes = bout.line
                row = {"tool": name, "rate": rate, "processes": processes, "turn": bout.turn, "load_before": load}
                print(json.dumps(row | {"run": figures}), file=sys.stderr, flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(json.dumps(row | {"run": figures}) + "\n")
            if not isinstance(figures, str):
                known[bout.line, bout.turn] = figures
                if bout.rate and not bout.processes and saturated(figures):
                    full.add((bout.tool.name, bout.turn))
    for text in table(tools, known):
        print(text)


if __name__ == "__main__":
    main()
