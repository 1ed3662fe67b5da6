import contextlib
import dataclasses
import math

import numpy as np
import pytest

from benchmarks.verify.machine import Machine, Noise
from benchmarks.verify.small_study import LATENCY, study
from tests.verify.test_promise import MARK
from tests.verify.test_verification import WINDOWS, Unserved
from tuner.engines.protocol import LaunchFailed
from tuner.errors import EnvironmentFault, UsageError
from tuner.spec.slo import Slo
from tuner.study.outcome import Infeasible, Step
from tuner.verify.certify import recertify
from tuner.verify.promise import Promise
from tuner.verify.repeats import Spread
from tuner.verify.statistics import Estimate

STUDY = study(LATENCY, ("v0",), 1, 10)


def machine(speed: float, seed: int = 3) -> Machine:
    return Machine(lambda _config: speed, STUDY.objective, seed, Noise(launch=0.01, drift=0.01))


def promised(load: float = 0.8) -> Promise:
    """What a machine of speed 1 does at ``load`` on the same windows."""
    config = STUDY.space.config({}, "m")
    with machine(1.0, seed=9).launch(config, "x") as rig:
        steps = [rig.measure(load, w, w.name) for w in WINDOWS]
    cost, ttft = (sum(s.metrics[key] for s in steps) / len(steps) for key in ("cost_usd_per_mtok_output", "ttft_p99_s"))
    around = [(value, value * 0.93, value * 1.07) for value in (cost, ttft)]
    slos = STUDY.objective.slos
    return Promise("chat", 1, config, load, slos, around[0], "ttft_p99", around[1], MARK, Spread(0.0002, 10))


def certificate(speed: float, **more):
    return recertify(promised(), machine(speed).launch, WINDOWS, more.pop("now", MARK), **more)


def test_the_same_machine_keeps_its_promise():
    found = certificate(1.0)
    assert found.holds and found.launches == 2
    assert "promise holds" in found.text and "Nothing of the fingerprint has changed" in found.text


def test_a_machine_that_is_much_slower_breaks_it_with_the_figure():
    found = certificate(0.6)
    assert not found.holds and "BROKEN: ttft_p99" in found.text


def broken(promise: Promise, speed: float = 1.0) -> list[str]:
    """The names of what does not hold."""
    found = recertify(promise, machine(speed).launch, WINDOWS, MARK)
    return [check.name for check in found.checks if not check.holds]


def test_an_slo_that_is_missed_breaks_the_promise_on_its_own():
    strict = (Slo("ttft_p99", promised().latency[0] / 10),)
    assert broken(dataclasses.replace(promised(), slos=strict)) == ["slos"]


def test_a_window_on_which_nothing_was_served_breaks_the_promise_however_well_the_others_go():
    loose = tuple(Slo(slo.metric, slo.limit * 1e3) for slo in promised().slos)  # the mean margin is far off

    @contextlib.contextmanager
    def launch(config, label):
        with machine(1.0).launch(config, label) as rig:
            yield Unserved(rig, "heldout-1") if label == "certify 2" else rig

    found = recertify(dataclasses.replace(promised(), slos=loose), launch, WINDOWS, MARK)
    assert [check.name for check in found.checks if not check.holds] == ["slos", "cost", "ttft_p99"]
    assert "BROKEN: nothing was served within the SLOs at load 0.8 on window heldout-1" in found.text
    assert "BROKEN: cost was not measured on window heldout-1" in found.text


@pytest.mark.parametrize(("times", "holds"), [(1.2, True), (3.0, False)])
def test_a_window_that_misses_its_slo_is_named_and_pays_for_itself(times, holds):
    """The others hold at a hundredth of the limit: of what one misses they make up for as much as their requests do."""
    limit = promised().slos[0].limit

    @contextlib.contextmanager
    def launch(config, label):
        class Rig:
            def measure(self, load, trace, window):
                step = rig.measure(load, trace, window)
                value = limit * (times if window == "heldout-1" else 0.01)
                missed = ("ttft_p99 too high",) if window == "heldout-1" else ()
                return dataclasses.replace(step, metrics={**step.metrics, "ttft_p99_s": value}, slo_misses=missed)

        with machine(1.0).launch(config, label) as rig:
            yield Rig()

    slos, other = recertify(dataclasses.replace(promised(), slos=promised().slos[:1]), launch, WINDOWS, MARK).checks[:2]
    assert other.holds and slos.holds == holds
    assert ("the SLOs hold over all windows together, not on heldout-1: ttft_p99 too high" in slos.text) == holds


@pytest.mark.parametrize(
    ("windows", "broke"),
    [({"heldout-1"}, []), ({w.name for w in WINDOWS}, ["slos", "cost"])],  # of all, there is no cost to compare
)
def test_a_window_that_was_ended_early_while_it_was_answering_is_not_called_unserved(windows, broke):
    loose = tuple(Slo(slo.metric, slo.limit * 1e3) for slo in promised().slos)

    @contextlib.contextmanager
    def launch(config, label):
        class Rig:
            def measure(self, load, trace, window):
                step = rig.measure(load, trace, window)
                if window not in windows:
                    return step
                metrics = {name: value for name, value in step.metrics.items() if "cost" not in name}
                return dataclasses.replace(step, metrics=metrics, slo_misses=("ttft_p99",), stopped_early="ttft_p99")

        with machine(1.0).launch(config, label) as rig:
            yield Rig()

    found = recertify(dataclasses.replace(promised(), slos=loose), launch, WINDOWS, MARK)
    assert [check.name for check in found.checks if not check.holds] == broke
    assert ("BROKEN: cost was not measured" in found.text) == bool(broke) and "unserved" not in found.text


def test_a_cost_or_latency_proven_worse_breaks_the_promise_on_its_own():
    cheap = tuple(value / 1.5 for value in promised().cost)
    assert broken(dataclasses.replace(promised(), cost=cheap)) == ["cost"]
    fast = tuple(value / 10 for value in promised().latency)
    assert broken(dataclasses.replace(promised(), latency=fast)) == ["ttft_p99"]


def test_a_promise_that_was_itself_uncertain_is_not_broken_by_little():
    middle = promised().cost[0] / 1.1
    vague = (middle, middle / 1.3, middle * 1.3)
    assert broken(dataclasses.replace(promised(), cost=vague)) == []


def test_a_promise_that_does_not_say_how_sure_it_is_is_not_taken_for_the_truth():
    middle = promised().cost[0] / 1.105
    assert broken(dataclasses.replace(promised(), cost=(middle, middle / 1.001, middle * 1.001))) == ["cost"]
    assert broken(dataclasses.replace(promised(), cost=(middle, math.nan, math.inf))) == []


@pytest.mark.parametrize(
    ("slower", "interval", "dearer", "broken"),
    [
        (1.2, 0.15, 1.0, []),
        (1.2, 0.01, 1.0, ["ttft_p99"]),
        (2.0, 0.15, 1.0, ["ttft_p99"]),
        (1.0, 0.15, 1.2, ["cost"]),  # of the same requests a cost is no luck
    ],
)
def test_the_percentile_of_one_short_window_is_as_unsure_as_its_requests_make_it(slower, interval, dearer, broken):
    """One launch on one window promised it, and another measures it: nothing says what windows differ by."""
    unsure, known = ((x[0], math.nan, math.nan) for x in (promised().latency, promised().cost))

    @contextlib.contextmanager
    def launch(config, label):
        class Rig:
            def measure(self, load, trace, window):
                step = rig.measure(load, trace, window)
                told = {"ttft_p99_s": unsure[0] * slower, "cost_usd_per_mtok_output": known[0] * dearer}
                around = {key: (value * (1 - interval), value * (1 + interval)) for key, value in told.items()}
                return dataclasses.replace(step, metrics={**step.metrics, **told}, intervals=around)

        with machine(1.0).launch(config, label) as rig:
            yield Rig()

    loose = tuple(Slo(slo.metric, slo.limit * 10) for slo in promised().slos)
    asked = dataclasses.replace(promised(), latency=unsure, cost=known, slos=loose, spread=Spread())
    found = recertify(asked, launch, WINDOWS[:1], MARK, launches=1)
    assert [check.name for check in found.checks if not check.holds] == broken


def test_what_the_file_does_not_promise_is_not_judged():
    unknown = (math.nan, math.nan, math.nan)
    found = recertify(dataclasses.replace(promised(), latency=unknown), machine(0.95).launch, WINDOWS, MARK)
    assert "ok: of ttft_p99 the file promises nothing" in found.text and "nan" not in found.text


def test_what_is_dearer_but_not_proven_so_says_what_would_be():
    vague = (promised().cost[0] / 1.1, promised().cost[0] / 1.4, promised().cost[0] * 1.2)
    found = recertify(dataclasses.replace(promised(), cost=vague), machine(1.0).launch, WINDOWS, MARK)
    text = next(check.text for check in found.checks if check.name == "cost")
    assert "broken would be +" in text
    assert "broken would be" not in next(check.text for check in certificate(1.5).checks if check.name == "cost")


def test_the_doubt_is_what_launches_windows_and_the_promise_leave_open():
    """The spread of launches, which this promise does not tell, is what is assumed of it and what is seen, together."""
    costs = {"certify 1": [1.0, 1.2, 1.1], "certify 2": [1.1, 1.3, 1.2]}

    @contextlib.contextmanager
    def launch(config, label):
        class Rig:
            def measure(self, load, trace, window):
                told = dict(zip((w.name for w in WINDOWS), costs[label], strict=True))
                return Step(load, window, {"cost_usd_per_mtok_output": told[window], "ttft_p99_s": 0.1})

        yield Rig()

    told = {"slos": (), "cost": (1.1, 0.99, 1.2222), "latency": (0.1, 0.09, 0.11), "spread": Spread(0.0, 0.0)}
    found = recertify(dataclasses.replace(promised(), **told), launch, WINDOWS, MARK)
    logs = np.log(list(costs.values()))
    means = logs.mean(axis=1)
    seen = (10 * 0.03**2 + float(means.var(ddof=1))) / (10 + 1)
    parts = ((seen / 2, 11.0), (float(logs.var(axis=1, ddof=1).mean()) / 3, 2.0))
    now = Estimate(float(means.mean()), parts)
    check = found.checks[1]
    assert check.measured == pytest.approx((math.exp(now.mean), *map(math.exp, now.interval(0.95))))
    own = (math.log(1.2222 / 0.99) / (2 * 1.959964)) ** 2
    limit = math.expm1(Estimate(0.0, (*parts, (own, math.inf))).reach(0.05)) * 100
    change = (math.exp(now.mean) / 1.1 - 1) * 100
    words = f"cost {math.exp(now.mean):.3f} USD per million output tokens, promised 1.1 ({change:+.1f} %)"
    assert check.text.startswith(f"{words}; broken would be {limit:+.0f} % or more")
    assert found.checks[2].text == "ttft_p99 100 ms, promised 100 (+0.0 %)"


def test_a_cheaper_or_faster_machine_keeps_it():
    assert certificate(1.5).holds


def test_a_rounding_bit_breaks_nothing_where_nothing_varies():
    with machine(1.0).launch(promised().config, "x") as rig:
        step = rig.measure(0.8, WINDOWS[0], WINDOWS[0].name)

    class Always:
        def measure(self, load, trace, window):
            return dataclasses.replace(step, window=window)

    cost, ttft = (step.metrics[key] * (1 - 1e-15) for key in ("cost_usd_per_mtok_output", "ttft_p99_s"))
    exact = dataclasses.replace(promised(), cost=(cost,) * 3, latency=(ttft,) * 3, spread=Spread(0.0, 10))
    found = recertify(exact, lambda _config, _label: contextlib.nullcontext(Always()), WINDOWS, MARK)
    assert found.holds and "broken would be" not in found.text
    slower = dataclasses.replace(exact, cost=(cost * 0.99,) * 3)
    assert not recertify(slower, lambda _config, _label: contextlib.nullcontext(Always()), WINDOWS, MARK).holds


def test_what_windows_were_too_short_for_is_said_of_all_that_was_measured():
    found = certificate(1.0, short=lambda steps: f"Too short, {len(steps)} steps.")
    assert found.holds and found.text.endswith(f"Too short, {2 * len(WINDOWS)} steps.")


def test_the_slo_that_broke_is_named_before_why_requests_failed():
    with machine(1.0).launch(promised().config, "x") as rig:
        step = rig.measure(0.8, WINDOWS[0], WINDOWS[0].name)

    class Failing:
        def measure(self, load, trace, window):
            misses = ("ttft_p99 9 s > 1 s", f"{len(window)} of 400 requests failed, most with: HTTP 500")
            return dataclasses.replace(
                step, window=window, metrics={**step.metrics, "ttft_p99_s": 99.0}, slo_misses=misses
            )

    found = recertify(promised(), lambda _config, _label: contextlib.nullcontext(Failing()), WINDOWS, MARK)
    assert "SLOs missed at load 0.8: ttft_p99 9 s > 1 s; " in found.text and found.text.count("requests failed") == 1


def test_what_launches_differ_by_does_not_break_a_promise():
    """Twenty machines as fast as promised: hardly any is accused."""
    broken = 0
    for seed in range(20):
        found = recertify(promised(0.6), machine(1.0, seed).launch, WINDOWS, MARK)
        broken += not found.holds
    assert broken <= 2


def test_what_changed_since_is_named_beside_the_result():
    found = certificate(1.0, now=dataclasses.replace(MARK, engine_version="0.33.0"))
    assert found.changes == ("engine version 0.32.0 -> 0.33.0",)
    assert "0.32.0 -> 0.33.0" in found.text


def test_a_server_that_does_not_start_breaks_the_promise():
    @contextlib.contextmanager
    def launch(_config, _label):
        raise LaunchFailed(Infeasible("unknown-flag", "unrecognized arguments: --old", stage="start-up"))
        yield

    found = recertify(promised(), launch, WINDOWS, MARK)
    assert not found.holds and found.launches == 1 and "unrecognized arguments: --old" in found.text


@pytest.mark.parametrize(
    ("cause", "times", "holds", "stage"),
    [
        ("killed", 1, True, "start-up"),
        ("killed", 2, False, "start-up"),
        ("gpu-busy", 1, True, "start-up"),
        ("gpu-busy", 2, True, "before launch"),
    ],
)
def test_a_failure_that_may_pass_is_launched_once_more_before_the_promise_is_called_broken(cause, times, holds, stage):
    labels = []

    @contextlib.contextmanager
    def launch(config, label):
        labels.append(label)
        if len(labels) <= times:
            raise LaunchFailed(Infeasible(cause, "in these words", stage=stage, transient=True))
        with machine(1.0).launch(config, label) as rig:
            yield rig

    found = recertify(promised(), launch, WINDOWS, MARK)
    assert found.holds == holds and labels[:2] == ["certify 1"] * 2


@pytest.mark.parametrize("stage", ["before launch", "start-up"])
def test_a_gpu_that_stays_somebody_elses_breaks_no_promise(stage):
    @contextlib.contextmanager
    def launch(config, label):
        raise LaunchFailed(Infeasible("gpu-busy", "GPU 0 is in use", stage=stage, transient=True))
        yield

    with pytest.raises(EnvironmentFault, match="GPU 0 is in use"):
        recertify(promised(), launch, WINDOWS, MARK)


def test_no_second_launch_begins_when_half_of_the_time_is_gone():
    clock = iter([0.0, 400.0, 800.0])
    assert certificate(1.0, clock=lambda: next(clock), seconds=600.0).launches == 1


def test_a_measurement_that_cannot_be_believed_is_no_broken_promise():
    @contextlib.contextmanager
    def launch(config, label):
        class Rig:
            def measure(self, load, trace, window):
                return dataclasses.replace(rig.measure(load, trace, window), untrusted=("client lag p99 14 ms",))

        with machine(0.5).launch(config, label) as rig:
            yield Rig()

    with pytest.raises(UsageError, match="client lag"):
        recertify(promised(), launch, WINDOWS, MARK)
