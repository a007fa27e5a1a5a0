"""The fields of a resource or a task, read one by one: whatever is wrong with one is told with what would be right."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_ai.errors import InvalidArguments

__all__ = ["Fields", "meant", "number"]


def meant(word: str, known: Iterable[str]) -> str:
    """What follows a refused word: the known one that it resembles, or all of them."""
    known = list(known)
    # Compared in lower case: `Priority` is one letter from `priority`, and `GPU` none from `gpu`.
    folded = {each.lower(): each for each in known}
    if close := difflib.get_close_matches(word.lower(), folded, n=1):
        return f"did you mean {folded[close[0]]!r}?"
    return f"there are {', '.join(known)}" if known else "there are none"


def number(owner: str, name: str, value: Any, *, zero_too: bool = False) -> float:
    """The value as a finite float above 0, or 0 itself where that is right too."""
    # bool is an int to Python, but nobody who writes True means 1.0 seconds.
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if 0 < found < math.inf or (zero_too and found == 0):
            return found
    right = "a number of at least 0" if zero_too else "a number above 0"
    raise InvalidArguments(f"{owner}: {name} must be {right}, not {value!r}", name)


class Fields:
    """What a dictionary says of one resource or task. InvalidArguments where a field is missing, unknown or wrong."""

    def __init__(self, what: str, name: str, given: Any, required: Sequence[str], optional: Sequence[str]) -> None:
        owner = f"{what} {name!r}"
        if not isinstance(given, Mapping):
            raise InvalidArguments(f"{owner}: must be a dictionary with {' and '.join(required)}, not {given!r}", what)
        known = (*required, *optional)
        for field in given:
            if field not in known:
                raise InvalidArguments(f"{owner}: no field {field!r}; {meant(str(field), known)}", str(field))
        for field in required:
            if field not in given:
                raise InvalidArguments(f"{owner}: {field} is missing; it needs {' and '.join(required)}", field)
        self.owner = owner
        self._given = given

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def above_zero(self, name: str, unset: float) -> float:
        """A finite number above 0; `unset` where it is not given."""
        if name not in self._given:
            return unset
        return number(self.owner, name, self._given[name])

    def zero_or_more(self, name: str, unset: float) -> float:
        """A finite number of at least 0; `unset` where it is not given."""
        if name not in self._given:
            return unset
        return number(self.owner, name, self._given[name], zero_too=True)

    def count(self, name: str, unset: int, most: int | None = None) -> int:
        """A whole number of at least 1 and at most `most`; `unset` where it is not given."""
        if name not in self._given:
            return unset
        value = self._given[name]
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            found = int(value)
            if found >= 1 and (most is None or found <= most):
                return found
        right = "of at least 1" if most is None else f"from 1 to {most}"
        raise InvalidArguments(f"{self.owner}: {name} must be a whole number {right}, not {value!r}", name)

    def one_of(self, name: str, known: Iterable[str]) -> str:
        """One of some words, in any case."""
        value = self._given[name]
        if isinstance(value, str) and value.lower() in known:
            return value.lower()
        raise InvalidArguments(f"{self.owner}: no {name} {value!r}; {meant(str(value), known)}", name)

    def text(self, name: str) -> str | None:
        """A word; None where it is not given."""
        value = self._given.get(name)
        if name not in self._given or (isinstance(value, str) and value):
            return value
        raise InvalidArguments(f"{self.owner}: {name} must be a name, not {value!r}", name)
