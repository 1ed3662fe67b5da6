"""Mistakes in a search space, in `parameters:` and under `<<:` are one line with file:line, as all others are."""

import copy
import json
import math

import pytest
from ruamel.yaml import YAML

from tests.spec.test_studyfile import GOOD, write
from tuner.errors import UsageError
from tuner.spec import studyfile

SPACE = """\
search_space:
  engine: vllm
  fixed: {swap-space: 4}
  parameters:
    seqs:
      flag: max-num-seqs
      range: [8, 64]
      scale: log2
      only: {le: 64}
      default: [{value: 8, when: {gpus: {ge: 2}}}, {value: 16}]
    weights:
      values:
        none: {}
        int8: {requires: dummy_weights, flags: {draft.model: $draft_model, max-len: $max_model_len}}
      default: none
"""
OWN = GOOD.replace("search_space: vllm/quick\n", SPACE)


def load(folder, text):
    return studyfile.load(write(folder, text))


def refusal(folder, text):
    with pytest.raises(UsageError) as error:
        load(folder, text)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder}/study.yaml:")


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ("load: {<<: {laddr: [1, 2]}}", "7: unknown key 'laddr'. Did you mean 'ladder'?"),
        ("load: {<<: {ladder: [2, 1]}}", "7: load.ladder: the ladder is a rising list of loads above zero"),
        ("load:\n  warmup: 1s\n  <<: {ladder: [1, x]}", "7: load.ladder.1: input should be a valid number"),
        ("load:\n  <<: {ladder: [1, 2]}\n  warmup: soon", "9: load.warmup: bad duration"),
    ],
)
def test_a_mistake_in_a_merged_block_is_told_with_the_line_that_merges_it(workplace, load, says):
    assert refusal(workplace, GOOD.replace("load: {ladder: [1, 2, 4]}", load)).startswith(says)


def test_the_space_that_these_tests_break_is_a_good_one(workplace):
    space = load(workplace, OWN).space
    assert space["seqs"].values == (8, 16, 32, 64) and space["seqs"].default == 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("range: [8, 64]\n      scale: log2", "range: [0.8, 0.95]"), "9: seqs: a range of [0.8, 0.95] needs a step"),
        (("range: [8, 64]\n      scale: log2", "values: [8, 8.0]"), "9: seqs lists a value twice: 8 and 8.0 are one"),
        (
            ("range: [8, 64]\n      scale: log2", "values: [0, 8, false]"),
            "9: seqs lists 0 and false, which the search cannot tell apart. keep one of the two",
        ),
        (("only: {le: 64}", "when: {weights: int8}"), ""),
        (
            ("default: none\n", "default: none\n      when: {seqs: 8}\n", "only: {le: 64}", "when: {weights: int8}"),
            "11: seqs applies only where seqs does",
        ),
    ],
)
def test_what_could_never_vary_as_it_is_written_is_refused(workplace, change, says):
    text = OWN
    for old, new in zip(change[::2], change[1::2], strict=True):
        text = text.replace(old, new)
    if says:
        assert refusal(workplace, text).startswith(says)
    else:
        load(workplace, text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("only: {le: 64}", "only: {lte: 64}"), "11: search_space.parameters.seqs.only: value: unknown operator 'lte'"),
        (
            ("only: {le: 64}", "only: {le: $cpu_coers}"),
            "11: search_space.parameters.seqs.only: 'cpu_coers' is neither a parameter nor a known fact. "
            "Did you mean 'cpu_cores'?",
        ),
        (("{ge: 2}", "{gte: 2}"), "12: search_space.parameters.seqs.default.0.when: gpus: unknown operator 'gte'"),
        (("{gpus: {ge", "{gpsu: {ge"), "12: search_space.parameters.seqs.default.0.when: 'gpsu' is neither"),
        (("{value: 16}", "{value: 16, when: {gpus: {=: 1}}}"), "12: search_space.parameters.seqs.default.1.when: gpus"),
    ],
)
def test_a_mistake_in_only_or_in_a_case_of_the_default_is_told_with_its_place(workplace, change, says):
    assert refusal(workplace, OWN.replace(*change)).startswith(says)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("[]", "max_num_seqs has no value left. Name one or more of its values"),
        ("null", "max_num_seqs has no value null. Known: "),
        ("[8, null]", "max_num_seqs has no value null. Known: "),
        ("[8, 2024-01-01]", "max_num_seqs has no value 2024-01-01. Known: "),
        ("[8, [1]]", "max_num_seqs has no value [1]. Known: "),
        ("{le: 64}", "max_num_seqs has no value {'le': 64}. Known: "),
        ("[8, .inf]", "max_num_seqs: inf is no value of a grid. Write a finite number"),
        ("[.nan, 8]", "max_num_seqs: nan is no value of a grid. Write a finite number"),
    ],
)
def test_a_parameter_is_narrowed_to_numbers_and_words_only(workplace, limit, says):
    text = GOOD + f"parameters: {{max_num_seqs: {limit}}}\n"
    assert refusal(workplace, text).lower().startswith(f"9: {says}".lower())


@pytest.mark.parametrize(
    ("eight", "sixteen", "flags"),
    [
        ("{flags: {max-num-seqs: 8}}", "{flags: {max-num-seqs: 16}}", {"max-num-seqs": 12}),
        ("{}", "{flags: {max-num-seqs: 16}}", {"max-num-seqs": 12}),
        ("{}", "{}", None),
        ("{env: {SEQS: 8}}", "{env: {SEQS: 16}}", None),
        ("{flags: {max-num-seqs: 8}}", "{flags: {max-num-seqs: 16}, env: {A: 1}}", None),
        ("{flags: {max-num-seqs: 8, swap: 1}}", "{flags: {max-num-seqs: 16, swap: 2}}", None),
        ("{flags: {max-num-seqs: 9}}", "{flags: {max-num-seqs: 16}}", None),
    ],
)
def test_a_number_that_is_none_of_the_values_means_what_their_flag_says_or_is_refused(workplace, eight, sixteen, flags):
    values = f"values: {{8: {eight}, 16: {sixteen}}}\n      default: 8\n"
    whole = OWN[: OWN.index("      flag: max-num-seqs")] + "      " + values + OWN[OWN.index("    weights:") :]
    text = whole + "parameters: {seqs: 12}\n"
    if flags is None:
        says = "seqs has no value 12, and what it would mean follows from no flag. name one of its values (8, 16)"
        assert says in refusal(workplace, text)
        assert says in refusal(workplace, text.replace("12}", "[8, 12]}"))
        assert load(workplace, text.replace("12}", "16}")).space.fixed.keys() <= {"swap-space", "max-num-seqs", "swap"}
    else:
        assert load(workplace, text).space.fixed == {"swap-space": 4, **flags}


def test_a_default_beside_values_with_flags_of_their_own_adds_none_where_it_is_pinned(workplace):
    values = "values: {8: {flags: {max-num-seqs: 8}}, 16: {flags: {max-num-seqs: 16}}}\n      default: 256\n"
    whole = OWN[: OWN.index("      flag: max-num-seqs")] + "      " + values + OWN[OWN.index("    weights:") :]
    assert load(workplace, whole + "parameters: {seqs: 256}\n").space.fixed == {"swap-space": 4}


def test_a_value_that_is_asked_for_twice_is_refused(workplace):
    text = GOOD + "parameters: {max_num_seqs: [16, 16]}\n"
    assert refusal(workplace, text) == "9: max_num_seqs lists a value twice"


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("{chunked_prefill: 1}", "chunked_prefill has no value 1. Known: false, true"),
        ("{chunked_prefill: [0, 1]}", "chunked_prefill has no value 0. Known: false, true"),
        ("{tensor_parallel: true}", "tensor_parallel has no value true. Known: 1, 2, 4"),
        ("{tensor_parallel: [1, true]}", "tensor_parallel lists 1 and true, which the search cannot tell apart"),
    ],
)
def test_a_switch_is_no_number_in_what_is_asked_for(workplace, limit, says):
    text = GOOD.replace("vllm/quick", "vllm/multi-gpu") + f"hardware: {{gpus: 4}}\nparameters: {limit}\n"
    assert refusal(workplace, text).startswith(f"10: {says}")


def test_a_number_of_gpus_is_narrowed_to_whole_numbers_above_zero(workplace):
    text = GOOD.replace("vllm/quick", "vllm/multi-gpu") + "hardware: {gpus: 4}\nparameters: {tensor_parallel: LIMIT}\n"
    assert load(workplace, text.replace("LIMIT", "[1, 2]")).space["tensor_parallel"].values == (1, 2)
    for limit in ("0", "[1, 1.5]"):
        assert refusal(workplace, text.replace("LIMIT", limit)).startswith("10: tensor_parallel counts GPUs")


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("[8, .inf]", "9: seqs: the range is 8 to inf. Write two finite numbers"),
        ("[.nan, 8]", "9: seqs: the range is nan to 8. Write two finite numbers"),
        ('["inf", "inf"]\n      scale: log2', "9: seqs: the range is inf to inf. Write two finite numbers"),
        pytest.param(f"[8, {10**400}]\n      scale: log2", "9: seqs: the range is 8 to 1000", id="beyond floats"),
        pytest.param(
            f"[{-(10**308)}, {10**308}]\n      step: 1.0e+305", "9: seqs: the range is -1000", id="as wide as no float"
        ),
        ("[8, 64]\n      step: .nan", "10: seqs: the step is nan. Write a finite number"),
        ("[8, 64]\n      step: .inf", "10: seqs: the step is inf. Write a finite number"),
        ("[0.0, 1.0e+308]\n      step: 1.0e-10", "9: seqs: more than 10000 values are too many for one parameter"),
        ("[0, 10000]", "9: seqs: more than 10000 values are too many for one parameter"),
    ],
)
@pytest.mark.timeout(60)
def test_a_range_is_between_finite_numbers(workplace, grid, says):
    text = OWN.replace("[8, 64]\n      scale: log2", grid)
    assert refusal(workplace, text).lower().startswith(says.lower())


@pytest.mark.parametrize("number", [".inf", ".nan", pytest.param(10**400, id="beyond floats")])
def test_a_value_of_a_grid_is_a_finite_number(workplace, number):
    text = OWN.replace("range: [8, 64]\n      scale: log2\n      only: {le: 64}", f"values: [8, 16, {number}]")
    assert "is no value of a grid. write a finite number" in refusal(workplace, text).lower()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("$draft_model", "$draft_modle"), "16: --draft.model: no such fact: draft_modle. Did you mean 'draft_model'?"),
        (("$max_model_len", "$max_model_lne"), "16: --max-len: no such fact: max_model_lne. Did you mean 'max_model"),
        (("swap-space: 4", "--dtype: $native_type"), "5: --dtype: no such fact: native_type. Did you mean 'native_dt"),
        (("requires: dummy_weights", "requires: dummy_weight"), "16: requires: no such fact: dummy_weight. Did you"),
        (
            ("range: [8, 64]\n      scale: log2\n      only: {le: 64}", "values: [16, $gpu]"),
            "9: --max-num-seqs: no such",
        ),
    ],
)
def test_a_misspelt_fact_in_the_flags_of_a_space_is_refused(workplace, change, says):
    assert refusal(workplace, OWN.replace(*change)).startswith(says)


def test_a_fact_that_this_machine_lacks_is_no_mistake(workplace):
    study = load(workplace, OWN.replace("requires: dummy_weights, ", ""))
    assert "draft_model" not in study.space.facts and study.space["weights"].values == ("none", "int8")


def test_flags_may_name_a_pinned_parameter(workplace):
    study = load(workplace, OWN.replace("$max_model_len", "$seqs") + "parameters: {seqs: 32}\n")
    assert study.space.facts["seqs"] == 32


def test_facts_are_filled_in_whether_a_value_is_tuned_pinned_or_fixed(workplace):
    (workplace / "draft").mkdir()
    (workplace / "draft" / "config.json").write_text((workplace / "model" / "config.json").read_text())
    text = OWN.replace("requires: dummy_weights, ", "").replace("swap-space: 4", "max-model-len: $max_model_len")
    free = load(workplace, text + "draft_model: ./draft\n").space
    pinned = load(workplace, text + "draft_model: ./draft\nparameters: {weights: int8}\n").space
    tuned = free.config({**free.default(), "weights": "int8"}, "m").flags
    assert tuned["max-model-len"] == free.facts["max_model_len"]
    assert json.loads(tuned["draft"]) == {"model": str(workplace / "draft")}
    flags = pinned.config(pinned.default(), "m").flags
    assert flags["draft"] == tuned["draft"] and flags["max-len"] == tuned["max-len"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fixed: {swap-space: 4}", "fixed: {x: false}", "5: --x: false adds no flag"),
        ("int8: {requires: dummy_weights, flags: {", "int8: {flags: {x: false, ", "16: --x: false adds no flag"),
        ("fixed: {swap-space: 4}", "fixed: {x: .inf}", "5: --x: no server takes inf"),
        ("int8: {requires: dummy_weights, flags: {", "int8: {flags: {x: .nan, ", "16: --x: no server takes nan"),
        ("fixed: {swap-space: 4}", "fixed: {x: 1, --x: 2}", "5: --x is given twice"),
        ("fixed: {swap-space: 4}", "env: {A-B: 1}", "5: 'A-B' is no name of an environment variable"),
        ("fixed: {swap-space: 4}", "env: {AB: 010}", "5: AB: 010 would be passed on as 10"),
        ("fixed: {swap-space: 4}", "env: {AB: true}", "5: search_space.env.AB: true is no text"),
    ],
)
def test_flags_and_variables_that_would_not_arrive_are_refused(workplace, old, new, says):
    assert refusal(workplace, OWN.replace(old, new)).startswith(says)


def _with(condition):
    """A space with numbers, words, a switch a default for each machine, and one condition in each kind of place."""
    return GOOD.replace(
        "search_space: vllm/quick\n",
        f"""\
search_space:
  engine: vllm
  parameters:
    m: {{flag: m, values: [1, 2], default: [{{value: 9, when: {{gpus: {{ge: 99}}}}}}, {{value: 1}}]}}
    w: {{values: {{a: {{}}, b: {{requires: draft_model}}, 64: {{}}}}, default: a}}
    s: {{type: switch, flag: s, default: true}}
    n: {{flag: n, values: [$native_dtype, $num_heads, float32], default: float32}}
    x: {{flag: x, values: [u, v], default: u, when: {condition}}}
  rules: [{{deny: {condition}, because: so}}]
""",
    )


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ('{m: "2"}', "m has no value '2'. Write 2 without quotes"),
        ('{m: {ge: "2"}}', "m has no value '2'. Write 2 without quotes"),
        ("{w: B}", "w has no value 'B'. Did you mean 'b'?"),
        ('{w: "64"}', "w has no value '64'. Write 64 without quotes"),
        ("{s: off}", "s has no value 'off'. Known: false, true"),
        ("{w: {in: ab}}", "w: in takes a list of values, not 'ab'"),
        ("{gpu_name: {not_in: H100}}", "gpu_name: not_in takes a list of values, not 'H100'"),
        ("{native_dtype: flaot32}", "native_dtype has no value 'flaot32'. Did you mean 'float32'?"),
        ("{platform: [cuda, rocm]}", "platform has no value 'rocm'. Known: cpu, cuda"),
        ('{gpu_memory_gib: {ge: "80"}}', "gpu_memory_gib is a number, not '80'"),
        ('{quantized: "true"}', "quantized is true or false, not 'true'"),
        ("{gpu_name: {ne: 80}}", "gpu_name is text, not 80"),
        ("{n: FLOAT32}", "n has no value 'FLOAT32'. Did you mean 'float32'?"),
        ("{m: [2, $gpsu]}", "'gpsu' is neither a parameter nor a known fact. Did you mean 'gpus'?"),
        *((good, "") for good in ("{native_dtype: float32}", "{draft_model: {ne: 1}}", "{n: {ge: $gpus}}", "{n: 2}")),
        *((good, "") for good in ("{m: 2}", "{m: {ge: 1.5}}", "{m: 9}", "{m: $gpus}", "{w: [a, b]}", "{w: 64}")),
        # values that the grid has not, or not any more
        *(
            (good, "")
            for good in ("{m: [1, 3]}", "{m: {ne: null}}", "{w: aa}", "{w: {not_in: [c]}}", "{m: [2, $gpus]}")
        ),
        *((good, "") for good in ("{s: false}", "{w: {ge: 1}}", "{gpu_name: none-such}", "{m: {divides: $num_heads}}")),
    ],
)
def test_what_a_parameter_can_never_be_is_no_condition(workplace, condition, says):
    if says:
        assert f"search_space.parameters.x.when: {says}".lower() in refusal(workplace, _with(condition)).lower()
        rule = _with(condition).replace(f"when: {condition}", "when: {m: 1}")
        assert f"search_space.rules.0.deny: {says}".lower() in refusal(workplace, rule).lower()
    else:
        load(workplace, _with(condition))


def test_what_a_case_of_a_default_asks_of_a_fact_is_of_its_kind(workplace):
    says = "12: search_space.parameters.seqs.default.0.when: gpus is a number, not '2'"
    assert refusal(workplace, OWN.replace("{ge: 2}", '{ge: "2"}')) == says


def test_a_rule_heeds_what_a_value_names(workplace):
    space = load(workplace, _with("{n: 8}")).space
    assert [bool(space.denied({**space.default(), "n": n})) for n in space["n"].values] == [False, True, False]


def test_a_condition_may_name_what_the_study_adds_to_a_grid(workplace):
    assert load(workplace, _with("{m: 3}") + "parameters: {m: [1, 3]}\n").space["m"].values == (1, 3)


def test_a_value_that_is_allowed_must_be_one(workplace):
    text = OWN.replace("only: {le: 64}", "only: {in: [8, 65]}")
    assert refusal(workplace, text).startswith("11: search_space.parameters.seqs.only: seqs has no value 65. ")


@pytest.mark.parametrize("said", ["{w: B}", '{m: {ge: "2"}}', "{w: {in: ab}}"])
def test_a_begun_studys_conditions_are_read_as_they_were(workplace, tmp_path, said):
    frozen = copy.deepcopy(dict(load(workplace, _with("{m: 1}")).frozen))
    condition = YAML(typ="safe").load(said)
    frozen["search_space"]["parameters"]["x"]["when"] = frozen["search_space"]["rules"][0]["deny"] = condition
    (tmp_path / "begun").mkdir()
    with (tmp_path / "begun" / "study.yaml").open("w") as file:
        YAML().dump(frozen, file)
    assert studyfile.load(tmp_path / "begun").space["x"].when == condition


@pytest.mark.parametrize(
    ("mine", "its", "says"),
    [
        ("args: {max-len: 512}", "fixed: {max-len: 256}", "engine.args says max-len 512, the search space or a pinned"),
        ("args: {no-eager: true}", "fixed: {eager: true}", "engine.args says no-eager, "),
        ("env: {A: 1}", "env: {A: 2}", "engine.env says A 1, "),
        ("args: {max-len: 512}", "fixed: {max-len: 512}", ""),
        ("args: {max-len: $max_model_len}", "fixed: {max-len: 4096}", ""),
        ("env: {A: 1}", "env: {A: '1'}", ""),
    ],
)
def test_what_study_and_space_give_every_server_must_agree(workplace, mine, its, says):
    text = OWN.replace("kind: emulator,", f"kind: emulator, {mine},").replace("fixed: {swap-space: 4}", its)
    if says:
        assert refusal(workplace, text).startswith(f"2: {says}")
    else:
        load(workplace, text)


def test_a_pinned_parameter_and_the_studys_flags_must_agree(workplace):
    text = GOOD.replace("kind: emulator,", "kind: emulator, args: {max-num-seqs: 128},") + "parameters: {max_num_seqs: "
    assert load(workplace, text + "128}\n").space.fixed == {"max-num-seqs": 128}
    assert refusal(workplace, text + "64}\n").startswith("2: engine.args says max-num-seqs 128, the search space")


@pytest.mark.parametrize(("flag", "tokens"), [("512", 512), ("$max_total_tokens", 172), ("auto", 4096)])
def test_the_longest_request_is_what_the_spaces_own_flags_say(workplace, flag, tokens):
    text = OWN.replace("swap-space: 4", f"max-model-len: {flag}, load-format: dummy")
    study = load(workplace, text.replace("only: {le: 64}", "only: {le: $max_model_len}"))
    assert study.space.facts["max_model_len"] == study.frozen["frozen"]["facts"]["max_model_len"] == tokens
    assert study.space["weights"].values == ("none", "int8")  # which needs dummy weights


def test_a_pinned_length_is_the_longest_request(workplace):
    text = OWN.replace("flag: max-num-seqs", "flag: max-model-len") + "parameters: {seqs: 64}\n"
    assert load(workplace, text).space.facts["max_model_len"] == 64


def test_a_study_that_was_begun_is_read_whatever_is_refused_now(workplace, tmp_path):
    """It was measured: its report and its front are worth more than a rule that came later."""
    study = load(workplace, OWN)
    begun = copy.deepcopy(dict(study.frozen))
    begun["price_usd_per_gpu_hour"] = 0
    begun["budget"]["hours"] = math.inf
    begun["slo"] = {"ttft_p9": "500ms", "error_rate": 1}
    begun["trace"]["max_output_tokens"] = 0
    begun["search_space"]["fixed"] = {"path": "$HOME"}
    begun["search_space"]["parameters"]["seqs"]["default"][0]["when"] = {"gpu_count": {"ge": 2}}
    folder = tmp_path / "begun"
    folder.mkdir()
    with (folder / "study.yaml").open("w") as file:
        YAML().dump(begun, file)
    again = studyfile.load(folder)
    assert again.objective.price_usd_per_gpu_hour == study.objective.price_usd_per_gpu_hour
    assert again.space.config(again.space.default(), "m").flags == {"path": "$HOME"}
    del begun["frozen"]
    with (workplace / "anew.yaml").open("w") as file:
        YAML().dump(begun, file)
    with pytest.raises(UsageError):
        studyfile.load(workplace / "anew.yaml")


def test_whole_numbers_of_gpus_may_be_written_as_any_number(workplace):
    text = OWN.replace("range: [8, 64]\n      scale: log2", "values: [1.0, 2]\n      counts_gpus: true")
    text = text.replace("default: [{value: 8, when: {gpus: {ge: 2}}}, {value: 16}]", "default: 1.0")
    assert load(workplace, text).space["seqs"].values == (1.0, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("range: [8, 64]\n      scale: log2", "range: [0.8, 0.95]"),
        ("range: [8, 64]\n      scale: log2", "values: [8, 8.0]"),
        ("only: {le: 64}", "when: {seqs: 8}"),
        ("requires: dummy_weights", "requires: dummy_weight"),
        ("fixed: {swap-space: 4}", "fixed: {x: 1, --x: 2}"),
        ("fixed: {swap-space: 4}", "env: {A-B: 1}"),
        ("kind: emulator,", "kind: emulator, args: {x-y: 1, x_y: 2},"),
        ("kind: emulator,", "kind: emulator, args: {swap-space: .inf},"),
        ("budget:", "parameters: {seqs: [16, 16]}\nbudget:"),
        ("range: [8, 64]\n      scale: log2", "values: [1, 16, true]"),
        ("budget:", "parallel: 0\nbudget:"),
        ("budget:", "price_usd_per_gpu_hour: {L4: 1, l4: 2}\nbudget:"),
    ],
)
def test_what_a_new_study_is_refused_for_is_no_mistake_of_one_that_has_begun(workplace, old, new):
    begun = f"frozen: {json.dumps(load(workplace, OWN).frozen['frozen'])}\n"
    text = OWN.replace(old, new)
    assert refusal(workplace, text)
    load(workplace, text + begun)


@pytest.mark.parametrize("like", ["max-num-sqs", "quantization"])
def test_what_a_parameter_is_like_is_something_that_the_search_knows(workplace, like):
    assert load(workplace, OWN.replace("scale: log2", "scale: log2\n      like: max_num_seqs")).space["seqs"].like
    mistake = refusal(workplace, OWN.replace("scale: log2", f"scale: log2\n      like: {like}"))
    assert mistake.startswith(f"11: seqs is like nothing that the search knows: {like} with the values 8, 16, 32, 64")


def test_a_mistake_in_a_list_with_a_tag_is_told_with_the_line_of_the_list(workplace):
    text = "search_space: {parameters: {}, rules: !mine [x]}\n" + GOOD.replace("search_space: vllm/quick\n", "")
    with pytest.raises(UsageError) as error:
        studyfile.load(write(workplace, text))
    assert str(error.value).startswith(f"{workplace}/study.yaml:1: ")
