"""What a demand file may be, and the one clear line for everything that it may not."""

import math

import numpy as np
import pytest

from tuner.errors import UsageError
from tuner.fleet.demand import read

LOCAL = ("2026-11-29T01:00:00+01:00", "2026-11-29T01:00:00Z")


def written(folder, text, name="day.csv"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("day.csv", "hour,requests_per_s\n00:00,5\n01:00,7.5\n", ("00:00", "01:00")),
        ("day.csv", "note;rps;hour\nx;5;mon 0\ny;7.5;mon 1\n", ("mon 0", "mon 1")),  # other columns, another order
        ("day.csv", "0,5\n1,7.5\n", ("0", "1")),  # no header
        ("day.csv", "# from the gateway\nrps\n5\n\n7.5\n", ("0", "1")),  # no hours; comments, blank lines
        ("day.csv", "hour,rps\n23:20,5\n0:20,7.5\n", ("23:20", "0:20")),
        ("day.csv", "at,rps\n2026-11-29T01:00:00+01:00,5\n2026-11-29T01:00:00Z,7.5\n", LOCAL),  # an hour apart
        ("day.json", "[5, 7.5]", ("0", "1")),
        ("day.json", '{"hours": [{"hour": "a", "requests_per_s": 5}, {"hour": "b", "rps": 7.5}]}', ("a", "b")),
    ],
)
def test_hours_are_read_from_csv_and_json(tmp_path, name, text, labels):
    found = read(written(tmp_path, text, name))
    assert found.labels == labels
    assert found.rate_rps.tolist() == [5, 7.5]
    assert found.swing == 0  # a file of hours tells of none
    assert math.isnan(found.output_tokens)


def test_rates_are_scaled_by_a_factor_or_to_a_peak(tmp_path):
    path = written(tmp_path, "rps\n5\n7.5\n")
    assert read(path, scale=2).rate_rps.tolist() == [10, 15]
    assert read(path, peak_rps=1e6).rate_rps == pytest.approx([1e6 * 5 / 7.5, 1e6])
    assert "times 2" in read(path, scale=2).source


def trace(folder, arrival_s, output_tokens=30):
    rows = [f'{{"arrival_s": {at:.3f}, "input_tokens": 100, "output_tokens": {output_tokens}}}' for at in arrival_s]
    return written(folder, "\n".join(rows) + "\n", "trace.jsonl")


def test_a_trace_is_counted_by_the_hour_and_scaled(tmp_path):
    # 720 requests in the first hour, 360 in the second, and ten minutes more, which are no hour
    path = trace(tmp_path, np.concatenate([np.arange(0, 3600, 5), np.arange(3600, 7200, 10), [7500, 7800]]))
    found = read(path, scale=50)
    assert found.rate_rps == pytest.approx([10, 5])
    assert found.output_tokens == 30


def test_lines_of_a_trace_that_were_skipped_are_said(tmp_path):
    path = trace(tmp_path, np.arange(0, 600, 0.5))
    path.write_text(path.read_text() + "{}\n")
    assert "1 bad lines skipped" in read(path).source


def test_a_trace_shorter_than_an_hour_is_one_hour_at_its_mean_rate(tmp_path):
    assert read(trace(tmp_path, np.arange(0, 600.1, 0.5))).rate_rps == pytest.approx([2], rel=0.01)


def test_the_swing_is_what_a_rate_varies_by_beyond_independent_requests(tmp_path):
    noise = np.random.default_rng(0)
    steady = np.sort(noise.random(7200)) * 3600
    minutes = noise.poisson(120 * np.exp(0.3 * noise.standard_normal(60)))  # two a second, a minute differs by 30 %
    uneven = np.concatenate([60 * m + 60 * np.sort(noise.random(n)) for m, n in enumerate(minutes)])
    assert read(trace(tmp_path, steady), window_s=60).swing < 0.05
    assert read(trace(tmp_path, uneven), window_s=60).swing == pytest.approx(0.3, abs=0.08)
    assert read(trace(tmp_path, uneven), window_s=60, swing=0.1).swing == 0.1


@pytest.mark.parametrize(
    ("name", "text", "where", "says"),
    [
        ("day.csv", "", "day.csv: ", "the file is empty"),
        ("day.csv", "hour,rps\n", "day.csv: ", "holds no hour"),
        ("day.csv", "hour,rps\n0,5\n1,many\n", "day.csv:3: ", "'many' is not a number"),
        ("day.csv", "hour,rps\n0,5\n1\n", "day.csv:3: ", "1 columns, not 2"),
        ("day.csv", "hour,rps\n0,5\n1,-2\n", "day.csv:3: ", "negative"),
        ("day.csv", "hour,rps\n0,5\n1,nan\n", "day.csv:3: ", "not a number"),
        ("day.csv", "hour,rps\n0,5\n1,1e9\n", "day.csv:3: ", "more than 1e+07"),
        ("day.csv", "hour,rps\n0,5\n0,6\n", "day.csv:3: ", "was there before (line 2)"),
        ("day.csv", "hour,rps\n0,5\n2,6\n", "day.csv:3: ", "hour 2 follows hour 0"),  # a hole
        ("day.csv", "hour,rps\n00:00,5\n02:00,6\n", "day.csv:3: ", "hour 02:00 follows hour 00:00"),
        ("day.csv", "hour,rps\n05:00,5\n03:00,6\n", "day.csv:3: ", "hour 03:00 follows hour 05:00"),
        ("day.csv", "hour,rps\n05:00,5\n05:30,6\n", "day.csv:3: ", "hour 05:30 follows hour 05:00"),
        ("day.csv", "at,rps\n2026-11-28T23:00,5\n2026-11-29T01:00,6\n", "day.csv:3: ", "follows hour 2026-11-28T23:00"),
        (
            "day.json",
            '[{"at": "23:00", "rps": 5},\n{"at": "01:00", "rps": 6}]',
            "day.json:2: ",
            "01:00 follows hour 23",
        ),
        ("day.csv", "hour,visitors\n0,5\n", "day.csv:1: ", "no column of rates"),
        ("day.csv", "hour,rps\n0,0\n1,0\n", "day.csv: ", "no hour has any demand"),
        ("day.csv", "a,b,c\n1,2,3\n", "day.csv: ", "neither a file of hours nor a trace"),
        ("day.json", "[5,\n 7.5,\n]", "day.json:3: ", "is no JSON"),
        ("day.json", '[\n{"hour": 0, "rps": 5},\n{"hour": 1}\n]', "day.json:3: ", "has no requests_per_s"),
        ("day.json", "[5,\ntrue]", "day.json:2: ", "not a number"),
        ("day.json", "{}", "day.json: ", "holds no list of hours"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, name, text, where, says):
    with pytest.raises(UsageError) as caught:
        read(written(tmp_path, text, name))
    line = str(caught.value)
    assert line.startswith(str(tmp_path / where))
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("suffix", [".json", ".txt"])
@pytest.mark.parametrize("text", [f"[1{'0' * 5000}]", f"[1{'0' * 400}]", "[" * 100_000, "[1e999]"])
def test_numbers_and_lists_without_end_are_one_line(tmp_path, text, suffix):
    with pytest.raises(UsageError, match=r"is no JSON of hours|is more than|not a number of requests"):
        read(written(tmp_path, text, f"day{suffix}"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"scale": 2.0, "peak_rps": 5.0}, "Give one of them"),
        ({"scale": 0.0}, "--scale 0 is no factor"),
        ({"peak_rps": math.inf}, "--peak-rps inf"),
        ({"peak_rps": 1e8}, "more than 1e+07"),
        ({"swing": 5.0}, "not between 0 and 3"),
    ],
)
def test_a_factor_that_means_nothing_is_refused(tmp_path, more, says):
    with pytest.raises(UsageError, match=r".") as caught:
        read(written(tmp_path, "rps\n5\n"), **more)
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match="no such demand file"):
        read(tmp_path / "nowhere.csv")


def test_a_field_that_no_csv_has_is_one_line_with_its_place(tmp_path):
    (path := tmp_path / "day.csv").write_text("hour,rps\n0," + "9" * 200_000)
    with pytest.raises(UsageError, match=r"day\.csv:2: is no CSV: field larger than"):
        read(path)
