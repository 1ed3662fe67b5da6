"""The search: an Optuna sampler that knows what a launch costs, what a ladder tells and what a crash means.

In order: the engine's default (the baseline of every comparison); configurations spread over the predicted front (by
the analytic model, by earlier studies, or by rules of thumb), or over the space where nothing predicts one; then, by
a surrogate on what the launches said, the candidate with the highest expected growth of the front, per GPU-second once
a dozen launches have been made.
Everything is read from the study's trials each time, so that a resumed study goes on where it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler
from threadpoolctl import threadpool_limits

from tuner.search.acquisition import Front, LaunchCost, draws, worth
from tuner.search.beliefs import Beliefs
from tuner.search.calibration import LAUNCHES, Calibratable, Launched, calibrate, improbability
from tuner.search.candidates import Candidates, Key, Refuse, distribution_values, spread
from tuner.search.expert import gpu_counts
from tuner.search.foresight import Foresight
from tuner.search.ledger import Proposal, Seen, answered, read
from tuner.search.prediction import Predictor
from tuner.search.reading import Reading
from tuner.search.reading import read as read_outcome
from tuner.search.scan import Scan, launch_cost
from tuner.search.sources import Sources
from tuner.search.stopping import Stopping
from tuner.search.surrogate import Array
from tuner.search.warmstart import Earlier
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.study import MIN_GAIN
from tuner.study.outcome import Measured, grown
from tuner.words import figure

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from tuner.search.model.predictor import AnalyticModel


LONG = 3 * LAUNCHES  # launches of a study whose resumption leaves the model's constants alone
DRAWN = 200  # variations of the default of which the newest is launched
NEWS = 0.05  # log units by which a constant moves before the model is asked again
SECOND_HAND = 3.0  # times that the doubt counts of a value which no server has served with
SURE = 0.95  # probability of serving from which a proposal's reason leaves it unsaid
SHARE_SD = 0.2  # at least, of how much of what the learnt constants change is so: the truth may lie between
MEMORY_STEP_BYTES = 2**29  # a smaller change of the memory correction is not worth asking the model again

# The matrices are small: more threads wait for each other, and on a busy machine for servers that are being measured.
ONE_THREAD = threadpool_limits.wrap(limits=1, user_api="blas")


@dataclass(frozen=True, slots=True)
class Options:
    """``first`` configurations come from the predicted front (or are spread, where nothing is predicted). The first
    ``by_gain`` launches are chosen by gain alone: while little is known, gain per GPU-second tries one small server
    after another and leaves whole parts of the front untried; afterwards gain counts per GPU-second to the ``power``.
    ``shortlist`` candidates get the full expectation; ``neighbours`` at most join a sampled pool at a time. Measuring a
    point again may take one launch in ``remeasure_every`` (0: never). Where nothing is known of any parameter but
    what its values look like, the first ``near_until`` launches differ in at most ``near`` parameters (0: in any) from
    one that served. ``min_gain`` is the study's (:class:`tuner.search.stopping.Stopping`)."""

    first: int = 4
    shortlist: int = 160
    neighbours: int = 200
    remeasure_every: int = 8
    power: float = 1.0
    by_gain: int = 12
    near: int = 3
    near_until: int = 10
    min_gain: float = MIN_GAIN


class TunerSampler(BaseSampler):
    """Proposes serving configurations for ``space`` under ``objective``, measured at ``loads`` (the ladder, low to
    high; higher loads that launches were measured at join them). ``predictor`` is the analytic model, None where there
    is none for this hardware; ``model`` the model's name or folder (it goes into serving configs); ``cost`` a first
    estimate of a launch's seconds, replaced by what launches really took; ``earlier`` studies to start warm from;
    ``refuse`` says why the machine cannot carry a configuration, ``unfit`` why it would be refused as things are known
    at first.

    ``proposal(number)`` says why a trial was proposed; ``expected_gain`` is the last expected gain, as a share
    (corrected by what earlier promises kept);
    ``factors`` are what the launches put on the model's constants, and ``believed`` the probability that they are right
    (0: the constants are what they were).
    """

    def __init__(
        self,
        space: SearchSpace,
        objective: Objective,
        loads: Sequence[float],
        predictor: Predictor | None = None,
        model: str = "",
        seed: int = 0,
        cost: LaunchCost | None = None,
        earlier: Sequence[Earlier] = (),
        options: Options | None = None,
        refuse: Refuse | None = None,
        unfit: Refuse | None = None,
    ) -> None:
        if not loads or min(loads) <= 0:
            raise ValueError("a ladder needs at least one load, all above zero")
        self.space, self.objective, self.loads = space, objective, tuple(sorted(loads))
        self.seed, self.cost, self.options = seed, cost or LaunchCost(), options or Options()
        # what promises less may end the search; where nothing ends it so, the usual rule says when to try what is new
        self.at_last = Stopping(self.options.min_gain or MIN_GAIN)
        self.predictor, self.model, self.earlier = predictor, model, tuple(earlier)
        self.candidates = Candidates.of(space, seed, asked=predictor is not None, refuse=refuse, unfit=unfit)
        self.expected_gain: float | None = None
        self.factors: dict[str, float] = {}
        self._learnt_from = 0  # launches
        self._warned = False
        self._proposals: dict[int, Proposal] = {}
        self._independent = RandomSampler(seed=seed)
        self._foresee()

    def _foresee(self, share: tuple[float, float] = (0.0, 0.0)) -> None:
        """What is expected at the ladder's loads; of launches it keeps the model's constants and their ``share``."""
        self.foresight = Foresight(self.candidates, self.objective, self.loads, self.predictor, self.model)
        self.beliefs = Beliefs(self.candidates, Sources(self.candidates, self.foresight, self.earlier, share=share))
        if self.predictor is not None and not self.candidates.whole:
            self._grow_towards_front()
        if self.factors and isinstance(self.predictor, Calibratable):
            self._teach(self.predictor)

    @property
    def believed(self) -> float:
        """Probability of the learnt constants."""
        return self.beliefs.sources.share[0]

    def proposal(self, number: int) -> Proposal | None:
        """Why the trial of this number was proposed (None: not by this sampler, in this process)."""
        return self._proposals.get(number)

    # what Optuna calls

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        seen = [s for s in read(study, self.space) if s.number != trial.number]
        loads = grown(self.loads, (s.outcome for s in seen))
        if loads != self.loads:
            self.loads = loads
            self._foresee(self.beliefs.sources.share)
        if not self._warned and not any(s.outcome for s in seen):
            self._warn_of_values(study)
        index, proposal = self._propose(seen, trial.number)
        self._proposals[trial.number] = replace(proposal, learnt=self._learnt())
        return distribution_values(self.space, self.candidates.params[index])

    def _warn_of_values(self, study: Study) -> None:
        """Says once that trials were told values alone: without an outcome there is nothing to learn from."""
        if any(t.state.name == "COMPLETE" for t in study.get_trials(deepcopy=False)):
            self._warned = True
            text = "TunerSampler learns from outcomes, which no trial of this study has: tell them by tuner.api.AskTell"
            warnings.warn(f"{text} (or tuner.search.ledger.tell)", stacklevel=2)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self._independent.reseed_rng()

    # the search

    @ONE_THREAD
    def _propose(self, seen: Sequence[Seen], number: int) -> tuple[int, Proposal]:
        rng = np.random.default_rng([self.seed, number])
        default = self.candidates.number(self.space.snap(self.space.default()))
        taken = self._taken(seen)
        if default is not None and default not in taken:
            return default, Proposal("the engine's default: the baseline of every comparison")
        readings = [read_outcome(s, self.objective, self.loads) for s in seen if not s.free]
        launched = [r for r in readings if r.seen.outcome is not None and r.seen.remeasure_of is None]
        pending = [i for s in seen if s.outcome is None if (i := self.beliefs.index(s.params)) is not None]
        early = len(launched) + len(pending) <= self.options.first
        blind = self.predictor is None and not (self.beliefs.sources.earlier or self.beliefs.sources.ruled)
        works = [(i, r.works) for r in launched if r.works and (i := self.beliefs.index(r.seen.params)) is not None]
        if early and blind:
            crashed = any(i == default and found < 0 for i, found in works)
            index, reason = self._without_model(taken, None if crashed else default, rng)
            if index is not None:
                return index, Proposal(reason)
        unlikely = self._calibrate(readings)
        self._correct(readings)
        if unlikely is not None:
            self._believe_constants(readings, unlikely)
        self.beliefs.learn(readings, self.seed)
        if pending:
            self.beliefs.believe(pending)
        if not self.candidates.whole:
            self._grow_near(readings, rng)
        free = self._admitted(taken)
        if (blind or self.beliefs.sources.guessed) and len(launched) + len(pending) < self.options.near_until:
            free = self._near(free, [i for i, found in works if found > 0]) or free
        return self._best(Scan(self.beliefs, self.loads, readings, pending), free, early, number)

    def _best(self, scan: Scan, free: Sequence[int], early: bool, number: int) -> tuple[int, Proposal]:
        """The candidate with the highest expected gain: per launch among the first, per GPU-second afterwards."""
        rng = np.random.default_rng([self.seed, number, 2])
        if not free:
            return scan.again(rng), Proposal("every configuration of the space was launched", 0.0)
        cost = launch_cost(self.cost, scan.readings)
        mean = self.beliefs.posterior(free, spread=False)
        front = scan.front(mean)
        volume = front.volume()
        shortlist = scan.shortlist(free, mean, front, self.options.shortlist, rng)
        normal = draws(self.seed + number)
        believed = self.beliefs.posterior(shortlist)
        values = worth(believed, front, self.loads, cost, normal)
        launched = sum(r.seen.outcome is not None for r in scan.readings)
        power = self.options.power if launched >= self.options.by_gain else 0.0
        score = values.gain / values.gpu_seconds**power
        best = int(np.argmax(score + 1e-15 * rng.random(len(score))))
        kept = scan.kept(front)
        self.expected_gain = float(values.gain.max() / volume) * kept if volume > 0 else None
        if not early and volume > 0:
            doubt = scan.doubtful(front, cost, normal, self.options.remeasure_every, power)
            if doubt is not None and doubt.score > score[best]:
                why = f"measured again: its point is worth {doubt.stake / volume:.1%} of the front, more or less"
                return doubt.index, Proposal(why, self.expected_gain, doubt.number, kept=kept)
            if self._ends(scan.readings, launched):
                chosen = self._unseen(scan, free, front, cost, normal, power)
                if chosen is not None:
                    index, why, gain, serves = chosen
                    return index, Proposal(why, self.expected_gain, serves=serves, promised=gain / volume, kept=kept)
        promised = float(values.gain[best] / volume) if volume > 0 else None
        reason = "expected to be the first point within SLO"
        if promised is not None:
            reason = f"{min(promised * kept, 9.99):.1%} more hypervolume expected"
        reason += self._price(values.gpu_seconds[best] / 60)
        serves = round(float(believed.works[best]), 3)
        if serves < SURE:
            reason += f"; {serves:.0%} likely to serve"
        if early:
            source = self.beliefs.sources.words
            reason = f"spread over {source}: {reason}"
            promised = None  # a prediction that no launch has corrected
        return shortlist[best], Proposal(reason, self.expected_gain, serves=serves, promised=promised, kept=kept)

    def _price(self, minutes: float) -> str:
        """What a launch takes, in words; empty where that is next to nothing (of a function)."""
        if minutes < 0.05:
            return ""
        unit = "minute" if self.space.facts.get("platform") == "cpu" else "GPU-minute"
        said = figure(minutes, 2)
        return f", for {said} {unit}{'' if said == '1' else 's'}"

    def _ends(self, readings: Sequence[Reading], launched: int) -> bool:
        """Whether this may be one of the last proposals of a search that ends by itself (one that goes on all the same
        goes by what is promised)."""
        last = self.at_last
        little = (self.expected_gain or 0.0) < last.min_gain
        return little and launched >= last.fewest - last.patience and not last.reason([r.seen for r in readings])

    def _unseen(
        self, scan: Scan, free: Sequence[int], front: Front, cost: LaunchCost, normal: Array, power: float
    ) -> tuple[int, str, float, float] | None:
        """Before a search ends: the most promising candidate with a value that nothing has served with, why, what it is
        expected to gain, and how likely it is to serve; None where no such value gives hope. What is believed of such a
        value is what the model, rules of thumb or earlier studies say: its doubt counts :data:`SECOND_HAND` times."""
        if not (values := scan.unseen(free)):
            return None
        some = list(values)
        rng = np.random.default_rng([self.seed, len(scan.readings), 3])
        mean = self.beliefs.posterior(some, spread=False)
        shortlist = scan.shortlist(some, mean, front, self.options.shortlist, rng)
        believed = self.beliefs.posterior(shortlist)
        wide = replace(
            believed,
            latency_sd=SECOND_HAND * believed.latency_sd,
            capacity_sd=SECOND_HAND * believed.capacity_sd,
        )
        hoped = worth(wide, front, self.loads, cost, normal)
        best = int(np.argmax(hoped.gain / hoped.gpu_seconds**power))
        if hoped.gain[best] <= 0:
            return None
        gain = float(worth(believed, front, self.loads, cost, normal).gain[best])
        why = f"before the search ends: no server has served with {values[shortlist[best]]} yet"
        return shortlist[best], why, gain, round(float(believed.works[best]), 3)

    def _learnt(self) -> dict[str, Any] | None:
        """What a proposal says of the model and of earlier studies (:class:`tuner.search.ledger.Proposal`)."""
        earlier = [study.name for study in self.beliefs.sources.earlier]
        if not self.beliefs.fitted or (self.predictor is None and not earlier):
            return None
        weights, said = self.beliefs.weights(), {}
        if self.predictor is not None:
            said = {
                "factors": {name: round(factor, 4) for name, factor in self.factors.items()},
                "believed": round(self.believed, 4),
                "weight": {name: round(of["model"], 4) for name, of in weights.items()},
            }
        if earlier:
            said["earlier"] = {
                study: {name: round(of[study], 4) for name, of in weights.items() if study in of} for study in earlier
            }
        return said

    def _calibrate(self, readings: Sequence[Reading]) -> float | None:
        """The model's constants from the launches, where it says which it doubts; returns how improbable they are, None
        where nothing was learnt. A process that takes up a long study leaves them: so many launches have said what the
        model gets wrong, and asking it anew takes seconds."""
        if not isinstance(self.predictor, Calibratable):
            return None
        outcomes = [(r.seen.params, r.seen.outcome) for r in readings if isinstance(r.seen.outcome, Measured)]
        if min(len(outcomes), LAUNCHES) == self._learnt_from or (not self._learnt_from and len(outcomes) > LONG):
            return None
        self._learnt_from = min(len(outcomes), LAUNCHES)
        launches = [Launched(self.space.config(params, self.model), o.steps) for params, o in outcomes]
        factors, sources = calibrate(self.predictor, launches, self.objective, self.factors), self.beliefs.sources
        if any(abs(math.log(f / self.factors.get(name, 1.0))) > NEWS for name, f in factors.items()):
            self.factors = factors
            self._teach(self.predictor)
        return None if sources.learnt is None else improbability(self.predictor, self.factors)

    def _teach(self, model: Calibratable) -> None:
        """``model`` with the learnt constants is believed beside it as it was."""
        scaled = model.scaled(self.factors)
        self.beliefs.sources.teach(Foresight(self.candidates, self.objective, self.loads, scaled, self.model))

    def _believe_constants(self, readings: Sequence[Reading], unlikely: float) -> None:
        """How far the learnt constants are believed: by how much better they explain the launches, and by how
        ``unlikely`` they were. What a model gets wrong in another way is not put on its constants."""
        evidence = []
        for share in (0.0, 1.0):
            self.beliefs.sources.share = (share, 0.0)
            evidence.append(self.beliefs.evidence(readings, self.seed))
        odds = evidence[1] - evidence[0] - unlikely
        believed = 1 / (1 + math.exp(min(-odds, 99.0)))
        self.beliefs.sources.share = (believed, max(math.sqrt(believed * (1 - believed)), SHARE_SD))

    def _correct(self, readings: Sequence[Reading]) -> None:
        """What the servers' own logs say about memory corrects the model's arithmetic, where it knows how (the methods
        ``fit`` and ``corrected`` of :class:`tuner.search.model.predictor.AnalyticModel`), with whatever constants."""
        model: Any = self.predictor
        if not hasattr(model, "corrected"):
            return
        from tuner.space.memory import learn

        learned = None
        for r in readings:
            if r.seen.outcome is not None:
                fit = model.fit(self.space.config(r.seen.params, self.model))
                learned = learn(fit, r.seen.outcome, learned)
        if learned is None:
            return
        new = (learned.overhead_bytes, learned.weights_share)
        for foresight in filter(None, (self.foresight, self.beliefs.sources.learnt)):
            old, scaled = foresight.memory, cast("AnalyticModel", foresight.predictor)
            if abs(new[0] - old[0]) > MEMORY_STEP_BYTES or abs(new[1] - old[1]) > 0.03:
                foresight.memory = new
                foresight.reconsider(scaled.corrected(learned))

    def _taken(self, seen: Sequence[Seen]) -> set[int]:
        """Candidates that were launched and answered, or are running; one whose measurement was at fault twice."""
        taken, faults = set(), []
        for s in seen:
            index = self.beliefs.index(s.params)
            if index is None:
                continue
            if s.outcome is None or answered(s.outcome) or index in faults:
                taken.add(index)
            faults.append(index)
        return taken

    def _admitted(self, taken: set[int]) -> list[int]:
        """Candidates that may be launched: new ones within reach that fit in memory, as far as the model can tell."""
        self.foresight.look()
        fits = self.foresight.short_bytes <= 0
        fits[list(taken | self.candidates.beyond)] = False
        return np.nonzero(fits)[0].tolist()

    def _without_model(self, taken: set[int], default: int | None, rng: Any) -> tuple[int | None, str]:
        """Where nothing is known of any parameter: other numbers of GPUs; then a few parameters off the default at a
        time, those that were varied least; where the default does not serve (None), what is least like the launched.

        What differs in everything from a server that works mostly does not work, and its points say nothing of which
        difference they come from (group screening: Watson 1961, Technometrics 3(3))."""
        for params, why in gpu_counts(self.space, self.candidates.admits):
            index = self.candidates.number(params)
            if index is not None and index not in taken:
                return index, why
        away = taken | self.candidates.beyond
        if len(away) >= len(self.candidates.params):
            return None, ""
        if default is not None and (index := self._off(default, taken, rng)) is not None:
            off = sum(a != b for a, b in zip(self.candidates.keys[index], self.candidates.keys[default], strict=True))
            return index, f"{off} parameter{'s' * (off > 1)} off the default, of those that were varied least"
        left = [i for i in range(len(self.candidates.params)) if i not in away]
        few = rng.choice(left, size=min(8, len(left)), replace=False).tolist()  # the farthest of all is a corner
        index = spread(self.candidates.codes(), self.beliefs.tables, sorted(taken), few)
        return index, "least like anything launched so far"

    def _off(self, base: int, taken: set[int], rng: Any) -> int | None:
        """A candidate that differs from ``base`` in ``near`` parameters (a condition may add one), of some drawn at
        random the one with the most parameters, then values, that none of ``taken`` varied."""
        known = self.candidates.keys
        varied = [{known[i][j] for i in taken} for j in range(len(self.space.parameters))]

        def news(key: Key) -> tuple[int, int]:
            fresh = [j for j, code in enumerate(key) if code != known[base][j] and code not in varied[j]]
            return sum(len(varied[j]) == 1 for j in fresh), len(fresh)

        wide = [p for p in self.space.parameters if len(p.values) > 1]
        best, most = None, (-1, -1)
        for _ in range(DRAWN):
            params = dict(self.candidates.params[base])
            for k in rng.choice(len(wide), size=min(self.options.near, len(wide)), replace=False):
                params[wide[k].name] = wide[k].values[int(rng.integers(len(wide[k].values)))]
            index = self.candidates.number(self.space.snap(params))
            if index is not None and index not in taken and news(known[index]) > most:
                best, most = index, news(known[index])
        return best

    def _near(self, indices: Sequence[int], served: Sequence[int]) -> list[int]:
        """Those of ``indices`` that differ in at most ``near`` parameters from one of ``served``."""
        codes = self.candidates.codes(indices)
        apart = [(codes != of).sum(1) for of in self.candidates.codes(served)]
        near = np.min(apart, axis=0) <= self.options.near if apart else np.zeros(len(codes), dtype=bool)
        return np.array(indices, dtype=np.int64)[near].tolist()

    def _grow_towards_front(self) -> None:
        """Neighbours of the model's front join a sampled pool, until it stays what it is (six rounds at most)."""
        self.beliefs.learn([], self.seed)
        usual = self._usual(self.space.default())
        for _ in range(6):
            leaders = Scan(self.beliefs, self.loads, [], []).leaders(self._admitted(set()), 12)
            if not any([self.candidates.add(self._around(i, usual)) for i in leaders]):
                break

    def _usual(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The values that ``params`` has of what nobody knows anything about: another is a way to crash."""
        unknown = self.beliefs.sources.unknown()
        return {p.name: params[p.name] for p, alone in zip(self.space.parameters, unknown, strict=True) if alone}

    def _around(self, index: int, usual: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A candidate's neighbours; and they and it with the ``usual`` values."""
        params = self.candidates.params[index]
        near = self.candidates.neighbours(params)
        return [*near, *({**n, **usual} for n in (params, *near) if usual)]

    def _grow_near(self, readings: Sequence[Reading], rng: Any) -> None:
        """Neighbours of the incumbents (and of what is believed best) join the pool, some at a time."""
        good = [i for r in readings if r.good and (i := self.beliefs.index(r.seen.params)) is not None]
        believed = Scan(self.beliefs, self.loads, readings, []).leaders(self._admitted(set()), 6)
        own = [i for i in good if i not in self.candidates.beyond]
        usual = self._usual(self.candidates.params[own[0]] if own else self.space.default())
        many = [n for i in sorted({*good[-10:], *believed}) for n in self._around(i, usual)]
        before = len(self.candidates.params)
        for params in rng.permutation(np.array(many, dtype=object)).tolist():
            if len(self.candidates.params) - before >= self.options.neighbours:
                break
            self.candidates.add([params])
