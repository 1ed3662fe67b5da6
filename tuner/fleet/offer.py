"""Offers: what one replica of a study's configuration can do and costs, read from the study folder alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy import stats

from tuner.errors import NothingFeasible, UsageError
from tuner.executor.cluster import device
from tuner.fleet import measured
from tuner.fleet.capacity import RATES, kept, proven
from tuner.fleet.curve import Curve, Limit, curve, limits_of
from tuner.pareto.changes import baseline_of, describe
from tuner.pareto.choice import choose
from tuner.pareto.recommend import recommended
from tuner.pareto.traffic import bounds_waiting, per_request
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo
from tuner.spec.study import Study
from tuner.study.outcome import Step
from tuner.study.price import per_hour
from tuner.study.store import Store, TrialRecord
from tuner.study.verifying import verification
from tuner.verify.arm import Range
from tuner.verify.fill import unfilled
from tuner.verify.finalists import launch_sd, launch_spread
from tuner.verify.judge import Arm
from tuner.words import figure


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """One kind of replica: a server with ``gpus`` GPUs (0: a CPU server) at ``usd_per_hour``.

    ``capacity`` is requests per second within every SLO (middle, low, high); the plan uses the low end, and ``curve``
    is that pessimistic replica. ``start_s`` is from launch to ready. Tokens are means per request. ``cv`` is the
    coefficient of variation of the gaps between the arrivals it was measured with (NaN: not known), ``window_s`` how
    long each measurement was, ``filled`` whether its prefix cache held what came before. ``basis`` says in words where
    the capacity comes from.
    """

    name: str
    study: str
    config: ServingConfig
    flags: str
    gpu: str
    gpus: int
    usd_per_hour: float
    capacity: Range
    curve: Curve
    start_s: float
    output_tokens: float
    total_tokens: float
    cv: float
    window_s: float
    basis: str
    verified: bool
    emulated: bool
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Shop:
    """What the studies offer, the SLOs that all of them hold, those that the simulation cannot follow, and ``notes``
    that a reader must know."""

    offers: tuple[Offer, ...]
    slos: tuple[Slo, ...]
    unchecked: tuple[Slo, ...]
    notes: tuple[str, ...]


def shop(studies: Sequence[tuple[Study, Store]], confidence: float) -> Shop:
    """Every study's offers. Raises UsageError where studies hold different SLOs, NothingFeasible where none of them
    has a configuration that meets its SLOs."""
    slos = studies[0][0].objective.slos
    notes: list[str] = []
    found: list[Offer] = []
    for study, store in _told_apart(studies):
        if set(study.objective.slos) != set(slos):
            raise UsageError(
                f"{study.name} holds other SLOs than {studies[0][0].name} "
                f"({_words(study.objective.slos)}; {_words(slos)})",
                where=study.folder,
                fix="A fleet holds one set of SLOs: plan studies with the same ones together",
            )
        try:
            offers, more = offers_of(study, store, confidence)
        except NothingFeasible as failure:
            if len(studies) == 1:
                raise
            notes.append(f"{study.name} offers nothing: {failure.message}")
            continue
        found += offers
        notes += more
    if not found:
        raise NothingFeasible("No study has a configuration that meets its SLOs: " + " ".join(notes))
    notes += _differences([study for study, _ in studies])
    return Shop(_named(found), slos, limits_of(slos)[1], tuple(notes))


def offers_of(study: Study, store: Store, confidence: float) -> tuple[list[Offer], list[str]]:
    """One offer per GPU type and number of GPUs: the recommended configuration and, for the others, the best one
    measured. Among configurations of one price another one would add nothing but doubt.

    From verification where it was done and something held, else from the search. Raises NothingFeasible where nothing
    meets the SLOs, UsageError where no arrival rate was measured.
    """
    trials = store.trials()
    known = verification(store)
    if known is not None and known.config is not None:
        offers, notes = _verified(study, store, trials, confidence)
    elif known is not None:
        raise NothingFeasible(recommended(store, study).text)
    else:
        offers, notes = _searched(study, trials, confidence)
    return offers, notes


def _verified(
    study: Study, store: Store, trials: Sequence[TrialRecord], confidence: float
) -> tuple[list[Offer], list[str]]:
    known, choice = verification(store), recommended(store, study)
    if known is None or known.chosen is None or known.config is None or choice.point is None:
        raise NothingFeasible(choice.text)
    rows = {str(row["config"]): row for row in known.rows}
    configs = {t.number: t.config for t in trials}
    by_kind: dict[tuple[str, int], tuple[Arm, ServingConfig]] = {
        _kind(study, known.config): (known.chosen, known.config)
    }
    left = []
    for arm in sorted(known.arms, key=lambda a: a.cost[0]):
        number = rows.get(arm.label, {}).get("trial")
        config = configs.get(number) if number is not None else None
        if not arm.holds or config is None or arm.label == known.choice:
            continue
        if _kind(study, config) in by_kind:
            left.append(arm.label)
        else:
            by_kind[_kind(study, config)] = (arm, config)
    notes = [f"{study.name}: {', '.join(left)} held too, at the same price per replica: not offered."] if left else []
    offers = []
    for arm, config in by_kind.values():
        deployed = choice.point.config if arm.label == known.choice else config
        own = [t for t in trials if t.config.hash == config.hash]
        steps = measured.steps([t for t in own if t.role == "verify"])
        capacity, basis = proven(study, trials, arm, confidence)
        if not steps or not math.isfinite(capacity[0]):  # the launches are not in the folder: what the verdict kept
            steps = measured.steps(own)
            capacity, basis = kept(study, arm, steps, trials, confidence)
        if steps and not bounds_waiting(study.objective):  # a load may hold of which half waits for ever
            capacity, basis = _served(capacity, basis, steps)
        # verification measures around the capacity only: lower loads are the search's
        below = 0.9 * steps[0].load if steps else math.inf
        steps = [s for s in measured.steps([t for t in own if t.role == "search"]) if s.load < below] + steps
        if deployed.hash != config.hash:
            basis += "; its superfluous flags are taken out (ablation)"
        offers.append(_offer(study, trials, deployed, steps, capacity, basis, verified=True))
    return offers, notes


def _served(capacity: Range, basis: str, steps: Sequence[Step]) -> tuple[Range, str]:
    """No more than a step served, and that in words where it is less."""
    most = max(map(measured.kept_up, steps))
    middle, low, high = (min(rate, most) for rate in capacity)
    if middle == capacity[0]:
        return (middle, low, high), basis
    return (middle, low, high), f"{basis}; at most the {figure(most)} requests/s that were served: no SLO bounds a wait"


def _searched(study: Study, trials: Sequence[TrialRecord], confidence: float) -> tuple[list[Offer], list[str]]:
    search = [t for t in trials if t.role == "search"]
    spread = launch_spread(trials)
    sd, learnt = launch_sd(spread)
    offers = []
    by_kind = sorted(search, key=lambda t: _kind(study, t.config))
    for _, group in itertools.groupby(by_kind, key=lambda t: _kind(study, t.config)):
        own = list(group)
        choice = choose(own, study.objective)
        if choice.point is None:
            continue
        mine = [t for t in own if t.config.hash == choice.point.config.hash]
        steps = measured.steps(mine)
        held = [s for s in steps if not s.slo_misses and all(x.ok for x in steps if x.load == s.load)]
        if not held:
            raise UsageError("no arrival rate was measured", where=study.folder, fix=RATES)
        rate = statistics.fmean(measured.kept_up(s) for s in held if s.load == held[-1].load)
        error = stats.norm.ppf(confidence) * sd / math.sqrt(len(mine))
        basis = (
            f"highest load of the search within SLO ({held[-1].load:g}), not verified; lower limit by what launches "
            f"differ by ({sd * 100:.2g} %, {'learnt from repeats' if learnt else 'assumed'})"
        )
        capacity = (rate, rate * math.exp(-error), rate * math.exp(error))
        offers.append(_offer(study, trials, choice.point.config, steps, capacity, basis, verified=False))
    if not offers:
        raise NothingFeasible(choose(search, study.objective).text)
    return offers, [f"{study.name} was not verified: its capacities are the search's, and the search took its best."]


def _offer(
    study: Study,
    trials: Sequence[TrialRecord],
    config: ServingConfig,
    steps: Sequence[Step],
    capacity: Range,
    basis: str,
    *,
    verified: bool,
) -> Offer:
    limits: tuple[Limit, ...] = limits_of(study.objective.slos)[0]
    usable = [point for s in steps if (point := measured.point(s, limits)) is not None]
    if not usable:
        raise UsageError("no request rates and latencies were measured", where=study.folder, fix=RATES)
    folder = next((t.folder for t in trials if any(s is steps[-1] for s in t.outcome.steps)), None)  # type: ignore[union-attr]
    cv = measured.cv(folder / steps[-1].records if folder and steps[-1].records else None)
    extra = max(0.0, 1 - cv**2) if math.isfinite(cv) else 0.0
    prompts, outputs = (per_request(steps, name) for name in ("prompt", "output"))
    default = baseline_of(trials)
    hardware = device(study, config.gpu)
    price = next((t.price for t in trials if t.config.hash == config.hash and t.price), None)
    short = unfilled(study, steps, max((s.load for s in steps if s.ok), default=steps[-1].load))
    return Offer(
        name=study.name,
        study=study.name,
        config=config,
        flags=describe(config, default.config if default else None),
        gpu=hardware if config.gpus else f"{hardware} (CPU server)",
        gpus=config.gpus,
        usd_per_hour=per_hour(config, study.objective, price),
        capacity=capacity,
        curve=curve(usable, limits, stretch=capacity[1] / capacity[0], extra=extra),
        start_s=measured.start_s(trials, config),
        output_tokens=outputs,
        total_tokens=prompts + outputs,
        cv=cv,
        window_s=study.trace.window_s,
        basis=". ".join(filter(None, (basis, short.removesuffix(".")))),
        verified=verified,
        emulated=any(t.emulated for t in trials if t.config.hash == config.hash) or study.engine.kind == "emulator",
        filled=all(step.filled for step in steps),
    )


def _kind(study: Study, config: ServingConfig) -> tuple[str, int]:
    """What decides the price of a replica."""
    return device(study, config.gpu), config.gpus


def _named(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    """Names that differ: the study's, with what its offers differ by where it has several."""

    def name(offer: Offer) -> str:
        own = [o for o in offers if o.study == offer.study]
        types = f" {offer.gpu}" if len({o.gpu for o in own}) > 1 else ""
        sizes = f" x{offer.gpus}" if len({o.gpus for o in own}) > 1 else ""
        return offer.study + types + sizes

    return tuple(replace(o, name=name(o)) for o in offers)


def _told_apart(studies: Sequence[tuple[Study, Store]]) -> list[tuple[Study, Store]]:
    """Studies of one name (of two reports folders, say) carry their folder: pools are told apart by name."""
    many = Counter(study.name for study, _ in studies)
    return [
        (replace(study, name=f"{study.name} ({study.folder})") if many[study.name] > 1 else study, store)
        for study, store in studies
    ]


def _differences(studies: Sequence[Study]) -> list[str]:
    """What makes studies hard to mix."""
    notes = []
    for what, values in (
        ("models", {Path(s.model).name for s in studies}),
        ("traces", {Path(s.trace.file).name for s in studies}),
    ):
        if len(values) > 1:
            listed = ", ".join(sorted(values))
            notes.append(f"The studies differ in {what} ({listed}): a request is not the same to all.")
    return notes


def _words(slos: Sequence[Slo]) -> str:
    return ", ".join(map(str, slos)) or "none"
