"""The gate for CI: a condition over two runs, and its outcome as JUnit XML.

The condition is arithmetic and comparisons over a few named functions. It is parsed
by Python's own parser and computed node by node from a short list; nothing is executed. It is
computed in fractions: a difference of exactly 0.05 is not more than 0.05.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard import statistics
from dtt_plugin.leaderboard.runs import Outcomes, Run
from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.tasks.description import BENIGN
from dtt_plugin.tasks.metrics import REFUSAL

_LONGEST = 500
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


def _attacked(run: Run) -> Run:
    if not run.attacks:
        raise DttError(f"{run.path} has no attacks, so --fail-if can only be about its refusal().")
    return run


def _share(outcomes: Outcomes) -> Fraction:
    return Fraction(int(outcomes.sum()), len(outcomes))


def _asr(run: Run) -> Fraction:
    return max(map(_share, _attacked(run).hacked.T))


def _refusal(run: Run) -> Fraction:
    if REFUSAL not in run.outcomes:
        raise DttError(f"{run.path} has no benign prompts, so no refusal(); run the whole task.")
    return _share(run.outcomes[REFUSAL])


def _p(a: Run, b: Run) -> Fraction:
    return Fraction(statistics.mcnemar(_attacked(a).hacked_any, _attacked(b).hacked_any)[1])


FUNCTIONS: Mapping[str, Callable[..., Fraction]] = {
    "asr": _asr,
    "asr_any": lambda run: _share(_attacked(run).hacked_any),
    REFUSAL: _refusal,
    "p": _p,
}
HELP = (
    "asr(A), the highest of the attacks' rates; asr_any(A); refusal(A); p(A, B), exact McNemar; numbers, "
    "+ - * /, < <= > >=, and, or, not"
)


def holds(condition: str, runs: Mapping[str, Run]) -> bool:
    """Return whether `condition` holds.

    Args:
        condition: for instance `asr(B) - asr(A) > 0.05`.
        runs: by the names it uses.

    Raises:
        DttError: the condition says something else than `HELP` lists.
    """
    wrong = DttError(f"--fail-if {condition[:_LONGEST]!r} is not a condition; it is made of: {HELP}.")
    try:
        if len(condition) > _LONGEST:
            raise ValueError("too long")
        value = _value(ast.parse(condition.strip(), mode="eval").body, runs)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError, TypeError, AttributeError) as error:
        raise wrong from error
    if not isinstance(value, bool):
        raise DttError(f"--fail-if {condition!r} is a number, not a condition; compare it, for instance with > 0.05.")
    return value


def _value(node: ast.expr, runs: Mapping[str, Run]) -> Fraction | bool:
    """Compute one node; raise ValueError for any node that is not on the list."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and math.isfinite(number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, runs)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _truth(operand, runs)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _BINARY[type(sign)](_number(left, runs), _number(right, runs))
        case ast.BoolOp(op=sign, values=parts):
            truths = [_truth(part, runs) for part in parts]
            return all(truths) if isinstance(sign, ast.And) else any(truths)
        case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in _COMPARISONS:
            return _COMPARISONS[type(sign)](_number(left, runs), _number(right, runs))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_run(argument, runs) for argument in arguments))
    raise ValueError(ast.dump(node)[:100])


def _number(node: ast.expr, runs: Mapping[str, Run]) -> Fraction:
    value = _value(node, runs)
    if isinstance(value, bool):
        raise ValueError("a condition stands where a number belongs")
    return value


def _truth(node: ast.expr, runs: Mapping[str, Run]) -> bool:
    value = _value(node, runs)
    if not isinstance(value, bool):
        raise ValueError("a number stands where a condition belongs")
    return value


def _run(node: ast.expr, runs: Mapping[str, Run]) -> Run:
    if not isinstance(node, ast.Name) or node.id not in runs:
        raise ValueError("an argument is none of the runs")
    return runs[node.id]


def write_junit(path: Path, outcomes: Mapping[str, bool], message: str, seconds: float) -> None:
    """Write JUnit XML: one test case per condition, failed where it holds.

    Args:
        path: the file.
        outcomes: per condition whether it holds.
        message: the figures, for the failure.
        seconds: how long it took.
    """
    failures = sum(outcomes.values())
    totals = {"tests": str(len(outcomes)), "failures": str(failures), "errors": "0", "time": f"{seconds:.3f}"}
    suite = ElementTree.Element("testsuite", {"name": "dtt compare", **totals})
    for condition, failed in outcomes.items():
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "dtt.compare", "name": _xml(condition), "time": f"{seconds:.3f}"}
        )
        if failed:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(f"holds: {condition}")})
            failure.text = _xml(message)
    with replacing(path) as temporary:
        ElementTree.ElementTree(suite).write(temporary, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    """Drop what XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


@dataclass(frozen=True)
class Compared:
    """One outcome in two runs."""

    A: Rate
    B: Rate
    effect: float
    """B minus A, a share of the records."""
    p: float
    """Of McNemar's exact test."""


def figures(a: Run, b: Run) -> dict[str, Compared]:
    """Return both runs' rates, attack by attack and for refusals, with the paired test of each."""
    return {
        name if name != REFUSAL else f"{REFUSAL} ({BENIGN})": Compared(
            statistics.rate(before), statistics.rate(b.outcomes[name]), *statistics.mcnemar(before, b.outcomes[name])
        )
        for name, before in a.outcomes.items()
    }
