"""One word names the sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.search.problem import LOADS, Model, knob, launch, objective, space, study
from tuner.errors import UsageError
from tuner.search import choose, ledger
from tuner.search.expert import gpu_counts
from tuner.search.sampler import TunerSampler
from tuner.space.space import SearchSpace


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
