"""ServeGen rate profiles: a rate and a burstiness per window of time, from which arrivals are made."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.errors import UsageError
from tuner.load.formats import values
from tuner.load.formats.blocks import blocks
from tuner.load.formats.report import BadLine, Tally

_FAMILIES = ("Gamma", "Weibull", "")
_MOST_REQUESTS = 10**8


@dataclass(frozen=True, slots=True, eq=False)
class RateProfile:
    """Windows of ``window_s`` seconds, in order: ``start_s`` (n,), mean ``rate_per_s`` (n,), ``cv`` (n,) of the gaps.

    The files' fitted distributions are not used. In the published profile that was checked they miss the window's
    measured rate by a factor of 2.4 (median), and Weibull gaps with the measured CV show 0.6 of it in a window's few
    hundred requests; Gamma gaps show 0.9.
    """

    start_s: np.ndarray
    rate_per_s: np.ndarray
    cv: np.ndarray
    window_s: float

    def between(self, from_s: float, to_s: float) -> RateProfile:
        """The windows that start in [from_s, to_s); UsageError where none does."""
        kept = (self.start_s >= from_s) & (self.start_s < to_s)
        if not kept.any():
            raise UsageError(
                f"the rate profile has no window from {from_s:g} s to {to_s:g} s",
                fix=f"It runs from {self.start_s[0]:g} s to {self.start_s[-1] + self.window_s:g} s",
            )
        return RateProfile(self.start_s[kept], self.rate_per_s[kept], self.cv[kept], self.window_s)

    def times(self, rng: np.random.Generator) -> np.ndarray:
        """Arrival times in seconds from the first window's start, never decreasing.

        A window has its rate's number of requests (a fraction is rounded at random); their Gamma gaps are stretched to
        fill the window, which keeps rate and CV.
        """
        counts = np.floor(self.rate_per_s * self.window_s + rng.random(len(self.start_s))).astype(np.int64)
        if counts.sum() > _MOST_REQUESTS:
            raise UsageError(f"the rate profile means {counts.sum():.3g} requests: too many", fix="Take less of it")
        times = []
        for start_s, count, cv in zip(self.start_s - self.start_s[0], counts, self.cv, strict=True):
            reached = np.cumsum(rng.standard_gamma(max(cv, 1e-2) ** -2, count + 1))
            if count and reached[-1] > 0:
                # a last gap too small for a float64 must not push a request into the next window
                part = np.minimum(reached[:-1] / reached[-1], 1 - 1e-9)
                times.append(start_s + part * self.window_s)
        return np.concatenate(times) if times else np.empty(0)


def read_rates(path: str | Path, *, max_bad: int | None = None) -> RateProfile:
    """A ServeGen ``chunk-*-trace.csv``: start in seconds, rate, CV, family, shape, scale, without a header.

    Raises UsageError with file:line where too many lines are bad.
    """
    path = Path(path)
    tally = Tally(str(path), "servegen rates", max_bad)
    rows: dict[float, tuple[float, float]] = {}
    try:
        for number, line in ((n, line) for block in blocks(path) for n, line in block.lines()):
            tally.lines += 1
            try:
                start_s, rate, cv = _row(line)
                if start_s in rows:
                    raise BadLine("a window that was there before")
                rows[start_s] = rate, cv
            except BadLine as mistake:
                tally.reject(number, str(mistake))
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    tally.finish(len(rows))
    if len(rows) < 2:
        raise UsageError("a rate profile needs two windows to show their length", where=str(path))
    start_s = np.array(sorted(rows))
    rate_per_s, cv = np.array([rows[start] for start in start_s]).T
    return RateProfile(start_s, rate_per_s, cv, float(np.diff(start_s).min()))


def _row(line: bytes) -> tuple[float, float, float]:
    """(start, rate, CV)."""
    try:
        fields = next(csv.reader([line.decode("utf-8")]), [])
    except (UnicodeDecodeError, csv.Error):
        raise BadLine("not CSV") from None
    if len(fields) != 6:
        raise BadLine("wrong number of columns")
    if fields[3].strip() not in _FAMILIES:
        raise BadLine("unknown distribution")
    start_s, rate, cv = (values.seconds(field) for field in fields[:3])
    if rate > 1e6 or cv > 1e3:
        raise BadLine("rate over a million requests per second, or CV over a thousand")
    return start_s, rate, cv
