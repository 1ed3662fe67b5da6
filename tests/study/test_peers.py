"""Several tuners on one study: PostgreSQL holds the ledger, every tuner keeps a whole study folder of its own."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy

from tests import studies
from tests.study import postgres
from tuner.api import AskTell
from tuner.errors import EnvironmentFault, UsageError
from tuner.search import ledger
from tuner.spec import studyfile
from tuner.spec.storage import StorageSpec
from tuner.spec.study import RULES, Budget
from tuner.study import database, finish, mirror, session, verifying
from tuner.study.evaluate import Bench
from tuner.study.outcome import Infeasible, Measured
from tuner.study.peers import joined
from tuner.study.pulse import Owner
from tuner.study.store import EXHAUSTED, UNFOUND, Store, read_json
from tuner.study.together import Together

pytest.importorskip("psycopg", reason='no driver: pip install "tuner[postgres]"')
ROOT = Path(__file__).parents[2]
STUDY = """\
name: shared
model: my-org/my-model
engine: {kind: function, options: {target: "tests.study.measured:measure"}}
hardware: {gpu: L4, gpus: 1}
search_space:
  name: s
  engine: function
  parameters:
    batch: {flag: batch, values: [8, 16, 32], default: 8, trades: throughput against TPOT}
    colour: {flag: colour, values: [red, green], default: red, trades: nothing}
objective: {name: x, latency: tpot_p99, slo: {tpot_p99: 50ms}}
price_usd_per_gpu_hour: 0.70
load: {ladder: [0.5, 1]}
budget: {launches: 40, verify_share: 0}
sampler: grid
storage: {url: "${TUNER_TEST_DATABASE}", heartbeat: 1s, grace: 4s}
"""


CONFIGURATIONS = 6
TWO = "".join(line for line in STUDY.splitlines(keepends=True) if "flag: batch" not in line)  # configurations


@pytest.fixture(scope="module")
def server():
    where = postgres.binaries()
    if where is None:
        pytest.skip(postgres.MISSING)
    with postgres.served(where) as made:
        yield made


class Tuner:
    """``tuner tune`` as a process, with a study folder of its own. What it measures of the colour ``hold`` (``all``: of
    any) ends when it is released."""

    def __init__(self, folder: Path, name: str, url: str, hold: str = "") -> None:
        study = folder / "study.yaml"
        study.write_text(STUDY)
        self.folder, self.log, self.go = folder / name / "shared", folder / f"{name}.log", folder / f"{name}.go"
        env = {**os.environ, "TUNER_TEST_DATABASE": url, "PYTHONPATH": str(ROOT)}
        env |= {"MEASURE_HOLD": hold, "MEASURE_GO": str(self.go), "TUNER_RUNTIME_DIR": str(folder / "runtime")}
        env["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.parent / 'mlflow.db'}"
        words = [sys.executable, "-c", "from tuner.cli.app import main; main()", "tune", str(study), "--plain"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*words, "--reports", str(folder / name)], env=env, stdout=out, stderr=out, cwd=ROOT
            )

    def release(self) -> None:
        self.go.touch()

    def ended(self, timeout_s: float = 240) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.log.read_text()) from None

    def until(self, said: str, timeout_s: float = 180) -> None:
        """Waits until the log says so."""
        deadline = time.monotonic() + timeout_s
        while said not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    @property
    def trials(self):
        return Store(self.folder).trials()


def measurements(tuner: Tuner) -> dict:
    """Config hash -> what was measured, to compare studies by."""
    return {t.config.hash: [dict(s.metrics) for s in t.outcome.steps] for t in tuner.trials}


@pytest.mark.slow
def test_two_tuners_measure_every_configuration_once_and_both_folders_hold_all_of_it(server, tmp_path):
    url = server.database()
    both = [Tuner(tmp_path, name, url, hold="all") for name in ("a", "b")]
    for tuner in both:
        tuner.until("launching")
    for tuner in both:
        tuner.release()
    assert [tuner.ended() for tuner in both] == [0, 0], both[0].log.read_text() + both[1].log.read_text()
    for tuner in both:
        assert sorted(Counter(t.config.hash for t in tuner.trials).values()) == [1] * CONFIGURATIONS
        assert sum(t.baseline for t in tuner.trials) == 1
    assert measurements(both[0]) == measurements(both[1])
    elsewhere = [sum("elsewhere" in (t.extra or {}) for t in tuner.trials) for tuner in both]
    assert sum(elsewhere) == CONFIGURATIONS and min(elsewhere) > 0  # each measured some, and copied the rest
    numbers = [[t.number for t in tuner.trials] for tuner in both]
    assert numbers[0] == numbers[1] == list(range(CONFIGURATIONS))
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert postgres.PASSWORD.encode() not in everything


@pytest.mark.slow
def test_a_tuner_killed_with_9_has_its_running_trial_taken_up_within_the_grace_period(server, tmp_path):
    url = server.database()
    alone = Tuner(tmp_path, "c", server.database())
    doomed = Tuner(tmp_path, "a", url, hold="green")
    doomed.until("colour=green")
    other = Tuner(tmp_path, "b", url)
    other.until("launching")
    (running,) = [t for t in doomed.folder.glob("trials/*") if not (t / "outcome.json").exists()]
    params = read_json(running / "config.json")["params"]
    os.kill(doomed.process.pid, signal.SIGKILL)
    killed_s = time.time()
    assert other.ended() == 0, other.log.read_text()
    again = next(t for t in other.trials if dict(t.params) == params)
    assert isinstance(again.outcome, Measured) and "elsewhere" not in again.extra
    assert again.started_s - killed_s < 4 + 20, "grace, a heartbeat, and what a busy machine takes to look"
    assert "is gone" in again.extra["why"]
    assert sorted(Counter(t.config.hash for t in other.trials).values()) == [1] * CONFIGURATIONS
    assert alone.ended() == 0, alone.log.read_text()
    assert measurements(alone) == measurements(other)


def test_a_database_that_cannot_be_reached_is_one_clear_line_and_exit_code_4(tmp_path):
    tuner = Tuner(tmp_path, "a", "postgresql://tuner:pass@127.0.0.1:1/none")
    assert tuner.ended() == 4
    text = tuner.log.read_text()
    assert "Traceback" not in text and "was not reached" in text and "pass@" not in text


@pytest.mark.slow
def test_an_outage_of_the_database_loses_nothing(server, tmp_path):
    tuner = Tuner(tmp_path, "a", server.database(), hold="green")
    tuner.until("colour=green")
    server.stop()
    tuner.release()
    tuner.until("Outcomes are kept")
    server.start()
    assert tuner.ended() == 0, tuner.log.read_text()
    assert sorted(Counter(t.config.hash for t in tuner.trials).values()) == [1] * CONFIGURATIONS
    assert {type(t.outcome) for t in tuner.trials} == {Measured}


TOLD = {load: {"tpot_p99_s": 0.01, "output_tokens_per_s": load} for load in (0.5, 1.0)}
PASSED = Infeasible("killed", "somebody killed it", transient=True)


@pytest.fixture
def session_of(tmp_path, monkeypatch):
    """Sessions of a study of two configurations, by the name of the tuner's folder; a database of SQLite."""
    monkeypatch.setenv("TUNER_TEST_DATABASE", f"sqlite:///{tmp_path}/ledger.db")

    def session_of(name, text=TWO):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"{text}reports: {tmp_path / name}\n")
        return AskTell(path)

    return session_of


def peers_of(tuner):
    return tuner._queue.peers


def colours(tuner):
    """Of every trial in the tuner's folder: its number, its configuration, and whether it was measured there."""
    return [(t.number, t.params["colour"], "elsewhere" not in t.extra) for t in tuner.store.trials()]


def test_what_was_given_up_too_early_and_measured_again_is_put_aside_where_it_ends_late(session_of):
    with session_of("a") as a, session_of("b") as b:
        slow, quick = a.ask(), b.ask()
        peers_of(b).upkeep.fail(slow.trial._trial_id)  # as after its grace period
        again = b.ask()
        assert (again.number, again.config.hash) == (2, slow.config.hash) and "is gone" in again.why
        b.tell(again, TOLD)
        b.tell(quick, TOLD)
        a.tell(slow, TOLD)
        assert a.ask() is None and b.ask() is None
        assert colours(a) == [(1, "green", False), (2, "red", False)]
        assert colours(b) == [(1, "green", True), (2, "red", True)]
        (kept,) = (a.store.folder / "interrupted").iterdir()
        assert kept.name.startswith("0000-") and (kept / "outcome.json").exists()
        assert [e["kept"] for e in a.store.events() if e["event"] == "given-up"] == [str(kept)]


@pytest.mark.parametrize("asks", [False, True])  # for another configuration, and is given its own
def test_what_was_given_up_too_early_and_ends_before_anybody_took_it_up_is_not_measured_again(asks, session_of):
    with session_of("a") as a, session_of("b") as b:
        slow, quick = a.ask(), b.ask()
        peers_of(b).upkeep.fail(slow.trial._trial_id)
        with peers_of(b).turn():
            assert slow.config.hash not in b._queue.catch_up().running
        assert peers_of(b).waiting()
        assert not asks or a.ask() is None
        a.tell(slow, TOLD)
        b.tell(quick, TOLD)
        with peers_of(a).turn():
            a._queue.catch_up()
            assert not peers_of(a).waiting()
        assert a.ask() is None and b.ask() is None
        assert colours(a) == [(0, "red", True), (1, "green", False)]
        assert colours(b) == [(0, "red", False), (1, "green", True)]


def test_what_a_killed_tuner_was_at_is_launched_again_when_it_is_resumed_and_what_others_are_at_is_not(session_of):
    with session_of("b") as b:
        with session_of("a") as a:
            cut, running = a.ask(), b.ask()
            a._queue.book.ask()  # the kill comes before it is claimed
        with session_of("a") as a:
            again = a.ask()
            assert again.config.hash == cut.config.hash and again.number == 2
            assert a.ask() is None
            b.tell(running, TOLD)
            a.tell(again, TOLD)
            assert a.ask() is None and b.ask() is None
            assert colours(a) == [(1, "green", False), (2, "red", True)]


def test_what_failed_in_passing_is_launched_once_more_by_whoever_asks_next_and_only_once(session_of):
    with session_of("a") as a, session_of("b") as b:
        first, other = a.ask(), b.ask()
        a.store.end_trial(first.number, PASSED, again=True)
        a._queue.tell(first, PASSED, again=True)
        again = b.ask()
        assert (again.config.hash, again.repeat, again.why) == (first.config.hash, 1, "again after killed")
        assert a.ask() is None
        b.tell(again, TOLD)
        b.tell(other, TOLD)
        with peers_of(a).turn():
            a._queue.catch_up()
            assert not peers_of(a).waiting(), "what was measured is not queued again"
        assert a.ask() is None and b.ask() is None
        assert [type(t.outcome) for t in a.store.trials()] == [Infeasible, Measured, Measured]


def test_what_is_measured_once_more_is_a_remeasurement_whoever_takes_it_up(session_of):
    with session_of("a") as a, session_of("b") as b:
        first = a.ask()
        a.tell(first, TOLD)
        a._queue.book.enqueue_trial(dict(first.params), user_attrs={"remeasure_of": 0, "why": "doubtful"})
        again = a.ask()
        assert again.remeasure_of == 0
        peers_of(b).upkeep.fail(again.trial._trial_id)
        other = b.ask()
        assert (other.config.hash, other.remeasure_of) == (first.config.hash, 0)
        b.tell(other, TOLD)
        assert [t.remeasure_of for t in b.store.trials()] == [None, 0]


def test_what_is_handed_back_before_its_launch_is_anybodys(session_of):
    with session_of("a") as a, session_of("b") as b:
        taken = a.ask()
        a._queue.withdraw(taken)
        handed = b.ask()
        assert (handed.config.hash, handed.why) == (taken.config.hash, taken.why)
        with peers_of(a).turn():
            a._queue.catch_up()
            assert not peers_of(a).waiting(), "it is queued once"
        assert a.ask().config.hash != taken.config.hash and a.ask() is None


def test_launches_after_the_search_are_in_every_tuners_folder_once(session_of):
    with session_of("a") as a, session_of("b") as b:
        first = a.ask()
        a.tell(first, TOLD)
        for number, role in ((1, "verify"), (2, "ablate")):
            a.store.start_trial(number, first.config, first.params, role=role, label=f"{role} 1 default")
            a.store.end_trial(number, a.store.trial(0).outcome)
            peers_of(a).publish()
        peers_of(a).publish()
        assert b.ask().number == 3 and a.ask() is None
        assert [t.role for t in b.store.trials()] == ["search", "verify", "ablate"]
        assert verifying._done(b.store.trials(), "verify") == verifying._done(a.store.trials(), "verify")
        assert len(verifying._done(b.store.trials(), "verify")) == 1, "nor is it launched again by whoever goes on"
        assert len(a.store.trials()) == 3


def test_a_launch_that_was_made_without_asking_keeps_its_number_and_the_others_get_another(session_of):
    """As ``tuner ablate`` makes them: the ledger hears of them when they have ended, or never."""
    with session_of("a") as a, session_of("b") as b:
        first = a.ask()
        a.tell(first, TOLD)
        assert b.ask().number == 1
        b.store.start_trial(2, first.config, first.params, role="ablate")
        b.store.end_trial(2, b.store.trial(0).outcome)
        for asks, number in ((a, 2), (b, 4)):
            a._queue.book.enqueue_trial(dict(first.params), user_attrs={"remeasure_of": 0})
            again = asks.ask()
            assert again.number == number
            asks.tell(again, TOLD)
        assert [(t.number, t.role) for t in b.store.trials()] == [
            (0, "search"),
            (2, "ablate"),
            *((n, "search") for n in (3, 4)),
        ]


def test_an_outcome_that_could_not_be_told_is_told_at_the_end_of_the_session(session_of, monkeypatch):
    tell = ledger.tell

    def away(*_words, **_more):
        raise optuna.exceptions.StorageInternalError("the database is away")

    with session_of("b") as b:
        with session_of("a") as a:
            first = a.ask()
            monkeypatch.setattr(ledger, "tell", away)
            a.tell(first, TOLD)
            monkeypatch.setattr(ledger, "tell", tell)
        assert b.ask().config.hash != first.config.hash
        assert colours(b) == [(0, "red", False)]


def test_after_an_outage_nobody_is_taken_for_dead_before_all_could_be_heard_again(session_of, monkeypatch):
    looked = []
    monkeypatch.setattr(optuna.storages, "fail_stale_trials", lambda _book: looked.append(1))
    with session_of("a", TWO.replace("grace: 4s", "grace: 1h")) as a:
        looked.clear()
        peers_of(a).away(database.Away("connection refused"))
        a.ask()
        assert not looked
        monkeypatch.setattr(peers_of(a).pulse, "_doubt_until_s", 0.0)
        a.ask()
        assert looked


@pytest.mark.parametrize("reads", range(1, 7))
def test_a_trial_that_ends_while_another_tuner_looks_is_not_measured_again(reads, session_of, monkeypatch):
    """Outcomes are told without the turn: at any moment of the other's look, here after so many reads of the ledger."""
    with session_of("a") as a, session_of("b") as b:
        slow, quick = a.ask(), b.ask()
        assert slow is not None and quick is not None
        b.tell(quick, TOLD)
        read, done = optuna.Study.get_trials, count(1)

        def between(*args, **more):
            found = read(*args, **more)
            if next(done) == reads:
                a.tell(slow, TOLD)
            return found

        monkeypatch.setattr(optuna.Study, "get_trials", between)
        assert b.ask() is None
        assert next(done) > reads
        assert b.ask() is None
        assert [t.number for t in b.store.trials()] == [0, 1]


@pytest.mark.parametrize(("cut", "own"), [("trial", True), ("owner", False), ("claim", True)])
def test_a_claim_that_is_cut_off_between_two_writes_loses_nothing(cut, own, session_of, monkeypatch):
    """By the end of its tuner, or by the database's: the next to ask, be it another tuner, has the trial."""
    write, writes = optuna.Trial.set_user_attr, []

    def cut_off(trial, key, value):
        writes.append(key)
        if writes.count(key) == 1 and key == cut:
            raise optuna.exceptions.StorageInternalError("the database is away")
        write(trial, key, value)

    monkeypatch.setattr(optuna.Trial, "set_user_attr", cut_off)
    with session_of("a") as a, session_of("b") as b:
        assert a.ask() is None
        asked = list(iter((a if own else b).ask, None))
        assert len({proposal.config.hash for proposal in asked}) == len(asked) == 2
        assert asked[0].baseline and asked[0].repeat == 0


def test_the_folder_tells_tuners_apart_whose_machines_have_one_name_and_one_path(tmp_path):
    here, there = tmp_path / "work", tmp_path / "elsewhere"
    here.mkdir()
    mine, again = Owner.this(here), Owner.this(here)
    here.rename(there)  # as in another container
    here.mkdir()
    other = Owner.this(here)
    assert other.folder == mine.folder and not other.same_folder(mine.to_dict())
    assert again.same_folder(mine.to_dict())
    earlier = {key: value for key, value in mine.to_dict().items() if key != "mark"}
    assert other.same_folder(earlier)  # of a version that had no marks


@pytest.fixture
def on_sqlite(tmp_path):
    path = tmp_path / "study.yaml"
    text = STUDY.replace("${TUNER_TEST_DATABASE}", f"sqlite:///{tmp_path}/ledger.db")
    path.write_text(f"{text}reports: {tmp_path}\n")
    (tmp_path / "a").mkdir()
    return studyfile.load(path), Store(tmp_path / "a")


def test_a_tuner_that_waits_for_a_suspended_one_says_so_and_can_be_interrupted(on_sqlite, tmp_path, monkeypatch):
    said, cancel = [], threading.Event()
    monkeypatch.setattr(database, "LATE_S", 0.1)
    monkeypatch.setattr(database, "LEAVE_S", 0.1)

    def hear(_name, data):
        said.append(data["text"])
        cancel.set()

    suspended = database.FileHold.take(tmp_path / ".shared.ask.lock")
    with pytest.raises(KeyboardInterrupt), joined(*on_sqlite, hear, cancel=cancel):
        pass
    suspended.release()
    assert said == ["Another tuner of this study has had its turn for 0 s: is it suspended?"]


@pytest.mark.parametrize("why", [EXHAUSTED, UNFOUND])
def test_a_search_that_finds_nothing_new_ends_for_all(why):
    agreed, ways = [], iter([why])  # a second round of the loop would have nothing to say
    peers = SimpleNamespace(
        turn=nullcontext, waiting=lambda: 0, ended=lambda _budget: "", agree=lambda said, _budget: agreed.append(said)
    )
    study = SimpleNamespace(budget=Budget(launches=4))
    queue = SimpleNamespace(
        study=study, stood_back=False, catch_up=lambda: SimpleNamespace(running=()), waits=lambda: False
    )
    together = Together(peers, queue, lambda _running: "", threading.Event())
    assert together.run(lambda: next(ways)) == why and agreed == [why]


def test_what_another_tuner_verified_is_taken_over_until_there_is_more_budget_to_verify_with(on_sqlite):
    study, store = on_sqlite
    verdict = store.folder / "verify.json"

    def verify(study, launches):
        with joined(study, store, lambda _name, _data: None) as peers, peers.verifying(threading.Event()) as hold:
            if hold:
                verdict.write_text(f'{{"launches": {launches}}}')
            return hold is not None

    assert verify(study, 6) and not verify(study, 6)
    more = replace(study, budget=replace(study.budget, launches=study.budget.launches + 6))
    assert verify(more, 12) and not verify(more, 12)
    verdict.unlink()
    assert not verify(more, 0) and "12" in verdict.read_text(), "the folder has what another one's launches said"


def test_a_verification_whose_turn_the_database_forgot_launches_nothing_more(tmp_path):
    told, hold = [], database.FileHold.take(tmp_path / "lock")
    assert hold is not None
    tell = finish._while_held(lambda name, _data: told.append(name), hold)
    tell("verify-launch", {})
    hold.release()  # as by a database that was restarted
    tell("step", {})  # what runs is measured to its end
    with pytest.raises(database.Away):
        tell("verify-launch", {})
    assert told == ["verify-launch", "step"]


def test_a_verification_that_an_outage_cut_off_goes_on_when_the_database_is_back(monkeypatch):
    monkeypatch.setattr(finish, "AGAIN_S", 0.0)
    ways, said, verified = iter([database.Away("gone"), None, SimpleNamespace(alive=lambda: True)]), [], []

    @contextmanager
    def verifying_(_cancel):
        way = next(ways)
        if isinstance(way, Exception):
            raise way
        yield way

    monkeypatch.setattr(verifying, "run", lambda *_words: verified.append(1))
    peers = SimpleNamespace(verifying=verifying_, away=said.append)
    bench = Bench(None, None, threading.Event(), lambda _name, _data: None)
    finish._verify_for_all(None, None, None, bench, peers)
    assert [str(error) for error in said] == ["gone"] and not verified, "another tuner has verified meanwhile"
    finish._verify_for_all(None, None, None, bench, peers)
    assert verified == [1]


@pytest.mark.parametrize("begun_with", [RULES, ("planned_ends",), (), None])  # None: earlier versions did not write it
def test_who_joins_measures_as_the_study_does(on_sqlite, begun_with):
    pin = "parameters: {colour: green}\n"  # of which a configuration is made otherwise by the older rules
    path = Path(on_sqlite[0].source)
    path.write_text(path.read_text() + pin)
    study = studyfile.load(path)
    if begun_with != RULES:
        with database.Database(study.storage, study.name).starting():
            book = optuna.create_study(
                storage=study.storage.address({}), study_name="shared", directions=["minimize"] * 2
            )
        theirs = mirror.identity(studyfile.by(frozenset(begun_with or ()), study))
        said = {"identity": theirs, "uid": "theirs", "rules": begun_with}
        for key, value in said.items():
            if value is not None:
                book.set_user_attr(key, value)
    for _ in range(2):  # as it joins, and as it is resumed
        with session.opened(study) as store:
            ready = session.prepare(studyfile.load(Path(study.source)))
            with joined(ready.study, store, lambda _name, _data: None) as peers:
                ready = session.as_shared(ready, store, peers)
        assert ready.study.rules == studyfile.load(store.folder).rules == set(begun_with or ())


def test_who_fills_the_cache_otherwise_is_of_another_study(on_sqlite):
    study = on_sqlite[0]
    other = replace(study, trace=replace(study.trace, fill_cache_s=60.0))
    assert mirror.identity(study)["trace"] != mirror.identity(other)["trace"]


def test_neither_secrets_nor_where_the_model_lies_go_through_the_database(tmp_path):
    here, there = (
        studies.study(tmp_path / name, model=f"/{name}/model", space=replace(studies.space(), env={"OWN": name}))
        for name in ("here", "there")
    )
    store, other = Store(tmp_path / "here"), Store(tmp_path / "there")
    config = here.space.config({}, here.model)
    config = replace(
        config, env={**config.env, "HF_TOKEN": "hf_secret", "VLLM_X": "2", "PROXY": "http://bob:hunter2@proxy"}
    )
    store.start_trial(0, config, {}, started_s=1.0, model_folder=here.model)
    store.end_trial(0, Measured((studies.step(1.0, here.objective),)))
    packed = mirror.packed(here, store.trial_folder(0))
    assert not {word for word in ("hf_secret", "hunter2", "/here/model", "OWN") if word in str(mirror.expanded(packed))}
    mirror.unpacked(there, packed, other, 7, "claim", "host")
    copied = other.trial(7)
    assert copied is not None and copied.outcome == store.trial(0).outcome and mirror.elsewhere(copied) == "host"
    assert (copied.number, copied.config.model) == (7, "/there/model")
    assert copied.config.env == {"OWN": "there", "VLLM_X": "2"}


def test_another_users_lock_file_can_be_locked_without_writing_it(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch()

    def denied(*_words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tuner.study.database.os.open", denied)
    hold = database.FileHold.take(path)
    assert hold is not None and database.FileHold.take(path) is None
    hold.release()


@pytest.mark.parametrize("reads", [1, 3])
def test_a_database_that_goes_away_while_a_tuner_starts_is_an_environment_fault(reads, on_sqlite, monkeypatch):
    read, done = optuna.Study.get_trials, count(1)

    def away(*args, **more):
        if next(done) == reads:
            raise optuna.exceptions.StorageInternalError("connection refused")
        return read(*args, **more)

    monkeypatch.setattr(optuna.Study, "get_trials", away)
    with pytest.raises(EnvironmentFault, match="was not reached: connection refused"), AskTell(on_sqlite[0]):
        pass


def test_a_way_that_swallows_what_is_sent_is_given_up_at_both_ends(server):
    made = database.Database(StorageSpec(server.database()), "s")
    try:
        with made.storage.engine.connect() as one, made._locks.connect() as other:
            for link in (one, other):
                raw = link.connection.dbapi_connection
                with socket.socket(fileno=os.dup(raw.fileno())) as wire:
                    assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
                    assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                shown = link.execute(sqlalchemy.text("SHOW tcp_keepalives_idle")).scalar()
                assert shown == "30"
    finally:
        made.close()


def test_what_a_suspended_tuner_locked_in_the_middle_of_a_transaction_is_free_again(server, monkeypatch):
    monkeypatch.setitem(database._SESSION, "idle_in_transaction_session_timeout", 500)
    made = database.Database(StorageSpec(server.database()), "s")
    try:
        book = optuna.create_study(storage=made.storage, study_name="s")
        with made.storage.engine.connect() as suspended:
            suspended.execute(sqlalchemy.text("SELECT * FROM studies FOR UPDATE"))
            book.ask()
            with pytest.raises(database.Away), database.answering():
                suspended.execute(sqlalchemy.text("SELECT 1"))
        book.ask()
        assert len(book.trials) == 2
    finally:
        made.close()


def test_a_table_that_somebody_locked_and_keeps_is_waited_for_as_long_as_a_database_that_is_away(server, monkeypatch):
    import psycopg

    monkeypatch.setitem(database._SESSION, "statement_timeout", 500)
    url = server.database()
    made = database.Database(StorageSpec(url), "s")
    try:
        book = optuna.create_study(storage=made.storage, study_name="s")
        with psycopg.connect(url) as somebody:
            somebody.execute("LOCK TABLE trials IN ACCESS EXCLUSIVE MODE")
            began_s = time.monotonic()
            with pytest.raises(database.Away), database.answering():
                book.ask()
            assert time.monotonic() - began_s < 30
        book.ask()
    finally:
        made.close()


def test_a_database_that_grants_no_right_says_which_to_give(server, tmp_path):
    import psycopg

    url = server.database()
    with psycopg.connect(url, autocommit=True) as link:
        link.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
        link.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    tuner = Tuner(tmp_path, "a", f"postgresql://guest:guest@{url.partition('@')[2]}")
    assert tuner.ended() == 4
    text = tuner.log.read_text()
    assert "refuses: permission denied for schema public" in text and "GRANT CREATE ON SCHEMA public" in text


def test_another_study_of_the_same_name_is_refused(server, tmp_path):
    env = {"TUNER_TEST_DATABASE": server.database()}

    def join(name, text):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        (tmp_path / name).mkdir()
        with joined(studyfile.load(path), Store(tmp_path / name), lambda _name, _data: None, env):
            pass

    join("a", STUDY)
    join("b", STUDY)
    with pytest.raises(UsageError, match="has another load"):
        join("c", STUDY.replace("[0.5, 1]", "[0.5, 2]"))
