"""Quantized variants of a model folder, for dummy weights."""

import json
import os
from pathlib import Path

import pytest

from tuner.engines.modelfolder import VARIANTS, local_model, variant
from tuner.errors import UsageError
from tuner.spec.facts import model_config


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 512}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_is_the_model_with_another_config_and_no_weights(tiny, tmp_path, name):
    folder = variant(str(tiny), name, tmp_path / "models")
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == 512 and config["quantization_config"]["quant_method"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((tiny / "config.json").read_text()) == {"hidden_size": 512}  # the model itself is untouched


def test_a_variant_is_written_once(tiny, tmp_path):
    first = variant(str(tiny), "fp8", tmp_path / "models")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert variant(str(tiny), "fp8", tmp_path / "models") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-fp8"]


def test_what_cannot_be_made_is_refused_with_a_reason(tiny, tmp_path):
    with pytest.raises(UsageError, match="known ones: w8a8-int8"):
        variant(str(tiny), "int3", tmp_path)
    with pytest.raises(UsageError, match="not on this disk"):
        variant("nobody/nothing", "fp8", tmp_path)
    (tiny / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(UsageError, match="quantized already"):
        variant(str(tiny), "fp8", tmp_path / "models")


def test_a_model_is_found_in_the_hugging_face_cache(tmp_path):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert local_model("org/name", {"HF_HOME": str(tmp_path)}) == snapshot
    assert local_model("org/other", {"HF_HOME": str(tmp_path)}) is None


def test_the_facts_of_a_model_are_of_the_snapshot_that_is_served(tmp_path, monkeypatch):
    for age, name in ((0, "ffff"), (1, "aaaa"), (2, "0000")):
        snapshot = tmp_path / "huggingface" / "hub" / "models--org--name" / "snapshots" / name
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"vocab_size": age}))
        os.utime(snapshot, (1_000_000 + age % 2, 1_000_000 + age % 2))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_model("org/name") == snapshot.parent / "aaaa" and model_config("org/name") == {"vocab_size": 1}


def test_a_folder_is_a_model_only_with_a_config(tmp_path):
    assert local_model(str(tmp_path), {"HF_HOME": str(tmp_path)}) is None
    (tmp_path / "config.json").write_text("{}")
    assert local_model(str(tmp_path), {}) == tmp_path.resolve()
