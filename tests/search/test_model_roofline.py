"""Step times: limits that hold whatever the constants, and effects that every server shows."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tuner.search import hardware as table
from tuner.search.hardware import Hardware
from tuner.search.model import settings
from tuner.search.model.constants import Constants, Host
from tuner.search.model.precision import Precision
from tuner.search.model.roofline import StepTime
from tuner.search.model.settings import Settings, Speculation
from tuner.search.model.shape import Attention, FeedForward, ModelShape
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


# A server made up for its arithmetic: every number is another, so that none can stand for another unseen.
MADE = ModelShape(
    "made",
    hidden=1024,
    vocab=10_000,
    tied=False,
    attention=(
        Attention("full", 3, 4e6, cache=512, heads=16, kv_heads=4, pair=128, decode_pair=130, kernels=9),
        Attention("window", 2, 4e6, cache=512, heads=16, kv_heads=4, pair=128, decode_pair=130, kernels=9, window=100),
        Attention("linear", 1, 5e6, cache=0, heads=16, kv_heads=16, pair=0, decode_pair=0, kernels=7, state=3000),
        Attention(
            "dsa", 2, 7e6, cache=640, heads=16, kv_heads=1, pair=300, decode_pair=310, kernels=20, window=200,
            scan=64, scan_pair=500,
        ),
    ),
    ffn=(FeedForward(3, 6e6, kernels=5), FeedForward(5, 1e6, experts=16, top_k=2, expert_weights=3e6, kernels=12)),
    precision=Precision(),
    heads=16,
    kv_heads=4,
    max_model_len=8192,
)  # fmt: skip
CARD = Hardware("made", 80 * 2**30, 1e12, {"bf16": 100e12, "fp8": 210e12}, 50e9, 30e-6, 1.0)
EIGHT_BITS = Precision(8, 4, 16, "fp8", "bf16", act_quant=True, kv_bits=8)
SHARES = Constants(0.8, 0.5, 0.25, 0.4, 0.6, 5e-6, {"vllm": Host(1e-3, 1e-5, 2e-2, 2e-5)})
TWO_BY_THREE = Settings(2, 1, 3, True, 2048, 256, 16, 0.9, None, True, True, False, 8192, EIGHT_BITS)


@pytest.mark.parametrize(
    "server",
    [
        TWO_BY_THREE,
        replace(TWO_BY_THREE, joint=True),
        replace(TWO_BY_THREE, tp=1, dp=2),
        replace(TWO_BY_THREE, tp=1, dp=1, precision=Precision()),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("decodes", "context", "prefill", "seen", "drafts"),
    [
        (16, 1000, 0, 0, 0),
        (16, 50, 100, 40, 0),  # within every window
        (4, 1000, 700, 500, 2),  # without a graph
        (0, 0, 300, 150, 0),
        (2, 1000, 0, 0, 99),  # the queries' arithmetic is longer than reading the keys
        (300, 2000, 9, 9, 1),  # the head's arithmetic is longer than its reading
    ],
)
def test_a_step_is_the_sum_of_its_parts_worked_by_hand(
    decodes: int, context: int, prefill: int, seen: int, drafts: int, eager: bool, server: Settings
) -> None:
    step = StepTime(MADE, replace(server, eager=eager), CARD, SHARES)
    tp, dp, joint, read, write = server.tp, server.dp, server.joint, 1e12 * 0.8, 50e9 * 0.6
    quantized = server.precision is EIGHT_BITS
    weight, of_expert, cached = (1, 0.5, 1) if quantized else (2, 2, 2)  # bytes
    rate = 210e12 if quantized else 100e12
    queries = decodes * (1 + drafts)
    tokens = queries + prefill
    mixing, feeding = 3 * 4e6 + 2 * 4e6 + 5e6 + 2 * 7e6, 3 * 6e6 + 5 * 1e6
    mine = mixing + feeding / (dp if joint else 1)
    linear = math.hypot(mine * weight / tp / read, tokens * 2 * (mixing + feeding) / tp / (rate * 0.5))
    head_bytes = 10_000 * 1024 * 2 / tp / (dp if joint else 1)
    sampled = queries + (1 if prefill else 0)
    head = max(head_bytes / read, sampled * 2 * 10_000 * 1024 / tp / (100e12 * 0.5))
    touched = 16 * (1 - (1 - 2 / 16) ** (tokens * dp))
    experts = math.hypot(
        5 * touched * 3e6 * of_expert / (tp * dp) / read,
        5 * tokens * 2 * 2 * 3e6 / tp / (100e12 * 0.25),
    )
    passes = 20 * 1024 * 8 + (3 * 6e6 + 5 * 2 * 3e6) / 3 / 1024 * 6 / tp + 5 * 2 * 4 * 1024
    rows = tokens * 2 * passes / read
    # full and window are split over the ranks; the latent cache lies on all of them, its index of 64 is scanned
    keys = [(3, 512 / tp, 0, math.inf, 130, 128), (2, 512 / tp, 0, 100, 130, 128), (2, 640 - 64, 64, 200, 310, 300)]
    attention = decodes * 2 * 3000 * 2 / tp / read  # the state, read and written in 16 bits
    for layers, cache, scan, window, pair, prompt_pair in keys:
        reading = decodes * layers * (min(context, window) * cache + context * scan) * cached / read
        pairs = queries * min(context, window) * 2 * 16 / tp * layers * pair / (100e12 * 0.5)
        index = 2 * 500 * layers / (210e12 * 0.4) if scan else 0.0
        attention += max(reading, pairs + queries * context * index)
        attention += prefill * min(seen, window) * 2 * 16 / tp * layers * prompt_pair / (100e12 * 0.4)
        attention += prefill * seen * index
    row = tokens * 1024 * 2
    if joint:  # 8 blocks' rows are gathered and scattered over six, the other 8 reduced over two
        sent, messages = 8 * 2 * (1 / 2) * row + 8 * 2 * (5 / 2) * row, 16
    else:  # each token to its 2 experts' ranks and back
        sent, messages = 16 * 2 * (tp - 1) / tp * row + 5 * 2 * 2 * (dp - 1) / dp * row / tp, 16 if tp > 1 else 0
    kernels = 3 * 9 + 2 * 9 + 7 + 2 * 20 + 3 * 5 + 5 * 12
    kernels += (8 * 4 if quantized else 0) - (2 * 8 if tp == 1 else 0)  # four products in each layer; all-reduces
    kernel = 2e-5 * 1.5 if eager else 2e-5 if tokens > 512 else 5e-6
    overhead = kernels * kernel + messages * 20e-6 + 1e-3 + decodes * 1e-5
    expected = linear + head + experts + rows + attention + sent / write + overhead
    assert step.step(decodes, context, prefill, seen, drafts) == pytest.approx(expected, rel=1e-9)


def test_prompts_attention_and_drafts_take_what_their_parts_take() -> None:
    step = StepTime(MADE, TWO_BY_THREE, CARD, SHARES)
    tokens, seen = np.array([50.0, 3000.0]), np.array([25.0, 1500.0])
    found = step.prefill_attention_s(tokens, seen)
    for n, span, s in zip(tokens, seen, found, strict=True):
        heads = 2 * 16 / 2 / (100e12 * 0.4)
        pairs = 3 * span * 128 + 2 * min(span, 100) * 128 + 2 * min(span, 200) * 300
        assert s == pytest.approx(n * (heads * pairs + span * 2 * 500 * 2 / (210e12 * 0.4)))
    whole, draft = step.step(500, 1000), replace(MADE, ffn=(FeedForward(8, 1e6),))

    def drafting(method: str, shape: ModelShape | None = None) -> float:
        return step.draft_s(Speculation(method, 3, 0.7), 500, 1000, MADE, shape)

    assert drafting("ngram") == drafting("suffix") == 0.2e-3
    head = 500 * 2 * 10_000 * 1024 / 2 / 50e12  # its arithmetic: reading it is shorter
    for layer_and_head in ("eagle", "mtp", "medusa"):
        assert drafting(layer_and_head) == pytest.approx(3 * ((whole - 1e-3) / 8 + head))
    assert drafting("draft_model") == pytest.approx(3 * 0.1 * whole)
    assert drafting("draft_model", draft) == 3 * StepTime(draft, TWO_BY_THREE, CARD, SHARES).step(500, 1000)


def test_on_cpus_an_operation_takes_what_the_row_says_with_and_without_graphs() -> None:
    server, one = replace(CARD, kind="cpu", op_s=7e-6), replace(TWO_BY_THREE, tp=1, dp=1, precision=Precision())
    operations = 3 * 9 + 2 * 9 + 7 + 2 * 20 + 3 * 5 + 5 * 12 - 2 * 8
    for eager, times in ((False, 1.0), (True, 1.5)):
        step = StepTime(MADE, replace(one, eager=eager), server, SHARES)
        host = SHARES.host("vllm", "cpu")
        assert step.overhead_s(4, 3) == pytest.approx(operations * 7e-6 * times + host.step_s + 3 * host.sequence_s)


def test_ranks_on_one_cpu_server_share_its_cores_and_unpack_their_own_weights() -> None:
    """Weights of four bits are widened where the products are in bf16: as long as reading so many bytes more."""
    server = replace(CARD, kind="cpu", op_s=7e-6, unpack_weights_per_s=1e9)
    packed = Precision(linear_bits=4)
    two = replace(TWO_BY_THREE, dp=1, precision=packed)
    linear = MADE.linear_weights

    def reading(settings: Settings) -> float:
        return StepTime(MADE, settings, server, SHARES)._linear_bytes

    assert StepTime(MADE, two, server, SHARES).bandwidth == 1e12 * 0.8 / 2
    assert reading(two) == pytest.approx(linear / 2 / 2 + linear / 2 / (1e9 / 2) * (1e12 * 0.8 / 2))
    assert reading(replace(two, precision=replace(packed, compute="int8"))) == linear / 2 / 2
    assert reading(replace(two, precision=Precision())) == linear / 2 * 2
    assert StepTime(MADE, two, replace(server, unpack_weights_per_s=0.0), SHARES)._linear_bytes == linear / 2 / 2


def test_a_head_that_is_the_embedding_lies_on_every_rank_whole() -> None:
    joint = replace(TWO_BY_THREE, joint=True)
    heads = [StepTime(replace(MADE, tied=tied), joint, CARD, SHARES)._head_bytes for tied in (True, False)]
    assert heads == [10_000 * 1024 * 2 / 2, 10_000 * 1024 * 2 / 2 / 3]


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
