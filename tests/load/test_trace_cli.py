"""`tuner trace`: what it shows agrees with pandas, what it writes can be read, what it refuses says what to do."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tuner.cli.trace import app
from tuner.errors import UsageError
from tuner.load import formats

SHARED = Path(__file__).parents[2] / "../shared/traces"
CONVERSATION = "mooncake_fast25_conversation.first4000.jsonl"


def shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no shared trace {name}")
    return str(path)


def run(*arguments: object) -> str:
    """The command's stdout; errors come as they are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def table(name: str) -> pd.DataFrame:
    """A shared trace as pandas reads it: arrival_s, input, output, blocks (lists), without a line of ours."""
    path = shared(name)
    if name.startswith("azure"):
        frame = pd.read_csv(path)
        stamps = pd.to_datetime(frame["TIMESTAMP"])
        frame["arrival_s"] = (stamps - stamps.min()).dt.total_seconds()
        # total_seconds rounds to microseconds; these files have no finer digits
        assert (stamps.astype("datetime64[ns]").astype("int64") % 1000 == 0).all()
        return frame.rename(columns={"ContextTokens": "input", "GeneratedTokens": "output"})
    if name.startswith("mooncake"):
        frame = pd.DataFrame(map(json.loads, Path(path).read_text().splitlines()))
        frame["arrival_s"] = (frame["timestamp"] - frame["timestamp"].min()) / 1000
        return frame.rename(columns={"input_length": "input", "output_length": "output", "hash_ids": "blocks"})
    return pd.read_csv(path).rename(columns={"num_prefill_tokens": "input", "num_decode_tokens": "output"})


def length_line(tokens: pd.Series) -> str:
    """Nearest rank by pandas' own definition of it: the inverse of the empirical distribution."""
    p50, p90, p99 = (int(tokens.sort_values().iloc[math.ceil(p / 100 * len(tokens)) - 1]) for p in (50, 90, 99))
    return f"p50 {p50}, p90 {p90}, p99 {p99}, max {tokens.max()}, mean {tokens.mean():.1f}, total {tokens.sum()}"


@pytest.mark.parametrize("name", ["azure_llm_2023_code.csv", "azure_llm_2023_conv.csv", CONVERSATION])
def test_info_agrees_with_pandas_to_the_last_digit_shown(name):
    page, frame = run("info", shared(name)), table(name)
    gaps = frame["arrival_s"].sort_values().diff().dropna()
    duration_s = frame["arrival_s"].max() - frame["arrival_s"].min()
    assert f"requests        {len(frame)}\n" in page
    assert f"duration        {duration_s:.1f} s, longest gap {gaps.max():.1f} s\n" in page
    cv = gaps.std(ddof=0) / gaps.mean()
    assert f"arrival rate    {1 / gaps.mean():.2f} /s, burstiness (CV of the gaps) {cv:.2f}\n" in page
    assert f"input tokens    {length_line(frame['input'])}\n" in page
    assert f"output tokens   {length_line(frame['output'])}\n" in page
    if "blocks" not in frame:
        assert "prefix sharing  none known\n" in page
        return
    blocks = frame[["input", "blocks"]].explode("blocks").reset_index(names="row")
    first = blocks.drop_duplicates("blocks").set_index("blocks")["row"]
    seen = blocks["row"] > blocks["blocks"].map(first)
    # every shared block of these files is full: tokens are counted from each row's last block being partial
    place = blocks.groupby("row").cumcount()
    tokens = (blocks["input"] - place * 512).clip(upper=512)
    assert (
        f"prefix sharing  {seen.mean():.1%} of blocks (512 tokens each) and "
        f"{tokens[seen].sum() / frame['input'].sum():.1%} of prompt tokens seen before\n" in page
    )


def test_info_agrees_with_pandas_for_lengths_without_arrivals():
    page = run("info", shared("vidur_arxiv_lengths.first1000.csv"), "--arrivals", "poisson:2")
    frame = table("vidur_arxiv_lengths.first1000.csv")
    assert f"requests        {len(frame)}\n" in page
    assert f"input tokens    {length_line(frame['input'])}\n" in page
    assert f"output tokens   {length_line(frame['output'])}\n" in page


def test_the_published_table_of_the_shared_traces_comes_out():
    """The figures of the traces' own README, computed by others."""
    expected = {
        "azure_llm_2023_code.csv": ("3435.9 s", "2.57 /s", "13.15", "p50 1469, p90 5194, p99 7436, max 7437"),
        "azure_llm_2023_conv.csv": ("3501.7 s", "5.53 /s", "1.09", "p50 1020, p90 2735, p99 4142, max 14050"),
        CONVERSATION: ("1302.0 s", "3.07 /s", "2.87", "p50 7864, p90 28981, p99 94407, max 123192", "32.6% of blocks"),
    }
    for name, figures in expected.items():
        page = run("info", shared(name))
        assert all(figure in page for figure in figures), page


def test_the_pictures_count_every_request():
    page = run("info", shared("azure_llm_2023_conv.csv"))
    histograms = [int(n) for n in re.findall(r"^ *\d+ to \d+ .* (\d+)$", page, flags=re.MULTILINE)]
    assert sum(histograms) == 2 * 19366  # by input and by output
    spark = page.splitlines()[page.splitlines().index("") + 2]
    assert len(spark) == 60 and "█" in spark and set(spark) <= set(" ▁▂▃▄▅▆▇█")


def test_info_as_json_has_full_precision_and_the_reading_report(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"arrival_s": i / 3, "input_tokens": 16, "output_tokens": 2} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "nonsense\n")
    facts = json.loads(run("info", path, "--json"))
    assert facts["format"] == "jsonl" and facts["requests"] == 40
    assert facts["rate_per_s"] == pytest.approx(3.0, rel=1e-12) and facts["cv"] == pytest.approx(0.0, abs=1e-9)
    assert facts["input"]["p99"] == 16 and facts["sharing"]["token_share"] == 0.0
    assert facts["reading"]["bad"] == {"not JSON": 1} and facts["reading"]["first_bad"] == [[41, "not JSON"]]


def test_burstiness_is_the_population_standard_deviation_of_the_gaps_over_their_mean(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"arrival_s": at, "input_tokens": 16, "output_tokens": 2} for at in (0, 1, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = json.loads(run("info", path, "--json"))
    assert facts["cv"] == pytest.approx(0.5)  # gaps 1 and 3: mean 2, deviation 1
    assert (facts["rate_per_s"], facts["longest_gap_s"]) == (0.5, 3.0)


def test_skipped_lines_are_told_on_stderr_and_data_stays_alone_on_stdout(tmp_path):
    path = tmp_path / "t.csv"
    rows = ["2023-11-16 18:15:46,1,2"] * 40
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "x"]))
    result = CliRunner().invoke(app, ["info", str(path), "--json"])
    assert f"{path}:42: wrong number of columns" in result.stderr
    assert json.loads(result.stdout)["requests"] == 40


def test_a_trace_of_one_request_or_of_no_time_has_no_rate(tmp_path):
    path = tmp_path / "t.jsonl"
    row = json.dumps({"arrival_s": 5, "input_tokens": 16, "output_tokens": 2}) + "\n"
    for count in (1, 3):
        path.write_text(row * count)
        assert "arrival rate    -, burstiness (CV of the gaps) -" in run("info", path)
        assert json.loads(run("info", path, "--json"))["rate_per_s"] is None


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_convert_keeps_everything_that_info_shows(tmp_path, ending):
    out = tmp_path / f"{CONVERSATION.removesuffix('.jsonl')}.{ending}"
    run("convert", shared(CONVERSATION), out)
    before, after = run("info", shared(CONVERSATION)), run("info", out)
    assert after.splitlines()[1:] == before.splitlines()[1:]


def test_convert_scales_to_a_small_model(tmp_path):
    out = tmp_path / "small.parquet"
    limits = ("--max-input-tokens", 300, "--max-output-tokens", 20)
    run("convert", shared("azure_llm_2023_conv.csv"), out, "--length-factor", 0.1, "--rate-factor", 0.5, *limits)
    facts = json.loads(run("info", out, "--json"))
    assert facts["input"]["max"] == 300 and facts["output"]["max"] == 20
    assert facts["input"]["p50"] == 102 and facts["duration_s"] == pytest.approx(2 * 3501.721937)


def test_cut_by_time_and_by_count_give_the_same_requests(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    source = shared("azure_llm_2023_code.csv")
    trace = formats.read(source)
    first, stop = (int((trace.arrival_s < edge).sum()) for edge in (600.0, 1200.0))
    run("cut", source, one, "--from-s", 600, "--to-s", 1200)
    run("cut", source, other, "--first", first, "--count", stop - first)
    assert one.read_bytes() == other.read_bytes()
    assert formats.read(one).arrival_s[0] == 0 and len(formats.read(one)) == stop - first


def test_a_cut_keeps_the_silence_at_its_end_and_says_how_much_was_at_its_beginning(tmp_path):
    source, out, lines = tmp_path / "t.jsonl", tmp_path / "c.parquet", tmp_path / "c.jsonl"
    rows = [{"arrival_s": at, "input_tokens": 16, "output_tokens": 2} for at in (0, 40, 41, 42, 100)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = CliRunner().invoke(app, ["cut", str(source), str(out), "--from-s", "10", "--to-s", "70"]).stderr
    assert "No request came in the first 30.0 s" in said and "3 requests over 2.0 s, then none until 30.0 s\n" in said
    facts = json.loads(run("info", out, "--json"))
    assert (facts["lasts_s"], facts["rate_per_s"]) == (30.0, 0.1)
    assert "duration        2.0 s to the last request, ends at 30.0 s" in run("info", out)
    said = CliRunner().invoke(app, ["convert", str(out), str(lines), "--rate-factor", "2"]).stderr
    assert "then none until 15.0 s, which .jsonl has no place for" in said
    assert json.loads(run("info", lines, "--json"))["lasts_s"] is None


def test_synth_lasts_as_long_as_was_asked_for(tmp_path):
    out = tmp_path / "s.parquet"
    run("synth", out, "--profile", "azure-code", "--duration-s", "600", "--seed", "2")
    facts = json.loads(run("info", out, "--json"))
    assert facts["lasts_s"] == 600 and facts["rate_per_s"] == facts["requests"] / 600


def test_cut_splits_into_files_of_search_and_held_out_windows(tmp_path):
    folder = tmp_path / "windows"
    run("cut", shared("azure_llm_2023_conv.csv"), folder, "--search", 2, "--held-out", 1, "--max-requests", 100)
    assert sorted(path.name for path in folder.iterdir()) == [
        "held-out-0.parquet", "search-0.parquet", "search-1.parquet"
    ]  # fmt: skip
    assert all(len(formats.read(path)) == 100 for path in folder.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--from-s", 1, "--first", 2], ["--search", 1, "--to-s", 2]])
def test_cut_without_one_clear_window_says_how_to_give_it(tmp_path, arguments):
    with pytest.raises(UsageError, match="--from-s and --to-s, or --first and --count, or --search"):
        run("cut", tmp_path / "t", tmp_path / "o.jsonl", *arguments)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cut", "t", "o.jsonl", "--first", "0", "--max-requests", "3"], "--max-requests only counts with --search"),
        (["cut", "t", "o.jsonl", "--to-s", "9", "--max-seconds", "3"], "--max-seconds only counts with --search"),
        (["cut", "t", "o.jsonl", "--to-s", "9", "--by", "time"], "--by only counts with --search"),
        (["synth", "o.jsonl", "--profile", "p", "--lengths", "foo"], "--lengths only counts with --fit"),
        (["synth", "o.jsonl", "--profile", "p", "--format", "csv"], "--format only counts with --fit"),
        (["synth", "o.jsonl", "--profile", "p", "--from-s", "0"], "--from-s only counts with --rates"),
        (["synth", "o.jsonl", "--profile", "p", "--rates", "r", "--duration-s", "9"], "only counts without --rates"),
        (["synth", "o.jsonl", "--profile", "p", "--prefix-groups", "5"], "--prefix-groups only counts with --share"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(words, says):
    with pytest.raises(UsageError, match=says):
        run(*words)


@pytest.mark.parametrize("seconds", ["nan", "0", "-1"])
def test_windows_of_no_length_are_refused(tmp_path, seconds):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n' * 9)
    with pytest.raises(UsageError, match="is no window's length"):
        run("cut", trace, tmp_path / "windows", "--search", 1, "--max-seconds", seconds)
    assert CliRunner().invoke(app, ["cut", str(trace), "o.jsonl", "--first", "-5", "--count", "10"]).exit_code == 2


def test_synth_makes_a_trace_from_a_profile_and_says_where_it_is(tmp_path):
    out = tmp_path / "made.parquet"
    arguments = ("synth", out, "--profile", "azure-conversation", "--requests", 500, "--max-input-tokens", 512)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and "500 requests" in result.stderr and result.stdout == ""
    trace = formats.read(out)
    assert len(trace) == 500 and trace.input_tokens.max() == 512


def test_synth_follows_a_trace_with_its_own_or_with_given_arrivals(tmp_path):
    out, source = tmp_path / "made.parquet", shared("azure_llm_2023_code.csv")
    run("synth", out, "--fit", source, "--requests", 20_000)
    assert 10 < json.loads(run("info", out, "--json"))["cv"] < 16
    run("synth", out, "--fit", source, "--requests", 20_000, "--arrivals", "poisson")
    facts = json.loads(run("info", out, "--json"))
    assert facts["cv"] == pytest.approx(1.0, abs=0.05) and facts["rate_per_s"] == pytest.approx(2.57, rel=0.05)
    run("synth", out, "--fit", source, "--duration-s", 100, "--arrivals", "poisson:50", "--lengths", "lognormal")
    assert json.loads(run("info", out, "--json"))["rate_per_s"] == pytest.approx(50, rel=0.1)


def test_synth_adds_prefixes_and_takes_servegen_rates(tmp_path):
    out = tmp_path / "made.parquet"
    run("synth", out, "--profile", "azure-conversation", "--requests", 2000, "--share", 0.5)
    assert json.loads(run("info", out, "--json"))["sharing"]["token_share"] == pytest.approx(0.5, abs=0.03)
    rates = shared("servegen_m-large_chunk-0-trace.csv")
    run("synth", out, "--profile", "azure-code", "--rates", rates, "--from-s", 0, "--to-s", 600)
    assert json.loads(run("info", out, "--json"))["requests"] == 799  # 1.3317 requests/s for 600 s


def test_synth_says_where_so_many_prefixes_cannot_share_what_is_asked_for(tmp_path):
    words = ["synth", str(tmp_path / "s.parquet"), "--profile", "azure-conversation", "--share", "0.8", "--requests"]
    few, many = (CliRunner().invoke(app, [*words, str(count), "--seed", "3"]) for count in (100, 4000))
    assert few.exit_code == many.exit_code == 0
    assert "not 80%: more do not where 100 requests begin with 20 prefixes" in few.stderr
    assert "not 80%" not in many.stderr


def test_synth_without_something_to_follow_says_so(tmp_path):
    for arguments in ([], ["--profile", "azure-code", "--fit", tmp_path / "t"]):
        with pytest.raises(UsageError, match="either --profile or --fit"):
            run("synth", tmp_path / "o.jsonl", "--requests", 5, *arguments)
    with pytest.raises(UsageError, match="either a number of requests or a duration"):
        run("synth", tmp_path / "o.jsonl", "--profile", "azure-code")
    with pytest.raises(UsageError, match="poisson:RATE"):
        run("synth", tmp_path / "o.jsonl", "--profile", "azure-code", "--requests", 5, "--arrivals", "poisson")


def commands_of_the_docs() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]


def test_every_command_of_the_docs_runs_in_order(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    Path("model").mkdir()
    words.save("model/tokenizer.json")
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello hello"}]}
    Path("chat.jsonl").write_text(json.dumps(chat) + "\n")
    Path("servegen.csv").write_text("0,0.5,2,Gamma,0.25,8\n600,0.7,2,Weibull,0.5,1\n1200,0,0,,0,0\n")
    commands = commands_of_the_docs()
    assert len(commands) > 10
    for command in commands:
        program, group, *arguments = command.split()
        assert (program, group) == ("tuner", "trace")
        run(*arguments)
    assert sorted(path.name for path in Path("windows").iterdir()) == [
        "held-out-0.parquet", "search-0.parquet", "search-1.parquet"
    ]  # fmt: skip
    assert len(formats.read("client.parquet")) == 720
    assert formats.read("chat.parquet").texts == ("hello",)


def test_the_docs_name_every_format_and_every_command():
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in formats.FORMATS)
    for command in ("info", "convert", "cut", "synth"):
        assert f"tuner trace {command}" in text


def test_convert_drops_the_texts_only_where_a_prompt_is_longer_and_says_so(tmp_path):
    chat, out = tmp_path / "chat.jsonl", tmp_path / "out.jsonl"
    row = {"arrival_s": 0, "input_tokens": 40, "output_tokens": 5, "text": "so many words"}
    chat.write_text(json.dumps(row) + "\n" + json.dumps(row | {"arrival_s": 1, "input_tokens": 60}) + "\n")
    for most, kept in ((60, True), (50, False)):
        result = CliRunner().invoke(app, ["convert", str(chat), str(out), "--max-input-tokens", str(most)])
        assert result.exit_code == 0
        assert (formats.read(out).texts is not None) == kept
        assert ("1 of 2 prompts got another length" in result.stderr) != kept


@pytest.mark.parametrize("command", ["info", "convert", "cut", "synth"])
def test_a_seed_below_zero_is_refused(command):
    words = {"info": ["t"], "convert": ["t", "o.jsonl"], "cut": ["t", "o.jsonl"], "synth": ["o.jsonl"]}[command]
    result = CliRunner().invoke(app, [command, *words, "--seed", "-1"])
    assert result.exit_code == 2 and "--seed" in result.output


def test_no_number_of_requests_and_too_many_are_refused(tmp_path):
    words = ["synth", str(tmp_path / "o.jsonl"), "--profile", "azure-code", "--requests"]
    assert CliRunner().invoke(app, [*words, "-5"]).exit_code == 2
    with pytest.raises(UsageError, match="Give a number from 1 to 100,000,000"):
        run(*words, "100000000000000")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--length-factor", "1e6"), "tokens"),
        (("--length-factor", "1e300"), "tokens"),
        (("--rate-factor", "1e-300"), "after the year 5138"),
    ],
)
@pytest.mark.parametrize("blocks", [{}, {"block_tokens": 16, "block_ids": [1, 2]}])
def test_convert_writes_nothing_that_it_would_not_read(tmp_path, words, says, blocks):
    source, out = tmp_path / "t.jsonl", tmp_path / "out.parquet"
    rows = [{"arrival_s": i, "input_tokens": 32, "output_tokens": 16, **blocks} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=says):
        run("convert", source, out, *words)
    assert not out.exists()
    if words[0] == "--length-factor":  # what is cut afterwards may be scaled by anything
        run("convert", source, out, *words, "--max-input-tokens", "100", "--max-output-tokens", "7")
        assert formats.read(out).output_tokens.tolist() == [7, 7, 7]


def test_a_trace_that_cannot_be_written_to_its_end_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    source, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"arrival_s": 0, "input_tokens": 3, "output_tokens": 1, "text": "a"}) + "\n")
    out.write_text("before")

    def full(row, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.load.tracefile.json.dumps", full)
    with pytest.raises(UsageError, match="No space left on device"):
        run("convert", source, out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "t.jsonl"]
