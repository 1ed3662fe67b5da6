"""The study folder: what is written, in which order, and how it is read back. A trial without ``outcome.json`` did
not happen; everything a report says can be computed from here."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import EnvironmentFault, naming, replacing
from tuner.space.config import ServingConfig
from tuner.spec.storage import sqlite_url
from tuner.study.outcome import ENVIRONMENT_CAUSES, UNTRIED, Aborted, Infeasible, Outcome, from_dict, to_dict

CHECKED = "quality.json"  # in a trial's folder: how its answers compare with the default's
BEGUN = ("study.db", "trials", "ladder")  # where any of it is, something was asked or launched
HALF_S = 60.0  # no file takes so long to be written
# why a search ended
EXHAUSTED = "every configuration of the space has been tried"
UNFOUND = "nothing was proposed, or found by thousands of draws, that is neither refused nor launched already"
NOTHING_NEW = (EXHAUSTED, UNFOUND)


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One finished trial. ``role`` is ``search`` or ``verify``; ``baseline`` marks the engine's default;
    ``remeasure_of`` the trial whose config this one measured again (None: a config of its own); times are Unix
    seconds; ``extra`` is what the loop noted (predicted metrics, sampler's reason, device, versions)."""

    number: int
    folder: Path
    config: ServingConfig
    outcome: Outcome
    params: Mapping[str, Any]
    started_s: float
    ended_s: float
    baseline: bool = False
    emulated: bool = False
    role: str = "search"
    remeasure_of: int | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def again(self) -> bool:
        """Whether its end says nothing of its config, which is to be launched once more."""
        return bool((self.extra or {}).get("again"))

    @property
    def price(self) -> float | None:
        """USD per GPU-hour where it ran; None where that was not noted (the study's)."""
        return (self.extra or {}).get("price_usd_per_gpu_hour")

    @property
    def alone(self) -> bool:
        """Whether its tuner had no other launch when it began (False: not known)."""
        return self.role != "search" or bool((self.extra or {}).get("alone"))

    @property
    def quality(self) -> str:
        """What the quality floor said of it, in words; empty where nothing was to be checked."""
        found = (self.extra or {}).get("quality") or {}
        words = {"passed": "Quality floor held", "failed": "Below the quality floor"}
        said = words.get(str(found.get("verdict")), "The quality floor was not checked")
        return f"{said}: {found.get('reason')}." if found else ""


class Store:
    """Reads and writes one study folder. One writer at a time (the loop holds a lock); any number of readers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def study_file(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def database(self) -> str:
        """Optuna's storage URL."""
        return sqlite_url(self.folder.resolve() / "study.db")

    @property
    def ladder_folder(self) -> Path:
        """Where the launch that settled the ladder is kept; no trial of the study, but part of its budget."""
        return self.folder / "ladder"

    def begun(self) -> bool:
        """Whether anything was asked or launched here: until then the study file may still change."""
        return any((self.folder / name).exists() for name in BEGUN)

    def measured(self) -> bool:
        """Whether any load was ever measured here."""
        return any(t.outcome.steps for t in self.trials() + Store(self.ladder_folder).trials())

    def set_aside(self) -> Path:
        """Moves all that is here, but for the lock, to a folder of its own under ``interrupted/``; returns that."""
        aside = self.folder / "interrupted" / f"study-{time.time_ns()}"
        aside.mkdir(parents=True)
        there = [path for path in self.folder.iterdir() if path.name not in (".lock", "interrupted")]
        for path in sorted(there, key=lambda p: (p == self.study_file, p.name in BEGUN)):  # a kill leaves it to be done
            path.rename(aside / path.name)
        return aside

    def sweep(self) -> None:
        """Removes what kills left half written. Reports are made without the lock: what is new may be one."""
        for depth in ("", "*/", "*/*/", "*/*/*/"):
            for half in self.folder.glob(f"{depth}.*.[0-9]*.tmp"):
                with suppress(FileNotFoundError):
                    if time.time() - half.stat().st_mtime > HALF_S:
                        half.unlink()

    def shelve(self, number: int) -> None:
        """Moves the folder of a trial that never ended, if there is one, to ``interrupted/``."""
        folder = self._trial(number)
        if folder.exists():
            target = self.folder / "interrupted" / f"{number:04d}-{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)

    def launched(self, *roles: str) -> list[TrialRecord]:
        """What the budget has paid for: trials of these roles, and the launch that settled the ladder. Those that are
        made again for the machine's fault, or since somebody interrupted them, cost nothing."""
        trials = [t for t in self.trials() if t.role in roles] + Store(self.ladder_folder).trials()
        return [t for t in trials if not (t.again and _free(t))]

    def trial_folder(self, number: int) -> Path:
        """``trials/0007``; created when asked for."""
        path = self._trial(number)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _trial(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def numbers(self) -> list[int]:
        """Of every trial that has a folder, finished or not; what else lies there (``0003.bak``) is none."""
        found = [path for path in (self.folder / "trials").glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
        return sorted(int(path.name) for path in found if path == self._trial(int(path.name)))

    def start_trial(self, number: int, config: ServingConfig, params: Mapping[str, Any], **notes: Any) -> Path:
        """Writes ``config.json`` before the launch; returns the trial's folder."""
        folder = self.trial_folder(number)
        document = {
            "number": number,
            "params": dict(params),
            "config": config.to_dict(),
            "started_s": time.time(),
            **notes,
        }
        write_json(folder / "config.json", document)
        return folder

    def end_trial(self, number: int, outcome: Outcome, seconds: float | None = None, **notes: Any) -> None:
        """Writes ``outcome.json``, last and atomically: from here on the trial happened. ``seconds`` is for how long it
        had its GPUs (None: since :meth:`start_trial`, by the wall clock, which somebody may have set)."""
        document = {"outcome": to_dict(outcome), "ended_s": time.time(), **notes}
        if seconds is not None:
            document["launched_s"] = document["ended_s"] - seconds
        if (checked := self._trial(number) / CHECKED).exists():
            document["quality"] = read_json(checked)
        write_json(self._trial(number) / "outcome.json", document)  # without its config.json it would be of no use

    def trials(self) -> list[TrialRecord]:
        """Every finished trial, by number."""
        return [record for number in self.numbers() if (record := self.trial(number))]

    def trial(self, number: int) -> TrialRecord | None:
        """One finished trial, or None."""
        folder = self._trial(number)
        if not (folder / "outcome.json").exists():
            return None
        start, end = read_json(folder / "config.json"), read_json(folder / "outcome.json")
        known = {"number", "params", "config", "started_s", "baseline", "emulated", "role", "remeasure_of"}
        with AsWritten(folder):
            return TrialRecord(
                number=start["number"],
                folder=folder,
                config=ServingConfig.from_dict(start["config"]),
                outcome=from_dict(end["outcome"]),
                params=start["params"],
                started_s=end.get("launched_s", start["started_s"]),
                ended_s=end["ended_s"],
                baseline=start.get("baseline", False),
                emulated=start.get("emulated", False),
                role=start.get("role", "search"),
                remeasure_of=start.get("remeasure_of"),
                extra={k: v for k, v in {**start, **end}.items() if k not in known | {"outcome", "ended_s"}},
            )

    def log(self, event: str, **data: Any) -> None:
        """One line in ``events.jsonl``."""
        append_json(self.folder / "events.jsonl", {"at_s": time.time(), "event": event, **data})

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "events.jsonl")

    def refuse(self, params: Mapping[str, Any], reason: str, count: int = 0) -> None:
        """One line in ``refused.jsonl``: a combination that was never launched, and why; with a ``count`` it stands for
        that many that the same reason refuses."""
        append_json(self.folder / "refused.jsonl", {"params": dict(params), "reason": reason, "count": count})

    def refused(self) -> list[dict[str, Any]]:
        rows = read_jsonl(self.folder / "refused.jsonl")
        return [row for row in rows if isinstance(row.get("params"), dict) and "reason" in row]


def write_json(path: Path, data: Any) -> None:
    """Atomically, and on the disk when it returns."""
    with replacing(path) as half, half.open("w", encoding="utf-8") as file:
        json.dump(finite(data), file, indent=1, allow_nan=False, default=str)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Raises EnvironmentFault where the file is damaged or missing."""
    try:
        return _infinite(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, FileNotFoundError, RecursionError) as error:
        raise damaged(path, getattr(error, "strerror", "") or str(error)) from error


class AsWritten:
    """``with AsWritten(path):`` raises EnvironmentFault where the code inside cannot take what ``path`` holds: JSON,
    but not what the tuner writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyError | IndexError | TypeError | ValueError | AttributeError):
            raise damaged(self.path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, why: str) -> EnvironmentFault:
    """What of the study folder cannot be read, and what to move away for the study to go on without it."""
    what = "that folder" if path.name in ("config.json", "outcome.json") else "it"
    return EnvironmentFault(
        f"cannot be read ({why})", where=str(path), fix=f"Move {what} away and run the command again"
    )


def append_json(path: Path, data: Any) -> None:
    """One line more; a last line that a kill cut short stays a line of its own."""
    with naming(path), path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")
        file.write((json.dumps(finite(data), allow_nan=False, default=str) + "\n").encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line that can be read; one cut short by a kill, or damaged, is passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(_infinite(json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return [row for row in found if isinstance(row, dict)]


def finite(data: Any) -> Any:
    """``data`` as JSON takes it, which has no infinity: written as ``inf``, ``-inf``, ``nan`` (read back as floats)."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data


_VERBATIM = {"params", "flags", "env", "reason", "reasons", "message", "evidence", "fix"}  # whose ``inf`` is a word


def _free(trial: TrialRecord) -> bool:
    outcome = trial.outcome
    if isinstance(outcome, Infeasible):
        held = trial.baseline and outcome.cause in UNTRIED  # what ought to serve was not tried
        return outcome.machines or outcome.cause in ENVIRONMENT_CAUSES or held
    return isinstance(outcome, Aborted)


def _infinite(data: Any) -> Any:
    if isinstance(data, str) and data in ("inf", "-inf", "nan"):
        return float(data)
    if isinstance(data, dict):
        return {key: value if key in _VERBATIM else _infinite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_infinite(value) for value in data]
    return data
