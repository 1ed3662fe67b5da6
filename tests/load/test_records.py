"""The records file: everything comes back, little is held."""

import errno
import random
import tracemalloc
from array import array

import numpy as np
import pyarrow.parquet as pq
import pytest

from tuner.errors import UsageError
from tuner.load.records import ABSENT, COLUMNS, Record, RecordWriter, read, write

META = {"load": 1.5, "window": "w", "stopped": ""}


def record(number: int, tokens: list[int] | None = None, error: str = "") -> Record:
    tokens = [100 + number, 200 + number] if tokens is None else tokens
    first, last = (tokens[0], tokens[-1]) if tokens else (None, None)
    return Record(
        number, number, number + 1, first, first, first, last, 300, array("q", tokens), 7, None, 2, len(tokens), error,
        False, False, 5,
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    rows = [record(0), record(1, []), record(2, [5, 5, 9], "HTTP 503: overloaded")]
    write(tmp_path / "r.parquet", rows, META)
    records = read(tmp_path / "r.parquet")
    assert records.meta["load"] == 1.5
    for name, kind, *_ in COLUMNS:
        if kind != "list":
            expected = [ABSENT if getattr(row, name) is None else getattr(row, name) for row in rows]
            assert records.columns[name].tolist() == expected, name
    [(slice_, token_ns, offsets)] = list(records.tokens())
    assert (slice_, token_ns.tolist(), offsets.tolist()) == (slice(0, 3), [100, 200, 5, 5, 9], [0, 2, 2, 5])


def test_units_are_in_the_names():
    assert all(
        name.endswith(("_ns", "_tokens")) or name in ("request", "error", "warmup", "retried") for name, *_ in COLUMNS
    )


def test_a_replay_without_a_single_record_leaves_a_readable_file(tmp_path):
    write(tmp_path / "r.parquet", [], META)
    assert len(read(tmp_path / "r.parquet")) == 0


def test_the_file_has_no_name_until_it_is_whole(tmp_path):
    writer = RecordWriter(tmp_path / "r.parquet")
    for k in range(9_000):
        writer.add(record(k))
    assert not (tmp_path / "r.parquet").exists()
    writer.close(META)
    assert len(read(tmp_path / "r.parquet")) == 9_000
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_a_broken_off_replay_leaves_nothing(tmp_path):
    writer = RecordWriter(tmp_path / "r.parquet")
    for k in range(9_000):
        writer.add(record(k))
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_number_of_requests(tmp_path):
    writer = RecordWriter(tmp_path / "r.parquet")
    times = list(range(0, 2_000_000, 10_000))
    for k in range(8_192):  # the first row group loads the Parquet library
        writer.add(record(k, times))
    tracemalloc.start()
    peaks = []
    for _ in range(3):
        tracemalloc.reset_peak()
        for k in range(8_192):
            writer.add(record(k, times))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    writer.close(META)
    assert peaks[2] < 1.1 * peaks[0] and peaks[2] < 100e6
    records = read(tmp_path / "r.parquet")
    assert len(records) == 4 * 8_192
    assert sum(len(tokens) for _, tokens, _ in records.tokens()) == 4 * 8_192 * 200
    # arrival times that follow each other closely cost little
    assert (tmp_path / "r.parquet").stat().st_size < 4 * 8_192 * 200 * 2


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"a,b\n1,2\n"])
def test_anything_else_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UsageError):
        read(tmp_path / "x.parquet")


def test_a_foreign_parquet_file_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": np.arange(3)}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="not a records file"):
        read(tmp_path / "x.parquet")


def test_a_damaged_file_is_refused_in_one_line_or_says_what_it_said(tmp_path):
    whole, path = tmp_path / "r.parquet", tmp_path / "damaged.parquet"
    write(whole, [record(k) for k in range(50)], META)
    data, rng, refused = whole.read_bytes(), random.Random(1), 0
    told = _told(whole)
    for k in range(len(data) - 1, 0, -7):
        broken = bytearray(data)
        broken[k] ^= 1 << rng.randrange(8)
        path.write_bytes(broken if k % 3 else data[:k])
        try:
            assert _told(path) == told, k
        except UsageError as error:
            assert "\n" not in error.message and error.where == str(path)
            refused += 1
    assert refused > len(data) / 7 / 2


def test_facts_that_are_not_as_they_were_written_are_refused(tmp_path):
    path = tmp_path / "r.parquet"
    write(path, [record(0)], META)
    data = path.read_bytes()
    assert data.count(b'"load": 1.5') == 1
    path.write_bytes(data.replace(b'"load": 1.5', b'"load": 3.5'))
    with pytest.raises(UsageError, match="its facts do not have their checksum"):
        read(path)


def test_a_file_without_checksums_is_read(tmp_path):
    path = tmp_path / "r.parquet"
    write(path, [record(k) for k in range(50)], META)
    told, table = _told(path), pq.read_table(path)
    facts = pq.read_metadata(path).metadata[b"tuner.replay"]
    pq.write_table(table.replace_schema_metadata({b"tuner.replay": facts}), path)
    assert _told(path) == told


def _told(path):
    records = read(path)
    columns = {name: values.tolist() for name, values in records.columns.items()}
    return dict(records.meta), columns, [(t.tolist(), o.tolist()) for _, t, o in records.tokens()]


def test_a_disk_that_is_full_is_told_with_the_files_name_and_leaves_nothing(tmp_path):
    path = tmp_path / "r.parquet"
    path.with_name("r.parquet.partial").symlink_to("/dev/full")
    writer = RecordWriter(path)
    writer.add(record(0))
    with pytest.raises(OSError) as failure:
        writer.close(META)
    assert (failure.value.errno, failure.value.filename) == (errno.ENOSPC, str(path))
    writer.discard()
    assert not any(tmp_path.iterdir())
