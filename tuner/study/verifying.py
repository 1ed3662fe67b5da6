"""The end of a study: finalists and default are launched again, as trials with the role ``verify``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tuner.engines.protocol import Cancelled, LaunchFailed, Server, Site
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.study import budget
from tuner.study.evaluate import Bench, measure
from tuner.study.loop import Recorder
from tuner.study.outcome import Aborted, Measured, Step
from tuner.study.session import Prepared
from tuner.study.store import Store, write_json
from tuner.verify.finalists import launch_spread, shortlist
from tuner.verify.verdict import Verification
from tuner.verify.verification import Done, VerifyBudget, verify

FILE = "verify.json"


@dataclass(slots=True)
class _Rig:
    """One running server of the verification; keeps its steps."""

    bench: Bench
    server: Server
    config: ServingConfig
    store: Store
    number: int
    steps: list[Step]

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        folder = self.store.trial_folder(self.number)
        self.bench.on_event("step", {"index": len(self.steps) + 1, "of": 0, "load": load})
        step = measure(self.bench, self.server, self.config, folder, trace, load, f"{len(self.steps):02d}-")
        self.steps.append(step)
        return step


def run(ready: Prepared, store: Store, recorder: Recorder, bench: Bench) -> Verification | None:
    """Verifies within the budget's share; writes ``verify.json``. None where nothing met the SLOs or no budget is left.

    Raises Cancelled on an interrupt: every launch that ended is a trial of the study, and is not repeated.
    """
    study = ready.study
    records = store.trials()
    default = study.space.config(study.space.default(), study.model)
    listed = shortlist(records, study.objective, default, study.load.ladder)
    limits = _limits(ready, store)
    if not listed.finalists or limits is None:
        return None
    bench.on_event("say", {"text": f"Verifying on traffic the search never saw: {listed.text}"})
    done = [Done(str(r.extra["label"]), r.outcome) for r in records if r.role == "verify" and r.extra]

    @contextmanager
    def launch(config: ServingConfig, label: str) -> Iterator[_Rig]:
        number = max((t.number for t in store.trials()), default=-1) + 1
        baseline = config.hash == default.hash
        notes = {**ready.notes(config), "baseline": baseline, "role": "verify", "label": label}
        folder = store.start_trial(number, config, config.params, **notes)
        inner = bench.of_trial(number)
        inner.on_event("launch", {"config": config, "baseline": baseline, "why": label})
        gpus = tuple(range(config.gpus))
        steps: list[Step] = []
        try:
            server = ready.engine.launch(config, Site(folder, gpus, bench.cancel, inner.on_event))
        except LaunchFailed as failure:
            _end(store, recorder, inner, number, failure.outcome)
            raise
        try:
            yield _Rig(inner, server, config, store, number, steps)
            outcome = Measured(tuple(steps), server.boot)
        except LaunchFailed as failure:
            outcome = failure.outcome
            raise
        except Cancelled:
            outcome = Aborted("interrupted", tuple(steps), server.boot)
            raise
        finally:
            server.stop()
            _end(store, recorder, inner, number, outcome)

    result = verify(
        study,
        launch,
        listed.finalists,
        listed.baseline,
        ready.traffic.heldout,
        limits,
        bench.on_event,
        done=done,
        known=launch_spread(records),
    )
    write_json(store.folder / FILE, result.to_dict())
    return result


def _end(store: Store, recorder: Recorder, bench: Bench, number: int, outcome: object) -> None:
    store.end_trial(number, outcome, again=isinstance(outcome, Aborted))  # type: ignore[arg-type]
    recorder.trial_finished(number)
    bench.on_event("trial", {"trial": number, "outcome": outcome, "baseline": False})


def _limits(ready: Prepared, store: Store) -> VerifyBudget | None:
    """What of the budget is left for verification; None where its share is 0 or nothing is left."""
    study = ready.study
    if study.budget.verify_share <= 0:
        return None
    used = budget.spent(study, store.trials())
    launches, seconds = 10_000, []
    if study.budget.launches is not None:
        before = sum(t.role == "verify" for t in store.trials())
        launches = study.budget.launches - used.launches + before
    if study.budget.hours is not None:
        seconds.append((study.budget.hours - used.hours) * 3600)
    if study.budget.usd is not None:
        seconds.append((study.budget.usd - used.usd) / study.objective.price_usd_per_gpu_hour * 3600)
    if launches < 2 or (seconds and min(seconds) <= 0):
        return None
    return VerifyBudget(launches=launches, seconds=min(seconds) if seconds else None)
