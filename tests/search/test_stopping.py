"""A search ends when what is still to be gained no longer pays for a launch, and says so with the figure."""

from __future__ import annotations

import pytest

from tuner.search.ledger import Seen
from tuner.search.stopping import Stopping
from tuner.study.outcome import Measured


def trials(*gains: float | None, free: bool = False) -> list[Seen]:
    return [Seen(i, {}, Measured(()), expected_gain=gain, free=free) for i, gain in enumerate(gains)]


def test_three_promises_in_a_row_below_the_threshold_end_the_search():
    words = Stopping().reason(trials(*[0.2] * 9, 0.002, 0.001, 0.0005), launch_usd=1.25)
    assert "0.05%" in words and "0.20%, 0.10%, 0.05%" in words and "$1.25" in words and "0.30%" in words

    assert "$" not in Stopping().reason(trials(*[0.2] * 9, 0.002, 0.001, 0.0005), launch_usd=0.0049)


@pytest.mark.parametrize(
    "seen",
    [
        trials(*[0.2] * 9, 0.002, 0.004, 0.001),  # one of the last three still promised enough
        trials(*[0.2] * 10, 0.002, 0.001),  # only two
        trials(0.001, 0.001, 0.001),  # too few launches for the promise to be believed
        trials(*[None] * 30),  # a sampler that does not say what it expects
        [*trials(*[0.2] * 12), *trials(0.0, 0.0, 0.0, free=True)],  # refusals are no launches
        [*trials(0.001, 0.001, 0.001), *trials(*[None] * 9, free=True)],  # nor do they make few launches more
    ],
)
def test_otherwise_it_goes_on(seen):
    assert Stopping().reason(seen) == ""


def test_a_running_trial_does_not_count():
    seen = trials(*[0.2] * 10, 0.001, 0.001)
    assert Stopping().reason([*seen, Seen(99, {}, None, expected_gain=0.001)]) == ""


def test_the_threshold_is_the_users():
    seen = trials(*[0.2] * 10, 0.02, 0.02, 0.02)
    assert Stopping(min_gain=0.05).reason(seen) and not Stopping(min_gain=0.01).reason(seen)
    with pytest.raises(ValueError, match="patience"):
        Stopping(patience=0)


def test_with_0_no_promise_is_too_little():
    assert Stopping(min_gain=0.0).reason(trials(*[0.0] * 30)) == ""
