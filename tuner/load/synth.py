"""Synthetic traces: an arrival process, lengths and shared prefixes, from a trace or from published statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from tuner.errors import UsageError
from tuner.load import lengths as lengths_
from tuner.load.arrivals import DAY_S, Arrivals
from tuner.load.formats.values import MAX_SECONDS, MAX_TOKENS
from tuner.load.lengths import Lengths, QuantileLengths
from tuner.load.sharing import sharing
from tuner.load.summary import rate_per_s
from tuner.load.trace import Trace, with_lengths


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Shared prefixes: ``share`` of all prompt tokens repeat an earlier request's beginning, as far as so many groups
    allow (the first request of a group repeats nothing).

    Every request begins with one of ``groups`` system prompts (the k-th with probability proportional to 1 / k, as
    popularity is in practice) for the same part of its length, in whole blocks of ``block_tokens``; the rest is its
    own.
    """

    share: float
    groups: int = 20
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and self.groups >= 1 and 1 <= self.block_tokens <= 1 << 20):
            raise UsageError(
                f"prefixes with share {self.share:g}, {self.groups} groups, {self.block_tokens} tokens per block",
                fix="Give a share from 0 to 1, at least 1 group and at least 1 token per block",
            )


@dataclass(frozen=True, slots=True)
class Profile:
    """What a synthetic trace is made from; no third party's rows are in it."""

    name: str
    arrivals: Arrivals
    lengths: Lengths
    prefixes: Prefixes | None = None


_MOST_REQUESTS = 10**8
_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # Statistics of the Azure LLM inference traces of 2023 (Patel et al., "Splitwise", ISCA 2024; CC-BY 4.0): rate,
        # CV of the gaps (population), nearest-rank quantiles at the levels above, maximum. No row of them is here.
        "azure-conversation": Profile(
            "azure-conversation",
            Arrivals(5.53, cv=1.09),
            QuantileLengths(
                _LEVELS,
                (29, 181, 207, 396, 1020, 1189, 2735, 4083, 4142, 6212, 14050),
                (16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000),
                sample=19366,
            ),
        ),
        "azure-code": Profile(
            "azure-code",
            Arrivals(2.57, cv=13.15),
            QuantileLengths(
                _LEVELS,
                (17, 75, 147, 578, 1469, 2745, 5194, 7315, 7436, 7437, 7437),
                (6, 6, 7, 9, 13, 24, 55, 90, 252, 831, 1899),
                sample=8819,
            ),
        ),
    }
)


def profile(name: str) -> Profile:
    """A built-in profile; UsageError with the names there are."""
    if name not in PROFILES:
        raise UsageError(f"there is no profile {name!r}", fix=f"Profiles: {', '.join(PROFILES)}")
    return PROFILES[name]


def fit(trace: Trace, *, how: str = "empirical", kind: str = "gamma", period_s: float = DAY_S) -> Profile:
    """A profile with a trace's rate, burstiness, lengths and share of repeated prompt tokens.

    ``how`` is ``empirical`` or ``lognormal`` (the lengths). ``kind`` is ``poisson``, ``gamma`` (the CV of the trace's
    gaps) or ``diurnal`` (the first harmonic of its rate over ``period_s``, and the CV of the gaps without it; its phase
    is not kept: a synthetic day starts in the valley). Raises UsageError for a trace of fewer than three requests,
    without any duration, or for ``diurnal`` shorter than its period.
    """
    gaps = np.diff(trace.arrival_s)
    if len(gaps) < 2 or not trace.arrival_s[-1] > 0:
        raise UsageError(f"trace {trace.name} is too short to fit", fix="Give at least three requests over some time")
    rate, cv = rate_per_s(trace) or 0.0, float(gaps.std() / gaps.mean())
    if kind == "poisson":
        arrivals = Arrivals(rate)
    elif kind == "gamma":
        arrivals = Arrivals(rate, cv=cv)
    elif kind == "diurnal":
        arrivals = _diurnal(trace, period_s)
    else:
        raise UsageError(f"arrivals cannot be fitted as {kind!r}", fix="Use poisson, gamma or diurnal")
    share = sharing(trace).token_share
    prefixes = Prefixes(share, block_tokens=trace.block_tokens) if share > 0 else None
    return Profile(f"{trace.name}-like", arrivals, lengths_.fit(trace, how), prefixes)


def _diurnal(trace: Trace, period_s: float) -> Arrivals:
    """The first harmonic by least squares, over whole periods (of the last a tenth may lack): a part of a day would
    pass for a swing."""
    ends_s = max(trace.until_s, float(trace.arrival_s[-1]))
    periods = math.floor(ends_s / period_s + 0.1)
    if periods < 1:
        raise UsageError(
            f"a trace of {ends_s:.0f} s does not show a period of {period_s:g} s",
            fix="Fit gamma, or give the swing yourself: diurnal:RATE:SWING:PERIOD_S",
        )
    span_s = min(ends_s, periods * period_s)

    def harmonics(at_s: np.ndarray) -> np.ndarray:
        turn = math.tau * at_s / period_s
        return np.stack([np.ones_like(turn), np.cos(turn), np.sin(turn)])

    # of arrivals at rate c f(t), the sum of f over them is the integral of f f' times c
    arrival_s = trace.arrival_s[trace.arrival_s < span_s]
    grid = harmonics((np.arange(10_000) + 0.5) * (span_s / 10_000))
    rate, *wave = np.linalg.solve(grid @ grid.T * (span_s / 10_000), harmonics(arrival_s).sum(axis=1))
    rate = max(float(rate), 1e-3 * len(arrival_s) / span_s)
    swing, valley = min(1.0, math.hypot(*wave) / rate), math.atan2(-wave[1], -wave[0])
    # the swing makes gaps differ, too: burstiness is what is left on a clock that runs with the rate
    turn = math.tau * arrival_s / period_s
    gaps = np.diff(turn - swing * np.sin(turn - valley))
    return Arrivals(rate, cv=float(gaps.std() / gaps.mean()), swing=swing, period_s=period_s)


def synthesise(
    profile: Profile, *, requests: int | None = None, duration_s: float | None = None, seed: int = 0
) -> Trace:
    """A trace of ``requests`` requests, or of the requests that arrive within ``duration_s`` seconds (exactly one of
    the two). The same profile, size and seed give the same trace. Raises UsageError where no request arrives."""
    if (requests is None) == (duration_s is None):
        raise UsageError("a synthetic trace needs its size", fix="Give either a number of requests or a duration")
    if requests is not None and not 1 <= requests <= _MOST_REQUESTS:
        raise UsageError(f"{requests} requests", fix=f"Give a number from 1 to {_MOST_REQUESTS:,}")
    # three streams, so that more requests do not change the lengths of the first ones
    arrivals_rng, lengths_rng, prefixes_rng = np.random.default_rng(seed).spawn(3)
    if requests is None:
        arrival_s = _until(profile.arrivals, duration_s or 0.0, arrivals_rng)
    else:
        arrival_s = profile.arrivals.times(requests, arrivals_rng)
    trace = _assemble(profile.name, arrival_s, profile, lengths_rng, prefixes_rng)
    return trace if duration_s is None else replace(trace, lasts_s=duration_s - float(arrival_s[0]))


def with_arrivals(profile: Profile, arrival_s: np.ndarray, *, seed: int = 0) -> Trace:
    """A trace with given arrivals (never decreasing) and a profile's lengths and prefixes."""
    _, lengths_rng, prefixes_rng = np.random.default_rng(seed).spawn(3)
    return _assemble(profile.name, arrival_s, profile, lengths_rng, prefixes_rng)


def scale(
    trace: Trace,
    *,
    length: float = 1.0,
    rate: float = 1.0,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Trace:
    """A trace for a smaller (or larger) model: lengths times ``length``, then cut to the maxima; rate times ``rate``.

    A block of shared prefix shrinks with the lengths and stays at least one token, so that what was shared stays
    shared; where prefixes are known the factor is therefore rounded to whole tokens per block. Prompts keep at least
    one token and one output token. Texts stay where every prompt keeps its length.
    """
    if not (length > 0 and rate > 0 and math.isfinite(length) and math.isfinite(rate)):
        raise UsageError(f"factors {length:g} on length and {rate:g} on rate", fix="Give factors above 0")
    if any(most is not None and most < 1 for most in (max_input_tokens, max_output_tokens)):
        raise UsageError("a longest prompt or output below one token", fix="Give at least 1")
    width, factor_in = trace.block_tokens, length
    if width:
        width = max(1, round(min(width * length, MAX_TOKENS)))
        factor_in = max(width / trace.block_tokens, length if width == MAX_TOKENS else 0.0)
    # rounded up, so that a partial last block stays one
    tokens_in = _cut(np.ceil(trace.input_tokens * factor_in - 1e-9), max_input_tokens)
    tokens_out = _cut(np.rint(trace.output_tokens * length), max_output_tokens)
    if len(trace) and not trace.arrival_s[-1] / rate <= MAX_SECONDS:
        raise UsageError(f"at {rate:g} times the rate the trace ends after the year 5138", fix="Give a higher factor")
    scaled = with_lengths(trace, tokens_in, tokens_out, width)
    return replace(scaled, arrival_s=trace.arrival_s / rate, lasts_s=trace.lasts_s / rate)


def _cut(tokens: np.ndarray, most: int | None) -> np.ndarray:
    """Scaled lengths (still floats: they may be too large for anything else) as whole numbers of tokens."""
    longest = min(float(tokens.max(initial=1)), most or math.inf)
    if longest > MAX_TOKENS:
        raise UsageError(f"requests would have up to {longest:.3g} tokens", fix="Scale by less, or give a maximum")
    return np.clip(tokens, 1, longest).astype(np.int64)


def _until(arrivals: Arrivals, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """The arrivals before ``duration_s``; drawn in one go, twice as many each time it was not enough."""
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise UsageError(f"a duration of {duration_s:g} s", fix="Give a number of seconds above 0")
    expected = arrivals.rate_per_s * (1 + arrivals.swing) * duration_s
    if expected > _MOST_REQUESTS:
        raise UsageError(f"about {expected:.3g} requests are too many", fix="Give a shorter duration or a lower rate")
    state, n = rng.bit_generator.state, int(expected + 10 * math.sqrt(expected) * max(arrivals.cv, 1)) + 10
    while True:
        rng.bit_generator.state = state
        times = arrivals.times(n, rng)
        if times[-1] >= duration_s:
            return times[times < duration_s]
        n *= 2
        if n > 10 * _MOST_REQUESTS:
            raise UsageError("the requests do not fill the duration", fix="Give a shorter duration or a lower CV")


def _assemble(
    name: str, arrival_s: np.ndarray, profile: Profile, lengths: np.random.Generator, prefixes: np.random.Generator
) -> Trace:
    n = len(arrival_s)
    if n == 0:
        raise UsageError(f"profile {name} gives no request", fix="Ask for more requests or a longer time")
    tokens_in, tokens_out = profile.lengths.draw(n, lengths)
    width, ids, offsets = 0, np.empty(0, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    if profile.prefixes is not None:
        width = profile.prefixes.block_tokens
        ids, offsets = _prefixes(tokens_in, profile.prefixes, prefixes)
    return Trace(name, arrival_s - arrival_s[0], tokens_in, tokens_out, width, ids, offsets)


def _prefixes(tokens_in: np.ndarray, prefixes: Prefixes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(block ids, offsets): block j of group g is j * groups + g, hence equal in every request of the group."""
    popularity = 1 / np.arange(1, prefixes.groups + 1)
    group = rng.choice(prefixes.groups, len(tokens_in), p=popularity / popularity.sum())
    rounding = rng.random(len(tokens_in))

    def begun(part: float) -> np.ndarray:
        # whole blocks with a random rounding, so that the mean share is right for prompts of few blocks, too
        counts = np.floor(tokens_in * part / prefixes.block_tokens + rounding).astype(np.int64)
        return np.minimum(counts, tokens_in // prefixes.block_tokens)

    wanted = prefixes.share * float(tokens_in.sum()) / prefixes.block_tokens
    low, part = prefixes.share, 1.0 if prefixes.share else 0.0
    for _ in range(20):
        middle = (low + part) / 2
        low, part = (low, middle) if _repeated(begun(middle), group) >= wanted else (middle, part)
    counts = begun(part)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return position * prefixes.groups + np.repeat(group, counts), offsets


def _repeated(counts: np.ndarray, group: np.ndarray) -> int:
    """How many of so many leading blocks per request an earlier one of the same group had."""
    order = np.argsort(group, kind="stable")
    base = group[order] * (int(counts.max(initial=0)) + 1)
    most = np.maximum.accumulate(base + counts[order])
    before = np.concatenate([[0], most[:-1]]) - base  # below zero: the group's first
    return int(np.minimum(counts[order], np.maximum(before, 0)).sum())
