"""A model that one GPU cannot hold: its default is on the fewest that can."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tuner.cli import check, plan
from tuner.spec import studyfile
from tuner.spec.study import FITTING
from tuner.spec.text import Document
from tuner.study import ladder, session
from tuner.study.ownmodel import OwnModel

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = {**LLAMA, "num_hidden_layers": 8, "max_position_embeddings": 8192}
MIXTURE = {**SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
ODD = {**LLAMA, "num_hidden_layers": 120, "num_attention_heads": 6, "num_key_value_heads": 2}
OWN = (
    "search_space: {parameters: {tp: {flag: tensor-parallel-size, values: [1, 2, 16], default: 1, counts_gpus: true}}}"
)
STUDY = """
model: ./model
engine: {kind: emulator}
hardware: {gpu: H100-SXM, gpus: 8}
trace: trace.csv
objective: chat
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where the studies' folders come to lie
    (tmp_path / "model").mkdir()
    lines = [f"{second / 5},1000,200" for second in range(3000)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return tmp_path


def written(workplace: Path, model: dict[str, Any], *changes: tuple[str, str], more: str = "") -> Any:
    text = STUDY + more
    for old, new in changes:
        text = text.replace(old, new)
    (workplace / "model" / "config.json").write_text(json.dumps(model))
    (workplace / "study.yaml").write_text(text)
    return studyfile.load(workplace / "study.yaml")


@pytest.mark.parametrize(
    ("model", "changes", "more", "space", "flags"),
    [
        (LLAMA, [], "", "vllm/multi-gpu", {"tensor-parallel-size": 4}),
        (LLAMA, [("emulator}", "emulator, args: {max-model-len: 8192}}")], "", "vllm/multi-gpu", None),
        (LLAMA, [("gpus: 8", "gpus: 2")], "", "vllm/multi-gpu", {"tensor-parallel-size": 2}),  # no room there either
        (LLAMA, [("gpus: 8", "gpus: 1")], "", "vllm/quick", {}),
        (ODD, [("gpus: 8", "gpus: 4")], "", "vllm/multi-gpu", {"tensor-parallel-size": 2}),  # six heads on four: no
        (SMALL, [], "", "vllm/quick", {}),
        (SMALL, [], "search_space: vllm/multi-gpu", "vllm/multi-gpu", {}),
        (SMALL, [("gpu: H100-SXM, gpus: 8", "gpu: cpu")], "", "vllm-cpu/quick", None),
        (LLAMA, [("emulator}", "emulator, args: {tensor-parallel-size: 8}}")], "", "vllm/quick", None),
        (LLAMA, [("emulator}", "sglang}")], "", "sglang/multi-gpu", {"tp-size": 4}),
        (LLAMA, [("emulator}", "sglang}"), ("gpus: 8", "gpus: 1")], "", "sglang/quick", {}),
        (LLAMA, [("emulator}", "sglang, args: {tp-size: 8}}")], "", "sglang/quick", None),
        (LLAMA, [("emulator}", "sglang}"), ("H100-SXM", "H200")], "", "sglang/multi-gpu", {"tp-size": 2}),
        (SMALL, [("emulator}", "sglang}")], "", "sglang/quick", {}),
        (SMALL, [("emulator}", "sglang}")], "search_space: sglang/multi-gpu", "sglang/multi-gpu", {}),
        (SMALL, [("emulator}", "sglang}"), ("gpu: H100-SXM, gpus: 8", "gpu: cpu")], "", "sglang/quick", None),
    ],
)
def test_a_model_begins_on_the_fewest_gpus_that_hold_it(
    workplace: Path, model: dict[str, Any], changes: list[tuple[str, str]], more: str, space: str, flags: Any
) -> None:
    study = written(workplace, model, *changes, more=more)
    assert study.space.name == space
    default = study.space.config(study.space.default(), study.model)
    if flags is not None:
        assert default.flags == flags and default.gpus == next(iter(flags.values()), 1)
    elif "max-model-len" in study.engine.args:
        assert default.flags["tensor-parallel-size"] == default.gpus == 2


def test_only_the_experts_of_a_mixture_are_shared_by_data_parallel_ranks(workplace: Path) -> None:
    for model, ranks, placed in ((SMALL, (1,), ("off",)), (MIXTURE, (1, 2, 4, 8), ("off", "on"))):
        space = written(workplace, model, more="search_space: vllm/multi-gpu").space
        assert (space["data_parallel"].values, space["expert_parallel"].values) == (ranks, placed)
    config = space.config({**space.default(), "tensor_parallel": 2, "data_parallel": 4}, "m")
    assert config.gpus == 8 and config.flags == {"tensor-parallel-size": 2, "data-parallel-size": 4}


def test_room_is_what_the_study_s_own_engine_leaves(workplace: Path) -> None:
    """At 8192 tokens vLLM has room for 70B on two GPUs; SGLang keeps 14 GiB of each free."""
    for engine, length, fewest in (("emulator", "max-model-len", 2), ("sglang", "context-length", 4)):
        short = ("emulator}", f"{engine}, args: {{{length}: 8192}}}}")
        assert written(workplace, LLAMA, short).space.facts["fewest_gpus"] == fewest


SGLANG = [("emulator}", "sglang}"), ("H100-SXM", "H200")]


@pytest.mark.parametrize(
    ("model", "params", "because"),
    [
        (MIXTURE, {"tensor_parallel": 8, "dp_attention_size": 4, "expert_parallel": 8}, ""),
        (MIXTURE, {"tensor_parallel": 8, "dp_attention_size": 8, "load_balance": "tokens"}, ""),
        (MIXTURE, {"tensor_parallel": 4, "dp_attention_size": 8}, "attn-dp-size must divide tp-size"),
        (MIXTURE, {"tensor_parallel": 1, "dp_attention_size": 2}, "attn-dp-size must divide tp-size"),
        (MIXTURE, {"tensor_parallel": 4, "expert_parallel": 8}, "ep-size is 1 or that of tp-size"),
        (MIXTURE, {"tensor_parallel": 4, "expert_parallel": 2}, "ep-size is 1 or that of tp-size"),
        (
            {**MIXTURE, "num_local_experts": 12},
            {"tensor_parallel": 8, "expert_parallel": 8},
            "divisible among the GPUs of ep-size",
        ),
        (MIXTURE, {"tensor_parallel": 2, "speculation": "ngram", "max_running_requests": 64}, ""),
        (
            MIXTURE,
            {"tensor_parallel": 2, "dp_attention_size": 2, "speculation": "ngram", "max_running_requests": 64},
            "refuses n-gram drafts beside",
        ),
        (
            {**MIXTURE, "kv_lora_rank": 512},
            {"speculation": "ngram", "max_running_requests": 64},
            "latent attention in pages of 64",
        ),
        (SMALL, {"tensor_parallel": 8, "speculation": "ngram"}, "the number must be named"),
        (SMALL, {"tensor_parallel": 8, "speculation": "ngram", "max_running_requests": 64}, ""),
    ],
)
def test_what_sglang_refuses_is_not_launched(
    workplace: Path, model: dict[str, Any], params: dict[str, Any], because: str
) -> None:
    space = written(workplace, model, *SGLANG, more="search_space: sglang/multi-gpu").space
    denied = space.denied(space.default() | params)
    assert because in denied and bool(denied) == bool(because)


def test_groups_of_attention_take_no_more_gpus_and_only_a_mixture_has_them(workplace: Path) -> None:
    space = written(workplace, MIXTURE, *SGLANG, more="search_space: sglang/multi-gpu").space
    params = {**space.default(), "tensor_parallel": 8, "dp_attention_size": 4, "load_balance": "tokens"}
    config = space.config(params | {"expert_parallel": 8}, "m")
    flags = {"tp-size": 8, "attn-dp-size": 4, "load-balance-method": "total_tokens", "ep-size": 8}
    assert config.gpus == 8 and config.flags == flags
    alone = space.config(params | {"dp_attention_size": 1}, "m")  # nothing to balance
    mixtral = {**MIXTURE, "architectures": ["MixtralForCausalLM"]}  # whose code knows no groups
    without = written(workplace, mixtral, *SGLANG, more="search_space: sglang/multi-gpu").space
    assert not without.denied(params) and without.config(params, "m").flags == alone.flags
    assert alone.flags == {"tp-size": 8} and alone.gpus == 8
    space = written(workplace, SMALL, *SGLANG, more="search_space: sglang/multi-gpu").space
    for name in ("dp_attention_size", "load_balance", "expert_parallel"):
        assert len(space[name].values) == 1


def test_a_study_that_was_begun_with_a_default_on_one_gpu_goes_on_with_it(workplace: Path) -> None:
    for engine, changes in (("vllm", []), ("sglang", [("emulator}", "sglang}")])):
        now = written(workplace, LLAMA, *changes, more=f"search_space: {engine}/multi-gpu")
        before = studyfile.by(now.rules - {FITTING}, now)
        assert before.space.default()["tensor_parallel"] == 1 and now.space.default()["tensor_parallel"] == 4
        assert "fewest_gpus" in now.space.facts and "fewest_gpus" not in before.space.facts
        assert studyfile.by(now.rules, before).space == now.space


def test_a_study_that_was_begun_on_one_gpu_keeps_its_space(workplace: Path) -> None:
    """Before SGLang had a space for several GPUs, its studies took sglang/quick whatever the model."""
    begun = written(workplace, LLAMA, ("emulator}", "sglang}"), more="search_space: sglang/quick")
    frozen = {name: value for name, value in begun.frozen.items() if name != "name"}
    again = studyfile.resolve(Document("study.yaml", frozen), workplace)
    assert again.space == begun.space and again.space.name == "sglang/quick"


def test_a_space_that_gives_a_server_too_few_gpus_says_which_does_not(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "needs 4 GPUs at least, and vllm/standard gives a server 1: take search_space: vllm/multi-gpu."
    study = written(workplace, LLAMA, more="search_space: vllm/standard")
    assert session.prepare(study).cramped().endswith(said)
    other = written(workplace, LLAMA, ("emulator}", "sglang}"), more="search_space: sglang/standard")
    assert session.prepare(other, launching=False).cramped().endswith("take search_space: sglang/multi-gpu.")
    study = written(workplace, LLAMA, more="search_space: vllm/standard")
    for command in (plan.run, check.run):
        command(workplace / "study.yaml", json=False)
        assert said in " ".join(capsys.readouterr().out.split())
    on_cpu = ("gpu: H100-SXM, gpus: 8", "gpu: cpu")
    for model, changes, more in ((LLAMA, (), ""), (SMALL, (), ""), (LLAMA, (), OWN), (SMALL, (on_cpu,), "")):
        assert not session.prepare(written(workplace, model, *changes, more=more)).cramped()


def test_gpus_that_wait_are_told_of(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "7 of 8 GPUs wait while the default is measured: parallel: auto (--parallel auto) runs trials side by side."
    assert session.prepare(written(workplace, SMALL)).idle() == said
    for command in (plan.run, check.run):
        command(workplace / "study.yaml", json=False)
        assert said in " ".join(capsys.readouterr().out.split())
    assert session.prepare(written(workplace, LLAMA)).idle().startswith("4 of 8 ")
    one, on_cpu = (("gpu: H100-SXM, gpus: 8", there) for there in ("gpu: H100-SXM, gpus: 1", "gpu: cpu"))
    for model, changes, more in ((SMALL, (one,), ""), (SMALL, (on_cpu,), ""), (SMALL, (), "parallel: auto")):
        assert not session.prepare(written(workplace, model, *changes, more=more)).idle()
    ready = session.prepare(study := written(workplace, SMALL))
    assert not replace(ready, study=replace(study, engine=replace(study.engine, kind="attach"))).idle()


def test_a_plan_of_a_default_that_will_not_start_foretells_the_ladder_of_the_others(workplace: Path) -> None:
    ready = session.prepare(written(workplace, LLAMA, ("gpus: 8", "gpus: 2")))
    assert ready.why_not(ready.study.space.config(ready.study.space.default(), ready.study.model))
    laid = ladder.foretold(ready, partial(session.prepare, launching=False))
    assert laid and laid.predictor
    best = max(ladder._drawn(ready), key=laid.predictor.capacity)
    holds = laid.predictor.capacity(best)
    assert laid.study.load.ladder[0] < holds < laid.study.load.ladder[-1]


def test_a_plan_goes_on_above_the_ladder_as_launches_will(workplace: Path) -> None:
    """What eight GPUs hold lies above what is laid around the default's one."""
    short = ("trace: trace.csv", "trace: {file: trace.csv, window: 10s}")
    more = "search_space: vllm/multi-gpu\nslo: {tpot_p99: 7ms}"
    ready = session.prepare(written(workplace, SMALL, short, more=more), launching=False)
    laid = ladder.foretold(ready, partial(session.prepare, launching=False))
    assert laid and laid.study.grows
    found, highest = plan.plan(laid), laid.traffic.climbed[0].arrival_s[-1] / laid.study.trace.window_s
    assert max(found["ladder"]) < max(row["load"] for row in found["front"]) <= highest
    ends = plan.plan(replace(laid, study=replace(laid.study, frozen=ready.study.frozen)))
    assert max(row["load"] for row in ends["front"]) == max(found["ladder"])
    assert ends["launch_seconds"] < found["launch_seconds"]


def test_what_memory_arithmetic_refuses_is_not_among_what_the_search_begins_with(workplace: Path) -> None:
    study = written(workplace, LLAMA)
    with session.opened(study) as store:
        ready = session.prepare(study)
        sampler: Any = session.book(ready, store, ready.out_of_reach).sampler
    configs = [study.space.config(params, study.model) for params in sampler.candidates.params]
    assert len(configs) > 900 and sum(bool(ready.unfit(config)) for config in configs) < len(configs) / 20


def test_a_user_s_own_model_is_not_asked_of_every_draw(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, asked = written(workplace, LLAMA), []
    told = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.02, "error_rate": 0.0, "goodput_output_tokens_per_s": 100.0}
    model = OwnModel.over(lambda _config, _load: told, "mine", study.objective, study.load.ladder[0])
    monkeypatch.setattr(session.Prepared, "unfit", lambda _ready, config: asked.append(config) or "")
    with session.opened(study) as store:
        session.book(ready := replace(session.prepare(study), predictor=model), store, ready.out_of_reach)
    assert not asked
