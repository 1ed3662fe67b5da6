"""Surface "abstract": no physics at all. Latency and capacity are random sums over parameter levels, random products of
pairs, one cliff and one ridge, in logarithms; a region crashes. The latency axis is end-to-end, and the SLO is another.

Its "model" knows the single effects (with wrong constants: their size), not the pairs, the cliff or the ridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.search.surface import Columns, Surface, numeric, parameter
from tuner.search.ledger import COST_KEY
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import parse

GRIDS: Mapping[str, tuple] = {
    "alpha": (1, 2, 4, 8, 16, 32),
    "beta": (1, 2, 4, 8, 16),
    "gamma": (64, 128, 256, 512, 1024),
    "delta": ("a", "b", "c", "d"),
    "epsilon": ("on", "off"),
    "zeta": ("p", "q", "r"),
    "eta": (1, 2, 4),
    "theta": ("x", "y"),
}
NUMBERS = ("alpha", "beta", "gamma", "eta")
PAIRS = (("alpha", "beta"), ("gamma", "delta"), ("zeta", "alpha"), ("epsilon", "beta"), ("eta", "gamma"))


def physics_of(seed: int):
    rng = np.random.default_rng([seed, 5])
    effect = {n: rng.normal(0, 0.22, (2, len(v))) for n, v in GRIDS.items()}
    for n in NUMBERS:  # numbers act smoothly: a slope and a bend
        x = np.linspace(-1, 1, len(GRIDS[n]))
        effect[n] = np.outer(rng.normal(0, 0.3, 2), x) + np.outer(rng.normal(0, 0.35, 2), x**2)
    both = {p: rng.normal(0, 0.12, (2, len(GRIDS[p[0]]), len(GRIDS[p[1]]))) for p in PAIRS}
    crash_level = {n: rng.normal(0, 1, len(v)) for n, v in GRIDS.items()}
    place = {n: {v: i for i, v in enumerate(values)} for n, values in GRIDS.items()}

    def physics(c: Columns, load: Any, k: Mapping[str, float], effects: bool) -> dict[str, np.ndarray]:
        at = {n: np.array([place[n][v] for v in c[n].tolist()]) for n in GRIDS}
        size = len(at["alpha"])
        latency, capacity, danger = np.zeros(size), np.zeros(size), np.zeros(size)
        for n in GRIDS:
            latency = latency + k[f"latency_{n}"] * effect[n][0][at[n]]
            capacity = capacity + k[f"capacity_{n}"] * effect[n][1][at[n]]
            danger = danger + crash_level[n][at[n]]
        if effects:
            for one, other in PAIRS:
                latency = latency + both[one, other][0][at[one], at[other]]
                capacity = capacity + both[one, other][1][at[one], at[other]]
            latency = latency + np.where((at["delta"] == 2) & (at["eta"] == 2), 0.5, 0.0)
            capacity = capacity + 0.25 * np.exp(-((at["alpha"] - at["beta"]) ** 2) / 2.0)
        gpus = c["eta"].astype(float)
        top = k["capacity"] * np.exp(capacity) * gpus**0.75
        busy = load / top
        queue = np.where(busy < 0.97, 1 / np.maximum(1 - busy, 0.03), 33 * (busy / 0.97) ** 2)
        e2e = k["latency"] * np.exp(latency) / gpus**0.5 * (1 + 0.8 * busy**2 + 0.15 * (queue - 1))
        ttft = 0.12 * k["latency"] * queue
        tokens = np.minimum(load, top) * 500.0
        crash = np.where(danger > 2.6, 1.0, 0.0) if effects else np.zeros(size)
        return {
            "e2e_p90_s": e2e,
            "ttft_p99_s": ttft,
            "output_tokens_per_s": tokens,
            COST_KEY: 2.0 * gpus / 3600 / tokens * 1e6,
            "short_bytes": np.zeros(size),
            "crash_p": crash,
        }

    return physics


def surface(seed: int = 3) -> Surface:
    made = [
        numeric(n, *v, default=v[len(v) // 2], counts_gpus=n == "eta")
        if n in NUMBERS
        else parameter(n, *v, default=v[0])
        for n, v in GRIDS.items()
    ]
    made = [p if p.name != "eta" else numeric("eta", 1, 2, 4, default=1, counts_gpus=True) for p in made]
    constants = {"latency": 4.0, "capacity": 3.0}
    constants |= {f"{axis}_{n}": 1.0 for axis in ("latency", "capacity") for n in GRIDS}
    objective = Objective("batch", "e2e_p90", (parse("ttft_p99=2500ms"),), 2.0)
    return Surface(
        "abstract",
        SearchSpace("bench/abstract", "emulator", tuple(made)),
        objective,
        (0.5, 1.0, 1.5, 2.5, 4.0, 6.0),
        physics_of(seed),
        constants,
        start_s=90.0,
        step_s=45.0,
    )
