"""What NumPy and SciPy make of linalg.matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import blas

BOUND = "compute"
_SIDES = {"small": 96, "medium": 512, "large": 2048}


def inputs(size: str) -> dict[str, Any]:
    random, side = np.random.default_rng(0), _SIDES[size]
    return {name: random.standard_normal((side, side), np.float32) for name in ("a", "b")}


def expressions() -> dict[str, Callable[..., Any]]:
    return {
        "numpy.matmul": lambda a, b: {"c": a @ b},
        # BLAS reads columns first, so the product of the transposed, which are views.
        "scipy sgemm": lambda a, b: {"c": blas.sgemm(1.0, b.T, a.T).T},
    }
