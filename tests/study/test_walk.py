"""Which loads of a launch are measured."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.studies import objective, step
from tests.verify.test_racing import point
from tuner.study import walk

WANT = objective()
RUNGS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def at(load: float, tpot_s: float = 0.02, *, ok: bool = True):
    """A step of 1 USD per million tokens at load 1, of a server that keeps up."""
    found = step(load, WANT, tokens_per_s=2.5 / 3600 * 1e6 * load, tpot_s=tpot_s, spread=0.01)
    return dataclasses.replace(found, slo_misses=() if ok else ("ttft_p99 too long",))


def walked(capacity: float, start: float) -> list[float]:
    """The loads on the way up of a launch that holds ``capacity``."""
    steps = []
    while (load := walk.ahead(steps, RUNGS, start)) is not None:
        steps.append(at(load, ok=load <= capacity))
    return [s.load for s in steps]


def test_the_place_of_a_load_is_the_same_for_every_launch():
    assert [walk.place((0.5, 0.7, 1.0), load) for load in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)] == [0, 1, 2, 3, 4, 5]


def test_without_a_start_a_ladder_is_measured_from_its_lowest_load_to_the_first_miss():
    assert walked(1.5, 0.0) == [0.25, 0.5, 1.0, 2.0]
    assert walked(0.1, 0.0) == [0.25]
    assert walked(99.0, 0.0) == [*RUNGS]


def test_a_launch_begins_at_the_highest_load_up_to_its_start():
    assert walked(3.0, 1.9) == [1.0, 2.0, 4.0]
    assert walked(3.0, 2.0) == [2.0, 4.0]
    assert walked(99.0, 50.0) == [8.0]


def test_where_the_first_load_misses_the_one_that_holds_is_looked_for_by_halves():
    assert walked(0.6, 8.0) == [8.0, 1.0, 0.5]
    assert walked(2.0, 8.0) == [8.0, 1.0, 2.0, 4.0]
    assert walked(0.1, 8.0) == [8.0, 1.0, 0.5, 0.25], "none holds: not one by one down to the lowest"


@given(st.floats(0.05, 16), st.floats(0, 20))
def test_wherever_it_begins_the_highest_load_that_holds_and_the_next_above_are_measured(capacity, start):
    loads = walked(capacity, start)
    held = [load for load in RUNGS if load <= capacity]
    beyond = [load for load in RUNGS if load > capacity]
    assert len(set(loads)) == len(loads)
    assert {*held[-1:], *beyond[:1]} <= {*loads}


def test_below_its_first_load_a_launch_is_measured_where_the_front_is_not_better():
    steps = [at(2.0, 0.020), at(4.0, 0.020)]  # as slow at any load, 0.5 USD at load 2
    assert walk.below(steps, RUNGS, [], WANT) == 1.0, "no front yet"
    assert walk.below(steps, RUNGS, [point(0.9, 0.015)], WANT) is None
    assert walk.below(steps, RUNGS, [point(1.1, 0.015)], WANT) == 1.0, "dearer than what load 1 costs"
    assert walk.below(steps, RUNGS, [point(0.9, 0.021)], WANT) == 1.0, "slower"


def test_what_launches_differ_by_leaves_no_load_out():
    steps = [at(2.0, 0.020), at(4.0, 0.020)]
    assert walk.below(steps, RUNGS, [point(0.9, 0.0195)], WANT) == 1.0
    assert walk.below(steps, RUNGS, [point(0.9, 0.0195)], WANT, spread=0.01) is None


def test_a_latency_is_followed_down_along_the_line_of_the_two_lowest_loads():
    steps = [at(2.0, 0.020), at(4.0, 0.028)]  # falls by the root of the load: 14.1 ms at load 1, 10 ms at 0.5
    assert walk.below(steps, RUNGS, [point(0.9, 0.015)], WANT) == 1.0
    assert walk.below(steps, RUNGS, [point(0.9, 0.012)], WANT) == 0.5
    assert walk.below(steps, RUNGS, [point(0.9, 0.012), point(1.9, 0.009), point(3.9, 0.006)], WANT) is None


@pytest.mark.parametrize(
    "steps",
    [
        [at(2.0)],
        [at(2.0), dataclasses.replace(at(4.0, ok=False), metrics={})],
    ],
)
def test_of_one_load_alone_nobody_knows_how_latency_falls(steps):
    assert walk.below(steps, RUNGS, [point(0.9, 0.001)], WANT) == 1.0


def test_nothing_is_asked_below_what_missed_nothing_that_was_not_believed_and_nothing_without_a_price():
    assert walk.below([at(2.0, ok=False)], RUNGS, [], WANT) is None
    assert walk.below([dataclasses.replace(at(2.0), untrusted=("late",))], RUNGS, [], WANT) is None
    assert walk.below([dataclasses.replace(at(2.0), metrics={"tpot_p99_s": 0.02})], RUNGS, [], WANT) is None
    assert walk.below([at(0.25)], RUNGS, [], WANT) is None, "there is no lower one"
