import math

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pareto.test_front import point
from tuner.pareto.volume import hypervolume

values = st.floats(0.01, 10, allow_nan=False)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=30))
def test_the_area_is_moocores(pairs):
    assert hypervolume(pairs, (8.0, 9.0)) == pytest.approx(moocore.hypervolume(np.array(pairs), ref=[8.0, 9.0]))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=30))
def test_the_area_in_logarithms_is_moocores_on_the_logarithms(pairs):
    wanted = moocore.hypervolume(np.log(np.array(pairs)), ref=[math.log(8.0), math.log(9.0)])
    assert hypervolume(pairs, (8.0, 9.0), log=True) == pytest.approx(wanted, abs=1e-12)


def test_one_point_is_a_rectangle_and_none_is_nothing():
    assert hypervolume([(1.0, 2.0)], (4.0, 4.0)) == 6.0
    assert hypervolume([], (4.0, 4.0)) == 0.0


def test_points_that_missed_their_slos_or_lie_beyond_the_reference_count_for_nothing():
    assert hypervolume([point(0, 1, 2, ok=False), point(1, 5, 1)], (4.0, 4.0)) == 0.0
    assert hypervolume([point(0, 1, 2)], (4.0, 4.0)) == 6.0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_no_finite_number_takes_nothing_from_the_others(odd, log):
    pairs = [(2.0, 1.0), (1.0, 2.0)]
    for wrong in ((odd, 1.0), (1.0, odd)):
        for place in range(3):
            mixed = [*pairs[:place], wrong, *pairs[place:]]
            assert hypervolume(mixed, (3.0, 3.0), log=log) == hypervolume(pairs, (3.0, 3.0), log=log)


def test_a_zero_has_no_logarithm():
    with pytest.raises(ValueError, match="above zero"):
        hypervolume([(0.0, 1.0)], (4.0, 4.0), log=True)
