"""The time of one engine step by the roofline: every part takes its memory or its arithmetic time, whichever is longer.

S. Williams, A. Waterman, D. Patterson: Roofline, CACM 52(4), 2009. The split into parts and the two phases follow
Vidur (Agrawal et al., MLSys 2024) and Sarathi-Serve (Agrawal et al., OSDI 2024). docs/model.md has the equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuner.search.hardware import Hardware
from tuner.search.model.constants import Constants
from tuner.search.model.settings import Settings, Speculation
from tuner.search.model.shape import Attention, ModelShape

_GRAPH_TOKENS = 512  # a step of more tokens runs without a captured graph (vLLM's largest capture size)
_UNFUSED = 1.5  # kernels without compilation per kernel with it: norms, activations, rotations and quantizations alone


@dataclass(frozen=True, slots=True)
class _Mixing:
    """One attention kind on one GPU: bytes and operations, all its layers together."""

    window: int
    kv_bytes: float  # read per token of context and sequence
    scan_bytes: float  # read per token of the whole context (indexer)
    state_bytes: float  # read and written per sequence
    decode_ops: float  # per pair of query and key
    prefill_ops: float
    scan_ops: float  # the indexer's, per pair over the whole context; every rank does all of it


@dataclass(frozen=True, slots=True)
class _Experts:
    layers: int
    experts: int
    top_k: int
    bytes_each: float  # one expert's bytes on one GPU
    ops_each: float  # operations of one token in one expert, on one GPU


class StepTime:
    """Seconds of an engine step of one server; built once per serving config, then cheap to ask."""

    def __init__(self, shape: ModelShape, settings: Settings, hardware: Hardware, constants: Constants) -> None:
        p, tp = settings.precision, settings.tp
        if hardware.kind == "cpu":  # the ranks share the server's cores
            hardware = hardware.shared_by(settings.gpus)
        self._hardware, self._k, self._settings = hardware, constants, settings
        self.host = constants.host(settings.engine, hardware.kind)
        self.bandwidth = hardware.bandwidth_bytes_per_s * constants.bandwidth_share
        mine = shape.linear_of_rank(settings.sharing)
        self._linear_bytes = mine * p.linear_bits / 8 / tp
        if hardware.unpack_weights_per_s and p.compute == "bf16" and p.linear_bits < 16:
            unpacked = mine / tp / hardware.unpack_weights_per_s
            self._linear_bytes += unpacked * self.bandwidth  # as if the time were spent reading
        self._linear_ops = 2 * shape.linear_weights / tp
        self._linear_rate = hardware.rate(p.compute) * constants.flops_share
        self._expert_rate = hardware.rate(p.expert_compute) * constants.expert_flops_share
        head = shape.vocab * shape.hidden / (1 if shape.tied else settings.sharing)
        self._head_bytes = head * p.embedding_bits / 8 / tp
        self._head_ops = 2 * shape.vocab * shape.hidden / tp
        self._wide_rate = hardware.rate("bf16") * constants.flops_share
        self._attention_rate = hardware.rate("bf16") * constants.attention_share
        self._scan_rate = hardware.rate("fp8") * constants.attention_share
        self._mixings = tuple(_mixing(a, settings) for a in shape.attention)
        self._experts = tuple(
            _Experts(
                f.layers,
                f.experts,
                f.top_k,
                f.expert_weights * p.expert_bits / 8 / tp / settings.dp,
                2 * f.expert_weights / tp,
            )
            for f in shape.ffn
            if f.experts
        )
        quantizing = 4 if p.act_quant else 0  # one kernel in front of each of a layer's four products
        self.kernels = (
            sum(a.layers * (a.kernels + quantizing) for a in shape.attention)
            + sum(f.layers * f.kernels for f in shape.ffn)
            - (2 * shape.layers if tp == settings.sharing == 1 else 0)  # no all-reduce
        )
        self._gathers = shape.layers if settings.joint else 0
        self._reduces = 2 * shape.layers - self._gathers if tp > 1 else 0
        self._row_bytes = shape.hidden * 2.0
        self._row_traffic = _row_traffic(shape, settings) / self.bandwidth
        self._dp = settings.dp

    def step(
        self, decodes: float, context: float, prefill: float = 0.0, prefill_context: float = 0.0, drafts: int = 0
    ) -> float:
        """Seconds of a step that decodes ``decodes`` sequences of mean ``context`` tokens (each with ``drafts`` draft
        tokens to verify) and prefills ``prefill`` tokens that see ``prefill_context`` tokens on average."""
        fresh = decodes * (1 + drafts)
        tokens = fresh + prefill
        if tokens <= 0:
            return 0.0
        time = self._products(tokens, decodes * (1 + drafts) + min(prefill, 1.0))
        time += self._attention(decodes, context, 1 + drafts, prefill, prefill_context)
        time += self.reduce_s(tokens)
        time += self.overhead_s(tokens, decodes)
        return time

    def prefill_s(self, tokens: np.ndarray, decodes: float) -> np.ndarray:
        """What ``tokens`` prompt tokens add to a step that decodes ``decodes`` sequences, attention left out, read
        from a line through a few lengths. Shapes (n,)."""
        alone = self._without_attention(decodes)
        longest = max(float(tokens.max()), 2.0)
        edge = _GRAPH_TOKENS - decodes  # past it a step loses its graph: the line has a jump there
        points = np.unique(np.clip([*np.geomspace(1.0, longest, 10), edge, edge + 1], 1.0, longest))
        added = [self._without_attention(decodes + point) - alone for point in points]
        return np.interp(tokens, points, added)

    def prefill_attention_s(self, tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Attention of prompts of ``tokens`` tokens that see ``seen`` tokens on average. Shapes (n,)."""
        time = np.zeros_like(tokens)
        for m in self._mixings:
            span = np.minimum(seen, m.window) if m.window else seen
            time += tokens * (span * m.prefill_ops / self._attention_rate + seen * m.scan_ops / self._scan_rate)
        return time

    def draft_s(
        self, spec: Speculation, decodes: float, context: float, target: ModelShape, draft: ModelShape | None
    ) -> float:
        """Seconds to draft ``spec.tokens`` tokens: nothing to compute for n-grams, one layer and the head per token
        for EAGLE and MTP heads, a model of its own (or a tenth of the target's step, where unknown) for drafts."""
        if spec.method in ("ngram", "suffix"):
            return 0.2e-3
        if spec.method in ("eagle", "mtp", "medusa"):
            body = (self.step(decodes, context) - self.host.step_s) / target.layers
            head = max(self._head_bytes / self.bandwidth, decodes * self._head_ops / self._wide_rate)
            return spec.tokens * (body + head)
        if draft is None:
            return spec.tokens * 0.1 * self.step(decodes, context)
        return spec.tokens * StepTime(draft, self._settings, self._hardware, self._k).step(decodes, context)

    def _without_attention(self, tokens: float) -> float:
        return self._products(tokens, 1.0) + self.reduce_s(tokens) + self.overhead_s(tokens, 0.0)

    def _products(self, tokens: float, sampled: float) -> float:
        # The square root of the sum of squares: near the ridge reading and arithmetic hide each other only in part.
        time = math.hypot(self._linear_bytes / self.bandwidth, tokens * self._linear_ops / self._linear_rate)
        time += tokens * self._row_traffic
        time += max(self._head_bytes / self.bandwidth, sampled * self._head_ops / self._wide_rate)
        for e in self._experts:
            # The tokens of all data-parallel ranks meet in one expert layer, which is spread over all GPUs.
            touched = e.experts * (1 - (1 - e.top_k / e.experts) ** (tokens * self._dp))
            read = e.layers * touched * e.bytes_each / self.bandwidth
            time += math.hypot(read, e.layers * tokens * e.top_k * e.ops_each / self._expert_rate)
        return time

    def _attention(self, decodes: float, context: float, queries: int, prefill: float, seen: float) -> float:
        time = 0.0
        for m in self._mixings:
            span = min(context, m.window) if m.window else context
            read = decodes * (span * m.kv_bytes + context * m.scan_bytes + m.state_bytes) / self.bandwidth
            pairs = decodes * queries * span * m.decode_ops / self._wide_rate
            time += max(read, pairs + decodes * queries * context * m.scan_ops / self._scan_rate)
            if prefill:
                time += prefill * (min(seen, m.window) if m.window else seen) * m.prefill_ops / self._attention_rate
                time += prefill * seen * m.scan_ops / self._scan_rate
        return time

    def reduce_s(self, tokens: float) -> float:
        """Communication of one step: all-reduces move 2 (t - 1) / t of the rows over the link (ring, Patarasu and Yuan
        2009); data-parallel ranks send each token to its experts' ranks and back, or gather those of all of them before
        a feed-forward block that they share and scatter them after it."""
        tp, dp = self._settings.tp, self._dp
        moved = self._reduces * 2 * (tp - 1) / tp * tokens * self._row_bytes
        moved += self._gathers * 2 * (tp * dp - 1) / tp * tokens * self._row_bytes
        if not self._gathers:
            moved += (
                sum(e.layers * 2 * min(e.top_k, dp) * (dp - 1) / dp for e in self._experts)
                * tokens
                * self._row_bytes
                / tp
            )
        return moved / (self._hardware.link_bytes_per_s * self._k.link_share)

    def overhead_s(self, tokens: float, sequences: float) -> float:
        """Launches, scheduler and sampling: what a step costs before it reads or multiplies anything."""
        k, h = self._k, self._hardware
        eager = self._settings.eager or tokens > _GRAPH_TOKENS
        kernel = h.op_s if h.op_s is not None else self.host.eager_kernel_s if eager else k.kernel_s
        kernel *= _UNFUSED if self._settings.eager else 1.0
        latency = max(h.link_latency_s - 10e-6, 0.0) * (self._reduces + self._gathers)  # over NVLink's: in the kernels
        return self.kernels * kernel + latency + self.host.step_s + sequences * self.host.sequence_s


def _row_traffic(shape: ModelShape, settings: Settings) -> float:
    """Bytes one token's activations move through memory between the products of all layers, on one GPU: about ten
    passes over a row of the hidden width in each block (norm, quantization, residual, all-reduce in and out), which TP
    does not split; in expert layers the row is copied to each of the top_k experts and summed again (four passes),
    and the inner width is written and read three times."""
    passes = 20 * shape.hidden * shape.layers
    for f in shape.ffn:
        inner = (f.expert_weights if f.experts else f.weights) / 3 / shape.hidden
        passes += f.layers * (f.top_k or 1) * 6 * inner / settings.tp
        passes += f.layers * f.top_k * 4 * shape.hidden
    return 2.0 * passes


def _mixing(a: Attention, settings: Settings) -> _Mixing:
    tp, kv = settings.tp, settings.precision.kv_bits / 8
    split = min(tp, a.kv_heads)  # heads that cannot be split further are copied
    ops = 2.0 * a.heads / tp * a.layers
    return _Mixing(
        window=a.window,
        kv_bytes=a.layers * (a.cache - a.scan) * kv / split,
        scan_bytes=a.layers * a.scan * kv,
        state_bytes=a.layers * 2 * a.state * 2 / tp,
        decode_ops=ops * a.decode_pair,
        prefill_ops=ops * a.pair,
        scan_ops=2.0 * a.scan_pair * a.layers,
    )
