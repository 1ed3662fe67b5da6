"""The objective: the two axes of the front, the SLOs, the price, the quality floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tuner.spec.slo import Slo


@dataclass(frozen=True, slots=True)
class QualityFloor:
    """How far the answers may move from the unquantized baseline's; None switches a test off.

    ``kl_max`` in nats per token, ``top1_min`` and ``greedy_min`` as shares.
    """

    kl_max: float | None = None
    top1_min: float | None = None
    greedy_min: float | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What is wanted. Cost is USD per million output tokens served within SLO; ``latency`` names the other axis
    (``tpot_p99``). ``price_usd_per_gpu_hour`` is per GPU of the study's own hardware, or per server on CPU servers;
    ``prices`` are those of named types of GPU; ``price_assumed``: nobody named one, it is the hardware table's."""

    name: str
    latency: str
    slos: tuple[Slo, ...]
    price_usd_per_gpu_hour: float
    quality: QualityFloor = QualityFloor()
    prices: Mapping[str, float] = field(default_factory=dict)
    price_assumed: bool = field(default=False, compare=False)

    @property
    def latency_key(self) -> str:
        """The latency axis in a step's metrics: ``tpot_p99_s``."""
        return f"{self.latency}_s"
