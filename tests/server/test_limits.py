"""A phase's limit follows what this machine has shown."""

import pytest

from tuner.engines import sglang, vllmlog
from tuner.server.bootlog import SILENT
from tuner.server.limits import LIMITED, History, Limits, fixed
from tuner.study.outcome import Boot


def test_an_unknown_machine_is_given_time():
    assert Limits().phase_s("weights") == 3600
    assert Limits().phase_s("imports") == 900


def test_three_starts_teach_the_limit():
    seen = {"weights": (40.0, 50.0, 60.0), "imports": (5.0, 5.0, 5.0)}
    limits = Limits(seen_s=seen)
    assert limits.phase_s("weights") == 240  # four times the slowest
    assert limits.phase_s("imports") == 180  # never below the floor
    assert Limits(seen_s={"weights": (40.0, 50.0)}).phase_s("weights") == 3600


def test_a_phase_never_seen_keeps_its_first_limit():
    assert Limits(seen_s={"imports": (5.0,) * 5}).phase_s("compile") == 1800


def test_history_only_ever_tightens():
    assert Limits(seen_s={"imports": (600.0,) * 5}).phase_s("imports") == 900


def test_a_fixed_limit_wins():
    limits = Limits(fixed_s={"*": 3.0, "weights": 7.0}, seen_s={"kv": (1.0,) * 5})
    assert (limits.phase_s("weights"), limits.phase_s("kv")) == (7.0, 3.0)


def test_the_expected_time_is_the_sum_of_medians():
    assert Limits(seen_s={"a": (1.0, 9.0, 2.0), "b": (5.0,)}).expected_s() == 7.0
    assert Limits().expected_s() is None


def test_history_is_kept_per_key_and_forgets_the_oldest(tmp_path):
    path = tmp_path / "deep" / "startup.json"
    for second in range(30):
        History(path, "vllm 0.32 tiny").add(Boot(1.0, {"imports": float(second)}))
    assert History(path, "vllm 0.32 tiny").seen_s() == {"imports": tuple(float(s) for s in range(10, 30))}
    assert History(path, "vllm 0.33 tiny").seen_s() == {}


def test_a_damaged_history_is_as_none(tmp_path):
    path = tmp_path / "startup.json"
    path.write_text("[1, 2")
    history = History(path, "k")
    assert history.seen_s() == {}
    history.add(Boot(1.0, {"a": 1.0}))
    assert history.seen_s() == {"a": (1.0,)}


def test_a_study_fixes_all_phases_or_some_by_name():
    assert fixed(None) == {} and fixed(600) == {"*": 600}
    limits = Limits(fixed_s=fixed({"weights": 7200}))
    assert (limits.phase_s("weights"), limits.phase_s("kv")) == (7200, 900)


@pytest.mark.parametrize("entry", ['{"weights": 5}', '{"weights": ["soon"]}', '{"weights": [null]}', "[1]", "7"])
def test_a_file_of_another_shape_is_as_none(tmp_path, entry):
    path = tmp_path / "startup.json"
    path.write_text(f'{{"k": {entry}}}')
    history = History(path, "k")
    assert history.seen_s() == {}
    history.add(Boot(1.0, {"weights": 1.0}))
    assert history.seen_s() == {"weights": (1.0,)}
    path.write_text("[" * 200_000)
    assert history.seen_s() == {}


@pytest.mark.parametrize("dialect", [vllmlog.DIALECT, sglang.DIALECT, SILENT], ids=lambda dialect: dialect.name)
def test_a_study_may_name_every_phase_that_a_log_has(dialect):
    assert {name for name, _ in dialect.phases} <= {*LIMITED}
