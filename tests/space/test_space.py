import json

import pytest

from tuner.space.condition import holds
from tuner.space.space import Emission, Parameter, Rule, SearchSpace


def parameter(name, values, default, **more):
    emissions = tuple(Emission({name.replace("_", "-"): value}) for value in values)
    return Parameter(name, tuple(values), more.pop("emissions", emissions), default, **more)


SPEC = parameter(
    "speculation",
    ["none", "ngram"],
    "none",
    emissions=(Emission(), Emission({"speculative-config.method": "ngram"})),
)
DRAFT = Parameter(
    "draft_length",
    (2, 4),
    tuple(Emission({"speculative-config.num_speculative_tokens": n}) for n in (2, 4)),
    4,
    numeric=True,
    when={"speculation": "ngram"},
    always=True,
)
BATCH = parameter("max_num_batched_tokens", [256, 1024, 4096], 1024, numeric=True, log=True)
SEQS = parameter("max_num_seqs", [64, 512], 64, numeric=True, log=True)
RULE = Rule({"max_num_batched_tokens": {"lt": "$max_num_seqs"}}, "a step must hold every request")
SPACE = SearchSpace("s", "vllm", (SPEC, DRAFT, BATCH, SEQS), (RULE,), facts={"gpus": 2})


def test_the_baseline_has_no_flag_at_all():
    assert SPACE.config(SPACE.default(), "m").args() == []


def test_a_parameter_off_its_default_adds_its_flag():
    config = SPACE.config({"max_num_batched_tokens": 4096}, "m")
    assert config.args() == ["--max-num-batched-tokens", "4096"]


def test_every_kind_of_parallelism_multiplies_the_gpus():
    tensor, data = (parameter(name, [1, 2, 4], 1, numeric=True, counts_gpus=True) for name in ("tp", "dp"))
    config = SearchSpace("s", "vllm", (tensor, data)).config({"tp": 2, "dp": 4}, "m")
    assert config.gpus == 8


def test_keys_inside_a_json_flag_are_merged_into_one_value():
    config = SPACE.config({"speculation": "ngram", "draft_length": 2}, "m")
    assert json.loads(config.flags["speculative-config"]) == {"method": "ngram", "num_speculative_tokens": 2}


def test_a_parameter_that_does_not_apply_changes_nothing_so_it_is_not_another_server():
    one = SPACE.config({"speculation": "none", "draft_length": 2}, "m")
    assert one.hash == SPACE.config(SPACE.default(), "m").hash
    assert "draft_length" not in one.params


def test_the_grid_lists_no_server_twice():
    hashes = [SPACE.config(params, "m").hash for params in SPACE.grid()]
    assert len(hashes) == len(set(hashes)) == (1 + 2) * 3 * 2


def test_a_rule_says_why_a_combination_is_invalid():
    assert (
        SPACE.denied({"max_num_batched_tokens": 256, "max_num_seqs": 512, **_rest()})
        == "a step must hold every request"
    )
    assert SPACE.denied({"max_num_batched_tokens": 1024, "max_num_seqs": 512, **_rest()}) == ""


def _rest():
    return {"speculation": "none", "draft_length": 4}


@pytest.mark.parametrize(("value", "nearest"), [(300, 256), (2100, 4096), (2000, 1024), (10**6, 4096), (1, 256)])
def test_a_number_between_grid_points_goes_to_the_nearest_in_logarithms(value, nearest):
    assert BATCH.snap(value) == nearest


def test_a_category_that_is_not_in_the_grid_is_an_error():
    with pytest.raises(ValueError, match="has no value 'eagle'"):
        SPEC.snap("eagle")


def test_the_hash_covers_flags_and_environment_but_not_the_names_of_parameters():
    config = SPACE.config({"max_num_seqs": 512}, "m")
    assert config.hash != SPACE.config(SPACE.default(), "m").hash
    assert config.hash == type(config)(**{**config.to_dict(), "params": {}}).hash
    assert config.hash != type(config)(**{**config.to_dict(), "gpu": "L40S"}).hash


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"a": 1}, True),
        ({"a": [1, 2]}, True),
        ({"a": {"lt": "$b"}}, True),  # an operand that names another value
        ({"a": {"ge": 1, "le": 0}}, False),  # all of them must hold
        ({"b": {"not_multiple_of": 2}}, True),
        ({"missing": 1}, False),  # what is not known is not so
        ({"a": {"lt": "$missing"}}, False),
        ({"a": {"lt": "text"}}, False),  # incomparable is not so
        ({"b": {"divides": 9}}, True),
        ({"share": {"multiple_of": 8}}, False),  # not a number, though Python would fill it in
        ({"share": {"not_multiple_of": 8}}, False),
        ({"huge": {"multiple_of": 0.5}}, False),
        ({"none": {"ne": 1}}, False),  # nor is what is known to be none
        ({"dtype": "bfloat16"}, True),  # a value that names a fact is what the fact is
        ({"dtype": "$native"}, True),
        ({"native": {"ne": "$dtype"}}, False),
        ({"dtype": ["float16", "$native"]}, True),
        ({"a": {"not_in": ["$a", 2]}}, False),
    ],
)
def test_conditions_are_data(condition, expected):
    known = {"a": 1, "b": 3, "share": "50%", "huge": 10**400, "none": None, "native": "bfloat16", "dtype": "$native"}
    assert holds(condition, known) is expected
