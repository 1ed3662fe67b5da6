"""What each way of shortening a start is worth, on this machine: real launches, one after the other.

    python -m benchmarks.startup --model FOLDER --python VLLM_PYTHON --case plain --case fast --repeat 3

Appends one line per launch to ``benchmarks/startup/measured.jsonl`` (wall seconds per phase, CPU seconds of the whole
tree until ready, the load average before) and prints the table of all lines. CPU seconds do not depend on who else uses
the machine; wall seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tuner.engines.protocol import Site
from tuner.engines.vllm import VllmEngine
from tuner.space.config import ServingConfig

HERE = Path(__file__).parent
CASES = {
    # name: (eager, fast start, caches of earlier starts)
    "plain": (True, "off", True),
    "fast": (True, "auto", True),
    "no-caches": (True, "off", False),
    "compiled-no-caches": (False, "off", False),
    "compiled": (False, "off", True),
    "compiled-fast": (False, "auto", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--python", default="")
    parser.add_argument("--case", action="append", choices=list(CASES), default=[])
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    engines = {mode: VllmEngine(python=args.python, fast_start=mode) for mode in ("off", "auto")}
    with tempfile.TemporaryDirectory() as empty:
        for number in range(args.repeat):
            for case in args.case:
                line = launch(case, engines, args.model, Path(empty) / f"{number}-{case}")
                with (HERE / "measured.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(line)
    for engine in engines.values():
        engine.close()
    table()


def launch(case: str, engines: dict[str, VllmEngine], model: str, empty: Path) -> dict[str, object]:
    eager, mode, caches = CASES[case]
    engine = engines[mode]
    flags: dict[str, bool | int | float | str | None] = {"load-format": "dummy", "dtype": "bfloat16"}
    flags |= {"max-model-len": 4096} | ({"enforce-eager": None} if eager else {})
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if not caches:
        env |= {"VLLM_CACHE_ROOT": str(empty / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(empty / "torchinductor")}
    config = ServingConfig(model, {}, flags, env, "", 0)
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), (), threading.Event(), lambda _name, _data: None)
        standby_s = prepare(engine, config, site) if mode == "auto" else 0.0
        load = os.getloadavg()[0]
        server = engine.launch(config, site)
        spent_s = sum(cpu_s(pid) for pid in _tree(server))
        server.stop()
    phases = dict(server.boot.phases_s)
    return {
        "case": case,
        "version": engine.version(),
        "total_s": server.boot.total_s,
        "cpu_s": round(spent_s, 1),
        "standby_s": round(standby_s, 1),
        "load_average": round(load, 1),
        "cores": os.cpu_count(),
        "phases_s": phases,
        "facts": {name: value for name, value in server.boot.facts.items() if name.endswith("_s")},
    }


def prepare(engine: VllmEngine, config: ServingConfig, site: Site) -> float:
    """Seconds that the standby takes to import, once per study (0 where it is there already)."""
    started = time.monotonic()
    warm = engine.fast is not None and bool(engine.fast._standbys)
    if not warm:
        engine.launch(config, site).stop()
    return 0.0 if warm else time.monotonic() - started


def _tree(server: object) -> list[int]:
    return [process.pid for process in server._running.process.members()]  # type: ignore[attr-defined]


def cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def table() -> None:
    """Medians over all lines of the file."""
    lines = [json.loads(line) for line in (HERE / "measured.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"{'case':20} {'n':>2} {'wall s':>7} {'min':>6} {'CPU s':>6}")
    for case in CASES:
        of = [line for line in lines if line["case"] == case]
        if of:
            wall = [line["total_s"] for line in of]
            cpu = statistics.median(line["cpu_s"] for line in of)
            print(f"{case:20} {len(of):2} {statistics.median(wall):7.1f} {min(wall):6.1f} {cpu:6.1f}")


if __name__ == "__main__":
    main()
