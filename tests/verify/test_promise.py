import dataclasses
import json
import math

import numpy as np
import pytest

from tests.studies import objective, space
from tests.verify.test_verification import WINDOWS
from tuner.errors import UsageError
from tuner.verify.fingerprint import Fingerprint, driver, model_hash, trace_hash
from tuner.verify.promise import Promise, promise_block, read_promise

MARK = Fingerprint("vllm", "0.32.0", "570.1", "H100", "m", "aaa", "t.csv", "bbb", "2026-11-23")


def promise(**more) -> Promise:
    values = {
        "study": "chat",
        "trial": 17,
        "config": space().config({"max_num_batched_tokens": 4096, "speculation": "ngram", "draft_tokens": 4}, "m"),
        "load": 2.5,
        "slos": objective().slos,
        "cost": (0.44, 0.42, 0.46),
        "latency_metric": "tpot_p99",
        "latency": (0.03, 0.02, math.inf),
        "fingerprint": MARK,
        "details": {"windows": 3},
    }
    return Promise(**{**values, **more})


def test_a_promise_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "best-config.yaml"
    path.write_text(f"# made by hand\n{promise_block(promise())}max-num-batched-tokens: 4096\n")
    assert read_promise(path) == promise()
    path.write_text(promise_block(promise(details={})))
    assert read_promise(path) == promise(details={})


def test_every_line_of_a_promise_is_a_comment():
    block = promise_block(promise())
    assert block.endswith("\n")
    assert all(line.startswith("# tuner: {") for line in block.splitlines())


def test_a_file_without_a_promise_says_how_to_get_one(tmp_path):
    path = tmp_path / "best-config.yaml"
    path.write_text("max-num-seqs: 8\n")
    with pytest.raises(UsageError, match="holds no promise") as caught:
        read_promise(path)
    assert "tuner export" in caught.value.fix


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text.replace('{"load"', '{load"'), "bad promise line"),
        (lambda text: text.replace('"load"', '"lode"'), "lacks 'load'"),
        (lambda text: text.replace('"promise": 1', '"promise": 99'), "version 99"),
        (lambda text: text.replace("ttft_p99=0.5", "ttfb_p99=0.5"), "unknown metric"),
        (
            lambda text: text.replace('"windows": 3', '"price_usd_per_gpu_hour": "a lot"'),
            "cannot be read: details: .*a lot",
        ),
        (
            lambda text: text.replace('"windows": 3', '"price_usd_per_gpu_hour": 0'),
            "cannot be read: details: 0 is out of",
        ),
        (lambda text: text.replace('{"load"', '["load"]#'), "bad promise line"),
        (lambda text: text.replace('{"promise": 1, "study"', '5 #{"study"'), "bad promise line"),
    ],
)
def test_a_damaged_promise_is_refused_with_file_and_line(tmp_path, damage, words):
    path = tmp_path / "best-config.yaml"
    path.write_text("# a comment\n" + damage(promise_block(promise())))
    with pytest.raises(UsageError, match=words) as caught:
        read_promise(path)
    assert caught.value.where.startswith(f"{path}:")


@pytest.mark.parametrize(
    "name, value",
    [
        ("confidence", 0),
        ("confidence", 1),
        ("confidence", 2),
        ("confidence", "nan"),
        ("launch_variance", -1),
        ("launch_variance", "inf"),
        ("launch_freedom", -1),
        ("launch_freedom", None),
        ("latency_metric", "bogus"),
        ("latency_metric", 5),
        ("load", 0),
        ("cost_usd_per_mtok_output", [-1, -2, 0]),
        ("latency_s", [0.03, 0.04, 0.02]),
        ("latency_s", 5),
        ("slos", 5),
        ("slos", ["ttft_p99=inf"]),
        ("trial", "one"),
        ("trial", math.inf),
        ("config", 5),
        ("config", {"model": "m", "params": 5, "flags": {}}),
        ("config", {"model": "m", "params": {}, "flags": [], "env": {}}),
        ("config", {"model": "m", "params": {}, "flags": {}, "gpus": "two"}),
        ("config", {"model": "m", "params": {}, "flags": {}, "env": {"A": 5}}),
        ("config", {"model": "m", "params": {}, "flags": {}, "gpus": -1}),
        ("fingerprint", 5),
        ("details", 5),
    ],
)
def test_what_no_check_could_be_made_with_is_refused_at_its_line(tmp_path, name, value):
    lines = promise_block(promise()).splitlines()
    number = next(i for i, line in enumerate(lines) if name in json.loads(line.removeprefix("# tuner: ")))
    lines[number] = f"# tuner: {json.dumps(json.loads(lines[number].removeprefix('# tuner: ')) | {name: value})}"
    (path := tmp_path / "best-config.yaml").write_text("\n".join(["# a comment", *lines]))
    with pytest.raises(UsageError, match=f"the promise cannot be read: {name}: ") as caught:
        read_promise(path)
    assert caught.value.where == f"{path}:{number + 2}"


def test_a_fingerprint_names_what_changed_and_not_the_date():
    now = Fingerprint("vllm", "0.33.0", "570.1", "H100", "other/path", "aaa", "t.csv", "ccc", "2027-01-01")
    assert MARK.changes(now) == ["engine version 0.32.0 -> 0.33.0", "trace hash bbb -> ccc"]
    assert MARK.changes(Fingerprint()) == []  # what is not known has not changed


def test_the_trace_hash_sees_another_arrival():
    assert trace_hash(WINDOWS) == trace_hash(WINDOWS)
    assert trace_hash(WINDOWS) != trace_hash(WINDOWS[::-1])
    moved = dataclasses.replace(WINDOWS[0], arrival_s=np.asarray(WINDOWS[0].arrival_s) + 0.001)
    assert trace_hash([moved]) != trace_hash(WINDOWS[:1])


def test_the_trace_hash_sees_what_fills_the_cache_before_a_window():
    filled = dataclasses.replace(WINDOWS[0], earlier=WINDOWS[1])
    other = dataclasses.replace(WINDOWS[0], earlier=WINDOWS[2])
    assert len({trace_hash([window]) for window in (WINDOWS[0], filled, other)}) == 3


def test_the_model_hash_sees_another_quantization_and_another_size(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    first = model_hash(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert model_hash(tmp_path) == first
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    second = model_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 101)
    assert len({first, second, model_hash(tmp_path)}) == 3
    assert model_hash(tmp_path / "absent") == ""


def test_the_driver_is_asked_of_nvidia_smi():
    assert driver(lambda _command: "570.86.15\n570.86.15\n") == "570.86.15"

    def fails(_command):
        raise OSError

    assert driver(fails) == ""
