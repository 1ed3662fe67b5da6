"""Quality: does this server still give the unquantized baseline's answers? Asked on the launch that is measured anyway.

The baseline's log-probabilities on fixed sequences are kept as a :class:`Profile` in the study folder; a server whose
parameters can change the answers scores the same sequences. docs/statistics.md says what the figures mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from tuner.engines.protocol import Endpoint
from tuner.spec.objective import QualityFloor
from tuner.verify.completions import Completions, Scores, Unanswered
from tuner.verify.statistics import Estimate, mean

RANDOM_WEIGHTS = (
    "the weights are random: the check ran and compares the arithmetic of both servers, but says nothing about the "
    "quality of a trained model's answers"
)

BROKEN = "it gives log-probabilities that are no finite numbers"


@dataclass(frozen=True, slots=True)
class Probe:
    """One sequence: its tokens, of which the first ``given`` are the prompt and the rest was drawn from the baseline at
    temperature 1; the baseline's scores of it; its greedy continuation of the prompt."""

    tokens: tuple[int, ...]
    given: int
    scores: Scores
    greedy: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """What the baseline answers. ``config`` is the baseline's hash, ``own_text`` whether the prompts are the user's.
    ``noise`` are the figures of the baseline against itself (batching and kernels are not deterministic): no floor
    can be stricter than that. ``unaltered`` is False in a file that does not say it: drawn and continued as the model's
    generation_config.json wants, so that only the latter is comparable, asked for in the same way."""

    model: str
    config: str
    sequences: tuple[Probe, ...]
    own_text: bool = False
    noise: Mapping[str, float] | None = None
    unaltered: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        sequences = tuple(
            Probe(tuple(s["tokens"]), s["given"], Scores.from_dict(s["scores"]), tuple(s["greedy"]))
            for s in data["sequences"]
        )
        return cls(**{**data, "sequences": sequences})


@dataclass(frozen=True, slots=True)
class QualityResult:
    """``kl`` in nats per token: the divergence of this server from the baseline over the tokens that both list plus one
    bucket for all others. Merging tokens can only lower a divergence, so it is at most the true one; ``covered`` is the
    probability that lies outside the bucket (near 1: ``kl`` is nearly exact). ``kl_drawn`` is the mean of
    ``log p - log q`` of tokens drawn from the baseline: unbiased, but noisy; ``kl_drawn_error`` is its standard error.
    ``top1`` is the share of positions with the same most probable token, ``greedy`` how far greedy continuations
    agree before they part. ``verdict`` is ``passed``, ``failed`` or ``unknown``; ``reason`` says why, with figures.
    """

    kl: float
    covered: float
    kl_drawn: float
    kl_drawn_error: float
    top1: float
    greedy: float
    verdict: str
    reason: str
    tokens: int = 0


def profile(
    endpoint: Endpoint,
    config_hash: str = "",
    prompts: Sequence[str] = (),
    *,
    seed: int = 0,
    count: int = 16,
    drawn: int = 64,
    greedy: int = 32,
    timeout_s: float = 120.0,
) -> Profile:
    """Asks the baseline's server. ``prompts`` are the user's own (a seeded choice of ``count`` is taken); without them
    the fixed texts are used. Raises :class:`Unanswered` where the server gives no prompt log-probabilities, or none
    that are numbers."""
    own = len(prompts) > 0
    texts = list(prompts) if own else _texts()
    picked = np.random.default_rng(seed).permutation(len(texts))[:count]
    server = Completions(endpoint, timeout_s)
    sequences = []
    for number, i in enumerate(picked):
        tokens, given = server.draw(texts[int(i)], drawn, seed=seed * 1000 + number)
        sequences.append(Probe(tokens, given, server.score(tokens), server.greedy(tokens[:given], greedy, seed=seed)))
        if not sequences[-1].scores.finite:
            raise Unanswered(BROKEN)
    made = Profile(endpoint.model, config_hash, tuple(sequences), own, unaltered=True)
    again = check(endpoint, made, QualityFloor(), timeout_s=timeout_s)
    return replace(made, noise={"kl": again.kl, "top1": again.top1, "greedy": again.greedy})


def check(
    endpoint: Endpoint,
    base: Profile,
    floor: QualityFloor,
    *,
    random_weights: bool = False,
    timeout_s: float = 120.0,
) -> QualityResult:
    """Scores the profile's sequences on the server at ``endpoint`` and compares."""
    server = Completions(endpoint, timeout_s, unaltered=base.unaltered)
    kls: list[float] = []
    covered: list[float] = []
    same: list[bool] = []
    drawn: list[float] = []
    agreed: list[float] = []
    try:
        for sequence in base.sequences:
            if not sequence.scores.finite:  # a profile of earlier versions
                raise Unanswered(f"of the default, {BROKEN}")
            scores = server.score(sequence.tokens)
            if not scores.finite:
                return QualityResult(*[math.nan] * 6, verdict="failed", reason=BROKEN)
            for p, q in zip(sequence.scores.tops, scores.tops, strict=True):
                kl, mass = divergence(p, q)
                kls.append(kl)
                covered.append(mass)
                same.append(max(p, key=lambda t: p[t]) == max(q, key=lambda t: q[t]))
            # of one sequence a single figure: its tokens depend on each other
            own = np.array(sequence.scores.tokens[sequence.given - 1 :])
            if len(own) and base.unaltered:
                drawn.append(float(np.mean(own - np.array(scores.tokens[sequence.given - 1 :]))))
            agreed.append(
                _agreement(sequence.greedy, server.greedy(sequence.tokens[: sequence.given], len(sequence.greedy)))
            )
        if not kls:
            raise Unanswered("the default's have no token to compare")
    except Unanswered as failure:
        reason = f"the answers could not be compared: {failure}"
        return QualityResult(*[math.nan] * 6, verdict="unknown", reason=reason)
    gap = mean(drawn) if drawn else Estimate(math.nan, ())
    figures = (float(np.mean(kls)), float(np.mean(covered)), gap, float(np.mean(same)), float(np.mean(agreed)))
    verdict, reason = _judge(*figures, floor, base, random_weights)
    kl, mass, gap, top1, greedy = figures
    return QualityResult(kl, mass, gap.mean, gap.error, top1, greedy, verdict, reason, len(kls))


def _texts() -> list[str]:
    """The fixed texts: short, mixed in kind and language."""
    return resources.files("tuner.verify").joinpath("texts.txt").read_text("utf-8").rstrip("\n").split("\n-----\n")


def divergence(p: Mapping[int, float], q: Mapping[int, float]) -> tuple[float, float]:
    """KL(p || q) in nats from two lists of log-probabilities of the most probable tokens, and the probability (under p)
    of the tokens in both lists: ``sum p log(p / q)`` over those, and one term for all other tokens together. By the
    data-processing inequality (Cover and Thomas, Elements of Information Theory, 2nd ed., section 2.8 and problem
    2.33) this is at most the divergence of the full distributions."""
    both = p.keys() & q.keys()
    total, p_mass, q_mass = 0.0, 0.0, 0.0
    for token in both:
        share = math.exp(p[token])
        total += share * (p[token] - q[token])
        p_mass, q_mass = p_mass + share, q_mass + math.exp(q[token])
    p_rest, q_rest = max(1 - p_mass, 0.0), max(1 - q_mass, 1e-12)
    if p_rest > 0:
        total += p_rest * math.log(p_rest / q_rest)
    return max(total, 0.0), min(p_mass, 1.0)


def _agreement(expected: Sequence[int], found: Sequence[int]) -> float:
    """The share of ``expected`` before the first difference."""
    if not expected:
        return 1.0
    same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    return min(same, len(expected)) / len(expected)


def _judge(
    kl: float,
    covered: float,
    gap: Estimate,
    top1: float,
    greedy: float,
    floor: QualityFloor,
    base: Profile,
    random_weights: bool,
) -> tuple[str, str]:
    """The verdict and its reason. The drawn divergence refuses only where its lower 95 % limit is above the floor."""
    below = []
    sure = gap.between(0.05, 0.05)[0]
    if floor.kl_max is not None and kl > floor.kl_max:
        below.append(f"KL divergence at least {kl:.3g} nats per token > {floor.kl_max:g}")
    elif floor.kl_max is not None and sure > floor.kl_max:
        below.append(f"KL divergence {gap.mean:.3g} nats per token (at least {sure:.3g}) > {floor.kl_max:g}")
    if floor.top1_min is not None and top1 < floor.top1_min:
        below.append(f"the most probable token agrees at {top1 * 100:.1f} % of positions < {floor.top1_min * 100:g} %")
    if floor.greedy_min is not None and greedy < floor.greedy_min:
        below.append(f"greedy answers agree for {greedy * 100:.1f} % of their length < {floor.greedy_min * 100:g} %")
    words = "; ".join(below) or (
        f"KL divergence {kl:.3g} nats per token, most probable token the same at {top1 * 100:.1f} % of positions, "
        f"greedy answers the same for {greedy * 100:.1f} % of their length"
    )
    if covered < 0.5:
        words += (
            f"; the listed tokens hold only {covered * 100:.0f} % of the probability, so the KL is a weak lower bound"
        )
    noise = base.noise or {}
    if below and noise.get("greedy", 1.0) < (floor.greedy_min or 0.0):
        words += f"; the baseline itself repeats its greedy answers for only {noise['greedy'] * 100:.0f} %"
    if random_weights:
        words += f"; {RANDOM_WEIGHTS}"
    return ("failed" if below else "passed"), words
