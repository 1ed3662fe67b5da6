"""Models of the Hugging Face Hub that are not on this disk: what a study reads of one, and its weights.

A server that downloads its model does so within its start-up, on a GPU that waits, and nothing can be predicted before.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.engines.modelfolder import hub_cache, local_model
from tuner.errors import EnvironmentFault

if TYPE_CHECKING:
    from tuner.spec.study import Study

SERVED = ("vllm", "sglang", "emulator")  # engines whose model is a hub's where it is no folder
_READ = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_READ_BYTES = 64 * 2**20  # a tokenizer of 250,000 words takes some 30 MiB
_INDEX = "model.safetensors.index.json"
_ASK_S = 5.0
_ELSEWHERE = {"download-dir", "load-format", "revision"}  # flags by which the weights are not the usual ones
_DOWNLOAD = """\
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()  # the tuner is gone
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
"""


@cache
def read(model: str) -> str:
    """Brings configuration and tokenizer of ``model`` (some MB) to the local Hugging Face cache, where it is an id of
    which nothing is there. Returns why that could not be, in words; empty where it could, or is not to be."""
    if local_model(model) is not None or _offline(os.environ):
        return ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        files = _files(model)
        small = [name for name, size in files.items() if "/" not in name and size <= _READ_BYTES]
        wanted = [name for name in small if any(fnmatch.fnmatch(name, pattern) for pattern in _READ)]
        if wanted:
            snapshot_download(model, allow_patterns=wanted)
    except GatedRepoError:
        return "the hub gives it to those alone who accepted its licence there and set HF_TOKEN"
    except RepositoryNotFoundError:
        return "the hub has no such model, or not for everybody (HF_TOKEN says who asks)"
    except Exception as error:  # its client raises what its HTTP library does, which changes with its version
        return f"the hub cannot be asked ({(str(error).strip() or repr(error)).splitlines()[0][:200]})"
    return ""


def bring(study: Study, say: Callable[[str], None], cancel: threading.Event, shown: bool) -> None:
    """Downloads the weights of the study's model to the local Hugging Face cache, where its servers take them from
    there and they are not. ``say`` hears of it; ``shown``: the client's progress is on stderr. Where it cannot be done
    the first server tries by itself, and says why not. ``cancel`` ends it; files that are whole by then are kept.

    Raises EnvironmentFault where the disk has not enough room.
    """
    if not _from_cache(study):
        return
    read(study.model)
    here = local_model(study.model)
    if here and _whole(here):
        return
    try:
        sizes = _files(study.model)
        names = [name for name in _weights(study, sizes) if not (here and (here / name).exists())]
    except Exception:  # see above
        return
    if not names:
        return
    size = sum(sizes.get(name, 0) for name in names)
    _room(study.model, size)
    say(f"{study.model} is not on this disk: its weights are downloaded first, {size / 1e9:.1f} GB.")
    words = [sys.executable, "-c", _DOWNLOAD, study.model, *names]
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0" if shown else "1"}
    with (
        tempfile.TemporaryFile() as told,
        subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=None if shown else told,
            env=env,
            start_new_session=True,
        ) as client,
    ):
        while client.poll() is None:
            if cancel.wait(0.2):
                client.kill()
                say("The download is ended; files that are whole are kept.")
                return
        if client.returncode:
            told.seek(0)
            why = told.read().decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {client.returncode}"]
            say(f"It could not be downloaded ({why[0][:200]}): the first server tries by itself.")


def commit(model: str) -> str:
    """Twelve hex digits of the commit that the local cache has of a hub's ``model``; empty where it is none, or not
    there."""
    here = None if Path(model).is_dir() else local_model(model)
    return here.name[:12] if here else ""


def _from_cache(study: Study) -> bool:
    """Whether the study's servers take the weights from the cache of whoever runs the tuner."""
    engine, space = study.engine, study.space
    local = study.executor.kind == "local" and engine.kind in ("vllm", "sglang") and not engine.command
    env = {**space.env, **engine.env}
    return (
        local
        and not Path(study.model).expanduser().exists()
        and not _ELSEWHERE & {*engine.args, *space.fixed}
        and not any(name.startswith("HF_") for name in env)
        and not _offline({**os.environ, **env})
    )


def _offline(env: Mapping[str, str]) -> bool:
    """Whether the hub is not to be asked, or is another one."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE")
    return any(env.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def _files(model: str) -> dict[str, int]:
    """The model's files on the hub, with their bytes."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(model, files_metadata=True, timeout=_ASK_S).siblings or ()
    return {file.rfilename: file.size or 0 for file in found}


def _weights(study: Study, names: Iterable[str]) -> list[str]:
    """The files that the engine loads, as ``_prepare_weights`` of vLLM's default loader chooses them."""
    from huggingface_hub import hf_hub_download

    top = [name for name in names if "/" not in name]
    if study.engine.kind == "vllm" and (own := fnmatch.filter(top, "consolidated*.safetensors")):
        return own  # Mistral's own format
    if _INDEX in top:
        return _named(Path(hf_hub_download(study.model, _INDEX)))
    return fnmatch.filter(top, "*.safetensors") or fnmatch.filter(top, "*.bin")


def _named(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _whole(folder: Path) -> bool:
    """Whether the weights are there, as far as can be told without asking the hub."""
    if (folder / _INDEX).is_file():
        with_index = [folder / name for name in _named(folder / _INDEX)]
        return all(path.exists() for path in with_index) or any(folder.glob("consolidated*.safetensors"))
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _room(model: str, size: int) -> None:
    folder = hub_cache(os.environ)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise EnvironmentFault(
            f"the weights of {model} take {size / 1e9:.1f} GB, and {folder} has room for {free / 1e9:.1f}",
            fix="Make room, or set HF_HOME to a folder on a larger disk",
        )
