"""Big data: how numbers are distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: stacking would copy every job's values, which costs as much as the one pass over them.
histogram = Kernel(
    "data.histogram",
    inputs={"values": "float32[n]", "low": "float64", "high": "float64", "bins": "int64 = 100"},
    outputs={"counts": "int64[bins]"},
    flops="4*n",
    bytes="4*n + 12*bins",
    limits={"high": "high > low", "bins": "1 <= bins <= 16777216"},
    tolerance=0.0,
    summary="How many numbers fall into each of equal bins between two bounds.",
)

Values = NDArray[np.float32]


@histogram.reference
def _reference(values: Values, low: float, high: float, bins: int) -> Outputs:
    """numpy.histogram(values, bins, (low, high)): bin i holds edge[i] <= value < edge[i + 1], the last its end too.

    The edges are evenly spaced in float64 and rounded to float32, so what decides is comparisons of float32, which
    every device makes alike. What lies outside, and NaN, is not counted; nor is anything where high - low is not a
    finite number above 0.
    """
    edges = _edges(low, high, bins)
    inside = values[(values >= edges[0]) & (values <= edges[-1])]
    index = np.minimum(np.searchsorted(edges, inside, side="right") - 1, bins - 1)
    return {"counts": np.bincount(index, minlength=bins).astype(np.int64)}


def _edges(low: float, high: float, bins: int) -> Values:
    """The bins + 1 edges, all NaN (which nothing is inside of) where the bounds are none."""
    if not 0 < high - low < math.inf:
        return np.full(bins + 1, np.nan, np.float32)
    with np.errstate(over="ignore"):
        return np.linspace(low, high, bins + 1).astype(np.float32)


def _guess(low: float, high: float, bins: int) -> tuple[float, float, float]:
    """Numbers a, b, margin: a value's bin is floor(a * value + b) unless that is within `margin` of a whole number.

    Edges are off by half a last place of float32 at most; a tenth of one is for rounding the guess. A margin of 1 says
    that all guesses are to be doubted.
    """
    span = high - low
    if not 0 < span < math.inf:
        return 0.0, 0.0, 1.0
    scale = bins / span
    margin = 0.6 * float(np.finfo(np.float32).eps) * max(abs(low), abs(high)) * scale
    if not (margin < 0.25 and math.isfinite(scale) and math.isfinite(low * scale)):
        return 0.0, 0.0, 1.0
    return scale, -low * scale, margin


_BLOCK = 2048
#: A call counts in int32, half the memory to scatter to, so it takes no more values than that can count.
_MOST = 2**31 - 1


def _count(
    values: Values,
    edges: Values,
    scale: float,
    shift: float,
    margin: float,
    numbers: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> None:
    """A block at a time: vector code guesses the bins, then a loop counts, and looks up what was close to an edge."""
    bins = np.int32(counts.size - 1)  # the last of counts is for what is outside
    lowest, highest = edges[0], edges[bins]
    size = numbers.size
    for start in range(0, values.size, size):
        block = values[start : start + size]
        found = numbers[: block.size]
        for i in range(block.size):
            value = block[i]
            inside = (value >= lowest) & (value <= highest)
            place = np.float64(value) * scale + shift
            place = place if inside else 0.5
            whole = np.int32(place)
            part = place - whole
            whole = whole if (part >= margin) & (part <= 1 - margin) else np.int32(-1)
            found[i] = whole if inside else bins
        for i in range(block.size):
            bin = found[i]
            if bin < 0:
                bin = min(np.int32(np.searchsorted(edges, block[i], "right") - 1), np.int32(bins - 1))
            counts[np.uint32(bin)] += np.int32(1)


@histogram.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types

    values_type = types.Array(types.float32, 1, "C", readonly=True)
    double, number = types.float64, types.int32[::1]
    count = njit(
        (values_type, types.float32[::1], double, double, double, number, number),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_count)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, bins, bounds = inputs["values"], inputs["bins"], (inputs["low"], inputs["high"], inputs["bins"])
        edges, guess, numbers = _edges(*bounds), _guess(*bounds), np.empty(_BLOCK, np.int32)
        total = np.zeros(bins, np.int64)
        for start in range(0, values.size, _MOST):
            counts = np.zeros(bins + 1, np.int32)
            count(values[start : start + _MOST], edges, *guess, numbers, counts)
            total += counts[:-1]
        return {"counts": total}

    return run


@histogram.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, bins in ((1, 1), (1_000, 10), (5_000, 300)):
        yield {"values": random.standard_normal(n, np.float32), "low": -3.0, "high": 3.0, "bins": bins}
    # On the edges, next to them, and outside.
    edges = np.linspace(0, 1, 11).astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-1))])
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 2], np.float32)
    yield {"values": np.concatenate([near, odd]), "low": 0.0, "high": 1.0, "bins": 10}
    # Bins finer than float32 tells apart, far from 0.
    yield {"values": np.linspace(1e6, 1e6 + 1, 1_000, dtype=np.float32), "low": 1e6, "high": 1e6 + 1, "bins": 1_000}
