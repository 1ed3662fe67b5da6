"""Ask and tell: the search without the CLI, for whoever launches and measures himself.

    from tuner.api import AskTell

    with AskTell("study.yaml") as search:
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {load: measure(proposal.config, load) for load in (1.0, 2.0)})
        print(search.ended, search.choice().text)

The study's folder is kept as by ``tuner tune``: ``tuner front``, ``tuner report`` and a later session read it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from tuner.engines.build import engine
from tuner.engines.function import checked
from tuner.errors import Infeasible as Refused
from tuner.errors import UsageError
from tuner.executor.cluster import place_of, price_of
from tuner.executor.local import at_price
from tuner.pareto.choice import Choice, choose
from tuner.pareto.front import Point, front, points, searched
from tuner.space.config import ServingConfig
from tuner.spec import studyfile
from tuner.spec.study import Study
from tuner.spec.text import Document
from tuner.study import budget, session, workload
from tuner.study.outcome import Infeasible, Measured, Outcome, Step
from tuner.study.peers import joined
from tuner.study.price import priced
from tuner.study.queue import Proposal, Queue
from tuner.study.together import AWAY


class AskTell:
    """One session of a study, whose trials the caller evaluates. Use it in a ``with``: the folder is locked meanwhile.

    ``study`` is a study file, the same as a mapping (relative paths are then relative to the current folder), or a
    :class:`Study`. Raises UsageError for what a study file may not say. Nothing is verified here: the search has the
    whole budget, unless the study says a ``verify_share``, which then is kept for a later ``tuner tune``.

    ``ended`` says why :meth:`ask` had nothing more to propose, in words; empty while it has.
    """

    def __init__(self, study: Study | str | Path | Mapping[str, Any]) -> None:
        if isinstance(study, Mapping):
            study = studyfile.resolve(Document("study", dict(study)), Path())
        self.study = study if isinstance(study, Study) else studyfile.load(Path(study))
        self.ended = ""
        self._stack = ExitStack()

    def __enter__(self) -> AskTell:
        study = self.study = session.as_begun(self.study)
        traffic = workload.read(study)
        predictor, no_model = session.model_of(study, traffic)
        ready = session.Prepared(study, engine(study), traffic, predictor, no_model)
        self._guess_usd = session.launch_usd(ready)
        self.store = self._stack.enter_context(session.opened(study))
        peers = self._stack.enter_context(joined(study, self.store, lambda _name, _data: None))
        book = session.book(ready, self.store, self._out_of_reach, peers, _warn)
        refuse = lambda config: self._out_of_reach(config) or ready.unfit(config)  # noqa: E731
        self._queue = Queue(study, self.store, book, refuse, ready.predicted, peers)
        self._queue.over = self._over
        said = study.frozen.get("budget")
        kept = study.budget.verify_share if isinstance(said, Mapping) and "verify_share" in said else 0.0
        self._within = replace(study, budget=replace(study.budget, verify_share=kept))
        # asked and not told yet: number to the config's hash, and when (monotonic)
        self._open: dict[int, tuple[str, float]] = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self) -> Proposal | None:
        """The next configuration to measure; None once the search has ended: :attr:`ended` says why."""
        proposal = None if self._over(len(self._open)) else self._queue.propose()
        if proposal is not None:
            self._open[proposal.number] = (proposal.config.hash, time.monotonic())
        elif not self.ended:
            self.ended = AWAY if self._queue.stood_back else self._queue.nothing_new
        return proposal

    def tell(self, proposal: Proposal, outcome: Outcome | Refused | Mapping[float, Mapping[str, float]]) -> None:
        """What came of it, once: an outcome, ``tuner.Infeasible(reason)``, or metrics by load.

        Metrics have the names of :class:`tuner.study.outcome.Step`, latencies in seconds. A cost is added from the
        goodput where none is given, and the goodput from the output; UsageError where there is none of the three,
        where the objective's latency is absent, for what is no number, and for a proposal that was told already or
        asked by another session. An SLO whose metric is absent counts as missed, and loads above the first that missed
        one as not measured, as in a ladder.
        """
        if self._open.get(proposal.number, ("",))[0] != proposal.config.hash:
            what = f"proposal {proposal.number} was told already, or was not asked in this session"
            raise UsageError(what, fix="tell each proposal of ask() once")
        if isinstance(outcome, Refused):
            outcome = Infeasible("infeasible", outcome.reason)
        elif isinstance(outcome, Mapping):
            steps = [self._step(proposal, load, metrics) for load, metrics in outcome.items()]
            if not steps:
                raise UsageError("no load was told", fix="tell {1.0: metrics, 2.0: metrics}")
            steps.sort(key=lambda step: step.load)
            last = next((k for k, step in enumerate(steps) if step.slo_misses), len(steps))
            outcome = Measured(tuple(steps[: last + 1]))
        elif not isinstance(outcome, get_args(Outcome)):
            raise UsageError(
                f"{type(outcome).__name__} is no outcome", fix="tell {load: metrics}, or tuner.Infeasible(reason)"
            )
        _, asked_s = self._open.pop(proposal.number)
        place = place_of(self.study, proposal.config)
        self.store.end_trial(proposal.number, outcome, time.monotonic() - asked_s, **place.notes())
        self._queue.tell(proposal, outcome, again=False)

    def front(self) -> list[Point]:
        """The non-dominated points of cost against latency so far."""
        return front(points(searched(self.store.trials()), self.study.objective))

    def choice(self) -> Choice:
        """What to deploy by what was told so far, in words and figures."""
        return choose(self.store.trials(), self.study.objective)

    def _out_of_reach(self, config: ServingConfig) -> str:
        """Why whoever launches cannot: the GPUs of this machine say nothing of it, those that the study names do (a
        cluster may get a larger node)."""
        said = (self.study.frozen.get("hardware") or {}).get("gpus", "auto")
        has, bound = self.study.hardware.gpus, said != "auto" and self.study.executor.kind == "local"
        return f"it wants {config.gpus} GPUs, the study has {has}" if bound and config.gpus > has else ""

    def _over(self, running: int) -> str:
        paid = self.store.launched("search", "verify")
        both = (budget.of_search(paid), paid)
        used, whole = (budget.spent(self.study, trials, running, self._guess_usd) for trials in both)
        self.ended = session.why_over(self._within, self._queue.book, used, whole)
        return self.ended

    def _step(self, proposal: Proposal, load: float, metrics: Mapping[str, float]) -> Step:
        try:
            load = float(load)
        except (TypeError, ValueError):
            load = math.nan
        if not 0 < load < math.inf:
            raise UsageError("a load is a number above zero", fix="tell {1.0: metrics, 2.0: metrics}")
        known = checked(metrics, "the evaluation", (self.study.objective.latency_key,))
        misses = tuple(miss for slo in self.study.objective.slos if (miss := slo.miss(known)))
        objective = at_price(self.study, price_of(self.study, proposal.config)).objective
        return priced(Step(load, "told", known, slo_misses=misses), proposal.config, objective)


def _warn(name: str, data: Mapping[str, Any]) -> None:
    """What ``tuner tune`` says as it begins (an earlier study is of no use here, say) is a warning."""
    if name == "say":
        warnings.warn(str(data["text"]), stacklevel=2)
