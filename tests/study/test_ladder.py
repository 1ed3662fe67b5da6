"""``load.ladder: auto``: the default is asked once which loads are worth measuring."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.study.fake import FakeEngine, oom
from tuner.engines.protocol import LaunchFailed
from tuner.errors import EnvironmentFault
from tuner.search import ledger
from tuner.search.model.predictor import AnalyticModel
from tuner.spec import studyfile
from tuner.spec.study import GROWS, RULES
from tuner.study import ladder, session, verifying, workload
from tuner.study.outcome import Infeasible, Measured
from tuner.study.session import Prepared
from tuner.study.store import Store

AUTO = {"ladder: [1, 2, 3, 4]": "ladder: auto"}


class Limited(FakeEngine):
    """Holds its SLOs up to ``capacity``, whatever the flags."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def launch(self, config, site):
        server = super().launch(config, site)
        measure = server.measure

        def limited(plan):
            step = measure(plan)
            return replace(step, slo_misses=("ttft_p99 too long",) if plan.load > self.capacity else ())

        server.measure = limited
        return server


def settle(runner, engine, cancel=None, predictor=None, **changes):
    study = runner.study(replace={**AUTO, **changes.get("replace", {})})
    with session.opened(study) as store:
        prepared = lambda s: Prepared(s, engine, workload.read(s), predictor, "none in this test")  # noqa: E731
        tell = lambda n, d: runner.events.append((n, d))  # noqa: E731
        return ladder.settled(study, store, cancel or threading.Event(), tell, prepared)


def traffic(runner, per_s, seconds):
    """The change to a study that replays a trace of its own."""
    lines = [f"{n / per_s:g},100,10" for n in range(per_s * seconds)]
    (runner.folder / "many.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    return {"trace: {file: trace.csv": "trace: {file: many.csv"}


def search(runner, engine, launches=6, predictor=None, replace=None):
    """As ``tuner tune``: settles the ladder, makes its launch the first trial, searches."""
    changes = {"launches: 6": f"launches: {launches}", **(replace or {})}
    study = settle(runner, engine, replace=changes)
    ready = Prepared(study, engine, workload.read(study), predictor, "none in this test")
    tell = lambda n, d: runner.events.append((n, d))  # noqa: E731
    with session.opened(runner.study(replace=AUTO | changes)) as store:
        ladder.as_trial(ready, store, runner.recorder, tell)
        session.search(ready, store, runner.recorder, threading.Event(), tell)
        return ready, session.book(ready, store, ready.out_of_reach)


@given(st.floats(0.01, 100), st.floats(0.5, 200))
@example(1.0, 1.0625)  # nothing of two digits lies between
def test_the_capacity_is_found_to_a_factor_of_1_5_with_one_probe_per_doubling(capacity, top):
    asked = []

    def holds(load):
        asked.append(load)
        return load <= capacity

    found = ladder.bracket(holds, top)
    assert found <= min(capacity, top) < found * 1.5
    assert len(asked) <= 10 and len(set(asked)) == len(asked)


def test_a_default_that_holds_nowhere_is_said():
    with pytest.raises(ladder.Unsettled, match=r"misses its SLOs even at load 0\.0078"):
        ladder.bracket(lambda load: False, 10, lowest=2**-7)


def test_the_rungs_lie_around_the_capacity_and_none_above_what_the_trace_holds():
    assert ladder.rungs(1.0, 100) == (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
    assert ladder.rungs(0.35, 100) == (0.17, 0.24, 0.35, 0.49, 0.7, 0.98)
    assert ladder.rungs(4, 5) == (2.0, 2.8, 4.0)


@given(st.floats(2**-8, 2**8), st.floats(1, 3))
def test_the_defaults_own_capacity_is_a_rung(capacity, more):
    top = capacity * more
    found = ladder.rungs(capacity, top)
    assert any(load == pytest.approx(capacity, rel=0.051) for load in found) and max(found) <= top


@pytest.mark.parametrize(
    ("top", "expected"), [(10.7462, (5.4, 7.5, 10.7)), (10.4, (5.2, 7.3, 10.0)), (1.96, (0.98, 1.4, 1.96))]
)
def test_a_ladder_that_the_trace_limits_ends_at_what_it_fills(top, expected):
    assert ladder.rungs(top, top) == expected


def test_one_launch_of_the_default_settles_the_ladder_and_a_resumed_study_keeps_it(runner):
    engine = Limited(0.25)
    study = settle(runner, engine)
    assert len(engine.launched) == 1 and not engine.alive
    assert study.load.ladder == (0.12, 0.17, 0.25, 0.35, 0.5, 0.7) and not study.load.auto
    assert studyfile.load(runner.store.folder).load == study.load
    again = settle(runner, engine)
    assert len(engine.launched) == 1
    assert again.load == study.load and again.frozen == study.frozen


def test_the_launch_that_settled_the_ladder_is_the_first_trial_and_is_paid_once(runner):
    engine = Limited(0.36)
    ready, book = search(runner, engine, launches=3)
    assert ready.study.load.ladder == (0.17, 0.25, 0.35, 0.5, 0.7, 1.0)
    assert [load for _, load in engine.measured][:5] == [1.0, 0.5, 0.25, 0.35, 0.17]  # one for the trial
    assert len(engine.launched) == 3 == len(runner.store.launched("search"))
    first, *others = runner.store.trials()
    assert first.number == 0 and first.baseline and first.role == "search" and not first.again
    assert [(s.load, s.ok) for s in first.outcome.steps] == [(0.17, True), (0.25, True), (0.35, True), (0.5, False)]
    assert all((first.folder / s.records).exists() for s in first.outcome.steps)
    assert first.params == ready.study.space.default() and first.extra["why"] == "the engine's default"
    assert "label" not in first.extra
    assert first.config.hash not in {t.config.hash for t in others} and len(others) == 2
    assert runner.recorder.trials == [0, 1, 2] and not runner.store.ladder_folder.exists()
    assert [d["trial"] for n, d in runner.events if n == "trial"] == [verifying.LADDER, 0, 1, 2]
    seen = ledger.read(book, ready.study.space)
    assert len(seen) == 3 and not seen[0].free and seen[0].outcome == first.outcome
    assert seen[0].seconds == pytest.approx(first.ended_s - first.started_s)


class Better(Limited):
    """Every configuration but the default holds ``others``."""

    def __init__(self, capacity, others):
        super().__init__(capacity)
        self.own, self.others = capacity, others

    def launch(self, config, site):
        self.capacity = self.others if self.launched else self.own
        return super().launch(config, site)


def climbed(runner, **changes):
    """The loads of the trials, the default's first; it holds .36, the others 3."""
    engine = Better(0.36, 3.0)
    ready, book = search(runner, engine, launches=3, **changes)
    assert ready.study.load.ladder == (0.17, 0.25, 0.35, 0.5, 0.7, 1.0)
    return ready.study, book, [[s.load for s in t.outcome.steps] for t in runner.store.trials()]


def test_what_holds_the_ladders_highest_load_is_asked_for_more_until_it_misses(runner):
    ladder_, more = [0.17, 0.25, 0.35, 0.5, 0.7, 1.0], [1.4, 2.0, 2.8, 4.0]
    _, _, loads = climbed(runner, replace=traffic(runner, 5, 600))
    assert loads == [ladder_[:4], ladder_ + more, ladder_ + more]
    assert [s.ok for s in runner.store.trials()[1].outcome.steps] == [True] * 9 + [False]
    assert studyfile.load(runner.store.folder).load.ladder == tuple(ladder_), "windows were cut for it"
    told = [(d["index"], d["of"]) for n, d in runner.events if n == "step" and d["trial"] == 1]
    assert told == [(n, max(n, 6)) for n in range(1, 11)], "replaying 7/7"


def test_a_ladder_grows_as_far_as_the_window_fills_a_step(runner):
    _, _, loads = climbed(runner, replace=traffic(runner, 5, 150))  # four windows of 37 s, steps of 10
    assert loads[1] == [0.17, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0]


def test_a_study_that_an_earlier_version_began_keeps_its_ladder(runner, monkeypatch):
    monkeypatch.setattr("tuner.spec.studyfile.RULES", tuple(set(RULES) - {GROWS}))
    study, _, loads = climbed(runner, replace=traffic(runner, 5, 600))
    assert loads[1] == [0.17, 0.25, 0.35, 0.5, 0.7, 1.0] and not study.grows


def test_loads_that_the_user_chose_are_all_that_is_measured(runner):
    study = runner.study(replace={"[1, 2, 3, 4]": "[0.5, 1]", **traffic(runner, 5, 600)})
    assert not study.grows and [*workload.climb(study, workload.read(study).search[0])] == [0.5, 1]


def test_a_server_that_holds_at_any_load_for_the_same_price_is_not_asked_for_ever(runner):
    """Without an SLO on latency a saturated server misses none."""
    engine = Better(0.36, 1e9)
    engine.metrics = {"goodput_output_tokens_per_s": 50.0}
    search(runner, engine, launches=2, **{"replace": traffic(runner, 5, 600)})
    assert [s.load for s in runner.store.trials()[1].outcome.steps] == [0.17, 0.25, 0.35, 0.5, 0.7, 1.0]


def test_a_slower_server_is_not_stopped_while_it_may_hold_what_the_others_did_not(runner):
    class Slower(Better):
        """The third holds more than the second, at twice its latency."""

        def launch(self, config, site):
            nth = len(self.launched)
            self.others = (0.36, 3.0, 5.0)[nth]
            server = super().launch(config, site)
            measure = server.measure

            def slow(plan):
                step = measure(plan)
                own = {key: (0.2, 0.2, 0.4)[nth] * 0.05 for key in step.metrics if key.startswith("tpot")}
                own["goodput_output_tokens_per_s"] = 100 * plan.load
                return replace(step, metrics={**step.metrics, **own})

            server.measure = slow
            return server

    search(runner, Slower(0.36, 3.0), launches=3, replace=traffic(runner, 5, 600))
    _, second, third = (t.outcome for t in runner.store.trials())
    assert isinstance(third, Measured) and second.steps[-1].load == third.steps[-2].load == 4.0


def test_a_session_that_follows_adds_no_first_trial(runner):
    search(runner, Limited(0.36), launches=2)
    engine = Limited(0.36)
    search(runner, engine, launches=2)
    assert engine.launched == [] and [t.number for t in runner.store.trials()] == [0, 1]


@pytest.mark.parametrize("why", ["untrusted", "crash"])
def test_a_ladder_that_was_not_measured_to_its_end_leaves_the_default_to_the_search(runner, why):
    engine = Limited(0.36)

    def during(_config, plan):
        if plan.load == 0.17 and len(engine.launched) == 1 and why == "crash":
            raise LaunchFailed(oom(None))

    engine.during = during
    if why == "untrusted":
        launch = engine.launch

        def doubtful(config, site):
            server = launch(config, site)
            measure = server.measure
            doubt = ("the client was late",) if len(engine.launched) == 1 else ()
            server.measure = lambda plan: replace(measure(plan), untrusted=doubt if plan.load == 0.17 else ())
            return server

        engine.launch = doubtful
    ready, _ = search(runner, engine, launches=3)
    assert ready.study.load.ladder == (0.17, 0.25, 0.35, 0.5, 0.7, 1.0)  # settled all the same
    first, *_ = runner.store.trials()
    assert first.baseline and [s.load for s in first.outcome.steps] == [0.17, 0.25, 0.35, 0.5]
    assert engine.launched[0] == engine.launched[1] == first.config.hash
    assert len(engine.launched) == 3 == len(runner.store.launched("search"))


def told(book, space):
    """What the samplers see of the default, and the trial that it is said to be."""
    (one,) = (s for s in ledger.read(book, space) if s.params == space.snap(space.default()))
    return one, book.get_trials()[one.number].user_attrs.get("trial")


def test_after_an_interrupt_the_search_learns_of_the_default_as_of_any_launch(runner):
    """The interrupted session has queued the default; told free of charge it would be no launch to the sampler."""
    cancel, engine = threading.Event(), Limited(0.36)
    cancel.set()
    study = settle(runner, engine, cancel)
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    with session.opened(runner.study(replace=AUTO)) as store:
        assert session.search(ready, store, runner.recorder, cancel, lambda *_: None) == "interrupted"
    ready, book = search(runner, engine, launches=3)
    default, trial = told(book, ready.study.space)
    assert not default.free and default.seconds > 0 and trial == 0
    assert len(engine.launched) == 3


def test_a_ladder_that_is_not_settled_makes_no_trial(runner):
    engine = Limited(0.36)
    settle(runner, engine)
    study = runner.study(replace=AUTO)  # its ladder is provisional
    with session.opened(study) as store:
        loads = replace(study.load, ladder=(0.5,))  # measured, and missed
        ready = Prepared(replace(study, load=loads), engine, workload.read(study), None, "none in this test")
        ladder.as_trial(ready, store, runner.recorder, lambda *_: None)
        assert not store.numbers()


@pytest.mark.parametrize(
    ("capacity", "lucky", "launches"),
    [
        (0.3, {0.5: True}, 2),  # it held above a rung that it missed
        (0.36, {0.17: False}, 2),
        (0.36, {0.25: False}, 1),  # no contradiction: all below held
    ],
)
def test_where_the_loads_of_that_launch_contradict_each_other_the_default_is_launched_again(
    runner, capacity, lucky, launches
):
    engine = Limited(capacity)
    launch = engine.launch

    def moody(config, site):
        server, first = launch(config, site), len(engine.launched) == 1
        measure = server.measure

        def once(plan):
            said = lucky.get(plan.load) if first else None
            step = measure(plan)
            return step if said is None else replace(step, slo_misses=() if said else ("ttft_p99 too long",))

        server.measure = once
        return server

    engine.launch = moody
    search(runner, engine, launches=3)
    first = runner.store.trial(0)
    held = [s.load for s in first.outcome.steps if s.ok]
    missed = [s.load for s in first.outcome.steps if not s.ok]
    assert held and max(held) < min(missed)
    assert engine.launched.count(first.config.hash) == launches
    assert (launches == 2) == runner.store.ladder_folder.exists()


def test_a_trace_that_arrives_at_once_has_a_ladder(runner):
    one = SimpleNamespace(search=[SimpleNamespace(arrival_s=[0.0])])
    assert ladder._top(one, runner.study()) == pytest.approx(ladder.LOWEST, rel=0.01)


def test_the_default_is_asked_for_its_answers_on_that_launch(runner, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "guard", lambda *_: lambda server, config, folder: asked.append(folder))
    settle(runner, Limited(0.36))
    assert [folder.parents[1].name for folder in asked] == ["ladder"]


def test_answers_that_an_executor_brought_home_beside_that_launch_are_the_studys(runner):
    engine = Limited(0.36)
    study = settle(runner, engine)
    (runner.store.ladder_folder / "quality.json").write_text("{}")
    ready = Prepared(study, engine, workload.read(study), None, "none in this test")
    ladder.as_trial(ready, runner.store, runner.recorder, lambda *_: None)
    assert (runner.store.folder / "quality.json").exists() and not runner.store.ladder_folder.exists()
    assert runner.store.trial(0).extra["loads"] == 5


def test_the_rungs_are_measured_with_the_prompts_of_every_trial(runner):
    engine, seeds = Limited(0.36), {}
    engine.during = lambda config, plan: seeds.setdefault(plan.load, set()).add(plan.seed)
    search(runner, engine, launches=4)
    assert all(len(seeds[load]) == 1 for load in (0.17, 0.25, 0.35))


def test_a_rung_next_to_a_load_that_was_measured_is_that_load():
    assert ladder.rungs(2.8, 100, (1.0, 2.0, 4.0, 2.8)) == (1.4, 2.0, 2.8, 4.0, 5.6, 7.8)  # not 3.9
    assert ladder.rungs(2.8, 100) == (1.4, 2.0, 2.8, 3.9, 5.6, 7.8)


def test_the_first_trial_says_what_was_predicted_of_it_at_the_rungs(runner):
    class Model:
        def predict(self, config, load):
            return SimpleNamespace(metrics={"ttft_p99_s": load})

        def fit(self, config):
            return SimpleNamespace(fits=True, short_bytes=0, reason="")

    engine = Limited(0.36)
    study = settle(runner, engine)
    ready = Prepared(study, engine, workload.read(study), Model(), "")  # pyright: ignore[reportArgumentType]
    ladder.as_trial(ready, runner.store, runner.recorder, lambda *_: None)
    (first,) = runner.store.trials()
    assert first.extra["predicted"] == {f"{load:g}": {"ttft_p99_s": load} for load in study.load.ladder}


def test_another_ladder_than_the_settled_one_is_another_study(runner):
    from tuner.errors import UsageError

    settle(runner, Limited(2.0))
    with pytest.raises(UsageError, match="begun with another load"), session.opened(runner.study()):
        pass


def test_where_nobody_can_say_the_usual_loads_stay_for_good_and_the_reason_is_said(runner):
    study = settle(runner, FakeEngine(fail=oom))
    assert study.load.ladder == studyfile.USUAL_LADDER
    assert any("The ladder stays 0.5, 1" in d["text"] for n, d in runner.events if n == "say")
    later = Limited(2.0)
    assert settle(runner, later).load.ladder == studyfile.USUAL_LADDER, "trials may have been measured at these loads"
    assert later.launched == []


@pytest.mark.parametrize("engine", [FakeEngine(fail=oom), Limited(0.0)], ids=["does not start", "holds nowhere"])
@pytest.mark.parametrize(("held", "ends"), [(0.04, (0.01, 0.16)), (100.0, (2.5, 4.99))])  # the trace fills 4.99
def test_where_the_default_cannot_say_the_ladder_lies_around_what_the_model_says_of_the_cheapest(
    runner, engine, held, ends
):
    class Model(AnalyticModel):
        def __init__(self):
            """Holds ``held`` with few sequences, half of that with many."""

        def capacity(self, config):
            return held if config.flags.get("max-num-seqs", 1024) < 256 else held / 2

        def predict(self, config, load):
            return SimpleNamespace(metrics={})

        def fit(self, config):
            return SimpleNamespace(fits=True, short_bytes=0, reason="")

    study = settle(runner, engine, predictor=Model(), replace=traffic(runner, 100, 200))
    assert (study.load.ladder[0], study.load.ladder[-1]) == ends
    assert any(
        f"predicted of the cheapest configuration (load {held:g})" in d.get("text", "") for _, d in runner.events
    )
    assert studyfile.load(runner.store.folder).load == study.load


def test_without_a_model_a_default_that_misses_everywhere_begins_the_ladder_at_the_lowest_load_tried(runner):
    many = traffic(runner, 1000, 100)  # 10,000 requests in a step: 39 at the lowest load that others are asked about
    study = settle(runner, Limited(0.0), replace=many)
    (launch,) = Store(runner.store.ladder_folder).trials()
    lowest = min(step.load for step in launch.outcome.steps)
    assert 0.001 <= lowest < 0.002 and study.load.ladder[:3] == pytest.approx(
        (lowest, 1.4 * lowest, 2 * lowest), rel=0.1
    )


def test_a_default_that_misses_is_not_asked_about_loads_that_have_no_request(runner):
    """A step of it cannot be believed, and said nothing; every trial of such a rung would end so."""
    study = settle(runner, Limited(0.0), replace=traffic(runner, 1, 60))
    (launch,) = Store(runner.store.ladder_folder).trials()
    assert min(step.load for step in launch.outcome.steps) == study.load.ladder[0]
    ready = Prepared(study, FakeEngine(), workload.read(study), None, "")  # pyright: ignore[reportArgumentType]
    assert all(workload.measured(study, window, study.load.ladder[0]) for window in ready.traffic.search)
    assert any("has no request to measure" in d.get("text", "") for _, d in runner.events)


def test_a_default_that_crashes_under_load_is_asked_for_what_it_held_before(runner):
    engine = Limited(3.0)

    def crash(_config, plan):
        assert [load for _, load in engine.measured] in ([1.0], [1.0, 2.0]), "a server that is gone is asked no more"
        if plan.load > 1:
            raise LaunchFailed(replace(oom(None), stage="under load"))

    engine.during = crash
    assert settle(runner, engine, replace=traffic(runner, 5, 200)).load.ladder == (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
    (launch,) = Store(runner.store.ladder_folder).trials()
    assert isinstance(launch.outcome, Infeasible) and len(engine.launched) == 1


def test_a_load_that_cannot_be_believed_ends_the_search_for_the_capacity_where_others_held(runner):
    engine = Limited(3.0)
    launch = engine.launch

    def late(config, site):
        server = launch(config, site)
        measure = server.measure
        doubt = ("the client was late",)
        server.measure = lambda plan: replace(measure(plan), untrusted=doubt if plan.load > 1 else ())
        return server

    engine.launch = late
    assert settle(runner, engine, replace=traffic(runner, 5, 200)).load.ladder == (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)


def test_a_failure_of_the_default_that_may_pass_leaves_the_ladder_to_a_second_launch(runner):
    engine = Limited(2.5)
    engine.fail = lambda _c: Infeasible("killed", "killed", transient=True) if len(engine.launched) == 1 else None
    assert settle(runner, engine).load.ladder != studyfile.USUAL_LADDER and len(engine.launched) == 2


@pytest.mark.parametrize("capacity", [0.25, 1.3, 2.0, 3.7])
def test_a_kill_between_the_end_of_that_launch_and_the_writing_of_its_ladder_costs_no_second_one(
    runner, monkeypatch, capacity
):
    class Killed(BaseException):
        pass

    def kill(study, _store):
        asked.append(study.load.ladder)
        raise Killed

    engine, asked, freeze = Limited(capacity), [], ladder._freeze
    monkeypatch.setattr(ladder, "_freeze", kill)
    with pytest.raises(Killed):
        settle(runner, engine)
    monkeypatch.setattr(ladder, "_freeze", freeze)
    assert [settle(runner, engine).load.ladder] == asked and len(engine.launched) == 1
    ready, _ = search(runner, engine, launches=2)
    assert len(engine.launched) == 2 and ready.study.load.ladder == asked[0]


def test_a_default_that_streams_no_completions_settles_no_ladder(runner):
    engine = Limited(2.5)
    engine.fail = lambda _c: Infeasible("no-completions", "a chat window", stage="under load", transient=True)
    with pytest.raises(EnvironmentFault, match="a chat window"):
        settle(runner, engine)
    engine.fail = None
    assert settle(runner, engine).load.ladder != studyfile.USUAL_LADDER


@pytest.mark.parametrize("stage", ["before launch", "start-up"])
def test_a_gpu_that_stays_somebody_elses_settles_no_ladder_and_costs_nothing(runner, stage):
    engine = Limited(2.5)
    engine.fail = lambda _c: Infeasible("gpu-busy", "GPU 0 is in use", stage=stage, transient=True)
    with pytest.raises(EnvironmentFault, match="GPU 0 is in use"):
        settle(runner, engine)
    assert not runner.store.launched("search")
    engine.fail = None
    assert settle(runner, engine).load.ladder != studyfile.USUAL_LADDER


def test_a_default_that_the_search_would_refuse_is_not_launched_for_the_ladder(runner, monkeypatch):
    monkeypatch.setattr(Prepared, "why_not", lambda self, config: "70 GiB short")
    engine = Limited(2.0)
    assert settle(runner, engine).load.ladder == studyfile.USUAL_LADDER
    assert engine.launched == [] and not Store(runner.store.ladder_folder).numbers()
    assert any("is refused before a launch: 70 GiB short" in d["text"] for n, d in runner.events if n == "say")


def test_what_was_measured_is_kept_where_the_default_holds_nothing(runner):
    settle(runner, Limited(0.0))
    (launch,) = Store(runner.store.ladder_folder).trials()
    assert isinstance(launch.outcome, Measured)
    assert [step.load for step in launch.outcome.steps] == [2.0**-n for n in range(4)]  # below is no request


def test_the_launch_of_the_ladder_is_shown_as_no_trial_of_the_study(runner):
    settle(runner, Limited(2.0))
    told = {name: data["trial"] for name, data in runner.events if "trial" in data}
    assert {"launch", "step", "measured", "trial"} <= set(told) and set(told.values()) == {verifying.LADDER}


def test_an_interrupt_leaves_the_ladder_to_the_next_session(runner):
    cancel = threading.Event()
    cancel.set()
    assert settle(runner, Limited(2.0), cancel).load.auto
    assert settle(runner, Limited(0.3)).load.ladder == (0.12, 0.17, 0.25, 0.35, 0.5, 0.7)


def test_a_flag_may_name_a_fact_of_the_machine(runner):
    runner.text = runner.text.replace("engine: {kind: vllm}", "engine: {kind: vllm, args: {dtype: $native_dtype}}")
    study = runner.study()
    assert study.space.fixed["dtype"] == study.space.facts["native_dtype"] in ("bfloat16", "float32")


def test_a_fact_that_does_not_exist_is_one_clear_line(runner):
    from tuner.errors import UsageError

    runner.text = runner.text.replace("engine: {kind: vllm}", "engine: {kind: vllm, args: {dtype: $native_type}}")
    with pytest.raises(UsageError, match="no such fact: native_type") as raised:
        runner.study()
    assert "native_dtype" in str(raised.value.fix)


@pytest.mark.parametrize(("hardware", "seconds"), [("{gpu: H100-SXM, gpus: 2}", 110), ("{gpu: cpu}", 60)])
def test_what_search_and_budget_guess_of_a_start_is_one_guess(runner, hardware, seconds):
    changes = {"hardware: {gpu: H100-SXM, gpus: 2}": f"hardware: {hardware}", "sampler: random": "sampler: auto"}
    study = runner.study(replace=changes)
    ready = Prepared(study, FakeEngine(), workload.read(study), None, "none in this test")
    with session.opened(study) as store:
        guess = session.book(ready, store, ready.out_of_reach).sampler.cost
    steps_s = guess.step_s * len(study.load.ladder)
    assert guess.start_s == session.launch_seconds(ready) - steps_s == seconds
