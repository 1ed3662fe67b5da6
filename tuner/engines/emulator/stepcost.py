"""How long one engine step takes: the operators of one forward pass, one by one, each bound by compute or memory.

Unlike a closed formula over averages, this is asked anew for every step with the very tokens that the scheduler put
into it. It knows what an average does not: tiles and waves of a GEMM, experts touched by this many tokens, attention
over each sequence's own context, CUDA graphs that end at a batch size, all-reduce latency, the engine's own Python.
"""

from __future__ import annotations

import math

from tuner.engines.emulator.hardware import Gpu
from tuner.engines.emulator.settings import Settings
from tuner.engines.emulator.shape import Shape


class StepCost:
    """Times of one replica's steps, in seconds. Pure; remembers the GEMM times by number of tokens."""

    def __init__(self, shape: Shape, settings: Settings, gpu: Gpu) -> None:
        self.shape, self.s, self.gpu = shape, settings, gpu
        self._dense: dict[tuple[int, int], float] = {}
        s = settings
        self.sharing = s.sharing(shape)
        self.weight_bits = min(s.weight_bits, shape.weight_bits)
        split = 1 if shape.mla else min(s.tp, shape.kv_heads)
        self._kv_bytes = shape.kv_elements / split * s.kv_bits / 8
        # Attention kernels read whole blocks; small ones cost indexing, large ones nothing but fragmentation.
        paging = 0.66 + 0.14 * min(math.log2(max(s.block_size, 8) / 8) / 3, 1.0)
        self._attention_rate = gpu.memory_bytes_per_s * (0.6 if gpu.is_cpu else paging)
        self._attention_flops = gpu.peak(16) * (0.50 if s.kv_bits == 16 else 0.56)

    def seconds(
        self,
        prefill: list[tuple[int, int]],
        decodes: int,
        context: int,
        windowed: int,
        queries: int,
        everywhere: int = 0,
    ) -> float:
        """One step: ``prefill`` has (chunk, context before it) per sequence; ``decodes`` sequences with a summed
        ``context`` (``windowed``: the same with each cut to the sliding window), ``queries`` tokens in all decodes
        (more than one per sequence while speculation verifies), ``everywhere`` tokens on all ranks that share the
        experts (default: as many on each)."""
        chunked = sum(chunk for chunk, _ in prefill)
        tokens = chunked + queries
        sampled = queries + len(prefill)
        graph = not self.s.eager and tokens <= self.s.graph_tokens
        forward = self.dense(tokens, everywhere) + self.attention(prefill, decodes, context, windowed, queries)
        kernels = self.shape.layers * (11 + (5 if self.shape.experts else 0)) + 12
        gaps = kernels * (self.gpu.kernel_s if graph else self.gpu.launch_s)
        # Without a graph the CPU launches while the GPU computes: the slower of the two counts, not the sum.
        forward = forward + gaps if graph else max(forward + kernels * self.gpu.kernel_s, gaps)
        forward += self.head(sampled)
        if self.s.draft and queries:
            forward += self.draft(decodes)
        python = self.gpu.step_s + self.gpu.sequence_s * (decodes + len(prefill)) + 25e-9 * chunked
        if self.s.async_scheduling and not self.s.draft:
            return max(forward + 0.25 * self.gpu.step_s, python) * self.s.pp**0.15
        return (forward + python) * self.s.pp**0.15

    def dense(self, tokens: int, everywhere: int = 0) -> float:
        """All linear layers and all-reduces for ``tokens`` tokens, experts included (see :meth:`seconds`)."""
        everywhere = everywhere or tokens * self.sharing
        known = self._dense.get((tokens, everywhere))
        if known is not None:
            return known
        sh, s = self.shape, self.s
        inner = sh.dense_mlp // (3 * sh.hidden)
        total = sh.layers * self._gemm(tokens, sh.hidden, sh.attention // sh.hidden // s.tp)
        dense_layers = sh.layers - sh.moe_layers
        if dense_layers:
            total += dense_layers * self._gemm(tokens, sh.hidden, 2 * inner // s.tp)
            total += dense_layers * self._gemm(tokens, max(inner // s.tp, 1), sh.hidden)
        if sh.moe_layers:
            total += sh.moe_layers * self._experts(tokens, everywhere)
        exchanges = sh.moe_layers if self.sharing > 1 else 0
        if s.tp > 1:
            total += (2 * sh.layers - exchanges) * self._all_reduce(tokens, s.tp)
        # Ranks that share experts gather the rows of all, and scatter the sums: together what an all-reduce moves.
        total += exchanges * self._all_reduce(everywhere, s.tp * self.sharing)
        self._dense[tokens, everywhere] = total
        return total

    def _gemm(self, m: int, k: int, n: int, share: float = 1.0) -> float:
        """M x K x N on one GPU. A tile is 128 wide; a last wave that is not full costs as much as a full one."""
        gpu = self.gpu
        n = max(n, 1)
        bits = self.s.gemm_bits
        rows = math.ceil(m / 8) * 8 if m < 64 else math.ceil(m / 64) * 64
        tiles = math.ceil(m / 128) * math.ceil(n / 128)
        waves = tiles / gpu.units
        full = waves / math.ceil(waves) if waves > 1 else max(waves, 0.35)
        if gpu.is_cpu:
            full = 1.0
        rate = gpu.peak(bits) * gpu.gemm_share * (0.86 if bits < 16 else 1.0) * share
        if self.weight_bits < bits:  # 4-bit weights are widened on the way: a tenth of the GEMM's speed at large M
            rate *= 0.9
        compute = 2.0 * rows * k * n / (rate * full)
        moved = (k * n * self.weight_bits / 8 + m * (k + n) * 2) / (gpu.memory_bytes_per_s * gpu.memory_share)
        return _corner(compute, moved)

    def _experts(self, tokens: int, everywhere: int) -> float:
        """Router, shared expert and the experts that all ranks' tokens touch (each token picks at random)."""
        sh, s = self.shape, self.s
        split = s.tp * self.sharing
        touched = sh.experts * (1 - (1 - sh.experts_per_token / sh.experts) ** everywhere)
        routed = everywhere * sh.experts_per_token
        rate = self.gpu.peak(s.gemm_bits) * self.gpu.gemm_share * 0.55
        # Rows per expert are padded to the kernel's tile of 16.
        padded = touched * math.ceil(routed / max(touched, 1) / 16) * 16
        compute = 2.0 * max(padded, routed) * sh.expert / split / rate
        moved = touched * sh.expert / split * self.weight_bits / 8 / (self.gpu.memory_bytes_per_s * 0.70)
        shared = self._gemm(tokens, sh.hidden, max(sh.shared // sh.hidden // s.tp, 1)) if sh.shared else 0.0
        return _corner(compute, moved) + shared + 35e-6

    def _all_reduce(self, tokens: int, ranks: int) -> float:
        size = tokens * self.shape.hidden * 2
        return 6e-6 + 1.2e-6 * ranks + 2 * (ranks - 1) / ranks * size / (self.gpu.link_bytes_per_s * 0.7)

    def attention(
        self, prefill: list[tuple[int, int]], decodes: int, context: int, windowed: int, queries: int
    ) -> float:
        """All attention layers: prefill bound by FLOPs, decode by the KV cache's bytes."""
        sh, s = self.shape, self.s
        heads = max(sh.heads // s.tp, 1)
        total = 0.0
        if prefill:
            full = window = 0.0
            for chunk, before in prefill:
                seen = before + chunk / 2
                full += chunk * seen
                window += chunk * min(seen, sh.window) if sh.window else 0.0
            flops = 4.0 * heads * sh.head_dim * (sh.full_layers * full + sh.window_layers * window)
            flops += 4.0 * heads * sh.head_dim * sh.head_dim * sh.linear_layers * sum(c for c, _ in prefill)
            total += flops / self._attention_flops
        if decodes:
            read = (sh.full_layers * context + sh.window_layers * windowed) * self._kv_bytes
            widen = 1.12 if s.kv_bits < 16 else 1.0  # FP8 KV is widened in the kernel
            total += read * widen / self._attention_rate
            state = sh.linear_layers * decodes * heads * sh.head_dim * sh.head_dim * 4
            total += state / (self.gpu.memory_bytes_per_s * 0.6)
            # Verifying several tokens per sequence re-uses the KV read, but pays its FLOPs.
            total += (
                4.0 * heads * sh.head_dim * sh.full_layers * context * (queries / decodes - 1) / self._attention_flops
            )
        return total

    def head(self, sampled: int) -> float:
        """Output projection and sampler for ``sampled`` positions."""
        sh = self.shape
        moved = (sh.head * 2 / self.s.tp + sampled * sh.vocab * 10) / (
            self.gpu.memory_bytes_per_s * self.gpu.memory_share
        )
        return max(moved, 2.0 * sampled * sh.head / self.s.tp / (self.gpu.peak(16) * 0.5)) + 60e-6

    def draft(self, sequences: int) -> float:
        """Drafting ``draft.tokens`` tokens for each of ``sequences``, one pass after the other."""
        draft = self.s.draft
        if draft is None:
            return 0.0
        if draft.cost == 0.0:
            return 0.15e-3 + 22e-6 * sequences  # n-gram lookup on the CPU
        one_pass = self.dense(max(sequences, 1)) * draft.cost + self.head(sequences) * 0.5 + 90e-6
        return draft.tokens * one_pass


def _corner(compute: float, moved: float) -> float:
    """A roofline with a soft corner: near the ridge a kernel reaches neither limit."""
    return (compute**4 + moved**4) ** 0.25
