import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import studies
from tests.verify.test_compare import side
from tests.verify.test_finalists import trial
from tests.verify.test_promise import promise
from tuner.cli import certify
from tuner.errors import UsageError
from tuner.spec.study import EngineSpec
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
        assert certify.verify(file if holds else file.parent, None, 10.0, json=False) == code
        assert f"holds: {holds}" in capsys.readouterr().out
    assert certify.verify(file, None, 10.0, json=True) == 3
    assert json.loads(capsys.readouterr().out) == {"holds": False}


def test_that_another_configuration_is_recommended_is_said_with_the_way_back(tmp_path, monkeypatch, capsys):
    found = studies.write(tmp_path / "s", trials=4)
    for winner, said in (
        (found[1].trials()[0].config.hash, ""),
        ("another", "s/ablation.json away, then: tuner export S;"),
    ):
        result = SimpleNamespace(config=found[1].trials()[0].config, winner=winner, text="text")
        written = result, found[1].folder / "ablation.json"
        monkeypatch.setattr(certify, "_session", lambda _path, _work, written=written: written)
        assert certify.ablate("S", 12, json=False) == 0
        told = capsys.readouterr()
        assert told.out == "text\n" and said in told.err and bool(said) == bool(told.err)


def test_no_time_at_all_is_bad_usage(file):
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="--minutes"):
            certify.verify(file, None, minutes, json=False)


def test_a_study_that_recommends_nothing_is_said_to_have_no_promise(tmp_path):
    (tmp_path / "study.yaml").touch()
    with pytest.raises(UsageError, match="has no exported recommendation") as refused:
        certify.verify(tmp_path, None, 10.0, json=False)
    assert refused.value.fix.endswith(f"tuner export {tmp_path}")


def test_two_studies_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch, capsys):
    costs = {"one": 1000, "two": 3000}
    monkeypatch.setattr(certify, "_side", lambda path: side("chat", trial(0, 2048, costs[path.name], tpot_s=0.02)))
    certify.compare(tmp_path / "one", tmp_path / "two", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["second"]) == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert found["levels"][0]["first"] > found["levels"][0]["second"]


def test_a_study_without_trials_is_not_taken_for_an_emulated_one(tmp_path, monkeypatch, capsys):
    for name, kind in (("one", "vllm"), ("two", "emulator")):
        study, store = studies.write(tmp_path / name, trials=0, engine=EngineSpec(kind))
        monkeypatch.setattr(certify, "opened", lambda _path, found=(study, store): found)
        assert certify._side(tmp_path / name).facts["figures"] == ("measured" if name == "one" else "emulated")


def test_what_two_studies_were_measured_with_is_held_side_by_side(tmp_path, monkeypatch, capsys):
    made = {
        "one": {"engine": EngineSpec("vllm", args={"dtype": "bfloat16"}, env={"HF_TOKEN": "hf_aaaaaaaaaa"})},
        "two": {"engine": EngineSpec("vllm", args={"dtype": "float16"}, env={"HF_TOKEN": "hf_bbbbbbbbbb"})},
    }
    found = {name: studies.write(tmp_path / name, trials=2, **more) for name, more in made.items()}
    study = found["two"][0]
    study = replace(study, load=replace(study.load, ladder=(1.0, 3.0)), trace=replace(study.trace, window_s=8.0))
    first = study.space.parameters[0]
    study = replace(study, space=replace(study.space, parameters=(replace(first, values=(1, 2)),)))
    found["two"] = study, found["two"][1]
    monkeypatch.setattr(certify, "opened", lambda path: found[path.name])
    certify.compare(tmp_path / "one", tmp_path / "two", json=True)
    said = "; ".join(json.loads(capsys.readouterr().out)["differences"])
    assert "window_s 60 / 8" in said and " / 1, 3" in said and "server: dtype bfloat16 / float16" in said
    assert first.name in said and "hf_" not in said and "HF_TOKEN" not in said


def test_what_is_infinite_is_null_in_json(monkeypatch, capsys):
    sides = {"a": side("a", trial(0, 2048, 1000, tpot_s=0.04)), "b": side("b", trial(0, 2048, 1000, tpot_s=0.01))}
    monkeypatch.setattr(certify, "_side", lambda path: sides[path])
    certify.compare("a", "b", json=True)
    level = json.loads(capsys.readouterr().out)["levels"][0]
    assert level["first"] is None and level["ratio"][2] == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fixed": {"max-model-len": 8192}}, "server: max-model-len 4096 / 8192"),
        ({"env": {"HF_HUB_OFFLINE": "0"}}, "server: HF_HUB_OFFLINE 1 / 0"),
        ({"rules": ()}, "parameters: rules"),
        ({}, ""),
    ],
)
def test_what_a_space_gives_every_server_and_forbids_is_held_side_by_side(tmp_path, monkeypatch, capsys, changed, said):
    """That the one ladder was settled by the tuner and the other written is no difference."""
    one, store = studies.write(tmp_path / "one", trials=1)
    two = replace(one, name="two", space=replace(one.space, **changed), load=replace(one.load, auto=True))
    monkeypatch.setattr(certify, "opened", lambda path: ({"one": one, "two": two}[path.name], store))
    certify.compare(tmp_path / "one", tmp_path / "two", json=True)
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert [text[: len(said)] for text in differences] == ([said] if said else [])
