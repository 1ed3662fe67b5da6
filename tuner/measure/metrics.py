"""Every metric, computed from a records file alone. ``docs/measurement.md`` defines them in words.

Latencies are (n,) arrays in seconds, one entry per request: +inf where the request failed, nan where it has none
(a single token has no TPOT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tuner.load.records import ABSENT, Records, read
from tuner.measure import quantile
from tuner.measure.window import Window, lasts_s, warm_end_ns, window
from tuner.spec.slo import Slo, bound_responses

_BATCHES = 20
_T_19 = 2.093024054408263  # Student's t, 19 degrees of freedom, two-sided 95 %
_HOLD_GAPS = 20_000_000
Metrics = dict[str, float]
Intervals = dict[str, tuple[float, float]]


def metrics_from_records(path: Path, slos: Sequence[Slo], quantiles: Sequence[float]) -> tuple[Metrics, Intervals]:
    """What a step reported, from its records file: metrics, and 95 % intervals of those that have one.

    Latencies come at ``quantiles`` and at those the SLOs name, with mean and maximum. Raises UsageError where
    ``path`` is no records file.
    """
    return compute(read(path), slos, quantiles)


def compute(records: Records, slos: Sequence[Slo], quantiles: Sequence[float]) -> tuple[Metrics, Intervals]:
    """As :func:`metrics_from_records`, from records that have been read.

    Of a burst (or a single request) of which nothing ended well it is not known for how long it was asked for: its
    goodput is 0 over the time until the last of it ended, and no figure at all where that is none.
    """
    span = window(records)
    measured = is_measured(records, span)
    n = int(measured.sum())
    metrics: Metrics = {
        "measured_requests": float(n),
        "cut_requests": float(len(records) - n),
        "censored_requests": float(censored_requests(records, measured)),
        "duration_s": span.duration_s,
    }
    intervals: Intervals = {}
    for source in ("client", "server"):  # what only they knew while it ran
        metrics.update({name: float(value) for name, value in records.meta.get(source, {}).items()})
    if not n:
        return metrics, intervals
    metrics["error_rate"] = error_rate(records, measured)
    intervals["error_rate"] = quantile.proportion(round(metrics["error_rate"] * n), n)
    metrics["send_lag_p99_s"] = quantile.summary(send_lag_s(records)[measured], 0.99)[0]
    asked = _asked(records, span)
    paced = asked if lasts_s(records) else span  # the ramp ends with an arrival: one too many, as the last is
    metrics["offered_requests_per_s"] = offered_requests_per_s(records, paced)
    metrics["sent_requests_per_s"] = sent_requests_per_s(records, is_measured(records, paced), paced)
    if (measured & _whole(records)).any():
        metrics["output_share"] = output_share(records, measured)
        if (share := input_share(records, measured)) is not None:
            metrics["input_share"] = share
        metrics["mean_prompt_tokens"], metrics["mean_output_tokens"] = mean_tokens(records, measured)
    limits = {name: min((s.limit for s in slos if s.latency == name), default=math.inf) for name in REQUEST_LATENCIES}
    for name, latency in REQUEST_LATENCIES.items():
        if name == "itl":
            continue
        values = latency(records, limits[name])[measured]
        values = values[~np.isnan(values)]
        _describe(name, values, _stats(name, slos, quantiles), metrics, intervals)
    _describe_itl(Gaps(records, measured), _stats("itl", slos, quantiles), metrics, intervals)
    good = is_good(records, slos)
    if (share := slo_share(records, good)) is not None:
        metrics["slo_share"] = share
    if span.duration_s > 0:
        came, good_came = throughputs(records, span, np.ones(len(records), dtype=bool), good)
        _rates("", came, span.duration_s, metrics, intervals)
        if asked.duration_s > 0 and _promptly(records, slos, asked):
            counts, metrics["goodput_window_s"] = goodputs(records, asked, good)
            _rates("goodput_", counts, metrics["goodput_window_s"], metrics, intervals)
        else:
            _rates("goodput_", good_came, span.duration_s, metrics, intervals)
    return metrics, intervals


def answered(records: Records) -> Metrics:
    """What all requests that ended well brought, by the rule by which goodput counts what was asked for: no less than
    that."""
    counts, seconds = goodputs(records, _asked(records, window(records)), _whole(records))
    return {name: float(per_batch.sum()) / seconds for name, per_batch in counts.items()}


# which requests


def _asked(records: Records, span: Window) -> Window:
    return Window(min(warm_end_ns(records), span.start_ns), span.asked_ns, span.asked_ns)


def is_measured(records: Records, span: Window) -> np.ndarray:
    """(n,) bool: intended within the window, not in the warm-up."""
    intended = records.columns["intended_ns"]
    return (intended >= span.start_ns) & (intended <= span.end_ns) & ~records.columns["warmup"]


def censored_requests(records: Records, measured: np.ndarray) -> int:
    """Measured requests of which the end was not seen: timed out, or cut off by an early stop."""
    error = records.columns["error"]
    return int((np.isin(error, ["timeout", "stopped"]) & measured).sum())


def is_good(records: Records, slos: Sequence[Slo]) -> np.ndarray:
    """(n,) bool: ended well, and its own TTFT, TPOT, mean ITL, e2e and normalised latency are within every SLO's limit
    on that latency of each request."""
    good = records.columns["error"] == ""
    for slo in slos:
        if slo.each:
            values = REQUEST_LATENCIES[slo.latency](records, slo.limit)
            good = good & ~(values > slo.limit)
    return good


# latencies, one entry per request


def ttft_s(records: Records, limit_s: float = math.inf) -> np.ndarray:
    """First token's arrival minus the intended send."""
    return _latency(records, records.columns["first_token_ns"], limit_s)


def e2e_s(records: Records, limit_s: float = math.inf) -> np.ndarray:
    """Last token's arrival minus the intended send."""
    return _latency(records, np.where(_whole(records), records.columns["last_token_ns"], ABSENT), limit_s)


def tpot_s(records: Records, limit_s: float = math.inf) -> np.ndarray:
    """(last token - first token) / (tokens - 1); nan for a single token."""
    c = records.columns
    gaps = c["output_tokens"] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(gaps > 0, (c["last_token_ns"] - c["first_token_ns"]) / 1e9 / gaps, np.nan)
    return np.where(records.failed(), np.inf, np.where(_whole(records), values, np.nan))


def norm_latency_s(records: Records, limit_s: float = math.inf) -> np.ndarray:
    """End-to-end latency divided by the output tokens."""
    tokens = np.maximum(records.columns["output_tokens"], 1)
    return np.where(records.failed(), np.inf, np.where(_whole(records), e2e_s(records) / tokens, np.nan))


REQUEST_LATENCIES: Mapping[str, Callable[[Records, float], np.ndarray]] = {
    "ttft": ttft_s,
    "e2e": e2e_s,
    "tpot": tpot_s,
    "itl": tpot_s,  # a request's mean ITL is its TPOT; the metric itl_* is over all gaps of all requests
    "norm_latency": norm_latency_s,
}


def _whole(records: Records) -> np.ndarray:
    return records.columns["error"] == ""


def _latency(records: Records, until_ns: np.ndarray, limit_s: float) -> np.ndarray:
    """Seconds from the intended send. A request that an early stop cut off has waited at least until then: +inf where
    that is beyond ``limit_s``, else that long, a lower bound (without it only the quick ones would be left)."""
    c = records.columns
    values = np.where(until_ns != ABSENT, (until_ns - c["intended_ns"]) / 1e9, np.nan)
    waited_s = (c["end_ns"] - c["intended_ns"]) / 1e9
    cut_off = np.isnan(values) & (c["error"] == "stopped")
    values = np.where(cut_off, np.where(waited_s > limit_s, np.inf, waited_s), values)
    # a response without a single token, though it ended well, answered nothing
    empty = (c["error"] == "") & (c["output_tokens"] == 0)
    return np.where(records.failed() | empty, np.inf, values)


def send_lag_s(records: Records) -> np.ndarray:
    """Actual minus intended send."""
    return (records.columns["sent_ns"] - records.columns["intended_ns"]) / 1e9


class Gaps:
    """The gaps between successive tokens of the chosen requests, in nanoseconds, in parts. Iterating again is cheap for
    ordinary files (the gaps are held) and reads the file again for huge ones.

    ``infinite`` is the number of failed requests among the chosen: each contributes one gap that never ended.
    """

    def __init__(self, records: Records, chosen: np.ndarray) -> None:
        self._records, self._chosen = records, chosen
        self.infinite = int((records.failed() & chosen).sum())
        self._held: list[tuple[np.ndarray, np.ndarray]] | None = None
        tokens = records.columns["output_tokens"][chosen]
        if int(tokens.sum()) <= _HOLD_GAPS:
            self._held = list(self._parts())

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(gaps end to end, number of gaps per request that has any)."""
        return iter(self._held) if self._held is not None else self._parts()

    def __iter__(self) -> Iterator[np.ndarray]:
        return (gaps for gaps, _ in self.parts())

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, token_ns, offsets in self._records.tokens():
            lengths = np.diff(offsets)
            inside = np.ones(max(len(token_ns) - 1, 0), dtype=bool)
            edges = offsets[1:-1]
            inside[edges[(edges > 0) & (edges < len(token_ns))] - 1] = (
                False  # from one request's last to the next's first
            )
            inside &= np.repeat(self._chosen[rows], lengths)[1:] if len(token_ns) else inside
            counts = np.maximum(lengths - 1, 0)[self._chosen[rows]]
            # files of earlier versions have tokens a few microseconds before the one that they follow
            yield np.maximum(np.diff(token_ns)[inside], 0), counts[counts > 0]


# rates


def error_rate(records: Records, measured: np.ndarray) -> float:
    """Share of the measured requests that failed."""
    return float(records.failed()[measured].mean())


def offered_requests_per_s(records: Records, span: Window) -> float:
    """Requests intended in the window / the time from its beginning to the traffic's end (to one mean response at the
    least)."""
    return _offered(is_measured(records, span), span.asked_s)


def sent_requests_per_s(records: Records, measured: np.ndarray, span: Window) -> float:
    """What was really offered: the measured requests / the time in which they left (that of ``offered_requests_per_s``,
    longer by as much as the last left later than intended, shorter by as much as the first did)."""
    if not measured.any():
        return math.nan
    c = records.columns
    late_ns = (c["sent_ns"][measured].max() - c["intended_ns"][measured].max()) - (
        c["sent_ns"][measured].min() - c["intended_ns"][measured].min()
    )
    return _offered(measured, span.asked_s + float(late_ns) / 1e9)


def output_share(records: Records, measured: np.ndarray) -> float:
    """Output tokens that came / output tokens the trace asks for, over the measured requests that did not fail."""
    whole = _whole(records) & measured
    return float(records.columns["output_tokens"][whole].sum() / max(1, records.columns["wanted_tokens"][whole].sum()))


def input_share(records: Records, measured: np.ndarray) -> float | None:
    """Prompt tokens by the server's count / prompt tokens of the trace, over the measured requests that did not fail.
    None where the server counts none."""
    c = records.columns
    counted = _whole(records) & measured & (c["prompt_tokens"] != ABSENT)
    if not counted.any():
        return None
    return float(c["prompt_tokens"][counted].sum() / max(1, c["input_tokens"][counted].sum()))


def mean_tokens(records: Records, measured: np.ndarray) -> tuple[float, float]:
    """Tokens of a prompt and of an answer, over the measured requests that did not fail, however late they were."""
    whole = _whole(records) & measured
    return float(_prompts(records)[whole].mean()), float(records.columns["output_tokens"][whole].mean())


def throughputs(records: Records, span: Window, *many: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What left the server in the window, (20,) counts over equal parts of it, by the metric's name; for each of
    ``many`` sets of requests, (n,) bool, in one pass over the tokens.

    An output token counts when it arrives, a prompt when its first token arrives, a request when it ends.
    """
    c = records.columns
    edges = np.linspace(span.start_ns, span.end_ns, _BATCHES + 1)
    output = np.zeros((len(many), _BATCHES))
    for rows, token_ns, offsets in records.tokens():
        for counts, of in zip(output, many, strict=True):
            counts += np.histogram(token_ns[np.repeat(of[rows], np.diff(offsets))], edges)[0]
    found = []
    for counts, of in zip(output, many, strict=True):
        ended, started = of & _whole(records), of & (c["first_token_ns"] != ABSENT)
        prompts = np.histogram(c["first_token_ns"][started], edges, weights=_prompts(records)[started])[0]
        requests = np.histogram(c["last_token_ns"][ended], edges)[0].astype(float)
        found.append(_named(requests, counts, prompts))
    return found


def goodputs(records: Records, span: Window, good: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """What the good requests brought, (20,) counts by when they were asked for, and in how many seconds it was served.

    ``span`` begins with the end of the warm-up. A server that keeps up brings what it is asked for, however long a
    response takes; what happens to arrive in a window as short as a few responses is another number for every
    configuration. A server that does not keep up lets requests wait ever longer: by as much as the last tenth waited
    longer for a first token than the first tenth (medians, five requests at the least) the traffic took longer to
    serve than to arrive. A twentieth of the window is nothing: bursts do that. Infinite waits count as the longest
    finite one.
    """
    c = records.columns
    chosen = is_measured(records, span)
    waits = ttft_s(records)[chosen][np.argsort(c["intended_ns"][chosen], kind="stable")]
    finite = waits[np.isfinite(waits)]
    waits = np.where(np.isfinite(waits), waits, finite.max(initial=0.0))
    tenth = max(5, len(waits) // 10)
    grown = 0.0
    if len(waits) >= 2 * tenth:  # the tenths' middles lie less than the whole apart
        grown = float(np.median(waits[-tenth:]) - np.median(waits[:tenth])) * len(waits) / (len(waits) - tenth)
    edges = np.linspace(span.start_ns, span.end_ns, _BATCHES + 1)
    chosen = chosen & good
    asked = c["intended_ns"][chosen]
    brought = (np.ones(len(asked)), c["output_tokens"][chosen].astype(float), _prompts(records)[chosen])
    counts = _named(*(np.histogram(asked, edges, weights=each)[0] for each in brought))
    return counts, span.duration_s + max(grown - 0.05 * span.duration_s, 0.0)


def slo_share(records: Records, good: np.ndarray) -> float | None:
    """Share of the output tokens after the warm-up that good requests have; of those that were cut off nobody knows.
    None without any token."""
    c = records.columns
    known = ~c["warmup"] & (c["error"] != "stopped")
    tokens = int(c["output_tokens"][known].sum())
    return float(c["output_tokens"][known & good].sum()) / tokens if tokens else None


def _promptly(records: Records, slos: Sequence[Slo], span: Window) -> bool:
    """Whether a good request cannot have been served long after the window: the SLOs bound how long its tokens take,
    and arrivals did not wait for it."""
    return bound_responses(slos, span.duration_s) and "closed_loop_concurrency" not in records.meta.get("client", {})


def _prompts(records: Records) -> np.ndarray:
    c = records.columns
    return np.where(c["prompt_tokens"] != ABSENT, c["prompt_tokens"], c["input_tokens"]).astype(float)


def _named(requests: np.ndarray, output: np.ndarray, prompts: np.ndarray) -> dict[str, np.ndarray]:
    return {"requests_per_s": requests, "output_tokens_per_s": output, "total_tokens_per_s": prompts + output}


def _rates(
    prefix: str, counts: Mapping[str, np.ndarray], seconds: float, metrics: Metrics, intervals: Intervals
) -> None:
    for name, per_batch in counts.items():
        metrics[prefix + name] = float(per_batch.sum()) / seconds
        intervals[prefix + name] = _batch_means(per_batch / (seconds / _BATCHES))


def _offered(measured: np.ndarray, duration_s: float) -> float:
    return float(measured.sum()) / duration_s if duration_s > 0 else math.nan


def _batch_means(rates: np.ndarray) -> tuple[float, float]:
    """A 95 % interval for the mean rate by batch means (Law & Kelton, section 9.5.3)."""
    half = _T_19 * float(rates.std(ddof=1)) / math.sqrt(len(rates))
    return max(0.0, float(rates.mean()) - half), float(rates.mean()) + half


# statistics


def _stats(name: str, slos: Sequence[Slo], quantiles: Sequence[float]) -> dict[str, float | None]:
    """Label (``p99``, ``mean``) -> quantile, for the plan's quantiles and the SLOs on this latency."""
    stats: dict[str, float | None] = {f"p{round(q * 100, 6):g}": q for q in quantiles}
    stats.update({slo.metric.rsplit("_", 1)[1]: slo.quantile for slo in slos if slo.latency == name})
    return {**stats, "mean": None, "max": None}


def _describe(name: str, values: np.ndarray, stats: Mapping, metrics: Metrics, intervals: Intervals) -> None:
    if not len(values):
        return
    for label, q in stats.items():
        key = f"{name}_{label}_s"
        if q is None:
            metrics[key] = float(values.mean() if label == "mean" else values.max())
        else:
            metrics[key], intervals[key] = quantile.summary(values, q)


def _describe_itl(gaps: Gaps, stats: Mapping, metrics: Metrics, intervals: Intervals) -> None:
    """The quantiles of all gaps. Gaps of one request resemble each other, so the interval counts as many independent
    observations as there would have to be for the variance seen between requests (design effect; Kish 1965)."""
    total, highest, finite, requests = 0.0, 0.0, 0, 0
    for part, counts in gaps.parts():
        total += float(part.sum())
        highest = max(highest, float(part.max(initial=0)))
        finite, requests = finite + len(part), requests + len(counts)
    n = finite + gaps.infinite
    if not n:
        return
    metrics["itl_mean_s"] = math.inf if gaps.infinite else total / n / 1e9
    metrics["itl_max_s"] = math.inf if gaps.infinite else highest / 1e9
    quantiles = {label: q for label, q in stats.items() if q is not None}
    ranks = {label: quantile.rank(n, q) for label, q in quantiles.items()}
    values = quantile.select(gaps, sorted({k for k in ranks.values() if k <= finite}))
    at = {label: values.get(k, math.inf) for label, k in ranks.items()}
    effective = {label: _effective(gaps, value, n, requests) for label, value in at.items()}
    bounds = {}
    for label, q in quantiles.items():
        m = effective[label]
        low, high = quantile.interval_ranks(m, q)
        bounds[label] = (math.floor(low / m * n), math.ceil(high / m * n) if high <= m else n + 1)
    edges = quantile.select(gaps, sorted({k for pair in bounds.values() for k in pair if 1 <= k <= finite}))
    for label, (low, high) in bounds.items():
        metrics[f"itl_{label}_s"] = at[label] / 1e9
        intervals[f"itl_{label}_s"] = (
            edges.get(low, math.inf) / 1e9 if low >= 1 else 0.0,
            edges.get(high, math.inf) / 1e9,
        )


def _effective(gaps: Gaps, value: float, n: int, requests: int) -> int:
    """How many independent gaps say as much about the share of gaps <= value as these clustered ones."""
    if requests < 2 or not math.isfinite(value):
        return max(1, min(n, requests + gaps.infinite))
    below: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for part, counts in gaps.parts():
        if len(counts):
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            below.append(np.add.reduceat((part <= value).astype(np.int64), starts))
            sizes.append(counts)
    y, m = np.concatenate(below).astype(float), np.concatenate(sizes).astype(float)
    share = y.sum() / m.sum()
    if not 0 < share < 1:
        return max(1, min(n, requests))
    variance = requests / (requests - 1) * float(((y - share * m) ** 2).sum()) / m.sum() ** 2
    effect = max(1.0, variance / (share * (1 - share) / m.sum()))
    return max(1, int(n / effect))
