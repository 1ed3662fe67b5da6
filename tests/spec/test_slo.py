import pytest

from tuner.spec import slo


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("ttft_p99=500ms", "ttft_p99", 0.5),
        ("tpot_p99 = 50 ms", "tpot_p99", 0.05),
        ("e2e_p95=2s", "e2e_p95", 2.0),
        ("itl_p99.9=1min", "itl_p99.9", 60.0),
        ("error_rate=1%", "error_rate", 0.01),
        ("error_rate=0.02", "error_rate", 0.02),
        ("error_rate=100%", "error_rate", 1.0),  # said outright
        ("ttft_p50=1s", "ttft_p50", 1.0),
    ],
)
def test_an_slo_is_a_metric_and_a_limit_with_its_unit(text, metric, limit):
    assert slo.parse(text) == slo.Slo(metric, pytest.approx(limit))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft_p99", "ttft_p99=500ms"),  # no limit
        ("ttft_p99=500", "500ms or 2s"),  # a latency without a unit could be either
        ("ttft_p99=fast", "500ms or 2s"),
        ("ttft_p99=0ms", "above zero"),
        ("tttf_p99=500ms", "unknown metric"),
        ("error_rate=3ms", "1% or 0.01"),  # a share has no milliseconds
        ("ttft_p9=500ms", "lets 91 % of the requests take longer: write ttft_p99, ttft_p90"),  # p99 or p90 is meant
        ("error_rate=1", "100 % of the requests: write for example 1%"),  # 1% is meant
        ("error_rate=100", "10000 % of the requests"),
        ("error_rate=150%", "150 % of the requests"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_write(text, says):
    with pytest.raises(ValueError, match=says):
        slo.parse(text)


def test_a_miss_is_told_in_milliseconds_and_an_unmeasured_metric_is_a_miss():
    limit = slo.parse("ttft_p99=500ms")
    assert limit.miss({"ttft_p99_s": 0.5}) == ""
    assert limit.miss({"ttft_p99_s": 0.8124}) == "ttft_p99 812.4 ms > 500 ms"
    endless = "ttft_p99 without end (requests failed, went unanswered, or were cut off when over the limit) > 500 ms"
    assert limit.miss({"ttft_p99_s": float("inf")}) == endless
    assert limit.miss({"ttft_p99_s": 0.1 * 5 + 1e-16}) == "" and limit.gap({"ttft_p99_s": 0.5 * (1 + 1e-12)}) <= 0
    assert limit.miss({"ttft_p99_s": 12.3456}) == "ttft_p99 12,346 ms > 500 ms"
    assert limit.miss({}) == "ttft_p99 was not measured"


def test_its_words_read_back_as_the_same_slo():
    for text in ("ttft_p99=500ms", "error_rate=1%", "error_rate=100%", "e2e_p50=1500ms"):
        assert slo.parse(str(slo.parse(text))) == slo.parse(text)
