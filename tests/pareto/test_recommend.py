import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import studies
from tuner.errors import EnvironmentFault, NothingFeasible
from tuner.export.deployment import deployment
from tuner.export.formats import best_config
from tuner.pareto.choice import choose
from tuner.pareto.recommend import _further, _times, ablation, low_ladder, recommended
from tuner.spec.study import GROWS
from tuner.study.outcome import Measured
from tuner.study.price import COST, GOODPUT
from tuner.study.store import EXHAUSTED, UNFOUND, Store, write_json
from tuner.study.verifying import verification
from tuner.verify.judge import Arm


def test_without_a_verdict_the_search_decides(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    assert recommended(store, study) == choose(store.trials(), study.objective)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ((9.0, 2.0, 2.0, 2.02, 2.0), "4 of the search's 5 configurations held the ladder's highest load (3)"),
        ((9.0, 2.0, 2.0, 2.0, 3.0), ""),  # one is dearer: three alike are few
        ((9.0, 2.0, 2.0, 2.02, 2.0, 9.0, 9.0, 9.0), ""),  # a half of them is not most
    ],
)
def test_a_ladder_too_low_for_the_search_to_choose_is_told(tmp_path: Path, costs, said):
    """Those of 9 USD do not hold the ladder's highest load."""
    store, known = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    for number, cost in enumerate(costs):
        load = 1.0 if cost == 9.0 else max(known.load.ladder)
        one = studies.step(load, known.objective)
        one = replace(one, metrics={**one.metrics, COST: cost}, intervals={COST: (cost * 0.99, cost * 1.01)})
        params = {"max_num_seqs": (256, 64, 128, 512)[number % 4], "tensor_parallel_size": 1 + number // 4}
        studies.measured(number, (one,), store, params=params, baseline=number == 0)
    assert low_ladder(known, store.trials()).partition(",")[0] == said
    assert (said in recommended(store, known).text) and ("load.ladder" in recommended(store, known).text) == bool(said)


def test_a_ladder_that_grew_and_that_all_held_asks_for_a_longer_trace(tmp_path: Path):
    store, known = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    known = replace(known, frozen={"frozen": {"ladder": "auto", GROWS: True}})
    assert known.grows
    for number, seqs in enumerate((256, 64, 128, 512)):
        steps = [studies.step(load, known.objective) for load in (max(known.load.ladder), 9.0)]
        steps = [replace(s, metrics={**s.metrics, COST: 2.0}, intervals={COST: (1.98, 2.02)}) for s in steps]
        studies.measured(number, (*steps,), store, params={"max_num_seqs": seqs}, baseline=number == 0)
    said = low_ladder(known, store.trials())
    assert "held the ladder's highest load (9)" in said and "whose trace fills higher loads" in said
    missed = replace(steps[-1], load=12.0, slo_misses=("ttft_p99 too long",))
    studies.measured(4, (*steps, missed), store, params={"max_num_seqs": 1024})
    assert low_ladder(known, store.trials()) == "", "one of them was followed to where it misses"


def test_a_verdict_decides_with_its_own_load_cost_and_latency(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10, verified=True)
    searched, found = choose(store.trials(), study.objective), recommended(store, study)
    assert searched.point and found.point and found.point.role == "verify"
    assert (found.point.load, found.point.cost, found.point.latency) == (1.8, 0.47, 0.031)
    assert found.point.cost_interval == (0.45, 0.49)
    assert found.baseline and found.baseline.cost == 0.66
    assert found.cost_change and found.cost_change.value == pytest.approx(-0.26) and found.cost_change.proven
    assert found.latency_change and found.latency_change.interval == pytest.approx((0.02, 0.19))
    assert "Recommended: trial" in found.text and "**" not in found.text


def test_tokens_per_second_are_known_of_a_verified_point_where_costs_follow_from_them(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10, verified=True)
    found = recommended(store, study).point
    own = [t for t in store.trials() if found and t.config.hash == found.config.hash][-1]
    price = {round(s.metrics[COST] * s.metrics[GOODPUT], 6) for s in own.outcome.steps}
    assert found and len(price) == 1 and found.metrics[GOODPUT] == pytest.approx(price.pop() / found.cost)
    told = tuple(replace(s, metrics={**s.metrics, COST: 5.0 / (1 + i)}) for i, s in enumerate(own.outcome.steps))
    store.end_trial(own.number, replace(own.outcome, steps=told), 60.0)  # an engine's own costs: of no price
    again = recommended(store, study).point
    assert again and GOODPUT not in again.metrics


def test_a_verdict_for_the_default_overrules_the_search(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    verdict = studies.verification(study, store)
    data = verdict.to_dict() | {"choice": "default", "is_default": True, "trial": 0, "load": 1.3}
    data["config"] = store.trials()[0].config.to_dict()
    write_json(store.folder / "verify.json", data)
    found = recommended(store, study)
    assert found.point and found.point.baseline and found.point.trial == 0 and found.cost_change is None


def test_a_default_that_held_nowhere_on_the_held_out_windows_is_nothing_to_compare_with(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    data = studies.verification(study, store).to_dict()
    data["arms"][0]["holds"] = False
    write_json(store.folder / "verify.json", data)
    found = recommended(store, study)
    assert found.point and found.baseline is None


def test_where_nothing_held_on_the_held_out_windows_nothing_is_recommended(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    write_json(store.folder / "verify.json", studies.verification(study, store, winner=-1).to_dict())
    found = recommended(store, study)
    assert found.point is None and "Nothing is recommended" in found.text


def test_a_search_of_which_everything_is_refused_says_why(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=0)
    store.refuse({"max_num_seqs": 8}, "nothing fits", 3)
    assert recommended(store, study).text == "No trial has finished yet."
    store.log("ended", why=EXHAUSTED)
    refused = "Every configuration of the space is refused before a launch: nothing fits."
    assert recommended(store, study).text == refused
    store.log("ended", why=UNFOUND)  # of a space too large to be walked
    assert recommended(store, study).text == refused.replace("of the space", "that was looked at")
    store.log("ended", why="interrupted")
    assert recommended(store, study).text == "No trial has finished yet."


def test_a_file_that_is_no_verdict_changes_nothing(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    write_json(store.folder / "verify.json", {"text": "half", "rows": []})
    assert recommended(store, study) == choose(store.trials(), study.objective)


def test_ablation_takes_the_superfluous_flags_out_and_its_cost_in(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    before = recommended(store, study)
    assert before.point
    found = studies.ablation(study, before.point.config, kept="max_num_batched_tokens")
    write_json(store.folder / "ablation.json", found.to_dict())
    after = recommended(store, study)
    assert after.point and after.point.config.hash == found.config.hash
    assert after.point.cost == pytest.approx(0.47 * 0.99)
    low, high = after.point.cost_interval or (0, 0)
    assert low < 0.45 and high > 0.48  # wider than either: the factor was measured too
    assert after.cost_change and after.cost_change.value == pytest.approx(0.74 * 0.99 - 1)
    assert "Two flags were superfluous" in after.text


def test_what_ablation_left_is_promised_at_its_own_load_with_its_own_cost_latency_and_number(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    before = recommended(store, study)
    assert before.point and before.latency_change
    found = studies.ablation(study, before.point.config, kept="max_num_batched_tokens")
    studies.add(24, Measured((studies.step(1.0, study.objective),)), store, found.params, role="ablate")
    arm = Arm("small", 3, True, load=1.7, load_cost=(0.46, 0.44, 0.48), latency=(0.02, 0.019, 0.021))
    arm = replace(arm, latency_difference=(0.5, 0.45, 0.55))
    write_json(store.folder / "ablation.json", replace(found, arm=arm).to_dict())
    after = recommended(store, study)
    assert after.point and after.point.config.hash == found.config.hash and after.point.trial == 24
    assert (after.point.load, after.point.cost, after.point.latency) == (1.7, 0.46, 0.02)
    assert after.point.latency_interval == (0.019, 0.021) and after.latency_change
    assert after.latency_change.value == pytest.approx((1 + before.latency_change.value) * 0.5 - 1)
    first, second = after.text.split("\n\n")
    assert first.startswith(f"Recommended: trial 24 at load 1.7: trial {before.point.trial} without the flags")
    assert second == "Two flags were superfluous." and str(after.cost_change) in first
    head = best_config(store, study)[0].read_text()
    assert "trial 24" in head and "at load 1.7" in head and f"tpot_p99 {after.latency_change}" in head


@pytest.mark.parametrize("named", [True, False])  # earlier files do not name the configuration
def test_an_ablation_of_another_configuration_changes_nothing(tmp_path: Path, named: bool):
    """What it left is the default: every configuration has all of its flags."""
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    before = recommended(store, study)
    other = study.space.config({"max_num_batched_tokens": 512}, study.model)
    found = studies.ablation(study, other, kept="max_num_batched_tokens").to_dict()
    found |= {"config": study.space.config({}, study.model).to_dict(), "params": {}}
    write_json(store.folder / "ablation.json", found if named else without_winner(found))
    assert recommended(store, study) == before


def test_an_earlier_ablation_that_does_not_name_its_configuration_is_known_by_its_effects(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    winner = recommended(store, study).point
    assert winner
    found = studies.ablation(study, winner.config, kept="max_num_batched_tokens")
    write_json(store.folder / "ablation.json", without_winner(found.to_dict()))
    after = recommended(store, study)
    assert after.point and after.point.config.hash == found.config.hash
    small = ablation(store, study, found.config)
    assert small and small["text"] == found.text
    foreign = without_winner(found.to_dict())
    foreign["effects"] = [{**effect, "parameter": "no_such"} for effect in foreign["effects"]]
    write_json(store.folder / "ablation.json", foreign)
    assert ablation(store, study, winner.config) is None


def without_winner(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "winner"}


def damages(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """``document`` with one part of it after the other of another shape, and gone."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(inside):
        for other in (5, "x", {"a": 1}):
            yield (*path, key), {**document, key: other} if isinstance(document, dict) else [other]
        if isinstance(document, dict):
            yield (*path, key), {name: value for name, value in document.items() if name != key}
        if isinstance(value, dict | list) and value:
            for where, inner in damages(value, (*path, key)):
                rest = dict(document) if isinstance(document, dict) else list(document)
                rest[key] = inner  # type: ignore[index]
                yield where, rest


@pytest.mark.parametrize("name", ["verify.json", "ablation.json"])
def test_whatever_shape_a_verdict_or_an_ablation_has_it_is_read_or_named(tmp_path: Path, name: str):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    winner = recommended(store, study).point
    assert winner
    found = studies.ablation(study, winner.config, kept="max_num_batched_tokens")
    write_json(store.folder / "ablation.json", found.to_dict())
    document = json.loads((store.folder / name).read_text())
    named = 0
    for _, damaged in [((), []), ((), 5), ((), {}), *list(damages(document))[::9]]:  # each takes a while
        (store.folder / name).write_text(json.dumps(damaged))
        for read in (lambda: deployment(store, study), lambda: verification(store)):
            try:
                read()
            except EnvironmentFault as fault:
                assert fault.where == str(store.folder / name) and "cannot be read (" in str(fault)
                named += 1
            except NothingFeasible:
                assert name == "verify.json"
    assert named > 10


def test_what_the_quality_floor_said_stands_beside_the_recommendation(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=10)
    best = recommended(store, study).point
    assert best
    path = store.trial_folder(best.trial) / "outcome.json"
    said = {"verdict": "unknown", "reason": "HTTP 500"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quality": said}))
    assert recommended(store, study).text.endswith("\n\nThe quality floor was not checked: HTTP 500.")
    assert "quality: The quality floor was not checked: HTTP 500." in deployment(store, study).header()


def test_a_factor_that_is_not_known_changes_nothing_and_what_has_no_interval_gets_none():
    half = (0.5, 0.4, 0.6)
    assert _times(2.0, (1.0, 4.0), (math.nan,) * 3) == (2.0, (1.0, 4.0))
    assert _times(2.0, None, half) == _times(2.0, (0.0, 4.0), half) == (1.0, None)
    assert _further(None, half) is None
