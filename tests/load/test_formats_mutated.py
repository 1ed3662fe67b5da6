"""Damaged trace files: a trace that holds what a Trace promises, or a UsageError; never a traceback, never a hang."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tuner.errors import UsageError
from tuner.load import formats, tracefile, windows
from tuner.load.formats import values
from tuner.load.rates import read_rates
from tuner.load.summary import doubling_bins, rate_bins, summarise
from tuner.load.trace import Trace

ROWS = 24
NUMBERS = [
    b"-1",
    b"0",
    b"NaN",
    b"Infinity",
    b"1e309",
    b"-1e-320",
    b"9" * 30,
    b"1" * 5000,
    b"18446744073709551616",
    b"1_0",
]
PIECES = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b'"',
    b",",
    b"{",
    b"[" * 3000,
    b"\xed\xa0\x80",
    b"\n\n",
    b"\\ud800",
]
ENCODINGS = ["utf-16", "utf-32", "cp037"]
BINARY = {"parquet", "parquet-text"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    """A small sound file of every format."""
    folder = tmp_path_factory.mktemp("originals")
    n = range(1, ROWS + 1)
    offsets = np.arange(ROWS + 1) * 2
    trace = Trace(
        "t", np.arange(ROWS) / 3, np.full(ROWS, 20), np.arange(1, ROWS + 1), 16, np.arange(2 * ROWS) // 3, offsets
    )
    texts = Trace(
        "t",
        trace.arrival_s,
        trace.input_tokens,
        trace.output_tokens,
        0,
        np.empty(0, int),
        offsets * 0,
        ("hi é",) * ROWS,
    )
    written = {}
    for name, ending, what in (
        ("parquet", "parquet", trace),
        ("parquet-text", "parquet", texts),
        ("jsonl", "jsonl", trace),
        ("jsonl-text", "jsonl", texts),
    ):
        tracefile.write(what, folder / f"{name}.{ending}")
        written[name] = (folder / f"{name}.{ending}").read_bytes()

    def csv(header: str, row: str, end: str = "\n") -> bytes:
        return (header + end + end.join(row.format(i=i) for i in n)).encode()

    def jsonl(row) -> bytes:
        return b"\n".join(json.dumps(row(i)).encode() for i in n)

    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
    hashed = {"input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    ask = [{"role": "user", "content": "hello"}]
    return written | {
        "azure": csv("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:{i:02d}.1234567,{i},7", "\r\n"),
        "azure-2024": csv("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:{i:02d}.009930+00:00,{i},7"),
        "burstgpt": csv(
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "{i},GPT-4,{i},5,9,API log"
        ),
        "vidur": csv("arrived_at,num_prefill_tokens,num_decode_tokens", "{i}.5,{i},7"),
        "vidur-lengths": csv("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio", "{i},7,9,0.5"),
        "mooncake": jsonl(lambda i: {"timestamp": i * 1000, **hashed}),
        "bailian": jsonl(lambda i: {"chat_id": i, "timestamp": i * 1.5, **hashed, "hash_ids": ["a", "b"]}),
        "openai-chat": jsonl(
            lambda i: {"request": {"messages": ask}, "response": {"created": i, "usage": usage, "choices": []}}
        ),
        "sharegpt": jsonl(lambda i: {"conversations": turns}),
        "sharegpt-array": json.dumps([{"conversations": turns}] * ROWS).encode(),
        "vllm-custom": jsonl(lambda i: {"prompt": "hello", "output_tokens": i}),
        "servegen": csv("0,0.5,9.0,Gamma,0.1,10.0", "{i}00,1.5,2.0,Weibull,0.5,0.4", "\r\n"),
    }


def mutate(data: bytes, rng: random.Random, binary: bool) -> bytes:
    """One to three damages of the kinds that files suffer."""
    for _ in range(rng.randint(1, 3)):
        rows = data.split(b"\n")
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5 if binary else 11):
            case 0:  # a flipped byte
                at = min(at, len(data) - 1)
                if data:
                    data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            case 1:  # cut short
                data = data[:at]
            case 2:  # a hole
                data = data[:at] + data[at + rng.randint(1, 40) :]
            case 3:  # bytes that do not belong
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 4:  # random bytes
                data = data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at + 8 :]
            case 5:  # lines dropped
                data = b"\n".join(row for row in rows if rng.random() > 0.2)
            case 6:  # lines doubled
                data = b"\n".join(row for row in rows for _ in range(rng.choice((1, 1, 1, 2))))
            case 7:  # lines shuffled
                rng.shuffle(rows)
                data = b"\n".join(rows)
            case 8 | 9:  # a number that cannot be meant
                digits = [i for i in range(len(data)) if data[i : i + 1].isdigit()]
                if digits:
                    at = rng.choice(digits)
                    data = data[:at] + rng.choice(NUMBERS) + data[at + 1 :]
            case 10:  # another encoding
                data = data.decode("utf-8", errors="replace").encode(rng.choice(ENCODINGS), errors="replace")
    return data


def sound(trace: Trace) -> None:
    """What the Trace contract promises."""
    n = len(trace)
    assert n > 0
    assert trace.arrival_s.dtype == np.float64 and trace.arrival_s[0] == 0
    assert np.isfinite(trace.arrival_s).all() and (np.diff(trace.arrival_s) >= 0).all()
    for tokens in (trace.input_tokens, trace.output_tokens):
        assert tokens.dtype == np.int64 and len(tokens) == n
        assert tokens.min() >= 1 and tokens.max() <= values.MAX_TOKENS
    counts = np.diff(trace.block_offsets)
    assert trace.block_offsets.shape == (n + 1,) and trace.block_offsets[0] == 0 and (counts >= 0).all()
    assert trace.block_offsets[-1] == len(trace.block_ids)
    if trace.block_tokens:
        assert (counts <= -(-trace.input_tokens // trace.block_tokens)).all() and trace.block_ids.min(initial=0) >= 0
    else:
        assert len(trace.block_ids) == 0
    assert trace.texts is None or (len(trace.texts) == n and all(isinstance(text, str) for text in trace.texts))


def survive(path: Path, name: str, tokenizer: str) -> bool:
    """Reads the file and works with what comes of it; True where something came."""
    try:
        if name == "servegen":
            profile = read_rates(path)
            assert (np.diff(profile.start_s) > 0).all() and (profile.rate_per_s >= 0).all()
            return True
        arrivals = "poisson:4" if name in ("vidur-lengths", "sharegpt", "sharegpt-array", "vllm-custom") else None
        trace, report = formats.read_with_report(path, arrivals=arrivals, tokenizer=tokenizer)
    except UsageError as error:
        assert error.message
        return False
    sound(trace)
    assert report.requests == len(trace) and report.messages() is not None
    assert summarise(trace).requests == len(trace)
    assert rate_bins(trace, 60)[0].min() >= 0
    assert sum(requests for _, _, requests in doubling_bins(trace.input_tokens)) == len(trace)
    if len(trace) > 1:
        parts = windows.split(trace)
        assert len(parts.search[0]) + len(parts.held_out[0]) == len(trace)
    return True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "there": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


def run(originals: dict[str, bytes], tokenizer: str, folder: Path, count: int, seed: int) -> None:
    path, rng, read = folder / "mutated", random.Random(seed), 0
    names = list(originals)
    for k in range(count):
        name = names[k % len(names)]
        path.write_bytes(mutate(originals[name], rng, name in BINARY))
        try:
            read += survive(path, name, tokenizer)
        except Exception as error:
            raise AssertionError(f"file {k} of seed {seed}, from {name}: {path.read_bytes()[:2000]!r}") from error
    # a test in which every file is refused, or none, would test half of what it says
    assert 0.1 * count < read < 0.95 * count


def test_the_sound_files_are_read(originals, tokenizer, tmp_path):
    for name, data in originals.items():
        path = tmp_path / "sound"
        path.write_bytes(data)
        assert survive(path, name, tokenizer), name


def test_400_damaged_files_give_a_sound_trace_or_a_usage_error(originals, tokenizer, tmp_path):
    run(originals, tokenizer, tmp_path, 400, seed=1)


@pytest.mark.slow
def test_10_000_damaged_files_give_a_sound_trace_or_a_usage_error(originals, tokenizer, tmp_path):
    run(originals, tokenizer, tmp_path, 10_000, seed=2)
