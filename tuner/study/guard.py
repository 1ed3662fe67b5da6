"""The quality floor during the search: whoever alters the answers is asked for them, on the launch that measures it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tuner.engines.protocol import OnEvent, Server
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study.outcome import Infeasible
from tuner.study.store import Store, read_json, write_json
from tuner.verify import quality

FILE = "quality.json"


class QualityGuard:
    """A check for :class:`tuner.study.evaluate.Bench`. The baseline's answers are kept in the study folder; a
    configuration with a parameter that alters answers off its default is compared with them.

    Where the baseline could not be asked (it failed, or the server gives no log-probabilities) nothing is refused, and
    the event says so.
    """

    def __init__(self, study: Study, store: Store, prompts: Sequence[str], on_event: OnEvent) -> None:
        self.study, self.store, self.prompts, self.on_event = study, store, prompts, on_event
        self._lock = threading.Lock()

    def __call__(self, server: Server, config: ServingConfig) -> Infeasible | None:
        floor = self.study.objective.quality
        limits = (floor.kl_max, floor.top1_min, floor.greedy_min)
        if server.endpoint is None or all(limit is None for limit in limits):
            return None
        if not config.params or config.hash == self._baseline():
            self._ask_baseline(server, config)
            return None
        if not self._alters(config):
            return None
        base = self._profile()
        if base is None:
            self.on_event("say", {"text": "The quality floor was not checked: there are no answers of the default."})
            return None
        weights = bool(self.study.space.facts.get("dummy_weights"))
        result = quality.check(server.endpoint, base, floor, random_weights=weights)
        self.store.log("quality", config=config.hash, verdict=result.verdict, reason=result.reason)
        if result.verdict != "failed":
            return None
        fix = "take the value out of the search space, or lower the objective's quality floor"
        return Infeasible("quality", result.reason, evidence=result.reason, fix=fix, stage="quality")

    def _baseline(self) -> str:
        return self.study.space.config(self.study.space.default(), self.study.model).hash

    def _alters(self, config: ServingConfig) -> bool:
        return any(
            p.alters_answers and config.params.get(p.name, p.default) != p.default for p in self.study.space.parameters
        )

    def _ask_baseline(self, server: Server, config: ServingConfig) -> None:
        path = self.store.folder / FILE
        if path.exists() or server.endpoint is None:
            return
        self.on_event("phase", {"name": "asking for the default's answers"})
        try:
            profile = quality.profile(server.endpoint, config.hash, self.prompts, seed=self.study.seed)
        except quality.Unanswered as error:
            self.on_event("say", {"text": f"The quality floor cannot be checked: {error}"})
            return
        with self._lock:
            write_json(path, profile.to_dict())

    def _profile(self) -> quality.Profile | None:
        path = self.store.folder / FILE
        return quality.Profile.from_dict(read_json(path)) if path.exists() else None
