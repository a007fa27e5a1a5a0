"""What NumPy and SciPy make of monitor.anomaly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

BOUND = "latency"  # running sums: each waits for the one before it
_LENGTHS = {"small": (1_000, 30), "medium": (1_000_000, 1_000), "large": (10_000_000, 30)}

Series = NDArray[np.float64]


def inputs(size: str) -> dict[str, Any]:
    """A temperature that goes up and down with the day, with noise on it and a few spikes."""
    random = np.random.default_rng(0)
    length, window = _LENGTHS[size]
    series = 20 + 5 * np.sin(np.arange(length) * (2 * np.pi / 1440)) + 0.5 * random.standard_normal(length)
    series[random.integers(0, length, max(length // 10_000, 1))] += 8
    return {"series": series, "window": window}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"cumsum": _sums, "uniform_filter1d": _filtered, "oaconvolve": _convolved}


# All of them subtract one mean first, or squares would lose the digits that the deviation is in.


def _sums(series: Series, window: int) -> dict[str, Any]:
    shifted = series - series.mean()
    sums, squares = np.zeros(series.size + 1), np.zeros(series.size + 1)
    np.cumsum(shifted, out=sums[1:])
    np.cumsum(shifted * shifted, out=squares[1:])
    mean = (sums[window:-1] - sums[: -window - 1]) / window
    square = (squares[window:-1] - squares[: -window - 1]) / window
    return _scored(shifted, window, mean, square)


def _filtered(series: Series, window: int) -> dict[str, Any]:
    shifted = series - series.mean()
    first = window // 2  # of the windows that lie inside the series
    inside = slice(first, first + series.size - window)
    mean = ndimage.uniform_filter1d(shifted, window)[inside]
    square = ndimage.uniform_filter1d(shifted * shifted, window)[inside]
    return _scored(shifted, window, mean, square)


def _convolved(series: Series, window: int) -> dict[str, Any]:
    shifted = series - series.mean()
    ones = np.full(window, 1 / window)
    mean = signal.oaconvolve(shifted, ones, mode="valid")[:-1]
    square = signal.oaconvolve(shifted * shifted, ones, mode="valid")[:-1]
    return _scored(shifted, window, mean, square)


def _scored(shifted: Series, window: int, mean: Series, square: Series) -> dict[str, Any]:
    score = np.full(shifted.size, np.nan)
    np.divide(shifted[window:] - mean, np.sqrt(square - mean * mean), out=score[window:])
    return {"score": score}
