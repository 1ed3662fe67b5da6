"""``load.ladder: auto``: which loads are worth measuring is asked of the engine's default, once, before the search.

A trace's arrival rate says nothing about one server: a fleet's traffic drowns it, a test's leaves it idle. So the
default is launched, the load is doubled or halved until its capacity lies between two neighbours, and the ladder is
laid around that. It is then frozen in ``study.yaml``: every configuration, and every later session, is measured at the
same loads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tuner.engines.protocol import Cancelled, LaunchFailed, OnEvent
from tuner.spec import studyfile
from tuner.spec.study import Study
from tuner.study import session, verifying
from tuner.study.evaluate import Bench
from tuner.study.store import Store
from tuner.verify.rounds import insist
from tuner.words import figure

SHAPE = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # rungs, as shares of the default's capacity
LOWEST, HIGHEST = 2.0**-8, 2.0**8  # loads beyond which nobody looks


def settled(
    study: Study,
    store: Store,
    cancel: threading.Event,
    on_event: OnEvent,
    prepare: Callable[[Study], session.Prepared] = session.prepare,
) -> Study:
    """``study`` with its ladder; launches the default once where the study leaves the ladder to the tuner and no
    earlier session has settled it.

    Where the default is refused or does not start, or its measurements cannot be believed, the study keeps the loads it
    has, and for good: its trials are measured at them. An interrupt leaves the ladder to the next session. Raises what
    :func:`tuner.study.session.prepare` does.
    """
    if not study.load.auto:
        return study
    kept = studyfile.load(store.folder)
    if not kept.load.auto:
        return replace(study, load=kept.load, frozen=kept.frozen)
    if study.storage or study.engine.kind == "function":
        return replace(study, load=replace(study.load, auto=False))
    try:
        capacity, top = _capacity(study, store, cancel, on_event, prepare)
    except (LaunchFailed, Unsettled) as failure:
        on_event("say", {"text": f"The ladder stays {_words(study.load.ladder)}: {failure}"})
        return _freeze(replace(study, load=replace(study.load, auto=False)), store)
    except Cancelled:
        return study
    found = rungs(capacity, top)
    most = f" (the trace fills no more than {figure(top)})" if max(SHAPE) * capacity > top else ""
    text = f"The default holds its SLOs up to load {figure(capacity)}{most}; the ladder is {_words(found)}."
    on_event("say", {"text": text})
    store.log("ladder", capacity=capacity, ladder=found)
    return _freeze(replace(study, load=replace(study.load, ladder=found, auto=False)), store)


class Unsettled(Exception):
    """No capacity was found; the message says why."""


def rungs(capacity: float, top: float) -> tuple[float, ...]:
    """The ladder around a capacity: :data:`SHAPE`, two digits each, none above ``top``; the capacity itself is one, to
    three digits where two are more than ``top``."""
    found = {load for share in SHAPE if (load := float(f"{share * capacity:.2g}")) <= top}
    if float(f"{capacity:.2g}") > top:
        step = 10.0 ** (math.floor(math.log10(top)) - 2)
        found.add(float(f"{math.floor(top / step) * step:.3g}"))
    return tuple(sorted(found))


def bracket(holds: Callable[[float], bool], top: float, lowest: float = LOWEST) -> float:
    """The highest load found at which the SLOs hold, to a factor of 1.4: doubled or halved from 1 (at most ``top``),
    then once between the neighbours. Raises Unsettled where even ``lowest`` does not hold."""
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
            raise Unsettled(f"the engine's default misses its SLOs even at load {higher:g}")
    between = float(f"{(load * higher) ** 0.5:.2g}")
    return between if load < between < higher and holds(between) else load


def _capacity(
    study: Study,
    store: Store,
    cancel: threading.Event,
    on_event: OnEvent,
    prepare: Callable[[Study], session.Prepared],
) -> tuple[float, float]:
    """(The default's capacity, the highest load that the trace can fill)."""
    from tuner.executor.build import executor

    def tell(name: str, data: Mapping[str, Any]) -> None:
        on_event(name, {**data, "trial": verifying.LADDER})  # it is no trial of the study

    ready = prepare(replace(study, load=replace(study.load, ladder=(LOWEST, HIGHEST))))
    params = study.space.default()
    default = study.space.config(params, study.model)
    if why := study.space.denied(params) or ready.why_not(default):
        raise Unsettled(f"the engine's default is refused before a launch: {why}")
    on_event("say", {"text": "Looking for the loads worth measuring: the engine's default is launched once."})
    window = ready.traffic.search[0]
    top = min(HIGHEST, max(LOWEST, float(window.arrival_s[-1]) / study.trace.window_s))
    own, bench = Store(store.ladder_folder), Bench(ready.study, ready.engine, cancel, tell)
    with executor(bench) as where:
        launch = verifying.launcher(ready, own, verifying.Nobody(), where, tell, verifying.LADDER)

        def look() -> float | Unsettled:
            with launch(default, "which loads are worth measuring") as rig:

                def holds(load: float) -> bool:
                    step = rig.measure(load, window, window.name)
                    if step.untrusted:
                        raise Unsettled("; ".join(step.untrusted))
                    return step.ok

                try:
                    return bracket(holds, top)
                except Unsettled as failure:
                    return failure  # not raised yet: what was measured is kept

        found = insist(look)
    if isinstance(found, Unsettled):
        raise found
    return found, top


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
