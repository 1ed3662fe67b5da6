"""The closed loop against real serving tables (bar 2 of the analytic model), where they are at hand."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from tuner.search import hardware as table
from tuner.search.model.closed_loop import ClosedLoop, Parallelism, predict_closed_loop
from tuner.search.model.shape import ModelShape
from tuner.space.config import ServingConfig
from tuner.space.memory import fits

ROOT = Path(__file__).parents[2]
SHAPES = Path(__file__).with_name("shapes")
MEASURED = ROOT / "../shared/silicon/measured.csv"
needs_table = pytest.mark.skipif(not MEASURED.is_file(), reason="the measured serving table is not on this machine")


def ask(
    concurrency: int, engine: str = "vllm", tp: int = 2, isl: int = 1024, osl: int = 256, **more: float
) -> ClosedLoop:
    shape = ModelShape.from_folder(SHAPES / "qwen3-32b.json")
    return predict_closed_loop(
        shape, table.table()["H100-SXM"], engine, Parallelism(tp), shape.precision, isl, osl, concurrency, **more
    )


def test_throughput_is_the_table_s_own_formula() -> None:
    found = ask(32)
    assert found.output_tokens_per_s == pytest.approx(32 * 256 / (found.ttft_s + 255 * found.tpot_s))
    assert found.per_gpu == pytest.approx(found.output_tokens_per_s / 2)


def test_more_clients_are_served_slower_and_more_in_all() -> None:
    found = [ask(c) for c in (1, 4, 16, 64, 128)]
    for a, b in itertools.pairwise(found):
        assert b.tpot_s > a.tpot_s and b.ttft_s > a.ttft_s and b.output_tokens_per_s > a.output_tokens_per_s


def test_clients_beyond_the_cache_wait_for_it() -> None:
    crowded = ask(128, isl=4096, osl=1024)
    assert crowded.running < 80
    assert crowded.ttft_s > 10


def test_prompts_first_and_equal_lengths_move_in_waves() -> None:
    mixed, waves = ask(64, "vllm"), ask(64, "sglang", length_spread=0.0)
    assert waves.ttft_s > 3 * mixed.ttft_s
    assert waves.tpot_s < mixed.tpot_s
    assert ask(64, "sglang", length_spread=0.1).ttft_s < 0.5 * waves.ttft_s


def test_what_does_not_fit_says_so() -> None:
    shape = ModelShape.from_folder(SHAPES / "llama-3.3-70b.json")
    found = predict_closed_loop(shape, table.table()["L4"], "vllm", Parallelism(), shape.precision, 1000, 100, 4)
    assert not found.fit.fits and "short" in found.fit.reason and found.output_tokens_per_s == 0


@pytest.mark.parametrize(("model", "tp"), [("qwen3-32b", 1), ("qwen3-32b", 4), ("deepseek-r1", 8)])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_cache_is_as_large_as_that_of_the_engine_s_default(engine: str, model: str, tp: int) -> None:
    shape, row = ModelShape.from_folder(SHAPES / f"{model}.json"), table.table()["H200"]
    found = predict_closed_loop(shape, row, engine, Parallelism(tp), shape.precision, 1000, 200, 8)
    flags = {"tensor-parallel-size": tp, "max-model-len": 1200}
    assert found.fit.kv_tokens == fits(shape, row, ServingConfig("m", {}, flags, gpus=tp), engine).kv_tokens > 0


@needs_table
def test_the_model_meets_its_bars_on_measured_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/model"))
    for name in ("rows", "fitting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from fitting import predict  # type: ignore[import-not-found]
    from rows import read  # type: ignore[import-not-found]
    from scipy.stats import spearmanr

    from tuner.search.model.constants import Constants

    rows, left_out = read(MEASURED, SHAPES)
    assert not left_out
    got = [predict(row, Constants()) for row in rows]
    tpot = np.array([p.tpot_s / r.tpot_s for r, p in zip(rows, got, strict=True)])
    ttft = np.array([p.ttft_s / r.ttft_s for r, p in zip(rows, got, strict=True)])
    assert np.median(np.abs(tpot - 1)) < 0.15
    assert np.mean(np.abs(np.log(ttft)) < np.log(1.5)) >= 0.8
    for name in {row.shape.name for row in rows}:
        pairs = [(p.per_gpu, r.throughput_per_gpu) for r, p in zip(rows, got, strict=True) if r.shape.name == name]
        assert spearmanr(*zip(*pairs, strict=True))[0] > 0.9, name


@pytest.mark.parametrize(
    ("flags", "burst"),
    [({}, 1.0), ({}, 3.0), ({"max-num-seqs": 16}, 1.0), ({"max-num-batched-tokens": 1024}, 1.0)],
)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_predictor_s_queues_are_near_a_simulated_scheduler_s(
    flags: dict[str, int], burst: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/model"))
    from simulate import poisson, simulate  # type: ignore[import-not-found]

    from tuner.search.model import predictor, settings
    from tuner.search.model.constants import Constants
    from tuner.search.model.roofline import StepTime

    shape, row = ModelShape.from_folder(SHAPES / "qwen3-32b.json"), table.table()["H100-SXM"]
    config = ServingConfig("m", {}, {"tensor-parallel-size": 2, "max-model-len": 8192, **flags}, gpus=2)
    trace = poisson(400, 1000, 200, seed=11, burst=burst)
    model = predictor.build(shape, row, trace, (), "tpot_p99", 1.0)
    load = share * model.capacity(config)
    s = settings.of(config, shape, row)
    truth = simulate(trace, load, StepTime(shape, s, row, Constants()), s, model.fit(config).kv_tokens)
    got = model.predict(config, load).metrics
    for name in ("ttft", "tpot"):
        assert got[f"{name}_p50_s"] == pytest.approx(np.quantile(truth[name], 0.5), rel=0.2), name
        assert got[f"{name}_p99_s"] == pytest.approx(np.quantile(truth[name], 0.99), rel=0.35), name
