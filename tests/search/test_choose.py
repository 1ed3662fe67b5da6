"""One word names the sampler."""

from __future__ import annotations

import pytest

from tests.search.problem import LOADS, knob, objective, space, study
from tuner.errors import UsageError
from tuner.search import choose, ledger
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
