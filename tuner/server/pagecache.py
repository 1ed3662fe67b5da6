"""A model's files into the page cache while the engine still imports, so that loading finds them in memory."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SHARE = 0.5  # of the memory that is free: what the server itself takes must not be pushed out
_PIECE = 128 * 2**10  # what Linux reads ahead by default; it reads no more per request


def fetch(folder: Path, available_bytes: int | None = None) -> threading.Thread | None:
    """Asks the system to read the weights in ``folder``, in the background; returns the thread that does.

    Nothing is done, and None returned, where there are no weights or they are larger than half of the free memory
    (``available_bytes``; default: this machine's). Files that are in memory already cost nothing.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
        total = sum(path.stat().st_size for path in files)
    except OSError:
        return None
    if available_bytes is None:
        available_bytes = psutil.virtual_memory().available
    if not total or total > _SHARE * available_bytes:
        return None
    thread = threading.Thread(target=_read, args=(files,), name="page-cache", daemon=True)
    thread.start()
    return thread


def _read(files: list[Path]) -> None:
    """Piece by piece, because one request for a whole file is cut short."""
    for path in files:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                for start in range(0, os.fstat(handle).st_size, _PIECE):
                    os.posix_fadvise(handle, start, _PIECE, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)
