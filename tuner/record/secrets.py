"""Secrets that a study's environment may hold, and how they are kept out of what leaves the study folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
_NOT_SECRET = re.compile(r"TOKENS|TOKENIZER", re.IGNORECASE)
HIDDEN = "(secret)"


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret (``HF_TOKEN``, ``OPENAI_API_KEY``)."""
    return bool(_SECRET.search(_NOT_SECRET.sub("", name)))


def values(environments: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """The values of all secrets in ``environments``, the longest first."""
    found = {value for env in environments for name, value in env.items() if is_secret(name) and value}
    return tuple(sorted(found, key=len, reverse=True))


def hide(text: str, secrets: Iterable[str]) -> str:
    """``text`` without them."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
