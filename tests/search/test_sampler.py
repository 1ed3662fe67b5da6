"""The search proposes the default first, then what its beliefs say, and never what is known not to work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.search.problem import LOADS, Model, knob, launch, objective, run, space, study, truth
from tuner.pareto.volume import hypervolume
from tuner.search import choose, ledger
from tuner.search.acquisition import LaunchCost, draws, worth
from tuner.search.ledger import Proposal
from tuner.search.reading import read as read_outcome
from tuner.search.sampler import Options, TunerSampler
from tuner.search.scan import Scan
from tuner.space.space import SearchSpace
from tuner.study.outcome import Boot, Infeasible, Measured, Step, Untrusted


def sampler(predictor: Any = None, **more: Any) -> TunerSampler:
    return TunerSampler(space(), objective(), LOADS, predictor, "m", cost=LaunchCost(60, 30), **more)


def regret(tried: list[dict[str, Any]]) -> float:
    """Share of the true front's hypervolume that these launches did not find."""

    def points(many: Any) -> list[tuple[float, float]]:
        steps = [s for p in many for s in launch(p).steps if s.ok]
        return [(s.metrics["cost_usd_per_mtok_output"], s.metrics["tpot_p99_s"]) for s in steps]

    everything = points(p for p in space().grid() if not space().denied(p))
    worst = (max(p[0] for p in everything), max(p[1] for p in everything))
    return 1 - hypervolume(points(tried), worst, log=True) / hypervolume(everything, worst, log=True)


def test_the_first_proposal_is_the_engines_default():
    for predictor in (None, Model()):
        trial, params = ledger.ask(study(sampler(predictor)), space())
        assert params == space().snap(space().default())
        assert "baseline" in trial.user_attrs["reason"]


def test_no_configuration_is_proposed_twice_and_none_that_a_rule_denies():
    tried = run(study(sampler(options=Options(remeasure_every=0))), 40)
    keys = [tuple(p.values()) for p in tried]
    assert len(set(keys)) == 40
    assert not any(space().denied(p) for p in tried)


def test_a_configuration_that_the_model_says_does_not_fit_is_never_proposed():
    tried = run(study(sampler(Model(refuse=lambda p: not p["half"] and p["gpus"] < 4))), 25)
    assert all(p["half"] or p["gpus"] == 4 for p in tried[1:])  # the default is launched whatever is said of it


def test_a_right_model_finds_the_front_in_a_few_launches():
    assert regret(run(study(sampler(Model())), 6)) < 0.03


def test_without_a_model_the_front_is_found_from_launches_alone():
    assert regret(run(study(sampler()), 20)) < 0.05


def test_a_model_that_has_everything_the_wrong_way_round_does_not_stop_the_search():
    def upside_down(params: dict[str, Any]) -> float:
        return 3.0 / truth(params, 0.01)["tpot_p99_s"] * 0.01

    found = [regret(run(study(sampler(Model(wrong=upside_down), seed=seed)), 24)) for seed in range(3)]
    assert sum(found) < 0.15


def test_the_weight_of_a_wrong_model_falls_and_that_of_a_right_one_stays():
    def random_levels(params: dict[str, Any]) -> float:
        return [0.4, 2.2, 0.6, 1.9][_mix(params)]

    weights = {}
    for name, model in {"right": Model(), "wrong": Model(wrong=random_levels)}.items():
        one = sampler(model)
        run(study(one), 15)
        weights[name] = one.beliefs.weights()["latency"]["model"]
    assert weights["right"] > 0.8
    assert weights["wrong"] < 0.6


def _mix(params: dict[str, Any]) -> int:
    return (params["gpus"] * 7 + params["batch"] * 3 + params["half"] * 5 + len(params["guess"])) % 4


def test_crashes_teach_where_not_to_launch():
    def crash(params: dict[str, Any]) -> bool:
        return params["gpus"] == 1 and params["batch"] >= 32

    one = sampler(options=Options(near=0))  # launches from all over the space
    book = study(one)
    tried = run(book, 15, crash=crash)
    ledger.ask(book, space())
    assert 2 <= sum(map(crash, tried)) <= 6
    left = [i for i, params in enumerate(one.candidates.params) if params not in tried]
    works = dict(zip(left, one.beliefs.posterior(left).works, strict=True))
    bad = [p for i, p in works.items() if crash(one.candidates.params[i])]
    good = [p for i, p in works.items() if not crash(one.candidates.params[i])]
    assert sum(bad) / len(bad) < 0.5 < 0.8 < sum(good) / len(good)


def test_a_proposal_says_how_likely_it_is_to_serve():
    book = study(sampler(options=Options(first=0, remeasure_every=0)))
    run(book, 10, crash=lambda params: params["half"] and params["batch"] >= 32)
    said = [(t.user_attrs.get("serves"), t.user_attrs["reason"]) for t in book.trials]
    assert said[0][0] is None, "the default is launched whatever is believed of it"
    for serves, reason in said[1:]:
        assert 0 <= serves <= 1
        assert (f"{serves:.0%} likely to serve" in reason) == (serves < 0.95)
    assert min(serves for serves, _ in said[1:]) < 0.8


def promised(one: TunerSampler, promise: float, ended: Any = None) -> Proposal:
    """The proposal after eight launches that promised so much each; the last seven ``ended`` so (None: they served)."""
    book = study(one)
    better = [p for p in space().grid() if not space().denied(p) and p != space().snap(space().default())]
    better.sort(key=lambda p: -truth(p, LOADS[0])["tpot_p99_s"])
    for params in [space().snap(space().default()), *better[:: len(better) // 6]]:
        trial = book.ask(space().distributions())
        trial.set_user_attr("params", params)
        trial.set_user_attr("promised", promise)
        served = ended is None or params == space().snap(space().default())
        ledger.tell(book, trial, space(), objective(), launch(params) if served else ended)
    trial, _ = ledger.ask(book, space())
    found = one.proposal(trial.number)
    assert found is not None and found.promised is not None and found.kept is not None
    assert f"{found.promised * found.kept:.1%} more hypervolume" in found.reason
    assert found.expected_gain is not None and found.expected_gain >= found.promised * found.kept * 0.999
    assert trial.user_attrs["kept"] == found.kept and trial.user_attrs["promised"] == found.promised
    return found


def test_what_proposals_promise_is_corrected_by_what_earlier_ones_brought():
    options = Options(first=0, remeasure_every=0)
    kept = [
        promised(sampler(options=options), 0.1, e).kept for e in (Infeasible("died", ""), Untrusted(("lag",)), None)
    ]
    assert kept[0] == pytest.approx(2 / (2 + 7)), "seven promises, and nothing came of them"
    assert kept[1] == 1, "a measurement at fault says nothing of the promise"
    assert kept[2] is not None and kept[2] > 0.5
    # what is far more than its promise counts five times at most, whatever the promise
    assert promised(sampler(options=options), 1e-6).kept <= (2 + 5 * 7) / (2 + 7)


def test_what_the_first_proposals_promise_is_a_prediction_and_is_not_counted():
    book = study(sampler(Model()))
    run(book, 8)
    said = [t.user_attrs.get("promised") is not None for t in book.trials]
    assert said[:5] == [False] * 5 and all(said[5:])


def test_what_a_crash_says_is_believed():
    """The same two launches; only what the crash named differs."""
    works = {}
    for said in ("length", "batch"):
        one = sampler(options=Options(first=0))
        book = study(one)
        for params in ({}, {"gpus": 4, "batch": 64, "guess": "ngram", "length": 8}):
            trial = book.ask(space().distributions())
            trial.set_user_attr("params", space().snap({**space().default(), **params}))
            outcome = Infeasible("died", f"cannot serve with this {said}") if params else launch(space().default())
            ledger.tell(book, trial, space(), objective(), outcome)
        ledger.ask(book, space())
        asked = one.beliefs.index(space().snap({**space().default(), "gpus": 4, "batch": 64}))
        assert asked is not None
        works[said] = float(one.beliefs.posterior([asked]).works[0])
    assert works["batch"] < works["length"] - 0.05


def test_a_running_trial_is_not_proposed_beside_itself():
    book = study(sampler(Model()))
    trials = [ledger.ask(book, space()) for _ in range(6)]
    keys = [tuple(params.values()) for _, params in trials]
    assert len(set(keys)) == 6


def test_pending_launches_lower_the_gain_expected_of_what_is_like_them():
    gains = []
    for running in (0, 3):
        one = sampler(Model())
        book = study(one)
        run(book, 2)
        for _ in range(running):
            ledger.ask(book, space())
        ledger.ask(book, space())
        gains.append(one.expected_gain)
    assert gains[1] < 0.7 * gains[0]


def test_a_search_that_is_resumed_by_another_process_repeats_nothing():
    once = Options(remeasure_every=0)
    book = study(sampler(options=once))
    before = run(book, 8)
    book.sampler = sampler(options=once)
    after = run(book, 8)
    keys = [tuple(p.values()) for p in before + after]
    assert len(set(keys)) == 16
    assert regret(before + after) < 0.2


def test_the_same_seed_gives_the_same_search():
    assert run(study(sampler(seed=3)), 10) == run(study(sampler(seed=3)), 10)


def test_an_untrusted_measurement_may_be_made_once_more_and_no_more():
    book = study(sampler())
    for expected_default in (True, True, False):
        trial, params = ledger.ask(book, space())
        assert (params == space().snap(space().default())) is expected_default
        ledger.tell(book, trial, space(), objective(), Untrusted(("client lag",)))


def test_a_point_of_uncertain_worth_is_measured_again_and_flagged():
    one = sampler(options=Options(remeasure_every=4))
    book = study(one)
    flagged = []
    for n in range(24):
        trial, params = ledger.ask(book, space())
        if "remeasure_of" in trial.user_attrs:
            flagged.append((trial.user_attrs["remeasure_of"], params))
        noise = 0.35 * ((n * 7919) % 13 - 6) / 6
        ledger.tell(book, trial, space(), objective(), launch(params, noise=noise))
    assert flagged, "two dozen launches under heavy noise and nothing was measured twice"
    assert all(("kept" in t.user_attrs) == ("expected_gain" in t.user_attrs) for t in book.trials)
    trials = {t.number: t for t in book.trials}
    for number, params in flagged:
        assert trials[number].user_attrs["params"] == params
    assert len(flagged) <= 24 / 4


def test_what_one_worker_measures_again_no_other_measures_again_beside_it():
    one = sampler(options=Options(remeasure_every=4))
    book, n, again = study(one), 0, []
    for _ in range(9):
        running = [ledger.ask(book, space()) for _ in range(3)]
        again += [t.user_attrs["remeasure_of"] for t, _ in running if "remeasure_of" in t.user_attrs]
        for trial, params in running:
            noise, n = 0.35 * ((n * 7919) % 13 - 6) / 6, n + 1
            times = {"started_s": 100.0 * n, "ended_s": 100.0 * n + 90}
            ledger.tell(book, trial, space(), objective(), launch(params, noise=noise), **times)
    assert again and len(again) == len(set(again)) <= 27 / 4


def test_a_grid_too_large_to_hold_is_searched_by_samples_and_neighbours():
    from tests.search.problem import knob

    wide = SearchSpace(
        "wide", "emulator", (*space().parameters, *(knob(f"x{i}", *"abcdef", default="a") for i in range(6)))
    )
    one = TunerSampler(wide, objective(), LOADS, None, "m")
    assert not one.candidates.whole
    assert all({c[p.name] for c in one.candidates.params} >= {*p.values} for p in wide.parameters)
    book = study(one)
    before = len(one.candidates.params)
    for _ in range(8):
        trial, params = ledger.ask(book, wide)
        ledger.tell(book, trial, wide, objective(), launch(params))
    assert len(one.candidates.params) > before


def test_a_ladder_of_one_load_and_an_empty_ladder():
    one = TunerSampler(space(), objective(), (1.0,), Model(), "m")
    run(study(one), 5, loads=(1.0,))
    with pytest.raises(ValueError, match="at least one load"):
        TunerSampler(space(), objective(), (), None, "m")


HIGHER = (0.1, 0.14, 0.2, *LOADS, 5.6)


@pytest.mark.parametrize("model", [None, Model()])
def test_what_launches_went_on_to_above_the_ladder_tells_them_apart(model):
    """All hold at .2, up to where the ladder was laid."""
    one = TunerSampler(space(), objective(), HIGHER[:3], model, "m", cost=LaunchCost(60, 30))
    book = study(one)
    tried = run(book, 1, loads=HIGHER)
    assert one.loads == HIGHER[:3]
    tried += run(book, 13, loads=HIGHER)
    held = max(s.load for p in tried for s in launch(p, loads=HIGHER).steps)
    assert one.loads == tuple(load for load in HIGHER if load <= held) and len(one.loads) >= 7
    assert regret(tried) < 0.05
    again = TunerSampler(space(), objective(), HIGHER[:3], model, "m", cost=LaunchCost(60, 30))
    book.sampler = again
    run(book, 1, loads=HIGHER)
    assert again.loads == one.loads, "a resumed study has them, too"


def test_a_load_that_was_missed_below_the_highest_adds_no_rung():
    one = sampler(Model())
    run(study(one), 4, loads=(0.5, 0.7, 1.0))
    assert one.loads == LOADS


def test_measured_steps_are_believed_over_the_estimate_of_a_launchs_seconds():
    from tuner.search.reading import read
    from tuner.search.scan import launch_cost

    outcome = launch(space().default())
    assert isinstance(outcome, Measured)
    seen = ledger.Seen(0, space().default(), outcome, started_s=10.0, ended_s=10.0 + 30.0 + 40.0 * len(outcome.steps))
    known = launch_cost(LaunchCost(500, 500), [read(seen, objective(), LOADS)])
    assert (known.start_s, known.step_s) == (30.0, 40.0)


def nameless() -> SearchSpace:
    """Eight parameters of which no rule of thumb knows anything, and whose values look like nothing."""
    knobs = (knob(f"k{i}", 1, 3, 6, 9, default=3, numeric=True, log=True) for i in range(8))
    return SearchSpace("test", "emulator", tuple(knobs), ())


def off_nearest(params: dict[str, Any], others: list[dict[str, Any]]) -> int:
    return min(sum(params[name] != other[name] for name in params) for other in others)


def tell_all(one: TunerSampler, launches: int, serves: Any) -> list[tuple[dict[str, Any], str, bool]]:
    """(params, reason, whether it served) of each launch."""
    book, found = study(one), []
    for _ in range(launches):
        trial, params = ledger.ask(book, one.space)
        speed = sum(params.values()) / 16
        metrics = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.03 / speed, "cost_usd_per_mtok_output": 1 / speed}
        good = serves(params)
        crash = Infeasible("engine-died", "the engine died")
        outcome = Measured((Step(1.0, "search-0", metrics),), Boot(30.0)) if good else crash
        ledger.tell(book, trial, one.space, objective(), outcome, started_s=0.0, ended_s=90.0)
        found.append((params, trial.user_attrs["reason"], good))
    return found


def test_where_no_name_is_known_a_few_parameters_are_varied_at_a_time_beside_what_served():
    one = TunerSampler(nameless(), objective(), LOADS, model="m", cost=LaunchCost(60, 30))
    tried = tell_all(one, 10, lambda p: p["k0"] < 8 or p["k1"] < 8)
    served = [tried[0][0]]
    for params, _, good in tried[1:]:
        assert 1 <= off_nearest(params, served) <= 3
        served += [params] if good else []
    default, first = tried[0][0], tried[1:4]
    assert all("off the default" in reason for _, reason, _ in first)
    assert {name for p, _, _ in first for name in p if p[name] != default[name]} == set(default)


def test_beside_a_default_that_does_not_serve_nothing_is_varied():
    default = nameless().default()
    one = TunerSampler(nameless(), objective(), LOADS, model="m", cost=LaunchCost(60, 30))
    tried = tell_all(one, 4, lambda p: p != default)
    assert all("least like" in reason for _, reason, _ in tried[1:])
    assert min(off_nearest(p, [default]) for p, _, _ in tried[1:]) > 3


def test_what_values_look_like_says_where_to_look_first_and_few_are_changed_at_a_time():
    """The names say nothing; the values are those of a size of parallelism, of sequences and of quantization."""
    others = (knob(f"x{i}", "a", "b", "c", default="a") for i in range(5))
    made = SearchSpace(
        "test",
        "emulator",
        (
            knob("k0", 1, 2, 4, 8, default=1, numeric=True, log=True),
            knob("k1", 64, 256, 1024, default=64, numeric=True, log=True),
            knob("k2", "none", "fp8", "awq", default="none"),
            *others,
        ),
    )
    tried = []
    book = study(TunerSampler(made, objective(), LOADS, model="m", cost=LaunchCost(60, 30)))
    for _ in range(8):
        trial, params = ledger.ask(book, made)
        speed = params["k0"] ** 0.6 * (1.5 if params["k2"] != "none" else 1.0)
        usd = params["k0"] / speed
        metrics = {"ttft_p99_s": 0.1, "tpot_p99_s": 0.03 / speed, "cost_usd_per_mtok_output": usd}
        outcome = Measured((Step(1.0, "search-0", metrics),), Boot(30.0))
        ledger.tell(book, trial, made, objective(), outcome, started_s=0.0, ended_s=90.0)
        tried.append(params)
        assert len(tried) == 1 or 1 <= off_nearest(params, tried[:-1]) <= 3
    assert "by what the values look like" in book.trials[1].user_attrs["reason"]
    assert max(p["k0"] for p in tried[:4]) == 8 and any(p["k2"] != "none" for p in tried[:4])


def test_a_study_of_plain_values_is_warned_of_once():
    """As with Optuna's own samplers: there is no outcome to learn from, and the default would come for ever."""
    told = study(sampler())
    distributions = space().distributions()
    with pytest.warns(UserWarning, match="TunerSampler learns from outcomes") as seen:
        for _ in range(3):
            told.tell(told.ask(distributions), [1.0, 1.0])
    assert len([w for w in seen if "TunerSampler" in str(w.message)]) == 1


def test_before_the_search_ends_it_tries_what_its_model_ruled_out():
    """The best has drafts, and the model has them eight times slower: no launch without them corrects it."""
    one = sampler(Model(wrong=lambda p: 8.0 if p["guess"] == "ngram" else 1.0), options=Options(remeasure_every=0))
    book = study(one)
    reasons = []
    while not any("before the search ends" in r for r in reasons) and len(reasons) < 25:
        run(book, 1)
        reasons.append(book.trials[-1].user_attrs["reason"])
    assert reasons[-1].endswith("no server has served with guess ngram yet"), reasons
    assert all(t.user_attrs["params"]["guess"] == "none" for t in book.trials[:-1]) and len(reasons) > 7
    before = regret([t.user_attrs["params"] for t in book.trials[:-1]])
    run(book, 8)
    assert regret([t.user_attrs["params"] for t in book.trials]) < before / 3


def test_what_no_server_served_with_is_of_parameters_without_order():
    one = sampler()
    book = study(one)
    run(book, 2, crash=lambda p: p["half"])
    trials = [read_outcome(s, objective(), LOADS) for s in ledger.read(book, space())]
    one.beliefs.learn(trials, 0)
    found = Scan(one.beliefs, LOADS, trials, []).unseen(range(len(one.candidates.params)))
    assert {one.candidates.params[i]["guess"] for i in found} == {"none", "ngram"}
    assert set(found.values()) == {"half True", "guess ngram"}
    running = next(i for i, words in found.items() if words == "half True")
    assert set(Scan(one.beliefs, LOADS, trials, [running]).unseen(list(found)).values()) <= {"guess ngram"}


def scanned(launches: int, repeats: int = 0) -> Scan:
    """A scan after so many launches, of which the last ones were repetitions of the first ones."""
    one = sampler(Model())
    book = study(one)
    run(book, launches - repeats)
    seen = ledger.read(book, space())
    seen += [replace(seen[k], number=len(seen) + k, remeasure_of=k) for k in range(repeats)]
    trials = [read_outcome(s, objective(), LOADS) for s in seen]
    one.beliefs.learn(trials, 0)
    return Scan(one.beliefs, LOADS, trials, [])


@pytest.mark.parametrize(("launches", "repeats", "due"), [(3, 0, False), (4, 0, True), (7, 1, False), (8, 1, True)])
def test_repetitions_take_no_more_than_their_share_of_the_launches(launches, repeats, due):
    scan = scanned(launches, repeats)
    doubt = scan.doubtful(scan.front(None), LaunchCost(60, 30), draws(0), every=4)
    assert (doubt is not None) == due
    assert scan.doubtful(scan.front(None), LaunchCost(60, 30), draws(0), every=0) is None


def test_what_was_measured_twice_is_not_measured_again():
    scan = scanned(8, repeats=4)
    assert scan.doubtful(scan.front(None), LaunchCost(60, 30), draws(0), every=1) is None


def test_a_shortlist_has_the_most_promising_of_what_is_free_and_a_few_at_random():
    scan = scanned(3)
    free = [i for i in range(len(scan.beliefs.candidates.params)) if i % 3]
    mean = scan.beliefs.posterior(free, spread=False)
    front = scan.front(mean)
    values = worth(scan.beliefs.posterior(free), front, LOADS, LaunchCost(60, 30), draws(0))
    best = free[int(np.argmax(values.gain / values.gpu_seconds**0.5))]
    first, second = (scan.shortlist(free, mean, front, 20, np.random.default_rng(n)) for n in (0, 1))
    for listed in (first, second):
        assert set(listed) <= set(free) and len(listed) == len(set(listed)) <= 20 and best in listed
    assert set(first) != set(second)
    assert scan.shortlist(free, mean, front, len(free), np.random.default_rng(0)) == free


def test_leaders_are_candidates_of_which_each_adds_to_the_front_that_those_before_it_make():
    scan = scanned(6)
    free = [i for i in range(len(scan.beliefs.candidates.params)) if i % 3]
    leaders = scan.leaders(free, 4)
    assert leaders and set(leaders) <= set(free) and len(set(leaders)) == len(leaders) <= 4
    assert scan.leaders(free, 1) == leaders[:1]
    assert len(scan.leaders(free, len(free))) < len(free), "what adds nothing is none"
    assert scan.leaders([], 4) == []


def test_a_parameter_that_does_not_apply_is_no_value_that_nothing_served_with():
    of = SearchSpace("of", "emulator", (*space().parameters[:3], knob("mode", "a", "b", default="a", when={"gpus": 2})))
    one = TunerSampler(of, objective(), LOADS, None, "m")
    both = [of.snap({"gpus": 2, "batch": 16, "half": half, "mode": "a"}) for half in (False, True)]
    seen = [ledger.Seen(n, params, launch({**params, "guess": "none"})) for n, params in enumerate(both)]
    found = Scan(one.beliefs, LOADS, [read_outcome(s, objective(), LOADS) for s in seen], []).unseen(
        range(len(one.candidates.params))
    )
    named = {one.candidates.params[i]["gpus"]: words for i, words in found.items()}
    assert named == {2: "mode b"}, "of numbers of GPUs, neighbours say something"


@pytest.mark.parametrize(("min_gain", "last"), [(0.9, 0.9), (0.0, 0.003)])
def test_what_is_new_is_tried_where_less_is_promised_than_the_study_asks_for(min_gain: float, last: float):
    """With 0 nothing ends a search, but it still tries what is new where the usual one would end."""
    one = choose.sampler("auto", space(), objective(), LOADS, min_gain=min_gain)
    assert isinstance(one, TunerSampler) and one.at_last.min_gain == last


@pytest.mark.parametrize(
    ("platform", "minutes", "says"),
    [
        ("cuda", 1.04, ", for 1 GPU-minute"),
        ("cuda", 3.26, ", for 3.3 GPU-minutes"),
        ("cpu", 12.0, ", for 12 minutes"),
        ("cpu", 0.001, ""),
    ],
)
def test_what_a_launch_takes_is_said_in_the_hardwares_words(platform: str, minutes: float, says: str):
    one = TunerSampler(replace(space(), facts={"platform": platform}), objective(), LOADS)
    assert one._price(minutes) == says
