import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests import studies
from tuner.cli import certify
from tuner.export.formats import best_config
from tuner.pareto.front import points
from tuner.pareto.traffic import per_request, price_words, total_per_output, traffic
from tuner.report.page import build
from tuner.report.summary import summarize
from tuner.report.terminal import front_data, front_table
from tuner.spec import studyfile
from tuner.study.outcome import Step
from tuner.study.store import Store

OBJECTIVE = replace(studies.objective(), price_assumed=True)
FASTER = {"max_num_batched_tokens": 8192}


@pytest.fixture
def made(tmp_path: Path):
    """The default at load 1, and what serves twice as much at half the cost; 5 requests/s at load 1."""
    store = Store(tmp_path / "s")
    more = {"measured_requests": 300.0, "goodput_requests_per_s": 10.0, "goodput_total_tokens_per_s": 12_000.0}
    for number, params in enumerate(({}, FASTER)):
        step = studies.step(1.0 + number, OBJECTIVE, tokens_per_s=1000 * (1 + number))
        step = replace(step, metrics={**step.metrics, **more})
        studies.measured(number, (step,), store, params=params, baseline=not number)
    return store, studies.study(tmp_path / "s", want=OBJECTIVE)


def test_a_point_is_told_in_requests_per_second_tokens_and_money_a_month(made):
    found = summarize(*made).traffic
    assert found and (found.rps, found.trace_rps, found.requests, found.windows) == (10.0, 5.0, 300, 1)
    assert (found.input_tokens, found.output_tokens) == (1000.0, 200.0)
    assert found.month_usd == 1825 and found.default_usd == pytest.approx(3650)
    (point,) = [p for p in points(made[0].trials(), OBJECTIVE) if p.trial == 1]
    assert found.total_usd == pytest.approx(point.cost / 6)  # prompts are five times as long as answers


def test_what_a_replica_takes_is_of_the_launches_of_its_point_and_not_of_its_configurations_others(made):
    store, _ = made
    step = studies.step(3.0, OBJECTIVE, tokens_per_s=2500, window="heldout-0")
    asked = {"offered_requests_per_s": 24.0, "measured_requests": 50.0}
    studies.measured(2, (replace(step, metrics=step.metrics | asked),), store, params=FASTER, role="verify")
    (point,) = [p for p in points(store.trials(), OBJECTIVE) if p.role == "verify"]
    found = traffic(store.trials(), OBJECTIVE, point, None)
    assert found and (found.trace_rps, found.requests, found.loads) == (8.0, 50, (3.0, 3.0))


@pytest.mark.parametrize(("slo", "takes"), [("tpot_p99=50ms", 7.0), ("e2e_p99=60s", 10.0)])
def test_where_no_slo_bounds_a_wait_a_replica_takes_what_was_served_and_not_what_came(tmp_path, slo, takes):
    """10 requests/s came, of which 3 wait: an SLO that holds without end for whoever is served says nothing of them."""
    want = studies.objective(slo)
    step = studies.step(2.0, want, tokens_per_s=2000)
    step = replace(step, metrics={**step.metrics, "requests_per_s": 7.0, "e2e_p99_s": 20.0})
    studies.measured(0, (step,), Store(tmp_path / "s"), baseline=True)
    found = summarize(Store(tmp_path / "s"), studies.study(tmp_path / "s", want=want)).traffic
    assert found and found.rps == takes
    assert ("10 came: no SLO bounds how long the rest waits" in str(found)) == (takes < 10)


def test_tokens_per_request_are_of_the_requests_that_brought_them():
    """Of a short window 20 requests/s had ended and 30 answers' tokens had arrived: that is no length of an answer."""
    step = studies.step(1.0, OBJECTIVE, tokens_per_s=6000)
    own = {"goodput_requests_per_s": 20.0, "goodput_output_tokens_per_s": 4000.0, "requests_per_s": 20.0}
    good = replace(step, metrics={**step.metrics, **own})
    assert per_request([good], "output") == 200
    few = good.metrics | {"goodput_output_tokens_per_s": 400.0}  # of an overload the short answers are within SLO
    assert per_request([good, replace(good, metrics=few, slo_misses=("late",))], "output") == 200
    assert math.isnan(per_request([replace(step, metrics={})], "output"))


def test_tokens_per_request_are_of_all_requests_where_the_steps_tell_them():
    """Half of the requests are within the limit of an e2e SLO on each: the short ones. Weighted by the requests."""
    step = studies.step(1.0, OBJECTIVE, tokens_per_s=6000)
    rates = {"goodput_requests_per_s": 20.0, "goodput_output_tokens_per_s": 1700.0, "measured_requests": 100.0}
    one = replace(step, metrics={**step.metrics, **rates, "mean_output_tokens": 205.0, "mean_prompt_tokens": 1133.0})
    more = {"measured_requests": 300.0, "mean_output_tokens": 209.0}
    several = [one, replace(one, metrics={**one.metrics, **more}), step]
    assert per_request(several, "output") == 208 and per_request(several, "prompt") == 1133
    late = replace(one, slo_misses=("late",), metrics={**one.metrics, "mean_output_tokens": 9.0})
    assert per_request([*several, late], "output") == 208, "a step that was ended early has the short ones"


def test_a_functions_own_means_need_no_count_of_requests():
    metrics = {"mean_output_tokens": 100.0, "mean_prompt_tokens": 700.0}
    steps = [Step(1.0, "w", metrics), Step(2.0, "w", metrics | {"mean_output_tokens": 9.0, "measured_requests": 0.0})]
    assert per_request(steps, "output") == 100 and per_request(steps, "prompt") == 700


def test_every_view_says_it_and_that_the_price_is_an_assumption(made, tmp_path: Path):
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(front_table(*made))
    page = build(*made, tmp_path / "r.html").read_text()
    texts = {"terminal": console.export_text(), "file": best_config(*made)[0].read_text(), "page": page}
    for name, text in texts.items():
        assert re.search("10(</b><span>| )requests/s", text) and "assumed: --gpu-price sets yours" in text, name
        assert "prompts of 1,000 and answers of 200 tokens" in text and "$1,825" in text and "$3,650" in text, name
        assert "$0.0579 per million total tokens" in text, name
    data = front_data(*made)
    assert data["traffic"]["requests_per_s"] == 10.0
    assert data["recommended"]["cost_usd_per_mtok_total"] == pytest.approx(data["traffic"]["total_usd"])


def test_without_an_arrival_rate_nothing_is_said(made):
    store, study = made
    trials = [
        replace(t, outcome=replace(t.outcome, steps=tuple(replace(s, metrics={}) for s in t.outcome.steps)))
        for t in store.trials()
    ]
    choice = summarize(store, study).choice
    assert traffic(trials, study.objective, choice.point, None) is None


def test_a_price_named_for_another_type_of_gpu_is_no_assumption_and_the_tables_is_one():
    objective = replace(OBJECTIVE, prices={"L40S": 1.1})
    assert price_words(objective, 1, 1.1) == "1.1 USD per GPU-hour"
    assert all("assumed" in price_words(objective, 1, price) for price in (None, 2.5, 0.7))
    assert "assumed" in price_words(replace(objective, price_assumed=False), 1, 0.7)


@pytest.mark.parametrize(
    ("more", "assumed"),
    [
        ({}, True),
        ({"price_usd_per_gpu_hour": 3.0}, False),
        ({"price_usd_per_gpu_hour": {"A100-80GB": 1.0}}, True),  # of another GPU
        ({"price_usd_per_gpu_hour": {"H100-SXM": 3.0}}, False),
        (
            {
                "objective": {
                    "name": "o",
                    "latency": "tpot_p99",
                    "slo": {"tpot_p99": "1s"},
                    "price_usd_per_gpu_hour": 3.0,
                }
            },
            False,
        ),
    ],
)
def test_a_price_that_nobody_named_is_known_to_be_an_assumption(tmp_path: Path, more, assumed):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "t.jsonl").write_text('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 2}\n' * 3)
    engine = {"kind": "emulator", "options": {"gpu": "H100-SXM"}}
    text = {"model": "./model", "engine": engine, "trace": "t.jsonl", **more}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
    study = studyfile.load(tmp_path / "s.yaml")
    assert study.objective.price_assumed is assumed
    (begun := tmp_path / "begun").mkdir()
    (begun / "study.yaml").write_text(yaml.safe_dump(dict(study.frozen)))
    assert studyfile.load(begun).objective.price_assumed is assumed


@pytest.mark.parametrize("filled", [0, 120])
def test_whether_the_prefix_cache_held_what_came_before_is_said_of_what_was_measured(tmp_path, monkeypatch, filled):
    more = {"measured_requests": 300.0, "fill_requests": float(filled)}
    step = studies.step(1.0, OBJECTIVE)
    store = Store(tmp_path / "s")
    studies.measured(0, (replace(step, metrics={**step.metrics, **more}),), store, baseline=True)
    study = studies.study(tmp_path / "s", want=OBJECTIVE)
    found = summarize(store, study).traffic
    assert found and found.measured.endswith("what came before in the prefix cache") == bool(filled)
    monkeypatch.setattr(certify, "opened", lambda _path: (study, store))
    assert ("holds" in certify._side(tmp_path / "s").facts["prefix cache"]) == bool(filled)


def test_what_total_tokens_cost_is_of_the_load_that_is_promised_where_the_slos_held_there():
    """More of the tokens are prompts where long answers are late."""
    step = studies.step(1.0, OBJECTIVE)
    cost = step.metrics["cost_usd_per_mtok_output"]
    higher = replace(step, load=2.0, metrics=step.metrics | {"cost_usd_per_mtok_total": cost / 8})
    assert total_per_output([step, higher], 1.0) == pytest.approx(1 / 6)
    assert total_per_output([replace(step, slo_misses=("late",)), higher], 1.0) == pytest.approx(1 / 8)
    assert math.isnan(total_per_output([replace(step, metrics={"cost_usd_per_mtok_output": cost})], 1.0))
