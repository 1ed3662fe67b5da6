"""How a study ends: verification, the choice, the YAML, the report, and what is printed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.engines.protocol import Cancelled, OnEvent
from tuner.errors import TunerError, printable
from tuner.pareto.choice import Choice
from tuner.pareto.recommend import recommended
from tuner.record.mlflow import Recorder
from tuner.record.place import place, ui_page
from tuner.spec.study import Study
from tuner.study import verifying
from tuner.study.database import Away, Hold, Interrupted
from tuner.study.evaluate import Bench
from tuner.study.loop import Recorder as Told
from tuner.study.peers import Peers
from tuner.study.session import Prepared, guard
from tuner.study.store import Store

LOG_S = 30.0  # for what MLflow was not told yet; an interrupt that was repeated waits for nothing
AGAIN_S = 2.0  # between attempts to reach a database that is away


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
def recorder(study: Study, store: Store, say: Callable[[str], None], peers: Peers | None = None) -> Iterator[Recorder]:
    """MLflow's writer for one session; what it could not send is said, and kept in the folder. Tuners that share a
    study write one after the other: they share its run."""
    turn = (lambda: peers.database.turn("mlflow", patient=True)) if peers else nullcontext
    writer = Recorder(study, store, turn=turn, say=say)
    writer.start()
    wait_s = LOG_S
    try:
        yield writer
    except KeyboardInterrupt:
        wait_s = 0.0
        raise
    finally:
        left = writer.close(wait_s)
        if left:
            say(left)


def conclude(
    ready: Prepared,
    store: Store,
    writer: Recorder,
    ended: str,
    cancel: threading.Event,
    on_event: OnEvent,
    peers: Peers | None = None,
) -> Result:
    """Verifies (unless interrupted), chooses, exports and reports; all from the study folder."""
    from tuner.export import formats
    from tuner.report import page

    study = ready.study
    if not cancel.is_set():
        bench = Bench(study, ready.engine, cancel, on_event, guard(ready, store, on_event))
        with suppress(Cancelled):
            if peers is None:
                verifying.run(ready, store, writer, bench)
            else:
                _verify_for_all(ready, store, writer, bench, peers)
    choice = recommended(store, study)
    files: list[Path] = []
    if choice.point is not None:
        files += formats.best_config(store, study, choice=choice)
    try:
        files.append(page.build(store, study, store.folder / "report.html"))
    finally:
        if not cancel.is_set():
            writer.study_finished()
    return Result(ended, choice, choice.text, tuple(files))


def _verify_for_all(ready: Prepared, store: Store, writer: Recorder, bench: Bench, peers: Peers) -> None:
    """One tuner verifies, the others take what it found; a dead one's launches are not repeated. Raises Cancelled."""
    while not bench.cancel.is_set():
        try:
            with peers.verifying(bench.cancel) as hold:
                if hold is not None:
                    guarded = replace(bench, on_event=_while_held(bench.on_event, hold))
                    verifying.run(ready, store, _Published(writer, peers), guarded)
            return
        except Interrupted:
            raise Cancelled from None
        except Away as error:
            peers.away(error)
            bench.cancel.wait(AGAIN_S)


def _while_held(on_event: OnEvent, hold: Hold) -> OnEvent:
    """Raises Away before a launch that another tuner may be making too: the database forgot whose turn it is."""

    def tell(name: str, data: Any) -> None:
        if name == "verify-launch" and not hold.alive():
            raise Away("its connection was lost while this tuner verified")
        on_event(name, data)

    return tell


@dataclass(frozen=True, slots=True)
class _Published:
    """Every launch of the verification goes to the other tuners, then to MLflow."""

    writer: Told
    peers: Peers

    def trial_finished(self, number: int) -> None:
        self.peers.publish()
        self.writer.trial_finished(number)


def show(study: Study, store: Store, result: Result) -> None:
    """The front on stdout; why it ended and where things are on stderr."""
    from tuner.report import terminal
    from tuner.report.console import printer

    printer().print(terminal.front_table(store, study))
    console = printer(stderr=True)
    console.print(f"\nEnded: {result.ended}.", soft_wrap=not console.is_terminal)
    if not sys.stdout.isatty():  # else they stand under the front
        print(printable(result.words), file=sys.stderr)
    for path in result.files:
        print(f"  {path}", file=sys.stderr)
    print(f"  {_look(study)}    # the study in MLflow", file=sys.stderr)


def _look(study: Study) -> str:
    """The address of a store that is a server; of another the command that serves it."""
    with suppress(TunerError):  # of the ledger or the URI: said before
        where = place(study)
        if where.server:
            return f"{where.shown.rstrip('/')}{ui_page(study)}"
    return f"tuner ui {study.folder}"
