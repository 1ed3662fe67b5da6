"""The quality floor during the search: whoever alters the answers is asked for them, on the launch that measures it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.engines.protocol import Endpoint, OnEvent, Server
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible
from tuner.study.store import CHECKED, AsWritten, Store, read_json, write_json
from tuner.verify import quality

FILE = "quality.json"


class QualityGuard:
    """A check for :class:`tuner.study.evaluate.Bench`. The baseline's answers are kept in the study folder; a
    configuration with a parameter that alters answers off its default is compared with them, and the verdict is kept
    in its trial.

    Where the baseline could not be asked (it failed, or the server gives no log-probabilities) nothing is refused: the
    verdict is ``unknown``, which the event and the trial say.
    """

    def __init__(self, study: Study, store: Store, prompts: Sequence[str], on_event: OnEvent) -> None:
        self.study, self.store, self.prompts, self.on_event = study, store, prompts, on_event

    def awaited(self) -> bool:
        """Whether the space has values to be compared with the default's answers, which nobody has yet."""
        needed = self.study.engine.kind != "function" and any(p.alters_answers for p in self.study.space.parameters)
        return needed and self._limited() and not (self.store.folder / FILE).exists()

    def __call__(self, server: Server, config: ServingConfig, folder: Path) -> Infeasible | None:
        """Why ``server``, launched as the trial in ``folder``, falls below the floor; None where it does not."""
        if not self._limited():
            return None
        if server.endpoint is None:
            if self._alters(config):
                self._note(config, folder, "unknown", "there is no server to ask")
            return None
        if config.hash == self._baseline():
            self._ask_baseline(server.endpoint, config)
            return None
        if not self._alters(config):
            return None
        base = self._profile()
        verdict, reason = "unknown", "there are no answers of the default"
        if base is not None:
            weights = bool(self.study.space.facts.get("dummy_weights"))
            result = quality.check(server.endpoint, base, self.study.objective.quality, random_weights=weights)
            verdict, reason = result.verdict, result.reason
        self._note(config, folder, verdict, reason)
        if verdict != "failed":
            return None
        fix = "take the value out of the search space, or lower the objective's quality floor"
        return Infeasible("quality", reason, evidence=reason, fix=fix, stage="quality")

    def _note(self, config: ServingConfig, folder: Path, verdict: str, reason: str) -> None:
        write_json(folder / CHECKED, {"verdict": verdict, "reason": reason})
        self.store.log("quality", config=config.hash, verdict=verdict, reason=reason)
        if verdict == "unknown":
            self.on_event("say", {"text": f"The quality floor was not checked: {reason}."})

    def _limited(self) -> bool:
        floor = self.study.objective.quality
        return any(limit is not None for limit in (floor.kl_max, floor.top1_min, floor.greedy_min))

    def _baseline(self) -> str:
        return self.study.space.config(self.study.space.default(), self.study.model).hash

    def _alters(self, config: ServingConfig) -> bool:
        return any(
            p.alters_answers and config.params.get(p.name, p.default) != p.default for p in self.study.space.parameters
        )

    def _ask_baseline(self, endpoint: Endpoint, config: ServingConfig) -> None:
        path = self.store.folder / FILE
        if path.exists():
            return
        self.on_event("phase", {"name": "asking for the default's answers"})
        try:
            profile = quality.profile(endpoint, config.hash, self.prompts, seed=self.study.seed)
        except quality.Unanswered as error:
            self.on_event("say", {"text": f"The quality floor cannot be checked: {error}"})
            return
        write_json(path, profile.to_dict())

    def _profile(self) -> quality.Profile | None:
        path = self.store.folder / FILE
        if not path.exists():
            return None
        with AsWritten(path):
            return quality.Profile.from_dict(read_json(path))
