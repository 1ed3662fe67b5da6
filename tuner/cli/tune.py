"""`tuner tune`: from a study file, or from flags alone, to a best configuration."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.cli.signals import say_stopping, stopping
from tuner.errors import NothingFeasible, UsageError

MADE_S = 3600.0  # of a trace that is made: long enough for the windows of search and verification


@dataclass(frozen=True, slots=True)
class Flags:
    """What may be said without a study file; with one, these win over it."""

    model: str = ""
    trace: Path | None = None
    slo: tuple[str, ...] = ()
    gpu_price: float | None = None
    budget: str = ""
    objective: str = ""
    space: str = ""
    sampler: str = ""
    engine: str = ""
    name: str = ""
    parallel: int | str = ""
    storage: str = ""
    reports: str = ""
    executor: str = ""
    address: str = ""
    verify_share: float | None = None
    python: str = ""


def run(path: Path | None, flags: Flags, plain: bool) -> int:
    """Runs or resumes a study; returns the exit code."""
    cancel = threading.Event()
    with stopping(cancel, say_stopping) as instead:
        return _run(path, flags, plain or not sys.stderr.isatty(), cancel, instead)


def _run(path: Path | None, flags: Flags, plain: bool, cancel: threading.Event, instead: Callable[..., None]) -> int:
    from tuner.cli.live import View
    from tuner.engines import hub
    from tuner.study import finish, ladder, session
    from tuner.study.peers import joined

    study = session.as_begun(_shared(path, flags, read(path, flags, say)))
    hub.bring(study, say, cancel, shown=not plain)
    if cancel.is_set():
        raise KeyboardInterrupt
    again = resume_command(path, sys.argv[1:])
    interrupted = f"Interrupted; everything measured is kept. Resume: {again}"
    with View(study, plain) as view, session.opened(study, view.say) as store:
        instead(view.stopping)
        try:
            view.study = study = ladder.settled(study, store, cancel, view.on_event)
            ready = session.prepare(study)
            with (
                joined(study, store, view.on_event, cancel=cancel) as peers,
                finish.recorder(study, store, view.say, peers) as recorder,
            ):
                ready = session.as_shared(ready, store, peers)
                view.begin(ready)
                ladder.as_trial(ready, store, recorder, view.on_event)
                ended = session.search(ready, store, recorder, cancel, view.on_event, peers)
                store.log("ended", why=ended)
                result = finish.conclude(ready, store, recorder, ended, cancel, view.on_event, peers)
        except KeyboardInterrupt:
            view.say(interrupted)
            raise
    finish.show(study, store, result)
    if cancel.is_set():
        say(interrupted)
        return 130
    return 0 if result.best else NothingFeasible.exit_code  # ``show`` has said why


def say(text: str) -> None:
    """A line before there is a view, and after it."""
    print(text, file=sys.stderr)


def _shared(path: Path | None, flags: Flags, study: Any) -> Any:
    """``study`` with the storage that the environment names, unless it was begun without any."""
    from tuner.spec import studyfile
    from tuner.study.store import Store

    url, store = os.environ.get("TUNER_STORAGE", ""), Store(Path(study.folder))
    if flags.storage or not url:
        return study
    if store.study_file.exists() and store.begun() and not studyfile.load(store.folder).storage:
        print(f"TUNER_STORAGE is for new studies; {store.folder} goes on with its own ledger.", file=sys.stderr)
        return study
    return read(path, replace(flags, storage=url))


def read(path: Path | None, flags: Flags, say: Callable[[str], None] = lambda _text: None) -> Any:
    """The study of a file with the flags laid over it, or of the flags alone; ``say`` hears what was left out."""
    from tuner.spec import studyfile
    from tuner.spec.text import Document
    from tuner.spec.text import read as read_yaml

    over = _overrides(path, flags, say)
    if path is None:
        if not flags.model or flags.trace is None:
            raise UsageError(
                "tune needs a study file, or --model and --trace", fix="Write one with: tuner init study.yaml"
            )
        if flags.python:
            over["engine"] = {**over.get("engine", {}), "python": _python(flags.python)}
        if flags.budget or flags.verify_share is not None:
            over["budget"] = _budget(None, flags)
        return studyfile.resolve(Document("command line", over, None, _said(over, flags)), Path())
    if path.is_dir():
        path = path / "study.yaml"
    document = read_yaml(path, "study")
    if flags.engine:
        over["engine"] = _another(document.data.get("engine"), flags.engine, say)
        over.setdefault("name", f"{document.data.get('name') or path.stem}-{flags.engine}")
    if flags.python:
        said = over.get("engine", document.data.get("engine", {}))
        over["engine"] = {**(said if isinstance(said, dict) else {}), "python": _python(flags.python)}
    if flags.budget or flags.verify_share is not None:
        over["budget"] = _budget(document.data.get("budget"), flags)
    if flags.slo and isinstance(said := document.data.get("slo", {}), dict):
        over["slo"] = {**said, **over["slo"]}
    if over:
        document = Document(document.path, {**document.data, **over}, document.tree, _said(over, flags))
    return studyfile.resolve(document, path.parent)


def _another(said: Any, kind: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The study's engine as another kind: with its flags and the options that both know, but not with the place where
    the first one is installed."""
    from tuner.engines.build import known_options

    said = said if isinstance(said, dict) else {}
    known = known_options(kind)
    if said.get("kind", "vllm") == kind or known is None:
        return {**said, "kind": kind}
    left = [key for key in ("target", "url", "gpu") if key in said and key not in known]
    kept = {key: value for key, value in said.items() if key not in ("python", "command", *left)}
    if isinstance(options := said.get("options"), dict):
        left += [key for key in options if key not in known]
        kept["options"] = {key: value for key, value in options.items() if key in known}
    if left:
        say(f"Left out of engine.options, which {kind} does not have: {', '.join(map(str, left))}.")
    return {**kept, "kind": kind}


def _overrides(path: Path | None, flags: Flags, say: Callable[[str], None]) -> dict[str, Any]:
    from tuner.spec.text import twice

    over: dict[str, Any] = {}
    for key in ("model", "objective", "sampler", "name", "parallel", "storage", "reports"):
        if (value := getattr(flags, key)) not in ("", None):
            over[key] = value
    if flags.address and flags.executor == "local":
        raise UsageError("--address names a Ray cluster, --executor local uses none", fix="keep one of the two")
    if flags.executor or flags.address:
        over["executor"] = {"kind": flags.executor or "ray", "address": flags.address or "auto"}
    if flags.space:
        over["search_space"] = flags.space
    if flags.trace is not None:
        over["trace"] = str(_traffic(flags.trace, Path(flags.reports or "reports"), say).resolve())
    if flags.gpu_price is not None:
        over["price_usd_per_gpu_hour"] = flags.gpu_price
    if flags.engine:
        over["engine"] = {"kind": flags.engine}
    if flags.slo:
        pairs = [text.partition("=") for text in flags.slo]
        for name, sep, limit in pairs:
            if not sep or not limit:
                raise UsageError(f"bad SLO {name!r}", fix="write for example --slo ttft_p99=500ms")
        if pair := twice(pairs, lambda said: said[0].strip()):
            raise UsageError(f"--slo {pair[0][0].strip()} is given twice", fix="keep one of them")
        over["slo"] = {name.strip(): limit.strip() for name, _, limit in pairs}
        if path is None and not flags.objective:
            over["objective"] = _objective(over["slo"])
    return over


def _traffic(said: Path, reports: Path, say: Callable[[str], None]) -> Path:
    """The trace file that ``--trace`` names. Of the name of a profile one like it, made once beside the studies."""
    if said.is_file():
        return said
    from tuner.load import synth, tracefile
    from tuner.spec import studyfile

    if str(said) not in synth.PROFILES:
        raise UsageError(f"no such trace file: {said}", fix=studyfile.NO_TRACE)
    made = reports / f"{said}.parquet"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        tracefile.write(synth.synthesise(synth.profile(str(said)), duration_s=MADE_S), made)
        say(f"Made {made}, an hour of traffic like {said}: a log of your own says more.")
    return made


def _said(over: dict[str, Any], flags: Flags) -> dict[tuple[str | int, ...], str]:
    """Which flag each entry of ``over`` comes from, for errors."""
    names = {"search_space": "--space", "price_usd_per_gpu_hour": "--gpu-price"}
    alone = {"model", "objective", "sampler", "name", "parallel", "storage", "reports", "trace"}
    said: dict[tuple[str | int, ...], str] = {
        (key,): f"--{key}" for key in alone & over.keys() if getattr(flags, key) not in ("", None)
    }
    said |= {(key,): flag for key, flag in names.items() if key in over}
    said |= {("slo", text.partition("=")[0].strip()): "--slo" for text in flags.slo}
    return said | ({("engine", "kind"): "--engine"} if flags.engine else {})


def _python(path: str) -> str:
    """As it is said here, not where the study file lies; a link stays one, an environment's interpreter is no other."""
    return os.path.abspath(path) if os.sep in path else path


def _budget(said: Any, flags: Flags) -> dict[str, Any]:
    """The study file's budget with the flags laid over it."""
    from tuner.spec.studyfile import parse_budget

    if flags.verify_share is not None and not 0 <= flags.verify_share < 1:
        raise UsageError(f"--verify-share: a share from 0 to below 1, not {flags.verify_share:g}")
    found = dict(said) if isinstance(said, dict) else {}
    if text := flags.budget or ("" if said is None or isinstance(said, dict) else str(said)):
        try:
            limits = parse_budget(text)
        except ValueError as error:
            raise UsageError(f"--budget: {error}" if flags.budget else str(error)) from None
        found |= {"launches": limits.launches, "hours": limits.hours, "usd": limits.usd}
    return found | ({} if flags.verify_share is None else {"verify_share": flags.verify_share})


def _objective(slos: dict[str, str]) -> dict[str, Any]:
    """SLOs given alone make the objective: the last latency named is the front's second axis."""
    latencies = [name for name in slos if name != "error_rate"] or ["tpot_p99"]
    return {"name": "from flags", "latency": latencies[-1], "slo": {"error_rate": "1%"}}


def resume_command(path: Path | None, words: list[str]) -> str:
    """The command that resumes this study: the same one, without a password in it."""
    import shlex

    from tuner.spec.storage import masked

    return "tuner " + " ".join(shlex.quote(masked(word)) for word in words) if words else f"tuner tune {path}"
