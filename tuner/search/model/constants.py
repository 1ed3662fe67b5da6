"""The few constants of the analytic model: each a physical share or time, common to all models and GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Fitted once over all rows of measured serving tables (``benchmarks/model``); none belongs to a model or a GPU.

    ``bandwidth_share``: share of the data sheet's bandwidth that weight and KV reads reach. ``flops_share``: share of
    the dense peak that large products reach; ``expert_flops_share`` the same for grouped products of routed experts.
    ``attention_share``: share of the bf16 peak in prefill attention. ``link_share``: share of the link in all-reduces.
    ``kernel_s``: what a kernel costs inside a captured graph beside its memory and arithmetic (launch, ramp, tail);
    ``eager_kernel_s``: the same without a graph. ``step_s``: scheduler, sampling and output per engine step;
    ``sequence_s``: its part that grows with each running sequence; ``request_s``: HTTP, tokenization and
    admission of one request.
    """

    bandwidth_share: float = 0.80
    flops_share: float = 0.60
    expert_flops_share: float = 0.35
    attention_share: float = 0.40
    link_share: float = 0.60
    kernel_s: float = 4.3e-6
    eager_kernel_s: float = 15e-6
    step_s: float = 0.4e-3
    sequence_s: float = 8e-6
    request_s: float = 10e-3
