"""The text edge: YAML with line numbers in, validated models or one clear line out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tuner.errors import UsageError

M = TypeVar("M", bound=BaseModel)
Loc = Sequence[str | int]


class Strict(BaseModel):
    """A section of a file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file as read: plain data, and the line on which each entry stands; ``flags`` are those of the command line
    that entries came from instead."""

    path: str
    data: Mapping[str, Any]
    tree: Any = None
    flags: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)

    def where(self, loc: Loc = ()) -> str:
        """``file:line`` of the entry at ``loc``, or of the nearest parent that stands in the file; the flag that set
        it."""
        for n in range(len(loc), 0, -1):
            if flag := self.flags.get(tuple(loc[:n])):
                return flag
        node, line = self.tree, 1
        for key in loc:
            found = _line(node, key)
            if found is None:
                break
            line = found
            node = node[key]
        return f"{self.path}:{line}" if self.tree is not None else self.path

    @property
    def begun(self) -> bool:
        """Whether this is a study folder's own file: what was measured with it is worth more than a later rule."""
        return bool(self.data.get("frozen"))

    def error(self, message: str, loc: Loc = (), fix: str = "") -> UsageError:
        return UsageError(message, where=self.where(loc), fix=fix)


def _line(node: Any, key: str | int) -> int | None:
    if isinstance(node, CommentedMap):
        place = (node.lc.data or {}).get(key)  # a key merged with << has no line in this mapping
        return place[0] + 1 if place else None
    if isinstance(node, CommentedSeq) and isinstance(key, int) and key < len(node):
        return node.lc.item(key)[0] + 1
    return None


def read(path: Path, kind: str) -> Document:
    """Reads a YAML mapping. ``kind`` names it in errors (``study``, ``search space``)."""
    shown = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = suggest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UsageError(f"no such {kind} file", where=shown, fix=near) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read this {kind} file ({error})", where=shown) from None
    try:
        tree = YAML(typ="rt").load(text)
        data = plain(tree)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context or "not YAML"
        raise UsageError(f"this is not valid YAML: {problem}", where=f"{shown}:{line}") from None
    except (YAMLError, ValueError) as error:
        raise UsageError(f"this is not valid YAML: {str(error).splitlines()[0]}", where=shown) from None
    except RecursionError:
        raise UsageError("this is not valid YAML: it is nested too deeply", where=shown) from None
    if not isinstance(tree, CommentedMap):
        raise UsageError(f"a {kind} file is a mapping of keys to values", where=f"{shown}:1")
    return Document(shown, data, tree)


def plain(node: Any) -> Any:
    """ruamel's round-trip containers as plain dicts, lists and scalars."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    for scalar in (bool, int, float, str):
        if isinstance(node, scalar):
            return scalar(node)
    return node


def validate(model: type[M], document: Document, data: Any = None, prefix: Loc = ()) -> M:
    """``data`` (by default the whole document) as ``model``; the first fault becomes a UsageError with file:line."""
    try:
        return model.model_validate(document.data if data is None else data)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [*prefix, *_keys(first["loc"], document.data if data is None else data, first["type"] == "missing")]
        name = ".".join(str(part) for part in loc)
        if first["type"] == "extra_forbidden":
            known = _fields(model, [str(p) for p in first["loc"][:-1]])
            raise document.error(f"unknown key {loc[-1]!r}", loc, suggest(str(loc[-1]), known)) from None
        if first["type"] == "missing":
            raise document.error(f"{name} is missing", loc[:-1], f"add {loc[-1]}: ...") from None
        message = first["msg"].removeprefix("Value error, ")
        expected = first.get("ctx", {}).get("expected", "") if first["type"] == "literal_error" else ""
        words = re.findall(r"'([^']*)'", expected)
        fix = suggest(str(first["input"]), words) if words else ""
        fix = "" if fix.startswith("Known") else fix  # the message lists them already
        raise document.error(f"{name}: {message[0].lower()}{message[1:]}" if name else message, loc, fix) from None


def _keys(loc: Sequence[str | int], data: Any, missing: bool) -> list[str | int]:
    """``loc`` without what pydantic adds to it, the names of a union's members: those are no keys of the file."""
    found: list[str | int] = []
    for at, part in enumerate(loc):
        last = missing and at == len(loc) - 1
        known = part in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(part, int)
        if known or last:
            found.append(part)
        if known:
            data = cast(Any, data)[part]
    return found


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean X?``, or the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(known)}" if known else ""
