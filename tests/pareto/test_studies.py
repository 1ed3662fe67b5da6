"""The fixture itself must be believable, or what is tested with it means nothing."""

from pathlib import Path

from tests import studies
from tuner.study.outcome import Aborted, Infeasible, Measured, Untrusted


def test_a_made_study_reads_back_with_every_kind_of_outcome(tmp_path: Path):
    _, store = studies.write(tmp_path / "s", trials=16)
    trials = store.trials()
    assert len(trials) == 16
    assert trials[0].baseline and trials[0].config.flags == {"max-model-len": 4096}
    assert {type(t.outcome) for t in trials} == {Measured, Infeasible, Untrusted, Aborted}
    assert any(not s.ok for t in trials for s in t.outcome.steps) and any(s.ok for t in trials for s in t.outcome.steps)


def test_a_slow_study_has_no_step_within_slo(tmp_path: Path):
    _, store = studies.write(tmp_path / "s", trials=8, slow=10)
    assert not any(s.ok for t in store.trials() for s in t.outcome.steps)
