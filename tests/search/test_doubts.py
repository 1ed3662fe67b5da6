"""How far constants may still be wrong, and what rules of thumb say of a parameter that the model leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.search.problem import LOADS, Model, knob, launch, objective, run, space, study
from tests.search.test_sampler import sampler
from tuner.search import ledger
from tuner.search.beliefs import Beliefs
from tuner.search.calibration import Launched, uncertainty
from tuner.search.candidates import Candidates
from tuner.search.doubts import DIRECTIONS, Doubts
from tuner.search.foresight import Foresight
from tuner.search.ledger import Seen
from tuner.search.prediction import Prediction
from tuner.search.reading import read
from tuner.search.sampler import TunerSampler
from tuner.space.config import ServingConfig
from tuner.space.space import Rule, SearchSpace
from tuner.study.outcome import Boot, Measured, Step

DOUBT = 0.4
NAMES = ("drafts", "half", "pace", "unfelt", "exact")


class Drafts(Model):
    """A model with constants: what drafts save, what halves save, the pace of everything (where it is felt), one that
    nothing feels. It refuses 4 GPUs."""

    def __init__(
        self,
        factors: Mapping[str, float] | None = None,
        off: Mapping[str, float] | None = None,
        felt: Sequence[str] = NAMES[:2],
    ) -> None:
        self.factors, self.off, self.felt = dict(factors or {}), dict(off or {}), felt
        super().__init__(wrong=self.factor, refuse=lambda params: params["gpus"] == 4)

    def factor(self, params: Mapping[str, Any]) -> float:
        logs = {n: math.log(self.factors.get(n, 1.0) * self.off.get(n, 1.0)) * (n in self.felt) for n in NAMES}
        length = params["length"] if params["guess"] == "ngram" else 0
        return math.exp(
            logs["pace"] - 0.3 * logs["drafts"] * math.log2(1 + length) - 0.1 * logs["half"] * params["half"]
        )

    def doubts(self) -> Mapping[str, float]:
        return {"drafts": DOUBT, "half": DOUBT, "pace": DOUBT, "unfelt": DOUBT, "exact": 0.0}

    def scaled(self, factors: Mapping[str, float]) -> Drafts:
        of = {n: self.factors.get(n, 1.0) * factors.get(n, 1.0) for n in NAMES}
        return type(self)(of, self.off, self.felt)


def foresight(model: Any) -> Foresight:
    return Foresight(Candidates.of(space(), 0), objective(), LOADS, model, "m")


def doubts(factors: Mapping[str, float] | None = None, model: Any = None, covariance: Any = None) -> Doubts:
    model = model or Drafts()
    sds = [sd for sd in model.doubts().values() if sd > 0]
    known = np.diag(np.square(sds)) if covariance is None else covariance
    return Doubts.of(foresight(model.scaled(factors or {})), model, factors or {}, known, 0)


def logs(found: Doubts, direction: int = 0) -> dict[str, float]:
    """By how much the constants are moved from the learnt ones."""
    there = found.moved[direction].predictor
    assert isinstance(there, Drafts)
    return {name: math.log(there.factors[name] / found.factors.get(name, 1.0)) for name in NAMES}


def test_the_direction_that_changes_most_comes_first_and_what_changes_nothing_is_none():
    found = doubts()
    assert 2 <= len(found.moved) <= DIRECTIONS
    first = logs(found)
    assert -DOUBT * 1.01 < first["drafts"] < -0.9 * DOUBT, "by one standard deviation, down, nearly all of it on these"
    assert abs(first["half"]) < 0.2 * DOUBT
    assert first["unfelt"] == pytest.approx(0.0, abs=1e-9) and first["exact"] == 0.0
    one = Drafts(felt=("drafts",))
    assert len(doubts(model=one).moved) == 1, "three constants that change nothing are no directions"


def test_a_constant_that_changes_the_capacity_alone_is_a_direction():
    class Roomy(Drafts):
        def factor(self, params: Mapping[str, Any]) -> float:
            return 1.0

        def predict(self, config: ServingConfig, load: float) -> Prediction:
            found = super().predict(config, load)
            if not found.fits:
                return found
            holds = 1.5 * self.factors.get("half", 1.0) ** space().snap(config.params)["half"]
            return Prediction(True, {**found.metrics, "ttft_p99_s": 0.5 * (load / holds) ** 3}, 1e5)

    assert abs(logs(doubts(model=Roomy()))["half"]) > 0.9 * DOUBT


def test_a_share_that_can_only_fall_is_doubted_too():
    class Shares(Drafts):
        def factor(self, params: Mapping[str, Any]) -> float:
            return math.exp(-0.1 * min(math.log(self.factors.get("half", 1.0)), 0.0) * params["half"])

    assert logs(doubts(model=Shares()))["half"] < -0.9 * DOUBT


def test_a_change_is_what_the_model_says_with_its_constants_moved_less_its_mean():
    found, every = doubts(), np.arange(len(Candidates.of(space(), 0).params))
    there = found.moved[0]
    there.look()
    fits = found.base.short_bytes <= 0
    assert 0 < fits.sum() < len(fits)
    for quantity in ("latency", "cost", "capacity"):
        change = found.changes(quantity, every)[0]
        assert change.shape == (len(every), 1 if quantity == "capacity" else len(LOADS))
        assert change[fits].mean() == pytest.approx(0.0, abs=1e-9)
        raw = (getattr(there, quantity) - getattr(found.base, quantity)).reshape(len(every), -1)[fits]
        assert change[fits] - raw == pytest.approx(np.broadcast_to((change[fits] - raw).mean(), raw.shape), abs=1e-9)
        assert (change[~fits] == 0).all(), "of what does not fit nothing is known"
    assert found.changes("latency", np.array([], dtype=np.int64))[0].shape == (0, len(LOADS))


def test_they_are_looked_for_around_the_learnt_constants_and_within_their_bounds():
    assert -1.01 * DOUBT < logs(doubts({"drafts": 1.5, "half": 0.8}))["drafts"] < -0.8 * DOUBT
    found = doubts({"drafts": math.exp(-2.8 * DOUBT)})
    assert logs(found)["drafts"] == pytest.approx(-0.2 * DOUBT), "no further than launches may move them"


def test_what_the_launches_settled_together_is_moved_together():
    """Launches have said what drafts and halves save in all, not which of them saves it."""
    sds = np.array([DOUBT, DOUBT, 0.01, 0.01])
    alike = np.eye(4)
    alike[0, 1] = alike[1, 0] = -0.99
    first = logs(doubts(covariance=alike * np.outer(sds, sds)))
    assert first["drafts"] == pytest.approx(-DOUBT, rel=0.05)
    assert first["half"] == pytest.approx(-first["drafts"], rel=0.1) and abs(first["pace"]) < 0.01


def test_they_are_made_anew_where_constants_moved_or_launches_settled_half_of_them():
    found, known = doubts({"drafts": 1.5}), np.eye(4) * DOUBT**2
    assert not found.stale(Drafts(), {"drafts": 1.5 * math.exp(0.45 * DOUBT)}, known)
    assert found.stale(Drafts(), {"drafts": 1.5 * math.exp(-0.55 * DOUBT)}, known)
    assert found.stale(Drafts(), {"drafts": 1.5, "pace": math.exp(0.55 * DOUBT)}, known)
    assert not found.stale(Drafts(), {"drafts": 1.5}, 0.6 * known)
    assert found.stale(Drafts(), {"drafts": 1.5}, 0.4 * known)


def test_a_model_without_doubts_or_without_room_has_no_directions():
    class Sure(Drafts):
        def doubts(self) -> Mapping[str, float]:
            return {"drafts": 0.0}

    class Full(Drafts):
        def predict(self, config: ServingConfig, load: float) -> Prediction:
            return Prediction(False, reason="full", short_bytes=1)

    for model in (Sure(), Full()):
        found = doubts(model=model)
        assert not found.moved and found.changes("latency", np.array([0])) == []
    assert found.stale(Full(), {}, np.eye(4)), "something may fit once memory is known better"


def test_a_model_that_fails_with_other_constants_is_asked_no_more_of_them():
    """A share above one, or an answer that never ends, is the doubt's fault and not the user's."""

    class Strict(Drafts):
        def predict(self, config: ServingConfig, load: float) -> Prediction:
            if self.factors.get("drafts", 1.0) < 0.8:
                raise ValueError("that is no share")
            found = super().predict(config, load)
            if self.factors.get("half", 1.0) < 0.9 and found.fits and space().snap(config.params)["half"]:
                return Prediction(True, {**found.metrics, "tpot_p99_s": math.inf}, 1e5)
            return found

    found = doubts(model=Strict())
    every = np.arange(len(found.base.candidates.params))
    changes = [c for quantity in ("latency", "cost", "capacity") for c in found.changes(quantity, every)]
    assert changes and all(np.isfinite(c).all() and np.abs(c).max() <= 2.0 for c in changes)
    endless = doubts(model=Strict(felt=("half",)))
    assert logs(endless)["half"] < -0.9 * DOUBT
    assert 1.0 <= np.ptp(endless.changes("latency", every)[0]) <= 2.0, "twenty log units are no derivative"
    assert 1.0 < np.abs(endless.slopes).max() < 2.5
    broken = foresight(Strict({"drafts": 0.5}))
    with pytest.raises(ValueError, match="no share"):
        broken.look()
    assert run(study(sampler(Strict())), 4)


def spread_of(one: TunerSampler, *asked: dict[str, Any]) -> list[float]:
    found = one.beliefs.posterior([one.beliefs.index(space().snap(p)) or 0 for p in asked])
    return found.latency_sd[:, 0].tolist()


def test_what_no_launch_says_of_a_constant_is_doubted_until_one_does():
    plain = {"gpus": 2, "batch": 32, "half": False, "guess": "none", "length": 0}
    drafts = {**plain, "guess": "ngram", "length": 8}

    def after(*launched: dict[str, Any], doubted: bool = True) -> tuple[float, float]:
        model = Drafts(off={"drafts": 0.6})
        one = sampler(model)
        if doubted:
            one.beliefs.sources.doubts = Doubts.of(one.foresight, model, {}, np.eye(4) * DOUBT**2, 0)
        seen = [Seen(n, space().snap(p), launch(p)) for n, p in enumerate(launched)]
        one.beliefs.learn([read(s, objective(), LOADS) for s in seen], 0)
        without, with_drafts = spread_of(one, {**plain, "batch": 64}, {**drafts, "batch": 64})
        return without, with_drafts

    unsure, sure = after(plain), after(plain, doubted=False)
    assert unsure[1] > 1.2 * sure[1], "drafts may save more than the constant says, or less"
    assert unsure[0] < 1.1 * sure[0]
    told = after(plain, drafts)
    assert told[1] < 0.7 * unsure[1]


def test_launches_settle_what_they_can_tell_and_those_that_are_alike_tell_little_more_than_one():
    plain = {"gpus": 2, "batch": 32, "half": False, "guess": "none", "length": 0}
    drafts = {**plain, "guess": "ngram", "length": 8}

    def sds(*many: dict[str, Any]) -> dict[str, float]:
        launches = [Launched(space().config(p, "m"), launch(p).steps[:1]) for p in many]
        found = uncertainty(Drafts(felt=NAMES), launches, objective(), {})
        return dict(zip(NAMES, np.sqrt(np.diag(found)), strict=False))

    before, one = sds(), sds(plain)
    assert before == pytest.approx(dict.fromkeys(NAMES[:4], DOUBT))
    assert one["pace"] < 0.7 * DOUBT and one["unfelt"] == pytest.approx(DOUBT)
    assert one["drafts"] == pytest.approx(DOUBT), "no launch had drafts"
    both = sds(plain, drafts)
    assert both["drafts"] < 0.9 * DOUBT
    four = sds(*({**plain, "batch": batch} for batch in (16, 32, 64, 128)))
    alike, apart = sds(plain, {**plain, "batch": 64}), sds(plain, {**drafts, "gpus": 1, "batch": 64, "half": True})
    assert 0.8 * one["pace"] < four["pace"] < one["pace"] and apart["pace"] < 0.98 * alike["pace"]


def test_a_launch_that_no_constants_explain_settles_less():
    def sd(times: float) -> float:
        step = launch(space().snap(space().default())).steps[0]
        slow = {name: value * times for name, value in step.metrics.items()}
        of = space().config(space().default(), "m")
        launched = Launched(of, [replace(step, metrics=slow)])
        return float(uncertainty(Drafts(felt=NAMES), [launched], objective(), {})[2, 2])

    assert sd(4.0) > 1.2 * sd(1.0)


def test_what_is_believed_of_learnt_constants_is_judged_without_their_doubts(monkeypatch: pytest.MonkeyPatch):
    """Constants that may be moved would explain what the learnt ones do."""
    judged, evidence = [], Beliefs.evidence

    def watched(self: Beliefs, readings: Any, seed: int, **how: Any) -> float:
        if not how and self.sources.share in ((0.0, 0.0), (1.0, 0.0)):
            judged.append((self.sources.share, self.sources.doubts))
        return evidence(self, readings, seed, **how)

    one = sampler(Drafts(off={"pace": 3.0}, felt=NAMES))
    monkeypatch.setattr(Beliefs, "evidence", watched)
    run(study(one), 3)
    assert ((0.0, 0.0), None) in judged and ((1.0, 0.0), None) in judged
    assert all(doubts is None for share, doubts in judged if share == (1.0, 0.0))
    assert one.beliefs.sources.doubts is not None


def test_a_search_keeps_them_and_leaves_them_with_a_model_that_lost():
    one = sampler(Drafts(off={"pace": 3.0}, felt=NAMES))
    book = study(one)
    run(book, 1)
    assert one.beliefs.sources.doubts is None, "before the first launch the model is taken as it is"
    made: list[Doubts] = []
    for _ in range(6):
        run(book, 1)
        doubts = one.beliefs.sources.doubts
        assert doubts is not None
        base = doubts.base.predictor
        assert isinstance(base, Drafts) and {n: base.factors.get(n, 1.0) for n in NAMES[:4]} == pytest.approx(
            {n: doubts.factors.get(n, 1.0) for n in NAMES[:4]}
        )
        assert abs(math.log(one.factors["pace"] / doubts.factors["pace"])) <= 0.5 * DOUBT
        made.append(doubts)
    assert len({id(d) for d in made}) > 1 and made[-1].open < made[0].open
    sources = one.beliefs.sources
    assert sources.doubts is not None
    names = [s.name for s in sources.of("latency", [0])]
    assert sum("doubted" in name for name in names) == len(sources.doubts.moved) > 0
    sources.trusted = False
    assert not any("doubted" in s.name for s in sources.of("latency", [0]))


RULED = SearchSpace(
    "test",
    "emulator",
    (
        knob("gpus", 1, 2, 4, default=1, numeric=True, log=True, counts_gpus=True),
        knob("max_num_seqs", 8, 16, 32, default=16, numeric=True, log=True),
        knob("method", "none", "ngram", default="none"),
        knob("all2all_backend", "naive", "deepep", default="naive", when={"method": "ngram"}),
        knob("async_scheduling", True, False, default=False),
        knob("shade", "red", "blue", default="red"),
    ),
)


class Terse(Model):
    """Knows GPUs and sequences, and of memory what the scheduling takes where ``frugal``."""

    def __init__(self, frugal: bool = False) -> None:
        super().__init__()
        self.frugal = frugal

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        params = RULED.snap(config.params)
        seconds = 0.02 / params["gpus"] ** 0.5 * (params["max_num_seqs"] / 32) ** 0.2
        metrics = {"ttft_p99_s": 0.05, "tpot_p99_s": seconds, "cost_usd_per_mtok_output": params["gpus"] / load}
        return Prediction(True, metrics, 1e5 + self.frugal * 1e4 * params["async_scheduling"])


def ruled(model: Any) -> TunerSampler:
    return TunerSampler(RULED, objective(), LOADS, model, "m")


def left_out(model: Any) -> list[str]:
    found = ruled(model).beliefs.sources.left_out()
    return [p.name for p, out in zip(RULED.parameters, found, strict=True) if out]


def test_what_the_model_leaves_out_and_rules_know_is_found():
    assert left_out(Terse()) == ["all2all_backend", "async_scheduling"], "no rule knows the shade"
    assert left_out(Terse(frugal=True)) == ["all2all_backend"], "what changes the room for KV is not left out"


def test_a_parameter_that_no_candidate_has_is_not_called_left_out():
    never = SearchSpace(
        "test",
        "emulator",
        (*RULED.parameters[:3], knob("all2all_backend", "naive", "deepep", default="naive", when={"method": "draft"})),
    )
    one = Foresight(Candidates.of(never, 0), objective(), LOADS, Terse(), "m")
    assert not one.silent_on(3) and one.silent_on(2)


def test_what_may_not_be_launched_or_does_not_fit_says_nothing_of_what_is_left_out():
    class Table(Terse):
        def predict(self, config: ServingConfig, load: float) -> Prediction:
            params = RULED.snap(config.params)
            if params["gpus"] == 1 and params["max_num_seqs"] == 32:
                raise KeyError("the table has no such row")
            if params["gpus"] == 4:
                return Prediction(False, reason="full", short_bytes=1 + params["async_scheduling"])
            return super().predict(config, load)

    fenced = replace(RULED, rules=(Rule({"gpus": 1, "max_num_seqs": 32}, "never measured"),))
    one = Foresight(Candidates.of(fenced, 0), objective(), LOADS, Table(), "m")
    assert one.silent_on(4) and not one.silent_on(1)
    alone = replace(RULED, rules=(Rule({"async_scheduling": True}, "not here"),))
    assert not Foresight(Candidates.of(alone, 0), objective(), LOADS, Terse(), "m").silent_on(4), "nothing to compare"


def by_rules(one: TunerSampler, name: str, asked: Sequence[dict[str, Any]]) -> Any:
    indices = [one.beliefs.index(RULED.snap({**RULED.default(), **p})) or 0 for p in asked]
    found = [s for s in one.beliefs.sources.of(name, indices) if s.name == "rules of thumb"]
    return found[0].values[:, 0] if found else None


def test_rules_of_thumb_say_what_a_trusted_model_leaves_out_and_nothing_else():
    one = ruled(Terse())
    asked = [{}, {"async_scheduling": True}, {"max_num_seqs": 32}, {"method": "ngram"}]
    slow, fast, many, drafts = by_rules(one, "latency", asked)
    assert fast == pytest.approx(slow - 0.05) and many == pytest.approx(slow)
    assert drafts == pytest.approx(slow + 0.1), "naive among its own values; that it applies is no news to the model"
    assert by_rules(one, "cost", asked) is None
    assert "number of GPUs" not in [s.name for s in one.beliefs.sources.of("latency", [0])]
    one.beliefs.sources.trusted = False
    slow, fast, many, _ = by_rules(one, "latency", asked)
    assert fast < slow < many, "without the model the rules say all that they know"

    knows = ruled(Wordy())
    assert knows.beliefs.sources.left_out().sum() == 0 and by_rules(knows, "latency", asked) is None


class Wordy(Terse):
    """Knows something of every parameter."""

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        params, found = RULED.snap(config.params), super().predict(config, load)
        known = 1.1 ** (params["async_scheduling"] + (params["all2all_backend"] == "deepep"))
        return Prediction(True, {**found.metrics, "tpot_p99_s": found.metrics["tpot_p99_s"] / known}, found.kv_tokens)


def test_the_second_launch_already_has_what_rules_advise_beside_the_model():
    one = ruled(Terse())
    book = study(one)
    for _ in range(2):
        trial, params = ledger.ask(book, RULED)
        answers = [(load, Terse().predict(RULED.config(params, "m"), load).metrics) for load in LOADS]
        steps = tuple(Step(load, "s", dict(metrics)) for load, metrics in answers)
        ledger.tell(book, trial, RULED, objective(), Measured(steps, Boot(30.0)))
    assert params["async_scheduling"] is True
    assert trial.user_attrs["reason"].startswith("spread over the model's predicted front")
