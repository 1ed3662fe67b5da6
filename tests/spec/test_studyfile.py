"""What a study file may say, and the one clear line for everything it may not."""

import json
import shutil
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from tuner.errors import UsageError
from tuner.spec import shipped, studyfile
from tuner.spec.text import Document
from tuner.study import mirror, session
from tuner.study.store import Store

GOOD = """\
model: ./model
engine: {kind: emulator, options: {gpu: H100-SXM}}
search_space: vllm/quick
objective: chat
slo: {ttft_p99: 300ms}
trace: {file: trace.csv, window: 10s}
load: {ladder: [1, 2, 4]}
budget: {launches: 5}
"""


def write(folder, text, name="study.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("said", "tokens"),
    [("2048", 2048), ("'2048'", 2048), ("2k", 2000), ("2K", 2048), ("-1", None), ("auto", None)],
)
def test_the_longest_request_is_read_as_the_engine_reads_it(workplace, said, tokens):
    """A length that is not understood would cut no request of the trace, and every long one would be refused."""
    usual = studyfile.load(write(workplace, GOOD)).space.facts["max_model_len"]
    args = GOOD.replace("kind: emulator,", f"kind: emulator, args: {{max-model-len: {said}}},")
    assert studyfile.load(write(workplace, args)).space.facts["max_model_len"] == (tokens or usual)


def test_a_study_file_is_resolved_to_the_last_name(workplace):
    study = studyfile.load(write(workplace, GOOD, "mine.yaml"))
    assert study.name == "mine"
    assert study.folder == "reports/mine"
    assert study.load.ladder == (1, 2, 4)
    assert study.budget.launches == 5
    assert study.hardware.name == "H100-SXM"
    limits = {s.metric: s.limit for s in study.objective.slos}
    assert limits == {
        "ttft_p99": 0.3,
        "tpot_p99": 0.05,
        "error_rate": 0.01,
    }  # the study's own wins over the objective's
    assert study.space["max_num_batched_tokens"].default == 8192  # what vLLM takes on 80 GiB
    assert study.space.facts["num_heads"] == 8
    assert study.space.facts["max_input_tokens"] == 159


def test_the_frozen_study_reads_back_as_the_same_study_without_model_trace_or_gpu(workplace, tmp_path):
    study = studyfile.load(write(workplace, GOOD))
    folder = tmp_path / "reports" / "elsewhere"
    folder.mkdir(parents=True)
    with (folder / "study.yaml").open("w") as file:
        YAML().dump(dict(study.frozen), file)
    for gone in ("trace.csv", "model/config.json"):
        (workplace / gone).unlink()
    again = studyfile.load(folder)
    assert studyfile.differences(study, again) == []
    assert again.folder == str(folder)


def test_a_space_without_a_name_has_its_files(workplace):
    space = "engine: vllm\nparameters: {x: {flag: x, values: [u, v], default: u}}\n"
    write(workplace, space, "own.yaml")
    study = studyfile.load(write(workplace, GOOD.replace("vllm/quick", "own.yaml")))
    (workplace / "begun").mkdir()
    with (workplace / "begun" / "study.yaml").open("w") as file:
        YAML().dump(dict(study.frozen), file)
    assert study.space.name == "own.yaml" and studyfile.differences(studyfile.load(workplace / "begun"), study) == []


def test_a_mistake_of_a_space_file_is_told_with_its_line_whatever_the_study_asks_for(workplace):
    write(workplace, "engine: vllm\nparameters:\n  x: {flag: x, range: [0.5, 1], default: 1}\n", "own.yaml")
    study = write(workplace, GOOD.replace("vllm/quick", "own.yaml") + "parameters: {x: 1}\n")
    with pytest.raises(UsageError, match=r"/own.yaml:3: x: a range of \[0.5, 1\] needs a step"):
        studyfile.load(study)


def test_changing_the_budget_leaves_a_study_comparable_and_changing_the_ladder_does_not(workplace):
    study = studyfile.load(write(workplace, GOOD))
    longer = studyfile.load(write(workplace, GOOD.replace("launches: 5", "launches: 50")))
    other = studyfile.load(write(workplace, GOOD.replace("[1, 2, 4]", "[1, 2, 3]")))
    assert studyfile.differences(study, longer) == []
    assert studyfile.differences(study, other) == ["load"]


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("budget:", "bugdet:"), 8, "did you mean 'budget'"),  # misspelt key
        (("kind: emulator", "kind: vlllm"), 2, "engine.kind"),  # no such engine
        (("search_space: vllm/quick", "search_space: vllm/quik"), 3, "did you mean 'vllm/quick'"),
        (("objective: chat", "objective: chatt"), 4, "did you mean 'chat'"),
        (("ttft_p99: 300ms", "ttft_p99: 300"), 5, "500ms or 2s"),  # no unit
        (("ttft_p99", "ttfp_p99"), 5, "unknown metric"),
        (("file: trace.csv", "file: trac.csv"), 6, "did you mean 'trace.csv'"),  # missing trace
        (("window: 10s", "window: soon"), 6, "bad duration"),
        (("window: 10s", "fill_cache: -1s"), 6, "trace.fill_cache: bad duration"),
        (("[1, 2, 4]", "[4, 2, 1]"), 7, "rising list"),  # a ladder goes up
        (("[1, 2, 4]", "[-1, 2]"), 7, "rising list"),
        (("[1, 2, 4]", "[1, x]"), 7, "load.ladder.1: input"),
        (("file: trace.csv", "file: trace.csv, serch_windows: 1"), 6, "did you mean 'search_windows'"),
        (("launches: 5", "launches: -5"), 8, "above zero"),
        (("launches: 5", "launches: five"), 8, " budget.launches: input"),
        (("budget: {launches: 5}", "sampler: tpee"), 8, "did you mean 'tpe'"),
        (("model: ./model", "model: ./modle"), 1, "does not exist"),  # missing model
        (("gpu: H100-SXM", "gpu: H1000"), 2, "unknown GPU"),
        (("budget: {launches: 5}", "budget: a while"), 8, "4h"),
        (("budget: {launches: 5}", "budget: {launches: 5"), 9, "not valid YAML"),  # broken YAML
        (("budget: {launches: 5}", "parameters: {max_num_seq: 64}"), 8, "did you mean 'max_num_seqs'"),
        (("budget: {launches: 5}", "parameters: {quantization: fp7}"), 8, "has no value 'fp7'"),
    ],
)
def test_a_broken_study_is_one_line_with_file_line_and_what_to_do(workplace, change, line, says):
    path = write(workplace, GOOD.replace(*change))
    with pytest.raises(UsageError) as error:
        studyfile.load(path)
    assert says.lower() in str(error.value).lower()
    assert str(error.value).startswith(f"{path}:{line}")
    assert "\n" not in str(error.value)


def test_a_flag_that_is_both_fixed_and_tuned_is_refused(workplace):
    text = GOOD.replace("options:", "args: {max-num-seqs: 64}, options:")
    with pytest.raises(UsageError, match=r"fixed in engine\.args and tuned as max_num_seqs"):
        studyfile.load(write(workplace, text))


def test_a_pinned_parameter_goes_to_every_server_the_baseline_included(workplace):
    study = studyfile.load(write(workplace, GOOD + "parameters: {max_num_seqs: 64}\n"))
    assert "max_num_seqs" not in [p.name for p in study.space.parameters]
    assert study.space.config(study.space.default(), study.model).flags["max-num-seqs"] == 64


def test_a_narrowed_parameter_keeps_the_engine_default(workplace):
    study = studyfile.load(write(workplace, GOOD + "parameters: {max_num_seqs: [64, 96]}\n"))
    assert study.space["max_num_seqs"].values == (64, 96, 1024)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4h", (None, 4.0, None)),
        ("90min", (None, 1.5, None)),
        ("20 launches", (20, None, None)),
        ("15usd", (None, None, 15.0)),
    ],
)
def test_a_budget_may_be_said_in_one_word(text, expected):
    budget = studyfile.parse_budget(text)
    assert (budget.launches, budget.hours, budget.usd) == expected


@pytest.mark.parametrize("name", shipped.names("search_spaces"))
def test_every_shipped_space_builds_and_its_default_passes_its_own_rules(workplace, name):
    gpu = "cpu" if "cpu" in name else "H100-SXM"
    text = (
        GOOD.replace("vllm/quick", name)
        .replace("H100-SXM}", f"{gpu}}}")
        .replace("engine:", f"hardware: {{gpu: {gpu}, gpus: {1 if gpu == 'cpu' else 4}}}\nengine:")
    )
    study = studyfile.load(write(workplace, text))
    space = study.space
    assert space.denied(space.default()) == ""
    assert space.config(space.default(), "m").flags == space.fixed  # the baseline is the engine as it comes
    assert all(p.trades for p in space.parameters)
    assert space.checked_with


@pytest.mark.parametrize("name", shipped.names("objectives"))
def test_every_shipped_objective_resolves(workplace, name):
    study = studyfile.load(
        write(workplace, GOOD.replace("objective: chat", f"objective: {name}").replace("slo:", "# slo:"))
    )
    assert study.objective.slos
    assert study.objective.price_usd_per_gpu_hour > 0


def test_the_parameters_of_a_function_need_no_flag(workplace):
    text = """\
engine: {kind: function, target: "surface:serve"}
search_space:
  engine: function
  parameters: {batch: {range: [8, 64], scale: log2, default: 8}, cache: {type: switch, default: true}}
objective: {latency: tpot_p99, slo: {tpot_p99: 100ms}, price_usd_per_gpu_hour: 2}
"""
    study = studyfile.load(write(workplace, text))
    assert len({study.space.config(params, "").hash for params in study.space.grid()}) == 8


def test_a_grid_of_numbers_is_in_order_however_it_was_written(workplace):
    text = GOOD.replace("vllm/quick", "{name: mine, engine: vllm, parameters: {batch: GRID}}")
    grid = "{trades: much, flag: b, values: {256: {}, 64: {flags: {b: 64}}, 128: {flags: {b: 128}}}, default: 256}"
    batch = studyfile.load(write(workplace, text.replace("GRID", grid))).space["batch"]
    assert batch.values == (64, 128, 256)
    assert [dict(emission.flags) for emission in batch.emissions] == [{"b": 64}, {"b": 128}, {}]


@pytest.mark.parametrize("text", ["{", "\ufeff{}", "[" * 100_000])
def test_a_damaged_config_of_the_model_is_named(workplace, text):
    (workplace / "model" / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"model/config\.json: cannot read the model's config: .*\. Fetch the model's"):
        studyfile.load(write(workplace, GOOD))


@pytest.mark.parametrize(
    ("more", "quantized"),
    [
        ({"quantization_config": None}, False),
        ({"quantization_config": {"quant_method": "fp8"}}, True),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, True),
        ({"text_config": "foo"}, False),
    ],
)
def test_a_model_is_quantized_where_its_config_says_how(workplace, more, quantized):
    path = workplace / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert studyfile.load(write(workplace, GOOD.replace("emulator", "vllm"))).space.facts["quantized"] is quantized


@pytest.mark.parametrize(
    ("more", "moe"),
    [
        ({"num_experts": 1}, False),
        ({"num_local_experts": 8}, True),
        ({"moe_num_experts": 64}, True),  # ERNIE 4.5
        ({"moe_num_experts": [64, 64]}, True),  # and of several kinds
        ({"text_config": {"n_routed_experts": 256}}, True),
        ({"num_experts": ["eight"]}, False),
    ],
)
def test_a_model_is_a_mixture_of_experts_whatever_its_family_calls_their_number(workplace, more, moe):
    path = workplace / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert studyfile.load(write(workplace, GOOD.replace("emulator", "vllm"))).space.facts["moe"] is moe


@pytest.mark.parametrize(
    ("more", "mla"),
    [
        ({}, False),
        ({"text_config": {"kv_lora_rank": 512}}, True),
        ({"kv_lora_rank": 512, "use_mla": False}, False),  # Hunyuan's
    ],
)
def test_a_model_has_latent_attention_where_its_config_says_how_wide(workplace, more, mla):
    path = workplace / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert studyfile.load(write(workplace, GOOD.replace("emulator", "vllm"))).space.facts["mla"] is mla


@pytest.mark.parametrize("note", ["x" * 40 + "  " + "y" * 40 + " z", "a\x85b", " a\n\nb ", "1e3"])
def test_the_study_folders_file_gives_back_every_text(workplace, tmp_path, note):
    text = GOOD.replace("kind: emulator,", f"kind: emulator, env: {{NOTE: {json.dumps(note)}}},")
    study = studyfile.load(write(workplace, text))
    store = Store(tmp_path / "begun")
    store.folder.mkdir()
    session.write_study(study.frozen, store)
    again = studyfile.load(store.folder)
    assert again.engine.env == {"NOTE": note} and studyfile.differences(again, study) == []


@pytest.mark.parametrize(("said", "gain"), [("", 0.003), (", min_gain: 0", 0.0), (", min_gain: 0.5%", 0.005)])
def test_what_a_launch_has_to_promise_may_change_and_is_kept(workplace, said, gain):
    """With the default, tuners of a shared study say of their budget what those of earlier versions say."""
    before = studyfile.load(write(workplace, GOOD))
    study = studyfile.load(write(workplace, GOOD.replace("launches: 5", f"launches: 5{said}")))
    assert study.budget.min_gain == pytest.approx(gain)
    assert studyfile.resolve(Document("study.yaml", dict(study.frozen)), workplace).budget == study.budget
    assert studyfile.differences(before, study) == []
    assert repr(study.budget) == "Budget(launches=5, hours=None, usd=None, verify_share=0.3)"


def test_folders_of_the_engines_options_lie_beside_the_study(workplace, monkeypatch, tmp_path_factory):
    """A server runs in its trial's folder: a relative path that is handed on leads nowhere."""
    options = "engine: {kind: vllm, options: {variants: {awq: VARIANT, org: some/model-AWQ}}}"
    text = GOOD.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", options)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    study = studyfile.load(write(workplace, text.replace("VARIANT", "./model")))
    assert study.engine.options["variants"] == {"awq": str(workplace / "model"), "org": "some/model-AWQ"}
    with pytest.raises(UsageError) as refused:
        studyfile.load(write(workplace, text.replace("VARIANT", "./modl")))
    assert refused.value.where.endswith("study.yaml:2")
    assert refused.value.message == "the engine.options.variants.awq folder ./modl does not exist"
    command = "engine: {kind: command, command: 'server {port}', options: {tokenizer: ./model}}"
    text = GOOD.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", command)
    assert studyfile.load(write(workplace, text)).engine.options["tokenizer"] == str(workplace / "model")


def test_tuners_share_a_study_wherever_the_folders_of_its_options_lie(workplace, tmp_path_factory):
    """What tells their studies apart are the options as they are written; one of them may be a folder's own file."""
    options = "engine: {kind: vllm, options: {variants: {awq: ./model}, start_limit_s: 900}}"
    text = GOOD.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", options)
    elsewhere = shutil.copytree(workplace, tmp_path_factory.mktemp("elsewhere") / "too")
    here, there = (studyfile.load(write(folder, text)) for folder in (workplace, elsewhere))
    assert here.engine.options != there.engine.options
    assert mirror.identity(here) == mirror.identity(there)
    kept = studyfile.resolve(Document("study.yaml", dict(there.frozen)), elsewhere)
    assert mirror.identity(here) == mirror.identity(kept)
    other = studyfile.load(write(workplace, text.replace("900", "901")))
    assert mirror.identity(here)["engine"] != mirror.identity(other)["engine"]
    before = studyfile.by(here.rules - {"verifies_widely"}, here)
    three = replace(here, trace=replace(here.trace, heldout_windows=3))
    assert mirror.identity(before) == mirror.identity(three) != mirror.identity(here), "begun with three, unsaid"


def test_a_study_that_was_begun_with_a_folder_for_mlflow_is_read_all_the_same(workplace):
    frozen = {**studyfile.load(write(workplace, GOOD)).frozen, "tracking_uri": "./mlruns"}
    assert studyfile.resolve(Document("study.yaml", frozen), workplace).tracking_uri == "./mlruns"
