"""Windows never overlap, cutting starts at 0, warping keeps order and burst shape."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tuner.errors import UsageError
from tuner.load.trace import Trace
from tuner.load.windows import cut, cut_time, split, warp

arrivals = st.lists(st.floats(0, 1e5), min_size=2, max_size=60).map(sorted)
loads = st.floats(1e-3, 1e3)


def trace_of(arrival_s: list[float]) -> Trace:
    """Request i has i + 1 output tokens, so that a request can be told in any cut; it has i % 3 prefix blocks."""
    n = len(arrival_s)
    counts = np.arange(n) % 3
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = np.arange(offsets[-1]) * 7
    start = arrival_s[0] if arrival_s else 0.0
    return Trace("t", np.array(arrival_s) - start, np.full(n, 40), np.arange(1, n + 1), 16, ids, offsets)


def members(trace: Trace) -> list[int]:
    return trace.output_tokens.tolist()


@given(arrivals, loads)
def test_warping_keeps_the_order_and_divides_every_gap_by_the_load(times, load):
    before = np.array(times)
    after = warp(before, load)
    assert (np.diff(after) >= 0).all()
    assert np.diff(after) == pytest.approx(np.diff(before) / load, rel=1e-9, abs=1e-9 * (1 + before[-1] / load))


@given(arrivals, loads)
def test_warping_keeps_the_coefficient_of_variation(times, load):
    gaps, warped = np.diff(times), np.diff(warp(np.array(times), load))
    assume(gaps.mean() > 1e-3)
    assert warped.std() / warped.mean() == pytest.approx(gaps.std() / gaps.mean(), rel=1e-6, abs=1e-6)


def test_a_load_of_two_halves_the_time_and_leaves_the_argument_alone():
    before = np.array([0.0, 1.0, 1.0, 4.0])
    assert warp(before, 2.0).tolist() == [0.0, 0.5, 0.5, 2.0]
    assert before.tolist() == [0.0, 1.0, 1.0, 4.0]


@pytest.mark.parametrize("load", [0.0, -1.0, float("nan"), float("inf")])
def test_a_load_that_is_no_positive_number_is_refused(load):
    with pytest.raises(UsageError, match="load"):
        warp(np.zeros(2), load)


def test_a_cut_starts_at_zero_and_keeps_each_requests_own_blocks():
    trace = trace_of([0.0, 1.0, 3.0, 3.5, 8.0])
    part = cut(trace, 2, 5)
    assert part.arrival_s.tolist() == [0.0, 0.5, 5.0]
    assert members(part) == [3, 4, 5]
    # requests 0 and 1 have no and one block (id 0); 2 has ids 7, 14; 3 none; 4 has 21
    assert part.block_ids.tolist() == [7, 14, 21] and part.block_offsets.tolist() == [0, 2, 2, 3]
    assert part.block_tokens == 16


def test_a_cut_keeps_the_texts_of_its_requests():
    whole = Trace(
        "t", np.arange(3.0), np.ones(3, int), np.ones(3, int), 0, np.empty(0, int), np.zeros(4, int), ("a", "b", "c")
    )
    assert cut(whole, 1, 3).texts == ("b", "c")


def test_a_cut_by_time_includes_its_start_and_not_its_end():
    assert members(cut_time(trace_of([0.0, 1.0, 2.0, 3.0]), 1.0, 3.0)) == [2, 3]


def test_a_cut_lasts_until_the_next_request_or_until_where_it_was_cut():
    four = trace_of([0.0, 1.0, 2.0, 4.0])
    assert cut(four, 1, 3).until_s == 3.0
    assert cut_time(four, 0.5, 3.5).until_s == 2.5
    assert cut_time(cut(four, 0, 3), 0.0, 9.0).until_s == 4.0
    assert [part.until_s for part in split(four, max_seconds=1.5).search] == [1.5]
    assert four.until_s == cut(four, 0, 4).until_s == pytest.approx(4.0 + 4 / 3), "one mean gap, where none is known"
    assert cut(four, 3, 4).until_s == 0.0 and trace_of([0.0, 0.0]).until_s == 0.0


def test_a_cut_without_requests_is_refused_with_what_there_is():
    trace = trace_of([0.0, 1.0, 9.0])
    with pytest.raises(UsageError, match="run from 0 to 9 s"):
        cut_time(trace, 2.0, 8.0)
    with pytest.raises(UsageError, match="it has 3"):
        cut(trace, 3, 5)
    for start_s, end_s in ((2.0, 1.0), (float("nan"), 1.0), (0.0, float("nan"))):
        with pytest.raises(UsageError, match="not a window"):
            cut_time(trace, start_s, end_s)


@given(
    times=arrivals,
    search=st.integers(1, 4),
    held_out=st.integers(1, 4),
    by=st.sampled_from(["count", "time"]),
    max_requests=st.none() | st.integers(1, 20),
    max_seconds=st.none() | st.floats(1e-3, 1e5),
)
def test_windows_of_a_split_never_overlap_and_both_kinds_exist(times, search, held_out, by, max_requests, max_seconds):
    trace = trace_of(times)
    try:
        parts = split(
            trace, search=search, held_out=held_out, by=by, max_requests=max_requests, max_seconds=max_seconds
        )
    except UsageError:
        assume(False)
        return
    assert (len(parts.search), len(parts.held_out)) == (search, held_out)
    everyone = [number for window in (*parts.search, *parts.held_out) for number in members(window)]
    assert len(everyone) == len(set(everyone))
    for window in (*parts.search, *parts.held_out):
        numbers = members(window)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))  # contiguous
        assert window.arrival_s[0] == 0
        assert len(window) <= (max_requests or len(trace))
        assert max_seconds is None or window.arrival_s[-1] <= max_seconds * (1 + 1e-9)
    ends = [(window.first, window.stop) for window in parts.windows]
    assert ends == sorted(ends) and all(a[1] <= b[0] for a, b in pairwise(ends))
    assert all(trace.arrival_s[w.first] == w.start_s and trace.arrival_s[w.stop - 1] == w.end_s for w in parts.windows)


@given(times=arrivals, search=st.integers(1, 4), held_out=st.integers(1, 4))
def test_a_split_by_count_works_whenever_there_is_a_request_per_window_and_uses_every_request(times, search, held_out):
    trace = trace_of(times)
    if len(trace) < search + held_out:
        with pytest.raises(UsageError, match="fewer"):
            split(trace, search=search, held_out=held_out)
        return
    parts = split(trace, search=search, held_out=held_out)
    sizes = [len(window) for window in (*parts.search, *parts.held_out)]
    assert sum(sizes) == len(trace) and max(sizes) - min(sizes) <= 1


def test_kinds_are_spread_over_the_trace_and_search_comes_first():
    trace = trace_of([float(i) for i in range(12)])
    kinds = [window.kind for window in split(trace, search=2, held_out=2, by="time").windows]
    assert kinds == ["search", "held-out", "search", "held-out"]
    kinds = [window.kind for window in split(trace, search=3, held_out=1).windows]
    assert kinds == ["search", "search", "search", "held-out"]


def test_a_window_ends_before_its_seconds_are_over():
    windows = split(trace_of([float(i) for i in range(8)]), max_seconds=2.0).windows
    assert [(window.first, window.stop) for window in windows] == [(0, 2), (4, 6)]


@pytest.mark.parametrize(("search", "held_out"), [(0, 1), (1, 0), (-1, 2)])
def test_a_split_without_windows_of_each_kind_is_refused(search, held_out):
    with pytest.raises(UsageError, match="at least 1 of each"):
        split(trace_of([0.0, 1.0, 2.0]), search=search, held_out=held_out)


def test_a_silent_part_of_a_trace_split_by_time_is_refused_with_the_way_out():
    with pytest.raises(UsageError, match="split by count"):
        split(trace_of([0.0, 1.0, 99.0, 100.0]), search=2, held_out=2, by="time")


@given(arrivals, st.integers(1, 3), st.integers(1, 3), st.floats(0, 1))
def test_what_came_before_a_window_is_kept_with_it_and_no_window_lacks_any(times, search, held_out, share):
    trace = trace_of(times)
    assume(len(trace) >= search + held_out)
    earlier_s = share * float(trace.arrival_s[-search - held_out])  # so many are left that a window each is possible
    assume(earlier_s >= 1e-3)
    left = np.count_nonzero(trace.arrival_s >= earlier_s)
    found = split(trace, search=search, held_out=held_out, earlier_s=earlier_s, max_requests=3)
    of_kind = {"search": iter(found.search), "held-out": iter(found.held_out)}
    for window in found.windows:
        assert window.start_s >= earlier_s
        since = np.searchsorted(trace.arrival_s, window.start_s - earlier_s)
        part = next(of_kind[window.kind])
        assert members(part) == list(range(window.first + 1, window.stop + 1))
        before = members(part.earlier) if part.earlier else []
        assert before == list(range(since + 1, window.first + 1))
        assert part.earlier is None or part.earlier.block_ids.tolist() == [
            i for k in range(since, window.first) for i in trace.block_ids[slice(*trace.block_offsets[k : k + 2])]
        ]
    assert sum(window.stop - window.first for window in found.windows) <= left


def test_only_what_begins_where_a_window_began_has_what_came_before_it():
    [window], *_ = split(trace_of([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), earlier_s=2.0).search, None
    assert members(window) == [3, 4] and members(window.earlier) == [1, 2]
    assert members(cut_time(window, 0.0, 0.5).earlier) == [1, 2]
    assert cut(window, 1, 2).earlier is None


def test_a_trace_that_is_over_before_there_is_enough_to_come_before_a_window_is_refused():
    with pytest.raises(UsageError, match="has no 2 windows after its first 5 s"):
        split(trace_of([0.0, 1.0, 5.0]), earlier_s=5.0)


def test_parts_of_equal_time_begin_after_what_comes_before_them():
    found = split(trace_of([float(second) for second in range(11)]), by="time", earlier_s=4.0)
    assert [(window.first, window.stop) for window in found.windows] == [(4, 7), (7, 11)]


def test_where_a_traces_end_is_not_known_that_of_a_cut_up_to_it_is_not_either():
    trace = trace_of([0.0, 1.0, 2.0, 3.0])
    assert np.isnan(cut_time(trace, 1.0, np.inf).lasts_s) and np.isnan(cut_time(trace, 1.0, 4.0).lasts_s)
    assert cut_time(trace, 1.0, 3.5).lasts_s == 2.5
    assert cut_time(trace, 1.0, np.inf).until_s == 3.0
