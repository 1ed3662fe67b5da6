"""Memory of a long replay: peak resident set of the tuner and of its client processes, sampled five times a second.

    python -m benchmarks.replay.memory --model MODEL_FOLDER --requests 100000,1000000 [--rate 2500]

Requests of 32 tokens in and 4 out, evenly spaced, against ``server.c``; server on one core, client on another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.replay.clients import PROMPT, Setting, ours
from tuner.load import tracefile
from tuner.load.records import read
from tuner.load.trace import Trace

HERE = Path(__file__).resolve().parent
TOKENS, FIRST_MS, GAP_MS = 4, 5, 2
MIB = 1 << 20


def trace(count: int, per_s: float) -> Trace:
    none = np.zeros(0, dtype=np.int64)
    lengths = np.full(count, PROMPT), np.full(count, TOKENS)
    return Trace("even", np.arange(count) / per_s, *lengths, 0, none, np.zeros(count + 1, dtype=np.int64))


def peaks(process: psutil.Popen) -> tuple[int, int, int]:
    """Until it ends: the most bytes that the process held, that its children held together, and that all did."""
    parent = children = both = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            own = process.memory_info().rss
            others = sum(child.memory_info().rss for child in process.children(recursive=True))
            parent, children, both = max(parent, own), max(children, others), max(both, own + others)
        time.sleep(0.2)
    return parent, children, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--requests", default="100000,1000000")
    parser.add_argument("--rate", type=float, default=2_500.0, help="requests/s")
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--client-cores", default="1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["gcc", "-O2", "-o", str(folder / "server"), str(HERE / "server.c")], check=True)
        server = ["taskset", "-c", args.server_core, str(folder / "server"), "18555", str(FIRST_MS), str(GAP_MS)]
        print(
            "| requests | seconds | tuner MiB | its processes MiB | together MiB | records MiB | failed | untrusted |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for count in map(int, args.requests.split(",")):
            setting = Setting("http://127.0.0.1:18555", args.model.resolve(), args.rate, 1, folder)
            command = ours(setting)  # writes a trace of one request, here replaced
            command[command.index("--trace") + 1] = str(folder / "trace.parquet")
            tracefile.write(trace(count, args.rate), folder / "trace.parquet")
            with subprocess.Popen(server) as running, (folder / "stdout").open("w") as out:
                time.sleep(0.3)
                begin_s = time.monotonic()
                tuner = psutil.Popen(["taskset", "-c", args.client_cores, *command], stdout=out, cwd=folder)
                held = [f"{size / MIB:,.0f}" for size in peaks(tuner)]
                wall_s = time.monotonic() - begin_s
                running.kill()
            records = read(folder / "records.parquet")
            failed = int((records.columns["error"] != "").sum())
            size = (folder / "records.parquet").stat().st_size / MIB
            told = json.loads((folder / "stdout").read_text())
            untrusted = "; ".join(told["untrusted"]) or "no"
            if len(records) != count or told["stopped_early"]:
                raise SystemExit(f"{len(records)} records of {count}")
            print(
                f"| {count:,} | {wall_s:.0f} | {' | '.join(held)} | {size:.0f} | {failed} | {untrusted} |", flush=True
            )


if __name__ == "__main__":
    main()
