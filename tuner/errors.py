"""The errors a user can meet, each with its exit code and its fix."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class TunerError(Exception):
    """An error with one clear line for the user; never shown as a traceback.

    ``where`` is ``file:line`` (or a file, or empty), ``fix`` is what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line}. {self.fix}" if self.fix else line


class UsageError(TunerError):
    """A bad file, a bad flag or a bad value: exit code 2."""

    exit_code = 2


class NothingFeasible(TunerError):
    """No configuration meets the SLOs (or a promise does not hold): exit code 3."""

    exit_code = 3


class EnvironmentFault(TunerError):
    """The machine lacks something (engine, GPU, disk, port): exit code 4."""

    exit_code = 4


class Unreachable(EnvironmentFault):
    """A server does not answer, or not as one that serves: it, not this machine, is at fault."""


class NoCompletions(UsageError):
    """A server answers, and streams no completions (of that model, to that key); ``why``, in words that name neither
    its address nor the model."""

    def __init__(self, message: str, *, why: str, fix: str) -> None:
        super().__init__(message, fix=fix)
        self.why = why


class Infeasible(Exception):
    """Raised by a function engine's callable, or a predictor's: this configuration cannot serve, and why."""

    def __init__(self, reason: object = "") -> None:
        super().__init__(reason)
        self.reason = "" if reason is None else encodable(str(reason))


_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """``text`` without what would steer a terminal: a server, or a function, may say anything."""
    return text.translate(_CONTROL)


def alike(counts: Mapping[str, int]) -> dict[str, int]:
    """Texts with their counts, the commonest first. Those that differ in their figures alone count as one, which the
    first of them stands for."""
    example: dict[str, str] = {}
    found: Counter[str] = Counter()
    for text, count in counts.items():
        found[example.setdefault(re.sub(r"\d+(\.\d+)?", "#", text), text)] += count
    return dict(found.most_common())


def encodable(text: str) -> str:
    """``text`` as a file or a database takes it: half a character (of a file name that is no UTF-8) is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names this file (a full disk names none)."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """``with replacing(path) as half:`` gives the file beside ``path`` that takes its place when it is written, so that
    a reader (or a kill) never sees half of it. An error leaves nothing of it; an OSError names ``path``."""
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            yield half
            half.replace(path)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
