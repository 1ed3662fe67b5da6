"""Secrets that a study may hold (environment, flags, a password in a URL), and how they are kept out of what leaves the
study folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from tuner.spec.study import Study
from tuner.study.store import TrialRecord

_SECRET = re.compile(
    r"TOKEN(?!S|IZER|-|_ID)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|WEBHOOK|(API|ACCESS|PRIVATE)[-_]?KEY|(^|_)PAT(_|$)"
    r"|(^|[-_])(PASS|BEARER|AUTH|AUTHORIZATION|AUTH[-_]HEADER)$|[-_](KEY|PWD)$",
    re.IGNORECASE,
)
# what is one by its own looks, whatever it is called: a password in a URL, a header, a token of a known kind
_LOOKS = re.compile(
    r"://[^/@\s:]*:(?P<password>[^/@\s]+)@|\b(?:bearer|basic) +(?P<header>[\w.~+/=-]{8,})"
    r"|\b(?P<token>(?:hf_|gh[pousr]_|AKIA)\w{16,}|(?:sk|glpat|xox[abp])-[\w-]{16,})",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\{\w+\}")  # its name is no secret
# left out of other texts it would blot out what is no secret
_PLAIN = re.compile(r"[\d.]{1,7}|.{1,3}|true|false|none|null|auto", re.IGNORECASE)
_LONG = 12  # of a secret of several words or lines, those that are as long as this: texts may break it between them
HIDDEN = "(secret)"


def is_secret(name: str, value: Any = None) -> bool:
    """Whether a variable or a flag of this name (``HF_TOKEN``, ``OPENAI_API_KEY``, ``api-key``) and value
    (``http://bob:hunter2@there``) holds a secret."""
    return bool(_SECRET.search(name)) or (isinstance(value, str) and bool(_looks(value)))


def secrets(study: Study, trials: Iterable[TrialRecord]) -> tuple[str, ...]:
    """The secrets of a study's file, environments, flags, command and ``tracking_uri``, the longest first, as texts,
    JSON and YAML have them."""
    engine, configs = study.engine, [trial.config for trial in trials]
    named = [*engine.env.items(), *engine.args.items(), *study.space.env.items(), *study.space.fixed.items()]
    named += [*_words(engine.command), *_leaves("", study.frozen), ("", study.tracking_uri)]
    named += [item for config in configs for item in (*config.env.items(), *config.flags.items())]
    found: set[str] = set()
    for name, value in named:
        if isinstance(value, str):
            found |= _looks(value)
            if _SECRET.search(name):
                found |= {value, *(word for word in value.split() if len(word) >= _LONG)}
    found -= {text for text in found if _PLAIN.fullmatch(text) or _VARIABLE.fullmatch(text)}
    return tuple(sorted({form for text in found for form in _written(text)}, key=len, reverse=True))


def hide(text: str, secrets: Iterable[str]) -> str:
    """``text`` without them."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def hidden(data: Any, secrets: Iterable[str]) -> Any:
    """``data`` as JSON has it, without them in its texts: its names, figures and truths are what it is read by."""
    if isinstance(data, str):
        return hide(data, secrets)
    if isinstance(data, Mapping):
        return {name: hidden(value, secrets) for name, value in data.items()}
    return [hidden(value, secrets) for value in data] if isinstance(data, (list, tuple)) else data


def _written(text: str) -> tuple[str, ...]:
    return (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], text.replace("'", "''"))


def _words(command: Iterable[str]) -> Iterator[tuple[str, str]]:
    """``--api-key VALUE`` and ``--api-key=VALUE`` as name and value; every word by itself."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("-") else [word])]
    yield from ((name, value) for name, value in itertools.pairwise(words) if name.startswith("-"))
    yield from (("", word) for word in words)


def _leaves(name: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Every value in ``data`` with the key that it, or the list that it is in, stands under."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(str(key), value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _leaves(name, value)
    else:
        yield name, data


def _looks(value: str) -> set[str]:
    """A password as it is written in a URL, and as it is."""
    found = {text for match in _LOOKS.finditer(value) for text in match.groups() if text}
    return {form for text in found if not _VARIABLE.fullmatch(text) for form in (text, unquote(text))}
