"""The study's traffic: what is cut, what of the file is not replayed, and that it is said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from tests.spec.conftest import workplace as workplace
from tests.spec.test_studyfile import GOOD, write
from tuner.cli.app import app
from tuner.errors import UsageError
from tuner.load import formats
from tuner.spec import studyfile
from tuner.study import workload

STUDY = GOOD.replace("trace.csv, window: 10s", "trace.jsonl, window: 10s, max_input_tokens: 50")


def traffic(folder, tokens, **more):
    """The workload of a trace with texts, its prompts of ``tokens`` tokens, one a second."""
    rows = [
        {"arrival_s": i, "input_tokens": n, "output_tokens": 5, "text": "word " * n, **more}
        for i, n in enumerate(tokens)
    ]
    write(folder, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    return workload.read(studyfile.load(write(folder, STUDY)))


def test_where_a_prompt_is_cut_no_text_is_sent_in_its_stead_and_that_is_said(workplace):
    found = traffic(workplace, [20, 80] * 60)
    assert found.whole.input_tokens.tolist() == [20, 50] * 60
    assert found.whole.texts is None
    assert all(window.texts is None for window in (*found.search, *found.heldout))
    assert any("60 of 120 prompts" in note and "no text is kept" in note for note in found.notes)


def test_a_study_counts_a_logs_texts_with_its_models_tokenizer(workplace):
    """It has no flag that would name one."""
    Tokenizer(WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(workplace / "model" / "tokenizer.json"))
    rows = [{"timestamp": i, "conversations": talk("word", "word")} for i in range(120)]
    write(workplace, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")

    study = studyfile.load(write(workplace, STUDY))
    assert study.space.facts["max_input_tokens"] == 1
    assert workload.read(study).whole.input_tokens.tolist() == [1] * 120


@pytest.mark.parametrize(
    ("seconds", "ladder", "said", "heldout"),
    [
        (250, "[1, 2, 4]", "", 5),  # six parts of 41.7 s: a step of ten seconds at load 4
        (210, "[1, 2, 4]", "", 4),
        (60, "[1, 2, 4]", "", 3),  # too short even so
        (60, "[0.5, 1]", "", 5),
        (250, "[1, 2, 4]", "heldout_windows: 2, ", 2),
        (60, "[1, 2, 4]", "heldout_windows: 5, ", 5),
        (250, "[1, 2, 4]", "heldout_windows: auto, ", 5),
    ],
)
def test_as_many_windows_are_held_out_as_leave_each_a_whole_step(workplace, seconds, ladder, said, heldout):
    rows = "".join(f"{i},100,10\n" for i in range(seconds))
    write(workplace, "arrival_s,input_tokens,output_tokens\n" + rows, "trace.csv")
    text = GOOD.replace("trace: {", "trace: {" + said).replace("[1, 2, 4]", ladder)
    assert len(workload.read(studyfile.load(write(workplace, text))).heldout) == heldout


def test_a_function_is_verified_on_three_windows_of_a_trace_that_it_never_sees(workplace):
    write(workplace, "def serve(config, load): return {}\n", "mine.py")
    rows = "".join(json.dumps({"arrival_s": i, "input_tokens": 9, "output_tokens": 5}) + "\n" for i in range(600))
    write(workplace, rows, "trace.jsonl")
    engine = "engine: {kind: function, target: 'mine.py:serve'}"
    text = STUDY.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", engine).replace("model: ./model\n", "")
    assert engine in text and len(workload.read(studyfile.load(write(workplace, text))).heldout) == 3


def test_a_trace_of_fewer_requests_than_windows_is_held_out_in_fewer(workplace):
    rows = [{"arrival_s": 5 * i, "input_tokens": 9, "output_tokens": 5} for i in range(5)]
    write(workplace, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    text = STUDY.replace("[1, 2, 4]", "[0.1], warmup: 0s")
    assert len(workload.read(studyfile.load(write(workplace, text))).heldout) in (3, 4)


def test_a_study_that_an_earlier_version_began_holds_out_three_windows(workplace):
    rows = "".join(json.dumps({"arrival_s": i, "input_tokens": 9, "output_tokens": 5}) + "\n" for i in range(600))
    write(workplace, rows, "trace.jsonl")
    study = studyfile.load(write(workplace, STUDY))
    assert len(workload.read(study).heldout) == 5
    before = studyfile.by(study.rules - {"verifies_widely"}, study)
    assert len(workload.read(before).heldout) == 3 and studyfile.differences(before, study) == []
    lasts_s = [[window.arrival_s[-1] for window in workload.read(of).heldout] for of in (before, study)]
    assert max(lasts_s[0]) < 2 * 4 * 10 < min(lasts_s[1]), "nor is it followed further than it was"


def test_a_log_that_counts_by_itself_needs_no_tokenizer(workplace):
    usage = {"prompt_tokens": 30, "completion_tokens": 7}
    rows = [
        {"created": i, "messages": [{"role": "user", "content": "word"}], "response": {"usage": usage}}
        for i in range(120)
    ]
    write(workplace, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    assert workload.read(studyfile.load(write(workplace, STUDY))).whole.input_tokens.tolist() == [30] * 120


def test_what_a_study_cannot_be_told_of_a_trace_is_asked_for_as_a_command_that_can(workplace):
    rows = [{"conversations": talk("word", "word")}] * 120
    write(workplace, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    Tokenizer(WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(workplace / "model" / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"tuner trace convert \S+trace.jsonl timed.parquet --arrivals p") as refused:
        studyfile.load(write(workplace, STUDY))
    follow(refused.value.fix, workplace, {})  # the texts are to be counted as well


def test_the_command_for_texts_that_nobody_counted_gives_them_times_where_they_have_none(tmp_path):
    Tokenizer(WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path, json.dumps({"conversations": talk("word", "word")}) + "\n", "trace.jsonl")
    with pytest.raises(UsageError, match="without their number of tokens") as refused:
        formats.read(path)
    follow(refused.value.fix, tmp_path, {"MODEL_FOLDER": str(tmp_path)})


def follow(fix, folder, filled):
    """Runs the command that a fix names, in ``folder``, with its places filled."""
    said = re.search(r"tuner (trace convert .*?) \(", fix)
    words = [filled.get(word, word) for word in said[1].split()]
    out = str(folder / words[3])
    assert CliRunner().invoke(app, [*words[:3], out, *words[4:]]).exit_code == 0
    assert len(formats.read(Path(out)))


def talk(prompt, reply):
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]


def test_texts_stay_where_no_prompt_is_cut(workplace):
    found = traffic(workplace, [20, 50] * 60)
    assert found.whole.texts is not None
    assert not any("text" in note for note in found.notes)


def test_a_prompt_that_is_cut_keeps_the_blocks_it_begins_with(workplace):
    found = traffic(workplace, [80] * 120, block_tokens=16, block_ids=[1, 2, 3, 4, 5])
    assert found.whole.block_ids.tolist() == [1, 2, 3, 4] * 120
    assert found.whole.block_offsets.tolist() == list(range(0, 481, 4))


def test_lines_that_were_skipped_and_requests_left_out_are_said(workplace):
    rows = [f"2023-11-16 18:15:{i:02}.0000000,{100 + i},{i}" for i in range(60)]
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *rows[:30], "nonsense", *rows[30:]]
    write(workplace, "\n".join(lines), "trace.csv")
    notes = workload.read(studyfile.load(write(workplace, GOOD))).notes
    assert any("1 bad lines skipped" in note and "trace.csv:32: wrong number of columns" in note for note in notes)
    assert "1 requests left out: no output tokens (the request failed)" in notes


def test_a_trace_that_runs_out_of_requests_says_up_to_which_load_it_fills_a_step(workplace):
    # 60 requests, one a second: a search and a held-out window of 29 s each
    def read(window):
        text = GOOD.replace("window: 10s", f"window: {window}, heldout_windows: 1")
        return workload.read(studyfile.load(write(workplace, text)))

    found = {window: read(window) for window in ("30s", "15s", "7s")}
    assert [round(found[w].fills, 1) for w in found] == [1.0, 2.0, 4.3]
    assert "after 7.5 s of the 30 s of a step at load 4, and fill a step up to load 1 only" in found["30s"].notes[-1]
    assert found["15s"].notes
    assert not beside_few(found["7s"])


@pytest.mark.parametrize(
    ("slo", "said"),
    [
        ("{ttft_p99: 1s}", True),
        ("{e2e_p99: 5s}", True),
        ("{e2e_p99: 500ms}", False),
        ("{e2e_p99: 0.9s}", True),  # more than a tenth of what the warm-up leaves of the 10 s
        ("{tpot_p99: 50ms}", False),
        ("{tpot_mean: 50ms, e2e_p50: 500ms}", True),
    ],
)
def test_where_no_slo_bounds_a_response_it_is_said_what_its_cost_counts(workplace, slo, said):
    """Two servers that both keep up were "proven" 10 % apart by what was still on its way at a window's end."""
    text = GOOD.replace("objective: chat\nslo: {ttft_p99: 300ms}", f"objective: {{latency: ttft_p99, slo: {slo}}}")
    notes = workload.read(studyfile.load(write(workplace, text))).notes
    assert any("cost counts what arrives in the 10 s of a step" in note for note in notes) == said


def test_a_sparse_trace_is_not_called_too_short(workplace):
    rows = [f"2023-11-16 {18 + i // 60:02}:{i % 60:02}:00.0000000,100,10" for i in range(300)]  # one a minute
    write(workplace, "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]), "trace.csv")
    found = workload.read(studyfile.load(write(workplace, GOOD.replace("4]", "4], warmup: 0s"))))
    assert found.fills >= 4 and not any("too short" in note for note in found.notes)


def beside_few(found):
    """What is said of the trace, but for the few requests of these tests' steps."""
    return [note for note in found.notes if not note.startswith("few requests")]


def test_steps_whose_percentile_is_their_slowest_request_are_said_with_the_window_that_would_do(workplace):
    def few(*given):
        return [n for n in of_arrivals(workplace, steady(0, 2000), *given).notes if n.startswith("few requests")]

    assert few("[1, 2, 4]") == [
        "few requests: at load 2 a step measures 50, and what holds for 99 % of them is up to the slowest: a single "
        "long prompt decides. A trace.window of 15 s measures 100"
    ]
    assert not few("[1, 4, 5]")  # a hundred in five seconds
    assert not few("auto")  # loads that nobody has settled yet


def of_arrivals(folder, seconds, ladder="[1, 2, 4]", warmup="5s"):
    """The workload of a trace with arrivals at ``seconds``, of which the latter half is the held-out window."""
    rows = [json.dumps({"arrival_s": at, "input_tokens": 9, "output_tokens": 5}) + "\n" for at in seconds]
    write(folder, "".join(rows), "trace.jsonl")
    text = STUDY.replace("window: 10s", "window: 10s, heldout_windows: 1").replace("ttft_p99", "tpot_p99")
    text = text.replace("[1, 2, 4]", f"{ladder}, warmup: {warmup}") + f"name: mine\nreports: {folder}/reports\n"
    return workload.read(studyfile.load(write(folder, text)))


def steady(begin_s, requests, rate=5.0):
    return [begin_s + k / rate for k in range(requests)]


PING = [0.0, *steady(30, 499)]  # and half a minute before the traffic
HOLE = [0.0, 6.0, *steady(30, 498)]  # nothing from the tenth to the twentieth second, which load 2 measures
HELD_OUT = [*steady(0, 250), 60.0, *steady(100, 249)]


@pytest.mark.parametrize(
    ("seconds", "ladder", "found"),
    [
        (PING, "[1, 2, 4]", "search-0 .* at load 1\\."),
        (PING, "auto", "search-0 .* at load 1\\."),
        (HOLE, "[1, 2, 4]", "search-0 .* at load 2\\."),
        (HELD_OUT, "[1, 2, 4]", "held-out-0 .* at load 1\\."),
    ],
)
def test_a_window_of_which_a_load_measures_nothing_is_refused_before_any_launch(workplace, seconds, ladder, found):
    """Every launch would be paid for, and end as a measurement that cannot be believed."""
    with pytest.raises(UsageError, match=f"nothing to measure: window {found}") as refused:
        of_arrivals(workplace, seconds, ladder)
    assert refused.value.where == f"{workplace}/study.yaml:6"  # which names the trace


def test_a_trace_with_too_few_requests_is_refused_with_the_line_that_names_it(workplace):
    with pytest.raises(UsageError, match="no request for one of its 2 windows") as refused:
        of_arrivals(workplace, [0.0])
    assert refused.value.where == f"{workplace}/study.yaml:6"


def test_no_window_is_refused_that_nobody_is_known_to_measure_or_that_was_measured(workplace):
    assert of_arrivals(workplace, HELD_OUT, "auto")  # at which loads is settled by the default
    assert of_arrivals(workplace, PING, "[1, 2, 4]", "0s")
    (workplace / "reports" / "mine" / "trials").mkdir(parents=True)
    [note] = of_arrivals(workplace, PING).notes
    assert note.startswith("uneven: at load 1 the trace has 3.85 requests/s, but search-0 0/s.")


def test_windows_whose_rate_is_not_the_traces_are_said_at_the_lowest_such_load(workplace):
    quiet = [*steady(0, 20, 2), *steady(10, 400, 10)]
    [note] = [n for n in of_arrivals(workplace, quiet).notes if "the trace has" in n]
    assert note.startswith("uneven: at load 1 the trace has 8.4 requests/s, but search-0 2/s. Take")
    assert not beside_few(of_arrivals(workplace, steady(0, 500)))


def test_a_higher_load_that_brings_hardly_more_requests_is_said(workplace):
    pause = [*steady(0, 50), 21.0, *steady(21.2, 449)]  # load 2 has the first ten seconds in five, and little more
    said = "uneven: in search-0 load 2 has hardly more requests/s than load 1. Take a longer"
    assert any(note.startswith(said) for note in of_arrivals(workplace, pause, warmup="0s").notes)


def test_counts_of_a_few_requests_are_not_called_uneven(workplace):
    """A steady trace: five requests where three were to be expected, and no more at a load that is a tenth higher."""
    sparse = [*steady(0, 5, 0.5), *steady(20, 60, 0.31)]
    found = of_arrivals(workplace, sparse, "[1, 1.1, 1.2]", "0s")
    assert not [note for note in found.notes if note.startswith("uneven")]


def of_turns(folder, window, ladder="[1, 2, 4]", seconds=300, fill="0s"):
    """The workload of a trace of conversations, one a second and of four turns, each ten seconds after the last."""
    turns = sorted((begin + 10 * turn, begin, turn) for begin in range(-30, seconds) for turn in range(4))
    rows = [
        {"arrival_s": at, "input_tokens": 16 * (turn + 1), "output_tokens": 5, "block_tokens": 16,
         "block_ids": [4 * (begin + 30) + block for block in range(turn + 1)]}
        for at, begin, turn in turns
        if 0 <= at < seconds
    ]  # fmt: skip
    write(folder, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    text = GOOD.replace(
        "trace.csv, window: 10s", f"trace.jsonl, window: {window}, heldout_windows: 1, fill_cache: {fill}"
    )
    return workload.read(studyfile.load(write(folder, text.replace("[1, 2, 4]", ladder).replace("ttft_p", "tpot_p"))))


def test_prefixes_that_a_step_does_not_find_are_said_with_what_brings_them(workplace):
    """They were in the turn before, ten seconds earlier: of the first turns in a step, before it began."""
    [note] = beside_few(of_turns(workplace, "15s"))
    said = re.match(
        r"colder: of the trace's prompt tokens 58 % begin an earlier prompt too, of those that a step measures "
        r"(\d+) to (\d+) % at load 1 to 4, because the prefix cache is filled anew by each step. "
        r"With trace.fill_cache: (\d+)s it is (\d+) %$",
        note,
    )
    assert said
    least, _, fill_s, within = map(int, said.groups())
    assert least < 58 * workload.NEAR <= within
    assert not beside_few(of_turns(workplace, "15s", fill=f"{fill_s}s"))


def test_where_nothing_brings_a_traces_prefixes_a_longer_trace_is_asked_for(workplace):
    [note] = [n for n in of_turns(workplace, "6s", "[1, 2]", seconds=19).notes if n.startswith("colder")]
    assert note.endswith("is filled anew by each step. A longer trace would tell more")


def test_prefixes_that_every_step_finds_again_are_nothing_to_say(workplace):
    assert not of_turns(workplace, "50s", "[1, 2]").notes
    found = traffic(workplace, [40] * 120, block_tokens=20, block_ids=[1])  # a system prompt
    assert not [note for note in found.notes if note.startswith("colder")]


def test_a_function_may_ignore_a_trace_that_nobody_replays(workplace):
    (workplace / "mine.py").write_text("def evaluate(config, load):\n    return {}\n")
    rows = [json.dumps({"arrival_s": at, "input_tokens": 9, "output_tokens": 5}) + "\n" for at in PING]
    write(workplace, "".join(rows), "trace.jsonl")
    text = STUDY.replace("window: 10s", "window: 10s, heldout_windows: 1").replace("[1, 2, 4]", "[1, 2, 4], warmup: 5s")
    text += f"name: mine\nreports: {workplace}/reports\n"
    replayed = studyfile.load(write(workplace, text))
    with pytest.raises(UsageError, match="nothing to measure"):
        workload.read(replayed)
    function = replace(replayed, engine=replace(replayed.engine, kind="function"))
    assert workload.read(function).notes == ()
    higher = replace(function, load=replace(function.load, ladder=(1.0, 64.0)))
    assert workload.read(higher).notes == ()


def test_filling_a_cache_from_a_trace_that_shares_nothing_is_refused_by_its_line(workplace):
    text = GOOD.replace("window: 10s", "window: 10s, fill_cache: 20s")
    with pytest.raises(UsageError, match=r"study\.yaml:6: trace\.fill_cache changes nothing"):
        workload.read(studyfile.load(write(workplace, text)))


def test_every_step_of_every_window_has_what_came_before_it(workplace):
    found = of_turns(workplace, "15s", fill="20s")
    for window in (*found.search, *found.heldout):
        assert len(window.earlier) > 50
        for load in (1.0, 4.0):
            assert workload.at_load(window, load, 15.0).earlier is window.earlier
    assert all(window.earlier is None for window in of_turns(workplace, "15s").search)


def test_a_burst_at_the_beginning_of_a_trace_is_no_reason_to_refuse_it(workplace):
    """More before each window would leave one request after it."""
    at_s = [*(i / 10 for i in range(2000)), 700.0]
    rows = [
        {"arrival_s": at, "input_tokens": 64, "output_tokens": 5, "block_tokens": 32, "block_ids": [i % 1500, i + 1500]}
        for i, at in enumerate(at_s)
    ]
    write(workplace, "".join(json.dumps(row) + "\n" for row in rows), "trace.jsonl")
    text = GOOD.replace("trace.csv, window: 10s", "trace.jsonl, window: 10s, heldout_windows: 1, fill_cache: 10s")
    assert workload.read(studyfile.load(write(workplace, text))).fill_s == 10
