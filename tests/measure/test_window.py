"""Which part of a replay is measured."""

import numpy as np
import pytest

from tests.measure.made import ns, records, request
from tuner.measure.metrics import is_measured
from tuner.measure.window import window


def test_the_ramp_lasts_until_the_servers_usual_number_is_in_flight(tmp_path):
    """One request a second, each taking 5 s: five are in flight from the fifth second on."""
    rows = [request(t, [t + 1, t + 5]) for t in range(60)]
    span = window(records(tmp_path, rows))
    assert span.start_ns == pytest.approx(ns(4), abs=ns(1.01))
    assert span.end_ns == ns(59)  # the tail, in which nothing arrives any more, is cut


def test_the_ramp_is_at_most_a_quarter(tmp_path):
    """A queue that only grows reaches its median in the middle: that is no ramp but an overload."""
    rows = [request(t / 10, [40 + t, 41 + t]) for t in range(400)]
    assert window(records(tmp_path, rows)).start_ns == pytest.approx(0.25 * ns(39.9), rel=0.01)
    warm = window(records(tmp_path, rows, warmup_s=8.0)).start_ns
    assert warm == pytest.approx(ns(8 + 0.25 * 31.9), rel=0.01), "of what follows the warm-up"


def test_the_warm_up_is_outside(tmp_path):
    rows = [request(t / 2, [t / 2 + 0.1], warmup=t / 2 < 10) for t in range(100)]
    span = window(records(tmp_path, rows, warmup_s=10.0))
    assert ns(10) <= span.start_ns <= ns(11)


def test_an_idle_server_has_no_ramp(tmp_path):
    rows = [request(t, [t + 0.01, t + 0.02]) for t in range(50)]
    assert window(records(tmp_path, rows)).start_ns == 0


def test_the_first_request_is_no_ramp_for_having_been_sent_a_little_late(tmp_path):
    rows = [request(t, [t + 0.01, t + 0.02], sent_s=t + 1e-4) for t in range(50)]
    made = records(tmp_path, rows)
    assert is_measured(made, window(made)).all()


def test_a_burst_is_measured_until_its_last_response(tmp_path):
    rows = [request(0.0, [1 + t, 2 + t]) for t in range(10)]
    span = window(records(tmp_path, rows))
    assert (span.start_ns, span.end_ns) == (0, ns(11))
    one_failed = [*rows[:9], request(0.1, error="boom"), rows[9]]
    assert window(records(tmp_path, one_failed)).end_ns == ns(11)


def test_a_long_run_past_the_window_is_still_measured(tmp_path):
    rows = [request(t, [t + 0.1]) for t in range(60)] + [request(59.5, [200.0])]
    made = records(tmp_path, rows)
    assert is_measured(made, window(made))[-1]


def test_no_records_no_window(tmp_path):
    assert window(records(tmp_path, [])).duration_s == 0


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    rows = [request(t / 5, [t / 5 + 1, t / 5 + 2 + rng.exponential()]) for t in range(100)]
    forward = window(records(tmp_path, rows))
    assert window(records(tmp_path, [rows[k] for k in rng.permutation(100)])) == forward
