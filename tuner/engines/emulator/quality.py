"""Answers that a quantization damages by a stated amount, so that a check of the answers can itself be checked.

Every context (its last tokens) has a next-token distribution of its own, drawn from a hash: eight candidates and a
thin tail. A damaged server adds noise to the candidates' logits, of a size that makes the expected Kullback-Leibler
divergence to the undamaged one the stated figure: for small noise of variance v on the logits of p, KL is
v / 2 x (1 - sum p^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

CANDIDATES = 8
TAIL = 0.02
_MASK = 2**64 - 1

# Nats per token that the emulator takes each scheme to cost. Stated, not measured: a rehearsal's quality check has
# something to find. Orders of magnitude follow published comparisons of quantized with bfloat16 answers.
STATED_KL: Mapping[str, float] = {
    "fp8": 0.006,
    "w8a8": 0.012,
    "compressed-tensors": 0.012,
    "modelopt": 0.006,
    "awq": 0.045,
    "awq_marlin": 0.045,
    "gptq": 0.05,
    "gptq_marlin": 0.05,
    "bitsandbytes": 0.06,
    "nvfp4": 0.05,
    "modelopt_fp4": 0.05,
    "kv:fp8": 0.003,
    "kv:fp8_e4m3": 0.003,
    "kv:fp8_e5m2": 0.008,
    "kv:int8_per_token_head": 0.002,
    "kv:int4_per_token_head": 0.03,
    "kv:nvfp4": 0.03,
}


def stated_kl(scheme: str, kv_dtype: str, overrides: Mapping[str, float] | None = None) -> float:
    """Expected nats per token between a server with ``scheme`` and ``kv_dtype`` and an undamaged one."""
    table = {**STATED_KL, **(overrides or {})}
    return table.get(scheme, 0.0) + table.get(f"kv:{kv_dtype}", 0.0)


class Answers:
    """Next-token distributions of one model (``seed``, ``vocab``), damaged by ``kl`` nats; ``salt`` names how."""

    def __init__(self, vocab: int, seed: int = 0, kl: float = 0.0, salt: str = "") -> None:
        self.vocab, self.kl = vocab, kl
        self._seed = _mix(seed + 0x5EED)
        self._salt = _mix(sum(ord(c) * 131**i for i, c in enumerate(salt)) & _MASK)

    def context(self, tokens: list[int], end: int | None = None) -> int:
        """The hash of the last four tokens before position ``end``."""
        state = self._seed
        stop = len(tokens) if end is None else end
        for token in tokens[max(stop - 4, 0) : stop]:
            state = _mix(state ^ token)
        return state

    def greedy(self, context: int) -> int:
        """The most likely next token."""
        if not self.kl:
            return _mix(context) % self.vocab
        ids, logits = self._logits(context)
        return ids[max(range(CANDIDATES), key=logits.__getitem__)]

    def top(self, context: int, count: int) -> list[tuple[int, float]]:
        """The ``count`` most likely next tokens with their log-probabilities, the likeliest first."""
        ids, logits = self._logits(context)
        norm = math.log(sum(map(math.exp, logits))) - math.log(1 - TAIL)
        ranked = sorted(zip(ids, logits, strict=True), key=lambda pair: -pair[1])
        found = [(token, logit - norm) for token, logit in ranked]
        filler = (_mix(context + 77 + i) % self.vocab for i in range(count * 3))
        taken = set(ids)
        for token in filler:
            if len(found) >= count:
                break
            if token not in taken:
                taken.add(token)
                found.append((token, self._tail))
        return found[:count]

    def logprob(self, context: int, token: int) -> tuple[float, int]:
        """Log-probability and rank (from 1) of ``token``."""
        for rank, (candidate, value) in enumerate(self.top(context, CANDIDATES), 1):
            if candidate == token:
                return value, rank
        return self._tail, CANDIDATES + 1 + token % 1000

    @property
    def _tail(self) -> float:
        return math.log(TAIL / max(self.vocab - CANDIDATES, 1))

    def _logits(self, context: int) -> tuple[list[int], list[float]]:
        ids, logits, seen, state, value = [], [], set(), context, 0.0
        while len(ids) < CANDIDATES:
            state = _mix(state)
            token = state % self.vocab
            while token in seen:
                token = (token + 1) % self.vocab
            seen.add(token)
            ids.append(token)
            logits.append(value)
            value -= 0.02 - 1.1 * math.log(((state >> 32) + 1) / 2**32)
        if self.kl:
            weights = [math.exp(logit) for logit in logits]
            total = sum(weights)
            spread = 1 - sum((w / total) ** 2 for w in weights)
            # A uniform draw of variance v reaches from -sqrt(3 v) to sqrt(3 v).
            reach = math.sqrt(3 * min(2 * self.kl / ((1 - TAIL) * max(spread, 0.05)), 4.0))
            for index, token in enumerate(ids):
                draw = (_mix(context ^ self._salt ^ token) >> 32) / 2**32
                logits[index] += reach * (2 * draw - 1)
        return ids, logits


def _mix(x: int) -> int:
    """splitmix64: one 64-bit hash of another."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
