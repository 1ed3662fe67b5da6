"""The few constants of the analytic model: each a physical share or time, common to all models and GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Host:
    """What an engine's host side costs, whatever the model.

    ``step_s``: scheduler, sampling and output per step; ``sequence_s``: its part per running sequence;
    ``request_s``: HTTP, tokenization and admission of one request; ``eager_kernel_s``: one kernel launched without a
    captured graph.
    """

    step_s: float
    sequence_s: float
    request_s: float
    eager_kernel_s: float


@dataclass(frozen=True, slots=True)
class Constants:
    """Fitted once over all rows of a measured serving table (``benchmarks/model``); none belongs to a model or a GPU.

    ``bandwidth_share``: share of the data sheet's bandwidth that weight and KV reads reach. ``flops_share``: share of
    the dense peak that large products reach; ``expert_flops_share`` the same for grouped products of routed experts.
    ``attention_share``: share of the bf16 peak in attention. ``link_share``: share of the link in all-reduces.
    ``kernel_s``: what a kernel costs inside a captured graph beside its memory and arithmetic (launch, ramp, tail).
    """

    bandwidth_share: float = 0.88
    flops_share: float = 0.59
    expert_flops_share: float = 0.22
    attention_share: float = 0.38
    link_share: float = 0.59
    kernel_s: float = 4.6e-6
    hosts: Mapping[str, Host] = field(
        default_factory=lambda: {
            "vllm": Host(0.4e-3, 8e-6, 26e-3, 15e-6),
            "sglang": Host(0.4e-3, 20e-6, 185e-3, 16e-6),
            # On a CPU server the host's work is not hidden behind the accelerator's (no asynchronous scheduling), and
            # three processes share the cores with the arithmetic.
            "vllm/cpu": Host(1e-3, 0.35e-3, 5e-3, 15e-6),
        }
    )

    def doubts(self, kind: str) -> dict[str, float]:
        """How far each constant may be off on a machine that was not measured, as the standard deviation of its
        logarithm (chosen, not fitted): on a CPU server all of them are anybody's guess."""
        shared, host = (0.8, 0.8) if kind == "cpu" else (0.25, 0.5)
        return dict.fromkeys(SHARED, shared) | dict.fromkeys(HOST, host)

    def scaled(self, factors: Mapping[str, float], engine: str, kind: str) -> Constants:
        """These constants times ``factors``; those of :class:`Host` are the engine's own."""
        shared = {n: getattr(self, n) * factors.get(n, 1.0) for n in SHARED}
        known = self.host(engine, kind)
        host = Host(*(getattr(known, n) * factors.get(n, 1.0) for n in HOST))
        return Constants(**shared, hosts={f"{engine}/cpu" if kind == "cpu" else engine: host})

    def host(self, engine: str, kind: str = "gpu") -> Host:
        """The host costs of ``engine`` on a ``gpu`` or ``cpu`` server; vLLM's for an engine that was never measured."""
        if kind == "cpu":
            return self.hosts.get(f"{engine}/cpu") or self.hosts.get("vllm/cpu") or self.hosts["vllm"]
        return self.hosts.get(engine) or self.hosts["vllm"]


#: What each is, in a few words for a report.
WORDS = {
    "bandwidth_share": "memory bandwidth that is reached",
    "flops_share": "arithmetic that large products reach",
    "expert_flops_share": "arithmetic that experts' products reach",
    "attention_share": "arithmetic that attention reaches",
    "link_share": "link bandwidth that is reached",
    "kernel_s": "seconds of a kernel in a captured graph",
    "step_s": "host seconds per step",
    "sequence_s": "host seconds per running sequence and step",
    "request_s": "host seconds per request",
    "eager_kernel_s": "seconds of a kernel without a graph",
}
HOST = tuple(f.name for f in fields(Host))
SHARED = tuple(f.name for f in fields(Constants) if f.name != "hosts")
