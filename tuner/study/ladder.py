"""``load.ladder: auto``: which loads are worth measuring is asked of the engine's default, once, before the search.

A trace's arrival rate says nothing about one server: a fleet's traffic drowns it, a test's leaves it idle. So the
default is launched, the load is doubled or halved until its capacity lies between two neighbours, and the ladder is
laid around that. Where the default cannot say, the model is asked in its place. The ladder is then frozen in
``study.yaml``: every configuration, and every later session, is measured at the same loads. The server that has told it
goes on to the rungs that it was not asked about yet, and so has measured what the first trial of the search would: its
launch becomes that trial (:func:`as_trial`).
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tuner.engines.protocol import Cancelled, LaunchFailed, OnEvent
from tuner.spec import studyfile
from tuner.spec.study import Study
from tuner.study import session, verifying, workload
from tuner.study.evaluate import Bench
from tuner.study.guard import FILE as ANSWERS
from tuner.study.loop import Recorder
from tuner.study.outcome import Measured, Outcome, Step, to_dict
from tuner.study.store import Store, read_json, write_json
from tuner.verify.rounds import insist
from tuner.words import figure

if TYPE_CHECKING:
    from tuner.space.config import ServingConfig

SHAPE = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # rungs, as shares of the default's capacity
WIDE = (*SHAPE, 4.0, 5.6, 8.0)  # where the default's is not known
DRAWN = 400  # of which the cheapest is looked for
FORETOLD = 0.5  # of what the model alone says: a ladder around it goes from a quarter to four times of that
LOWEST, HIGHEST = 2.0**-8, 2.0**8  # loads beyond which nobody looks
FEW = 10  # requests in a step: of a trace of more than that at LOWEST, lower loads are looked at
NEAR = 0.05  # a rung as near as that to a load that was measured is that load


def settled(
    study: Study,
    store: Store,
    cancel: threading.Event,
    on_event: OnEvent,
    prepare: Callable[[Study], session.Prepared] = session.prepare,
) -> Study:
    """``study`` with its ladder; launches the default once where the study leaves the ladder to the tuner and no
    earlier session has settled it.

    Where the default is refused, does not start, misses its SLOs at every load or cannot be believed, the ladder is
    laid by what the analytic model says (:func:`otherwise`), and where that says nothing the study keeps the loads it
    has: for good, its trials are measured at them. An interrupt leaves the ladder to the next session. Raises what
    :func:`tuner.study.session.prepare` does.
    """
    if not study.load.auto:
        return study
    before = kept(study, store)
    if not before.load.auto:
        return before
    if not asks(study):
        return replace(study, load=replace(study.load, auto=False))
    ready = prepare(_unbound(study))
    top = _top(ready.traffic, study)
    try:
        capacity, found = _capacity(ready, store, cancel, on_event)
    except (LaunchFailed, Unsettled) as failure:
        found, why = otherwise(ready, top, failure.load if isinstance(failure, Missed) else 0.0)
        found = found or study.load.ladder
        laid = f"is {_words(found)}, {why}" if why else f"stays {_words(found)}"
        on_event("say", {"text": f"The ladder {laid}: {failure}"})
        return _freeze(replace(study, load=replace(study.load, ladder=found, auto=False)), store)
    except Cancelled:
        return study
    most = f" (the trace fills no more than {figure(top)})" if max(SHAPE) * capacity > top else ""
    text = f"The default holds its SLOs up to load {figure(capacity)}{most}; the ladder is {_words(found)}."
    on_event("say", {"text": text})
    store.log("ladder", capacity=capacity, ladder=found)
    return _freeze(replace(study, load=replace(study.load, ladder=found, auto=False)), store)


def asks(study: Study) -> bool:
    """Whether a launch of the default settles the ladder: of a function, and in a study that tuners share, it is the
    one that stands there."""
    return study.load.auto and not study.storage and study.engine.kind != "function"


def kept(study: Study, store: Store) -> Study:
    """``study`` with the ladder that an earlier session of its folder has settled; as it is where none has."""
    if not study.load.auto or not (store.study_file.exists() and store.begun()):
        return study
    before = studyfile.load(store.folder)
    return study if before.load.auto else replace(study, load=before.load, frozen=before.frozen)


class Unsettled(Exception):
    """No capacity was found; the message says why."""


class Missed(Unsettled):
    """The default misses its SLOs even at ``load``, the lowest that it was asked about."""

    def __init__(self, load: float, more: str = "") -> None:
        super().__init__(f"the engine's default misses its SLOs even at load {load:.3g}{more}")
        self.load = load


def rungs(
    capacity: float, top: float, measured: Collection[float] = (), shares: Collection[float] = SHAPE
) -> tuple[float, ...]:
    """The ladder around a capacity: ``shares`` of it, two digits each, none above ``top``; the capacity itself is one,
    to three digits where two are more than ``top``. What is as good as a load that was ``measured`` is that load."""
    found = {load for share in shares if (load := float(f"{share * capacity:.2g}")) <= top}
    if float(f"{capacity:.2g}") > top:
        found.add(_below(top))

    def known(load: float) -> float:
        return min((m for m in measured if abs(m / load - 1) <= NEAR), key=lambda m: abs(m / load - 1), default=load)

    return tuple(sorted(set(map(known, found))))


def promised(ready: session.Prepared) -> float:
    """The load that the cheapest configuration (of the fewest GPUs per load) holds by the analytic model; 0 where there
    is none, or it says that none holds any."""
    from tuner.search.model.predictor import AnalyticModel

    if not isinstance(model := ready.predictor, AnalyticModel):
        return 0.0
    paid = [(model.capacity(config), max(config.gpus, 1)) for config in _drawn(ready)]
    return max(paid, key=lambda one: (one[0] / one[1], one[0]), default=(0.0, 1))[0]


def otherwise(ready: session.Prepared, top: float, missed: float) -> tuple[tuple[float, ...], str]:
    """(The ladder of a study whose default cannot say, why those loads, in words): around what the analytic model says
    that the cheapest configuration holds. Where it says that none holds anything, or there is none, from ``missed`` on,
    the lowest load at which the default was seen to miss its SLOs; nothing where that is 0. Every rung has something to
    measure."""
    load, why = 2 * missed, "from the lowest load that was tried on"
    if holds := promised(ready):
        load, why = FORETOLD * holds, f"by what is predicted of the cheapest configuration (load {figure(holds)})"
    laid = rungs(min(load, top), top, (missed,), WIDE) if load else ()
    windows = (*ready.traffic.search, *ready.traffic.heldout)
    ladder = tuple(rung for rung in laid if all(workload.measured(ready.study, window, rung) for window in windows))
    return ladder, why if ladder else ""


def _drawn(ready: session.Prepared) -> list[ServingConfig]:
    """Configurations of the space that may be launched."""
    study, rng = ready.study, random.Random(0)
    space = study.space
    drawn = [space.snap({p.name: rng.choice(p.values) for p in space.parameters}) for _ in range(DRAWN)]
    configs = {c.hash: c for c in (space.config(params, study.model) for params in drawn if not space.denied(params))}
    return [config for config in configs.values() if not ready.why_not(config)]


def _fewest(ready: session.Prepared) -> float:
    """The load at which a step has :data:`FEW` requests."""
    return FEW / max(1, int((ready.traffic.search[0].arrival_s < ready.study.trace.window_s).sum()))


def _below(load: float) -> float:
    """``load`` in three digits, rounded down."""
    step = 10.0 ** (math.floor(math.log10(load)) - 2)
    return float(f"{math.floor(load / step) * step:.3g}")


def bracket(holds: Callable[[float], bool], top: float, lowest: float = LOWEST) -> float:
    """The highest load found at which the SLOs hold, to a factor of 1.4: doubled or halved from 1 (at most ``top``),
    then once between the neighbours. Raises Missed where even ``lowest`` does not hold."""
    load = min(1.0, top)
    if holds(load):
        while (higher := min(2 * load, top)) > load * 1.05:
            if not holds(higher):
                break
            load = higher
        else:
            return load
    else:
        higher, load = load, load / 2
        while load >= lowest and not holds(load):
            higher, load = load, load / 2
        if load < lowest:
            raise Missed(higher)
    between = float(f"{(load * higher) ** 0.5:.2g}")
    return between if load < between < higher and holds(between) else load


def _capacity(
    ready: session.Prepared, store: Store, cancel: threading.Event, on_event: OnEvent
) -> tuple[float, tuple[float, ...]]:
    """(The default's capacity, the ladder)."""
    from tuner.executor.build import executor

    def tell(name: str, data: Mapping[str, Any]) -> None:
        on_event(name, {**data, "trial": verifying.LADDER})  # it is no trial of the study

    params = ready.study.space.default()
    default = ready.study.space.config(params, ready.study.model)
    if why := ready.study.space.denied(params) or ready.why_not(default):
        raise Unsettled(f"the engine's default is refused before a launch: {why}")
    window = ready.traffic.search[0]
    for ended in Store(store.ladder_folder).trials():  # before a kill
        known = {step.load: step for step in ended.outcome.steps} if isinstance(ended.outcome, Measured) else {}
        with suppress(KeyError):
            return _laid(ready, known.__getitem__, known)
    on_event("say", {"text": "Looking for the loads worth measuring: the engine's default is launched once."})
    bench = Bench(ready.study, ready.engine, cancel, tell, session.guard(ready, store, tell))
    with executor(bench) as where:
        launch = verifying.launcher(
            ready, Store(store.ladder_folder), verifying.Nobody(), where, tell, verifying.LADDER
        )

        def look() -> tuple[float, tuple[float, ...]] | Unsettled:
            steps: dict[float, Step] = {}
            try:
                with launch(default, "which loads are worth measuring") as rig:

                    def measured(load: float) -> Step:
                        if load not in steps:
                            steps[load] = rig.measure(load, window, window.name)
                        return steps[load]

                    try:
                        found = _laid(ready, measured, steps)
                    except Unsettled as failure:
                        return failure  # not raised yet: what was measured is kept
                    with suppress(LaunchFailed):  # the ladder is settled: what a trial does at it, one will show
                        all(measured(load).ok for load in found[1])
                return found
            except LaunchFailed as crash:
                if crash.outcome.transient or not any(step.ok for step in steps.values()):
                    raise
                missed = Step(math.inf, window.name, {}, slo_misses=(str(crash),))
                return _laid(ready, lambda load: steps.get(load, missed), steps)  # it holds what it held

        found = insist(look)
    if isinstance(found, Unsettled):
        raise found
    return found


def foretold(ready: session.Prepared, prepare: Callable[[Study], session.Prepared]) -> session.Prepared | None:
    """``ready`` with the ladder that :func:`settled` would lay if the default did as the model says. None where it lays
    none, where there is no model, and where the model says that nothing meets the SLOs."""
    study, model = ready.study, ready.predictor
    if not asks(study) or model is None:
        return None
    default = study.space.config(study.space.default(), study.model)
    asked: list[float] = []

    def holds(load: float) -> bool:
        asked.append(load)
        metrics = model.predict(default, load).metrics
        return bool(metrics) and not any(slo.miss(metrics) for slo in study.objective.slos if slo.latency)

    traffic = workload.read(_unbound(study))
    top = _top(traffic, study)
    try:
        found = rungs(bracket(holds, top), top, asked)
    except Unsettled:
        found, _ = otherwise(replace(ready, traffic=traffic), top, missed=0.0)
    frozen = {**study.frozen, "frozen": {**study.frozen["frozen"], "ladder": "auto"}}  # as :func:`_freeze` says it
    return prepare(replace(study, load=replace(study.load, ladder=found), frozen=frozen)) if found else None


def _unbound(study: Study) -> Study:
    """``study`` before anybody knows which loads are worth measuring."""
    return replace(study, load=replace(study.load, ladder=(LOWEST, HIGHEST)))


def _laid(
    ready: session.Prepared, measured: Callable[[float], Step], seen: Mapping[float, Step]
) -> tuple[float, tuple[float, ...]]:
    """(The capacity, the ladder) by what is ``measured`` at a load, which is ``seen`` then. A load that cannot be
    believed is none that it holds, where it held another. Raises Unsettled."""

    def holds(load: float) -> bool:
        held = any(step.ok for step in seen.values())
        if seen and not held and not workload.measured(ready.study, ready.traffic.search[0], load):
            raise Missed(min(seen), f"; a step at {load:.3g} has no request to measure")
        step = measured(load)
        if step.untrusted and not held:
            raise Unsettled("; ".join(step.untrusted))
        return step.ok

    top = _top(ready.traffic, ready.study)
    capacity = bracket(holds, top, min(LOWEST, _fewest(ready)))
    return capacity, rungs(capacity, top, seen)


def _top(traffic: workload.Workload, study: Study) -> float:
    """The highest load that the trace can fill."""
    return min(HIGHEST, _below(max(LOWEST, float(traffic.search[0].arrival_s[-1]) / study.trace.window_s)))


def as_trial(ready: session.Prepared, store: Store, recorder: Recorder, on_event: OnEvent) -> None:
    """Makes the launch that settled the ladder the study's first trial, where it measured all that this would: every
    rung up to the first miss, each of them believed. Nothing where it did not, where what it measured between the rungs
    says otherwise, where the ladder is not settled, or where there are trials already.

    What it measured between the rungs stays in its records and is no part of the trial."""
    if ready.study.load.auto:
        return
    default = ready.study.space.default()
    config = ready.study.space.config(default, ready.study.model)
    for launch in Store(store.ladder_folder).trials() if not store.numbers() else ():
        steps = _rungs_of(launch.outcome, ready.study.load.ladder) if launch.config.hash == config.hash else ()
        if steps:
            said = {"number": 0, "role": "search", "params": default, "why": "the engine's default", "repeat": 0}
            outcome = Measured(steps, launch.outcome.boot)
            start, end = (launch.folder / name for name in ("config.json", "outcome.json"))
            noted = {key: value for key, value in read_json(start).items() if key != "label"}
            write_json(start, noted | said | ready.predicted(config))
            loads = {"loads": len(launch.outcome.steps)}  # a kill may have come after this was written
            write_json(end, loads | read_json(end) | {"outcome": to_dict(outcome)})
            answers = store.ladder_folder / ANSWERS  # where an executor on other machines brings them home
            if answers.exists() and not (store.folder / ANSWERS).exists():
                answers.rename(store.folder / ANSWERS)
            (store.folder / "trials").mkdir(exist_ok=True)
            launch.folder.rename(store.folder / "trials" / "0000")
            with suppress(OSError):  # another launch lies there, which settled nothing
                launch.folder.parent.rmdir()
                store.ladder_folder.rmdir()
            recorder.trial_finished(0)
            on_event("trial", {"trial": 0, "outcome": outcome, "baseline": True, "role": "search"})
            return


def _rungs_of(outcome: Outcome, ladder: tuple[float, ...]) -> tuple[Step, ...]:
    """The steps of a trial at ``ladder``; empty where one is missing or not believed, where none holds, and where a
    load that was missed lies below one that held: one of them was luck."""
    measured = {step.load: step for step in outcome.steps} if isinstance(outcome, Measured) else {}
    steps: list[Step] = []
    for load in ladder:
        if (step := measured.get(load)) is None or step.untrusted:
            return ()
        steps.append(step)
        if not step.ok:
            break
    held = [step.load for step in measured.values() if step.ok]
    missed = [step.load for step in measured.values() if not step.ok]
    clear = any(step.ok for step in steps) and max(held) < min(missed, default=math.inf)
    return tuple(steps) if clear else ()


def _freeze(study: Study, store: Store) -> Study:
    """Writes the ladder into ``study.yaml``, which says that it was left to the tuner."""
    document = {
        **study.frozen,
        "load": {**(study.frozen.get("load") or {}), "ladder": list(study.load.ladder)},
        "frozen": {**study.frozen["frozen"], "ladder": "auto"},
    }
    session.write_study(document, store)
    return replace(study, frozen=document)


def _words(loads: tuple[float, ...]) -> str:
    return ", ".join(f"{load:g}" for load in loads)
