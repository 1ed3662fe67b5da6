"""`tuner init`: a commented study file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tuner.errors import UsageError

TEMPLATE = """\
# A tuner study. Check it with `tuner check {file}`, run it with `tuner tune {file}` (again to resume).
# Relative paths are relative to this file (`reports`: to the current folder).
name: {name}

model: {model} # a model folder, or a Hugging Face id
# draft_model: ./draft # for speculative decoding with a draft model

engine:
  kind: vllm # vllm, sglang, command, attach, function, emulator, own
  # python: /opt/vllm/bin/python # where vLLM is installed, if not beside tuner
  args: {{}} # flags for every server, for example: max-model-len: 8192

# hardware: {{gpu: H100-SXM, gpus: 1}} # found by itself where left out

# search_space: vllm/standard # or quick, full, multi-gpu; vllm-cpu/quick; sglang/standard, ...; or your own file
# parameters: {{max_num_seqs: [64, 128, 256]}} # narrow or pin single parameters

objective: chat # chat, code-completion, rag, batch, or your own file
slo: {{ttft_p99: 500ms, tpot_p99: 50ms}} # over the objective's own
# price_usd_per_gpu_hour: 2.50 # the hardware table's typical price where left out

trace:
  file: {trace} # Azure, BurstGPT, Mooncake, Bailian, ShareGPT, vLLM or tuner's own format
  window: 60s # how long one load step is replayed
  search_windows: 1
  heldout_windows: auto # never seen by the search; the recommendation is measured on them: 3 to 5
  # fill_cache: auto # where prompts share prefixes: so much of the trace before a window is in the cache (0s: nothing)

load:
  ladder: auto # laid around what the default holds; or factors on the trace's rate: [0.5, 1, 1.5, 2, 3, 4]
  warmup: 10s

budget: {{launches: 30}} # or hours: 4, or usd: 15; whichever comes first

sampler: auto # auto, gp, tpe, nsga2, random, grid
seed: 0
"""


def run(path: Path, model: str, trace: str, force: bool) -> None:
    """Writes the template; refuses to write over a file."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", fix="Use --force to write over it, or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    model, trace = (_beside(path, word) for word in (model or "./my-model", trace or "./trace.csv"))
    text = TEMPLATE.format(file=path, name=path.stem, model=model, trace=trace)
    path.write_text(text, encoding="utf-8")
    print(f"Wrote {path}. Next: tuner check {path}", file=sys.stderr)


def _beside(path: Path, said: str) -> str:
    """What was said on the command line, where paths are relative to the current folder, as the file has to say it."""
    if os.path.isabs(said) or path.parent.resolve() == Path.cwd() or not os.path.exists(said):
        return said
    return os.path.relpath(Path.cwd() / said, path.parent.resolve())
