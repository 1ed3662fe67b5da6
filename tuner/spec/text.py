"""The text edge: YAML with line numbers in, validated models or one clear line out."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, StringMark, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from tuner.errors import UsageError

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Loc = Sequence[str | int]
MOST_ENTRIES = 200_000
MOST_BYTES = 1 << 20  # a minute of reading; nobody writes so much, but a trace may be named in place of a study


def _no_switch(why: str) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not (info.context or {}).get("begun"):
            raise ValueError(f"{str(value).lower()} is {why}")
        return value

    return BeforeValidator(check)


NUMERIC = _no_switch("no number: write one, or leave the entry out")  # though to Python true is 1
TEXT = _no_switch("no text: quote it")


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

    def word(self, loc: Loc) -> str:
        """The plain scalar at ``loc`` as it stands in the file; empty where that cannot be told (an alias, a flag)."""
        node: Any = self.tree
        for key in loc[:-1]:
            node = node[key] if isinstance(node, CommentedMap) and key in node else None
        place = (node.lc.data or {}).get(loc[-1]) if isinstance(node, CommentedMap) else None
        lines = _lines(self.path) if place else []
        found = _WORD.match(lines[place[2]], place[3]) if place and place[2] < len(lines) else None
        return found[0] if found else ""

    @property
    def begun(self) -> bool:
        """Whether this is a study folder's own file."""
        return bool(self.data.get("frozen"))

    def error(self, message: str, loc: Loc = (), fix: str = "") -> UsageError:
        return UsageError(message, where=self.where(loc), fix=fix)

    def refuse(self, message: str, loc: Loc = (), fix: str = "") -> None:
        """Raises :meth:`error`, but not of a study that has begun: what was measured with it is worth more than a later
        rule. The caller goes on with what stands there."""
        if not self.begun:
            raise self.error(message, loc, fix)


_WORD = re.compile(r"[0-9.+-][^\s,\]}#]*")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _line(node: Any, key: str | int) -> int | None:
    if isinstance(node, CommentedMap | CommentedSeq):  # what is merged with <<, or in a list with a tag, has no line
        place = (node.lc.data or {}).get(key)
        return place[0] + 1 if place else None
    return None


def read(path: Path, kind: str) -> Document:
    """Reads a YAML mapping. ``kind`` names it in errors (``study``, ``search space``)."""
    shown = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise UsageError(f"more than 1 MiB is no {kind} file", where=shown, fix="Is it a trace? Name the YAML file")
        text = raw.decode("utf-8")
    except FileNotFoundError:
        near = suggest(path.name, [p.name for p in path.parent.glob("*.y*ml") if p.exists()])
        raise UsageError(f"no such {kind} file", where=shown, fix=near) from None
    except OSError as error:
        raise UsageError(f"cannot read this {kind} file ({error})", where=shown) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"this {kind} file is not UTF-8 text", where=f"{shown}:{line}", fix="save it as UTF-8"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it
            tree = YAML(typ="rt").load(text)
        data = plain(tree)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context or "not YAML"
        raise UsageError(f"this is not valid YAML: {problem}", where=f"{shown}:{line}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"this is not valid YAML: {error.reason}", where=f"{shown}:{line}") from None
    except (YAMLError, ValueError) as error:
        raise UsageError(f"this is not valid YAML: {str(error).splitlines()[0]}", where=shown) from None
    except RecursionError:
        raise UsageError("this is not valid YAML: it is nested too deeply", where=shown) from None
    if not isinstance(tree, CommentedMap):
        raise UsageError(f"a {kind} file is a mapping of keys to values", where=f"{shown}:1")
    return Document(shown, data, tree)


def plain(node: Any) -> Any:
    """ruamel's round-trip containers as plain dicts, lists and scalars. Raises ``YAMLError`` for two keys that are one
    word (``1`` and ``"1"``), and for more entries, by aliases of aliases, than anybody writes."""
    return _plain(node, itertools.count(1))


def _plain(node: Any, entries: Iterator[int]) -> Any:
    if next(entries) > MOST_ENTRIES:
        raise YAMLError(f"it has more than {MOST_ENTRIES:,} entries, aliases counted")
    if isinstance(node, Mapping):
        if pair := twice(node, str):
            line = (_line(node, pair[1]) or 1) - 1
            raise MarkedYAMLError(
                problem=f"the key {str(pair[1])!r} is there twice", problem_mark=StringMark("", 0, line, 0, None, 0)
            )
        return {str(key): _plain(value, entries) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value, entries) for value in node]
    if isinstance(node, ScalarBoolean):  # one with an anchor
        return bool(node)
    for scalar in (bool, int, float, str):
        if isinstance(node, scalar):
            return scalar(node)
    return node


def validate(model: type[M], document: Document, data: Any = None, prefix: Loc = ()) -> M:
    """``data`` (by default the whole document) as ``model``; the first fault becomes a UsageError with file:line."""
    data = document.data if data is None else data
    try:
        return model.model_validate(data, context={"begun": document.begun})
    except ValidationError as error:
        first, *others = _nearest(error.errors(), data)
        loc = [*prefix, *_keys(first["loc"], data, first["type"] == "missing")]
        name = ".".join(str(part) for part in loc)
        if first["type"] == "extra_forbidden":
            known = _fields(model, [str(p) for p in first["loc"][:-1]])
            raise document.error(f"unknown key {loc[-1]!r}", loc, suggest(str(loc[-1]), known)) from None
        if first["type"] == "missing":
            raise document.error(f"{name} is missing", loc[:-1], f"add {loc[-1]}: ...") from None
        if first["input"] is None:
            raise document.error(f"{name} is empty", loc, "write a value, or leave the entry out") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("dict_type", "model_type"):
            message = f"keys and values are wanted here, not {first['input']!r:.60}"
        elif isinstance(first["input"], Mapping | list) and first["type"].partition("_")[0] in _SINGLE:
            message = f"one value is wanted here, not {first['input']!r:.60}"
        message += "".join(f", or {e['ctx']['expected']}" for e in others if e["type"] == "literal_error")
        expected = first.get("ctx", {}).get("expected", "") if first["type"] == "literal_error" else ""
        words = re.findall(r"'([^']*)'", expected)
        fix = suggest(str(first["input"]), words) if words else ""
        fix = "" if fix.startswith("Known") else fix  # the message lists them already
        if isinstance(first["input"], Mapping) and {"args", "fixed", "flags"} & {*loc}:  # JSON, as vLLM writes it
            fix = f"write the parts one by one: {loc[-1]}.{next(iter(first['input']), 'NAME')}: VALUE"
        raise document.error(f"{name}: {message[0].lower()}{message[1:]}" if name else message, loc, fix) from None


_SINGLE = ("bool", "int", "float", "string")  # as pydantic names what is one value


def _nearest(errors: Sequence[Any], data: Any) -> list[Any]:
    """The first fault, as each member of a union sees it, the one first that is nearest to what was written: that which
    looked deepest into it, and not one that wants keys of a word."""
    found = [(_keys(e["loc"], data, e["type"] == "missing"), e) for e in errors]
    base = found[0][0]
    same = [(keys, e) for keys, e in found if keys[: len(base)] == base]
    most = max(len(keys) for keys, _ in same)
    deepest = [e for keys, e in same if len(keys) == most]
    word = not isinstance(deepest[0]["input"], Mapping | list)
    return sorted(deepest, key=lambda e: word and e["type"] in ("dict_type", "model_type"))


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
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        inner = next(_models(field.annotation), None) if field else None
        if field and inner:
            model = inner
            if get_origin(field.annotation) is dict:
                next(parts, None)  # its user's own word
    return list(model.model_fields)


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _models(inner)


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean X?``, or the list of what is known."""
    known = sorted(known)
    near = [name for name in known if name.lower() == word.lower()]
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(known)}" if known else ""


def twice(entries: Iterable[T], normal: Callable[[T], Any]) -> tuple[T, T] | None:
    """The first two of ``entries`` that are one in their normal form; None where all differ."""
    seen: dict[Any, T] = {}
    for entry in entries:
        if (found := normal(entry)) in seen:
            return seen[found], entry
        seen[found] = entry
    return None


def check_flags(flags: Mapping[str, Any], normal: Callable[[str], str], document: Document, at: Loc) -> None:
    """Refuses flags that are given twice under their ``normal`` name, and values that a command line would not show as
    the file does."""
    if pair := twice(flags, normal):
        document.refuse(f"--{normal(pair[1])} is given twice", (*at, pair[1]), "keep one of the two")
    for name, value in flags.items():
        _no_nul(name, value, document, at)
        if isinstance(value, float) and not math.isfinite(value):
            document.refuse(f"--{name.lstrip('-')}: no server takes {value:g}", (*at, name))
        word = document.word((*at, name)) if isinstance(value, int | float) else ""
        if re.match(r"[-+]?0[0-9]", word) or (isinstance(value, float) and value.is_integer() and "e" in word.lower()):
            document.refuse(f"{name}: {word} would be passed on as {value}", (*at, name), "write it out, or quote it")


def check_env(env: Mapping[str, Any], document: Document, at: Loc) -> None:
    """Refuses what is no name of an environment variable, and numbers that would not be passed on as they stand."""
    for name, value in env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            fix = "use letters, digits and '_'"
            document.refuse(f"{name!r} is no name of an environment variable", (*at, name), fix)
        _no_nul(name, value, document, at)
        word = "" if isinstance(value, str) else document.word((*at, name))
        if word and word != str(value):
            document.refuse(f"{name}: {word} would be passed on as {value}", (*at, name), f'quote it: "{word}"')


def _no_nul(name: str, value: Any, document: Document, at: Loc) -> None:
    if "\0" in str(value):
        document.refuse(f"{name}: no server can be given a NUL", (*at, name))
