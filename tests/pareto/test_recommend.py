from pathlib import Path

import pytest

from tests import studies
from tuner.pareto.choice import choose
from tuner.pareto.recommend import recommended
from tuner.study.store import write_json


def test_without_a_verdict_the_search_decides(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    assert recommended(store, study) == choose(store.trials(), study.objective)


def test_a_verdict_decides_with_its_own_load_cost_and_latency(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10, verified=True)
    searched, found = choose(store.trials(), study.objective), recommended(store, study)
    assert searched.point and found.point and found.point.role == "verify"
    assert (found.point.load, found.point.cost, found.point.latency) == (1.8, 0.47, 0.031)
    assert found.point.cost_interval == (0.45, 0.49)
    assert found.baseline and found.baseline.cost == 0.66
    assert found.cost_change and found.cost_change.value == pytest.approx(-0.26) and found.cost_change.proven
    assert found.latency_change and found.latency_change.interval == pytest.approx((0.02, 0.19))
    assert "Recommended: trial" in found.text and "**" not in found.text


def test_a_verdict_for_the_default_overrules_the_search(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    verdict = studies.verification(study, store)
    data = verdict.to_dict() | {"choice": "default", "is_default": True, "trial": 0, "load": 1.3}
    data["config"] = store.trials()[0].config.to_dict()
    write_json(store.folder / "verify.json", data)
    found = recommended(store, study)
    assert found.point and found.point.baseline and found.point.trial == 0 and found.cost_change is None


def test_where_nothing_held_on_the_held_out_windows_nothing_is_recommended(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    write_json(store.folder / "verify.json", studies.verification(study, store, winner=-1).to_dict())
    found = recommended(store, study)
    assert found.point is None and "Nothing is recommended" in found.text


def test_a_file_that_is_no_verdict_changes_nothing(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    write_json(store.folder / "verify.json", {"text": "half", "rows": []})
    assert recommended(store, study) == choose(store.trials(), study.objective)
