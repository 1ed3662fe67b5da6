"""A search space file -> :class:`SearchSpace`, for the machine, model and trace at hand (the facts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tuner.space import condition
from tuner.space.config import Value
from tuner.space.space import Emission, Parameter, Rule, SearchSpace
from tuner.spec.facts import FACTS
from tuner.spec.text import Document, Strict, suggest, validate

Scalar = bool | int | float | str


class EmissionFile(Strict):
    flags: dict[str, bool | int | float | str | None] = {}
    env: dict[str, str | int] = {}
    model_variant: str = ""
    gpu: str = ""  # the type of GPU it runs on, on a cluster that has several
    requires: str = ""


class DefaultCase(Strict):
    value: Scalar
    when: dict[str, Any] = {}


class ParameterFile(Strict):
    flag: str = ""
    type: Literal["", "switch"] = ""
    values: list[Scalar] | dict[str, EmissionFile | None] | None = None
    range: list[float | int] | None = None
    scale: Literal["linear", "log2"] = "linear"
    step: float | int | None = None
    default: Scalar | list[DefaultCase]
    only: dict[str, Any] = {}
    when: dict[str, Any] = {}
    trades: str = ""
    alters_answers: bool = False
    counts_gpus: bool = False
    always: bool = False


class RuleFile(Strict):
    deny: dict[str, Any]
    because: str
    name: str = ""


class SpaceFile(Strict):
    name: str = ""
    engine: str = "vllm"
    checked_with: list[str] = []
    fixed: dict[str, bool | int | float | str | None] = {}
    env: dict[str, str | int] = {}
    parameters: dict[str, ParameterFile]
    rules: list[RuleFile] = []


def build(
    document: Document, facts: Mapping[str, Any], limits: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> SearchSpace:
    """The space of ``document`` (its part at ``prefix``), narrowed by ``limits`` (parameter -> value or values).

    Raises UsageError with file:line for whatever cannot be meant.
    """
    data: Any = document.data
    for key in prefix:
        data = data[key]
    file = validate(SpaceFile, document, data, prefix)
    facts = dict(facts)
    fixed, env = _flags(file.fixed), {key: str(value) for key, value in file.env.items()}
    parameters = []
    for name, spec in file.parameters.items():
        at = (*prefix, "parameters", name)
        if file.engine == "function" and not spec.flag and not isinstance(spec.values, dict):
            spec = spec.model_copy(update={"flag": name})  # a function has no flags: names tell configs apart
        parameter = _parameter(name, spec, document, at, facts)
        if name in limits:
            parameter = _narrow(parameter, limits[name], document)
        if name in limits and len(parameter.values) == 1:
            # pinned: every server of the study gets it, the baseline included, and conditions see it as a fact
            emission = parameter.emissions[0]
            fixed, env = {**fixed, **emission.flags}, {**env, **emission.env}
            facts[name] = parameter.values[0]
        else:
            parameters.append(parameter)
    unknown = set(limits) - set(file.parameters)
    if unknown:
        worst = sorted(unknown)[0]
        raise document.error(f"unknown parameter {worst!r}", ("parameters", worst), suggest(worst, file.parameters))
    known = set(file.parameters) | set(facts)
    for name, spec in file.parameters.items():
        _check_condition(spec.when, known, document, (*prefix, "parameters", name, "when"))
    rules = []
    for index, rule in enumerate(file.rules):
        _check_condition(rule.deny, known, document, (*prefix, "rules", index, "deny"))
        rules.append(Rule(rule.deny, rule.because, rule.name))
    return SearchSpace(
        name=file.name,
        engine=file.engine,
        parameters=tuple(parameters),
        rules=tuple(rules),
        checked_with=tuple(file.checked_with),
        fixed=fixed,
        env=env,
        facts=facts,
    )


def _check_condition(spec: Mapping[str, Any], known: set[str], document: Document, at: tuple[str | int, ...]) -> None:
    for problem in condition.problems(spec):
        raise document.error(problem, at)
    for name in sorted(condition.names(spec) - known):
        # facts that this machine does not have (a CPU has no compute capability) make a condition false, not wrong
        if name not in FACTS:
            raise document.error(
                f"{name!r} is neither a parameter nor a known fact", at, suggest(name, known | set(FACTS))
            )


def _parameter(
    name: str, spec: ParameterFile, document: Document, at: tuple[str, ...], facts: Mapping[str, Any]
) -> Parameter:
    values, emissions = _grid(name, spec, document, at, facts)
    default = spec.default
    if isinstance(default, list):
        default = next((c.value for c in default if condition.holds(c.when, facts)), None)
        if default is None:
            raise document.error(
                f"{name}: no case of its default applies here", (*at, "default"), "add a last case without when"
            )
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if default not in values:
        if not numeric or isinstance(default, (bool, str)):
            fix = suggest(str(default), map(str, values))
            raise document.error(f"{name}: the default {default!r} is not one of its values", (*at, "default"), fix)
        # the engine's own default belongs to every grid: it is the baseline
        values, emissions = (*values, default), (*emissions, _emit(spec.flag, default))
    if numeric:  # a neighbour is one step away, and the ends are the least and the most
        pairs = sorted(zip(values, emissions, strict=True), key=lambda p: p[0])
        values, emissions = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    return Parameter(
        name=name,
        values=values,
        emissions=emissions,
        default=default,
        numeric=numeric,
        log=numeric and spec.scale == "log2",
        when=spec.when,
        trades=spec.trades,
        alters_answers=spec.alters_answers,
        counts_gpus=spec.counts_gpus,
        always=spec.always,
    )


def _grid(
    name: str, spec: ParameterFile, document: Document, at: tuple[str, ...], facts: Mapping[str, Any]
) -> tuple[tuple[Value, ...], tuple[Emission, ...]]:
    if isinstance(spec.values, dict):
        keep = {
            k: e or EmissionFile() for k, e in spec.values.items() if not e or not e.requires or facts.get(e.requires)
        }
        values: list[Value] = [_scalar(key) for key in keep]
        emissions = [
            Emission(_flags(e.flags), {k: str(v) for k, v in e.env.items()}, e.model_variant, e.gpu)
            for e in keep.values()
        ]
    else:
        if spec.type == "switch":
            if not spec.flag:
                raise document.error(f"{name}: a switch needs its flag", at, "write flag: enable-prefix-caching")
            values = [True, False]
        elif spec.values is not None:
            values = list(spec.values)
        elif spec.range is not None:
            values = _range(name, spec, document, at)
        else:
            raise document.error(f"{name} has neither values nor a range", at, "add values: [..] or range: [low, high]")
        if not spec.flag:
            raise document.error(
                f"{name} has no flag", at, "write flag: max-num-seqs, or values with flags of their own"
            )
        emissions = [_emit(spec.flag, value) for value in values]
    if len(set(map(repr, values))) < len(values):
        raise document.error(f"{name} lists a value twice", (*at, "values"))
    pairs = [
        pair
        for pair in zip(values, emissions, strict=True)
        if condition.holds({"value": spec.only}, {**facts, "value": pair[0]})
    ]
    if not pairs:
        raise document.error(
            f"{name} has no value left on this machine", at, f"only: {spec.only} excludes all of {values}"
        )
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _range(name: str, spec: ParameterFile, document: Document, at: tuple[str, ...]) -> list[Value]:
    at = (*at, "range")
    if spec.range is None or len(spec.range) != 2:
        raise document.error(f"{name}: a range is [low, high]", at)
    low, high = spec.range
    if low > high:
        raise document.error(f"{name}: the range starts at {low} and ends at {high}", at, "write [low, high]")
    values: list[Value] = []
    if spec.scale == "log2":
        if low <= 0:
            raise document.error(f"{name}: a log2 range starts above zero, not at {low}", at)
        value: float = low
        while value <= high:
            values.append(int(value) if float(value).is_integer() else value)
            value *= 2
        return values
    step = spec.step if spec.step is not None else 1
    if step <= 0:
        raise document.error(f"{name}: the step must be above zero, not {step}", at)
    count = int((high - low) / step + 1e-9) + 1
    if count > 10_000:
        raise document.error(
            f"{name}: {count} values are too many for one parameter", at, "use a larger step or scale: log2"
        )
    exact = [round(low + i * step, 10) for i in range(count)]
    return [int(v) if isinstance(low, int) and isinstance(step, int) else v for v in exact]


def _emit(flag: str, value: Value) -> Emission:
    if isinstance(value, bool):
        return Emission({flag if value else f"no-{flag}": None})
    return Emission({flag: value})


def _flags(flags: Mapping[str, Any]) -> dict[str, Value | None]:
    """``true`` is a switch without a value; ``false`` leaves the flag out."""
    return {name.lstrip("-"): None if value is True else value for name, value in flags.items() if value is not False}


def _scalar(key: str) -> Value:
    for kind in (int, float):
        try:
            return kind(key)
        except ValueError:
            continue
    return key


def _narrow(parameter: Parameter, limit: Any, document: Document) -> Parameter:
    wanted = limit if isinstance(limit, list) else [limit]
    at = ("parameters", parameter.name)
    for value in wanted:
        if value not in parameter.values and (not parameter.numeric or isinstance(value, (bool, str))):
            raise document.error(
                f"{parameter.name} has no value {value!r}", at, suggest(str(value), map(str, parameter.values))
            )
    chosen = [v for v in parameter.values if v in wanted]
    pairs = [(v, parameter.emissions[parameter.values.index(v)]) for v in chosen]
    flag = next((next(iter(e.flags)) for e in parameter.emissions if e.flags), parameter.name)
    pairs += [(v, _emit(flag, v)) for v in wanted if v not in parameter.values]
    if len(wanted) > 1 and parameter.default not in wanted:
        pairs.append((parameter.default, parameter.emissions[parameter.values.index(parameter.default)]))
    if parameter.numeric:
        pairs.sort(key=lambda pair: pair[0])
    return replace(parameter, values=tuple(p[0] for p in pairs), emissions=tuple(p[1] for p in pairs))
