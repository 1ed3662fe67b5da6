"""The engine ``attach``: a server that somebody else runs. Nothing is started, changed or stopped; only loads vary."""

from __future__ import annotations

import json
import os

from tuner.engines.http import unserving
from tuner.engines.protocol import Cancelled, Endpoint, LaunchFailed, Site, StepPlan, Teardown
from tuner.errors import EnvironmentFault, NoCompletions, Unreachable, UsageError
from tuner.load import wire
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Boot, Infeasible, Step

_NAME_IT = "name the environment variable that holds it in engine.options.api_key_env"


class AttachEngine:
    """Implements :class:`tuner.engines.protocol.Engine`.

    ``url`` is the base without ``/v1``; ``model`` the served name (default: the first that the server lists);
    ``api_key_env`` names the environment variable that holds the key, since a study file is kept and shared;
    ``tokenizer`` the model folder or id behind it (default: the study's model); ``health`` the path that answers 200
    while the server is well (empty: ``/v1/models`` is asked).
    """

    kind = "attach"
    emulated = False

    def __init__(
        self, *, url: str, model: str = "", api_key_env: str = "", tokenizer: str = "", health: str = ""
    ) -> None:
        """Raises ``UsageError`` for a URL that is none, and for a variable that is not set."""
        if api_key_env and not os.environ.get(api_key_env):
            raise UsageError(f"the environment variable {api_key_env} is not set", fix=f"export {api_key_env}=...")
        self.url = url.removesuffix("/").removesuffix("/v1")
        self.target = wire.target(self.url)
        self.model, self.tokenizer, self.health = model, tokenizer, health
        self.key_in = api_key_env
        self._key = wire.checked_key(os.environ.get(api_key_env, ""), api_key_env) if api_key_env else ""

    @classmethod
    def from_study(cls, study: Study) -> AttachEngine:
        """The engine of a study; ``engine.options`` are the keywords of the constructor."""
        if "url" not in study.engine.options:
            raise UsageError(
                "the attach engine needs a url",
                where=study.source,
                fix='write engine: {kind: attach, options: {url: "http://host:8000"}}',
            )
        return cls(**{"tokenizer": study.model, **study.engine.options})

    def version(self) -> str:
        """See the protocol: what the server's ``/version`` says, else ``unknown``."""
        try:
            return str(json.loads(self.get("/version"))["version"])
        except (EnvironmentFault, ValueError, KeyError, TypeError, RecursionError):
            return "unknown"

    def flags(self) -> frozenset[str] | None:
        """See the protocol: a server that runs takes none."""
        return frozenset()

    def launch(self, config: ServingConfig, site: Site) -> AttachedServer:
        """See the protocol: only asks the server who it is. Raises ``EnvironmentFault`` where nobody answers."""
        if site.cancel.is_set():
            raise Cancelled
        if config.flags or config.env or config.model_variant:
            what = ", ".join([f"--{name}" for name in config.flags] + [*config.env]) or config.model_variant
            raise LaunchFailed(
                Infeasible(
                    "invalid-combination",
                    f"a server that somebody else runs cannot be given {what}",
                    fix="leave parameters and engine.args empty: an attached server's loads are all that varies",
                    stage="before launch",
                )
            )
        names = self.models()
        if self.model and self.model not in names:
            raise UsageError(
                f"{self.url} does not serve {self.model}", fix=f"it serves {', '.join(names) or 'nothing'}"
            )
        if not names:
            raise Unreachable(f"{self.url} serves no model")
        return AttachedServer(self, Endpoint(self.url, self.model or names[0], self._key, self.tokenizer))

    def models(self) -> list[str]:
        """The served names. Raises as :meth:`get`."""
        data = self.get("/v1/models")
        try:
            return [str(entry["id"]) for entry in json.loads(data)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unreachable(
                f"{self.url} is no OpenAI-compatible server: GET /v1/models answered {data[:80]!r}",
                fix="give the base URL, without /v1",
            ) from None

    def get(self, path: str) -> bytes:
        """The body of one GET. Raises ``Unreachable`` where nobody answers it with 200."""
        from tuner.load.probe import asked

        status, body = asked(self.target, path, self._key, 10.0, most=2**20)
        if status in (401, 403):
            message = f"{self.url} refuses the key (HTTP {status})"
            fix = f"Is the key in {self.key_in} right?" if self.key_in else _NAME_IT
            raise Unreachable(message, fix=fix)
        if status != 200:
            raise Unreachable(f"{self.url} answers GET {path} with HTTP {status}")
        return body


class AttachedServer:
    """Implements :class:`tuner.engines.protocol.Server`; ``stop`` does nothing."""

    def __init__(self, engine: AttachEngine, endpoint: Endpoint) -> None:
        self.endpoint: Endpoint | None = endpoint
        self.boot = Boot()
        self._engine = engine

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol."""
        from tuner.load.step import measure

        if self.endpoint is None:
            raise UsageError("not attached")
        try:
            step = measure(self.endpoint, plan)
        except Unreachable as error:
            raise _gone(error) from None
        except NoCompletions as error:
            raise LaunchFailed(unserving(error, self.endpoint)) from None
        if step.metrics.get("error_rate", 0.0) > 0:
            self._check()
        return step

    def stop(self) -> Teardown:
        """See the protocol: the server is not ours."""
        return Teardown()

    def _check(self) -> None:
        try:
            if self._engine.health:
                self._engine.get(self._engine.health)
            else:
                self._engine.models()
        except Unreachable as error:
            raise _gone(error) from None


def _gone(error: Unreachable) -> LaunchFailed:
    fix = "look at its own log; it is not ours to restart"
    message = "the attached server stopped answering"
    return LaunchFailed(Infeasible("unhealthy", message, str(error), fix, "under load", transient=True))
