"""What an analytic model says about one serving config at one load, before anything is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tuner.space.config import ServingConfig


@dataclass(frozen=True, slots=True)
class Prediction:
    """``fits`` is whether weights and at least one longest request's KV cache fit; if not, ``reason`` says why and
    ``short_bytes`` by how much. ``metrics`` has the names of a step's metrics (``ttft_p50_s``, ``ttft_p99_s``,
    ``tpot_p99_s``, ``e2e_p50_s``, ``output_tokens_per_s``, ``goodput_output_tokens_per_s``,
    ``cost_usd_per_mtok_output`` ...); at a load past saturation the latencies are large but finite.
    ``kv_tokens`` is the room left for the KV cache."""

    fits: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    kv_tokens: float = 0.0
    reason: str = ""
    short_bytes: int = 0


class Predictor(Protocol):
    """A model of one kind of server under one trace: the analytic one, or a user's own."""

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        """Pure and cheap (under a millisecond): thousands are asked for per proposal."""
        ...
