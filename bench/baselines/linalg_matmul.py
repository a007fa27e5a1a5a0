"""What NumPy makes of linalg.matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "compute"
_SIZES = {"small": 128, "medium": 512, "large": 2048}


def inputs(size: str) -> dict[str, Any]:
    """Two square matrices of standard normal numbers."""
    random = np.random.default_rng(0)
    shape = _SIZES[size], _SIZES[size]
    return {"a": random.standard_normal(shape, np.float32), "b": random.standard_normal(shape, np.float32)}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"a @ b": _product}


def _product(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, Any]:
    return {"c": a @ b}
