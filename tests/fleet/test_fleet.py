"""The fleet as a whole: what is planned holds, what does not is named, and what it costs can be checked by hand."""

import json
import math

import numpy as np
import pytest

from tests.fleet import made
from tuner.errors import NothingFeasible
from tuner.fleet import account, day, fleet, words
from tuner.fleet.plan import Terms


def test_the_simulated_day_holds_the_slos_in_99_percent_of_the_hours_also_where_traffic_swings():
    offers = made.offer("a", rps=10, usd=2.0), made.offer("b", rps=31, usd=5.5)
    found = fleet.build(made.shop(*offers), made.day(70, swing=0.1), Terms())
    assert found.day.holds.mean() >= 0.99
    assert found.holds
    assert "the SLOs hold in each of the 24 hours" in words.verdict(found)


def test_without_headroom_for_chance_the_same_hour_would_be_missed():
    found = fleet.build(made.shop(made.offer(rps=10)), made.demand(70.0, swing=0.1), Terms(spare=0))
    assert found.holds
    bare = np.array([[7]])  # ten requests/s each: what one replica was measured with
    plan = fleet.Plan(found.plan.pools, bare, bare, bare * 0, found.plan.need_rps, found.plan.allowed_rps, 0.0, 0.0)
    assert not day.simulate(plan, found.offers, found.traffic).holds.any()


def test_hours_that_miss_are_named_with_what_was_counted():
    # one machine at a time does it all, and is gone for most of the time: six tries do not mend that
    offer = made.offer(rps=100, start_s=600.0)
    terms = Terms(spare=0, spot_share=1.0, spot_price=0.1, interruptions_per_hour=30.0)
    found = fleet.build(made.shop(offer), made.demand(1.0, 0.0, 1.0), terms)
    assert found.missed == (0, 2)
    assert not found.holds
    text = words.verdict(found)
    assert "missed in 2 of 3 hours: 0 (" in text
    assert "2 (" in text
    assert "of the requests beyond it, 1 % allowed" in text
    assert account.to_dict(found)["missed"] == ["0", "2"]


def test_a_spare_makes_a_loss_harmless_and_without_one_a_loss_is_a_miss():
    shop, demand = made.shop(made.offer(rps=10)), made.demand(17.0)
    safe, bare = (fleet.build(shop, demand, Terms(spare=n), simulation="windows") for n in (1, 0))
    assert safe.plan.replicas.tolist() == [[3]]
    assert bare.plan.replicas.tolist() == [[2]]
    lost = [day.simulate(f.plan, f.offers, f.traffic, spare=1).holds.all() for f in (safe, bare)]
    assert lost == [True, False]
    assert "with 1 replica lost all the time" in words.verdict(safe)
    assert "No spare" in " ".join(words.assumptions(bare))


def test_whose_prefix_cache_held_what_came_before_is_said():
    def said(*filled):
        offers = [made.offer(name, filled=yes) for name, yes in zip("ab", filled, strict=False)]
        return words.assumptions(fleet.build(made.shop(*offers), made.demand(17.0), Terms(), simulation="windows"))[1]

    assert said(True, True).endswith("all requests of a window and what came before it.")
    assert said(False, False).endswith("all requests of a window and none from before it.")
    assert said(True, False).endswith("all requests of a window and none from before it (b).")


def test_no_fleet_is_said_with_what_bounds_it():
    shop = made.shop(made.offer(rps=10, gpu="L4", gpus=2))
    with pytest.raises(NothingFeasible, match=r"No fleet serves 50 requests/s within 8 GPUs L4 with 1 spare"):
        fleet.build(shop, made.demand(50.0), Terms(max_gpus={"L4": 8}))
    with pytest.raises(NothingFeasible, match="No replica holds the SLOs under traffic that fluctuates so"):
        fleet.build(shop, made.demand(50.0, swing=3.0), Terms())


def test_gpu_types_are_mixed_where_one_is_short():
    cheap, dear = made.offer("a", rps=10, usd=1.0, gpu="L4"), made.offer("b", rps=30, usd=9.0, gpu="H100")
    free = fleet.build(made.shop(cheap, dear), made.demand(80.0), Terms())
    short = fleet.build(made.shop(cheap, dear), made.demand(80.0), Terms(max_gpus={"L4": 5}))
    assert [free.plan.replicas[:, 0].tolist()[i] > 0 for i in (0, 1)] == [True, False]
    l4, h100 = short.plan.replicas[:, 0].tolist()
    assert 0 < l4 <= 5
    assert h100 > 1  # and the spare is an H100 now
    assert short.plan.usd > free.plan.usd


def test_offers_that_another_beats_in_everything_are_left_out():
    best = made.offer("best", rps=10, usd=2.0, gpu="A", start_s=60.0)
    worse = made.offer("worse", rps=9, usd=2.0, gpu="A", start_s=60.0)
    sooner = made.offer("sooner", rps=9, usd=2.0, gpu="A", start_s=30.0)
    elsewhere = made.offer("elsewhere", rps=9, usd=2.0, gpu="B", start_s=60.0)  # its GPUs may be bounded apart
    again = made.offer("again", rps=10, usd=2.0, gpu="A", start_s=60.0)
    found = fleet.build(made.shop(best, worse, sooner, elsewhere, again), made.demand(20.0), Terms())
    assert [o.name for o in found.offers] == ["best", "sooner", "elsewhere"]


def test_cost_and_energy_of_an_hour_are_what_one_reckons_by_hand():
    # 25 requests/s over 10 each, less headroom: 3 and a spare; tokens and watts as in made.offer
    found = fleet.build(made.shop(made.offer(rps=10, usd=2.0)), made.demand(25.0), Terms())
    assert found.plan.replicas.tolist() == [[4]]
    day_ = account.account(found)
    assert day_.usd_per_day == pytest.approx(4 * 2 * 24)
    assert day_.level_usd_per_day == pytest.approx(4 * 2 * 24)
    assert day_.usd_per_mtok_output == pytest.approx(8 / (25 * 3600 * 200) * 1e6)
    assert day_.usd_per_mtok_total == pytest.approx(8 / (25 * 3600 * 1200) * 1e6)
    watts = 4 * (200 + 400 * 25 / 4 / 10)
    assert day_.kwh_per_day == pytest.approx(watts * 24 / 1000)
    assert day_.j_per_output_token == pytest.approx(watts / (25 * 200))


def test_start_ups_are_paid_and_drawn_for():
    # an hour at 5 and one at 15 requests/s: one start-up of half an hour at 2 USD and the power of the lowest load
    found = fleet.build(made.shop(made.offer(rps=10, start_s=1800.0)), made.demand(5.0, 15.0), Terms(spare=0))
    assert found.plan.replicas.tolist() == [[1, 2]]
    first, second = account.account(found).hours
    assert (first.usd, second.usd) == (2.0, 5.0)
    assert first.watts == pytest.approx(200 + 400 * 0.5)
    assert second.watts == pytest.approx(2 * (200 + 400 * 0.75) + 0.5 * (200 + 400 * 0.1))


def test_energy_is_not_told_where_a_kind_in_use_has_no_measured_power():
    offer = made.offer(rps=10)
    dark = made.replace(offer, curve=made.replace(offer.curve, watts=None))
    found = fleet.build(made.shop(dark), made.demand(25.0), Terms())
    assert account.account(found).kwh_per_day is None
    assert "GPU energy: not known" in " ".join(words.totals(account.account(found)))


def test_what_a_reader_must_know_is_said():
    offers = made.offer("a", emulated=True), made.offer("b", cv=2.0, rps=11)
    shop = made.replace(made.shop(*offers), notes=("b was not verified",))
    demand = made.replace(made.demand(25.0), output_tokens=400.0)
    text = " ".join(words.warnings(fleet.build(shop, demand, Terms())))
    assert "Emulated: a." in text
    assert "b was not verified" in text
    assert "b was measured with arrivals burstier" in text
    assert "200 output tokens per request, the demand's trace has 400" in text


def test_every_assumption_of_the_terms_is_printed():
    terms = Terms(
        spare=1, spot_share=0.5, spot_price=0.4, interruptions_per_hour=0.1, lead_s=30.0, min_uptime_h=2, hold_h=1
    )
    found = fleet.build(made.shop(made.offer()), made.demand(30, 60, swing=0.1), terms)
    text = " ".join(words.assumptions(found))
    for part in (
        "swings by 10 %",
        "drawn at random",
        "95 %, one-sided",
        "Ready 60 s after its launch",
        "30 s ahead",
        "at least 2 h",
        "for 1 h more",
        "1 spare",
        "at most 50 % of the capacity, at 40 % of the price",
        "0.1 times an hour",
        "Prices are those of the studies",
    ):
        assert part in text, part


def test_the_data_is_plain_json():
    data = account.to_dict(fleet.build(made.shop(made.offer(emulated=True)), made.day(60), Terms()))
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["holds"] is True
    assert again["offers"][0]["emulated"] is True
    assert len(again["hours"]) == 24
    assert math.isclose(sum(h["usd"] for h in again["hours"]), again["usd_per_day"])


def test_a_column_of_rates_shows_three_digits_of_its_largest():
    assert [words.rate(x, 215.6) for x in (9.94, 215.57)] == ["10", "216"]
    assert [words.rate(x, 9.2) for x in (0.5, 9.2)] == ["0.50", "9.20"]
    assert words.rate(1e6, 1e6) == "1,000,000"
    assert words.rate(0, 0) == "0"
