"""Reading a server's log while it starts: which phase it is in, how long each took, what it says about itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.study.outcome import Boot

GIB = 2**30
LINE = 4_000  # bytes of a line that are looked at: no message is longer, and patterns take their time over what is
_KEEP = 4 * 2**20  # how much of a log diagnosis reads: the first and the last half of this many bytes


@dataclass(frozen=True, slots=True)
class Fact:
    """A number in a log line: the pattern's first group (thousands separators allowed) times ``scale``."""

    name: str
    pattern: re.Pattern[str]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one engine's log speaks. ``phases`` in order, each with the line that begins it (the first begins at the
    start); a phase that a configuration does not have is passed over. ``cold`` matches what a server says that still
    compiles while it serves."""

    name: str
    phases: tuple[tuple[str, re.Pattern[str]], ...]
    facts: tuple[Fact, ...] = ()
    cold: re.Pattern[str] = re.compile(r"(?!)")


#: For a server of which nothing is known: one phase.
SILENT = Dialect("silent", (("start", re.compile(r"(?!)")),))


class BootLog:
    """The phases of one start-up. Times come in with the text, so nothing here looks at a clock."""

    def __init__(self, dialect: Dialect, started_s: float) -> None:
        self.dialect = dialect
        self.started_s = started_s
        self.last_line_s = started_s
        self._entered: list[tuple[str, float]] = [(dialect.phases[0][0], started_s)]
        self._facts: dict[str, float] = {}
        self._at = 0

    @property
    def phase(self) -> str:
        return self._entered[-1][0]

    def phase_elapsed_s(self, now_s: float) -> float:
        return now_s - self._entered[-1][1]

    def feed(self, lines: Sequence[str], now_s: float) -> list[str]:
        """Takes in new lines; returns the phases that began with them."""
        begun: list[str] = []
        if lines:
            self.last_line_s = now_s
        for line in lines:
            for index in range(self._at + 1, len(self.dialect.phases)):
                if self.dialect.phases[index][1].search(line):
                    self._at = index
                    self._entered.append((self.dialect.phases[index][0], now_s))
                    begun.append(self.phase)
                    break
            for fact in self.dialect.facts:
                if found := fact.pattern.search(line):
                    self._facts.setdefault(fact.name, float(found.group(1).replace(",", "")) * fact.scale)
        return begun

    def boot(self, now_s: float) -> Boot:
        """What is known at ``now_s``; the current phase counts until then."""
        ends = [at for _, at in self._entered[1:]] + [now_s]
        phases: dict[str, float] = {}
        for (name, begin), end in zip(self._entered, ends, strict=True):
            phases[name] = round(phases.get(name, 0.0) + end - begin, 3)
        return Boot(round(now_s - self.started_s, 3), phases, dict(self._facts))


class LogFile:
    """A log that grows: new whole lines, and the text that diagnosis reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        """The lines finished since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read(8 * 2**20)
        except OSError:
            return []
        self._offset += len(chunk)
        # \r: progress bars rewrite their line.
        first, *more = re.split(rb"[\r\n]+", chunk)
        self._rest += first[: max(0, LINE - len(self._rest))]
        if not more:
            return []
        whole, self._rest = [self._rest, *more[:-1]], more[-1][:LINE]
        return [line[:LINE].decode("utf-8", "replace") for line in whole if line]

    def text(self) -> str:
        """The log, its middle left out where it is very long."""
        try:
            with self.path.open("rb") as file:
                head = file.read(_KEEP // 2)
                size = self.path.stat().st_size
                if size <= len(head):
                    return head.decode("utf-8", "replace")
                file.seek(max(len(head), size - _KEEP // 2))
                return (head + b"\n[...]\n" + file.read()).decode("utf-8", "replace")
        except OSError:
            return ""
