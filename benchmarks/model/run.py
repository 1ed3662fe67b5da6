"""How far the analytic model is from measured serving tables.

python benchmarks/model/run.py                      the errors with the constants that ship
python benchmarks/model/run.py --leave-out model    the same, each model (or system, engine) predicted with
                                                    constants fitted to the others (minutes)
python benchmarks/model/run.py --fit                the constants that fit best
--table FILE --shapes FOLDER --gpus FILE            another table, config.json files, hardware rows
--rows                                              every row beside its prediction
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from fitting import fit, predict
from rows import Row, doubts, read

from tuner.search.model.closed_loop import ClosedLoop
from tuner.search.model.constants import Constants

_ROOT = Path(__file__).parents[2]
_PARTS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.shape.name.removesuffix("-instruct-fp8"),  # the same model in another precision
    "system": lambda row: row.system,
    "engine": lambda row: row.engine,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=_ROOT / "../shared/silicon/measured.csv")
    parser.add_argument("--shapes", type=Path, default=_ROOT / "tests/search/shapes")
    parser.add_argument("--gpus", type=Path)
    parser.add_argument("--leave-out", choices=tuple(_PARTS))
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--rows", action="store_true")
    options = parser.parse_args()
    if not options.table.is_file():
        raise SystemExit(f"{options.table} is not here: name a table with --table")
    rows, left_out = read(options.table, options.shapes, options.gpus)
    unique = list({row.key: row for row in rows}.values())
    doubtful = doubts(unique)
    print(f"{len(rows)} rows, {len(unique)} different measurements, {sum(r.relabelled for r in unique)} relabelled")
    for reason, count in left_out.items():
        print(f"  left out: {count} rows of {reason}")
    for group, why in doubtful.items():
        print(f"  doubtful, counted but never fitted to: {group} {why}")
    fitted = [r for r in unique if r.group not in doubtful and r.concurrency < 500 and not _contradicts(r)]
    if options.fit:
        print(fit(fitted))
        return
    shipped = Constants()
    got = [predict(row, shipped) for row in rows]
    show("with the constants that ship, every row of the file", rows, got)
    show("the same, each measurement once", unique, [predict(row, shipped) for row in unique])
    if options.rows:
        for row, p in zip(rows, got, strict=True):
            print(line(row, p))
    if options.leave_out:
        leave_out(options.leave_out, unique, fitted)


def _contradicts(row: Row) -> bool:
    """SGLang's Llama rows have TTFTs under half of what a wave of their fixed lengths takes: another protocol."""
    return row.model == "Llama-3.1-8B-Instruct" and row.engine == "sglang"


def leave_out(name: str, rows: Sequence[Row], fitted: Sequence[Row]) -> None:
    """Every row predicted with constants that were fitted without the rows of its model, system or engine."""
    part_of = _PARTS[name]
    constants = {}
    for part in sorted({part_of(row) for row in rows}):
        constants[part] = fit([row for row in fitted if part_of(row) != part])
        print(f"without {part}: {constants[part]}", flush=True)
    got = [predict(row, constants[part_of(row)]) for row in rows]
    show(f"each {name} left out of the fit, each measurement once", rows, got, part_of)


def show(
    title: str, rows: Sequence[Row], got: Sequence[ClosedLoop], by: Callable[[Row], str] = lambda row: row.group
) -> None:
    print(f"\n{title}")
    print("| rows | n | TPOT error, median | TPOT bias | TTFT within 1.5x | rank correlation of tokens/s/GPU |")
    print("|---|---|---|---|---|---|")
    parts = {part: [i for i, row in enumerate(rows) if by(row) == part] for part in sorted({by(row) for row in rows})}
    for part, index in [*parts.items(), ("all", list(range(len(rows))))]:
        print(summary(part, [rows[i] for i in index], [got[i] for i in index]))
    models = sorted({row.shape.name for row in rows})
    rank = {m: correlation([(r, p) for r, p in zip(rows, got, strict=True) if r.shape.name == m]) for m in models}
    print("rank correlation within a model: " + ", ".join(f"{m} {value:.3f}" for m, value in rank.items()))


def summary(name: str, rows: Sequence[Row], got: Sequence[ClosedLoop]) -> str:
    tpot = np.array([p.tpot_s / r.tpot_s for r, p in zip(rows, got, strict=True)])
    ttft = np.array([max(p.ttft_s, 1e-9) / r.ttft_s for r, p in zip(rows, got, strict=True)])
    within = float(np.mean(np.abs(np.log(ttft)) <= np.log(1.5)))
    rank = correlation(list(zip(rows, got, strict=True)))
    return (
        f"| {name} | {len(rows)} | {np.median(np.abs(tpot - 1)):.1%} | {np.median(tpot) - 1:+.1%} | {within:.0%} "
        f"| {rank:.3f} |"
    )


def correlation(pairs: Sequence[tuple[Row, ClosedLoop]]) -> float:
    from scipy.stats import spearmanr

    if len(pairs) < 3:
        return float("nan")
    return float(spearmanr([p.per_gpu for _, p in pairs], [r.throughput_per_gpu for r, _ in pairs])[0])


def line(row: Row, p: ClosedLoop) -> str:
    return (
        f"{row.group:40s} {row.system} tp{row.parallelism.tp} ep{int(row.parallelism.expert_parallel)} "
        f"{row.isl:5d}/{row.osl:<5d} c{row.concurrency:<4d} TPOT {row.tpot_s * 1e3:7.2f} {p.tpot_s * 1e3:7.2f} ms  "
        f"TTFT {row.ttft_s * 1e3:9.1f} {p.ttft_s * 1e3:9.1f} ms"
    )


if __name__ == "__main__":
    main()
