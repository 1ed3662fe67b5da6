"""`tuner fleet` as a user meets it: a study's folder and a file in; a table, data, a page and an exit code out."""

import json
import re
import sys

import pytest
from ruamel.yaml import YAML

from tests import studies
from tests.spec.conftest import workplace as workplace
from tests.spec.test_studyfile import GOOD, write
from tuner.cli.app import main
from tuner.spec import studyfile
from tuner.study.outcome import Boot, Measured
from tuner.study.store import Store


@pytest.fixture
def tuner(workplace, monkeypatch, capsys):
    """Runs the command in a folder with the emulated study ``reports/mine`` and the file ``day.csv``; returns exit
    code, stdout and stderr."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "160")
    study = studyfile.load(write(workplace, GOOD, "mine.yaml"))
    store = Store(workplace / study.folder)
    store.folder.mkdir(parents=True)
    with store.study_file.open("w") as file:
        YAML().dump(dict(study.frozen), file)
    config = study.space.config(study.space.default(), study.model)
    notes = {"started_s": 0.0, "baseline": True, "emulated": True, "role": "search"}
    store.start_trial(0, config, study.space.default(), **notes)
    loads = [
        studies.step(x, study.objective, tpot_s=0.02 * x, ttft_s=0.1 * x, tokens_per_s=1000 * x) for x in (1, 2, 3)
    ]
    store.end_trial(0, Measured(tuple(loads), Boot(60.0, {}, {})), ended_s=60.0)
    write(workplace, "hour,requests_per_s\n08:00,20\n09:00,33\n", "day.csv")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tuner", "fleet", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_the_plan_is_printed_with_its_hours_costs_and_assumptions(tuner, workplace):
    code, out, err = tuner("reports/mine", "--demand", "day.csv")
    assert code == 0
    assert re.search(r"08:00 +20\.0 +\d", out)
    assert "USD a day" in out
    assert "Emulated: mine. A model of the hardware answered; nothing was measured." in out
    assert "Assumed" in out
    assert "the SLOs hold in each of the 2 hours" in out
    assert err.strip() == "reports/mine/fleet.html"


def test_json_is_data_alone_on_stdout(tuner):
    code, out, _ = tuner("reports/mine", "--demand", "day.csv", "--json", "--spare", "0", "--max-gpus", "64")
    data = json.loads(out)
    assert code == 0
    assert [h["label"] for h in data["hours"]] == ["08:00", "09:00"]
    assert data["terms"]["spare"] == 0
    assert data["offers"][0]["emulated"] is True
    # one replica served 10 requests/s within the SLOs (tpot_p99=50ms at load 2), less what launches differ by
    assert 9 < data["offers"][0]["capacity_rps"][1] < 10
    assert [h["replicas"]["mine"] for h in data["hours"]] == [3, 4]


def test_the_page_needs_no_network_and_says_what_the_terminal_says(tuner, workplace):
    _, out, _ = tuner("reports/mine", "--demand", "day.csv", "--out", "pages/plan.html")
    page = (workplace / "pages" / "plan.html").read_text()
    rest = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # plotly's own text names addresses it never asks
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", rest)
    assert "default-src 'none'" in page  # and the browser would refuse
    for part in ("Emulated.", "08:00", "the SLOs hold in each of the 2 hours", "Assumed"):
        assert part in rest
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    assert set(figures) == {"capacity", "used", "cost"}
    assert figures["capacity"]["data"][-1]["y"] == [20, 33]
    usd = re.search(r"([\d.]+) USD a day", out)[1]
    assert f"${float(usd):,.0f}" in rest


def test_the_same_arguments_give_the_same_plan(tuner):
    runs = [tuner("reports/mine", "--demand", "day.csv", "--json", "--swing", "0.1")[1] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reports/mine", "--demand", "nowhere.csv"], "nowhere.csv: no such demand file"),
        (["reports/mine", "--demand", "bad.csv"], "bad.csv:3: 'many' is not a number of requests per second"),
        (["reports/mine", "--demand", "day.csv", "--scale", "2", "--peak-rps", "5"], "Give one of them"),
        (["reports/mine", "--demand", "day.csv", "--spot", "2"], "--spot 2 is not between 0 and 1"),
        (["reports/mine", "--demand", "day.csv", "--routing", "sticky"], "It is one of random, two-choices"),
        (["reports/mine", "--demand", "day.csv", "--lead", "soon"], "Write 0s, 90s, 5min or known"),
        (["reports/mine", "--demand", "day.csv", "--max-gpus", "L4=8"], "no study has 'L4'"),
        (["reports/mine", "--demand", "day.csv", "--max-gpus", "4", "--max-gpus", "5"], "says again how many"),
        (["reports/mine", "--demand", "day.csv", "--max-gpus", "many"], "Write 64, or NAME=64"),
        (["reports/mine", "reports/mine", "--demand", "day.csv"], "the same study is named twice"),
        (["reports/none", "--demand", "day.csv"], "no such study: reports/none"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tuner, workplace, words, says):
    write(workplace, "hour,requests_per_s\n0,5\n1,many\n", "bad.csv")
    code, out, err = tuner(*words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_lead_of_nothing_is_a_lead(tuner):
    code, out, _ = tuner("reports/mine", "--demand", "day.csv", "--lead", "0s")
    assert code == 0
    assert "knows 0 s ahead" in out


def test_where_no_fleet_does_the_exit_code_is_3(tuner):
    code, _, err = tuner("reports/mine", "--demand", "day.csv", "--max-gpus", "3")
    assert code == 3
    assert "No fleet serves 33 requests/s within 3 GPUs with 1 spare" in err


def test_a_day_that_does_not_hold_is_exit_code_3_and_named(tuner):
    words = ("--spot", "1", "--spot-price", "0.01", "--interruptions", "60", "--spare", "0", "--scale", "0.02")
    code, out, _ = tuner("reports/mine", "--demand", "day.csv", *words)
    assert code == 3
    assert re.search(r"missed in \d of 2 hours: 0[89]:00 \(", out)
