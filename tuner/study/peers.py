"""Several tuners, one study: a shared ledger, claims on trials, and a mirror of what the others measured.

Every tuner keeps a study folder of its own, whole: what others measured is copied into it from the ledger. A trial is
claimed in the ledger before it is launched, while its tuner holds the turn (a lock of the database), so that nothing
is launched twice and every launch counts. A tuner that gives no sign of life for the grace period is dead: its trials
are queued again by whoever has the turn (:mod:`tuner.study.upkeep`).
"""

from __future__ import annotations

import os
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tuner.engines.protocol import Cancelled, OnEvent
from tuner.errors import UsageError
from tuner.spec import studyfile
from tuner.spec.study import Study
from tuner.study import mirror
from tuner.study.database import Away, Database, Hold, Interrupted, answering
from tuner.study.pulse import Owner, Pulse
from tuner.study.store import Store, TrialRecord
from tuner.study.together import LOOK_S
from tuner.study.upkeep import CLAIM, INSTEAD, NUMBER, OWNER, Upkeep

if TYPE_CHECKING:
    import optuna

VERIFIED = "verify.json"


@contextmanager
def joined(
    study: Study,
    store: Store,
    on_event: OnEvent,
    env: Mapping[str, str] = os.environ,
    cancel: threading.Event | None = None,
) -> Iterator[Peers | None]:
    """The company of the other tuners; None for a study with a ledger of its own.

    Raises EnvironmentFault where the database cannot be reached, UsageError where it holds another study of this name.
    After ``cancel`` nothing waits for another tuner's turn any more.
    """
    if not study.storage:
        yield None
        return
    database = Database(study.storage, study.name, env, lambda text: on_event("say", {"text": text}), cancel)
    with database.starting():
        peers = Peers(study, store, database, on_event)
    try:
        with database.starting():
            peers.begin()
        yield peers
    finally:
        peers.close()


class Peers:
    """This tuner among those that share its study; what needs the turn says so. Raises :class:`Away` where the
    database does not answer, except where it says otherwise."""

    def __init__(self, study: Study, store: Store, database: Database, on_event: OnEvent) -> None:
        self.study, self.store, self.database, self.on_event = study, store, database, on_event
        self.owner = Owner.this(store.folder)
        self.pulse = Pulse(database.storage, study.storage.heartbeat_s, study.storage.grace_s)
        with answering():
            self.book = self._book(study.name)
            verified = self._book(f"{study.name} (verification)")
        self.upkeep = Upkeep(study, store, self.book, verified, self.owner, self.pulse, on_event)
        self.rules = study.rules  # by which all of them measure; known from begin() on
        self._said_away = False

    @contextmanager
    def turn(self) -> Iterator[Hold]:
        """While it lasts no other tuner asks, claims or gives up trials."""
        try:
            with self.database.turn("ask") as hold, answering():
                yield hold
            self._said_away = False
        except Interrupted:
            raise
        except Away as error:
            self.away(error)
            raise

    def away(self, error: Away) -> None:
        """Says once that the database is away; until it has been back for a grace period nobody is taken for dead."""
        self.pulse.missed()
        if not self._said_away:
            self._said_away = True
            text = f"The database {self.database.shown} is away ({error}). Outcomes are kept, and told when it is back."
            self.store.log("database", problem=str(error))
            self.on_event("say", {"text": text})

    def begin(self) -> None:
        """Compares the study with the one in the ledger; starts to give signs of life."""
        from tuner.record.ledger import Ledger

        with self.turn():
            kept, log = self.book.user_attrs, Ledger.load(self.store.folder)  # the tuners have one run in MLflow
            if "uid" in kept:
                # earlier versions did not write the rules; a folder that has been part of the study knows
                known = self.rules if self.store.trials() and log.uid == kept["uid"] else ()
                self.rules = frozenset(kept.get("rules", known))
            own = mirror.identity(studyfile.by(self.rules, self.study))
            changed = [part for part, digest in kept.get("identity", own).items() if digest != own.get(part)]
            if changed:
                raise UsageError(
                    f"the study {self.study.name!r} in {self.database.shown} has another {', another '.join(changed)}",
                    where=self.study.source,
                    fix="give this one another name, or make it the same",
                )
            if "uid" not in kept:
                self.book.set_user_attr("identity", own)
                self.book.set_user_attr("rules", sorted(self.rules))
                self.book.set_user_attr("uid", log.uid)
            else:
                log.uid = log.uid if log.stores else kept["uid"]
            log.save()
        self.pulse.start()

    def close(self) -> None:
        """Raises nothing."""
        if self.upkeep.behind:
            with suppress(Away), self.turn():
                self.upkeep.reconcile()
        self.pulse.close()
        self.database.close()

    # this tuner's trials

    def claim(self, trial: optuna.Trial) -> tuple[int, str]:
        """Makes ``trial`` this tuner's; returns its number (one that no trial of the study ever had) and the claim.
        Needs the turn. A trial without the last of what is written here is nobody's."""
        taken = [int(t.user_attrs[NUMBER]) for t in self.upkeep.trials() if NUMBER in t.user_attrs]
        taken += self.store.numbers()
        number, word = max(taken, default=-1) + 1, uuid.uuid4().hex
        self.pulse.add(trial._trial_id)
        try:
            for key, value in ((NUMBER, number), (OWNER, self.owner.to_dict()), (CLAIM, word)):
                trial.set_user_attr(key, value)
        except BaseException:
            self.pulse.drop(trial._trial_id)
            raise
        self.upkeep.claims[word] = number
        return number, word

    def tell(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Tells the outcome that is on disk: later, where the database is away or took this tuner for dead. Raises
        nothing for either."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with answering():
                self.upkeep.tell(trial, record)
            self.pulse.drop(trial._trial_id)
        except Away as error:
            self.upkeep.behind = True
            self.away(error)
        except UpdateFinishedTrialError:
            self.upkeep.behind = True
            self.pulse.drop(trial._trial_id)

    def give_back(self, trial: optuna.Trial, params: Mapping[str, Any], why: str) -> None:
        """A claimed trial that was never launched is queued again; where the database is away, when its grace period
        is over."""
        self.pulse.drop(trial._trial_id)
        with suppress(Away), answering():
            self.book.enqueue_trial(dict(params), user_attrs={"why": why, INSTEAD: trial.user_attrs[CLAIM]})
            self.upkeep.fail(trial._trial_id)

    # the others

    def running(self) -> dict[str, dict[str, Any]]:
        """Config hash -> owner, of every trial that runs anywhere."""
        with answering():
            return self.upkeep.running(self.book.get_trials(deepcopy=False))

    def waiting(self) -> bool:
        """Whether a trial is queued."""
        from optuna.trial import TrialState

        with answering():
            return bool(self.book.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def rejoin(self) -> None:
        """After a kill: what this folder's last tuner had not finished is given up at once. Needs the turn."""
        from optuna.trial import TrialState

        self.upkeep.behind = True
        self.upkeep.reconcile()
        for trial in self.book.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if OWNER in trial.user_attrs and self.owner.same_folder(trial.user_attrs[OWNER]):
                self.upkeep.fail(trial._trial_id)

    def ended(self, budget: str) -> str:
        """Why the tuners agreed that the search is over, under this budget; empty where they did not."""
        with answering():
            agreed = self.book.user_attrs.get("ended") or {}
        return str(agreed.get("why", "")) if agreed.get("budget") == budget else ""

    def agree(self, why: str, budget: str) -> None:
        """Ends the search for all, under this budget. Needs the turn."""
        self.book.set_user_attr("ended", {"why": why, "budget": budget})

    # the verification

    @contextmanager
    def verifying(self, cancel: threading.Event) -> Iterator[Hold | None]:
        """One tuner verifies at a time, and the others wait for what it finds; None for them: it is in the folder.

        Raises Cancelled on an interrupt, :class:`Away` as ever.
        """
        said = False
        while (hold := self.database.try_turn("verify")) is None:
            if not said:
                self.on_event("say", {"text": "Another tuner verifies; this one waits for what it finds."})
                said = True
            if cancel.wait(LOOK_S):
                raise Cancelled
        try:
            with self.turn():
                self.upkeep.all()
                measured = [self._measured(), repr(self.study.budget)]
                found = self.book.user_attrs.get("verified") == measured
                found = found and mirror.get_file(self.book, self.study, self.store.folder / VERIFIED)
            if found:
                yield None
                return
            yield hold
            with self.turn():
                self.upkeep.all()
                if (self.store.folder / VERIFIED).exists() and not cancel.is_set():
                    mirror.put_file(self.book, self.study, self.store.folder / VERIFIED)
                    self.book.set_user_attr("verified", measured)
        finally:
            hold.release()

    def publish(self) -> None:
        """Launches of the verification that ended here are shown to the others; raises nothing."""
        self.upkeep.behind = True
        with suppress(Away), self.turn():
            self.upkeep.reconcile()

    def _measured(self) -> list[int]:
        """What a verification is about: the trials of the search."""
        return sorted(record.number for record in self.store.trials() if record.role == "search")

    def _book(self, name: str) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # :class:`Pulse` gives them, not Study.optimize
        return optuna.create_study(
            storage=self.database.storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
