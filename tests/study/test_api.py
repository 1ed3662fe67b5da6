"""Ask and tell without the CLI."""

import math

import numpy as np
import pytest

import tuner
from tuner.api import AskTell
from tuner.errors import UsageError
from tuner.report.page import build

STUDY = {
    "name": "mine",
    "engine": {"kind": "function", "target": "nowhere:nothing"},
    "search_space": {
        "name": "mine",
        "engine": "function",
        "parameters": {
            "batch": {"flag": "batch", "range": [8, 512], "scale": "log2", "default": 32},
            "colour": {"flag": "colour", "values": ["red", "green"], "default": "red"},
        },
    },
    "objective": {"latency": "tpot_p99", "slo": {"tpot_p99": "100ms"}, "price_usd_per_gpu_hour": 3.6},
    "load": {"ladder": [1, 2]},
    "budget": {"launches": 6, "verify_share": 0},
}


@pytest.fixture
def study(tmp_path):
    return {**STUDY, "reports": str(tmp_path)}


def measure(params, load):
    return {"tpot_p99_s": 0.01 * load + params["batch"] / 10_000, "goodput_output_tokens_per_s": params["batch"] * load}


def test_ask_and_tell_end_with_the_budget_and_choose_the_cheapest_within_slo(study):
    with AskTell(study) as search:
        asked = []
        while (proposal := search.ask()) is not None:
            asked.append(dict(proposal.params))
            search.tell(proposal, {load: measure(proposal.params, load) for load in (1.0, 2.0)})
        point = search.choice().point
        assert len(asked) == 6
        assert asked[0] == {"batch": 32, "colour": "red"}  # the default first
        best = max(p["batch"] for p in asked)
        assert point.config.params["batch"] == best
        assert point.cost == pytest.approx(3.6 / 3600 / (best * 2) * 1e6)


def test_every_type_of_gpu_has_its_own_price(study):
    types = {"values": {"L4": {}, "H100": {"gpu": "H100-SXM"}}, "default": "L4"}
    space = {"name": "types", "engine": "function", "parameters": {"type": types}}
    study |= {"search_space": space, "hardware": {"gpu": "L4", "gpus": 1}, "objective": dict(STUDY["objective"])}
    study["objective"].pop("price_usd_per_gpu_hour")
    study["price_usd_per_gpu_hour"] = {"L4": 1, "H100-SXM": 10}
    with AskTell(study) as search:
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {1.0: {"tpot_p99_s": 0.01, "goodput_output_tokens_per_s": 1000.0}})
        trials = search.store.trials()
        assert {t.params["type"]: t.price for t in trials} == {"L4": 1, "H100": 10}
        costs = {t.params["type"]: t.outcome.steps[0].metrics["cost_usd_per_mtok_output"] for t in trials}
        assert costs["H100"] == pytest.approx(10 * costs["L4"]) == pytest.approx(10 / 3.6)


def test_loads_above_the_first_that_missed_an_slo_are_not_measured(study):
    with AskTell(study) as search:
        proposal = search.ask()
        missed = {"tpot_p99_s": 0.2, "goodput_output_tokens_per_s": 9.0}
        search.tell(proposal, {2.0: measure(proposal.params, 2.0), 1.0: missed})
        assert [step.load for step in search.store.trial(0).outcome.steps] == [1.0]
        assert not search.front()


@pytest.mark.parametrize(("launches", "share", "most"), [(10, 0.4, 6), (6, 0, 2)])
def test_a_verification_takes_no_more_than_the_whole_budget_from_what_is_asked(study, launches, share, most):
    study["budget"] = {"launches": launches, "verify_share": share}
    with AskTell(study) as search:
        first = search.ask()
        search.tell(first, {1.0: measure(first.params, 1.0)})
        for number in range(100, 104):
            search.store.start_trial(number, first.config, first.params, role="verify")
            search.store.end_trial(number, search.store.trial(0).outcome)
        asked = 1
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {1.0: measure(proposal.params, 1.0)})
            asked += 1
        assert asked == most
        assert {point.role for point in search.front()} == {"search"}


def test_a_refusal_is_told_and_never_asked_again(study):
    with AskTell(study) as search:
        first = search.ask()
        search.tell(first, tuner.Infeasible("1.9 GiB short"))
        assert search.store.trial(0).outcome.message == "1.9 GiB short"
        others = [search.ask() for _ in range(3)]
        assert first.config.hash not in {p.config.hash for p in others}
        assert search.choice().point is None


def test_where_only_the_output_is_told_it_counts_as_goodput_and_without_any_the_caller_hears_of_it(study):
    with AskTell(study) as search:
        proposal = search.ask()
        search.tell(proposal, {1.0: {"tpot_p99_s": 0.02, "output_tokens_per_s": 100.0}})
        assert search.choice().point.cost == pytest.approx(3.6 / 3600 / 100 * 1e6)
        with pytest.raises(UsageError, match="there is no cost without"):
            search.tell(search.ask(), {1.0: {"tpot_p99_s": 0.02}})


def test_a_second_session_goes_on_where_the_first_ended(study):
    with AskTell(study) as search:
        proposal = search.ask()
        search.tell(proposal, {1.0: measure(proposal.params, 1.0)})
    with AskTell(study) as search:
        assert search.ask().number == 1


def test_a_wrong_key_is_a_usage_error(study):
    with pytest.raises(UsageError, match="unknown key 'budgt'"):
        AskTell({**study, "budgt": 1})


GOOD = {"tpot_p99_s": 0.01, "output_tokens_per_s": 900.0}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({1.0: {**GOOD, "tpot_p99_s": math.nan}}, "tpot_p99_s=nan"),
        ({1.0: {**GOOD, "note": "hello"}}, "note='hello', which is not a number"),
        ({1.0: {**GOOD, "error_rate": None}}, "error_rate=None, which is not a number"),
        (
            {1.0: {"tpot_p99": 0.01, "output_tokens_per_s": 900.0}},
            "did not return tpot_p99_s, which the objective needs",
        ),
        ({1.0: {**GOOD, "error_rate": 1.5}}, "error_rate=1.5, which is a share: 1 at most"),
        ({1.0: 5}, "not a mapping of metrics"),
        ({"often": GOOD}, "a load is a number above zero"),
        ({0: GOOD}, "a load is a number above zero"),
        ({}, "no load was told"),
        (None, "NoneType is no outcome"),
        (ValueError("x"), "ValueError is no outcome"),
    ],
)
def test_what_is_no_outcome_is_refused_before_anything_is_written(study, told, says):
    with AskTell(study) as search:
        proposal = search.ask()
        with pytest.raises(UsageError, match=says):
            search.tell(proposal, told)
        search.tell(proposal, {1.0: GOOD})
    with AskTell(study) as search:  # the folder is as good as ever
        assert search.ask().number == 1


def test_a_proposal_is_told_once_and_the_budget_ends(study):
    with AskTell(study) as search:
        asked = []
        while (proposal := search.ask()) is not None and len(asked) < 20:
            asked.append(proposal)
            search.tell(proposal, {1.0: GOOD})
            with pytest.raises(UsageError, match=f"proposal {proposal.number} was told already"):
                search.tell(proposal, {1.0: {**GOOD, "output_tokens_per_s": 9.0}})
        assert len(asked) == 6
        assert all(t.outcome.steps[0].metrics["output_tokens_per_s"] == 900.0 for t in search.store.trials())
    with AskTell({**study, "name": "other"}) as search, pytest.raises(UsageError, match="not asked in this session"):
        search.tell(asked[0], {1.0: GOOD})


def test_numbers_of_any_kind_are_numbers(study):
    metrics = {"tpot_p99_s": np.float32(0.01), "output_tokens_per_s": np.int64(900), "extra": np.array(1)}
    with AskTell(study) as search:
        search.tell(search.ask(), {np.float32(2): metrics, "1": metrics})
    with AskTell(study) as search:
        steps = search.store.trial(0).outcome.steps
        assert [step.load for step in steps] == [1.0, 2.0]
        assert all(type(value) is float for step in steps for value in step.metrics.values())


def test_without_slos_every_load_is_within_them(study):
    free = {**study, "objective": {"latency": "tpot_p99", "slo": {}, "price_usd_per_gpu_hour": 3.6}}
    with AskTell({**free, "budget": {"launches": 9, "verify_share": 0}}) as search:
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {load: measure(proposal.params, load) for load in (1.0, 2.0)})
        assert search.choice().point.load == 2.0


@pytest.mark.parametrize("steps", [8, 12])
def test_a_space_of_which_the_rules_leave_one_in_a_million_is_searched(study, steps):
    """Rising numbers: 50,388 of 8^12 combinations; the default is none of them."""
    parameters = {
        f"a{i}": {"flag": f"a{i}", "values": list(range(1, 9)), "default": max(1, 8 - i)} for i in range(steps)
    }
    rules = [{"deny": {f"a{i}": {"gt": f"$a{i + 1}"}}, "because": "they rise"} for i in range(steps - 1)]
    space = {"name": "rising", "engine": "function", "parameters": parameters, "rules": rules}
    with AskTell({**study, "search_space": space}) as search:
        asked = []
        while (proposal := search.ask()) is not None:
            asked.append([proposal.params[f"a{i}"] for i in range(steps)])
            search.tell(proposal, {1.0: {"tpot_p99_s": 0.01 + sum(asked[-1]) / 10_000, "output_tokens_per_s": 900.0}})
    assert len(asked) == 6 and all(a == sorted(a) for a in asked)


def test_rules_that_leave_nothing_are_said_to(study):
    denied = {"rules": [{"deny": {"colour": ["red", "green"]}, "because": "no such paint"}]}
    with (
        pytest.raises(
            UsageError, match=r"no configuration of the space 'mine'.*of the default they say: no such paint"
        ),
        AskTell({**study, "search_space": {**study["search_space"], **denied}}),
    ):
        pass


def sized(study, **hardware):
    sizes = {"values": [1, 2, 4, 8], "default": 1, "counts_gpus": True}
    parameters = {"tensor_parallel_size": sizes, "data_parallel_size": sizes, **study["search_space"]["parameters"]}
    space = {**study["search_space"], "parameters": parameters}
    return {**study, "search_space": space, "hardware": {"gpu": "H100-SXM", **hardware}, "budget": "12 launches"}


def asked_gpus(study) -> list[int]:
    found = []
    with AskTell(study) as search:
        while (proposal := search.ask()) is not None:
            found.append(proposal.config.gpus)
            search.tell(proposal, {load: measure(proposal.params, load) for load in (1.0, 2.0)})
    return found


def test_no_more_gpus_are_asked_for_than_the_study_names(study):
    named = asked_gpus(sized(study, gpus="8"))
    assert max(named) <= 8 and len(named) > 2
    own = {**sized(study, gpus=2), "name": "random", "sampler": "random"}  # Optuna's samplers know of no GPUs
    assert max(asked_gpus(own)) == 2
    cluster = {**own, "name": "cluster", "executor": {"kind": "ray"}}
    assert max(asked_gpus(cluster)) > 2  # which may get a larger node
    assert max(asked_gpus({**sized(study), "name": "other"})) > 1  # those of this machine say nothing of who launches


def flat(study, min_gain):
    """How many launches are asked for of 70 configurations that all measure the same."""
    parameters = {
        "batch": STUDY["search_space"]["parameters"]["batch"],
        "colour": {"flag": "colour", "values": list("abcdefghij"), "default": "a"},
    }
    space = {**study["search_space"], "parameters": parameters}
    budget = {"launches": 25, "verify_share": 0, "min_gain": min_gain}
    with AskTell({**study, "search_space": space, "budget": budget}) as search:
        while (proposal := search.ask()) is not None:
            search.tell(proposal, {1.0: GOOD})
        return len(search.store.trials())


def test_a_search_ends_where_nothing_promises_what_the_study_asks_for(study):
    assert flat(study, "50%") == 10
    assert flat(study, 0) == 25  # it goes on from there, in the same folder


@pytest.mark.parametrize(("said", "asked"), [({}, 10), ({"verify_share": 0.3}, 7)])
def test_the_whole_budget_is_the_searchs_unless_the_study_keeps_a_share_of_it(study, said, asked):
    with AskTell({**study, "budget": {"launches": 10, **said}}) as search:
        while (proposal := search.ask()) is not None:
            assert search.ended == ""
            search.tell(proposal, {load: measure(proposal.params, load) for load in (1.0, 2.0)})
        assert len(search.store.trials()) == asked
        assert search.ended.startswith(f"the search's {asked} launches are spent")


def test_why_nothing_more_is_asked_is_said(study):
    pinned = {"parameters": {"batch": 32}, "budget": 10}
    with AskTell({**study, **pinned}) as search:
        asked = [search.ask(), search.ask()]
        assert search.ask() is None and search.ended == "every configuration of the space has been tried"
        for proposal in asked:
            search.tell(proposal, {1.0: GOOD})


def test_what_an_earlier_study_is_worth_is_noted_and_on_the_page(study, tmp_path):
    def told(made):
        with AskTell(made) as search:
            while (proposal := search.ask()) is not None:
                search.tell(proposal, {load: measure(proposal.params, load) for load in (1.0, 2.0)})
            return search

    told(study)
    search = told({**study, "name": "later", "warm_start": [str(tmp_path / "mine")]})
    first, *_, last = search.store.trials()
    assert "learnt" not in first.extra
    (said,) = [last.extra["learnt"]["earlier"]["mine"]]
    assert said.keys() == {"latency", "capacity", "cost"}
    text = build(search.store, search.study, tmp_path / "report.html").read_text()
    assert f"in the earlier study mine it takes: latency {said['latency']:.2f}, " in text


def test_that_an_earlier_study_is_of_no_use_is_a_warning(study, tmp_path):
    with AskTell(study):
        pass
    with pytest.warns(UserWarning, match="mine is not used: too few of its launches were measured"):
        with AskTell({**study, "name": "later", "warm_start": [str(tmp_path / "mine")]}):
            pass
