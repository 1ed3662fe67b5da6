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
    """Windows of ``window_s`` seconds, in order: ``start_s`` (n,), mean ``rate_per_s`` (n,), and ``family`` and
    ``shape`` (n,) of the gaps' distribution. The fitted scale is not kept: the rate says it."""

    start_s: np.ndarray
    rate_per_s: np.ndarray
    family: tuple[str, ...]
    shape: np.ndarray
    window_s: float

    def between(self, from_s: float, to_s: float) -> RateProfile:
        """The windows that start in [from_s, to_s); UsageError where none does."""
        kept = np.flatnonzero((self.start_s >= from_s) & (self.start_s < to_s))
        if not len(kept):
            raise UsageError(
                f"the rate profile has no window from {from_s:g} s to {to_s:g} s",
                fix=f"It runs from {self.start_s[0]:g} s to {self.start_s[-1] + self.window_s:g} s",
            )
        family = tuple(self.family[k] for k in kept)
        return RateProfile(self.start_s[kept], self.rate_per_s[kept], family, self.shape[kept], self.window_s)

    def times(self, rng: np.random.Generator) -> np.ndarray:
        """Arrival times in seconds from the first window's start, never decreasing.

        A window has its rate's number of requests (a fraction is rounded at random); their gaps are drawn from the
        window's distribution and stretched to fill the window, which keeps rate and CV.
        """
        counts = np.floor(self.rate_per_s * self.window_s + rng.random(len(self.start_s))).astype(np.int64)
        if counts.sum() > _MOST_REQUESTS:
            raise UsageError(f"the rate profile means {counts.sum():.3g} requests: too many", fix="Take less of it")
        times = []
        for start_s, count, family, shape in zip(
            self.start_s - self.start_s[0], counts, self.family, self.shape, strict=True
        ):
            draw = rng.weibull if family == "Weibull" else rng.standard_gamma
            reached = np.cumsum(draw(shape, count + 1))
            if count and reached[-1] > 0:
                times.append(start_s + reached[:-1] / reached[-1] * self.window_s)
        return np.maximum.accumulate(np.concatenate(times)) if times else np.empty(0)


def read_rates(path: str | Path, *, max_bad: int | None = None) -> RateProfile:
    """A ServeGen ``chunk-*-trace.csv``: start in seconds, rate, CV, family, shape, scale, without a header.

    Raises UsageError with file:line where too many lines are bad.
    """
    path = Path(path)
    tally = Tally(str(path), "servegen rates", max_bad)
    rows: dict[float, tuple[float, str, float]] = {}
    try:
        for number, line in ((n, line) for block in blocks(path) for n, line in block.lines()):
            tally.lines += 1
            try:
                start_s, row = _row(line)
                if start_s in rows:
                    raise BadLine("a window that was there before")
                rows[start_s] = row
            except BadLine as mistake:
                tally.reject(number, str(mistake))
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    tally.finish(len(rows))
    start_s = np.array(sorted(rows))
    if len(start_s) < 2:
        raise UsageError("a rate profile needs two windows to show their length", where=str(path))
    rate, family, shape = zip(*(rows[start] for start in start_s), strict=True)
    return RateProfile(start_s, np.array(rate), family, np.array(shape), float(np.diff(start_s).min()))


def _row(line: bytes) -> tuple[float, tuple[float, str, float]]:
    """(start, (rate, family, shape of the gaps))."""
    try:
        fields = next(csv.reader([line.decode("utf-8")]), [])
    except (UnicodeDecodeError, csv.Error):
        raise BadLine("not CSV") from None
    if len(fields) != 6:
        raise BadLine("wrong number of columns")
    start_s, rate, cv, shape = (values.seconds(fields[k]) for k in (0, 1, 2, 4))
    family = fields[3].strip()
    if family not in _FAMILIES:
        raise BadLine("unknown distribution")
    if rate > 1e6:
        raise BadLine("rate over a million requests per second")
    if not family or shape <= 0:
        family, shape = "Gamma", 1 / max(cv, 1e-3) ** 2
    return start_s, (rate, family, min(max(shape, 1e-6), 1e6))
