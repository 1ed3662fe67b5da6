"""Where a study's MLflow data lives, and how its UI is started."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tuner.errors import UsageError
from tuner.record.ledger import Ledger
from tuner.spec.storage import masked, sqlite_file, sqlite_url
from tuner.spec.study import Study

EXPERIMENT = "tuner"


@dataclass(frozen=True, slots=True)
class Place:
    """``uri`` is MLflow's tracking URI; ``artifacts`` the artifact location of a new experiment (empty: the server
    decides); ``experiment`` its name; ``lock`` the file whose lock makes us the store's only writer."""

    uri: str
    artifacts: str
    experiment: str
    lock: Path

    @property
    def shown(self) -> str:
        """The URI without its password, for people."""
        return masked(self.uri)

    @property
    def given(self) -> str:
        """The URI as MLflow is given it. Where the driver is not named it makes the folder of a SQLite database as the
        URI spells it, ``odd%3Fname`` beside ``odd?name``."""
        return self.uri.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in self.uri else self.uri

    @property
    def file(self) -> Path | None:
        """The store's SQLite file; None where it is no such."""
        return sqlite_file(self.uri) if self.uri.startswith("sqlite:///") else None

    def blank(self) -> bool:
        """Whether the store is a SQLite file without any run in it."""
        if not self.file or not self.file.exists():
            return False
        try:
            with closing(sqlite3.connect(self.file)) as database:
                return not database.execute("SELECT 1 FROM runs LIMIT 1").fetchall()
        except sqlite3.Error as error:
            return "no such table" in str(error)

    def words(self, error: Exception) -> str:
        """The first line of what MLflow raised, without that password."""
        return next(iter(str(error).splitlines()), type(error).__name__).replace(self.uri, self.shown)

    @property
    def server(self) -> tuple[str, int] | None:
        """Host and port where the store is an HTTP server, else None."""
        parts = urlsplit(self.uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        try:
            return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise UsageError(f"{self.shown}: {error}", fix="Correct MLflow's tracking URI") from None


def place(study: Study, env: Mapping[str, str] = os.environ) -> Place:
    """The study's own ``tracking_uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` beside the study folder."""
    return _place_of(study.tracking_uri, Path(study.folder).resolve(), env)


def _place_of(uri: str, folder: Path, env: Mapping[str, str]) -> Place:
    """Of the study in ``folder``, whose own ``uri`` may be empty."""
    experiment = env.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    uri = uri or env.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return default_place(folder.parent, experiment)
    if uri.startswith("sqlite:///"):
        database = sqlite_file(uri).resolve()
        artifacts = (database.parent / "mlartifacts").as_uri()
        return Place(sqlite_url(database), artifacts, experiment, database.with_name(f".{database.name}.lock"))
    return Place(uri, "", experiment, folder / ".mlflow.lock")


def default_place(folder: Path, experiment: str = EXPERIMENT) -> Place:
    """The SQLite store of the studies in ``folder``: ``mlflow.db`` with ``mlartifacts`` beside it."""
    folder = folder.resolve()
    return Place(
        sqlite_url(folder / "mlflow.db"),
        (folder / "mlartifacts").as_uri(),
        experiment,
        folder / ".mlflow.db.lock",
    )


def ui_command(where: Study | Path, port: int = 5000, env: Mapping[str, str] = os.environ) -> list[str]:
    """The command that serves MLflow's UI on 127.0.0.1 for a study, a study's folder, or the folder of studies.

    Raises UsageError where the store is a server already (open it in a browser) or where there is no store.
    """
    if isinstance(where, Study):
        known = place(where, env)
    else:
        known = _place_of("", (where if (where / "study.yaml").exists() else where / "any").resolve(), env)
    if known.server:
        raise UsageError(f"studies are logged to {known.shown}", fix="Open that address in a browser.")
    if known.file and not known.file.exists():
        raise UsageError(f"there is no {known.file}", fix="Run a study first, or `tuner sync` one that was not logged.")
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", known.given]
    if known.artifacts:
        words += ["--default-artifact-root", known.artifacts]
    return [*words, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def ui_page(study: Study, env: Mapping[str, str] = os.environ) -> str:
    """Where in MLflow's UI the study is: the path of its parent run (``/#/experiments/1/runs/9f...``). The front page
    of MLflow 3 opens on traces of agents, where no run is to be seen. ``/`` before anything was logged."""
    sent = Ledger.load(Path(study.folder)).sent(place(study, env).uri)
    return f"/#/experiments/{sent.experiment}/runs/{sent.parent}" if sent.parent else "/"
