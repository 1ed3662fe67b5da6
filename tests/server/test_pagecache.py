"""Weights are in memory by the time that they are loaded."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from tests.server.test_process import eventually
from tuner.server.pagecache import fetch

SIZE = 24 * 2**20


def resident(path: Path) -> float:
    """Which share of a file is in the page cache, as ``mincore`` tells."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as area:
        pages = -(-len(area) // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(view := ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(area)), seen) == 0
        del view
        return sum(page & 1 for page in seen) / pages


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights on the disk and not in memory; skipped where the file system keeps everything in memory."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    if resident(path) > 0.1:
        pytest.skip("this file system keeps its files in memory")
    return path


def test_a_models_weights_are_read_in_the_background(weights):
    assert fetch(weights.parent) is not None
    assert eventually(lambda: resident(weights) == 1.0)


def test_weights_that_would_push_the_server_out_of_memory_are_left_where_they_are(weights):
    assert fetch(weights.parent, available_bytes=2 * SIZE - 1) is None
    assert resident(weights) < 0.1


def test_a_folder_without_weights_is_nothing_to_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert fetch(tmp_path) is None
    assert fetch(tmp_path / "nowhere") is None
