import dataclasses
import math

import pytest

from benchmarks.verify.language import divergence as exact
from benchmarks.verify.language import language, serve
from tests.server.test_probe import HEADS, dripping
from tuner.engines.protocol import Endpoint
from tuner.spec.objective import QualityFloor
from tuner.study.store import read_json, write_json
from tuner.verify.completions import Completions, Unanswered
from tuner.verify.quality import Profile, _agreement, _judge, check, divergence, profile
from tuner.verify.statistics import Estimate

FLOOR = QualityFloor(kl_max=0.05, top1_min=0.8)


@pytest.fixture(scope="module")
def base() -> Profile:
    with serve(language(0.0)) as endpoint:
        return profile(endpoint, "abc", seed=1, count=8, drawn=32, greedy=16)


def checked(base: Profile, damage: float, floor: QualityFloor = FLOOR, **more):
    with serve(language(damage)) as endpoint:
        return check(endpoint, base, floor, **more)


def places(base: Profile) -> list[int]:
    return [token for sequence in base.sequences for token in sequence.tokens[:-1]]


def test_the_same_model_passes_with_nothing_moved(base):
    found = checked(base, 0.0)
    assert found.verdict == "passed"
    assert (found.kl, found.top1, found.greedy) == pytest.approx((0.0, 1.0, 1.0), abs=1e-9)


def test_damage_is_refused_with_the_figure_as_evidence(base):
    refused = checked(base, 1.0)
    assert refused.verdict == "failed" and "nats per token > 0.05" in refused.reason


def test_harmless_rounding_is_accepted(base):
    assert checked(base, 0.05).verdict == "passed"


def test_the_divergence_is_a_lower_bound_and_the_drawn_one_is_unbiased(base):
    for damage in (0.3, 1.0):
        found = checked(base, damage)
        truth = exact(language(0.0), language(damage), places(base))
        assert 0.5 * truth < found.kl <= truth
        assert abs(found.kl_drawn - truth) < 4 * found.kl_drawn_error


def test_tokens_are_drawn_from_all_of_the_distribution_whatever_the_models_generation_config_says():
    kept = {"vocabulary": 400, "sharpness": 2.0}
    with serve(language(0.0, top_k=5, **kept)) as endpoint:
        base = profile(endpoint, seed=1, count=8, drawn=64, greedy=4)
    truth = exact(language(0.0, **kept), language(0.5, **kept), places(base))
    with serve(language(0.5, top_k=5, **kept)) as endpoint:
        found = check(endpoint, base, QualityFloor())
        older = check(endpoint, Profile.from_dict({**base.to_dict(), "unaltered": False}), QualityFloor(kl_max=9))
    ranks = [sum(v > own for v in top.values()) for s in base.sequences for own, top in drawn_tokens(s)]
    assert sum(rank >= 5 for rank in ranks) > len(ranks) / 4
    assert abs(found.kl_drawn - truth) < 4 * found.kl_drawn_error
    assert math.isnan(older.kl_drawn) and older.verdict == "passed"


def drawn_tokens(sequence):
    scores = sequence.scores
    return list(zip(scores.tokens, scores.tops, strict=True))[sequence.given - 1 :]


def test_merging_all_unlisted_tokens_never_overstates_the_divergence():
    p = {1: math.log(0.5), 2: math.log(0.2)}
    q = {1: math.log(0.4), 2: math.log(0.2)}
    kl, covered = divergence(p, q)
    assert covered == pytest.approx(0.7)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4))
    assert divergence(p, p)[0] == 0.0
    assert divergence({1: 0.0}, {1: math.log(0.5)}) == (pytest.approx(math.log(2)), 1.0)  # nothing is unlisted


@pytest.mark.parametrize(
    ("found", "share"),
    [((1, 2, 3, 4), 1.0), ((1, 2, 9, 4), 0.5), ((1, 2), 0.5), ((9, 2, 3, 4), 0.0), ((1, 2, 3, 4, 5), 1.0), ((), 0.0)],
)
def test_greedy_answers_agree_until_they_part(found, share):
    assert _agreement((1, 2, 3, 4), found) == share and _agreement((), found) == 1.0


def test_a_token_that_only_one_side_lists_goes_into_the_bucket():
    kl, covered = divergence({1: math.log(0.9)}, {2: math.log(0.9)})
    assert covered == 0.0 and kl == 0.0  # nothing is known to differ: the bound is weak, and `covered` says so


def test_each_test_of_the_floor_can_refuse_alone_and_none_refuses_unasked(base):
    assert checked(base, 0.5, QualityFloor()).verdict == "passed"
    for floor, words in (
        (QualityFloor(kl_max=0.01), "KL divergence"),
        (QualityFloor(top1_min=0.99), "most probable token"),
        (QualityFloor(greedy_min=0.99), "greedy answers"),
    ):
        found = checked(base, 0.5, floor)
        assert found.verdict == "failed" and words in found.reason


def test_where_the_list_holds_little_of_the_probability_the_report_says_so():
    """Random weights: nearly all tokens equally probable."""
    with serve(language(0.0, sharpness=0.5)) as endpoint:
        flat = profile(endpoint, seed=1, count=4, drawn=16, greedy=8)
    with serve(language(0.05, sharpness=0.5)) as endpoint:
        found = check(endpoint, flat, QualityFloor(kl_max=0.05), random_weights=True)
    assert found.covered < 0.5 and "weak lower bound" in found.reason
    assert "says nothing about the quality of a trained model" in found.reason


def test_a_strong_damage_behind_a_weak_bound_is_still_refused_by_the_drawn_tokens():
    with serve(language(0.0, sharpness=1.0)) as endpoint:
        flat = profile(endpoint, seed=1)
    with serve(language(1.0, sharpness=1.0)) as endpoint:
        found = check(endpoint, flat, QualityFloor(kl_max=0.2))
    assert found.kl < 0.2 < found.kl_drawn
    assert found.verdict == "failed"


@pytest.mark.parametrize(("variance", "verdict"), [(0.02, "passed"), (0.0001, "failed")])
def test_drawn_tokens_refuse_only_where_they_are_sure(variance, verdict):
    """They say 0.2 nats per token, give or take 0.3 or 0.02; 0.1 are allowed."""
    none = Profile("m", "", ())
    said = _judge(0.0, 1.0, Estimate(0.2, ((variance, 5.0),)), 1.0, 1.0, QualityFloor(kl_max=0.1), none, False)
    assert said[0] == verdict


def test_the_users_own_prompts_are_taken_where_there_are_some():
    with serve(language(0.0)) as endpoint:
        own = profile(endpoint, prompts=["hello there", "and again"], count=5, drawn=4, greedy=4)
    assert own.own_text and len(own.sequences) == 2


def test_the_baselines_own_noise_is_kept_beside_it(base):
    assert base.noise == {"kl": 0.0, "top1": 1.0, "greedy": 1.0}


@pytest.mark.parametrize("body", [b"data: {}\n\n", b"[]", b'{"choices": []}'])
def test_a_server_that_answers_with_something_else_is_unknown_in_words(base, body, monkeypatch):
    monkeypatch.setattr(Completions, "_answer", lambda *_: (200, body))
    found = check(Endpoint("http://127.0.0.1:1", "m", ""), base, FLOOR)
    assert found.verdict == "unknown" and "not streamed is answered with something else than JSON" in found.reason


def test_a_server_without_prompt_log_probabilities_is_unknown_not_passed(base):
    with serve(dataclasses.replace(language(0.0), prompt_logprobs=False)) as endpoint:
        found = check(endpoint, base, FLOOR)
        with pytest.raises(Unanswered, match="prompt_logprobs"):
            profile(endpoint, count=1)
    assert found.verdict == "unknown" and "prompt_logprobs" in found.reason


def test_a_comparison_of_nothing_is_unknown_not_passed(base):
    nothing = dataclasses.replace(base, sequences=())
    for empty in (nothing, Profile.from_dict(nothing.to_dict())):
        found = checked(empty, 0.0)
        assert found.verdict == "unknown" and "no token to compare" in found.reason and math.isnan(found.kl)


def test_a_server_that_is_gone_is_unknown(base):
    assert check(Endpoint("http://127.0.0.1:9", "m"), base, FLOOR).verdict == "unknown"


def test_a_server_whose_answer_drips_for_ever_is_unknown(base):
    with dripping(HEADS[0]) as port:
        found = check(Endpoint(f"http://127.0.0.1:{port}", "m"), base, FLOOR, timeout_s=0.5)
    assert found.verdict == "unknown" and "no whole answer came within 0.5 s" in found.reason


def test_a_profile_survives_the_way_to_disk_and_back(base, tmp_path):
    write_json(tmp_path / "quality.json", base.to_dict())
    assert Profile.from_dict(read_json(tmp_path / "quality.json")) == base
