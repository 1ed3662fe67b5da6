"""The commands that read a study folder: front, show, report, export, ui, sync."""

from __future__ import annotations

import json as json_
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import EnvironmentFault, NothingFeasible, UsageError

if TYPE_CHECKING:
    from tuner.spec.study import Study
    from tuner.study.store import Store

_STOP_S = 10.0  # for MLflow's server to end by itself


def opened(path: Path) -> tuple[Study, Store]:
    """The study and its folder, from the folder or from the file it was begun with. Raises UsageError where no study
    was run yet."""
    from tuner.spec import studyfile
    from tuner.study.store import Store

    if not path.exists() and (named := Path("reports") / path / "study.yaml").is_file():
        path = named.parent  # by its name
    if not path.exists():
        raise UsageError(f"no such study: {path}", fix="Give a study file, or the folder of a study")
    empty = path.is_dir() and not (path / "study.yaml").is_file()
    folder = path if empty else Path(studyfile.load(path).folder)
    if not (folder / "study.yaml").is_file():
        inside = sorted(str(file.parent) for file in path.glob("*/study.yaml")) if empty else []
        there = f"There are {', '.join(inside[:12])}{' ...' if len(inside) > 12 else ''}" if inside else ""
        raise UsageError(
            f"no study in {folder}", fix=there or f"Run one first: tuner tune {'STUDY.yaml' if empty else path}"
        )
    return studyfile.load(folder), Store(folder)


def front(path: Path, json: bool) -> int:
    """Prints the front; 3 where no configuration meets the SLOs."""
    from tuner.pareto.recommend import recommended
    from tuner.report import terminal
    from tuner.report.console import printer

    study, store = opened(path)
    choice = recommended(store, study)
    if json:
        print(_public(terminal.front_data(store, study), study, store))
    else:
        printer().print(terminal.front_table(store, study))
    if choice.point is None:
        raise NothingFeasible(choice.text)
    return 0


def show(path: Path, number: int, json: bool) -> None:
    """Prints one trial."""
    from tuner.report import terminal
    from tuner.report.console import printer

    study, store = opened(path)
    if store.trial(number) is None:
        known = [t.number for t in store.trials()]
        raise UsageError(
            f"no finished trial {number} in {store.folder}", fix=f"There are {known}" if known else "There is none yet"
        )
    if json:
        print(_public(terminal.trial_data(store, study, number), study, store))
    else:
        printer().print(terminal.trial_view(store, study, number))


def _public(data: Any, study: Study, store: Store) -> str:
    """``data`` as JSON, without the study's secrets."""
    from tuner.record.secrets import hidden, secrets

    return json_.dumps(hidden(data, secrets(study, store.trials())), indent=1)


def report(path: Path, out: Path | None) -> None:
    """Writes the HTML report and prints its path."""
    from tuner.report import page

    study, store = opened(path)
    print(page.build(store, study, out or store.folder / "report.html"))


def export(path: Path, form: str, out: Path | None, trial: int | None) -> None:
    """Writes the best configuration, or that of ``trial``, and prints the files' paths."""
    from tuner.export import formats
    from tuner.pareto.choice import of_trial

    study, store = opened(path)
    choice = None if trial is None else of_trial(store.trials(), study.objective, trial)
    folder = out or (store.folder if trial is None else store.trial_folder(trial))
    files = formats.export(store, study, form, choice=choice)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


def ui(path: Path | None, port: int) -> int:
    """Runs MLflow's UI until it is stopped."""
    from tuner.record.place import ui_command, ui_page

    where = opened(path)[0] if path else Path("reports")
    command = ui_command(where, port)
    page = ui_page(where) if not isinstance(where, Path) else ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EnvironmentFault(f"port {port}: {error.strerror}", fix="Name another one with --port") from None
    print(f"MLflow on http://127.0.0.1:{port}{page} (Ctrl-C to stop)", file=sys.stderr)
    return _served(command)


def _served(command: list[str]) -> int:
    """Runs MLflow's server, which has children of its own, until SIGINT or SIGTERM. Raises EnvironmentFault where it
    ends by itself."""
    server = subprocess.Popen(command, start_new_session=True)
    try:
        code = server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        try:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # a page that is still being answered keeps it
                server.wait(_STOP_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    raise EnvironmentFault(f"MLflow's server ended (exit code {code})", fix="It says why above")


def sync(path: Path, to: str) -> None:
    """Logs to MLflow (``to``: another store than the study's) what is missing there."""
    from tuner.record.mlflow import sync as flush

    study, store = opened(path)
    print(flush(replace(study, tracking_uri=to or study.tracking_uri), store))
