"""The one place where trials are written to and read from Optuna: ask, tell, and what was seen so far.

A trial's truth is in its user attributes: ``params`` (snapped), ``outcome`` (:func:`tuner.study.outcome.to_dict`),
``started_s`` and ``ended_s``, and where it applies what a :class:`Proposal` says. Its two values and its constraint
``slo`` are for Optuna's own samplers: every trial has them, crashes too, because a trial that failed is invisible to
them and would be proposed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.space.config import Value
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.study.outcome import Aborted, Infeasible, Measured, Outcome, Step, from_dict, to_dict

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

CONSTRAINT = "slo"
COST_KEY = "cost_usd_per_mtok_output"
CRASH_VIOLATION = 10.0
MISS_FLOOR = 1e-3
WORST = (100.0, 10.0)  # USD per million tokens and seconds, told for a first trial that has no point at all


@dataclass(frozen=True, slots=True)
class Seen:
    """One trial as the samplers see it; ``outcome`` is None while it runs. Times are Unix seconds (0: not known)."""

    number: int
    params: Mapping[str, Value]
    outcome: Outcome | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    remeasure_of: int | None = None
    expected_gain: float | None = None  # of its proposal: share of the front's hypervolume
    promised: float | None = None  # the same of this configuration, not corrected
    free: bool = False  # told without a launch: refused by a rule, or a repeat

    @property
    def seconds(self) -> float:
        """How long the launch held its GPUs; 0 where that is not known."""
        return max(self.ended_s - self.started_s, 0.0)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Why a configuration was proposed. ``expected_gain`` is the expected growth of the front's hypervolume, as a share
    of what it has, by the best untried configuration, None where nothing was expected yet; ``promised`` the growth by
    this one as the beliefs have it (None: among the first), and ``kept`` the share that earlier promises kept, by which
    the other is corrected already (:meth:`tuner.search.scan.Scan.kept`); ``remeasure_of`` the trial that is measured
    again; ``serves`` the probability that the server serves, None where nothing was believed yet. ``learnt`` is what
    the launches before it say of the analytic model: ``factors`` on its constants, the probability ``believed`` of
    these, the ``weight`` that is left of its prediction of each quantity, and by its name of each ``earlier`` study."""

    reason: str
    expected_gain: float | None = None
    remeasure_of: int | None = None
    learnt: Mapping[str, Any] | None = None
    serves: float | None = None
    promised: float | None = None
    kept: float | None = None


def ask(study: Study, space: SearchSpace) -> tuple[Trial, dict[str, Value]]:
    """The next trial and its snapped parameters, noted in the ledger with the sampler's reason."""
    trial = study.ask(space.distributions())
    params = space.snap(trial.params)
    trial.set_user_attr("params", params)
    explain = getattr(study.sampler, "proposal", None)
    proposal = explain(trial.number) if explain else None
    if proposal:
        note(trial, proposal)
    return trial, params


def add(study: Study, space: SearchSpace, params: Mapping[str, Value], **notes: Any) -> Trial:
    """A trial that runs though the study was never asked for it (the ledger was lost, say): to be told as any other."""
    import optuna

    from tuner.search.candidates import distribution_values

    notes["params"] = dict(params)
    made = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        params=distribution_values(space, params),
        distributions=space.distributions(),
        user_attrs=notes,
    )
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id, template_trial=made))


def note(trial: Trial, proposal: Proposal) -> None:
    """Writes what a proposal says to its trial, from where :func:`read` has it."""
    for name in Proposal.__slots__:
        if (said := getattr(proposal, name)) is not None:
            trial.set_user_attr(name, said)


def tell(
    study: Study,
    trial: Trial,
    space: SearchSpace,
    objective: Objective,
    outcome: Outcome,
    *,
    started_s: float = 0.0,
    ended_s: float = 0.0,
    free: bool = False,
) -> tuple[float, float, float]:
    """Tells an outcome to the study; returns the (cost, latency, violation) that were told.

    ``free`` marks an outcome that cost no launch: a refusal before it, or a repeat of an earlier trial's outcome.
    """
    if "params" not in trial.user_attrs:
        trial.set_user_attr("params", space.snap(trial.params))
    trial.set_user_attr("outcome", to_dict(outcome))
    trial.set_user_attr("started_s", started_s)
    trial.set_user_attr("ended_s", ended_s)
    if free:
        trial.set_user_attr("free", True)
    told = [t.values for t in study.get_trials(deepcopy=False) if t.values]
    worst = (max(v[0] for v in told), max(v[1] for v in told)) if told else WORST
    cost, latency, violation = values(outcome, objective, worst)
    trial.set_constraint(CONSTRAINT, violation)
    study.tell(trial, [cost, latency])
    return cost, latency, violation


def values(outcome: Outcome, objective: Objective, worst: tuple[float, float] = WORST) -> tuple[float, float, float]:
    """Lowest cost (USD per million output tokens), lowest latency (seconds) over the steps that met every SLO, and the
    violation: 0 where there is such a step, else above 0 by how much it was missed.

    All three are finite. Without a step within SLO, cost and latency are ``worst``: the worst that was told so far,
    so that a crash is never better than a server that works and the models' scales stay what they were.
    """
    points = [(s.metrics[COST_KEY], s.metrics[objective.latency_key]) for s in good_steps(outcome, objective)]
    if points:
        return min(p[0] for p in points), min(p[1] for p in points), 0.0
    return worst[0], worst[1], violation(outcome, objective)


def violation(outcome: Outcome, objective: Objective) -> float:
    """By how much no step met the SLOs: the sum over SLOs of the relative miss (log10 for latencies) at the nearest
    step; :data:`CRASH_VIOLATION` where the server did not serve."""
    if isinstance(outcome, Infeasible):
        return CRASH_VIOLATION
    misses = []
    for step in outcome.steps:
        ratios = [step.metrics.get(slo.key, math.inf) / max(slo.limit, 1e-9) for slo in objective.slos]
        misses.append(sum(min(max(math.log10(max(r, 1e-9)), 0.0), 2.0) for r in ratios))
    return min(max(min(misses), MISS_FLOOR), CRASH_VIOLATION / 2) if misses else CRASH_VIOLATION / 2


def good_steps(outcome: Outcome, objective: Objective) -> list[Step]:
    """The steps that are points of the front: every SLO met, believed, both axes finite. As on the front itself, a
    launch that was stopped early has those that it served; but what was interrupted is launched again, and counts by
    that."""
    interrupted = isinstance(outcome, Aborted) and outcome.reason == "interrupted"
    if not isinstance(outcome, Measured | Aborted) or interrupted:
        return []
    keys = (COST_KEY, objective.latency_key)
    return [s for s in outcome.steps if s.ok and all(0 < s.metrics.get(k, math.inf) < math.inf for k in keys)]


def read(study: Study, space: SearchSpace) -> list[Seen]:
    """Every trial of the study that has an outcome or is running, by number."""
    from optuna.trial import TrialState

    found = []
    for trial in study.get_trials(deepcopy=False):
        notes = trial.user_attrs
        running = trial.state == TrialState.RUNNING
        if "outcome" not in notes and not running:
            continue
        params = notes.get("params")
        if params is None:
            if set(trial.params) != {p.name for p in space.parameters}:
                continue  # being asked for at this moment
            params = trial.params
        found.append(
            Seen(
                trial.number,
                space.snap(params),
                from_dict(notes["outcome"]) if "outcome" in notes else None,
                float(notes.get("started_s") or 0.0),
                float(notes.get("ended_s") or 0.0),
                notes.get("remeasure_of"),
                notes.get("expected_gain"),
                notes.get("promised"),
                bool(notes.get("free")),
            )
        )
    return found


def answered(outcome: Outcome | None) -> bool:
    """Whether an outcome says what a configuration is worth: the measurement was not at fault, nor was it cut off
    before its first step."""
    if isinstance(outcome, Measured | Infeasible):
        return not (isinstance(outcome, Infeasible) and outcome.transient)
    return isinstance(outcome, Aborted) and bool(outcome.steps)
