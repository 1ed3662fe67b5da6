"""What is launched next: Optuna proposes, rules and memory refuse free of charge, nothing is launched twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from tuner.pareto.front import searched
from tuner.search import ledger
from tuner.space.config import ServingConfig, Value
from tuner.spec.study import Study
from tuner.study.database import Away
from tuner.study.outcome import Aborted, Infeasible, Outcome
from tuner.study.store import EXHAUSTED, UNFOUND, Store, TrialRecord
from tuner.study.upkeep import Look

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from tuner.study.peers import Peers

PATIENCE = 40  # proposals in a row that were refused or known, before the grid is walked for something new
BELIEVED = ("learnt", "serves", "promised", "kept")  # what the sampler says of a proposal that the trial's record keeps
WHOLE, WALKED, DRAWN = 20_000, 200_000, 5_000  # grids above are drawn from first; above, not walked; draws


@dataclass(slots=True)
class Proposal:
    """One trial to run. ``repeat`` counts earlier launches of the same config; ``gpus`` are leased just before it;
    ``alone`` says that none of this tuner's ran when it began."""

    number: int
    trial: optuna.Trial
    params: Mapping[str, Value]
    config: ServingConfig
    baseline: bool
    why: str
    repeat: int = 0
    remeasure_of: int | None = None
    gpus: tuple[int, ...] = field(default=())
    alone: bool = False


class Queue:
    """Proposals of one study. ``refuse`` says why a config cannot run at all (memory), empty where it may; ``notes``
    what is written beside it. ``peers`` are the other tuners of a shared study, whose trials count as its own;
    ``over`` is asked once more while no other tuner can ask; ``awaited`` says that nothing may start beside the
    default."""

    def __init__(
        self,
        study: Study,
        store: Store,
        book: optuna.Study,
        refuse: Callable[[ServingConfig], str],
        notes: Callable[[ServingConfig], Mapping[str, Any]],
        peers: Peers | None = None,
    ) -> None:
        self.study, self.store, self.book, self.refuse, self.notes = study, store, book, refuse, notes
        self.peers = peers
        self.over: Callable[[int], str] = lambda _running: ""
        self.awaited: Callable[[], bool] = lambda: False
        self.nothing_new = EXHAUSTED  # what a None of propose() says
        self.stood_back = False  # the last None of propose() was not for want of configurations
        self._busy_elsewhere: set[str] = set()
        self.space = study.space
        self.baseline_hash = self.space.config(self.space.default(), study.model).hash
        records = store.trials()
        known = searched(records)  # others say nothing of what to launch
        self._known: dict[str, TrialRecord | None] = {}
        for record in known:
            self._remember(record.config.hash, record, again=record.again)
        self._launches = Counter(record.config.hash for record in known)
        self._next = max((record.number for record in records), default=-1) + 1
        self._refused = {_key(entry["params"]) for entry in store.refused()}
        if peers is None:
            self._recover(records)
        else:
            with peers.database.starting(), peers.turn():
                self._rejoin(records)

    def propose(self) -> Proposal | None:
        """The next trial, written to the store as started; None where the whole space has been tried (and, in a shared
        study, where the search is over or the ledger away)."""
        if self.peers is None:
            return self._propose()
        self.stood_back = True
        with suppress(Away), self.peers.turn():
            if not self.over(len(self.catch_up().running)) and not self.waits():
                proposal = self._propose()
                self.stood_back = False
                return proposal
        return None

    def waits(self) -> bool:
        """Whether the default runs, and nothing is to be proposed before it was asked for its answers."""
        return self._known.get(self.baseline_hash, self) is None and self.awaited()

    def catch_up(self) -> Look:
        """What other tuners measured since the last time, now known here, and what runs. Needs the turn, and peers."""
        assert self.peers is not None
        look = self.peers.upkeep.all()
        for record in searched(look.copied):
            self._remember(record.config.hash, record, again=record.again)
            self._launches[record.config.hash] += 1
        now = {key for key, owner in look.running.items() if owner != self.peers.owner.to_dict()}
        for key in self._busy_elsewhere - now:
            if key in self._known and self._known[key] is None:
                del self._known[key]  # given up, or to be launched again
        for key in now:
            self._known.setdefault(key, None)
        self._busy_elsewhere = now
        return look

    def _propose(self) -> Proposal | None:
        for _ in range(min(PATIENCE, self.space.size())):  # each costs a shared database a dozen round trips
            trial, params = ledger.ask(self.book, self.space)
            reason = self.why_not(params)
            config = self.space.config(params, self.study.model)
            remeasure = "remeasure_of" in trial.user_attrs
            if reason:
                self._refuse(params, reason)
                outcome = Infeasible("refused", reason, stage="before launch")
                self._tell(trial, outcome, free=True)
            elif config.hash in self._known and not remeasure:
                record = self._known[config.hash]
                self._repeat(trial, record)
            else:
                return self._start(trial, params, config, remeasure)
        return self._walk()

    def why_not(self, params: Mapping[str, Value]) -> str:
        """Why ``params`` will not be launched; empty where they may."""
        return self.space.denied(params) or self.refuse(self.space.config(params, self.study.model))

    def tell(self, proposal: Proposal, outcome: Outcome, again: bool) -> None:
        """Optuna is told; with ``again`` the same parameters are queued once more (a new trial)."""
        record = self.store.trial(proposal.number)
        if self.peers is None:
            self._tell(proposal.trial, outcome, record)
        elif record is not None:
            self.peers.tell(proposal.trial, record)
        self._remember(proposal.config.hash, record, again)
        if again and self.peers is None:
            told = proposal.trial.user_attrs
            of = {key: told[key] for key in ("remeasure_of",) if key in told}
            why = "again after " + _short(outcome)
            self.book.enqueue_trial(dict(proposal.params), user_attrs={"why": why, **of})

    def withdraw(self, proposal: Proposal) -> None:
        """Takes back a proposal that was never launched; its number is free again."""
        self.store.shelve(proposal.number)
        if self.peers is not None:
            self.peers.give_back(proposal.trial, proposal.params, proposal.why)
            return
        self._fail(proposal.trial)
        self.book.enqueue_trial(dict(proposal.params), user_attrs={"why": proposal.why})

    def _tell(
        self, trial: optuna.Trial, outcome: Outcome, record: TrialRecord | None = None, free: bool = False
    ) -> None:
        times = {"started_s": record.started_s, "ended_s": record.ended_s} if record else {}
        ledger.tell(self.book, trial, self.space, self.study.objective, outcome, **times, free=free)

    def _fail(self, trial: optuna.Trial) -> None:
        """A trial that never was: FAIL is invisible to samplers, which is what is wanted here and only here."""
        from optuna.trial import TrialState

        self.book.tell(trial, state=TrialState.FAIL)

    def _start(
        self, trial: optuna.Trial, params: Mapping[str, Value], config: ServingConfig, remeasure: bool
    ) -> Proposal:
        baseline = config.hash == self.baseline_hash
        told = trial.user_attrs
        why = told.get("why") or told.get("reason") or ("the engine's default" if baseline else self.study.sampler)
        number, claim = self._next, {}
        if self.peers is None:
            trial.set_user_attr("trial", number)
        else:
            number, claim["claim"] = self.peers.claim(trial)
        self._next += 1  # only now is it ours
        repeat = self._launches[config.hash]
        self._launches[config.hash] += 1
        earlier = self._known.setdefault(config.hash, None)
        first = earlier.number if earlier and remeasure else None
        believed = {key: told[key] for key in BELIEVED if key in told}
        self.store.start_trial(
            number,
            config,
            params,
            optuna=trial.number,
            baseline=baseline,
            why=why,
            repeat=repeat,
            remeasure_of=first,
            **claim,
            **believed,
            **self.notes(config),
        )
        return Proposal(number, trial, params, config, baseline, why, repeat, first)

    def _remember(self, key: str, record: TrialRecord | None, again: bool) -> None:
        if not again:
            self._known[key] = record
        elif self._known.get(key) is None:  # else it is known by another launch
            self._known.pop(key, None)

    def _refuse(self, params: Mapping[str, Value], reason: str) -> None:
        key = _key(params)
        if key not in self._refused:
            self._refused.add(key)
            self.store.refuse(params, reason)

    def _repeat(self, trial: optuna.Trial, record: TrialRecord | None) -> None:
        """A sampler asked for what is known (it gets the known outcome) or runs right now (it is told nothing)."""
        trial.set_user_attr("repeat_of", record.number if record else -1)
        if record is None:
            self._fail(trial)
        else:
            self._tell(trial, record.outcome, free=True)

    def _walk(self) -> Proposal | None:
        """Samplers that only repeat themselves: an untried configuration at random, if there is one."""
        import random

        rng = random.Random(self.study.seed + self._next)
        grid: Iterable[Mapping[str, Value]] = ()
        if self.space.size() > WHOLE:  # a draw finds one where not nearly all are refused
            drawn = ({p.name: rng.choice(p.values) for p in self.space.parameters} for _ in range(DRAWN))
            grid = map(self.space.snap, drawn)
        if self.space.size() <= WALKED:
            whole = list(self.space.grid())
            rng.shuffle(whole)
            grid = chain(grid, whole)
        else:
            self.nothing_new = UNFOUND
        for params in grid:
            config = self.space.config(params, self.study.model)
            if config.hash not in self._known and not self.why_not(params):
                self.book.enqueue_trial(dict(params), user_attrs={"why": "untried; the sampler repeats itself"})
                trial, params = ledger.ask(self.book, self.space)
                return self._start(trial, params, self.space.config(params, self.study.model), remeasure=False)
        return None

    def _rejoin(self, records: list[TrialRecord]) -> None:
        """The first look at a ledger that others may be using: only what this folder's last tuner left is given up."""
        assert self.peers is not None
        for number in self._unfinished(records):
            self.store.shelve(number)
        self.peers.rejoin()
        self.catch_up()
        if not self.book.get_trials(deepcopy=False):
            self.book.enqueue_trial(self.space.default(), user_attrs={"why": "the engine's default"})

    def _recover(self, records: list[TrialRecord]) -> None:
        """After a kill: trials that ended but were not told are told; those that did not end never happened. So is what
        the ledger was never asked for: the launch that settled the ladder, and all there is where it was lost."""
        import optuna
        from optuna.trial import TrialState

        trials = self.book.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
        begun = any(t.state == TrialState.COMPLETE for t in trials)
        # by their configuration, too: a ledger that was lost began to count anew
        noted = {
            (t.user_attrs["trial"], _key(t.user_attrs.get("params", {}))): t for t in trials if "trial" in t.user_attrs
        }
        told = set()
        for record in searched(records):
            frozen = noted.get((record.number, _key(record.params)))
            if frozen is None:
                kept = {k: v for k, v in (record.extra or {}).items() if k in BELIEVED}
                if record.remeasure_of is not None:
                    kept["remeasure_of"] = record.remeasure_of
                for asked in self._queued(record.params):  # before it was launched for the ladder
                    self.book._storage.set_trial_state_values(asked._trial_id, state=TrialState.FAIL)
                trial = ledger.add(self.book, self.space, record.params, trial=record.number, **kept)
            elif frozen.state == TrialState.RUNNING:
                trial = optuna.Trial(self.book, frozen._trial_id)
                told.add(frozen.number)
            else:
                continue
            self._tell(trial, record.outcome, record)
        waiting = [t.system_attrs["fixed_params"] for t in self._queued()]
        for frozen in trials:
            if frozen.state == TrialState.COMPLETE or frozen.number in told:
                continue
            self._fail(optuna.Trial(self.book, frozen._trial_id))
            params = dict(frozen.user_attrs.get("params") or frozen.system_attrs.get("fixed_params") or {})
            if params and params not in waiting:  # else the kill came before the sampler had an answer
                waiting.append(params)
                self.book.enqueue_trial(params, user_attrs=self._as_before(frozen))
        for record in searched(records):
            lost = record.again and record.config.hash not in self._known
            if lost and dict(record.params) not in waiting:
                waiting.append(dict(record.params))
                self.book.enqueue_trial(
                    dict(record.params), user_attrs={"why": "again after " + _short(record.outcome)}
                )
        for number in self._unfinished(records):
            self.store.shelve(number)
        default = self.space.default()
        if not begun and self.baseline_hash not in self._known and not self._queued(default):
            self.book.enqueue_trial(default, user_attrs={"why": "the engine's default"})

    def _queued(self, params: Mapping[str, Value] | None = None) -> list[FrozenTrial]:
        """What is to be asked for next (of one configuration)."""
        from optuna.trial import TrialState

        snap, found = self.space.snap, self.book.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        found = [t for t in found if t.system_attrs.get("fixed_params")]
        return [t for t in found if params is None or snap(t.system_attrs["fixed_params"]) == snap(params)]

    def _as_before(self, frozen: FrozenTrial) -> dict[str, Any]:
        """What a trial that a kill cut off is queued again with: why, and of which trial it is another measurement."""
        told = frozen.user_attrs
        if "trial" in told:
            return {
                "why": "again: its session ended before it did",
                **{k: told[k] for k in ("remeasure_of",) if k in told},
            }
        return {key: told[key] for key in ("why", "reason", "remeasure_of") if key in told}

    def _unfinished(self, records: list[TrialRecord]) -> set[int]:
        return set(self.store.numbers()) - {record.number for record in records}


def _key(params: Mapping[str, Value]) -> str:
    return str(sorted(params.items()))


def refusals(
    space_params: Iterable[Mapping[str, Value]], why_not: Callable[[Mapping[str, Value]], str]
) -> Counter[str]:
    """How many of the combinations given are refused, by reason."""
    return Counter(reason for params in space_params if (reason := why_not(params)))


def _short(outcome: Outcome) -> str:
    return outcome.reason if isinstance(outcome, Aborted) else getattr(outcome, "cause", type(outcome).__name__.lower())
