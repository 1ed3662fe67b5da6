"""Crashes with one message share a condition: it is found from a few of them, told apart from others, and said."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.search.problem import knob
from tuner.search.candidates import Candidates
from tuner.search.causes import Causes, suspected
from tuner.search.reading import cause
from tuner.space.space import SearchSpace
from tuner.study.outcome import Infeasible, Measured, Untrusted

# names and values of which no rule of thumb fears anything
SPACE = SearchSpace(
    "test",
    "emulator",
    (
        knob("tensor", 1, 2, 4, 8, default=1, numeric=True, log=True),
        knob("data", 1, 2, 4, default=1, numeric=True, log=True),
        knob("format", "bf16", "fp8", "awq", default="bf16"),
        knob("cache", "auto", "fp8", default="auto"),
        knob("graphs", "full", "eager", default="full"),
        knob("depth", 0, 2, 4, default=0, numeric=True),
        knob("window", 16, 32, 64, default=32, numeric=True, when={"graphs": "full"}),
    ),
)
FEARED = SearchSpace(
    "feared", "emulator", (*SPACE.parameters[:2], knob("kv_cache", "auto", "fp8", default="auto"), SPACE.parameters[4])
)
GPUS, KERNEL = "World size is larger than the machine", "illegal memory access in a kernel"


def codes(*many: dict[str, Any], space: SearchSpace = SPACE) -> np.ndarray:
    candidates = Candidates(space)
    return np.array([candidates.key(space.snap(params)) for params in many], np.int64)


def launched(seed: int, count: int, fails: Any) -> tuple[list[dict[str, Any]], list[str | None]]:
    rng = np.random.default_rng(seed)
    drawn = [{p.name: p.values[rng.integers(len(p.values))] for p in SPACE.parameters} for _ in range(count)]
    many = [SPACE.snap(SPACE.default()), *drawn]
    return many, [fails(p) for p in many]


def too_many(p: dict[str, Any]) -> str | None:
    if p["tensor"] * p["data"] > 8:
        return GPUS
    return KERNEL if p["format"] == "fp8" and p["depth"] > 2 else None


def learnt(seed: int, count: int, fails: Any = too_many) -> Causes:
    found = Causes(SPACE)
    many, messages = launched(seed, count, fails)
    found.learn(codes(*many), messages)
    return found


def grid() -> list[dict[str, Any]]:
    values = itertools.product(*(p.values for p in SPACE.parameters))
    return [dict(zip((p.name for p in SPACE.parameters), v, strict=True)) for v in values]


@pytest.mark.parametrize("seed", range(4))
def test_two_conditions_are_found_from_two_dozen_launches(seed: int):
    works = learnt(seed, 25).works(codes(*grid()))
    serves = np.array([too_many(p) is None for p in grid()])
    loss = -np.log(np.clip(np.where(serves, works, 1 - works), 1e-3, 1)).mean()
    assert loss < 0.25  # always saying the share that serves costs .64
    assert works[serves].mean() > 0.85
    assert works[~serves].mean() < 0.3


def test_what_is_suspected_is_said_with_its_weight():
    found = learnt(1, 60).words()
    assert found[GPUS][0] == "tensor x data >= 16"
    assert set(found[KERNEL][0].split(" and ")) == {"format = fp8", "depth >= 4"}
    assert all(0.4 < weight <= 1 for _, weight in found.values())


def test_what_crashes_with_one_message_do_not_share_is_acquitted_and_with_messages_of_their_own_it_is_not():
    base = SPACE.snap(SPACE.default())
    crashed = [{**base, "format": "fp8", **more} for more in ({"tensor": 8}, {"depth": 4}, {"graphs": "eager"})]
    asked = codes({**base, "tensor": 8})
    works = []
    for messages in (["it died"] * 3, ["one", "another", "a third"]):
        found = Causes(SPACE)
        found.learn(codes(base, *crashed), [None, *messages])
        works.append(float(found.works(asked)[0]))
    assert works[0] > 0.75 and works[1] < 0.55


def test_a_server_that_works_acquits_what_it_has():
    base = SPACE.snap(SPACE.default())
    crashed = {**base, "format": "fp8", "cache": "fp8"}
    asked = codes({**base, "format": "fp8", "depth": 2})
    before, after = Causes(SPACE), Causes(SPACE)
    before.learn(codes(base, crashed), [None, "died"])
    after.learn(codes(base, crashed, {**base, "format": "fp8"}), [None, "died", None])
    assert before.works(asked)[0] < 0.7
    assert after.works(asked)[0] > before.works(asked)[0] + 0.2
    assert after.works(codes(crashed))[0] < 0.05


@pytest.mark.parametrize("message", ["no kernel for the KV cache", "fp8: no kernel for --kv-cache", "kv_cache: sorry"])
def test_what_the_message_names_is_suspected_first(message: str):
    base = SPACE.snap(SPACE.default())
    crashed = {**base, "tensor": 4, "depth": 4, "cache": "fp8", "graphs": "eager"}
    without, named = {**crashed, "cache": "auto"}, {**base, "cache": "fp8"}
    silent, says, feared = Causes(SPACE), Causes(SPACE), Causes(SPACE)
    silent.learn(codes(base, crashed), [None, "it died"])
    says.learn(codes(base, crashed), [None, message])
    feared.learn(codes(base), [None])  # what is believed of it without any crash
    assert says.works(codes(without))[0] > silent.works(codes(without))[0] + 0.1
    before = feared.works(codes(named))[0]
    assert says.works(codes(named))[0] / before < silent.works(codes(named))[0] / before - 0.1
    assert "cache = fp8" in says.words()[message][0]


def test_what_engines_often_die_of_is_feared_until_it_has_served():
    base, found = FEARED.snap(FEARED.default()), Causes(FEARED)
    feared, plain = {**base, "kv_cache": "fp8"}, {**base, "graphs": "eager"}
    found.learn(codes(base, space=FEARED), [None])
    assert found.works(codes(feared, space=FEARED))[0] < found.works(codes(plain, space=FEARED))[0] - 0.1
    found.learn(codes(base, {**feared, "tensor": 2}, space=FEARED), [None, None])
    assert found.works(codes(feared, space=FEARED))[0] > found.works(codes(plain, space=FEARED))[0]


def test_more_gpus_than_there_seem_to_be_are_feared_until_so_many_have_served():
    sizes = (knob("tp", 1, 2, 4, default=2, numeric=True), knob("dp", 1, 2, default=1, numeric=True))
    space = SearchSpace("gpus", "function", (*sizes, *SPACE.parameters[4:6]))
    base, found = space.snap(space.default()), Causes(space)
    most, beyond = {**base, "tp": 4, "graphs": "eager"}, {**base, "tp": 4, "dp": 2}
    found.learn(codes(base, {**base, "tp": 1, "dp": 2}, space=space), [None, None])
    works = found.works(codes(most, beyond, space=space))
    assert works[0] > 0.8 and works[1] < 0.3
    found.learn(codes(base, {**beyond, "depth": 2}, space=space), [None, None])
    assert found.works(codes(beyond, space=space))[0] > 0.8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tp", "the output size of the gate is not divisible by block n"),
        ("tokens_per_block", "no kernel for pages of this size"),
        ("max_draft_len", "the verification of a tree failed"),
        ("max_num_seqs", "CUDA out of memory"),
    ],
)
def test_messages_call_parameters_by_other_words_than_their_names(name: str, message: str):
    space = SearchSpace("called", "function", (knob(name, 1, 2, default=1, numeric=True), SPACE.parameters[4]))
    said = frozenset(message.split())
    assert [test.weight(said) > 0 for test in Causes(space).tests if not test.of_two] == [True, True, False, False]


def test_what_is_feared_is_suspected_first():
    base = FEARED.snap(FEARED.default())
    crashed = {**base, "kv_cache": "fp8", "graphs": "eager", "data": 2, "tensor": 4}
    found = Causes(FEARED)
    found.learn(codes(base, crashed, space=FEARED), [None, "it died"])
    spared = [found.works(codes({**crashed, name: base[name]}, space=FEARED))[0] for name in ("kv_cache", "graphs")]
    assert spared[0] > 0.6 > 0.45 > spared[1]


def test_too_much_is_suspected_before_just_that_much():
    base = SPACE.snap(SPACE.default())
    found = Causes(SPACE)
    found.learn(codes(base, {**base, "tensor": 4}, {**base, "tensor": 2}), [None, "it died", None])
    assert found.works(codes({**base, "tensor": 8}))[0] < 0.2


def test_what_the_message_names_is_suspected_before_what_is_feared():
    memory = knob("memory_share", 0.85, 0.88, 0.91, 0.94, default=0.91, numeric=True)
    backend = knob("backend", "naive", "pplx", "deepep", default="naive")
    space = SearchSpace("s", "emulator", (memory, backend, *SPACE.parameters[4:6]))
    base = space.snap(space.default())
    crashed = {**base, "memory_share": 0.94, "backend": "pplx"}
    asked = codes({**crashed, "memory_share": 0.91}, {**crashed, "backend": "deepep"}, space=space)
    works = {}
    for message in ("pplx kernels cannot be captured", "it died"):
        found = Causes(space)
        found.learn(codes(base, crashed, space=space), [None, message])
        works[message] = found.works(asked).tolist()
    (named, feared), (other, most) = works.values()
    assert named < feared - 0.1 and most < other - 0.1


def test_a_server_that_mostly_works_and_crashed_once_crashed_by_chance():
    base = SPACE.snap(SPACE.default())
    near = [{**base, **p} for p in ({"data": 2}, {"tensor": 2}, {"format": "fp8"}, {"cache": "fp8"}, {"depth": 2})]
    found = Causes(SPACE)
    found.learn(codes(*[base] * 4, *near, base), [None] * 9 + ["it died"])
    assert found.works(codes(base, *near)).min() > 0.5
    found.learn(codes(base, near[0], near[0]), [None, None, "it died"])
    assert 0.2 < found.works(codes(near[0]))[0] < 0.8, "once each: nobody knows"


def test_a_value_that_the_message_names_is_suspected_before_its_parameter():
    base = SPACE.snap(SPACE.default())
    crashed = {**base, "tensor": 4, "depth": 4, "format": "awq", "graphs": "eager"}
    works = {}
    for message in ("awq: shards of 352 columns", "format: shards of 352 columns", "it died"):
        found = Causes(SPACE)
        found.learn(codes(base, crashed), [None, message])
        works[message] = found.works(codes({**crashed, "format": "fp8"}))[0]
    first, second, third = works.values()
    assert first > second + 0.05 and second > third + 0.05


def test_one_message_may_stand_for_two_conditions():
    def fails(p: dict[str, Any]) -> str | None:
        return "it died" if (p["format"] == "fp8" and p["depth"] > 2) or (p["tensor"] == 8 and p["data"] == 1) else None

    both = learnt(0, 50, fails).works(codes(*grid()))
    serves = np.array([fails(p) is None for p in grid()])
    one = np.array([p["tensor"] == 8 and p["data"] == 1 for p in grid()])
    assert both[serves].mean() > 0.85
    assert both[~serves & one].mean() < 0.3 and both[~serves & ~one].mean() < 0.3


def test_small_ratios_and_lists_without_a_scale_are_conditions_too():
    plain = SearchSpace(
        "plain",
        "emulator",
        (
            knob("tensor", 1, 2, 4, 8, default=1, numeric=True),
            knob("tokens", 2048, 4096, 8192, 16384, default=2048, numeric=True),
        ),
    )
    tests = [t for t in Causes(plain).tests if t.of_two]
    tables = [t.table.tobytes() for t in tests]
    assert len(set(tables)) == len(tables) == 24  # seven products and seven ratios: six limits each, from both sides
    assert all(0 < t.table.sum() < 16 for t in tests)
    assert "tensor / tokens >= 0.00390625" in [t.words for t in tests]


def test_what_is_said_of_a_message_is_true_of_most_of_its_crashes():
    """The rarer of two conditions crashed last."""

    def fails(p: dict[str, Any]) -> str | None:
        return "it died" if p["cache"] == "fp8" or (p["format"] == "awq" and p["depth"] > 2) else None

    many, messages = launched(2, 60, fails)
    last = {**SPACE.snap(SPACE.default()), "format": "awq", "depth": 4}
    found = Causes(SPACE)
    found.learn(codes(*many, last), [*messages, "it died"])
    assert found.words()["it died"][0] == "cache = fp8"


def test_words_that_every_name_has_name_nothing():
    base = SPACE.snap(SPACE.default())
    crashed = {**base, "tensor": 4, "graphs": "eager", "cache": "fp8"}
    plain, silent = Causes(SPACE), Causes(SPACE)
    plain.learn(codes(base, crashed), [None, "the number of this is full, set it to auto or none"])
    silent.learn(codes(base, crashed), [None, "it died"])
    assert plain.works(codes(*grid())) == pytest.approx(silent.works(codes(*grid())))


def test_a_parameter_that_does_not_apply_is_no_condition():
    base = SPACE.snap(SPACE.default())
    eager = {**base, "graphs": "eager"}
    found = Causes(SPACE)
    found.learn(codes(base, {**base, "window": 16}), [None, "window too small"])
    works = found.works(codes(eager, {**eager, "data": 2}, {**base, "window": 16, "data": 2}))
    assert works[0] > 0.85 and works[1] > 0.85 and works[2] < 0.3


def test_what_no_server_had_is_less_certain_than_what_one_had():
    base = SPACE.snap(SPACE.default())
    found = Causes(SPACE)
    found.learn(codes(base), [None])
    near, far = {**base, "data": 2}, {**base, "data": 2, "tensor": 8, "graphs": "eager"}
    works = found.works(codes(base, near, far))
    assert works[0] == 1 > works[1] > works[2] > 0.7
    assert 0 < Causes(SPACE).works(codes(far))[0] < 1  # nothing was launched
    found.learn(codes(base, near, {**base, "tensor": 8}), [None] * 3)
    assert found.works(codes({**near, "tensor": 8}))[0] < 1  # each was served, but never both


def test_a_crash_of_which_nothing_varies_suspects_nothing():
    still = SearchSpace(
        "still", "emulator", (knob("tensor", 1, default=1, numeric=True), knob("kind", "a", default="a"))
    )
    found = Causes(still)
    only = np.zeros((1, 2), np.int64)
    found.learn(only, ["it died"])
    assert 0 < found.works(only)[0] < 1
    assert found.words() == {}


def test_figures_make_no_cause_of_their_own():
    def crash(text: str) -> str:
        return cause(Infeasible("oom-kv", text))

    assert crash("the KV cache: 1.90 GiB needed, 0.21 available") == crash("the KV cache: 12 GiB needed, 3.5 available")
    assert crash("at 0x7f3a11: 12GiB short, 3 tries") == crash("at 0x5c0b: 1.5GiB short, 4 tries")
    assert crash("the KV cache") != crash("the weights")
    assert crash("no kernel for fp8") != crash("no kernel for fp4")
    assert cause(Infeasible("oom-kv", "no room")) != cause(Infeasible("hang", "no room"))


def test_recorded_launches_are_read_and_what_says_nothing_is_left_out():
    many, messages = launched(1, 60, too_many)
    told = [Infeasible("x", m) if m else Measured(()) for m in messages]
    noise = [
        (SPACE.snap(SPACE.default()), Infeasible("x", "the port is taken", transient=True)),
        (SPACE.snap(SPACE.default()), Untrusted(("lag",))),
        ({**SPACE.default(), "format": "gone"}, Infeasible("x", GPUS)),
        ({**SPACE.default(), "tensor": 64}, Infeasible("x", "no value of the grid any more")),
    ]
    found = suspected(SPACE, [*zip(many, told, strict=True), *noise])
    assert found[cause(Infeasible("x", GPUS))][0] == "tensor x data >= 16"
    assert len(found) == 2
    assert suspected(SPACE, []) == {}
