"""A closed loop: a fixed number of clients, each sending its next request when the last one ended.

Published serving tables are measured this way. The step times are the predictor's own; only the arrivals differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuner.search.hardware import Hardware
from tuner.search.model.constants import Constants
from tuner.search.model.precision import Precision
from tuner.search.model.queueing import machine_repair
from tuner.search.model.roofline import StepTime
from tuner.search.model.settings import Settings, batch_defaults, memory_default
from tuner.search.model.shape import ModelShape
from tuner.space.memory import Fit, fits_settings


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Ranks of one server. ``expert_parallel`` spreads whole experts over all ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Mean TTFT and TPOT, output tokens per second of the server and per GPU; ``running`` sequences on average.
    Zeros, with the reason in ``fit``, where the model does not fit."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    per_gpu: float
    running: float
    fit: Fit


def predict_closed_loop(
    shape: ModelShape,
    hardware: Hardware,
    engine: str,
    parallelism: Parallelism,
    precision: Precision,
    isl: int,
    osl: int,
    concurrency: int,
    *,
    constants: Constants | None = None,
    length_spread: float = 0.06,
    waves: float = 10.0,
    memory_share: float | None = None,
) -> ClosedLoop:
    """Means over a run of ``waves`` requests per client, all clients starting at once, with the engine's default batch
    limits and its KV cache sized for these requests.

    ``isl`` and ``osl`` are tokens in and out; ``length_spread`` is the relative standard deviation of the output
    length. ``concurrency`` counts clients over all data-parallel ranks. ``memory_share`` replaces the engine's default.
    """
    gpus = parallelism.tp * parallelism.pp
    budget, seqs = batch_defaults(hardware, gpus, engine)
    usual = memory_default(hardware, budget, engine, gpus, latent=shape.latent)
    settings = Settings(
        parallelism.tp, parallelism.pp, parallelism.dp, parallelism.expert_parallel, budget, seqs, 16,
        memory_share or usual, None, True, False, False, isl + osl, precision,
        prefill_first=engine == "sglang", engine=engine,
    )  # fmt: skip
    fit = fits_settings(shape, hardware, settings)
    if not fit.fits:
        return ClosedLoop(0.0, 0.0, 0.0, 0.0, 0.0, fit)
    return _steady(
        StepTime(shape, settings, hardware, constants or Constants()),
        settings,
        fit,
        isl,
        osl,
        concurrency,
        length_spread,
        waves,
    )


def _steady(
    step: StepTime, s: Settings, fit: Fit, isl: int, osl: int, clients: float, spread: float, waves: float
) -> ClosedLoop:
    lanes = s.dp * s.pp
    clients = clients / lanes
    context = isl + osl / 2
    slots = max(min(s.max_seqs, fit.kv_tokens / min(context, fit.parts["kv_held"])) / s.pp, 1.0)
    decode_tokens = max(osl - 1.0, 1.0)
    running = min(clients, slots)
    ttft = tpot = inside = 0.0
    for _ in range(40):
        budget = max(s.max_batched_tokens - (0 if s.prefill_first else running), 256)
        chunks = math.ceil(isl / budget)
        piece = np.array([isl / chunks])
        alone = 0.0 if s.prefill_first else running
        prefill = chunks * float(step.prefill_s(piece, alone)[0])
        prefill += float(step.prefill_attention_s(np.array([float(isl)]), np.array([isl / 2]))[0])
        decode = step.step(running, context)
        # Other clients' prompts, one per client and cycle, fall into this client's decoding.
        stay = decode_tokens * tpot if tpot else decode_tokens * decode
        together = _lockstep(s, spread, osl)
        during = stay / (stay + inside)
        others = max(running - 1.0, 0.0) * prefill * ((1 - together) * during + together * 0.5)
        tpot_new = decode + others / decode_tokens
        turn = prefill + (0.0 if s.prefill_first else isl / budget * decode)  # short prompts share a step
        loose = (machine_repair(running, turn, decode_tokens * tpot_new) - turn) / 2  # prompts of equal length
        wave = (running - 1) * prefill / 2
        queued = together * wave + (1 - together) * ((1 - 1 / waves) * min(loose, wave) + wave / waves)
        cycle = decode_tokens * tpot_new + queued + prefill
        waiting = max(clients - slots, 0.0) * cycle / slots
        own = prefill + (0.5 + (0.0 if s.prefill_first else chunks)) * decode
        inside = queued + own  # with a place in the batch, before the first token
        ttft_new = step.host.request_s + inside + waiting
        busy = decode_tokens * tpot_new / (decode_tokens * tpot_new + inside)
        target = min(clients, slots) * busy
        if abs(tpot_new - tpot) < 1e-5 * tpot_new and abs(target - running) < 1e-4 * running:
            break
        tpot, ttft, running = tpot_new, ttft_new, max(0.5 * (running + target), 0.5)
    throughput = clients * lanes * osl / (ttft + decode_tokens * tpot)
    return ClosedLoop(ttft, tpot, throughput, throughput / s.gpus, running * lanes, fit)


def _lockstep(s: Settings, spread: float, osl: float) -> float:
    """How far the clients move in waves, 0 to 1. Where prompts go first, all of them are prefilled before anybody
    decodes, so requests of equal length end in the same step and come back together. Lengths that differ spread the
    ends over the steps: a uniform distribution of relative standard deviation ``spread`` is ``sqrt(12) spread osl``
    steps wide. Mixed steps stagger the clients from the start."""
    return 1 / (1 + math.sqrt(12) * spread * osl) if s.prefill_first else 0.0
