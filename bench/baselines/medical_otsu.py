"""What NumPy makes of medical.otsu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "latency"  # a histogram: each pixel is a load and a store at a place that it decides itself
_SIDES = {"small": 128, "medium": 1024, "large": 4096}

Image = NDArray[np.uint8]
Counts = NDArray[np.int64]


def inputs(size: str) -> dict[str, Any]:
    """Bright disks on a dark ground, with noise."""
    random = np.random.default_rng(0)
    side = _SIDES[size]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    bright = np.sin(y * np.float32(0.05)) * np.sin(x * np.float32(0.05)) > 0.4
    grey = np.where(bright, np.float32(170), np.float32(60)) + 20 * random.standard_normal((side, side), np.float32)
    return {"image": np.clip(grey, 0, 255).astype(np.uint8)}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"bincount": _bincount, "bincount of pairs": _pairs, "bincount in chunks that fit the cache": _chunked}


def _bincount(image: Image) -> dict[str, Any]:
    return _parted(image, np.bincount(image.reshape(-1), minlength=256))


def _pairs(image: Image) -> dict[str, Any]:
    """Half as many to count: two pixels at once are one of 65,536 values."""
    pairs = np.bincount(image.reshape(-1).view(np.uint16), minlength=65536).reshape(256, 256)
    return _parted(image, pairs.sum(axis=0) + pairs.sum(axis=1))


def _chunked(image: Image) -> dict[str, Any]:
    flat = image.reshape(-1)
    counts = np.zeros(256, np.int64)
    for start in range(0, flat.size, 16_384):
        counts += np.bincount(flat[start : start + 16_384], minlength=256)
    return _parted(image, counts)


def _parted(image: Image, counts: Counts) -> dict[str, Any]:
    values = np.arange(256)
    dark, sums = np.cumsum(counts), np.cumsum(counts * values)
    pixels, total = dark[-1], sums[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = (total * dark - pixels * sums).astype(np.float64)
        between = np.nan_to_num((gap / dark) * (gap / (pixels - dark)))
    threshold = int(np.argmax(between))
    spread = (counts * (values - total / pixels) ** 2).sum()
    return {
        "threshold": np.array([threshold]),
        "separability": np.array([between[threshold] / pixels / spread]),
        "mask": image > threshold,
    }
