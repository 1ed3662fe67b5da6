"""Bars 1 and 2: do the intervals of the verified winner cover the truth, and is the right configuration recommended?

    python -m benchmarks.verify.coverage throughput --faster-by 0
    python -m benchmarks.verify.coverage throughput --faster-by 0.1
    python -m benchmarks.verify.coverage latency --faster-by 0
    python -m benchmarks.verify.coverage latency --faster-by 0.1

Each of 200 studies searches 20 configurations and the default (ties repeated) and verifies on five held-out windows,
with 60 launches in all, 12 of them (20 %) for verification. One of the 20 is faster than the others, or none is.

With ``--out FILE`` every study is appended as a JSON line, and studies that are in the file are not repeated: an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.verify.small_study import LATENCY, THROUGHPUT, Scenario, run, truth

BETTER = "v7"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one study said, to be held against the truth later. ``choice``: ``default``, ``better`` (the faster one),
    ``another`` or ``nothing``; intervals (low, high) of the recommendation's cost, of its cost over the default's, and
    of the search's apparent winner, None where there is none."""

    choice: str
    seconds: float
    cost: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    apparent: str = ""
    apparent_load: float = 0.0
    apparent_cost: tuple[float, float] | None = None
    launches: int = 0


def one(scenario: Scenario, speed: float, seed: int, launches: int, heldout: int) -> Seen:
    """One study; ``speed`` is that of one of the twenty (1.0: all are equal)."""
    begun = time.monotonic()
    speeds = {f"v{i}": _speed(f"v{i}", speed) for i in range(21)}
    result = run(speeds, seed, scenario, launches=launches, heldout=heldout)
    found = result.verification
    apparent = (result.apparent, result.apparent_load, result.apparent_interval if result.apparent else None)
    if found.chosen is None or found.config is None:
        return Seen("nothing", time.monotonic() - begun, None, None, *apparent)
    variant = str(found.config.params["variant"])
    choice = "default" if found.is_default else "better" if variant == BETTER else "another"
    ratio = None if found.is_default else found.chosen.difference[1:]
    return Seen(choice, time.monotonic() - begun, found.chosen.cost[1:], ratio, *apparent, found.launches)


def row(seen: Sequence[Seen], scenario: Scenario, speed: float) -> dict[str, object]:
    """One row of the table."""
    verified, gains, searched, widths = [], [], [], []
    for s in seen:
        own = truth(speed if s.choice == "better" else 1.0, scenario)
        if s.cost:
            verified.append(s.cost[0] <= own <= s.cost[1])
            widths.append(s.cost[1] / s.cost[0] - 1)
        if s.ratio:
            gains.append(s.ratio[0] <= own / truth(1.0, scenario) <= s.ratio[1])
        if s.apparent_cost:
            true = truth(_speed(s.apparent, speed), scenario, s.apparent_load)
            searched.append(s.apparent_cost[0] <= true <= s.apparent_cost[1])
    return {
        "verified_interval_covers": _share(verified),
        "verified_gain_covers": _share(gains),
        "search_interval_covers": _share(searched),
        "median_width": round(float(np.median(widths)), 3) if widths else None,
        "mean_verify_launches": round(float(np.mean([s.launches for s in seen if s.launches])), 1),
        "choices": dict(collections.Counter(s.choice for s in seen)),
        "seconds": round(sum(s.seconds for s in seen)),
    }


def _speed(variant: str, speed: float) -> float:
    return speed if variant == BETTER else 1.0


def _share(hits: Sequence[bool]) -> dict[str, object] | None:
    """A share with its own exact 95 % interval (Clopper and Pearson 1934)."""
    n, k = len(hits), sum(hits)
    if not n:
        return None
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"share": round(k / n, 3), "of": n, "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=("throughput", "latency"))
    parser.add_argument("--faster-by", type=float, default=0.0)
    parser.add_argument("--launches", type=int, default=60)
    parser.add_argument("--heldout", type=int, default=5, help="windows")
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20000)
    parser.add_argument("--out", type=Path, help="keep every study here, and go on from what is there")
    a = parser.parse_args()
    scenario = {"throughput": THROUGHPUT, "latency": LATENCY}[a.scenario]
    kept, seen = _kept(a.out), []
    for seed in range(a.seed, a.seed + a.studies):
        key = f"{scenario.name} {a.faster_by:g} {a.launches} {a.heldout} {seed}"
        before = kept.get(key)
        seen.append(before or one(scenario, 1 + a.faster_by, seed, a.launches, a.heldout))
        if a.out and before is None:
            with a.out.open("a") as out:
                out.write(json.dumps({"study": key} | dataclasses.asdict(seen[-1])) + "\n")
    what = {"scenario": scenario.name, "one_is_faster_by": a.faster_by, "studies": a.studies, "launches": a.launches}
    what |= {"heldout": a.heldout}
    print(json.dumps(what | row(seen, scenario, 1 + a.faster_by)), flush=True)


def _kept(out: Path | None) -> dict[str, Seen]:
    if out is None or not out.exists():
        return {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {r.pop("study"): Seen(**r) for r in rows}


if __name__ == "__main__":
    main()
