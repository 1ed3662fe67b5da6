import contextlib
import dataclasses
import math

import pytest

from benchmarks.verify.ablation import FLAGS, on, run, space, two_of_six
from benchmarks.verify.machine import Machine, Noise, window
from benchmarks.verify.small_study import LATENCY, THROUGHPUT, study
from tests.verify.test_verification import Keeping, Unserved
from tuner.engines.protocol import LaunchFailed
from tuner.study.outcome import Infeasible, Measured
from tuner.verify.ablation import AblationBudget, _Bench, _corrected, ablate
from tuner.verify.arm import Finalist, Launched
from tuner.verify.rounds import Done, Rounds
from tuner.verify.statistics import Estimate

QUIET = Noise(launch=0.004, drift=0.004, stalls=0.0)
WINDOWS = [window(90 + i, name=f"heldout-{i}") for i in range(3)]


def quiet(
    speed, launches=60, flags=FLAGS, fails=None, scenario=THROUGHPUT, load=3.0, unserved="", done=None, wrap=None
):
    """An ablation on a machine with little noise, so that every test is about the rule, not about luck. ``done`` are
    launches made before; those made now are added."""
    before = tuple(done or ())
    spec = dataclasses.replace(study(scenario, ("v0",), 1, 100), space=space())
    machine = Machine(speed, spec.objective, 1, QUIET)

    @contextlib.contextmanager
    def launch(config, label):
        if fails and fails(config):
            raise LaunchFailed(Infeasible("oom", "out of memory"))
        with machine.launch(config, label) as rig:
            kept = Keeping(Unserved(rig, "heldout-1") if label == unserved else wrap(rig, config) if wrap else rig)
            yield kept
        if done is not None:
            done.append(Done(label, config.hash, Measured(tuple(kept.steps))))

    winner = Finalist("winner", spec.space.config(dict.fromkeys(flags, True), "m"), load)
    return ablate(spec, launch, winner, WINDOWS, AblationBudget(launches), done=before), machine


def test_of_six_flags_the_two_that_matter_are_kept_with_their_effects():
    found, _ = quiet(two_of_six)
    assert sorted(found.params) == ["b", "e"]
    effects = {e.parameter: e for e in found.effects}
    assert effects["b"].cost_without[1] < 1.10 < effects["b"].cost_without[2] * 1.02
    assert effects["b"].why == "its effect is proven"
    assert not effects["a"].kept and effects["a"].why == "no effect is proven"
    assert sorted(found.config.flags) == ["flag-b", "flag-e"]
    assert found.cost_change[0] == pytest.approx(1.0, abs=0.02)
    assert found.arm and found.arm.holds and f"At load {found.arm.load:.3g} it costs $" in found.text
    assert found.arm.load_cost[1] < found.arm.load_cost[0] < found.arm.load_cost[2] < math.inf


def test_a_flag_that_pays_in_latency_alone_is_kept_and_says_so():
    """The capacity is bounded by something else: only the time per token is worse without c."""
    key = study(LATENCY, ("v0",), 1, 100).objective.latency_key

    class Slower:
        def __init__(self, rig, config):
            self.rig, self.config = rig, config

        def measure(self, *at):
            step = self.rig.measure(*at)
            factor = 0.1 if on(self.config, "c") else 0.2  # far below its limit with either
            return dataclasses.replace(step, metrics={**step.metrics, key: factor * step.metrics[key]})

    found, _ = quiet(two_of_six, wrap=Slower)
    effects = {e.parameter: e for e in found.effects}
    assert effects["c"].kept and effects["c"].why == "its effect on latency is proven"
    assert effects["c"].latency_without[1] > 1.6 and abs(effects["c"].cost_without[0] - 1) < 0.02
    assert not effects["a"].kept and "latency" not in effects["a"].why
    assert "against the winner's" in found.text


def test_flags_that_stand_in_for_each_other_are_not_both_dropped():
    """Set back alone, neither b nor e shows an effect; without both the server is 10 % slower."""
    found, _ = quiet(lambda config: 1.1 if on(config, "b") or on(config, "e") else 1.0)
    assert {"b", "e"} & found.params.keys()
    assert any(e.why == "needed together with others" for e in found.effects)


@pytest.mark.parametrize(("launches", "kept"), [(18, "be"), (24, "b")])
def test_of_flags_that_stand_in_for_each_other_one_goes_where_launches_are_left_to_measure_the_rest(launches, kept):
    found, machine = quiet(lambda config: 1.1 if on(config, "b") or on(config, "e") else 1.0, launches, "be")
    assert sorted(found.params) == list(kept) and len(machine.labels) == launches


@pytest.mark.parametrize(("launches", "looks"), [(29, 1), (30, 2)])
def test_flags_return_one_by_one_while_launches_are_left_to_look_twice_again(launches, looks):
    """Each of two is worth a little alone, and together more: with the launches for one look more both return."""
    found, machine = quiet(lambda config: (1.0, 1.065, 1.1)[on(config, "b") + on(config, "e")], launches, "be")
    assert sorted(found.params) == ["b", "e"]
    assert len({label.split(" ", 2)[2] for label in machine.labels if "keeping" in label}) == looks


def test_a_flag_is_set_back_again_until_its_effect_is_proven_and_no_longer():
    found, machine = quiet(lambda config: 0.96 ** (2 - on(config, "b") - on(config, "e")))
    assert {e.parameter for e in found.effects if e.why == "its effect is proven"} == {"b", "e"}
    rounds = {name: sum(f"without {name}" in label for label in machine.labels) for name in FLAGS}
    assert rounds == {**dict.fromkeys(FLAGS, 4), "e": 3}


def test_without_any_effect_the_smallest_config_is_the_default():
    found, machine = quiet(lambda _config: 1.0)
    assert found.params == {} and found.config.flags == {}
    assert sum("without a" in label for label in machine.labels) == AblationBudget(60).alone
    assert AblationBudget(3).tests == 0


def test_what_is_left_is_measured_where_it_is_promised(monkeypatch):
    """Where no launch of it measured a load as low; in the later of the rounds in which it stands beside the winner."""
    judged = _Bench.beside_the_winner
    monkeypatch.setattr(
        _Bench,
        "beside_the_winner",
        lambda self, small: dataclasses.replace(judged(self, small), load=0.123, at_most=True),
    )
    done: list[Done] = []
    quiet(two_of_six, done=done)
    low = [d.label for d in done for s in d.outcome.steps if s.load == 0.123]
    joint = sorted({d.label for d in done if "keeping" in d.label}, key=lambda label: int(label.split()[1]))
    assert len(joint) > 1 and set(low) == set(joint[1:]) and len(low) == len(WINDOWS) * len(joint[1:])


def test_a_flag_without_which_the_server_does_not_start_is_kept_and_says_so():
    found, _ = quiet(lambda _config: 1.0, fails=lambda config: not on(config, "c"))
    assert list(found.params) == ["c"]
    assert "out of memory" in next(e.why for e in found.effects if e.parameter == "c")


def test_a_passing_failure_proves_no_flag_unless_it_comes_twice(monkeypatch):
    killed = Infeasible("killed", "somebody killed it", transient=True)
    measure = Rounds._measure
    for rounds, kept in (("1",), []), (("1", "2"), ["c"]):

        def failing(self, arm, label, those=tuple(f"ablate {n} without c" for n in rounds)):
            return Launched(arm.label, self.number, (), killed) if label in those else measure(self, arm, label)

        monkeypatch.setattr(Rounds, "_measure", failing)
        assert list(quiet(lambda _config: 1.0)[0].params) == kept


def test_a_flag_without_which_the_slos_hold_nowhere_is_kept_and_says_so():
    found, _ = quiet(lambda config: 1.0 if on(config, "d") else 0.1, scenario=LATENCY, load=1.0)
    assert list(found.params) == ["d"]
    assert "hold at no load" in next(e.why for e in found.effects if e.parameter == "d")


def test_what_crashed_in_one_of_its_launches_is_not_what_is_left():
    tries = []

    def fails(config):
        tries.append(not any(on(config, flag) for flag in FLAGS))
        return tries[-1] and sum(tries) == 2

    assert quiet(lambda _config: 1.0, fails=fails)[0].params


def test_an_effect_that_is_not_worth_a_flag_is_no_reason_to_keep_it():
    doubts = _corrected({name: Estimate(gain, ((1e-6, 30.0),)) for name, gain in (("a", 0.02), ("b", 0.005))}, 0.01)
    assert doubts["a"] < 0.001 and doubts["b"] > 0.99


def test_a_flag_without_which_a_launch_served_nothing_is_kept_and_says_so():
    found, _ = quiet(lambda _config: 1.0, unserved="ablate 2 without c")
    assert list(found.params) == ["c"]
    assert "without it: served nothing" in next(e.why for e in found.effects if e.parameter == "c")


def test_a_winner_that_served_nothing_in_some_launch_loses_no_flag():
    found, _ = quiet(lambda _config: 1.0, unserved="ablate 2 winner")
    assert sorted(found.params) == list(FLAGS)
    assert all("the winner itself served nothing" in e.why for e in found.effects)


def test_flags_are_kept_where_there_are_too_few_launches_to_judge_them():
    found, machine = quiet(two_of_six, launches=12)
    assert len(machine.labels) <= 12
    unmeasured = [e for e in found.effects if "too few launches" in e.why]
    assert unmeasured and all(e.kept for e in unmeasured)
    earned = sum(e.kept for e in found.effects) - len(unmeasured)
    assert found.text.startswith(f"{earned} of 6 parameters earn") and "takes --launches 20" in found.text
    assert quiet(two_of_six, launches=20)[0].text.count("--launches") == 0


def test_it_never_launches_more_than_the_budget():
    for launches in (0, 20, 30):
        assert len(quiet(lambda _config: 1.0, launches)[1].labels) <= launches


def test_launches_of_another_winner_are_not_taken_for_this_ones():
    """Without b, the first winner still has d, which is slow: b would seem to be worth what d costs."""
    done = []
    quiet(lambda config: 0.8 if on(config, "d") else 1.0, flags="bd", done=done)
    found, machine = quiet(lambda config: 0.8 if on(config, "d") else 1.0, flags="bc", done=done)
    assert "ablate 1 without b" in machine.labels
    assert next(e for e in found.effects if e.parameter == "b").cost_without[0] == pytest.approx(1.0, abs=0.02)
    again, machine = quiet(lambda _config: 1.0, flags="bc", done=done)
    assert again == found and machine.labels == []


def test_the_default_has_nothing_to_set_back():
    found, machine = quiet(two_of_six, flags=())
    assert found.effects == () and machine.labels == []
    assert "nothing to set back" in found.text


@pytest.mark.slow
def test_with_the_noise_of_real_launches_the_two_flags_are_found_nine_times_in_ten():
    found = [frozenset(run(two_of_six, seed).params) for seed in range(20)]
    assert sum(kept == frozenset("be") for kept in found) >= 16
