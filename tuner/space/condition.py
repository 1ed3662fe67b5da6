"""Conditions as data: a mapping of names to what they must be. Never ``eval``.

``{speculation: [ngram, draft]}`` holds where ``speculation`` is one of the two; ``{block_size: {lt: 32}}`` compares; a
string operand that starts with ``$`` names another parameter or a fact (``{max_num_seqs: {gt: $batch}}``).
All entries must hold. A name that is neither a parameter in force nor a known fact makes the condition false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
                if op in ("in", "not_in") and not (isinstance(operand, list | tuple) or str(operand).startswith("$"))
            ]
    return found


def literals(wanted: Any) -> Iterator[tuple[str, Any]]:
    """What one entry of a condition compares with, by operator; what ``$`` names is left out."""
    tests = (
        wanted.items()
        if isinstance(wanted, Mapping)
        else [("in" if isinstance(wanted, list | tuple) else "eq", wanted)]
    )
    for op, operand in tests:
        for one in operand if isinstance(operand, list | tuple) else [operand]:
            if not (isinstance(one, str) and one.startswith("$")):
                yield op, one


def names(condition: Condition) -> set[str]:
    """Every parameter or fact that a condition mentions."""
    found = set(condition)
    for wanted in condition.values():
        operands = list(wanted.values()) if isinstance(wanted, Mapping) else [wanted]
        found |= {str(o)[1:] for o in operands if isinstance(o, str) and o.startswith("$")}
    return found


def holds(condition: Condition, known: Mapping[str, Any]) -> bool:
    """Whether every entry of ``condition`` holds for the parameters and facts in ``known``."""
    return all(name in known and _one(known[name], wanted, known) for name, wanted in condition.items())


def _one(value: Any, wanted: Any, known: Mapping[str, Any]) -> bool:
    if isinstance(wanted, Mapping):
        tests = list(wanted.items())
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        tests = [("in", wanted)]
    else:
        tests = [("eq", wanted)]
    for op, operand in tests:
        if isinstance(operand, str) and operand.startswith("$"):
            if operand[1:] not in known:
                return False
            operand = known[operand[1:]]
        if value is None or operand is None:
            return False
        try:
            if not OPERATORS[op](value, operand):
                return False
        except (TypeError, ValueError, ArithmeticError):  # "50%" % 8 is a format
            return False
    return True
