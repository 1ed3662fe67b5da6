"""What a reader saw: lines, requests, bad lines by kind, requests left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuner.errors import UsageError

_DEFAULT_MAX_BAD = 100
_ALWAYS_ALLOWED = 3
_KEPT = 20


class BadLine(Exception):
    """A line that cannot be meant; ``str()`` of it is its kind, the same words for the same mistake."""


@dataclass(frozen=True, slots=True)
class ReadingReport:
    """``lines`` read (blank ones and a header are not counted), ``requests`` in the trace; ``bad`` counts bad lines by
    kind and ``first_bad`` holds the first of them as (line number from 1, kind); ``left_out`` counts requests that
    were understood but not kept, by reason; ``notes`` counts what was repaired."""

    path: str
    format: str
    lines: int
    requests: int
    bad: dict[str, int]
    first_bad: tuple[tuple[int, str], ...]
    left_out: dict[str, int]
    notes: dict[str, int]

    def messages(self) -> list[str]:
        """What a user should know, one line each; empty where every line became a request as it stood."""
        out = []
        if self.bad:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad.items())
            line, kind = self.first_bad[0]
            out.append(f"{sum(self.bad.values())} bad lines skipped ({kinds}); the first is {self.path}:{line}: {kind}")
        out += [f"{count} requests left out: {reason}" for reason, count in self.left_out.items()]
        out += [f"{count} requests: {note}" for note, count in self.notes.items()]
        return out


@dataclass(slots=True)
class Tally:
    """Counts while a file is read. ``max_bad`` None: 100 bad lines, and at the end no more than one line in ten (three
    are always allowed); a number: exactly that many."""

    path: str
    format: str
    max_bad: int | None = None
    lines: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: list[tuple[int, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def reject(self, line: int, kind: str) -> None:
        """Counts a bad line; raises UsageError when it is one too many."""
        self.bad[kind] = self.bad.get(kind, 0) + 1
        if len(self.first_bad) < _KEPT:
            self.first_bad.append((line, kind))
        total = sum(self.bad.values())
        if total > (_DEFAULT_MAX_BAD if self.max_bad is None else self.max_bad):
            raise self._too_many(line, kind, total)

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    def note(self, what: str, count: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + count

    def finish(self, requests: int) -> ReadingReport:
        """The report; UsageError where too large a part of the file was bad, or nothing is left."""
        total = sum(self.bad.values())
        if self.max_bad is None and total > max(_ALWAYS_ALLOWED, self.lines // 10):
            raise self._too_many(*self.first_bad[0], total)
        if requests == 0:
            reasons = ", ".join(f"{count} {what}" for what, count in (self.bad | self.left_out).items())
            where = f"{self.path}:{self.first_bad[0][0]}" if self.first_bad else self.path
            raise UsageError(f"no request could be read as {self.format} ({reasons or 'no lines'})", where=where)
        return ReadingReport(
            self.path, self.format, self.lines, requests, self.bad, tuple(self.first_bad), self.left_out, self.notes
        )

    def _too_many(self, line: int, kind: str, total: int) -> UsageError:
        return UsageError(
            f"{kind} ({total} bad lines among {max(self.lines, total)} read as {self.format}: too many)",
            where=f"{self.path}:{line}",
            fix="Repair the file, name its format with --format (in a study file: trace.format), or allow more: "
            f"tuner trace convert {self.path} kept.parquet --max-bad {total * 10}",
        )
