"""How long a large trace takes to be read, beside what pandas takes to parse the same file.

    python -m benchmarks.load.read [--rows 27000000] [--repeats 1]

Azure's columns, a row every 22 ms with lengths drawn at random: 27 million rows are a week of its 2024 traffic. Each
reading is a process of its own, in turn; seconds include its start. pandas checks nothing and sorts nothing.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

READERS = {
    "tuner": "from pathlib import Path; from tuner.load import formats; print(len(formats.read(Path(FILE))))",
    "pandas": "import pandas; print(len(pandas.read_csv(FILE, parse_dates=['TIMESTAMP'])))",
}
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def write(path: Path, rows: int) -> None:
    """An Azure file of so many rows, with seven digits of a second as theirs have."""
    rng, began = random.Random(0), datetime(2024, 5, 10)
    with path.open("w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for first in range(0, rows, 100_000):
            at = [began + timedelta(milliseconds=22.4 * row) for row in range(first, min(first + 100_000, rows))]
            lengths = ((int(rng.lognormvariate(7, 1)) + 1, rng.randint(1, 800)) for _ in at)
            file.writelines(f"{t:%F %T.%f}0,{i},{o}\n" for t, (i, o) in zip(at, lengths, strict=True))


def measure(reader: str, path: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak GiB of one reading."""
    code = READERS[reader].replace("FILE", repr(str(path))) + PEAK
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began_s
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, int(said.split()[-1]) / 2**20


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--rows", type=int, default=27_000_000)
    words.add_argument("--repeats", type=int, default=1)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        write(path, asked.rows)
        print(f"{asked.rows:,} rows, {path.stat().st_size / 1e9:.2f} GB")
        for _ in range(asked.repeats):
            found = {reader: measure(reader, path) for reader in READERS}
            for reader, (wall_s, cpu_s, peak_gib) in found.items():
                print(f"{reader:8} {wall_s:6.1f} s, {cpu_s:6.1f} s of CPU, {peak_gib:.2f} GiB")
            print(f"tuner / pandas: CPU {found['tuner'][1] / found['pandas'][1]:.2f}")


if __name__ == "__main__":
    main()
