"""The analytic model of one model on one kind of hardware under one trace: memory, step times and queues together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.load.trace import Trace
from tuner.search.hardware import Hardware
from tuner.search.model import settings as settings_of
from tuner.search.model.constants import Constants
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
) -> AnalyticModel:
    """The predictor of a study. ``objective_latency`` is the front's latency axis (``tpot_p99``); ``drafts`` maps the
    ``model`` of a speculative config to its shape. The price is per GPU, or per server on CPU servers. Raises
    ``ValueError`` for an empty trace."""
    quantiles = {*_QUANTILES, *(s.quantile for s in slos if s.quantile)}
    text = objective_latency.rsplit("_p", 1)
    if len(text) == 2 and text[1].replace(".", "", 1).isdigit():
        quantiles.add(float(text[1]) / 100)
    return AnalyticModel(
        shape, hardware, Workload.of(trace), tuple(slos), tuple(sorted(quantiles)), price_usd_per_gpu_hour, engine,
        constants or Constants(), correction or MemoryCorrection(), drafts or {},
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Server:
    """What is known of one serving config whatever the load."""

    settings: Settings
    fit: Fit
    step: StepTime
    batch: np.ndarray  # (8,) running sequences of one rank
    decode_s: np.ndarray  # (8,) seconds per output token at that batch
    fresh: np.ndarray  # (n,) prompt tokens to compute
    prefill_s: np.ndarray  # (n,) engine seconds a prompt adds
    chunks: np.ndarray  # (n,) steps a prompt takes
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
        """The memory arithmetic of ``config``, corrections included."""
        return self._server(config).fit

    def corrected(self, correction: MemoryCorrection) -> AnalyticModel:
        """This model with what was learnt about memory."""
        fields = {n: getattr(self, n) for n in self.__slots__ if n not in ("_servers", "correction")}
        return AnalyticModel(**fields, correction=correction)

    def _holds(self, server: _Server, load: float) -> bool:
        metrics = self._metrics(server, load)
        return not any(slo.miss(metrics) for slo in self.slos)

    def _server(self, config: ServingConfig) -> _Server:
        key = (*config.flags.items(), *config.env.items(), config.model_variant)
        server = self._servers.get(key)
        if server is None:
            if len(self._servers) > 20_000:
                self._servers.clear()
            server = self._servers[key] = self._make(config)
        return server

    def _make(self, config: ServingConfig) -> _Server:
        settings = settings_of.of(config, self.shape, self.hardware, self.engine)
        fit = fits_settings(self.shape, self.hardware, settings, self.correction)
        step = StepTime(self.shape, settings, self.hardware, self.constants)
        work = self.workload
        empty = np.zeros(0)
        if not fit.fits:
            return _Server(settings, fit, step, empty, empty, empty, empty, empty, 0.0)
        cached = work.cached(fit.kv_tokens, settings.block_size) if settings.prefix_caching else 0.0
        fresh = np.maximum(work.inputs - cached, 1.0)
        stay = work.outputs / work.outputs.sum()  # a request is in the batch as long as it has tokens to say
        context = float(((work.inputs + work.outputs / 2) * stay).sum())
        slots = max(min(settings.max_seqs, fit.kv_tokens / (context + settings.block_size / 2)), 1.0)
        batch = np.geomspace(1.0, max(slots, 1.0 + 1e-6), 8)
        decode = np.array([self._token_s(step, settings, b, context) for b in batch])
        middle = float(np.sqrt(batch[-1]))
        budget = max(settings.max_batched_tokens - middle, settings.block_size)
        chunk = np.minimum(fresh, budget)
        chunks = np.ceil(fresh / budget)
        prefill = chunks * (step.prefill_s(chunk, middle)) + step.prefill_attention_s(fresh, work.inputs - fresh / 2)
        return _Server(settings, fit, step, batch, decode, fresh, prefill, chunks, slots)

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
        lanes = server.settings.dp
        decode = self.workload.outputs * server.decode_s[-1] / server.slots
        return (decode + server.prefill_s / server.settings.pp) / lanes

    def _metrics(self, server: _Server, load: float) -> dict[str, float]:
        work, s = self.workload, server.settings
        lanes = s.dp * s.pp
        arrival = work.arrival_s / load
        prefill = server.prefill_s / lanes
        total = work.outputs
        # First guess of each stay from the mean batch, then once more with the occupancy that follows.
        rate = float(total.sum()) / (work.span_s / load)
        busy = min(float(prefill.sum()) / (work.span_s / load), 0.95)
        token_s = np.full_like(total, self._balance(server, rate, busy) / (1 - busy))
        queued = np.zeros_like(total)
        slot = waits_for_slots(arrival, self._work_s(server), server.slots * s.dp)
        prefill_before = np.concatenate(([0.0], np.cumsum(prefill)))
        decode_s = token_s
        for _ in range(2):
            end = arrival + slot + queued + server.prefill_s + total * token_s
            with_it, after = occupancy(arrival + slot if slot.any() else arrival, end)
            batch = np.minimum(with_it / s.dp, server.slots)
            decode_s = np.interp(batch, server.batch, server.decode_s)
            # Prompts that arrive while a request decodes lengthen its steps by what they add.
            index = np.arange(len(total))
            extra = prefill_before[after] - prefill_before[index + 1]
            token_s = np.minimum(decode_s + extra / total, decode_s * 20)
            step_s = decode_s * (s.speculation.per_step if s.speculation else 1.0)
            own = server.prefill_s + (0.5 + server.chunks * (not s.prefill_first)) * step_s
            share = server.fresh / max(s.max_batched_tokens, 1)
            queued = waits(arrival + slot, prefill + share * step_s * (not s.prefill_first) / lanes)
        ttft = self.constants.host(self.engine, self.hardware.kind).request_s + slot + queued + own
        tpot = token_s
        e2e = ttft + (total - 1) * tpot
        columns = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "norm_latency": e2e / total}
        metrics = self._statistics(columns)
        self._gaps(metrics, server, step_s, rate, busy)
        self._money(metrics, columns, server, rate)
        return metrics

    def _balance(self, server: _Server, rate: float, busy: float) -> float:
        """Seconds per token at the batch where tokens served equal tokens asked for (Little's law)."""
        batch, decode = server.batch, server.decode_s
        served = batch * server.settings.dp * (1 - busy) / decode
        at = float(np.interp(rate, served, batch))
        return float(np.interp(at, batch, decode))

    def _statistics(self, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        table = np.sort(np.stack(list(columns.values())), axis=1)
        n = table.shape[1]
        at = np.array(self.quantiles) * (n - 1)
        low = at.astype(int)
        high = np.minimum(low + 1, n - 1)
        values = table[:, low] + (table[:, high] - table[:, low]) * (at - low)
        means = table.mean(axis=1)
        metrics: dict[str, float] = {}
        for row, name in enumerate(columns):
            for q, value in zip(self.quantiles, values[row], strict=True):
                metrics[f"{name}_p{q * 100:.6g}_s"] = float(value)
            metrics[f"{name}_mean_s"] = float(means[row])
            metrics[f"{name}_max_s"] = float(table[row, -1])
        return metrics

    def _gaps(self, metrics: dict[str, float], server: _Server, step_s: np.ndarray, rate: float, busy: float) -> None:
        """Inter-token gaps: most are a decode step; a share of them holds a piece of a prompt as well."""
        step = float(step_s.mean())
        prompts = rate / float(self.workload.outputs.mean()) * float(server.chunks.mean()) / server.settings.dp
        mixed = min(prompts * step / max(1 - busy, 0.05), 1.0)
        pieces = np.sort(server.prefill_s / server.chunks)
        steps = np.sort(step_s)
        for q in self.quantiles:
            if q <= 1 - mixed:
                value = steps[int(q / (1 - mixed) * (len(steps) - 1))]
            else:
                value = steps.mean() + pieces[int((q - 1 + mixed) / mixed * (len(pieces) - 1))]
            metrics[f"itl_p{q * 100:.6g}_s"] = float(value)
        metrics["itl_mean_s"] = metrics["tpot_mean_s"]
        metrics["itl_max_s"] = float(steps[-1] + pieces[-1])

    def _money(
        self, metrics: dict[str, float], columns: Mapping[str, np.ndarray], server: _Server, rate: float
    ) -> None:
        work = self.workload
        good = np.ones_like(work.outputs, dtype=bool)
        for slo in self.slos:
            if slo.latency in columns:
                good &= columns[slo.latency] <= slo.limit
        asked = float(work.outputs.sum())
        full = asked / float(self._work_s(server).sum())  # tokens per second of a machine that never idles
        served = min(rate, full)
        share = float(work.outputs[good].sum()) / asked
        inputs = float(work.inputs.sum()) / asked
        price = self.price_usd_per_gpu_hour * (server.settings.gpus if self.hardware.kind == "gpu" else 1)
        per_second = price / 3600 * 1e6
        goodput = served * share
        metrics["requests_per_s"] = served / float(work.outputs.mean())
        metrics["output_tokens_per_s"] = served
        metrics["total_tokens_per_s"] = served * (1 + inputs)
        metrics["goodput_output_tokens_per_s"] = goodput
        metrics["slo_share"] = share
        metrics["error_rate"] = 0.0
        floor = max(goodput, served * 1e-6)
        metrics["cost_usd_per_mtok_output"] = per_second / floor
        metrics["cost_usd_per_mtok_total"] = per_second / (floor * (1 + inputs))
