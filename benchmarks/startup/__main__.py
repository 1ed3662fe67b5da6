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
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tuner.engines.protocol import Site
from tuner.engines.vllm import VllmEngine
from tuner.space.config import ServingConfig
from tuner.spec.facts import of_machine

HERE = Path(__file__).parent
Flags = dict[str, bool | int | float | str | None]


@dataclass(frozen=True, slots=True)
class Case:
    """``caches``: ``kept`` are those of earlier starts on this machine, ``empty`` is a fresh folder, ``shared`` one
    fresh folder for all such cases of a round, in the order of their naming. ``flags`` beside the common ones."""

    eager: bool = True
    fast: str = "off"
    caches: str = "kept"
    flags: Flags = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "fast": Case(fast="auto"),
    "no-caches": Case(caches="empty"),
    "compiled-first": Case(eager=False, caches="shared"),
    "compiled-again": Case(eager=False, caches="shared"),
    "compiled-other-seqs": Case(eager=False, caches="shared", flags={"max-num-seqs": 64}),
    "compiled-other-batch": Case(eager=False, caches="shared", flags={"max-num-batched-tokens": 1024}),
    "compiled-fast": Case(eager=False, fast="auto", caches="shared"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--python", default="")
    parser.add_argument("--case", action="append", choices=list(CASES), default=[])
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    # absolute: a server starts in its trial's folder
    model, python = (os.path.abspath(path) if path else "" for path in (args.model, args.python))
    engines = {mode: VllmEngine(python=python, fast_start=mode) for mode in ("off", "auto")}
    with tempfile.TemporaryDirectory() as empty:
        for number in range(args.repeat):
            for case in args.case:
                folder = "shared" if CASES[case].caches == "shared" else case
                line = launch(case, engines, model, Path(empty) / f"{number}-{folder}")
                with (HERE / "measured.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(line)
    for engine in engines.values():
        engine.close()
    table()


def launch(case: str, engines: dict[str, VllmEngine], model: str, empty: Path) -> dict[str, object]:
    chosen = CASES[case]
    engine = engines[chosen.fast]
    dtype = str(of_machine()["native_dtype"])
    flags: Flags = {"load-format": "dummy", "dtype": dtype, "max-model-len": 4096, **chosen.flags}
    flags |= {"enforce-eager": None} if chosen.eager else {}
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if chosen.caches != "kept":
        env |= {"VLLM_CACHE_ROOT": str(empty / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(empty / "torchinductor")}
    config = ServingConfig(model, {}, flags, env, "", 0)
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), (), threading.Event(), lambda _name, _data: None)
        standby_s = prepare(engine, config, site) if chosen.fast == "auto" else 0.0
        load = os.getloadavg()[0]
        server = engine.launch(config, site)
        spent_s = sum(cpu_s(pid) for pid in _tree(server))
        server.stop()
    phases = dict(server.boot.phases_s)
    return {
        "case": case,
        "version": engine.version(),
        "dtype": dtype,
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
    """Medians over all lines of the file that were measured in this machine's own type."""
    lines = [json.loads(line) for line in (HERE / "measured.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"{'case':20} {'n':>2} {'wall s':>7} {'min':>6} {'CPU s':>6}")
    for case in CASES:
        of = [line for line in lines if line["case"] == case and line["dtype"] == of_machine()["native_dtype"]]
        if of:
            wall = [line["total_s"] for line in of]
            cpu = statistics.median(line["cpu_s"] for line in of)
            print(f"{case:20} {len(of):2} {statistics.median(wall):7.1f} {min(wall):6.1f} {cpu:6.1f}")


if __name__ == "__main__":
    main()
