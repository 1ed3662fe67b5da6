"""After the search: finalists and default are launched again, flags are set back, promises are checked.

Every launch is a trial with its own role, so that a resumed study repeats none of them.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tuner.engines.protocol import Cancelled, LaunchFailed, OnEvent
from tuner.errors import UsageError
from tuner.executor.build import executor
from tuner.executor.cluster import device, place_of
from tuner.executor.local import LocalExecutor
from tuner.executor.protocol import Executor, Job, NodeLost, Rig
from tuner.load.trace import Trace
from tuner.pareto.recommend import ablation
from tuner.record.secrets import is_secret
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study import budget
from tuner.study.evaluate import Bench, of_trial, unchecked
from tuner.study.loop import Recorder, nothing_left, unservable
from tuner.study.outcome import ENVIRONMENT_CAUSES, GPU_BUSY, Aborted, Boot, Infeasible, Measured, Outcome, Step
from tuner.study.price import per_hour
from tuner.study.session import Prepared, gpu_here
from tuner.study.store import AsWritten, Store, TrialRecord, read_json, write_json
from tuner.verify.ablation import Ablation, AblationBudget, ablate
from tuner.verify.arm import Finalist
from tuner.verify.certify import Certificate, recertify
from tuner.verify.fill import unfilled
from tuner.verify.finalists import launch_spread, shortlist
from tuner.verify.promise import Promise
from tuner.verify.verdict import Verification
from tuner.verify.verification import Done, Launcher, VerifyBudget, verify

VERIFIED = "verify.json"
ABLATED = "ablation.json"
LADDER = "ladder"  # the role of the launch that settles the ladder: no trial of the study


@dataclass(slots=True)
class _Rig:
    """One running server; keeps its steps. ``as_trial``: each load is measured once, with the search's own prompts."""

    on_event: OnEvent
    server: Rig
    steps: list[Step]
    as_trial: bool = False

    def measure(self, load: float, trace: Trace, window: str) -> Step:
        self.on_event("step", {"index": len(self.steps) + 1, "of": 0, "load": load})
        step = self.server.measure(load, trace, "" if self.as_trial else f"{len(self.steps):02d}-")
        self.steps.append(step)
        self.on_event("measured", {"load": load, "misses": step.slo_misses, "untrusted": step.untrusted})
        return step


def launcher(
    ready: Prepared, store: Store, recorder: Recorder, where: Executor, on_event: OnEvent, role: str
) -> Launcher:
    """Launches a config as a trial of ``store`` with this ``role``; the label is kept with it. Raises
    ``EnvironmentFault`` where the machine is at fault that it does not serve, and at the end of the ``with`` where the
    server left something behind."""
    default = ready.study.space.config(ready.study.space.default(), ready.study.model)

    @contextmanager
    def launch(config: ServingConfig, label: str) -> Iterator[_Rig]:
        before = store.trials()
        number = max((t.number for t in before), default=-1) + 1
        known = [t.extra or {} for t in before if t.config.hash == config.hash]
        checked = any(extra.get("quality", {}).get("verdict") == "passed" for extra in known)
        notes = {**ready.notes(config), "baseline": config.hash == default.hash, "role": role, "label": label}
        store.shelve(number)  # what a kill left there is of another launch
        folder = store.start_trial(number, config, config.params, **notes)
        inner = of_trial(on_event, number)
        steps: list[Step] = []
        outcome: Outcome = Aborted("interrupted")
        boot, place, machines = Boot(), place_of(ready.study, config), False
        try:
            with where.rig(Job(number, config, folder, None, bool(notes["baseline"]), label, checked)) as server:
                boot, place = server.boot, server.place
                yield _Rig(inner, server, steps, role == LADDER)
            outcome = Measured(tuple(steps), boot)
        except LaunchFailed as failure:
            outcome = failure.outcome
            if outcome.cause == GPU_BUSY:  # whoever launches it tries again, and then says so
                machines = True
                raise
            # what ablation puts together has not served before: it may be at fault itself
            if machines := outcome.cause in ENVIRONMENT_CAUSES and (role != "ablate" or bool(notes["baseline"])):
                raise unservable(outcome, folder) from failure
            raise
        except NodeLost as lost:
            inner("lost", {"node": place.node, "why": str(lost)})
            outcome = Aborted(str(lost), tuple(steps), boot)
            raise
        except Cancelled:
            outcome = Aborted("interrupted", tuple(steps), boot)
            raise
        except Exception as error:  # not the server's: the client's, the executor's
            outcome = Aborted(getattr(error, "message", repr(error)), tuple(steps), boot)
            raise
        finally:
            again = machines or isinstance(outcome, Aborted) or (isinstance(outcome, Infeasible) and outcome.machines)
            store.end_trial(number, outcome, where.seconds(number), again=again, **place.notes())
            recorder.trial_finished(number)
            inner("trial", {"trial": number, "outcome": outcome, "baseline": notes["baseline"], "role": role})
            nothing_left(number, where.left_over)

    return launch


def run(ready: Prepared, store: Store, recorder: Recorder, bench: Bench) -> Verification | None:
    """Verifies within the budget's share; writes ``verify.json``. None where nothing met the SLOs or no budget is left.

    Raises Cancelled on an interrupt: every launch that ended is a trial of the study, and is not repeated.
    """
    study = ready.study
    records = store.trials()
    default = study.space.config(study.space.default(), study.model)
    listed = shortlist(records, study.objective, default, study.load.ladder)
    if not (listed.finalists or listed.baseline.value):
        return None
    before = verification(store)
    too_little = f"Not verified{' further' if before else ''}: {_TOO_LITTLE}"
    finalists = _to_settle(study, store, before) if before else ()
    finalists = [f for f in listed.finalists if f.label in finalists] or listed.finalists
    found = limits(ready, store, (listed.baseline, *finalists))
    if found is None:
        if study.budget.verify_share > 0 and ready.traffic.heldout:
            bench.on_event("say", {"text": too_little})
        return None
    within, windows = found
    bench.on_event("say", {"text": f"Verifying on traffic the search never saw: {listed.text}"})

    with executor(bench) as where:
        result = verify(
            study,
            launcher(ready, store, recorder, where, bench.on_event, "verify"),
            finalists,
            listed.baseline,
            windows,
            within,
            bench.on_event,
            done=_done(records, "verify"),
            known=launch_spread(records),
            clock=partial(_clock, ready, store, "verify"),
        )
    if not result.launches:
        bench.on_event("say", {"text": too_little})
        return None
    if result.more:
        result = replace(result, text=f"{result.text}\n\n{_go_on(study, store, result.more)}")
    write_json(store.folder / VERIFIED, result.to_dict())
    return result


def _clock(ready: Prepared, store: Store, role: str) -> float:
    """Seconds from no particular moment on; an emulated launch of ``role`` takes what it took on its own clock."""
    emulated = ready.engine.emulated
    return budget.spent(ready.study, store.launched(role)).hours * 3600 if emulated else time.monotonic()


def _to_settle(study: Study, store: Store, before: Verification) -> Sequence[str]:
    """The labels of what was verified, where the launches that are left are those that its verdict lacks; of none
    where more are left, or where something was searched since."""
    paid, allowed = store.launched("search", "verify"), study.budget.launches
    last = [t.role for t in paid if t.role != LADDER][-1]
    if allowed is None or last != "verify" or allowed - budget.spent(study, paid).launches > before.more:
        return ()
    return [arm.label for arm in before.arms]


def _go_on(study: Study, store: Store, more: int) -> str:
    """The command that gives verification ``more`` launches and the search none."""
    searched = store.launched("search")
    of = len(store.launched("search", "verify")) + more
    share = math.ceil((1 - len(searched) / of) * 100) / 100
    one = budget.spent(study, [t for t in store.trials() if t.role == "verify"])
    takes = f"about {one.launch_s * more / 60:.0f} min and ${one.launch_usd * more:.2f}"
    command = f"tuner tune {shlex.quote(str(store.folder))} --budget '{of} launches' --verify-share {share:g}"
    return f"To settle it, {more} launches more ({takes}): {command}"


def minimal(ready: Prepared, store: Store, recorder: Recorder, bench: Bench, launches: int) -> Ablation:
    """Sets back each flag of the recommended configuration in turn, within ``launches``; writes ``ablation.json``.

    Raises UsageError where the study has no verified recommendation to take apart, where not one flag could be set
    back, and where more launches have measured it already: the file would say less than it does.
    """
    allowed = AblationBudget(launches)
    if allowed.tests < 1:
        raise UsageError(f"{launches} launches cannot test a single parameter", fix=_LAUNCHES.format(allowed.least))
    verified = verification(store)
    if verified is None:
        raise UsageError("there is no verified recommendation to take apart", where=str(store.folder), fix=_VERIFY)
    if verified.config is None:
        raise UsageError("verification recommends nothing that could be taken apart", where=str(store.folder))
    before = ablation(store, ready.study, verified.config)
    if before and before["winner"] == verified.config.hash and launches < before["budget"]:
        words, path = f"holds what up to {before['budget']} launches said", str(store.folder / ABLATED)
        raise UsageError(words, where=path, fix=_LAUNCHES.format(before["budget"]))
    if verified.reason == "faster":
        words = "it is recommended for its latency, of which ablation sees large effects only"
        raise UsageError(words, where=str(store.folder), fix="Keep its flags as they are")
    winner = Finalist(verified.choice, verified.config, verified.load, trial=verified.trial)
    with executor(bench) as where:
        result = ablate(
            ready.study,
            launcher(ready, store, recorder, where, bench.on_event, "ablate"),
            winner,
            _verified_on(ready, store) or ready.traffic.heldout,
            allowed,
            bench.on_event,
            done=_done(store.trials(), "ablate"),
        )
    write_json(store.folder / ABLATED, result.to_dict())
    return result


def certify(ready: Prepared, store: Store, bench: Bench, promise: Promise, seconds: float) -> Certificate:
    """Launches what ``promise`` describes on this machine, wherever the study ran, and replays held-out windows; the
    launches are kept under ``certify/``, and what was found as an event there (``certified``). Costs are reckoned with
    the promise's own price: what is judged is the server."""
    promise = replace(promise, config=_with_secrets(promise.config, ready.study))
    own = Store(store.folder / "certify")
    recorder = Nobody()
    windows = _verified_on(ready, store) or ready.traffic.heldout
    study = _at_its_price(ready.study, promise)
    where = LocalExecutor(replace(bench, study=study, quality=unchecked))
    launch = launcher(ready, own, recorder, where, bench.on_event, "certify")
    served = str(ready.notes(promise.config).get("model_folder") or promise.config.model)
    now = replace(ready.fingerprint(served), gpu=gpu_here(study, promise.config.gpu))
    short = partial(unfilled, study, load=promise.load)
    clock = partial(_clock, ready, own, "certify")
    found = recertify(promise, launch, windows, now, bench.on_event, seconds=seconds, clock=clock, short=short)
    own.log("certified", **found.to_dict())
    return found


def _with_secrets(config: ServingConfig, study: Study) -> ServingConfig:
    """``config``, of an exported file, with the study's secrets, which no export has."""
    env = {name: value for name, value in study.space.env.items() if is_secret(name, value)}
    fixed = {flag: value for flag, value in study.space.fixed.items() if isinstance(value, str)}
    flags = {flag: value for flag, value in fixed.items() if is_secret(flag, value)}
    return replace(config, env=env | dict(config.env), flags=flags | dict(config.flags))


def _at_its_price(study: Study, promise: Promise) -> Study:
    """``study`` with the price of ``promise`` for the GPU that it names; as it is where the promise says none."""
    if promise.price is None:
        return study
    prices = {device(study, promise.config.gpu): promise.price}
    return replace(study, objective=replace(study.objective, price_usd_per_gpu_hour=promise.price, prices=prices))


def verification(store: Store) -> Verification | None:
    """What verification said, None before it was done."""
    path = store.folder / VERIFIED
    if not path.exists():
        return None
    with AsWritten(path):
        return Verification.from_dict(read_json(path))


_TOO_LITTLE = (
    "too little of the budget is left for a launch of the default and one of a finalist. "
    "Raise it, and run the same command again."
)
_LAUNCHES = "Give --launches {} or more."
_VERIFY = "Run the study with budget.verify_share above 0 first."


class Nobody:
    def trial_finished(self, number: int) -> None:
        """MLflow holds studies, not spot checks."""


def _done(trials: Sequence[TrialRecord], role: str) -> Sequence[Done]:
    ended = [t for t in trials if t.role == role and not t.again and isinstance(t.outcome, Measured | Infeasible)]
    told = [t for t in ended if not (isinstance(t.outcome, Infeasible) and t.outcome.machines)]
    return [Done(str((t.extra or {})["label"]), t.config.hash, t.outcome) for t in told]


def _known(done: Sequence[Done], arms: Sequence[Finalist]) -> int:
    """How many launches of ``arms`` were made: they are used again and cost nothing."""
    hashes = {arm.config.hash for arm in arms}
    return sum(launch.config in hashes for launch in done)


def _verified_on(ready: Prepared, store: Store) -> tuple[Trace, ...]:
    """The held-out windows that launches of verification measured; empty before there are any."""
    launches = [t.outcome for t in store.launched("verify") if isinstance(t.outcome, Measured)]
    names = {step.window for outcome in launches for step in outcome.steps}
    return tuple(window for window in ready.traffic.heldout if window.name in names)


def _spread(windows: Sequence[Trace], count: int) -> tuple[Trace, ...]:
    """So many of them, over the whole trace."""
    return tuple(windows[round(at)] for at in np.linspace(0, len(windows) - 1, count))


def limits(ready: Prepared, store: Store, arms: Sequence[Finalist]) -> tuple[VerifyBudget, tuple[Trace, ...]] | None:
    """What of the budget is left to verify ``arms``, and the windows for it; None where its share is 0 or too little is
    left. USD last as long as the dearest of them can run for them: how long each will run is not known. By what the
    search's launches took there are as many windows as two rounds of two launches fit into the time for (three at
    least, if the trace has them; those that were measured stay), and as many arms as three rounds do; two at least."""
    study = ready.study
    if study.budget.verify_share <= 0 or not ready.traffic.heldout:
        return None
    trials = store.launched("search", "verify")
    used = budget.spent(study, trials)
    hashes = {arm.config.hash for arm in arms}
    again = budget.spent(study, [t for t in trials if t.role == "verify" and t.config.hash in hashes])
    launches, fresh, seconds, whole = 10_000, None, [], []
    if study.budget.launches is not None:
        known, left = _known(_done(trials, "verify"), arms), study.budget.launches - used.launches
        if known + left < 2:
            return None
        fresh = max(left, 0)
        launches = known + fresh
    if study.budget.hours is not None:
        seconds.append((study.budget.hours - used.hours) * 3600)
        whole.append(seconds[-1] + again.hours * 3600)
    if study.budget.usd is not None:
        prices = {t.number: t.price for t in trials}
        dearest = max(per_hour(a.config, study.objective, prices.get(a.trial or 0)) for a in arms)
        seconds.append((study.budget.usd - used.usd) / dearest * 3600)
        whole.append(seconds[-1] + again.usd / dearest * 3600)
    if launches < 2 or (seconds and min(seconds) <= 0):
        return None
    before = _verified_on(ready, store)
    windows = before or tuple(ready.traffic.heldout)
    if not seconds:
        return VerifyBudget(launches=launches, fresh=fresh), windows
    searched = budget.of_search(trials)
    if not before:
        takes_s = partial(budget.verify_launch_s, searched)
        windows = _spread(windows, budget.verify_windows(study, len(windows), min(whole), takes_s))
    launch_s = budget.verify_launch_s(searched, len(windows))
    most = max(int(min(whole) / (3 * launch_s)), 2) if launch_s else None
    return VerifyBudget(launches=launches, seconds=min(seconds), fresh=fresh, arms=most, launch_s=launch_s), windows
