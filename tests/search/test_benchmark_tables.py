"""The published figures of the search come from these tables: small runs by hand, sums done by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.search import table


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
    assert hours == "| ours, no model | .200 (.200-.200) |  |  |  |"


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
