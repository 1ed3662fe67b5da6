"""The analytic model of a study knows the models that the study may draft with."""

import shutil
from pathlib import Path

import pytest

from tuner.spec import studyfile
from tuner.study import workload
from tuner.study.session import model_of

ROOT = Path(__file__).parents[2]
STUDY = """
model: target
draft_model: DRAFT
engine: {kind: emulator, args: {max-model-len: 4096}}
hardware: {gpu: H100-SXM, gpus: 1}
trace: {file: FILE, window: 10s, search_windows: 1, heldout_windows: 1}
search_space:
  name: s
  engine: vllm
  parameters:
    speculation:
      trades: time against work
      values:
        none: {}
        draft:
          requires: draft_model
          flags: {speculative-config.model: $draft_model, speculative-config.num_speculative_tokens: 3}
      default: none
"""


@pytest.mark.parametrize("draft", ["draft", "not/here"])
def test_a_draft_models_own_cache_is_counted_where_its_shape_can_be_read(tmp_path: Path, draft: str) -> None:
    for folder, name in (("target", "qwen3-8b"), ("draft", "qwen3-0.6b")):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / f"tests/search/shapes/{name}.json", tmp_path / folder / "config.json")
    file = tmp_path / "study.yaml"
    trace = str(ROOT / "examples/traces/conversation-small.jsonl")
    file.write_text(STUDY.replace("FILE", trace).replace("DRAFT", draft), encoding="utf-8")
    study = studyfile.resolve(studyfile.read(file, "study"), tmp_path)
    model, why = model_of(study, workload.read(study))
    assert model is not None, why
    plain, drafting = (
        model.predict(study.space.config({"speculation": value}, study.model), 1.0).kv_tokens
        for value in ("none", "draft")
    )
    own = 36 / (36 + 28) if draft == "draft" else 1.0  # layers: both models keep the same heads
    assert drafting / plain == pytest.approx(own, rel=0.03)
