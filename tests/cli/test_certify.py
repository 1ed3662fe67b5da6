import json
from types import SimpleNamespace

import pytest

from tests.verify.test_compare import side
from tests.verify.test_finalists import trial
from tests.verify.test_promise import promise
from tuner.cli import certify
from tuner.errors import UsageError
from tuner.verify.promise import promise_block


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "best-config.yaml"
    path.write_text(promise_block(promise()) + "model: m\n")
    return path


def test_a_promise_that_does_not_hold_is_exit_code_3(file, monkeypatch, capsys):
    (file.parent / "study.yaml").touch()
    for holds, code in ((True, 0), (False, 3)):
        result = SimpleNamespace(holds=holds, text=f"holds: {holds}", to_dict=lambda: {"holds": False})
        monkeypatch.setattr(certify, "_session", lambda _folder, _work, result=result: result)
        assert certify.verify(file, None, 10.0, json=False) == code
        assert f"holds: {holds}" in capsys.readouterr().out
    assert certify.verify(file, None, 10.0, json=True) == 3
    assert json.loads(capsys.readouterr().out) == {"holds": False}


def test_no_time_at_all_is_bad_usage(file):
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="--minutes"):
            certify.verify(file, None, minutes, json=False)


def test_two_studies_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch, capsys):
    costs = {"one": 1000, "two": 3000}
    monkeypatch.setattr(certify, "_side", lambda path: side("chat", trial(0, 2048, costs[path.name], tpot_s=0.02)))
    certify.compare(tmp_path / "one", tmp_path / "two", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["second"]) == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert found["levels"][0]["first"] > found["levels"][0]["second"]
