"""Which format a trace file has, from its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.errors import UsageError
from tuner.load.formats import tables
from tuner.load.formats.jsonl import first_objects

_HEAD_BYTES = 1 << 16
_TABLES = {"csv": tables.OWN, "azure": tables.AZURE, "burstgpt": tables.BURSTGPT, "vidur": tables.VIDUR_LENGTHS}
_KNOWN = (
    "Give a CSV file with a header: "
    + "; ".join(f"{', '.join(filter(None, (t.time, t.input, t.output)))} ({name})" for name, t in _TABLES.items())
    + "; or JSON lines with arrival_s, input_tokens, output_tokens. "
    "Other formats are named by --format (in a study file: trace.format)"
)
_SERVEGEN_FAMILIES = {"Gamma", "Weibull", ""}


def recognise(path: Path) -> str:
    """One of the names of formats; UsageError for a file that is none of them, with what to do."""
    if not path.exists():
        raise UsageError("there is no such file", where=str(path))
    if not path.is_file():
        raise UsageError("is not a file", where=str(path))
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if refusal := _no_trace(head):
        raise UsageError(refusal[0], where=str(path), fix=refusal[1])
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        return "sharegpt"
    if text.startswith("{"):
        known = next(filter(None, map(_json_format, first_objects(path))), None)
    else:
        known = _table_format(text.splitlines()[0], path) if text else None
    if known is None:
        raise UsageError(f"the trace format is not recognised{_found(text, path)}", where=str(path), fix=_KNOWN)
    return known


def _no_trace(head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for files that are often there instead of a trace."""
    if not head:
        return "the file is empty", ""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the trace itself", "Fetch it: git lfs pull"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "a compressed file", "Unpack it first"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "a UTF-16 file", "Convert it: iconv -f UTF-16 -t UTF-8"
    return None


def _json_format(row: dict[str, Any]) -> str | None:
    if {"arrival_s", "input_tokens", "output_tokens"} <= row.keys():
        return "jsonl"
    if {"timestamp", "input_length", "output_length"} <= row.keys():
        return "bailian" if "chat_id" in row else "mooncake"
    if "conversations" in row:
        return "sharegpt"
    if any(isinstance(part, dict) and "messages" in part for part in (row, row.get("request"), row.get("body"))):
        return "openai-chat"
    return "vllm-custom" if "prompt" in row else None


def _table_format(line: str, path: Path) -> str | None:
    header = tables.header_of(line)
    if len(header) == 6 and header[3] in _SERVEGEN_FAMILIES and header[0].isdecimal():
        raise UsageError(
            "a ServeGen rate profile: rates per window, no requests",
            where=str(path),
            fix=f"Make requests from it: tuner trace synth OUT --rates {path} --profile azure-conversation",
        )
    return next((name for name, table in _TABLES.items() if tables.matches(table, header)), None)


def _found(text: str, path: Path) -> str:
    """The columns, or the keys of the first line, that nothing is known for."""
    if text.startswith("{"):
        names = sorted(next(iter(first_objects(path)), {}))
        return f": its lines have the keys {_shown(names)}" if names else ""
    line = text.partition("\n")[0]
    if ";" in line and "," not in line:
        return ": its columns are separated by ';' instead of ','"
    header = tables.header_of(line)
    return f": its columns are {_shown(header)}" if len(header) > 1 else ""


def _shown(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:8]) + (" ..." if len(names) > 8 else "")
