"""What tuners of one study tell each other through their database: records of trials, whole files, and what makes two
studies the same. Neither secrets nor paths of one machine go there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.record.secrets import is_secret
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.store import Store, TrialRecord, finite, write_json

if TYPE_CHECKING:
    import optuna

MODEL = "(model)"  # in place of the model's folder, which every machine has elsewhere
# secrets by the first rule: with another one the digests of studies that were begun before would be others
_LEFT_OUT = re.compile(r"TOKEN(?!S|IZER)|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
CHUNK = 40_000  # characters of an attribute: a TEXT column of MySQL holds 65,535 bytes


def squeezed(data: Any) -> str:
    """``data`` (JSON) as compressed text."""
    return base64.b64encode(zlib.compress(json.dumps(finite(data), sort_keys=True).encode(), 9)).decode()


def expanded(text: str) -> Any:
    """The inverse of :func:`squeezed`."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def packed(study: Study, folder: Path) -> str:
    """A finished trial's documents for the other tuners: model and environment of the study are their own there."""
    start, end = json.loads((folder / "config.json").read_text()), json.loads((folder / "outcome.json").read_text())
    config = dict(start["config"])
    config["env"] = {k: v for k, v in config["env"].items() if k not in study.space.env and not is_secret(k, v)}
    config["model"] = MODEL if config["model"] == study.model else config["model"]
    said = {key: value for key, value in start.items() if key != "model_folder"}  # where the model lies here
    return squeezed({"start": {**said, "config": config}, "end": end})


def unpacked(study: Study, record: str, store: Store, number: int, claim: str, host: str) -> None:
    """Writes another tuner's trial into this study folder as ``number``; its records stay where they were made."""
    data: Mapping[str, Any] = expanded(record)
    start = dict(data["start"])
    given = dict(start["config"])
    model = study.model if given["model"] == MODEL else given["model"]
    config = ServingConfig.from_dict({**given, "model": model, "env": {**study.space.env, **given["env"]}})
    folder = store.trial_folder(number)
    start |= {"number": number, "config": config.to_dict(), "claim": claim, "elsewhere": host}
    write_json(folder / "config.json", start)
    write_json(folder / "outcome.json", data["end"])


def put(book: optuna.Study, key: str, data: Any) -> None:
    """Keeps ``data`` (JSON) under ``key`` in the study's attributes, compressed and in pieces."""
    text = squeezed(data)
    pieces = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    for index, piece in enumerate(pieces):
        book.set_user_attr(f"{key}/{index}", piece)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    book.set_user_attr(key, {"pieces": len(pieces), "digest": digest})


def get(book: optuna.Study, key: str) -> Any:
    """What is kept under ``key``; None where nothing is."""
    kept = book.user_attrs
    if key not in kept:
        return None
    return expanded("".join(kept[f"{key}/{index}"] for index in range(kept[key]["pieces"])))


def put_file(book: optuna.Study, study: Study, path: Path) -> None:
    """Keeps a JSON file of the study folder; the model's folder in it is left out."""
    text = path.read_text(encoding="utf-8").replace(json.dumps(study.model), json.dumps(MODEL))
    put(book, f"file {path.name}", json.loads(text))


def get_file(book: optuna.Study, study: Study, path: Path) -> bool:
    """Writes the file that another tuner kept; False where none did."""
    data = get(book, f"file {path.name}")
    if data is None:
        return False
    write_json(path, json.loads(json.dumps(data).replace(json.dumps(MODEL), json.dumps(study.model))))
    return True


def identity(study: Study) -> dict[str, str]:
    """What must be the same for measurements to be comparable, part by part, as digests; the machine's own paths and
    secrets are left out."""
    from tuner.verify.fingerprint import model_hash

    engine, space, trace = study.engine, study.space, study.trace
    env = {name: value for name, value in engine.env.items() if not _LEFT_OUT.search(name)}
    # as they are written: folders among them are resolved beside the study, wherever that lies
    options = {**engine.options, **((study.frozen.get("engine") or {}).get("options") or {})}
    file = Path(trace.file)
    traffic = hashlib.sha256(file.read_bytes()).hexdigest() if trace.file else ""
    filled = () if trace.fill_cache_s is None else (trace.fill_cache_s,)  # studies that were begun before stay the same
    parts: dict[str, Any] = {
        "model": (Path(study.model).name, model_hash(Path(study.model)) if study.model else ""),
        "engine": (engine.kind, sorted(engine.args.items()), sorted(env.items()), sorted(options.items())),
        "space": (space.name, space.parameters, space.rules, sorted(space.fixed.items(), key=str), *_meant(study)),
        "objective": study.objective,
        "trace": (traffic, trace.window_s, trace.search_windows, study.heldout_windows, trace.output, *filled),
        "load": study.load,
        "hardware": study.hardware.name,
    }
    return {name: hashlib.sha256(repr(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def _meant(study: Study) -> Iterator[object]:
    """What the space's fixed flags mean, where they mean more than themselves: else studies that were begun before
    would be others."""
    space = study.space
    joined = sorted({flag.partition(".")[0] for flag in space.fixed} & space.joined)
    counted = space.gpus > 1 or any(flag in space.fixed for flag in space.sized)
    if joined or counted or space.variant or space.gpu:
        yield joined, space.config(space.default(), study.model).gpus, space.variant, space.gpu


def elsewhere(record: TrialRecord) -> str:
    """The host of the tuner that made the trial; empty for this folder's own."""
    return str((record.extra or {}).get("elsewhere", ""))
