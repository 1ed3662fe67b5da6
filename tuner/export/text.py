"""YAML text that both YAML 1.2 and YAML 1.1 readers (vLLM, Kubernetes, Docker) take alike."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any


def dump(data: Any) -> str:
    """``data`` as YAML in block style. A string that YAML 1.1 would read as something else (``on``, ``1:30``, ``1e3``)
    is quoted, and a number has the dot that it needs there (``1.0e-06``); text of several lines is a literal block, or
    quoted where a block would not give it back."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.Representer = _representer()
    yaml.width = 1_000_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(_plain(data), out)
    return out.getvalue()


def _representer() -> Any:
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        def represent_float(self, data: float) -> Any:
            node = super().represent_float(data)
            if "." not in node.value:
                node.value = node.value.replace("e", ".0e")
            return node

    Representer.add_representer(float, Representer.represent_float)
    return Representer


def _plain(data: Any) -> Any:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

    if isinstance(data, Mapping):
        return {_plain(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, str) and "\n" in data and _block(data):
        return LiteralScalarString(data)
    if isinstance(data, str) and ("\n" in data or ambiguous(data)):
        return DoubleQuotedScalarString(data)
    return data


def comments(lines: Iterable[str]) -> str:
    """One line of comment for each of ``lines``."""
    return "".join(f"# {comment(line)}\n" for line in lines)


def comment(text: str) -> str:
    """``text`` as one line of a comment, which has no escapes: characters that end a line, and those that YAML does
    not allow, become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _block(text: str) -> bool:
    """Whether a literal block gives ``text`` back, which has no escapes."""
    plain = all(c == "\n" or c.isprintable() for c in text) and "\ufeff" not in text
    return plain and bool(text.strip("\n"))


def ambiguous(text: str) -> bool:
    """Whether a reader of either version would not give ``text`` back if it stood there bare."""
    from ruamel.yaml import YAML

    for version in ((1, 1), (1, 2)):
        reader = YAML(typ="safe", pure=True)
        reader.version = version
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ruamel warns of the very words that we are looking for
                if reader.load(text) != text:
                    return True
        except Exception:  # no YAML, or what the reader itself stumbles over: "-_" (IndexError), "._" (ValueError)
            return True
    return False
