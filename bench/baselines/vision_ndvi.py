"""What NumPy makes of vision.ndvi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "memory"
_SIDES = {"small": 256, "medium": 1024, "large": 5490}  # large: a tile of Sentinel-2 at 20 m


def inputs(size: str) -> dict[str, Any]:
    random, side = np.random.default_rng(0), _SIDES[size]
    return {"red": random.random((side, side), np.float32), "nir": random.random((side, side), np.float32)}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"divide where": _divide_where, "where": _where}


def _divide_where(red: Any, nir: Any) -> dict[str, Any]:
    """Three passes, one of them in place."""
    total = nir + red
    index = nir - red
    return {"ndvi": np.divide(index, total, out=index, where=total != 0)}


def _where(red: Any, nir: Any) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        total = nir + red
        return {"ndvi": np.where(total == 0, np.float32(0), (nir - red) / total)}
