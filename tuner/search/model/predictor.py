"""The analytic model of one model on one kind of hardware under one trace: memory, step times and queues together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tuner.load.sharing import shared_tokens
from tuner.load.trace import Trace
from tuner.search.hardware import Hardware
from tuner.search.model import settings as settings_of
from tuner.search.model.constants import Constants
from tuner.search.model.metrics import gaps, money, statistics
from tuner.search.model.queueing import occupancy, waits, waits_for_slots
from tuner.search.model.roofline import StepTime
from tuner.search.model.settings import Settings
from tuner.search.model.shape import ModelShape
from tuner.search.model.workload import Workload
from tuner.search.prediction import Prediction
from tuner.space.config import ServingConfig
from tuner.space.memory import Fit, MemoryCorrection, fits_settings
from tuner.spec.slo import Slo

_QUANTILES = (0.5, 0.9, 0.95, 0.99)
_LOAD_LIMITS = (1e-3, 1e4)


def build(
    shape: ModelShape,
    hardware: Hardware,
    trace: Trace,
    slos: Sequence[Slo],
    objective_latency: str,
    price_usd_per_gpu_hour: float,
    engine: str = "vllm",
    *,
    constants: Constants | None = None,
    correction: MemoryCorrection | None = None,
    drafts: Mapping[str, ModelShape] | None = None,
    types: Mapping[str, tuple[Hardware, float]] | None = None,
) -> AnalyticModel:
    """The predictor of a study. ``objective_latency`` is the front's latency axis (``tpot_p99``); ``drafts`` maps the
    ``model`` of a speculative config to its shape, ``types`` the type of GPU that a config names to its row and its
    price (what it does not hold runs on ``hardware``). The price is per GPU, or per server on CPU servers. Raises
    ``ValueError`` for an empty trace."""
    quantiles = {*_QUANTILES, *(s.quantile for s in slos if s.quantile)}
    text = objective_latency.rsplit("_p", 1)
    if len(text) == 2 and text[1].replace(".", "", 1).isdigit():
        quantiles.add(float(text[1]) / 100)
    return AnalyticModel(
        shape, hardware, Workload.of(trace), tuple(slos), tuple(sorted(quantiles)), price_usd_per_gpu_hour, engine,
        constants or Constants(), correction or MemoryCorrection(), drafts or {}, types or {},
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Server:
    """What is known of one serving config whatever the load."""

    settings: Settings
    price_usd_per_hour: float  # of all its GPUs
    fit: Fit
    step: StepTime
    batch: np.ndarray  # (8,) running sequences of one rank
    decode_s: np.ndarray  # (8,) seconds per output token at that batch
    share: np.ndarray  # (n,) prompt tokens to compute, over a step's budget of them
    alone_s: np.ndarray  # (n,) engine seconds a prompt adds that shares no step with another prompt
    packed_s: np.ndarray  # (n,) and that fills its share of full steps
    chunks: np.ndarray  # (n,) steps a prompt takes
    full_s: float  # engine seconds that a full budget of prompt tokens adds, attention left out
    slots: float


@dataclass(frozen=True, slots=True, eq=False)
class AnalyticModel:
    """A :class:`tuner.search.prediction.Predictor`. Build it with :func:`build`."""

    shape: ModelShape
    hardware: Hardware
    workload: Workload
    slos: tuple[Slo, ...]
    quantiles: tuple[float, ...]
    price_usd_per_gpu_hour: float
    engine: str
    constants: Constants
    correction: MemoryCorrection
    drafts: Mapping[str, ModelShape]
    types: Mapping[str, tuple[Hardware, float]]
    _servers: dict[tuple[object, ...], _Server] = field(default_factory=dict, repr=False)

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        """Fit, latencies and cost of ``config`` at ``load`` times the trace's rate."""
        server = self._server(config)
        if not server.fit.fits:
            return Prediction(False, {}, 0.0, server.fit.reason, server.fit.short_bytes)
        return Prediction(True, self._metrics(server, load), server.fit.kv_tokens)

    def capacity(self, config: ServingConfig) -> float:
        """The highest load at which every SLO is predicted to hold (bisected in logarithms to 2 %); without SLOs, the
        load that saturates the server. About ten times the cost of :meth:`predict`."""
        server = self._server(config)
        if not server.fit.fits:
            return 0.0
        saturation = self._saturation(server)
        low, high = _LOAD_LIMITS[0], min(max(saturation, _LOAD_LIMITS[0]), _LOAD_LIMITS[1])
        if not self.slos:
            return high
        if not self._holds(server, low):
            return 0.0
        high = min(high * 4, _LOAD_LIMITS[1])  # a short burst may be served late and still within its limits
        if self._holds(server, high):
            return high
        while high / low > 1.02:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._holds(server, middle) else (low, middle)
        return low

    def fit(self, config: ServingConfig) -> Fit:
        """The memory arithmetic of ``config``, corrections included; a tenth of the cost of :meth:`predict`."""
        hardware, _ = self._machine(config)
        return self._fit(settings_of.of(config, self.shape, hardware, self.engine), hardware)

    def _machine(self, config: ServingConfig) -> tuple[Hardware, float]:
        """What ``config`` runs on, and USD per GPU-hour there."""
        return self.types.get(config.gpu, (self.hardware, self.price_usd_per_gpu_hour))

    def _fit(self, settings: Settings, hardware: Hardware) -> Fit:
        draft = self.drafts.get(settings.speculation.model) if settings.speculation else None
        return fits_settings(self.shape, hardware, settings, self.correction, draft)

    def fill_s(self, config: ServingConfig, prompts: Trace, at_once: int) -> float | None:
        """Seconds until the prefix cache holds ``prompts``, which are sent in order, so many ``at_once``, for one token
        each; None where the server does not fit."""
        server = self._server(config)
        if not server.fit.fits:
            return None
        s, step = server.settings, server.step
        fresh = (prompts.input_tokens - shared_tokens(prompts, engine_block_tokens=s.block_size)).astype(float)
        total = float(fresh.sum())
        tokens = min(float(s.max_batched_tokens), at_once / s.dp * total / len(prompts))  # of a step
        busy = total / tokens * step.step(0.0, 0.0, tokens)
        busy += float(step.prefill_attention_s(fresh, prompts.input_tokens - fresh / 2).sum())
        return busy / (s.dp * s.pp) + len(prompts) / at_once * step.host.request_s

    def corrected(self, correction: MemoryCorrection) -> AnalyticModel:
        """This model with what was learnt about memory."""
        return replace(self, correction=correction, _servers={})

    def doubts(self) -> dict[str, float]:
        """How little is known of each constant (:mod:`tuner.search.calibration`); those that this model cannot feel are
        left out."""
        known = self.constants.doubts(self.hardware.kind)
        if not self.shape.has_experts:
            del known["expert_flops_share"]
        return known

    def scaled(self, factors: Mapping[str, float]) -> AnalyticModel:
        """This model with its constants times ``factors``."""
        return replace(self, constants=self.constants.scaled(factors, self.engine, self.hardware.kind), _servers={})

    def _holds(self, server: _Server, load: float) -> bool:
        metrics = self._metrics(server, load)
        return not any(slo.miss(metrics) for slo in self.slos)

    def _server(self, config: ServingConfig) -> _Server:
        key = (*config.flags.items(), *config.env.items(), config.model_variant, config.gpus, config.gpu)
        server = self._servers.get(key)
        if server is None:
            if len(self._servers) > 20_000:
                self._servers.clear()
            server = self._servers[key] = self._make(config)
        return server

    def _make(self, config: ServingConfig) -> _Server:
        hardware, price = self._machine(config)
        settings = settings_of.of(config, self.shape, hardware, self.engine)
        price *= settings.gpus if hardware.kind == "gpu" else 1
        fit = self._fit(settings, hardware)
        step = StepTime(self.shape, settings, hardware, self.constants)
        work = self.workload
        empty = np.zeros(0)
        if not fit.fits:
            return _Server(settings, price, fit, step, empty, empty, empty, empty, empty, empty, 0.0, 0.0)
        cached = work.cached(fit.kv_tokens, settings.block_size) if settings.prefix_caching else 0.0
        fresh = np.maximum(work.inputs - cached, 1.0)
        stay = work.outputs / work.outputs.sum()  # a request is in the batch as long as it has tokens to say
        context = float(((work.inputs + work.outputs / 2) * stay).sum())
        held = min(context, fit.parts["kv_held"])
        slots = max(min(settings.max_seqs, fit.kv_tokens / (held + settings.block_size / 2)), 1.0)
        batch = np.geomspace(1.0, max(slots, 1.0 + 1e-6), 8)
        decode = np.array([self._token_s(step, settings, b, context) for b in batch])
        middle = float(np.sqrt(batch[-1]))
        budget = max(settings.max_batched_tokens - middle, settings.block_size)
        whole = np.floor(fresh / budget)
        pieces = step.prefill_s(np.append(fresh - whole * budget, budget), middle)
        attention = step.prefill_attention_s(fresh, work.inputs - fresh / 2)
        alone = whole * pieces[-1] + pieces[:-1] + attention
        packed = np.minimum(fresh / budget * pieces[-1] + attention, alone)
        full_s = float(pieces[-1])
        chunks = np.ceil(fresh / budget)
        return _Server(settings, price, fit, step, batch, decode, fresh / budget, alone, packed, chunks, full_s, slots)

    def _token_s(self, step: StepTime, settings: Settings, batch: float, context: float) -> float:
        """Seconds per output token of one sequence in a batch of ``batch`` per rank; a pipeline of p stages works on p
        groups of a p-th each, one after the other."""
        group = batch / settings.pp
        spec = settings.speculation
        if spec is None:
            return step.step(group, context)
        verify = step.step(group, context, drafts=spec.tokens)
        shape = self.drafts.get(spec.model)
        return (verify + step.draft_s(spec, group, context, self.shape, shape)) / spec.per_step

    def _saturation(self, server: _Server) -> float:
        """The load at which arriving work equals what the full batch serves."""
        return self.workload.span_s / max(float(self._work_s(server).sum()), 1e-12)

    def _work_s(self, server: _Server) -> np.ndarray:
        """Seconds of a full machine that each request takes."""
        decode = self.workload.outputs * server.decode_s[-1] / server.slots
        return (decode + server.packed_s / server.settings.pp) / server.settings.dp

    def _metrics(self, server: _Server, load: float) -> dict[str, float]:
        work, s = self.workload, server.settings
        lanes, mixes = s.dp * s.pp, not s.prefill_first
        arrival, total = work.arrival_s / load, work.outputs
        window_s = work.span_s / load
        rate = float(total.sum()) / window_s
        # The busier the engine, the more prompts share their steps.
        busy = min(float(server.packed_s.sum()) / lanes / window_s, 0.95)
        alone = server.alone_s + (server.packed_s - server.alone_s) * busy
        prefill = alone / lanes
        prefill_before = np.concatenate(([0.0], np.cumsum(prefill)))
        # First guess of each stay from the mean batch, then twice with the occupancy that follows.
        token_s = np.full_like(total, self._balance(server, rate, busy) / (1 - busy))
        slot = queued = np.zeros_like(total)
        step_s = token_s
        index = np.arange(len(total))
        for _ in range(2):
            start = np.maximum.accumulate(arrival + slot)
            with_it, after = occupancy(start, start + queued + alone + total * token_s)
            batch = np.minimum(with_it / s.dp, server.slots)
            decode_s = np.interp(batch, server.batch, server.decode_s)
            # Prompts that arrive while a request decodes lengthen its steps by what they add.
            extra = prefill_before[after] - prefill_before[index + 1]
            token_s = np.minimum(decode_s + extra / total, decode_s * 20)
            step_s = decode_s * (s.speculation.per_step if s.speculation else 1.0)
            queued = waits(start, prefill + server.share * step_s * mixes / lanes)
            slot = waits_for_slots(arrival, queued + alone + total * token_s, int(server.slots) * s.dp)
        own = alone + (0.5 + server.chunks * mixes) * step_s
        own += np.minimum(queued, server.full_s) / 2  # prompts that queued up end with the step they share
        request_s = self.constants.host(self.engine, self.hardware.kind).request_s
        ttft = request_s + slot + queued + own
        e2e = ttft + (total - 1) * token_s
        latencies = {"ttft": ttft, "tpot": token_s, "e2e": e2e, "norm_latency": e2e / total}
        found = statistics(latencies, self.quantiles)
        prompts = rate / float(total.mean()) * float(server.chunks.mean()) / s.dp
        mixed = min(prompts * float(step_s.mean()) / max(1 - busy, 0.05), 1.0)
        found |= gaps(step_s, alone / server.chunks, mixed, self.quantiles)
        found["itl_mean_s"] = found["tpot_mean_s"]
        full = float(total.sum() / self._work_s(server).sum())
        return found | money(work.inputs, total, latencies, self.slos, min(rate, full), server.price_usd_per_hour)

    def _balance(self, server: _Server, rate: float, busy: float) -> float:
        """Seconds per token at the batch where tokens served equal tokens asked for (Little's law)."""
        batch, decode = server.batch, server.decode_s
        served = batch * server.settings.dp * (1 - busy) / decode
        at = float(np.interp(rate, served, batch))
        return float(np.interp(at, batch, decode))
