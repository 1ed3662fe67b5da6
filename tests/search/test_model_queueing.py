"""Queues against known results and against a simulation of each request."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.search.model.queueing import machine_repair, occupancy, waits, waits_for_slots


def one_by_one(arrival: np.ndarray, service: np.ndarray, servers: int = 1) -> np.ndarray:
    """First come, first served, simulated."""
    free = [0.0] * servers
    found = []
    for at, takes in zip(arrival, service, strict=True):
        start = max(at, heapq.heappop(free))
        found.append(start - at)
        heapq.heappush(free, start + takes)
    return np.array(found)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 5)), min_size=1, max_size=60))
def test_waits_are_those_of_a_simulated_server(pairs: list[tuple[float, float]]) -> None:
    arrival = np.cumsum([gap for gap, _ in pairs])
    service = np.array([takes for _, takes in pairs])
    assert waits(arrival, service) == pytest.approx(one_by_one(arrival, service), abs=1e-9)


def test_poisson_arrivals_wait_as_pollaczek_and_khinchine_say() -> None:
    rng = np.random.default_rng(1)
    arrival = np.cumsum(rng.exponential(1.0, 400_000))
    service = np.full_like(arrival, 0.7)
    assert waits(arrival, service).mean() == pytest.approx(0.7 * 0.7 / (2 * (1 - 0.7)), rel=0.05)


def test_no_slot_is_waited_for_while_there_are_slots() -> None:
    arrival = np.arange(100.0)
    assert not waits_for_slots(arrival, np.full(100, 0.9), slots=4).any()


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 20)), min_size=1, max_size=60), st.integers(1, 6))
def test_slots_are_waited_for_as_in_a_simulation(pairs: list[tuple[float, float]], slots: int) -> None:
    arrival, hold = np.cumsum([gap for gap, _ in pairs]), np.array([takes for _, takes in pairs])
    assert waits_for_slots(arrival, hold, slots) == pytest.approx(one_by_one(arrival, hold, slots), abs=1e-9)


def test_occupancy_follows_little_s_law() -> None:
    rng = np.random.default_rng(2)
    start = np.cumsum(rng.exponential(0.1, 20_000))
    stay = rng.uniform(2, 6, 20_000)
    present, after = occupancy(start, start + stay)
    # 10 arrivals a second x 4 s, and the request itself
    assert present.mean() == pytest.approx(41, rel=0.05)
    index = 10_000
    assert start[after[index]] >= start[index] + stay[index] > start[after[index] - 1]


@pytest.mark.parametrize("customers", [1, 2, 8, 64])
def test_machine_repair_is_near_the_exact_recursion(customers: int) -> None:
    # exact mean-value analysis of one exponential server and a delay
    service, think, queue = 1.0, 10.0, 0.0
    response = service
    for n in range(1, customers + 1):
        response = service * (1 + queue)
        queue = n * response / (response + think)
    assert machine_repair(customers, service, think) == pytest.approx(response, rel=0.12)
