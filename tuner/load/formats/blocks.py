"""A file as blocks of whole lines, so that a file larger than memory can be read with line numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tuner.errors import UsageError

_BLOCK_BYTES = 4 << 20
_MAX_LINE_BYTES = 64 << 20
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines; ``first_line`` is the number of the first, from 1."""

    first_line: int
    data: bytes

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number, line without its ending) of every line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if stripped := line.strip(b"\r \t"):
                yield number, stripped

    def halves(self) -> tuple[Block, Block] | None:
        """The block cut at the line end nearest before its middle; None where that is not possible."""
        at = self.data.rfind(b"\n", 0, len(self.data) // 2) + 1
        if at == 0:
            return None
        head = self.data[:at]
        return Block(self.first_line, head), Block(self.first_line + head.count(b"\n"), self.data[at:])


def blocks(path: Path, *, skip_lines: int = 0) -> Iterator[Block]:
    """The file's lines in blocks of about 4 MiB, after the first ``skip_lines``, without a byte-order mark.

    Raises UsageError for a line longer than 64 MiB.
    """
    with path.open("rb") as file:
        line = 1
        for data in _whole_lines(file, path):
            if line == 1:
                data = data.removeprefix(_UTF8_BOM)
            block = Block(line, data)
            line += data.count(b"\n")
            while skip_lines and block.data:
                _, newline, rest = block.data.partition(b"\n")
                block, skip_lines = Block(block.first_line + len(newline), rest), skip_lines - 1
            if block.data:
                yield block


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    tail = b""
    while chunk := file.read(_BLOCK_BYTES):
        head, newline, rest = chunk.rpartition(b"\n")
        if not newline:
            tail += chunk
        else:
            yield tail + head + newline
            tail = rest
        if len(tail) > _MAX_LINE_BYTES:
            raise UsageError("a line is longer than 64 MiB", where=str(path), fix="A trace has one request per line")
    if tail:
        yield tail
