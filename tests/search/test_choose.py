"""One word names the sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.search.problem import LOADS, Model, knob, launch, objective, space, study
from tuner.errors import UsageError
from tuner.search import choose, ledger
from tuner.search.candidates import SAMPLE, Candidates
from tuner.search.expert import gpu_counts
from tuner.search.sampler import TunerSampler
from tuner.space.space import SearchSpace
from tuner.study.outcome import Infeasible


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("auto", "TunerSampler"),
        ("gp", "GPSampler"),
        ("tpe", "TPESampler"),
        ("nsga2", "NSGAIISampler"),
        ("random", "RandomSampler"),
        ("grid", "ShuffledGrid"),
    ],
)
def test_each_word_gives_its_sampler(word, kind):
    assert type(choose.sampler(word, space(), objective(), LOADS)).__name__ == kind


def test_another_word_is_refused_with_the_words_there_are():
    with pytest.raises(UsageError, match=r"unknown sampler 'bayes'.*auto, gp, tpe"):
        choose.sampler("bayes", space(), objective(), LOADS)


def test_the_grid_visits_everything_once_in_an_order_of_the_seed():
    orders = []
    for seed in (1, 1, 2):
        book = study(choose.sampler("grid", space(), objective(), LOADS, seed=seed))
        orders.append([tuple(ledger.ask(book, space())[1].values()) for _ in range(112)])
    allowed = {tuple(p.values()) for p in space().grid() if not space().denied(p)}
    assert set(orders[0]) == allowed and len(allowed) == 112
    assert orders[0] == orders[1] != orders[2]


def test_a_grid_too_large_to_hold_is_walked_without_repeats():
    wide = SearchSpace("wide", "emulator", tuple(knob(f"x{i}", *range(8), default=0) for i in range(6)))
    book = study(choose.sampler("grid", wide, objective(), LOADS))
    tried = [tuple(ledger.ask(book, wide)[1].values()) for _ in range(20)]
    assert len(set(tried)) == 20


def sizes(*more) -> SearchSpace:
    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    counting = [knob(n, 1, 2, 4, 8, default=1, numeric=True, log=True, counts_gpus=True) for n in names]
    return SearchSpace("sizes", "emulator", (*counting, *space().parameters[1:], *more))


WIDE = sizes(*(knob(f"x{i}", *"abcdef", default="a") for i in range(4)))


def beyond(params) -> str:
    gpus = params["tensor_parallel_size"] * params["pipeline_parallel_size"] * params["data_parallel_size"]
    return f"it wants {gpus} GPUs of 8" if gpus > 8 else ""


@pytest.mark.parametrize("wide", [False, True], ids=["whole", "sampled"])
@pytest.mark.parametrize("predictor", [None, Model(lambda _params: 1.0)], ids=["none", "model"])
def test_what_the_machine_cannot_carry_is_never_proposed(wide, predictor):
    """Most combinations of sizes take more GPUs than there are, which no rule of the space says."""
    of = WIDE if wide else sizes()
    for word in ("auto", "grid"):
        one = choose.sampler(word, of, objective(), LOADS, predictor=predictor, refuse=beyond)
        book, tried = study(one), []
        for _ in range(14):
            trial, params = ledger.ask(book, of)
            tried.append(params)
            ledger.tell(book, trial, of, objective(), launch({**params, "gpus": params["tensor_parallel_size"]}))
        assert not any(map(beyond, tried)) and len({tuple(p.values()) for p in tried}) >= 13  # one may be a repeat


def test_a_sample_is_of_what_may_be_launched_as_things_are_known():
    """Of eight combinations in a thousand memory is said to suffice; the others may join later, as neighbours."""
    of = SearchSpace("large", "emulator", tuple(knob(f"x{i}", *range(5), default=0) for i in range(8)))

    def unfit(params) -> str:
        return "" if sum(v == 0 for v in params.values()) >= 5 else "too large"

    found = Candidates.of(of, 0, unfit=unfit)
    assert len(found.params) > 100 and not any(map(unfit, found.params))
    assert all(found.number(params) is not None for params in found.neighbours(found.params[0]))
    nothing = Candidates.of(of, 0, unfit=lambda _params: "too large")
    assert nothing.keys == Candidates.of(of, 0).keys, "a model that refuses all there is says nothing"


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_sample_of_several_sizes_is_as_large_on_a_small_machine(gpus):
    """Of five sizes, one draw in a thousand is within one GPU."""
    counting = [knob(f"n{i}", 1, 2, 4, 8, default=1, numeric=True, log=True, counts_gpus=True) for i in range(5)]
    of = SearchSpace("sizes", "emulator", (*counting, *(knob(f"x{i}", *"abcdef", default="a") for i in range(5))))

    def refuse(params) -> str:
        return "no" if math.prod(params[p.name] for p in counting) > gpus else ""

    drawn, found = Candidates.of(of, 0), Candidates.of(of, 0, refuse=refuse)
    assert len(drawn.params) == len(found.params) == SAMPLE and not any(map(refuse, found.params))
    assert found.keys == Candidates.of(of, 0, refuse=refuse).keys
    assert Candidates.of(of, 0, refuse=lambda _params: "").keys == drawn.keys
    assert {drawn.key(params) for params in drawn.params if not refuse(params)} <= found.index.keys()
    largest = {p.name: {params[p.name] for params in found.params} for p in counting}
    assert all(values == {n for n in (1, 2, 4, 8) if n <= gpus} for values in largest.values())


TYPES = knob("gpu", "H100", "A100", default="H100")
BUSY = Infeasible("gpu-busy", "busy", transient=True)
SERVER = {"gpus": 1, "half": False, "guess": "none"}  # where a space does not say it


def types(*parameters) -> SearchSpace:
    return SearchSpace("types", "emulator", (TYPES, *parameters))


@pytest.mark.parametrize("predictor", [None, Model(lambda _params: 1.0)], ids=["none", "model"])
@pytest.mark.parametrize(
    "of",
    [
        types(*space().parameters),
        types(*space().parameters, *(knob(f"x{i}", *"abcdef", default="a") for i in range(4))),
        types(space().parameters[1]),
    ],
    ids=["whole", "sampled", "all tried"],
)
def test_what_was_measured_beyond_this_machines_reach_is_learnt_from_and_never_proposed(of, predictor):
    """Another tuner has A100s, and they are twice as fast; here, with H100s, everything may have been tried before."""
    one = choose.sampler(
        "auto", of, objective(), LOADS, predictor=predictor, refuse=lambda p: "no A100" if p["gpu"] == "A100" else ""
    )
    assert isinstance(one, TunerSampler)
    book = study(one)
    elsewhere = [{**of.default(), "gpu": "A100", "batch": batch} for batch in (16, 32, 64, 128)]
    elsewhere += [{**params, "gpus": 2} for params in elsewhere if "gpus" in params]
    faulty = {**of.default(), "gpu": "A100", "batch": 8}  # has no answer yet: nothing but its reach speaks against it
    for params in (faulty, *elsewhere):
        book.enqueue_trial({**params, **({"length": 2} if "length" in params else {})})
    tried = []
    for n in range(1 + len(elsewhere) + 10):
        trial, params = ledger.ask(book, of)
        tried.append(params)
        told = launch({**SERVER, **params}, noise=-0.7 if params["gpu"] == "A100" else 0.0) if n else BUSY
        ledger.tell(book, trial, of, objective(), told, started_s=1000.0 * n + 1, ended_s=1000.0 * n + 200)
    here = tried[1 + len(elsewhere) :]
    assert here[0] == of.snap(of.default()) and {params["gpu"] for params in here} == {"H100"}
    rows = one.beliefs.fitted["capacity"].rows.codes[:, 0]
    assert np.count_nonzero(rows == TYPES.values.index("A100")) == len(elsewhere)


def test_a_default_beyond_reach_that_was_measured_elsewhere_is_not_proposed():
    of = types(*space().parameters)
    book = study(choose.sampler("auto", of, objective(), LOADS, refuse=lambda p: "no" if p["gpu"] == "H100" else ""))
    asked = []
    for faulty in (True, *(False,) * 5):  # the first launch, elsewhere, has no answer: it is not taken
        if faulty:
            book.enqueue_trial({**of.default(), "length": 2})
        trial, params = ledger.ask(book, of)
        asked.append(params["gpu"])
        ledger.tell(book, trial, of, objective(), BUSY if faulty else launch(params))
    assert asked == ["H100", *["A100"] * 5]


def test_what_lies_near_the_default_is_within_reach_too():
    of = SearchSpace("nameless", "emulator", tuple(knob(f"x{i}", *"abc", default="a") for i in range(6)))
    book = study(choose.sampler("auto", of, objective(), LOADS, refuse=lambda p: "no" if p["x0"] != "a" else ""))
    for _ in range(4):
        trial, params = ledger.ask(book, of)
        assert (params["x0"] == "a" and "off the default" in trial.user_attrs["reason"]) or params == of.default()
        ledger.tell(book, trial, of, objective(), launch({**SERVER, "batch": 16}))


def test_a_space_of_which_nothing_is_within_reach_is_refused_in_words_of_the_machine_and_not_of_rules():
    with pytest.raises(UsageError, match="no configuration of the space 'sizes' is within reach: no GPU") as raised:
        choose.sampler("auto", sizes(), objective(), LOADS, refuse=lambda _params: "no GPU")
    assert "hardware" in str(raised.value.fix)


def test_where_several_sizes_count_gpus_and_no_name_says_of_what_the_most_that_there_are_come_first():
    parameters = [replace(p, name=f"n{j}") if p.counts_gpus else p for j, p in enumerate(sizes().parameters)]
    of = SearchSpace("nameless", "emulator", tuple(parameters))
    most, few = gpu_counts(of, lambda p: p["n0"] * p["n1"] * p["n2"] <= 8)
    assert math.prod(most[0][f"n{j}"] for j in range(3)) == 8 and "most GPUs" in most[1]
    assert [few[0][f"n{j}"] for j in range(3)] == [2, 1, 1]


def test_what_each_of_several_sizes_does_is_told_by_their_names_and_not_by_their_product():
    def sources(of):
        found = TunerSampler(of, objective(), LOADS, None, "m", refuse=None if of is one else beyond).beliefs.sources
        found.foresight.look()
        return found

    one = SearchSpace("one", "emulator", (sizes().parameters[0], *sizes().parameters[3:]))
    named, alone = sources(sizes()), sources(one)
    tensor, pipeline, *_ = named.rules
    assert tensor[3, 0] < pipeline[3, 0] < pipeline[0, 0] == 0.0  # the latency of eight, and of one
    assert "number of GPUs" not in [s.name for s in named.of("latency", range(4))]
    assert not alone.rules[0].any() and "number of GPUs" in [s.name for s in alone.of("latency", range(4))]
