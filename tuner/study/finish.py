"""How a study ends: verification, the choice, the YAML, the report, and what is printed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tuner.engines.protocol import Cancelled, OnEvent
from tuner.pareto.choice import Choice
from tuner.pareto.recommend import recommended
from tuner.record.mlflow import Recorder
from tuner.spec.study import Study
from tuner.study import verifying
from tuner.study.evaluate import Bench
from tuner.study.session import Prepared
from tuner.study.store import Store


@dataclass(frozen=True, slots=True)
class Result:
    """Why the study ended, what it recommends (``best`` is None where nothing met the SLOs), and the files it left."""

    ended: str
    choice: Choice
    words: str
    files: tuple[Path, ...]

    @property
    def best(self) -> object:
        return self.choice.point


@contextmanager
def recorder(study: Study, store: Store, say: Callable[[str], None]) -> Iterator[Recorder]:
    """MLflow's writer for one session; what it could not send is said, and kept in the folder."""
    writer = Recorder(study, store)
    writer.start()
    try:
        yield writer
    finally:
        left = writer.close()
        if left:
            say(left)


def conclude(
    ready: Prepared, store: Store, writer: Recorder, ended: str, cancel: threading.Event, on_event: OnEvent
) -> Result:
    """Verifies (unless interrupted), chooses, exports and reports; all from the study folder."""
    from tuner.export import formats
    from tuner.report import page

    study = ready.study
    if not cancel.is_set():
        with suppress(Cancelled):
            verifying.run(ready, store, writer, Bench(study, ready.engine, cancel, on_event))
    choice = recommended(store, study)
    files: list[Path] = []
    if choice.point is not None:
        files += formats.best_config(store, study)
    files.append(page.build(store, study, store.folder / "report.html"))
    if not cancel.is_set():
        writer.study_finished()
    return Result(ended, choice, choice.text, tuple(files))


def show(study: Study, store: Store, result: Result) -> None:
    """The front on stdout; why it ended and where things are on stderr."""
    from rich.console import Console

    from tuner.report import terminal

    Console().print(terminal.front_table(store, study))
    print(file=sys.stderr)
    print(f"Ended: {result.ended}.", file=sys.stderr)
    print(result.words, file=sys.stderr)
    for path in result.files:
        print(f"  {path}", file=sys.stderr)
    print(f"  tuner ui {store.folder}    # the study in MLflow", file=sys.stderr)
