"""Columns made of buffers are what pyarrow itself would have made, and spare the libraries that take long to import."""

import subprocess
import sys
from array import array

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.test_records import META, record
from tuner.load.columns import column, plain
from tuner.load.records import write

whole = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(
    ("kind", "type", "values"),
    [
        ("int64", pa.int64(), st.none() | whole),
        ("float64", pa.float64(), st.none() | st.floats(allow_nan=False)),
        ("bool", pa.bool_(), st.booleans()),
        ("string", pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        ("list", pa.list_(pa.int64()), st.lists(whole, max_size=4)),
    ],
)
@given(data=st.data())
def test_a_column_is_what_pyarrow_makes_of_the_values(kind, type, values, data):
    plain = data.draw(st.lists(values, max_size=30))
    made = column(kind, [array("q", value) for value in plain] if kind == "list" else plain)
    made.validate(full=True)
    assert made.equals(pa.array(plain, type))


@pytest.mark.parametrize(
    ("kind", "type", "values"), [("int64", pa.int64(), st.none() | whole), ("bool", pa.bool_(), st.booleans())]
)
@given(data=st.data())
def test_values_come_back_from_any_chunks_and_slices(kind, type, values, data):
    chunks = data.draw(st.lists(st.lists(values, max_size=20), max_size=4))
    skipped = data.draw(st.integers(0, 9))
    read = pa.chunked_array([pa.array(chunk, type) for chunk in chunks], type).slice(skipped)
    expected = [-5 if value is None else value for chunk in chunks for value in chunk][skipped:]
    assert plain(read, kind, -5).tolist() == expected and plain(read, kind).dtype == kind


def test_half_a_surrogate_pair_in_an_error_message_is_written_all_the_same():
    assert column("string", ["a\ud800"]).to_pylist() == ["a?"]


def test_records_and_metrics_need_neither_pandas_nor_scipy(tmp_path):
    """Each costs more CPU time than a replay of some ten seconds."""
    path = tmp_path / "r.parquet"
    write(path, [record(k) for k in range(30)], META)
    program = (
        "import sys; from tuner.cli.app import app\n"
        f"app(['replay', '--recompute', '--records', {str(path)!r}, '--json'], standalone_mode=False)\n"
        "print([name for name in ('pandas', 'scipy', 'pyarrow.compute') if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stderr == "[]\n"
