"""Conditions as data: a mapping of names to what they must be. Never ``eval``.

``{speculation: [ngram, draft]}`` holds where ``speculation`` is one of the two; ``{block_size: {lt: 32}}`` compares; a
string that starts with ``$`` names another parameter or a fact (``{max_num_seqs: {gt: $batch}}``), as a parameter's own
value may. All entries must hold. A name that is neither a parameter in force nor a known fact makes the condition
false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Condition = Mapping[str, Any]

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "not_in": lambda a, b: a not in b,
    "divides": lambda a, b: b % a == 0,
    "not_divides": lambda a, b: b % a != 0,
    "multiple_of": lambda a, b: a % b == 0,
    "not_multiple_of": lambda a, b: a % b != 0,
}


def problems(condition: Any) -> list[str]:
    """What is wrong with a condition as written; empty where it can be evaluated."""
    if not isinstance(condition, Mapping):
        return ["a condition is a mapping of names to values"]
    found = []
    for name, wanted in condition.items():
        if isinstance(wanted, Mapping):
            found += [
                f"{name}: unknown operator {op!r}; known: {', '.join(OPERATORS)}"
                for op in wanted
                if op not in OPERATORS
            ]
            found += [
                f"{name}: {op} takes a list of values, not {operand!r}"
                for op, operand in wanted.items()
                if op in ("in", "not_in") and not (isinstance(operand, list | tuple) or named(operand))
            ]
    return found


def operands(wanted: Any) -> Iterator[tuple[str, Any]]:
    """What one entry of a condition compares with, by operator."""
    for op, operand in _tests(wanted):
        for one in operand if isinstance(operand, list | tuple) else [operand]:
            yield op, one


def names(condition: Condition) -> set[str]:
    """Every parameter or fact that a condition mentions."""
    return {*condition, *filter(None, (named(one) for wanted in condition.values() for _, one in operands(wanted)))}


def named(value: Any) -> str:
    """The parameter or fact that ``value`` names with ``$``; empty for any other."""
    return value[1:] if isinstance(value, str) and value.startswith("$") else ""


def meant(value: Any, known: Mapping[str, Any]) -> Any:
    """``value``, or what it names, be that by what another is named; None where it is not known."""
    if name := named(value):
        value = known.get(name)
        value = known.get(name) if (name := named(value)) else value
    return value


def holds(condition: Condition, known: Mapping[str, Any]) -> bool:
    """Whether every entry of ``condition`` holds for the parameters and facts in ``known``."""
    return all(name in known and _one(known[name], wanted, known) for name, wanted in condition.items())


def _tests(wanted: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(wanted, Mapping):
        return wanted.items()
    return [("in" if isinstance(wanted, list | tuple) else "eq", wanted)]


def _one(value: Any, wanted: Any, known: Mapping[str, Any]) -> bool:
    value = meant(value, known)
    for op, operand in _tests(wanted):
        operand = [meant(o, known) for o in operand] if isinstance(operand, list | tuple) else meant(operand, known)
        if value is None or operand is None:
            return False
        try:
            if not OPERATORS[op](value, operand):
                return False
        except (TypeError, ValueError, ArithmeticError):  # "50%" % 8 is a format
            return False
    return True
