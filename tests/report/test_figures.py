"""What the figures are computed from."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import studies
from tuner.report.charts import error_chart, front_chart, importance_chart
from tuner.report.hours import hours
from tuner.report.importance import Importance, Row, Share, importance, shares
from tuner.report.modelerror import Error, errors, learnt
from tuner.report.page import build
from tuner.report.parallel import parallel_chart
from tuner.report.style import bars, frame, log_ticks, number
from tuner.report.summary import summarize
from tuner.report.tables import folded
from tuner.search.model.constants import HOST, SHARED, WORDS
from tuner.study.outcome import Boot, Infeasible, Measured
from tuner.study.store import Store

OBJECTIVE = studies.objective()


def spread_over(store: Store, cost_of, configs: int = 24) -> None:
    """One measured trial per configuration; ``cost_of(params)`` gives its tokens per second."""
    values = studies.space()
    for index in range(configs):
        params = {
            "max_num_batched_tokens": values["max_num_batched_tokens"].values[index % 5],
            "max_num_seqs": values["max_num_seqs"].values[index // 5 % 4],
            "kv_cache_dtype": ("auto", "fp8")[index * 7 // 3 % 2],
        }
        studies.measured(index, (studies.step(1.0, OBJECTIVE, tokens_per_s=cost_of(params)),), store, params=params)


def test_the_parameter_that_decides_the_cost_is_found_and_the_others_are_chance(tmp_path: Path):
    store = Store(tmp_path)
    spread_over(store, lambda p: 500 + p["max_num_batched_tokens"], configs=20)
    found = importance(summarize(store, studies.study(tmp_path)))
    first, *others = found.rows
    assert first.parameter == "max_num_batched_tokens" and first.cost.share > 0.99 and first.cost.p == 0.001
    assert all(row.cost.share < 0.1 and row.cost.p > 0.2 for row in others)
    assert all(row.latency.share == 0 for row in found.rows)  # the latency was the same everywhere


def test_an_effect_that_is_not_monotone_counts_too(tmp_path: Path):
    store = Store(tmp_path)
    spread_over(store, lambda p: 2000 if p["max_num_batched_tokens"] == 2048 else 1000, configs=20)
    assert importance(summarize(store, studies.study(tmp_path))).rows[0].parameter == "max_num_batched_tokens"


def test_chance_earns_no_share_however_many_values_a_parameter_has():
    # without the correction five values would be given (5 - 1) / (20 - 1) = 21 % of pure noise
    rng = random.Random(5)
    found = [shares([[i % 5 for i in range(20)]], [rng.random() for _ in range(20)])[0] for _ in range(100)]
    assert sum(share.share for share in found) / 100 < 0.1
    assert 1 <= sum(share.p < 0.05 for share in found) <= 12


def test_a_parameter_that_is_varied_with_the_one_that_decides_earns_nothing_by_it():
    # as a sampler does that learns: where it is good it stays, and other parameters stay with it
    rng = random.Random(7)
    decides = [rng.choice((0, 1, 2)) for _ in range(24)]
    follows = [d if rng.random() < 0.7 else rng.choice((0, 1, 2)) for d in decides]
    alone = [rng.choice((0, 1, 2)) for _ in range(24)]
    target = [100 * 1.5**d * rng.uniform(0.97, 1.03) for d in decides]
    first, second, third = shares([decides, follows, alone], target)
    assert shares([follows], target)[0].p < 0.01
    assert first.share > 0.9 and first.p < 0.01
    assert second.share < 0.02 and second.p > 0.05 and third.p > 0.05


def test_a_conditional_parameter_is_judged_where_it_applies():
    mode = ["x"] * 9 + ["y"] * 7
    depth = ["lo", "mid", "hi"] * 3 + [None] * 7
    size = [1, 2, 3, 4] * 4
    target = [{"x": 1.0, "y": 1.2}[m] * (1 + 0.01 * n) for m, n in zip(mode, size, strict=True)]
    of_mode, of_depth, of_size = shares([mode, depth, size], target)
    assert of_mode.share > 0.9 and of_mode.p < 0.01 and of_size.p < 0.01
    assert of_depth.share == 0 and of_depth.p > 0.05
    deep = [{"lo": 1.0, "mid": 1.1, "hi": 1.3, None: 1.0}[d] * t for d, t in zip(depth, target, strict=True)]
    assert shares([mode, depth, size], deep)[1].p < 0.01


def test_once_chance_does_as_well_the_rest_is_judged_beside_what_was_found_alone():
    rng = random.Random(7)
    decides, noise = ([rng.choice((0, 1, 2)) for _ in range(24)] for _ in range(2))
    target = [100 * 1.5**d * rng.uniform(0.97, 1.03) for d in decides]
    first, second, same = shares([decides, noise, noise], target)
    assert first.p < 0.01 and 0.05 < second.p < 1
    assert same == second  # beside the one the other would explain nothing


def test_what_says_the_same_as_a_stronger_parameter_earns_nothing():
    decides = [0, 1, 2] * 8
    target = [100 * 1.5**d * (1 + 0.01 * (i % 5)) for i, d in enumerate(decides)]
    first, second = shares([decides, [str(d) for d in decides]], target)
    assert first.share > 0.9 and second == Share(0.0, 1.0)


def test_that_a_conditional_parameter_applies_is_not_its_own_doing():
    depth = ["lo", "mid", "hi"] * 4 + [None] * 12
    target = [(1.0 if d is None else 2.0) * (1 + 0.01 * (i % 5)) for i, d in enumerate(depth)]
    (found,) = shares([depth], target)
    assert found.share < 0.05 and found.p > 0.05


def test_with_too_few_configurations_nothing_is_said(tmp_path: Path):
    store = Store(tmp_path)
    spread_over(store, lambda p: p["max_num_seqs"], configs=7)
    found = importance(summarize(store, studies.study(tmp_path)))
    assert found.rows == () and "7; it takes 8" in found.note


def test_the_hours_are_launch_times_gpus_and_add_up(tmp_path: Path):
    store = Store(tmp_path)
    boot = Boot(20.0, {"imports": 15.0, "weights": 5.0})
    step = studies.step(1.0, OBJECTIVE)
    studies.add(0, Measured((step,), boot), store)  # 60 s on one GPU
    studies.add(1, Measured((step,), boot), store, params={"tensor_parallel_size": 2})  # 60 s on two
    studies.add(2, Infeasible("oom", "no"), store, params={"max_num_seqs": 64})
    studies.add(3, Measured((step,), boot), store, role="verify", price_usd_per_gpu_hour=0.7)
    ladder = Store(store.ladder_folder)
    studies.add(0, Measured((step,), boot), ladder)
    found = hours(summarize(store, studies.study(tmp_path)), ladder.trials())
    assert found.total == pytest.approx(360 / 3600) and found.usd == pytest.approx((300 * 2.5 + 60 * 0.7) / 3600)
    seconds = {name: value * 3600 for name, value in found.uses}
    uses = {"starting servers": 100, "settling the ladder": 40, "measuring": 120, "verifying": 40}
    assert seconds == pytest.approx(uses | {"failed launches": 60})
    assert dict(found.phases)["imports"] == pytest.approx(75 / 3600)


def test_the_models_error_is_taken_over_the_steps_within_slo_at_the_same_load(tmp_path: Path):
    store = Store(tmp_path)
    good, missed = studies.step(1.0, OBJECTIVE, tpot_s=0.02), studies.step(2.0, OBJECTIVE, tpot_s=0.08)
    predicted = {"1": {"tpot_p99_s": 0.01}, "2": {"tpot_p99_s": 0.5}, "x": {}, "3": None}
    studies.measured(0, (good, missed), store, predicted=predicted)
    (error,) = errors(summarize(store, studies.study(tmp_path)))
    assert error.name == "TPOT p99" and error.pairs == ((0.01, 0.02, 0, 1.0),)
    assert error.bias == pytest.approx(2.0) and error.typical == pytest.approx(1.0)


def test_where_nothing_was_predicted_there_is_no_error_to_show(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), store)
    assert errors(summarize(store, studies.study(tmp_path))) == ()


def test_the_newest_trial_says_what_was_learnt_of_the_model(tmp_path: Path):
    store = Store(tmp_path)
    steps = (studies.step(1.0, OBJECTIVE, tpot_s=0.02),)
    old = {"factors": {"step_s": 3.0}, "believed": 0.1, "weight": {}}
    new = {
        "factors": {"flops_share": 1.25, "bandwidth_share": 0.5, "step_s": 1.01, "made_up": 1.1, "link_share": "x"},
        "believed": 0.98,
        "weight": {"cost": 0.9, "latency": 0.7, "capacity": None},
    }
    predicted = {"1": {"tpot_p99_s": 0.01}}
    for trial, said in enumerate((old, new, None)):
        more = {"learnt": said} if said else {}
        studies.measured(trial, steps, store, params={"max_num_seqs": 2**trial}, predicted=predicted, **more)
    found = learnt(summarize(store, studies.study(tmp_path)))
    assert found is not None and (found.by, found.believed) == (1, 0.98)
    assert found.weight == (("latency", 0.7), ("cost", 0.9))
    assert [f for _, f in found.factors] == [0.5, 1.25, 1.1]
    assert found.factors[0][0] == "memory bandwidth that is reached" and found.factors[2][0] == "made_up"
    assert sorted(WORDS) == sorted((*SHARED, *HOST)), "and every constant has its words"
    text = build(store, studies.study(tmp_path), tmp_path / "report.html").read_text()
    assert "memory bandwidth that is reached &times; 0.50, " in text and "wrong is 98 % probable: the search" in text
    assert "latency 0.70, cost 0.90 (1: as predicted" in text
    studies.measured(3, steps, store, params={"max_num_seqs": 8}, learnt=new | {"believed": 0.002})
    text = build(store, studies.study(tmp_path), tmp_path / "report.html").read_text()
    assert "wrong is less than 1 % probable (they are far from" in text


def test_where_nothing_was_learnt_of_the_model_nothing_is_said(tmp_path: Path):
    store = Store(tmp_path)
    studies.measured(0, (studies.step(1.0, OBJECTIVE),), store)
    assert learnt(summarize(store, studies.study(tmp_path))) is None
    assert "Constants of the model" not in build(store, studies.study(tmp_path), tmp_path / "report.html").read_text()


def test_parallel_coordinates_show_only_what_varied_and_end_at_the_cost(tmp_path: Path):
    store = Store(tmp_path)
    steps = (studies.step(1.0, OBJECTIVE),)
    studies.measured(0, steps, store, baseline=True)
    studies.measured(1, (replace(steps[0], slo_misses=("x",)),), store, params={"max_num_seqs": 64})
    chart = parallel_chart(summarize(store, studies.study(tmp_path)))
    assert chart
    names = [note["text"] for note in chart["layout"]["annotations"]]
    assert "max num seqs" in names and "kv<br>cache<br>dtype" not in names
    assert sorted(trace["y"][-1] is None for trace in chart["data"]) == [False, True]


def test_where_nothing_met_the_slos_the_rings_are_named_and_no_single_axis_is_drawn(tmp_path: Path):
    store = Store(tmp_path)
    late = replace(studies.step(1.0, OBJECTIVE), slo_misses=("x",))
    studies.measured(0, (late,), store, baseline=True)
    studies.measured(1, (late,), store, params={"max_num_seqs": 64})
    found = summarize(store, studies.study(tmp_path))
    chart = front_chart(found)
    assert chart and chart["layout"]["showlegend"] and [trace["name"] for trace in chart["data"]] == ["missed an SLO"]
    assert parallel_chart(found) is None


def test_a_parameter_that_does_not_apply_has_no_value_in_parallel_coordinates(tmp_path: Path):
    store = Store(tmp_path)
    steps = (studies.step(1.0, OBJECTIVE),)
    for index, params in enumerate(({}, {"speculation": "ngram", "draft_tokens": 2}, {"max_num_seqs": 64})):
        studies.measured(index, steps, store, params=params)
    chart = parallel_chart(summarize(store, studies.study(tmp_path)))
    assert chart
    notes = {(note["x"], note["text"]) for note in chart["layout"]["annotations"]}
    axis = next(x for x, text in notes if text == "draft tokens")
    assert [x for x, text in notes if text == "does not apply"] == [axis]
    assert sorted(line["y"][axis] >= -0.02 for line in chart["data"]) == [False, False, True]


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1e3))
def test_a_logarithmic_axis_has_a_few_round_ticks_inside_its_range(low, factor):
    ticks = log_ticks([low, low * factor])
    assert 2 <= len(ticks) <= 12 or factor < 1.1
    assert all(low / 1.06 <= tick <= low * factor * 1.06 for tick in ticks)
    assert ticks == sorted(set(ticks)) and all("e+" not in number(tick) for tick in ticks)


def test_the_axis_of_one_point_is_as_wide_as_its_ticks():
    for values in ([5.0], [5.0, 5.2]):
        axis = frame("x", "y", log_x=values)["xaxis"]
        low, high = (10**at for at in axis["range"])
        assert low < 5 < 5.2 < high and high / low < 2
        ticks = axis["tickvals"]
        assert len(ticks) >= 2 and max(ticks) - min(ticks) > (high - low) / 2
    assert "range" not in frame("x", "y", log_x=[1.0, 10.0])["xaxis"]


def test_small_numbers_are_written_out():
    assert [number(value) for value in (1e-6, 2.5e-5, 0.05, 3000.0)] == ["0.000001", "0.000025", "0.05", "3,000"]


def test_names_are_shown_as_they_are_and_far_errors_do_not_squeeze_the_rest():
    share = Share(1.0, 0.01)
    chart = importance_chart(Importance((Row("<b>bold</b> & x", share, share),), 9, ""))
    assert chart and chart["data"][0]["y"] == ["&lt;b&gt;bold&lt;/b&gt; &amp; x"]
    errors = error_chart([Error("cost", "cost", 0.1, 1.0, ((1.0, 1e-9, 0, 1.0), (1.0, 1.1, 1, 1.0)))])
    assert errors and errors["data"][0]["x"] == [0.01, 1.1] and "measured 1e-09" in errors["data"][0]["hovertext"][0]


def test_error_bars_are_left_out_where_no_interval_is_known():
    found = bars([1.0, 2.0, 3.0], [(0.9, 1.2), None, (-math.inf, math.inf)])
    assert found["array"] == pytest.approx([0.2, 0, 0]) and found["arrayminus"] == pytest.approx([0.1, 0, 0])


def test_any_rows_become_a_table_with_ranges_folded_in():
    rows = [{"config": "a", "x": 1.0, "x_low": 0.5, "x_high": 2.0, "y": None}, {"config": "b", "x": None, "ok": True}]
    names, cells = folded(rows)
    assert names == ["config", "x", "ok"]
    assert cells == [["a", "1 (0.5 to 2)", "–"], ["b", "–", "yes"]]
    assert folded([{"x": 0.2, "x_low": 4e-5, "x_high": 592.0}])[1] == [["0.2 (could not be bounded)"]]
