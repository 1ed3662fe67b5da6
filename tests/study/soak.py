"""Studies of the emulator under fire: faults in its servers, kills of its tuner, and a look at what is left."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from tests.engines.conftest import LLAMA_8B
from tuner.server.probe import listens
from tuner.study.outcome import Infeasible, Outcome
from tuner.study.store import Store

ROOT = Path(__file__).parents[2]
STILL_S = 240.0  # without a sign of life: on the busiest machine, too, something is wrong

#: fault -> what becomes of its configuration, launch by launch (what may pass is launched once more). Whether what was
#: ``served`` can be believed depends on how busy the machine is, and is not asked here.
FAULTS: dict[str, tuple[str, ...]] = {
    "slow-boot:1": ("served",),
    "hang:graphs": ("hang", "hang"),
    "oom-weights": ("oom-weights",),
    "oom-kv": ("oom-kv",),
    "oom-load:20": ("oom-load",),
    "crash:20": ("crash-under-load", "crash-under-load"),
    "refuse:2": ("unhealthy", "unhealthy"),
    "ignore-sigterm": ("served",),
    "leave-children:2": ("served",),
    "stall:0.5:20": ("served",),
    "killed-load:20": ("killed", "killed"),
    "silent-death": ("crash",),
    "wrong-key": ("port-in-use", "port-in-use"),
    "hang-load:20": ("served",),  # its requests fail by their timeout
    "segfault:20,ignore-sigterm,leave-children:2": ("crash", "crash"),
}

STUDY = """\
name: NAME
model: ./model
engine: ENGINE
hardware: {gpu: H100-SXM, gpus: 3}
parallel: 3
search_space: SPACE
objective: {name: lenient, latency: tpot_p99, slo: {ttft_p99: 20s, tpot_p99: 5s, error_rate: 1%}}
price_usd_per_gpu_hour: 2.5
trace: {file: trace.csv, window: 1s, search_windows: 1, heldout_windows: 1}
load: {ladder: [1], warmup: 0s, request_timeout: 3s, early_stop: false}
budget: {launches: 200, verify_share: 0}
sampler: grid
reports: reports
"""
EMULATOR = "{kind: emulator, options: {boot_scale: 0, stop_wait_s: 1, phase_limit_s: {graphs: 4}}}"


#: Runs the words after the first two, unless somebody runs on one of these GPUs: the lock lives as long as it does.
ALONE = """\
import fcntl, os, sys
for gpu in sys.argv[2].split(","):
    lock = os.open(sys.argv[1] + "/in-use-" + gpu, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_inheritable(lock, True)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def command(folder: Path) -> str:
    """The emulator's process as the engine ``command``, whose GPUs are leased as real ones are; it ends with an error
    where one of them is in use."""
    words = [sys.executable, "-c", ALONE, str(folder), "{gpus}", sys.executable, "-m", "tuner.engines.emulator"]
    words += ["--model", "{model}", "--host", "{host}", "--port", "{port}", "--served-model-name", "{served}"]
    words += ["--gpu", "H100-SXM", "--emulator", json.dumps({"boot_scale": 0}), "{flags}"]
    env = {"VLLM_API_KEY": "{api_key}", "PYTHONPATH": str(ROOT)}
    options = {"log": "vllm", "shares_port": True, "stop_wait_s": 5}
    return json.dumps({"kind": "command", "command": words, "env": env, "options": options})


def workplace(folder: Path) -> Path:
    """A model folder and a trace of four requests per second, as a study file beside them names them."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
    rows = [f"2023-11-16 18:15:{i // 4:02}.{i % 4 * 25:02}00000,40,12" for i in range(80)]
    (folder / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return folder


def space(faults: Iterable[str] = FAULTS) -> str:
    """A search space of two configurations per fault: one that has it, one that is sound."""
    values: dict[str, object] = {"sound0": {}}
    for number, fault in enumerate(faults):
        values.setdefault(f"sound{number}", {"flags": {"max-num-seqs": 16 + number}})
        values[fault] = {"flags": {"max-num-seqs": 64 + number}, "env": {"TUNER_EMULATOR_FAULTS": fault}}
    return _space(values)


def sound_space(count: int) -> str:
    """A search space of ``count`` configurations that all work."""
    return _space(
        {f"sound{number}": {"flags": {"max-num-seqs": 16 + number}} if number else {} for number in range(count)}
    )


def _space(values: dict[str, object]) -> str:
    case = {"values": values, "default": "sound0", "trades": "nothing"}
    return json.dumps({"name": "soak", "engine": "any", "parameters": {"case": case}})


class Tuner:
    """``tuner tune`` as a process that can be killed and resumed; its studies, runtime folder and temporary folder lie
    in ``folder``. ``env`` goes over its environment."""

    def __init__(self, folder: Path, name: str, text: str, **env: str) -> None:
        self.folder, self.name = folder, name
        self.file, self.log = folder / f"{name}.yaml", folder / f"{name}.log"
        self.file.write_text(text.replace("NAME", name))
        self.store = Store(folder / "reports" / name)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "TUNER_RUNTIME_DIR": str(folder / "run")}
        self.env |= {"TMPDIR": str(folder / "tmp"), **env}
        (folder / "tmp").mkdir(exist_ok=True)

    def start(self) -> None:
        words = [sys.executable, "-m", "tuner", "tune", str(self.file), "--plain"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(words, env=self.env, stdout=out, stderr=out, cwd=self.folder)

    def ended(self) -> int:
        """Its exit code; waits for it as long as there is progress."""
        size, deadline = 0, time.monotonic() + STILL_S
        while (code := self.process.poll()) is None:
            if self.log.stat().st_size > size:
                size, deadline = self.log.stat().st_size, time.monotonic() + STILL_S
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"no progress:\n{self.log.read_text()}")
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """``kill -9`` of the tuner alone; what it started has to look after itself."""
        self.process.kill()
        self.process.wait()

    def killed_at(self, chance: random.Random) -> bool:
        """Starts it and kills it at a random moment: a random time after it has begun, resumed or finished a random
        number of trials, so that how fast the machine is does not decide where kills land. False where it ended first.
        """
        before, wanted, more_s = self.progress(), chance.randrange(12), chance.uniform(0, 1.5)
        self.start()
        deadline = time.monotonic() + STILL_S
        while self.progress() - before < wanted and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        deadline = time.monotonic() + more_s
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.process.poll() is not None:
            return False
        self.kill()
        return True

    def progress(self) -> int:
        """Grows by one when a trial is begun, when one ends, and when one that a kill cut off is put aside."""
        trials, aside = self.store.folder / "trials", self.store.folder / "interrupted"
        return len([*trials.glob("*/config.json"), *trials.glob("*/outcome.json"), *aside.glob("*/config.json")])

    def fates(self) -> dict[str, tuple[str, ...]]:
        """Configuration -> what became of it, launch by launch."""
        found: dict[str, tuple[str, ...]] = {}
        for trial in self.store.trials():
            case = str(trial.params["case"])
            found[case] = (*found.get(case, ()), fate(trial.outcome))
        return found


def fate(outcome: Outcome) -> str:
    """A failure's cause; ``served`` for what was measured, believed or not."""
    return outcome.cause if isinstance(outcome, Infeasible) else "served"


def left_in(folder: Path) -> list[str]:
    """What is left of the tuners and servers that worked in ``folder``, in words: processes (also those that left tree
    and session: where they work tells), listening ports, leases, ownership and temporary files. Waits for what is just
    ending."""
    deadline = time.monotonic() + 30
    while (found := _left(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _left(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder):
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[-200:]}")
        except psutil.Error:
            continue
    logs = [path.read_text(errors="replace") for path in folder.rglob("server.log")]
    ports = {int(port) for log in logs for port in re.findall(r"'port': '(\d+)'", log)}
    found += [f"port {port}" for port in ports if listens(port)]
    found += [f"file {path}" for where in ("run", "tmp") for path in (folder / where).rglob("*") if path.is_file()]
    found += [f"folder {path}" for path in (folder / "run").glob("t-*")]
    found += [f"half-written {path}" for path in (folder / "reports").rglob("*.tmp") if "interrupted" not in path.parts]
    return found
