"""A search space file -> :class:`SearchSpace`, for the machine, model and trace at hand (the facts)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from tuner.space import condition
from tuner.space.config import Value, same
from tuner.space.space import SIZES, Emission, Parameter, Rule, SearchSpace, heads
from tuner.spec.facts import FACTS, WORDS
from tuner.spec.study import COUNTED, USERS
from tuner.spec.text import NUMERIC, TEXT, Document, Strict, check_env, check_flags, suggest, twice, validate

Scalar = bool | int | float | str
Number = Annotated[float | int, NUMERIC]
Word = Annotated[str | int, TEXT]
MOST_VALUES = 10_000
KINDS = {float: "a number", bool: "true or false", str: "text"}
NO_SWITCH = "false adds no flag, and the engine's own default would be measured"


class EmissionFile(Strict):
    flags: dict[str, bool | int | float | str | None] = {}
    env: dict[str, Word] = {}
    model_variant: str = ""
    gpu: str = ""  # the type of GPU it runs on, on a cluster that has several
    requires: str = ""


class DefaultCase(Strict):
    value: Scalar
    when: dict[str, Any] = {}
    always: bool = False  # the engine's own default is another: the flag is given


class ParameterFile(Strict):
    flag: str = ""
    type: Literal["", "switch"] = ""
    values: list[Scalar] | dict[str, EmissionFile | None] | None = None
    range: list[Number] | None = None
    scale: Literal["linear", "log2"] = "linear"
    step: Number | None = None
    default: Scalar | list[DefaultCase]
    only: dict[str, Any] = {}
    when: dict[str, Any] = {}
    trades: str = ""
    alters_answers: bool = False
    counts_gpus: bool = False
    always: bool = False
    like: str = ""


class RuleFile(Strict):
    deny: dict[str, Any]
    because: str
    name: str = ""


class SpaceFile(Strict):
    name: str = ""
    engine: str = ""  # whose flags they are; unsaid: the study's engine's where that is command or own, else vllm
    checked_with: list[str] = []
    fixed: dict[str, bool | int | float | str | None] = {}
    env: dict[str, Word] = {}
    parameters: dict[str, ParameterFile]
    rules: list[RuleFile] = []


def build(
    data: Mapping[str, Any],
    document: Document,
    prefix: tuple[str, ...],
    facts: Mapping[str, Any],
    limits: Mapping[str, Any],
    study: Document,
) -> SearchSpace:
    """The space of ``data``, which stands in ``document`` at ``prefix``, narrowed by the ``limits`` (parameter -> value
    or values) of ``study``. Raises UsageError with file:line for whatever cannot be meant."""
    file = validate(SpaceFile, document, data, prefix)
    if not file.engine:
        kind = study.data.get("engine", {}).get("kind")
        file = file.model_copy(update={"engine": kind if kind in USERS else "vllm"})
    if file.engine == "function":  # it has no flags: names tell configs apart
        named = {
            name: spec if spec.flag or isinstance(spec.values, dict) else spec.model_copy(update={"flag": name})
            for name, spec in file.parameters.items()
        }
        file = file.model_copy(update={"parameters": named})
    facts = dict(facts)
    pins: list[str] = []
    fixed, env = _flags(file.fixed), {key: str(value) for key, value in file.env.items()}
    known = set(file.parameters) | set(facts)
    parameters: list[Parameter] = []
    for name, spec in file.parameters.items():
        at = (*prefix, "parameters", name)
        _check_condition({"value": spec.only}, known | {"value"}, document, (*at, "only"))
        for when, place in _whens(spec, at):
            _check_condition(when, known, document, place)
        parameter = _parameter(name, spec, document, at, facts)
        if name in limits:
            parameter = _narrow(parameter, limits[name], study)
        if name in limits and len(parameter.values) == 1:
            pins.append(name)
            counts = parameter.counts_gpus and facts.get("platform") != "cpu"
            parameter = replace(parameter, default=parameter.values[0], always=True, counts_gpus=counts)
            if not parameter.when or as_before(study):
                facts[name] = parameter.values[0]
        parameters.append(parameter)
    tuned, pinned = parameters, []
    if as_before(study):
        tuned, pinned = [p for p in parameters if p.name not in pins], [p for p in parameters if p.name in pins]
    elif "function" not in (file.engine, study.data.get("engine", {}).get("kind")):  # it is asked with every parameter
        tuned, pinned = _settled(parameters, pins, facts)
    given = [p.emissions[0] for p in pinned]
    for emission in given:
        fixed, env = {**fixed, **emission.flags}, {**env, **emission.env}
    grids = {
        name: _ever(_values(name, spec, document, (*prefix, "parameters", name)), spec, limits.get(name, []), facts)
        for name, spec in file.parameters.items()
    }
    unknown = set(limits) - set(file.parameters)
    if unknown:
        worst = sorted(unknown)[0]
        raise study.error(f"unknown parameter {worst!r}", ("parameters", worst), suggest(worst, file.parameters))
    _check_flags(file.fixed, facts, document, (*prefix, "fixed"), file.engine)
    check_env(file.env, document, (*prefix, "env"))
    for name, spec in file.parameters.items():
        at = (*prefix, "parameters", name)
        _check_facts(spec, facts, document, (*at, "values"), file.engine)
        _check_operands({"value": spec.only}, {"value": grids[name]}, {}, document, (*at, "only"))
        for when, place in _whens(spec, at):
            _check_operands(when, grids, facts, document, place)
        if _waits_for(name, name, file, set()):
            document.refuse(f"{name} applies only where {name} does: nothing ever makes it apply", (*at, "when"))
    rules = []
    for index, rule in enumerate(file.rules):
        at = (*prefix, "rules", index, "deny")
        _check_condition(rule.deny, known, document, at)
        _check_operands(rule.deny, grids, facts, document, at)
        rules.append(Rule(rule.deny, rule.because, rule.name))
    space = SearchSpace(
        name=file.name,
        engine=file.engine,
        parameters=tuple(tuned),
        rules=tuple(rules),
        checked_with=tuple(file.checked_with),
        fixed=fixed,
        env=env,
        facts=facts,
    )
    if as_before(study):
        return space
    sized = () if facts.get("platform") == "cpu" else _sized([p for p in parameters if p.counts_gpus])
    return replace(
        space,
        gpus=math.prod(int(p.values[0]) for p in pinned if p.counts_gpus),
        variant=next((e.model_variant for e in reversed(given) if e.model_variant), ""),
        gpu=next((e.gpu for e in reversed(given) if e.gpu), ""),
        joined=heads(flag for p in parameters for emission in p.emissions for flag in emission.flags),
        typed=frozenset(flag for emission in given for flag in emission.flags),
        sized=sized,
    )


def as_before(study: Document) -> bool:
    """Whether this is the file of a study folder that a version began which took of a pinned parameter its flags only,
    applied or not, and counted no GPUs but a tuned one's. It goes on so: its launches are compared with each other."""
    return study.begun and COUNTED not in study.data["frozen"]


def _sized(counting: Sequence[Parameter]) -> tuple[str, ...]:
    """The flags of which each counts GPUs beside the parameters that do: none where one of these has a value that says
    with no such flag how many there are, which is the whole number."""
    given = [set(e.flags) for p in counting for value, e in zip(p.values, p.emissions, strict=True) if value != 1]
    if any(flags.isdisjoint(SIZES) for flags in given):
        return ()
    return tuple(flag for flag in SIZES if not any(flag in e.flags for p in counting for e in p.emissions))


def _settled(
    parameters: Sequence[Parameter], pins: Sequence[str], facts: dict[str, Any]
) -> tuple[list[Parameter], list[Parameter]]:
    """The parameters of the search, and those that are pinned for every server, of which ``facts`` are told. A pinned
    one that applies only under what is tuned is a parameter of one value; one that never applies is neither."""
    left, pinned = list(parameters), list[Parameter]()
    while True:
        names = {p.name for p in left}
        settled = [p for p in left if p.name in pins and names.isdisjoint(condition.names(p.when))]
        if not settled:
            return left, pinned
        for p in settled:
            left.remove(p)
            if condition.holds(p.when, facts):
                facts[p.name] = p.values[0]
                pinned.append(p)


def _whens(spec: ParameterFile, at: tuple[str, ...]) -> Iterator[tuple[Mapping[str, Any], tuple[str | int, ...]]]:
    """When a parameter applies, and when each case of its default does; with their places."""
    yield spec.when, (*at, "when")
    for index, case in enumerate(spec.default if isinstance(spec.default, list) else ()):
        yield case.when, (*at, "default", index, "when")


def _waits_for(name: str, wanted: str, file: SpaceFile, seen: set[str]) -> bool:
    """Whether what makes ``name`` apply needs, in the end, that ``wanted`` does."""
    seen.add(name)
    for other in condition.names(file.parameters[name].when) & set(file.parameters):
        if other == wanted or (other not in seen and _waits_for(other, wanted, file, seen)):
            return True
    return False


def _check_condition(spec: Mapping[str, Any], known: set[str], document: Document, at: tuple[str | int, ...]) -> None:
    place = ".".join(map(str, at))
    for problem in condition.problems(spec):
        document.refuse(f"{place}: {problem}", at)
    for name in sorted(condition.names(spec) - known):
        # facts that this machine does not have (a CPU has no compute capability) make a condition false, not wrong
        if name not in FACTS:
            fix = suggest(name, known | set(FACTS))
            document.refuse(f"{place}: {name!r} is neither a parameter nor a known fact", at, fix)


def _check_operands(
    spec: Mapping[str, Any],
    grids: Mapping[str, Sequence[Any]],
    facts: Mapping[str, Any],
    document: Document,
    at: tuple[str | int, ...],
) -> None:
    """Refuses what a condition compares a parameter with that reads like one of its values and is none, or cannot be
    compared with any. Any other value is no mistake, but where a parameter says which of its own may be: whoever trims
    a space keeps its rules. A fact is compared with what is of its kind, and is one of its words where they are few."""
    place = ".".join(map(str, at))
    pairs = [(name, *pair) for name, wanted in spec.items() for pair in condition.operands(wanted)]
    for name, op, operand in pairs:
        if condition.named(operand):
            continue
        values = grids.get(name) or WORDS.get(name)
        if not values:
            kind = _kind(facts.get(name))
            if kind in KINDS and _kind(operand) is not kind:
                document.refuse(f"{place}: {name} is {KINDS[kind]}, not {_shown(operand)}", at)
            continue
        if op in ("eq", "ne", "in", "not_in"):
            few = at[-1] == "only" or name not in grids
            wrong = operand not in values and (few or _read(operand) in map(_read, values))
        else:
            wrong = _kind(operand) not in map(_kind, values)
        if wrong:
            shown = at[-2] if at[-1] == "only" else name
            document.refuse(f"{place}: {shown} has no value {_shown(operand)}", at, _nearest(operand, values))


def _read(value: Any) -> str:
    """``fp8_e4m3`` of ``FP8-E4M3``, ``16`` of ``"16"``, ``false`` of ``off``."""
    word = _word(value).casefold().replace("-", "_")
    return {"on": "true", "yes": "true", "off": "false", "no": "false"}.get(word, word)


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _ever(values: Sequence[Any], spec: ParameterFile, limit: Any, facts: Mapping[str, Any]) -> list[Any]:
    """Every value that a parameter has on some machine, or by the study's word."""
    defaults = [case.value for case in spec.default] if isinstance(spec.default, list) else [spec.default]
    said = limit if isinstance(limit, list) else [limit]
    return [facts.get(condition.named(value), value) for value in (*values, *defaults, *said)]


def _check_flags(
    flags: Mapping[str, Any], facts: Mapping[str, Any], document: Document, at: tuple[str, ...], engine: str
) -> None:
    """A fact that this machine does not have is no mistake: whoever writes ``$draft_model`` need not have one."""
    known = {*FACTS, *facts}
    check_flags(flags, lambda name: name.lstrip("-"), document, at)
    for flag, value in flags.items():
        name = flag.lstrip("-")
        if value is False:
            document.refuse(f"--{name}: {NO_SWITCH}", (*at, flag), off(name, engine))
        if (fact := condition.named(value)) and fact not in known:
            document.refuse(f"--{name}: no such fact: {fact}", (*at, flag), suggest(fact, known))


def _check_facts(
    spec: ParameterFile, facts: Mapping[str, Any], document: Document, at: tuple[str, ...], engine: str
) -> None:
    """What the values of a parameter say of facts: ``requires`` and ``$name``."""
    for value in (v for v in spec.values if isinstance(v, str)) if isinstance(spec.values, list) else ():
        _check_flags({spec.flag: value}, facts, document, at, engine)
    known = {*FACTS, *facts}
    for key, emission in spec.values.items() if isinstance(spec.values, dict) else ():
        emission = emission or EmissionFile()
        if emission.requires and emission.requires not in known:
            fix = suggest(emission.requires, known)
            document.refuse(f"requires: no such fact: {emission.requires}", (*at, key, "requires"), fix)
        _check_flags(emission.flags, facts, document, (*at, key, "flags"), engine)
        check_env(emission.env, document, (*at, key, "env"))


def _check_values(name: str, values: Sequence[Any], counts_gpus: bool, document: Document, at: tuple[str, ...]) -> None:
    if wrong := [v for v in values if isinstance(v, (int, float)) and not _finite(v)]:
        raise document.error(f"{name}: {wrong[0]} is no value of a grid", at, "write a finite number")
    if counts_gpus and any(_kind(v) is not float or v <= 0 or v != int(v) for v in values):
        raise document.error(f"{name} counts GPUs, so its values are whole numbers above zero", at)


def _check_once(name: str, values: Sequence[Any], document: Document, at: tuple[str, ...]) -> None:
    """Refuses what the search would take for one value: 8 and 8.0, and 1 and true, of which an engine may make two."""
    if pair := twice(values, lambda value: value if isinstance(value, (int, float)) else repr(value)):
        one, other = map(_shown, pair)
        if same(*pair):
            how = f": {one} and {other} are one" if one != other else ""
            document.refuse(f"{name} lists a value twice{how}", at)
        else:
            what = f"{name} lists {one} and {other}, which the search cannot tell apart"
            document.refuse(what, at, "keep one of the two")


def _finite(number: float) -> bool:
    """Whether this is a number that a float can hold: not infinite, not NaN, not an integer beyond them."""
    return abs(number) <= sys.float_info.max


def _parameter(
    name: str, spec: ParameterFile, document: Document, at: tuple[str, ...], facts: Mapping[str, Any]
) -> Parameter:
    values, emissions = _grid(name, spec, document, at, facts)
    default, always = spec.default, spec.always
    if isinstance(default, list):
        case = next((c for c in default if condition.holds(c.when, facts)), None)
        if case is None:
            raise document.error(
                f"{name}: no case of its default applies here", (*at, "default"), "add a last case without when"
            )
        default, always = case.value, always or case.always
    numeric = all(_kind(value) is float for value in values)
    if not any(same(default, value) for value in values):
        if not numeric or _kind(default) is not float:
            fix = suggest(str(default), map(str, values))
            raise document.error(f"{name}: the default {default!r} is not one of its values", (*at, "default"), fix)
        # the engine's own default belongs to every grid: it is the baseline
        values, emissions = (*values, default), (*emissions, _emit(spec.flag, default) if spec.flag else Emission())
    _check_values(name, values, spec.counts_gpus, document, at)
    if numeric:  # a neighbour is one step away, and the ends are the least and the most
        pairs = sorted(zip(values, emissions, strict=True), key=lambda p: p[0])
        values, emissions = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    parameter = Parameter(
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
        always=always,
        like=spec.like,
    )
    if spec.like:
        _check_like(parameter, document, (*at, "like"))
    return parameter


def _check_like(parameter: Parameter, document: Document, at: tuple[str, ...]) -> None:
    from tuner.search.expert import knows

    if not knows(parameter):
        of = f"{parameter.like} with the values {', '.join(map(str, parameter.values))}"
        fix = "write what vLLM or SGLang calls it (max-num-seqs), with values that they know, or leave it out"
        document.refuse(f"{parameter.name} is like nothing that the search knows: {of}", at, fix)


def _grid(
    name: str, spec: ParameterFile, document: Document, at: tuple[str, ...], facts: Mapping[str, Any]
) -> tuple[tuple[Value, ...], tuple[Emission, ...]]:
    if isinstance(spec.values, dict):
        keep = {
            k: e or EmissionFile() for k, e in spec.values.items() if not e or not e.requires or facts.get(e.requires)
        }
        values = [_scalar(key) for key in keep]
        emissions = [
            Emission(_flags(e.flags), {k: str(v) for k, v in e.env.items()}, e.model_variant, e.gpu)
            for e in keep.values()
        ]
    else:
        values = _values(name, spec, document, at)
        if not spec.flag:
            raise document.error(
                f"{name} has no flag", at, "write flag: max-num-seqs, or values with flags of their own"
            )
        emissions = [_emit(spec.flag, value) for value in values]
    _check_once(name, values, document, (*at, "values"))
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


def _values(name: str, spec: ParameterFile, document: Document, at: tuple[str, ...]) -> list[Value]:
    """The grid as it is written."""
    if isinstance(spec.values, dict):
        return [_scalar(key) for key in spec.values]
    if spec.type == "switch":
        if not spec.flag:
            raise document.error(f"{name}: a switch needs its flag", at, "write flag: enable-prefix-caching")
        return [True, False]
    if spec.values is not None:
        return list(spec.values)
    if spec.range is not None:
        return _range(name, spec, document, at)
    raise document.error(f"{name} has neither values nor a range", at, "add values: [..] or range: [low, high]")


def _range(name: str, spec: ParameterFile, document: Document, at: tuple[str, ...]) -> list[Value]:
    step = spec.step if spec.step is not None else 1
    if not _finite(step):
        raise document.error(f"{name}: the step is {step}", (*at, "step"), "write a finite number")
    at = (*at, "range")
    if spec.range is None or len(spec.range) != 2:
        raise document.error(f"{name}: a range is [low, high]", at)
    low, high = spec.range
    if not (_finite(low) and _finite(high) and _finite(high - low)):
        raise document.error(f"{name}: the range is {low} to {high}", at, "write two finite numbers")
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
    whole = isinstance(low, int) and isinstance(high, int)
    if spec.step is None and not whole:
        document.refuse(f"{name}: a range of {spec.range} needs a step", at, "add for example step: 0.05")
    if step <= 0:
        raise document.error(f"{name}: the step must be above zero, not {step}", at)
    if high - low >= MOST_VALUES * step:
        raise document.error(
            f"{name}: more than {MOST_VALUES} values are too many for one parameter",
            at,
            "use a larger step or scale: log2",
        )
    count = int((high - low) / step + 1e-9) + 1
    return [round(low + i * step, 10) for i in range(count)]


def _emit(flag: str, value: Value) -> Emission:
    if isinstance(value, bool):
        return Emission({flag if value else f"no-{flag}": None})
    return Emission({flag: value})


def _flags(flags: Mapping[str, Any]) -> dict[str, Value | None]:
    """``true`` is a switch without a value; ``false``, in a study that was begun with one, leaves the flag out."""
    return {name.lstrip("-"): None if value is True else value for name, value in flags.items() if value is not False}


def _word(value: Any) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else _word(value)


def _nearest(value: Any, values: Sequence[Value]) -> str:
    """Which of ``values`` is meant."""
    word, words = _word(value), set(map(_word, values))
    if word in words:
        return f"write {word} without quotes" if isinstance(value, str) else f'write "{word}", in quotes'
    return suggest(word, words)


def off(flag: str, engine: str) -> str:
    """How to say that a switch is off: as vLLM's are, quoted where it is a part of JSON, and not at all elsewhere."""
    if "." in flag:
        return f'write {flag}: "false", in quotes'
    if engine not in ("vllm", "emulator") or flag.startswith("disable-"):
        return "leave it out"
    on = flag.removeprefix("no-") if flag.startswith("no-") else f"no-{flag}"
    return f"of a switch write {on}: true; else leave it out"


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
    if not wanted:
        raise document.error(f"{parameter.name} has no value left", at, "name one or more of its values")
    _check_once(parameter.name, wanted, document, at)
    for value in wanted:
        number = parameter.numeric and _kind(value) is float
        if not number and not any(same(value, known) for known in parameter.values):
            wrong = f"{parameter.name} has no value {_shown(value)}", at, _nearest(value, parameter.values)
            document.refuse(*wrong)
            if value not in parameter.values:  # a study may have begun with 1 for true
                raise document.error(*wrong)
    chosen = [v for v in parameter.values if v in wanted]
    pairs = [(v, parameter.emissions[parameter.values.index(v)]) for v in chosen]
    flag = next((next(iter(e.flags)) for e in parameter.emissions if e.flags), parameter.name)
    if others := [v for v in wanted if v not in parameter.values]:
        own = [(v, e) for v, e in zip(parameter.values, parameter.emissions, strict=True) if e != Emission()]
        if not own or any(e != _emit(flag, v) for v, e in own):
            document.refuse(
                f"{parameter.name} has no value {_shown(others[0])}, and what it would mean follows from no flag",
                at,
                f"name one of its values ({', '.join(map(_word, parameter.values))}), or add it to the space",
            )
    pairs += [(v, _emit(flag, v)) for v in others]
    if len(wanted) > 1 and parameter.default not in wanted:
        pairs.append((parameter.default, parameter.emissions[parameter.values.index(parameter.default)]))
    _check_values(parameter.name, [pair[0] for pair in pairs], parameter.counts_gpus, document, at)
    if parameter.numeric:
        whole = all(float(v).is_integer() and float(v) >= 0 for v in parameter.values)
        odd = [v for v in others if not float(v).is_integer() or float(v) < -1]  # -1 is what engines read as "auto"
        if whole and odd:
            document.refuse(f"{parameter.name} has whole numbers as values, not {_shown(odd[0])}", at)
        pairs.sort(key=lambda pair: pair[0])
    return replace(parameter, values=tuple(p[0] for p in pairs), emissions=tuple(p[1] for p in pairs))
