"""What each reader takes, what it refuses, and what it says about it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import UsageError
from tuner.load import formats, tracefile
from tuner.load.formats import blocks as blocks_module
from tuner.load.formats import tables
from tuner.load.formats.report import Tally
from tuner.load.trace import Trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def save(folder: Path, text: str | bytes, name: str = "t") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def test_azure_2023_is_read_to_the_tenth_of_a_microsecond_with_crlf_and_an_unterminated_last_line(tmp_path):
    text = f"{AZURE}\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:46.6805907,396,109"
    trace, report = formats.read_with_report(save(tmp_path, text))
    assert report.format == "azure"
    assert trace.arrival_s.tolist() == [0.0, 7e-7]
    assert trace.input_tokens.tolist() == [374, 396] and trace.input_tokens.dtype == np.int64
    assert trace.output_tokens.tolist() == [44, 109]
    assert trace.block_tokens == 0 and trace.block_offsets.tolist() == [0, 0, 0]
    assert report.messages() == []


def test_azure_2024_has_zones_and_sometimes_no_fraction(tmp_path):
    rows = ("2024-05-10 00:00:00.009930+00:00,10,1", "2024-05-10 00:00:01+00:00,11,2", "2024-05-10 02:00:02+02:00,12,3")
    trace = formats.read(save(tmp_path, lines(AZURE, *rows)))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.99007, 1.99007], abs=1e-12)


def test_burstgpt_is_read_by_column_name_and_failed_requests_are_counted_and_left_out(tmp_path):
    old = lines(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,GPT-4,100,0,100,API log",
        "50,GPT-4,0,0,0,API log",
        "118.5,GPT-4,417,276,693,API log",
    )
    new = lines(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,,3.2,ChatGPT,472,18,490,Conversation log",
        "118.5,7,,GPT-4,417,276,693,API log",
    )
    for text, failed in ((old, 2), (new, 0)):
        trace, report = formats.read_with_report(save(tmp_path, text))
        assert report.format == "burstgpt"
        assert trace.arrival_s.tolist() == [0.0, 113.5]
        assert trace.input_tokens.tolist() == [472, 417] and trace.output_tokens.tolist() == [18, 276]
        assert sum(report.left_out.values()) == failed and not report.bad


def test_vidur_with_arrivals_is_a_trace_and_without_needs_an_arrival_process(tmp_path):
    timed = formats.read(save(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,5,6\n1.5,7,8\n"))
    assert timed.arrival_s.tolist() == [0.0, 1.5] and timed.input_tokens.tolist() == [5, 7]
    path = save(tmp_path, "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n5,6,11,0.8\n7,8,15,0.9\n")
    with pytest.raises(UsageError, match=r"without arrival times.*--arrivals"):
        formats.read(path)
    trace = formats.read(path, arrivals="poisson:2")
    assert trace.input_tokens.tolist() == [5, 7] and trace.arrival_s[0] == 0 < trace.arrival_s[1]


def test_mooncake_is_in_milliseconds_with_512_token_blocks(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 4500, "input_length": 1025, "output_length": 6, "hash_ids": [0, 2, 3]},
        {"timestamp": 4500, "input_length": 3, "output_length": 6, "hash_ids": []},
    ]
    trace, report = formats.read_with_report(save(tmp_path, lines(*rows)))
    assert report.format == "mooncake"
    assert trace.arrival_s.tolist() == [0.0, 1.5, 1.5]
    assert trace.block_tokens == 512
    assert trace.block_ids.tolist() == [0, 1, 0, 2, 3] and trace.block_offsets.tolist() == [0, 2, 5, 5]


def test_bailian_is_in_seconds_with_16_token_blocks(tmp_path):
    row = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 17, "output_length": 2, "turn": 1}
    trace, report = formats.read_with_report(save(tmp_path, lines(row | {"hash_ids": [8, 9]})))
    assert (report.format, trace.block_tokens, trace.block_ids.tolist()) == ("bailian", 16, [8, 9])


def test_hex_digests_as_block_ids_become_numbers_equal_where_the_digests_are(tmp_path):
    row = {"timestamp": 0, "input_length": 600, "output_length": 1}
    text = lines(row | {"hash_ids": ["a1", "b2"]}, row | {"hash_ids": ["a1", "c3"]})
    assert formats.read(save(tmp_path, text)).block_ids.tolist() == [0, 1, 0, 2]


def test_block_ids_beyond_the_prompt_are_ignored_and_said(tmp_path):
    row = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [4, 5, 6]}
    trace, report = formats.read_with_report(save(tmp_path, lines(row)))
    assert trace.block_ids.tolist() == [4]
    assert any("more prefix blocks" in message for message in report.messages())


def test_out_of_order_lines_are_sorted_with_their_blocks_and_said(tmp_path):
    rows = [
        {"timestamp": 2000, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]},
        {"timestamp": 1000, "input_length": 500, "output_length": 1, "hash_ids": [3]},
        {"timestamp": 2000, "input_length": 601, "output_length": 3, "hash_ids": [1, 4]},
    ]
    trace, report = formats.read_with_report(save(tmp_path, lines(*rows)))
    assert trace.arrival_s.tolist() == [0.0, 1.0, 1.0]
    assert trace.output_tokens.tolist() == [1, 2, 3]
    assert trace.block_ids.tolist() == [3, 1, 2, 1, 4] and trace.block_offsets.tolist() == [0, 1, 3, 5]
    assert any("sorted" in message for message in report.messages())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tokenizer that makes one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        word: i
        for i, word in enumerate(["[UNK]", "what", "is", "the", "capital", "of", "france", "paris", "a", "b", "c"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_sharegpt_gives_first_prompt_and_reply_counted_by_the_tokenizer(tmp_path, model):
    talk = [{"from": "human", "value": "what is the capital"}, {"from": "gpt", "value": "paris paris"}]
    broken = [{"conversations": [{"from": "human", "value": "alone"}]}]
    for text in (json.dumps([{"id": "x", "conversations": talk}, *broken]), lines({"conversations": talk}, *broken)):
        path = save(tmp_path, text)
        trace, report = formats.read_with_report(path, arrivals="poisson:1", tokenizer=model)
        assert report.format == "sharegpt"
        assert trace.texts == ("what is the capital",)
        assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([4], [2])
        assert report.bad == {"no prompt with a reply": 1} and report.first_bad[0][0] == 2


def test_texts_without_a_tokenizer_say_what_to_give(tmp_path):
    talk = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "paris"}]
    with pytest.raises(UsageError, match="--tokenizer"):
        formats.read(save(tmp_path, lines({"conversations": talk})), arrivals="poisson:1")


def test_openai_chat_logs_are_read_in_their_three_shapes(tmp_path, model):
    ask = {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image_url"}]}
    usage = {"prompt_tokens": 30, "completion_tokens": 7}
    plain = {"messages": [{"role": "system", "content": "a b"}, ask, {"role": "assistant", "content": "paris c"}]}
    logged = {"request": {"messages": [ask]}, "response": {"created": 5, "usage": usage, "choices": []}}
    batch = {"body": {"messages": [ask]}, "response": {"body": {"choices": [{"message": {"content": "a"}}]}}}
    trace = formats.read(save(tmp_path, lines(plain)), tokenizer=model, arrivals="poisson:1")
    assert (trace.texts, trace.input_tokens[0], trace.output_tokens[0]) == (("a b\nwhat is",), 4, 2)
    trace = formats.read(save(tmp_path, lines(logged)))
    assert (trace.texts, trace.input_tokens[0], trace.output_tokens[0]) == (("what is",), 30, 7)
    trace = formats.read(save(tmp_path, lines(batch)), tokenizer=model, arrivals="poisson:1")
    assert (trace.texts, trace.input_tokens[0], trace.output_tokens[0]) == (("what is",), 2, 1)


def test_half_a_surrogate_pair_becomes_text_that_can_be_sent(tmp_path, model):
    turns = r'{"conversations": [{"from": "human", "value": "a \ud800"}, {"from": "gpt", "value": "b"}]}'
    for text in (turns, r'{"prompt": "a \ud800", "output_tokens": 1}'):
        trace = formats.read(save(tmp_path, text), tokenizer=model, arrivals="poisson:1")
        assert trace.texts == ("a ?",)


def test_vllm_custom_has_a_prompt_and_an_output_length(tmp_path, model):
    text = lines({"prompt": "what is the capital of france", "output_tokens": 9})
    trace, report = formats.read_with_report(save(tmp_path, text), tokenizer=model, arrivals="poisson:1")
    assert report.format == "vllm-custom"
    assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([6], [9])


def test_a_log_of_our_own_columns_is_read(tmp_path):
    trace = formats.read(save(tmp_path, "id,arrival_s,input_tokens,output_tokens\n7,10.5,100,20\n8,11,50,5\n"))
    assert trace.arrival_s.tolist() == [0.0, 0.5]
    assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([100, 50], [20, 5])


def test_a_servegen_profile_is_refused_with_the_command_that_uses_it(tmp_path):
    with pytest.raises(UsageError, match="tuner trace synth OUT --rates"):
        formats.read(save(tmp_path, "0,1.3,8.6,Weibull,0.37,0.39\r\n600,0,0,,0,0\r\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n\n", "not recognised"),
        (b"a,b\n1,2\n", "not recognised: its columns are a, b. Give a CSV file with a header: arrival_s, input_tokens"),
        (b"TIMESTAMP;ContextTokens;GeneratedTokens\n1;2;3\n", "separated by ';' instead of ','"),
        (b'{"a": 1, "b": 2}\n', "not recognised: its lines have the keys a, b. Give"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:3d\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "Unpack"),
        ("TIMESTAMP".encode("utf-16"), "iconv"),
        (AZURE.encode() + b"\n", "no request"),
        (b"PAR1 and no more", "Parquet"),
    ],
)
def test_a_file_that_is_no_trace_says_what_it_is(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        formats.read(save(tmp_path, content))


def test_a_missing_file_and_a_folder_are_usage_errors(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        for format in ("auto", "azure", "parquet", "jsonl"):
            with pytest.raises(UsageError):
                formats.read(path, format)


def test_format_forces_the_reader_and_an_unknown_one_lists_the_names(tmp_path):
    row = {"timestamp": 2000, "input_length": 20, "output_length": 1, "hash_ids": [1, 2]}
    path = save(tmp_path, lines(row, row | {"timestamp": 4000}))
    assert formats.read(path).arrival_s[1] == 2.0
    assert formats.read(path, "bailian").arrival_s[1] == 2000.0
    with pytest.raises(UsageError, match="azure, burstgpt"):
        formats.read(path, "nonsense")
    with pytest.raises(UsageError, match=r":1: the header does not name"):
        formats.read(path, "azure")


def test_a_column_that_is_named_twice_is_not_guessed_at(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival_s,input_tokens,output_tokens,user,input_tokens,user\n0.5,700,120,a,7,b\n")
    with pytest.raises(UsageError, match=r"log.csv:1: the header names the column input_tokens 2 times"):
        formats.read(path)
    path.write_text("arrival_s,input_tokens,output_tokens,user,user\n0.5,700,120,a,b\n")
    assert formats.read(path).input_tokens[0] == 700


# line, kind of mistake
BAD_AZURE = [
    ("2023-11-16 18:15:46,1", "wrong number of columns"),
    ("2023-11-16 18:15:46,1,2,3", "wrong number of columns"),
    ("yesterday,1,2", "time is not a timestamp"),
    ("2023-13-16 18:15:46,1,2", "time is not a timestamp"),
    ("1923-11-16 18:15:46,1,2", "time is not between 1970 and 2255"),
    ("2023-11-16 18:15:46,-1,2", "token count is not a whole number"),
    ("2023-11-16 18:15:46,1.5,2", "token count is not a whole number"),
    ("2023-11-16 18:15:46,1_0,2", "token count is not a whole number"),
    ("2023-11-16 18:15:46,nan,2", "token count is not a whole number"),
    ("2023-11-16 18:15:46,,2", "token count is not a whole number"),
    ("2023-11-16 18:15:46,99999999,2", "token count is over 10 million"),
    ("2023-11-16 18:15:46,0,2", "token count is too small"),
]


@pytest.mark.parametrize(("line", "kind"), BAD_AZURE)
def test_a_bad_csv_line_is_reported_by_number_and_kind_and_its_neighbours_are_kept(tmp_path, line, kind):
    good = [f"2023-11-16 18:15:{second}.5,{second},7" for second in range(10, 50)]
    text = lines(AZURE, *good[:20], line, *good[20:])
    trace, report = formats.read_with_report(save(tmp_path, text))
    assert trace.input_tokens.tolist() == list(range(10, 50))
    assert report.bad == {kind: 1} and report.first_bad == ((22, kind),)
    assert f":22: {kind}" in report.messages()[0]


def test_blank_lines_are_no_lines_but_keep_the_numbering(tmp_path):
    good = ["2023-11-16 18:15:46,1,2"] * 30
    trace, report = formats.read_with_report(save(tmp_path, lines("", AZURE, "", *good, " ", "x")))
    assert len(trace) == 30 and report.lines == 31
    assert report.first_bad == ((35, "wrong number of columns"),)


# line, kind of mistake
BAD_JSON = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"arrival_s": 1, "input_tokens": 1}', "no output_tokens"),
    ('{"arrival_s": NaN, "input_tokens": 1, "output_tokens": 1}', "time is negative, infinite or too large"),
    ('{"arrival_s": -1, "input_tokens": 1, "output_tokens": 1}', "time is negative, infinite or too large"),
    ('{"arrival_s": true, "input_tokens": 1, "output_tokens": 1}', "time is not a number"),
    ('{"arrival_s": 1, "input_tokens": true, "output_tokens": 1}', "token count is not a whole number"),
    ('{"arrival_s": 1, "input_tokens": 1e300, "output_tokens": 1}', "token count is over 10 million"),
    ('{"arrival_s": 1, "input_tokens": 1, "output_tokens": 1, "block_ids": [1]}', "no block_tokens"),
    (
        '{"arrival_s": 1, "input_tokens": 1, "output_tokens": 1, "block_tokens": 1, "block_ids": [-1]}',
        "block ids are not whole numbers",
    ),
    ('{"arrival_s": 1' + "0" * 5000 + ', "input_tokens": 1, "output_tokens": 1}', "not JSON"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "kind"), BAD_JSON)
def test_a_bad_json_line_is_reported_by_number_and_kind(tmp_path, line, kind):
    good = [{"arrival_s": i, "input_tokens": 5, "output_tokens": 6} for i in range(40)]
    trace, report = formats.read_with_report(save(tmp_path, lines(*good[:20], line, *good[20:])), "jsonl")
    assert len(trace) == 40
    assert report.first_bad == ((21, kind),)


@pytest.mark.parametrize("unit, requests, said", [(1, 20, 0), (1000, 20, 1), (1000, 9, 0)])
def test_times_of_our_own_that_may_be_milliseconds_are_pointed_out(tmp_path, unit, requests, said):
    rows = [(n * unit // 5, 100, 10) for n in range(requests)]
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(f"{t},{i},{o}" for t, i, o in rows))
    lines.write_text("\n".join(f'{{"arrival_s": {t}, "input_tokens": {i}, "output_tokens": {o}}}' for t, i, o in rows))
    for path in (table, lines):
        messages = formats.read_with_report(path)[1].messages()
        assert (
            messages
            == ["20 requests: one every 200 s, arrival_s being in seconds (in milliseconds it would be 5 a second)"]
            * said
        )
    assert not formats.read_with_report(table, arrivals="poisson:0.01")[1].messages()


def test_reading_stops_at_the_first_bad_line_too_many_and_names_it(tmp_path):
    good = ["2023-11-16 18:15:46,1,2"] * 30
    path = save(tmp_path, lines(AZURE, *good, "x", *good, "y", *good, "z"))
    assert len(formats.read(path, max_bad=3)) == 90
    with pytest.raises(UsageError, match=r":94: .*3 bad lines"):
        formats.read(path, max_bad=2)
    with pytest.raises(UsageError, match=r":32: "):
        formats.read(path, max_bad=0)


def test_by_default_more_than_a_tenth_of_bad_lines_is_refused(tmp_path):
    text = lines(AZURE, *["2023-11-16 18:15:46,1,2"] * 40, *["nonsense"] * 5)
    with pytest.raises(UsageError, match=r":42: .*too many"):
        formats.read(save(tmp_path, text))


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    counts = np.array([2, 0, 1])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    arrival_s = np.concatenate([[0.0], np.cumsum(rng.random(2) / 3)])
    bare = Trace("t", arrival_s, np.array([30, 7, 16]), np.array([1, 2, 3]), 0, np.empty(0, int), np.zeros(4, int))
    blocked = Trace("t", arrival_s, bare.input_tokens, bare.output_tokens, 16, np.array([2**62, 5, 5]), offsets)
    texted = Trace("t", arrival_s, bare.input_tokens, bare.output_tokens, 0, *no_blocks(3), texts=("a\nb", "é😀", "{"))
    for trace in (bare, blocked, texted):
        for ending in ("jsonl", "parquet"):
            path = tmp_path / f"t.{ending}"
            tracefile.write(trace, path)
            back, report = formats.read_with_report(path)
            assert report.format == ending
            same(back, trace)


def no_blocks(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, int), np.zeros(n + 1, int)


def same(one: Trace, other: Trace) -> None:
    for column in ("arrival_s", "input_tokens", "output_tokens", "block_ids", "block_offsets"):
        assert getattr(one, column).tolist() == getattr(other, column).tolist(), column
    assert (one.block_tokens, one.texts) == (other.block_tokens, other.texts)


def test_another_ending_or_an_unwritable_place_is_a_usage_error(tmp_path):
    trace = Trace("t", np.zeros(1), np.ones(1, int), np.ones(1, int), 0, *no_blocks(1))
    for path in (tmp_path / "t.csv", tmp_path / "none" / "t.jsonl", tmp_path / "none" / "t.parquet"):
        with pytest.raises(UsageError):
            tracefile.write(trace, path)


def test_a_damaged_parquet_file_is_refused_by_its_checksum(tmp_path):
    trace = Trace("t", np.arange(5000.0), np.arange(1, 5001), np.ones(5000, int), 0, *no_blocks(5000))
    path = tmp_path / "t.parquet"
    tracefile.write(trace, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError):
        formats.read(path)


def test_a_parquet_file_with_a_block_that_has_no_number_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    table = pa.table({"arrival_s": [1.0], "input_tokens": [32], "output_tokens": [1], "block_ids": [[0, None]]})
    parquet.write_table(table.replace_schema_metadata({"tuner.block_tokens": "16"}), path)
    with pytest.raises(UsageError, match="block_ids lacks a value"):
        formats.read(path)


@pytest.mark.parametrize("lasts_s", ["0.5", "nan", "inf", "soon"])
def test_a_parquet_file_that_ends_before_its_last_request_is_refused(tmp_path, lasts_s):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    table = pa.table({"arrival_s": [0.0, 1.0], "input_tokens": [32, 32], "output_tokens": [1, 1]})
    parquet.write_table(table.replace_schema_metadata({"tuner.lasts_s": lasts_s}), path)
    with pytest.raises(UsageError, match=r"t\.parquet"):
        formats.read(path)
    parquet.write_table(table.replace_schema_metadata({"tuner.lasts_s": "1.5"}), path)
    assert formats.read(path).lasts_s == 1.5


def test_requests_that_are_to_arrive_at_other_times_do_not_end_where_the_file_did(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    table = pa.table({"arrival_s": [0.0, 1.0], "input_tokens": [32, 32], "output_tokens": [1, 1]})
    parquet.write_table(table.replace_schema_metadata({"tuner.lasts_s": "1.5"}), path)
    assert np.isnan(formats.read(path, arrivals="poisson:4").lasts_s)


def test_a_parquet_file_of_another_kind_names_the_missing_columns(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"arrival_s": [1.0], "input_tokens": [1]}), path)
    with pytest.raises(UsageError, match="no column output_tokens"):
        formats.read(path)
    parquet.write_table(pa.table({"arrival_s": [1.0, 2.0], "input_tokens": [1, 0], "output_tokens": [1, 1]}), path)
    with pytest.raises(UsageError, match="parquet:2: input_tokens"):
        formats.read(path)


# what a number or a date can look like: some are understood, some must not be, by both parsers alike
COUNTS = [
    "5",
    "17",
    "0",
    " 5",
    "5 ",
    "+5",
    "-5",
    "-0",
    "05",
    "5.0",
    "5.5",
    "0x5",
    "1e2",
    "5_0",
    "٥",
    "",
    " ",
    '"5"',
    "5,",
    "9" * 20,
]
DATES = [
    *("2024-05-10 00:00:01", "2024-05-10 00:00:01.5", "2024-05-10T00:00:02.123456789", "2024-05-10 00:00:03Z"),
    *("2024-05-10 00:00:04+00:00", "2024-05-10 02:00:05.25+02:00", "2024-05-10 00:00:60", "2024-05-10 24:00:00"),
    *("2024-05-10 00:00", "2024-05-10 ", "2024-05-10", "2024-05-10 1:2:3", "2024-02-30 00:00:00"),
    *("0001-01-01 00:00:00", "2300-01-01 00:00:00", "1715299200", '"2024-05-10 00:00:06"', " 2024-05-10 00:00:01"),
]
TIMES = [
    "5",
    "5.5",
    "1e3",
    " 5",
    "-5",
    "-0.0",
    "nan",
    "inf",
    "1e400",
    "0x1p3",
    "1_0",
    "",
    "5e-324",
    "1e11",
    "1e12",
    '"7"',
    ".5",
    "5.",
]


def table_rows(times: list[str]):
    """Lines of a table: mostly the first entries of the lists, which are right, so that whole blocks are."""

    def field(choices: list[str]):
        return st.one_of(st.sampled_from(choices[:2]), st.sampled_from(choices[:2]), st.sampled_from(choices))

    row = st.builds(lambda t, a, b: f"{t},{a},{b}", field(times), field(COUNTS), field(COUNTS))
    text = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8)
    return st.lists(st.one_of(row, row, row, row, text), max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    case=st.one_of(
        st.tuples(st.just((AZURE, tables.AZURE)), table_rows(DATES)),
        st.tuples(st.just(("Timestamp,Request tokens,Response tokens", tables.BURSTGPT)), table_rows(TIMES)),
    ),
)
def test_blocks_parsed_at_once_and_lines_parsed_one_by_one_agree(tmp_path_factory, case):
    (header, table), rows = case
    path = save(tmp_path_factory.mktemp("agree"), lines(header, *rows))
    fast, slow = Tally("t", "table", 10**6), Tally("t", "table", 10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_SMALL_BYTES", 20)  # halve down to single lines
        quick = tables.read_table(path, table, fast)
        patch.setattr(tables._Columns, "_parse", lambda self, block: None)
        careful = tables.read_table(path, table, slow)
    for column in ("lines", "bad", "first_bad", "left_out"):
        assert getattr(fast, column) == getattr(slow, column), column
    for column in ("arrival_s", "input_tokens", "output_tokens"):
        assert getattr(quick, column).tolist() == getattr(careful, column).tolist(), column


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b), max_size=20), size=st.integers(1, 64))
def test_blocks_of_any_size_give_the_same_lines_with_the_same_numbers(tmp_path_factory, rows, size):
    text = b"\n".join(rows)
    path = save(tmp_path_factory.mktemp("blocks"), text)
    unmarked = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [(number, row.strip(b"\r \t")) for number, row in enumerate(unmarked, 1) if row.strip(b"\r \t")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "_BLOCK_BYTES", size)
        got = [line for block in blocks_module.blocks(path) for line in block.lines()]
        rest = [line for block in blocks_module.blocks(path, skip_lines=3) for line in block.lines()]
    assert got == expected
    assert rest == [(number, row) for number, row in expected if number > 3]


def chat(**more):
    usage = {"prompt_tokens": 30, "completion_tokens": 7}
    return {
        "messages": [{"role": "user", "content": "a"}],
        "response": {"usage": usage | more.pop("usage", {})},
        **more,
    }


@pytest.mark.parametrize(
    ("created", "kind"), [(1_700_000_000_000, "time is negative, infinite or too large"), ([], "time is not a number")]
)
def test_a_chat_log_whose_times_are_none_is_told_so_and_not_that_it_has_none(tmp_path, created, kind):
    path = save(tmp_path, lines(chat(created=created), chat(created=created)))
    with pytest.raises(UsageError, match=kind) as refused:
        formats.read(path)
    assert refused.value.where == f"{path}:1"
    assert len(formats.read(path, arrivals="poisson:1")) == 2  # then it does not matter


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_chat_without_a_time_among_others_with_one_is_left_out(tmp_path, without):
    chats = [chat(created=5), chat(created=7)]
    path = save(tmp_path, lines(*chats[:without], chat(), *chats[without:]))
    trace, report = formats.read_with_report(path)
    assert trace.arrival_s.tolist() == [0, 2]
    assert (report.bad, report.left_out) == ({}, {"no time": 1})
    assert len(formats.read(path, arrivals="poisson:1")) == 3


def test_a_chat_log_of_which_most_lines_have_no_time_has_none(tmp_path):
    path = save(tmp_path, lines(chat(created=5), chat(), chat()))
    with pytest.raises(UsageError, match="without arrival times"):
        formats.read(path)


def test_a_chat_that_was_never_answered_is_left_out(tmp_path):
    usages = ({"completion_tokens": 0}, {"completion_tokens": 0, "prompt_tokens": 0})
    failed = [chat(created=6, usage=usage) for usage in usages]
    trace, report = formats.read_with_report(save(tmp_path, lines(chat(created=5), *failed)))
    assert len(trace) == 1
    assert (report.bad, report.left_out) == ({}, {"no output tokens (the request failed)": 2})
