"""What each value of each parameter does on the blind surfaces, beside what rules of thumb say of it.

    python -m benchmarks.search.effects blind_{a,c,d}:{0,1,2}

Means over the pairs of configurations that differ in this parameter alone (from its first value) and both run: of the
log latency at the lowest load, and of the log capacity (the highest load within SLO; half the lowest where there is
none). ``runs`` is the share of configurations with the value that run; the rules say expected crashes. It holds
the sizes in ``tuner/search/expert.py`` against what others, who had not read them, believe of engines.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.search.blind import Blind
from tuner.search.expert import effects


def table(surface: Blind) -> dict[str, list[dict[str, float]]]:
    """Per parameter, per value: what it does to ``latency`` and ``capacity``, and whether it ``runs``; what the rules
    say of it under ``said_latency``, ``said_capacity`` and ``said_crashes`` (the latencies and capacities from those
    of the first value)."""
    runs, _, latency, ok = surface.source.truth_grid(surface.scenario)
    held = np.logical_and.accumulate(ok, axis=1) & runs[:, None]
    loads = np.log(np.array([surface.loads[0] / 2, *surface.loads]))
    capacity, first = loads[held.sum(1)], np.log(latency[:, 0])
    values = surface.source.space()
    shape = [len(v) for v in values.values()]
    found = {}
    for j, (name, p, said) in enumerate(zip(values, surface.space.parameters, effects(surface.space), strict=True)):
        known, log_s, most = (np.moveaxis(a.reshape(shape), j, 0) for a in (runs, first, capacity))
        said = said[[p.values.index(v) for v in values[name]]]
        rows = []
        for k in range(shape[j]):
            both = known[0] & known[k]
            rows.append(
                {
                    "latency": _mean((log_s[k] - log_s[0])[both]),
                    "capacity": _mean((most[k] - most[0])[both]),
                    "runs": float(known[k].mean()),
                    "said_latency": float(said[k, 0] - said[0, 0]),
                    "said_capacity": float(said[k, 1] - said[0, 1]),
                    "said_crashes": float(said[k, 2]),
                }
            )
        found[name] = rows
    return found


def _mean(of: np.ndarray) -> float:
    return float(of.mean()) if of.size else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surfaces", nargs="+", metavar="blind_g:0")
    for word in parser.parse_args().surfaces:
        surface = Blind(word)
        print(f"\n| {word} | value | latency | rules | capacity | rules | runs | crashes expected |")
        print("|---|---|---|---|---|---|---|---|")
        for name, rows in table(surface).items():
            for value, r in zip(surface.source.space()[name], rows, strict=True):
                print(
                    f"| {name} | {value} | {r['latency']:+.2f} | {r['said_latency']:+.2f} | {r['capacity']:+.2f} | "
                    f"{r['said_capacity']:+.2f} | {r['runs']:.0%} | {r['said_crashes']:.2f} |"
                )
