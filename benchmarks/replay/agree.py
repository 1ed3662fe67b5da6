"""Our replay and ``vllm bench serve`` in turn against one running server: do they measure the same?

    python -m benchmarks.replay.agree --url URL --model MODEL_FOLDER --trace TRACE --rate RATE --vllm PYTHON

``vllm bench serve`` offers Poisson arrivals of requests whose lengths are the trace's, in an order of its own. Ours
then replays what that run really sent: the same moments of sending, the same lengths, other prompts (the prefix cache
finds none of the earlier). So what differs is the client and what a server does differently twice; ``--rounds`` says
how much the second is. Both clients' figures are their own, as they print them; throughput is all output tokens over
first sending to last end for both. Some requests are sent before and not counted: a server's first ones find kernels
that are not compiled yet. A server that wants a key is given ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.replay.clients import VLLM
from tuner.load.formats import read
from tuner.load.prompts import load_tokenizer, texts

WARM = 60  # requests
FIGURES = ("output_tokens_per_s", *(f"{name}_{q}_ms" for name in ("ttft", "tpot", "itl") for q in ("p50", "p99")))


def prompts(model: Path, lengths: pd.DataFrame, seed: int, folder: Path) -> Path:
    """Text of the asked lengths in tokens, one JSON line a request."""
    lengths.assign(arrival_s=0.0).to_json(folder / "lengths.jsonl", orient="records", lines=True)
    rows = zip(texts(read(folder / "lengths.jsonl"), load_tokenizer(model), seed), lengths.output_tokens, strict=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "output_tokens": int(n)}) + "\n" for text, n in rows))
    return path


def theirs(
    args: argparse.Namespace, requests: pd.DataFrame, seed: int, folder: Path
) -> tuple[dict[str, float], pd.DataFrame]:
    """What ``vllm bench serve`` measured, and the trace of what it sent: ``arrival_s``, lengths in tokens."""
    command = [
        args.vllm, "-c", VLLM, "--backend", "openai", "--base-url", args.url, "--endpoint", "/v1/completions",
        "--model", args.served, "--tokenizer", str(args.model), "--dataset-name", "custom",
        "--dataset-path", str(prompts(args.model, requests, seed, folder)), "--custom-output-len", "-1",
        "--skip-chat-template",
        "--request-rate", str(args.rate), "--num-prompts", str(len(requests)), "--seed", str(seed), "--ignore-eos",
        "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
        "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "result.json",
        "--disable-tqdm",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    d = json.loads((folder / "result.json").read_text())
    if d["completed"] < len(requests):
        raise SystemExit(f"vllm bench serve: {len(requests) - d['completed']} of {len(requests)} requests failed")
    start, ttft = np.array(d["start_times"]), np.array(d["ttfts"])
    end = start + ttft + [sum(gaps) for gaps in d["itls"]]
    figures = {f"{name}_{q}_ms": d[f"{q}_{name}_ms"] for name in ("ttft", "tpot", "itl") for q in ("p50", "p99")}
    figures["output_tokens_per_s"] = sum(d["output_lens"]) / (end.max() - start.min())
    sent = {"arrival_s": start - start.min(), "input_tokens": d["input_lens"], "output_tokens": d["output_lens"]}
    return figures, pd.DataFrame(sent).sort_values("arrival_s")


def ours(args: argparse.Namespace, trace: pd.DataFrame, seed: int, folder: Path) -> dict[str, float]:
    trace.to_json(folder / "trace.jsonl", orient="records", lines=True, double_precision=9)
    command = [
        sys.executable, "-c", "from tuner.cli.app import main; main()", "replay", "--url", args.url, "--trace",
        str(folder / "trace.jsonl"), "--model", args.served, "--tokenizer", str(args.model), "--seed", str(seed + 1000),
        "--no-early-stop", "--records", str(folder / "records.parquet"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"tuner replay ended with {done.returncode}")
    told = json.loads(done.stdout)
    m = told["metrics"]
    figures = {f"{name}_{q}_ms": 1e3 * m[f"{name}_{q}_s"] for name in ("ttft", "tpot", "itl") for q in ("p50", "p99")}
    records = pd.read_parquet(folder / "records.parquet")
    span_s = (records.end_ns.max() - records.sent_ns.min()) / 1e9
    figures["output_tokens_per_s"] = records.output_tokens.sum() / span_s
    if failed := int((records.error != "").sum()):
        raise SystemExit(f"tuner replay: {failed} of {len(records)} requests failed")
    return figures | {"untrusted": told["untrusted"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--served", default="", help="the served model's name (default: the folder's path)")
    parser.add_argument(
        "--trace", type=Path, required=True, help="a .parquet as `tuner trace convert` writes it: the lengths"
    )
    parser.add_argument("--rate", type=float, required=True, help="requests/s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals per run")
    parser.add_argument("--max-output-tokens", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path, default=None, help="append each run as a JSON line")
    args = parser.parse_args()
    args.served = args.served or str(args.model)
    lengths = pd.read_parquet(args.trace)
    if args.max_output_tokens:
        lengths["output_tokens"] = lengths.output_tokens.clip(upper=args.max_output_tokens)
    count = int(args.rate * args.seconds)
    with tempfile.TemporaryDirectory() as name:
        unmeasured = lengths.tail(WARM).assign(arrival_s=[i / args.rate for i in range(WARM)])
        ours(args, unmeasured, args.rounds, Path(name))
    for turn in range(args.rounds):
        requests = lengths.iloc[turn * count : (turn + 1) * count]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            peer, trace = theirs(args, requests, turn, folder)
            runs = {"vllm bench serve": peer, "tuner": ours(args, trace, turn, folder)}
        for client, figures in runs.items():
            line = {"client": client, "turn": turn, "requests": len(requests), "rate": args.rate, **figures}
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(client, *(f"{key} {figures[key]:.4g}" for key in FIGURES), flush=True)


if __name__ == "__main__":
    main()
