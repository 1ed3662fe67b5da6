"""The published figures of the search come from these tables: small runs by hand, sums done by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.search import effects, table
from benchmarks.search.blind import Blind, sheet
from benchmarks.search.crashes import beliefs, by_causes
from benchmarks.search.luck import left
from benchmarks.search.run import load_surface
from benchmarks.search.surface import crashes
from tests.search.problem import knob
from tuner.search.candidates import Candidates
from tuner.search.ledger import COST_KEY
from tuner.space.space import SearchSpace
from tuner.study.outcome import Infeasible


def run(model: str = "none", surface: str = "dense", seed: int = 0, **more):
    row = {
        "surface": surface, "method": "ours", "ladder": True, "model": model, "seed": seed, "regret": [0.5, 0.2, 0.1],
        "gpu_s": [3600, 7200, 10800], "crash": [0, 1, 0], "seconds": [0.1] * 3,
    }  # fmt: skip
    return {**row, **more}


def test_a_goal_is_bold_where_the_median_meets_it_and_a_shorter_run_does_not_count():
    rows = [run(seed=k, regret=[0.5] * 9 + [r], crash=[0] * 10) for k, r in enumerate((0.1, 0.14, 0.3))]
    rows += [run(seed=9)]  # three launches
    lines = table.goals(rows)
    assert lines[0] == "| | goal | all | dense |"
    assert "| no model, 10 launches | .150 | **.140** | **.140** |" in lines
    assert "| no model, 30 launches | .060 |  |  |" in lines


def test_a_cell_is_the_median_and_quartiles_and_empty_where_most_runs_were_shorter():
    rows = [run(seed=k, regret=[r] * 5) for k, r in enumerate((0.1, 0.2, 0.3))]
    line = table.table({"ours, no model": rows}, hours=False)[-1]
    assert line == "| ours, no model | .200 (.150-.250) |  |  |  |  | 33% | > 5 | 3 |"
    hours = table.table({"ours, no model": [run(regret=[0.5, 0.2, 0.1])]}, hours=True)[-1]
    assert hours == "| ours, no model | .200 (.200-.200) |  |  |  | 3.0 | 1 |"


def test_launches_that_were_believed_alike_are_counted_together():
    lines = table.serves([run(serves=[None, 0.5, 0.95]), run(seed=1, serves=[0.55, 0.96, None], crash=[1, 0, 0])])
    assert lines[2:] == ["| 40% to 60% | 2 | 52% | 0% |", "| 90% to 100% | 2 | 96% | 100% |"]


def test_promises_stand_beside_what_their_launches_brought():
    regret = [0.5] * 10 + [0.4, 0.4]
    row = run(regret=regret, promised=[None] * 10 + [0.4, 0.2], kept=[1.0] * 10 + [0.5, 0.25])
    # .1 of .5 is 20 %, and nothing
    assert table.promises([row])[-1] == "| dense, no model | 2 | 30.00% | 12.50% | 10.00% |"


@pytest.mark.parametrize(
    ("gain", "kept", "launches"), [(0.004, 1.0, (20, 20)), (0.002, 1.0, (13, 13)), (0.002, 0.5, (13, 20))]
)
def test_a_search_ends_by_promises_as_they_are_corrected(gain: float, kept: float, launches: tuple[int, int]):
    n = 20
    row = run(
        regret=[0.1] * n,
        gpu_s=[3600 * k for k in range(1, n + 1)],
        expected_gain=[0.1] * 10 + [gain] * 10,
        kept=[kept] * n,
    )
    assert (table.ended(row, corrected=True), table.ended(row, corrected=False)) == launches


def test_the_longest_run_of_each_kind_is_read(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(json.dumps(run()) + "\n" + json.dumps(run(seed=1)) + "\n")
    two.write_text(json.dumps(run(regret=[0.5, 0.2, 0.1, 0.05])) + "\n")
    assert sorted(len(r["regret"]) for r in table.read([one, two])) == [3, 4]


def test_where_searches_end_is_said_as_promises_are_corrected_and_as_they_are():
    n = 20
    row = run(
        regret=[1 - k / 100 for k in range(1, n + 1)],
        gpu_s=[3600 * k for k in range(1, n + 1)],
        expected_gain=[0.1] * 10 + [0.002] * 10,
        kept=[0.5] * n,
    )
    assert table.stops([row])[-1] == "| dense, no model | 100% | 13 | 13.0 | .870 | 0% | 20 | 20.0 | .800 |"


def test_a_cell_by_gpu_hours_is_what_was_reached_by_then():
    rows = [run(regret=[0.5, 0.2, 0.1], gpu_s=[3600, 7200, 19000])]
    assert table.table({"x": rows}, hours=True)[-1] == "| x | .200 (.200-.200) | .200 (.200-.200) |  |  | 5.3 | 1 |"


def test_launches_to_a_tenth_are_counted_in_the_median():
    rows = [run(regret=r) for r in ([0.5, 0.1], [0.5, 0.4], [0.1, 0.05])]
    assert table.needed(rows) == "2"
    assert table.needed(rows[:2]) == "> 2"
    assert (table.needed(rows, hours=True), table.needed(rows[:2], hours=True)) == ("2.0", "> 3.0")


def test_a_cell_that_a_fifth_of_the_runs_or_more_does_not_reach_is_empty():
    rows = [run(regret=[0.1] * 5)] * 7 + [run(regret=[0.1] * 3)] * 3
    assert table.cells(rows, hours=False)[0] == ""
    assert table.cells(rows[:7] + rows[7:8], hours=False)[0] != ""


def test_goals_are_medians_of_ours_alone():
    rows = [run(seed=k, regret=[0.5] * 9 + [r]) for k, r in enumerate((0.1, 0.14, 0.6))]
    rows += [run(seed=5, method="tpe", regret=[0.9] * 10), run(seed=6, regret=[0.9] * 9)]
    assert "| no model, 10 launches | .150 | **.140** | **.140** |" in table.goals(rows)
    assert "| no model, 10 launches | .150 | **.150** | **.150** |" in table.goals([run(regret=[0.15] * 10)])


def test_what_is_believed_half_and_half_counts_to_the_row_above():
    lines = table.serves([run(serves=[0.4, 0.8, 0.2])])
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 20% to 40%", "| 40% to 60%", "| 80% to 90%"]


def test_tables_of_runs_that_promised_nothing_are_empty_and_other_models_keep_their_names():
    nothing = {"promised": [None] * 12, "kept": [None] * 12}
    assert len(table.promises([run(regret=[0.5] * 12, **nothing)])) == 2
    right = run(model="right", regret=[0.5] * 12, promised=[0.1] * 12, kept=[1.0] * 12)
    assert "dense, right" in table.promises([right])[-1]


DEATHS = {
    "experts:said": (
        ({"gpus": 16, "layout": "data", "all2all": "pplx", "graphs": "full"}, "pplx"),
        ({"gpus": 16, "weights": "fp8", "kv_cache": "fp8", "mtp": 3}, "fp8 attention"),
    ),
    "dense:said": (
        ({"tensor_parallel_size": 8, "quantization": "int4", "kv_cache_dtype": "fp8"}, "KV cache data type"),
        ({"tensor_parallel_size": 8, "speculation": "eagle", "chunked_prefill": False}, "eagle"),
    ),
}


@pytest.mark.parametrize(("name", "params", "words"), [(n, *d) for n, of in DEATHS.items() for d in of])
def test_a_server_of_a_surface_dies_of_what_it_says(name: str, params: dict, words: str):
    surface, silent = load_surface(name), load_surface(name.partition(":")[0])
    params = surface.space.snap({**surface.space.default(), **params})
    for one, said in ((surface, words), (silent, "the engine died")):
        outcome, _ = one.launch(params, one.loads, np.random.default_rng(0))
        assert isinstance(outcome, Infeasible) and outcome.message.startswith(said)


def test_a_blind_surface_under_short_names_is_the_same_surface():
    long, short = load_surface("blind_a:1"), load_surface("blind_a:1:short")
    assert {"tp", "max_seqs", "kv_dtype"} < {p.name for p in short.space.parameters}
    default = [one.space.snap(one.space.default()) for one in (long, short)]
    assert list(default[0].values()) == list(default[1].values())
    assert long.points(default[0]) == short.points(default[1]) != []
    outcomes = [o.launch(p, o.loads, np.random.default_rng(1)) for o, p in zip((long, short), default, strict=True)]
    assert outcomes[0] == outcomes[1]
    names = [table.surface_of({"surface": s}) for s in ("blind_a:1", "blind_a:1:short", "experts:said", "silicon:3")]
    assert names == ["blind_a", "blind_a:short", "experts:said", "silicon"]
    with pytest.raises(ValueError, match="blind_a:1 is, and with :short or :anon"):
        load_surface("blind_a:1:said")


@pytest.mark.parametrize("name", ["blind_c:1", "blind_c:1:short", "blind_d:0", "blind_e:1"])
def test_a_blind_surface_brings_its_wrong_model_along(name: str):
    surface = load_surface(name)
    assert surface.model("none", 0) is None
    right, wrong = surface.model("right", 3), surface.model("30%", 3)
    off = [wrong.constants[k] / right.constants[k] for k in right.constants]
    assert len(off) >= 4 and all(abs(o - 1) == pytest.approx(0.3) for o in off)
    assert set(wrong.doubts()) == set(right.constants), "launches may correct all of them"
    config = surface.space.config(surface.space.snap(surface.space.default()), "")
    first, last = (right.predict(config, load).metrics for load in (surface.loads[0], surface.loads[-1]))
    assert first["tpot_p99_s"] < last["tpot_p99_s"] and first[COST_KEY] > last[COST_KEY]
    scaled = right.scaled({k: wrong.constants[k] / right.constants[k] for k in right.constants})
    assert scaled.predict(config, 1.0).metrics == wrong.predict(config, 1.0).metrics
    assert (
        surface.model("badly", 3).predict(config, 1.0).metrics != surface.model("badly", 4).predict(config, 1.0).metrics
    )
    huge = {p.name: p.values[-1] for p in surface.space.parameters}
    assert not right.predict(surface.space.config(surface.space.snap(huge), ""), 1.0).fits


@pytest.mark.parametrize(
    "name",
    [
        "blind_a:2",
        "blind_c:1",
        "blind_d:2",
        "blind_e:0",
        "blind_f:3",
        "blind_g:4",
        "blind_h:5",
        "blind_i:3",
        "blind_j:0",
    ],
)
def test_the_sheet_of_a_surface_says_how_its_models_rank_and_that_it_measures_its_truth(name: str):
    first, _, *models, last = sheet(load_surface(name), count=80)
    assert first.startswith(f"{name}: ") and "do not run" in first
    ranks = [float(line.partition("latency ")[2][:4]) for line in models]
    assert not ranks or (ranks[0] > 0.6 and ranks[0] > ranks[2])
    mean, sd = (float(part) for part in last.removeprefix("  measured latency off by ").split(" log")[0].split(" +- "))
    assert abs(mean) < 0.03 and 0.02 < sd < 0.15


@pytest.mark.parametrize("name", ["blind_f:0", "blind_g:4"])
def test_the_lasting_luck_of_a_configuration_is_measured_and_is_not_of_the_truth(name: str):
    """Regret against a front of lucky configurations is one that nobody can lower but by trying them all."""
    surface, rng = load_surface(name), np.random.default_rng(3)
    luck = []
    for i in rng.choice(np.flatnonzero(surface._holds[:, 0]), 40):
        values = surface.source.space().values()
        places = np.unravel_index(i, [len(v) for v in values])
        params = {n: v[k] for n, v, k in zip(surface.source.space(), values, places, strict=True)}
        often = [surface.source.measure(params, surface.loads[0], 0, rng)["tpot_p99_s"] for _ in range(16)]
        luck.append(np.median(np.log(often)) - math.log(surface.points(params)[0][2]))
    assert abs(np.mean(luck)) < 0.03 and 0.025 < np.std(luck) < 0.08


def test_who_knows_all_but_the_luck_does_not_reach_the_front_of_lucky_configurations():
    surface, lucky = load_surface("blind_f:3"), Blind("blind_f:3", lucky=True)
    assert 0.03 < left(surface, lucky) <= left(surface, lucky, 3) < 0.3
    assert left(surface, surface) < 0.005, "without luck ten launches are nearly all of it"


def test_of_two_conditions_that_hold_the_last_is_what_a_server_dies_of():
    where = [np.array([True, True, False]), np.array([True, False, False])]
    found = crashes(3, (where[0], 0.7), (where[1], 1.0))
    assert found["crash_p"].tolist() == [1.0, 0.7, 0.0] and found["cause"].tolist() == [1, 0, 0]


def test_messages_unread_are_all_the_same():
    surface = load_surface("experts")
    codes = Candidates.of(surface.space, 0, asked=True).codes(list(range(40)))
    said = ["kv cache" if c[5] == 0 else "mtp" if c[9] == 3 else None for c in codes]
    found = beliefs(surface.space, codes[:20], said[:20], codes[20:])
    assert found["the messages unread"] == pytest.approx(
        by_causes(surface.space, codes[:20], [text and "it died" for text in said[:20]], codes[20:])
    )
    assert found["as shipped"] == pytest.approx(by_causes(surface.space, codes[:20], said[:20], codes[20:]))
    assert abs(found["as shipped"] - found["the messages unread"]).max() > 0.02


def test_effects_are_means_over_what_runs_with_either_value():
    space = SearchSpace("made", "emulator", (knob("batch_size", 8, 16, default=8), knob("eager", 0, 1, default=0)))
    runs = np.array([True, True, True, False])  # (8, 0), (8, 1), (16, 0), (16, 1)
    latency = np.exp([[0.0], [1.0], [0.5], [9.0]])
    ok = np.array([[True, True], [True, False], [False, True], [True, True]])
    source = SimpleNamespace(
        truth_grid=lambda _scenario: (runs, latency, np.repeat(latency, 2, axis=1), ok),
        space=lambda: {"batch_size": [8, 16], "eager": [0, 1]},
    )
    found = effects.table(SimpleNamespace(source=source, scenario=0, space=space, loads=(1.0, 4.0)))  # type: ignore[arg-type]
    larger, eager = found["batch_size"][1], found["eager"][1]
    assert larger["latency"] == pytest.approx(0.5), "(8, 1) to (16, 1) does not run"
    assert larger["capacity"] == pytest.approx(math.log(0.5 / 4.0)), "no load held: half the lowest"
    assert (larger["runs"], eager["runs"]) == (0.5, 0.5)
    assert eager["latency"] == pytest.approx(1.0) and eager["capacity"] == pytest.approx(math.log(1.0 / 4.0))
    assert larger["said_capacity"] > 0 == found["batch_size"][0]["said_capacity"]
