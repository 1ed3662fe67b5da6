"""The engine ``command``: any OpenAI-compatible server, from a command with places for what the launcher decides."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tuner.engines.http import HttpServer, launch
from tuner.engines.modelfolder import local_model
from tuner.engines.protocol import LaunchFailed, Site
from tuner.engines.vllmlog import DIALECT
from tuner.errors import UsageError
from tuner.server.bootlog import SILENT
from tuner.server.limits import Limits, PhaseLimit, fixed
from tuner.server.start import WARM_S, Binding, Recipe
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible

PLACE = re.compile(r"\{([A-Za-z][\w-]*)(?:=([^{}]*))?\}")
LAUNCHERS = ("port", "host", "served", "api_key", "gpus", "folder")  # places that every launch fills anew
_STOP_COMMAND_S = 60.0


class CommandEngine:
    """Implements :class:`tuner.engines.protocol.Engine`.

    ``command`` are the words to execute; no shell reads them. Places in them: ``{port}``, ``{host}`` (127.0.0.1),
    ``{model}``, ``{served}`` (a random name), ``{api_key}`` (random), ``{gpus}`` (indices, comma-separated),
    ``{folder}`` (the trial's), ``{flags}`` as a word of its own (where the config's flags go; else they are appended),
    and the name of any flag of the config, ``{ctx-size}`` or with a value for configs without it ``{ctx-size=4096}``.
    A flag that has a place is not appended. The same places may stand in ``env`` and ``stop_command``, which is run
    after the process tree has ended (``docker rm -f {served}``), and before it is checked that nothing is left.

    With ``{served}`` in the command the server has to list that name, and a stranger on the port is recognised; without
    it any name is taken, and where only one is listed that is asked for. ``health`` is the path that answers 200 when
    it is ready (empty: ``/v1/models`` is enough). ``log`` says whose log it writes, ``vllm`` or nobody's known.
    ``shares_port``: it binds with ``SO_REUSEADDR``, so that the port can be held for it until it does.
    """

    kind = "command"
    emulated = False

    def __init__(
        self,
        *,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stop_command: Sequence[str] = (),
        health: str = "/health",
        tokenizer: str = "",
        version: str = "unknown",
        log: str = "",
        start_limit_s: float = 1800.0,
        phase_limit_s: PhaseLimit = None,
        stop_wait_s: float = 15.0,
        host_alone: bool | None = None,
        shares_port: bool = False,
    ) -> None:
        """Raises ``UsageError`` where the command has no ``{port}``."""
        if not any("{port}" in word for word in command):
            fix = 'let the launcher choose: --port {port} (in a list two words, "{port}" in quotes)'
            raise UsageError("engine.command has no {port}", fix=fix)
        if log not in ("", "vllm"):
            raise UsageError(f"engine.options.log is vllm or nothing, not {log!r}")
        self.command, self.env, self.stop_command = tuple(command), dict(env or {}), tuple(stop_command)
        self.health, self.tokenizer, self._version, self.log = health, tokenizer, version, log
        self.start_limit_s, self.phase_limit_s, self.stop_wait_s = start_limit_s, phase_limit_s, stop_wait_s
        self.host_alone, self.shares_port = host_alone, shares_port

    @classmethod
    def from_study(cls, study: Study) -> CommandEngine:
        """The engine of a study; ``engine.options`` are the constructor's other keywords."""
        if not study.engine.command:
            raise UsageError("the command engine needs engine.command", where=study.source)
        return cls(command=study.engine.command, **study.engine.options)

    def version(self) -> str:
        """See the protocol: what the study says it is."""
        return self._version

    def flags(self) -> frozenset[str] | None:
        """See the protocol: nobody can be asked."""
        return None

    def check_config(self, config: ServingConfig) -> None:
        """Raises ``UsageError`` for a place that is neither known nor a flag of ``config``."""
        template = [*self.command, *self.stop_command, *self.env.values(), *config.env.values()]
        filled(template, config, dict.fromkeys((*LAUNCHERS, "model"), ""), flags=True)

    def launch(self, config: ServingConfig, site: Site) -> HttpServer:
        """See the protocol. Raises ``UsageError`` for a place that is neither known nor a flag of the config, and where
        the server does not know a flag of the command's own words, which every launch has."""
        stops: list[list[str]] = []

        def words(binding: Binding) -> list[str]:
            if self.stop_command:  # filled now: stopping never raises
                stops.append(self.words(self.stop_command, config, site, binding))
            return self.words(self.command, config, site, binding, flags=True)

        def clean() -> None:
            while stops:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run(stops.pop(), stdin=subprocess.DEVNULL, capture_output=True, timeout=_STOP_COMMAND_S)

        try:
            return launch(replace(self._recipe(config, site, words), clean=clean), site)
        except LaunchFailed as failed:
            if own := self._own_unknown(failed.outcome, config):
                text = f"the server does not know {own}, which stands in engine.command: {failed.outcome.evidence}"
                raise UsageError(text, where=str(site.folder), fix="correct engine.command") from None
            raise

    def _own_unknown(self, outcome: Infeasible, config: ServingConfig) -> str:
        """The flag of the command's own words that the server named as unknown; empty where it named none."""
        if outcome.cause != "unknown-flag":
            return ""
        named = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", outcome.evidence.rpartition(": ")[2]))
        own = [word.partition("=")[0] for word in self.command]
        return next((flag for flag in own if flag in named.difference(config.args())), "")

    def words(
        self, template: Sequence[str], config: ServingConfig, site: Site, binding: Binding, flags: bool = False
    ) -> list[str]:
        """``template`` with its places filled; with ``flags`` the config's other flags are put in or appended."""
        places = {
            "port": str(binding.port),
            "host": "127.0.0.1",
            "model": str(local_model(config.model) or config.model),
            "served": binding.model,
            "api_key": binding.api_key,
            "gpus": ",".join(map(str, binding.gpus)),
            "folder": str(site.folder.resolve()),
        }
        return filled(template, config, places, flags)

    def _recipe(self, config: ServingConfig, site: Site, words: Callable[[Binding], list[str]]) -> Recipe:
        def env(binding: Binding) -> dict[str, str]:
            names, values = [*self.env, *config.env], [*self.env.values(), *config.env.values()]
            return dict(zip(names, self.words(values, config, site, binding), strict=True))

        named = any("{served}" in word for word in self.command)
        silent_s = fixed(self.phase_limit_s).get("*", 60.0)
        limits = Limits(total_s=self.start_limit_s, silent_s=silent_s, fixed_s=fixed(self.phase_limit_s))
        tokenizer = self.tokenizer or str(local_model(config.model) or "")
        return Recipe(
            argv=words,
            env=env,
            tokenizer=tokenizer,
            limits=limits,
            model="" if named else config.model,
            named=named,
            shares_port=self.shares_port,
            host_alone=not site.gpus if self.host_alone is None else self.host_alone,
            health=self.health,
            stop_wait_s=self.stop_wait_s,
            warm_s=WARM_S,
            dialect=DIALECT if self.log == "vllm" else SILENT,
        )


def filled(template: Sequence[str], config: ServingConfig, places: Mapping[str, str], flags: bool = False) -> list[str]:
    """``template`` with ``places`` and those of the config's flags filled; with ``flags`` its other flags are put in or
    appended. Raises ``UsageError`` for a place that is none of these."""
    placed = {match[1].replace("_", "-") for word in template for match in PLACE.finditer(word)}
    rest = {name: value for name, value in config.flags.items() if name not in placed}
    given = ServingConfig(config.model, {}, rest).args()

    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name in places:
            return places[name]
        value = config.flags.get(name.replace("_", "-"), default)
        if value is None:
            raise UsageError(
                f"engine.command: {{{name}}} is neither {', '.join(places)}, flags nor a flag of this config",
                fix=f"write {{{name}=VALUE}} for configs without it",
            )
        return str(value)

    words: list[str] = []
    for word in template:
        words += given if word == "{flags}" and flags else [PLACE.sub(fill, word)]
    return words + (given if flags and "{flags}" not in template else [])
