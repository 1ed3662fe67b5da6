"""``/metrics`` in Prometheus' text form, under vLLM's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.engines.emulator.service import Service


def exposition(service: Service) -> str:
    """The counters and gauges that a tuner reads of a vLLM server, summed over data-parallel ranks' own lines."""
    sim = service.simulator
    lines: list[str] = []
    samples: dict[str, tuple[str, list[tuple[str, float]]]] = {}

    def put(name: str, kind: str, labels: str, value: float) -> None:
        samples.setdefault(name, (kind, []))[1].append((labels, value))

    for index, replica in enumerate(sim.replicas):
        label = f'engine="{index}",model_name="{service.served}"'
        scheduler = replica.scheduler
        share = 1 / len(sim.replicas)
        put("vllm:num_requests_running", "gauge", label, len(scheduler.running))
        put("vllm:num_requests_waiting", "gauge", label, len(scheduler.waiting))
        put("vllm:kv_cache_usage_perc", "gauge", label, scheduler.pool.usage)
        put("vllm:num_preemptions_total", "counter", label, scheduler.preemptions)
        put("vllm:prefix_cache_queries_total", "counter", label, scheduler.cache_queries)
        put("vllm:prefix_cache_hits_total", "counter", label, scheduler.cache_hits)
        put("vllm:prompt_tokens_total", "counter", label, sim.prompt_tokens * share)
        put("vllm:generation_tokens_total", "counter", label, sim.generation_tokens * share)
        put("vllm:engine_sleep_state", "gauge", label + ',sleep_state="awake"', 1)
        if sim.settings.draft:
            put("vllm:spec_decode_num_drafts_total", "counter", label, scheduler.drafts)
            put("vllm:spec_decode_num_draft_tokens_total", "counter", label, scheduler.draft_tokens)
            put("vllm:spec_decode_num_accepted_tokens_total", "counter", label, scheduler.accepted_tokens)
    whole = f'engine="0",model_name="{service.served}"'
    put("vllm:request_success_total", "counter", whole + ',finished_reason="length"', service.requests)
    put("emulator:lateness_p99_seconds", "gauge", "", service.lateness.quantile(0.99))
    put("emulator:time_scale", "gauge", "", service.scale)
    for name, (kind, values) in samples.items():
        base = name.removesuffix("_total")
        lines += [f"# HELP {name} {base} (emulated)", f"# TYPE {name} {kind}"]
        lines += [
            f"{name}{{{labels}}} {float(value)}" if labels else f"{name} {float(value)}" for labels, value in values
        ]
    return "\n".join(lines) + "\n"
