"""What any tuner of a shared study does for all of them while it has the turn: the ledger is brought in order by
looking at it, so that nothing depends on a tuner that died in the middle of something."""

from __future__ import annotations

import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.engines.protocol import OnEvent
from tuner.search import ledger
from tuner.space.config import ServingConfig
from tuner.spec.study import Study
from tuner.study import mirror
from tuner.study.pulse import Owner, Pulse
from tuner.study.store import Store, TrialRecord

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SHARED_FILES = ("quality.json",)
CLAIM, NUMBER, OWNER, INSTEAD, RECORD, AGAIN = "claim", "trial", "owner", "instead_of", "record", "again"


@dataclass(frozen=True, slots=True)
class Look:
    """The ledger at one instant: ``copied`` are other tuners' trials new in this folder, ``running`` has config
    hash -> owner of every trial that runs anywhere. Trials end without the turn, so that two reads one after the other
    can both miss one."""

    copied: list[TrialRecord]
    running: dict[str, dict[str, Any]]


class Upkeep:
    """The ledger ``book`` of the search and ``verified`` of the verification, against the study folder ``store``.
    Every method needs the turn; ``behind`` says that an outcome in the folder is not in the ledger yet."""

    def __init__(
        self,
        study: Study,
        store: Store,
        book: optuna.Study,
        verified: optuna.Study,
        owner: Owner,
        pulse: Pulse,
        on_event: OnEvent,
    ) -> None:
        self.study, self.store, self.book, self.verified = study, store, book, verified
        self.owner, self.pulse, self.on_event = owner, pulse, on_event
        self.behind = True
        self.claims = {self.word(record): record.number for record in store.trials()}

    def all(self) -> Look:
        """Everything, in the order in which it must be; returns how the ledger was at the end of it."""
        import optuna

        self._drop_orphans()
        if not self.pulse.doubtful:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.book)
        self.reconcile()
        self._requeue()
        self._share_files()
        trials = self.trials()  # those of the verification have all ended
        return Look([record for t in trials if (record := self._mirrored(t)) is not None], self.running(trials))

    def running(self, trials: list[FrozenTrial]) -> dict[str, dict[str, Any]]:
        """Config hash -> owner, of those of ``trials`` that run."""
        from optuna.trial import TrialState

        return {
            self.config(t).hash: t.user_attrs[OWNER]
            for t in trials
            if t.state == TrialState.RUNNING and OWNER in t.user_attrs
        }

    def word(self, record: TrialRecord) -> str:
        """What tells a trial from all others: its claim, or where and when it was made."""
        made = f"{self.owner.host}:{self.owner.folder}:{record.number}:{record.started_s}"
        return str((record.extra or {}).get(CLAIM) or made)

    def tell(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """The default's answers and the whole record first, then Optuna's own."""
        if record.baseline:
            self._share_files()
        trial.set_user_attr(RECORD, mirror.packed(self.study, record.folder))
        if (record.extra or {}).get("again"):
            trial.set_user_attr(AGAIN, True)
        ledger.tell(
            self.book,
            trial,
            self.study.space,
            self.study.objective,
            record.outcome,
            started_s=record.started_s,
            ended_s=record.ended_s,
        )

    def fail(self, trial_id: int) -> None:
        """FAIL is invisible to samplers; does nothing where the trial has ended."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with suppress(UpdateFinishedTrialError):
            self.book._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def trials(self) -> list[FrozenTrial]:
        return [*self.book.get_trials(deepcopy=False), *self.verified.get_trials(deepcopy=False)]

    def config(self, trial: FrozenTrial) -> ServingConfig:
        params = trial.user_attrs.get("params") or trial.system_attrs.get("fixed_params") or trial.params
        return self.study.space.config(params, self.study.model)

    def _drop_orphans(self) -> None:
        """Trials whose tuner died between asking and claiming: nobody asks now but this one."""
        from optuna.trial import TrialState

        for trial in self.book.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not {CLAIM, OWNER} <= trial.user_attrs.keys():
                self.fail(trial._trial_id)
                fixed = trial.system_attrs.get("fixed_params")
                if fixed:  # it had been queued
                    kept = {k: v for k, v in trial.user_attrs.items() if k in ("why", INSTEAD, "remeasure_of")}
                    self.book.enqueue_trial(fixed, user_attrs=kept)

    def _requeue(self) -> None:
        """Queues again what was claimed and given up, and what ended with a wish to be launched once more."""
        from optuna.trial import TrialState

        trials = self.book.get_trials(deepcopy=False)
        followed = {t.user_attrs[INSTEAD] for t in trials if INSTEAD in t.user_attrs}
        followed |= {t.user_attrs[CLAIM] for t in trials if self._claimed(t) and not t.user_attrs.get(AGAIN)}
        for trial in trials:
            notes = trial.user_attrs
            if not {CLAIM, OWNER} <= notes.keys() or notes[CLAIM] in followed:  # the orphans are queued already
                continue
            if trial.state == TrialState.FAIL:
                why = f"again: the tuner on {notes[OWNER]['host']} (pid {notes[OWNER]['pid']}) is gone"
                self.store.log("taken-up", trial=notes[NUMBER], owner=notes[OWNER])
                self.on_event("say", {"text": f"Trial {notes[NUMBER]} is queued {why}"})
            elif trial.state == TrialState.COMPLETE:
                why = f"again after {notes['outcome'].get('reason') or notes['outcome'].get('cause')}"
            else:
                continue
            more = {"remeasure_of": notes["remeasure_of"]} if "remeasure_of" in notes else {}
            self.book.enqueue_trial(notes["params"], user_attrs={"why": why, INSTEAD: notes[CLAIM], **more})

    def reconcile(self) -> None:
        """Outcomes in this folder that the ledger does not know are told: it was away, or took this tuner for dead."""
        import optuna
        from optuna.trial import TrialState

        if not self.behind:
            return
        trials = self.book.get_trials(deepcopy=False)
        known = {t.user_attrs[CLAIM]: t for t in trials if self._claimed(t)}
        for record in self.store.trials():
            if mirror.elsewhere(record) or record.role != "search" or CLAIM not in (record.extra or {}):
                continue
            found = known.get(self.word(record))
            if found is None:
                self._add(record, trials)
            elif found.state == TrialState.RUNNING:
                self.tell(optuna.Trial(self.book, found._trial_id), record)
                self.pulse.drop(found._trial_id)
        self._publish()
        self.behind = False

    def _claimed(self, trial: FrozenTrial) -> bool:
        """Whether it is somebody's, and was not given up."""
        from optuna.trial import TrialState

        return CLAIM in trial.user_attrs and trial.state != TrialState.FAIL

    def _add(self, record: TrialRecord, trials: list[FrozenTrial]) -> None:
        """A trial that was given up while it ran (or whose ledger was lost): told unless it was measured again."""
        from optuna.trial import TrialState

        word = self.word(record)
        for other in trials:
            given_up = other.state == TrialState.FAIL and CLAIM not in other.user_attrs  # it would have been a repeat
            if other.user_attrs.get(INSTEAD) != word or given_up:
                continue
            if other.state != TrialState.WAITING:
                shelf = self.store.folder / "interrupted" / f"{record.number:04d}-{int(time.time())}"
                shelf.parent.mkdir(exist_ok=True)
                shutil.move(record.folder, shelf)
                self.store.log("given-up", trial=record.number, kept=str(shelf))
                return
            self.fail(other._trial_id)
        notes = {NUMBER: record.number, CLAIM: word, OWNER: self.owner.to_dict()}
        self.tell(ledger.add(self.book, self.study.space, record.params, **notes), record)

    def _mirrored(self, trial: FrozenTrial) -> TrialRecord | None:
        """A finished trial of another tuner, copied into this folder; None where it is here already."""
        notes = trial.user_attrs
        if RECORD not in notes or not trial.state.is_finished() or notes[CLAIM] in self.claims:
            return None
        number = int(notes[NUMBER])
        if (self.store.folder / "trials" / f"{number:04d}").exists():  # made here without asking (tuner ablate)
            number = 1 + max(self.store.numbers(), default=number)
        mirror.unpacked(self.study, notes[RECORD], self.store, number, notes[CLAIM], notes[OWNER]["host"])
        self.claims[notes[CLAIM]] = number
        record = self.store.trial(number)
        if record is not None:
            told = {"trial": number, "outcome": record.outcome, "baseline": record.baseline, "role": record.role}
            self.on_event("trial", {**told, "elsewhere": notes[OWNER]["host"]})
        return record

    def _share_files(self) -> None:
        """The default's answers: whoever has them gives them to the others."""
        for name in SHARED_FILES:
            path = self.store.folder / name
            if f"file {name}" not in self.book.user_attrs:
                if path.exists():
                    mirror.put_file(self.book, self.study, path)
            elif not path.exists():
                mirror.get_file(self.book, self.study, path)

    def _publish(self) -> None:
        """Launches of the verification, for the others to read."""
        import optuna
        from optuna.trial import TrialState

        told = {t.user_attrs.get(CLAIM) for t in self.verified.get_trials(deepcopy=False)}
        for record in self.store.trials():
            if record.role == "search" or mirror.elsewhere(record):
                continue
            word = self.word(record)
            if word in told:
                continue
            notes = {NUMBER: record.number, CLAIM: word, OWNER: self.owner.to_dict()}
            notes[RECORD] = mirror.packed(self.study, record.folder)
            made = optuna.trial.create_trial(state=TrialState.COMPLETE, values=[0.0, 0.0], user_attrs=notes)
            self.verified.add_trial(made)
            self.claims[word] = record.number
