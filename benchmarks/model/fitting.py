"""Fits the model's constants to measured rows, and says how well they hold on rows they were not fitted to.

Least squares on the logarithms of TPOT (scale 10 %) and TTFT (scale 50 %), soft-L1 loss, every group of rows (model and
engine) with the same weight, and a log-normal prior (50 %) around round values that come from elsewhere: kernels of
vendors' libraries reach 80 % of bandwidth and 60 % of dense peak, grouped and attention kernels less; a graph's kernel
costs 5 us; both engines' hosts cost the same. The prior never sees the constants that ship, so a part of the table that
is left out has had no say in what predicts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rows import Row
from scipy.optimize import least_squares

from tuner.search.model.closed_loop import ClosedLoop, predict_closed_loop
from tuner.search.model.constants import HOST, SHARED, Constants, Host

_ENGINES = ("vllm", "sglang")
_ANY_HOST = Host(step_s=0.5e-3, sequence_s=10e-6, request_s=20e-3, eager_kernel_s=15e-6)
NEUTRAL = Constants(0.8, 0.6, 0.3, 0.4, 0.6, 5e-6, {"vllm": _ANY_HOST, "sglang": _ANY_HOST})


def predict(row: Row, constants: Constants) -> ClosedLoop:
    # The tables' vLLM versions (0.11 to 0.18) had a default memory share of 0.9.
    share = 0.9 if row.engine == "vllm" else None
    return predict_closed_loop(
        row.shape, row.hardware, row.engine, row.parallelism, row.precision, row.isl, row.osl, row.concurrency,
        constants=constants, length_spread=row.length_spread, memory_share=share,
    )  # fmt: skip


def fit(rows: Sequence[Row], start: Constants = NEUTRAL, prior: float = 0.5) -> Constants:
    """The constants that fit ``rows`` best. An engine that has no rows takes over the host costs of the one that has
    (it was never measured)."""
    rows = _thinned(rows)
    first = to_vector(start)
    groups = Counter(row.group for row in rows)
    weight = np.array([5 / np.sqrt(groups[row.group]) for row in rows])
    times = np.array([(row.ttft_s, row.tpot_s) for row in rows])

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = from_vector(x)
        got = np.array([(p.ttft_s or 1e-4, p.tpot_s or 1e-4) for p in (predict(row, constants) for row in rows)])
        error = np.log(got / times)
        return np.concatenate(((x - first) / prior, weight * error[:, 1] / 0.1, weight * error[:, 0] / 0.5))

    bounds = (first - np.log(20), first + np.log(20))
    bounds[1][: len(SHARED) - 1] = np.log(0.98)  # shares
    solution = least_squares(residuals, first, bounds=bounds, loss="soft_l1", diff_step=0.02, max_nfev=10).x
    constants = from_vector(solution)
    present = {row.engine for row in rows}
    if absent := [engine for engine in _ENGINES if engine not in present]:
        other = next(constants.hosts[e] for e in _ENGINES if e in present)
        hosts = {**constants.hosts, **dict.fromkeys(absent, other)}
        constants = Constants(**{name: getattr(constants, name) for name in SHARED}, hosts=hosts)
    return constants


def _thinned(rows: Sequence[Row], most: int = 30) -> list[Row]:
    """At most ``most`` rows of a group, evenly through the table: groups count alike, more would only take longer."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [group[int(i)] for group in groups.values() for i in np.linspace(0, len(group) - 1, min(most, len(group)))]


def to_vector(constants: Constants) -> np.ndarray:
    hosts = [getattr(constants.host(engine), name) for engine in _ENGINES for name in HOST]
    return np.log([*(getattr(constants, name) for name in SHARED), *hosts])


def from_vector(x: np.ndarray) -> Constants:
    values = [float(v) for v in np.exp(x)]
    shared, rest = values[: len(SHARED)], values[len(SHARED) :]
    hosts = {e: Host(*rest[i * len(HOST) : (i + 1) * len(HOST)]) for i, e in enumerate(_ENGINES)}
    return Constants(**dict(zip(SHARED, shared, strict=True)), hosts=hosts)
