"""Small traces and plans for the replay tests, and what a records file says in plain numbers."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tuner.engines.protocol import Endpoint, StepPlan
from tuner.load.records import ABSENT, read
from tuner.load.trace import Trace
from tuner.spec.slo import parse


def trace(arrival_s: Any, input_tokens: int = 16, output_tokens: int = 10) -> Trace:
    n = len(arrival_s)
    none = np.zeros(0, dtype=np.int64)
    return Trace(
        "t",
        np.asarray(arrival_s, dtype=float),
        np.full(n, input_tokens),
        np.full(n, output_tokens),
        0,
        none,
        np.zeros(n + 1, dtype=np.int64),
    )


def poisson(n: int, rate: float, seed: int = 0, **lengths: int) -> Trace:
    arrival_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))
    return trace(arrival_s - arrival_s[0], **lengths)


def plan(folder: Path, replayed: Trace, *slos: str, load: float = 1.0, **fields: Any) -> StepPlan:
    for k in itertools.count():
        path = folder / f"records-{k}.parquet"
        if not path.exists():
            break
    fields = {"cancel": threading.Event(), "early_stop": False} | fields
    window = fields.pop("window", "w")
    return StepPlan(load, replayed, window, tuple(parse(slo) for slo in slos), path, **fields)


def endpoint(url: str) -> Endpoint:
    return Endpoint(url, "stub")


def seconds(path: Path, column: str) -> np.ndarray:
    """A time column of a records file in order of request, in seconds; nan where absent."""
    columns = read(path).columns
    values = columns[column][np.argsort(columns["request"])]
    return np.where(values == ABSENT, np.nan, values / 1e9)


def truth(path: Path, times: Path) -> dict[str, float]:
    """A step's latencies by the times at which the server let its tokens go, with the percentiles by numpy: whatever
    the machine did to the server, the client has to tell. Of requests that are answered in the order in which they
    were to be sent, all of the same length."""
    meta = read(path).meta
    start_s = meta["epoch_unix_s"] - (time.time() - time.monotonic())
    left_s = np.sort(np.array([json.loads(line) for line in times.read_text().splitlines()]), axis=0)
    first_s, last_s = left_s[:, 0], left_s[:, -1]
    intended_s = seconds(path, "intended_ns") + start_s
    return {
        "ttft_p50_s": float(np.median(first_s - intended_s)),
        "e2e_p50_s": float(np.median(last_s - intended_s)),
        "tpot_p50_s": float(np.median(last_s - first_s)) / (left_s.shape[1] - 1),
        "first_token_p50_s": float(np.median(first_s)) - start_s,  # in any order of the answers
        "itl_p50_s": float(np.median(np.diff(left_s))),
        "itl_p95_s": float(np.quantile(np.diff(left_s), 0.95)),
    }


def undisturbed(run: Callable[[], Any], fits: Callable[[Any], bool], tries: int = 8) -> Any:
    """The first result of ``run`` that fits, else the last. Other work on the machine makes latencies longer and
    measurements untrusted, never the other way round, so a test of timing may ask again."""
    for _ in range(tries):
        if fits(result := run()):
            break
    return result


def quantile(values: np.ndarray, q: float) -> float:
    """Nearest rank, written down independently of the code under test."""
    ordered = sorted(values.tolist())
    for k, value in enumerate(ordered, start=1):
        if k / len(ordered) >= q - 1e-12:
            return value
    raise ValueError("no values")
