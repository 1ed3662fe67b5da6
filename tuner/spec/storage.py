"""Where a study's ledger is: a file in the study folder, or a database that several tuners share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuner.errors import UsageError
from tuner.spec.text import Document, suggest

KINDS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
HIDDEN = "***"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):([^@]*)@(?=[^@]*$)")
_IN_QUERY = re.compile(r"([?&](?:password|passwd|sslpassword)=)([^&]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """``url`` as it was written (``${NAME}`` stands for a variable of the environment), empty for the folder's own
    SQLite. A tuner whose running trials gave no sign for ``grace_s`` seconds is taken for dead; it gives one every
    ``heartbeat_s`` seconds."""

    url: str = field(default="", repr=False)
    heartbeat_s: int = 30
    grace_s: int = 120

    def __bool__(self) -> bool:
        return bool(self.url)

    @property
    def shown(self) -> str:
        """The URL without its password, for people."""
        return masked(self.url)

    def address(self, env: Mapping[str, str]) -> str:
        """The URL with its variables filled in and its driver named. Raises UsageError where one is not set, or where
        the password was left behind."""

        def value(match: re.Match[str]) -> str:
            if match[1] not in env:
                raise UsageError(f"storage names ${match[1]}, which is not set", fix=f"export {match[1]}=...")
            return env[match[1]]

        url = _VARIABLE.sub(value, self.url)
        if masked(url) == url and f":{HIDDEN}@" in url:
            raise UsageError(
                f"a study folder keeps no password, so {url} cannot be opened", fix="Give the URL again: --storage URL"
            )
        kind, sep, rest = url.partition("://")
        if not sep:
            raise UsageError(f"storage is no URL: {masked(url)!r}", fix=_EXAMPLE)
        return f"{KINDS.get(kind, kind)}://{rest}"


_EXAMPLE = "Write for example postgresql://tuner@db.example/tuner"


def masked(url: str) -> str:
    """``url`` without what may be a password; variables stay, because their names are no secret."""

    def hide(word: str) -> str:
        return word if not word or _VARIABLE.fullmatch(word) else HIDDEN

    url = _PASSWORD.sub(lambda m: f"{m[1]}:{hide(m[2])}@", url)
    return _IN_QUERY.sub(lambda m: m[1] + hide(m[2]), url)


def storage(url: str, heartbeat_s: float, grace_s: float, document: Document) -> StorageSpec:
    """Checked as far as it can be without the database. Raises UsageError with file:line."""
    at = ("storage",)
    if not url:
        return StorageSpec()
    kind = url.partition("://")[0].partition("+")[0]
    if "${" not in kind and ("://" not in url or kind not in (*KINDS, "sqlite")):
        near = suggest(kind, KINDS) if "://" in url else _EXAMPLE
        raise document.error(f"storage is no database's URL: {masked(url)!r}", at, near)
    if heartbeat_s < 1 or grace_s < 2 * heartbeat_s:
        raise document.error("storage: a heartbeat takes at least 1s, and the grace period is at least two of them", at)
    return StorageSpec(url, round(heartbeat_s), round(grace_s))


def kept(data: Any) -> Any:
    """The study file's ``storage`` as the study folder keeps it: without a password."""
    if isinstance(data, Mapping):
        return {**data, "url": masked(str(data.get("url", "")))}
    return masked(str(data))


def sqlite_url(path: Path) -> str:
    """SQLAlchemy's URL of a SQLite file. Raises UsageError for a path that the installed version cannot be told."""
    plain = f"sqlite:///{path}"
    if not set("?%{}") & set(plain):  # in a URL these mean something, and braces are Optuna's
        return plain
    quoted = f"sqlite:///{quote(str(path))}"
    if sqlite_file(quoted) == path:
        return quoted
    raise UsageError("a database cannot lie in a folder with ?, % or braces in its path", where=str(path))


def sqlite_file(url: str) -> Path:
    """The file of a SQLite URL, as SQLAlchemy reads it."""
    if "%" not in url:
        return Path(url.removeprefix("sqlite:///").partition("?")[0])
    from sqlalchemy.engine import make_url

    return Path(make_url(url).database or "")
