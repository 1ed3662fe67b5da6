"""The tables of docs/search.md from runs of benchmarks.search.run: one file or several, the longest run of each kind.

    python -m benchmarks.search.table results.jsonl more.jsonl [--by-surface] [--surfaces dense experts]
    python -m benchmarks.search.table results.jsonl more.jsonl --goals | --serves | --promises | --stops

A cell is the median and the quartiles over seeds and surfaces. A cell with fewer than 80 % of a line's runs is left
empty: those runs had fewer launches, or their launches took fewer GPU-hours.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tuner.search.ledger import Seen
from tuner.search.stopping import Stopping
from tuner.study.outcome import Measured

LAUNCHES = (5, 10, 20, 30, 60)
HOURS = (2, 5, 10, 20)
GOOD = 0.10  # the regret that "launches to .10" and "GPU-h to .10" count up to
BELIEVED = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.01)
MODELS = {"30%": "model wrong by 30 %", "badly": "badly wrong model", "none": "no model"}
PEERS = {"nsga2": "NSGA-II", "tpe": "TPE", "gp": "GPSampler", "grid": "grid, shuffled"}
ORDER = ("ours, model", "ours, badly", "ours, no", "TPE", "GPSampler", "random", "grid", "NSGA-II")


GOALS = (
    ("30%", 10, 0.03),
    ("30%", 30, 0.015),
    ("badly", 10, 0.09),
    ("badly", 30, 0.05),
    ("none", 10, 0.15),
    ("none", 30, 0.06),
)


def surface_of(row: dict) -> str:
    """The surface without its scenario; one whose servers say what they die of, or that has short names, is another."""
    name, *rest = row["surface"].split(":")
    return ":".join([name, *(part for part in rest if not part.isdigit())])


def label(row: dict) -> str:
    if row["method"] == "ours":
        return f"ours, {MODELS.get(row['model'], row['model'])}"
    return f"{PEERS.get(row['method'], row['method'])}, {'ladder' if row['ladder'] else 'one load'}"


def read(files: Sequence[Path]) -> list[dict]:
    """The longest run of every surface, method, ladder, model and seed."""
    found: dict[tuple, dict] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            key = (row["surface"], row["method"], row["ladder"], row["model"], row["seed"])
            if key not in found or len(row["regret"]) > len(found[key]["regret"]):
                found[key] = row
    return list(found.values())


def launches_to(row: dict, level: float) -> float:
    return next((i + 1 for i, r in enumerate(row["regret"]) if r <= level), float("inf"))


def hours_to(row: dict, level: float) -> float:
    n = launches_to(row, level)
    return row["gpu_s"][int(n) - 1] / 3600 if np.isfinite(n) else n


def needed(rows: list[dict], hours: bool = False) -> str:
    """Launches (or GPU-hours) to a regret of GOOD, in the median; beyond the shortest run where the median run does not
    get there."""
    need = float(np.median([(hours_to if hours else launches_to)(r, GOOD) for r in rows]))
    if not np.isfinite(need):
        return f"> {min(r['gpu_s'][-1] / 3600 if hours else len(r['regret']) for r in rows):.{1 if hours else 0}f}"
    return f"{need:.1f}" if hours else f"{need:.0f}"


def cells(rows: list[dict], hours: bool) -> list[str]:
    found = []
    for mark in HOURS if hours else LAUNCHES:
        values = []
        for r in rows:
            if hours:
                n = int(np.searchsorted(r["gpu_s"], mark * 3600, side="right"))
                if r["gpu_s"] and r["gpu_s"][-1] >= mark * 3600:
                    values.append(r["regret"][n - 1] if n else 1.0)
            elif len(r["regret"]) >= mark:
                values.append(r["regret"][mark - 1])
        if len(values) < max(0.8 * len(rows), 1):
            found.append("")
        else:
            found.append(middle(values))
    return found


def middle(values: Sequence[float] | np.ndarray) -> str:
    """Median and quartiles, as the tables have them."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{_short(median)} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def place(name: str) -> tuple[str, int, str]:
    surface, _, method = name.rpartition(": ")
    return surface, next((i for i, start in enumerate(ORDER) if method.startswith(start)), len(ORDER)), method


def table(groups: dict[str, list[dict]], hours: bool) -> list[str]:
    marks = [f"{h} GPU-h" for h in HOURS] if hours else [str(n) for n in LAUNCHES]
    extra = ["GPU-h to .10", "runs"] if hours else ["crashes", "launches to .10", "runs"]
    lines = ["| method | " + " | ".join([*marks, *extra]) + " |", "|---" * (1 + len(marks) + len(extra)) + "|"]
    for name in sorted(groups, key=place):
        rows = groups[name]
        more = [needed(rows, hours=True), str(len(rows))]
        if not hours:
            crash = np.mean([np.mean(r["crash"]) for r in rows if r["crash"]])
            more = [f"{crash:.0%}", needed(rows), str(len(rows))]
        lines.append(f"| {name} | " + " | ".join([*cells(rows, hours), *more]) + " |")
    return lines


def goals(rows: list[dict]) -> list[str]:
    """The medians that were aimed at, beside those that were reached, together and surface by surface."""
    surfaces = sorted({r["surface"] for r in rows})
    lines = ["| | goal | all | " + " | ".join(surfaces) + " |", "|---" * (3 + len(surfaces)) + "|"]
    for model, launches, goal in GOALS:
        of = [r for r in rows if (r["method"], r["model"]) == ("ours", model) and len(r["regret"]) >= launches]
        found = []
        for some in (of, *([r for r in of if r["surface"] == name] for name in surfaces)):
            if not some:
                found.append("")
                continue
            middle = float(np.median([r["regret"][launches - 1] for r in some]))
            found.append(f"{'**' if middle <= goal else ''}{_short(middle)}{'**' if middle <= goal else ''}")
        lines.append(f"| {MODELS[model]}, {launches} launches | {_short(goal)} | " + " | ".join(found) + " |")
    return lines


def serves(rows: list[dict]) -> list[str]:
    """What was believed of the servers that were launched, that they would serve, beside how many of them did."""
    lines = ["| believed | launches | mean of it | served |", "|---|---|---|---|"]
    pairs = [(p, not c) for r in rows for p, c in zip(r.get("serves", ()), r["crash"], strict=False) if p is not None]
    for low, high in itertools.pairwise(BELIEVED):
        some = [pair for pair in pairs if low <= pair[0] < high]
        if some:
            believed, served = np.mean(some, axis=0)
            lines.append(f"| {low:.0%} to {min(high, 1):.0%} | {len(some)} | {believed:.0%} | {served:.0%} |")
    return lines


def ours(rows: list[dict], said: str) -> dict[str, list[dict]]:
    """Runs of ours whose proposals ``said`` this, by surface and model."""
    found: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["surface"], r["model"])):
        if row["method"] == "ours" and said in row:
            found[f"{row['surface']}, {MODELS.get(row['model'], row['model'])}"].append(row)
    return found


def promises(rows: list[dict]) -> list[str]:
    """What proposals promised, by what is believed and corrected by what earlier promises kept, beside what their
    launches brought: growth of the true hypervolume, as a share of what was reached before; means."""
    lines = ["| surface | launches | believed | corrected | brought |", "|---|---|---|---|---|"]
    for name, of in ours(rows, "promised").items():
        found = []
        for row in of:
            for n, promised in enumerate(row["promised"]):
                if promised and n >= Stopping().fewest and (before := 1 - row["regret"][n - 1]) > 0:
                    brought = (row["regret"][n - 1] - row["regret"][n]) / before
                    found.append((promised, promised * row["kept"][n], brought))
        if not found:
            continue
        means = " | ".join(f"{mean:.2%}" for mean in np.mean(found, axis=0))
        lines.append(f"| {name} | {len(found)} | {means} |")
    return lines


def stops(rows: list[dict]) -> list[str]:
    """Where searches of ours would have ended by themselves (at the latest where they were cut off), by promises as
    they are and as the beliefs alone have them."""
    columns = "ended | launches | GPU-hours | regret"
    lines = [f"| surface | {columns} | uncorrected: {columns} |", "|---" * 9 + "|"]
    for name, of in ours(rows, "expected_gain").items():
        found = []
        for corrected in (True, False):
            at = [(ended(row, corrected), row) for row in of]
            found.append(f"{np.mean([n < len(row['regret']) for n, row in at]):.0%}")
            found.append(f"{np.mean([n for n, _ in at]):.0f}")
            found.append(f"{np.mean([row['gpu_s'][n - 1] for n, row in at]) / 3600:.1f}")
            found.append(_short(float(np.mean([row["regret"][n - 1] for n, row in at]))))
        lines.append(f"| {name} | {' | '.join(found)} |")
    return lines


def ended(row: dict, corrected: bool) -> int:
    """Launches after which a search would have ended by itself."""
    gains = [
        gain if corrected or gain is None else gain / (kept or 1.0)
        for gain, kept in zip(row["expected_gain"], row["kept"], strict=True)
    ]
    seen = [Seen(n, {}, Measured(()), expected_gain=gain) for n, gain in enumerate(gains)]
    return next((n for n in range(1, len(seen)) if Stopping().reason(seen[:n])), len(seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=[Path(__file__).parent / "results.jsonl"])
    parser.add_argument("--by-surface", action="store_true")
    parser.add_argument("--goals", action="store_true", help="the goals' table instead; what is met is in bold")
    parser.add_argument("--serves", action="store_true", help="how far what was believed of crashes was so")
    parser.add_argument("--promises", action="store_true", help="what proposals promised and what they brought")
    parser.add_argument("--stops", action="store_true", help="where searches would have ended by themselves")
    parser.add_argument("--surfaces", nargs="+", default=["dense", "experts", "abstract"])
    args = parser.parse_args()
    groups: dict[str, list[dict]] = defaultdict(list)
    rows = [row for row in read(args.files) if surface_of(row) in args.surfaces]
    for asked in (goals, serves, promises, stops):
        if getattr(args, asked.__name__):
            print("\n".join(asked(rows)))
            return
    for row in rows:
        groups[f"{surface_of(row)}: {label(row)}" if args.by_surface else label(row)].append(row)
    for hours in (False, True):
        print("\n".join(table(groups, hours)), end="\n\n")


if __name__ == "__main__":
    main()
