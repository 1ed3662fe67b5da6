"""The search space: which serving parameters may vary, over which values, under which conditions and rules."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuner.space.condition import Condition, holds, meant, named
from tuner.space.config import ServingConfig, Value, number, readable, same

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Flags that are numbers of GPUs, as vLLM and SGLang name them.
TENSOR, PIPELINE, DATA = ((f"{n}-parallel-size", f"{n[0]}p-size", f"{n[0]}p") for n in ("tensor", "pipeline", "data"))
SIZES = (*TENSOR, *PIPELINE, *DATA, "prefill-context-parallel-size")
SHARED = "enable-dp-attention"  # SGLang's data-parallel ranks share the GPUs; what 0.5.23 calls that:
ATTENTION = ("attn-dp-size", "attention-data-parallel-size")


@dataclass(frozen=True, slots=True)
class Emission:
    """What one value of a parameter adds to the server: flags (``speculative-config.method`` is a key inside the JSON
    value of ``--speculative-config``), environment, a variant of the model folder, and the type of GPU it runs on."""

    flags: Mapping[str, Value | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    model_variant: str = ""
    gpu: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One knob: it knows its grid, its default, its neighbours and its flags.

    ``values`` is the whole grid, in order. ``numeric`` grids have a distance (``log`` says in logarithms), others are
    categories. At its ``default`` a parameter adds no flag: the engine's own default is the baseline. ``when`` says
    under which other parameters it applies at all. ``alters_answers`` marks what can change the model's output (the
    quality floor is checked). ``counts_gpus``: its value is the number of GPUs of one replica. ``always``: the flag
    is passed at the default too, because the engine has none of its own. ``like``: what an engine calls what this is,
    for the search to expect its effect.
    """

    name: str
    values: tuple[Value, ...]
    emissions: tuple[Emission, ...]
    default: Value
    numeric: bool = False
    log: bool = False
    when: Condition = field(default_factory=dict)
    trades: str = ""
    alters_answers: bool = False
    counts_gpus: bool = False
    always: bool = False
    like: str = field(default="", repr=False)  # by what it looks like, two studies are the same with it and without

    def snap(self, value: Value) -> Value:
        """The grid value nearest to ``value`` (in logarithms on a log grid); raises ``ValueError`` for a category
        that is not in the grid."""
        for known in self.values:
            if same(known, value):
                return known
        if not self.numeric or isinstance(value, (bool, str)):
            raise ValueError(f"{self.name} has no value {value!r}; it has {', '.join(map(str, self.values))}")
        scale = (lambda v: math.log(max(float(v), 1e-9))) if self.log else float
        return min(self.values, key=lambda known: abs(scale(known) - scale(value)))

    def position(self, value: Value) -> float:
        """Where ``value`` lies on the grid, 0 to 1 (by value for numbers, by index for categories)."""
        if not self.numeric:
            return self.values.index(value) / max(len(self.values) - 1, 1)
        scale = (lambda v: math.log(max(float(v), 1e-9))) if self.log else float
        low, high = scale(min(self.values)), scale(max(self.values))
        return (scale(value) - low) / (high - low) if high > low else 0.0

    def emission(self, value: Value) -> Emission:
        """What ``value`` adds to the server; nothing at the default (unless ``always``)."""
        if not self.always and value == self.default and isinstance(value, bool) == isinstance(self.default, bool):
            return Emission()
        return self.emissions[self.values.index(value)]


@dataclass(frozen=True, slots=True)
class Rule:
    """A combination that is known not to work: where ``deny`` holds, ``because`` is the reason."""

    deny: Condition
    because: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Parameters, rules and the facts (of machine, model and trace) that conditions may name.

    ``fixed`` flags and ``env`` go to every server of the study, the baseline included; so do ``gpus`` (0 on a CPU
    server), ``variant`` and ``gpu`` where no parameter says otherwise. ``joined`` are the flags whose parts
    (``speculative-config.method``), whoever gives them, become one JSON value; ``typed`` the fixed parts whose text is
    text, as a parameter's is; ``reads``: of the others the engine reads it as vLLM does. ``sized`` are the flags whose
    value is a number of GPUs that no parameter counts.
    """

    name: str
    engine: str
    parameters: tuple[Parameter, ...]
    rules: tuple[Rule, ...] = ()
    checked_with: tuple[str, ...] = ()
    fixed: Mapping[str, Value | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1
    variant: str = ""
    gpu: str = ""
    joined: frozenset[str] = frozenset()
    typed: frozenset[str] = frozenset()
    reads: bool = False
    sized: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)

    def size(self) -> int:
        """How many combinations the full grid has, conditions and rules not counted."""
        return math.prod(len(p.values) for p in self.parameters)

    def default(self) -> dict[str, Value]:
        """Every parameter at its default: the baseline, which is launched with none of the space's flags."""
        return {p.name: p.default for p in self.parameters}

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every combination, in order; conditional parameters that do not apply are left at their default, so that no
        server comes twice."""
        for combination in itertools.product(*(p.values for p in self.parameters)):
            params = dict(zip((p.name for p in self.parameters), combination, strict=True))
            active = self.active(params)
            idle = [p for p in self.parameters if p.name not in active]
            if all(params[p.name] == (p.default if p.default in p.values else p.values[0]) for p in idle):
                yield params | {p.name: p.default for p in idle}

    def active(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """The parameters that apply: those whose ``when`` holds, given the others that apply."""
        applied: dict[str, Value] = {}
        waiting = list(self.parameters)
        while waiting:
            ready = [p for p in waiting if not p.when or holds(p.when, {**self.facts, **applied})]
            if not ready:
                break
            applied |= {p.name: params[p.name] for p in ready}
            waiting = [p for p in waiting if p.name not in applied]
        return {p.name: applied[p.name] for p in self.parameters if p.name in applied}

    def snap(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """``params`` on the grid, absent ones at their default, those that do not apply set to their default."""
        full = {p.name: p.snap(params.get(p.name, p.default)) for p in self.parameters}
        active = self.active(full)
        return {p.name: active.get(p.name, p.default) for p in self.parameters}

    def denied(self, params: Mapping[str, Value]) -> str:
        """Why this combination is known not to work; empty where no rule speaks against it."""
        return next((rule.because for rule in self.denying(params)), "")

    def denying(self, params: Mapping[str, Value]) -> Iterator[Rule]:
        """Every rule that speaks against this combination."""
        known = {**self.facts, **self.active(params)}
        return (rule for rule in self.rules if holds(rule.deny, known))

    def config(self, params: Mapping[str, Value], model: str) -> ServingConfig:
        """The serving config of ``params`` (snapped first)."""
        active = self.active(self.snap(params))
        # a fixed flag may name a fact, too, and so does a pinned parameter's; what is no fact is meant as it stands
        flags: dict[str, Value | None] = {flag: self.facts.get(named(v), v) for flag, v in self.fixed.items()}
        env, variant, gpu = dict(self.env), self.variant, self.gpu
        gpus = 0 if self.facts.get("platform") == "cpu" else self.gpus
        nested: dict[str, dict[str, Any]] = {}
        typed = set(self.typed)
        for name, value in active.items():
            parameter = self[name]
            emission = parameter.emission(value)
            for flag, setting in emission.flags.items():
                setting = meant(setting, self.facts)
                head, dot, tail = flag.partition(".")
                if dot and head not in self.joined:
                    nested.setdefault(head, {})[tail] = setting
                else:
                    flags[flag] = setting
                    typed.add(flag)
            env |= emission.env
            variant, gpu = emission.model_variant or variant, emission.gpu or gpu
            if parameter.counts_gpus:
                gpus = max(gpus, 1) * int(value)
        for head, body in nested.items():
            flags[head] = json.dumps(body, sort_keys=True)
        for flag in self.sized if gpus else ():
            if SHARED not in flags or flag not in DATA:
                gpus *= max(int(number(flags.get(flag)) or 1), 1)
        flags = join(flags, self.joined, typed, self.reads)
        return ServingConfig(model, active, flags, env, variant, gpus, gpu)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The flat Optuna space: every parameter always (conditional ones are ignored where they do not apply, since
        a space that changes from trial to trial drops them from the model-based samplers)."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        space: dict[str, BaseDistribution] = {}
        for p in self.parameters:
            numbers = [v for v in p.values if not isinstance(v, (bool, str))]
            if not p.numeric or len(numbers) < 2:
                space[p.name] = CategoricalDistribution(p.values)
            elif all(isinstance(v, int) for v in numbers):
                space[p.name] = IntDistribution(int(min(numbers)), int(max(numbers)), log=p.log and min(numbers) > 0)
            else:
                low = float(min(numbers))
                space[p.name] = FloatDistribution(low, float(max(numbers)), log=p.log and low > 0)
        return space


def heads(flags: Iterable[str]) -> frozenset[str]:
    """The flags of whose JSON value there are parts among ``flags``."""
    return frozenset(flag.partition(".")[0] for flag in flags if "." in flag)


_SWITCH: Mapping[Value | None, Value] = {None: True, "true": True, "false": False}  # as a part of JSON


def join(
    flags: Mapping[str, Value | None], heads: Collection[str], typed: Collection[str] = (), reads: bool = True
) -> dict[str, Any]:
    """``flags`` with the parts of each of ``heads`` in one JSON value; what is given whole is the rest of it. What vLLM
    ``reads`` are words of a command line: text may mean a number, but that of a ``typed`` flag, and ``name+`` a list.
    """
    rest, bodies = dict(flags), dict[str, dict[str, Any]]()
    for flag, value in flags.items():
        head, dot, tail = flag.partition(".")
        if not dot or head not in heads:
            continue
        if head not in bodies:
            bodies[head] = _mapping(rest.pop(head, None))
        del rest[flag]
        *path, last = tail.split(".")
        body = bodies[head]
        for key in path:
            if not isinstance(body.get(key), dict):
                body[key] = {}
            body = body[key]
        if reads and last.endswith("+"):
            body[last[:-1]] = str(value).split(",")
        else:
            body[last] = _part(value) if reads and flag not in typed else _SWITCH.get(value, value)
    return rest | {head: json.dumps(body, sort_keys=True) for head, body in bodies.items()}


def _mapping(whole: Any) -> dict[str, Any]:
    body = _part(whole)
    return dict(body) if isinstance(body, dict) else {}


def _part(value: Any) -> Any:
    """What vLLM makes of ``value`` after ``--flag.part``."""
    value = _SWITCH.get(value, value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    return int(readable(value)) if re.fullmatch(r"\d+(\.\d+)?[kmgtKMGT]", value) else value
