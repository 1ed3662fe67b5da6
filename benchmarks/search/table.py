"""The tables of docs/search.md from the runs in results.jsonl.

python -m benchmarks.search.table [--by-surface] [--file results.jsonl]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

LAUNCHES = (5, 10, 20, 30, 60)
HOURS = (2, 5, 10, 20)


def label(row: dict) -> str:
    if row["method"] == "ours":
        words = {"30%": "model wrong by 30 %", "badly": "badly wrong model", "none": "no model"}
        return f"ours, {words.get(row['model'], row['model'])}"
    name = {"nsga2": "NSGA-II", "tpe": "TPE", "gp": "GPSampler", "grid": "grid, shuffled"}.get(
        row["method"], row["method"]
    )
    return f"{name}, {'ladder' if row['ladder'] else 'one load'}"


def launches_to(row: dict, level: float) -> float:
    return next((i + 1 for i, r in enumerate(row["regret"]) if r <= level), float("inf"))


def cells(rows: list[dict], hours: bool) -> list[str]:
    found = []
    for mark in HOURS if hours else LAUNCHES:
        values = []
        for r in rows:
            if hours:
                n = int(np.searchsorted(r["gpu_s"], mark * 3600, side="right"))
                complete = r["gpu_s"] and r["gpu_s"][-1] >= mark * 3600
                if complete or len(r["regret"]) >= LAUNCHES[-1]:
                    values.append(r["regret"][n - 1] if n else 1.0)
            elif len(r["regret"]) >= mark:
                values.append(r["regret"][mark - 1])
        if len(values) < max(0.8 * len(rows), 1):
            found.append("-")
        else:
            q = np.quantile(values, [0.25, 0.5, 0.75])
            found.append(f"{q[1]:.3f} ({q[0]:.3f}-{q[2]:.3f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=Path(__file__).parent / "results.jsonl")
    parser.add_argument("--by-surface", action="store_true")
    parser.add_argument("--surfaces", nargs="+")
    args = parser.parse_args()
    groups: dict[str, list[dict]] = defaultdict(list)
    for line in args.file.read_text().splitlines():
        row = json.loads(line)
        if args.surfaces and row["surface"] not in args.surfaces:
            continue
        groups[f"{row['surface']}: {label(row)}" if args.by_surface else label(row)].append(row)
    for hours in (False, True):
        marks = [f"{h} GPU-h" for h in HOURS] if hours else [str(n) for n in LAUNCHES]
        extra = [] if hours else ["crashes", "launches to .10", "runs"]
        print("| method | " + " | ".join([*marks, *extra]) + " |")
        print("|---" * (1 + len(marks) + len(extra)) + "|")
        for name, rows in sorted(groups.items()):
            more = []
            if not hours:
                crash = np.mean([np.mean(r["crash"]) for r in rows if r["crash"]])
                need = np.median([launches_to(r, 0.10) for r in rows])
                more = [f"{crash:.0%}", f"{need:.0f}" if np.isfinite(need) else "> 60", str(len(rows))]
            print(f"| {name} | " + " | ".join([*cells(rows, hours), *more]) + " |")
        print()
    slow = max((max(r["seconds"]) for rows in groups.values() for r in rows if r["method"] == "ours"), default=0)
    print(f"slowest suggestion of ours: {slow:.2f} s")


if __name__ == "__main__":
    main()
