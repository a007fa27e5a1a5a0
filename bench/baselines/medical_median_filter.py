"""What NumPy and SciPy make of medical.median_filter."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BOUND = "compute"
_SIZES = {"small": (64, 1), "medium": (512, 5), "large": (4096, 1)}

Image = NDArray[np.float32]


def inputs(size: str) -> dict[str, Any]:
    """A smooth image with noise on it."""
    random = np.random.default_rng(0)
    side, radius = _SIZES[size]
    y, x = np.mgrid[:side, :side].astype(np.float32) * np.float32(0.02)
    return {"image": np.sin(y) * np.cos(x) + random.standard_normal((side, side), np.float32) / 4, "radius": radius}


def expressions() -> dict[str, Callable[..., Any]]:
    return {
        "ndimage.median_filter": _scipy,
        "partition of windows, row by row": _partitioned,
        "sorting network of whole images": _network,
        "sorting network of rows": _network_of_rows,
    }


def _scipy(image: Image, radius: int) -> dict[str, Any]:
    return {"filtered": ndimage.median_filter(image, size=2 * radius + 1, mode="nearest")}


def _partitioned(image: Image, radius: int) -> dict[str, Any]:
    side = 2 * radius + 1
    padded = np.pad(image, radius, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    filtered = np.empty_like(image)
    for y in range(len(image)):
        values = windows[y].reshape(-1, side * side)
        filtered[y] = np.partition(values, side * side // 2, axis=1)[:, side * side // 2]
    return {"filtered": filtered}


def _network(image: Image, radius: int) -> dict[str, Any]:
    padded = np.pad(image, radius, mode="edge")
    return {"filtered": _by_network(padded, radius)}


def _network_of_rows(image: Image, radius: int) -> dict[str, Any]:
    padded = np.pad(image, radius, mode="edge")
    filtered = np.empty_like(image)
    rows = max(1, 16_384 // image.shape[1])  # so that the copies of a strip fit the cache
    for y in range(0, len(image), rows):
        filtered[y : y + rows] = _by_network(padded[y : y + rows + 2 * radius], radius)
    return {"filtered": filtered}


def _by_network(padded: Image, radius: int) -> Image:
    side = 2 * radius + 1
    height, width = padded.shape[0] - 2 * radius, padded.shape[1] - 2 * radius
    lanes = [padded[dy : dy + height, dx : dx + width].copy() for dy in range(side) for dx in range(side)]
    spare = np.empty((height, width), np.float32)
    for i, j in _pairs(side * side):
        np.minimum(lanes[i], lanes[j], out=spare)
        np.maximum(lanes[i], lanes[j], out=lanes[j])
        lanes[i], spare = spare, lanes[i]
    return lanes[side * side // 2]


@lru_cache
def _pairs(size: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange sort (Knuth, TAOCP vol. 3, algorithm 5.2.2M), less what the median does not need."""
    pairs = []
    top = 1 << max((size - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = {size // 2}, []
    for i, j in reversed(pairs):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return kept[::-1]
