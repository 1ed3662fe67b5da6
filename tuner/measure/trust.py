"""When a measurement is the client's fault: the rules, each with the words that the user reads.

Every limit has a floor in seconds and a share of what it would distort. On a machine whose cores the server needs too,
a few milliseconds of lag are unavoidable and mean nothing beside a latency of a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tuner.spec.slo import Slo

SEND_LAG_S = 0.005
READ_LAG_S = 0.002
SHARE = 0.05
OFFERED_OFF = 0.01
CORE_SHARE = 0.70


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
    requests = offered * metrics.get("duration_s", 0.0)
    # one request over the window's edge is no finding
    if offered > 0 and abs(sent - offered) / offered > OFFERED_OFF and abs(sent - offered) / offered * requests > 1.5:
        reasons.append(f"{sent:.4g} requests/s were sent where the trace wants {offered:.4g}")
    core_share = metrics.get("client_cpu_share", 0.0)
    if core_share > CORE_SHARE:
        reasons.append(f"a client process used {core_share:.0%} of a core, at most {CORE_SHARE:.0%} is allowed")
    return tuple(reasons)


def _reference(metrics: Mapping[str, float], slos: Sequence[Slo], latencies: Sequence[str], key: str) -> float:
    """The latency that a lag is compared with: the tightest limit on it, or what was measured where that is more."""
    limit_s = min((slo.limit for slo in slos if slo.latency in latencies), default=0.0)
    measured_s = metrics.get(key, 0.0)
    return max(limit_s, measured_s if math.isfinite(measured_s) else 0.0)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
