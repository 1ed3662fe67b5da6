"""vLLM's command line as the emulator reads it: the same names, the same refusals in argparse's words."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tuner.space.space import heads, join

Flags = Mapping[str, str | None]
SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-q": "quantization",
}
OWN = {
    "gpu": "value",
    "time-scale": "value",
    "fault": "value",
    "emulator-seed": "value",
    "emulator": "value",
}


class BadFlag(ValueError):
    """A command line that vLLM's parser would refuse, in its words (without ``prog: error:``)."""


@cache
def known_flags() -> Mapping[str, str]:
    """vLLM 0.32's flags without dashes: ``switch``, ``value``, or the choices joined by ``|``."""
    return json.loads((Path(__file__).parent / "vllm_flags.json").read_text())


def parse(argv: Sequence[str]) -> dict[str, str | None]:
    """Flags without dashes mapped to their values (None: a switch), the emulator's own included.

    A repeated ``--fault`` is joined with commas. Raises :class:`BadFlag`.
    """
    kinds = {**known_flags(), **OWN}
    found: dict[str, str | None] = {}
    parts: dict[str, str | None] = {}
    unknown: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in SHORT:
            word = f"--{SHORT[word]}"
        if not word.startswith("--"):
            if "model" in found or unknown:
                unknown.append(word)
            else:
                found["model"] = word
            continue
        name, sep, value = word[2:].partition("=")
        head, dot, key = name.partition(".")
        name = head.replace("_", "-")
        kind = kinds.get(name)
        if kind is None:
            unknown.append(word)
            while words and not words[0].startswith("-"):
                unknown.append(words.pop(0))
        elif kind == "switch":
            if sep:
                raise BadFlag(f"argument --{name}: ignored explicit argument {value!r}")
            found[name] = None
        else:
            if not sep:
                if not words or (words[0].startswith("--") and not dot):
                    raise BadFlag(f"argument --{name}: expected one argument")
                value = words.pop(0)
            if "|" in kind and value not in kind.split("|"):
                choices = ", ".join(map(repr, kind.split("|")))
                raise BadFlag(f"argument --{name}: invalid choice: {value!r} (choose from {choices})")
            if dot:
                parts[f"{name}.{key}"] = value
            elif name == "fault" and found.get("fault"):
                found["fault"] = f"{found['fault']},{value}"
            else:
                found[name] = value
    if unknown:
        raise BadFlag(f"unrecognized arguments: {' '.join(unknown)}")
    # all parts of a JSON flag stand together, after whatever gives it whole: that is thrown away
    return found | join(parts, heads(parts))


def nearest(name: str) -> str:
    """The known flag that is nearest to ``name``; empty where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known_flags()), 1)), "")
