"""lm-eval on a finalist, where the user asks for it: tasks with right answers, against the running server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tuner.engines.protocol import Endpoint
from tuner.errors import EnvironmentFault

Run = Callable[[Sequence[str], Mapping[str, str]], int]


def evaluate(
    endpoint: Endpoint, tasks: Sequence[str], folder: Path, *, limit: int | None = None, run: Run | None = None
) -> dict[str, float]:
    """Runs ``lm_eval`` (EleutherAI's lm-evaluation-harness) on ``tasks`` and returns ``task/metric`` to value.

    ``folder`` takes its output; ``limit`` is examples per task. Raises :class:`EnvironmentFault` where it is not
    installed or fails. lm-eval loads its tasks from the network or from its cache.
    """
    program = shutil.which("lm_eval")
    if program is None and run is None:
        raise EnvironmentFault("lm_eval is not installed", fix="pip install 'lm-eval[api]'")
    arguments = (
        f"model={endpoint.model},base_url={endpoint.url}/v1/completions,num_concurrent=8,tokenized_requests=False"
    )
    if endpoint.tokenizer:
        arguments += f",tokenizer={endpoint.tokenizer}"
    command = [program or "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--output_path", str(folder)]
    if limit is not None:
        command += ["--limit", str(limit)]
    environment = {**os.environ, "OPENAI_API_KEY": endpoint.api_key or "none"}
    status = (run or _run)(command, environment)
    found = sorted(folder.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    if status != 0 or not found:
        raise EnvironmentFault(f"lm_eval ended with status {status} and {len(found)} result files", where=str(folder))
    results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
    return {
        f"{task}/{name.split(',')[0]}": float(value)
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, (int, float)) and "stderr" not in name
    }


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.run(command, env=dict(environment), check=False).returncode
