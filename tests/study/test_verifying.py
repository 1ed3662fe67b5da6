import contextlib
import math
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import studies
from tuner.engines.protocol import Cancelled, LaunchFailed
from tuner.errors import EnvironmentFault, UsageError
from tuner.executor.protocol import NodeLost, Place
from tuner.spec.study import Budget
from tuner.spec.studyfile import parse_budget
from tuner.study import budget, verifying
from tuner.study.outcome import Aborted, Boot, Infeasible, Measured
from tuner.study.store import Store, read_json, write_json
from tuner.verify.arm import Finalist

WINDOWS = [SimpleNamespace(name=f"held-out-{i}") for i in range(5)]


@pytest.fixture
def made(tmp_path):
    """A study of USD 20 for 2.50 per GPU-hour, of which a launch of a minute is spent."""
    store = Store(tmp_path / "s")
    studies.measured(0, (studies.step(1.0, studies.objective()),), store, baseline=True)
    study = studies.study(tmp_path / "s", budget=Budget(launches=None, hours=None, usd=20.0, verify_share=0.2))
    return SimpleNamespace(study=study, traffic=SimpleNamespace(heldout=WINDOWS[:1])), store


def arm(study, gpus, trial=None):
    config = replace(study.space.config({}, study.model), gpus=gpus)
    return Finalist(f"{gpus} GPUs", config, 1.0, trial=trial)


def test_a_verification_lasts_as_long_as_its_dearest_configuration_can_be_paid(made):
    ready, store = made
    left_usd = 20 - 2.5 / 60
    for gpus in (1, 8):
        within, _ = verifying.limits(ready, store, [arm(ready.study, 1), arm(ready.study, gpus)])
        assert within.seconds == pytest.approx(left_usd / (2.5 * gpus) * 3600)


def test_a_verification_has_the_hours_that_the_search_left(made):
    ready, store = made
    ready.study = replace(ready.study, budget=Budget(launches=None, hours=0.5, usd=None, verify_share=0.2))
    within, _ = verifying.limits(ready, store, [arm(ready.study, 1)])
    assert within.seconds == pytest.approx(1800 - 60)


def test_the_time_that_is_left_bounds_the_arms_by_three_rounds_of_what_their_launches_take(made):
    ready, store = made
    arms = [arm(ready.study, gpus) for gpus in (1, 2, 3, 4)]
    step = studies.step(1.0, studies.objective())
    for minutes, most in ((26, 2), (29, 3), (5, 2)):  # one is spent; a launch is three steps of a minute
        hours = Budget(launches=None, hours=minutes / 60, usd=None, verify_share=0.2)
        ready.study = replace(ready.study, budget=hours)
        within, _ = verifying.limits(ready, store, arms)
        assert within.launch_s == pytest.approx(180) and within.arms == most
    ready.study = replace(ready.study, budget=Budget(launches=None, hours=29 / 60, usd=None, verify_share=0.2))
    arms[0] = replace(arms[0], config=store.trials()[0].config)
    for number in range(1, 9):
        studies.measured(number, (step,), store, role="verify", label=f"verify {number} default")
        within, _ = verifying.limits(ready, store, arms)
        assert within.arms == 3, "those that were launched before count as they did"


def test_where_time_is_short_it_is_verified_on_fewer_windows_over_the_whole_trace_and_those_stay(made):
    ready, store = made
    ready.traffic, ready.study = SimpleNamespace(heldout=WINDOWS), replace(ready.study, frozen={})

    def on(minutes):  # one is spent; a launch is three steps of a minute on each window
        hours = Budget(launches=None, hours=(minutes + 1) / 60, usd=None, verify_share=0.2)
        ready.study = replace(ready.study, budget=hours)
        return [w.name[-1] for w in verifying.limits(ready, store, [arm(ready.study, 1)])[1]]

    assert on(4 * 15 + 1) == ["0", "1", "2", "3", "4"] and on(4 * 15 - 1) == ["0", "1", "3", "4"]
    assert on(4 * 12 - 1) == on(5) == ["0", "2", "4"]
    ready.study = replace(ready.study, trace=replace(ready.study.trace, heldout_windows=5))
    assert on(5) == ["0", "1", "2", "3", "4"], "which the study asks for"
    ready.study = replace(ready.study, trace=replace(ready.study.trace, heldout_windows=None))
    steps = tuple(replace(studies.step(1.0, studies.objective()), window=WINDOWS[i].name) for i in (1, 3))
    studies.measured(1, steps, store, role="verify", label="verify 1 default")
    assert on(1000) == ["1", "3"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Cancelled, "interrupted"),
        (lambda: NodeLost("node 2 is gone"), "node 2 is gone"),
        (lambda: EnvironmentFault("a client process ended", fix="Run it again"), "a client process ended"),
    ],
)
def test_a_launch_of_verification_that_was_broken_off_costs_no_launch(tmp_path, fault, reason):
    study, store = studies.write(tmp_path / "s", trials=3)
    rig = SimpleNamespace(boot=Boot(), place=Place())
    where = SimpleNamespace(rig=lambda _job: contextlib.nullcontext(rig), seconds=lambda _number: 3.0, left_over=())
    ready = SimpleNamespace(study=study, notes=lambda _config: {})
    launch = verifying.launcher(ready, store, verifying.Nobody(), where, lambda _name, _data: None, "verify")
    before = store.launched("verify")
    with (
        contextlib.suppress(Cancelled, NodeLost, EnvironmentFault),
        launch(study.space.config({}, study.model), "default"),
    ):
        raise fault()
    assert store.trials()[-1].again and store.launched("verify") == before
    assert store.trials()[-1].outcome == Aborted(reason)


def test_a_launch_that_fails_is_charged_at_the_price_of_its_type_of_gpu(tmp_path):
    study, store = studies.write(tmp_path / "s", trials=1)
    study = replace(study, objective=replace(study.objective, prices={"H100-SXM": 10.0}))

    @contextlib.contextmanager
    def rig(_job):
        raise LaunchFailed(Infeasible("oom-kv", "no room"))
        yield

    where = SimpleNamespace(rig=rig, seconds=lambda _number: 3600.0, left_over=())
    ready = SimpleNamespace(study=study, notes=lambda _config: {})
    launch = verifying.launcher(ready, store, verifying.Nobody(), where, lambda _name, _data: None, "verify")
    config = replace(study.space.config({}, study.model), gpu="H100-SXM")
    with pytest.raises(LaunchFailed), launch(config, "trial 1"):
        pass
    assert budget.spent(study, store.trials()[1:]).usd == pytest.approx(10.0)


@pytest.mark.parametrize("more", [{"launches": 20}, {"hours": 2.0}, {"usd": 5.0}])
def test_what_verification_took_beyond_its_share_the_search_has_no_more(tmp_path, more):
    """A share of a half was verified; the next session keeps nothing back."""
    study, store = studies.write(tmp_path / "s", trials=1)
    (one,) = store.trials()
    took = [replace(one, started_s=360.0 * i, ended_s=360.0 * (i + 1)) for i in range(20)]
    study = replace(study, budget=Budget(**more, verify_share=0.0))
    search = budget.spent(study, took[:10])
    assert not budget.search_is_over(study, search) and not budget.search_is_over(study, search, search)
    assert not budget.search_is_over(study, search, budget.spent(study, took[:19]))
    after = budget.spent(study, [*took[:10], took[19]])
    assert not budget.search_is_over(study, after) and budget.search_is_over(study, after, budget.spent(study, took))


@pytest.fixture
def ablated(tmp_path, monkeypatch):
    """``tuner ablate`` on a verified study, with what is launched made up; says how it ended."""
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    winner = studies.verification(study, store).config
    assert winner
    ready, asked = SimpleNamespace(study=study, traffic=SimpleNamespace(heldout=WINDOWS[:2])), []
    monkeypatch.setattr(verifying, "executor", lambda _bench: contextlib.nullcontext())

    def ablate(_study, _launch, finalist, windows, budget, _on_event, *, done):
        asked[:] = windows
        found = studies.ablation(study, finalist.config, "max_num_batched_tokens")
        return replace(found, budget=budget.launches, launches=budget.launches - 1)

    monkeypatch.setattr(verifying, "ablate", ablate)

    def run(launches):
        bench = SimpleNamespace(on_event=lambda _name, _data: None)
        return verifying.minimal(ready, store, verifying.Nobody(), bench, launches)

    run.asked = asked
    return run, store.folder / "ablation.json", study


@pytest.mark.parametrize("launches", [-3, 0, 1, 9])
def test_an_ablation_that_could_test_nothing_is_refused_and_writes_nothing(ablated, launches):
    run, path, _ = ablated
    with pytest.raises(UsageError, match=f"^{launches} launches cannot test a single parameter. Give --launches 10"):
        run(launches)
    assert not path.exists() and run(10).budget == 10


def test_an_ablation_by_fewer_launches_does_not_replace_one_by_more(ablated):
    run, path, study = ablated
    run(20)
    written = path.read_text()
    with pytest.raises(UsageError, match=r"ablation\.json: holds what up to 20 launches said\. Give --launches 20"):
        run(19)
    assert path.read_text() == written
    run(20)
    earlier = {name: value for name, value in read_json(path).items() if name not in ("winner", "budget")}
    write_json(path, earlier)  # as versions wrote it that did not note what was allowed
    with pytest.raises(UsageError, match="19 launches"):
        run(18)
    run(19)
    other = studies.ablation(study, study.space.config({"max_num_seqs": 64}, study.model), "max_num_seqs")
    write_json(path, replace(other, budget=99).to_dict())
    assert run(12).budget == 12  # another winner's is replaced


def test_an_ablation_measures_the_windows_that_verification_did(ablated):
    run, path, study = ablated
    run(20)
    assert run.asked == WINDOWS[:2], "of the others nothing is left here"
    step = replace(studies.step(1.0, study.objective), window=WINDOWS[1].name)
    studies.measured(99, (step,), Store(path.parent), role="verify", label="verify 9 default")
    run(20)
    assert run.asked == WINDOWS[1:2]


def test_gpus_of_another_price_are_paid_at_theirs(made):
    ready, store = made
    studies.measured(1, (studies.step(1.0, studies.objective()),), store, price_usd_per_gpu_hour=10.0)
    within, _ = verifying.limits(ready, store, [arm(ready.study, 2, trial=1)])
    assert within.seconds == pytest.approx((20 - 12.5 / 60) / 20 * 3600)


@pytest.fixture
def settling(tmp_path, monkeypatch):
    """A verified study whose verdict lacks six launches; ``again`` verifies with a budget and says who was launched,
    with how many launches allowed."""
    study, store = studies.write(tmp_path / "a study", trials=24, verified=True)
    written = verifying.verification(store)
    assert written
    write_json(store.folder / verifying.VERIFIED, replace(written, more=6).to_dict())
    step = studies.step(1.0, studies.objective())
    params = {"default": {}} | {f"trial {t.number}": t.params for t in store.trials()}
    for number, arm in enumerate((*written.arms, *written.arms), start=max(t.number for t in store.trials()) + 1):
        studies.measured(number, (step,), store, params=params[arm.label], role="verify", label=arm.label)
    monkeypatch.setattr(verifying, "executor", lambda _bench: contextlib.nullcontext())
    ready = SimpleNamespace(study=study, traffic=SimpleNamespace(heldout=WINDOWS[:1]))

    def again(within, made=4):
        seen = []

        def verify(_study, _launch, finalists, baseline, _windows, allowed, _on_event, **more):
            seen.append(([arm.label for arm in (baseline, *finalists)], allowed.launches, len(more["done"])))
            return replace(written, more=0, launches=made)

        monkeypatch.setattr(verifying, "verify", verify)
        ready.study = replace(study, budget=within)
        bench = SimpleNamespace(on_event=lambda name, data: seen.append(data["text"]))
        verifying.run(ready, store, verifying.Nobody(), bench)
        return seen

    return again, study, store, [arm.label for arm in written.arms]


@pytest.mark.parametrize(("launch_h", "searches_h"), [(0.1, 2.8), (0.6, 2.8), (0.8, 2.4), (1.0, 2.0), (1.1, 2.8)])
def test_two_launches_are_kept_for_verification_where_its_share_has_no_room_for_them(launch_h, searches_h):
    """Of four hours and 30 %, unless they would take over half of them."""
    assert budget.without(0.3, 4.0, launch_h) == pytest.approx(searches_h)
    assert budget.without(0.0, 4.0, launch_h) == 4.0 and budget.without(0.3, math.inf, launch_h) == math.inf


@pytest.mark.parametrize(("more", "left"), [({"hours": 1.0}, "of 0.5833 h"), ({"usd": 10.0}, "of 5.83 USD")])
def test_the_search_ends_early_enough_for_what_verification_takes(tmp_path, more, left):
    """Six minutes and a dollar a launch, and twelve and a half minutes in verification: a share of 30 % has no room for
    two of those."""
    study, store = studies.write(tmp_path / "s", trials=1)
    (one,) = store.trials()
    objective = replace(study.objective, price_usd_per_gpu_hour=10.0)
    study = replace(study, budget=Budget(**more, verify_share=0.3), objective=objective)
    took = [replace(one, started_s=360.0 * i, ended_s=360.0 * (i + 1), extra=None) for i in range(5)]
    used = budget.spent(study, took)
    assert used.launch_usd == pytest.approx(1.0) and not budget.search_is_over(study, used)
    assert left in budget.search_is_over(study, used, verify_s=750.0)


def test_what_runs_counts_as_the_dearest_so_far_and_more_while_few_have_ended(tmp_path):
    study, store = studies.write(tmp_path / "s", trials=1)
    (one,) = store.trials()
    study = replace(study, objective=replace(study.objective, price_usd_per_gpu_hour=10.0))
    took = [replace(one, started_s=0.0, ended_s=3600.0), replace(one, started_s=600.0, ended_s=2400.0)]
    used = budget.spent(study, took, running=2)
    assert used == budget.Spent(4, 1.0, 15.0 + 2 * 10.0 * (1 + 1 / 2), 2700.0, 7.5)
    assert budget.spent(study, [], running=1, guess_usd=3.0) == budget.Spent(1, 0.0, 3.0 * 2, 0.0, 3.0)
    verified = replace(one, role="verify")
    assert budget.of_search([one, verified]) == [one]
    assert budget.for_search(Budget(launches=30, verify_share=0.9)) == 3  # though 30 x (1 - .9) is a little less


@pytest.mark.parametrize(
    ("took_s", "extra", "expected_s"),
    [
        (360.0, None, 60 + 6 * 300 / 4),
        (360.0, {"loads": 10}, 60 + 6 * 300 / 10),  # steps that are no part of the trial took their time
        (40.0, None, 6 * 40 / 4),  # emulated, and timed by the wall, as an earlier version did
    ],
)
def test_a_launch_of_verification_takes_a_start_and_its_steps(tmp_path, took_s, extra, expected_s):
    _study, store = studies.write(tmp_path / "s", trials=1)
    (one,) = store.trials()
    outcome = Measured((one.outcome.steps * 4)[:4], Boot(60.0, {}, {}))
    trial = replace(one, started_s=100.0, ended_s=100.0 + took_s, extra=extra, outcome=outcome)
    assert budget.verify_launch_s([trial], 2) == pytest.approx(expected_s)
    assert budget.verify_launch_s([], 2) == 0


def told(study, store, more):
    """The budget of the command that gives verification ``more`` launches."""
    words = shlex.split(verifying._go_on(study, store, more).partition(": ")[2])
    assert words[:4] == ["tuner", "tune", str(store.folder), "--budget"]
    return replace(parse_budget(words[4]), verify_share=float(words[6]))


def test_the_command_that_settles_a_verdict_gives_what_it_lacks_to_those_verified_and_the_search_nothing(settling):
    again, study, store, labels = settling
    within = told(study, store, 6)
    spent = budget.spent(study, store.launched("search"))
    assert budget.search_is_over(replace(study, budget=within), spent)
    _text, (launched, launches, done) = again(within)
    assert launched == labels and launches == 4 + 6 and done == 4
    _text, (launched, *_rest) = again(told(study, store, 20))
    assert len(launched) > len(labels), "more than it lacked: others may be the cheapest, too"


def test_what_was_searched_since_is_verified(settling):
    again, study, store, _labels = settling
    number = max(t.number for t in store.trials()) + 1
    cheap = studies.step(3.0, studies.objective(), tokens_per_s=9000)
    studies.measured(number, (cheap,), store, params={"max_num_seqs": 512})
    _text, (launched, *_rest) = again(told(study, store, 6))
    assert f"trial {number}" in launched


def test_a_launch_of_who_is_no_finalist_any_more_is_paid(settling):
    again, study, store, _labels = settling
    number = max(t.number for t in store.trials()) + 1
    other = {"max_num_seqs": 64, "prefix_caching": False}
    studies.measured(number, (studies.step(1.0, studies.objective()),), store, params=other, role="verify", label="x")
    _text, (_launched, launches, _done) = again(told(study, store, 6))
    assert launches == 4 + 6


def test_the_ladders_launch_is_counted_once(settling):
    _again, study, store, _labels = settling
    before = told(study, store, 6)
    step = studies.step(1.0, studies.objective())
    studies.measured(0, (step,), Store(store.ladder_folder), role=verifying.LADDER, baseline=True)
    after = told(study, store, 6)
    assert after.launches == before.launches + 1


def test_an_emulated_verification_is_timed_by_what_its_launches_took(settling, monkeypatch):
    _again, study, store, _labels = settling
    seen, last = [], store.trials()[-1]

    def verify(*_given, clock, **_more):
        seen.append(clock())
        studies.measured(last.number + 1, last.outcome.steps[:1], store, params=last.params, role="verify")
        seen.append(clock())
        raise UsageError("enough")

    monkeypatch.setattr(verifying, "verify", verify)
    ready = SimpleNamespace(study=replace(study, budget=Budget(launches=90, verify_share=0.5)))
    ready.traffic, ready.engine = SimpleNamespace(heldout=WINDOWS[:1]), SimpleNamespace(emulated=True)
    with pytest.raises(UsageError, match="enough"):
        verifying.run(ready, store, verifying.Nobody(), SimpleNamespace(on_event=lambda *_: None))
    before_s, after_s = seen
    assert after_s - before_s == pytest.approx(60)


def test_where_nothing_is_left_a_verified_study_is_not_called_unverified(settling):
    again, study, _store, _labels = settling
    (text,) = again(replace(study.budget, launches=4))
    assert text.startswith("Not verified further: ")


def test_a_verification_that_could_launch_nothing_does_not_replace_what_was_proven(settling):
    again, study, store, _labels = settling
    before = (store.folder / verifying.VERIFIED).read_text()
    *_, text = again(told(study, store, 6), made=0)
    assert text.startswith("Not verified further: ")
    assert (store.folder / verifying.VERIFIED).read_text() == before


def test_a_budget_below_what_was_spent_pays_nothing_and_keeps_the_launches_that_are_known(settling):
    again, study, store, _labels = settling
    spent = budget.spent(study, store.launched("search", "verify")).launches
    _text, (_launched, launches, done) = again(replace(study.budget, launches=spent - 1))
    assert launches == done == 4


def test_what_is_recommended_for_its_latency_is_not_taken_apart_for_cost(ablated):
    run, path, _study = ablated
    written = verifying.verification(Store(path.parent))
    write_json(path.parent / verifying.VERIFIED, replace(written, reason="faster").to_dict())
    with pytest.raises(UsageError, match=r"recommended for its latency, .* Keep its flags"):
        run(20)
    assert not path.exists()
