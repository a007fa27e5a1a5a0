"""The loops of policies: compiled by Numba where it is installed, plain Python where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["IS_COMPILED", "compiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    IS_COMPILED = False

    def compiled(function: _Function) -> _Function:
        """The function as it is."""
        return function

else:
    IS_COMPILED = True

    def compiled(function: _Function) -> _Function:
        """The function, compiled at its first call; what was compiled once is kept on the disk."""
        found: _Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
        return found
