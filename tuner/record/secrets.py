"""Secrets that a study may hold (environment, flags, a password in a URL), and how they are kept out of what leaves the
study folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from tuner.spec.study import Study
from tuner.study.store import TrialRecord

_SECRET = re.compile(
    r"TOKEN(?!S|IZER|-|_ID)|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)[-_]?KEY|(^|_)PAT(_|$)", re.IGNORECASE
)
_FIGURE = re.compile(r"[\d.]{1,7}|.{1,3}")  # left out of other texts it would blot out what is no secret
HIDDEN = "(secret)"


def is_secret(name: str) -> bool:
    """Whether a variable or a flag of this name holds a secret (``HF_TOKEN``, ``OPENAI_API_KEY``, ``api-key``)."""
    return bool(_SECRET.search(name))


def secrets(study: Study, trials: Iterable[TrialRecord]) -> tuple[str, ...]:
    """The secrets of a study's environments, flags, command and ``tracking_uri``, the longest first."""
    engine, configs = study.engine, [trial.config for trial in trials]
    named = [*engine.env.items(), *engine.args.items(), *_words(engine.command)]
    named += [item for config in configs for item in (*config.env.items(), *config.flags.items())]
    found = {value for name, value in named if is_secret(name) and isinstance(value, str)}
    found |= _passwords(study.tracking_uri) | _passwords(str(study.frozen.get("tracking_uri", "")))
    return tuple(sorted((x for x in found if not _FIGURE.fullmatch(x)), key=len, reverse=True))


def hide(text: str, secrets: Iterable[str]) -> str:
    """``text`` without them."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def _words(command: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """``--api-key VALUE`` and ``--api-key=VALUE`` as name and value."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("-") else [word])]
    return [(name, value) for name, value in itertools.pairwise(words) if name.startswith("-")]


def _passwords(uri: str) -> set[str]:
    """As it is written in the URL, and as it is."""
    try:
        password = urlsplit(uri).password or ""
    except ValueError:
        return set()
    return {password, unquote(password)} - {""}
