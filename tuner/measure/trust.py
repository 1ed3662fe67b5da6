"""When a measurement is the client's fault: the rules, each with the words that the user reads.

Every limit has a floor in seconds and a share of what it would distort. On a machine whose cores the server needs too,
a few milliseconds of lag are unavoidable and mean nothing beside a latency of a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.spec.slo import Slo
from tuner.words import figure

SEND_LAG_S = 0.005
READ_LAG_S = 0.002
SHARE = 0.05
OFFERED_OFF = 0.01
CORE_SHARE = 0.70
TOKENS_OFF = 0.01
TOKENS_FLOOR = 32
UNFILLED = 0.01  # of the prompts that were to fill the prefix cache
PREFIX_OFF = 0.02


def untrusted(metrics: Mapping[str, float], slos: Sequence[Slo]) -> tuple[str, ...]:
    """Why a step cannot be believed; empty where it can. ``metrics`` are the step's own."""
    reasons = []
    send_lag_s = metrics.get("send_lag_p99_s", 0.0)
    allowed_s = max(SEND_LAG_S, SHARE * _reference(metrics, slos, ("ttft", "e2e"), "ttft_p99_s"))
    if send_lag_s > allowed_s:
        reasons.append(
            f"the client sent late: p99 of the send lag is {_ms(send_lag_s)}, at most {_ms(allowed_s)} is allowed"
        )
    stamp_error_s = metrics.get("stamp_error_p99_s", 0.0)
    allowed_s = max(READ_LAG_S, SHARE * _reference(metrics, slos, ("itl", "tpot"), "itl_p99_s"))
    if stamp_error_s > allowed_s:
        reasons.append(
            f"the client read late: 1 % of the tokens have arrival times off by up to {_ms(stamp_error_s)} or more, "
            f"at most {_ms(allowed_s)} is allowed"
        )
    offered, sent = metrics.get("offered_requests_per_s", math.nan), metrics.get("sent_requests_per_s", math.nan)
    longer_s = abs(1 / sent - 1 / offered) * metrics.get("measured_requests", math.inf) if offered > 0 < sent else 0.0
    if abs(sent - offered) > OFFERED_OFF * offered and longer_s > SEND_LAG_S:
        reasons.append(f"{figure(sent, 4)} requests/s were sent where the trace wants {figure(offered, 4)}")
    if never_sent := metrics.get("client_failures", 0.0):
        reasons.append(
            f"{never_sent:,.0f} requests could not be sent: the client's machine is out of sockets or memory"
        )
    if metrics.get("client_processes_lost", 0.0):
        reasons.append("a client process died, and with it what it knew of its requests: see the lines above")
    if metrics.get("client_fell_behind", 0.0):
        reasons.append("the client could not keep up with what it received, and ended the step: give it more cores")
    unfilled, wanted = metrics.get("fill_failures", 0.0), metrics.get("fill_requests", 0.0)
    if unfilled > UNFILLED * wanted and not any(slo.miss(metrics) for slo in slos):
        reasons.append(f"{unfilled:,.0f} of the {wanted:,.0f} prompts failed that were to fill the prefix cache")
    core_share = metrics.get("client_cpu_share", 0.0)
    if core_share > CORE_SHARE:
        reasons.append(f"a client process used {core_share:.0%} of a core, at most {CORE_SHARE:.0%} is allowed")
    reasons += _disagreements(metrics)
    return tuple(reasons)


def not_their_length(meta: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    """Where prompts were shorter than they were sent, or answers that did not fail shorter than the server was told to
    make them: less work passes for speed. And where answers were longer than they may be, which no count of tokens is.
    ``meta`` is the records'."""
    return [*_prompts_cut(meta, metrics), *_not_as_asked(meta, metrics)]


def _prompts_cut(meta: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    share, tokens = metrics.get("input_share", 1.0), metrics.get("mean_prompt_tokens", 0.0)
    if not meta.get("exact_prompts") or not 0 < share < 1 - TOKENS_OFF or tokens * (1 / share - 1) <= 1:
        return []  # 0: it does not count
    why = "it cuts prompts off" + ("" if meta["dialect"]["prompt"] == "ids" else ", or has another tokenizer")
    return [f"the server counted {share:.1%} of the prompt tokens that were sent: {why}"]


def _not_as_asked(meta: Mapping[str, Any], metrics: Mapping[str, float]) -> list[str]:
    forced = meta.get("output") == "forced" and meta.get("dialect", {}).get("forced")
    share = metrics.get("output_share", 1.0)
    more = metrics.get("mean_output_tokens", 0.0) * (1 - 1 / share) if share > 1 + TOKENS_OFF else 0.0
    if more > 1:  # one: a server may count the end of an answer
        by = "by chunks" if meta.get("dialect", {}).get("counting") == "chunks" else "by the server's count"
        return [f"{share:.1%} of the output tokens came, {by}, that were asked for at most: it is no count of tokens"]
    if not forced or share >= 1 - TOKENS_OFF:
        return []
    if meta["dialect"].get("counting") == "chunks":
        return [f"the server tells no number of tokens, and its chunks hold several: {share:.1%} of them were counted"]
    return [
        f"only {share:.1%} of the output tokens came that were asked for, though ignore_eos was sent: "
        "does the server heed it? (--free-output, in a study trace.output: free, lets it end its answers)"
    ]


def _disagreements(metrics: Mapping[str, float]) -> list[str]:
    """Where the server's own counters contradict the client. A TTFT that is longer at the client is none: the server
    begins to count once its front end has taken the request apart, and the wait before that is the user's too."""
    reasons = []
    ours, theirs = metrics.get("client_output_tokens", 0.0), metrics.get("server_output_tokens", math.nan)
    if abs(theirs - ours) > max(TOKENS_OFF * ours, TOKENS_FLOOR) and not metrics.get("cut_off_requests", 0.0):
        reasons.append(
            f"the server counted {theirs:,.0f} output tokens, the client {ours:,.0f}: "
            "somebody else uses the server, or tokens are miscounted"
        )
    ours_s, theirs_s = metrics.get("client_ttft_mean_s", math.nan), metrics.get("server_ttft_mean_s", math.nan)
    if ours_s < theirs_s * (1 - SHARE) - SEND_LAG_S:
        reasons.append(
            f"the client's mean TTFT is {_ms(ours_s)}, the server's own {_ms(theirs_s)}, "
            "though the client's way is longer"
        )
    hits, shared = metrics.get("server_prefix_hit_rate", math.nan), metrics.get("trace_prefix_share", math.nan)
    if hits > shared + PREFIX_OFF and not metrics.get("server_preemptions", 0.0):
        reasons.append(
            f"the prefix cache held {hits:.1%} of the prompts, the trace shares {shared:.1%}: "
            "the server had seen these prompts before (use another seed)"
        )
    return reasons


def _reference(metrics: Mapping[str, float], slos: Sequence[Slo], latencies: Sequence[str], key: str) -> float:
    """The latency that a lag is compared with: the tightest limit on it, or what was measured where that is more."""
    limit_s = min((slo.limit for slo in slos if slo.latency in latencies), default=0.0)
    measured_s = metrics.get(key, 0.0)
    return max(limit_s, measured_s if math.isfinite(measured_s) else 0.0)


def _ms(seconds: float) -> str:
    return f"{figure(seconds * 1e3)} ms"
