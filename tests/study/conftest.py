import os
import threading
from dataclasses import dataclass, field

import pytest

from tests.spec.conftest import workplace as workplace  # the same folder of model and trace
from tests.study.fake import FakeEngine
from tuner.spec import studyfile
from tuner.study import session, workload
from tuner.study.session import Prepared
from tuner.study.store import Store

STUDY = """\
name: s
model: ./model
engine: {kind: vllm}
hardware: {gpu: H100-SXM, gpus: 2}
search_space: vllm/quick
objective: chat
trace: {file: trace.csv, window: 10s}
load: {ladder: [1, 2, 3, 4]}
budget: {launches: 6, verify_share: 0}
sampler: random
reports: REPORTS
"""


@dataclass
class Recorded:
    trials: list = field(default_factory=list)

    def trial_finished(self, number):
        self.trials.append(number)


@dataclass
class Runner:
    """Runs sessions of one study in one folder, as ``tuner tune`` does, on a fake engine."""

    folder: object
    text: str
    recorder: Recorded = field(default_factory=Recorded)
    events: list = field(default_factory=list)

    def study(self, **changes):
        text = self.text
        for old, new in changes.get("replace", {}).items():
            assert old in text, old
            text = text.replace(old, new)
        path = self.folder / "s.yaml"
        path.write_text(text.replace("REPORTS", os.path.relpath(self.folder / "reports")))  # as users write it
        return studyfile.load(path)

    @property
    def store(self):
        return Store(self.folder / "reports" / "s")

    def run(self, engine=None, cancel=None, **changes):
        study = self.study(**changes)
        engine = engine or FakeEngine()
        ready = Prepared(study, engine, workload.read(study), None, "none in this test")
        session.check_flags(study, engine)
        with session.opened(study) as store:
            return session.search(
                ready, store, self.recorder, cancel or threading.Event(), lambda n, d: self.events.append((n, d))
            )


@pytest.fixture
def runner(workplace, monkeypatch):
    monkeypatch.setattr("tuner.executor.local.Gpus", list)  # the study's GPUs are not this machine's
    return Runner(workplace, STUDY)
