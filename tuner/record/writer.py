"""The only code that talks to MLflow: brings one store up to what the study folder holds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.pareto.front import COST, points, searched
from tuner.pareto.recommend import recommended
from tuner.record.content import TAG_CHARACTERS, Content, content, legal
from tuner.record.ledger import Ledger, Sent, note_file
from tuner.record.place import Place
from tuner.record.secrets import hide, secrets
from tuner.server.bootlog import LogFile
from tuner.spec.storage import sqlite_url
from tuner.spec.study import Study
from tuner.study.store import Store, TrialRecord

METRICS_PER_BATCH, OTHERS_PER_BATCH = 1000, 100  # MLflow's own limits
BUSY_S = 60.0  # for which another tuner may write
LONG_BYTES = 64 * 2**20  # of a log: a server may print for hours, and the store may be far away
PARENT_FILES = ("study.yaml", "best-config.yaml", "best-config.env", "report.html", "verify.json", "ablation.json")


class Unreachable(Exception):
    """The tracking server does not answer: nothing is lost, the study folder is the spool."""


def flush(study: Study, store: Store, place: Place, *, running: bool = False, end: str = "") -> int:
    """Logs every finished trial that the ledger does not know; returns how many. Idempotent: a trial that was cut short
    half-way is deleted and logged again.

    ``running`` sets the parent run running; ``end`` (an MLflow run state) closes it, as does the note of a finished
    study (FINISHED); otherwise its state is left as it is. Raises :class:`Unreachable`, or whatever MLflow raises.
    """
    if place.server:
        _probe(place.server)
    with _only_writer(place.lock):
        ledger = Ledger.load(store.folder)
        sent = ledger.sent(place.uri)
        note = note_file(store.folder).read_text("utf-8") if note_file(store.folder).exists() else ""
        trials = store.trials()  # after the note: it is of all of them
        end = "FINISHED" if note else end
        if running and not end and sent.parent and not sent.end and not _unsent(trials, sent):
            return 0  # the usual wake-up with nothing to do: MLflow is not even imported
        _make(place)
        connection = _Connection(study, store, place, ledger, sent, secrets(study, trials))
        sent = connection.open_parent(trials)
        if running and not end:
            connection.client.update_run(sent.parent, status="RUNNING")
            sent.end = ""
        waiting = [t for t in trials if str(t.number) not in sent.trials and (note or not elsewhere(t))]
        for trial in waiting:
            connection.log_trial(trial, trials)
        state = _end_digest(store, end, note)
        if end and sent.end != state:
            connection.close_parent(end, note, trials)
            sent.end = state
        ledger.save()
        return len(waiting)


def elsewhere(trial: TrialRecord) -> bool:
    """Whether another tuner of a shared study made the trial. That one logs it, with its records; what it did not live
    to log is logged at the end, as far as it is known here."""
    return bool((trial.extra or {}).get("elsewhere"))


def _unsent(trials: Sequence[TrialRecord], sent: Sent) -> bool:
    return any(str(t.number) not in sent.trials for t in trials if not elsewhere(t))


def _make(place: Place) -> None:
    """A SQLite store that is not there yet, under another name until it is whole: MLflow makes it by hundreds of
    commits, and goes on with none that a kill left in the middle of them."""
    if not place.file or (place.file.exists() and place.file.stat().st_size):
        return
    _quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    half = place.file.with_name(f".{place.file.name}.half")
    for end in ("", "-journal", "-wal", "-shm"):
        half.with_name(half.name + end).unlink(missing_ok=True)
    SqlAlchemyStore(replace(place, uri=sqlite_url(half)).given, place.artifacts).engine.dispose()
    half.replace(place.file)


class _Connection:
    def __init__(
        self, study: Study, store: Store, place: Place, ledger: Ledger, sent: Sent, secrets: Sequence[str]
    ) -> None:
        _quiet()
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what it raises, too
        self.study, self.store, self.place, self.ledger, self.sent = study, store, place, ledger, sent
        self.client = MlflowClient(place.given)
        self.dataset: Any = None
        self.secrets = secrets

    def open_parent(self, trials: Sequence[TrialRecord]) -> Sent:
        """Finds the parent run (by the ledger, by the study's uid, by the folder) or creates it. A copy of a study
        folder is a study of its own."""
        sent, folder = self.sent, str(self.store.folder.resolve())
        self.ledger.save()  # the uid must be on disk before anything carries it
        parent = self._alive(sent.parent) if sent.parent else None
        if sent.parent and not parent:  # deleted by somebody: log the study anew
            for run in self._children():
                self.client.delete_run(run.info.run_id)
            sent.experiment, sent.parent, sent.trials, sent.end = "", "", {}, ""
        sent.experiment = sent.experiment or self._experiment()
        parent = parent or self._of_uid() or self._of_folder(folder, trials)
        known = parent.data.tags.get("tuner.folder", folder) if parent and not self.study.storage else folder
        if parent and _copied(Path(known), self.store.folder, self.ledger.uid):
            parent, known, experiment = None, folder, sent.experiment
            self.ledger.anew()
            sent = self.sent = self.ledger.sent(self.place.uri)
            sent.experiment = experiment
            self.ledger.save()
        if parent:
            self.ledger.uid = parent.data.tags.get("tuner.study_uid", self.ledger.uid)
        sent.parent = parent.info.run_id if parent else self._create_parent(trials)
        self.ledger.save()
        if known != folder:  # it was moved
            self.client.set_tag(sent.parent, "tuner.folder", folder)
        self.started = {self._key(*_identity(run)): run for run in self._children()}
        return sent

    def _key(self, number: str, config: str, start_ms: int) -> tuple[str, ...]:
        """What finds a trial's run again: under its number there may be another study folder's trial. Tuners that share
        a study share its numbers."""
        return (number,) if self.study.storage else (number, config, str(start_ms))

    def _of_uid(self) -> Any:
        found = self._runs(f"tags.`tuner.study_uid` = '{self.ledger.uid}' and tags.`tuner.kind` = 'study'")
        return found[0] if found else None

    def _of_folder(self, folder: str, trials: Sequence[TrialRecord]) -> Any:
        """The parent run of a study in this folder that has one of these very trials: the ledger was lost."""
        known = {_identity_of(trial) for trial in trials}
        for parent in self._runs("tags.`tuner.kind` = 'study'"):
            if parent.data.tags.get("tuner.folder") == folder:
                children = self._runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
                if known & {_identity(run) for run in children}:
                    return parent
        return None

    def log_trial(self, trial: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        """One child run, whole: its state is set last, the ledger is written after that."""
        made = content(trial, self.study, self.secrets)
        earlier = self.started.get(self._key(*_identity_of(trial)))
        foreign = earlier is not None and "elsewhere" in earlier.data.tags and not elsewhere(trial)
        if earlier is not None and earlier.info.status != "RUNNING" and not foreign:
            run_id = earlier.info.run_id  # logged whole, killed before the ledger was written
        else:
            if earlier is not None:
                self.client.delete_run(earlier.info.run_id)
            run_id = self._create_child(made)
        self._progress(trial, trials)
        self.sent.trials[str(trial.number)] = run_id
        self.ledger.save()

    def close_parent(self, status: str, note: str, trials: Sequence[TrialRecord]) -> None:
        run_id, ended_ms = self.sent.parent, int(max((t.ended_s for t in trials), default=time.time()) * 1000)
        if note:
            self.client.set_tag(run_id, "mlflow.note.content", hide(note, self.secrets)[:TAG_CHARACTERS])
        for name in _parent_files(self.store):
            self._artifact(run_id, self.store.folder / name)
        self._recommended(run_id, ended_ms, trials)
        self.client.set_terminated(run_id, status, ended_ms)

    def _recommended(self, run_id: str, at_ms: int, trials: Sequence[TrialRecord]) -> None:
        """What the report recommends, to sort runs by: the lowest cost of the search need not be it."""
        point = recommended(self.store, self.study, trials).point
        verified = point is not None and point.role == "verify"
        self.client.set_tag(run_id, "recommended_trial", str(point.trial) if point else "none")
        self.client.set_tag(run_id, "verified", str(verified).lower())
        if point:
            found = {COST: point.cost, "load": point.load, self.study.objective.latency_key: point.latency}
            metrics = [(legal(f"recommended_{name}"), value, at_ms, 0) for name, value in found.items()]
            self._batch(run_id, metrics=[m for m in metrics if math.isfinite(m[1])])

    def _create_parent(self, trials: Sequence[TrialRecord]) -> str:
        study = self.study
        started_s = min((t.started_s for t in trials), default=time.time())
        objective = study.objective
        emulated = study.engine.kind == "emulator" or any(t.emulated for t in trials)
        tags = {
            "tuner.kind": "study",
            "tuner.study_uid": self.ledger.uid,
            "tuner.folder": str(self.store.folder.resolve()),
            "emulated": str(emulated).lower(),
            "mlflow.note.content": "The study has not ended yet.",
        }
        name = ("[emulated] " if emulated else "") + study.name
        run = self.client.create_run(self.sent.experiment, int(started_s * 1000), tags, name)
        params = {
            "model": study.model,
            "engine": study.engine.kind,
            "gpu": study.hardware.name,
            "gpus": str(study.hardware.gpus),
            "search_space": study.space.name,
            "objective": objective.name,
            "latency": objective.latency,
            "slo": ", ".join(map(str, objective.slos)),
            "price_usd_per_gpu_hour": f"{objective.price_usd_per_gpu_hour:g}",
            "trace": study.trace.file,
            "ladder": ", ".join(f"{load:g}" for load in study.load.ladder),
            "sampler": study.sampler,
            "seed": str(study.seed),
        }
        self._batch(run.info.run_id, params=params)
        self._input(run.info.run_id)
        return run.info.run_id

    def _create_child(self, made: Content) -> str:
        tags = {**made.tags, "mlflow.parentRunId": self.sent.parent}
        run_id = self.client.create_run(self.sent.experiment, made.start_ms, tags, made.name).info.run_id
        self._batch(run_id, made.params, [(s.name, s.value, s.at_ms, s.step) for s in made.samples])
        self._input(run_id)
        for path in made.artifacts:
            self._artifact(run_id, path)
        self.client.set_terminated(run_id, made.status, made.end_ms)
        return run_id

    def _progress(self, trial: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        """On the parent: the lowest cost within SLO so far, after each trial."""
        known = points(searched(t for t in trials if t.number <= trial.number), self.study.objective)
        costs = [p.cost for p in known if p.ok]
        if costs:
            at_ms = int(trial.ended_s * 1000)
            self._batch(self.sent.parent, metrics=[(f"search_best_{COST}", min(costs), at_ms, trial.number)])

    def _batch(
        self,
        run_id: str,
        params: dict[str, str] | Any = (),
        metrics: Sequence[tuple[str, float, int, int]] = (),
    ) -> None:
        from mlflow.entities import Metric, Param

        pairs = [Param(legal(key), value) for key, value in dict(params).items()]
        for start in range(0, len(pairs), OTHERS_PER_BATCH):
            self.client.log_batch(run_id, params=pairs[start : start + OTHERS_PER_BATCH])
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            part = [Metric(*values) for values in metrics[start : start + METRICS_PER_BATCH]]
            self.client.log_batch(run_id, metrics=part)

    def _input(self, run_id: str) -> None:
        """The trace as the run's dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self.dataset is None:
            path = Path(self.study.trace.file)
            self.dataset = Dataset(path.stem[:500], _digest(path), "local", f'{{"uri": "{path.as_posix()}"}}')
        self.client.log_inputs(run_id, [DatasetInput(self.dataset, [InputTag("mlflow.data.context", "replay")])])

    def _artifact(self, run_id: str, path: Path) -> None:
        """The file as it is; of a server's log that is very long its beginning and its end; a text that holds a secret
        of the study's environment without it."""
        long = path.suffix == ".log" and path.stat().st_size > LONG_BYTES
        if long or (self.secrets and path.suffix != ".parquet"):
            text = LogFile(path).text() if long else path.read_text(encoding="utf-8", errors="replace")
            if long or hide(text, self.secrets) != text:
                self.client.log_text(run_id, hide(text, self.secrets), path.name)
                return
        self.client.log_artifact(run_id, str(path))

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.place.experiment)
        if found is None:
            return self.client.create_experiment(self.place.experiment, self.place.artifacts or None)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _children(self) -> list[Any]:
        return self._runs(f"tags.`mlflow.parentRunId` = '{self.sent.parent}'")

    def _runs(self, query: str) -> list[Any]:
        found, token = [], None
        while True:
            page = self.client.search_runs([self.sent.experiment], query, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _alive(self, run_id: str) -> Any:
        """The run; None where it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None


def _identity_of(trial: TrialRecord) -> tuple[str, str, int]:
    return str(trial.number), trial.config.hash, int(trial.started_s * 1000)


def _identity(run: Any) -> tuple[str, str, int]:
    """Of the trial that a child run is of."""
    tags = run.data.tags
    return tags.get("tuner.trial", ""), tags.get("config", ""), run.info.start_time


def _copied(known: Path, folder: Path, uid: str) -> bool:
    """Whether ``known``, which the parent run names, is another study folder than ``folder`` that has its uid."""
    return (known / "mlflow.json").exists() and not known.samefile(folder) and Ledger.load(known).uid == uid


def _end_digest(store: Store, end: str, note: str) -> str:
    """Changes when the end, its note or a file that goes with it does."""
    files = [(name, (store.folder / name).stat().st_mtime_ns) for name in _parent_files(store)]
    return hashlib.sha256(repr((end, note, files)).encode()).hexdigest()[:16]


def _parent_files(store: Store) -> list[str]:
    return [name for name in PARENT_FILES if (store.folder / name).exists()]


def _digest(path: Path) -> str:
    """16 hex digits over the trace's bytes; over its name where the file is gone (a study read elsewhere)."""
    hashed = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    else:
        hashed.update(str(path).encode())
    return hashed.hexdigest()[:16]


def _probe(server: tuple[str, int]) -> None:
    """MLflow's own client retries for minutes; a closed port is known at once."""
    try:
        socket.create_connection(server, timeout=3).close()
    except OSError as error:
        raise Unreachable(f"no MLflow server at {server[0]}:{server[1]} ({error.strerror or error})") from None


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """MLflow on SQLite loses runs to concurrent writers: one at a time, across processes. Raises :class:`Unreachable`
    where another goes on for :data:`BUSY_S`: it may be suspended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    until_s = time.monotonic() + BUSY_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise Unreachable(f"another tuner has written to it for {BUSY_S:.0f} s: is it suspended?") from None
            time.sleep(0.1)
        yield


def _quiet() -> None:
    """Before MLflow is imported: no telemetry, few retries (we have our own), no chatter on the study's terminal."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
