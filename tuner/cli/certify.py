"""`tuner verify`, `tuner ablate` and `tuner compare`: what is measured again, and what is held side by side."""

from __future__ import annotations

import json as json_
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuner.cli.read import opened
from tuner.cli.signals import say_stopping, stopping
from tuner.cli.tune import say
from tuner.errors import UsageError, printable
from tuner.pareto.recommend import plain


def verify(file: Path, study_folder: Path | None, minutes: float, json: bool) -> int:
    """Launches what an exported file describes and says whether its promise still holds; 3 where it does not."""
    from tuner.study import verifying
    from tuner.verify.promise import read_promise

    if not minutes > 0:
        raise UsageError("--minutes must be more than 0")
    if file.is_dir():
        file, named = file / "best-config.yaml", file
        if not file.exists() and (named / "study.yaml").is_file():
            fix = f"What it recommends, if anything, is written by: tuner export {shlex.quote(str(named))}"
            raise UsageError("the study has no exported recommendation", where=str(named), fix=fix)
    promise = read_promise(file)
    folder = study_folder or file.parent
    if not (folder / "study.yaml").is_file():
        raise UsageError(f"no study in {folder}", fix="Name its folder with --study")
    result = _session(folder, lambda ready, store, bench: verifying.certify(ready, store, bench, promise, minutes * 60))
    if json:
        print(_dumped(result))
    else:
        print(printable(plain(result.text)))
    return 0 if result.holds else 3


def ablate(path: Path, launches: int, json: bool) -> int:
    """Sets back each flag of the recommendation, and exports the smallest configuration that keeps the gain."""
    from tuner.export import formats
    from tuner.report import page
    from tuner.study import finish, verifying

    def work(ready: Any, store: Any, bench: Any) -> Any:
        with finish.recorder(ready.study, store, lambda text: print(text, file=sys.stderr)) as recorder:
            result = verifying.minimal(ready, store, recorder, bench, launches)
            files = [*formats.best_config(store, ready.study)]
            files.append(page.build(store, ready.study, store.folder / "report.html"))
            for file in files:
                print(f"  {file}", file=sys.stderr)
            for form, file in formats.exported(store):
                print(f"  {file} was exported before; again: tuner export {path} --format {form}", file=sys.stderr)
            recorder.study_finished()
        return result, store.folder / "ablation.json"

    result, written = _session(path, work)
    print(_dumped(result) if json else printable(plain(result.text)))
    if result.config.hash != result.winner:
        back = f"move {written} away, then: tuner export {path}; tuner report {path}"
        print(f"The smaller configuration is recommended now. Back to the verified one: {back}", file=sys.stderr)
    return 0


def compare(first: Path, second: Path, json: bool) -> int:
    """Two studies, front against front, with significance."""
    from rich.markdown import Markdown

    from tuner.report.console import printer
    from tuner.report.terminal import comparison_table
    from tuner.verify.compare import compare as compare_

    sides = [_side(path) for path in (first, second)]
    if sides[0].name == sides[1].name:
        sides = [replace(side, name=str(path)) for side, path in zip(sides, (first, second), strict=True)]
    result = compare_(*sides)
    if json:
        print(_dumped(result))
        return 0
    if result.levels:
        printer().print(comparison_table(result, sides[0].objective.latency))
    printer().print(Markdown(result.text))
    return 0


def _side(path: Path) -> Any:
    from tuner.record.secrets import hide, secrets
    from tuner.spec.study import COUNTED
    from tuner.verify.compare import Side

    study, store = opened(path)
    trials = store.trials()
    hardware, engine, space = study.hardware, study.engine, study.space
    hidden = secrets(study, trials)

    def shown(values: Mapping[str, Any]) -> dict[str, str]:
        return {name: hide("on" if value is None else str(value), hidden) for name, value in values.items()}

    versions = {str((t.extra or {}).get("engine_version", "")) for t in trials} - {""}
    server = {"command": " ".join(engine.command), "python": engine.python, **engine.options}
    filled = any(step.filled for trial in trials for step in trial.outcome.steps)
    facts = {
        "model": study.model,
        "hardware": f"{hardware.gpus} x {hardware.name}" if hardware.gpus else hardware.name,
        "trace": {**asdict(study.trace), "file": Path(study.trace.file).name},
        "load": {**asdict(study.load), "ladder": ", ".join(f"{load:g}" for load in study.load.ladder), "auto": False},
        "engine": " ".join([engine.kind, ", ".join(sorted(versions))]).strip(),
        "server": shown({**engine.args, **space.fixed, **space.env, **server, **engine.env}),
        "search space": space.name,
        "parameters": {parameter.name: parameter for parameter in space.parameters} | {"rules": space.rules},
        "rates": "over the time that steps were to last" if study.planned_ends else "to the last request (as before)",
        "prefix cache": "holds what came before a step" if filled else "is empty before each step",
        "GPUs": "of tuned, pinned and fixed flags" if COUNTED in study.rules else "of tuned flags alone (as before)",
        "figures": "emulated" if study.engine.kind == "emulator" or any(t.emulated for t in trials) else "measured",
    }
    return Side(study.name, trials, study.objective, facts)


def _dumped(result: Any) -> str:
    from tuner.report.summary import clean

    return json_.dumps(clean(result.to_dict()), indent=1, default=str)


def _session(path: Path, work: Callable[[Any, Any, Any], Any]) -> Any:
    """Opens a study for more launches: lock, engine, traffic, signals and view, as ``tuner tune`` does."""
    cancel = threading.Event()
    with stopping(cancel, say_stopping) as instead:
        return _opened_session(path, work, cancel, instead)


def _opened_session(
    path: Path, work: Callable[[Any, Any, Any], Any], cancel: threading.Event, instead: Callable[..., None]
) -> Any:
    from tuner.cli.live import View
    from tuner.engines import hub
    from tuner.engines.protocol import Cancelled
    from tuner.study import session
    from tuner.study.evaluate import Bench

    study, _ = opened(path)
    terminal = sys.stderr.isatty()
    hub.bring(study, say, cancel, shown=terminal)
    if cancel.is_set():
        raise KeyboardInterrupt
    try:
        with session.opened(study) as store, View(study, not terminal) as view:
            instead(view.stopping)
            ready = session.prepare(study)
            guard = session.guard(ready, store, view.on_event)
            return work(ready, store, Bench(study, ready.engine, cancel, view.on_event, guard))
    except Cancelled:
        raise KeyboardInterrupt from None
