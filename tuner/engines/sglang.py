"""SGLang: how it is started and what its log says. Never imported, only launched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tuner.engines.http import HttpServer, launch
from tuner.engines.installation import Installation, cache_folder, refuse_launchers
from tuner.engines.modelfolder import local_model
from tuner.engines.protocol import Site
from tuner.engines.vllm import interpreter_of
from tuner.errors import UsageError
from tuner.server.bootlog import GIB, Dialect, Fact
from tuner.server.limits import History, Limits, PhaseLimit, fixed
from tuner.server.pagecache import fetch
from tuner.server.start import WARM_S, Binding, Recipe
from tuner.space.config import ServingConfig
from tuner.spec.study import Study

_MODULE = ("-m", "sglang.launch_server")
#: Flags that the launcher decides.
RESERVED = frozenset({"host", "port", "api-key", "admin-api-key", "served-model-name", "model-path", "model", "config"})

#: SGLang's "GB" are GiB.
DIALECT = Dialect(
    "sglang",
    (
        ("imports", re.compile(r"(?!)")),
        ("engine", re.compile(r"server_args=")),
        ("weights", re.compile(r"Load weight begin")),
        ("kv", re.compile(r"Load weight end")),
        ("graphs", re.compile(r"(?i)capture .*graph begin|memory pool end")),
        ("api", re.compile(r"max_total_num_tokens=")),
        ("warmup", re.compile(r"Uvicorn running on|Application startup complete")),
    ),
    (
        Fact("kv_cache_tokens", re.compile(r"max_total_num_tokens=(\d+)")),
        Fact("kv_cache_tokens", re.compile(r"(?i)KV cache (?:is )?allocated\..*?#tokens: (\d+)")),
        Fact("weights_load_s", re.compile(r"Load weight end\. elapsed=([\d.]+) s")),
        Fact("weights_bytes", re.compile(r"Load weight end\..*?mem usage=([\d.]+) GB"), GIB),
        Fact("graph_bytes", re.compile(r"(?i)capture .*graph end\..*?mem usage=([\d.]+) GB"), GIB),
        Fact("graph_capture_s", re.compile(r"(?i)capture .*graph end\..*?elapsed[:=] ?([\d.]+) s")),
        Fact("max_num_seqs", re.compile(r"max_running_requests=(\d+)")),
        Fact("max_num_batched_tokens", re.compile(r"chunked_prefill_size=(\d+)")),
        Fact("free_bytes", re.compile(r"available_[gc]pu_mem=([\d.]+) GB"), GIB),
    ),
)


class SglangEngine:
    """Implements :class:`tuner.engines.protocol.Engine`. ``python`` is the interpreter that has SGLang (default: the
    one that runs the tuner); ``command`` replaces ``python -m sglang.launch_server``."""

    kind = "sglang"
    emulated = False

    def __init__(
        self,
        *,
        python: str = "",
        command: Sequence[str] = (),
        trust_remote_code: bool = False,
        start_limit_s: float = 3600.0,
        phase_limit_s: PhaseLimit = None,
        stop_wait_s: float = 15.0,
        cache: Path | None = None,
    ) -> None:
        self.command = tuple(command)
        self.trust_remote_code = trust_remote_code
        self.start_limit_s, self.phase_limit_s, self.stop_wait_s = start_limit_s, phase_limit_s, stop_wait_s
        self.cache = cache or cache_folder()
        self.python = python or interpreter_of(self.command or ("python3",))
        self.installation = Installation(self.python, ("sglang",), (*_MODULE, "--help"), cache=self.cache)

    @classmethod
    def from_study(cls, study: Study) -> SglangEngine:
        """The engine of a study; ``engine.options`` are the keywords of the constructor."""
        spec = study.engine
        return cls(
            python=spec.python, command=spec.command, trust_remote_code=spec.trust_remote_code, **spec.options
        )  # fmt: skip

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

    def recipe(self, config: ServingConfig, site: Site) -> Recipe:
        """How this config is started. Raises ``UsageError`` for what the launcher decides."""
        for flag in config.flags:
            self.check_flag(flag)
        if config.model_variant:
            raise UsageError(
                f"the sglang engine writes no model variants ({config.model_variant})", fix="name a quantized model"
            )
        version = self.version() if self.python else "unknown"
        history = History(self.cache / "startup.json", f"sglang {version} {Path(config.model).name}")
        return Recipe(
            argv=lambda binding: self._argv(config, binding),
            env=lambda binding: self._env(config),
            tokenizer=str(local_model(config.model) or config.model),
            dialect=DIALECT,
            limits=Limits(total_s=self.start_limit_s, fixed_s=fixed(self.phase_limit_s), seen_s=history.seen_s()),
            history=history,
            host_alone=not site.gpus,
            stop_wait_s=self.stop_wait_s,
            warm_s=WARM_S,
        )

    def _argv(self, config: ServingConfig, binding: Binding) -> list[str]:
        secret = binding.temporary / "sglang.yaml"  # not in argv, where every user of the machine reads it
        secret.touch(mode=0o600)
        secret.write_text(f'api-key: "{binding.api_key}"\n', encoding="utf-8")
        words = list(self.command) if self.command else [self.python, *_MODULE]
        words += ["--config", str(secret), "--model-path", config.model, "--host", "127.0.0.1"]
        words += ["--port", str(binding.port), "--served-model-name", binding.model]
        flags = {name: value for name, value in config.flags.items() if name != "trust-remote-code"}
        flags.setdefault("enable-metrics", None)
        for name, value in flags.items():
            words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
        return [*words, "--trust-remote-code"] if self.trust_remote_code else words

    def _env(self, config: ServingConfig) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if Path(config.model).is_dir() else {}
        return offline | dict(config.env)
