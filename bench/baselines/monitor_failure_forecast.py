"""What NumPy and SciPy make of monitor.failure_forecast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import ndtr

# Not "memory", although it does 10 operations for 8 bytes that it reads once: a row's steps wait for each other, so
# rows are turned into columns, and that takes longer than the reading.
BOUND = "latency"
_SIZES = {"small": (20, 100), "medium": (2_000, 500), "large": (100_000, 500)}


def inputs(size: str) -> dict[str, Any]:
    """Wear that grows by chance, measured with noise; two in a hundred measurements are missing."""
    random = np.random.default_rng(0)
    m, n = _SIZES[size]
    series = random.gamma(1, 0.01, (m, n))
    np.cumsum(series, axis=1, out=series)
    series += random.normal(0, 0.05, (m, n))
    series[random.random((m, n)) < 0.02] = np.nan
    return {"series": series, "limit": 6.0, "horizon": 48, "alpha": 0.5, "beta": 0.1}


def _over_time(series: Any, limit: float, horizon: int, alpha: float, beta: float) -> dict[str, Any]:
    """A loop over time, machines in vectors; what is not measured is an error of 0."""
    m, n = series.shape
    columns = np.ascontiguousarray(series.T)
    known = np.isfinite(columns)
    first = known.argmax(axis=0)
    machine = np.arange(m)
    later = known.copy()
    later[first, machine] = False
    second = later.argmax(axis=0)
    later[second, machine] = False
    level, slope, squares = np.zeros(m), np.zeros(m), np.zeros(m)
    error = np.empty(m)
    gain = alpha * beta
    # Most machines begin with the first two measurements; the others are set when it is their turn.
    begins = {int(at): np.flatnonzero(second == at) for at in np.unique(second)}
    for t in range(n):
        if t > 0:
            level += slope
            np.subtract(columns[t], level, out=error)
            error[~later[t]] = 0
            squares += error * error
            slope += gain * error
            error *= alpha
            level += error
        if t in begins:
            who = begins[t]
            level[who] = columns[t, who]
            slope[who] = (columns[t, who] - columns[first[who], who]) / (t - first[who])
            squares[who] = 0
    with np.errstate(all="ignore"):
        steps = np.where(level >= limit, 0, np.where(slope > 0, (limit - level) / slope, np.inf))
        deviation = np.sqrt(squares / later.sum(axis=0))
        h = np.arange(1.0, horizon + 1)
        spread = np.sqrt(1 + (h - 1) * (alpha**2 + alpha * gain * h + gain**2 * h * (2 * h - 1) / 6))
        most = np.full(m, -np.inf)
        for ahead, wide in zip(h, spread, strict=True):
            np.maximum(most, (level - limit + ahead * slope) / wide, out=most)
        risk = ndtr(most / deviation)
    return {"steps": steps, "risk": risk}


def _in_blocks(series: Any, **rest: Any) -> dict[str, Any]:
    """The same for a thousand machines at a time, whose columns the caches hold."""
    parts = [_over_time(series[start : start + 1000], **rest) for start in range(0, len(series), 1000)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"loop over time": _over_time, "loop over time, in blocks": _in_blocks}
