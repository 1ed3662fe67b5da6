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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.replay.clients import Setting, benching, our_figures, replaying, their_figures
from tuner.load.formats import read
from tuner.load.prompts import PromptTexts, load_tokenizer, whole_words
from tuner.study.workload import shorten

WARM = 60  # requests
NAMES = ("ttft", "tpot", "itl")


def prompts(s: Setting, lengths: pd.DataFrame, seed: int) -> Path:
    """Text of the asked lengths in tokens, one JSON line a request."""
    lengths.assign(arrival_s=0.0).to_json(s.folder / "lengths.jsonl", orient="records", lines=True)
    rows = zip(
        PromptTexts(read(s.folder / "lengths.jsonl"), whole_words(load_tokenizer(s.model)), seed),
        lengths.output_tokens,
        strict=True,
    )
    path = s.folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "output_tokens": int(n)}) + "\n" for text, n in rows))
    return path


def theirs(python: str, s: Setting, lengths: pd.DataFrame, seed: int) -> tuple[dict[str, float], pd.DataFrame]:
    """What ``vllm bench serve`` measured, and the trace of what it sent: ``arrival_s``, lengths in tokens."""
    dataset = (
        "--dataset-name",
        "custom",
        "--dataset-path",
        str(prompts(s, lengths, seed)),
        "--custom-output-len",
        "-1",
    )
    more = ("--skip-chat-template", "--seed", str(seed), "--temperature", "0")
    subprocess.run(benching(python, s, *dataset, *more), check=True, stdout=sys.stderr)
    d = json.loads((s.folder / "result.json").read_text())
    if d["completed"] < s.count:
        raise SystemExit(f"vllm bench serve: {s.count - d['completed']} of {s.count} requests failed")
    start, ttft = np.array(d["start_times"]), np.array(d["ttfts"])
    end = start + ttft + [sum(gaps) for gaps in d["itls"]]
    tokens_per_s = sum(d["output_lens"]) / (end.max() - start.min())
    sent = {"arrival_s": start - start.min(), "input_tokens": d["input_lens"], "output_tokens": d["output_lens"]}
    figures = {"output_tokens_per_s": tokens_per_s, **their_figures(d, NAMES)}
    return figures, pd.DataFrame(sent).sort_values("arrival_s")


def ours(s: Setting, trace: pd.DataFrame, seed: int) -> tuple[dict[str, float], Sequence[str]]:
    """What ``tuner replay`` measured, and why it should not be trusted (empty: it may be)."""
    trace.to_json(s.folder / "trace.jsonl", orient="records", lines=True, double_precision=9)
    command = replaying(s, "--seed", str(seed + 1000), "--no-early-stop")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"tuner replay ended with {done.returncode}")
    told = json.loads(done.stdout)
    records = pd.read_parquet(s.folder / "records.parquet")
    if failed := int((records.error != "").sum()):
        raise SystemExit(f"tuner replay: {failed} of {len(records)} requests failed")
    span_s = (records.end_ns.max() - records.sent_ns.min()) / 1e9
    figures = {"output_tokens_per_s": records.output_tokens.sum() / span_s, **our_figures(told["metrics"], NAMES)}
    return figures, told["untrusted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--served", default="", help="the served model's name (default: the folder's path)")
    parser.add_argument("--trace", type=Path, required=True, help="the lengths; any format that `tuner trace` reads")
    parser.add_argument("--rate", type=float, required=True, help="requests/s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals per run")
    parser.add_argument("--max-output-tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path, default=None, help="append each run as a JSON line")
    args = parser.parse_args()
    trace, _ = shorten(read(args.trace), None, args.max_output_tokens, None)
    lengths = pd.DataFrame({"input_tokens": trace.input_tokens, "output_tokens": trace.output_tokens})
    count = int(args.rate * args.seconds)

    def setting(requests: pd.DataFrame, folder: str) -> Setting:
        served = args.served or str(args.model)
        return Setting(args.url, args.model, args.rate, len(requests), Path(folder), served=served)

    with tempfile.TemporaryDirectory() as folder:
        unmeasured = lengths.tail(WARM)
        unmeasured = unmeasured.assign(arrival_s=np.arange(len(unmeasured)) / args.rate)
        ours(setting(unmeasured, folder), unmeasured, args.rounds)
    for turn in range(args.rounds):
        requests = lengths.iloc[turn * count : (turn + 1) * count]
        with tempfile.TemporaryDirectory() as folder:
            s = setting(requests, folder)
            peer, sent = theirs(args.vllm, s, requests, turn)
            own, untrusted = ours(s, sent, turn)
        for client, figures in {"vllm bench serve": peer, "tuner": own}.items():
            line = {"client": client, "turn": turn, "requests": s.count, "rate": args.rate, **figures}
            if client == "tuner":
                line["untrusted"] = untrusted
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(client, *(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
