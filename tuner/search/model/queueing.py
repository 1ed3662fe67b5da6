"""Queues, driven by the trace's own arrival times so that its bursts are kept."""

from __future__ import annotations

import heapq

import numpy as np


def waits(arrival_s: np.ndarray, service_s: np.ndarray) -> np.ndarray:
    """Waiting time of each request at one first-come first-served server: Lindley's recursion (1952),
    ``W[i + 1] = max(0, W[i] + S[i] - (A[i + 1] - A[i]))``, written with a running minimum. Shapes (n,)."""
    ahead = np.cumsum(service_s) - service_s - arrival_s
    return ahead - np.minimum.accumulate(ahead)


def waits_for_slots(arrival_s: np.ndarray, hold_s: np.ndarray, slots: int) -> np.ndarray:
    """Waiting time before one of ``slots`` places is free, first come first served, each held for ``hold_s`` (Kiefer
    and Wolfowitz 1955: the recursion over the times at which places come free). Shapes (n,)."""
    if slots >= len(arrival_s):
        return np.zeros_like(hold_s)
    ended = np.searchsorted(np.sort(arrival_s + hold_s), arrival_s, side="right")
    if (np.arange(1, len(arrival_s) + 1) - ended).max() <= slots:  # not even with places for all
        return np.zeros_like(hold_s)
    free = [0.0] * max(slots, 1)
    start = []
    for at, hold in zip(arrival_s.tolist(), hold_s.tolist(), strict=True):
        begins = max(at, free[0])
        heapq.heapreplace(free, begins + hold)
        start.append(begins)
    return np.array(start) - arrival_s


def occupancy(start_s: np.ndarray, end_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many requests are in the system with each request, itself included, as a mean over its stay; and the index
    of the first request that starts after its end. ``start_s`` never decreases. Shapes (n,)."""
    n = len(start_s)
    index = np.arange(n)
    left = np.searchsorted(np.sort(end_s), start_s, side="right")
    present = index + 1.0 - left
    total = np.concatenate(([0.0], np.cumsum(present)))
    after = np.searchsorted(start_s, end_s, side="left")
    after = np.maximum(after, index + 1)
    return (total[after] - total[index]) / (after - index), after


def machine_repair(customers: float, service_s: float, think_s: float) -> float:
    """Mean response time at one server that ``customers`` visit in turn, thinking ``think_s`` in between: mean-value
    analysis with Schweitzer's approximation (Reiser and Lavenberg 1980; Schweitzer 1979)."""
    queue = 0.0
    response = service_s
    for _ in range(30):
        response = service_s * (1 + queue * (customers - 1) / max(customers, 1e-9))
        new = customers * response / max(response + think_s, 1e-12)
        if abs(new - queue) < 1e-6 * max(new, 1e-9):
            break
        queue = new
    return response
