"""What is pinned or fixed means to a configuration what the same value means where it is tuned."""

import copy
import json
from dataclasses import replace

import pytest

from tests.spec.test_studyfile import GOOD, write
from tuner.errors import UsageError
from tuner.spec import studyfile
from tuner.study import mirror

OWN = """\
model: ./model
engine: {kind: emulator}
hardware: {gpu: H100-SXM, gpus: 4}
search_space:
  name: own
  parameters:
    tp: {flag: tensor-parallel-size, values: [1, 2, 4], default: 1, counts_gpus: true}
    weights: {values: {none: {}, int4: {model_variant: gptq-int4}}, default: none}
    kind: {values: {h100: {gpu: H100-SXM}, l4: {gpu: L4}}, default: h100}
    speculation: {values: {none: {}, ngram: {flags: {speculative-config.method: ngram}}}, default: none}
    length: {flag: speculative-config.num_speculative_tokens, values: [2, 4], default: 2, always: true,
             when: {speculation: {ne: none}}}
    seqs: {flag: max-num-seqs, values: [64, 256], default: 256}
  rules:
    - {deny: {length: 4, seqs: 64}, because: so many drafts}
trace: {file: trace.csv, window: 10s}
load: {ladder: [1]}
"""
SPECULATES = '{"method": "ngram", "num_speculative_tokens": 4}'


def load(workplace, text, *changes):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return studyfile.load(write(workplace, text))


def config(study, **params):
    return study.space.config({**study.space.default(), **params}, study.model)


def kind(kind, args="", more=""):
    return "kind: emulator", f"kind: {kind}, args: {{{args}}}{more}"


@pytest.mark.parametrize("name", ["tp", "weights", "kind"])
def test_a_pinned_value_has_the_gpus_the_variant_and_the_type_of_a_tuned_one(workplace, name):
    value = {"tp": 2, "weights": "int4", "kind": "l4"}[name]
    tuned = config(load(workplace, OWN), **{name: value})
    for said in (value, f"[{value}]"):
        pinned = config(load(workplace, f"{OWN}parameters: {{{name}: {said}}}\n"))
        assert pinned.hash == tuned.hash
    assert (tuned.gpus, tuned.model_variant, tuned.gpu) != (1, "", "")


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        (kind("emulator", "tensor-parallel-size: 2, pipeline_parallel_size: 2"), 4),
        (kind("vllm", "tensor-parallel-size: '2'"), 2),
        (kind("vllm", "prefill-context-parallel-size: 2"), 2),
        (kind("emulator", "data-parallel-size: auto"), 1),  # the server's to refuse
        (kind("command", "tensor-parallel-size: 2", ", command: [x, '{port}']"), 2),
        (kind("command", "tp: 2", ", command: [x, '{port}']"), 1),  # who knows what that is
        (kind("attach", "", ", url: 'http://127.0.0.1:1'"), 4),  # it has what the study says of it
        (kind("function", "", ", target: 'x:y'"), 1),
    ],
)
def test_the_gpus_that_fixed_flags_take_are_counted(workplace, engine, gpus):
    """Priced as one GPU and given one, a server of two costs half and does not start."""
    space = "  parameters: {seqs: {flag: max-num-seqs, values: [64, 256], default: 256}}\n"
    text = OWN[: OWN.index("  parameters:")] + space + OWN[OWN.index("trace:") :]
    assert config(load(workplace, text, engine)).gpus == gpus
    on_cpus = load(workplace, text, engine, ("{gpu: H100-SXM, gpus: 4}", "{gpu: cpu}"))
    assert config(on_cpus).gpus == 0


def test_a_size_that_no_parameter_counts_is_counted_by_its_flag(workplace):
    study = load(workplace, OWN, (", counts_gpus: true", ""), ("name: own", "name: own\n  fixed: {pp-size: 2}"))
    assert config(study).gpus == 2 and config(study, tp=2).gpus == 4


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("pins", ["", "gpus: 4"])
def test_a_parameter_that_counts_without_a_size_counts_all(workplace, tuned, pins):
    """What its flags say is said twice then: counted twice, no configuration fits."""
    counts = "gpus: {values: {'1': {}, '4': {}}, default: 4, counts_gpus: true}"
    size = (
        "tp: {flag: tensor-parallel-size, values: [1, 4], default: 1}"
        if tuned
        else "seqs: {flag: s, values: [1, 2], default: 1}"
    )
    fixed = "" if tuned else "  fixed: {tensor-parallel-size: 4}\n"
    text = (
        OWN[: OWN.index("  parameters:")] + f"{fixed}  parameters: {{{counts}, {size}}}\n" + OWN[OWN.index("trace:") :]
    )
    study = load(workplace, text + f"parameters: {{{pins}}}\n")
    assert config(study, **({"tp": 4} if tuned else {})).gpus == 4


def test_a_value_of_one_gpu_need_not_say_its_size(workplace):
    values = "values: {'1': {}, '2': {flags: {tensor-parallel-size: 2}}}"
    study = load(
        workplace,
        OWN,
        ("flag: tensor-parallel-size, values: [1, 2, 4]", values),
        ("name: own", "name: own\n  fixed: {pp-size: 2}"),
    )
    assert config(study).gpus == 2 and config(study, tp=2).gpus == 4


@pytest.mark.parametrize("fixed", ["tp-size: 2, dp-size: 2", "tp-size: 2, dp: 2", "data-parallel-size: 2, tp: 2"])
def test_ranks_that_share_the_gpus_add_none(workplace, fixed):
    values = "{'off': {}, 'on': {flags: {enable-dp-attention: true}}}"
    space = f"  engine: sglang\n  fixed: {{{fixed}}}\n  parameters: {{a: {{values: {values}, default: 'off'}}}}\n"
    text = OWN[: OWN.index("  parameters:")] + space + OWN[OWN.index("trace:") :]
    study = load(workplace, text, kind("sglang"), ("gpus: 4", "gpus: 2"))
    assert config(study).gpus == 4 and config(study, a="on").gpus == 2
    assert config(load(workplace, text + "parameters: {a: 'on'}\n", kind("sglang"))).gpus == 2
    always = text.replace("'off': {}, ", "").replace("default: 'off'", "default: 'on', always: true")
    assert config(load(workplace, always, kind("sglang"))).gpus == 2


@pytest.mark.parametrize("engine", [kind("vllm"), kind("emulator"), kind("function", "", ", target: 'x:y'")])
def test_what_is_pinned_takes_no_gpus_where_there_are_none(workplace, engine):
    study = load(workplace, OWN + "parameters: {tp: 2, seqs: 64}\n", engine, ("{gpu: H100-SXM, gpus: 4}", "{gpu: cpu}"))
    assert study.hardware.gpus == 0 and config(study).gpus == 0
    assert config(study).flags["tensor-parallel-size"] == 2


def test_a_file_that_wants_more_gpus_names_the_folder_that_it_began(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    text = OWN + "parameters: {tp: 8}\n"
    with pytest.raises(UsageError) as refused:
        load(workplace, text)
    assert "begun" not in refused.value.fix
    folder = workplace / "reports" / "study"
    folder.mkdir(parents=True)
    (folder / "study.yaml").touch()
    with pytest.raises(UsageError) as refused:
        load(workplace, text)
    assert refused.value.fix.endswith("; to continue the study that was begun, name reports/study")


@pytest.mark.parametrize(
    "engine", [kind("vllm"), kind("emulator"), kind("sglang"), kind("command", "", ", command: [x, '{port}']")]
)
@pytest.mark.parametrize("value", ["0.10", "3k", "1e3", "[1]", "null"])
def test_text_of_a_parameter_is_text_in_json(workplace, engine, value):
    parameter = f"{{part: {{flag: override.version, values: [a, '{value}'], default: a, always: true}}}}"
    says = "  engine: sglang\n" if "sglang" in engine[1] else ""
    text = OWN[: OWN.index("  parameters:")] + f"{says}  parameters: {parameter}\n" + OWN[OWN.index("trace:") :]
    tuned = config(load(workplace, text, engine), part=value)
    assert json.loads(str(tuned.flags["override"])) == {"version": value}
    assert config(load(workplace, text + f"parameters: {{part: '{value}'}}\n", engine)).hash == tuned.hash


@pytest.mark.parametrize(
    ("engine", "body"),
    [
        (kind("emulator", "override.size: 3k"), {"tags": ["a", "b"], "size": 3000, "on": False}),
        (
            kind("command", "override.size: 3k", ", command: [x, '{port}']"),
            {"tags+": "a,b", "size": "3k", "on": False},
        ),
    ],
)
def test_only_vllm_reads_the_words_of_its_command_line(workplace, engine, body):
    flags = "{override.tags+: 'a,b', override.on: 'false'}"
    parameter = f"{{part: {{values: {{x: {{flags: {flags}}}}}, default: x, always: true}}}}"
    text = OWN[: OWN.index("  parameters:")] + f"  parameters: {parameter}\n" + OWN[OWN.index("trace:") :]
    assert json.loads(str(config(load(workplace, text, engine)).flags["override"])) == body


@pytest.mark.parametrize(
    ("args", "pins", "line"), [("tensor-parallel-size: 8", "speculation: ngram", 2), ("", "tp: 8", 18)]
)
def test_more_gpus_than_the_study_has_are_refused_before_it_begins(workplace, args, pins, line):
    text = OWN.replace("    tp: {flag: tensor-parallel-size, values: [1, 2, 4], default: 1, counts_gpus: true}\n", "")
    text = (text if args else OWN) + f"parameters: {{{pins}}}\n"
    says = f"study.yaml:{line}: every server takes 8 GPUs, the study has 4"
    with pytest.raises(UsageError, match=says):
        load(workplace, text, kind("emulator", args))
    assert load(workplace, text + "executor: ray\n", kind("emulator", args))


def test_an_attached_server_has_as_many_gpus_as_its_space_counts(workplace):
    size = "{tp: {values: {'2': {}}, default: 2, counts_gpus: true}}\n"
    text = OWN[: OWN.index("  parameters:")] + f"  parameters: {size}" + OWN[OWN.index("trace:") :]
    for pins in ("", "parameters: {tp: 2}\n"):
        assert config(load(workplace, text + pins, kind("attach", "", ", url: 'http://127.0.0.1:1'"))).gpus == 2


@pytest.mark.parametrize(
    ("pins", "params", "speculates"),
    [
        ("{speculation: ngram}", {"length": 4}, SPECULATES),
        ("{speculation: ngram, length: 4}", {}, SPECULATES),
        ("{length: 4}", {"speculation": "ngram"}, SPECULATES),
        ("{length: 4}", {}, None),  # the baseline does not speculate
        ("{length: 4, speculation: none}", {}, None),
    ],
)
def test_the_parts_of_a_json_flag_are_one_flag_where_they_apply(workplace, pins, params, speculates):
    """Of two flags vLLM throws one away; a part without the others it refuses."""
    made = config(load(workplace, f"{OWN}parameters: {pins}\n"), **params)
    assert {flag: value for flag, value in made.flags.items() if "spec" in flag} == (
        {"speculative-config": speculates} if speculates else {}
    )


def test_rules_see_a_pinned_parameter_where_it_applies(workplace):
    def denied(pins, **params):
        space = load(workplace, OWN + f"parameters: {{{pins}}}\n").space
        return space.denied(space.snap({"seqs": 64, **params}))

    assert not denied("length: 4")
    assert denied("length: 4", speculation="ngram") == "so many drafts"
    assert denied("length: 4, speculation: ngram")
    assert not denied("length: 4, speculation: none")


@pytest.mark.parametrize(
    ("args", "body"),
    [
        ("speculative_config.prompt_lookup_max: 4", {"prompt_lookup_max": 4}),
        ("speculative-config.a.b_c: 1, speculative-config.a.d: 2k", {"a": {"b_c": 1, "d": 2000}}),
        ("speculative-config.off: 'false', speculative-config.on: true", {"off": False, "on": True}),
        ("speculative-config.list+: 'a,b'", {"list": ["a", "b"]}),
    ],
)
def test_the_studys_own_parts_are_read_as_vllm_reads_them(workplace, args, body):
    study = load(workplace, OWN, kind("emulator", args))
    assert json.loads(str(config(study).flags["speculative-config"])) == body
    made = json.loads(str(config(study, speculation="ngram").flags["speculative-config"]))
    assert made == {"method": "ngram", "num_speculative_tokens": 2, **body}


def test_a_dot_in_the_flag_of_another_server_is_a_part_of_its_name(workplace):
    study = load(workplace, OWN, kind("command", "server_log.max_size: 3", ", command: [x, '{port}']"))
    assert config(study).flags == {"server-log.max_size": 3}


@pytest.mark.parametrize(
    ("args", "pins", "says"),
    [
        ("speculative-config.num_speculative_tokens: 3", "", "2: --speculative-config.num_speculative_tokens is fixed"),
        ("speculative-config: '{}'", "", "2: --speculative-config is fixed in engine.args and tuned as speculation"),
        ("speculative-config: '{}'", "speculation: ngram, length: 2", "2: engine.args says speculative-config {}, the"),
    ],
)
def test_what_is_said_twice_of_a_json_flag_is_refused(workplace, args, pins, says):
    with pytest.raises(UsageError) as refused:
        load(workplace, OWN + f"parameters: {{{pins}}}\n", kind("emulator", args))
    assert str(refused.value).partition("study.yaml:")[2].startswith(says)


@pytest.mark.parametrize("says", ["", "  engine: function\n"])
def test_a_callable_is_asked_with_pinned_parameters_too(workplace, says):
    text = OWN.replace("  name: own\n", "  name: own\n" + says)
    study = load(workplace, text + "parameters: {seqs: 64, tp: 2}\n", kind("function", "", ", target: 'x:y'"))
    assert config(study).params["seqs"] == 64 and config(study).gpus == 2


def test_a_study_that_earlier_versions_began_makes_the_configurations_that_it_made(workplace, tmp_path):
    """Else its default, and what was measured, would not be found among its trials."""
    text = OWN.replace("emulator}", "emulator, args: {a_b.c_d: 1, pp-size: 2}}") + "parameters: {tp: 2, length: 4}\n"
    study = load(workplace, text)
    begun = copy.deepcopy(dict(study.frozen))
    assert begun["frozen"].pop("counts_fixed")
    before = studyfile.resolve(studyfile.Document("study.yaml", begun), tmp_path)
    made = config(before)
    assert made.flags == {
        "a-b.c-d": 1,
        "pp-size": 2,
        "tensor-parallel-size": 2,
        "speculative-config.num_speculative_tokens": 4,
    }
    assert made.gpus == 1 and before.space.facts["length"] == 4
    assert "counts_fixed" not in before.frozen["frozen"]
    again = studyfile.resolve(studyfile.Document("study.yaml", study.frozen), tmp_path)
    assert config(again).hash == config(study).hash != made.hash


def test_studies_that_share_a_database_are_one_only_where_pins_and_sizes_mean_the_same(workplace):
    def identity(pins, args="x: 1", fixed="swap: 1", **before):
        text = OWN.replace("name: own\n", f"name: own\n  fixed: {{{fixed}}}\n")
        study = load(workplace, text + f"parameters: {{{pins}}}\n", kind("emulator", args))
        return mirror.identity(replace(study, space=replace(study.space, **before)))["space"]

    earlier = {"gpus": 1, "variant": "", "joined": frozenset(), "sized": ()}
    assert identity("seqs: 64") == identity("seqs: 64", **earlier), "one that was begun before goes on"
    like = tuple(replace(p, like="max-num-seqs") for p in load(workplace, OWN).space.parameters)
    assert identity("") == identity("", parameters=like), "nothing is measured otherwise"
    for pins, args in (("tp: 2", "x: 1"), ("weights: int4", "x: 1"), ("", "pp-size: 2"), ("", "a.b: 1")):
        assert identity(pins, args) != identity(pins, args, **earlier)
    whole = "speculative-config: '{}'"  # into which the tuned parts are put; before they took its place
    assert identity("", fixed=whole) != identity("", fixed=whole, **earlier)


def test_flags_named_alike_keep_the_part_of_a_json_flag_as_it_stands(workplace):
    study = studyfile.load(write(workplace, GOOD.replace(*kind("emulator", "compilation_config.cudagraph_mode: NONE"))))
    assert config(study).flags == {"compilation-config": '{"cudagraph_mode": "NONE"}'}


def test_an_attached_server_on_a_cpu_has_no_gpus(workplace):
    text = OWN[: OWN.index("  parameters:")] + "  parameters: {}\n" + OWN[OWN.index("trace:") :]
    attached = kind("attach", "", ", url: 'http://127.0.0.1:1'")
    study = load(workplace, text, attached, ("{gpu: H100-SXM, gpus: 4}", "{gpu: cpu, gpus: 4}"))
    assert study.space.facts["platform"] == "cpu" and config(study).gpus == 0


def test_a_part_of_json_that_was_begun_fixed_and_tuned_goes_on_and_a_whole_flag_does_not(workplace):
    def again(**args):
        begun = copy.deepcopy(dict(load(workplace, OWN).frozen))
        begun["engine"] = {"kind": "emulator", "args": args}
        return studyfile.resolve(studyfile.Document("study.yaml", begun), workplace)

    study = again(**{"speculative-config.num_speculative_tokens": 3})
    assert json.loads(str(config(study, speculation="ngram", length=4).flags["speculative-config"])) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
    }
    with pytest.raises(UsageError, match="--max-num-seqs is fixed in"):
        again(**{"max-num-seqs": 64})


def test_sizes_on_a_cpu_are_no_numbers_of_gpus(workplace):
    on_cpus = ("{gpu: H100-SXM, gpus: 4}", "{gpu: cpu}")
    study = load(workplace, OWN, kind("emulator", "pipeline-parallel-size: 2"), on_cpus)
    assert study.space.sized == ()
    assert config(study, tp=2).gpus == config(load(workplace, OWN, on_cpus), tp=2).gpus


@pytest.mark.parametrize(
    "flag", [f"{name}-parallel-size" for name in ("tensor", "pipeline", "data", "prefill-context")]
)
def test_every_size_of_a_server_counts_its_gpus(workplace, flag):
    text = OWN.replace("    tp: {flag: tensor-parallel-size, values: [1, 2, 4], default: 1, counts_gpus: true}\n", "")
    assert config(load(workplace, text, kind("vllm", f"{flag}: 2"))).gpus == 2
