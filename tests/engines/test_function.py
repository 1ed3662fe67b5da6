"""The function engine: a callable instead of a server."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.conftest import plan
from tuner.engines.function import FunctionEngine
from tuner.engines.protocol import LaunchFailed, Site
from tuner.errors import UsageError
from tuner.space.config import ServingConfig

CONFIG = ServingConfig("any", {"batch": 64, "cache": "fp8"}, {"max-num-seqs": 64})
NEEDED = ("tpot_p99_s", "ttft_p99_s")


def engine(folder: Path, body: str, name: str = "surface") -> FunctionEngine:
    (folder / f"{name}.py").write_text(f"import tuner\ndef evaluate(config, load):\n    {body}\n")
    return FunctionEngine(target=f"{name}:evaluate", folder=folder, required=NEEDED)


def measure(engine: FunctionEngine, site: Site, load: float = 2.0):
    return engine.launch(CONFIG, site).measure(plan(site, load))


def test_the_callable_gets_the_parameters_and_the_load(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': config['batch'] / 1000, 'tpot_p99_s': load / 100, 'output_tokens_per_s': 5}"
    step = measure(engine(tmp_path, body), site)

    assert step.metrics["ttft_p99_s"] == 0.064
    assert step.metrics["tpot_p99_s"] == 0.02
    assert step.load == 2.0
    assert step.ok


WRITES = """import time
def evaluate(config, load, *, folder):
    (folder / 'config.json').write_text(str(config['batch']))
    time.sleep(0.2)
    read = float((folder / 'config.json').read_text())
    return {'ttft_p99_s': read / 1000, 'tpot_p99_s': 0.02, 'output_tokens_per_s': 5}
"""


def test_a_callable_that_asks_for_a_folder_has_one_for_each_trial(tmp_path: Path, site: Site) -> None:
    """Those that run at once do not write over each other's files, nor over ours."""
    (tmp_path / "writes.py").write_text(WRITES)
    one, batches = FunctionEngine(target="writes:evaluate", folder=tmp_path, required=NEEDED), (8, 16)

    def run(batch: int) -> float:
        own = replace(site, folder=tmp_path / f"{batch:04d}")
        own.folder.mkdir()
        (own.folder / "config.json").write_text("ours")
        return one.launch(replace(CONFIG, params={"batch": batch}), own).measure(plan(own, 2.0)).metrics["ttft_p99_s"]

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, batches)) == [0.008, 0.016]
    for batch in batches:
        assert (tmp_path / f"{batch:04d}" / "config.json").read_text() == "ours"
        assert (tmp_path / f"{batch:04d}" / "files" / "config.json").read_text() == str(batch)


@pytest.mark.parametrize("of_its_own", ["*, folder='mine'", "folder='mine'", "**more"])
def test_a_folder_that_a_callable_has_of_its_own_is_left_to_it(tmp_path: Path, site: Site, of_its_own: str) -> None:
    body = "assert locals().get('folder', 'mine') == 'mine' and not locals().get('more')"
    answer = "{'ttft_p99_s': 0.1, 'tpot_p99_s': 0.02, 'output_tokens_per_s': 5}"
    (tmp_path / "own.py").write_text(f"def evaluate(config, load, {of_its_own}):\n    {body}\n    return {answer}\n")
    one = FunctionEngine(target="own.py:evaluate", folder=tmp_path, required=NEEDED)

    assert measure(one, site).ok
    assert not (site.folder / "files").exists()


def test_an_slo_is_judged_as_for_any_other_engine(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': 11.0, 'tpot_p99_s': 0.01, 'output_tokens_per_s': 5}"

    step = measure(engine(tmp_path, body), site)

    assert [miss.split()[0] for miss in step.slo_misses] == ["ttft_p99"]
    assert not step.ok


def test_output_without_goodput_counts_whole_less_the_errors(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': 1, 'tpot_p99_s': 0.01, 'output_tokens_per_s': 200, 'error_rate': 0.005}"

    assert measure(engine(tmp_path, body), site).metrics["goodput_output_tokens_per_s"] == pytest.approx(199)


def test_infeasible_is_an_outcome_with_its_reason(tmp_path: Path, site: Site) -> None:
    with pytest.raises(LaunchFailed) as failure:
        measure(engine(tmp_path, "raise tuner.Infeasible('needs 3 GPUs')"), site)

    assert failure.value.outcome.cause == "infeasible"
    assert failure.value.outcome.message == "needs 3 GPUs"
    assert not failure.value.outcome.transient


def test_a_bug_in_the_callable_is_that_trials_crash_with_file_and_line(tmp_path: Path, site: Site) -> None:
    with pytest.raises(LaunchFailed) as failure:
        measure(engine(tmp_path, "return 1 / 0"), site)

    assert failure.value.outcome.cause == "crash"
    assert "surface.py:3: ZeroDivisionError" in failure.value.outcome.evidence


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 5", "returned int, not a mapping"),
        ("return {'tpot_p99_s': 1, 'output_tokens_per_s': 1}", "did not return ttft_p99_s, which the objective needs"),
        ("return {'tpot_p99_s': 1, 'ttft_p99_s': 1}", "there is no cost without"),
        ("return {'tpot_p99_s': 'fast', 'ttft_p99_s': 1}", "which is not a number"),
        ("return {'tpot_p99_s': float('nan'), 'ttft_p99_s': 1}", "tpot_p99_s=nan"),
    ],
)
def test_an_answer_that_says_nothing_is_refused(body: str, says: str, tmp_path: Path, site: Site) -> None:
    with pytest.raises(UsageError, match=says):
        measure(engine(tmp_path, body), site)


def test_where_an_slo_is_missed_there_may_be_no_tokens(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': 99.0, 'tpot_p99_s': 0.01, 'output_tokens_per_s': 0}"
    assert measure(engine(tmp_path, body), site).slo_misses


def test_what_a_callable_prints_is_no_data_of_ours(tmp_path: Path, site: Site, capfd: pytest.CaptureFixture) -> None:
    """Two at once, the first of which ends first; each starts a process."""
    both, first = threading.Barrier(2, timeout=60), threading.Event()
    loud = "print('loud', flush=True); hook(load); import os; os.system('echo loud')"
    body = f"{loud}; return {{'ttft_p99_s': 1, 'tpot_p99_s': 0.01, 'output_tokens_per_s': 5}}"
    made = engine(tmp_path, body)

    def hook(load: float) -> None:
        both.wait()
        assert load == 1.0 or first.wait(60)

    vars(sys.modules[made.evaluate().__module__])["hook"] = hook
    with ThreadPoolExecutor(2) as pool:
        steps = [pool.submit(measure, made, site, load) for load in (1.0, 2.0)]
        assert steps[0].result().ok
        first.set()
        assert steps[1].result().ok
    print("data", flush=True)
    assert capfd.readouterr() == ("data\n", 4 * "loud\n")


def test_an_endless_latency_is_a_latency(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': float('inf'), 'tpot_p99_s': 0.01, 'output_tokens_per_s': 5}"
    step = measure(engine(tmp_path, body), site)

    assert math.isinf(step.metrics["ttft_p99_s"])
    assert step.slo_misses


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "bad target"),
        ("no.such.module:f", "there is no module no"),
        ("surface:missing", "has no callable 'missing'"),
        ("broken:f", "broken.py:1"),
    ],
)
def test_a_bad_target_is_refused_before_the_study_starts(target: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "surface.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('no')\n")

    with pytest.raises(UsageError, match=says):
        FunctionEngine(target=target, folder=tmp_path).flags()


def test_modules_of_the_same_name_in_two_folders_are_two(tmp_path: Path, site: Site) -> None:
    steps = []
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        body = f"return {{'ttft_p99_s': {value}, 'tpot_p99_s': 1, 'output_tokens_per_s': 1}}"
        steps.append(measure(engine(tmp_path / name, body), site))

    assert [step.metrics["ttft_p99_s"] for step in steps] == [1.0, 2.0]


def test_the_callable_may_change_its_dictionary_and_import_its_neighbours(tmp_path: Path, site: Site) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7.0\n")
    body = (
        "from neighbour import VALUE; config.clear(); "
        "return {'ttft_p99_s': VALUE, 'tpot_p99_s': 1, 'output_tokens_per_s': 1}"
    )
    one = engine(tmp_path, body)
    server = one.launch(CONFIG, site)

    assert server.measure(plan(site)).metrics["ttft_p99_s"] == 7.0
    assert server.measure(plan(site)).metrics["ttft_p99_s"] == 7.0
    assert CONFIG.params == {"batch": 64, "cache": "fp8"}


NO_TEXT = "class Odd(Exception):\n        def __str__(self): raise ValueError('no text')\n    raise Odd"


CANCELLED = "import asyncio; raise asyncio.CancelledError"


@pytest.mark.parametrize("leaves", ["import sys; sys.exit(0)", "raise GeneratorExit", CANCELLED, NO_TEXT])
def test_a_callable_that_leaves_has_crashed(leaves: str, tmp_path: Path, site: Site) -> None:
    with pytest.raises(LaunchFailed) as failure:
        measure(engine(tmp_path, leaves), site)

    assert failure.value.outcome.cause == "crash"


def test_an_answer_that_is_none_is_a_crash_but_for_the_default(tmp_path: Path, site: Site) -> None:
    """The default is the first launch: where it is wrong, so is the callable. Later it is that configuration alone."""
    wrong = engine(tmp_path, "return {'ttft_p99_s': 1, 'tpot_p99_s': float('nan'), 'output_tokens_per_s': 5}")
    wrong.default = {**CONFIG.params, "batch": 8}
    with pytest.raises(LaunchFailed) as failure:
        measure(wrong, site)
    assert (failure.value.outcome.cause, "tpot_p99_s=nan" in failure.value.outcome.message) == ("crash", True)

    wrong.default = CONFIG.params
    with pytest.raises(UsageError, match="tpot_p99_s=nan"):
        measure(wrong, site)


def test_the_reason_may_be_anything(tmp_path: Path, site: Site) -> None:
    with pytest.raises(LaunchFailed) as failure:
        measure(engine(tmp_path, "raise tuner.Infeasible(ValueError('too large'))"), site)

    assert failure.value.outcome.message == "too large"


def test_a_target_that_leaves_while_it_is_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(UsageError, match=r"script\.py:2: SystemExit: 2"):
        FunctionEngine(target="script:evaluate", folder=tmp_path).flags()


UNREADABLE = "class Odd(dict):\n        def items(self): raise KeyError('gone')\n    return Odd()"

NO_NUMBER = "class Odd:\n        __float__ = __repr__ = lambda self: {}['x']\n    return {'tpot_p99_s': Odd()}"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return {'tpot_p99_s': 10**400}", "returned a tpot_p99_s that is too large for a number"),
        (UNREADABLE, "returned a mapping that cannot be read: .*gone"),
        ("return {'tpot_p99_s': -0.02}", "returned tpot_p99_s=-0.02, which cannot be negative"),
        ("return {'cost_usd_per_mtok_output': -1}", "returned cost_usd_per_mtok_output=-1, which cannot be negative"),
        ("return {'error_rate': 1.5}", "returned error_rate=1.5, which is a share: 1 at most"),
        (NO_NUMBER, r"returned tpot_p99_s=\(Odd without a text: KeyError\), which is not a number"),
        ("return {'error_rate': -0.1}", "returned error_rate=-0.1, which cannot be negative"),
        ("return {'cost_usd_per_mtok_output': 0}", "returned cost_usd_per_mtok_output=0: what configurations are"),
        ("return {'tpot_p99_s': 0}", "returned tpot_p99_s=0: what configurations are ranked by is above zero"),
        ("return {'output_tokens_per_s': float('inf')}", "output_tokens_per_s=inf: only a latency may be endless"),
        ("return {'tpot_p99_s': 0.01, 'ttft_p99_s': 0, 'output_tokens_per_s': 0}", "no tokens where every SLO is met"),
    ],
)
def test_an_answer_that_cannot_be_one_is_refused_in_one_line(tmp_path: Path, site: Site, body: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure(engine(tmp_path, body), site)


def test_a_metric_of_the_functions_own_may_be_negative(tmp_path: Path, site: Site) -> None:
    body = "return {'ttft_p99_s': 0.1, 'tpot_p99_s': 0.02, 'output_tokens_per_s': 9, 'clock_offset_s': -0.1}"
    assert measure(engine(tmp_path, body), site).metrics["clock_offset_s"] == -0.1


@pytest.mark.parametrize("then", ["return {'ttft_p99_s': 0.1, 'tpot_p99_s': 0.02, 'output_tokens_per_s': 9}", "1 / 0"])
def test_a_callable_that_goes_to_another_folder_leaves_us_in_ours(
    tmp_path: Path, site: Site, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path.cwd()
    monkeypatch.chdir(home)  # and back, where it fails
    with contextlib.suppress(LaunchFailed):
        measure(engine(tmp_path, f"import os; os.chdir('/'); {then}"), site)
    assert Path.cwd() == home


@pytest.mark.parametrize("kind", ["tuner.Infeasible", "ValueError"])
def test_half_a_character_in_a_reason_can_be_kept(tmp_path: Path, site: Site, kind: str) -> None:
    with pytest.raises(LaunchFailed) as failure:
        measure(engine(tmp_path, f"raise {kind}('file \\udcff')"), site)
    told = failure.value.outcome
    assert "file \\udcff" in f"{told.message} {told.evidence}".encode().decode()
