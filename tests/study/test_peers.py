"""Several tuners on one study: PostgreSQL holds the ledger, every tuner keeps a whole study folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.study import postgres
from tuner.study.outcome import Measured
from tuner.study.store import Store

pytest.importorskip("psycopg", reason='no driver: pip install "tuner[postgres]"')
ROOT = Path(__file__).parents[2]
STUDY = """\
name: shared
model: my-org/my-model
engine: {kind: function, options: {target: "tests.study.measured:measure"}}
hardware: {gpu: L4, gpus: 1}
search_space:
  name: s
  engine: function
  parameters:
    batch: {flag: batch, values: [8, 16, 32, 64], default: 8, trades: throughput against TPOT}
    colour: {flag: colour, values: [red, green, blue], default: red, trades: nothing}
objective: {name: x, latency: tpot_p99, slo: {tpot_p99: 50ms}}
price_usd_per_gpu_hour: 0.70
load: {ladder: [0.5, 1]}
budget: {launches: 40, verify_share: 0}
sampler: grid
storage: {url: "${TUNER_TEST_DATABASE}", heartbeat: 1s, grace: 4s}
"""


@pytest.fixture(scope="module")
def server():
    where = postgres.binaries()
    if where is None:
        pytest.skip(postgres.MISSING)
    with postgres.served(where) as made:
        yield made


class Tuner:
    """``tuner tune`` as a process, with a study folder of its own."""

    def __init__(self, folder: Path, name: str, url: str, measure_s: float = 0.2, text: str = STUDY) -> None:
        study = folder / "study.yaml"
        study.write_text(text)
        self.folder, self.log = folder / name / "shared", folder / f"{name}.log"
        env = {**os.environ, "TUNER_TEST_DATABASE": url, "MEASURE_S": str(measure_s), "PYTHONPATH": str(ROOT)}
        env["TUNER_RUNTIME_DIR"] = str(folder / "runtime")
        words = [sys.executable, "-c", "from tuner.cli.app import main; main()", "tune", str(study), "--plain"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*words, "--reports", str(folder / name)], env=env, stdout=out, stderr=out, cwd=ROOT
            )

    def ended(self, timeout_s: float = 120) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.log.read_text()) from None

    def until(self, said: str, timeout_s: float = 60) -> None:
        """Waits until the log says so."""
        deadline = time.monotonic() + timeout_s
        while said not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    @property
    def trials(self):
        return Store(self.folder).trials()


def measurements(tuner: Tuner) -> dict:
    """Config hash -> what was measured, to compare studies by."""
    return {t.config.hash: [dict(s.metrics) for s in t.outcome.steps] for t in tuner.trials}


@pytest.mark.slow
def test_two_tuners_measure_every_configuration_once_and_both_folders_hold_all_of_it(server, tmp_path):
    url = server.database()
    both = [Tuner(tmp_path, name, url) for name in ("a", "b")]
    assert [tuner.ended() for tuner in both] == [0, 0], both[0].log.read_text() + both[1].log.read_text()
    for tuner in both:
        assert sorted(Counter(t.config.hash for t in tuner.trials).values()) == [1] * 12
        assert sum(t.baseline for t in tuner.trials) == 1
    assert measurements(both[0]) == measurements(both[1])
    elsewhere = [sum("elsewhere" in (t.extra or {}) for t in tuner.trials) for tuner in both]
    assert sum(elsewhere) == 12 and min(elsewhere) > 0  # each measured some, and copied the rest
    numbers = [[t.number for t in tuner.trials] for tuner in both]
    assert numbers[0] == numbers[1] == list(range(12))
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert postgres.PASSWORD.encode() not in everything


@pytest.mark.slow
def test_a_tuner_killed_with_9_has_its_running_trial_taken_up_within_the_grace_period(server, tmp_path):
    url = server.database()
    doomed = Tuner(tmp_path, "a", url, measure_s=1.5)
    doomed.until("[1] launching")
    other = Tuner(tmp_path, "b", url, measure_s=0.3)
    other.until("launching")
    running = [t for t in doomed.folder.glob("trials/*") if not (t / "outcome.json").exists()]
    assert running
    params = json.loads((running[-1] / "config.json").read_text())["params"]
    os.kill(doomed.process.pid, signal.SIGKILL)
    killed_s = time.time()
    assert other.ended() == 0, other.log.read_text()
    again = next(t for t in other.trials if dict(t.params) == params)
    assert isinstance(again.outcome, Measured) and "elsewhere" not in again.extra
    assert again.started_s - killed_s < 4 + 1 + 12, "grace, a heartbeat, and what was running and queued before it"
    assert "is gone" in again.extra["why"]
    assert sorted(Counter(t.config.hash for t in other.trials).values()) == [1] * 12
    alone = Tuner(tmp_path, "c", server.database(), measure_s=0.0)
    assert alone.ended() == 0
    assert measurements(alone) == measurements(other)


def test_a_database_that_cannot_be_reached_is_one_clear_line_and_exit_code_4(tmp_path):
    tuner = Tuner(tmp_path, "a", "postgresql://tuner:pass@127.0.0.1:1/none")
    assert tuner.ended() == 4
    text = tuner.log.read_text()
    assert "Traceback" not in text and "was not reached" in text and "pass@" not in text


@pytest.mark.slow
def test_an_outage_of_the_database_loses_nothing(server, tmp_path):
    url = server.database()
    tuner = Tuner(tmp_path, "a", url, measure_s=1.0)
    tuner.until("[1] launching")
    server.stop()
    time.sleep(4)
    server.start()
    assert tuner.ended() == 0, tuner.log.read_text()
    assert sorted(Counter(t.config.hash for t in tuner.trials).values()) == [1] * 12
    assert "Outcomes are kept" in tuner.log.read_text()


def test_another_study_of_the_same_name_is_refused(server, tmp_path):
    url = server.database()
    first = Tuner(tmp_path, "a", url, text=STUDY.replace("launches: 40", "launches: 1"))
    assert first.ended() == 0, first.log.read_text()
    other = Tuner(tmp_path, "b", url, text=STUDY.replace("[0.5, 1]", "[0.5, 2]"))
    assert other.ended() == 2
    assert "has another load" in other.log.read_text() and "Traceback" not in other.log.read_text()
