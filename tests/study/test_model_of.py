"""The analytic model of a study knows the models that the study may draft with."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import studies
from tests.server.test_gpu import Nvml
from tests.spec.conftest import workplace as workplace
from tuner.errors import UsageError
from tuner.executor import cluster
from tuner.search import hardware
from tuner.search.model.predictor import AnalyticModel
from tuner.spec import studyfile
from tuner.spec.study import Study
from tuner.study import session, workload
from tuner.study.session import check_env, gpu_here, model_of, opened, prepare

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


CPU = """model: model
engine:
  kind: KIND
  env:
    VLLM_CPU_KVCACHE_SPACE: VALUE
hardware: {gpu: WHERE}
trace: {file: trace.csv, window: 10s}
objective: chat
load: {ladder: auto}
"""


@pytest.mark.parametrize("kind", ["emulator", "vllm"])
def test_an_environment_that_no_server_can_read_is_refused_with_its_line(workplace: Path, kind: str) -> None:
    """Whatever the ladder: it is not launched to find that out."""

    def made(value: str, where: str = "cpu") -> Study:
        file = workplace / "study.yaml"
        file.write_text(CPU.replace("KIND", kind).replace("VALUE", value).replace("WHERE", where))
        return studyfile.load(file)

    with pytest.raises(UsageError, match="VLLM_CPU_KVCACHE_SPACE is 'lots': vLLM takes a whole number") as refused:
        prepare(made("lots"))
    assert refused.value.where == f"{workplace}/study.yaml:5"
    check_env(made("'4'"))
    check_env(made("lots", "H100-SXM"))  # where no server reads it


@pytest.mark.parametrize("gpu", ["NVIDIA L4", "NVIDIA Rubin"])
def test_a_study_of_a_machines_cpus_is_one_of_its_cpus_whatever_gpu_it_has(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml({"name": gpu}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (file := workplace / "study.yaml").write_text(
        CPU.replace("KIND", "vllm").replace("VALUE", "4").replace("WHERE", "cpu")
    )
    study = studyfile.load(file)
    here = hardware.cpu()
    assert (study.hardware.gpus, study.hardware.name, study.space.facts["platform"]) == (0, here.name, "cpu")
    assert study.objective.price_usd_per_gpu_hour == here.price_usd_per_hour
    model, _ = model_of(study, workload.read(study))
    assert model is not None and model.hardware == here


OWN = (
    "- {name: R100, match: [Rubin], memory_gib: 288, bandwidth: 13000, tflops: {bf16: 4000}, price: 7, source: mine}\n"
)


def of_gpu(workplace: Path, monkeypatch: pytest.MonkeyPatch, hardware: str) -> Study:
    """A study on a machine with two GPUs that have no row in the hardware table."""
    gpu = {"name": "NVIDIA Rubin", "total": 100 * 2**30, "capability": (12, 0)}
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(gpu, gpu))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (workplace / "rows.yaml").write_text(OWN)
    (file := workplace / "study.yaml").write_text(
        CPU.replace("KIND", "vllm").replace("VALUE", "4").replace("{gpu: WHERE}", hardware)
    )
    return studyfile.load(file)


def test_a_gpu_without_a_row_is_studied_without_a_model_as_its_driver_describes_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = of_gpu(workplace, monkeypatch, "{gpu: auto}")
    assert (study.hardware.name, study.hardware.gpus) == ("NVIDIA Rubin", 2)
    assert study.hardware.memory_bytes == 100 * 2**30
    assert (study.space.facts["platform"], study.space.facts["compute_capability"]) == ("cuda", 12.0)
    model, why = model_of(study, workload.read(study))
    assert model is None and "NVIDIA Rubin is not in the hardware table (hardware: {table: FILE}" in why
    assert study.objective.price_assumed


def test_a_studys_own_table_names_its_gpu_prices_it_and_gives_it_a_model_also_when_the_file_is_gone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = of_gpu(workplace, monkeypatch, "{table: rows.yaml}")
    assert (study.hardware.name, study.hardware.gpus, study.objective.price_usd_per_gpu_hour) == ("R100", 2, 7)
    study = replace(study, folder=str(workplace / "study"))
    with opened(study):
        pass
    (workplace / "rows.yaml").unlink()
    kept = studyfile.load(workplace / "study")
    assert not studyfile.differences(kept, study)
    for one in (study, kept):
        model, _ = model_of(one, workload.read(one))
        assert model is not None and model.hardware.bandwidth_bytes_per_s == 13e12
        assert gpu_here(one) == cluster.device(one, "Rubin") == "R100"  # as drivers and Ray call it
        assert cluster.price(one, "R100") == 7


def test_an_own_row_is_what_hardware_names_and_a_wrong_one_has_its_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = of_gpu(workplace, monkeypatch, "{table: rows.yaml, gpu: r100, gpus: 4}")
    assert (study.hardware.name, study.hardware.gpus, study.hardware.memory_bytes) == ("R100", 4, 288 * 2**30)
    with pytest.raises(UsageError, match=r"unknown GPU .* hardware: \{table: FILE\}"):
        of_gpu(workplace, monkeypatch, "{gpu: R200}")
    with pytest.raises(UsageError, match=r"study.yaml:6: no such hardware table: row.yaml"):
        of_gpu(workplace, monkeypatch, "{table: row.yaml}")
    monkeypatch.setattr(sys.modules[__name__], "OWN", OWN + "- {name: X}\n")
    with pytest.raises(UsageError, match=r"rows.yaml:2: a row of the hardware table needs bandwidth"):
        of_gpu(workplace, monkeypatch, "{table: rows.yaml}")


@pytest.mark.parametrize("kind", ["emulator", "vllm"])
def test_a_model_whose_layers_are_not_known_is_not_emulated_and_studied_without_a_model(
    workplace: Path, kind: str
) -> None:
    """The emulator has nothing else to answer by."""
    (workplace / "model" / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 64}')
    (file := workplace / "study.yaml").write_text(
        CPU.replace("KIND", kind).replace("VALUE", "4").replace("WHERE", "cpu")
    )
    study = studyfile.load(file)
    if kind == "vllm":
        model, why = model_of(study, workload.read(study))
        assert model is None and "does not know this architecture: mamba2" in why
        return
    with pytest.raises(
        UsageError, match=r"model/config.json: tuner does not know this architecture: mamba2 .*emulated"
    ):
        prepare(study, launching=False)


def resolved(folder: Path, draft: str = "draft", target: str = "qwen3-8b") -> Study:
    for name, shape in (("target", target), ("draft", "qwen3-0.6b")):
        (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / f"tests/search/shapes/{shape}.json", folder / name / "config.json")
    file = folder / "study.yaml"
    trace = str(ROOT / "examples/traces/conversation-small.jsonl")
    file.write_text(STUDY.replace("FILE", trace).replace("DRAFT", draft), encoding="utf-8")
    return studyfile.resolve(studyfile.read(file, "study"), folder)


def test_what_memory_arithmetic_finds_too_large_by_far_is_refused_with_its_reason(tmp_path: Path) -> None:
    for target, refused in (("qwen3-8b", False), ("llama-3.3-70b", True)):
        study = resolved(tmp_path / target, target=target)
        ready = prepare(study)
        why = ready.why_not(study.space.config(study.space.default(), study.model))
        assert ("GiB" in why) == refused, why


def test_what_no_memory_would_help_is_refused_as_well(tmp_path: Path) -> None:
    study = resolved(tmp_path)
    ready = prepare(study)
    config = study.space.config(study.space.default(), study.model)
    config = replace(config, flags={**config.flags, "tensor-parallel-size": 3})
    assert "heads cannot be split over 3 GPUs" in ready.why_not(config)


@pytest.mark.parametrize("draft", ["draft", "not/here"])
def test_a_draft_models_own_cache_is_counted_where_its_shape_can_be_read(tmp_path: Path, draft: str) -> None:
    study = resolved(tmp_path, draft)
    model, why = model_of(study, workload.read(study))
    assert model is not None, why
    plain, drafting = (
        model.predict(study.space.config({"speculation": value}, study.model), 1.0).kv_tokens
        for value in ("none", "draft")
    )
    own = 36 / (36 + 28) if draft == "draft" else 1.0  # layers: both models keep the same heads
    assert drafting / plain == pytest.approx(own, rel=0.03)


def test_the_model_is_of_the_type_of_gpu_that_is_pinned(workplace: Path) -> None:
    space = "{name: s, parameters: {on: {values: {h100: {gpu: H100-SXM}, l4: {gpu: L4}}, default: h100}}}"
    text = CPU.replace("KIND", "emulator").replace("VALUE", "'1'").replace("WHERE", "H100-SXM, gpus: 1")
    text += f"search_space: {space}\nprice_usd_per_gpu_hour: {{H100-SXM: 2.5, L4: 0.7}}\n"
    for pins, name, price in (("", "H100-SXM", 2.5), ("parameters: {on: l4}\n", "L4", 0.7)):
        (workplace / "study.yaml").write_text(text + pins)
        study = studyfile.load(workplace / "study.yaml")
        model, why = model_of(study, workload.read(study))
        assert isinstance(model, AnalyticModel), why
        assert (model.hardware.name, model.price_usd_per_gpu_hour) == (name, price)


@pytest.mark.parametrize(
    ("space_engine", "log", "modelled"),
    [("vllm", "", True), ("sglang", "", True), ("llama.cpp", "", False), ("", "", False), ("", "vllm", True)],
)
def test_a_command_s_server_has_a_model_where_its_flags_are_those_of_an_engine_that_is_known(
    workplace: Path, space_engine: str, log: str, modelled: bool
) -> None:
    """To it a 4-bit file of another engine would be 16-bit weights, which fit nowhere."""
    space = "{name: s, ENGINE parameters: {weights: {flag: quant, values: [q8_0, q4_0], default: q4_0}}}"
    space = space.replace("ENGINE", f"engine: {space_engine}," if space_engine else "")
    text = CPU.replace("KIND", "command\n  command: [s, '{port}', '{quant=q4_0}']").replace("VALUE", "'1'")
    text += f"search_space: {space}\nprice_usd_per_gpu_hour: 1\n"
    options = "  options: {log: vllm}\nhardware" if log else "hardware"
    (workplace / "study.yaml").write_text(text.replace("WHERE", "T4, gpus: 1").replace("hardware", options))
    shutil.copy(ROOT / "tests/search/shapes/llama-3.3-70b.json", workplace / "model" / "config.json")
    ready = prepare(studyfile.load(workplace / "study.yaml"), launching=False)
    assert (ready.predictor is not None) == modelled
    assert ("neither vLLM's nor SGLang's" in ready.no_model) == (not modelled)
    assert bool(ready.why_not(ready.study.space.config({}, ready.study.model))) == modelled


@pytest.mark.parametrize("emulated", [True, False])
def test_a_study_that_starts_warm_from_an_emulated_one_says_so(tmp_path, emulated):
    """What a model of the hardware says is a prior like the analytic model, and is no measurement."""
    studies.write(tmp_path / "before", trials=16, emulated=emulated)
    frozen = {"frozen": {"beside": str(tmp_path)}}
    study = replace(studies.study(tmp_path / "now"), sampler="auto", warm_start=("before",), frozen=frozen)
    said = []
    earlier = session._earlier(study, lambda _name, data: said.append(data["text"]))
    assert [one.name for one in earlier] == ["before"]
    assert said == (
        ["warm_start: before is emulated: it says where to look first, as a model does"] if emulated else []
    )


TWO_TYPES = """
model: target
engine: {kind: emulator, args: {max-model-len: 4096}}
hardware: {gpu: L40S, gpus: 1}
price_usd_per_gpu_hour: {L40S: 1.0, H200: 3.0}
trace: {file: trace.csv, window: 10s, search_windows: 1, heldout_windows: 1}
search_space:
  name: s
  engine: vllm
  parameters:
    kind: {trades: speed against price, values: {l40s: {gpu: L40S}, h200: {gpu: H200}}, default: l40s}
"""


def test_the_model_knows_every_type_of_gpu_that_a_space_compares(workplace: Path) -> None:
    """What one type has no room for is not refused on another, and costs what it costs there."""
    (workplace / "target").mkdir()
    shutil.copy(ROOT / "tests/search/shapes/qwen3-32b.json", workplace / "target/config.json")
    (workplace / "two.yaml").write_text(TWO_TYPES)
    ready = prepare(studyfile.load(workplace / "two.yaml"), launching=False)
    small, large = (ready.study.space.config({"kind": kind}, ready.study.model) for kind in ("l40s", "h200"))
    assert "do not fit 45 GiB" in ready.unfit(small) and ready.unfit(large) == ""  # 61 GiB of weights
    model = ready.predictor
    assert isinstance(model, AnalyticModel)
    alone = replace(model, hardware=hardware.table()["H200"], price_usd_per_gpu_hour=3.0, types={}, _servers={})
    assert model.predict(large, 0.5) == alone.predict(small, 0.5)
    text = TWO_TYPES.replace("gpu: H200}", "gpu: H1000}")
    (workplace / "two.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"two\.yaml:11: the emulator does not know the GPU 'H1000'"):
        prepare(studyfile.load(workplace / "two.yaml"), launching=False)
    (workplace / "two.yaml").write_text(text.replace("kind: emulator", "kind: vllm"))
    assert (
        "H1000 is not in the hardware table"
        in prepare(studyfile.load(workplace / "two.yaml"), launching=False).no_model
    )
