"""Surface "silicon": measured points of real H100 and H200 machines, from a public table (see the README beside it).

A configuration is a row's parallelism, precision and engine; its loads are the concurrencies that were measured. The
table holds means, so the SLOs are on means; there are at most seven configurations per model and length, which is why
launches are few and 5 already tells most. Combinations that nobody measured are refused before the launch.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.surface import Columns, Surface, numeric, parameter
from tuner.search.ledger import COST_KEY
from tuner.space.space import Rule, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse

TABLE = Path(__file__).parents[2] / "../shared/silicon/measured.csv"
PRICE = 2.5


def groups() -> list[tuple[tuple[str, str, str], dict[tuple[str, int], dict[int, tuple[float, float]]]]]:
    """((model, input, output) -> (variant, GPUs) -> concurrency -> (TTFT, TPOT) in seconds) with six configurations or
    more; a variant is the machine and the engine."""
    found: dict[tuple[str, str, str], dict] = defaultdict(lambda: defaultdict(dict))
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            if row["attention_dp_size"] not in ("", "1") or row["moe_ep_size"] not in ("", "1"):
                continue
            variant = f"{row['system'].partition('_')[0]} {row['backend']}"
            at = found[row["model_path"], row["isl"], row["osl"]][variant, int(row["tp_size"])]
            at[int(row["batch_size"])] = (float(row["silicon_ttft_ms"]) / 1e3, float(row["silicon_tpot_ms"]) / 1e3)
    return sorted((name, dict(of)) for name, of in found.items() if len(of) >= 6)


def surface(number: int = 0) -> Surface:
    (model, prompt, answer), table = groups()[number]
    variants, sizes = sorted({k[0] for k in table}), sorted({k[1] for k in table})
    # loads that all but one configuration have; a configuration without a load is not measured there
    loads = sorted(x for x in {c for of in table.values() for c in of} if sum(x in of for of in table.values()) >= 6)
    held = {k: of for k, of in table.items() if set(loads) <= set(of)}
    rules = tuple(
        Rule({"variant": v, "tensor_parallel_size": n}, "nobody measured this")
        for v in variants
        for n in sizes
        if (v, n) not in held
    )
    tokens = float(answer)

    def physics(c: Columns, load: Any, k: Mapping[str, float], effects: bool) -> dict[str, np.ndarray]:
        users = np.broadcast_to(np.asarray(load, float), c["variant"].shape)
        rows = list(zip(c["variant"].tolist(), c["tensor_parallel_size"].tolist(), users.tolist(), strict=True))
        ttft, tpot, gpus = (np.ones(len(rows)) for _ in range(3))
        for i, (variant, n, at) in enumerate(rows):
            of = held.get((variant, n), {1: (99.0, 9.0), 1000: (99.0, 9.0)})
            x = np.log(sorted(of))
            wrong = k.get(f"{variant} {n}", 1.0)
            ttft[i] = np.exp(np.interp(np.log(at), x, [np.log(of[j][0]) for j in sorted(of)])) * wrong
            tpot[i] = np.exp(np.interp(np.log(at), x, [np.log(of[j][1]) for j in sorted(of)])) * wrong
            gpus[i] = n
        out = users * tokens / (tpot * (tokens - 1) + ttft)
        price = np.where([str(v).startswith("h200") for v in c["variant"]], 1.2 * PRICE, PRICE)
        return {
            "ttft_mean_s": ttft,
            "tpot_mean_s": tpot,
            "output_tokens_per_s": out,
            COST_KEY: price * gpus / 3600 / out * 1e6,
            "short_bytes": np.zeros(len(rows)),
            "crash_p": np.zeros(len(rows)),
        }

    largest = max(sizes)
    first = next(v for v in variants if (v, largest) in held)
    space = SearchSpace(
        f"bench/silicon {model} {prompt} {answer}",
        "table",
        (
            numeric("tensor_parallel_size", *sizes, default=largest, counts_gpus=True),
            parameter("variant", *variants, default=first),
        ),
        rules=rules,
    )
    limit = float(np.median([of[loads[-1]][1] for of in held.values()]))
    slos = (parse("ttft_mean=5s"), parse(f"tpot_mean={limit * 1e3:.3g}ms"))
    constants = {f"{v} {n}": 1.0 for v, n in held}
    objective = Objective("silicon", "tpot_mean", slos, PRICE)
    return Surface(
        f"silicon:{number}", space, objective, tuple(map(float, loads)), physics, constants, noise=0.03, grain=0.0
    )
