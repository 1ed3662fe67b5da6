"""What a number in a trace file may be. Each check raises BadLine with the kind of mistake."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from tuner.load.formats.report import BadLine

MAX_TOKENS = 10_000_000
"""No model takes or makes more tokens in one request: a larger number is a mistake."""
MAX_SECONDS = 1e11
"""The year 5138 as a Unix time: a later arrival is a mistake (or in another unit)."""

NO_OUTPUT = "no output tokens (the request failed)"

_WHOLE = re.compile(r"(?:\+|-(?=0+$))?([0-9]{1,15})(?:\.0*)?")  # -0 is 0, as it is to pyarrow
_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[ T]([0-9]{2}(?::[0-9]{2}(?::[0-9]{2}(?:\.([0-9]{1,9}))?)?)?)(Z|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def tokens(value: Any, *, at_least: int = 0) -> int:
    """A count of tokens from JSON or from text: a whole number from ``at_least`` to 10 million."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip())
        number: Any = int(match[1]) if match else None
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    else:
        number = value
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadLine("token count is not a whole number")
    if number < at_least:
        raise BadLine("token count is too small")
    if number > MAX_TOKENS:
        raise BadLine("token count is over 10 million")
    return number


def seconds(value: Any, *, unit_s: float = 1.0) -> float:
    """A time in units of ``unit_s``, from JSON or from text: finite, not negative, before the year 5138."""
    if isinstance(value, str):
        if "_" in value:  # float() would read 1_000
            raise BadLine("time is not a number")
        try:
            value = float(value)
        except ValueError:
            raise BadLine("time is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLine("time is not a number")
    if not 0 <= value <= MAX_SECONDS / unit_s:  # NaN fails it too
        raise BadLine("time is negative, infinite or too large")
    return value * unit_s


def text(value: Any) -> str:
    """A text that can be sent as UTF-8: half of a surrogate pair (a \\ud800 escape) becomes a question mark."""
    if not isinstance(value, str):
        raise BadLine("text is not text")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def nanoseconds(value: str) -> int:
    """An ISO 8601 time (a date, with the time of day to nine fractional digits, with or without zone) as Unix ns."""
    match = _TIMESTAMP.fullmatch(value.strip())
    if not match:
        raise BadLine("time is not a timestamp")
    date, time, fraction, zone = match.groups()
    try:
        whole = datetime.fromisoformat(f"{date}T{(time or '00').partition('.')[0]}{zone or '+00:00'}") - _EPOCH
    except (ValueError, OverflowError):
        raise BadLine("time is not a timestamp") from None
    unix_s = whole.days * 86400 + whole.seconds
    if not 0 <= unix_s < 9_000_000_000:  # int64 nanoseconds end in 2262
        raise BadLine("time is not between 1970 and 2255")
    return unix_s * 10**9 + int((fraction or "0").ljust(9, "0"))
