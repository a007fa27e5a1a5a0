"""A small arithmetic language over a job's dims and scalars: `2*m*k*n`, `1 <= k <= n`.

Formulas travel as text with a KernelSpec and are evaluated by processes that have no kernels, so the text is
parsed with `ast` and only arithmetic survives: numbers, names, + - * / // %, ** by a constant of at most 4,
comparisons, and the functions of FUNCTIONS. Values are floats, so nothing can grow without bound.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from lepton_ai.errors import InvalidKernel

__all__ = ["FUNCTIONS", "Formula"]

FUNCTIONS: Final = {"min": min, "max": max, "log2": math.log2, "sqrt": math.sqrt, "ceil": math.ceil}
_MAX_LENGTH = 400
_MAX_EXPONENT = 4
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_PLAIN = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Load, *_OPERATORS, *_COMPARISONS)


class Formula:
    """A parsed formula. `names` are the dims and scalars that it needs."""

    __slots__ = ("_order", "_value", "names", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._value, self._order = _parse(text)
        self.names = frozenset(self._order)

    def __call__(self, values: Mapping[str, float]) -> float:
        """The value for these dims; NaN where it is not defined (a division by nought, a root of less than nought)."""
        given = [float(values[name]) for name in self._order]
        try:
            return float(self._value(*given))
        except (ArithmeticError, ValueError, TypeError):
            return math.nan

    def __repr__(self) -> str:
        return f"Formula({self.text!r})"


_GLOBALS: dict[str, Any] = {"__builtins__": {}, **FUNCTIONS}


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Callable[..., float], tuple[str, ...]]:
    """The formula as a function of the names that it needs, in this order."""
    if len(text) > _MAX_LENGTH:
        raise InvalidKernel(f"a formula has at most {_MAX_LENGTH} characters, this one has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidKernel(f"not a formula: {text!r} ({error})") from None
    names: set[str] = set()
    _check(tree, text, names)
    order = tuple(sorted(names))
    given = ast.arguments([], [ast.arg(name) for name in order], None, [], [], None, [])
    function = ast.fix_missing_locations(ast.Expression(ast.Lambda(given, tree.body)))
    try:
        return eval(compile(function, "<formula>", "eval"), _GLOBALS), order
    except SyntaxError as error:  # a name that no argument may have
        raise InvalidKernel(f"not a formula: {text!r} ({error})") from None


def _check(node: ast.AST, text: str, names: set[str]) -> None:
    if isinstance(node, ast.Call):
        if not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS) or node.keywords:
            raise InvalidKernel(f"only {', '.join(FUNCTIONS)} can be called in a formula: {text!r}")
        for argument in node.args:
            _check(argument, text, names)
        return
    if isinstance(node, ast.Name):
        names.add(node.id)
        return
    if isinstance(node, ast.Constant):
        if not isinstance(node.value, int | float) or isinstance(node.value, bool):
            raise InvalidKernel(f"{node.value!r} is not a number in the formula {text!r}")
        try:
            # Whole numbers would grow without bound in a tower of powers; floats overflow.
            node.value = float(node.value)
        except OverflowError:
            raise InvalidKernel(f"a number in the formula {text!r} is too large") from None
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right
        value = power.value if isinstance(power, ast.Constant) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 <= value <= _MAX_EXPONENT):
            raise InvalidKernel(f"** takes a constant of at most {_MAX_EXPONENT} in a formula: {text!r}")
        _check(node.left, text, names)
        return
    if not isinstance(node, _PLAIN):
        raise InvalidKernel(f"{type(node).__name__} is not allowed in a formula: {text!r}")
    for child in ast.iter_child_nodes(node):
        _check(child, text, names)
