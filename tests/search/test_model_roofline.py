"""Step times: limits that hold whatever the constants, and effects that every server shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tuner.search import hardware as table
from tuner.search.hardware import Hardware
from tuner.search.model import settings
from tuner.search.model.constants import Constants
from tuner.search.model.roofline import StepTime
from tuner.search.model.shape import ModelShape
from tuner.space.config import ServingConfig, Value

SHAPES = Path(__file__).with_name("shapes")


def step_time(model: str, gpu: str, flags: dict[str, Value | None] | None = None, variant: str = "") -> StepTime:
    shape, row = ModelShape.from_folder(SHAPES / f"{model}.json"), hardware(gpu)
    config = ServingConfig("m", {}, {"max-model-len": 8192, **(flags or {})}, {}, variant)
    return StepTime(shape, settings.of(config, shape, row), row, Constants())


def hardware(gpu: str) -> Hardware:
    found = table.lookup(gpu)
    assert found is not None
    return found


def test_decoding_one_sequence_is_at_least_reading_the_weights_once() -> None:
    weights = ModelShape.from_folder(SHAPES / "qwen3-32b.json").active * 2
    read_s = weights / hardware("H100-SXM").bandwidth_bytes_per_s
    assert read_s < step_time("qwen3-32b", "H100-SXM").step(1, 100) < 2 * read_s


def test_prefill_is_at_least_its_arithmetic() -> None:
    shape = ModelShape.from_folder(SHAPES / "qwen3-32b.json")
    peak_s = 8192 * 2 * shape.linear_weights / hardware("H100-SXM").flops["bf16"]
    assert peak_s < step_time("qwen3-32b", "H100-SXM").step(0, 0, 8192, 4096) < 3 * peak_s


def test_a_batch_shares_the_weights() -> None:
    step = step_time("qwen3-32b", "H100-SXM")
    assert step.step(16, 500) < 1.3 * step.step(1, 500)


def test_step_time_never_falls_with_more_work() -> None:
    step = step_time("deepseek-r1", "H200", {"tensor-parallel-size": 8})
    batches = [step.step(float(b), 2000) for b in np.geomspace(1, 400, 30)]
    contexts = [step.step(32, float(c)) for c in np.geomspace(1, 60_000, 30)]
    assert batches == sorted(batches) and contexts == sorted(contexts)


def test_few_tokens_touch_few_experts() -> None:
    # 256 experts, 8 per token: one token reads an eighth of what 32 tokens read, less the parts all tokens share.
    step = step_time("minimax-m2.5", "H200", {"tensor-parallel-size": 4})
    expert_bytes = ModelShape.from_folder(SHAPES / "minimax-m2.5.json").expert_weights / 4
    all_of_them = expert_bytes / step.bandwidth
    grown = step.step(256, 100) - step.step(1, 100)
    assert 0.9 * all_of_them < grown < 1.5 * all_of_them


def test_fp8_weights_halve_the_reading_and_double_the_arithmetic() -> None:
    plain, fp8 = step_time("qwen3-32b", "H100-SXM"), step_time("qwen3-32b", "H100-SXM", {"quantization": "fp8"})
    assert 0.5 * plain.step(1, 100) < fp8.step(1, 100) < 0.7 * plain.step(1, 100)  # quantizing costs kernels
    assert fp8.step(0, 0, 8192, 1) == pytest.approx(plain.step(0, 0, 8192, 1) / 2, rel=0.25)


def test_four_bit_weights_help_decoding_but_not_prefill() -> None:
    plain, awq = step_time("qwen3-32b", "H100-SXM"), step_time("qwen3-32b", "H100-SXM", variant="awq")
    assert awq.step(1, 100) < 0.5 * plain.step(1, 100)
    assert awq.step(0, 0, 8192, 4096) == pytest.approx(plain.step(0, 0, 8192, 4096), rel=0.05)


def test_on_cpus_four_bit_weights_cost_their_unpacking() -> None:
    shape, row = ModelShape.from_folder(SHAPES / "qwen3-32b.json"), table.table()["cpu-avx512"].with_cores(2)
    times = []
    for variant in ("", "awq"):
        config = ServingConfig("m", {}, {}, {}, variant, 0)
        times.append(StepTime(shape, settings.of(config, shape, row), row, Constants()).step(1, 100))
    assert times[1] > times[0]


def test_an_fp8_cache_halves_the_reading_of_long_contexts() -> None:
    plain = step_time("llama-3.1-8b", "H100-SXM")
    fp8 = step_time("llama-3.1-8b", "H100-SXM", {"kv-cache-dtype": "fp8"})
    grown = plain.step(64, 8000) - plain.step(64, 1)
    assert fp8.step(64, 8000) - fp8.step(64, 1) == pytest.approx(grown / 2, rel=0.02)


def test_a_window_bounds_the_reading() -> None:
    step = step_time("gpt-oss-120b", "H200")
    grown = (step.step(32, 20_000) - step.step(32, 10_000)) / 10_000
    # half of the layers attend to 128 tokens: past the window only the other half grows
    full = 32 * 18 * 2 * 8 * 64 * 2 / step.bandwidth
    assert grown == pytest.approx(full, rel=0.01)


def test_latent_caches_are_copied_on_every_rank() -> None:
    four, eight = (step_time("deepseek-r1", "H200", {"tensor-parallel-size": tp}) for tp in (4, 8))
    reading = lambda s: s.step(4, 30_000) - s.step(4, 10)  # noqa: E731
    assert reading(eight) == pytest.approx(reading(four), rel=0.01)


def test_tensor_parallelism_pays_less_and_less() -> None:
    times = [step_time("qwen3-32b", "H100-SXM", {"tensor-parallel-size": tp}).step(8, 1000) for tp in (1, 2, 4, 8)]
    gains = [a / b for a, b in itertools.pairwise(times)]
    assert 2 > gains[0] > gains[1] > gains[2] > 1


def test_slow_links_make_prefill_over_many_gpus_slow() -> None:
    nvlink, pcie = (step_time("qwen3-32b", gpu, {"tensor-parallel-size": 4}) for gpu in ("A100-80GB", "A100-80GB-PCIe"))
    assert pcie.step(0, 0, 4096, 2000) > 1.2 * nvlink.step(0, 0, 4096, 2000)


def test_eager_execution_costs_launches() -> None:
    graphs, eager = (
        step_time("llama-3.1-8b", "H100-SXM"),
        step_time("llama-3.1-8b", "H100-SXM", {"enforce-eager": None}),
    )
    assert eager.step(1, 100) > 1.5 * graphs.step(1, 100)


def test_verifying_drafts_is_cheaper_than_decoding_them() -> None:
    step = step_time("qwen3-32b", "H100-SXM")
    assert step.step(4, 1000) < step.step(4, 1000, drafts=3) < 1.3 * step.step(4, 1000)


def test_vectorised_prefill_agrees_with_single_steps() -> None:
    step = step_time("qwen3-32b", "H100-SXM", {"tensor-parallel-size": 2})
    tokens = np.array([100.0, 700.0, 3000.0, 8000.0])
    vector = step.prefill_s(tokens, 4) + step.prefill_attention_s(tokens, tokens / 2)
    single = [step.step(4, 1000, float(t), float(t) / 2) - step.step(4, 1000) for t in tokens]
    assert vector == pytest.approx(single, rel=0.15)


def test_nothing_to_do_takes_no_time() -> None:
    assert step_time("qwen3-32b", "H100-SXM").step(0, 0) == 0
