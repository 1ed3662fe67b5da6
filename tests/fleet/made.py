"""Offers that nobody measured: a curve with known numbers, for tests only."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tuner.fleet.curve import Point, curve, limits_of
from tuner.fleet.demand import Demand
from tuner.fleet.offer import Offer, Shop
from tuner.space.config import ServingConfig
from tuner.spec.slo import parse

SLOS = tuple(parse(text) for text in ("ttft_p99=1s", "tpot_p99=50ms", "error_rate=1%"))


def point(share: float, top_rps: float) -> Point:
    """A load at ``share`` of the rate at which ttft_p99 reaches its limit of 1 s."""
    ttft_s, tpot_s = 0.1 / (1.1 - share), 0.02 + 0.02 * share
    values = {"ttft_p50_s": ttft_s / 3, "ttft_p99_s": ttft_s, "tpot_p50_s": tpot_s / 2, "tpot_p99_s": tpot_s}
    rate = top_rps * share
    return Point(rate, rate * (1 + 2 * share), values | {"error_rate": 0.0}, watts=200 + 400 * share)


def offer(name: str = "a", *, rps: float = 10.0, usd: float = 2.0, gpu: str = "", gpus: int = 1, **more) -> Offer:
    """Serves ``rps`` requests per second within :data:`SLOS`."""
    points = [point(share, rps) for share in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)]
    made = Offer(
        name=name,
        study=name,
        config=ServingConfig(name, {}, {}, gpus=gpus),
        flags="",
        gpu=gpu or f"GPU-{name}",
        gpus=gpus,
        usd_per_hour=usd,
        capacity=(rps, rps, rps * 1.1),
        curve=curve(points, limits_of(SLOS)[0]),
        start_s=60.0,
        output_tokens=200.0,
        total_tokens=1200.0,
        cv=1.0,
        window_s=60.0,
        basis="made up",
        verified=True,
        emulated=False,
    )
    return replace(made, **more)


def shop(*offers: Offer) -> Shop:
    return Shop(offers, SLOS, (), ())


def demand(*rates: float, swing: float = 0.0) -> Demand:
    return Demand(tuple(str(h) for h in range(len(rates))), np.array(rates, float), swing, math.nan, "made up")


def day(peak: float, swing: float = 0.0) -> Demand:
    """24 hours, lowest at 3 o'clock with a sixth of the peak."""
    rates = [peak * (7 - 5 * math.cos(2 * math.pi * (h - 3) / 24)) / 12 for h in range(24)]
    return demand(*rates, swing=swing)
