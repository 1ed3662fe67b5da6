"""What reading a model's weights ahead of the engine is worth here: the same file read cold, and after a fetch.

    python -m benchmarks.startup.pagecache --gib 2 --repeat 3 --folder /a/disk

Reads through ``mmap``, page by page, as safetensors does. ``cold`` and ``fetched`` are the seconds that a loader waits;
``fetch`` is how long the reading took in the background, beside the engine's imports.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

from tuner.server.pagecache import fetch

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        piece = os.urandom(2**24)
        with path.open("wb") as file:
            for _ in range(int(args.gib * GIB / len(piece))):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        rows = [once(path) for _ in range(args.repeat)]
    for index, name in enumerate(("cold", "fetch", "fetched")):
        values = [row[index] for row in rows]
        rate = path_gib(args.gib) / statistics.median(values)
        print(
            f"{name:8} median {statistics.median(values):6.2f} s  ({rate:.2f} GiB/s)  {[round(v, 2) for v in values]}"
        )


def path_gib(gib: float) -> float:
    """The file's size in GiB: whole pieces of 16 MiB."""
    return int(gib * 64) / 64


def once(path: Path) -> tuple[float, float, float]:
    """Seconds: read cold; fetched in the background; read after that."""
    evict(path)
    cold = read(path)
    evict(path)
    started = time.monotonic()
    thread = fetch(path.parent)
    if thread is None:
        raise SystemExit("the file is larger than half of the free memory: take a smaller one")
    thread.join()
    fetched = time.monotonic() - started
    return cold, fetched, read(path)


def evict(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read(path: Path) -> float:
    started = time.monotonic()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as area:
        sum(area[at] for at in range(0, len(area), mmap.PAGESIZE))
    return time.monotonic() - started


if __name__ == "__main__":
    main()
