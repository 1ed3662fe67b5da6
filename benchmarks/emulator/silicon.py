"""The emulator against a measured serving table: TTFT, TPOT and the ranking of configurations.

    python -m benchmarks.emulator.silicon ../shared/silicon/measured.csv [--sample N]

A row is emulated as it was measured: that many requests held in flight (closed loop), all of one nominal length, each
drawn from the row's spread, four times as many requests as the concurrency. Nothing is fitted per row or per model.
Rows of several nodes are left out: the emulator does not model them. SGLang's rows are
emulated as vLLM's; they show as a group of their own.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.model.rows import Row, doubts, read
from tuner.engines.emulator.hardware import find_gpu
from tuner.engines.emulator.noise import QUIET
from tuner.engines.emulator.settings import resolve
from tuner.engines.emulator.shape import shape_of
from tuner.engines.emulator.simulator import Simulator, Work
from tuner.search.model.shape import ModelShape

SHAPES = Path(__file__).parents[2] / "tests/search/shapes"
ALIASES = {"deepseek-v3": "deepseek-r1"}


@dataclass(frozen=True, slots=True)
class Result:
    """One row: measured and emulated means, seconds; ``rate``s are output tokens/s per GPU."""

    row: Row
    ttft_s: float
    tpot_s: float

    @property
    def rate(self) -> float:
        request_s = self.tpot_s * (self.row.osl - 1) + self.ttft_s
        return self.row.concurrency / request_s * self.row.osl / self.row.parallelism.gpus


def emulate(row: Row) -> Result:
    """The row's load against the emulated engine. Raises ``ValueError`` where it would not start."""
    name = row.model.lower()
    name = next((real + name[len(alias) :] for alias, real in ALIASES.items() if name.startswith(alias)), name)
    stem = next(s for s in sorted((f.stem for f in SHAPES.glob("*.json")), key=len, reverse=True) if name.startswith(s))
    shape = shape_of(ModelShape.from_folder(SHAPES / f"{stem}.json"))
    gpu = find_gpu(row.system)
    flags: dict[str, object] = {
        "max-model-len": row.isl + row.osl + 256,
        "max-num-seqs": max(row.concurrency, 16),
        "tensor-parallel-size": row.parallelism.tp,
        "data-parallel-size": row.parallelism.dp,
    }
    if not shape.quantization and row.precision.quantized:
        flags["quantization"] = "fp8"
    settings = resolve(flags, shape, gpu)
    simulator = Simulator(shape, settings, gpu, noise=QUIET)
    rng = random.Random(f"{row.model}{row.isl}{row.osl}{row.concurrency}")
    low = 1 - row.length_spread * math.sqrt(12)

    def request(at_s: float) -> Work:
        return Work(at_s, int(row.isl * rng.uniform(low, 1)), max(int(row.osl * rng.uniform(low, 1)), 2))

    total, sent, first, ttfts, tpots = 4 * row.concurrency, 0, {}, [], []
    for _ in range(row.concurrency):
        simulator.submit(request(0.0))
        sent += 1
    while simulator.next_event_s < math.inf:
        for delivery in simulator.advance():
            job = delivery.job
            if job.id not in first:
                first[job.id] = delivery.at_s
            if delivery.last:
                ttfts.append(first[job.id] - job.arrived_s)
                tpots.append((delivery.at_s - first[job.id]) / (job.output - 1))
                if sent < total:
                    simulator.submit(request(delivery.at_s), delivery.at_s)
                    sent += 1
    return Result(row, statistics.fmean(ttfts), statistics.fmean(tpots))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; nan for fewer than three pairs."""
    if len(a) < 3:
        return math.nan

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        found = [0.0] * len(values)
        i = 0
        while i < len(order):
            j = i
            while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
                j += 1
            for k in range(i, j + 1):
                found[order[k]] = (i + j) / 2
            i = j + 1
        return found

    return statistics.correlation(ranks(a), ranks(b))


def show(name: str, results: Sequence[Result]) -> None:
    """One line of the table."""
    tpot = [abs(math.log(r.tpot_s / r.row.tpot_s)) for r in results]
    ttft = [max(r.ttft_s / r.row.ttft_s, r.row.ttft_s / r.ttft_s) for r in results]
    bias = statistics.median(r.tpot_s / r.row.tpot_s for r in results)
    share = sum(x <= 1.5 for x in ttft) / len(ttft)
    ranks = spearman([r.rate for r in results], [r.row.throughput_per_gpu for r in results])
    print(
        f"| {name} | {len(results)} | {100 * (math.exp(statistics.median(tpot)) - 1):.0f} % | {bias:.2f} | "
        f"{statistics.median(ttft):.2f} | {100 * share:.0f} % | {ranks:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", type=Path)
    parser.add_argument("--sample", type=int, default=0, help="so many rows, spread over the table (0: all)")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    rows, left_out = read(given.table, SHAPES)
    unique = list({row.key: row for row in rows}.values())
    chosen = [row for row in unique if row.parallelism.pp == 1 and row.parallelism.gpus <= 8]
    if given.sample:
        chosen = chosen[:: max(len(chosen) // given.sample, 1)]
    began = time.perf_counter()
    results: dict[str, list[Result]] = {}
    refused: dict[str, int] = {}
    for row in chosen:
        try:
            results.setdefault(row.group, []).append(emulate(row))
        except Exception as error:
            refused[f"{row.group}: {str(error)[:90]}"] = refused.get(f"{row.group}: {str(error)[:90]}", 0) + 1
    wrong = doubts(unique)
    print(f"{len(rows)} rows, {len(unique)} different, {len(chosen)} emulated in {time.perf_counter() - began:.0f} s")
    print(f"left out: {left_out}; refused: {refused}")
    print(
        "\n| model/engine | rows | TPOT error (median) | TPOT bias | TTFT factor (median) | within 1.5 | rank corr. |"
    )
    print("|---|---|---|---|---|---|---|")
    for group, found in sorted(results.items()):
        show(group + (" (doubtful)" if group in wrong else ""), found)
        if given.verbose:
            for r in found:
                print(
                    f"    {r.row.system} tp{r.row.parallelism.tp} {r.row.isl}/{r.row.osl} c{r.row.concurrency}: ttft "
                    f"{r.row.ttft_s * 1e3:.0f} -> {r.ttft_s * 1e3:.0f} ms, tpot {r.row.tpot_s * 1e3:.2f} -> "
                    f"{r.tpot_s * 1e3:.2f} ms"
                )
    show("all vLLM", [r for g, found in results.items() for r in found if g.endswith("/vllm")])
    show("all", [r for found in results.values() for r in found])
    sound = [r for group, found in results.items() for r in found if group not in wrong]
    show("all but the doubtful", sound)
    per_model = [
        spearman([r.rate for r in found], [r.row.throughput_per_gpu for r in found]) for found in results.values()
    ]
    print(f"\nmedian rank correlation within a model: {statistics.median(per_model):.3f}")


if __name__ == "__main__":
    main()
