"""How long the client leaves its sockets alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.load.hold import FIRST_NS, LONGEST_NS, Hold

MS = 1_000_000


def after(gap_ns: int, reads: int = 1_000, joined: int = 0, hold: Hold | None = None) -> Hold:
    """A hold that saw reads ``gap_ns`` apart, ``joined`` of the events in a read with a later one."""
    hold = hold or Hold(FIRST_NS)
    hold.saw(reads, joined, range(0, gap_ns * reads, gap_ns))
    hold.review()
    return hold


@pytest.mark.parametrize(("gap_ms", "held_ms"), [(100, 8), (20, 8), (10, 5), (3, 1.5), (1, 0.5)])
def test_it_is_half_of_the_gap_between_events(gap_ms, held_ms):
    assert after(gap_ms * MS).ns == held_ms * MS


def test_few_short_gaps_do_not_shorten_it_and_one_in_fifty_does():
    for short, held_ms in ((5, 8), (20, 1)):
        hold = Hold(FIRST_NS)
        hold.saw(1_001, 0, [20 * MS * k - (k % 50 == 0 and 18 * MS * (k <= 50 * short)) for k in range(1_001)])
        hold.review()
        assert hold.ns == held_ms * MS


def test_it_waits_until_it_knows_the_gaps():
    assert after(20 * MS, reads=100).ns == FIRST_NS


def test_what_is_read_together_halves_it_for_good():
    hold = after(20 * MS)
    after(20 * MS, joined=20, hold=hold)
    assert hold.ns == LONGEST_NS // 2
    assert after(20 * MS, hold=hold).ns == LONGEST_NS // 2
    for _ in range(10):
        after(20 * MS, joined=20, hold=hold)
    assert hold.ns == 0
    assert after(20 * MS, hold=hold).ns == 0


@pytest.mark.parametrize(
    ("reads", "joined", "halved"),
    [
        (1_000, 10, False),  # 1 %
        (1_000, 11, True),
        (100, 4, False),  # too few to say
        (100, 5, True),
        (30, 15, True),  # a slow server whose tokens come in pairs
    ],
)
def test_one_in_a_hundred_read_together_is_too_many_and_so_are_five_of_few(reads, joined, halved):
    hold = Hold(FIRST_NS)
    hold.saw(reads, joined, [])
    hold.review()
    assert (hold.ns == FIRST_NS // 2) == halved


def test_it_is_counted_over_seconds_until_there_are_enough():
    hold = Hold(FIRST_NS)
    for _ in range(4):
        hold.saw(50, 1, [])
        hold.review()
    assert hold.ns == FIRST_NS
    hold.saw(50, 1, [])
    hold.review()
    assert hold.ns == FIRST_NS // 2


@given(st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 100), st.integers(1, 10**9)), max_size=20))
def test_it_is_never_longer_than_the_longest_and_off_stays_off(seen):
    hold, off = Hold(FIRST_NS), Hold(FIRST_NS)
    off.off()
    for reads, joined, gap_ns in seen:
        after(gap_ns, reads, joined, hold)
        assert 0 <= hold.ns <= LONGEST_NS
        assert after(gap_ns, reads, joined, off).ns == 0


def test_it_is_settled_once_it_knows_the_gaps_or_never_holds():
    assert not Hold(FIRST_NS).settled and not after(20 * MS, reads=100).settled
    assert after(20 * MS).settled and Hold(0).settled
