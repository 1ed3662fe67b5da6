"""One installed engine: its version and the flags that it knows, asked once per installation and cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import EnvironmentFault, UsageError, replacing
from tuner.server.faults import OTHER_BUILD, WITHOUT_IT

_FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
_CORRECT = "correct engine.python or engine.command (of a study that names neither, TUNER_VLLM_PYTHON)"
_HELP_S = 600.0
_VERSION_S = 60.0
_ASK_VERSION = (
    "import importlib.metadata as m, sys, json\n"
    "found = []\n"
    "for name in sys.argv[1:]:\n"
    "    try: found.append([name, m.version(name), str(m.distribution(name)._path)])\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))\n"
)

Run = Callable[[Sequence[str], float], str]


def refuse_launchers(flag: str, reserved: frozenset[str], trusted: bool = True) -> None:
    """Raises ``UsageError`` for a flag that the launcher decides: one of ``reserved``, or whether a model's own code
    may run, where it is not ``trusted``."""
    if flag in reserved:
        raise UsageError(f"--{flag} is set by the launcher", fix="take it out of engine.args and the search space")
    if flag == "trust-remote-code" and not trusted:
        raise UsageError("--trust-remote-code is not a parameter", fix="set engine.trust_remote_code: true instead")


def cache_folder() -> Path:
    """``tuner`` in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"


def run(argv: Sequence[str], timeout_s: float) -> str:
    """The standard output of a short program. Raises ``EnvironmentFault`` with its last line where it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON"))}
    try:
        done = subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, env=env
        )
    except FileNotFoundError:
        raise EnvironmentFault(f"{argv[0]} does not exist", fix=_CORRECT) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"{argv[0]} cannot be asked: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        foreign = re.search(OTHER_BUILD, done.stderr)
        fix = f"{argv[0]} -m {WITHOUT_IT}" if foreign else "check that the engine's environment works"
        raise EnvironmentFault(f"{' '.join(argv[:3])} failed: {said[-1]}", fix=fix)
    return done.stdout


@dataclass(slots=True)
class Installation:
    """A Python environment that has one of ``packages``; ``help_argv`` prints the flags (after the interpreter)."""

    python: str
    packages: tuple[str, ...]
    help_argv: tuple[str, ...]
    run: Run = run
    cache: Path | None = None
    _found: tuple[str, str, str] | None = None

    def version(self) -> str:
        """``0.32.0``, or ``0.32.0+cpu`` of a package whose name ends in ``-cpu``. Raises ``EnvironmentFault``."""
        package, version, _ = self._package()
        return f"{version}+cpu" if package.endswith("-cpu") and "+" not in version else version

    def flags(self) -> frozenset[str]:
        """Flags without dashes. The first call on an installation takes as long as its imports (20 s and more)."""
        _, version, place = self._package()
        key = hashlib.sha256(json.dumps([self.python, version, place, _stamp(place)]).encode()).hexdigest()[:16]
        path = (self.cache or cache_folder()) / f"flags-{self.packages[0]}-{key}.json"
        try:
            return frozenset(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        flags = flags_of(self.run([self.python, *self.help_argv], _HELP_S))
        if not flags:
            raise EnvironmentFault(f"{self.python} {' '.join(self.help_argv)} names no flags")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as half:
                half.write_text(json.dumps(sorted(flags)), encoding="utf-8")
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
        return flags

    def _package(self) -> tuple[str, str, str]:
        if self._found is None:
            entries = json.loads(self.run([self.python, "-c", _ASK_VERSION, *self.packages], _VERSION_S) or "[]")
            if not entries:
                name, *others = self.packages
                cpu = "".join(f" ({other} without a GPU)" for other in others)
                raise EnvironmentFault(
                    f"{self.python} has no {' or '.join(self.packages)}",
                    fix=f"{self.python} -m pip install {name}{cpu}, or name another interpreter: "
                    "--python PATH (engine.python in a study file)",
                )
            self._found = (str(entries[0][0]), str(entries[0][1]), str(entries[0][2]))
        return self._found


def flags_of(help_text: str) -> frozenset[str]:
    """Every long flag that a help text names at the start of an entry or in its usage."""
    found: set[str] = set()
    for line in help_text.splitlines():
        bare = line.strip()
        if bare.startswith(("--", "-")) or "[--" in bare or line.startswith("usage:"):
            found |= set(_FLAG.findall(bare))
    return frozenset(name for name in found if not name.startswith("json-arg"))


def _stamp(place: str) -> float:
    try:
        return os.stat(place).st_mtime
    except OSError:
        return 0.0
