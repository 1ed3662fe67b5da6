"""``best-config.yaml`` as ``vllm serve --config`` reads it, and the environment beside it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.engines.command import PLACE
from tuner.export.deployment import Deployment
from tuner.export.text import comment, dump

YAML_NAME, ENV_NAME = "best-config.yaml", "best-config.env"


def settings(what: Deployment) -> dict[str, Any]:
    """The config file's keys and values: flags without dashes, and ``model`` first.

    How vLLM reads it: ``true`` becomes the bare flag, a mapping becomes JSON. A ``false`` is dropped without a word by
    ``vllm serve`` (its outer parser does not know the flag), so that switches off are written as ``no-...: true``.
    """
    return {"model": what.model} | {flag: value_of(value) for flag, value in {**what.served, **what.flags}.items()}


def value_of(value: Any) -> Any:
    if value is None:
        return True
    if isinstance(value, bool):
        return str(value)  # a flag that takes a word, as it stood on the measured command line
    if isinstance(value, str) and value.startswith("{"):
        try:
            body = json.loads(value)
        except json.JSONDecodeError:
            return value
        return body if isinstance(body, dict) else value
    return value


def config_text(what: Deployment) -> str:
    """The whole file: what was measured, how to start it, and every flag with its comment."""
    lines = [what.header(), "#\n"]
    lines += [f"# Start:  {'; '.join(start(what))}\n"]
    lines += [f"# (without the vllm command: {_WITHOUT})\n"] * (_WITHOUT not in start(what))
    return "".join([*lines, *commented(what, settings(what))])


def commented(what: Deployment, values: Mapping[str, Any]) -> Iterator[str]:
    """Each of ``values`` as YAML below its comment."""
    for name, value in values.items():
        words = _CLIENTS if name in what.served else what.comments.get(name, "")
        yield f"\n# {comment(words)}\n" if words else "\n"
        yield dump({name: value})


_CLIENTS = "the name that clients ask for; change it as you like"
_WITHOUT = f"python -m vllm.entrypoints.openai.api_server --config {YAML_NAME}"


def start(what: Deployment) -> tuple[str, ...]:
    """The shell commands that serve the exported files; none for engines other than vLLM. PyPI's CPU build has no
    working ``vllm`` command."""
    if what.engine not in ("vllm", "emulator"):
        return ()
    serve = _WITHOUT if "+cpu" in what.version else f"vllm serve --config {YAML_NAME}"
    return f"set -a; . ./{ENV_NAME}; set +a", serve


def env_text(what: Deployment) -> str:
    """``NAME=value`` lines that a shell (``set -a``) and Docker Compose's ``env_file`` read alike. What the ``command``
    engine fills at each launch (``{folder}``) is left out with a word."""
    filled = {name: value for name, value in what.env.items() if what.engine == "command" and PLACE.search(value)}
    lines = ["# EMULATED\n"] * what.emulated + [f"# The environment that belongs to {YAML_NAME}.\n"]
    lines += [f"# {name} was set during the study and is a secret: set it yourself.\n" for name in what.secrets]
    lines += [
        f"# {name} was {comment(value)}, filled at each launch: set it yourself.\n" for name, value in filled.items()
    ]
    kept = {name: value for name, value in what.env.items() if name not in filled}
    for name, value in kept.items():
        if words := what.comments.get(name):
            lines.append(f"# {comment(words)}\n")
        lines.append(f"{name}={_quoted(value)}\n")
    return "".join(lines)


def _quoted(value: str) -> str:
    """In single quotes Compose takes a backslash before the last one for an escape, and no ``'"'"'`` at all."""
    if "'" in value or "\\" in value:
        return '"' + re.sub(r'([$"\\`])', r"\\\1", value) + '"'
    return shlex.quote(value)


def command(config: str) -> list[str]:
    """What a container runs; it is reached from outside the container, so it listens on every address in it."""
    return ["vllm", "serve", "--config", config, "--host", "0.0.0.0", "--port", "8000"]
