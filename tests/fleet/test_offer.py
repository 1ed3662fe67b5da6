"""What a study offers to a fleet: from its verified best, at its own price, marked where it was emulated."""

import math
from dataclasses import replace

import pytest

from tests import studies
from tests.fleet.made import demand
from tuner.errors import NothingFeasible, UsageError
from tuner.fleet import account, fleet, measured
from tuner.fleet.capacity import kept
from tuner.fleet.offer import offers_of, shop
from tuner.fleet.plan import Terms
from tuner.study.outcome import Boot, Measured
from tuner.study.store import Store
from tuner.verify.capacity import capacity
from tuner.verify.judge import Arm
from tuner.verify.racing import LAUNCH_SPREAD

WANT = studies.objective()
BOOT = Boot(72.5, {"weights": 8.4}, {})


def steps(*loads, factor=1.0, window="search-0"):
    """Loads at which tpot_p99 is 25 ms x load: its limit of 50 ms is reached at load 2 (x ``factor``)."""
    return tuple(
        studies.step(x, WANT, tpot_s=0.025 * x / factor, ttft_s=0.1, tokens_per_s=1000 * x, window=window)
        for x in loads
    )


def add(store, number, outcome, *, config=None, role="search", **facts):
    known = studies.space()
    config = config or known.config(known.default(), "Qwen/Qwen3-8B")
    store.start_trial(number, config, known.default(), started_s=0.0, baseline=True, role=role)
    store.end_trial(number, outcome, ended_s=60.0, **facts)


def test_a_verified_study_offers_its_recommendation_at_the_lower_limit_of_what_was_proven(tmp_path):
    study, store = studies.write(tmp_path / "s", verified=True)
    offers, _ = offers_of(study, store, 0.95)
    best = offers[0]
    assert best.verified
    assert not best.emulated
    assert best.capacity == pytest.approx((1.9 * 5, 1.8 * 5, 2.0 * 5))  # loads of the verdict, 5 requests/s at load 1
    assert best.usd_per_hour == 2.5 * best.gpus
    assert best.start_s == pytest.approx(72.5)
    assert best.curve.top_rps <= studies.LADDER[-1] * 5 * 1.8 / 1.9 * 1.001  # as slow as the lower limit


def test_what_was_emulated_is_marked(tmp_path):
    for emulated in (True, False):
        known = studies.write(tmp_path / str(emulated), trials=2, verified=True, emulated=emulated)
        assert {o.emulated for o in shop([known], 0.95).offers} == {emulated}


def test_a_capacity_is_read_off_every_launch_and_window_of_the_verification(tmp_path):
    study, store = studies.write(tmp_path / "s", trials=1, verified=True)
    launches = {}
    for number, factor in ((7, 0.9), (8, 1.0), (9, 1.1)):
        own = [steps(1.5, 2.5, factor=factor * more, window=f"heldout-{i}") for i, more in enumerate((0.97, 1.03))]
        launches[number] = [capacity(s, WANT.slos) for s in own]
        add(store, number, Measured(own[0] + own[1], BOOT), role="verify", label=f"verify {number} trial 0")
    (offer,) = [o for o in offers_of(study, store, 0.95)[0] if o.gpus == 1]
    middle, low, high = offer.capacity
    logs = [math.log(5 * x) for pair in launches.values() for x in pair]
    assert middle == pytest.approx(math.exp(sum(logs) / 6))
    assert low < middle < high and low * high == pytest.approx(middle**2)
    assert "verified: 3 launches on 2 held-out windows" in offer.basis and "assumed" not in offer.basis
    surer = next(o for o in offers_of(study, store, 0.99)[0] if o.gpus == 1)
    assert surer.capacity[1] < low


@pytest.mark.parametrize("slos, most", [((), math.inf), (("tpot_p99=50ms", "error_rate=1%"), 6.0)])
def test_where_no_slo_bounds_a_wait_a_replica_takes_what_it_served(tmp_path, slos, most):
    want = studies.objective(*slos)
    study, store = studies.write(tmp_path / "s", trials=1, verified=True)
    for number in (7, 8, 9):
        own = [s for i in range(2) for s in steps(1.5, 2.5, window=f"heldout-{i}")]
        served = [
            replace(s, metrics=s.metrics | {"requests_per_s": 6.0}, intervals={"requests_per_s": (5.8, 6.2)})
            for s in own
        ]
        add(store, number, Measured(tuple(served), BOOT), role="verify", label=f"verify {number} trial 0")
    (offer,) = [o for o in offers_of(replace(study, objective=want), store, 0.95)[0] if o.gpus == 1]
    assert offer.capacity[0] == pytest.approx(min(10.0, most)) and offer.capacity[2] <= max(most, 10.5)
    assert ("at most the 6 requests/s that were served: no SLO bounds a wait" in offer.basis) == bool(slos)


def test_where_one_launch_tells_no_limit_launches_are_assumed_to_differ(tmp_path):
    study, store = studies.write(tmp_path / "s", trials=1, verified=True)
    own = [step for i in range(2) for step in steps(1.5, 2.5, window=f"heldout-{i}")]
    add(store, 7, Measured(tuple(own), BOOT), role="verify", label="verify 1 trial 0")
    (offer,) = [o for o in offers_of(study, store, 0.95)[0] if o.gpus == 1]
    times = math.exp(1.644854 * LAUNCH_SPREAD)
    assert offer.capacity == pytest.approx((10.0, 10.0 / times, 10.0 * times))
    assert "on 2 held-out windows, too few for a limit: launches are assumed to differ by" in offer.basis
    unproven = Arm("trial 0", 1, True, capacity=(2.0, 1.8, 2.2))
    assert kept(study, unproven, (), store.trials(), 0.95)[0] == pytest.approx((10.0, 10.0 / times, 11.0))
    with pytest.raises(UsageError, match="no arrival rate was measured"):
        kept(study, unproven, (), (), 0.95)


def test_a_study_that_was_not_verified_offers_what_its_search_saw_and_says_so(tmp_path):
    known = studies.write(tmp_path / "s")
    found = shop([known], 0.95)
    assert not any(o.verified for o in found.offers)
    assert all(o.capacity[1] < o.capacity[0] for o in found.offers)
    assert "was not verified" in " ".join(found.notes)


@pytest.mark.parametrize(("window_s", "said"), [(5.0, True), (900.0, False)])
def test_an_offer_says_where_windows_were_too_short_for_a_server_to_fill(tmp_path, window_s, said):
    study, store = studies.write(tmp_path / "s", trials=0)
    responses = [replace(s, metrics={**s.metrics, "e2e_mean_s": 3.0}) for s in steps(0.5, 1.5)]
    add(store, 0, Measured(tuple(responses), BOOT))
    study = replace(study, trace=replace(study.trace, window_s=window_s), load=replace(study.load, warmup_s=0.0))
    (offer,) = offers_of(study, store, 0.95)[0]
    assert ("A window measured 5 s, 1.7 mean responses" in offer.basis) == said


@pytest.mark.parametrize(("fills", "filled"), [((40.0, 40.0), True), ((40.0, 0.0), False)])
def test_an_offer_knows_whether_the_prefix_cache_was_filled_before_every_measurement(tmp_path, fills, filled):
    study, store = studies.study(tmp_path / "s"), Store(tmp_path / "s")
    known = [replace(s, metrics={**s.metrics, "fill_requests": n}) for s, n in zip(steps(1, 2), fills, strict=True)]
    add(store, 0, Measured(tuple(known), BOOT))
    (offer,) = offers_of(study, store, 0.95)[0]
    assert offer.filled == filled


def test_gpu_types_of_one_study_are_offers_of_their_own_at_the_price_of_where_they_ran(tmp_path):
    study = studies.study(tmp_path / "s")
    store = Store(tmp_path / "s")
    default = study.space.config(study.space.default(), study.model)
    add(store, 0, Measured(steps(1, 2), BOOT), config=replace(default, gpu="H100-SXM"), price_usd_per_gpu_hour=2.5)
    add(store, 1, Measured(steps(1), BOOT), config=replace(default, gpu="L4"), price_usd_per_gpu_hour=0.7)
    found = {o.gpu: o for o in shop([(study, store)], 0.95).offers}
    assert {gpu: o.usd_per_hour for gpu, o in found.items()} == {"H100-SXM": 2.5, "L4": 0.7}
    assert {o.name for o in found.values()} == {"s H100-SXM", "s L4"}
    assert found["H100-SXM"].capacity[0] == pytest.approx(10)
    assert found["L4"].capacity[0] == pytest.approx(5)


def test_a_load_at_which_latencies_were_not_known_is_no_point_of_the_curve(tmp_path):
    study, store = studies.study(tmp_path / "s"), Store(tmp_path / "s")
    drowned = studies.step(3, WANT, tpot_s=math.inf, ttft_s=math.inf, error_rate=0.5)
    add(store, 0, Measured((*steps(1, 2), drowned), BOOT))
    (offer,) = shop([(study, store)], 0.95).offers
    assert offer.curve.rate_rps.size == 2


@pytest.mark.parametrize(
    ("told", "watts"),
    [
        ({"system_gpu_power_mean_w": 650.0, "system_gpu_energy_j_per_output_token": 0.8}, 650.0),
        ({"system_gpu_energy_j_per_output_token": 0.5}, 500.0),
        ({}, None),
    ],
)
def test_the_power_of_a_point_is_what_was_drawn_and_else_that_of_its_tokens(told, watts):
    (step,) = steps(1)
    metrics = {k: v for k, v in step.metrics.items() if not k.startswith("system_gpu")}
    found = measured.point(replace(step, metrics={**metrics, "output_tokens_per_s": 1000.0, **told}), ())
    assert found and found.watts == watts


def test_a_study_without_arrival_rates_is_refused_in_one_line(tmp_path):
    study, store = studies.study(tmp_path / "s"), Store(tmp_path / "s")
    bare = [replace(s, metrics={k: v for k, v in s.metrics.items() if "requests_per_s" not in k}) for s in steps(1, 2)]
    add(store, 0, Measured(tuple(bare), BOOT))
    with pytest.raises(UsageError, match="no arrival rate was measured"):
        shop([(study, store)], 0.95)


def test_where_nothing_holds_there_is_no_offer(tmp_path):
    bad, good = studies.write(tmp_path / "bad", trials=1, slow=10), studies.write(tmp_path / "good", trials=2)
    with pytest.raises(NothingFeasible):
        shop([bad], 0.95)
    both = shop([bad, good], 0.95)
    assert {o.study for o in both.offers} == {"good"}
    assert "bad offers nothing" in " ".join(both.notes)


def test_studies_with_other_slos_are_not_mixed(tmp_path):
    one = studies.write(tmp_path / "one", trials=1)
    other = studies.write(tmp_path / "other", trials=1, want=studies.objective("ttft_p99=200ms"))
    with pytest.raises(UsageError, match="holds other SLOs"):
        shop([one, other], 0.95)


def test_studies_of_one_name_are_told_apart_by_their_folders(tmp_path):
    known = [studies.write(tmp_path / place / "chat", trials=1) for place in ("here", "there")]
    found = shop(known, 0.95)
    names = [o.name for o in found.offers]
    assert len(names) == len(set(names)) == 2
    assert all(str(tmp_path / place) in name for place, name in zip(("here", "there"), names, strict=True))
    usual = replace(found, offers=(found.offers[0], replace(found.offers[1], usd_per_hour=1.0)))
    built = fleet.build(usual, demand(10, 40), Terms(spare=0))
    told = [sum(hour.replicas.values()) for hour in account.account(built).hours]
    assert told == built.plan.replicas.sum(axis=0).tolist()


def test_records_that_are_damaged_are_one_line(tmp_path):
    path = tmp_path / "records-1.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        measured.cv(path)
