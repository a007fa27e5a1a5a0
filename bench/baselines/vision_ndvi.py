"""What NumPy makes of vision.ndvi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "memory"
_SIDES = {"small": 64, "medium": 1024, "large": 8192}

Band = NDArray[np.float32]


def inputs(size: str) -> dict[str, Any]:
    """Reflectances of a red and a near-infrared band, 0 to 1."""
    random = np.random.default_rng(0)
    shape = _SIDES[size], _SIDES[size]
    return {"red": random.random(shape, np.float32), "nir": random.random(shape, np.float32)}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"quotient, then where": _where, "masked quotient in place": _masked}


def _where(red: Band, nir: Band) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        total = nir + red
        index = np.where(total == 0, np.float32(0), (nir - red) / total)
    return {"ndvi": index}


def _masked(red: Band, nir: Band) -> dict[str, Any]:
    total = nir + red
    index = nir - red
    np.divide(index, total, out=index, where=total != 0)  # where the sum is 0, so is the difference of reflectances
    return {"ndvi": index}
