"""What NumPy makes of data.histogram."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "latency"  # a count is read and written for each value: a scatter, whatever the bandwidth


def inputs(size: str) -> dict[str, Any]:
    """`fine` is the large size with 65,536 bins."""
    sizes = {"small": (5_000, 100), "medium": (300_000, 1_000), "large": (10_000_000, 1_000)}
    n, bins = (sizes | {"fine": (10_000_000, 65_536)})[size]
    values = np.random.default_rng(0).standard_normal(n, np.float32)
    return {"values": values, "low": -4.0, "high": 4.0, "bins": bins}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"histogram": _histogram, "sort and searchsorted": _sorted}


def _histogram(values: Any, low: float, high: float, bins: int) -> dict[str, Any]:
    return {"counts": np.histogram(values, bins, (low, high))[0]}


def _sorted(values: Any, low: float, high: float, bins: int) -> dict[str, Any]:
    edges, ordered = np.linspace(low, high, bins + 1, dtype=np.float32), np.sort(values)
    below = np.searchsorted(ordered, edges)
    below[-1] = np.searchsorted(ordered, edges[-1], "right")
    return {"counts": np.diff(below)}
