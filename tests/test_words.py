import pytest

from tuner.words import figure


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0994, "0.0994"), (999.4, "999"), (999.7, "1,000"), (82_240.3, "82,240"), (-5e4, "-50,000"), (0.0, "0")],
)
def test_digits_before_the_point_are_never_rounded_away(value, text):
    assert figure(value) == text


def test_a_number_that_is_none_stays_what_it_is():
    assert [figure(x) for x in (float("inf"), float("nan"))] == ["inf", "nan"]
    assert figure(1234.4, 4) == "1,234" and figure(9_999.6, 4) == "10,000"
