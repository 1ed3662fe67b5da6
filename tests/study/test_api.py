"""Ask and tell without the CLI."""

import pytest

import tuner
from tuner.api import AskTell
from tuner.errors import UsageError

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
