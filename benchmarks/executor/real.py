"""A study of a real CPU vLLM through Ray, to the end: its exported YAML is served as its head says, and asked.

    python -m benchmarks.executor.real        # two launches of examples/quickstart.yaml's model, float32, one Ray node

Needs what ``make setup`` sets up. Prints one JSON document, and exits with 1 unless the served file answers.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from benchmarks.executor.__main__ import ROOT, cluster_of

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
STUDY = f"""\
name: rayreal
model: {ROOT}/models/tiny-qwen3
engine:
  kind: vllm
  python: {PYTHON}
  args: {{load-format: dummy, dtype: float32, max-model-len: 1024}}
  env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
objective: {{name: x, latency: tpot_p90, slo: {{ttft_p90: 60s, tpot_p90: 10s}}, quality: {{kl_max: null}}}}
price_usd_per_gpu_hour: 0.10
trace: {{file: {ROOT}/examples/traces/conversation-small.jsonl, window: 10s, search_windows: 1, heldout_windows: 1}}
load: {{ladder: [0.25, 0.5], warmup: 1s}}
budget: {{launches: 2, verify_share: 0}}
executor: ray
"""


def study(folder: Path, address: str) -> dict[str, Any]:
    """Runs the study as a user does; what its trials say of where they ran."""
    (folder / "study.yaml").write_text(STUDY)
    began_s = time.monotonic()
    words = ["tune", "study.yaml", "--plain", "--address", address, "--reports", str(folder / "reports")]
    done = subprocess.run([sys.executable, "-c", "from tuner.cli.app import main; main()", *words], cwd=folder)
    trials = sorted((folder / "reports" / "rayreal" / "trials").glob("*/outcome.json"))
    outcomes = [json.loads(path.read_text()) for path in trials]
    return {
        "exit": done.returncode,
        "study_s": round(time.monotonic() - began_s, 1),
        "trials": [(end["outcome"]["kind"], end.get("node")) for end in outcomes],
    }


def served(best: Path) -> dict[str, Any]:
    """Starts the file as its head says, and asks for a completion. Seconds until it answered, and its words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PATH": f"{PYTHON.parent}:{os.environ['PATH']}"}
    said = next(line for line in best.read_text().splitlines() if line.startswith("# Start:"))
    command = f"{said.removeprefix('# Start:').strip()} --host 127.0.0.1 --port {port}"
    with (best.parent / "serve.log").open("wb") as log:
        server = subprocess.Popen(["bash", "-c", command], cwd=best.parent, env=env, stdout=log, stderr=log)
    began_s = time.monotonic()
    try:
        while server.poll() is None and time.monotonic() - began_s < 300:
            try:
                model = _get(f"http://127.0.0.1:{port}/v1/models")["data"][0]["id"]
                asked = {"model": model, "prompt": "The cheapest way", "max_tokens": 8}
                answer = _get(f"http://127.0.0.1:{port}/v1/completions", asked)
                return {"serves_after_s": round(time.monotonic() - began_s, 1), "usage": answer["usage"]}
            except OSError:
                time.sleep(1.0)
        return {"serves_after_s": None, "log": (best.parent / "serve.log").read_text()[-2000:]}
    finally:
        for process in psutil.Process(server.pid).children(recursive=True):
            process.kill()
        server.kill()
        server.wait()


def _get(url: str, data: Any = None) -> Any:
    body = json.dumps(data).encode() if data else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tuner-ray-") as name:
        folder = Path(name)
        with cluster_of(1, 2, gpus=0) as made:
            found = study(folder, made.address)
        best = folder / "reports" / "rayreal" / "best-config.yaml"
        if best.exists():
            flags = [line for line in best.read_text().splitlines() if line and not line.startswith("#")]
            found |= {"exported": flags} | served(best)
    print(json.dumps(found, indent=1))
    return 0 if found.get("serves_after_s") else 1


if __name__ == "__main__":
    raise SystemExit(main())
