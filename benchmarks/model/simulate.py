"""How far the predictor's queues are from a simulation of the scheduler, step by step, with the same step times.

    python benchmarks/model/simulate.py        (a minute; loads from 20 to 95 % of saturation)

The serving tables say nothing of open loops: this isolates what the queueing
formulas lose, and says nothing of hardware.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.load.trace import Trace
from tuner.search import hardware
from tuner.search.model import predictor, settings
from tuner.search.model.constants import Constants
from tuner.search.model.roofline import StepTime
from tuner.search.model.settings import Settings
from tuner.search.model.shape import ModelShape
from tuner.space.config import ServingConfig
from tuner.space.memory import fits_settings

_SHAPES = Path(__file__).parents[2] / "tests/search/shapes"


@dataclass(slots=True)
class _Request:
    due_s: float
    prompt: int
    answer: int
    prefilled: int = 0
    produced: int = 0
    first_s: float = 0.0
    end_s: float = 0.0


def simulate(trace: Trace, load: float, step: StepTime, s: Settings, kv_tokens: float) -> dict[str, np.ndarray]:
    """TTFT and TPOT of every request under vLLM's scheduler: running sequences first, then chunks of prompts while the
    token budget, the places and the cache last. No prefix cache, no preemption (places are kept for whole requests)."""
    rows = zip(trace.arrival_s / load, trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    coming = deque(_Request(float(at), prompt, answer) for at, prompt, answer in rows)
    done: list[_Request] = []
    waiting: deque[_Request] = deque()
    running: list[_Request] = []
    request_s = step.host.request_s
    now, held = 0.0, 0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].due_s + request_s)
        while coming and coming[0].due_s + request_s <= now:
            waiting.append(coming.popleft())
        decoding = [r for r in running if r.prefilled == r.prompt]
        budget, pieces = s.max_batched_tokens - len(decoding), []
        for r in running:
            if r.prefilled < r.prompt and budget > 0:
                pieces.append((r, min(budget, r.prompt - r.prefilled)))
                budget -= pieces[-1][1]
        while waiting and budget > 0 and len(running) < s.max_seqs:
            need = waiting[0].prompt + waiting[0].answer
            if held + need > kv_tokens and running:
                break
            r = waiting.popleft()
            held += need
            running.append(r)
            pieces.append((r, min(budget, r.prompt)))
            budget -= pieces[-1][1]
        context = float(np.mean([r.prompt + r.produced for r in decoding])) if decoding else 0.0
        fresh = sum(size for _, size in pieces)
        seen = sum(size * (r.prefilled + size / 2) for r, size in pieces) / fresh if fresh else 0.0
        now += step.step(len(decoding), context, fresh, seen)
        for r, size in pieces:
            r.prefilled += size
            if r.prefilled == r.prompt:
                r.produced, r.first_s = 1, now
        for r in decoding:
            r.produced += 1
        for r in [r for r in running if r.produced >= r.answer]:
            r.end_s = now
            held -= r.prompt + r.answer
            running.remove(r)
            done.append(r)
    ttft = np.array([r.first_s - r.due_s for r in done])
    return {"ttft": ttft, "tpot": np.array([(r.end_s - r.first_s) / max(r.answer - 1, 1) for r in done])}


def poisson(n: int, prompt: int, answer: int, seed: int, burst: float = 1.0) -> Trace:
    """``n`` requests at 1 per second, gamma gaps of variation ``burst``, log-normal lengths (sigma 0.6)."""
    rng = np.random.default_rng(seed)
    shape = 1 / burst**2
    gaps = rng.gamma(shape, 1 / shape, n)
    lengths = [np.maximum(rng.lognormal(np.log(mean) - 0.18, 0.6, n), 4).astype(int) for mean in (prompt, answer)]
    return Trace("made", np.cumsum(gaps), lengths[0].clip(max=7000), lengths[1].clip(max=1000), 0,
                 np.zeros(0, int), np.zeros(n + 1, int))  # fmt: skip


def main() -> None:
    errors: dict[str, list[float]] = {}
    print("| model | gpus | trace | flags | load/saturation | " + " | ".join(_KEYS) + " |  (predicted / simulated)")
    for name, gpu, gpus, prompt, answer, burst, flags in _CASES:
        shape, row = ModelShape.from_folder(_SHAPES / f"{name}.json"), hardware.table()[gpu]
        config = ServingConfig("m", {}, {"tensor-parallel-size": gpus, "max-model-len": 8192, **flags}, gpus=gpus)
        trace = poisson(500, prompt, answer, seed=7, burst=burst)
        model = predictor.build(shape, row, trace, (), "tpot_p99", 1.0)
        s = settings.of(config, shape, row)
        step = StepTime(shape, s, row, Constants())
        saturation = model.capacity(config)
        for share in (0.2, 0.5, 0.8, 0.95):
            truth = simulate(trace, saturation * share, step, s, fits_settings(shape, row, s).kv_tokens)
            got = model.predict(config, saturation * share).metrics
            cells = []
            for key in _KEYS:
                latency, stat = key.split("_")
                value = float(np.quantile(truth[latency], float(stat[1:]) / 100))
                ratio = got[f"{key}_s"] / value
                cells.append(f"{ratio:.2f}")
                errors.setdefault(f"{key} at {'up to 80 %' if share <= 0.8 else '95 %'}", []).append(ratio)
            case = f"{name} | {gpus} x {gpu} | {prompt}/{answer} cv {burst:g} | {flags}"
            print(f"| {case} | {share} | {' | '.join(cells)} |")
    for key, ratios in sorted(errors.items()):
        log = np.log(ratios)
        print(f"{key}: bias x{np.exp(np.median(log)):.2f}, median error {np.median(np.abs(np.expm1(log))):.0%}, "
              f"90 % within x{np.exp(np.quantile(np.abs(log), 0.9)):.2f}")  # fmt: skip


_KEYS = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
_CASES = (
    ("llama-3.1-8b", "H100-SXM", 1, 1000, 200, 1.0, {}),
    ("llama-3.1-8b", "H100-SXM", 1, 1000, 200, 3.0, {}),
    ("llama-3.1-8b", "L40S", 1, 2000, 100, 1.0, {"max-num-batched-tokens": 1024}),
    ("qwen3-32b", "H100-SXM", 2, 1000, 300, 1.0, {}),
    ("qwen3-32b", "H100-SXM", 2, 1000, 300, 1.0, {"max-num-seqs": 16}),
    ("gpt-oss-120b", "H200", 1, 3000, 150, 2.0, {"max-num-batched-tokens": 2048}),
)

if __name__ == "__main__":
    main()
