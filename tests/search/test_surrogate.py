"""The surrogate is exact where it was measured and unsure elsewhere; a gain is an area; outcomes become numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from tests.search.problem import LOADS, launch, objective, space
from tuner.search.acquisition import Front, LaunchCost, draws, gains, improvement, worth
from tuner.search.beliefs import Posterior
from tuner.search.candidates import Candidates, correlations
from tuner.search.ledger import Seen
from tuner.search.reading import capacity, margin, read
from tuner.search.surrogate import LOAD_LENGTH, LOAD_SHARE, Prior, Rows, Surrogate, _components, fit
from tuner.spec.objective import Objective
from tuner.study.outcome import Boot, Infeasible, Measured, Step


def rows(codes: list[tuple[int, ...]], y: list[float], sources: list[list[float]] | None = None) -> Rows:
    n = len(y)
    columns = np.array(sources, float) if sources else np.zeros((n, 0))
    return Rows(np.array(codes, dtype=np.int64), np.zeros(n), np.array(y, float), columns, np.zeros(n))


def everything() -> tuple[Candidates, np.ndarray]:
    pool = Candidates.of(space(), 0)
    return pool, pool.codes()


def predict(s: Surrogate, codes: np.ndarray, sources: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    values = np.zeros((len(codes), 1, 0)) if sources is None else sources[:, None, None]
    mean, sd = s.predict(codes, np.zeros((len(codes), 1)), values)
    return mean[:, 0], sd[:, 0]


def additive(params: dict) -> float:
    return (
        0.8 * math.log2(params["gpus"]) - 0.5 * params["half"] + 0.2 * math.log2(params["batch"]) * (params["gpus"] > 1)
    )


def test_measured_points_are_reproduced_and_others_are_less_certain():
    pool, codes = everything()
    y = [additive(p) for p in pool.params]
    s = fit(correlations(space()), rows([pool.keys[i] for i in range(0, 60, 5)], y[0:60:5]), Prior())
    mean, sd = predict(s, codes)
    assert np.abs(mean[0:60:5] - y[0:60:5]).max() < 0.1
    assert sd[1:60:5].min() > sd[0:60:5].max()


def test_measured_loads_are_reproduced_with_and_without_the_spread():
    _, codes = everything()
    load, y = np.array([0.2, 0.6, 1.2]), np.array([-1.0, -0.5, 1.0])
    known = replace(rows([tuple(codes[0])] * 3, y.tolist()), load=load)
    s = fit(correlations(space()), known, Prior(noise=1e-6, noise_spread=0.01))
    for spread in (True, False):
        mean, _ = s.predict(codes[:1], load[None, :], np.zeros((1, 3, 0)), spread=spread)
        assert mean[0] == pytest.approx(y, abs=0.02)


def test_effects_that_add_up_are_learnt_from_a_sixth_of_the_grid():
    pool, codes = everything()
    y = np.array([additive(p) for p in pool.params])
    known = np.random.default_rng(0).permutation(len(y))[:15]
    s = fit(correlations(space()), rows([pool.keys[i] for i in known], y[known].tolist()), Prior())
    left = np.setdiff1d(np.arange(len(y)), known)
    assert np.corrcoef(predict(s, codes)[0][left], y[left])[0, 1] > 0.93


def test_a_source_that_explains_keeps_its_weight_and_one_that_does_not_loses_it():
    pool, _ = everything()
    y = np.array([additive(p) for p in pool.params])
    noise = np.random.default_rng(1).normal(0, 1, len(y))
    weights = []
    for source in (y, noise):
        known = rows([pool.keys[i] for i in range(0, 80, 4)], y[0:80:4].tolist(), source[0:80:4, None].tolist())
        weights.append(fit(correlations(space()), known, Prior(), prior_weights=[1.0], weight_sd=[0.5]).weights[0])
    assert weights[0] > 0.9 and abs(weights[1]) < 0.4


def test_an_effect_that_the_model_calls_large_is_believed_to_be_wrong_by_more():
    pool, codes = everything()
    known = rows([pool.keys[0]], [0.0])
    more = np.array([0.5, 0.0, 0.0, 0.0, 0.0])
    sd = [predict(fit(correlations(space()), known, Prior(), more=m), codes)[1] for m in (None, more)]
    other_gpus = codes[:, 0] != codes[0, 0]
    assert sd[1][other_gpus].min() > 1.5 * sd[0][other_gpus].min()
    assert sd[1][~other_gpus] == pytest.approx(sd[0][~other_gpus], rel=0.1)


def test_the_fit_is_a_maximum():
    pool, _ = everything()
    known = rows(
        [pool.keys[i] for i in range(0, 80, 4)],
        [additive(p) + 0.05 * (i % 3) for i, p in enumerate(pool.params[0:80:4])],
    )
    explained = np.array([[0.3 * math.log2(p["batch"])] for p in pool.params[0:80:4]])  # a source, of weight 0.5
    known = replace(known, sources=explained, extra=np.where(known.y > 0.5, 0.05, 0.0))
    tables, prior = correlations(space()), Prior(common=1e-3)
    s = fit(tables, known, prior, prior_weights=[0.5], weight_sd=[0.2])
    singles = [prior.single / (1 - t[:-1, :-1].mean()) for t in tables]  # between values, however alike they are
    centre = np.array([prior.constant, prior.load, *singles, prior.pair, prior.own, prior.noise])
    spread = np.array([prior.spread] * 9 + [prior.noise_spread])

    def density(v: np.ndarray) -> float:
        parts = _components(tables, known, s.importance)
        kernel = sum(a * b for a, b in zip(v[:-1], parts, strict=True)) + np.diag(v[-1] + 1e-8 + known.extra)
        kernel = kernel + explained @ explained.T * 0.2**2
        target = known.y - s.mean - 0.5 * explained[:, 0]
        away = (np.log(v) - np.log(centre)) / spread
        return -0.5 * (target @ np.linalg.solve(kernel, target) + np.linalg.slogdet(kernel)[1] + (away**2).sum())

    here = density(s.variances)
    for i in range(len(s.variances)):
        for factor in (0.5, 2.0):
            other = s.variances.copy()
            other[i] *= factor
            assert density(other) < here + 0.25


def covariance(s: Surrogate, one: tuple, other: tuple) -> float:
    """Of two points (code, place of the load, the sources' values), part by part as the module says."""
    (code, place, sources), (known, there, theirs) = one, other
    r = math.sqrt(5) * abs(place - there) / LOAD_LENGTH
    near = (1 + r + r * r / 3) * math.exp(-r)  # Matern 5/2
    mixed = (1 - LOAD_SHARE) + LOAD_SHARE * near
    alike = [float(t[a, b]) for t, a, b in zip(s.tables, code, known, strict=True)]
    constant, load, *singles, pair, own, _ = s.variances.tolist()
    both = [
        (s.importance[i] * s.importance[j], alike[i] * alike[j])
        for i, j in itertools.combinations(range(len(alike)), 2)
    ]
    of_pairs = sum(w * k for w, k in both) / sum(w for w, _ in both) if both else 0.0
    found = constant + load * near + mixed * sum(v * k for v, k in zip(singles, alike, strict=True))
    found += pair * of_pairs * mixed + own * near * (tuple(code) == tuple(known))
    return found + sum(f * g * sd**2 for f, g, sd in zip(sources, theirs, s.weight_sd, strict=True))


@pytest.mark.parametrize("parameters", [0, 1, 5])
def test_predictions_and_their_evidence_are_those_of_a_gaussian_process_worked_by_hand(parameters: int):
    made = replace(space(), parameters=space().parameters[:parameters], rules=())
    tables, rng = correlations(made), np.random.default_rng(parameters)
    sizes = [len(t) - 1 for t in tables]
    codes = np.array([[rng.integers(size) for size in sizes] for _ in range(4)], np.int64).reshape(4, parameters)
    known = Rows(codes[[0, 0, 1, 2, 2]], rng.random(5), rng.normal(size=5), rng.normal(size=(5, 2)), rng.random(5) / 9)
    s = fit(tables, known, Prior(), mean=0.3, prior_weights=[1.0, -0.5], weight_sd=[0.4, 0.2])
    points = list(zip(known.codes.tolist(), known.load, known.sources, strict=True))
    kernel = np.array([[covariance(s, one, other) for other in points] for one in points])
    kernel += np.diag(s.variances[-1] + known.extra)
    expected = s.mean + known.sources @ [1.0, -0.5]
    asked, sources = rng.random((4, 3)), rng.normal(size=(4, 3, 2))
    mean, sd = s.predict(codes, asked, sources)
    for i, place in itertools.product(range(4), range(3)):
        point = (codes[i].tolist(), asked[i, place], sources[i, place])
        k = np.array([covariance(s, point, other) for other in points])
        by_hand = s.mean + sources[i, place] @ [1.0, -0.5] + k @ np.linalg.solve(kernel, known.y - expected)
        assert mean[i, place] == pytest.approx(by_hand, abs=1e-4)
        left = covariance(s, point, point) - k @ np.linalg.solve(kernel, k)
        assert sd[i, place] == pytest.approx(math.sqrt(left), rel=1e-4)
    likelihood = stats.multivariate_normal.logpdf(known.y, expected, kernel)
    assert s.evidence() == pytest.approx(likelihood + 2.5 * math.log(2 * math.pi), rel=1e-6)


def test_two_configurations_that_give_the_same_server_are_one_candidate():
    pool, _ = everything()
    base = {"gpus": 1, "batch": 16, "half": False, "guess": "none", "length": 2}
    assert pool.key(space().snap(base)) == pool.key(space().snap({**base, "length": 8}))
    assert pool.key(space().snap({**base, "guess": "ngram"})) != pool.key(space().snap(base))
    assert len(pool.params) == 112  # 3 x 5 x 2 x (1 + 3), less a batch of 8 on 4 GPUs


def test_neighbours_differ_in_one_parameter_that_applies():
    pool, _ = everything()
    base = space().snap({"gpus": 2, "batch": 32, "half": False, "guess": "none"})
    changed = [{k for k in base if n[k] != base[k]} for n in pool.neighbours(base)]
    assert sorted(map(sorted, changed)) == [["batch"], ["batch"], ["gpus"], ["gpus"], ["guess"], ["half"]]


def test_capacity_lies_between_the_last_load_within_slo_and_the_first_beyond():
    cap, sd = capacity([1.0, 2.0, 4.0], [-1.0, -0.5, 0.5])
    assert math.log(2) < cap < math.log(4) and 0 < sd < 0.3
    assert capacity([1.0, 2.0], [0.5, 0.9])[0] < 0  # the first load missed
    assert math.log(4) < capacity([1.0, 4.0], [-2.0, -0.5])[0] <= math.log(4) + 0.4  # none missed


def test_the_worst_slo_decides_the_margin_and_an_absent_metric_is_a_miss():
    slos = objective().slos
    assert margin({"ttft_p99_s": 0.25, "tpot_p99_s": 0.03}, slos) == pytest.approx(math.log(0.5))
    assert margin({"ttft_p99_s": 0.01, "tpot_p99_s": 0.12}, slos) > 0
    assert margin({"ttft_p99_s": 0.01}, slos) > 1


def test_a_capacity_is_read_off_the_margins_of_the_two_loads_beside_it_worked_by_hand():
    hopeless = 1.2 * (1 - math.exp(-math.log(4) / 1.2))  # a miss by a factor of four, flattened
    assert margin({"ttft_p99_s": 2.0, "tpot_p99_s": 0.03}, objective().slos) == pytest.approx(hopeless)
    bracketed = math.log(2) + math.log(2) * 0.25, 0.25 * math.log(2)
    assert capacity([1.0, 2.0, 4.0], [-1.0, -0.2, 0.6]) == pytest.approx(bracketed)
    assert capacity([1.0, 2.0, 4.0], [-1.0, -9.0, 0.01])[0] == pytest.approx(math.log(2) + 0.98 * math.log(2))
    assert capacity([1.0, 2.0], [0.0, 0.6])[0] == pytest.approx(0.02 * math.log(2))  # at its limit is within it
    assert capacity([1.0, 1.05], [-1.0, 1.0])[1] == 0.02
    assert capacity([1.0, 2.0], [-math.inf, 1.2])[0] == pytest.approx(0.5 * math.log(2))  # no SLO was measured near
    assert capacity([2.0, 4.0], [0.6, 1.0]) == pytest.approx((math.log(2) - 0.02 - 0.2, 0.15))
    # none missed: the rest of the way by the slope of the last two, from 1 to 8, and by 0.4 at most
    slope = (0.6 - 0.3) / math.log(2)
    assert slope < 1 and capacity([1.0, 2.0], [-0.6, -0.3]) == pytest.approx((math.log(2) + 0.3, 0.15))
    assert capacity([1.0, 2.0], [-2.3, -0.9])[0] == pytest.approx(math.log(2) + 0.4)
    assert capacity([1.0, 2.0], [-2.4, -0.4])[0] == pytest.approx(math.log(2) + 0.4 * math.log(2) / 2.0)
    assert capacity([1.0, 1.1], [-2.4, -0.4])[0] == pytest.approx(math.log(1.1) + 0.4 / 8)
    assert capacity([2.0], [-0.3])[0] == pytest.approx(math.log(2) + 0.1)
    assert capacity([2.0], [-math.inf])[0] == pytest.approx(math.log(2) + 0.4)


def test_a_step_that_missed_another_limit_says_what_its_latency_is_and_one_that_missed_its_own_does_not():
    metrics = {"ttft_p99_s": 9.0, "tpot_p99_s": 0.02, "cost_usd_per_mtok_output": 3.0}
    late = Step(LOADS[1], "w", metrics, slo_misses=("ttft",))
    slow = Step(LOADS[1], "w", {**metrics, "tpot_p99_s": 0.2}, slo_misses=("ttft", "tpot"))

    def steps(step: Step, of: Objective) -> tuple:
        return read(Seen(0, space().default(), Measured((step,))), of, LOADS).steps

    assert steps(late, objective()) == ((1, pytest.approx(math.log(3.0)), pytest.approx(math.log(0.02))),)
    assert steps(slow, objective()) == ()
    assert steps(late, replace(objective(), slos=objective().slos[:1])) == ()  # nothing bounds what was missed
    for key in ("cost_usd_per_mtok_output", "tpot_p99_s"):
        assert steps(replace(late, metrics={**metrics, key: math.inf}), objective()) == ()
    found = read(Seen(0, space().default(), Measured((late,))), objective(), LOADS)
    assert (found.good, found.missed, found.works) == ((), (1,), 1.0)


@pytest.mark.parametrize(
    ("at_once", "room"), [(None, 1.0), (1.0, 0.25), (4.0, 2 / 3), (8.0, 1.0), (64.0, 1.5), (0.0, 1.0)]
)
def test_a_server_that_ran_had_as_much_room_as_its_log_says(at_once: float | None, room: float):
    boot = Boot(30.0, facts={} if at_once is None else {"max_concurrency": at_once})
    outcome = launch(space().default())
    assert isinstance(outcome, Measured)
    found = read(Seen(0, space().default(), replace(outcome, boot=boot)), objective(), LOADS)
    assert found.works == pytest.approx(room)


def test_a_step_that_was_ended_as_saturated_says_nothing_of_cost_and_latency():
    """Its latencies are those of the beginning, within their limits."""
    outcome = launch(space().default())
    assert isinstance(outcome, Measured)
    early = replace(outcome.steps[0], load=LOADS[-1], slo_misses=("saturated",), stopped_early="saturated: it grows")
    reading = read(Seen(0, space().default(), Measured((outcome.steps[0], early))), objective(), LOADS)
    assert [place for place, *_ in reading.steps] == [0]


def test_a_step_that_was_ended_for_an_slo_bounds_the_capacity_whatever_it_measured():
    outcome = launch(space().default())
    assert isinstance(outcome, Measured)
    lost = replace(outcome.steps[1], slo_misses=("ttft_p99 cannot hold 500 ms",))
    found = read(Seen(0, space().default(), Measured((outcome.steps[0], lost))), objective(), LOADS).capacity
    assert found is not None and math.log(LOADS[0]) < found < math.log(LOADS[1])


def test_a_memory_crash_is_a_margin_and_another_crash_a_plain_no_with_its_cause():
    def reading(outcome):
        return read(Seen(0, space().default(), outcome), objective(), LOADS)

    def works(outcome) -> float | None:
        return reading(outcome).works

    near, far = Infeasible("oom", "", short_bytes=2**30), Infeasible("oom", "", short_bytes=40 * 2**30)
    assert reading(near).cause is None and reading(Infeasible("oom", "")).cause == "oom: "
    assert works(far) < works(Infeasible("died", "")) < works(near) < 0
    assert works(launch(space().default())) > 0
    assert works(Infeasible("port", "", transient=True)) is None


def posterior(latency_sd: float, capacity_log: float, works: float = 1.0, gpus: float = 1.0) -> Posterior:
    cost, latency = np.log([[4.0, 2.0, 1.0, 0.5]]), np.log([[0.01, 0.012, 0.015, 0.02]])
    one = np.ones
    return Posterior(
        cost, 1e-6 * one((1, 4)), latency, latency_sd * one((1, 4)),
        capacity_log * one(1), 1e-6 * one(1), works * one(1), gpus * one(1),
    )  # fmt: skip


def test_the_gain_is_the_area_that_a_ladders_points_add():
    front = Front(np.log([[2.0, 0.015]]), np.log([8.0, 0.1]))
    # within capacity: loads 0.5 and 1: (4, .010) and (2, .012); beyond the front's (2, .015)
    expected = math.log(8 / 4) * math.log(0.015 / 0.010) + math.log(4 / 2) * math.log(0.015 / 0.012)
    found = worth(posterior(1e-6, math.log(1.2)), front, LOADS, LaunchCost(60, 30), draws(0))
    assert found.gain[0] == pytest.approx(expected, rel=0.06)
    assert found.gpu_seconds[0] == pytest.approx(60 + 3 * 30)  # two loads within SLO and the one that misses
    risky = worth(posterior(1e-6, math.log(1.2), works=0.5), front, LOADS, LaunchCost(60, 30), draws(0))
    assert risky.gpu_seconds[0] == pytest.approx(60 + 3 * 30 / 2)  # a crash measures no load


def test_a_new_cheapest_point_gains_the_area_up_to_the_next_one():
    front = Front(np.log([[2.0, 0.01]]), np.log([8.0, 0.1]))
    point = np.log([[[[0.5, 0.05]]]])
    found = improvement(point[..., 0], point[..., 1], front)
    assert found[0, 0] == pytest.approx(math.log(4) * math.log(2), rel=0.06)


def test_the_volume_is_the_area_that_the_points_dominate():
    """(2, .05) and (16, .001) add nothing: one is dominated, the other beyond the reference."""
    front = Front(np.log([[4.0, 0.010], [2.0, 0.015], [2.0, 0.05], [16.0, 0.001]]), np.log([8.0, 0.1]))
    expected = math.log(8 / 2) * math.log(0.1 / 0.015) + math.log(8 / 4) * math.log(0.015 / 0.010)
    assert front.volume() == pytest.approx(expected)


def test_a_draw_is_off_by_as_many_deviations_in_capacity_latency_and_cost():
    front = Front(np.zeros((0, 2)), np.log([8.0, 0.1]))
    one = replace(posterior(0.2, 0.1), cost_sd=np.full((1, 4), 0.3), capacity_sd=np.full(1, 0.5))
    sure = replace(
        posterior(1e-9, 0.1 + 0.5 * 1.0),  # 1.1 times becomes 1.8 times: one load more
        cost=one.cost + 0.3 * 0.5, cost_sd=np.full((1, 4), 1e-9), latency=one.latency - 0.2 * 0.7,
    )  # fmt: skip
    drawn = gains(one, front, LOADS, np.array([[1.0, -0.7, 0.5]]))
    assert drawn == pytest.approx(gains(sure, front, LOADS, np.zeros((1, 3))), rel=1e-6) and drawn > 0
    sorted_in = np.sort(np.floor(special.ndtr(draws(3)) * len(draws(3))), axis=0)
    assert (sorted_in == np.arange(len(draws(3)))[:, None]).all()  # one in each part of the same probability


def test_the_expected_gain_is_that_of_plain_draws_of_ladders_and_areas_counted_exactly():
    """The growth of the hypervolume over 4,000 draws without strata, without a grid along the cost."""
    front = Front(np.log([[2.0, 0.012], [1.2, 0.02]]), np.log([8.0, 0.1]))
    one = replace(posterior(0.2, 0.6), cost_sd=np.full((1, 4), 0.15), capacity_sd=np.full(1, 0.6))
    rng, grown, steps = np.random.default_rng(0), [], []
    for capacity_off, latency_off, cost_off in rng.normal(size=(4000, 3)):
        within = np.log(LOADS) <= one.capacity[0] + 0.6 * capacity_off
        ladder = np.stack([one.cost[0] + 0.15 * cost_off, one.latency[0] + 0.2 * latency_off], axis=1)[within]
        grown.append(front.with_points(ladder).volume() - front.volume())
        steps.append(min(within.sum() + 1, len(LOADS)))
    found = [worth(one, front, LOADS, LaunchCost(60, 30), draws(seed)) for seed in range(20)]
    assert np.mean([f.gain[0] for f in found]) == pytest.approx(np.mean(grown), rel=0.04)
    assert np.mean([f.gpu_seconds[0] for f in found]) == pytest.approx(60 + 30 * np.mean(steps), rel=0.02)


def test_what_may_crash_gains_less_and_what_is_beaten_gains_nothing():
    front = Front(np.log([[0.4, 0.005]]), np.log([8.0, 0.1]))
    assert gains(posterior(1e-6, 2.0), front, LOADS, draws(0)).max() == 0
    open_front = Front(np.zeros((0, 2)), np.log([8.0, 0.1]))
    sure = worth(posterior(0.1, 2.0), open_front, LOADS, LaunchCost(), draws(0)).gain[0]
    risky = worth(posterior(0.1, 2.0, works=0.5), open_front, LOADS, LaunchCost(), draws(0)).gain[0]
    assert risky == pytest.approx(sure / 2)


def test_uncertainty_is_worth_a_launch_where_the_mean_is_not():
    front = Front(np.log([[0.4, 0.0095]]), np.log([8.0, 0.1]))
    assert (
        gains(posterior(1e-6, 2.0), front, LOADS, draws(0)).mean()
        < gains(posterior(0.3, 2.0), front, LOADS, draws(0)).mean()
    )


def test_four_gpus_cost_four_times_the_gpu_seconds():
    front = Front(np.zeros((0, 2)), np.log([8.0, 0.1]))
    one, four = (
        worth(posterior(0.1, 2.0, gpus=g), front, LOADS, LaunchCost(), draws(0)).gpu_seconds[0] for g in (1, 4)
    )
    assert four == 4 * one


def test_the_steps_of_a_miss_are_no_points_of_the_front():
    outcome = launch({"gpus": 1, "batch": 16, "half": False, "guess": "none", "length": 0})
    assert isinstance(outcome, Measured)
    reading = read(Seen(0, space().default(), outcome), objective(), LOADS)
    assert len(reading.good) == len(outcome.steps) - 1
    assert math.log(outcome.steps[-2].load) < reading.capacity < math.log(outcome.steps[-1].load)
